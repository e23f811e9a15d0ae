"""data/pretrain_mini.py: what a batch asks for, against the sentences it was cut from."""

import json
import random

import numpy as np
import pytest
import torch

from checkpoint import load_checkpoint, read_checkpoint
from data import mini, pretrain_mini
from data.pretrain_mini import Batches, Corpus, train_tokenizer
from data.tokenizer import EOS, PAD, Tokenizer


@pytest.fixture(scope="module")
def corpus():
    rng = random.Random(1)
    meanings = mini.parallel_sentences(rng, 320)
    made = Corpus(meanings, [mini.near_miss(rng, meaning) for meaning in meanings])
    made.tokenizer = Tokenizer(train_tokenizer(made.texts, 1500))
    made.encode(made.tokenizer)
    return made


def test_languages_are_of_uneven_size(corpus):
    assert corpus.sizes["en"] == 320 and corpus.sizes["ar"] == 80 and corpus.sizes["sw"] == 40
    assert set(corpus.sizes) == set(mini.LANGUAGES)
    assert len(corpus.texts) == 2 * sum(corpus.sizes.values())


def test_spans_are_what_the_counterpart_has_not(corpus):
    """Cutting the spans out of both leaves the same pieces, and no shorter spans would do."""
    for s in range(0, len(corpus.texts), 2):
        one, other = (
            corpus.ids[corpus.starts[i] : corpus.starts[i + 1]].tolist() for i in (s, s + 1)
        )
        (a, b), (c, d) = ((corpus.low[i], corpus.high[i]) for i in (s, s + 1))
        assert one[:a] + one[b:] == other[:c] + other[d:] and one[a:b] != other[c:d]
        assert a == b or c == d or (one[a] != other[c] and one[b - 1] != other[d - 1])


def test_batches_against_the_sentences(corpus):
    stream = iter(Batches(corpus, corpus.tokenizer, 16, seed=0))
    known = {
        tuple(corpus.ids[corpus.starts[i] : corpus.starts[i + 1]]): i
        for i in range(len(corpus.texts))
    }
    seen = {"pairs": 0, "missed": 0, "single": 0}
    for _ in range(200):
        ids, mask, targets, changed = (t.numpy() for t in next(stream))
        assert (ids[~mask] == PAD).all() and (targets[~mask] == -1).all()
        assert (changed[~mask] == -1).all() and (changed[targets >= 0] == -1).all()
        whole = np.where(targets >= 0, targets, ids)
        assert (ids[targets >= 0] == corpus.tokenizer.mask_id).all()
        for row, real, asked, odd in zip(whole, mask, targets, changed, strict=True):
            row = row[real].tolist()
            assert row[0] == 0 and row[-1] == EOS
            if row.count(EOS) == 1:  # one sentence
                assert tuple(row[1:-1]) in known and (odd == -1).all()
                seen["single"] += 1
                continue
            middle = row.index(EOS)
            assert row[middle + 1] == EOS
            sides = (slice(1, middle), slice(middle + 2, len(row) - 1))
            a, b = (known[tuple(row[side])] for side in sides)
            assert not all((asked[real][side] >= 0).any() for side in sides)  # one side is masked
            # of one meaning: the first sentence of each language's block tells which
            first = [max(f for f in corpus.first.values() if f <= s) for s in (a, b)]
            assert (a - first[0]) // 2 == (b - first[1]) // 2
            missed = (a - first[0]) % 2 != (b - first[1]) % 2
            expected = np.zeros(len(row), dtype=int)
            for side, s in zip(sides, (a, b), strict=True):
                if missed:
                    expected[side][corpus.low[s] : corpus.high[s]] = 1
            expected[0] = missed
            left = odd[real] >= 0
            assert (odd[real][left] == expected[left]).all() and odd[0] == missed
            seen["pairs"] += 1
            seen["missed"] += missed
    assert seen["single"] > 300 and 0.4 < seen["missed"] / seen["pairs"] < 0.6


def test_program_writes_a_model_that_loads(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--meanings", "300", "--pieces", "1400", "--hidden", "32"]
    arguments += ["--layers", "1", "--steps", "6", "--batch-size", "8"]
    assert pretrain_mini.main(arguments) == 0
    assert "ETA" in capsys.readouterr().out
    path = str(tmp_path / "mini.pt")
    model = load_checkpoint(path)
    payload = read_checkpoint(path)
    assert all(t.dtype == torch.float16 for t in payload["tensors"].values())
    tokenizer = Tokenizer.from_payload(payload, path, model.config.vocab_size)
    ids = torch.tensor([tokenizer.encode("Kim will buy 5 red apples.")])
    assert model(ids)[0].shape == (1, ids.shape[1], tokenizer.vocab_size)
    with open(tmp_path / "pretrain.json", encoding="utf-8") as file:
        record = json.load(file)
    assert record["steps"] == 6 and record["curve"][-1]["step"] == 6

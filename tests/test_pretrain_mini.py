"""tools/pretrain_mini.py: the batches, against the sentences they were made from."""

import json

import numpy as np
import pytest
import torch

from checkpoint import load_checkpoint, read_checkpoint
from data.tokenizer import EOS, PAD, Tokenizer
from tools import pretrain_mini
from tools.make_mini import LANGUAGES
from tools.pretrain_mini import SHARES, Corpus, sample_batches


@pytest.fixture(scope="module")
def corpus():
    return Corpus(seed=1, meanings=320, pieces=1400)


def test_languages_are_of_uneven_size(corpus):
    sizes = dict(zip(SHARES, corpus.sizes.tolist(), strict=True))
    assert sizes["en"] == 320 and sizes["ar"] == 80 and sizes["sw"] == 40
    assert set(sizes) == set(LANGUAGES)
    assert len(corpus.texts) == 2 * sum(sizes.values())


def tokens_of(corpus, s):
    return corpus.ids[corpus.starts[s] : corpus.starts[s] + corpus.lengths[s]].tolist()


def test_spans_are_the_difference(corpus):
    """Without the spans both sentences have the same tokens, and no shorter spans would do."""
    for s in range(0, len(corpus.texts), 2):
        one, other = (tokens_of(corpus, i) for i in (s, s + 1))
        (a, b), (c, d) = ((corpus.span_start[i], corpus.span_end[i]) for i in (s, s + 1))
        assert one[:a] + one[b:] == other[:c] + other[d:] and one[a:b] != other[c:d]
        assert a == b or c == d or (one[a] != other[c] and one[b - 1] != other[d - 1])


def test_batches_against_the_sentences(corpus):
    stream = sample_batches(corpus, 16, seed=0)
    known = {tuple(tokens_of(corpus, i)): i for i in range(len(corpus.texts))}
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
            first = [max(f for f in corpus.first if f <= s) for s in (a, b)]
            assert (a - first[0]) // 2 == (b - first[1]) // 2
            missed = (a - first[0]) % 2 != (b - first[1]) % 2
            expected = np.zeros(len(row), dtype=int)
            for side, s in zip(sides, (a, b), strict=True):
                if missed:
                    expected[side][corpus.span_start[s] : corpus.span_end[s]] = 1
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
    assert "in 15 languages" in capsys.readouterr().out
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

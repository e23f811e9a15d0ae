"""tools/pretrain_mini.py: the batches, against the sentences they were made from."""

import json

import pytest
import torch

from checkpoint import load_model, read_model, tokenizer_of
from data.tokenizer import BOS, EOS, PAD
from tools import pretrain_mini
from tools.pretrain_mini import Corpus, sample_batches


@pytest.fixture(scope="module")
def corpus():
    return Corpus(seed=1, meanings=320, pieces=1400)


def tokens_of(corpus, s):
    return corpus.ids[corpus.starts[s] : corpus.starts[s] + corpus.lengths[s]].tolist()


def test_spans_are_the_difference(corpus):
    """Without the spans both sentences have the same tokens, and no shorter spans would do."""
    for s in range(0, len(corpus.texts), 2):
        one, other = (tokens_of(corpus, i) for i in (s, s + 1))
        (a, b), (c, d) = ((corpus.span_start[i], corpus.span_end[i]) for i in (s, s + 1))
        assert one[:a] + one[b:] == other[:c] + other[d:] and one[a:b] != other[c:d]
        assert a == b or c == d or (one[a] != other[c] and one[b - 1] != other[d - 1])


def test_batches_are_deterministic_and_balanced(corpus):
    """Half of the pairs differ, and no token is both masked and asked about."""
    streams, pairs = [sample_batches(corpus, 16, seed=0) for _ in range(2)], []
    for _ in range(200):
        batch, again = map(next, streams)
        assert all(map(torch.equal, batch, again))
        ids, mask, targets, changed = batch
        assert (ids[~mask] == PAD).all() and (targets[~mask] == -1).all() and (changed[~mask] == -1).all()
        assert (changed[targets >= 0] == -1).all() and (ids[targets >= 0] == corpus.tokenizer.mask_id).all()
        assert (ids[:, 0] == BOS).all() and ((ids == EOS).sum(dim=1) == (1 if (changed < 0).all() else 3)).all()
        pairs += changed[:, 0][changed[:, 0] >= 0].tolist()
    assert 2000 < len(pairs) < 3000 and 0.45 < sum(pairs) / len(pairs) < 0.55


def test_program_writes_a_model_that_loads(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--meanings", "300", "--pieces", "1400", "--hidden", "32"]
    arguments += ["--layers", "1", "--steps", "6", "--batch-size", "8"]
    assert pretrain_mini.main(arguments) == 0
    assert "in 15 languages" in capsys.readouterr().out
    path = str(tmp_path / "mini.safetensors")
    model, read = load_model(path), read_model(path)
    assert all(t.dtype == torch.float16 for t in read.tensors.values())
    tokenizer = tokenizer_of(path, read)
    ids = torch.tensor([tokenizer.encode("Kim will buy 5 red apples.")])
    assert model(ids)[0].shape == (1, ids.shape[1], tokenizer.vocab_size)
    record = json.loads((tmp_path / "pretrain.json").read_text(encoding="utf-8"))
    assert record["steps"] == 6 and record["curve"][-1]["step"] == 6

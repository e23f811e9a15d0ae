"""Attention recovery (analyze.py, plot.py): against definitions written out in pure Python."""

import copy
import itertools
import json

import pytest
import torch
from conftest import batch

import analyze
import plot
from analyze import (
    attention_recovery,
    cover_length,
    flipped_pairs,
    layer_errors,
    ranking_loss,
    real_rows,
    recovery_table,
)
from distill import map_loss, masked_mse
from model import build_model


def flips_of(student: list[float], teacher: list[float]) -> tuple[float, int]:
    """(flipped pairs, pairs) of one row."""
    flipped, pairs = 0.0, 0
    for i, j in itertools.combinations(range(len(teacher)), 2):
        if teacher[i] == teacher[j]:
            continue
        pairs += 1
        if student[i] == student[j]:
            flipped += 0.5
        elif (student[i] > student[j]) != (teacher[i] > teacher[j]):
            flipped += 1
    return flipped, pairs


def cover_of(student: list[float], teacher: list[float]) -> float:
    keys = range(len(teacher))
    wanted = set(sorted(keys, key=lambda i: -teacher[i])[:5])  # sorted() is stable
    for taken, key in enumerate(sorted(keys, key=lambda i: -student[i]), 1):
        wanted.discard(key)
        if not wanted:
            return taken / len(teacher)


LENGTHS = [9, 6, 5, 3, 2, 1]


def maps_of(seed, mask, levels=None, heads=3):
    """(B, H, T, T); levels: so few different numbers that many keys tie."""
    torch.manual_seed(seed)
    B, T = mask.shape
    if levels:
        return torch.randint(levels, (B, heads, T, T)) / levels
    return torch.randn(B, heads, T, T).masked_fill(~mask[:, None, None, :], -1e9).softmax(dim=-1)


def rows_of(maps, lengths):
    return [
        maps[b, h, q, :n].tolist()
        for b, n in enumerate(lengths)
        for q in range(n)
        for h in range(maps.shape[1])
    ]


@pytest.mark.parametrize("levels", [None, 2, 4])
@pytest.mark.parametrize("garbage", [0.0, 7.0, float("inf"), float("nan")])
@pytest.mark.parametrize("at_once", [1, 100, 2**18])
def test_rows_against_brute_force(levels, garbage, at_once, monkeypatch):
    monkeypatch.setattr(analyze, "PAIRS_AT_ONCE", at_once)
    mask = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
    maps = [maps_of(seed, mask, levels) for seed in (1, 2)]
    lists = list(zip(*(rows_of(each, LENGTHS) for each in maps), strict=True))
    real = mask[:, None, :, None] & mask[:, None, None, :]
    rows = [real_rows(each.masked_fill(~real, garbage), mask) for each in maps]
    assert len(rows[0]) == len(lists) == 3 * sum(LENGTHS)
    expected = [flips_of(*each) for each in lists]
    flipped, pairs = flipped_pairs(*rows)
    assert list(zip(flipped.tolist(), pairs.tolist(), strict=True)) == expected
    fractions = [flips / pairs for flips, pairs in expected if pairs]
    found, count = ranking_loss(*rows)
    assert count == len(fractions) and found == pytest.approx(sum(fractions) / count)
    assert cover_length(*rows).tolist() == pytest.approx([cover_of(*each) for each in lists])


def test_by_hand():
    nan = float("nan")
    teacher = torch.tensor([[0.4, 0.3, 0.2, 0.1, nan]])
    for student, share in (
        ([0.4, 0.3, 0.2, 0.1, nan], 0.0),
        ([0.1, 0.2, 0.3, 0.4, nan], 1.0),  # the other way round
        ([0.3, 0.4, 0.2, 0.1, nan], 1 / 6),
        ([0.25, 0.25, 0.25, 0.25, nan], 0.5),  # no order at all
    ):
        assert ranking_loss(torch.tensor([student]), teacher) == (pytest.approx(share), 1)
        assert cover_length(torch.tensor([student]), teacher).item() == 1  # 4 keys: all are top
    teacher = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]])
    assert cover_length(teacher, teacher).item() == 5 / 8
    moved = torch.tensor([[8.0, 7, 6, 5, 2, 4, 3, 1]])  # the fifth key is seventh now
    assert cover_length(moved, teacher).item() == 7 / 8
    # rows without an order have no say
    alike = torch.full((2, 4), 0.25)
    assert ranking_loss(alike, alike) == (0.0, 0)
    one = torch.tensor([[1.0, nan, nan]])
    assert ranking_loss(one, one) == (0.0, 0) and cover_length(one, one).item() == 1


# ---------------------------------------------------------------------------------------- of models
@torch.no_grad()
def test_recovery_against_text_by_text(models):
    """Padded batches give what one text at a time gives."""
    batches = [batch([9, 5, 3]), batch([6, 6]), batch([1, 1])]
    found = attention_recovery(*models, batches)
    texts = []
    for each in batches:
        for i in range(len(each.ids)):
            n = each.ids.shape[1] if each.mask is None else int(each.mask[i].sum())
            texts.append(
                [model(each.ids[i : i + 1, :n], None, ("map", "normed"))[1] for model in models]
            )
    for layer in range(2):
        lists, kl, mse, tokens = [], 0.0, 0.0, 0
        for target, seen in texts:
            t, s = target["map"][layer], seen["map"][layer]
            n = t.shape[-1]
            lists += zip(rows_of(s, [n]), rows_of(t, [n]), strict=True)
            kl += n * map_loss(s, t, None).item()
            mse += n * masked_mse(seen["normed"][layer], target["normed"][layer], None).item()
            tokens += n
        ranks = [flips / pairs for flips, pairs in (flips_of(*each) for each in lists) if pairs]
        covers = [cover_of(*each) for each in lists]
        # other rounding in a batch may turn a few near-equal keys round
        assert found["ranking"][layer] == pytest.approx(sum(ranks) / len(ranks), abs=2e-3)
        assert found["cover"][layer] == pytest.approx(sum(covers) / len(covers), abs=2e-3)
        assert found["map_kl"][layer] == pytest.approx(kl / tokens, rel=1e-4)
        assert found["output_mse"][layer] == pytest.approx(mse / tokens, rel=1e-4)
        assert 0 < found["ranking"][layer] < 0.5


def test_a_copy_has_recovered_everything(models):
    teacher, _ = models
    found = attention_recovery(teacher, copy.deepcopy(teacher), [batch([10, 10]), batch([10, 8])])
    best = (10 * 5 / 10 * 3 + 8 * 5 / 8) / 38
    assert found["ranking"] == found["map_kl"] == found["output_mse"] == [0.0, 0.0]
    assert found["cover"] == pytest.approx([best, best])
    assert json.loads(json.dumps(found)) == found


def test_table(models):
    found = attention_recovery(*models, [batch([7, 4])])
    text = recovery_table({"fp32": {}, "ptq": {"recovery": found}, "sdq": {"recovery": found}})
    ranking, cover = 100 * found["ranking"][1], 100 * found["cover"][1]
    assert "layer 2" in text and f"{ranking:.1f} / {cover:.1f} |" in text
    assert text.count("\n") == 3


def test_both_read_the_token_types(tiny_config):
    """The second text of a pair has a type of its own, which teacher and student must see."""
    from dataclasses import replace

    class Recorder(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.encoder, self.seen = model, model.encoder, []

        def forward(self, *inputs, types=None):
            self.seen.append(types)
            return self.model(*inputs, types=types)

    model = build_model(replace(tiny_config, type_vocab_size=2))
    with torch.no_grad():
        model.encoder.embeddings.token_type.weight.mul_(50)
    pair = batch([6, 4])
    pair.types = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0]])
    for measure in (attention_recovery, layer_errors):
        teacher, student = Recorder(model), Recorder(copy.deepcopy(model))
        measure(teacher, student, [pair])
        assert len(teacher.seen) == len(student.seen) == 1
        assert teacher.seen[0] is student.seen[0] is pair.types


# --------------------------------------------------------------------------------------- the figure
def write(folder, recoveries, **config):
    """A results.json with what --recovery reads. recoveries: method -> ranking of each layer."""
    found = {"english": 1.0, "zero_shot_mean": None, "size_bytes": 1, "languages": {}}
    methods = {"fp32": found} | {
        name: found | {"recovery": {"ranking": ranking, "cover": [2 * x for x in ranking]}}
        for name, ranking in recoveries.items()
    }
    settings = {"task": "cola", "eval_split": "dev", "model": "m", "bits": 2, "act_bits": 8}
    settings |= {"seed": 0, "noise": 1.0, "distill": "logits+map", "gamma": None}
    settings |= {"part_weights": []}
    path = folder / f"{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps({"config": settings | config, "model": "bert", "methods": methods}))
    return str(path)


def test_what_is_drawn(tmp_path):
    """A mean over tasks for each seed, by loss; PTQ stands in every file and counts once."""
    for seed in (0, 1):
        for task, shift in (("cola", 0.0), ("rte", 0.1)):
            for distill, add in (("logits+map", 0.0), ("logits+output", 0.02)):
                ranking = [0.1 + shift + add, 0.2 + shift + add + 0.05 * seed]
                both = {"ptq": [0.4, 0.5], "sdq": ranking}
                write(tmp_path, both, seed=seed, task=task, distill=distill)
    config, curves = plot.read_recovery([str(tmp_path / "*.json")])
    assert set(curves) == {"PTQ", "logits+map", "logits+output"} and config["bits"] == 2
    assert config["tasks"] == ["cola", "rte"]
    assert curves["PTQ"]["ranking"] == [pytest.approx([0.4, 0.5])] * 2
    found = curves["logits+map"]["ranking"]
    assert found == [pytest.approx([0.15, 0.25]), pytest.approx([0.15, 0.30])]
    assert curves["logits+output"]["cover"][1] == pytest.approx([0.34, 0.64])


def test_weights_of_parts_are_told_apart(tmp_path):
    for weights in ([], ["map=30.0"]):
        write(tmp_path, {"sdq": [0.1, 0.2]}, part_weights=weights)
    _, curves = plot.read_recovery([str(tmp_path / "*.json")])
    assert set(curves) == {"logits+map", "logits+map, map=30.0"}


def test_what_cannot_be_drawn(tmp_path, capsys):
    def refused(*files):
        assert plot.main([*files, "--recovery", "--out", str(tmp_path / "x.png")]) == 2
        return capsys.readouterr().err

    first = write(tmp_path, {"sdq": [0.1, 0.2]})
    assert "no recovery" in refused(write(tmp_path, {}))
    assert "the same seed" in refused(first, write(tmp_path, {"sdq": [0.3, 0.2]}))
    assert "--noise" in refused(first, write(tmp_path, {"sdq": [0.3, 0.2]}, seed=1, noise=0.5))
    assert "--bits" in refused(first, write(tmp_path, {"sdq": [0.3, 0.2]}, bits=4, seed=1))
    assert "layers" in refused(first, write(tmp_path, {"sdq": [0.3]}, seed=1))
    other = write(tmp_path, {"sdq": [0.3, 0.1]}, task="rte", model="other")
    assert "--model" in refused(first, other)  # no mean over tasks of different models
    assert "rte" in refused(first, write(tmp_path, {"sdq": [0.3, 0.1]}, seed=1, task="rte"))
    assert "is not a results.json" in refused(str(tmp_path / "none.json"))


def test_figure(tmp_path):
    pytest.importorskip("matplotlib")
    for seed in range(2):
        write(tmp_path, {"qat": [0.4, 0.5], "sdq": [0.1, 0.2 + seed / 9]}, seed=seed)
    out = tmp_path / "recovery.png"
    assert plot.main([str(tmp_path / "*.json"), "--recovery", "--out", str(out)]) == 0
    assert out.stat().st_size > 5000

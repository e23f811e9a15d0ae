"""analyze.py: layer errors and attention recovery against definitions written out in plain Python."""

import copy
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import batch

import analyze
from analyze import PLACES, attention_recovery, cover_length, flipped_pairs, layer_errors, ranking_loss, real_rows
from distill import map_loss, real_pairs, vector_loss
from kit.report import analysis_tables
from model import build_model


def sequences_of(batches):
    """Each sequence alone, (1, T) without padding."""
    for rows in batches:
        for i in range(len(rows.ids)):
            length = rows.ids.shape[1] if rows.mask is None else int(rows.mask[i].sum())
            yield rows.ids[i : i + 1, :length]


# ----------------------------------------------------------------------------------------- errors
@torch.no_grad()
def test_errors_of_padded_batches_equal_those_of_single_sequences(models):
    teacher, student = models
    batches = [batch([9, 5, 3]), batch([6, 6])]
    found = layer_errors(teacher, student, batches)
    differences = {place: [[], []] for place in PLACES}
    references = {place: [[], []] for place in PLACES}
    for ids in sequences_of(batches):
        s, t = student(ids, None, PLACES)[1], teacher(ids, None, PLACES)[1]
        for place in PLACES:
            for layer in range(2):
                one, other = (x[place][layer].double().numpy() for x in (s, t))
                differences[place][layer].append(one - other)
                references[place][layer].append(other)
    for place in PLACES:
        for layer in range(2):
            parts, whole = differences[place][layer], references[place][layer]
            flat = np.concatenate([p.ravel() for p in parts])
            norm = np.linalg.norm(np.concatenate([p.ravel() for p in whole]))
            measured = found["accumulated"][place][layer]
            assert measured["mae"] == pytest.approx(np.abs(flat).mean(), rel=1e-4)
            assert measured["relative"] == pytest.approx(np.linalg.norm(flat) / norm, rel=1e-4)
            each = [np.linalg.norm(p) for p in parts]
            assert measured["frobenius"] == pytest.approx(np.mean(each), rel=1e-4)


def test_local_errors_start_from_the_teacher(models):
    """A layer that is not quantized has no local error, only what the layers before it got wrong."""
    teacher, student = models
    student.encoder.layers[1] = copy.deepcopy(teacher.encoder.layers[1])
    found = layer_errors(teacher, student, [batch([8, 8])])
    for place in PLACES:
        assert found["local"][place][1]["relative"] == 0
        assert found["accumulated"][place][1]["relative"] > 0
        assert found["local"][place][0]["relative"] > 0


def test_errors_and_recovery_as_tables_and_json(models):
    errors, found = layer_errors(*models, [batch([5])]), attention_recovery(*models, [batch([7, 4])])
    row = {"errors": errors, "recovery": found}
    assert json.loads(json.dumps(row)) == row
    first, halves, second, third = analysis_tables({"fp32": {}, "ptq": row, "sdq": row}).split("\n\n")
    assert f"{100 * found['generation'][1]:.1f} / {100 * found['propagation'][1]:.1f} |" in halves
    relative = errors["accumulated"]["context"][1]["relative"]
    assert "layer 2" in first and f"{100 * relative:.1f} |" in first and first.count("\n") == 5
    ranking, cover = 100 * found["ranking"][1], 100 * found["cover"][1]
    assert "layer 2" in second and f"{ranking:.1f} / {cover:.1f} |" in second
    assert second.count("\n") == 3
    assert f"| fp32     | {found['kurtosis'][0]:7.1f} | {found['kurtosis'][1]:7.1f} |" in third


# ------------------------------------------------------------------------- ranking and cover length
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
    """The cover length ratio of one row."""
    keys = range(len(teacher))
    wanted = set(sorted(keys, key=lambda i: -teacher[i])[:5])  # sorted() is stable
    for taken, key in enumerate(sorted(keys, key=lambda i: -student[i]), 1):
        wanted.discard(key)
        if not wanted:
            return taken / len(teacher)


LENGTHS = [9, 6, 5, 3, 2, 1]


def random_maps(seed, mask, levels=None, heads=3):
    """Attention probabilities (B, H, T, T).  levels: the number of distinct values; with few of them, keys tie."""
    torch.manual_seed(seed)
    B, T = mask.shape
    if levels:
        return torch.randint(levels, (B, heads, T, T)) / levels
    return torch.randn(B, heads, T, T).masked_fill(~mask[:, None, None, :], -1e9).softmax(dim=-1)


def rows_of(maps, lengths):
    return [maps[b, h, q, :n].tolist() for b, n in enumerate(lengths) for q in range(n) for h in range(maps.shape[1])]


@pytest.mark.parametrize("levels", [None, 2, 4])
@pytest.mark.parametrize("garbage", [0.0, 7.0, float("inf"), float("nan")])
@pytest.mark.parametrize("at_once", [1, 100, 2**18])
def test_rows_against_brute_force(levels, garbage, at_once, monkeypatch):
    monkeypatch.setattr(analyze, "PAIRS_AT_ONCE", at_once)
    mask = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
    maps = [random_maps(seed, mask, levels) for seed in (1, 2)]
    lists = list(zip(*(rows_of(each, LENGTHS) for each in maps), strict=True))
    rows = [real_rows(each.masked_fill(~real_pairs(mask), garbage), mask) for each in maps]
    assert len(rows[0]) == len(lists) == 3 * sum(LENGTHS)
    expected = [flips_of(*each) for each in lists]
    flipped, pairs = flipped_pairs(*rows)
    assert list(zip(flipped.tolist(), pairs.tolist(), strict=True)) == expected
    fractions = [flips / pairs for flips, pairs in expected if pairs]
    found, count = ranking_loss(*rows)
    assert count == len(fractions) and found == pytest.approx(sum(fractions) / count)
    assert cover_length(*rows).tolist() == pytest.approx([cover_of(*each) for each in lists])


def test_rows_by_hand():
    nan = float("nan")
    teacher = torch.tensor([[0.4, 0.3, 0.2, 0.1, nan]])
    for student, fraction in (
        ([0.4, 0.3, 0.2, 0.1, nan], 0),
        ([0.1, 0.2, 0.3, 0.4, nan], 1),
        ([0.25] * 4 + [nan], 0.5),
    ):
        assert ranking_loss(torch.tensor([student]), teacher) == (pytest.approx(fraction), 1)
    teacher = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]])
    moved = torch.tensor([[8.0, 7, 6, 5, 2, 4, 3, 1]])  # the fifth key is seventh now
    assert cover_length(torch.cat([teacher, moved]), teacher.expand(2, 8)).tolist() == [5 / 8, 7 / 8]
    for alike in (torch.full((2, 4), 0.25), torch.tensor([[1.0, nan, nan]])):  # no order: left out
        assert ranking_loss(alike, alike) == (0.0, 0)


# ----------------------------------------------------------------------------- attention recovery
@torch.no_grad()
def test_recovery_of_padded_batches_equals_that_of_single_sequences(models):
    batches = [batch([9, 5, 3]), batch([6, 6]), batch([1, 1])]
    found = attention_recovery(*models, batches)
    taps = [
        [model(ids, None, ("score", "map", "value", "normed", "hidden"))[1] for model in models]
        for ids in sequences_of(batches)
    ]
    for layer in range(2):
        lists, kl, mse, tokens, kurtosis, halves, normed = [], 0.0, 0.0, 0, [], [0.0, 0.0, 0.0], []
        for target, seen in taps:
            t, s = target["map"][layer], seen["map"][layer]
            n = t.shape[-1]
            lists += zip(rows_of(s, [n]), rows_of(t, [n]), strict=True)
            kl += n * map_loss(seen["score"][layer], target["score"][layer], None).item()
            mse += n * vector_loss(seen["normed"][layer], target["normed"][layer], None).item()
            tokens += n
            (M, V), (N, W) = ((taps["map"][layer], taps["value"][layer]) for taps in (target, seen))
            for i, wrong in enumerate((N @ V - M @ V, M @ W - M @ V, M @ V)):
                halves[i] += wrong.square().sum().item()
            normed.append(seen["normed"][layer])
            for y in (
                target["hidden"][layer + 1][0] - target["hidden"][layer + 1][0].mean(dim=1, keepdim=True)
            ).numpy():
                kurtosis.append((y**4).mean() / (y**2).mean() ** 2)
        ranks = [flips / pairs for flips, pairs in (flips_of(*each) for each in lists) if pairs]
        covers = [cover_of(*each) for each in lists]
        # other rounding in a batch may swap a few keys that are nearly equal
        assert found["ranking"][layer] == pytest.approx(sum(ranks) / len(ranks), abs=2e-3)
        assert found["cover"][layer] == pytest.approx(sum(covers) / len(covers), abs=2e-3)
        assert found["map_kl"][layer] == pytest.approx(kl / tokens, rel=1e-4)
        assert found["output_mse"][layer] == pytest.approx(mse / tokens, rel=1e-4)
        assert found["kurtosis"][layer] == pytest.approx(sum(kurtosis) / tokens, rel=1e-4)
        for name, squares in zip(("generation", "propagation"), halves, strict=False):
            assert found[name][layer] == pytest.approx((squares / halves[2]) ** 0.5, rel=1e-4)
        assert found["smallest"][layer] == pytest.approx(min(x.min().item() for x in normed), rel=1e-5)
        assert found["largest"][layer] == pytest.approx(max(x.max().item() for x in normed), rel=1e-5)
        assert 0 < found["ranking"][layer] < 0.5


class Recorder(torch.nn.Module):
    """A model that remembers the token types it was given."""

    def __init__(self, model):
        super().__init__()
        self.model, self.encoder, self.seen = model, model.encoder, []

    def forward(self, *inputs, types=None):
        self.seen.append(types)
        return self.model(*inputs, types=types)


@pytest.mark.parametrize("measure", [attention_recovery, layer_errors])
def test_teacher_and_student_get_the_token_types(measure, tiny_config):
    """The second text of a pair has a token type of its own."""
    model = build_model(replace(tiny_config, type_vocab_size=2))
    with torch.no_grad():
        model.encoder.embeddings.token_type.weight.mul_(50)
    pair = batch([6, 4])
    pair.types = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0]])
    teacher, student = Recorder(model), Recorder(copy.deepcopy(model))
    measure(teacher, student, [pair])
    assert len(teacher.seen) == len(student.seen) == 1
    assert teacher.seen[0] is student.seen[0] is pair.types

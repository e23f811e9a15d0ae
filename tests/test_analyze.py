"""analyze.py: the error of a student's layers against brute force."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import batch

from analyze import PLACES, errors_table, layer_errors


def test_a_copy_has_no_error(models):
    teacher, _ = models
    found = layer_errors(teacher, copy.deepcopy(teacher), [batch([7, 4])])
    for kind in ("accumulated", "local"):
        for place in PLACES:
            assert [set(layer.values()) for layer in found[kind][place]] == [{0.0}, {0.0}]


@torch.no_grad()
def test_against_text_by_text(models):
    """Padded batches give what one text at a time gives, computed with numpy."""
    teacher, student = models
    batches = [batch([9, 5, 3]), batch([6, 6])]
    found = layer_errors(teacher, student, batches)
    differences = {place: [[], []] for place in PLACES}
    references = {place: [[], []] for place in PLACES}
    for rows in batches:
        for i in range(len(rows.ids)):
            length = rows.ids.shape[1] if rows.mask is None else int(rows.mask[i].sum())
            ids = rows.ids[i : i + 1, :length]
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
    """A layer that is not quantized has no error of its own, only what came from below."""
    teacher, student = models
    student.encoder.layers[1] = copy.deepcopy(teacher.encoder.layers[1])
    found = layer_errors(teacher, student, [batch([8, 8])])
    for place in PLACES:
        assert found["local"][place][1]["relative"] == 0
        assert found["accumulated"][place][1]["relative"] > 0
        assert found["local"][place][0]["relative"] > 0


def test_table_and_json(models):
    errors = layer_errors(*models, [batch([5])])
    assert json.loads(json.dumps(errors)) == errors
    text = errors_table({"fp32": {}, "sdq": {"errors": errors}})
    relative = errors["accumulated"]["context"][1]["relative"]
    assert "layer 2" in text and f"{100 * relative:.1f} |" in text and text.count("\n") == 3

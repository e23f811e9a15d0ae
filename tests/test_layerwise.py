"""Layer-by-layer distillation (distill.py): its schedule and its terms."""

import math

import pytest
import torch
from test_distill import LENGTHS, MASK

from distill import (
    MAP_FLOOR,
    ORDERS,
    LayerSchedule,
    layerwise_terms,
    map_loss,
    masked_cosine,
    masked_mse,
)


@pytest.mark.parametrize("S", [1, 5])
@pytest.mark.parametrize("order", ORDERS)
def test_stage_boundaries(order, S):
    schedule = LayerSchedule(layers=3, stage_steps=S, order=order)
    stages = {
        "bottom-up": [(1,), (1, 2), (1, 2, 3)],
        "top-down": [(3,), (2, 3), (1, 2, 3)],
        "together": [(1, 2, 3)] * 3,
    }[order]
    found = [schedule.blocks(step) for step in range(5 * S)]
    assert found == [stage for stage in stages for _ in range(S)] + [(1, 2, 3)] * 2 * S
    assert schedule.last_stage_start == 3 * S
    assert [schedule.is_last(step) for step in range(5 * S)] == [False] * 3 * S + [True] * 2 * S


def test_schedules_that_cannot_be():
    for wrong in ({"layers": 0}, {"stage_steps": 0}, {"order": "sideways"}):
        with pytest.raises(ValueError):
            LayerSchedule(**{"layers": 3, "stage_steps": 5, "order": "bottom-up"} | wrong)


def layerwise_taps(seed, mask, layers=3):
    """Taps as the model returns them: of maps, the columns of padded keys are zero."""
    torch.manual_seed(seed)
    B, T = mask.shape
    scores = [torch.randn(B, 2, T, T) for _ in range(layers)]
    maps = [s.masked_fill(~mask[:, None, None, :], -math.inf).softmax(dim=-1) for s in scores]
    return {"hidden": [torch.randn(B, T, 8) for _ in range(layers + 1)], "map": maps}


BLOCKS = (1, 2, 3)


def values(student, teacher, mask=MASK, blocks=BLOCKS):
    return {k: v.item() for k, v in layerwise_terms(student, teacher, blocks, mask).items()}


def test_masked_cosine_by_brute_force():
    student, teacher = torch.randn(3, 6, 5), torch.randn(3, 6, 5)
    total = 0.0
    for b, length in enumerate(LENGTHS):
        for t in range(length):
            s, r = student[b, t].double(), teacher[b, t].double()
            total += 1 - float(s @ r) / math.sqrt(float(s @ s) * float(r @ r))
    assert masked_cosine(student, teacher, MASK).item() == pytest.approx(total / 11, rel=1e-5)
    # by direction only: 0 for the same, 2 for the opposite
    assert masked_cosine(3 * student, student, MASK).item() == pytest.approx(0, abs=1e-6)
    assert masked_cosine(-student, student, MASK).item() == pytest.approx(2)


def test_masked_cosine_of_zeros():
    """Zeros on either side, or on both, cost nothing and get no gradient; the rest is untouched."""
    student, teacher = torch.randn(1, 4, 5), torch.randn(1, 4, 5)
    student[0, 0] = teacher[0, 1] = student[0, 2] = teacher[0, 2] = 0.0
    student.requires_grad_()
    loss = masked_cosine(student, teacher, None)
    alone = masked_cosine(student[:, 3:], teacher[:, 3:], None)
    assert loss.item() == pytest.approx(alone.item() / 4, rel=1e-5)
    loss.backward()
    assert (student.grad[0, :3] == 0).all()
    assert student.grad[0, 3].isfinite().all() and student.grad[0, 3].any()


def test_map_loss_by_brute_force():
    student, teacher = layerwise_taps(1, MASK)["map"][0], layerwise_taps(2, MASK)["map"][0]
    student[0, 0, 0] = torch.eye(6)[0]  # a student that sees one key only: the floor is at work
    total = 0.0
    for b, length in enumerate(LENGTHS):
        for h in range(2):
            for query in range(length):
                for key in range(length):
                    p = max(float(teacher[b, h, query, key]), MAP_FLOOR)
                    q = max(float(student[b, h, query, key]), MAP_FLOOR)
                    total += p * math.log(p / q)
    assert map_loss(student, teacher, MASK).item() == pytest.approx(total / (11 * 2), rel=1e-5)


def test_map_loss_does_not_see_a_constant_in_the_scores():
    """softmax(x + c) = softmax(x): unlike an MSE of the scores."""
    student, teacher = torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5)
    before = map_loss(student.softmax(-1), teacher.softmax(-1), None).item()
    moved = student + 7 * torch.randn(2, 3, 5, 1)
    after = map_loss(moved.softmax(-1), teacher.softmax(-1), None).item()
    assert before > 0.1 and after == pytest.approx(before, rel=1e-4)


def test_layerwise_terms_are_means_over_the_active_levels():
    student, teacher = layerwise_taps(1, MASK), layerwise_taps(2, MASK)

    def mean(loss, tap, places):
        each = [loss(student[tap][i], teacher[tap][i], MASK).item() for i in places]
        return sum(each) / len(each)

    for blocks in ((1,), (1, 2), (2, 3), (3,)):
        levels = (0, *blocks)
        assert values(student, teacher, blocks=blocks) == pytest.approx(
            {
                "hidden": mean(masked_mse, "hidden", levels),
                "cosine": mean(masked_cosine, "hidden", levels),
                "map": mean(map_loss, "map", [b - 1 for b in blocks]),
            }
        )


def test_layerwise_terms_need_only_the_layers_that_were_run():
    student, teacher = layerwise_taps(1, MASK), layerwise_taps(2, MASK)
    short = {"hidden": student["hidden"][:3], "map": student["map"][:2]}
    shorter = {"hidden": teacher["hidden"][:3], "map": teacher["map"][:2]}
    assert values(short, shorter, blocks=(1, 2)) == values(student, teacher, blocks=(1, 2))


def test_layerwise_student_equal_to_teacher_costs_nothing():
    taps = layerwise_taps(1, MASK)
    nothing = dict.fromkeys(("hidden", "cosine", "map"), 0.0)
    assert values(taps, taps) == pytest.approx(nothing, abs=1e-6)


def test_layerwise_no_mask_means_all_real():
    mask = torch.ones(2, 5, dtype=torch.bool)
    student, teacher = layerwise_taps(1, mask), layerwise_taps(2, mask)
    assert values(student, teacher, None) == pytest.approx(values(student, teacher, mask))


def test_layerwise_gradients():
    """To the student's active levels, and to nothing else."""
    student, teacher = layerwise_taps(1, MASK), layerwise_taps(2, MASK)
    for taps in (student, teacher):
        for tensor in [*taps["hidden"], *taps["map"]]:
            tensor.requires_grad_()
    sum(layerwise_terms(student, teacher, (1,), MASK).values()).backward()
    assert [t.grad is not None for t in student["hidden"]] == [True, True, False, False]
    assert [t.grad is not None for t in student["map"]] == [True, False, False]
    assert all(t.grad is None for t in [*teacher["hidden"], *teacher["map"]])


@pytest.mark.parametrize("garbage", [1e3, float("inf"), float("nan")])
def test_layerwise_terms_do_not_see_padding(garbage):
    student, teacher = layerwise_taps(1, MASK), layerwise_taps(2, MASK)
    before = values(student, teacher)
    real = MASK[:, None, :, None] & MASK[:, None, None, :]  # (B, 1, T, T)
    wide_mask = torch.nn.functional.pad(MASK, (0, 5), value=False)

    def padded(taps, value):
        pad = torch.nn.functional.pad
        hidden = [t.masked_fill(~MASK[..., None], value) for t in taps["hidden"]]
        maps = [t.masked_fill(~real, value) for t in taps["map"]]
        return {
            "hidden": [pad(t, (0, 0, 0, 5), value=value) for t in hidden],
            "map": [pad(t, (0, 5, 0, 5), value=value) for t in maps],
        }

    student, teacher = padded(student, garbage), padded(teacher, -garbage)
    for tensor in [*student["hidden"], *student["map"]]:
        tensor.requires_grad_()
    found = layerwise_terms(student, teacher, BLOCKS, wide_mask)
    assert {k: v.item() for k, v in found.items()} == pytest.approx(before, rel=1e-5)
    sum(found.values()).backward()
    for tensor in student["hidden"]:
        assert tensor.grad.isfinite().all() and (tensor.grad[~wide_mask] == 0).all()
    wide_real = wide_mask[:, None, :, None] & wide_mask[:, None, None, :]
    for tensor in student["map"]:
        assert tensor.grad.isfinite().all() and (tensor.grad.masked_fill(wide_real, 0) == 0).all()

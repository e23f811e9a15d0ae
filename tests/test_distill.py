"""distill.py: losses against formulas written out in float64, and layer-by-layer distillation.

Every row of LOSSES, and the cosine of layer-by-layer distillation, goes through the same tests: zero for equal
tensors, a gradient to the student only, and a value that depends neither on padding nor on the batch size.
"""

import math

import pytest
import torch
from torch.nn.functional import pad

from distill import (
    LAYERWISE,
    LOSSES,
    LayerSchedule,
    Loss,
    cosine_loss,
    layerwise_terms,
    logits_loss,
    logits_terms,
    map_loss,
    real_pairs,
    score_loss,
    vector_loss,
)
from model import TAPS

LENGTHS = [6, 4, 1]
TOKENS = sum(LENGTHS)
MASK = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
PAIRS = ("score", "map")
PER_HEAD = ("query", "key", "value", "context")


def random_taps(seed, mask, layers=3):
    """Every tap, as the model returns it: scores of padded keys are -inf, and what stands at padded
    queries is arbitrary.
    """
    torch.manual_seed(seed)
    B, T = mask.shape
    padded = ~mask[:, None, None, :]
    score = [torch.randn(B, 2, T, T).masked_fill(padded, -math.inf) for _ in range(layers)]
    taps = {"score": score, "map": [s.softmax(dim=-1) for s in score]}
    for tap in sorted(set(TAPS) - set(PAIRS)):
        shape = (B, 2, T, 4) if tap in PER_HEAD else (B, T, 8)
        taps[tap] = [torch.randn(shape) for _ in range(layers + (tap == "hidden"))]
    return taps


def real_elements(tap, mask):
    """True where a tap is not padding, broadcastable to it."""
    if tap in PAIRS:
        return real_pairs(mask)
    return mask[:, None, :, None] if tap in PER_HEAD else mask[..., None]


def widen(taps, value, mask=MASK, extra=5):
    """The same taps with `extra` more padded tokens, and `value` at every padded position."""
    wide_mask = pad(mask, (0, extra), value=False)
    wide = {}
    for name, tensors in taps.items():
        columns = extra if name in PAIRS else 0
        real = real_elements(name, wide_mask)
        wide[name] = [pad(t, (0, columns, 0, extra)).masked_fill(~real, value) for t in tensors]
    return wide


# --------------------------------------------------------------------------- every row of LOSSES
EVERY = LOSSES | {"cosine": Loss("hidden", cosine_loss, "tokens")}
OF_TAPS = [name for name, (tap, *_) in EVERY.items() if tap]


def loss_inputs(name, seed, mask=MASK):
    """The first layer of the tap that a loss reads; random logits for "logits"."""
    tap = EVERY[name].tap
    if not tap:
        torch.manual_seed(seed)
        return torch.randn(len(mask), 3)
    return random_taps(seed, mask)[tap][0]


def loss_value(name, student, teacher, mask=MASK):
    tap, loss, _ = EVERY[name]
    return loss(student, teacher, mask=mask) if tap else loss(student, teacher, 2.0)


def test_every_loss_reads_a_tap_of_the_model():
    assert [name for name, (tap, *_) in LOSSES.items() if not tap] == ["logits"]
    assert {tap for tap, *_ in LOSSES.values() if tap} <= set(TAPS)
    for name in ("output", "residual", "normed"):  # three places of the same result
        assert LOSSES[name] == (name, vector_loss, "tokens")


@pytest.mark.parametrize("name", EVERY)
def test_loss_of_equal_tensors_is_zero(name):
    student = loss_inputs(name, 1)
    assert loss_value(name, student, student.clone()).item() == pytest.approx(0.0, abs=1e-6)
    assert loss_value(name, student, loss_inputs(name, 2)).item() > 0.1


@pytest.mark.parametrize("name", EVERY)
def test_gradient_reaches_the_student_only(name):
    student, teacher = loss_inputs(name, 1), loss_inputs(name, 2)
    student.requires_grad_()
    teacher.requires_grad_()
    loss_value(name, student, teacher).backward()
    assert student.grad.isfinite().all() and student.grad.any() and teacher.grad is None


@pytest.mark.parametrize("garbage", [1e3, math.inf, math.nan])
@pytest.mark.parametrize("name", OF_TAPS)
def test_padding_changes_neither_value_nor_gradient(name, garbage):
    tap, wide_mask = EVERY[name].tap, pad(MASK, (0, 5), value=False)
    tensors = loss_inputs(name, 1), loss_inputs(name, 2)
    wide = [widen({tap: [tensor]}, value)[tap][0] for tensor, value in zip(tensors, (garbage, -garbage), strict=True)]
    for tensor in (tensors[0], *wide):
        tensor.requires_grad_()
    before, after = loss_value(name, *tensors), loss_value(name, *wide, wide_mask)
    assert after.item() == pytest.approx(before.item(), rel=1e-5)
    before.backward()
    after.backward()
    grad, real = wide[0].grad, real_elements(tap, wide_mask).expand_as(wide[0])
    assert grad.isfinite().all() and grad.any() and (grad[~real] == 0).all()
    expected = tensors[0].grad[real_elements(tap, MASK).expand_as(tensors[0])]
    torch.testing.assert_close(grad[real], expected)
    assert wide[1].grad is None


@pytest.mark.parametrize("name", EVERY)
def test_batch_size_does_not_change_the_value(name):
    """The same sequences twice give the same value."""
    student, teacher = loss_inputs(name, 1), loss_inputs(name, 2)
    once = loss_value(name, student, teacher)
    twice = [torch.cat([tensor] * 2) for tensor in (student, teacher)]
    both = loss_value(name, *twice, torch.cat([MASK, MASK]))
    assert both.item() == pytest.approx(once.item(), rel=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_no_mask_means_that_all_tokens_are_real(name):
    mask = torch.ones(2, 5, dtype=torch.bool)
    student, teacher = loss_inputs(name, 1, mask), loss_inputs(name, 2, mask)
    value = loss_value(name, student, teacher, mask).item()
    assert loss_value(name, student, teacher, None).item() == pytest.approx(value, rel=1e-6)


# ----------------------------------------------------------------------------------------- logits
def test_logits_loss_by_hand():
    student, teacher = torch.randn(5, 3), torch.randn(5, 3)
    for tau in (1.0, 2.5):
        total = 0.0
        for s, t in zip(student.double(), teacher.double(), strict=True):
            p, q = (t / tau).softmax(0), (s / tau).softmax(0)
            total += float((p * (p.log() - q.log())).sum())
        expected = tau**2 * total / 5
        assert logits_loss(student, teacher, tau).item() == pytest.approx(expected, rel=1e-5)


def test_logits_gradient_does_not_shrink_with_the_temperature():
    """The gradient at high temperature is as large as at tau = 1 (Hinton et al. 2015)."""
    teacher = torch.randn(64, 3)
    norms = []
    for tau in (1.0, 10.0):
        student = (teacher + 0.1 * torch.randn_like(teacher)).requires_grad_()
        logits_loss(student, teacher, tau).backward()
        norms.append(student.grad.norm().item())
    assert 0.3 < norms[1] / norms[0] < 3


def test_logits_of_tokens_are_averaged_over_real_tokens():
    student, teacher = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    student[~mask], teacher[~mask] = float("nan"), float("inf")
    student.requires_grad_()
    loss = logits_loss(student, teacher, 2.0, mask)
    rows = [(0, 0), (0, 1), (0, 2), (1, 0)]
    alone = [logits_loss(student[b, t, None], teacher[b, t, None], 2.0).item() for b, t in rows]
    assert loss.item() == pytest.approx(sum(alone) / 4, rel=1e-5)
    loss.backward()
    assert student.grad.isfinite().all() and (student.grad[~mask] == 0).all()
    # no mask: all are real
    real, other = student.detach()[:, :1], teacher[:, :1]
    both = logits_loss(real[:, 0], other[:, 0], 2.0)
    assert logits_loss(real, other, 2.0).item() == pytest.approx(both.item())


def test_joint_logits_are_two_terms():
    mask = torch.tensor([[True, True, True], [True, True, False]])
    student, teacher = ((torch.randn(2, 5), torch.randn(2, 3, 4)) for _ in range(2))
    intents = logits_loss(student[0], teacher[0], 2.0)
    slots = logits_loss(student[1], teacher[1], 2.0, mask)
    assert logits_terms(student, teacher, 2.0, mask) == {"logits": intents, "slot_logits": slots}
    assert logits_terms(student[0], teacher[0], 2.0, None) == {"logits": intents}


def test_logits_of_a_regression():
    """One column is a value, not a distribution: MSE, at any temperature."""
    student, teacher = torch.randn(5, 1, requires_grad=True), torch.randn(5, 1, requires_grad=True)
    expected = ((student - teacher).double() ** 2).mean().item()
    for tau in (1.0, 4.0):
        assert logits_loss(student, teacher, tau).item() == pytest.approx(expected, rel=1e-6)
    logits_loss(student, teacher, 4.0).backward()
    assert torch.allclose(student.grad, 2 * (student - teacher).detach() / 5)
    assert teacher.grad is None


# ------------------------------------------------------------------------------ losses of a layer
@pytest.mark.parametrize("heads", [None, 4])
def test_vector_loss_by_brute_force(heads):
    shape = (3, 6, 5) if heads is None else (3, heads, 6, 5)
    student, teacher = torch.randn(shape), torch.randn(shape)
    squares = []
    for b, length in enumerate(LENGTHS):
        for t in range(length):
            difference = student[b][..., t, :].double() - teacher[b][..., t, :].double()
            squares += (difference**2).flatten().tolist()
    assert vector_loss(student, teacher, MASK).item() == pytest.approx(sum(squares) / len(squares), rel=1e-5)


# (sequence, head, query, key) of all real pairs
PLACES = [(b, h, i, k) for b, n in enumerate(LENGTHS) for h in range(2) for i in range(n) for k in range(n)]


def test_score_loss_by_brute_force():
    student, teacher = (random_taps(seed, MASK)["score"][0] for seed in (1, 2))
    squares = [float(student[place] - teacher[place]) ** 2 for place in PLACES]
    expected = sum(squares) / len(squares)
    assert score_loss(student, teacher, MASK).item() == pytest.approx(expected, rel=1e-5)
    # single sequences, weighted by their pairs; no mask means that all are real
    alone = [score_loss(*(x[b : b + 1, :, :n, :n] for x in (student, teacher)), None) for b, n in enumerate(LENGTHS)]
    weighted = sum(n * n * x.item() for n, x in zip(LENGTHS, alone, strict=True))
    assert weighted / sum(n * n for n in LENGTHS) == pytest.approx(expected, rel=1e-5)


def test_a_constant_in_a_row_changes_the_score_loss_but_not_the_map_loss():
    """Why the score loss is not enough: the student's attention is the same before and after."""
    student, teacher = (random_taps(seed, MASK)["score"][0].double() for seed in (1, 2))
    moved = student + 3 * torch.randn(3, 2, 6, 1)  # one constant for each query
    before, after = score_loss(student, teacher, MASK), score_loss(moved, teacher, MASK)
    assert after.item() > 1.5 * before.item()
    before, after = (map_loss(scores, teacher, MASK).item() for scores in (student, moved))
    assert before > 0.1 and after == pytest.approx(before, abs=1e-6)
    # for a student that has the teacher's attention one loss is 0, and the other is not
    same = teacher + 3 * torch.randn(3, 2, 6, 1)
    assert map_loss(same, teacher, MASK).item() == pytest.approx(0, abs=1e-6)
    assert score_loss(same, teacher, MASK).item() > 1


def test_map_loss_by_brute_force():
    student, teacher = (random_taps(seed, MASK)["score"][0] for seed in (1, 2))
    student[0, 0, 0] = 60 * torch.eye(6)[0]  # a query that attends to one key only
    q, p = (scores.double().softmax(dim=-1) for scores in (student, teacher))
    total = sum(float(p[place]) * math.log(float(p[place]) / float(q[place])) for place in PLACES)
    assert map_loss(student, teacher, MASK).item() == pytest.approx(total / (TOKENS * 2), rel=1e-5)


def test_map_loss_has_a_gradient_at_a_key_that_the_student_misses():
    """The gradient of a row is q - p, however small q is: a floor under q would make it 0."""
    student = torch.tensor([[[[0.0, -60.0], [0.0, 0.0]]]], requires_grad=True)
    teacher = torch.tensor([[[[-60.0, 0.0], [0.0, 0.0]]]])
    map_loss(student, teacher, None).backward()
    torch.testing.assert_close(student.grad[0, 0, 0], torch.tensor([1.0, -1.0]) / 2)


def test_cosine_loss_by_brute_force():
    student, teacher = torch.randn(3, 6, 5), torch.randn(3, 6, 5)
    total = 0.0
    for b, length in enumerate(LENGTHS):
        for t in range(length):
            s, r = student[b, t].double(), teacher[b, t].double()
            total += 1 - float(s @ r) / math.sqrt(float(s @ s) * float(r @ r))
    expected = total / TOKENS
    assert cosine_loss(student, teacher, MASK).item() == pytest.approx(expected, rel=1e-5)
    # only the direction counts: 0 for the same, 2 for the opposite
    assert cosine_loss(3 * student, student, MASK).item() == pytest.approx(0, abs=1e-6)
    assert cosine_loss(-student, student, MASK).item() == pytest.approx(2)


def test_cosine_loss_of_zero_vectors():
    """Zero vectors on either side, or on both, cost nothing and get no gradient."""
    student, teacher = torch.randn(1, 4, 5), torch.randn(1, 4, 5)
    student[0, 0] = teacher[0, 1] = student[0, 2] = teacher[0, 2] = 0.0
    student.requires_grad_()
    loss = cosine_loss(student, teacher, None)
    alone = cosine_loss(student[:, 3:], teacher[:, 3:], None)
    assert loss.item() == pytest.approx(alone.item() / 4, rel=1e-5)
    loss.backward()
    assert (student.grad[0, :3] == 0).all()
    assert student.grad[0, 3].isfinite().all() and student.grad[0, 3].any()


# --------------------------------------------------------------------------------- layer by layer
@pytest.mark.parametrize("S", [1, 5])
@pytest.mark.parametrize("order", LAYERWISE.values())
def test_schedule(order, S):
    schedule = LayerSchedule(layers=3, stage_steps=S, order=order)
    stages = {
        "bottom-up": [(1,), (1, 2), (1, 2, 3)],
        "top-down": [(3,), (2, 3), (1, 2, 3)],
        "together": [(1, 2, 3)] * 3,
    }[order]
    found = [schedule.active(step) for step in range(5 * S)]
    assert found == [stage for stage in stages for _ in range(S)] + [(1, 2, 3)] * 2 * S
    assert schedule.last_stage_start == 3 * S
    assert [schedule.is_last(step) for step in range(5 * S)] == [False] * 3 * S + [True] * 2 * S


def test_layerwise_terms_are_means_over_the_active_layers():
    student, teacher = random_taps(1, MASK), random_taps(2, MASK)

    def mean(loss, tap, places):
        each = [loss(student[tap][i], teacher[tap][i], MASK).item() for i in places]
        return sum(each) / len(each)

    for layers in ((1,), (1, 2), (2, 3), (3,)):
        levels = (0, *layers)  # the embeddings are always active
        found = layerwise_terms(student, teacher, layers, MASK)
        assert {name: term.item() for name, term in found.items()} == pytest.approx(
            {
                "hidden": mean(vector_loss, "hidden", levels),
                "cosine": mean(cosine_loss, "hidden", levels),
                "map": mean(map_loss, "score", [layer - 1 for layer in layers]),
            }
        )

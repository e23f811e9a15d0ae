"""distill.py: values against formulas written out in float64, and what must not change them."""

import math

import pytest
import torch

from distill import distillation_loss, logits_loss, masked_mse, parse_distill, tap_loss


def test_logits_loss_by_hand():
    student, teacher = torch.randn(5, 3), torch.randn(5, 3)
    for tau in (1.0, 2.5):
        total = 0.0
        for s, t in zip(student.double(), teacher.double(), strict=True):
            p, q = (t / tau).softmax(0), (s / tau).softmax(0)
            total += float((p * (p.log() - q.log())).sum())
        expected = tau**2 * total / 5
        assert logits_loss(student, teacher, tau).item() == pytest.approx(expected, rel=1e-5)


def test_logits_loss_gradient_is_tau_squared_neutral():
    """The gradient at high temperature keeps the size it has at tau = 1 (Hinton et al. 2015)."""
    teacher = torch.randn(64, 3)
    norms = []
    for tau in (1.0, 10.0):
        student = (teacher + 0.1 * torch.randn_like(teacher)).requires_grad_()
        logits_loss(student, teacher, tau).backward()
        norms.append(student.grad.norm().item())
    assert 0.3 < norms[1] / norms[0] < 3


@pytest.mark.parametrize("heads", [None, 4])
def test_masked_mse_by_brute_force(heads):
    B, T, D = 3, 7, 5
    shape = (B, T, D) if heads is None else (B, heads, T, D)
    student, teacher = torch.randn(shape), torch.randn(shape)
    lengths = [7, 4, 1]
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    squares = []
    for b, length in enumerate(lengths):
        for t in range(length):
            difference = student[b][..., t, :].double() - teacher[b][..., t, :].double()
            squares += (difference**2).flatten().tolist()
    expected = sum(squares) / len(squares)
    assert masked_mse(student, teacher, mask).item() == pytest.approx(expected, rel=1e-5)


def outputs(B, T, lengths, seed):
    torch.manual_seed(seed)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    taps = {
        "context": [torch.randn(B, 2, T, 4) for _ in range(3)],
        "output": [torch.randn(B, T, 8) for _ in range(3)],
        "hidden": [torch.randn(B, T, 8) for _ in range(4)],
    }
    return (torch.randn(B, 3), taps), mask


ALL = ("logits", "context", "output", "hidden")


def terms(student, teacher, mask, parts=ALL):
    found = distillation_loss(parts, student, teacher, mask, 0.5, 100.0, 2.0)
    return {name: value.item() for name, value in found.items()}


def test_value_does_not_depend_on_batch_size():
    """Twice the same rows: the same value."""
    (student, mask), (teacher, _) = outputs(3, 6, [6, 4, 2], 1), outputs(3, 6, [6, 4, 2], 2)

    def twice(output):
        logits, taps = output
        return torch.cat([logits] * 2), {
            k: [torch.cat([t] * 2) for t in v] for k, v in taps.items()
        }

    once = terms(student, teacher, mask)
    both = terms(twice(student), twice(teacher), torch.cat([mask, mask]))
    assert both == pytest.approx(once, rel=1e-5)


@pytest.mark.parametrize("garbage", [1e3, float("inf"), float("nan")])
def test_value_does_not_depend_on_padding(garbage):
    (student, mask), (teacher, _) = outputs(3, 6, [6, 4, 2], 1), outputs(3, 6, [6, 4, 2], 2)

    def padded(output, value):
        logits, taps = output
        wider = {}
        for name, tensors in taps.items():
            wider[name] = [torch.nn.functional.pad(t, (0, 0, 0, 5), value=value) for t in tensors]
            for tensor in wider[name]:
                tensor[1, ..., 4:, :] = value  # what stood at padded positions already
        return logits, wider

    wide_mask = torch.nn.functional.pad(mask, (0, 5), value=False)
    before = terms(student, teacher, mask)
    after = terms(padded(student, garbage), padded(teacher, -garbage), wide_mask)
    assert after == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("garbage", [float("inf"), float("nan")])
def test_gradient_does_not_see_padding(garbage):
    mask = torch.tensor([[True, True, False]])
    student = torch.randn(1, 2, 3, 4)
    student[:, :, 2] = garbage
    student.requires_grad_()
    masked_mse(student, torch.randn(1, 2, 3, 4), mask).backward()
    assert student.grad[:, :, :2].isfinite().all() and (student.grad[:, :, 2] == 0).all()


def test_no_mask_means_all_real():
    (student, mask), (teacher, _) = outputs(2, 5, [5, 5], 1), outputs(2, 5, [5, 5], 2)
    assert terms(student, teacher, None) == pytest.approx(terms(student, teacher, mask), rel=1e-6)


def test_student_equal_to_teacher_costs_nothing():
    student, mask = outputs(2, 5, [5, 3], 1)
    assert terms(student, student, mask) == pytest.approx(dict.fromkeys(ALL, 0.0), abs=1e-6)


def test_teacher_gets_no_gradient():
    (student, mask), (teacher, _) = outputs(2, 5, [5, 3], 1), outputs(2, 5, [5, 3], 2)
    leaves = []
    for logits, taps in (student, teacher):
        leaves.append([logits, *(t for tensors in taps.values() for t in tensors)])
        for tensor in leaves[-1]:
            tensor.requires_grad_()
    sum(distillation_loss(ALL, student, teacher, mask, 1.0, 1.0, 1.0).values()).backward()
    assert all(t.grad is not None for t in leaves[0]) and all(t.grad is None for t in leaves[1])
    assert (leaves[0][1].grad[1, :, 3:] == 0).all()  # nor do padded positions of the student


def test_weights_and_arms():
    (student, mask), (teacher, _) = outputs(2, 5, [5, 3], 1), outputs(2, 5, [5, 3], 2)
    found = distillation_loss(("logits", "context"), student, teacher, mask, 0.25, 7.0, 3.0)
    assert list(found) == ["logits", "context"]
    logits = 0.25 * logits_loss(student[0], teacher[0], 3.0)
    context = 7.0 * tap_loss(student[1]["context"], teacher[1]["context"], mask)
    assert found["logits"].item() == pytest.approx(logits.item())
    assert found["context"].item() == pytest.approx(context.item())
    layers = [
        masked_mse(s, t, mask).item()
        for s, t in zip(student[1]["context"], teacher[1]["context"], strict=True)
    ]
    assert math.isclose(context.item(), 7.0 * sum(layers) / 3, rel_tol=1e-5)
    assert distillation_loss((), student, teacher, mask, 1.0, 1.0, 1.0) == {}


def test_parse_distill():
    assert parse_distill("none") == ()
    assert parse_distill("context") == ("context",)
    assert parse_distill("logits+hidden") == ("logits", "hidden")
    for text in ("", "logit", "logits+", "logits+logits", "none+logits"):
        with pytest.raises(ValueError):
            parse_distill(text)

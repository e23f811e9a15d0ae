"""distill.py: values against formulas written out in float64, and what must not change them."""

import math

import pytest
import torch

from distill import (
    OUTPUT_TAPS,
    PARTS,
    distillation_loss,
    logits_loss,
    map_loss,
    masked_mse,
    parse_distill,
    part_weights,
    score_loss,
    tap_loss,
    taps_of,
)
from model import TAPS, build_model

LENGTHS = [6, 4, 1]
MASK = torch.arange(6) < torch.tensor(LENGTHS)[:, None]


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
    found = distillation_loss(parts, student, teacher, mask, part_weights(parts, 0.5, 100.0), 2.0)
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
    weights = dict.fromkeys(ALL, 1.0)
    sum(distillation_loss(ALL, student, teacher, mask, weights, 1.0).values()).backward()
    assert all(t.grad is not None for t in leaves[0]) and all(t.grad is None for t in leaves[1])
    assert (leaves[0][1].grad[1, :, 3:] == 0).all()  # nor do padded positions of the student


def test_weights_and_arms():
    (student, mask), (teacher, _) = outputs(2, 5, [5, 3], 1), outputs(2, 5, [5, 3], 2)
    weights = {"logits": 0.25, "context": 7.0}
    found = distillation_loss(("logits", "context"), student, teacher, mask, weights, 3.0)
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
    assert distillation_loss((), student, teacher, mask, {}, 1.0) == {}


def test_parse_distill():
    assert parse_distill("none") == ()
    assert parse_distill("context") == ("context",)
    assert parse_distill("logits+hidden") == ("logits", "hidden")
    assert parse_distill("score+map+output") == ("score", "map", "output")
    for text in ("", "logit", "logits+", "logits+logits", "none+logits"):
        with pytest.raises(ValueError):
            parse_distill(text)
    assert parse_distill("layerwise") == ("layerwise",)
    for text in ("layerwise+logits", "hidden+layerwise", "layerwise+layerwise"):
        with pytest.raises(ValueError, match="stands alone"):
            parse_distill(text)


# ------------------------------------------------------------------------ logits of tokens, of both
def test_logits_loss_of_tokens_is_that_of_the_real_ones():
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


def test_joint_logits_are_the_sum_of_both():
    mask = torch.tensor([[True, True, True], [True, True, False]])
    student, teacher = ((torch.randn(2, 5), torch.randn(2, 3, 4)) for _ in range(2))
    intents = logits_loss(student[0], teacher[0], 2.0)
    slots = logits_loss(student[1], teacher[1], 2.0, mask)
    found = terms((student, {}), (teacher, {}), mask, ("logits",))
    assert found == pytest.approx({"logits": 0.5 * (intents + slots).item()})


# ------------------------------------------------------------------ score, map, output (Kim et al.)
def attention_taps(seed, mask, layers=3):
    """(logits, taps) with every tap that a part may read, as the model returns them: scores of
    padded keys are -inf. What stands at padded queries is as good as any.
    """
    torch.manual_seed(seed)
    B, T = mask.shape
    padded = ~mask[:, None, None, :]
    score = [torch.randn(B, 2, T, T).masked_fill(padded, -math.inf) for _ in range(layers)]
    taps = {"score": score, "map": [s.softmax(dim=-1) for s in score]}
    taps["context"] = [torch.randn(B, 2, T, 4) for _ in range(layers)]
    taps |= {tap: [torch.randn(B, T, 8) for _ in range(layers)] for tap in OUTPUT_TAPS.values()}
    taps["hidden"] = [torch.randn(B, T, 8) for _ in range(layers + 1)]
    return torch.randn(B, 3), taps


ONES = dict.fromkeys(PARTS, 1.0)


def test_score_loss_by_brute_force():
    student, teacher = (attention_taps(seed, MASK)[1]["score"][0] for seed in (1, 2))
    squares = []
    for b, length in enumerate(LENGTHS):
        for h in range(2):
            for query in range(length):
                for key in range(length):
                    difference = student[b, h, query, key] - teacher[b, h, query, key]
                    squares.append(float(difference) ** 2)
    expected = sum(squares) / len(squares)
    assert score_loss(student, teacher, MASK).item() == pytest.approx(expected, rel=1e-5)
    # texts alone, weighted by their pairs; and no mask means that all are real
    alone = [
        score_loss(student[b : b + 1, :, :n, :n], teacher[b : b + 1, :, :n, :n], None).item()
        for b, n in enumerate(LENGTHS)
    ]
    weighted = sum(n * n * x for n, x in zip(LENGTHS, alone, strict=True))
    assert weighted / sum(n * n for n in LENGTHS) == pytest.approx(expected, rel=1e-5)


def test_a_constant_in_a_row_moves_the_score_loss_and_not_the_map_loss():
    """Why the score loss is not enough: the student's attention is the same before and after."""
    student, teacher = (attention_taps(seed, MASK)[1]["score"][0].double() for seed in (1, 2))
    moved = student + 3 * torch.randn(3, 2, 6, 1)  # one constant for each query
    before, after = score_loss(student, teacher, MASK), score_loss(moved, teacher, MASK)
    assert after.item() > 1.5 * before.item()
    maps = [scores.softmax(dim=-1) for scores in (student, moved, teacher)]
    before, after = (map_loss(each, maps[2], MASK).item() for each in maps[:2])
    assert before > 0.1 and after == pytest.approx(before, abs=1e-6)
    # of a student that has the teacher's attention one loss is 0, and the other is not
    same = teacher + 3 * torch.randn(3, 2, 6, 1)
    assert map_loss(same.softmax(dim=-1), maps[2], MASK).item() == pytest.approx(0, abs=1e-6)
    assert score_loss(same, teacher, MASK).item() > 1


def test_each_part_is_its_loss_averaged_over_layers():
    student, teacher = attention_taps(1, MASK), attention_taps(2, MASK)
    found = distillation_loss(PARTS, student, teacher, MASK, ONES, 2.0)
    assert tuple(found) == PARTS
    losses = {"score": score_loss, "map": map_loss}
    for part in PARTS[1:]:
        each = [
            losses.get(part, masked_mse)(s, t, MASK).item()
            for s, t in zip(student[1][part], teacher[1][part], strict=True)
        ]
        assert found[part].item() == pytest.approx(sum(each) / len(each), rel=1e-5)


@pytest.mark.parametrize("garbage", [1e3, math.inf, math.nan])
def test_no_part_sees_padding(garbage):
    """Neither value nor gradient, whatever stands at padded queries, keys and tokens."""
    student, teacher = attention_taps(1, MASK), attention_taps(2, MASK)
    pad = torch.nn.functional.pad
    wide_mask = pad(MASK, (0, 5), value=False)

    def padded(output, value):
        logits, taps = output
        wider = {}
        for name, tensors in taps.items():
            is_square = name in ("score", "map")
            real = (
                wide_mask[:, None, :, None] & wide_mask[:, None, None, :]
                if is_square
                else wide_mask[..., None]
                if tensors[0].dim() == 3
                else wide_mask[:, None, :, None]
            )
            wide = [pad(t, (0, 5 if is_square else 0, 0, 5)) for t in tensors]
            wider[name] = [t.masked_fill(~real, value).requires_grad_() for t in wide]
        return logits, wider

    wide = padded(student, garbage), padded(teacher, -garbage)
    for output_tap in OUTPUT_TAPS:
        before = distillation_loss(PARTS, student, teacher, MASK, ONES, 2.0, output_tap)
        after = distillation_loss(PARTS, *wide, wide_mask, ONES, 2.0, output_tap)
        assert {k: v.item() for k, v in after.items()} == pytest.approx(
            {k: v.item() for k, v in before.items()}, rel=1e-5
        )
        sum(after.values()).backward()
    for name, tensors in wide[0][1].items():
        for tensor in tensors:
            assert tensor.grad.isfinite().all() and tensor.grad.any(), name
            for b, n in enumerate(LENGTHS):
                rest = tensor.grad[b].clone()
                rest[..., :n, : n if name in ("score", "map") else None] = 0
                assert not rest.any(), name
    assert all(t.grad is None for tensors in wide[1][1].values() for t in tensors)


def test_nothing_depends_on_the_batch():
    """Twice the same texts, the same value."""
    student, teacher = attention_taps(1, MASK), attention_taps(2, MASK)

    def twice(output):
        doubled = {k: [torch.cat([t, t]) for t in v] for k, v in output[1].items()}
        return torch.cat([output[0]] * 2), doubled

    once = distillation_loss(PARTS, student, teacher, MASK, ONES, 2.0)
    both = (twice(student), twice(teacher), torch.cat([MASK, MASK]))
    for part, value in distillation_loss(PARTS, *both, ONES, 2.0).items():
        assert value.item() == pytest.approx(once[part].item(), rel=1e-5), part


def test_some_layers_only():
    """Blocks count from 1; of "hidden", the embeddings come in with all blocks or not at all."""
    student, teacher = attention_taps(1, MASK), attention_taps(2, MASK)
    every = distillation_loss(PARTS, student, teacher, MASK, ONES, 2.0)
    for layers in ((2,), (3, 1), (1, 2, 3)):
        found = distillation_loss(PARTS, student, teacher, MASK, ONES, 2.0, layers=layers)
        for part in PARTS[1:]:
            loss = {"score": score_loss, "map": map_loss}.get(part, masked_mse)
            places = [layer if part == "hidden" else layer - 1 for layer in layers]
            each = [loss(student[1][part][i], teacher[1][part][i], MASK).item() for i in places]
            assert found[part].item() == pytest.approx(sum(each) / len(each), rel=1e-5)
            if len(layers) == 3:
                same = found[part].item() == pytest.approx(every[part].item())
                assert same != (part == "hidden")
        assert found["logits"].item() == every["logits"].item()
    for part in ("map", "hidden"):
        for layers in ((0,), (4,), (1, -1)):
            with pytest.raises(ValueError, match="blocks 1 to 3"):
                distillation_loss((part,), student, teacher, MASK, ONES, 2.0, layers=layers)


def test_output_is_read_where_it_is_asked_for():
    student, teacher = attention_taps(1, MASK), attention_taps(2, MASK)
    for output_tap, tap in OUTPUT_TAPS.items():
        assert taps_of(("logits", "map", "output"), output_tap) == ("map", tap)
        (found,) = distillation_loss(
            ("output",), student, teacher, MASK, ONES, 1.0, output_tap
        ).values()
        expected = tap_loss(student[1][tap], teacher[1][tap], MASK)
        assert found.item() == pytest.approx(expected.item())
    assert taps_of(("logits",)) == () and taps_of(PARTS) == PARTS[1:]
    assert set(PARTS[1:]) | set(OUTPUT_TAPS.values()) <= set(TAPS)


def test_every_part_on_a_model(tiny_config):
    """Taps as a model gives them: a copy costs nothing, and gradients are finite numbers."""
    teacher, student = build_model(tiny_config).eval(), build_model(tiny_config).eval()
    ids = torch.randint(4, 400, (3, 6)).masked_fill(~MASK, 1)
    taps = taps_of(PARTS, "normed")
    with torch.no_grad():
        target = teacher(ids, MASK, taps)
    same = distillation_loss(PARTS, target, target, MASK, ONES, 1.0, "normed")
    assert {k: v.item() for k, v in same.items()} == pytest.approx(
        dict.fromkeys(PARTS, 0.0), abs=1e-6
    )
    found = distillation_loss(PARTS, student(ids, MASK, taps), target, MASK, ONES, 1.0, "normed")
    sum(found.values()).backward()
    assert all(value.item() > 0 for value in found.values())
    assert all(p.grad.to_dense().isfinite().all() for p in student.parameters())


def test_logits_loss_of_a_regression():
    """One column is a number, not a distribution: MSE, at any temperature."""
    student, teacher = torch.randn(5, 1, requires_grad=True), torch.randn(5, 1, requires_grad=True)
    expected = ((student - teacher).double() ** 2).mean().item()
    for tau in (1.0, 4.0):
        assert logits_loss(student, teacher, tau).item() == pytest.approx(expected, rel=1e-6)
    logits_loss(student, teacher, 4.0).backward()
    assert torch.allclose(student.grad, 2 * (student - teacher).detach() / 5)
    assert teacher.grad is None


# ------------------------------------------------------------------------------------ the weights
def test_part_weights():
    parts = ("logits", "map", "output", "hidden")
    assert part_weights(parts, 0.5, 10.0) == {
        "logits": 0.5, "map": 10.0, "output": 10.0, "hidden": 10.0
    }  # fmt: skip
    shared = part_weights(parts, 0.5, 10.0, gamma=0.3)
    assert shared == pytest.approx({"logits": 0.5, "map": 3.0, "output": 7.0, "hidden": 10.0})
    for gamma in (0.0, 1.0):
        assert part_weights(parts, 1.0, 2.0, gamma)["map"] == 2 * gamma
    # the authors' forms, map + c * output and c * map + output; own weights know no beta
    assert part_weights(("map", "output"), 1.0, 1.0, None, ("output=0.3",)) == {
        "map": 1.0, "output": 0.3
    }  # fmt: skip
    found = part_weights(parts, 1.0, 9.0, None, ("map=0.1", "logits=2", "hidden=0"))
    assert found == {"logits": 2.0, "map": 0.1, "output": 9.0, "hidden": 0.0}
    assert part_weights(parts, 1.0, 1.0, 0.5, ("hidden=3e-1",))["hidden"] == 0.3
    assert part_weights((), 1.0, 1.0) == {}
    assert part_weights(("layerwise",), 0.7, 1.0) == {"logits": 0.7}


@pytest.mark.parametrize(
    "own, said",
    [
        ("outptu=0.3", "the parts are logits, score"),
        ("hidden=0.3", "not distilled"),
        ("output", "such as output=0.3"),
        ("", "such as output=0.3"),
        ("=1", "unknown"),
        ("output=", "not a number"),
        ("output=much", "not a number"),
        ("output=1=2", "not a number"),
        ("output=-0.1", "0 or more"),
        ("output=inf", "finite"),
        ("output=nan", "finite"),
        ("map=1 map=2", "twice"),
    ],
)
def test_weights_that_cannot_be(own, said):
    with pytest.raises(ValueError, match=said):
        part_weights(("map", "output"), 1.0, 1.0, None, tuple(own.split(" ")))


def test_gammas_that_cannot_be():
    for parts in (("map",), ("logits", "output"), (), ("layerwise",)):
        with pytest.raises(ValueError, match="both must be distilled"):
            part_weights(parts, 1.0, 1.0, 0.5)
    for gamma in (-0.1, 1.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="gamma is"):
            part_weights(("map", "output"), 1.0, 1.0, gamma)
    for own in ("map=1", "output=0"):
        with pytest.raises(ValueError, match="leave out one"):
            part_weights(("map", "output"), 1.0, 1.0, 0.5, (own,))

"""lsq.py against LSQ (Esser et al. 2020): grids and starts in Python loops, gradients by finite differences and by
autograd on the paper's pseudocode.
"""

import numpy as np
import pytest
import torch
from torch import nn

from lsq import LearnedActQuantizer, LearnedScale
from prepare import calibrate
from quant import ActQuantizer, Codes, QuantConfig, dequantize

BITS = [8, 4, 2]
STARTS = ["minmax", "mse", "lsq"]
GRIDS = {  # (Q_min, Q_max): fields of QuantConfig, multiplied
    (-128, 127): ({"weight_bits": 8}, False),  # as in the papers
    (-127, 127): ({"weight_bits": 8, "grid": "full"}, True),  # 8-bit matrices: those of quant.py
    (-64, 64): ({"weight_bits": 8}, True),
    (-8, 7): ({"weight_bits": 4}, True),
    (-2, 1): ({"weight_bits": 2}, False),
}


def learned_scale(weight, bits=8, start="minmax", per_row=False):
    """A LearnedScale on the grid of the papers."""
    return LearnedScale(QuantConfig(weight_bits=bits, weight_range=start), weight, per_row, multiplied=False)


def learned_scale_on(grid, weight, start="minmax", per_row=False):
    values, multiplied = GRIDS[grid]
    return LearnedScale(QuantConfig(**values, weight_range=start), weight, per_row, multiplied)


def scale_of(module):
    return module.log_scale.detach().exp()


@pytest.mark.parametrize("bits", BITS)
def test_learned_scale_stays_positive(bits):
    x = torch.randn(20, 30)
    module, start = learned_scale(x, bits), learned_scale(x, bits)
    target = 1e-3 * x  # asks for a far smaller scale: s itself as the parameter would pass 0
    for _ in range(20):
        (grad,) = torch.autograd.grad((module(x) - target).square().sum(), module.log_scale)
        with torch.no_grad():
            module.log_scale -= grad.sign()  # Adam with a learning rate of 1
        assert scale_of(module) > 0 and module(x).isfinite().all()
    assert scale_of(module) < 0.1 * scale_of(start)


def rows_of_all_sizes(rows=6, columns=50):
    """Rows whose sizes differ by a factor of 1000, in float64."""
    sizes = torch.logspace(-2, 1, rows, dtype=torch.float64)
    return torch.randn(rows, columns, dtype=torch.float64) * sizes[:, None]


def on_learned_grid(x, scale, low, high):
    """Q(x) of a Python float (Python's round takes halves to even as well)."""
    return scale * min(max(round(x / scale), low), high)


def pseudocode(x, log_scale, low, high):
    """Appendix B of the paper, whose gradients autograd finds: gradscale and roundpass detach."""
    scale = log_scale.exp()
    factor = (x.numel() / scale.numel() * high) ** -0.5
    scale = scale * factor + (scale - scale * factor).detach()
    ratio = (x / scale).clamp(low, high)
    return (ratio + (ratio.round() - ratio).detach()) * scale


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_starts_by_brute_force(grid, start, per_row):
    x = rows_of_all_sizes()
    x[:, 3] *= 3  # outliers
    module = learned_scale_on(grid, x, start, per_row)
    assert (module.quant_min, module.quant_max) == grid
    assert module.log_scale.shape == ((6, 1) if per_row else ())
    groups = x.tolist() if per_row else [x.flatten().tolist()]
    factors = []
    for values, scale in zip(groups, scale_of(module).flatten().tolist(), strict=True):
        largest = max(abs(v) for v in values) / grid[1]
        if start == "minmax":
            assert scale == pytest.approx(largest, rel=1e-12)
        elif start == "lsq":
            mean = sum(abs(v) for v in values) / len(values)
            assert scale == pytest.approx(2 * mean / grid[1] ** 0.5, rel=1e-12)
        else:
            errors = {}
            for percent in range(10, 101, 2):
                tried = largest * percent / 100
                distances = (v - on_learned_grid(v, tried, *grid) for v in values)
                errors[percent] = sum(distance**2 for distance in distances)
            best = min(errors, key=errors.get)
            assert scale == pytest.approx(largest * best / 100, rel=1e-6)
            factors.append(best)
    assert not factors or min(factors) < 100 or grid[1] > 7


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_stay_on_their_grid(grid, per_row):
    x = rows_of_all_sizes().float()
    module = learned_scale_on(grid, x, "lsq", per_row)
    with torch.no_grad():
        module.log_scale -= 2.0
    codes, scale = module.codes(x)
    assert (codes.min(), codes.max()) == grid  # both ends are reached
    assert scale.shape == ((6, 1) if per_row else ())
    assert torch.equal(module(x), codes * scale)
    scales = scale.expand(6, 1).tolist()
    for row, [step], found in zip(x.tolist(), scales, module(x).tolist(), strict=True):
        expected = [on_learned_grid(value, step, *grid) for value in row]
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gradients_equal_those_of_the_papers_pseudocode(grid, per_row):
    x = rows_of_all_sizes().requires_grad_()
    module = learned_scale_on(grid, x, per_row=per_row)
    with torch.no_grad():
        module.log_scale -= 0.7
    upstream = torch.randn_like(x)
    (module(x) * upstream).sum().backward()
    assert 0 < (x.grad == 0).sum() < x.numel()  # clipped
    again = x.detach().clone().requires_grad_()
    log_scale = module.log_scale.detach().clone().requires_grad_()
    result = pseudocode(again, log_scale, *grid)
    torch.testing.assert_close(result, module(x))
    (result * upstream).sum().backward()
    torch.testing.assert_close(again.grad, x.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_scale.grad, module.log_scale.grad)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gradients_by_finite_differences(grid):
    """While no code changes and x is fixed, sum(w Q(x)) of a row changes with its own s as the codes say. The estimator
    subtracts x/s from that inside the grid, as if x changed with s.
    """
    low, high = grid
    x = rows_of_all_sizes()
    module, weight = learned_scale_on(grid, x, per_row=True), torch.randn_like(x)
    with torch.no_grad():
        module.log_scale -= 0.7
    (module(x) * weight).sum().backward()
    scale = scale_of(module).numpy()
    ends = []
    for step in (1e-9, -1e-9):
        moved = scale * (1 + step)
        ends.append((moved * np.clip(np.round(x.numpy() / moved), low, high) * weight.numpy()).sum(1, keepdims=True))
    slope = (ends[0] - ends[1]) / 2e-9  # by log s
    ratio = x.numpy() / scale
    inside = (ratio >= low) & (ratio <= high)
    assert inside.any() and not inside.all()
    slope -= scale * (ratio * weight.numpy() * inside).sum(1, keepdims=True)
    expected = slope / (x.shape[1] * high) ** 0.5
    np.testing.assert_allclose(module.log_scale.grad.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", STARTS)
def test_rows_of_zeros(start):
    x = torch.randn(3, 8)
    x[1] = 0.0
    module = learned_scale(x, 4, start, per_row=True)
    (module(x) - 1).square().sum().backward()
    assert (scale_of(module) > 0).all() and module(x)[1].eq(0).all() and module(x)[0].any()
    assert module.log_scale.grad.isfinite().all()


def test_shapes_of_meta_tensors():
    """A student's file is checked against a model that has no storage yet."""
    x = torch.empty(5, 7, device="meta")
    for start in STARTS:
        assert learned_scale(x, 4, start, per_row=True).log_scale.shape == (5, 1)
        assert learned_scale(x, 4, start).log_scale.shape == ()


# ----------------------------------------------------------------------------------- learned ranges
def act_quantizers(x, bits=8, **values):
    """A learned and a static quantizer, both calibrated on x."""
    model = nn.Module()
    model.learned = LearnedActQuantizer(QuantConfig(act_bits=bits, act_range="learned", **values))
    model.static = ActQuantizer(QuantConfig(act_bits=bits, act_range="static", **values))
    model.forward = lambda ids, mask, types: [part(x) for part in (model.learned, model.static)]
    calibrate(model, [(None, None)])
    return model.learned.train(), model.static.train()


def skewed(shape=(40, 30)):
    """Values whose zero point is neither 0 nor in the middle."""
    return torch.randn(shape) * 2 + 3


@pytest.mark.parametrize("bits", BITS)
def test_learned_range_starts_at_the_calibrated_one(bits):
    x = skewed()
    learned, static = act_quantizers(x, bits)
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    scale = (high - low) / (2**bits - 1)
    assert float(learned.log_step.detach().exp()) == pytest.approx(scale, rel=1e-5)
    assert float(learned.zero_point) == round(-low / scale) > 0
    assert dict(learned.named_parameters()).keys() == {"log_step"}
    assert learned.state_dict().keys() == {"log_step", "zero_point"}
    for values in (x, 2 * x, x - 6):  # values outside the range are clipped
        found, expected = learned(values), static(values)
        # exp(log s) may differ from s in the last digit, which may flip a rounding
        close = (found - expected).abs() < 1e-4 * scale
        assert close.float().mean() > 0.995 and (found - expected).abs().max() < 1.001 * scale
    clipped = learned(4 * x - 6)
    zero = float(learned.zero_point)
    assert clipped.min().item() == pytest.approx(-zero * scale, rel=1e-4)
    assert clipped.max().item() == pytest.approx((2**bits - 1 - zero) * scale, rel=1e-4)


def test_learned_range_in_evaluation():
    x = skewed()
    learned, static = act_quantizers(x)
    trained = learned(x)
    found, expected = learned.eval()(x), static.eval()(x)
    assert isinstance(found, Codes) and not found.values.requires_grad
    assert (found.values == expected.values).float().mean() > 0.995
    torch.testing.assert_close(found[1:], expected[1:])
    torch.testing.assert_close(dequantize(*found), trained.detach(), rtol=0, atol=1e-5)
    assert found.values.min() >= 0 and found.values.max() == 255
    # before a product of floats it returns floats
    for config, inside in ((QuantConfig(weight_bits=32), False), (QuantConfig(), True)):
        for kind, act_range in ((LearnedActQuantizer, "learned"), (ActQuantizer, "static")):
            values = {**vars(config), "act_range": act_range, "attention_bits": 8}
            quantizer = kind(QuantConfig(**values), inside).eval()
            with torch.no_grad():
                quantizer.set_range(torch.tensor(0.5), torch.tensor(3.0))
            assert quantizer(torch.tensor([-9.0, 0.6])).tolist() == [-1.5, 0.5]


@pytest.mark.parametrize("bits", BITS)
def test_gradients_of_a_learned_range(bits):
    learned, _ = act_quantizers(skewed(), bits)
    learned.double()  # forward() takes x to float32, rounded() does not
    zero = int(learned.zero_point)
    low, high = -zero, 2**bits - 1 - zero
    assert low < 0 < high and -low != high
    x = (1.5 * skewed() - 2).double().requires_grad_()
    upstream = torch.randn_like(x)
    (learned.rounded(x) * upstream).sum().backward()
    ratio = x.detach() / learned.log_step.detach().exp()
    assert (ratio < low).any() and (ratio > high).any()
    again = x.detach().clone().requires_grad_()
    log_step = learned.log_step.detach().clone().requires_grad_()
    result = pseudocode(again, log_step, low, high)
    torch.testing.assert_close(result, learned.rounded(x))
    (result * upstream).sum().backward()
    torch.testing.assert_close(again.grad, x.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_step.grad, learned.log_step.grad)


@pytest.mark.parametrize("sign", [1, -1])
def test_learned_range_of_values_of_one_sign(sign):
    """The zero point is at one end of the grid, and one of Q_min and Q_max is 0."""
    x = (sign * torch.rand(50, 20)).requires_grad_()
    learned, _ = act_quantizers(x.detach())
    assert learned.zero_point == (0 if sign > 0 else 255)
    y = learned(x)
    assert (y - x).abs().max() < 0.51 / 255
    y.square().sum().backward()
    assert learned.log_step.grad.isfinite() and x.grad.isfinite().all()

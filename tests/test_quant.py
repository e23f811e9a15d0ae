"""quant.py against brute force in float64, PyTorch's own kernels, and gradients derived by hand."""

import math

import pytest
import torch
from conftest import DEVICES
from torch import nn

import quant
from model import random_mask
from quant import (
    ActQuantizer,
    QuantConfig,
    QuantLinear,
    TernaryQuantizer,
    UniformQuantizer,
    WeightQuantizer,
    best_clip,
    choose_qparams,
    dequantize,
    fake_quantize,
    min_max,
    noise_mask,
    quant_range,
    quantize,
    straight_through,
)

BITS = range(2, 9)


def qparams(x, bits, symmetric, per_row):
    low, high = quant_range(bits, symmetric)
    return *choose_qparams(*min_max(x, per_row), low, high, symmetric), low, high


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


# ----------------------------------------------------------------------------------------- the grid
def test_integers_of_a_grid():
    for bits in BITS:
        low, high = quant_range(bits, True)
        assert low == -high and high - low + 1 == 2**bits - 1
        assert quant_range(bits, False) == (0, 2**bits - 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_fake_quantize_equals_dequantize_of_quantize_bit_for_bit(bits, symmetric, per_row, device):
    x = (torch.randn(64, 48) * torch.logspace(-3, 3, 64)[:, None]).to(device)
    for shift in (0.0, 5.0, -5.0):
        scale, zero, low, high = qparams(x + shift, bits, symmetric, per_row)
        for values in (x + shift, 3 * x, torch.zeros_like(x), -torch.zeros_like(x)):
            codes = quantize(values, scale, zero, low, high)
            assert torch.equal(codes, codes.round()) and codes.min() >= low and codes.max() <= high
            expected = dequantize(codes, scale, zero)
            assert same_bits(fake_quantize(values, scale, zero, low, high), expected)
        covered = fake_quantize(x + shift, scale, zero, low, high, clips=False)
        assert same_bits(covered, fake_quantize(x + shift, scale, zero, low, high))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_nearest_grid_point_by_brute_force(bits, symmetric):
    """In float64, over all grid points: none is closer than the one chosen."""
    x = torch.randn(300) * 2 + (0 if symmetric else 1.5)
    scale, zero, low, high = qparams(x, bits, symmetric, False)
    grid = (torch.arange(low, high + 1, dtype=torch.float64) - zero.double()) * scale.double()
    wide = torch.cat([x, 2 * x])  # values beyond the range must become its ends
    distance = (wide.double()[:, None] - grid).abs()
    chosen = (fake_quantize(wide, scale, zero, low, high).double() - wide.double()).abs()
    assert (chosen <= distance.min(dim=1).values + 1e-4 * scale.double()).all()
    inside = chosen[: len(x)]
    assert inside.max() <= 0.5001 * scale  # the range was taken from x: nothing is clipped


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_equals_pytorch_kernels(bits):
    x = torch.randn(32, 100) * 3 + 1
    scale, zero, low, high = qparams(x, bits, False, False)
    theirs = torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero), low, high)
    # PyTorch multiplies by 1/scale; only values that are within rounding of a tie may differ
    close = ((x / scale).frac().abs() - 0.5).abs() > 1e-4
    torch.testing.assert_close(fake_quantize(x, scale, zero, low, high)[close], theirs[close])
    scale, zero, low, high = qparams(x, bits, True, True)
    theirs = torch.fake_quantize_per_channel_affine(x, scale[:, 0], zero[:, 0].int(), 0, low, high)
    close = ((x / scale).frac().abs() - 0.5).abs() > 1e-4
    torch.testing.assert_close(fake_quantize(x, scale, zero, low, high)[close], theirs[close])
    assert close.float().mean() > 0.99


def test_qparams_equal_torch_ao():
    """The formulas of torch.ao's MinMaxObserver, which also widens the range to include 0; 0 is exact then."""
    for low, high in ((-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (0.0, 0.0), (-1e-9, 1e-9), (-1.2, 2.3)):
        x_min, x_max = torch.tensor(low), torch.tensor(high)
        scale, zero = choose_qparams(x_min, x_max, 0, 255, False)
        wide = max(high, 0.0) - min(low, 0.0)
        assert float(scale) == pytest.approx(max(wide / 255, 1e-12), rel=1e-6)
        assert 0 <= float(zero) <= 255 and float(zero) == round(float(zero))
        assert fake_quantize(torch.zeros(1), scale, zero, 0, 255).item() == 0.0
        if wide:
            assert float(zero) == round(-min(low, 0.0) / (wide / 255))
        scale, zero = choose_qparams(x_min, x_max, -127, 127, True)
        assert float(scale) == pytest.approx(max(abs(low), abs(high), 127e-12) / 127, rel=1e-6)
        assert float(zero) == 0


# ---------------------------------------------------------------------------------------- gradients
def test_gradient_passes_inside_and_stops_outside():
    x = torch.tensor([-9.0, -2.1, 0.26, 1.5, 1.74, 1.8, 9.0], requires_grad=True)
    out = fake_quantize(x, torch.tensor(0.5), torch.tensor(0.0), -4, 3)
    torch.testing.assert_close(out, torch.tensor([-2.0, -2.0, 0.5, 1.5, 1.5, 1.5, 1.5]))
    out.backward(torch.arange(1.0, 8.0))
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 0, 0]


def test_gradient_equals_pytorch_kernel():
    x = torch.randn(50, 20)
    weight = torch.randn(50, 20)
    scale, zero = torch.tensor(0.02), torch.tensor(100.0)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    fake_quantize(ours, scale, zero, 0, 255).backward(weight)
    torch.fake_quantize_per_tensor_affine(theirs, 0.02, 100, 0, 255).backward(weight)
    assert (ours.grad == theirs.grad).float().mean() > 0.999 and (ours.grad == 0).any()


# -------------------------------------------------------------------------------------------- noise
def test_elements_without_noise_are_exact_and_have_exact_gradients():
    x = (3 * torch.randn(40, 64)).requires_grad_()
    where = random_mask(x.shape, 0.4, x.device)
    full = fake_quantize(x.detach(), torch.tensor(0.7), torch.tensor(0.0), -3, 3)
    clipped = (x.detach() / 0.7).round().abs() > 3
    out = straight_through(x, full.clone(), ~clipped, where)
    assert same_bits(out[~where].detach(), x[~where].detach())
    assert same_bits(out[where].detach(), full[where])
    out.sum().backward()
    assert clipped[where].any() and clipped[~where].any()
    assert torch.equal(x.grad, (~(clipped & where)).float())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9, 0.9999])
def test_random_mask_has_its_probability(p, device):
    n = 1_000_000
    mask = random_mask(torch.Size((n // 10 + 1, 10)), p, torch.device(device))
    deviation = (n * p * (1 - p)) ** 0.5 / n
    assert abs(mask.float().mean().item() - p) < 5 * deviation + 1 / 65536
    # neighbours are independent: both are True as often as chance gives
    flat = mask.flatten()
    for distance in (1, 2, 3, 4, 7):
        both = (flat[:-distance] & flat[distance:]).float().mean().item()
        assert abs(both - p * p) < 6 * (p * p / n) ** 0.5 + 2 / 65536


# ------------------------------------------------------------------------------------------ ranges
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("per_row", [False, True])
def test_best_clip_by_brute_force(bits, per_row):
    x = torch.randn(6, 400)
    x[:, 0] *= 8  # outliers
    low, high = quant_range(bits, True)
    clip = best_clip(x, low, high, per_row)

    def error(factor):
        a, b = min_max(x, per_row)
        scale, zero = choose_qparams(a * factor, b * factor, low, high, True)
        squares = (dequantize(quantize(x, scale, zero, low, high), scale, zero) - x).square()
        return squares.sum(-1, keepdim=True) if per_row else squares.sum()

    every = torch.stack([error(torch.tensor(p / 100)) for p in range(10, 101, 2)])
    torch.testing.assert_close(error(clip), every.min(dim=0).values)
    if bits <= 3:
        assert (error(clip) < 0.9 * error(torch.tensor(1.0))).all()


# ---------------------------------------------------------------------------------- uniform weights
class PowerOfTwoQuantizer(WeightQuantizer):
    """Scales rounded down to powers of two: integer models could shift bits instead of multiplying."""

    @torch.no_grad()
    def scale(self, weight):
        largest = weight.abs().amax(-1, keepdim=True) if self.per_row else weight.abs().max()
        return (largest / self.quant_max).log2().floor().exp2()


@pytest.mark.parametrize("noise", [1.0, 0.4])
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_scale_is_all_that_a_quantizer_needs(bits, per_row, noise):
    """Weights that it clips get no gradient."""
    weight = (torch.randn(20, 60) * torch.logspace(-2, 2, 20)[:, None]).requires_grad_()
    config = QuantConfig(weight_bits=bits, noise=noise)
    quantizer = PowerOfTwoQuantizer(config, weight, per_row, multiplied=True)
    upstream = torch.randn_like(weight)
    found, (codes, scale) = quantizer(weight), quantizer.codes(weight)
    found.backward(upstream)
    assert torch.equal(scale.log2(), scale.log2().round())
    full = quantizer.eval()(weight)
    assert torch.equal(full, codes * scale)
    passed = torch.zeros_like(full, dtype=torch.bool)  # not quantized at this step
    if noise < 1.0:
        passed = found == weight
        assert torch.equal(found[~passed], full[~passed]) and 0.5 < passed.float().mean() < 0.7
    clipped = (weight.detach() / scale).round().abs() > quantizer.quant_max
    assert (clipped & ~passed).any()
    assert torch.equal(weight.grad, upstream * ~(clipped & ~passed))


@pytest.mark.parametrize("noise", [1.0, 0.4])
def test_masks_of_the_backward_pass(noise):
    """Nothing is stored where nothing can be clipped; wherever something can, its mask is."""
    weight = torch.randn(20, 60, requires_grad=True)
    kinds = {"minmax": UniformQuantizer, "mse": UniformQuantizer, "own": PowerOfTwoQuantizer}
    for weight_range, kind in kinds.items():
        config = QuantConfig(weight_bits=4, weight_range=weight_range, noise=noise)
        found = kind(config, weight, True, True)(weight)
        assert len(found.grad_fn.saved_tensors) == (weight_range != "minmax")


# ---------------------------------------------------------------------------------- ternary weights
TERNARY = {"weight_bits": 2, "weights": "ternary"}


def ternary(weight, per_row=True, **values):
    return TernaryQuantizer(QuantConfig(**TERNARY, **values), weight, per_row, multiplied=True)


def ternary_in_python(values):
    """Ternary Weight Networks, eq. 5-6, for a list of floats: (codes, alpha)."""
    sizes = [abs(value) for value in values]
    delta = 0.7 * math.fsum(sizes) / len(sizes)
    large = [size for size in sizes if size > delta]
    alpha = math.fsum(large) / len(large) if large else 0.0
    return [math.copysign(1, v) if abs(v) > delta else 0 for v in values], alpha


def squared_error(values, alpha, codes):
    return math.fsum((v - alpha * code) ** 2 for v, code in zip(values, codes, strict=True))


def least_error(values):
    """The least squared error of all ternary codes, each with its best alpha. With k codes that are
    not 0 those are the k largest values, and alpha is their mean.
    """
    sizes = sorted((abs(value) for value in values), reverse=True)
    squares, most, total = math.fsum(size**2 for size in sizes), 0.0, 0.0
    for k, size in enumerate(sizes, start=1):
        total += size
        most = max(most, total**2 / k)  # k alpha^2
    return squares - most


MATRICES = {
    "gaussian": torch.randn(12, 50, generator=torch.Generator().manual_seed(1)),
    "rows of all sizes": torch.randn(8, 30, generator=torch.Generator().manual_seed(2))
    * torch.logspace(-4, 2, 8)[:, None],
    "one column": torch.tensor([[3.0], [-0.25], [1e-6], [0.0]]),
    "one element": torch.tensor([[-0.7]]),
    "constants": torch.tensor([[2.0] * 5, [-0.3] * 5, [0.1, -0.1, 0.1, -0.1, 0.1]]),
    "rows of zeros": torch.tensor([[0.0] * 4, [1.0, -2.0, 0.0, 0.1], [-0.0, 0.0, -0.0, 0.0]]),
    "zeros": torch.zeros(3, 4),
    "sparse": torch.tensor([[0.0, 0.0, 0.0, 5.0], [0.0, -1.0, 0.0, 0.0]]),
}


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("name", MATRICES)
def test_ternary_weights_by_brute_force(name, per_row):
    weight = MATRICES[name]
    quantizer = ternary(weight, per_row)
    found, (codes, scale) = quantizer(weight), quantizer.codes(weight)
    assert scale.shape == ((len(weight), 1) if per_row else ()) and (scale > 0).all()
    assert torch.equal(found, codes * scale)  # what is packed is what was trained, bit for bit
    assert torch.equal(quantizer.eval()(weight), found)
    groups = zip(weight, codes, scale, strict=True) if per_row else [(weight, codes, scale)]
    for values, row, alpha in groups:
        expected, expected_alpha = ternary_in_python(values.flatten().tolist())
        assert row.flatten().tolist() == expected
        # a row of zeros has no alpha, but needs a scale that divides
        assert alpha.item() == pytest.approx(expected_alpha, rel=1e-5, abs=1e-11)
    if name == "zeros":
        assert not found.any()


@pytest.mark.parametrize("noise", [1.0, 0.4])
@pytest.mark.parametrize("per_row", [True, False])
def test_every_ternary_weight_gets_its_gradient(per_row, noise):
    weight = (torch.randn(20, 30) * torch.logspace(-2, 2, 20)[:, None]).requires_grad_()
    upstream = torch.randn_like(weight)
    ternary(weight, per_row, noise=noise)(weight).backward(upstream)
    assert torch.equal(weight.grad, upstream)


@pytest.mark.parametrize("block", [1, 8])
def test_noise_mixes_ternary_weights_with_exact_ones(block):
    """A fraction of the weights, or of blocks, is on the grid."""
    weight = torch.randn(300, 48)
    quantizer = ternary(weight, noise=0.3)
    quantizer.block = block
    mixed, full = quantizer(weight), quantizer.eval()(weight)
    exact, on_grid = mixed == weight, mixed == full
    assert (exact ^ on_grid).all()  # one or the other, bit for bit
    assert abs(on_grid.float().mean() - 0.3) < 0.04
    runs = on_grid.view(300, 6, 8)
    assert (runs.all(-1) | ~runs.any(-1)).all() == (block == 8)
    assert torch.equal(full, ternary(weight)(weight))  # in evaluation everything is quantized
    assert ternary(weight, noise=0.0)(weight) is weight
    assert noise_mask(weight[:, :45], 0.3, block).shape == (300, 45)  # the last block is shorter


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_ternary_weights_are_close_to_the_least_error(kind):
    weight = torch.randn(20, 400) if kind == "gaussian" else torch.rand(20, 400) - 0.5
    rows = weight.tolist()
    codes, scale = ternary(weight).codes(weight)
    triples = zip(rows, scale.flatten().tolist(), codes.tolist(), strict=True)
    error = sum(squared_error(*row) for row in triples)
    best = sum(least_error(row) for row in rows)
    assert best <= error < 1.03 * best
    uniform = UniformQuantizer(QuantConfig(weight_bits=2), weight, per_row=True, multiplied=True)
    min_max_error = (uniform(weight) - weight).square().sum().item()
    assert error < (0.35 if kind == "gaussian" else 0.75) * min_max_error


# ------------------------------------------------------------------------------------------ a layer
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_evaluation_multiplies_integers(bits, per_row, device):
    """One layer in evaluation against the same arithmetic in int64, and against training."""
    config = QuantConfig(weight_bits=bits, per_channel=per_row, per_token=per_row)
    linear = nn.Linear(300, 40)
    weight = UniformQuantizer(config, linear.weight, per_row, multiplied=True)
    layer = QuantLinear(linear, ActQuantizer(config), weight).to(device)
    x = (torch.randn(2, 7, 300) * torch.logspace(-1, 1, 300)).to(device)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    trained = layer.train()(x)
    found = layer.eval()(x)
    torch.testing.assert_close(found, trained, atol=1e-4, rtol=1e-4)
    act = layer.act_quantizer(x)
    codes, scale = weight.codes(layer.weight)
    sums = (act.values - act.zero_point).long().cpu() @ codes.long().cpu().t()
    scales = (act.scale * scale.flatten()).double().cpu()
    expected = sums * scales + linear.bias.double().cpu()
    torch.testing.assert_close(found.double().cpu(), expected, atol=1e-5, rtol=1e-6)
    layer.act_quantizer.returns_codes = False  # as with float32 weights
    assert not isinstance(layer.act_quantizer(x), quant.Codes)

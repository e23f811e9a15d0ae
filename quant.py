"""Quantization from the ground up: round to a small integer grid, and train through the rounding.

The grid. b bits give 2^b integers. A real number x is stored as an integer q with a scale s and a zero point z:

    q = clamp(round(x / s + z), quant_min, quant_max)            quantize
    x ~ (q - z) * s                                              dequantize

*Symmetric* grids have z = 0. Weights use them: they lie around 0, and the integer model saves a correction. *Affine*
grids cover [min, max] wherever it lies. Activations use them: the output of GELU is never below -0.17. A scale may
serve a whole tensor (per tensor), each output channel of a weight (per channel) or each token of an activation (per
token): finer is more exact and costs a vector of scales. The symmetric 2-bit grid is ternary, {-1, 0, 1}, and has a
rule of its own (TernaryQuantizer); the fourth value of two bits, -2, is used by scales that are trained (lsq.py).

Training. round() has derivative 0 almost everywhere, so nothing would learn. The straight-through estimator (Bengio et
al. 2013) treats rounding as the identity, except where x was clipped: there, moving x changes nothing. The result of
`fake_quantize` is a float tensor that lies on the grid: what an integer model will compute, but differentiable.
*Quantization noise* (Fan et al. 2020, arXiv 2004.07320) quantizes only a random fraction p of the weights at each
step; the others pass unchanged and get an exact gradient. p = 1 is ordinary quantization-aware training. In evaluation
everything is quantized.

Evaluation. A Linear layer of a student in evaluation computes as the integer model does: it multiplies integers,
accumulates them and applies the scales afterwards (`rescale`). In exact arithmetic that equals fake quantization. In
floats the last digits differ, and one digit is enough to flip the rounding of the next activation. With the integer
arithmetic itself, student and integer model agree bit for bit: sums of integers are exact in float32 below 2^24.

Next: lsq.py trains scales together with the weights, prepare.py puts quantizers into a model.

>>> x = torch.tensor([0.26, -9.0])
>>> fake_quantize(x, torch.tensor(0.5), torch.tensor(0.0), -4, 3)
tensor([ 0.5000, -2.0000])
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import random_mask

# CPUs without VNNI instructions add two 8-bit products in 16 bits, which saturates: 255 * 127 * 2 is too large, 255 *
# 64 * 2 is not (see int8.py). Fewer than 8 bits never saturate.
PORTABLE = 64
SMALLEST_SCALE = 1e-12  # an all-zero tensor has the range [0, 0]; its scale must still divide
CELL = 0.45  # in steps of a grid: a weight that is not farther from an integer is surely rounded to it


# --------------------------------------------------------------------------------------- the grid
def quant_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """The smallest and largest integer of a grid: (quant_min, quant_max).

    Symmetric grids leave out the most negative integer: -x is on the grid whenever x is.

    >>> quant_range(8, symmetric=True), quant_range(8, symmetric=False), quant_range(2, symmetric=True)
    ((-127, 127), (0, 255), (-1, 1))
    """
    if symmetric:
        largest = 2 ** (bits - 1) - 1
        return -largest, largest
    return 0, 2**bits - 1


def choose_qparams(
    x_min: Tensor, x_max: Tensor, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """The scale (> 0) and zero point that cover [x_min, x_max] (Jacob et al. 2018, eq. 1-3).

    x_min, x_max: float32, of equal shape.  Returns two float32 tensors of that shape; the zero point is an integer.
    The range is first widened to include 0, because padding, ReLU and dropout make exact zeros.
    """
    x_min, x_max = x_min.clamp(max=0.0), x_max.clamp(min=0.0)
    if symmetric:
        scale = torch.maximum(-x_min, x_max).div(quant_max).clamp_(min=SMALLEST_SCALE)
        return scale, torch.zeros_like(scale)
    scale = (x_max - x_min).div(quant_max - quant_min).clamp_(min=SMALLEST_SCALE)
    zero_point = (quant_min - torch.round(x_min * scale.reciprocal())).clamp_(quant_min, quant_max)
    return scale, zero_point


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Real numbers -> integers, halves to even. scale, zero_point: broadcastable to x.

    The integers stay in float32, which is exact for integers below 2^24. x is multiplied by 1 / scale and the zero
    point is added before rounding, as in oneDNN's kernels: other orders round differently in rare cases.
    """
    return torch.mul(x, scale.reciprocal()).add_(zero_point).round_().clamp_(quant_min, quant_max)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Integers -> the real numbers that they represent (float32)."""
    return (q - zero_point) * scale


class _StraightThrough(torch.autograd.Function):
    """Forward: `rounded`.  Backward: the gradient passes to x where `passes` is True (None: everywhere).

    A Function, because x + (rounded - x).detach() is not exactly `rounded`.
    """

    @staticmethod
    def forward(ctx, x, rounded, passes):
        if passes is not None:
            ctx.save_for_backward(passes)
        return rounded

    @staticmethod
    def backward(ctx, grad):
        return (grad * ctx.saved_tensors[0] if ctx.saved_tensors else grad), None, None


def straight_through(x: Tensor, rounded: Tensor, inside: Tensor | None = None, where: Tensor | None = None) -> Tensor:
    """`rounded`, with the gradient of the identity.

    rounded: x on its grid; it is overwritten.  inside: bool, False where x was clipped, which gets no gradient; None
    if nothing was clipped.  where: bool, True where to quantize at all (quantization noise); elsewhere x passes
    unchanged. None: everywhere.
    """
    if where is not None:
        # lerp with a weight of 0 or 1 gives exactly one of its ends, and is faster than torch.where.
        rounded.lerp_(x.detach(), (~where).to(x.dtype))
        inside = None if inside is None else inside.logical_or_(~where)
    return _StraightThrough.apply(x, rounded, inside)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, clips: bool = True
) -> Tensor:
    """Round x to the integer grid and back: what an integer model would see, but differentiable.

    x: any shape, float32.  scale (> 0), zero_point: broadcastable to x, as choose_qparams returns them. Forward is
    dequantize(quantize(x)) bit for bit.  Backward is the straight-through estimator: the gradient passes unchanged
    where x fell inside [quant_min, quant_max] and is zero where it was clipped (Jacob et al. 2018, sec. 3).

    clips=False: the range was taken from x itself, so nothing can be clipped, and the time and memory to record where
    are saved.
    """
    with torch.no_grad():
        # quantize and dequantize in place: four passes over x with the range as plain numbers are twice as fast on CPU
        # as two with clamp(x / s, quant_min - z, quant_max - z), whose bounds would be tensors.
        codes = torch.mul(x, scale.reciprocal()).add_(zero_point).round_()
        inside = (codes >= quant_min) & (codes <= quant_max) if clips else None
        rounded = codes.clamp_(quant_min, quant_max).sub_(zero_point).mul_(scale)
    return straight_through(x, rounded, inside)


class Codes(NamedTuple):
    """A quantized activation x = scale * (values - zero_point).

    values: (..., K), integers in float32 or uint8.  scale, zero_point: float32, (..., 1) or ().
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor


def rescale(sums: Tensor, column: Tensor, x: Codes, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Dequantize integer accumulators, in place: (..., N) -> (..., N).

        y = s_x s_w (sum_k q_x q_w  -  z_x sum_k q_w) + b

    sums: the first sum, column (N): the second; integers in float32, so their difference is exact below 2^24.  x:
    scale and zero point of the activation.  scale: s_w, (N) or ().
    """
    sums = sums.addcmul_(x.zero_point, column, value=-1)
    if x.scale.dim():  # per token: the products with s_w would be a matrix
        sums = sums.mul_(x.scale).mul_(scale)
    else:
        sums = sums.mul_(x.scale * scale)
    return sums if bias is None else sums.add_(bias)


# ----------------------------------------------------------------------------------------- ranges
def min_max(x: Tensor, per_row: bool) -> tuple[Tensor, Tensor]:
    """The smallest and largest value of x: two scalars, or (..., 1) per row of the last dimension."""
    if per_row:
        # amin and amax are vectorized on CPU, aminmax along a dimension is not: 13 times faster
        return x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    return torch.aminmax(x)


@torch.no_grad()
def best_clip(x: Tensor, quant_min: int, quant_max: int, per_row: bool, one_factor: bool = False) -> Tensor:
    """The factor on the symmetric min-max range of x with the least squared quantization error.

    Clipping a few outliers makes the steps finer for all other values; it pays more with fewer bits. Searched over
    0.10, 0.12 .. 1.00. Returns factors (..., 1) per row, or a scalar: of a single range, or with one_factor common to
    the ranges of all rows.

    >>> best_clip(torch.tensor([[0.1, -0.1, 0.1, -0.1, 0.12]]), -1, 1, per_row=True)
    tensor([[0.8600]])
    """
    low, high = min_max(x, per_row)
    each = per_row and not one_factor
    best_error = torch.full_like(low if each else x.new_empty(()), float("inf"))
    best = torch.ones_like(best_error)
    for percent in range(100, 9, -2) if not x.is_meta else ():  # of meta tensors only shapes are needed
        clip = percent / 100
        scale, zero_point = choose_qparams(low * clip, high * clip, quant_min, quant_max, symmetric=True)
        error = (fake_quantize(x, scale, zero_point, quant_min, quant_max) - x).square()
        error = error.sum(dim=-1, keepdim=True) if each else error.sum()
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, clip, best)
    return best


# ------------------------------------------------------------------------------------------ noise
def noise_mask(weight: Tensor, p: float, block: int) -> Tensor:
    """Which elements of a weight (..., N) to quantize at this step: a fraction p, in runs of `block`."""
    if block == 1:
        return random_mask(weight.shape, p, weight.device)
    *rows, size = weight.shape
    blocks = -(-size // block)
    drawn = random_mask(torch.Size((*rows, blocks)), p, weight.device)
    return drawn.repeat_interleave(block, dim=-1)[..., :size]


# ---------------------------------------------------------------------------------- configuration
@dataclass(frozen=True)
class QuantConfig:
    """What to quantize and how. 32 bits means "left alone". prepare.check_quant has the rules."""

    weight_bits: int = 8  # of Linear weights and word embeddings
    act_bits: int = 8  # of the input of every quantized Linear
    per_channel: bool = True  # weights: a scale per output channel (word embeddings: always)
    per_token: bool = True  # dynamic activations: a scale per token, else one per batch
    grid: str = "portable"  # 8-bit Linear weights in -64..64, see PORTABLE; or "full": -127..127
    weights: str = "uniform"  # a key of prepare.WEIGHTS
    weight_range: str = "minmax"  # or "mse": clip outliers; or "lsq": where learned scales start
    act_range: str = "dynamic"  # or "static": set by calibrate(); or "learned": trained from there
    attention_bits: int = 32  # of Q, K, V and the attention probabilities
    noise: float = 1.0  # fraction of the weights quantized at a training step (learned scales: all)
    keep: tuple[str, ...] = ("head",)  # modules left in float32, by the beginning of their names


# ---------------------------------------------------------------------------------------- weights
def integer_limits(config: QuantConfig, multiplied: bool) -> tuple[int, int]:
    """The symmetric grid of a weight. multiplied: whether it is a matrix, which integer kernels multiply by
    activations, and not a table, which is only looked up.
    """
    low, high = quant_range(config.weight_bits, symmetric=True)
    if multiplied and config.grid == "portable" and config.act_bits == 8:
        return max(low, -PORTABLE), min(high, PORTABLE)
    return low, high


class WeightQuantizer(nn.Module):
    """Fake-quantizes a weight (rows, N) with noise in training. A subclass defines `scale`; or `codes`, if its integers
    are not the nearest ones.

    weight: the tensor to be quantized, for subclasses that choose something from it.  per_row: a scale per row, else
    one for all.  multiplied: see integer_limits.
    """

    clips = True  # whether weights beyond the grid get no gradient; False also saves the memory to record which
    block = 1  # the noise is drawn in runs of this many weights
    # For train.make_optimizers: weight decay would pull what a quantizer trains, scales, to a wrong place.
    decays = False

    def __init__(self, config: QuantConfig, weight: Tensor, per_row: bool, multiplied: bool):
        super().__init__()
        self.bits, self.per_row, self.noise = config.weight_bits, per_row, config.noise
        self.quant_min, self.quant_max = integer_limits(config, multiplied)

    def scale(self, weight: Tensor) -> Tensor:
        """The size of a step, (rows, 1) or ()."""
        raise NotImplementedError

    @torch.no_grad()
    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The integers of a weight, in float32, and their scale."""
        scale = self.scale(weight)
        return quantize(weight, scale, scale.new_zeros(()), self.quant_min, self.quant_max), scale

    @torch.no_grad()
    def settle(self, weight: Tensor, codes: Tensor, scale: Tensor) -> None:
        """Change the weight, as little as that needs, so that these are its codes and scale (repair.py).

        Each weight is moved to the border of its integer's cell, if it is outside. A training that follows would hardly
        get it out of the middle.
        """
        weight.copy_(((weight / scale - codes).clamp_(-CELL, CELL) + codes) * scale)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight on its grid, in training only where the noise falls; differentiable."""
        if self.training and self.noise == 0.0:
            return weight
        where = noise_mask(weight, self.noise, self.block) if self.training and self.noise < 1.0 else None
        with torch.no_grad():
            codes, scale = self.codes(weight)
            inside = None
            if self.clips:
                nearest = torch.mul(weight, scale.reciprocal()).round_()
                inside = (nearest >= self.quant_min) & (nearest <= self.quant_max)
        return straight_through(weight, codes * scale, inside, where)


def check_codes(quantizer: WeightQuantizer, codes: Tensor) -> Tensor:
    """The codes. Raises ValueError if they are not integers of the quantizer's grid: packed, they would become others."""
    low, high = quantizer.quant_min, quantizer.quant_max
    if not ((codes >= low) & (codes <= high) & (codes == codes.round())).all():
        name, found = type(quantizer).__name__, f"{codes.min():g} to {codes.max():g}"
        raise ValueError(f"{name}.codes returned {found}, not integers from {low} to {high}: its grid")
    return codes


class UniformQuantizer(WeightQuantizer):
    """Equal steps. The scale covers the largest weight (min-max), or with weight_range="mse" that range times the
    factor of least squared error, chosen once from the weight at the start.

    A subclass whose scale does not cover the largest weight says so: clips = True.
    """

    clips = False

    def __init__(self, config: QuantConfig, weight: Tensor, per_row: bool, multiplied: bool):
        super().__init__(config, weight, per_row, multiplied)
        self.register_buffer("clip", None)
        if config.weight_range == "mse":
            self.clips = True
            # A table has one factor for all rows, from some: which rows a batch brings is not known here.
            rows = weight.detach()[:: 1 if multiplied else max(1, len(weight) // 4096)]
            self.clip = best_clip(rows, self.quant_min, self.quant_max, per_row, one_factor=not multiplied)

    @torch.no_grad()
    def scale(self, weight: Tensor) -> Tensor:
        low, high = min_max(weight, self.per_row)
        if self.clip is not None:
            low, high = low * self.clip, high * self.clip
        return choose_qparams(low, high, self.quant_min, self.quant_max, symmetric=True)[0]

    @torch.no_grad()
    def settle(self, weight: Tensor, codes: Tensor, scale: Tensor) -> None:
        """Also choose the factor with which the new range has this scale. In training the scale follows the range."""
        super().settle(weight, codes, scale)
        self.clip, self.clips = None, True
        usual = self.scale(weight)
        self.clip = torch.where(usual > SMALLEST_SCALE, scale / usual, 1.0)  # a row of zeros has no range


class TernaryQuantizer(WeightQuantizer):
    """Weights as {-alpha, 0, alpha}, by the rule of Ternary Weight Networks (Li et al. 2016, arXiv 1605.04711, eq.
    5-6), with which TernaryBERT and Kim et al. 2022 train:

        delta = 0.7 mean|w|         alpha = mean of |w| over the weights above delta

    For Gaussian or uniform weights this is close to the least squared error. Min-max would choose alpha = max|w|,
    which rounds nearly all weights to 0. Nothing is clipped: every weight gets a gradient.

    >>> weight = torch.tensor([[0.1, -0.4, 0.6, 0.05]])       # delta = 0.7 * 0.2875 = 0.2
    >>> TernaryQuantizer(QuantConfig(weight_bits=2), weight, True, True)(weight)
    tensor([[ 0.0000, -0.5000,  0.5000,  0.0000]])
    """

    clips = False

    @torch.no_grad()
    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        size = weight.abs()
        over = {"dim": -1, "keepdim": True} if self.per_row else {}
        # A row of zeros has no weight above its threshold: the floors prevent 0 / 0.
        threshold = size.mean(**over).mul_(0.7).clamp_(min=SMALLEST_SCALE)
        large = (size > threshold).to(size.dtype)
        count = large.sum(**over).clamp_(min=1.0)
        scale = large.mul_(size).sum(**over).div_(count).clamp_(min=SMALLEST_SCALE)
        # In steps of 2 delta, rounded: half a step goes to 0, more to 1.
        return torch.mul(weight, (2 * threshold).reciprocal()).round_().clamp_(-1, 1), scale

    @torch.no_grad()
    def settle(self, weight: Tensor, codes: Tensor, scale: Tensor) -> None:
        """In the middle of the cells: from there delta and alpha are what they were."""
        weight.copy_(codes * scale)


class FixedQuantizer(WeightQuantizer):
    """The given scale, of a weight from a file, which lies on its grid already."""

    def __init__(self, quantizer: WeightQuantizer, scale: Tensor):
        nn.Module.__init__(self)
        self.bits, self.per_row, self.noise = quantizer.bits, quantizer.per_row, 1.0
        self.quant_min, self.quant_max = quantizer.quant_min, quantizer.quant_max
        self.register_buffer("fixed", scale, persistent=False)

    def scale(self, weight: Tensor) -> Tensor:
        return self.fixed


# ------------------------------------------------------------------------- activations and layers
class ActQuantizer(nn.Module):
    """Fake-quantizes an activation (..., C) on an affine grid.

    Dynamic: the range is that of the tensor itself, per token or per tensor. Static: one range, set by calibrate();
    values outside are clipped.

    In evaluation it returns the Codes themselves if it stands before a product with quantized weights.  inside:
    whether it stands before a product inside attention, of two activations, which is computed in floats.
    """

    decays = False  # as in WeightQuantizer

    def __init__(self, config: QuantConfig, inside: bool = False):
        super().__init__()
        self.bits = config.attention_bits if inside else config.act_bits
        self.static = config.act_range != "dynamic"
        self.per_token = config.per_token and not self.static
        self.quant_min, self.quant_max = quant_range(self.bits, symmetric=False)
        self.returns_codes = config.weight_bits != 32 and not inside
        self.seen = None  # while calibrate() runs: () or the smallest and largest value of all batches
        if self.static:
            self.make_range()

    def make_range(self) -> None:
        self.register_buffer("scale", torch.full((), float("nan")))  # not calibrated yet
        self.register_buffer("zero_point", torch.zeros(()))

    def set_range(self, scale: Tensor, zero_point: Tensor) -> None:
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def static_range(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point

    def forward(self, x: Tensor) -> Tensor | Codes:
        x = x.float()  # under autocast x may be bf16, too coarse for 256 steps
        if self.seen is not None:
            self.seen = torch.stack([*x.detach().aminmax(), *self.seen]).aminmax()
            return x
        if self.returns_codes and not self.training:
            grid = self.qparams(x)
            return Codes(quantize(x.detach(), *grid, self.quant_min, self.quant_max), *grid)
        return self.rounded(x)

    def rounded(self, x: Tensor) -> Tensor:
        """x on its grid, differentiable."""
        return fake_quantize(x, *self.qparams(x), self.quant_min, self.quant_max, clips=self.static)

    @torch.no_grad()
    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point for x: scalars, or (..., 1) per token."""
        if self.static:
            return self.static_range()
        return self.covering(*min_max(x, self.per_token))

    def covering(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point for values from low to high."""
        return choose_qparams(low, high, self.quant_min, self.quant_max, symmetric=False)


class QuantLinear(nn.Linear):
    """y = Q(x) Q(W)^T + b. Weight and bias keep their float32 values and their names.

    In evaluation it computes with integers, without gradient.
    """

    def __init__(self, linear: nn.Linear, act: nn.Module, weight: nn.Module):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.act_quantizer, self.weight_quantizer = act, weight

    def forward(self, x: Tensor | Codes) -> Tensor:
        return product(self.act_quantizer(x), self.weight, self.weight_quantizer, self.bias)


def product(x: Tensor | Codes, weight: Tensor, quantizer: nn.Module, bias: Tensor | None) -> Tensor:
    """x Q(W)^T + b, in floats on their grids, or in integers if x is given as Codes."""
    if not isinstance(x, Codes):
        return F.linear(x, quantizer(weight), bias)
    with torch.no_grad(), torch.autocast(x.values.device.type, enabled=False):
        codes, scale = quantizer.codes(weight)
        sums = F.linear(x.values, codes)
        return rescale(sums, codes.sum(dim=1), x, scale.flatten(), bias)

"""Quantization from the ground up: round to a small integer grid, and train through the rounding.

The grid. b bits give 2^b integers. A real number x is stored as an integer q with a scale s and a
zero point z:

    q = clamp(round(x / s + z), quant_min, quant_max)            quantize
    x ~ (q - z) * s                                              dequantize

*Symmetric* grids have z = 0 (weights, which lie around 0: one multiplication less in the integer
model). *Affine* grids spend their integers on [min, max] wherever that lies (activations: a GELU
output is never below -0.17). One scale may serve a whole tensor, each output channel of a weight,
or each token of an activation: finer is more exact and costs a vector of scales. 2 bits, symmetric,
is the ternary grid {-1, 0, 1}, for which there is a rule of its own (TernaryQuantizer); the fourth
value that two bits have room for, -2, is used by scales that are learned (learned.py).

Training. round() has derivative 0 almost everywhere, so nothing would learn. The straight-through
estimator (Bengio et al. 2013) pretends that rounding is the identity, except where x was clipped:
there, moving x changes nothing. The result, `fake_quantize`, is a float tensor that lies on the
grid: what the integer model will compute, but differentiable. *Quantization noise* (Fan et al.
2020, arXiv 2004.07320) quantizes only a random fraction p of the weights at each step; the others
pass exactly and get an exact gradient. p = 1 is ordinary quantization-aware training; in evaluation
everything is quantized.

Evaluation. The same numbers in the integer model's own order: a Linear layer multiplies integers, sums
them exactly, and applies the scales after (`rescale`). In exact arithmetic that is what fake
quantization computes; in floats the last digits differ, and one digit is enough to push the next
activation over a rounding border. So a student is tested as what it will be deployed as, bit for bit.

Where it goes on: learned.py has scales that are trained with the weights, prepare.py puts all of this
into a model.

>>> x = torch.tensor([0.26, -9.0])
>>> fake_quantize(x, torch.tensor(0.5), torch.tensor(0.0), -4, 3)
tensor([ 0.5000, -2.0000])
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import UserError

# CPUs without VNNI instructions add two products of 8 bits in 16 bits and clip the sum: 255 * 127 * 2
# is too much, 255 * 64 * 2 is not. int8.py tells the story. Fewer than 8 bits never get there.
PORTABLE = 64
SMALLEST_SCALE = 1e-12  # an all-zero tensor has the range [0, 0]; its scale must still divide


# --------------------------------------------------------------------------------------- the grid
def quant_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """The integers of a grid: (quant_min, quant_max).

    Symmetric grids leave out the most negative integer, so that -x is on the grid whenever x is.

    >>> quant_range(8, symmetric=True), quant_range(8, symmetric=False), quant_range(2, symmetric=True)
    ((-127, 127), (0, 255), (-1, 1))
    """
    if not 2 <= bits <= 8:
        raise UserError(f"{bits} bits: choose from 2 to 8 (or 32 to leave a tensor alone)")
    if symmetric:
        largest = 2 ** (bits - 1) - 1
        return -largest, largest
    return 0, 2**bits - 1


def choose_qparams(
    x_min: Tensor, x_max: Tensor, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """The scale (> 0) and zero point that cover [x_min, x_max] (Jacob et al. 2018, eq. 1-3).

    x_min, x_max: float32, any one shape.  Returns two float32 tensors of that shape; the zero point
    is a whole number. The range is first widened to hold 0, because padding, ReLU and dropout make
    exact zeros.
    """
    x_min, x_max = x_min.clamp(max=0.0), x_max.clamp(min=0.0)
    if symmetric:
        scale = torch.maximum(-x_min, x_max).div(quant_max).clamp_(min=SMALLEST_SCALE)
        return scale, torch.zeros_like(scale)
    scale = (x_max - x_min).div(quant_max - quant_min).clamp_(min=SMALLEST_SCALE)
    zero_point = (quant_min - torch.round(x_min * scale.reciprocal())).clamp_(quant_min, quant_max)
    return scale, zero_point


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
) -> Tensor:
    """Real numbers -> integers, halves to even. scale, zero_point: broadcastable to x.

    The integers stay in float32, which holds whole numbers below 2^24 exactly. x is multiplied by
    1 / scale and the zero point added before rounding, as oneDNN's kernels do: three other orders
    round differently once in a great while.
    """
    return torch.mul(x, scale.reciprocal()).add_(zero_point).round_().clamp_(quant_min, quant_max)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Integers -> the real numbers they stand for (float32)."""
    return (q - zero_point) * scale


class _StraightThrough(torch.autograd.Function):
    """See fake_quantize. A Function, since the sum in `x + (q - x).detach()` is not exactly q."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, quant_min, quant_max, clips, where):
        # quantize and dequantize in place. Four passes over x with the range as plain numbers are
        # twice as fast on CPU as two with clamp(x / s, quant_min - z, quant_max - z), whose bounds
        # would be tensors.
        codes = torch.mul(x, scale.reciprocal()).add_(zero_point).round_()
        if clips:
            inside = (codes >= quant_min) & (codes <= quant_max)
            ctx.save_for_backward(inside if where is None else inside.logical_or_(~where))
        result = codes.clamp_(quant_min, quant_max).sub_(zero_point).mul_(scale)
        if where is not None:
            # lerp with a weight of 0 or 1 is exactly one of its ends, and faster than torch.where
            result.lerp_(x, (~where).to(x.dtype))
        return result

    @staticmethod
    def backward(ctx, grad):
        if ctx.saved_tensors:
            grad = grad * ctx.saved_tensors[0]
        return grad, None, None, None, None, None, None


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    clips: bool = True,
    where: Tensor | None = None,
) -> Tensor:
    """Round x to the integer grid and back: what an integer model would see, but differentiable.

    x: any shape, float32.  scale (> 0), zero_point: broadcastable to x, as choose_qparams returns
    them. Forward is dequantize(quantize(x)) bit for bit.  Backward is the straight-through
    estimator: the gradient passes unchanged where x fell inside [quant_min, quant_max] and is zero
    where it was clipped (Jacob et al. 2018, sec. 3).

    clips=False says that the range was taken from x itself, so that nothing can be clipped: the
    same numbers, without the cost of remembering where.
    where: bool, of x's shape. Only these elements are quantized, the others pass exactly
    (quantization noise).
    """
    return _StraightThrough.apply(x, scale, zero_point, quant_min, quant_max, clips, where)


class Codes(NamedTuple):
    """A quantized activation x = scale * (values - zero_point).

    values: (..., K), whole numbers, float32 or uint8.  scale, zero_point: float32, (..., 1) or ().
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor


def rescale(sums: Tensor, column: Tensor, x: Codes, scale: Tensor, bias: Tensor | None) -> Tensor:
    """What is left to do after a product of integers, in place: (..., N) -> (..., N).

        y = s_x s_w (sum_k q_x q_w  -  z_x sum_k q_w) + b

    sums: the first sum, column (N): the second; whole numbers in float32, so their difference is
    exact below 2^24.  x: scale and zero point of the activation.  scale: s_w, (N) or ().
    """
    sums = sums.addcmul_(x.zero_point, column, value=-1)
    if x.scale.dim():  # a scale a token: their products with s_w would be a matrix
        sums = sums.mul_(x.scale).mul_(scale)
    else:
        sums = sums.mul_(x.scale * scale)
    return sums if bias is None else sums.add_(bias)


# ----------------------------------------------------------------------------------------- ranges
def min_max(x: Tensor, per_row: bool) -> tuple[Tensor, Tensor]:
    """The range of x: two scalars, or per row of the last dimension (..., 1)."""
    if per_row:
        # amin and amax are vectorized on CPU, aminmax along a dimension is not: 13 times faster
        return x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    return torch.aminmax(x)


@torch.no_grad()
def best_clip(
    x: Tensor,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    per_row: bool,
    one_factor: bool = False,
) -> Tensor:
    """By how much to shrink the min-max range of x for the least squared quantization error.

    Clipping a few outliers buys finer steps for all the rest; the fewer bits, the more it pays.
    Searched over 0.10, 0.12 .. 1.00. Returns factors: (..., 1) per row; a scalar where the range is
    one, and where one_factor asks for a common one to all rows' ranges.

    >>> best_clip(torch.tensor([[0.1, -0.1, 0.1, -0.1, 0.12]]), -1, 1, True, per_row=True)
    tensor([[0.8600]])
    """
    low, high = min_max(x, per_row)
    each = per_row and not one_factor
    best_error = torch.full_like(low if each else x.new_empty(()), float("inf"))
    best = torch.ones_like(best_error)
    for percent in range(100, 9, -2):
        clip = percent / 100
        scale, zero_point = choose_qparams(low * clip, high * clip, quant_min, quant_max, symmetric)
        error = (fake_quantize(x, scale, zero_point, quant_min, quant_max) - x).square()
        error = error.sum(dim=-1, keepdim=True) if each else error.sum()
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, clip, best)
    return best


class MinMax:
    """Observer: the smallest and largest value ever seen."""

    def __init__(self):
        self.low = self.high = None

    def observe(self, x: Tensor) -> None:
        low, high = torch.aminmax(x)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def range(self, quant_min: int, quant_max: int, symmetric: bool) -> tuple[Tensor, Tensor]:
        return self.low, self.high


class MovingAverage(MinMax):
    """Observer: an exponential average of each batch's extremes: one odd batch counts little."""

    momentum = 0.1

    def observe(self, x: Tensor) -> None:
        low, high = torch.aminmax(x)
        self.low = low if self.low is None else torch.lerp(self.low, low, self.momentum)
        self.high = high if self.high is None else torch.lerp(self.high, high, self.momentum)


class MSESearch(MinMax):
    """Observer: the range with the least squared error on a sample of the values seen."""

    sample_size = 8192  # values of each batch

    def __init__(self):
        super().__init__()
        self.sample = []

    def observe(self, x: Tensor) -> None:
        super().observe(x)
        flat = x.flatten()
        picks = torch.randint(flat.numel(), (min(self.sample_size, flat.numel()),), device=x.device)
        self.sample.append(flat[picks])

    def range(self, quant_min: int, quant_max: int, symmetric: bool) -> tuple[Tensor, Tensor]:
        values = torch.cat([*self.sample, self.low[None], self.high[None]])
        clip = best_clip(values, quant_min, quant_max, symmetric, per_row=False)
        return self.low * clip, self.high * clip


OBSERVERS = {"minmax": MinMax, "moving-average": MovingAverage, "mse": MSESearch}


# ------------------------------------------------------------------------------------------ noise
def random_mask(shape: torch.Size, p: float, device: torch.device) -> Tensor:
    """A bool tensor, each element True with probability p (to the nearest 1/65536).

    Compares 16 random bits with a threshold. Each 64-bit draw serves four elements, which makes
    this 2-3 times faster on CPU than torch.rand and 8 times faster than bernoulli_: noise is drawn
    for every weight at every step.
    """
    count = shape.numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=device).random_(-(2**63), None)
    threshold = min(round(p * 65536) - 32768, 32767)
    return (words.view(torch.int16)[:count] < threshold).view(shape)


def noise_mask(weight: Tensor, p: float, block: int) -> Tensor:
    """Which elements of a weight (..., N) to quantize now: a fraction p, drawn in runs."""
    if block == 1:
        return random_mask(weight.shape, p, weight.device)
    *rows, size = weight.shape
    blocks = -(-size // block)
    drawn = random_mask(torch.Size((*rows, blocks)), p, weight.device)
    return drawn.repeat_interleave(block, dim=-1)[..., :size]


# ---------------------------------------------------------------------------------- configuration
@dataclass(frozen=True)
class QuantConfig:
    """What to quantize and how. 32 bits means "left alone"."""

    weight_bits: int = 8  # Linear weights and word embeddings
    act_bits: int = 8  # the input of every quantized Linear
    per_channel: bool = True  # weights: a scale an output channel (embeddings always: one a row)
    per_token: bool = True  # dynamic activations: a scale a token; else one for the batch
    grid: str = "portable"  # 8-bit Linear weights in -64..64, see PORTABLE; or "full": -127..127
    weights: str = "uniform"  # or "ternary" (2 bits), or "lsq": scales that are trained
    weight_range: str = "minmax"  # or "mse": shrink it once; or "lsq": 2 mean|w| / sqrt(Q_max)
    weight_clip: float = 0.0  # weights are cut at +-clip before anything else; 0: they are not
    act_range: str = "dynamic"  # or "static": fixed by calibrate(); "learned": trained from there
    attention_bits: int = 32  # of what the products inside attention read: Q, K, V and the map
    observer: str = "minmax"  # static ranges: minmax, moving-average, mse
    noise: float = 1.0  # fraction of weights quantized at a training step (learned scales: all)
    noise_block: int = 1  # drawn in runs of this many weights
    keep: tuple[str, ...] = ("head",)  # modules left in float32, by the beginning of their names

    def __post_init__(self):
        for name in ("weight_bits", "act_bits", "attention_bits"):
            bits = getattr(self, name)
            if not isinstance(bits, int) or (bits != 32 and not 2 <= bits <= 8):
                raise UserError(f"{name} is {bits}: choose from 2 to 8, or 32 to leave them alone")
        if not 0.0 <= self.noise <= 1.0:
            raise UserError(f"noise is {self.noise}: choose a fraction from 0 to 1")
        if self.noise_block < 1:
            raise UserError(f"noise block is {self.noise_block}: choose 1 or more")
        if not 0.0 <= self.weight_clip <= 1e9:
            raise UserError(f"weight clip is {self.weight_clip}: choose 0 (off) or more")
        if self.weights == "ternary" and self.weight_bits not in (2, 32):
            raise UserError(f"ternary weights have 2 bits, not {self.weight_bits}")
        if self.weights == "ternary" and self.weight_range != "minmax":
            raise UserError("ternary weights have a range of their own: leave weight range alone")
        if self.weight_range == "lsq" and self.weights != "lsq":
            raise UserError("weight range lsq is where learned scales start: it needs weights lsq")
        if self.weight_clip and self.weights == "lsq":
            raise UserError("weights lsq learn where to clip: leave weight clip at 0")
        choices = {
            "grid": ("portable", "full"),
            "weights": ("uniform", "ternary", "lsq"),
            "weight_range": ("minmax", "mse", "lsq"),
            "act_range": ("dynamic", "static", "learned"),
            "observer": tuple(OBSERVERS),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(
                    f"{name} is {getattr(self, name)!r}: choose from {', '.join(known)}"
                )


# ---------------------------------------------------------------------------------------- modules
def integer_limits(config: QuantConfig, multiplied: bool) -> tuple[int, int]:
    """The symmetric grid of a weight. multiplied: a matrix, which integer kernels multiply by
    activations; a table is only looked up.
    """
    low, high = quant_range(config.weight_bits, symmetric=True)
    if multiplied and config.grid == "portable" and config.act_bits == 8:
        return max(low, -PORTABLE), min(high, PORTABLE)
    return low, high


class WeightQuantizer(nn.Module):
    """Fake-quantizes a weight (rows, N) on a symmetric grid, with noise in training.

    multiplied: see integer_limits.
    clip: factors on the min-max range, 1 unless the range was searched; (rows, 1) or a scalar.
    """

    def __init__(self, config: QuantConfig, per_row: bool, multiplied: bool):
        super().__init__()
        self.bits, self.per_row = config.weight_bits, per_row
        self.noise, self.noise_block = config.noise, config.noise_block
        self.weight_clip = config.weight_clip
        self.quant_min, self.quant_max = integer_limits(config, multiplied)
        self.clips = False
        self.register_buffer("clip", torch.ones(()))
        # Set for weights from a file, which lie on their grid already: see packed.float_model.
        self.register_buffer("fixed_scale", None, persistent=False)

    def search_clip(self, weight: Tensor, one_factor: bool = False) -> None:
        grid = (self.quant_min, self.quant_max, True)
        self.clip = best_clip(self.cut(weight.detach()), *grid, self.per_row, one_factor)
        self.clips = True

    @torch.no_grad()
    def qparams(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        if self.fixed_scale is not None:
            return self.fixed_scale, torch.zeros_like(self.fixed_scale)
        low, high = min_max(weight, self.per_row)
        if self.clips:
            low, high = low * self.clip, high * self.clip
        return choose_qparams(low, high, self.quant_min, self.quant_max, symmetric=True)

    def forward(self, weight: Tensor) -> Tensor:
        weight = self.cut(weight)
        if not self.training or self.noise == 1.0:
            return self.rounded(weight, None)
        if self.noise == 0.0:
            return weight
        return self.rounded(weight, noise_mask(weight, self.noise, self.noise_block))

    def cut(self, weight: Tensor) -> Tensor:
        """The weight within +-weight_clip: outside there is no gradient."""
        return weight.clamp(-self.weight_clip, self.weight_clip) if self.weight_clip else weight

    def rounded(self, weight: Tensor, where: Tensor | None) -> Tensor:
        """The weight on its grid, there where `where` is True (None: everywhere)."""
        grid = (*self.qparams(weight), self.quant_min, self.quant_max)
        return fake_quantize(weight, *grid, clips=self.clips, where=where)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The integers of a weight, in float32, and their scale: (rows, 1) or ()."""
        weight = self.cut(weight)
        scale, zero_point = self.qparams(weight)
        return quantize(weight, scale, zero_point, self.quant_min, self.quant_max), scale

    def extra_repr(self) -> str:
        return f"bits={self.bits}, per_row={self.per_row}, noise={self.noise}"


class _Ternary(torch.autograd.Function):
    """See TernaryQuantizer: the straight-through estimator, never clipped."""

    @staticmethod
    def forward(ctx, weight, scale, threshold, where):
        result = ternary_codes(weight, threshold).mul_(scale)
        return result if where is None else result.lerp_(weight, (~where).to(weight.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None, None


def ternary_codes(weight: Tensor, threshold: Tensor) -> Tensor:
    """sign(w) where |w| > threshold, else 0.

    That is w in steps of twice the threshold, rounded: half a step goes to 0, more to 1.
    """
    return torch.mul(weight, (2 * threshold).reciprocal()).round_().clamp_(-1, 1)


class TernaryQuantizer(WeightQuantizer):
    """Weights as {-alpha, 0, alpha}, by the rule of Ternary Weight Networks (Li et al. 2016,
    arXiv 1605.04711, eq. 5-6), which TernaryBERT and Kim et al. 2022 train with:

        delta = 0.7 mean|w|         alpha = mean of |w| over those above delta

    For Gaussian or uniform weights this is close to the least squared error. Min-max would take
    alpha = max|w|, and with it nearly every weight would round to 0. One alpha a row, or one for
    the whole matrix.

    >>> quantizer = TernaryQuantizer(QuantConfig(weight_bits=2, weights="ternary"), True, True)
    >>> quantizer(torch.tensor([[0.1, -0.4, 0.6, 0.05]]))       # delta = 0.7 * 0.2875 = 0.2
    tensor([[ 0.0000, -0.5000,  0.5000,  0.0000]])
    """

    @torch.no_grad()
    def scale_and_threshold(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and delta: (rows, 1), or () for the whole matrix."""
        if self.fixed_scale is not None:  # the weights are alpha times -1, 0 or 1 already
            return self.fixed_scale, self.fixed_scale / 2
        size = weight.abs()
        over = {"dim": -1, "keepdim": True} if self.per_row else {}
        # A row of zeros has no weight above its threshold: the floors keep 0 / 0 away.
        threshold = size.mean(**over).mul_(0.7).clamp_(min=SMALLEST_SCALE)
        large = (size > threshold).to(size.dtype)
        count = large.sum(**over).clamp_(min=1.0)
        scale = large.mul_(size).sum(**over).div_(count).clamp_(min=SMALLEST_SCALE)
        return scale, threshold

    def rounded(self, weight: Tensor, where: Tensor | None) -> Tensor:
        return _Ternary.apply(weight, *self.scale_and_threshold(weight), where)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.cut(weight)
        scale, threshold = self.scale_and_threshold(weight)
        return ternary_codes(weight, threshold), scale


class ActQuantizer(nn.Module):
    """Fake-quantizes an activation (..., C) on an affine grid.

    Dynamic: the range is that of the tensor at hand, per token or for all of it.
    Static: one range, fixed by calibrate(); values outside are clipped.

    In evaluation it returns the Codes themselves, if it stands before a product with quantized
    weights.  inside: before a product inside attention, of two activations, which stays in floats.
    """

    def __init__(self, config: QuantConfig, inside: bool = False):
        super().__init__()
        self.bits = config.attention_bits if inside else config.act_bits
        self.static = config.act_range != "dynamic"
        self.per_token = config.per_token and not self.static
        self.quant_min, self.quant_max = quant_range(self.bits, symmetric=False)
        self.returns_codes = config.weight_bits != 32 and not inside
        self.observer = None  # set while calibrate() runs
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
        x = x.float()  # under autocast it may come in bf16, too coarse for 256 steps
        if self.observer is not None:
            self.observer.observe(x.detach())
            return x
        if self.returns_codes and not self.training:
            scale, zero_point = self.qparams(x)
            codes = quantize(x.detach(), scale, zero_point, self.quant_min, self.quant_max)
            return Codes(codes, scale, zero_point)
        return self.rounded(x)

    def rounded(self, x: Tensor) -> Tensor:
        """x on its grid, differentiable."""
        grid = (*self.qparams(x), self.quant_min, self.quant_max)
        return fake_quantize(x, *grid, clips=self.static)

    @torch.no_grad()
    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point for x: scalars, or (..., 1) with one a token."""
        if self.static:
            return self.static_range()
        low, high = min_max(x, self.per_token)
        return choose_qparams(low, high, self.quant_min, self.quant_max, symmetric=False)

    def extra_repr(self) -> str:
        kind = "static" if self.static else "per token" if self.per_token else "per tensor"
        return f"bits={self.bits}, {kind}"


class QuantLinear(nn.Linear):
    """y = Q(x) Q(W)^T + b. Weight and bias keep their float32 values and their names.

    Evaluation has no gradient: it computes with integers.
    """

    def __init__(self, linear: nn.Linear, act: nn.Module, weight: nn.Module):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.act_quantizer, self.weight_quantizer = act, weight

    def forward(self, x: Tensor | Codes) -> Tensor:
        return product(self.act_quantizer(x), self.weight, self.weight_quantizer, self.bias)


def product(x: Tensor | Codes, weight: Tensor, quantizer: nn.Module, bias: Tensor | None) -> Tensor:
    """x Q(W)^T + b: of floats on their grids, or of integers if x comes as Codes."""
    if not isinstance(x, Codes):
        return F.linear(x, quantizer(weight), bias)
    with torch.no_grad(), torch.autocast(x.values.device.type, enabled=False):
        codes, scale = quantizer.codes(weight)
        sums = F.linear(x.values, codes)
        return rescale(sums, codes.sum(dim=1), x, scale.flatten(), bias)

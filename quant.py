"""Quantization from the ground up: round to a small integer grid, and train through the rounding.

The grid. b bits give 2^b integers. A real number x is stored as an integer q with a scale s and a
zero point z:

    q = clamp(round(x / s + z), quant_min, quant_max)            quantize
    x ~ (q - z) * s                                              dequantize

*Symmetric* grids have z = 0 (weights, which lie around 0: one multiplication less in the integer
model). *Affine* grids spend their integers on [min, max] wherever that lies (activations: a GELU
output is never below -0.17). One scale may serve a whole tensor, each output channel of a weight,
or each token of an activation: finer is more exact and costs a vector of scales. 2 bits, symmetric,
is the ternary grid {-1, 0, 1}.

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

A model. `prepare(model, QuantConfig())` replaces the encoder's Linear layers by QuantLinear and
gives the word embeddings a row quantizer. Embedding rows are quantized after they are gathered:
with one scale a row the numbers are the same as for the whole table, and XLM-R's table is 250,002
rows of which a batch uses a few hundred.

In float32: biases, norms, position and type embeddings, the head (together 0.4 % of XLM-R base).

>>> x = torch.tensor([0.26, -9.0])
>>> fake_quantize(x, torch.tensor(0.5), torch.tensor(0.0), -4, 3)
tensor([ 0.5000, -2.0000])
"""

from collections.abc import Iterable
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


class _LearnedStep(torch.autograd.Function):
    """See LearnedScale."""

    @staticmethod
    def forward(ctx, x, scale, quant_min, quant_max):
        ratio = x * scale.reciprocal()
        codes = ratio.round().clamp_(quant_min, quant_max)
        ctx.save_for_backward(ratio, codes)
        ctx.grid = quant_min, quant_max
        return codes * scale

    @staticmethod
    def backward(ctx, grad):
        ratio, codes = ctx.saved_tensors
        inside = (ratio >= ctx.grid[0]) & (ratio <= ctx.grid[1])
        # How q s moves with s: q - x/s while x is held and rounds to the same q; the bound, where
        # x is clipped to it.
        by_scale = torch.where(inside, codes - ratio, codes)
        factor = (ratio.numel() * ctx.grid[1]) ** -0.5
        return grad * inside, (grad * by_scale).sum() * factor, None, None


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
    weight_range: str = "minmax"  # or "mse": shrink the range once, when the model is prepared
    act_range: str = "dynamic"  # or "static": ranges fixed by calibrate()
    observer: str = "minmax"  # static ranges: minmax, moving-average, mse
    noise: float = 1.0  # fraction of the weights quantized at a training step
    noise_block: int = 1  # drawn in runs of this many weights
    keep: tuple[str, ...] = ("head",)  # modules left in float32, by the beginning of their names

    def __post_init__(self):
        for name in ("weight_bits", "act_bits"):
            bits = getattr(self, name)
            if not isinstance(bits, int) or (bits != 32 and not 2 <= bits <= 8):
                raise UserError(f"{name} is {bits}: choose from 2 to 8, or 32 to leave them alone")
        if not 0.0 <= self.noise <= 1.0:
            raise UserError(f"noise is {self.noise}: choose a fraction from 0 to 1")
        if self.noise_block < 1:
            raise UserError(f"noise block is {self.noise_block}: choose 1 or more")
        choices = {
            "grid": ("portable", "full"),
            "weight_range": ("minmax", "mse"),
            "act_range": ("dynamic", "static"),
            "observer": tuple(OBSERVERS),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(
                    f"{name} is {getattr(self, name)!r}: choose from {', '.join(known)}"
                )


# ---------------------------------------------------------------------------------------- modules
class WeightQuantizer(nn.Module):
    """Fake-quantizes a weight (rows, N) on a symmetric grid, with noise in training.

    multiplied: a matrix, which integer kernels multiply by activations; a table is only looked up.
    clip: factors on the min-max range, 1 unless the range was searched; (rows, 1) or a scalar.
    """

    def __init__(self, config: QuantConfig, per_row: bool, multiplied: bool):
        super().__init__()
        self.bits, self.per_row = config.weight_bits, per_row
        self.noise, self.noise_block = config.noise, config.noise_block
        self.quant_min, self.quant_max = quant_range(self.bits, symmetric=True)
        if multiplied and config.grid == "portable" and config.act_bits == 8:
            self.quant_min = max(self.quant_min, -PORTABLE)
            self.quant_max = min(self.quant_max, PORTABLE)
        self.clips = False
        self.register_buffer("clip", torch.ones(()))
        # Set for weights from a file, which lie on their grid already: see packed.float_model.
        self.register_buffer("fixed_scale", None, persistent=False)

    def search_clip(self, weight: Tensor, one_factor: bool = False) -> None:
        grid = (self.quant_min, self.quant_max, True)
        self.clip = best_clip(weight.detach(), *grid, self.per_row, one_factor)
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
        where = None
        if self.training and self.noise < 1.0:
            if self.noise == 0.0:
                return weight
            where = noise_mask(weight, self.noise, self.noise_block)
        scale, zero_point = self.qparams(weight)
        return fake_quantize(
            weight, scale, zero_point, self.quant_min, self.quant_max, clips=self.clips, where=where
        )

    @torch.no_grad()
    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The integers of a weight, in float32, and their scale: (rows, 1) or ()."""
        scale, zero_point = self.qparams(weight)
        return quantize(weight, scale, zero_point, self.quant_min, self.quant_max), scale

    def extra_repr(self) -> str:
        return f"bits={self.bits}, per_row={self.per_row}, noise={self.noise}"


class LearnedScale(nn.Module):
    """Fake-quantizes a tensor on -2^(b-1) .. 2^(b-1) - 1 with one scale that is trained with it.

        Q(x) = s * round(clip(x / s, -2^(b-1), 2^(b-1) - 1))

    The gradient of s is q - x/s inside the grid and the bound outside, summed and divided by
    sqrt(N Q_max), so that it is of the size of a weight's (LSQ, Esser et al. 2020, sec. 2.1-2.2).
    s starts at max|x| / (2^(b-1) - 1): nothing is clipped (Yang et al. 2023). With search, at the
    scale below that of the least squared error: at 2 bits the largest number of a Gaussian core
    would round nearly all others to 0.

    NOTE: differs from the paper: log s is the parameter. s stays positive, and Adam, whose steps
    are as large as the learning rate, moves it by a fraction of itself. A step of 5e-4 would be a
    seventh of an 8-bit scale.
    """

    per_row = False

    def __init__(self, bits: int, x: Tensor, search: bool = False):
        super().__init__()
        self.bits = bits
        self.quant_min, self.quant_max = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self.register_buffer("fixed_scale", None, persistent=False)  # see WeightQuantizer
        if x.is_meta:  # only shapes are wanted
            self.log_scale = nn.Parameter(x.new_empty(()))
            return
        scale = x.detach().abs().amax().div(self.quant_max).clamp(min=SMALLEST_SCALE)
        if search:
            scale *= best_clip(x.detach(), self.quant_min, self.quant_max, True, per_row=False)
        self.log_scale = nn.Parameter(scale.log())

    def scale(self) -> Tensor:
        return self.log_scale.exp() if self.fixed_scale is None else self.fixed_scale

    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.scale().detach()
        return scale, torch.zeros_like(scale)

    def forward(self, x: Tensor) -> Tensor:
        return _LearnedStep.apply(x, self.scale(), self.quant_min, self.quant_max)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class ActQuantizer(nn.Module):
    """Fake-quantizes an activation (..., C) on an affine grid.

    Dynamic: the range is that of the tensor at hand, per token or for all of it.
    Static: one range, fixed by calibrate(); values outside are clipped.

    In evaluation it returns the Codes themselves, if there are quantized weights to multiply.
    """

    def __init__(self, config: QuantConfig):
        super().__init__()
        self.bits = config.act_bits
        self.static = config.act_range == "static"
        self.per_token = config.per_token and not self.static
        self.quant_min, self.quant_max = quant_range(self.bits, symmetric=False)
        self.returns_codes = config.weight_bits != 32
        self.observer = None  # set while calibrate() runs
        if self.static:
            self.register_buffer("scale", torch.full((), float("nan")))  # not calibrated yet
            self.register_buffer("zero_point", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor | Codes:
        x = x.float()  # under autocast it may come in bf16, too coarse for 256 steps
        if self.observer is not None:
            self.observer.observe(x.detach())
            return x
        scale, zero_point = self.qparams(x)
        grid = (scale, zero_point, self.quant_min, self.quant_max)
        if self.returns_codes and not self.training:
            return Codes(quantize(x.detach(), *grid), scale, zero_point)
        return fake_quantize(x, *grid, clips=self.static)

    @torch.no_grad()
    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point for x: scalars, or (..., 1) with one a token."""
        if self.static:
            return self.scale, self.zero_point
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


# ---------------------------------------------------------------------------------------- a model
@dataclass
class PrepareReport:
    """What prepare did: names with their number of weights."""

    replaced: dict[str, int]
    kept: dict[str, int]
    act_quantizers: int

    def __str__(self) -> str:
        done, left = sum(self.replaced.values()), sum(self.kept.values())
        kinds: dict[str, int] = {}
        for name, count in self.kept.items():
            known = ("log_scale", "head", "position", "token_type", "norm", "bias")
            kind = next((word for word in known if word in name), name)
            kinds[kind] = kinds.get(kind, 0) + count
        return (
            f"{len(self.replaced)} weight tensors quantized ({done:,} numbers, "
            f"{100 * done / (done + left):.2f} %), {self.act_quantizers} activation quantizers; "
            "float32: " + ", ".join(f"{kind} {count:,}" for kind, count in kinds.items())
        )


@torch.no_grad()
def prepare(model: nn.Module, config: QuantConfig) -> PrepareReport:
    """Make a float32 model fake-quantized, in place, and report what was replaced and what was
    left.

    Every nn.Linear outside config.keep becomes a QuantLinear that shares its weight and bias. A
    module that has an attribute `input_quantizer` feeds one tensor to several Linears (query, key,
    value): that tensor is quantized once, there. A module that has a `row_quantizer` is a table of
    embeddings. A module that has `cores` is a tensor train: each core gets a learned scale.

    Raises UserError if the model was prepared before.
    """
    if any(
        isinstance(module, (WeightQuantizer, LearnedScale)) or hasattr(module, "act_quantizer")
        for module in model.modules()
    ):
        raise UserError("this model is already prepared: quantize a copy of the float32 model")
    replaced: dict[str, int] = {}
    act_quantizers = 0

    def new_act() -> nn.Module:
        nonlocal act_quantizers
        if config.act_bits == 32:
            return nn.Identity()
        act_quantizers += 1
        return ActQuantizer(config)

    def new_weight(weight: Tensor, is_table: bool) -> nn.Module:
        if config.weight_bits == 32:
            return nn.Identity()
        quantizer = WeightQuantizer(config, is_table or config.per_channel, not is_table)
        if config.weight_range == "mse" and is_table:
            # One factor for all rows, found on some: which rows a batch brings is not known here.
            quantizer.search_clip(weight[:: max(1, len(weight) // 4096)], one_factor=True)
        elif config.weight_range == "mse":
            quantizer.search_clip(weight)
        return quantizer.to(weight.device)

    def visit(module: nn.Module, prefix: str) -> None:
        shared = hasattr(module, "input_quantizer")
        if shared:
            if any((prefix + name).startswith(config.keep) for name in ("query", "key", "value")):
                raise UserError(f"keep all of {prefix[:-1]}: its projections share their input")
            module.input_quantizer = new_act().to(next(module.parameters()).device)
        for name, child in list(module.named_children()):
            full = prefix + name
            if full.startswith(config.keep):
                continue
            if isinstance(child, nn.Linear):
                reads_shared = shared and name in ("query", "key", "value")
                act = nn.Identity() if reads_shared else new_act().to(child.weight.device)
                weight = new_weight(child.weight, is_table=False)
                setattr(module, name, QuantLinear(child, act, weight))
                if config.weight_bits != 32:
                    replaced[full + ".weight"] = child.weight.numel()
            elif hasattr(child, "row_quantizer"):
                child.row_quantizer = new_weight(child.weight, is_table=True)
                if config.weight_bits != 32:
                    replaced[full + ".weight"] = child.weight.numel()
            elif hasattr(child, "cores"):  # a tensor train
                if hasattr(child, "quantized"):  # that multiplies
                    reads_shared = shared and name in ("query", "key", "value")
                    acts = [nn.Identity() if reads_shared else new_act(), new_act()]
                    child = child.quantized(config, *acts).to(child.cores[0].device)
                    setattr(module, name, child)
                elif config.weight_bits != 32:
                    child.quantize_cores(config)
                if config.weight_bits != 32:
                    for k, core in enumerate(child.cores):
                        replaced[f"{full}.cores.{k}"] = core.numel()
            else:
                visit(child, full + ".")

    visit(model, "")
    model.train(model.training)  # new modules start in training mode: follow the model
    kept = {n: p.numel() for n, p in model.named_parameters() if n not in replaced}
    return PrepareReport(replaced, kept, act_quantizers)


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor | None]], observer: str
) -> None:
    """Fix the ranges of all static activation quantizers from a few batches (ids, mask).

    While observing, weights are quantized and activations are not. Padded positions would be
    observed too: give batches of equal length.
    """
    quantizers = [m for m in model.modules() if isinstance(m, ActQuantizer) and m.static]
    for quantizer in quantizers:
        quantizer.observer = OBSERVERS[observer]()
    was_training = model.training
    model.eval()
    try:
        for ids, mask in batches:
            model(ids, mask)
        for quantizer in quantizers:
            low, high = quantizer.observer.range(quantizer.quant_min, quantizer.quant_max, False)
            scale, zero_point = choose_qparams(
                low, high, quantizer.quant_min, quantizer.quant_max, symmetric=False
            )
            quantizer.scale.copy_(scale)
            quantizer.zero_point.copy_(zero_point)
    finally:
        for quantizer in quantizers:
            quantizer.observer = None
        model.train(was_training)

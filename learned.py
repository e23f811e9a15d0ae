"""Scales that are trained together with what they quantize: LSQ (Esser et al. 2020).

quant.py takes the scale of a tensor from its range. Here the scale s is a parameter with a gradient
of its own:

    Q(x) = s * round(clip(x / s, Q_min, Q_max))

    d Q / d s = q - x/s        inside the grid: how the rounding error grows with s
                Q_min or Q_max where x is clipped to it

which is summed over the tensor and divided by sqrt(N Q_max), N numbers sharing one scale, so that it
is of the size of a weight's gradient (LSQ, sec. 2.1-2.2). A scale can so trade what it clips for
finer steps, for the sake of the loss instead of the squared error. NOTE: differs for activations: N
counts the numbers of the batch, not of one example, so this gradient shrinks as batches grow (by
their square root); Adam divides that out again.

    LearnedScale          weights, and cores of tensor trains (Yang et al. 2023)
    LearnedActQuantizer   activations: a calibrated range, trained from there

NOTE: differs from the papers: log s is the parameter. s stays positive, and Adam, whose steps are as
large as the learning rate, moves it by a fraction of itself. A step of 5e-4 would be a seventh of an
8-bit scale.
"""

import torch
from torch import Tensor, nn

from quant import SMALLEST_SCALE, ActQuantizer, best_clip, min_max, quantize


class _LearnedStep(torch.autograd.Function):
    """Q(x) for one scale, or one a row; Q_min, Q_max as plain numbers."""

    @staticmethod
    def forward(ctx, x, scale, quant_min, quant_max):
        ratio = x * scale.reciprocal()
        codes = ratio.round().clamp_(quant_min, quant_max)
        ctx.save_for_backward(ratio, codes)
        ctx.grid, ctx.shape = (quant_min, quant_max), scale.shape
        return codes * scale

    @staticmethod
    def backward(ctx, grad):
        ratio, codes = ctx.saved_tensors
        inside = (ratio >= ctx.grid[0]) & (ratio <= ctx.grid[1])
        by_scale = torch.where(inside, codes - ratio, codes).mul_(grad)
        # Q_max is 0 where an activation is never positive.
        factor = (ratio.numel() / ctx.shape.numel() * max(ctx.grid[1], 1)) ** -0.5
        return grad * inside, by_scale.sum_to_size(ctx.shape) * factor, None, None


class LearnedScale(nn.Module):
    """Fake-quantizes a tensor on a grid whose scale is trained with it.

    x: the tensor, whose scale starts at
        start="minmax"  max|x| / Q_max: nothing is clipped (Yang et al. 2023)
        start="mse"     below that, at the least squared error: at 2 bits the largest number of a
                        Gaussian tensor would round nearly all others to 0
        start="lsq"     2 mean|x| / sqrt(Q_max) (Esser et al. 2020, sec. 2.1)
    per_row: a scale for each row of a matrix.
    grid: (Q_min, Q_max); as in the papers -2^(b-1) .. 2^(b-1) - 1 if it isn't given.
    """

    def __init__(
        self,
        bits: int,
        x: Tensor,
        start: str = "minmax",
        per_row: bool = False,
        grid: tuple[int, int] | None = None,
    ):
        super().__init__()
        self.bits, self.per_row = bits, per_row
        self.quant_min, self.quant_max = grid or (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        self.register_buffer("fixed_scale", None, persistent=False)  # see WeightQuantizer
        x = x.detach()
        if x.is_meta:  # only shapes are wanted
            self.log_scale = nn.Parameter(x.new_empty((len(x), 1) if per_row else ()))
            return
        low, high = min_max(x, per_row)
        scale = torch.maximum(-low, high).div(self.quant_max)
        if start == "mse":
            scale = scale * best_clip(x, self.quant_min, self.quant_max, True, per_row)
        if start == "lsq":
            mean = x.abs().mean(dim=-1, keepdim=True) if per_row else x.abs().mean()
            scale = 2 * mean / self.quant_max**0.5
        self.log_scale = nn.Parameter(scale.clamp(min=SMALLEST_SCALE).log())

    def scale(self) -> Tensor:
        return self.log_scale.exp() if self.fixed_scale is None else self.fixed_scale

    def forward(self, x: Tensor) -> Tensor:
        return _LearnedStep.apply(x, self.scale(), self.quant_min, self.quant_max)

    @torch.no_grad()
    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The integers of x, in float32, and their scale: (rows, 1) or ()."""
        scale = self.scale()
        return quantize(x, scale, torch.zeros_like(scale), self.quant_min, self.quant_max), scale

    def extra_repr(self) -> str:
        return f"bits={self.bits}, per_row={self.per_row}"


class LearnedActQuantizer(ActQuantizer):
    """An ActQuantizer whose range calibrate() starts and training moves.

    The scale is learned, the zero point stays: the range is stretched or shrunk around 0. So it
    learns where to clip, as PACT does (Choi et al. 2018), and, since rounding error counts too, how
    finely to round.
    """

    def make_range(self) -> None:
        self.log_step = nn.Parameter(torch.full((), float("nan")))  # not calibrated yet
        self.register_buffer("zero_point", torch.zeros(()))

    def set_range(self, scale: Tensor, zero_point: Tensor) -> None:
        self.log_step.copy_(scale.log())
        self.zero_point.copy_(zero_point)

    def static_range(self) -> tuple[Tensor, Tensor]:
        return self.log_step.exp(), self.zero_point

    def rounded(self, x: Tensor) -> Tensor:
        zero_point = int(self.zero_point)
        grid = self.quant_min - zero_point, self.quant_max - zero_point
        return _LearnedStep.apply(x, self.log_step.exp(), *grid)

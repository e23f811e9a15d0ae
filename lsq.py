"""Scales that are trained together with what they quantize: LSQ (Esser et al. 2020).

quant.py takes the scale of a tensor from its range. Here the scale s is a parameter with a gradient of its own:

    Q(x) = s * round(clip(x / s, Q_min, Q_max))

    d Q / d s = q - x/s        inside the grid: how the rounding error grows with s
                Q_min or Q_max where x is clipped to it

This is summed over the N elements that share a scale and divided by sqrt(N Q_max), which makes it as large as the
gradient of a weight (LSQ, sec. 2.1-2.2). A scale can thus trade clipping for finer steps by what the loss gains, not
by the squared error. NOTE: differs for activations: N counts the elements of the batch, not of one example, so this
gradient shrinks with the square root of the batch size; Adam divides that out again.

NOTE: differs from the papers: log s is the parameter. So s stays positive, and Adam, whose steps are as large as the
learning rate, changes it by a fraction of itself. A step of 5e-4 in s
would change a typical 8-bit scale (0.0035) by 14 %.
"""

import torch
from torch import Tensor, nn

from quant import SMALLEST_SCALE, ActQuantizer, QuantConfig, WeightQuantizer, best_clip, min_max


class _LearnedStep(torch.autograd.Function):
    """Q(x) for one scale or one per row.  largest: Q_max, at least 1.  All three are numbers, or tensors of one, which
    the host of a GPU does not wait for.
    """

    @staticmethod
    def forward(ctx, x, scale, quant_min, quant_max, largest):
        ratio = x * scale.reciprocal()
        codes = ratio.round().clamp_(quant_min, quant_max)
        ctx.save_for_backward(ratio, codes)
        ctx.grid, ctx.largest, ctx.shape = (quant_min, quant_max), largest, scale.shape
        return codes * scale

    @staticmethod
    def backward(ctx, grad):
        ratio, codes = ctx.saved_tensors
        inside = (ratio >= ctx.grid[0]) & (ratio <= ctx.grid[1])
        by_scale = torch.where(inside, codes - ratio, codes).mul_(grad)
        factor = (ratio.numel() / ctx.shape.numel() * ctx.largest) ** -0.5
        return grad * inside, by_scale.sum_to_size(ctx.shape) * factor, None, None, None


class LearnedScale(WeightQuantizer):
    """Fake-quantizes a weight on a grid whose scale is trained with it. Arguments: see quant.WeightQuantizer.
    Quantization noise does not apply: all elements are always quantized.

    config.weight_range says where the scale starts:
        "minmax"  max|x| / Q_max: nothing is clipped (Yang et al. 2023)
        "mse"     the least squared error: at 2 bits the largest element of a Gaussian tensor would
                  round nearly all others to 0
        "lsq"     2 mean|x| / sqrt(Q_max) (Esser et al. 2020, sec. 2.1)

    The grid is -2^(b-1) .. 2^(b-1) - 1, as in the papers, but for 8-bit matrices that of quant.py.
    """

    def __init__(self, config: QuantConfig, weight: Tensor, per_row: bool = False, multiplied: bool = False):
        super().__init__(config, weight, per_row, multiplied)
        if not multiplied or self.bits < 8:
            self.quant_min, self.quant_max = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        weight = weight.detach()
        low, high = min_max(weight, per_row)
        scale = torch.maximum(-low, high).div(self.quant_max)
        if config.weight_range == "mse":
            scale = scale * best_clip(weight, self.quant_min, self.quant_max, per_row)
        if config.weight_range == "lsq":
            mean = weight.abs().mean(dim=-1, keepdim=True) if per_row else weight.abs().mean()
            scale = 2 * mean / self.quant_max**0.5
        self.log_scale = nn.Parameter(scale.clamp(min=SMALLEST_SCALE).log())

    def scale(self, weight: Tensor) -> Tensor:
        return self.log_scale.exp()

    def forward(self, weight: Tensor) -> Tensor:
        return _LearnedStep.apply(weight, self.scale(weight), self.quant_min, self.quant_max, max(self.quant_max, 1))


class LearnedActQuantizer(ActQuantizer):
    """An ActQuantizer whose range is set by calibrate() and trained from there.

    The scale is learned and the zero point stays: the range is stretched or shrunk around 0. It learns where to clip,
    as in PACT (Choi et al. 2018), and how finely to round.
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
        least, most = self.quant_min - self.zero_point, self.quant_max - self.zero_point
        # Q_max is 0 for an activation that is never positive.
        return _LearnedStep.apply(x, self.log_step.exp(), least, most, most.double().clamp(min=1.0))

"""Repairs: what a few hundred unlabelled sentences can still do for a quantized model, without training it.

    python train.py --task xnli --bits 3 --methods fp32 ptq ptq+gptq ptq+gptq+norm

A repair changes a quantized model in place and reads the batches that also set static ranges: sequences without
padding, and no labels. No gradient goes through more than one layer. It works from the bottom up, block by block
(embeddings, attention, ffn, attention, ...), on what the *quantized* model computes there: the repair of a block is in
effect for the next one, which so makes up for errors of the blocks below.

    keys         centres the keys of attention, which no attention depends on
    gptq         chooses which way each weight is rounded, up or down
    norm         chooses gain and bias of each norm
    reconstruct  trains all that a layer has, for a few seconds

REPAIRS is the order in which they run. A training may follow: sdq+gptq is SDQ that starts from the repaired weights.
The embedding table is left alone: its rows are looked up, so no later weight of the same row could make up for one.
"""

import copy
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batches import Batch
from kit import parallel
from kit.common import UserError
from model import Attention, Embeddings, FeedForward, Model
from prepare import QKV
from quant import ActQuantizer, Codes, QuantLinear, WeightQuantizer, dequantize

DAMPING = 0.01  # of the mean of H's diagonal, added to it (GPTQ, sec. 3.3)
STEPS, RATE = 100, 3e-4  # of Adam in each layer of reconstruct; the rate falls linearly to 0
COLUMNS = 128  # that are rounded before the rest of the matrix is updated
PRODUCTS = {Attention: (QKV, ("output",)), FeedForward: (("up",), ("down",))}  # of a block, in order; by what they read


# ------------------------------------------------------------------------------- block by block
def blocks(model: Model) -> Iterator[nn.Module]:
    """Embeddings, attention and ffn of each layer: each ends with a norm, whose output the next one reads."""
    yield model.encoder.embeddings
    for layer in model.encoder.layers:
        yield layer.attention
        yield layer.ffn


def run(block: nn.Module, state: Batch | Tensor) -> Tensor:
    """What a block returns, (B, T, C). state: what it reads: a batch without padding, then (B, T, C)."""
    if isinstance(block, Embeddings):
        return block(state.ids, state.types)
    return block(state, None, {}) if isinstance(block, Attention) else block(state)


class Read(Exception):
    """Carries what a module reads out of its block, of which nothing more is computed."""


def read_by(module: nn.Module, block: nn.Module, states: list) -> Iterator[Tensor | Codes]:
    """What a module of a block reads, state by state."""

    def stop(_, inputs: tuple) -> None:
        raise Read(inputs[0])

    handle = module.register_forward_pre_hook(stop)
    for state in states:
        try:
            run(block, state)
        except Read as read:
            (inputs,) = read.args
        yield inputs
    handle.remove()


# ------------------------------------------------------------------------------------------ keys
@torch.no_grad()
def keys(student: Model, teacher: Model, batches: list[Batch]) -> None:
    """The bias of the keys with which their mean is 0, so that a grid (--attention-bits) covers less (after the
    "smoothing" of SageAttention, Zhang et al. 2025). The teacher is not read.

    A bias b adds q b to all scores of a query q, and softmax(scores + constant) = softmax(scores): in floats no map
    changes. The scores do, so that a student does not start from here with the loss of scores.
    """
    states = batches
    for block in blocks(student):
        if isinstance(block, Attention):
            key = torch.cat([block.key(x).flatten(0, -2) for x in [*read_by(block.key, block, states)]])
            mean, quantizer = key.mean(dim=0), block.key_quantizer
            block.key.bias.sub_(mean)
            if getattr(quantizer, "static", False):
                quantizer.set_range(*quantizer.covering(*(key - mean).aminmax()))
        states = [run(block, x) for x in states]


# ------------------------------------------------------------------------------------------ gptq
def round_columns(weight: Tensor, H: Tensor, scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Integers of a weight (rows, N), chosen for the least error of its product (GPTQ, Frantar et al. 2023).

    H: (N, N), the sum of x x^T over the inputs x of the product. So (w - q) H (w - q)^T is the squared error of a
    row's output.  scale: of the grid, (rows, 1) or ().

    One column is rounded after the other. Each time the columns that are not rounded yet move to where the error of
    the output is least again. With H^-1 of these columns, j the first one,

        e = (w_j - q_j) / H^-1[j, j]          w_k -= e H^-1[j, k]   for k > j

    and the rows of U, H^-1 = U^T U, are these H^-1[j, :] up to a factor, for all j at once: U does not change.

    >>> H, one = torch.tensor([[1.0, 0.9], [0.9, 1.0]]), torch.tensor(1.0)
    >>> round_columns(torch.tensor([[0.4, 0.4]]), H, one, -1, 1)   # 0 for 0.4; so 0.4 + 0.36 is left for the other
    tensor([[0., 1.]])
    """
    W, scale, stop = weight.double().clone(), scale.double().flatten(), 0
    H = H.double() + torch.eye(len(H), device=H.device) * DAMPING * H.diagonal().mean()
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    codes = torch.empty_like(W)
    while stop < len(H):
        start, stop = stop, min(stop + COLUMNS, len(H))
        errors = torch.empty_like(W[:, start:stop])
        for j in range(start, stop):
            codes[:, j] = (W[:, j] / scale).round_().clamp_(quant_min, quant_max)
            errors[:, j - start] = (W[:, j] - codes[:, j] * scale) / U[j, j]
            W[:, j:stop] -= torch.outer(errors[:, j - start], U[j, j:stop])
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return codes.float()


@torch.no_grad()
def gptq(student: Model, teacher: Model, batches: list[Batch]) -> None:
    """Second-order rounding of all matrices, on the scales that they have. The teacher is not read.

    NOTE: differs from the authors' code: a weight whose input is always 0 here is rounded to the nearest integer, not set
    to 0, since other languages may use it. Weights far beyond the grid are first clipped to a step beyond it: the others
    make up for a rounding error, not for many steps of clipping, with which they would fit the calibration text too
    closely (docs/results-repairs.md).
    """
    states, rounds = batches, False
    for block in blocks(student):
        for names in PRODUCTS.get(type(block), ()):
            layers = [layer for name in names if isinstance(layer := getattr(block, name), QuantLinear)]
            if not layers:
                continue
            H = torch.zeros(2 * [layers[0].in_features], device=layers[0].weight.device)
            for x in read_by(layers[0], block, states):
                x = layers[0].act_quantizer(x)  # query, key and value read Codes, and have none
                x = (dequantize(*x) if isinstance(x, Codes) else x).flatten(0, -2)
                H.addmm_(x.T, x)
            scales = [layer.weight_quantizer.codes(layer.weight)[1] for layer in layers]
            rows, grid = [len(layer.weight) for layer in layers], layers[0].weight_quantizer
            of_rows = torch.cat([scale.expand(count, 1) for scale, count in zip(scales, rows, strict=True)])
            low, high = grid.quant_min, grid.quant_max
            weight = torch.cat([layer.weight for layer in layers]).clamp((low - 1) * of_rows, (high + 1) * of_rows)
            codes = round_columns(weight, H, of_rows, low, high).split(rows)
            rounds = True
            for layer, own, scale in zip(layers, codes, scales, strict=True):
                quantizer = layer.weight_quantizer
                quantizer.settle(layer.weight, own, scale)
                found = quantizer.codes(layer.weight)[0]
                assert torch.equal(found, own), f"{type(quantizer).__name__}.settle: other codes"
        states = [run(block, x) for x in states]
    if not rounds:
        raise UserError("gptq rounds matrices of Linear layers, which this model does not have")


# ------------------------------------------------------------------------------------------ norm
def fit_lines(x: Tensor, y: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and intercept (C) of the least squared error of slope * x + intercept against y, channel by channel.

    x, y: (N, C).  old: slopes of channels in which x is constant, so that any would do.

    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> fit_lines(x, 3 * x + 1, old=torch.ones(1))
    (tensor([3.], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    x, y = x.double(), y.double()
    from_mean = x - x.mean(dim=0)
    variance = from_mean.square().mean(dim=0)
    slope = torch.where(variance > 1e-12, (from_mean * y).mean(dim=0) / variance, old.double())
    return slope, y.mean(dim=0) - slope * x.mean(dim=0)


@torch.no_grad()
def norm(student: Model, teacher: Model, batches: list[Batch]) -> None:
    """Gain and bias of each norm for the least squared error against the teacher's output of that norm, after Norm
    Tweaking (Li et al. 2024).

    NOTE: differs: they take a step of Adam on the difference of means and variances. Here the norm comes last in its
    block (post-LN), so its output is a line in each channel, gain * z + bias, z being normalized. That has an optimum
    in closed form.
    """
    read = wanted = batches
    for block, original in zip(blocks(student), blocks(teacher), strict=True):
        wanted = [run(original, x) for x in wanted]
        z = (F.layer_norm(x, x.shape[-1:], eps=block.norm.eps) for x in read_by(block.norm, block, read))
        found, targets = (torch.cat([x.flatten(0, -2) for x in some]) for some in (z, wanted))
        gain, bias = fit_lines(found, targets, block.norm.weight)
        block.norm.weight.copy_(gain)
        block.norm.bias.copy_(bias)
        read = [run(block, x) for x in read]


# ----------------------------------------------------------------------------------- reconstruct
def reconstruct(student: Model, teacher: Model, batches: list[Batch]) -> None:
    """Train one layer after the other to return what the teacher's returns, after MREM (Bai et al. 2022).

    Each fourth batch is held out: the parameters with the least error there are kept, those at the start included.
    NOTE: differs: modules of one layer, not of several, and no teacher forcing.
    """
    held_out, others = batches[::4], [batch for i, batch in enumerate(batches) if i % 4]
    sets = held_out, others or held_out
    with torch.no_grad():
        read, wanted = ([[run(m.encoder.embeddings, b) for b in some] for some in sets] for m in (student, teacher))
    for layer, original in zip(student.encoder.layers, teacher.encoder.layers, strict=True):
        with torch.no_grad():
            wanted = [[original(x, None, {}) for x in some] for some in wanted]
        train_layer(layer, *(list(zip(*some, strict=True)) for some in zip(read, wanted, strict=True)))
        with torch.no_grad():
            read = [[layer(x, None, {}) for x in some] for some in read]


def train_layer(layer: nn.Module, held_out: list[tuple[Tensor, Tensor]], pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Minimize the squared error of a layer, quantized as in evaluation.  held_out, pairs: (input, target)."""

    @torch.no_grad()
    def error() -> float:
        layer.eval()
        return sum(float((layer(x, None, {}) - target).square().sum()) for x, target in held_out)

    quantizers = [module for module in layer.modules() if isinstance(module, (WeightQuantizer, ActQuantizer))]
    noise = {module: module.noise for module in quantizers if isinstance(module, WeightQuantizer)}
    optimizer = torch.optim.Adam(layer.parameters())
    least, best = error(), copy.deepcopy(layer.state_dict())
    for quantizer in noise:
        quantizer.noise = 1.0
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        x, target = pairs[step % len(pairs)]
        for quantizer in quantizers:  # not the layer: dropout stays off
            quantizer.train()
        F.mse_loss(layer(x, None, {}), target).backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 10 == 0 and (found := error()) < least:
            least, best = found, copy.deepcopy(layer.state_dict())
    layer.load_state_dict(best)
    for quantizer, before in noise.items():
        quantizer.noise = before
    layer.eval()


# ------------------------------------------------------------------------------------- the table
class Repair(NamedTuple):
    function: Callable[[Model, Model, list[Batch]], None]  # (student, teacher, batches), in place
    help: str
    needs_scales: bool = False  # of quantized matrices: no float32, product quantization or tensor trains


REPAIRS = {  # in the order of work
    "keys": Repair(keys, "centres keys, for --attention-bits below 8 (arXiv 2410.02367)"),
    "gptq": Repair(gptq, "rounds columns in turn, the rest makes up for each (arXiv 2210.17323)", needs_scales=True),
    "norm": Repair(norm, "fits the gain and bias of norms to the teacher's (arXiv 2309.02784)"),
    "reconstruct": Repair(reconstruct, "trains layer by layer, alone (arXiv 2109.15082)", needs_scales=True),
}


def repair(method: str, student: Model, teacher: Model, batches: list[Batch]) -> float:
    """Apply the repairs that a method such as ptq+gptq+norm names, in place. Returns the seconds."""
    total = 0.0
    for name in method.split("+")[1:]:
        started = time.monotonic()
        REPAIRS[name].function(student, teacher, batches)
        parallel.same(student)
        total += (seconds := time.monotonic() - started)
        print(f"{method}: {name} took {seconds:.1f} s")
    return total

"""quant.py and learned.py put into a model: which tensor gets which quantizer.

`prepare(model, QuantConfig())` replaces the encoder's Linear layers by QuantLinear and gives the word
embeddings a row quantizer. Embedding rows are quantized after they are gathered: with one scale a row
the numbers are the same as for the whole table, and XLM-R's table is 250,002 rows of which a batch
uses a few hundred. `calibrate` fixes the ranges of static activation quantizers.

In float32: biases, norms, position and type embeddings, the head (together 0.4 % of XLM-R base).

    student = copy.deepcopy(teacher)
    print(prepare(student, QuantConfig(weight_bits=2, weights="ternary")))
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data import UserError
from learned import LearnedActQuantizer, LearnedScale
from quant import (
    OBSERVERS,
    ActQuantizer,
    QuantConfig,
    QuantLinear,
    TernaryQuantizer,
    WeightQuantizer,
    choose_qparams,
    integer_limits,
)


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
            known = ("log_scale", "log_step", "head", "position", "token_type", "norm", "bias")
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
    value): that tensor is quantized once, there. What the two products inside it read is quantized
    with config.attention_bits. A module that has a `row_quantizer` is a table of embeddings. A
    module that has `cores` is a tensor train: each core gets a learned scale.

    Raises UserError if the model was prepared before.
    """
    if any(
        isinstance(module, (WeightQuantizer, LearnedScale, ActQuantizer))
        or hasattr(module, "act_quantizer")
        for module in model.modules()
    ):
        raise UserError("this model is already prepared: quantize a copy of the float32 model")
    replaced: dict[str, int] = {}
    act_quantizers = 0

    def new_act(inside: bool = False) -> nn.Module:
        nonlocal act_quantizers
        if (config.attention_bits if inside else config.act_bits) == 32:
            return nn.Identity()
        act_quantizers += 1
        kind = LearnedActQuantizer if config.act_range == "learned" else ActQuantizer
        return kind(config, inside)

    def new_weight(weight: Tensor, is_table: bool) -> nn.Module:
        if config.weight_bits == 32:
            return nn.Identity()
        per_row = is_table or config.per_channel
        if config.weights == "lsq" and not is_table:
            grid = integer_limits(config, multiplied=True) if config.weight_bits == 8 else None
            return LearnedScale(config.weight_bits, weight, config.weight_range, per_row, grid)
        # NOTE: a table's rows keep scales of their own, also where those of matrices are learned.
        if config.weights == "ternary" or (config.weights == "lsq" and config.weight_bits == 2):
            return TernaryQuantizer(config, per_row, not is_table).to(weight.device)
        quantizer = WeightQuantizer(config, per_row, not is_table)
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
            device = next(module.parameters()).device
            module.input_quantizer = new_act().to(device)
            for part in ("query", "key", "value", "map"):
                setattr(module, part + "_quantizer", new_act(inside=True).to(device))
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
    model: nn.Module, batches: Iterable[tuple[Tensor | None, ...]], observer: str
) -> None:
    """Fix the ranges of all static activation quantizers from a few batches: (ids, mask), or
    (ids, mask, types).

    While observing, weights are quantized and activations are not. Padded positions would be
    observed too: give batches of equal length.
    """
    quantizers = [m for m in model.modules() if isinstance(m, ActQuantizer) and m.static]
    for quantizer in quantizers:
        quantizer.observer = OBSERVERS[observer]()
    was_training = model.training
    model.eval()
    try:
        for ids, mask, *types in batches:
            model(ids, mask, types=types[0] if types else None)
        for quantizer in quantizers:
            low, high = quantizer.observer.range(quantizer.quant_min, quantizer.quant_max, False)
            scale, zero_point = choose_qparams(
                low, high, quantizer.quant_min, quantizer.quant_max, symmetric=False
            )
            quantizer.set_range(scale, zero_point)
    finally:
        for quantizer in quantizers:
            quantizer.observer = None
        model.train(was_training)

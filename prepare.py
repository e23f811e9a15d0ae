"""Quantizers into a model: which tensor gets which quantizer, in one table and one walk.

`prepare(model, QuantConfig())` replaces the encoder's Linear layers by QuantLinear and gives the word embeddings a row
quantizer. Embedding rows are quantized after they are gathered: with one scale per row the result is the same as for
the whole table, and XLM-R's table has 250,002 rows, of which a batch uses a few hundred. `calibrate` sets the ranges
of static activation quantizers.

Biases, norms, position and type embeddings and the head stay in float32 (together 0.4 % of XLM-R base).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lsq import LearnedActQuantizer, LearnedScale
from model import Attention, WordEmbedding
from pq import ProductQuantizer
from quant import ActQuantizer, QuantConfig, QuantLinear, TernaryQuantizer, UniformQuantizer, check_codes
from tt import QuantTTLinear, TTConfig, TTLinear, TTMEmbedding


@dataclass(frozen=True)
class WeightKind:
    """A row of WEIGHTS: the quantizer of matrices, that of tables, and what QuantConfig may ask of it."""

    matrix: type[nn.Module]  # called with the arguments of quant.WeightQuantizer
    table: Callable[..., nn.Module]
    help: str
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    ranges: tuple[str, ...] = ("minmax", "mse")  # of weight_range
    noise: float = 0.5  # default of --noise


def table_quantizer(config: QuantConfig, *arguments) -> nn.Module:
    """The rows of a table keep a scale of their own range, also where those of matrices are learned."""
    return (TernaryQuantizer if config.weight_bits == 2 else UniformQuantizer)(config, *arguments)


WEIGHTS = {  # QuantConfig.weights
    "uniform": WeightKind(UniformQuantizer, UniformQuantizer, "equal steps"),
    "ternary": WeightKind(TernaryQuantizer, TernaryQuantizer, "-a, 0, a with 2 bits", bits=(2,), ranges=("minmax",)),
    "lsq": WeightKind(LearnedScale, table_quantizer, "scales are trained", ranges=("lsq", "minmax", "mse")),
    "pq": WeightKind(ProductQuantizer, ProductQuantizer, "a byte for 4 or 8 weights", (8,), ("minmax",), noise=0.1),
}
CHOICES = {  # field of QuantConfig -> its values
    **dict.fromkeys(("weight_bits", "act_bits", "attention_bits"), (2, 3, 4, 5, 6, 7, 8, 32)),
    "grid": ("portable", "full"),
    "weights": WEIGHTS,
    "act_range": ("dynamic", "static", "learned"),
}
QKV = ("query", "key", "value")


def check_quant(config: QuantConfig) -> None:
    """Raises ValueError for a QuantConfig that can't be computed, with its fields as name=value."""
    for name, known in CHOICES.items():
        if (value := getattr(config, name)) not in known:
            words = "2 to 8, or 32 for no quantization" if name.endswith("bits") else f"from {', '.join(known)}"
            raise ValueError(f"{name}={value!r}: choose {words}")
    if not 0.0 <= config.noise <= 1.0:
        raise ValueError(f"noise={config.noise}: choose a fraction from 0 to 1")
    row, which, bits = WEIGHTS[config.weights], f"weights={config.weights}", config.weight_bits
    if bits == 32 and config.weights != "uniform":
        raise ValueError(f"{which} needs quantized weights: weight_bits=2 to 8")
    if bits not in (*row.bits, 32):
        known = " or ".join(map(str, row.bits))
        raise ValueError(f"{which} has {known} bits, not weight_bits={bits}: choose those, or weights=uniform")
    if config.weight_range not in row.ranges:
        raise ValueError(f"weight_range={config.weight_range!r}: {which} has {', '.join(row.ranges)}")


def default_keep(tt: TTConfig | None) -> tuple[str, ...]:
    """What stays in float32: the head. Beside tensor trains it would be large, so it is quantized."""
    return () if tt else QuantConfig.keep


@torch.no_grad()
def prepare(model: nn.Module, config: QuantConfig) -> str:
    """Make a float32 model fake-quantized, in place. Returns a line that says what was done.

    Modules whose names begin with an entry of config.keep are skipped. Of the others

        nn.Linear      becomes a QuantLinear, which shares weight and bias
        WordEmbedding  gets a row quantizer
        Attention      quantizes what query, key and value read once; with config.attention_bits what its two
                       products read is quantized, too
        TTLinear       becomes two quantized products; each core gets a learned scale
        TTMEmbedding   gets a learned scale for each core

    Raises ValueError for a config that can't be computed and for a model that was prepared before.
    """
    check_quant(config)
    if any(isinstance(module, (QuantLinear, QuantTTLinear)) for module in model.modules()):
        raise ValueError("this model is already prepared: quantize a copy of the float32 model")
    modules = {name: module for name, module in model.named_modules() if name and not name.startswith(config.keep)}
    weights = []
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        shares_input = leaf in QKV and isinstance(modules.get(parent), Attention)
        input_act = nn.Identity() if shares_input else new_act(config)
        if isinstance(module, Attention):
            if any(f"{name}.{part}".startswith(config.keep) for part in QKV):
                raise ValueError(f"keep all of {name}: its projections share their input")
            module.input_quantizer = input_act
            for part in (*QKV, "map"):
                setattr(module, part + "_quantizer", new_act(config, inside=True))
        elif isinstance(module, nn.Linear):
            model.set_submodule(name, QuantLinear(module, input_act, new_weight(config, module.weight)))
            weights.append(module.weight)
        elif isinstance(module, WordEmbedding):
            module.row_quantizer = new_weight(config, module.weight, is_table=True)
            weights.append(module.weight)
        elif isinstance(module, TTLinear):
            model.set_submodule(name, QuantTTLinear(module, config, input_act, new_act(config)))
            weights += module.cores
        elif isinstance(module, TTMEmbedding):
            if config.weight_bits != 32:
                module.quantize_cores(config)
            weights += module.cores
    model.to(next(model.parameters()).device)
    model.train(model.training)  # new modules start in training mode: follow the model
    acts = sum(isinstance(module, ActQuantizer) for module in model.modules())
    weights = [] if config.weight_bits == 32 else weights
    done, total = (sum(p.numel() for p in parameters) for parameters in (weights, model.parameters()))
    share = f"{done:,} of {total:,} parameters, {100 * done / total:.2f} %"
    return f"{len(weights)} weight tensors quantized ({share}), {acts} activation quantizers"


def new_act(config: QuantConfig, inside: bool = False) -> nn.Module:
    if (config.attention_bits if inside else config.act_bits) == 32:
        return nn.Identity()
    return (LearnedActQuantizer if config.act_range == "learned" else ActQuantizer)(config, inside)


def new_weight(config: QuantConfig, weight: Tensor, is_table: bool = False) -> nn.Module:
    if config.weight_bits == 32:
        return nn.Identity()
    kind = WEIGHTS[config.weights].table if is_table else WEIGHTS[config.weights].matrix
    quantizer = kind(config, weight, is_table or config.per_channel, not is_table).to(weight.device)
    if not weight.is_meta and not isinstance(quantizer, ProductQuantizer):  # which has no codes before its stage
        check_codes(quantizer, quantizer.codes(weight[:4096] if is_table else weight)[0])
    return quantizer


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[tuple[Tensor | None, ...]]) -> None:
    """Set the ranges of all static activation quantizers from batches of (ids, mask) or (ids, mask, types).

    While observing, weights are quantized and activations are not. Padded positions would be observed too: give
    batches of equal length.
    """
    quantizers = [m for m in model.modules() if isinstance(m, ActQuantizer) and m.static]
    for quantizer in quantizers:
        quantizer.seen = ()
    was_training = model.training
    model.eval()
    for ids, mask, *types in batches:
        model(ids, mask, types=types[0] if types else None)
    for quantizer in quantizers:
        quantizer.set_range(*quantizer.covering(*quantizer.seen))
        quantizer.seen = None
    model.train(was_training)

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
from pq import ProductQuantizer
from quant import (
    OBSERVERS,
    ActQuantizer,
    QuantConfig,
    QuantLinear,
    TernaryQuantizer,
    UniformQuantizer,
    WeightQuantizer,
    check_codes,
    choose_qparams,
)


@dataclass(frozen=True)
class WeightKind:
    """A row of WEIGHTS: the quantizer of matrices, that of tables, and what QuantConfig may ask of it."""

    matrix: type[nn.Module]  # called with the arguments of quant.WeightQuantizer
    table: Callable[..., nn.Module]
    help: str
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    ranges: tuple[str, ...] = ("minmax", "mse")  # of weight_range; the first is the default
    noise: float = 0.5  # default of --noise


def table_quantizer(config: QuantConfig, *arguments) -> WeightQuantizer:
    """The rows of a table keep a scale of their own range, also where those of matrices are learned."""
    return (TernaryQuantizer if config.weight_bits == 2 else UniformQuantizer)(config, *arguments)


WEIGHTS = {  # QuantConfig.weights
    "uniform": WeightKind(UniformQuantizer, UniformQuantizer, "equal steps up to the largest weight"),
    "ternary": WeightKind(TernaryQuantizer, TernaryQuantizer, "-a, 0, a with 2 bits", bits=(2,), ranges=("minmax",)),
    "lsq": WeightKind(LearnedScale, table_quantizer, "scales are trained", ranges=("lsq", "minmax", "mse")),
    "pq": WeightKind(
        ProductQuantizer, ProductQuantizer, "a byte for 4 or 8 weights", bits=(8,), ranges=("minmax",), noise=0.1
    ),
}
QUANT_CHOICES = {
    "grid": ("portable", "full"),
    "weights": WEIGHTS,
    "act_range": ("dynamic", "static", "learned"),
    "observer": OBSERVERS,
}


def check_quant(config: QuantConfig) -> None:
    """Raises ValueError for a QuantConfig that can't be computed, with its fields as name=value."""
    for name in ("weight_bits", "act_bits", "attention_bits"):
        bits = getattr(config, name)
        if not isinstance(bits, int) or (bits != 32 and not 2 <= bits <= 8):
            raise ValueError(f"{name}={bits}: choose 2 to 8, or 32 for no quantization")
    for name, known in QUANT_CHOICES.items():
        if getattr(config, name) not in known:
            raise ValueError(f"{name}={getattr(config, name)!r}: choose from {', '.join(known)}")
    if not 0.0 <= config.noise <= 1.0:
        raise ValueError(f"noise={config.noise}: choose a fraction from 0 to 1")
    if config.noise_block < 1:
        raise ValueError(f"noise_block={config.noise_block}: choose 1 or more")
    row, bits = WEIGHTS[config.weights], config.weight_bits
    if bits == 32 and config.weights != "uniform":
        raise ValueError(f"weights={config.weights} needs quantized weights: weight_bits=2 to 8")
    if bits not in (*row.bits, 32):
        known = " or ".join(map(str, row.bits))
        raise ValueError(
            f"weights={config.weights} has {known} bits, not weight_bits={bits}: choose those, or weights=uniform"
        )
    if config.weight_range not in row.ranges:
        raise ValueError(f"weight_range={config.weight_range!r}: weights={config.weights} has {', '.join(row.ranges)}")


def default_keep(tt) -> tuple[str, ...]:
    """What stays in float32: the head. Beside tensor trains it would be large, so it is quantized."""
    return () if tt else QuantConfig.keep


@dataclass
class PrepareReport:
    """What prepare did: names of weights with their number of parameters."""

    replaced: dict[str, int]
    kept: dict[str, int]
    act_quantizers: int

    def __str__(self) -> str:
        done, all_of_them = sum(self.replaced.values()), sum(self.replaced.values()) + sum(self.kept.values())
        return (
            f"{len(self.replaced)} weight tensors quantized ({done:,} of {all_of_them:,} parameters, "
            f"{100 * done / all_of_them:.2f} %), {self.act_quantizers} activation quantizers"
        )


@torch.no_grad()
def prepare(model: nn.Module, config: QuantConfig) -> PrepareReport:
    """Make a float32 model fake-quantized, in place. Reports what was replaced and what was kept.

    Modules are recognized by their attributes; those whose names begin with an entry of config.keep are skipped:

        nn.Linear        becomes a QuantLinear, which shares weight and bias
        row_quantizer    a table of embeddings: its rows are quantized
        input_quantizer  an attention: query, key and value read one tensor, which is quantized once,
                         here; with config.attention_bits what its two products read is quantized, too
        cores            a tensor train (tt.py): each core gets a learned scale; one that multiplies
                         (`quantized`) becomes two quantized products

    Raises ValueError for a config that can't be computed and for a model that was prepared before.
    """
    check_quant(config)
    kinds = (WeightQuantizer, ActQuantizer)
    if any(isinstance(m, kinds) or hasattr(m, "act_quantizer") for m in model.modules()):
        raise ValueError("this model is already prepared: quantize a copy of the float32 model")
    row, quantizes = WEIGHTS[config.weights], config.weight_bits != 32
    replaced: dict[str, int] = {}
    act_quantizers = 0

    def new_act(inside: bool = False) -> nn.Module:
        nonlocal act_quantizers
        if (config.attention_bits if inside else config.act_bits) == 32:
            return nn.Identity()
        act_quantizers += 1
        kind = LearnedActQuantizer if config.act_range == "learned" else ActQuantizer
        return kind(config, inside)

    def new_weight(name: str, weight: Tensor, is_table: bool) -> nn.Module:
        if not quantizes:
            return nn.Identity()
        replaced[name + ".weight"] = weight.numel()
        kind = row.table if is_table else row.matrix
        quantizer = kind(config, weight, is_table or config.per_channel, not is_table)
        if not weight.is_meta and not isinstance(quantizer, ProductQuantizer):  # which has no codes before its stage
            check_codes(quantizer, quantizer.codes(weight[:4096] if is_table else weight)[0])
        return quantizer

    for name, module in list(model.named_modules()):
        if not name or name.startswith(config.keep):
            continue
        parent, _, leaf = name.rpartition(".")
        parts = ("query", "key", "value")
        shares = leaf in parts and hasattr(model.get_submodule(parent), "input_quantizer")
        device = next((p.device for p in module.parameters()), None)
        if hasattr(module, "input_quantizer"):
            if any(f"{name}.{part}".startswith(config.keep) for part in parts):
                raise ValueError(f"keep all of {name}: its projections share their input")
            module.input_quantizer = new_act().to(device)
            for part in (*parts, "map"):
                setattr(module, part + "_quantizer", new_act(inside=True).to(device))
        elif isinstance(module, nn.Linear):
            act = nn.Identity() if shares else new_act().to(device)
            weight = new_weight(name, module.weight, is_table=False).to(device)
            model.set_submodule(name, QuantLinear(module, act, weight))
        elif hasattr(module, "row_quantizer"):
            module.row_quantizer = new_weight(name, module.weight, is_table=True).to(device)
        elif hasattr(module, "cores"):
            if hasattr(module, "quantized"):
                acts = [nn.Identity() if shares else new_act(), new_act()]
                module = module.quantized(config, *acts).to(device)
                model.set_submodule(name, module)
            elif quantizes:
                module.quantize_cores(config)
            if quantizes:
                cores = enumerate(module.cores)
                replaced |= {f"{name}.cores.{k}": core.numel() for k, core in cores}
    model.train(model.training)  # new modules start in training mode: follow the model
    kept = {n: p.numel() for n, p in model.named_parameters() if n not in replaced}
    return PrepareReport(replaced, kept, act_quantizers)


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[tuple[Tensor | None, ...]], observer: str) -> None:
    """Set the ranges of all static activation quantizers from batches of (ids, mask) or (ids, mask, types).

    While observing, weights are quantized and activations are not. Padded positions would be observed too: give
    batches of equal length.
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
            limits = (quantizer.quant_min, quantizer.quant_max, False)
            quantizer.set_range(*choose_qparams(*quantizer.observer.range(*limits), *limits))
    finally:
        for quantizer in quantizers:
            quantizer.observer = None
        model.train(was_training)

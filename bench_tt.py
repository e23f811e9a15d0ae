"""bench.py tt: what tensor trains cost and save. One layer, the model of the README's ATIS table, and
a step of its training, each against its dense self in the same round.
"""

import argparse
import copy
import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import torch
import torch.nn.functional as F
from options import TrainConfig
from packed import bytes_on_disk, student_payload
from torch import Tensor, nn
from torch.backends import opt_einsum

from bench_common import (
    header,
    interleave,
    model_shape,
    random_batch,
    random_ids,
    repeat,
    spread,
    summarize,
    training_step,
)
from checkpoint import checkpoint_payload
from data.batches import IGNORE, Batch
from int8 import MergedTable, convert
from model import Model, ModelConfig, build_model
from prepare import calibrate, prepare
from quant import QuantConfig
from report import markdown_table
from tt import TTConfig, TTLinear, TTMEmbedding, count_flops, count_parameters

NUM_LABELS, NUM_SLOTS, SENTENCES = 21, 120, 4478  # ATIS: known intents, known slots, train
VOCABULARY = b"x" * 4500  # as long as the list of its words, which every file carries
BATCHES = (1, 32)
INTEGER_FORMS = {  # name -> bits of the cores, ranges of the activations
    "TT W8A8 dynamic": (8, "dynamic"),
    "TT W8A8 static": (8, "static"),
    "TT W4A8 static": (4, "static"),
    "TT W2A8 static": (2, "static"),
}


def bench_tt(args: argparse.Namespace, device: torch.device) -> dict:
    torch.manual_seed(0)
    names = ("layers", "hidden", "vocab", "batch_size", "tokens", "rank")
    rival = None
    if has_tltorch():  # whose einsum takes a better path where opt_einsum is installed
        rival = {"version": version("tensorly-torch"), "opt_einsum": opt_einsum.is_available()}
    else:
        print("tltorch: not measured, it is not installed")
    return {
        **header("tt", device, args),
        "tltorch": rival,
        "shape": {name: getattr(args, name) for name in names},
        "layers": bench_layers(args, device),
        "models": bench_models(args, device),
        "training": bench_training(args, device),
    }


# -------------------------------------------------------------------------------------- one layer
def bench_layers(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Forward alone, and forward with the gradients of the input and of all parameters."""
    C = args.hidden
    rows = []
    for K, N in ((C, C), (C, 4 * C), (4 * C, C)):
        layers = layer_variants(K, N, args.rank, device)
        for M in args.sizes:
            x, upstream = torch.randn(M, K, device=device), torch.randn(M, N, device=device)
            calls = min(50, max(1, 10**8 // (M * K * N)))  # short ones are timed several at once
            found = {}
            for what, work in (("forward", forward), ("with_backward", forward_backward)):
                variants = {
                    name: repeat(partial(work, layer, x, upstream), calls)
                    for name, layer in layers.items()
                }
                times = interleave(variants, args.rounds, device)
                each = {name: [seconds / calls for seconds in row] for name, row in times.items()}
                found[what] = summarize(each, "dense")
            for name, layer in layers.items():
                row = {"name": name, "M": M, "K": K, "N": N, "parameters": count(layer)}
                row["flops"] = flops(name, layers, M)
                rows.append(row | {what: each[name] for what, each in found.items()})
    return rows


def forward(layer: nn.Module, x: Tensor, upstream: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


def forward_backward(layer: nn.Module, x: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    """Gradients of x and of all parameters. None is added to another, so there is none to clear."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(layer(x), [x, *layer.parameters()], upstream)


def flops(name: str, layers: dict[str, nn.Module], M: int) -> int | None:
    """Operations of a forward pass; None for another library's, which contracts in its own order."""
    train = layers["TTLinear"]
    if name.startswith("TTLinear"):
        return count_flops(M, train.modes[: train.cut], train.modes[train.cut :], train.ranks)
    return 2 * M * train.in_features * train.out_features if name == "dense" else None


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def layer_variants(K: int, N: int, rank: int, device: torch.device) -> dict[str, nn.Module]:
    """name -> a layer K -> N with random weights."""
    dense = nn.Linear(K, N)
    train = TTLinear.like(dense, TTConfig(rank=rank))
    layers = {"dense": dense, "TTLinear": train, "TTLinear, backward by hand": ByHand(train)}
    if has_tltorch():
        layers |= tltorch_layers(train)
    return {name: layer.to(device) for name, layer in layers.items()}


class _SplitProduct(torch.autograd.Function):
    """y = (x A^T) B^T + b with its gradients written out, x (M, K)."""

    @staticmethod
    def forward(ctx, x, A, B, bias):
        h = x @ A.T
        ctx.save_for_backward(x, h, A, B)
        return F.linear(h, B, bias)

    @staticmethod
    def backward(ctx, grad):
        x, h, A, B = ctx.saved_tensors
        grad_h = grad @ B
        return grad_h @ A, grad_h.T @ x, grad.T @ h, grad.sum(dim=0)


class ByHand(nn.Module):
    """A TTLinear whose two products have a backward pass of their own: is autograd slower?

    The cores' contraction, which is small, is left to autograd.
    """

    def __init__(self, layer: TTLinear):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return _SplitProduct.apply(x, *self.layer.halves(), self.layer.bias)


def has_tltorch() -> bool:
    """Whether TensorLy-Torch is installed: pip install tensorly tensorly-torch scipy opt_einsum."""
    return importlib.util.find_spec("tltorch") is not None


def tltorch_layers(layer: TTLinear) -> dict[str, nn.Module]:
    """Its tensor-train layers, at the rank whose number of parameters is nearest to ours.

    A "blocktt" core has a digit of the output and one of the input. "contracted": x meets one core
    after the other; "rebuilt": the cores are multiplied out to the matrix.
    """
    import tltorch

    out_modes, in_modes = layer.modes[: layer.cut], layer.modes[layer.cut :]
    pairs = [n * m for n, m in zip(out_modes, in_modes, strict=True)]
    ours = sum(core.numel() for core in layer.cores)
    choices = [(1, *[r] * (len(pairs) - 1), 1) for r in range(1, 400)]
    ranks = min(choices, key=lambda ranks: abs(count_parameters(pairs, ranks) - ours))
    return {
        f"tltorch, {name}": tltorch.FactorizedLinear(
            in_modes, out_modes, factorization="blocktt", rank=ranks, implementation=how
        )
        for name, how in (("contracted", "factorized"), ("rebuilt", "reconstructed"))
    }


# ------------------------------------------------------------------------------------- the models
def joint_shapes(args: argparse.Namespace) -> tuple[ModelConfig, ModelConfig]:
    """The dense model of intents and slots, and the same as tensor trains."""
    dense = replace(model_shape(args), head="joint", num_labels=NUM_LABELS, num_slots=NUM_SLOTS)
    return dense, replace(dense, tt=TTConfig(args.rank))


@torch.no_grad()
def merged(model: Model) -> Model:
    """A copy that multiplies the cores of each layer and table out to two halves once, not at every
    call: tensor trains in float32, as they would be deployed.
    """
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, TTLinear):
            A, B = module.halves()
            down = nn.Linear(*A.T.shape, bias=False)
            up = nn.Linear(*B.T.shape)
            down.weight.copy_(A)
            up.weight.copy_(B)
            up.bias.copy_(module.bias)
            new = nn.Sequential(down, up)
        elif isinstance(module, TTMEmbedding):
            new = MergedTable(module)
        else:
            continue
        model.set_submodule(name, new)
    return model


def joint_models(
    args: argparse.Namespace, device: torch.device
) -> dict[str, tuple[nn.Module, int]]:
    """name -> a model with random weights, ready to run, and the size of its file in bytes."""
    dense, train = (build_model(shape).eval() for shape in joint_shapes(args))
    sizes = [bytes_on_disk(checkpoint_payload(m, VOCABULARY)) for m in (dense, train)]
    models = {
        "dense fp32": (dense, sizes[0]),
        "TT fp32": (train, sizes[1]),
        "TT fp32, merged": (merged(train), sizes[1]),  # when it is loaded: the file is the same
    }
    for name, (bits, ranges) in INTEGER_FORMS.items():
        student = copy.deepcopy(train)
        quant = QuantConfig(weight_bits=bits, act_range=ranges, keep=())
        prepare(student, quant)
        if ranges == "static":
            calibrate(student, [(random_ids(32, args, "cpu"), None)], quant.observer)
        size = bytes_on_disk(student_payload(student, quant, VOCABULARY))
        models[name] = convert(student, quant, device), size
    return {name: (model.to(device), size) for name, (model, size) in models.items()}


def bench_models(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Latency of a sentence and of a batch, and the size of the file."""
    models, rows = joint_models(args, device), []
    for batch_size in BATCHES:
        ids = random_ids(batch_size, args, device)
        variants = {name: partial(model, ids) for name, (model, _) in models.items()}
        with torch.inference_mode():
            found = summarize(interleave(variants, args.rounds, device), "dense fp32")
        for name, row in found.items():
            size = {"size_bytes": models[name][1]}
            rows.append({"name": name, "batch_size": batch_size, **row, **size})
    return rows


# --------------------------------------------------------------------------------------- training
def bench_training(args: argparse.Namespace, device: torch.device) -> dict[str, dict]:
    """A step on the same batches, with dropout: its time, and what it keeps in memory."""
    dense_shape, train_shape = joint_shapes(args)
    batches = [joint_batch(args, device) for _ in range(4)]
    variants, memory = {}, {}
    for name, shape in {
        "dense": dense_shape,
        "TT fp32": train_shape,
        "TT W8A8": train_shape,
    }.items():
        model = build_model(shape)
        if name == "TT W8A8":
            prepare(model, QuantConfig(keep=()))
        model.to(device).train()
        step, optimizers = training_step(model, None, batches, TrainConfig())
        saved = saved_bytes(model, step)
        memory[name] = {"state_bytes": state_bytes(model, optimizers), "saved_bytes": saved}
        variants[name] = step
    rows = summarize(interleave(variants, args.rounds, device), "dense")
    for name, row in rows.items():
        row["epoch_seconds"] = 1e-3 * row["median_ms"] * math.ceil(SENTENCES / args.batch_size)
        row |= memory[name]
    return rows


def joint_batch(args: argparse.Namespace, device: torch.device) -> Batch:
    """Random sentences, with a label each and a tag for each of their tokens but the first."""
    batch = random_batch(args.batch_size, args.tokens, args.vocab, device)
    tags = torch.randint(NUM_SLOTS, batch.ids.shape).to(device).masked_fill(~batch.mask, IGNORE)
    tags[:, 0] = IGNORE
    labels = torch.randint(NUM_LABELS, (args.batch_size,)).to(device)
    return replace(batch, labels=labels, tags=tags)


def saved_bytes(model: nn.Module, step: Callable[[], object]) -> int:
    """What a step keeps for its backward pass, all of it at the end of the forward pass. A storage
    is counted once; the parameters themselves are not.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}  # the storages stay alive in here, so that no address comes again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storage.nbytes() for storage in kept.values())


def state_bytes(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """Parameters, gradients and what the optimizers know of them, after a step."""
    tensors = [t for p in model.parameters() for t in (p.detach(), p.grad) if t is not None]
    for optimizer in optimizers:
        tensors += [value for entry in optimizer.state.values() for value in entry.values()]
    return sum(map(tensor_bytes, filter(torch.is_tensor, tensors)))


def tensor_bytes(tensor: Tensor) -> int:
    if tensor.is_sparse:
        tensor = tensor.coalesce()
        return tensor.values().nbytes + tensor.indices().nbytes
    return tensor.nbytes


# ----------------------------------------------------------------------------------------- tables
def tt_table(result: dict) -> str:
    """Three tables. Ratios are times over the dense layer's or model's: below 1 is faster."""
    return "\n\n".join(
        (
            layers_table(result["layers"]),
            models_table(result["models"], result["shape"]["tokens"]),
            training_table(result["training"]),
        )
    )


def layers_table(rows: list[dict]) -> str:
    def timed(row: dict) -> str:
        return f"{row['median_ms']:,.2f} ({row['ratio']:.2f}x)"

    lines = [
        [f"{row['K']} x {row['N']}", f"{row['M']:,}", row["name"], f"{row['parameters']:,}"]
        + [
            "-" if row["flops"] is None else f"{row['flops'] / 1e6:,.0f}",
            timed(row["forward"]),
            timed(row["with_backward"]),
        ]
        for row in rows
    ]
    head = ["layer", "tokens", "variant", "parameters", "MFLOP", "forward ms"]
    return markdown_table([*head, "forward + backward ms"], lines)


def models_table(rows: list[dict], tokens: int) -> str:
    lines = []
    for row in rows:
        largest = rows[0]["size_bytes"]  # the dense model's
        cells = [row["name"], f"{row['batch_size']} x {tokens}", f"{row['median_ms']:,.2f}"]
        cells += [spread(row), f"{1 / row['ratio']:.2f}x", f"{row['size_bytes'] / 1e6:,.3f}"]
        lines.append([*cells, f"{largest / row['size_bytes']:.1f}x"])
    head = ["model", "batch", "median ms", "quartiles ms", "speed-up", "MB on disk"]
    return markdown_table([*head, "times smaller"], lines)


def training_table(rows: dict[str, dict]) -> str:
    lines = [
        [name, f"{row['median_ms']:,.1f}", f"{row['ratio']:.2f}x", f"{row['epoch_seconds']:,.1f}"]
        + [f"{row[key] / 1e6:,.1f}" for key in ("state_bytes", "saved_bytes")]
        for name, row in rows.items()
    ]
    head = ["training", "ms a step", "to dense", "s an epoch", "MB weights + gradients + Adam"]
    return markdown_table([*head, "MB saved for backward"], lines)

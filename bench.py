"""Benchmarks of the integer model, of a training step and of tensor trains: time, size, memory.

    python bench.py matmul      # one Linear layer of XLM-R base in float32, bf16 and int8
    python bench.py model       # the whole model: latency, file size, memory
    python bench.py rows        # pairs of sentences end to end: tokenize, batch, run
    python bench.py train       # a training step on XLM-R base's shape: FP32, QAT, SDQ
    python bench.py tt          # tensor trains: one layer, the model for ATIS, a training step
    python bench.py train --layers 4 --hidden 384 --vocab 8000

A shared machine drifts by tens of percent within minutes, so measuring one variant after the other would compare two
moments, not two programs. Here every round runs each variant once (whole models: a few times in a row, the first not
measured). Times are medians over the rounds, and a ratio is the median of the ratios within each round.
"""

if __name__ == "__main__":
    import kit.interrupt  # noqa: F401

import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

import train
from checkpoint import config_of, meta_model, read_checkpoint
from config import OneLineParser, TrainConfig, resolve
from data.batches import Batch, Dataset, collate, dataset_of, evaluation_batches
from data.tasks import find_data, find_task, load
from data.tokenizer import Tokenizer
from kit.common import (
    Progress,
    UserError,
    choose_device,
    hardware,
    instructions,
    markdown_table,
    multiplies_bf16,
    status_of,
)
from kit.files import write_json
from model import Model, build_model, initialize, set_dropout
from prepare import prepare
from quant import QuantConfig
from tools import backends

Variants = dict[str, Callable[[], object]]  # name -> what is measured; the first is the baseline


# ----------------------------------------------------------------------------------------- timing
def interleave(
    variants: Variants, rounds: int, device: torch.device, calls: int = 1, warmup: int = 2, warm: bool = False
) -> dict[str, list[float]]:
    """Seconds per call of each variant in each measured round. Waits for CUDA.

    calls: how often a round calls each variant, for functions that are too short for the clock.  warm: call it once
    more before, so that the caches hold its weights and not those of another variant, as a server would have it.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    measurements = [(i, name) for i in range(warmup + rounds) for name in variants]
    progress = Progress("measurement", len(measurements))
    wake_up = torch.zeros(1 << 17)
    for done, (i, name) in enumerate(measurements):
        progress.update(done, name)
        time.sleep(0.02)  # other libraries' threads spin for a while after their work,
        for _ in range(20):  # and PyTorch's have to be woken
            wake_up.add_(1)
        if warm:
            variants[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            variants[name]()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i >= warmup:
            times[name].append((time.perf_counter() - started) / calls)
    progress.clear()
    return times


def medians(times: dict[str, list[float]]) -> dict[str, dict]:
    """Median and quartiles (ms), and the median ratio to the first variant in the same round."""
    baseline, rows = next(iter(times.values())), {}
    for name, values in times.items():
        low = high = values[0]
        if len(values) > 1:
            low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        rows[name] = {
            "median_ms": 1e3 * statistics.median(values),
            "quartiles_ms": [1e3 * low, 1e3 * high],
            "ratio": statistics.median(a / b for a, b in zip(values, baseline, strict=True)),
        }
    return rows


def measure(variants: Variants, args: Namespace, **options: int) -> dict[str, dict]:
    return medians(interleave(variants, args.rounds, args.device, **options))


def layer_shapes(args: Namespace) -> list[tuple[int, int, int]]:
    """(M, K, N) of the encoder's three kinds of Linear layers, for each number of tokens M."""
    C = args.hidden
    return [(M, K, N) for K, N in ((C, C), (C, 4 * C), (4 * C, C)) for M in args.sizes]


def measure_layers(variants: Variants, M: int, K: int, N: int, args: Namespace) -> dict:
    """Medians of Linear layers (M, K) -> (M, N); short ones are called several times per round."""
    return measure(variants, args, calls=min(50, max(1, 10**8 // (M * K * N))))


@torch.inference_mode()
def measure_models(models: dict[str, Callable], sizes: list[tuple[int, int]], args: Namespace) -> list[dict]:
    """Medians of models, called with (ids, mask), for each size (sequences, tokens of each). Warm."""
    rows = []
    for batch_size, tokens in sizes:
        ids = backends.random_sequences(batch_size, tokens, args.vocab).to(args.device)
        variants = {name: partial(model, ids, None) for name, model in models.items()}
        found = measure(variants, args, calls=max(1, min(10, 1024 // ids.numel())), warm=True)
        size = {"batch_size": batch_size, "tokens": tokens}
        rows += [{"name": name, **size, **row} for name, row in found.items()]
    return rows


# ----------------------------------------------------------------------------------------- tables
LATENCY_COLUMNS = ["model", "batch", "median ms", "quartiles ms", "speed-up", "MB on disk"]


def latency_cells(row: dict, ms_digits: int, mb_digits: int) -> list[str]:
    """The cells of LATENCY_COLUMNS."""
    time = [f"{row['median_ms']:,.{ms_digits}f}", quartiles_cell(row), f"{1 / row['ratio']:.2f}x"]
    megabytes = f"{row['size_bytes'] / 1e6:,.{mb_digits}f}"
    return [row["name"], f"{row['batch_size']} x {row['tokens']}", *time, megabytes]


def quartiles_cell(row: dict) -> str:
    digits = 3 if row["median_ms"] < 10 else 1
    return " - ".join(f"{value:,.{digits}f}" for value in row["quartiles_ms"])


def time_cell(row: dict, factor: float) -> str:
    return f"{row['median_ms']:,.2f} ({factor:.2f}x)"


# ----------------------------------------------------------------------------------------- matmul
@torch.inference_mode()
def bench_matmul(args: Namespace) -> dict:
    """One Linear layer, float32 in and out, in every arithmetic and shape."""
    size = 8192 if args.device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=args.device) for _ in range(2))
    seconds = min(interleave({"peak": lambda: a @ b}, 10, args.device)["peak"])
    peak, rows = 2e-9 * size**3 / seconds, []
    for M, K, N in layer_shapes(args):
        variants, exact = backends.linear_layers(M, K, N, args.device)
        for name, row in measure_layers(variants, M, K, N, args).items():
            gops = 2e-6 * M * K * N / row["median_ms"]
            row |= {"gops": gops, "of_peak": gops / peak}
            row["error"] = backends.relative_error(variants[name](), exact)
            rows.append({"name": name, "M": M, "K": K, "N": N, **row})
    return {"fp32_peak_gflops": peak, "rows": rows}


def matmul_table(result: dict) -> str:
    """Time and speed-up for each number of tokens M; the last columns are for the largest M."""
    rows = {(row["K"], row["N"], row["name"], row["M"]): row for row in result["rows"]}
    sizes = sorted({row["M"] for row in result["rows"]})
    lines = []
    for K, N, name in dict.fromkeys(key[:3] for key in rows):
        by_size = [rows[K, N, name, M] for M in sizes]
        last = by_size[-1]
        times = [time_cell(row, 1 / row["ratio"]) for row in by_size]
        figures = [f"{last['gops']:,.0f}", f"{last['of_peak']:.2f}", f"{last['error']:.1e}"]
        lines.append([f"{K} x {N}", name, *times, *figures])
    head = ["K x N", "ms (speed-up)", *(f"M = {M}" for M in sizes)]
    return markdown_table([*head, "GOP/s", "of fp32 peak", "error"], lines)


# ------------------------------------------------------------------------------------------ model
def bench_model(args: Namespace) -> dict:
    """The whole model on random ids: latency, bytes on disk, memory and error of each backend."""
    names = backends.available_backends(args.device)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        print("writing the files and measuring memory", file=sys.stderr)
        backends.write_files(backends.encoder_config(args), folder, names)
        size = (8, args.tokens)
        peaks = {name: backends.peak_memory(name, folder, *size, args.device) for name in names}
        runners = {name: backends.load_backend(name, folder, args.device) for name in names}
        ids = backends.random_sequences(*size, args.vocab).to(args.device)
        errors = backends.errors_of(runners, ids)
        sizes = [(1, max(1, args.tokens // 4)), *((size, args.tokens) for size in args.sizes)]  # a short text first
        rows = measure_models(runners, sizes, args)
        for row in rows:
            name = row["name"]
            size = os.path.getsize(os.path.join(folder, backends.FILES[name]))
            row |= {"size_bytes": size, "peak_bytes": peaks[name], "error": errors[name]}
    return {"rows": rows}


def model_table(result: dict) -> str:
    lines = []
    for row in result["rows"]:
        peak = f"{row['peak_bytes'] / 1e6:,.0f}" if row["peak_bytes"] else "-"
        cells = latency_cells(row, ms_digits=1, mb_digits=1)
        lines.append([*cells, peak, f"{row['error']:.1e}"])
    return markdown_table([*LATENCY_COLUMNS, "MB at peak", "error"], lines)


# ------------------------------------------------------------------------------------------- rows
def bench_rows(args: Namespace) -> dict:
    """XNLI's pairs of sentences end to end: tokenize, batch, run. The weights are random."""
    if args.tokenizer:
        tokenizer = Tokenizer.from_file(args.tokenizer)
    else:
        payload = read_checkpoint(train.MINI)
        vocab_size = config_of(payload, train.MINI).vocab_size
        tokenizer = Tokenizer.from_payload(payload, train.MINI, vocab_size)
    first, second = read_pairs(args)
    args.vocab, args.rows = tokenizer.vocab_size, len(first)
    known = ("Hugging Face fp32", "fp32", "int8 dynamic", "int8 static")
    names = tuple(name for name in backends.available_backends(args.device) if name in known)
    by_length = partial(evaluation_batches, max_tokens=train.EVAL_TOKENS[args.device.type])
    batchings = {"file order": batches_in_file_order, "by length": by_length}

    def encode() -> Dataset:
        return dataset_of(tokenizer.encode_batch(first, second, args.tokens), [0] * len(first))

    def run_all(run: backends.Runner, batching: str) -> list[Tensor]:
        batches = (batch.to(args.device) for batch in batchings[batching](encode()))
        return [run(batch.ids, batch.mask) for batch in batches]

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        print("writing the files", file=sys.stderr)
        backends.write_files(backends.encoder_config(args), folder, names)
        load_runner = partial(backends.load_backend, folder=folder, device=args.device)
        runners = {name: load_runner(name) for name in names}
        variants = {f"{names[0]}, file order": partial(run_all, runners[names[0]], "file order")}
        for name, run in runners.items():
            variants[f"{name}, by length"] = partial(run_all, run, "by length")
        rows = measure(variants, args, warmup=0)
        student = torch.cat(run_all(load_runner("fake-quantized"), "by length"))
        integer = torch.cat(run_all(load_runner("int8 dynamic"), "by length"))
    for row in rows.values():
        row["rows_per_second"] = 1e3 * len(first) / row["median_ms"]
    dataset = encode()
    positions = {name: sum(b.ids.numel() for b in f(dataset)) for name, f in batchings.items()}
    return {
        "tokens_with_padding": {name: n / len(dataset.ids) for name, n in positions.items()},
        "same_logits_as_student": int((student == integer).all(dim=-1).sum()),
        "rows": rows,
    }


def batches_in_file_order(dataset: Dataset) -> Iterator[Batch]:
    for start in range(0, len(dataset), 32):
        yield collate(dataset, np.arange(start, min(start + 32, len(dataset))))


def read_pairs(args: Namespace) -> tuple[list[str], list[str]]:
    """--rows pairs of XNLI dev, equally many of each language, in the order of the file."""
    task = find_task("xnli")
    folder = find_data(task, args.data_dir, "mini")
    count, examples = math.ceil(args.rows / len(task.languages)), []
    for language in task.languages:
        examples += load(task, "dev", language, folder)[:count]
    del examples[args.rows :]
    return [example.text_a for example in examples], [example.text_b for example in examples]


def rows_table(result: dict) -> str:
    lines = [
        [name, f"{row['median_ms'] / 1e3:,.1f}", f"{row['rows_per_second']:,.1f}"] + [f"{1 / row['ratio']:.2f}x"]
        for name, row in result["rows"].items()
    ]
    head = [f"{result['shape']['rows']:,} pairs", "median s", "rows/s", "speed-up"]
    padded = ", ".join(f"{n:.2f} {name}" for name, n in result["tokens_with_padding"].items())
    return (
        markdown_table(head, lines)
        + f"\n\npositions with padding per token: {padded}; the integer model's logits are the "
        f"fake-quantized student's, bit for bit, in {result['same_logits_as_student']:,} rows"
    )


# ------------------------------------------------------------------------------------------ train
def training_step(
    model: Model, teacher: Model | None, batches: list[Batch]
) -> tuple[Callable[[TrainConfig], None], list[torch.optim.Optimizer]]:
    """(function of a config that trains the model by one step, as train.train does; optimizers)."""
    optimizers, steps = train.make_optimizers(model), itertools.count()

    def one_step(config: TrainConfig) -> None:
        step = next(steps)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = 1e-5
        batch = batches[step % len(batches)]
        terms = train.sdq_loss(model.train(), teacher, batch, config, step)
        loss = sum(terms.values())
        loss.backward()
        norm = train.clip_gradients(model, train.CLIP_NORM)
        values = torch.stack([value.detach() for value in (loss, *terms.values(), norm)]).tolist()
        assert all(map(math.isfinite, values))
        for optimizer in optimizers:
            optimizer.step()

    return one_step, optimizers


def bench_train(args: Namespace) -> dict:
    """A step on the same batches: FP32; QAT, with noise; SDQ, distilled too (logits, context).

    Each with products in float32, and in bfloat16 if the processor multiplies it.
    """
    torch.manual_seed(0)
    encoder, config = backends.encoder_config(args), resolve({"model": "mini"})
    teacher = build_model(encoder).to(args.device).eval().requires_grad_(False)
    batches = backends.random_batches(args, labels=3)
    precisions = {"": "float32"} | ({", bf16": "bfloat16"} if multiplies_bf16(args.device) else {})
    variants = {}
    for name in ("fp32", "qat", "sdq"):
        model = build_model(encoder)
        set_dropout(model, 0.0)  # its random numbers would cost every variant the same
        if name != "fp32":
            prepare(model, QuantConfig(noise=config.noise))
        own_teacher = teacher if name == "sdq" else None
        step, _ = training_step(model.to(args.device), own_teacher, batches)
        for label, precision in precisions.items():
            variants[name + label] = partial(step, replace(config, precision=precision))
    rows = measure(variants, args)
    for row in rows.values():
        row["tokens_per_second"] = 1e3 * args.batch_size * args.tokens / row["median_ms"]
    return {"noise": config.noise, "rows": rows}


def train_table(result: dict) -> str:
    lines = [
        [name, f"{row['median_ms']:,.1f}", quartiles_cell(row)]
        + [f"{row['tokens_per_second']:,.0f}", f"{row['ratio']:.2f}x"]
        for name, row in result["rows"].items()
    ]
    return markdown_table(["step", "median ms", "quartiles ms", "tokens/s", "to fp32"], lines)


# ---------------------------------------------------------------------------------- tensor trains
def bench_tt(args: Namespace) -> dict:
    """Tensor trains and the dense layer, model and training that they replace."""
    torch.manual_seed(0)
    return {
        "tltorch": backends.tltorch_version(),
        "layers": bench_tt_layers(args),
        "models": bench_tt_models(args),
        "training": bench_tt_training(args),
    }


def bench_tt_layers(args: Namespace) -> list[dict]:
    """One layer: the forward pass alone, and with the gradients of the input and all parameters."""
    rows = []
    for M, K, N in layer_shapes(args):
        layers = backends.tt_layers(K, N, args.rank, args.device)
        x, upstream = (torch.randn(M, size, device=args.device) for size in (K, N))
        with torch.no_grad():
            variants = {name: partial(layer, x) for name, layer in layers.items()}
            forward = measure_layers(variants, M, K, N, args)
        variants = {n: partial(forward_and_backward, f, x, upstream) for n, f in layers.items()}
        with_backward = measure_layers(variants, M, K, N, args)
        for name, layer in layers.items():
            row = {"name": name, "M": M, "K": K, "N": N}
            row["parameters"] = sum(parameter.numel() for parameter in layer.parameters())
            row["flops"] = backends.forward_flops(layer, M)
            rows.append(row | {"forward": forward[name], "with_backward": with_backward[name]})
    return rows


def forward_and_backward(layer: nn.Module, x: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    """Gradients of x and of all parameters. They are not accumulated, so there is none to clear."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(layer(x), [x, *layer.parameters()], upstream)


def bench_tt_models(args: Namespace) -> list[dict]:
    """The model for ATIS: latency of one sentence and of a batch, and the size of the file."""
    models = backends.tt_models(*backends.joint_configs(args), args.tokens, args.device)
    rows = measure_models(
        {name: model for name, (model, _) in models.items()}, [(1, args.tokens), (32, args.tokens)], args
    )
    return [{**row, "size_bytes": models[row["name"]][1]} for row in rows]


def bench_tt_training(args: Namespace) -> dict[str, dict]:
    """A training step of the model for ATIS, with dropout: its time and memory."""
    dense, trains = backends.joint_configs(args)
    batches = backends.random_batches(args, dense.num_labels, dense.num_slots)
    config, variants, memory = resolve({"model": "mini"}), {}, {}
    for name, joint in {"dense": dense, "TT fp32": trains, "TT W8A8": trains}.items():
        model = initialize(meta_model(joint))
        if name == "TT W8A8":
            prepare(model, QuantConfig(keep=()))
        step, optimizers = training_step(model.to(args.device), None, batches)
        step = partial(step, config)
        saved = backends.saved_bytes(model, step)
        state = backends.state_bytes(model, optimizers)
        variants[name], memory[name] = step, {"state_bytes": state, "saved_bytes": saved}
    rows, steps = measure(variants, args), math.ceil(backends.ATIS_SENTENCES / args.batch_size)
    for name, row in rows.items():
        row |= {"epoch_seconds": 1e-3 * row["median_ms"] * steps, **memory[name]}
    return rows


def tt_table(result: dict) -> str:
    """Three tables: one layer, the model, its training."""
    head = ["layer", "tokens", "variant", "parameters", "MFLOP"]
    lines = [
        [f"{row['K']} x {row['N']}", f"{row['M']:,}", row["name"], f"{row['parameters']:,}"]
        + ["-" if row["flops"] is None else f"{row['flops'] / 1e6:,.0f}"]
        + [time_cell(row[key], row[key]["ratio"]) for key in ("forward", "with_backward")]
        for row in result["layers"]
    ]
    layers = markdown_table([*head, "forward ms", "forward + backward ms"], lines)
    dense_bytes = result["models"][0]["size_bytes"]
    lines = [[*latency_cells(row, 2, 3), f"{dense_bytes / row['size_bytes']:.1f}x"] for row in result["models"]]
    models = markdown_table([*LATENCY_COLUMNS, "times smaller"], lines)
    head = ["training", "ms per step", "to dense", "s per epoch", "MB weights + gradients + Adam"]
    lines = [
        [name, f"{row['median_ms']:,.1f}", f"{row['ratio']:.2f}x", f"{row['epoch_seconds']:,.1f}"]
        + [f"{row[key] / 1e6:,.1f}" for key in ("state_bytes", "saved_bytes")]
        for name, row in result["training"].items()
    ]
    training = markdown_table([*head, "MB saved for backward"], lines)
    return f"{layers}\n\n{models}\n\n{training}"


# ----------------------------------------------------------------------------------- command line
BENCHMARKS = {  # name -> (function, its table, help)
    "matmul": (bench_matmul, matmul_table, "one Linear layer in float32, bf16 and int8"),
    "model": (bench_model, model_table, "latency, file size and memory of the whole model"),
    "rows": (bench_rows, rows_table, "pairs of sentences end to end: tokenize, batch, run"),
    "train": (bench_train, train_table, "a training step: FP32, QAT, SDQ"),
    "tt": (bench_tt, tt_table, "tensor trains: one layer, the model for ATIS, a training step"),
}
SHAPES = {  # benchmark -> the options that describe what it measured
    "matmul": ("hidden",),
    "model": ("layers", "hidden", "vocab", "tokens"),
    "rows": ("layers", "hidden", "vocab", "tokens", "rows"),
    "train": ("layers", "hidden", "vocab", "batch_size", "tokens"),
    "tt": ("layers", "hidden", "vocab", "batch_size", "tokens", "rank"),
}
OPTIONS = {  # name -> (default: XLM-R base's shape, bounds, help)
    "layers": (12, (1, 200), "number of layers"),
    "hidden": (768, (64, 16384), "hidden size, a multiple of 64"),
    "vocab": (250002, (8, 10**7), "rows of the embedding table"),
    "batch-size": (16, (1, 10**6), "train, tt: sequences per training step"),
    "tokens": (128, (1, 10**5), "model, train, tt: tokens per sequence; rows: longest sequence"),
    "rows": (2000, (1, 10**6), "rows: number of pairs"),
    "rank": (20, (1, 4096), "tt: rank of the tensor trains"),
    "rounds": (20, (1, 10**6), "measured rounds, after two rounds of warm-up"),
    "threads": (None, (1, 1024), "CPU threads"),
}
# The words of ATIS, and the mean length of its sentences with <s> and </s>.
TT_DEFAULTS = {"layers": 2, "vocab": 614, "batch-size": 32, "tokens": 14}
SIZES = {"matmul": [1, 16, 128, 1024, 4096], "model": [1, 8, 32], "tt": [4096]}
SIZES_HELP = """matmul, tt: tokens of one layer; model: batch sizes, after a text of a quarter of --tokens (default:
matmul 1 16 128 1024 4096, on CUDA also 16384; tt 4096; model 1 8 32)"""


def build_parser() -> ArgumentParser:
    rows = [f"  {name:8}{text}" for name, (_, _, text) in BENCHMARKS.items()]
    example = "example: python bench.py model --sizes 1 8 --json model.json"
    parser = OneLineParser(
        prog="bench.py",
        description="Print the table of a benchmark, and write its numbers to --json.",
        epilog="\n".join(["benchmarks:", *rows, "", example]),
        formatter_class=RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("what", choices=list(BENCHMARKS), help="the benchmark, see below")
    for name, (default, _, text) in OPTIONS.items():
        defaults = f"{default or 'all cores'}"
        defaults += f"; tt: {TT_DEFAULTS[name]}" if name in TT_DEFAULTS else ""
        add(f"--{name}", type=int, metavar="N", help=f"{text} (default: {defaults})")
    add("--sizes", type=int, nargs="+", metavar="N", help=SIZES_HELP)
    add("--tokenizer", metavar="FILE", help="rows: a SentencePiece model (default: built in)")
    add("--data-dir", metavar="DIR", help="rows: XNLI's official files (default: built-in pairs)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--json", metavar="FILE", help="also write the numbers to this file")
    return parser


def complete(args: Namespace) -> None:
    """Fill in defaults, choose the device. Raises UserError for values that can't be measured."""
    for option, (default, (least, most), _) in OPTIONS.items():
        name = option.replace("-", "_")
        if getattr(args, name) is None:
            setattr(args, name, TT_DEFAULTS.get(option, default) if args.what == "tt" else default)
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise UserError(f"--{option} {value}: choose {least} to {most}")
    if args.hidden % 64:
        raise UserError(f"--hidden {args.hidden}: not divisible by 64, the size of a head")
    args.device = choose_device(args.device, args.threads)
    if not args.sizes:
        larger = [16384] if (args.what, args.device.type) == ("matmul", "cuda") else []
        args.sizes = SIZES.get(args.what, [1]) + larger
    if min(args.sizes) < 1:
        raise UserError(f"--sizes {min(args.sizes)}: choose 1 or more")


def run_benchmark(args: Namespace) -> None:
    complete(args)
    benchmark, show_table, _ = BENCHMARKS[args.what]
    found = benchmark(args)
    result = {"benchmark": args.what, "hardware": hardware(args.device), "instructions": instructions(args.device)}
    result |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    result |= {"rounds": args.rounds, "shape": {k: getattr(args, k) for k in SHAPES[args.what]}}
    result |= found
    shape = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in result["shape"].items())
    has = " ".join(result["instructions"]) or "-"
    print(f"{result['hardware']} ({has}), {result['threads']} threads, torch {result['torch']}; {shape}")
    print(show_table(result))
    if not torch.cuda.is_available():
        print("GPU: not measured, there is no CUDA device here")
    if args.json:
        write_json(args.json, result)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return status_of(lambda: run_benchmark(args))


if __name__ == "__main__":
    sys.exit(main())

"""Benchmarks of the integer model, of a training step and of tensor trains: time, size, memory.

    python bench.py matmul      # one Linear layer of XLM-R base in float32, bf16 and int8
    python bench.py model       # the whole model: latency, file size, memory
    python bench.py train       # a training step on XLM-R base's shape: FP32, QAT, SDQ
    python bench.py tt          # tensor trains: one layer, the model for ATIS, a training step
    python bench.py train --layers 4 --hidden 384 --vocab 8000

A shared machine drifts by tens of percent within minutes, so measuring one variant after the other would compare two
moments, not two programs. Here every round runs each variant once (whole models: a few times in a row, the first not
measured). Times are medians over the rounds, and a ratio is the median of the ratios within each round.
"""

if __name__ == "__main__":
    import kit.interrupt  # noqa: F401

import os
import sys
import tempfile
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle

import numpy as np
import torch
from torch import Tensor, nn

import train
from checkpoint import meta_model
from config import COUNT, between, resolve
from data.batches import Batch
from kit import parallel
from kit.common import Progress, choose_device, exit_status, hardware, instructions, markdown_table, multiplies_bf16
from kit.files import write_json
from model import build_model, initialize, set_dropout
from prepare import prepare
from quant import QuantConfig
from tools import backends


# ----------------------------------------------------------------------------------------- timing
def interleave(variants: dict[str, Callable], rounds: int, calls: int = 1, warm: bool = False) -> dict[str, list]:
    """Seconds per call of each variant in each round, after two rounds of warm-up. Waits for CUDA.

    calls: how often a round calls each variant, for functions that are too short for the clock.  warm: call it once
    more before, so that the caches hold its weights and not those of another variant, as a server would have it.
    """
    times, wake_up = {name: [] for name in variants}, torch.zeros(1 << 17)
    counts = dict.fromkeys(variants, calls)
    measurements = [(i, name) for i in range(-2, rounds) for name in variants]
    progress = Progress("measurement", len(measurements))
    for done, (i, name) in enumerate(measurements):
        progress.update(done, name)
        time.sleep(0.02)  # other libraries' threads spin for a while after their work,
        for _ in range(20):  # and PyTorch's have to be woken
            wake_up.add_(1)
        for count in (1, counts[name]) if warm else (counts[name],):  # the last one is measured
            started = time.perf_counter()
            for _ in range(count):
                variants[name]()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
        seconds = (time.perf_counter() - started) / counts[name]
        if i >= 0:
            times[name].append(seconds)
        elif torch.cuda.is_initialized():  # enough calls that the GPU, not their launches and the wait, is measured
            counts[name] = max(calls, min(100, round(0.02 / seconds)))
    progress.clear()
    return times


def medians(times: dict[str, list[float]]) -> dict[str, dict]:
    """Median and quartiles (ms), and the median ratio to the first variant in the same round."""
    baseline, rows = np.array(next(iter(times.values()))), {}
    for name, values in times.items():
        low, median, high = (1e3 * np.percentile(values, [25, 50, 75])).tolist()
        rows[name] = {"median_ms": median, "quartiles_ms": [low, high], "ratio": float(np.median(values / baseline))}
    return rows


def layer_shapes(args: Namespace) -> list[tuple[int, int, int]]:
    """(M, K, N) of the encoder's three kinds of Linear layers, for each number of tokens M."""
    return [(M, k * args.hidden, n * args.hidden) for k, n in ((1, 1), (1, 4), (4, 1)) for M in args.sizes]


def measure_layers(variants: dict[str, Callable], M: int, K: int, N: int, rounds: int) -> dict:
    """Medians of Linear layers (M, K) -> (M, N); short ones are called several times per round."""
    return medians(interleave(variants, rounds, calls=min(50, max(1, 10**8 // (M * K * N)))))


@torch.inference_mode()
def measure_models(models: dict[str, Callable], sizes: list[tuple[int, int]], args: Namespace, device) -> list[dict]:
    """Medians of models, called with (ids, mask), for each size (sequences, tokens of each). Warm."""
    rows = []
    for batch_size, tokens in sizes:
        ids = backends.random_sequences(batch_size, tokens, args.vocab).to(device)
        variants = {name: partial(model, ids, None) for name, model in models.items()}
        times = interleave(variants, args.rounds, calls=max(1, min(10, 1024 // ids.numel())), warm=True)
        for name, row in medians(times).items():
            rows.append({"name": name, "batch_size": batch_size, "tokens": tokens, **row})
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
def bench_matmul(args: Namespace, device: torch.device) -> dict:
    """One Linear layer, float32 in and out, in every arithmetic and shape."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    seconds = min(interleave({"peak": lambda: a @ b}, 10)["peak"])
    peak, rows = 2e-9 * size**3 / seconds, []
    for M, K, N in layer_shapes(args):
        variants, exact = backends.linear_layers(M, K, N, device)
        for name, row in measure_layers(variants, M, K, N, args.rounds).items():
            gops, error = 2e-6 * M * K * N / row["median_ms"], backends.relative_error(variants[name](), exact)
            figures = {"gops": gops, "of_peak": gops / peak, "error": error}
            rows.append({"name": name, "M": M, "K": K, "N": N, **row, **figures})
    return {"fp32_peak_gflops": peak, "rows": rows}


def matmul_table(result: dict) -> str:
    """Time and speed-up for each number of tokens M; the last columns are for the largest M."""
    rows = {(row["K"], row["N"], row["name"], row["M"]): row for row in result["rows"]}
    sizes = sorted({row["M"] for row in result["rows"]})
    lines = []
    for K, N, name in dict.fromkeys(key[:3] for key in rows):
        by_size = [rows[K, N, name, M] for M in sizes]
        times, last = [time_cell(row, 1 / row["ratio"]) for row in by_size], by_size[-1]
        figures = [f"{last['gops']:,.0f}", f"{last['of_peak']:.2f}", f"{last['error']:.1e}"]
        lines.append([f"{K} x {N}", name, *times, *figures])
    head = ["K x N", "ms (speed-up)", *(f"M = {M}" for M in sizes)]
    return markdown_table([*head, "GOP/s", "of fp32 peak", "error"], lines)


# ------------------------------------------------------------------------------------------ model
def bench_model(args: Namespace, device: torch.device) -> dict:
    """The whole model on random ids: latency, bytes on disk, memory and error of each backend."""
    names = backends.available_backends(device)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        print("writing the files and measuring memory", file=sys.stderr)
        backends.write_files(backends.encoder_config(args), folder, names)
        size = (8, args.tokens)
        peaks = {name: backends.peak_memory(name, folder, *size, device) for name in names}
        runners = {name: backends.load_backend(name, folder, device) for name in names}
        errors = backends.errors_of(runners, backends.random_sequences(*size, args.vocab).to(device))
        sizes = [(1, max(1, args.tokens // 4)), *((size, args.tokens) for size in args.sizes)]  # a short text first
        rows = measure_models(runners, sizes, args, device)
        for row in rows:
            row["size_bytes"] = os.path.getsize(backends.path_of(row["name"], folder))
            row |= {"peak_bytes": peaks[row["name"]], "error": errors[row["name"]]}
    return {"rows": rows}


def model_table(result: dict) -> str:
    lines = []
    for row in result["rows"]:
        peak = f"{row['peak_bytes'] / 1e6:,.0f}" if row["peak_bytes"] else "-"
        lines.append([*latency_cells(row, ms_digits=1, mb_digits=1), peak, f"{row['error']:.1e}"])
    return markdown_table([*LATENCY_COLUMNS, "MB at peak", "error"], lines)


# ------------------------------------------------------------------------------------------ train
def training_step(plan: train.Plan, optimizers: list[torch.optim.Optimizer], batches: Iterator[Batch]) -> None:
    """The step of train.train with the pieces that it has there, but the gradients are kept until the next one."""
    model, config, loss = plan.model.train(), plan.config, partial(plan.loss, step=0)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    plan.begin(0, optimizers)
    terms = parallel.backward(model, loss, next(batches), config.accumulate, train.means_over(model.config.head))
    norm = train.clip_gradients(model, train.CLIP_NORM)
    torch.stack([sum(terms.values()), *terms.values(), norm]).tolist()  # as Training.check_finite does
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(0)
        optimizer.step()


def bench_train(args: Namespace, device: torch.device) -> dict:
    """A step on the same batches: FP32; QAT, with noise; SDQ, distilled too (logits, context).

    Each with products in float32, and in bfloat16 if the processor multiplies it.
    """
    torch.manual_seed(0)
    encoder, config = backends.encoder_config(args), resolve({"model": "mini"})
    teacher = build_model(encoder).to(device).eval().requires_grad_(False)
    batches = backends.random_batches(args, device, labels=3)
    precisions = {"": "float32"} | ({", bf16": "bfloat16"} if multiplies_bf16(device) else {})
    variants = {}
    for name in ("fp32", "qat", "sdq"):
        model = build_model(encoder)
        set_dropout(model, 0.0)  # its random numbers would cost every variant the same
        if name != "fp32":
            prepare(model, QuantConfig(noise=config.noise))
        optimizers, own_teacher = train.make_optimizers(model.to(device)), teacher if name == "sdq" else None
        for label, precision in precisions.items():
            plan = train.make_plan(replace(config, precision=precision), model, own_teacher, args.batch_size, name)
            variants[name + label] = partial(training_step, plan, optimizers, cycle(batches))
    rows = medians(interleave(variants, args.rounds))
    for row in rows.values():
        row["tokens_per_second"] = 1e3 * args.batch_size * args.tokens / row["median_ms"]
    return {"noise": config.noise, "rows": rows}


def train_table(result: dict) -> str:
    lines = []
    for name, row in result["rows"].items():
        time, speed = f"{row['median_ms']:,.1f}", f"{row['tokens_per_second']:,.0f}"
        lines.append([name, time, quartiles_cell(row), speed, f"{row['ratio']:.2f}x"])
    return markdown_table(["step", "median ms", "quartiles ms", "tokens/s", "to fp32"], lines)


# ---------------------------------------------------------------------------------- tensor trains
def bench_tt(args: Namespace, device: torch.device) -> dict:
    """Tensor trains and the dense layer, model (of one sentence and of a batch) and training that they replace."""
    torch.manual_seed(0)
    result = {"tltorch": backends.tltorch_version(), "layers": bench_tt_layers(args, device)}
    models = backends.tt_models(*backends.joint_configs(args), args.tokens, device)
    runners = {name: model for name, (model, _) in models.items()}
    rows = measure_models(runners, [(1, args.tokens), (32, args.tokens)], args, device)
    result["models"] = [{**row, "size_bytes": models[row["name"]][1]} for row in rows]
    return result | {"training": bench_tt_training(args, device)}


def bench_tt_layers(args: Namespace, device: torch.device) -> list[dict]:
    """One layer: the forward pass alone, and with the gradients of the input and all parameters."""
    rows = []
    for M, K, N in layer_shapes(args):
        layers = backends.tt_layers(K, N, args.rank, device)
        x, upstream = (torch.randn(M, size, device=device) for size in (K, N))
        with torch.no_grad():
            forward = measure_layers({n: partial(layer, x) for n, layer in layers.items()}, M, K, N, args.rounds)
        both = {n: partial(forward_and_backward, layer, x, upstream) for n, layer in layers.items()}
        both = measure_layers(both, M, K, N, args.rounds)
        for name, layer in layers.items():
            row = {"name": name, "M": M, "K": K, "N": N, "parameters": sum(p.numel() for p in layer.parameters())}
            row |= {"flops": backends.forward_flops(layer, M), "forward": forward[name], "with_backward": both[name]}
            rows.append(row)
    return rows


def forward_and_backward(layer: nn.Module, x: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    """Gradients of x and of all parameters. They are not accumulated, so there is none to clear."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(layer(x), [x, *layer.parameters()], upstream)


def bench_tt_training(args: Namespace, device: torch.device) -> dict[str, dict]:
    """A training step of the model for ATIS, with dropout: its time and memory."""
    dense, trains = backends.joint_configs(args)
    batches = backends.random_batches(args, device, dense.num_labels, dense.num_slots)
    config, variants, memory = resolve({"model": "mini"}), {}, {}
    for name, joint in {"dense": dense, "TT fp32": trains, "TT W8A8": trains}.items():
        model = initialize(meta_model(joint))
        if name == "TT W8A8":
            prepare(model, QuantConfig(keep=()))
        optimizers = train.make_optimizers(model.to(device))
        plan = train.make_plan(config, model, None, args.batch_size, "fp32")
        variants[name] = partial(training_step, plan, optimizers, cycle(batches))
        saved = backends.saved_bytes(model, variants[name])
        memory[name] = {"state_bytes": backends.state_bytes(model, optimizers), "saved_bytes": saved}
    rows, steps = medians(interleave(variants, args.rounds)), -(-backends.ATIS_SENTENCES // args.batch_size)
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
    "train": (bench_train, train_table, "a training step: FP32, QAT, SDQ"),
    "tt": (bench_tt, tt_table, "tensor trains: one layer, the model for ATIS, a training step"),
}
OPTIONS = {  # flag -> (default of each benchmark that has it, help): by default XLM-R base. All are integers.
    # ATIS has few words; its sentences have 14 tokens on average, with <s> and </s>.
    "--layers": ({"model": 12, "train": 12, "tt": 2}, "number of layers"),
    "--hidden": (dict.fromkeys(BENCHMARKS, 768), "hidden size; of a model, a multiple of 64"),
    "--vocab": ({"model": 250002, "train": 250002, "tt": 614}, "rows of the embedding table"),
    "--batch-size": ({"train": 16, "tt": 32}, "sequences per training step"),
    "--tokens": ({"model": 128, "train": 128, "tt": 14}, "tokens per sequence"),
    "--rank": ({"tt": 20}, "rank of the tensor trains"),
    "--sizes": (
        {"matmul": [1, 16, 128, 1024, 4096], "model": [1, 8, 32], "tt": [4096]},
        "tokens of one layer; of a model, batch sizes, after one short text",
    ),
    "--rounds": (dict.fromkeys(BENCHMARKS, 20), "measured rounds, after two of warm-up"),
    "--threads": (dict.fromkeys(BENCHMARKS), "CPU threads; None: all cores"),
}


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="bench.py", description="Print the table of a benchmark, write its numbers to --json.")
    kinds = parser.add_subparsers(dest="what", required=True, metavar="BENCHMARK")
    for name, (_, _, text) in BENCHMARKS.items():
        kind = kinds.add_parser(name, help=text, description=text, formatter_class=ArgumentDefaultsHelpFormatter)
        for option, (defaults, about) in OPTIONS.items():
            if name in defaults:
                how = {"type": between(int, 8, 10**9) if option == "--vocab" else COUNT, "metavar": "N"}
                how |= {"nargs": "+"} if option == "--sizes" else {}
                kind.add_argument(option, default=defaults[name], help=about, **how)
        kind.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: the GPU, if any")
        kind.add_argument("--json", metavar="FILE", help="also write the numbers to this file")
    return parser


@exit_status()
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    device = choose_device(args.device, args.threads)
    benchmark, show_table, _ = BENCHMARKS[args.what]
    names = [option[2:].replace("-", "_") for option in list(OPTIONS)[:6]]
    shape = {name: getattr(args, name) for name in names if hasattr(args, name)}
    result = {"benchmark": args.what, "hardware": hardware(device), "instructions": instructions(device)}
    result |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "rounds": args.rounds, "shape": shape}
    result |= benchmark(args, device)
    words, has = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in shape.items()), " ".join(result["instructions"])
    print(f"{result['hardware']} ({has or '-'}), {result['threads']} threads, torch {result['torch']}; {words}")
    print(show_table(result))
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    sys.exit(main())

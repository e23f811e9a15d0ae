"""Where the time goes, measured fairly: variants interleaved in one process, medians with their
spread.

    python bench.py matmul              # one Linear layer of XLM-R base's shapes, in every arithmetic
    python bench.py model               # the whole model: latency, file size, memory
    python bench.py rows                # texts end to end: tokenize, batch, run
    python bench.py train               # a training step: FP32, QAT, SDQ on XLM-R base's shape
    python bench.py tt                  # tensor trains: a layer, the model of ATIS, its training
    python bench.py train --layers 4 --hidden 384 --vocab 8000

A shared machine drifts by tens of percent within minutes, so one variant after the other would
compare two moments, not two programs. Here every round runs each variant once, and a ratio is the
median of the rounds' own ratios.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from loop import EVAL_TOKENS
from options import OneLineParser, TrainConfig, fill_in
from packed import Weight
from torch import Tensor

import forms
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
from bench_tt import bench_tt, tt_table
from checkpoint import config_of, read_checkpoint
from data import UserError, exit_status, flag, mini
from data.batches import CACHE_DIR, Batch, Dataset, collate, dataset_of, evaluation_batches
from data.tasks import find_task, load
from data.tokenizer import Tokenizer
from int8 import IntLinear, choose_kernel
from model import PRESETS, build_model, set_dropout
from prepare import prepare
from quant import ActQuantizer, QuantConfig, WeightQuantizer, choose_qparams
from report import markdown_table, write_json
from train import MINI, choose_device


# ----------------------------------------------------------------------------------------- matmul
@torch.inference_mode()
def bench_matmul(args: argparse.Namespace, device: torch.device) -> dict:
    """One Linear layer, fp32 in and fp32 out: every arithmetic, shape and number of tokens M."""
    C = args.hidden
    peak = measured_peak(device)
    rows = []
    for K, N in ((C, C), (C, 4 * C), (4 * C, C)):
        for M in args.sizes:
            functions = layer_functions(M, K, N, device)
            exact = functions.pop("exact")()
            calls = min(50, max(1, 10**8 // (M * K * N)))  # short ones are timed several at once
            variants = {name: repeat(function, calls) for name, function in functions.items()}
            times = interleave(variants, args.rounds, device)
            each = {name: [seconds / calls for seconds in row] for name, row in times.items()}
            for name, row in summarize(each, "fp32").items():
                row["gops"] = 2e-6 * M * K * N / row["median_ms"]
                row["of_peak"] = row["gops"] / peak
                error = functions[name]().double() - exact
                row["error"] = float(error.norm() / exact.norm())
                rows.append({"name": name, "M": M, "K": K, "N": N, **row})
    result = header("matmul", device, args)
    return {**result, "shape": {"hidden": C}, "fp32_peak_gflops": peak, "rows": rows}


def measured_peak(device: torch.device) -> float:
    """GFLOP/s of a large float32 product: the best of ten. TF32 is off, as PyTorch's default is."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    times = interleave({"peak": lambda: a @ b}, 10, device)["peak"]
    return 2e-9 * size**3 / min(times)


def quantized_layer(x: Tensor, weight: Tensor, bias: Tensor, static: bool) -> IntLinear:
    """An IntLinear of a float32 layer, as int8.convert makes it from a student's."""
    config = QuantConfig(act_range="static" if static else "dynamic")
    quantizer = WeightQuantizer(config, per_row=True, multiplied=True)
    codes, scale = quantizer.codes(weight)
    act = ActQuantizer(config).to(x.device)
    if static:
        low, high = torch.aminmax(x)
        act.scale, act.zero_point = choose_qparams(low, high, 0, 255, symmetric=False)
    kernel = choose_kernel(x.device, quantizer.quant_max)
    return IntLinear(Weight(codes.to(torch.int8).cpu(), scale.cpu()), bias, act, kernel, x.device)


def layer_functions(M: int, K: int, N: int, device: torch.device) -> dict[str, Callable]:
    """name -> a function () -> (M, N): the same layer on the same input.

    "product" is the integers' product by itself, without quantizing x: what a layer could reach.
    """
    generator = torch.Generator().manual_seed(M + K + N)
    x, weight, bias = (
        torch.randn(*size, generator=generator).to(device) for size in ((M, K), (N, K), (N,))
    )
    functions = {
        "exact": lambda: F.linear(x.double(), weight.double(), bias.double()),
        "fp32": lambda: F.linear(x, weight, bias),
    }
    half = {"bf16": torch.bfloat16}
    if device.type == "cuda":
        half["fp16"] = torch.float16
    for name, dtype in half.items():
        values = [t.to(dtype) for t in (x, weight, bias)]
        functions[name] = lambda values=values: F.linear(*values)
    for name, static in (("int8 dynamic", False), ("int8 static", True)):
        layer = quantized_layer(x, weight, bias, static)
        functions[name] = lambda layer=layer: layer(x)
    codes = layer.codes(x)
    functions["int8 product"] = partial(layer, codes)
    if device.type == "cpu" and forms.has_torch_ao():
        reference = torch.nn.Linear(K, N)
        reference.weight.data, reference.bias.data = weight, bias
        functions["torch.ao int8 dynamic"] = partial(
            forms.torch_ao(torch.nn.Sequential(reference)), x
        )
    return functions


# ------------------------------------------------------------------------------------------ model
def bench_model(args: argparse.Namespace, device: torch.device) -> dict:
    """The whole model on random ids: time of a batch, bytes on disk, memory, and error."""
    config = model_shape(args)
    names = forms.available(device)
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        print("making the files", file=sys.stderr)
        forms.write_files(config, folder, names)
        peaks = peaks_of(names, folder, args, device)
        runners = {name: forms.load(name, folder, device) for name in names}
        errors = errors_of(runners, random_ids(8, args, device))
        for batch_size in args.sizes:
            ids = random_ids(batch_size, args, device)
            variants = {name: partial(run, ids, None) for name, run in runners.items()}
            found = summarize(interleave(variants, args.rounds, device), names[0])
            for name, row in found.items():
                size = os.path.getsize(os.path.join(folder, forms.FILES[name]))
                row |= {"size_bytes": size, "peak_bytes": peaks[name], "error": errors[name]}
                rows.append({"name": name, "batch_size": batch_size, **row})
    shape = {k: getattr(args, k) for k in ("layers", "hidden", "vocab", "tokens")}
    return {**header("model", device, args), "shape": shape, "rows": rows}


def peaks_of(
    names: tuple[str, ...], folder: str, args: argparse.Namespace, device: torch.device
) -> dict:
    """Peak memory of each form on a batch of 8: of a process on CPU, of the card's tensors on CUDA."""
    peaks = {}
    for name in names:
        print(f"memory of {name}", file=sys.stderr)
        if device.type == "cpu":
            peaks[name] = forms.peak_memory(name, folder, 8, args.tokens)
            continue
        run = forms.load(name, folder, device)
        torch.cuda.reset_peak_memory_stats()
        run(random_ids(8, args, device), None)
        peaks[name] = torch.cuda.max_memory_allocated()
        del run
    return peaks


def errors_of(runners: dict[str, forms.Runner], ids: Tensor) -> dict[str, float]:
    """How far each form's logits are from our fp32 model's, relative to their size."""
    logits = {name: run(ids, None).double().cpu() for name, run in runners.items()}
    exact = logits["fp32"]
    return {name: float((found - exact).norm() / exact.norm()) for name, found in logits.items()}


# ------------------------------------------------------------------------------------------- rows
def bench_rows(args: argparse.Namespace, device: torch.device) -> dict:
    """Real texts end to end: tokenize, batch, run. XLM-R's shape with random weights: what it
    answers is worth nothing, how long it takes is.
    """
    tokenizer = find_tokenizer(args.tokenizer)
    args.vocab = tokenizer.vocab_size
    texts = read_texts(args)
    known = ("Hugging Face fp32", "fp32", "int8 dynamic", "int8 static")
    names = tuple(name for name in forms.available(device) if name in known)

    def encode() -> Dataset:
        return dataset_of(tokenizer.encode_batch(*texts, args.tokens), [0] * len(texts[0]))

    def in_file_order(dataset: Dataset) -> Iterator[Batch]:
        order = np.arange(len(dataset))
        for start in range(0, len(order), 32):
            yield collate(dataset, order[start : start + 32])

    def by_length(dataset: Dataset) -> Iterator[Batch]:
        return evaluation_batches(dataset, EVAL_TOKENS[device.type])

    def whole(run: forms.Runner, batching: Callable) -> None:
        for batch in batching(encode()):
            batch = batch.to(device)
            run(batch.ids, batch.mask)

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        print("making the files", file=sys.stderr)
        forms.write_files(model_shape(args), folder, names)
        runners = {name: forms.load(name, folder, device) for name in names}
        variants = {f"{names[0]}, file order": partial(whole, runners[names[0]], in_file_order)}
        for name, run in runners.items():
            variants[f"{name}, by length"] = partial(whole, run, by_length)
        rows = summarize(interleave(variants, args.rounds, device, warmup=0), next(iter(variants)))
        student, integer = (
            forms.load(name, folder, device) for name in ("fake-quantized", "int8 dynamic")
        )
        dataset = encode()
        same = sum(
            int((student(b.ids, b.mask) == integer(b.ids, b.mask)).all(dim=-1).sum())
            for b in (batch.to(device) for batch in by_length(dataset))
        )
    count = len(dataset)
    for row in rows.values():
        row["rows_per_second"] = 1e3 * count / row["median_ms"]
    padded = {
        name: sum(b.ids.numel() for b in batching(dataset)) / dataset.starts[-1]
        for name, batching in (("file order", in_file_order), ("by length", by_length))
    }
    shape = {k: getattr(args, k) for k in ("layers", "hidden", "vocab", "tokens")}
    return {
        **header("rows", device, args),
        "shape": {**shape, "rows": count},
        "tokens_with_padding": padded,
        "same_logits_as_student": same,
        "rows": rows,
    }


def find_tokenizer(path: str | None) -> Tokenizer:
    if path is not None:
        return Tokenizer.from_file(path)
    payload = read_checkpoint(MINI)
    return Tokenizer.from_payload(payload, MINI, config_of(payload, MINI).vocab_size)


def read_texts(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """--rows pairs of XNLI dev, as many of each language, in the order of the file."""
    task, folder = find_task("xnli"), args.data_dir or mini.cached(CACHE_DIR)
    first, second = [], []
    for language in task.languages:
        some = load("xnli", "dev", language, folder)[: -(-args.rows // len(task.languages))]
        first += [example.text_a for example in some]
        second += [example.text_b for example in some]
    return first[: args.rows], second[: args.rows]


# ------------------------------------------------------------------------------------------ train
def bench_train(args: argparse.Namespace, device: torch.device) -> dict:
    """One optimizer step on the same batches: FP32, QAT (noise), SDQ (noise, logits and context
    distilled).
    """
    base = model_shape(args)
    torch.manual_seed(0)
    config = fill_in(TrainConfig(noise=args.noise), "xlmr-base")
    teacher = build_model(base).to(device).eval().requires_grad_(False)

    def variant(quantized: bool, parts: tuple[str, ...]) -> Callable[[], object]:
        model = build_model(base)
        # The same for all, and none: random numbers for dropout would only hide the differences.
        set_dropout(model, 0.0)
        if quantized:
            prepare(model, QuantConfig(noise=args.noise))
        model.to(device).train()
        return training_step(model, teacher if parts else None, batches, config, parts)[0]

    batches = [random_batch(args.batch_size, args.tokens, args.vocab, device) for _ in range(4)]
    variants = {
        "fp32": variant(False, ()),
        "qat": variant(True, ()),
        "sdq": variant(True, ("logits", "context")),
    }
    rows = summarize(interleave(variants, args.rounds, device), "fp32")
    tokens = args.batch_size * args.tokens
    for row in rows.values():
        row["tokens_per_second"] = 1e3 * tokens / row["median_ms"]
    names = ("layers", "hidden", "vocab", "batch_size", "tokens")
    shape = {name: getattr(args, name) for name in names}
    return {**header("train", device, args), "shape": shape, "noise": args.noise, "rows": rows}


def train_table(result: dict) -> str:
    lines = [
        [name, f"{row['median_ms']:,.1f}", spread(row), f"{row['tokens_per_second']:,.0f}"]
        + [f"{row['ratio']:.2f}x"]
        for name, row in result["rows"].items()
    ]
    return markdown_table(["step", "median ms", "quartiles ms", "tokens/s", "to fp32"], lines)


def matmul_table(result: dict) -> str:
    """Milliseconds and speed-up over fp32 for every M; the last columns are of the largest."""
    rows = {(row["K"], row["N"], row["name"], row["M"]): row for row in result["rows"]}
    sizes = sorted({row["M"] for row in result["rows"]})
    lines = []
    for K, N, name in dict.fromkeys(key[:3] for key in rows):
        mine = [rows[K, N, name, M] for M in sizes]
        last = mine[-1]
        lines.append(
            [f"{K} x {N}", name]
            + [f"{row['median_ms']:.2f} ({1 / row['ratio']:.2f}x)" for row in mine]
            + [f"{last['gops']:,.0f}", f"{last['of_peak']:.2f}", f"{last['error']:.1e}"]
        )
    head = ["K x N", "ms (speed-up)", *(f"M = {M}" for M in sizes)]
    return markdown_table([*head, "GOP/s", "of fp32 peak", "error"], lines)


def model_table(result: dict) -> str:
    tokens = result["shape"]["tokens"]
    lines = [
        [row["name"], f"{row['batch_size']} x {tokens}", f"{row['median_ms']:,.1f}", spread(row)]
        + [f"{1 / row['ratio']:.2f}x", f"{row['size_bytes'] / 1e6:,.1f}"]
        + [f"{row['peak_bytes'] / 1e6:,.0f}" if row["peak_bytes"] else "-", f"{row['error']:.1e}"]
        for row in result["rows"]
    ]
    head = ["model", "batch", "median ms", "quartiles ms", "speed-up", "MB on disk", "MB at peak"]
    return markdown_table([*head, "error"], lines)


def rows_table(result: dict) -> str:
    count = result["shape"]["rows"]
    lines = [
        [name, f"{row['median_ms'] / 1e3:,.1f}", f"{row['rows_per_second']:,.1f}"]
        + [f"{1 / row['ratio']:.2f}x"]
        for name, row in result["rows"].items()
    ]
    padded = ", ".join(f"{share:.2f} {how}" for how, share in result["tokens_with_padding"].items())
    return (
        markdown_table([f"{count:,} pairs", "median s", "rows/s", "speed-up"], lines)
        + f"\n\nplaces with padding for one token: {padded}; the integer model's logits are the "
        f"fake-quantized student's, bit for bit, in {result['same_logits_as_student']:,} rows"
    )


BENCHMARKS = {  # name -> (function, its table, help)
    "matmul": (bench_matmul, matmul_table, "one Linear layer in fp32, bf16, int8"),
    "model": (bench_model, model_table, "latency, file size and memory of the whole model"),
    "rows": (bench_rows, rows_table, "real texts end to end: tokenize, batch, run"),
    "train": (bench_train, train_table, "a step of FP32, QAT and SDQ training"),
    "tt": (bench_tt, tt_table, "tensor trains: a layer, the model of ATIS, its training"),
}
BASE = PRESETS["xlmr-base"]
INTEGERS = {  # option -> (default, help)
    "layers": (BASE.num_layers, "layers"),
    "hidden": (BASE.hidden_size, "hidden size, a multiple of 64"),
    "vocab": (BASE.vocab_size, "rows of the embedding table"),
    "batch-size": (16, "train, tt: sequences a step"),
    "tokens": (128, "train, model, tt: tokens a sequence; rows: at most so many"),
    "rows": (2000, "rows: pairs of sentences"),
    "rank": (20, "tt: of the tensor trains"),
    "rounds": (20, "measured rounds; two more warm up"),
}
# tt: the words of ATIS and the mean length of its sentences, with <s> and </s>.
OF_TT = {"layers": 2, "vocab": 614, "batch-size": 32, "tokens": 14}


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="bench.py",
        description="Benchmarks: a table here and its JSON in --json.",
        epilog="\n".join(
            ["what to measure:", *(f"  {name:8}{row[2]}" for name, row in BENCHMARKS.items())]
            + ["", "example: python bench.py model --sizes 1 8 --json model.json"]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=list(BENCHMARKS), help="see below")
    for name, (default, text) in INTEGERS.items():
        defaults = f"{default}; tt: {OF_TT[name]}" if name in OF_TT else str(default)
        parser.add_argument(
            f"--{name}", type=int, metavar="N", help=f"{text} (default: {defaults})"
        )
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        metavar="N",
        help="matmul: rows M (default: 1 16 128 1024 4096, on CUDA 16384); model: batch sizes (default: 1 8 32); tt: tokens of one layer (default: 4096)",
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="rows: a SentencePiece model (default: the built-in)"
    )
    parser.add_argument(
        "--data-dir", metavar="DIR", help="rows: a folder with XNLI (default: made-up pairs)"
    )
    parser.add_argument(
        "--noise", type=float, default=0.5, metavar="P", help="as in train.py (default: 0.5)"
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--json", metavar="FILE", help="write the figures here, too")
    return parser


def run(args: argparse.Namespace) -> None:
    for option, (default, _) in INTEGERS.items():
        name = option.replace("-", "_")
        if getattr(args, name) is None:
            setattr(args, name, OF_TT.get(option, default) if args.what == "tt" else default)
        if getattr(args, name) < (8 if name == "vocab" else 1):
            raise UserError(f"{flag(name)} {getattr(args, name)}: choose a larger number")
    if args.threads is not None and args.threads < 1:
        raise UserError(f"--threads {args.threads}: choose 1 or more")
    if not 0 <= args.noise <= 1:
        raise UserError(f"--noise {args.noise}: choose a fraction from 0 to 1")
    larger = [16384] if torch.cuda.is_available() and args.device != "cpu" else []
    sizes = {"matmul": [1, 16, 128, 1024, 4096, *larger], "tt": [4096]}
    args.sizes = args.sizes or sizes.get(args.what, [1, 8, 32])
    if min(args.sizes) < 1:
        raise UserError(f"--sizes {min(args.sizes)}: choose 1 or more")
    if args.hidden % 64:
        raise UserError(f"--hidden {args.hidden}: not divisible by 64, the size of a head")
    benchmark, show, _ = BENCHMARKS[args.what]
    device = choose_device(TrainConfig(device=args.device, threads=args.threads))
    result = benchmark(args, device)
    shape = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in result["shape"].items())
    print(f"{result['hardware']}, {result['threads']} threads, torch {result['torch']}; {shape}")
    print(show(result))
    if not torch.cuda.is_available():
        print("GPU: not measured, there is no CUDA device here")
    if args.json:
        try:
            write_json(args.json, result)
        except OSError as error:
            raise UserError(f"cannot write --json {args.json}: {error.strerror}") from None


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())

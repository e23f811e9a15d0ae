"""Where the time goes, measured fairly: variants interleaved in one process, medians with their
spread.

    python bench.py matmul              # one Linear layer of XLM-R base's shapes, in every arithmetic
    python bench.py model               # the whole model: latency and file size
    python bench.py train               # a training step: FP32, QAT, SDQ on XLM-R base's shape
    python bench.py train --layers 4 --hidden 384 --vocab 8000

A shared machine drifts by tens of percent within minutes, so one variant after the other would
compare two moments, not two programs. Here every round runs each variant once, and a ratio is the
median of the rounds' own ratios.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from data import UserError, exit_status
from data.batches import Batch
from int8 import (
    IntLinear,
    Weight,
    bytes_on_disk,
    choose_kernel,
    convert,
    student_payload,
)
from loop import make_optimizers, train_step
from model import PRESETS, ModelConfig, build_model, checkpoint_payload, set_dropout
from options import OneLineParser, TrainConfig, flag
from quant import (
    ActQuantizer,
    QuantConfig,
    WeightQuantizer,
    calibrate,
    choose_qparams,
    prepare,
    quantize,
)
from report import markdown_table, write_json
from train import choose_device, hardware


def interleave(
    variants: dict[str, Callable[[], object]], rounds: int, device: torch.device, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each variant in each round. CUDA work is waited for."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(warmup + rounds):
        for name, function in variants.items():
            begun = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i >= warmup:
                times[name].append(time.perf_counter() - begun)
        print(f"\rround {i + 1}/{warmup + rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return times


def summarize(times: dict[str, list[float]], baseline: str) -> dict[str, dict]:
    """Median, quartiles (ms) and the median of the ratios to the baseline in the same round."""
    rows = {}
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times[baseline], strict=True)]
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        rows[name] = {
            "median_ms": 1e3 * statistics.median(values),
            "quartiles_ms": [1e3 * low, 1e3 * high],
            "ratio": statistics.median(ratios),
        }
    return rows


def header(name: str, device: torch.device, args: argparse.Namespace) -> dict:
    """What every benchmark's JSON begins with."""
    return {
        "benchmark": name,
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": args.rounds,
    }


def model_shape(args: argparse.Namespace) -> ModelConfig:
    """The encoder that --layers, --hidden and --vocab describe, with a head of three labels."""
    try:
        return ModelConfig(
            vocab_size=args.vocab,
            hidden_size=args.hidden,
            num_layers=args.layers,
            num_heads=max(1, args.hidden // 64),
            ffn_size=4 * args.hidden,
            max_tokens=max(512, args.tokens),
            head="sequence",
            num_labels=3,
        )
    except UserError as error:
        raise UserError(f"--vocab, --layers, --hidden or --tokens: {error}") from None


# ----------------------------------------------------------------------------------------- matmul
def bench_matmul(args: argparse.Namespace) -> dict:
    """One Linear layer, fp32 in and fp32 out: every arithmetic, shape and number of tokens M."""
    device = choose_device(TrainConfig(device=args.device, threads=args.threads))
    C = args.hidden
    peak = measured_peak(device)
    rows = []
    for K, N in ((C, C), (C, 4 * C), (4 * C, C)):
        for M in args.sizes:
            functions = layer_functions(M, K, N, device)
            exact = functions.pop("exact")()
            calls = max(1, 10**8 // (M * K * N))  # short calls are timed several at once
            variants = {name: repeat(function, calls) for name, function in functions.items()}
            found = summarize(interleave(variants, args.rounds, device), "fp32")
            for name, row in found.items():
                for key in ("median_ms", "quartiles_ms"):
                    row[key] = [x / calls for x in row[key]] if key[0] == "q" else row[key] / calls
                row["gops"] = 2e-6 * M * K * N / row["median_ms"]
                row["of_peak"] = row["gops"] / peak
                error = functions[name]().double() - exact
                row["error"] = float(error.norm() / exact.norm())
                rows.append({"name": name, "M": M, "K": K, "N": N, **row})
    result = header("matmul", device, args)
    return {**result, "shape": {"hidden": C}, "fp32_peak_gflops": peak, "rows": rows}


def repeat(function: Callable, calls: int) -> Callable:
    def run() -> None:
        for _ in range(calls):
            function()

    return run


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
    scale, zero_point = quantizer.qparams(weight)
    codes = quantize(weight, scale, zero_point, quantizer.quant_min, quantizer.quant_max)
    act = ActQuantizer(config).to(x.device)
    if static:
        low, high = torch.aminmax(x)
        act.scale, act.zero_point = choose_qparams(low, high, 0, 255, symmetric=False)
    kernel = choose_kernel(x.device, quantizer.quant_max)
    return IntLinear(Weight(codes.to(torch.int8).cpu(), scale.cpu()), bias, act, kernel, x.device)


def layer_functions(M: int, K: int, N: int, device: torch.device) -> dict[str, Callable]:
    """name -> a function () -> (M, N): the same layer on the same input."""
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
    return functions


# ------------------------------------------------------------------------------------------ model
def bench_model(args: argparse.Namespace) -> dict:
    """The whole model on random ids: time of a batch and bytes on disk of every form."""
    device = choose_device(TrainConfig(device=args.device, threads=args.threads))
    config = model_shape(args)
    forms, sizes = model_forms(config, device)
    rows = []
    for batch_size in args.sizes:
        ids = torch.randint(4, config.vocab_size - 1, (batch_size, args.tokens), device=device)
        variants = {name: partial(form, ids) for name, form in forms.items()}
        with torch.inference_mode():
            found = summarize(interleave(variants, args.rounds, device), next(iter(forms)))
        for name, row in found.items():
            rows.append({"name": name, "batch_size": batch_size, **row, "size_bytes": sizes[name]})
    shape = {k: getattr(args, k) for k in ("layers", "hidden", "vocab", "tokens")}
    return {**header("model", device, args), "shape": shape, "rows": rows}


def hugging_face(config: ModelConfig):
    """The reference implementation in the same shape, with random weights; None if not installed."""
    try:
        import transformers
    except ImportError:
        print("Hugging Face: not measured, transformers is not installed")
        return None
    shape = transformers.XLMRobertaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.ffn_size,
        max_position_embeddings=config.max_tokens + config.position_offset,
        type_vocab_size=config.type_vocab_size,
        num_labels=config.num_labels,
        pad_token_id=config.pad_id,
    )
    return transformers.XLMRobertaForSequenceClassification(shape).eval()


def model_forms(config: ModelConfig, device: torch.device):
    """({name: a function of ids}, {name: bytes on disk}). The first is what others are compared to."""
    torch.manual_seed(0)
    model = build_model(config).eval()
    forms: dict[str, Callable] = {}
    sizes: dict[str, int] = {}

    reference = hugging_face(config)
    if reference is not None:
        reference.to(device)
        forms["Hugging Face fp32"] = lambda ids: reference(ids).logits
        sizes["Hugging Face fp32"] = sum(4 * p.numel() for p in reference.parameters())
    whole = copy.deepcopy(model).to(device)
    forms["fp32"] = lambda ids: whole(ids)[0]
    sizes["fp32"] = bytes_on_disk(checkpoint_payload(model, b"x"))
    for name in ("dynamic", "static"):
        student, quant = copy.deepcopy(model), QuantConfig(act_range=name)
        prepare(student, quant)
        if name == "static":
            rows = torch.randint(4, config.vocab_size - 1, (8, 128))
            calibrate(student, [(rows, None)], quant.observer)
        else:
            fake = copy.deepcopy(student).to(device)
            forms["fake-quantized"] = lambda ids, fake=fake: fake(ids)[0]
            sizes["fake-quantized"] = sizes["fp32"]
        integer = convert(student, quant, device)
        forms[f"int8 {name}"] = lambda ids, integer=integer: integer(ids)[0]
        sizes[f"int8 {name}"] = bytes_on_disk(student_payload(student, quant, b"x"))
    return forms, sizes


# ------------------------------------------------------------------------------------------ train
def bench_train(args: argparse.Namespace) -> dict:
    """One optimizer step on the same batches: FP32, QAT (noise), SDQ (noise, logits and context
    distilled).
    """
    device = choose_device(TrainConfig(device=args.device, threads=args.threads))
    base = model_shape(args)
    torch.manual_seed(0)
    config = TrainConfig(noise=args.noise)
    teacher = build_model(base).to(device).eval().requires_grad_(False)

    def variant(quantized: bool, parts: tuple[str, ...]) -> Callable[[], object]:
        model = build_model(base)
        # The same for all, and none: random numbers for dropout would only hide the differences.
        set_dropout(model, 0.0)
        if quantized:
            prepare(model, QuantConfig(noise=args.noise))
        model.to(device).train()
        optimizers = make_optimizers(model, config.weight_decay)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = 1e-5
        turn = iter(range(10**9))

        def step() -> None:
            batch = batches[next(turn) % len(batches)]
            train_step(model, teacher if parts else None, batch, optimizers, config, parts)

        return step

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


def random_batch(size: int, tokens: int, vocab: int, device: torch.device) -> Batch:
    """A batch like length-bucketed ones: a few rows are a little shorter, so masks are used."""
    ids = torch.randint(4, vocab - 1, (size, tokens))
    lengths = torch.randint(max(1, tokens - 4), tokens + 1, (size, 1))
    mask = torch.arange(tokens) < lengths
    labels = torch.randint(3, (size,))
    return Batch(ids.masked_fill(~mask, 1), mask, labels, int(mask.sum())).to(device)


def train_table(result: dict) -> str:
    lines = [
        [name, f"{row['median_ms']:,.1f}", spread(row), f"{row['tokens_per_second']:,.0f}"]
        + [f"{row['ratio']:.2f}x"]
        for name, row in result["rows"].items()
    ]
    return markdown_table(["step", "median ms", "quartiles ms", "tokens/s", "to fp32"], lines)


def matmul_table(result: dict) -> str:
    """Speed-ups, so larger is better: fp32's median over this row's."""
    lines = [
        [
            row["name"],
            f"{row['M']} x {row['K']} x {row['N']}",
            f"{row['median_ms']:.3f}",
            spread(row),
        ]
        + [f"{row['gops']:,.0f}", f"{1 / row['ratio']:.2f}x", f"{row['of_peak']:.2f}"]
        + [f"{row['error']:.1e}"]
        for row in result["rows"]
    ]
    head = ["layer", "M x K x N", "median ms", "quartiles ms", "GOP/s", "speed-up"]
    return markdown_table([*head, "of fp32 peak", "error"], lines)


def model_table(result: dict) -> str:
    tokens = result["shape"]["tokens"]
    lines = [
        [row["name"], f"{row['batch_size']} x {tokens}", f"{row['median_ms']:.1f}", spread(row)]
        + [f"{1 / row['ratio']:.2f}x", f"{row['size_bytes'] / 1e6:.1f}"]
        for row in result["rows"]
    ]
    return markdown_table(["model", "batch", "median ms", "quartiles ms", "speed-up", "MB"], lines)


def spread(row: dict) -> str:
    digits = 3 if row["median_ms"] < 10 else 1
    return " - ".join(f"{value:,.{digits}f}" for value in row["quartiles_ms"])


BENCHMARKS = {  # name -> (function, its table, help)
    "matmul": (bench_matmul, matmul_table, "one Linear layer in fp32, bf16, int8"),
    "model": (bench_model, model_table, "latency and file size of the whole model"),
    "train": (bench_train, train_table, "a step of FP32, QAT and SDQ training"),
}


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
    base = PRESETS["xlmr-base"]
    parser.add_argument("what", choices=list(BENCHMARKS), help="see below")
    integers = {
        "layers": (base.num_layers, "layers"),
        "hidden": (base.hidden_size, "hidden size, a multiple of 64"),
        "vocab": (base.vocab_size, "rows of the embedding table"),
        "batch-size": (16, "train: sequences a step"),
        "tokens": (128, "train, model: tokens a sequence"),
        "rounds": (20, "measured rounds; two more warm up"),
    }
    for name, (default, text) in integers.items():
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        metavar="N",
        help="matmul: rows M (default: 1 16 128 1024 4096); model: batch sizes (default: 1 8 32)",
    )
    parser.add_argument(
        "--noise", type=float, default=0.5, metavar="P", help="as in train.py (default: 0.5)"
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--json", metavar="FILE", help="write the figures here, too")
    return parser


def run(args: argparse.Namespace) -> None:
    for name in ("layers", "hidden", "vocab", "batch_size", "tokens", "rounds"):
        if getattr(args, name) < (8 if name == "vocab" else 1):
            raise UserError(f"{flag(name)} {getattr(args, name)}: choose a larger number")
    if args.threads is not None and args.threads < 1:
        raise UserError(f"--threads {args.threads}: choose 1 or more")
    if not 0 <= args.noise <= 1:
        raise UserError(f"--noise {args.noise}: choose a fraction from 0 to 1")
    args.sizes = args.sizes or {"matmul": [1, 16, 128, 1024, 4096]}.get(args.what, [1, 8, 32])
    if min(args.sizes) < 1:
        raise UserError(f"--sizes {min(args.sizes)}: choose 1 or more")
    if args.hidden % 64:
        raise UserError(f"--hidden {args.hidden}: not divisible by 64, the size of a head")
    benchmark, show, _ = BENCHMARKS[args.what]
    result = benchmark(args)
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

"""Where the time goes, measured fairly: variants interleaved in one process, medians with their
spread.

    python bench.py train               # a training step: FP32, QAT, SDQ on XLM-R base's shape
    python bench.py train --layers 4 --hidden 384 --vocab 8000

A shared machine drifts by tens of percent within minutes, so one variant after the other would
compare two moments, not two programs. Here every round runs each variant once, and a ratio is the
median of the rounds' own ratios.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch

from data import UserError, exit_status
from data.batches import Batch
from loop import make_optimizers, train_step
from model import PRESETS, ModelConfig, build_model, set_dropout
from options import OneLineParser, TrainConfig, flag
from quant import QuantConfig, prepare
from report import write_json
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


def bench_train(args: argparse.Namespace) -> dict:
    """One optimizer step on the same batches: FP32, QAT (noise), SDQ (noise, logits and context
    distilled).
    """
    device = choose_device(TrainConfig(device=args.device, threads=args.threads))
    try:
        base = ModelConfig(
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
    return {
        "benchmark": "train",
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "shape": {
            k: getattr(args, k) for k in ("layers", "hidden", "vocab", "batch_size", "tokens")
        },
        "noise": args.noise,
        "rounds": args.rounds,
        "rows": rows,
    }


def random_batch(size: int, tokens: int, vocab: int, device: torch.device) -> Batch:
    """A batch like length-bucketed ones: a few rows are a little shorter, so masks are used."""
    ids = torch.randint(4, vocab - 1, (size, tokens))
    lengths = torch.randint(max(1, tokens - 4), tokens + 1, (size, 1))
    mask = torch.arange(tokens) < lengths
    labels = torch.randint(3, (size,))
    return Batch(ids.masked_fill(~mask, 1), mask, labels, int(mask.sum())).to(device)


def print_rows(result: dict) -> None:
    shape = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in result["shape"].items())
    print(f"{result['hardware']}, {result['threads']} threads, torch {result['torch']}; {shape}")
    print(
        f"| {'step':6} | {'median ms':>9} | {'quartiles ms':>17} | {'tokens/s':>9} | {'to fp32':>7} |"
    )
    print(f"|{'-' * 8}|{'-' * 10}:|{'-' * 18}:|{'-' * 10}:|{'-' * 8}:|")
    for name, row in result["rows"].items():
        low, high = row["quartiles_ms"]
        print(
            f"| {name:6} | {row['median_ms']:9.1f} | {low:7.1f} - {high:7.1f} | "
            f"{row['tokens_per_second']:9,.0f} | {row['ratio']:6.2f}x |"
        )


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="bench.py",
        description="Benchmarks: a table here and its JSON in --json.",
        epilog="example: python bench.py train --layers 4 --batch-size 16",
    )
    base = PRESETS["xlmr-base"]
    parser.add_argument(
        "what", choices=["train"], help="train: a step of FP32, QAT and SDQ training"
    )
    integers = {
        "layers": (base.num_layers, "layers"),
        "hidden": (base.hidden_size, "hidden size, a multiple of 64"),
        "vocab": (base.vocab_size, "rows of the embedding table"),
        "batch-size": (16, "sequences a step"),
        "tokens": (128, "tokens a sequence"),
        "rounds": (20, "measured rounds; two more warm up"),
    }
    for name, (default, text) in integers.items():
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})"
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
    result = bench_train(args)
    print_rows(result)
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

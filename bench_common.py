"""What the benchmarks share: interleaved timing, its summary, and random work to do."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from loop import clock, make_optimizers, train_step
from options import TrainConfig
from torch import Tensor

from data import UserError
from data.batches import Batch
from model import Model, ModelConfig
from train import hardware


# ----------------------------------------------------------------------------------------- timing
def interleave(
    variants: dict[str, Callable[[], object]], rounds: int, device: torch.device, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each variant in each round. CUDA work is waited for."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    awake = torch.zeros(1 << 17)
    started, total = time.monotonic(), (warmup + rounds) * len(variants)
    for i in range(warmup + rounds):
        for j, (name, function) in enumerate(variants.items()):
            done = i * len(variants) + j
            left = ""
            if done:
                left = f", {clock((time.monotonic() - started) / done * (total - done))} left"
            line = f"round {i + 1}/{warmup + rounds}: {name}{left}"
            print(f"\r{line:<70}", end="", file=sys.stderr, flush=True)
            time.sleep(0.02)  # threads of other libraries spin for a while when their work is done;
            for _ in range(20):  # and those of PyTorch have to be woken
                awake.add_(1)
            begun = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i >= warmup:
                times[name].append(time.perf_counter() - begun)
    print(f"\r{'':70}\r", end="", file=sys.stderr, flush=True)
    return times


def summarize(times: dict[str, list[float]], baseline: str) -> dict[str, dict]:
    """Median, quartiles (ms) and the median of the ratios to the baseline in the same round."""
    rows = {}
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times[baseline], strict=True)]
        low, _, high = (
            statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        )
        rows[name] = {
            "median_ms": 1e3 * statistics.median(values),
            "quartiles_ms": [1e3 * low, 1e3 * high],
            "ratio": statistics.median(ratios),
        }
    return rows


def repeat(function: Callable, calls: int) -> Callable:
    def run() -> None:
        for _ in range(calls):
            function()

    return run


def spread(row: dict) -> str:
    digits = 3 if row["median_ms"] < 10 else 1
    return " - ".join(f"{value:,.{digits}f}" for value in row["quartiles_ms"])


def header(name: str, device: torch.device, args: argparse.Namespace) -> dict:
    """What every benchmark's JSON begins with."""
    return {
        "benchmark": name,
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": args.rounds,
    }


# ------------------------------------------------------------------------------------------- work
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


def random_ids(rows: int, args: argparse.Namespace, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(4, args.vocab - 1, (rows, args.tokens), generator=generator).to(device)


def random_batch(size: int, tokens: int, vocab: int, device: torch.device) -> Batch:
    """A batch like length-bucketed ones: a few rows are a little shorter, so masks are used."""
    ids = torch.randint(4, vocab - 1, (size, tokens))
    lengths = torch.randint(max(1, tokens - 4), tokens + 1, (size, 1))
    mask = torch.arange(tokens) < lengths
    labels = torch.randint(3, (size,))
    return Batch(ids.masked_fill(~mask, 1), mask, labels, int(mask.sum())).to(device)


def training_step(
    model: Model,
    teacher: Model | None,
    batches: list[Batch],
    config: TrainConfig,
    parts: tuple[str, ...] = (),
) -> tuple[Callable[[], object], list[torch.optim.Optimizer]]:
    """A function that trains a model by one step a call, and its optimizers."""
    optimizers = make_optimizers(model, config.weight_decay)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = 1e-5
    turn = iter(range(10**9))

    def step() -> None:
        batch = batches[next(turn) % len(batches)]
        train_step(model, teacher, batch, optimizers, config, parts)

    return step, optimizers

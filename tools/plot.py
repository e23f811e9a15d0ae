"""Figures of the JSON that train.py and bench.py write. This file alone needs matplotlib.

    python tools/plot.py out/*/results.json --out accuracy.png      # several runs: score against bit width
    python tools/plot.py out/*/results.json --languages --out languages.png  # one width: loss by language
    python tools/plot.py out/NAME/results.json --errors --out errors.png   # --analyze: error by layer
    python tools/plot.py out/*/results.json --recovery --out recovery.png  # --analyze: attention order by loss
    python tools/plot.py out/*/results.json --curves --out curves.png      # score on dev against step, by loss
    python tools/plot.py train.json --out steps.png           # bench.py train|model|matmul|tt --json

Means and standard deviations are over seeds.
"""

import argparse
import itertools
import json
import os
import sys
from contextlib import suppress

import numpy as np

if __package__ in (None, ""):  # run as a script: put the repository root on the path
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from config import base_of
from data.tasks import Task
from kit.common import UserError, exit_status, flag
from repair import REPAIRS
from tools.compare import VARIANTS, check_comparable, group_runs, read_runs, width_of

GREEN, ORANGE, PURPLE, GRAY = "#1b9e77", "#d95f02", "#7570b3", "#555555"
COLORS = {"fp32": GRAY, "ptq": ORANGE, "ptq-static": "#e6ab02", "qat": PURPLE, "sdq": GREEN}
COLORS |= {"onnxruntime": "#8da0cb", "openvino": "#66a9d9"}
LOSS_COLORS = (GREEN, "#e7298a", "#66a61e", "#1f78b4", "#e6ab02", "#a6761d", "#666666")


def color_of(method: str) -> str | tuple[float, ...]:
    """The color of a row; a darker one for each combination of repairs that follow it."""
    base, *repairs = method.split("+")
    if not repairs:
        return COLORS[base]
    darker = sum(2**i for i, name in enumerate(REPAIRS) if name in repairs) / 2 ** len(REPAIRS)
    return tuple(int(COLORS[base][i : i + 2], 16) / 255 * (1 - 0.8 * darker) for i in (1, 3, 5))


def mean_and_std(values: list) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation over the first axis, the seeds; 0 for a single seed."""
    values = np.array(values, dtype=float)
    return values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros_like(values[0])


def count_seeds(count: int) -> str:
    return f"{count} seed{'s' if count > 1 else ''}"


def check_same(runs: list[dict], *names: str, instead: str = "") -> None:
    """Raise UserError for runs that differ in an option of one figure."""
    for name, run in itertools.product(names, runs):
        if run["config"][name] != runs[0]["config"][name]:
            what = f"differ in {flag(name)}: draw one of them{instead}"
            raise UserError(f"{run['path']} and {runs[0]['path']} {what}")


# ------------------------------------------------------------------------------- scores of methods
def metric_name(task: Task) -> str:
    """What a task's score is: "accuracy, %", or "mean of pearson and spearman, %"."""
    if not task.labels:  # whichever the test files are for
        return " or ".join(task.metrics) + ", %"
    return ("mean of " if len(task.metrics) > 1 else "") + " and ".join(task.metrics) + ", %"


def draw_bits(axes, runs: list[dict]) -> None:
    """Score against bit width: a line per method, error bars of one standard deviation over seeds."""
    check_comparable(runs)
    check_same(runs, "task", "distill", "tt_rank", instead=", or use --recovery")
    scores = {}
    for label, rows in group_runs(runs).items():
        scores[label.method, label.width] = [row["compared"] for row in rows.values()]
    widths = list(dict.fromkeys(width for _, width in scores if width))[::-1]
    if ("fp32", "") in scores:
        axes.axhline(mean_and_std(scores["fp32", ""])[0], color=GRAY, ls="--", label="fp32")
    methods = list(dict.fromkeys(name for base in COLORS for name, width in scores if width and base_of(name) == base))
    for i, name in enumerate(methods):
        places = [k for k, width in enumerate(widths) if (name, width) in scores]
        points = [mean_and_std(scores[name, widths[k]]) for k in places]
        shifted = [k + 0.06 * (i - (len(methods) - 1) / 2) for k in places]
        looks = {"color": color_of(name), "marker": "o", "capsize": 3}
        axes.errorbar(shifted, *zip(*points, strict=True), label=name, **looks)
    run, task = runs[0], runs[0]["task"]
    is_mean = task.zero_shot and any(row["zero_shot_mean"] is not None for row in run["methods"].values())
    axes.set_xticks(range(len(widths)), widths)
    axes.set_xlabel("bits of weights and activations")
    axes.set_ylabel(("zero-shot mean " if is_mean else "") + metric_name(task))
    seeds = count_seeds(max(map(len, scores.values())))
    axes.set_title(f"{task.name} {run['config']['eval_split']}, {run['model']}, {seeds}")
    axes.grid(axis="y", alpha=0.3)


def draw_languages(axes, runs: list[dict]) -> None:
    """What each method loses against float32, by language: a bar per method, error bars of one standard deviation over
    seeds. The training language is first, then the others in the order of their float32 accuracy, which is below them.
    """
    check_comparable(runs)
    check_same(runs, "task", "bits", "act_bits", "distill", *VARIANTS)
    groups, task, config = group_runs(runs), runs[0]["task"], runs[0]["config"]
    full = next((rows for label, rows in groups.items() if label.method == "fp32"), None)
    quantized = [(label, rows) for label, rows in groups.items() if rows is not full]
    if full is None or not quantized or not task.zero_shot:
        raise UserError("--languages needs fp32 and quantized rows of a task with several languages")

    def scores(rows: dict) -> np.ndarray:  # (seeds, languages)
        return np.array([[rows[key]["languages"][name]["score"] for name in names] for key in full if key in rows])

    names = list(runs[0]["languages"])
    accuracy = dict(zip(names, scores(full).mean(0), strict=True))
    names.sort(key=lambda name: (name != task.train_language, -accuracy[name]))
    bar, one_width = 0.8 / len(quantized), len({label.width for label, _ in quantized}) == 1
    for i, (label, rows) in enumerate(quantized):
        places = [k - 0.4 + bar * (i + 0.5) for k in range(len(names))]
        both = {key: row for key, row in full.items() if key in rows}
        means, deviations = mean_and_std(scores(rows) - scores(both))
        looks = {"label": label.method if one_width else str(label), "color": color_of(label.method)}
        axes.bar(places, means, bar, yerr=deviations if len(both) > 1 else None, error_kw={"lw": 0.8}, **looks)
    axes.set_xticks(range(len(names)), [f"{name}\n{accuracy[name]:.1f}" for name in names])
    axes.axhline(0, color=GRAY, lw=0.8)
    axes.set(xlabel=f"language and its float32 {metric_name(task)}", ylabel="difference from float32, points")
    width = f"{width_of(config, VARIANTS)}, " if one_width else ""  # else the legend has the widths
    axes.set_title(f"{task.name} {config['eval_split']}, {runs[0]['model']}, {width}{count_seeds(len(full))}")
    axes.legend(frameon=False, ncols=5 if one_width else 3, loc="upper center", bbox_to_anchor=(0.5, -0.22))
    axes.grid(axis="y", alpha=0.3)


def draw_curves(axes, runs: list[dict]) -> None:
    """Score on dev during distillation: a thin line per seed, a thick one for their mean."""
    check_same(runs, "task", "eval_split")
    config, curves = runs[0]["config"], {}  # loss -> the [step, score on dev] pairs of each seed
    for run in runs:
        if not (curve := run["methods"].get("sdq", {}).get("dev_curve")):
            raise UserError(f"{run['path']}: no sdq row with evaluations on dev")
        curves.setdefault(run["config"]["distill"], []).append(curve)
    for color, (loss, seeds) in zip(itertools.cycle(LOSS_COLORS), curves.items(), strict=False):
        for curve in seeds:
            axes.plot(*zip(*curve, strict=True), color=color, lw=0.6, alpha=0.5)
        steps = sorted(set.intersection(*({step for step, _ in curve} for curve in seeds)))
        means = np.mean([[dict(curve)[step] for step in steps] for curve in seeds], axis=0)
        axes.plot(steps, means, color=color, lw=2.2, label=f"{loss}, {count_seeds(len(seeds))}")
    axes.set(xlabel="step", ylabel=f"dev {metric_name(runs[0]['task'])}")
    axes.set_title(f"{config['task']}, {runs[0]['model']}, {width_of(config)}: distillation")
    axes.grid(axis="y", alpha=0.3)


# ---------------------------------------------------------------------------- train.py --analyze
def draw_errors(axes, runs: list[dict]) -> None:
    """Relative error by layer: a panel per place (query, key, value, ...), a line per method."""
    if len(runs) != 1:
        raise UserError("--errors draws one results.json of train.py --analyze")
    (run,) = runs
    errors = {name: row["errors"] for name, row in run["methods"].items() if "errors" in row}
    if not errors:
        raise UserError(f"{run['path']}: no errors in this file: run train.py with --analyze")
    for panel, place in zip(axes, next(iter(errors.values()))["local"], strict=True):
        for name, kinds in errors.items():
            for kind, style in ("accumulated", "-"), ("local", ":"):
                values = [100 * layer["relative"] for layer in kinds[kind][place]]
                layers = range(1, len(values) + 1)
                panel.plot(layers, values, style, color=color_of(name), marker=".", label=f"{name}, {kind}")
        panel.set(title=place, xlabel="layer", xticks=layers[:: 1 + len(layers) // 9])
    axes[0].set_ylabel("relative error, %")
    axes[0].figure.suptitle(f"{run['model']}, {width_of(run['config'])}, against its float32 self")


RECOVERY = {"ranking": "ranking loss: flipped pairs, %", "cover": "cover length ratio, %"}


def read_recovery(runs: list[dict]) -> dict[str, dict[str, list[list[float]]]]:
    """Label -> "ranking" or "cover" -> for each seed, the value of each layer, a mean over tasks.

    The label is "PTQ", "QAT" or the loss of a distilled student.
    """
    check_comparable(runs)
    check_same(runs, "bits", "act_bits")
    found, curves = {}, {}  # found: (label, seed) -> task -> recovery
    for run in runs:
        config = run["config"]
        measured = {name: row["recovery"] for name, row in run["methods"].items() if "recovery" in row}
        if not measured:
            raise UserError(f"{run['path']}: no recovery in this file: run train.py with --analyze")
        for name, recovery in measured.items():  # PTQ and QAT do not depend on the loss: all runs have the same ones
            label = config["distill"] if name == "sdq" else name.upper()
            found.setdefault((label, config["seed"]), {}).setdefault(config["task"], recovery)
    for (label, seed), by_task in found.items():
        if missing := {run["config"]["task"] for run in runs} - {*by_task}:
            raise UserError(f"no run of {label} on {min(missing)}, seed {seed}: leave out a task")
        for kind in RECOVERY:
            means = np.mean([recovery[kind] for recovery in by_task.values()], axis=0)
            curves.setdefault(label, {}).setdefault(kind, []).append(means.tolist())
    return curves


def draw_recovery(axes, runs: list[dict]) -> None:
    """How far the student's attention is from the teacher's, by layer (Kim et al. 2022): a line per loss with a band
    of one standard deviation over seeds; lower is better.
    """
    curves = read_recovery(runs)
    colors = {name.upper(): color for name, color in COLORS.items()}
    losses = [label for label in curves if label not in colors]
    colors |= dict(zip(losses, itertools.cycle(LOSS_COLORS), strict=False))
    for panel, (kind, title) in zip(axes, RECOVERY.items(), strict=True):
        for label, kinds in curves.items():
            means, deviations = mean_and_std(100 * np.array(kinds[kind]))
            color, style = colors[label], "-" if label in losses else "--"
            layers = range(1, len(means) + 1)
            panel.plot(layers, means, style, color=color, marker=".", label=label)
            panel.fill_between(layers, means - deviations, means + deviations, color=color, alpha=0.15, lw=0)
        panel.set(xlabel="layer", ylabel=title, xticks=layers)
        panel.grid(axis="y", alpha=0.3)
    seeds = count_seeds(max(len(kinds["ranking"]) for kinds in curves.values()))
    tasks = ", ".join(sorted({run["task"].name for run in runs}))
    title = f"Attention against the float32 teacher's, {width_of(runs[0]['config'])}, {seeds}; {tasks}"
    axes[0].figure.suptitle(title, fontsize=10)


# ------------------------------------------------------------------------------------- benchmarks
def measured_on(result: dict) -> str:
    return f"{result['hardware']}, {result['threads']} threads"


def draw_time(panel, place: int, row: dict, color: str, **looks) -> None:
    """A bar of the median time, with its quartiles."""
    median, (low, high) = row["median_ms"], row["quartiles_ms"]
    panel.barh(place, median, xerr=[[median - low], [high - median]], color=color, **looks)


def draw_times(axes, result: dict) -> None:
    """bench.py train: a bar per row, with the ratio of its time to the first row's."""
    for i, (name, row) in enumerate(result["rows"].items()):
        draw_time(axes, i, row, COLORS[name.split(",")[0]], capsize=4, height=0.6)
        text = f"  {name}  {row['ratio']:.2f}x the time"
        axes.text(0, i, text, va="center", color="white", weight="bold", fontsize=8)
    axes.set_yticks([])
    axes.invert_yaxis()
    shape = result["shape"]
    axes.set(xlabel=f"ms per training step of {shape['batch_size']} x {shape['tokens']} tokens")
    axes.set_title(f"{shape['layers']} layers of {shape['hidden']}; {measured_on(result)}")


def draw_model(axes, result: dict) -> None:
    """bench.py model: the speed-up of each backend, a group of bars per batch size."""
    rows = result["rows"]
    names = list(dict.fromkeys(row["name"] for row in rows))
    sizes = list(dict.fromkeys((row["batch_size"], row["tokens"]) for row in rows))
    width = 0.85 / len(names)
    for i, name in enumerate(names):
        mine = [row for row in rows if row["name"] == name]
        places = [k - 0.425 + width * (i + 0.5) for k in range(len(sizes))]
        label = f"{name}, {mine[0]['size_bytes'] / 1e6:,.0f} MB"
        hatch = "" if i < 10 else "//"  # there are ten colors
        bars = axes.bar(places, [1 / row["ratio"] for row in mine], width, label=label, hatch=hatch)
        axes.bar_label(bars, fmt="%.2f", fontsize=6, padding=1)
    axes.axhline(1, color=GRAY, lw=0.8, ls="--")
    axes.set_xticks(range(len(sizes)), [f"{count} x {tokens} tokens" for count, tokens in sizes])
    axes.set(ylabel=f"speed-up over {names[0]}", title=measured_on(result))
    axes.legend(frameon=False, fontsize=7, ncols=2)
    axes.set_ylim(top=1.35 * axes.get_ylim()[1])


def draw_matmul(axes, result: dict) -> None:
    """bench.py matmul: the speed-up over float32 against the number of tokens, a panel per shape."""
    rows = result["rows"]
    names = [name for name in dict.fromkeys(row["name"] for row in rows) if name != "fp32"]
    shapes = dict.fromkeys((row["K"], row["N"]) for row in rows)
    for panel, (K, N) in zip(axes, shapes, strict=True):
        for name in names:
            mine = [row for row in rows if (row["name"], row["K"], row["N"]) == (name, K, N)]
            style = ":" if name == "int8 product" else "-"
            speed = [1 / row["ratio"] for row in mine]
            panel.plot([row["M"] for row in mine], speed, style, marker=".", label=name)
        panel.axhline(1, color=GRAY, lw=0.8, ls="--")
        panel.set_xscale("log")
        sizes = sorted({row["M"] for row in rows})
        panel.set_xticks(sizes, sizes, fontsize=8)
        panel.set_xticks([], minor=True)
        panel.set(title=f"{K} -> {N}", xlabel="tokens")
    axes[0].set_ylabel("speed-up over fp32")
    axes[0].figure.suptitle(f"One Linear layer; {measured_on(result)}")


def draw_tt(axes, result: dict) -> None:
    """bench.py tt: the latency of the whole model, a panel per batch size."""
    rows, shape = result["models"], result["shape"]
    for panel, size in zip(axes, dict.fromkeys(row["batch_size"] for row in rows), strict=True):
        mine = [row for row in rows if row["batch_size"] == size]
        for i, row in enumerate(mine):
            is_train, is_float = row["name"].startswith("TT"), "fp32" in row["name"]
            color = (GREEN if is_float else PURPLE) if is_train else GRAY
            draw_time(panel, i, row, color, capsize=3)
            text = f"  {row['median_ms']:.2f} ms, {1 / row['ratio']:.2f}x as fast"
            panel.text(row["quartiles_ms"][1], i, text, va="center", fontsize=8)
        panel.set(xlabel=f"ms for {size} x {shape['tokens']} tokens")
        panel.set_xlim(right=1.9 * max(row["quartiles_ms"][1] for row in mine))
    names = [f"{row['name']}\n{row['size_bytes'] / 1e6:,.2f} MB" for row in mine]
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0].invert_yaxis()  # the panels share it
    size = f"{shape['layers']} layers of {shape['hidden']}, rank {shape['rank']}"
    axes[0].figure.suptitle(f"Tensor trains, {size}; {measured_on(result)}", fontsize=10)


# ------------------------------------------------------------------------------------------- main
BENCHMARKS = {  # name -> (how to draw it, panels, size in inches)
    "train": (draw_times, 1, (8, 2.6)),
    "model": (draw_model, 1, (8, 4)),
    "matmul": (draw_matmul, 3, (8, 3.6)),
    "tt": (draw_tt, 2, (9, 3.6)),
}
KINDS = {  # option -> the same, and its help text
    None: (draw_bits, 1, (8, 4), ""),
    "languages": (draw_languages, 1, (10, 4), "difference from float32 by language"),
    "errors": (draw_errors, 5, (12, 3.2), "error by layer, measured by train.py --analyze"),
    "recovery": (draw_recovery, 2, (9, 4), "order of attention by layer and --distill, measured by train.py --analyze"),
    "curves": (draw_curves, 1, (8, 4), "score on dev against step, by --distill"),
}


def read_benchmark(path: str) -> dict | None:
    """The JSON of bench.py, or None if the file is something else."""
    with suppress(OSError, ValueError, LookupError, TypeError), open(path, encoding="utf-8") as file:
        value = json.load(file)
        return value if value["benchmark"] in BENCHMARKS else None


def draw_figure(files: list[str], kind: str | None):
    """A figure of matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("figures need matplotlib: pip install matplotlib") from None
    if kind is None and (data := read_benchmark(files[0])):
        draw, panels, size = BENCHMARKS[data["benchmark"]]
    else:
        data = read_runs(files)
        check_same(data, "name")
        draw, panels, size, _ = KINDS[kind]
    figure, sharey = Figure(figsize=size, layout="constrained"), kind != "recovery"
    axes = figure.subplots(1, panels, sharey=sharey)  # one panel: no array
    draw(axes, data)
    handles, labels = figure.axes[0].get_legend_handles_labels()  # those of all panels
    if labels and panels > 1:
        figure.legend(handles, labels, ncols=6 if sharey else 4, frameon=False, loc="outside lower center")
    elif labels and not axes.get_legend():
        axes.legend(frameon=False)
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
        if panel.get_ylabel().endswith("%") and kind != "errors":  # a relative error may be larger
            panel.set_ylim(top=min(100, panel.get_ylim()[1]))
    return figure


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Figures from results.json and bench.py's JSON.")
    parser.add_argument("files", nargs="+", metavar="JSON")
    kinds = parser.add_mutually_exclusive_group()
    for name, (*_, text) in KINDS.items():
        if name:
            kinds.add_argument(f"--{name}", dest="kind", action="store_const", const=name, help=text)
    parser.add_argument("--out", required=True, metavar="FILE", help="a .png or .svg file")
    return parser


@exit_status()
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    figure = draw_figure(args.files, args.kind)
    try:
        figure.savefig(args.out, dpi=150)
    except ValueError as error:  # another ending
        raise UserError(f"--out {args.out}: {error}") from None
    print(f"wrote {args.out}")


if __name__ == "__main__":
    sys.exit(main())

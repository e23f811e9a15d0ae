"""Figures from the JSON that train.py and bench.py write. Needs matplotlib, which nothing else here
does.

    python plot.py out/*/results.json --out accuracy.png     # accuracy against bits, mean and spread over seeds
    python plot.py out/NAME/results.json --out languages.png # one run: every language
    python plot.py out/NAME/results.json --errors --out errors.png    # train.py --analyze: error by layer
    python plot.py train.json --out steps.png                # bench.py train|rows|model|matmul --json
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable

from data import UserError, exit_status
from report import over_seeds, read_results

COLORS = {
    "fp32": "#555555",
    "ptq": "#d95f02",
    "ptq-static": "#e6ab02",
    "qat": "#7570b3",
    "sdq": "#1b9e77",
}


def draw_bits(axes, runs: list[dict]) -> None:
    """Accuracy against the bits of the weights: a line a method, an error bar a standard deviation."""
    values = over_seeds(runs)
    some = next(iter(values.values()))
    figure = "zero-shot" if some["zero-shot"] else "en"
    widths = sorted({width for width, _ in values if width}, key=lambda w: int(w[1 : w.index("A")]))
    if ("", "fp32") in values:
        teacher = statistics.fmean(values[("", "fp32")][figure])
        axes.axhline(teacher, color=COLORS["fp32"], ls="--", label="fp32")
    methods = [name for name in COLORS if name != "fp32" and any(n == name for _, n in values)]
    for i, name in enumerate(methods):
        there = [k for k, width in enumerate(widths) if (width, name) in values]
        points = [values[(widths[k], name)][figure] for k in there]
        means = [statistics.fmean(p) for p in points]
        deviations = [statistics.stdev(p) if len(p) > 1 else 0.0 for p in points]
        shifted = [k + 0.06 * (i - (len(methods) - 1) / 2) for k in there]
        axes.errorbar(
            shifted, means, deviations, label=name, color=COLORS[name], marker="o", capsize=3
        )
    axes.set_xticks(range(len(widths)), widths)
    what = "English" if figure == "en" else "zero-shot mean"
    axes.set(xlabel="bits of weights and activations", ylabel=f"{what} accuracy, %")
    seeds = max(len(entry["en"]) for entry in values.values())
    config = runs[0]["config"]
    axes.set_title(f"{config['task']} {config['eval_split']}, {runs[0]['model']}, {seeds} seeds")


def draw_languages(axes, run: dict) -> None:
    """One run: a group of bars a language, a bar a method."""
    methods, languages = run["methods"], run["languages"]
    width = 0.8 / len(methods)
    for i, (name, row) in enumerate(methods.items()):
        heights = [row["languages"][language]["accuracy"] for language in languages]
        places = [k - 0.4 + width * (i + 0.5) for k in range(len(languages))]
        axes.bar(places, heights, width, label=name, color=COLORS[name])
    axes.set_xticks(range(len(languages)), languages)
    config = run["config"]
    axes.set(ylabel="accuracy, %")
    axes.set_title(
        f"{config['task']} {config['eval_split']}, {run['model']}, W{config['bits']}A{config['act_bits']}"
    )


def error_places(run: dict) -> list[str]:
    """query, key, value, ...: where train.py --analyze measured errors."""
    for row in run["methods"].values():
        if "errors" in row:
            return list(row["errors"]["local"])
    raise UserError("no errors in this file: run train.py with --analyze")


def draw_errors(axes, run: dict) -> None:
    """train.py --analyze: relative error by layer, a panel a place, a line a method."""
    for panel, place in zip(axes, error_places(run), strict=True):
        for name, row in run["methods"].items():
            for kind, style in (("accumulated", "-"), ("local", ":")) if "errors" in row else ():
                values = [100 * layer["relative"] for layer in row["errors"][kind][place]]
                label = f"{name}, {kind}" if panel is axes[0] else None
                steps = range(1, len(values) + 1)
                panel.plot(steps, values, style, color=COLORS[name], marker=".", label=label)
        panel.set(title=place, xlabel="layer", xticks=list(steps))
    config = run["config"]
    axes[0].set_ylabel("relative error, %")
    axes[0].figure.suptitle(
        f"{run['model']}, W{config['bits']}A{config['act_bits']}, against its float32 self"
    )


# ------------------------------------------------------------------------------------- benchmarks
def machine(result: dict) -> str:
    return f"{result['hardware']}, {result['threads']} threads"


def draw_bars(axes, rows: dict[str, dict], ratio: Callable[[dict], str]) -> None:
    """A bar a row of a benchmark: the median time, its quartiles, and what it is to the first."""
    for i, (name, row) in enumerate(rows.items()):
        median, (low, high) = row["median_ms"], row["quartiles_ms"]
        color = COLORS.get(name, "#4c72b0" if "int8" in name else COLORS["fp32"])
        axes.barh(
            i, median, xerr=[[median - low], [high - median]], color=color, capsize=4, height=0.6
        )
        text = f"  {name}  {ratio(row)}"
        axes.text(0, i, text, va="center", color="white", weight="bold", fontsize=8)
    axes.set_yticks([])
    axes.invert_yaxis()


def draw_steps(axes, result: dict) -> None:
    """bench.py train: the time of a step, and its ratio to float32's."""
    draw_bars(axes, result["rows"], lambda row: f"{row['ratio']:.2f}x")
    shape = result["shape"]
    axes.set(xlabel=f"ms a step of {shape['batch_size']} x {shape['tokens']} tokens")
    size = f"{shape['layers']} layers of {shape['hidden']}"
    axes.set_title(f"Training step, {size}; {machine(result)}")


def draw_rows(axes, result: dict) -> None:
    """bench.py rows: the time of all of them, and the speed-up."""
    draw_bars(axes, result["rows"], lambda row: f"{1 / row['ratio']:.2f}x as fast")
    axes.set(xlabel=f"ms for {result['shape']['rows']:,} pairs of sentences")
    axes.set_title(f"Texts end to end; {machine(result)}")


def draw_model(axes, result: dict) -> None:
    """bench.py model: speed-up of each form, a group of bars a batch size."""
    rows = result["rows"]
    names = list(dict.fromkeys(row["name"] for row in rows))
    sizes = list(dict.fromkeys(row["batch_size"] for row in rows))
    width = 0.85 / len(names)
    for i, name in enumerate(names):
        mine = [row for row in rows if row["name"] == name]
        places = [k - 0.425 + width * (i + 0.5) for k in range(len(sizes))]
        label = f"{name}, {mine[0]['size_bytes'] / 1e6:,.0f} MB"
        bars = axes.bar(places, [1 / row["ratio"] for row in mine], width, label=label)
        axes.bar_label(bars, fmt="%.2f", fontsize=6, padding=1)
    axes.axhline(1, color=COLORS["fp32"], lw=0.8, ls="--")
    tokens = result["shape"]["tokens"]
    axes.set_xticks(range(len(sizes)), [f"{size} x {tokens} tokens" for size in sizes])
    axes.set(ylabel=f"speed-up over {names[0]}", title=machine(result))
    axes.legend(frameon=False, fontsize=7, ncols=2)
    axes.set_ylim(top=1.35 * axes.get_ylim()[1])


def draw_matmul(axes, result: dict) -> None:
    """bench.py matmul: speed-up over float32 against the number of tokens, a panel a shape."""
    rows = result["rows"]
    names = [name for name in dict.fromkeys(row["name"] for row in rows) if name != "fp32"]
    shapes = dict.fromkeys((row["K"], row["N"]) for row in rows)
    for panel, (K, N) in zip(axes, shapes, strict=True):
        for name in names:
            mine = [row for row in rows if (row["name"], row["K"], row["N"]) == (name, K, N)]
            style = ":" if name == "int8 product" else "-"
            speed = [1 / row["ratio"] for row in mine]
            label = name if panel is axes[0] else None
            panel.plot([row["M"] for row in mine], speed, style, marker=".", label=label)
        panel.axhline(1, color=COLORS["fp32"], lw=0.8, ls="--")
        panel.set_xscale("log")
        sizes = sorted({row["M"] for row in rows})
        panel.set_xticks(sizes, sizes, fontsize=8)
        panel.set_xticks([], minor=True)
        panel.set(title=f"{K} -> {N}", xlabel="tokens")
    axes[0].set_ylabel("speed-up over fp32")
    axes[0].figure.suptitle(f"One Linear layer; {machine(result)}")


BENCHMARKS = {  # name -> (how to draw it, panels, size in inches)
    "train": (draw_steps, 1, (8, 2.6)),
    "rows": (draw_rows, 1, (8, 2.8)),
    "model": (draw_model, 1, (8, 4)),
    "matmul": (draw_matmul, 3, (8, 3.6)),
}


def read_benchmark(path: str) -> dict | None:
    """bench.py's JSON, or None if it is something else."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
        return value if value["benchmark"] in BENCHMARKS else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Figures from results.json and bench.py's JSON.")
    parser.add_argument("files", nargs="+", metavar="JSON")
    parser.add_argument(
        "--errors", action="store_true", help="error by layer, of train.py --analyze"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="a .png or .svg file")
    return parser


def draw(files: list[str], out: str, errors: bool) -> None:
    benchmark = read_benchmark(files[0])
    runs = [] if benchmark else read_results(files)
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot

    if errors and len(runs) != 1:
        raise UserError("--errors draws one results.json of train.py --analyze")
    if benchmark:
        draw_benchmark, panels, size = BENCHMARKS[benchmark["benchmark"]]
    else:
        panels = len(error_places(runs[0])) if errors else 1
        size = (2.4 * panels, 3.2) if errors else (8, 4)
    figure, axes = pyplot.subplots(1, panels, figsize=size, sharey=True, layout="constrained")
    if benchmark:
        draw_benchmark(axes, benchmark)
    elif errors:
        draw_errors(axes, runs[0])
    elif len(runs) == 1:
        draw_languages(axes, runs[0])
    else:
        draw_bits(axes, runs)
    if runs and not errors:
        axes.grid(axis="y", alpha=0.3)
        axes.legend(frameon=False)
    if panels > 1:
        figure.legend(frameon=False, loc="outside lower center", ncols=6)
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write --out {out}: {error}") from None
    print(f"wrote {out}")


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return exit_status(lambda: draw(args.files, args.out, args.errors))


if __name__ == "__main__":
    sys.exit(main())

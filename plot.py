"""Figures from the JSON that train.py and bench.py write. Needs matplotlib, which nothing else here
does.

    python plot.py out/*/results.json --out accuracy.png     # accuracy against bits, mean and spread over seeds
    python plot.py out/NAME/results.json --out languages.png # one run: every language
    python plot.py out/NAME/results.json --errors --out errors.png    # train.py --analyze: error by layer
    python plot.py train.json --out steps.png                # bench.py train --json train.json
"""

import argparse
import json
import statistics
import sys

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


def draw_steps(axes, result: dict) -> None:
    """bench.py train: the time of a step, its quartiles, and the ratio to float32."""
    for i, (name, row) in enumerate(result["rows"].items()):
        median, (low, high) = row["median_ms"], row["quartiles_ms"]
        spread = [[median - low], [high - median]]
        axes.barh(i, median, xerr=spread, color=COLORS[name], capsize=4, height=0.6)
        axes.text(
            0.02 * median,
            i,
            f"{name}  {row['ratio']:.2f}x",
            va="center",
            color="white",
            weight="bold",
        )
    axes.set_yticks([])
    axes.invert_yaxis()
    shape = result["shape"]
    axes.set(xlabel=f"ms a step of {shape['batch_size']} x {shape['tokens']} tokens")
    axes.set_title(
        f"Training step, {shape['layers']} layers of {shape['hidden']}; {result['hardware']}, {result['threads']} threads"
    )


def read_benchmark(path: str) -> dict | None:
    """bench.py's JSON, or None if it is something else."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
        return value if value["benchmark"] == "train" else None
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
    panels = len(error_places(runs[0])) if errors else 1
    size = (2.4 * panels, 3.2) if errors else (8, 4 if runs else 2.6)
    figure, axes = pyplot.subplots(1, panels, figsize=size, sharey=True, layout="constrained")
    if errors:
        draw_errors(axes, runs[0])
        figure.legend(frameon=False, loc="outside lower center", ncols=6)
    elif not runs:
        draw_steps(axes, benchmark)
    elif len(runs) == 1:
        draw_languages(axes, runs[0])
    else:
        draw_bits(axes, runs)
    if runs and not errors:
        axes.grid(axis="y", alpha=0.3)
        axes.legend(frameon=False)
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

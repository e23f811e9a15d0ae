"""Figures from the JSON that train.py and bench.py write. Needs matplotlib, which nothing else here
does.

    python plot.py out/*/results.json --out accuracy.png     # accuracy against bits, mean and spread over seeds
    python plot.py out/NAME/results.json --out languages.png # one run: every language
    python plot.py out/NAME/results.json --errors --out errors.png    # train.py --analyze: error by layer
    python plot.py out/atis*/results.json --sweep --out sweep.png     # tensor trains: accuracy against size
    python plot.py out/*/results.json --curves --out curves.png      # layer by layer: accuracy against step
    python plot.py out/*/results.json --recovery --out recovery.png  # what attention each loss wins back
    python plot.py train.json --out steps.png                # bench.py train|rows|model|matmul|tt --json
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable

from data import UserError, exit_status, flag
from data.glue import GLUE
from report import THE_LOSS, expand, is_glue, loss_label, over_seeds, read_results, score_of_test

COLORS = {
    "fp32": "#555555",
    "ptq": "#d95f02",
    "ptq-static": "#e6ab02",
    "qat": "#7570b3",
    "sdq": "#1b9e77",
}
ORDER_COLORS = {"bottom-up": "#1b9e77", "top-down": "#d95f02", "together": "#7570b3"}
# Of losses, in the order of the files.
LOSS_COLORS = ("#1b9e77", "#e7298a", "#66a61e", "#1f78b4", "#e6ab02", "#a6761d", "#666666")
BITS_COLORS = {32: COLORS["fp32"], 8: "#1b9e77", 4: "#7570b3", 2: "#d95f02"}


def draw_bits(axes, runs: list[dict]) -> None:
    """Accuracy against the bits of the weights: a line a method, an error bar a standard deviation."""
    values = over_seeds(runs)
    some = next(iter(values.values()))
    figure = "zero-shot" if some["zero-shot"] and not is_glue(runs[0]) else "en"  # MNLI: matched
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
    what = "zero-shot mean " if figure == "zero-shot" else "" if is_glue(runs[0]) else "English "
    axes.set(xlabel="bits of weights and activations", ylabel=what + measure(runs[0]))
    seeds = max(len(entry["en"]) for entry in values.values())
    config = runs[0]["config"]
    axes.set_title(f"{config['task']} {config['eval_split']}, {runs[0]['model']}, {seeds} seeds")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)


def measure(run: dict) -> str:
    """What a task's figure is: "accuracy, %", or "mean of pearson and spearman, %"."""
    metrics = GLUE[run["config"]["task"]].metrics if is_glue(run) else ("accuracy",)
    return ("mean of " if len(metrics) > 1 else "") + " and ".join(metrics) + ", %"


def draw_languages(axes, run: dict) -> None:
    """One run: a group of bars a language (a test set), a bar a method."""
    methods, languages = run["methods"], run["languages"]
    width = 0.8 / len(methods)
    for i, (name, row) in enumerate(methods.items()):
        heights = [score_of_test(row["languages"][language]) for language in languages]
        places = [k - 0.4 + width * (i + 0.5) for k in range(len(languages))]
        axes.bar(places, heights, width, label=name, color=COLORS[name])
    axes.set_xticks(range(len(languages)), languages)
    config = run["config"]
    axes.set(ylabel=measure(run))
    axes.set_title(
        f"{config['task']} {config['eval_split']}, {run['model']}, W{config['bits']}A{config['act_bits']}"
    )
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)


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


# ---------------------------------------------------------------------------------- tensor trains
def read_runs(patterns: list[str]) -> dict[str, dict]:
    """Path -> results.json, of runs of one task and split."""
    paths = expand(patterns)
    runs = {}
    for path in paths:
        try:
            with open(path, encoding="utf-8") as file:
                run = json.load(file)
            config = run["config"]
            config["task"], config["eval_split"], config["model"], config["bits"], config["seed"]
            run["methods"].items()
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f"{path} is not a results.json of train.py") from None
        first = next(iter(runs.values()), run)["config"]
        for name in ("task", "eval_split"):
            if config.get(name) != first.get(name):
                raise UserError(f"{path} and {paths[0]} differ in {flag(name)}")
        runs[path] = run
    return runs


def read_sweep(patterns: list[str]) -> tuple[dict, dict]:
    """(config, points) of runs of a joint task: (bits, rank) -> seed -> (MB, intents, slot F1).

    Rank 0 is the dense model. Of every run the float32 row, and the last quantized one.
    """
    runs, points = read_runs(patterns), {}
    for path, run in runs.items():
        config, methods = run["config"], run["methods"]
        rank, bits, seed = config.get("tt_rank", 0), config["bits"], config["seed"]
        quantized = [name for name in methods if name != "fp32"]
        try:
            if "fp32" in methods:  # of a pretrained model it is dense: only students are trains
                full = rank if config["model"] == "scratch" else 0
                points.setdefault((32, full), {}).setdefault(seed, figures(methods["fp32"]))
            if quantized:
                entry = points.setdefault((bits, rank), {})
                if seed in entry and bits != 32:
                    raise UserError(
                        f"{path}: a second run of rank {rank}, {bits} bits, seed {seed}"
                    )
                entry[seed] = figures(methods[quantized[-1]])
        except KeyError:
            raise UserError(f"{path} has no slots: --sweep draws runs of atis or snips") from None
    return next(iter(runs.values()))["config"], points


def figures(row: dict) -> tuple[float, float, float]:
    found = row["languages"]["en"]
    return row["size_bytes"] / 1e6, found["accuracy"], found["slot_f1"]


def draw_sweep(axes, sweep: tuple[dict, dict]) -> None:
    """Intents and slots against the size of the file: a line a width, a point a rank, an error bar
    a standard deviation over seeds; the dense models stand alone.
    """
    config, points = sweep
    lines = {}  # (bits, whether it is dense) -> rank -> figures of each seed
    for (bits, rank), seeds in sorted(points.items(), key=lambda item: (-item[0][0], item[0][1])):
        lines.setdefault((bits, rank == 0), {})[rank] = list(seeds.values())
    for i, title in enumerate(("intent accuracy", "slot F1")):
        for (bits, is_dense), line in lines.items():
            draw_width(axes[i], i + 1, bits, is_dense, line)
        axes[i].set(xscale="log", xlabel="MB on disk", ylabel=f"{title}, %")
        axes[i].grid(axis="y", alpha=0.3)
    seeds = max(map(len, points.values()))
    of_seeds = f"{seeds} seed{'s' if seeds > 1 else ''}"
    title = f"{config['task']} {config['eval_split']}, {of_seeds}; numbers are ranks"
    axes[0].figure.suptitle(title)


def draw_width(panel, column: int, bits: int, is_dense: bool, line: dict[int, list]) -> None:
    """One line of draw_sweep. column: of the figures, 1 intents or 2 slots."""
    sizes = [statistics.fmean(seed[0] for seed in seeds) for seeds in line.values()]
    values = [[seed[column] for seed in seeds] for seeds in line.values()]
    means = [statistics.fmean(each) for each in values]
    deviations = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values]
    kind, marker, style = ("dense", "D", "") if is_dense else ("tensor trains", "o", "-")
    width = "float32" if bits == 32 else f"{bits} bits"
    label = f"{kind}, {width}" if column == 1 else None
    color, looks = BITS_COLORS.get(bits), {"marker": marker, "ls": style, "capsize": 3}
    panel.errorbar(sizes, means, deviations, label=label, color=color, **looks)
    if is_dense and bits == 32:
        panel.axhline(means[0], color=color, lw=0.8, ls="--")
    if is_dense:
        return
    for place in zip(line, sizes, means, strict=True):
        above = {"textcoords": "offset points", "fontsize": 7, "color": color}
        panel.annotate(str(place[0]), place[1:], (-4, 5), ha="right", **above)


def read_curves(patterns: list[str]) -> dict[str, list[list]]:
    """Order of layer-by-layer distillation -> a run's [step, accuracy on dev] pairs each."""
    curves = {}
    for path, run in read_runs(patterns).items():
        curve = run["methods"].get("sdq", {}).get("dev_curve")
        if not curve:
            raise UserError(f"{path}: no sdq row with looks at dev")
        curves.setdefault(run["config"].get("order", "bottom-up"), []).append(curve)
    return curves


def draw_curves(axes, curves: dict[str, list[list]]) -> None:
    """Accuracy on dev while students are trained: a thin line a seed, a thick one for their mean."""
    for order, color in ORDER_COLORS.items():
        runs = curves.get(order)
        if not runs:
            continue
        for curve in runs:
            axes.plot(*zip(*curve, strict=True), color=color, lw=0.6, alpha=0.5)
        steps = sorted(set.intersection(*({step for step, _ in curve} for curve in runs)))
        means = [statistics.fmean(dict(curve)[step] for curve in runs) for step in steps]
        seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
        axes.plot(steps, means, color=color, lw=2.2, label=f"{order}, {seeds}")
    axes.set(xlabel="step", ylabel="accuracy on English dev, %")
    axes.set_title("Layer-by-layer distillation: the order in which blocks join")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)


# -------------------------------------------------------------------------------------- recovery
RECOVERY = {"ranking": "ranking loss: flipped pairs, %", "cover": "cover length ratio, %"}


def read_recovery(patterns: list[str]) -> tuple[dict, dict[str, dict[str, list[list[float]]]]]:
    """(config, curves): label -> "ranking" or "cover" -> for each seed, the value of each layer.
    config["tasks"]: the names of all.

    The label is "PTQ", "QAT" or what was distilled. A seed's curve is the mean over its tasks.
    """
    paths = expand(patterns)
    runs = read_results(paths, losses=True)
    found = {}  # label -> seed -> task -> recovery
    for path, run in zip(paths, runs, strict=True):
        config = run["config"]
        seed, task = config["seed"], config["task"]
        for name in ("bits", "act_bits"):
            if config[name] != runs[0]["config"][name]:
                raise UserError(f"{path} and {paths[0]} differ in {flag(name)}")
        measured = {name: row for name, row in run["methods"].items() if "recovery" in row}
        if not measured:
            raise UserError(f"{path}: no recovery in this file: run train.py with --analyze")
        for name, row in measured.items():
            label = loss_label(config, name) if name == "sdq" else name.upper()
            # PTQ and QAT distil nothing: the runs of all losses have them, and they are the same
            found.setdefault(label, {}).setdefault(seed, {}).setdefault(task, row["recovery"])
    check_recovery(found)
    tasks = sorted({run["config"]["task"] for run in runs})
    return runs[0]["config"] | {"tasks": tasks}, {
        label: {kind: [mean_curve(tasks, kind) for tasks in seeds.values()] for kind in RECOVERY}
        for label, seeds in found.items()
    }


def check_recovery(found: dict[str, dict[int, dict[str, dict]]]) -> None:
    """Raises UserError where means would be of different tasks, or of models of different depth."""
    every = {task for seeds in found.values() for tasks in seeds.values() for task in tasks}
    depths = set()
    for label, seeds in found.items():
        for seed, tasks in seeds.items():
            if missing := sorted(every - set(tasks)):
                raise UserError(f"no run of {label} on {missing[0]}, seed {seed}: leave out a task")
            depths |= {len(recovery[kind]) for recovery in tasks.values() for kind in RECOVERY}
    if len(depths) > 1:
        raise UserError(f"these runs are of models with {sorted(depths)} layers: draw one of them")


def mean_curve(tasks: dict[str, dict], kind: str) -> list[float]:
    """Layer by layer, the mean over tasks."""
    return [statistics.fmean(x) for x in zip(*(row[kind] for row in tasks.values()), strict=True)]


def draw_recovery(axes, recovery: tuple[dict, dict]) -> None:
    """Kim et al. 2022: how far attention is from the teacher's, by layer: a line a loss, its band a
    standard deviation over seeds; lower is better.
    """
    config, curves = recovery
    losses = [label for label in curves if label.lower() not in COLORS]
    colors = {label: LOSS_COLORS[i % len(LOSS_COLORS)] for i, label in enumerate(losses)}
    for panel, (kind, title) in zip(axes, RECOVERY.items(), strict=True):
        for label, kinds in curves.items():
            by_layer = [[100 * x for x in layer] for layer in zip(*kinds[kind], strict=True)]
            means = [statistics.fmean(x) for x in by_layer]
            deviations = [statistics.stdev(x) if len(x) > 1 else 0.0 for x in by_layer]
            color = colors.get(label) or COLORS[label.lower()]
            style = "-" if label in colors else "--"
            layers = range(1, len(means) + 1)
            named = label if panel is axes[0] else None
            panel.plot(layers, means, style, color=color, marker=".", label=named)
            low = [mean - x for mean, x in zip(means, deviations, strict=True)]
            high = [mean + x for mean, x in zip(means, deviations, strict=True)]
            panel.fill_between(layers, low, high, color=color, alpha=0.15, lw=0)
        panel.set(xlabel="layer", ylabel=title, xticks=list(layers))
        panel.grid(axis="y", alpha=0.3)
    seeds = max(len(kinds["ranking"]) for kinds in curves.values())
    of_seeds = f"{seeds} seed{'s' if seeds > 1 else ''}"
    width = f"W{config['bits']}A{config['act_bits']}"
    title = f"Attention against the float32 teacher's, {width}, {of_seeds}"
    axes[0].figure.suptitle(f"{title}; {', '.join(config['tasks'])}", fontsize=10)


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


def draw_tt(axes, result: dict) -> None:
    """bench.py tt: the latency of the whole model, a panel a batch size."""
    rows, tokens = result["models"], result["shape"]["tokens"]
    sizes = dict.fromkeys(row["batch_size"] for row in rows)
    for panel, size in zip(axes, sizes, strict=True):
        mine = [row for row in rows if row["batch_size"] == size]
        for i, row in enumerate(mine):
            low, high = row["quartiles_ms"]
            median = row["median_ms"]
            is_train, is_float = row["name"].startswith("TT"), "fp32" in row["name"]
            color = BITS_COLORS[4 if not is_float else 8] if is_train else COLORS["fp32"]
            panel.barh(i, median, xerr=[[median - low], [high - median]], color=color, capsize=3)
            text = f"  {median:.2f} ms, {1 / row['ratio']:.2f}x as fast"
            panel.text(max(median, high), i, text, va="center", fontsize=8)
        panel.set(xlabel=f"ms for {size} x {tokens} tokens")
        panel.set_xlim(right=1.9 * max(row["quartiles_ms"][1] for row in mine))
    names = [f"{row['name']}\n{row['size_bytes'] / 1e6:,.2f} MB" for row in mine]
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0].invert_yaxis()  # the panels share it
    shape = result["shape"]
    size = f"{shape['layers']} layers of {shape['hidden']}, rank {shape['rank']}"
    axes[0].figure.suptitle(f"Tensor trains, {size}; {machine(result)}", fontsize=10)


BENCHMARKS = {  # name -> (how to draw it, panels, size in inches)
    "train": (draw_steps, 1, (8, 2.6)),
    "rows": (draw_rows, 1, (8, 2.8)),
    "model": (draw_model, 1, (8, 4)),
    "matmul": (draw_matmul, 3, (8, 3.6)),
    "tt": (draw_tt, 2, (9, 3.6)),
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
    kinds = parser.add_mutually_exclusive_group()
    for name, text in (
        ("errors", "error by layer, of train.py --analyze"),
        ("sweep", "atis or snips: accuracy against size, of several --tt-rank and --bits"),
        ("curves", "accuracy on dev against step, by --order of --distill layerwise"),
        ("recovery", "order of attention by layer, of train.py --analyze, by --distill"),
    ):
        kinds.add_argument(f"--{name}", dest="kind", action="store_const", const=name, help=text)
    parser.add_argument("--out", required=True, metavar="FILE", help="a .png or .svg file")
    return parser


def plan(files: list[str], kind: str | None) -> tuple:
    """(how to draw it, what, panels, size in inches) of the figure that is asked for."""
    if kind == "sweep":
        return draw_sweep, read_sweep(files), 2, (9, 4)
    if kind == "curves":
        return draw_curves, read_curves(files), 1, (8, 4)
    if kind == "recovery":
        return draw_recovery, read_recovery(files), 2, (9, 4)
    benchmark = read_benchmark(files[0])
    if benchmark:
        draw_benchmark, panels, size = BENCHMARKS[benchmark["benchmark"]]
        return draw_benchmark, benchmark, panels, size
    runs = read_results(files)
    if kind == "errors":
        if len(runs) != 1:
            raise UserError("--errors draws one results.json of train.py --analyze")
        panels = len(error_places(runs[0]))
        return draw_errors, runs[0], panels, (2.4 * panels, 3.2)
    if len(runs) == 1:
        return draw_languages, runs[0], 1, (8, 4)
    for name in ("task", *THE_LOSS):  # a line is a method here: it would mix what these tell apart
        if any(run["config"].get(name) != runs[0]["config"].get(name) for run in runs):
            raise UserError(f"these runs differ in {flag(name)}: draw those of one, or --recovery")
    return draw_bits, runs, 1, (8, 4)


def draw(files: list[str], out: str, kind: str | None) -> None:
    draw_it, what, panels, size = plan(files, kind)
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot

    shared = kind not in ("sweep", "recovery")  # their panels show different things
    figure, axes = pyplot.subplots(1, panels, figsize=size, sharey=shared, layout="constrained")
    draw_it(axes, what)
    if any(panel.get_legend_handles_labels()[0] for panel in figure.axes) and panels > 1:
        figure.legend(frameon=False, loc="outside lower center", ncols=6 if shared else 4)
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write --out {out}: {error}") from None
    finally:
        pyplot.close(figure)
    print(f"wrote {out}")


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return exit_status(lambda: draw(args.files, args.out, args.kind))


if __name__ == "__main__":
    sys.exit(main())

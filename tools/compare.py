"""One table over several runs: mean and standard deviation over seeds.

    python tools/compare.py out/*/results.json               # a row per method and width, or per loss
    python tools/compare.py --languages out/*/results.json   # a column per language
    python tools/compare.py --minus qat out/*/results.json   # differences from a method, paired over rows
    python tools/compare.py out/a/results.json new=out/b/results.json  # "new" in its rows: runs of different code
    python tools/compare.py out/atis*/results.json --latency tt.json   # with times of bench.py tt
    python tools/compare.py out/atis*/results.json --front   # which rows no other beats in both bytes and score

The layout follows the task: a zero-shot task has columns for the training language and the mean of the others, a joint
task has rows for dense models and tensor trains, and other tasks stand side by side, a column each. So do several
zero-shot tasks, with the mean over all their languages, as XGLUE is scored. Seeds are averaged only over runs that
agree in every other option. Where rows differ in it, GFLOP says how many operations (1e9) a sequence of 128 tokens
takes, whatever their bits.
"""

import argparse
import glob
import json
import os
import statistics
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

if __package__ in (None, ""):  # run as a script: put the repository root on the path
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from config import METHODS, SAME_RUN, TrainConfig, base_of, trains
from data.metrics import spearman
from data.tasks import TASKS, Task, find_task
from kit.common import UserError, exit_status, flag, markdown_table
from kit.report import compared_score, mean_columns, mean_of, recovered_percent, worst_language
from repair import REPAIRS

PEERS = ("onnxruntime", "openvino")  # added by tools/peers.py
METHOD_ORDER = (*METHODS, *PEERS)
# Options that a table has rows for or averages over, and those that do not change the result.
MAY_DIFFER = {"seed", "bits", "act_bits", "tt_rank", "tt_embedding_rank", "distill", "methods", "recipe", "name"}
MAY_DIFFER |= {*SAME_RUN}
# Dense models and tensor trains learn at rates of their own, and where only the teacher was trained the options of
# students have their defaults.
MAY_DIFFER_JOINT = {"lr", "epochs", "weight_range", "act_range"}
MAY_DIFFER_JOINT |= {"student_dropout", "student_epochs", "student_lr"}
VARIANTS = "per_tensor act_range weights weight_range".split()  # named in a row's label where runs differ in them
SIZES = ("1", "32")  # texts in a call that tools/peers.py timed
ROW = "name task seed bits act_bits tt_rank tt_embedding_rank distill".split()  # tell two runs apart


# -------------------------------------------------------------------------------------- reading
@contextmanager
def valid_file(path: str, kind: str) -> Iterator[None]:
    """Raise UserError if the file cannot be read, is cut off, or lacks what the block looks up."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{path} is not {kind}") from None


def files_of(argument: str) -> list[tuple[str, str]]:
    """(name, path) of each file of an argument, FILE or NAME=FILE. Expands wildcards, because not every shell does."""
    name, equals, pattern = argument.partition("=")
    if not equals or "/" in name or os.path.exists(argument) or glob.glob(argument):
        name, pattern = "", argument
    return [(name, path) for path in sorted(glob.glob(pattern)) or [pattern]]


def read_runs(arguments: list[str]) -> list[dict]:
    """The results.json files of the command line.

    Adds to each run its "path" and its "task" (a row of TASKS), and to each method its "config" and "compared", the
    score that methods are compared by. An option that a file lacks has its default.
    """
    runs = []
    for name, path in (file for each in arguments for file in files_of(each)):
        with valid_file(path, "a results.json of train.py"):
            with open(path, encoding="utf-8") as file:
                run = json.load(file)
            config = vars(TrainConfig()) | run["config"] | {"name": name}
            task = find_task(run["config"]["task"], config["train_language"])
            run |= {"path": path, "task": task, "config": config}
            for method, row in run["methods"].items():
                base, *repairs = method.split("+")
                place = METHOD_ORDER.index(base), *map([*REPAIRS].index, repairs)
                row |= {"config": config, "compared": compared_score(row, task), "place": place}
        runs.append(run)
    if len({run["task"].name for run in runs}) > 1:
        for row in (row for run in runs if run["task"].zero_shot for row in run["methods"].values()):
            row["compared"] = mean_of(row, "score")
    return runs


def check_comparable(runs: list[dict]) -> None:
    """Raise UserError for two runs that must not stand in one table, or have the same row.

    Each task may have its own recipe, and each width its own --student-lr and --noise. An option that no longer exists
    is compared where both files have it.
    """
    is_joint = any(run["task"].head == "joint" for run in runs)
    may_differ = MAY_DIFFER | (MAY_DIFFER_JOINT if is_joint else {*VARIANTS})
    width = ["bits", *([] if is_joint else VARIANTS)]  # what one --student-lr is for
    shared = {"model", "eval_split"}  # by all tasks
    if is_joint or len({run["task"].zero_shot for run in runs}) > 1:
        shared.add("task")
    seen = {}
    for i, run in enumerate(runs):
        config, trained = run["config"], any(map(trains, run["methods"]))
        for name in [name for name in config if name not in may_differ]:
            same = [] if name in shared else ["task", "name", *(width if name in ("student_lr", "noise") else [])]
            others = [each for each in runs[:i] if all(each["config"][k] == config[k] for k in same)]
            if name.startswith("student_"):  # of no effect where no student was trained
                others = [each for each in others if trained and any(map(trains, each["methods"]))]
            other = next(iter(others), run)
            theirs = other["config"].get(name, config[name])
            if (theirs or None) != (config[name] or None):  # None, 0 and False: off
                what = f"differ in {flag(name)}: put them in separate tables"
                raise UserError(f"{run['path']} and {other['path']} {what}")
        for method in {*run["methods"]} - {"fp32"} or {"fp32"}:
            key = tuple(config[name] for name in (*ROW, *width)), method
            if key in seen:
                what = "have the same seed, width and rank: give one of them, or put a label before one, as in NAME="
                raise UserError(f"{run['path']} and {seen[key]} {what}{run['path']}")
            seen[key] = run["path"]


# ------------------------------------------------------------------------------------- grouping
class Label(NamedTuple):
    """What a row of a table is about; all but the method may be empty."""

    shape: str  # "dense", "TT rank 20"
    method: str
    loss: str  # "logits+map", where rows are told apart by it
    width: str  # "W8A8", "W8A8 per tensor static"
    name: str  # that of NAME=FILE

    def __str__(self) -> str:
        repairs = self.method.partition("+")[2]  # that distillation started from
        loss = f"{self.loss} from {repairs}" if self.loss and repairs else self.loss
        return " ".join(filter(None, (self.shape, loss or self.method, self.width, self.name)))


def group_runs(runs: list[dict]) -> dict[Label, dict[tuple[str, int], dict]]:
    """Label -> (task, seed) -> the results of that method, in the order of the table's rows.

    Several files may have the same row: float32 of every width, PTQ and QAT of every loss. It is counted once.
    """
    losses = {run["config"]["distill"] for run in runs if "sdq" in map(base_of, run["methods"])}
    is_joint = runs[0]["task"].head == "joint"
    has_shapes = is_joint or any(run["config"]["tt_rank"] for run in runs)
    by_loss = not (is_joint or runs[0]["task"].zero_shot) or len(losses) > 1
    quantized = [run["config"] for run in runs if {*run["methods"]} - {"fp32", *PEERS}]
    quantized += [vars(TrainConfig()) for run in runs if {*run["methods"]} & {*PEERS}]  # they have a scale per channel
    told = [] if is_joint else [name for name in VARIANTS if len({config[name] for config in quantized}) > 1]
    found = []
    for row, method in ((row, name) for run in runs for name, row in run["methods"].items()):
        config = row["config"]
        loss = config["distill"] if base_of(method) == "sdq" else ""
        losses = [part.rpartition("*")[2] for part in loss.split("+")]  # without their weights
        rank, embedding_rank = tt_rank(config, method), config["tt_embedding_rank"]
        shape = f"TT rank {rank}" if rank else "dense"
        if rank and embedding_rank:
            shape += f", embedding {embedding_rank}"
        width = "" if method == "fp32" else "W8A8" if method in PEERS else width_of(config, told)
        label = Label(shape if has_shapes else "", method, loss if by_loss else "", width, config["name"])
        variants = [config[name] != getattr(TrainConfig, name) for name in VARIANTS]
        place = (rank, embedding_rank, method != "fp32", -config["bits"], -config["act_bits"], method in PEERS)
        place += (variants, config["weights"], row["place"], len(losses), losses, loss, config["name"])
        place += ("milliseconds" not in row,)  # of equal rows the one that was timed
        found.append((place, label, (config["task"], config["seed"]), row))
    groups: dict[Label, dict[tuple[str, int], dict]] = {}
    for _, label, key, row in sorted(found, key=lambda entry: entry[0]):
        groups.setdefault(label, {}).setdefault(key, row)
    return groups


def tt_rank(config: dict, method: str) -> int:
    """Rank of a model's tensor trains, 0 if it is dense, as the teacher of a pretrained model is."""
    return 0 if method == "fp32" and not str(config["model"]).startswith("scratch") else config["tt_rank"]


def width_of(config: dict, variants: Iterable[str] = ()) -> str:
    """The bits, and the named options in words where they are not the default: "W8A8 per tensor static"."""
    words = [f"W{config['bits']}A{config['act_bits']}"]
    for name in variants:
        value, text = config[name], name.replace("_", " ")
        if value not in (getattr(TrainConfig, name), "minmax", *words):  # "lsq" once, though it names two options
            words.append(value if isinstance(value, str) else text if value is True else f"{text} {value:g}")
    return " ".join(words)


def format_mean(values: Iterable[float]) -> str:
    """Mean ± sample standard deviation; only the mean of a single value, "-" for none.

    >>> format_mean([80.0, 82.0]), format_mean([80.0])
    ('81.00 ± 1.41', '80.00')
    """
    values = list(values)
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def more_columns(groups: dict[Label, dict[tuple[str, int], dict]], scores: dict | None) -> dict[str, dict[Label, str]]:
    """Title -> cells: operations, where rows differ in them; with scores (label -> one per seed), which rows no other
    beats: not larger, not worse, and not equal.
    """
    flops = {label: [row["flops"] for row in rows.values() if "flops" in row] for label, rows in groups.items()}
    columns = {"GFLOP": {label: f"{counts[0] / 1e9:.3g}" if counts else "-" for label, counts in flops.items()}}
    if len({*columns["GFLOP"].values()} - {"-"}) < 2:
        del columns["GFLOP"]
    if scores is not None:
        bytes_of = {label: statistics.fmean(row["size_bytes"] for row in groups[label].values()) for label in groups}
        costs = {label: np.array([bytes_of[label], -np.mean(each)]) for label, each in scores.items() if each}
        beaten = {a for a, x in costs.items() for y in costs.values() if (y <= x).all() and (y < x).any()}
        columns["front"] = {label: "yes" if label in costs and label not in beaten else "-" for label in groups}
    return columns


def baseline(labels: Iterable[Label], label: Label, method: str) -> Label | None:
    """The row of a method that a row is compared with: of its shape and width; float32 may be dense instead."""
    shapes = (label.shape, "dense") if method == "fp32" else (label.shape,)
    found = (x for shape in shapes for x in labels if (x.shape, x.method, x.name) == (shape, method, label.name))
    return next((x for x in found if x.width in ("", label.width)), None)


# --------------------------------------------------------------------------------------- tables
def scores_table(runs: list[dict], with_front: bool) -> str:
    """A row per method and width, or loss and width. Columns: the training language and the zero-shot mean, or each
    task's score and their mean; beside repairs also the seconds of each row's work; with_front: which rows are on it.

    "recovered" compares means over the tasks, of the seeds that have them all.
    """
    groups = group_runs(runs)
    there = {run["task"].name: run["task"] for run in runs}
    tasks = [there[name] for name in TASKS if name in there]
    means = {label: mean_over_tasks(rows, tasks) for label, rows in groups.items()}
    lines, repaired = [], any("+" in label.method for label in groups)
    more = more_columns(groups, {x: [*each.values()] for x, each in means.items()} if with_front else None)
    for label, rows in groups.items():
        counts = [sum(name == task.name for name, _ in rows) for task in tasks]
        seeds = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
        scores = score_cells(rows, tasks).values()
        megabytes = statistics.fmean(row["size_bytes"] / 1e6 for row in rows.values())
        cells = [str(label), seeds, *scores, format_recovered(means, label), f"{megabytes:.1f}"]
        cells += [column[label] for column in more.values()]
        cells.append(f"{statistics.fmean(row['train_seconds'] for row in rows.values()):.0f}" if repaired else "-")
        times = [row.get("milliseconds", {}) for row in rows.values()]  # of tools/peers.py
        lines.append(cells + [format_mean(t[size] for t in times if size in t).split()[0] for size in SIZES])
    header = ["", "seeds", *score_cells({}, tasks), "recovered %", "MB", *more, "work s"]
    header += [f"ms x {size}" for size in SIZES]
    told = [i for i in range(len(header)) if any(line[i] != "-" for line in lines)]  # no empty columns
    return markdown_table([header[i] for i in told], [[line[i] for i in told] for line in lines])


def score_cells(rows: dict[tuple[str, int], dict], tasks: list[Task]) -> dict[str, str]:
    """Column head -> mean and standard deviation over the seeds. "worst" is the language with the lowest mean."""
    cells = {}
    for task in tasks:
        mine = [row for (name, _), row in rows.items() if name == task.name]
        if task.zero_shot and len(tasks) == 1:
            means = mean_columns(task) if task.labels else {"mean": "compared"}  # where pairs have no language, of all
            for title, key in means.items():
                cells[title] = format_mean(row[key] for row in mine if row[key] is not None)
            cells["worst"] = worst_cell(mine, task.train_language)
            if not task.labels:
                cells["cosine"] = format_mean(mean_of(row, "cosine") for row in mine)
            continue
        title, cell = ", ".join(task.metrics), format_mean(row["compared"] for row in mine)
        if task.zero_shot:
            title, cell = f"{title}; worst", f"{cell}; {worst_cell(mine, '')}" if mine else "-"
        cells[f"{task.name} ({title})"] = cell
    if len(tasks) > 1:
        cells["mean"] = format_mean(list(mean_over_tasks(rows, tasks).values()))
    return cells


def worst_cell(rows: list[dict], train_language: str) -> str:
    """The language with the lowest mean over seeds, and that mean; "-" if there is no other than train_language."""
    others = sorted({name for row in rows for name in row["languages"]} - {train_language})
    if not others:
        return "-"
    worst = worst_language(rows, others)
    return f"{worst} {format_mean(row['languages'][worst]['score'] for row in rows)}"


def mean_over_tasks(rows: dict[tuple[str, int], dict], tasks: list[Task]) -> dict[int, float]:
    """Seed -> the mean of its scores, for the seeds that have all tasks."""
    return {
        seed: statistics.fmean(rows[task.name, seed]["compared"] for task in tasks)
        for seed in sorted({seed for _, seed in rows})
        if all((task.name, seed) in rows for task in tasks)
    }


def format_recovered(means: dict[Label, dict[int, float]], label: Label) -> str:
    """The percentage of PTQ's mean loss that a method recovers, over the seeds of all three rows; "-" where that is not
    defined. ±: of the percentages of single seeds, if PTQ loses two points with each of them.
    """
    ptq, fp32 = (baseline(means, label, method) for method in ("ptq", "fp32"))
    rows = [means.get(row, {}) for row in (label, ptq, fp32)]
    seeds = set.intersection(*map(set, rows))
    if label in (ptq, fp32) or not seeds:
        return "-"
    percent = recovered_percent(*(statistics.fmean(row[seed] for seed in seeds) for row in rows))
    by_seed = [recovered_percent(*(row[seed] for row in rows)) for seed in seeds]
    spread = "" if len(seeds) == 1 or None in by_seed else f" ± {statistics.stdev(by_seed):.0f}"
    return "-" if percent is None else f"{percent:.0f}{spread}"


def joint_table(runs: list[dict], latency: tuple[int, dict], with_front: bool) -> str:
    """Dense models and tensor trains of all ranks and widths: a row each, a column per metric.

    "smaller": how many times smaller the file is than the dense float32 checkpoint, if that is there. latency: what
    read_latency returns; adds a column of milliseconds per batch size.
    """
    groups, task = group_runs(runs), runs[0]["task"]
    sizes = {label: statistics.fmean(row["size_bytes"] for row in rows.values()) for label, rows in groups.items()}
    scores = {label: [row["compared"] for row in rows.values()] for label, rows in groups.items()}
    more = more_columns(groups, scores if with_front else None)
    rank, times = latency
    batch_sizes = dict.fromkeys(size for _, size in times)
    lines = []
    for label, rows in groups.items():
        dense = sizes.get(Label("dense", "fp32", "", "", label.name))
        results = [row["languages"][task.train_language] for row in rows.values()]
        cells = [str(label), str(len(rows)), f"{sizes[label] / 1e3:,.0f}"]
        cells.append(f"{dense / sizes[label]:.0f}x" if dense else "-")
        cells += [column[label] for column in more.values()]
        cells += [format_mean(each[key] for each in results) for key in task.columns.values()]
        backend = benchmarked_backend(label, next(iter(rows.values()))["config"], rank)
        milliseconds = [times.get((backend, size)) for size in batch_sizes]
        lines.append([*cells, *("-" if ms is None else f"{ms:.1f}" for ms in milliseconds)])
    titles = [*task.columns, *(f"ms x {size}" for size in batch_sizes)]
    return markdown_table(["", "seeds", "kB", "smaller", *more, *titles], lines)


def benchmarked_backend(label: Label, config: dict, rank: int) -> str:
    """The name that bench.py tt gives to a model, "" if it does not measure it."""
    if label.shape == "dense":
        return "" if label.width else "dense fp32"
    if config["tt_rank"] != rank:
        return ""
    return f"TT {label.width} {config['act_range']}" if label.width else "TT fp32, merged"


def read_latency(path: str | None) -> tuple[int, dict[tuple[str, int], float]]:
    """(rank, {(backend, batch size): milliseconds}) of the JSON of bench.py tt."""
    if path is None:
        return 0, {}
    with valid_file(path, "a JSON of bench.py tt"), open(path, encoding="utf-8") as file:
        latency = json.load(file)
        times = {(row["name"], row["batch_size"]): row["median_ms"] for row in latency["models"]}
        return latency["shape"]["rank"], times


def languages_table(runs: list[dict]) -> str:
    """The mean over seeds of every language."""
    languages = list(next(iter(runs[0]["methods"].values()))["languages"])
    lines = []
    for label, rows in group_runs(runs).items():
        scores = [[row["languages"][name]["score"] for row in rows.values()] for name in languages]
        lines.append([str(label), *(f"{statistics.fmean(each):.1f}" for each in scores)])
    return markdown_table(["", *languages], lines)


def paired_table(runs: list[dict], base: str) -> str:
    """Differences of every row from a method of the same width and seed, in points, paired over test rows.

    ±: standard error over the test rows, which are the same in all languages, of the mean over seeds and languages.
    "rank correlation" (Spearman): of the base's accuracy in a language with what the row loses there.
    """
    task, groups, lines = runs[0]["task"], group_runs(runs), []
    if not any(label.method == base for label in groups):
        raise UserError(f"no row of {base}: --minus takes one of {' '.join(dict.fromkeys(x.method for x in groups))}")
    evaluations = [each for run in runs for row in run["methods"].values() for each in row["languages"].values()]
    translated = len({each.get("total") for each in evaluations}) == 1
    if not translated or not all("correct_rows" in each for each in evaluations):
        raise UserError("--minus pairs rows that are the same in all languages: these files hold no such rows")
    for label, rows in groups.items():
        base_rows = groups.get(baseline(groups, label, base), {})
        pairs = [(row, base_rows[key]) for key, row in rows.items() if key in base_rows]
        if label.method == base or not pairs:
            continue
        others = [name for name in pairs[0][0]["languages"] if name != task.train_language]
        cells = {}
        sets = {task.train_language: [task.train_language], "zero-shot": others} if task.labels else {"mean": others}
        for title, names in sets.items():
            each = [[correct_rows(a, name) - correct_rows(b, name) for name in names] for a, b in pairs]
            cells[title] = 100 * np.array(each)  # (seeds, languages, rows)
        zero_shot, means = [*cells.values()][-1], [format_difference(values.mean((0, 1))) for values in cells.values()]
        by_seed = " ".join(f"{value:+.2f}" for value in zero_shot.mean((1, 2)))
        accuracy = np.mean([[row["languages"][name]["score"] for name in others] for _, row in pairs], axis=0)
        rho = spearman(accuracy, -zero_shot.mean((0, 2)))
        lines.append([str(label), str(len(pairs)), *means, by_seed, f"{rho:+.2f}"])
    *_, mean = cells
    return markdown_table([f"minus {base}", "seeds", *cells, f"{mean} by seed", "rank correlation"], lines)


def correct_rows(row: dict, language: str) -> np.ndarray:
    """1.0 for each test row that was predicted right, in the order of the file; of pairs the mean of both directions."""
    evaluation = row["languages"][language]
    packed = np.frombuffer(bytes.fromhex(evaluation["correct_rows"]), np.uint8)
    directions, total = 1 + ("retrieval" in evaluation), evaluation["total"]
    return np.unpackbits(packed, count=directions * total).reshape(directions, total).mean(axis=0)


def format_difference(values: np.ndarray) -> str:
    """Mean with its sign ± standard error."""
    return f"{values.mean():+.2f} ± {values.std(ddof=1) / len(values) ** 0.5:.2f}"


def compare(args: argparse.Namespace) -> str:
    runs = read_runs(args.files)
    check_comparable(runs)
    task = runs[0]["task"]
    if args.languages or args.minus:
        trained_on = {task.train_language} if task.labels else set()
        several = task.zero_shot and (args.languages or trained_on < set(runs[0]["languages"]))
        if not several or any(run["task"].name != task.name for run in runs):
            name = "--languages" if args.languages else "--minus"
            raise UserError(f"these files are not of one task with several languages: leave out {name}")
        return languages_table(runs) if args.languages else paired_table(runs, args.minus)
    if task.head == "joint":
        return joint_table(runs, read_latency(args.latency), args.front)
    return scores_table(runs, args.front)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="One table over the seeds of several runs.")
    parser.add_argument("files", nargs="+", metavar="[NAME=]RESULTS.json", help="NAME: a label for its rows")
    parser.add_argument("--languages", action="store_true", help="a column per language instead")
    parser.add_argument(
        "--minus", metavar="METHOD", help="differences from a method (fp32, qat, ...), paired over rows"
    )
    parser.add_argument("--latency", metavar="JSON", help="joint tasks: add times from bench.py tt --json")
    parser.add_argument("--front", action="store_true", help="say which rows no other beats in bytes and score")
    return parser


@exit_status()
def main(argv: list[str] | None = None) -> None:
    print(compare(build_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())

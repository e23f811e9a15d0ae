"""Numbers -> results.json, the table at the end of a run, and the table over seeds.

    python report.py out/*/results.json               # mean +- standard deviation, a row per width and method
    python report.py --languages out/*/results.json   # the mean of each language

results.json holds, for every method and language, the counts behind each accuracy, so that means
over seeds and paired differences can be worked out from the files alone.
"""

import argparse
import glob
import json
import os
import statistics
import sys
from collections.abc import Callable

from data import UserError, exit_status, flag
from data.glue import GLUE


def write_text(path: str, text: str) -> None:
    """Atomically: a reader never sees half a file."""
    temporary = f"{path}.{os.getpid()}.part"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


def write_json(path: str, value: dict) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def score_of_test(found: dict) -> float:
    """The figure of one test set: the mean of the task's measures, or the accuracy."""
    return found["score"] if "score" in found else found["accuracy"]


def summarize(languages: dict[str, dict], train_language: str) -> dict:
    """Adds what papers report: the training language, and the mean over all others (zero-shot)."""
    scores = {name: score_of_test(row) for name, row in languages.items()}
    others = [score for name, score in scores.items() if name != train_language]
    return {
        "english": scores[train_language],
        "zero_shot_mean": statistics.fmean(others) if others else None,
        "languages": languages,
    }


def score(row: dict) -> float:
    """What methods are compared by: the zero-shot mean, or English where nothing else was tested."""
    return row["english"] if row["zero_shot_mean"] is None else row["zero_shot_mean"]


def score_of_tests(row: dict) -> float:
    """A GLUE task's figure: the mean over its test sets (MNLI has two)."""
    return statistics.fmean(score_of_test(found) for found in row["languages"].values())


def won_back(own: float, ptq: float, full: float) -> float | None:
    """How much of what PTQ lost a method won back, in %: (method - PTQ) / (FP32 - PTQ).

    None where it means nothing: PTQ lost less than two points.
    """
    return 100 * (own - ptq) / (full - ptq) if full - ptq >= 2.0 else None


def recovered(
    methods: dict[str, dict], name: str, figure: Callable[[dict], float] = score
) -> float | None:
    """What the method `name` won back of a row's figure; None also where a row is missing."""
    if name in ("fp32", "ptq") or not {"fp32", "ptq"} <= set(methods):
        return None
    return won_back(*(figure(methods[row]) for row in (name, "ptq", "fp32")))


def is_joint(results: dict) -> bool:
    """Whether a run's task has slots beside the label of the text (ATIS, SNIPS)."""
    rows = results["methods"].values()
    return any("slot_f1" in language for row in rows for language in row["languages"].values())


JOINT = {  # column -> where the figure is, in a language's entry
    "intent": "accuracy",
    "slot F1": "slot_f1",
    "words": "slot_token_f1",
    "sentences": "exact",
}


def joint_table(results: dict) -> str:
    """The report of ATIS or SNIPS: intent accuracy, F1 of slots by span, of words (their accuracy),
    sentences with everything right.
    """
    lines = []
    for name, row in results["methods"].items():
        found, student = row["languages"]["en"], row.get("student")
        cells = [name, *(f"{found[key]:.2f}" for key in JOINT.values())]
        beside = student and student["languages"]["en"]
        cells.append(f"{beside['accuracy']:.2f} / {beside['slot_f1']:.2f}" if beside else "-")
        lines.append([*cells, f"{row['size_bytes'] / 1e6:.3f}", f"{row['train_seconds']:.0f}"])
    return markdown_table(["", *JOINT, "student", "MB", "train s"], lines)


def is_glue(results: dict) -> bool:
    return results["config"]["task"] in GLUE


def glue_table(results: dict) -> str:
    """The report of a GLUE task: its metrics, in % ("matched / mismatched" where there are both)."""
    methods = results["methods"]
    metrics = GLUE[results["config"]["task"]].metrics

    def cells_of(row: dict) -> list[str]:
        tests = row["languages"].values()
        return [" / ".join(f"{found[metric]:.2f}" for found in tests) for metric in metrics]

    lines = []
    for name, row in methods.items():
        won = recovered(methods, name, score_of_tests)
        cells = [name, *cells_of(row), "-" if won is None else f"{won:.0f} %"]
        cells.append(", ".join(cells_of(row["student"])) if "student" in row else "-")
        lines.append([*cells, f"{row['size_bytes'] / 1e6:.1f}", f"{row['train_seconds']:.0f}"])
    return markdown_table(["", *metrics, "recovered", "student", "MB", "train s"], lines)


def table(results: dict) -> str:
    """The report as a Markdown table, one row a method."""
    if is_joint(results):
        return joint_table(results)
    if is_glue(results):
        return glue_table(results)
    methods, languages = results["methods"], results["languages"]
    header = [
        "",
        "en",
        "zero-shot",
        "recovered",
        "student",
        "MB",
        "train s",
        *[x for x in languages if x != "en"],
    ]
    lines = []
    for name, row in methods.items():
        won = recovered(methods, name)
        mean = row["zero_shot_mean"]
        cells = [
            name,
            f"{row['english']:.2f}",
            "-" if mean is None else f"{mean:.2f}",
            "-" if won is None else f"{won:.0f} %",
            pair(row["student"]) if "student" in row else "-",
            f"{row['size_bytes'] / 1e6:.1f}",
            f"{row['train_seconds']:.0f}",
        ]
        cells += [f"{row['languages'][x]['accuracy']:.1f}" for x in languages if x != "en"]
        lines.append(cells)
    return markdown_table(header, lines)


def pair(row: dict) -> str:
    """English / zero-shot mean."""
    mean = row["zero_shot_mean"]
    return f"{row['english']:.2f}" + ("" if mean is None else f" / {mean:.2f}")


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned columns, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def join(cells: list[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        padded[0] = cells[0].ljust(widths[0])
        return "| " + " | ".join(padded) + " |"

    rules = ["-" * (width + 1) + ":" for width in widths]
    rules[0] = "-" * (widths[0] + 2)
    return "\n".join([join(header), "|" + "|".join(rules) + "|", *map(join, rows)])


def markdown(results: dict) -> str:
    """report.md: what was run, on what, and the table."""
    run, where = results["config"], results["environment"]
    notes = [
        f"{run['task']}, model {results['model']}, W{run['bits']}A{run['act_bits']}, seed {run['seed']}; "
        f"{'metrics' if is_glue(results) else 'accuracy'} in % on {run['eval_split']}, trained on "
        f"{results['train_examples']:,} English examples.",
        f"{where['hardware']}, {where['threads']} threads, torch {where['torch']}.",
    ]
    if run["eval_split"] == "dev":
        notes.append("English dev also chose the epoch: these figures flatter every trained row.")
    if is_glue(results) and run["eval_split"] == "test":
        notes.append("Test is GLUE's dev.tsv; a part of train.tsv, held out, chose the epoch.")
    notes.append(
        "MB: the checkpoint on disk; quantized rows hold packed integers and scales. "
        "Figures are the integer model's; student: the fake-quantized one it was made of. "
        "train s: wall time, looks at English dev and saved states included."
    )
    return table(results) + "\n\n" + "\n".join(notes) + "\n"


# ------------------------------------------------------------------------------------- over seeds
# Of ATIS and SNIPS one table compares dense models and tensor trains of all ranks, which learn at
# rates of their own; what concerns students is the default where only the teacher was trained.
MAY_DIFFER_JOINT = "tt_rank tt_embedding_rank lr epochs weight_range act_range".split()
MAY_DIFFER_JOINT += "student_dropout student_epochs student_lr".split()
MAY_DIFFER = "seed bits act_bits out methods threads save_every analyze".split()
# Of GLUE one table compares what is distilled, on several tasks with recipes of their own.
THE_LOSS = ["distill", "gamma", "part_weights"]
EVERY_TASK = ["model", "eval_split"]  # what tasks must share for a mean over them


def expand(patterns: list[str]) -> list[str]:
    """Paths with their wildcards expanded, because not every shell does it."""
    return [path for pattern in patterns for path in (sorted(glob.glob(pattern)) or [pattern])]


def read_results(patterns: list[str], losses: bool = False) -> list[dict]:
    """The given results.json files, all of the same experiment but for width and seed. A width has
    its own --student-lr, as options.STUDENT_LR says.

    losses: also for what is distilled (of GLUE always).
    """
    paths = expand(patterns)
    runs, seen = [], {}
    for path in paths:
        try:
            with open(path, encoding="utf-8") as file:
                run = json.load(file)
            may_differ = MAY_DIFFER + (MAY_DIFFER_JOINT if is_joint(run) else [])
            key = tuple(run["config"][name] for name in ("task", "seed", "bits", "act_bits"))
            key += (run["config"].get("tt_rank", 0), run["config"].get("tt_embedding_rank"))
            if losses or is_glue(run):
                may_differ = MAY_DIFFER + THE_LOSS
                key += tuple(str(run["config"].get(name)) for name in THE_LOSS)
            settings = {k: v for k, v in run["config"].items() if k not in may_differ}
            for row in run["methods"].values():
                row["english"], row["zero_shot_mean"], row["size_bytes"], row["languages"]
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f"{path} is not a results.json of train.py") from None
        same_width = [r for r in runs if r["config"]["bits"] == run["config"]["bits"]]
        same_task = [r for r in runs if r["config"]["task"] == run["config"]["task"]]
        if runs and not same_task and not (is_glue(run) and is_glue(runs[0])):
            raise UserError(f"{path} and {paths[0]} differ in --task: put them in separate tables")
        first = {k: v for k, v in (same_task or [run])[0]["config"].items() if k not in may_differ}
        if "student_lr" in first:
            first["student_lr"] = (same_width or [run])[0]["config"].get("student_lr")
        differs = [k for k in first if settings.get(k) != first[k]]
        differs += [
            k for k in EVERY_TASK if run["config"].get(k) != (runs or [run])[0]["config"].get(k)
        ]
        if differs:
            raise UserError(
                f"{path} and {paths[0]} differ in {flag(differs[0])}: put them in separate tables"
            )
        if key in seen:
            raise UserError(
                f"{path} and {seen[key]} have the same seed, width and rank: give one of them"
            )
        seen[key] = path
        runs.append(run)
    return runs


def over_seeds(runs: list[dict]) -> dict[tuple[str, str], dict[str, list[float]]]:
    """(width, method) -> the values of each figure over the seeds. A width is "W8A8", say; fp32 has
    none.
    """
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    teachers = set()
    for run in sorted(
        runs, key=lambda r: (-r["config"]["bits"], -r["config"]["act_bits"], r["config"]["seed"])
    ):
        config = run["config"]
        for name, row in run["methods"].items():
            if name == "fp32":  # the same teacher in every width: count it once
                if config["seed"] in teachers:
                    continue
                teachers.add(config["seed"])
            width = "" if name == "fp32" else f"W{config['bits']}A{config['act_bits']}"
            values = {"en": row["english"], "zero-shot": row["zero_shot_mean"]}
            values["recovered"] = recovered(run["methods"], name)
            values["MB"] = row["size_bytes"] / 1e6
            values |= {language: score_of_test(x) for language, x in row["languages"].items()}
            entry = found.setdefault((width, name), {key: [] for key in values})
            for key, value in values.items():
                if value is not None:
                    entry[key].append(value)
    return found


def spread(values: list[float], digits: int = 2) -> str:
    """Mean +- sample standard deviation; no deviation for a single value."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def seeds_table(runs: list[dict]) -> str:
    rows = []
    for (width, name), values in over_seeds(runs).items():
        cells = [f"{name} {width}".strip(), str(len(values["en"])), spread(values["en"])]
        cells += [spread(values["zero-shot"]), spread(values["recovered"], 0)]
        rows.append([*cells, f"{statistics.fmean(values['MB']):.1f}"])
    return markdown_table(["", "seeds", "en", "zero-shot", "recovered %", "MB"], rows)


def joint_seeds_table(runs: list[dict], latency: dict | None = None) -> str:
    """ATIS or SNIPS: dense models and tensor trains of all ranks and widths, mean +- std.

    "smaller": how many times, against the dense float32 checkpoint, if that is among the runs.
    latency: what bench.py tt measured; adds the milliseconds of its batches where it has the form.
    """
    found: dict[str, list[dict]] = {}
    forms: dict[str, str] = {}
    seen = set()
    for run in sorted(runs, key=lambda run: (run["config"]["tt_rank"], -run["config"]["bits"])):
        config = run["config"]
        shape = f"TT rank {config['tt_rank']}" if config["tt_rank"] else "dense"
        for name, row in run["methods"].items():
            width = "" if name == "fp32" else f" W{config['bits']}A{config['act_bits']}"
            key = (f"{shape} {name}{width}", config["seed"])
            if key not in seen:  # one float32 model serves every width
                seen.add(key)
                found.setdefault(key[0], []).append(row)
                forms[key[0]] = benchmarked_form(config, width, latency)
    sizes = {
        name: statistics.fmean(row["size_bytes"] for row in rows) for name, rows in found.items()
    }
    dense = sizes.get("dense fp32")
    measured = latency["models"] if latency else []
    batches = list(dict.fromkeys(row["batch_size"] for row in measured))
    lines = []
    for name, rows in found.items():
        entries = [row["languages"]["en"] for row in rows]
        figures = [spread([entry[key] for entry in entries]) for key in JOINT.values()]
        smaller = f"{dense / sizes[name]:.0f}x" if dense else "-"
        times = {
            row["batch_size"]: f"{row['median_ms']:.1f}"
            for row in measured
            if row["name"] == forms[name]
        }
        cells = [name, str(len(rows)), f"{sizes[name] / 1e3:,.0f}", smaller, *figures]
        lines.append([*cells, *(times.get(size, "-") for size in batches)])
    return markdown_table(
        ["", "seeds", "kB", "smaller", *JOINT, *(f"ms x {size}" for size in batches)], lines
    )


def glue_seeds_table(runs: list[dict]) -> str:
    """GLUE: a row for each way to train, a column for each task, and the mean over the tasks.

    A task's figure is the mean of its metrics. What is recovered is told of the means over the tasks
    (of those where every row has the seed), seed by seed.
    """
    found: dict[str, dict[tuple[str, int], float]] = {}  # label -> (task, seed) -> score
    sizes: dict[str, list[float]] = {}
    for run in runs:
        config = run["config"]
        for name, row in run["methods"].items():
            label = glue_label(config, name)
            found.setdefault(label, {}).setdefault(
                (config["task"], config["seed"]), score_of_tests(row)
            )
            sizes.setdefault(label, []).append(row["size_bytes"] / 1e6)
    tasks = [task for task in GLUE if any(run["config"]["task"] == task for run in runs)]
    means = {label: seed_means(scores, tasks) for label, scores in found.items()}
    lines = []
    for label in sorted(found, key=glue_order):
        scores = found[label]
        counts = [sum(name == task for name, _ in scores) for task in tasks]
        least, most = min(counts), max(counts)
        cells = [label, str(most) if least == most else f"{least} to {most}"]
        for task in tasks:
            cells.append(spread([value for (name, _), value in scores.items() if name == task]))
        if len(tasks) > 1:
            cells.append(spread(list(means[label].values())))
        ptq = means.get("ptq" + label[label.rfind(" ") :], {})
        full = means.get("fp32", {})
        seeds = [] if label[:4] in ("fp32", "ptq ") else set(means[label]) & set(ptq) & set(full)
        won = [won_back(means[label][s], ptq[s], full[s]) for s in sorted(seeds)]
        won = [percent for percent in won if percent is not None]
        lines.append([*cells, spread(won, 0), f"{statistics.fmean(sizes[label]):.1f}"])
    titles = [f"{task} ({', '.join(GLUE[task].metrics)})" for task in tasks]
    mean = ["mean"] if len(tasks) > 1 else []
    return markdown_table(["", "seeds", *titles, *mean, "recovered %", "MB"], lines)


def loss_label(config: dict, method: str) -> str:
    """ "ptq", "logits+map": a distilled row is called by what is distilled."""
    if method != "sdq":
        return method
    name = config.get("distill", method)
    if config.get("gamma") is not None:
        name += f", gamma {config['gamma']:g}"
    return ", ".join(filter(None, [name, " ".join(config.get("part_weights") or ())]))


def glue_label(config: dict, method: str) -> str:
    """ "fp32", "ptq W2A8", "logits+map W2A8"."""
    width = "" if method == "fp32" else f" W{config['bits']}A{config['act_bits']}"
    return loss_label(config, method) + width


def glue_order(label: str) -> tuple:
    """Float32, PTQ, QAT, then the losses, from one part to several."""
    first = label.split(" ")[0]
    places = ["fp32", "ptq", "qat"]
    return (places.index(first) if first in places else len(places), label.count("+"), label)


def seed_means(scores: dict[tuple[str, int], float], tasks: list[str]) -> dict[int, float]:
    """Seed -> the mean over the tasks, for the seeds that have them all."""
    seeds = sorted({seed for _, seed in scores})
    return {
        seed: statistics.fmean(scores[task, seed] for task in tasks)
        for seed in seeds
        if all((task, seed) in scores for task in tasks)
    }


def benchmarked_form(config: dict, width: str, latency: dict | None) -> str:
    """The name of a row of bench.py tt that is a run's model, "" if none is."""
    if not config["tt_rank"]:
        return "" if width else "dense fp32"
    if not latency or config["tt_rank"] != latency["shape"]["rank"]:
        return ""
    return f"TT{width} {config['act_range']}" if width else "TT fp32, merged"


def languages_table(runs: list[dict]) -> str:
    """The mean over seeds of every language."""
    languages = runs[0]["languages"]
    rows = []
    for (width, name), values in over_seeds(runs).items():
        means = [f"{statistics.fmean(values[language]):.1f}" for language in languages]
        rows.append([f"{name} {width}".strip(), *means])
    return markdown_table(["", *languages], rows)


def read_latency(path: str | None) -> dict | None:
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            latency = json.load(file)
        latency["shape"]["rank"], latency["models"]
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"{path} is not a JSON of bench.py tt") from None
    return latency


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="One table over the seeds and widths of several runs."
    )
    parser.add_argument("files", nargs="+", metavar="RESULTS.json")
    parser.add_argument("--languages", action="store_true", help="a column a language instead")
    parser.add_argument(
        "--latency", metavar="JSON", help="atis, snips: add times from bench.py tt --json"
    )
    args = parser.parse_args(argv)

    def job() -> None:
        runs = read_results(args.files)
        if args.languages and (is_joint(runs[0]) or is_glue(runs[0])):
            raise UserError(f"{runs[0]['config']['task']} has no languages: leave out --languages")
        if is_joint(runs[0]):
            print(joint_seeds_table(runs, read_latency(args.latency)))
        elif is_glue(runs[0]):
            print(glue_seeds_table(runs))
        else:
            print((languages_table if args.languages else seeds_table)(runs))

    return exit_status(job)


if __name__ == "__main__":
    sys.exit(main())

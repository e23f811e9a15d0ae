"""The report of one run: tables, and the notes under them.

"task" is the run's row of data.tasks.TASKS, "results" the contents of its results.json. All metrics are in %.
"""

import statistics

from kit.common import markdown_table


# ---------------------------------------------------------------------------------------- scores
def summarize_languages(languages: dict[str, dict], train_language: str) -> dict:
    """A row of results.json: the score in the training language, and the mean of all others; None without a test."""
    others = [row["score"] for name, row in languages.items() if name != train_language]
    return {
        "score": languages[train_language]["score"] if train_language in languages else None,
        "zero_shot_mean": statistics.fmean(others) if others else None,
        "languages": languages,
    }


def compared_score(row: dict, task) -> float:
    """The score by which methods are compared: the zero-shot mean, or the mean over the test sets."""
    if task.zero_shot and row["zero_shot_mean"] is not None:
        return row["zero_shot_mean"]
    return mean_of(row, "score")


def worst_language(rows: list[dict], languages: list[str]) -> str:
    """The language with the lowest mean score over the rows."""
    return min(languages, key=lambda name: statistics.fmean(row["languages"][name]["score"] for row in rows))


def recovered_percent(own: float, ptq: float, fp32: float) -> float | None:
    """How much of PTQ's loss a method recovered: (method - PTQ) / (FP32 - PTQ) in %; None if PTQ lost less than two
    points, where the ratio is not meaningful.
    """
    return 100 * (own - ptq) / (fp32 - ptq) if fp32 - ptq >= 2.0 else None


def recovered(methods: dict[str, dict], name: str, task) -> float | None:
    """What the row `name` recovered; None also if a row that it needs is missing."""
    if name in ("fp32", "ptq") or not {"fp32", "ptq"} <= set(methods):
        return None
    return recovered_percent(*(compared_score(methods[row], task) for row in (name, "ptq", "fp32")))


def mean_columns(task) -> dict[str, str]:
    """Column -> key of a row, for a task with several languages. Sentences without labels have no training language."""
    return {task.train_language: "score", "zero-shot": "zero_shot_mean"} if task.labels else {"mean": "zero_shot_mean"}


def mean_of(row: dict, key: str) -> float:
    """The mean over all test sets."""
    return statistics.fmean(test[key] for test in row["languages"].values())


def failed_gate(results: dict, task, most: float) -> str:
    """What --gate says where the last row loses more than `most` points against fp32; "" if it does not."""
    methods, name = results["methods"], results["config"]["methods"][-1]
    row, teacher = methods[name], methods["fp32"]
    losses = {"on the mean": compared_score(teacher, task) - compared_score(row, task)}
    losses |= {
        f"in {key}": test["score"] - row["languages"][key]["score"] for key, test in teacher["languages"].items()
    }
    where = max(losses, key=losses.get)
    text = f"--gate {most:g}: {name} loses {losses[where]:.2f} points {where} against fp32"
    return text if losses[where] > most + 1e-9 else ""


# ---------------------------------------------------------------------------------------- tables
def report_table(results: dict, task) -> str:
    """The report as a Markdown table, one row per method."""
    methods, languages = results["methods"], list(results["languages"])
    by_language = task.zero_shot and languages != [task.train_language]
    others = [name for name in languages if name != task.train_language] if by_language else []
    columns = {title: key for title, key in task.columns.items() if key in first_test(methods)}
    # Means over all test sets, of metrics that methods are not compared by.
    further = {title: key for title, key in columns.items() if key not in task.metrics}
    means = mean_columns(task)

    def figures(row: dict) -> list[str]:
        tests = row["languages"].values()  # of mnli two
        if not by_language:
            return [" / ".join(f"{test[key]:.2f}" for test in tests) for key in columns.values()]
        worst = worst_language([row], others)
        scores = ["-" if row[key] is None else f"{row[key]:.2f}" for key in means.values()]
        more = [f"{mean_of(row, key):.2f}" for key in further.values()]
        return [*scores, f"{worst} {row['languages'][worst]['score']:.1f}", *more]

    header = [*means, "worst", *further] if by_language else list(columns)
    checked = any("student" in row for row in methods.values())
    rows = []
    for name, row in methods.items():
        percent = recovered(methods, name, task)
        cells = [name, *figures(row), "-" if percent is None else f"{percent:.0f} %"]
        cells += [", ".join(figures(row["student"])) if "student" in row else "-"] if checked else []
        megabytes = row["size_bytes"] / 1e6
        cells += [f"{megabytes:.{1 if megabytes >= 1 else 3}f}", f"{row['train_seconds']:.0f}"]
        rows.append(cells + [f"{row['languages'][language]['score']:.1f}" for language in others])
    header += ["recovered", *(["student"] if checked else []), "MB", "train s", *others]
    return markdown_table(["", *header], rows)


def first_test(methods: dict[str, dict]) -> dict:
    return next(iter(next(iter(methods.values()))["languages"].values()))


def analysis_tables(methods: dict[str, dict]) -> str:
    """Markdown tables with a column per layer (analyze.py): the relative error of the contexts in %, that from the
    student's maps / values alone, ranking loss / cover length ratio in %, and the kurtosis of the teacher.
    """
    errors, halves, recoveries, kurtosis = [], [], [], []
    for name, row in methods.items():
        for kind, places in row.get("errors", {}).items():
            errors.append([f"{name} {kind}", *(f"{100 * layer['relative']:.1f}" for layer in places["context"])])
        if "recovery" in row:
            for rows, *pair in ((halves, "generation", "propagation"), (recoveries, "ranking", "cover")):
                layers = zip(*(row["recovery"][key] for key in pair), strict=True)
                rows.append([name, *(f"{100 * a:.1f} / {100 * b:.1f}" for a, b in layers)])
            kurtosis = [["fp32", *(f"{value:.1f}" for value in row["recovery"].get("kurtosis", ()))]]
    header = [f"layer {i + 1}" for i in range(len(errors[0]) - 1)]
    tables = {"error of context, %": errors, "by maps / values, %": halves, "flipped / cover, %": recoveries}
    tables["kurtosis"] = kurtosis
    return "\n\n".join(markdown_table([title, *header], rows) for title, rows in tables.items())


# ----------------------------------------------------------------------------------------- notes
def caveats(results: dict, task) -> list[str]:
    """Notes on the majority baseline, and on methods that predict a single class."""
    notes, rows = [], results["methods"]
    tests = next(iter(rows.values()))["languages"]
    if task.metrics == ("accuracy",) and all("majority" in test for test in tests.values()):
        by_test = {name: f"{test['majority']:.1f}" for name, test in tests.items()}
        scores = set(by_test.values())
        each = scores.pop() if len(scores) == 1 else ", ".join(f"{name} {score}" for name, score in by_test.items())
        notes.append(f"Always predicting the most frequent class of the test rows gives {each}.")
    alone = []
    for name, row in rows.items():
        found = row["languages"].items()
        if where := [language for language, test in found if test.get("classes") == 1 and test["majority"] < 100]:
            alone.append(f"{name} ({', '.join(where)})" if len(found) > 1 else name)
    return notes + ([f"WARNING: one class is predicted for all rows by {', '.join(alone)}."] if alone else [])


def quantization(config: dict) -> str:
    """How the rows of a run were quantized, in words: W8A8 ..."""
    scale, row = ("tensor", "tensor") if config["per_tensor"] else ("channel", "token")
    act_range = f"at run time, per {row}" if config["act_range"] == "dynamic" else config["act_range"]
    act_range += f"; calibrated on {config['calibration']}" if config["calibration"] else ""
    text = f"W{config['bits']}A{config['act_bits']}: {config['weights']} weights, one scale per {scale}, ranges "
    text += f"{config['weight_range']}; activations with ranges {act_range}"
    text += f"; inside attention {config['attention_bits']} bits" if config["attention_bits"] != 32 else ""
    words = {"ptq-static": "static ranges", "qat": f"noise {config['noise']:g}"}
    words["sdq"] = f"{words['qat']}, {config['distill']}"
    bases = dict.fromkeys(name.partition("+")[0] for name in config["methods"])  # without repairs
    return ". ".join([text, *(f"{name}: {words[name]}" for name in bases if name in words)]) + "."


def report(results: dict, task, selected: str) -> str:
    """report.md: what was run, on what, and the table.  selected: the split that the epoch was selected on."""
    run, where, steps = results["config"], results["environment"], results["steps"]
    selected += ", which flatters every trained row" if selected == run["eval_split"] else ""
    tests = ", ".join(f"{name} {rows:,}" for name, rows in results["test_examples"].items()).removeprefix("all ")
    rows, examples = ("rows", "examples") if task.labels else ("sentences", "sentences")
    notes = [
        f"{run['task']}, model {results['model']}, seed {run['seed']}; metrics in % on {run['eval_split']} ({tests} "
        f"{rows}), trained on {results['train_examples']:,} {examples}: teacher {steps['teacher']:,} steps, students "
        f"{steps['students']:,}, of {run['batch_size']}.",
        *([quantization(run)] if set(run["methods"]) != {"fp32"} else []),
        *caveats(results, task),
        f"{where['hardware']}, {where['threads']} threads, torch {where['torch']}.",
        f"The epoch was selected on {selected}{', in the training language' if task.labels else ''}.",
        "Rows are of the integer model where weights and activations are quantized. MB: the checkpoint on disk. "
        "recovered: of the loss of ptq. train s: wall time, with repairs, evaluations on dev and saved states.",
    ]
    return report_table(results, task) + "\n\n" + "\n".join(notes) + "\n"

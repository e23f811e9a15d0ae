"""Numbers -> results.json and the table at the end of a run.

results.json holds, for every method and language, the counts behind each accuracy, so that means
over seeds and paired differences can be worked out from the files alone.
"""

import json
import os
import statistics


def write_text(path: str, text: str) -> None:
    """Atomically: a reader never sees half a file."""
    temporary = f"{path}.{os.getpid()}.part"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


def write_json(path: str, value: dict) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def summarize(languages: dict[str, dict], train_language: str) -> dict:
    """Adds what papers report: the training language, and the mean over all others (zero-shot)."""
    others = [row["accuracy"] for name, row in languages.items() if name != train_language]
    return {
        "english": languages[train_language]["accuracy"],
        "zero_shot_mean": statistics.fmean(others) if others else None,
        "languages": languages,
    }


def recovered(methods: dict[str, dict], name: str) -> float | None:
    """How much of what PTQ lost on the zero-shot mean a method won back, in %: (method - PTQ) /
    (FP32 - PTQ).

    None where it means nothing: PTQ lost less than one point, or a row is missing.
    """
    values = [methods.get(row, {}).get("zero_shot_mean") for row in ("fp32", "ptq", name)]
    if None in values or values[0] - values[1] < 1.0 or name in ("fp32", "ptq"):
        return None
    return 100 * (values[2] - values[1]) / (values[0] - values[1])


def table(results: dict) -> str:
    """The report as a Markdown table, one row a method."""
    methods, languages = results["methods"], results["languages"]
    header = [
        "",
        "en",
        "zero-shot",
        "recovered",
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
            f"{row['size_bytes'] / 1e6:.1f}",
            f"{row['train_seconds']:.0f}",
        ]
        cells += [f"{row['languages'][x]['accuracy']:.1f}" for x in languages if x != "en"]
        lines.append(cells)
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]

    def join(cells: list[str]) -> str:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = (
        "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    )
    return "\n".join([join(header), rule, *map(join, lines)])


def markdown(results: dict) -> str:
    """report.md: what was run, on what, and the table."""
    run, where = results["config"], results["environment"]
    notes = [
        f"{run['task']}, model {results['model']}, W{run['bits']}A{run['act_bits']}, seed {run['seed']}; "
        f"accuracy in % on {run['eval_split']}, trained on {results['train_examples']:,} English examples.",
        f"{where['hardware']}, {where['threads']} threads, torch {where['torch']}.",
    ]
    if run["eval_split"] == "dev":
        notes.append("English dev also chose the epoch: these figures flatter every trained row.")
    notes.append(
        "MB: the checkpoint on disk; quantized rows hold packed integers and scales. "
        "Accuracy: the fake-quantized model, which computes on the same integer grid."
    )
    return table(results) + "\n\n" + "\n".join(notes) + "\n"

"""kit/report.py: the tables of one run and the notes under them."""

import pytest

from config import resolve
from data.tasks import TASKS, find_task
from kit.report import (
    caveats,
    compared_score,
    failed_gate,
    recovered,
    recovered_percent,
    report,
    report_table,
    summarize_languages,
)

XNLI = find_task("xnli")


def row(size=1e6, **tests):
    """A row of results.json.  tests: the score of each test set, or all its metrics."""
    each = {name: test if isinstance(test, dict) else {"accuracy": test, "score": test} for name, test in tests.items()}
    return {**summarize_languages(each, "en"), "size_bytes": size, "train_seconds": 1.0}


def results_of(**rows):
    return {"methods": rows, "languages": list(rows["fp32"]["languages"])}


def cells_of(task, **rows):
    """The cells of a report's table, line by line, without its rule."""
    lines = report_table(results_of(**rows), task).split("\n")
    assert len({len(line) for line in lines}) == 1
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[0], *lines[2:])]


def test_zero_shot_mean_leaves_the_training_language_out():
    found = row(en=90.0, de=80.0, sw=70.0)
    assert (found["score"], found["zero_shot_mean"]) == (90.0, 75.0)
    assert row(en=90.0)["zero_shot_mean"] is None
    found = summarize_languages(found["languages"], "de")
    assert (found["score"], found["zero_shot_mean"]) == (80.0, 80.0)


def test_recovered():
    """Zero-shot means are compared, where there are any; of mnli the means of both test sets."""
    rows = {"fp32": row(en=90, de=80.0), "ptq": row(en=60, de=40.0), "sdq": row(en=80, de=70.0)}
    assert recovered(rows, "sdq", XNLI) == pytest.approx(75.0)
    assert recovered(rows, "ptq", XNLI) is None and recovered(rows, "fp32", XNLI) is None
    assert recovered({"sdq": rows["sdq"]}, "sdq", XNLI) is None
    assert recovered({"fp32": row(en=90), "ptq": row(en=60), "qat": row(en=75)}, "qat", XNLI) == pytest.approx(50.0)
    assert recovered_percent(70.0, 60.0, 62.0) == pytest.approx(500.0)
    assert recovered_percent(70.0, 60.0, 61.9) is None is recovered_percent(70.0, 70.0, 60.0)  # nothing worth it
    assert compared_score(row(en=60, de=50.0, sw=30.0), XNLI) == 40.0
    assert compared_score(row(matched=60.0, mismatched=79.0), find_task("mnli")) == 69.5


def test_gate():
    """The last row against fp32, on the mean and in each language."""
    methods = {"fp32": row(en=90.0, de=80.0, sw=70.0), "ptq": row(en=0.0, de=0.0, sw=0.0)}
    methods["sdq"] = row(en=90.5, de=79.8, sw=68.5)  # means: 75, 74.15
    found = {"methods": methods, "config": {"methods": ["fp32", "ptq", "sdq"]}}
    assert failed_gate(found, XNLI, 1.0) == "--gate 1: sdq loses 1.50 points in sw against fp32"
    assert failed_gate(found, XNLI, 1.5) == ""
    methods["sdq"] = row(en=95.0, de=81.0, sw=75.0)
    assert failed_gate(found, XNLI, 0.0) == ""
    tests = {"fp32": row(en=80.25), "ptq": row(en=80.0)}
    found = {"methods": tests, "config": {"methods": ["ptq"]}}
    assert failed_gate(found, find_task("sst2"), 0.2) == "--gate 0.2: ptq loses 0.25 points on the mean against fp32"


def test_table_has_every_row_and_language():
    rows = {"fp32": row(en=90, de=80.0, sw=70.0), "ptq": row(en=60, de=40.0, sw=30.0)}
    header, _, ptq = cells_of(XNLI, **rows)
    assert header == ["", "en", "zero-shot", "worst", "recovered", "MB", "train s", "de", "sw"]
    assert ptq == ["ptq", "60.00", "35.00", "sw 30.0", "-", "1.0", "1", "40.0", "30.0"]
    rows["ptq"]["student"] = row(en=61, de=42.0, sw=30.0)
    header, fp32, ptq = cells_of(XNLI, **rows)
    assert (header[5], fp32[5], ptq[5]) == ("student", "-", "61.00, 36.00, sw 30.0")
    header, fp32 = cells_of(XNLI, fp32=row(en=90, size=12345))
    assert (header, fp32) == (["", "accuracy", "recovered", "MB", "train s"], ["fp32", "90.00", "-", "0.012", "1"])
    # without the training language; of a metric beside that of the score the mean
    tests = {"de": dict(score=80.0, accuracy=80.0, f1=60.0), "nl": dict(score=70.0, accuracy=90.0, f1=70.0)}
    header, fp32 = cells_of(TASKS["ner"], fp32=row(**tests))
    assert header[:5] == ["", "en", "zero-shot", "worst", "accuracy"]
    assert fp32[:5] == ["fp32", "-", "75.00", "nl 70.0", "85.00"]


@pytest.mark.parametrize("task", ["stsb", "mnli", "mrpc", "atis"])
def test_table_has_the_columns_of_the_task(task):
    """A cell holds each test set's value of one metric."""
    keys, names = TASKS[task].columns, TASKS[task].languages
    values = {name: {key: 10.0 * i + j for j, key in enumerate(keys.values())} for i, name in enumerate(names)}
    tests = {name: {"score": 1.0, **test} for name, test in values.items()}
    header, fp32 = cells_of(TASKS[task], fp32=row(**tests))
    assert header == ["", *keys, "recovered", "MB", "train s"]
    values = [" / ".join(f"{tests[name][key]:.2f}" for name in names) for key in keys.values()]
    assert fp32[1:-3] == values and values[0].count("/") == len(names) - 1


def test_report_says_what_was_run():
    made = {**results_of(fp32=row(en=90, de=80.0, sw=70.0)), "model": "mini", "train_examples": 1234}
    made["environment"] = {"hardware": "a processor", "threads": 3, "torch": "2.0"}
    made |= {"test_examples": {"en": 750, "de": 751, "sw": 752}, "steps": {"teacher": 77, "students": 39}}

    def text(selected="dev", **options):
        return report({**made, "config": vars(resolve({"model": "mini", "bits": 2} | options))}, XNLI, selected)

    assert text().startswith(report_table(made, XNLI)) and text().endswith("\n")
    for options, words in (
        ({}, "xnli, model mini, seed 0; metrics in % on test (en 750, de 751, sw 752 rows), trained on 1,234 examples"),
        ({}, "teacher 77 steps, students 39, of 32."),
        ({}, "W2A8: uniform weights, one scale per channel, ranges mse; activations with ranges at run time, per tok"),
        ({}, "qat: noise 0.5. sdq: noise 0.5, logits+context."),
        ({}, "a processor, 3 threads, torch 2.0."),
        ({}, "selected on dev, in"),
        ({"per_tensor": True}, "one scale per tensor, ranges mse; activations with ranges at run time, per tensor."),
        ({"act_range": "static", "attention_bits": 4}, "with ranges static; inside attention 4 bits."),
        ({"weights": "lsq", "weight_range": "mse"}, "lsq weights, one scale per channel, ranges mse;"),
        ({"selected": "held-out", "eval_split": "dev"}, "selected on held-out, in"),
        ({"eval_split": "dev"}, "selected on dev, which flatters"),
    ):
        assert words in text(**options)
    alone = text(methods=("fp32",))
    assert "W2A8" not in alone and "noise" not in alone  # nothing is quantized


def test_caveats_name_guessing_and_rows_that_do_nothing_else():
    """95 % of one class: a row with 95 % accuracy that predicts nothing else is named."""
    guess, learned = dict(score=95.0, classes=1, majority=95.0), dict(score=97.0, classes=2, majority=95.0)

    def found(task="tsv", **rows):
        return caveats({"methods": {name: {"languages": tests} for name, tests in rows.items()}}, TASKS[task])

    always = "Always predicting the most frequent class of the test rows gives "
    assert found(fp32={"all": learned}) == [always + "95.0."]
    assert found(ptq={"all": guess, "de": learned | {"majority": 50.0}}, fp32={"all": learned}) == [
        always + "all 95.0, de 50.0.",
        "WARNING: one class is predicted for all rows by ptq (all).",
    ]
    # a test set of one class is no sign of it; metrics that are 0 for a guess need no comparison
    assert len(found(fp32={"en": guess | {"majority": 100.0}})) == 1
    assert found("cola", qat={"en": guess}) == ["WARNING: one class is predicted for all rows by qat."]
    assert found("stsb", fp32={"en": {"score": 1.0}}) == []

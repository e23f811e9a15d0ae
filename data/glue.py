"""GLUE: eight English tasks, read from the official files (Wang et al. 2019, arXiv 1804.07461).

    cola   linguistic acceptability             one text    2 classes   Matthews correlation
    sst2   sentiment                            one text    2 classes   accuracy
    mrpc   paraphrase                           two texts   2 classes   accuracy, F1
    stsb   similarity from 0 to 5               two texts   regression  Pearson, Spearman
    qqp    same question                        two texts   2 classes   accuracy, F1
    mnli   entailment                           two texts   3 classes   accuracy
    qnli   does the text answer the question    two texts   2 classes   accuracy
    rte    entailment                           two texts   2 classes   accuracy

One row of the table GLUE describes each: tab-separated text, one example per line, columns found by their name in the
first line. About the files:
  - A quote is an ordinary character, as in XNLI's: a CSV reader would lose half of MRPC.
  - CoLA has no header line, and MRPC's begins with a byte order mark.
  - Some texts end with a space, which is cut, and some files have Windows line ends.
  - QQP as first published has a few rows with missing columns. Only there such rows are left out;
    elsewhere, and if more than 1 % of QQP is like this, the line is reported.

Splits. The labels of GLUE's test files are not public, so others report on the official dev file, and many choose
their best epoch on it as well. Here nothing is chosen on what is reported:

    train   the official train.tsv without the rows below
    dev     10 % of train.tsv, at most 1,000 rows, always the same: chooses the epoch
    test    the official dev.tsv (of MNLI dev_matched.tsv and dev_mismatched.tsv): reported

No example is in both train and dev: a text (a pair, in its order) of dev is removed from train wherever it occurs.
NOTE: its parts may occur. SST-2's train.tsv holds phrases of its sentences, and single sentences of STS-B, MRPC and
RTE occur in several pairs, so dev may be easier than test.
"""

import os
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data.files import read_tsv
from kit.common import UserError

HELD_OUT = 10  # one row in ten of train.tsv is dev
MOST_HELD_OUT = 1000  # rows
MALFORMED = 100  # QQP: one row in a hundred may have missing columns


class Example(NamedTuple):
    """One or two texts and a label: the id of its class, or a number in a regression."""

    text_a: str
    text_b: str | None
    label: int | float


class Layout(NamedTuple):
    """The layout of a GLUE task. labels: by id.  in_file: their spelling in the file, () for a number."""

    folder: str
    texts: tuple[str, ...]  # the columns of the text or texts
    label: str  # the column of the label
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)  # names of data/metrics.py
    in_file: tuple[str, ...] = ("0", "1")
    header: tuple[str, ...] = ()  # the columns of a file without a header line
    tests: dict[str, str] = {"en": "dev.tsv"}  # reported: test set -> file
    tolerant: bool = False  # leave out rows with columns missing


_NLI = ("entailment", "neutral", "contradiction")
_RTE = ("entailment", "not_entailment")
_MNLI_TESTS = {"matched": "dev_matched.tsv", "mismatched": "dev_mismatched.tsv"}
GLUE = {
    "cola": Layout(
        folder="CoLA",
        texts=("sentence",),
        label="label",
        labels=("unacceptable", "acceptable"),
        metrics=("matthews",),
        header=("source", "label", "star", "sentence"),
    ),
    "sst2": Layout("SST-2", ("sentence",), "label", ("negative", "positive")),
    "mrpc": Layout(
        folder="MRPC",
        texts=("#1 String", "#2 String"),
        label="Quality",
        labels=("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
    ),
    "stsb": Layout(
        folder="STS-B",
        texts=("sentence1", "sentence2"),
        label="score",
        labels=("score",),
        metrics=("pearson", "spearman"),
        in_file=(),
    ),
    "qqp": Layout(
        folder="QQP",
        texts=("question1", "question2"),
        label="is_duplicate",
        labels=("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
        tolerant=True,
    ),
    "mnli": Layout(
        folder="MNLI",
        texts=("sentence1", "sentence2"),
        label="gold_label",
        labels=_NLI,
        in_file=_NLI,
        tests=_MNLI_TESTS,
    ),
    "qnli": Layout("QNLI", ("question", "sentence"), "label", _RTE, in_file=_RTE),
    "rte": Layout("RTE", ("sentence1", "sentence2"), "label", _RTE, in_file=_RTE),
}


# ---------------------------------------------------------------------------------------- examples
@lru_cache(maxsize=4)
def read_file(task: str, path: str, fetch: str) -> list[Example]:
    """All examples of a file of a GLUE task."""
    layout = GLUE[task]
    ids = {name: i for i, name in enumerate(layout.in_file)}
    malformed: list[int] | None = [] if layout.tolerant else None
    examples = []
    rows = read_tsv(path, (*layout.texts, layout.label), fetch, layout.header, malformed)
    for number, (*texts, label) in rows:
        a = texts[0].strip(" ")
        b = texts[1].strip(" ") if len(texts) > 1 else None
        where = f"{path}, line {number}"
        if not layout.in_file:
            examples.append(Example(a, b, similarity(label, where)))
        elif label in ids:
            examples.append(Example(a, b, ids[label]))
        else:
            known = " ".join(layout.in_file)
            raise UserError(f"{where}: unknown label {label[:50]!r}; known: {known}")
    again = f"fetch it again with '{fetch}'"
    if malformed and len(malformed) * MALFORMED > len(malformed) + len(examples):
        raise UserError(
            f"{path}, line {malformed[0]} and {len(malformed) - 1:,} more have too few or too many "
            f"columns, which is over {100 // MALFORMED} % of the file: {again}"
        )
    if not examples:
        raise UserError(f"{path} has no rows: {again}")
    return examples


def similarity(text: str, where: str) -> float:
    """STS-B's label: a number from 0 (unrelated) to 5 (equivalent)."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 5:
        raise UserError(f"{where}: the score {text[:50]!r} is not a number from 0 to 5")
    return value


def held_out(count: int) -> np.ndarray:
    """Which of `count` rows of train.tsv are dev, sorted; always the same.

    >>> held_out(30).tolist()
    [2, 11, 26]
    """
    chosen = min(max(count // HELD_OUT, 1), MOST_HELD_OUT)
    return np.sort(np.random.default_rng(0).permutation(count)[:chosen])


def read_glue(task: str, folder: str, split: str, fetch: str) -> dict[str, list[Example]]:
    """The examples of a split by test set. folder: the one that holds train.tsv.

    Raises UserError for a missing file, or one that does not have the layout.
    """
    layout = GLUE[task]
    if split == "test":
        return {language: read_file(task, os.path.join(folder, name), fetch) for language, name in layout.tests.items()}
    path = os.path.join(folder, "train.tsv")
    examples = read_file(task, path, fetch)
    dev = [examples[i] for i in held_out(len(examples))]
    # By text, not by row: the files repeat some rows.
    held = {(example.text_a, example.text_b) for example in dev}
    train = [example for example in examples if (example.text_a, example.text_b) not in held]
    if not train:
        raise UserError(
            f"{path}: {len(examples)} rows are too few to hold one out for dev: fetch it again with '{fetch}'"
        )
    first = next(iter(layout.tests))  # English, or MNLI's "matched"
    return {first: train if split == "train" else dev}

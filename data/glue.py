"""GLUE: eight English tasks, read from the official files (Wang et al. 2019, arXiv 1804.07461).

    cola   is this a sentence of English?       a text       2 labels   Matthews correlation
    sst2   does this like the film?             a text       2 labels   accuracy
    mrpc   do these say the same?               two texts    2 labels   accuracy, F1
    stsb   how alike are these, from 0 to 5?    two texts    a number   Pearson, Spearman
    qqp    do these ask the same?               two texts    2 labels   accuracy, F1
    mnli   does the first imply the second?     two texts    3 labels   accuracy
    qnli   does the second answer the first?    two texts    2 labels   accuracy
    rte    does the first imply the second?     two texts    2 labels   accuracy

What makes them eight readers elsewhere is one row each of the table GLUE below: tab-separated text,
one example a line, columns found by their name in the first line.

What to know about the files:
  - A quote is an ordinary character, as in XNLI's: a CSV reader would swallow half of MRPC.
  - CoLA has no first line with names, and MRPC's begins with a byte order mark.
  - Some texts end with a space, which is cut, and some files have Windows line ends.
  - QQP as first published has a few rows with columns missing, and this alone is tolerated: such a
    row is left out, and counted ('python data/fetch.py glue' says how many). Of every other file,
    and where more than 1 % of QQP is like this, the row is refused with its line number.

Splits. GLUE keeps the labels of its test files to itself, so what others report is measured on the
official dev file, and many choose their best epoch on it as well. Here nothing is chosen on what is
reported:

    train   the official train.tsv without the rows below
    dev     10 % of train.tsv, at most 1,000 rows, drawn once and for all: chooses the epoch
    test    the official dev.tsv (of MNLI dev_matched.tsv and dev_mismatched.tsv): reported

No example is in both train and dev: a text (a pair, in its order) of dev is taken out of train
wherever it occurs. NOTE: parts of it may be there. SST-2's train.tsv holds phrases of the sentences
it holds, and single sentences of STS-B, MRPC and RTE stand in several pairs, so dev may be easier
than test.
"""

import os
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data import UserError, readable_text

HELD_OUT = 10  # one row of so many of train.tsv is dev
MOST_HELD_OUT = 1000  # rows
MALFORMED = 100  # QQP: one row of so many may have columns missing


class Example(NamedTuple):
    """A text or two, and a label: the id of its name, or a number where the task is a regression."""

    text_a: str
    text_b: str | None
    label: int | float


class Layout(NamedTuple):
    """How one GLUE task looks. labels: by id; in_file: how the file spells them, () for a number."""

    folder: str
    texts: tuple[str, ...]  # the columns of the first text and the second, if there is one
    label: str  # the column of the label
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)  # names of data/metrics.py
    in_file: tuple[str, ...] = ("0", "1")
    header: tuple[str, ...] = ()  # the columns of a file whose first line doesn't name them
    tests: dict[str, str] = {"en": "dev.tsv"}  # what is reported: "language" -> file
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


# ------------------------------------------------------------------------- tab-separated text files
def read_tsv(
    path: str,
    columns: tuple[str, ...],
    fetch: str,
    header: tuple[str, ...] = (),
    malformed: list[int] | None = None,
) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, the wanted columns) of a tab-separated file.

    fetch:     the command that brings the file, or tells where it comes from
    header:    the names of all columns, if the first line doesn't name them but is the first row
    malformed: takes the numbers of lines with too few or too many columns; None: these are refused
    """
    if not os.path.isfile(path):
        raise UserError(
            f"no file {path}: fetch it with '{fetch}', or name its folder with --data-dir"
        )
    again = f"fetch it again with '{fetch}'"
    # "-sig": a byte order mark at the start is not text. newline="\n": some texts hold other
    # characters that Python takes for the end of a line.
    with readable_text(path, again), open(path, encoding="utf-8-sig", newline="\n") as file:
        names = list(header) or file.readline().rstrip("\r\n").split("\t")
        missing = [name for name in columns if name not in names]
        if missing:
            raise UserError(
                f"{path}, line 1: no column {missing[0]!r}; it has: {' '.join(names)[:200]}"
            )
        wanted = [names.index(name) for name in columns]
        for number, line in enumerate(file, start=1 if header else 2):
            cells = line.rstrip("\r\n").split("\t")
            if len(cells) == len(names):
                yield number, [cells[i] for i in wanted]
            elif malformed is not None:
                malformed.append(number)
            else:
                expected = "the layout" if header else "the header"
                raise UserError(
                    f"{path}, line {number}: {len(cells)} columns, {expected} has {len(names)}"
                )


# ---------------------------------------------------------------------------------------- examples
@lru_cache(maxsize=4)
def read_file(task: str, path: str, fetch: str) -> tuple[list[Example], list[int]]:
    """All examples of one file of a GLUE task, and the numbers of the lines that were left out."""
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
    return examples, malformed or []


def similarity(text: str, where: str) -> float:
    """STS-B's label: a number from 0 (nothing in common) to 5 (the same)."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 5:
        raise UserError(f"{where}: the score {text[:50]!r} is no number from 0 to 5")
    return value


def held_out(count: int) -> np.ndarray:
    """Which of `count` rows of train.tsv are dev: sorted, the same ones every time.

    >>> held_out(30).tolist()
    [2, 11, 26]
    """
    chosen = min(max(count // HELD_OUT, 1), MOST_HELD_OUT)
    return np.sort(np.random.default_rng(0).permutation(count)[:chosen])


def read_glue(task: str, folder: str, split: str, fetch: str) -> dict[str, list[Example]]:
    """The examples of one split, by "language". folder: the one that holds train.tsv.

    Raises UserError for a missing file, or one that is not what the layout says.
    """
    layout = GLUE[task]
    if split == "test":
        return {
            language: read_file(task, os.path.join(folder, name), fetch)[0]
            for language, name in layout.tests.items()
        }
    path = os.path.join(folder, "train.tsv")
    examples, _ = read_file(task, path, fetch)
    dev = [examples[i] for i in held_out(len(examples))]
    # By text, not by row: the files repeat some rows, and dev must be new to the model.
    held = {(example.text_a, example.text_b) for example in dev}
    train = [example for example in examples if (example.text_a, example.text_b) not in held]
    if not train:
        raise UserError(
            f"{path}: {len(examples)} rows are too few to hold one out for dev: fetch it again with "
            f"'{fetch}'"
        )
    first = next(iter(layout.tests))  # what a model is trained on: English, or MNLI's "matched"
    return {first: train if split == "train" else dev}

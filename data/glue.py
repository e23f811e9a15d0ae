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
from collections.abc import Callable
from functools import partial

import numpy as np

from data.files import Example, Task, again, read_examples
from kit.common import UserError

DEV_SHARE = 10  # one row in ten of train.tsv is dev
MOST_DEV_ROWS = 1000


def glue(
    name: str, folder: str, labels: tuple, metrics=("accuracy",), in_file=("0", "1"), tests=None, **layout
) -> Task:
    """A row of TASKS.  labels: by id.  in_file: their spelling in the file, () for a number.  metrics: names of
    data/metrics.py.  tests: what is reported, test set -> file.  layout: texts, label, header and tolerant of
    read_examples().
    """
    tests, fetch = tests or {"en": "dev.tsv"}, f"python data/fetch.py {name}"
    return Task(
        name=name,
        read=partial(read_glue, partial(read_examples, labels=in_file, fetch=fetch, **layout), tests, fetch),
        files={"train": ("train.tsv",), "dev": ("train.tsv",), "test": tuple(tests.values())},
        fetch=fetch,
        labels=labels,
        languages=tuple(tests),
        train_language=next(iter(tests)),
        metrics=metrics,
        columns={metric: metric for metric in metrics},
        subfolder=f"glue/{folder}",
        models=("minilm",),
    )


def dev_rows(count: int) -> np.ndarray:
    """Which of `count` rows of train.tsv are dev, sorted; always the same.

    >>> dev_rows(30).tolist()
    [2, 11, 26]
    """
    chosen = min(max(count // DEV_SHARE, 1), MOST_DEV_ROWS)
    return np.sort(np.random.default_rng(0).permutation(count)[:chosen])


def read_glue(read_file: Callable, tests: dict, fetch: str, folder: str, split: str) -> dict[str, list[Example]]:
    """The examples of a split by language, or test set.  read_file: path -> {"all": examples}.

    Raises UserError for a missing file, or one that does not have the layout.
    """

    def read(name: str) -> list[Example]:
        rows = read_file(os.path.join(folder, name))["all"]
        return [Example(a.strip(" "), b and b.strip(" "), label) for a, b, label in rows]

    if split == "test":
        return {language: read(name) for language, name in tests.items()}
    examples = read("train.tsv")
    dev = [examples[i] for i in dev_rows(len(examples))]
    # By text, not by row: the files repeat some rows.
    held = {(example.text_a, example.text_b) for example in dev}
    train = [example for example in examples if (example.text_a, example.text_b) not in held]
    if not train:
        raise UserError(f"{folder}/train.tsv: {len(examples)} rows are too few to hold one out for dev{again(fetch)}")
    return {next(iter(tests)): train if split == "train" else dev}  # English, or MNLI's "matched"


_PAIR = ("sentence1", "sentence2")
_NLI = ("entailment", "neutral", "contradiction")
_RTE = ("entailment", "not_entailment")
_SAME, _DUPLICATE = ("not_equivalent", "equivalent"), ("not_duplicate", "duplicate")
_QUESTIONS = ("question1", "question2")
_COLA = ("source", "label", "star", "sentence")
_TESTS = {"matched": "dev_matched.tsv", "mismatched": "dev_mismatched.tsv"}
_ROWS = (
    glue("cola", "CoLA", ("unacceptable", "acceptable"), ("matthews",), texts=_COLA[3:], header=_COLA),
    glue("sst2", "SST-2", ("negative", "positive"), texts=("sentence",)),
    glue("mrpc", "MRPC", _SAME, ("accuracy", "f1"), texts=("#1 String", "#2 String"), label="Quality"),
    glue("stsb", "STS-B", ("score",), ("pearson", "spearman"), in_file=(), texts=_PAIR, label="score"),
    glue("qqp", "QQP", _DUPLICATE, ("accuracy", "f1"), texts=_QUESTIONS, label="is_duplicate", tolerant=True),
    glue("mnli", "MNLI", _NLI, in_file=_NLI, tests=_TESTS, texts=_PAIR, label="gold_label"),
    glue("qnli", "QNLI", _RTE, in_file=_RTE, texts=("question", "sentence")),
    glue("rte", "RTE", _RTE, in_file=_RTE, texts=_PAIR),
)
GLUE = {row.name: row for row in _ROWS}

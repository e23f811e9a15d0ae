"""The tasks: one table row each, read from the official files and from nothing else.

    load("xnli", "train", "en", folder)   -> list of Example, English (MultiNLI)
    load("xnli", "dev", "sw", folder)     -> list of Example, Swahili
    load("atis", "train", "en", folder)   -> list of Sentence: words, their tags, an intent

XNLI's protocol is zero-shot transfer: train on English, choose on English dev, test on every
language. ATIS and SNIPS are English; how their files look, data/slots.py says.

XNLI's files are tab-separated with one header line. Quotes are ordinary characters (no CSV quoting),
lines end with "\\n" alone: some texts hold other characters that Python's splitlines() would take
for a line end.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

from data import UserError, readable_text
from data.slots import SPLITS, Names, Sentence, read_names, read_sentences


class Example(NamedTuple):
    text_a: str
    text_b: str | None
    label: int


@dataclass(frozen=True)
class Task:
    """labels: their names in the order of their ids.  read(folder, split) -> {language: examples}.

    names(folder): the intents and tags of a joint task, which its files alone know (labels is empty
    then).
    """

    name: str
    head: str
    labels: tuple[str, ...]
    languages: tuple[str, ...]
    train_language: str
    read: Callable[[str, str], dict[str, list[Example]] | dict[str, list[Sentence]]]
    files: dict[str, str]  # split -> path under task_folder(task, folder)
    fetch: str  # the command that brings the data, or tells where it comes from
    metric: str = "accuracy"
    names: Callable[[str], Names] | None = None
    subfolder: str = ""  # of the data folder, where the files usually are


def load(task: str, split: str, language: str, folder: str) -> list[Example] | list[Sentence]:
    """The examples of one split ("train", "dev", "test") in one language.

    Raises UserError for an unknown task, a language the task or the file doesn't have, a missing
    file, a bad row.
    """
    row = find_task(task)
    if language not in row.languages:
        raise UserError(f"{task} has no language {language!r}; it has: {' '.join(row.languages)}")
    examples = row.read(folder, split).get(language)
    if not examples:
        raise UserError(
            f"{task}: no {split} row in language {language!r} under {folder}; fetch it with '{row.fetch}'"
        )
    return examples


def find_task(name: str) -> Task:
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}; known: {' '.join(TASKS)}")
    return TASKS[name]


def task_folder(task: Task, folder: str) -> str:
    """Where a task's files are: the data folder's own subfolder for it (data/raw/atis), or, where
    there is none, the data folder itself if it holds them (--data-dir data/atis-sample).
    """
    below = os.path.join(folder, task.subfolder)
    if os.path.isdir(below) or not os.path.exists(os.path.join(folder, task.files["train"])):
        return below
    return folder


# ------------------------------------------------------------------------------------------- XNLI
NLI_LABELS = ("entailment", "neutral", "contradiction")
XNLI_LANGUAGES = (
    "ar",
    "bg",
    "de",
    "el",
    "en",
    "es",
    "fr",
    "hi",
    "ru",
    "sw",
    "th",
    "tr",
    "ur",
    "vi",
    "zh",
)
XNLI_FILES = {
    "train": "XNLI-MT-1.0/multinli/multinli.train.en.tsv",
    "dev": "XNLI-1.0/xnli.dev.tsv",
    "test": "XNLI-1.0/xnli.test.tsv",
}
XNLI_FETCH = "python data/fetch.py xnli"


@lru_cache(maxsize=4)
def read_xnli(folder: str, split: str) -> dict[str, list[Example]]:
    """XNLI as published. Dev and test hold 15 languages in one file, the training file is English
    (MultiNLI).
    """
    path = os.path.join(folder, *XNLI_FILES[split].split("/"))
    if split == "train":
        columns = ("premise", "hypo", "label")  # the third label is spelled "contradictory" here
        label_ids = {"entailment": 0, "neutral": 1, "contradictory": 2, "contradiction": 2}
    else:
        columns = ("sentence1", "sentence2", "gold_label", "language")
        label_ids = {name: i for i, name in enumerate(NLI_LABELS)}
    found: dict[str, list[Example]] = {}
    for number, row in read_tsv(path, columns, XNLI_FETCH):
        premise, hypothesis, label = row[:3]
        language = row[3] if len(row) > 3 else "en"
        if label not in label_ids:
            raise UserError(
                f"{path}, line {number}: unknown label {label!r}; known: {' '.join(label_ids)}"
            )
        if language not in XNLI_LANGUAGES:
            raise UserError(f"{path}, line {number}: unknown language {language!r}")
        found.setdefault(language, []).append(Example(premise, hypothesis, label_ids[label]))
    return found


def read_tsv(path: str, columns: tuple[str, ...], fetch: str):
    """Yield (line number, the wanted columns) of a tab-separated file whose first line names the
    columns.
    """
    if not os.path.isfile(path):
        raise UserError(
            f"no file {path}: fetch it with '{fetch}', or name its folder with --data-dir"
        )
    again = f"fetch it again with '{fetch}'"
    with readable_text(path, again), open(path, encoding="utf-8", newline="\n") as file:
        header = file.readline().rstrip("\r\n").split("\t")
        missing = [name for name in columns if name not in header]
        if missing:
            raise UserError(
                f"{path}, line 1: no column {missing[0]!r}; it has: {' '.join(header)[:200]}"
            )
        wanted = [header.index(name) for name in columns]
        for number, line in enumerate(file, start=2):
            cells = line.rstrip("\r\n").split("\t")
            if len(cells) != len(header):
                raise UserError(
                    f"{path}, line {number}: {len(cells)} columns, the header has {len(header)}"
                )
            yield number, [cells[i] for i in wanted]


# --------------------------------------------------------------------------------- ATIS and SNIPS
def joint_task(name: str) -> Task:
    """A data set of intents and slots in the layout of data/slots.py."""
    return Task(
        name=name,
        head="joint",
        labels=(),
        languages=("en",),
        train_language="en",
        read=partial(read_joint, name),
        files={split: f"{split}/seq.in" for split in SPLITS},
        fetch=f"python data/fetch.py {name}",
        metric="intent accuracy and slot F1",
        names=partial(joint_names, name),
        subfolder=name,
    )


def read_joint(name: str, folder: str, split: str) -> dict[str, list[Sentence]]:
    task = find_task(name)
    return {"en": read_sentences(task_folder(task, folder), split, task.fetch)}


def joint_names(name: str, folder: str) -> Names:
    task = find_task(name)
    return read_names(task_folder(task, folder), task.fetch)


TASKS = {
    "xnli": Task(
        name="xnli",
        head="sequence",
        labels=NLI_LABELS,
        languages=XNLI_LANGUAGES,
        train_language="en",
        read=read_xnli,
        files=XNLI_FILES,
        fetch=XNLI_FETCH,
    ),
    "atis": joint_task("atis"),
    "snips": joint_task("snips"),
}

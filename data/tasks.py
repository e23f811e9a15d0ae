"""The tasks: one table row each, read from the official files and from nothing else.

    load("xnli", "train", "en", folder)   -> list of Example, English (MultiNLI)
    load("xnli", "dev", "sw", folder)     -> list of Example, Swahili
    load("stsb", "test", "en", folder)    -> list of Example, whose labels are numbers
    load("atis", "train", "en", folder)   -> list of Sentence: words, their tags, an intent

XNLI's protocol is zero-shot transfer: train on English, choose on English dev, test on every
language. The others are English: GLUE's eight, whose files and splits data/glue.py explains, and
ATIS and SNIPS, which data/slots.py does. The "languages" of mnli are its two test sets.

XNLI's files are tab-separated with one header line. Quotes are ordinary characters (no CSV quoting),
lines end with "\\n" alone: some texts hold other characters that Python's splitlines() would take
for a line end.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial

from data import UserError
from data.glue import GLUE, Example, read_glue, read_tsv
from data.slots import FILES, SPLITS, Names, Sentence, read_names, read_sentences


@dataclass(frozen=True)
class Task:
    """labels: their names in the order of their ids.  read(folder, split) -> {language: examples}.

    names(folder): the intents and tags of a joint task, which its files alone know (labels is empty
    then).

    regression: the label is a number and no class; labels has one name, that of the number.
    """

    name: str
    head: str
    labels: tuple[str, ...]
    languages: tuple[str, ...]
    train_language: str
    read: Callable[[str, str], dict[str, list[Example]] | dict[str, list[Sentence]]]
    files: dict[str, str]  # split -> path under task_folder(task, folder)
    fetch: str  # the command that brings the data, or tells where it comes from
    more_files: dict[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # read besides files[split]
    metrics: tuple[str, ...] = ("accuracy",)  # of labels, by name in data/metrics.py
    regression: bool = False
    names: Callable[[str], Names] | None = None
    subfolder: str = ""  # of the data folder, where the files usually are

    def paths(self, split: str) -> tuple[str, ...]:
        """All files that a split is read from, under task_folder(task, folder)."""
        return (self.files[split], *self.more_files.get(split, ()))


def load(task: str, split: str, language: str, folder: str) -> list[Example] | list[Sentence]:
    """The examples of one split ("train", "dev", "test") in one language.

    Raises UserError for an unknown task, a language the task or the file doesn't have, a missing
    file, a bad row.
    """
    row = find_task(task)
    if language not in row.languages:
        raise UserError(f"{task} has no language {language!r}; it has: {' '.join(row.languages)}")
    found = row.read(folder, split)
    examples = found.get(language)
    if not examples and found and task in GLUE:
        raise UserError(
            f"{task} has no {split} rows that are {language}, only {' '.join(found)}: "
            f"use --languages {' '.join(found)}"
        )
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
    """Where a task's files are: the data folder's own subfolder for it (data/raw/glue/RTE); or what
    is left of that path if the data folder is named further down (--data-dir glue, or glue/RTE).
    """
    parts = task.subfolder.split("/")
    for i in range(len(parts)):
        below = os.path.join(folder, *parts[i:])
        if os.path.isdir(below):
            return below
    if os.path.exists(os.path.join(folder, task.files["train"])):
        return folder
    last = os.path.basename(os.path.abspath(folder))  # nothing there: say where it should be
    return os.path.join(folder, *parts[parts.index(last) + 1 if last in parts else 0 :])


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


# ------------------------------------------------------------------------------------------- GLUE
def glue_task(name: str) -> Task:
    """A row of the table in data/glue.py."""
    layout = GLUE[name]
    languages = tuple(layout.tests)
    test, *more = layout.tests.values()
    return Task(
        name=name,
        head="sequence",
        labels=layout.labels,
        languages=languages,
        train_language=languages[0],
        read=partial(read_glue_split, name),
        files={"train": "train.tsv", "dev": "train.tsv", "test": test},
        fetch=f"python data/fetch.py {name}",
        more_files={"test": tuple(more)},
        metrics=layout.metrics,
        regression=not layout.in_file,
        subfolder=f"glue/{layout.folder}",
    )


def read_glue_split(name: str, folder: str, split: str) -> dict[str, list[Example]]:
    task = find_task(name)
    return read_glue(name, task_folder(task, folder), split, task.fetch)


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
        files={split: f"{split}/{FILES[0]}" for split in SPLITS},
        fetch=f"python data/fetch.py {name}",
        more_files={split: tuple(f"{split}/{each}" for each in FILES[1:]) for split in SPLITS},
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
    **{name: glue_task(name) for name in GLUE},
}

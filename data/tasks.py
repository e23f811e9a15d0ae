"""The tasks: one row of TASKS each, read from the official files.

    load(TASKS["xnli"], "dev", "sw", folder)     -> list of Example, Swahili
    load(TASKS["atis"], "train", "en", folder)   -> list of Sentence: words, their tags, an intent
    load(TASKS["tsv"], "train", "de", folder)    -> list of Example, from your own train.tsv
    load(TASKS["tags"], "train", "de", folder)   -> list of Sentence, from your own train-de.txt

XNLI's protocol is zero-shot transfer: train on English, choose the epoch on English dev, test on every language. It is
also that of XGLUE's other tasks (data/xglue.py). The others are English: GLUE's eight (data/glue.py), and ATIS and SNIPS
(data/slots.py). The two test sets of mnli take the place of languages.

A row holds all that differs between tasks. docs/extending.md adds one.
"""

import math
import os
import re
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np

from data.files import Example, Names, Sentence, Task, existing, read_examples, read_tsv
from data.glue import GLUE
from data.metrics import are_spans
from data.sentences import ALL, find_sentences, merged, read_unlabelled
from data.sentences import FILES as SENTENCE_FILES
from data.slots import FILES, SPLITS, read_names, read_sentences, read_tokens
from data.xglue import XGLUE
from kit.common import UserError

HERE = os.path.dirname(os.path.abspath(__file__))
HELD_OUT = 1000
RAW_DIR = os.path.join(HERE, "raw")  # where data/fetch.py puts the official files
WEIGHTS_DIR = os.path.join(os.path.dirname(HERE), "weights")  # where convert.py puts checkpoints


def find_task(name: str, train_language: str | None = None) -> Task:
    """The row of a task.  train_language: of a task whose files decide it."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}; known: {' '.join(TASKS)}")
    return replace(TASKS[name], train_language=train_language) if train_language else TASKS[name]


def load(task: Task, split: str, language: str, folder: str) -> list[Example] | list[Sentence]:
    """The examples of a split in one language: "train", "dev", "test"; or "held-out" rows of train, and "rest".

    Raises UserError for a language that the task or the file doesn't have, a missing file or a bad row.
    """
    if task.languages is not None and language not in task.languages:
        raise UserError(f"{task.name} has no language {language!r}; it has: {' '.join(task.languages)}")
    if split in ("held-out", "rest"):
        return hold_out(load(task, "train", language, folder), split)
    found = task.read(task_folder(task, folder), split)
    if language == ALL and len(found) > 1:
        return merged(found.values())
    if not found.get(language):
        there = " ".join(name for name in found if found[name]) or "none"
        raise UserError(f"{task.name}: no {split} row in language {language!r} under {folder}, only in: {there}")
    return found[language]


def hold_out(examples: list, split: str) -> list:
    """ "held-out": a tenth of the examples, at most about HELD_OUT, always the same; or the "rest".

    Whole groups of one first text (a premise): the rest has none of the held-out ones.
    """
    groups: dict[object, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(example[0], []).append(i)
    members = list(groups.values()) if len(groups) > 1 else [[i] for i in range(len(examples))]
    rows, most = set(), min(HELD_OUT, max(1, len(examples) // 10))
    for k in np.random.default_rng(0).permutation(len(members)):
        if len(rows) < most:
            rows.update(members[k])
    return [example for i, example in enumerate(examples) if (i in rows) == (split == "held-out")]


def selection_splits(task: Task, eval_split: str, folder: str) -> tuple[str, str]:
    """The splits to train on and to select the epoch on: never the rows that are reported, unless the task's dev is a
    part of train.tsv anyway (GLUE). Sentences without labels need no dev.tsv.
    """
    own_dev = task.files["dev"] != task.files["train"]
    without_dev = task.head == "embedding" and not existing(os.path.join(folder, task.files["dev"][0]))
    return ("rest", "held-out") if without_dev or (eval_split == "dev" and own_dev) else ("train", "dev")


def match_labels(own: list[str], labels: tuple[str, ...]) -> list[int] | None:
    """For each label of a task its index among a model's classes: by name, or by position where the names of one of
    them say nothing (LABEL_0, or plain numbers). None if the model has other classes.

    >>> match_labels(["CONTRADICTION", "entailment"], ("entailment", "contradiction"))
    [1, 0]
    """
    if len(own) != len(labels):
        return None
    plain = [["".join(filter(str.isalnum, name.casefold())) for name in names] for names in (own, labels)]
    for theirs, ours in ((own, labels), plain):  # as they are, else by their letters
        if len(set(ours)) == len(ours) and set(theirs) == set(ours):
            return [theirs.index(name) for name in ours]
    nameless = any(all(re.fullmatch(r"(label_?)?\d+", name.casefold()) for name in names) for names in (own, labels))
    return list(range(len(own))) if nameless or len(own) == 1 else None


def names_of(task: Task, folder: str) -> Names:
    """The names of the classes of texts or sentences, and of words."""
    found = task.labels(task_folder(task, folder)) if callable(task.labels) else task.labels
    if isinstance(found, Names):
        return found
    return Names(("",), found, 1, len(found)) if task.head == "token" else Names(found, (), len(found), 0)


def class_names(task: Task, folder: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The classes that a model of this task can predict: of a sequence, and of a word beside it (slots)."""
    intents, slots, known_intents, known_slots = names_of(task, folder)
    return (slots, ()) if task.head == "token" else (intents[:known_intents], slots[:known_slots])


def languages_of(task: Task, folder: str, split: str) -> tuple[str, ...]:
    """The test sets of a task: those of its row, or those in its files, the train language first."""
    found = task.languages or task.read(task_folder(task, folder), split)
    return task.languages or tuple(sorted(found, key=lambda name: name != task.train_language))


def task_folder(task: Task, folder: str) -> str:
    """The folder of a task's files: its own below the data folder (data/raw/glue/RTE), or what is left of that path if
    the data folder is named further down (--data-dir glue, or glue/RTE).
    """
    parts = task.subfolder.split("/") if task.subfolder else []
    places = (os.path.join(folder, *parts[i:]) for i in range(len(parts)))
    if below := next(filter(os.path.isdir, places), None):
        return below
    if existing(os.path.join(folder, task.files["train"][0])):
        return folder
    last = os.path.basename(os.path.abspath(folder))  # nothing there: say where it should be
    return os.path.join(folder, *parts[parts.index(last) + 1 if last in parts else 0 :])


def file_paths(task: Task, folder: str, split: str) -> list[str]:
    """The files of a split, compressed or not; as they should be named where there is none."""
    place = task_folder(task, folder)
    paths = (os.path.join(place, *name.split("/")) for name in task.files[split])
    return [existing(path) or path for path in (task.find(place, split).values() if task.find else paths)]


def find_data(task: Task, data_dir: str | None, model: str) -> str:
    """The folder to read a task from: --data-dir, the sample of this repository, or data/raw.

    The built-in model knows no other words than its sample's. A model with random weights gets the sample if the
    official files are not there.
    """
    if data_dir:
        return data_dir
    there = all(map(os.path.isfile, file_paths(task, RAW_DIR, "train")))
    is_sample_model = task.sample and re.fullmatch(rf"{task.models[-1]}(-\d+x\d+)?", model)
    return os.path.join(HERE, task.sample) if is_sample_model and (model == "mini" or not there) else RAW_DIR


# ------------------------------------------------------------------------------------------- XNLI
NLI_LABELS = ("entailment", "neutral", "contradiction")
XNLI_LANGUAGES = tuple("ar bg de el en es fr hi ru sw th tr ur vi zh".split())
XNLI_FILES = {"train": "XNLI-MT-1.0/multinli/multinli.train.en.tsv"}
XNLI_FILES |= {"dev": "XNLI-1.0/xnli.dev.tsv", "test": "XNLI-1.0/xnli.test.tsv"}
XNLI_FETCH = "python data/fetch.py xnli"


def read_xnli(folder: str, split: str) -> dict[str, list[Example]]:
    """XNLI as published. Dev and test hold 15 languages in one file; the training file is English (MultiNLI), and spells
    the third label "contradictory".
    """
    path = os.path.join(folder, *XNLI_FILES[split].split("/"))
    labels = (*NLI_LABELS[:2], ("contradiction", "contradictory"))
    if split != "train":
        return read_examples(path, ("sentence1", "sentence2"), labels, XNLI_FETCH, "gold_label", "language")
    return {"en": read_examples(path, ("premise", "hypo"), labels, XNLI_FETCH)["all"]}


# --------------------------------------------------------------------------------- ATIS and SNIPS
def joint_task(name: str, sample: str | None = None) -> Task:
    """A data set of intents and slots in the layout of data/slots.py."""
    fetch = f"python data/fetch.py {name}"
    return Task(
        name=name,
        head="joint",
        read=lambda folder, split: {"en": read_sentences(folder, split, fetch)},
        files={split: tuple(f"{split}/{each}" for each in FILES) for split in SPLITS},
        fetch=fetch,
        labels=partial(read_names, fetch=fetch),
        metrics=("accuracy", "slot_f1"),
        columns={"intent": "accuracy", "slot F1": "slot_f1", "words": "slot_token_f1", "sentences": "exact"},
        subfolder=name,
        models=("scratch",),
        sample=sample,
    )


# ------------------------------------------------------------------------------------ your own rows
MOST_CLASSES = 1000


@lru_cache(maxsize=4)
def own_labels(folder: str) -> tuple[str, ...]:
    """The classes of train.tsv."""
    path = os.path.join(folder, "train.tsv")
    return in_order({label.strip() for _, (_, label) in read_tsv(path, ("text", "label"), "")}, path)


def in_order(found: set[str], path: str) -> tuple[str, ...]:
    """The classes of a training file: numbers in their order, then words in that of the alphabet."""
    if len(found) < 2:
        raise UserError(f"{path} has {'one class' if found else 'no rows'}: there is nothing to learn")
    if len(found) > MOST_CLASSES:
        raise UserError(f"{path} has {len(found):,} classes: are its labels numbers? Only classes are learned")
    number = re.compile(r"-?\d+(\.\d+)?")
    return tuple(sorted(found, key=lambda name: (float(name) if number.fullmatch(name) else math.inf, name)))


def read_own(folder: str, split: str, labels: tuple[str, ...] | None = None) -> dict[str, list[Example]]:
    """Rows of DIR/train.tsv, dev.tsv or test.tsv, whose first line names its columns: text, label, and optionally text2
    and language.  labels: those of a student, instead of the classes of train.tsv, which need not be there then.
    """
    known = labels or own_labels(folder)
    splits = (split,) if labels else ("train", split)
    files = [os.path.join(folder, f"{each}.tsv") for each in splits]
    found = [read_examples(path, ("text", "text2"), known, "", language="language") for path in files]
    if len({next(iter(each.values()))[0].text_b is None for each in found}) > 1:
        raise UserError(f"{folder}: only one of train.tsv and {split}.tsv has a column text2")
    return found[-1]


def find_tags(folder: str, split: str) -> dict[str, str]:
    """Language -> file of a split: DIR/train-LL.txt, or DIR/train.txt ("all"); also .tsv or .conll."""
    found = {}
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        if match := re.fullmatch(rf"({split}(?:-(.+))?\.(?:conll|tsv|txt))(?:\.xz)?", name):
            language, path = match[2] or "all", os.path.join(folder, match[1])
            if found.setdefault(language, path) != path:
                raise UserError(f"{found[language]} and {path} are the same split: keep one of them")
    return found or {"all": os.path.join(folder, f"{split}.txt")}


@lru_cache(maxsize=4)
def own_tags(folder: str) -> tuple[str, ...]:
    """The tags of the training files, O first; of spans B-x and I-x for each x."""
    files = find_tags(folder, "train").values()
    found = {tag for path in files for sentence in read_tokens(path, None, "") for tag in sentence.tags}
    if are_spans(found):
        found = {tag if tag == "O" else mark + tag[2:] for tag in found for mark in ("B-", "I-")}
    return tuple(sorted(in_order(found, " ".join(files)), key=lambda tag: tag != "O"))


def read_tags(folder: str, split: str, labels: tuple[str, ...] | None = None) -> dict[str, list[Sentence]]:
    """labels: see read_own."""
    known = labels or own_tags(folder)
    return {language: read_tokens(path, known, "") for language, path in find_tags(folder, split).items()}


def own_language(task: Task, folder: str, wanted: str | None) -> str:
    """The language to train on: as wanted, the only one of the training files, or English."""
    known = languages_of(task, folder, "train")
    chosen = wanted or (known[0] if len(known) == 1 else "en")
    if chosen not in known:
        there = " ".join(known)[:200]
        raise UserError(f"{folder}: training rows have no language {chosen!r}: choose --train-language from {there}")
    return chosen


def with_classes(task: Task, labels: tuple[str, ...]) -> Task:
    """A task of the user's own with the classes of a student."""
    return replace(task, read=partial(task.read, labels=labels), labels=labels)


TASKS = {
    "xnli": Task(
        name="xnli",
        read=read_xnli,
        files={split: (name,) for split, name in XNLI_FILES.items()},
        fetch=XNLI_FETCH,
        labels=NLI_LABELS,
        languages=XNLI_LANGUAGES,
        together=3,  # three hypotheses of one premise
        zero_shot=True,
        columns={"accuracy": "accuracy"},
        sample="mini",
    ),
    "atis": joint_task("atis", sample="atis-sample"),
    "snips": joint_task("snips"),
    **GLUE,
    **XGLUE,
    "embed": Task(
        name="embed",
        head="embedding",
        read=partial(read_unlabelled, XNLI_FILES, read_xnli, XNLI_FETCH),
        files={split: (name,) for split, name in SENTENCE_FILES.items()},
        find=partial(find_sentences, XNLI_FILES),
        fetch=XNLI_FETCH,
        languages=None,
        train_language=ALL,  # of no test set
        zero_shot=True,
        metrics=("retrieval", "spearman"),  # one of them
        columns={"retrieval": "retrieval", "spearman": "spearman", "cosine": "cosine"},
        models=("multilingual-e5-small", "mini"),
        sample="mini",
    ),
    "tsv": Task(
        name="tsv",
        read=read_own,
        files={split: (f"{split}.tsv",) for split in SPLITS},
        fetch="",
        labels=own_labels,
        languages=None,
        train_language="",
        zero_shot=True,
        columns={"accuracy": "accuracy", "macro-F1": "macro_f1"},
        models=("xlmr-base",),
    ),
    "tags": replace(  # as NER, but all comes from your files
        XGLUE["ner"],
        name="tags",
        read=read_tags,
        files={split: (f"{split}.txt",) for split in SPLITS},
        find=find_tags,
        fetch="",
        labels=own_tags,
        train_language="",
    ),
}

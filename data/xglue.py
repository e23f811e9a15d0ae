"""XGLUE's understanding tasks beside XNLI: train on English, test in every language (Liang et al. 2020, arXiv
2004.01401).

    ner     named entities: a tag per word         F1 of the entities          CoNLL-2002 and 2003
    pos     parts of speech: a tag per word        accuracy                    Universal Dependencies
    pawsx   paraphrase                two texts    accuracy                    PAWS-X
    nc      category of a news item   one text     accuracy
    qadsm   query and advertisement   two texts    accuracy
    qam     question and passage      two texts    accuracy

One row of the table XGLUE describes each. A class is known by its name in the file, never by a number of ours. The
languages are those of the table whose files are there.

Files are looked for in the places where they are published: XGLUE's archive, and for some tasks the folders of XTREME
(udpos), of PAWS-X (x-final), or conll/en/train.txt.
"""

import os
from collections.abc import Callable
from functools import partial

from data.files import Task, existing, read_examples
from data.slots import SPLITS, read_tokens

UPOS = tuple("ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X".split())
ENTITIES = ("O", *(f"{mark}-{kind}" for kind in ("PER", "ORG", "LOC", "MISC") for mark in "BI"))
TOPICS = tuple("foodanddrink sports news entertainment health video finance travel lifestyle autos".split())
ARCHIVE = "xglue_full_dataset"
FETCH = "python data/fetch.py xglue"
PLACES = {  # where the files of a task may be
    "ner": ("NER/{language}.{split}", "conll/{language}/{split}.txt"),
    "pos": ("POS/{language}.{split}", "udpos/{split}-{language}.tsv"),
    "pawsx": ("PAWSX/{language}/{split}{more}.tsv", "x-final/{language}/{split}{more}.tsv"),
    "nc": ("NC/xglue.nc.{language}.{split}",),
    "qadsm": ("QADSM/xglue.qadsm.{language}.{split}",),
    "qam": ("QAM/xglue.qam.{language}.{split}",),
}


def xglue(
    name: str, languages: str, labels: tuple, texts: tuple = (), in_file=(), header=False, metrics=("accuracy",)
) -> Task:
    """A row of TASKS.  labels: by id.  texts: the columns of the one or two texts ("title + body" joins two); () for a
    file of words and tags.  in_file: the spelling of labels, if it is another.  header: whether the first line names
    the columns, which else are those of the texts and the label.  metrics: the score, and what is reported beside it.
    """
    find = partial(find_files, name, languages.split())
    columns = () if header else tuple(" + ".join((*texts, "label")).split(" + "))
    how = dict(texts=texts, labels=in_file or labels, header=columns) if texts else dict(known=labels)
    return Task(
        name=name,
        head="sequence" if texts else "token",
        read=partial(read_xglue, partial(read_examples if texts else read_tokens, fetch=FETCH, **how), find),
        files={split: tuple(files_of(PLACES[name][0], languages.split(), split).values()) for split in SPLITS},
        find=find,
        fetch=FETCH,
        labels=labels,
        languages=None,
        zero_shot=True,
        metrics=metrics[:1],
        columns={metric: metric for metric in metrics},
        models=("xlmr-base",),
    )


def files_of(place: str, languages: list[str], split: str) -> dict[str, str]:
    """Language -> file of a split, of train in English alone."""
    languages, more = (["en"], "") if split == "train" else (languages, "_2k")  # more: in the names of PAWS-X
    return {language: place.format(split=split, language=language, more=more) for language in languages}


def find_files(task: str, languages: list[str], folder: str, split: str) -> dict[str, str]:
    """Language -> file of a split, for those that are there, from the first place that has a training file; English
    also if it is missing, for the message.
    """
    places = (f"{ARCHIVE}/{PLACES[task][0]}", *PLACES[task])
    there = (each for each in places if existing(os.path.join(folder, files_of(each, [], "train")["en"])))
    files = files_of(next(there, places[0]), languages, split).items()
    found = {language: os.path.join(folder, *path.split("/")) for language, path in files}
    return {language: path for language, path in found.items() if language == "en" or existing(path)}


def read_xglue(read_file: Callable, find: Callable, folder: str, split: str) -> dict[str, list]:
    """The examples of a split by language. Raises UserError with file and line for what does not have the layout."""
    found = {language: read_file(path) for language, path in find(folder, split).items()}
    return {language: rows["all"] if isinstance(rows, dict) else rows for language, rows in found.items()}


_ROWS = (
    xglue("ner", "en de es nl", ENTITIES, metrics=("f1", "accuracy")),
    xglue("pos", "en ar bg de el es fr hi it nl pl pt ru th tr ur vi zh", UPOS, metrics=("accuracy", "precision")),
    xglue("pawsx", "en de es fr", ("different", "paraphrase"), ("sentence1", "sentence2"), ("0", "1"), header=True),
    xglue("nc", "en de es fr ru", TOPICS, ("title + body",)),
    xglue("qadsm", "en de fr", ("Bad", "Good"), ("query", "title + description")),
    xglue("qam", "en de fr", ("no", "yes"), ("question", "passage"), ("0", "1")),
)
XGLUE = {row.name: row for row in _ROWS}

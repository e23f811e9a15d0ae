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
from typing import NamedTuple

from data.files import Example, Sentence, existing, read_examples
from data.slots import read_tokens

UPOS = tuple("ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X".split())
ENTITIES = ("O", *(f"{mark}-{kind}" for kind in ("PER", "ORG", "LOC", "MISC") for mark in "BI"))
TOPICS = tuple("foodanddrink sports news entertainment health video finance travel lifestyle autos".split())
ARCHIVE = "xglue_full_dataset"
FETCH = "python data/fetch.py xglue"


class XglueTask(NamedTuple):
    """A row of XGLUE. places: the files, with {split} and {language}, for each place where they may be.  texts: the
    columns of the one or two texts ("title + body" joins two); () for a token file.  header: all columns of a file
    without a header line.
    """

    places: tuple[str, ...]
    languages: tuple[str, ...]
    labels: tuple[str, ...]  # by id
    texts: tuple[str, ...] = ()
    header: tuple[str, ...] = ()
    in_file: tuple[str, ...] = ()  # the spelling of labels, if it is another
    metrics: tuple[str, ...] = ("accuracy",)  # keys of an evaluation
    reported: tuple[str, ...] = ()  # further ones
    splits: dict[str, str] = {}  # the spelling of splits

    def files(self, place: str, split: str) -> dict[str, str]:
        """Language -> file of a split."""
        languages = ("en",) if split == "train" else self.languages
        return {each: place.format(split=self.splits.get(split, split), language=each) for each in languages}


XGLUE = {
    "ner": XglueTask(
        places=("NER/{language}.{split}", "conll/{language}/{split}.txt"),
        languages=("en", "de", "es", "nl"),
        labels=ENTITIES,
        metrics=("f1",),
        reported=("accuracy",),
    ),
    "pos": XglueTask(
        places=("POS/{language}.{split}", "udpos/{split}-{language}.tsv"),
        languages=tuple("en ar bg de el es fr hi it nl pl pt ru th tr ur vi zh".split()),
        labels=UPOS,
        reported=("precision",),
    ),
    "pawsx": XglueTask(
        places=("PAWSX/{language}/{split}.tsv", "x-final/{language}/{split}.tsv"),
        languages=("en", "de", "es", "fr"),
        labels=("different", "paraphrase"),
        texts=("sentence1", "sentence2"),
        in_file=("0", "1"),
        splits={"dev": "dev_2k", "test": "test_2k"},
    ),
    "nc": XglueTask(
        places=("NC/xglue.nc.{language}.{split}",),
        languages=("en", "de", "es", "fr", "ru"),
        labels=TOPICS,
        texts=("title + body",),
        header=("title", "body", "label"),
    ),
    "qadsm": XglueTask(
        places=("QADSM/xglue.qadsm.{language}.{split}",),
        languages=("en", "de", "fr"),
        labels=("Bad", "Good"),
        texts=("query", "title + description"),
        header=("query", "title", "description", "label"),
    ),
    "qam": XglueTask(
        places=("QAM/xglue.qam.{language}.{split}",),
        languages=("en", "de", "fr"),
        labels=("no", "yes"),
        texts=("question", "passage"),
        header=("question", "passage", "label"),
        in_file=("0", "1"),
    ),
}


# ------------------------------------------------------------------------------------------- files
def find_files(layout: XglueTask, folder: str, split: str) -> dict[str, str]:
    """Language -> file of a split, for those that are there, from the first place that has a training file; English
    also if it is missing, for the message.
    """
    places = (f"{ARCHIVE}/{layout.places[0]}", *layout.places)
    chosen = next((p for p in places if existing(os.path.join(folder, layout.files(p, "train")["en"]))), places[0])
    found = {language: os.path.join(folder, *path.split("/")) for language, path in layout.files(chosen, split).items()}
    return {language: path for language, path in found.items() if language == "en" or existing(path)}


def official_files(layout: XglueTask, place: int, languages: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The files of a task as published, of all its languages if none is named."""
    return tuple(
        path
        for split in ("train", "dev", "test")
        for language, path in layout.files(layout.places[place], split).items()
        if language in (languages or layout.languages)
    )


def read_xglue(layout: XglueTask, folder: str, split: str) -> dict[str, list[Sentence] | list[Example]]:
    """The examples of a split by language. Raises UserError with file and line for what does not have the layout."""
    files = find_files(layout, folder, split)
    if not layout.texts:
        return {language: read_tokens(path, layout.labels, FETCH) for language, path in files.items()}
    how = (layout.texts, layout.in_file or layout.labels, FETCH)
    return {language: read_examples(path, *how, header=layout.header)["all"] for language, path in files.items()}

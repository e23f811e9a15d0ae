"""XGLUE's understanding tasks beside XNLI: train on English, test in every language (Liang et al. 2020, arXiv
2004.01401).

    ner     named entities: a tag per word         F1 of the entities          CoNLL-2002 and 2003
    pos     parts of speech: a tag per word        accuracy                    Universal Dependencies
    pawsx   paraphrase                two texts    accuracy                    PAWS-X
    nc      category of a news item   one text     accuracy
    qadsm   query and advertisement   two texts    accuracy
    qam     question and passage      two texts    accuracy

One row of the table XGLUE describes each. Two readers serve all: of token files, with a word and its tag in each line
and an empty line after each sentence, and of tab-separated rows. A class is known by its name in the file, never by a
number of ours. The languages are those of the table whose files are there.

Files are looked for in the places where they are published: XGLUE's archive, and for some tasks the folders of XTREME
(udpos), of PAWS-X (x-final), or conll/en/train.txt.
"""

import os
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

from data.files import existing, open_text, read_tsv
from data.glue import Example
from data.slots import IOB2, Sentence, are_spans
from kit.common import UserError

UPOS = tuple("ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X".split())
ENTITIES = ("O", *(f"{mark}-{kind}" for kind in ("PER", "ORG", "LOC", "MISC") for mark in "BI"))
TOPICS = tuple("foodanddrink sports news entertainment health video finance travel lifestyle autos".split())
ARCHIVE = "xglue_full_dataset"
FETCH = "python data/fetch.py xglue"


class Layout(NamedTuple):
    """A row of XGLUE. places: the files, with {split} and {language}, for each place where they may be.  texts: the
    columns that each text joins; () for a token file.  header: all columns of a file without a header line.
    """

    places: tuple[str, ...]
    languages: tuple[str, ...]
    labels: tuple[str, ...]  # by id
    texts: tuple[tuple[str, ...], ...] = ()
    header: tuple[str, ...] = ()
    in_file: tuple[str, ...] = ()  # the spelling of labels, if it is another
    metrics: tuple[str, ...] = ("accuracy",)  # keys of an evaluation
    reported: tuple[str, ...] = ()  # further ones
    splits: dict[str, str] = {}  # the spelling of splits

    def fill(self, place: str, split: str, language: str) -> str:
        """The file of a split in one language."""
        return place.format(split=self.splits.get(split, split), language=language)


XGLUE = {
    "ner": Layout(
        places=("NER/{language}.{split}", "conll/{language}/{split}.txt"),
        languages=("en", "de", "es", "nl"),
        labels=ENTITIES,
        metrics=("f1",),
        reported=("accuracy",),
    ),
    "pos": Layout(
        places=("POS/{language}.{split}", "udpos/{split}-{language}.tsv"),
        languages=tuple("en ar bg de el es fr hi it nl pl pt ru th tr ur vi zh".split()),
        labels=UPOS,
        reported=("precision",),
    ),
    "pawsx": Layout(
        places=("PAWSX/{language}/{split}.tsv", "x-final/{language}/{split}.tsv"),
        languages=("en", "de", "es", "fr"),
        labels=("different", "paraphrase"),
        texts=(("sentence1",), ("sentence2",)),
        in_file=("0", "1"),
        splits={"dev": "dev_2k", "test": "test_2k"},
    ),
    "nc": Layout(
        places=("NC/xglue.nc.{language}.{split}",),
        languages=("en", "de", "es", "fr", "ru"),
        labels=TOPICS,
        texts=(("title", "body"),),
        header=("title", "body", "label"),
    ),
    "qadsm": Layout(
        places=("QADSM/xglue.qadsm.{language}.{split}",),
        languages=("en", "de", "fr"),
        labels=("Bad", "Good"),
        texts=(("query",), ("title", "description")),
        header=("query", "title", "description", "label"),
    ),
    "qam": Layout(
        places=("QAM/xglue.qam.{language}.{split}",),
        languages=("en", "de", "fr"),
        labels=("no", "yes"),
        texts=(("question",), ("passage",)),
        header=("question", "passage", "label"),
        in_file=("0", "1"),
    ),
}


# ------------------------------------------------------------------------------------------- files
def find_files(name: str, folder: str, split: str) -> dict[str, str]:
    """Language -> file of a split, for those that are there, from the first place that has a training file; English
    also if it is missing, for the message.
    """
    layout = XGLUE[name]

    def path(pattern: str, split: str, language: str) -> str:
        return os.path.join(folder, *layout.fill(pattern, split, language).split("/"))

    patterns = (f"{ARCHIVE}/{layout.places[0]}", *layout.places)
    chosen = next((each for each in patterns if existing(path(each, "train", "en"))), patterns[0])
    languages = layout.languages if split != "train" else ("en",)
    found = {language: path(chosen, split, language) for language in languages}
    return {language: file for language, file in found.items() if language == "en" or existing(file)}


def official_files(name: str, place: int, languages: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The files of a task as published, of all its languages if none is named."""
    layout = XGLUE[name]
    return tuple(
        layout.fill(layout.places[place], split, language)
        for split in ("train", "dev", "test")
        for language in languages or layout.languages
        if split != "train" or language == "en"
    )


def read_xglue(name: str, folder: str, split: str) -> dict[str, list[Sentence] | list[Example]]:
    """The examples of a split by language. Raises UserError with file and line for what does not have the layout."""
    layout, files = XGLUE[name], find_files(name, folder, split)
    if layout.texts:
        return {language: read_rows(name, path) for language, path in files.items()}
    return {language: read_tokens(path, layout.labels, FETCH) for language, path in files.items()}


@lru_cache(maxsize=40)
def read_tokens(path: str, known: tuple[str, ...] | None, fetch: str) -> list[Sentence]:
    """Sentences of words and tags: the first and the last of the columns, which a tab separates, or a space in a line
    without tabs. Lines -DOCSTART- are left out.  known: the tags; where they are spans, other marks of spans (IOB2) are
    read as B and I. None: any, as they stand.
    """
    sentences, words, tags, columns = [], [], [], 0
    spanned = known is not None and are_spans(known)
    with open_text(path, fetch) as file:
        for number, line in enumerate(chain(file, ("",)), start=1):  # the last sentence may have no empty line
            line = line.rstrip("\r\n ")
            if not line.strip(" \t") or line.startswith("-DOCSTART-"):
                if words:
                    sentences.append(Sentence(tuple(words), tuple(tags), ""))
                words, tags = [], []
                continue
            cells = line.split("\t" if "\t" in line else " ")
            columns = columns or max(2, len(cells))
            if len(cells) != columns or not cells[0] or not cells[-1]:
                what = f"a word and its tag in {columns} columns, like the lines above"
                raise UserError(f"{path}, line {number}: {line[:50]!r} is not {what}")
            tag = IOB2.get(cells[-1][:2], cells[-1][:2]) + cells[-1][2:] if spanned else cells[-1]
            if known is not None and tag not in known:
                raise UserError(f"{path}, line {number}: unknown tag {tag[:50]!r}; known: {' '.join(known)[:200]}")
            words.append(cells[0])
            tags.append(tag)
    return not_empty(sentences, path, fetch)


@lru_cache(maxsize=40)
def read_rows(name: str, path: str) -> list[Example]:
    """One or two texts and a class."""
    layout, examples = XGLUE[name], []
    ids = {label: i for i, label in enumerate(layout.in_file or layout.labels)}
    columns = [column for text in layout.texts for column in text]
    for number, (*cells, label) in read_tsv(path, (*columns, "label"), FETCH, layout.header):
        if label not in ids:
            raise UserError(f"{path}, line {number}: unknown label {label[:50]!r}; known: {' '.join(ids)}")
        of = dict(zip(columns, cells, strict=True))
        texts = [" ".join(of[column] for column in text) for text in layout.texts]
        examples.append(Example(texts[0], texts[1] if len(texts) > 1 else None, ids[label]))
    return not_empty(examples, path, FETCH)


def not_empty(examples: list, path: str, fetch: str) -> list:
    if not examples:
        raise UserError(f"{path} has no rows" + (f": fetch it again with '{fetch}'" if fetch else ""))
    return examples

"""Words with tags: reading the files of joint tasks (an intent per sentence, a tag per word), and of tags alone.

ATIS and SNIPS are published as three text files per split, with one sentence per line in each:

    train/seq.in     from lisbon to porto on friday
    train/seq.out    O B-from O B-to O B-day
    train/label      find_train

Each word has a tag: O for none, B-x where a slot x begins, I-x where it continues (data/metrics.py scores them). Files
of tags alone have a word and its tag in each line, and an empty line after each sentence.
"""

import os
from functools import lru_cache
from itertools import chain

from data.files import Names, Sentence, again, not_empty, open_text
from data.metrics import IOB2, are_spans
from kit.common import UserError

FILES = ("seq.in", "seq.out", "label")
SPLITS = ("train", "dev", "test")


@lru_cache(maxsize=4)
def read_sentences(folder: str, split: str, fetch: str) -> list[Sentence]:
    """The sentences of a split in three files. fetch: the command that tells where the files come from.

    Raises UserError for a missing file, or one that does not have the layout above.
    """
    texts, tags, labels = (read_lines(os.path.join(folder, split, name), fetch) for name in FILES)
    path = os.path.join(folder, split, "seq.out")
    if not len(texts) == len(tags) == len(labels):
        counts = ", ".join(f"{name} {len(lines)}" for name, lines in zip(FILES, (texts, tags, labels), strict=True))
        raise UserError(f"{path}: the files must have equally many lines, but they have {counts}{again(fetch)}")
    for number, (words, marks) in enumerate(zip(texts, tags, strict=True), start=1):
        if len(words) != len(marks):
            raise UserError(f"{path}, line {number}: {len(marks)} tags, but seq.in has {len(words)} words there")
        if wrong := [tag for tag in marks if tag != "O" and (tag[:2] not in ("B-", "I-") or len(tag) == 2)]:
            raise UserError(f"{path}, line {number}: the tag {wrong[0]!r} is not O, B-name or I-name")
    return [Sentence(*each, " ".join(intent)) for *each, intent in zip(texts, tags, labels, strict=True)]


def read_lines(path: str, fetch: str) -> list[tuple[str, ...]]:
    """The lines of a file, each split at its spaces, of which some files have several in a row."""
    with open_text(path, fetch) as file:
        lines = [tuple(line.split()) for line in file]
    if () in lines:
        raise UserError(f"{path}, line {lines.index(()) + 1} is empty: every line is a sentence")
    return not_empty(lines, path, fetch)


def read_names(folder: str, fetch: str) -> Names:
    """The intents and tags of a data set: the sorted names of train (O first), then those that only dev or test have."""
    intents, slots, known = [], ["O"], ()  # O has id 0 even in a training set that never uses it
    for split in SPLITS:
        if split == "train" or os.path.isdir(os.path.join(folder, split)):
            sentences = read_sentences(folder, split, fetch)
            intents += sorted({sentence.intent for sentence in sentences} - {*intents})
            slots += sorted({tag for sentence in sentences for tag in sentence.tags} - {*slots})
            known = known or (len(intents), len(slots))
    return Names(tuple(intents), tuple(slots), *known)


@lru_cache(maxsize=40)
def read_tokens(path: str, known: tuple[str, ...] | None, fetch: str) -> list[Sentence]:
    """Sentences of words and tags: the first and the last of the columns, which a tab separates, or a space in a line
    without tabs. Lines -DOCSTART- are left out.  known: the tags; where they are spans, other marks of spans (IOB2) are
    read as B and I. None: any, as they stand.
    """
    sentences, sentence, columns = [], [], 0
    spanned = known is not None and are_spans(known)
    with open_text(path, fetch) as file:
        for number, line in enumerate(chain(file, ("",)), start=1):  # the last sentence may have no empty line
            line = line.rstrip("\r\n ")
            if not line.strip(" \t") or line.startswith("-DOCSTART-"):
                if sentence:
                    sentences.append(Sentence(*zip(*sentence, strict=True), ""))
                sentence = []
                continue
            cells = line.split("\t" if "\t" in line else " ")
            columns = columns or max(2, len(cells))
            if len(cells) != columns or not cells[0] or not cells[-1]:
                what = f"a word and its tag in {columns} columns, like the lines above"
                raise UserError(f"{path}, line {number}: {line[:50]!r} is not {what}")
            tag = IOB2.get(cells[-1][:2], cells[-1][:2]) + cells[-1][2:] if spanned else cells[-1]
            if known is not None and tag not in known:
                raise UserError(f"{path}, line {number}: unknown tag {tag[:50]!r}; known: {' '.join(known)[:200]}")
            sentence.append((cells[0], tag))
    return not_empty(sentences, path, fetch)

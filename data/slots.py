"""Joint intent classification and slot filling: reading the files, scoring the tags.

ATIS and SNIPS are published as three text files per split, with one sentence per line in each:

    train/seq.in     from lisbon to porto on friday
    train/seq.out    O B-from O B-to O B-day
    train/label      find_train

Each word has a tag: O for none, B-x where a slot x begins, I-x where it continues. A slot counts as found only if its
type, first word and last word are right, as in conlleval.
"""

import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data.files import open_text
from data.metrics import scores
from kit.common import UserError

FILES = ("seq.in", "seq.out", "label")
SPLITS = ("train", "dev", "test")
# The marks of IOBES, BILOU and BMES as those of IOB2: a span of one word, the end of a span, its middle.
IOB2 = {"S-": "B-", "U-": "B-", "E-": "I-", "L-": "I-", "M-": "I-"}


class Sentence(NamedTuple):
    """One tag per word, one intent per sentence."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    intent: str


class Names(NamedTuple):
    """The names of the ids of intents and tags.

    A model knows the first `known_*` names, those of the training files. The others occur only in dev or test: no
    model can predict them, so they count as wrong.
    """

    intents: tuple[str, ...]
    slots: tuple[str, ...]
    known_intents: int
    known_slots: int


# ---------------------------------------------------------------------------------------- reading
@lru_cache(maxsize=4)
def read_sentences(folder: str, split: str, fetch: str) -> list[Sentence]:
    """The sentences of a split. fetch: the command that tells where the files come from.

    Raises UserError for a missing file, or one that does not have the layout above.
    """
    texts, tags, labels = (read_lines(os.path.join(folder, split, name), fetch) for name in FILES)
    if not len(texts) == len(tags) == len(labels):
        counts = ", ".join(f"{name} {len(lines)}" for name, lines in zip(FILES, (texts, tags, labels), strict=True))
        raise UserError(
            f"{os.path.join(folder, split)}: the files must have equally many lines, but they have "
            f"{counts}: bring them again, '{fetch}' tells from where"
        )
    sentences = []
    for number, (words, marks, intent) in enumerate(zip(texts, tags, labels, strict=True), start=1):
        path = os.path.join(folder, split, "seq.out")
        if len(words) != len(marks):
            raise UserError(f"{path}, line {number}: {len(marks)} tags, but seq.in has {len(words)} words there")
        for tag in marks:
            if tag != "O" and (tag[:2] not in ("B-", "I-") or len(tag) == 2):
                raise UserError(f"{path}, line {number}: the tag {tag!r} is not O, B-name or I-name")
        sentences.append(Sentence(words, marks, " ".join(intent)))
    return sentences


def read_lines(path: str, fetch: str) -> list[tuple[str, ...]]:
    """The lines of a file, each split at its spaces, of which some files have several in a row."""
    with open_text(path, fetch) as file:
        lines = [tuple(line.split()) for line in file]
    if not lines:
        raise UserError(f"{path} is empty: '{fetch}' tells where to get it")
    if () in lines:
        raise UserError(f"{path}, line {lines.index(()) + 1} is empty: every line is a sentence")
    return lines


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


# ---------------------------------------------------------------------------------------- scoring
def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The slots of a sentence: (type, first word, word after the last).

    As in conlleval, an I-x that continues no x begins a new slot.

    >>> sorted(spans(["B-from", "I-from", "O", "I-to"]))
    [('from', 0, 2), ('to', 3, 4)]
    """
    found = set()
    kind, begin = None, 0  # of the span that is open at this word
    for i, tag in enumerate((*tags, "O")):
        if kind is not None and tag == f"I-{kind}":
            continue
        if kind is not None:
            found.add((kind, begin, i))
        kind, begin = (None if tag == "O" else tag[2:]), i
    return found


def are_spans(tags: Iterable[str]) -> bool:
    """Whether all tags are O or those of spans, such as B-x, I-x and S-x."""
    return all(tag == "O" or (tag[:2] in ("B-", "I-", *IOB2) and len(tag) > 2) for tag in tags)


def slot_scores(predictions: list[Sequence[str]], labels: list[Sequence[str]]) -> dict:
    """Scores of the tags of many sentences.

    slot_f1          F1 in % over all slots of all sentences (conlleval's; 0 if nothing is right)
    slot_correct, slot_gold, slot_predicted     the counts behind it: of slots in both, in labels, in predictions
    slot_token_f1    micro-averaged F1 in % over the tags of single words, O included. Every wrong word is one false
                     positive and one false negative, so this is the accuracy of the tags. Work on ATIS with
                     tensor-compressed Transformers reports it as "F1"; it is higher than slot_f1, since most words
                     are O.
    """
    found, true = ({(i, *span) for i, row in enumerate(rows) for span in spans(row)} for rows in (predictions, labels))
    words = [a == b for rows in zip(predictions, labels, strict=True) for a, b in zip(*rows, strict=True)]
    return {
        "slot_f1": 100 * 2 * len(true & found) / max(len(true) + len(found), 1),
        "slot_correct": len(true & found),
        "slot_gold": len(true),
        "slot_predicted": len(found),
        "slot_token_f1": 100 * sum(words) / max(len(words), 1),
    }


def runs(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Runs of equal tags as spans. XGLUE's script gives tags of parts of speech to a scorer of IOB spans, which reads
    them like this; it takes the S of SCONJ and SYM for the mark of a span of one word.
    """
    found, begin = set(), 0
    for i, tag in enumerate(tags, start=1):
        if i == len(tags) or tags[i] != tag or tag[0] == "S":
            found.add((tag, begin, i))
            begin = i
    return found


def token_scores(
    slots: list[np.ndarray], tags: list[np.ndarray], names: tuple[str, ...], metrics: tuple[str, ...]
) -> dict:
    """The evaluation of a task with a tag per word: what scores() returns for the words, and in %

    f1          of the spans, if the tags are spans (O, B-x, I-x); else macro_f1
    precision   if they are none: what XGLUE's script calls accuracy of parts of speech: correct runs of equal tags, of
                all predicted ones
    score       the mean of `metrics`
    """
    found = scores(("accuracy",), np.concatenate(slots), np.concatenate(tags))
    predicted, true = ([[names[i] for i in row] for row in rows] for rows in (slots, tags))
    if are_spans(names):
        spanned = slot_scores(predicted, true)
        found |= {key: spanned[f"slot_{key}"] for key in ("f1", "gold", "predicted")}
    else:
        both = sum(len(runs(a) & runs(b)) for a, b in zip(predicted, true, strict=True))
        found["precision"] = 100 * both / max(sum(len(runs(row)) for row in predicted), 1)
        found["f1"] = found["macro_f1"]
    return found | {"score": sum(found[name] for name in metrics) / len(metrics)}


def joint_scores(
    predictions: np.ndarray, labels: np.ndarray, slots: list[np.ndarray], tags: list[np.ndarray], names: tuple[str, ...]
) -> dict:
    """The evaluation of a joint task: accuracy of the intents, slot_scores(), "exact" (sentences with everything
    correct, in %), and "score", the mean of accuracy and slot_f1.

    slots, tags: predicted and true ids of the words of each sentence.  names: of the tags.
    """
    found = scores(("accuracy",), predictions, labels)
    found |= slot_scores(*([[names[i] for i in row] for row in rows] for rows in (slots, tags)))
    whole = (np.array_equal(a, b) for a, b in zip(tags, slots, strict=True))
    exact = sum(bool(a and b) for a, b in zip(predictions == labels, whole, strict=True))
    found |= {"exact": 100 * exact / len(labels), "exact_correct": exact}
    return found | {"score": (found["accuracy"] + found["slot_f1"]) / 2}

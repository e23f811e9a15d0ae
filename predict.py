"""Label texts with a student: the integer model of a student.pt, one text per line, two texts separated by a tab.

    python predict.py out/NAME/student.pt texts.tsv
    echo "The girl reads a book.	The girl reads." | python predict.py out/NAME/student.pt

Each line becomes one line: the label and its probability, or the number of a regression. Of words with tags, the tag of
each word, separated by spaces, behind the label if there is one. A blank line stays blank, and so does one that this
student can't read, which is told on stderr. In Python:

    student = load("out/NAME/student.pt")
    for label, probability in predict(student, [("The girl reads a book.", "The girl reads.")]):
        print(label, probability)
"""

if __name__ == "__main__":
    import kit.interrupt  # noqa: F401

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import count, islice
from typing import NamedTuple

import numpy as np
import torch

from checkpoint import read_student, tokenizer_of
from data.batches import IGNORE, Dataset, cut_note, encode_sentences, encode_texts, evaluation_batches, evaluation_order
from data.files import refuse_utf16
from data.slots import Names, Sentence
from data.tokenizer import Encoder
from int8 import integer_model
from kit.common import UserError, choose_device, exit_status
from model import Model

CHUNK = 1024  # texts that are sorted by length together
TOKENS = 4096  # per batch, padding included


class Student(NamedTuple):
    """A model that is ready to predict; it can be copied and pickled.

    labels: of a text; slots: tags of words, () if the model has none.  max_length: where texts are cut, as in
    training.  texts: 1 or 2, as in training; 0 if the file does not say.
    """

    model: Model
    tokenizer: Encoder
    labels: tuple[str, ...]
    slots: tuple[str, ...]
    max_length: int
    texts: int


def load(path: str, device: str = "auto", threads: int | None = None) -> Student:
    """A student.pt as an integer model. Worker processes must be spawned: PyTorch hangs in one that is forked after a
    prediction with several threads.

    Raises UserError for a damaged file or one without integers.
    """
    read, device = read_student(path), choose_device(device, threads)
    labels, slots = read.classes
    if read.config.head == "token":  # its labels are those of words
        labels, slots = (), labels
    elif read.config.head not in ("sequence", "joint"):
        raise UserError(f"{path} has a {read.config.head} head, which predicts nothing")
    texts = 1 if slots else {"1": 1, "2": 2}.get(read.notes.get("texts"), 0)
    return Student(integer_model(read, device), tokenizer_of(path, read), labels, slots, read.max_length, texts)


def problem(student: Student, text: str | tuple[str, str]) -> str:
    """Why the student can't read a text, "" if it can: it was trained on single texts or on pairs, and words whose tags
    stand beside a label are never cut.
    """
    texts = (text,) if isinstance(text, str) else text
    pair = isinstance(text, (tuple, list)) and len(text) > 1
    if not (pair or isinstance(text, str)) or not all(isinstance(each, str) for each in texts):
        return "is no text or pair of texts"
    if not texts[0].strip():
        return "has an empty first text" if pair else "is empty"
    if len(texts) > 2 or len(texts) != (student.texts or len(texts)):
        wanted = {0: "one text or two", 1: "one text", 2: "two texts"}[student.texts]
        return (
            f"has {len(texts)} text{'s' if len(texts) > 1 else ''}, and this student reads {wanted}, separated by a tab"
        )
    if student.slots and student.labels:
        ((ids, _),), most = student.tokenizer.encode_words([words_of(text)]), student.model.config.max_tokens
        if len(ids) > most:
            return f"has {len(ids)} tokens, the model takes {most}: split it"
    return ""


def predict(student: Student, texts: Iterable[str | tuple[str, str]]) -> Iterator[tuple]:
    """For each text or pair, in order: (label, probability); (number,) of a regression; (tags,) of words, or (label,
    probability, tags). Pairs get the token types that they were trained with. As in training, a long text is cut, which
    is told on stderr, and a long sentence of words with tags is split.

    Raises UserError for a text that the student can't read, see problem().
    """
    if isinstance(texts, str):
        raise UserError("predict takes a list of texts, not a string: [text]")
    texts, kinds, done = iter(texts), set(), 0
    while chunk := list(islice(texts, CHUNK)):
        for number, text in enumerate(chunk, start=done + 1):
            kinds.add(isinstance(text, str))
            if wrong := problem(student, text) or ("is of another kind than those before" if len(kinds) > 1 else ""):
                raise UserError(f"text {number} {wrong}")
        done += len(chunk)
        yield from predict_chunk(student, chunk)


@torch.no_grad()
def predict_chunk(student: Student, texts: list[str | tuple[str, str]]) -> list[tuple]:
    model, device = student.model, next(student.model.parameters()).device
    dataset = replace(encode(student, texts), pad=student.tokenizer.pad_id)
    rows, tags = [], []
    for batch in evaluation_batches(dataset, TOKENS):
        batch = batch.to(device)
        logits, _ = model(batch.ids, batch.mask, types=batch.types)
        logits, slots = logits if isinstance(logits, tuple) else (logits, logits)
        rows += zip(*best(logits, student.labels), strict=True) if student.labels else [()] * len(batch.ids)
        if student.slots:
            words, found = (batch.tags != IGNORE).cpu(), slots.argmax(dim=-1).cpu()
            tags += [[student.slots[tag] for tag in found[i][words[i]].tolist()] for i in range(len(words))]
    order = np.argsort(evaluation_order(dataset))
    rows = [rows[i] for i in order]
    if not student.slots:
        return rows
    every = (tag for i in order for tag in tags[i])  # a long sentence is several rows: its words follow each other
    rows = rows if student.labels else [()] * len(texts)
    return [(*row, list(islice(every, len(words_of(text))))) for row, text in zip(rows, texts, strict=True)]


def best(logits: torch.Tensor, labels: tuple[str, ...]) -> tuple[list, ...]:
    """The likeliest label of each row and its probability; of a regression, the number."""
    if len(labels) == 1:
        return (logits[:, 0].tolist(),)
    probability, index = logits.float().softmax(dim=-1).max(dim=-1)
    return [labels[i] for i in index.tolist()], probability.tolist()


def words_of(text: str) -> list[str]:
    """Words are separated by spaces alone, as in files of tags: other white space is part of a word."""
    return [word for word in text.split(" ") if word]


def encode(student: Student, texts: list[str | tuple[str, str]]) -> Dataset:
    if student.slots:  # any tag: it says where a word begins
        names = Names(("",), student.slots[:1], 1, 1)
        sentences = [Sentence(words, student.slots[:1] * len(words), "") for words in map(words_of, texts)]
        longest = student.model.config.max_tokens if student.labels else student.max_length
        return encode_sentences(sentences, names, student.tokenizer, longest, cuts=not student.labels)
    first, *second = zip(*([text] if isinstance(text, str) else text for text in texts), strict=True)
    labels = np.zeros(len(texts), dtype=np.int64)
    dataset = encode_texts(student.tokenizer, first, second[0] if second else None, student.max_length, labels)
    if note := cut_note([dataset], "texts", student.max_length):
        print(f"NOTE: {note}", file=sys.stderr)
    return dataset


def lines_of(path: str) -> Iterator[tuple[str | tuple[str, str], str]]:
    """(text or pair, what is wrong) of each line of a file, or of standard input for "-"; ("", "") of a blank line."""
    with open(0 if path == "-" else path, "rb") as file:
        refuse_utf16(file, path)
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield "", f"is not UTF-8 text (byte {error.start})"
                continue
            texts = tuple(text.split("\t"))
            yield "" if not text.strip() else texts if len(texts) > 1 else text, ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Label texts with the integer model of a student.pt.",
        epilog="example: python predict.py out/xnli-mini-w8a8-s0/student.pt pairs.tsv",
    )
    parser.add_argument("student", help="a student.pt of train.py")
    parser.add_argument(
        "texts", nargs="?", default="-", help="one text per line, two separated by a tab (default: standard input)"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: auto")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    args = parser.parse_args(argv)

    def job() -> None:
        source = "standard input" if args.texts == "-" else args.texts
        student, lines, failed = load(args.student, args.device, args.threads), lines_of(args.texts), 0
        for begin in count(1, CHUNK):
            chunk, readable = list(islice(lines, CHUNK)), {}
            for number, (text, wrong) in enumerate(chunk, start=begin):
                if wrong := wrong or (text and problem(student, text)):
                    print(f"error: {source}, line {number} {wrong}", file=sys.stderr)
                    failed += 1
                elif text:
                    readable[number] = text
            found = dict(zip(readable, predict(student, readable.values()), strict=True))
            for number in range(begin, begin + len(chunk)):
                row = found.get(number, ())
                print(
                    *(f"{x:.4f}" if isinstance(x, float) else " ".join(x) if isinstance(x, list) else x for x in row),
                    sep="\t",
                )
            if not chunk:
                break
        if failed:
            raise UserError(f"lines without a label, see above: {failed:,}; in the output they are blank")

    return exit_status(job)


if __name__ == "__main__":
    sys.exit(main())

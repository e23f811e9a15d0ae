"""Label texts with a student: the integer model of a student.pt, one text a line, two texts by a tab.

    python predict.py out/NAME/student.pt texts.tsv
    echo "The girl reads a book.	The girl reads." | python predict.py out/NAME/student.pt

Each line becomes one line: the label and its probability, or the number of a regression. Of words with tags, the tag of
each word, separated by spaces, behind the label if there is one. In Python:

    student = load("out/NAME/student.pt")
    for label, probability in predict(student, [("The girl reads a book.", "The girl reads.")]):
        print(label, probability)
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from checkpoint import read_student, tokenizer_of
from common import UserError, choose_device, exit_status
from data.batches import IGNORE, Dataset, dataset_of, encode_texts, evaluation_batches, evaluation_order
from data.tokenizer import Encoder
from int8 import integer_model
from model import Model

CHUNK = 1024  # texts that are sorted by length together
TOKENS = 4096  # per batch, padding included


class Student(NamedTuple):
    """A model that is ready to predict. labels: of a text; slots: tags of words, () if the model has none."""

    model: Model
    tokenizer: Encoder
    labels: tuple[str, ...]
    slots: tuple[str, ...]
    max_length: int  # where texts are cut, as in training


def load(path: str, device: str = "auto") -> Student:
    """A student.pt as an integer model. Raises UserError for a damaged file or one without integers."""
    read = read_student(path)
    names = [tuple(filter(None, read.notes.get(kind, "").split("\t"))) for kind in ("labels", "slots")]
    if read.config.head == "token":  # its labels are those of words
        names = [(), names[0]]
    elif read.config.head not in ("sequence", "joint"):
        raise UserError(f"{path} has a {read.config.head} head, which predicts nothing")
    length = read.notes.get("max_length", "")
    length = min(int(length) if length.isdecimal() else read.config.max_tokens, read.config.max_tokens)
    model = integer_model(read, choose_device(device, None))
    return Student(model, tokenizer_of(path, read), *names, length)


def predict(student: Student, texts: Iterable[str | tuple[str, str]]) -> Iterator[tuple]:
    """For each text or pair, in order: (label, probability); (number,) of a regression; (tags,) of words, or (label,
    probability, tags). Pairs get the token types that they were trained with; a long text is cut as in training.

    Raises UserError for texts of which only some are pairs, and for a sentence with tags that is too long.
    """
    texts, kinds = iter(texts), set()
    while chunk := list(islice(texts, CHUNK)):
        kinds |= {isinstance(text, tuple) for text in chunk}
        if len(kinds) > 1 or (student.slots and True in kinds):
            what = "words with tags" if student.slots else "one text in each line, or two by a tab in each"
            raise UserError(f"some texts are pairs, which is not what is asked for here: give {what}")
        yield from predict_chunk(student, chunk)


@torch.no_grad()
def predict_chunk(student: Student, texts: list[str | tuple[str, str]]) -> list[tuple]:
    model, device = student.model, next(student.model.parameters()).device
    dataset = replace(encode(student, texts), pad=student.tokenizer.pad_id)
    rows = []
    for batch in evaluation_batches(dataset, TOKENS):
        batch = batch.to(device)
        logits, _ = model(batch.ids, batch.mask, types=batch.types)
        logits, slots = logits if isinstance(logits, tuple) else (logits, logits)
        found = list(zip(*best(logits, student.labels), strict=True)) if student.labels else [()] * len(batch.ids)
        if student.slots:
            words, tags = (batch.tags != IGNORE).cpu(), slots.argmax(dim=-1).cpu()
            for i, row in enumerate(found):
                found[i] = (*row, [student.slots[tag] for tag in tags[i][words[i]].tolist()])
        rows += found
    order = np.argsort(evaluation_order(dataset))
    return [rows[i] for i in order]


def best(logits: torch.Tensor, labels: tuple[str, ...]) -> tuple[list, ...]:
    """The likeliest label of each row and its probability; of a regression, the number."""
    if len(labels) == 1:
        return (logits[:, 0].tolist(),)
    probability, index = logits.float().softmax(dim=-1).max(dim=-1)
    return [labels[i] for i in index.tolist()], probability.tolist()


def encode(student: Student, texts: list[str | tuple[str, str]]) -> Dataset:
    none = np.zeros(len(texts), dtype=np.int64)
    if not student.slots:
        first, *second = zip(*([text] if isinstance(text, str) else text for text in texts), strict=True)
        return encode_texts(student.tokenizer, first, second[0] if second else None, student.max_length, none)
    encoded = student.tokenizer.encode_words([text.split() for text in texts])
    longest = max(len(ids) for ids, _ in encoded)
    if longest > student.model.config.max_tokens:
        raise UserError(f"a sentence has {longest} tokens, the model takes {student.model.config.max_tokens}: split it")
    tags = [np.full(len(ids), IGNORE) for ids, _ in encoded]
    for row, (_, first) in zip(tags, encoded, strict=True):
        row[first] = 0  # any tag: here a word begins
    return dataset_of([ids for ids, _ in encoded], none, tags)


def lines_of(path: str) -> Iterator[str | tuple[str, str]]:
    """The texts of a file, or of standard input for "-". Raises UserError for a line that is not one text or two."""
    try:
        with open(0 if path == "-" else path, encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                texts = tuple(line.rstrip("\r\n").split("\t"))
                if len(texts) > 2 or not texts[0].strip():
                    what = "is empty" if not texts[0].strip() else f"has {len(texts)} texts"
                    raise UserError(f"{path}, line {number} {what}: give one text a line, or two by a tab")
                yield texts if len(texts) == 2 else texts[0]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Label texts with the integer model of a student.pt.",
        epilog="example: python predict.py out/xnli-mini-w8a8-s0/student.pt pairs.tsv",
    )
    parser.add_argument("student", help="a student.pt of train.py")
    parser.add_argument("texts", nargs="?", default="-", help="one text a line, two by a tab (default: standard input)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: auto")
    args = parser.parse_args(argv)

    def job() -> None:
        for row in predict(load(args.student, args.device), lines_of(args.texts)):
            cells = [f"{x:.4f}" if isinstance(x, float) else " ".join(x) if isinstance(x, list) else x for x in row]
            print("\t".join(cells))

    return exit_status(job)


if __name__ == "__main__":
    sys.exit(main())

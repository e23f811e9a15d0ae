"""Where quantization error arises, layer by layer: the study behind SDQ (arXiv 2307.05972, sec. 3).

    python train.py --task xnli --bits 2 --analyze       # adds "errors" to each row of results.json
    python plot.py out/NAME/results.json --errors --out errors.png

A student is compared with its teacher on the same texts, at five places of each layer: query, key,
value, context (map @ V, per head) and output (projected). With S and T the two tensors of a layer:

    mae        mean |S - T|
    frobenius  ||S - T||_F of one text, averaged over texts
    relative   ||S - T||_F / ||T||_F over all texts, which layers of different scale share

Each is measured twice. *Accumulated*: student and teacher each run from their own embeddings, so a
layer's error holds what all layers before it got wrong. *Local*: the student's layer is given the
teacher's hidden states, so only its own quantization errs. Where the first is far above the second,
error has come through depth.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from data.batches import Batch
from model import Model
from report import markdown_table

PLACES = ("query", "key", "value", "context", "output")
KINDS = ("accumulated", "local")


class Errors:
    """Sums over texts of one place in one layer."""

    def __init__(self):
        self.absolute = self.squares = self.reference = self.frobenius = 0.0
        self.numbers = self.texts = 0

    def add(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> None:
        """student, teacher: (B, T, C) or (B, H, T, D).  mask: (B, T), True for real tokens."""
        difference, teacher = student.double() - teacher.double(), teacher.double()
        numbers = difference.numel()
        if mask is not None:
            padding = ~(mask if difference.dim() == 3 else mask[:, None, :])[..., None]
            difference = difference.masked_fill(padding, 0.0)
            teacher = teacher.masked_fill(padding, 0.0)
            numbers = int(mask.sum()) * (numbers // mask.numel())
        squares = difference.square().flatten(1).sum(dim=1)  # (B,)
        self.absolute += float(difference.abs().sum())
        self.squares += float(squares.sum())
        self.reference += float(teacher.square().sum())
        self.frobenius += float(squares.sqrt().sum())
        self.numbers += numbers
        self.texts += len(difference)

    def summary(self) -> dict[str, float]:
        relative = (self.squares / self.reference) ** 0.5 if self.reference else 0.0
        return {
            "mae": self.absolute / self.numbers,
            "frobenius": self.frobenius / self.texts,
            "relative": relative,
        }


@torch.no_grad()
def layer_errors(teacher: Model, student: Model, batches: Iterable[Batch]) -> dict:
    """{"accumulated" or "local": {place: [summary of layer 0, 1, ...]}}."""
    teacher.eval()
    student.eval()
    layers = len(student.encoder.layers)
    sums = {kind: {p: [Errors() for _ in range(layers)] for p in PLACES} for kind in KINDS}
    for batch in batches:
        _, target = teacher(batch.ids, batch.mask, (*PLACES, "hidden"))
        _, found = student(batch.ids, batch.mask, PLACES)
        local = {place: [] for place in PLACES}
        key_mask = None if batch.mask is None else batch.mask[:, None, None, :]
        for layer, hidden in zip(student.encoder.layers, target["hidden"], strict=False):
            layer(hidden, key_mask, local)
        for kind, taps in (("accumulated", found), ("local", local)):
            for place in PLACES:
                for i in range(layers):
                    sums[kind][place][i].add(taps[place][i], target[place][i], batch.mask)
    return {
        kind: {place: [errors.summary() for errors in row] for place, row in places.items()}
        for kind, places in sums.items()
    }


def errors_table(methods: dict[str, dict]) -> str:
    """Relative error of each head's output, in %: a line a method and kind, a column a layer."""
    rows = []
    for name, row in methods.items():
        for kind in KINDS if "errors" in row else ():
            layers = row["errors"][kind]["context"]
            rows.append([f"{name} {kind}", *(f"{100 * layer['relative']:.1f}" for layer in layers)])
    header = ["error of context, %", *(f"layer {i + 1}" for i in range(len(rows[0]) - 1))]
    return markdown_table(header, rows)

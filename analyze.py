"""Where quantization error arises, layer by layer: the study behind SDQ (arXiv 2307.05972, sec. 3).

    python train.py --task xnli --bits 2 --analyze       # adds "errors" and "recovery" to results.json

A student is compared with its teacher on the same sequences, at five taps of each layer: query, key, value, context
(map @ V, per head) and output (projected). With S and T the two tensors of a layer:

    mae        mean |S - T|
    frobenius  ||S - T||_F of one sequence, averaged over sequences
    relative   ||S - T||_F / ||T||_F over all sequences, comparable between layers

Each is measured twice. *Accumulated*: student and teacher each run from their own embeddings, so the error of a layer
includes what all layers before it got wrong. *Local*: the student's layer gets the teacher's hidden states, so only
its own quantization errs. If the first is far above the second, error has accumulated through depth.

Attention recovery (Kim et al. 2022, arXiv 2211.11014): the attention probabilities of a token order the keys of its
row, and quantization disturbs that order. Per layer, against the teacher:

    ranking      fraction of pairs of keys whose order the student flips; 0.5 is chance
    cover        cover length ratio: how many keys of the student's order contain the teacher's top 5,
                 divided by the number of keys
    map_kl       KL(teacher || student) of the row, in nats: distill.map_loss
    output_mse   MSE of the result of self-attention after residual and norm: the tap "normed"
    generation   relative error of the context with the student's maps and the teacher's values, and
    propagation  with the teacher's maps and the student's values: which half of self-attention errs (SA-GEN, SA-PROP)
    smallest, largest   of the student's "normed": outliers widen the range of one scale

And of the teacher alone, per layer, what makes activations hard to quantize with one scale:

    kurtosis     E[(y - mean)^4] / variance^2 over the channels of a hidden state, averaged over tokens: 1.8 of a uniform
                 distribution, 3 of a Gaussian, up to the number of channels if one is far larger than all others
"""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from data.batches import Batch
from distill import map_loss, real_pairs, vector_loss
from model import Model

PLACES = ("query", "key", "value", "context", "output")
KINDS = ("accumulated", "local")
TOP = 5  # keys of the teacher that the student's order must cover
TOKENS = 128  # of the sequence whose operations are counted
PAIRS_AT_ONCE = 2**18  # elements of a tensor of all pairs of keys: small enough for the cache


def error_sums(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """What the errors of one tap of one layer are made of, see `summary`: sums over all sequences, (6,) float64.

    student, teacher: (B, T, C) or (B, H, T, D).  mask: (B, T), True for real tokens.
    """
    teacher = teacher.double()
    difference, elements = student.double() - teacher, teacher.numel()
    if mask is not None:
        padding = ~(mask if teacher.dim() == 3 else mask[:, None, :])[..., None]
        difference, teacher = difference.masked_fill(padding, 0.0), teacher.masked_fill(padding, 0.0)
        elements = int(mask.sum()) * (elements // mask.numel())
    squares = difference.square().flatten(1).sum(dim=1)  # (B,)
    sums = difference.abs().sum(), squares.sum(), teacher.square().sum(), squares.sqrt().sum()
    return torch.tensor([*sums, elements, len(teacher)], dtype=torch.float64)


def summary(sums: Tensor) -> dict[str, float]:
    absolute, squares, reference, frobenius, elements, sequences = sums.tolist()
    relative = (squares / reference) ** 0.5 if reference else 0.0
    return {"mae": absolute / elements, "frobenius": frobenius / sequences, "relative": relative}


@torch.no_grad()
def layer_errors(teacher: Model, student: Model, batches: Iterable[Batch]) -> dict:
    """{"accumulated" or "local": {tap: [summary of layer 0, 1, ...]}}."""
    teacher.eval()
    student.eval()
    layers = student.encoder.layers
    sums = {kind: {place: [0.0] * len(layers) for place in PLACES} for kind in KINDS}
    for batch in batches:
        _, target = teacher(batch.ids, batch.mask, (*PLACES, "hidden"), types=batch.types)
        _, found = student(batch.ids, batch.mask, PLACES, types=batch.types)
        local = {place: [] for place in PLACES}
        key_mask = None if batch.mask is None else batch.mask[:, None, None, :]
        for layer, hidden in zip(layers, target["hidden"][:-1], strict=True):  # the last is the result
            layer(hidden, key_mask, local)
        for kind, taps in zip(KINDS, (found, local), strict=True):
            for place in PLACES:
                for i in range(len(layers)):
                    sums[kind][place][i] += error_sums(taps[place][i], target[place][i], batch.mask)
    return {kind: {place: list(map(summary, row)) for place, row in places.items()} for kind, places in sums.items()}


@torch.no_grad()
def count_flops(model: Model) -> int:
    """Floating-point operations of a sequence of TOKENS: all products, also those of attention and of a train's cores."""
    device = next(model.parameters()).device
    ids = torch.full((1, min(TOKENS, model.config.max_tokens)), model.config.pad_id + 1, device=device)
    with FlopCounterMode(display=False) as counter:
        model.eval()(ids, capture=("map",))  # fused attention would not be counted on every device
    return counter.get_total_flops()


# -------------------------------------------------------------------------------------- recovery
def real_rows(maps: Tensor, mask: Tensor | None) -> Tensor:
    """(B, H, T, T) -> (N, T): one row per head and real query; padded keys are NaN."""
    if mask is None:
        return maps.flatten(0, 2)
    maps = maps.masked_fill(~real_pairs(mask), float("nan"))
    return maps.transpose(1, 2)[mask].flatten(0, 1)  # (B, T, H, T) -> (n, H, T) -> (N, T)


def flipped_pairs(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The number of pairs of keys that are flipped in the student's row, and of all pairs: (N,) each.

    student, teacher: (N, T), see real_rows. Pairs that are equal in the teacher have no order and are left out. A pair
    that is equal in the student counts half: a student that attends to all keys alike has 0.5, like one that guesses.
    (The fraction is (1 - tau) / 2 of Kendall's rank correlation tau, except for the teacher's ties.)
    """
    # (N, T, T): 1 where key i has more than key j, -1 where less, 0 if equal or padded.
    found, order = ((x[:, :, None] - x[:, None, :]).sign_().nan_to_num_(0.0) for x in (student, teacher))
    pairs = order.abs().sum(dim=(1, 2))
    agreement = order.mul_(found).sum(dim=(1, 2))
    # Each pair occurs twice, as (i, j) and (j, i), and a flip changes the agreement by 2.
    return (pairs - agreement) / 4, pairs / 2


def ranking_loss(student: Tensor, teacher: Tensor) -> tuple[float, int]:
    """The mean over rows of the fraction of flipped pairs, and the number of rows that have a pair.

    student, teacher: (N, T), see real_rows. NOTE: all pairs of a row count alike, also those of keys to which the
    teacher hardly attends.
    """
    step = max(1, PAIRS_AT_ONCE // student.shape[1] ** 2)  # rows at a time: N * T * T would not fit into memory
    total, rows = 0.0, 0
    for some in zip(student.split(step), teacher.split(step), strict=True):
        flipped, pairs = flipped_pairs(*some)
        there = pairs > 0  # a sequence of one token has none
        total += float((flipped[there].double() / pairs[there]).sum())
        rows += int(there.sum())
    return total / max(1, rows), rows


def cover_length(student: Tensor, teacher: Tensor) -> Tensor:
    """The cover length ratio of each row, (N,); student, teacher: (N, T), see real_rows.

    Rows of n <= 5 keys have the ratio 1; the best ratio of a longer one is 5 / n. Of equal probabilities the earlier
    key comes first, in both orders: a constant student gains nothing from ties, and a copy of the teacher has exactly
    5 / n.
    """
    keys = teacher.isfinite().sum(dim=1)  # (N,)
    # The key at each place, padded ones last.
    order = [row.nan_to_num(nan=-1.0).argsort(dim=1, descending=True, stable=True) for row in (student, teacher)]
    place = order[0].argsort(dim=1) + 1  # of each key: the inverse permutation
    deepest = place.gather(1, order[1][:, :TOP]).amax(dim=1)
    # With fewer than TOP keys, padded ones are in the "top", behind all real ones.
    return deepest.minimum(keys) / keys


def kurtosis(states: Tensor, mask: Tensor | None) -> float:
    """The mean kurtosis of real tokens; states: (B, T, C).

    >>> round(kurtosis(torch.tensor([[[0.0, 0.0, 0.0, 0.0, 8.0], [0.0, 0.0, 0.0, 0.0, 1.0]]]), None), 2)
    3.25
    """
    x = states.double() if mask is None else states.double()[mask]
    x = x - x.mean(dim=-1, keepdim=True)
    return float((x.pow(4).mean(dim=-1) / x.square().mean(dim=-1).square()).mean())


@torch.no_grad()
def attention_recovery(teacher: Model, student: Model, batches: Iterable[Batch]) -> dict:
    """{name of the list at the top: [layer 0, 1, ...]}: means over real tokens, but the smallest and largest of all."""
    teacher.eval()
    student.eval()
    layers = len(student.encoder.layers)
    sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros((layers, 2)))
    extremes = {"smallest": [float("inf")] * layers, "largest": [float("-inf")] * layers}

    def add(name: str, layer: int, mean: float, weight: int) -> None:
        sums[name][layer] += mean * weight, weight

    for batch in batches:
        mask, types = batch.mask, batch.types
        _, target = teacher(batch.ids, mask, ("score", "map", "value", "context", "normed", "hidden"), types=types)
        _, found = student(batch.ids, mask, ("score", "map", "value", "normed"), types=types)
        for i in range(layers):
            rows = [real_rows(taps["map"][i].float(), mask) for taps in (found, target)]
            add("ranking", i, *ranking_loss(*rows))
            add("cover", i, float(cover_length(*rows).double().mean()), len(rows[0]))
            add("map_kl", i, float(map_loss(found["score"][i], target["score"][i], mask)), batch.tokens)
            add("output_mse", i, float(vector_loss(found["normed"][i], target["normed"][i], mask)), batch.tokens)
            context, swapped = target["context"][i], {"generation": (found, target), "propagation": (target, found)}
            for name, (maps, values) in swapped.items():
                add(name, i, float(vector_loss(maps["map"][i] @ values["value"][i], context, mask)), batch.tokens)
            add("context", i, float(vector_loss(context, torch.zeros_like(context), mask)), batch.tokens)
            normed = found["normed"][i] if mask is None else found["normed"][i][mask]
            extremes["smallest"][i] = min(extremes["smallest"][i], float(normed.min()))
            extremes["largest"][i] = max(extremes["largest"][i], float(normed.max()))
            add("kurtosis", i, kurtosis(target["hidden"][i + 1], mask), batch.tokens)
    means = {name: [total / max(weight, 1) for total, weight in row.tolist()] for name, row in sums.items()}
    squares = means.pop("context")
    for name in ("generation", "propagation"):
        means[name] = [(error / square) ** 0.5 for error, square in zip(means[name], squares, strict=True)]
    return means | extremes

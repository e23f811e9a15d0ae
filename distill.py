"""What the student learns from its teacher: one pure function per loss, and one row each in LOSSES.

Self-distillation (arXiv 2307.05972): the teacher is the float32 model that the student was copied from, so both have
the same layers and heads, and quantization error can be measured where it arises. It accumulates through the layers
and is largest at the output of self-attention. SDQ therefore adds two terms to the cross-entropy of the task:

    L = CE(y_s, y) + alpha * tau^2 * KL(p_t || p_s) + beta * 1/(L H) sum_l sum_h MSE(A_lh^s, A_lh^t)

    p_t, p_s   softmax of the logits of teacher and student at temperature tau (Hinton et al. 2015)
    A_lh       softmax(Q K^T / sqrt(D)) V of layer l and head h: the tap "context" of model.py

Every loss is a mean over real (unpadded) elements. Its value depends neither on the batch size nor on the amount of
padding, so alpha and beta mean the same for every batch. Gradients flow to the student only. All losses are computed
in float32.

Which part of the attention to distill is the question of Kim et al. 2022 (arXiv 2211.11014), for ternary weights.
TernaryBERT (Zhang et al. 2020, arXiv 2009.12812) compares scores:

    score    MSE(S^s, S^t), S = Q K^T / sqrt(D)       map    KL(M^t || M^s), M = softmax(S)
    normed   MSE(O^s, O^t), O = the result of self-attention after projection, residual and norm

The score loss is not enough: softmax(x + c) = softmax(x), so adding a constant to a row of scores raises the loss and
leaves the attention unchanged, while two large scores can change their order at almost no cost. The map loss compares
what the attention is: each row is a distribution, and KL weighs a key by how much the teacher attends to it. The
output loss also includes the values, which ternary weights disturb as well, and suits deep encoders. Both are combined
as a weighted sum ("map+normed"). NOTE: differs: the paper sums over layers, here each term is the mean over layers;
and its code counts padded positions as zeros that agree, here they are left out.

Layer-by-layer distillation (Yang et al. 2023, arXiv 2306.01076) is for few bits: the student learns
the embeddings and layer 1 first, without labels, and every S steps the next layer joins
(`LayerSchedule`). The loss of each active layer is

    MSE(h_l^s, h_l^t) + 1 - cos(h_l^s, h_l^t) + KL(M_l^t || M_l^s)

    h_l, M_l   output and attention probabilities of layer l: the taps "hidden" and "score"

In the last stage, after L * S steps, the KL of the logits and the cross-entropy of the task join, at a lower learning
rate. NOTE: differs: the paper sums over layers, here each term is the mean over the active ones, so that the loss
keeps its scale from stage to stage.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

PADDED = -1e4  # a score so low that its probability is 0, and finite: -inf - -inf would be NaN

Logits = Tensor | tuple[Tensor, Tensor]  # a joint head has two: intents (B, I), slots (B, T, S)


# ------------------------------------------------------------------------------- losses of a layer
def row_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over all rows of KL(softmax(teacher) || softmax(student)), in nats; rows are the last dimension.

    From logits, not from probabilities: their logarithm would need a floor, below which there is no gradient, just
    where a student misses a key that the teacher attends to.
    """
    log_student = F.log_softmax(student.float(), dim=-1)
    log_teacher = F.log_softmax(teacher.detach().float(), dim=-1)
    return F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)


def logits_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """tau^2 * KL(teacher || student) of the softened predictions, mean over the batch.

    student, teacher: logits (B, classes), or of tokens (B, T, classes), whose mean is over real tokens.  mask: (B, T)
    bool, for logits of tokens; None if all are real. The factor tau^2 cancels the 1/tau^2 that softening puts on the
    gradient, so that alpha keeps its meaning when tau changes (Hinton et al. 2015, sec. 2).

    A single column is not a distribution but the prediction of a regression (STS-B). Its loss is the mean squared
    error, without temperature, as in TernaryBERT.
    """
    count = student.shape[:-1].numel()
    if student.dim() == 3 and mask is not None:  # every real token is a prediction; equal rows have no divergence
        count, padded = mask.sum(), ~mask[..., None]
        student, teacher = (x.masked_fill(padded, 0.0) for x in (student, teacher))
    if student.shape[-1] == 1:
        return F.mse_loss(student.float(), teacher.detach().float(), reduction="sum") / count
    divergence = row_kl(student.float() / temperature, teacher.float() / temperature)
    return temperature**2 * (divergence / count)


def logits_terms(
    student: Logits, teacher: Logits, temperature: float, mask: Tensor | None, head: str = ""
) -> dict[str, Tensor]:
    """logits_loss as a term of the loss, or as two: a joint head's are means over different things. The "logits" of an
    embedding head are the vectors of sentences (B, C), whose loss is 1 - cos.
    """
    if head == "embedding":
        return {"logits": cosine_loss(student, teacher, None)}
    if not isinstance(student, tuple):
        return {"logits": logits_loss(student, teacher, temperature, mask)}
    pairs = zip(("logits", "slot_logits"), student, teacher, strict=True)
    return {name: logits_loss(s, t, temperature, mask) for name, s, t in pairs}


def vector_loss(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared error over real tokens.

    student, teacher: (B, T, C), or (B, H, T, D) per head, where it is the mean over heads of the MSE of each: 1/H
    sum_h MSE(A_h^s, A_h^t).  mask: (B, T) bool, True for real tokens; None if all are.
    """
    # float32: at 8 bits the two differ in digits that bf16 does not have
    student, teacher = student.float(), teacher.detach().float()
    if mask is None:
        return F.mse_loss(student, teacher)
    weight = mask if student.dim() == 3 else mask[:, None, :]  # (B, T) or (B, 1, T)
    # Filled before squaring, not multiplied after: padded positions may hold inf or NaN, and 0 * inf is NaN, in the
    # backward pass, too.
    difference = (student - teacher).masked_fill(~weight[..., None], 0.0)
    total = difference.square().mean(dim=-1).sum()
    heads = 1 if student.dim() == 3 else student.shape[1]
    return total / (mask.sum() * heads)


def real_pairs(mask: Tensor) -> Tensor:
    """(B, T) -> (B, 1, T, T): True where both the query and the key are real."""
    return mask[:, None, :, None] & mask[:, None, None, :]


def score_loss(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared error of the attention scores Q K^T / sqrt(D), as in TernaryBERT.

    student, teacher: (B, H, T, T), queries by keys; -inf at padded keys.  mask: (B, T) bool, None if all are real. The
    mean is over real queries, their real keys, and heads. NOTE: differs: TernaryBERT's code sets scores of padded keys
    to 0 and counts them, so its loss shrinks as padding grows.
    """
    student, teacher = student.float(), teacher.detach().float()
    difference = student - teacher
    if mask is None:
        return difference.square().mean()
    pairs = mask.sum(dim=1).square().sum()  # a sequence of n tokens has n * n
    # -inf - -inf is NaN: filled before squaring, as in vector_loss
    difference = difference.masked_fill(~real_pairs(mask), 0.0)
    return difference.square().sum() / (pairs * student.shape[1])


def map_loss(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """KL(teacher || student) of attention probabilities, in nats: mean over real queries, heads and batch.

    student, teacher: scores (B, H, T, T), queries by keys, whose softmax over the keys is the map. mask: (B, T) bool,
    None if all are real.
    """
    student, teacher = student.float(), teacher.float()
    B, H, T, _ = student.shape
    queries = B * T
    if mask is not None:
        queries = mask.sum()
        padded = ~real_pairs(mask)  # rows of padded queries are equal then: their KL is 0
        student, teacher = (x.masked_fill(padded, PADDED) for x in (student, teacher))
    return row_kl(student, teacher) / (queries * H)


def cosine_loss(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """1 - cos(student, teacher), mean over real tokens; between 0 and 2.

    student, teacher: (B, T, C), or (B, C) of sentences.  mask: (B, T) bool, None if all are real.  A zero vector has no
    direction: its token costs nothing and gets no gradient.
    """
    student, teacher = student.float(), teacher.detach().float()
    counted = student.any(dim=-1) & teacher.any(dim=-1)  # (B, T)
    if mask is not None:
        counted = counted & mask
    # Filled first, as in vector_loss. The cosine of zeros is 0 in PyTorch, and their cost is 0 - 0.
    student = student.masked_fill(~counted[..., None], 0.0)
    teacher = teacher.masked_fill(~counted[..., None], 0.0)
    total = (counted.float() - F.cosine_similarity(student, teacher, dim=-1)).sum()
    return total / (counted.numel() if mask is None else mask.sum())


class Loss(NamedTuple):
    tap: str  # of model.py: what the loss compares, in each layer
    loss: Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (student, teacher, mask) of one layer -> scalar
    over: str  # what the loss is a mean over: "rows" of the batch, real "tokens", or "pairs" of tokens


# --distill joins these names with "+": "logits+context" is SDQ.
LOSSES: dict[str, Loss] = {
    # The logits are compared once for all layers, with a temperature; over tokens if these have labels.
    "logits": Loss("", logits_loss, over="rows"),
    "score": Loss("score", score_loss, over="pairs"),
    # This loss compares maps but reads scores, see row_kl; the tap "map", their softmax, is for analyze.py.
    "map": Loss("score", map_loss, over="tokens"),
    "context": Loss("context", vector_loss, over="tokens"),
    "output": Loss("output", vector_loss, over="tokens"),
    "residual": Loss("residual", vector_loss, over="tokens"),
    "normed": Loss("normed", vector_loss, over="tokens"),
    "hidden": Loss("hidden", vector_loss, over="tokens"),
}


LAST = "@last"  # after the name of a loss: of the last layer alone, as MiniLM distills (arXiv 2002.10957)


def layer_mean(loss: Callable, student: list[Tensor], teacher: list[Tensor], mask: Tensor | None) -> Tensor:
    """The mean of a loss over the tensors of one tap, one per layer."""
    layers = [loss(s, t, mask) for s, t in zip(student, teacher, strict=True)]
    return sum(layers) / len(layers)


# ---------------------------------------------------------------------------------- layer by layer
# Values of --distill that select layer-by-layer distillation -> in which order the layers join. The
# authors' code goes from the bottom up; "together" (all from the first step) is the baseline.
LAYERWISE = {"layerwise": "bottom-up", "layerwise-top-down": "top-down", "layerwise-together": "together"}


@dataclass(frozen=True)
class LayerSchedule:
    """Which layers are distilled when: one more every `stage_steps` steps, then the last stage."""

    layers: int  # L
    stage_steps: int  # S, in optimizer steps: about half of all steps divided by L
    order: str = "bottom-up"  # or "top-down", "together"

    def __post_init__(self):
        assert self.layers >= 1 and self.stage_steps >= 1, f"{self.layers} layers, {self.stage_steps} steps each"
        assert self.order in LAYERWISE.values(), f"unknown order {self.order!r}: {', '.join(LAYERWISE.values())}"

    @property
    def last_stage_start(self) -> int:
        """The first step of the last stage, in which the labels join. It is the same for all orders."""
        return self.layers * self.stage_steps

    def is_last(self, step: int) -> bool:
        return step >= self.last_stage_start

    def active(self, step: int) -> tuple[int, ...]:
        """The layers, of 1..L and ascending, that are distilled at a step counted from 0.

        >>> schedule = LayerSchedule(layers=3, stage_steps=10, order="top-down")
        >>> schedule.active(9), schedule.active(10)
        ((3,), (2, 3))
        """
        every = tuple(range(1, self.layers + 1))
        if self.order == "together":
            return every
        count = min(step // self.stage_steps + 1, self.layers)
        return every[:count] if self.order == "bottom-up" else every[-count:]


def layerwise_terms(
    student_taps: dict[str, list[Tensor]],
    teacher_taps: dict[str, list[Tensor]],
    layers: tuple[int, ...],
    mask: Tensor | None,
) -> dict[str, Tensor]:
    """The loss terms of the active layers: "hidden" (MSE), "cosine" and "map", each the mean over the active layers;
    hidden and cosine include the embeddings, which are always active.

    student_taps, teacher_taps: the taps "hidden" (embeddings, then layers) and "score"; if only the lowest k layers
    were run, k + 1 and k tensors.  layers: see LayerSchedule.active.
    """

    def mean(loss: Callable, tap: str, places: list[int]) -> Tensor:
        chosen = ([taps[tap][i] for i in places] for taps in (student_taps, teacher_taps))
        return layer_mean(loss, *chosen, mask)

    levels = [0, *layers]  # hidden[0] is the embeddings, hidden[l] the output of layer l
    return {
        "hidden": mean(vector_loss, "hidden", levels),
        "cosine": mean(cosine_loss, "hidden", levels),
        "map": mean(map_loss, "score", [layer - 1 for layer in layers]),
    }

"""What the student learns from its teacher: one pure function per loss.

Self-distillation (arXiv 2307.05972): the teacher is the student's own float32 fine-tuned self, so
they have the same layers and heads, and quantization error can be measured where it arises. It
accumulates through the layers and is largest at the output of self-attention. SDQ therefore adds to
the task's cross-entropy

    L = CE(y_s, y) + alpha * tau^2 * KL(p_t || p_s) + beta * 1/(L H) sum_l sum_h MSE(A_lh^s, A_lh^t)

    p_t, p_s   softmax of teacher's and student's logits at temperature tau (Hinton et al. 2015)
    A_lh       softmax(Q K^T / sqrt(D)) V of layer l and head h: the tap "context" of model.py

Every loss is a mean over the real (unpadded) elements, so its value depends neither on the batch
size nor on how much padding a batch happens to have, and alpha and beta mean the same for every
batch. Gradients flow to the student only.

Layer-by-layer distillation (Yang et al. 2023, arXiv 2306.01076) is the other method here, meant for
few bits: the student learns the embeddings and block 1 first, without labels, and every S steps
(`LayerSchedule`) the next block joins. What it learns of each active block is

    MSE(h_l^s, h_l^t) + 1 - cos(h_l^s, h_l^t) + KL(M_l^t || M_l^s)

    h_l, M_l   result and attention probabilities of block l: the taps "hidden" and "map"

Only in the last stage, after L * S steps, do the soft labels (the KL of the logits above) and the
task's cross-entropy join, at a lower learning rate. NOTE: differs: the paper adds the blocks up;
here each term is the mean over the active ones, so that the loss keeps its size from stage to
stage. The authors' code adds blocks from the bottom up, though the method is also described as
going top to bottom: the order is a choice, and "together" (all from the first step) the baseline.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

# --distill names what is distilled, joined by "+": "logits+context" is SDQ. Each name but "logits"
# is a tap. "layerwise" stands alone: its losses change from stage to stage.
PARTS = ("logits", "context", "output", "hidden")
LAYERWISE = "layerwise"

# In which order the blocks join in layer-by-layer distillation.
ORDERS = ("bottom-up", "top-down", "together")

# Attention probabilities are raised to this before the logarithm, as in the code of Kim et al. 2022
# (MarsJacobs/kd-qat-large-enc).
MAP_FLOOR = 1e-8

Logits = Tensor | tuple[Tensor, Tensor]  # a joint head has two: intents (B, I), slots (B, T, S)


def parse_distill(text: str) -> tuple[str, ...]:
    """The parts of a --distill value; () for "none".

    >>> parse_distill("logits+context"), parse_distill("none")
    (('logits', 'context'), ())

    Raises ValueError for an unknown or repeated part, and for "layerwise" joined with another.
    """
    if text == "none":
        return ()
    parts = tuple(text.split("+"))
    if LAYERWISE in parts:
        if len(parts) > 1:
            raise ValueError(f"{LAYERWISE!r} stands alone: it can't be joined with '+' in {text!r}")
        return parts
    for part in parts:
        if part not in PARTS:
            raise ValueError(
                f"{part!r} is unknown: join any of {', '.join(PARTS)} with '+', or say "
                f"{LAYERWISE!r} or 'none'"
            )
    if len(set(parts)) < len(parts):
        raise ValueError(f"{text!r} names a part twice")
    return parts


def logits_loss(
    student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None = None
) -> Tensor:
    """tau^2 * KL(teacher || student) of the softened predictions, mean over the batch.

    student, teacher: logits (B, number of labels), or of tokens (B, T, number of labels), whose
    mean is over real tokens.  mask: (B, T) bool, for logits of tokens only; None if all are real.
    The factor tau^2 undoes the 1/tau^2 that softening puts on the gradient, so that alpha needs no
    retuning when tau changes (Hinton et al. 2015, sec. 2).
    """
    if student.dim() == 3:  # every real token is a prediction of its own: (n, number of labels)
        if mask is None:
            student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
        else:
            student, teacher = student[mask], teacher[mask]
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.detach().float() / temperature, dim=-1)
    # batchmean divides by B; PyTorch's "mean" would also divide by the number of labels
    divergence = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return temperature**2 * divergence


def masked_mse(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared error over real tokens.

    student, teacher: (B, T, C), or (B, H, T, D) per head.  mask: (B, T) bool, True for real tokens;
    None if all are. For the per-head form this is the mean over heads of each head's MSE: 1/H sum_h
    MSE(A_h^s, A_h^t).
    """
    # float32, since at 8 bits the two differ in digits that bf16 does not have
    student, teacher = student.float(), teacher.detach().float()
    if mask is None:
        return F.mse_loss(student, teacher)
    weight = mask if student.dim() == 3 else mask[:, None, :]  # (B, T) or (B, 1, T)
    # Filled, not multiplied, and before squaring: padded positions may hold anything, and 0 * inf
    # is NaN, in the backward pass too.
    difference = (student - teacher).masked_fill(~weight[..., None], 0.0)
    total = difference.square().mean(dim=-1).sum()
    heads = 1 if student.dim() == 3 else student.shape[1]
    return total / (mask.sum() * heads)


def tap_loss(student: list[Tensor], teacher: list[Tensor], mask: Tensor | None) -> Tensor:
    """masked_mse averaged over the layers of one tap: the attention term of SDQ for the tap
    "context".
    """
    layers = [masked_mse(s, t, mask) for s, t in zip(student, teacher, strict=True)]
    return sum(layers) / len(layers)


def distillation_loss(
    parts: tuple[str, ...],
    student: tuple[Logits, dict[str, list[Tensor]]],
    teacher: tuple[Logits, dict[str, list[Tensor]]],
    mask: Tensor | None,
    alpha: float,
    beta: float,
    temperature: float,
) -> dict[str, Tensor]:
    """The weighted distillation terms, by name; their sum and the task's cross-entropy make the
    whole loss.

    student, teacher: (logits, taps) as the model returns them, with every tap of `parts` captured.
    The logits of a joint head are a tuple, whose losses are added up.
    """
    terms = {}
    for part in parts:
        if part == "logits":
            joint = isinstance(student[0], tuple)
            heads = (
                zip(student[0], teacher[0], strict=True) if joint else [(student[0], teacher[0])]
            )
            terms[part] = alpha * sum(logits_loss(s, t, temperature, mask) for s, t in heads)
        else:
            terms[part] = beta * tap_loss(student[1][part], teacher[1][part], mask)
    return terms


# ---------------------------------------------------------------------------------- layer by layer
@dataclass(frozen=True)
class LayerSchedule:
    """Which blocks are distilled when: one more every `stage_steps` steps, then the last stage."""

    layers: int  # L
    stage_steps: int  # S, in optimizer steps: about half of all steps divided by L
    order: str = "bottom-up"  # one of ORDERS

    def __post_init__(self):
        if self.layers < 1 or self.stage_steps < 1:
            raise ValueError(
                f"{self.layers} layers with {self.stage_steps} steps each: both must be at least 1"
            )
        if self.order not in ORDERS:
            raise ValueError(f"{self.order!r} is not an order; known: {', '.join(ORDERS)}")

    @property
    def last_stage_start(self) -> int:
        """The first step of the last stage, where the labels join.

        The same for every order: "together" is this schedule but for the joining one by one.
        """
        return self.layers * self.stage_steps

    def is_last(self, step: int) -> bool:
        return step >= self.last_stage_start

    def blocks(self, step: int) -> tuple[int, ...]:
        """The blocks, of 1..L and ascending, that are distilled at a step counted from 0.

        >>> schedule = LayerSchedule(layers=3, stage_steps=10, order="top-down")
        >>> schedule.blocks(9), schedule.blocks(10)
        ((3,), (2, 3))
        """
        every = tuple(range(1, self.layers + 1))
        if self.order == "together":
            return every
        active = min(step // self.stage_steps + 1, self.layers)
        return every[:active] if self.order == "bottom-up" else every[-active:]


def masked_cosine(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """1 - cos(student, teacher), mean over real tokens; between 0 and 2.

    student, teacher: (B, T, C).  mask: (B, T) bool, None if all are real.  A vector of zeros has no
    direction: its token costs nothing and gets no gradient.
    """
    student, teacher = student.float(), teacher.detach().float()
    counted = student.any(dim=-1) & teacher.any(dim=-1)  # (B, T)
    if mask is not None:
        counted = counted & mask
    # Filled first, as in masked_mse. Zeros have cos = 0 in PyTorch, and 0 - 0 is what they cost.
    student = student.masked_fill(~counted[..., None], 0.0)
    teacher = teacher.masked_fill(~counted[..., None], 0.0)
    total = (counted.float() - F.cosine_similarity(student, teacher, dim=-1)).sum()
    return total / (counted.numel() if mask is None else mask.sum())


def map_loss(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """KL(teacher || student) of attention probabilities, in nats: summed over real keys, mean over
    real queries, heads and batch.

    student, teacher: (B, H, T, T), queries by keys, each row a distribution.  mask: (B, T) bool,
    None if all are real.
    """
    student, teacher = student.float(), teacher.detach().float()
    B, H, T, _ = student.shape
    queries = B * T
    if mask is not None:
        queries = mask.sum()
        # filled before the logarithm, as in masked_mse: 1 * (log 1 - log 1) costs nothing
        padded = ~(mask[:, None, :, None] & mask[:, None, None, :])  # (B, 1, T, T)
        student, teacher = student.masked_fill(padded, 1.0), teacher.masked_fill(padded, 1.0)
    student, teacher = student.clamp_min(MAP_FLOOR), teacher.clamp_min(MAP_FLOOR)
    return (teacher * (teacher.log() - student.log())).sum() / (queries * H)


def layerwise_terms(
    student_taps: dict[str, list[Tensor]],
    teacher_taps: dict[str, list[Tensor]],
    blocks: tuple[int, ...],
    mask: Tensor | None,
) -> dict[str, Tensor]:
    """What the active blocks cost, unweighted: "hidden" (MSE), "cosine" and "map", each the mean
    over the active blocks; hidden and cosine count the embeddings too, which are always active.

    student_taps, teacher_taps: the taps "hidden" (embeddings, then blocks) and "map"; where only
    the lowest k blocks were run, k + 1 and k tensors are enough.  blocks: of
    LayerSchedule.blocks.
    """

    def mean(loss, tap: str, places: list[int]) -> Tensor:
        student, teacher = student_taps[tap], teacher_taps[tap]
        return sum(loss(student[i], teacher[i], mask) for i in places) / len(places)

    levels = [0, *blocks]  # hidden[0] is the embeddings, hidden[l] the result of block l
    # NOTE: differs: the paper adds the blocks up (see the top)
    return {
        "hidden": mean(masked_mse, "hidden", levels),
        "cosine": mean(masked_cosine, "hidden", levels),
        "map": mean(map_loss, "map", [block - 1 for block in blocks]),
    }

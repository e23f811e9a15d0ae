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

What of the attention to distil is the question of the third method (Kim et al. 2022, arXiv
2211.11014), for ternary weights. TernaryBERT (Zhang et al. 2020, arXiv 2009.12812) compares scores:

    score    MSE(S^s, S^t), S = Q K^T / sqrt(D)       map    KL(A^t || A^s), A = softmax(S)
    output   MSE(O^s, O^t), O = the result of self-attention, after projection, residual and norm

The score loss is not enough: softmax(x + c) = softmax(x), so a constant added to a row of scores
raises the loss and leaves the attention as it was, while the order of two large scores may flip at
hardly any cost. The map loss sees only what the attention is: each row is a distribution, and KL
weighs a key by how much the teacher looks at it. The output loss sees what becomes of it, with the
values that ternary weights spoil as well, and suits deep encoders. Both are unified as
gamma * map + (1 - gamma) * output; the authors' code also runs map + c * output and c * map +
output (`part_weights`). NOTE: differs: the paper adds the layers up, here each term is their mean;
and its code takes padded places for zeros that agree, where here they are not counted at all.
"""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

# --distill names what is distilled, joined by "+": "logits+context" is SDQ. Each name but "logits"
# is a tap; for "output" there is a choice. "layerwise" stands alone: its losses change from stage
# to stage.
PARTS = ("logits", "score", "map", "context", "output", "hidden")
LAYERWISE = "layerwise"

# Where the result of self-attention is read: after the projection; with the residual added; and
# normalized as well, which is what the code of Kim et al. distils.
OUTPUT_TAPS = {"projected": "output", "residual": "residual", "normed": "normed"}

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


def taps_of(parts: tuple[str, ...], output_tap: str = "projected") -> tuple[str, ...]:
    """The taps that student and teacher must capture for these parts, in their order.

    output_tap: a key of OUTPUT_TAPS, where the part "output" is read.

    >>> taps_of(("logits", "map", "output"), "normed")
    ('map', 'normed')
    """
    return tuple(tap_of(part, output_tap) for part in parts if part != "logits")


def tap_of(part: str, output_tap: str) -> str:
    return OUTPUT_TAPS[output_tap] if part == "output" else part


def part_weights(
    parts: tuple[str, ...],
    alpha: float,
    beta: float,
    gamma: float | None = None,
    own: tuple[str, ...] = (),
) -> dict[str, float]:
    """What each part's loss is multiplied by: alpha for the logits, beta for every other.

    gamma: from 0 to 1; shares beta out, beta * gamma for "map" and beta * (1 - gamma) for "output"
    (Kim et al. 2022).  own: weights by name, which stand alone: they are not multiplied by beta.
    Layer-by-layer distillation only weighs its last stage's logits this way.

    >>> part_weights(("logits", "map", "output"), 0.5, 10.0, gamma=0.25)
    {'logits': 0.5, 'map': 2.5, 'output': 7.5}
    >>> part_weights(("map", "output"), 1.0, 1.0, own=("output=0.3",))
    {'map': 1.0, 'output': 0.3}

    Raises ValueError, with what to write instead, for a part that is unknown or not distilled, a
    weight that is no finite number from 0 up, and for gamma where it has nothing to share out.
    """
    if LAYERWISE in parts:
        parts = ("logits",)
    weights = {part: alpha if part == "logits" else beta for part in parts}
    if gamma is not None:
        if not {"map", "output"} <= set(parts):
            raise ValueError("gamma weighs map against output: both must be distilled")
        if not 0 <= gamma <= 1:  # NaN neither
            raise ValueError(f"gamma is {gamma}: it must be from 0 (output only) to 1 (map only)")
        weights["map"], weights["output"] = beta * gamma, beta * (1 - gamma)
    seen = set()
    for text in own:
        part, weight = parse_weight(text)
        if part not in weights:
            there = ", ".join(weights) or "nothing"
            raise ValueError(f"{text!r}: {part} is not distilled here, only {there}")
        if part in seen:
            raise ValueError(f"{text!r}: the weight of {part} is given twice")
        if gamma is not None and part in ("map", "output"):
            raise ValueError(f"{text!r}: gamma sets the weight of {part} already, leave out one")
        seen.add(part)
        weights[part] = weight
    return weights


def parse_weight(text: str) -> tuple[str, float]:
    """ "output=0.3" -> ("output", 0.3). Raises ValueError for anything else."""
    part, equals, number = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is not PART=WEIGHT, such as output=0.3")
    if part not in PARTS:
        raise ValueError(f"{text!r}: {part!r} is unknown; the parts are {', '.join(PARTS)}")
    try:
        weight = float(number)
    except ValueError:
        raise ValueError(f"{text!r}: {number!r} is not a number") from None
    if not 0 <= weight < math.inf:
        raise ValueError(f"{text!r}: a weight must be a finite number, 0 or more")
    return part, weight


def logits_loss(
    student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None = None
) -> Tensor:
    """tau^2 * KL(teacher || student) of the softened predictions, mean over the batch.

    student, teacher: logits (B, number of labels), or of tokens (B, T, number of labels), whose
    mean is over real tokens.  mask: (B, T) bool, for logits of tokens only; None if all are real.
    The factor tau^2 undoes the 1/tau^2 that softening puts on the gradient, so that alpha needs no
    retuning when tau changes (Hinton et al. 2015, sec. 2).

    A single column is no distribution but the number that a regression predicts (STS-B): there it
    is the mean squared error, and the temperature plays no role, as in TernaryBERT.
    """
    if student.dim() == 3:  # every real token is a prediction of its own: (n, number of labels)
        if mask is None:
            student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
        else:
            student, teacher = student[mask], teacher[mask]
    if student.shape[-1] == 1:
        return F.mse_loss(student.float(), teacher.detach().float())
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


def score_loss(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared error of the attention scores Q K^T / sqrt(D), as TernaryBERT has it.

    student, teacher: (B, H, T, T), queries by keys.  mask: (B, T) bool, None if all are real. The
    mean is over all real queries, their real keys, and heads; scores of padded keys are -inf and
    left out. NOTE: differs: TernaryBERT's code sets them to 0 and counts them in the mean, so that
    its loss shrinks as padding grows.
    """
    student, teacher = student.float(), teacher.detach().float()
    difference = student - teacher
    if mask is None:
        return difference.square().mean()
    pairs = mask.sum(dim=1).square().sum()  # a text of n tokens has n * n
    # -inf - -inf is NaN: filled before squaring, as in masked_mse
    difference = difference.masked_fill(~real_pairs(mask), 0.0)
    return difference.square().sum() / (pairs * student.shape[1])


def real_pairs(mask: Tensor) -> Tensor:
    """(B, T) -> (B, 1, T, T): True where both the query and the key are real."""
    return mask[:, None, :, None] & mask[:, None, None, :]


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
        padded = ~real_pairs(mask)
        student, teacher = student.masked_fill(padded, 1.0), teacher.masked_fill(padded, 1.0)
    student, teacher = student.clamp_min(MAP_FLOOR), teacher.clamp_min(MAP_FLOOR)
    return (teacher * (teacher.log() - student.log())).sum() / (queries * H)


# What a part costs in one layer; every other part is an MSE of vectors.
MATRIX_LOSSES = {"score": score_loss, "map": map_loss}


def tap_loss(
    student: list[Tensor], teacher: list[Tensor], mask: Tensor | None, loss=masked_mse
) -> Tensor:
    """A loss averaged over the layers of one tap: masked_mse of "context" is SDQ's term."""
    layers = [loss(s, t, mask) for s, t in zip(student, teacher, strict=True)]
    return sum(layers) / len(layers)


def distillation_loss(
    parts: tuple[str, ...],
    student: tuple[Logits, dict[str, list[Tensor]]],
    teacher: tuple[Logits, dict[str, list[Tensor]]],
    mask: Tensor | None,
    weights: dict[str, float],
    temperature: float,
    output_tap: str = "projected",
    layers: tuple[int, ...] = (),
) -> dict[str, Tensor]:
    """The weighted distillation terms, by name; their sum and the task's cross-entropy make the
    whole loss.

    student, teacher: (logits, taps) as the model returns them, with taps_of(parts, output_tap)
    captured. The logits of a joint head are a tuple, whose losses are added up.
    weights: of each part (see part_weights).  output_tap: a key of OUTPUT_TAPS.
    layers: the blocks, of 1..L, that are distilled; () for all. The part "hidden" has the
    embeddings too, which count only where all blocks do.

    Raises ValueError for a block that the model does not have.
    """
    terms = {}
    for part in parts:
        if part == "logits":
            joint = isinstance(student[0], tuple)
            heads = (
                zip(student[0], teacher[0], strict=True) if joint else [(student[0], teacher[0])]
            )
            cost = sum(logits_loss(s, t, temperature, mask) for s, t in heads)
        else:
            tap = tap_of(part, output_tap)
            first = 0 if part == "hidden" else 1  # hidden[0] is the embeddings, score[0] block 1's
            chosen = [layers_of(taps[tap], layers, first) for taps in (student[1], teacher[1])]
            cost = tap_loss(*chosen, mask, MATRIX_LOSSES.get(part, masked_mse))
        terms[part] = weights[part] * cost
    return terms


def layers_of(tensors: list[Tensor], layers: tuple[int, ...], first: int) -> list[Tensor]:
    """The tensors of some blocks. tensors[0] is that of block `first`; () is all of them."""
    last = len(tensors) - 1 + first
    for layer in layers:
        if not 1 <= layer <= last:
            raise ValueError(f"block {layer} can't be distilled: there are blocks 1 to {last}")
    return [tensors[layer - first] for layer in layers] if layers else tensors


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

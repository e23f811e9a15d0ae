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
"""

import torch.nn.functional as F
from torch import Tensor

# --distill names what is distilled, joined by "+": "logits+context" is SDQ. Each name but "logits"
# is a tap.
PARTS = ("logits", "context", "output", "hidden")


def parse_distill(text: str) -> tuple[str, ...]:
    """The parts of a --distill value; () for "none".

    >>> parse_distill("logits+context"), parse_distill("none")
    (('logits', 'context'), ())

    Raises ValueError for an unknown or repeated part.
    """
    if text == "none":
        return ()
    parts = tuple(text.split("+"))
    for part in parts:
        if part not in PARTS:
            raise ValueError(
                f"{part!r} is unknown: join any of {', '.join(PARTS)} with '+', or say 'none'"
            )
    if len(set(parts)) < len(parts):
        raise ValueError(f"{text!r} names a part twice")
    return parts


def logits_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """tau^2 * KL(teacher || student) of the softened predictions, mean over the batch.

    student, teacher: logits (B, number of labels).  The factor tau^2 undoes the 1/tau^2 that
    softening puts on the gradient, so that alpha needs no retuning when tau changes (Hinton et al.
    2015, sec. 2).
    """
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
    student: tuple[Tensor, dict[str, list[Tensor]]],
    teacher: tuple[Tensor, dict[str, list[Tensor]]],
    mask: Tensor | None,
    alpha: float,
    beta: float,
    temperature: float,
) -> dict[str, Tensor]:
    """The weighted distillation terms, by name; their sum and the task's cross-entropy make the
    whole loss.

    student, teacher: (logits, taps) as the model returns them, with every tap of `parts` captured.
    """
    terms = {}
    for part in parts:
        if part == "logits":
            terms[part] = alpha * logits_loss(student[0], teacher[0], temperature)
        else:
            terms[part] = beta * tap_loss(student[1][part], teacher[1][part], mask)
    return terms

"""Tensor trains: a large matrix as a chain of small cores, trained without ever building the matrix.

A matrix W (out, in) has out * in parameters. Factor both sides into d factors each, out = o_1 ... o_d and in = i_1 ...
i_d, and write an entry as a product of small matrices, one per digit of its row and of its column (Oseledets 2011;
Novikov et al. 2015):

    W[(a_1..a_d), (b_1..b_d)] = G_1[a_1] ... G_d[a_d] G_d+1[b_1] ... G_2d[b_d]

    core k     (r_k-1, n_k, r_k): a matrix r_k-1 x r_k for each digit          r_0 = r_2d = 1
    ranks r_k  bound how much the two sides of the cut at k can share; full rank is exact

768 x 768 = (12 8 8) x (8 8 12) at rank 20 has 10,528 parameters instead of 589,824.

TTLinear. Contract the output cores to B (out, r) and the input cores to A (r, in), where r is the rank in the middle:
once per step, since neither depends on the tokens. Then

    y = (x A^T) B^T + b                  2 r (in + out) operations per token instead of 2 in out

and only x and a (tokens, r) tensor are kept for the backward pass. Autograd differentiates the few small products of
the contraction; a hand-written backward pass was no faster (docs/log.md).

TTMEmbedding. A table (V, C) whose cores have two digits, (r_k-1, n_k, m_k, r_k): row i is the product over k of
G_k[digit k of i]. The first half of the cores is contracted to L (V_1, C_1, r), the second to R (V_2, r, C_2), and row
i = (i_1, i_2) is the product L[i_1] R[i_2]. Each half has about sqrt(V) rows; the table itself is never built.

Quantized cores (Yang et al. 2023, arXiv 2306.01076): each core goes through lsq.LearnedScale, a grid whose scale is
trained. To compute in integers, A and B, merged from quantized cores, are rounded to 8 bits per row like any other
weight, in training as in deployment.

Simplified: all cuts of all layers have one rank (`ranks` of a single layer can be given), and the modes are as equal
as possible. A layer that would have more parameters as a tensor train is kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsq import LearnedScale
from model import WordEmbedding, distinct_ids
from quant import Codes, QuantConfig, UniformQuantizer, product

FEW = 64  # ids whose rows are built one by one: to find the distinct ones takes longer


# ---------------------------------------------------------------------------------- configuration
@dataclass(frozen=True)
class TTConfig:
    """Which tensor trains replace the layers of a model."""

    rank: int = 20  # of Linear layers and of the position table
    embedding_rank: int = 0  # of the word table; 0 keeps the table
    modes: int = 3  # d: factors of each side of a Linear layer
    table_modes: int = 2  # the same for tables
    # Kept as they are, by the beginning of their names: the last matrices. Each of their few rows is a class, which is
    # learned slowly as a row of a tensor train.
    keep: tuple[str, ...] = ("head.out_proj", "head.intent.out_proj")

    def __post_init__(self):
        limits = {"rank": (1, 4096), "embedding_rank": (0, 4096), "modes": (1, 8), "table_modes": (2, 8)}
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"{name}={value!r}: choose {least} to {most}")


# --------------------------------------------------------------------------------- modes and ranks
def factorize(n: int, d: int) -> tuple[int, ...]:
    """n as a product of d integers, as equal as possible (least sum), ascending.

    >>> factorize(768, 3), factorize(3072, 3), factorize(7, 2)
    ((8, 8, 12), (12, 16, 16), (1, 7))
    """
    if d == 1:
        return (n,)
    best = None
    for first in range(1, math.floor(n ** (1 / d) + 1e-9) + 1):  # the smallest factor
        if n % first == 0:
            found = tuple(sorted((first, *factorize(n // first, d - 1))))
            if best is None or sum(found) < sum(best):
                best = found
    return best


def pad_factors(n: int, d: int) -> tuple[int, ...]:
    """d nearly equal factors whose product is n or slightly more: for a vocabulary, whose size may be prime. Unused
    rows cost only a few parameters of the cores.

    >>> pad_factors(867, 4), pad_factors(250002, 4)
    ((6, 6, 5, 5), (23, 23, 22, 22))
    """
    low = max(1, math.floor(n ** (1 / d) + 1e-9))
    larger = next(k for k in range(d + 1) if (low + 1) ** k * low ** (d - k) >= n)
    return (low + 1,) * larger + (low,) * (d - larger)


def clip_ranks(modes: Sequence[int], rank: int | Sequence[int]) -> tuple[int, ...]:
    """The ranks (r_0 .. r_N) of N cores: at most `rank`, and no larger than either side of the cut.

    >>> clip_ranks((12, 8, 8, 8, 8, 12), 20)
    (1, 12, 20, 20, 20, 12, 1)
    """
    cuts = range(len(modes) + 1)
    full = [min(math.prod(modes[:k]), math.prod(modes[k:])) for k in cuts]
    if isinstance(rank, int):
        return tuple(min(rank, most) for most in full)
    if len(rank) != len(full) or min(rank) < 1 or rank[0] != 1 or rank[-1] != 1:
        raise ValueError(f"{len(modes)} cores need {len(full)} ranks from 1 to 1, not {rank}")
    return tuple(rank)


# --------------------------------------------------------------------------------------- products
def contract(cores: Sequence[Tensor]) -> Tensor:
    """Cores (r_0, n_1, r_1) .. (r_N-1, n_N, r_N) -> (r_0, n_1 ... n_N, r_N), from the left."""
    first = cores[0].shape[0]
    x = cores[0].flatten(0, 1)  # (r_0 n_1, r_1)
    for core in cores[1:]:
        x = (x @ core.flatten(1)).view(-1, core.shape[-1])  # (r_0 n_1 ... n_k, r_k)
    return x.view(first, -1, x.shape[-1])


def contract_table(cores: Sequence[Tensor]) -> Tensor:
    """The same for cores with two digits, (r, n, m, r'): -> (r_0, n_1 ... n_N, m_1 ... m_N, r_N)."""
    x = cores[0]
    for core in cores[1:]:
        (r0, N, M, r), (_, n, m, last) = x.shape, core.shape
        x = x.reshape(-1, r) @ core.reshape(r, -1)  # (r_0 N M, n m r')
        x = x.view(r0, N, M, n, m, last).transpose(2, 3).reshape(r0, N * n, M * m, last)
    return x


def product_rms(left: Tensor, right: Tensor) -> Tensor:
    """Root mean square of the entries of (m, r) @ (r, n), without computing the product:
    |L R|^2 = <L^T L, R R^T>.
    """
    squares = ((left.T @ left) * (right @ right.T)).sum()
    return squares.div(left.shape[0] * right.shape[1]).sqrt()


def balanced(cores: list[Tensor]) -> list[Tensor]:
    """Cores of equal norm with the same product: an optimizer moves all cores at one rate."""
    norms = [core.norm().clamp(min=1e-30) for core in cores]
    mean = torch.stack(norms).log().mean().exp()
    return [core * (mean / norm) for core, norm in zip(cores, norms, strict=True)]


@torch.no_grad()
def tt_svd(dense: Tensor, shape: Sequence[int], ranks: int | Sequence[int]):
    """A tensor -> cores of the given ranks, by one singular value decomposition per cut.

    dense: any tensor with prod(shape) elements, folded to `shape`.  Returns (cores, error): cores (r_k-1, n_k, r_k) in
    float32; error: the Frobenius norm of the difference, which is the root of the sum of all discarded sigma^2 (the
    losses of the cuts are orthogonal). Full ranks lose nothing (Oseledets 2011, algorithm 1).
    """
    ranks = clip_ranks(shape, ranks)
    rest, lost, cores, left = dense.double().reshape(1, -1), 0.0, [], 1
    for n, r in zip(shape[:-1], ranks[1:-1], strict=True):
        u, s, v = torch.linalg.svd(rest.reshape(left * n, -1), full_matrices=False)
        lost += float(s[r:].square().sum())
        cores.append(u[:, :r].reshape(left, n, -1))
        rest, left = s[:r, None] * v[:r], cores[-1].shape[-1]
    cores.append(rest.reshape(left, shape[-1], 1))
    return [core.float() for core in cores], math.sqrt(lost)


# ---------------------------------------------------------------------------------------- modules
class TensorTrain(nn.Module):
    """What TTLinear and TTMEmbedding share: cores, and their quantizers if there are any."""

    cut: int  # number of cores in the first half

    def __init__(self, shapes: Sequence[tuple[int, ...]]):
        super().__init__()
        self.cores = nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in shapes)
        self.core_quantizers = None  # or one lsq.LearnedScale per core
        self.bias = None

    def quantized_cores(self) -> list[Tensor]:
        if self.core_quantizers is None:
            return list(self.cores)
        return [quantizer(core) for core, quantizer in zip(self.cores, self.core_quantizers, strict=True)]

    def quantize_cores(self, config: QuantConfig) -> None:
        self.core_quantizers = nn.ModuleList(LearnedScale(config, core) for core in self.cores)

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Random orthogonal cores; the entries of their product have mean 0 and this standard deviation.

        NOTE: differs from the paper, which draws Gaussian cores of variance sigma^(2/N) / r_k-1. Their product has the
        right scale on average, but a product of Gaussian matrices is nearly singular and learns more slowly. Here all
        cores before the cut have orthonormal columns and all after it orthonormal rows: the r singular values are
        equal.
        """
        if self.cores[0].is_meta:  # only shapes are needed
            return
        for k, core in enumerate(self.cores):
            nn.init.orthogonal_(core.flatten(0, -2) if k < self.cut else core.flatten(1))
        self.set_cores(list(self.cores))
        scale = (std / self.entries_rms()) ** (1 / len(self.cores))
        for core in self.cores:
            core.mul_(scale)
        if self.bias is not None:
            self.bias.zero_()

    @torch.no_grad()
    def set_cores(self, cores: list[Tensor]) -> None:
        for parameter, core in zip(self.cores, balanced(cores), strict=True):
            parameter.copy_(core.reshape(parameter.shape))


class TTLinear(TensorTrain):
    """y = x W^T + b, W (out, in) a tensor train of len(out_modes) + len(in_modes) cores."""

    def __init__(self, out_modes: Sequence[int], in_modes: Sequence[int], rank: int | Sequence[int], bias: bool = True):
        self.modes = (*out_modes, *in_modes)
        self.ranks = ranks = clip_ranks(self.modes, rank)
        super().__init__([(ranks[k], n, ranks[k + 1]) for k, n in enumerate(self.modes)])
        self.out_features, self.in_features = math.prod(out_modes), math.prod(in_modes)
        self.cut = len(out_modes)
        self.bias = nn.Parameter(torch.empty(self.out_features)) if bias else None
        self.reset_parameters()

    @classmethod
    def like(cls, linear: nn.Linear, config: TTConfig) -> "TTLinear":
        """A layer of the same size. Large output modes come first and large input modes last: the cores at the ends
        have rank 1 on one side.
        """
        out_modes = factorize(linear.out_features, config.modes)[::-1]
        in_modes = factorize(linear.in_features, config.modes)
        return cls(out_modes, in_modes, config.rank, linear.bias is not None)

    def halves(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r): W = B A."""
        cores = self.quantized_cores()
        A = contract(cores[self.cut :]).squeeze(-1)
        B = contract(cores[: self.cut]).squeeze(0)
        return A, B

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.halves()
        return F.linear(F.linear(x, A), B, self.bias)

    def entries_rms(self) -> Tensor:
        """Root mean square of the entries of W, without W."""
        A, B = self.halves()
        return product_rms(B, A)

    @torch.no_grad()
    def set_dense(self, linear: nn.Linear) -> float:
        """Take over a Linear layer by TT-SVD; returns the relative error."""
        cores, error = tt_svd(linear.weight, self.modes, self.ranks)
        self.set_cores(cores)
        if self.bias is not None:
            self.bias.copy_(linear.bias)
        return error / max(float(linear.weight.norm()), 1e-30)


class QuantTTLinear(TTLinear):
    """A TTLinear with quantized cores, and two quantized products: y = Q(Q(x) Q(A)^T) Q(B)^T + b.

    A and B, merged from the cores, are rounded to 8 bits per row, as they are deployed, whatever the bits of the
    cores. With float32 activations (weight-only quantization) they are not rounded.
    """

    def __init__(self, layer: TTLinear, config: QuantConfig, act: nn.Module, middle: nn.Module):
        with torch.device("meta"):
            super().__init__(layer.modes[: layer.cut], layer.modes[layer.cut :], layer.ranks)
        self.cores, self.bias = layer.cores, layer.bias
        self.act_quantizer, self.middle_quantizer = act, middle
        self.A_quantizer, self.B_quantizer = nn.Identity(), nn.Identity()
        if config.weight_bits == 32:
            return
        self.quantize_cores(config)
        if config.act_bits != 32:
            merged = replace(config, weight_bits=8, weight_range="minmax", noise=1.0)
            one, two = (UniformQuantizer(merged, self.cores[0], True, True) for _ in range(2))
            self.A_quantizer, self.B_quantizer = one, two

    def forward(self, x: Tensor | Codes) -> Tensor:
        A, B = self.halves()
        x = product(self.act_quantizer(x), A, self.A_quantizer, None)
        return product(self.middle_quantizer(x), B, self.B_quantizer, self.bias)


class TTMEmbedding(TensorTrain):
    """A table (num_embeddings, prod(column_modes)) as a tensor train: ids -> rows.  row_modes: their product is the
    padded number of rows.
    """

    def __init__(
        self, num_embeddings: int, row_modes: Sequence[int], column_modes: Sequence[int], rank: int | Sequence[int]
    ):
        pairs = list(zip(row_modes, column_modes, strict=True))
        self.modes = [n * m for n, m in pairs]
        if math.prod(row_modes) < num_embeddings:
            raise ValueError(f"row modes {row_modes} make fewer than {num_embeddings} rows")
        self.ranks = ranks = clip_ranks(self.modes, rank)
        super().__init__([(ranks[k], n, m, ranks[k + 1]) for k, (n, m) in enumerate(pairs)])
        self.num_embeddings = num_embeddings
        self.embedding_dim = math.prod(column_modes)
        self.row_modes, self.column_modes = tuple(row_modes), tuple(column_modes)
        self.cut = len(row_modes) // 2
        self.reset_parameters()

    @classmethod
    def like(cls, table: nn.Embedding, modes: int, rank: int) -> "TTMEmbedding":
        row_modes = pad_factors(table.num_embeddings, modes)
        column_modes = factorize(table.embedding_dim, modes)  # small ones to large row modes
        return cls(table.num_embeddings, row_modes, column_modes, rank)

    def halves(self) -> tuple[Tensor, Tensor]:
        """L (V_1, C_1, r) and R (V_2, r, C_2)."""
        cores = self.quantized_cores()
        left = contract_table(cores[: self.cut]).squeeze(0)
        right = contract_table(cores[self.cut :]).squeeze(-1).transpose(0, 1)
        return left, right

    def forward(self, ids: Tensor) -> Tensor:
        return lookup(ids, *self.halves(), self.num_embeddings)

    def entries_rms(self) -> Tensor:
        """Root mean square of the entries of the padded table, without the table."""
        left, right = self.halves()
        return product_rms(left.flatten(0, 1), right.transpose(0, 1).flatten(1))

    @torch.no_grad()
    def set_dense(self, table: nn.Embedding) -> float:
        """Take over a table by TT-SVD; returns the relative error."""
        d = len(self.row_modes)
        padded = table.weight.new_zeros(math.prod(self.row_modes), self.embedding_dim)
        padded[: self.num_embeddings] = table.weight
        folded = padded.view(*self.row_modes, *self.column_modes)
        order = [axis for k in range(d) for axis in (k, d + k)]  # n_1 m_1 n_2 m_2 ...
        cores, error = tt_svd(folded.permute(order), self.modes, self.ranks)
        self.set_cores(cores)
        return error / max(float(table.weight.norm()), 1e-30)


def lookup(ids: Tensor, left: Tensor, right: Tensor, num_embeddings: int) -> Tensor:
    """Rows of the table with the halves L (V_1, C_1, r) and R (V_2, r, C_2): (...) -> (..., C).

    On CPU raises IndexError for an id outside the table, also if the padded table has it: to look at the values, the
    host of a GPU would have to wait at every step.
    """
    if ids.numel() <= FEW:
        distinct, where = ids.flatten(), torch.arange(ids.numel(), device=ids.device).view_as(ids)
    else:
        distinct, where = distinct_ids(ids)  # each is built once
    if distinct.numel() and not ids.is_cuda and (distinct.min() < 0 or distinct.max() >= num_embeddings):
        raise IndexError(f"an id is outside the table of {num_embeddings} rows")
    first, second = distinct // len(right), distinct % len(right)
    a = F.embedding(first, left.flatten(1)).view(-1, *left.shape[1:])  # (U, C_1, r)
    b = F.embedding(second, right.flatten(1)).view(-1, *right.shape[1:])  # (U, r, C_2)
    return F.embedding(where, torch.bmm(a, b).flatten(1))


# ---------------------------------------------------------------------------------------- a model
@dataclass
class TensorizeReport:
    """What tensorize did: name -> (parameters before, parameters after, relative error or None)."""

    replaced: dict[str, tuple[int, int, float | None]]

    def __str__(self) -> str:
        before, after = (sum(row[i] for row in self.replaced.values()) for i in (0, 1))
        text = f"{len(self.replaced)} tensor trains, {after:,} parameters instead of {before:,}"
        errors = [row[2] for row in self.replaced.values() if row[2] is not None]
        return text + (f", relative error {min(errors):.2f} to {max(errors):.2f}" if errors else "")


@torch.no_grad()
def tensorize(model: nn.Module, config: TTConfig, from_weights: bool = False) -> TensorizeReport:
    """Replace Linear layers and tables by tensor trains, in place, where that has fewer parameters; model.config.tt
    then says so.

    from_weights: by TT-SVD of the weights; else with random cores.  Tables are those of words and positions.
    """
    report = TensorizeReport({})
    for full, child in list(model.named_modules()):
        if not full or full.startswith(config.keep):
            continue
        if isinstance(child, nn.Linear):
            new = TTLinear.like(child, config)
        elif isinstance(child, WordEmbedding) and config.embedding_rank:
            new = TTMEmbedding.like(child, config.table_modes, config.embedding_rank)
        elif full.endswith(".position") and isinstance(child, nn.Embedding):
            new = TTMEmbedding.like(child, config.table_modes, config.rank)
        else:
            continue
        before, after = (sum(p.numel() for p in m.parameters()) for m in (child, new))
        if after < before:
            error = new.set_dense(child) if from_weights else None
            report.replaced[full] = before, after, error
            model.set_submodule(full, new.to(child.weight.device))
    model.config = replace(model.config, tt=config)
    return report

"""Tensor trains: a large matrix as a chain of small cores, trained without ever being written out.

A matrix W (out, in) has as many numbers as it has entries. Fold both sides into d factors each,
out = o_1 ... o_d and in = i_1 ... i_d, and write an entry as a product of small matrices, one for
each digit of its row and of its column (Oseledets 2011; Novikov et al. 2015):

    W[(a_1..a_d), (b_1..b_d)] = G_1[a_1] ... G_d[a_d] G_d+1[b_1] ... G_2d[b_d]

    core k     (r_k-1, n_k, r_k): for each digit a matrix r_k-1 x r_k          r_0 = r_2d = 1
    ranks r_k  how much the two sides of the cut at k may know of each other; full rank is exact

768 x 768 = (12 8 8) x (8 8 12) at rank 20 has 10,528 numbers instead of 589,824. Its *product* has
as many entries as before, but they are tied to each other: that is what is learnt.

TTLinear. Contract the output cores to B (out, r) and the input cores to A (r, in), r being the rank
in the middle: once a step, for they don't depend on the tokens. Then

    y = (x A^T) B^T + b                  2 r (in + out) operations a token instead of 2 in out

so beside x only (tokens, r) numbers are kept for the backward pass. Gradients of the cores come from
autograd: the contractions are a few small products, and a hand-written backward would do the same.

TTMEmbedding. A table (V, C) whose cores have two digits, (r_k-1, n_k, m_k, r_k): row i is the
product over k of G_k[digit k of i]. The first half of the cores is contracted to L (V_1, C_1, r),
the second to R (V_2, r, C_2), and row i = (i_1, i_2) is the one product L[i_1] R[i_2]. Neither half
has more than about sqrt(V) rows; the table itself is never built.

Quantized cores (Yang et al. 2023, arXiv 2306.01076): each core goes through learned.LearnedScale, a
grid whose scale is trained. To compute in integers, A and B merged from quantized cores are rounded
to 8 bits a row, like any other weight, in training as in deployment.

    python train.py --task atis --model scratch --layers 2 --hidden 768 --tt-rank 20 --bits 8

Simplified: one rank for all cuts of all layers (`ranks` of a single layer can be given), modes as
equal as they can be. Where a layer would have more numbers as a tensor train, it stays as it is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import UserError
from learned import LearnedScale
from quant import Codes, QuantConfig, WeightQuantizer, product


# ---------------------------------------------------------------------------------- configuration
@dataclass(frozen=True)
class TTConfig:
    """Which tensor trains take the place of a model's layers."""

    rank: int = 20  # of Linear layers and of the position table
    embedding_rank: int = 0  # of the word table; 0 leaves it a table
    modes: int = 3  # d: factors of each side of a Linear layer
    table_modes: int = 2  # the same for tables
    # Left as they are, by the beginning of their names. A class is a row of the last matrix, few
    # and each its own; as rows of a tensor train they are learnt slowly.
    keep: tuple[str, ...] = ("head.out_proj", "head.intent.out_proj")

    def __post_init__(self):
        limits = {"rank": (1, 4096), "embedding_rank": (0, 4096)}
        for name, (least, most) in {**limits, "modes": (1, 8), "table_modes": (2, 8)}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise UserError(f"tensor train: {name} is {value!r}; want {least} to {most}")
        if not all(isinstance(name, str) for name in self.keep):
            raise UserError(f"tensor train: keep is {self.keep}; want names of modules")


# --------------------------------------------------------------------------------- modes and ranks
def factorize(n: int, d: int) -> tuple[int, ...]:
    """n as a product of d whole numbers, as equal as they can be (least sum), ascending.

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
    """d nearly equal factors whose product is n or a little more: for a vocabulary, whose size may
    be prime. Rows that are not needed cost nothing but a few numbers of the cores.

    >>> pad_factors(867, 4), pad_factors(250002, 4)
    ((6, 6, 5, 5), (23, 23, 22, 22))
    """
    low = max(1, math.floor(n ** (1 / d) + 1e-9))
    larger = next(k for k in range(d + 1) if (low + 1) ** k * low ** (d - k) >= n)
    return (low + 1,) * larger + (low,) * (d - larger)


def clip_ranks(modes: Sequence[int], rank: int | Sequence[int]) -> tuple[int, ...]:
    """The ranks (r_0 .. r_N) of N cores: at most `rank`, and no more than either side can use.

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


def count_parameters(modes: Sequence[int], ranks: Sequence[int]) -> int:
    """sum_k r_k-1 n_k r_k. Cores with two digits: their products are the modes."""
    return sum(ranks[k] * n * ranks[k + 1] for k, n in enumerate(modes))


def count_flops(
    tokens: int, out_modes: Sequence[int], in_modes: Sequence[int], rank: int | Sequence[int]
) -> int:
    """Floating-point operations of a TTLinear's forward pass: building A and B, and two products."""
    ranks = clip_ranks((*out_modes, *in_modes), rank)
    d, total = len(out_modes), 0
    middle = ranks[d]
    for half, of_half in ((out_modes, ranks[: d + 1]), (in_modes, ranks[d:])):
        rows = of_half[0] * half[0]
        for k in range(1, len(half)):
            total += 2 * rows * of_half[k] * half[k] * of_half[k + 1]
            rows *= half[k]
    return total + 2 * tokens * middle * (math.prod(out_modes) + math.prod(in_modes))


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
    """Root of the mean square of the entries of (m, r) @ (r, n), without that product:
    |L R|^2 = <L^T L, R R^T>.
    """
    squares = ((left.T @ left) * (right @ right.T)).sum()
    return squares.div(left.shape[0] * right.shape[1]).sqrt()


def balanced(cores: list[Tensor]) -> list[Tensor]:
    """The same product, with the size spread evenly: an optimizer moves all cores at one rate."""
    norms = [core.norm().clamp(min=1e-30) for core in cores]
    mean = torch.stack(norms).log().mean().exp()
    return [core * (mean / norm) for core, norm in zip(cores, norms, strict=True)]


@torch.no_grad()
def tt_svd(dense: Tensor, shape: Sequence[int], ranks: int | Sequence[int]):
    """A tensor -> cores of the given ranks, by one singular value decomposition a cut.

    dense: any tensor with prod(shape) numbers, folded to `shape`.  Returns (cores, error): cores
    (r_k-1, n_k, r_k) float32, error: the Frobenius norm of what was lost, which is the root of the
    sum of all discarded sigma^2 (each cut's loss is orthogonal to the others'). Full ranks lose
    nothing (Oseledets 2011, algorithm 1).
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
    """What TTLinear and TTMEmbedding share: cores, and their quantizers if there are any.

    cut: so many of the cores make the first half.
    """

    cut: int

    def __init__(self, shapes: Sequence[tuple[int, ...]]):
        super().__init__()
        self.cores = nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in shapes)
        self.core_quantizers = None  # or one learned.LearnedScale a core

    def quantized_cores(self) -> list[Tensor]:
        if self.core_quantizers is None:
            return list(self.cores)
        pairs = zip(self.cores, self.core_quantizers, strict=True)
        return [quantizer(core) for core, quantizer in pairs]

    def quantize_cores(self, config: QuantConfig) -> None:
        bits, start = config.weight_bits, config.weight_range
        self.core_quantizers = nn.ModuleList(LearnedScale(bits, c, start) for c in self.cores)

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Random orthogonal cores, whose product has entries of mean 0 and this standard deviation.

        NOTE: differs from the paper, which draws Gaussian cores of variance sigma^(2/N) / r_k-1.
        Their product has the right size too, on average over draws; but a product of Gaussian
        matrices is nearly singular, and is learnt more slowly. Here all cores before the cut have
        orthonormal columns and all after it orthonormal rows: the r singular values are equal.
        """
        if self.cores[0].is_meta:  # only shapes are wanted
            return
        for k, core in enumerate(self.cores):
            nn.init.orthogonal_(core.flatten(0, -2) if k < self.cut else core.flatten(1))
        self.set_cores(list(self.cores))
        scale = (std / self.entries_rms()) ** (1 / len(self.cores))
        for core in self.cores:
            core.mul_(scale)

    @torch.no_grad()
    def set_cores(self, cores: list[Tensor]) -> None:
        for parameter, core in zip(self.cores, balanced(cores), strict=True):
            parameter.copy_(core.reshape(parameter.shape))


class TTLinear(TensorTrain):
    """y = x W^T + b, W (out, in) a tensor train of len(out_modes) + len(in_modes) cores."""

    def __init__(
        self,
        out_modes: Sequence[int],
        in_modes: Sequence[int],
        rank: int | Sequence[int],
        bias: bool = True,
    ):
        self.modes = (*out_modes, *in_modes)
        self.ranks = ranks = clip_ranks(self.modes, rank)
        super().__init__([(ranks[k], n, ranks[k + 1]) for k, n in enumerate(self.modes)])
        self.out_features, self.in_features = math.prod(out_modes), math.prod(in_modes)
        self.cut = len(out_modes)
        self.bias = nn.Parameter(torch.empty(self.out_features)) if bias else None
        self.reset_parameters()

    @classmethod
    def like(cls, linear: nn.Linear, config: TTConfig) -> "TTLinear":
        """A layer of the same size: large output modes first, large input modes last, so that the
        cores at the ends, whose rank is 1 on one side, take the large ones.
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
        """Of W, without W."""
        A, B = self.halves()
        return product_rms(B, A)

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        super().reset_parameters(std)
        if self.bias is not None:
            self.bias.zero_()

    @torch.no_grad()
    def set_dense(self, linear: nn.Linear) -> float:
        """Become the best approximation of a Linear layer; returns the relative error."""
        cores, error = tt_svd(linear.weight, self.modes, self.ranks)
        self.set_cores(cores)
        if self.bias is not None:
            self.bias.copy_(linear.bias)
        return error / max(float(linear.weight.norm()), 1e-30)

    def quantized(self, config: QuantConfig, act: nn.Module, middle: nn.Module) -> "QuantTTLinear":
        return QuantTTLinear(self, config, act, middle)

    def extra_repr(self) -> str:
        modes = " ".join(map(str, self.modes[: self.cut]))
        modes += " x " + " ".join(map(str, self.modes[self.cut :]))
        return f"{self.in_features} -> {self.out_features}, modes {modes}, ranks {self.ranks}"


class QuantTTLinear(TTLinear):
    """A TTLinear with quantized cores, and two quantized products: y = Q(Q(x) Q(A)^T) Q(B)^T + b.

    A and B, merged from the cores, are rounded to 8 bits a row, as they are deployed, whatever the
    cores' bits. With float32 activations (weight-only quantization) they stay as they are.
    """

    def __init__(self, layer: TTLinear, config: QuantConfig, act: nn.Module, middle: nn.Module):
        nn.Module.__init__(self)
        self.modes, self.ranks, self.cut = layer.modes, layer.ranks, layer.cut
        self.out_features, self.in_features = layer.out_features, layer.in_features
        self.cores, self.bias, self.core_quantizers = layer.cores, layer.bias, None
        self.act_quantizer, self.middle_quantizer = act, middle
        self.A_quantizer, self.B_quantizer = nn.Identity(), nn.Identity()
        if config.weight_bits == 32:
            return
        self.quantize_cores(config)
        if config.act_bits != 32:
            merged = replace(config, weight_bits=8, weight_range="minmax", noise=1.0)
            self.A_quantizer = WeightQuantizer(merged, per_row=True, multiplied=True)
            self.B_quantizer = WeightQuantizer(merged, per_row=True, multiplied=True)

    def forward(self, x: Tensor | Codes) -> Tensor:
        A, B = self.halves()
        x = product(self.act_quantizer(x), A, self.A_quantizer, None)
        return product(self.middle_quantizer(x), B, self.B_quantizer, self.bias)


class TTMEmbedding(TensorTrain):
    """A table (num_embeddings, prod(column_modes)) as a tensor train: ids -> rows.

    row_modes: their product is the padded number of rows.
    """

    def __init__(
        self,
        num_embeddings: int,
        row_modes: Sequence[int],
        column_modes: Sequence[int],
        rank: int | Sequence[int],
    ):
        modes = [n * m for n, m in zip(row_modes, column_modes, strict=True)]
        if math.prod(row_modes) < num_embeddings:
            raise ValueError(f"row modes {row_modes} make fewer than {num_embeddings} rows")
        self.ranks = ranks = clip_ranks(modes, rank)
        pairs = zip(row_modes, column_modes, strict=True)
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
        """Of the padded table, without it."""
        left, right = self.halves()
        rank = left.shape[-1]
        return product_rms(left.reshape(-1, rank), right.transpose(0, 1).reshape(rank, -1))

    @torch.no_grad()
    def set_dense(self, table: nn.Embedding) -> float:
        """Become the best approximation of a table; returns the relative error."""
        d = len(self.row_modes)
        padded = table.weight.new_zeros(math.prod(self.row_modes), self.embedding_dim)
        padded[: self.num_embeddings] = table.weight
        folded = padded.view(*self.row_modes, *self.column_modes)
        order = [axis for k in range(d) for axis in (k, d + k)]  # n_1 m_1 n_2 m_2 ...
        modes = [n * m for n, m in zip(self.row_modes, self.column_modes, strict=True)]
        cores, error = tt_svd(folded.permute(order), modes, self.ranks)
        self.set_cores(cores)
        return error / max(float(table.weight.norm()), 1e-30)

    def extra_repr(self) -> str:
        rows, columns = (" ".join(map(str, m)) for m in (self.row_modes, self.column_modes))
        return f"{self.num_embeddings} x {self.embedding_dim}, modes {rows} x {columns}"


def lookup(ids: Tensor, left: Tensor, right: Tensor, num_embeddings: int) -> Tensor:
    """Rows of the table that L (V_1, C_1, r) and R (V_2, r, C_2) stand for: (...) -> (..., C).

    Raises IndexError for an id outside the table, also where the padded table has it.
    """
    distinct, where = torch.unique(ids, return_inverse=True)  # sorted (U,); each is built once
    if distinct.numel() and (distinct[0] < 0 or distinct[-1] >= num_embeddings):
        raise IndexError(f"an id is outside the table of {num_embeddings} rows")
    first, second = distinct // len(right), distinct % len(right)
    a = F.embedding(first, left.flatten(1)).view(-1, *left.shape[1:])  # (U, C_1, r)
    b = F.embedding(second, right.flatten(1)).view(-1, *right.shape[1:])  # (U, r, C_2)
    return F.embedding(where, torch.bmm(a, b).flatten(1))


# ---------------------------------------------------------------------------------------- a model
@dataclass
class TensorizeReport:
    """What tensorize did: name -> numbers before, numbers after, relative error (None: random)."""

    replaced: dict[str, tuple[int, int, float | None]]

    def __str__(self) -> str:
        before, after = (sum(row[i] for row in self.replaced.values()) for i in (0, 1))
        text = f"{len(self.replaced)} tensor trains, {after:,} numbers for {before:,}"
        errors = [row[2] for row in self.replaced.values() if row[2] is not None]
        return text + (f", relative error {min(errors):.2f} to {max(errors):.2f}" if errors else "")


@torch.no_grad()
def tensorize(model: nn.Module, config: TTConfig, from_weights: bool = False) -> TensorizeReport:
    """Replace Linear layers and tables by tensor trains, in place, where that saves numbers.

    from_weights: by TT-SVD of what is there; else with random cores.
    A table is a module that has a `row_quantizer` (word embeddings), or that is named "position".
    """
    report = TensorizeReport({})

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in list(module.named_children()):
            full = prefix + name
            if full.startswith(config.keep):
                continue
            if isinstance(child, nn.Linear):
                new = TTLinear.like(child, config)
            elif hasattr(child, "row_quantizer"):
                if not config.embedding_rank:
                    continue
                new = TTMEmbedding.like(child, config.table_modes, config.embedding_rank)
            elif name == "position" and isinstance(child, nn.Embedding):
                new = TTMEmbedding.like(child, config.table_modes, config.rank)
            else:
                visit(child, full + ".")
                continue
            before, after = (sum(p.numel() for p in m.parameters()) for m in (child, new))
            if after < before:
                error = new.set_dense(child) if from_weights else None
                report.replaced[full] = before, after, error
                setattr(module, name, new.to(child.weight.device))

    visit(model, "")
    return report

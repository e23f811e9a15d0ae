"""Iterative product quantization (iPQ): a weight as one byte per block of 4 or 8 weights, and a codebook.

A row of a matrix is cut into blocks of b neighbours (b inputs of one output). k-means finds 256 centroids for the
blocks of a matrix; each block is stored as the number of its centroid:

    W (rows, N)  ->  assignments (rows N / b), a byte each;  centroids (256, b), float16

So 8 bits serve b weights: 1 bit a weight with b = 8, where a uniform grid of 1 bit would keep signs only. Rounding all
matrices at once drifts from layer to layer. *Iterative* (Stock et al. 2020, arXiv 1907.05686; with noise Fan et al.
2020, arXiv 2004.07320): quantize one group of matrices, train everything else to make up for it, then the next group.
The order is feed-forward, embeddings, attention. Once assigned, a block keeps its centroid, and the centroids are
trained: all blocks of one move together. Its gradient is the mean over its blocks.

A matrix that waits for its stage can be trained with block noise: blocks are set to 0 at random, as Quant-Noise does in
place of rounding, so that none matters much. A student with SDQ's losses is iPQ with distillation.

The integer model multiplies 8-bit integers: a decoded matrix is rounded once more, to int8 with a scale per row
(`codes`).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit.common import Progress
from quant import QuantConfig, UniformQuantizer, noise_mask, straight_through

CENTROIDS = 256  # one byte
ITERATIONS = 15  # of k-means, as in fairseq
SAMPLE = 1 << 20  # blocks that k-means sees; NOTE: differs, fairseq takes all 24 million of XLM-R's table
CHUNK = 1 << 12  # blocks whose distances are computed at a time
STAGES = ("ffn", "embeddings", "attention")


# ---------------------------------------------------------------------------------------- k-means
def nearest(blocks: Tensor, centroids: Tensor) -> Tensor:
    """The number of the nearest centroid (K, b) of each block (n, b), uint8.

    |x - c|^2 = |x|^2 - 2 (x c - |c|^2 / 2): the nearest has the largest bracket.
    """
    found = torch.empty(len(blocks), dtype=torch.uint8, device=blocks.device)
    bias = centroids.square().sum(dim=1).div(-2)
    for part, result in zip(blocks.split(CHUNK), found.split(CHUNK), strict=True):
        result.copy_(torch.addmm(bias, part, centroids.T).argmax(dim=1))
    return found


def means(blocks: Tensor, assignments: Tensor, centroids: Tensor) -> Tensor:
    """The mean of the blocks of each centroid. A centroid without blocks takes half of one with many: it is put beside
    it, and the next assignment divides them.
    """
    where, count = assignments.long(), len(centroids)
    counts = torch.bincount(where, minlength=count)
    found = torch.zeros_like(centroids).index_add_(0, where, blocks) / counts.clamp(min=1)[:, None]
    empty = (counts == 0).nonzero().flatten()
    empty = empty[: count - len(empty)]  # if most are empty, the others take their turn at the next iteration
    full = counts.topk(len(empty)).indices
    noise = torch.randn(len(empty), blocks.shape[1], generator=torch.Generator().manual_seed(0)).to(blocks.device)
    found[empty] = found[full] + 1e-3 * blocks.std() * noise
    return found


@torch.no_grad()
def kmeans(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Centroids (256, b) of blocks (n, b) with a small squared error, and the assignments (n), uint8 (Lloyd).

    Up to 256 distinct blocks are kept exactly.
    """
    generator = torch.Generator().manual_seed(0)  # the same matrix, the same centroids
    picks = torch.randperm(len(blocks), generator=generator)[:SAMPLE].to(blocks.device)
    sample = blocks[picks]
    centroids = sample[torch.arange(CENTROIDS, device=blocks.device) % len(sample)]
    if len(sample[:4096].unique(dim=0)) <= CENTROIDS:
        distinct = blocks.unique(dim=0)
        if len(distinct) <= CENTROIDS:
            centroids[: len(distinct)] = distinct
            return centroids, nearest(blocks, centroids)
    for _ in range(ITERATIONS):
        centroids = means(sample, nearest(sample, centroids), centroids)
    return centroids, nearest(blocks, centroids)


# -------------------------------------------------------------------------------------- quantizer
class ProductQuantizer(UniformQuantizer):
    """A weight (rows, N) as centroids of its blocks. Arguments: see quant.WeightQuantizer.

    Until `assign`, or its first use, it has no centroids. While it waits for its stage the weight passes, in training
    with block noise.
    """

    decays = True  # centroids are values of weights, not scales: they decay as the matrix did

    def __init__(self, config: QuantConfig, weight: Tensor, per_row: bool, multiplied: bool):
        super().__init__(config, weight, per_row, multiplied)
        self.shape, self.waiting, self.assigned = weight.shape, False, False
        square = self.shape[0] == self.shape[1]  # as matrices of attention are, and those of feed-forward layers not
        self.stage = STAGES.index("embeddings" if not multiplied else "attention" if square else "ffn")
        self.block = 4 if self.stage == STAGES.index("attention") else 8
        if self.shape[1] % self.block:
            raise ValueError(f"weights=pq needs rows of a multiple of {self.block} weights, not {self.shape[1]}")
        self.centroids = nn.Parameter(weight.new_zeros(CENTROIDS, self.block))
        self.register_buffer("assignments", weight.new_zeros(weight.numel() // self.block, dtype=torch.uint8))
        # Blocks of each centroid; all 0: there are no centroids yet.
        self.register_buffer("counts", weight.new_zeros(CENTROIDS))

    @property
    def by_number(self) -> bool:
        """Whether a table asks for rows by their numbers, instead of giving the rows (model.WordEmbedding)."""
        return not self.waiting

    @torch.no_grad()
    def assign(self, weight: Tensor) -> None:
        """Find the centroids, unless they were found before."""
        self.assigned = self.assigned or bool(self.counts.any())  # asked once: on a GPU the host waits for it
        if self.assigned:
            return
        centroids, assignments = kmeans(weight.detach().reshape(-1, self.block))
        self.centroids.copy_(centroids)
        self.assignments.copy_(assignments)
        self.counts.copy_(torch.bincount(assignments.long(), minlength=CENTROIDS))

    def decode(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """The centroids of the rows' blocks, (.., N), differentiable."""
        # A centroid's gradient is the mean over its blocks. NOTE: differs: fairseq's linear layers have the sum.
        each = self.centroids / self.counts.clamp(min=1)[:, None]
        centroids = straight_through(each, self.centroids.detach().clone())
        assignments = self.assignments.view(self.shape[0], -1)[rows]
        return F.embedding(assignments.int(), centroids).flatten(-2)

    def forward(self, weight: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """rows: which of them to decode, of a table."""
        if self.waiting:
            if not self.training or self.noise in (0.0, 1.0):  # all blocks 0: nothing to learn from
                return weight
            zeroed = noise_mask(weight, self.noise, self.block)
            return weight.masked_fill(zeroed, 0.0) / (1 - self.noise)
        codes, scale = self.codes(weight, rows)
        return straight_through(self.decode(rows), codes * scale)

    @torch.no_grad()
    def codes(self, weight: Tensor, rows: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The integers of the decoded weight, from the float16 centroids that a file holds, and their scale; those of
        the weight itself while it waits.
        """
        if self.waiting:
            return super().codes(weight)
        self.assign(weight)
        stored = self.centroids.half().float()
        decoded = F.embedding(self.assignments.view(self.shape[0], -1)[rows].int(), stored).flatten(-2)
        return super().codes(decoded)


# ------------------------------------------------------------------------------------------ stages
def product_quantizers(model: nn.Module) -> Iterator[tuple[ProductQuantizer, Tensor]]:
    """Each product quantizer of a model, with its weight."""
    for module in model.modules():
        for name in ("weight_quantizer", "row_quantizer"):
            if isinstance(quantizer := getattr(module, name, None), ProductQuantizer):
                yield quantizer, module.weight


def begin_stage(model: nn.Module, stage: int) -> None:
    """Quantize the weights of the stages 0 .. stage; the others wait."""
    found = list(product_quantizers(model))
    progress = Progress("k-means", len(found))
    for i, (quantizer, weight) in enumerate(found):
        quantizer.waiting = quantizer.stage > stage
        if not quantizer.waiting:
            quantizer.assign(weight)
            progress.update(i + 1, STAGES[quantizer.stage])
    progress.clear()

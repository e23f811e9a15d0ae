"""Pretrain the built-in model "mini", a small XLM-R, on synthetic text in 15 languages.

    python tools/pretrain_mini.py --out data/mini        # 35 minutes on 2 CPU cores

Writes mini.safetensors (float16 weights with the tokenizer) and pretrain.json (settings, learning curve).

The sentences are those of tools/make_mini.py, realized from random meanings; no label of mini-XNLI is used. As in real
corpora, some languages have less text: Arabic has a quarter of the sentences that English has, Swahili an eighth. One
model learns three tasks from random weights:

    MLM   masked language modelling on a single sentence (Devlin et al. 2019)
    TLM   translation language modelling: a sentence and its translation, with a quarter of the
          tokens of *one* side masked (Conneau and Lample 2019)
    TRTD  translation replaced-token detection (XLM-E, Chi et al. 2022, arXiv 2106.16138): half of
          the translations differ from the original in one slot. The model predicts for each token
          whether it belongs to the difference, and at <s> whether there is one. XLM-E replaces
          tokens with the samples of a small generator network; here near_miss() makes the change.

A quarter of the pairs are in a single language. Copying is learned first, and translation follows. docs/log.md says
why TRTD and small batches.
"""

import argparse
import copy
import io
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

if __package__ in (None, ""):  # run as a script: put the repository root on the path
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import save_model
from data.tokenizer import BOS, EOS, PAD, Tokenizer
from kit.common import Progress, exit_status, hardware
from kit.files import check_writable, write_json
from model import PRESETS, Model, build_model
from tools.make_mini import near_miss, random_meanings, realize

SHARES = dict.fromkeys("en de fr es ru zh".split(), 1.0)  # sentences relative to English
SHARES |= dict.fromkeys("ar bg el tr vi".split(), 1 / 4)
SHARES |= dict.fromkeys("hi sw th ur".split(), 1 / 8)
SMOOTHING = 0.3  # languages are sampled in proportion to size ** 0.3, as in XLM-R
SAME_LANGUAGE = 0.25  # share of pairs that are forced to be in one language
PAIRS = 0.8  # share of batches with pairs; the others have single sentences
MLM_MASKED, TLM_MASKED = 0.15, 0.25
TOKEN_WEIGHT = 5  # of TRTD's token loss, which is small because few tokens are changed
BUCKET = 8  # batches that are sampled together and sorted by length, for less padding


class Corpus:
    """Sentences of all languages as one array of token ids, each original before its near miss.

    Sentence s has the tokens ids[starts[s] : starts[s] + lengths[s]]. It differs from its counterpart in its tokens
    span_start[s] to span_end[s] (exclusive). Language i has sizes[i] meanings: the original of meaning m is sentence
    first[i] + 2 m, its near miss the next one.
    """

    def __init__(self, seed: int, meanings: int, pieces: int):
        rng = random.Random(f"{seed} pretraining")
        originals = random_meanings(rng, meanings)
        near_misses = [near_miss(rng, meaning) for meaning in originals]
        self.sizes = np.array([round(share * meanings) for share in SHARES.values()])
        self.first = 2 * (np.cumsum(self.sizes) - self.sizes)
        self.texts = []
        for language, size in zip(SHARES, self.sizes, strict=True):
            for pair in zip(originals[:size], near_misses[:size], strict=True):
                self.texts += [realize(meaning, language) for meaning in pair]
        self.tokenizer = Tokenizer(train_tokenizer(self.texts[::2], pieces))
        rows = [ids[1:-1] for ids in self.tokenizer.encode_batch(self.texts)]  # no <s>, no </s>
        self.ids = np.concatenate(rows).astype(np.int64)
        self.lengths = np.array([len(row) for row in rows])
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.span_start, self.span_end = np.zeros_like(self.lengths), self.lengths.copy()
        for s in range(0, len(rows), 2):
            a, b = rows[s], rows[s + 1]
            prefix = common_prefix(a, b)
            suffix = common_prefix(a[prefix:][::-1], b[prefix:][::-1])
            self.span_start[s : s + 2] = prefix
            self.span_end[s : s + 2] -= suffix


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix."""
    shorter = min(len(a), len(b))
    different = a[:shorter] != b[:shorter]
    return int(different.argmax()) if different.any() else shorter


def train_tokenizer(texts: list[str], pieces: int) -> bytes:
    """A SentencePiece model with XLM-R's special tokens, deterministic.

    It is a BPE model, because a unigram model of so little text splits frequent words.
    """
    file = io.BytesIO()
    rules = dict(character_coverage=1.0, normalization_rule_name="nmt_nfkc")  # as in XLM-R
    options = dict(vocab_size=pieces, model_type="bpe", num_threads=1, minloglevel=2, **rules)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=file, **options)
    return file.getvalue()


def sample_batches(corpus: Corpus, batch_size: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Endless training batches, deterministic (see make_batch)."""
    rng, count = np.random.default_rng(seed), batch_size * BUCKET
    weights = corpus.sizes**SMOOTHING
    shares = weights / weights.sum()
    while True:
        pairs = rng.random() < PAIRS
        one = rng.choice(len(shares), count, p=shares)  # languages
        other = rng.choice(len(shares), count, p=shares)
        other = np.where(rng.random(count) < SAME_LANGUAGE, one, other)
        sizes = np.minimum(corpus.sizes[one], corpus.sizes[other if pairs else one])
        meaning = (rng.random(count) * sizes).astype(np.int64)
        differs = (rng.random(count) < 0.5) & pairs
        a = corpus.first[one] + 2 * meaning
        b = corpus.first[other] + 2 * meaning + differs
        swap = rng.random(count) < 0.5  # the near miss may come first or second
        a, b = (np.where(swap, b, a), np.where(swap, a, b)) if pairs else (a, None)
        lengths = corpus.lengths[a] + (corpus.lengths[b] if pairs else 0)
        order = np.argsort(lengths, kind="stable").reshape(BUCKET, batch_size)
        for rows in rng.permutation(order):
            yield make_batch(corpus, rng, a[rows], b[rows] if pairs else None, differs[rows])


def make_batch(
    corpus: Corpus, rng: np.random.Generator, a: np.ndarray, b: np.ndarray | None, differs: np.ndarray
) -> tuple[Tensor, ...]:
    """Indices of sentences (b: None if single) -> (ids, mask, targets, changed), each (B, T).

    targets: the id of a masked token, -1 elsewhere.  changed: 1 for a token in which the sentences of a pair differ
    and 0 for another, the same for the whole pair in column 0; -1 where no prediction is asked for.
    """
    sides = [(a, np.ones_like(a))]  # (sentences, column of their first token)
    ends = corpus.lengths[a] + 2
    if b is not None:
        sides.append((b, ends + 1))
        ends = ends + corpus.lengths[b] + 2
    columns = np.arange(ends.max())
    mask = columns < ends[:, None]
    ids = np.where(mask, EOS, PAD)
    ids[:, 0] = BOS
    changed, masked = np.zeros_like(ids), np.zeros_like(mask)
    masked_side = rng.integers(len(sides), size=(len(a), 1))
    chosen = rng.random(mask.shape) < (MLM_MASKED if b is None else TLM_MASKED)
    for side, (sentences, first_column) in enumerate(sides):
        s = sentences[:, None]
        position = columns - first_column[:, None]  # of a column in this sentence
        inside = (position >= 0) & (position < corpus.lengths[s])
        ids = np.where(inside, corpus.ids[corpus.starts[s] + np.where(inside, position, 0)], ids)
        in_span = (position >= corpus.span_start[s]) & (position < corpus.span_end[s])
        changed |= in_span & differs[:, None]
        masked |= inside & chosen & (masked_side == side)
    changed[:, 0] = differs
    changed = np.where(masked | ~mask | (b is None), -1, changed)
    targets = np.where(masked, ids, -1)
    ids = np.where(masked, corpus.tokenizer.mask_id, ids)
    return tuple(map(torch.from_numpy, (ids, mask, targets, changed)))


class Detector(nn.Module):
    """TRTD's head, discarded after pretraining: (B, T, C) -> (B, T) logits of "changed"."""

    def __init__(self, size: int):
        super().__init__()
        self.dense, self.out = nn.Linear(size, size), nn.Linear(size, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out(F.gelu(self.dense(hidden)))[..., 0]


def loss_and_metrics(model: Model, detector: Detector, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, float]]:
    """MLM's loss for single sentences, for pairs the sum of TLM's and TRTD's. "right": accuracy."""
    ids, mask, targets, changed = batch
    hidden = model.encoder(ids, None if mask.all() else mask, None, {})
    masked = targets >= 0
    labels = targets[masked]
    # The output matrix is large, so the head is applied to the masked tokens alone.
    logits = model.head(hidden[masked], model.encoder.embeddings.word)
    loss = F.cross_entropy(logits, labels)
    accuracy = (logits.argmax(dim=-1) == labels).float().mean()
    if not (changed >= 0).any():
        return loss, {"mlm": loss.item(), "mlm right": accuracy.item()}
    metrics = {"tlm": loss.item(), "tlm right": accuracy.item()}
    detected = detector(hidden)
    asked = changed[:, 1:] >= 0
    tokens, token_labels = detected[:, 1:][asked], changed[:, 1:][asked].float()
    pairs, pair_labels = detected[:, 0], changed[:, 0].float()
    loss = loss + TOKEN_WEIGHT * F.binary_cross_entropy_with_logits(tokens, token_labels)
    loss = loss + F.binary_cross_entropy_with_logits(pairs, pair_labels)
    positive = (tokens > 0).float()
    total = (positive.sum() + token_labels.sum()).clamp(min=1)
    metrics["token F1"] = (2 * (positive * token_labels).sum() / total).item()
    metrics["pair right"] = ((pairs > 0) == (pair_labels > 0)).float().mean().item()
    return loss, metrics


def pretrain(args: argparse.Namespace) -> None:
    started = time.monotonic()
    check_writable(args.out)
    print("making sentences and vocabulary, half a minute", flush=True)
    corpus = Corpus(args.seed, args.meanings, args.pieces)
    tokenizer = corpus.tokenizer
    tokens = f"{corpus.lengths.mean():.1f} tokens on average, vocabulary {tokenizer.vocab_size:,}"
    print(f"{len(corpus.texts) // 2:,} sentences in {len(SHARES)} languages, {tokens}", flush=True)
    torch.manual_seed(args.seed)
    sizes = dict(hidden_size=args.hidden, num_layers=args.layers, ffn_size=4 * args.hidden, dropout=0.0)
    model = build_model(replace(PRESETS["mini"], vocab_size=tokenizer.vocab_size, **sizes))
    detector = Detector(args.hidden)
    model.train()
    parameters = [*model.parameters(), *detector.parameters()]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, fused=True)
    warmup = max(1, round(0.05 * args.steps))
    batches = sample_batches(corpus, args.batch_size, args.seed)
    progress, curve, recent = Progress("pretraining", args.steps), [], {}
    for step in range(1, args.steps + 1):
        # Linear warm-up, then linear decay to zero.
        rate = min(step / warmup, (args.steps + 1 - step) / max(1, args.steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate
        loss, metrics = loss_and_metrics(model, detector, next(batches))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        progress.update(step, " ".join(f"{name} {value:.3g}" for name, value in metrics.items()))
        for name, value in metrics.items():
            recent.setdefault(name, []).append(value)
        if step % 500 == 0 or step == args.steps:
            curve.append({"step": step} | {name: round(statistics.fmean(each), 4) for name, each in recent.items()})
            recent = {}
    progress.clear()
    # float16 halves the file; its rounding is small beside the changes of fine-tuning.
    path, notes = os.path.join(args.out, "mini.safetensors"), {"made_by": "tools/pretrain_mini.py"}
    size = save_model(path, copy.deepcopy(model).half(), tokenizer.bytes, notes)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    results = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": size,
        "seconds": round(time.monotonic() - started),
        "hardware": hardware(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "curve": curve,
    }
    write_json(os.path.join(args.out, "pretrain.json"), settings | results)
    print(f"wrote {args.out}/mini.safetensors ({size:,} bytes) and pretrain.json")


@exit_status()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Pretrain the built-in model from random weights, on synthetic text.",
        epilog="example: python tools/pretrain_mini.py --out data/mini",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", required=True, help="folder for mini.safetensors and pretrain.json")
    parser.add_argument("--seed", type=int, default=0, help="of sentences, weights and batches")
    parser.add_argument("--meanings", type=int, default=30000, help="sentences in English")
    parser.add_argument("--pieces", type=int, default=5000, help="size of the SentencePiece model")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size, a multiple of 4")
    parser.add_argument("--layers", type=int, default=4, help="number of layers")
    parser.add_argument("--steps", type=int, default=24000, help="training steps")
    parser.add_argument("--batch-size", type=int, default=32, help="pairs or sentences per step")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    args = parser.parse_args(argv)
    pretrain(args)


if __name__ == "__main__":
    sys.exit(main())

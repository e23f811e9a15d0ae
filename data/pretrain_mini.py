"""Pretrain the built-in model "mini": an XLM-R in miniature, on made-up text in 15 languages.

    python data/pretrain_mini.py --out data/mini        # 35 minutes on 2 CPU cores

The text is that of data/mini.py, realized from random meanings; no label of mini-XNLI is used. As
in the real world, languages are unequal: of the sentences that English has, Arabic has a quarter
and Swahili an eighth. What is learned, in one model from random weights:

    MLM   masked language modelling, on one sentence (Devlin et al. 2019)
    TLM   translation language modelling: a sentence beside its translation, a quarter of *one* side
          masked, so that each answer stands in the other language (Conneau and Lample 2019)
    TRTD  translation replaced-token detection: half of the translations differ from their original
          in one thing; for each token of both sides, was it changed? and for <s>, was any?
          (Chi et al. 2022, XLM-E, arXiv 2106.16138; there a small network proposes the changes)

One pair in four is in a single language: a copy, or a copy with a change. Copying is learned first,
and translating grows out of it.

Why TRTD: filling in blanks taught our small models to look a word up in the other sentence, but not
to notice that two sentences differ, and fine-tuning on 15,000 pairs was too little to learn that
from nothing. XLM-R has 2.5 terabytes of text to learn it from.

Small batches: attention finds the other sentence after some thousands of steps, however many pairs
a step sees; 32 got there twice as soon, by the clock, as 128.

Written to --out: mini.pt (float16 weights and the tokenizer inside) and pretrain.json (how it was
made and the learning curve).
"""

import argparse
import io
import os
import random
import statistics
import sys
import time
from dataclasses import replace

if __package__ in (None, ""):  # run as a script: put the repository root on the path
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import checkpoint_payload, save_atomically
from data import exit_status, mini
from data.tokenizer import BOS, EOS, PAD, Tokenizer
from loop import Progress, clip_gradients, learning_rate, make_optimizers
from model import PRESETS, Model, build_model
from report import write_json
from train import check_folder, hardware

SHARES = dict.fromkeys(("en", "de", "fr", "es", "ru", "zh"), 1.0)
SHARES |= dict.fromkeys(("ar", "bg", "el", "tr", "vi"), 1 / 4)
SHARES |= dict.fromkeys(("hi", "sw", "th", "ur"), 1 / 8)
TOKEN_WEIGHT = 5  # of TRTD's loss: few tokens are changed, so it is small
SMOOTHING = 0.3  # languages are drawn in proportion to size ** 0.3, as XLM-R's were
TLM_MASKED, MLM_MASKED = 0.25, 0.15
SAME = 0.25  # of the pairs are in one language (and one in 14 of the others, by chance)
PAIRS = 0.8  # of the steps; the others see single sentences
DRAW = 8  # batches drawn at once and sorted by length: less padding


class Corpus:
    """All sentences as one flat array of ids, each original beside its near miss.

    Sentence s is ids[starts[s] : starts[s + 1]]; [low[s], high[s]) is what its counterpart hasn't.
    first[language] + 2 * meaning is an original, the number after it its near miss.
    """

    def __init__(self, meanings: list[mini.Meaning], misses: list[mini.Meaning]):
        self.texts, self.first, self.sizes = [], {}, {}
        for language, share in SHARES.items():
            self.first[language] = len(self.texts)
            self.sizes[language] = round(share * len(meanings))
            for meaning, miss in zip(meanings[: self.sizes[language]], misses, strict=False):
                self.texts += [mini.realize(meaning, language), mini.realize(miss, language)]

    def encode(self, tokenizer: Tokenizer) -> None:
        rows = [ids[1:-1] for ids in tokenizer.encode_batch(self.texts)]  # without <s> and </s>
        self.ids = np.concatenate(rows).astype(np.int64)
        self.lengths = np.array([len(row) for row in rows])
        self.starts = np.concatenate(([0], np.cumsum(self.lengths)))
        self.low, self.high = np.zeros_like(self.lengths), np.zeros_like(self.lengths)
        for s in range(0, len(rows), 2):
            one, other = rows[s], rows[s + 1]
            shorter = min(len(one), len(other))
            same = one[:shorter] == other[:shorter]
            head = shorter if same.all() else int(same.argmin())
            same = one[::-1][: shorter - head] == other[::-1][: shorter - head]
            tail = shorter - head if same.all() else int(same.argmin())
            self.low[s : s + 2] = head
            self.high[s], self.high[s + 1] = len(one) - tail, len(other) - tail


def train_tokenizer(texts: list[str], pieces: int) -> bytes:
    """A SentencePiece model in XLM-R's id layout, the same for the same texts.

    BPE, since unigram models of so little text cut its most frequent words into pieces.
    """
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=file,
        vocab_size=pieces,
        model_type="bpe",
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc",  # as XLM-R's
        num_threads=1,
        minloglevel=2,
    )
    return file.getvalue()


class Batches:
    """Endless training batches; a function of corpus and seed."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, batch_size: int, seed: int):
        self.corpus, self.mask_id, self.batch_size = corpus, tokenizer.mask_id, batch_size
        self.rng = np.random.default_rng(seed)
        self.languages = list(SHARES)
        self.first = np.array([corpus.first[x] for x in self.languages])
        self.sizes = np.array([corpus.sizes[x] for x in self.languages])
        weights = self.sizes**SMOOTHING
        self.weights = weights / weights.sum()

    def __iter__(self):
        while True:
            pairs = self.rng.random() < PAIRS
            count = self.batch_size * DRAW
            one = self.rng.choice(len(self.languages), count, p=self.weights)
            other = self.rng.choice(len(self.languages), count, p=self.weights)
            other = np.where(self.rng.random(count) < SAME, one, other)
            common = np.minimum(self.sizes[one], self.sizes[other]) if pairs else self.sizes[one]
            meaning = (self.rng.random(count) * common).astype(np.int64)
            missed = (self.rng.random(count) < 0.5) & pairs
            a = self.first[one] + 2 * meaning
            b = self.first[other] + 2 * meaning + missed
            swap = self.rng.random(count) < 0.5  # the near miss stands left or right
            a, b = (np.where(swap, b, a), np.where(swap, a, b)) if pairs else (a, None)
            lengths = self.corpus.lengths[a] + (self.corpus.lengths[b] if pairs else 0)
            order = np.argsort(lengths, kind="stable").reshape(DRAW, self.batch_size)
            for rows in self.rng.permutation(order):
                yield self.batch(a[rows], b[rows] if pairs else None, missed[rows])

    def batch(self, a: np.ndarray, b: np.ndarray | None, missed: np.ndarray):
        """Sentence numbers -> (ids, mask, targets, changed): (B, T) each.

        targets: the id that was masked, or -1.  changed: 1 or 0, -1 where it isn't asked.
        """
        corpus = self.corpus
        parts = [(a, np.ones_like(a))]  # (sentences, column of their first token)
        ends = corpus.lengths[a] + 2
        if b is not None:
            parts.append((b, ends + 1))
            ends = ends + corpus.lengths[b] + 2
        columns = np.arange(ends.max())
        mask = columns < ends[:, None]
        ids = np.where(mask, EOS, PAD)
        ids[:, 0] = BOS
        changed = np.where(mask, 0, -1)
        masked_side = self.rng.integers(len(parts), size=(len(a), 1))
        hidden = np.zeros_like(mask)
        share = MLM_MASKED if b is None else TLM_MASKED
        drawn = self.rng.random(mask.shape) < share
        for side, (sentences, column) in enumerate(parts):
            place = columns - column[:, None]  # of each column in this sentence
            inside = (place >= 0) & (place < corpus.lengths[sentences][:, None])
            where = corpus.starts[sentences][:, None] + np.where(inside, place, 0)
            ids = np.where(inside, corpus.ids[where], ids)
            odd = (place >= corpus.low[sentences][:, None]) & (
                place < corpus.high[sentences][:, None]
            )
            changed = np.where(odd & missed[:, None], 1, changed)
            hidden |= inside & drawn & (masked_side == side)
        changed[:, 0] = missed
        targets = np.where(hidden, ids, -1)
        ids = np.where(hidden, self.mask_id, ids)
        changed = np.where(hidden | ~mask | (b is None), -1, changed)
        return tuple(map(torch.from_numpy, (ids, mask, targets, changed)))


class Detector(nn.Module):
    """Was this token changed? (B, T, C) -> (B, T). Thrown away after pretraining."""

    def __init__(self, size: int):
        super().__init__()
        self.dense, self.out = nn.Linear(size, size), nn.Linear(size, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out(F.gelu(self.dense(hidden)))[..., 0]


def losses(model: Model, detector: Detector, batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch, and what is worth looking at: shares of right answers, F1."""
    ids, mask, targets, changed = batch
    hidden = model.encoder(ids, None if mask.all() else mask, None, {})
    asked = targets >= 0  # the output matrix is multiplied where something was masked, only there
    wanted = targets[asked]
    logits = model.head(hidden[asked], model.encoder.embeddings.word)
    loss = F.cross_entropy(logits, wanted)
    right = (logits.argmax(dim=-1) == wanted).float().mean()
    if not (changed >= 0).any():
        return loss, {"mlm": loss.detach(), "mlm right": right}
    record = {"tlm": loss.detach(), "tlm right": right}
    guess = detector(hidden)
    asked = changed[:, 1:] >= 0
    tokens, truth = guess[:, 1:][asked], changed[:, 1:][asked].float()
    pair, pair_truth = guess[:, 0], changed[:, 0].float()
    loss = loss + TOKEN_WEIGHT * F.binary_cross_entropy_with_logits(tokens, truth)
    loss = loss + F.binary_cross_entropy_with_logits(pair, pair_truth)
    found = (tokens > 0).float()
    record["token F1"] = 2 * (found * truth).sum() / (found.sum() + truth.sum()).clamp(min=1)
    record["pair right"] = ((pair > 0) == (pair_truth > 0)).float().mean()
    return loss, record


def prepare_corpus(args: argparse.Namespace) -> tuple[Corpus, Tokenizer]:
    rng = random.Random(f"{args.seed} pretraining")
    meanings = mini.parallel_sentences(rng, args.meanings)
    corpus = Corpus(meanings, [mini.near_miss(rng, meaning) for meaning in meanings])
    tokenizer = Tokenizer(train_tokenizer(corpus.texts[::2], args.pieces))
    corpus.encode(tokenizer)
    return corpus, tokenizer


def pretrain(args: argparse.Namespace) -> None:
    begun = time.monotonic()
    check_folder(args.out)
    print("making sentences and vocabulary, half a minute")
    corpus, tokenizer = prepare_corpus(args)
    print(
        f"{len(corpus.texts) // 2:,} sentences in {len(SHARES)} languages, "
        f"{corpus.lengths.mean():.1f} pieces each; {tokenizer.vocab_size:,} ids",
        flush=True,
    )
    torch.manual_seed(args.seed)
    config = replace(
        PRESETS["mini"],
        vocab_size=tokenizer.vocab_size,
        hidden_size=args.hidden,
        num_layers=args.layers,
        ffn_size=4 * args.hidden,
        dropout=0.0,
    )
    model, detector = build_model(config), Detector(config.hidden_size)
    whole = nn.ModuleList((model, detector)).train()
    (optimizer,) = make_optimizers(whole, 0.01)
    progress, curve, recent = Progress("pretraining", args.steps), [], {}
    stream = iter(Batches(corpus, tokenizer, args.batch_size, args.seed))
    for step in range(1, args.steps + 1):
        batch = next(stream)
        lr = learning_rate(step - 1, args.steps, args.lr, 0.05)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, record = losses(model, detector, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip_gradients(whole, 1.0)
        optimizer.step()
        values = {name: value.item() for name, value in record.items()}
        progress.step({"loss": loss.item(), **values}, lr, int(batch[1].sum()))
        for name, value in values.items():
            recent.setdefault(name, []).append(value)
        if step % 500 == 0 or step == args.steps:
            means = {name: round(statistics.fmean(some), 4) for name, some in recent.items()}
            curve.append({"step": step, **means})
            recent = {}
            size = save(model, tokenizer, args.out)
    progress.close()
    record = {k: v for k, v in vars(args).items() if k != "out"}
    record |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": size,
        "seconds": round(time.monotonic() - begun),
        "hardware": hardware(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "curve": curve,
    }
    write_json(os.path.join(args.out, "pretrain.json"), record)
    print(f"wrote {args.out}/mini.pt ({size:,} bytes) and pretrain.json")


def save(model: Model, tokenizer: Tokenizer, folder: str) -> int:
    """mini.pt in float16: half the size, and fine-tuning moves a weight by more than it rounds."""
    payload = checkpoint_payload(model, tokenizer.bytes, made_by="data/pretrain_mini.py")
    payload["tensors"] = {name: tensor.half() for name, tensor in payload["tensors"].items()}
    return save_atomically(payload, os.path.join(folder, "mini.pt"))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Pretrain the built-in model from random weights, on made-up text.",
        epilog="example: python data/pretrain_mini.py --out data/mini",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", required=True, help="folder for mini.pt and pretrain.json")
    parser.add_argument("--seed", type=int, default=0, help="of text, weights and batches")
    parser.add_argument("--meanings", type=int, default=30000, help="sentences in English")
    parser.add_argument("--pieces", type=int, default=5000, help="of the SentencePiece model")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size, a multiple of 4")
    parser.add_argument("--layers", type=int, default=4, help="number of layers")
    parser.add_argument("--steps", type=int, default=24000, help="training steps")
    parser.add_argument("--batch-size", type=int, default=32, help="pairs or sentences a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return exit_status(lambda: pretrain(args))


if __name__ == "__main__":
    sys.exit(main())

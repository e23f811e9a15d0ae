"""Examples -> token ids -> batches, cut without a Python loop over samples and with little padding.

A Dataset holds all token ids of a split in one flat array, like a compressed sparse matrix. A batch is cut out of it
by one index computation and padded to its longest row. Rows of similar length share a batch: on XNLI's English
training set this leaves 2.5 % padding, where batches in file order have 53 %.

If every word has a tag (ATIS, SNIPS, XGLUE's NER and POS), the tags lie beside the ids: the tag's id at the first piece
of a word, IGNORE at its other pieces, the special tokens and the padding.

BERT has token types, 0 for the tokens of the first text and 1 for those of the second. One number per row says where
the second text begins. XLM-R has no types.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from data.files import Example, Sentence
from data.sentences import read_sentences
from data.slots import Names
from data.tasks import Task, languages_of, load, names_of
from data.tokenizer import PAD, Encoder
from kit.common import Progress, UserError

ENCODED = 20_000  # texts or pairs that are encoded at once
POOL = 50  # batches whose rows are sorted by length together: more gives less padding and shuffling
IGNORE = -100  # the tag of a token that has none; cross_entropy ignores it by default


@dataclass
class Dataset:
    """N encoded examples: row i is ids[starts[i] : starts[i + 1]]."""

    ids: np.ndarray  # (total tokens,) int32
    starts: np.ndarray  # (N + 1,) int64
    labels: np.ndarray | None  # (N,) int64; float32 in a regression; None if there are none
    tags: np.ndarray | None = None  # (total tokens,) int64
    slots: tuple[str, ...] = ()  # the names of the tags
    # (N,) int64: index of each row's first token of type 1, or the length of a row that has none.
    second: np.ndarray | None = None
    pad: int = PAD  # the id of padding
    pairs: bool = False  # whether a row has two texts
    cut: int = 0  # rows that were cut to the longest length
    lost: int = 0  # the tokens that they lost
    metrics: tuple[str, ...] = ("accuracy",)  # see data.tasks.Task
    # Of sentences without labels: if they are pairs, rows 0 .. N/2 - 1 are the first ones, the others their partners in
    # the same order. Their scores, (N/2,) float64, None for retrieval; the float32 model's vectors, (N, C).
    scores: np.ndarray | None = None
    reference: np.ndarray | None = None
    epoch: tuple | None = None  # (key, batches) of the epoch that training_batch drew last

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of all arrays and the names of the tags."""
        labels = self.scores if self.labels is None else self.labels
        parts = (self.ids, self.starts, labels, self.tags, self.second)
        each = [part is not None and hashlib.sha256(part.tobytes()).hexdigest() for part in parts]
        return hashlib.sha256(repr((each, self.slots)).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.starts) - 1


@dataclass
class Batch:
    """ids (B, T) int64; mask (B, T) bool, None if nothing is padded; labels (B,) int64, or float32 in a regression,
    or None; tokens: the number of real ones; tags (B, T) int64, None if the task has none; types (B, T) int64, 1 in the second
    text and 0 elsewhere, None if the tokenizer has none.
    """

    ids: Tensor
    mask: Tensor | None
    labels: Tensor
    tokens: int
    tags: Tensor | None = None
    types: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, Tensor) and v.device.type != device.type}
        if device.type == "cuda":  # pinned memory is copied without a wait of the host
            tensors = {k: v.pin_memory() for k, v in tensors.items()}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in tensors.items()})

    def rows(self, rows: slice) -> "Batch":
        """Some rows, without the columns that only others need."""
        real = (torch.ones_like(self.ids, dtype=torch.bool) if self.mask is None else self.mask)[rows]
        length, tokens = int(real.sum(dim=1).max()), int(real.sum())
        mask = None if tokens == len(real) * length else real[:, :length]
        ids, tags, types = (x if x is None else x[rows, :length] for x in (self.ids, self.tags, self.types))
        labels = None if self.labels is None else self.labels[rows]
        return Batch(ids, mask, labels, tokens, tags, types)

    def sizes(self) -> dict[str, int]:
        """The number of rows, tagged words, tokens, and pairs of tokens of one row: what losses are means over."""
        B, T = self.ids.shape
        lengths = torch.full((B,), T) if self.mask is None else self.mask.sum(dim=1)
        words = 0 if self.tags is None else int((self.tags != IGNORE).sum())
        return {"rows": B, "words": words, "tokens": int(lengths.sum()), "pairs": int(lengths.square().sum())}


# --------------------------------------------------------------------------------------- encoding
def encode_split(
    task: Task, split: str, language: str, folder: str, tokenizer: Encoder, max_length: int, limit: int | None = None
) -> Dataset:
    """Load and encode a split in one language; at most `limit` examples, the same rows in every language. The labels
    of a joint task are intents, and it has tags.
    """
    examples = load(task, split, language, folder)
    if limit is not None and limit < len(examples):
        examples = draw(examples, limit, 1 if split == "train" else task.together)
    if task.head == "embedding":
        if examples[0].text_b is not None and len(examples) < 2:
            raise UserError(
                f"{task.name}: there is one {split} pair of {language}, which any model would find: use two or more"
            )
        return encode_unlabelled(examples, tokenizer, max_length)
    if task.head == "sequence":
        first, second, labels = zip(*examples, strict=True)
        labels = np.array(labels, dtype=np.float32 if isinstance(labels[0], float) else np.int64)
        dataset = encode_texts(tokenizer, first, None if second[0] is None else second, max_length, labels)
    else:
        dataset = encode_sentences(examples, names_of(task, folder), tokenizer, max_length, task.head == "token")
    return replace(dataset, pad=tokenizer.pad_id, metrics=task.metrics)


def encode_unlabelled(examples: list[Example], tokenizer: Encoder, max_length: int) -> Dataset:
    """Sentences, or all first ones of pairs and then all second ones, behind the model's prompt."""
    first, second, scores = zip(*examples, strict=True)
    pairs, scored = second[0] is not None, scores[0] is not None
    if len(tokenizer.encode(tokenizer.prompt)) >= max_length:
        raise UserError(
            f"the prompt, {tokenizer.prompt[:40]!r} ..., leaves no room for a sentence in {max_length} tokens"
        )
    texts = [tokenizer.prompt + text for text in (*first, *(second if pairs else ()))]
    metric = "spearman" if scored else "retrieval" if pairs else "cosine"
    found = dict(metrics=(metric,), scores=np.array(scores) if scored else None, pad=tokenizer.pad_id)
    return replace(encode_texts(tokenizer, texts, None, max_length, None), **found)


def encode_file(path: str, pairs: bool, tokenizer: Encoder, max_length: int) -> Dataset:
    """The rows of --calibration: a text per line, or two by a tab where the task reads pairs."""
    if not os.path.isfile(path):
        raise UserError(f"--calibration: no file {path}")
    rows = [example.text_a.split("\t") for example in read_sentences(path)]
    if {len(row) for row in rows} not in ({1}, {2} if pairs else {1}):
        raise UserError(f"--calibration {path}: write one text per line{', or two by a tab in each' * pairs}")
    first, *second = zip(*rows, strict=True)
    first = [tokenizer.prompt + text for text in first]
    dataset = encode_texts(tokenizer, first, second[0] if second else None, max_length, None)
    return replace(dataset, pad=tokenizer.pad_id)


def encode_texts(
    tokenizer: Encoder, first: Sequence[str], second: Sequence[str] | None, max_length: int, labels: np.ndarray | None
) -> Dataset:
    """Texts or pairs -> Dataset, with token types if the tokenizer has them. In parts: Python's lists of ids take ten
    times the memory of arrays.
    """
    rows, begins, lost, progress = [], [], [], Progress("encoding", len(first))
    for begin in range(0, len(first), ENCODED):
        part = slice(begin, begin + ENCODED)
        pair = first[part], None if second is None else second[part]
        encoded, of_second = tokenizer.encode_typed(*pair, max_length)
        full = [i for i, row in enumerate(encoded) if len(row) == max_length]  # encoded again, whole
        whole = tokenizer.encode_batch(*(each and [each[i] for i in full] for each in pair)) if full else []
        lost += [len(row) - max_length for row in whole if len(row) > max_length]
        rows += encoded
        begins.append(of_second)
        progress.update(begin + len(encoded))
    progress.clear()
    types = np.concatenate(begins) if tokenizer.typed else None
    return replace(dataset_of(rows, labels), second=types, pairs=second is not None, cut=len(lost), lost=sum(lost))


def cut_note(datasets: list[Dataset], of: str, max_length: int) -> str:
    """A note on truncated rows; "" if there are none."""
    rows, cut, lost = (sum(map(each, datasets)) for each in (len, lambda x: x.cut, lambda x: x.lost))
    share = 100 * lost / max(lost + cut * max_length, 1)
    what = f"{cut:,} of {rows:,} {of} are longer than {max_length} tokens and lose"
    return f"{what} {share:.0f} % of them" if cut else ""


def draw(examples: list, limit: int, size: int) -> list:
    """At most `limit` random examples in their order, in whole groups of `size` that follow each other. The seed is
    fixed: where languages are translations of each other, all get the same rows.
    """
    order = np.random.default_rng(0).permutation(len(examples) // size)
    chosen = np.sort(order[: max(1, limit // size)])
    return [example for group in chosen for example in examples[group * size : (group + 1) * size]]


def encode_sentences(
    sentences: list[Sentence], names: Names, tokenizer: Encoder, max_length: int | None, cuts: bool = False
) -> Dataset:
    """Words with tags -> Dataset: labels are ids of names.intents, tags are ids of names.slots. cuts: whether a long
    sentence becomes several rows; else it is refused.
    """
    intents = {name: i for i, name in enumerate(names.intents)}
    slots = {name: i for i, name in enumerate(names.slots)}
    encoded = tokenizer.encode_words([sentence.words for sentence in sentences], None if cuts else max_length)
    if cuts:
        encoded, sentences = cut_long(encoded, sentences, max_length)
    tags = [np.full(len(ids), IGNORE, dtype=np.int64) for ids, _ in encoded]
    for row, (_, first), sentence in zip(tags, encoded, sentences, strict=True):
        row[first] = [slots[tag] for tag in sentence.tags]
    dataset = dataset_of([ids for ids, _ in encoded], [intents[sentence.intent] for sentence in sentences])
    return replace(dataset, tags=np.concatenate(tags), slots=names.slots)


def cut_long(
    encoded: list[tuple[np.ndarray, np.ndarray]], sentences: list[Sentence], max_length: int
) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[Sentence]]:
    """Sentences of more tokens than a row may have, cut between words into several rows, so that every tag counts."""
    rows, parts = [], []
    for (ids, first), sentence in zip(encoded, sentences, strict=True):
        begin, ends = 0, np.append(first[1:], len(ids) - 1)  # of each word's pieces
        while begin < len(first):
            room = first[begin] + max_length - 2
            end = max(begin + 1, int(np.searchsorted(ends, room, side="right")))
            inner = ids[first[begin] : min(ends[end - 1], room)]  # a word longer than a row loses its end
            rows.append((np.concatenate((ids[:1], inner, ids[-1:])), first[begin:end] - first[begin] + 1))
            parts.append(Sentence(sentence.words[begin:end], sentence.tags[begin:end], sentence.intent))
            begin = end
    return rows, parts


def dataset_of(encoded: list[np.ndarray], labels: Sequence[int] | None) -> Dataset:
    """Rows of ids -> Dataset."""
    starts = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return Dataset(np.concatenate(encoded), starts, None if labels is None else np.asarray(labels))


# ---------------------------------------------------------------------------------------- batches
def collate(dataset: Dataset, rows: np.ndarray) -> Batch:
    """The given rows, cut out of the flat array and padded to the longest of them.

    Two rows, ids [5, 6, 7, 8] with second 2 and [5, 9] with second 2 (its length: one text), give ids [[5, 6, 7, 8],
    [5, 9, pad, pad]] and types [[0, 0, 1, 1], [0, 0, 0, 0]].
    """
    lengths = dataset.lengths[rows]
    columns = np.arange(lengths.max())
    real = columns < lengths[:, None]  # (B, T)
    where = np.minimum(dataset.starts[rows][:, None] + columns, len(dataset.ids) - 1)
    ids = np.where(real, dataset.ids[where], dataset.pad).astype(np.int64)
    mask = None if real.all() else torch.from_numpy(real)
    labels = None if dataset.labels is None else torch.from_numpy(dataset.labels[rows])
    tags = None if dataset.tags is None else torch.from_numpy(np.where(real, dataset.tags[where], IGNORE))
    types = None
    if dataset.second is not None:  # padding has type 0
        types = torch.from_numpy((real & (columns >= dataset.second[rows][:, None])).astype(np.int64))
    return Batch(torch.from_numpy(ids), mask, labels, int(lengths.sum()), tags, types)


def in_parts(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def training_order(dataset: Dataset, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The rows of every batch of an epoch: shuffled, then sorted by length within pools of batches.

    A function of (seed, epoch) alone, so that a resumed run gets the same batches.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(dataset))
    batches = []
    for pool in in_parts(order, batch_size * POOL):
        batches += in_parts(pool[np.argsort(dataset.lengths[pool], kind="stable")], batch_size)
    return [batches[i] for i in rng.permutation(len(batches))]


def training_batch(dataset: Dataset, batch_size: int, seed: int, step: int) -> Batch:
    """The batch of a training step counted from 0."""
    epoch, index = divmod(step, -(-len(dataset) // batch_size))
    key = (batch_size, seed, epoch)
    if dataset.epoch is None or dataset.epoch[0] != key:
        dataset.epoch = key, training_order(dataset, *key)
    return collate(dataset, dataset.epoch[1][index])


def evaluation_order(dataset: Dataset) -> np.ndarray:
    """The rows in the order of evaluation_batches: longest first."""
    return np.argsort(-dataset.lengths, kind="stable")


def evaluation_batches(dataset: Dataset, max_tokens: int, order: np.ndarray | None = None) -> Iterator[Batch]:
    """All rows once, longest first, or those of `order`; as many per batch as fit into max_tokens with their padding."""
    order, start = evaluation_order(dataset) if order is None else order, 0
    while start < len(order):
        count = max(1, max_tokens // int(dataset.lengths[order[start]]))
        yield collate(dataset, order[start : start + count])
        start += count


def facts(
    train: Dataset, dev: Dataset, tests: dict[str, Dataset], task: Task, folder: str, names: Sequence[str], length: int
) -> list[str]:
    """What a run trains on, line by line: rows and classes, languages that are left aside, and texts that lose their
    ends.  names: of the classes.  length: where texts are cut.
    """
    rows = sum(map(len, tests.values()))
    what = "sentences" if train.labels is None else "examples"
    lines = [f"{len(train):,} training {what}, {rows:,} test {what} in {len(tests)} sets"]
    if len(names) > 1:
        labels = train.labels if task.head != "token" else train.tags[train.tags != IGNORE]
        counts = sorted(zip(np.bincount(labels, minlength=len(names)).tolist(), names, strict=True), reverse=True)
        more = f", and {len(counts) - 12} more" if counts[12:] else ""
        lines.append("classes: " + ", ".join(f"{name} {count:,}" for count, name in counts[:12]) + more)
        folded = Counter(map(str.casefold, names))
        if alike := [name for name in names if folded[name.casefold()] > 1]:
            lines.append(f"NOTE: {', '.join(alike[:12])} differ only in capitals, and are different classes")
    others = languages_of(task, folder, "train") if task.languages is None else ()
    aside = [f"{name} {len(load(task, 'train', name, folder)):,}" for name in others if name != task.train_language]
    if aside:
        how = f"trained on {task.train_language} (--train-language)"
        lines.append(f"{how}; rows of train left aside: {', '.join(aside)}")
    for name, sets in (("train", [train]), ("dev", [dev]), ("test", [*tests.values()])):
        if note := cut_note(sets, f"{name} texts", length):
            lines.append(f"NOTE: {note} (--max-length)")
    return lines


def unpadded_batches(dataset: Dataset, examples: int, batch_size: int, seed: int) -> list[Batch]:
    """Batches of rows of equal length, for calibration, where padding would be observed as well."""
    rows = np.random.default_rng(seed).permutation(len(dataset))[:examples]
    lengths = dataset.lengths[rows]
    same = (in_parts(rows[lengths == length], batch_size) for length in np.unique(lengths))
    return [collate(dataset, each) for each in chain(*same)]

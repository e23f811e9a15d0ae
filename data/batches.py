"""Examples -> token ids -> batches, without a Python loop over samples and with little padding.

A Dataset holds all token ids of a split in one flat array, as a compressed sparse matrix would. A
batch is cut out of it by one index computation, and padded to its own longest row. Rows of similar
length go into one batch: on XNLI's English training text this leaves 2.5 % padding, where batches
in file order have 53 %.

Where every word has a tag (ATIS, SNIPS), tags lie beside the ids, one for each token: the tag's id
at a word's first piece, IGNORE at its other pieces, the special tokens and the padding.

BERT tells its two texts apart by a type, 0 for every token of the first and 1 for every token of
the second. One number a row is enough to keep: where the second text begins. XLM-R has no types.

Encodings are cached under .cache/; the key holds task, split, language, length, tokenizer and the
data files' state.
"""

import hashlib
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data import UserError
from data.slots import Names, Sentence
from data.tasks import find_task, load, task_folder
from data.tokenizer import PAD, Tokenizer, WordPieceTokenizer, WordTokenizer

CACHE_DIR = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), ".cache")
# Rows of so many batches are sorted by length together: more means less padding, less shuffling.
POOL = 50
IGNORE = -100  # instead of a tag where there is none; cross_entropy leaves it out by default


@dataclass
class Dataset:
    """N encoded examples: row i is ids[starts[i] : starts[i + 1]]."""

    ids: np.ndarray  # (total tokens,) int32
    starts: np.ndarray  # (N + 1,) int64
    labels: np.ndarray  # (N,) int64; float32 where the task is a regression
    tags: np.ndarray | None = None  # (total tokens,) int64
    slots: tuple[str, ...] = ()  # what the tags mean
    # (N,) int64: where each row's first token of type 1 is, or the row's length if it has none.
    second: np.ndarray | None = None
    pad: int = PAD  # the id that fills a batch up
    metrics: tuple[str, ...] = ("accuracy",)  # what predictions are scored by (data/metrics.py)

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class Batch:
    """ids (B, T) int64; mask (B, T) bool, None if nothing is padded; labels (B,) int64, or float32
    for a regression; tokens: the real ones; tags (B, T) int64, None if the task has none; types
    (B, T) int64, 1 in the second text and 0 elsewhere, None if the tokenizer has none.
    """

    ids: Tensor
    mask: Tensor | None
    labels: Tensor
    tokens: int
    tags: Tensor | None = None
    types: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        mask = None if self.mask is None else self.mask.to(device)
        tags = None if self.tags is None else self.tags.to(device)
        types = None if self.types is None else self.types.to(device)
        return Batch(self.ids.to(device), mask, self.labels.to(device), self.tokens, tags, types)


# --------------------------------------------------------------------------------------- encoding
def encode_split(
    task: str,
    split: str,
    language: str,
    folder: str,
    tokenizer: Tokenizer | WordPieceTokenizer | WordTokenizer,
    max_length: int,
    limit: int | None = None,
) -> Dataset:
    """Load and encode one split in one language; `limit` examples of it, drawn the same way for
    every language. A joint task's labels are intents, and it has tags.
    """
    path = cache_path(task, split, language, folder, tokenizer, max_length, limit)
    dataset = read_cache(path)
    if dataset is None:
        dataset = encode_examples(task, split, language, folder, tokenizer, max_length, limit)
        write_cache(path, dataset)
    return replace(dataset, pad=tokenizer.pad_id, metrics=find_task(task).metrics)


def encode_examples(
    task: str,
    split: str,
    language: str,
    folder: str,
    tokenizer: Tokenizer | WordPieceTokenizer | WordTokenizer,
    max_length: int,
    limit: int | None,
) -> Dataset:
    """What encode_split() caches."""
    row = find_task(task)
    examples = load(task, split, language, folder)
    if limit is not None and limit < len(examples):
        # Drawn with a fixed seed: XNLI's rows come in triples of one premise, so the first rows are
        # no sample, and the languages are translations of each other, so the same rows are compared
        # everywhere.
        rows = np.sort(np.random.default_rng(0).permutation(len(examples))[:limit])
        examples = [examples[i] for i in rows]
    if row.names is not None:
        return encode_sentences(examples, row.names(folder), tokenizer, max_length)
    first = [example.text_a for example in examples]
    second = None if examples[0].text_b is None else [example.text_b for example in examples]
    kind = np.float32 if row.regression else np.int64
    labels = np.array([example.label for example in examples], dtype=kind)
    if not tokenizer.typed:
        return dataset_of(tokenizer.encode_batch(first, second, max_length), labels)
    encoded, begins = tokenizer.encode_typed(first, second, max_length)
    return replace(dataset_of(encoded, labels), second=np.asarray(begins, dtype=np.int64))


def encode_sentences(
    sentences: list[Sentence],
    names: Names,
    tokenizer: Tokenizer | WordPieceTokenizer | WordTokenizer,
    max_length: int | None,
) -> Dataset:
    """Words with tags -> Dataset: labels are ids of names.intents, tags are ids of names.slots."""
    intents = {name: i for i, name in enumerate(names.intents)}
    slots = {name: i for i, name in enumerate(names.slots)}
    encoded = tokenizer.encode_words([sentence.words for sentence in sentences], max_length)
    tags = []
    for (ids, first), sentence in zip(encoded, sentences, strict=True):
        row = np.full(len(ids), IGNORE, dtype=np.int64)
        row[first] = [slots[tag] for tag in sentence.tags]
        tags.append(row)
    labels = [intents[sentence.intent] for sentence in sentences]
    return dataset_of([ids for ids, _ in encoded], labels, tags)


def dataset_of(
    encoded: list[np.ndarray],
    labels: list[int] | np.ndarray,
    tags: list[np.ndarray] | None = None,
) -> Dataset:
    """Rows of ids -> Dataset. Labels in a list are ids; an array keeps its type."""
    starts = np.concatenate(([0], np.cumsum([len(row) for row in encoded]))).astype(np.int64)
    return Dataset(
        np.concatenate(encoded),
        starts,
        labels if isinstance(labels, np.ndarray) else np.array(labels, dtype=np.int64),
        None if tags is None else np.concatenate(tags),
    )


def cache_path(task, split, language, folder, tokenizer, max_length, limit) -> str | None:
    """Where this encoding is cached. None if a data file is missing: load() will say so."""
    row = find_task(task)
    folder = os.path.abspath(task_folder(row, folder))
    if not os.path.isfile(os.path.join(folder, *row.files[split].split("/"))):
        return None
    # A joint task's ids depend on the names in every split's files.
    splits = (split,) if row.names is None else tuple(row.files)
    names = [name for each in splits for name in row.paths(each)]
    sources = [os.path.join(folder, *name.split("/")) for name in names]
    key = (task, split, language, [(source, file_state(source)) for source in sources])
    key += (tokenizer.sha256, max_length, limit)
    if tokenizer.typed:  # said only here, so that older caches keep their names
        key += ("typed",)
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:24]
    return os.path.join(CACHE_DIR, f"{task}-{split}-{language}-{name}.npz")


def file_state(path: str) -> tuple[int, int] | None:
    """What changes when a file does: its size and time. None if there is no file."""
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns


def read_cache(path: str | None) -> Dataset | None:
    if path is None or not os.path.exists(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            tags = file["tags"] if "tags" in file else None
            second = file["second"] if "second" in file else None
            dataset = Dataset(file["ids"], file["starts"], file["labels"], tags, second=second)
        sound = len(dataset.starts) == len(dataset) + 1 and dataset.starts[-1] == len(dataset.ids)
        sound = sound and (tags is None or len(tags) == len(dataset.ids))
        sound = sound and (second is None or len(second) == len(dataset))
        return dataset if sound else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # a damaged cache is made again


def write_cache(path: str | None, dataset: Dataset) -> None:
    if path is None:
        return
    temporary = f"{path}.{os.getpid()}.part"
    arrays = {"ids": dataset.ids, "starts": dataset.starts, "labels": dataset.labels}
    if dataset.tags is not None:
        arrays["tags"] = dataset.tags
    if dataset.second is not None:
        arrays["second"] = dataset.second
    try:
        os.makedirs(CACHE_DIR, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except OSError:  # a read-only checkout works too, only slower the next time
        if os.path.exists(temporary):
            os.unlink(temporary)


# ---------------------------------------------------------------------------------------- batches
def collate(dataset: Dataset, rows: np.ndarray) -> Batch:
    """Cut the given rows out of the flat array and pad them to the longest of them.

    Two rows, ids [5, 6, 7, 8] with second 2 and [5, 9] with second 2 (its length: one text), give
    ids [[5, 6, 7, 8], [5, 9, pad, pad]] and types [[0, 0, 1, 1], [0, 0, 0, 0]].
    """
    lengths = dataset.lengths[rows]
    columns = np.arange(lengths.max())
    real = columns < lengths[:, None]  # (B, T)
    where = np.minimum(dataset.starts[rows][:, None] + columns, len(dataset.ids) - 1)
    ids = np.where(real, dataset.ids[where], dataset.pad).astype(np.int64)
    mask = None if real.all() else torch.from_numpy(real)
    labels = torch.from_numpy(dataset.labels[rows])
    tags = None
    if dataset.tags is not None:
        tags = torch.from_numpy(np.where(real, dataset.tags[where], IGNORE))
    types = None
    if dataset.second is not None:  # padding has type 0
        types = torch.from_numpy(
            (real & (columns >= dataset.second[rows][:, None])).astype(np.int64)
        )
    return Batch(torch.from_numpy(ids), mask, labels, int(lengths.sum()), tags, types)


def training_order(dataset: Dataset, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The rows of every batch of one epoch: shuffled, then sorted by length within pools of 50
    batches.

    A function of (seed, epoch) alone, so that a resumed run sees the same batches.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(dataset))
    pool = batch_size * POOL
    batches = []
    for start in range(0, len(order), pool):
        rows = order[start : start + pool]
        rows = rows[np.argsort(dataset.lengths[rows], kind="stable")]
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def evaluation_batches(dataset: Dataset, max_tokens: int) -> Iterator[Batch]:
    """All rows once, longest first, as many in a batch as fit into max_tokens with their padding."""
    order = np.argsort(-dataset.lengths, kind="stable")
    start = 0
    while start < len(order):
        count = max(1, max_tokens // int(dataset.lengths[order[start]]))
        yield collate(dataset, order[start : start + count])
        start += count


def unpadded_batches(dataset: Dataset, examples: int, batch_size: int, seed: int) -> list[Batch]:
    """Batches of rows of equal length: for calibration, where padding would be observed as well."""
    if examples < 1:
        raise UserError("calibration needs at least one example")
    rows = np.random.default_rng(seed).permutation(len(dataset))[:examples]
    lengths = dataset.lengths[rows]
    batches = []
    for length in np.unique(lengths):
        same = rows[lengths == length]
        batches += [
            collate(dataset, same[i : i + batch_size]) for i in range(0, len(same), batch_size)
        ]
    return batches

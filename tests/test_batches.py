"""data/batches.py: encoding and batches. Tags and token types lie beside the ids."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FLIGHTS, SAMPLE
from test_glue import rows_of, write, write_all
from test_slots import write as write_sentences

from data.batches import (
    IGNORE,
    Dataset,
    collate,
    cut_note,
    encode_split,
    encode_texts,
    evaluation_batches,
    training_order,
    unpadded_batches,
)
from data.slots import read_sentences
from data.tasks import XNLI_LANGUAGES, find_task, load, read_xnli
from data.tokenizer import BOS, EOS, PAD, UNK, WordTokenizer
from kit.common import UserError


@pytest.fixture(autouse=True)
def nothing_remembered():
    read_sentences.cache_clear()
    read_xnli.cache_clear()


@pytest.fixture
def folder(tmp_path):
    target = tmp_path / "data"
    shutil.copytree(SAMPLE, target)
    return target


@pytest.fixture
def flights(tmp_path):
    target = tmp_path / "flights"
    shutil.copytree(FLIGHTS, target)
    return target


@pytest.fixture(scope="module")
def words():
    return WordTokenizer.build(s.words for s in load(find_task("atis"), "train", "en", FLIGHTS))


# ----------------------------------------------------------------------------------------- encoding
class TypedTokenizer:
    """Letters are tokens: [CLS] a [SEP] b [SEP], as BERT has it."""

    typed, pad_id, sha256, vocab_size = True, 7, "0" * 64, 1 << 20

    def encode_typed(self, a, b, max_length):
        rows = [
            [101, *map(ord, left), 102, *([] if b is None else [*map(ord, b[i]), 102])][:max_length]
            for i, left in enumerate(a)
        ]
        second = [min(len(left) + 2, len(row)) for left, row in zip(a, rows, strict=True)]
        return [np.array(row, dtype=np.int32) for row in rows], np.array(second)


def test_types_are_encoded(folder):
    first = encode_split(find_task("xnli"), "dev", "en", str(folder), TypedTokenizer(), 200)
    for i, example in enumerate(load(find_task("xnli"), "dev", "en", str(folder))):
        row = first.ids[first.starts[i] : first.starts[i + 1]].tolist()
        assert bytes(row[1 : first.second[i] - 1]).decode() == example.text_a
        assert bytes(row[first.second[i] : -1]).decode() == example.text_b
    assert first.pad == 7 and first.second.dtype == np.int64 and first.metrics == ("accuracy",) and first.pairs


def test_labels_of_a_regression_are_numbers(tmp_path, tokenizer):
    for name in ("stsb", "mnli"):
        write_all(tmp_path, name)
    dataset = encode_split(find_task("stsb"), "test", "en", str(tmp_path), tokenizer, 32)
    assert dataset.labels.dtype == np.float32 and dataset.metrics == ("pearson", "spearman")
    expected = [e.label for e in load(find_task("stsb"), "test", "en", str(tmp_path))]
    assert dataset.labels.tolist() == expected
    encode_split(find_task("mnli"), "dev", "matched", str(tmp_path), tokenizer, 32)
    first = encode_split(find_task("mnli"), "test", "mismatched", str(tmp_path), tokenizer, 32)
    assert first.labels.dtype == np.int64 and first.metrics == ("accuracy",)
    rows = rows_of("mnli", 9, start=1100)
    write(tmp_path / "MNLI", "mnli", "dev_mismatched.tsv", rows)  # this file alone is another
    assert len(first) == 6
    assert len(encode_split(find_task("mnli"), "test", "mismatched", str(tmp_path), tokenizer, 32)) == 9


@pytest.mark.parametrize("pairs", [False, True])
def test_rows_that_lose_their_ends_are_counted(tokenizer, pairs):
    """One row is exactly as long as the limit: it loses nothing."""
    first = ["one two three " * count for count in (1, 5, 9, 30)]
    second = first[::-1] if pairs else None
    whole = [len(row) for row in tokenizer.encode_batch(first, second)]
    for longest in (min(whole), sorted(whole)[1], max(whole), max(whole) + 1):
        dataset = encode_texts(tokenizer, first, second, longest, np.zeros(4, dtype=np.int64))
        assert dataset.cut == sum(length > longest for length in whole)
        assert dataset.lost == sum(max(length - longest, 0) for length in whole) == sum(whole) - len(dataset.ids)
        note = cut_note([dataset, dataset], "texts", longest)
        share = 100 * dataset.lost / max(1, sum(length for length in whole if length > longest))
        expected = f"{2 * dataset.cut} of 8 texts are longer than {longest} tokens and lose {share:.0f} % of them"
        assert note == (expected if dataset.cut else "")


def test_digest_of_a_dataset_is_that_of_all_that_is_read():
    def make(**parts):
        return Dataset(**{"ids": np.arange(4), "starts": np.array([0, 2, 4]), "labels": np.array([0, 1])} | parts)

    others = dict(ids=np.arange(1, 5), starts=np.array([0, 1, 4]), labels=np.array([1, 0]), tags=np.zeros(4))
    others |= dict(second=np.array([1, 1]), slots=("O",))
    digests = [make().sha256, *(make(**{name: part}).sha256 for name, part in others.items())]
    assert len(set(digests)) == len(digests) and make().sha256 == make().sha256


def test_limit_takes_the_same_rows_in_every_language(folder, tokenizer):
    labels = {
        tuple(encode_split(find_task("xnli"), "dev", x, str(folder), tokenizer, 32, 2).labels) for x in XNLI_LANGUAGES
    }
    assert len(labels) == 1


@pytest.mark.parametrize("kind", ["words", "pieces"])
def test_encoded_tags_are_those_of_the_words(kind, words, tokenizer):
    tokenizer = words if kind == "words" else tokenizer
    names = find_task("atis").names(FLIGHTS)
    for split in ("train", "test"):
        sentences = load(find_task("atis"), split, "en", FLIGHTS)
        dataset = encode_split(find_task("atis"), split, "en", FLIGHTS, tokenizer, 128)
        assert dataset.tags.dtype == np.int64 and len(dataset) == len(sentences)
        for i, sentence in enumerate(sentences):
            part = slice(dataset.starts[i], dataset.starts[i + 1])
            ids, tags = dataset.ids[part], dataset.tags[part]
            expected = tokenizer.encode(" ".join(sentence.words))
            assert ids.tolist() == expected and tags[0] == tags[-1] == IGNORE
            assert [names.slots[tag] for tag in tags[tags != IGNORE]] == list(sentence.tags)
            assert names.intents[dataset.labels[i]] == sentence.intent
        assert dataset.slots == names.slots and dataset.metrics == ("accuracy", "slot_f1")
    assert (dataset.tags >= names.known_slots).sum() == 2  # "folding bicycle", only in test


def test_first_pieces_carry_the_tags(tmp_path, tokenizer):
    write_sentences(tmp_path, "train", ["the extraordinarily old"], ["O B-x I-x"], ["i"])
    dataset = encode_split(find_task("atis"), "train", "en", str(tmp_path), tokenizer, 64)
    counts = [len(tokenizer.encode(word)) - 2 for word in ("the", "extraordinarily", "old")]
    assert counts[1] > 1
    expected = [IGNORE]
    for tag, count in zip((0, 1, 2), counts, strict=True):
        expected += [tag] + [IGNORE] * (count - 1)
    assert dataset.tags.tolist() == [*expected, IGNORE]


def test_sentences_with_tags_are_never_cut(words, tokenizer):
    for each in (words, tokenizer):
        longest = encode_split(find_task("atis"), "train", "en", FLIGHTS, each, 128).lengths.max()
        assert encode_split(find_task("atis"), "train", "en", FLIGHTS, each, longest).lengths.max() == longest
        with pytest.raises(UserError, match=f"has {longest} tokens .* use --max-length {longest}"):
            encode_split(find_task("atis"), "train", "en", FLIGHTS, each, longest - 1)


# ------------------------------------------------------------------------------------------ batches
def make_dataset(lengths, with_tags=False):
    rng = np.random.default_rng(0)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    ids = rng.integers(4, 99, starts[-1], dtype=np.int32)
    tags = rng.choice([IGNORE, 0, 1, 2], starts[-1]) if with_tags else None
    return Dataset(ids, starts, rng.integers(0, 3, len(lengths)), tags)


def test_collate_by_brute_force():
    dataset = make_dataset([3, 7, 1, 5, 7])
    for rows in ([0], [1, 4], [2, 0, 3], [4, 3, 2, 1, 0]):
        batch = collate(dataset, np.array(rows))
        longest = max(dataset.lengths[rows])
        for i, row in enumerate(rows):
            ids = dataset.ids[dataset.starts[row] : dataset.starts[row + 1]].tolist()
            assert batch.ids[i].tolist() == ids + [1] * (longest - len(ids))
            if batch.mask is not None:
                assert batch.mask[i].tolist() == [True] * len(ids) + [False] * (longest - len(ids))
        assert (batch.mask is None) == (len({dataset.lengths[r] for r in rows}) == 1)
        assert batch.labels.tolist() == dataset.labels[rows].tolist()
        assert batch.tokens == dataset.lengths[rows].sum()
        assert batch.ids.dtype == torch.int64


def test_tags_and_padding_by_brute_force():
    dataset = make_dataset([3, 7, 2, 5, 7], with_tags=True)
    for rows in ([0], [1, 4], [2, 0, 3], [4, 3, 2, 1, 0]):
        batch = collate(dataset, np.array(rows))
        longest = max(dataset.lengths[rows])
        for i, row in enumerate(rows):
            part = slice(dataset.starts[row], dataset.starts[row + 1])
            ids, tags = dataset.ids[part].tolist(), dataset.tags[part].tolist()
            assert batch.ids[i].tolist() == ids + [PAD] * (longest - len(ids))
            assert batch.tags[i].tolist() == tags + [IGNORE] * (longest - len(ids))
        assert batch.tags.dtype == torch.int64
    moved = batch.to(torch.device("cpu"))
    assert (moved.tags == batch.tags).all() and (moved.ids == batch.ids).all()
    assert collate(make_dataset([3, 4]), np.array([0, 1])).tags is None


def test_types_and_padding_by_brute_force():
    plain = make_dataset([3, 7, 1, 5, 7])
    assert collate(plain, np.array([0, 1])).types is None
    second = np.array([3, 4, 1, 2, 7])  # rows 0, 2 and 4 are one text
    dataset = replace(plain, second=second, pad=0)
    for rows in ([0], [1, 4], [2, 0, 3], [4, 3, 2, 1, 0]):
        batch = collate(dataset, np.array(rows))
        longest = max(dataset.lengths[rows])
        for i, row in enumerate(rows):
            length = dataset.lengths[row]
            types = [0] * second[row] + [1] * (length - second[row]) + [0] * (longest - length)
            assert batch.types[i].tolist() == types
            ids = dataset.ids[dataset.starts[row] : dataset.starts[row + 1]].tolist()
            assert batch.ids[i].tolist() == ids + [0] * (longest - length)
        assert batch.types.dtype == torch.int64 and batch.types.shape == batch.ids.shape
        moved = batch.to(torch.device("cpu"))
        assert (moved.types == batch.types).all() and moved.tokens == batch.tokens


def test_every_row_once_an_epoch_and_little_padding():
    rng = np.random.default_rng(1)
    dataset = make_dataset(rng.integers(5, 100, 1003))
    first = training_order(dataset, 16, seed=0, epoch=0)
    assert sorted(np.concatenate(first).tolist()) == list(range(1003))
    again = training_order(dataset, 16, seed=0, epoch=0)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    other = training_order(dataset, 16, seed=0, epoch=1)
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(first, other, strict=False))
    padded = sum(dataset.lengths[rows].max() * len(rows) for rows in first)
    assert dataset.lengths.sum() / padded > 0.9
    order = list(evaluation_batches(dataset, 512))
    assert sum(len(batch.labels) for batch in order) == 1003
    assert all(batch.ids.numel() <= 512 for batch in order)


def test_every_tag_once_in_every_kind_of_batch(words):
    dataset = encode_split(find_task("atis"), "train", "en", FLIGHTS, words, 64)
    total = np.sort(dataset.tags[dataset.tags != IGNORE])
    kinds = (
        evaluation_batches(dataset, 200),
        [collate(dataset, rows) for rows in training_order(dataset, 16, 0, 0)],
        unpadded_batches(dataset, len(dataset), 16, 0),
    )
    for made in kinds:
        tags = torch.cat([batch.tags[batch.tags != IGNORE] for batch in made])
        assert (np.sort(tags.numpy()) == total).all()
    for batch in evaluation_batches(dataset, 200):
        special = (batch.ids == BOS) | (batch.ids == EOS) | (batch.ids == PAD)
        assert (special == (batch.tags == IGNORE)).all()
        assert (batch.ids == UNK).sum() < batch.tokens / 5


def test_samples_keep_the_hypotheses_of_a_premise_together(folder, tokenizer):
    """XNLI's dev and test have three rows per premise; every language gets the same rows."""
    rows = load(find_task("xnli"), "dev", "de", str(folder))
    assert all(len({example.text_a for example in rows[i : i + 3]}) == 1 for i in range(0, len(rows), 3))
    for language in ("de", "zh"):
        found = encode_split(find_task("xnli"), "dev", language, str(folder), tokenizer, 32, 3)
        assert sorted(found.labels.tolist()) == [0, 1, 2]

"""data/batches.py: encoding and batches. Tags and token types lie beside the ids."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FLIGHTS, SAMPLE
from test_glue import write_all
from test_slots import write as write_sentences

from data.batches import (
    IGNORE,
    Dataset,
    collate,
    cut_note,
    encode_split,
    encode_texts,
    evaluation_batches,
    training_batch,
    training_order,
    unpadded_batches,
)
from data.tasks import XNLI_LANGUAGES, find_task, load, names_of
from data.tokenizer import BOS, EOS, PAD, UNK, WordPieceTokenizer, WordTokenizer
from kit.common import UserError

XNLI, ATIS = find_task("xnli"), find_task("atis")


@pytest.fixture(scope="module")
def words():
    return WordTokenizer.build(s.words for s in load(ATIS, "train", "en", FLIGHTS))


# ----------------------------------------------------------------------------------------- encoding
def test_types_are_encoded():
    letters = [*map(chr, range(33, 127)), *(f"##{chr(i)}" for i in range(33, 127))]
    vocab = "\n".join(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *letters])
    typed = WordPieceTokenizer.from_vocab(vocab.encode(), lower=False)
    dataset = encode_split(XNLI, "dev", "en", SAMPLE, typed, 200)
    examples = load(XNLI, "dev", "en", SAMPLE)
    assert dataset.second.dtype == np.int64
    for row, second, example in zip(np.split(dataset.ids, dataset.starts[1:-1]), dataset.second, examples, strict=True):
        assert row[:second].tolist() == typed.encode(example.text_a)
        assert row[second:].tolist() == typed.encode(example.text_b)[1:]
    assert dataset.pad == 3 and dataset.metrics == ("accuracy",) and dataset.pairs


def test_labels_of_a_regression_are_numbers(tmp_path, tokenizer):
    task = find_task("stsb")
    write_all(tmp_path, "stsb")
    dataset = encode_split(task, "test", "en", str(tmp_path), tokenizer, 32)
    assert dataset.labels.dtype == np.float32 and dataset.metrics == ("pearson", "spearman")
    assert dataset.labels.tolist() == [example.label for example in load(task, "test", "en", str(tmp_path))]
    assert encode_split(XNLI, "dev", "en", SAMPLE, tokenizer, 32).labels.dtype == np.int64


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


def test_a_limit_takes_the_same_premises_in_every_language(tokenizer):
    """XNLI's dev and test have three rows per premise, which stay together; train has no such groups."""
    rows = load(XNLI, "dev", "de", SAMPLE)
    assert all(len({example.text_a for example in rows[i : i + 3]}) == 1 for i in range(0, len(rows), 3))
    for language in XNLI_LANGUAGES:
        assert sorted(encode_split(XNLI, "dev", language, SAMPLE, tokenizer, 32, 2).labels.tolist()) == [0, 1, 2]
    assert len(encode_split(XNLI, "train", "en", SAMPLE, tokenizer, 32, 7)) == 7


@pytest.mark.parametrize("kind", ["words", "pieces"])
def test_encoded_tags_are_those_of_the_words(kind, words, tokenizer):
    tokenizer = words if kind == "words" else tokenizer
    names = names_of(ATIS, FLIGHTS)
    for split in ("train", "test"):
        sentences = load(ATIS, split, "en", FLIGHTS)
        dataset = encode_split(ATIS, split, "en", FLIGHTS, tokenizer, 128)
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
    dataset = encode_split(ATIS, "train", "en", str(tmp_path), tokenizer, 64)
    counts = [len(tokenizer.encode(word)) - 2 for word in ("the", "extraordinarily", "old")]
    assert counts[1] > 1
    expected = [[tag] + [IGNORE] * (count - 1) for tag, count in enumerate(counts)]
    assert dataset.tags.tolist() == [IGNORE, *sum(expected, []), IGNORE]


def test_sentences_with_tags_are_never_cut(words, tokenizer):
    for each in (words, tokenizer):
        longest = encode_split(ATIS, "train", "en", FLIGHTS, each, 128).lengths.max()
        assert encode_split(ATIS, "train", "en", FLIGHTS, each, longest).lengths.max() == longest
        with pytest.raises(UserError, match=f"has {longest} tokens .* use --max-length {longest}"):
            encode_split(ATIS, "train", "en", FLIGHTS, each, longest - 1)


# ------------------------------------------------------------------------------------------ batches
def make_dataset(lengths, with_tags=False):
    rng = np.random.default_rng(0)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    ids = rng.integers(4, 99, starts[-1], dtype=np.int32)
    tags = rng.choice([IGNORE, 0, 1, 2], starts[-1]) if with_tags else None
    return Dataset(ids, starts, rng.integers(0, 3, len(lengths)), tags)


@pytest.mark.parametrize("rows", [[0], [1, 4], [2, 0, 3], [4, 3, 2, 1, 0]])
def test_padding_by_brute_force(rows):
    """Ids, mask, tags and token types; rows 0, 2 and 4 are one text. Parts of a batch are batches of their rows."""
    dataset = make_dataset([3, 7, 1, 5, 7], with_tags=True)
    dataset = replace(dataset, second=np.array([3, 4, 1, 2, 7]), pad=2)
    batch = collate(dataset, np.array(rows))
    for i, row in enumerate(rows):
        part, length = slice(dataset.starts[row], dataset.starts[row + 1]), dataset.lengths[row]
        padding, second = max(dataset.lengths[rows]) - length, dataset.second[row]
        assert batch.ids[i].tolist() == dataset.ids[part].tolist() + [2] * padding
        assert batch.tags[i].tolist() == dataset.tags[part].tolist() + [IGNORE] * padding
        assert batch.types[i].tolist() == [0] * second + [1] * (length - second) + [0] * padding
        if batch.mask is not None:
            assert batch.mask[i].tolist() == [True] * length + [False] * padding
    assert (batch.mask is None) == (len({dataset.lengths[r] for r in rows}) == 1)
    assert batch.labels.tolist() == dataset.labels[rows].tolist() and batch.tokens == dataset.lengths[rows].sum()
    assert {x.dtype for x in (batch.ids, batch.tags, batch.types)} == {torch.int64}
    lengths, words = dataset.lengths[rows], (batch.tags != IGNORE).sum()
    expected = {"rows": len(rows), "words": words, "tokens": lengths.sum(), "pairs": (lengths**2).sum()}
    assert batch.sizes() == expected
    for part in (slice(0, 1), slice(1, 3), slice(0, 9)):
        if rows[part]:
            for name, value in vars(collate(dataset, np.array(rows[part]))).items():
                found = getattr(batch.rows(part), name)
                assert type(found) is type(value) and (value is None or (torch.as_tensor(found == value)).all()), name
    moved = batch.to(torch.device("cpu"))
    assert (moved.types == batch.types).all() and moved.tokens == batch.tokens
    plain = collate(make_dataset([3, 4]), np.array([0, 1]))
    assert plain.tags is None and plain.types is None


def test_every_row_once_an_epoch_and_little_padding():
    rng = np.random.default_rng(1)
    dataset = make_dataset(rng.integers(5, 100, 1003))
    first = training_order(dataset, 16, seed=0, epoch=0)
    assert sorted(np.concatenate(first).tolist()) == list(range(1003))
    again = training_order(dataset, 16, seed=0, epoch=0)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    other = training_order(dataset, 16, seed=0, epoch=1)
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(first, other, strict=False))
    assert (training_batch(dataset, 16, 0, len(first) + 2).labels.numpy() == dataset.labels[other[2]]).all()
    assert (training_batch(dataset, 16, 0, 5).labels.numpy() == dataset.labels[first[5]]).all()
    padded = sum(dataset.lengths[rows].max() * len(rows) for rows in first)
    assert dataset.lengths.sum() / padded > 0.9
    order = list(evaluation_batches(dataset, 512))
    assert sum(len(batch.labels) for batch in order) == 1003
    assert all(batch.ids.numel() <= 512 for batch in order)


def test_every_tag_once_in_every_kind_of_batch(words):
    dataset = encode_split(ATIS, "train", "en", FLIGHTS, words, 64)
    total = np.sort(dataset.tags[dataset.tags != IGNORE])
    trained = (collate(dataset, rows) for rows in training_order(dataset, 16, 0, 0))
    for made in (evaluation_batches(dataset, 200), trained, unpadded_batches(dataset, len(dataset), 16, 0)):
        tags = torch.cat([batch.tags[batch.tags != IGNORE] for batch in made])
        assert (np.sort(tags.numpy()) == total).all()
    for batch in evaluation_batches(dataset, 200):
        special = (batch.ids == BOS) | (batch.ids == EOS) | (batch.ids == PAD)
        assert (special == (batch.tags == IGNORE)).all()
        assert (batch.ids == UNK).sum() < batch.tokens / 5

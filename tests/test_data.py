"""data/tasks.py and data/batches.py: reading, refusing, encoding, cutting batches."""

import hashlib
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SAMPLE

import data.batches as batches
from data import UserError
from data.batches import Dataset, collate, encode_split, evaluation_batches, training_order
from data.tasks import NLI_LABELS, XNLI_LANGUAGES, find_task, load, read_xnli


@pytest.fixture
def folder(tmp_path):
    target = tmp_path / "data"
    shutil.copytree(SAMPLE, target)
    read_xnli.cache_clear()
    return target


def test_reads_the_official_layout(folder):
    assert NLI_LABELS == ("entailment", "neutral", "contradiction")
    for language in XNLI_LANGUAGES:
        for split in ("dev", "test"):
            examples = load("xnli", split, language, str(folder))
            assert [e.label for e in examples] == [0, 1, 2]
    train = load("xnli", "train", "en", str(folder))
    assert len(train) == 180 and sorted({e.label for e in train}) == [0, 1, 2]
    # the training file spells it "contradictory"
    assert all(("does not" in e.text_b) == (e.label == 2) for e in train)


def rewrite(folder, split, change):
    path = folder.joinpath(*find_task("xnli").files[split].split("/"))
    lines = path.read_text(encoding="utf-8").split("\n")
    change(lines)
    path.write_text("\n".join(lines), encoding="utf-8")


def set_line(number, text):
    def change(lines):
        lines[number - 1] = text

    return change


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("en\tentailment\tonly three", "line 3: 3 columns, the header has 5"),
        ("en\tmaybe\ta\tb\t1", "line 3: unknown label 'maybe'"),
        ("xx\tneutral\ta\tb\t1", "line 3: unknown language 'xx'"),
        ("en\tneutral\ta\tb\t1\tmore", "line 3: 6 columns"),
    ],
)
def test_malformed_rows_are_named(folder, line, message):
    rewrite(folder, "dev", set_line(3, line))
    with pytest.raises(UserError) as error:
        load("xnli", "dev", "en", str(folder))
    assert message in str(error.value) and "xnli.dev.tsv" in str(error.value)


def test_missing_columns_files_and_languages(folder):
    rewrite(folder, "dev", set_line(1, "language\tlabel\tsentence1\tsentence2\tpromptID"))
    with pytest.raises(UserError, match="no column 'gold_label'"):
        load("xnli", "dev", "en", str(folder))
    rewrite(folder, "test", lambda lines: lines.__setitem__(slice(1, None), lines[1:4]))
    with pytest.raises(UserError, match="no test row in language 'sw'"):
        load("xnli", "test", "sw", str(folder))
    with pytest.raises(UserError, match="no language 'xx'"):
        load("xnli", "test", "xx", str(folder))
    with pytest.raises(UserError, match="fetch it with 'python data/fetch.py xnli'"):
        load("xnli", "train", "en", str(folder / "nowhere"))
    with pytest.raises(UserError, match="unknown task 'xnil'; known: xnli atis snips"):
        load("xnil", "train", "en", str(folder))


def test_an_empty_text_is_a_text(folder):
    """A published file with a blank cell must stay usable."""
    rewrite(folder, "dev", set_line(3, "en\tneutral\t\tb\t1"))
    assert "" in [e.text_a for e in load("xnli", "dev", "en", str(folder))]


def test_not_utf8(folder):
    path = folder / "XNLI-1.0" / "xnli.dev.tsv"
    path.write_bytes(path.read_bytes() + b"en\tneutral\t\xff\xfe\tb\t1\n")
    with pytest.raises(UserError, match="not UTF-8"):
        load("xnli", "dev", "en", str(folder))


def test_only_newlines_end_lines(folder):
    line = 'en\tneutral\tone\u2028still one "quote\x85\tb\t1'
    rewrite(folder, "dev", set_line(2, line))
    assert 'one\u2028still one "quote\x85' in [
        e.text_a for e in load("xnli", "dev", "en", str(folder))
    ]


def make_dataset(lengths):
    rng = np.random.default_rng(0)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    return Dataset(
        rng.integers(4, 99, starts[-1], dtype=np.int32), starts, rng.integers(0, 3, len(lengths))
    )


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


class TypedTokenizer:
    """Letters are tokens: [CLS] a [SEP] b [SEP], as BERT has it."""

    typed, pad_id, sha256 = True, 7, "0" * 64

    def encode_typed(self, a, b, max_length):
        rows = [
            [101, *map(ord, left), 102, *([] if b is None else [*map(ord, b[i]), 102])][:max_length]
            for i, left in enumerate(a)
        ]
        second = [min(len(left) + 2, len(row)) for left, row in zip(a, rows, strict=True)]
        return [np.array(row, dtype=np.int32) for row in rows], np.array(second)


def test_types_are_encoded_and_cached(folder, monkeypatch):
    def encode(length=200):
        return encode_split("xnli", "dev", "en", str(folder), TypedTokenizer(), length)

    first = encode()
    for i, example in enumerate(load("xnli", "dev", "en", str(folder))):
        row = first.ids[first.starts[i] : first.starts[i + 1]].tolist()
        assert bytes(row[1 : first.second[i] - 1]).decode() == example.text_a
        assert bytes(row[first.second[i] : -1]).decode() == example.text_b
    with monkeypatch.context() as patched:
        patched.setattr(batches, "load", lambda *args: pytest.fail("read again"))
        second = encode()
    for dataset in (first, second):
        assert dataset.pad == 7 and dataset.second.dtype == np.int64
        assert dataset.metrics == ("accuracy",)
    assert (first.ids == second.ids).all() and (first.second == second.second).all()
    (name,) = os.listdir(batches.CACHE_DIR)
    path = os.path.join(batches.CACHE_DIR, name)
    np.savez(path, ids=first.ids, starts=first.starts, labels=first.labels, second=first.second[1:])
    assert (encode().second == first.second).all()  # not as many as rows: made again


def test_caches_from_before_there_were_types_are_still_read(folder, tokenizer, monkeypatch):
    first = encode_split("xnli", "dev", "de", str(folder), tokenizer, 32)
    (name,) = os.listdir(batches.CACHE_DIR)
    path = folder.joinpath(*find_task("xnli").files["dev"].split("/"))
    state = os.stat(path)
    key = ("xnli", "dev", "de", [(str(path), (state.st_size, state.st_mtime_ns))])
    key += (tokenizer.sha256, 32, None)
    assert hashlib.sha256(repr(key).encode()).hexdigest()[:24] in name
    with np.load(os.path.join(batches.CACHE_DIR, name)) as file:
        assert set(file.files) == {"ids", "starts", "labels"}
    monkeypatch.setattr(batches, "load", lambda *args: pytest.fail("read again"))
    second = encode_split("xnli", "dev", "de", str(folder), tokenizer, 32)
    assert (first.ids == second.ids).all() and second.second is None
    assert second.pad == tokenizer.pad_id


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


def test_encoding_is_cached_and_a_damaged_cache_made_again(folder, tokenizer, monkeypatch):
    def encode():
        return encode_split("xnli", "dev", "de", str(folder), tokenizer, 32)

    first = encode()
    (name,) = os.listdir(batches.CACHE_DIR)
    with monkeypatch.context() as patched:
        patched.setattr(batches, "load", lambda *args: pytest.fail("read again"))
        second = encode()
    assert (first.ids == second.ids).all() and (first.starts == second.starts).all()
    path = os.path.join(batches.CACHE_DIR, name)
    with open(path, "wb") as file:
        file.write(b"damaged")
    third = encode()
    assert (first.ids == third.ids).all()


def test_cache_notices_changed_data_and_settings(folder, tokenizer):
    def encode(length=32, limit=None):
        return encode_split("xnli", "dev", "de", str(folder), tokenizer, length, limit)

    long = encode()
    assert encode(length=9).lengths.max() == 9 < long.lengths.max()
    assert len(encode(limit=2)) == 2
    read_xnli.cache_clear()
    rewrite(
        folder, "dev", lambda lines: lines.insert(1, "de\tneutral\tnoch ein Satz\tund einer\t1")
    )
    assert len(encode()) == len(long) + 1


def test_limit_takes_the_same_rows_in_every_language(folder, tokenizer):
    labels = {
        tuple(encode_split("xnli", "dev", x, str(folder), tokenizer, 32, 2).labels)
        for x in XNLI_LANGUAGES
    }
    assert len(labels) == 1

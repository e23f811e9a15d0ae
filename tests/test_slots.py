"""data/slots.py and what joint tasks need of the others: files, names, scores, tags beside the ids."""

import itertools
import os
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT

import data.batches as batches
from data import UserError
from data.batches import (
    IGNORE,
    Dataset,
    collate,
    encode_split,
    evaluation_batches,
    training_order,
    unpadded_batches,
)
from data.slots import Names, Sentence, read_names, read_sentences, slot_scores, spans
from data.tasks import find_task, load, task_folder
from data.tokenizer import BOS, EOS, PAD, UNK, WordTokenizer

SAMPLE = os.path.join(ROOT, "data", "atis-sample")
FETCH = "python data/fetch.py atis"


@pytest.fixture(autouse=True)
def nothing_remembered():
    read_sentences.cache_clear()


@pytest.fixture
def folder(tmp_path):
    target = tmp_path / "data"
    shutil.copytree(SAMPLE, target)
    return target


def write(folder, split, texts, tags, labels):
    (folder / split).mkdir(parents=True, exist_ok=True)
    for name, lines in (("seq.in", texts), ("seq.out", tags), ("label", labels)):
        text = "".join(f"{line}\n" for line in lines)
        (folder / split / name).write_text(text, encoding="utf-8", newline="\n")


# ---------------------------------------------------------------------------------------- reading
def test_reads_the_layout(tmp_path):
    # Several spaces, spaces at the end, Windows line ends and a missing last newline are harmless;
    # characters that str.splitlines() takes for a line end are ordinary.
    write(tmp_path, "train", ["to  new  york ", "a\u2028b c\r"], ["O B-to I-to", "O O B-x"], "pq")
    path = tmp_path / "train" / "seq.in"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert read_sentences(str(tmp_path), "train", FETCH) == [
        Sentence(("to", "new", "york"), ("O", "B-to", "I-to"), "p"),
        Sentence(("a", "b", "c"), ("O", "O", "B-x"), "q"),
    ]


def test_the_sample():
    counts = [len(load("atis", split, "en", SAMPLE)) for split in ("train", "dev", "test")]
    assert counts == [120, 30, 30]
    names = find_task("atis").names(SAMPLE)
    assert names.known_intents == 6 and "find_train#ask_fare" in names.intents
    assert names.slots[names.known_slots :] == ("B-extra", "I-extra")
    train = {word for sentence in load("atis", "train", "en", SAMPLE) for word in sentence.words}
    test = {word for sentence in load("atis", "test", "en", SAMPLE) for word in sentence.words}
    assert test - train and len(test & train) > 50
    size = sum(os.path.getsize(os.path.join(d, f)) for d, _, fs in os.walk(SAMPLE) for f in fs)
    assert size < 25_000


def test_where_the_files_may_be(folder):
    task = find_task("atis")
    assert task_folder(task, str(folder)) == str(folder)
    assert task_folder(task, str(folder.parent)) == str(folder.parent / "atis")  # to be named
    shutil.move(folder, folder.parent / "atis")
    assert task_folder(task, str(folder.parent)) == str(folder.parent / "atis")
    assert len(load("atis", "dev", "en", str(folder.parent))) == 30
    assert os.path.samefile(task_folder(find_task("xnli"), str(folder.parent)), folder.parent)


def refusal(folder, split="train"):
    with pytest.raises(UserError) as error:
        load("atis", split, "en", str(folder))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("texts", "tags", "labels", "message"),
    [
        (["a b", "c"], ["O O"], ["x", "y"], "seq.in 2, seq.out 1, label 2"),
        (["a b", "c"], ["O O", "O O"], ["x", "y"], "seq.out, line 2: 2 tags, but seq.in has 1"),
        (["a b"], ["O X-b"], ["x"], "line 1: the tag 'X-b' is not O"),
        (["a b"], ["O B-"], ["x"], "line 1: the tag 'B-' is not O"),
        (["a b"], ["O I"], ["x"], "line 1: the tag 'I' is not O"),
        (["a b"], ["O o"], ["x"], "line 1: the tag 'o' is not O"),
        (["a", " ", "c"], ["O", "O", "O"], ["x", "y", "z"], "seq.in, line 2 is empty"),
        (["a", "b"], ["O", "O"], ["x", ""], "label, line 2 is empty"),
        ([], [], [], "seq.in is empty"),
    ],
)
def test_malformed_files_are_named(tmp_path, texts, tags, labels, message):
    write(tmp_path, "train", texts, tags, labels)
    assert message in refusal(tmp_path)


def test_missing_and_unreadable_files(folder):
    for name in ("seq.in", "seq.out", "label"):
        content = (folder / "dev" / name).read_bytes()
        (folder / "dev" / name).write_bytes(content + b"\xff\n")
        assert f"{name} is not UTF-8 text (byte {len(content)})" in refusal(folder, "dev")
        (folder / "dev" / name).unlink()
        message = refusal(folder, "dev")
        assert name in message and FETCH in message and "--data-dir" in message
        (folder / "dev" / name).write_bytes(content)
    assert os.path.join("nowhere", "snips") in str(
        pytest.raises(UserError, load, "snips", "train", "en", "nowhere").value
    )
    with pytest.raises(UserError, match="no language 'de'"):
        load("atis", "train", "de", str(folder))


def test_names_of_dev_and_test_come_last(tmp_path):
    write(tmp_path, "train", ["a b", "c"], ["B-z I-z", "B-m"], ["q", "b"])
    assert read_names(str(tmp_path), FETCH) == Names(("b", "q"), ("O", "B-m", "B-z", "I-z"), 2, 4)
    write(tmp_path, "dev", ["a b"], ["B-k O"], ["c"])
    write(tmp_path, "test", ["a b"], ["B-a B-k"], ["b#q"])
    read_sentences.cache_clear()
    names = read_names(str(tmp_path), FETCH)
    assert names.intents == ("b", "q", "c", "b#q") and names.known_intents == 2
    assert names.slots == ("O", "B-m", "B-z", "I-z", "B-k", "B-a") and names.known_slots == 4
    (tmp_path / "test" / "label").unlink()  # a split that is there must be whole
    read_sentences.cache_clear()
    with pytest.raises(UserError, match="no file .*label"):
        read_names(str(tmp_path), FETCH)


# ---------------------------------------------------------------------------------------- scoring
@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", set()),
        ("B-a", {("a", 0, 1)}),
        ("B-a I-a O B-a", {("a", 0, 2), ("a", 3, 4)}),
        ("B-a B-a I-a", {("a", 0, 1), ("a", 1, 3)}),
        ("I-a I-a O I-b", {("a", 0, 2), ("b", 3, 4)}),
        ("B-a I-b I-b", {("a", 0, 1), ("b", 1, 3)}),
        ("B-a.x-y I-a.x-y I-a.x", {("a.x-y", 0, 2), ("a.x", 2, 3)}),
        ("O I-None", {("None", 1, 2)}),
        ("", set()),
    ],
)
def test_spans_by_hand(tags, expected):
    assert spans(tags.split()) == expected


def conlleval(gold, predicted):
    """Counts (correct, gold, predicted) word by word, as the Perl script goes: with its tests for
    the begin and the end of a chunk, over all sentences with an O between them.
    """

    def split(tag):
        return ("O", "") if tag == "O" else tuple(tag.split("-", 1))

    def ends(before, now):
        (mark, kind), (next_mark, next_kind) = before, now
        return mark != "O" and (next_mark in "BO" or kind != next_kind)

    def begins(before, now):
        (mark, kind), (next_mark, next_kind) = before, now
        return next_mark != "O" and (next_mark == "B" or mark == "O" or kind != next_kind)

    correct = in_gold = in_predicted = 0
    inside = False  # of a chunk that began in both at once
    old_true = old_guess = ("O", "")
    for true_row, guess_row in zip(gold, predicted, strict=True):
        for true, guess in zip([*true_row, "O"], [*guess_row, "O"], strict=True):
            true, guess = split(true), split(guess)
            if inside:
                true_ends, guess_ends = ends(old_true, true), ends(old_guess, guess)
                if true_ends and guess_ends:
                    correct += 1
                inside = not (true_ends or guess_ends)
            true_begins, guess_begins = begins(old_true, true), begins(old_guess, guess)
            if true_begins and guess_begins and true[1] == guess[1]:
                inside = True
            in_gold += true_begins
            in_predicted += guess_begins
            old_true, old_guess = true, guess
    return correct, in_gold, in_predicted


def test_scores_equal_conlleval():
    rng = random.Random(0)
    found_some = 0
    for _ in range(300):
        names = ["O", "B-a", "I-a", "B-b", "I-b"]
        gold = [rng.choices(names, k=rng.randint(1, 8)) for _ in range(rng.randint(1, 6))]
        predicted = [
            [tag if rng.random() < 0.7 else rng.choice(names) for tag in row] for row in gold
        ]
        scores = slot_scores(gold, predicted)
        correct, in_gold, in_predicted = conlleval(gold, predicted)
        assert scores["slot_correct"] == correct
        assert (scores["slot_gold"], scores["slot_predicted"]) == (in_gold, in_predicted)
        if correct:
            precision, recall = correct / in_predicted, correct / in_gold
            f1 = 100 * 2 * precision * recall / (precision + recall)
            assert scores["slot_f1"] == pytest.approx(f1)
            found_some += 1
        else:
            assert scores["slot_f1"] == 0
    assert found_some > 250


def test_token_f1_is_micro_averaged_over_all_tags():
    rng = random.Random(1)
    names = ["O", "B-a", "I-a", "B-b"]
    gold = [rng.choices(names, k=7) for _ in range(9)]
    predicted = [rng.choices(names, k=7) for _ in range(9)]
    pairs = list(zip(itertools.chain(*gold), itertools.chain(*predicted), strict=True))
    true_positive = sum(a == b == name for a, b in pairs for name in names)
    false_positive = sum(b == name != a for a, b in pairs for name in names)
    false_negative = sum(a == name != b for a, b in pairs for name in names)
    expected = 100 * 2 * true_positive / (2 * true_positive + false_positive + false_negative)
    assert slot_scores(gold, predicted)["slot_token_f1"] == pytest.approx(expected)


def test_scores_by_hand():
    gold = ["O B-a I-a O B-b".split(), ["O", "O"]]
    predicted = ["O B-a O O B-b".split(), ["B-a", "O"]]
    scores = slot_scores(gold, predicted)
    assert scores == {
        "slot_f1": pytest.approx(40.0),
        "slot_correct": 1,
        "slot_gold": 2,
        "slot_predicted": 3,
        "slot_token_f1": pytest.approx(100 * 5 / 7),
    }
    nothing = slot_scores([["O"]], [["O"]])
    assert nothing["slot_f1"] == 0 and nothing["slot_token_f1"] == 100
    assert slot_scores([], [])["slot_token_f1"] == 0
    with pytest.raises(ValueError):
        slot_scores([["O", "O"]], [["O"]])


# --------------------------------------------------------------------------------------- encoding
@pytest.fixture(scope="module")
def words():
    return WordTokenizer.build(s.words for s in load("atis", "train", "en", SAMPLE))


@pytest.mark.parametrize("kind", ["words", "pieces"])
def test_encoded_tags_are_those_of_the_words(kind, words, tokenizer):
    tokenizer = words if kind == "words" else tokenizer
    names = find_task("atis").names(SAMPLE)
    for split in ("train", "test"):
        sentences = load("atis", split, "en", SAMPLE)
        dataset = encode_split("atis", split, "en", SAMPLE, tokenizer, 128)
        assert dataset.tags.dtype == np.int64 and len(dataset) == len(sentences)
        for i, sentence in enumerate(sentences):
            part = slice(dataset.starts[i], dataset.starts[i + 1])
            ids, tags = dataset.ids[part], dataset.tags[part]
            expected = tokenizer.encode(" ".join(sentence.words))
            assert ids.tolist() == expected and tags[0] == tags[-1] == IGNORE
            assert [names.slots[tag] for tag in tags[tags != IGNORE]] == list(sentence.tags)
            assert names.intents[dataset.labels[i]] == sentence.intent
    assert (dataset.tags >= names.known_slots).sum() == 2  # "folding bicycle", only in test


def test_first_pieces_carry_the_tags(tmp_path, tokenizer):
    write(tmp_path, "train", ["the extraordinarily old"], ["O B-x I-x"], ["i"])
    dataset = encode_split("atis", "train", "en", str(tmp_path), tokenizer, 64)
    counts = [len(tokenizer.encode(word)) - 2 for word in ("the", "extraordinarily", "old")]
    assert counts[1] > 1
    expected = [IGNORE]
    for tag, count in zip((0, 1, 2), counts, strict=True):
        expected += [tag] + [IGNORE] * (count - 1)
    assert dataset.tags.tolist() == [*expected, IGNORE]


def test_a_word_too_many_is_refused(words, tokenizer):
    for each in (words, tokenizer):
        longest = encode_split("atis", "train", "en", SAMPLE, each, 128).lengths.max()
        assert encode_split("atis", "train", "en", SAMPLE, each, longest).lengths.max() == longest
        with pytest.raises(UserError, match=f"has {longest} tokens .* give --max-length {longest}"):
            encode_split("atis", "train", "en", SAMPLE, each, longest - 1)


def test_encoding_is_cached_with_its_tags(folder, words, monkeypatch):
    def encode(limit=None):
        return encode_split("atis", "dev", "en", str(folder), words, 64, limit)

    first = encode()
    with monkeypatch.context() as patched:
        patched.setattr(batches, "load", lambda *args: pytest.fail("read again"))
        second = encode()
    for name in ("ids", "starts", "labels", "tags"):
        assert (getattr(first, name) == getattr(second, name)).all()
    (name,) = os.listdir(batches.CACHE_DIR)
    path = os.path.join(batches.CACHE_DIR, name)
    np.savez(path, ids=first.ids, starts=first.starts, labels=first.labels, tags=first.tags[1:])
    assert (encode().tags == first.tags).all()  # not as many tags as ids: made again
    assert len(encode(limit=7)) == 7


@pytest.mark.parametrize("name", ["seq.in", "seq.out", "label"])
@pytest.mark.parametrize("split", ["dev", "train"])
def test_cache_notices_each_changed_file(folder, words, name, split):
    """Of the split itself, and of train, which says what the ids mean."""

    def encode():
        read_sentences.cache_clear()
        return encode_split("atis", "dev", "en", str(folder), words, 64)

    first = encode()
    path = folder / split / name
    lines = path.read_text(encoding="utf-8").split("\n")
    first_word = {"seq.in": "perhaps", "seq.out": "B-again", "label": "another"}[name]
    lines[0] = " ".join([first_word, *lines[0].split()[1:]])
    path.write_text("\n".join(lines), encoding="utf-8")
    changed = encode()
    assert len(os.listdir(batches.CACHE_DIR)) == 2
    if split == "dev" or name != "seq.in":
        what = {"seq.in": "ids", "seq.out": "tags", "label": "labels"}[name]
        assert (getattr(first, what) != getattr(changed, what)).any()


def test_no_cache_for_a_missing_file(folder, words):
    encode_split("atis", "dev", "en", str(folder), words, 64)
    os.unlink(folder / "dev" / "seq.in")
    read_sentences.cache_clear()
    with pytest.raises(UserError, match="no file"):
        encode_split("atis", "dev", "en", str(folder), words, 64)


# ---------------------------------------------------------------------------------------- batches
def make_dataset(lengths, with_tags=True):
    rng = np.random.default_rng(0)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    ids = rng.integers(4, 99, starts[-1], dtype=np.int32)
    tags = rng.choice([IGNORE, 0, 1, 2], starts[-1]) if with_tags else None
    return Dataset(ids, starts, rng.integers(0, 3, len(lengths)), tags)


def test_collate_by_brute_force():
    dataset = make_dataset([3, 7, 2, 5, 7])
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
    assert collate(make_dataset([3, 4], with_tags=False), np.array([0, 1])).tags is None


def test_every_tag_once_in_every_kind_of_batches(words):
    dataset = encode_split("atis", "train", "en", SAMPLE, words, 64)
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

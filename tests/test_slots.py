"""data/slots.py: files and names of joint tasks; and the scores of slots, data/metrics.py."""

import itertools
import os
import random

import pytest
from conftest import FLIGHTS

from data.metrics import slot_scores, spans
from data.slots import Names, Sentence, read_names, read_sentences
from data.tasks import find_task, load, names_of
from kit.common import UserError

FETCH = "python data/fetch.py atis"


@pytest.fixture(autouse=True)
def nothing_remembered():
    read_sentences.cache_clear()


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
    atis = find_task("atis")
    train, dev, test = (load(atis, split, "en", FLIGHTS) for split in ("train", "dev", "test"))
    assert (len(train), len(dev), len(test)) == (120, 30, 30)
    names = names_of(atis, FLIGHTS)
    assert names.known_intents == 6 and "find_train#ask_fare" in names.intents
    assert names.slots[names.known_slots :] == ("B-extra", "I-extra")
    train, test = ({word for sentence in rows for word in sentence.words} for rows in (train, test))
    assert test - train and len(test & train) > 50
    assert sum(os.path.getsize(os.path.join(d, f)) for d, _, files in os.walk(FLIGHTS) for f in files) < 25_000


@pytest.mark.parametrize(
    ("texts", "tags", "labels", "message"),
    [
        (["a b", "c"], ["O O"], ["x", "y"], "seq.in 2, seq.out 1, label 2"),
        (["a b", "c"], ["O O", "O O"], ["x", "y"], "seq.out, line 2: 2 tags, but seq.in has 1"),
        (["a b"], ["O X-b"], ["x"], "line 1: the tag 'X-b' is not O"),
        (["a b"], ["O B-"], ["x"], "line 1: the tag 'B-' is not O"),
        (["a", " ", "c"], ["O", "O", "O"], ["x", "y", "z"], "seq.in, line 2 is empty"),
        ([], [], [], "seq.in has no rows: fetch it again with"),
    ],
)
def test_malformed_files_are_named(tmp_path, texts, tags, labels, message):
    write(tmp_path, "train", texts, tags, labels)
    with pytest.raises(UserError, match=message):
        load(find_task("atis"), "train", "en", str(tmp_path))


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
        ("B-a B-a I-a O I-b", {("a", 0, 1), ("a", 1, 3), ("b", 4, 5)}),
        ("B-a.x-y I-a.x-y I-a.x", {("a.x-y", 0, 2), ("a.x", 2, 3)}),
        ("O I-None", {("None", 1, 2)}),
        ("", set()),
    ],
)
def test_spans_by_hand(tags, expected):
    assert spans(tags.split()) == expected


def conlleval(labels, predicted):
    """Counts (correct, in the labels, in the predictions) as the Perl script finds them: word by word,
    with its tests for the begin and the end of a chunk, and an O after each sentence.
    """

    def ends(before, now):
        (mark, kind), (next_mark, next_kind) = before, now
        return mark != "O" and (next_mark in "BO" or kind != next_kind)

    def begins(before, now):
        (mark, kind), (next_mark, next_kind) = before, now
        return next_mark != "O" and (next_mark == "B" or mark == "O" or kind != next_kind)

    correct = in_labels = in_predicted = 0
    inside = False  # of a chunk that began in both at once
    old_label = old_prediction = ("O", "")
    for label_row, prediction_row in zip(labels, predicted, strict=True):
        for label, prediction in zip([*label_row, "O"], [*prediction_row, "O"], strict=True):
            label, prediction = (tag.partition("-")[::2] for tag in (label, prediction))
            if inside:
                label_ends, prediction_ends = ends(old_label, label), ends(old_prediction, prediction)
                correct += label_ends and prediction_ends
                inside = not (label_ends or prediction_ends)
            label_begins, prediction_begins = begins(old_label, label), begins(old_prediction, prediction)
            if label_begins and prediction_begins and label[1] == prediction[1]:
                inside = True
            in_labels += label_begins
            in_predicted += prediction_begins
            old_label, old_prediction = label, prediction
    return correct, in_labels, in_predicted


def test_scores_equal_conlleval():
    rng = random.Random(0)
    found_some = 0
    for _ in range(300):
        names = ["O", "B-a", "I-a", "B-b", "I-b"]
        labels = [rng.choices(names, k=rng.randint(1, 8)) for _ in range(rng.randint(1, 6))]
        predicted = [[tag if rng.random() < 0.7 else rng.choice(names) for tag in row] for row in labels]
        scores = slot_scores(predicted, labels)
        correct, in_labels, in_predicted = conlleval(labels, predicted)
        counts = (scores["slot_correct"], scores["slot_gold"], scores["slot_predicted"])
        assert counts == (correct, in_labels, in_predicted)
        f1 = 0
        if correct:
            precision, recall = correct / in_predicted, correct / in_labels
            f1 = 100 * 2 * precision * recall / (precision + recall)
        assert scores["slot_f1"] == pytest.approx(f1)
        found_some += correct > 0
    assert found_some > 250


def test_token_f1_is_micro_averaged_over_all_tags():
    rng = random.Random(1)
    names = ["O", "B-a", "I-a", "B-b"]
    labels = [rng.choices(names, k=7) for _ in range(9)]
    predicted = [rng.choices(names, k=7) for _ in range(9)]
    pairs = list(zip(itertools.chain(*labels), itertools.chain(*predicted), strict=True))
    true_positive = sum(a == b == name for a, b in pairs for name in names)
    false_positive = sum(b == name != a for a, b in pairs for name in names)
    false_negative = sum(a == name != b for a, b in pairs for name in names)
    expected = 100 * 2 * true_positive / (2 * true_positive + false_positive + false_negative)
    assert slot_scores(predicted, labels)["slot_token_f1"] == pytest.approx(expected)


def test_scores_by_hand():
    labels = ["O B-a I-a O B-b".split(), ["O", "O"]]
    predicted = ["O B-a O O B-b".split(), ["B-a", "O"]]
    scores = slot_scores(predicted, labels)
    assert [*scores.values()] == pytest.approx([40, 1, 2, 3, 100 * 5 / 7])
    nothing = slot_scores([["O"]], [["O"]])
    assert nothing["slot_f1"] == 0 and nothing["slot_token_f1"] == 100
    assert slot_scores([], [])["slot_token_f1"] == 0
    with pytest.raises(ValueError):
        slot_scores([["O", "O"]], [["O"]])

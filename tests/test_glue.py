"""data/glue.py: GLUE's files and its splits. All rows are made up."""

import os

import numpy as np
import pytest

from data.files import read_examples
from data.glue import GLUE, dev_rows
from data.tasks import RAW_DIR, file_paths, find_task, load
from kit.common import UserError

# The first line of each file, and a row with {a}, {b} and {label} in their columns.
FILES = {
    "cola": (None, "src1\t{label}\t\t{a}"),
    "sst2": ("sentence\tlabel", "{a}\t{label}"),
    "mrpc": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{label}\t7\t8\t{a}\t{b}"),
    "stsb": ("index\tgenre\told_index\tsource1\tsentence1\tsentence2\tscore", "0\tg\t1\tnone\t{a}\t{b}\t{label}"),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\t{a}\t{b}\t{label}"),
    "mnli": ("index\tpairID\tsentence1\tsentence2\tlabel1\tgold_label", "0\t1n\t{a}\t{b}\tneutral\t{label}"),
    "qnli": ("index\tquestion\tsentence\tlabel", "0\t{a}\t{b}\t{label}"),
    "rte": ("index\tsentence1\tsentence2\tlabel", "0\t{a}\t{b}\t{label}"),
}


def spelled(task):
    """The labels in a file, by id; of the regression some numbers."""
    numbers = ("0.000", "3.250", "5.000") if task == "stsb" else ("0", "1")
    return GLUE[task].labels if task in ("mnli", "qnli", "rte") else numbers


def rows_of(task, count, start=0):
    """Rows whose first text holds the row's number; the labels of the task alternate."""
    labels, row = spelled(task), FILES[task][1]
    numbers = range(start, start + count)
    return [row.format(a=f"text {i}", b=f"other {i}", label=labels[i % len(labels)]) for i in numbers]


def write(folder, task, name, rows, end="\n"):
    header = FILES[task][0]
    lines = rows if header is None else [header, *rows]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes((end.join(lines) + end).encode())
    read_examples.cache_clear()


def write_all(folder, task, train=40):
    place = folder / GLUE[task].subfolder
    write(place, task, "train.tsv", rows_of(task, train))
    for i, name in enumerate(GLUE[task].files["test"]):
        write(place, task, name, rows_of(task, 6, start=1000 + 100 * i))
    return place


def numbers(examples):
    return [int(example.text_a.split()[1]) for example in examples]


# ---------------------------------------------------------------------------------------- reading
@pytest.mark.parametrize("task", GLUE)
def test_every_layout(tmp_path, task):
    write_all(tmp_path, task)
    row, labels, number = find_task(task), spelled(task), task == "stsb"
    train, dev = (load(row, split, row.train_language, str(tmp_path)) for split in ("train", "dev"))
    assert sorted(numbers(train) + numbers(dev)) == list(range(40)) and len(dev) == 4
    for language, start in zip(row.languages, (1000, 1100), strict=False):
        test = load(row, "test", language, str(tmp_path))
        assert numbers(test) == list(range(start, start + 6))
    assert len(row.labels) == (1 if number else len(labels))
    for example in (*train, *dev, *test):
        (i,) = numbers([example])
        assert example.text_b == (f"other {i}" if "{b}" in FILES[task][1] else None)
        label = labels[i % len(labels)]
        assert example.label == (float(label) if number else labels.index(label))
        assert type(example.label) is (float if number else int)


def test_quotes_spaces_and_line_ends(tmp_path):
    rows = ['say "yes \t1', "one\u2028still \x85one  \t0", '"\t1', "\t0"]
    for end in ("\n", "\r\n"):
        write(tmp_path / "SST-2", "sst2", "dev.tsv", rows, end)
        found = load(find_task("sst2"), "test", "en", str(tmp_path))
        assert [e.text_a for e in found] == ['say "yes', "one\u2028still \x85one", '"', ""]
        assert [e.label for e in found] == [1, 0, 1, 0]
    path = tmp_path / "SST-2" / "dev.tsv"
    path.write_bytes(path.read_bytes().rstrip(b"\r\n"))  # the published CoLA ends like this
    read_examples.cache_clear()
    assert load(find_task("sst2"), "test", "en", str(tmp_path)) == found


def message_of(task, folder, split="test", language=None):
    with pytest.raises(UserError) as error:
        load(GLUE[task], split, language or GLUE[task].train_language, str(folder))
    return str(error.value)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("cola", "src\t1\ttoo few", "dev.tsv, line 3: 3 columns, the layout has 4"),
        ("rte", "0\ta\tb\tneutral", "dev.tsv, line 4: unknown label 'neutral'; known: entailment"),
        ("sst2", "", "line 4: 1 columns, the header has 2"),
        ("stsb", rows_of("stsb", 1)[0][:-5] + "5.1", "unknown label '5.1'; known: a number from 0 to 5"),
        ("stsb", rows_of("stsb", 1)[0][:-5] + "nan", "unknown label 'nan'"),
    ],
)
def test_malformed_rows_are_named(tmp_path, task, row, message):
    write(tmp_path / GLUE[task].subfolder, task, GLUE[task].files["test"][0], [*rows_of(task, 2), row])
    assert message in message_of(task, tmp_path)


def test_unusable_files_are_named(tmp_path):
    assert "fetch it with 'python data/fetch.py rte'" in message_of("rte", tmp_path)
    place = write_all(tmp_path, "rte")
    assert "no column '#1 String'" in message_of("mrpc", place, "train")  # another task's folder
    write(place, "rte", "dev.tsv", [])
    assert "dev.tsv has no rows" in message_of("rte", tmp_path)
    write(place, "rte", "train.tsv", rows_of("rte", 1))
    assert "1 rows are too few" in message_of("rte", tmp_path, "train")
    write_all(tmp_path, "mnli")
    assert message_of("mnli", tmp_path, "dev", "mismatched").endswith("only in: matched")


def test_malformed_rows_of_qqp_are_left_out(tmp_path):
    place = write_all(tmp_path, "qqp", train=300)
    rows = rows_of("qqp", 300)
    rows[7], rows[100] = "1\t2\t3\tcut", rows[100] + "\tmore"
    write(place, "qqp", "dev.tsv", rows)
    examples = load(find_task("qqp"), "test", "en", str(tmp_path))
    assert len(examples) == 298 and {7, 100}.isdisjoint(numbers(examples))
    rows[8:10] = ["cut", "cut"]
    write(place, "qqp", "dev.tsv", rows)
    assert "dev.tsv, line 9 and 3 more have too few or too many" in message_of("qqp", tmp_path)


# ----------------------------------------------------------------------------------------- splits
def test_dev_is_a_tenth_of_train_and_at_most_a_thousand_rows():
    for count, expected in ((1, 1), (9, 1), (40, 4), (9_999, 999), (10_010, 1000), (400_000, 1000)):
        rows = dev_rows(count)
        assert len(rows) == len(set(rows)) == expected and (rows == dev_rows(count)).all()
        assert rows.min() >= 0 and rows.max() < count and (np.diff(rows) > 0).all()


def test_no_text_is_in_both_train_and_dev(tmp_path):
    place = write_all(tmp_path, "rte")
    rows = rows_of("rte", 100)
    rows += [row.replace("\tentailment", "\tnot_entailment") for row in rows]  # each text twice
    write(place, "rte", "train.tsv", rows)
    train, dev = (load(find_task("rte"), split, "en", str(tmp_path)) for split in ("train", "dev"))
    assert len(dev) == 20 and set(numbers(train)).isdisjoint(numbers(dev))
    assert len(train) == 200 - 2 * len(set(numbers(dev)))


def test_the_official_files():
    """The published files, if they were fetched."""
    sizes = {"cola": (8551, 1043), "mrpc": (3668, 408), "rte": (2490, 277), "stsb": (5749, 1500)}
    if not all(map(os.path.exists, (path for name in sizes for path in file_paths(find_task(name), RAW_DIR, "train")))):
        pytest.skip("the official GLUE files are not in data/raw")
    for name, (in_train, in_test) in sizes.items():
        train, dev, test = (load(find_task(name), split, "en", RAW_DIR) for split in ("train", "dev", "test"))
        assert len(dev) == in_train // 10 and len(test) == in_test
        assert in_train - 10 < len(train) + len(dev) <= in_train
        assert {e[:2] for e in train}.isdisjoint({e[:2] for e in dev})

"""data/glue.py and data/metrics.py: GLUE's files, its splits and its measures. All rows are made up."""

import math
import os
import random

import numpy as np
import pytest
from conftest import ROOT

import data.batches as batches
from data import UserError, fetch
from data.batches import encode_split
from data.glue import GLUE, held_out, read_file
from data.metrics import accuracy, f1, matthews, pearson, ranks, scores, spearman
from data.tasks import find_task, load, task_folder

# What a first line says, and one row with {a}, {b} and {label} where they stand.
FILES = {
    "cola": (None, "src1\t{label}\t\t{a}"),
    "sst2": ("sentence\tlabel", "{a}\t{label}"),
    "mrpc": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{label}\t7\t8\t{a}\t{b}"),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tg\tf\t2000\t1\tnone\tnone\t{a}\t{b}\t{label}",
    ),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\t{a}\t{b}\t{label}"),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t1\t1n\tg\t{a}\t{b}\tneutral\t{label}",
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", "0\t{a}\t{b}\t{label}"),
    "rte": ("index\tsentence1\tsentence2\tlabel", "0\t{a}\t{b}\t{label}"),
}
TASKS = sorted(FILES)


def spelled(task):
    return GLUE[task].in_file or ("0.000", "3.250", "5.000")


def rows_of(task, count, start=0):
    """Rows whose first text names its number, with the task's labels in turn."""
    labels, row = spelled(task), FILES[task][1]
    return [
        row.format(a=f"text {i}", b=f"other {i}", label=labels[i % len(labels)])
        for i in range(start, start + count)
    ]


def write(folder, task, name, rows, end="\n"):
    header = FILES[task][0]
    lines = rows if header is None else [header, *rows]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes((end.join(lines) + end).encode())
    read_file.cache_clear()


def write_all(folder, task, train=40, test=6):
    place = folder / GLUE[task].folder
    write(place, task, "train.tsv", rows_of(task, train))
    for i, name in enumerate(GLUE[task].tests.values()):
        write(place, task, name, rows_of(task, test, start=1000 + 100 * i))
    return place


def numbers(examples):
    return [int(example.text_a.split()[1]) for example in examples]


# ---------------------------------------------------------------------------------------- reading
@pytest.mark.parametrize("task", TASKS)
def test_every_layout(tmp_path, task):
    write_all(tmp_path, task)
    row = find_task(task)
    language = row.train_language
    train, dev = (load(task, split, language, str(tmp_path)) for split in ("train", "dev"))
    for language, start in zip(row.languages, (1000, 1100), strict=False):
        test = load(task, "test", language, str(tmp_path))
        assert numbers(test) == list(range(start, start + 6))
    pair = len(GLUE[task].texts) == 2
    labels = spelled(task)
    for example in (*train, *dev, *test):
        (i,) = numbers([example])
        assert example.text_b == (f"other {i}" if pair else None)
        label = labels[i % len(labels)]
        assert example.label == (float(label) if row.regression else labels.index(label))
        assert type(example.label) is (float if row.regression else int)
    assert sorted(numbers(train) + numbers(dev)) == list(range(40)) and len(dev) == 4


def test_the_table():
    assert {name for name in GLUE} == set(FILES)
    for name, layout in GLUE.items():
        task = find_task(name)
        assert task.head == "sequence" and task.labels == layout.labels
        assert task.regression == (name == "stsb")
        assert task.regression or len(layout.in_file) == len(layout.labels)
        assert not any(" " in label for label in task.labels)
        if name != "mnli":
            assert task.languages == ("en",) and task.train_language == "en"
    assert find_task("mnli").languages == ("matched", "mismatched")
    assert find_task("stsb").metrics == ("pearson", "spearman")
    assert find_task("cola").metrics == ("matthews",) and find_task("rte").metrics == ("accuracy",)
    assert find_task("mrpc").metrics == find_task("qqp").metrics == ("accuracy", "f1")


def test_quotes_spaces_and_line_ends(tmp_path):
    rows = ['say "yes \t1', "one\u2028still \x85one  \t0", '"\t1', "\t0"]
    for end in ("\n", "\r\n"):
        write(tmp_path / "SST-2", "sst2", "dev.tsv", rows, end)
        found = load("sst2", "test", "en", str(tmp_path))
        assert [e.text_a for e in found] == ['say "yes', "one\u2028still \x85one", '"', ""]
        assert [e.label for e in found] == [1, 0, 1, 0]
    path = tmp_path / "SST-2" / "dev.tsv"
    path.write_bytes(path.read_bytes().rstrip(b"\r\n"))  # the published CoLA ends like this
    read_file.cache_clear()
    assert load("sst2", "test", "en", str(tmp_path)) == found


def refusal(task, folder, split="test", language=None):
    read_file.cache_clear()
    with pytest.raises(UserError) as error:
        load(task, split, language or find_task(task).train_language, str(folder))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("cola", "src\t1\ttoo few", "dev.tsv, line 3: 3 columns, the layout has 4"),
        ("cola", "src\t2\t\ttext", "line 3: unknown label '2'; known: 0 1"),
        ("rte", "0\ta\tb\tneutral", "dev.tsv, line 4: unknown label 'neutral'; known: entailment"),
        ("rte", "0\ta\tb\tentailment\t", "line 4: 5 columns, the header has 4"),
        ("sst2", "", "line 4: 1 columns, the header has 2"),
        ("mrpc", "1\t7\t8\tonly one", "line 4: 4 columns, the header has 5"),
        ("mnli", "0\t1\t1n\tg\ta\tb\tneutral\t-", "line 4: unknown label '-'"),
        ("stsb", rows_of("stsb", 1)[0][:-5] + "5.1", "line 4: the score '5.1' is no number from 0"),
        ("stsb", rows_of("stsb", 1)[0][:-5] + "nan", "the score 'nan'"),
        ("stsb", rows_of("stsb", 1)[0][:-5] + "", "the score ''"),
    ],
)
def test_malformed_rows_are_named(tmp_path, task, row, message):
    rows = rows_of(task, 5)
    rows[2] = row
    write(tmp_path / GLUE[task].folder, task, next(iter(GLUE[task].tests.values())), rows)
    assert message in refusal(task, tmp_path)


def test_other_refusals(tmp_path):
    assert "fetch it with 'python data/fetch.py rte'" in refusal("rte", tmp_path)
    place = write_all(tmp_path, "rte")
    assert "no column '#1 String'" in refusal("mrpc", place, "train")  # another task's folder
    (place / "dev.tsv").write_bytes(b"")
    assert "no column 'sentence1'" in refusal("rte", tmp_path)
    write(place, "rte", "dev.tsv", [])
    assert "dev.tsv has no rows" in refusal("rte", tmp_path)
    (place / "dev.tsv").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in refusal("rte", tmp_path)
    write(place, "rte", "train.tsv", rows_of("rte", 1))
    assert "1 rows are too few" in refusal("rte", tmp_path, "train")
    write_all(tmp_path, "mnli")
    message = refusal("mnli", tmp_path, "dev", "mismatched")
    assert "use --languages matched" in message


def test_rows_of_qqp_with_columns_missing_are_left_out_and_counted(tmp_path, capsys):
    place = write_all(tmp_path, "qqp", train=300)
    rows = rows_of("qqp", 300)
    rows[7], rows[100] = "1\t2\t3\tcut", rows[100] + "\tmore"
    write(place, "qqp", "train.tsv", rows)
    examples, left_out = read_file("qqp", str(place / "train.tsv"), "")
    assert left_out == [9, 102] and len(examples) == 298
    assert {7, 100}.isdisjoint(numbers(examples))
    assert fetch.main(["glue", "--data-dir", str(tmp_path)]) == 0
    line = next(
        line for line in capsys.readouterr().out.split("\n") if "QQP" in line and "{" in line
    )
    assert line.endswith("269 train + 29 dev + 6 test rows (2 malformed ones left out), readable")
    rows[8:10] = ["cut", "cut"]
    write(place, "qqp", "train.tsv", rows)
    assert "train.tsv, line 9 and 3 more have too few or too many" in refusal(
        "qqp", tmp_path, "dev"
    )


# ----------------------------------------------------------------------------------------- splits
def test_dev_is_a_tenth_of_train_at_most_a_thousand_the_same_every_time():
    for count, expected in ((1, 1), (9, 1), (40, 4), (9_999, 999), (10_010, 1000), (400_000, 1000)):
        rows = held_out(count)
        assert len(rows) == len(set(rows)) == expected and (rows == held_out(count)).all()
        assert rows.min() >= 0 and rows.max() < count and (np.diff(rows) > 0).all()


def test_no_text_is_in_both_train_and_dev(tmp_path):
    place = write_all(tmp_path, "rte")
    rows = rows_of("rte", 100)
    rows += [row.replace("\tentailment", "\tnot_entailment") for row in rows]  # each text twice
    write(place, "rte", "train.tsv", rows)
    train, dev = (load("rte", split, "en", str(tmp_path)) for split in ("train", "dev"))
    assert len(dev) == 20 and set(numbers(train)).isdisjoint(numbers(dev))
    assert len(train) == 200 - 2 * len(set(numbers(dev)))


def test_mnli_has_two_tests_and_one_dev(tmp_path):
    place = write_all(tmp_path, "mnli")
    assert find_task("mnli").paths("test") == ("dev_matched.tsv", "dev_mismatched.tsv")
    os.unlink(place / "dev_mismatched.tsv")
    assert "no file" in refusal("mnli", tmp_path) and "dev_mismatched" in refusal("mnli", tmp_path)


def test_where_the_files_may_be(tmp_path):
    task = find_task("rte")
    place = write_all(tmp_path / "glue", "rte")
    for folder in (tmp_path, tmp_path / "glue", place):
        assert os.path.samefile(task_folder(task, str(folder)), place)
        assert len(load("rte", "test", "en", str(folder))) == 6
    missing = tmp_path / "glue" / "MNLI"  # the message names where it should be
    for folder in (tmp_path, tmp_path / "glue", missing):
        assert task_folder(find_task("mnli"), str(folder)) == str(missing)


# ----------------------------------------------------------------------------------------- encoding
def test_encoding(tmp_path, tokenizer, monkeypatch):
    for name in ("stsb", "mnli"):
        write_all(tmp_path, name)
    dataset = encode_split("stsb", "test", "en", str(tmp_path), tokenizer, 32)
    assert dataset.labels.dtype == np.float32 and dataset.metrics == ("pearson", "spearman")
    expected = [e.label for e in load("stsb", "test", "en", str(tmp_path))]
    assert dataset.labels.tolist() == expected
    with monkeypatch.context() as patched:
        patched.setattr(batches, "load", lambda *args: pytest.fail("read again"))
        again = encode_split("stsb", "test", "en", str(tmp_path), tokenizer, 32)
    assert again.labels.dtype == np.float32 and again.metrics == dataset.metrics
    assert (again.labels == dataset.labels).all()
    encode_split("mnli", "dev", "matched", str(tmp_path), tokenizer, 32)
    first = encode_split("mnli", "test", "mismatched", str(tmp_path), tokenizer, 32)
    assert first.labels.dtype == np.int64 and first.metrics == ("accuracy",)
    rows = rows_of("mnli", 9, start=1100)
    write(tmp_path / "MNLI", "mnli", "dev_mismatched.tsv", rows)  # this file alone is another
    assert len(first) == 6
    assert len(encode_split("mnli", "test", "mismatched", str(tmp_path), tokenizer, 32)) == 9


def test_the_official_files():
    """Read where they lie beside the checkout, in shared/data/glue; skipped elsewhere."""
    folder = os.path.join(os.path.dirname(ROOT), "shared", "data", "glue")
    if not os.path.isdir(folder):
        pytest.skip("the official GLUE files are not here")
    sizes = {"cola": (8551, 1043), "mrpc": (3668, 408), "rte": (2490, 277), "stsb": (5749, 1500)}
    for name, (in_train, in_test) in sizes.items():
        train, dev, test = (load(name, split, "en", folder) for split in ("train", "dev", "test"))
        assert len(dev) == in_train // 10 and len(test) == in_test
        assert in_train - 10 < len(train) + len(dev) <= in_train
        assert {e[:2] for e in train}.isdisjoint({e[:2] for e in dev})


# ----------------------------------------------------------------------------------------- metrics
def by_hand(predictions, labels):
    """Accuracy, F1 and Matthews, counted one by one."""
    cells = {(p, t): 0 for p in (0, 1) for t in (0, 1)}
    for p, t in zip(predictions.tolist(), labels.tolist(), strict=True):
        cells[p, t] += 1
    tp, fp, fn, tn = cells[1, 1], cells[1, 0], cells[0, 1], cells[0, 0]
    precision = tp / (tp + fp) if tp + fp else 0
    recall = tp / (tp + fn) if tp + fn else 0
    harmonic = 2 * precision * recall / (precision + recall) if precision + recall else 0
    below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return (tp + tn) / len(labels), harmonic, (tp * tn - fp * fn) / below if below else 0


def slow_ranks(values):
    return [
        sum(other < x for other in values) + (sum(other == x for other in values) + 1) / 2
        for x in values
    ]


def slow_pearson(a, b):
    mean_a, mean_b = math.fsum(a) / len(a), math.fsum(b) / len(b)
    top = math.fsum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    left = math.fsum((x - mean_a) ** 2 for x in a)
    return top / math.sqrt(left * math.fsum((y - mean_b) ** 2 for y in b))


def test_metrics_by_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = int(rng.integers(1, 20))
        guess, true = rng.integers(0, 2, (2, count))
        expected = by_hand(guess, true)
        found = (accuracy(guess, true), f1(guess, true), matthews(guess, true))
        assert found == pytest.approx(expected)
        x = rng.integers(0, 6, count + 2).astype(np.float32)
        y = rng.normal(size=count + 2).round(1)
        assert ranks(x).tolist() == slow_ranks(x.tolist())
        if len(set(x)) > 1 and len(set(y)) > 1:
            assert pearson(x, y) == pytest.approx(slow_pearson(x.tolist(), y.tolist()))
            expected = slow_pearson(slow_ranks(x.tolist()), slow_ranks(y.tolist()))
            assert spearman(x, y) == pytest.approx(expected)


def test_matthews_is_pearson_of_zeros_and_ones():
    rng = np.random.default_rng(1)
    for _ in range(50):
        guess, true = rng.integers(0, 2, (2, 30))
        assert matthews(guess, true) == pytest.approx(pearson(guess, true))
    many = np.tile(np.array([0, 1]), 200_000)  # their counts' product is over 64 bits
    assert matthews(many, many) == 1.0 and matthews(many, 1 - many) == -1.0


def test_metrics_by_scipy():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    rng = np.random.default_rng(2)
    for _ in range(50):
        x = rng.normal(size=40).astype(np.float32)
        y = (x + rng.normal(size=40)).round(0).astype(np.float32)
        assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-6)
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0])
        assert (ranks(y) == stats.rankdata(y)).all()


def test_metrics_by_sklearn():
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    rng = np.random.default_rng(3)
    for _ in range(50):
        guess, true = rng.integers(0, 2, (2, 40))
        assert f1(guess, true) == pytest.approx(sklearn.f1_score(true, guess))
        assert matthews(guess, true) == pytest.approx(sklearn.matthews_corrcoef(true, guess))
        assert accuracy(guess, true) == pytest.approx(sklearn.accuracy_score(true, guess))


@pytest.mark.parametrize("value", [0.1, 1e-30, 2.3e30, math.nan, math.inf])
def test_collapsed_models_score_nothing(value):
    labels = np.array([0.0, 2.5, 5.0], dtype=np.float32)
    same = np.full(3, value, dtype=np.float32)
    for a, b in ((same, labels), (labels, same), (same[:0], labels[:0]), (same[:1], labels[:1])):
        found = scores(("pearson", "spearman"), a, b)
        assert found == {"pearson": 0.0, "spearman": 0.0, "score": 0.0, "total": len(a)}
    one = np.array([value, 1.0, 2.0])
    assert all(-1 <= metric(one, labels) <= 1 for metric in (pearson, spearman))
    classes = np.array([1, 0, 1])
    for guess in (np.ones(3, int), np.zeros(3, int)):
        assert matthews(guess, classes) == matthews(classes, guess) == 0.0
    assert f1(np.zeros(3, int), classes) == f1(np.zeros(3, int), np.zeros(3, int)) == 0.0
    nothing = scores(("accuracy", "f1"), classes[:0], classes[:0])
    assert nothing == {"accuracy": 0.0, "f1": 0.0, "score": 0.0, "total": 0, "correct": 0}


def test_scale_and_shift_change_no_correlation():
    rng = random.Random(4)
    x = np.array([rng.random() for _ in range(20)])
    y = np.array([rng.random() for _ in range(20)])
    for scale in (1e-200, 1.0, 1e200):
        assert pearson(x * scale, y) == pytest.approx(pearson(x, y))
    assert pearson(-x, y) == pytest.approx(-pearson(x, y))
    assert spearman(np.exp(x), y) == pytest.approx(spearman(x, y))
    assert pearson(x, x) <= 1.0 and pearson(x, x) == pytest.approx(1.0)


def test_scores():
    guess, true = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1])
    found = scores(("accuracy", "f1"), guess, true)
    assert found["accuracy"] == pytest.approx(60) and found["f1"] == pytest.approx(200 / 3)
    assert found["score"] == pytest.approx((60 + 200 / 3) / 2)
    assert (found["correct"], found["total"]) == (3, 5)
    found = scores(("matthews",), guess, true)
    assert found["score"] == found["matthews"] and found["accuracy"] == pytest.approx(60)
    assert all(type(value) in (int, float) for value in found.values())  # as JSON needs them
    three = scores(("accuracy",), np.array([2, 0, 1]), np.array([2, 1, 1]))
    assert three["score"] == three["accuracy"] == pytest.approx(200 / 3)
    with pytest.raises(ValueError):
        scores(("accuracy",), guess, true[:4])

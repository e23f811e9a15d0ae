"""data/metrics.py: the metrics of GLUE against brute force, SciPy and scikit-learn."""

import math

import numpy as np
import pytest

from data.metrics import accuracy, f1, macro_f1, matthews, pearson, ranks, scores, spearman


def by_brute_force(predictions, labels):
    """Accuracy, F1 and Matthews correlation, counted one by one."""
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
    return [sum(other < x for other in values) + (sum(other == x for other in values) + 1) / 2 for x in values]


def slow_pearson(a, b):
    mean_a, mean_b = math.fsum(a) / len(a), math.fsum(b) / len(b)
    top = math.fsum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    left = math.fsum((x - mean_a) ** 2 for x in a)
    return top / math.sqrt(left * math.fsum((y - mean_b) ** 2 for y in b))


def test_metrics_by_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = int(rng.integers(1, 20))
        predictions, labels = rng.integers(0, 2, (2, count))
        expected = by_brute_force(predictions, labels)
        found = (accuracy(predictions, labels), f1(predictions, labels), matthews(predictions, labels))
        assert found == pytest.approx(expected)
        x = rng.integers(0, 6, count + 2).astype(np.float32)
        y = rng.normal(size=count + 2).round(1)
        assert ranks(x).tolist() == slow_ranks(x.tolist())
        if len(set(x)) > 1 and len(set(y)) > 1:
            assert pearson(x, y) == pytest.approx(slow_pearson(x.tolist(), y.tolist()))
            expected = slow_pearson(slow_ranks(x.tolist()), slow_ranks(y.tolist()))
            assert spearman(x, y) == pytest.approx(expected)


def test_macro_f1_is_the_mean_over_classes():
    rng = np.random.default_rng(5)
    for _ in range(100):
        predictions, labels = rng.integers(0, 7, (2, int(rng.integers(1, 12))))
        each = [f1(predictions == c, labels == c) for c in {*predictions.tolist(), *labels.tolist()}]
        assert macro_f1(predictions, labels) == pytest.approx(sum(each) / len(each))


def test_matthews_is_pearson_of_zeros_and_ones():
    rng = np.random.default_rng(1)
    for _ in range(50):
        predictions, labels = rng.integers(0, 2, (2, 30))
        assert matthews(predictions, labels) == pytest.approx(pearson(predictions, labels))
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
        predictions, labels = rng.integers(0, 2, (2, 40))
        assert f1(predictions, labels) == pytest.approx(sklearn.f1_score(labels, predictions))
        assert matthews(predictions, labels) == pytest.approx(sklearn.matthews_corrcoef(labels, predictions))
        assert accuracy(predictions, labels) == pytest.approx(sklearn.accuracy_score(labels, predictions))
        predictions, labels = rng.integers(0, 6, (2, 9))  # some classes occur in one of them, or in none
        assert macro_f1(predictions, labels) == pytest.approx(sklearn.f1_score(labels, predictions, average="macro"))


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
    for constant in (np.ones(3, int), np.zeros(3, int)):
        assert matthews(constant, classes) == matthews(classes, constant) == 0.0
    assert f1(np.zeros(3, int), classes) == f1(np.zeros(3, int), np.zeros(3, int)) == 0.0
    nothing = scores(("accuracy", "f1"), classes[:0], classes[:0])
    assert set(nothing.values()) == {0} and {"correct", "classes", "majority", "macro_f1"} < set(nothing)


def test_scale_and_shift_change_no_correlation():
    x, y = np.random.default_rng(4).random((2, 20))
    for scale in (1e-200, 1.0, 1e200):
        assert pearson(x * scale, y) == pytest.approx(pearson(x, y))
    assert pearson(-x, y) == pytest.approx(-pearson(x, y))
    assert spearman(np.exp(x), y) == pytest.approx(spearman(x, y))
    assert pearson(x, x) <= 1.0 and pearson(x, x) == pytest.approx(1.0)


def test_scores():
    predictions, labels = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1])
    found = scores(("accuracy", "f1"), predictions, labels)
    assert found["accuracy"] == pytest.approx(60) and found["f1"] == pytest.approx(200 / 3)
    assert found["score"] == pytest.approx((60 + 200 / 3) / 2)
    assert (found["correct"], found["total"]) == (3, 5)
    found = scores(("matthews",), predictions, labels)
    assert found["score"] == found["matthews"] and found["accuracy"] == pytest.approx(60)
    assert all(type(value) in (int, float) for value in found.values())  # as JSON needs them
    assert found["macro_f1"] == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)
    collapsed = scores(("accuracy",), np.zeros(20, int), np.array([0] * 19 + [3]))  # always the frequent class
    assert collapsed["accuracy"] == collapsed["majority"] == 95.0 and collapsed["classes"] == 1
    assert collapsed["macro_f1"] == pytest.approx(100 * (38 / 39) / 2)
    better = scores(("f1",), np.array([0, 2, 4]), np.array([2, 2, 4]))
    assert better["classes"] == 3 and better["majority"] == pytest.approx(200 / 3)
    assert "classes" not in scores(("pearson",), np.array([0.5]), np.array([1.5]))

"""Metrics of predictions: the five in which GLUE's tasks are reported, and the macro-F1.

Each takes arrays of N predictions and N labels and returns a float. Where a metric is not defined (a constant
prediction has no correlation) it is 0.0, never NaN, so that one collapsed run does not spoil a mean over tasks or
seeds.

Labels are class ids for accuracy, f1, macro_f1 and matthews, and numbers for pearson and spearman. f1 and matthews are
for two classes, of which class 1 is the positive one:

                    label 1    label 0
    predicted 1       tp         fp
    predicted 0       fn         tn
"""

import math

import numpy as np


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The fraction of correct predictions: (tp + tn) / N for two classes.

    >>> accuracy(np.array([1, 0, 2, 2]), np.array([1, 1, 2, 0]))
    0.5
    """
    return float((predictions == labels).mean()) if len(labels) else 0.0


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1, the harmonic mean of precision and recall: 2 tp / (2 tp + fp + fn).

    tp = 2, fp = 1, fn = 1:
    >>> round(f1(np.array([1, 1, 1, 0, 0]), np.array([1, 1, 0, 1, 0])), 4)
    0.6667
    """
    tp, fp, fn, _ = counts(predictions, labels)
    return 2 * tp / (2 * tp + fp + fn) if tp else 0.0


def macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The mean F1 of the classes that occur in labels or predictions, however rare: mean_c 2 tp / (2 tp + fp + fn).

    A class that is never predicted has an F1 of 0: here classes 0 and 1 have 4 / 5 and 0.
    >>> macro_f1(np.array([0, 0, 0]), np.array([0, 0, 1]))
    0.4
    """
    occurrences = np.bincount(np.concatenate((predictions, labels)))  # of each class: 2 tp + fp + fn
    tp = np.bincount(labels[predictions == labels], minlength=len(occurrences))
    there = occurrences > 0
    return float((2 * tp[there] / occurrences[there]).mean()) if len(labels) else 0.0


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation coefficient (1975): Pearson's correlation of two binary vectors.

        (tp tn - fp fn) / sqrt((tp + fp) (tp + fn) (tn + fp) (tn + fn))

    From -1 to 1, and 0 for guessing, however unequal the classes are: 70 % of CoLA is class 1, so always predicting 1
    has an accuracy of 70 % and a Matthews correlation of 0.

    (2 * 1 - 1 * 1) / sqrt(3 * 3 * 2 * 2):
    >>> round(matthews(np.array([1, 1, 1, 0, 0]), np.array([1, 1, 0, 1, 0])), 4)
    0.1667
    """
    tp, fp, fn, tn = counts(predictions, labels)
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(product) if product else 0.0


def counts(predictions: np.ndarray, labels: np.ndarray) -> tuple[int, int, int, int]:
    """(tp, fp, fn, tn). Python's integers: their product in matthews() doesn't fit into 64 bits."""
    positive, true = predictions == 1, labels == 1
    tp = int((positive & true).sum())
    fp, fn = int(positive.sum()) - tp, int(true.sum()) - tp
    return tp, fp, fn, len(labels) - tp - fp - fn


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation: how close the points (prediction, label) are to a straight line.

        sum((p - mean p) (l - mean l)) / sqrt(sum((p - mean p)^2) sum((l - mean l)^2))

    >>> round(pearson(np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.0, 5.0])), 4)
    0.9449
    """
    p, q = predictions.astype(np.float64), labels.astype(np.float64)
    if not has_spread(p) or not has_spread(q):
        return 0.0
    # Scaled by the largest first: squares of very small or large numbers would be 0 or inf.
    p, q = p / np.abs(p).max(), q / np.abs(q).max()
    p, q = p - p.mean(), q - q.mean()
    spread = math.sqrt(p @ p) * math.sqrt(q @ q)
    return max(-1.0, min(1.0, float(p @ q) / spread)) if spread else 0.0


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Spearman's correlation: Pearson's of the ranks, so only the order matters.

    1 for predictions that increase with the labels:
    >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.0, 5.0]))
    1.0
    """
    if not np.isfinite(predictions).all():
        return 0.0
    return pearson(ranks(predictions), ranks(labels))


def ranks(values: np.ndarray) -> np.ndarray:
    """(N,) -> (N,): the rank of each value from 1; equal values share the mean of their ranks.

    >>> ranks(np.array([0.5, 0.1, 0.5, 0.9])).tolist()
    [2.5, 1.0, 2.5, 4.0]
    """
    _, which, times = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(times)  # the highest rank among equal values
    return (last - (times - 1) / 2)[which]


def has_spread(values: np.ndarray) -> bool:
    return len(values) > 0 and bool(np.isfinite(values).all()) and values.min() < values.max()


METRICS = {each.__name__: each for each in (accuracy, f1, macro_f1, matthews, pearson, spearman)}
REGRESSION = ("pearson", "spearman")


def scores(metrics: tuple[str, ...], predictions: np.ndarray, labels: np.ndarray) -> dict:
    """The evaluation of one test set: each metric in %, and

    score       the mean of the metrics, by which epochs and models are compared (as in GLUE)
    total       N
    correct     the number of correct predictions, and accuracy and macro_f1 in %: for classes only, like the next two
    classes     how many different classes are predicted
    majority    the accuracy in % of always predicting the most frequent label of this test set

    >>> scores(("accuracy",), np.array([0, 0, 0, 0]), np.array([0, 0, 0, 1]))["majority"]
    75.0
    """
    if len(predictions) != len(labels):
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels")
    found = {name: 100 * METRICS[name](predictions, labels) for name in metrics}
    found["score"] = sum(found[name] for name in metrics) / len(metrics)
    found["total"] = len(labels)
    if not set(metrics) & set(REGRESSION):
        found["correct"] = int((predictions == labels).sum())
        found |= {name: 100 * METRICS[name](predictions, labels) for name in ("accuracy", "macro_f1")}
        found["classes"] = len(np.unique(predictions))
        found["majority"] = 100 * int(np.bincount(labels, minlength=1).max()) / max(len(labels), 1)
    return found

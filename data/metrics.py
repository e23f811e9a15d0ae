"""Metrics of predictions: the five in which GLUE's tasks are reported, the macro-F1, and scores of tagged words.

Each metric takes arrays of N predictions and N labels and returns a float. Where a metric is not defined (a constant
prediction has no correlation) it is 0.0, never NaN, so that one collapsed run does not spoil a mean over tasks or
seeds.

Labels are class ids for accuracy, f1, macro_f1 and matthews, and numbers for pearson and spearman. f1 and matthews are
for two classes, of which class 1 is the positive one:

                    label 1    label 0
    predicted 1       tp         fp
    predicted 0       fn         tn
"""

import math
from collections.abc import Iterable, Sequence

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
    if not all(len(x) and np.isfinite(x).all() and x.min() < x.max() for x in (p, q)):
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


METRICS = {each.__name__: each for each in (accuracy, f1, macro_f1, matthews, pearson, spearman)}
# The marks of IOBES, BILOU and BMES as those of IOB2: a span of one word, the end of a span, its middle.
IOB2 = {"S-": "B-", "U-": "B-", "E-": "I-", "L-": "I-", "M-": "I-"}


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
    found = {name: 100 * METRICS[name](predictions, labels) for name in metrics}
    found |= {"score": sum(found.values()) / len(metrics), "total": len(labels)}
    if not {*metrics} & {"pearson", "spearman"}:  # of a regression
        found["correct"] = int((predictions == labels).sum())
        found |= {name: 100 * METRICS[name](predictions, labels) for name in ("accuracy", "macro_f1")}
        found["classes"] = len(np.unique(predictions))
        found["majority"] = 100 * int(np.bincount(labels, minlength=1).max()) / max(len(labels), 1)
    return found


def score_sequences(metrics: tuple[str, ...], predictions: np.ndarray, labels: np.ndarray) -> dict:
    """scores() of the rows of a file in their order, and of classes also "correct_rows": which rows are right, bits in
    hexadecimal, for paired differences.
    """
    found = scores(metrics, predictions, labels)
    if "correct" in found:
        found["correct_rows"] = np.packbits(predictions == labels).tobytes().hex()
    return found


# ------------------------------------------------------------------------------ vectors of sentences
def finds_own(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whether the nearest row of the other matrix, by cosine, is the one with the same number: from first to second and
    back, bool (2, N). Its mean is the accuracy of retrieval, as Tatoeba is scored (Artetxe and Schwenk 2019).

    first, second: (N, C), rows of length 1.

    >>> a, b = np.array([[1, 0], [0, 1]]), np.array([[0.8, 0.6], [1, 0]])
    >>> finds_own(a, b).tolist()  # a[0] finds b[1], a[1] finds b[0]; both rows of b find a[0]
    [[False, False], [True, False]]
    """
    similarity = first @ second.T  # (N, N)
    return np.stack([similarity.argmax(axis=axis) == np.arange(len(first)) for axis in (1, 0)])


def sentence_scores(metric: str, vectors: np.ndarray, scores: np.ndarray | None, reference: np.ndarray | None) -> dict:
    """The evaluation of sentence vectors (N, C): the metric and "cosine", both in %, and "score", which is the metric.

    metric: "retrieval" (in which "correct_rows" are the bits of finds_own), "spearman" (of the cosines of pairs with their
    scores), or "cosine".  reference: float32 vectors
    of the same sentences: "cosine" is the mean cosine to them.
    """
    found = {"total": len(vectors)}
    if reference is not None:
        found["cosine"] = 100 * float((vectors * reference).sum(axis=1, dtype=np.float64).mean())
    if metric != "cosine":
        first, second = np.split(vectors, 2)
        found["total"] //= 2
        if metric == "spearman":
            found[metric] = 100 * spearman((first * second).sum(axis=1, dtype=np.float64), scores)
        else:
            right = finds_own(first, second)
            found |= {metric: 100 * float(right.mean()), "correct_rows": np.packbits(right).tobytes().hex()}
    return found | {"score": found[metric]}


# ----------------------------------------------------------------------------------- tags of words
def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The slots of a sentence: (type, first word, word after the last).

    As in conlleval, an I-x that continues no x begins a new slot.

    >>> sorted(spans(["B-from", "I-from", "O", "I-to"]))
    [('from', 0, 2), ('to', 3, 4)]
    """
    found, kind, begin = set(), None, 0  # of the span that is open at this word
    for i, tag in enumerate((*tags, "O")):
        if kind is None or tag != f"I-{kind}":
            if kind is not None:
                found.add((kind, begin, i))
            kind, begin = (None if tag == "O" else tag[2:]), i
    return found


def are_spans(tags: Iterable[str]) -> bool:
    """Whether all tags are O or those of spans, such as B-x, I-x and S-x."""
    return all(tag == "O" or (tag[:2] in ("B-", "I-", *IOB2) and len(tag) > 2) for tag in tags)


def slot_scores(predictions: list[Sequence[str]], labels: list[Sequence[str]]) -> dict:
    """Scores of the tags of many sentences.

    slot_f1          F1 in % over all slots of all sentences (conlleval's; 0 if nothing is right)
    slot_correct, slot_gold, slot_predicted     the counts behind it: of slots in both, in labels, in predictions
    slot_token_f1    micro-averaged F1 in % over the tags of single words, O included: as every wrong word is one false
                     positive and one false negative, the accuracy of the tags. Work on ATIS with tensor-compressed
                     Transformers reports it as "F1"; it is higher than slot_f1, since most words are O.
    """
    found, true = ({(i, *span) for i, row in enumerate(rows) for span in spans(row)} for rows in (predictions, labels))
    words = [a == b for rows in zip(predictions, labels, strict=True) for a, b in zip(*rows, strict=True)]
    return {
        "slot_f1": 100 * 2 * len(true & found) / max(len(true) + len(found), 1),
        "slot_correct": len(true & found),
        "slot_gold": len(true),
        "slot_predicted": len(found),
        "slot_token_f1": 100 * sum(words) / max(len(words), 1),
    }


def runs(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Runs of equal tags as spans. XGLUE's script gives tags of parts of speech to a scorer of IOB spans, which reads
    them like this; it takes the S of SCONJ and SYM for the mark of a span of one word.
    """
    found, begin = set(), 0
    for i, tag in enumerate(tags, start=1):
        if i == len(tags) or tags[i] != tag or tag[0] == "S":
            found.add((tag, begin, i))
            begin = i
    return found


def token_scores(
    slots: list[np.ndarray], tags: list[np.ndarray], names: tuple[str, ...], metrics: tuple[str, ...]
) -> dict:
    """The evaluation of a task with a tag per word: what scores() returns for the words, and in %

    f1          of the spans, if the tags are spans (O, B-x, I-x); else macro_f1
    precision   if they are none: what XGLUE's script calls accuracy of parts of speech: correct runs of equal tags, of
                all predicted ones
    score       the mean of `metrics`
    """
    found = scores(("accuracy",), np.concatenate(slots), np.concatenate(tags))
    predicted, true = ([[names[i] for i in row] for row in rows] for rows in (slots, tags))
    if are_spans(names):
        spanned = slot_scores(predicted, true)
        found |= {key: spanned[f"slot_{key}"] for key in ("f1", "gold", "predicted")}
    else:
        both = sum(len(runs(a) & runs(b)) for a, b in zip(predicted, true, strict=True))
        found["precision"] = 100 * both / max(sum(len(runs(row)) for row in predicted), 1)
        found["f1"] = found["macro_f1"]
    return found | {"score": sum(found[name] for name in metrics) / len(metrics)}


def joint_scores(
    predictions: np.ndarray, labels: np.ndarray, slots: list[np.ndarray], tags: list[np.ndarray], names: tuple[str, ...]
) -> dict:
    """The evaluation of a joint task: accuracy of the intents, slot_scores(), "exact" (sentences with everything
    correct, in %), and "score", the mean of accuracy and slot_f1.

    slots, tags: predicted and true ids of the words of each sentence.  names: of the tags.
    """
    found = scores(("accuracy",), predictions, labels)
    found |= slot_scores(*([[names[i] for i in row] for row in rows] for rows in (slots, tags)))
    whole = (np.array_equal(a, b) for a, b in zip(tags, slots, strict=True))
    exact = sum(bool(a and b) for a, b in zip(predictions == labels, whole, strict=True))
    score = (found["accuracy"] + found["slot_f1"]) / 2
    return found | {"exact": 100 * exact / len(labels), "exact_correct": exact, "score": score}

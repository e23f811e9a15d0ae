"""tools/make_mini.py: the committed files, correct labels, and no single cue that predicts a label."""

import itertools
import lzma
import os
import random
import re
import unicodedata
from collections import Counter
from dataclasses import fields, replace

import pytest
import torch

from data import tasks
from kit.common import UserError
from tools import make_mini as mini
from tools.make_mini import LABELS, LANGUAGES, LEXICON, Meaning, realize

MINI = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data", "mini")
FILES = ("XNLI-MT-1.0/multinli/multinli.train.en.tsv", "XNLI-1.0/xnli.dev.tsv", "XNLI-1.0/xnli.test.tsv")
SCRIPTS = {"ar": "ARABIC", "ur": "ARABIC", "hi": "DEVANAGARI", "th": "THAI", "zh": "CJK"}
SCRIPTS |= {"el": "GREEK", "bg": "CYRILLIC", "ru": "CYRILLIC"}


@pytest.fixture(scope="module")
def pairs():
    rng = random.Random(5)
    return [(*mini.make_pair(rng, label), label) for label in LABELS * 1000]


def read_bytes(folder):
    contents = {}
    for name in FILES:
        with lzma.open(os.path.join(folder, name + ".xz")) as file:
            contents[name] = file.read()
    return contents


# ------------------------------------------------------------------------------------------- files
def test_the_committed_files_are_what_the_program_writes(tmp_path, capsys):
    """Compared after decompression: another version of liblzma may compress differently."""
    assert mini.main(["--out", str(tmp_path)]) == 0
    assert "wrote mini-XNLI" in capsys.readouterr().out
    assert read_bytes(tmp_path) == read_bytes(MINI)


def test_files_read_as_xnli():
    train = tasks.load(tasks.find_task("xnli"), "train", "en", MINI)
    assert Counter(row.label for row in train) == {0: 5000, 1: 5000, 2: 5000}
    assert LANGUAGES == tuple(tasks.find_task("xnli").languages)
    for split in ("dev", "test"):
        english = [row.label for row in tasks.load(tasks.find_task("xnli"), split, "en", MINI)]
        assert Counter(english) == {0: 250, 1: 250, 2: 250}
        for language in LANGUAGES:
            rows = tasks.load(tasks.find_task("xnli"), split, language, MINI)
            assert [row.label for row in rows] == english  # parallel, row by row
            assert all(row.text_a != row.text_b for row in rows)


def test_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        mini.generate(str(tmp_path / name), seed=seed, train=60, per_language=30)
    a, b, c = (read_bytes(tmp_path / name) for name in "abc")
    assert a == b
    assert all(a[name] != c[name] for name in a)
    left = [name for _, _, names in os.walk(tmp_path) for name in names if ".part" in name]
    assert left == []


def test_splits_share_no_premise():
    used = set()
    premises = []
    for split, size in (("test", 750), ("dev", 750), ("train", 12000)):
        rows = mini.make_split(random.Random(split), size, used)
        premises.append({mini.content(premise) for premise, _, _ in rows})
    for one, other in itertools.combinations(premises, 2):
        assert not one & other


def test_splits_share_no_premise_sentence():
    texts = [
        {row.text_a for row in tasks.load(tasks.find_task("xnli"), split, "en", MINI)}
        for split in ("train", "dev", "test")
    ]
    for one, other in itertools.combinations(texts, 2):
        assert not one & other


def test_errors(tmp_path, capsys):
    with pytest.raises(UserError, match="multiple of 3"):
        mini.generate(str(tmp_path), train=100)
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert mini.main(["--out", str(blocked)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot write") and error.count("\n") == 1
    with pytest.raises(ValueError, match="15 cells"):
        mini.read_lexicon("name eve someone : Eve ; Eve")
    line = "name eve someone : " + " ; ".join(["Eve"] * 15)
    with pytest.raises(ValueError, match="twice"):
        mini.read_lexicon(line + "\n" + line)


# ----------------------------------------------------------------------------------------- lexicon
def object_names():
    classes = {name for name in LEXICON if LEXICON[name].parent == "thing"}
    return mini.concepts("object") + tuple(classes) + ("thing",)


def test_every_concept_has_every_language_and_its_second_form():
    assert len(LEXICON) >= 100
    for concept in LEXICON.values():
        assert set(concept.forms) == set(LANGUAGES)
        assert all(form for form, _ in concept.forms.values())
        assert concept.parent is None or concept.parent in LEXICON
        if concept.kind == "class":
            assert sum(other.parent == concept.name for other in LEXICON.values()) >= 2
        if concept.kind in ("verb", "same"):
            assert concept.forms["tr"][1]
        if concept.kind == "verb":  # opposites name each other
            assert LEXICON[concept.parent].parent == concept.name
    for name in object_names():
        forms = LEXICON[name].forms
        assert forms["sw"][1] in ("vya", "za", "ya", "wa"), name
        assert all(forms[language][1] is not None for language in ("vi", "zh", "th")), name
        assert forms["ru"][1], name
        assert all(forms[language][1] in (None, "f") for language in mini.FEMININE), name


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_two_concepts_share_a_form(language):
    counts = Counter(concept.forms[language][0] for concept in LEXICON.values())
    assert [form for form, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_are_in_the_right_script(language):
    for meaning in mini.random_meanings(random.Random(1), 300):
        text = re.sub("Alex|Kim", "", realize(meaning, language))
        letters = {unicodedata.name(letter).split()[0] for letter in text if letter.isalpha()}
        assert letters == {SCRIPTS.get(language, "LATIN")}


@pytest.mark.parametrize("language", LANGUAGES)
def test_different_meanings_are_different_sentences(language, pairs):
    meanings = set(mini.random_meanings(random.Random(2), 2000))
    meanings |= {meaning for row in pairs for meaning in row[:2]}
    texts = {realize(meaning, language) for meaning in meanings}
    assert len(texts) == len(meanings)
    assert not any("None" in text or "  " in text for text in texts)


def test_word_order_and_agreement():
    rich = Meaning("teacher", "buy", "orange", 5, "blue", "garden", "may", fronted="time")
    assert {language: realize(rich, language) for language in ("de", "fr", "ru", "sw", "zh")} == {
        "de": "Im Mai wird der Lehrer im Garten 5 blaue Orangen kaufen.",
        "fr": "En mai le professeur achètera 5 oranges bleues dans le jardin.",
        "ru": "В мае учитель купит 5 синих апельсинов в саду.",
        "sw": "Mwezi wa Mei mwalimu atanunua machungwa 5 ya rangi ya bluu bustanini.",
        "zh": "五月，老师会在花园里买5个蓝色的橙子。",
    }
    plain = Meaning("kim", "buy", "orange", negated=True)
    assert {language: realize(plain, language) for language in ("de", "fr", "sw", "tr", "ar")} == {
        "de": "Kim wird nicht Orangen kaufen.",
        "fr": "Kim n'achètera pas d'oranges.",
        "sw": "Kim hatanunua machungwa.",
        "tr": "Kim portakal almayacak.",
        "ar": "Kim لن يشتري برتقالات.",
    }
    got = Meaning("kim", "get", "orange", negated=True)
    assert realize(got, "hi") == "Kim संतरे हासिल नहीं करेगा।"
    assert realize(got, "ur") == "Kim مالٹے حاصل نہیں کرے گا۔"
    fronted = Meaning("kim", "find", "axe", place="garden", negated=True, fronted="place")
    assert realize(fronted, "de") == "Im Garten wird Kim nicht Äxte finden."
    assert realize(fronted, "fr") == "Dans le jardin Kim ne trouvera pas de haches."


def test_the_example_in_the_docstring():
    premise = Meaning("teacher", "buy", "apple", number=5, place="garden")
    wider = replace(premise, action="purchase", object="fruit", number=None, fronted="place")
    examples = [realize(premise, language) for language in ("en", "tr", "zh")]
    for hypothesis, label in (
        (wider, "entailment"),
        (replace(premise, colour="red", place=None), "neutral"),
        (replace(premise, place="school"), "contradiction"),
    ):
        examples.append(f"{label:<15}{realize(hypothesis, 'en')}")
        assert oracle(premise, hypothesis) == label
    for example in examples:
        assert example in mini.__doc__


# ---------------------------------------------------------------------------------------- labels
# The oracle enumerates the events that could have happened and evaluates both sentences in each. It
# shares the lexicon with the generator, but no code.
ATTRIBUTES = ("name", "role", "verb", "object", "number", "colour", "place", "time")
UNIVERSE = {
    kind: {concept.name for concept in LEXICON.values() if concept.kind == kind} | {"other"}
    for kind in ATTRIBUTES
    if kind != "number"
} | {"number": set(range(1, 100))}


def fitting(meaning):
    """attribute -> the values that the sentence without its negation allows."""

    def below(name):
        children = {concept.name for concept in LEXICON.values() if concept.parent == name}
        return {name}.union(*(below(child) for child in children))

    stated = {
        "object": meaning.object,
        "number": meaning.number,
        "colour": meaning.colour,
        "place": meaning.place,
        "time": meaning.time,
    }
    if meaning.agent != "someone":
        stated[LEXICON[meaning.agent].kind] = meaning.agent
    verb = LEXICON[meaning.action]
    stated["verb"] = verb.parent if verb.kind == "same" else verb.name
    allowed = {}
    for attribute in ATTRIBUTES:
        value = stated.get(attribute)
        if value is None:
            allowed[attribute] = UNIVERSE[attribute]
        elif attribute in ("number", "verb"):
            allowed[attribute] = {value}
        else:
            allowed[attribute] = below(value) & UNIVERSE[attribute]
    return allowed


def oracle(premise, hypothesis):
    one, other = fitting(premise), fitting(hypothesis)
    # Values that fit the same sentences are interchangeable: one of each sort is enough.
    sorts = [{(value in one[name], value in other[name]) for value in UNIVERSE[name]} for name in ATTRIBUTES]
    outcomes = set()
    for event in itertools.product(*sorts):
        if all(fits for fits, _ in event) != premise.negated:
            outcomes.add(all(fits for _, fits in event) != hypothesis.negated)
    return {(True,): "entailment", (False,): "contradiction"}.get(tuple(outcomes), "neutral")


def test_oracle_on_pairs_judged_by_hand():
    positive = Meaning("teacher", "buy", "apple", 5, place="garden")
    negative = replace(positive, negated=True)
    for premise, hypothesis, label in (
        (positive, replace(positive, object="fruit", action="purchase", number=None), "entailment"),
        (positive, replace(positive, agent="someone", place="outside"), "entailment"),
        (positive, replace(positive, place="school", negated=True), "entailment"),
        (positive, replace(positive, colour="red"), "neutral"),
        (positive, replace(positive, agent="omar"), "neutral"),  # Omar may be the teacher
        (positive, replace(positive, number=6), "contradiction"),
        (positive, replace(positive, action="sell"), "contradiction"),
        (positive, replace(positive, place=None, negated=True), "contradiction"),
        (negative, replace(negative, colour="red"), "entailment"),
        (negative, replace(negative, object="fruit"), "neutral"),
        (negative, replace(positive, colour="red"), "contradiction"),
        (negative, replace(positive, object="pear"), "neutral"),
    ):
        assert oracle(premise, hypothesis) == label, (premise, hypothesis)


def test_labels_agree_with_the_oracle(pairs):
    wrong = [row for row in pairs if oracle(row[0], row[1]) != row[2]]
    assert wrong == []


def test_ambiguous_negations_are_never_made(pairs):
    for premise, hypothesis, _ in pairs:
        if premise.negated or hypothesis.negated:
            assert "someone" not in (premise.agent, hypothesis.agent)


# ------------------------------------------------------------------------------------------- cues
def test_negation_and_levels_are_balanced():
    totals = {
        label: (sum(cell[2] for cell in cells if cell[0]), sum(cell[2] for cell in cells))
        for label, cells in mini.CELLS.items()
    }
    assert set(totals.values()) == {(2, 16)}
    for relation, negated in itertools.product(("clash", "detail"), (False, True)):
        slots = mini.deciding_slots(relation, negated)
        for slot, side in itertools.product(slots, (0, 1)):
            shares = mini.slot_shares(slot, negated)[side]
            deciding = [(row[side], row[2]) for row in mini.DECIDING_LEVELS[relation][slot]]
            left = mini.remaining_shares(shares, deciding, 1 / len(slots))
            assert min(left) > -1e-9 and abs(sum(left) - 1) < 1e-9, (relation, slot, side, left)


def words(text):
    return text.lower().rstrip(".").split()


def bags(rows, vocabulary, premise):
    """Word counts of the hypotheses, and beside them of the premises: (rows, words) or twice as wide."""
    found = torch.zeros(len(rows), 2 * len(vocabulary))
    for i, row in enumerate(rows):
        for side, text in enumerate((row.text_b, row.text_a) if premise else (row.text_b,)):
            for word in words(text):
                if word in vocabulary:
                    found[i, side * len(vocabulary) + vocabulary[word]] += 1
    return found


def overlaps(rows):
    """Number of shared words, their share of the hypothesis, both lengths: (rows, 4)."""
    found = []
    for row in rows:
        one, other = words(row.text_a), words(row.text_b)
        shared = sum((Counter(one) & Counter(other)).values())
        found.append((shared, shared / len(other) * 10, len(one), len(other)))
    return torch.tensor(found)


def linear_accuracy(train, train_labels, test, test_labels):
    """Accuracy in % of a multinomial logistic regression (L-BFGS, full batch)."""
    mean, scale = train.mean(0), train.std(0).clamp_min(1e-3)
    train, test = (train - mean) / scale, (test - mean) / scale
    weight = torch.zeros(train.shape[1], 3, requires_grad=True)
    bias = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(train @ weight + bias, train_labels)
        loss = loss + 1e-4 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    right = (test @ weight + bias).argmax(1) == test_labels
    return 100 * right.float().mean().item()


@pytest.mark.parametrize(("cue", "limit"), [("both bags of words", 45), ("hypothesis alone", 45), ("overlap", 60)])
def test_no_single_cue_gives_the_label(cue, limit):
    """Chance is 33.3 %. Dev and test together: 1,500 rows, standard error 1.2 points."""
    train = tasks.load(tasks.find_task("xnli"), "train", "en", MINI)
    test = [row for split in ("dev", "test") for row in tasks.load(tasks.find_task("xnli"), split, "en", MINI)]
    if cue == "overlap":
        features = [overlaps(train), overlaps(test)]
    else:
        seen = sorted({word for row in train for word in words(row.text_a + " " + row.text_b)})
        vocabulary = {word: i for i, word in enumerate(seen)}
        features = [bags(rows, vocabulary, cue == "both bags of words") for rows in (train, test)]
    labels = [torch.tensor([row.label for row in rows]) for rows in (train, test)]
    accuracy = linear_accuracy(features[0], labels[0], features[1], labels[1])
    print(f"{cue}: {accuracy:.1f} %")
    assert accuracy < limit


def test_near_misses_differ_in_one_slot():
    rng = random.Random(3)
    slots = Counter()
    for meaning in mini.random_meanings(rng, 3000):
        one, other = (mini.content(m) for m in (meaning, mini.near_miss(rng, meaning)))
        changed = [f.name for f in fields(Meaning) if getattr(one, f.name) != getattr(other, f.name)]
        assert len(changed) == 1, (meaning, changed)
        assert not (other.negated and other.agent == "someone")
        slots[changed[0]] += 1
    assert set(slots) == {*mini.SLOTS, "negated"} and min(slots.values()) > 100


def test_meaning_is_frozen_and_has_a_field_for_each_slot():
    assert {field.name for field in fields(Meaning)} >= set(mini.SLOTS)
    with pytest.raises(AttributeError):
        Meaning("omar", "buy", "apple").agent = "ali"

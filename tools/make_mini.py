"""mini-XNLI: a synthetic data set in XNLI's 15 languages and file layout.

    python tools/make_mini.py --out data/mini     # a few seconds; this made the committed files

Each label follows from a rule, each sentence exists in all 15 languages, and one table (LEVELS) sets the difficulty.

A Meaning says who does what, how many, of what colour, where and when. realize() turns it into a sentence with the
word order of a language:

    Meaning("teacher", "buy", "apple", number=5, place="garden")
    en  The teacher will buy 5 apples in the garden.
    tr  Öğretmen bahçede 5 elma alacak.
    zh  老师会在花园里买5个苹果。

Both sentences of a pair describe the same single event. A sentence is true if everything it says fits the event; a
negated sentence is true if something does not fit. The label compares the events in which the two sentences are true.
For the premise above:

    entailment     In the garden the teacher will purchase fruits.   says less, in wider words
    neutral        The teacher will buy 5 red apples.                says something more
    contradiction  The teacher will buy 5 apples at the school.      says something else

Negation reverses this: the premise entails "will not buy apples at the school" and contradicts "will not buy fruits".

No word alone predicts a label, because every slot (colour, place, ...) of the premise and of the hypothesis has the
same distribution for each label. In the pair "neutral" above, the slot that decides the label (colour) must be filled
in the hypothesis, so the slots that do not decide are filled a little less often, see remaining_shares(). Negation is
balanced by the weights in CELLS. A linear classifier on the words therefore learns nothing; only a comparison of the
two sentences gives the label. tests/test_make_mini.py measures this.
"""

import argparse
import lzma
import os
import random
import sys
from dataclasses import dataclass, replace
from typing import NamedTuple

if __package__ in (None, ""):  # run as a script: put the repository root on the path
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from kit.common import exit_status
from kit.files import atomic_write, check_writable
from tools.mini_lexicon import COLUMNS, FEMININE, NOT_LATE, OBJECT, SENTENCE, STOP, TABLE, VERB, WILL

LANGUAGES = tuple(sorted(COLUMNS))
LABELS = ("entailment", "neutral", "contradiction")
SLOTS = ("agent", "action", "object", "number", "colour", "place", "time")


@dataclass(frozen=True)
class Meaning:
    """A sentence without its language. Values are names of lexicon lines; None: not mentioned.

    fronted ("place", "time" or None) and the choice of a synonym ("buy", "purchase") change the wording only.
    """

    agent: str
    action: str
    object: str
    number: int | None = None
    colour: str | None = None
    place: str | None = None
    time: str | None = None
    negated: bool = False
    fronted: str | None = None


# ----------------------------------------------------------------------------------------- lexicon
class Concept(NamedTuple):
    """One line of the lexicon. forms: language -> (form, second form or None)."""

    kind: str
    name: str
    parent: str | None
    forms: dict[str, tuple[str, str | None]]


def read_lexicon(table: str) -> dict[str, Concept]:
    """Concepts by name, of lines "kind name parent : 15 cells"."""
    lexicon = {}
    for line in filter(str.strip, table.splitlines()):
        head, cells = line.split(" : ")
        kind, name, parent = head.split()
        forms = {}
        for language, cell in zip(COLUMNS, cells.split(" ; "), strict=True):
            form, slash, second = cell.partition("/")
            forms[language] = (form.strip(), second.strip() if slash else None)
        lexicon[name] = Concept(kind, name, None if parent == "-" else parent, forms)
    return lexicon


LEXICON = read_lexicon(TABLE)


def concepts(*kinds: str) -> tuple[str, ...]:
    """Names of the concepts of these kinds, in the order of the lexicon."""
    return tuple(concept.name for concept in LEXICON.values() if concept.kind in kinds)


EXACT = {slot: concepts(slot) for slot in SLOTS}  # the most specific values of object, colour, place and time
EXACT |= {"agent": concepts("name", "role"), "action": concepts("verb"), "number": (5, 6, 7, 8, 9, 10)}
SYNONYM = {LEXICON[name].parent: name for name in concepts("same")}  # "buy" -> "purchase"


def content(meaning: Meaning) -> Meaning:
    """The meaning without its wording: no synonym, nothing fronted."""
    action = LEXICON[meaning.action]
    verb = action.parent if action.kind == "same" else action.name
    return replace(meaning, action=verb, fronted=None)


# --------------------------------------------------------------------------------------- sentences
def realize(meaning: Meaning, language: str) -> str:
    """The sentence of a meaning in one language, with its capital letter and full stop."""

    def phrase(slot: str) -> str:
        value = getattr(meaning, slot)
        return "" if value is None else LEXICON[value].forms[language][0]

    agent, front = phrase("agent"), phrase(meaning.fronted) if meaning.fronted else ""
    parts = {
        "FRONT": front + "，" if front and language == "zh" else front,
        "AGENT": agent,
        "FIRST": front or agent,
        "SECOND": agent if front else "",
        "WILL": WILL[language][meaning.negated] if language in WILL else "",
        "NOT": "nicht" if meaning.negated else "",  # only German word order has a place for it
        "V": verb_phrase(meaning, language),
        "OBJECT": object_phrase(meaning, language),
        "PLACE": "" if meaning.fronted == "place" else phrase("place"),
        "TIME": "" if meaning.fronted == "time" else phrase("time"),
    }
    text = join([parts[name] for name in SENTENCE[language].split()], language)
    capital = "İ" if language == "tr" and text[0] == "i" else text[0].upper()
    return capital + text[1:] + STOP.get(language, ".")


def join(words: list[str], language: str) -> str:
    """Join the words that are not empty, with spaces where the language writes spaces."""
    return ("" if language in ("zh", "th") else " ").join(word for word in words if word)


def verb_phrase(meaning: Meaning, language: str) -> str:
    """The verb with its future and negation."""
    verb, second = LEXICON[meaning.action].forms[language]
    template = VERB[language][meaning.negated]
    if meaning.negated and language in NOT_LATE:
        words, last = verb.split(), NOT_LATE[language]
        return " ".join(words[:-last] + [template.format(v=" ".join(words[-last:]))])
    if meaning.negated and language == "fr":
        verb = elide("ne", verb)
    return template.format(v=verb, w=second)


def object_phrase(meaning: Meaning, language: str) -> str:
    """Number, colour and noun. Only these agree with each other (see mini_lexicon.py)."""
    noun, mark = LEXICON[meaning.object].forms[language]
    number, colour = str(meaning.number or ""), ""
    if meaning.colour:
        colour, second = LEXICON[meaning.colour].forms[language]
        feminine = language in FEMININE and mark == "f"
        if second and (feminine or (language == "ru" and number)):
            colour = second
    if language in ("ru", "bg") and number:
        noun = mark or noun
    if language == "sw" and colour:
        colour = f"{mark} {colour}"
    classifier = mark if language in ("vi", "zh", "th") and number else ""
    if language == "fr" and not number:
        noun = elide("de", noun) if meaning.negated else "des " + noun
    if language == "th" and number:
        number = f" {number} "  # Thai puts spaces around digits, not between words
    parts = {"N": number, "C": colour, "O": noun, "K": classifier}
    return join([parts[name] for name in OBJECT[language].split()], language)


def elide(particle: str, word: str) -> str:
    """French: "de", "pommes" -> "de pommes"; "de", "oranges" -> "d'oranges" (the h of haches is aspirated: "de haches")."""
    return f"{particle[0]}'{word}" if word[0] in "aeéiou" else f"{particle} {word}"


# ------------------------------------------------------------------------------------------- pairs
# Level of detail of a slot: 0 nothing (agent: "someone", object: "things"), 1 a class ("fruits",
# "outdoors", "in winter"), 2 an exact value. Each slot has the distributions of the levels 0, 1, 2 in
# the premise and in the hypothesis, the same for each label. A hypothesis says less than its premise on
# average, as an entailment does. Larger probabilities of level 2 make longer sentences and a harder task.
LEVELS = {
    "agent": ((0.2, 0, 0.8), (0.3, 0, 0.7)),
    "action": ((0, 0, 1), (0, 0, 1)),
    "object": ((0.05, 0.2, 0.75), (0.15, 0.35, 0.5)),
    **dict.fromkeys(("number", "colour"), ((0.5, 0, 0.5), (0.7, 0, 0.3))),
    **dict.fromkeys(("place", "time"), ((0.45, 0.1, 0.45), (0.6, 0.15, 0.25))),
}

# label -> (hypothesis negated, relation, weight). For each label 2 of 16 hypotheses are negated; premises never are.
# The relation ignores the negation:
#   within  the hypothesis says no more than the premise
#   clash   in one slot, the deciding one, the two say different things
#   detail  in the deciding slot the hypothesis says more
CELLS = {
    "entailment": ((False, "within", 14), (True, "clash", 2)),
    "contradiction": ((False, "clash", 14), (True, "within", 2)),
    "neutral": ((False, "detail", 14), (True, "detail", 2)),
}

# relation -> deciding slot -> (level in the premise, level in the hypothesis, probability).
CLASSED = ("object", "place", "time")  # slots whose exact values belong to classes
DECIDING_LEVELS = {
    "within": dict.fromkeys(SLOTS, ()),
    "clash": dict.fromkeys(SLOTS, ((2, 2, 1.0),))
    | dict.fromkeys(CLASSED, ((2, 2, 0.6), (1, 2, 0.15), (2, 1, 0.15), (1, 1, 0.1))),
    "detail": dict.fromkeys(SLOTS, ((0, 2, 1.0),))
    | dict.fromkeys(CLASSED, ((0, 1, 0.3), (0, 2, 0.4), (1, 2, 0.3)))
    | {"object": ((0, 1, 0.05), (0, 2, 0.15), (1, 2, 0.8))},
}


def make_pair(rng: random.Random, label: str) -> tuple[Meaning, Meaning]:
    """(premise, hypothesis) with this label, whose sentences differ in every language."""
    cells = CELLS[label]
    while True:
        negated, relation, _ = rng.choices(cells, weights=[cell[2] for cell in cells])[0]
        pair = build_pair(rng, negated, relation)
        if pair[0] != pair[1]:
            return pair


def build_pair(rng: random.Random, negated: bool, relation: str) -> tuple[Meaning, Meaning]:
    """(premise, hypothesis) for one entry of CELLS."""
    slots = deciding_slots(relation, negated)
    deciding = rng.choice(slots) if slots else None
    premise: dict = {}
    hypothesis: dict = {"negated": negated}
    for slot in SLOTS:
        joint = DECIDING_LEVELS[relation][slot]
        if slot == deciding:
            levels = rng.choices(joint, weights=[row[2] for row in joint])[0][:2]
        else:
            draw = rng.random()  # one for both, so that the hypothesis is never more exact
            probability = 1 / len(slots) if slot in slots else 0.0
            levels = []
            for side, shares in enumerate(slot_shares(slot, negated)):
                deciding_shares = [(row[side], row[2]) for row in joint]
                levels.append(quantile(remaining_shares(shares, deciding_shares, probability), draw))
        exact = rng.choice(EXACT[slot])
        clashes = slot == deciding and relation == "clash"
        other = conflicting_value(rng, slot, exact, levels) if clashes else exact
        premise[slot] = value_at(slot, exact, levels[0])
        hypothesis[slot] = value_at(slot, other, levels[1])
    return random_wording(rng, premise), random_wording(rng, hypothesis)


def deciding_slots(relation: str, negated: bool) -> tuple[str, ...]:
    """The slots that may decide the label.

    A negated sentence never has "someone" in it: "someone will not" isn't "no one will".
    """
    if relation == "within":
        return ()
    if relation == "clash":
        return SLOTS
    return tuple(slot for slot in SLOTS if slot != "action" and not (negated and slot == "agent"))


def slot_shares(slot: str, negated: bool) -> tuple[tuple, tuple]:
    """Distributions of the levels in the premise and in the hypothesis."""
    return LEVELS["action" if slot == "agent" and negated else slot]  # in a negated sentence the agent is exact, too


def remaining_shares(shares, deciding, probability: float) -> list[float]:
    """Distribution of the levels in a slot that does not decide, such that the mixture is `shares`:

    shares = probability * deciding + (1 - probability) * remaining

    deciding: [(level, share)] of the slot when it decides.  probability: how often it does.
    """
    remaining = list(shares)
    for level, share in deciding:
        remaining[level] -= probability * share
    return [share / (1 - probability) for share in remaining]


def quantile(shares, draw: float) -> int:
    """The level at the quantile `draw` (0 to 1) of a distribution."""
    return (draw >= shares[0]) + (draw >= shares[0] + shares[1])


def value_at(slot: str, exact, level: int):
    """The exact value (level 2), its class (1), or the widest value, which may be None (0)."""
    if level == 2:
        return exact
    if level == 1:
        return LEXICON[exact].parent
    return {"agent": "someone", "object": "thing"}.get(slot)


def conflicting_value(rng: random.Random, slot: str, exact, levels: tuple[int, int]):
    """A value that cannot be true together with `exact` at these levels.

    For a verb it is the opposite. A name gives a name and a role a role, for Omar may be the teacher.
    """
    if slot == "action":
        return LEXICON[exact].parent
    others = [value for value in EXACT[slot] if value != exact]
    if slot == "agent":
        others = [value for value in others if LEXICON[value].kind == LEXICON[exact].kind]
    if slot in CLASSED:
        same_class = levels == (2, 2) and rng.random() < 0.5
        others = [value for value in others if (LEXICON[value].parent == LEXICON[exact].parent) == same_class]
    return rng.choice(others)


def random_wording(rng: random.Random, slots: dict) -> Meaning:
    """A Meaning of these slots, perhaps with a synonym and perhaps with place or time fronted."""
    action = slots["action"]
    if action in SYNONYM and rng.random() < 0.5:
        action = SYNONYM[action]
    fronted = rng.choice(("place", "time", None, None))
    return Meaning(**slots | {"action": action, "fronted": fronted if slots.get(fronted) else None})


# ------------------------------------------------------------------- sentences for pretrain_mini.py
def random_meanings(rng: random.Random, count: int) -> list[Meaning]:
    """`count` different sentences with the distribution of the premises, but negated with probability 1/8."""
    meanings = {}  # a set that keeps its order
    while len(meanings) < count:
        negated = rng.random() < 1 / 8
        slots: dict = {"negated": negated}
        for slot in SLOTS:
            shares, _ = slot_shares(slot, negated)
            slots[slot] = value_at(slot, rng.choice(EXACT[slot]), quantile(shares, rng.random()))
        meanings[random_wording(rng, slots)] = None
    return list(meanings)


def near_miss(rng: random.Random, meaning: Meaning) -> Meaning:
    """The sentence with one slot changed, dropped, widened or filled, or with its negation flipped."""
    slots = [slot for slot in SLOTS if slot != "action"] * 2 + ["action"]
    slots += [] if meaning.agent == "someone" else ["negated"]
    slot = rng.choice(slots)
    value = getattr(meaning, slot)
    if slot == "negated":
        new = not value
    elif slot == "action":
        new = LEXICON[content(meaning).action].parent
    elif value in EXACT[slot] and rng.random() < 0.5 and not meaning.negated:
        new = value_at(slot, value, rng.choice((0, 1) if slot in CLASSED else (0,)))
    else:
        new = rng.choice([other for other in EXACT[slot] if other != value])
    return replace(meaning, **{slot: new})  # what was fronted may be gone: realize() puts nothing there


# ------------------------------------------------------------------------------------------- files
def make_split(rng: random.Random, size: int, used: set[Meaning]) -> list[tuple[Meaning, Meaning, str]]:
    """`size` different rows (premise, hypothesis, label), a third per label, in random order.

    No premise has the content of one in `used`, to which the new ones are added.
    """
    rows = {}  # a set that keeps its order
    for label in LABELS * (size // len(LABELS)):
        count = len(rows)
        while len(rows) == count:
            premise, hypothesis = make_pair(rng, label)
            if content(premise) not in used:
                rows[premise, hypothesis, label] = None
    used.update(content(premise) for premise, _, _ in rows)
    rows = list(rows)
    rng.shuffle(rows)
    return rows


def generate(folder: str, seed: int) -> None:
    """Write XNLI's three files, xz-compressed, under `folder`: 15,000 English rows to train on, and 750 per language in
    dev and in test. The same seed gives the same rows.
    """
    used: set[Meaning] = set()
    for split in ("test", "dev"):  # before train, so that they do not depend on its size
        rows = make_split(random.Random(f"{seed} {split}"), 750, used)
        lines = ["language\tgold_label\tsentence1\tsentence2\tpromptID\tpairID"]
        for language in LANGUAGES:
            for number, (premise, hypothesis, label) in enumerate(rows, start=1):
                texts = f"{realize(premise, language)}\t{realize(hypothesis, language)}"
                lines.append(f"{language}\t{label}\t{texts}\t{number}\t{number}")
        write_lines(os.path.join(folder, "XNLI-1.0", f"xnli.{split}.tsv.xz"), lines)
    lines = ["premise\thypo\tlabel"]
    for premise, hypothesis, label in make_split(random.Random(f"{seed} train"), 15000, used):
        label = "contradictory" if label == "contradiction" else label  # as in XNLI's own file
        lines.append(f"{realize(premise, 'en')}\t{realize(hypothesis, 'en')}\t{label}")
    write_lines(os.path.join(folder, "XNLI-MT-1.0", "multinli", "multinli.train.en.tsv.xz"), lines)


def write_lines(path: str, lines: list[str]) -> None:
    text = "\n".join([*lines, ""])
    with atomic_write(path) as file:
        file.write(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


@exit_status()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write mini-XNLI: synthetic pairs in 15 languages, in XNLI's layout.")
    parser.add_argument("--out", required=True, help="output folder")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    args = parser.parse_args(argv)
    check_writable(args.out)
    generate(args.out, args.seed)
    print(f"wrote mini-XNLI to {args.out}")


if __name__ == "__main__":
    sys.exit(main())

"""mini-XNLI: small made-up sentence pairs in XNLI's 15 languages and in XNLI's file layout.

    python data/mini.py --out data/raw/mini     # a second; then train.py --data-dir data/raw/mini

Why: the full XNLI needs a large model, its licence and hours. Here is the same kind of task,
comparing two sentences, in a controlled form: every label follows from a rule, every sentence
exists in all 15 languages, and how hard it is stands in one table (LEVELS).

A Meaning says who does what, with how many, of what colour, where and when. realize() puts it
into a language with that language's word order, so every row exists in 15 languages:

    Meaning("teacher", "buy", "apple", number=5, place="garden")
    en  The teacher will buy 5 apples in the garden.
    tr  Öğretmen bahçede 5 elma alacak.
    zh  老师会在花园里买5个苹果。

Labels. Both sentences speak of the same one event. A sentence is true if all that it says fits that
event; a negated one is true if something doesn't fit. So a sentence with more said allows fewer
events, and a label compares the events that the two sentences allow. To the premise above:

    entailment     In the garden the teacher will purchase fruits.   less said, wider words
    neutral        The teacher will buy 5 red apples.                something more said
    contradiction  The teacher will buy 5 apples at the school.      something else said

Negation turns this round: "will not buy apples at the school" is entailed, "will not buy fruits"
contradicts.

No word gives a label away, because each slot (colour, place, ...) of the hypothesis, and of the
premise, is filled by the same distribution whatever the label. If it was drawn first for one slot,
the one that makes the label ("5 red": more said, so red must be there), the other slots say a
little less than usual, so that the mean over all is what it should be: see rest(). Negation follows
the table CELLS, whose columns sum to the same numbers for each label. A linear classifier on the
words of both sentences learns nothing from equal means; the label lies only in how the two
sentences compare. tests/test_mini.py measures it.
"""

import argparse
import hashlib
import os
import random
import sys
from dataclasses import dataclass, replace

if __package__ in (None, ""):  # run as a script: put the repository root on the path
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data import UserError, exit_status
from data.mini_lexicon import (
    FEMININE,
    NOT_LATE,
    OBJECT,
    SENTENCE,
    STOP,
    TABLE,
    TABLE_LANGUAGES,
    VERB,
    WILL,
)

LANGUAGES = tuple(sorted(TABLE_LANGUAGES))
TRAIN_FILE = ("XNLI-MT-1.0", "multinli", "multinli.train.en.tsv")
LABELS = ("entailment", "neutral", "contradiction")
NUMBERS = (5, 6, 7, 8, 9, 10)
SLOTS = ("agent", "action", "object", "number", "colour", "place", "time")


@dataclass(frozen=True)
class Meaning:
    """One sentence, free of any language. The words are names of lexicon lines; None: not said.

    fronted ("place", "time" or None) and the choice between synonyms ("buy", "purchase") change
    the sentence and not what it says.
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
@dataclass(frozen=True)
class Concept:
    """One line of the table. forms: language -> (form, second form or None)."""

    kind: str
    name: str
    parent: str | None
    forms: dict[str, tuple[str, str | None]]


def read_table(text: str) -> dict[str, Concept]:
    """{name of the concept: Concept}.

    Raises UserError for a line without 15 filled cells and for a name used twice.
    """
    found: dict[str, Concept] = {}
    for line in filter(str.strip, text.splitlines()):
        head, _, rest_of_line = line.partition(" : ")
        cells = [cell.strip() for cell in rest_of_line.split(" ; ")]
        words = head.split()
        if len(words) != 3 or len(cells) != len(TABLE_LANGUAGES) or not all(cells):
            raise UserError(f"data/mini_lexicon.py: not 'kind name parent : 15 cells': {line[:60]}")
        if words[1] in found:
            raise UserError(f"data/mini_lexicon.py: {words[1]!r} is there twice")
        forms = {}
        for language, cell in zip(TABLE_LANGUAGES, cells, strict=True):
            form, slash, second = cell.partition("/")
            forms[language] = (form.strip(), second.strip() if slash else None)
        parent = None if words[2] == "-" else words[2]
        found[words[1]] = Concept(words[0], words[1], parent, forms)
    return found


LEXICON = read_table(TABLE)


def names(*kinds: str) -> tuple[str, ...]:
    """The concepts of these kinds, in the order of the table."""
    return tuple(concept.name for concept in LEXICON.values() if concept.kind in kinds)


EXACT = {  # slot -> its most exact values
    "agent": names("name", "role"),
    "action": names("verb"),
    "object": names("object"),
    "number": NUMBERS,
    "colour": names("colour"),
    "place": names("place"),
    "time": names("time"),
}
SYNONYM = {LEXICON[name].parent: name for name in names("same")}  # "buy" -> "purchase"


def content(meaning: Meaning) -> Meaning:
    """What a sentence says, whatever the wording: without synonyms and fronting."""
    action = LEXICON[meaning.action]
    verb = action.parent if action.kind == "same" else action.name
    return replace(meaning, action=verb, fronted=None)


# ---------------------------------------------------------------------------------------- sentences
VOWELS = "aeéiou"  # French: ne and de lose their e before these (the h of haches is aspirated)


def realize(meaning: Meaning, language: str) -> str:
    """The sentence of a meaning in one language, with capital and full stop where it has them."""
    if language not in LANGUAGES:
        raise UserError(f"mini-XNLI has no language {language!r}; it has: {' '.join(LANGUAGES)}")

    def phrase(slot):
        value = getattr(meaning, slot)
        said = value is not None and slot != meaning.fronted
        return LEXICON[value].forms[language][0] if said else ""

    front = getattr(meaning, meaning.fronted) if meaning.fronted else None
    parts = {
        "FRONT": LEXICON[front].forms[language][0] if front else "",
        "AGENT": phrase("agent"),
        "V": verb_phrase(meaning, language),
        "OBJECT": object_phrase(meaning, language),
        "PLACE": phrase("place"),
        "TIME": phrase("time"),
        "WILL": WILL[language][meaning.negated] if language in WILL else "",
        "NOT": "nicht" if meaning.negated else "",  # only the German template has a place for it
    }
    parts["FIRST"] = parts["FRONT"] or parts["AGENT"]
    parts["SECOND"] = parts["AGENT"] if front else ""
    if language == "zh":
        parts["FRONT"] += "，" if front else ""
    text = join([parts[name] for name in SENTENCE[language].split()], language)
    if language == "tr" and text[0] == "i":
        text = "İ" + text[1:]  # the capital of i has a dot in Turkish
    return text[0].upper() + text[1:] + STOP.get(language, ".")


def join(words: list[str], language: str) -> str:
    """The words that aren't empty, with spaces between them where the language writes spaces."""
    return ("" if language in ("zh", "th") else " ").join(word for word in words if word)


def verb_phrase(meaning: Meaning, language: str) -> str:
    """The verb with what marks future and negation around it."""
    verb, second = LEXICON[meaning.action].forms[language]
    text = VERB[language][meaning.negated].format(v=verb, w=second)
    if language == "fr" and meaning.negated and verb[0] in VOWELS:
        text = text.replace("ne ", "n'", 1)
    if meaning.negated and language in NOT_LATE:
        words, last = verb.split(), NOT_LATE[language]
        text = " ".join(words[:-last] + [VERB[language][1].format(v=" ".join(words[-last:]))])
    return text


def object_phrase(meaning: Meaning, language: str) -> str:
    """Number, colour and noun, which is all that agrees with anything (see data/mini_lexicon.py)."""
    noun, mark = LEXICON[meaning.object].forms[language]
    number = "" if meaning.number is None else str(meaning.number)
    colour = ""
    if meaning.colour:
        colour, second = LEXICON[meaning.colour].forms[language]
        feminine = language in FEMININE and mark == "f"
        if second and (feminine or (language == "ru" and number)):
            colour = second
    if language in ("ru", "bg") and number:
        noun = mark or noun
    if language == "sw" and colour:
        colour = f"{mark} {colour}"
    counting = mark if language in ("vi", "zh", "th") and number else ""
    if language == "fr" and not number:
        noun = partitive(noun, meaning.negated)
    if language == "th" and number:
        number = f" {number} "  # Thai sets off digits, not words
    parts = {"N": number, "C": colour, "O": noun, "K": counting}
    return join([parts[name] for name in OBJECT[language].split()], language)


def partitive(noun: str, negated: bool) -> str:
    """French: "des pommes", but "pas de pommes", "pas d'oranges"."""
    if not negated:
        return "des " + noun
    return ("d'" if noun[0] in VOWELS else "de ") + noun


# -------------------------------------------------------------------------------------------- pairs
# Per slot how much is said: level 0 nothing (agent: "someone", object: "things"), 1 a class
# ("fruits", "outdoors", "in winter"), 2 an exact value. Shares of the levels, the same for every
# label. A premise says more than a hypothesis on the whole: that is how entailments look, and so
# all pairs look like that. Larger shares of level 2 make longer sentences and a harder task.
LEVELS = {
    "premise": {
        "agent": (0.2, 0, 0.8), "action": (0, 0, 1), "object": (0.05, 0.2, 0.75),
        "number": (0.5, 0, 0.5), "colour": (0.5, 0, 0.5), "place": (0.45, 0.1, 0.45),
        "time": (0.45, 0.1, 0.45),
    },
    "hypothesis": {
        "agent": (0.3, 0, 0.7), "action": (0, 0, 1), "object": (0.15, 0.35, 0.5),
        "number": (0.7, 0, 0.3), "colour": (0.7, 0, 0.3), "place": (0.6, 0.15, 0.25),
        "time": (0.6, 0.15, 0.25),
    },
}  # fmt: skip

# How to build a label: (hypothesis negated, how the two compare, weight).
#   within  the hypothesis says no more than the premise
#   clash   in one slot the two say different things
#   detail  in one slot the hypothesis says more
# Each label has 2 of 16 hypotheses negated; premises never are.
CELLS = {
    "entailment": ((False, "within", 14), (True, "clash", 2)),
    "contradiction": ((False, "clash", 14), (True, "within", 2)),
    "neutral": ((False, "detail", 14), (True, "detail", 2)),
}

# (level of the premise, level of the hypothesis, share) in the slot that makes the label.
TWO = ((0, 2, 1.0),)
DETAIL = {"object": ((0, 1, 0.05), (0, 2, 0.15), (1, 2, 0.8))}
DETAIL |= dict.fromkeys(("place", "time"), ((0, 1, 0.3), (0, 2, 0.4), (1, 2, 0.3)))
CLASH = ((2, 2, 0.6), (1, 2, 0.15), (2, 1, 0.15), (1, 1, 0.1))
CLASH = dict.fromkeys(("object", "place", "time"), CLASH)


def make_pair(rng: random.Random, label: str) -> tuple[Meaning, Meaning]:
    """(premise, hypothesis) with that label. Their sentences differ in every language."""
    cells = CELLS[label]
    while True:
        cell = rng.choices(cells, weights=[cell[2] for cell in cells])[0]
        premise, hypothesis = build(rng, *cell[:2])
        if premise != hypothesis:
            return premise, hypothesis


def build(rng: random.Random, negated: bool, how: str) -> tuple[Meaning, Meaning]:
    """(premise, hypothesis) for one line of CELLS."""
    slots = target_slots(how, negated)
    target = rng.choice(slots) if slots else None
    premise: dict = {}
    hypothesis: dict = {"negated": negated}
    for slot in SLOTS:
        shares = slot_shares(slot, negated)
        joint = target_levels(slot, how)
        if slot == target:
            levels = rng.choices(joint, weights=[row[2] for row in joint])[0][:2]
        else:
            # One draw for both levels: whoever says more on the whole says no less in any slot.
            draw = rng.random()
            part = 1 / len(slots) if slot in slots else 0.0
            levels = tuple(
                quantile(rest(shares[side], [(row[side], row[2]) for row in joint], part), draw)
                for side in (0, 1)
            )
        exact = rng.choice(EXACT[slot])
        other = exact
        if slot == target and how == "clash":
            other = something_else(rng, slot, exact, levels)
        premise[slot] = at_level(slot, exact, levels[0])
        hypothesis[slot] = at_level(slot, other, levels[1])
    return reword(rng, premise), reword(rng, hypothesis)


def target_slots(how: str, negated: bool) -> tuple[str, ...]:
    """The slots that may make the label.

    "someone" keeps out of negated sentences ("someone will not" isn't "no one will").
    """
    if how == "within":
        return ()
    if how == "clash":
        return SLOTS
    return tuple(slot for slot in SLOTS if slot != "action" and not (negated and slot == "agent"))


def slot_shares(slot: str, negated: bool):
    """(shares of the premise's levels, shares of the hypothesis's levels)."""
    if slot == "agent" and negated:
        return (0, 0, 1), (0, 0, 1)
    return LEVELS["premise"][slot], LEVELS["hypothesis"][slot]


def target_levels(slot: str, how: str):
    """[(level of the premise, level of the hypothesis, share)] in the slot that makes the label."""
    if how == "clash":
        return CLASH.get(slot, ((2, 2, 1.0),))
    return DETAIL.get(slot, TWO)


def rest(shares, target, part: float):
    """The shares for a slot when it isn't the target, so that over all pairs they are `shares`.

    shares = part * target + (1 - part) * rest, solved for rest. target: [(level, share)].
    """
    if part == 0:
        return shares
    wanted = list(shares)
    for level, share in target:
        wanted[level] -= part * share
    return [share / (1 - part) for share in wanted]


def quantile(shares, draw: float) -> int:
    """The level at the point `draw` (0 to 1) of the shares laid end to end."""
    if draw < shares[0]:
        return 0
    return 1 if draw < shares[0] + shares[1] else 2


def at_level(slot: str, exact, level: int):
    """The exact value (2), its class (1), or the widest thing to say, which may be nothing (0)."""
    if level == 2:
        return exact
    if level == 1:
        return LEXICON[exact].parent
    return {"agent": "someone", "object": "thing"}.get(slot)


def something_else(rng: random.Random, slot: str, exact, levels: tuple[int, int]):
    """A value that can't be true together with `exact`, at these levels.

    A verb gives its opposite; a name gives a name and a role a role, for Omar may be the teacher.
    """
    if slot == "action":
        return LEXICON[exact].parent
    others = [value for value in EXACT[slot] if value != exact]
    if slot == "agent":
        others = [value for value in others if LEXICON[value].kind == LEXICON[exact].kind]
    if slot in CLASH:
        same = [value for value in others if LEXICON[value].parent == LEXICON[exact].parent]
        if levels == (2, 2) and rng.random() < 0.5:
            others = same  # apples and pears: the class is right, the kind isn't
        else:
            others = [value for value in others if value not in same]
    return rng.choice(others)


def reword(rng: random.Random, slots: dict) -> Meaning:
    """A Meaning of these slots with a wording drawn: a synonym or not, place or time first or not."""
    action = slots["action"]
    if action in SYNONYM and rng.random() < 0.5:
        action = SYNONYM[action]
    fronted = rng.choice(("place", "time", None, None))
    if fronted and slots[fronted] is None:
        fronted = None
    return Meaning(**{**slots, "action": action, "fronted": fronted})


def random_meaning(rng: random.Random) -> Meaning:
    """One sentence as the premises are, but one of eight is negated."""
    negated = rng.random() < 1 / 8
    slots: dict = {"negated": negated}
    for slot in SLOTS:
        shares, _ = slot_shares(slot, negated)
        slots[slot] = at_level(slot, rng.choice(EXACT[slot]), quantile(shares, rng.random()))
    return reword(rng, slots)


def near_miss(rng: random.Random, meaning: Meaning) -> Meaning:
    """The same sentence with one slot said otherwise, dropped, made wider or filled; or negated."""
    slots = [slot for slot in SLOTS if slot != "action"] * 2 + ["action"]
    slots += [] if meaning.agent == "someone" else ["negated"]
    slot = rng.choice(slots)
    value = getattr(meaning, slot)
    if slot == "negated":
        new = not value
    elif slot == "action":
        verb = LEXICON[content(meaning).action]
        new = verb.parent
    elif value in EXACT[slot] and rng.random() < 0.5 and not meaning.negated:
        levels = (0, 1) if slot in CLASH else (0,)
        new = at_level(slot, value, rng.choice(levels))
    else:
        new = rng.choice([other for other in EXACT[slot] if other != value])
    changed = replace(meaning, **{slot: new})
    if changed.fronted and getattr(changed, changed.fronted) is None:
        changed = replace(changed, fronted=None)
    return changed


def parallel_sentences(rng: random.Random, count: int) -> list[Meaning]:
    """`count` different meanings for a pretraining corpus: realize each in the languages wanted."""
    found: dict[Meaning, None] = {}  # a set that keeps its order
    while len(found) < count:
        found[random_meaning(rng)] = None
    return list(found)


# -------------------------------------------------------------------------------------------- files
def make_split(rng: random.Random, size: int, taken: set[Meaning]):
    """`size` rows (premise, hypothesis, label), a third each, in random order.

    No premise says what a premise in `taken` says; the new ones are added to it afterwards.
    """
    rows, seen = [], set()
    for number in range(size):
        label = LABELS[number % len(LABELS)]
        while True:
            premise, hypothesis = make_pair(rng, label)
            if content(premise) not in taken and (premise, hypothesis) not in seen:
                break
        seen.add((premise, hypothesis))
        rows.append((premise, hypothesis, label))
    taken.update(content(premise) for premise, _, _ in rows)
    rng.shuffle(rows)
    return rows


def generate(folder: str, seed: int = 0, train: int = 15000, per_language: int = 750) -> None:
    """Write the three files of XNLI under `folder`. Sizes are rows: train in English, per_language
    in each language of dev and of test. The same seed gives the same bytes.
    """
    for name, size in (("train", train), ("per_language", per_language)):
        if size < 3 or size % 3:
            raise UserError(f"{name} is {size}: give a multiple of 3, the number of labels")
    taken: set[Meaning] = set()
    for split in ("test", "dev"):  # first, so that they don't depend on the size of train
        rows = make_split(random.Random(f"{seed} {split}"), per_language, taken)
        lines = ["language\tgold_label\tsentence1\tsentence2\tpromptID\tpairID"]
        for language in LANGUAGES:
            for number, (premise, hypothesis, label) in enumerate(rows, start=1):
                texts = f"{realize(premise, language)}\t{realize(hypothesis, language)}"
                lines.append(f"{language}\t{label}\t{texts}\t{number}\t{number}")
        write_lines(os.path.join(folder, "XNLI-1.0", f"xnli.{split}.tsv"), lines)
    lines = ["premise\thypo\tlabel"]
    for premise, hypothesis, label in make_split(random.Random(f"{seed} train"), train, taken):
        spelled = "contradictory" if label == "contradiction" else label  # as XNLI's file has it
        lines.append(f"{realize(premise, 'en')}\t{realize(hypothesis, 'en')}\t{spelled}")
    write_lines(os.path.join(folder, *TRAIN_FILE), lines)


def cached(parent: str) -> str:
    """The folder of the set that mini is shown on, under `parent`: generated if this code and this
    lexicon haven't generated it before.
    """
    here, digest = os.path.dirname(os.path.abspath(__file__)), hashlib.sha256()
    for name in ("mini.py", "mini_lexicon.py"):
        with open(os.path.join(here, name), "rb") as file:
            digest.update(file.read())
    folder = os.path.join(parent, f"mini-xnli-{digest.hexdigest()[:12]}")
    if not os.path.exists(os.path.join(folder, *TRAIN_FILE)):  # the last of the three
        print("generating mini-XNLI, a few seconds")
        generate(folder)
    return folder


def write_lines(path: str, lines: list[str]) -> None:
    """All or nothing: a reader never sees half a file."""
    temporary = f"{path}.part{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write("\n".join(lines) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise UserError(f"cannot write {path}: {error.strerror}; name another --out") from None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write mini-XNLI: made-up inference pairs in 15 languages, in XNLI's layout.",
        epilog="example: python data/mini.py --out data/raw/mini",
    )
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--train", type=int, default=15000, help="English training rows")
    parser.add_argument("--per-language", type=int, default=750, help="dev and test rows each")
    args = parser.parse_args(argv)

    def job() -> None:
        generate(args.out, args.seed, args.train, args.per_language)
        print(
            f"wrote {args.train} train and {args.per_language} dev and test rows under {args.out}"
        )

    return exit_status(job)


if __name__ == "__main__":
    sys.exit(main())

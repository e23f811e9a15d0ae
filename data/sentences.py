"""Sentences without labels, and the pairs on which their vectors are tested (--task embed).

    train.txt    one sentence per line, in any languages; blank lines are left out
    test.tsv     columns text and text2, and, if wanted, language and score; dev.tsv likewise

Without scores text2 is the translation of text, or its answer, and must be found among all others of its language. With
scores, larger ones mean more similar. A folder without train.txt or test.tsv may have XNLI's files instead: their
premises, of which each English one must find its translation. Without dev.tsv a tenth of train is held out to choose
the epoch.
"""

import math
import os
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import chain

from data.files import Example, check_own, existing, not_empty, open_text, read_tsv
from kit.common import UserError

FILES = {"train": "train.txt", "dev": "dev.tsv", "test": "test.tsv"}
ALL = "all"  # languages


def find_sentences(xnli: dict[str, str], folder: str, split: str) -> dict[str, str]:
    """{ALL: the file of a split}.  xnli: its files, used where the folder has none of its own."""
    own, other = os.path.join(folder, FILES[split]), os.path.join(folder, *xnli[split].split("/"))
    return {ALL: other if existing(other) and not existing(own) else own}


def read_unlabelled(
    xnli: dict[str, str], read_xnli: Callable, fetch: str, folder: str, split: str
) -> dict[str, list[Example]]:
    """The sentences of train, as {ALL: ...}; the pairs of dev or test by language, {ALL: ...} if they have none."""
    path = find_sentences(xnli, folder, split)[ALL]
    if not existing(path):
        raise UserError(f"no file {path}: fetch XNLI with '{fetch}', or name a folder with --data-dir")
    if os.path.basename(path) == FILES[split]:
        return {ALL: read_sentences(path)} if split == "train" else read_pairs(path)
    found = read_xnli(folder, split)
    english = [example.text_a for example in found["en"]]
    if split == "train":
        return {ALL: [Example(text, None, None) for text in dict.fromkeys(english)]}
    if any(len(examples) != len(english) for examples in found.values()):
        raise UserError(f"{path}: its languages have different numbers of rows, so they are not translations")
    rows = dict(zip(english, range(len(english)), strict=True)).values()  # a premise has three hypotheses: one row
    return {
        name: [Example(english[i], examples[i].text_a, None) for i in rows]
        for name, examples in found.items()
        if name != "en"
    }


def read_sentences(path: str) -> list[Example]:
    with open_text(path, "") as file:
        found = [Example(line.strip(), None, None) for line in file if line.strip()]
    if len({example.text_a for example in found}) < 2:
        raise UserError(f"{path} has fewer than two different sentences: write one per line")
    return found


@lru_cache(maxsize=4)
def read_pairs(path: str) -> dict[str, list[Example]]:
    """Pairs by language; those without scores once each. Raises UserError with the line of an empty cell or a score that
    is no number.
    """
    found: dict[str, list[Example]] = {}
    for number, cells in read_tsv(path, ("text", "text2", "language", "score"), "", optional=("language", "score")):
        text, text2, language, score = (cell if cell is None else cell.strip() for cell in cells)
        where = f"{path}, line {number}"
        check_own(where, text=text, text2=text2, **({} if language is None else {"language": language}))
        if language == ALL or "|" in (language or ""):  # which would break a table
            raise UserError(f"{where}: {language[:50]!r} can't be the name of a language")
        found.setdefault(language or ALL, []).append(Example(text, text2, number_of(score, path, number)))
    for language, pairs in not_empty(found, path, "").items():
        if pairs[0].label is None:
            found[language] = list(dict.fromkeys(pairs))
        elif len({pair.label for pair in pairs}) == 1:
            raise UserError(f"{path}: all scores in language {language!r} are equal, so there is no order to compare")
    return found


def number_of(score: str | None, path: str, number: int) -> float | None:
    try:
        value = None if score is None else float(score)
    except ValueError:
        value = math.nan
    if value is not None and not math.isfinite(value):
        raise UserError(f"{path}, line {number}: the score {score[:50]!r} is no number, and all rows need one")
    return value


def merged(languages: Iterable[list[Example]]) -> list[Example]:
    """The pairs of several languages in one list; without scores their sentences alone, since a text may have a partner
    in each language.
    """
    pairs = list(chain(*languages))
    if pairs[0].label is not None:
        return pairs
    return [Example(text, None, None) for text in dict.fromkeys(chain(*(pair[:2] for pair in pairs)))]

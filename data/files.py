"""What a task is; and its text files, compressed or not, with mistakes told in the user's words."""

import codecs
import csv
import lzma
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import BinaryIO, NamedTuple, TextIO

from kit.common import UserError

csv.field_size_limit(2**31 - 1)  # the default would refuse a text of over 131,072 characters
MALFORMED = 100  # one row in a hundred may have missing columns, where that is tolerated


class Example(NamedTuple):
    """One or two texts and a label: the id of its class, or a number in a regression, or None without labels."""

    text_a: str
    text_b: str | None
    label: int | float | None


class Sentence(NamedTuple):
    """One tag per word, one intent per sentence ("" if there are none)."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    intent: str


class Names(NamedTuple):
    """The names of the ids of intents (or classes of texts) and tags.

    A model knows the first `known_*` names, those of the training files. The others occur only in dev or test: no
    model can predict them, so they count as wrong.
    """

    intents: tuple[str, ...]
    slots: tuple[str, ...]
    known_intents: int
    known_slots: int


@dataclass(frozen=True)
class Task:
    """A row of data.tasks.TASKS. Its functions are given task_folder()."""

    name: str
    # (folder, split) -> {language: examples}, split being "train", "dev" or "test"
    read: Callable[[str, str], dict[str, list[Example]] | dict[str, list[Sentence]]]
    files: dict[str, tuple[str, ...]]  # split -> the files it is read from
    fetch: str  # the command that brings the files, or tells where they come from; "" of the user's own
    head: str = "sequence"  # a key of model.HEADS
    # Names of the classes by id (of a regression: of the number), or a function of the folder if only the files know.
    labels: tuple[str, ...] | Callable[[str], tuple[str, ...] | Names] = ()
    # (folder, split) -> {language: file}, in place of `files`, if each language has a file.
    find: Callable[[str, str], dict[str, str]] | None = None
    languages: tuple[str, ...] | None = ("en",)  # the test sets; None: those in the test files
    train_language: str = "en"  # "": find_task is told
    together: int = 1  # rows of dev and test that belong together: a sample takes all of them or none
    zero_shot: bool = False  # whether reports give the mean over all but the train language
    metrics: tuple[str, ...] = ("accuracy",)  # keys of an evaluation; their mean is its "score"
    columns: dict[str, str] = field(default_factory=dict)  # of reports: title -> key of an evaluation
    subfolder: str = ""  # of the data folder, where the files usually are
    models: tuple[str, ...] = ("xlmr-base", "mini")  # the default --model: the first that is there
    sample: str | None = None  # folder under data/ to use instead of the official files with the last of `models`


# ------------------------------------------------------------------------------------------- files
def existing(path: str) -> str | None:
    """The path if there is such a file, else that of its compressed form (.xz); None if there is neither."""
    return next((name for name in (path, path + ".xz") if os.path.isfile(name)), None)


def again(fetch: str) -> str:
    """What to say of a damaged file.  fetch: as for open_text."""
    return f": fetch it again with '{fetch}'" if fetch else ""


@contextmanager
def open_text(path: str, fetch: str) -> Iterator[TextIO]:
    """Open a UTF-8 file, PATH or PATH.xz. fetch: the command that brings it or tells its source; "" if it is the user's.

    Lines end with "\\n" alone: some texts hold other characters that Python would take for a line end. A byte order
    mark at the start is dropped.
    """
    found = existing(path)
    if found is None:
        how = f"fetch it with '{fetch}', or " if fetch else ""
        raise UserError(f"no file {path}: {how}name its folder with --data-dir")
    open_file = lzma.open if found.endswith(".xz") else open
    try:
        with open_file(found, "rt", encoding="utf-8-sig", newline="\n") as file:
            refuse_utf16(file.buffer, found)
            yield file
    except UnicodeDecodeError as error:
        raise UserError(f"{found} is not UTF-8 text (byte {error.start}){again(fetch)}") from None
    except (lzma.LZMAError, EOFError):
        raise UserError(f"{found} is damaged{again(fetch)}") from None
    except OSError as error:
        raise UserError(f"cannot read {found}: {error.strerror}") from None


def refuse_utf16(file: BinaryIO, path: str) -> None:
    start = file.peek(20)[:20]
    if b"\0" in start or start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path} is UTF-16, or holds NUL bytes: save it as UTF-8")


# -------------------------------------------------------------------------------------------- rows
def read_tsv(
    path: str,
    columns: tuple[str, ...],
    fetch: str,
    header: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
    tolerant: bool = False,
) -> Iterator[tuple[int, list[str | None]]]:
    """Yield (line number, the cells of `columns`) of a tab-separated file. Quotes are ordinary characters, but not in
    the user's own files (rows_of).

    header: the names of all columns, if the first line is a row and doesn't name them. optional: columns that may be
    missing; None then. tolerant: leave out rows with too few or too many columns, if they are few.
    """
    with open_text(path, fetch) as file:
        rows, count, malformed = rows_of(file, path, own=not fetch), 0, []
        names = list(header) or next(rows, (1, [""]))[1]
        for name in columns:
            if names.count(name) > 1 or not (name in names or name in optional):
                what = "several columns are named" if name in names else "no column"
                raise UserError(f"{path}, line 1: {what} {name!r}; it has: {' '.join(names)[:200]}")
        wanted = [names.index(name) if name in names else -1 for name in columns]
        for number, cells in rows:
            count += 1
            if len(cells) == len(names):
                cells.append(None)  # of columns that are missing
                yield number, [cells[i] for i in wanted]
            elif tolerant:
                malformed.append(number)
            else:
                expected = "the layout" if header else "the header"
                raise UserError(f"{path}, line {number}: {len(cells)} columns, {expected} has {len(names)}")
        if len(malformed) * MALFORMED > count:
            what = f"line {malformed[0]} and {len(malformed) - 1:,} more have too few or too many columns"
            raise UserError(f"{path}, {what}, over {100 // MALFORMED} % of the file{again(fetch)}")


def rows_of(file: TextIO, path: str, own: bool) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of its first line, cells) of each row.  own: cells that begin with a quote are read by the csv module,
    as spreadsheets and pandas write them, and may hold tabs and line ends; blank rows at the end are left out.
    """
    if not own:
        yield from enumerate((line.rstrip("\r\n").split("\t") for line in file), start=1)
        return
    number, blank = 1, []
    for line in file:
        cells, lines = line.rstrip("\r\n").split("\t"), 1
        if any(cell.startswith('"') for cell in cells):
            reader = csv.reader(chain((line,), file), "excel-tab", strict=True)
            try:
                cells = next(reader)
                lines = reader.line_num
                # Where each line is a row, its quotes are a dialogue's, which opens in one text and closes in another.
                if lines > 1 and {each.count("\t") for each in "\t".join(cells).split("\n")} == {len(cells) - 1}:
                    raise csv.Error
            except csv.Error:
                how = """quote it whole and double the quotes in it, as pandas' to_csv(sep="\\t") does"""
                raise UserError(f"{path}, line {number}: a cell begins with a quote: {how}") from None
        if any(map(str.strip, cells)):
            yield from (*blank, (number, cells))
            blank = []
        else:
            blank.append((number, cells))
        number += lines


# ---------------------------------------------------------------------------------------- examples
@lru_cache(maxsize=40)
def read_examples(
    path: str,
    texts: tuple[str, ...],
    labels: tuple[str | tuple[str, ...], ...],
    fetch: str,
    label: str = "label",
    language: str | None = None,
    header: tuple[str, ...] = (),
    tolerant: bool = False,
) -> dict[str, list[Example]]:
    """The examples of a tab-separated file by language, "all" if it has no such column.

    texts: the column of the one or two texts; "title + body" joins two columns. labels: the spelling of each class in
    the file, or its spellings, by id; () for a number from 0 to 5. fetch, header, tolerant: see read_tsv; in the user's
    own files (no `fetch`) the columns text2 and language may be missing.

    Raises UserError with the line of what does not have the layout, and for a file without rows.
    """
    spelled = {name: i for i, names in enumerate(labels) for name in ((names,) if isinstance(names, str) else names)}
    parts = [text.split(" + ") for text in texts]
    columns, first = (*chain(*parts), label, *([language] if language else ())), len(parts[0])
    optional = () if fetch else ("text2", "language")
    found: dict[str, list[Example]] = {}
    for number, cells in read_tsv(path, columns, fetch, header, optional, tolerant):
        group = cells.pop() if language else None
        name, group = cells.pop(), "all" if group is None else group
        if not fetch:
            name, group = name.strip(), group.strip()
            check_own(f"{path}, line {number}", text=cells[0].strip(), label=name, language=group)
        value = spelled.get(name) if labels else similarity(name)
        if value is None:
            known = ", ".join(spelled)[:200] or "a number from 0 to 5"
            raise UserError(f"{path}, line {number}: unknown label {name[:50]!r}; known: {known}")
        second = cells[first:]
        text_b = " ".join(second) if second and second[0] is not None else None
        found.setdefault(group, []).append(Example(" ".join(cells[:first]), text_b, value))
    return not_empty(found, path, fetch)


def similarity(text: str) -> float | None:
    """STS-B's label: a number from 0 (unrelated) to 5 (equivalent). None of any other text."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value <= 5 else None


def check_own(where: str, **cells: str) -> None:
    """Raise UserError for an empty cell of the user's own rows, or a name that would break a line of a report."""
    for name, cell in cells.items():
        if not cell:
            raise UserError(f"{where}: the {name} is empty")
        if not name.startswith("text") and any(mark in cell for mark in "\t\r\n"):
            raise UserError(f"{where}: the {name} {cell[:50]!r} holds a tab or a line end")


def not_empty(found: dict | list, path: str, fetch: str) -> dict | list:
    if not found:
        raise UserError(f"{path} has no rows{again(fetch)}")
    return found

"""Text files of tasks: opened compressed or not, with mistakes told in the user's words."""

import codecs
import csv
import lzma
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import BinaryIO, TextIO

from kit.common import UserError

csv.field_size_limit(2**31 - 1)  # the default would refuse a text of over 131,072 characters


def existing(path: str) -> str | None:
    """The path if there is such a file, else that of its compressed form (.xz); None if there is neither."""
    return next((name for name in (path, path + ".xz") if os.path.isfile(name)), None)


def no_file(path: str, fetch: str) -> str:
    """What to say of a missing file.  fetch: as for open_text."""
    how = f"fetch it with '{fetch}', or " if fetch else ""
    return f"no file {path}: {how}name its folder with --data-dir"


@contextmanager
def open_text(path: str, fetch: str) -> Iterator[TextIO]:
    """Open a UTF-8 file, PATH or PATH.xz. fetch: the command that brings it or tells its source; "" if it is the user's.

    Lines end with "\\n" alone: some texts hold other characters that Python would take for a line end. A byte order
    mark at the start is dropped.
    """
    found, again = existing(path), f": fetch it again with '{fetch}'" if fetch else ""
    if found is None:
        raise UserError(no_file(path, fetch))
    open_file = lzma.open if found.endswith(".xz") else open
    try:
        with open_file(found, "rt", encoding="utf-8-sig", newline="\n") as file:
            refuse_utf16(file.buffer, found)
            yield file
    except UnicodeDecodeError as error:
        raise UserError(f"{found} is not UTF-8 text (byte {error.start}){again}") from None
    except (lzma.LZMAError, EOFError):
        raise UserError(f"{found} is damaged{again}") from None
    except OSError as error:
        raise UserError(f"cannot read {found}: {error.strerror}") from None


def refuse_utf16(file: BinaryIO, path: str) -> None:
    start = file.peek(20)[:20]
    if b"\0" in start or start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path} is UTF-16, or holds NUL bytes: save it as UTF-8")


def read_tsv(
    path: str,
    columns: tuple[str, ...],
    fetch: str,
    header: tuple[str, ...] = (),
    malformed: list[int] | None = None,
    optional: tuple[str, ...] = (),
) -> Iterator[tuple[int, list[str | None]]]:
    """Yield (line number, the cells of `columns` and `optional`) of a tab-separated file. Quotes are ordinary
    characters, but not in the user's own files (rows_of).

    header: the names of all columns, if the first line is a row and doesn't name them. malformed: collects the numbers
    of lines with too few or too many columns; None: they are errors. optional: columns that may be missing; None then.
    """
    with open_text(path, fetch) as file:
        rows = rows_of(file, path, own=not fetch)
        names = list(header) or next(rows, (1, [""]))[1]
        for name in (*columns, *optional):
            count = names.count(name)
            if count > 1 or (not count and name in columns):
                what = "several columns are named" if count else "no column"
                raise UserError(f"{path}, line 1: {what} {name!r}; it has: {' '.join(names)[:200]}")
        wanted = [names.index(name) if name in names else None for name in (*columns, *optional)]
        for number, cells in rows:
            if len(cells) == len(names):
                yield number, [None if i is None else cells[i] for i in wanted]
            elif malformed is not None:
                malformed.append(number)
            else:
                expected = "the layout" if header else "the header"
                if not any(map(str.strip, cells)):
                    raise UserError(f"{path}, line {number} is empty: {expected} has {len(names)} columns")
                raise UserError(f"{path}, line {number}: {len(cells)} columns, {expected} has {len(names)}")


def rows_of(file: TextIO, path: str, own: bool) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of its first line, cells) of each row.  own: cells that begin with a quote are read by the csv module,
    as spreadsheets and pandas write them, and may hold tabs and line ends; blank rows at the end are left out.
    """
    number, blank = 1, []
    for line in file:
        cells, lines = line.rstrip("\r\n").split("\t"), 1
        if own and any(cell.startswith('"') for cell in cells):
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
        if own and not any(map(str.strip, cells)):
            blank.append((number, cells))
        else:
            yield from (*blank, (number, cells))
            blank = []
        number += lines

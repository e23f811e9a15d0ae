"""Text files of tasks: opened compressed or not, with mistakes told in the user's words."""

import lzma
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from common import UserError


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
            yield file
    except UnicodeDecodeError as error:
        raise UserError(f"{found} is not UTF-8 text (byte {error.start}){again}") from None
    except (lzma.LZMAError, EOFError):
        raise UserError(f"{found} is damaged{again}") from None
    except OSError as error:
        raise UserError(f"cannot read {found}: {error.strerror}") from None


def read_tsv(
    path: str,
    columns: tuple[str, ...],
    fetch: str,
    header: tuple[str, ...] = (),
    malformed: list[int] | None = None,
    optional: tuple[str, ...] = (),
) -> Iterator[tuple[int, list[str | None]]]:
    """Yield (line number, the cells of `columns` and `optional`) of a tab-separated file. Quotes are ordinary characters.

    header: the names of all columns, if the first line is a row and doesn't name them. malformed: collects the numbers
    of lines with too few or too many columns; None: they are errors. optional: columns that may be missing; None then.
    """
    with open_text(path, fetch) as file:
        names = list(header) or file.readline().rstrip("\r\n").split("\t")
        missing = [name for name in columns if name not in names]
        if missing:
            raise UserError(f"{path}, line 1: no column {missing[0]!r}; it has: {' '.join(names)[:200]}")
        wanted = [names.index(name) if name in names else None for name in (*columns, *optional)]
        for number, line in enumerate(file, start=1 if header else 2):
            cells = line.rstrip("\r\n").split("\t")
            if len(cells) == len(names):
                yield number, [None if i is None else cells[i] for i in wanted]
            elif malformed is not None:
                malformed.append(number)
            else:
                expected = "the layout" if header else "the header"
                if not line.strip():
                    raise UserError(f"{path}, line {number} is empty: {expected} has {len(names)} columns")
                raise UserError(f"{path}, line {number}: {len(cells)} columns, {expected} has {len(names)}")

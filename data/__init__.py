"""Everything about text: tasks, tokenizers, downloads.

What every program shares stands here too, because every file imports downwards to it: how an option is
spelled, and how a user's mistake is told.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def flag(name: str) -> str:
    """An option's field -> how it is typed: "act_bits" -> "--act-bits"."""
    return "--" + name.replace("_", "-")


class UserError(Exception):
    """A mistake the user can mend: one line that says what is wrong and what to type instead."""


@contextmanager
def readable_text(path: str, again: str) -> Iterator[None]:
    """What goes wrong while a text file is read, in the user's words. again: how to get a sound one."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): {again}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def exit_status(job: Callable[[], None], after_interrupt: str = "") -> int:
    """Run a program: 0, or one line on stderr and 2 for a mistake, 130 for Ctrl-C. No traceback for
    either.
    """
    try:
        job()
        return 0
    except UserError as error:
        message, status = f"error: {error}", 2
    except OSError as error:  # a full disk, a folder that went away
        message, status = f"error: {error}", 2
    except KeyboardInterrupt:
        message, status = f"\ninterrupted{after_interrupt}", 130
    print(message, file=sys.stderr)
    return status

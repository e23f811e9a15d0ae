"""Ctrl-C in the seconds in which a program imports torch: one line instead of a traceback. From then on
common.exit_status tells it.
"""

import sys


def tell(kind: type[BaseException], error: BaseException, trace) -> None:
    if kind is KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = tell

"""Print one line instead of a traceback on Ctrl-C while a program imports torch; later common.exit_status does."""

import sys


def tell(kind: type[BaseException], error: BaseException, trace) -> None:
    if kind is KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = tell

"""What every program here shares: how a mistake of the user is told, progress lines, Markdown tables, the hardware."""

import os
import platform
import re
import sys
import time
from collections.abc import Callable
from functools import wraps

import torch


class UserError(Exception):
    """A mistake that the user can mend: one line that says what is wrong and what to type instead."""

    def __init__(self, message: str):
        super().__init__(re.sub(r"\s*\n\s*", " ", message))  # parts of it may come from a file


def flag(name: str) -> str:
    """The option of a field: "act_bits" -> "--act-bits"."""
    return "--" + name.replace("_", "-")


def exit_status(after_interrupt: str = "") -> Callable[[Callable[..., int | None]], Callable[..., int]]:
    """Decorator of a program's main(): it returns the exit status, that of main() or 0; 2 for a mistake and 130 for
    Ctrl-C, each told in one line on stderr, without a traceback.
    """

    def decorate(main: Callable[..., int | None]) -> Callable[..., int]:
        @wraps(main)
        def told(*arguments) -> int:
            status = 2
            try:
                result = main(*arguments) or 0
                sys.stdout.flush()
                return result
            except BrokenPipeError:  # whoever read the output, such as head, has ended; told if work is left undone
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
                message, status = after_interrupt and f"the output was closed{after_interrupt}", 1
            except UserError as error:
                message = f"error: {error}"
            except OSError as error:  # a full disk, a folder that can't be written
                message = f"error: {error.filename or 'files'}: {error.strerror or error}"
            except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's has no type
                if "out of memory" not in str(error) and "allocate memory" not in str(error):
                    raise
                message = "error: out of memory: use smaller batches (--batch-size, --max-length, --accumulate)"
            except KeyboardInterrupt:
                message, status = f"\ninterrupted{after_interrupt}", 130
            if message:
                print(message, file=sys.stderr)
            return status

        return told

    return decorate


writes = True  # False in processes that only compute (kit/parallel.py)


# ----------------------------------------------------------------------------------------- output
class Progress:
    """A progress line with the remaining time on stderr, kept up to date on a terminal; in a log, one every 10 seconds.

    total: in the unit that update() counts in; None if it is unknown.  done: where a resumed job starts.
    """

    def __init__(self, name: str, total: float | None, done: float = 0):
        self.name, self.total, self.first = name, total, done
        self.started = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()

    def update(self, done: float, text: str = "") -> None:
        """done: how much is finished now.  text: shown beside it."""
        now = time.monotonic()
        if not writes or now - self.shown < (0.2 if self.live else 10.0):
            return
        self.shown = now
        line = f"{self.name} {done:,.0f}"
        if self.total is not None:
            line += f"/{self.total:,.0f}"
            if done > self.first:
                line += f", {clock((now - self.started) / (done - self.first) * (self.total - done))} left"
        line += f"  {text}"
        if self.live:  # a longer line would wrap, and \r comes back to its last part alone
            line = "\r\033[K" + line[: (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1]
        print(line, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Make room for other output."""
        if self.live and writes:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Minutes and seconds, such as 1:15, or 1:00:00."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns: the first to the left, the others to the right."""
    first, *widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def join(title: str, *cells: str) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return "| " + " | ".join([title.ljust(first), *padded]) + " |"

    rules = ["-" * (first + 2), *("-" * (width + 1) + ":" for width in widths)]
    return "\n".join([join(*header), "|" + "|".join(rules) + "|", *(join(*row) for row in rows)])


def choose_device(name: str, threads: int | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device here; use --device cpu")
    if threads:
        torch.set_num_threads(threads)
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(auto if name == "auto" else name)


def hardware(device: torch.device) -> str:
    """The name of the processor that computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpuinfo("model name") or platform.processor() or platform.machine()


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool({"avx512_bf16", "amx_bf16"} & set(instructions(device)))


def instructions(device: torch.device) -> list[str]:
    """What decides how fast a CPU multiplies; [] for a GPU, and where the system does not tell."""
    known = "avx2 avx512f avx512_vnni avx_vnni avx512_bf16 amx_int8 amx_bf16".split()
    flags = set() if device.type == "cuda" else set(cpuinfo("flags").split())
    return [name for name in known if name in flags]


def cpuinfo(field: str) -> str:
    """A field of the first processor in /proc/cpuinfo; "" where there is none."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith(field)), "")
    except OSError:
        return ""

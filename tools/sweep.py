"""A paper's table in one line: train.py once for each combination of values that are separated by commas.

    python tools/sweep.py --task sst2,stsb --recipe kd --distill logits+score,logits+map --seed 0,1,2

Options are those of train.py, except --jobs and --table. What a run prints is in output.txt in its folder. Finished runs
are skipped, stopped ones continue: after an interruption the same command goes on. At the end comes the table of
tools/compare.py over exactly these runs, also as TABLE.md and TABLE.csv.
"""

import argparse
import csv
import itertools
import os
import signal
import subprocess
import sys
import time
from typing import NamedTuple

if __package__ in (None, ""):  # run as a script: put the repository root on the path
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from config import TrainConfig, default_out, parse_args
from data.tasks import TASKS
from kit.common import Progress, UserError, exit_status, flag
from kit.files import check_writable, write_text
from tools import compare
from train import HERE, TEACHER_OPTIONS

LISTS = ("--methods", "--languages")  # in these a comma separates the values of one run
IN_LABELS = {"--task", *map(flag, (*compare.MAY_DIFFER, *compare.VARIANTS))}  # of tools/compare.py


class Cell(NamedTuple):
    """A run."""

    name: str  # in the table: options that its labels do not tell
    arguments: list[str]  # of train.py
    config: TrainConfig
    out: str

    def path(self, name: str) -> str:
        return os.path.join(self.out, name)

    def last_line(self) -> str:
        with open(self.path("output.txt"), encoding="utf-8", errors="replace") as file:
            return (file.read()[-1000:].strip().splitlines() or [""])[-1]


def plan(words: list[str]) -> list[Cell]:
    """All runs, checked. The options of teachers change fastest: runs at the same time train different teachers."""
    options: dict[str, list[list[str]]] = {}  # flag -> one or several lists of values
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            options[name] = [[value]] if equals else [[]]
        elif not options:
            raise UserError(f"{word!r} stands before any option: python tools/sweep.py --task xnli,rte ...")
        else:
            options[name][0].append(word)
    for name, [values] in options.items():
        if name not in LISTS and len(values) == 1:
            options[name] = [[value] for value in dict.fromkeys(values[0].split(","))]
    names = sorted(options, key=lambda name: name[2:].replace("-", "_") in TEACHER_OPTIONS)
    told, cells = [name for name in names if len(options[name]) > 1 and name not in IN_LABELS], {}
    for chosen in itertools.product(*(options[name] for name in names)):
        values = dict(zip(names, chosen, strict=True))
        arguments = [word for name in names for word in (name, *values[name])]
        config, _ = parse_args(arguments)
        label = " ".join(f"{name[2:]} {values[name][0]}" for name in told).translate({47: 95, 61: 95})  # no / and =
        out = config.out or default_out(config)
        if out in cells:
            raise UserError(f"several runs would write to {out}: leave out --out")
        cells[out] = Cell(label, [*arguments, "--out", out], config, out)
    return list(cells.values())


def run_all(cells: list[Cell], jobs: int) -> None:
    """Raises UserError, after all others were run, if a run failed."""
    left = [cell for cell in cells if not os.path.exists(cell.path("report.md"))]  # which a run writes at its end
    progress, failed, total = Progress("runs", len(cells), len(cells) - len(left)), [], len(left)
    running: list[tuple[Cell, subprocess.Popen]] = []
    try:
        while left or running:
            while left and len(running) < jobs:
                cell = left.pop(0)
                check_writable(cell.out)
                os.makedirs(cell.out, exist_ok=True)
                resume = ["--resume"] * os.path.exists(cell.path("config.json"))
                command = [sys.executable, "-u", os.path.join(HERE, "train.py"), *cell.arguments, *resume]
                with open(cell.path("output.txt"), "a", encoding="utf-8") as output:
                    running.append((cell, subprocess.Popen(command, stdout=output, stderr=output)))
            time.sleep(0.5)
            failed += [cell for cell, process in running if process.poll()]
            running = [(cell, process) for cell, process in running if process.poll() is None]
            lines = (f"{os.path.basename(cell.out)}: {cell.last_line()}" for cell, _ in running)
            progress.update(len(cells) - len(left) - len(running), "; ".join(lines))
    finally:
        for _, process in running:
            process.terminate()
            process.wait()
    if failed:
        raise UserError(f"{len(failed)} of {total} runs failed; {failed[0].out}: {failed[0].last_line()}")


def tables(cells: list[Cell]) -> list[str]:
    """One for all runs that may stand in one table."""
    groups: dict[tuple, list[str]] = {}
    for cell in cells:
        task = TASKS[cell.config.task]
        key = cell.config.model, cell.config.eval_split, task.zero_shot, task.head == "joint" and task.name
        groups.setdefault(key, []).append(f"{cell.name}=" * bool(cell.name) + cell.path("results.json"))
    return [compare.compare(compare.build_parser().parse_args(files)) for files in groups.values()]


@exit_status(": the same command continues")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at once; they share the CPU (default: 1)"
    )
    parser.add_argument("--table", default="out/sweep", help="beginning of its files' names (default: out/sweep)")
    own, words = parser.parse_known_args(argv)
    if own.jobs > 1 and "--threads" not in words:
        words += ["--threads", str(max(1, (os.cpu_count() or 1) // own.jobs))]
    cells = plan(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not before the runs are stopped, too
    run_all(cells, own.jobs)
    found = "\n\n".join(tables(cells))
    write_text(f"{own.table}.md", found + "\n")
    rows = [[x.strip() for x in line.split("|")[1:-1]] for line in found.splitlines() if not line.startswith("|-")]
    with open(f"{own.table}.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    print(found, "", f"wrote {own.table}.md, {own.table}.csv", sep="\n")


if __name__ == "__main__":
    sys.exit(main())

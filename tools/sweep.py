"""A paper's table in one line: train.py once for each combination of values that are separated by commas.

    python tools/sweep.py --task sst2,stsb --recipe kd --distill logits+score,logits+map --seed 0,1,2

Options are those of train.py, --jobs and --table. What a run prints is in output.txt in its folder. Finished runs are
skipped, stopped ones continue: after an interruption the same command goes on. At the end comes the table of
tools/compare.py over exactly these runs, or one for each group that can't stand in one table.
"""

import csv
import itertools
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from typing import NamedTuple

if __package__ in (None, ""):  # run as a script: put the repository root on the path
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from config import COUNT, SAME_RUN, OneLineParser, TrainConfig, default_out, parse_args
from data.tasks import Task, find_task
from kit.common import Progress, UserError, exit_status
from kit.files import atomic_write, check_writable, write_text
from kit.run import Run
from tools import compare
from train import HERE, TEACHER_OPTIONS

LISTS = ("--methods", "--languages")  # in these a comma separates the values of one run


class Cell(NamedTuple):
    name: str  # in the table: swept options that its labels do not tell
    arguments: list[str]  # of train.py
    config: TrainConfig
    task: Task

    @property
    def out(self) -> str:
        return self.arguments[-1]

    def path(self, name: str) -> str:
        return os.path.join(self.out, name)

    def last_line(self) -> str:
        with open(self.path("output.txt"), encoding="utf-8", errors="replace") as file:
            return (file.read()[-1000:].strip().splitlines() or [""])[-1]


def plan(words: list[str]) -> list[list[Cell]]:
    """The runs of each table. Raises UserError for what could not be run, or not stand in a table."""
    axes, name = [], ""  # of a flag: itself, and each word after it
    for word in itertools.chain.from_iterable(x.split("=", 1) if x.startswith("--") else [x] for x in words):
        name, is_flag = (word, True) if word.startswith("--") else (name, False)
        values = [word] if is_flag or name in LISTS else [*dict.fromkeys(filter(None, word.split(",")))]
        axes.append((name[2:].replace("-", "_"), values or [word]))
    axes.sort(key=lambda axis: axis[0] in (*TEACHER_OPTIONS, "model"))  # runs at once then train different teachers
    groups, folders = {}, set()
    for chosen in itertools.product(*(values for _, values in axes)):
        config, resume = parse_args([*chosen])
        if resume or config.gate is not None:
            raise UserError("--resume and --gate are for a single run: leave them out")
        out, task = config.out or default_out(config), find_task(config.task, config.train_language)
        if out in folders:
            raise UserError(f"several runs would write to {out}: leave out --out, and give no value twice")
        folders.add(out)
        told = {"task", *compare.MAY_DIFFER} - {"recipe"} | ({*compare.VARIANTS} if task.head != "joint" else set())
        label = (
            f"{name} {word}"
            for (name, values), word in zip(axes, chosen, strict=True)
            if values[1:] and name not in told
        )
        name = " ".join(label).translate(str.maketrans("/=", "__"))  # NAME=FILE has none of both
        cell = Cell(name, [*chosen, "--out", out], config, task)
        key = config.model, config.eval_split, task.zero_shot, task.train_language, task.head == "joint" and task.name
        groups.setdefault(key, []).append(cell)
    for cells in groups.values():
        rows = ({"path": x.out, "task": x.task, "config": asdict(x.config) | {"name": x.name}} for x in cells)
        compare.check_comparable([row | {"methods": row["config"]["methods"]} for row in rows])
    return [*groups.values()]


def run_all(cells: list[Cell], jobs: int) -> None:
    """Raises UserError for a folder with another run, and, after all others were run, if a run failed."""
    for cell in cells:
        resumes = os.path.exists(cell.path("config.json"))
        Run(cell.out, cell.config, None, resumes, (*SAME_RUN, "precision", "max_length"))  # which train.py may change
    left = [cell for cell in cells if not os.path.exists(cell.path("report.md"))]  # which a run writes at its end
    progress, failed = Progress("runs", len(cells), len(cells) - len(left)), []
    running: list[tuple[Cell, subprocess.Popen]] = []
    try:
        while left or running:
            while left and len(running) < jobs:
                cell = left.pop(0)
                os.makedirs(cell.out, exist_ok=True)
                resume = ["--resume"] * os.path.exists(cell.path("config.json"))
                command = [sys.executable, "-u", os.path.join(HERE, "train.py"), *cell.arguments, *resume]
                with open(cell.path("output.txt"), "a", encoding="utf-8") as output:
                    running.append((cell, subprocess.Popen(command, stdout=output, stderr=output)))
            time.sleep(0.5)
            ended = [(cell, process) for cell, process in running if process.poll() is not None]
            running = [each for each in running if each not in ended]
            failed += [f"{c.out} (exit status {p.returncode}): {c.last_line()}" for c, p in ended if p.returncode]
            lines = (f"{os.path.basename(cell.out)}: {cell.last_line()}" for cell, _ in running)
            progress.update(len(cells) - len(left) - len(running), "; ".join(lines))
    finally:
        progress.clear()
        for _, process in running:
            process.terminate()
            process.wait()
    if failed:
        raise UserError(f"{len(failed)} of {len(cells)} runs failed; {failed[0]}")


@exit_status(": the same command continues")
def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="tools/sweep.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--jobs", type=COUNT, default=1, metavar="N", help="runs at once, which share the CPU (default: 1)"
    )
    parser.add_argument("--table", default="out/sweep", help="where .md and .csv are written (default: out/sweep)")
    own, words = parser.parse_known_args(argv)
    if own.jobs > 1:  # what is typed comes later, and counts
        words = ["--threads", str(max(1, (os.cpu_count() or 1) // own.jobs)), *words]
    groups = plan(words)
    check_writable(os.path.dirname(os.path.abspath(own.table)))
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a killed sweep leaves no run behind
    run_all([cell for cells in groups for cell in cells], own.jobs)
    signal.signal(signal.SIGTERM, before)
    files = [[f"{x.name}=" * bool(x.name) + x.path("results.json") for x in cells] for cells in groups]
    found = "\n\n".join(compare.compare(compare.build_parser().parse_args(each)) for each in files)
    write_text(f"{own.table}.md", found + "\n")
    with atomic_write(f"{own.table}.csv", "w") as file:
        lines = (line for line in found.splitlines() if not line.startswith("|-"))
        csv.writer(file, lineterminator="\n").writerows([x.strip() for x in line.split("|")[1:-1]] for line in lines)
    print(found, "", f"wrote {own.table}.md, {own.table}.csv", sep="\n")


if __name__ == "__main__":
    sys.exit(main())

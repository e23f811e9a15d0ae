"""tools/sweep.py: which runs a line asks for, and that a killed sweep ends with the table of one that nobody stops."""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
from conftest import SMALL

import train
from tools import sweep


def test_runs_of_a_line(nothing_downloaded):
    line = "--task rte,cola --recipe kd --bits=2 --methods fp32,sdq --distill logits+map,2*logits --seed 0,1,0 --noise 1,.5"
    cells = sweep.plan(line.split())
    assert len(cells) == 16 and len({cell.out for cell in cells}) == 16
    assert {cell.name for cell in cells} == {"noise 1", "noise .5"}  # labels tell the rest
    assert {cell.config.methods for cell in cells} == {("fp32", "sdq")}
    teachers = [(cell.config.task, cell.config.seed) for cell in cells]
    assert len({*teachers[:4]}) == 4 and teachers == 4 * teachers[:4]  # runs at the same time have their own
    alike = {(cell.config.distill, cell.config.noise) for cell in cells[:4]}
    assert len(alike) == 1 and cells[0].arguments[-2:] == ["--out", cells[0].out]
    (cell,) = sweep.plan([])
    assert cell.config == sweep.parse_args([])[0] and cell.name == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("xnli --bits 8", "'xnli' stands before any option"),
        ("--bits 8,4 --out x", "several runs would write to x: leave out --out"),
        ("--weights ternary --bits 2,4", "--weights ternary has 2 bits, not --bits 4"),
    ],
)
def test_mistakes_are_told_before_the_first_run(line, message, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "run_all", None)
    assert sweep.main(line.split()) == 2
    assert message in capsys.readouterr().err


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


class Forked:
    """train.py as a child of this process, so that PyTorch is imported once; stands in for subprocess.Popen."""

    begun, stop = 0, False

    def __init__(self, command, stdout, stderr):
        Forked.begun += 1
        if not (child := os.fork()):
            try:
                sys.stdout = sys.stderr = os.fdopen(os.dup(stdout.fileno()), "a", 1, encoding="utf-8")
                os._exit(train.main(command[3:]))
            except BaseException:
                traceback.print_exc()
                os._exit(99)
        self.child, self.out, self.returncode = child, command[command.index("--out") + 1], None

    def poll(self):
        if self.returncode is None:
            child, status = os.waitpid(self.child, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if child else None
        if Forked.stop and Forked.begun == 3 and os.path.exists(os.path.join(self.out, "log.jsonl")):
            os.kill(self.child, signal.SIGKILL)
            raise KeyboardInterrupt
        return self.returncode

    def terminate(self):
        os.kill(self.child, signal.SIGTERM)

    def wait(self):
        os.waitpid(self.child, 0)


@forks
def test_a_sweep_that_is_killed_in_its_third_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sweep.subprocess, "Popen", Forked)
    wait = time.sleep
    monkeypatch.setattr(sweep.time, "sleep", lambda seconds: wait(seconds / 50))
    monkeypatch.setattr(Forked, "begun", 0)
    line = [
        *SMALL,
        *"--epochs 2 --steps 4 --eval-every 1 --bits 4 --seed 0,1 --methods fp32 ptq sdq --noise 1,0.5".split(),
    ]
    found = []
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        if folder == "killed":
            Forked.begun, Forked.stop = 0, True
            assert sweep.main(line) == 130
            assert "interrupted: the same command continues" in capfd.readouterr().err
            assert not os.path.exists("out/sweep.md")
            Forked.begun, Forked.stop = 0, False
        assert sweep.main(line) == 0
        assert Forked.begun == (2 if folder == "killed" else 4)
        found.append([Path(f"out/sweep.{end}").read_text(encoding="utf-8") for end in ("md", "csv")])
        for path in sorted(Path("out").glob("*/results.json")):
            rows = json.loads(path.read_text())["methods"]
            found[-1].append([(name, row["languages"], row.get("dev_curve")) for name, row in rows.items()])
        assert found[-1][0] in capfd.readouterr().out + "\n"
    assert found[0] == found[1]
    table = found[0][1].splitlines()
    assert table[0].startswith(",seeds,en,zero-shot") and len(table) == 7
    assert [row.split(",")[:2] for row in table[1:3]] == [["fp32 noise 0.5", "2"], ["fp32 noise 1", "2"]]
    assert len(found[0]) == 2 + 4


@forks
def test_a_run_that_fails_is_told_at_the_end(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sweep.subprocess, "Popen", Forked)
    monkeypatch.chdir(tmp_path)
    assert sweep.main("--model no.safetensors --languages de --device cpu --seed 0,1 --jobs 2".split()) == 2
    error = capfd.readouterr().err
    assert "2 of 2 runs failed; out/xnli-no-w8a8-s0" in error and "error: no model 'no.safetensors'" in error

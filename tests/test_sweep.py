"""tools/sweep.py: which runs a line asks for, and that a killed sweep ends with the table of one that nobody stops."""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SMALL

import train
from config import parse_args
from tools import sweep


def test_runs_of_a_line(nothing_downloaded):
    line = "--task rte,cola --recipe kd --bits=2 --methods fp32,sdq --distill logits+map,2*logits --seed 0,1,0 --noise 1,.5"
    [cells] = sweep.plan(line.split())
    assert len(cells) == 16 and len({cell.out for cell in cells}) == 16
    assert {cell.name for cell in cells} == {"noise 1", "noise .5"}  # labels tell the rest
    assert {cell.config.methods for cell in cells} == {("fp32", "sdq")}
    teachers = [(cell.config.task, cell.config.seed) for cell in cells]
    assert len({*teachers[:4]}) == 4 and teachers == 4 * teachers[:4]  # runs at the same time have their own
    alike = {(cell.config.distill, cell.config.noise) for cell in cells[:4]}
    assert len(alike) == 1 and cells[0].arguments[-2:] == ["--out", cells[0].out]
    [[cell]] = sweep.plan([])
    assert cell.config == parse_args([])[0] and cell.name == ""


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("--task xnli,rte,ner,atis --bits 8,4", 4 * [["", ""]]),
        ("--task rte --model a,b --seed 0,1", [["model a", "model a"], ["model b", "model b"]]),
        ("--task rte --recipe sdq,kd", [["recipe sdq", "recipe kd"]]),
        ("--task rte --weights uniform,pq", [["", ""]]),
        ("--task atis --act-range dynamic,static", [["act_range dynamic", "act_range static"]]),
        ("--task atis --bits 4 --weights uniform,lsq --tt-embedding-rank 0", [["weights uniform", "weights lsq"]]),
        ("--lr 1e-3,1e-4 --calibration a/b,c=d --methods fp32 ptq+norm", [[
            "calibration a_b lr 1e-3", "calibration a_b lr 1e-4", "calibration c_d lr 1e-3", "calibration c_d lr 1e-4",
        ]]),
    ],
)  # fmt: skip
def test_what_may_stand_in_a_table_is_named_there(line, names, nothing_downloaded):
    found = [[cell.name for cell in cells] for cells in sweep.plan(line.split())]
    assert sorted(map(sorted, found)) == sorted(map(sorted, names))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--bits 8,4 --out x", "several runs would write to x: leave out --out, and give no value twice"),
        ("--noise 1,1.0", "and give no value twice"),
        ("--weights ternary --bits 2,4", "--weights ternary has 2 bits, not --bits 4"),
        ("--seed 0,1 --resume", "--resume and --gate are for a single run"),
        ("--seed 0,1 --gate 1", "--resume and --gate are for a single run"),
        ("xnli --bits 8", "unrecognized arguments: xnli"),
        ("--jobs 0", "argument --jobs: 0: choose a value from 1"),
        ("--table file/x", "file"),
    ],
)
def test_mistakes_are_told_before_the_first_run(line, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "run_all", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    try:
        assert sweep.main(line.split()) == 2
    except SystemExit as stop:
        assert stop.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


forks = pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="no safe fork on this system")


class Forked:
    """train.py as a child of this process, so that PyTorch is imported once; stands in for subprocess.Popen."""

    begun, stop = [], False

    def __init__(self, command, stdout, stderr):
        Forked.begun.append(command)
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
        if Forked.stop and len(Forked.begun) == 3 and os.path.exists(os.path.join(self.out, "log.jsonl")):
            assert self.returncode is None, "the third run ended before it could be killed"
            os.kill(self.child, signal.SIGKILL)
            raise KeyboardInterrupt
        return self.returncode

    def terminate(self):
        os.kill(self.child, signal.SIGTERM)

    def wait(self):
        os.waitpid(self.child, 0)


@pytest.fixture
def forked(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "subprocess", SimpleNamespace(Popen=Forked))
    monkeypatch.setattr(sweep, "time", SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 50)))
    monkeypatch.setattr(Forked, "begun", [])
    monkeypatch.chdir(tmp_path)


@forks
def test_a_sweep_that_is_killed_in_its_third_run(forked, tmp_path, monkeypatch, capfd):
    line = [*SMALL, *"--epochs 4 --steps 8 --eval-every 1 --bits 4 --methods fp32 ptq sdq".split()]
    line += "--seed 0,1 --noise 1,0.5".split()
    found = []
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        if folder == "killed":
            Forked.begun, Forked.stop = [], True
            assert sweep.main(line) == 130
            assert "interrupted: the same command continues" in capfd.readouterr().err
            assert not os.path.exists("out/sweep.md")
            Forked.begun, Forked.stop = [], False
        assert sweep.main(line) == 0
        assert [command[-1] == "--resume" for command in Forked.begun] == ([True, False] if found else 4 * [False])
        found.append([Path(f"out/sweep.{end}").read_text(encoding="utf-8") for end in ("md", "csv")])
        for path in sorted(Path("out").glob("*/results.json")):
            rows = json.loads(path.read_text())["methods"]
            found[-1].append([(name, row["languages"], row.get("dev_curve")) for name, row in rows.items()])
        assert found[-1][0] in capfd.readouterr().out + "\n"
    assert found[0] == found[1] and len(found[0]) == 2 + 4
    table = found[0][1].splitlines()
    assert table[0].startswith(",seeds,en,zero-shot") and len(table) == 7
    assert [row.split(",")[:2] for row in table[1:3]] == [["fp32 noise 0.5", "2"], ["fp32 noise 1", "2"]]


@forks
def test_folders_of_other_runs_and_runs_that_fail(forked, tmp_path, capfd):
    line = "--model no.safetensors --languages de --device cpu --seed 0,1 --jobs 2".split()
    assert sweep.main(line) == 2
    error = capfd.readouterr().err
    assert "2 of 2 runs failed; out/xnli-no-w8a8-s0-languages-de (exit status 2): error: no model 'no.safe" in error
    assert all("--threads" in command for command in Forked.begun) and len(Forked.begun) == 2
    Forked.begun.clear()
    [[_, other]] = sweep.plan(line[:-2])
    Path(other.path("config.json")).write_text(json.dumps({"seed": 7, "contents": {}}))
    Path(other.path("report.md")).touch()
    assert sweep.main(line) == 2
    assert "holds a run with --recipe None, not sdq" in capfd.readouterr().err and not Forked.begun

"""kit/common.py, kit/interrupt.py and the atomic files of kit/files.py."""

import doctest
import importlib
import io
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from kit import common
from kit.common import Progress, UserError, clock, exit_status, markdown_table
from kit.files import atomic_write, check_writable, remove, write_json, write_text


# ----------------------------------------------------------------------------------- exit statuses
@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (None, 0, ""),
        (UserError("--bits 1: choose\n  2 to 8"), 2, "error: --bits 1: choose 2 to 8\n"),
        (OSError(28, "No space left on device"), 2, "error: files: No space left on device\n"),
        (OSError(13, "Permission denied", "a/b"), 2, "error: a/b: Permission denied\n"),
        (RuntimeError("CUDA out of memory"), 2, "error: out of memory: use smaller batches (--batch-size, "),
        (KeyboardInterrupt(), 130, "\ninterrupted; --resume continues\n"),
    ],
    ids=repr,
)
def test_exit_status(error, status, message, capsys):
    @exit_status("; --resume continues")
    def main(argv):
        assert argv == ["--bits", "8"]
        if error is not None:
            raise error

    assert main(["--bits", "8"]) == status
    captured = capsys.readouterr()
    assert captured.err.startswith(message) and captured.err.strip().count("\n") == 0 and captured.out == ""
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        exit_status()(lambda: 1 / 0)()


@pytest.mark.parametrize("job, after", [("print(1)", ": --resume continues"), ("print('x' * 10**6)", "")])
def test_a_closed_pipe(job, after):
    """As of `compare.py ... | head -1`: neither a message nor the interpreter's own at exit, except of a training."""
    code = f"import sys, kit.common as common; sys.exit(common.exit_status({after!r})(lambda: {job})())"
    program = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    program.stdout.close()
    message = f"the output was closed{after}\n".encode() if after else b""
    assert program.stderr.read() == message and program.wait() == 1


@pytest.mark.parametrize("program", ["train.py", "bench.py", "convert.py", "predict.py", "data/fetch.py"])
def test_interrupted_while_it_starts(program, tmp_path):
    """Ctrl-C while torch is imported: one line, no traceback."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, os.path.join(ROOT, program), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr == "\ninterrupted\n" and not done.stdout


# ------------------------------------------------------------------------------------------ files
def test_atomic_write_makes_the_folder_and_leaves_no_temporary_file(tmp_path):
    """After an interrupt the old file is there."""
    path = tmp_path / "folder" / "x.bin"
    for content in (b"first", b"second"):
        with atomic_write(path) as file:
            file.write(content)
            assert "x.bin.part" in os.listdir(path.parent)
        assert path.read_bytes() == content and os.listdir(path.parent) == ["x.bin"]
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"half of the new")
        file.flush()
        raise KeyboardInterrupt
    assert path.read_bytes() == b"second" and os.listdir(path.parent) == ["x.bin"]


def test_a_planted_link_is_not_followed(tmp_path):
    """Temporary files have foreseeable names. What a killed process left under one is overwritten."""
    (tmp_path / "precious").write_text("precious")
    os.symlink(tmp_path / "precious", tmp_path / "x.json.part")
    write_json(str(tmp_path / "x.json"), {})
    assert (tmp_path / "precious").read_text() == "precious" and not os.path.islink(tmp_path / "x.json")


def test_text_and_json_files_are_utf8(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text("x.txt", "größer\nшум\n")  # without a folder in the name
    assert (tmp_path / "x.txt").read_bytes() == "größer\nшум\n".encode()  # "\n" on every system
    write_json("x.json", {"b": [2.5, None], "a": "größer"})
    assert (tmp_path / "x.json").read_bytes().decode() == '{\n "b": [\n  2.5,\n  null\n ],\n "a": "größer"\n}\n'


def test_only_the_first_process_changes_files(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("")
    monkeypatch.setattr(common, "writes", False)
    write_text(str(tmp_path / "new" / "y"), "text")
    remove(str(tmp_path / "x"))
    assert os.listdir(tmp_path) == ["x"]


def test_check_writable(tmp_path, monkeypatch):
    check_writable(str(tmp_path / "not" / "there" / "yet"))
    assert os.listdir(tmp_path) == []  # it only looks
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "forbidden"):
        with pytest.raises(UserError, match="cannot write to .*: choose another --out"):
            monkeypatch.setattr(os, "access", lambda there, mode, path=path: path.name != "forbidden")
            check_writable(str(path))


# --------------------------------------------------------------------------------------- progress
class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        return 2


@pytest.fixture
def timer(monkeypatch):
    """A clock that a test sets: timer["now"] in seconds."""
    now = {"now": 1000.0}
    monkeypatch.setattr(common.time, "monotonic", lambda: now["now"])
    return now


def test_progress_in_a_log_is_a_line_every_ten_seconds(timer, capsys):
    progress = Progress("sdq", 400)
    for step in range(1, 301):
        timer["now"] += 0.125
        progress.update(step, f"step {step}")
    progress.clear()
    assert capsys.readouterr().err.splitlines() == [
        "sdq 80/400, 0:40 left  step 80",
        "sdq 160/400, 0:30 left  step 160",
        "sdq 240/400, 0:20 left  step 240",
    ]


@pytest.mark.parametrize("columns", [40, 80, 1])
def test_progress_fits_the_terminal(columns, timer, monkeypatch):
    """A wrapped line could not be overwritten. What matters comes first."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(os, "get_terminal_size", lambda file: os.terminal_size((columns, 24)))
    progress, whole = Progress("fp32", 2000), "fp32 500/2,000, 0:03 left  loss 0.693 (task 0.693)  lr " + "9" * 60
    timer["now"] += 1
    progress.update(500, whole.partition("left  ")[2])
    progress.clear()
    assert sys.stderr.getvalue() == "\r\033[K" + whole[: columns - 1] + "\r\033[K"


def test_remaining_time(timer, capsys):
    resumed, download = Progress("sdq", 100, 80), Progress("sdq", None)
    timer["now"] += 20
    resumed.update(90)
    download.update(1234567)
    assert capsys.readouterr().err == "sdq 90/100, 0:20 left  \nsdq 1,234,567  \n"


def test_clock():
    assert [clock(s) for s in (0, 59.4, 59.6, 75, 3599.6, 3600, 36061)] == [
        "0:00", "0:59", "1:00", "1:15", "1:00:00", "1:00:00", "10:01:01"
    ]  # fmt: skip


def test_markdown_table():
    assert markdown_table(["", "en", "recovered"], [["fp32", "90.00", "-"], ["sdq", "9", "75 %"]]) == (
        "|      |    en | recovered |\n"
        "|------|------:|----------:|\n"
        "| fp32 | 90.00 |         - |\n"
        "| sdq  |     9 |      75 % |"
    )  # fmt: skip
    assert markdown_table(["a", "b"], []) == "| a | b |\n|---|--:|"


@pytest.mark.parametrize("name", "checkpoint distill quant tt data.glue data.metrics data.tasks data.wordpiece".split())
def test_docstrings(name):
    found = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch})
    assert found.failed == 0 < found.attempted

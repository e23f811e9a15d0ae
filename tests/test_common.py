"""common.py: atomic files, exit statuses, progress lines and Markdown tables."""

import doctest
import io
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from kit import common
from kit.common import Progress, UserError, clock, exit_status, flag, hardware, markdown_table
from kit.files import atomic_write, check_writable, remove, write_json, write_text


# ----------------------------------------------------------------------------------- exit statuses
@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (None, 0, ""),
        (UserError("--bits 1: choose 2 to 8"), 2, "error: --bits 1: choose 2 to 8\n"),
        (OSError(28, "No space left on device"), 2, "error: files: No space left on device\n"),
        (OSError(13, "Permission denied", "a/b"), 2, "error: a/b: Permission denied\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted; --resume continues\n"),
    ],
    ids=repr,
)
def test_exit_status(error, status, message, capsys):
    def job():
        if error is not None:
            raise error

    assert exit_status(job, "; --resume continues") == status
    captured = capsys.readouterr()
    assert captured.err == message and captured.out == ""


@pytest.mark.parametrize("job", ["print(1)", "print('x' * 10**6)", "[print(i) for i in range(10**5)]"])
def test_a_closed_pipe_is_no_error(job):
    """As of `compare.py ... | head -1`: neither a message nor the interpreter's own at exit."""
    code = f"import sys, kit.common as common; sys.exit(common.exit_status(lambda: {job}))"
    program = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    program.stdout.close()
    assert program.stderr.read() == b"" and program.wait() == 1


def test_a_closed_pipe_does_not_end_a_training_silently():
    code = "import sys, kit.common as common; sys.exit(common.exit_status(lambda: print(1), ': --resume continues'))"
    program = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    program.stdout.close()
    assert program.stderr.read() == b"the output was closed: --resume continues\n" and program.wait() == 1


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda: 1 / 0)


def test_flag():
    assert flag("act_bits") == "--act-bits" and flag("lr") == "--lr"


# ------------------------------------------------------------------------------------------ files
def test_atomic_write_makes_the_folder_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "new" / "folder" / "x.bin"
    for content in (b"first", b"second"):
        with atomic_write(path) as file:
            file.write(content)
            assert os.listdir(path.parent) != ["x.bin"]  # written beside it
        assert path.read_bytes() == content
        assert os.listdir(path.parent) == ["x.bin"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_write_keeps_the_old_file_after_an_error(error, tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(error):
        with atomic_write(path, "w") as file:
            file.write("half of the new")
            file.flush()
            raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.txt"]


def test_atomic_write_without_a_folder_in_the_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text("x.txt", "text")
    assert (tmp_path / "x.txt").read_text() == "text"


def test_text_and_json_files_are_utf8(tmp_path):
    write_text(str(tmp_path / "x.txt"), "größer\nшум\n")
    assert (tmp_path / "x.txt").read_bytes() == "größer\nшум\n".encode()  # "\n" on every system
    value = {"b": [1, 2.5, None], "a": "größer"}
    write_json(str(tmp_path / "x.json"), value)
    text = (tmp_path / "x.json").read_bytes().decode()
    assert json.loads(text) == value and list(json.loads(text)) == ["b", "a"]
    assert "größer" in text and text.endswith("}\n")


def test_remove(tmp_path):
    (tmp_path / "x").write_text("")
    remove(str(tmp_path / "x"))
    remove(str(tmp_path / "x"))  # there is none now
    assert os.listdir(tmp_path) == []


def test_check_writable(tmp_path):
    check_writable(str(tmp_path))
    check_writable(str(tmp_path / "not" / "there" / "yet"))
    assert os.listdir(tmp_path) == []  # it only looks
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="cannot write to .*: choose another --out"):
            check_writable(str(path))


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may write anywhere")
def test_check_writable_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="choose another --out"):
        check_writable(str(tmp_path / "run"))
    tmp_path.chmod(0o700)


# --------------------------------------------------------------------------------------- progress
class Terminal(io.StringIO):
    def isatty(self):
        return True


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


def test_progress_on_a_terminal_is_one_line(timer, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = Progress("download", 2000)
    for done in (500, 1000, 1500):
        timer["now"] += 0.25
        progress.update(done)
    progress.clear()
    assert "\n" not in sys.stderr.getvalue()
    parts = sys.stderr.getvalue().split("\r\033[K")
    assert parts == [
        "",
        "download 500/2,000, 0:01 left  ",
        "download 1,000/2,000, 0:00 left  ",
        "download 1,500/2,000, 0:00 left  ",
        "",
    ]


@pytest.mark.parametrize("columns", [40, 80, 1])
def test_progress_fits_the_terminal(columns, timer, monkeypatch):
    """A wrapped line could not be overwritten. What matters comes first."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(common, "terminal_width", lambda: columns)
    progress = Progress("fp32", 2000)
    timer["now"] += 1
    progress.update(500, "loss 0.693 (task 0.693)  lr 2.0e-05  ms " + "9" * 60)
    _, line = sys.stderr.getvalue().split("\r\033[K")
    assert len(line) == columns - 1 and "fp32 500/2,000, 0:03 left  loss 0.693 (task".startswith(line[:40])


@pytest.mark.parametrize("program", ["train.py", "bench.py", "convert.py", "predict.py", "data/fetch.py"])
def test_interrupted_while_it_starts(program, tmp_path):
    """Ctrl-C while torch is imported: one line, no traceback."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, os.path.join(ROOT, program), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr == "\ninterrupted\n" and not done.stdout


def test_progress_calls_the_text_only_if_the_line_is_drawn(timer, capsys):
    progress, calls = Progress("sdq", 10), []

    def text():
        calls.append(1)
        return "loss 0.5"

    progress.update(1, text)
    assert not calls and capsys.readouterr().err == ""
    timer["now"] += 11
    progress.update(2, text)
    assert len(calls) == 1 and capsys.readouterr().err.endswith("loss 0.5\n")


def test_progress_of_a_resumed_job_counts_its_own_steps(timer, capsys):
    progress = Progress("sdq", 100, done=80)
    timer["now"] += 20
    progress.update(90)  # 10 steps in 20 s, and 10 are left
    assert capsys.readouterr().err == "sdq 90/100, 0:20 left  \n"


def test_progress_without_a_total(timer, capsys):
    progress = Progress("bytes", None)
    timer["now"] += 20
    progress.update(1234567)
    assert capsys.readouterr().err == "bytes 1,234,567  \n"


def test_clock():
    assert [clock(s) for s in (0, 59.4, 59.6, 75, 3599.6, 3600, 36061)] == [
        "0:00", "0:59", "1:00", "1:15", "1:00:00", "1:00:00", "10:01:01"
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------- tables
def test_markdown_table():
    assert markdown_table(["", "en", "recovered"], [["fp32", "90.00", "-"], ["sdq", "9", "75 %"]]) == (
        "|      |    en | recovered |\n"
        "|------|------:|----------:|\n"
        "| fp32 | 90.00 |         - |\n"
        "| sdq  |     9 |      75 % |"
    )  # fmt: skip
    assert markdown_table(["a", "b"], []) == "| a | b |\n|---|--:|"
    with pytest.raises(ValueError):
        markdown_table(["a", "b"], [["1", "2", "3"]])  # a row of another length


def test_hardware_has_a_name():
    assert hardware(torch.device("cpu"))


def test_docstrings():
    assert doctest.testmod(common).failed == 0

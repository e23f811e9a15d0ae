"""A run that is killed at any moment continues with --resume to the same files, and nothing is left over.

`python -m pytest tests/test_kill.py --kills 300` kills 300 times at random moments, and at every open, rename and save,
instead of a few times; runs of two processes, too. Each process is a child of this one (fork), so that PyTorch is
imported once.
"""

import builtins
import hashlib
import json
import os
import random
import signal
import socket
import sys
import time
import traceback

import pytest
import torch
import torch.distributed as dist
from conftest import SMALL, log_of

import train
from kit.common import UserError
from run import TERMINATED, lock_folder

pytestmark = needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
HAS_GLOO = dist.is_available() and dist.is_gloo_available()
needs_gloo = pytest.mark.skipif(not HAS_GLOO, reason="torch.distributed with gloo is not built")
OPTIONS = [
    *SMALL,
    "--languages",
    "de",
    "--methods",
    "fp32",
    "ptq",
    "sdq",
    "--bits",
    "4",
    "--steps",
    "6",
    "--eval-every",
    "2",
]
KEPT = {"config.json", "log.jsonl", "results.json", "report.md", "student.pt"}


def start(folder, *options, kill_at=None, environment=()):
    """Run train.py in a child process; return its number.  kill_at: the n-th open, rename or save kills it."""
    child = os.fork()
    if child:
        return child
    try:
        os.environ.update(environment)
        sys.stdout = sys.stderr = open(os.path.join(folder, "output.txt"), "a", buffering=1, encoding="utf-8")
        calls = 0

        def deadly(function):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        if kill_at is not None:
            builtins.open, os.replace, os.unlink = deadly(builtins.open), deadly(os.replace), deadly(os.unlink)
            torch.save = deadly(torch.save)
        status = train.main([*OPTIONS, "--out", os.path.join(folder, "run"), *options])
        os._exit(status)
    except SystemExit as stop:
        os._exit(stop.code)
    except BaseException:
        traceback.print_exc()
        os._exit(99)


def end(child):
    """The exit status; negative: the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def finish(folder):
    """Resume until the run is finished; how a user would do it."""
    there = os.path.exists(os.path.join(folder, "run", "config.json"))
    status = end(start(folder, *(["--resume"] if there else [])))
    with open(os.path.join(folder, "output.txt"), encoding="utf-8") as file:
        assert status == 0, file.read()[-2000:]


def outcome(folder):
    """What must be equal: bytes of the student and the teacher, results and log without times, no other files."""
    out = os.path.join(folder, "run")
    assert set(os.listdir(out)) == KEPT and not [name for name in os.listdir(folder) if name.endswith(".part")]
    with open(os.path.join(out, "results.json"), encoding="utf-8") as file:
        results = json.load(file)
    for row in results["methods"].values():
        row.pop("train_seconds")
    results["config"].pop("out")
    with open(os.path.join(out, "log.jsonl"), encoding="utf-8") as file:
        log = [json.loads(line) for line in file]
    for record in log:
        record.pop("ms", None)
    teachers = os.path.join(folder, "teachers")
    assert len(os.listdir(teachers)) == 1
    with open(os.path.join(out, "student.pt"), "rb") as file:
        student = hashlib.sha256(file.read()).hexdigest()
    tensors = torch.load(os.path.join(teachers, *os.listdir(teachers)), weights_only=True)["tensors"]
    return results, log, student, {name: tensor.tolist() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(outcome, outcome of a second one, seconds) of a run that nobody stops."""
    folders = [str(tmp_path_factory.mktemp("whole")) for _ in range(2)]
    finish(folders[0])
    started = time.monotonic()
    finish(folders[1])
    return *map(outcome, folders), time.monotonic() - started


def test_the_same_command_gives_the_same_bytes(whole):
    assert whole[0] == whole[1]


def test_killed_at_random_moments(whole, tmp_path, request):
    expected, _, seconds = whole
    rng, kills, folder = random.Random(0), 0, None
    while kills < request.config.getoption("--kills"):
        if folder is None:
            folder = str(tmp_path / str(kills))
            os.mkdir(folder)
        there = os.path.exists(os.path.join(folder, "run", "config.json"))
        child = start(folder, *(["--resume"] if there else []))
        time.sleep(rng.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        kills += 1
        if end(child) == -signal.SIGKILL and rng.random() < 0.7:
            continue  # once more in the same folder
        finish(folder)
        assert outcome(folder) == expected
        folder = None


def test_killed_at_every_file_operation(whole, tmp_path, request):
    """At a few of them in the suite, at all with --kills 100 or more."""
    expected, *_ = whole
    step = 1 if request.config.getoption("--kills") >= 100 else 61
    for number in range(1, 10_000, step):
        folder = str(tmp_path / str(number))
        os.mkdir(folder)
        if end(start(folder, kill_at=number)) != -signal.SIGKILL:
            break
        finish(folder)
        assert outcome(folder) == expected, f"operation {number}"
    assert number > 40


# ---------------------------------------------------------------------------------- two processes
@needs_gloo
def test_two_processes_killed_at_random_moments(tmp_path, request):
    """Two thirds of the times one or both are killed, else both get SIGTERM; the other ends by itself. Not before they
    have met: until then torchrun would end the other.
    """
    (tmp_path / "whole").mkdir()
    started = time.monotonic()
    finish_two(str(tmp_path / "whole"))
    expected, seconds = outcome(str(tmp_path / "whole")), time.monotonic() - started
    rng = random.Random(0)
    for number in range(request.config.getoption("--kills")):
        folder = tmp_path / str(number)
        folder.mkdir()
        children = start_two(str(folder))
        output = folder / "output.txt"
        wait_until(lambda file=output: file.exists() and "2 processes" in file.read_text(), children)
        time.sleep(rng.uniform(0, seconds))
        if number % 3 == 2:
            stopped, sent = children, signal.SIGTERM
        else:
            stopped, sent = rng.choice([children[:1], children[1:], children]), signal.SIGKILL
        for child in stopped:
            os.kill(child, sent)
        assert set(ends_soon(children)) <= {0, 2, TERMINATED, -sent, -signal.SIGTERM}
        finish_two(str(folder))
        assert "Traceback" not in output.read_text(), number
        assert outcome(str(folder)) == expected, number


@needs_gloo
def test_another_number_of_processes_continues(tmp_path):
    """One of two is killed: the other ends by itself, and one process goes on."""
    longer = ["--epochs", "20", "--steps", "120", "--methods", "fp32"]
    children = start_two(str(tmp_path), *longer)
    wait_until((tmp_path / "run" / "state.pt").exists, children)
    os.kill(children[0], signal.SIGKILL)
    assert sorted(ends_soon(children)) == [-signal.SIGKILL, 2]
    assert end(start(str(tmp_path), *longer, "--resume")) == 0
    output = (tmp_path / "output.txt").read_text()
    assert "error: another process of this run ended" in output
    assert "2 processes before, now 1: other noise" in output
    steps = [record["step"] for record in log_of(tmp_path) if "loss" in record]
    assert steps == list(range(1, 121))


def start_two(folder, *options):
    """Two processes of one run, as torchrun starts them; their numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    there = os.path.exists(os.path.join(folder, "run", "config.json"))
    options = [*options, *(["--resume"] if there else [])]
    return [start(folder, *options, environment={**environment, "RANK": r, "LOCAL_RANK": r}) for r in "01"]


def wait_until(condition, children):
    """Until something is there; if it is not within a minute, the processes are killed."""
    limit = time.monotonic() + 60
    while not condition():
        if time.monotonic() > limit:
            for child in children:
                os.kill(child, signal.SIGKILL)
            pytest.fail("a process hangs")
        time.sleep(0.01)


def ends_soon(children):
    """Exit statuses of processes that must end within a minute."""
    ended = {}

    def all_ended():
        for child in set(children) - set(ended):
            number, status = os.waitpid(child, os.WNOHANG)
            if number:
                ended[child] = os.waitstatus_to_exitcode(status)
        return len(ended) == len(children)

    wait_until(all_ended, children)
    return list(ended.values())


def finish_two(folder):
    statuses = ends_soon(start_two(folder))
    with open(os.path.join(folder, "output.txt"), encoding="utf-8") as file:
        assert statuses == [0, 0], file.read()[-3000:]


# ------------------------------------------------------------------------------ two runs, one folder
def test_second_run_in_a_folder_is_refused(whole, tmp_path, monkeypatch, capsys):
    command, statuses, real = [*OPTIONS, "--out", str(tmp_path / "run")], [], train.sdq_loss

    def loss(*inputs):  # in the middle of the first run
        if not statuses:
            statuses.append(train.main([*command, "--resume"]))
        return real(*inputs)

    monkeypatch.setattr(train, "sdq_loss", loss)
    assert train.main(command) == 0 and statuses == [2]
    assert "another run is writing to" in capsys.readouterr().err
    assert outcome(str(tmp_path)) == whole[0]


def test_a_lock_ends_with_its_run(tmp_path):
    descriptor = lock_folder(str(tmp_path))
    if descriptor is None:
        pytest.skip("no locks on this file system")
    child = os.fork()
    if not child:
        os.close(descriptor)
        os._exit(0 if refused(str(tmp_path)) else 1)
    assert end(child) == 0
    os.close(descriptor)
    assert not refused(str(tmp_path))


def refused(folder):
    try:
        os.close(lock_folder(folder))
    except UserError:
        return True
    return False

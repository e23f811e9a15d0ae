"""A run that is killed at any moment continues with --resume to the same files, and nothing is left over.

`python -m pytest tests/test_kill.py --kills 60` kills 60 times at random moments, and before every open, rename and
unlink of a run, instead of a few times. Each process is a child of this one (fork), so that PyTorch is imported once.
"""

import builtins
import json
import os
import random
import signal
import socket
import sys
import time
import traceback

import pytest
import torch.distributed as dist
from conftest import SMALL, log_of

import train
from checkpoint import read_model
from kit.run import STATE, STUDENT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
HAS_GLOO = dist.is_available() and dist.is_gloo_available()
needs_gloo = pytest.mark.skipif(not HAS_GLOO, reason="torch.distributed with gloo is not built")
OPTIONS = [*SMALL, *"--languages de --methods fp32 ptq sdq --bits 4 --epochs 2 --steps 6 --eval-every 2".split()]
KEPT = {"config.json", "log.jsonl", "results.json", "report.md", STUDENT}


def start(folder, *options, kill_at=None, environment=()):
    """train.py in a child process, with --resume if there is a run to resume. Returns its number.

    kill_at: the n-th open for writing, rename or unlink kills it.
    """
    if (folder / "run" / "config.json").exists():
        options = (*options, "--resume")
    if child := os.fork():
        return child
    try:
        os.environ.update(environment)
        sys.stdout = sys.stderr = open(folder / "output.txt", "a", buffering=1, encoding="utf-8")
        calls = 0

        def deadly(function):
            def call(*args, **kwargs):
                nonlocal calls
                calls += function is not real_open or bool(set(str(args[1:2])) & set("wxa"))
                if calls == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        real_open = builtins.open
        builtins.open, os.replace, os.unlink = map(deadly, (builtins.open, os.replace, os.unlink))
        os._exit(train.main([*OPTIONS, "--out", str(folder / "run"), *options]))
    except BaseException:
        traceback.print_exc()
        os._exit(99)


def ends(children):
    """Exit statuses of processes, a negative one for a signal; those that have not ended in a minute are killed."""
    limit, ended = time.monotonic() + 60, {}
    while len(ended) < len(children):
        for child in set(children) - set(ended):
            number, status = os.waitpid(child, os.WNOHANG)
            if number:
                ended[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > limit:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    return [ended[child] for child in children]


def finish(folder, begin=lambda folder: [start(folder)]):
    """Resume until the run is finished; how a user would do it."""
    assert set(ends(begin(folder))) == {0}, (folder / "output.txt").read_text()[-2000:]


def outcome(folder):
    """What must be equal: bytes of the student, the teacher, results and log without times; there are no other files."""
    assert {*os.listdir(folder / "run")} == KEPT
    results = json.loads((folder / "run" / "results.json").read_text())
    for row in results["methods"].values():
        row.pop("train_seconds")
    results["config"].pop("out")
    (teacher,) = (folder / "teachers").iterdir()
    teacher = {name: tensor.tolist() for name, tensor in read_model(str(teacher)).tensors.items()}
    return results, [r | {"ms": 0} for r in log_of(folder)], teacher, (folder / "run" / STUDENT).read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(outcome, seconds) of a run that nobody stops. The first one is in this process: what it imports, children have."""
    folders = [tmp_path_factory.mktemp("whole") for _ in range(2)]
    assert train.main([*OPTIONS, "--out", str(folders[0] / "run")]) == 0
    started = time.monotonic()
    finish(folders[1])
    seconds = time.monotonic() - started
    assert outcome(folders[0]) == outcome(folders[1])  # the same command, the same bytes
    return outcome(folders[0]), seconds


@pytest.fixture
def kills(request):
    return request.config.getoption("--kills")


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_killed_at_random_moments(sent, whole, kills, tmp_path):
    rng, folder = random.Random(0), tmp_path / "0"
    folder.mkdir()
    for number in range(1, kills + 1):
        child = start(folder)
        time.sleep(rng.uniform(0, whole[1]))
        os.kill(child, sent)
        if ends([child]) == [-sent] and rng.random() < 0.7 and number < kills:
            continue  # once more in the same folder
        finish(folder)
        assert outcome(folder) == whole[0]
        folder = tmp_path / str(number)
        folder.mkdir()


def test_killed_at_every_write(whole, kills, tmp_path):
    """At a few of them with few --kills."""
    for number in range(1, 10_000, max(1, 60 // kills)):
        folder = tmp_path / str(number)
        folder.mkdir()
        if ends([start(folder, kill_at=number)]) == [0]:
            break
        finish(folder)
        assert outcome(folder) == whole[0], f"write {number}"
    assert number > 40


# ---------------------------------------------------------------------------------- two processes
def start_two(folder, *options):
    """Two processes of one run, as torchrun starts them; their numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(folder, *options, environment={**environment, "RANK": r, "LOCAL_RANK": r}) for r in "01"]


@needs_gloo
def test_one_of_two_processes_is_killed(whole, kills, tmp_path):
    """The other ends by itself, and two go on; at last one alone, with other noise."""
    rng, folders = random.Random(0), [tmp_path / str(number) for number in range(kills // 3 + 1)]
    for folder in folders:
        folder.mkdir()
    started = time.monotonic()
    finish(folders[0], start_two)
    expected, seconds = outcome(folders[0]), time.monotonic() - started
    for folder in folders[1:]:
        children = start_two(folder)
        while "2 processes" not in ((folder / "output.txt").read_text() if (folder / "output.txt").exists() else ""):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, seconds))
        os.kill(rng.choice(children), signal.SIGKILL)
        ends(children)
        finish(folder, start_two)
        assert outcome(folder) == expected
    longer = "--steps 60 --epochs 99 --eval-every 20 --methods fp32".split()
    children = start_two(tmp_path, *longer)
    while not (tmp_path / "run" / STATE).exists():
        time.sleep(0.01)
    os.kill(children[0], signal.SIGKILL)
    ends(children)
    assert ends([start(tmp_path, *longer)]) == [0]
    assert "2 processes before, now 1: other noise" in (tmp_path / "output.txt").read_text()
    assert [r["step"] for r in log_of(tmp_path) if "loss" in r] == list(range(1, 61))


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
    assert outcome(tmp_path) == whole[0]

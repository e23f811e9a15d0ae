"""A run that is killed at any moment continues with --resume to the same files, and nothing is left over.

`python -m pytest tests/test_kill.py --kills 60` kills 60 times at random moments, and before every open, rename and
unlink of a run, instead of a few times. Each process is a child of this one (fork), so that PyTorch is imported once.
"""

import itertools
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
from kit.run import STUDENT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
HAS_GLOO = dist.is_available() and dist.is_gloo_available()
needs_gloo = pytest.mark.skipif(not HAS_GLOO, reason="torch.distributed with gloo is not built")
OPTIONS = [*SMALL, *"--languages de --methods fp32 ptq sdq --bits 4 --epochs 2 --steps 6 --eval-every 2".split()]
KEPT = {"config.json", "log.jsonl", "results.json", "report.md", STUDENT}


def start(folder, kill_at=None, environment=()):
    """train.py in a child process, with --resume if there is a run to resume. Returns its number.

    kill_at: the n-th open for writing, rename or unlink kills it.
    """
    folder.mkdir(exist_ok=True)
    resume = ["--resume"] if (folder / "run" / "config.json").exists() else []
    if child := os.fork():
        return child
    try:
        os.environ.update(environment)
        sys.stdout = sys.stderr = open(folder / "output.txt", "a", buffering=1, encoding="utf-8")
        writes = itertools.count(1)

        def kill(event, arguments):
            if event in ("os.rename", "os.remove") or event == "open" and str(arguments[1]) in ("a", "x", "xb"):
                if next(writes) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        os._exit(train.main([*OPTIONS, "--out", str(folder / "run"), *resume]))
    except BaseException:
        traceback.print_exc()
        os._exit(99)


def start_two(folder):
    """Two processes of one run, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(folder, environment={**environment, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]


def end(*children):
    """Exit statuses of processes, a negative one for a signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def outcome(folder, begin=lambda folder: [start(folder)]):
    """Resume as a user would. Returns what must be equal: bytes of the student, the teacher, results and log without
    times; there are no other files.
    """
    assert set(end(*begin(folder))) == {0}, (folder / "output.txt").read_text()[-2000:]
    assert {*os.listdir(folder / "run")} == KEPT
    results = json.loads((folder / "run" / "results.json").read_text())
    for row in results["methods"].values():
        row.pop("train_seconds")
    results["config"].pop("out")
    results.pop("crc32")  # of the times, too
    (teacher,) = (folder / "teachers").iterdir()
    teacher = {name: tensor.tolist() for name, tensor in read_model(str(teacher)).tensors.items()}
    return results, [r | {"ms": 0} for r in log_of(folder)], teacher, (folder / "run" / STUDENT).read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(outcome, seconds) of a run that nobody stops."""
    train.main([*OPTIONS, "--out", str(tmp_path_factory.mktemp("warm") / "run")])  # its imports are its children's
    started = time.monotonic()
    return outcome(tmp_path_factory.mktemp("whole")), time.monotonic() - started


@pytest.fixture
def kills(request):
    return request.config.getoption("--kills")


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_killed_at_random_moments(sent, whole, kills, tmp_path):
    rng, folder = random.Random(0), tmp_path / "0"
    for left in reversed(range(kills)):
        child = start(folder)
        time.sleep(rng.uniform(0, whole[1]))
        os.kill(child, sent)
        if end(child) != [-sent] or not left or rng.random() < 0.3:  # else once more in the same folder
            assert outcome(folder) == whole[0]
            folder = tmp_path / str(left)


def test_killed_at_every_write(whole, kills, tmp_path):
    """At a few of them with few --kills."""
    for number in range(1, 1000, max(1, 60 // kills)):
        killed = end(start(tmp_path / str(number), kill_at=number)) == [-signal.SIGKILL]
        assert outcome(tmp_path / str(number)) == whole[0], f"write {number}"
        if not killed:
            break
    assert number > 40


@needs_gloo
def test_one_of_two_processes_is_killed(whole, kills, tmp_path):
    """torchrun ends the other."""
    rng, started = random.Random(0), time.monotonic()
    expected, seconds = outcome(tmp_path / "whole", start_two), time.monotonic() - started
    for number in range(kills // 3):
        children = start_two(tmp_path / str(number))
        time.sleep(rng.uniform(0, seconds))
        for child, sent in zip(rng.sample(children, 2), (signal.SIGKILL, signal.SIGTERM), strict=True):
            os.kill(child, sent)
        end(*children)
        assert outcome(tmp_path / str(number), start_two) == expected

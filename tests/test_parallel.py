"""parallel.py: parts of a batch give the losses and gradients of the whole; two processes train as one does; SIGTERM."""

import copy
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL, log_of, random_ids, results, run
from test_kill import end, ends_soon, needs_fork, needs_gloo, start, start_two, wait_until

from config import TrainConfig
from data.batches import IGNORE, Batch
from distill import LOSSES
from kit import parallel
from model import with_head
from run import TERMINATED
from train import means_over, sdq_loss

LENGTHS = [9, 4, 7, 3, 8, 5, 2]


# ----------------------------------------------------------------------------------- parts of a batch
def make_batch(head):
    ids, mask = random_ids(LENGTHS, 442)
    tags = None
    if head in ("token", "joint"):
        tags = torch.randint(3, ids.shape).masked_fill(~mask | (torch.rand(ids.shape) < 0.3), IGNORE)
        tags[:, 0] = 1  # every sentence has a tagged word
    return Batch(ids, mask, torch.randint(3, (len(LENGTHS),)), int(mask.sum()), tags)


@pytest.mark.parametrize("processes, accumulate", [(1, 3), (2, 1), (3, 2), (5, 2)])
@pytest.mark.parametrize("head", ["sequence", "token", "joint"])
@pytest.mark.parametrize("distill", ["logits", "+".join(name for name in LOSSES if name != "logits")])
def test_parts_add_up_to_the_batch(processes, accumulate, head, distill, models, monkeypatch):
    """Also if there are fewer rows (7) than parts (10)."""
    teacher = with_head(models[0], head, 3, 3).eval()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():  # not quantized: another order of additions may flip a rounding
            parameter.add_(0.05 * torch.randn_like(parameter))
    config, batch = TrainConfig(distill=distill), make_batch(head)
    whole = sdq_loss(student, teacher, batch, config, 0)
    sum(whole.values()).backward()
    expected = [p.grad.to_dense().clone() for p in student.parameters() if p.grad is not None]
    student.zero_grad()
    found = dict.fromkeys(whole, 0.0)
    for rank in range(processes):
        monkeypatch.setattr(parallel, "world_size", lambda: processes)
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        seen = 0
        for part, shares in parallel.parts(batch, accumulate):
            seen += 1
            terms = parallel.shared(sdq_loss(student, teacher, part, config, 0), shares, means_over(head))
            sum(terms.values()).backward()
            found = {name: found[name] + term.item() for name, term in terms.items()}
            assert part.mask is None or bool(part.mask[:, -1].any()), "a column that no row needs"
            assert part.tokens == (part.ids.numel() if part.mask is None else int(part.mask.sum()))
        assert seen >= 1
    assert found == pytest.approx({name: term.item() for name, term in whole.items()}, rel=1e-5, abs=1e-6)
    gradients = [p.grad.to_dense() for p in student.parameters() if p.grad is not None]
    for one, two in zip(gradients, expected, strict=True):
        assert (one - two).norm() <= 1e-4 * two.norm() + 1e-5


def test_one_part_is_the_batch_itself():
    batch = make_batch("sequence")
    ((part, shares),) = parallel.parts(batch, 1)
    assert part is batch and shares == {}


def test_gather_is_the_inverse_of_mine(monkeypatch):
    monkeypatch.setattr(parallel, "world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        shares.append(list(parallel.mine(range(7))))
    monkeypatch.setattr(parallel.dist, "all_gather_object", lambda found, own: found.__setitem__(slice(3), shares))
    assert parallel.gather(shares[0]) == list(range(7)) and len(shares[0]) == 3


OPTIONS = "--methods fp32 qat sdq --languages de --steps 3 --eval-every 2 --bits 8 --dropout 0 --noise 1".split()


def same_run(one, two):
    """Losses of the first steps within 1e-5 and gradient norms within 0.1 %; of students 1e-2 and 10 %, because a last
    bit can turn a rounding.
    """
    steps, others = ([r for r in log_of(folder) if "loss" in r] for folder in (one, two))
    assert len(steps) == 9
    for step, other in zip(steps, others, strict=True):
        assert (step["method"], step["step"], step["tokens"]) == (other["method"], other["step"], other["tokens"])
        loss, norm = (1e-5, 1e-3) if step["method"] == "fp32" else (1e-2, 0.1)
        assert step["loss"] == pytest.approx(other["loss"], abs=loss)
        assert step["norm"] == pytest.approx(other["norm"], rel=norm)
    rows, others = (results(folder)["methods"] for folder in (one, two))
    for method, row in rows.items():
        totals = [{name: test["total"] for name, test in each["languages"].items()} for each in (row, others[method])]
        assert totals[0] == totals[1]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    assert run(folder, *OPTIONS) == 0
    return folder


def test_accumulation_gives_the_same_losses(one_process, tmp_path):
    assert run(tmp_path, *OPTIONS, "--accumulate", "3") == 0
    same_run(tmp_path, one_process)


# ---------------------------------------------------------------------------------- two processes
@needs_fork
@needs_gloo
def test_two_processes_train_as_one(one_process, tmp_path):
    assert ends_soon(start_two(str(tmp_path), *OPTIONS)) == [0, 0]
    output = (tmp_path / "output.txt").read_text()
    assert output.count("training examples") == 1 and "2 processes, 1 threads" in output
    assert "UserWarning" not in output
    same_run(tmp_path, one_process)
    assert sorted(os.listdir(tmp_path / "run")) == sorted(os.listdir(one_process / "run"))


def wait_for_steps(tmp_path, process):
    log = tmp_path / "run" / "log.jsonl"
    wait_until(lambda: log.exists() and log.read_text(), [process])


def check_state(tmp_path):
    """The state of an unfinished run is that of the last step in its log."""
    last = log_of(tmp_path)[-1]["step"]
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["progress"][:2] == ["fp32", last] and last < 4000


LONG = "--methods fp32 --epochs 4000 --steps 4000 --eval-every 4000".split()


@needs_gloo
def test_torchrun_passes_sigterm_on(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [os.path.join(ROOT, "train.py"), *SMALL, *LONG, "--threads", "1", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_steps(tmp_path, process.pid)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0, output
    check_state(tmp_path)


@needs_fork
@needs_gloo
def test_processes_end_if_torchrun_was_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    torchrun = os.fork()
    if not torchrun:
        start_two(str(tmp_path), *LONG)
        signal.pause()
    wait_for_steps(tmp_path, torchrun)
    os.kill(torchrun, signal.SIGKILL)
    assert end(torchrun) == -signal.SIGKILL
    output = tmp_path / "output.txt"
    wait_until(lambda: output.read_text().count("torchrun is gone; stopped by SIGTERM") == 2, [])
    check_state(tmp_path)


@needs_fork
def test_sigterm_saves_a_state(tmp_path):
    child = start(str(tmp_path), *LONG)
    wait_for_steps(tmp_path, child)
    os.kill(child, signal.SIGTERM)
    assert end(child) == TERMINATED
    check_state(tmp_path)
    assert "stopped by SIGTERM" in (tmp_path / "output.txt").read_text()

"""parallel.py: parts of a batch give the losses and gradients of the whole; two processes train as one does; SIGTERM."""

import copy
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SMALL, log_of, random_ids, results, run
from test_kill import end, needs_gloo, start

import parallel
from config import TrainConfig
from data.batches import IGNORE, Batch
from distill import LOSSES
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
        tags[:, 0] = 1  # every sentence has a word
    return Batch(ids, mask, torch.randint(3, (len(LENGTHS),)), int(mask.sum()), tags)


@pytest.mark.parametrize("processes, accumulate", [(1, 3), (2, 1), (3, 2), (5, 2)])
@pytest.mark.parametrize("head", ["sequence", "token", "joint"])
@pytest.mark.parametrize("distill", ["logits", "+".join(name for name in LOSSES if name != "logits")])
def test_parts_add_up_to_the_batch(processes, accumulate, head, distill, models, monkeypatch):
    """Also if there are fewer rows (7) than parts (10)."""
    teacher, student = (with_head(model, head, 3, 3).eval() for model in models)
    student.head.load_state_dict(copy.deepcopy(teacher.head.state_dict()))
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
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_one_part_is_the_batch_itself():
    batch = make_batch("sequence")
    ((part, shares),) = parallel.parts(batch, 1)
    assert part is batch and shares == {}


def losses(tmp_path, out):
    return [(r["method"], r["step"], r["loss"], r["norm"]) for r in log_of(tmp_path, out) if "loss" in r]


OPTIONS = ["--methods", "fp32", "qat", "sdq", "--steps", "50", "--student-steps", "8", "--epochs", "9"]
OPTIONS += ["--student-epochs", "9", "--dropout", "0", "--noise", "1"]


def same_run(tmp_path, out, whole):
    """Losses of every step within 1e-5, of students 2e-3 (a last bit can turn a rounding); accuracies within a row."""
    for (*one, loss, norm), (*two, expected, its) in zip(losses(tmp_path, out), losses(tmp_path, whole), strict=True):
        assert one == two and loss == pytest.approx(expected, abs=1e-5 if one[0] == "fp32" else 2e-3), one
        assert norm == pytest.approx(its, rel=5e-2)
    rows, others = results(tmp_path, out)["methods"], results(tmp_path, whole)["methods"]
    for method, row in rows.items():
        for language, test in row["languages"].items():
            assert abs(test["correct"] - others[method]["languages"][language]["correct"]) <= 1
            assert test["total"] == others[method]["languages"][language]["total"]


def test_accumulation_gives_the_same_losses(tmp_path):
    assert run(tmp_path, *OPTIONS, out="whole/run") == 0
    assert run(tmp_path, *OPTIONS, "--accumulate", "3", out="parts/run") == 0
    same_run(tmp_path, "parts/run", "whole/run")


# ---------------------------------------------------------------------------------- two processes
def torchrun(tmp_path, out, *options, processes=2):
    """A process that runs train.py under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [os.path.join(ROOT, "train.py"), *SMALL, "--epochs", "1", "--threads", "1", *options]
    command += ["--out", str(tmp_path / out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@needs_gloo
def test_two_processes_train_as_one(tmp_path):
    process = torchrun(tmp_path, "two/run", *OPTIONS)
    assert run(tmp_path, *OPTIONS, out="one/run") == 0
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert output.count("training examples") == 1 and "2 processes, 1 threads" in output
    assert "UserWarning" not in output
    same_run(tmp_path, "two/run", "one/run")
    assert sorted(os.listdir(tmp_path / "two" / "run")) == sorted(os.listdir(tmp_path / "one" / "run"))


@needs_gloo
def test_stopped_processes_continue(tmp_path):
    """SIGTERM to torchrun, which passes it on: a state is saved, and as many processes continue bit for bit."""
    options = [*OPTIONS, "--steps", "300", "--noise", "0.5", "--methods", "fp32"]
    whole = torchrun(tmp_path, "whole/run", *options)
    output = whole.communicate(timeout=200)[0]
    assert whole.returncode == 0, output
    process = torchrun(tmp_path, "run", *options)
    while not (tmp_path / "run" / "log.jsonl").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and (tmp_path / "run" / "state.pt").exists(), output
    again = torchrun(tmp_path, "run", *options, "--resume")
    output = again.communicate(timeout=200)[0]
    assert again.returncode == 0 and "continues after step" in output, output
    assert losses(tmp_path, "run") == losses(tmp_path, "whole/run")


@needs_gloo
def test_processes_end_if_torchrun_was_killed(tmp_path):
    process = torchrun(tmp_path, "run", *OPTIONS, "--steps", "4000", "--epochs", "4000")
    while not (tmp_path / "run" / "log.jsonl").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.kill()
    output = process.communicate(timeout=60)[0]  # ends when both have closed their output
    assert output.count("torchrun is gone") == 2 and (tmp_path / "run" / "state.pt").exists(), output


# ---------------------------------------------------------------------------------------- SIGTERM
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_sigterm_saves_a_state(tmp_path):
    folder = str(tmp_path)
    child = start(folder, "--steps", "4000", "--eval-every", "4000")
    while not (tmp_path / "run" / "log.jsonl").exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGTERM)
    assert end(child) == TERMINATED
    last = log_of(tmp_path)[-1]["step"]
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["progress"][:2] == ["fp32", last] and last < 4000
    assert "stopped by SIGTERM" in (tmp_path / "output.txt").read_text()

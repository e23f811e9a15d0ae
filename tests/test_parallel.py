"""kit/parallel.py: parts of a batch give the losses and gradients of the whole; two processes train as one does."""

import copy
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import ROOT, SMALL, log_of, random_ids, results, run
from test_kill import needs_gloo

from config import TrainConfig
from data.batches import IGNORE, Batch
from distill import LOSSES
from kit import parallel
from model import with_head
from train import means_over, sdq_loss

LENGTHS = [9, 4, 7, 3, 8, 5, 2]
OTHERS = "+".join(name for name in LOSSES if name != "logits")


@pytest.mark.parametrize("processes, accumulate", [(1, 1), (1, 3), (2, 1), (3, 2), (5, 2)])
@pytest.mark.parametrize("head", ["sequence", "token", "joint"])
@pytest.mark.parametrize("distill", ["logits", OTHERS])
def test_parts_add_up_to_the_batch(processes, accumulate, head, distill, models, monkeypatch):
    """Also if there are fewer rows (7) than parts (10)."""
    ids, mask = random_ids(LENGTHS, 442)
    tags = torch.randint(3, ids.shape).masked_fill(~mask | (torch.rand(ids.shape) < 0.3), IGNORE)
    tags[:, 0] = 1  # every sentence has a tagged word
    batch = Batch(ids, mask, torch.randint(3, (7,)), int(mask.sum()), None if head == "sequence" else tags)
    teacher = with_head(models[0], head, 3, 3).eval()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():  # not quantized: another order of additions may flip a rounding
            parameter.add_(0.05 * torch.randn_like(parameter))
    seen = []

    def loss(part):
        seen.append(part)
        return sdq_loss(student, teacher, part, TrainConfig(distill=distill))

    whole = loss(batch)
    sum(whole.values()).backward()
    expected = [p.grad.to_dense().clone() for p in student.parameters() if p.grad is not None]
    student.zero_grad()
    monkeypatch.setattr(parallel, "world_size", lambda: processes)
    monkeypatch.setattr(parallel.dist, "all_reduce", lambda tensor: None)  # all processes add to this student
    found = Counter()
    for rank in range(processes):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        terms = parallel.backward(student, loss, batch, accumulate, means_over(head))
        found.update({name: term.item() for name, term in terms.items()})
    assert found == pytest.approx({name: term.item() for name, term in whole.items()}, rel=1e-5, abs=1e-6)
    gradients = [p.grad.to_dense() for p in student.parameters() if p.grad is not None]
    for one, two in zip(gradients, expected, strict=True):
        assert (one - two).norm() <= 1e-4 * two.norm() + 1e-5
    if processes * accumulate == 1:
        assert seen == [batch, batch]  # the batch itself, and no copy
    for part in seen:
        assert part.mask is None or bool(part.mask[:, -1].any()), "a column that no row needs"
        assert part.tokens == (part.ids.numel() if part.mask is None else int(part.mask.sum()))


def test_gather_is_the_inverse_of_mine(monkeypatch):
    monkeypatch.setattr(parallel, "world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        shares.append(list(parallel.mine(range(7))))
    monkeypatch.setattr(parallel.dist, "all_gather_object", lambda found, own: found.__setitem__(slice(3), shares))
    assert parallel.gather(shares[0]) == list(range(7)) and len(shares[0]) == 3


OPTIONS = "--methods fp32 qat sdq --languages de --steps 3 --eval-every 2 --bits 8 --dropout 0 --noise 1".split()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=needs_gloo)])
def test_whole_runs_give_the_same_losses(processes, tmp_path):
    """Two processes, or three parts in one. Losses of the first steps within 1e-5 and gradient norms within 0.1 %; of
    students 1e-2 and 10 %, because a last bit can turn a rounding.
    """
    assert run(tmp_path, *OPTIONS, out="whole/run") == 0
    if processes == 1:
        assert run(tmp_path, *OPTIONS, "--accumulate", "3", out="parts/run") == 0
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
        command += [*SMALL, *OPTIONS, *"--epochs 1 --threads 1 --out".split(), str(tmp_path / "parts" / "run")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "UserWarning" not in done.stderr, done.stderr
        assert done.stdout.count("training examples") == 1 and "2 processes, 1 threads" in done.stdout
    steps, others = ([r for r in log_of(tmp_path, f"{name}/run") if "loss" in r] for name in ("parts", "whole"))
    assert len(steps) == 9
    for step, other in zip(steps, others, strict=True):
        assert [step[k] for k in ("method", "step", "tokens")] == [other[k] for k in ("method", "step", "tokens")]
        loss, norm = (1e-5, 1e-3) if step["method"] == "fp32" else (1e-2, 0.1)
        assert step["loss"] == pytest.approx(other["loss"], abs=loss)
        assert step["norm"] == pytest.approx(other["norm"], rel=norm)
    for row in results(tmp_path, "parts/run")["methods"].values():
        assert [test["total"] for test in row["languages"].values()] == [3, 3]
    assert sorted(os.listdir(tmp_path / "parts/run")) == sorted(os.listdir(tmp_path / "whole/run"))

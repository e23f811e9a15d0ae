"""A training step on a GPU must not make the host wait: it would launch no kernels meanwhile. Counted on a pretended CUDA
device, which is not part of this repository; without it (../shared/tools/pretend_cuda) or a C++ compiler this is skipped.
"""

import json
import os
import shutil
import subprocess

import pytest
from conftest import ROOT

PRETEND = os.path.join(ROOT, "..", "shared", "tools", "pretend_cuda", "run.sh")
SCRIPT = """
from pretend import *
import copy, json
from dataclasses import replace
from functools import partial
import train
from config import quant_config, resolve
from data.batches import IGNORE, Batch
from kit import parallel
from model import ModelConfig, build_model
from pq import begin_stage
from prepare import calibrate, prepare
from tt import tensorize

Pretend().__enter__()
PINNED = []
torch.Tensor.pin_memory = lambda self: PINNED.append(COUNT[0]) or self  # it has no pinned memory
cuda = torch.device("cuda")
shape = dict(vocab_size=500, hidden_size=64, num_layers=3, num_heads=4, ffn_size=128, max_tokens=64, num_labels=3)

def batch(length):
    mask = torch.arange(length) < torch.randint(5, length, (8, 1))
    mask[0] = True
    ids = torch.randint(5, 400, mask.shape).masked_fill(~mask, 1)
    tags = torch.randint(3, mask.shape).masked_fill(~mask, IGNORE)
    return Batch(ids, mask, torch.randint(3, (8,)), int(mask.sum()), tags)

def waits(method, head="sequence", **given):
    torch.manual_seed(0)
    config = replace(resolve({"model": "mini", **given}), precision="bfloat16")
    encoder = ModelConfig(**shape, head=head, num_slots=3)
    teacher = build_model(encoder).to(cuda).eval().requires_grad_(False)
    model = build_model(encoder)
    if config.tt_rank:
        tensorize(model, train.tt_config(config))
    model.to(cuda)
    if method != "fp32":
        prepare(model, quant_config(config, method))
        begin_stage(model, 0)
        if config.act_range != "dynamic":
            calibrate(model.eval(), [(batch(16).ids.to(cuda), None)])
    plan = train.make_plan(config, model, teacher if method == "sdq" else None, 240, method)
    optimizers = train.make_optimizers(model)
    for step in range(4):
        rows = batch(16 + step)
        if head == "sequence":
            rows.tags = None
        plan.begin(step, optimizers)
        SYNC.clear(), PINNED.clear()
        COUNT[0] = step == 3  # the first steps allocate
        terms = parallel.backward(model.train(), partial(plan.loss, step=step), rows, config.accumulate, train.means_over(head))
        norm = train.clip_gradients(model, 1.0)
        torch.stack([*terms.values(), norm]).tolist()  # as Training.check_finite does
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        COUNT[0] = False
    copies = sum(count for key, count in SYNC.items() if key.startswith("copy to CUDA"))
    found = {key: count for key, count in SYNC.items() if not key.startswith("copy to CUDA")}
    return found | {"copies of memory that is not pinned": copies - sum(PINNED)}

print(json.dumps({name: waits(*how[:1], **how[1]) for name, how in {
    "teacher": ("fp32", {}), "tags": ("fp32", dict(head="token")), "qat": ("qat", {}), "sdq": ("sdq", {}),
    "joint": ("sdq", dict(head="joint")), "kd": ("sdq", dict(recipe="kd", act_range="learned")),
    "lsq": ("sdq", dict(recipe="lsq")), "pq": ("sdq", dict(weights="pq")),
    "tt": ("sdq", dict(tt_rank=4, tt_embedding_rank=4, distill="layerwise")), "parts": ("sdq", dict(accumulate=4)),
}.items()}))
"""


@pytest.mark.skipif(not os.path.isfile(PRETEND) or not shutil.which("g++"), reason="no pretended GPU here")
def test_a_step_waits_for_the_gpu_twice():
    """For the number of different words, whose gradients are added up, and for the loss."""
    command = ["bash", PRETEND, "-c", SCRIPT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 10
    for name, waits in found.items():
        assert sum(waits.values()) <= 2, (name, waits)

"""aot.py: layers as compiled programs, which compute what their layers do."""

import copy
import glob
import os

import pytest
import torch
from conftest import random_ids
from test_checkpoint import make_student

import aot
from int8 import in_bfloat16, to_integer
from kit.common import UserError

compiles = pytest.mark.skipif(not aot.has_compiler(torch.device("cpu")), reason="no C++ compiler: nothing is compiled")
ROWS = [9, 5, 1], [2], [64], [17, 30], [20] * 9


def different_layers(config, **values):
    """An integer model whose layers have very different ranges."""
    model, quant = make_student(config, **values)
    with torch.no_grad():
        for scale, layer in zip((0.3, 3.0), model.encoder.layers, strict=True):
            for name, tensor in layer.state_dict().items():
                if name.endswith(("norm.weight", "quantizer.scale")):
                    tensor.mul_(scale)
    return to_integer(model, quant)


@torch.no_grad()
def assert_close(found, expected, rows, config):
    ids, mask = random_ids(rows, config.vocab_size)
    for key_mask in (mask, None):
        logits, others = found(ids, key_mask)[0], expected(ids, key_mask)[0]
        assert (logits - others).norm() < 0.1 * others.norm(), rows
    wide = torch.ones(len(rows), max(rows) + 3, dtype=torch.bool)
    wide[:, : max(rows)] = mask
    assert torch.equal(found(ids, wide[:, : max(rows)])[0], found(ids, mask)[0])  # a mask that is a view
    one = mask[:1].expand_as(mask)
    assert torch.equal(found(ids, one)[0], found(ids, one.contiguous())[0])


@compiles
def test_programs(tiny_config, tmp_path, monkeypatch):
    """One program for all layers, lengths and batches, and for all students of a shape; none for anything else."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # with nothing compiled before
    for values in ({}, {"act_range": "static"}):
        model = different_layers(tiny_config, **values)
        found = aot.compile_layers(copy.deepcopy(model))
        for rows in ROWS:
            assert_close(found, model, rows, tiny_config)
        x, mask = aot.example(model.encoder.layers[0], 12)
        for program, layer in zip(found.encoder.layers, model.encoder.layers, strict=True):
            expected = layer(x, mask, {})
            assert (program(x, mask, {}) - expected).norm() < 0.02 * expected.norm()
    programs = glob.glob(str(tmp_path / "sdq/*.pt2"))
    assert len(programs) == 2
    monkeypatch.setattr(aot, "compile_layer", None)
    other = different_layers(tiny_config)
    assert_close(aot.compile_layers(copy.deepcopy(other)), other, [9, 5], tiny_config)
    taps = found(*random_ids([9, 5], tiny_config.vocab_size), capture=("hidden", "map"))[1]
    assert len(taps["hidden"]) == 3 and len(taps["map"]) == 2
    with pytest.raises(TypeError):  # needs a new one
        aot.compile_layers(different_layers(tiny_config, act_bits=4))
    names = {os.path.basename(path)[:-4]: path for path in programs}
    own = names.pop(os.path.basename(aot.program_path(other.encoder.layers[0]))[:-4])
    os.replace(*names.values(), own)  # a program of something else under its name
    with pytest.raises(UserError, match="does not compute what its layer does"):
        aot.compile_layers(other)


def test_fingerprints(tiny_config, monkeypatch):
    """They don't depend on a layer's numbers, but on all else."""

    def fingerprint(**values):
        return aot.program_path(different_layers(tiny_config, **values).encoder.layers[0])

    first, static = fingerprint(), fingerprint(act_range="static")
    assert first == fingerprint() == fingerprint(weight_bits=4) and static == fingerprint(act_range="static")
    others = {fingerprint(act_bits=4), fingerprint(per_token=False), static}
    monkeypatch.setattr(aot, "cpuinfo", lambda field: "another processor")
    others.add(fingerprint())
    monkeypatch.undo()
    monkeypatch.setattr(torch, "__version__", "another version")
    assert len(others | {first, fingerprint()}) == 6


@torch.no_grad()
def test_graphs_for_a_gpu(tiny_config):
    """What a GPU compiles has no breaks and equal logits, and is the same for all layers and lengths; a few more graphs are
    for single sequences and for fewer than 17 tokens.
    """
    torch._dynamo.reset()
    model, quant = make_student(tiny_config, act_range="static")
    expected, found = (to_integer(model, quant, kernel="cuda") for _ in range(2))
    run = []

    def backend(graph, inputs):
        program = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
        return lambda *inputs: run.append(graph) or program(*inputs)

    how = dict(backend=backend, dynamic=True, fullgraph=True)
    programs = [aot.Program(each, torch.compile(aot.Program(each), **how)) for each in found.encoder.layers]
    found.encoder.layers = torch.nn.ModuleList(programs)
    for rows in ([9, 5, 4], [20, 3], [30] * 8, [1], [1, 1], [9, 4], [7], [30]):
        ids, mask = random_ids(rows, tiny_config.vocab_size)
        for key_mask in (mask, None):
            assert torch.equal(found(ids, key_mask)[0], expected(ids, key_mask)[0])
        if len(rows) == 8:
            assert len({*map(id, run)}) <= 2  # the first may take constants for inputs
    assert len({*map(id, run)}) < torch._dynamo.config.recompile_limit
    half, ids = to_integer(model, quant, kernel="cuda"), random_ids([9, 5, 4], tiny_config.vocab_size)
    in_bfloat16(half)  # as there
    logits, exact = half(*ids)[0], expected(*ids)[0]
    assert logits.dtype == torch.float32 and (logits - exact).norm() < 0.05 * exact.norm()

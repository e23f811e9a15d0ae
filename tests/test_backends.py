"""tools/backends.py: ours compute the same, other libraries' where they are installed."""

import pytest
import torch

import bench
from checkpoint import meta_model
from model import ModelConfig, initialize
from tools import backends
from tt import TTConfig, TTLinear, TTMEmbedding

CPU = torch.device("cpu")
OURS = ("fp32", "bf16", "fake-quantized", "int8 dynamic", "int8 static")


def test_missing_packages_are_reported(monkeypatch, capsys):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(backends, "multiplies_bf16", lambda device: True)
    assert backends.available_backends(CPU) == OURS
    printed = capsys.readouterr().out
    assert "Hugging Face fp32: not measured, transformers" in printed
    assert "int8 static compiled: not measured, no C++ compiler" in printed
    assert backends.tltorch_version() is None
    assert "tltorch: not measured" in capsys.readouterr().out


def test_hugging_face_computes_the_same(tmp_path):
    """Backends of one model, each loaded from its file. Ours: test_bench.py."""
    pytest.importorskip("transformers")
    names = ("Hugging Face fp32", "fp32", "torch.ao int8 dynamic")
    backends.write_files(ModelConfig(300, 64, 2, 1, 128, 64, head="sequence", num_labels=3), str(tmp_path), names)
    runners = {name: backends.load_backend(name, str(tmp_path), CPU) for name in names}
    with torch.inference_mode():
        errors = backends.errors_of(runners, backends.random_sequences(3, 20, 300))
    assert errors["Hugging Face fp32"] < 1e-5 < errors["torch.ao int8 dynamic"] < 0.3


def test_random_batches_look_like_training_data():
    args = bench.build_parser().parse_args("train --batch-size 6 --tokens 9 --vocab 50".split())
    batches = backends.random_batches(args, CPU, labels=3, slots=5)
    assert len(batches) == 4 and not torch.equal(batches[0].ids, batches[1].ids)
    for batch in batches:
        assert batch.ids.shape == batch.mask.shape == batch.tags.shape == (6, 9)
        assert batch.tokens == int(batch.mask.sum()) and set(batch.labels.tolist()) <= {0, 1, 2}
        assert (batch.ids[~batch.mask] == 1).all() and batch.mask[:, :5].all()
        tagged = batch.tags != -100
        assert torch.equal(tagged[:, 1:], batch.mask[:, 1:]) and not tagged[:, 0].any()
        assert int(batch.tags.max()) < 5
    assert backends.random_batches(args, CPU, labels=3)[0].tags is None


# ---------------------------------------------------------------------------------- tensor trains
def test_merged_cores_give_the_same_logits():
    config = ModelConfig(100, 64, 1, 1, 128, 64, head="joint", num_labels=3, num_slots=5, tt=TTConfig(4, 5))
    model, ids = initialize(meta_model(config)).eval(), torch.randint(4, 99, (3, 9))
    assert any(isinstance(module, TTLinear) for module in model.modules())
    merged = backends.merge_cores(model)
    kinds = (TTLinear, TTMEmbedding)
    assert not any(isinstance(module, kinds) for module in merged.modules())
    with torch.inference_mode():
        for found, expected in zip(merged(ids)[0], model(ids)[0], strict=True):
            torch.testing.assert_close(found, expected)


def test_saved_bytes_counts_storages_once():
    layer = torch.nn.Linear(10, 30)
    x = torch.randn(4, 10)  # kept by both layers, counted once; the weight is not counted

    def step():
        (layer(x).square().sum() + layer(x).sum()).backward()

    assert backends.saved_bytes(layer, step) == 4 * (4 * 10 + 4 * 30)
    optimizer = torch.optim.Adam(layer.parameters())
    optimizer.step()
    # parameters, gradients and two moments of 330 elements, and two step counts
    assert backends.state_bytes(layer, [optimizer]) == 4 * 4 * 330 + 2 * 4


def test_tltorch_layers():
    pytest.importorskip("tltorch")

    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    layer = TTLinear.like(torch.nn.Linear(64, 96), TTConfig(rank=6))
    for other in backends.tltorch_layers(layer).values():
        assert other(torch.randn(5, 64)).shape == (5, 96)
        assert 0.7 < count(other) / count(layer) < 1.3
        assert backends.forward_flops(other, 5) is None
        gradients = bench.forward_and_backward(other, torch.randn(5, 64), torch.randn(5, 96))
        assert gradients[0].shape == (5, 64)

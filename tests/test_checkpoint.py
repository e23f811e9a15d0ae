"""checkpoint.py: what is saved comes back, and what is broken, cut or hostile is refused in a line."""

import os

import pytest
import torch

from checkpoint import checkpoint_payload, load_checkpoint, save_atomically
from data import UserError
from model import ModelConfig, build_model


def test_checkpoint_round_trip(tiny_config, tmp_path):
    model = build_model(tiny_config).eval()
    path = str(tmp_path / "m.pt")
    save_atomically(checkpoint_payload(model, b"abc"), path)
    again = load_checkpoint(path)
    assert again.config == tiny_config and not again.training
    for (name, a), (_, b) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    assert os.listdir(tmp_path) == ["m.pt"]


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /nonexistent-folder/evil",))


def broken_checkpoints(config):
    good = checkpoint_payload(build_model(config), b"abc")

    def change(**values):
        return {**good, **values}

    tensors = good["tensors"]
    first = next(iter(tensors))
    return {
        "code": (Evil(), "pickled code"),
        "foreign": ({"weight": torch.zeros(2)}, "not a checkpoint of this project"),
        "list": ([1, 2], "not a checkpoint of this project"),
        "missing": (change(tensors={k: t for k, t in tensors.items() if k != first}), "is missing"),
        "extra": (change(tensors={**tensors, "spare": torch.zeros(1)}), "unexpected tensor spare"),
        "shape": (change(tensors={**tensors, first: torch.zeros(3, 3)}), "has shape (3, 3)"),
        "dtype": (change(tensors={**tensors, first: tensors[first].bfloat16()}), "torch.bfloat16"),
        "config": (
            change(config={**good["config"], "num_layers": 10**9}),
            "num_layers is 1000000000",
        ),
        "text in config": (
            change(config={**good["config"], "hidden_size": "x"}),
            "hidden_size is 'x'",
        ),
        "unknown field": (change(config={**good["config"], "spare": 1}), "model config is damaged"),
        "repeated number": (
            change(tensors={**tensors, first: torch.zeros(1).expand(tensors[first].shape)}),
            "claims more numbers than the file holds",
        ),
        "no tensors": (change(tensors=None), "holds no tensors"),
    }


@pytest.mark.parametrize("kind", broken_checkpoints(ModelConfig(8, 4, 1, 1, 4, 8)))
def test_broken_checkpoints_are_refused_by_name(kind, tmp_path):
    payload, message = broken_checkpoints(ModelConfig(8, 4, 1, 1, 4, 8))[kind]
    path = str(tmp_path / "bad.pt")
    torch.save(payload, path)
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 10, 500, 0.5, 0.99])
def test_truncated_checkpoint_is_refused(keep, tiny_config, tmp_path):
    path = tmp_path / "cut.pt"
    save_atomically(checkpoint_payload(build_model(tiny_config), b"abc"), str(path))
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match="damaged|pickled code"):
        load_checkpoint(str(path))


def test_failed_save_leaves_nothing(tmp_path):
    class Unpicklable:
        def __reduce__(self):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        save_atomically({"x": Unpicklable()}, str(tmp_path / "x.pt"))
    assert os.listdir(tmp_path) == []

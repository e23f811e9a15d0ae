"""convert.py: what it accepts, and the one line it answers everything else with. Parity is in
test_model.py.
"""

import json
import os
import shutil
import struct

import pytest
import torch
from conftest import GOLDEN, TOKENIZER

import convert
from model import load_checkpoint, read_checkpoint


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder that may be spoiled."""
    target = tmp_path / "hf"
    shutil.copytree(os.path.join(GOLDEN, "bin"), target)
    shutil.copy(TOKENIZER, target)
    return target


def run(folder, capsys, name="tiny", out="w.pt"):
    out = folder.parent / out
    status = convert.main([name, "--from", str(folder), "--out", str(out)])
    return status, capsys.readouterr(), out


def refused(folder, capsys, message, **kwargs):
    status, output, out = run(folder, capsys, **kwargs)
    assert status == 2 and not out.exists()
    assert (
        message in output.err and output.err.count("\n") == 1 and output.err.startswith("error: ")
    )
    assert [f for f in os.listdir(folder.parent) if f.endswith(".part")] == []


def change(folder, **tensors):
    """Replace tensors of the .bin; None deletes."""
    path = folder / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    for name, tensor in tensors.items():
        name = name.replace("__", ".")
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    torch.save(state, path)


def test_file_holds_all_and_only_that(folder, capsys):
    status, output, out = run(folder, capsys)
    assert status == 0 and "mlm head" in output.out
    payload = read_checkpoint(str(out))
    with open(TOKENIZER, "rb") as file:
        assert payload["tokenizer"].numpy().tobytes() == file.read()
    assert all(t.dtype == torch.float32 for t in payload["tensors"].values())
    numbers = 4 * sum(t.numel() for t in payload["tensors"].values())
    # no storage of the source file hides behind a view
    assert os.path.getsize(out) < numbers + os.path.getsize(TOKENIZER) + 30_000


def test_safetensors_saves_no_more_than_its_tensors(tmp_path, capsys):
    target = tmp_path / "hf"
    shutil.copytree(os.path.join(GOLDEN, "st"), target)
    shutil.copy(TOKENIZER, target)
    status, _, out = run(target, capsys)
    payload = read_checkpoint(str(out))
    numbers = 4 * sum(t.numel() for t in payload["tensors"].values())
    assert status == 0 and os.path.getsize(out) < numbers + os.path.getsize(TOKENIZER) + 30_000


def test_missing_extra_and_misshapen_tensors_are_named(folder, capsys):
    key = "roberta.encoder.layer.1.attention.self.key.bias"
    change(folder, **{key: None})
    refused(folder, capsys, "no tensor encoder.layer.1.attention.self.key.bias")
    change(folder, **{key: torch.zeros(31)})
    refused(folder, capsys, "encoder.layers.1.attention.key.bias has shape (31,), expected (32,)")
    change(folder, **{key: torch.zeros(32, dtype=torch.int64)})
    refused(folder, capsys, "is torch.int64, not a float")
    change(folder, **{key: torch.zeros(32), "roberta.adapter.weight": torch.zeros(2)})
    refused(folder, capsys, "no place in the key table: adapter.weight")


def test_skipped_tensors_are_skipped(folder, capsys):
    change(
        folder,
        **{
            "roberta.embeddings.position_ids": torch.arange(66)[None],
            "roberta.pooler.dense.weight": torch.zeros(32, 32),
            "roberta.pooler.dense.bias": torch.zeros(32),
        },
    )
    assert run(folder, capsys)[0] == 0


def test_files_of_old_pytorch_versions(folder, capsys):
    path = folder / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert run(folder, capsys)[0] == 0


def test_tensor_that_repeats_one_number(folder, capsys):
    key = "roberta.encoder.layer.1.attention.self.key.weight"
    change(folder, **{key: torch.zeros(1).expand(32, 32)})
    refused(folder, capsys, "claims more numbers than the file holds")


def test_next_command_names_the_file_that_was_written(folder, capsys):
    _, output, out = run(folder, capsys)
    assert output.out.rstrip().endswith(f"--model {out}")


def test_untied_output_matrix_is_refused(folder, capsys):
    change(folder, **{"lm_head.decoder.weight": torch.zeros(442, 32)})
    refused(folder, capsys, "untied")


def test_bare_encoder_converts_without_a_head(folder, capsys):
    path = folder / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    bare = {k.removeprefix("roberta."): t for k, t in state.items() if not k.startswith("lm_head")}
    torch.save(bare, path)
    status, output, out = run(folder, capsys)
    assert status == 0 and "none head" in output.out
    assert load_checkpoint(str(out))(torch.zeros(1, 3, dtype=torch.long))[0].shape == (1, 3, 32)


def test_config_is_checked(folder, capsys):
    path = folder / "config.json"
    good = json.loads(path.read_text())
    for values, message in (
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"num_hidden_layers": 10**6}, "num_layers is 1000000"),
        ({"num_hidden_layers": "2"}, "num_layers is '2'"),
        ({"pad_token_id": None}, "must be whole numbers"),
        ({"vocab_size": 443}, "shape"),
    ):
        path.write_text(json.dumps({**good, **values}))
        refused(folder, capsys, message)
    del good["hidden_size"]
    path.write_text(json.dumps(good))
    refused(folder, capsys, "config.json has no hidden_size")
    path.write_text("{")
    refused(folder, capsys, "not a JSON object")


def test_preset_names_are_reserved_for_their_shape(folder, capsys):
    refused(
        folder, capsys, "config.json has vocab_size = 442, xlmr-base has 250002", name="xlmr-base"
    )


def test_tokenizer_must_fit(folder, capsys):
    (folder / "sentencepiece.bpe.model").unlink()
    refused(folder, capsys, "no tokenizer at")
    (folder / "sentencepiece.bpe.model").write_bytes(b"not a model")
    refused(folder, capsys, "is not a SentencePiece model")


def test_folders_and_names(folder, capsys, tmp_path):
    refused(folder.parent / "nowhere", capsys, "no folder")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, capsys, "neither model.safetensors nor pytorch_model.bin")
    assert convert.main(["../evil", "--from", str(folder)]) == 2
    assert "is no name for a model" in capsys.readouterr().err
    assert convert.main(["xlmr-huge"]) == 2
    assert "no download is known for 'xlmr-huge'" in capsys.readouterr().err


def test_unwritable_output(folder, capsys, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    status = convert.main(["tiny", "--from", str(folder), "--out", str(blocker / "w.pt")])
    assert status == 2 and "cannot write" in capsys.readouterr().err


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil-was-here",))


def test_pickled_code_is_not_run(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder.parent)
    torch.save({"roberta.x": Evil()}, folder / "pytorch_model.bin")
    refused(folder, capsys, "holds pickled code")
    assert not os.path.exists("evil-was-here")
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 truncated")
    refused(folder, capsys, "use model.safetensors, or fetch it again")


def safetensors(header: dict | bytes, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        safetensors({}, b"", length=1 << 60),
        safetensors(b"{not json", b""),
        safetensors(b"[1]", b""),
        safetensors({"x": {"dtype": "F32"}}, b""),
        safetensors({"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"0000"),
        safetensors({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"0000"),
        safetensors({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"0000"),
        safetensors({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"0000"),
        safetensors({"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, b"0000"),
        safetensors({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, b"0000"),
    ],
)
def test_damaged_safetensors(content, folder, capsys):
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, capsys, "damaged")


def test_safetensors_reader_handles_types_and_odd_offsets(tmp_path):
    values = {
        "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
        "byte": torch.tensor([7], dtype=torch.uint8),
        "brain": torch.tensor([[0.5], [3.0]], dtype=torch.bfloat16),
        "float": torch.tensor([3.25, -1.0]),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.0),
    }
    names = {torch.float16: "F16", torch.uint8: "U8", torch.bfloat16: "BF16", torch.float32: "F32"}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in values.items():
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        offsets = [len(data), len(data) + len(raw)]
        entry = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        header[name] = entry
        data += raw
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors(header, data))
    found = convert.read_safetensors(str(path))
    assert found.keys() == values.keys()
    for name, tensor in values.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)

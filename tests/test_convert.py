"""convert.py: what it accepts, and the one line it answers everything else with. Parity of RoBERTa
is in test_model.py, of BERT here, with the golden tensors of make_golden_bert.py.
"""

import json
import os
import shutil
import struct

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT, TOKENIZER

import convert
from checkpoint import load_checkpoint, read_checkpoint
from data.tokenizer import Tokenizer
from model import PRESETS


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
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
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


# ------------------------------------------------------------------------------------------ BERT
GOLDEN_BERT = os.path.join(ROOT, "tests", "golden_bert")


@pytest.fixture
def bert(tmp_path):
    """A Hugging Face BERT with a classifier, as a .bin that change() can spoil."""
    target = tmp_path / "hf"
    target.mkdir()
    for name in ("config.json", "vocab.txt", "tokenizer_config.json"):
        shutil.copy(os.path.join(GOLDEN_BERT, name), target)
    state = convert.read_safetensors(os.path.join(GOLDEN_BERT, "model.safetensors"))
    torch.save(state, target / "pytorch_model.bin")
    return target


@pytest.fixture(scope="module")
def expected():
    with np.load(os.path.join(GOLDEN_BERT, "expected.npz")) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def bert_parity(out, expected, logits_name):
    """The converted model's hidden states and logits are Hugging Face's."""
    model, mask = load_checkpoint(str(out)), expected["mask"]
    with torch.no_grad():
        logits, taps = model(expected["ids"], mask, ("hidden",), types=expected["types"])
    hidden = torch.stack(taps["hidden"])
    assert hidden.shape == expected["hidden"].shape == (3, 3, 20, 16)
    assert (hidden - expected["hidden"])[:, mask].abs().max() < 1e-5
    difference = logits - expected[logits_name]
    per_token = logits_name in ("token_logits", "last")
    assert (difference[mask] if per_token else difference).abs().max() < 1e-5
    return model


def without(folder, *beginnings):
    """Delete tensors by the beginning of their names; take "bert." away from the others."""
    path = folder / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    kept = {key: t for key, t in state.items() if not key.startswith(beginnings)}
    assert len(kept) < len(state)
    torch.save({key.removeprefix("bert."): t for key, t in kept.items()}, path)


def test_bert_with_a_classifier(bert, capsys, expected):
    status, output, out = run(bert, capsys)
    assert status == 0 and "sequence head" in output.out
    assert output.out.rstrip().endswith(f"next: python train.py --task rte --model {out}")
    config = bert_parity(out, expected, "sequence_logits").config
    assert (config.position_offset, config.max_tokens, config.type_vocab_size) == (0, 32, 2)
    assert (config.pad_id, config.norm_eps, config.num_labels) == (0, 1e-12, 3)


def test_bert_with_a_pooler(bert, capsys, expected):
    without(bert, "classifier.")
    status, output, out = run(bert, capsys)
    assert status == 0 and "pooler head" in output.out
    bert_parity(out, expected, "pooler")


def test_bert_with_tags(bert, capsys, expected):
    without(bert, "bert.pooler.")
    status, output, out = run(bert, capsys)
    assert status == 0 and "token head" in output.out
    bert_parity(out, expected, "token_logits")


def test_bert_with_tags_and_an_unused_pooler(bert, capsys, expected):
    settings = json.loads((bert / "config.json").read_text())
    settings["architectures"] = ["BertForTokenClassification"]
    (bert / "config.json").write_text(json.dumps(settings))
    status, output, out = run(bert, capsys)
    assert status == 0 and "token head" in output.out
    bert_parity(out, expected, "token_logits")


def test_bert_without_pooler_and_classifier(bert, capsys, expected):
    without(bert, "bert.pooler.", "classifier.")
    status, output, out = run(bert, capsys)
    assert status == 0 and "none head" in output.out
    bert_parity(out, {**expected, "last": expected["hidden"][-1]}, "last")


def test_pretraining_heads_and_old_names(bert, capsys, expected):
    """A file of TensorFlow's time: gamma and beta, heads of the pretraining, a count of positions."""
    without(bert, "classifier.")
    path = bert / "pytorch_model.bin"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    state = {}
    for key, tensor in torch.load(path, weights_only=True).items():
        end = next((end for end in old if key.endswith(end)), "")
        state["bert." + key.removesuffix(end) + old.get(end, "")] = tensor
    assert sum(key.endswith(("gamma", "beta")) for key in state) == 10
    state |= {"cls.predictions.transform.LayerNorm.gamma": torch.ones(16)}
    state |= {"cls.predictions.decoder.weight": torch.zeros(780, 16)}
    state |= {"cls.seq_relationship.weight": torch.zeros(2, 16)}
    state |= {"bert.embeddings.position_ids": torch.arange(32)[None]}
    torch.save(state, path)
    settings = json.loads((bert / "config.json").read_text())
    del settings["layer_norm_eps"], settings["pad_token_id"]  # Google's own files have neither
    (bert / "config.json").write_text(json.dumps(settings))
    status, output, out = run(bert, capsys)
    assert status == 0 and "pooler head" in output.out
    bert_parity(out, expected, "pooler")
    state["bert.embeddings.LayerNorm.weight"] = torch.ones(16)
    torch.save(state, path)
    refused(bert, capsys, "two tensors that mean embeddings.LayerNorm.weight", out="again.pt")


def test_bert_tensors_are_accounted_for(bert, capsys):
    change(bert, **{"bert.pooler.dense.bias": None})
    refused(bert, capsys, "no tensor pooler.dense.bias")
    change(bert, **{"bert.pooler.dense.bias": torch.zeros(16), "qa_outputs.bias": torch.zeros(2)})
    refused(bert, capsys, "no place in the key table: qa_outputs.bias")
    change(bert, **{"qa_outputs.bias": None, "roberta.x": torch.zeros(2)})
    refused(bert, capsys, "no place in the key table: roberta.x")


@pytest.mark.parametrize("lower", [True, False, None])
def test_capitals_as_tokenizer_config_says(bert, capsys, lower):
    path = bert / "tokenizer_config.json"
    path.unlink() if lower is None else path.write_text(json.dumps({"do_lower_case": lower}))
    status, _, out = run(bert, capsys)
    assert status == 0
    tokenizer = Tokenizer.from_payload(read_checkpoint(str(out)), "w.pt", 780)
    assert tokenizer.lower is (lower is not False)
    assert tokenizer.bytes.split(b"\n", 1)[1] == (bert / "vocab.txt").read_bytes()


def test_bert_settings_are_checked(bert, capsys):
    path = bert / "config.json"
    good = json.loads(path.read_text())
    for values, message in (
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'; supported: gelu"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder is True; supported: False"),
        ({"model_type": "distilbert"}, "supported: xlm-roberta, roberta, bert"),
        ({"pad_token_id": 1}, "vocab.txt has [PAD] at 0, the model at 1"),
        ({"vocab_size": 779}, "shape"),
        ({"max_position_embeddings": 30}, "shape"),
    ):
        path.write_text(json.dumps({**good, **values}))
        if values.get("model_type"):  # any other kind of model has a SentencePiece model
            shutil.copy(TOKENIZER, bert)
        refused(bert, capsys, message)
    path.write_text(json.dumps(good))
    path = bert / "tokenizer_config.json"
    for values, message in (
        ({"do_lower_case": "yes"}, "do_lower_case is 'yes'"),
        ({"strip_accents": False}, "strip_accents is False; supported: True"),
        ({"tokenize_chinese_chars": False}, "tokenize_chinese_chars is False"),
        ({"never_split": ["x"]}, "never_split is ['x']"),
        ({"tokenizer_class": "BertJapaneseTokenizer"}, "tokenizer_class"),
    ):
        path.write_text(json.dumps(values))
        refused(bert, capsys, message)
    path.write_text("[]")
    refused(bert, capsys, "tokenizer_config.json is not a JSON object")
    path.unlink()
    refused(bert, capsys, "minilm has 30522", name="minilm")


def test_bert_vocabulary_must_fit(bert, capsys):
    path = bert / "vocab.txt"
    good = path.read_bytes()
    path.write_bytes(good + b"onemore\n")
    refused(bert, capsys, "vocab.txt has 781 ids, the model 780")
    path.write_bytes(good + b"[SEP]\n")
    refused(bert, capsys, "lists '[SEP]' twice")
    path.write_bytes(b"\xff\xfe")
    refused(bert, capsys, "is not a WordPiece vocabulary")
    path.unlink()
    refused(bert, capsys, "a BERT comes with a vocab.txt")


def test_a_folder_without_config_by_its_preset(bert, capsys, monkeypatch):
    _, _, out = run(bert, capsys)
    monkeypatch.setitem(convert.PRESETS, "small-bert", load_checkpoint(str(out)).config)
    (bert / "config.json").unlink()
    status, output, _ = run(bert, capsys, name="small-bert", out="again.pt")
    assert status == 0 and "sequence head" in output.out
    refused(bert, capsys, "no config.json beside the weights", name="other", out="other.pt")


def test_real_minilm(capsys, tmp_path):
    """all-MiniLM-L6-v2 and transformers' BertModel: pairs of texts, padded, with token types."""
    folder = os.environ.get("SDQ_MINILM")
    if not folder:
        pytest.skip("SDQ_MINILM names no Hugging Face folder of MiniLM")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    out = str(tmp_path / "minilm.pt")
    assert convert.main(["minilm", "--from", folder, "--out", out]) == 0
    assert "pooler head, 22,713,216 parameters" in capsys.readouterr().out
    model = load_checkpoint(out)
    assert {**vars(model.config), "head": "mlm"} == vars(PRESETS["minilm"])
    tokenizer = Tokenizer.from_payload(read_checkpoint(out), out, model.config.vocab_size)
    first = ["A man plays a guitar.", "The café was closed; we walked home in the rain.", "Hi"]
    second = ["Someone makes music on an instrument.", "Nobody went out.", "Where is the station?"]
    rows, begins = tokenizer.encode_typed(first, second)
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.from_numpy(row).long() for row in rows], True, tokenizer.pad_id
    )
    places = torch.arange(ids.shape[1])
    mask = places < torch.tensor([len(row) for row in rows])[:, None]
    types = ((places >= torch.from_numpy(begins)[:, None]) & mask).long()
    assert not mask.all() and types.any(dim=1).all()
    reference = transformers.BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        want = reference(ids, mask.long(), types, output_hidden_states=True)
        logits, taps = model(ids, mask, ("hidden",), types=types)
    for ours, theirs in zip(taps["hidden"], want.hidden_states, strict=True):
        assert (ours - theirs)[mask].abs().max() < 2e-5
    assert (logits - want.pooler_output).abs().max() < 2e-5

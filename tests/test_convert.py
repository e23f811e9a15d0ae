"""convert.py: what it converts, and the one-line error for everything else. Parity with Hugging Face's
RoBERTa is in test_model.py, with BERT here (golden tensors of make_golden_bert.py).
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
import train
from checkpoint import load_checkpoint, read_checkpoint
from data.fetch import MODELS
from data.tokenizer import Tokenizer
from kit.common import UserError
from model import PRESETS


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder that a test may damage."""
    target = tmp_path / "hf"
    shutil.copytree(os.path.join(GOLDEN, "bin"), target)
    shutil.copy(TOKENIZER, target)
    return target


def run(folder, capsys, name="tiny", out="w.pt"):
    out = folder.parent / out
    status = convert.main([name, "--from", str(folder), "--out", str(out)])
    return status, capsys.readouterr(), out


def rejected(folder, capsys, message, **kwargs):
    """Check that the program exits with 2 and one line that contains the message, and writes no file."""
    status, output, out = run(folder, capsys, **kwargs)
    assert status == 2 and not out.exists()
    assert message in output.err and output.err.count("\n") == 1 and output.err.startswith("error: ")
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


def test_converted_file(folder, capsys):
    status, output, out = run(folder, capsys)
    assert status == 0 and "masked language model, " in output.out
    payload = read_checkpoint(str(out))
    with open(TOKENIZER, "rb") as file:
        assert payload["tokenizer"].numpy().tobytes() == file.read()
    assert all(t.dtype == torch.float32 for t in payload["tensors"].values())
    content = 4 * sum(t.numel() for t in payload["tensors"].values())
    # no view keeps the storage of the whole source file
    assert os.path.getsize(out) < content + os.path.getsize(TOKENIZER) + 30_000


def test_converted_safetensors_file(tmp_path, capsys):
    target = tmp_path / "hf"
    shutil.copytree(os.path.join(GOLDEN, "st"), target)
    shutil.copy(TOKENIZER, target)
    status, _, out = run(target, capsys)
    payload = read_checkpoint(str(out))
    content = 4 * sum(t.numel() for t in payload["tensors"].values())
    assert status == 0 and os.path.getsize(out) < content + os.path.getsize(TOKENIZER) + 30_000


def test_missing_unexpected_and_misshapen_tensors(folder, capsys):
    key = "roberta.encoder.layer.1.attention.self.key.bias"
    change(folder, **{key: None})
    rejected(folder, capsys, "no tensor encoder.layer.1.attention.self.key.bias")
    change(folder, **{key: torch.zeros(31)})
    rejected(folder, capsys, "encoder.layers.1.attention.key.bias has shape (31,), expected (32,)")
    change(folder, **{key: torch.zeros(32, dtype=torch.int64)})
    rejected(folder, capsys, "is torch.int64, not a float")
    change(folder, **{key: torch.zeros(32), "roberta.adapter.weight": torch.zeros(2)})
    rejected(folder, capsys, "no place in the key table: adapter.weight")


def test_skipped_tensors(folder, capsys):
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


def test_tensor_that_repeats_one_element(folder, capsys):
    key = "roberta.encoder.layer.1.attention.self.key.weight"
    change(folder, **{key: torch.zeros(1).expand(32, 32)})
    rejected(folder, capsys, "claims more elements than the file holds")


def test_next_command_names_the_written_file(folder, capsys):
    _, output, out = run(folder, capsys)
    assert output.out.rstrip().endswith(f"--model {out}")


def test_untied_output_matrix(folder, capsys):
    change(folder, **{"lm_head.decoder.weight": torch.zeros(442, 32)})
    rejected(folder, capsys, "untied")


def test_bare_encoder(folder, capsys):
    path = folder / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    bare = {k.removeprefix("roberta."): t for k, t in state.items() if not k.startswith("lm_head")}
    torch.save(bare, path)
    status, output, out = run(folder, capsys)
    assert status == 0 and ": encoder without a head, " in output.out
    assert load_checkpoint(str(out))(torch.zeros(1, 3, dtype=torch.long))[0].shape == (1, 3, 32)


def test_config_is_checked(folder, capsys):
    path = folder / "config.json"
    good = json.loads(path.read_text())
    for values, message in (
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"num_hidden_layers": 10**6}, "num_layers is 1000000"),
        ({"num_hidden_layers": "2"}, "num_layers is '2'"),
        ({"pad_token_id": None}, "must be integers"),
        ({"vocab_size": 443}, "shape"),
    ):
        path.write_text(json.dumps({**good, **values}))
        rejected(folder, capsys, message)
    del good["hidden_size"]
    path.write_text(json.dumps(good))
    rejected(folder, capsys, "config.json has no hidden_size")
    path.write_text("{")
    rejected(folder, capsys, "not a JSON object")


def test_preset_names_are_reserved_for_their_shape(folder, capsys):
    rejected(folder, capsys, "config.json has vocab_size = 442, xlmr-base has 250002", name="xlmr-base")


def test_missing_or_damaged_tokenizer(folder, capsys):
    (folder / "sentencepiece.bpe.model").unlink()
    rejected(folder, capsys, "no tokenizer in")
    (folder / "sentencepiece.bpe.model").write_bytes(b"not a model")
    rejected(folder, capsys, "is not a SentencePiece model")


def test_missing_folders_and_invalid_names(folder, capsys, tmp_path):
    rejected(folder.parent / "nowhere", capsys, "no folder")
    (folder / "pytorch_model.bin").unlink()
    rejected(folder, capsys, "neither model.safetensors nor pytorch_model.bin")
    assert convert.main(["../evil", "--from", str(folder)]) == 2
    assert "is no name for a model" in capsys.readouterr().err
    assert convert.main(["xlmr-huge"]) == 2
    assert "no download is known for 'xlmr-huge'" in capsys.readouterr().err


def test_unwritable_output(folder, capsys, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    status = convert.main(["tiny", "--from", str(folder), "--out", str(blocker / "w.pt")])
    assert status == 2 and capsys.readouterr().err.startswith("error: ")


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil-was-here",))


def test_pickled_code_is_not_executed(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder.parent)
    torch.save({"roberta.x": Evil()}, folder / "pytorch_model.bin")
    rejected(folder, capsys, "holds pickled code")
    assert not os.path.exists("evil-was-here")
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 truncated")
    rejected(folder, capsys, "use model.safetensors, or fetch it again")


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
    rejected(folder, capsys, "damaged")


def test_safetensors_types_and_unaligned_offsets(tmp_path):
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
    """A Hugging Face BERT with a classifier, as a .bin that change() can edit."""
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
    """Compare hidden states and logits of the converted model with those of Hugging Face."""
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
    """Delete tensors by the beginning of their names; remove the prefix "bert." from the others."""
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
    assert status == 0 and ": encoder with a pooler, " in output.out
    bert_parity(out, expected, "pooler")


def test_bert_with_a_token_head(bert, capsys, expected):
    without(bert, "bert.pooler.")
    rejected(bert, capsys, "architectures is ['BertForSequenceClassification']; for these tensors supported: ")
    settings = json.loads((bert / "config.json").read_text())
    del settings["architectures"]
    (bert / "config.json").write_text(json.dumps(settings))
    status, output, out = run(bert, capsys)
    assert status == 0 and "token head" in output.out
    bert_parity(out, expected, "token_logits")


def test_bert_with_a_token_head_and_an_unused_pooler(bert, capsys, expected):
    settings = json.loads((bert / "config.json").read_text())
    settings["architectures"] = ["BertForTokenClassification"]
    (bert / "config.json").write_text(json.dumps(settings))
    status, output, out = run(bert, capsys)
    assert status == 0 and "token head" in output.out
    bert_parity(out, expected, "token_logits")


def test_bert_without_pooler_and_classifier(bert, capsys, expected):
    without(bert, "bert.pooler.", "classifier.")
    status, output, out = run(bert, capsys)
    assert status == 0 and ": encoder without a head, " in output.out
    bert_parity(out, {**expected, "last": expected["hidden"][-1]}, "last")


@pytest.mark.parametrize("kind", ["XLMRoberta", "Bert"])
def test_heads_that_mean_something_else(request, capsys, kind):
    """A head of classes is kept only if config.json says that its logits are those of one class out of several."""
    folder = request.getfixturevalue("folder" if kind == "XLMRoberta" else "bert")
    if kind == "XLMRoberta":  # the tensors of a token head, which are those of multiple choice, too
        lm_head = ("bias", "dense.weight", "dense.bias", "layer_norm.weight", "layer_norm.bias", "decoder.weight")
        change(folder, **{f"lm_head.{name}": None for name in (*lm_head, "decoder.bias")})
        change(folder, classifier__weight=torch.zeros(3, 32), classifier__bias=torch.zeros(3))
        right, wrong = "XLMRobertaForTokenClassification", "XLMRobertaForSequenceClassification"
    else:
        right, wrong = "BertForSequenceClassification", "BertForNextSentencePrediction"
    path = folder / "config.json"
    good = json.loads(path.read_text()) | {"architectures": [right]}
    names, identity = {str(i): f"class {i}" for i in range(4)}, "torch.nn.modules.linear.Identity"
    sigmoid = "torch.nn.modules.activation.Sigmoid"
    for values, message in (
        ({"problem_type": "multi_label_classification"}, "problem_type is 'multi_label_classification'"),
        ({"problem_type": "regression"}, "problem_type is 'regression'; supported: single_label_classification"),
        ({"architectures": [f"{kind}ForMultipleChoice"]}, f"architectures is ['{kind}ForMultipleChoice']"),
        ({"architectures": [wrong]}, f"architectures is ['{wrong}']; for these tensors supported: "),
        ({"architectures": [right + "WithExtras"]}, "WithExtras']; for these tensors supported: "),
        ({"id2label": names}, "config.json names 4 classes in id2label, the head has 3"),
        ({"id2label": ["0", "1", "2"]}, "config.json names 3 classes in id2label, the head has 3"),
        ({"id2label": {"1": "a", "2": "b", "3": "c"}}, "config.json names 3 classes in id2label"),
        ({"auto_map": {"AutoModel": "modeling.Other"}}, "auto_map is {'AutoModel': 'modeling.Other'}"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is {'quant_method': 'gptq'}"),
        ({"sbert_ce_default_activation_function": sigmoid}, "sbert_ce_default_activation_function is"),
        ({"sentence_transformers": {"activation_fn": sigmoid}}, f"activation_fn is '{sigmoid}'"),
    ):
        path.write_text(json.dumps({**good, **values}))
        rejected(folder, capsys, message)
    for values in (
        {"problem_type": "single_label_classification", "dtype": "float32", "transformers_version": "5.24.0"},
        {"problem_type": None, "auto_map": {}, "quantization_config": None, "architectures": None},
        {"sbert_ce_default_activation_function": identity, "sentence_transformers": {"activation_fn": identity}},
        {"id2label": None},
    ):
        path.write_text(json.dumps({**good, **values}))
        assert run(folder, capsys)[0] == 0, values


def test_one_label_is_regression(bert, capsys):
    change(bert, classifier__weight=torch.zeros(1, 16), classifier__bias=torch.zeros(1))
    settings = json.loads((bert / "config.json").read_text()) | {"id2label": {"0": "LABEL_0"}}
    for problem in ("regression", None):
        (bert / "config.json").write_text(json.dumps(settings | {"problem_type": problem}))
        assert run(bert, capsys)[0] == 0
    (bert / "config.json").write_text(json.dumps(settings | {"problem_type": "multi_label_classification"}))
    rejected(bert, capsys, "problem_type is 'multi_label_classification'; supported: regression", out="no.pt")


def test_pretraining_heads_and_old_names(bert, capsys, expected):
    """A file converted from TensorFlow: gamma and beta, pretraining heads, position ids."""
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
    assert status == 0 and ": encoder with a pooler, " in output.out
    bert_parity(out, expected, "pooler")
    state["bert.embeddings.LayerNorm.weight"] = torch.ones(16)
    torch.save(state, path)
    rejected(bert, capsys, "two tensors that mean embeddings.LayerNorm.weight", out="again.pt")


def test_missing_and_unexpected_tensors_of_bert(bert, capsys):
    change(bert, **{"bert.pooler.dense.bias": None})
    rejected(bert, capsys, "no tensor pooler.dense.bias")
    change(bert, **{"bert.pooler.dense.bias": torch.zeros(16), "qa_outputs.bias": torch.zeros(2)})
    rejected(bert, capsys, "no place in the key table: qa_outputs.bias")
    change(bert, **{"qa_outputs.bias": None, "roberta.x": torch.zeros(2)})
    rejected(bert, capsys, "no place in the key table: roberta.x")


@pytest.mark.parametrize("lower", [True, False, None])
def test_lower_casing_follows_tokenizer_config(bert, capsys, lower):
    path = bert / "tokenizer_config.json"
    path.unlink() if lower is None else path.write_text(json.dumps({"do_lower_case": lower}))
    status, _, out = run(bert, capsys)
    assert status == 0
    tokenizer = Tokenizer.from_payload(read_checkpoint(str(out)), "w.pt", 780)
    assert tokenizer.lower is (lower is not False)
    assert tokenizer.bytes.split(b"\n", 1)[1] == (bert / "vocab.txt").read_bytes()


def test_settings_of_bert_are_checked(bert, capsys):
    path = bert / "config.json"
    good = json.loads(path.read_text())
    for values, message in (
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'; supported: gelu"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder is True; supported: False"),
        ({"model_type": "distilbert"}, "supported: xlm-roberta, roberta, bert"),
        ({"pad_token_id": 1}, "the tokenizer pads with 0, the model with 1"),
        ({"vocab_size": 779}, "shape"),
        ({"max_position_embeddings": 30}, "shape"),
    ):
        path.write_text(json.dumps({**good, **values}))
        rejected(bert, capsys, message)
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
        rejected(bert, capsys, message)
    path.write_text("[]")
    rejected(bert, capsys, "tokenizer_config.json is not a JSON object")
    path.unlink()
    rejected(bert, capsys, "minilm has 30522", name="minilm")


def test_vocabulary_of_bert_is_checked(bert, capsys):
    path = bert / "vocab.txt"
    good = path.read_bytes()
    path.write_bytes(good + b"onemore\n")
    rejected(bert, capsys, "the tokenizer has 781 ids, the model only 780")
    path.write_bytes(good + b"[SEP]\n")
    rejected(bert, capsys, "lists '[SEP]' twice")
    path.write_bytes(b"\xff\xfe")
    rejected(bert, capsys, "is not a WordPiece vocabulary")
    path.unlink()
    rejected(bert, capsys, "no tokenizer in")


def test_folder_without_config_json(bert, capsys, monkeypatch):
    _, _, out = run(bert, capsys)
    monkeypatch.setitem(convert.PRESETS, "small-bert", load_checkpoint(str(out)).config)
    (bert / "config.json").unlink()
    status, output, _ = run(bert, capsys, name="small-bert", out="again.pt")
    assert status == 0 and "sequence head" in output.out
    rejected(bert, capsys, "no config.json beside the weights", name="other", out="other.pt")


def test_real_minilm(capsys, tmp_path):
    """Parity of all-MiniLM-L6-v2 with transformers' BertModel on padded pairs of texts."""
    folder = os.environ.get("SDQ_MINILM")
    if not folder:
        pytest.skip("SDQ_MINILM names no Hugging Face folder of MiniLM")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    out = str(tmp_path / "minilm.pt")
    assert convert.main(["minilm", "--from", folder, "--out", out]) == 0
    assert "encoder with a pooler, 22,713,216 parameters" in capsys.readouterr().out
    model = load_checkpoint(out)
    assert {**vars(model.config), "head": "mlm"} == vars(PRESETS["minilm"])
    tokenizer = Tokenizer.from_payload(read_checkpoint(out), out, model.config.vocab_size)
    first = ["A man plays a guitar.", "The café was closed; we walked home in the rain.", "Hi"]
    second = ["Someone makes music on an instrument.", "Nobody went out.", "Where is the station?"]
    rows, begins = tokenizer.encode_typed(first, second)
    ids = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row).long() for row in rows], True, tokenizer.pad_id)
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


def test_train_names_the_models_that_can_be_downloaded(monkeypatch, tmp_path):
    monkeypatch.setattr(train.checkpoint, "WEIGHTS_DIR", str(tmp_path))
    with pytest.raises(UserError, match=f"or one of: mini {' '.join(MODELS)}$"):
        train.find_model("nonesuch")
    for name, how in {**{name: name for name in MODELS}, "bert-base": "bert-base --from DIR"}.items():
        with pytest.raises(UserError, match=f"no weights for {name} yet: make them with 'python convert.py {how}'"):
            train.find_model(name)

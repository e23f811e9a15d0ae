"""convert.py: the tensors and settings that it converts, and the one-line error for everything else. Parity with
Hugging Face's RoBERTa is in test_model.py, with BERT here (golden tensors of make_golden.py).
"""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT, TOKENIZER

import convert
from checkpoint import load_model
from data.tokenizer import load_tokenizer
from kit.files import map_tensors
from model import PRESETS

BERT = os.path.join(ROOT, "tests", "golden_bert")


def weights(folder):
    """Copies of the tensors of a folder: the file itself, from which they are mapped, will be overwritten."""
    return {name: tensor.clone() for name, tensor in convert.read_weights(str(folder)).items()}


def change(folder, state=None, **tensors):
    """Replace tensors of a folder, or all of them; None deletes."""
    state = (weights(folder) if state is None else state) | tensors
    for path in folder.glob("*safetensors*"):
        path.unlink()
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, folder / "pytorch_model.bin")


def write(path, **settings):
    """Change settings of a JSON file; None deletes."""
    settings = (json.loads(path.read_text()) if path.exists() else {}) | settings
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))


def converted(folder, name="small", *options):
    out = os.path.join(os.path.dirname(folder), f"{name}.safetensors")
    assert convert.main([name, "--from", str(folder), "--out", out, *options]) == 0
    return out


def error_of(folder, capsys, name="no"):
    """The one line that a folder is refused with; no file is written."""
    out = os.path.join(os.path.dirname(folder), "no.safetensors")
    assert convert.main([name, "--from", str(folder), "--out", out]) == 2
    assert not [name for name in os.listdir(os.path.dirname(out)) if name.startswith("no.")]
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def contents(path):
    """The tensors of a converted file, and its tokenizer."""
    tensors, _ = map_tensors(path, "")
    return tensors, load_tokenizer(tensors.pop("tokenizer").numpy().tobytes())


@pytest.fixture
def roberta(tmp_path):
    """A masked language model in a .bin of fp16 and fp32."""
    shutil.copytree(os.path.join(GOLDEN, "bin"), tmp_path / "roberta")
    shutil.copy(TOKENIZER, tmp_path / "roberta")
    return tmp_path / "roberta"


@pytest.fixture
def bert(tmp_path):
    """A classifier with a pooler and vocab.txt."""
    return shutil.copytree(BERT, tmp_path / "bert")


@pytest.mark.parametrize("kind", ["bin", "st"])
def test_converted_file(roberta, capsys, kind):
    if kind == "st":
        (roberta / "pytorch_model.bin").unlink()
        shutil.copy(os.path.join(GOLDEN, "st", "model.safetensors"), roberta)
    out = converted(roberta)
    assert "mlm head, " in capsys.readouterr().out
    tensors, tokenizer = contents(out)
    with open(TOKENIZER, "rb") as file:
        assert tokenizer.bytes == file.read()
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    content = 4 * sum(tensor.numel() for tensor in tensors.values())
    assert os.path.getsize(out) < content + os.path.getsize(TOKENIZER) + 30_000  # no view keeps the whole source


SMALL, KEY = torch.zeros(2), "encoder.layer.1.attention.self.key.weight"


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        (f"roberta.{KEY}", None, f"no tensor {KEY}"),
        (f"roberta.{KEY}", SMALL, "layers.1.attention.key.weight has shape (2,), expected (32, 32)"),
        ("roberta.adapter.weight", SMALL, "no place in the key table: adapter.weight"),
        ("lm_head.decoder.weight", torch.zeros(442, 32), "untied"),
        ("bert.pooler.dense.bias", None, "no tensor pooler.dense.bias"),
        ("bert.roberta.x", SMALL, "no place in the key table: roberta.x"),
        ("bert.embeddings.LayerNorm.gamma", SMALL, "two tensors that mean embeddings.LayerNorm.weight"),
        *((f"bert.{KEY}", SMALL.to(kind), f"no tensor {KEY} in floats") for kind in (torch.int64, torch.float8_e4m3fn)),
        *(
            (f"bert.{KEY}", torch.zeros(16, 16, dtype=torch.float64).fill_diagonal_(value), "not finite")
            for value in (float("nan"), float("inf"), 1e300)  # the last is not finite in float32
        ),
    ],
)
def test_wrong_tensors_are_named(request, capsys, name, tensor, message):
    folder = request.getfixturevalue("bert" if name.startswith("bert") else "roberta")
    change(folder, **{name: tensor})
    assert message in error_of(folder, capsys)


@pytest.mark.parametrize("prefix", ["", "module.", "0.auto_model."])
def test_names_that_files_have_beside(roberta, prefix):
    """The prefixes of training libraries, tensors that are not needed, and the file format before PyTorch 1.6."""
    expected, _ = contents(converted(roberta))
    more = {"roberta.embeddings.position_ids": torch.arange(66)[None], "roberta.pooler.dense.bias": torch.zeros(32)}
    state = {prefix + name: tensor for name, tensor in (weights(roberta) | more).items()}
    state = {"state_dict": state, "epoch": 3} if prefix else state
    torch.save(state, roberta / "pytorch_model.bin", _use_new_zipfile_serialization=bool(prefix))
    again, _ = contents(converted(roberta, "again"))
    assert again.keys() == expected.keys() and all(torch.equal(again[name], expected[name]) for name in again)


IDENTITY, SIGMOID = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Sigmoid"
OTHERS = {"hidden_act": "gelu_new", "model_type": "distilbert", "position_embedding_type": "relative_key"}
OTHERS |= {"is_decoder": True, "auto_map": {"AutoModel": "modeling.Other"}, "problem_type": "regression"}
OTHERS |= {"quantization_config": {"quant_method": "gptq"}, "sbert_ce_default_activation_function": SIGMOID}
OTHERS |= {"architectures": ["BertForNextSentencePrediction"]}
RULES = {"do_lower_case": "yes", "strip_accents": False, "tokenize_chinese_chars": False, "never_split": ["x"]}
RULES |= {"tokenizer_class": "BertJapaneseTokenizer"}


@pytest.mark.parametrize(
    "name, values, message",
    [
        *(("config.json", {name: value}, f"{name} is {value!r}; supported: ") for name, value in OTHERS.items()),
        *(("tokenizer_config.json", {name: value}, f"{name} is {value!r}; supp") for name, value in RULES.items()),
        ("config.json", {"num_hidden_layers": 10**6}, "000"),
        ("config.json", {"num_hidden_layers": "2"}, "num_layers is '2', not a number"),
        ("config.json", {"hidden_size": None}, "hidden_size is None, not a number"),
        ("config.json", {"pad_token_id": 1}, "pad with 0 and 1"),
        ("config.json", {"vocab_size": 779}, "the tokenizer has 780 ids, the model 779"),
        ("config.json", {"vocab_size": 781}, "shape"),
        ("config.json", {"id2label": ["0", "1", "2"]}, "id2label does not name the 3 classes"),
        ("config.json", {"id2label": dict.fromkeys("123", "a")}, "id2label does not name the 3 classes"),
        ("config.json", {"sentence_transformers": {"activation_fn": SIGMOID}}, f"activation_fn is '{SIGMOID}'"),
        ("config.json", {"sentence_transformers": 3}, "config.json is damaged"),
    ],
)
def test_wrong_settings_are_named(bert, capsys, name, values, message):
    write(bert / name, **values)
    assert message in error_of(bert, capsys)


def test_settings_that_change_nothing(bert):
    expected, _ = contents(converted(bert))
    write(bert / "config.json", sentence_transformers={"activation_fn": IDENTITY}, auto_map={}, dtype="float32")
    write(bert / "config.json", architectures=None, id2label=None, layer_norm_eps=None, pad_token_id=None)
    write(bert / "config.json", problem_type="single_label_classification")
    write(bert / "tokenizer_config.json", do_lower_case=None)
    (bert / "config.json").write_bytes(b"\xef\xbb\xbf" + (bert / "config.json").read_bytes())  # a byte order mark
    again, tokenizer = contents(converted(bert, "again"))
    assert tokenizer.lower and all(torch.equal(again[name], expected[name]) for name in expected)


def test_one_label_is_regression(bert, capsys):
    change(bert, **{"classifier.weight": torch.zeros(1, 16), "classifier.bias": torch.zeros(1)})
    for problem in ("regression", None):
        write(bert / "config.json", id2label={"0": "LABEL_0"}, problem_type=problem)
        converted(bert)
    write(bert / "config.json", problem_type="multi_label_classification")
    assert "problem_type is 'multi_label_classification'" in error_of(bert, capsys)


def test_other_heads_of_roberta(roberta, capsys):
    """None, and that of tokens, whose tensors are those of multiple choice, too."""
    change(roberta, **dict.fromkeys(name for name in weights(roberta) if name.startswith("lm_head")))
    out = converted(roberta)
    assert "none head, " in capsys.readouterr().out
    assert load_model(out)(torch.zeros(1, 3, dtype=torch.long))[0].shape == (1, 3, 32)
    change(roberta, **{"classifier.weight": torch.zeros(3, 32), "classifier.bias": torch.zeros(3)})
    for wrong in ("XLMRobertaForMultipleChoice", "XLMRobertaForSequenceClassification"):
        write(roberta / "config.json", architectures=[wrong])
        assert f"architectures is ['{wrong}']" in error_of(roberta, capsys)
    write(roberta / "config.json", architectures=["XLMRobertaForTokenClassification"])
    converted(roberta)


def test_names_of_models(roberta, bert, capsys, monkeypatch):
    """A known name stands for its shape, which a folder without config.json has."""
    assert "config.json has another shape than xlmr-base" in error_of(roberta, capsys, "xlmr-base")
    shape = convert.config_from_json(json.loads((bert / "config.json").read_text()))
    monkeypatch.setitem(convert.PRESETS, "small-bert", shape)
    (bert / "config.json").unlink()
    converted(bert, "small-bert")
    assert "config.json" in error_of(bert, capsys, "other")
    assert convert.main(["xlmr-huge"]) == 2
    assert "no download is known for 'xlmr-huge'" in capsys.readouterr().err


def test_missing_files(roberta, tmp_path, capsys):
    assert "No such file" in error_of(tmp_path / "nowhere", capsys)
    (roberta / "sentencepiece.bpe.model").write_bytes(b"not a model")
    assert "is not a SentencePiece model" in error_of(roberta, capsys)
    (roberta / "sentencepiece.bpe.model").unlink()
    assert "no tokenizer in" in error_of(roberta, capsys)
    (roberta / "pytorch_model.bin").unlink()
    assert "neither model.safetensors nor pytorch_model.bin" in error_of(roberta, capsys)
    (roberta / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    assert "model.safetensors is damaged or no safetensors file: fetch it again" in error_of(roberta, capsys)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil-was-here",))


def test_pickled_code_is_not_executed(roberta, capsys, monkeypatch):
    monkeypatch.chdir(roberta.parent)
    path = roberta / "pytorch_model.bin"
    for write_file in (
        lambda: torch.save({"roberta.x": Evil()}, path),
        lambda: torch.save({"roberta.x": 3}, path),
        lambda: path.write_bytes(b"PK\x03\x04 truncated"),
    ):
        write_file()
        assert "damaged or holds code, and was not loaded" in error_of(roberta, capsys)
    assert not os.path.exists("evil-was-here")


# ------------------------------------------------------------------------------------------- BERT
PRETRAINING = {"cls.predictions.transform.LayerNorm.gamma": torch.ones(16), "cls.seq_relationship.bias": torch.ones(2)}
CHANGES = {  # head -> (beginnings of tensors that are deleted, more tensors, architectures)
    "sequence": ((), {}, ["BertForSequenceClassification"]),
    "pooler": (("classifier.",), {}, ["BertModel"]),
    "token": (("bert.pooler.",), {}, None),
    "token, and an unused pooler": ((), {}, ["BertForTokenClassification"]),
    "none": (("bert.pooler.", "classifier."), {}, ["BertModel"]),
    "pooler, of pretraining with TensorFlow": (("classifier.",), PRETRAINING, ["BertForPreTraining"]),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_bert_equals_hugging_face(bert, capsys, kind):
    """Hidden states and the output of each head."""
    (deleted, more, architectures), head = CHANGES[kind], kind.split(",")[0]
    state = {name: tensor for name, tensor in weights(bert).items() if not name.startswith(deleted)}
    if head == "none":  # names without a prefix
        state = {name.removeprefix("bert."): tensor for name, tensor in state.items()}
    for old, name in (("gamma", "weight"), ("beta", "bias")) if more else ():
        state = {key.replace(f"LayerNorm.{name}", f"LayerNorm.{old}"): tensor for key, tensor in state.items()}
    change(bert, state | more)
    write(bert / "config.json", architectures=architectures)
    out = converted(bert)
    output = capsys.readouterr().out
    assert f"{head} head" in output and output.endswith(f"next: python train.py --task rte --model {out}\n")
    model = load_model(out)
    config = model.config
    assert (config.head, config.position_offset, config.max_tokens, config.type_vocab_size) == (head, 0, 32, 2)
    assert (config.pad_id, config.norm_eps, config.num_labels) == (0, 1e-12, 3 if head in ("sequence", "token") else 0)
    with np.load(os.path.join(BERT, "expected.npz")) as file:
        expected = {name: torch.from_numpy(file[name]) for name in file.files}
    mask = expected["mask"]
    with torch.no_grad():
        logits, taps = model(expected["ids"], mask, ("hidden",), types=expected["types"])
    hidden = torch.stack(taps["hidden"])
    assert hidden.shape == expected["hidden"].shape == (3, 3, 20, 16)
    assert (hidden - expected["hidden"])[:, mask].abs().max() < 1e-5
    want = expected["hidden"][-1] if head == "none" else expected.get(f"{head}_logits", expected.get(head))
    difference = logits - want
    assert (difference[mask] if head in ("token", "none") else difference).abs().max() < 1e-5


def test_real_minilm(capsys, tmp_path):
    """Parity of all-MiniLM-L6-v2 with transformers' BertModel on padded pairs of texts."""
    folder = os.environ.get("SDQ_MINILM")
    if not folder:
        pytest.skip("SDQ_MINILM names no Hugging Face folder of MiniLM")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    out = str(tmp_path / "minilm.safetensors")
    assert convert.main(["minilm", "--from", folder, "--out", out]) == 0
    assert "pooler head, 22,713,216 parameters" in capsys.readouterr().out
    model, (_, tokenizer) = load_model(out), contents(out)
    assert {**vars(model.config), "head": "mlm"} == vars(PRESETS["minilm"])
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

"""Folders as today's tools write them: each kind converts to what transformers computes, or is named in one line; a
classifier keeps its head; an exported student comes back. golden_folder: make_golden.py.
"""

import hashlib
import json
import os
import resource
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT, SAMPLE, TOKENIZER
from test_convert import BERT, contents, converted, error_of, write

import convert
import train
from checkpoint import fake_quantized, load_model, read_model, read_student, save_model
from data.tasks import NLI_LABELS, XNLI_LANGUAGES, find_task, load, match_labels
from data.tokenizer import load_tokenizer
from data.tokenizer_json import read_tokenizer, read_tokenizer_json
from kit.common import UserError

FOLDER = os.path.join(ROOT, "tests", "golden_folder")
MINI_DATA = os.path.join(ROOT, "data", "mini")
STUDENT = "student.safetensors"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FOLDER, tmp_path / "hf")


def same_tensors(one, other):
    one, other = contents(one)[0], contents(other)[0]
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# ------------------------------------------------------------------- what transformers 5 writes
def test_hidden_states_and_logits_are_those_of_transformers(folder):
    """Shards, tokenizer.json alone, reserved rows, a BERT that pads with 1."""
    model = load_model(converted(folder))
    assert (model.config.vocab_size, model.config.pad_id, model.config.position_offset) == (416, 1, 0)
    expected = np.load(os.path.join(FOLDER, "expected.npz"))
    mask = torch.from_numpy(expected["mask"])
    logits, taps = model(torch.from_numpy(expected["ids"]), mask, capture=("hidden",))
    for ours, theirs in zip(taps["hidden"], expected["hidden"], strict=True):
        torch.testing.assert_close(ours[mask], torch.from_numpy(theirs)[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, torch.from_numpy(expected["logits"]), atol=1e-5, rtol=1e-5)


def test_ids_of_a_unigram_tokenizer_json(folder):
    tokenizer = read_tokenizer(folder)
    with open(os.path.join(FOLDER, "tokens.json"), encoding="utf-8") as file:
        cases = json.load(file)
    marks = ("<", "\x00", "\ufffd")  # special tokens in a text, and two characters that SentencePiece treats as spaces
    kept = [case for case in cases if not any(mark in f"{case[0]}{case[1]}" for mark in marks)]
    assert len(kept) > 0.9 * len(cases)
    for first, second, length, ids in kept:
        assert tokenizer.encode(first, second, length) == ids, first


def test_ids_of_a_wordpiece_tokenizer_json():
    tokenizer, _ = read_tokenizer_json(os.path.join(FOLDER, "wordpiece.json"))
    with open(os.path.join(BERT, "tokens.json"), encoding="utf-8") as file:
        cases = [case for case in json.load(file) if case[0]]
    for _, first, second, length, ids, _ in cases:
        assert tokenizer.encode(first, second, length) == ids
    with open(os.path.join(BERT, "vocab.txt"), encoding="utf-8", newline="\n") as file:
        assert tokenizer.pieces == file.read().splitlines()


MARKS = [{"type": "WhitespaceSplit"}, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"}]


@pytest.mark.parametrize(
    "source, part, values, message",
    [
        ("tokenizer.json", "model", {"type": "WordLevel"}, "is a WordLevel tokenizer"),
        ("tokenizer.json", "model", {"vocab": [["a", 0.0]] * 400}, "<s> <pad> </s> <unk>"),
        ("tokenizer.json", "model", {"byte_fallback": True}, "<s> <pad> </s> <unk>"),
        ("tokenizer.json", "model", {"vocab": [[]]}, "is damaged"),
        ("tokenizer.json", "normalizer", {"type": "Lowercase"}, '"Lowercase"'),
        ("tokenizer.json", "pre_tokenizer", {"type": "ByteLevel"}, "the pre-tokenizer"),
        ("tokenizer.json", "pre_tokenizer", {"pretokenizers": MARKS}, '"never"'),
        ("wordpiece.json", "normalizer", {"lowercase": "yes"}, "lowercase is 'yes'"),
        ("wordpiece.json", "normalizer", {"strip_accents": False}, "strip_accents is False"),
        ("wordpiece.json", "normalizer", {"type": "NFC"}, "type is 'NFC'"),
        ("wordpiece.json", "pre_tokenizer", {"type": "Whitespace"}, "type is 'Whitespace'"),
        ("wordpiece.json", "model", {"max_input_chars_per_word": 50}, "max_input_chars_per_word is 50"),
        ("wordpiece.json", "model", {"vocab": {"[PAD]": 1}}, "without gaps"),
    ],
)
def test_other_tokenizers_are_named(tmp_path, source, part, values, message):
    with open(os.path.join(FOLDER, source), encoding="utf-8") as file:
        settings = json.load(file)
    settings[part] |= values
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="tokenizer.json") as error:
        read_tokenizer(tmp_path)
    assert message in str(error.value)

    for text in ("{", "[]", "{}", '{"model": {"type": []}}', "\xff"):
        (tmp_path / "tokenizer.json").write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match="tokenizer.json is damaged"):
            read_tokenizer(tmp_path)


def test_added_tokens_and_capitals_are_checked(folder, tmp_path):
    listed = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    added = {"780": {"content": "newword"}, "0": {"content": "[PAD]"}}
    for source, name, changes, token in (
        (folder, "tokenizer.json", {"added_tokens": [*listed, {"content": "<e1>"}]}, "<e1>"),
        (BERT, "added_tokens.json", {"E1": 780}, "E1"),
        (BERT, "tokenizer_config.json", {"added_tokens_decoder": added}, "newword"),
    ):
        place = shutil.copytree(source, tmp_path / token)
        write(place / name, **changes)
        with pytest.raises(UserError, match=f"'{token}' was added"):
            read_tokenizer(place)
    shutil.copy(os.path.join(FOLDER, "wordpiece.json"), folder / "tokenizer.json")
    write(folder / "tokenizer_config.json", tokenizer_class=None, do_lower_case=None)
    assert read_tokenizer(folder).lower
    write(folder / "tokenizer_config.json", do_lower_case=False)
    with pytest.raises(UserError, match="do_lower_case is False; supported: True"):
        read_tokenizer(folder)


# ------------------------------------------------------------------------------ places and names
def test_root_of_a_cache(folder, tmp_path):
    root = tmp_path / "models--someone--model"
    shutil.copytree(folder, root / "snapshots" / "0a1b")
    os.mkdir(root / "snapshots" / "newer")  # half a download
    os.mkdir(root / "refs")
    (root / "refs" / "main").write_text("0a1b\n")
    assert same_tensors(converted(folder), converted(root, "again"))


def test_shards_are_checked(folder, capsys):
    path = folder / "model.safetensors.index.json"
    shard, good = folder / "model-00002-of-00003.safetensors", path.read_text()
    write(path, weight_map={"x": 3})
    assert "index.json is damaged" in error_of(folder, capsys)
    path.write_text(good)
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard} is damaged" in error_of(folder, capsys)
    shard.unlink()
    assert f"cannot read {shard} (No such file or directory): fetch it again" in error_of(folder, capsys)


def test_an_encoder_of_sentence_transformers(folder, tmp_path, capsys):
    """modules.json names the folder of the encoder, its pooling and its prompts."""
    root = tmp_path / "model"
    shutil.copytree(folder, root / "0_Transformer")
    kinds = {"0_Transformer": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (root / "modules.json").write_text(json.dumps(modules))
    (root / "1_Pooling").mkdir()
    write(root / "1_Pooling" / "config.json", word_embedding_dimension=32, pooling_mode_cls_token=True)
    write(root / "config_sentence_transformers.json", prompts={"query": "query: "})
    write(root / "0_Transformer" / "sentence_bert_config.json", max_seq_length=128, do_lower_case=False)
    assert same_tensors(converted(folder), converted(root, "again"))
    left_out = "max_seq_length 128 (--max-length), prompts {'query': 'query: '} (--prompt TEXT)"
    printed = capsys.readouterr().out
    assert f"the encoder is {root}/0_Transformer; not converted: {left_out}\n" in printed and "--task embed" in printed
    read = read_model(converted(root, "again"))
    assert (read.config.pooling, read.notes["prompt"]) == ("first", "")
    assert read_model(converted(root, "own", "--prompt", "passage: ")).notes["prompt"] == "passage: "
    write(root / "1_Pooling" / "config.json", word_embedding_dimension=32, pooling_mode="mean")  # as written since 5.0
    write(root / "config_sentence_transformers.json", prompts={"query": "query: "}, default_prompt_name="query")
    read = read_model(converted(root, "mean"))
    assert (read.config.pooling, read.notes["prompt"]) == ("mean", "query: ")
    for pooling in ({"pooling_mode": "max"}, {"pooling_mode": ["cls", "max"]}, {"include_prompt": False}):
        write(root / "1_Pooling" / "config.json", **{"pooling_mode": "mean", **pooling})
        assert read_model(converted(root, "other")).config.pooling == "other"
    for prompts, message in ((["a"], "_transformers.json is damaged"), ({"query": 3}, "the prompt 3 is not a text")):
        write(root / "config_sentence_transformers.json", prompts=prompts, default_prompt_name="query")
        assert message in error_of(root, capsys)
    clip = [{"path": "", "type": "sentence_transformers.models.CLIPModel"}]
    (folder / "modules.json").write_text(json.dumps(clip))
    assert "its first module is a CLIPModel, not a Transformer" in error_of(folder, capsys)
    (folder / "modules.json").write_text(json.dumps([{**modules[0], "path": ""}]))  # it lies beside modules.json
    assert read_model(converted(folder, "third")).config.pooling == "other"
    assert "not converted: nothing" in capsys.readouterr().out
    (root / "modules.json").write_text(json.dumps([{**modules[0], "path": "elsewhere"}]))
    assert f"{root}/elsewhere: No such file" in error_of(root, capsys)
    (root / "modules.json").write_text('[{"path": 3}]')
    assert "modules.json is damaged" in error_of(root, capsys)


@pytest.mark.parametrize("name", ["sentence_bert_config.json", "sentence_xlm-roberta_config.json"])
@pytest.mark.parametrize("lower", [True, False])
def test_texts_in_lower_case_for_sentence_transformers(tmp_path, capsys, name, lower):
    bert = shutil.copytree(BERT, tmp_path / "bert")
    write(bert / name, do_lower_case=True)
    write(bert / "tokenizer_config.json", do_lower_case=lower)
    if lower:  # an uncased model: nothing changes
        converted(bert)
    else:
        assert f"{name}: do_lower_case is true, but the tokenizer keeps capitals" in error_of(bert, capsys)


def test_an_adapter_is_named(folder, capsys):
    (folder / "adapter_model.safetensors").write_text("")
    assert "adapter_model.safetensors: merge the adapter into the model" in error_of(folder, capsys)


# ------------------------------------------------------------------------- fine-tuned classifiers
def test_labels_are_matched_by_name():
    for names, labels, order in (
        (["ENTAILMENT", "Not entailment"], ("not_entailment", "entailment"), [1, 0]),
        (["LABEL_0", "LABEL_1"], ("not_entailment", "entailment"), [0, 1]),  # says nothing: by position
        (["negative", "positive"], ("0", "1"), [0, 1]),
        (["1", "0"], ("0", "1"), [1, 0]),
        (["-1", "0", "1"], ("0", "1", "-1"), [1, 2, 0]),
        (["C++", "C"], ("C", "C++"), [1, 0]),
        (["нет", "да"], ("да", "нет"), [1, 0]),
        (["negative", "positive"], ("not_entailment", "entailment"), None),
        (["-1", "0", "1"], ("a", "b", "c"), None),
    ):
        assert match_labels(names, labels) == order


def train_on(folder, task, *options):
    """A run in FOLDER/run; its exit status."""
    data = SAMPLE if task == "xnli" else str(folder)
    common = ["--task", task, "--data-dir", data, "--max-length", "32", "--out", str(folder / "run")]
    return train.main([*common, *options])


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
def test_a_fine_tuned_classifier_is_the_teacher(folder, tmp_path, capsys, order):
    """As float32 row of the report, without training, in two orders of labels."""
    names = ["contradiction", "entailment", "neutral"]
    names = [names[i] for i in order]
    write(folder / "config.json", id2label=dict(enumerate(names)))
    model = converted(folder)
    assert train_on(tmp_path, "xnli", "--model", model, "--epochs", "0", "--methods", "fp32", "ptq") == 0
    assert "is kept: " in capsys.readouterr().out
    with open(tmp_path / "run" / "results.json") as file:
        row = json.load(file)["methods"]["fp32"]
    assert read_student(str(tmp_path / "run" / STUDENT)).notes["labels"].split("\t") == list(NLI_LABELS)
    # Against the model as it stands, whose labels are compared by name.
    plain, tokenizer, correct = load_model(model), contents(model)[1], 0
    with open(os.path.join(SAMPLE, "XNLI-1.0", "xnli.test.tsv"), encoding="utf-8") as file:
        rows = [line.split("\t") for line in file.read().splitlines()[1:]]
    for _, gold, first, second, _ in rows:
        logits, _ = plain(torch.tensor([tokenizer.encode(first, second, 32)]))
        correct += names[int(logits.argmax())] == gold
    assert sum(each["correct"] for each in row["languages"].values()) == correct


def test_other_heads_are_replaced_with_a_word(folder, tmp_path, capsys):
    write(folder / "config.json", id2label={"0": "bad", "1": "fair", "2": "good"})
    model, old = converted(folder), str(tmp_path / "old.safetensors")
    save_model(old, load_model(model), contents(model)[1].bytes, {"name": "old"})
    assert train_on(tmp_path, "xnli", "--model", model, "--methods", "fp32", "--epochs", "0") == 2
    assert "has no head of classes for xnli" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert train_on(tmp_path, "xnli", "--model", old, "--methods", "fp32", "--epochs", "0") == 2
    assert "classes without names; to keep it, convert the model again" in capsys.readouterr().out
    assert train_on(tmp_path, "xnli", "--model", model, "--methods", "fp32", "--steps", "1") == 0
    assert "sequence head for bad, fair, good: xnli gets a new one" in capsys.readouterr().out


def test_a_full_disk_is_one_line(folder, tmp_path, capsys):
    out = tmp_path / "no.safetensors"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # no file may grow beyond 20,000 bytes
    try:
        assert "File too large" in error_of(folder, capsys)
        out.write_bytes(b"what was there")
        assert convert.main(["small", "--from", str(folder), "--out", str(out)]) == 2
    finally:  # before pytest writes to its own log, which may be longer
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert out.read_bytes() == b"what was there"


# ------------------------------------------------------------------------------------- exporting
# The tokenizer.json of the built-in model, and the ids that transformers 5.24 (tokenizers 0.23.3) gave with it to the first
# 40 pairs of each language of the built-in test set: SHA-256 of the file, and of the ids as JSON.
FILE = "502ae7a6b4c174ade481f30bfb42771171e4f4cf22c4f8a9e246729db568db59"
IDS = "bb921717ccb52be490e53bf813e5f28e70e30a6c6880ee5c842a39fed218857c"
SOURCES = {"roberta": os.path.join(GOLDEN, "seq"), "unigram": FOLDER, "wordpiece": BERT, "cased": BERT}


@pytest.fixture(scope="module", params=["built in", *SOURCES])
def exported(request, tmp_path_factory):
    """(kind, path of a student, the folder that it is exported to)."""
    out, kind = tmp_path_factory.mktemp("exported"), request.param
    options, model = ("--languages", "de", "--max-eval", "6", "--steps", "1", "--methods", "ptq", "--bits", "4"), "mini"
    if kind != "built in":
        source = shutil.copytree(SOURCES[kind], out / "hf")
        if kind == "roberta":
            shutil.copy(TOKENIZER, source)
        if kind == "cased":
            write(source / "tokenizer_config.json", do_lower_case=False)
        model = converted(source)
    assert train_on(out, "xnli", "--model", model, *options) == 0
    student, folder = str(out / "run" / STUDENT), out / "exported"
    assert convert.main(["--export", student, str(folder)]) == 0
    return kind, student, folder


@pytest.fixture(scope="module")
def pairs():
    rows = [load(find_task("xnli"), "test", language, MINI_DATA)[:40] for language in XNLI_LANGUAGES]
    return [(row.text_a, row.text_b) for some in rows for row in some]


def test_an_exported_student_comes_back(exported, pairs, tmp_path, capsys):
    kind, student, folder = exported
    vocabulary = "vocab.txt" if kind in ("wordpiece", "cased") else "tokenizer.json"
    names = ["config.json", "model.safetensors", "tokenizer_config.json", vocabulary]
    assert sorted(os.listdir(folder)) == sorted(names)
    names = json.loads((folder / "config.json").read_text())["id2label"]
    assert names == {str(i): name for i, name in enumerate(NLI_LABELS)}
    read, (tensors, after) = read_student(student), contents(converted(shutil.copytree(folder, tmp_path / "hf")))
    expected, before = fake_quantized(read).state_dict(), load_tokenizer(read.vocabulary.numpy().tobytes())
    assert all(torch.equal(expected[name], tensor) for name, tensor in tensors.items())
    ids = [before.encode(*pair) for pair in pairs]
    assert len(ids) == 600 and ids == [after.encode(*pair) for pair in pairs]
    if kind == "built in":  # its SentencePiece model is of the type BPE
        assert hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest() == FILE
        assert hashlib.sha256(json.dumps(ids).encode()).hexdigest() == IDS
    assert convert.main(["--export", student, str(folder)]) == 2
    assert "holds a model already" in capsys.readouterr().err


def test_transformers_gives_the_ids_and_logits_of_an_exported_student(exported, pairs):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    kind, student, folder = exported
    if kind in ("roberta", "unigram"):  # SentencePiece adds the scores of a text in float32: longer ones may tie
        pairs = [(first[:20], second[:20]) for first, second in pairs]
    read = read_student(student)
    ours = load_tokenizer(read.vocabulary.numpy().tobytes())
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    assert [theirs(*pair)["input_ids"] for pair in pairs] == [ours.encode(*pair) for pair in pairs]
    model = fake_quantized(read._replace(quant=replace(read.quant, act_bits=32)))
    reference = transformers.AutoModelForSequenceClassification.from_pretrained(str(folder)).eval()
    for pair in pairs[::60]:
        inputs = theirs(*pair, max_length=30, truncation=True, return_tensors="pt")
        with torch.no_grad():
            logits, _ = model(inputs["input_ids"], types=inputs.get("token_type_ids"))
            torch.testing.assert_close(logits, reference(**inputs).logits, atol=1e-4, rtol=1e-4)

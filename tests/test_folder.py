"""Folders as today's tools write them: each kind converts to what transformers computes, or is named in one line; a
classifier keeps its head; an exported student comes back. golden_folder: make_golden_folder.py.
"""

import hashlib
import json
import os
import resource
import shutil
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT, SAMPLE, TOKENIZER

import convert
import train
from checkpoint import float_model, load_checkpoint, read_checkpoint, read_student
from data.tasks import NLI_LABELS, XNLI_LANGUAGES, find_task, load, match_labels, own_labels, read_own
from data.tokenizer import load_tokenizer
from data.tokenizer_json import read_tokenizer_json
from kit.common import UserError

FOLDER = os.path.join(ROOT, "tests", "golden_folder")
BERT = os.path.join(ROOT, "tests", "golden_bert")
MINI_DATA = os.path.join(ROOT, "data", "mini")


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FOLDER, tmp_path / "hf")


def converted(folder, name="small"):
    out = os.path.join(os.path.dirname(folder), f"{name}.pt")
    assert convert.main([name, "--from", str(folder), "--out", out]) == 0
    return out


def error_of(folder, capsys):
    out = os.path.join(os.path.dirname(folder), "no.pt")
    assert convert.main(["no", "--from", str(folder), "--out", out]) == 2 and not os.path.exists(out)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def write(path, **changes):
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(settings))


# ------------------------------------------------------------------- what transformers 5 writes
def test_hidden_states_and_logits_are_those_of_transformers(folder):
    """Shards, tokenizer.json alone, reserved rows, a BERT that pads with 1."""
    model = load_checkpoint(converted(folder))
    assert (model.config.vocab_size, model.config.pad_id, model.config.position_offset) == (416, 1, 0)
    expected = np.load(os.path.join(FOLDER, "expected.npz"))
    mask = torch.from_numpy(expected["mask"])
    logits, taps = model(torch.from_numpy(expected["ids"]), mask, capture=("hidden",))
    for ours, theirs in zip(taps["hidden"], expected["hidden"], strict=True):
        torch.testing.assert_close(ours[mask], torch.from_numpy(theirs)[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, torch.from_numpy(expected["logits"]), atol=1e-5, rtol=1e-5)


def test_ids_of_a_unigram_tokenizer_json(folder):
    payload = read_checkpoint(converted(folder))
    tokenizer = load_tokenizer(payload["tokenizer"].numpy().tobytes())
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


def test_other_tokenizers_are_named(folder, capsys):
    path = folder / "tokenizer.json"
    good = json.loads(path.read_text())

    def changed(part, **values):
        path.write_text(json.dumps({**good, part: {**(good[part] or {}), **values}}))
        return error_of(folder, capsys)

    assert "is a WordLevel tokenizer" in changed("model", type="WordLevel")
    assert '"Lowercase"' in changed("normalizer", type="Lowercase")
    assert "ByteLevel" in changed("pre_tokenizer", type="ByteLevel")
    assert "<s> <pad> </s> <unk>" in changed("model", vocab=[["a", 0.0]] * 400)
    assert "<s> <pad> </s> <unk>" in changed("model", byte_fallback=True)
    assert "the pre-tokenizer" in changed("pre_tokenizer", type="WhitespaceSplit")
    marks = [{"type": "WhitespaceSplit"}, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"}]
    assert '"never"' in changed("pre_tokenizer", pretokenizers=marks)
    path.write_text(json.dumps({**good, "added_tokens": [*good["added_tokens"], {"id": 400, "content": "<e1>"}]}))
    assert "'<e1>' was added to its vocabulary" in error_of(folder, capsys)
    for text in ("{", "[]", "{}", '{"model": 3}', '{"model": {"type": "Unigram", "vocab": [[]]}}', "\xff"):
        path.write_text(text, encoding="latin-1")
        assert "tokenizer.json" in error_of(folder, capsys)
    for name, values in (("do_lower", {"lowercase": "yes"}), ("accents", {"strip_accents": False})):
        with open(os.path.join(FOLDER, "wordpiece.json"), encoding="utf-8") as file:
            settings = json.load(file)
        settings["normalizer"] |= values
        path.write_text(json.dumps(settings))
        assert "the normalizer" in error_of(folder, capsys), name
    path.unlink()
    (folder / "merges.txt").write_text("a b\n")
    assert "has a BPE tokenizer" in error_of(folder, capsys)


def test_added_tokens_and_capitals_of_wordpiece_are_checked(tmp_path, capsys):
    folder = shutil.copytree(BERT, tmp_path / "hf")
    (folder / "added_tokens.json").write_text('{"[E1]": 780}')
    assert "'[E1]' was added" in error_of(folder, capsys)
    (folder / "added_tokens.json").unlink()
    settings = {"added_tokens_decoder": {"780": {"content": "newword"}, "0": {"content": "[PAD]"}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "'newword' was added" in error_of(folder, capsys)
    (folder / "vocab.txt").unlink()
    shutil.copy(os.path.join(FOLDER, "wordpiece.json"), folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert "disagree about capitals" in error_of(folder, capsys)
    (folder / "tokenizer_config.json").write_text("{}")
    payload = read_checkpoint(converted(folder))
    write(folder / "config.json", model_type="roberta", type_vocab_size=1, pad_token_id=0)
    tensors = convert.read_weights(str(folder))
    key = "bert.embeddings.token_type_embeddings.weight"
    (folder / "model.safetensors").unlink(missing_ok=True)
    tensors = {name.replace("bert.", "roberta."): tensor.clone() for name, tensor in tensors.items()}
    key = key.replace("bert.", "roberta.")
    tensors[key] = tensors[key][:1].clone()
    torch.save({name: tensor for name, tensor in tensors.items() if "pooler" not in name}, folder / "pytorch_model.bin")
    assert payload["config"]["type_vocab_size"] == 2 and "error: " in error_of(folder, capsys)


# ------------------------------------------------------------------------------ places and names
def test_root_of_a_cache(folder, tmp_path):
    expected = read_checkpoint(converted(folder))["tensors"]
    root = tmp_path / "models--someone--model"
    shutil.copytree(folder, root / "snapshots" / "0a1b")
    os.mkdir(root / "snapshots" / "newer")  # half a download
    os.mkdir(root / "refs")
    (root / "refs" / "main").write_text("0a1b\n")
    again = read_checkpoint(converted(root, "again"))["tensors"]
    assert all(torch.equal(tensor, again[name]) for name, tensor in expected.items())


def test_shards_are_checked(folder, capsys):
    path = folder / "model.safetensors.index.json"
    good = path.read_text()
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "again.safetensors")
    write(path, weight_map={**json.loads(good)["weight_map"], "x": "again.safetensors"})
    assert "repeats tensor" in error_of(folder, capsys)
    path.write_text(good)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "has no model-00002-of-00003.safetensors" in error_of(folder, capsys)
    for weight_map in ({"x": "../evil.safetensors"}, {"x": 3}, {"x": []}, {}, 3):
        write(path, weight_map=weight_map)
        assert "names no files beside it" in error_of(folder, capsys)


@pytest.mark.parametrize("prefix", ["module.", "model.", "0.auto_model."])
def test_names_with_a_prefix(folder, prefix):
    expected = read_checkpoint(converted(folder))["tensors"]
    tensors = convert.read_weights(str(folder))
    for name in os.listdir(folder):
        if "safetensors" in name:
            (folder / name).unlink()
    wrapped = {prefix + key: tensor.clone() for key, tensor in tensors.items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, folder / "pytorch_model.bin")
    again = read_checkpoint(converted(folder, "again"))["tensors"]
    assert all(torch.equal(tensor, again[name]) for name, tensor in expected.items())


def test_an_encoder_of_sentence_transformers(folder, tmp_path, capsys):
    """modules.json names the folder of the encoder, and what else the model has."""
    expected = read_checkpoint(converted(folder))["tensors"]
    root = tmp_path / "model"
    shutil.copytree(folder, root / "0_Transformer")
    os.mkdir(root / "1_Pooling")
    (root / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 16}')
    assert "in it that have: 0_Transformer\n" in error_of(root, capsys)
    kinds = {"0_Transformer": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (root / "modules.json").write_text(json.dumps(modules))
    (root / "config_sentence_transformers.json").write_text('{"prompts": {"query": "query: "}}')
    (root / "0_Transformer" / "sentence_bert_config.json").write_text('{"max_seq_length": 128, "do_lower_case": false}')
    capsys.readouterr()
    again = read_checkpoint(converted(root, "again"))["tensors"]
    assert all(torch.equal(tensor, again[name]) for name, tensor in expected.items())
    line = capsys.readouterr().out.splitlines()[0]
    assert (
        f"the encoder is {root}/0_Transformer; not converted: Pooling, Normalize, max_seq_length 128, prompts" in line
    )
    for path in ("", "."):  # the encoder lies beside modules.json
        shutil.copy(root / "modules.json", folder)
        modules[0]["path"] = path
        (folder / "modules.json").write_text(json.dumps(modules[:1]))
        converted(folder, "third")
        assert "not converted: nothing" in capsys.readouterr().out
    modules[0]["path"] = "elsewhere"
    (root / "modules.json").write_text(json.dumps(modules))
    assert f"no folder {root}/elsewhere" in error_of(root, capsys)
    (root / "modules.json").write_text("{}")
    assert "modules.json is not a JSON list" in error_of(root, capsys)


@pytest.mark.parametrize("name", ["sentence_bert_config.json", "sentence_xlm-roberta_config.json"])
def test_texts_in_lower_case_for_sentence_transformers(folder, tmp_path, capsys, name):
    (folder / name).write_text('{"do_lower_case": true}')
    assert f"{name}: do_lower_case is true, but the tokenizer keeps capitals" in error_of(folder, capsys)
    bert = shutil.copytree(BERT, tmp_path / "bert")
    write(bert / "tokenizer_config.json", do_lower_case=True)
    (bert / name).write_text('{"do_lower_case": true}')
    converted(bert)  # an uncased model: nothing changes
    write(bert / "tokenizer_config.json", do_lower_case=False)
    assert "keeps capitals" in error_of(bert, capsys)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_is_named(folder, tmp_path, capsys, name):
    (folder / name).write_text("{}")
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / name).write_text("{}")
    for each in (folder, alone):
        error = error_of(each, capsys)
        assert f"{name}: merge the adapter" in error and "merge_and_unload()" in error


# --------------------------------------------------------------------------------- true mistakes
def test_unfetched_files_are_called_so(folder, capsys):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for name in ("tokenizer.json", "model-00001-of-00003.safetensors", "model.safetensors", "sentencepiece.bpe.model"):
        there = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_text(pointer)
        error = error_of(folder, capsys)
        assert name in error and "is a Git LFS pointer" in error
        (folder / name).unlink()
        if there is not None:
            (folder / name).write_bytes(there)


@pytest.mark.parametrize("kind", ["distilbert", "mpnet", "electra", "deberta-v2"])
def test_other_architectures_are_named_before_files_are_missed(tmp_path, capsys, kind):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    assert f"model_type is '{kind}'" in error_of(folder, capsys)


def test_quantized_and_non_finite_weights(folder, capsys):
    tensors = convert.read_weights(str(folder))
    for name in os.listdir(folder):
        if "safetensors" in name:
            (folder / name).unlink()
    key, path = "bert.encoder.layer.1.output.dense.weight", folder / "pytorch_model.bin"
    for dtype in (torch.int8, torch.float8_e4m3fn):
        torch.save({**tensors, key: tensors[key].to(dtype)}, path)
        assert f"is {dtype}, not a float" in error_of(folder, capsys)
    for value in (float("nan"), float("inf")):
        damaged = tensors[key].clone()
        damaged[3, 2] = value
        torch.save({**tensors, key: damaged}, path)
        assert "not finite" in error_of(folder, capsys)
    large = tensors[key].double().index_fill(0, torch.tensor([3]), 1e300)  # inf in float32
    torch.save({**tensors, key: large}, path)
    assert "not finite" in error_of(folder, capsys)


def test_a_sound_safetensors_file_of_integers(tmp_path):
    header = {"x": {"dtype": "I8", "shape": [3], "data_offsets": [0, 3]}}
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes((1, 2, 255)))
    assert convert.read_safetensors(str(path))["x"].tolist() == [1, 2, -1]


def test_byte_order_marks(folder):
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    converted(folder)


# ------------------------------------------------------------------------- fine-tuned classifiers
def test_labels_are_matched_by_name():
    labels = ("not_entailment", "entailment")
    assert match_labels(["ENTAILMENT", "Not entailment"], labels) == [1, 0]
    assert match_labels(["LABEL_0", "LABEL_1"], labels) == [0, 1]  # says nothing: by position
    assert match_labels(["negative", "positive"], ("0", "1")) == [0, 1]
    assert match_labels(["1", "0"], ("0", "1")) == [1, 0]
    assert match_labels(["negative", "positive"], labels) is None
    assert match_labels(["a", "b", "c"], labels) is None
    assert match_labels(["нет", "да"], ("да", "нет")) == [1, 0]
    assert match_labels(["-1", "0", "1"], ("0", "1", "-1")) == [1, 2, 0]
    assert match_labels(["C++", "C"], ("C", "C++")) == [1, 0]
    assert match_labels(["-1", "0", "1"], ("a", "b", "c")) is None


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
def test_a_fine_tuned_classifier_is_the_teacher(folder, tmp_path, capsys, order):
    """As float32 row of the report, without training, in two orders of labels."""
    names = ["contradiction", "entailment", "neutral"]
    names = [names[i] for i in order]
    write(folder / "config.json", id2label=dict(enumerate(names)))
    model = converted(folder)
    common = ["--task", "xnli", "--data-dir", SAMPLE, "--model", model, "--epochs", "0", "--student-steps", "2"]
    common += ["--max-length", "32", "--out", str(tmp_path / "run")]
    assert train.main([*common, "--methods", "fp32", "sdq"]) == 0
    assert "is kept: " in capsys.readouterr().out
    with open(tmp_path / "run" / "results.json") as file:
        row = json.load(file)["methods"]["fp32"]
    student = read_student(str(tmp_path / "run" / "student.pt"))
    assert student.notes["labels"].split("\t") == list(NLI_LABELS)
    # Against the model as it stands, whose labels are compared by name.
    plain, correct = load_checkpoint(model), 0
    tokenizer = load_tokenizer(read_checkpoint(model)["tokenizer"].numpy().tobytes())
    with open(os.path.join(SAMPLE, "XNLI-1.0", "xnli.test.tsv"), encoding="utf-8") as file:
        rows = [line.split("\t") for line in file.read().splitlines()[1:]]
    for _, gold, first, second, _ in rows:
        logits, _ = plain(torch.tensor([tokenizer.encode(first, second, 32)]))
        correct += names[int(logits.argmax())] == gold
    assert sum(each["correct"] for each in row["languages"].values()) == correct


def test_another_order_of_labels_is_another_teacher(folder, tmp_path, capsys):
    model = converted(folder)
    names = ("contradiction", "entailment", "neutral")
    common = ["--task", "tsv", "--data-dir", str(tmp_path), "--model", model, "--epochs", "0", "--methods", "fp32"]
    for i, labels in enumerate((names, ("0", "1", "2"), names[::-1])):
        for split in ("train", "dev", "test"):
            rows = "".join(f"the girl {k}\t{labels[k % 3]}\n" for k in range(6))
            (tmp_path / f"{split}.tsv").write_text("text\tlabel\n" + rows)
        own_labels.cache_clear()
        read_own.cache_clear()
        assert train.main([*common, "--max-length", "32", "--out", str(tmp_path / f"run{i}")]) == 0
    found = capsys.readouterr().out
    assert "0 is" not in found and "contradiction is 0, entailment is 1, neutral is 2" in found


def test_a_head_without_names_is_not_guessed(folder, tmp_path, capsys):
    payload = read_checkpoint(converted(folder))
    del payload["notes"]["labels"]
    old = str(tmp_path / "old.pt")
    torch.save(payload, old)
    common = ["--task", "xnli", "--data-dir", SAMPLE, "--model", old, "--max-length", "32", "--methods", "fp32"]
    assert train.main([*common, "--epochs", "0", "--out", str(tmp_path / "run")]) == 2
    assert "classes without names; to keep it, convert the model again" in capsys.readouterr().out


def test_other_heads_are_replaced_with_a_word(folder, tmp_path, capsys):
    write(folder / "config.json", id2label={"0": "bad", "1": "fair", "2": "good"})
    model = converted(folder)
    common = ["--task", "xnli", "--data-dir", SAMPLE, "--model", model, "--max-length", "32", "--methods", "fp32"]
    assert train.main([*common, "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    assert "sequence head for bad, fair, good: xnli gets a new one" in capsys.readouterr().out
    assert train.main([*common, "--epochs", "0", "--out", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert "has no head of classes for xnli" in error and not os.path.exists(tmp_path / "none")


# ------------------------------------------------------------------------------------- full disks
@contextmanager
def full_disk():
    """No file may grow beyond 20,000 bytes, as if the disk were full then."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        yield
    finally:  # before pytest writes to its own log, which may be longer
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line(folder, tmp_path, capsys):
    (tmp_path / "w.pt").write_bytes(b"what was there")
    small = ["--data-dir", SAMPLE, "--steps", "1", "--max-length", "32", "--device", "cpu"]
    for program, arguments in (
        (convert, ["small", "--from", str(folder), "--out", str(tmp_path / "w.pt")]),
        (train, [*small, "--task", "xnli", "--model", "mini", "--out", str(tmp_path / "run")]),
    ):
        with full_disk():
            assert program.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.splitlines()[-1].startswith("error: ") and "File too large" in error and "Traceback" not in error
    assert (tmp_path / "w.pt").read_bytes() == b"what was there"
    assert not [name for _, _, names in os.walk(tmp_path) for name in names if name.endswith(".part")]


# ------------------------------------------------------------------------------------- exporting
@pytest.mark.parametrize("kind", ["roberta", "bert", "sentencepiece"])
def test_an_exported_student_comes_back(tmp_path, capsys, kind):
    source = {"roberta": os.path.join(GOLDEN, "seq"), "bert": BERT, "sentencepiece": FOLDER}[kind]
    folder = shutil.copytree(source, tmp_path / "hf")
    if kind == "roberta":
        shutil.copy(TOKENIZER, folder)
    model = converted(folder)
    common = [
        "--task",
        "xnli",
        "--data-dir",
        SAMPLE,
        "--model",
        model,
        "--max-length",
        "32",
        "--out",
        str(tmp_path / "run"),
    ]
    assert train.main([*common, "--steps", "2", "--bits", "4", "--methods", "qat"]) == 0
    student, target = str(tmp_path / "run" / "student.pt"), tmp_path / "exported"
    assert convert.main(["--export", student, str(target)]) == 0
    again = load_checkpoint(converted(target, "again"))
    read = read_student(student)
    expected = float_model(read._replace(quant=read.quant)).state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in again.state_dict().items())
    assert not (target / "sentencepiece.bpe.model").exists()
    settings = json.loads((target / "config.json").read_text())
    assert settings["id2label"] == {str(i): name for i, name in enumerate(NLI_LABELS)}
    payload = read_checkpoint(str(tmp_path / "again.pt"))
    before, after = (load_tokenizer(model.numpy().tobytes()) for model in (read.vocabulary, payload["tokenizer"]))
    pairs = [(row.text_a, row.text_b) for row in load(find_task("xnli"), "test", "fr", SAMPLE)]
    assert [before.encode(*pair) for pair in pairs] == [after.encode(*pair) for pair in pairs]
    capsys.readouterr()
    assert convert.main(["--export", student, str(target)]) == 2
    assert "holds a model already" in capsys.readouterr().err


# The tokenizer.json of the built-in model, and the ids that transformers 5.24 (tokenizers 0.23.3) gave with it to the first
# 40 pairs of each language of the built-in test set: SHA-256 of the file, and of the ids as JSON.
FILE = "502ae7a6b4c174ade481f30bfb42771171e4f4cf22c4f8a9e246729db568db59"
IDS = "bb921717ccb52be490e53bf813e5f28e70e30a6c6880ee5c842a39fed218857c"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A student of the built-in model, and the folder that it is exported to."""
    out = tmp_path_factory.mktemp("mini")
    common = ["--task", "xnli", "--data-dir", MINI_DATA, "--model", "mini", "--out", str(out / "run")]
    small = ["--languages", "de", "--max-train", "8", "--max-eval", "6", "--steps", "1", "--device", "cpu"]
    assert train.main([*common, *small, "--methods", "ptq"]) == 0
    assert convert.main(["--export", str(out / "run" / "student.pt"), str(out / "hf")]) == 0
    return str(out / "run" / "student.pt"), out / "hf"


@pytest.fixture(scope="module")
def pairs():
    rows = [load(find_task("xnli"), "test", language, MINI_DATA)[:40] for language in XNLI_LANGUAGES]
    return [(row.text_a, row.text_b) for some in rows for row in some]


def test_export_of_the_built_in_model(exported, pairs):
    """Its SentencePiece model is of the type BPE, of which transformers would make a unigram model."""
    student, folder = exported
    assert len(pairs) == 600 and sorted(os.listdir(folder)) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest() == FILE
    for tokenizer in (
        load_tokenizer(read_student(student).vocabulary.numpy().tobytes()),
        convert.read_tokenizer(folder),
    ):
        ids = [tokenizer.encode(*pair) for pair in pairs]
        assert hashlib.sha256(json.dumps(ids).encode()).hexdigest() == IDS


@pytest.mark.parametrize("kind", ["built in", "unigram", "wordpiece", "cased"])
def test_transformers_gives_the_ids_and_logits_of_an_exported_student(exported, pairs, tmp_path, kind):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    student, folder = exported
    if kind == "unigram":  # SentencePiece adds the scores of a text in float32, so that longer ones may tie
        pairs = [(first[:20], second[:20]) for first, second in pairs]
    if kind != "built in":
        source = shutil.copytree(FOLDER if kind == "unigram" else BERT, tmp_path / "hf")
        if kind == "cased":
            write(source / "tokenizer_config.json", do_lower_case=False)
        common = ["--task", "xnli", "--data-dir", SAMPLE, "--max-length", "32", "--methods", "ptq", "--steps", "1"]
        assert train.main([*common, "--model", converted(source), "--out", str(tmp_path / "run")]) == 0
        student, folder = str(tmp_path / "run" / "student.pt"), tmp_path / "exported"
        assert convert.main(["--export", student, str(folder)]) == 0
    read = read_student(student)
    ours = load_tokenizer(read.vocabulary.numpy().tobytes())
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    ids = [theirs(*pair)["input_ids"] for pair in pairs]
    assert ids == [ours.encode(*pair) for pair in pairs]
    if kind == "built in":
        assert hashlib.sha256(json.dumps(ids).encode()).hexdigest() == IDS
    model = float_model(read._replace(quant=replace(read.quant, act_bits=32)))
    reference = transformers.AutoModelForSequenceClassification.from_pretrained(str(folder)).eval()
    for pair in pairs[::60]:
        inputs = theirs(*pair, max_length=30, truncation=True, return_tensors="pt")
        with torch.no_grad():
            logits, _ = model(inputs["input_ids"], types=inputs.get("token_type_ids"))
            torch.testing.assert_close(logits, reference(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_an_export_that_fails_writes_nothing(exported, tmp_path, capsys, monkeypatch):
    def fails(tokenizer):
        raise UserError("ids differ")

    monkeypatch.setattr(convert, "tokenizer_json", fails)
    assert convert.main(["--export", exported[0], str(tmp_path / "hf")]) == 2
    assert capsys.readouterr().err == "error: ids differ\n" and not (tmp_path / "hf").exists()

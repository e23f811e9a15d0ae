"""Sentence encoders (--task embed): vectors, retrieval and its files, from training to an exported folder."""

import copy
import json
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRATCH, TOKENIZER, answer, log_of, random_ids, results, run
from test_convert import converted

import convert
import predict
import train
from checkpoint import fake_quantized, load_model, read_model, read_student
from data.batches import draw, encode_split, training_batch
from data.metrics import finds_own, sentence_scores, spearman
from data.sentences import read_pairs
from data.tasks import find_task, load
from kit.common import UserError
from model import HEADS, ModelConfig, build_model, with_head
from tools import compare
from train import sdq_loss

EMBED, DATA = find_task("embed"), os.path.join(ROOT, "data", "mini")
SMALL = "--task embed --max-length 32 --device cpu --precision float32".split()


@pytest.fixture
def encoder(tiny_config):
    return with_head(build_model(tiny_config), "embedding", 0).eval()


# ------------------------------------------------------------------------------------- the vectors
@pytest.mark.parametrize("pooling", ["", "mean", "first"])
def test_vectors_by_hand_in_float64(pooling):
    head = HEADS["embedding"](ModelConfig(pooling=pooling))
    hidden, lengths = torch.randn(3, 7, 16), (7, 2, 4)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    hidden[1, 2:] = float("nan")  # padding may hold anything
    found = head(hidden, mask)
    for row, n, vector in zip(hidden.double(), lengths, found, strict=True):
        pooled = row[0] if pooling == "first" else row[:n].mean(dim=0)
        torch.testing.assert_close(vector.double(), pooled / pooled.norm(), atol=1e-6, rtol=0)
    torch.testing.assert_close(head(hidden[:1], None), found[:1], atol=1e-6, rtol=0)


def test_the_loss_is_one_minus_the_cosine(models, capsys):
    teacher, student = (with_head(model, "embedding", 0).eval() for model in models)
    config = train.TrainConfig(task="embed", alpha=100.0, distill="logits+context")
    ids, mask = random_ids((9, 4), 442)
    rows = train.Batch(ids, mask, None, 13)
    terms = sdq_loss(student, teacher, rows, config)
    cosines = (student(ids, mask)[0].double() * teacher(ids, mask)[0].double()).sum(dim=1)
    assert set(terms) == {"logits", "context"}
    assert terms["logits"].item() == pytest.approx(100 * (1 - cosines).mean().item(), rel=1e-4)
    assert rows.rows(slice(1, 2)).labels is None and sdq_loss(teacher, teacher, rows, config)["logits"] < 1e-4


def test_retrieval_by_brute_force():
    rng = np.random.default_rng(0)
    first = rng.standard_normal((40, 3)).astype(np.float32)
    second = first + 0.5 * rng.standard_normal((40, 3)).astype(np.float32)
    first, second = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (first, second))
    right = [
        [max(range(40), key=lambda j: float(a[i].astype(float) @ b[j].astype(float))) == i for i in range(40)]
        for a, b in ((first, second), (second, first))
    ]
    assert finds_own(first, second).tolist() == right and 0.1 < np.mean(right) < 0.9
    vectors = np.concatenate((first, second))
    found = sentence_scores("retrieval", vectors, None, vectors[:, ::-1])
    assert found["score"] == found["retrieval"] == pytest.approx(100 * np.mean(right)) and found["total"] == 40
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(found["correct_rows"]), np.uint8), count=80)
    assert bits.reshape(2, 40).tolist() == right
    assert found["cosine"] == pytest.approx(100 * np.mean(np.sum(vectors * vectors[:, ::-1], axis=1)), rel=1e-5)
    scores = rng.standard_normal(40).astype(np.float32)
    cosines = np.array([a.astype(float) @ b.astype(float) for a, b in zip(first, second, strict=True)])
    assert sentence_scores("spearman", vectors, scores, None) == {
        "total": 40,
        "spearman": pytest.approx(100 * spearman(cosines, scores)),
        "score": pytest.approx(100 * spearman(cosines, scores)),
    }
    alike = np.ones((40, 1), dtype=np.float32)  # a collapsed model finds one of 40
    assert finds_own(alike, alike).sum() == 2


def test_every_sentence_is_computed_once(encoder, tokenizer, monkeypatch):
    tests = {name: encode_split(EMBED, "test", name, DATA, tokenizer, 64, 20) for name in ("de", "es")}
    whole = [predict.sentence_vectors(encoder, each, torch.device("cpu")) for each in tests.values()]
    seen, forward = [], encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda ids, *rest, **more: seen.extend(ids) or forward(ids, *rest, **more))
    known = {}
    for vectors, dataset in zip(whole, tests.values(), strict=True):
        found = predict.sentence_vectors(encoder, dataset, torch.device("cpu"), known)
        np.testing.assert_allclose(found, vectors, atol=1e-5)  # in other batches
    assert len(seen) == len(known) == 3 * 20  # of English and two other languages


# --------------------------------------------------------------------------------------- the files
def test_premises_of_xnli():
    """Each English premise once, with its translation."""
    xnli = {name: load(find_task("xnli"), "dev", name, DATA) for name in ("en", "de")}
    pairs = load(EMBED, "dev", "de", DATA)
    assert [pair.text_a for pair in pairs] == list(dict.fromkeys(row.text_a for row in xnli["en"]))
    assert {pair[:2] for pair in pairs} <= {(a.text_a, b.text_a) for a, b in zip(*xnli.values(), strict=True)}
    train_text, held_out, rest = (
        [row.text_a for row in load(EMBED, split, "all", DATA)] for split in ("train", "held-out", "rest")
    )
    assert len(set(train_text)) == len(train_text) and sorted(held_out + rest) == sorted(train_text)


def write(folder, **files):
    for name, lines in files.items():
        suffix = "txt" if name == "train" else "tsv"
        (folder / f"{name}.{suffix}").write_text("\n".join(lines) + "\n", encoding="utf-8")


TRAIN = ["the girl reads", "der Junge kauft Äpfel", "", "a dog sleeps", "  ", *(f"sentence {i}" for i in range(30))]
PAIRS = ["text\ttext2\tlanguage", *(f"house {i}\tHaus {i}\t{name}" for i in range(5) for name in ("de", "sw"))]
SCORED = ["text\ttext2\tscore", "a cat\ta cat\t5", "a cat\ta dog\t2.5", "a cat\tred\t-0.5", "dogs\ta dog\t4"]


def test_your_own_files(tmp_path, capsys):
    write(tmp_path, train=TRAIN, test=PAIRS)
    folder = [*SMALL, *SCRATCH, "--data-dir", str(tmp_path), "--student-steps", "2"]
    assert train.main([*folder, "--out", str(tmp_path / "pairs")]) == 0
    printed = capsys.readouterr().out
    assert "30 training sentences, 20 test sentences in 2 sets" in printed and "| cosine |" in printed
    write(tmp_path, test=SCORED, dev=[line.removesuffix("\tsw").removesuffix("\tde") for line in PAIRS[1:]])
    (tmp_path / "dev.tsv").write_text("text\ttext2\n" + (tmp_path / "dev.tsv").read_text())
    read_pairs.cache_clear()
    assert train.main([*folder, "--out", str(tmp_path / "scored")]) == 0
    printed = capsys.readouterr().out
    assert "33 training sentences, 8 test sentences" in printed and "| spearman | cosine |" in printed
    assert "dev retrieval" in printed
    write(tmp_path, dev=PAIRS)  # a text has a partner in each language: sentences alone
    read_pairs.cache_clear()
    assert len(load(EMBED, "dev", "all", str(tmp_path))) == 10
    assert train.main([*folder, "--out", str(tmp_path / "languages")]) == 0
    assert "dev cosine" in capsys.readouterr().out
    runs = [str(tmp_path / name / "results.json") for name in ("pairs", "scored")]
    assert compare.main(runs[:1]) == 0 and "| worst |" in " ".join(capsys.readouterr().out.split())
    assert compare.main(runs[1:]) == 0 and re.search(
        r"\| sdq W8A8 +\| +1 \| -?[\d.]+ \| +[\d.]+ \|", capsys.readouterr().out
    )
    assert set(results(tmp_path, "scored")["methods"]["sdq"]["languages"]) == {"all"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train": ["one", "", "one"]}, "train.txt has fewer than two different sentences"),
        ({"test": ["text\tlanguage", "a\tde"]}, "test.tsv, line 1: no column 'text2'"),
        ({"test": ["text\ttext2", "a\tb", "c"]}, "test.tsv, line 3: 1 columns, the header has 2"),
        ({"test": ["text\ttext2", "a\tb", "c\t "]}, "test.tsv, line 3: the text2 is empty"),
        ({"test": ["text\ttext2\tlanguage", "a\tb\tde", "c\td\t"]}, "line 3: the language is empty"),
        ({"test": ["text\ttext2\tscore", "a\tb\t1", "c\td\t"]}, "line 3: the score '' is no number, and all rows need"),
        ({"test": ["text\ttext2\tscore", "a\tb\tnan", "c\td\t1"]}, "line 2: the score 'nan' is no number"),
        ({"test": ["text\ttext2", "a\tb"]}, "embed: there is one test pair of all, which any model would find"),
        ({"test": ["text\ttext2"]}, "test.tsv has no rows"),
        ({"test": ["text\ttext2\tlanguage", "a\tb\tall", "c\td\tall"]}, "'all' can't be the name of a language"),
        ({"test": ["text\ttext2\tscore", "a\tb\t1", "c\td\t1.0"]}, "all scores in language 'all' are equal"),
        ({"train": None}, "train.txt: fetch XNLI with 'python data/fetch.py xnli', or name a folder with --data-dir"),
    ],
)
def test_files_that_cannot_be_read(files, message, tmp_path, capsys):
    read_pairs.cache_clear()
    write(tmp_path, **{"train": TRAIN, "test": PAIRS} | {name: lines for name, lines in files.items() if lines})
    if None in files.values():
        os.remove(tmp_path / "train.txt")
    status, error = answer(capsys, *SMALL, *SCRATCH, "--data-dir", str(tmp_path), "--out", str(tmp_path))
    assert status == 2 and message in error and not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--methods qat", "--task embed has no labels"),
        ("--epochs 1", "--task embed has no labels"),
        ("--max-eval 1", "there is one test pair of ar"),
        ("--model scratch", "--model scratch needs --tokenizer"),
    ],
)
def test_options_that_cannot_be(options, message, tmp_path, capsys, nothing_downloaded):
    status, error = answer(capsys, "--task", "embed", *options.split(), "--out", str(tmp_path / "run"))
    assert status == 2 and message in error


def test_prompts(tokenizer, tmp_path, capsys):
    for prompt in (3, None, {"query": "query: "}, "\udcff"):
        with pytest.raises(UserError, match="is not a text"):
            tokenizer.set_prompt(prompt)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.set_prompt("the girl reads a book. " * 20)
    with pytest.raises(UserError, match="leaves no room for a sentence in 32 tokens"):
        encode_split(EMBED, "test", "de", DATA, tokenizer, 32)


# --------------------------------------------------------------------- training, predicting, export
@pytest.fixture(scope="module", params=["sentencepiece", "wordpiece"])
def student(request, tmp_path_factory, bert):
    """(folder, the run's rows, path of its student) of an encoder with a prompt."""
    folder = tmp_path_factory.mktemp("embed")
    path = str(folder / "model.safetensors")
    if request.param == "wordpiece":
        read = read_model(bert)
        source, tokens = load_model(bert), read.vocabulary.numpy().tobytes()
    else:
        with open(TOKENIZER, "rb") as file:
            tokens = file.read()
        torch.manual_seed(0)
        sizes = dict(vocab_size=442, hidden_size=32, num_layers=2, num_heads=4, ffn_size=64, max_tokens=64)
        source = build_model(ModelConfig(**sizes, pooling="first", head="none"))
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    train.checkpoint.save_model(path, source, tokens, {"prompt": "the girl: "})
    options = "--analyze --student-steps 4 --accumulate 2 --bits 4 --methods fp32 ptq ptq-static sdq --languages de zh"
    options += f" --max-train 60 --max-eval 20 --data-dir {DATA}"
    command = [*SMALL, *options.split(), "--model", path, "--out", str(folder / "run")]
    assert train.main(command) == 0
    assert {"logits", "context"} < set(log_of(folder)[0]) and "task" not in log_of(folder)[0]
    return folder, results(folder)["methods"], str(folder / "run" / "student.safetensors")


def test_rows_of_the_report(student):
    _, rows, _ = student
    assert list(rows) == ["fp32", "ptq", "ptq-static", "sdq"]
    for name, row in rows.items():
        assert set(row["languages"]) == {"de", "zh"} and row["score"] is None
        for found in row["languages"].values():
            assert found["score"] == found["retrieval"]
            assert abs(found["cosine"] - 100) < 1e-4 if name == "fp32" else found["cosine"] < 99.999
    assert rows["sdq"]["student"]["languages"] == rows["sdq"]["languages"]


def test_vectors_of_a_student_are_those_of_the_report(student, capsys, tmp_path):
    folder, rows, path = student
    assert predict.main([path, "--evaluate", "--max-eval", "20", "--languages", "de", "zh", "--data-dir", DATA]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| sdq"))
    assert line.split("|")[2].strip() == f"{rows['sdq']['zero_shot_mean']:.2f}"
    loaded, pairs = predict.load(path), draw(load(EMBED, "test", "de", DATA), 20, 1)
    assert loaded.tokenizer.prompt == "the girl: "
    first, second = ([pair[i] for pair in pairs] for i in (0, 1))
    dataset = encode_split(EMBED, "test", "de", DATA, loaded.tokenizer, 32, 20)
    found = predict.embed(loaded, [*first, *second])
    expected = predict.sentence_vectors(loaded.model, dataset, torch.device("cpu"))
    assert np.sum(found * expected, axis=1).min() > 0.999  # in other batches a rounding may flip
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join([*second, "\x01\x02"]) + "\n", encoding="utf-8")  # control characters: the prompt alone
    assert predict.main([path, str(texts), "--out", str(tmp_path / "vectors.npy")]) == 0
    vectors = np.load(tmp_path / "vectors.npy")
    assert vectors.dtype == np.float32 and vectors.shape == (len(second) + 1, 32)
    assert np.array_equal(vectors, predict.embed(loaded, [*second, "\x01\x02"]))
    assert np.array_equal(vectors[-1], predict.embed(loaded, ["\x01\x02", *second])[0])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert predict.main([path, str(texts), "--out", str(tmp_path / "other.npy"), "--prompt", ""]) == 0
    assert not np.array_equal(np.load(tmp_path / "other.npy"), vectors)
    assert predict.embed(loaded, []).shape == (0, 32)


def test_mistakes_with_vectors(student, tmp_path, capsys):
    path, texts, out = student[2], tmp_path / "texts.txt", tmp_path / "vectors.npy"
    for text, message in (("a\n\nb\n", "line 2 is empty; nothing was written"), ("a\tb\n", "line 1 has 2 texts")):
        texts.write_text(text)
        assert predict.main([path, str(texts), "--out", str(out)]) == 2 and not out.exists()
        assert message in capsys.readouterr().err
    assert predict.main([path, str(texts)]) == 2 and "--out vectors.npy" in capsys.readouterr().err
    for options in (["--out", "texts.txt"], ["--out", "x.npy", "--evaluate"]):
        with pytest.raises(SystemExit, match="2"):
            predict.main([path, *options])
    with pytest.raises(UserError, match="give a list of texts"):
        predict.embed(predict.load(path), "a text")
    assert run(tmp_path, *"--languages de --steps 1 --methods ptq".split()) == 0
    assert predict.main([str(tmp_path / "run" / "student.safetensors"), str(texts), "--out", str(out)]) == 2
    assert "vectors come from one of --task embed" in capsys.readouterr().err


def test_an_exported_student_makes_the_same_vectors(student, tmp_path, capsys):
    folder, _, path = student
    out = tmp_path / "exported"
    assert convert.main(["--export", path, str(out)]) == 0
    modules = [module["type"].rpartition(".")[2] for module in json.loads((out / "modules.json").read_text())]
    assert modules == ["Transformer", "Pooling", "Normalize"]
    read, back = read_student(path), read_model(converted(shutil.copytree(out, tmp_path / "hf")))
    assert back.config.pooling == (read.config.pooling or "mean") and back.notes["prompt"] == "the girl: "
    expected, again = fake_quantized(read).state_dict(), back.tensors
    assert all(torch.equal(expected[name], tensor) for name, tensor in again.items())
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    reference = transformers.AutoModel.from_pretrained(str(out)).eval()
    theirs = transformers.AutoTokenizer.from_pretrained(str(out))
    model = fake_quantized(read._replace(quant=replace(read.quant, act_bits=32)))
    for pair in load(EMBED, "test", "zh", DATA)[:9]:
        inputs = theirs("the girl: " + pair.text_b, max_length=32, truncation=True, return_tensors="pt")
        with torch.no_grad():
            hidden = reference(**inputs).last_hidden_state[0]
            pooled = hidden[0] if read.config.pooling == "first" else hidden.mean(dim=0)
            vector, _ = model(inputs["input_ids"], types=inputs.get("token_type_ids"))
        torch.testing.assert_close(vector[0], pooled / pooled.norm(), atol=1e-5, rtol=0)


def test_a_teacher_that_cannot_be_made_is_named(tmp_path, capsys, tiny_config, tokenizer_bytes):
    path = str(tmp_path / "model.safetensors")
    for pooling, message in (("other", "not implemented: Transformer, Dense"), ("max", "pooling is 'max'")):
        model = build_model(train.checkpoint.ModelConfig(**{**vars(tiny_config), "pooling": pooling}))
        train.checkpoint.save_model(path, model, tokenizer_bytes, {"modules": "Transformer, Dense"})
        status, error = answer(capsys, *SMALL, "--model", path, "--out", str(tmp_path / "run"))
        assert status == 2 and message in error


def test_batches_have_no_labels(tokenizer):
    dataset = encode_split(EMBED, "train", "all", DATA, tokenizer, 32, 40)
    batch = training_batch(dataset, 8, 0, 0)
    assert batch.labels is None and len(batch.ids) == 8 and dataset.sha256 != ""

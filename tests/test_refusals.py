"""train.py: every refused input is answered with one line and status 2, and nothing is written."""

import os
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import SAMPLE, SCRATCH, SMALL, TOKENIZER, run

import train
from checkpoint import checkpoint_payload
from model import build_model


def answer(capsys, *command):
    """(status, the error line) of train.main; argparse exits by itself."""
    try:
        status = train.main(list(command))
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: "), captured.err
    return status, captured.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--task xnil", "unknown task 'xnil'; known: xnli"),
        ("--frobnicate 3", "unrecognized arguments"),
        ("--bits x", "invalid int value"),
        ("--bits 1", "--bits 1: choose from 2 to 8, or 32"),
        ("--bits 9", "--bits 9"),
        ("--bits 16", "--bits 16"),
        ("--act-bits 1", "--act-bits 1"),
        ("--act-bits 31", "--act-bits 31"),
        ("--bits 32 --act-bits 32", "use --methods fp32"),
        ("--noise 1.5", "--noise 1.5: choose a value from 0 to 1"),
        ("--noise nan", "--noise nan"),
        ("--epochs 0", "--epochs 0"),
        ("--temperature 0", "--temperature 0"),
        ("--lr 0", "--lr 0"),
        ("--student-lr 0", "--student-lr 0"),
        ("--distill logits --alpha 0", "makes sdq the same as qat"),
        ("--distill context --beta 0", "makes sdq the same as qat"),
        ("--max-length 3", "--max-length 3"),
        ("--seed -1", "--seed -1"),
        ("--methods fp32 magic", "'magic' is unknown"),
        ("--methods ptq ptq", "named twice"),
        ("--distill none", "use --methods fp32 ptq qat"),
        ("--alpha 0 --beta 0", "makes sdq the same as qat"),
        ("--distill logit", "'logit' is unknown"),
        ("--act-range static --methods ptq-static", "drop ptq-static"),
        ("--act-bits 32 --methods ptq-static", "static ranges need quantized activations"),
        ("--act-range fixed", "--act-range 'fixed': choose from dynamic, static"),
        ("--weight-range best", "--weight-range 'best'"),
        ("--weight-range lsq", "add --weights lsq"),
        ("--weights ternary --bits 2 --weight-range mse", "leave out --weight-range"),
        ("--bits 32 --weight-range mse", "--weight-range is for quantized weights"),
        ("--bits 32 --weight-clip 2", "--weight-clip is for quantized weights"),
        ("--weights octal", "--weights 'octal': choose from uniform, ternary, lsq"),
        ("--weights ternary", "--weights ternary has 2 bits, not 8: add --bits 2"),
        ("--weights lsq --bits 32", "choose --bits 2 to 8"),
        ("--weights lsq --tt-rank 4", "tensor trains have learned scales"),
        ("--weight-clip -1", "--weight-clip -1"),
        ("--attention-bits 1", "--attention-bits 1: choose from 2 to 8, or 32"),
        ("--act-range learned --act-bits 32", "learned ranges need quantized activations"),
        ("--act-range learned --methods ptq ptq-static", "drop ptq-static"),
        ("--output-tap residual", "logits+context has no output"),
        ("--distill context --temperature 2", "--temperature softens the logits"),
        ("--distill layerwise --beta 9", "--beta does nothing with --distill layerwise"),
        ("--distill layerwise --output-tap normed", "--output-tap does nothing"),
        ("--task stsb --label-smoothing 0.1", "--label-smoothing is for classes"),
        ("--task stsb --temperature 2", "--temperature is for classes"),
        ("--output-tap here", "--output-tap 'here': choose from projected, residual, normed"),
        ("--gamma 0.5", "--gamma: gamma weighs map against output"),
        ("--distill map+output --gamma 2", "--gamma 2"),
        ("--part-weights map=2", "map is not distilled here"),
        ("--part-weights logits=x", "'x' is not a number"),
        ("--distill map --part-weights map=0", "makes sdq the same as qat"),
        ("--distill map --distill-layers 0", "--distill-layers 0: blocks count from 1"),
        ("--distill map --distill-layers 2 2", "names a block twice"),
        ("--distill map --distill-layers two", "invalid int value"),
        ("--distill logits --distill-layers 1", "logits have no layers"),
        ("--distill layerwise --gamma 0.5", "--gamma does nothing with --distill layerwise"),
        ("--task-weight -1", "--task-weight -1"),
        ("--observer best", "--observer 'best'"),
        ("--eval-split train", "--eval-split 'train': choose from test, dev"),
        ("--device tpu", "--device 'tpu'"),
        ("--languages xx", "'xx': xnli has ar bg de"),
        ("--languages en,", "--languages ''"),
        ("--layers 3", "--layers shapes a new model: it needs --model scratch"),
        ("--tokenizer x.model", "--tokenizer shapes a new model"),
        ("--model scratch", "--model scratch needs --tokenizer"),
        (f"--model scratch --tokenizer {TOKENIZER} --student-init pretrained", "use teacher"),
        (f"--model scratch --tokenizer {TOKENIZER} --hidden 30 --heads 4", "not divisible"),
        ("--model scratch --tokenizer nowhere.model", "no tokenizer at nowhere.model"),
        ("--model gpt", "no model 'gpt'"),
        ("--model nowhere/x.pt", "no model 'nowhere/x.pt'"),
        ("--model xlmr-large", "python convert.py xlmr-large --from DIR"),
        ("--model xlmr-base", "python convert.py xlmr-base'"),
    ],
)
def test_refused_options(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "WEIGHTS_DIR", str(tmp_path / "weights"))
    status, error = answer(capsys, *options.split(), "--out", str(tmp_path / "run"))
    assert status == 2 and message in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(capsys, tmp_path):
    assert "no CUDA device" in answer(capsys, *SMALL, "--device", "cuda", "--out", str(tmp_path))[1]


def test_eval_refuses_other_files(tmp_path, capsys):
    assert run(tmp_path, "--steps", "1", "--methods", "fp32") == 0
    (teacher,) = (tmp_path / "teachers").iterdir()
    capsys.readouterr()
    _, error = answer(capsys, "--eval", str(tmp_path / "nowhere.pt"))
    assert "no checkpoint at" in error
    _, error = answer(capsys, "--eval", str(teacher))
    assert "is not a checkpoint of this project (sdq-student-3)" in error


def test_missing_data(capsys, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(SAMPLE, folder)
    options = [*SCRATCH, "--data-dir", str(folder), "--out", str(tmp_path / "run")]
    (folder / "XNLI-1.0" / "xnli.test.tsv").unlink()
    _, error = answer(capsys, *options)
    assert "no XNLI-1.0/xnli.test.tsv" in error and "--eval-split dev" in error
    assert "python data/fetch.py xnli" in error
    assert train.main([*options, "--eval-split", "dev", "--steps", "1", "--methods", "fp32"]) == 0
    capsys.readouterr()
    (folder / "XNLI-1.0" / "xnli.dev.tsv").unlink()
    options[-1] = str(tmp_path / "other")
    assert "python data/fetch.py xnli" in answer(capsys, *options, "--eval-split", "dev")[1]


def test_language_without_rows(capsys, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(SAMPLE, folder)
    path = folder / "XNLI-1.0" / "xnli.test.tsv"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(x for x in lines if not x.startswith("sw\t")), encoding="utf-8")
    options = [*SCRATCH, "--data-dir", str(folder), "--out", str(tmp_path / "run")]
    assert "no test row in language 'sw'" in answer(capsys, *options)[1]


def test_longer_than_the_positions(capsys, tmp_path, tiny_config):
    with open(TOKENIZER, "rb") as file:
        torch.save(checkpoint_payload(build_model(tiny_config), file.read()), tmp_path / "m.pt")
    options = [
        "--model",
        str(tmp_path / "m.pt"),
        "--data-dir",
        SAMPLE,
        "--out",
        str(tmp_path / "run"),
    ]
    _, error = answer(capsys, *options, "--max-length", "65")
    assert "has 64 positions; use 64 or less" in error


@pytest.mark.parametrize("tokenizer", [None, torch.zeros(9, dtype=torch.uint8), "text", "other"])
def test_checkpoint_without_a_fitting_tokenizer(tokenizer, capsys, tmp_path, tiny_config):
    with open(TOKENIZER, "rb") as file:
        payload = checkpoint_payload(build_model(tiny_config), file.read())
    if isinstance(tokenizer, str) and tokenizer == "other":
        small = replace(tiny_config, vocab_size=400)
        payload = {
            **checkpoint_payload(build_model(small), b"x"),
            "tokenizer": payload["tokenizer"],
        }
    else:
        payload["tokenizer"] = tokenizer
    torch.save(payload, tmp_path / "m.pt")
    options = ["--model", str(tmp_path / "m.pt"), "--data-dir", SAMPLE, "--max-length", "32"]
    _, error = answer(capsys, *options, "--out", str(tmp_path / "run"))
    assert "tokenizer" in error or "SentencePiece" in error


@pytest.mark.parametrize("content", [b"", b"garbage", "code"])
def test_bad_checkpoints(content, capsys, tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    if content == "code":

        class Evil:
            def __reduce__(self):
                return (os.mkdir, (str(tmp_path / "evil"),))

        torch.save(Evil(), path)
    else:
        path.write_bytes(content)
    options = ["--model", str(path), "--data-dir", SAMPLE, "--out", str(tmp_path / "run")]
    assert answer(capsys, *options)[0] == 2
    assert not os.path.exists(tmp_path / "evil")


def test_damaged_teacher_is_named(capsys, tmp_path):
    assert run(tmp_path, "--steps", "1", "--methods", "fp32") == 0
    (name,) = os.listdir(tmp_path / "teachers")
    (tmp_path / "teachers" / name).write_bytes(b"damaged")
    capsys.readouterr()
    assert run(tmp_path, "--steps", "1", "--methods", "fp32") == 2
    assert name in capsys.readouterr().err


def test_unwritable_out(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    _, error = answer(capsys, *SMALL, "--out", str(tmp_path / "file" / "run"))
    assert "cannot write to" in error and "choose another --out" in error
    (tmp_path / "teachers").write_text("")
    _, error = answer(capsys, *SMALL, "--out", str(tmp_path / "run"))
    assert "teachers: choose another --out" in error and not (tmp_path / "run").exists()


def test_a_mistake_touches_no_earlier_run(capsys, tmp_path):
    assert run(tmp_path, "--steps", "1", "--methods", "fp32", "ptq") == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    capsys.readouterr()
    assert run(tmp_path, "--data-dir", "nowhere") == 2
    assert run(tmp_path, "--model", "nowhere.pt") == 2
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    assert run(tmp_path, "--data-dir", "nowhere", out="new") == 2
    assert not (tmp_path / "new").exists()

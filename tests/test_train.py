"""train.py: the whole ladder from the command line, resuming, and every refused input in one line."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN, ROOT, SAMPLE, TOKENIZER

import convert
import loop
import train
from int8 import load_student
from model import build_model, checkpoint_payload, load_checkpoint, read_checkpoint
from options import RECIPES, build_parser, default_out, fill_in, parse_args

SCRATCH = f"--model scratch --layers 1 --hidden 32 --heads 2 --tokenizer {TOKENIZER}".split()
SMALL = [
    *SCRATCH,
    "--data-dir",
    SAMPLE,
    "--max-length",
    "32",
    "--languages",
    "de",
    "zh",
    "--device",
    "cpu",
]


def run(tmp_path, *options, out="run"):
    """train.main in this process, with a small model on the sample, in tmp_path/out."""
    return train.main([*SMALL, "--epochs", "1", "--out", str(tmp_path / out), *options])


def results(tmp_path, out="run"):
    with open(tmp_path / out / "results.json", encoding="utf-8") as file:
        return json.load(file)


# ------------------------------------------------------------------------------------- the ladder
def test_ladder_from_the_command_line(tmp_path):
    """A subprocess, as a user would: every row, all 15 languages, every file."""
    command = [
        sys.executable,
        os.path.join(ROOT, "train.py"),
        "--task",
        "xnli",
        "--bits",
        "8",
        *SCRATCH,
    ]
    command += [
        "--data-dir",
        SAMPLE,
        "--epochs",
        "2",
        "--out",
        str(tmp_path / "run"),
        "--device",
        "cpu",
    ]
    command += ["--methods", "fp32", "ptq", "ptq-static", "qat", "sdq"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=170)
    assert done.returncode == 0, done.stderr
    found = results(tmp_path)
    assert list(found["methods"]) == ["fp32", "ptq", "ptq-static", "qat", "sdq"]
    for name, row in found["methods"].items():
        assert len(row["languages"]) == 15
        for language in row["languages"].values():
            assert language["total"] == 3
            assert language["accuracy"] == pytest.approx(100 * language["correct"] / 3)
        others = [v["accuracy"] for k, v in row["languages"].items() if k != "en"]
        assert row["english"] == row["languages"]["en"]["accuracy"]
        assert row["zero_shot_mean"] == pytest.approx(sum(others) / 14)
        assert (row["train_seconds"] > 0) == (name in ("fp32", "qat", "sdq"))
    assert set(os.listdir(tmp_path / "run")) == {
        "config.json", "log.jsonl", "results.json", "report.md", "student.pt",
    }  # fmt: skip
    (teacher,) = os.listdir(tmp_path / "teachers")
    assert found["methods"]["fp32"]["size_bytes"] == os.path.getsize(
        tmp_path / "teachers" / teacher
    )
    assert found["methods"]["sdq"]["size_bytes"] == os.path.getsize(tmp_path / "run" / "student.pt")
    assert "| sdq " in done.stdout and "ETA" in done.stdout
    with open(tmp_path / "run" / "log.jsonl") as file:
        records = [json.loads(line) for line in file]
    steps = [r for r in records if r["method"] == "sdq" and "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 13))
    for record in steps:
        assert record["loss"] == pytest.approx(
            record["ce"] + record["logits"] + record["context"], rel=1e-4
        )


def test_it_learns(tmp_path):
    """The sample's negation is easy to see: the teacher must find it, the student must keep it."""
    common = ["--epochs", "12", "--lr", "3e-3", "--methods", "fp32", "sdq"]
    assert run(tmp_path, *common) == 0
    with open(tmp_path / "run" / "log.jsonl") as file:
        records = [json.loads(line) for line in file]
    losses = [r["loss"] for r in records if r["method"] == "fp32" and "loss" in r]
    assert sum(losses[-6:]) < 0.7 * sum(losses[:6])
    student = [r["ce"] for r in records if r["method"] == "sdq" and "loss" in r]
    assert sum(student[-6:]) <= 1.2 * sum(losses[-6:])


def test_teacher_is_reused_and_students_reproduce(tmp_path, capsys):
    assert run(tmp_path, out="a") == 0
    first = capsys.readouterr().out
    assert "fp32: step" in first
    assert run(tmp_path, out="b") == 0
    second = capsys.readouterr().out
    assert "fp32: step" not in second and "teacher from" in second
    a, b = results(tmp_path, "a"), results(tmp_path, "b")
    for name in a["methods"]:
        assert a["methods"][name]["languages"] == b["methods"][name]["languages"]
    students = [read_checkpoint(str(tmp_path / x / "student.pt"), "sdq-student-1") for x in "ab"]
    for name, entry in students[0]["packed"].items():
        assert torch.equal(entry["codes"], students[1]["packed"][name]["codes"]), name


def test_teacher_depends_on_what_made_it(tmp_path):
    for i, options in enumerate(([], ["--lr", "1e-3"], ["--seed", "1"], ["--bits", "4"])):
        assert run(tmp_path, "--methods", "fp32", "ptq", "--steps", "2", *options, out=f"r{i}") == 0
    assert len(os.listdir(tmp_path / "teachers")) == 3  # --bits changes no teacher


def test_student_from_pretrained_and_ablations(tmp_path, capsys):
    """From a converted checkpoint, with the flags of the ablations: each must run and each must
    matter.
    """
    folder = tmp_path / "hf"
    shutil.copytree(os.path.join(GOLDEN, "st"), folder)
    shutil.copy(TOKENIZER, folder)
    weights = str(tmp_path / "tiny.pt")
    assert convert.main(["tiny", "--from", str(folder), "--out", weights]) == 0
    base = ["--model", weights, "--data-dir", SAMPLE, "--max-length", "32", "--languages", "de"]
    base += ["--steps", "3", "--device", "cpu", "--methods", "sdq", "--max-train", "60"]
    arms = {
        "base": [],
        "pretrained": ["--student-init", "pretrained"],
        "bits": ["--bits", "4"],
        "act": ["--act-bits", "4"],
        "tensor": ["--per-tensor"],
        "mse": ["--bits", "3", "--weight-range", "mse"],
        "static": ["--act-range", "static", "--observer", "mse"],
        "noise": ["--noise", "1"],
        "block": ["--noise-block", "8"],
        "logits": ["--distill", "logits"],
        "output": ["--distill", "output+hidden"],
        "tau": ["--temperature", "4"],
        "beta": ["--beta", "1"],
        "dropout": ["--student-dropout", "0.2"],
    }
    codes = {}
    for name, options in arms.items():
        out = str(tmp_path / "out" / name)
        assert train.main([*base, *options, "--out", out]) == 0, capsys.readouterr().err
        with open(os.path.join(out, "log.jsonl")) as file:
            records = [json.loads(line) for line in file]
        codes[name] = [r["loss"] for r in records if r["method"] == "sdq" and "loss" in r]
        assert len(codes[name]) == 3
        load_student(os.path.join(out, "student.pt"))
    assert len({tuple(losses) for losses in codes.values()}) == len(arms)
    assert len(os.listdir(tmp_path / "out" / "teachers")) == 1


# --------------------------------------------------------------------------------------- stopping
class Killed(Exception):
    pass


@pytest.mark.parametrize("method", ["fp32", "sdq"])
def test_resume_is_bit_exact(method, tmp_path, monkeypatch, capsys):
    options = [
        "--save-every",
        "2",
        "--eval-every",
        "3",
        "--dropout",
        "0.1",
        "--student-dropout",
        "0.1",
    ]
    options += ["--epochs", "2", "--methods", "fp32", "qat", "sdq"]
    assert run(tmp_path, *options, out="whole/run") == 0
    real = loop.train_step
    count = 0

    def killed(student, teacher, batch, optimizers, config, parts):
        nonlocal count
        count += (method == "sdq") == bool(parts)  # the fp32 training comes before all others
        if count > 7:
            raise Killed
        return real(student, teacher, batch, optimizers, config, parts)

    monkeypatch.setattr(loop, "train_step", killed)
    with pytest.raises(Killed):
        run(tmp_path, *options, out="cut/run")
    assert os.path.exists(tmp_path / "cut" / "run" / "state.pt")
    monkeypatch.setattr(loop, "train_step", real)
    assert run(tmp_path, *options, "--resume", out="cut/run") == 0
    assert f"{method}: goes on after step 6" in capsys.readouterr().out
    whole, cut = results(tmp_path, "whole/run"), results(tmp_path, "cut/run")
    for name in whole["methods"]:
        assert whole["methods"][name]["languages"] == cut["methods"][name]["languages"]
    logs = []
    for name in ("whole", "cut"):
        with open(tmp_path / name / "run" / "log.jsonl") as file:
            records = [json.loads(line) for line in file]
        logs.append([{k: v for k, v in r.items() if k != "ms"} for r in records])
    assert logs[0] == logs[1]
    a, b = (
        read_checkpoint(str(tmp_path / x / "run" / "student.pt"), "sdq-student-1")
        for x in ("whole", "cut")
    )
    for name, entry in a["packed"].items():
        assert torch.equal(entry["codes"], b["packed"][name]["codes"])
        assert torch.equal(entry["scale"], b["packed"][name]["scale"])


def test_resume_before_the_first_state(tmp_path, monkeypatch):
    """Killed before any state was saved: it starts again, and the log holds each step once."""
    options = ["--methods", "fp32", "--save-every", "100"]
    assert run(tmp_path, *options, out="whole/run") == 0
    real = loop.train_step

    def killed(*args):
        killed.count += 1
        if killed.count > 3:
            raise Killed
        return real(*args)

    killed.count = 0
    monkeypatch.setattr(loop, "train_step", killed)
    with pytest.raises(Killed):
        run(tmp_path, *options, out="cut/run")
    monkeypatch.setattr(loop, "train_step", real)
    with open(tmp_path / "cut" / "run" / "log.jsonl", "a") as file:
        file.write('{"method": "fp32", "st')  # killed in the middle of a line
    assert run(tmp_path, *options, "--resume", out="cut/run") == 0
    logs = []
    for name in ("whole", "cut"):
        with open(tmp_path / name / "run" / "log.jsonl") as file:
            logs.append([{**json.loads(line), "ms": 0} for line in file])
    assert logs[0] == logs[1]


def test_a_folder_holds_one_run(tmp_path, capsys, monkeypatch):
    assert run(tmp_path, "--methods", "fp32") == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    capsys.readouterr()
    assert run(tmp_path, "--methods", "fp32", "--max-train", "90") == 2
    assert "holds a run with --max-train None, not 90: choose another" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    assert run(tmp_path, "--methods", "fp32") == 0  # the very same again
    (tmp_path / "run" / "state.pt").write_bytes(b"")
    assert run(tmp_path, "--methods", "fp32") == 2
    assert "holds a stopped run: go on with --resume" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"hidden_size": 768}')
    assert run(tmp_path, out="other") == 2
    assert "is not of a run of train.py" in capsys.readouterr().err


def test_default_folders_tell_settings_apart():
    def folder(*options):
        return default_out(fill_in(parse_args(options)[0], "mini"))

    arms = ("", "--bits 4", "--distill logits", "--noise 1", "--lr 1e-3")
    assert len({folder(*SCRATCH, *options.split()) for options in arms}) == 5
    assert folder(*SCRATCH) == folder(*SCRATCH, "--threads", "1")
    plain = folder("--task", "xnli", "--bits", "8")
    assert plain == os.path.join("out", "xnli-mini-w8a8-s0")
    assert folder("--model", "mini", "--epochs", str(RECIPES["mini"]["epochs"])) == plain
    assert folder("--model", "xlmr-base") == os.path.join("out", "xnli-xlmr-base-w8a8-s0")
    paths = [folder("--model", name) for name in ("a/mine.pt", "b/mine.pt")]
    assert paths[0] != paths[1] and all("xnli-mine-w8a8-s0-" in path for path in paths)


def test_missing_teacher_on_resume(tmp_path, capsys):
    assert run(tmp_path, "--methods", "fp32", "ptq") == 0
    shutil.rmtree(tmp_path / "teachers")
    capsys.readouterr()
    assert run(tmp_path, "--methods", "fp32", "ptq", "--resume") == 2
    assert "is gone" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the GPU path is not run")
def test_ladder_on_cuda(tmp_path):
    options = ["--device", "cuda", "--methods", "fp32", "ptq", "ptq-static", "qat", "sdq"]
    assert run(tmp_path, *options, "--save-every", "2") == 0
    student, _ = load_student(str(tmp_path / "run" / "student.pt"))
    assert all(p.isfinite().all() for p in student.parameters())


def test_resume_refuses_other_options(tmp_path, capsys):
    assert run(tmp_path, "--steps", "2", "--methods", "fp32") == 0
    assert run(tmp_path, "--steps", "3", "--methods", "fp32", "--resume") == 2
    assert "holds a run with --steps 2, not 3: resume with the same" in capsys.readouterr().err
    assert run(tmp_path, "--resume", out="never") == 2
    assert "no run to resume" in capsys.readouterr().err
    assert run(tmp_path, "--steps", "2", "--methods", "fp32", "--resume") == 0  # nothing left to do


def test_nan_stops_with_the_last_state_kept(tmp_path, capsys, monkeypatch):
    real = loop.train_step

    def breaks(student, *rest):
        breaks.step += 1
        if breaks.step == 5:
            with torch.no_grad():
                student.head.dense.weight[0] = float("inf")
        return real(student, *rest)

    breaks.step = 0
    monkeypatch.setattr(loop, "train_step", breaks)
    assert run(tmp_path, "--save-every", "2") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "loss is not a finite number after 4 steps" in error
    assert "lower --lr" in error and "is kept in" in error
    state = read_checkpoint(str(tmp_path / "run" / "state.pt"), "sdq-state-1")
    assert state["state"]["step"] == 4
    assert all(t.isfinite().all() for t in state["tensors"].values())
    assert not os.path.exists(tmp_path / "run" / "results.json")
    monkeypatch.setattr(loop, "train_step", real)  # the advice works: go on with a lower rate
    assert run(tmp_path, "--save-every", "2", "--lr", "1e-5", "--resume") == 0
    assert "goes on after step 4" in capsys.readouterr().out
    assert results(tmp_path)["config"]["lr"] == 1e-5


def test_state_with_nan_is_not_saved_over_a_good_one(tmp_path, capsys):
    """A rate this high breaks the weights in one update, after a loss that was still finite."""
    options = ["--warmup", "0", "--clip", "1e9", "--weight-decay", "0", "--save-every", "1"]
    assert run(tmp_path, *options, "--lr", "1e38") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is not a finite number after" in error
    assert not os.path.exists(tmp_path / "run" / "state.pt")


def test_step_refuses_nan_before_it_updates(tiny_config):
    from data.batches import Batch

    model = build_model(tiny_config)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    optimizers = loop.make_optimizers(model, 0.01)
    with torch.no_grad():
        model.head.out_proj.bias[0] = float("nan")
    batch = Batch(torch.tensor([[0, 5, 2]]), None, torch.tensor([1]), 3)
    with pytest.raises(FloatingPointError, match="loss"):
        loop.train_step(model, None, batch, optimizers, parse_args(SCRATCH)[0])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) or name == "head.out_proj.bias"


# ----------------------------------------------------------------------------------- optimization
def test_clip_gradients_counts_sparse_ones():
    table = torch.nn.Embedding(10, 4, sparse=True)
    linear = torch.nn.Linear(4, 2)
    model = torch.nn.ModuleList([table, linear])

    def loss():
        return 50 * linear(table(torch.tensor([1, 1, 3]))).square().sum()

    loss().backward()
    dense = [p.grad.to_dense() if p.grad.is_sparse else p.grad.clone() for p in model.parameters()]
    expected = torch.cat([g.flatten() for g in dense]).norm()
    norm = loop.clip_gradients(model, 0.5)
    torch.testing.assert_close(norm, expected)
    after = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in model.parameters()]
    for a, b in zip(after, dense, strict=True):
        torch.testing.assert_close(a, b * 0.5 / expected)


def test_learning_rate():
    rates = [loop.learning_rate(step, 100, 1.0, 0.1) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and max(rates) == 1.0
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False)) and 0 < rates[99] < 0.02
    assert loop.learning_rate(0, 1, 1.0, 0.0) == 1.0


# --------------------------------------------------------------------------------------- refusals
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


def test_default_model_is_what_is_there(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "WEIGHTS_DIR", str(tmp_path))
    small = "--max-train 30 --max-eval 6 --steps 1 --languages de --device cpu --out".split()
    assert train.main([*small, str(tmp_path / "run")]) == 0
    output = capsys.readouterr().out
    assert output.startswith("model mini: built in") and "convert.py xlmr-base" in output
    assert results(tmp_path)["model"] == "mini"
    (tmp_path / "xlmr-base.pt").write_bytes(b"")  # as if converted: it is taken, and found damaged
    assert train.main([*small, str(tmp_path / "other")]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("model xlmr-base.") and "--model mini" in captured.out
    assert "xlmr-base.pt is damaged" in captured.err or "xlmr-base.pt holds" in captured.err


def test_mini_reads_real_data_when_it_is_named(tmp_path, capsys):
    options = "--model mini --steps 1 --languages de --methods fp32 --device cpu".split()
    assert train.main([*options, "--data-dir", SAMPLE, "--out", str(tmp_path / "run")]) == 0
    assert results(tmp_path)["methods"]["fp32"]["languages"]["de"]["total"] == 3
    assert "generating" not in capsys.readouterr().out


@pytest.mark.parametrize("bits", ["8", "32"])
def test_eval_tests_a_packed_student(bits, tmp_path, capsys):
    """The same figures as in the report of the run that made it."""
    assert run(tmp_path, "--bits", bits, "--methods", "fp32", "sdq") == 0
    capsys.readouterr()
    packed = str(tmp_path / "run" / "student.pt")
    options = ["--eval", packed, "--data-dir", SAMPLE, "--languages", "de", "--device", "cpu"]
    assert train.main([*options, "--max-length", "32"]) == 0
    row = results(tmp_path)["methods"]["sdq"]
    assert ("student" in row) == (bits == "8")  # 32: nothing to multiply in integers
    output = capsys.readouterr().out
    accuracies = [row["languages"][x]["accuracy"] for x in ("en", "de")]
    cells = [cell.strip() for cell in output.splitlines()[-3].split("|")]
    assert cells[1] == f"sdq W{bits}A8" and cells[2] == f"{accuracies[0]:.2f}"
    assert cells[-2] == f"{accuracies[1]:.1f}"
    assert ("integers" in output) == (bits == "8")


def test_eval_refuses_other_files(tmp_path, capsys):
    assert run(tmp_path, "--steps", "1", "--methods", "fp32") == 0
    (teacher,) = (tmp_path / "teachers").iterdir()
    capsys.readouterr()
    _, error = answer(capsys, "--eval", str(tmp_path / "nowhere.pt"))
    assert "no checkpoint at" in error
    _, error = answer(capsys, "--eval", str(teacher))
    assert "is not a checkpoint of this project (sdq-student-1)" in error


def test_report_is_of_the_integer_model(tmp_path, monkeypatch):
    """A model that answers at random in integers must show in the row, not in the student's part."""

    def broken(student, config, device):
        model = convert_students(student, config, device)
        model.head.out_proj.bias.data += torch.tensor([1e3, 0.0, 0.0])
        return model

    convert_students = train.convert
    monkeypatch.setattr(train, "convert", broken)
    assert run(tmp_path, "--methods", "fp32", "ptq", "--epochs", "3") == 0
    found = results(tmp_path)["methods"]
    assert found["ptq"]["languages"]["en"]["correct"] == 1  # a third of three
    assert found["ptq"]["student"]["languages"] == found["fp32"]["languages"]


def test_analyze_adds_errors_of_each_layer(tmp_path, capsys):
    assert run(tmp_path, "--analyze", "--steps", "1", "--bits", "2") == 0
    assert "error of context" in capsys.readouterr().out
    found = results(tmp_path)["methods"]
    assert "errors" not in found["fp32"]
    for name in ("ptq", "qat", "sdq"):
        assert found[name]["errors"]["local"]["query"][0]["relative"] > 0


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


def test_every_option_has_help_and_a_default():
    text = build_parser().format_help()
    from dataclasses import fields

    from options import TrainConfig

    for field in fields(TrainConfig):
        assert "--" + field.name.replace("_", "-") in text
        assert field.metadata["text"]


def test_loaded_teacher_is_a_plain_checkpoint(tmp_path):
    assert run(tmp_path, "--steps", "1", "--methods", "fp32") == 0
    (name,) = os.listdir(tmp_path / "teachers")
    assert load_checkpoint(str(tmp_path / "teachers" / name)).config.num_labels == 3

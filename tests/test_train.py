"""train.py: the whole ladder from the command line, and resuming. What it refuses: test_refusals.py."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import GOLDEN, ROOT, SAMPLE, SCRATCH, TOKENIZER, results, run

import convert
import loop
import train
from checkpoint import load_checkpoint, read_checkpoint
from model import build_model
from options import RECIPES, build_parser, default_out, fill_in, parse_args
from packed import load_student


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
            record["task"] + record["logits"] + record["context"], rel=1e-4
        )


def test_it_learns(tmp_path):
    """The sample's negation is easy to see: the teacher must find it, the student must keep it."""
    common = ["--epochs", "12", "--lr", "3e-3", "--methods", "fp32", "sdq"]
    assert run(tmp_path, *common) == 0
    with open(tmp_path / "run" / "log.jsonl") as file:
        records = [json.loads(line) for line in file]
    losses = [r["loss"] for r in records if r["method"] == "fp32" and "loss" in r]
    assert sum(losses[-6:]) < 0.7 * sum(losses[:6])
    student = [r["task"] for r in records if r["method"] == "sdq" and "loss" in r]
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
    students = [read_checkpoint(str(tmp_path / x / "student.pt"), "sdq-student-3") for x in "ab"]
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

    def killed(student, teacher, batch, optimizers, config, parts, *stage):
        nonlocal count
        count += (method == "sdq") == bool(parts)  # the fp32 training comes before all others
        if count > 7:
            raise Killed
        return real(student, teacher, batch, optimizers, config, parts, *stage)

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
        read_checkpoint(str(tmp_path / x / "run" / "student.pt"), "sdq-student-3")
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


def test_finished_rows_are_not_analyzed_later(tmp_path, capsys):
    options = ["--steps", "2", "--methods", "fp32", "ptq"]
    assert run(tmp_path, *options) == 0
    before = (tmp_path / "run" / "config.json").read_text()
    assert run(tmp_path, *options, "--resume", "--analyze") == 2
    assert "rows that were not analyzed" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.json").read_text() == before


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


# -------------------------------------------------------------------------------- single options


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
    printed = capsys.readouterr().out
    assert "--weights lsq keeps far more" in printed and "error of context" in printed
    found = results(tmp_path)["methods"]
    assert "errors" not in found["fp32"]
    for name in ("ptq", "qat", "sdq"):
        assert found[name]["errors"]["local"]["query"][0]["relative"] > 0


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

"""kit/run.py: the folder of a run and what continues a stopped one; the loop, the steps and the teachers of train.py."""

import copy
import json
import os
import re

import pytest
import torch
from conftest import SCRATCH, log_of, results, run
from torch import nn

import kit.run
import train
from checkpoint import read_model
from config import SAME_RUN, parse_args
from kit.common import UserError
from kit.files import read_tensors, write_tensors
from kit.run import STATE, STATE_FORMAT, STUDENT, Run, Training

DIGESTS = {"the data (train)": "1", "the data (dev)": "2"}


def small_run(tmp_path, *options, resume=False, contents=DIGESTS):
    """A Run in tmp_path/run that has started."""
    made = Run(str(tmp_path / "run"), parse_args([*SCRATCH, *options])[0], torch.device("cpu"), resume, SAME_RUN)
    made.start(contents, {})
    return made


def training_of(made, name="qat"):
    """A Training of a model with a word table, after a step with each of its optimizers."""
    model = nn.Sequential(nn.Embedding(8, 4, sparse=True), nn.Linear(4, 3))
    optimizers = [torch.optim.AdamW(model[1].parameters(), fused=True), torch.optim.SparseAdam(model[0].parameters())]
    model(torch.tensor([1, 5])).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    return Training(made, name, model, optimizers, steps=10)


# --------------------------------------------------------------------------------------- the folder
def test_a_folder_holds_one_run(tmp_path):
    """The same run may begin again or continue; with other data or options it would be reported as the old one."""
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="no run to resume in .*: drop --resume"):
        small_run(tmp_path, resume=True)
    first = small_run(tmp_path)
    with pytest.raises(UserError, match="another run is writing to .* now: wait for it"):
        small_run(tmp_path)
    del first
    for resume, advice in ((False, "choose another --out"), (True, "resume with the same options")):
        with pytest.raises(UserError, match=rf"holds a run with --lr 0.0005, not 0.1: {advice}, or delete it"):
            small_run(tmp_path, "--lr", "0.1", resume=resume)
    for name in ("log.jsonl", "report.md", STUDENT, STATE, "teacher.part"):
        (folder / name).write_text("")
    small_run(tmp_path, "--threads", "1", "--analyze", "--device", "cpu", resume=True)
    assert not (folder / "teacher.part").exists() and (folder / STATE).exists()
    with pytest.raises(UserError, match=r"--resume: the data \(dev\) changed since .*: restore it, or choose another"):
        small_run(tmp_path, resume=True, contents=DIGESTS | {"the data (dev)": "3"})
    with pytest.raises(UserError, match="holds a stopped run: continue it with --resume"):
        small_run(tmp_path)
    (folder / STATE).unlink()
    small_run(tmp_path, contents={})  # from the start: other data are fine
    assert os.listdir(folder) == ["config.json"]
    for text in ("{", '{"hidden_size": 768}'):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match="is not of a run of train.py"):
            small_run(tmp_path)


def test_a_mistake_touches_no_earlier_run(tmp_path, capsys):
    options = "--steps 1 --methods fp32 ptq".split()
    assert run(tmp_path, *options) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    for wrong in ("--data-dir nowhere", "--model nowhere.safetensors", "--max-train 90", "--max-train 90 --resume"):
        assert run(tmp_path, *options, *wrong.split()) == 2
        assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    assert run(tmp_path, "--data-dir", "nowhere", out="new") == 2 and not (tmp_path / "new").exists()
    assert run(tmp_path, out="run/log.jsonl/run") == 2
    assert "cannot write to" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "run" / STATE).write_bytes(b"of a run that was killed right after its last row")
    assert run(tmp_path, *options, "--resume") == 0 and not (tmp_path / "run" / STATE).exists()


def test_damaged_files(tmp_path):
    """Results are named. The last line of a log may be cut off; what follows the saved step is removed."""
    made = small_run(tmp_path)
    records = [{"method": name, "step": i} for name in ("fp32", "sdq") for i in (1, 2, 3)]
    for record in records:
        made.log(record)
    with open(made.path("log.jsonl"), "ab") as file:
        file.write(b'{"method": "sdq", "st')
    made.trim_log("sdq", 2)
    assert log_of(tmp_path) == records[:-1]
    made.finish_row("fp32", {"score": 50.0})
    del made
    path = tmp_path / "run" / "results.json"
    for text in (path.read_text().replace("50.0", "60.0"), '{"methods": {"fp32"'):
        path.write_text(text)
        with pytest.raises(UserError, match="results.json is damaged: delete it, and --resume makes its rows again"):
            small_run(tmp_path, resume=True)


# --------------------------------------------------------------------------------------- a training
def test_the_first_of_the_best_evaluations_is_kept(tmp_path):
    """A correlation can be negative."""
    training = training_of(small_run(tmp_path))
    curve = [[1, -20.0], [2, 30.0], [3, 20.0], [4, 30.0]]
    for (step, score), best in zip(curve, (1, 2, 2, 2), strict=True):
        training.model[1].bias.data.fill_(step)
        training.keep_best(step, score, "")
        assert training.best["step"] == best
    training.finish()
    assert (training.model[1].bias == 2).all()
    training.run.finish_row("qat", {})
    assert results(tmp_path)["methods"] == {"qat": {"dev_curve": curve}}


def test_a_row_keeps_the_state_of_another_training(tmp_path):
    training = training_of(made := small_run(tmp_path))
    training.due = True
    training.save(1)
    made.finish_row("fp32", {})
    assert (tmp_path / "run" / STATE).exists()
    made.finish_row("qat", {})
    assert not (tmp_path / "run" / STATE).exists()


def test_state_holds_every_bit(tmp_path, capsys):
    made, path = small_run(tmp_path), str(tmp_path / "run" / STATE)
    training = training_of(made)
    training.keep_best(6, 50.0, "")
    training.save(7)
    saved = [copy.deepcopy(each.state_dict()) for each in (training.model, *training.optimizers)]
    numbers = torch.rand(3)
    training.model[1].bias.data[1], training.due = float("nan"), True
    with pytest.raises(UserError, match="a weight is not finite after 8 steps.*last good state is kept"):
        training.save(8)
    made.resume = True
    assert training_of(made, "sdq").step == 0  # another training
    again = training_of(made)
    assert torch.equal(torch.rand(3), numbers)
    assert (again.step, again.best["score"], len(again.best_tensors)) == (7, 50.0, 3)
    found = [each.state_dict() for each in (again.model, *again.optimizers)]
    torch.testing.assert_close(found, saved, rtol=0, atol=0)
    tensors, settings = read_tensors(path, STATE_FORMAT, "")
    write_tensors(path, tensors, STATE_FORMAT, settings | {"processes": 2})
    assert training_of(made).step == 7 and "2 processes before, now 1: other noise" in capsys.readouterr().out
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    with pytest.raises(UserError, match="damaged.*: delete it, and --resume trains qat again"):
        training_of(made)


@pytest.mark.parametrize("seconds, every, saved", [(1e9, 3, [3, 5]), (-1, 9, [1, 2, 3, 4, 5]), (1e9, 9, [5])])
def test_a_state_follows_time_steps_and_evaluations(seconds, every, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(kit.run, "SAVE_EVERY", every)
    monkeypatch.setattr(kit.run, "SAVE_SECONDS", seconds)
    training, found = training_of(small_run(tmp_path)), []
    monkeypatch.setattr(kit.run, "write_tensors", lambda *arguments: found.append(arguments[-1]["step"]))
    for step in range(1, 6):
        training.due = step == 5
        training.save(step)
    assert found == saved


# --------------------------------------------------------------------------------------- the loop
def test_steps_of_a_training():
    """An epoch of 38 rows in batches of 8 has 5 steps."""
    for options, steps in (("", (15, 10)), ("--student-steps 4", (15, 4)), ("--steps 4", (4, 4))):
        config = parse_args([*SCRATCH, *"--batch-size 8 --epochs 3 --student-epochs 2".split(), *options.split()])[0]
        assert tuple(train.total_steps(config, 38, student) for student in (False, True)) == steps


RESUMED = {  # stops are after these steps; states after every second one and after evaluations
    "sdq": ("--dropout 0.1 --student-dropout 0.1 --eval-every 3 --methods fp32 qat sdq", "fp32 1, fp32 4, sdq 5"),
    "layer by layer": ("--distill layerwise --student-dropout 0.1 --methods sdq", "sdq 3, sdq 4"),
    "repaired": ("--bits 3 --eval-every 3 --methods ptq+gptq sdq+gptq+norm", "sdq+gptq+norm 3, sdq+gptq+norm 5"),
    "product quantization": ("--weights pq --student-epochs 2 --methods sdq", "sdq 5, sdq 7, sdq 12"),
}  # its stages have 4 steps


@pytest.mark.parametrize("kind", RESUMED)
def test_resume_is_bit_exact(kind, tmp_path, monkeypatch, capsys):
    """A run that is stopped three times: before the first state, at the border of a stage, when all steps are done."""
    options, stops = RESUMED[kind][0].split(), RESUMED[kind][1].split(", ")
    evaluate, save, logits = train.evaluate_languages, Training.save, []

    def evaluate_and_keep(method, model, *rest):
        logits.append(model(torch.arange(40).view(4, 10))[0].detach())
        return evaluate(method, model, *rest)

    def save_and_stop(self, step):
        save(self, step)
        if f"{self.name} {step}" in stops:
            stops.remove(f"{self.name} {step}")
            raise KeyboardInterrupt

    monkeypatch.setattr(kit.run, "SAVE_EVERY", 2)
    monkeypatch.setattr(train, "evaluate_languages", evaluate_and_keep)
    assert run(tmp_path, *options, out="whole/run") == 0
    monkeypatch.setattr(Training, "save", save_and_stop)
    assert run(tmp_path, *options, out="cut/run") == 130
    while stops:
        assert run(tmp_path, *options, "--resume", out="cut/run") == 130
    assert run(tmp_path, *options, "--resume", out="cut/run") == 0
    assert re.search(r"^sdq\S*: continues after step 4$", capsys.readouterr().out, flags=re.M)
    assert all(map(torch.equal, logits[: len(logits) // 2], logits[len(logits) // 2 :]))
    whole, cut = ([r | {"ms": 0} for r in log_of(tmp_path, f"{name}/run")] for name in ("whole", "cut"))
    assert whole == cut
    whole, cut = (results(tmp_path, f"{name}/run")["methods"] for name in ("whole", "cut"))
    assert [row | {"train_seconds": 0} for row in whole.values()] == [r | {"train_seconds": 0} for r in cut.values()]
    assert (tmp_path / "whole/run" / STUDENT).read_bytes() == (tmp_path / "cut/run" / STUDENT).read_bytes()


def test_nan_stops_with_the_last_state_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kit.run, "SAVE_EVERY", 2)
    real = Training.check_finite

    def breaks(self, terms, norm):
        return real(self, terms, norm if self.step < 4 else norm * float("nan"))

    with monkeypatch.context() as patch:
        patch.setattr(Training, "check_finite", breaks)
        assert run(tmp_path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "norm is not finite after 4 steps" in error
    assert "lower --lr" in error and f"--resume --out {tmp_path / 'run'}" in error
    assert read_tensors(str(tmp_path / "run" / STATE), STATE_FORMAT, "")[1]["step"] == 4
    assert run(tmp_path, "--lr", "1e-5", "--resume") == 0  # what the message says: resume with a lower rate
    assert "continues after step 4" in capsys.readouterr().out
    assert results(tmp_path)["config"]["lr"] == 1e-5


def test_results_say_what_was_run(tmp_path):
    assert run(tmp_path, "--methods", "fp32", "--epochs", "2") == 0
    found, recorded = results(tmp_path), json.loads((tmp_path / "run" / "config.json").read_text())
    assert set(recorded.pop("contents")) > {"the model and its classes", "the data (train)", "the data (test, zh)"}
    assert found["config"] == recorded and found["test_examples"] == dict.fromkeys(("de", "en", "zh"), 3)
    assert found["steps"] == {"teacher": 12, "students": 12} and found["languages"] == ["de", "en", "zh"]
    assert (found["model"], found["train_examples"]) == ("scratch-1x32", 180)
    assert set(found["environment"]) == {"hardware", "threads", "torch"}
    assert {"size_bytes", "train_seconds", "score", "zero_shot_mean", "dev_curve"} < set(found["methods"]["fp32"])


# ----------------------------------------------------------------------------------------- teachers
def test_teacher_is_reused_and_students_reproduce(tmp_path, capsys):
    assert run(tmp_path, out="a") == run(tmp_path, out="b") == 0
    output = capsys.readouterr().out
    assert output.count("fp32: step") == output.count("fp32: teacher from") == 1
    assert (tmp_path / "a" / STUDENT).read_bytes() == (tmp_path / "b" / STUDENT).read_bytes()
    (path,) = (tmp_path / "teachers").iterdir()
    assert read_model(str(path)).config.num_labels == 3  # a plain checkpoint
    path.write_bytes(b"damaged")
    assert run(tmp_path, out="c") == 2 and path.name in capsys.readouterr().err
    path.unlink()  # students of another teacher would stand beside its rows
    assert run(tmp_path, "--resume", out="a") == 2 and "is gone" in capsys.readouterr().err


def test_teacher_depends_on_what_made_it(tmp_path):
    for i, options in enumerate(([], ["--lr", "1e-3"], ["--seed", "1"], ["--bits", "4"])):
        assert run(tmp_path, "--methods", "fp32", "ptq", "--steps", "2", *options, out=f"r{i}") == 0
    assert len(os.listdir(tmp_path / "teachers")) == 3  # --bits changes no teacher

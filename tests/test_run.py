"""kit/run.py: the folder of a run and what continues a stopped one; the loop, the steps and the teachers of train.py."""

import copy
import json
import os
import shutil
import statistics
from dataclasses import dataclass

import pytest
import torch
from conftest import SCRATCH, log_of, results, run
from torch import nn

import kit.run
import train
from checkpoint import read_model
from config import parse_args
from kit.common import UserError
from kit.files import read_tensors
from kit.run import STATE, STATE_FORMAT, STUDENT, Run, Training

DIGESTS = {"the data (train)": "1", "the data (dev)": "2"}


@dataclass
class Options:
    task: str = "xnli"
    lr: float = 0.1
    seed: int = 0
    threads: int | None = None
    methods: tuple[str, ...] = ("fp32", "qat")  # a list in config.json


def small_run(tmp_path, resume=False, contents=DIGESTS, **options):
    """A Run in tmp_path/run that has started."""
    made = Run(str(tmp_path / "run"), Options(**options), torch.device("cpu"), resume, may_differ=("threads",))
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
@pytest.mark.parametrize("resume, advice", [(False, "choose another --out"), (True, "resume with the same options")])
def test_other_options_are_another_run(resume, advice, tmp_path):
    small_run(tmp_path)
    small_run(tmp_path, resume, threads=1)
    with pytest.raises(UserError, match=rf"holds a run with --lr 0.1, not 0.2: {advice}, or delete it"):
        small_run(tmp_path, resume, lr=0.2)


def test_a_folder_holds_one_run(tmp_path):
    """The same run may begin again or continue; with other data it would be reported as the old one."""
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="no run to resume in .*: drop --resume"):
        small_run(tmp_path, resume=True)
    small_run(tmp_path)
    for name in ("log.jsonl", "report.md", STUDENT, STATE):
        (folder / name).write_text("")
    small_run(tmp_path, resume=True)
    with pytest.raises(UserError, match=r"--resume: the data \(dev\) changed since .*: restore it, or choose another"):
        small_run(tmp_path, resume=True, contents=DIGESTS | {"the data (dev)": "3"})
    with pytest.raises(UserError, match="holds a stopped run: continue it with --resume"):
        small_run(tmp_path)
    (folder / STATE).unlink()
    assert len(os.listdir(folder)) == 4
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
    (tmp_path / "file").write_text("")
    assert run(tmp_path, out="file/run") == 2
    assert "cannot write to" in capsys.readouterr().err.splitlines()[-1]
    assert run(tmp_path, *options, "--resume") == 0  # nothing is left to do


# --------------------------------------------------------------------------------------- a training
def test_the_first_of_the_best_evaluations_is_kept(tmp_path, capsys):
    """A correlation can be negative."""
    made = small_run(tmp_path)
    training = training_of(made)
    kept = {}
    for step, score in enumerate((-20.0, 30.0, 20.0, 30.0), start=1):
        with torch.no_grad():
            training.model[1].bias.fill_(step)
        training.keep_best(step, score, f"pearson {score}")
        kept[step] = training.best["step"]
    training.finish()
    assert kept == {1: 1, 2: 2, 3: 2, 4: 2} and (training.model[1].bias == 2).all()
    assert "qat: step 1, dev pearson -20.0\n" in capsys.readouterr().out
    made.finish_row("qat", {})
    assert made.results["methods"]["qat"] == {"dev_curve": [[1, -20.0], [2, 30.0], [3, 20.0], [4, 30.0]]}


def test_state_holds_every_bit(tmp_path):
    made = small_run(tmp_path)
    training = training_of(made)
    training.keep_best(6, 50.0, "")
    training.save(7)
    saved = [copy.deepcopy(each.state_dict()) for each in (training.model, *training.optimizers)]
    numbers = torch.rand(3)
    with torch.no_grad():
        training.model[1].bias[1] = float("nan")
    training.due = True
    with pytest.raises(UserError, match="a weight is not finite after 8 steps.*last good state is kept"):
        training.save(8)
    made.resume = True
    assert training_of(made, "sdq").step == 0  # another training
    again = training_of(made)
    torch.testing.assert_close(torch.rand(3), numbers, rtol=0, atol=0)
    assert (again.step, again.best["score"], len(again.best_tensors)) == (7, 50.0, 3)
    found = [each.state_dict() for each in (again.model, *again.optimizers)]
    torch.testing.assert_close(found, saved, rtol=0, atol=0)
    path = tmp_path / "run" / STATE
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="damaged: delete it, and --resume trains qat again"):
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
def test_steps_and_evaluations():
    """An epoch of 40 rows in batches of 8 has 5 steps."""

    def plan(options, method="fp32"):
        made = train.Plan(parse_args([*SCRATCH, "--batch-size", "8", *options.split()])[0], None, None, 38, method)
        return made.steps, [step + 1 for step in range(made.steps) if made.evaluates(step)]

    assert plan("--epochs 3 --student-epochs 2") == (15, [5, 10, 15])
    assert plan("--epochs 3 --student-epochs 2", "sdq") == (10, [5, 10])
    assert plan("--epochs 3 --steps 4") == plan("--epochs 3 --steps 4", "qat") == (4, [4])
    assert plan("--epochs 3 --student-steps 4")[0] == 15 and plan("--epochs 3 --student-steps 4", "qat")[0] == 4
    assert plan("--epochs 2 --eval-every 3 --steps 9") == (9, [3, 5, 6, 9])


class Killed(Exception):
    pass


def stop(monkeypatch, method, step):
    """Stop a training after the log of a step, before its state is saved; 0: when all its steps are done."""
    log, finish = Training.log, Training.finish

    def stopping_log(self, done, *rest):
        log(self, done, *rest)
        if (self.name, done) == (method, step):
            raise Killed

    def stopping_finish(self):
        if (self.name, 0) == (method, step):
            raise Killed
        return finish(self)

    monkeypatch.setattr(Training, "log", stopping_log)
    monkeypatch.setattr(Training, "finish", stopping_finish)


RESUMED = {
    "sdq": ("--dropout 0.1 --student-dropout 0.1 --eval-every 4 --methods fp32 qat sdq", "fp32 1, fp32 5, sdq 6"),
    "layer by layer": ("--distill layerwise --student-dropout 0.1 --methods sdq", "sdq 3, sdq 6"),
    "product quantization": ("--weights pq --student-epochs 2 --methods sdq", "sdq 5, sdq 6, sdq 0"),
}  # stages of product quantization have 4 steps


@pytest.mark.parametrize("kind", RESUMED)
def test_resume_is_bit_exact(kind, tmp_path, monkeypatch, capsys):
    """A run that is stopped several times, also before the first state, and at the border of a stage."""
    options, stops = RESUMED[kind][0].split(), [each.split() for each in RESUMED[kind][1].split(", ")]
    monkeypatch.setattr(kit.run, "SAVE_EVERY", 2)
    real, logits = train.evaluate_languages, []

    def evaluated(method, model, *rest):
        with torch.no_grad():
            logits.append(model(torch.arange(40).view(4, 10))[0])
        return real(method, model, *rest)

    monkeypatch.setattr(train, "evaluate_languages", evaluated)
    assert run(tmp_path, *options, out="whole/run") == 0
    capsys.readouterr()
    for i, (method, step) in enumerate(stops):
        with monkeypatch.context() as patch:
            stop(patch, method, int(step))
            with pytest.raises(Killed):
                run(tmp_path, *options, *["--resume"][:i], out="cut/run")
    assert run(tmp_path, *options, "--resume", out="cut/run") == 0
    assert f"{method}: continues after step" in capsys.readouterr().out
    assert len(logits) % 2 == 0 and all(map(torch.equal, logits[: len(logits) // 2], logits[len(logits) // 2 :]))
    whole, cut = ([r | {"ms": 0} for r in log_of(tmp_path, f"{name}/run")] for name in ("whole", "cut"))
    assert whole == cut
    whole, cut = (results(tmp_path, f"{name}/run")["methods"] for name in ("whole", "cut"))
    for row in (*whole.values(), *cut.values()):
        row.pop("train_seconds")
    assert whole == cut
    assert (tmp_path / "whole/run" / STUDENT).read_bytes() == (tmp_path / "cut/run" / STUDENT).read_bytes()
    assert sorted(os.listdir(tmp_path / "whole/run")) == sorted(os.listdir(tmp_path / "cut/run"))


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


def test_results_are_those_of_the_log(tmp_path):
    """results.json holds the options, the environment, and for each row all counts."""
    assert run(tmp_path, "--methods", "fp32", "qat", "--epochs", "2") == 0
    found, recorded = results(tmp_path), json.loads((tmp_path / "run" / "config.json").read_text())
    assert set(recorded.pop("contents")) > {"the data (train)", "the data (test, zh)"}
    assert found["config"] == recorded and found["test_examples"] == dict.fromkeys(("de", "en", "zh"), 3)
    assert found["steps"] == {"teacher": 12, "students": 12}
    assert (found["model"], found["train_examples"]) == ("scratch-1x32", 180)
    assert found["languages"] == ["de", "en", "zh"]
    assert set(found["environment"]) == {"hardware", "threads", "torch"}
    for name, each in found["methods"].items():
        records = [r for r in log_of(tmp_path) if r["method"] == name and "dev_score" in r]
        assert each["dev_curve"] == [[r["step"], r["dev_score"]] for r in records] and len(records) == 2
        scores = {k: v["score"] for k, v in each["languages"].items()}
        assert each["score"] == scores.pop("en") and "student" not in each
        assert each["zero_shot_mean"] == pytest.approx(statistics.fmean(scores.values()))


# ----------------------------------------------------------------------------------------- teachers
def test_teacher_is_reused_and_students_reproduce(tmp_path, capsys, monkeypatch):
    assert run(tmp_path, out="a") == 0
    assert "fp32: step" in capsys.readouterr().out
    assert run(tmp_path, out="b") == 0
    output = capsys.readouterr().out
    assert "fp32: step" not in output and "teacher from" in output and "NOTE: model.py" not in output
    assert (tmp_path / "a" / STUDENT).read_bytes() == (tmp_path / "b" / STUDENT).read_bytes()
    (path,) = (tmp_path / "teachers").iterdir()
    assert read_model(str(path)).config.num_labels == 3  # a plain checkpoint
    code = train.code_digests().replace("model.py=", "model.py=0")
    monkeypatch.setattr(train, "code_digests", lambda: code)
    assert run(tmp_path, "--methods", "fp32", out="c") == 0
    assert "NOTE: model.py changed since this teacher was trained: to train it again, delete" in capsys.readouterr().out
    path.write_bytes(b"damaged")
    assert run(tmp_path, "--methods", "fp32", out="d") == 2
    assert path.name in capsys.readouterr().err
    shutil.rmtree(tmp_path / "teachers")
    assert run(tmp_path, "--resume", out="a") == 2  # students of another teacher would stand beside its rows
    assert "is gone" in capsys.readouterr().err


def test_teacher_depends_on_what_made_it(tmp_path):
    for i, options in enumerate(([], ["--lr", "1e-3"], ["--seed", "1"], ["--bits", "4"])):
        assert run(tmp_path, "--methods", "fp32", "ptq", "--steps", "2", *options, out=f"r{i}") == 0
    assert len(os.listdir(tmp_path / "teachers")) == 3  # --bits changes no teacher

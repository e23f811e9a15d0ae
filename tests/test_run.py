"""run.py: the folder of a run, what continues a stopped one, teachers, and the report of one run."""

import json
import os
import shutil
import statistics
from dataclasses import replace

import pytest
import torch
from conftest import SCRATCH, SMALL, answer, log_of, results, run
from run import STATE_FORMAT, Data, Run, Training, total_steps

import train
from checkpoint import load_checkpoint, read_checkpoint
from config import parse_args, resolve
from data.batches import Dataset
from data.tasks import TASKS, find_task
from kit.common import UserError
from kit.files import write_json
from kit.report import caveats, compared_score, recovered, recovered_percent, report, report_table, summarize_languages
from model import build_model


def packed(tmp_path, out):
    return read_checkpoint(str(tmp_path / out / "student.pt"), "sdq-student-6")["packed"]


def steps_of(tmp_path, out="run"):
    """The log without the times of the steps."""
    return [{k: v for k, v in r.items() if k != "ms"} for r in log_of(tmp_path, out)]


def small_data(rows=40):
    """Rows of 5 tokens for tiny_config."""
    ids = torch.randint(4, 440, (rows, 5), dtype=torch.int32).flatten().numpy()
    starts = torch.arange(0, 5 * rows + 1, 5).numpy()
    dataset = Dataset(ids, starts, torch.randint(0, 3, (rows,)).numpy())
    return Data(dataset, dataset, {"en": dataset})


def small_run(tmp_path, *options, resume=False):
    """A Run in tmp_path/run whose folder is there."""
    config = parse_args([*SCRATCH, "--device", "cpu", *options])[0]
    made = Run(str(tmp_path / "run"), config, torch.device("cpu"), resume)
    os.makedirs(made.out, exist_ok=True)
    return made


# --------------------------------------------------------------------------------------- the folder
def test_a_folder_holds_one_run(tmp_path, capsys):
    assert run(tmp_path, "--methods", "fp32") == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    capsys.readouterr()
    assert run(tmp_path, "--methods", "fp32", "--max-train", "90") == 2
    assert "holds a run with --max-train None, not 90: choose another" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    assert run(tmp_path, "--methods", "fp32") == 0  # the very same again
    (tmp_path / "run" / "state.pt").write_bytes(b"")
    assert run(tmp_path, "--methods", "fp32") == 2
    assert "holds a stopped run: continue it with --resume" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"hidden_size": 768}')
    assert run(tmp_path, out="other") == 2
    assert "is not of a run of train.py" in capsys.readouterr().err


def test_a_resumed_run_reads_the_same_data(tmp_path):
    """With other rows, or one other label, it would go on and be reported as the old ones."""
    data = {name: small_data().train for name in ("train", "dev", "test, en", "test, de")}

    def begin(resume=True, labels=("no", "yes"), **changed):
        train, dev, *tests = (data | changed).values()
        small_run(tmp_path, resume=resume).start(
            "m", Data(train, dev, dict(zip(("en", "de"), tests, strict=True))), ["path", labels]
        )

    begin(resume=False)
    begin()
    with pytest.raises(UserError, match="--resume: the model and its classes changed since .* choose another --out"):
        begin(labels=("no", "maybe"))
    for name, dataset in data.items():
        labels = dataset.labels.copy()
        labels[-1] += 1
        with pytest.raises(UserError, match=rf"--resume: the data \({name}\) changed since"):
            begin(**{name: replace(dataset, labels=labels)})
    begin(resume=False, dev=small_data().dev)  # from the start: other data are fine


def test_options_that_may_differ_in_one_folder(tmp_path):
    """Those that do not change the result; the rates too, if a run is resumed."""
    made = small_run(tmp_path)
    made.start("m", small_data(), [])
    for options in (["--threads", "1"], ["--analyze"], ["--check-student"]):
        small_run(tmp_path, *options)
    small_run(tmp_path, "--lr", "1e-9", "--student-lr", "1e-9", resume=True)
    for options in (["--lr", "1e-9"], ["--seed", "1"], ["--distill", "logits"]):
        with pytest.raises(UserError, match=f"holds a run with {options[0]} "):
            small_run(tmp_path, *options)
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not of a run of train.py"):
        small_run(tmp_path)


def test_a_mistake_touches_no_earlier_run(capsys, tmp_path):
    assert run(tmp_path, "--steps", "1", "--methods", "fp32", "ptq") == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    capsys.readouterr()
    assert run(tmp_path, "--data-dir", "nowhere") == 2
    assert run(tmp_path, "--model", "nowhere.pt") == 2
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    assert run(tmp_path, "--data-dir", "nowhere", out="new") == 2
    assert not (tmp_path / "new").exists()


def test_unwritable_out(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    _, error = answer(capsys, *SMALL, "--out", str(tmp_path / "file" / "run"))
    assert "cannot write to" in error and "choose another --out" in error
    (tmp_path / "teachers").write_text("")
    _, error = answer(capsys, *SMALL, "--out", str(tmp_path / "run"))
    assert "teachers: choose another --out" in error and not (tmp_path / "run").exists()


def test_finished_rows_are_not_analyzed_later(tmp_path, capsys):
    options = ["--steps", "2", "--methods", "fp32", "ptq"]
    assert run(tmp_path, *options) == 0
    before = (tmp_path / "run" / "config.json").read_text()
    assert run(tmp_path, *options, "--resume", "--analyze") == 2
    assert "rows that were not analyzed" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.json").read_text() == before


# ------------------------------------------------------------------------------------------ the log
def test_log_of_a_killed_run(tmp_path):
    """The last line may be cut off; what follows the saved step is removed."""
    made = small_run(tmp_path)
    assert made.read_log() == [] and made.dev_curve("fp32") == []
    records = [{"method": name, "step": i} for name in ("fp32", "sdq") for i in (1, 2, 3)]
    records[4]["dev_score"] = 50.0
    for record in records:
        made.log(record)
    with open(made.path("log.jsonl"), "a") as file:
        file.write('{"method": "sdq", "st')
    assert made.read_log() == records and made.dev_curve("sdq") == [[2, 50.0]]
    made.trim_log("sdq", 2)
    assert made.read_log() == records[:-1] == log_of(tmp_path)


# --------------------------------------------------------------------------------------- a training
def test_steps_of_a_training():
    config = parse_args([*SCRATCH, *"--epochs 3 --batch-size 8 --student-epochs 2".split()])[0]
    assert total_steps(config, 40, student=False) == 15 == total_steps(config, 33, student=False)
    assert total_steps(config, 40, student=True) == 10
    config = parse_args([*SCRATCH, *"--epochs 3 --batch-size 8 --steps 4".split()])[0]
    assert total_steps(config, 40, student=True) == total_steps(config, 40, student=False) == 4
    config = parse_args([*SCRATCH, *"--batch-size 8 --epochs 3 --student-steps 4".split()])[0]
    assert total_steps(config, 40, student=True) == 4
    assert total_steps(config, 40, student=False) == 15


def test_evaluations_follow_each_epoch_and_eval_every(tmp_path, tiny_config):
    made = small_run(tmp_path, *"--epochs 2 --batch-size 8 --eval-every 3 --steps 9".split())
    training = Training(made, "fp32", build_model(tiny_config), [], small_data().train)
    found = []
    for step, _ in training.steps():
        if training.should_evaluate():
            found.append(step + 1)
    assert found == [3, 5, 6, 9] and training.step == training.total_steps == 9


def test_batches_of_an_epoch_are_all_rows(tmp_path, tiny_config):
    made = small_run(tmp_path, *"--epochs 2 --batch-size 7".split())
    data = small_data()
    training = Training(made, "fp32", build_model(tiny_config), [], data.train)
    rows = torch.cat([each.ids for _, each in training.steps()]).tolist()
    expected = sorted(data.train.ids.reshape(-1, 5).tolist())
    assert sorted(rows[:40]) == sorted(rows[40:]) == expected and rows[:40] != rows[40:]


def test_scores_may_be_negative(tmp_path, tiny_config, capsys):
    """A correlation below 0 is a first best, too."""
    training = Training(small_run(tmp_path), "fp32", build_model(tiny_config), [], small_data()[0])
    assert training.best["score"] < -100
    training.select({"score": -20.0, "pearson": -20.0, "spearman": -20.0}, "pearson -20.00")
    assert training.best["score"] == -20.0 and len(training.best["tensors"]) > 10
    assert "fp32: step 1, dev pearson -20.00" in capsys.readouterr().out
    assert training.run.dev_curve("fp32") == [[1, -20.0]]


def test_finish_restores_the_best_parameters(tmp_path, tiny_config):
    model = build_model(tiny_config)
    training = Training(small_run(tmp_path), "fp32", model, [], small_data().train)
    kept = {}
    for step, score in enumerate((10.0, 30.0, 20.0, 30.0)):
        training.step = step
        with torch.no_grad():
            model.head.dense.weight.fill_(score + step)
        training.select({"score": score}, "")
        kept[step] = model.head.dense.weight[0, 0].item()
    training.finish()
    assert training.best["step"] == 2  # the first of two equal ones
    assert (model.head.dense.weight == kept[1]).all()


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", ["fp32", "sdq"])
def test_resume_is_bit_exact(method, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("run.SAVE_EVERY", 2)
    options = "--eval-every 3 --dropout 0.1 --student-dropout 0.1 --epochs 2".split()
    options += ["--methods", "fp32", "qat", "sdq"]
    assert run(tmp_path, *options, out="whole/run") == 0
    real = train.sdq_loss
    count = 0

    def killed(student, teacher, *rest):
        nonlocal count
        # the fp32 training comes before all others
        count += (method == "sdq") == (teacher is not None)
        if count > 7:
            raise Killed
        return real(student, teacher, *rest)

    monkeypatch.setattr(train, "sdq_loss", killed)
    with pytest.raises(Killed):
        run(tmp_path, *options, out="cut/run")
    assert os.path.exists(tmp_path / "cut" / "run" / "state.pt")
    monkeypatch.setattr(train, "sdq_loss", real)
    assert run(tmp_path, *options, "--resume", out="cut/run") == 0
    assert f"{method}: continues after step 6" in capsys.readouterr().out
    whole, cut = results(tmp_path, "whole/run"), results(tmp_path, "cut/run")
    for name in whole["methods"]:
        assert whole["methods"][name]["languages"] == cut["methods"][name]["languages"]
        assert whole["methods"][name].get("dev_curve") == cut["methods"][name].get("dev_curve")
    assert steps_of(tmp_path, "whole/run") == steps_of(tmp_path, "cut/run")
    a, b = (packed(tmp_path, f"{name}/run") for name in ("whole", "cut"))
    for name, entry in a.items():
        assert torch.equal(entry["codes"], b[name]["codes"])
        assert torch.equal(entry["scale"], b[name]["scale"])
    assert not os.path.exists(tmp_path / "cut" / "run" / "state.pt")


def test_resume_before_the_first_state(tmp_path, monkeypatch):
    """A run that was killed before a state was saved starts again, and logs each step once."""
    monkeypatch.setattr("run.SAVE_EVERY", 100)
    options = ["--methods", "fp32"]
    assert run(tmp_path, *options, out="whole/run") == 0
    real = train.sdq_loss

    def killed(*args):
        killed.count += 1
        if killed.count > 3:
            raise Killed
        return real(*args)

    killed.count = 0
    monkeypatch.setattr(train, "sdq_loss", killed)
    with pytest.raises(Killed):
        run(tmp_path, *options, out="cut/run")
    monkeypatch.setattr(train, "sdq_loss", real)
    with open(tmp_path / "cut" / "run" / "log.jsonl", "a") as file:
        file.write('{"method": "fp32", "st')  # killed in the middle of a line
    assert run(tmp_path, *options, "--resume", out="cut/run") == 0
    assert steps_of(tmp_path, "whole/run") == steps_of(tmp_path, "cut/run")


def test_resume_needs_the_same_options(tmp_path, capsys):
    assert run(tmp_path, "--steps", "2", "--methods", "fp32") == 0
    assert run(tmp_path, "--steps", "3", "--methods", "fp32", "--resume") == 2
    assert "holds a run with --steps 2, not 3: resume with the same" in capsys.readouterr().err
    assert run(tmp_path, "--resume", out="never") == 2
    assert "no run to resume" in capsys.readouterr().err
    assert run(tmp_path, "--steps", "2", "--methods", "fp32", "--resume") == 0  # nothing left to do


def test_nan_stops_with_the_last_state_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("run.SAVE_EVERY", 2)
    real = train.sdq_loss

    def breaks(student, *rest):
        breaks.step += 1
        if breaks.step == 5:
            with torch.no_grad():
                student.head.dense.weight[0] = float("inf")
        return real(student, *rest)

    breaks.step = 0
    monkeypatch.setattr(train, "sdq_loss", breaks)
    assert run(tmp_path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "loss is not finite after 4 steps" in error
    assert "lower --lr" in error and f"--resume --out {tmp_path / 'run'}" in error
    state = read_checkpoint(str(tmp_path / "run" / "state.pt"), STATE_FORMAT)
    assert state["progress"][:2] == ["fp32", 4]
    assert all(t.isfinite().all() for t in state["tensors"].values())
    assert not os.path.exists(tmp_path / "run" / "results.json")
    monkeypatch.setattr(train, "sdq_loss", real)  # what the message says: resume with a lower rate
    assert run(tmp_path, "--lr", "1e-5", "--resume") == 0
    assert "continues after step 4" in capsys.readouterr().out
    assert results(tmp_path)["config"]["lr"] == 1e-5


def test_state_with_nan_is_not_saved_over_a_good_one(tmp_path, capsys, monkeypatch):
    """A rate this high breaks the weights in one update, after a loss that was still finite."""
    for name, value in (("WARMUP", 0.0), ("CLIP_NORM", 1e9), ("WEIGHT_DECAY", 0.0)):
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr("run.SAVE_EVERY", 1)
    assert run(tmp_path, "--lr", "1e38") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is not finite after" in error
    assert not os.path.exists(tmp_path / "run" / "state.pt")


def test_save_keeps_the_earlier_state(tmp_path, tiny_config):
    model = build_model(tiny_config)
    training = Training(small_run(tmp_path), "fp32", model, [], small_data().train)
    training.step = 3
    training.save()
    before = (tmp_path / "run" / "state.pt").read_bytes()
    with torch.no_grad():
        model.head.dense.bias[1] = float("nan")
    training.step = 4
    with pytest.raises(UserError, match="a weight is not finite after 4 steps.*last good state"):
        training.save()
    assert (tmp_path / "run" / "state.pt").read_bytes() == before


def test_state_of_another_training_is_not_loaded(tmp_path, tiny_config):
    made = small_run(tmp_path)
    data = small_data().train
    first = Training(made, "qat", build_model(tiny_config), [], data)
    first.step = 3
    first.save()
    made = small_run(tmp_path, resume=False)
    assert Training(made, "qat", build_model(tiny_config), [], data).step == 0  # not resumed
    made.resume = True
    assert Training(made, "sdq", build_model(tiny_config), [], data).step == 0
    again = build_model(tiny_config)
    assert Training(made, "qat", again, [], data).step == 3
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


# ----------------------------------------------------------------------------------------- teachers
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
    students = [packed(tmp_path, name) for name in "ab"]
    for name, entry in students[0].items():
        assert torch.equal(entry["codes"], students[1][name]["codes"]), name


def test_teacher_depends_on_what_made_it(tmp_path):
    for i, options in enumerate(([], ["--lr", "1e-3"], ["--seed", "1"], ["--bits", "4"])):
        assert run(tmp_path, "--methods", "fp32", "ptq", "--steps", "2", *options, out=f"r{i}") == 0
    assert len(os.listdir(tmp_path / "teachers")) == 3  # --bits changes no teacher


def test_missing_teacher_on_resume(tmp_path, capsys):
    assert run(tmp_path, "--methods", "fp32", "ptq") == 0
    shutil.rmtree(tmp_path / "teachers")
    capsys.readouterr()
    assert run(tmp_path, "--methods", "fp32", "ptq", "--resume") == 2
    assert "is gone" in capsys.readouterr().err


def test_damaged_teacher_is_named(capsys, tmp_path):
    assert run(tmp_path, "--steps", "1", "--methods", "fp32") == 0
    (name,) = os.listdir(tmp_path / "teachers")
    (tmp_path / "teachers" / name).write_bytes(b"damaged")
    capsys.readouterr()
    assert run(tmp_path, "--steps", "1", "--methods", "fp32") == 2
    assert name in capsys.readouterr().err


def test_loaded_teacher_is_a_plain_checkpoint(tmp_path):
    assert run(tmp_path, "--steps", "1", "--methods", "fp32") == 0
    (name,) = os.listdir(tmp_path / "teachers")
    assert load_checkpoint(str(tmp_path / "teachers" / name)).config.num_labels == 3


# --------------------------------------------------------------------------------------- the report
XNLI = find_task("xnli")


def row(english, others, size=1e6):
    scores = {"en": english, **others}
    languages = {name: {"accuracy": value, "score": value} for name, value in scores.items()}
    summary = summarize_languages(languages, "en")
    return {**summary, "size_bytes": size, "train_seconds": 1.0}


def results_of(**rows):
    config = {"task": "xnli", "seed": 0, "bits": 2, "act_bits": 8, "lr": 1e-3}
    return {"config": config, "methods": rows, "languages": ["en", "de", "sw"]}


def cells_of(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n")]


def test_zero_shot_mean_leaves_the_training_language_out():
    assert row(90.0, {"de": 80.0, "sw": 70.0})["zero_shot_mean"] == 75.0
    assert row(90.0, {"de": 80.0, "sw": 70.0})["score"] == 90.0
    assert row(90.0, {})["zero_shot_mean"] is None
    languages = row(90.0, {"de": 80.0, "sw": 70.0})["languages"]
    found = summarize_languages(languages, "de")
    assert (found["score"], found["zero_shot_mean"]) == (80.0, 80.0)
    assert set(found) == {"score", "zero_shot_mean", "languages"}


def test_recovered():
    rows = {"fp32": row(90, {"de": 80.0}), "ptq": row(60, {"de": 40.0}), "sdq": row(80, {"de": 70.0})}
    assert recovered(rows, "sdq", XNLI) == pytest.approx(75.0)
    assert recovered(rows, "ptq", XNLI) is None and recovered(rows, "fp32", XNLI) is None
    assert recovered({"sdq": rows["sdq"]}, "sdq", XNLI) is None
    rows["ptq"] = row(90, {"de": 79.5})  # nothing worth recovering
    assert recovered(rows, "sdq", XNLI) is None
    english = {"fp32": row(90, {}), "ptq": row(60, {}), "qat": row(75, {})}
    assert recovered(english, "qat", XNLI) == pytest.approx(50.0)
    assert recovered_percent(70.0, 60.0, 62.0) == pytest.approx(500.0)
    assert recovered_percent(70.0, 60.0, 61.9) is None is recovered_percent(70.0, 70.0, 60.0)


def test_recovered_counts_both_test_sets_of_mnli():
    def tests(matched, mismatched):
        both = {"matched": {"score": matched}, "mismatched": {"score": mismatched}}
        return {"score": matched, "zero_shot_mean": mismatched, "languages": both}

    rows = {"fp32": tests(80.0, 80.0), "ptq": tests(40.0, 70.0), "sdq": tests(60.0, 79.0)}
    found = recovered(rows, "sdq", find_task("mnli"))
    assert found == pytest.approx(100 * (69.5 - 55) / 25)
    assert compared_score(rows["sdq"], find_task("mnli")) == 69.5
    assert compared_score(row(60, {"de": 50.0, "sw": 30.0}), XNLI) == 40.0


def test_table_has_every_row_and_language():
    rows = {"fp32": row(90, {"de": 80.0, "sw": 70.0}), "ptq": row(60, {"de": 40.0, "sw": 30.0})}
    table = report_table(results_of(**rows), XNLI)
    lines = table.split("\n")
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    header, _, _, ptq = cells_of(table)
    assert header == ["", "en", "zero-shot", "worst", "recovered", "MB", "train s", "de", "sw"]
    assert ptq == ["ptq", "60.00", "35.00", "sw 30.0", "-", "1.0", "1", "40.0", "30.0"]
    rows["ptq"]["student"] = row(61, {"de": 42.0, "sw": 30.0})
    table = report_table(results_of(**rows), XNLI)
    assert "| 61.00, 36.00, sw 30.0 |" in table
    header, _, fp32, _ = cells_of(table)
    assert header[5] == "student" and fp32[5] == "-"


def test_table_without_the_training_language():
    tests = {"de": {"score": 80.0, "accuracy": 80.0, "f1": 60.0}, "nl": {"score": 70.0, "accuracy": 90.0, "f1": 70.0}}
    rows = {"fp32": {**summarize_languages(tests, "en"), "size_bytes": 1e6, "train_seconds": 1}}
    assert rows["fp32"]["score"] is None and rows["fp32"]["zero_shot_mean"] == 75.0
    header, _, fp32 = cells_of(report_table({"methods": rows, "languages": ["de", "nl"]}, TASKS["ner"]))
    assert header[:5] == ["", "en", "zero-shot", "worst", "accuracy"]  # a metric beside that of the score: the mean
    assert fp32[:5] == ["fp32", "-", "75.00", "nl 70.0", "85.00"]


def test_table_of_one_language():
    table = report_table({**results_of(fp32=row(90, {}, size=12345)), "languages": ["en"]}, XNLI)
    header, _, fp32 = cells_of(table)
    assert header == ["", "accuracy", "recovered", "MB", "train s"]
    assert fp32 == ["fp32", "90.00", "-", "0.012", "1"]


@pytest.mark.parametrize("task", ["stsb", "mnli", "mrpc", "atis"])
def test_table_has_the_columns_of_the_task(task):
    """A cell holds each test set's value of one metric."""
    keys, names = TASKS[task].columns, TASKS[task].languages
    tests = {
        name: {"score": 1.0, **{key: 10.0 * i + j for j, key in enumerate(keys.values())}}
        for i, name in enumerate(names)
    }
    found = {**summarize_languages(tests, names[0]), "size_bytes": 1e6, "train_seconds": 0.0}
    made = {"methods": {"fp32": found}, "languages": list(names)}
    header, _, fp32 = cells_of(report_table(made, TASKS[task]))
    assert header == ["", *keys, "recovered", "MB", "train s"]
    values = [" / ".join(f"{tests[name][key]:.2f}" for name in names) for key in keys.values()]
    assert fp32[1:-3] == values and values[0].count("/") == len(names) - 1


def test_report_says_what_was_run():
    rows = {"fp32": row(90, {"de": 80.0, "sw": 70.0})}
    made = {**results_of(**rows), "model": "mini", "train_examples": 1234}
    made["environment"] = {"hardware": "a processor", "threads": 3, "torch": "2.0"}
    made |= {"test_examples": {"en": 750, "de": 751, "sw": 752}, "steps": {"teacher": 77, "students": 39}}
    made["config"] = vars(resolve({"model": "mini", "bits": 2}))
    text = report(made, XNLI, "dev")
    assert text.startswith(report_table(made, XNLI)) and text.endswith("\n")
    for part in ("xnli, model mini, seed 0", "on test (en 750, de 751, sw 752 rows)", "1,234 examples", "3 threads"):
        assert part in text
    assert "teacher 77 steps, students 39, of 32" in text and "qat: noise 0.5. sdq: noise 0.5, logits+context." in text
    assert "W2A8: uniform weights, one scale per channel, ranges minmax; activations" in text
    for option, words in (
        ({"per_tensor": True}, "one scale per tensor, ranges minmax; activations with ranges at run time, per tensor."),
        ({"act_range": "static"}, "activations with ranges static."),
        ({"attention_bits": 4}, "inside attention 4 bits."),
        ({"weights": "lsq", "weight_range": "mse"}, "lsq weights, one scale per channel, ranges mse;"),
    ):
        assert words in report({**made, "config": made["config"] | option}, XNLI, "dev")
    alone = report({**made, "config": made["config"] | {"methods": ("fp32",)}}, XNLI, "dev")
    assert "W2A8" not in alone and "noise" not in alone  # nothing is quantized
    assert "flatter" not in text and "selected on dev, in" in text
    made["config"] = made["config"] | {"eval_split": "dev"}
    text = report(made, XNLI, "held-out")
    assert "selected on held-out, in" in text and "flatter" not in text
    assert "selected on dev, which flatters" in report(made, XNLI, "dev")


def test_caveats_name_guessing_and_rows_that_do_nothing_else():
    """95 % of one class: a row with 95 % accuracy that predicts nothing else is named."""
    guess, learned = dict(score=95.0, classes=1, majority=95.0), dict(score=97.0, classes=2, majority=95.0)
    results = {"methods": {"fp32": {"languages": {"all": learned}}}}
    assert caveats(results, TASKS["tsv"]) == ["Always predicting the most frequent class of the test rows gives 95.0."]
    results["methods"]["ptq"] = {"languages": {"all": guess, "de": learned | {"majority": 50.0}}}
    assert caveats(results, TASKS["tsv"])[1:] == ["WARNING: one class is predicted for all rows by ptq (all)."]
    results["methods"] = dict(reversed(results["methods"].items()))
    assert "gives all 95.0, de 50.0." in caveats(results, TASKS["tsv"])[0]
    # a test set of one class is no sign of it; metrics that are 0 for a guess need no comparison
    one = {"languages": {"en": guess | {"majority": 100.0}}}
    assert len(caveats({"methods": {"fp32": one}}, TASKS["tsv"])) == 1
    cola = {"methods": {"qat": {"languages": {"en": guess}}}}
    assert caveats(cola, TASKS["cola"]) == ["WARNING: one class is predicted for all rows by qat."]
    assert caveats({"methods": {"fp32": {"languages": {"en": {"score": 1.0}}}}}, TASKS["stsb"]) == []


def test_results_are_those_of_the_log(tmp_path):
    """results.json holds the options, the environment, and for each row all counts."""
    assert run(tmp_path, "--methods", "fp32", "qat", "--epochs", "2") == 0
    found = results(tmp_path)
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert set(recorded.pop("contents")) > {"the data (train)", "the data (test, zh)"}
    assert found["config"] == recorded and found["test_examples"] == dict.fromkeys(("de", "en", "zh"), 3)
    assert found["steps"] == {"teacher": 12, "students": 12}
    assert (found["model"], found["train_examples"]) == ("scratch-1x32", 180)
    assert found["languages"] == ["de", "en", "zh"]
    assert set(found["environment"]) == {"hardware", "threads", "torch"}
    for name, each in found["methods"].items():
        records = [r for r in log_of(tmp_path) if r["method"] == name and "dev_score" in r]
        curve = [[r["step"], r["dev_score"]] for r in records]
        assert each["dev_curve"] == curve and len(curve) == 2
        scores = {k: v["score"] for k, v in each["languages"].items()}
        assert each["score"] == scores.pop("en")
        assert each["zero_shot_mean"] == pytest.approx(statistics.fmean(scores.values()))
        assert "english" not in each and "student" not in each


def test_damaged_files_of_a_run_are_named(tmp_path, capsys):
    """On --resume, results cut in half are named; a log that is no text is no obstacle; rows are made again."""
    options = ("--steps", "2", "--methods", "fp32", "ptq")
    assert run(tmp_path, *options) == 0
    expected = results(tmp_path)["methods"]
    path, log = tmp_path / "run" / "results.json", tmp_path / "run" / "log.jsonl"
    whole = path.read_text()
    for text in (whole[: len(whole) // 2], "[]", "{}", '{"methods": 3}', whole.replace('"score"', '"scores"'), "\xff"):
        path.write_text(text, encoding="latin-1")
        assert run(tmp_path, *options, "--resume") == 2
        error = capsys.readouterr().err
        assert "results.json is damaged: delete it" in error and error.count("\n") == 1
    path.unlink()
    log.write_bytes(b"\xff\xfe{\n" + log.read_bytes()[:-20])
    (tmp_path / "run" / "student.pt.part").write_bytes(b"of a killed process")
    assert run(tmp_path, *options, "--resume") == 0
    again = results(tmp_path)["methods"]
    assert {name: row["languages"] for name, row in again.items()} == {n: r["languages"] for n, r in expected.items()}
    assert not (tmp_path / "run" / "student.pt.part").exists()


def test_a_teacher_without_notes_is_named(tmp_path, capsys):
    options = ("--steps", "2", "--methods", "fp32")
    assert run(tmp_path, *options) == 0
    (name,) = os.listdir(tmp_path / "teachers")
    path = str(tmp_path / "teachers" / name)
    payload = torch.load(path, weights_only=True)
    torch.save({**payload, "notes": {}}, path)
    assert run(tmp_path, *options, out="other") == 2
    assert "is no teacher of train.py: delete it" in capsys.readouterr().err


def test_a_planted_link_is_not_followed(tmp_path):
    """Temporary files have foreseeable names."""
    target = tmp_path / "precious"
    target.write_text("precious")
    os.symlink(target, tmp_path / "x.json.part")
    write_json(str(tmp_path / "x.json"), {"a": 1})
    assert target.read_text() == "precious" and not os.path.islink(tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}

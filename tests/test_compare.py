"""tools/compare.py: tables over seeds, widths, tasks and losses, of made-up results."""

import itertools
import json
import os

import numpy as np
import pytest
from conftest import ROOT

from data.tasks import TASKS
from kit.report import summarize_languages
from tools import compare


def made_up(task, seed, distill, methods, **config):
    """A run of a task: method -> its score in English, or language -> score."""
    rows = {}
    for name, scores in methods.items():
        scores = scores if isinstance(scores, dict) else {"en": scores}
        keys = (*TASKS[task].metrics, *TASKS[task].columns.values(), "score")
        rows[name] = summarize_languages({each: dict.fromkeys(keys, value) for each, value in scores.items()}, "en")
        rows[name] |= {"size_bytes": 8e6, "train_seconds": 1.0}
    config = {"task": task, "seed": seed, "bits": 2, "act_bits": 8, "distill": distill, "lr": 1e-4, **config}
    return {"config": config, "methods": rows, "languages": [*next(iter(rows.values()))["languages"]], "model": "m"}


def write_runs(tmp_path, runs):
    paths = []
    for i, made in enumerate(runs):
        path = tmp_path / f"{i}.json"
        path.write_text(json.dumps(made), encoding="utf-8")
        paths.append(str(path))
    return paths


def table_of(tmp_path, capsys, runs, *options):
    """The cells of the table of some runs; the second line is a rule."""
    assert compare.main([*write_runs(tmp_path, runs), *options]) == 0
    return [[c.strip() for c in x.split("|")[1:-1]] for x in capsys.readouterr().out.splitlines()]


def refusal(capsys, *arguments):
    """The line on stderr."""
    assert compare.main([*arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


# ------------------------------------------------------------------------------ seeds and widths
def test_over_seeds(tmp_path, capsys):
    runs = []
    for bits, (seed, up) in itertools.product((8, 2), enumerate((0.0, 2.0))):
        rows = {"fp32": {"en": 90 + up, "de": 80.0}, "ptq": {"en": 50 + bits + up, "de": 40.0}}
        runs.append(made_up("xnli", seed, "logits", rows, bits=bits))
    lines = table_of(tmp_path, capsys, runs)
    assert lines[2][:4] == ["fp32", "2", "91.00 ± 1.41", "80.00 ± 0.00"]  # not counted twice
    assert lines[3][:3] == ["ptq W8A8", "2", "59.00 ± 1.41"]
    assert lines[4][:3] == ["ptq W2A8", "2", "53.00 ± 1.41"]
    lines = table_of(tmp_path, capsys, runs, "--languages")
    assert lines[0] == ["", "en", "de"] and lines[4] == ["ptq W2A8", "53.0", "40.0"]


def test_front_and_operations(tmp_path, capsys):
    """A row is on the front if no other is as small and as good; operations are told where they differ."""
    runs = []
    for rank, bits, size, score in ((0, 8, 9e6, 80.0), (30, 8, 3e6, 79.0), (30, 4, 2e6, 79.0), (60, 4, 5e6, 78.5)):
        runs.append(made_up("sst2", 0, "layerwise", {"fp32": 85.0, "sdq": score}, bits=bits, tt_rank=rank, model="m"))
        runs[-1]["methods"]["fp32"] |= {"size_bytes": 4e7, "flops": 2_000_000_000}
        runs[-1]["methods"]["sdq"] |= {"size_bytes": size, "flops": 2_000_000_000 if rank == 0 else 10_000_000 * rank}
    lines = table_of(tmp_path, capsys, runs, "--front")
    assert lines[0][-3:] == ["MB", "GFLOP", "front"]
    found = {line[0]: line[-3:] for line in lines[2:]}
    assert found["dense fp32"] == ["40.0", "2", "yes"] and found["dense layerwise W8A8"] == ["9.0", "2", "yes"]
    assert found["TT rank 30 layerwise W8A8"] == ["3.0", "0.3", "-"]
    assert found["TT rank 30 layerwise W4A8"] == ["2.0", "0.3", "yes"]
    assert found["TT rank 60 layerwise W4A8"] == ["5.0", "0.6", "-"]
    assert table_of(tmp_path, capsys, runs[:1])[0][-1] == "MB"  # without --front, of one shape
    flights = [made_up("atis", 0, "none", {"fp32": 90.0}, model="scratch-1x8", tt_rank=rank) for rank in (0, 5)]
    for run, size in zip(flights, (2e6, 1e6), strict=True):
        run["methods"]["fp32"] |= {"size_bytes": size, "flops": int(1e3 * size)}
    lines = table_of(tmp_path, capsys, flights, "--front")
    assert [line[3:6] for line in (lines[0], *lines[2:])] == [
        ["smaller", "GFLOP", "front"],
        ["1x", "2", "-"],
        ["2x", "1", "yes"],
    ]


def test_rows_are_compared_with_those_of_their_shape(tmp_path, capsys):
    """PTQ of another shape is another model; float32 may be dense, or tensor trains itself."""
    scores = {"dense": (90.0, 80.0, 85.0), "trains": (88.0, 60.0, 81.0)}
    runs = [
        made_up(
            "xnli", 0, "logits", {m: {"en": 90.0, "de": v} for m, v in zip(("fp32", "ptq", "sdq"), each, strict=True)}
        )
        for each in scores.values()
    ]
    runs[1]["config"]["tt_rank"] = 8
    lines = table_of(tmp_path, capsys, runs)
    recovered = {line[0]: line[-2] for line in lines[2:]}
    assert lines[0][-2] == "recovered %" and recovered["dense sdq W2A8"] == "50"
    assert recovered["TT rank 8 sdq W2A8"] == "70"  # 21 of 30: the teacher is the dense one
    for run in runs:
        run["config"]["model"] = "scratch-2x64"
    lines = table_of(tmp_path, capsys, runs)
    assert {line[0]: line[-2] for line in lines[2:]}["TT rank 8 sdq W2A8"] == "75"  # 21 of 28: trains, too
    for run in runs:
        for row in run["methods"].values():
            for test in row["languages"].values():
                right = round(test["score"] / 10)
                test |= {"total": 10, "correct_rows": np.packbits([1] * right + [0] * (10 - right)).tobytes().hex()}
    lines = table_of(tmp_path, capsys, runs, "--minus", "ptq")
    assert {line[0]: line[4] for line in lines[2:]}["TT rank 8 sdq W2A8"] == "+20.00"


def test_front_over_several_tasks(tmp_path, capsys):
    """The mean of the seeds that have all tasks counts; two equal rows are both on the front."""
    runs = []
    for task, scores in {"rte": (60.0, 60.0, None), "sst2": (90.0, 90.0, 99.0)}.items():
        methods = {name: score for name, score in zip(("fp32", "ptq", "qat"), scores, strict=True) if score}
        runs.append(made_up(task, 0, "logits", methods))
    lines = table_of(tmp_path, capsys, runs, "--front")
    assert {line[0]: line[-1] for line in lines[2:]} == {"fp32": "yes", "ptq W2A8": "yes", "qat W2A8": "-"}


def test_rows_of_a_run_in_several_files(tmp_path, capsys):
    """And the seconds of work, where a row has repairs."""
    parts = (
        {"fp32": {"en": 90.0, "de": 80.0}, "ptq": {"en": 60.0, "de": 50.0}},
        {"ptq+norm": {"en": 70.0, "de": 60.0}},
    )
    runs = [made_up("xnli", 0, "logits", rows) for rows in parts]
    runs[1]["methods"]["ptq+norm"]["train_seconds"] = 30.4
    runs[1]["config"]["student_lr"] = 1e-3  # of no effect
    lines = table_of(tmp_path, capsys, runs)
    assert [line[0] for line in lines[2:]] == ["fp32", "ptq W2A8", "ptq+norm W2A8"]
    assert lines[0][-1] == "work s" and lines[4][-3:] == ["33", "8.0", "30"]
    assert "work s" not in table_of(tmp_path, capsys, runs[:1])[0]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({}, {}, "have the same seed, width and rank: give one of them, or put a label before one, as in NAME="),
        ({}, {"seed": 1, "lr": 2e-4}, "differ in --lr"),
        ({}, {"task": "sst2", "lr": 2e-4}, None),  # a task has its own recipe
        ({}, {"task": "sst2", "model": "other"}, "differ in --model"),
        ({}, {"task": "xnli"}, "differ in --task"),
        ({}, {"task": "atis"}, "differ in --task"),
        ({"bits": 8, "student_lr": 1e-5}, {"student_lr": 1e-3}, None),  # a width has its own
        ({"student_lr": 1e-5}, {"student_lr": 1e-3, "seed": 1}, "differ in --student-lr"),
        ({"gone": 1}, {"seed": 1}, None),  # a removed option counts where both files have it
        ({"gone": 1}, {"gone": 2, "seed": 1}, "differ in --gone"),
        ({}, {"noise": 0.5, "recipe": "kd", "analyze": True, "seed": 1}, None),  # a newer one has its default
        ({}, {"noise": 1.0, "seed": 1}, "differ in --noise"),
    ],
)
def test_a_table_compares_like_with_like(first, second, message, tmp_path, capsys):
    same = {"task": "rte", "seed": 0, "distill": "logits", "methods": {"sdq": 1.0}}
    for runs in (first, second), (second, first):
        paths = write_runs(tmp_path, [made_up(**same | options) for options in runs])
        assert message in refusal(capsys, *paths) if message else compare.main(paths) == 0


@pytest.mark.parametrize("change", [("{", "["), (r'"methods"', '"x"'), ('"rte"', '"none"'), ('"sdq"', '"none"')])
def test_other_files(change, tmp_path, capsys):
    made = json.dumps(made_up("rte", 0, "logits", {"sdq": 1.0}))
    (tmp_path / "bad.json").write_text(made.replace(*change))
    error = refusal(capsys, str(tmp_path / "bad.json"))
    assert "bad.json is not a results.json of train.py" in error or "unknown task 'none'" in error


def test_runs_of_different_code(tmp_path, capsys):
    """Told apart by the label before a file; each is compared with its own PTQ."""
    rows = [{"fp32": 90.0 + i, "ptq": 80.0, "sdq": 85.0} for i in range(2)]
    paths = write_runs(tmp_path, [made_up("rte", seed, "logits", each) for seed in (0, 1) for each in rows])
    labeled = [f"{'new=' * i}{path}" for path, i in zip(paths[:3], (0, 1, 0), strict=True)]
    found = {line[0]: line[1:4] for line in table_of(tmp_path, capsys, [], *labeled, f"new={tmp_path}/3*")[2:]}
    assert list(found) == [f"{row}{new}" for row in ("fp32", "ptq W2A8", "logits W2A8") for new in ("", " new")]
    assert found["fp32 new"] == ["2", "91.00 ± 0.00", "-"]
    assert found["logits W2A8"][2] == "50 ± 0" and found["logits W2A8 new"][2] == "45 ± 0"
    os.rename(paths[0], tmp_path / "lr=1.json")  # a file as it is, and a folder with such a name
    for name in str(tmp_path / "lr=1.json"), str(tmp_path / "lr=*.json"):
        assert table_of(tmp_path, capsys, [], name)[2][0] == "fp32"
    assert "lr=2/results.json is not" in refusal(capsys, str(tmp_path / "lr=2" / "results.json"))


# ------------------------------------------------------------------------------ tasks and losses
def test_table_over_tasks_and_seeds(tmp_path, capsys):
    runs = []
    for seed, up in ((0, 0.0), (1, 2.0)):
        for task, full in (("sst2", 90.0), ("rte", 70.0)):
            base = {"fp32": full + up, "ptq": 50.0 + up, "qat": full - 10 + up}
            runs.append(made_up(task, seed, "logits", base | {"sdq": full - 5 + up}))
            runs.append(made_up(task, seed, "logits+map", {"sdq": full - 3 + up}))
    lines = table_of(tmp_path, capsys, runs)
    assert lines[0][2:] == ["sst2 (accuracy)", "rte (accuracy)", "mean", "recovered %", "MB"]
    rows = {line[0]: line[1:] for line in lines[2:]}
    assert list(rows) == ["fp32", "ptq W2A8", "qat W2A8", "logits W2A8", "logits+map W2A8"]
    assert rows["fp32"] == ["2", "91.00 ± 1.41", "71.00 ± 1.41", "81.00 ± 1.41", "-", "8.0"]
    # means of the tasks: fp32 80, ptq 50, logits 75: 25 of 30 points
    assert rows["logits W2A8"][4] == "83 ± 0" and rows["logits+map W2A8"][4] == "90 ± 0"
    assert table_of(tmp_path, capsys, runs[:-1])[-1][:2] == ["logits+map W2A8", "1 to 2"]  # without rte's second seed


@pytest.mark.parametrize(
    ("ptq", "qat", "expected"),  # by seed; float32 has 70 with each
    [
        ((66.0, 62.0), (68.0, 64.0), "33 ± 18"),  # 4 of 12 points; 50 and 25 %
        ((69.0, 62.0), (70.0, 64.0), "33"),  # the first seed's 100 % of one point says nothing
        ((71.0, 62.0), (68.0, 64.0), "-14"),  # nor does that of a seed that gains
        ((69.5, 66.6), (69.0, 69.0), None),  # 1.95 points on average, whatever the second loses
        ((68.0, 68.0), (69.0, 70.0), "75 ± 35"),
    ],
)
def test_recovered_is_a_ratio_of_means(ptq, qat, expected, tmp_path, capsys):
    """Over all seeds: none is dropped where PTQ happens to lose little. A column without a value is left out."""
    runs = [made_up("rte", seed, "logits", {"fp32": 70.0, "ptq": ptq[seed], "qat": qat[seed]}) for seed in range(2)]
    runs.append(made_up("rte", 2, "logits", {"qat": 10.0}))  # a seed that PTQ lacks
    lines = table_of(tmp_path, capsys, runs)
    assert "recovered %" in lines[0] if expected else "recovered %" not in lines[0]
    assert [line[3] for line in lines[2:]] == (["-", "-", expected] if expected else ["8.0"] * 3)


def test_xglue_is_a_table_over_tasks(tmp_path, capsys):
    """The mean over all languages of a task, its worst one, and the mean over tasks."""
    runs = [
        made_up(task, seed, "logits", {"fp32": {"en": 90 + up, "de": german}, "sdq": {"en": 80.0, "de": german - 10}})
        for seed, up in ((0, 0.0), (1, 2.0))
        for task, german in (("pos", 70.0), ("ner", 50.0), ("xnli", 60.0))
    ]
    lines = table_of(tmp_path, capsys, runs)
    titles = ["xnli (accuracy; worst)", "ner (f1; worst)", "pos (accuracy; worst)"]
    assert lines[0] == ["", "seeds", *titles, "mean", "MB"]
    expected = ["75.50 ± 0.71; de 60.00 ± 0.00", "70.50 ± 0.71; de 50.00 ± 0.00", "80.50 ± 0.71; de 70.00 ± 0.00"]
    assert lines[2][:6] == ["fp32", "2", *expected, "75.50 ± 0.71"]
    assert lines[3][2] == "65.00 ± 0.00; de 50.00 ± 0.00"
    assert "leave out --languages" in refusal(capsys, "--languages", *write_runs(tmp_path, runs))


@pytest.mark.parametrize("option", [("--languages",), ("--minus", "fp32")])
@pytest.mark.parametrize("task", ["stsb", "atis"])
def test_only_zero_shot_tasks_have_languages(task, option, tmp_path, capsys):
    paths = write_runs(tmp_path, [made_up(task, 0, "logits", {"fp32": 80.0})])
    assert f"leave out {option[0]}" in refusal(capsys, *paths, *option)


def test_losses_are_rows(tmp_path, capsys):
    """In the order of their number and names, whatever their weights; one loss needs no name."""
    losses = ("logits+30*score", "logits+map", "layerwise-together", "logits+0.5*map", "logits+map+score")
    runs = [made_up("rte", 0, loss, {"sdq": 1.0}) for loss in losses]
    found = [line[0] for line in table_of(tmp_path, capsys, runs)[2:]]
    assert found == [f"{losses[i]} W2A8" for i in (2, 3, 1, 0, 4)]
    alone = table_of(tmp_path, capsys, [made_up("xnli", 0, "layerwise", {"sdq": 1.0})])
    assert alone[2][:3] == ["sdq W2A8", "1", "1.00"]


def test_scales_and_weights_are_rows(tmp_path, capsys):
    """Named where runs differ in them; PTQ's loss is that of the same setting."""
    kinds = ({}, {"per_tensor": True, "act_range": "static"}, {"weights": "lsq"})
    runs = []
    for seed, (i, kind) in itertools.product((0, 1), enumerate(kinds)):
        runs.append(made_up("rte", seed, "logits", {"fp32": 90.0, "ptq": 80.0 - 10 * i, "qat": 85.0}, **kind))
    found = {line[0]: line[1:] for line in table_of(tmp_path, capsys, runs)[2:]}
    names = [f"{m} W2A8{kind}" for kind in ("", " lsq", " per tensor static") for m in ("ptq", "qat")]
    assert list(found) == ["fp32", *names]
    percents = [found[f"qat W2A8{kind}"][2] for kind in ("", " per tensor static", " lsq")]
    assert percents == ["50 ± 0", "75 ± 0", "83 ± 0"]
    assert table_of(tmp_path, capsys, runs[1:2])[3][0] == "ptq W2A8"  # one setting needs no name


def test_scales_of_other_libraries(tmp_path, capsys):
    """Peers have scales per channel: beside runs per tensor, both say so, and they recover nothing of that PTQ's loss."""
    rows = {"fp32": 90.0, "ptq": 80.0, "sdq": 85.0, "onnxruntime": 89.0}
    lines = table_of(tmp_path, capsys, [made_up("rte", 0, "logits", rows, per_tensor=True)])
    found = {line[0]: line[3] for line in lines[2:]}
    assert found == {"fp32": "-", "ptq W2A8 per tensor": "-", "logits W2A8 per tensor": "50", "onnxruntime W8A8": "-"}
    lines = table_of(tmp_path, capsys, [made_up("rte", 0, "logits", rows)])
    assert [line[0] for line in lines[3:]] == ["ptq W2A8", "logits W2A8", "onnxruntime W8A8"]


# ---------------------------------------------------------------------------- paired differences
def paired_runs(right):
    """Runs with the rows that are predicted right: (seed, method, language, row)."""
    runs = []
    for seed, methods in enumerate(right):
        runs.append(made_up("xnli", seed, "logits", {"fp32": {"en": 0, "de": 0, "sw": 0}, "ptq": {"en": 0}}))
        for row, languages in zip(runs[-1]["methods"].values(), methods, strict=True):
            for name, each in zip(("en", "de", "sw"), languages, strict=True):
                packed = np.packbits(each).tobytes().hex()
                row["languages"][name] = {"score": 100 * each.mean(), "total": each.size, "correct_rows": packed}
    return runs


def test_differences_are_paired_over_rows(tmp_path, capsys):
    """Against the differences by hand: 10 rows, seeds and languages averaged first."""
    right = np.random.default_rng(0).random((2, 2, 3, 10)) < 0.6
    runs = paired_runs(right)
    lines = table_of(tmp_path, capsys, runs, "--minus", "fp32")
    assert lines[0][0] == "minus fp32" and len(lines) == 3
    difference = right[:, 1].astype(float) - right[:, 0]  # (seed, language, row)
    for cell, values in zip(lines[2][2:4], (difference[:, 0], difference[:, 1:].mean(1)), strict=True):
        by_row = 100 * values.mean(0)
        assert cell == f"{by_row.mean():+.2f} ± {by_row.std(ddof=1) / 10**0.5:.2f}"
    assert lines[2][4] == " ".join(f"{100 * d:+.2f}" for d in difference[:, 1:].mean((1, 2)))
    first, second = write_runs(tmp_path, runs)
    lines = table_of(tmp_path, capsys, [], first, f"new={second}", "--minus", "fp32")
    assert [line[0] for line in lines[2:]] == ["ptq W2A8", "ptq W2A8 new"]
    assert "no row of nonsense" in refusal(capsys, first, "--minus", "nonsense")


@pytest.mark.parametrize("change", [{"total": 9}, {"correct_rows": None}])
def test_rows_that_cannot_be_paired(change, tmp_path, capsys):
    runs = paired_runs(np.ones((1, 2, 3, 10), dtype=bool))
    evaluation = runs[0]["methods"]["ptq"]["languages"]["de"]
    runs[0]["methods"]["ptq"]["languages"]["de"] = {k: v for k, v in (evaluation | change).items() if v is not None}
    assert "these files hold no such rows" in refusal(capsys, *write_runs(tmp_path, runs), "--minus", "fp32")


# ---------------------------------------------------------------------------------- joint tasks
def joint_runs(*options):
    """Runs of ATIS. options: (rank, bits, methods, further options) of each."""
    runs = []
    for rank, bits, methods, *more in options:
        for seed in (0, 1):
            config = {"model": "scratch-2x768", "tt_rank": rank, "bits": bits, **dict(*more)}
            runs.append(made_up("atis", seed, "logits", dict.fromkeys(methods, 90.0 + seed), **config))
            for name, each in runs[-1]["methods"].items():
                each["size_bytes"] = 1e5 // (1 + rank) * (32 if name == "fp32" else bits)
    return runs


def test_table_over_seeds_ranks_and_widths(tmp_path, capsys):
    runs = joint_runs((0, 8, ["fp32"]), (4, 8, ["fp32", "ptq"]), (4, 2, ["ptq"]))
    lines = table_of(tmp_path, capsys, runs)
    assert lines[0] == ["", "seeds", "kB", "smaller", *TASKS["atis"].columns]
    names, seeds, sizes, smaller, *_ = zip(*lines[2:], strict=True)
    assert names == ("dense fp32", "TT rank 4 fp32", "TT rank 4 ptq W8A8", "TT rank 4 ptq W2A8")
    assert {*seeds} == {"2"} and smaller[0] == "1x"
    assert sorted(sizes, key=lambda size: -float(size.replace(",", ""))) == [*sizes]


def test_shapes_of_joint_models(tmp_path, capsys):
    """Tables of embeddings are told apart, and the teacher of a pretrained model is dense."""
    minilm = {"model": "minilm"}
    runs = joint_runs((4, 8, ["fp32", "ptq"], minilm), (4, 8, ["ptq"], {**minilm, "tt_embedding_rank": 6}))
    found = [line[0] for line in table_of(tmp_path, capsys, runs)[2:]]
    assert found == ["dense fp32", "TT rank 4 ptq W8A8", "TT rank 4, embedding 6 ptq W8A8"]


def test_latency_stands_beside_its_backend(tmp_path, capsys):
    runs = joint_runs((4, 8, ["fp32", "ptq"], {"act_range": "static"}))[:1]
    measured = []
    for size, (i, name) in itertools.product((1, 2), enumerate(("dense fp32", "TT fp32, merged", "TT W8A8 static"))):
        measured.append({"name": name, "batch_size": size, "median_ms": 10 * size + i})
    path = tmp_path / "tt.json"
    for rank, expected in ((4, ["12.0", "22.0"]), (5, ["-", "-"])):
        path.write_text(json.dumps({"shape": {"rank": rank}, "models": measured}))
        lines = table_of(tmp_path, capsys, runs, "--latency", str(path))
        assert lines[0][-2:] == ["ms x 1", "ms x 2"] and lines[-1][0] == "TT rank 4 ptq W8A8"
        assert lines[-1][-2:] == expected
    (results,) = write_runs(tmp_path, runs)
    assert "is not a JSON of bench.py tt" in refusal(capsys, results, "--latency", results)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("xnli-minilm/*.json --languages", ["sdq W4A8", "67.1"]),
        (
            "layerwise/*.json",
            ["TT rank 24, embedding 48 layerwise-together W32A32", "3", "97.87 ± 0.13", "1.5", "0.104"],
        ),
    ],
)
def test_committed_results(options, line, tmp_path, capsys):
    """README's and the pages' tables: test_readme.py."""
    file, *option = options.split()
    assert table_of(tmp_path, capsys, [], os.path.join(ROOT, "results", file), *option)[-1] == line


def test_repaired_rows_follow_their_methods(tmp_path, capsys):
    """In the order of work; where losses name the rows of SDQ, with what it started from."""
    scores = {"sdq+gptq": 88.0, "ptq+norm": 81.0, "sdq": 85.0, "ptq+gptq+norm": 84.0, "ptq+gptq": 83.0, "ptq": 80.0}
    made = [made_up(task, 0, "logits", scores | {"fp32": 90.0}) for task in ("rte", "xnli")]
    order = [f"{name} W2A8" for name in ("ptq", "ptq+gptq", "ptq+gptq+norm", "ptq+norm")]
    for run, names in zip(made, (("logits", "logits from gptq"), ("sdq", "sdq+gptq")), strict=True):
        table = table_of(tmp_path, capsys, [run])
        assert [line[0] for line in table[2:]] == ["fp32", *order, *(f"{name} W2A8" for name in names)]
    assert "30" in table[4]  # recovered

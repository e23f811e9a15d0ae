"""tools/compare.py: tables over seeds, widths, tasks and losses, of made-up results."""

import json
import os

import numpy as np
import pytest
from conftest import ROOT

from data.tasks import TASKS
from tools import compare


def row(english, others, size=1e6):
    languages = {"en": {"accuracy": english}}
    languages |= {name: {"accuracy": value} for name, value in others.items()}
    return {"languages": languages, "size_bytes": size, "train_seconds": 1.0}


def run(seed=0, bits=2, **rows):
    config = {"task": "xnli", "seed": seed, "bits": bits, "act_bits": 8, "lr": 1e-3}
    return {"config": config, "methods": rows, "languages": ["en", "de", "sw"]}


def made_up(task, seed, distill, methods, **more):
    """A run of a task with one score per method, with the keys of older files."""
    config = {"task": task, "seed": seed, "bits": 2, "act_bits": 8, "distill": distill}
    config |= {"gamma": None, "part_weights": [], "lr": 1e-4, **more}
    rows = {}
    for name, score in methods.items():
        metrics = dict.fromkeys((*TASKS[task].metrics, *TASKS[task].columns.values()), score)
        rows[name] = {"english": score, "zero_shot_mean": None, "size_bytes": 8e6}
        rows[name]["languages"] = {"en": {"score": score, **metrics}}
    return {"config": config, "methods": rows, "languages": ["en"], "model": "m"}


def write_runs(tmp_path, runs):
    paths = []
    for i, made in enumerate(runs):
        path = tmp_path / f"{i}.json"
        path.write_text(json.dumps(made), encoding="utf-8")
        paths.append(str(path))
    return paths


def cells_of(capsys):
    """The cells of the table that was printed, line by line; the second line is a rule."""
    return [[c.strip() for c in x.split("|")[1:-1]] for x in capsys.readouterr().out.splitlines()]


# ------------------------------------------------------------------------------ seeds and widths
def test_over_seeds(tmp_path, capsys):
    paths = []
    for bits in (8, 2):
        for seed, plus in ((0, 0.0), (1, 2.0)):
            rows = {"fp32": row(90 + plus, {"de": 80.0}), "ptq": row(50 + bits + plus, {"de": 40.0})}
            path = tmp_path / f"{bits}-{seed}.json"
            path.write_text(json.dumps(run(seed, bits, **rows)))
            paths.append(str(path))
    assert compare.main(paths) == 0
    lines = cells_of(capsys)
    assert lines[2][:4] == ["fp32", "2", "91.00 ± 1.41", "80.00 ± 0.00"]  # not counted twice
    assert lines[3][:3] == ["ptq W8A8", "2", "59.00 ± 1.41"]
    assert lines[4][:3] == ["ptq W2A8", "2", "53.00 ± 1.41"]


def test_languages_over_seeds(tmp_path, capsys):
    for seed, plus in ((0, 0.0), (1, 3.0)):
        rows = {"ptq": row(50 + plus, {"de": 40.0 + plus, "sw": 20.0})}
        (tmp_path / f"{seed}.json").write_text(json.dumps(run(seed, **rows)))
    assert compare.main(["--languages", str(tmp_path / "*.json")]) == 0
    lines = cells_of(capsys)
    assert lines[0] == ["", "en", "de", "sw"]
    assert lines[2] == ["ptq W2A8", "51.5", "41.5", "20.0"]


def test_means_are_computed_from_the_languages(tmp_path, capsys):
    """Older files hold means under other keys, which are not read."""
    value = run(fp32=row(90, {"de": 80.0, "sw": 60.0}))
    value["methods"]["fp32"] |= {"english": 1.0, "zero_shot_mean": 2.0, "score": 3.0}
    assert compare.main(write_runs(tmp_path, [value])) == 0
    assert cells_of(capsys)[2][2:4] == ["90.00", "70.00"]


def test_the_same_run_counts_once(tmp_path, capsys):
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps(run(fp32=row(90, {}))))
    assert compare.main([str(tmp_path / "*.json")]) == 2  # and wildcards work
    assert "have the same seed, width and rank" in capsys.readouterr().err


def test_unlike_runs_are_not_mixed(tmp_path, capsys):
    paths = []
    for i, lr in enumerate((1e-3, 1e-4)):
        value = run(fp32=row(90, {}))
        value["config"]["lr"] = lr
        paths.append(str(tmp_path / f"{i}.json"))
        with open(paths[-1], "w") as file:
            json.dump(value, file)
    assert compare.main(paths) == 2
    assert "differ in --lr" in capsys.readouterr().err
    no_rows = '{"config": {"task": "xnli", "seed": 0, "bits": 8}, "methods": {}}'
    whole = json.dumps(run(fp32=row(90, {})))
    for text in (
        *("[]", "{", '{"config": {"seed": 0}}', '{"config": {}, "methods": {}}', no_rows),
        whole[: len(whole) // 2],
        whole.replace('"accuracy"', '"f1"'),
    ):
        (tmp_path / "bad.json").write_text(text)
        assert compare.main([str(tmp_path / "bad.json")]) == 2
        error = capsys.readouterr().err
        assert "is not a results.json" in error and "bad.json" in error and error.count("\n") == 1
    for old, kind, known in ("xnli", "task", TASKS), ("fp32", "method", compare.METHOD_ORDER):  # of a fork, say
        (tmp_path / "bad.json").write_text(whole.replace(old, "none"))
        assert compare.main([str(tmp_path / "bad.json")]) == 2
        message = f"bad.json: unknown {kind} 'none'; known: {' '.join(known)}\n"
        assert capsys.readouterr().err.endswith(message)


def test_runs_of_different_code(tmp_path, capsys):
    """Told apart by the label before a file; each is compared with its own PTQ."""
    runs = [
        made_up("rte", seed, "logits", {"fp32": 90.0 + i, "ptq": 80.0, "sdq": 85.0})
        for seed in (0, 1)
        for i in range(2)
    ]
    paths = write_runs(tmp_path, runs)
    assert compare.main(paths[:2]) == 2
    assert "or put a label before one, as in NAME=" in capsys.readouterr().err
    labeled = [f"{'new=' * i}{path}" for path, i in zip(paths, (0, 1, 0, 1), strict=True)]
    assert compare.main(labeled) == 0
    found = {line[0]: line[1:4] for line in cells_of(capsys)[2:]}
    assert list(found) == [f"{row}{new}" for row in ("fp32", "ptq W2A8", "logits W2A8") for new in ("", " new")]
    assert found["fp32 new"] == ["2", "91.00 ± 0.00", "-"]
    assert found["logits W2A8"][2] == "50 ± 0" and found["logits W2A8 new"][2] == "45 ± 0"
    assert compare.main([f"a={tmp_path}/*.json"]) == 2  # wildcards behind a label
    assert "have the same seed" in capsys.readouterr().err
    os.rename(paths[0], tmp_path / "lr=1.json")  # a file as it is, and a folder with such a name
    for name in str(tmp_path / "lr=1.json"), str(tmp_path / "lr=*.json"):
        assert compare.main([name]) == 0 and cells_of(capsys)[2][0] == "fp32"
    assert compare.main([str(tmp_path / "lr=2" / "results.json")]) == 2
    assert "lr=2/results.json is not" in capsys.readouterr().err


def test_differences_of_different_code(tmp_path, capsys):
    runs = [run(fp32=row(0, {}), ptq=row(0, {})) for _ in range(2)]
    for value in runs:
        for i, each in enumerate(value["methods"].values()):
            each["languages"] = packed([1, 1], [1, 0], [1, i])
    first, second = write_runs(tmp_path, runs)
    assert compare.main([first, f"new={second}", "--minus", "fp32"]) == 0
    assert [line[0] for line in cells_of(capsys)[2:]] == ["ptq W2A8", "ptq W2A8 new"]


def test_a_width_has_its_own_student_rate(tmp_path, capsys):
    for bits, seed, lr in ((8, 0, 1e-5), (2, 0, 1e-3), (2, 1, 1e-4)):
        value = run(seed, bits, ptq=row(90, {"de": 1.0, "sw": 2.0}))
        value["config"]["student_lr"] = lr
        (tmp_path / f"{bits}-{seed}.json").write_text(json.dumps(value))
    assert compare.main([str(tmp_path / "*-0.json")]) == 0
    assert compare.main([str(tmp_path / "*.json")]) == 2
    error = capsys.readouterr().err
    assert "differ in --student-lr" in error
    assert "2-0.json" in error and "2-1.json" in error  # not the first file, which is of 8 bits


def test_options_that_a_file_lacks(tmp_path, capsys):
    """A removed option counts where both files have it; a newer one has its default."""
    older, newer = run(ptq=row(50, {"de": 40.0})), run(1, ptq=row(50, {"de": 40.0}))
    older["config"]["grid"] = "full"
    newer["config"] |= {"noise": 0.5, "recipe": "sdq", "check_student": True}
    assert compare.main(write_runs(tmp_path, [older, newer])) == 0
    assert compare.main(write_runs(tmp_path, [newer, older])) == 0
    capsys.readouterr()
    for change in ({"grid": "portable"}, {"noise": 1.0}):
        newer["config"] |= change
        assert compare.main(write_runs(tmp_path, [older, newer])) == 2
        assert f"differ in --{[*change][0]}" in capsys.readouterr().err
        del newer["config"][[*change][0]]


# ------------------------------------------------------------------------------ tasks and losses
def test_table_over_tasks_and_seeds(tmp_path, capsys):
    runs = []
    for seed, up in ((0, 0.0), (1, 2.0)):
        for task, full in (("sst2", 90.0), ("rte", 70.0)):
            base = {"fp32": full + up, "ptq": 50.0 + up, "qat": full - 10 + up}
            runs.append(made_up(task, seed, "logits", base | {"sdq": full - 5 + up}))
            runs.append(made_up(task, seed, "logits+map", {"sdq": full - 3 + up}))
    assert compare.main(write_runs(tmp_path, runs)) == 0
    lines = cells_of(capsys)
    assert lines[0][2:] == ["sst2 (accuracy)", "rte (accuracy)", "mean", "recovered %", "MB"]
    rows = {line[0]: line[1:] for line in lines[2:]}
    assert list(rows) == ["fp32", "ptq W2A8", "qat W2A8", "logits W2A8", "logits+map W2A8"]
    assert rows["fp32"] == ["2", "91.00 ± 1.41", "71.00 ± 1.41", "81.00 ± 1.41", "-", "8.0"]
    # means of the tasks: fp32 80, ptq 50, logits 75: 25 of 30 points
    assert rows["logits W2A8"][4] == "83 ± 0" and rows["logits+map W2A8"][4] == "90 ± 0"
    assert compare.main(write_runs(tmp_path, runs[:-1])) == 0  # rte's second seed of the last row
    last = capsys.readouterr().out.splitlines()[-1].split("|")
    assert last[1:3] == [" logits+map W2A8 ", " 1 to 2 "]


def test_what_ptq_did_not_lose_is_not_recovered(tmp_path, capsys):
    """At 8 bits, say: a difference of a few examples is no share of anything."""
    for ptq in (70.0, 69.0, 71.0):
        rows = {"fp32": 70.0, "ptq": ptq, "qat": 70.5, "sdq": 70.0}
        assert compare.main(write_runs(tmp_path, [made_up("rte", 0, "logits", rows)])) == 0
        assert "recovered" not in capsys.readouterr().out  # a column without a value is left out


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
    """Over all seeds: none is dropped where PTQ happens to lose little."""
    runs = [made_up("rte", seed, "logits", {"fp32": 70.0, "ptq": ptq[seed], "qat": qat[seed]}) for seed in range(2)]
    runs.append(made_up("rte", 2, "logits", {"qat": 10.0}))  # a seed that PTQ lacks
    assert compare.main(write_runs(tmp_path, runs)) == 0
    lines = cells_of(capsys)
    assert "recovered %" in lines[0] if expected else "recovered %" not in lines[0]
    assert [line[3] for line in lines[2:]] == (["-", "-", expected] if expected else ["8.0"] * 3)


def test_a_table_compares_like_with_like(tmp_path, capsys):
    runs = [made_up("rte", 0, "logits", {"sdq": 1.0}), made_up("rte", 0, "logits", {"sdq": 2.0})]
    assert compare.main(write_runs(tmp_path, runs)) == 2
    assert "same seed" in capsys.readouterr().err
    runs[1] = made_up("rte", 1, "logits", {"sdq": 2.0}, lr=2e-4)
    assert compare.main(write_runs(tmp_path, runs)) == 2
    assert "differ in --lr" in capsys.readouterr().err
    runs[1] = made_up("sst2", 1, "logits", {"sdq": 2.0}, lr=2e-4)  # a task has its own recipe
    assert compare.main(write_runs(tmp_path, runs)) == 0
    for task in ("xnli", "atis"):
        both = [runs[0], made_up(task, 0, "logits", {"sdq": 2.0})]
        assert compare.main(write_runs(tmp_path, both)) == 2
        assert "differ in --task" in capsys.readouterr().err


def test_xglue_is_a_table_over_tasks(tmp_path, capsys):
    """The mean over all languages of a task, its worst one, and the mean over tasks."""
    runs = []
    for seed, plus in ((0, 0.0), (1, 2.0)):
        for task, german in (("pos", 70.0), ("ner", 50.0), ("xnli", 60.0)):
            made = made_up(task, seed, "logits+context", {"fp32": 90.0 + plus, "sdq": 80.0})
            for row, less in zip(made["methods"].values(), (0.0, 10.0), strict=True):
                metrics = {**row["languages"]["en"]}
                row["languages"]["de"] = metrics | {TASKS[task].metrics[0]: german - less}
            runs.append(made)
    assert compare.main(write_runs(tmp_path, runs)) == 0
    lines = cells_of(capsys)
    titles = ["xnli (accuracy; worst)", "ner (f1; worst)", "pos (accuracy; worst)"]
    assert lines[0] == ["", "seeds", *titles, "mean", "MB"]
    expected = ["75.50 ± 0.71; de 60.00 ± 0.00", "70.50 ± 0.71; de 50.00 ± 0.00", "80.50 ± 0.71; de 70.00 ± 0.00"]
    assert lines[2][:5] == ["fp32", "2", *expected] and lines[2][5] == "75.50 ± 0.71"
    assert lines[3][2] == "65.00 ± 0.00; de 50.00 ± 0.00"
    assert compare.main(["--languages", *write_runs(tmp_path, runs)]) == 2
    assert "differ in --task: leave out --languages" in capsys.readouterr().err
    assert compare.main(write_runs(tmp_path, runs[:1])) == 0
    assert cells_of(capsys)[0] == ["", "seeds", "en", "zero-shot", "worst", "MB"]


def test_only_zero_shot_tasks_have_languages(tmp_path, capsys):
    for task in ("stsb", "atis"):
        paths = write_runs(tmp_path, [made_up(task, 0, "logits", {"fp32": 80.0})])
        assert compare.main([paths[0], "--languages"]) == 2
        assert "leave out --languages" in capsys.readouterr().err


def test_losses_of_older_and_newer_files_are_rows(tmp_path, capsys):
    """The weights of losses and the order of layers were options of their own."""
    old = {"part_weights": ["map=30.0"]}, {"gamma": 0.5}
    runs = [made_up("rte", 0, "logits+map", {"sdq": 1.0}, **more) for more in ({}, *old)]
    runs.append(made_up("rte", 0, "logits+30*map", {"sdq": 1.0}))
    assert compare.main(write_runs(tmp_path, runs)) == 0
    assert {line[0] for line in cells_of(capsys)[2:]} == {
        "logits+map W2A8",
        "logits+map, map=30.0 W2A8",
        "logits+map, gamma 0.5 W2A8",
        "logits+30*map W2A8",
    }
    layerwise = [
        made_up("xnli", 0, "layerwise", {"sdq": 1.0}, order="bottom-up"),
        made_up("xnli", 0, "layerwise", {"sdq": 2.0}, order="together"),
        made_up("xnli", 1, "layerwise-together", {"sdq": 4.0}),
    ]
    assert compare.main(write_runs(tmp_path, layerwise[:1])) == 0
    assert cells_of(capsys)[2][:3] == ["sdq W2A8", "1", "1.00"]  # one loss needs no name
    assert compare.main(write_runs(tmp_path, layerwise)) == 0
    lines = cells_of(capsys)
    assert lines[2][:3] == ["layerwise W2A8", "1", "1.00"]
    assert lines[3][:3] == ["layerwise-together W2A8", "2", "3.00 ± 1.41"]


@pytest.mark.parametrize(
    ("distill", "weights", "label"),
    [
        ("logits+0*score", {}, "logits"),
        ("logits+map", {"alpha": 0.0}, "map"),
        ("logits+map", {"beta": 0.0}, "logits"),
        ("2*logits+map", {"alpha": 0.0}, "2*logits+map"),  # its own weight
        ("0*logits+0.5*map", {"beta": 0.0}, "0.5*map"),
        ("layerwise", {"beta": 0.0}, "layerwise"),
        ("0*logits", {}, "sdq"),
        ("logits+loss_of_a_fork", {"beta": 0.0}, "logits+loss_of_a_fork"),  # weight unknown
    ],
)
def test_losses_without_weight_are_not_named(distill, weights, label, tmp_path, capsys):
    made = made_up("rte", 0, distill, {"fp32": 3.0, "qat": 2.0, "sdq": 1.0}, **weights)
    assert compare.main(write_runs(tmp_path, [made])) == 0
    assert [line[0] for line in cells_of(capsys)[2:]] == ["fp32", "qat W2A8", f"{label} W2A8"]
    used = made_up("rte", 0, label, {"sdq": 1.0}, **weights)  # the same loss
    assert compare.main(write_runs(tmp_path, [made, used])) == (0 if label == "sdq" else 2)
    assert label == "sdq" or "have the same seed" in capsys.readouterr().err


def test_scales_and_weights_are_rows(tmp_path, capsys):
    """Named where runs differ in them; PTQ's loss is that of the same setting."""
    kinds = ({}, {"per_tensor": True, "act_range": "static"}, {"weights": "lsq"})
    runs = [
        made_up("rte", seed, "logits", {"fp32": 90.0, "ptq": 80.0 - 10 * i, "qat": 85.0}, **kind)
        for seed in (0, 1)
        for i, kind in enumerate(kinds)
    ]
    assert compare.main(write_runs(tmp_path, runs)) == 0
    lines = cells_of(capsys)
    found = {line[0]: line[1:] for line in lines[2:]}
    assert list(found) == [
        "fp32",
        *(f"{m} W2A8{k}" for k in ("", " lsq", " per tensor static") for m in ("ptq", "qat")),
    ]
    percents = [found[f"qat W2A8{kind}"][2] for kind in ("", " per tensor static", " lsq")]
    assert percents == ["50 ± 0", "75 ± 0", "83 ± 0"]
    assert compare.main(write_runs(tmp_path, runs[1:2])) == 0
    assert cells_of(capsys)[3][0] == "ptq W2A8"  # one setting needs no name


def test_scales_of_other_libraries(tmp_path, capsys):
    """Peers have scales per channel: beside runs per tensor, both say so, and they recover nothing of that PTQ's loss."""
    rows = {"fp32": 90.0, "ptq": 80.0, "sdq": 85.0, "onnxruntime": 89.0}
    paths = write_runs(tmp_path, [made_up("rte", 0, "logits", rows, per_tensor=True)])
    assert compare.main(paths) == 0
    found = {line[0]: line[3] for line in cells_of(capsys)[2:]}
    assert found == {"fp32": "-", "ptq W2A8 per tensor": "-", "logits W2A8 per tensor": "50", "onnxruntime W8A8": "-"}
    assert compare.main(write_runs(tmp_path, [made_up("rte", 0, "logits", rows)])) == 0
    assert [line[0] for line in cells_of(capsys)[3:]] == ["ptq W2A8", "logits W2A8", "onnxruntime W8A8"]


def packed(*rows):
    return {
        name: {"accuracy": 100 * sum(row) / len(row), "total": len(row), "correct_rows": compare_pack(row)}
        for name, row in zip(("en", "de", "sw"), rows, strict=True)
    }


def compare_pack(row):
    return np.packbits(row).tobytes().hex()


def test_differences_are_paired_over_rows(tmp_path, capsys):
    """Against the differences by hand: 10 rows, seeds and languages averaged first."""
    generator = np.random.default_rng(0)
    right = generator.random((2, 2, 3, 10)) < 0.6  # (seed, method, language, row)
    runs = []
    for seed in (0, 1):
        value = run(seed, fp32=row(0, {}), ptq=row(0, {}))
        for i, name in enumerate(("fp32", "ptq")):
            value["methods"][name]["languages"] = packed(*right[seed, i])
        runs.append(value)
    assert compare.main([*write_runs(tmp_path, runs), "--minus", "fp32"]) == 0
    lines = cells_of(capsys)
    assert lines[0][0] == "minus fp32" and len(lines) == 3
    difference = right[:, 1].astype(float) - right[:, 0]  # (seed, language, row)
    for cell, values in zip(lines[2][2:4], (difference[:, 0], difference[:, 1:].mean(1)), strict=True):
        by_row = 100 * values.mean(0)
        assert cell == f"{by_row.mean():+.2f} ± {by_row.std(ddof=1) / 10**0.5:.2f}"
    assert lines[2][4] == " ".join(f"{100 * d:+.2f}" for d in difference[:, 1:].mean((1, 2)))
    assert compare.main([*write_runs(tmp_path, [made_up("stsb", 0, "logits", {"sdq": 1.0})]), "--minus", "ptq"]) == 2
    assert "leave out --minus" in capsys.readouterr().err
    assert compare.main([*write_runs(tmp_path, runs), "--minus", "nonsense"]) == 2
    assert "no row of nonsense" in capsys.readouterr().err
    for change in ({"total": 9}, {"correct_rows": None}):
        other = json.loads(json.dumps(runs))
        found = other[0]["methods"]["ptq"]["languages"]["de"]
        found |= change
        if change.get("correct_rows", 1) is None:
            del found["correct_rows"]
        assert compare.main([*write_runs(tmp_path, other), "--minus", "fp32"]) == 2
        assert "these files hold no such rows" in capsys.readouterr().err
    runs[0]["methods"]["onnxruntime"] = runs[0]["methods"]["ptq"]
    runs[0]["config"]["bits"] = 4
    assert compare.main(write_runs(tmp_path, runs[:1])) == 0
    assert [line[0] for line in cells_of(capsys)[2:]] == ["fp32", "ptq W4A8", "onnxruntime W8A8"]


# ---------------------------------------------------------------------------------- joint tasks
def joint_runs(*options):
    """Runs of ATIS. options: (rank, bits, methods, further options) of each."""
    runs = []
    for rank, bits, methods, *more in options:
        for seed in (0, 1):
            config = {"model": "scratch", "tt_rank": rank, "bits": bits, **dict(*more)}
            made = made_up("atis", seed, "logits", dict.fromkeys(methods, 90.0 + seed), **config)
            for name, each in made["methods"].items():
                each["size_bytes"] = 1e5 // (1 + rank) * (32 if name == "fp32" else bits)
            runs.append(made)
    return runs


def test_table_over_seeds_ranks_and_widths(tmp_path, capsys):
    runs = joint_runs((0, 8, ["fp32"]), (4, 8, ["fp32", "ptq"]), (4, 2, ["ptq"]))
    assert compare.main(write_runs(tmp_path, runs)) == 0
    lines = cells_of(capsys)
    assert lines[0] == ["", "seeds", "kB", "smaller", *TASKS["atis"].columns]
    assert [line[0] for line in lines[2:]] == [
        "dense fp32", "TT rank 4 fp32", "TT rank 4 ptq W8A8", "TT rank 4 ptq W2A8",
    ]  # fmt: skip
    assert all(line[1] == "2" for line in lines[2:]) and lines[2][3] == "1x"
    sizes = [float(line[2].replace(",", "")) for line in lines[2:]]
    assert sizes == sorted(sizes, reverse=True)


def test_shapes_of_joint_models(tmp_path, capsys):
    """Tables of embeddings are told apart, and the teacher of a pretrained model is dense."""
    runs = joint_runs(
        (4, 8, ["fp32", "ptq"], {"model": "minilm"}), (4, 8, ["ptq"], {"model": "minilm", "tt_embedding_rank": 6})
    )
    assert compare.main(write_runs(tmp_path, runs)) == 0
    assert [line[0] for line in cells_of(capsys)[2:]] == [
        "dense fp32", "TT rank 4 ptq W8A8", "TT rank 4, embedding 6 ptq W8A8",
    ]  # fmt: skip


def test_latency_stands_beside_its_backend(tmp_path, capsys):
    (results,) = write_runs(tmp_path, joint_runs((4, 8, ["fp32", "ptq"], {"act_range": "static"}))[:1])
    measured = [
        {"name": name, "batch_size": size, "median_ms": 10 * size + i}
        for size in (1, 2)
        for i, name in enumerate(("dense fp32", "TT fp32, merged", "TT W8A8 static"))
    ]
    path = tmp_path / "tt.json"
    for rank, expected in ((4, ["12.0", "22.0"]), (5, ["-", "-"])):
        path.write_text(json.dumps({"shape": {"rank": rank}, "models": measured}))
        command = [results, "--latency", str(path)]
        assert compare.main(command) == 0
        lines = cells_of(capsys)
        assert lines[0][-2:] == ["ms x 1", "ms x 2"] and lines[-1][0] == "TT rank 4 ptq W8A8"
        assert lines[-1][-2:] == expected
    assert compare.main([command[0], "--latency", command[0]]) == 2
    assert "is not a JSON of bench.py tt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("xnli-mini/*.json", ["sdq W2A8", "3", "68.04 ± 5.52", "44.85 ± 0.97", "tr 38.80 ± 4.24", "27 ± 4", "0.9"]),
        ("--languages xnli-minilm/*.json", ["sdq W4A8", "67.1"]),
        ("layerwise/*.json", ["layerwise-together W32A32", "3", "97.87 ± 0.13", "1.5"]),
    ],
)
def test_committed_results(options, line, capsys):
    """Written before some options were removed (README's tables: test_readme.py)."""
    words = options.split()
    assert compare.main([*words[:-1], os.path.join(ROOT, "results", words[-1])]) == 0
    assert cells_of(capsys)[-1] == line

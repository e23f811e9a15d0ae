"""report.py: the arithmetic of the tables."""

import json

import pytest

import plot
import report


def row(english, others, size=1e6):
    languages = {"en": {"accuracy": english}}
    languages |= {name: {"accuracy": value} for name, value in others.items()}
    return {**report.summarize(languages, "en"), "size_bytes": size, "train_seconds": 1.0}


def run(seed=0, bits=2, **rows):
    config = {"task": "xnli", "seed": seed, "bits": bits, "act_bits": 8, "lr": 1e-3}
    return {"config": config, "methods": rows, "languages": ["en", "de", "sw"]}


def test_zero_shot_mean_leaves_english_out():
    assert row(90.0, {"de": 80.0, "sw": 70.0})["zero_shot_mean"] == 75.0
    assert row(90.0, {})["zero_shot_mean"] is None


def test_recovered():
    rows = {
        "fp32": row(90, {"de": 80.0}),
        "ptq": row(60, {"de": 40.0}),
        "sdq": row(80, {"de": 70.0}),
    }
    assert report.recovered(rows, "sdq") == pytest.approx(75.0)
    assert report.recovered(rows, "ptq") is None and report.recovered(rows, "fp32") is None
    rows["ptq"] = row(90, {"de": 79.5})  # nothing worth recovering
    assert report.recovered(rows, "sdq") is None
    english = {"fp32": row(90, {}), "ptq": row(60, {}), "qat": row(75, {})}
    assert report.recovered(english, "qat") == pytest.approx(50.0)


def test_table_has_every_row_and_language():
    rows = {"fp32": row(90, {"de": 80.0, "sw": 70.0}), "ptq": row(60, {"de": 40.0, "sw": 30.0})}
    lines = report.table(run(**rows)).split("\n")
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert [cell.strip() for cell in lines[3].split("|")][1:7] == [
        "ptq",
        "60.00",
        "35.00",
        "-",
        "-",
        "1.0",
    ]
    rows["ptq"]["student"] = row(61, {"de": 42.0, "sw": 30.0})
    assert "| 61.00 / 36.00 |" in report.table(run(**rows))


def test_over_seeds(tmp_path, capsys):
    paths = []
    for bits in (8, 2):
        for seed, plus in ((0, 0.0), (1, 2.0)):
            rows = {
                "fp32": row(90 + plus, {"de": 80.0}),
                "ptq": row(50 + bits + plus, {"de": 40.0}),
            }
            path = tmp_path / f"{bits}-{seed}.json"
            path.write_text(json.dumps(run(seed, bits, **rows)))
            paths.append(str(path))
    assert report.main(paths) == 0
    lines = [[c.strip() for c in x.split("|")[1:-1]] for x in capsys.readouterr().out.splitlines()]
    assert lines[2][:4] == ["fp32", "2", "91.00 ± 1.41", "80.00 ± 0.00"]  # not counted twice
    assert lines[3][:3] == ["ptq W8A8", "2", "59.00 ± 1.41"]
    assert lines[4][:3] == ["ptq W2A8", "2", "53.00 ± 1.41"]


def test_languages_over_seeds(tmp_path, capsys):
    for seed, plus in ((0, 0.0), (1, 3.0)):
        rows = {"ptq": row(50 + plus, {"de": 40.0 + plus, "sw": 20.0})}
        (tmp_path / f"{seed}.json").write_text(json.dumps(run(seed, **rows)))
    assert report.main(["--languages", str(tmp_path / "*.json")]) == 0
    lines = [[c.strip() for c in x.split("|")[1:-1]] for x in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["", "en", "de", "sw"]
    assert lines[2] == ["ptq W2A8", "51.5", "41.5", "20.0"]


def test_the_same_run_counts_once(tmp_path, capsys):
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps(run(fp32=row(90, {}))))
    assert report.main([str(tmp_path / "*.json")]) == 2  # and wildcards work
    assert "have the same seed, width and rank" in capsys.readouterr().err


def test_unlike_runs_are_not_mixed(tmp_path, capsys):
    paths = []
    for i, lr in enumerate((1e-3, 1e-4)):
        value = run(fp32=row(90, {}))
        value["config"]["lr"] = lr
        paths.append(str(tmp_path / f"{i}.json"))
        with open(paths[-1], "w") as file:
            json.dump(value, file)
    assert report.main(paths) == 2
    assert "differ in --lr" in capsys.readouterr().err
    for text in ("[]", "{", '{"config": {"seed": 0}}', '{"config": {}, "methods": {}}'):
        (tmp_path / "bad.json").write_text(text)
        assert report.main([str(tmp_path / "bad.json")]) == 2
        assert "is not a results.json" in capsys.readouterr().err


def test_a_width_has_its_own_student_rate(tmp_path, capsys):
    for bits, seed, lr in ((8, 0, 1e-5), (2, 0, 1e-3), (2, 1, 1e-4)):
        value = run(seed, bits, ptq=row(90, {"de": 1.0, "sw": 2.0}))
        value["config"]["student_lr"] = lr
        (tmp_path / f"{bits}-{seed}.json").write_text(json.dumps(value))
    assert report.main([str(tmp_path / "*-0.json")]) == 0
    assert report.main([str(tmp_path / "*.json")]) == 2
    assert "differ in --student-lr" in capsys.readouterr().err


def test_figures(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for seed, bits in ((0, 8), (1, 8), (0, 2)):
        rows = {"ptq": row(50 + bits, {"de": 40.0}), "sdq": row(60, {"de": 50.0})}
        if bits == 8:
            rows["fp32"] = row(90, {"de": 80.0})
        value = {**run(seed, bits, **rows), "model": "m", "languages": ["en", "de"]}
        value["config"]["eval_split"] = "test"
        (tmp_path / f"{bits}-{seed}.json").write_text(json.dumps(value))
    for name, files in (("bits", "*.json"), ("no-fp32", "2-0.json"), ("one", "8-0.json")):
        out = tmp_path / f"{name}.png"
        assert plot.main([str(tmp_path / files), "--out", str(out)]) == 0
        assert out.stat().st_size > 5000
    no_errors = [str(tmp_path / "8-0.json"), "--errors", "--out", str(tmp_path / "x.png")]
    assert plot.main(no_errors) == 2 and "--analyze" in capsys.readouterr().err
    assert plot.main([str(tmp_path / "8-0.json"), "--out", str(tmp_path / "x.nonsense")]) == 2
    assert plot.main([str(tmp_path / "none.json"), "--out", str(tmp_path / "x.png")]) == 2
    assert capsys.readouterr().err.count("error: ") == 2

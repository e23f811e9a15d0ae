"""bench.py: the arithmetic of its summaries, and the benchmark itself on a tiny model."""

import json

import pytest
import torch

import bench

TINY = "train --layers 1 --hidden 64 --vocab 500 --batch-size 2 --tokens 16 --rounds 3 --device cpu"


def test_summary_takes_medians_of_ratios():
    times = {"fp32": [1.0, 2.0, 4.0], "qat": [1.5, 2.0, 8.0]}
    rows = bench.summarize(times, "fp32")
    assert rows["qat"]["ratio"] == 1.5 and rows["fp32"]["ratio"] == 1.0
    assert rows["qat"]["median_ms"] == 2000.0
    assert bench.summarize({"fp32": [2.0]}, "fp32")["fp32"]["quartiles_ms"] == [2000.0, 2000.0]


def test_interleave_runs_every_variant_in_every_round():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = bench.interleave(variants, 3, torch.device("cpu"), warmup=1)
    assert calls == ["a", "b"] * 4 and [len(t) for t in times.values()] == [3, 3]


def test_train_benchmark(tmp_path, capsys):
    path = tmp_path / "train.json"
    assert bench.main([*TINY.split(), "--json", str(path)]) == 0
    assert "| sdq " in capsys.readouterr().out
    result = json.loads(path.read_text())
    assert set(result["rows"]) == {"fp32", "qat", "sdq"} and result["rows"]["fp32"]["ratio"] == 1.0
    assert all(row["median_ms"] > 0 for row in result["rows"].values())
    assert result["hardware"] and result["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--rounds 0", "--rounds 0"),
        ("--hidden 100 --layers 0", "--layers 0"),
        ("--noise 2", "--noise 2"),
        ("--threads -1", "--threads -1"),
        ("--threads 0", "--threads 0"),
        ("--hidden 131", "not divisible"),
    ],
)
def test_refusals(options, message, capsys):
    assert bench.main(["train", *options.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_unwritable_json(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert bench.main([*TINY.split(), "--json", str(tmp_path / "file" / "x.json")]) == 2
    assert "cannot write --json" in capsys.readouterr().err

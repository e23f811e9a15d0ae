"""bench.py: the arithmetic of its summaries, and the benchmark itself on a tiny model."""

import json

import pytest
import torch

import bench
import forms
import plot
from model import ModelConfig

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


OURS = ("fp32", "fake-quantized", "int8 dynamic", "int8 static")
SMALL = "--layers 1 --hidden 64 --rounds 2 --device cpu".split()


def bench_to_json(tmp_path, *options):
    path = tmp_path / "figures.json"
    assert bench.main([*options, *SMALL, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def drawn(tmp_path):
    """plot.py makes a figure of what bench_to_json wrote, where matplotlib is installed."""
    pytest.importorskip("matplotlib")
    out = tmp_path / "figure.png"
    assert plot.main([str(tmp_path / "figures.json"), "--out", str(out)]) == 0
    assert out.stat().st_size > 5000


def test_matmul_benchmark(tmp_path, capsys):
    result = bench_to_json(tmp_path, "matmul", "--sizes", "1", "40")
    assert {(row["M"], row["K"], row["N"]) for row in result["rows"]} == {
        (M, *shape) for M in (1, 40) for shape in ((64, 64), (64, 256), (256, 64))
    }
    errors = {row["name"]: row["error"] for row in result["rows"]}
    assert errors["fp32"] < 1e-6 < 1e-3 < errors["int8 dynamic"] < 0.05
    assert errors["int8 product"] < 0.05 and 0 < errors["torch.ao int8 dynamic"] < 0.05
    assert "GOP/s" in capsys.readouterr().out
    drawn(tmp_path)


def test_model_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(forms, "available", lambda device: OURS)
    measure = forms.peak_memory  # one real process is enough for a test
    monkeypatch.setattr(forms, "peak_memory", lambda n, *x: measure(n, *x) if n == "fp32" else None)
    options = "model --vocab 30000 --tokens 20 --sizes 1 3".split()
    rows = bench_to_json(tmp_path, *options)["rows"]
    assert [(row["name"], row["batch_size"]) for row in rows] == [
        (n, b) for b in (1, 3) for n in OURS
    ]
    found = {row["name"]: row for row in rows}
    sizes = {name: row["size_bytes"] for name, row in found.items()}
    assert sizes["int8 static"] < 0.3 * sizes["fp32"]
    assert found["fp32"]["error"] == 0 < found["int8 static"]["error"] < 0.1
    assert found["int8 dynamic"]["error"] == found["fake-quantized"]["error"]  # the same bits
    if found["fp32"]["peak_bytes"] is not None:
        assert found["fp32"]["peak_bytes"] > 50e6  # a process with PyTorch in it
    drawn(tmp_path)


def test_rows_benchmark(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(forms, "available", lambda device: OURS)
    result = bench_to_json(tmp_path, "rows", "--rows", "40", "--tokens", "32")
    assert result["same_logits_as_student"] == 40
    assert set(result["rows"]) == {
        "fp32, file order",
        *(f"{n}, by length" for n in OURS if n[1] != "a"),
    }
    assert all(row["rows_per_second"] > 0 for row in result["rows"].values())
    assert all(share >= 1 for share in result["tokens_with_padding"].values())
    assert "bit for bit, in 40 rows" in capsys.readouterr().out
    drawn(tmp_path)


def test_what_is_not_installed_is_said(monkeypatch, capsys):
    monkeypatch.setattr(forms.importlib.util, "find_spec", lambda name: None)
    assert forms.available(torch.device("cpu")) == OURS
    assert "Hugging Face fp32: not measured, transformers" in capsys.readouterr().out


def test_hugging_face_computes_the_same(tmp_path):
    pytest.importorskip("transformers")
    config = ModelConfig(300, 64, 2, 1, 128, 64, head="sequence", num_labels=3)
    names = ("Hugging Face fp32", "fp32", "torch.ao int8 dynamic")
    forms.write_files(config, str(tmp_path), names)
    cpu, ids = torch.device("cpu"), torch.randint(4, 299, (3, 20))
    runners = {name: forms.load(name, str(tmp_path), cpu) for name in names}
    with torch.inference_mode():
        errors = bench.errors_of(runners, ids)
    assert errors["Hugging Face fp32"] < 1e-5 < errors["torch.ao int8 dynamic"] < 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--rounds 0", "--rounds 0"),
        ("--hidden 100 --layers 0", "--layers 0"),
        ("--noise 2", "--noise 2"),
        ("--threads -1", "--threads -1"),
        ("--threads 0", "--threads 0"),
        ("--hidden 131", "not divisible"),
        ("--rows 0", "--rows 0"),
    ],
)
def test_refusals(options, message, capsys):
    assert bench.main(["train", *options.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_rows_refusals(capsys, tmp_path):
    for options, message in (
        (["--tokenizer", str(tmp_path / "none")], "no tokenizer at"),
        (["--data-dir", str(tmp_path)], "fetch"),
    ):
        assert bench.main(["rows", *options]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error


def test_unwritable_json(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert bench.main([*TINY.split(), "--json", str(tmp_path / "file" / "x.json")]) == 2
    assert "cannot write --json" in capsys.readouterr().err

"""bench.py: medians and ratios, and every benchmark on a tiny model."""

import importlib.util
import json

import pytest
import torch

import bench
from kit.common import multiplies_bf16
from tools import backends, plot
from tt import TTConfig, TTLinear

OURS = ("fp32", "fake-quantized", "int8 dynamic", "int8 static")
SMALL = "--hidden 64 --rounds 2 --device cpu".split()


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch):
    monkeypatch.setattr(bench.time, "sleep", lambda seconds: None)


def bench_to_json(tmp_path, options):
    """The JSON of a benchmark; where matplotlib is installed tools/plot.py has to draw it."""
    path, figure = tmp_path / "figures.json", tmp_path / "figure.png"
    assert bench.main([*options.split(), *SMALL, "--json", str(path)]) == 0
    if importlib.util.find_spec("matplotlib"):
        assert plot.main([str(path), "--out", str(figure)]) == 0
    return json.loads(path.read_text())


# ----------------------------------------------------------------------------------------- timing
def test_medians_of_times_and_of_ratios():
    times = {"fp32": [1.0, 2.0, 4.0], "qat": [1.5, 2.0, 8.0]}
    rows = bench.medians(times)
    assert rows["qat"]["ratio"] == 1.5 and rows["fp32"]["ratio"] == 1.0
    assert rows["qat"]["median_ms"] == 2000.0
    assert rows["qat"]["quartiles_ms"] == [1750.0, 5000.0]
    assert bench.medians({"fp32": [2.0]})["fp32"]["quartiles_ms"] == [2000.0, 2000.0]


@pytest.mark.parametrize(
    ("options", "called"), [({}, "a b"), ({"calls": 3}, "a a a b b b"), ({"warm": True}, "a a b b")]
)
def test_interleave_runs_every_variant_in_every_round(options, called):
    """Two rounds of warm-up and three measured ones."""
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = bench.interleave(variants, 3, **options)
    assert calls == called.split() * 5 and [len(t) for t in times.values()] == [3, 3]


# ------------------------------------------------------------------------------------- benchmarks
def test_train_benchmark(tmp_path, capsys):
    result = bench_to_json(tmp_path, "train --layers 1 --vocab 500 --batch-size 2 --tokens 16")
    assert "| sdq " in capsys.readouterr().out
    labels = ["", ", bf16"] if multiplies_bf16(torch.device("cpu")) else [""]
    assert list(result["rows"]) == [name + label for name in ("fp32", "qat", "sdq") for label in labels]
    assert result["rows"]["fp32"]["ratio"] == 1.0
    assert all(row["median_ms"] > 0 for row in result["rows"].values())
    assert result["hardware"] and result["torch"] == torch.__version__ and result["noise"] == 0.5
    assert result["shape"] == {"layers": 1, "hidden": 64, "vocab": 500, "batch_size": 2, "tokens": 16}


def test_matmul_benchmark(tmp_path, capsys):
    result = bench_to_json(tmp_path, "matmul --sizes 1 40")
    assert {(row["M"], row["K"], row["N"]) for row in result["rows"]} == {
        (M, *shape) for M in (1, 40) for shape in ((64, 64), (64, 256), (256, 64))
    }
    errors = {row["name"]: row["error"] for row in result["rows"]}
    assert errors["fp32"] < 1e-6 < 1e-3 < errors["int8 dynamic"] < 0.05
    assert errors["int8 product"] < 0.05 and 0 < errors["torch.ao int8 dynamic"] < 0.05
    assert "GOP/s" in capsys.readouterr().out


def test_model_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "available_backends", lambda device: OURS)
    measure = backends.peak_memory  # one real process is enough for a test
    monkeypatch.setattr(backends, "peak_memory", lambda name, *x: measure(name, *x) if name == "fp32" else None)
    rows = bench_to_json(tmp_path, "model --layers 1 --vocab 30000 --tokens 20 --sizes 1 3")["rows"]
    sizes = [(1, 5), (1, 20), (3, 20)]
    assert [(row["batch_size"], row["tokens"], row["name"]) for row in rows] == [(*s, n) for s in sizes for n in OURS]
    found = {row["name"]: row for row in rows}
    sizes = {name: row["size_bytes"] for name, row in found.items()}
    assert sizes["int8 static"] < 0.3 * sizes["fp32"]
    assert found["fp32"]["error"] == 0 < found["int8 static"]["error"] < 0.1
    assert found["int8 dynamic"]["error"] == found["fake-quantized"]["error"]  # the same bits
    if found["fp32"]["peak_bytes"] is not None:
        assert found["fp32"]["peak_bytes"] > 50e6  # a process with PyTorch in it


LAYERS = ["dense", "TTLinear"]
MODELS = ["dense fp32", "TT fp32", "TT fp32, merged", *backends.TT_INTEGER]


def test_tt_benchmark(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(backends, "is_installed", lambda package: False)
    monkeypatch.setattr(backends, "has_compiler", lambda device: False)  # compiling takes long
    result = bench_to_json(tmp_path, "tt --layers 1 --vocab 100 --tokens 9 --rank 3 --sizes 40")
    assert result["tltorch"] is None
    assert [(row["K"], row["N"], row["name"]) for row in result["layers"]] == [
        (*shape, name) for shape in ((64, 64), (64, 256), (256, 64)) for name in LAYERS
    ]
    for row in result["layers"]:
        assert row["M"] == 40 and row["forward"]["median_ms"] > 0
        assert row["name"] == "dense" or row["parameters"] < 600
        assert row["flops"] == 2 * 40 * row["K"] * row["N"] or row["name"] != "dense"
    assert [(row["name"], row["batch_size"]) for row in result["models"]] == [
        (name, batch_size) for batch_size in (1, 32) for name in MODELS
    ]
    sizes = {row["name"]: row["size_bytes"] for row in result["models"]}
    assert sizes["TT W2A8 static"] < sizes["TT W4A8 static"] < sizes["TT W8A8 static"]
    assert sizes["TT fp32, merged"] == sizes["TT fp32"] < sizes["dense fp32"] / 2
    assert list(result["training"]) == ["dense", "TT fp32", "TT W8A8"]
    dense, train, _ = result["training"].values()
    assert dense["ratio"] == 1 and dense["epoch_seconds"] > 0
    assert train["state_bytes"] < dense["state_bytes"] / 2
    text = capsys.readouterr().out
    for what in (*LAYERS, *MODELS, "64 x 256", "32 x 9", "s per epoch", "tltorch: not measured"):
        assert what in text


def test_forward_and_backward_gives_all_gradients():
    layer = TTLinear.like(torch.nn.Linear(12, 20), TTConfig(rank=3)).double()
    x = torch.randn(7, 12, dtype=torch.double)
    upstream = torch.randn(7, 20, dtype=torch.double)
    found = bench.forward_and_backward(layer, x, upstream)
    assert len(found) == 2 + 6 and all(gradient.abs().sum() > 0 for gradient in found)
    assert x.grad is None and all(parameter.grad is None for parameter in layer.parameters())
    x.requires_grad_()
    layer(x).backward(upstream)
    expected = [x.grad, *(parameter.grad for parameter in layer.parameters())]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


# ----------------------------------------------------------------------------------- command line
@pytest.mark.parametrize("option", ["--rounds 0", "--threads -1", "--vocab 7"])
def test_invalid_options(option, capsys):
    with pytest.raises(SystemExit):
        bench.main(["train", *option.split()])
    assert f"argument {option.split()[0]}: {option.split()[1]}: choose" in capsys.readouterr().err
    assert bench.main("train --hidden 131 --layers 1".split()) == 2
    assert "not divisible" in capsys.readouterr().err

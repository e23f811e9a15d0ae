"""bench.py: medians and ratios, and every benchmark on a tiny model."""

import json

import pytest
import torch

import bench
from kit.common import multiplies_bf16
from tools import backends, plot
from tt import TTConfig, TTLinear

TINY = "train --layers 1 --hidden 64 --vocab 500 --batch-size 2 --tokens 16 --rounds 3 --device cpu"
OURS = ("fp32", "fake-quantized", "int8 dynamic", "int8 static")
SMALL = "--layers 1 --hidden 64 --rounds 2 --device cpu".split()


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch):
    monkeypatch.setattr(bench.time, "sleep", lambda seconds: None)


def bench_to_json(tmp_path, *options):
    path = tmp_path / "figures.json"
    assert bench.main([*options, *SMALL, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def check_figure(tmp_path):
    """tools/plot.py draws what bench_to_json wrote, where matplotlib is installed."""
    pytest.importorskip("matplotlib")
    out = tmp_path / "figure.png"
    assert plot.main([str(tmp_path / "figures.json"), "--out", str(out)]) == 0
    assert out.stat().st_size > 5000


# ----------------------------------------------------------------------------------------- timing
def test_medians_of_times_and_of_ratios():
    times = {"fp32": [1.0, 2.0, 4.0], "qat": [1.5, 2.0, 8.0]}
    rows = bench.medians(times)
    assert rows["qat"]["ratio"] == 1.5 and rows["fp32"]["ratio"] == 1.0
    assert rows["qat"]["median_ms"] == 2000.0
    assert rows["qat"]["quartiles_ms"] == [1750.0, 5000.0]
    assert bench.medians({"fp32": [2.0]})["fp32"]["quartiles_ms"] == [2000.0, 2000.0]


def test_interleave_runs_every_variant_in_every_round():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = bench.interleave(variants, 3, torch.device("cpu"), warmup=1)
    assert calls == ["a", "b"] * 4 and [len(t) for t in times.values()] == [3, 3]
    calls.clear()
    times = bench.interleave(variants, 2, torch.device("cpu"), calls=3, warmup=0)
    assert calls == [*"aaabbb"] * 2 and [len(t) for t in times.values()] == [2, 2]
    calls.clear()
    bench.interleave(variants, 1, torch.device("cpu"), warmup=0, warm=True)
    assert calls == [*"aabb"]


# ------------------------------------------------------------------------------------- benchmarks
def test_train_benchmark(tmp_path, capsys):
    path = tmp_path / "train.json"
    assert bench.main([*TINY.split(), "--json", str(path)]) == 0
    assert "| sdq " in capsys.readouterr().out
    result = json.loads(path.read_text())
    labels = ["", ", bf16"] if multiplies_bf16(torch.device("cpu")) else [""]
    assert list(result["rows"]) == [name + label for name in ("fp32", "qat", "sdq") for label in labels]
    assert result["rows"]["fp32"]["ratio"] == 1.0
    assert all(row["median_ms"] > 0 for row in result["rows"].values())
    assert result["hardware"] and result["torch"] == torch.__version__
    assert result["shape"]["batch_size"] == 2 and result["noise"] == 0.5


def test_matmul_benchmark(tmp_path, capsys):
    result = bench_to_json(tmp_path, "matmul", "--sizes", "1", "40")
    assert {(row["M"], row["K"], row["N"]) for row in result["rows"]} == {
        (M, *shape) for M in (1, 40) for shape in ((64, 64), (64, 256), (256, 64))
    }
    errors = {row["name"]: row["error"] for row in result["rows"]}
    assert errors["fp32"] < 1e-6 < 1e-3 < errors["int8 dynamic"] < 0.05
    assert errors["int8 product"] < 0.05 and 0 < errors["torch.ao int8 dynamic"] < 0.05
    assert "GOP/s" in capsys.readouterr().out
    check_figure(tmp_path)


def test_model_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "available_backends", lambda device: OURS)
    measure = backends.peak_memory  # one real process is enough for a test
    monkeypatch.setattr(backends, "peak_memory", lambda name, *x: measure(name, *x) if name == "fp32" else None)
    options = "model --vocab 30000 --tokens 20 --sizes 1 3".split()
    rows = bench_to_json(tmp_path, *options)["rows"]
    sizes = [(1, 5), (1, 20), (3, 20)]
    assert [(row["batch_size"], row["tokens"], row["name"]) for row in rows] == [(*s, n) for s in sizes for n in OURS]
    found = {row["name"]: row for row in rows}
    sizes = {name: row["size_bytes"] for name, row in found.items()}
    assert sizes["int8 static"] < 0.3 * sizes["fp32"]
    assert found["fp32"]["error"] == 0 < found["int8 static"]["error"] < 0.1
    assert found["int8 dynamic"]["error"] == found["fake-quantized"]["error"]  # the same bits
    if found["fp32"]["peak_bytes"] is not None:
        assert found["fp32"]["peak_bytes"] > 50e6  # a process with PyTorch in it
    check_figure(tmp_path)


def test_rows_benchmark(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(backends, "available_backends", lambda device: OURS)
    result = bench_to_json(tmp_path, "rows", "--rows", "40", "--tokens", "32")
    assert result["same_logits_as_student"] == 40 and result["shape"]["rows"] == 40
    assert set(result["rows"]) == {"fp32, file order", *(f"{n}, by length" for n in OURS if n != "fake-quantized")}
    assert all(row["rows_per_second"] > 0 for row in result["rows"].values())
    assert all(share >= 1 for share in result["tokens_with_padding"].values())
    assert "bit for bit, in 40 rows" in capsys.readouterr().out
    check_figure(tmp_path)


LAYERS = ["dense", "TTLinear"]
MODELS = ["dense fp32", "TT fp32", "TT fp32, merged", *backends.TT_INTEGER]


def test_tt_benchmark(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(backends, "has_tltorch", lambda: False)
    monkeypatch.setattr(backends, "has_compiler", lambda device: False)  # compiling takes long
    result = bench_to_json(tmp_path, *"tt --vocab 100 --tokens 9 --rank 3 --sizes 40".split())
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
    check_figure(tmp_path)


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


def test_hand_written_backward_in_committed_results_is_shown():
    """An earlier version measured it, too."""
    times = {"median_ms": 2.0, "quartiles_ms": [1.0, 3.0], "ratio": 0.5}
    row = {"name": "TTLinear, backward by hand", "M": 4, "K": 2, "N": 3, "parameters": 5}
    row |= {"flops": None, "forward": times, "with_backward": times}
    model = {"name": "dense fp32", "batch_size": 1, "tokens": 9, "size_bytes": 10, **times}
    result = {"layers": [row], "models": [model], "training": {}, "shape": {}}
    assert "| TTLinear, backward by hand |" in bench.tt_table(result)
    assert "| 2.00 (0.50x) |" in bench.tt_table(result)


# ----------------------------------------------------------------------------------- command line
def test_defaults_of_tt(monkeypatch):
    for what, expected in (("tt", (2, 614, 32, 14, [4096])), ("train", (12, 250002, 16, 128))):
        seen = []
        _, *rest = bench.BENCHMARKS[what]
        monkeypatch.setitem(bench.BENCHMARKS, what, (lambda args, seen=seen: seen.append(args) or {}, *rest))
        with pytest.raises(KeyError):  # there are no figures to show
            bench.main([what, "--device", "cpu"])
        names = ("layers", "vocab", "batch_size", "tokens", "sizes")[: len(expected)]
        assert tuple(getattr(seen[0], name) for name in names) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--rounds 0", "--rounds 0"),
        ("--hidden 100 --layers 0", "--layers 0"),
        ("--threads -1", "--threads -1"),
        ("--threads 0", "--threads 0"),
        ("--hidden 131", "not divisible"),
        ("--rows 0", "--rows 0"),
        ("--rank 0", "--rank 0"),
        ("--rank 5000", "--rank 5000: choose 1 to 4096"),
        ("--vocab 7", "--vocab 7"),
        ("--sizes 4 0", "--sizes 0"),
    ],
)
def test_invalid_options(options, message, capsys):
    assert bench.main(["train", *options.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_missing_tokenizer_or_data(capsys, tmp_path):
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
    assert capsys.readouterr().err.startswith("error: ")

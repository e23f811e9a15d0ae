"""bench.py: the arithmetic of its summaries, and the benchmark itself on a tiny model."""

import json

import pytest
import torch

import bench
import bench_tt
import forms
import plot
from model import ModelConfig, build_model
from tt import TTConfig, TTLinear

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


LAYERS = ["dense", "TTLinear", "TTLinear, backward by hand"]
MODELS = ["dense fp32", "TT fp32", "TT fp32, merged", *bench_tt.INTEGER_FORMS]


def test_tt_benchmark(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_tt, "has_tltorch", lambda: False)
    result = bench_to_json(tmp_path, *"tt --vocab 100 --tokens 9 --rank 3 --sizes 40".split())
    assert result["tltorch"] is None
    assert [(row["K"], row["N"], row["name"]) for row in result["layers"]] == [
        (*shape, name) for shape in ((64, 64), (64, 256), (256, 64)) for name in LAYERS
    ]
    for row in result["layers"]:
        assert row["M"] == 40 and row["forward"]["median_ms"] > 0
        assert row["name"] == "dense" or row["parameters"] < 600
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
    for what in (*LAYERS, *MODELS, "64 x 256", "32 x 9", "s an epoch", "tltorch: not measured"):
        assert what in text
    drawn(tmp_path)


def test_defaults_of_tt(monkeypatch):
    for what, expected in (("tt", (2, 614, 32, 14, [4096])), ("train", (12, 250002, 16, 128))):
        seen = []
        _, *rest = bench.BENCHMARKS[what]
        monkeypatch.setitem(
            bench.BENCHMARKS, what, (lambda args, device, seen=seen: seen.append(args) or {}, *rest)
        )
        with pytest.raises(KeyError):  # there are no figures to show
            bench.main([what, "--device", "cpu"])
        names = ("layers", "vocab", "batch_size", "tokens", "sizes")[: len(expected)]
        assert tuple(getattr(seen[0], name) for name in names) == expected


def test_backward_by_hand_is_autograds():
    layer = TTLinear.like(torch.nn.Linear(12, 20), TTConfig(rank=3)).double()
    x = torch.randn(7, 12, dtype=torch.double)
    upstream = torch.randn(7, 20, dtype=torch.double)
    by_hand = bench_tt.ByHand(layer)
    torch.testing.assert_close(by_hand(x), layer(x))
    found = bench_tt.forward_backward(by_hand, x, upstream)
    expected = bench_tt.forward_backward(layer, x, upstream)
    assert len(found) == 2 + 6 and all(gradient.abs().sum() > 0 for gradient in found)
    names = [name.removeprefix("layer.") for name, _ in by_hand.named_parameters()]
    assert names == [name for name, _ in layer.named_parameters()]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    products = [torch.randn(*n, dtype=torch.double, requires_grad=True) for n in ((3, 4), (6, 3))]
    rest = [torch.randn(*n, dtype=torch.double, requires_grad=True) for n in ((5, 4), (6,))]
    assert torch.autograd.gradcheck(
        bench_tt._SplitProduct.apply, (rest[0], products[0], products[1], rest[1])
    )


def test_merged_trains_answer_the_same():
    config = ModelConfig(
        100, 64, 1, 1, 128, 64, head="joint", num_labels=3, num_slots=5, tt=TTConfig(4, 5)
    )
    model, ids = build_model(config).eval(), torch.randint(4, 99, (3, 9))
    merged = bench_tt.merged(model)
    assert not any(isinstance(module, TTLinear) for module in merged.modules())
    with torch.inference_mode():
        for found, expected in zip(merged(ids)[0], model(ids)[0], strict=True):
            torch.testing.assert_close(found, expected)


def test_saved_bytes_counts_storages_once():
    layer = torch.nn.Linear(10, 30)
    x = torch.randn(4, 10)  # kept by both layers, counted once; the weight is not counted

    def step():
        (layer(x).square().sum() + layer(x).sum()).backward()

    assert bench_tt.saved_bytes(layer, step) == 4 * (4 * 10 + 4 * 30)
    optimizer = torch.optim.Adam(layer.parameters())
    optimizer.step()
    assert bench_tt.state_bytes(layer, [optimizer]) == 4 * 4 * (330) + 2 * 4  # two counts of steps


def test_tltorch_layers():
    pytest.importorskip("tltorch")
    layer = TTLinear.like(torch.nn.Linear(64, 96), TTConfig(rank=6))
    for other in bench_tt.tltorch_layers(layer).values():
        assert other(torch.randn(5, 64)).shape == (5, 96)
        assert 0.7 < bench_tt.count(other) / bench_tt.count(layer) < 1.3
        gradients = bench_tt.forward_backward(other, torch.randn(5, 64), torch.randn(5, 96))
        assert gradients[0].shape == (5, 64)


def test_figures_of_tensor_trains(tmp_path, capsys):
    def write(name, model="scratch", languages=None, **config):
        found = languages or {"en": {"accuracy": 95.0, "slot_f1": 90.0 + len(paths) % 3}}
        row = {"languages": found, "size_bytes": 10**5 * (1 + config.get("tt_rank", 99))}
        curve = {"dev_curve": [[10, 50.0], [20, 80.0 + len(paths)]]}
        value = {"model": "m", "methods": {"fp32": row, "sdq": {**row, **curve}}}
        value["config"] = {"task": "atis", "eval_split": "test", "model": model, **config}
        paths.append(tmp_path / name / "results.json")
        paths[-1].parent.mkdir()
        paths[-1].write_text(json.dumps(value))
        return value

    def drawn(kind, *files):
        out = tmp_path / "figure.png"
        return plot.main([*map(str, files), f"--{kind}", "--out", str(out)])

    paths = []
    for rank, bits, seed in ((0, 8, 0), (5, 8, 0), (5, 8, 1), (20, 8, 0), (20, 2, 0), (5, 2, 0)):
        write(f"{rank}-{bits}-{seed}", tt_rank=rank, bits=bits, seed=seed, order="together")
    value = write("log", tt_rank=20, bits=4, seed=0, order="bottom-up")
    _, points = plot.read_sweep([str(tmp_path / "*" / "results.json")])
    ranks = {bits: sorted(r for b, r in points if b == bits) for bits in (32, 8, 4, 2)}
    assert ranks == {32: [0, 5, 20], 8: [0, 5, 20], 4: [20], 2: [5, 20]}
    assert len(points[32, 5]) == len(points[8, 5]) == 2 and points[8, 20][0][0] == 2.1

    curves = plot.read_curves(list(map(str, paths)))
    assert curves["bottom-up"] == [[[10, 50.0], [20, 86.0]]] and len(curves["together"]) == 6
    del value["methods"]["sdq"]["dev_curve"]
    paths[-1].write_text(json.dumps(value))

    pretrained = write("pretrained", model="m.pt", tt_rank=20, bits=32, seed=0)
    assert set(plot.read_sweep([str(paths[-1])])[1]) == {(32, 0), (32, 20)}
    again = write("again", tt_rank=20, bits=4, seed=0)
    assert pretrained and again and drawn("sweep", paths[-3], paths[-1]) == 2
    assert "a second run of rank 20" in capsys.readouterr().err
    write("no-slots", languages={"en": {"accuracy": 1.0}}, tt_rank=0, bits=8, seed=0)
    assert drawn("sweep", paths[-1]) == 2 and "no slots" in capsys.readouterr().err
    assert drawn("curves", paths[6]) == 2 and "no sdq row" in capsys.readouterr().err
    assert drawn("sweep", tmp_path / "log") == 2 and "not a results.json" in capsys.readouterr().err

    pytest.importorskip("matplotlib")
    for kind in ("sweep", "curves"):
        assert drawn(kind, *paths[:6]) == 0
        assert (tmp_path / "figure.png").stat().st_size > 5000


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
        ("--rank 0", "--rank 0"),
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

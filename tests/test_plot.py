"""tools/plot.py: what each figure shows, and that it can be drawn where matplotlib is installed."""

import json
import os

import pytest
from conftest import ROOT
from test_compare import made_up, row, run, write_runs

from tools import plot
from tools.compare import read_runs


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
    by_language = [str(tmp_path / "8-*.json"), "--languages", "--out", str(tmp_path / "x.png")]
    assert plot.main(by_language) == 0
    assert plot.main([str(tmp_path / "2-0.json"), *by_language[1:]]) == 2
    assert "--languages needs fp32 and quantized rows" in capsys.readouterr().err
    assert plot.main([str(tmp_path / "*.json"), *by_language[1:]]) == 2
    assert "differ in --bits" in capsys.readouterr().err
    no_errors = [str(tmp_path / "8-0.json"), "--errors", "--out", str(tmp_path / "x.png")]
    assert plot.main(no_errors) == 2 and "--analyze" in capsys.readouterr().err
    assert plot.main([str(tmp_path / "8-0.json"), "--out", str(tmp_path / "x.nonsense")]) == 2
    assert plot.main([str(tmp_path / "none.json"), "--out", str(tmp_path / "x.png")]) == 2
    assert capsys.readouterr().err.count("error: ") == 2


@pytest.mark.parametrize("peer", [False, True])
def test_widths_of_a_figure_by_language(peer, tmp_path):
    """In the title where all rows have one; else in the legend, as the scales of other libraries differ."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    rows = {name: row(score, {"de": score}) for name, score in (("fp32", 90), ("ptq", 50), ("openvino", 80))}
    value = {**run(bits=8, **(rows if peer else {name: rows[name] for name in ("fp32", "ptq")}))}
    value |= {"model": "m", "languages": ["en", "de"]}
    value["config"] |= {"per_tensor": True, "act_range": "static", "eval_split": "dev"}
    figure, axes = pyplot.subplots()
    plot.draw_languages(axes, read_runs(write_runs(tmp_path, [value])))
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    pyplot.close(figure)
    assert legend == (["ptq W8A8 per tensor static", "openvino W8A8"] if peer else ["ptq"])
    assert axes.get_title() == f"xnli dev, m, {'' if peer else 'W8A8 per tensor static, '}1 seed"


@pytest.mark.parametrize("scores", [(10.0, 60.0), (96.0, 100.0), (100.0, 100.0)])
def test_percentages_end_at_100(scores, tmp_path, monkeypatch):
    """Whatever the margins, and error bars."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures, (low, high) = [], scores
    monkeypatch.setattr(pyplot, "close", figures.append)
    bits = [{**run(seed, **{"ptq": row(90, {"de": x})}), "model": "m"} for seed, x in enumerate((low, high))]
    for value in bits:
        value["config"]["eval_split"] = "dev"
    curves = made_up("rte", 0, "logits", {"sdq": 1.0}, eval_split="dev")
    curves["methods"]["sdq"]["dev_curve"] = [[1, low], [2, high]]
    joint = [
        made_up("atis", seed, "logits", {"ptq": x}, tt_rank=seed, eval_split="dev") for seed, x in enumerate(scores)
    ]
    for kind, runs in ((), bits), (["--curves"], [curves]), (["--sweep"], joint):
        folder = tmp_path / "".join(("x", *kind))
        folder.mkdir()
        assert plot.main([*write_runs(folder, runs), *kind, "--out", str(tmp_path / "x.png")]) == 0
        for panel in figures[-1].axes:
            least, largest = panel.get_ylim()
            assert least < low <= high <= largest <= 100
        pyplot.close(figures[-1])


def test_files_that_are_cut_off(tmp_path, capsys):
    for name in ("bench-train.json", "xnli-mini/w8-s0.json"):
        with open(os.path.join(ROOT, "results", name), encoding="utf-8") as file:
            (tmp_path / "half.json").write_text(file.read()[:400])
        assert plot.main([str(tmp_path / "half.json"), "--out", str(tmp_path / "x.png")]) == 2
        error = capsys.readouterr().err
        assert "half.json is not a results.json of train.py" in error and error.count("\n") == 1


def test_figure_of_a_regression(tmp_path, capsys):
    """Drawn by its score; several losses or tasks are no line of one method."""
    pytest.importorskip("matplotlib")
    made = [
        made_up("stsb", seed, distill, {"fp32": 80.0, "sdq": 70.0 + seed}, eval_split="test")
        for distill in ("logits", "logits+map")
        for seed in (0, 1)
    ]
    paths = write_runs(tmp_path, made)
    out = tmp_path / "x.png"
    assert plot.main([paths[0], "--out", str(out)]) == 0
    assert plot.main([*paths[:2], "--out", str(out)]) == 0 and out.stat().st_size > 5000
    assert plot.metric_name(read_runs(paths)[0]["task"]) == "mean of pearson and spearman, %"
    capsys.readouterr()
    assert plot.main([*paths, "--out", str(out)]) == 2
    assert "differ in --distill" in capsys.readouterr().err


# ------------------------------------------------------------------- tensor trains and dev curves
def test_figures_of_tensor_trains(tmp_path, capsys):
    def write(name, model="scratch", task="atis", **config):
        scores = dict.fromkeys(("accuracy", "slot_token_f1", "exact"), 95.0)
        found = {"en": {**scores, "slot_f1": 90.0 + len(paths) % 3}}
        size = 10**5 * (1 + config.get("tt_rank", 99))
        curve = {"dev_curve": [[10, 50.0], [20, 80.0 + len(paths)]]}
        methods = {  # read as JSON, no two of them share anything
            "fp32": {"languages": found, "size_bytes": size},
            "sdq": {"languages": found, "size_bytes": size, **curve},
        }
        value = {"model": "m", "methods": methods}
        value["config"] = {"task": task, "eval_split": "test", "model": model, **config}
        value["config"].setdefault("distill", "layerwise")
        paths.append(tmp_path / name / "results.json")
        paths[-1].parent.mkdir()
        paths[-1].write_text(json.dumps(value))
        return value

    def drawn(kind, *files):
        out = tmp_path / "figure.png"
        return plot.main([*map(str, files), f"--{kind}", "--out", str(out)])

    paths = []
    for rank, bits, seed in ((0, 8, 0), (5, 8, 0), (5, 8, 1), (20, 8, 0), (20, 2, 0), (5, 2, 0)):
        order = {"order": "together"} if seed else {"distill": "layerwise-together"}  # old and new
        write(f"{rank}-{bits}-{seed}", tt_rank=rank, bits=bits, seed=seed, **order)
    value = write("log", tt_rank=20, bits=4, seed=0, order="bottom-up")
    _, points = plot.read_sweep(read_runs([str(tmp_path / "*" / "results.json")]))
    ranks = {bits: sorted(r for b, r in points if b == bits) for bits in (32, 8, 4, 2)}
    assert ranks == {32: [0, 5, 20], 8: [0, 5, 20], 4: [20], 2: [5, 20]}
    assert len(points[32, 5]) == len(points[8, 5]) == 2 and points[8, 20][0][0] == 2.1

    _, curves = plot.read_curves(read_runs(list(map(str, paths))))
    assert curves["layerwise"] == [[[10, 50.0], [20, 86.0]]]
    assert len(curves["layerwise-together"]) == 6
    del value["methods"]["sdq"]["dev_curve"]
    paths[-1].write_text(json.dumps(value))

    pretrained = write("pretrained", model="m.pt", tt_rank=20, bits=32, seed=0)
    assert set(plot.read_sweep(read_runs([str(paths[-1])]))[1]) == {(32, 0), (32, 20)}
    again = write("again", tt_rank=20, bits=4, seed=0)
    assert pretrained and again and drawn("sweep", paths[-3], paths[-1]) == 2
    assert "a second run of rank 20" in capsys.readouterr().err
    write("no-slots", task="xnli", tt_rank=0, bits=8, seed=0)
    assert drawn("sweep", paths[-1]) == 2 and "no slots" in capsys.readouterr().err
    assert drawn("curves", paths[6]) == 2 and "no sdq row" in capsys.readouterr().err
    assert drawn("sweep", tmp_path / "log") == 2 and "not a results.json" in capsys.readouterr().err

    pytest.importorskip("matplotlib")
    for kind in ("sweep", "curves"):
        assert drawn(kind, *paths[:6]) == 0
        assert (tmp_path / "figure.png").stat().st_size > 5000


# ---------------------------------------------------------------------------- attention recovery
def write(folder, recoveries, **config):
    """A results.json with what --recovery reads. recoveries: method -> ranking of each layer."""
    measured = {
        name: {"recovery": {"ranking": ranking, "cover": [2 * x for x in ranking]}}
        for name, ranking in recoveries.items()
    }
    settings = {"eval_split": "dev", "model": "m", "noise": 1.0, "task": "cola", "seed": 0}
    settings |= {"distill": "logits+map", **config}
    scores = dict.fromkeys(("fp32", *recoveries), 1.0)
    value = made_up(**{key: settings.pop(key) for key in ("task", "seed", "distill")},
                    methods=scores, **settings)  # fmt: skip
    for name, recovery in measured.items():
        value["methods"][name] |= recovery
    path = folder / f"{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps(value))
    return str(path)


def test_what_is_drawn(tmp_path):
    """A mean over tasks for each seed, by loss; PTQ stands in every file and counts once."""
    for seed in (0, 1):
        for task, shift in (("cola", 0.0), ("rte", 0.1)):
            for distill, add in (("logits+map", 0.0), ("logits+output", 0.02)):
                ranking = [0.1 + shift + add, 0.2 + shift + add + 0.05 * seed]
                both = {"ptq": [0.4, 0.5], "sdq": ranking}
                write(tmp_path, both, seed=seed, task=task, distill=distill)
    config, curves = plot.read_recovery(read_runs([str(tmp_path / "*.json")]))
    assert set(curves) == {"PTQ", "logits+map", "logits+output"} and config["bits"] == 2
    assert config["tasks"] == ["cola", "rte"]
    assert curves["PTQ"]["ranking"] == [pytest.approx([0.4, 0.5])] * 2
    found = curves["logits+map"]["ranking"]
    assert found == [pytest.approx([0.15, 0.25]), pytest.approx([0.15, 0.30])]
    assert curves["logits+output"]["cover"][1] == pytest.approx([0.34, 0.64])


def test_weights_of_losses_are_told_apart(tmp_path):
    for weights in ([], ["map=30.0"]):
        write(tmp_path, {"sdq": [0.1, 0.2]}, part_weights=weights)
    write(tmp_path, {"sdq": [0.1, 0.2]}, distill="logits+30*map")
    _, curves = plot.read_recovery(read_runs([str(tmp_path / "*.json")]))
    assert set(curves) == {"logits+map", "logits+map, map=30.0", "logits+30*map"}


def test_what_cannot_be_drawn(tmp_path, capsys):
    def refused(*files):
        assert plot.main([*files, "--recovery", "--out", str(tmp_path / "x.png")]) == 2
        return capsys.readouterr().err

    first = write(tmp_path, {"sdq": [0.1, 0.2]})
    assert "no recovery" in refused(write(tmp_path, {}))
    assert "the same seed" in refused(first, write(tmp_path, {"sdq": [0.3, 0.2]}))
    assert "--noise" in refused(first, write(tmp_path, {"sdq": [0.3, 0.2]}, seed=1, noise=0.5))
    assert "--bits" in refused(first, write(tmp_path, {"sdq": [0.3, 0.2]}, bits=4, seed=1))
    assert "layers" in refused(first, write(tmp_path, {"sdq": [0.3]}, seed=1))
    other = write(tmp_path, {"sdq": [0.3, 0.1]}, task="rte", model="other")
    assert "--model" in refused(first, other)  # no mean over tasks of different models
    assert "rte" in refused(first, write(tmp_path, {"sdq": [0.3, 0.1]}, seed=1, task="rte"))
    assert "is not a results.json" in refused(str(tmp_path / "none.json"))


def test_figure(tmp_path):
    pytest.importorskip("matplotlib")
    for seed in range(2):
        write(tmp_path, {"qat": [0.4, 0.5], "sdq": [0.1, 0.2 + seed / 9]}, seed=seed)
    out = tmp_path / "recovery.png"
    assert plot.main([str(tmp_path / "*.json"), "--recovery", "--out", str(out)]) == 0
    assert out.stat().st_size > 5000


@pytest.mark.parametrize(
    "options",
    [
        *(f"bench-{name}.json" for name in plot.BENCHMARKS),
        *("xnli-mini/*.json", "xnli-mini/w8-s0.json", "xnli-mini/w3-s0.json --errors"),
        "xnli-e5/w8-pt-static-*.json --languages",
        *("atis-sweep/*.json --sweep", "layerwise/*.json --curves", "glue/*.json --recovery"),
    ],
)
def test_figures_come_from_the_committed_files(options, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "figure.png"
    file, *kind = options.split()
    assert plot.main([os.path.join(ROOT, "results", file), *kind, "--out", str(out)]) == 0
    assert out.stat().st_size > 5000

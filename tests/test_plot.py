"""tools/plot.py: what each figure shows, and that it can be drawn where matplotlib is installed."""

import os

import pytest
from conftest import ROOT
from test_compare import made_up, write_runs

from analyze import PLACES
from tools import plot
from tools.compare import read_runs


def plot_to(tmp_path, files, *kind):
    pytest.importorskip("matplotlib")
    return plot.main([*files, *kind, "--out", str(tmp_path / "figure.png")])


@pytest.mark.parametrize(
    "options",
    [
        *(f"bench-{name}.json" for name in plot.BENCHMARKS),
        *("xnli-mini/*.json", "xnli-mini/w8-s0.json", "xnli-mini/w3-s0.json --errors", "glue/stsb-map-s?.json"),
        "xnli-e5/w8-pt-static-*.json --languages",
        *("layerwise/*.json --curves", "glue/*.json --recovery"),
    ],
)
def test_figures_come_from_the_committed_files(options, tmp_path):
    file, *kind = options.split()
    assert plot_to(tmp_path, [os.path.join(ROOT, "results", file)], *kind) == 0
    assert (tmp_path / "figure.png").stat().st_size > 5000


NO_FP32 = {"qat": {"en": 1.0, "de": 1.0}}


def measured(**config):
    made = made_up(**{"task": "cola", "seed": 0, "distill": "logits", "methods": {"sdq": 1.0}} | config)
    made["methods"]["sdq"]["recovery"] = {"ranking": [0.1, 0.2], "cover": [0.2, 0.4]}
    return made


@pytest.mark.parametrize(
    ("kind", "runs", "message"),
    [
        ("--languages", [made_up("xnli", 0, "logits", NO_FP32)], "needs fp32 and quantized rows"),
        ("--languages", [made_up("xnli", i, "logits", NO_FP32, bits=2 + i) for i in range(2)], "differ in --bits"),
        ("--errors", [made_up("xnli", 0, "logits", NO_FP32)], "run train.py with --analyze"),
        ("--errors", [made_up("xnli", i, "logits", NO_FP32) for i in range(2)], "one results.json"),
        ("--curves", [made_up("xnli", 0, "logits", NO_FP32)], "no sdq row with evaluations on dev"),
        (None, [made_up("stsb", 0, loss, {"sdq": 1.0}) for loss in ("logits", "map")], "differ in --distill"),
        ("--recovery", [made_up("cola", 0, "logits", {"sdq": 1.0})], "no recovery in this file"),
        ("--recovery", [measured(), measured()], "the same seed"),
        ("--recovery", [measured(), measured(seed=1, noise=1.0)], "--noise"),
        ("--recovery", [measured(), measured(seed=1, bits=4)], "--bits"),
        ("--recovery", [measured(), measured(task="rte", model="other")], "--model"),
        ("--recovery", [measured(), measured(task="rte", seed=1)], "no run of logits on rte"),
    ],
)
def test_what_cannot_be_drawn(kind, runs, message, tmp_path, capsys):
    assert plot_to(tmp_path, write_runs(tmp_path, runs), *([kind] if kind else [])) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_benchmark_that_is_cut_off(tmp_path, capsys):
    with open(os.path.join(ROOT, "results", "bench-train.json"), encoding="utf-8") as file:
        (tmp_path / "half.json").write_text(file.read()[:400])
    assert plot_to(tmp_path, [str(tmp_path / "half.json")]) == 2
    assert "half.json is not a results.json of train.py" in capsys.readouterr().err


@pytest.mark.parametrize("peer", [False, True])
def test_widths_of_a_figure_by_language(peer, tmp_path):
    """In the title where all rows have one; else in the legend, as the scales of other libraries differ."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    scores = {"fp32": 90, "ptq": 50} | ({"openvino": 80} if peer else {})
    rows = {name: {"en": score, "de": score} for name, score in scores.items()}
    static = {"per_tensor": True, "act_range": "static"}
    made = made_up("xnli", 0, "logits", rows, bits=8, eval_split="dev", **static)
    figure, axes = pyplot.subplots()
    plot.draw_languages(axes, read_runs(write_runs(tmp_path, [made])))
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    pyplot.close(figure)
    assert legend == (["ptq W8A8 per tensor static", "openvino W8A8"] if peer else ["ptq"])
    assert axes.get_title() == f"xnli dev, m, {'' if peer else 'W8A8 per tensor static, '}1 seed"


@pytest.mark.parametrize("kind", [None, "curves"])
@pytest.mark.parametrize("scores", [(10.0, 60.0), (96.0, 100.0), (100.0, 100.0)])
def test_percentages_end_at_100(kind, scores, tmp_path):
    """Whatever the margins, and error bars."""
    pytest.importorskip("matplotlib")
    low, high = scores
    runs = [made_up("xnli", i, "logits", {"sdq": {"en": x, "de": x}}, tt_rank=0) for i, x in enumerate(scores)]
    for each in runs:
        each["methods"]["sdq"]["dev_curve"] = [[1, low], [2, high]]
    for panel in plot.draw_figure(write_runs(tmp_path, runs), kind).axes:
        least, largest = panel.get_ylim()
        assert least < low <= high <= largest <= 100


@pytest.mark.parametrize("kind", [None, "languages", "errors"])
def test_repaired_rows_have_colors_of_their_own(kind, tmp_path):
    pytest.importorskip("matplotlib")
    names = ["fp32", "ptq", "ptq+gptq", "ptq+gptq+norm", "ptq+norm", "sdq", "sdq+gptq"]
    run = made_up("xnli", 0, "logits", {name: {"en": 90.0, "de": 80.0} for name in names})
    for name in names[1:]:
        errors = {place: [{"relative": 0.1}] for place in PLACES}
        run["methods"][name]["errors"] = {"accumulated": errors, "local": errors}
    panel = plot.draw_figure(write_runs(tmp_path, [run]), kind).axes[0]
    _, labels = panel.get_legend_handles_labels()
    drawn = list(dict.fromkeys(label.partition(",")[0] for label in labels))
    assert drawn == names["fp32" not in drawn :]
    assert len({str(plot.color_of(name)) for name in names}) == len(names)


def test_curves_of_recovery(tmp_path):
    """A mean over tasks for each seed, by loss; PTQ stands in every file and counts once."""
    runs = []
    for seed in (0, 1):
        for task, shift in (("cola", 0.0), ("rte", 0.1)):
            for distill, add in (("logits+map", 0.0), ("logits+30*map", 0.02)):
                ranking = [0.1 + shift + add, 0.2 + shift + add + 0.05 * seed]
                runs.append(made_up(task, seed, distill, {"ptq": 1.0, "sdq": 1.0}))
                for name, values in (("ptq", [0.4, 0.5]), ("sdq", ranking)):
                    recovery = {"ranking": values, "cover": [2 * value for value in values]}
                    runs[-1]["methods"][name]["recovery"] = recovery
    curves = plot.read_recovery(read_runs(write_runs(tmp_path, runs)))
    assert set(curves) == {"PTQ", "logits+map", "logits+30*map"}
    assert curves["PTQ"]["ranking"] == [pytest.approx([0.4, 0.5])] * 2
    assert curves["logits+map"]["ranking"] == [pytest.approx([0.15, 0.25]), pytest.approx([0.15, 0.30])]
    assert curves["logits+30*map"]["cover"][1] == pytest.approx([0.34, 0.64])

"""train.py on GLUE: a tiny BERT from the command line to the report. All rows are made up."""

import json
import random
import string
from dataclasses import replace

import pytest
import torch

import plot
import report
import train
from checkpoint import checkpoint_payload, load_checkpoint, save_atomically
from data.batches import Batch
from data.glue import GLUE
from data.tokenizer import WordPieceTokenizer
from loop import describe, dev_score, loss_terms, task_loss
from model import ModelConfig, build_model
from options import COMMON, ON_GLUE, RECIPES, TrainConfig, fill_in
from packed import load_student

WORDS = "the my cat dog bird sees eats likes red blue small big house tree runs sleeps".split()
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
VOCABULARY += [*string.ascii_lowercase, *("##" + c for c in string.ascii_lowercase), ".", "5"]
TINY = ModelConfig(
    vocab_size=len(VOCABULARY), hidden_size=32, num_layers=2, num_heads=4, ffn_size=64,
    max_tokens=128, position_offset=0, type_vocab_size=2, pad_id=0, head="pooler",
)  # fmt: skip
HEADERS = {
    "cola": None,
    "stsb": "index\tgenre\tsentence1\tsentence2\tscore",
    "rte": "index\tsentence1\tsentence2\tlabel",
    "mnli": "index\tsentence1\tsentence2\tgold_label",
}
LABELS = {
    "cola": ("0", "1"),
    "stsb": ("0.000", "2.500", "5.000"),
    "rte": ("entailment", "not_entailment"),
    "mnli": ("entailment", "neutral", "contradiction"),
}


@pytest.fixture
def bert(tmp_path):
    """A checkpoint as convert.py writes it, of random weights, with a WordPiece vocabulary."""
    text = "".join(f"{word}\n" for word in VOCABULARY)
    tokenizer = WordPieceTokenizer.from_vocab(text.encode(), lower=True)
    path = str(tmp_path / "tiny-bert.pt")
    save_atomically(checkpoint_payload(build_model(TINY), tokenizer.bytes, name="tiny"), path)
    return path


def write_task(folder, task):
    """60 training rows and 12 test rows, whose label is told by the first word."""
    place = folder / GLUE[task].folder
    place.mkdir(parents=True)
    labels, rng = LABELS[task], random.Random(0)
    names = {"train.tsv": 60}
    names |= {"dev_matched.tsv": 12, "dev_mismatched.tsv": 9} if task == "mnli" else {"dev.tsv": 12}
    for name, count in names.items():
        lines = [HEADERS[task]] if HEADERS[task] else []
        for i in range(count):
            kind = i % len(labels)
            a, b = (" ".join(rng.choices(WORDS[3:], k=rng.randint(2, 9))) for _ in "ab")
            a, label = f"{WORDS[kind]} {a} {i}", labels[kind]
            lines.append(f"src\t{label}\t\t{a}" if task == "cola" else None)
            if task == "stsb":
                lines[-1] = f"{i}\tnews\t{a}\t{b}\t{label}"
            elif task != "cola":
                lines[-1] = f"{i}\t{a}\t{b}\t{label}"
        (place / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(tmp_path, bert, task, *options, out="run"):
    if not (tmp_path / "glue").exists():
        write_task(tmp_path / "glue", task)
    common = f"--task {task} --model {bert} --data-dir {tmp_path / 'glue'} --device cpu --epochs 1"
    return train.main([*common.split(), "--out", str(tmp_path / out), *options])


def results(tmp_path, out="run"):
    with open(tmp_path / out / "results.json", encoding="utf-8") as file:
        return json.load(file)


TERNARY = (
    "--bits 2 --weights ternary --attention-bits 8 --noise 1 --methods fp32 ptq qat sdq".split()
)


@pytest.mark.parametrize("task", sorted(HEADERS))
def test_every_row(tmp_path, bert, task, capsys):
    """Teacher, PTQ, QAT, SDQ; the integer model's figures are the student's."""
    options = [*TERNARY, "--distill", "logits+map+output", "--gamma", "0.5", "--analyze"]
    assert run(tmp_path, bert, task, *options) == 0
    printed = capsys.readouterr().out
    found = results(tmp_path)
    tests = {"mnli": ["matched", "mismatched"]}.get(task, ["en"])
    for name, row in found["methods"].items():
        assert list(row["languages"]) == tests
        for entry in row["languages"].values():
            assert entry["score"] == pytest.approx(
                sum(entry[metric] for metric in GLUE[task].metrics) / len(GLUE[task].metrics)
            )
        if name != "fp32":
            assert row["languages"] == row["student"]["languages"]
            assert len(row["recovery"]["ranking"]) == TINY.num_layers
    for metric in GLUE[task].metrics:
        assert metric in printed
    assert "Test is GLUE's dev.tsv" in (tmp_path / "run" / "report.md").read_text()
    logged = [json.loads(line) for line in open(tmp_path / "run" / "log.jsonl")]
    step = next(r for r in logged if r["method"] == "sdq" and "loss" in r)
    assert {"logits", "map", "output", "task"} <= set(step)
    assert step["loss"] == pytest.approx(
        sum(step[name] for name in ("logits", "map", "output", "task")), rel=1e-5
    )


@pytest.mark.parametrize(
    "options",
    [
        "--bits 4 --weights lsq --weight-range lsq --act-range learned",
        "--bits 4 --attention-bits 4 --act-range static --distill score --distill-layers 2",
        "--bits 2 --weights ternary --weight-clip 2.5 --per-tensor --distill output --output-tap residual",
        "--distill map+hidden --part-weights map=2 --task-weight 0",
    ],
)
def test_other_quantizers_and_losses(tmp_path, bert, options):
    assert run(tmp_path, bert, "rte", "--methods", "ptq", "sdq", *options.split()) == 0
    for row in results(tmp_path)["methods"].values():
        assert row["languages"] == row["student"]["languages"]


@pytest.mark.parametrize("options", ["--bits 32", "--bits 4 --act-range static"])
def test_attention_alone_is_quantized(tmp_path, bert, options):
    """Nothing to multiply in integers: the student itself is tested."""
    words = ["--act-bits", "32", "--attention-bits", "4", *options.split()]
    assert run(tmp_path, bert, "rte", "--methods", "fp32", "ptq", "sdq", *words) == 0
    assert "student" not in results(tmp_path)["methods"]["sdq"]
    student, _ = load_student(str(tmp_path / "run" / "student.pt"))
    attention = student.encoder.layers[0].attention
    assert attention.query_quantizer.static == ("static" in options)
    assert isinstance(attention.input_quantizer, torch.nn.Identity)


def test_a_saved_student_is_tested_again(tmp_path, bert, capsys):
    assert run(tmp_path, bert, "rte", *TERNARY) == 0
    row = results(tmp_path)["methods"]["sdq"]
    capsys.readouterr()
    student = str(tmp_path / "run" / "student.pt")
    words = ["--task", "rte", "--data-dir", str(tmp_path / "glue"), "--eval", student]
    assert train.main([*words, "--device", "cpu"]) == 0
    assert f"{row['english']:.2f}" in capsys.readouterr().out
    model, tokenizer = load_student(student)
    assert tokenizer.typed and model.config.type_vocab_size == 2


def test_a_sequence_head_starts_from_the_pooler(bert):
    from model import with_head

    pretrained = load_checkpoint(bert)
    tuned = with_head(pretrained, "sequence", 2)
    assert torch.equal(tuned.head.dense.weight, pretrained.head.dense.weight)
    assert tuned.head.dense.weight is not pretrained.head.dense.weight


def regression_batch():
    ids = torch.tensor([[2, 5, 3], [2, 6, 3]])
    return Batch(ids, None, torch.tensor([1.0, 4.0]), 6)


def test_the_loss_of_a_regression_is_the_squared_error():
    logits = torch.tensor([[2.0], [4.5]])
    assert task_loss(logits, regression_batch(), 0.0) == pytest.approx((1.0 + 0.25) / 2)


def test_task_weight_zero_leaves_the_labels_out():
    teacher = build_model(replace(TINY, head="sequence", num_labels=1, dropout=0.0))
    student = build_model(replace(TINY, head="sequence", num_labels=1, dropout=0.0))
    config = fill_in(TrainConfig(task="stsb", task_weight=0.0), "minilm")
    terms = loss_terms(student, teacher, regression_batch(), config, ("logits", "map"))
    assert set(terms) == {"logits", "map"}
    config = replace(config, task_weight=2.0)
    more = loss_terms(student, teacher, regression_batch(), config, ("logits", "map"))
    plain = loss_terms(student, None, regression_batch(), config, ())
    assert more["task"].item() == pytest.approx(2 * plain["task"].item())


def test_types_reach_teacher_and_student():
    """Other types, other loss: neither model may be run without them."""
    shape = replace(TINY, head="sequence", num_labels=2, dropout=0.0)
    teacher, student = build_model(shape), build_model(shape)
    ids, labels = torch.tensor([[2, 5, 3, 6, 3]]), torch.tensor([1])
    config = fill_in(TrainConfig(task="rte"), "minilm")
    plain = Batch(ids, None, labels, 5, types=torch.zeros_like(ids))
    typed = Batch(ids, None, labels, 5, types=torch.tensor([[0, 0, 0, 1, 1]]))
    seen = []
    for batch in (plain, typed):
        terms = loss_terms(student, teacher, batch, config, ("map",))
        seen.append((terms["map"].item(), terms["task"].item()))
    assert seen[0][0] != seen[1][0] and seen[0][1] != seen[1][1]
    with torch.no_grad():
        wanted = teacher(ids, types=typed.types)[0]
    assert not torch.equal(wanted, teacher(ids)[0])


def test_scales_do_not_decay():
    """One scale a row is a matrix by its shape; weight decay would pull its logarithm to 0."""
    from loop import make_optimizers
    from prepare import prepare
    from quant import QuantConfig

    model = build_model(TINY)
    prepare(model, QuantConfig(weights="lsq", weight_bits=4, act_range="learned"))
    dense, _ = make_optimizers(model, weight_decay=0.1)
    scales = [p for n, p in model.named_parameters() if n.endswith(("log_scale", "log_step"))]
    assert len(scales) == 2 * (6 + 4)  # of weights, and of what they read
    decayed = {
        id(p) for group in dense.param_groups if group["weight_decay"] for p in group["params"]
    }
    assert decayed and not any(id(scale) in decayed for scale in scales)


def test_recipe_of_glue():
    config = fill_in(TrainConfig(task="cola"), train.default_model("cola"))
    assert config.model == "minilm" and config.output_tap == "normed"
    assert config.beta == RECIPES[ON_GLUE]["beta"]
    assert fill_in(TrainConfig(), "mini").beta == COMMON["beta"]
    assert fill_in(TrainConfig(), "mini").output_tap == "projected"
    given = fill_in(TrainConfig(task="cola", beta=2.0, output_tap="residual"), "minilm")
    assert given.beta == 2.0 and given.output_tap == "residual"


def test_dev_score_may_be_negative():
    """A correlation below 0 is a first best, too."""
    found = {"score": -20.0, "pearson": -20.0, "spearman": -20.0, "total": 9}
    assert dev_score(found) == -20.0 and "pearson -20.00" in describe(found)
    from loop import State

    assert State("fp32").best_score < -100


# ------------------------------------------------------------------------------------ over seeds
def made_up(task, seed, distill, methods, **more):
    config = {"task": task, "seed": seed, "bits": 2, "act_bits": 8, "distill": distill}
    config |= {"gamma": None, "part_weights": [], "lr": 1e-4, **more}
    rows = {}
    for name, score in methods.items():
        entry = {"score": score, "accuracy": score}
        rows[name] = {"english": score, "zero_shot_mean": None, "size_bytes": 8e6}
        rows[name]["languages"] = {"en": entry}
    return {"config": config, "methods": rows, "languages": ["en"]}


def write_runs(tmp_path, runs):
    paths = []
    for i, made in enumerate(runs):
        path = tmp_path / f"{i}.json"
        path.write_text(json.dumps(made), encoding="utf-8")
        paths.append(str(path))
    return paths


def test_table_over_tasks_and_seeds(tmp_path, capsys):
    runs = []
    for seed, up in ((0, 0.0), (1, 2.0)):
        for task, full in (("sst2", 90.0), ("rte", 70.0)):
            base = {"fp32": full + up, "ptq": 50.0 + up, "qat": full - 10 + up}
            runs.append(made_up(task, seed, "logits", base | {"sdq": full - 5 + up}))
            runs.append(made_up(task, seed, "logits+map", {"sdq": full - 3 + up}))
    assert report.main(write_runs(tmp_path, runs)) == 0
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in capsys.readouterr().out.splitlines()
    ]
    assert lines[0][2:] == ["sst2 (accuracy)", "rte (accuracy)", "mean", "recovered %", "MB"]
    rows = {line[0]: line[1:] for line in lines[2:]}
    assert list(rows) == ["fp32", "ptq W2A8", "qat W2A8", "logits W2A8", "logits+map W2A8"]
    assert rows["fp32"] == ["2", "91.00 ± 1.41", "71.00 ± 1.41", "81.00 ± 1.41", "-", "8.0"]
    # means of the tasks: fp32 80, ptq 50, logits 75: 25 of 30 points
    assert rows["logits W2A8"][4] == "83 ± 0" and rows["logits+map W2A8"][4] == "90 ± 0"
    assert report.main(write_runs(tmp_path, runs[:-1])) == 0  # rte's second seed of the last row
    last = capsys.readouterr().out.splitlines()[-1].split("|")
    assert last[1:3] == [" logits+map W2A8 ", " 1 to 2 "]


def test_what_ptq_did_not_lose_is_not_recovered(tmp_path, capsys):
    """At 8 bits, say: a difference of a few examples is no share of anything."""
    for ptq in (70.0, 69.0, 71.0):
        rows = {"fp32": 70.0, "ptq": ptq, "qat": 70.5, "sdq": 70.0}
        assert report.main(write_runs(tmp_path, [made_up("rte", 0, "logits", rows)])) == 0
        for line in capsys.readouterr().out.splitlines()[2:]:
            assert line.split("|")[4].strip() == "-"


def test_recovered_counts_both_test_sets_of_mnli():
    def row(matched, mismatched):
        tests = {"matched": {"score": matched}, "mismatched": {"score": mismatched}}
        return {"english": matched, "zero_shot_mean": mismatched, "languages": tests}

    rows = {"fp32": row(80.0, 80.0), "ptq": row(40.0, 70.0), "sdq": row(60.0, 79.0)}
    won = report.recovered(rows, "sdq", report.score_of_tests)
    assert won == pytest.approx(100 * (69.5 - 55) / 25)


def test_figure_of_a_regression(tmp_path, capsys):
    """Drawn by its score; several losses or tasks are no line of one method."""
    pytest.importorskip("matplotlib")
    made = [
        made_up("stsb", seed, distill, {"fp32": 80.0, "sdq": 70.0 + seed}, eval_split="test")
        for distill in ("logits", "logits+map")
        for seed in (0, 1)
    ]
    for one in made:
        one["model"] = "m"
        del one["methods"]["sdq"]["languages"]["en"]["accuracy"]
    paths = write_runs(tmp_path, made)
    out = tmp_path / "x.png"
    assert plot.main([paths[0], "--out", str(out)]) == 0
    assert plot.main([*paths[:2], "--out", str(out)]) == 0 and out.stat().st_size > 5000
    assert plot.measure(made[0]) == "mean of pearson and spearman, %"
    capsys.readouterr()
    assert plot.main([*paths, "--out", str(out)]) == 2
    assert "differ in --distill" in capsys.readouterr().err
    assert report.main([paths[0], "--languages"]) == 2
    assert "leave out --languages" in capsys.readouterr().err


def test_a_table_compares_like_with_like(tmp_path, capsys):
    runs = [made_up("rte", 0, "logits", {"sdq": 1.0}), made_up("rte", 0, "logits", {"sdq": 2.0})]
    assert report.main(write_runs(tmp_path, runs)) == 2
    assert "same seed" in capsys.readouterr().err
    runs[1] = made_up("rte", 1, "logits", {"sdq": 2.0}, lr=2e-4)
    assert report.main(write_runs(tmp_path, runs)) == 2
    assert "differ in --lr" in capsys.readouterr().err
    runs[1] = made_up("sst2", 1, "logits", {"sdq": 2.0}, lr=2e-4)  # a task has its own recipe
    assert report.main(write_runs(tmp_path, runs)) == 0

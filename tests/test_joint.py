"""train.py on intents and slots, with tensor trains and layer-by-layer distillation."""

import json
import math
import os

import numpy as np
import pytest
import torch
from conftest import ROOT, SAMPLE, SCRATCH, results, run

import report
import train
from checkpoint import load_checkpoint
from data.batches import IGNORE, Batch, Dataset, encode_split
from data.slots import slot_scores
from data.tasks import find_task
from data.tokenizer import WordTokenizer
from distill import LayerSchedule
from learned import LearnedScale
from loop import dev_score, evaluate, layerwise_rate, stage_terms, task_loss, train_step
from model import build_model
from options import RECIPES, fill_in, parse_args
from tt import TensorTrain, TTConfig

FLIGHTS = os.path.join(ROOT, "data", "atis-sample")
SHAPE = "--task atis --model scratch --layers 2 --hidden 32 --heads 2 --device cpu --data-dir"
SHAPE = [*SHAPE.split(), FLIGHTS]


def joint(tmp_path, *options, out="run"):
    return train.main([*SHAPE, "--epochs", "2", "--out", str(tmp_path / out), *options])


def log_of(tmp_path, out="run"):
    with open(tmp_path / out / "log.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# ------------------------------------------------------------------------------------ joint tasks
def test_every_row_of_the_sample(tmp_path, capsys):
    """Words, intents and slots, as a tensor train: trained, quantized, packed, read and tested."""
    options = "--tt-rank 4 --bits 4 --methods fp32 ptq qat sdq --act-range static".split()
    assert joint(tmp_path, *options, "--weight-range", "mse") == 0
    shown = capsys.readouterr().out
    assert "| sdq " in shown and "slot F1" in shown
    found = results(tmp_path)
    assert found["model"] == "scratch-2x32-tt4"
    for name, row in found["methods"].items():
        entry = row["languages"]["en"]
        assert entry["total"] == 30 and 0 <= entry["exact"] <= entry["accuracy"]
        assert entry["accuracy"] == pytest.approx(100 * entry["correct"] / 30)
        assert {"slot_f1", "slot_token_f1", "slot_gold"} <= set(entry)
        if name != "fp32":  # the integer model is what is reported: the student gives the same
            assert entry == row["student"]["languages"]["en"]
    student = str(tmp_path / "run" / "student.pt")
    assert train.main([*SHAPE[:2], "--data-dir", FLIGHTS, "--eval", student]) == 0
    accuracy = found["methods"]["sdq"]["languages"]["en"]["accuracy"]
    assert f"| {accuracy:.2f} |" in capsys.readouterr().out.replace("  ", " ")


def test_it_learns_the_sample(tmp_path):
    """Well above the commonest intent and no slot at all."""
    options = "--methods fp32 --epochs 15 --lr 2e-3 --hidden 64 --tt-rank 8 --batch-size 8".split()
    assert joint(tmp_path, *options) == 0
    entry = results(tmp_path)["methods"]["fp32"]["languages"]["en"]
    assert entry["accuracy"] > 45 and entry["slot_f1"] > 45


def test_snips_has_the_same_layout(tmp_path):
    assert joint(tmp_path, "--task", "snips", "--methods", "fp32", "--steps", "2") == 0


def test_subwords_of_a_pretrained_model(tmp_path):
    options = (
        "--task atis --model mini --methods fp32 qat --steps 3 --device cpu --data-dir".split()
    )
    assert train.main([*options, FLIGHTS, "--out", str(tmp_path / "run")]) == 0
    assert results(tmp_path)["model"] == "mini"


@pytest.fixture
def flights():
    task = find_task("atis")
    names = task.names(FLIGHTS)
    words = WordTokenizer.build(s.words for s in task.read(FLIGHTS, "train")["en"])
    dataset = encode_split("atis", "test", "en", FLIGHTS, words, 64)
    dataset.slots = names.slots
    return dataset, names, words


class Oracle(torch.nn.Module):
    """Answers with what it is given: logits of intents and slots for the rows of a dataset."""

    def __init__(self, dataset: Dataset, intents: np.ndarray, slots: np.ndarray):
        super().__init__()
        rows = zip(dataset.starts[:-1], dataset.starts[1:], strict=True)
        self.known = {
            tuple(dataset.ids[a:b].tolist()): (intents[i], slots[a:b])
            for i, (a, b) in enumerate(rows)
        }

    def forward(self, ids, mask, types=None):
        B, T = ids.shape
        intents, slots = torch.zeros(B, 100), torch.zeros(B, T, 100)
        lengths = [T] * B if mask is None else mask.sum(dim=1).tolist()
        for i, (row, length) in enumerate(zip(ids.tolist(), lengths, strict=True)):
            intent, tags = self.known[tuple(row[:length])]
            intents[i, intent] = 1
            slots[i, torch.arange(length), torch.from_numpy(tags)] = 1
        return (intents, slots), {}


def test_evaluation_counts_what_the_files_say(flights):
    """Against the scores worked out sentence by sentence from the tags themselves."""
    dataset, names, _ = flights
    rng = np.random.default_rng(0)
    wrong = rng.random(len(dataset.ids)) < 0.1
    tags = np.where(dataset.tags == IGNORE, 0, dataset.tags)
    guessed = np.where(wrong, rng.integers(0, names.known_slots, len(tags)), tags)
    intents = np.where(rng.random(len(dataset)) < 0.3, 0, dataset.labels)
    found = evaluate(Oracle(dataset, intents, guessed), dataset, torch.device("cpu"))
    gold, said, exact = [], [], 0
    for i in range(len(dataset)):
        part = slice(dataset.starts[i] + 1, dataset.starts[i + 1] - 1)  # without <s> and </s>
        gold.append([names.slots[tag] for tag in dataset.tags[part]])
        said.append([names.slots[tag] for tag in guessed[part]])
        exact += gold[-1] == said[-1] and intents[i] == dataset.labels[i]
    expected = slot_scores(gold, said)
    assert {key: found[key] for key in expected} == expected and 0 < expected["slot_f1"] < 100
    assert found["exact_correct"] == exact and found["correct"] == (intents == dataset.labels).sum()
    assert dev_score(found) == pytest.approx((found["accuracy"] + found["slot_f1"]) / 2)


def test_task_loss_is_that_of_intents_and_real_words(flights):
    torch.manual_seed(0)
    intents, slots = torch.randn(2, 4), torch.randn(2, 3, 5)
    tags = torch.tensor([[IGNORE, 2, 4], [IGNORE, 1, IGNORE]])
    batch = Batch(torch.zeros(2, 3, dtype=torch.int64), None, torch.tensor([3, 0]), 6, tags)
    words = [slots[0, 1].log_softmax(0)[2], slots[0, 2].log_softmax(0)[4]]
    words.append(slots[1, 1].log_softmax(0)[1])
    texts = [intents[0].log_softmax(0)[3], intents[1].log_softmax(0)[0]]
    expected = -sum(words) / 3 - sum(texts) / 2
    assert task_loss((intents, slots), batch, 0.0).item() == pytest.approx(expected.item())
    assert task_loss((intents, slots), batch, 0.1) != pytest.approx(expected.item())


def test_recipe_of_joint_tasks():
    config = fill_in(parse_args(SHAPE)[0], "mini")
    recipe = RECIPES["scratch on atis or snips"]
    assert {name: getattr(config, name) for name in recipe} == recipe
    assert fill_in(parse_args([])[0], "mini").label_smoothing == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--data-dir nowhere", "python data/fetch.py atis"),
        ("--max-length 8", "give --max-length"),
        ("--tt-rank -1", "--tt-rank -1: choose a value from 0 to 4096"),
        ("--tt-modes 0", "--tt-modes 0"),
        ("--tt-init best", "--tt-init 'best': choose from svd, random"),
        ("--order sideways", "--order 'sideways'"),
        ("--order together", "need --distill layerwise"),
        ("--stage-steps 5", "need --distill layerwise"),
        ("--distill layerwise+logits", "stands alone"),
        ("--label-smoothing 1", "--label-smoothing 1"),
        ("--bits 32 --act-bits 32 --tt-rank 4", "use --methods fp32"),
    ],
)
def test_refused(options, message, capsys, tmp_path):
    assert joint(tmp_path, *options.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and message in captured.err
    assert not os.path.exists(tmp_path / "run" / "results.json")


def test_eval_refuses_other_labels(tmp_path, capsys):
    assert joint(tmp_path, "--methods", "ptq", "--steps", "1") == 0
    other = tmp_path / "other"
    for split in ("train", "dev", "test"):
        os.makedirs(other / split)
        for name, line in (("seq.in", "to rome to rome"), ("seq.out", "O O O O"), ("label", "go")):
            (other / split / name).write_text(line + "\n")
    student = str(tmp_path / "run" / "student.pt")
    capsys.readouterr()
    assert train.main(["--task", "atis", "--data-dir", str(other), "--eval", student]) == 2
    assert "knows other labels" in capsys.readouterr().err


def test_table_over_seeds_ranks_and_widths(tmp_path, capsys):
    for i, options in enumerate(
        ("--methods fp32", "--tt-rank 4 --methods fp32 ptq", "--tt-rank 4 --bits 2 --methods ptq")
    ):
        for seed in "01":
            assert (
                joint(tmp_path, *options.split(), "--steps", "2", "--seed", seed, out=f"{i}{seed}")
                == 0
            )
    capsys.readouterr()
    assert report.main([str(tmp_path / "*" / "results.json")]) == 0
    lines = [[c.strip() for c in x.split("|")[1:-1]] for x in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[2:]] == [
        "dense fp32", "TT rank 4 fp32", "TT rank 4 ptq W8A8", "TT rank 4 ptq W2A8",
    ]  # fmt: skip
    assert all(line[1] == "2" for line in lines[2:]) and lines[2][3] == "1x"
    sizes = [float(line[2].replace(",", "")) for line in lines[2:]]
    assert sizes == sorted(sizes, reverse=True)


# --------------------------------------------------------------------- tensor trains as students
LAYERWISE = "--bits 32 --act-bits 32 --tt-rank 3 --methods fp32 sdq --distill layerwise".split()


def pretrained(tmp_path):
    """A teacher's checkpoint on the NLI sample, to start from."""
    assert (
        run(tmp_path, "--methods", "fp32", "--layers", "2", "--hidden", "32", out="base/run") == 0
    )
    (teacher,) = os.listdir(tmp_path / "base" / "teachers")
    weights = str(tmp_path / "base" / "teachers" / teacher)
    return ["--model", weights, "--data-dir", SAMPLE, "--device", "cpu", "--languages", "de"]


@pytest.mark.parametrize("order", ["bottom-up", "top-down", "together"])
def test_layer_by_layer(order, tmp_path, capsys):
    """A dense teacher and its tensor train: losses of each stage, and the rates, from the log."""
    options = [*pretrained(tmp_path), *LAYERWISE, "--order", order, "--student-lr", "1e-3"]
    options += ["--stage-steps", "2", "--epochs", "1", "--out", str(tmp_path / "run")]
    assert train.main([*options, "--student-epochs", "2"]) == 0
    assert "tensor trains" in capsys.readouterr().out
    steps = [r for r in log_of(tmp_path) if r["method"] == "sdq" and "loss" in r]
    assert len(steps) == 12
    for i, record in enumerate(steps):
        terms = {"hidden", "cosine", "map"} | ({"logits", "task"} if i >= 4 else set())
        assert terms <= set(record) and ("task" in record) == (i >= 4)
        assert record["loss"] == pytest.approx(sum(record[term] for term in terms), rel=1e-4)
    assert steps[3]["lr"] == 1e-3 and steps[4]["lr"] == pytest.approx(1e-3 / 20)
    assert steps[-1]["lr"] == pytest.approx(1e-3 / 20 / 8)
    curve = results(tmp_path)["methods"]["sdq"]["dev_curve"]
    assert [step for step, _ in curve] == [6, 12]


def test_a_student_starts_as_its_teachers_svd(tmp_path):
    base = [*pretrained(tmp_path), *LAYERWISE, "--steps", "8", "--stage-steps", "2"]
    first = {}
    for init, rank in (("svd", 3), ("svd", 16), ("random", 16)):
        out = f"{init}{rank}"
        options = ["--tt-init", init, "--tt-rank", str(rank), "--out", str(tmp_path / out)]
        assert train.main([*base, *options]) == 0
        first[out] = next(r["hidden"] for r in log_of(tmp_path, out) if "hidden" in r)
    assert first["svd16"] < first["svd3"] and first["svd16"] < first["random16"]


def test_quantized_student_of_a_dense_teacher(tmp_path):
    options = "--tt-rank 3 --bits 4 --methods fp32 ptq sdq --steps 3".split()
    assert train.main([*pretrained(tmp_path), *options, "--out", str(tmp_path / "run")]) == 0
    rows = results(tmp_path)["methods"]
    assert rows["sdq"]["languages"] == rows["sdq"]["student"]["languages"]
    assert rows["sdq"]["size_bytes"] < rows["fp32"]["size_bytes"] / 1.5


def test_stage_too_long_is_refused(tmp_path, capsys):
    options = [*pretrained(tmp_path), *LAYERWISE, "--stage-steps", "3", "--steps", "6"]
    assert train.main([*options, "--out", str(tmp_path / "run")]) == 2
    assert "leaves nothing of 6 steps for the last stage" in capsys.readouterr().err


def tiny_batch(config):
    ids = torch.randint(4, config.vocab_size - 1, (3, 7))
    return Batch(ids, None, torch.tensor([0, 1, 2]), ids.numel())


def test_layers_above_the_stage_do_not_run_or_learn(tiny_config):
    teacher = build_model(tiny_config).eval().requires_grad_(False)
    student = build_model(tiny_config)
    config, batch = parse_args(SCRATCH)[0], tiny_batch(tiny_config)
    schedule = LayerSchedule(2, 5)
    calls = []
    student.encoder.layers[1].register_forward_hook(lambda *_: calls.append(1))
    sum(stage_terms(student, teacher, batch, config, schedule, 4).values()).backward()
    assert not calls and all(p.grad is None for p in student.encoder.layers[1].parameters())
    assert student.encoder.layers[0].ffn.up.weight.grad.any()
    assert student.encoder.embeddings.position.weight.grad.any()
    stage_terms(student, teacher, batch, config, schedule, 5)
    assert calls and all(p.grad is None for p in teacher.parameters())


def test_nothing_to_learn_from_oneself(tiny_config):
    teacher = build_model(tiny_config).eval().requires_grad_(False)
    config, batch = parse_args(SCRATCH)[0], tiny_batch(tiny_config)
    for step in (0, 1, 2):
        terms = stage_terms(teacher, teacher, batch, config, LayerSchedule(2, 1), step)
        for name in ("hidden", "cosine", "map"):
            assert terms[name].item() == pytest.approx(0, abs=1e-6)


def test_layerwise_rate_by_hand():
    schedule = LayerSchedule(2, 10)
    rates = [layerwise_rate(step, 30, schedule, 1.0, 0.5, 0.1) for step in range(30)]
    assert rates[:3] == [0.5, 1.0, 1.0] and set(rates[2:20]) == {1.0}
    assert rates[20] == 0.5 and rates[29] == pytest.approx(0.05)


def test_teacher_of_tensor_trains_is_kept_and_scales_learn(tmp_path):
    assert joint(tmp_path, "--tt-rank", "4", "--methods", "qat", "--weight-range", "mse") == 0
    (name,) = os.listdir(tmp_path / "teachers")
    teacher = load_checkpoint(str(tmp_path / "teachers" / name))
    assert teacher.config.tt == TTConfig(rank=4)
    assert any(isinstance(module, TensorTrain) for module in teacher.modules())


def test_scales_of_cores_are_trained(tiny_config):
    from dataclasses import replace

    from loop import make_optimizers
    from prepare import prepare
    from quant import QuantConfig

    model = build_model(replace(tiny_config, tt=TTConfig(rank=3)))
    prepare(model, QuantConfig(weight_bits=4, keep=()))
    model.train()
    optimizers = make_optimizers(model, 0.01)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
    scales = [m.log_scale for m in model.modules() if isinstance(m, LearnedScale)]
    before = [scale.item() for scale in scales]
    record = train_step(model, None, tiny_batch(tiny_config), optimizers, parse_args(SCRATCH)[0])
    assert math.isfinite(record["loss"])
    moved = sum(a != b.item() for a, b in zip(before, scales, strict=True))
    assert moved == len(scales) > 20


def test_latency_stands_beside_its_form(tmp_path, capsys):
    assert (
        joint(tmp_path, *"--tt-rank 4 --methods fp32 ptq --steps 1 --act-range static".split()) == 0
    )
    measured = [
        {"name": name, "batch_size": size, "median_ms": 10 * size + i}
        for size in (1, 2)
        for i, name in enumerate(("dense fp32", "TT fp32, merged", "TT W8A8 static"))
    ]
    path = tmp_path / "tt.json"
    for rank, expected in ((4, ["12.0", "22.0"]), (5, ["-", "-"])):
        path.write_text(json.dumps({"shape": {"rank": rank}, "models": measured}))
        capsys.readouterr()
        command = [str(tmp_path / "run" / "results.json"), "--latency", str(path)]
        assert report.main(command) == 0
        lines = [
            [c.strip() for c in x.split("|")[1:-1]] for x in capsys.readouterr().out.splitlines()
        ]
        assert lines[0][-2:] == ["ms x 1", "ms x 2"] and lines[-1][0] == "TT rank 4 ptq W8A8"
        assert lines[-1][-2:] == expected
    assert report.main([command[0], "--latency", command[0]]) == 2
    assert "is not a JSON of bench.py tt" in capsys.readouterr().err

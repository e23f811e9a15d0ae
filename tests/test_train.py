"""train.py: the losses, the loop, evaluation, and the recipe from the command line to the report."""

import copy
import math
import os
import random
import re
import shutil
import string
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FLIGHTS, GOLDEN, ROOT, SAMPLE, SCRATCH, SMALL, TOKENIZER, answer, batch, log_of, results, run
from torch import nn

import convert
import predict
import train
from checkpoint import checkpoint_payload, load_checkpoint, load_student, save_atomically
from config import TrainConfig, default_out, parse_args
from data.batches import IGNORE, Batch, Dataset, encode_split
from data.glue import GLUE
from data.slots import slot_scores
from data.tasks import find_task, load, read_own
from data.tokenizer import WordPieceTokenizer, WordTokenizer
from distill import LAYERWISE, LOSSES, LayerSchedule, layer_mean, logits_loss
from kit.common import UserError
from lsq import LearnedScale
from model import ModelConfig, build_model, initialize
from prepare import prepare
from quant import QuantConfig
from run import Data, Run
from train import (
    clip_gradients,
    evaluate,
    forward,
    in_words,
    layerwise_loss,
    layerwise_rate,
    linear_rate,
    make_optimizers,
    sdq_loss,
    task_terms,
)
from tt import TensorTrain, TTConfig

CPU = torch.device("cpu")
WORDS = "the my cat dog bird sees eats likes red blue small big house tree runs sleeps".split()
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
VOCABULARY += [*string.ascii_lowercase, *("##" + c for c in string.ascii_lowercase), ".", "5"]
TINY = ModelConfig(
    vocab_size=len(VOCABULARY), hidden_size=32, num_layers=2, num_heads=4, ffn_size=64,
    max_tokens=128, position_offset=0, type_vocab_size=2, pad_id=0, head="pooler",
)  # fmt: skip


def steps_of(tmp_path, method, out="run"):
    """The log of the steps of one training."""
    return [r for r in log_of(tmp_path, out) if r["method"] == method and "loss" in r]


def tiny_batch(config):
    ids = torch.randint(4, config.vocab_size - 1, (3, 7))
    return Batch(ids, None, torch.tensor([0, 1, 2]), ids.numel())


def small_data(rows=3):
    """Rows of 7 tokens for tiny_config."""
    ids = torch.randint(4, 440, (rows * 7,), dtype=torch.int32).numpy()
    labels = torch.randint(0, 3, (rows,)).numpy()
    dataset = Dataset(ids, np.arange(0, 7 * rows + 1, 7), labels)
    return Data(dataset, dataset, {"en": dataset})


def small_run(tmp_path, *options):
    config = parse_args([*SCRATCH, "--device", "cpu", *options])[0]
    made = Run(str(tmp_path / "run"), config, CPU, False)
    os.makedirs(made.out)
    return made


# ----------------------------------------------------------------------------- rates and optimizers
def test_learning_rate():
    rates = [linear_rate(step, 100, 1.0) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and max(rates) == 1.0
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False)) and 0 < rates[99] < 0.02
    assert linear_rate(0, 1, 1.0) == 1.0


def test_layerwise_rate_by_hand(monkeypatch):
    monkeypatch.setattr(train, "LAST_STAGE_LR", 0.5)
    schedule = LayerSchedule(2, 10)
    rates = [layerwise_rate(step, 30, 1.0, schedule) for step in range(30)]
    assert rates[:3] == [0.5, 1.0, 1.0] and set(rates[2:20]) == {1.0}
    assert rates[20] == 0.5 and rates[29] == pytest.approx(0.05)


def test_clip_gradients_counts_sparse_ones():
    table = torch.nn.Embedding(10, 4, sparse=True)
    linear = torch.nn.Linear(4, 2)
    model = torch.nn.ModuleList([table, linear])

    def loss():
        return 50 * linear(table(torch.tensor([1, 1, 3]))).square().sum()

    loss().backward()
    dense = [p.grad.to_dense() if p.grad.is_sparse else p.grad.clone() for p in model.parameters()]
    expected = torch.cat([g.flatten() for g in dense]).norm()
    norm = clip_gradients(model, 0.5)
    torch.testing.assert_close(norm, expected)
    after = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in model.parameters()]
    for a, b in zip(after, dense, strict=True):
        torch.testing.assert_close(a, b * 0.5 / expected)


def test_scales_do_not_decay():
    """Per-row scales have the shape of a matrix; weight decay would pull their logarithm to 0."""
    model = build_model(TINY)
    prepare(model, QuantConfig(weights="lsq", weight_range="lsq", weight_bits=4, act_range="learned"))
    dense, _ = make_optimizers(model)
    scales = [p for n, p in model.named_parameters() if n.endswith(("log_scale", "log_step"))]
    assert len(scales) == 2 * (6 + 4)  # of weights, and of their inputs
    decayed = {id(p) for group in dense.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed and not any(id(scale) in decayed for scale in scales)


# ------------------------------------------------------------------------------------------- losses
def test_loss_of_a_joint_task_is_that_of_intents_and_real_words():
    intents, slots = torch.randn(2, 4), torch.randn(2, 3, 5)
    tags = torch.tensor([[IGNORE, 2, 4], [IGNORE, 1, IGNORE]])
    rows = Batch(torch.zeros(2, 3, dtype=torch.int64), None, torch.tensor([3, 0]), 6, tags)
    words = [slots[0, 1].log_softmax(0)[2], slots[0, 2].log_softmax(0)[4]]
    words.append(slots[1, 1].log_softmax(0)[1])
    sequences = [intents[0].log_softmax(0)[3], intents[1].log_softmax(0)[0]]
    expected = -sum(words) / 3 - sum(sequences) / 2
    terms = task_terms((intents, slots), rows, 0.0)
    assert set(terms) == {"task", "slots"} and sum(terms.values()).item() == pytest.approx(expected.item())
    assert sum(task_terms((intents, slots), rows, 0.1).values()) != pytest.approx(expected.item())


def regression_batch():
    ids = torch.tensor([[2, 5, 3], [2, 6, 3]])
    return Batch(ids, None, torch.tensor([1.0, 4.0]), 6)


def test_loss_of_a_regression_is_the_squared_error():
    logits = torch.tensor([[2.0], [4.5]])
    assert task_terms(logits, regression_batch(), 0.0)["task"] == pytest.approx((1.0 + 0.25) / 2)


def test_task_weight_of_a_regression():
    shape = replace(TINY, head="sequence", num_labels=1, dropout=0.0)
    teacher, student = build_model(shape).eval(), build_model(shape)
    config = parse_args("--task stsb --distill logits+map --task-weight 0".split())[0]
    terms = sdq_loss(student, teacher, regression_batch(), config, 0)
    assert set(terms) == {"task", "logits", "map"} and terms["task"].item() == 0.0
    terms["task"].backward()  # the labels teach nothing
    assert not any(p.grad.to_dense().any() for p in student.parameters() if p.grad is not None)
    half = sdq_loss(student, teacher, regression_batch(), replace(config, task_weight=0.5), 0)
    plain = sdq_loss(student, None, regression_batch(), config, 0)
    assert set(plain) == {"task"}
    assert half["task"].item() == pytest.approx(0.5 * plain["task"].item())


def test_teacher_and_student_read_token_types():
    """Other types give another loss: neither model may run without them."""
    shape = replace(TINY, head="sequence", num_labels=2, dropout=0.0)
    teacher, student = build_model(shape), build_model(shape)
    ids, labels = torch.tensor([[2, 5, 3, 6, 3]]), torch.tensor([1])
    config = parse_args("--task rte --distill map".split())[0]
    plain = Batch(ids, None, labels, 5, types=torch.zeros_like(ids))
    typed = Batch(ids, None, labels, 5, types=torch.tensor([[0, 0, 0, 1, 1]]))
    seen = []
    for rows in (plain, typed):
        terms = sdq_loss(student, teacher, rows, config, 0)
        seen.append((terms["map"].item(), terms["task"].item()))
    assert seen[0][0] != seen[1][0] and seen[0][1] != seen[1][1]
    with torch.no_grad():
        expected = teacher(ids, types=typed.types)[0]
    assert not torch.equal(expected, teacher(ids)[0])


@pytest.fixture
def pair(tiny_config):
    """(teacher, student): a float32 model that is far from its initialization, and a perturbed
    copy.
    """
    teacher = build_model(tiny_config).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return teacher, student


def labeled(lengths):
    """A Batch of sequences with the labels 0, 1, 2, 0, ..."""
    rows = batch(lengths)
    rows.labels = torch.arange(len(lengths)) % 3
    return rows


def all_losses(**values):
    """Options that distill every loss of the table with weight 1."""
    values = {"alpha": 1.0, "beta": 1.0, "temperature": 2.0} | values
    return TrainConfig(distill="+".join(LOSSES), **values)


def values_of(terms):
    return {name: value.item() for name, value in terms.items()}


ALL_TAPS = tuple(tap for tap, *_ in LOSSES.values() if tap)


def outputs(pair, rows, taps=ALL_TAPS):
    """(logits, taps) of teacher and student."""
    return [forward(model, rows, TrainConfig(), taps) for model in pair]


def test_terms_of_sdq(pair):
    """L = CE + alpha tau^2 KL + beta mean over layers and heads of the MSE of the contexts."""
    teacher, student = pair
    rows = labeled([6, 4, 1])
    config = TrainConfig(alpha=0.25, beta=7.0, temperature=3.0)
    found = sdq_loss(student, teacher, rows, config, 0)
    assert list(found) == ["task", "logits", "context"]
    (target, target_taps), (logits, taps) = outputs(pair, rows, ("context",))
    assert found["task"].item() == pytest.approx(F.cross_entropy(logits, rows.labels).item())
    expected = 0.25 * logits_loss(logits, target, 3.0)
    assert found["logits"].item() == pytest.approx(expected.item())
    context = LOSSES["context"][1]
    layers = [context(s, t, rows.mask).item() for s, t in zip(taps["context"], target_taps["context"], strict=True)]
    assert math.isclose(found["context"].item(), 7.0 * sum(layers) / 2, rel_tol=1e-5)


def test_weight_in_distill_replaces_alpha_and_beta(pair):
    teacher, student = pair
    rows = labeled([6, 4, 1])
    found = values_of(sdq_loss(student, teacher, rows, all_losses(), 0))
    text = "3*logits+0*score+map+0.25*normed"
    config = TrainConfig(distill=text, alpha=0.5, beta=10.0, temperature=2.0)
    weighted = values_of(sdq_loss(student, teacher, rows, config, 0))
    weights = {"task": 1.0, "logits": 3.0, "score": 0.0, "map": 10.0, "normed": 0.25}
    assert weighted == pytest.approx({k: weight * found[k] for k, weight in weights.items()})


def test_each_term_is_its_loss_averaged_over_layers(pair):
    teacher, student = pair
    rows = labeled([6, 4, 1])
    (target, target_taps), (logits, taps) = outputs(pair, rows)
    found = sdq_loss(student, teacher, rows, all_losses(), 0)
    assert list(found) == ["task", *LOSSES]
    for name, (tap, loss, _) in LOSSES.items():
        if tap:
            expected = layer_mean(loss, taps[tap], target_taps[tap], rows.mask)
            assert len(taps[tap]) == 2 + (tap == "hidden")
        else:
            expected = loss(logits, target, 2.0)
        assert found[name].item() == pytest.approx(expected.item(), rel=1e-5)


def test_copy_of_the_teacher_costs_nothing(pair):
    teacher, _ = pair
    found = sdq_loss(copy.deepcopy(teacher), teacher, labeled([5, 3]), all_losses(), 0)
    values = values_of(found)
    assert values.pop("task") > 0
    assert values == pytest.approx(dict.fromkeys(LOSSES, 0.0), abs=1e-6)


def test_gradients_reach_the_student_only(pair):
    teacher, student = pair
    terms = sdq_loss(student, teacher, labeled([6, 4, 1]), all_losses(), 0)
    assert all(value.item() > 0 for value in terms.values())
    sum(terms.values()).backward()
    assert all(p.grad.to_dense().isfinite().all() for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_padding_does_not_change_the_loss(pair):
    teacher, student = pair
    rows = labeled([6, 4, 2])
    wide = replace(rows, ids=F.pad(rows.ids, (0, 5), value=1), mask=F.pad(rows.mask, (0, 5)))
    before, after = (values_of(sdq_loss(student, teacher, each, all_losses(), 0)) for each in (rows, wide))
    assert after == pytest.approx(before, rel=1e-4)


def test_batch_size_does_not_change_the_loss(pair):
    teacher, student = pair
    rows = labeled([6, 4, 2])
    twice = {name: torch.cat([getattr(rows, name)] * 2) for name in ("ids", "mask", "labels")}
    once, both = (
        values_of(sdq_loss(student, teacher, each, all_losses(), 0)) for each in (rows, replace(rows, **twice))
    )
    assert both == pytest.approx(once, rel=1e-4)


def test_no_mask_means_that_all_tokens_are_real_in_the_loss(pair):
    teacher, student = pair
    rows = labeled([5, 5])
    assert rows.mask is None
    masked = replace(rows, mask=torch.ones(2, 5, dtype=torch.bool))
    found, expected = (values_of(sdq_loss(student, teacher, each, all_losses(), 0)) for each in (rows, masked))
    assert found == pytest.approx(expected, rel=1e-5)


def test_loss_without_a_teacher_is_the_task(pair):
    """Neither --distill nor --task-weight applies to fp32 and qat."""
    _, student = pair
    rows = labeled([6, 4, 1])
    config = all_losses(task_weight=0.25, label_smoothing=0.1)
    found = sdq_loss(student, None, rows, config, 0)
    assert list(found) == ["task"]
    expected = task_terms(forward(student, rows, TrainConfig())[0], rows, 0.1)["task"]
    assert found["task"].item() == pytest.approx(expected.item())


def test_task_weight(pair):
    teacher, student = pair
    rows = labeled([6, 4, 1])
    full, weighted, none = (
        values_of(sdq_loss(student, teacher, rows, TrainConfig(task_weight=weight), 0)) for weight in (1.0, 0.25, 0.0)
    )
    assert weighted["task"] == pytest.approx(0.25 * full["task"]) and none["task"] == 0.0
    assert weighted["context"] == none["context"] == full["context"]


class Recorder(nn.Module):
    """A model that remembers which taps were captured."""

    def __init__(self, model):
        super().__init__()
        self.model, self.captured = model, []

    def forward(self, ids, mask, capture, *others):
        self.captured.append(capture)
        return self.model(ids, mask, capture, *others)


@pytest.mark.parametrize(
    ("distill", "taps"),
    [
        ("none", ()),
        ("logits", ()),
        ("logits+context", ("context",)),
        ("logits+map+30*normed", ("score", "normed")),
        ("output+residual", ("output", "residual")),
    ],
)
def test_only_needed_taps_are_captured(distill, taps, pair):
    """Without "score" and "map" attention is fused."""
    teacher, student = (Recorder(model) for model in pair)
    sdq_loss(student, teacher, labeled([6, 4]), TrainConfig(distill=distill), 0)
    assert teacher.captured == student.captured == [taps]


def test_logits_of_a_joint_head_are_added_in_the_loss(tiny_config):
    joint = replace(tiny_config, head="joint", num_slots=5)
    teacher, student = build_model(joint).eval(), build_model(joint).eval()
    rows = labeled([4, 2])
    rows.tags = torch.tensor([[IGNORE, 1, 2, IGNORE], [IGNORE, 3, IGNORE, IGNORE]])
    config = TrainConfig(distill="logits", alpha=0.5, temperature=2.0)
    (intents, slots), (target_intents, target_slots) = (
        forward(model, rows, TrainConfig())[0] for model in (student, teacher)
    )
    found = sdq_loss(student, teacher, rows, config, 0)
    assert found["logits"].item() == pytest.approx(0.5 * logits_loss(intents, target_intents, 2.0).item())
    assert found["slot_logits"].item() == pytest.approx(0.5 * logits_loss(slots, target_slots, 2.0, rows.mask).item())


def test_logits_join_the_layerwise_loss_with_alpha_in_the_last_stage(pair):
    teacher, student = pair
    rows, schedule = labeled([6, 4, 1]), LayerSchedule(layers=2, stage_steps=5)
    config = TrainConfig(distill="layerwise", alpha=0.7, temperature=2.0)
    before, last = (layerwise_loss(student, teacher, rows, config, step, schedule) for step in (9, 10))
    assert set(before) == {"hidden", "cosine", "map"}
    assert set(last) == {"hidden", "cosine", "map", "logits", "task"}
    (target, _), (logits, _) = outputs(pair, rows, ("map",))
    expected = 0.7 * logits_loss(logits, target, 2.0)
    assert last["logits"].item() == pytest.approx(expected.item())


def test_layers_above_the_stage_neither_run_nor_learn(tiny_config):
    teacher = build_model(tiny_config).eval().requires_grad_(False)
    student = build_model(tiny_config)
    config, rows = parse_args(SCRATCH)[0], tiny_batch(tiny_config)
    schedule = LayerSchedule(2, 5)
    calls = []
    student.encoder.layers[1].register_forward_hook(lambda *_: calls.append(1))
    sum(layerwise_loss(student, teacher, rows, config, 4, schedule).values()).backward()
    assert not calls and all(p.grad is None for p in student.encoder.layers[1].parameters())
    assert student.encoder.layers[0].ffn.up.weight.grad.any()
    assert student.encoder.embeddings.position.weight.grad.any()
    layerwise_loss(student, teacher, rows, config, 5, schedule)
    assert calls and all(p.grad is None for p in teacher.parameters())


def test_copy_of_the_teacher_costs_nothing_layer_by_layer(tiny_config):
    teacher = build_model(tiny_config).eval().requires_grad_(False)
    config, rows = parse_args(SCRATCH)[0], tiny_batch(tiny_config)
    for step in (0, 1, 2):
        terms = layerwise_loss(teacher, teacher, rows, config, step, LayerSchedule(2, 1))
        assert ("task" in terms) == ("logits" in terms) == (step == 2)
        for name in ("hidden", "cosine", "map"):
            assert terms[name].item() == pytest.approx(0, abs=1e-6)


# ----------------------------------------------------------------------------------------- the loop
def test_nan_raises_before_anything_is_updated(tmp_path, tiny_config):
    model = build_model(tiny_config)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with torch.no_grad():
        model.head.out_proj.bias[0] = float("nan")
    with pytest.raises(UserError, match="loss is not finite after 0 steps"):
        train.train(model, None, small_data(), small_run(tmp_path, "--steps", "1"), "fp32")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) or name == "head.out_proj.bias"


def test_scales_of_cores_are_trained(tmp_path, tiny_config):
    model = build_model(tiny_config)
    train.tensorize(model, TTConfig(rank=3))
    initialize(model)
    prepare(model, QuantConfig(weight_bits=4, keep=()))
    scales = [m.log_scale for m in model.modules() if isinstance(m, LearnedScale)]
    before = [scale.item() for scale in scales]
    made = small_run(tmp_path, *"--steps 1 --student-lr 1e-3".split())
    assert train.train(model, None, small_data(), made, "qat") > 0
    (record,) = steps_of(tmp_path, "qat")
    assert np.isfinite(record["loss"])
    moved = sum(a != b.item() for a, b in zip(before, scales, strict=True))
    assert moved == len(scales) > 20


def test_steps_on_one_batch_lower_the_loss(tmp_path, tiny_config):
    """The loss of a teacher, and that of an 8-bit student with other weights."""
    options = "--epochs 20 --student-epochs 20 --lr 1e-2 --student-lr 1e-2 --precision float32"
    made, data = small_run(tmp_path, *options.split()), small_data()
    teacher, student = (build_model(replace(tiny_config, dropout=0.0)) for _ in range(2))
    train.train(teacher, None, data, made, "fp32")
    prepare(student, QuantConfig())
    train.train(student, teacher.requires_grad_(False), data, made, "sdq")
    for method in ("fp32", "sdq"):
        losses = [record["loss"] for record in steps_of(tmp_path, method)]
        assert len(losses) == 20 and losses[-1] < 0.7 * losses[0]


# --------------------------------------------------------------------------------------- evaluation
@pytest.fixture
def flights():
    task = find_task("atis")
    names = task.names(FLIGHTS)
    words = WordTokenizer.build(s.words for s in task.read(FLIGHTS, "train")["en"])
    return encode_split(find_task("atis"), "test", "en", FLIGHTS, words, 64), names, words


class Oracle(torch.nn.Module):
    """Predicts what it is given: logits of intents and slots for the rows of a dataset."""

    def __init__(self, dataset: Dataset, intents: np.ndarray, slots: np.ndarray):
        super().__init__()
        rows = zip(dataset.starts[:-1], dataset.starts[1:], strict=True)
        self.known = {tuple(dataset.ids[a:b].tolist()): (intents[i], slots[a:b]) for i, (a, b) in enumerate(rows)}

    def forward(self, ids, mask, types=None):
        B, T = ids.shape
        intents, slots = torch.zeros(B, 100), torch.zeros(B, T, 100)
        lengths = [T] * B if mask is None else mask.sum(dim=1).tolist()
        for i, (row, length) in enumerate(zip(ids.tolist(), lengths, strict=True)):
            intent, tags = self.known[tuple(row[:length])]
            intents[i, intent] = 1
            slots[i, torch.arange(length), torch.from_numpy(tags)] = 1
        return (intents, slots), {}


def test_evaluation_of_a_joint_task_by_brute_force(flights):
    """Against the scores computed sentence by sentence from the tags themselves."""
    dataset, names, _ = flights
    rng = np.random.default_rng(0)
    wrong = rng.random(len(dataset.ids)) < 0.1
    tags = np.where(dataset.tags == IGNORE, 0, dataset.tags)
    predicted = np.where(wrong, rng.integers(0, names.known_slots, len(tags)), tags)
    intents = np.where(rng.random(len(dataset)) < 0.3, 0, dataset.labels)
    found = evaluate(Oracle(dataset, intents, predicted), dataset, CPU)
    labels, predictions, exact = [], [], 0
    for i in range(len(dataset)):
        part = slice(dataset.starts[i] + 1, dataset.starts[i + 1] - 1)  # without <s> and </s>
        labels.append([names.slots[tag] for tag in dataset.tags[part]])
        predictions.append([names.slots[tag] for tag in predicted[part]])
        exact += labels[-1] == predictions[-1] and intents[i] == dataset.labels[i]
    expected = slot_scores(predictions, labels)
    assert {key: found[key] for key in expected} == expected and 0 < expected["slot_f1"] < 100
    assert found["exact_correct"] == exact and found["correct"] == (intents == dataset.labels).sum()
    assert found["score"] == pytest.approx((found["accuracy"] + found["slot_f1"]) / 2)


def test_evaluation_in_words():
    found = {"score": -20.0, "pearson": -20.0, "spearman": -20.0, "total": 9}
    nothing = np.zeros(0)
    dataset = Dataset(nothing, nothing, nothing, metrics=("pearson", "spearman"))
    assert in_words(found, dataset) == "pearson -20.00, spearman -20.00"


# --------------------------------------------------------------------------- the command line: XNLI
def test_every_method_from_the_command_line(tmp_path):
    """A subprocess, as a user would start it: every row, all 15 languages, every file."""
    command = [sys.executable, os.path.join(ROOT, "train.py"), "--task", "xnli", "--bits", "8"]
    command += [*SCRATCH, "--data-dir", SAMPLE, "--out", str(tmp_path / "run")]
    command += "--epochs 2 --device cpu --methods fp32 ptq ptq-static qat sdq".split()
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=170)
    assert done.returncode == 0, done.stderr
    found = results(tmp_path)
    assert list(found["methods"]) == ["fp32", "ptq", "ptq-static", "qat", "sdq"]
    for name, row in found["methods"].items():
        assert len(row["languages"]) == 15
        for language in row["languages"].values():
            assert language["total"] == 3
            assert language["accuracy"] == pytest.approx(100 * language["correct"] / 3)
        others = [v["accuracy"] for k, v in row["languages"].items() if k != "en"]
        assert row["score"] == row["languages"]["en"]["accuracy"]
        assert row["zero_shot_mean"] == pytest.approx(sum(others) / 14)
        assert (row["train_seconds"] > 0) == (name in ("fp32", "qat", "sdq"))
    assert set(os.listdir(tmp_path / "run")) == {
        "config.json", "log.jsonl", "results.json", "report.md", "student.pt",
    }  # fmt: skip
    (teacher,) = os.listdir(tmp_path / "teachers")
    assert found["methods"]["fp32"]["size_bytes"] == os.path.getsize(tmp_path / "teachers" / teacher)
    assert found["methods"]["sdq"]["size_bytes"] == os.path.getsize(tmp_path / "run" / "student.pt")
    assert "| sdq " in done.stdout and done.stdout.endswith(" in all\n")
    steps = steps_of(tmp_path, "sdq")
    assert [r["step"] for r in steps] == list(range(1, 13))
    for record in steps:
        assert record["loss"] == pytest.approx(record["task"] + record["logits"] + record["context"], rel=1e-4)


def test_bfloat16_training(tmp_path, monkeypatch):
    """Products in bfloat16, parameters, losses, attention and evaluation in float32; auto asks the processor and
    leaves small models in float32.
    """
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, *rest, **more: seen.append((q.dtype, torch.is_autocast_enabled("cpu"))) or real(q, *rest, **more),
    )
    cases = (
        ("float32", True, 256),
        ("bfloat16", False, 256),
        ("auto", True, 256),
        ("auto", False, 256),
        ("auto", True, 64),
    )
    for precision, in_hardware, hidden in cases:
        monkeypatch.setattr(train, "multiplies_bf16", lambda device, found=in_hardware: found)
        options = f"--precision {precision} --hidden {hidden} --methods fp32 sdq --steps 2".split()
        assert run(tmp_path, *options, out=f"{precision}-{in_hardware}-{hidden}") == 0
    assert set(seen) == {(torch.float32, False)}
    resolved = {name.name: results(tmp_path, name.name)["config"]["precision"] for name in tmp_path.glob("*-*")}
    assert resolved["auto-True-256"] == resolved["bfloat16-False-256"] == "bfloat16"
    assert resolved["auto-False-256"] == resolved["float32-True-256"] == resolved["auto-True-64"] == "float32"
    losses = {name: [r["loss"] for r in steps_of(tmp_path, "sdq", out=name)] for name in resolved}
    assert losses["auto-True-256"] == losses["bfloat16-False-256"] != losses["float32-True-256"]
    assert losses["float32-True-256"] == losses["auto-False-256"]
    assert losses["bfloat16-False-256"] == pytest.approx(losses["float32-True-256"], rel=0.05)


def test_default_folder_is_the_same_on_every_processor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "multiplies_bf16", lambda device: True)
    options = [*SMALL, "--hidden", "256", "--methods", "fp32", "--steps", "1", "--epochs", "1"]
    options = [option for option in options if option not in ("--precision", "float32")]
    assert train.main(options) == 0
    expected = os.path.basename(default_out(parse_args(options)[0]))
    assert expected in os.listdir("out")


def test_ablations_of_a_converted_checkpoint(tmp_path, capsys):
    """Each option of an ablation must run, and each must change the loss."""
    folder = tmp_path / "hf"
    shutil.copytree(os.path.join(GOLDEN, "st"), folder)
    shutil.copy(TOKENIZER, folder)
    weights = str(tmp_path / "tiny.pt")
    assert convert.main(["tiny", "--from", str(folder), "--out", weights]) == 0
    base = ["--model", weights, "--data-dir", SAMPLE, "--max-length", "32", "--languages", "de"]
    base += ["--steps", "3", "--device", "cpu", "--methods", "sdq", "--max-train", "60"]
    arms = {
        "base": [],
        "bits": ["--bits", "4"],
        "act": ["--act-bits", "4"],
        "tensor": ["--per-tensor"],
        "mse": ["--bits", "3", "--weight-range", "mse"],
        "lsq": ["--bits", "3", "--weights", "lsq"],
        "attention": ["--attention-bits", "4"],
        "static": ["--act-range", "static"],
        "learned": ["--act-range", "learned"],
        "noise": ["--noise", "1"],
        "logits": ["--distill", "logits"],
        "output": ["--distill", "output+hidden"],
        "weights": ["--distill", "logits+150*map+normed"],
        "tau": ["--temperature", "4"],
        "alpha": ["--alpha", "1e4"],
        "beta": ["--beta", "1"],
        "labels": ["--task-weight", "0"],
        "dropout": ["--student-dropout", "0.2"],
    }
    losses = {}
    for name, options in arms.items():
        out = str(tmp_path / "out" / name)
        assert train.main([*base, *options, "--out", out]) == 0, capsys.readouterr().err
        losses[name] = tuple(r["loss"] for r in steps_of(tmp_path / "out", "sdq", name))
        assert len(losses[name]) == 3
        load_student(os.path.join(out, "student.pt"))
    assert len(set(losses.values())) == len(arms)
    assert len(os.listdir(tmp_path / "out" / "teachers")) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the GPU path is not run")
def test_every_method_on_cuda(tmp_path, monkeypatch):
    monkeypatch.setattr("run.SAVE_EVERY", 2)
    options = ["--device", "cuda", "--methods", "fp32", "ptq", "ptq-static", "qat", "sdq"]
    assert run(tmp_path, *options) == 0
    student, _ = load_student(str(tmp_path / "run" / "student.pt"))
    assert all(p.isfinite().all() for p in student.parameters())
    rows = results(tmp_path)["methods"]
    assert [name for name, row in rows.items() if "student" not in row] == ["fp32"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(capsys, tmp_path):
    assert "no CUDA device" in answer(capsys, *SMALL, "--device", "cuda", "--out", str(tmp_path))[1]


def test_default_model_is_what_is_there(capsys, tmp_path, nothing_downloaded):
    small = "--max-train 30 --max-eval 6 --steps 1 --languages de --device cpu --out".split()
    assert train.main([*small, str(tmp_path / "run")]) == 0
    output = capsys.readouterr().out
    first = output.splitlines()[0]
    assert first.startswith("model mini,") and "built in" in first
    assert "convert.py xlmr-base" in first
    assert results(tmp_path)["model"] == "mini"
    os.mkdir(tmp_path / "weights")  # as if converted: it is taken, and found damaged
    (tmp_path / "weights" / "xlmr-base.pt").write_bytes(b"")
    assert train.main([*small, str(tmp_path / "other")]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("model xlmr-base,") and "built in" not in captured.out
    assert "xlmr-base.pt is damaged" in captured.err or "xlmr-base.pt holds" in captured.err


def test_mini_reads_real_data_when_it_is_named(tmp_path, capsys):
    options = "--model mini --steps 1 --languages de --methods fp32 --device cpu".split()
    assert train.main([*options, "--data-dir", SAMPLE, "--out", str(tmp_path / "run")]) == 0
    assert results(tmp_path)["methods"]["fp32"]["languages"]["de"]["total"] == 3
    assert "built in" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "real_thing"),
    [
        ("--recipe kd --steps 2 --max-train 60 --max-eval 9", "convert.py xlmr-base"),
        ("--recipe tt --hidden 64 --steps 6 --max-eval 9", "data/fetch.py atis"),
    ],
)
def test_recipes_run_offline(options, real_thing, tmp_path, capsys, nothing_downloaded):
    """Without a download, on built-in data; the first line says how to get the published files."""
    assert train.main([*options.split(), "--device", "cpu", "--out", str(tmp_path / "run")]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert "built in" in line and "For the real thing: " in line and real_thing in line
    found = results(tmp_path)
    assert list(found["methods"]) == ["fp32", "ptq", "qat", "sdq"]
    for row in found["methods"].values():
        assert {each["total"] for each in row["languages"].values()} == {9}
    last = steps_of(tmp_path, "sdq")[-1]
    assert {"logits", "map"} <= set(last) and ("hidden" in last) == ("tt" in options)
    student, _ = load_student(str(tmp_path / "run" / "student.pt"))
    assert any(isinstance(m, TensorTrain) for m in student.modules()) == ("tt" in options)


# -------------------------------------------------------------------------------- the integer model
def evaluations_of(monkeypatch):
    """The names of all test set evaluations, and the models converted to integers, from now on."""
    names, converted = [], []
    evaluate_languages, to_integer = train.evaluate_languages, train.to_integer

    def counted(name, model, tests, *rest):
        names.append(name)
        return evaluate_languages(name, model, tests, *rest)

    def converting(student, *rest):
        converted.append(student)
        return to_integer(student, *rest)

    monkeypatch.setattr(train, "evaluate_languages", counted)
    monkeypatch.setattr(train, "to_integer", converting)
    return names, converted


def test_each_row_is_evaluated_once(tmp_path, monkeypatch):
    names, converted = evaluations_of(monkeypatch)
    calls, real = [], train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *args: calls.append(args[0]) or real(*args))
    assert run(tmp_path, "--methods", "fp32", "ptq", "sdq") == 0
    assert names == ["fp32", "ptq", "sdq"] and len(converted) == 2
    # three test sets per row; dev once in the epoch of fp32 and of sdq
    assert len(calls) == 3 * 3 + 2
    assert not any(calls[-1] is student for student in converted)  # the integer model
    assert not any("student" in row for row in results(tmp_path)["methods"].values())


def test_check_student_evaluates_twice_with_equal_figures(tmp_path, monkeypatch, capsys):
    names, converted = evaluations_of(monkeypatch)
    assert run(tmp_path, "--methods", "fp32", "ptq", "sdq", "--check-student") == 0
    fake = "fake-quantized"
    assert names == ["fp32", "ptq", f"ptq, {fake}", "sdq", f"sdq, {fake}"] and len(converted) == 2
    found = results(tmp_path)["methods"]
    assert "student" not in found["fp32"]
    for name in ("ptq", "sdq"):
        assert found[name]["student"]["languages"] == found[name]["languages"]
    assert " student |" in capsys.readouterr().out


def test_report_is_of_the_integer_model(tmp_path, monkeypatch):
    """A broken integer model shows in the row, not in the column of the student."""
    options, to_integer = ["--methods", "fp32", "ptq", "--steps", "1"], train.to_integer
    assert run(tmp_path, *options, out="sound") == 0
    for label, correct in ((0, "80"), (1, "40")):  # of three rows, in bits

        def broken(*inputs, label=label):
            model = to_integer(*inputs)
            bias = model.head.out_proj.bias
            bias.data = bias + 1e3 * F.one_hot(torch.tensor(label), 3)  # a copy: the student has the same tensor
            return model

        monkeypatch.setattr(train, "to_integer", broken)
        assert run(tmp_path, *options, "--check-student", out=f"broken{label}") == 0
        found = results(tmp_path, f"broken{label}")["methods"]["ptq"]
        assert found["languages"]["en"]["correct_rows"] == correct
        assert found["student"]["languages"] == results(tmp_path, "sound")["methods"]["ptq"]["languages"]


@pytest.mark.parametrize("bits", ["8", "32"])
def test_eval_evaluates_a_packed_student(bits, tmp_path, capsys, monkeypatch):
    """The same figures as in the report of the run that made it."""
    options = ["--bits", bits, "--methods", "fp32", "sdq", "--check-student"]
    assert run(tmp_path, *options) == 0
    capsys.readouterr()
    packed = str(tmp_path / "run" / "student.pt")
    options = ["--eval", packed, "--data-dir", SAMPLE, "--languages", "de", "--device", "cpu"]
    assert "--eval cuts texts where the student's training did" in answer(capsys, *options, "--max-length", "32")[1]
    seen, encode_split = set(), train.encode_split
    monkeypatch.setattr(train, "encode_split", lambda *args: seen.add(args[5]) or encode_split(*args))
    assert train.main(options) == 0 and seen == {32}  # not 128, the default
    row = results(tmp_path)["methods"]["sdq"]
    assert ("student" in row) == (bits == "8")  # 32: nothing to multiply in integers
    output = capsys.readouterr().out
    accuracies = [row["languages"][x]["accuracy"] for x in ("en", "de")]
    (line,) = [line for line in output.splitlines() if line.startswith("| sdq")]
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[1] == f"sdq W{bits}A8" and cells[2] == f"{accuracies[0]:.2f}"
    assert cells[-2] == f"{accuracies[1]:.1f}"
    assert ("integers" in output) == (bits == "8")


def test_eval_raises_for_other_files(tmp_path, capsys):
    assert run(tmp_path, "--steps", "1", "--methods", "fp32") == 0
    (teacher,) = (tmp_path / "teachers").iterdir()
    capsys.readouterr()
    _, error = answer(capsys, "--eval", str(tmp_path / "nowhere.pt"))
    assert "no checkpoint at" in error
    _, error = answer(capsys, "--eval", str(teacher))
    assert "is not a checkpoint of this project (sdq-student-6)" in error


def test_analyze_adds_errors_of_each_layer(tmp_path, capsys):
    assert run(tmp_path, "--analyze", "--steps", "1", "--bits", "2") == 0
    printed = capsys.readouterr().out
    assert "--weights lsq keeps far more" in printed and "error of context" in printed
    found = results(tmp_path)["methods"]
    assert "errors" not in found["fp32"]
    for name in ("ptq", "qat", "sdq"):
        assert found[name]["errors"]["local"]["query"][0]["relative"] > 0


# ------------------------------------------------------------------------------ files with mistakes
def test_missing_data(capsys, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(SAMPLE, folder)
    options = [*SCRATCH, "--data-dir", str(folder), "--out", str(tmp_path / "run")]
    (folder / "XNLI-1.0" / "xnli.test.tsv").unlink()
    _, error = answer(capsys, *options)
    assert "XNLI-1.0/xnli.test.tsv: fetch it" in error and "--eval-split dev" in error
    assert "python data/fetch.py xnli" in error
    assert train.main([*options, "--eval-split", "dev", "--steps", "1", "--methods", "fp32"]) == 0
    capsys.readouterr()
    (folder / "XNLI-1.0" / "xnli.dev.tsv").unlink()
    options[-1] = str(tmp_path / "other")
    assert "python data/fetch.py xnli" in answer(capsys, *options, "--eval-split", "dev")[1]


def test_language_without_rows(capsys, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(SAMPLE, folder)
    path = folder / "XNLI-1.0" / "xnli.test.tsv"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(x for x in lines if not x.startswith("sw\t")), encoding="utf-8")
    options = [*SCRATCH, "--data-dir", str(folder), "--out", str(tmp_path / "run")]
    assert "no test row in language 'sw'" in answer(capsys, *options)[1]


def test_longer_than_the_positions(capsys, tmp_path, tiny_config, tokenizer_bytes):
    torch.save(checkpoint_payload(build_model(tiny_config), tokenizer_bytes), tmp_path / "m.pt")
    options = ["--model", str(tmp_path / "m.pt"), "--data-dir", SAMPLE]
    options += ["--out", str(tmp_path / "run"), "--max-length", "65"]
    assert "has 64 positions; use 64 or less" in answer(capsys, *options)[1]
    assert train.main([*options[:-2], "--steps", "1", "--methods", "fp32"]) == 0  # nobody typed the default
    assert "--max-length 64 instead of 128: m has 64 positions" in capsys.readouterr().out
    assert results(tmp_path)["config"]["max_length"] == 64
    assert train.main([*options[:-2], "--steps", "1", "--methods", "fp32", "--resume"]) == 0


@pytest.mark.parametrize("tokenizer", [None, torch.zeros(9, dtype=torch.uint8), "text", "other"])
def test_checkpoint_without_a_fitting_tokenizer(tokenizer, capsys, tmp_path, tiny_config, tokenizer_bytes):
    payload = checkpoint_payload(build_model(tiny_config), tokenizer_bytes)
    if isinstance(tokenizer, str) and tokenizer == "other":
        small = replace(tiny_config, vocab_size=400)
        payload = {**checkpoint_payload(build_model(small), b"x"), "tokenizer": payload["tokenizer"]}
    else:
        payload["tokenizer"] = tokenizer
    torch.save(payload, tmp_path / "m.pt")
    options = ["--model", str(tmp_path / "m.pt"), "--data-dir", SAMPLE, "--max-length", "32"]
    _, error = answer(capsys, *options, "--out", str(tmp_path / "run"))
    assert "tokenizer" in error or "SentencePiece" in error


@pytest.mark.parametrize("content", [b"", b"garbage", "code"])
def test_bad_checkpoints(content, capsys, tmp_path):
    path = tmp_path / "m.pt"
    if content == "code":

        class Evil:
            def __reduce__(self):
                return (os.mkdir, (str(tmp_path / "evil"),))

        torch.save(Evil(), path)
    else:
        path.write_bytes(content)
    options = ["--model", str(path), "--data-dir", SAMPLE, "--out", str(tmp_path / "run")]
    assert answer(capsys, *options)[0] == 2
    assert not os.path.exists(tmp_path / "evil")


# --------------------------------------------------------------------------- the command line: GLUE
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
    """A checkpoint with random weights as convert.py writes it, with a WordPiece vocabulary."""
    text = "".join(f"{word}\n" for word in VOCABULARY)
    tokenizer = WordPieceTokenizer.from_vocab(text.encode(), lower=True)
    path = str(tmp_path / "tiny-bert.pt")
    save_atomically(checkpoint_payload(build_model(TINY), tokenizer.bytes, name="tiny"), path)
    return path


def write_task(folder, task):
    """60 training rows and 12 test rows; the first word tells the label."""
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


def on_glue(tmp_path, bert, task, *options):
    if not (tmp_path / "glue").exists():
        write_task(tmp_path / "glue", task)
    common = f"--task {task} --model {bert} --data-dir {tmp_path / 'glue'} --device cpu --epochs 1"
    return train.main([*common.split(), "--out", str(tmp_path / "run"), *options])


@pytest.mark.parametrize("task", sorted(HEADERS))
def test_every_method_on_glue(tmp_path, bert, task, capsys):
    """Teacher, PTQ, QAT, SDQ; the figures of the integer model are those of the student."""
    options = "--recipe kd --distill logits+300*map+300*normed --analyze --check-student".split()
    assert on_glue(tmp_path, bert, task, *options) == 0
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
    assert "selected on dev" in (tmp_path / "run" / "report.md").read_text()
    step = steps_of(tmp_path, "sdq")[0]
    assert {"logits", "map", "normed", "task"} <= set(step)
    assert step["loss"] == pytest.approx(sum(step[name] for name in ("logits", "map", "normed", "task")), rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        "--bits 4 --weights lsq --weight-range lsq --act-range learned",
        "--bits 4 --attention-bits 4 --act-range static --distill score",
        "--bits 2 --weights ternary --per-tensor --distill residual",
        "--distill 2*map+hidden --task-weight 0",
    ],
)
def test_other_quantizers_and_losses(tmp_path, bert, options):
    words = ["--methods", "ptq", "sdq", "--check-student", *options.split()]
    assert on_glue(tmp_path, bert, "rte", *words) == 0
    for row in results(tmp_path)["methods"].values():
        assert row["languages"] == row["student"]["languages"]


@pytest.mark.parametrize("options", ["--bits 32", "--bits 4 --act-range static"])
def test_attention_alone_is_quantized(tmp_path, bert, options):
    """Without integers to multiply, the fake-quantized student is evaluated."""
    words = ["--act-bits", "32", "--attention-bits", "4", "--check-student", *options.split()]
    assert on_glue(tmp_path, bert, "rte", "--methods", "fp32", "ptq", "sdq", *words) == 0
    assert "student" not in results(tmp_path)["methods"]["sdq"]
    student, _ = load_student(str(tmp_path / "run" / "student.pt"))
    attention = student.encoder.layers[0].attention
    assert attention.query_quantizer.static == ("static" in options)
    assert isinstance(attention.input_quantizer, torch.nn.Identity)


def test_a_saved_student_is_evaluated_again(tmp_path, bert, capsys):
    words = "--bits 2 --weights ternary --attention-bits 8 --noise 1 --methods fp32 sdq".split()
    assert on_glue(tmp_path, bert, "rte", *words) == 0
    row = results(tmp_path)["methods"]["sdq"]
    capsys.readouterr()
    student = str(tmp_path / "run" / "student.pt")
    words = ["--task", "rte", "--data-dir", str(tmp_path / "glue"), "--eval", student]
    assert train.main([*words, "--device", "cpu"]) == 0
    assert f"{row['score']:.2f}" in capsys.readouterr().out
    model, tokenizer = load_student(student)
    assert tokenizer.typed and model.config.type_vocab_size == 2


# -------------------------------------------------------------------- the command line: joint tasks
SHAPE = f"--task atis --model scratch --layers 2 --hidden 32 --device cpu --data-dir {FLIGHTS}"


def joint(tmp_path, *options, out="run"):
    return train.main([*SHAPE.split(), "--epochs", "2", "--out", str(tmp_path / out), *options])


def test_every_method_on_the_sample_of_atis(tmp_path, capsys):
    """Words, intents and slots in tensor trains: trained, quantized, packed, loaded, evaluated."""
    options = "--tt-rank 4 --bits 4 --act-range static --weight-range mse --check-student"
    assert joint(tmp_path, *options.split(), "--max-train", "64") == 0
    shown = capsys.readouterr().out
    assert "| sdq " in shown and "slot F1" in shown
    found = results(tmp_path)
    assert found["model"] == "scratch-2x32-tt4"
    assert list(found["methods"]) == ["fp32", "ptq", "qat", "sdq"]
    for name, row in found["methods"].items():
        entry = row["languages"]["en"]
        assert entry["total"] == 30 and 0 <= entry["exact"] <= entry["accuracy"]
        assert entry["accuracy"] == pytest.approx(100 * entry["correct"] / 30)
        assert {"slot_f1", "slot_token_f1", "slot_gold"} <= set(entry)
        if name != "fp32":  # the integer model is reported: the student predicts the same
            assert entry == row["student"]["languages"]["en"]
    student = str(tmp_path / "run" / "student.pt")
    assert train.main(["--task", "atis", "--data-dir", FLIGHTS, "--eval", student]) == 0
    accuracy = found["methods"]["sdq"]["languages"]["en"]["accuracy"]
    assert f"| {accuracy:.2f} |" in capsys.readouterr().out.replace("  ", " ")


def test_steps_on_one_batch_of_atis_lower_the_loss(tmp_path):
    options = "--methods fp32 --max-train 8 --epochs 20 --lr 1e-2 --dropout 0 --tt-rank 8 --precision float32"
    assert joint(tmp_path, *options.split()) == 0
    losses = [record["loss"] for record in steps_of(tmp_path, "fp32")]
    assert len(losses) == 20 and losses[-1] < 0.9 * losses[0]


def test_snips_has_the_same_layout(tmp_path):
    assert joint(tmp_path, "--task", "snips", "--methods", "fp32", "--steps", "2") == 0


def test_subwords_of_a_pretrained_model(tmp_path):
    options = "--task atis --model mini --methods fp32 qat --steps 3 --device cpu --data-dir"
    assert train.main([*options.split(), FLIGHTS, "--out", str(tmp_path / "run")]) == 0
    assert results(tmp_path)["model"] == "mini"


def test_eval_raises_for_other_labels(tmp_path, capsys):
    assert joint(tmp_path, "--methods", "ptq", "--steps", "1") == 0
    other = tmp_path / "other"
    for split in ("train", "dev", "test"):
        os.makedirs(other / split)
        for name, line in (("seq.in", "to rome to rome"), ("seq.out", "O O O O"), ("label", "go")):
            (other / split / name).write_text(line + "\n")
    student = str(tmp_path / "run" / "student.pt")
    capsys.readouterr()
    assert train.main(["--task", "atis", "--data-dir", str(other), "--eval", student]) == 2
    assert "has other labels" in capsys.readouterr().err
    assert train.main(["--task", "snips", "--data-dir", FLIGHTS, "--eval", student]) == 2
    assert "was not trained for snips" in capsys.readouterr().err


def test_eval_raises_for_other_slots(tmp_path, capsys):
    """The same intents with other slots: predicted ids would be other names."""
    assert joint(tmp_path, "--methods", "ptq", "--steps", "1") == 0
    shutil.copytree(FLIGHTS, tmp_path / "other")
    path = tmp_path / "other" / "train" / "seq.out"
    path.write_text(re.sub(r"\b[BI]-\S+", "B-place", path.read_text()))
    student = str(tmp_path / "run" / "student.pt")
    assert train.main(["--task", "atis", "--data-dir", str(tmp_path / "other"), "--eval", student]) == 2
    assert "has other labels" in capsys.readouterr().err


def test_eval_needs_the_test_files_only(tmp_path):
    assert run(tmp_path, "--methods", "ptq", "--steps", "1") == 0
    shutil.copytree(SAMPLE, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "XNLI-MT-1.0")
    (tmp_path / "data" / "XNLI-1.0" / "xnli.dev.tsv").unlink()
    student = str(tmp_path / "run" / "student.pt")
    assert train.main(["--data-dir", str(tmp_path / "data"), "--eval", student, "--device", "cpu"]) == 0


def test_teacher_of_tensor_trains_is_kept(tmp_path):
    options = "--tt-rank 4 --methods qat --weight-range mse --steps 3".split()
    assert joint(tmp_path, *options) == 0
    (name,) = os.listdir(tmp_path / "teachers")
    teacher = load_checkpoint(str(tmp_path / "teachers" / name))
    assert teacher.config.tt == TTConfig(rank=4)
    assert any(isinstance(module, TensorTrain) for module in teacher.modules())


# ------------------------------------------------------------- students in tensor trains, layerwise
COMPRESSED = "--bits 32 --act-bits 32 --tt-rank 3 --methods fp32 sdq".split()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A teacher of the NLI sample, with two layers, to start from."""
    folder = tmp_path_factory.mktemp("base")
    assert run(folder, "--methods", "fp32", "--layers", "2") == 0
    (teacher,) = os.listdir(folder / "teachers")
    weights = str(folder / "teachers" / teacher)
    return ["--model", weights, "--data-dir", SAMPLE, "--device", "cpu", "--languages", "de"]


@pytest.mark.parametrize("distill", LAYERWISE)
def test_layer_by_layer(distill, pretrained, tmp_path, capsys):
    """A dense teacher and its tensor train: terms of each stage, and the rates, from the log."""
    options = [*pretrained, *COMPRESSED, "--distill", distill, "--student-lr", "1e-3"]
    options += ["--epochs", "1", "--student-epochs", "2", "--out", str(tmp_path / "run")]
    assert train.main(options) == 0
    assert "tensor trains" in capsys.readouterr().out
    steps = steps_of(tmp_path, "sdq")
    assert len(steps) == 12  # two stages of three steps, then the last stage
    for i, record in enumerate(steps):
        terms = {"hidden", "cosine", "map"} | ({"logits", "task"} if i >= 6 else set())
        assert terms <= set(record) and ("task" in record) == (i >= 6)
        assert record["loss"] == pytest.approx(sum(record[term] for term in terms), rel=1e-4)
    assert steps[5]["lr"] == 1e-3 and steps[6]["lr"] == pytest.approx(1e-3 / 20)
    assert steps[-1]["lr"] == pytest.approx(1e-3 / 20 / 6)
    curve = results(tmp_path)["methods"]["sdq"]["dev_curve"]
    assert [step for step, _ in curve] == [6, 12]


def test_a_student_starts_as_its_teachers_svd(pretrained, tmp_path, monkeypatch):
    base = [*pretrained, *COMPRESSED, *"--steps 8 --distill layerwise".split()]
    first, real = {}, train.tensorize

    def random_cores(model, tt, from_weights=False):
        return real(model, tt)

    for start, rank in ((real, 3), (real, 16), (random_cores, 16)):
        monkeypatch.setattr(train, "tensorize", start)
        out = f"{'svd' if start is real else 'random'}{rank}"
        assert train.main([*base, "--tt-rank", str(rank), "--out", str(tmp_path / out)]) == 0
        first[out] = next(r["hidden"] for r in log_of(tmp_path, out) if "hidden" in r)
    assert first["svd16"] < first["svd3"] and first["svd16"] < first["random16"]


def test_quantized_student_of_a_dense_teacher(pretrained, tmp_path):
    options = "--tt-rank 3 --bits 4 --methods fp32 ptq sdq --steps 3 --check-student".split()
    assert train.main([*pretrained, *options, "--out", str(tmp_path / "run")]) == 0
    rows = results(tmp_path)["methods"]
    assert rows["sdq"]["languages"] == rows["sdq"]["student"]["languages"]
    assert rows["sdq"]["size_bytes"] < rows["fp32"]["size_bytes"] / 1.5


def test_too_few_steps_for_the_stages(pretrained, tmp_path, capsys):
    """Raises before the teacher is trained."""
    options = [*pretrained, *COMPRESSED, *"--distill layerwise --steps 2 --out".split()]
    assert train.main([*options, str(tmp_path / "run")]) == 2
    assert "needs more than 2 steps for 2 layers, not 2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists() and not (tmp_path / "teachers").exists()


# ------------------------------------------------------------------------------ a task of one's own
def test_own_rows_in_another_language_than_english(tmp_path, capsys):
    """Trained on German; the test languages, one with a slash, come from the files."""
    counts = {"train": {"de": 24}, "dev": {"de": 6}, "test": {"am": 2, "de": 4, "pt/br": 3}}
    for split, languages in counts.items():
        rows = [
            f"{x}\t{('local', 'big sports')[i % 2]}\tder Mann {i}\n" for x, n in languages.items() for i in range(n)
        ]
        (tmp_path / f"{split}.tsv").write_text("".join(["language\tlabel\ttext\n", *rows]), encoding="utf-8")
    options = [*SCRATCH, *"--task tsv --epochs 1 --device cpu --methods fp32 ptq".split()]
    options += ["--data-dir", str(tmp_path), "--out", str(tmp_path / "run")]
    assert train.main(options) == 0
    found = results(tmp_path)
    assert found["languages"] == ["de", "am", "pt/br"] and found["train_examples"] == 24
    for row in found["methods"].values():
        tests = row["languages"]
        assert {name: test["total"] for name, test in tests.items()} == {
            "de": 4, "am": 2, "pt/br": 3,
        }  # fmt: skip
        assert row["score"] == tests["de"]["accuracy"]
        others = (tests["am"]["accuracy"] + tests["pt/br"]["accuracy"]) / 2
        assert row["zero_shot_mean"] == pytest.approx(others)
    table = (tmp_path / "run" / "report.md").read_text().split("\n")
    header = [cell.strip() for cell in table[0].split("|")[1:-1]]
    assert header[1:3] == ["de", "zero-shot"] and header[-2:] == ["am", "pt/br"]
    assert "en" not in header and not re.search(r"\ben\b", capsys.readouterr().out)
    out = [*options[:-1], str(tmp_path / "one"), "--languages", "pt/br"]
    assert train.main(out) == 0
    assert results(tmp_path, "one")["languages"] == ["de", "pt/br"]
    student = str(tmp_path / "run" / "student.pt")
    assert train.main(["--task", "tsv", "--data-dir", str(tmp_path), "--eval", student]) == 0
    assert "| pt/br |" in capsys.readouterr().out
    (text,) = predict.predict(predict.load(student), ["der Mann 3"])
    assert text[0] in ("local", "big sports")
    # an evaluation needs test.tsv alone, whose rows are of the student's kind
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").unlink()
    assert train.main(["--task", "tsv", "--data-dir", str(tmp_path), "--eval", student]) == 0
    assert "| pt/br |" in capsys.readouterr().out
    (tmp_path / "test.tsv").write_text("text\ttext2\tlabel\nb\tc\tlocal\n", encoding="utf-8")
    read_own.cache_clear()
    assert (
        "reads 1 text(s) per row" in answer(capsys, "--task", "tsv", "--data-dir", str(tmp_path), "--eval", student)[1]
    )
    (tmp_path / "test.tsv").write_text("text\tlabel\nb\telse\n", encoding="utf-8")
    read_own.cache_clear()
    error = answer(capsys, "--task", "tsv", "--data-dir", str(tmp_path), "--eval", student)[1]
    assert "test.tsv, line 2: unknown label 'else'" in error


def test_own_tests_in_other_languages_alone(tmp_path, capsys):
    """Trained on English, tested in German: there is no score in the training language."""
    for split, language in (("train", "en"), ("dev", "en"), ("test", "de")):
        rows = [f"das {word} {i}\t{word}\t{language}\n" for i in range(9) for word in ("good", "bad")]
        (tmp_path / f"{split}.tsv").write_text("".join(["text\tlabel\tlanguage\n", *rows]), encoding="utf-8")
    options = [*SCRATCH, *"--task tsv --steps 2 --device cpu --methods fp32 ptq".split(), "--data-dir", str(tmp_path)]
    assert train.main([*options, "--out", str(tmp_path / "run")]) == 0
    found = results(tmp_path)
    assert found["languages"] == ["de"]
    for row in found["methods"].values():
        assert row["score"] is None and row["zero_shot_mean"] == row["languages"]["de"]["accuracy"]
    assert "Always predicting the most frequent class of the test rows gives 50.0." in capsys.readouterr().out


def test_a_run_says_what_it_trains_on(tmp_path, capsys):
    """Classes with their counts, rows left aside, steps, and texts that lose their ends, by split."""

    def write(split, rows):
        lines = ["text\tlabel\tlanguage", *("\t".join(row) for row in rows)]
        (tmp_path / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")

    rows = [("der Mann " * (40 if i == 3 else 2), ("Good", "bad", "good")[i % 3], "de") for i in range(30)]
    write("train", [*rows, ("un", "bad", "fr"), ("a", "bad", "en"), ("b", "good", "en")])
    for split in ("dev", "test"):
        write(split, rows[:9])
    options = [
        *SCRATCH,
        *"--task tsv --epochs 2 --student-epochs 1 --device cpu --methods fp32 --max-length 16".split(),
    ]
    options += ["--data-dir", str(tmp_path), "--train-language", "de", "--batch-size", "8"]
    assert train.main([*options, "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    for line in (
        "30 training examples, 9 test examples in 1 sets",
        "classes: good 10, bad 10, Good 10",
        "NOTE: Good, good differ only in capitals, and are different classes",
        "trained on de (--train-language); rows of train left aside: fr 1, en 2",
        "steps of 8: teacher 8, students 4",
        "NOTE: 1 of 30 train texts are longer than 16 tokens and lose ",
        "NOTE: 1 of 9 dev texts are longer than 16 tokens and lose ",
        "NOTE: 1 of 9 test texts are longer than 16 tokens and lose ",
    ):
        assert line in printed
    facts = printed.split("steps of")[0]
    assert facts.count("\n") < 9


def test_classes_of_words_are_counted(tmp_path, capsys):
    options = ["--task", "atis", "--data-dir", FLIGHTS, *"--model scratch --hidden 64 --layers 1 --steps 1".split()]
    assert train.main([*options, "--methods", "fp32", "--out", str(tmp_path / "run")]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("classes: ")]
    intents = Counter(sentence.intent for sentence in load(find_task("atis"), "train", "en", FLIGHTS))
    assert sorted(line.removeprefix("classes: ").split(", ")) == sorted(f"{x} {n}" for x, n in intents.items())

"""train.py: rates and optimizers, the losses, the loop and its plans, and runs from the command line to the report."""

import copy
import math
import os
import random
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FLIGHTS, SAMPLE, SCRATCH, SMALL, WORDS, answer, batch, log_of, random_ids, results, run
from torch import nn

import train
from checkpoint import fake_quantized, read_model, read_student, save_model, teacher_model
from config import TrainConfig, default_out, parse_args
from data.batches import IGNORE, Batch, Dataset, training_batch
from data.glue import GLUE
from distill import LAYERWISE, LOSSES, logits_loss, logits_terms, vector_loss
from kit.common import UserError
from kit.run import Run
from model import build_model, set_dropout
from pq import product_quantizers
from prepare import prepare
from quant import QuantConfig, WeightQuantizer
from train import Plan, clip_gradients, forward, layerwise_loss, linear_rate, make_optimizers, sdq_loss, task_terms
from tt import TensorTrain, TTConfig, tensorize


def options_of(words):
    return parse_args([*SCRATCH, "--device", "cpu", *words.split()])[0]


def steps_of(folder, method, out="run"):
    """The log of the steps of one training."""
    return [r for r in log_of(folder, out) if r["method"] == method and "loss" in r]


def labeled(lengths):
    """A Batch for tiny_config of sequences with the labels 0, 1, 2, 0, ..."""
    return replace(batch(lengths), labels=torch.arange(len(lengths)) % 3)


# ----------------------------------------------------------------------------- rates and optimizers
def test_learning_rate():
    rates = [linear_rate(step, 100, 1.0) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == max(rates) == linear_rate(0, 1, 1.0) == 1.0
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False)) and 0 < rates[99] < 0.02


def test_clip_gradients_counts_sparse_ones():
    table, linear = nn.Embedding(10, 4, sparse=True), nn.Linear(4, 2)
    model = nn.ModuleList([table, linear])
    (50 * linear(table(torch.tensor([1, 1, 3]))).square().sum()).backward()
    before = [p.grad.to_dense().clone() for p in model.parameters()]
    expected = torch.cat([g.flatten() for g in before]).norm()
    torch.testing.assert_close(clip_gradients(model, 0.5), expected)
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.grad.to_dense(), gradient * 0.5 / expected)


# --------------------------------------------------------------------------------- losses of a task
def test_loss_of_a_joint_task_is_that_of_intents_and_real_words():
    intents, slots = torch.randn(2, 4), torch.randn(2, 3, 5)
    tags = torch.tensor([[IGNORE, 2, 4], [IGNORE, 1, IGNORE]])
    rows = Batch(torch.zeros(2, 3, dtype=torch.int64), None, torch.tensor([3, 0]), 6, tags)

    def cost(logits, wanted, smoothing):  # smoothing: the part of the target that all classes share
        logs = [row.log_softmax(0) for row in logits]
        costs = [(1 - smoothing) * log[i] + smoothing * log.mean() for log, i in zip(logs, wanted, strict=True)]
        return pytest.approx(-sum(costs).item() / len(costs))

    words = [slots[0, 1], slots[0, 2], slots[1, 1]], [2, 4, 1]
    terms = task_terms((intents, slots), rows)
    assert terms["task"].item() == cost(intents, [3, 0], 0.1)
    assert terms["slots"].item() == cost(*words, 0.1)
    assert task_terms(slots, rows)["task"].item() == cost(*words, 0.0)  # a token head


def test_loss_of_a_regression_is_the_squared_error(tiny_config):
    rows = replace(labeled([3, 3]), labels=torch.tensor([1.0, 4.0]))
    assert task_terms(torch.tensor([[2.0], [4.5]]), rows)["task"] == pytest.approx((1.0 + 0.25) / 2)
    teacher, student = (build_model(replace(tiny_config, num_labels=1, dropout=0.0)) for _ in range(2))
    terms = sdq_loss(student, teacher, rows, TrainConfig(distill="0*task+logits+map"))
    assert set(terms) == {"task", "logits", "map"} and terms["task"].item() == 0.0
    terms["task"].backward()  # the labels teach nothing
    assert not any(p.grad.to_dense().any() for p in student.parameters() if p.grad is not None)


def test_teacher_and_student_read_token_types(tiny_config):
    """Other types give other outputs: neither model may run without them."""
    teacher, student = (build_model(replace(tiny_config, type_vocab_size=2)).eval() for _ in range(2))
    plain = replace(labeled([5]), types=torch.zeros(1, 5, dtype=torch.int64))
    typed = replace(plain, types=torch.tensor([[0, 0, 0, 1, 1]]))
    config = TrainConfig(distill="logits", alpha=1.0)
    logits, target = (model(typed.ids, types=typed.types)[0] for model in (student, teacher))
    found = sdq_loss(student, teacher, typed, config)
    assert found["logits"].item() == pytest.approx(logits_loss(logits, target).item())
    assert found["task"].item() == pytest.approx(F.cross_entropy(logits, typed.labels).item())
    assert found["logits"] != sdq_loss(student, teacher, plain, config)["logits"]


# -------------------------------------------------------------------------------- losses of SDQ
# What all losses have in common is tested in test_distill.py.
def test_terms_of_sdq(models):
    """L = CE + alpha tau^2 KL + beta mean over layers and heads of the MSE of the contexts."""
    teacher, student = models
    rows = labeled([6, 4, 1])
    config = TrainConfig(alpha=0.25, beta=7.0, temperature=3.0)
    found = sdq_loss(student, teacher, rows, config)
    assert list(found) == ["task", "logits", "context"]
    (target, target_taps), (logits, taps) = (forward(model, rows, config, ("context",)) for model in models)
    assert found["task"].item() == pytest.approx(F.cross_entropy(logits, rows.labels).item())
    soft, hard = (each / 3.0 for each in (target, logits))
    divergence = (soft.softmax(-1) * (soft.log_softmax(-1) - hard.log_softmax(-1))).sum() / 3
    assert found["logits"].item() == pytest.approx(0.25 * 9.0 * divergence.item(), rel=1e-4)
    errors = []
    for s, t in zip(taps["context"], target_taps["context"], strict=True):  # (B, H, T, D)
        real = (s - t).transpose(1, 2)[rows.mask]  # (real tokens, H, D)
        errors += [real[:, head].square().mean().item() for head in range(4)]
    assert len(errors) == 8 and math.isclose(found["context"].item(), 7.0 * sum(errors) / 8, rel_tol=1e-5)


def test_weights_in_distill_replace_alpha_and_beta(models):
    teacher, student = models
    rows = labeled([6, 4, 1])
    ones = TrainConfig(distill="+".join(LOSSES), alpha=1.0, beta=1.0, temperature=2.0)
    found = sdq_loss(student, teacher, rows, ones)
    assert list(found) == ["task", *LOSSES]
    config = TrainConfig(distill="3*logits+0*score+0.25*task+map+0.5*normed", alpha=0.5, beta=10.0, temperature=2.0)
    weights = {"task": 0.25, "logits": 3.0, "score": 0.0, "map": 10.0, "normed": 0.5}
    weighted = {name: term.item() for name, term in sdq_loss(student, teacher, rows, config).items()}
    assert weighted == pytest.approx({name: weight * found[name].item() for name, weight in weights.items()})
    alone = sdq_loss(student, None, rows, config)  # fp32 and qat: the labels, with their whole weight
    assert list(alone) == ["task"] and alone["task"].item() == pytest.approx(found["task"].item())


def test_a_loss_of_the_last_layer_alone(models):
    teacher, student = models
    rows = labeled([6, 4, 1])
    (_, target), (_, taps) = (forward(model, rows, TrainConfig(), ("context", "hidden")) for model in models)
    found = sdq_loss(student, teacher, rows, TrainConfig(distill="3*context@last+context+2*hidden@last", beta=1.0))
    for name, weight in {"context": 3, "hidden": 2}.items():
        alone = vector_loss(taps[name][-1], target[name][-1], rows.mask).item()
        assert found[f"{name}@last"].item() == pytest.approx(weight * alone)
    assert train.means_over("sequence")["context@last"] == "tokens" and found["context"] != found["context@last"] / 3


def test_logits_of_a_joint_head_are_two_terms_with_alpha(tiny_config):
    teacher, student = (build_model(replace(tiny_config, head="joint", num_slots=5)).eval() for _ in range(2))
    rows = labeled([4, 2])
    rows.tags = torch.tensor([[IGNORE, 1, 2, IGNORE], [IGNORE, 3, IGNORE, IGNORE]])
    config = TrainConfig(distill="logits", alpha=0.5, temperature=2.0)
    logits, target = (forward(model, rows, config)[0] for model in (student, teacher))
    found = sdq_loss(student, teacher, rows, config)
    for name, term in logits_terms(logits, target, 2.0, rows.mask).items():  # test_distill.py
        assert found[name].item() == pytest.approx(0.5 * term.item())


def test_only_needed_taps_are_captured(models, monkeypatch):
    """Without "score" and "map" attention is fused."""
    captured, wanted = [], {"none": (), "logits+0.5*task": (), "logits+context": ("context",)}
    wanted["30*normed+map"] = ("normed", "score")
    monkeypatch.setattr(train, "forward", lambda *args: captured.append(args[3]) or forward(*args))
    for distill in wanted:
        sdq_loss(*models, labeled([6, 4]), TrainConfig(distill=distill))
    assert captured == [taps for taps in wanted.values() for _ in models]


def test_layerwise_loss(models):
    """Only the active layers run and learn; the logits, with alpha, and the task join in the last stage."""
    teacher, student = models
    rows, ran, config = labeled([6, 4, 1]), [], TrainConfig(alpha=0.7, temperature=2.0)
    student.train()
    for model in (teacher, student):
        model.encoder.layers[1].register_forward_hook(lambda *_: ran.append(1))
    first = layerwise_loss(student, teacher, rows, config, (1,), False)
    assert set(first) == {"hidden", "cosine", "map"} and not ran
    sum(first.values()).backward()
    assert all(p.grad is None for p in student.encoder.layers[1].parameters())
    assert student.encoder.layers[0].ffn.up.weight.grad.any()
    assert student.encoder.embeddings.position.weight.grad.any()
    last = layerwise_loss(student.eval(), teacher, rows, config, (1, 2), True)
    assert set(last) == {"hidden", "cosine", "map", "logits", "task"} and len(ran) == 2
    assert all(p.grad is None for p in teacher.parameters())
    logits, target = (forward(model, rows, config)[0] for model in (student, teacher))
    assert last["logits"].item() == pytest.approx(0.7 * logits_loss(logits, target, 2.0).item(), rel=1e-4)
    assert last["task"].item() == pytest.approx(F.cross_entropy(logits, rows.labels).item(), rel=1e-4)


# --------------------------------------------------------------------------- the loop and its plans
def small_data(rows=3):
    """Rows of 7 tokens for tiny_config."""
    ids = random_ids([7] * rows, 442)[0].int().flatten().numpy()
    dataset = Dataset(ids, np.arange(0, 7 * rows + 1, 7), torch.randint(0, 3, (rows,)).numpy())
    return train.Data(dataset, dataset, {"en": dataset}, dataset)


def small_run(tmp_path, words):
    made = Run(str(tmp_path / "run"), options_of(words), torch.device("cpu"), False)
    os.makedirs(made.out)
    return made


def test_three_steps_by_hand(tmp_path, models):
    """The loss, the rate and the parameters of a loop in plain PyTorch."""
    teacher = models[0]
    student = copy.deepcopy(teacher)
    set_dropout(student, 0.0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    by_hand, data = copy.deepcopy(student), small_data(9)
    made = small_run(tmp_path, "--batch-size 3 --epochs 1 --student-lr 1e-2 --distill logits --seed 3")
    train.train(student, teacher, data, made, "sdq")

    table = by_hand.encoder.embeddings.word.weight
    others = [p for p in by_hand.parameters() if p is not table]
    groups = [{"params": [p for p in others if p.dim() == 2], "weight_decay": 0.01}]
    groups += [{"params": [p for p in others if p.dim() == 1], "weight_decay": 0.0}]
    optimizers = torch.optim.AdamW(groups, fused=True), torch.optim.SparseAdam([table])
    for step, record in enumerate(steps_of(tmp_path, "sdq")):
        rows, rate = training_batch(data.train, 3, 3, step), (1e-2, 1e-2, 0.5e-2)[step]
        logits, target = by_hand(rows.ids)[0], teacher(rows.ids)[0]
        task = F.cross_entropy(logits, rows.labels)
        divergence = F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True)
        (task + 0.5 * divergence).backward()
        norm = sum(p.grad.to_dense().square().sum() for p in by_hand.parameters()).sqrt()
        for parameter in by_hand.parameters():
            parameter.grad *= min(1.0, 1.0 / norm.item())
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        expected = {"step": step + 1, "task": task.item(), "logits": 0.5 * divergence.item(), "norm": norm.item()}
        assert {name: record[name] for name in expected} == pytest.approx(expected, rel=1e-4)
        assert record["lr"] == pytest.approx(rate) and record["tokens"] == 21
    for (name, found), expected in zip(student.named_parameters(), by_hand.parameters(), strict=True):
        if not name.endswith("key.bias"):  # its gradient is 0 but for rounding, which AdamW makes a whole step
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_nan_raises_before_anything_is_updated(tmp_path, tiny_config):
    model = build_model(tiny_config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.head.out_proj.bias[0] = float("nan")
    with pytest.raises(UserError, match="loss is not finite after 0 steps"):
        train.train(model, None, small_data(), small_run(tmp_path, "--steps 1"), "fp32")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) or name == "head.out_proj.bias"


def test_a_plan_of_ones_own(tmp_path, models, monkeypatch):
    """The share of quantized weights rises from step to step."""
    seen = []

    class RisingNoise(Plan):
        def begin(self, step, optimizers):
            for module in self.model.modules():
                if isinstance(module, WeightQuantizer):
                    module.noise = (step + 1) / self.steps

        def loss(self, batch, step):
            seen.append((step, self.model.encoder.layers[0].ffn.up.weight_quantizer.noise))
            return super().loss(batch, step)

    monkeypatch.setattr(train, "make_plan", RisingNoise)
    train.train(models[1], models[0], small_data(), small_run(tmp_path, "--student-epochs 4 --accumulate 2"), "sdq")
    assert seen == [(step, (step + 1) / 4) for step in range(4) for _ in range(2)]  # of each part of a batch
    assert [record["step"] for record in steps_of(tmp_path, "sdq")] == [1, 2, 3, 4]


def plan_of(words, model, rows=38):
    return train.make_plan(options_of(words), model, model, rows, "sdq")


def test_evaluations_follow_each_epoch_and_eval_every(models):
    """An epoch of 38 rows in batches of 8 has 5 steps."""
    plan = plan_of("--student-epochs 2 --batch-size 8 --eval-every 3 --student-steps 9", models[1])
    assert type(plan) is Plan and [step + 1 for step in range(plan.steps) if plan.evaluates(step)] == [3, 5, 6, 9]


@pytest.mark.parametrize("distill", LAYERWISE)
def test_layerwise_plan(distill, models, monkeypatch):
    """The rate by hand, the layers of each stage, and the order that --distill names."""
    monkeypatch.setattr(train, "LAST_STAGE_LR", 0.5)
    plan = plan_of(f"--distill {distill} --student-lr 1 --student-epochs 40", models[1], rows=32)
    rates = [plan.rate(step) for step in range(plan.steps)]
    assert len(rates) == 40 and rates[:3] == [0.5, 1.0, 1.0] and set(rates[2:20]) == {1.0}
    assert rates[20] == 0.5 and rates[30] == 0.25 and rates[39] == pytest.approx(0.025)
    first = {"layerwise": (1,), "layerwise-top-down": (2,), "layerwise-together": (1, 2)}[distill]
    assert (plan.schedule.active(9), plan.schedule.active(10)) == (first, (1, 2))
    terms = [set(plan.loss(labeled([5, 3]), step)) for step in (9, 19, 20)]
    assert terms[0] == terms[1] == {"hidden", "cosine", "map"} and terms[2] - terms[1] == {"logits", "task"}
    assert type(train.make_plan(plan.config, models[1], None, 32, "qat")) is Plan


def test_product_plan(tiny_config):
    """Three stages with a rate and fresh moments each; only what is quantized completely is evaluated."""
    model = build_model(tiny_config)
    prepare(model, QuantConfig(weights="pq"))
    plan, resumed = (plan_of("--weights pq --student-lr 1 --student-epochs 10", model, rows=8) for _ in range(2))
    optimizers = make_optimizers(model)
    rates, waiting, cleared, evaluated = [], [], [], []
    for step in range(plan.steps):
        optimizers[0].state[model.head.dense.weight] = {"step": step}
        plan.begin(step, optimizers)
        rates.append(plan.rate(step))
        waiting.append(sum(quantizer.waiting for quantizer, _ in product_quantizers(model)))
        cleared += [step] * (not optimizers[0].state)
        evaluated += [step] * plan.evaluates(step)
    assert rates == [linear_rate(step, length, 1.0) for length in (3, 3, 4) for step in range(length)]
    assert waiting == [9] * 3 + [8] * 3 + [0] * 4 and cleared == [0, 3, 6] and evaluated == [6, 7, 8, 9]
    resumed.begin(8, optimizers)
    assert optimizers[0].state and resumed.rate(8) == rates[8] and resumed.evaluates(8)


# --------------------------------------------------------------------------- the command line: XNLI
def test_every_method_from_the_command_line(xnli_run):
    """Every row, all 15 languages, every file."""
    folder, printed = xnli_run
    found = results(folder)
    assert list(found["methods"]) == ["fp32", "ptq", "ptq-static", "qat", "sdq"]
    for name, row in found["methods"].items():
        assert len(row["languages"]) == 15
        for language in row["languages"].values():
            assert (language["total"], language["accuracy"]) == (3, pytest.approx(100 * language["correct"] / 3))
        assert row["score"] == row["languages"]["en"]["accuracy"]
        assert (row["train_seconds"] > 0) == (name in ("fp32", "qat", "sdq"))
        if name == "fp32":
            assert not {"student", "errors", "recovery"} & set(row)
        else:  # the integer model gives the figures of the fake-quantized student
            assert row["student"]["languages"] == row["languages"]
            assert row["errors"]["local"]["query"][1]["relative"] > 0 and len(row["recovery"]["ranking"]) == 2
    files = {"config.json", "log.jsonl", "results.json", "report.md", "student.safetensors"}
    assert set(os.listdir(folder / "run")) == files
    (teacher,) = (folder / "teachers").iterdir()
    assert found["methods"]["fp32"]["size_bytes"] == os.path.getsize(teacher)
    assert found["methods"]["sdq"]["size_bytes"] == os.path.getsize(folder / "run" / "student.safetensors")
    assert all(text in printed for text in ("| sdq ", " student |", "error of context"))
    steps = steps_of(folder, "sdq")
    assert [r["step"] for r in steps] == list(range(1, 13))
    for record in steps:
        assert record["loss"] == pytest.approx(record["task"] + record["logits"] + record["context"], rel=1e-4)


def test_report_is_of_the_integer_model(tmp_path, monkeypatch):
    """It alone is evaluated, once; if it is broken, the row shows that."""
    evaluated, real, to_integer = [], train.evaluate_languages, train.to_integer
    monkeypatch.setattr(train, "evaluate_languages", lambda name, *rest: evaluated.append(name) or real(name, *rest))
    options = ["--methods", "fp32", "ptq", "--steps", "1"]
    assert run(tmp_path, *options, out="sound") == 0 and evaluated == ["fp32", "ptq"]
    for label, correct in ((0, "80"), (2, "20")):  # of three rows in the order of the file, in bits

        def broken(*inputs, label=label):
            model = to_integer(*inputs)
            bias = model.head.out_proj.bias
            bias.data = bias + 1e3 * F.one_hot(torch.tensor(label), 3)  # a copy: the student has the same tensor
            return model

        monkeypatch.setattr(train, "to_integer", broken)
        assert run(tmp_path, *options, "--analyze", out=f"broken{label}") == 0
        found = results(tmp_path, f"broken{label}")["methods"]["ptq"]
        assert {row["correct_rows"] for row in found["languages"].values()} == {correct}
        assert found["student"]["languages"] == results(tmp_path, "sound")["methods"]["ptq"]["languages"]
    assert evaluated == ["fp32", "ptq", *["fp32", "ptq", "ptq, fake-quantized"] * 2]


def test_bfloat16_training(tmp_path, monkeypatch):
    """Products in bfloat16, parameters, losses, attention and evaluation in float32."""
    seen, losses, real = [], [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, *rest, **more: seen.append((q.dtype, torch.is_autocast_enabled("cpu"))) or real(q, *rest, **more),
    )
    for precision in ("float32", "bfloat16"):
        options = f"--precision {precision} --model scratch-1x64 --methods fp32 sdq --steps 2".split()
        assert run(tmp_path, *options, out=precision) == 0
        losses.append([r["loss"] for r in steps_of(tmp_path, "sdq", out=precision)])
    assert set(seen) == {(torch.float32, False)}
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize(
    "hidden, hardware, precision", [(256, True, "bfloat16"), (256, False, "float32"), (64, True, "float32")]
)
def test_auto_precision(hidden, hardware, precision, tmp_path, monkeypatch):
    """It asks the processor, and leaves small models in float32. The folder is the same in any case."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("config.multiplies_bf16", lambda device: hardware)
    config = parse_args([*SMALL, "--model", f"scratch-1x{hidden}", "--precision", "auto"])[0]
    opened, _, _ = train.open_run(config, False)
    assert opened.config.precision == precision and opened.out == default_out(config)


def test_a_teacher_of_other_code_is_used_with_a_note(tmp_path, capsys, monkeypatch):
    """No note if the code is the same."""
    options = ["--methods", "fp32", "--steps", "1"]
    assert run(tmp_path, *options, out="a") == 0 and run(tmp_path, *options, out="b") == 0
    output = capsys.readouterr().out
    assert output.count("fp32: teacher from") == 1 and "this teacher" not in output
    digests = train.code_digests()
    assert [each.partition("=")[0] for each in digests.split()] == train.TEACHER_CODE
    changed = re.sub(r"(model.py|data/batches.py)=", r"\1=0", digests)
    monkeypatch.setattr(train, "code_digests", lambda: changed)
    assert run(tmp_path, *options, out="c") == 0
    (teacher,) = (tmp_path / "teachers").iterdir()
    note = "NOTE: data/batches.py, model.py changed since this teacher was trained: to train it again, delete"
    output = capsys.readouterr().out
    assert f"{note} {teacher}\n" in output and "fp32: step" not in output
    assert digests == read_model(str(teacher)).notes["code"]


def test_a_gate_ends_with_status_1(tmp_path, monkeypatch, capsys):
    """After everything was written."""
    options = "--steps 1 --methods fp32 ptq --gate".split()
    assert run(tmp_path, *options, "100") == 0
    monkeypatch.setattr(
        "kit.report.compared_score", lambda row, task: -row["size_bytes"]
    )  # fp32 is worse: it is larger
    assert run(tmp_path, *options, "100") == 0
    monkeypatch.setattr("kit.report.compared_score", lambda row, task: row["size_bytes"])
    capsys.readouterr()
    assert run(tmp_path, *options, "100") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"--gate 100: ptq loses \d+.00 points on the mean against fp32", last)
    assert (tmp_path / "run" / "report.md").exists()


ARMS = """
    --bits 8                --per-tensor               --act-range static         --distill logits
    --bits 4                --act-bits 4               --act-range learned        --distill output+hidden
    --noise 1               --attention-bits 4         --student-dropout 0.2      --distill logits+150*map+normed
    --temperature 8 --alpha 1e3                        --alpha 1e4                --distill 0*task+logits+context
    --beta 1                --weights pq               --tt-rank 3 --bits 4       --student-lr 1e-3
    --bits 3 --weights lsq  --bits 3                   --bits 3 --weight-range minmax
    --bits 4 --weights lsq --act-range learned         --bits 4 --attention-bits 4 --act-range static --distill score
    --bits 32 --act-bits 32 --attention-bits 4         --bits 2 --weights ternary --per-tensor --distill residual
    --bits 32               --act-bits 32 --bits 4 --attention-bits 4 --act-range static
"""


def test_options_of_quantizers_and_losses(xnli_run, tmp_path):
    """Each runs from the teacher to the report and changes the loss; the integer model has the student's figures."""
    (teacher,) = (xnli_run[0] / "teachers").iterdir()
    base = f"--model {teacher} --data-dir {SAMPLE} --max-length 32 --languages de --device cpu --max-train 60"
    base += " --epochs 0 --student-epochs 2 --student-steps 3 --methods sdq --analyze"
    losses = {}
    for i, arm in enumerate(filter(None, map(str.strip, re.split(r"\n|  +", ARMS)))):
        out = tmp_path / str(i)
        assert train.main([*base.split(), "--out", str(out), *arm.split()]) == 0
        losses[arm] = tuple(record["loss"] for record in steps_of(tmp_path, "sdq", out))
        row = results(tmp_path, out)["methods"]["sdq"]
        floats = re.search(r"bits 32", arm)  # there are no integers to multiply
        assert "student" not in row if floats else row["student"]["languages"] == row["languages"], arm
        fake_quantized(read_student(str(out / "student.safetensors")))
    base = losses.pop("--bits 8")
    assert len(losses) == 27 and base not in losses.values(), losses


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the GPU path is not run")
def test_every_method_on_cuda(tmp_path, monkeypatch):
    monkeypatch.setattr("kit.run.SAVE_EVERY", 2)
    assert run(tmp_path, *"--device cuda --methods fp32 ptq ptq-static qat sdq".split()) == 0
    student = fake_quantized(read_student(str(tmp_path / "run" / "student.safetensors")))
    rows = results(tmp_path)["methods"]
    assert all(p.isfinite().all() for p in student.parameters())
    assert [name for name, row in rows.items() if "student" not in row] == ["fp32"]


@pytest.mark.parametrize(
    "options, real_thing",
    [
        ("--recipe kd --steps 2 --max-train 60 --max-eval 9", "convert.py xlmr-base"),
        ("--recipe tt --model scratch-2x64 --steps 6 --max-eval 9", "data/fetch.py atis"),
    ],
)
def test_recipes_run_offline(options, real_thing, tmp_path, capsys, nothing_downloaded):
    """Without a download, on built-in data; the first lines say how to get the published files."""
    assert train.main([*options.split(), "--device", "cpu", "--out", str(tmp_path / "run")]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert "built in. For the real thing: " in line and real_thing in line
    found = results(tmp_path)
    assert found["model"] == ("scratch-2x64-tt20" if "tt" in options else "mini")
    assert list(found["methods"]) == ["fp32", "ptq", "qat", "sdq"]
    last = steps_of(tmp_path, "sdq")[-1]
    assert {"logits", "map", "hidden"} <= set(last) and ("cosine" in last) == ("tt" in options)
    student = fake_quantized(read_student(str(tmp_path / "run" / "student.safetensors")))
    assert any(isinstance(m, TensorTrain) for m in student.modules()) == ("tt" in options)


def test_a_converted_model_is_the_default(tmp_path, capsys, nothing_downloaded):
    """It is taken, and found damaged; nothing is trained on built-in data instead."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "xlmr-base.safetensors").write_bytes(b"")
    assert train.main(["--bits", "2", "--out", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("model xlmr-base,") and "built in" not in captured.out
    assert "2 bits: most weights round to 0; --weights lsq keeps far more" in captured.out
    assert "xlmr-base.safetensors" in captured.err and not (tmp_path / "run").exists()


def test_longer_than_the_positions(capsys, tmp_path, tiny_config, tokenizer_bytes):
    save_model(str(tmp_path / "m.safetensors"), build_model(tiny_config), tokenizer_bytes, {})
    model, out = str(tmp_path / "m.safetensors"), str(tmp_path / "run")
    options = ["--model", model, "--data-dir", SAMPLE, *"--steps 1 --methods fp32 --out".split(), out]
    assert train.main(options) == 0
    assert "--max-length 64 instead of 128: m has 64 positions" in capsys.readouterr().out
    assert results(tmp_path)["config"]["max_length"] == 64 and train.main([*options, "--resume"]) == 0


def test_missing_data(capsys, tmp_path):
    shutil.copytree(SAMPLE, tmp_path / "data")
    (tmp_path / "data" / "XNLI-1.0" / "xnli.test.tsv").unlink()
    options = [*SCRATCH, "--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    assert re.search("XNLI-1.0/xnli.test.tsv: fetch it.*python data/fetch.py xnli", answer(capsys, *options)[1])
    assert train.main([*options, "--eval-split", "dev", "--steps", "1", "--methods", "fp32"]) == 0


# --------------------------------------------------------------------------- the command line: GLUE
FILES = {  # the header, and the labels of its last column
    "cola": ("", ("0", "1")),
    "stsb": ("index\tgenre\tsentence1\tsentence2\tscore", ("0.000", "2.500", "5.000")),
    "rte": ("index\tsentence1\tsentence2\tlabel", ("entailment", "not_entailment")),
    "mnli": ("index\tsentence1\tsentence2\tgold_label", ("entailment", "neutral", "contradiction")),
}


def write_task(folder, task):
    """60 training rows and 12 test rows; the first word tells the label."""
    place, rng, (header, labels) = folder / GLUE[task].subfolder, random.Random(0), FILES[task]
    place.mkdir(parents=True)
    for name, count in {"train.tsv": 60, **dict.fromkeys(GLUE[task].files["test"], 12)}.items():
        lines = [header] * bool(header)
        for i in range(count):
            a, b = (" ".join(rng.choices(WORDS[3:], k=rng.randint(2, 9))) for _ in "ab")
            a, label = f"{WORDS[i % len(labels)]} {a} {i}", labels[i % len(labels)]
            first = "news\t" if task == "stsb" else ""
            lines.append(f"src\t{label}\t\t{a}" if task == "cola" else f"{i}\t{first}{a}\t{b}\t{label}")
        (place / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("task", FILES)
def test_every_method_on_glue(tmp_path, bert, task, capsys):
    """Teacher, PTQ, QAT, SDQ; the figures of the integer model are those of the student."""
    write_task(tmp_path, task)
    options = f"--task {task} --model {bert} --data-dir {tmp_path} --device cpu --epochs 1 --out {tmp_path / 'run'}"
    options += " --recipe kd --distill logits+300*map+300*normed --analyze"
    assert train.main(options.split()) == 0
    printed, metrics = capsys.readouterr().out, GLUE[task].metrics
    for name, row in results(tmp_path)["methods"].items():
        assert list(row["languages"]) == list(GLUE[task].languages)
        if name != "fp32":
            assert row["languages"] == row["student"]["languages"]
            assert len(row["recovery"]["ranking"]) == 2
    assert re.search(r"fp32: step \d+, dev " + ", ".join(rf"{metric} -?\d+\.\d\d" for metric in metrics), printed)
    assert "selected on dev" in (tmp_path / "run" / "report.md").read_text()
    step, terms = steps_of(tmp_path, "sdq")[0], ("logits", "map", "normed", "task")
    assert step["loss"] == pytest.approx(sum(step[name] for name in terms), rel=1e-5)


# -------------------------------------------------------------------- the command line: joint tasks
def test_every_method_on_the_sample_of_atis(flights_run):
    folder, printed = flights_run
    assert "| sdq " in printed and "slot F1" in printed
    assert results(folder)["model"] == "scratch-1x128-tt8"
    for name, row in results(folder)["methods"].items():
        entry = row["languages"]["en"]
        assert entry["total"] == 30 and {"exact", "slot_f1", "slot_token_f1", "slot_gold"} <= set(entry)
        if name != "fp32":
            assert entry == row["student"]["languages"]["en"]
    for record in steps_of(folder, "sdq"):
        terms = ("task", "slots", "hidden", "cosine", "map", "logits", "slot_logits", "context")
        assert record["loss"] == pytest.approx(sum(record.get(name, 0.0) for name in terms), rel=1e-4)
    (path,) = (folder / "teachers").iterdir()
    teacher = teacher_model(read_model(str(path)))
    assert teacher.config.tt == TTConfig(rank=8) and any(isinstance(m, TensorTrain) for m in teacher.modules())


@pytest.mark.parametrize("options", ["--task snips --model scratch-1x32", "--task atis --model mini"])
def test_other_joint_runs(options, tmp_path):
    """SNIPS has the same layout; the words of a pretrained model are several pieces."""
    options += f" --steps 1 --methods fp32 ptq --analyze --device cpu --data-dir {FLIGHTS} --out {tmp_path / 'run'}"
    assert train.main(options.split()) == 0
    row = results(tmp_path)["methods"]["ptq"]
    assert row["languages"] == row["student"]["languages"]


# ------------------------------------------------------------- students in tensor trains, layerwise
@pytest.fixture
def pretrained(xnli_run):
    """Options of float32 students, in tensor trains, of a dense teacher."""
    (teacher,) = (xnli_run[0] / "teachers").iterdir()
    words = f"--model {teacher} --data-dir {SAMPLE} --device cpu --languages de --max-length 32 --epochs 0"
    return [*words.split(), *"--bits 32 --act-bits 32 --tt-rank 3 --methods fp32 sdq --distill layerwise".split()]


def test_layer_by_layer(pretrained, tmp_path, capsys):
    """Terms of each stage, and the rates, from the log; a teacher that is not trained."""
    options = [*pretrained, *"--student-lr 1e-3 --student-epochs 2 --out".split(), str(tmp_path / "run")]
    assert train.main(options) == 0
    assert "tensor trains" in capsys.readouterr().out and not steps_of(tmp_path, "fp32")
    steps = steps_of(tmp_path, "sdq")
    assert len(steps) == 12  # two stages of three steps, then the last stage
    for i, record in enumerate(steps):
        terms = {"hidden", "cosine", "map"} | ({"logits", "task"} if i >= 6 else set())
        assert terms <= set(record) and ("task" in record) == (i >= 6)
        assert record["loss"] == pytest.approx(sum(record[term] for term in terms), rel=1e-4)
    assert [steps[i]["lr"] for i in (5, 6, 11)] == pytest.approx([1e-3, 1e-3 / 20, 1e-3 / 20 / 6])
    row = results(tmp_path)["methods"]
    assert [step for step, _ in row["sdq"]["dev_curve"]] == [6, 12]
    assert row["sdq"]["size_bytes"] < row["fp32"]["size_bytes"] - 4 * 30_000


def test_a_student_starts_as_its_teachers_svd(pretrained, tmp_path, monkeypatch):
    """More ranks give smaller errors; random cores larger ones."""

    def error(rank, out):
        config = parse_args([*pretrained, "--tt-rank", str(rank), "--out", str(tmp_path / out)])[0]
        opened, start, data = train.open_run(config, False)
        teacher = start.build().eval()
        student, _ = train.make_student(opened, teacher, "sdq", data)
        rows = training_batch(data.train, 8, 0, 0)
        return layerwise_loss(student, teacher, rows, config, (1, 2), False)["hidden"].item()

    few, more = error(3, "few"), error(12, "more")
    monkeypatch.setattr(train, "tensorize", lambda model, tt, from_weights: tensorize(model, tt))
    assert more < few and more < error(12, "random")


def test_too_few_steps_for_the_stages(pretrained, tmp_path, capsys):
    """Raises before the teacher is trained."""
    options = [*pretrained, *"--epochs 1 --steps 2 --out".split(), str(tmp_path / "run")]
    assert "--distill layerwise needs 3 steps or more, not 2" in answer(capsys, *options)[1]
    assert not (tmp_path / "run").exists() and not (tmp_path / "teachers").exists()


# ------------------------------------------------------------------------------ a task of one's own
def write_own(folder, split, rows):
    """rows: (text, label, language)"""
    lines = ["text\tlabel\tlanguage", *("\t".join(row) for row in rows)]
    (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def own_options(folder, words):
    return [*SCRATCH, *f"--task tsv --device cpu --data-dir {folder} --out {folder / 'run'} {words}".split()]


def test_own_rows_in_another_language_than_english(tmp_path, capsys):
    """Trained on German; the test languages, one with a slash, come from the files."""
    counts = {"train": {"de": 24}, "dev": {"de": 6}, "test": {"am": 2, "de": 4, "pt/br": 3}}
    for split, languages in counts.items():
        names = [(f"der Mann {i}", ("local", "big sports")[i % 2], x) for x, n in languages.items() for i in range(n)]
        write_own(tmp_path, split, names)
    assert train.main(own_options(tmp_path, "--epochs 1 --methods fp32 ptq")) == 0
    assert not re.search(r"\ben\b", capsys.readouterr().out)
    found = results(tmp_path)
    assert found["languages"] == ["de", "am", "pt/br"] and found["train_examples"] == 24
    for row in found["methods"].values():
        tests = row["languages"]
        assert {name: test["total"] for name, test in tests.items()} == {"de": 4, "am": 2, "pt/br": 3}
        assert row["score"] == tests["de"]["accuracy"]
    chosen = f"--languages pt/br --out {tmp_path / 'chosen'}"
    assert list(train.open_run(parse_args(own_options(tmp_path, chosen))[0], False)[2].tests) == ["de", "pt/br"]


def test_own_tests_in_other_languages_alone(tmp_path):
    """Trained on English, tested in German: there is no score in the training language."""
    for split, language in (("train", "en"), ("dev", "en"), ("test", "de")):
        write_own(tmp_path, split, [(f"das {x} {i}", x, language) for i in range(9) for x in ("good", "bad")])
    assert train.main(own_options(tmp_path, "--steps 2 --methods fp32 ptq")) == 0
    assert results(tmp_path)["languages"] == ["de"]
    for row in results(tmp_path)["methods"].values():
        assert row["score"] is None and row["zero_shot_mean"] == row["languages"]["de"]["accuracy"]


def test_a_run_says_what_it_trains_on(tmp_path, capsys):
    """Classes with their counts, rows left aside, steps, and texts that lose their ends, by split."""
    rows = [("der Mann " * (40 if i == 3 else 2), ("Good", "bad", "good")[i % 3], "de") for i in range(30)]
    write_own(tmp_path, "train", [*rows, ("un", "bad", "fr"), ("a", "bad", "en"), ("b", "good", "en")])
    for split in ("dev", "test"):
        write_own(tmp_path, split, rows[:9])
    words = "--epochs 2 --student-epochs 1 --max-length 16 --train-language de --batch-size 8"
    train.open_run(parse_args(own_options(tmp_path, words))[0], False)
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

"""pq.py: k-means against brute force, what a file holds, gradients, stages; a staged run end to end."""

import os

import pytest
import torch
from conftest import run

import checkpoint
import pq
from int8 import integer_model
from kit.files import map_tensors
from model import ModelConfig, build_model
from pq import CENTROIDS, STAGES, ProductQuantizer, begin_stage, kmeans, means, nearest, product_quantizers
from prepare import prepare
from quant import QuantConfig

CONFIG = QuantConfig(weights="pq", noise=0.25)
SHAPE = ModelConfig(
    vocab_size=600, hidden_size=64, num_layers=2, num_heads=2, ffn_size=96, head="sequence", num_labels=3, dropout=0
)


def quantizer_of(weight, multiplied=True):
    return ProductQuantizer(CONFIG, weight, True, multiplied)


def student():
    torch.manual_seed(0)
    model = build_model(SHAPE).eval()
    prepare(model, CONFIG)
    return model


# ---------------------------------------------------------------------------------------- k-means
def test_nearest_is_that_of_all_distances():
    torch.manual_seed(0)
    blocks, centroids = torch.randn(40000, 8), torch.randn(CENTROIDS, 8)
    found = nearest(blocks, centroids).long()
    distances = torch.cdist(blocks.double(), centroids.double())
    chosen = distances.gather(1, found[:, None])[:, 0]
    assert found.dtype == torch.int64 and len(found.unique()) == CENTROIDS
    assert torch.allclose(chosen, distances.min(dim=1).values, atol=1e-6)  # ties may differ


def test_means_are_those_of_a_loop():
    torch.manual_seed(1)
    blocks, centroids = torch.randn(5000, 4), torch.randn(CENTROIDS, 4)
    assignments = nearest(blocks, centroids)
    found = means(blocks, assignments, centroids)
    for k in range(CENTROIDS):
        mine = blocks[assignments == k]
        if len(mine):
            assert torch.allclose(found[k], mine.mean(dim=0), atol=1e-5)


def test_an_empty_centroid_halves_a_full_one():
    blocks = torch.cat([torch.randn(900, 4) * 0.1, torch.randn(100, 4) * 0.1 + 5])
    centroids = torch.full((CENTROIDS, 4), 100.0)
    centroids[0], centroids[1] = 0.0, 5.0  # all others are empty
    used = 2
    for _ in range(9):
        centroids = means(blocks, nearest(blocks, centroids), centroids)
        now = len(nearest(blocks, centroids).unique())
        assert now >= used
        used = now
    assert used > 200


def test_kmeans_finds_a_fixed_point_no_worse_than_other_starts(monkeypatch):
    """Lloyd's algorithm by hand: no mean and no assignment moves. In one dimension the optimum for two clusters is
    known by trying every border.
    """
    monkeypatch.setattr(pq, "CENTROIDS", 2)
    torch.manual_seed(3)
    blocks = torch.cat([torch.randn(30, 1), torch.randn(20, 1) + 6])
    centroids, assignments = kmeans(blocks)
    assert torch.equal(nearest(blocks, centroids), assignments)
    for k in range(2):
        assert torch.allclose(centroids[k], blocks[assignments == k].mean(dim=0))
    ordered = blocks.flatten().sort().values
    errors = [
        sum(float(part.var(correction=0)) * len(part) for part in (ordered[:k], ordered[k:])) for k in range(1, 50)
    ]
    assert float((blocks - centroids[assignments.long()]).square().sum()) == pytest.approx(min(errors), rel=1e-5)


def test_more_iterations_lower_the_error(monkeypatch):
    """Also where a sample decides for all blocks."""
    monkeypatch.setattr(pq, "SAMPLE", 18000)
    torch.manual_seed(4)
    blocks, errors = torch.randn(20000, 8), []
    for iterations in (0, 1, 4, 15):
        monkeypatch.setattr(pq, "ITERATIONS", iterations)
        centroids, assignments = kmeans(blocks)
        assert torch.equal(assignments, nearest(blocks, centroids)) and len(assignments) == 20000
        errors.append(float((blocks - centroids[assignments.long()]).square().mean()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.85 * errors[0]


@pytest.mark.parametrize("distinct", [1, 7, 200, CENTROIDS])
def test_few_distinct_blocks_are_exact(distinct, monkeypatch):
    monkeypatch.setattr(pq, "SAMPLE", 100)  # also those that the sample has not
    torch.manual_seed(5)
    values = torch.randn(distinct, 8).half().float()
    weight = values[torch.randint(distinct, (40 * 12,))].view(40, 96)
    quantizer = quantizer_of(weight)
    quantizer.assign(weight)
    assert torch.equal(quantizer.decode(), weight)


# -------------------------------------------------------------------------------------- quantizer
def test_block_is_a_run_of_inputs():
    """Row r, inputs 8 j to 8 j + 7 have the centroid of assignment r N / 8 + j."""
    weight = torch.randn(24, 64)
    quantizer = quantizer_of(weight)
    quantizer.assign(weight)
    decoded = quantizer.decode()
    for r, j in ((0, 0), (5, 7), (23, 3)):
        number = int(quantizer.assignments[r * 8 + j])
        assert torch.equal(decoded[r, 8 * j : 8 * j + 8], quantizer.centroids[number])


@pytest.mark.parametrize(
    "shape, multiplied, stage, block", [((96, 64), True, 0, 8), ((64, 64), True, 2, 4), ((64, 64), False, 1, 8)]
)
def test_stage_and_block_follow_the_kind_of_matrix(shape, multiplied, stage, block):
    quantizer = quantizer_of(torch.randn(shape), multiplied)
    assert (quantizer.stage, quantizer.block) == (stage, block)
    with pytest.raises(ValueError, match="rows of a multiple of 8 weights, not 60"):
        quantizer_of(torch.randn(96, 60), multiplied)


def test_gradient_of_a_centroid():
    """The mean of the gradients of its blocks."""
    torch.manual_seed(7)
    weight, target = torch.randn(48, 64), torch.randn(48, 64)
    quantizer = quantizer_of(weight).train()
    (quantizer(weight) * target).sum().backward()
    for k in (0, 11, 200):
        expected = target.view(-1, 8)[quantizer.assignments == k].mean(dim=0)
        assert torch.allclose(quantizer.centroids.grad[k], expected, atol=1e-6)


def test_noise_zeroes_blocks_while_a_weight_waits():
    weight = torch.randn(200, 64, requires_grad=True)
    quantizer = quantizer_of(weight).train()
    quantizer.waiting = True
    before = weight.detach().clone()
    noisy = quantizer(weight)
    blocks = (noisy == 0).view(-1, 8)
    assert bool((blocks.all(dim=1) == blocks.any(dim=1)).all())  # whole blocks
    assert blocks.float().mean().item() == pytest.approx(0.25, abs=0.04)
    kept = noisy != 0
    assert torch.equal(noisy[kept], (weight / 0.75)[kept])
    noisy.sum().backward()
    assert torch.equal(weight.grad == 0, noisy == 0)
    assert torch.equal(weight, before)  # nothing is written into the weight
    assert torch.equal(quantizer.eval()(weight), weight)


def test_rows_of_a_table_are_those_of_the_whole():
    weight = torch.randn(90, 64)
    quantizer = quantizer_of(weight, multiplied=False)
    ids = torch.tensor([3, 89, 0])
    assert torch.equal(quantizer.train()(weight, ids), quantizer(weight)[ids])
    assert torch.equal(quantizer.eval()(weight, ids), quantizer(weight)[ids])


# ------------------------------------------------------------------------------------------ stages
def test_stages_quantize_one_group_after_the_other():
    model = student().train()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert not any(quantizer.counts.any() for quantizer, _ in product_quantizers(model))
    for stage in range(len(STAGES)):
        begin_stage(model, stage)
        for quantizer, _ in product_quantizers(model):
            assert quantizer.waiting == (quantizer.stage > stage)
            assert bool(quantizer.counts.any()) == (quantizer.stage <= stage)
        assert sum(q.stage == stage for q, _ in product_quantizers(model)) == (4, 1, 8)[stage]
    assignments = [quantizer.assignments.clone() for quantizer, _ in product_quantizers(model)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    begin_stage(model, len(STAGES) - 1)  # assignments are fixed
    assert all(torch.equal(a, q.assignments) for a, (q, _) in zip(assignments, product_quantizers(model), strict=True))
    assert set(weights) == {name for name, _ in model.named_parameters()}


def test_only_what_is_quantized_stops_learning():
    model = student().train()
    begin_stage(model, 0)
    ids = torch.randint(4, 600, (3, 9))
    assert model.eval()(ids)[0].isfinite().all()  # others wait
    model.train()(ids)[0].sum().backward()
    assert sum(bool(quantizer.counts.any()) for quantizer, _ in product_quantizers(model)) == 4
    layer = model.encoder.layers[0]
    assert layer.ffn.up.weight.grad is None and layer.ffn.up.weight_quantizer.centroids.grad is not None
    assert layer.attention.query.weight.grad is not None
    assert layer.attention.query.weight_quantizer.centroids.grad is None
    assert model.encoder.embeddings.word.weight.grad is not None
    model.zero_grad()
    begin_stage(model, 2)
    model(ids)[0].sum().backward()
    assert layer.attention.query.weight.grad is None and model.encoder.embeddings.word.weight.grad is None


# ------------------------------------------------------------------------------------------- files
@pytest.fixture
def saved(tmp_path):
    model = student()
    begin_stage(model, len(STAGES) - 1)
    with torch.no_grad():  # as after training: no longer float16
        for quantizer, _ in product_quantizers(model):
            quantizer.centroids.add_(1e-4 * torch.randn_like(quantizer.centroids))
    path = str(tmp_path / "student.safetensors")
    checkpoint.save_student(path, model, CONFIG, b"x", {})
    return model, path


def test_integer_model_has_the_logits_of_the_student(saved):
    model, path = saved
    ids = torch.randint(4, 600, (5, 17))
    expected = model.eval()(ids)[0]
    assert torch.equal(integer_model(checkpoint.read_student(path), "cpu")(ids)[0], expected)
    assert torch.equal(checkpoint.fake_quantized(checkpoint.read_student(path))(ids)[0], expected)
    assert not torch.allclose(build_model(SHAPE).eval()(ids)[0], expected, atol=1e-3)


def test_bytes_follow_the_formula(saved):
    """A byte a block, 256 x b float16 numbers a matrix; the rest float32."""
    model, path = saved
    size = 0
    for quantizer, weight in product_quantizers(model):
        size += weight.numel() // quantizer.block + 2 * CENTROIDS * quantizer.block
    tensors = map_tensors(path, "")[0]
    packed = {name for name in tensors if name.endswith((".assignments", ".centroids"))}
    assert sum(tensors[name].nbytes for name in packed) == size
    floats = sum(tensor.nbytes for name, tensor in tensors.items() if name not in packed)
    assert 0 <= os.path.getsize(path) - size - floats < 200 * (len(tensors) + 8)


# ----------------------------------------------------------------------------------------- training
def test_options_that_do_not_fit(tmp_path, capsys):
    for options, message in (
        ("--steps 2", "--weights pq needs 3 steps or more, not 2"),
        ("--bits 4", "--weights pq has 8 bits"),
        ("--distill layerwise", "--weights pq has stages of its own"),
        ("--tt-rank 4", "--weights pq is for matrices"),
    ):
        assert run(tmp_path, *f"--weights pq --max-train 64 {options}".split(), out="x") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert not (tmp_path / "x").exists()

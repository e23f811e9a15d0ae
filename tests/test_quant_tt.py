"""Quantizers in a model of tensor trains (prepare.py)."""

from dataclasses import replace

import pytest
import torch
from conftest import random_ids
from test_quant import prepared
from torch import nn

from data import UserError
from learned import LearnedScale
from prepare import calibrate, prepare
from quant import (
    ActQuantizer,
    QuantConfig,
    WeightQuantizer,
    choose_qparams,
    dequantize,
    fake_quantize,
    min_max,
    quant_range,
    quantize,
)
from tt import QuantTTLinear, TTConfig, TTLinear, TTMEmbedding

TRAINS = TTConfig(rank=4, embedding_rank=5, table_modes=4, keep=())


@pytest.fixture
def train_config(tiny_config):
    return replace(tiny_config, head="joint", num_slots=5, tt=TRAINS)


PROJECTIONS = [f"attention.{n}" for n in ("query", "key", "value", "output")] + [
    "ffn.up",
    "ffn.down",
]
TABLES = {f"encoder.embeddings.{name}": 4 for name in ("word", "position")}
LAYERS = {f"encoder.layers.{i}.{name}": 6 for i in range(2) for name in PROJECTIONS}
HEADS = {"head.intent.dense": 6, "head.dense": 6}


def core_names(trains):
    return {f"{name}.cores.{k}" for name, count in trains.items() for k in range(count)}


@pytest.mark.parametrize(
    "keep", [(), ("head",), ("encoder.layers.0.ffn", "encoder.embeddings.word")]
)
def test_prepare_reports_tensor_trains(keep, train_config):
    original, model, report = prepared(QuantConfig(keep=keep), train_config)
    every = {**TABLES, **LAYERS, **HEADS}
    trains = {name: count for name, count in every.items() if not name.startswith(keep)}
    linears = {
        f"head{name}.weight" for name in (".out_proj", ".intent.out_proj") if "head" not in keep
    }
    assert set(report.replaced) == core_names(trains) | linears
    # a layer: one for query, key and value and one in the middle of each, two for each of the others
    acts = 2 * (1 + 3 + 3 * 2) + 2 * 2 + 2
    assert report.act_quantizers == {0: acts, 1: acts - 6, 2: acts - 4}[len(keep)]
    parameters = dict(model.named_parameters())
    scales = {name for name in parameters if name.endswith("log_scale")}
    assert scales == {
        f"{name}.core_quantizers.{k}.log_scale" for name, n in trains.items() for k in range(n)
    }
    assert set(report.replaced) | set(report.kept) == set(parameters)
    for name, count in {**report.replaced, **report.kept}.items():
        assert parameters[name].numel() == count
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter, parameters[name])
    assert f"log_scale {len(scales)}" in str(report)
    assert not any(module.training for module in model.modules())


def test_what_prepare_gives_to_tensor_trains(train_config):
    _, model, _ = prepared(QuantConfig(weight_bits=4, keep=("head",)), train_config)
    for name in LAYERS:
        layer = model.get_submodule(name)
        assert type(layer) is QuantTTLinear
        assert [type(q) for q in layer.core_quantizers] == [LearnedScale] * 6
        assert all(quantizer.bits == 4 for quantizer in layer.core_quantizers)
        shared = name.endswith(("query", "key", "value"))
        assert type(layer.act_quantizer) is (nn.Identity if shared else ActQuantizer)
        assert type(layer.middle_quantizer) is ActQuantizer
        for quantizer in (layer.A_quantizer, layer.B_quantizer):  # 8 bits a row, whatever the cores
            assert type(quantizer) is WeightQuantizer and quantizer.per_row
            assert (quantizer.bits, quantizer.quant_min, quantizer.quant_max) == (8, -64, 64)
    for layer in model.encoder.layers:
        assert type(layer.attention.input_quantizer) is ActQuantizer
    for name in TABLES:
        table = model.get_submodule(name)
        assert type(table) is TTMEmbedding and len(table.core_quantizers) == 4
    assert type(model.head.dense) is TTLinear and model.head.dense.core_quantizers is None
    assert type(model.head.out_proj) is nn.Linear


def test_tensor_trains_with_float_activations(train_config):
    """Weights alone: the cores are on their grids, and A and B are not rounded again."""
    original, model, report = prepared(QuantConfig(act_bits=32, keep=()), train_config)
    assert report.act_quantizers == 0 and len(report.replaced) == 8 + 14 * 6 + 2
    for name in (*LAYERS, *HEADS):
        layer = model.get_submodule(name)
        for kind in ("act", "middle", "A", "B"):
            assert type(getattr(layer, kind + "_quantizer")) is nn.Identity
    with torch.no_grad():  # the same float32 model, with cores that were quantized from outside
        for name, count in {**TABLES, **LAYERS, **HEADS}.items():
            module, quantized = original.get_submodule(name), model.get_submodule(name)
            for k in range(count):
                scale = quantized.core_quantizers[k].scale()
                module.cores[k].copy_(
                    fake_quantize(module.cores[k], scale, torch.zeros(()), -128, 127)
                )
        for module in (original.head.out_proj, original.head.intent.out_proj):
            low, high = quant_range(8, True)
            scale, zero = choose_qparams(*min_max(module.weight, True), low, high, True)
            module.weight.copy_(fake_quantize(module.weight, scale, zero, low, high))
    ids, mask = random_ids([9, 5], train_config.vocab_size)
    for found, expected in zip(model(ids, mask)[0], original(ids, mask)[0], strict=True):
        torch.testing.assert_close(found, expected)


def test_searched_cores_are_still_merged_without_clipping(train_config):
    config = QuantConfig(weight_bits=2, weight_range="mse", keep=("head",))
    _, model, _ = prepared(config, train_config)
    for name in (*TABLES, *LAYERS):
        module = model.get_submodule(name)
        for core, quantizer in zip(module.cores, module.core_quantizers, strict=True):
            assert torch.equal(quantizer.scale(), LearnedScale(2, core, start="mse").scale())
            assert quantizer.scale() < LearnedScale(2, core).scale()
    for layer in (m for m in model.modules() if isinstance(m, QuantTTLinear)):
        assert not layer.A_quantizer.clips and not layer.B_quantizer.clips


def test_float_cores_with_quantized_activations(train_config):
    _, model, report = prepared(QuantConfig(weight_bits=32, keep=("head",)), train_config)
    assert not report.replaced and report.act_quantizers == 20
    assert not any(isinstance(m, (LearnedScale, WeightQuantizer)) for m in model.modules())
    layer = model.encoder.layers[0].ffn.up
    assert type(layer) is QuantTTLinear and layer.core_quantizers is None
    x = torch.randn(3, 32)
    A, B = layer.halves()
    expected = layer.middle_quantizer(layer.act_quantizer(x) @ A.T) @ B.T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    assert (layer(x) - (x @ A.T @ B.T + layer.bias)).any()


def test_bits_32_leaves_tensor_trains_alone(train_config):
    original, model, report = prepared(QuantConfig(weight_bits=32, act_bits=32), train_config)
    assert not report.replaced and not report.act_quantizers
    ids, mask = random_ids([9, 5], train_config.vocab_size)
    for found, expected in zip(model(ids, mask)[0], original(ids, mask)[0], strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("keep", [(), ("head",)])
@pytest.mark.parametrize("bits", [(8, 8), (2, 32), (32, 8), (32, 32)], ids=str)
def test_prepared_tensor_trains_are_not_prepared_again(bits, keep, train_config):
    config = QuantConfig(weight_bits=bits[0], act_bits=bits[1], keep=keep)
    _, model, _ = prepared(config, replace(train_config, num_layers=1))
    with pytest.raises(UserError, match="already prepared"):
        prepare(model, config)


@pytest.mark.parametrize("act_range", ["dynamic", "static"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_prepared_tensor_train_equals_explicit_arithmetic(bits, act_range):
    """y = Q(Q(x) Q(A)^T) Q(B)^T + b in training, and the same in integers in evaluation."""
    layer = TTLinear((4, 4, 3), (3, 4, 4), 6)
    layer.reset_parameters(0.3)
    nn.init.normal_(layer.bias)
    config = QuantConfig(weight_bits=bits, act_range=act_range)
    acts = ActQuantizer(config), ActQuantizer(config)
    x = torch.randn(2, 5, 48)
    model = nn.Sequential(layer.quantized(config, *acts))
    model.forward = lambda ids, mask, types: model[0](x)
    calibrate(model, [(None, None)], "minmax")
    found = model[0]

    def on_grid(values, low, high, symmetric, per_row):
        scale, zero = choose_qparams(*min_max(values, per_row), low, high, symmetric)
        return dequantize(quantize(values, scale, zero, low, high), scale, zero)

    dynamic = act_range == "dynamic"
    with torch.no_grad():
        pairs = zip(layer.cores, found.core_quantizers, strict=True)
        zero, half = torch.zeros(()), 2 ** (bits - 1)
        cores = [fake_quantize(c, q.scale(), zero, -half, half - 1) for c, q in pairs]
        B = torch.einsum("xar, rbs, sct -> abct", *cores[:3]).reshape(48, -1)
        A = torch.einsum("xar, rbs, sct -> xabc", *cores[3:]).reshape(-1, 48)
        A, B = (on_grid(half, -64, 64, True, True) for half in (A, B))
        middle = on_grid(x, 0, 255, False, dynamic) @ A.T
        if dynamic:
            middle = on_grid(middle, 0, 255, False, True)
        else:  # its range was observed before the input was rounded
            scale, zero = choose_qparams(*min_max(x @ A.T, False), 0, 255, False)
            middle = dequantize(quantize(middle, scale, zero, 0, 255), scale, zero)
        expected = middle @ B.T + layer.bias
        for mode in (True, False):
            y = found.train(mode)(x)
            assert (y - expected).abs().max() < 0.02 * expected.std()  # a code may tip over
            assert (y - expected).abs().median() < 1e-5


def test_every_parameter_of_quantized_tensor_trains_learns(train_config):
    _, model, _ = prepared(QuantConfig(weight_bits=4, keep=()), train_config)
    ids, mask = random_ids([9, 5], train_config.vocab_size)
    sum(logits.logsumexp(-1).sum() for logits in model.train()(ids, mask)[0]).backward()
    for name, parameter in model.named_parameters():
        if "attention.key.bias" not in name:  # softmax cancels it
            assert parameter.grad is not None and parameter.grad.any(), name

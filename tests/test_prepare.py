"""prepare.py: which tensor gets which quantizer, and whole prepared models against explicit
arithmetic.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES, random_ids
from torch import nn

import model as model_module
from checkpoint import meta_model, pack, student_payload, unpack
from int8 import to_integer
from lsq import LearnedActQuantizer, LearnedScale
from model import Attention, initialize, set_dropout
from pq import product_quantizers
from prepare import WEIGHTS, WeightKind, calibrate, check_quant, prepare
from quant import (
    ActQuantizer,
    FixedQuantizer,
    QuantConfig,
    TernaryQuantizer,
    UniformQuantizer,
    WeightQuantizer,
    choose_qparams,
    dequantize,
    fake_quantize,
    min_max,
    quant_range,
    quantize,
)
from train import make_optimizers
from tt import QuantTTLinear, TTConfig, TTLinear, TTMEmbedding

MATRICES = [f"attention.{n}" for n in ("query", "key", "value", "output")] + ["ffn.up", "ffn.down"]
ROWS = [  # of WEIGHTS, with all that each allows
    (name, bits, weight_range) for name, row in WEIGHTS.items() for bits in row.bits for weight_range in row.ranges
]
EXTREMES = [case for case in ROWS if case[1] in (WEIGHTS[case[0]].bits[0], 4, 8)]


def prepared(config, shape, factor=1.0):
    """(a float32 model, a quantized copy of it, the report).

    factor: on all parameters; random initialization gives logits close to 0.
    """
    model = initialize(meta_model(shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    original = copy.deepcopy(model)
    return original, model, prepare(model, config)


def assert_every_parameter_learns(model, ids, mask):
    logits = model.train()(ids, mask)[0]
    heads = logits if isinstance(logits, tuple) else (logits,)
    sum(head.logsumexp(-1).sum() for head in heads).backward()
    replaced = {id(weight) for _, weight in product_quantizers(model)}  # by their centroids
    for name, parameter in model.named_parameters():
        if id(parameter) in replaced:
            assert parameter.grad is None
            continue
        if name.endswith("key.bias"):  # adds a constant to each row of scores: softmax cancels it
            continue
        grad = parameter.grad
        grad = grad.coalesce().values() if grad.is_sparse else grad
        assert grad.isfinite().all() and grad.any(), name


# ----------------------------------------------------------------------------------------- settings
WRONG = [  # fields, what the message says
    ({"weight_bits": 1}, "weight_bits=1: choose 2 to 8, or 32"),
    ({"weight_bits": 4.0}, "weight_bits=4.0: choose 2 to 8, or 32"),
    ({"act_bits": 16}, "act_bits=16: choose 2 to 8, or 32"),
    ({"attention_bits": 1}, "attention_bits=1: choose 2 to 8, or 32"),
    ({"attention_bits": 9}, "attention_bits=9: choose 2 to 8, or 32"),
    ({"noise": 1.5}, "noise=1.5: choose a fraction from 0 to 1"),
    ({"noise": float("nan")}, "noise=nan: choose a fraction from 0 to 1"),
    ({"noise_block": 0}, "noise_block=0: choose 1 or more"),
    ({"grid": "wide"}, "grid='wide': choose from portable, full"),
    ({"observer": "best"}, "observer='best': choose from minmax, mse"),
    ({"act_range": "fixed"}, "act_range='fixed': choose from dynamic, static, learned"),
    ({"weights": "binary"}, f"weights='binary': choose from {', '.join(WEIGHTS)}"),
    ({"weights": "ternary"}, "weights=ternary has 2 bits, not weight_bits=8"),
    ({"weights": "ternary", "weight_bits": 4}, "weights=ternary has 2 bits, not weight_bits=4"),
    ({"weight_range": "best"}, "weight_range='best': weights=uniform has minmax, mse"),
    ({"weight_range": "lsq"}, "weight_range='lsq': weights=uniform has minmax, mse"),
    ({"weight_range": "lsq", "weights": "ternary", "weight_bits": 2}, "weight_range='lsq': weights=ternary has minmax"),
    ({"weight_range": "mse", "weights": "ternary", "weight_bits": 2}, "weight_range='mse': weights=ternary has minmax"),
    ({"weights": "lsq", "weight_bits": 32}, "weights=lsq needs quantized weights: weight_bits=2 to 8"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=str)
def test_wrong_settings_name_their_field_and_what_to_choose(values, message, tiny_config):
    with pytest.raises(ValueError) as error:
        check_quant(QuantConfig(**values))
    assert message in str(error.value) and "\n" not in str(error.value)
    model = initialize(meta_model(tiny_config))
    with pytest.raises(ValueError):
        prepare(model, QuantConfig(**values))
    assert type(model.encoder.layers[0].ffn.up) is nn.Linear  # nothing was replaced


def test_settings_that_are_right():
    check_quant(QuantConfig(weight_bits=2, weights="ternary", attention_bits=2))
    check_quant(QuantConfig(weights="lsq", weight_range="lsq", act_range="learned"))
    check_quant(QuantConfig(weights="lsq", weight_range="lsq", attention_bits=8))


@pytest.mark.parametrize(("name", "bits", "weight_range"), ROWS)
def test_rows_of_weights_allow_what_they_say(name, bits, weight_range):
    row = WEIGHTS[name]
    config = QuantConfig(weights=name, weight_bits=bits, weight_range=weight_range)
    check_quant(config)
    for other in set(range(2, 9)) - set(row.bits):
        with pytest.raises(ValueError, match=f"weights={name} has .* bits, not weight_bits="):
            check_quant(replace(config, weight_bits=other))
    for other in {"minmax", "mse", "lsq"} - set(row.ranges):
        with pytest.raises(ValueError, match=f"weight_range='{other}': weights={name} has "):
            check_quant(replace(config, weight_range=other))


# ------------------------------------------------------------------------------------------ reports
def test_prepare_reports_what_it_did(tiny_config):
    original, model, report = prepared(QuantConfig(), tiny_config)
    layers = [f"encoder.layers.{i}." for i in range(2)]
    expected = {f"{layer}{name}.weight" for layer in layers for name in MATRICES}
    assert set(report.replaced) == expected | {"encoder.embeddings.word.weight"}
    assert report.act_quantizers == 2 * 4  # query, key and value share one
    everything = {name: p.numel() for name, p in original.named_parameters()}
    assert report.replaced | report.kept == everything
    assert "head.dense.weight" in report.kept and "encoder.layers.0.ffn.up.bias" in report.kept
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name])
    assert "quantized" in str(report)
    with pytest.raises(ValueError, match="already prepared"):
        prepare(model, QuantConfig())


def test_32_bits_leave_the_model_alone(tiny_config):
    ids, mask = random_ids([7, 5], tiny_config.vocab_size)
    original, model, report = prepared(QuantConfig(weight_bits=32, act_bits=32), tiny_config)
    assert not report.replaced and not report.act_quantizers
    assert torch.equal(original(ids, mask)[0], model(ids, mask)[0])
    _, model, report = prepared(QuantConfig(weight_bits=32), tiny_config)
    assert not report.replaced and report.act_quantizers == 8
    _, model, report = prepared(QuantConfig(act_bits=32), tiny_config)
    assert len(report.replaced) == 13 and not report.act_quantizers


def test_part_of_an_attention_cannot_be_kept(tiny_config):
    with pytest.raises(ValueError, match="keep all of encoder.layers.0.attention"):
        prepared(QuantConfig(keep=("head", "encoder.layers.0.attention.key")), tiny_config)
    _, _, report = prepared(QuantConfig(keep=("head", "encoder.layers.0.attention")), tiny_config)
    assert report.act_quantizers == 4 + 2


# -------------------------------------------------------------------------------- weight quantizers
EXPECTED = [  # settings, the quantizers of matrices and of the table, and the integers of matrices
    ({"weights": "ternary", "weight_bits": 2}, TernaryQuantizer, TernaryQuantizer, (-1, 1)),
    ({"weights": "lsq", "weight_bits": 2}, LearnedScale, TernaryQuantizer, (-2, 1)),
    ({"weights": "lsq", "weight_bits": 4}, LearnedScale, UniformQuantizer, (-8, 7)),
    ({"weights": "lsq"}, LearnedScale, UniformQuantizer, (-64, 64)),
    ({"weights": "lsq", "grid": "full"}, LearnedScale, UniformQuantizer, (-127, 127)),
    ({"weights": "lsq", "act_bits": 6}, LearnedScale, UniformQuantizer, (-127, 127)),
    ({"weight_bits": 2}, UniformQuantizer, UniformQuantizer, (-1, 1)),
]


@pytest.mark.parametrize("expected", EXPECTED, ids=lambda expected: str(expected[0]))
@pytest.mark.parametrize("per_channel", [True, False])
def test_quantizers_of_weights(per_channel, expected, tiny_config):
    values, matrix, table, grid = expected
    _, model, report = prepared(QuantConfig(per_channel=per_channel, **values), tiny_config, 3)
    for layer in model.encoder.layers:
        for name in MATRICES:
            linear = layer.get_submodule(name)
            quantizer = linear.weight_quantizer
            assert type(quantizer) is matrix and quantizer.per_row == per_channel
            assert (quantizer.quant_min, quantizer.quant_max) == grid
            codes, scale = quantizer.codes(linear.weight)
            assert scale.shape == ((len(linear.weight), 1) if per_channel else ())
            assert grid[0] <= codes.min() < 0 < codes.max() <= grid[1]
    words = model.encoder.embeddings.word.row_quantizer
    assert type(words) is table and words.per_row  # whatever per_channel says of matrices
    scales = {n: p.numel() for n, p in model.named_parameters() if n.endswith("log_scale")}
    assert len(scales) == (12 if matrix is LearnedScale else 0)
    assert scales.items() <= report.kept.items()
    assert len(report.replaced) == 13


@pytest.mark.parametrize("start", WEIGHTS["lsq"].ranges)
def test_starts_of_learned_scales_in_a_model(start, tiny_config):
    config = QuantConfig(weight_bits=4, weights="lsq", weight_range=start)
    original, model, _ = prepared(config, tiny_config, 3)
    for name in MATRICES:
        weight = original.encoder.layers[1].get_submodule(name).weight
        found = model.encoder.layers[1].get_submodule(name).weight_quantizer.log_scale
        for other in WEIGHTS["lsq"].ranges:
            expected = LearnedScale(replace(config, weight_range=other), weight, True, True)
            assert torch.equal(found, expected.log_scale) == (other == start)


def test_one_clip_factor_for_all_rows_of_a_table(tiny_config):
    """The factor of a table scales the min-max range of every row; it is the best common one."""
    _, model, _ = prepared(QuantConfig(weight_bits=3, weight_range="mse"), tiny_config)
    words = model.encoder.embeddings.word
    quantizer, weight = words.row_quantizer, words.weight.detach()
    assert quantizer.clip.dim() == 0 and quantizer.clip < 1
    low, high = min_max(weight, True)

    def error(factor):
        scale, zero = choose_qparams(low * factor, high * factor, -3, 3, True)
        return float((fake_quantize(weight, scale, zero, -3, 3) - weight).square().sum())

    errors = {percent: error(percent / 100) for percent in range(10, 101, 2)}
    assert error(quantizer.clip) == pytest.approx(min(errors.values()))


def quantized(model):
    """Each quantized weight of a model and its quantizer: first the table, then the matrices."""
    for module in model.modules():
        for name in ("weight_quantizer", "row_quantizer"):
            if hasattr(module, name):
                yield module.weight, getattr(module, name)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("name", "bits", "weight_range"), ROWS)
def test_every_row_of_weights_in_a_model(name, bits, weight_range, per_channel, tiny_config):
    """What is trained, packed and loaded again is the same, bit for bit."""
    values = {"weights": name, "weight_bits": bits, "weight_range": weight_range}
    shape = replace(tiny_config, num_layers=1)
    _, model, report = prepared(QuantConfig(**values, per_channel=per_channel), shape, 3)
    assert len(report.replaced) == 7
    weights = [(weight.detach(), quantizer) for weight, quantizer in quantized(model)]
    assert [quantizer.per_row for _, quantizer in weights] == [True] + 6 * [per_channel]
    for weight, quantizer in weights:
        codes, scale = quantizer.codes(weight)
        assert scale.shape == ((len(weight), 1) if quantizer.per_row else ()) and (scale > 0).all()
        assert torch.equal(codes, codes.round())
        assert quantizer.quant_min <= codes.min() and codes.max() <= quantizer.quant_max
        packed = pack(codes.to(torch.int8), bits)
        assert torch.equal(unpack(packed, bits, codes.numel()).view(codes.shape), codes)
        found = quantizer(weight)
        assert torch.equal(found, codes * scale) and torch.equal(quantizer.train()(weight), found)
        # the scale of a file
        fixed = FixedQuantizer(quantizer, scale)
        again, same = fixed.codes(codes * scale)
        assert torch.equal(again, codes) and same is scale
        assert torch.equal(fixed(codes * scale), codes * scale) and not fixed.state_dict()
        assert (fixed.bits, fixed.per_row) == (quantizer.bits, quantizer.per_row)
        assert (fixed.quant_min, fixed.quant_max) == (quantizer.quant_min, quantizer.quant_max)


# ------------------------------------------------------------------------------------ a whole model
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_prepared_model_equals_explicit_arithmetic(bits, per_channel, device, tiny_config):
    """The whole prepared model against the float32 model whose weights and inputs were quantized
    from outside.
    """
    config = QuantConfig(weight_bits=bits, act_bits=bits, per_channel=per_channel, per_token=per_channel, grid="full")
    original, model, _ = prepared(config, tiny_config, 3)
    original, model = original.to(device), model.to(device)

    def on_grid(x, symmetric, per_row):
        low, high = quant_range(bits, symmetric)
        scale, zero = choose_qparams(*min_max(x, per_row), low, high, symmetric)
        return dequantize(quantize(x, scale, zero, low, high), scale, zero)

    def quantize_input(module, args):
        return (on_grid(args[0], False, per_channel),)

    with torch.no_grad():
        words = original.encoder.embeddings.word
        words.weight.copy_(on_grid(words.weight, True, True))  # the whole table, row by row
        for module in original.encoder.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(on_grid(module.weight, True, per_channel))
                module.register_forward_pre_hook(quantize_input)
        ids, mask = random_ids([9, 9, 9], tiny_config.vocab_size, device)
        expected, _ = original(ids, mask)
        found, _ = model(ids, mask)
        # training computes in this very order; in that of integers a rounding may flip
        set_dropout(model, 0.0)
        trained, _ = model.train()(ids, mask)
    torch.testing.assert_close(trained, expected, atol=1e-5, rtol=1e-5)
    assert (found - expected).abs().max() <= 0.05 * expected.std()


def test_error_falls_with_more_bits(tiny_config):
    ids, mask = random_ids([9, 6], tiny_config.vocab_size)
    errors = []
    for bits in range(2, 9):
        torch.manual_seed(0)
        original, model, _ = prepared(QuantConfig(weight_bits=bits, act_bits=8), tiny_config)
        with torch.no_grad():
            errors.append(float((original(ids, mask)[0] - model(ids, mask)[0]).abs().mean()))
    assert errors[-1] < errors[2] < errors[0] and errors[-1] < 0.05 * errors[0]


def test_per_token_ranges_do_not_depend_on_the_batch(tiny_config):
    _, model, _ = prepared(QuantConfig(), tiny_config)
    ids, mask = random_ids([9, 5, 7], tiny_config.vocab_size)
    together, _ = model(ids, mask)
    alone, _ = model(ids[1:2, :5])
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-4)


def test_noise_only_in_training(tiny_config):
    _, model, _ = prepared(QuantConfig(noise=0.5), tiny_config)
    _, full, _ = prepared(QuantConfig(noise=1.0), tiny_config)
    full.load_state_dict(model.state_dict())
    ids, mask = random_ids([9, 5], tiny_config.vocab_size)
    assert torch.equal(model(ids, mask)[0], full(ids, mask)[0])
    quantizer = model.encoder.layers[0].ffn.up.weight_quantizer
    weight = model.encoder.layers[0].ffn.up.weight
    quantizer.train()
    share = (quantizer(weight) != weight).float().mean()
    assert 0.4 < share < 0.6
    quantizer.noise = 0.0
    assert quantizer(weight) is weight


LEARNING = [
    {"weight_bits": 4, "noise": 0.5},
    {"weight_bits": 4, "act_range": "learned", "attention_bits": 8},
    {"weight_bits": 4, "weights": "lsq", "attention_bits": 4},
    *({"weights": n, "weight_bits": b, "weight_range": r} for n, b, r in EXTREMES),
]


@pytest.mark.parametrize("values", LEARNING, ids=str)
def test_every_parameter_learns(values, tiny_config):
    config = QuantConfig(**values)
    _, model, _ = prepared(config, tiny_config, 3)
    if config.act_range != "dynamic":
        calibrate(model, [random_ids([9, 9], tiny_config.vocab_size)], "minmax")
    assert_every_parameter_learns(model, *random_ids([9, 5], tiny_config.vocab_size))


def test_static_ranges(tiny_config):
    original, model, _ = prepared(QuantConfig(act_range="static"), tiny_config)
    batches = [random_ids([9, 9, 9], tiny_config.vocab_size) for _ in range(6)]
    assert model(*batches[0])[0].isnan().all()  # not calibrated: NaN instead of a silent error
    calibrate(model, batches, "minmax")
    for module in model.modules():
        if isinstance(module, ActQuantizer):
            assert module.observer is None and module.scale > 0
    error = (model(*batches[0])[0] - original(*batches[0])[0]).abs().max()
    assert error < 0.1 * original(*batches[0])[0].abs().max() + 0.02
    # the range of the first quantizer is that of the embeddings' output
    _, weights_only, _ = prepared(QuantConfig(act_bits=32), tiny_config)
    weights_only.load_state_dict(original.state_dict(), strict=False)
    outputs = [weights_only(*batch, ("hidden",))[1]["hidden"][0] for batch in batches]
    low, high = min(o.min() for o in outputs), max(o.max() for o in outputs)
    first = model.encoder.layers[0].attention.input_quantizer
    scale, zero = choose_qparams(low, high, 0, 255, False)
    torch.testing.assert_close((first.scale, first.zero_point), (scale, zero))


@pytest.mark.parametrize("values", [{"weights": "lsq"}, {"act_range": "learned"}, {"weights": "pq"}], ids=str)
def test_what_quantizers_train_does_not_decay(values, tiny_config):
    """Whatever its name and shape; but centroids stand for weights, and do."""
    _, model, _ = prepared(QuantConfig(**values), tiny_config)
    quantizers = [m for m in model.modules() if isinstance(m, (WeightQuantizer, ActQuantizer))]
    for quantizer in quantizers:
        assert quantizer.decays == (values == {"weights": "pq"} and isinstance(quantizer, WeightQuantizer))
        quantizer.borders = nn.Parameter(torch.ones(3, 4))  # as a new quantizer may have
    model = copy.deepcopy(model)  # as a student is of its teacher
    decayed, spared = (group["params"] for group in make_optimizers(model)[0].param_groups)
    ids = {id(p) for p in decayed}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            plain = parameter.dim() > 1 and not isinstance(module, nn.Embedding)
            if isinstance(module, (WeightQuantizer, ActQuantizer)):
                assert (id(parameter) in ids) == module.decays, name
            elif plain:
                assert id(parameter) in ids, name
    assert len(decayed) + len(spared) == len(list(model.parameters())) - 1  # the word table is sparse


# ---------------------------------------------------------------------------------- a new quantizer
class SignQuantizer(WeightQuantizer):
    """-a and a, a = mean|w|: all that a new quantizer must define."""

    @torch.no_grad()
    def codes(self, weight):
        over = {"dim": -1, "keepdim": True} if self.per_row else {}
        return torch.where(weight < 0, -1.0, 1.0), weight.abs().mean(**over)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("noise", [1.0, 0.5])
def test_new_quantizer_with_codes_alone(noise, per_channel, tiny_config, monkeypatch):
    row = WeightKind(SignQuantizer, SignQuantizer, "-a, a", bits=(2,), ranges=("minmax",))
    monkeypatch.setitem(WEIGHTS, "sign", row)
    values = {"weight_bits": 2, "weights": "sign", "per_channel": per_channel, "noise": noise}
    config = QuantConfig(**values)
    original, model, report = prepared(config, tiny_config, 3)
    assert len(report.replaced) == 13
    with pytest.raises(ValueError, match="weights=sign has 2 bits, not weight_bits=4"):
        check_quant(replace(config, weight_bits=4))

    # training: the straight-through estimator, without gradient where |w| rounds beyond the grid
    linear = model.encoder.layers[0].ffn.up
    weight = linear.weight.detach().clone().requires_grad_()
    quantizer, upstream = linear.weight_quantizer.train(), torch.randn_like(linear.weight)
    found, (codes, scale) = quantizer(weight), quantizer.codes(weight)
    found.backward(upstream)
    passed = found == weight
    assert torch.equal(found[~passed], (codes * scale)[~passed])
    assert abs(passed.float().mean() - (1 - noise)) < 0.05
    inside = passed | (weight.detach().abs() / scale < 1.5)
    assert torch.equal(weight.grad, upstream * inside) and not inside.all()
    ids, mask = random_ids([9, 9], tiny_config.vocab_size)
    labels = torch.tensor([0, 2])
    assert_every_parameter_learns(model, ids, mask)
    set_dropout(model, 0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(ids, mask)[0], labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]

    # evaluation: two values per row, in the student and in the integer model
    with torch.no_grad():
        logits = model.eval()(ids, mask)[0]
        assert F.cross_entropy(logits, labels) < losses[0]
        rounded = quantizer(linear.weight)
        assert all(len(row.unique()) == 2 for row in (rounded if per_channel else [rounded]))
        assert torch.equal(to_integer(model, config)(ids, mask)[0], logits)


# --------------------------------------------------------------------------------- inside attention
PARTS = ("query", "key", "value", "map")


def plain_attention(self, x, key_mask, taps):
    """Attention.forward without quantizers inside and without taps."""
    B, T, C = x.shape
    shape = B, T, self.num_heads, C // self.num_heads
    q, k, v = (part.view(shape).transpose(1, 2) for part in self.project(x))
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask)
    output = self.output(context.transpose(1, 2).reshape(B, T, C))
    return self.norm(x + self.dropout(output))


def inner_quantizers(model):
    """The quantizers inside attention: per layer, those of PARTS."""
    layers = [layer.attention for layer in model.encoder.layers]
    return [[getattr(layer, part + "_quantizer") for part in PARTS] for layer in layers]


def count_fused(monkeypatch):
    """A list that grows with every call of fused attention."""
    calls, fused = [], F.scaled_dot_product_attention

    def counted(*args, **values):
        calls.append(1)
        return fused(*args, **values)

    monkeypatch.setattr(model_module.F, "scaled_dot_product_attention", counted)
    return calls


@pytest.mark.parametrize("values", [{}, {"act_range": "static"}, {"act_bits": 32}], ids=str)
def test_attention_without_quantizers_inside_is_unchanged(values, tiny_config, monkeypatch):
    config = QuantConfig(attention_bits=32, **values)
    assert config == QuantConfig(**values)
    _, model, report = prepared(config, tiny_config, 3)
    batch = random_ids([9, 5], tiny_config.vocab_size)
    if values.get("act_range"):
        calibrate(model, [random_ids([9, 9], tiny_config.vocab_size)], "minmax")
    assert all(type(q) is nn.Identity for layer in inner_quantizers(model) for q in layer)
    assert report.act_quantizers == (0 if config.act_bits == 32 else 2 * 4)
    calls = count_fused(monkeypatch)
    found = model(*batch)[0]
    assert len(calls) == tiny_config.num_layers
    monkeypatch.setattr(Attention, "forward", plain_attention)
    assert torch.equal(model(*batch)[0], found)


def test_fused_and_explicit_attention_agree(tiny_config, monkeypatch):
    """The fused kernel, which runs if nothing is quantized inside, and the order that quantizers need."""
    calls = count_fused(monkeypatch)
    batch = random_ids([9, 5], tiny_config.vocab_size)
    ternary = QuantConfig(weight_bits=2, weights="ternary", act_bits=32)
    _, model, _ = prepared(ternary, tiny_config, 3)
    fused = model(*batch)[0]
    assert len(calls) == 2
    for layer in model.encoder.layers:
        layer.attention.map_quantizer = nn.Sequential()  # does nothing either
    torch.testing.assert_close(model(*batch)[0], fused, rtol=0, atol=1e-5)
    assert len(calls) == 2
    # with quantized activations a later rounding may flip: so the first context alone
    _, model, _ = prepared(QuantConfig(), tiny_config, 3)
    contexts = [model(*batch, taps)[1]["context"][0] for taps in [("context",), ("context", "map")]]
    torch.testing.assert_close(contexts[0], contexts[1], rtol=0, atol=1e-5)
    assert len(calls) == 4


def assert_on_grid(found, x, bits, low, high):
    """found is x rounded to 2^bits values on [low, high], widened to include 0, in float64."""
    found, x = found.double(), x.double()
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    zero = torch.round(-low / step)
    codes = found / step + zero
    assert (codes - codes.round()).abs().max() < 1e-2 / 4  # float32 of the scale
    assert codes.min() > -0.01 and codes.max() < 2**bits - 1 + 0.01
    clipped = x.clamp(-zero * step, (2**bits - 1 - zero) * step)
    assert ((found - clipped).abs() <= 0.501 * step).all()
    assert (found != x).float().mean() > 0.5


@pytest.mark.parametrize(
    "values",
    [{}, {"per_token": False}, {"act_range": "static"}, {"act_range": "learned"}, {"weight_bits": 32, "act_bits": 32}],
    ids=str,
)
@pytest.mark.parametrize("bits", [8, 4])
def test_inputs_of_the_products_inside_attention(bits, values, tiny_config, monkeypatch):
    config = QuantConfig(attention_bits=bits, **values)
    _, model, report = prepared(config, tiny_config, 3)
    outside = 0 if config.act_bits == 32 else 4
    assert report.act_quantizers == 2 * (outside + 4)
    calibration = random_ids([9, 9], tiny_config.vocab_size)
    if config.act_range != "dynamic":
        calibrate(model, [calibration], "minmax")
    calls, seen = count_fused(monkeypatch), {}
    kind = LearnedActQuantizer if config.act_range == "learned" else ActQuantizer
    for i, layer in enumerate(inner_quantizers(model)):
        for part, quantizer in zip(PARTS, layer, strict=True):
            assert type(quantizer) is kind and quantizer.bits == bits
            quantizer.register_forward_hook(
                lambda _, x, y, at=(i, part): seen.update({at: (x[0].detach(), y.detach())})
            )
    ids, mask = random_ids([9, 5], tiny_config.vocab_size)
    _, taps = model(ids, mask, ("context",))
    assert not calls and len(seen) == 8

    for (i, part), (x, y) in seen.items():
        if config.act_range != "dynamic":
            low, high = calibrated_range(model, calibration, i, part)
        elif config.per_token:
            low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        else:
            low, high = x.min(), x.max()
        assert_on_grid(y, x, bits, low, high)
    D = tiny_config.hidden_size // tiny_config.num_heads
    for i in range(2):  # the products read these tensors, and no others
        (_, q), (_, k), (_, v), (probabilities, rounded) = (seen[i, part] for part in PARTS)
        score = q.double() @ k.double().transpose(-2, -1) / math.sqrt(D)
        score = score.masked_fill(~mask[:, None, None, :], -math.inf)
        expected = score.softmax(-1)
        torch.testing.assert_close(probabilities.double(), expected, rtol=0, atol=1e-5)
        assert (rounded[1, :, :, 5:] == 0).all()  # padding is not attended to
        context = rounded.double() @ v.double()
        torch.testing.assert_close(taps["context"][i].double(), context, rtol=0, atol=1e-5)


def calibrated_range(model, batch, layer, part):
    """The smallest and largest value that a quantizer saw in calibration, during which no activation
    is quantized.
    """
    model, seen = copy.deepcopy(model), []
    for module in model.modules():
        if isinstance(module, ActQuantizer):
            module._forward_hooks.clear()
            module.forward = lambda x: x
    quantizer = inner_quantizers(model)[layer][PARTS.index(part)]
    quantizer.register_forward_hook(lambda _, x, y: seen.append(x[0].detach()))
    model(*batch)
    return seen[0].min(), seen[0].max()


@pytest.mark.parametrize(("bits", "least"), [(8, 0.999), (4, 0.9)])
def test_gradients_inside_attention(bits, least, tiny_config):
    """Rounding passes gradients through: they are nearly those of the float32 model."""
    config = QuantConfig(weight_bits=32, act_bits=32, attention_bits=bits)
    original, model, _ = prepared(config, tiny_config, 3)
    ids, mask = random_ids([9, 5], tiny_config.vocab_size)
    for both in (original, model.train()):
        set_dropout(both, 0.0)
        both(ids, mask)[0].logsumexp(-1).sum().backward()
    for part in PARTS[:3]:
        name = f"encoder.layers.0.attention.{part}.weight"
        found, expected = model.get_parameter(name).grad, original.get_parameter(name).grad
        assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > least
        assert not torch.equal(found, expected)


# ------------------------------------------------------------------------------------ tensor trains
TRAINS = TTConfig(rank=4, embedding_rank=5, table_modes=4, keep=())
TABLES = {f"encoder.embeddings.{name}": 4 for name in ("word", "position")}  # number of cores
LAYERS = {f"encoder.layers.{i}.{name}": 6 for i in range(2) for name in MATRICES}
HEADS = {"head.intent.dense": 6, "head.dense": 6}


@pytest.fixture
def train_config(tiny_config):
    return replace(tiny_config, head="joint", num_slots=5, tt=TRAINS)


def core_names(trains):
    return {f"{name}.cores.{k}" for name, count in trains.items() for k in range(count)}


@pytest.mark.parametrize("keep", [(), ("head",), ("encoder.layers.0.ffn", "encoder.embeddings.word")])
def test_prepare_reports_tensor_trains(keep, train_config):
    original, model, report = prepared(QuantConfig(keep=keep), train_config)
    every = {**TABLES, **LAYERS, **HEADS}
    trains = {name: count for name, count in every.items() if not name.startswith(keep)}
    linears = {f"head{name}.weight" for name in (".out_proj", ".intent.out_proj") if "head" not in keep}
    assert set(report.replaced) == core_names(trains) | linears
    # per layer: one for query, key and value, one in the middle of each, two for each of the others
    acts = 2 * (1 + 3 + 3 * 2) + 2 * 2 + 2
    assert report.act_quantizers == {0: acts, 1: acts - 6, 2: acts - 4}[len(keep)]
    parameters = dict(model.named_parameters())
    scales = {name for name in parameters if name.endswith("log_scale")}
    assert scales == {f"{name}.core_quantizers.{k}.log_scale" for name, n in trains.items() for k in range(n)}
    assert set(report.replaced) | set(report.kept) == set(parameters)
    for name, count in {**report.replaced, **report.kept}.items():
        assert parameters[name].numel() == count
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter, parameters[name])
    assert not any(module.training for module in model.modules())


def test_quantizers_of_tensor_trains(train_config):
    _, model, _ = prepared(QuantConfig(weight_bits=4, keep=("head",)), train_config)
    for name in LAYERS:
        layer = model.get_submodule(name)
        assert type(layer) is QuantTTLinear
        assert [type(q) for q in layer.core_quantizers] == [LearnedScale] * 6
        assert all(quantizer.bits == 4 for quantizer in layer.core_quantizers)
        shared = name.endswith(("query", "key", "value"))
        assert type(layer.act_quantizer) is (nn.Identity if shared else ActQuantizer)
        assert type(layer.middle_quantizer) is ActQuantizer
        for quantizer in (layer.A_quantizer, layer.B_quantizer):  # 8 bits, whatever the cores have
            assert type(quantizer) is UniformQuantizer and quantizer.per_row
            assert (quantizer.bits, quantizer.quant_min, quantizer.quant_max) == (8, -64, 64)
    for layer in model.encoder.layers:
        assert type(layer.attention.input_quantizer) is ActQuantizer
    for name in TABLES:
        table = model.get_submodule(name)
        assert type(table) is TTMEmbedding and len(table.core_quantizers) == 4
    assert type(model.head.dense) is TTLinear and model.head.dense.core_quantizers is None
    assert type(model.head.out_proj) is nn.Linear


def test_least_squares_starts_of_cores_do_not_clip_the_merged_matrices(train_config):
    config = QuantConfig(weight_bits=2, weight_range="mse", keep=("head",))
    _, model, _ = prepared(config, train_config)
    for name in (*TABLES, *LAYERS):
        module = model.get_submodule(name)
        for core, quantizer in zip(module.cores, module.core_quantizers, strict=True):
            assert torch.equal(quantizer.log_scale, LearnedScale(config, core).log_scale)
            min_max_start = LearnedScale(replace(config, weight_range="minmax"), core)
            assert quantizer.log_scale < min_max_start.log_scale
    for layer in (m for m in model.modules() if isinstance(m, QuantTTLinear)):
        assert not layer.A_quantizer.searched and not layer.B_quantizer.searched


def test_tensor_trains_with_float32_activations(train_config):
    """WeightKind alone: the cores are on their grids, and A and B are not rounded again."""
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
                scale = quantized.core_quantizers[k].log_scale.exp()
                module.cores[k].copy_(fake_quantize(module.cores[k], scale, torch.zeros(()), -128, 127))
        for module in (original.head.out_proj, original.head.intent.out_proj):
            low, high = quant_range(8, True)
            scale, zero = choose_qparams(*min_max(module.weight, True), low, high, True)
            module.weight.copy_(fake_quantize(module.weight, scale, zero, low, high))
    ids, mask = random_ids([9, 5], train_config.vocab_size)
    torch.testing.assert_close(model(ids, mask)[0], original(ids, mask)[0])


def test_float32_cores_with_quantized_activations(train_config):
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


def test_32_bits_leave_tensor_trains_alone(train_config):
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
    with pytest.raises(ValueError, match="already prepared"):
        prepare(model, config)


def test_every_parameter_of_quantized_tensor_trains_learns(train_config):
    _, model, _ = prepared(QuantConfig(weight_bits=4, keep=()), train_config)
    assert_every_parameter_learns(model, *random_ids([9, 5], train_config.vocab_size))


class Broken(UniformQuantizer):
    """A quantizer whose codes a test breaks."""

    broken = staticmethod(lambda codes: codes)

    def codes(self, weight):
        codes, scale = super().codes(weight)
        return type(self).broken(codes), scale


@pytest.mark.parametrize(
    "broken, found",
    [
        (lambda codes: 2 * codes, "-128 to 128, not integers from -64 to 64"),
        (lambda codes: codes - 1, "-65 to 63"),
        (lambda codes: codes / 2, "-32 to 32"),
        (lambda codes: codes * math.nan, "nan to nan"),
    ],
)
def test_codes_outside_the_grid_are_found_before_training(broken, found, tiny_config, monkeypatch):
    """Packed, they would become other integers, or a student that can't be read."""
    monkeypatch.setitem(WEIGHTS, "uniform", WeightKind(Broken, UniformQuantizer, "codes outside the grid"))
    model = initialize(meta_model(tiny_config))
    with monkeypatch.context() as patched, pytest.raises(ValueError, match=f"Broken.codes returned {found}"):
        patched.setattr(Broken, "broken", staticmethod(broken))
        prepare(copy.deepcopy(model), QuantConfig())
    prepare(model, QuantConfig())
    monkeypatch.setattr(Broken, "broken", staticmethod(broken))  # of a quantizer that changes later
    with pytest.raises(ValueError, match="its grid"):
        to_integer(model.eval(), QuantConfig())


def test_codes_of_a_table_are_checked(tiny_config, monkeypatch):
    """Some rows before training, all where they are packed."""
    monkeypatch.setitem(WEIGHTS, "uniform", WeightKind(UniformQuantizer, Broken, "codes outside the grid"))
    model = initialize(meta_model(tiny_config)).eval()
    message = "Broken.codes returned .* to 128, not integers from -127 to 127"
    with monkeypatch.context() as patched, pytest.raises(ValueError, match=message):
        patched.setattr(Broken, "broken", staticmethod(lambda codes: codes + 1))
        prepare(copy.deepcopy(model), QuantConfig())
    prepare(model, QuantConfig())
    monkeypatch.setattr(Broken, "broken", staticmethod(lambda codes: codes + 1))
    with pytest.raises(ValueError, match=message):
        student_payload(model, QuantConfig(), b"")

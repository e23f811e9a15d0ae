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
from checkpoint import meta_model
from int8 import to_integer
from lsq import LearnedActQuantizer, LearnedScale
from model import initialize, set_dropout
from pq import product_quantizers
from prepare import WEIGHTS, WeightKind, calibrate, check_quant, prepare
from quant import (
    ActQuantizer,
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
from tt import QuantTTLinear, TTConfig

MATRICES = [f"attention.{n}" for n in ("query", "key", "value", "output")] + ["ffn.up", "ffn.down"]
ROWS = [  # of WEIGHTS, with all that each allows
    (name, bits, weight_range) for name, row in WEIGHTS.items() for bits in row.bits for weight_range in row.ranges
]
EXTREMES = [case for case in ROWS if case[1] in (WEIGHTS[case[0]].bits[0], 4, 8)]

TRAINS = TTConfig(rank=4, embedding_rank=5, table_modes=4, keep=())
TABLES = {f"encoder.embeddings.{name}": 4 for name in ("word", "position")}  # number of cores
LAYERS = {f"encoder.layers.{i}.{name}": 6 for i in range(2) for name in MATRICES}
HEADS = {"head.intent.dense": 6, "head.dense": 6}


@pytest.fixture
def train_config(tiny_config):
    return replace(tiny_config, head="joint", num_slots=5, tt=TRAINS)


def prepared(config, shape, factor=1.0):
    """(a float32 model, a quantized copy of it).  factor: on all parameters, whose logits would be close to 0."""
    model = initialize(meta_model(shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    original = copy.deepcopy(model)
    prepare(model, config)
    return original, model


def quantized(model):
    """Name of each quantized weight -> (weight, quantizer): first the table, then the matrices."""
    found = {}
    for name, module in model.named_modules():
        for attribute in ("weight_quantizer", "row_quantizer"):
            if isinstance(quantizer := getattr(module, attribute, None), WeightQuantizer):
                found[name] = module.weight, quantizer
        if getattr(module, "core_quantizers", None) is not None:
            pairs = enumerate(zip(module.cores, module.core_quantizers, strict=True))
            found |= {f"{name}.{k}": pair for k, pair in pairs}
    return found


def count_acts(model):
    return sum(isinstance(module, ActQuantizer) for module in model.modules())


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
    ({"attention_bits": 9}, "attention_bits=9: choose 2 to 8, or 32"),
    ({"noise": float("nan")}, "noise=nan: choose a fraction from 0 to 1"),
    ({"act_range": "fixed"}, "act_range='fixed': choose from dynamic, static, learned"),
    ({"weights": "lsq", "weight_bits": 32}, "weights=lsq needs quantized weights: weight_bits=2 to 8"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=str)
def test_wrong_settings_name_their_field_and_what_to_choose(values, message, tiny_config):
    model = initialize(meta_model(tiny_config))
    with pytest.raises(ValueError) as error:
        prepare(model, QuantConfig(**values))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert type(model.encoder.layers[0].ffn.up) is nn.Linear  # nothing was replaced


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


# ---------------------------------------------------------------------------------- what is replaced
def test_what_prepare_replaces_and_what_it_says(tiny_config):
    original = initialize(meta_model(tiny_config))
    model = copy.deepcopy(original)
    text = prepare(model, QuantConfig())
    layers = {f"encoder.layers.{i}.{name}" for i in range(2) for name in MATRICES}
    assert set(quantized(model)) == layers | {"encoder.embeddings.word"}
    assert count_acts(model) == 2 * 4  # query, key and value share one
    done = sum(weight.numel() for weight, _ in quantized(model).values())
    total = sum(p.numel() for p in original.parameters())
    share = f"{done:,} of {total:,} parameters, {100 * done / total:.2f} %"
    assert text == f"13 weight tensors quantized ({share}), 8 activation quantizers"
    assert model.state_dict().keys() == original.state_dict().keys()
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


@pytest.mark.parametrize("keep", [(), ("head",), ("encoder.layers.0.ffn", "encoder.embeddings.word")])
def test_what_prepare_replaces_in_tensor_trains(keep, train_config):
    original, model = prepared(QuantConfig(keep=keep), train_config)
    every = {**TABLES, **LAYERS, **HEADS}
    trains = {name: count for name, count in every.items() if not name.startswith(keep)}
    linears = {"head.out_proj", "head.intent.out_proj"} if "head" not in keep else set()
    assert set(quantized(model)) == {f"{name}.{k}" for name, count in trains.items() for k in range(count)} | linears
    # per layer: one for query, key and value, one in the middle of each, two for each of the others
    acts = 2 * (1 + 3 + 3 * 2) + 2 * 2 + 2
    assert count_acts(model) == {0: acts, 1: acts - 6, 2: acts - 4}[len(keep)]
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("trains", [False, True])
def test_32_bits_leave_a_part_alone(trains, tiny_config, train_config):
    shape = train_config if trains else tiny_config
    weights, acts = (8 + 12 * 6, 20) if trains else (13, 8)
    for values, expected in (({}, (weights, acts)), ({"weight_bits": 32}, (0, acts)), ({"act_bits": 32}, (weights, 0))):
        _, model = prepared(QuantConfig(**values), shape)
        assert (len(quantized(model)), count_acts(model)) == expected
    original, model = prepared(QuantConfig(weight_bits=32, act_bits=32), shape)
    assert not quantized(model) and not count_acts(model)
    batch = random_ids([7, 5], shape.vocab_size)
    assert all(map(torch.equal, model(*batch)[0], original(*batch)[0]))
    with pytest.raises(ValueError, match="already prepared"):
        prepare(model, QuantConfig())


def test_part_of_an_attention_cannot_be_kept(tiny_config):
    with pytest.raises(ValueError, match="keep all of encoder.layers.0.attention"):
        prepared(QuantConfig(keep=("head", "encoder.layers.0.attention.key")), tiny_config)
    assert count_acts(prepared(QuantConfig(keep=("head", "encoder.layers.0.attention")), tiny_config)[1]) == 4 + 2


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
    _, model = prepared(QuantConfig(per_channel=per_channel, **values), tiny_config, 3)
    (_, words), *matrices = quantized(model).values()
    assert type(words) is table and words.per_row  # whatever per_channel says of matrices
    assert len(matrices) == 12
    for _, quantizer in matrices:
        assert type(quantizer) is matrix and quantizer.per_row == per_channel
        assert (quantizer.quant_min, quantizer.quant_max) == grid


def test_one_clip_factor_for_all_rows_of_a_table(tiny_config):
    """The factor of a table scales the min-max range of every row; it is the best common one."""
    _, model = prepared(QuantConfig(weight_bits=3, weight_range="mse"), tiny_config)
    weight, quantizer = quantized(model)["encoder.embeddings.word"]
    weight = weight.detach()
    assert quantizer.clip.dim() == 0 and quantizer.clip < 1
    low, high = min_max(weight, True)

    def error(factor):
        scale, zero = choose_qparams(low * factor, high * factor, -3, 3, True)
        return float((fake_quantize(weight, scale, zero, -3, 3) - weight).square().sum())

    assert error(quantizer.clip) == pytest.approx(min(error(percent / 100) for percent in range(10, 101, 2)))


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("name", "bits", "weight_range"), ROWS)
def test_every_row_of_weights_in_a_model(name, bits, weight_range, per_channel, tiny_config):
    """What is trained is what is packed, bit for bit."""
    values = {"weights": name, "weight_bits": bits, "weight_range": weight_range}
    shape = replace(tiny_config, num_layers=1)
    _, model = prepared(QuantConfig(**values, per_channel=per_channel), shape, 3)
    pairs = [(weight.detach(), quantizer) for weight, quantizer in quantized(model).values()]
    assert [quantizer.per_row for _, quantizer in pairs] == [True] + 6 * [per_channel]
    for weight, quantizer in pairs:
        codes, scale = quantizer.codes(weight)
        assert scale.shape == ((len(weight), 1) if quantizer.per_row else ()) and (scale > 0).all()
        assert torch.equal(codes, codes.round())
        assert quantizer.quant_min <= codes.min() and codes.max() <= quantizer.quant_max
        if not quantizer.clips and type(quantizer).codes is WeightQuantizer.codes:  # then the scale covers all weights
            assert ((weight / scale).abs() < quantizer.quant_max + 0.5).all()
        found = quantizer(weight)
        assert torch.equal(found, codes * scale) and torch.equal(quantizer.train()(weight), found)


# ------------------------------------------------------------------------------------ a whole model
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_prepared_model_equals_explicit_arithmetic(bits, per_channel, device, tiny_config):
    """The whole prepared model against the float32 model whose weights and inputs were quantized from outside."""
    config = QuantConfig(weight_bits=bits, act_bits=bits, per_channel=per_channel, per_token=per_channel, grid="full")
    original, model = prepared(config, tiny_config, 3)
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


def test_per_token_ranges_do_not_depend_on_the_batch(tiny_config):
    _, model = prepared(QuantConfig(), tiny_config)
    ids, mask = random_ids([9, 5, 7], tiny_config.vocab_size)
    together, _ = model(ids, mask)
    alone, _ = model(ids[1:2, :5])
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-4)


LEARNING = [
    {"weight_bits": 4, "noise": 0.5},
    {"weight_bits": 4, "act_range": "learned", "attention_bits": 8},
    {"weight_bits": 4, "weights": "lsq", "attention_bits": 4},
    {"weight_bits": 4, "keep": ()},
    *({"weights": n, "weight_bits": b, "weight_range": r} for n, b, r in EXTREMES),
]


@pytest.mark.parametrize("values", LEARNING, ids=str)
def test_every_parameter_learns(values, tiny_config, train_config):
    trains = "keep" in values
    _, model = prepared(QuantConfig(**values), train_config if trains else tiny_config, 1 if trains else 3)
    if "act_range" in values:
        batch = random_ids([9, 9], tiny_config.vocab_size)
        assert model(*batch)[0].isnan().all()  # not calibrated: NaN instead of a silent error
        calibrate(model, [batch])
    assert_every_parameter_learns(model, *random_ids([9, 5], tiny_config.vocab_size))


def test_static_ranges(tiny_config):
    original, model = prepared(QuantConfig(act_range="static"), tiny_config)
    batches = [random_ids([9, 9, 9], tiny_config.vocab_size) for _ in range(6)]
    assert model(*batches[0])[0].isnan().all()  # not calibrated: NaN instead of a silent error
    calibrate(model, batches)
    for module in model.modules():
        if isinstance(module, ActQuantizer):
            assert module.seen is None and module.scale > 0
    # the range of the first quantizer is that of the embeddings' output
    _, weights_only = prepared(QuantConfig(act_bits=32), tiny_config)
    weights_only.load_state_dict(original.state_dict(), strict=False)
    outputs = [weights_only(*batch, ("hidden",))[1]["hidden"][0] for batch in batches]
    low, high = min(o.min() for o in outputs), max(o.max() for o in outputs)
    first = model.encoder.layers[0].attention.input_quantizer
    scale, zero = choose_qparams(low, high, 0, 255, False)
    torch.testing.assert_close((first.scale, first.zero_point), (scale, zero))


@pytest.mark.parametrize("values", [{"weights": "lsq"}, {"act_range": "learned"}, {"weights": "pq"}], ids=str)
def test_what_quantizers_train_does_not_decay(values, tiny_config):
    """Whatever its name and shape; but centroids stand for weights, and do."""
    _, model = prepared(QuantConfig(**values), tiny_config)
    quantizers = [m for m in model.modules() if isinstance(m, (WeightQuantizer, ActQuantizer))]
    for quantizer in quantizers:
        assert quantizer.decays == (values == {"weights": "pq"} and isinstance(quantizer, WeightQuantizer))
        quantizer.borders = nn.Parameter(torch.ones(3, 4))  # as a new quantizer may have
    model = copy.deepcopy(model)  # as a student is of its teacher
    dense, sparse = make_optimizers(model)
    assert [group["weight_decay"] for group in dense.param_groups] == [0.01, 0.0]
    assert sparse.param_groups[0]["params"] == [model.encoder.embeddings.word.weight]
    decayed, spared = (group["params"] for group in dense.param_groups)
    ids = {id(p) for p in decayed}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, (WeightQuantizer, ActQuantizer)):
                assert (id(parameter) in ids) == module.decays, name
            elif parameter is not model.encoder.embeddings.word.weight:  # vectors are biases and norms
                assert (id(parameter) in ids) == (parameter.dim() > 1), name
    assert len(decayed) + len(spared) == len(list(model.parameters())) - 1  # the word table is sparse


# ---------------------------------------------------------------------------------- a new quantizer
class SignQuantizer(WeightQuantizer):
    """-a and a, a = mean|w|: all that a new quantizer must define."""

    @torch.no_grad()
    def codes(self, weight):
        over = {"dim": -1, "keepdim": True} if self.per_row else {}
        return torch.where(weight < 0, -1.0, 1.0), weight.abs().mean(**over)


@pytest.mark.parametrize("per_channel", [True, False])
def test_new_quantizer_with_codes_alone(per_channel, tiny_config, monkeypatch):
    monkeypatch.setitem(WEIGHTS, "sign", WeightKind(SignQuantizer, SignQuantizer, "-a, a", (2,), ("minmax",)))
    config = QuantConfig(weight_bits=2, weights="sign", per_channel=per_channel, noise=0.5)
    _, model = prepared(config, tiny_config, 3)
    assert len(quantized(model)) == 13

    weight, quantizer = quantized(model)["encoder.layers.0.ffn.up"]
    found, (codes, scale) = quantizer.train()(weight), quantizer.codes(weight)
    passed = found == weight
    assert torch.equal(found[~passed], (codes * scale)[~passed])
    assert abs(passed.float().mean() - 0.5) < 0.05
    ids, mask = random_ids([9, 9], tiny_config.vocab_size)
    assert_every_parameter_learns(model, ids, mask)

    # evaluation: two values per row, in the student and in the integer model
    with torch.no_grad():
        logits, rounded = model.eval()(ids, mask)[0], quantizer(weight)
        assert all(len(row.unique()) == 2 for row in (rounded if per_channel else [rounded]))
        assert torch.equal(to_integer(model, config)(ids, mask)[0], logits)


# --------------------------------------------------------------------------------- inside attention
PARTS = ("query", "key", "value", "map")


def count_fused(monkeypatch):
    """A list that grows with every call of fused attention."""
    calls, fused = [], F.scaled_dot_product_attention

    def counted(*args, **values):
        calls.append(1)
        return fused(*args, **values)

    monkeypatch.setattr(model_module.F, "scaled_dot_product_attention", counted)
    return calls


def test_fused_and_explicit_attention_agree(tiny_config, monkeypatch):
    """The fused kernel, which runs if nothing is quantized inside, and the order that quantizers need."""
    calls = count_fused(monkeypatch)
    batch = random_ids([9, 5], tiny_config.vocab_size)
    ternary = QuantConfig(weight_bits=2, weights="ternary", act_bits=32)
    _, model = prepared(ternary, tiny_config, 3)
    fused = model(*batch)[0]
    assert len(calls) == 2
    for layer in model.encoder.layers:
        layer.attention.map_quantizer = nn.Sequential()  # does nothing either
    torch.testing.assert_close(model(*batch)[0], fused, rtol=0, atol=1e-5)
    assert len(calls) == 2
    # with quantized activations a later rounding may flip: so the first context alone
    _, model = prepared(QuantConfig(), tiny_config, 3)
    contexts = [model(*batch, taps)[1]["context"][0] for taps in [("context",), ("context", "map")]]
    torch.testing.assert_close(contexts[0], contexts[1], rtol=0, atol=1e-5)
    assert len(calls) == 4


@pytest.mark.parametrize(
    "values",
    [{}, {"per_token": False}, {"act_range": "static"}, {"act_range": "learned"}, {"weight_bits": 32, "act_bits": 32}],
    ids=str,
)
@pytest.mark.parametrize("bits", [8, 4])
def test_inputs_of_the_products_inside_attention(bits, values, tiny_config, monkeypatch):
    config = QuantConfig(attention_bits=bits, **values)
    _, model = prepared(config, tiny_config, 3)
    assert count_acts(model) == 2 * ((0 if config.act_bits == 32 else 4) + 4)
    if config.act_range != "dynamic":
        calibrate(model, [random_ids([9, 9], tiny_config.vocab_size)])
    calls, seen = count_fused(monkeypatch), {}
    kind = LearnedActQuantizer if config.act_range == "learned" else ActQuantizer
    for i, layer in enumerate(model.encoder.layers):
        for part in PARTS:
            quantizer = getattr(layer.attention, part + "_quantizer")
            assert type(quantizer) is kind and quantizer.bits == bits
            quantizer.register_forward_hook(
                lambda q, x, y, at=(i, part): seen.update({at: (x[0].detach(), y.detach(), q.qparams(x[0]))})
            )
    ids, mask = random_ids([9, 5], tiny_config.vocab_size)
    _, taps = model(ids, mask, ("context",))
    assert not calls and len(seen) == 8

    for (_, part), (x, y, (scale, zero)) in seen.items():
        assert torch.equal(y, dequantize(quantize(x, scale, zero, 0, 2**bits - 1), scale, zero)), part
        assert scale.shape == ((*x.shape[:-1], 1) if config.per_token and config.act_range == "dynamic" else ())
    D = tiny_config.hidden_size // tiny_config.num_heads
    for i in range(2):  # the products read these tensors, and no others
        (q, k, v, rounded), probabilities = (seen[i, part][1] for part in PARTS), seen[i, "map"][0]
        score = q.double() @ k.double().transpose(-2, -1) / math.sqrt(D)
        expected = score.masked_fill(~mask[:, None, None, :], -math.inf).softmax(-1)
        torch.testing.assert_close(probabilities.double(), expected, rtol=0, atol=1e-5)
        assert (rounded[1, :, :, 5:] == 0).all()  # padding is not attended to
        context = rounded.double() @ v.double()
        torch.testing.assert_close(taps["context"][i].double(), context, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------ tensor trains
@pytest.mark.parametrize("values", [{"weight_bits": 4}, {"weight_bits": 2, "weight_range": "mse"}], ids=str)
def test_quantizers_of_tensor_trains(values, train_config):
    config = QuantConfig(**values, keep=("head",))
    _, model = prepared(config, train_config)
    for name in (*TABLES, *LAYERS):
        module = model.get_submodule(name)
        for core, quantizer in zip(module.cores, module.core_quantizers, strict=True):
            assert type(quantizer) is LearnedScale and quantizer.bits == config.weight_bits
            assert torch.equal(quantizer.log_scale, LearnedScale(config, core).log_scale)
    for name in LAYERS:
        layer = model.get_submodule(name)
        shared = name.endswith(("query", "key", "value"))
        assert type(layer.act_quantizer) is (nn.Identity if shared else ActQuantizer)
        assert type(layer.middle_quantizer) is ActQuantizer
        for quantizer in (layer.A_quantizer, layer.B_quantizer):  # 8 bits, min-max, whatever the cores have
            assert type(quantizer) is UniformQuantizer and quantizer.per_row and not quantizer.clips
            assert (quantizer.bits, quantizer.quant_min, quantizer.quant_max) == (8, -64, 64)


def test_tensor_trains_with_float32_activations(train_config):
    """Weights alone: the cores are on their grids, and A and B are not rounded again."""
    original, model = prepared(QuantConfig(act_bits=32, keep=()), train_config)
    for name in (*LAYERS, *HEADS):
        layer = model.get_submodule(name)
        for kind in ("act", "middle", "A", "B"):
            assert type(getattr(layer, kind + "_quantizer")) is nn.Identity
    with torch.no_grad():  # the same float32 model, with weights that were quantized from outside
        for name, count in {**TABLES, **LAYERS, **HEADS}.items():
            for k, core in zip(range(count), original.get_submodule(name).cores, strict=True):
                scale = model.get_submodule(name).core_quantizers[k].log_scale.exp()
                core.copy_(fake_quantize(core, scale, torch.zeros(()), -128, 127))
        for module in (original.head.out_proj, original.head.intent.out_proj):
            scale, zero = choose_qparams(*min_max(module.weight, True), -127, 127, True)
            module.weight.copy_(fake_quantize(module.weight, scale, zero, -127, 127))
    ids, mask = random_ids([9, 5], train_config.vocab_size)
    torch.testing.assert_close(model(ids, mask)[0], original(ids, mask)[0])


def test_float32_cores_with_quantized_activations(train_config):
    _, model = prepared(QuantConfig(weight_bits=32, keep=("head",)), train_config)
    layer = model.encoder.layers[0].ffn.up
    assert type(layer) is QuantTTLinear and layer.core_quantizers is None
    x = torch.randn(3, 32)
    A, B = layer.halves()
    expected = layer.middle_quantizer(layer.act_quantizer(x) @ A.T) @ B.T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    assert (layer(x) - (x @ A.T @ B.T + layer.bias)).any()


@pytest.mark.parametrize(
    "of_matrices, change, found",
    [
        (True, lambda codes: 2 * codes, "-128 to 128, not integers from -64 to 64"),
        (True, lambda codes: codes / 2, "-32 to 32"),
        (True, lambda codes: codes * math.nan, "nan to nan"),
        (False, lambda codes: codes + 1, ".* to 128, not integers from -127 to 127"),
    ],
)
def test_codes_outside_the_grid_are_found(of_matrices, change, found, tiny_config, monkeypatch):
    """Before training, and where they are packed: they would become other integers, or a student that can't be read."""

    class Broken(UniformQuantizer):
        def codes(self, weight):
            codes, scale = super().codes(weight)
            return change(codes), scale

    _, model = prepared(QuantConfig(), tiny_config)
    kinds = (Broken, UniformQuantizer) if of_matrices else (UniformQuantizer, Broken)
    monkeypatch.setitem(WEIGHTS, "uniform", WeightKind(*kinds, "codes outside the grid"))
    with pytest.raises(ValueError, match=f"Broken.codes returned {found}"):
        prepared(QuantConfig(), tiny_config)
    for _, quantizer in quantized(model).values():
        quantizer.__class__ = Broken  # one that changes later
    with pytest.raises(ValueError, match="its grid"):
        to_integer(model, QuantConfig())

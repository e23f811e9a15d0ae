"""Weights of 2 bits and what goes with them: ternary weights, cut weights, quantizers inside attention,
files of 2 bits a weight, and BERT's pooler. The rules again in plain Python and in float64.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import random_ids
from torch import nn

import model as model_module
from checkpoint import checkpoint_payload, load_checkpoint, save_atomically
from data import UserError
from learned import LearnedActQuantizer, LearnedScale
from model import Attention, build_model, set_dropout, with_head
from packed import pack, read_student, student_payload
from prepare import calibrate, prepare
from quant import ActQuantizer, QuantConfig, TernaryQuantizer, WeightQuantizer, best_clip

TERNARY = QuantConfig(weight_bits=2, weights="ternary")


def ternary(per_row=True, **values):
    return TernaryQuantizer(replace(TERNARY, **values), per_row, multiplied=True)


# -------------------------------------------------------------------------------- ternary weights
def ternary_by_hand(values):
    """Ternary Weight Networks, eq. 5-6, for a list of numbers: (codes, alpha)."""
    sizes = [abs(value) for value in values]
    delta = 0.7 * math.fsum(sizes) / len(sizes)
    large = [size for size in sizes if size > delta]
    alpha = math.fsum(large) / len(large) if large else 0.0
    return [math.copysign(1, v) if abs(v) > delta else 0 for v in values], alpha


def error_of_ternary(values, alpha, codes):
    return math.fsum((v - alpha * code) ** 2 for v, code in zip(values, codes, strict=True))


def least_error(values):
    """Of all ternary codes with the best alpha of each. For k codes that are not 0 those are the k
    largest numbers, and alpha their mean.
    """
    sizes = sorted((abs(value) for value in values), reverse=True)
    squares, most, total = math.fsum(size**2 for size in sizes), 0.0, 0.0
    for k, size in enumerate(sizes, start=1):
        total += size
        most = max(most, total**2 / k)  # k alpha^2
    return squares - most


MATRICES = {
    "gaussian": torch.randn(12, 50, generator=torch.Generator().manual_seed(1)),
    "sizes": torch.randn(8, 30, generator=torch.Generator().manual_seed(2))
    * torch.logspace(-4, 2, 8)[:, None],
    "one column": torch.tensor([[3.0], [-0.25], [1e-6], [0.0]]),
    "one number": torch.tensor([[-0.7]]),
    "constants": torch.tensor([[2.0] * 5, [-0.3] * 5, [0.1, -0.1, 0.1, -0.1, 0.1]]),
    "zeros": torch.tensor([[0.0] * 4, [1.0, -2.0, 0.0, 0.1], [-0.0, 0.0, -0.0, 0.0]]),
    "nothing": torch.zeros(3, 4),
    "few": torch.tensor([[0.0, 0.0, 0.0, 5.0], [0.0, -1.0, 0.0, 0.0]]),
}


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("name", MATRICES)
def test_ternary_weights_by_brute_force(name, per_row):
    weight = MATRICES[name]
    quantizer = ternary(per_row)
    found, (codes, scale) = quantizer(weight), quantizer.codes(weight)
    assert scale.shape == ((len(weight), 1) if per_row else ()) and (scale > 0).all()
    assert torch.equal(found, codes * scale)  # what is packed is what was trained, bit for bit
    assert torch.equal(quantizer.eval()(weight), found)
    groups = zip(weight, codes, scale, strict=True) if per_row else [(weight, codes, scale)]
    for values, row, alpha in groups:
        expected, expected_alpha = ternary_by_hand(values.flatten().tolist())
        assert row.flatten().tolist() == expected
        # a row of zeros has no alpha, but must have a scale that divides
        assert alpha.item() == pytest.approx(expected_alpha, rel=1e-5, abs=1e-11)
    if name == "nothing":
        assert not found.any()


def test_ternary_weights_of_a_file_are_on_their_grid_already():
    weight = MATRICES["sizes"]
    quantizer = ternary()
    codes, scale = quantizer.codes(weight)
    quantizer.fixed_scale = scale
    assert torch.equal(quantizer(codes * scale), codes * scale)
    found, same = quantizer.codes(codes * scale)
    assert torch.equal(found, codes) and same is scale  # not a mean again, with another last digit


@pytest.mark.parametrize("noise", [1.0, 0.4])
@pytest.mark.parametrize("per_row", [True, False])
def test_gradient_passes_through_ternary_weights_everywhere(per_row, noise):
    weight = (torch.randn(20, 30) * torch.logspace(-2, 2, 20)[:, None]).requires_grad_()
    upstream = torch.randn_like(weight)
    ternary(per_row, noise=noise)(weight).backward(upstream)
    assert torch.equal(weight.grad, upstream)


@pytest.mark.parametrize("block", [1, 8])
def test_noise_mixes_ternary_weights_with_exact_ones(block):
    weight = torch.randn(300, 48)
    quantizer = ternary(noise=0.3, noise_block=block)
    mixed, full = quantizer(weight), quantizer.eval()(weight)
    exact, on_grid = mixed == weight, mixed == full
    assert (exact ^ on_grid).all()  # one or the other, bit for bit
    assert abs(on_grid.float().mean() - 0.3) < 0.04
    runs = on_grid.view(300, 6, 8)
    assert (runs.all(-1) | ~runs.any(-1)).all() == (block == 8)
    assert torch.equal(full, ternary()(weight))  # in evaluation everything is quantized
    assert ternary(noise=0.0)(weight) is weight


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_ternary_weights_are_near_the_best_there_are(kind):
    weight = torch.randn(20, 400) if kind == "gaussian" else torch.rand(20, 400) - 0.5
    rows = weight.tolist()
    codes, scale = ternary().codes(weight)
    pairs = zip(rows, scale.flatten().tolist(), codes.tolist(), strict=True)
    error = sum(error_of_ternary(*row) for row in pairs)
    best = sum(least_error(row) for row in rows)
    assert best <= error < 1.03 * best
    narrow = WeightQuantizer(QuantConfig(weight_bits=2), per_row=True, multiplied=True)
    min_max_error = (narrow(weight) - weight).square().sum().item()
    assert error < (0.35 if kind == "gaussian" else 0.75) * min_max_error


def test_least_error_by_all_codes():
    """The oracle above against every one of the 3^6 codes."""
    values = torch.randn(6, dtype=torch.float64).tolist()
    errors = []
    for index in range(3**6):
        codes = [index // 3**k % 3 - 1 for k in range(6)]
        if any(codes):
            alpha = sum(c * v for c, v in zip(codes, values, strict=True)) / sum(map(abs, codes))
            errors.append(error_of_ternary(values, alpha, codes))
    assert least_error(values) == pytest.approx(min(errors), rel=1e-9)


# ------------------------------------------------------------------------------------ cut weights
KINDS = {
    "8 bits": QuantConfig(weight_clip=0.5),
    "4 bits": QuantConfig(weight_bits=4, weight_clip=0.5),
    "ternary": replace(TERNARY, weight_clip=0.5),
}


def weight_quantizer(config, per_row=True):
    kind = TernaryQuantizer if config.weights == "ternary" else WeightQuantizer
    return kind(config, per_row, multiplied=True)


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_cut_weights(kind, per_row):
    weight = torch.randn(9, 40) * 0.4
    weight[0] *= 0.1  # a row with nothing to cut
    cut = torch.tensor([[min(max(value, -0.5), 0.5) for value in row] for row in weight.tolist()])
    assert not torch.equal(weight, cut) and torch.equal(weight[0], cut[0])
    quantizer = weight_quantizer(KINDS[kind], per_row)
    plain = weight_quantizer(replace(KINDS[kind], weight_clip=0.0), per_row)
    found, (codes, scale) = quantizer(weight), quantizer.codes(weight)
    assert torch.equal(found, plain(cut)) and not torch.equal(found, plain(weight))
    assert torch.equal(codes, plain.codes(cut)[0]) and torch.equal(scale, plain.codes(cut)[1])
    assert torch.equal(found, codes * scale) and torch.equal(quantizer.eval()(weight), found)
    assert found.abs().max() <= 0.5 * 1.000001


@pytest.mark.parametrize("noise", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_beyond_the_cut(kind, noise):
    weight = torch.randn(30, 40) * 0.4
    weight[0, :2] = torch.tensor([0.5, -0.5])  # still inside
    weight.requires_grad_()
    quantizer = weight_quantizer(replace(KINDS[kind], noise=noise))
    upstream = torch.randn_like(weight)
    found = quantizer(weight)
    found.backward(upstream)
    inside = weight.detach().abs() <= 0.5
    assert torch.equal(weight.grad, upstream * inside) and not inside.all()
    if noise == 0.0:  # what is not rounded is cut as well
        assert torch.equal(found, weight.clamp(-0.5, 0.5))
    full = quantizer.eval()(weight)
    assert ((found == full) | (found == weight.clamp(-0.5, 0.5))).all()


def test_nothing_is_cut_by_default():
    weight = torch.randn(9, 40) * 100
    for config in (QuantConfig(), QuantConfig(weight_bits=4), TERNARY):
        assert config.weight_clip == 0.0
        quantizer = weight_quantizer(config)
        assert quantizer.cut(weight) is weight
        largest = weight_quantizer(replace(config, weight_clip=1e6))
        assert torch.equal(quantizer(weight), largest(weight))
        assert quantizer(weight).abs().max() > 50


@pytest.mark.parametrize("per_row", [True, False])
def test_searched_ranges_are_those_of_cut_weights(per_row):
    """One outlier a row asks for a small share of its range; once it is cut, nothing does."""
    weight = torch.randn(6, 200) * 0.02
    weight[:, 0] = 1.0
    config = QuantConfig(weight_bits=4, weight_range="mse", weight_clip=0.05)
    quantizer = weight_quantizer(config, per_row)
    quantizer.search_clip(weight)
    cut = weight.clamp(-0.05, 0.05)
    assert torch.equal(quantizer.clip, best_clip(cut, -7, 7, True, per_row))
    plain = weight_quantizer(replace(config, weight_clip=0.0, weight_range="minmax"), per_row)
    errors = [(part(cut) - cut).square().sum() for part in (quantizer, plain)]
    assert errors[0] <= errors[1]


# ---------------------------------------------------------------------------------------- a model
MATRIX_NAMES = [f"attention.{n}" for n in ("query", "key", "value", "output")]
MATRIX_NAMES += ["ffn.up", "ffn.down"]


def prepared(config, shape):
    """(the float32 model, a quantized copy of it, the report), with logits that are not near 0."""
    model = build_model(shape).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    original = copy.deepcopy(model)
    return original, model, prepare(model, config)


GIVEN = [  # settings, the quantizers of matrices and of the table, and the matrices' integers
    ({"weights": "ternary", "weight_bits": 2}, TernaryQuantizer, TernaryQuantizer, (-1, 1)),
    ({"weights": "lsq", "weight_bits": 2}, LearnedScale, TernaryQuantizer, (-2, 1)),
    ({"weights": "lsq", "weight_bits": 4}, LearnedScale, WeightQuantizer, (-8, 7)),
    ({"weights": "lsq"}, LearnedScale, WeightQuantizer, (-64, 64)),
    ({"weights": "lsq", "grid": "full"}, LearnedScale, WeightQuantizer, (-127, 127)),
    ({"weights": "lsq", "act_bits": 6}, LearnedScale, WeightQuantizer, (-127, 127)),
    ({"weight_bits": 2}, WeightQuantizer, WeightQuantizer, (-1, 1)),
]


@pytest.mark.parametrize("given", GIVEN, ids=lambda given: str(given[0]))
@pytest.mark.parametrize("per_channel", [True, False])
def test_what_prepare_gives_to_weights(per_channel, given, tiny_config):
    values, matrix, table, grid = given
    _, model, report = prepared(QuantConfig(per_channel=per_channel, **values), tiny_config)
    for layer in model.encoder.layers:
        for name in MATRIX_NAMES:
            linear = layer.get_submodule(name)
            quantizer = linear.weight_quantizer
            assert type(quantizer) is matrix and quantizer.per_row == per_channel
            assert (quantizer.quant_min, quantizer.quant_max) == grid
            codes, scale = quantizer.codes(linear.weight)
            assert scale.shape == ((len(linear.weight), 1) if per_channel else ())
            assert grid[0] <= codes.min() < 0 < codes.max() <= grid[1]
    words = model.encoder.embeddings.word.row_quantizer
    assert type(words) is table and words.per_row  # whatever the matrices have
    scales = {n: p.numel() for n, p in model.named_parameters() if n.endswith("log_scale")}
    assert len(scales) == (12 if matrix is LearnedScale else 0)
    assert scales.items() <= report.kept.items()
    assert len(report.replaced) == 13


@pytest.mark.parametrize("start", ["minmax", "mse", "lsq"])
def test_where_learned_scales_of_a_model_start(start, tiny_config):
    config = QuantConfig(weight_bits=4, weights="lsq", weight_range=start)
    original, model, _ = prepared(config, tiny_config)
    for name in MATRIX_NAMES:
        weight = original.encoder.layers[1].get_submodule(name).weight
        found = model.encoder.layers[1].get_submodule(name).weight_quantizer
        assert torch.equal(found.scale(), LearnedScale(4, weight, start, True).scale())
        others = {"minmax", "mse", "lsq"} - {start}
        for other in others:
            assert not torch.equal(found.scale(), LearnedScale(4, weight, other, True).scale())


@pytest.mark.parametrize(
    "values",
    [
        {"weights": "ternary", "weight_bits": 2},
        {"weights": "lsq", "weight_bits": 2, "weight_range": "lsq"},
        {"weights": "lsq", "weight_bits": 4, "attention_bits": 4},
        {"weight_bits": 4, "weight_clip": 0.05, "act_range": "learned", "attention_bits": 8},
    ],
    ids=str,
)
def test_every_parameter_of_few_bits_learns(values, tiny_config):
    config = QuantConfig(**values)
    _, model, _ = prepared(config, tiny_config)
    ids, mask = random_ids([9, 9], tiny_config.vocab_size)
    if config.act_range != "dynamic":
        calibrate(model, [(ids, mask)], "minmax")
    model.train()(ids, mask)[0].logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        if name.endswith("key.bias"):  # adds a constant to each row of scores: softmax cancels it
            continue
        grad = parameter.grad
        grad = grad.coalesce().values() if grad.is_sparse else grad
        assert grad.isfinite().all() and grad.any(), name


# ------------------------------------------------------------------------------- inside attention
PARTS = ("query", "key", "value", "map")


def plain_attention(self, x, key_mask, taps):
    """Attention.forward as it was without quantizers inside, for what is not captured."""
    B, T, C = x.shape
    shape = B, T, self.num_heads, C // self.num_heads
    q, k, v = (part.view(shape).transpose(1, 2) for part in self.project(x))
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask)
    output = self.output(context.transpose(1, 2).reshape(B, T, C))
    return self.norm(x + self.dropout(output))


def inner_quantizers(model):
    """The quantizers inside attention: layer by layer, those of PARTS."""
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
def test_attention_without_quantizers_inside_is_what_it_was(values, tiny_config, monkeypatch):
    config = QuantConfig(attention_bits=32, **values)
    assert config == QuantConfig(**values)
    _, model, report = prepared(config, tiny_config)
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
    """What runs where nothing is quantized inside, and the order that quantizers need."""
    calls = count_fused(monkeypatch)
    batch = random_ids([9, 5], tiny_config.vocab_size)
    _, model, _ = prepared(QuantConfig(weight_bits=2, weights="ternary", act_bits=32), tiny_config)
    fused = model(*batch)[0]
    assert len(calls) == 2
    for layer in model.encoder.layers:
        layer.attention.map_quantizer = nn.Sequential()  # does nothing either
    torch.testing.assert_close(model(*batch)[0], fused, rtol=0, atol=1e-5)
    assert len(calls) == 2
    # with quantized activations a code may tip over in what follows: so the first context alone
    _, model, _ = prepared(QuantConfig(), tiny_config)
    contexts = [model(*batch, taps)[1]["context"][0] for taps in [("context",), ("context", "map")]]
    torch.testing.assert_close(contexts[0], contexts[1], rtol=0, atol=1e-5)
    assert len(calls) == 4


def assert_on_grid(found, x, bits, low, high):
    """found is x rounded to 2^bits numbers on [low, high] widened to hold 0, in float64."""
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
    [
        {},
        {"per_token": False},
        {"act_range": "static"},
        {"act_range": "learned"},
        {"weight_bits": 32, "act_bits": 32},
    ],
    ids=str,
)
@pytest.mark.parametrize("bits", [8, 4])
def test_what_the_products_inside_attention_read(bits, values, tiny_config, monkeypatch):
    config = QuantConfig(attention_bits=bits, **values)
    _, model, report = prepared(config, tiny_config)
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
    for i in range(2):  # the products read those numbers, and no others
        (_, q), (_, k), (_, v), (probabilities, rounded) = (seen[i, part] for part in PARTS)
        score = q.double() @ k.double().transpose(-2, -1) / math.sqrt(D)
        score = score.masked_fill(~mask[:, None, None, :], -math.inf)
        expected = score.softmax(-1)
        torch.testing.assert_close(probabilities.double(), expected, rtol=0, atol=1e-5)
        assert (rounded[1, :, :, 5:] == 0).all()  # padding stays unseen
        context = rounded.double() @ v.double()
        torch.testing.assert_close(taps["context"][i].double(), context, rtol=0, atol=1e-5)


def calibrated_range(model, batch, layer, part):
    """The smallest and largest number that a quantizer saw in calibration, where no activation is
    quantized.
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
    original, model, _ = prepared(config, tiny_config)
    ids, mask = random_ids([9, 5], tiny_config.vocab_size)
    for both in (original, model.train()):
        set_dropout(both, 0.0)
        both(ids, mask)[0].logsumexp(-1).sum().backward()
    for part in PARTS[:3]:
        name = f"encoder.layers.0.attention.{part}.weight"
        found, expected = model.get_parameter(name).grad, original.get_parameter(name).grad
        assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > least
        assert not torch.equal(found, expected)


# ------------------------------------------------------------------------------------------ files
def test_size_of_a_ternary_student(tiny_config, tokenizer_bytes, tmp_path):
    shape = replace(tiny_config, hidden_size=128, ffn_size=512, vocab_size=2000)
    original, model, _ = prepared(TERNARY, shape)
    payload = student_payload(model, TERNARY, tokenizer_bytes)
    size = save_atomically(payload, str(tmp_path / "student.pt"))
    parameters = dict(original.named_parameters())
    packed = payload["packed"]
    assert len(packed) == 2 * 6 + 1
    codes = 0
    for name, entry in packed.items():
        numbers = parameters[name].numel()
        assert entry["codes"].numel() * entry["codes"].element_size() == numbers // 4
        assert entry["codes"].nbytes * 8 == torch.empty(numbers, dtype=torch.int16).nbytes
        assert entry["scale"].shape == (len(parameters[name]), 1)
        assert entry["scale"].dtype == torch.float32
        codes += entry["codes"].nbytes
    rest = {name: p for name, p in parameters.items() if name not in packed}
    assert payload["tensors"].keys() == rest.keys()
    floats = 4 * sum(p.numel() for p in rest.values())
    scales = 4 * sum(len(parameters[name]) for name in packed)
    content = codes + floats + scales + len(tokenizer_bytes)
    pieces = 2 * len(packed) + len(rest) + 1  # tensors in the archive
    assert content < size < content + 400 * pieces
    assert size == (tmp_path / "student.pt").stat().st_size
    assert 16 * codes == 4 * sum(parameters[name].numel() for name in packed)  # of float32


@pytest.mark.parametrize("at", ["first", "last", "all"])
@pytest.mark.parametrize("name", ["encoder.layers.1.ffn.up", "encoder.embeddings.word"])
def test_codes_that_are_not_ternary_are_refused(name, at, tiny_config, tmp_path):
    """Two bits hold -2 as well."""
    _, model, _ = prepared(TERNARY, tiny_config)
    payload = student_payload(model, TERNARY, b"x")
    entry = payload["packed"][name + ".weight"]
    codes = model.get_submodule(name).weight.new_zeros(entry["shape"]).flatten()
    path = str(tmp_path / "student.pt")
    for wrong in (False, True):
        if wrong:
            codes[{"first": 0, "last": -1, "all": slice(None)}[at]] = -2
        entry["codes"] = pack(codes, 2)
        torch.save(payload, path)
        if not wrong:
            assert not read_student(path).weights[name + ".weight"].codes.any()
            continue
        with pytest.raises(UserError) as error:
            read_student(path)
        assert f"{name}.weight leaves the grid" in str(error.value)
        assert "\n" not in str(error.value)


def test_a_ternary_file_names_two_bits(tiny_config, tmp_path):
    _, model, _ = prepared(TERNARY, tiny_config)
    payload = student_payload(model, TERNARY, b"x")
    payload["quant"]["weight_bits"] = 4
    torch.save(payload, tmp_path / "student.pt")
    with pytest.raises(UserError) as error:
        read_student(str(tmp_path / "student.pt"))
    assert "ternary weights have 2 bits, not 4" in str(error.value)


# ------------------------------------------------------------------------------------ BERT's pooler
@pytest.fixture
def pooled(tiny_config, tmp_path):
    """A checkpoint with a pooler, of BERT's form, from its file."""
    values = {"position_offset": 0, "type_vocab_size": 2, "pad_id": 0, "num_labels": 0}
    model = build_model(replace(tiny_config, head="pooler", **values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)  # biases are not 0 then
    save_atomically(checkpoint_payload(model, b"x"), str(tmp_path / "bert.pt"))
    return load_checkpoint(str(tmp_path / "bert.pt"))


def test_pooler_by_hand(pooled, tiny_config):
    ids, mask = random_ids([9, 5], tiny_config.vocab_size)
    types = torch.randint(0, 2, ids.shape)
    found, taps = pooled(ids, mask, ("hidden",), types=types)
    first = taps["hidden"][-1][:, 0].detach().double()
    dense = pooled.head.dense
    assert set(pooled.head.state_dict()) == {"dense.weight", "dense.bias"}
    expected = torch.tanh(first @ dense.weight.double().t() + dense.bias.double())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    assert found.shape == (2, 32) and not torch.equal(found, pooled(ids, mask)[0])


def test_a_sequence_head_starts_from_the_pooler(pooled, tiny_config):
    before = copy.deepcopy(pooled.head.state_dict())
    model = with_head(pooled, "sequence", 3).eval()
    assert (model.config.head, model.config.num_labels) == ("sequence", 3)
    assert model.encoder is pooled.encoder
    for name in ("weight", "bias"):
        found, original = getattr(model.head.dense, name), getattr(pooled.head.dense, name)
        assert torch.equal(found, original) and found.any()
        assert found is not original and found.data_ptr() != original.data_ptr()
    ids, mask = random_ids([9, 5], tiny_config.vocab_size)
    with torch.no_grad():
        logits, pooler = model(ids, mask)[0], pooled(ids, mask)[0]
        torch.testing.assert_close(logits, model.head.out_proj(pooler))
        for parameter in model.head.parameters():
            parameter.add_(1.0)
    for name, tensor in pooled.head.state_dict().items():
        assert torch.equal(tensor, before[name])
    with pytest.raises(UserError, match="needs num_labels"):
        with_head(pooled, "sequence", 0)


def test_other_heads_start_afresh(pooled, tiny_config):
    mlm = build_model(replace(tiny_config, head="mlm", num_labels=0))
    joint = with_head(pooled, "joint", 3, 5).head
    for dense in (with_head(mlm, "sequence", 3).head.dense, joint.dense, joint.intent.dense):
        assert not dense.bias.any() and 0.018 < dense.weight.std() < 0.022

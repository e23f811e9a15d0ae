"""quant.py against brute force in float64, PyTorch's own kernels, and finite reasoning about
gradients.
"""

import copy

import pytest
import torch
from conftest import DEVICES, random_ids
from torch import nn

import quant
from data import UserError
from model import build_model, set_dropout
from prepare import calibrate, prepare
from quant import (
    ActQuantizer,
    MinMax,
    MovingAverage,
    MSESearch,
    QuantConfig,
    QuantLinear,
    WeightQuantizer,
    best_clip,
    choose_qparams,
    dequantize,
    fake_quantize,
    min_max,
    noise_mask,
    quant_range,
    quantize,
    random_mask,
)

BITS = range(2, 9)


def qparams(x, bits, symmetric, per_row):
    low, high = quant_range(bits, symmetric)
    return *choose_qparams(*min_max(x, per_row), low, high, symmetric), low, high


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


# --------------------------------------------------------------------------------------- the grid
def test_ranges():
    for bits in BITS:
        low, high = quant_range(bits, True)
        assert low == -high and high - low + 1 == 2**bits - 1
        assert quant_range(bits, False) == (0, 2**bits - 1)
    for bits in (1, 9, 32):
        with pytest.raises(UserError, match="choose from 2 to 8"):
            quant_range(bits, True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_fake_quantize_is_dequantize_quantize_bit_for_bit(bits, symmetric, per_row, device):
    x = (torch.randn(64, 48) * torch.logspace(-3, 3, 64)[:, None]).to(device)
    for shift in (0.0, 5.0, -5.0):
        scale, zero, low, high = qparams(x + shift, bits, symmetric, per_row)
        for values in (x + shift, 3 * x, torch.zeros_like(x), -torch.zeros_like(x)):
            codes = quantize(values, scale, zero, low, high)
            assert torch.equal(codes, codes.round()) and codes.min() >= low and codes.max() <= high
            expected = dequantize(codes, scale, zero)
            assert same_bits(fake_quantize(values, scale, zero, low, high), expected)
        covered = fake_quantize(x + shift, scale, zero, low, high, clips=False)
        assert same_bits(covered, fake_quantize(x + shift, scale, zero, low, high))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_nearest_grid_point_by_brute_force(bits, symmetric):
    """In float64, over all grid points: no other is closer than the one chosen."""
    x = torch.randn(300) * 2 + (0 if symmetric else 1.5)
    scale, zero, low, high = qparams(x, bits, symmetric, False)
    grid = (torch.arange(low, high + 1, dtype=torch.float64) - zero.double()) * scale.double()
    wide = torch.cat([x, 2 * x])  # values beyond the range must land on its ends
    distance = (wide.double()[:, None] - grid).abs()
    chosen = (fake_quantize(wide, scale, zero, low, high).double() - wide.double()).abs()
    assert (chosen <= distance.min(dim=1).values + 1e-4 * scale.double()).all()
    inside = chosen[: len(x)]
    assert inside.max() <= 0.5001 * scale  # the range was taken from x: nothing is clipped


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_equals_pytorch_kernels(bits):
    x = torch.randn(32, 100) * 3 + 1
    scale, zero, low, high = qparams(x, bits, False, False)
    theirs = torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero), low, high)
    # PyTorch multiplies by 1/scale; only values that land within rounding of a tie may differ
    close = ((x / scale).frac().abs() - 0.5).abs() > 1e-4
    torch.testing.assert_close(fake_quantize(x, scale, zero, low, high)[close], theirs[close])
    scale, zero, low, high = qparams(x, bits, True, True)
    theirs = torch.fake_quantize_per_channel_affine(x, scale[:, 0], zero[:, 0].int(), 0, low, high)
    close = ((x / scale).frac().abs() - 0.5).abs() > 1e-4
    torch.testing.assert_close(fake_quantize(x, scale, zero, low, high)[close], theirs[close])
    assert close.float().mean() > 0.99


def test_qparams_equal_torch_ao():
    """The formulas of torch.ao's MinMaxObserver, written out; it widens the range to hold 0 as
    well.
    """
    for low, high in ((-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (0.0, 0.0), (-1e-9, 1e-9)):
        x_min, x_max = torch.tensor(low), torch.tensor(high)
        scale, zero = choose_qparams(x_min, x_max, 0, 255, False)
        wide = max(high, 0.0) - min(low, 0.0)
        assert float(scale) == pytest.approx(max(wide / 255, 1e-12), rel=1e-6)
        assert 0 <= float(zero) <= 255 and float(zero) == round(float(zero))
        if wide:
            assert float(zero) == round(-min(low, 0.0) / (wide / 255))
        scale, zero = choose_qparams(x_min, x_max, -127, 127, True)
        assert float(scale) == pytest.approx(max(abs(low), abs(high), 127e-12) / 127, rel=1e-6)
        assert float(zero) == 0


def test_zero_is_exact():
    for low, high in ((0.3, 2.0), (-2.0, -0.3), (-1.1, 2.3)):
        scale, zero = choose_qparams(torch.tensor(low), torch.tensor(high), 0, 255, False)
        assert fake_quantize(torch.zeros(1), scale, zero, 0, 255).item() == 0.0


# -------------------------------------------------------------------------------------- gradients
def test_gradient_passes_inside_and_stops_outside():
    x = torch.tensor([-9.0, -2.1, 0.26, 1.5, 1.74, 1.8, 9.0], requires_grad=True)
    out = fake_quantize(x, torch.tensor(0.5), torch.tensor(0.0), -4, 3)
    torch.testing.assert_close(out, torch.tensor([-2.0, -2.0, 0.5, 1.5, 1.5, 1.5, 1.5]))
    out.backward(torch.arange(1.0, 8.0))
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 0, 0]


def test_gradient_equals_pytorch_kernel():
    x = torch.randn(50, 20)
    weight = torch.randn(50, 20)
    scale, zero = torch.tensor(0.02), torch.tensor(100.0)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    fake_quantize(ours, scale, zero, 0, 255).backward(weight)
    torch.fake_quantize_per_tensor_affine(theirs, 0.02, 100, 0, 255).backward(weight)
    assert (ours.grad == theirs.grad).float().mean() > 0.999 and (ours.grad == 0).any()


def test_noise_leaves_the_rest_exact_with_exact_gradient():
    x = (3 * torch.randn(40, 64)).requires_grad_()
    where = random_mask(x.shape, 0.4, x.device)
    scale, zero = torch.tensor(0.7), torch.tensor(0.0)
    out = fake_quantize(x, scale, zero, -3, 3, where=where)
    assert same_bits(out[~where].detach(), x[~where].detach())
    full = fake_quantize(x.detach(), scale, zero, -3, 3)
    assert same_bits(out[where].detach(), full[where])
    out.sum().backward()
    clipped = (x.detach() / scale).round().abs() > 3
    assert clipped[where].any() and clipped[~where].any()
    assert torch.equal(x.grad, (~(clipped & where)).float())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9, 0.9999])
def test_random_mask_has_its_probability(p, device):
    n = 1_000_000
    mask = random_mask(torch.Size((n // 10 + 1, 10)), p, torch.device(device))
    deviation = (n * p * (1 - p)) ** 0.5 / n
    assert abs(mask.float().mean().item() - p) < 5 * deviation + 1 / 65536
    # neighbours are independent: as many pairs as chance gives
    flat = mask.flatten()
    for distance in (1, 2, 3, 4, 7):
        both = (flat[:-distance] & flat[distance:]).float().mean().item()
        assert abs(both - p * p) < 6 * (p * p / n) ** 0.5 + 2 / 65536


def test_noise_in_blocks():
    weight = torch.zeros(200, 50)
    mask = noise_mask(weight, 0.3, 8)
    assert mask.shape == weight.shape
    for start in range(0, 50, 8):
        block = mask[:, start : start + 8]
        assert (block.all(dim=1) | ~block.any(dim=1)).all()
    assert abs(mask.float().mean() - 0.3) < 0.06


# ----------------------------------------------------------------------------------------- ranges
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
def test_best_clip_by_brute_force(bits, symmetric, per_row):
    x = torch.randn(6, 400)
    x[:, 0] *= 8  # outliers
    low, high = quant_range(bits, symmetric)
    clip = best_clip(x, low, high, symmetric, per_row)

    def error(factor):
        a, b = min_max(x, per_row)
        scale, zero = choose_qparams(a * factor, b * factor, low, high, symmetric)
        squares = (dequantize(quantize(x, scale, zero, low, high), scale, zero) - x).square()
        return squares.sum(-1, keepdim=True) if per_row else squares.sum()

    every = torch.stack([error(torch.tensor(p / 100)) for p in range(10, 101, 2)])
    torch.testing.assert_close(error(clip), every.min(dim=0).values)
    if bits <= 3:
        assert (error(clip) < 0.9 * error(torch.tensor(1.0))).all()


def test_one_clip_factor_for_all_rows(tiny_config):
    """The table's factor shrinks every row's own range; it is the best common one."""
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


def test_observers():
    batches = [torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 1.0]), torch.tensor([0.0, 5.0])]
    seen, average, search = MinMax(), MovingAverage(), MSESearch()
    for batch in batches:
        for observer in (seen, average, search):
            observer.observe(batch)
    assert [float(v) for v in seen.range(0, 255, False)] == [-3.0, 5.0]
    low, high = -1.0, 2.0
    for a, b in ((-3.0, 1.0), (0.0, 5.0)):
        low, high = 0.9 * low + 0.1 * a, 0.9 * high + 0.1 * b
    assert [float(v) for v in average.range(0, 255, False)] == pytest.approx([low, high])
    low, high = search.range(0, 255, False)
    assert -3.0 <= low and high <= 5.0


def test_mse_observer_clips_outliers():
    observer = MSESearch()
    for _ in range(8):
        x = torch.randn(1000)
        x[0] = 12.0
        observer.observe(x)
    assert observer.range(0, 3, False)[1] < 8


# ---------------------------------------------------------------------------------------- a model
def prepared(config, tiny_config, head="sequence"):
    model = build_model(tiny_config).eval()
    original = copy.deepcopy(model)
    report = prepare(model, config)
    return original, model, report


def test_prepare_reports_what_it_did(tiny_config):
    original, model, report = prepared(QuantConfig(), tiny_config)
    layers = [f"encoder.layers.{i}." for i in range(2)]
    names = [f"attention.{n}" for n in ("query", "key", "value", "output")] + ["ffn.up", "ffn.down"]
    expected = {f"{layer}{name}.weight" for layer in layers for name in names}
    assert set(report.replaced) == expected | {"encoder.embeddings.word.weight"}
    assert report.act_quantizers == 2 * 4  # query, key and value share one
    everything = {name: p.numel() for name, p in original.named_parameters()}
    assert report.replaced | report.kept == everything
    assert "head.dense.weight" in report.kept and "encoder.layers.0.ffn.up.bias" in report.kept
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name])
    assert "quantized" in str(report)
    with pytest.raises(UserError, match="already prepared"):
        prepare(model, QuantConfig())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_prepared_model_equals_explicit_arithmetic(bits, per_channel, device, tiny_config):
    """The whole prepared model against the float32 model whose weights and inputs were quantized
    from outside.
    """
    config = QuantConfig(
        weight_bits=bits, act_bits=bits, per_channel=per_channel, per_token=per_channel, grid="full"
    )
    original, model, _ = prepared(config, tiny_config)
    for both in (original, model):  # random starts give logits near 0
        with torch.no_grad():
            for parameter in both.parameters():
                parameter.mul_(3)
    original, model = original.to(device), model.to(device)

    def on_grid(x, symmetric, per_row):
        scale, zero, low, high = qparams(x, bits, symmetric, per_row)
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
        # training computes in this very order; a code may tip over in the integers' own
        set_dropout(model, 0.0)
        trained, _ = model.train()(ids, mask)
    torch.testing.assert_close(trained, expected, atol=1e-5, rtol=1e-5)
    assert (found - expected).abs().max() <= 0.05 * expected.std()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_evaluation_multiplies_integers(bits, per_row, device):
    """One layer in evaluation against the same arithmetic in int64, and against training."""
    config = QuantConfig(weight_bits=bits, per_channel=per_row, per_token=per_row)
    linear = nn.Linear(300, 40)
    weight = WeightQuantizer(config, per_row, multiplied=True)
    layer = QuantLinear(linear, ActQuantizer(config), weight).to(device)
    x = (torch.randn(2, 7, 300) * torch.logspace(-1, 1, 300)).to(device)
    trained = layer.train()(x)
    found = layer.eval()(x)
    torch.testing.assert_close(found, trained, atol=1e-4, rtol=1e-4)
    act = layer.act_quantizer(x)
    codes, scale = weight.codes(layer.weight)
    sums = (act.values - act.zero_point).long().cpu() @ codes.long().cpu().t()
    scales = (act.scale * scale.flatten()).double().cpu()
    expected = sums * scales + linear.bias.double().cpu()
    torch.testing.assert_close(found.double().cpu(), expected, atol=1e-5, rtol=1e-6)
    layer.act_quantizer.returns_codes = False  # as with float32 weights
    assert not isinstance(layer.act_quantizer(x), quant.Codes)


def test_bits_32_leaves_alone(tiny_config):
    ids, mask = random_ids([7, 5], tiny_config.vocab_size)
    original, model, report = prepared(QuantConfig(weight_bits=32, act_bits=32), tiny_config)
    assert not report.replaced and not report.act_quantizers
    assert torch.equal(original(ids, mask)[0], model(ids, mask)[0])
    _, model, report = prepared(QuantConfig(weight_bits=32), tiny_config)
    assert not report.replaced and report.act_quantizers == 8
    _, model, report = prepared(QuantConfig(act_bits=32), tiny_config)
    assert len(report.replaced) == 13 and not report.act_quantizers


def test_more_bits_less_error(tiny_config):
    ids, mask = random_ids([9, 6], tiny_config.vocab_size)
    errors = []
    for bits in BITS:
        torch.manual_seed(0)
        original, model, _ = prepared(QuantConfig(weight_bits=bits, act_bits=8), tiny_config)
        with torch.no_grad():
            errors.append(float((original(ids, mask)[0] - model(ids, mask)[0]).abs().mean()))
    assert errors[-1] < errors[2] < errors[0] and errors[-1] < 0.05 * errors[0]


def test_dynamic_per_token_does_not_depend_on_the_batch(tiny_config):
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
    quant_module = model.encoder.layers[0].ffn.up.weight_quantizer
    weight = model.encoder.layers[0].ffn.up.weight
    quant_module.train()
    share = (quant_module(weight) != weight).float().mean()
    assert 0.4 < share < 0.6
    quant_module.noise = 0.0
    assert quant_module(weight) is weight


def test_every_parameter_learns(tiny_config):
    _, model, _ = prepared(QuantConfig(weight_bits=4, noise=0.5), tiny_config)
    ids, mask = random_ids([9, 5], tiny_config.vocab_size)
    model.train()(ids, mask)[0].logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        if name.endswith("key.bias"):  # adds a constant to each row of scores: softmax cancels it
            continue
        grad = parameter.grad
        assert grad is not None and (grad.coalesce().values() if grad.is_sparse else grad).any(), (
            name
        )


def test_static_ranges(tiny_config):
    original, model, _ = prepared(QuantConfig(act_range="static"), tiny_config)
    batches = [random_ids([9, 9, 9], tiny_config.vocab_size) for _ in range(6)]
    assert model(*batches[0])[0].isnan().all()  # not calibrated: no silent nonsense
    calibrate(model, batches, "minmax")
    for module in model.modules():
        if isinstance(module, ActQuantizer):
            assert module.observer is None and module.scale > 0
    error = (model(*batches[0])[0] - original(*batches[0])[0]).abs().max()
    assert error < 0.1 * original(*batches[0])[0].abs().max() + 0.02
    # the range of the first quantizer is that of the embeddings' output
    outputs = [original(*batch, ("hidden",))[1]["hidden"][0] for batch in batches]
    _, quantized, _ = prepared(QuantConfig(act_bits=32), tiny_config)
    quantized.load_state_dict(original.state_dict(), strict=False)
    outputs = [quantized(*batch, ("hidden",))[1]["hidden"][0] for batch in batches]
    low, high = min(o.min() for o in outputs), max(o.max() for o in outputs)
    first = model.encoder.layers[0].attention.input_quantizer
    scale, zero = choose_qparams(low, high, 0, 255, False)
    torch.testing.assert_close((first.scale, first.zero_point), (scale, zero))


def test_clipped_weights_beat_min_max_at_2_bits():
    linear = nn.Linear(256, 64)
    nn.init.normal_(linear.weight)
    errors = {}
    for kind in ("minmax", "mse"):
        quantizer = WeightQuantizer(QuantConfig(weight_bits=2, weight_range=kind), True, True)
        if kind == "mse":
            quantizer.search_clip(linear.weight)
        with torch.no_grad():
            errors[kind] = float((quantizer(linear.weight) - linear.weight).square().mean())
    assert errors["mse"] < 0.5 * errors["minmax"]


def test_part_of_an_attention_cannot_be_kept(tiny_config):
    with pytest.raises(UserError, match="keep all of encoder.layers.0.attention"):
        prepared(QuantConfig(keep=("head", "encoder.layers.0.attention.key")), tiny_config)
    _, _, report = prepared(QuantConfig(keep=("head", "encoder.layers.0.attention")), tiny_config)
    assert report.act_quantizers == 4 + 2


def test_quant_linear_keeps_its_parameters():
    linear = nn.Linear(4, 3)
    quantized = QuantLinear(linear, nn.Identity(), nn.Identity())
    assert quantized.weight is linear.weight and quantized.bias is linear.bias
    x = torch.randn(2, 4)
    assert torch.equal(quantized(x), linear(x))


def test_config_refuses_nonsense():
    for values, message in (
        ({"weight_bits": 1}, "weight_bits is 1"),
        ({"act_bits": 16}, "act_bits is 16"),
        ({"noise": 1.5}, "noise is 1.5"),
        ({"noise_block": 0}, "noise block is 0"),
        ({"observer": "best"}, "observer is 'best'"),
        ({"act_range": "fixed"}, "act_range is 'fixed'"),
        ({"attention_bits": 1}, "attention_bits is 1"),
        ({"attention_bits": 9}, "attention_bits is 9"),
        ({"weights": "binary"}, "weights is 'binary'"),
        ({"weights": "ternary"}, "ternary weights have 2 bits, not 8"),
        ({"weights": "ternary", "weight_bits": 4}, "ternary weights have 2 bits, not 4"),
        ({"weight_range": "lsq"}, "it needs weights lsq"),
        ({"weight_range": "lsq", "weights": "ternary", "weight_bits": 2}, "a range of their own"),
        ({"weight_range": "mse", "weights": "ternary", "weight_bits": 2}, "a range of their own"),
        ({"weight_clip": 1.0, "weights": "lsq"}, "leave weight clip at 0"),
        ({"weight_clip": -0.1}, "weight clip is -0.1"),
        ({"weight_clip": float("nan")}, "weight clip is nan"),
        ({"weight_clip": float("inf")}, "weight clip is inf"),
    ):
        with pytest.raises(UserError, match=message):
            QuantConfig(**values)
    QuantConfig(weight_bits=2, weights="ternary", weight_clip=0.1, attention_bits=2)
    QuantConfig(weights="lsq", weight_range="lsq", act_range="learned", attention_bits=8)


def test_docstring_examples():
    import doctest

    assert doctest.testmod(quant, extraglobs={"torch": torch}).failed == 0

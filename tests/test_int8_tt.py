"""Integer models of tensor trains (int8.py, packed.py)."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import random_ids
from test_int8 import KERNEL_NAMES

from checkpoint import save_atomically
from data import UserError
from int8 import (
    IntLinear,
    IntSharedAttention,
    IntTTLinear,
    MergedTable,
    convert,
    integer_model,
    is_exact,
    load_integer,
)
from learned import LearnedScale
from model import build_model
from packed import (
    bytes_on_disk,
    default_keep,
    float_model,
    load_student,
    read_student,
    student_payload,
    unpack,
)
from prepare import calibrate, prepare
from quant import QuantConfig
from tt import TensorTrain, TTConfig

TRAINS = TTConfig(rank=4, embedding_rank=5, modes=2, table_modes=3, keep=())
RANGES = [
    {},
    {"per_channel": False, "per_token": False},
    {"act_range": "static"},
]
TRAIN_CONFIGS = [{"weight_bits": bits, **ranges} for bits in (8, 4, 2) for ranges in RANGES]
TRAIN_CONFIGS += [
    {"grid": "full", "act_range": "static"},
    {"act_range": "static", "act_bits": 6, "observer": "moving-average"},
    {"weight_range": "mse", "weight_bits": 2, "keep": ("encoder.embeddings",)},
]


def student_of_trains(tiny_config, tt=TRAINS, **values):
    """Larger cores than at the start, and scales that clip some of them, as after training."""
    shape = replace(tiny_config, num_layers=1, head="joint", num_slots=5, tt=tt)
    model = build_model(shape).eval()
    config = QuantConfig(**{"keep": default_keep(model.config.tt), **values})
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, TensorTrain):
                module.reset_parameters(std=0.1)
            elif isinstance(module, torch.nn.Linear):
                module.weight.mul_(5)
        prepare(model, config)
        for module in model.modules():
            if isinstance(module, LearnedScale):
                module.log_scale -= 0.6
    if config.act_range == "static":
        calibrate(model, [random_ids([9, 9], tiny_config.vocab_size)], config.observer)
    return model, config


def same_logits(found, expected):
    """Of both halves of a joint head: the same bits, not only the same numbers."""
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("values", TRAIN_CONFIGS, ids=str)
def test_logits_of_tensor_trains_bit_for_bit(
    values, tiny_config, tokenizer_bytes, tmp_path, monkeypatch
):
    """The student, the student from its file, and the integers of both, whatever the kernel."""
    model, config = student_of_trains(tiny_config, **values)
    ids, mask = random_ids([9, 5, 1], tiny_config.vocab_size)
    with torch.no_grad():
        expected, _ = model(ids, mask)
        single, _ = model(ids[:1, :1])
    path = str(tmp_path / "student.pt")
    payload = student_payload(model, config, tokenizer_bytes, task="atis")
    size = save_atomically(payload, path)
    assert abs(bytes_on_disk(payload) - size) < 0.1 * size  # names inside the archive differ
    read = read_student(path)
    assert read.config == model.config and read.quant == config
    again = float_model(read)
    with torch.no_grad():
        assert same_logits(again(ids, mask)[0], expected)
    assert expected[0].shape == (3, 3) and expected[1].shape == (3, 9, 5)
    assert all(logits.std() > 1e-4 for logits in expected)
    monkeypatch.setattr("int8.float_model", lambda read: copy.deepcopy(again))  # made once
    for kernel in KERNEL_NAMES:
        if kernel == "onednn" and config.grid == "full" and not is_exact("onednn", 127):
            continue  # this CPU clips full-range products: choose_kernel takes another kernel
        found = integer_model(read, kernel=kernel)
        logits, taps = found(ids, mask, ("context", "hidden"))
        assert same_logits(logits, expected), kernel
        assert len(taps["context"]) == 1
    assert same_logits(integer_model(read)(ids, mask)[0], expected)  # the kernel it chooses
    for one, other in zip(found(ids[:1, :1])[0], single, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("values", [{"weight_bits": 32}, {"act_bits": 32}], ids=str)
def test_float_halves_of_tensor_trains(values, tiny_config, tokenizer_bytes, tmp_path):
    model, config = student_of_trains(tiny_config, **values)
    path = str(tmp_path / "student.pt")
    save_atomically(student_payload(model, config, tokenizer_bytes), path)
    ids, mask = random_ids([9, 4], tiny_config.vocab_size)
    with torch.no_grad():
        assert same_logits(load_student(path)[0](ids, mask)[0], model(ids, mask)[0])
    with pytest.raises(UserError, match="quantized weights and activations"):
        load_integer(path)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_packed_cores_reach_the_ends_of_their_grid(bits, tiny_config):
    model, config = student_of_trains(tiny_config, weight_bits=bits)
    packed = student_payload(model, config, b"x")["packed"]
    cores = {name: entry for name, entry in packed.items() if ".cores." in name}
    assert len(cores) == 2 * 3 + 9 * 4 and len(packed) == len(cores) + 1
    extremes = set()
    for name, entry in cores.items():
        core = model.get_parameter(name)
        assert entry["shape"] == list(core.shape) and entry["scale"].shape == ()
        assert len(entry["codes"]) == -(-core.numel() * bits // 8)
        codes = unpack(entry["codes"], bits, core.numel())
        by_hand = (core.detach() / entry["scale"]).round()
        by_hand = by_hand.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        assert torch.equal(codes.float(), by_hand.flatten())
        extremes |= {int(codes.min()), int(codes.max())}
    assert min(extremes) == -(2 ** (bits - 1)) and max(extremes) == 2 ** (bits - 1) - 1


def test_size_of_packed_tensor_trains(tiny_config, tokenizer_bytes, tmp_path):
    sizes = {}
    for bits in (8, 4, 2):
        shape = replace(tiny_config, hidden_size=64, ffn_size=128)
        model, config = student_of_trains(shape, TTConfig(8, 12), weight_bits=bits)
        payload = student_payload(model, config, tokenizer_bytes)
        sizes[bits] = save_atomically(payload, str(tmp_path / "student.pt"))
        replaced = [p for n, p in model.named_parameters() if n in payload["packed"]]
        names = {n for n, _ in model.named_parameters() if "log_scale" not in n}
        floats = [model.get_parameter(n) for n in names - set(payload["packed"])]
        scales = sum(entry["scale"].numel() for entry in payload["packed"].values())
        content = sum(-(-p.numel() * bits // 8) for p in replaced) + 4 * scales
        content += 4 * sum(p.numel() for p in floats) + len(tokenizer_bytes)
        pieces = 2 * len(replaced) + len(floats) + 1  # tensors in the archive
        assert content < sizes[bits] < content + 500 * pieces
        assert not any("log_scale" in name for name in payload["tensors"])
    numbers = sum(p.numel() for p in replaced)
    assert sizes[8] - sizes[4] == pytest.approx(numbers * 4 / 8, rel=0.1)
    assert sizes[4] - sizes[2] == pytest.approx(numbers * 2 / 8, rel=0.2)


def damaged_cores(payload):
    name = "encoder.layers.0.ffn.up.cores.1"
    entry = payload["packed"][name]

    def packed(**values):
        return {**payload, "packed": {**payload["packed"], name: {**entry, **values}}}

    def without(kind, name):
        return {**payload, kind: {k: v for k, v in payload[kind].items() if k != name}}

    flat = entry["shape"][0] * entry["shape"][1], entry["shape"][2]
    moved = {**payload["packed"], "encoder.layers.0.ffn.up.cores.4": entry}
    rank = {**payload["config"], "tt": {**payload["config"]["tt"], "rank": 3}}
    return {
        "short": (packed(codes=entry["codes"][:-1]), "does not have the shape"),
        "type": (packed(codes=entry["codes"].float()), "does not have the shape"),
        "shape": (packed(shape=list(flat)), "does not have the shape"),
        "a scale a row": (packed(scale=torch.ones(4, 1)), "does not have the shape"),
        "scale in float64": (packed(scale=torch.ones((), dtype=float)), "does not have the shape"),
        "missing": (without("packed", name), f"packed tensor {name} is missing"),
        "missing of a table": (
            without("packed", "encoder.embeddings.word.cores.0"),
            "packed tensor encoder.embeddings.word.cores.0 is missing",
        ),
        "one too many": ({**payload, "packed": moved}, "cores.4 has no place in the model"),
        "other ranks": ({**payload, "config": rank}, "does not have the shape"),
        "no trains": (
            {**payload, "config": {**payload["config"], "tt": None}},
            "has no place in the model",
        ),
        "log scale": (
            {**payload, "tensors": {**payload["tensors"], "x.log_scale": torch.ones(())}},
            "unexpected tensor x.log_scale",
        ),
    }


def test_tampered_cores_are_refused(tiny_config, tokenizer_bytes, tmp_path):
    model, config = student_of_trains(tiny_config, weight_bits=4)
    path = str(tmp_path / "student.pt")
    payload = student_payload(model, config, tokenizer_bytes)
    for kind, (changed, message) in damaged_cores(payload).items():
        torch.save(changed, path)
        with pytest.raises(UserError) as error:
            read_student(path)
        assert message in str(error.value) and "\n" not in str(error.value), kind
    torch.save(payload, path)
    read_student(path)


def test_integer_model_of_tensor_trains_holds_integers(tiny_config):
    model, config = student_of_trains(tiny_config)
    found = convert(model, config, kernel="reference")
    assert not any("cores" in name for name, _ in found.named_parameters())
    assert isinstance(found.encoder.layers[0].attention, IntSharedAttention)
    up = found.encoder.layers[0].ffn.up
    assert isinstance(up, IntTTLinear)
    assert up.A.kernel.weight.shape == (4, 32) and up.B.kernel.weight.shape == (64, 4)
    for half in (up.A, up.B):
        assert torch.equal(half.kernel.weight, half.kernel.weight.round())
        assert half.kernel.weight.abs().amax(dim=1).eq(64).all()  # a scale a row, of 8 bits
    assert isinstance(found.head.dense, IntTTLinear)
    assert isinstance(found.head.intent.out_proj, IntLinear)
    words = found.encoder.embeddings.word
    assert isinstance(words, MergedTable)
    assert isinstance(found.encoder.embeddings.position, MergedTable)
    assert words.left.shape == (8, 2, 5) and words.right.shape == (56, 5, 16)
    every = torch.arange(tiny_config.vocab_size)
    assert torch.equal(words(every), model.encoder.embeddings.word(every))
    with pytest.raises(IndexError, match="table of 442 rows"):
        found(torch.tensor([[tiny_config.vocab_size]]))
    assert not any(p.requires_grad for p in found.parameters()) and not found.training


def test_one_product_for_what_query_key_and_value_read(tiny_config, monkeypatch):
    """Their input is rounded to integers once."""
    import int8

    model, config = student_of_trains(tiny_config)
    found = convert(model, config)
    rounded, codes_of = [], int8.activation_codes
    monkeypatch.setattr(int8, "activation_codes", lambda q, x: rounded.append(q) or codes_of(q, x))
    found.encoder(*random_ids([9, 5], tiny_config.vocab_size), None, {}, None)
    # one for the three, one in the middle of each, and two for each of the other three layers
    assert len(rounded) == 1 + 3 + 3 * 2
    assert rounded[0] is found.encoder.layers[0].attention.query.act_quantizer


@pytest.mark.parametrize("values", [{}, {"act_range": "static"}], ids=str)
def test_static_tensor_trains_stay_in_8_bits(values, tiny_config):
    model, config = student_of_trains(tiny_config, **values)
    found = convert(model, config, kernel="onednn")
    ids, mask = random_ids([9, 5], tiny_config.vocab_size)
    x = model(ids, mask, ("hidden",))[1]["hidden"][0]
    layer = found.encoder.layers[0]
    inner = layer.ffn.up.middle(x)
    if values:
        assert inner.values.dtype == torch.uint8 and layer.ffn.expand(x).values.dtype == torch.uint8
    else:
        assert inner.dtype == torch.float32 and layer.ffn.expand(x).dtype == torch.float32


@pytest.mark.parametrize("values", [{}, {"per_token": False}], ids=str)
def test_pieces_of_a_feed_forward_step_of_tensor_trains(values, tiny_config, monkeypatch):
    monkeypatch.setattr("int8.IntFeedForward.PIECE", 8)
    model, config = student_of_trains(tiny_config, **values)
    ids, mask = random_ids([9, 5, 1], tiny_config.vocab_size)
    found = convert(model, config)
    assert found.encoder.layers[0].ffn.in_pieces == (values == {})
    assert same_logits(found(ids, mask)[0], model(ids, mask)[0])


@pytest.mark.parametrize("kept", ["head", "encoder.layers.0", "encoder.embeddings"])
def test_layers_that_are_no_trains_are_multiplied_too(kept, tiny_config, tokenizer_bytes, tmp_path):
    """TTConfig.keep: dense, but quantized like all others."""
    trains = TTConfig(4, 5, modes=3, keep=(kept,))
    model, config = student_of_trains(tiny_config, trains, weight_bits=4)
    path = str(tmp_path / "student.pt")
    save_atomically(student_payload(model, config, tokenizer_bytes), path)
    ids, mask = random_ids([9, 5], tiny_config.vocab_size)
    expected = model(ids, mask)[0]
    read = read_student(path)
    assert read.config.tt.keep == (kept,)
    assert same_logits(float_model(read)(ids, mask)[0], expected)
    found = integer_model(read)
    assert same_logits(found(ids, mask)[0], expected)
    up, dense = found.encoder.layers[0].ffn.up, found.head.dense
    assert type(up) is (IntLinear if kept == "encoder.layers.0" else IntTTLinear)
    assert type(dense) is (IntLinear if kept == "head" else IntTTLinear)


@pytest.mark.parametrize("keep", ["encoder.layers.0.ffn", "encoder.layers", "encoder"])
def test_kept_tensor_trains_have_no_integers(keep, tiny_config):
    model, config = student_of_trains(tiny_config, keep=("head", keep))
    model(*random_ids([9, 4], tiny_config.vocab_size))
    with pytest.raises(UserError, match="every Linear layer of the encoder"):
        convert(model, config)

"""int8.py: exact integer kernels, and integer models that give the same bits as their students."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import DEVICES, random_ids
from test_checkpoint import make_bert_student, make_student, make_train_student

import int8
from checkpoint import float_model, load_student, read_student, save_atomically, student_payload
from int8 import (
    KERNELS,
    FloatKernel,
    IntAttention,
    IntLinear,
    IntTTLinear,
    MergedTable,
    choose_kernel,
    integer_model,
    is_exact,
    to_integer,
)
from kit.common import UserError
from prepare import WEIGHTS
from quant import ActQuantizer, QuantConfig
from tools.backends import has_compiler
from tt import TTConfig

# ---------------------------------------------------------------------------------------- kernels
# "cuda" runs here, too: CPUs have torch._int_mm, though a slow one.
KERNEL_NAMES = list(KERNELS)


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
@pytest.mark.parametrize("shape", [(1, 8, 8), (5, 30, 7), (17, 64, 33), (40, 768, 96), (3, 3072, 24)])
def test_sums_against_int64(kernel, shape):
    M, K, N = shape
    values = torch.randint(0, 256, (M, K), dtype=torch.uint8)
    weight = torch.randint(-64, 65, (N, K), dtype=torch.int8)
    found = KERNELS[kernel](weight)
    sums = found.sums(values)
    expected = (values.long() - found.offset) @ weight.long().t()
    assert torch.equal(sums.double(), expected.double())
    assert sums.dtype == torch.float32 and sums.shape == (M, N)


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("values", [{}, {"per_token": False}, {"act_range": "static"}], ids=str)
@pytest.mark.parametrize("bits", [2, 7, 8])
@pytest.mark.parametrize("device", DEVICES)
def test_activation_codes_are_the_students(device, values, bits, one_pass, monkeypatch):
    """To the bit: also of ties, of numbers beyond the range, and of a tensor that is a view."""
    if one_pass and not int8.quantizes_in_one_pass():
        pytest.skip("this PyTorch has no operator for it")
    monkeypatch.setattr(int8, "quantizes_in_one_pass", lambda: one_pass)
    quantizer = ActQuantizer(QuantConfig(act_bits=bits, **values)).to(device)
    x = 3 * torch.randn(7, 1000, device=device)
    if quantizer.static:
        quantizer.set_range(torch.tensor(0.03), torch.tensor(2.0**bits / 3).round())
        x[0, :300] = 0.03 * (torch.arange(300) - 150.5)  # halves
        x[1, :2] = torch.tensor([-1e20, 1e20])
    for each in (x, x.view(7, 20, 50).transpose(1, 2), x[:, ::3]):
        expected = quantizer.eval()(each)
        found = int8.activation_codes(quantizer, each)
        assert found.values.dtype == torch.uint8 and torch.equal(found.values.float(), expected.values)
        assert torch.equal(found.scale, expected.scale) and torch.equal(found.zero_point, expected.zero_point)


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
@pytest.mark.parametrize("sign", [-1, 1])
def test_extremes_of_the_portable_grid(kernel, sign):
    """The largest possible sums do not saturate, also on CPUs without VNNI."""
    values = torch.full((20, 768), 255, dtype=torch.uint8)
    weight = torch.full((16, 768), sign * 64, dtype=torch.int8)
    found = KERNELS[kernel](weight)
    expected = (255 - found.offset) * 64 * 768 * sign
    assert (found.sums(values) == expected).all()


def test_saturating_kernels_are_never_chosen():
    assert is_exact("reference", 127) and is_exact("float", 127)
    for largest in (64, 127):
        chosen = choose_kernel("cpu", largest)
        assert is_exact(chosen, largest)
        weight, values = torch.full((8, 512), largest), torch.full((4, 512), 255, dtype=torch.uint8)
        sums = KERNELS[chosen](weight.to(torch.int8)).sums(values)
        assert (sums == 255 * largest * 512).all()


class SaturatingKernel(FloatKernel):
    """A CPU without VNNI: pairs of products are added in 16 bits, which saturate."""

    def sums(self, values):
        products = (values.float()[:, None] * self.weight).unflatten(-1, (-1, 2)).sum(-1)
        return products.clamp(-32768, 32767).sum(-1)


def test_a_saturating_kernel_is_detected(monkeypatch):
    monkeypatch.setitem(KERNELS, "saturating", SaturatingKernel)
    assert is_exact("saturating", 64) and not is_exact("saturating", 127)


# ---------------------------------------------------------------------------- matrices, 2 to 8 bits
def saturates(kernel, grid):
    """Whether this CPU cannot use a kernel for a grid; choose_kernel takes another one then."""
    return kernel != "auto" and grid == "full" and not is_exact(kernel, 127)


CONFIGS = [
    {},
    {"grid": "full"},
    {"weight_bits": 4},
    {"weight_bits": 2, "weight_range": "mse"},
    {"act_bits": 6},
    {"per_channel": False, "per_token": False},
    {"act_range": "static"},
    {"act_range": "static", "act_bits": 5, "observer": "mse"},
]


@pytest.mark.parametrize("kernel", ["auto", *KERNEL_NAMES])
@pytest.mark.parametrize("values", CONFIGS, ids=str)
def test_integer_logits_equal_the_students(kernel, values, tiny_config, tokenizer_bytes, tmp_path):
    if saturates(kernel, values.get("grid")):
        pytest.skip("this CPU saturates full-range products")
    model, config = make_student(tiny_config, **values)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # as far from the random start as trained weights are
    ids, mask = random_ids([9, 5, 1], tiny_config.vocab_size)
    expected, _ = model(ids, mask)
    path = str(tmp_path / "student.pt")
    save_atomically(student_payload(model, config, tokenizer_bytes), path)
    for found in (to_integer(model, config, kernel=kernel), integer_model(read_student(path), "cpu", kernel)):
        logits, taps = found(ids, mask, ("context", "hidden"))
        assert torch.equal(logits, expected)  # bit for bit
        assert len(taps["context"]) == tiny_config.num_layers
        one, _ = found(ids[:1, :1])  # a single token
        torch.testing.assert_close(one, model(ids[:1, :1])[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("values", [{}, {"per_token": False}, {"act_range": "static"}], ids=str)
def test_feed_forward_in_pieces(values, kernel, tiny_config, monkeypatch):
    """Per-token ranges allow computing many tokens in pieces, with the same bits."""
    monkeypatch.setattr("int8.IntFeedForward.PIECE", 8)
    model, config = make_student(tiny_config, **values)
    ids, mask = random_ids([9, 5, 1], tiny_config.vocab_size)
    found = to_integer(model, config, kernel=kernel)
    assert found.encoder.layers[0].ffn.in_pieces == (values == {})
    assert torch.equal(found(ids, mask)[0], model(ids, mask)[0])


@pytest.mark.skipif(not has_compiler(torch.device("cpu")), reason="no C++ compiler: compiled() is not tested")
def test_compiled(tiny_config, tmp_path, monkeypatch):
    """Close to the integer model."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # with nothing compiled before
    torch._dynamo.reset()
    integer = to_integer(*make_student(replace(tiny_config, num_layers=1), act_range="static"))
    ids, mask = random_ids([9, 5, 1], tiny_config.vocab_size)
    found = int8.compiled(integer)(ids, mask)[0]
    torch.testing.assert_close(found, integer(ids, mask)[0], atol=1e-3, rtol=1e-3)
    assert not torch._inductor.config.freezing  # other models are compiled as before


def test_integer_model_holds_integers(tiny_config):
    model, config = make_student(tiny_config)
    found = to_integer(model, config, kernel="reference")
    table = found.encoder.embeddings.word.weight
    assert table.dtype == torch.int8 and table.shape == (tiny_config.vocab_size, 32)
    layer = found.encoder.layers[0]
    assert layer.attention.qkv.kernel.weight.shape == (96, 32)  # query, key and value: one product
    kept = sum(p.numel() for p in found.parameters())
    floats = model.head, model.encoder.embeddings.position, model.encoder.embeddings.token_type
    norms = 2 * 32 * (1 + 2 * tiny_config.num_layers)
    assert kept == sum(p.numel() for m in floats for p in m.parameters()) + norms


@pytest.mark.parametrize("values", [{"weight_bits": 32}, {"act_bits": 32}])
def test_float_weights_or_activations_have_no_integer_model(values, tiny_config):
    model, config = make_student(tiny_config, **values)
    with pytest.raises(UserError, match="quantized weights and activations"):
        to_integer(model, config)


def test_kept_layers_have_no_integer_model(tiny_config, tokenizer_bytes, tmp_path):
    model, config = make_student(tiny_config, keep=("head", "encoder.layers.0"))
    path = str(tmp_path / "student.pt")
    save_atomically(student_payload(model, config, tokenizer_bytes), path)
    ids, mask = random_ids([9, 4], tiny_config.vocab_size)
    assert torch.equal(model(ids, mask)[0], load_student(path)[0](ids, mask)[0])
    with pytest.raises(UserError, match="every Linear layer of the encoder"):
        integer_model(read_student(path), "cpu")


# ----------------------------------------- few bits, learned ranges and quantized attention products
LEARNED_RANGE = {"act_range": "learned"}
LOW_BITS = [
    {"weights": "ternary", "weight_bits": 2, "per_channel": False},
    {"weights": "ternary", "weight_bits": 2, "attention_bits": 8},
    {"weights": "ternary", "weight_bits": 2, **LEARNED_RANGE, "attention_bits": 4},
    {"weights": "lsq", "weight_bits": 2, "weight_range": "lsq", "per_channel": False},
    {"weights": "lsq", "weight_bits": 4, "weight_range": "mse", "attention_bits": 8},
    {"weights": "lsq", "weight_bits": 8, "grid": "full", "per_channel": False},
    {"weights": "lsq", "weight_bits": 8, **LEARNED_RANGE},
    {"weight_bits": 4, "attention_bits": 8},
    {"weight_bits": 4, "attention_bits": 8, "act_range": "static"},
    {"weight_bits": 4, "attention_bits": 8, "per_token": False, "act_bits": 4},
    {**LEARNED_RANGE},
    {**LEARNED_RANGE, "act_bits": 5, "observer": "mse", "attention_bits": 8},
    {"weight_bits": 4, "weight_range": "mse", **LEARNED_RANGE},
]
LOW_BITS += [  # every row of WEIGHTS, also a new one
    {"weights": name, "weight_bits": bits, "weight_range": weight_range}
    for name, row in WEIGHTS.items()
    for bits in sorted({row.bits[0], row.bits[-1]})
    for weight_range in row.ranges
]


def bert_inputs(vocab):
    """ids, padded with 0, mask, and types: 1 for the tokens of the second text."""
    ids, mask = random_ids([9, 5, 1], vocab)
    types = (torch.arange(9) >= torch.tensor([4, 2, 1])[:, None]) & mask
    return {"ids": ids * mask, "mask": mask, "types": types.long()}


@pytest.mark.parametrize("values", LOW_BITS, ids=str)
def test_few_bits_give_the_same_logits(values, tiny_config, tokenizer_bytes, tmp_path):
    """The student, the student loaded from its file and the integer models of both agree bit for bit
    with every kernel. The model is a BERT with two token types.
    """
    model, config = make_bert_student(tiny_config, **values)
    batch = bert_inputs(tiny_config.vocab_size)
    path = str(tmp_path / "student.pt")
    save_atomically(student_payload(model, config, tokenizer_bytes), path)
    with torch.no_grad():
        expected = model(**batch)[0]
        again, tokenizer = load_student(path)
        assert again.config == model.config and tokenizer.bytes == tokenizer_bytes
        assert torch.equal(again(**batch)[0], expected)
    assert expected.isfinite().all() and expected.std() > 1e-2
    assert (model(batch["ids"], batch["mask"])[0] - expected).abs().max() > 1e-3  # types matter
    read = read_student(path)
    assert read.quant == config
    assert torch.equal(to_integer(model, config)(**batch)[0], expected)
    for kernel in ["auto", *KERNEL_NAMES]:
        if saturates(kernel, config.grid):
            continue
        found = integer_model(read, kernel=kernel)
        logits, taps = found(**batch, capture=("context", "hidden"))
        assert torch.equal(logits, expected), kernel
        assert len(taps["context"]) == tiny_config.num_layers


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: kernels ran on CPU only")
@pytest.mark.parametrize("values", CONFIGS, ids=str)
def test_integer_logits_on_cuda(values, tiny_config):
    model, config = make_student(tiny_config, **values)
    ids, mask = random_ids([9, 5, 1], tiny_config.vocab_size)
    expected, _ = model(ids, mask)
    logits, _ = to_integer(model, config, device="cuda")(ids.cuda(), mask.cuda())
    assert (logits.cpu() - expected).abs().max() <= 1e-3 * expected.std()


# ----------------------------------------------------------------------------------- tensor trains
RANGES = [{}, {"per_channel": False, "per_token": False}, {"act_range": "static"}]
TRAIN_CONFIGS = [{"weight_bits": bits, **ranges} for bits in (8, 4, 2) for ranges in RANGES]
TRAIN_CONFIGS += [
    {"grid": "full", "act_range": "static"},
    {"act_range": "static", "act_bits": 6, "observer": "mse"},
    {"weight_range": "mse", "weight_bits": 2, "keep": ("encoder.embeddings",)},
]


def same_logits(found, expected):
    """Whether both logits of a joint head agree bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("values", TRAIN_CONFIGS, ids=str)
def test_tensor_trains_give_the_same_logits(values, tiny_config, tokenizer_bytes, tmp_path, monkeypatch):
    """The student, the student loaded from its file and the integer models agree bit for bit with every
    kernel.
    """
    model, config = make_train_student(tiny_config, **values)
    ids, mask = random_ids([9, 5, 1], tiny_config.vocab_size)
    with torch.no_grad():
        expected, _ = model(ids, mask)
        single, _ = model(ids[:1, :1])
    path = str(tmp_path / "student.pt")
    payload = student_payload(model, config, tokenizer_bytes, task="atis")
    save_atomically(payload, path)
    read = read_student(path)
    assert read.config == model.config and read.quant == config
    again = float_model(read)
    with torch.no_grad():
        assert same_logits(again(ids, mask)[0], expected)
    assert expected[0].shape == (3, 3) and expected[1].shape == (3, 9, 5)
    assert all(logits.std() > 1e-4 for logits in expected)
    monkeypatch.setattr("checkpoint.float_model", lambda read: copy.deepcopy(again))  # build it once
    assert same_logits(integer_model(read)(ids, mask)[0], expected)  # with the kernel that it chooses, and few tokens
    monkeypatch.setattr("int8.IntTTLinear.FEW", 0)
    for kernel in KERNEL_NAMES:
        if saturates(kernel, config.grid):
            continue
        found = integer_model(read, kernel=kernel)
        logits, taps = found(ids, mask, ("context", "hidden"))
        assert same_logits(logits, expected), kernel
        assert len(taps["context"]) == 1
    assert same_logits(integer_model(read)(ids, mask)[0], expected)  # with the kernel that it chooses
    for one, other in zip(found(ids[:1, :1])[0], single, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("values", [{"weight_bits": 32}, {"act_bits": 32}], ids=str)
def test_float_tensor_trains_have_no_integer_model(values, tiny_config, tokenizer_bytes, tmp_path):
    model, config = make_train_student(tiny_config, **values)
    path = str(tmp_path / "student.pt")
    save_atomically(student_payload(model, config, tokenizer_bytes), path)
    ids, mask = random_ids([9, 4], tiny_config.vocab_size)
    with torch.no_grad():
        assert same_logits(load_student(path)[0](ids, mask)[0], model(ids, mask)[0])
    with pytest.raises(UserError, match="quantized weights and activations"):
        integer_model(read_student(path), "cpu")


def test_integer_model_of_tensor_trains_holds_integers(tiny_config):
    model, config = make_train_student(tiny_config)
    found = to_integer(model, config, kernel="reference")
    assert not any("cores" in name for name, _ in found.named_parameters())
    assert isinstance(found.encoder.layers[0].attention, IntAttention)
    up = found.encoder.layers[0].ffn.up
    assert isinstance(up, IntTTLinear)
    assert up.A.kernel.weight.shape == (4, 32) and up.B.kernel.weight.shape == (64, 4)
    for half in (up.A, up.B):
        assert torch.equal(half.kernel.weight, half.kernel.weight.round())
        assert half.kernel.weight.abs().amax(dim=1).eq(64).all()  # one 8-bit scale per row
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


def test_query_key_and_value_share_one_quantized_input(tiny_config, monkeypatch):
    model, config = make_train_student(tiny_config)
    found = to_integer(model, config)
    rounded, codes_of = [], int8.activation_codes
    monkeypatch.setattr(int8, "activation_codes", lambda q, x: rounded.append(q) or codes_of(q, x))
    found.encoder(*random_ids([9, 5], tiny_config.vocab_size), None, {}, None)
    # Their input, the middle of each of the three, and two for each of the other three layers.
    assert len(rounded) == 1 + 3 + 3 * 2
    assert rounded[0] is found.encoder.layers[0].attention.query.act_quantizer


@pytest.mark.parametrize("values", [{}, {"act_range": "static"}], ids=str)
def test_static_tensor_trains_stay_in_8_bits(values, tiny_config, monkeypatch):
    monkeypatch.setattr("int8.IntTTLinear.FEW", 0)
    model, config = make_train_student(tiny_config, **values)
    found = to_integer(model, config, kernel="onednn")
    ids, mask = random_ids([9, 5], tiny_config.vocab_size)
    x = model(ids, mask, ("hidden",))[1]["hidden"][0]
    layer = found.encoder.layers[0]
    inner = layer.ffn.up.middle(x)
    if values:
        assert inner.values.dtype == torch.uint8 and layer.ffn.expand(x).values.dtype == torch.uint8
    else:
        assert inner.dtype == torch.float32 and layer.ffn.expand(x).dtype == torch.float32


@pytest.mark.parametrize("values", [{}, {"per_token": False}], ids=str)
def test_feed_forward_of_tensor_trains_in_pieces(values, tiny_config, monkeypatch):
    monkeypatch.setattr("int8.IntFeedForward.PIECE", 8)
    model, config = make_train_student(tiny_config, **values)
    ids, mask = random_ids([9, 5, 1], tiny_config.vocab_size)
    found = to_integer(model, config)
    assert found.encoder.layers[0].ffn.in_pieces == (values == {})
    assert same_logits(found(ids, mask)[0], model(ids, mask)[0])


@pytest.mark.parametrize("kept", ["head", "encoder.layers.0", "encoder.embeddings"])
def test_dense_layers_beside_tensor_trains(kept, tiny_config, tokenizer_bytes, tmp_path):
    """What TTConfig.keep names stays dense, and is quantized like all other layers."""
    trains = TTConfig(4, 5, modes=3, keep=(kept,))
    model, config = make_train_student(tiny_config, trains, weight_bits=4)
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
def test_kept_tensor_trains_have_no_integer_model(keep, tiny_config):
    model, config = make_train_student(tiny_config, keep=("head", keep))
    model(*random_ids([9, 4], tiny_config.vocab_size))
    with pytest.raises(UserError, match="every Linear layer of the encoder"):
        to_integer(model, config)

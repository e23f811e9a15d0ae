"""int8.py: exact integer kernels, and integer models that give the same bits as their students."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES, random_ids
from test_checkpoint import make_bert_student, make_student, make_train_student

import int8
from checkpoint import fake_quantized, read_student, save_student
from int8 import (
    KERNELS,
    FloatKernel,
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
from quant import ActQuantizer, Codes, QuantConfig
from tt import TTConfig

# ---------------------------------------------------------------------------------------- kernels
# "cuda" runs here, too: CPUs have torch._int_mm, though a slow one.
KERNEL_NAMES = [*KERNELS, "reference"]


class ReferenceKernel(FloatKernel):
    """In float64, where every sum is exact."""

    def sums(self, values):
        return F.linear(values.double(), self.weight.double()).float()


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    monkeypatch.setitem(KERNELS, "reference", ReferenceKernel)


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
    if one_pass and not int8.rounds_in_one_pass():
        pytest.skip("this PyTorch has no operator for it")
    monkeypatch.setattr(int8, "rounds_in_one_pass", lambda: one_pass)
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


class SaturatingKernel(FloatKernel):
    """A CPU without VNNI: pairs of products are added in 16 bits, which saturate."""

    def sums(self, values):
        products = (values.float()[:, None] * self.weight).unflatten(-1, (-1, 2)).sum(-1)
        return products.clamp(-32768, 32767).sum(-1)


def test_saturating_kernels_are_detected_and_never_chosen(monkeypatch):
    """The largest sums of the portable grid saturate nowhere, those of the full grid on CPUs without VNNI."""
    monkeypatch.setitem(KERNELS, "saturating", SaturatingKernel)
    assert is_exact("saturating", 64) and not is_exact("saturating", 127)
    values = torch.full((20, 768), 255, dtype=torch.uint8)
    cases = [(kernel, 64) for kernel in KERNEL_NAMES] + [(choose_kernel("cpu", 127), 127)]
    for kernel, largest in cases:
        for weight in (largest, -largest):
            found = KERNELS[kernel](torch.full((16, 768), weight, dtype=torch.int8))
            assert (found.sums(values) == (255 - found.offset) * weight * 768).all()


# --------------------------------------------------------------------------------------- matrices
STATIC, LEARNED = {"act_range": "static"}, {"act_range": "learned"}
CONFIGS = [
    {},
    {"grid": "full"},
    {"act_bits": 6},
    {"per_channel": False, "per_token": False},
    STATIC,
    LEARNED,
    {**STATIC, "act_bits": 5},
    {"weight_bits": 4, "attention_bits": 8},
    {"weight_bits": 4, "attention_bits": 8, **STATIC},
    {"weight_bits": 4, "attention_bits": 8, "per_token": False, "act_bits": 4},
    {"weight_bits": 4, "weight_range": "mse", **LEARNED, "attention_bits": 8},
    {"weights": "ternary", "weight_bits": 2, "per_channel": False},
    {"weights": "ternary", "weight_bits": 2, **LEARNED, "attention_bits": 4},
    {"weights": "lsq", "weight_bits": 2, "weight_range": "lsq", "per_channel": False},
    {"weights": "lsq", "grid": "full", "per_channel": False},
    {"weights": "lsq", **LEARNED},
]
CONFIGS += [  # every row of WEIGHTS, also a new one
    {"weights": name, "weight_bits": bits, "weight_range": weight_range}
    for name, row in WEIGHTS.items()
    for bits in sorted({row.bits[0], row.bits[-1]})
    for weight_range in row.ranges
]


@pytest.fixture
def through_file(tokenizer_bytes, tmp_path):
    """A function: the parts of a student, saved and read again."""

    def save_and_read(model, config):
        save_student(path := str(tmp_path / "student.safetensors"), model, config, tokenizer_bytes, {})
        read = read_student(path)
        assert read.config == model.config and read.quant == config
        return read

    return save_and_read


def logits_of(model, *inputs, **named):
    """All logits of a model, without gradient."""
    with torch.no_grad():
        logits = model(*inputs, **named)[0]
    return logits if isinstance(logits, tuple) else (logits,)


def same_logits(found, expected):
    """Whether they agree bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def assert_all_kernels_agree(read, batch, expected, one, single):
    """Bit for bit; for one token, whose sums PyTorch adds in another order, closely."""
    for kernel in ["auto", *KERNEL_NAMES]:
        if kernel != "auto" and read.quant.grid == "full" and not is_exact(kernel, 127):
            continue  # on this CPU choose_kernel takes another one
        found = integer_model(read, kernel=kernel)
        assert same_logits(logits_of(found, **batch), expected), kernel
        torch.testing.assert_close(logits_of(found, **one), single, atol=1e-4, rtol=1e-3)
    taps = found(**batch, capture=("context", "hidden"))[1]
    assert len(taps["context"]) == read.config.num_layers


@pytest.mark.parametrize("make", [make_student, make_train_student])
@pytest.mark.parametrize("values", [{}, {"per_token": False}, STATIC], ids=str)
def test_feed_forward_in_pieces(values, make, tiny_config, monkeypatch):
    """Per-token ranges allow computing many tokens in pieces, with the same bits."""
    monkeypatch.setattr("int8.IntFeedForward.PIECE", 8)
    model, config = make(tiny_config, **values)
    batch = random_ids([9, 5, 1], tiny_config.vocab_size)
    for kernel in ("auto", "reference"):
        found = to_integer(model, config, kernel=kernel)
        assert found.encoder.layers[0].ffn.in_pieces == (values == {})
        assert same_logits(logits_of(found, *batch), logits_of(model, *batch))


def test_integer_model_holds_integers(tiny_config):
    model, config = make_student(tiny_config)
    found = to_integer(model, config, kernel="reference")
    table = found.encoder.embeddings.word.weight
    assert table.dtype == torch.int8 and table.shape == (tiny_config.vocab_size, 32)
    layer = found.encoder.layers[0]
    assert layer.attention.qkv.kernel.weight.shape == (96, 32)  # query, key and value: one product
    kept = {name for name, _ in found.named_parameters() if "norm" not in name and not name.startswith("head.")}
    assert kept == {f"encoder.embeddings.{table}.weight" for table in ("position", "token_type")}


@pytest.mark.parametrize("make", [make_student, make_train_student])
@pytest.mark.parametrize(
    "values, message",
    [
        ({"weight_bits": 32}, "quantized weights and activations"),
        ({"act_bits": 32}, "quantized weights and activations"),
        ({"keep": ("head", "encoder.layers.0")}, "every Linear layer of the encoder"),
    ],
)
def test_students_that_have_no_integer_model(values, message, make, tiny_config, through_file):
    """They can be saved and used as they were trained."""
    model, config = make(tiny_config, **values)
    read, batch = through_file(model, config), random_ids([9, 4], tiny_config.vocab_size)
    assert same_logits(logits_of(fake_quantized(read), *batch), logits_of(model, *batch))
    with pytest.raises(UserError, match=message):
        integer_model(read, "cpu")


def test_integer_model_shares_no_tensor_with_the_student(tiny_config):
    model, config = make_student(tiny_config, **STATIC)
    found = to_integer(model, config)
    batch = random_ids([9, 4], tiny_config.vocab_size)
    expected = logits_of(found, *batch)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert same_logits(logits_of(found, *batch), expected)


@pytest.mark.parametrize("values", CONFIGS, ids=str)
def test_integer_logits_equal_the_students(values, tiny_config, through_file):
    """The student, the student loaded from its file and the integer models of both agree bit for bit with every kernel.
    The model is a BERT with two token types.
    """
    model, config = make_bert_student(tiny_config, **values)
    ids, mask = random_ids([9, 5, 1], tiny_config.vocab_size)
    types = (torch.arange(9) >= torch.tensor([4, 2, 1])[:, None]) & mask  # 1 for the tokens of the second text
    batch = {"ids": ids * mask, "mask": mask, "types": types.long()}  # padded with 0
    expected = logits_of(model, **batch)
    assert expected[0].isfinite().all() and expected[0].std() > 1e-2
    assert (logits_of(model, batch["ids"], batch["mask"])[0] - expected[0]).abs().max() > 1e-3  # types matter
    read = through_file(model, config)
    assert same_logits(logits_of(fake_quantized(read), **batch), expected)
    assert same_logits(logits_of(to_integer(model, config), **batch), expected)
    one = {name: tensor[:1, :1] for name, tensor in batch.items()}  # a single token
    assert_all_kernels_agree(read, batch, expected, one, logits_of(model, **one))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: kernels ran on CPU only")
@pytest.mark.parametrize("values", CONFIGS, ids=str)
def test_integer_logits_on_cuda(values, tiny_config):
    model, config = make_student(tiny_config, **values)
    ids, mask = random_ids([9, 5, 1], tiny_config.vocab_size)
    expected, _ = model(ids, mask)
    logits, _ = to_integer(model, config, device="cuda")(ids.cuda(), mask.cuda())
    assert (logits.cpu() - expected).abs().max() <= 1e-3 * expected.std()


# ----------------------------------------------------------------------------------- tensor trains
RANGES = [{}, {"per_channel": False, "per_token": False}, STATIC]
TRAIN_CONFIGS = [{"weight_bits": bits, **ranges} for bits in (8, 4, 2) for ranges in RANGES]
TRAIN_CONFIGS += [
    {"grid": "full", **STATIC},
    {**STATIC, "act_bits": 6},
    {"weight_range": "mse", "weight_bits": 2, "keep": ("encoder.embeddings",)},
]


@pytest.mark.parametrize("values", TRAIN_CONFIGS, ids=str)
def test_tensor_trains_give_the_same_logits(values, tiny_config, through_file, monkeypatch):
    """The student, the student loaded from its file and the integer models agree bit for bit with every kernel."""
    model, config = make_train_student(tiny_config, **values)
    batch = dict(zip(("ids", "mask"), random_ids([9, 5, 1], tiny_config.vocab_size), strict=True))
    expected, one = logits_of(model, **batch), {"ids": batch["ids"][:1, :1]}
    assert expected[0].shape == (3, 3) and expected[1].shape == (3, 9, 5)
    assert all(logits.std() > 1e-4 for logits in expected)
    read = through_file(model, config)
    again = fake_quantized(read)
    assert same_logits(logits_of(again, **batch), expected)
    monkeypatch.setattr("int8.fake_quantized", lambda read: copy.deepcopy(again))  # build it once
    assert same_logits(logits_of(integer_model(read), **batch), expected)  # with the kernel that it chooses, few tokens
    monkeypatch.setattr("int8.IntLinear.FEW", 0)
    assert_all_kernels_agree(read, batch, expected, one, logits_of(model, **one))


def test_integer_model_of_tensor_trains_holds_integers(tiny_config):
    model, config = make_train_student(tiny_config)
    found = to_integer(model, config, kernel="reference")
    assert not any("cores" in name for name, _ in found.named_parameters())
    up, words = found.encoder.layers[0].ffn.up, found.encoder.embeddings.word
    assert up.A.kernel.weight.shape == (4, 32) and up.B.kernel.weight.shape == (64, 4)
    assert all(half.kernel.weight.abs().amax(dim=1).eq(64).all() for half in (up.A, up.B))  # one 8-bit scale per row
    assert type(found.head.dense) is IntTTLinear and type(found.head.intent.out_proj) is IntLinear
    assert type(words) is type(found.encoder.embeddings.position) is MergedTable
    assert words.left.shape == (8, 2, 5) and words.right.shape == (56, 5, 16)
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


def test_static_tensor_trains_stay_in_8_bits(tiny_config, monkeypatch):
    monkeypatch.setattr("int8.IntLinear.FEW", 0)
    for values in ({}, STATIC):
        model, config = make_train_student(tiny_config, **values)
        ffn = to_integer(model, config, kernel="onednn").encoder.layers[0].ffn
        inner = ffn.expand(torch.randn(2, 9, 32))
        assert isinstance(inner, Codes) == (ffn.up.A.next_grid is not None) == bool(values)
        assert (inner.values if values else inner).dtype == (torch.uint8 if values else torch.float32)


@pytest.mark.parametrize("kept", ["head", "encoder.layers.0", "encoder.embeddings"])
def test_dense_layers_beside_tensor_trains(kept, tiny_config, through_file):
    """What TTConfig.keep names stays dense, and is quantized like all other layers."""
    model, config = make_train_student(tiny_config, TTConfig(4, 5, modes=3, keep=(kept,)), weight_bits=4)
    read, batch = through_file(model, config), random_ids([9, 5], tiny_config.vocab_size)
    found = integer_model(read)
    for each in (found, fake_quantized(read)):
        assert same_logits(logits_of(each, *batch), logits_of(model, *batch))
    up, dense = found.encoder.layers[0].ffn.up, found.head.dense
    assert type(up) is (IntLinear if kept == "encoder.layers.0" else IntTTLinear)
    assert type(dense) is (IntLinear if kept == "head" else IntTTLinear)

"""int8.py: packing round trips, and a packed student that computes the very same logits."""

from dataclasses import replace

import pytest
import torch
from conftest import random_ids

from checkpoint import save_atomically
from data import UserError
from int8 import (
    KERNELS,
    FloatKernel,
    choose_kernel,
    convert,
    integer_model,
    is_exact,
    load_integer,
)
from model import build_model
from packed import (
    bytes_on_disk,
    load_student,
    pack,
    read_student,
    student_payload,
    unpack,
)
from prepare import calibrate, prepare
from quant import QuantConfig, quant_range


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_pack_round_trip(bits, count):
    low, high = quant_range(bits, True)
    codes = torch.randint(low, high + 1, (count,), dtype=torch.int32)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-count * bits // 8)
    assert torch.equal(unpack(packed, bits, count).int(), codes)


def test_packed_bits_by_hand():
    assert pack(torch.tensor([-1, 0, 1, 1]), 2).tolist() == [0b11_11_10_01]
    assert pack(torch.tensor([-7, 7, 0]), 4).tolist() == [0b1111_0001, 0b0000_1000]


@pytest.mark.parametrize("bits", range(2, 9))
def test_pack_covers_twos_complement(bits):
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int8).repeat(3)
    assert len(codes.unique()) == 2**bits
    assert torch.equal(unpack(pack(codes, bits), bits, len(codes)).to(torch.int8), codes)
    assert unpack(torch.zeros(bits, dtype=torch.uint8), bits, 8).tolist() == [codes[0].item()] * 8


def student(tiny_config, **values):
    config = QuantConfig(**values)
    model = build_model(tiny_config).eval()
    prepare(model, config)
    if config.act_range != "dynamic":
        calibrate(model, [random_ids([9, 9], tiny_config.vocab_size)], config.observer)
    return model, config


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"weight_bits": 4},
        {"weight_bits": 3, "weight_range": "mse"},
        {"weight_bits": 2, "per_channel": False, "weight_range": "mse"},
        {"per_channel": False, "per_token": False},
        {"act_range": "static", "observer": "moving-average"},
        {"weight_bits": 32},
        {"act_bits": 32},
    ],
    ids=str,
)
def test_same_logits_bit_for_bit(values, tiny_config, tokenizer_bytes, tmp_path):
    model, config = student(tiny_config, **values)
    path = str(tmp_path / "student.pt")
    payload = student_payload(model, config, tokenizer_bytes, task="xnli")
    size = save_atomically(payload, path)
    assert abs(bytes_on_disk(payload) - size) < 2000  # names inside the archive differ
    again, tokenizer = load_student(path)
    ids, mask = random_ids([9, 4], tiny_config.vocab_size)
    with torch.no_grad():
        assert torch.equal(model(ids, mask)[0], again(ids, mask)[0])
    assert tokenizer.bytes == tokenizer_bytes


def test_many_chunks(tiny_config, tokenizer_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr("packed.CHUNK", 1000)
    model, config = student(tiny_config, weight_bits=5)
    path = str(tmp_path / "student.pt")
    save_atomically(student_payload(model, config, tokenizer_bytes), path)
    ids, mask = random_ids([9, 4], tiny_config.vocab_size)
    with torch.no_grad():
        assert torch.equal(model(ids, mask)[0], load_student(path)[0](ids, mask)[0])


def test_sizes_follow_the_bits():
    from model import ModelConfig

    shape = ModelConfig(4000, 128, 2, 2, 512, 64, head="sequence", num_labels=3)
    sizes = {}
    for bits in (32, 8, 4, 2):
        model, config = student(shape, weight_bits=bits)
        sizes[bits] = bytes_on_disk(student_payload(model, config, b"x"))
    quantized = 4000 * 128 + 2 * (4 * 128 * 128 + 2 * 128 * 512)
    for bits in (8, 4, 2):
        saved = sizes[32] - sizes[bits]
        scales = 4 * (4000 + 2 * (4 * 128 + 512 + 128))
        assert saved == pytest.approx(quantized * (4 - bits / 8) - scales, rel=0.01)


def damaged(payload):
    name = "encoder.layers.0.ffn.up.weight"
    entry = payload["packed"][name]

    def packed(**values):
        return {**payload, "packed": {**payload["packed"], name: {**entry, **values}}}

    without = {k: v for k, v in payload["packed"].items() if k != name}
    return {
        "short": (packed(codes=entry["codes"][:-1]), "does not have the shape"),
        "type": (packed(codes=entry["codes"].float()), "does not have the shape"),
        "scale": (packed(scale=torch.ones(3)), "does not have the shape"),
        "shape": (packed(shape=[1, 2]), "does not have the shape"),
        "repeated": (
            packed(codes=torch.zeros(1, dtype=torch.uint8).expand(len(entry["codes"]))),
            "does not have the shape",
        ),
        "float bits": (
            {**payload, "quant": {**payload["quant"], "weight_bits": 8.0}},
            "weight_bits is 8.0",
        ),
        "extra key": (packed(spare=1), "is damaged"),
        "grid": (packed(codes=torch.full_like(entry["codes"], 127 + 100)), "leaves the grid"),
        "missing": ({**payload, "packed": without}, "is missing"),
        "stranger": (
            {**payload, "packed": {**payload["packed"], "x.weight": entry}},
            "no place in the model",
        ),
        "quant": ({**payload, "quant": {"bits": 8}}, "damaged"),
        "config": ({**payload, "config": {}}, "model config is damaged"),
        "tokenizer": ({**payload, "tokenizer": torch.zeros(9, dtype=torch.uint8)}, "SentencePiece"),
    }


KINDS = "short type scale shape missing stranger quant config tokenizer".split() + [
    "extra key",
    "grid",
    "repeated",
    "float bits",
]


@pytest.mark.parametrize("kind", KINDS)
def test_tampered_students_are_refused(kind, tiny_config, tokenizer_bytes, tmp_path):
    model, config = student(tiny_config)
    payload, message = damaged(student_payload(model, config, tokenizer_bytes))[kind]
    path = str(tmp_path / "student.pt")
    torch.save(payload, path)
    with pytest.raises(UserError) as error:
        load_student(path)
    assert message in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------- integer model
# "cuda" is an int8 product that CPUs have too, though slowly: what surrounds it is tested here.
KERNEL_NAMES = list(KERNELS)


def integers(shape, largest):
    return torch.randint(-largest, largest + 1, shape, dtype=torch.int8)


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
@pytest.mark.parametrize(
    "shape", [(1, 8, 8), (5, 30, 7), (17, 64, 33), (40, 768, 96), (3, 3072, 24)]
)
def test_sums_against_int64(kernel, shape):
    M, K, N = shape
    values = torch.randint(0, 256, (M, K), dtype=torch.uint8)
    weight = integers((N, K), 64)
    found = KERNELS[kernel](weight)
    sums = found.sums(values)
    expected = (values.long() - found.offset) @ weight.long().t()
    assert torch.equal(sums.double(), expected.double())
    assert sums.dtype == torch.float32 and sums.shape == (M, N)


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
@pytest.mark.parametrize("sign", [-1, 1])
def test_extremes_of_the_portable_grid(kernel, sign):
    """The largest sums that it can make, where kernels without VNNI would clip if they could."""
    values = torch.full((20, 768), 255, dtype=torch.uint8)
    weight = torch.full((16, 768), sign * 64, dtype=torch.int8)
    found = KERNELS[kernel](weight)
    expected = (255 - found.offset) * 64 * 768 * sign
    assert (found.sums(values) == expected).all()


def test_kernels_that_clip_are_never_chosen():
    assert is_exact("reference", 127) and is_exact("float", 127)
    for largest in (64, 127):
        chosen = choose_kernel("cpu", largest)
        assert is_exact(chosen, largest)
        weight, values = torch.full((8, 512), largest), torch.full((4, 512), 255, dtype=torch.uint8)
        sums = KERNELS[chosen](weight.to(torch.int8)).sums(values)
        assert (sums == 255 * largest * 512).all()


class Clipping(FloatKernel):
    """What a CPU without VNNI does: pairs of products are added in 16 bits."""

    def sums(self, values):
        products = (values.float()[:, None] * self.weight).unflatten(-1, (-1, 2)).sum(-1)
        return products.clamp(-32768, 32767).sum(-1)


def test_a_clipping_kernel_is_found_out(monkeypatch):
    monkeypatch.setitem(KERNELS, "clipping", Clipping)
    assert is_exact("clipping", 64) and not is_exact("clipping", 127)


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
def test_integer_logits_are_the_students(kernel, values, tiny_config, tokenizer_bytes, tmp_path):
    if kernel == "onednn" and values.get("grid") == "full" and not is_exact("onednn", 127):
        pytest.skip("this CPU clips full-range products: choose_kernel takes another kernel")
    model, config = student(tiny_config, **values)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # as far from the random start as trained weights are
    ids, mask = random_ids([9, 5, 1], tiny_config.vocab_size)
    expected, _ = model(ids, mask)
    path = str(tmp_path / "student.pt")
    save_atomically(student_payload(model, config, tokenizer_bytes), path)
    for found in (convert(model, config, kernel=kernel), load_integer(path, kernel=kernel)[0]):
        logits, taps = found(ids, mask, ("context", "hidden"))
        assert torch.equal(logits, expected)  # the same bits, not only the same numbers
        assert len(taps["context"]) == tiny_config.num_layers
        one, _ = found(ids[:1, :1])  # a single token
        torch.testing.assert_close(one, model(ids[:1, :1])[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("values", [{}, {"per_token": False}, {"act_range": "static"}], ids=str)
def test_pieces_of_the_feed_forward_step(values, kernel, tiny_config, monkeypatch):
    """Many tokens are worked on in pieces, where each token has a range of its own: the same bits."""
    monkeypatch.setattr("int8.IntFeedForward.PIECE", 8)
    model, config = student(tiny_config, **values)
    ids, mask = random_ids([9, 5, 1], tiny_config.vocab_size)
    found = convert(model, config, kernel=kernel)
    assert found.encoder.layers[0].ffn.in_pieces == (values == {})
    assert torch.equal(found(ids, mask)[0], model(ids, mask)[0])


def test_integer_model_holds_integers(tiny_config):
    model, config = student(tiny_config)
    found = convert(model, config, kernel="reference")
    table = found.encoder.embeddings.word.weight
    assert table.dtype == torch.int8 and table.shape == (tiny_config.vocab_size, 32)
    layer = found.encoder.layers[0]
    assert layer.attention.qkv.kernel.weight.shape == (96, 32)  # one product for three
    kept = sum(p.numel() for p in found.parameters())
    floats = model.head, model.encoder.embeddings.position, model.encoder.embeddings.token_type
    norms = 2 * 32 * (1 + 2 * tiny_config.num_layers)
    assert kept == sum(p.numel() for m in floats for p in m.parameters()) + norms


@pytest.mark.parametrize("values", [{"weight_bits": 32}, {"act_bits": 32}])
def test_nothing_to_multiply(values, tiny_config):
    model, config = student(tiny_config, **values)
    with pytest.raises(UserError, match="quantized weights and activations"):
        convert(model, config)


def test_kept_layers_have_no_integers(tiny_config, tokenizer_bytes, tmp_path):
    model, config = student(tiny_config, keep=("head", "encoder.layers.0"))
    path = str(tmp_path / "student.pt")
    save_atomically(student_payload(model, config, tokenizer_bytes), path)
    ids, mask = random_ids([9, 4], tiny_config.vocab_size)
    assert torch.equal(model(ids, mask)[0], load_student(path)[0](ids, mask)[0])
    with pytest.raises(UserError, match="every Linear layer of the encoder"):
        load_integer(path)


# ----------------------------------------------------------------- few bits, learned and inner ranges
LEARNED_RANGE = {"act_range": "learned"}
LOW_BITS = [
    {"weights": "ternary", "weight_bits": 2},
    {"weights": "ternary", "weight_bits": 2, "per_channel": False},
    {"weights": "ternary", "weight_bits": 2, "weight_clip": 0.08, "attention_bits": 8},
    {"weights": "ternary", "weight_bits": 2, **LEARNED_RANGE, "attention_bits": 4},
    {"weights": "lsq", "weight_bits": 2},
    {"weights": "lsq", "weight_bits": 2, "weight_range": "lsq", "per_channel": False},
    {"weights": "lsq", "weight_bits": 4, "weight_range": "mse", "attention_bits": 8},
    {"weights": "lsq", "weight_bits": 8, "weight_range": "lsq"},
    {"weights": "lsq", "weight_bits": 8, "grid": "full", "per_channel": False},
    {"weights": "lsq", "weight_bits": 8, **LEARNED_RANGE},
    {"weight_bits": 4, "attention_bits": 8},
    {"weight_bits": 4, "attention_bits": 8, "act_range": "static"},
    {"weight_bits": 4, "attention_bits": 8, "per_token": False, "act_bits": 4},
    {**LEARNED_RANGE},
    {**LEARNED_RANGE, "act_bits": 5, "observer": "mse", "attention_bits": 8},
    {"weight_clip": 0.1},
    {"weight_clip": 0.1, "weight_bits": 4, "weight_range": "mse", **LEARNED_RANGE},
]


def student_of_bert(tiny_config, **values):
    """Larger weights than at the start, and learned scales that clip some numbers, as after
    training.
    """
    shape = replace(tiny_config, position_offset=0, type_vocab_size=2, pad_id=0)
    model, config = build_model(shape).eval(), QuantConfig(**values)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        prepare(model, config)
        if config.act_range != "dynamic":
            calibrate(model, [random_ids([9, 9], shape.vocab_size)], config.observer)
        for name, parameter in model.named_parameters():
            if name.endswith(("log_scale", "log_step")):
                parameter -= 0.3
    return model, config


def ids_of_bert(vocab):
    """Padded with 0, and the first tokens of the second text in each row."""
    ids, mask = random_ids([9, 5, 1], vocab)
    types = (torch.arange(9) >= torch.tensor([4, 2, 1])[:, None]) & mask
    return {"ids": ids * mask, "mask": mask, "types": types.long()}


@pytest.mark.parametrize("values", LOW_BITS, ids=str)
def test_logits_of_few_bits_bit_for_bit(values, tiny_config, tokenizer_bytes, tmp_path):
    """The student, the student from its file, and the integers of both, whatever the kernel: of
    BERT's shape, with two token types.
    """
    model, config = student_of_bert(tiny_config, **values)
    batch = ids_of_bert(tiny_config.vocab_size)
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
    assert torch.equal(convert(model, config)(**batch)[0], expected)
    for kernel in ["auto", *KERNEL_NAMES]:
        if kernel == "onednn" and config.grid == "full" and not is_exact("onednn", 127):
            continue  # this CPU clips full-range products: choose_kernel takes another kernel
        found = integer_model(read, kernel=kernel)
        logits, taps = found(**batch, capture=("context", "hidden"))
        assert torch.equal(logits, expected), kernel
        assert len(taps["context"]) == tiny_config.num_layers


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ({"weights": "ternary", "weight_bits": 2}, (-1, 1)),
        ({"weights": "lsq", "weight_bits": 2, "weight_range": "lsq"}, (-2, 1)),
        ({"weights": "lsq", "weight_bits": 4}, (-8, 7)),
        ({"weights": "lsq"}, (-64, 64)),
        ({"weights": "lsq", "grid": "full"}, (-127, 127)),
    ],
    ids=str,
)
def test_packed_codes_of_few_bits(values, ends, tiny_config):
    """Matrices with learned scales are packed as well: integers, a scale a row, and nothing else."""
    model, config = student_of_bert(tiny_config, **values)
    payload = student_payload(model, config, b"x")
    assert len(payload["packed"]) == 2 * 6 + 1
    assert not any("scale" in name or name in payload["packed"] for name in payload["tensors"])
    lowest, highest = [], []
    for name, entry in payload["packed"].items():
        weight = model.get_parameter(name)
        assert entry["scale"].shape == (len(weight), 1)
        assert entry["codes"].nbytes == weight.numel() * config.weight_bits // 8
        if "word" in name:  # a table's rows are not multiplied: they have the usual grid
            continue
        codes = unpack(entry["codes"], config.weight_bits, weight.numel()).view_as(weight)
        lowest.append(int(codes.min()))
        highest.append(int(codes.max()))
        if config.weights == "lsq":
            by_hand = (weight.detach().double() / entry["scale"].double()).round().clamp(*ends)
            assert (codes != by_hand).float().mean() < 1e-3  # a tie in float32
    assert (min(lowest), max(highest)) == ends


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: kernels ran on CPU only")
@pytest.mark.parametrize("values", CONFIGS, ids=str)
def test_integer_logits_on_cuda(values, tiny_config):
    model, config = student(tiny_config, **values)
    ids, mask = random_ids([9, 5, 1], tiny_config.vocab_size)
    expected, _ = model(ids, mask)
    logits, _ = convert(model, config, device="cuda")(ids.cuda(), mask.cuda())
    assert (logits.cpu() - expected).abs().max() <= 1e-3 * expected.std()

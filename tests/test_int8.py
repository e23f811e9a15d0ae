"""int8.py: packing round trips, and a packed student that computes the very same logits."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import TOKENIZER, random_ids

from checkpoint import save_atomically
from data import UserError
from int8 import (
    KERNELS,
    FloatKernel,
    IntLinear,
    IntSharedAttention,
    IntTTLinear,
    MergedTable,
    choose_kernel,
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
    pack,
    read_student,
    student_payload,
    unpack,
)
from prepare import calibrate, prepare
from quant import QuantConfig, quant_range
from tt import TensorTrain, TTConfig


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


@pytest.fixture(scope="module")
def tokenizer_bytes():
    with open(TOKENIZER, "rb") as file:
        return file.read()


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


# ---------------------------------------------------------------------------------- tensor trains
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

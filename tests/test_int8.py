"""int8.py: packing round trips, and a packed student that computes the very same logits."""

import pytest
import torch
from conftest import TOKENIZER, random_ids

from data import UserError
from int8 import bytes_on_disk, load_student, pack, student_payload, unpack
from model import build_model, save_atomically
from quant import QuantConfig, calibrate, prepare, quant_range


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_pack_round_trip(bits, count):
    low, high = quant_range(bits, True)
    codes = torch.randint(low, high + 1, (count,), dtype=torch.int32)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-count * bits // 8)
    assert torch.equal(unpack(packed, bits, count).int(), codes)


def test_packed_bits_by_hand():
    assert pack(torch.tensor([-1, 0, 1, 1]), 2).tolist() == [0b10_10_01_00]
    assert pack(torch.tensor([-7, 7, 0]), 4).tolist() == [0b1110_0000, 0b0000_0111]


@pytest.fixture(scope="module")
def tokenizer_bytes():
    with open(TOKENIZER, "rb") as file:
        return file.read()


def student(tiny_config, **values):
    config = QuantConfig(**values)
    model = build_model(tiny_config).eval()
    prepare(model, config)
    if config.act_range == "static":
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
    monkeypatch.setattr("int8.CHUNK", 1000)
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
        "extra key": (packed(spare=1), "damaged or has no place"),
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

"""kit/files.py and checkpoint.py: files of tensors, round trips of models and packed students, and damage."""

import doctest
import json
import os
import random
import struct
import zlib
from dataclasses import asdict, replace

import pytest
import torch
from conftest import random_ids

import checkpoint
from checkpoint import (
    check_config,
    fake_quantized,
    load_model,
    load_student,
    meta_model,
    pack,
    read_model,
    read_student,
    save_model,
    save_student,
    unpack,
)
from kit.common import UserError
from kit.files import map_tensors, read_tensors, write_json, write_tensors
from lsq import LearnedScale
from model import ModelConfig, build_model, initialize, with_head
from prepare import calibrate, default_keep, prepare
from quant import QuantConfig, quant_range
from tt import TensorTrain, TTConfig, tensorize

TENSORS = {
    "half": torch.arange(6).half().view(2, 3),
    "codes": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "scale": torch.tensor(0.25),
    "none": torch.empty(0, 4),
    "brain": torch.tensor([[1.5]]).bfloat16(),
    "count": torch.tensor([2**40]),
}


def refused(load, path, message):
    """Check that load(path) raises a UserError of one line that contains the message."""
    with pytest.raises(UserError) as error:
        load(str(path))
    assert message in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------- files of tensors
def of_tests(path):
    return read_tensors(path, "test-1", "make it again")


def test_tensors_and_settings_round_trip(tmp_path):
    path, settings = str(tmp_path / "x.safetensors"), {"list": [1, None, "ü"], "number": 0.1}
    assert write_tensors(path, TENSORS, "test-1", settings) == os.path.getsize(path)
    tensors, found = of_tests(path)
    assert found == settings and set(tensors) == set(TENSORS) and os.listdir(tmp_path) == ["x.safetensors"]
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)
    tensors["half"] += 1  # a private mapping: the file stays as it is
    assert torch.equal(of_tests(path)[0]["half"], TENSORS["half"])
    refused(
        lambda path: read_tensors(path, "test-2", "make it again"), path, "not a file of this project (test-2): make"
    )


def test_the_safetensors_package_reads_and_writes_such_files(tmp_path):
    package = pytest.importorskip("safetensors.torch", reason="the safetensors package is not installed")
    ours, theirs = str(tmp_path / "ours.safetensors"), str(tmp_path / "theirs.safetensors")
    write_tensors(ours, TENSORS, "test-1")
    package.save_file(TENSORS, theirs, metadata={"format": "pt"})
    for name, tensor in TENSORS.items():
        assert torch.equal(package.load_file(ours)[name], tensor)
        assert torch.equal(map_tensors(theirs, "")[0][name], tensor)
    refused(of_tests, theirs, "not a file of this project")


def with_header(data, change):
    """The bytes of a file whose header, a dictionary, was changed; its checksum is right."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["crc32"] = "0" * 8
    text = change(header)
    text = (json.dumps(header, separators=(",", ":")) if text is None else text).encode()
    data = struct.pack("<Q", len(text)) + text + data[8 + length :]
    return data.replace(b'"crc32":"00000000"', b'"crc32":"%08x"' % zlib.crc32(data))


def offsets(name, values):
    return lambda header: header[name].update(data_offsets=values)


@pytest.mark.parametrize(
    "change",
    {
        "runs past the end": offsets("codes", [0, 2**40]),
        "begins before the data": offsets("half", [-8, 4]),
        "overlaps": lambda header: header["codes"].update(header["half"], shape=[12], dtype="U8"),
        "a gap": lambda header: header.pop("scale") and None,
        "more elements than bytes": lambda header: header["half"].update(shape=[2**20, 2**20]),
        "fewer elements than bytes": lambda header: header["half"].update(shape=[1]),
        "a negative size": lambda header: header["half"].update(shape=[-2, -3]),
        "a size that is no number": lambda header: header["half"].update(shape=["2", 3]),
        "a truth value": lambda header: header["scale"].update(shape=[True]),
        "unknown numbers": lambda header: header["half"].update(dtype="F4"),
        "no list": lambda header: header.update(half=3),
        "metadata of numbers": lambda header: header["__metadata__"].update(format=1),
        "settings that are no JSON": lambda header: header["__metadata__"].update(settings="{"),
        "a name twice": lambda header: json.dumps(header).replace('"codes"', '"count"'),
        "brackets": lambda header: "[" * 100_000,
        "a long number": lambda header: '{"a":' + "9" * 100_000 + "}",
        "no JSON": lambda header: "{",
    }.items(),
    ids=lambda item: item[0],
)
def test_headers_that_lie(change, tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(str(path), TENSORS, "test-1")
    path.write_bytes(with_header(path.read_bytes(), change[1]))
    refused(of_tests, path, "is damaged")


def test_files_of_other_kinds(tmp_path):
    path = tmp_path / "x.safetensors"
    refused(of_tests, path, "cannot read")
    for content in (b"", b"short", b"\xff" * 100, struct.pack("<Q", 2**40) + b"{}", struct.pack("<Q", 2) + b"{}x"):
        path.write_bytes(content)
        refused(of_tests, path, "is damaged or no safetensors file: make it again")
    torch.save({"format": "sdq-checkpoint-1"}, path)  # the format before this one
    refused(of_tests, path, "is a pickle, the format of earlier versions: make it again")
    refused(of_tests, tmp_path, "cannot read")


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(str(path), {"a": torch.tensor([1.5, -2.0]), "b": TENSORS["codes"]}, "test-1", {"k": 1})
    whole = path.read_bytes()
    flipped = (whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :] for i in range(len(whole)) for bit in range(8))
    for data in (*(whole[:n] for n in range(len(whole))), *flipped):
        path.write_bytes(data)
        with pytest.raises(UserError):
            of_tests(str(path))


def test_failed_write_leaves_no_file(tmp_path):
    with pytest.raises(TypeError):
        write_json(str(tmp_path / "x.json"), {"a": object()})
    with pytest.raises(KeyError):
        write_tensors(str(tmp_path / "x"), {"a": torch.zeros(1, dtype=torch.complex64)}, "test-1")
    assert os.listdir(tmp_path) == []


# --------------------------------------------------------------------------------- float32 models
def saved(model, path, tokenizer=b"x", **notes):
    save_model(str(path), model, tokenizer, notes)
    return str(path)


def rewritten(path, tensors=(), settings=(), drop=()):
    """A file of this project with other tensors and settings, and a right checksum."""
    found, metadata = map_tensors(path, "")
    found = {name: tensor.clone() for name, tensor in found.items() if name not in drop} | dict(tensors)
    write_tensors(path, found, metadata["format"], json.loads(metadata["settings"]) | dict(settings))
    return path


def test_model_round_trip(tiny_config, tmp_path):
    model = build_model(tiny_config).eval()
    path = saved(model, tmp_path / "m.safetensors", b"abc", labels="a\tb")
    again, read = load_model(path), read_model(path)
    assert again.config == tiny_config and not again.training
    assert read.vocabulary.numpy().tobytes() == b"abc" and read.notes == {"labels": "a\tb"}
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    halves = {name: tensor.half() for name, tensor in model.state_dict().items()}
    assert load_model(rewritten(path, halves)).head.dense.weight.dtype == torch.float32


def test_models_that_do_not_fit_their_config(tiny_config, tmp_path):
    model, path = build_model(tiny_config), tmp_path / "m.safetensors"
    name, tensor = next(iter(model.state_dict().items()))
    for changes, message in (
        (dict(drop=[name]), f"tensor {name} is missing"),
        (dict(tensors={"spare": torch.zeros(1)}), "unexpected tensor spare"),
        (dict(tensors={name: torch.zeros(3, 3)}), "has shape (3, 3)"),
        (dict(tensors={name: tensor.bfloat16()}), "is torch.bfloat16, expected "),
        (dict(tensors={name: tensor / 0}), "has values that are not finite"),
        (dict(settings={"config": {**asdict(tiny_config), "num_layers": 10**6}}), "num_layers is 1000000"),
        (dict(settings={"config": {**asdict(tiny_config), "hidden_size": "x"}}), "hidden_size is 'x'"),
        (dict(settings={"config": {**asdict(tiny_config), "spare": 1}}), "is damaged or of another version"),
        (dict(settings={"config": {**asdict(tiny_config), "tt": {"rank": 4}}}), "is damaged or of another version"),
    ):
        refused(load_model, rewritten(saved(model, path), **changes), message)


def test_model_configs_are_checked():
    assert check_config(ModelConfig()) == ModelConfig()
    for values, message in (
        ({"hidden_size": 30, "num_heads": 4}, "not divisible"),
        ({"head": "lm"}, "unknown head"),
        ({"head": "token"}, "the head needs num_labels"),
        ({"head": "joint", "num_labels": 2}, "num_slots"),
        ({"pad_id": 250002}, "outside the vocabulary"),
        ({"vocab_size": 0}, "vocab_size is 0, not a number from 1 to"),
        ({"dropout": 2.0}, "dropout is 2.0, not a number from"),
        ({"num_layers": True}, "num_layers"),
    ):
        with pytest.raises(UserError, match=message):
            check_config(ModelConfig(**values))


# ---------------------------------------------------------------------------------------- packing
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


# --------------------------------------------------------------------------------------- students
# Also used by test_int8.py.
def make_student(tiny_config, **values):
    """A fake-quantized model and its QuantConfig."""
    config = QuantConfig(**values)
    model = build_model(tiny_config).eval()
    prepare(model, config)
    if config.act_range != "dynamic":
        calibrate(model, [random_ids([9, 9], tiny_config.vocab_size)])
    return model, config


def make_bert_student(tiny_config, **values):
    """Larger weights than at the start, and learned scales that clip some values, as after training."""
    shape = replace(tiny_config, position_offset=0, type_vocab_size=2, pad_id=0)
    model, config = build_model(shape).eval(), QuantConfig(**values)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        prepare(model, config)
        if config.act_range != "dynamic":
            calibrate(model, [random_ids([9, 9], shape.vocab_size)])
        for name, parameter in model.named_parameters():
            if name.endswith(("log_scale", "log_step")):
                parameter -= 0.3
    return model, config


TRAINS = TTConfig(rank=4, embedding_rank=5, modes=2, table_modes=3, keep=())


def make_train_student(tiny_config, tt=TRAINS, **values):
    """Tensor trains with larger cores than at the start, and scales that clip some of them, as after
    training.
    """
    shape = replace(tiny_config, num_layers=1, head="joint", num_slots=5, tt=tt)
    model = initialize(meta_model(shape)).eval()
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
        calibrate(model, [random_ids([9, 9], tiny_config.vocab_size)])
    return model, config


def save(model, config, folder, tokenizer=b"x"):
    """(the tensors of a student's file, its path)."""
    path = str(folder / "student.safetensors")
    assert save_student(path, model, config, tokenizer, {"task": "xnli"}) == os.path.getsize(path)
    return map_tensors(path, "")[0], path


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"weight_bits": 4},
        {"weight_bits": 3, "weight_range": "mse"},
        {"weight_bits": 2, "per_channel": False, "weight_range": "mse"},
        {"weight_bits": 2, "weights": "ternary"},
        {"per_channel": False, "per_token": False},
        {"act_range": "static"},
        {"weight_bits": 32},
        {"act_bits": 32},
    ],
    ids=str,
)
def test_packed_student_gives_the_same_bits(values, tiny_config, tokenizer_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK", 1000)  # several pieces
    model, config = make_student(tiny_config, **values)
    _, path = save(model, config, tmp_path, tokenizer_bytes)
    again, tokenizer = load_student(path)
    ids, mask = random_ids([9, 4], tiny_config.vocab_size)
    with torch.no_grad():
        assert torch.equal(model(ids, mask)[0], again(ids, mask)[0])
    assert tokenizer.bytes == tokenizer_bytes and read_student(path).notes == {"task": "xnli"}


def test_file_size_follows_the_bits(tmp_path):
    """Ternary codes take an eighth of int16, a sixteenth of float32."""
    shape = ModelConfig(4000, 128, 2, 2, 512, 64, head="sequence", num_labels=3)
    sizes = {bits: os.path.getsize(save(*make_student(shape, weight_bits=bits), tmp_path)[1]) for bits in (32, 8, 4, 2)}
    sizes["ternary"] = os.path.getsize(save(*make_student(shape, weight_bits=2, weights="ternary"), tmp_path)[1])
    quantized = 4000 * 128 + 2 * (4 * 128 * 128 + 2 * 128 * 512)
    scales = 4 * (4000 + 2 * (4 * 128 + 512 + 128))
    for kind, bits in ((8, 8), (4, 4), (2, 2), ("ternary", 2)):
        assert sizes[32] - sizes[kind] == pytest.approx(quantized * (4 - bits / 8) - scales, rel=0.01)


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
def test_packed_codes_reach_the_ends_of_their_grid(values, ends, tiny_config, tmp_path):
    """Matrices with learned scales are packed as integers and one scale per row, without log_scale."""
    model, config = make_bert_student(tiny_config, **values)
    tensors, _ = save(model, config, tmp_path)
    packed = [name.removesuffix(".codes") for name in tensors if name.endswith(".codes")]
    assert len(packed) == 2 * 6 + 1 and not any("log_scale" in name or name in packed for name in tensors)
    lowest, highest = [], []
    for name in packed:
        weight, scale = model.get_parameter(name), tensors[name + ".scale"]
        assert scale.shape == (len(weight), 1) and scale.dtype == torch.float32
        assert tensors[name + ".codes"].nbytes == weight.numel() * config.weight_bits // 8
        if "word" in name:  # rows of a table are not multiplied: they have the usual grid
            continue
        codes = unpack(tensors[name + ".codes"], config.weight_bits, weight.numel()).view_as(weight)
        lowest.append(int(codes.min()))
        highest.append(int(codes.max()))
        if config.weights == "lsq":
            by_hand = (weight.detach().double() / scale.double()).round().clamp(*ends)
            assert (codes != by_hand).float().mean() < 1e-3  # a tie in float32
    assert (min(lowest), max(highest)) == ends


def test_students_that_do_not_fit_their_config(tiny_config, tokenizer_bytes, tmp_path):
    model, config = make_student(tiny_config)
    name = "encoder.layers.0.ffn.up.weight"
    codes, quant = save(model, config, tmp_path)[0][name + ".codes"].clone(), asdict(config)
    for changes, message in (
        (dict(tensors={name + ".codes": codes[:-1]}), "has shape"),
        (dict(tensors={name + ".codes": codes.float()}), "is torch.float32, expected torch.uint8"),
        (dict(tensors={name + ".scale": torch.ones(3)}), "has shape"),
        (dict(drop=[name + ".scale"]), f"tensor {name}.scale is missing"),
        (dict(tensors={"x.codes": codes}), "unexpected tensor x.codes"),
        (dict(settings={"quant": {"bits": 8}}), "is damaged or of another version"),
        (dict(settings={"quant": {**quant, "weight_bits": 9}}), "weight_bits=9: choose 2 to 8"),
        (dict(settings={"quant": {**quant, "weights": "ternary"}}), "weights=ternary has 2 bits"),
        (dict(settings={"config": {}}), "is damaged or of another version"),
        (dict(tensors={"tokenizer": torch.zeros(9, dtype=torch.uint8)}), "SentencePiece"),
    ):
        _, path = save(model, config, tmp_path, tokenizer_bytes)
        refused(load_student, rewritten(path, **changes), message)


def test_random_damage_is_refused_in_one_line(tiny_config, tokenizer_bytes, tmp_path):
    model, config = make_student(replace(tiny_config, num_layers=1))
    _, student = save(model, config, tmp_path, tokenizer_bytes)
    plain, rng = saved(build_model(tiny_config), tmp_path / "m.safetensors"), random.Random(0)
    for path, read in ((student, read_student), (plain, read_model)):
        with open(path, "rb") as file:
            whole = file.read()
        for _ in range(50):
            data, at = bytearray(whole), rng.choice([rng.randrange(len(whole)), rng.randrange(2000)])
            kind = rng.randrange(3)
            if kind == 0:
                data[at : at + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(9))
            elif kind == 1:
                del data[at:]
            else:
                data[at] ^= 1 << rng.randrange(8)
            if data == whole:
                continue
            with open(path, "wb") as file:
                file.write(data)
            with pytest.raises(UserError) as error:
                read(path)
            assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------- tensor trains
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_packed_cores_reach_the_ends_of_their_grid(bits, tiny_config, tmp_path):
    model, config = make_train_student(tiny_config, weight_bits=bits)
    tensors, path = save(model, config, tmp_path)
    cores = [name.removesuffix(".codes") for name in tensors if ".cores." in name and name.endswith(".codes")]
    assert len(cores) == 2 * 3 + 9 * 4 and sum(name.endswith(".codes") for name in tensors) == len(cores) + 1
    assert not any("log_scale" in name for name in tensors)
    extremes = set()
    for name in cores:
        core, packed, scale = model.get_parameter(name), tensors[name + ".codes"], tensors[name + ".scale"]
        assert scale.shape == () and len(packed) == -(-core.numel() * bits // 8)
        codes = unpack(packed, bits, core.numel())
        by_hand = (core.detach() / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        assert torch.equal(codes.float(), by_hand.flatten())
        extremes |= {int(codes.min()), int(codes.max())}
    assert min(extremes) == -(2 ** (bits - 1)) and max(extremes) == 2 ** (bits - 1) - 1
    ids, mask = random_ids([9, 4], tiny_config.vocab_size)
    for a, b in zip(model(ids, mask)[0], fake_quantized(read_student(path))(ids, mask)[0], strict=True):
        assert torch.equal(a, b)
    whole = asdict(model.config)
    refused(
        read_student, rewritten(path, settings={"config": {**whole, "tt": {**whole["tt"], "rank": 3}}}), "has shape"
    )
    refused(read_student, rewritten(path, settings={"config": {**whole, "tt": None}}), "is missing")


@pytest.fixture
def joint_config(tiny_config):
    return replace(tiny_config, head="joint", num_slots=5)


WHOLE = TTConfig(rank=4, embedding_rank=5, table_modes=4, keep=())


def model_of_trains(config, tt=WHOLE):
    return initialize(meta_model(replace(config, tt=tt))).eval()


def test_model_of_tensor_trains_round_trip(joint_config, tmp_path):
    tt = replace(WHOLE, keep=("head.dense", "encoder.layers.1"))
    model = model_of_trains(joint_config, tt)
    again = load_model(saved(model, tmp_path / "trains.safetensors"))
    assert again.config == replace(joint_config, tt=tt) and isinstance(again.config.tt.keep, tuple)
    assert sum(isinstance(module, TensorTrain) for module in again.modules()) == 9
    state, expected = again.state_dict(), model.state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in expected)


def test_new_head_of_tensor_trains_round_trip(joint_config, tmp_path):
    """As train.py builds it: with_head makes a dense head, tensorize replaces its layers."""
    base = model_of_trains(replace(joint_config, head="none", num_labels=0, num_slots=0))
    model = with_head(base, "joint", 3, 5).eval()
    assert set(tensorize(model, WHOLE).replaced) == {"head.dense", "head.intent.dense"}
    again, (ids, mask) = load_model(saved(model, tmp_path / "head.safetensors")), random_ids([9, 5], 442)
    for found, logits in zip(again(ids, mask)[0], model(ids, mask)[0], strict=True):
        assert torch.equal(found, logits)


def test_docstrings():
    assert doctest.testmod(checkpoint, extraglobs={"torch": torch}).failed == 0

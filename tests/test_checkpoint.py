"""checkpoint.py: models and packed students come back from their files bit for bit, at the size that the bits promise."""

import os
from dataclasses import replace

import pytest
import torch
from conftest import random_ids

import checkpoint
from checkpoint import check_config, fake_quantized, load_model, meta_model, pack, read_model, read_student, unpack
from kit.common import UserError
from kit.files import read_tensors, write_tensors
from lsq import LearnedScale
from model import ModelConfig, build_model, initialize, with_head
from prepare import calibrate, default_keep, prepare
from quant import QuantConfig
from tt import TensorTrain, TTConfig, tensorize

TRAINS = TTConfig(rank=4, embedding_rank=5, modes=2, table_modes=3, keep=())
FORMATS = {read_model: "sdq-model-2", read_student: "sdq-student-7"}
UP = "encoder.layers.0.ffn.up.weight"


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "x.safetensors")


def save_student(path, student, config, tokenizer=b"x", **notes):
    """The bytes of the file, and the tensors in it."""
    size = checkpoint.save_student(path, student, config, tokenizer, notes)
    assert size == os.path.getsize(path)
    return size, read_tensors(path, FORMATS[read_student], "")[0]


# ----------------------------------------------------------------------------------- float models
def model_of_trains(config, tt):
    return initialize(meta_model(replace(config, tt=tt))).eval()


@pytest.mark.parametrize("kind", ["dense", "float16", "trains", "new head"])
def test_model_round_trip(kind, tiny_config, path):
    config = replace(tiny_config, head="joint", num_slots=5)
    if kind == "trains":
        model = model_of_trains(config, replace(TRAINS, keep=("head.dense", "encoder.layers.1")))
    elif kind == "new head":  # as train.py builds it: with_head makes a dense head, tensorize replaces its layers
        tt = TTConfig(rank=4, embedding_rank=5, table_modes=4, keep=())
        model = with_head(model_of_trains(replace(config, head="none", num_labels=0, num_slots=0), tt), "joint", 3, 5)
        assert set(tensorize(model.eval(), tt).replaced) == {"head.dense", "head.intent.dense"}
    else:
        model = build_model(config).eval().to(torch.float16 if kind == "float16" else torch.float32)
    notes = {"name": "ä", "labels": "a\tb"}
    assert checkpoint.save_model(path, model, b"abc", notes) == os.path.getsize(path)
    read, again = read_model(path), load_model(path)
    assert read.config == again.config == model.config and not again.training
    assert read.notes == notes and bytes(read.vocabulary.tolist()) == b"abc"
    state, expected = again.state_dict(), model.float().state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in state)
    ids, mask = random_ids([9, 5], tiny_config.vocab_size)
    assert all(map(torch.equal, again(ids, mask)[0], model(ids, mask)[0]))


CONFIGS = [({"hidden_size": 30, "num_heads": 4}, "not divisible"), ({"vocab_size": 0}, "is 0, not a number from 1 to")]
CONFIGS += [({"num_layers": 10**6}, "is 1000000"), ({"hidden_size": "x"}, "is 'x'"), ({"num_heads": True}, "is True")]


@pytest.mark.parametrize(("values", "message"), [*CONFIGS, ({"dropout": 2.0}, "dropout is 2.0")])
def test_model_configs_are_checked(values, message):
    assert check_config(ModelConfig()) == ModelConfig()
    with pytest.raises(UserError, match=message):
        check_config(ModelConfig(**values))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_pack_round_trip(bits, count, monkeypatch):
    """All of two's complement, in several pieces."""
    monkeypatch.setattr(checkpoint, "CHUNK", 104)
    low = -(2 ** (bits - 1))
    codes = torch.arange(low, -low, dtype=torch.int8).repeat(-(-count // -(2 * low)))[:count]
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-count * bits // 8)
    assert torch.equal(unpack(packed, bits, count), codes)
    assert unpack(torch.zeros(bits, dtype=torch.uint8), bits, 8).tolist() == [low] * 8
    assert pack(torch.tensor([-7, 7, 0]), 4).tolist() == [0b1111_0001, 0b0000_1000]  # by hand


# --------------------------------------------------------------------------------------- students
# Also used by test_int8.py.
def calibrated(model, config):
    """(model, config), the ranges of static quantizers set."""
    if config.act_range != "dynamic":
        calibrate(model, [random_ids([9, 9], model.config.vocab_size)])
    return model, config


def make_student(tiny_config, **values):
    """A fake-quantized model and its QuantConfig."""
    model, config = build_model(tiny_config).eval(), QuantConfig(**values)
    prepare(model, config)
    return calibrated(model, config)


@torch.no_grad()
def make_bert_student(tiny_config, **values):
    """Larger weights than at the start, and learned scales that clip some values, as after training."""
    model = build_model(replace(tiny_config, position_offset=0, type_vocab_size=2, pad_id=0)).eval()
    for parameter in model.parameters():
        parameter.mul_(3)
    prepare(model, config := QuantConfig(**values))
    calibrated(model, config)
    for name, parameter in model.named_parameters():
        if name.endswith(("log_scale", "log_step")):
            parameter -= 0.3
    return model, config


@torch.no_grad()
def make_train_student(tiny_config, tt=TRAINS, **values):
    """Tensor trains with larger cores than at the start, and scales that clip some of them, as after training."""
    model = model_of_trains(replace(tiny_config, num_layers=1, head="joint", num_slots=5), tt)
    for module in model.modules():
        if isinstance(module, TensorTrain):
            module.reset_parameters(std=0.1)
        elif isinstance(module, torch.nn.Linear):
            module.weight.mul_(5)
    prepare(model, config := QuantConfig(**{"keep": default_keep(tt), **values}))
    for module in model.modules():
        if isinstance(module, LearnedScale):
            module.log_scale -= 0.6
    return calibrated(model, config)


STUDENTS = [
    {},
    {"weight_bits": 3, "weight_range": "mse"},
    {"weights": "pq", "act_range": "static"},
]  # more: test_int8.py


@pytest.mark.parametrize("values", STUDENTS, ids=str)
def test_packed_student_gives_the_same_bits(values, tiny_config, tokenizer_bytes, path, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK", 1000)  # in several pieces
    model, config = make_student(tiny_config, **values)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_student(path, model, config, tokenizer_bytes, max_length="32")
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert not changed or config.weights == "pq"  # which finds the centroids at its first use
    read = read_student(path)
    assert read.quant == config and read.max_length == 32
    assert checkpoint.tokenizer_of(path, read).bytes == tokenizer_bytes
    again = fake_quantized(read)
    ids, mask = random_ids([9, 4], tiny_config.vocab_size)
    with torch.no_grad():
        assert torch.equal(model(ids, mask)[0], again(ids, mask)[0])


SIZES = [(make, {"weight_bits": bits}) for make in (make_student, make_train_student) for bits in (8, 4, 2)]
SIZES += [(make_student, {"weight_bits": 32}), (make_student, {"weight_bits": 2, "weights": "ternary"})]


@pytest.mark.parametrize(("make", "values"), SIZES, ids=str)
def test_file_size_by_the_formula(make, values, tiny_config, tokenizer_bytes, path):
    """b bits per quantized weight; 4 bytes per scale and per other parameter; the tokenizer; a line per tensor."""
    model, config = make(replace(tiny_config, hidden_size=64, ffn_size=128), **values)
    size, tensors = save_student(path, model, config, tokenizer_bytes)
    parameters = {name: p.numel() for name, p in model.named_parameters() if "log_scale" not in name}
    packed = {name: count for name, count in parameters.items() if name + ".codes" in tensors}
    matrices = (442 * 64 + 2 * (4 * 64 * 64 + 2 * 64 * 128)) * (config.weight_bits < 32)
    assert make is make_train_student or sum(packed.values()) == matrices
    scales = sum(1 if ".cores." in name else len(model.get_parameter(name)) for name in packed)
    content = sum(-(-count * config.weight_bits // 8) for count in packed.values()) + 4 * scales
    content += 4 * (sum(parameters.values()) - sum(packed.values())) + len(tokenizer_bytes)
    assert sum(tensor.nbytes for tensor in tensors.values()) == content
    assert content < size < content + 130 * len(tensors) + 1500


ENDS = [({"weights": "ternary", "weight_bits": 2}, (-1, 1)), ({"weights": "lsq", "weight_bits": 4}, (-8, 7))]
ENDS += [({"weights": "lsq"}, (-64, 64)), ({"weights": "lsq", "grid": "full"}, (-127, 127))]
ENDS += [({"weights": "lsq", "weight_bits": 2, "weight_range": "lsq"}, (-2, 1))]
ENDS = [(make_bert_student, *each) for each in ENDS]
ENDS += [(make_train_student, {"weight_bits": bits}, (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)) for bits in (8, 4, 2)]


@pytest.mark.parametrize(("make", "values", "ends"), ENDS, ids=str)
def test_packed_codes_by_hand(make, values, ends, tiny_config, path):
    """Codes reach the ends of their grid. Learned scales are packed as one per row, or core, without log_scale."""
    (model, config), trains = make(tiny_config, **values), make is make_train_student
    _, tensors = save_student(path, model, config)
    names = [name.removesuffix(".codes") for name in tensors if name.endswith(".codes")]
    assert len(names) == (2 * 3 + 9 * 4 + 1 if trains else 2 * 6 + 1)
    assert not any("log_scale" in name or name in names for name in tensors)
    found = []
    for name in names:
        weight, packed, scale = model.get_parameter(name), tensors[f"{name}.codes"], tensors[f"{name}.scale"]
        assert scale.shape == (() if ".cores." in name else (len(weight), 1))
        # Rows of a table are not multiplied, and have the usual grid; so has what stays dense beside tensor trains.
        if trains == (".cores." in name) and (trains or "word" not in name):
            codes = unpack(packed, config.weight_bits, weight.numel()).view_as(weight)
            found += [int(codes.min()), int(codes.max())]
            kind, ties = (torch.float32, 0) if trains else (torch.float64, 1e-3)
            by_hand = (weight.detach().to(kind) / scale.to(kind)).round().clamp(*ends)
            assert config.weights == "ternary" or (codes != by_hand).float().mean() <= ties
    assert (min(found), max(found)) == ends


def test_a_weight_that_waits_for_its_stage_is_not_saved(tiny_config, path):
    model, config = make_student(tiny_config, weights="pq")
    model.encoder.layers[0].ffn.up.weight_quantizer.waiting = True
    with pytest.raises(AssertionError, match="waits for its stage"):
        save_student(path, model, config)


# ------------------------------------------------------------- files whose parts do not fit each other
MISFITS = [  # reader, what is done to the tensors and settings of a file, message
    (read_model, lambda t, s: t.pop(UP), f"tensor {UP} is missing"),
    (read_model, lambda t, s: t.update(spare=torch.zeros(1)), "unexpected tensor spare"),
    (read_model, lambda t, s: t.update({UP: t[UP].T}), "has shape"),
    (read_model, lambda t, s: t.update({UP: t[UP].bfloat16()}), "is torch.bfloat16, expected"),
    (read_model, lambda t, s: t.update({UP: t[UP] * torch.inf}), "not finite"),
    (read_model, lambda t, s: s["config"].update(spare=1), "damaged or of another version"),
    (read_model, lambda t, s: s["config"].update(num_layers=10**9), "num_layers is 1000000000"),
    (read_model, lambda t, s: s["config"].update(tt={"rank": 0, "keep": []}), "rank=0"),
    (read_student, lambda t, s: t.update({UP + ".codes": t[UP + ".codes"][1:]}), "has shape"),
    (read_student, lambda t, s: s["quant"].update(weights="ternary"), "weights=ternary has 2 bits"),
]


@pytest.mark.parametrize(("read", "change", "message"), MISFITS)
def test_parts_that_do_not_fit(read, change, message, tiny_config, path):
    if read is read_model:
        checkpoint.save_model(path, build_model(tiny_config), b"abc", {})
    else:
        save_student(path, *make_student(tiny_config))
    read(path)
    tensors, settings = read_tensors(path, FORMATS[read], "")
    change(tensors, settings)
    write_tensors(path, tensors, FORMATS[read], settings)
    with pytest.raises(UserError, match=message):
        read(path)


@pytest.mark.parametrize("kind", ["missing", "earlier version", "other format"])
@pytest.mark.parametrize(
    ("name", "advice"),
    [("x/student.pt", "train.py"), ("x/model.pt", "convert.py NAME"), ("teachers/x.pt", "delete it")],
)
def test_what_to_do_about_another_file(kind, name, advice, tmp_path):
    path, read = str(tmp_path / name), read_student if "student" in name else read_model
    write_tensors(path, {}, "sdq-state-4")
    if kind == "earlier version":
        torch.save({"format": "sdq-student-6"}, path)
    elif kind == "missing":
        os.remove(path)
    with pytest.raises(UserError, match=advice) as error:
        read(path)
    assert path in str(error.value) and ("earlier version" in str(error.value)) == (kind == "earlier version")


def test_a_tokenizer_must_fit_its_model(tiny_config, tokenizer_bytes, path):
    checkpoint.save_model(path, build_model(replace(tiny_config, vocab_size=5)), tokenizer_bytes, {})
    with pytest.raises(UserError, match="its tokenizer has .* its model 5"):
        checkpoint.tokenizer_of(path, read_model(path))

"""checkpoint.py: round trips of checkpoints and packed students; every damaged, truncated or tampered
file raises a one-line UserError.
"""

import doctest
import os
from dataclasses import replace

import pytest
import torch
from conftest import random_ids

import checkpoint
from checkpoint import (
    check_config,
    checkpoint_payload,
    default_keep,
    load_checkpoint,
    load_student,
    meta_model,
    pack,
    read_student,
    save_atomically,
    student_payload,
    unpack,
)
from kit.common import UserError
from lsq import LearnedScale
from model import ModelConfig, build_model, initialize, with_head
from prepare import calibrate, prepare
from quant import QuantConfig, quant_range
from tt import TensorTrain, TTConfig, tensorize


def raises_one_line(load, path, message):
    """Check that load(path) raises a UserError of one line that contains the message."""
    with pytest.raises(UserError) as error:
        load(str(path))
    assert message in str(error.value) and "\n" not in str(error.value)


def accepts_only_intact(load, payload, damaged, folder):
    """Check that load() accepts the payload and raises for each damaged one.  damaged: kind -> (payload, message)."""
    for kind, (changed, message) in damaged.items():
        torch.save(changed, folder / f"{kind}.pt")
        raises_one_line(load, folder / f"{kind}.pt", message)
    torch.save(payload, folder / "student.pt")
    load(str(folder / "student.pt"))


# --------------------------------------------------------------------------------- float32 models
def test_checkpoint_round_trip(tiny_config, tmp_path):
    model = build_model(tiny_config).eval()
    path = str(tmp_path / "m.pt")
    assert save_atomically(checkpoint_payload(model, b"abc"), path) == os.path.getsize(path)
    again = load_checkpoint(path)
    assert again.config == tiny_config and not again.training
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert os.listdir(tmp_path) == ["m.pt"]


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /nonexistent-folder/evil",))


SMALL = ModelConfig(8, 4, 1, 1, 4, 8)


def damaged_checkpoints(config):
    """What is wrong -> (the payload, what the error says)."""
    good = checkpoint_payload(build_model(config), b"abc")
    tensors = good["tensors"]
    first = next(iter(tensors))

    def with_config(**values):
        return {**good, "config": {**good["config"], **values}}

    def with_first(tensor):
        return {**good, "tensors": {**tensors, first: tensor}}

    without_first = {name: tensor for name, tensor in tensors.items() if name != first}
    repeated = torch.zeros(1).expand(tensors[first].shape)
    return {
        "pickled code": (Evil(), "pickled code"),
        "foreign": ({"weight": torch.zeros(2)}, "not a checkpoint of this project"),
        "list": ([1, 2], "not a checkpoint of this project"),
        "missing": ({**good, "tensors": without_first}, "is missing"),
        "extra": ({**good, "tensors": {**tensors, "spare": torch.zeros(1)}}, "unexpected tensor spare"),
        "shape": (with_first(torch.zeros(3, 3)), "has shape (3, 3)"),
        "dtype": (with_first(tensors[first].bfloat16()), "torch.bfloat16"),
        "config": (with_config(num_layers=10**6), "num_layers is 1000000"),
        "text in config": (with_config(hidden_size="x"), "hidden_size is 'x'"),
        "unknown field": (with_config(spare=1), "model config is damaged"),
        "repeated element": (with_first(repeated), "claims more elements than the file holds"),
        "no tensors": ({**good, "tensors": None}, "holds no tensors"),
    }


@pytest.mark.parametrize("kind", damaged_checkpoints(SMALL))
def test_damaged_checkpoints(kind, tmp_path):
    payload, message = damaged_checkpoints(SMALL)[kind]
    path = tmp_path / "bad.pt"
    torch.save(payload, path)
    raises_one_line(load_checkpoint, path, message)


@pytest.mark.parametrize("length", [0, 10, 500, 0.5, 0.99])
def test_truncated_checkpoints(length, tiny_config, tmp_path):
    path = tmp_path / "cut.pt"
    save_atomically(checkpoint_payload(build_model(tiny_config), b"abc"), str(path))
    data = path.read_bytes()
    path.write_bytes(data[: int(length * len(data)) if isinstance(length, float) else length])
    with pytest.raises(UserError, match="damaged|pickled code"):
        load_checkpoint(str(path))


def test_failed_save_leaves_no_file(tmp_path):
    class Unpicklable:
        def __reduce__(self):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        save_atomically({"x": Unpicklable()}, str(tmp_path / "x.pt"))
    assert os.listdir(tmp_path) == []


def test_model_configs_are_checked():
    assert check_config(ModelConfig()) == ModelConfig()
    for values, message in (
        ({"hidden_size": 30, "num_heads": 4}, "not divisible"),
        ({"head": "lm"}, "unknown head"),
        ({"head": "token"}, "num_labels"),
        ({"head": "joint", "num_labels": 2}, "num_slots"),
        ({"tt": TTConfig()}, "whole embedding table"),
        ({"pad_id": 250002}, "outside the vocabulary"),
        ({"vocab_size": 0}, "vocab_size is 0, not an integer from 1 to"),
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


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"weight_bits": 4},
        {"weight_bits": 3, "weight_range": "mse"},
        {"weight_bits": 2, "per_channel": False, "weight_range": "mse"},
        {"per_channel": False, "per_token": False},
        {"act_range": "static"},
        {"weight_bits": 32},
        {"act_bits": 32},
    ],
    ids=str,
)
def test_packed_student_gives_the_same_bits(values, tiny_config, tokenizer_bytes, tmp_path):
    model, config = make_student(tiny_config, **values)
    path = str(tmp_path / "student.pt")
    size = save_atomically(student_payload(model, config, tokenizer_bytes, task="xnli"), path)
    assert size == os.path.getsize(path)
    again, tokenizer = load_student(path)
    ids, mask = random_ids([9, 4], tiny_config.vocab_size)
    with torch.no_grad():
        assert torch.equal(model(ids, mask)[0], again(ids, mask)[0])
    assert tokenizer.bytes == tokenizer_bytes


def test_packing_in_several_chunks(tiny_config, tokenizer_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK", 1000)
    model, config = make_student(tiny_config, weight_bits=5)
    path = str(tmp_path / "student.pt")
    save_atomically(student_payload(model, config, tokenizer_bytes), path)
    ids, mask = random_ids([9, 4], tiny_config.vocab_size)
    with torch.no_grad():
        assert torch.equal(model(ids, mask)[0], load_student(path)[0](ids, mask)[0])


def test_file_size_follows_the_bits(tmp_path):
    shape = ModelConfig(4000, 128, 2, 2, 512, 64, head="sequence", num_labels=3)
    sizes = {}
    for bits in (32, 8, 4, 2):
        model, config = make_student(shape, weight_bits=bits)
        payload = student_payload(model, config, b"x")
        sizes[bits] = save_atomically(payload, str(tmp_path / "student.pt"))
    quantized = 4000 * 128 + 2 * (4 * 128 * 128 + 2 * 128 * 512)
    for bits in (8, 4, 2):
        saved = sizes[32] - sizes[bits]
        scales = 4 * (4000 + 2 * (4 * 128 + 512 + 128))
        assert saved == pytest.approx(quantized * (4 - bits / 8) - scales, rel=0.01)


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
def test_packed_codes_reach_the_ends_of_their_grid(values, ends, tiny_config):
    """Matrices with learned scales are packed as integers and one scale per row, without log_scale."""
    model, config = make_bert_student(tiny_config, **values)
    payload = student_payload(model, config, b"x")
    assert len(payload["packed"]) == 2 * 6 + 1
    assert not any("scale" in name or name in payload["packed"] for name in payload["tensors"])
    lowest, highest = [], []
    for name, entry in payload["packed"].items():
        weight = model.get_parameter(name)
        assert entry["scale"].shape == (len(weight), 1)
        assert entry["codes"].nbytes == weight.numel() * config.weight_bits // 8
        if "word" in name:  # rows of a table are not multiplied: they have the usual grid
            continue
        codes = unpack(entry["codes"], config.weight_bits, weight.numel()).view_as(weight)
        lowest.append(int(codes.min()))
        highest.append(int(codes.max()))
        if config.weights == "lsq":
            by_hand = (weight.detach().double() / entry["scale"].double()).round().clamp(*ends)
            assert (codes != by_hand).float().mean() < 1e-3  # a tie in float32
    assert (min(lowest), max(highest)) == ends


def damaged_students(payload):
    """What is wrong -> (the payload, what the error says)."""
    name = "encoder.layers.0.ffn.up.weight"
    entry = payload["packed"][name]

    def packed(**values):
        return {**payload, "packed": {**payload["packed"], name: {**entry, **values}}}

    def quant(**values):
        return {**payload, "quant": {**payload["quant"], **values}}

    without = {k: v for k, v in payload["packed"].items() if k != name}
    repeated = torch.zeros(1, dtype=torch.uint8).expand(len(entry["codes"]))
    return {
        "short": (packed(codes=entry["codes"][:-1]), "has shape"),
        "type": (packed(codes=entry["codes"].float()), "is torch.float32, expected torch.uint8"),
        "scale": (packed(scale=torch.ones(3)), "has shape"),
        "repeated element": (packed(codes=repeated), "more elements than the file holds"),
        "bits as float": (quant(weight_bits=8.0), "weight_bits is 8.0"),
        "bits out of range": (quant(weight_bits=9), "weight_bits=9: choose 2 to 8"),
        "extra key": (packed(spare=1), "is damaged"),
        "grid": (packed(codes=torch.full_like(entry["codes"], 127 + 100)), "outside the grid"),
        "missing": ({**payload, "packed": without}, "is missing"),
        "unexpected": ({**payload, "packed": {**payload["packed"], "x.weight": entry}}, "no place in the model"),
        "quant": ({**payload, "quant": {"bits": 8}}, "damaged"),
        "config": ({**payload, "config": {}}, "model config is damaged"),
        "tokenizer": ({**payload, "tokenizer": torch.zeros(9, dtype=torch.uint8)}, "SentencePiece"),
    }


def test_tampered_students(tiny_config, tokenizer_bytes, tmp_path):
    model, config = make_student(tiny_config)
    payload = student_payload(model, config, tokenizer_bytes)
    accepts_only_intact(load_student, payload, damaged_students(payload), tmp_path)


# -------------------------------------------------------------------------- students of tensor trains
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_packed_cores_reach_the_ends_of_their_grid(bits, tiny_config):
    model, config = make_train_student(tiny_config, weight_bits=bits)
    packed = student_payload(model, config, b"x")["packed"]
    cores = {name: entry for name, entry in packed.items() if ".cores." in name}
    assert len(cores) == 2 * 3 + 9 * 4 and len(packed) == len(cores) + 1
    extremes = set()
    for name, entry in cores.items():
        core = model.get_parameter(name)
        assert entry["scale"].shape == ()
        assert len(entry["codes"]) == -(-core.numel() * bits // 8)
        codes = unpack(entry["codes"], bits, core.numel())
        by_hand = (core.detach() / entry["scale"]).round()
        by_hand = by_hand.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        assert torch.equal(codes.float(), by_hand.flatten())
        extremes |= {int(codes.min()), int(codes.max())}
    assert min(extremes) == -(2 ** (bits - 1)) and max(extremes) == 2 ** (bits - 1) - 1


def test_file_size_of_tensor_trains(tiny_config, tokenizer_bytes, tmp_path):
    sizes = {}
    for bits in (8, 4, 2):
        shape = replace(tiny_config, hidden_size=64, ffn_size=128)
        model, config = make_train_student(shape, TTConfig(8, 12), weight_bits=bits)
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
    elements = sum(p.numel() for p in replaced)
    assert sizes[8] - sizes[4] == pytest.approx(elements * 4 / 8, rel=0.1)
    assert sizes[4] - sizes[2] == pytest.approx(elements * 2 / 8, rel=0.2)


def damaged_cores(payload):
    """What is wrong -> (the payload, what the error says)."""
    name = "encoder.layers.0.ffn.up.cores.1"
    entry = payload["packed"][name]

    def packed(**values):
        return {**payload, "packed": {**payload["packed"], name: {**entry, **values}}}

    def without(kind, name):
        return {**payload, kind: {k: v for k, v in payload[kind].items() if k != name}}

    moved = {**payload["packed"], "encoder.layers.0.ffn.up.cores.4": entry}
    rank = {**payload["config"], "tt": {**payload["config"]["tt"], "rank": 3}}
    return {
        "short": (packed(codes=entry["codes"][:-1]), "has shape"),
        "type": (packed(codes=entry["codes"].float()), "is torch.float32, expected torch.uint8"),
        "scale per row": (packed(scale=torch.ones(4, 1)), "has shape"),
        "scale in float64": (packed(scale=torch.ones((), dtype=float)), "is torch.float64"),
        "missing": (without("packed", name), f"packed tensor {name} is missing"),
        "missing in a table": (
            without("packed", "encoder.embeddings.word.cores.0"),
            "packed tensor encoder.embeddings.word.cores.0 is missing",
        ),
        "one too many": ({**payload, "packed": moved}, "cores.4 has no place in the model"),
        "other ranks": ({**payload, "config": rank}, "has shape"),
        "no tensor trains": ({**payload, "config": {**payload["config"], "tt": None}}, "has no place in the model"),
        "log scale": (
            {**payload, "tensors": {**payload["tensors"], "x.log_scale": torch.ones(())}},
            "unexpected tensor x.log_scale",
        ),
    }


def test_tampered_cores(tiny_config, tokenizer_bytes, tmp_path):
    model, config = make_train_student(tiny_config, weight_bits=4)
    payload = student_payload(model, config, tokenizer_bytes)
    accepts_only_intact(read_student, payload, damaged_cores(payload), tmp_path)


def test_docstrings():
    assert doctest.testmod(checkpoint, extraglobs={"torch": torch}).failed == 0


TERNARY = QuantConfig(weight_bits=2, weights="ternary")
TRAINS = TTConfig(rank=4, embedding_rank=5, table_modes=4, keep=())


@pytest.fixture
def joint_config(tiny_config):
    return replace(tiny_config, head="joint", num_slots=5)


def model_of_trains(config, tt=TRAINS):
    return initialize(meta_model(replace(config, tt=tt))).eval()


# ------------------------------------------------------------------------------- ternary students
def ternary_payload(shape, tokenizer=b"x"):
    """(the parameters of a ternary student, the dictionary of its file)."""
    model = build_model(shape).eval()
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    prepare(model, TERNARY)
    return parameters, student_payload(model, TERNARY, tokenizer)


def test_size_of_a_ternary_student(tiny_config, tokenizer_bytes, tmp_path):
    shape = replace(tiny_config, hidden_size=128, ffn_size=512, vocab_size=2000)
    parameters, payload = ternary_payload(shape, tokenizer_bytes)
    size = save_atomically(payload, str(tmp_path / "student.pt"))
    packed = payload["packed"]
    assert len(packed) == 2 * 6 + 1
    codes = 0
    for name, entry in packed.items():
        count = parameters[name].numel()
        assert entry["codes"].numel() * entry["codes"].element_size() == count // 4
        assert entry["codes"].nbytes * 8 == torch.empty(count, dtype=torch.int16).nbytes
        assert entry["scale"].shape == (len(parameters[name]), 1)
        assert entry["scale"].dtype == torch.float32
        codes += entry["codes"].nbytes
    rest = {name: p for name, p in parameters.items() if name not in packed}
    assert payload["tensors"].keys() == rest.keys()
    floats = 4 * sum(p.numel() for p in rest.values())
    scales = 4 * sum(len(parameters[name]) for name in packed)
    content = codes + floats + scales + len(tokenizer_bytes)
    tensors = 2 * len(packed) + len(rest) + 1  # in the archive
    assert content < size < content + 400 * tensors
    assert size == (tmp_path / "student.pt").stat().st_size
    assert 16 * codes == 4 * sum(parameters[name].numel() for name in packed)  # of float32


@pytest.mark.parametrize("at", ["first", "last", "all"])
@pytest.mark.parametrize("name", ["encoder.layers.1.ffn.up", "encoder.embeddings.word"])
def test_codes_that_are_not_ternary_raise(name, at, tiny_config, tmp_path):
    """Two bits can also hold -2."""
    _, payload = ternary_payload(tiny_config)
    entry = payload["packed"][name + ".weight"]
    codes = torch.zeros(entry["codes"].numel() * 4)
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
        assert f"{name}.weight has codes outside the grid" in str(error.value)
        assert "\n" not in str(error.value)


def test_ternary_file_with_other_bits_raises(tiny_config, tmp_path):
    _, payload = ternary_payload(tiny_config)
    payload["quant"]["weight_bits"] = 4
    torch.save(payload, tmp_path / "student.pt")
    with pytest.raises(UserError) as error:
        read_student(str(tmp_path / "student.pt"))
    assert "weights=ternary has 2 bits, not weight_bits=4" in str(error.value)


# ---------------------------------------------------------------------------------- tensor trains
def trains_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, TensorTrain)}


def test_checkpoint_of_tensor_trains_bit_for_bit(joint_config, tmp_path):
    tt = replace(TRAINS, keep=("head.dense", "encoder.layers.1"))
    model = model_of_trains(joint_config, tt)
    path = str(tmp_path / "trains.pt")
    save_atomically(checkpoint_payload(model, b"x"), path)
    again = load_checkpoint(path)
    assert again.config == replace(joint_config, tt=tt)
    assert isinstance(again.config.tt.keep, tuple)
    assert set(trains_of(again)) == set(trains_of(model)) and len(trains_of(again)) == 9
    state, expected = again.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    ids, mask = random_ids([9, 5], 442)
    for found, logits in zip(again(ids, mask)[0], model(ids, mask)[0], strict=True):
        assert torch.equal(found, logits)


def test_older_checkpoints_still_load(tiny_config, tmp_path):
    model = build_model(tiny_config).eval()
    payload = checkpoint_payload(model, b"x")
    del payload["config"]["tt"], payload["config"]["num_slots"]
    path = str(tmp_path / "older.pt")
    save_atomically(payload, path)
    again = load_checkpoint(path)
    assert again.config == tiny_config and again.config.tt is None
    ids, mask = random_ids([9, 5], 442)
    assert torch.equal(again(ids, mask)[0], model(ids, mask)[0])
    del payload["config"]["num_labels"]  # every version had that one
    save_atomically(payload, path)
    with pytest.raises(UserError, match="damaged or of another version"):
        load_checkpoint(path)


def test_damaged_settings_of_tensor_trains_raise(joint_config, tmp_path):
    model = model_of_trains(replace(joint_config, num_layers=1))
    path, payload = str(tmp_path / "damaged.pt"), checkpoint_payload(model, b"x")
    whole = payload["config"]["tt"]
    for damage in (
        5,
        "rank",
        {},
        {"rank": 4},
        {**whole, "more": 1},
        {**whole, "keep": 3},
        {**whole, "keep": [1]},
        {**whole, "rank": 0},
        {**whole, "rank": 4.0},
        {**whole, "modes": 99},
    ):
        payload["config"]["tt"] = damage
        save_atomically(payload, path)
        with pytest.raises(UserError, match="the model config is damaged or of another version"):
            load_checkpoint(path)
    payload["config"]["tt"] = {**whole, "rank": 5}
    save_atomically(payload, path)
    with pytest.raises(UserError, match="has shape"):
        load_checkpoint(path)


def test_missing_and_misshapen_cores_raise(joint_config, tmp_path):
    payload = checkpoint_payload(model_of_trains(replace(joint_config, num_layers=1)), b"x")
    name = "encoder.layers.0.ffn.up.cores.1"
    core = payload["tensors"].pop(name)
    path = str(tmp_path / "damaged.pt")
    for tensors, message in (
        ({}, f"tensor {name} is missing"),
        ({name: core[:-1]}, f"tensor {name} has shape"),
        ({name: core, "encoder.layers.0.ffn.up.cores.6": core}, "unexpected tensor"),
    ):
        save_atomically({**payload, "tensors": {**payload["tensors"], **tensors}}, path)
        with pytest.raises(UserError, match=message):
            load_checkpoint(path)


def test_new_head_of_tensor_trains_round_trip(joint_config, tmp_path):
    """As train.py builds it: with_head makes a dense head, tensorize replaces its layers."""
    base = model_of_trains(replace(joint_config, head="none", num_labels=0, num_slots=0))
    model = with_head(base, "joint", 3, 5).eval()
    assert set(tensorize(model, TRAINS).replaced) == {"head.dense", "head.intent.dense"}
    path = str(tmp_path / "head.pt")
    save_atomically(checkpoint_payload(model, b"x"), path)
    ids, mask = random_ids([9, 5], 442)
    for found, logits in zip(load_checkpoint(path)(ids, mask)[0], model(ids, mask)[0], strict=True):
        assert torch.equal(found, logits)


def test_tied_head_has_no_tensor_trains(tiny_config):
    with pytest.raises(UserError, match="an mlm head needs the whole embedding table"):
        check_config(replace(tiny_config, head="mlm", tt=TTConfig()))
    model = model_of_trains(tiny_config)
    with pytest.raises(UserError, match="mlm head"):
        check_config(with_head(model, "mlm", 0).config)

"""Files of tensors (kit/files.py) are those of the safetensors package; damaged ones are refused in one line."""

import json
import random
import resource
import time

import pytest
import torch
from test_checkpoint import make_student

from checkpoint import fake_quantized, load_model, read_student, save_model, save_student
from kit.common import UserError
from kit.files import DTYPES, map_tensors, read_tensors, write_tensors
from model import ModelConfig, build_model

CONFIG = ModelConfig(8, 8, 1, 2, 8, 8, head="sequence", num_labels=2)


def test_the_safetensors_package_reads_and_writes_the_same(tmp_path):
    tensors = {name: torch.randint(0, 2, (3, 5)).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(0.5), "none": torch.zeros(0, 4), "view": torch.arange(6.0).view(2, 3).T}
    ours, theirs = str(tmp_path / "ours"), str(tmp_path / "theirs")
    settings = {"text": 'ä"\\', "values": [1, 0.5, None, {"x": []}]}
    assert write_tensors(ours, tensors, "f", settings) == (tmp_path / "ours").stat().st_size
    read_tensors(ours, "f", "")[0]["scalar"].fill_(2)  # does not reach the file
    found, again = read_tensors(ours, "f", "")
    assert again == settings
    safetensors = pytest.importorskip("safetensors.torch", reason="compares with the safetensors package")
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.save_file(tensors, theirs, {"format": "pt"})
    mapped, metadata = map_tensors(theirs, "")
    assert metadata == {"format": "pt"}
    for each in (found, mapped, safetensors.load_file(ours)):
        assert set(each) == set(tensors)
        for name, tensor in tensors.items():
            assert each[name].dtype == tensor.dtype and each[name].shape == tensor.shape
            assert torch.equal(each[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def test_the_safetensors_package_opens_a_student(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="compares with the safetensors package")
    save_student(str(tmp_path / "x"), *make_student(CONFIG), b"abc", {})
    found, student = safetensors.load_file(str(tmp_path / "x")), read_student(str(tmp_path / "x"))
    assert bytes(found.pop("tokenizer").tolist()) == b"abc"
    for name, (codes, scale) in student.weights.items():
        assert torch.equal(found.pop(name + ".codes").view(codes.shape).int() - 128, codes.int())
        assert torch.equal(found.pop(name + ".scale"), scale)
    assert found.keys() == student.tensors.keys() and all(torch.equal(found[n], t) for n, t in student.tensors.items())


def entry(begin, end, shape=(4,), dtype="U8"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


LIES = [{"a": entry(0, 4), "b": entry(2, 6)}, {"a": entry(0, 2, [2])}, {"a": entry(1, 5)}, {"a": 1}, [], 3]
LIES += [{"a": entry(0, 4, shape)} for shape in ([5], [-4], [-2, -2], [2**70], [4.0], ["4"], 4, None, [[4]], [1] * 99)]
LIES += [{"a": entry(0, 0, [0, *[10**4000] * 99])}, {"a": entry(0, 4, dtype="X")}, {"a": entry(4, 0)}]
LIES += [{"a": entry(0, 10**9)}]
LIES += ["[" * 10**6, '{"a":' * 10**5, "9" * 10**6, '{"a": ', "\xff"]
LIES += ['{"a": X, "a": Y}'.replace("X", json.dumps(entry(0, 2, [2]))).replace("Y", json.dumps(entry(2, 4, [2])))]


def refused(read, path):
    """Whether a file is refused, in one line. To read it takes less than 2 seconds and 200 MB."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        read(str(path))
        return False
    except UserError as error:
        assert "\n" not in str(error)
        return True
    finally:
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KB
        assert time.process_time() - started < 2 and grown < 200_000


@pytest.mark.parametrize("header", LIES, ids=range(len(LIES)))
def test_headers_that_lie(header, tmp_path):
    text = (header if isinstance(header, str) else json.dumps(header)).encode("latin-1")
    for length in (len(text), 2**62):
        (tmp_path / "x").write_bytes(length.to_bytes(8, "little") + text + bytes(4))
        assert refused(lambda path: map_tensors(path, "again"), tmp_path / "x")


def test_flipped_bits_and_every_length(tmp_path):
    path = tmp_path / "x"
    write_tensors(path, {"a": torch.arange(3.0), "b": torch.tensor([7], dtype=torch.uint8)}, "f", {"x": 1})
    data = path.read_bytes()
    flips = [(bit // 8, 1 << bit % 8) for bit in range(8 * len(data)) if bit < 64 or bit % 3 == 0]
    damaged = [data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :] for at, flip in flips]
    for changed in [*damaged, *(data[:length] for length in range(len(data)))]:
        path.write_bytes(changed)
        assert refused(lambda path: read_tensors(path, "f", "again"), path), changed


def damaged_bytes(data, rng):
    """A bit flipped, or a part cut off, removed, repeated or overwritten."""
    at, length = rng.randrange(len(data)), rng.choice((1, 8, 200))
    start, rest = data[:at], data[at + length :]
    flipped = start + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    return rng.choice((flipped, start, start + rest, data[: at + length] + data[at:], start + b"0" * length + rest))


def damaged_value(value, rng):
    """Nested settings of which one is missing, renamed, or something else."""
    if not isinstance(value, dict) or not value or rng.random() < 0.1:
        return rng.choice((None, True, -1, 0, 10**9, 10**20, 0.5, "", "x", [], {}, [[[]]], {"x": 1}))
    rest = dict(value)
    old = rest.pop(key := rng.choice(list(value)))
    return rng.choice((rest, {**rest, "x": old}, {**rest, key: damaged_value(old, rng)}))


@pytest.mark.parametrize("kind", ["model", "uniform", "pq"])
def test_damaged_files(kind, tmp_path, request):
    sound, path, rng = tmp_path / "sound", tmp_path / "x", random.Random(kind)
    if kind == "model":
        save_model(sound, build_model(CONFIG), b"x", {"labels": "a"})
        format, read = "sdq-model-2", load_model
    else:
        save_student(sound, *make_student(CONFIG, weights=kind), b"x", {"labels": "a"})
        format, read = "sdq-student-7", lambda path: fake_quantized(read_student(path))
    data, (tensors, settings) = sound.read_bytes(), read_tensors(sound, format, "")
    assert not refused(read, sound)
    for case in range(request.config.getoption("--fuzz")):
        path.write_bytes(changed := damaged_bytes(data, rng))
        assert refused(read, path) or changed == data, case
        write_tensors(path, tensors, format, {name: damaged_value(each, rng) for name, each in settings.items()})
        refused(read, path)  # or what does not matter was changed

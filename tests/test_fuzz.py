"""Damaged files of every format that is read: each is loaded correctly, or refused in one line within 2 seconds and 1
GB. `python -m pytest tests/test_fuzz.py --fuzz 2000` tries 2,000 cases of each format instead of 25.
"""

import copy
import io
import json
import os
import pickle
import random
import resource
import shutil
import time
import zipfile

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT, SAMPLE, TOKENIZER

import convert
from checkpoint import (
    check_archive,
    checkpoint_payload,
    float_model,
    load_checkpoint,
    load_untrusted,
    read_student,
    save_atomically,
    student_payload,
)
from config import TrainConfig
from data import batches
from data.tasks import own_labels, read_own, read_xnli
from data.tokenizer import Tokenizer, load_tokenizer
from data.tokenizer_json import read_tokenizer_json
from kit.common import UserError
from model import ModelConfig, build_model
from prepare import prepare
from quant import QuantConfig
from run import Data, Run, Training
from tools import compare
from train import make_optimizers

FOLDER = os.path.join(ROOT, "tests", "golden_folder")
CONFIG = ModelConfig(442, 32, 1, 4, 64, 64, head="sequence", num_labels=3, dropout=0.0)


# -------------------------------------------------------------------------------------- mutations
def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, a part cut off, removed, repeated, overwritten, or something inserted."""
    at, length = rng.randrange(len(data)), rng.choice((1, 8, 200, 5000))
    kind = rng.randrange(7)
    if kind < 2:
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 3))):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    return (
        data[:at],
        data[:at] + data[at + length :],
        data[: at + length] + data[at:],
        data[:at] + bytes(rng.choice((0, 255)) for _ in range(length)) + data[at + length :],
        data[:at] + rng.randbytes(length) + data[at:],
    )[kind - 2]


def strange(rng: random.Random, old: object) -> object:
    """Something else in the place of a value: another type, or a tensor of another shape, type or layout."""
    tensor = old if isinstance(old, torch.Tensor) and old.dim() else torch.zeros(3, 2)
    return rng.choice(
        (
            *(
                None,
                True,
                -1,
                0,
                1,
                10**9,
                10**20,
                2**63,
                0.5,
                float("nan"),
                "",
                "x",
                "../x",
                [],
                {},
                (),
                [[[]]],
                {"x": 1},
            ),
            *(tensor.flatten(), tensor[:0], tensor.repeat(2, *[1] * (tensor.dim() - 1)) if tensor.dim() else tensor),
            *(tensor.double(), tensor.to(torch.int64), tensor.bool(), tensor.to(torch.complex64)),
            *(
                torch.zeros(1).expand(10**6),
                torch.zeros(1).expand(tensor.shape or (1,)),
                torch.full_like(tensor.float(), torch.nan),
            ),
            *(
                tensor.float().to_sparse() if tensor.dim() else tensor,
                torch.empty(3, device="meta"),
                tensor.mT if tensor.dim() > 1 else 3,
            ),
        )
    )


def damage_value(value: object, rng: random.Random) -> object:
    """A nested structure of dictionaries and lists in which one thing is missing, renamed, added or something else."""
    value = copy.copy(value)
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not keys or rng.random() < 0.05:
        return strange(rng, value)
    key = rng.choice(keys)
    if isinstance(value[key], (dict, list)) and len(value[key]) and rng.random() < 0.85:
        value[key] = damage_value(value[key], rng)
    elif rng.random() < 0.6:
        value[key] = strange(rng, value[key])
    elif isinstance(value, list):
        value[key:] = [] if rng.random() < 0.5 else value[key:] * 2
    else:
        old = value.pop(key)
        if rng.random() < 0.5:
            value[rng.choice(("x", "", 3, None, "a.b", "../x"))] = old
    return value


# ---------------------------------------------------------------------------------------- formats
def formats(folder: str) -> dict:
    """Name -> (path of a sound file, reader, value that is stored in it or None, whether a checksum covers it)."""
    torch.manual_seed(0)
    with open(TOKENIZER, "rb") as file:
        vocabulary = file.read()
    model, paths = build_model(CONFIG), {}

    def saved(name: str, payload: dict) -> str:
        paths[name] = os.path.join(folder, name)
        save_atomically(payload, paths[name])
        return paths[name]

    checkpoint = checkpoint_payload(model, vocabulary, name="x")
    students = {}
    for weights, bits in (("uniform", 4), ("pq", 8)):
        quant = QuantConfig(weights=weights, weight_bits=bits, act_range="static")
        student = copy.deepcopy(model)
        prepare(student, quant)
        for module in student.modules():
            if hasattr(module, "set_range"):
                module.set_range(torch.tensor(0.1), torch.tensor(0.0))
        students[weights] = student_payload(student, quant, vocabulary, task="xnli", labels="a\tb\tc")

    # A run with a state in the middle of training.
    settings = TrainConfig(task="xnli", model="scratch", weight_range="minmax", epochs=1, steps=4, batch_size=2)
    dataset = batches.dataset_of([np.array([0, 5, 6, 2], dtype=np.int32)] * 8, [0, 1] * 4)
    run = Run(os.path.join(folder, "run"), settings, torch.device("cpu"), resume=False)
    run.start("x", Data(dataset, dataset, {"en": dataset}), [])
    trained = copy.deepcopy(model)
    training = Training(run, "fp32", trained, make_optimizers(trained), dataset)
    for step, (_, batch) in enumerate(training.steps()):
        trained(batch.ids)[0].sum().backward()
        [optimizer.step() for optimizer in training.optimizers]
        if step == 2:
            training.select({"score": 1.0}, "1")
            break
    training.step = 3
    training.save()
    run.resume = True

    def resume(path: str) -> dict:
        shutil.copy(path, run.path("state.pt")) if path != run.path("state.pt") else None
        again = copy.deepcopy(model)
        loaded = Training(run, "fp32", again, make_optimizers(again), dataset)
        if loaded.step:  # and a step with what was loaded
            again(dataset_batch.ids)[0].sum().backward()
            [optimizer.step() for optimizer in loaded.optimizers]
        return {"step": loaded.step}

    dataset_batch = batches.collate(dataset, np.arange(2))
    state = load_untrusted(run.path("state.pt"), "")

    def tensors_of(path: str) -> dict:
        return load_checkpoint(path).state_dict()

    def student_of(path: str) -> dict:
        return float_model(read_student(path)).state_dict()

    def folder_of(name: str, source: str):
        """A reader of a Hugging Face folder in which one file is replaced."""

        def read(path: str) -> dict:
            target = os.path.join(folder, "hf-" + name)
            if not os.path.isdir(target):
                shutil.copytree(source, target)
                if source.startswith(GOLDEN + os.sep):
                    shutil.copy(TOKENIZER, target)
            shutil.copy(path, os.path.join(target, name))
            return convert.convert_tensors("x", *convert.read_folder(target))["tensors"]

        return os.path.join(source, name), read

    def rows_of(path: str) -> dict:
        if path != os.path.join(folder, "own", "train.tsv"):
            shutil.copy(path, os.path.join(folder, "own", "train.tsv"))
        own_labels.cache_clear()
        read_own.cache_clear()
        return read_own(os.path.join(folder, "own"), "train")

    def xnli_of(path: str) -> dict:
        target = os.path.join(folder, "xnli", "XNLI-1.0")
        os.makedirs(target, exist_ok=True)
        shutil.copy(path, os.path.join(target, "xnli.test.tsv"))
        read_xnli.cache_clear()
        return read_xnli(os.path.join(folder, "xnli"), "test")

    def table_of(path: str) -> dict:
        return {0: {}, 2: None}[compare.main([path])]

    os.makedirs(os.path.join(folder, "own"))
    with open(os.path.join(folder, "own", "train.tsv"), "w", encoding="utf-8") as file:
        file.write("text\tlabel\tlanguage\n" + "gut\tja\tde\nschlecht\tnein\tde\n" * 20)
    results = os.path.join(ROOT, "results", "xnli-e5", "w8-pt-static-s0.json")
    with open(results, encoding="utf-8") as file:
        stored = json.load(file)
    binary = torch.load(os.path.join(GOLDEN, "bin", "pytorch_model.bin"), weights_only=True)
    with open(os.path.join(FOLDER, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    with open(os.path.join(FOLDER, "tokenizer.json"), encoding="utf-8") as file:
        tokenizer = json.load(file)
    return {
        "checkpoint": (saved("checkpoint.pt", checkpoint), tensors_of, checkpoint, True),
        "student": (saved("student.pt", students["uniform"]), student_of, students["uniform"], True),
        "student of pq": (saved("pq.pt", students["pq"]), student_of, students["pq"], True),
        "state": (run.path("state.pt"), resume, state, True),
        "pytorch_model.bin": (*folder_of("pytorch_model.bin", os.path.join(GOLDEN, "bin")), binary, True),
        "safetensors": (*folder_of("model.safetensors", os.path.join(GOLDEN, "seq")), None, False),
        "config.json": (*folder_of("config.json", FOLDER), config, False),
        "index": (*folder_of("model.safetensors.index.json", FOLDER), None, False),
        "tokenizer.json": (
            os.path.join(FOLDER, "tokenizer.json"),
            lambda path: read_tokenizer_json(path)[0],
            tokenizer,
            False,
        ),
        "SentencePiece": (TOKENIZER, Tokenizer.from_file, None, False),
        "vocab.txt": (*folder_of("vocab.txt", os.path.join(ROOT, "tests", "golden_bert")), None, False),
        "results.json": (results, table_of, stored, False),
        "own rows": (os.path.join(folder, "own", "train.tsv"), rows_of, None, False),
        "XNLI": (os.path.join(SAMPLE, "XNLI-1.0", "xnli.test.tsv"), xnli_of, None, False),
    }


def write_value(path: str, value: object, name: str) -> None:
    if name.endswith(".json"):
        with open(path, "w", encoding="utf-8") as file:
            json.dump(value, file, default=str)
    else:
        torch.save(value, path)


def equal(one: dict, two: dict) -> bool:
    return set(one) == set(two) and all(
        torch.equal(a, two[name]) if isinstance(a, torch.Tensor) else a == two[name] for name, a in one.items()
    )


@pytest.fixture(scope="module")
def all_formats(tmp_path_factory):
    return formats(str(tmp_path_factory.mktemp("sound")))


NAMES = (
    "checkpoint, student, student of pq, state, pytorch_model.bin, safetensors, config.json, index, tokenizer.json, "
)
NAMES += "SentencePiece, vocab.txt, results.json, own rows, XNLI"


@pytest.mark.parametrize("name", NAMES.split(", "))
def test_damaged_files(name, all_formats, tmp_path, request, capsys):
    path, read, value, checked = all_formats[name]
    sound, rng = read(path), random.Random(name)
    with open(path, "rb") as file:
        data = file.read()
    damaged = str(tmp_path / os.path.basename(path))
    counts = {"refused": 0, "loaded": 0}
    for case in range(request.config.getoption("--fuzz")):
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        in_bytes = value is None or case % 2 == 0
        if in_bytes:
            with open(damaged, "wb") as file:
                file.write(damage_bytes(data, rng))
        else:
            try:
                write_value(damaged, damage_value(value, rng), path)
            except (RuntimeError, TypeError, NotImplementedError, ValueError, OverflowError, pickle.PicklingError):
                continue  # this can't even be written
        try:
            found = read(damaged)
            counts["refused" if found is None else "loaded"] += 1
            if checked and in_bytes:
                assert equal(found, sound), f"case {case}: other weights, without a word"
        except UserError as error:
            counts["refused"] += 1
            assert "\n" not in str(error), f"case {case}"
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert time.process_time() - started < 2 and grown < 1 << 20, f"case {case}: {grown / 1024:.0f} MB"
        capsys.readouterr()
    assert counts["refused"] > 0
    with capsys.disabled():
        if request.config.getoption("--fuzz") > 100:
            print(f"{name}: {counts}")


# ------------------------------------------------------------------------ more than the file holds
@pytest.mark.parametrize("compressed", [False, True])
def test_pickles_that_ask_for_memory(compressed, tmp_path):
    """A call of bytearray(6 * 10^9), plainly and in an archive; the old format with a storage of 10^12 numbers."""
    bomb = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\xbc\xa0\x65\x01\x85R."
    path = str(tmp_path / "bomb.pt")
    with open(path, "wb") as file:
        file.write(bomb)
    with pytest.raises(UserError):
        load_untrusted(path, "delete it")
    archive = io.BytesIO()
    torch.save({"x": torch.zeros(3)}, archive)
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w", kind) as new:
        for name in old.namelist():
            zeros = compressed and name.endswith("data/0")
            new.writestr(name, bytes(10**8) if zeros else bomb if name.endswith("data.pkl") else old.read(name))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="holds pickled code" if not compressed else "is damaged"):
        load_untrusted(path, "delete it")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@pytest.mark.parametrize("kind", ["name in capitals", "archive appended", "storage of any size", "two pickles"])
def test_archives_that_hide_a_pickle(kind, tmp_path):
    """What PyTorch would read is what is scanned."""
    bomb = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\xbc\xa0\x65\x01\x85R."
    untyped = b"\x80\x02ctorch.storage\nUntypedStorage\n\x8a\x05\x00\xbc\xa0\x65\x01\x85R."
    archive, path = io.BytesIO(), str(tmp_path / "x.pt")
    torch.save({"x": torch.zeros(3)}, archive)
    changed = io.BytesIO()
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(changed, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            if not name.endswith("data.pkl"):
                new.writestr(name, old.read(name))
            elif kind == "name in capitals":
                new.writestr(name.replace("data.pkl", "DATA.PKL"), bomb)
            elif kind == "storage of any size":
                new.writestr(name, untyped)
            else:
                new.writestr(name, old.read(name))
        if kind == "two pickles":
            new.writestr("other/data.pkl", bomb)
    with open(path, "wb") as file:
        file.write((bomb if kind == "archive appended" else b"") + changed.getvalue())
    with pytest.raises(UserError, match="holds pickled code|is damaged"):
        load_untrusted(path, "delete it")


def test_every_flipped_bit_of_a_storage_is_noticed(tmp_path):
    path = str(tmp_path / "x.pt")
    torch.save({"x": torch.arange(100.0)}, path)
    with zipfile.ZipFile(path) as archive:
        (info,) = (each for each in archive.infolist() if each.filename.endswith("data/0"))
    with open(path, "rb") as file:
        data = file.read()
    start = data.index(torch.arange(100.0).numpy().tobytes())
    for bit in range(0, 8 * info.file_size, 7):
        changed = bytearray(data)
        changed[start + bit // 8] ^= 1 << bit % 8
        with open(path, "wb") as file:
            file.write(changed)
        with pytest.raises(ValueError):
            check_archive(path)


def test_tokenizers_of_any_bytes():
    rng = random.Random(0)
    for size in (0, 1, 100, 10_000):
        for start in (b"", b"sdq-words-1\n", b"sdq-wordpiece-1 lower\n"):
            with pytest.raises(UserError):
                load_tokenizer(start + rng.randbytes(size) + b"\xff", "x")

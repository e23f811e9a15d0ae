import copy
import json
import os
import random
import sys

import numpy as np
import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SAMPLE = os.path.join(ROOT, "tests", "sample")
FLIGHTS = os.path.join(ROOT, "data", "atis-sample")
GOLDEN = os.path.join(ROOT, "tests", "golden")
TOKENIZER = os.path.join(SAMPLE, "sentencepiece.bpe.model")
sys.path.insert(0, ROOT)

# The tensors of the tests are tiny: more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the programs that tests start
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=25, help="damaged files to try per format (tests/test_fuzz.py)")
    parser.addoption("--kills", type=int, default=3, help="how often to kill a run (tests/test_kill.py)")


DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture
def nothing_downloaded(tmp_path, monkeypatch):
    """A fresh checkout: no weights/ and no data/raw."""
    for module in ("config", "checkpoint"):
        monkeypatch.setattr(f"{module}.WEIGHTS_DIR", str(tmp_path / "weights"))
    for module in ("config", "train", "data.tasks"):
        monkeypatch.setattr(f"{module}.RAW_DIR", str(tmp_path / "raw"))


@pytest.fixture(scope="session")
def tokenizer():
    from data.tokenizer import Tokenizer

    return Tokenizer.from_file(TOKENIZER)


@pytest.fixture(scope="session")
def tokenizer_bytes():
    with open(TOKENIZER, "rb") as file:
        return file.read()


@pytest.fixture
def tiny_config():
    from model import ModelConfig

    return ModelConfig(
        vocab_size=442,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        ffn_size=64,
        max_tokens=64,
        head="sequence",
        num_labels=3,
    )


@pytest.fixture
def models(tiny_config):
    """(teacher, student): a model that is far from its initialization, and its copy in 3 bits."""
    from model import build_model
    from prepare import prepare
    from quant import QuantConfig

    teacher = build_model(tiny_config).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    student = copy.deepcopy(teacher)
    prepare(student, QuantConfig(weight_bits=3))
    return teacher, student.eval()


def random_ids(lengths, vocab, device="cpu"):
    """(ids, mask) of rows with the given lengths, padded on the right with 1."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(4, vocab - 1, mask.shape).masked_fill(~mask, 1)
    return ids.to(device), mask.to(device)


def batch(lengths):
    """A Batch of rows with the given lengths for tiny_config, without a mask if none is padded."""
    from data.batches import Batch

    ids, mask = random_ids(lengths, 442)
    return Batch(ids, None if mask.all() else mask, torch.zeros(len(lengths)), sum(lengths))


# ----------------------------------------------------------------------------- train.py on a sample
SCRATCH = f"--model scratch-1x32 --tokenizer {TOKENIZER}".split()
SMALL = [*SCRATCH, "--data-dir", SAMPLE, *"--max-length 32 --languages de zh --device cpu --precision float32".split()]


def run(tmp_path, *options, out="run"):
    """train.main in this process, with a small model on the sample, in tmp_path/out."""
    import train

    return train.main([*SMALL, "--epochs", "1", "--out", str(tmp_path / out), *options])


def results(tmp_path, out="run"):
    with open(tmp_path / out / "results.json", encoding="utf-8") as file:
        return json.load(file)


def log_of(tmp_path, out="run"):
    """The records of log.jsonl."""
    with open(tmp_path / out / "log.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def answer(capsys, *command):
    """(status, the error line) of a train.main that must end with one line; argparse exits itself."""
    import train

    try:
        status = train.main(list(command))
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: "), captured.err
    return status, captured.err

import copy
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

import train
from checkpoint import save_model
from data.batches import Batch
from data.tokenizer import Tokenizer, WordPieceTokenizer
from model import ModelConfig, build_model
from prepare import prepare
from quant import QuantConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SAMPLE = os.path.join(ROOT, "tests", "sample")
FLIGHTS = os.path.join(ROOT, "data", "atis-sample")
GOLDEN = os.path.join(ROOT, "tests", "golden")
TOKENIZER = os.path.join(SAMPLE, "sentencepiece.bpe.model")

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
    for module in ("config", "checkpoint", "data.tasks"):
        monkeypatch.setattr(f"{module}.RAW_DIR", str(tmp_path / "raw"))


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.from_file(TOKENIZER)


@pytest.fixture(scope="session")
def tokenizer_bytes():
    with open(TOKENIZER, "rb") as file:
        return file.read()


@pytest.fixture
def tiny_config():
    sizes = dict(vocab_size=442, hidden_size=32, num_layers=2, num_heads=4, ffn_size=64, max_tokens=64)
    return ModelConfig(**sizes, head="sequence", num_labels=3)


@pytest.fixture
def models(tiny_config):
    """(teacher, student): a model that is far from its initialization, and its copy in 3 bits."""
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
    ids, mask = random_ids(lengths, 442)
    return Batch(ids, None if mask.all() else mask, torch.zeros(len(lengths)), sum(lengths))


# ----------------------------------------------------------------------------- train.py on a sample
SCRATCH = f"--model scratch-1x32 --tokenizer {TOKENIZER}".split()
SMALL = [*SCRATCH, "--data-dir", SAMPLE, *"--max-length 32 --languages de zh --device cpu --precision float32".split()]


def run(tmp_path, *options, out="run"):
    """train.main in this process, with a small model on the sample, in tmp_path/out."""
    return train.main([*SMALL, "--epochs", "1", "--out", str(tmp_path / out), *options])


def results(tmp_path, out="run"):
    return json.loads((tmp_path / out / "results.json").read_text(encoding="utf-8"))


def log_of(tmp_path, out="run"):
    """The records of log.jsonl."""
    return [json.loads(line) for line in (tmp_path / out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def answer(capsys, *command):
    """(status, the error line) of a train.main that must end with one line; argparse exits itself."""
    try:
        status = train.main(list(command))
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: "), captured.err
    return status, captured.err


# ------------------------------------------------------------------- made once; tests only read it
def user_run(folder, options):
    """(folder, output) of train.py in a process of its own, as a user would start it, in folder/run."""
    command = [sys.executable, os.path.join(ROOT, "train.py"), *options.split(), "--device", "cpu", "--out", "run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=170)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture(scope="session")
def xnli_run(tmp_path_factory):
    """Every method, in 15 languages, analyzed."""
    options = "--model scratch-2x32 --epochs 2 --max-length 32 --analyze --methods fp32 ptq ptq-static qat sdq"
    return user_run(tmp_path_factory.mktemp("xnli"), f"{options} --tokenizer {TOKENIZER} --data-dir {SAMPLE}")


@pytest.fixture(scope="session")
def flights_run(tmp_path_factory):
    """Words, intents and slots in quantized tensor trains, of a model that has learned some of them; analyzed."""
    options = "--task atis --model scratch-1x128 --tt-rank 8 --bits 4 --act-range static --weight-range mse --analyze"
    options += " --epochs 6 --student-epochs 1 --batch-size 8 --lr 1e-2 --dropout 0 --data-dir"
    return user_run(tmp_path_factory.mktemp("flights"), f"{options} {FLIGHTS}")


WORDS = "the my cat dog bird sees eats likes red blue small big house tree runs sleeps".split()


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """The file of a BERT with random weights: token types, words in pieces."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters, *("##" + c for c in letters)]
    tokenizer = WordPieceTokenizer.from_vocab("".join(f"{word}\n" for word in vocabulary).encode(), lower=True)
    kind = dict(position_offset=0, type_vocab_size=2, pad_id=0, head="pooler", max_tokens=128)
    sizes = dict(vocab_size=len(vocabulary), hidden_size=32, num_layers=2, num_heads=4, ffn_size=64)
    path = str(tmp_path_factory.mktemp("bert") / "tiny.safetensors")
    torch.manual_seed(0)
    save_model(path, build_model(ModelConfig(**sizes, **kind)), tokenizer.bytes, {})
    return path

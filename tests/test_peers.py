"""tools/peers.py: rows of other libraries in a finished run; the libraries themselves where they are installed."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import SAMPLE

import checkpoint
import train
from checkpoint import load_model
from data.tokenizer import SPECIALS, WORDPIECE_MAGIC
from model import PRESETS, build_model
from tools import peers
from tools.backends import random_sequences, relative_error
from tools.compare import METHOD_ORDER
from tools.compare import main as compare

OPTIONS = "--task xnli --languages de --max-train 64 --max-eval 60 --epochs 1 --methods fp32 ptq --analyze --threads 1"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("peers") / "run"
    assert train.main([*OPTIONS.split(), "--out", str(out)]) == 0
    return out


def rows_of(out):
    return json.loads((out / "results.json").read_text())["methods"]


def test_rows_are_added(finished, monkeypatch, capsys):
    """A made-up library that computes what ours does has float32's row."""
    assert set(peers.NEEDS) < set(METHOD_ORDER)
    monkeypatch.setattr(peers, "is_installed", lambda name: name.startswith("onnx"))
    monkeypatch.setattr(peers, "write_onnx", lambda model, path: torch.save(model, path))

    def load(path):
        model = torch.load(path, weights_only=False)
        return lambda ids, mask: model(ids, mask)[0]

    monkeypatch.setattr(peers, "load_onnx", load)
    before = rows_of(finished)
    for _ in range(2):  # once more: the same
        assert peers.main([str(finished)]) == 0
        found = rows_of(finished)
        times = [row.pop("milliseconds") for row in found.values()]
        assert all(set(each) == {"1", "32"} and min(each.values()) > 0 for each in times)
        assert [*found] == ["fp32", "ptq", "onnxruntime"] and found["ptq"] == before["ptq"]
        assert found["onnxruntime"]["languages"] == before["fp32"]["languages"]
        assert found["onnxruntime"]["size_bytes"] > 5e6
    out = capsys.readouterr().out
    assert "openvino: not measured, openvino and nncf not installed" in out
    assert "| onnxruntime |" in (finished / "report.md").read_text()
    assert compare([str(finished / "results.json")]) == 0 and "onnxruntime W8A8" in (table := capsys.readouterr().out)
    assert "| ms x 1 | ms x 32 |" in table
    assert train.main([*OPTIONS.split(), "--out", str(finished), "--resume"]) == 0  # not in the way of --analyze


def test_what_is_refused(finished, tmp_path, capsys):
    config = json.loads((finished / "config.json").read_text())
    for change, message in (
        ({"task": "atis"}, "one label or vector per text"),
        ({"nonsense": 1}, "holds no run of train.py"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        assert peers.main([str(tmp_path)]) == 2
        assert message in capsys.readouterr().err


def test_token_types_are_refused(tmp_path, capsys):
    """Other libraries' models are called without them."""
    wordpiece = "\n".join([f"{WORDPIECE_MAGIC} lower", *SPECIALS, *"abcd", ""]).encode()
    small = dict(vocab_size=450, hidden_size=32, num_layers=1, num_heads=4, ffn_size=64)
    model = build_model(replace(PRESETS["multilingual-e5-small"], **small))
    checkpoint.save_model(str(tmp_path / "bert.safetensors"), model, wordpiece, {})
    options = ["--model", str(tmp_path / "bert.safetensors"), *"--steps 1 --methods fp32 --languages de".split()]
    out = str(tmp_path / "run")
    assert train.main([*options, "--data-dir", SAMPLE, "--device", "cpu", "--out", out]) == 0
    assert peers.main([out]) == 2 and "has token types" in capsys.readouterr().err


@pytest.mark.parametrize("name", peers.NEEDS)
def test_libraries_lose_little(name, finished, monkeypatch):
    for package in peers.NEEDS[name]:
        pytest.importorskip(package)
    (teacher,) = (finished.parent / "teachers").iterdir()
    exact, ids = load_model(str(teacher)), random_sequences(8, 20, 1000)
    errors, evaluate = [], peers.evaluate_languages

    def measured(method, model, *rest):
        with torch.no_grad():
            errors.append(relative_error(model(ids, None, None)[0], exact(ids)[0]))
        return evaluate(method, model, *rest)

    monkeypatch.setattr(peers, "evaluate_languages", measured)
    monkeypatch.setattr(peers, "is_installed", lambda package: package in peers.NEEDS[name])
    assert peers.main([str(finished)]) == 0
    found = rows_of(finished)
    assert len(errors) == 1 and 0 < errors[0] < 0.3
    assert {language: row["total"] for language, row in found[name]["languages"].items()} == {"en": 60, "de": 60}
    assert found[name]["size_bytes"] < found["fp32"]["size_bytes"] / 2

"""predict.py: the same predictions as the report's, from files and standard input; and mistakes in one line."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import FLIGHTS, ROOT, SAMPLE

import predict
import train
from common import UserError

BERT = os.path.join(ROOT, "tests", "golden_bert")


def trained(out, *options):
    assert train.main([*options, "--methods", "qat", "--out", str(out)]) == 0
    with open(out / "results.json", encoding="utf-8") as file:
        return json.load(file)["methods"]["qat"]["languages"], str(out / "student.pt")


@pytest.fixture(scope="module")
def pairs():
    """The English test pairs of the sample: (first, second, label)."""
    with open(os.path.join(SAMPLE, "XNLI-1.0", "xnli.test.tsv"), encoding="utf-8") as file:
        rows = [line.split("\t") for line in file.read().splitlines()[1:]]
    return [(first, second, gold) for language, gold, first, second, _ in rows if language == "en"]


@pytest.fixture(scope="module", params=["roberta", "bert"])
def student(request, tmp_path_factory):
    """A student of the sample, with token types or without: (evaluations, file)."""
    import convert

    folder = tmp_path_factory.mktemp("student")
    model = "mini"
    if request.param == "bert":
        model = str(folder / "bert.pt")
        assert convert.main(["tiny", "--from", BERT, "--out", model]) == 0
    options = ("--task", "xnli", "--data-dir", SAMPLE, "--model", model, "--max-length", "32", "--steps", "9")
    return trained(folder / "run", *options)


def test_predictions_are_those_of_the_report(student, pairs):
    evaluations, path = student
    loaded = predict.load(path)
    found = list(predict.predict(loaded, [(first, second) for first, second, _ in pairs]))
    assert (
        sum(label == gold for (label, _), (*_, gold) in zip(found, pairs, strict=True)) == evaluations["en"]["correct"]
    )
    assert all(1 / 3 <= probability <= 1 for _, probability in found)
    # one by one: batches change nothing but the last bits
    for (label, probability), (first, second, _) in zip(found, pairs, strict=True):
        ((alone, again),) = predict.predict(loaded, [(first, second)])
        assert alone == label and abs(again - probability) < 1e-4


def test_command_line(student, pairs, tmp_path):
    _, path = student
    text = "\ufeff" + "".join(f"{first}\t{second}\n" for first, second, _ in pairs)
    file = tmp_path / "texts.tsv"
    file.write_text(text, encoding="utf-8")
    command = [sys.executable, os.path.join(ROOT, "predict.py"), path]
    of_file = subprocess.run([*command, str(file)], capture_output=True, text=True, encoding="utf-8")
    of_input = subprocess.run(command, input=text, capture_output=True, text=True, encoding="utf-8")
    assert of_file.returncode == of_input.returncode == 0 and of_file.stdout == of_input.stdout
    expected = predict.predict(predict.load(path), [(first, second) for first, second, _ in pairs])
    assert of_file.stdout.splitlines() == [f"{label}\t{probability:.4f}" for label, probability in expected]


def test_mistakes_are_one_line(student, tmp_path, capsys):
    _, path = student
    file = tmp_path / "texts.tsv"
    for text, message in (
        ("a\tb\tc\n", "line 1 has 3 texts"),
        ("a\tb\n\n", "line 2 is empty"),
        ("a\nb\tc\n", "some texts are pairs"),
        ("a\tb\n" * 1024 + "c\n", "some texts are pairs"),
    ):
        file.write_text(text)
        assert predict.main([path, str(file)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    file.write_bytes(b"\xff\xfe")
    assert predict.main([path, str(file)]) == 2 and "is not UTF-8" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert predict.main([path, str(file), "--device", "cuda"]) == 2 and "no CUDA" in capsys.readouterr().err
    assert predict.main([path, str(tmp_path / "none")]) == 2 and "none" in capsys.readouterr().err
    assert predict.main([str(file)]) == 2 and "error: " in capsys.readouterr().err


def test_no_text_gives_no_line(student, tmp_path, capsys):
    (tmp_path / "empty").write_text("")
    assert predict.main([student[1], str(tmp_path / "empty")]) == 0 and capsys.readouterr().out == ""


def test_tags_of_words(tmp_path):
    """A joint student: intent, probability and the tag of each word; as many as there are words."""
    options = ("--task", "atis", "--data-dir", FLIGHTS, "--model", "scratch", "--hidden", "128", "--layers", "1")
    evaluations, path = trained(tmp_path / "run", *options, "--epochs", "15", "--student-epochs", "1")
    loaded = predict.load(path)
    texts, tags, intents = (
        open(os.path.join(FLIGHTS, "test", name), encoding="utf-8").read().splitlines()
        for name in ("seq.in", "seq.out", "label")
    )
    for wrong, message in (([("a", "b")], "words with tags"), (["a " * 600], "602 tokens, the model takes 512")):
        with pytest.raises(UserError, match=message):
            list(predict.predict(loaded, wrong))
    found = list(predict.predict(loaded, texts))
    right = sum(intent == gold for (intent, _, _), gold in zip(found, intents, strict=True))
    assert right == evaluations["en"]["correct"]
    words = [
        a == b for (_, _, own), gold in zip(found, tags, strict=True) for a, b in zip(own, gold.split(), strict=True)
    ]
    assert 100 * sum(words) / len(words) == pytest.approx(evaluations["en"]["slot_token_f1"])

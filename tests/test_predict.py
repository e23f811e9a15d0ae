"""predict.py: labels of texts and evaluations, the same as the report's; a line for each mistake."""

import copy
import os
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import FLIGHTS, SAMPLE, SCRATCH, random_ids, results

import predict
import train
from data.files import read_examples
from data.metrics import slot_scores
from data.tasks import NLI_LABELS, find_task, load
from int8 import to_integer
from kit.common import UserError
from kit.run import STUDENT
from model import build_model
from prepare import calibrate, prepare
from quant import QuantConfig


def trained(folder, words):
    """(evaluations, file) of a student that was trained in folder/run."""
    assert train.main([*words.split(), "--device", "cpu", "--methods", "qat", "--out", str(folder / "run")]) == 0
    return results(folder)["methods"]["qat"]["languages"], str(folder / "run" / STUDENT)


@pytest.fixture(scope="module", params=["mini", "bert"])
def student(request, tmp_path_factory, bert):
    """A student of the sample, without token types or with them: (evaluations, file)."""
    model = {"mini": "mini", "bert": bert}[request.param]
    words = f"--data-dir {SAMPLE} --model {model} --max-length 32 --steps 9"
    return trained(tmp_path_factory.mktemp("student"), words)


@pytest.fixture(scope="module")
def pairs():
    """The English test pairs of the sample: (first, second), and their labels."""
    rows = load(find_task("xnli"), "test", "en", SAMPLE)
    return [(row.text_a, row.text_b) for row in rows], [NLI_LABELS[row.label] for row in rows]


# ------------------------------------------------------------------------------------------- labels
def test_predictions_are_those_of_the_report(student, pairs):
    evaluations, path = student
    loaded, (texts, labels) = predict.load(path), pairs
    found = list(predict.predict(loaded, texts))
    right = [label == gold for (label, _), gold in zip(found, labels, strict=True)]
    assert sum(right) == evaluations["en"]["correct"]
    assert np.packbits(right).tobytes().hex() == evaluations["en"]["correct_rows"]
    assert all(1 / 3 <= probability <= 1 for _, probability in found)
    assert list(predict.predict(loaded, texts[::-1]))[::-1] == found  # sorted by length for the model
    for (_, probability), text in zip(found, texts, strict=True):
        ((_, alone),) = predict.predict(loaded, [text])
        assert alone == pytest.approx(probability, abs=0.01)  # without padding a rounding may flip
    for again in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):  # as workers that are spawned get it
        assert list(predict.predict(again, texts)) == found


def test_command_line(student, pairs, tmp_path, capsys, monkeypatch):
    """From a file and from standard input; --compiled is tested in test_aot.py."""
    compiled = []
    monkeypatch.setattr(predict, "compile_layers", compiled.append)
    path, file = student[1], tmp_path / "texts.tsv"
    file.write_text("\ufeff" + "".join("\t".join(pair) + "\n" for pair in pairs[0]), encoding="utf-8")
    expected = "".join(f"{label}\t{p:.4f}\n" for label, p in predict.predict(predict.load(path), pairs[0]))
    assert predict.main([path, str(file)]) == 0 and capsys.readouterr().out == expected and not compiled
    assert predict.main([path, str(file), "--compiled"]) == 0 and capsys.readouterr().out == expected
    assert [type(model).__name__ for model in compiled] == ["Model"]
    before = os.dup(0)
    with open(file) as texts:
        os.dup2(texts.fileno(), 0)
    assert predict.main([path]) == 0
    os.dup2(before, 0)
    os.close(before)
    assert capsys.readouterr().out == expected
    file.write_text("")
    assert predict.main([path, str(file)]) == 0 and capsys.readouterr().out == ""


def test_one_bad_line_does_not_lose_the_others(student, pairs, tmp_path, capsys):
    """Blank lines keep their place; each line that can't be read is told with its number, and stays blank."""
    path, file, good = student[1], tmp_path / "texts.tsv", "\t".join(pairs[0][0])
    lines = [good, "", "one text", "a\tb\tc", "\tb", good, " \t", good]
    file.write_bytes("\n".join(lines).encode() + b"\n\xff\tb\n" + good.encode())
    assert predict.main([path, str(file)]) == 2
    captured = capsys.readouterr()
    rows = captured.out.split("\n")
    assert rows[0] and rows == [rows[0] if line == good else "" for line in lines] + ["", rows[0], ""]
    told = dict(re.findall(r"error: .*texts.tsv, line (\d+) (.*)", captured.err))
    assert told.pop("3").startswith("has 1 text, and this student reads two texts, separated by a tab")
    assert told.pop("4").startswith("has 3 texts, ")
    assert told == {"5": "has an empty first text", "9": "is not UTF-8 text (byte 0)"}
    assert captured.err.endswith("\nerror: lines without a label, see above: 4; in the output they are blank\n")
    file.write_text(f"{good}\n" * 1024 + f"a\n{good}\n")  # in the second part
    assert predict.main([path, str(file), "--threads", "1"]) == 2
    captured = capsys.readouterr()
    assert "line 1025 has 1 text" in captured.err and len(captured.out.split("\n")) == 1027


def test_mistakes_are_one_line(student, tmp_path, capsys):
    file = tmp_path / "texts.tsv"
    file.write_bytes("a\tb\n".encode("utf-16-be"))
    for words, message in (
        ([student[1], str(file)], "is UTF-16, or holds NUL bytes: save it as UTF-8"),
        ([student[1], str(tmp_path / "none")], "none"),
        ([str(file)], "texts.tsv"),
        ([student[1], "--evaluate", "--data-dir", SAMPLE, "--languages", "xx"], "--languages 'xx': xnli has ar bg de"),
    ):
        assert predict.main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_texts_that_a_student_does_not_read(student, capsys):
    """In Python: the first of them, by its number. Long ones are cut and counted."""
    loaded, pair = predict.load(student[1]), ("a", "b")
    for texts, message in (
        ("happy", "a list of texts, not a string"),
        ([pair, ("", "b")], "text 2 has an empty first text"),
        ([pair] * 1024 + ["a"], "text 1025 has 1 text, "),
    ):
        with pytest.raises(UserError, match=message):
            list(predict.predict(loaded, texts))
    list(predict.predict(loaded, [pair, ("a " * 40, "c"), ("a", "b " * 60)]))
    assert "NOTE: 2 of 3 texts are longer than 32 tokens and lose " in capsys.readouterr().err


def test_tags_of_words_by_brute_force(flights_run):
    """A joint student: intent, probability and the tag of each word. The report has the scores of these."""
    evaluation = results(flights_run[0])["methods"]["sdq"]["languages"]["en"]
    loaded = predict.load(str(flights_run[0] / "run" / STUDENT))
    texts, tags, intents = (
        open(os.path.join(FLIGHTS, "test", name), encoding="utf-8").read().splitlines()
        for name in ("seq.in", "seq.out", "label")
    )
    for wrong, message in (
        ([("a", "b")], "has 2 texts, and this student reads one"),
        (["a " * 600], "602 tokens, the model takes 512: split it"),
    ):
        with pytest.raises(UserError, match=message):
            list(predict.predict(loaded, wrong))
    predicted, _, own = zip(*predict.predict(loaded, texts), strict=True)
    labels = [each.split() for each in tags]
    right = [a == b for a, b in zip(predicted, intents, strict=True)]
    exact = [is_right and a == b for is_right, a, b in zip(right, own, labels, strict=True)]
    words = [a == b for each in zip(own, labels, strict=True) for a, b in zip(*each, strict=True)]
    expected = slot_scores(own, labels)
    assert 0 < expected["slot_f1"] < 100 and 0 < sum(exact) < sum(right) < len(texts)
    assert {name: evaluation[name] for name in expected} == expected
    assert (evaluation["correct"], evaluation["exact_correct"]) == (sum(right), sum(exact))
    assert evaluation["slot_token_f1"] == pytest.approx(100 * sum(words) / len(words))
    assert evaluation["score"] == pytest.approx((evaluation["accuracy"] + evaluation["slot_f1"]) / 2)


def test_a_long_sentence_of_words_is_split_as_in_training(tmp_path):
    """A tag for each word, the same as for its parts alone. White space within a word does not end it."""
    (tmp_path / "POS").mkdir()
    for name in ("en.train", "en.dev", "en.test"):
        (tmp_path / "POS" / name).write_text("the DET\ndog NOUN\nruns VERB\n\na DET\ncat NOUN\n\n" * 6)
    options = f"--task pos --data-dir {tmp_path} --model mini --max-length 16 --steps 2"
    loaded = predict.load(trained(tmp_path, options)[1])
    words = "the dog runs a cat".split() * 9
    ((whole,),) = predict.predict(loaded, [" ".join(words)])
    pieces, rows = [len(loaded.tokenizer.encode_words([[word]])[0][0]) - 2 for word in words], [[]]
    for i, count in enumerate(pieces):  # as many words per row as fit
        if sum(pieces[k] for k in rows[-1]) + count > 14:
            rows.append([])
        rows[-1].append(i)
    assert len(rows) > 3 and len(whole) == len(words) and loaded.max_length == 16
    alone = list(predict.predict(loaded, [" ".join(words[i] for i in row) for row in rows]))
    assert [tag for (tags,) in alone for tag in tags] == whole
    ((tags,), (one,)) = predict.predict(loaded, ["10\u00a0000 a\u3000b  dog", "x" * 900])
    assert len(tags) == 3 and len(one) == 1


# --------------------------------------------------------------------------------------- evaluation
def evaluate(capsys, path, words, status=0):
    """What predict.py --evaluate prints: the cells of the student's row and all of it, or the error."""
    capsys.readouterr()
    assert predict.main([str(path), "--evaluate", "--device", "cpu", *words.split()]) == status
    captured = capsys.readouterr()
    lines = [line for line in captured.out.splitlines() if re.match(r"\| (qat|sdq) ", line)]
    return [cell.strip() for cell in lines[0].split("|")[1:-1]] if lines else captured.err, captured.out


def test_a_student_is_evaluated_again(student, capsys, monkeypatch):
    """The figures of the report of the run that made it; texts are cut where they were in training."""
    seen, real = set(), predict.encode_split
    monkeypatch.setattr(predict, "encode_split", lambda *args: seen.add(args[5]) or real(*args))
    evaluations, path = student
    cells, output = evaluate(capsys, path, f"--data-dir {SAMPLE} --languages de sw")
    scores = [evaluations[language]["accuracy"] for language in ("en", "de", "sw")]
    assert cells[:3] == ["qat W8A8", f"{scores[0]:.2f}", f"{sum(scores[1:]) / 2:.2f}"] and seen == {32}
    assert cells[-2:] == [f"{score:.1f}" for score in scores[1:]] and "\nintegers, " in output
    monkeypatch.setattr(predict, "compile_layers", lambda model: seen.add("compiled"))
    output = evaluate(capsys, path, f"--data-dir {SAMPLE} --eval-split dev --max-eval 1 --compiled")[1]
    assert "compiled" in seen and ", compiled, " in output


def test_dynamic_ranges_per_tensor_get_one_row_at_a_time(tiny_config):
    """Else a prediction would depend on the batch; in the student and in the integer model made of it."""
    dynamic = dict(per_token=False, per_channel=False)
    for options, expected in (
        ({}, 1024), (dynamic, 1), (dynamic | dict(act_range="static"), 1024), (dynamic | dict(act_bits=32), 1024),
        (dict(act_bits=32, attention_bits=8, per_token=False), 1), (dict(attention_bits=8), 1024),
    ):  # fmt: skip
        model, quant = build_model(tiny_config).eval(), QuantConfig(**options)
        prepare(model, quant)
        if quant.act_range == "static":
            calibrate(model, [random_ids([9, 9], 442)])
        models = [model] if quant.act_bits == 32 else [model, to_integer(model, quant)]
        assert [predict.batch_tokens(each, torch.device("cpu")) for each in models] == [expected] * len(models)
        assert predict.batch_tokens(model, torch.device("cpu"), 4096) == (4096 if expected > 1 else 1)


def test_a_joint_student_is_evaluated_again(flights_run, tmp_path, capsys, monkeypatch):
    """In smaller batches; with the same intents and slots only: others are other ids."""
    entry, student = results(flights_run[0])["methods"]["sdq"]["languages"]["en"], flights_run[0] / "run" / STUDENT
    monkeypatch.setitem(predict.EVAL_TOKENS, "cpu", 64)
    cells, _ = evaluate(capsys, student, f"--data-dir {FLIGHTS}")
    scores = [f"{entry[name]:.2f}" for name in ("accuracy", "slot_f1", "slot_token_f1", "exact")]
    assert cells[:5] == ["sdq W4A8", *scores]
    for name, pattern in (("label", r"\S+"), ("seq.out", r"(?<=[BI]-)\S+")):
        shutil.copytree(FLIGHTS, other := tmp_path / name)
        path = other / "train" / name
        path.write_text(re.sub(pattern, "place", path.read_text()))
        assert "has other labels than" in evaluate(capsys, student, f"--data-dir {other}", status=2)[0]


def test_a_student_of_own_rows_is_evaluated_again(tmp_path, capsys):
    """One without integers. It needs test.tsv alone, whose rows are of its kind."""
    for split, languages in (("train", ["de"]), ("dev", ["de"]), ("test", ["de", "pt/br"])):
        rows = [f"{x}\t{('local', 'big sports')[i % 2]}\tder Mann {i}\n" for x in languages for i in range(12)]
        (tmp_path / f"{split}.tsv").write_text("".join(["language\tlabel\ttext\n", *rows]), encoding="utf-8")
    evaluations, path = trained(tmp_path, f"{' '.join(SCRATCH)} --task tsv --bits 32 --steps 1 --data-dir {tmp_path}")
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").unlink()
    cells, output = evaluate(capsys, path, f"--data-dir {tmp_path}")
    assert cells[:2] == ["qat W32A8", f"{evaluations['de']['score']:.2f}"]
    assert "| pt/br |" in output and "\nfake-quantized, " in output
    for rows, message in (
        ("text\ttext2\tlabel\nb\tc\tlocal\n", "reads 1 text(s) per row"),
        ("text\tlabel\nb\telse\n", "test.tsv, line 2: unknown label 'else'"),
    ):
        (tmp_path / "test.tsv").write_text(rows, encoding="utf-8")
        read_examples.cache_clear()
        assert message in evaluate(capsys, path, f"--data-dir {tmp_path}", status=2)[0]

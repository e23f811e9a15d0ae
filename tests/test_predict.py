"""predict.py: the same predictions as the report's, from files and standard input; and mistakes in one line."""

import copy
import json
import os
import pickle

import pytest
import torch
from conftest import FLIGHTS, ROOT, SAMPLE

import predict
import train
from kit.common import UserError

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
    backwards = list(predict.predict(loaded, [(first, second) for first, second, _ in reversed(pairs)]))
    assert backwards[::-1] == found  # sorted by length for the model
    for (_, probability), (first, second, _) in zip(found, pairs, strict=True):
        ((_, alone),) = predict.predict(loaded, [(first, second)])
        assert alone == pytest.approx(probability, abs=0.01)  # without padding a rounding may flip


def test_command_line(student, pairs, tmp_path, capsys):
    """From a file and from standard input."""
    _, path = student
    file = tmp_path / "texts.tsv"
    file.write_text("\ufeff" + "".join(f"{first}\t{second}\n" for first, second, _ in pairs), encoding="utf-8")
    expected = list(predict.predict(predict.load(path), [(first, second) for first, second, _ in pairs]))
    assert predict.main([path, str(file)]) == 0
    of_file, before = capsys.readouterr().out, os.dup(0)
    with open(file) as texts:
        os.dup2(texts.fileno(), 0)
    assert predict.main([path]) == 0
    os.dup2(before, 0)
    os.close(before)
    assert of_file == capsys.readouterr().out == "".join(f"{label}\t{p:.4f}\n" for label, p in expected)


def test_one_bad_line_does_not_lose_the_others(student, pairs, tmp_path, capsys):
    """Blank lines keep their place; each line that can't be read is told with its number, and stays blank."""
    _, path = student
    file, good = tmp_path / "texts.tsv", "\t".join(pairs[0][:2])
    lines = [good, "", "one text", "a\tb\tc", "\tb", good, " \t", good]
    file.write_bytes("\n".join(lines).encode() + b"\n\xff\tb\n" + good.encode())
    assert predict.main([path, str(file)]) == 2
    captured = capsys.readouterr()
    rows = captured.out.split("\n")
    assert rows[0] and rows == [rows[0] if line == good else "" for line in lines] + ["", rows[0], ""]
    complaints = captured.err.splitlines()
    expected = {
        3: "has 1 text, and this student reads two texts, separated by a tab",
        4: "has 3 texts",
        5: "has an empty first text",
    }
    expected |= {9: "is not UTF-8 text (byte 0)"}
    for line, (number, message) in zip(complaints, expected.items(), strict=False):
        assert line.startswith(f"error: {file}, line {number} {message}")
    assert complaints[-1] == "error: lines without a label, see above: 4; in the output they are blank"
    assert len(complaints) == 5
    file.write_text(f"{good}\n" * 1024 + f"a\n{good}\n")  # in the second part
    assert predict.main([path, str(file), "--threads", "1"]) == 2
    captured = capsys.readouterr()
    assert "line 1025 has 1 text" in captured.err and len(captured.out.split("\n")) == 1027


def test_mistakes_are_one_line(student, tmp_path, capsys):
    _, path = student
    file = tmp_path / "texts.tsv"
    for text in ("a\tb\n".encode("utf-16"), "a\tb\n".encode("utf-16-be")):
        file.write_bytes(text)
        assert (
            predict.main([path, str(file)]) == 2
            and "is UTF-16, or holds NUL bytes: save it as UTF-8" in capsys.readouterr().err
        )
    if not torch.cuda.is_available():
        assert predict.main([path, str(file), "--device", "cuda"]) == 2 and "no CUDA" in capsys.readouterr().err
    assert predict.main([path, str(tmp_path / "none")]) == 2 and "none" in capsys.readouterr().err
    assert predict.main([str(file)]) == 2 and "error: " in capsys.readouterr().err


def test_texts_that_a_student_does_not_read(student):
    """In Python: the first of them, by its number."""
    loaded = predict.load(student[1])
    pair = ("a", "b")
    for texts, message in (
        ("happy", "a list of texts, not a string"),
        ([pair, "a"], "text 2 has 1 text, "),
        ([pair, ("a", "b", "c")], "text 2 has 3 texts"),
        ([pair, ("", "b")], "text 2 has an empty first text"),
        ([pair, ("a",)], "text 2 is no text or pair of texts"),
        ([pair, None], "text 2 is no text or pair of texts"),
        ([pair, ("a", b"b")], "text 2 is no text or pair of texts"),
        ([pair] * 1024 + ["a"], "text 1025 has 1 text, "),
    ):
        with pytest.raises(UserError, match=message):
            list(predict.predict(loaded, texts))
    older = loaded._replace(texts=0)  # a file that does not say
    (one,), (two,) = predict.predict(older, ["a"]), predict.predict(older, [pair])
    assert one != two
    with pytest.raises(UserError, match="text 2 is of another kind"):
        list(predict.predict(older, ["a", pair]))


def test_long_texts_are_cut_and_counted(student, capsys):
    loaded = predict.load(student[1])
    assert loaded.max_length == 32
    list(predict.predict(loaded, [("a b", "c"), ("a " * 40, "c"), ("a", "b " * 60)]))
    assert "NOTE: 2 of 3 texts are longer than 32 tokens and lose " in capsys.readouterr().err


def test_a_student_can_be_copied_and_pickled(student, pairs):
    """Workers that are spawned get a pickled one."""
    loaded, texts = predict.load(student[1]), [pair[:2] for pair in pairs]
    expected = list(predict.predict(loaded, texts))
    for again in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert list(predict.predict(again, texts)) == expected


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
    for wrong, message in (
        ([("a", "b")], "has 2 texts, and this student reads one"),
        (["a " * 600], "602 tokens, the model takes 512: split it"),
        ([texts[0], " "], "text 2 is empty"),
    ):
        with pytest.raises(UserError, match=message):
            list(predict.predict(loaded, wrong))
    found = list(predict.predict(loaded, texts))
    right = sum(intent == gold for (intent, _, _), gold in zip(found, intents, strict=True))
    assert right == evaluations["en"]["correct"]
    words = [
        a == b for (_, _, own), gold in zip(found, tags, strict=True) for a, b in zip(own, gold.split(), strict=True)
    ]
    assert 100 * sum(words) / len(words) == pytest.approx(evaluations["en"]["slot_token_f1"])


def test_a_long_sentence_of_words_is_split_as_in_training(tmp_path):
    """A tag for each word, the same as for its parts alone. White space within a word does not end it."""
    folder = tmp_path / "POS"
    folder.mkdir()
    for name in ("en.train", "en.dev", "en.test"):
        (folder / name).write_text("the DET\ndog NOUN\nruns VERB\n\na DET\ncat NOUN\n\n" * 6)
    options = ("--task", "pos", "--data-dir", str(tmp_path), "--model", "mini", "--max-length", "16", "--steps", "2")
    _, path = trained(tmp_path / "run", *options)
    loaded = predict.load(path)
    words = "the dog runs a cat".split() * 9
    ((whole,),) = predict.predict(loaded, [" ".join(words)])
    assert len(whole) == len(words) and loaded.max_length == 16
    pieces, rows = [len(loaded.tokenizer.encode_words([[word]])[0][0]) - 2 for word in words], [[]]
    for i, count in enumerate(pieces):  # as many words per row as fit
        if sum(pieces[k] for k in rows[-1]) + count > 14:
            rows.append([])
        rows[-1].append(i)
    assert len(rows) > 3
    alone = list(predict.predict(loaded, [" ".join(words[i] for i in row) for row in rows]))
    assert [tag for (tags,) in alone for tag in tags] == whole
    ((tags,), (one,)) = predict.predict(loaded, ["10\u00a0000 a\u3000b  dog", "x" * 900])
    assert len(tags) == 3 and len(one) == 1

"""data/xglue.py and its metrics: files in the official layout, written here; each metric against another computation."""

import itertools
import json
import os
import random

import numpy as np
import pytest

import predict
import train
from data.batches import cut_long
from data.files import Sentence
from data.metrics import runs, token_scores
from data.slots import read_tokens
from data.tasks import file_paths, languages_of, load
from data.tokenizer import BOS, EOS
from data.xglue import ENTITIES, FETCH, PLACES, UPOS, XGLUE, files_of
from kit.common import UserError

COLUMNS = {"pawsx": 4, "nc": 3, "qadsm": 4, "qam": 3}


def write_task(root, name):
    """A few rows of a task in every language, drawn with a fixed seed, under the first place of its layout."""
    task, rng = XGLUE[name], random.Random(name)
    spelled = ("0", "1") if name in ("pawsx", "qam") else task.labels
    for split, files in task.files.items():
        for file in files:
            lines = ["id\tsentence1\tsentence2\tlabel"] if name == "pawsx" else []
            for i in range(40 if split == "train" else 12):
                text = [" ".join(rng.choices("teacher red buys Apfel".split(), k=rng.randint(1, 5))) for _ in range(4)]
                if name in COLUMNS:
                    lines.append("\t".join([*text[: COLUMNS[name] - 1], spelled[i % len(spelled)]]))
                else:
                    lines += [f"{word} {rng.choice(task.labels)}" for word in text[0].split()] + [""]
            path = os.path.join(root, *file.split("/"))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w", encoding="utf-8") as out:
                out.write("\n".join(lines) + "\n")
    return str(root)


# ---------------------------------------------------------------------------------------- reading
@pytest.mark.parametrize("name", XGLUE)
def test_every_task_is_read(name, tmp_path):
    folder, task = write_task(tmp_path, name), XGLUE[name]
    languages = languages_of(task, folder, "test")
    assert languages[:2] == ("en", "de" if name != "pos" else "ar") and len(languages) == len(task.files["test"])
    for split, count in (("train", 40), ("dev", 12), ("test", 12)):
        examples = load(task, split, "en", folder)
        assert len(examples) == count
        if name in COLUMNS:
            assert [row.label for row in examples] == [i % len(task.labels) for i in range(count)]
            assert all((row.text_b is None) == (name == "nc") for row in examples)
        else:
            assert all(len(row.words) == len(row.tags) >= 1 and {*row.tags} <= {*task.labels} for row in examples)
    place = task.files["train"][0].split("/")[0]
    os.rename(tmp_path / place, tmp_path / "moved")
    with pytest.raises(UserError, match="no file .*fetch it with 'python data/fetch.py xglue'"):
        load(task, "train", "en", folder)
    os.makedirs(tmp_path / "xglue_full_dataset")
    os.rename(tmp_path / "moved", tmp_path / "xglue_full_dataset" / place)
    assert len(load(task, "train", "en", folder)) == 40  # as the archive unpacks


def test_texts_are_joined_as_published(tmp_path):
    for name, row, example in (
        ("qadsm", 'buy "boots"\tBoots\tall sizes\tGood', ('buy "boots"', "Boots all sizes", 1)),
        ("nc", "A title\tIts body\tautos", ("A title Its body", None, 9)),
    ):
        path = tmp_path / XGLUE[name].files["train"][0]
        path.parent.mkdir()
        path.write_text(row + "\n")
        assert XGLUE[name].read(str(tmp_path), "train") == {"en": [example]}


@pytest.mark.parametrize("place", range(2))
@pytest.mark.parametrize("name", ["ner", "pos", "pawsx"])
def test_other_places(name, place, tmp_path):
    for split in ("train", "dev"):
        for file in files_of(PLACES[name][place], ["en", "de"], split).values():
            os.makedirs((tmp_path / file).parent, exist_ok=True)
            (tmp_path / file).write_text("x O\n")
    found = XGLUE[name].find(str(tmp_path), "dev")
    assert list(found) == ["en", "de"] and all(map(os.path.isfile, found.values()))  # only what is there
    assert file_paths(XGLUE[name], str(tmp_path), "dev") == [*found.values()]


@pytest.mark.parametrize("blank", ["", "\t", " \t \r", "\n\n"])
@pytest.mark.parametrize(
    "rows",
    [
        "EU NNP B-NP B-ORG|rejects VBZ B-VP O||Jo NNP B-NP B-PER",  # CoNLL-2003's four columns
        "EU\tNNP\tB-NP\tB-ORG|rejects\tVBZ\tB-VP\tO||Jo\tNNP\tB-NP\tB-PER",
        "-DOCSTART- -X- O O||EU NNP I-NP B-ORG|rejects VBZ I-VP O|-DOCSTART- -X- -X- O|Jo NNP I-NP B-PER",
        "-DOCSTART- O\r||EU B-ORG\r|rejects\tO\r||Jo B-PER",
        "-DOCSTART- O O||EU x B-ORG|rejects  O||Jo x B-PER",  # the middle column may be empty
    ],
)
def test_published_columns(rows, blank, tmp_path):
    """The word is the first column, the tag the last: a tab or a space, Windows line ends, no empty line at the end."""
    path = tmp_path / "tokens"
    path.write_bytes(rows.replace("||", f"|{blank}|").replace("|", "\n").encode())
    assert tokens("ner", path) == [Sentence(("EU", "rejects"), ("B-ORG", "O"), ""), Sentence(("Jo",), ("B-PER",), "")]


def test_other_marks_of_spans(tmp_path):
    """IOBES, BILOU and BMES are read as IOB2, where the labels are spans."""
    expected = ["B-PER", "I-PER", "I-PER", "O", "B-ORG", "B-LOC", "I-LOC"]
    for i, marks in enumerate(("BIE-SBE", "BIL-UBL", "BME-SBE", "BII-BBI")):
        path = tmp_path / f"tokens{i}"
        tags = [mark + tag[1:] if tag != "O" else tag for mark, tag in zip(marks, expected, strict=True)]
        path.write_text("".join(f"w {tag}\n" for tag in tags))
        assert tokens("ner", path)[0].tags == tuple(expected)
        assert read_tokens(str(path), None, "")[0].tags == tuple(tags)
    path = tmp_path / "plain"
    path.write_text("w S-x\n")
    with pytest.raises(UserError, match="unknown tag 'S-x'"):
        read_tokens(str(path), ("B-x", "NOUN"), "")


def tokens(name, path):
    return read_tokens(str(path), XGLUE[name].labels, FETCH)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("ner", "EU B-ORG\nrejects\n", "line 2: 'rejects' is not a word and its tag"),
        ("ner", "EU NNP B-ORG\nJo B-PER\n", "line 2: 'Jo B-PER' is not a word and its tag in 3 columns"),
        ("ner", "EU\tB-ORG\nJo\tB-PER\t\n", r"line 2: 'Jo\\tB-PER\\t' is not a word"),
        ("ner", "EU B-ORG\n O\n", "line 2: .* is not a word"),
        ("ner", "EU B-ORG\nJo S-GPE\n", "line 2: unknown tag 'B-GPE'"),
        ("pos", "\n\n", "has no rows"),
    ],
)
def test_malformed_rows_are_refused(name, text, message, tmp_path):
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(UserError, match=f"{path}.*{message}"):
        tokens(name, path)


def test_words_of_unusual_spaces(tmp_path):
    """A word may be a no-break space, and beside a tab hold a space."""
    path = tmp_path / "tokens"
    path.write_text("\u00a0 PUNCT\n\u3000\tPUNCT\nViet Nam\tPROPN\n")
    assert tokens("pos", path)[0].words == ("\u00a0", "\u3000", "Viet Nam")


# ---------------------------------------------------------------------------------------- encoding
def test_long_sentences_are_cut_between_words(tokenizer):
    rng = random.Random(0)
    words = "apple teacher unbelievable a Donaudampfschifffahrt".split()
    sentences = [Sentence(tuple(rng.choices(words, k=k)), tuple(rng.choices(UPOS, k=k)), "") for k in (1, 9, 60)]
    encoded = tokenizer.encode_words([sentence.words for sentence in sentences])
    rows, parts = cut_long(encoded, sentences, 30)
    assert len(rows) > 5 and all(len(ids) <= 30 and (ids[0], ids[-1]) == (BOS, EOS) for ids, _ in rows)
    for k in range(2):  # words, tags
        assert sum((part[k] for part in parts), ()) == sum((each[k] for each in sentences), ())
    for pieces in (lambda ids, first: ids[first], lambda ids, first: ids[1:-1]):  # the first of each word, all
        assert np.array_equal(*(np.concatenate([pieces(*row) for row in every]) for every in (rows, encoded)))
    shorter, _ = cut_long(encoded, sentences, 10)  # than a word: it loses its last pieces, not its tag
    assert max(len(ids) for ids, _ in shorter) == 10 and sum(len(first) for _, first in shorter) == 70
    whole, same = cut_long(encoded, sentences, 10**6)
    assert same == sentences and all(np.array_equal(a[0], b[0]) for a, b in zip(whole, encoded, strict=True))


# ----------------------------------------------------------------------------------------- metrics
def entities_as_seqeval(tags):
    """seqeval 0.0.12's rules, which XGLUE's script uses, written out for tags of parts of speech."""
    found, start, before, kind = [], 0, "O", "O"
    for i, tag in enumerate([*tags, "O"]):
        mark = tag[0]
        ends = before in "ES" or (before in "BI" and mark in "BSO") or (before != "O" and kind != tag)
        begins = mark in "BS" or (before in "ESO" and mark in "EI") or (mark != "O" and kind != tag)
        if ends and before != "O":
            found.append((kind, start, i))
        if begins:
            start = i
        before, kind = mark, tag
    return set(found)


def test_runs_are_what_the_official_script_counts():
    rng = random.Random(3)
    for _ in range(300):
        tags = rng.choices(["NOUN", "SCONJ", "SYM", "INTJ", "ADJ"], k=9)
        assert runs(tags) == entities_as_seqeval(tags), tags


def test_token_scores_by_hand():
    names = ("NOUN", "VERB", "SYM")
    predicted, true = [np.array([0, 0, 1]), np.array([2, 2])], [np.array([0, 1, 1]), np.array([2, 2])]
    found = token_scores(predicted, true, names, ("accuracy",))
    # runs: predicted NOUN 0-2, VERB 2-3, SYM, SYM; true NOUN 0-1, VERB 1-3, SYM, SYM
    assert (found["accuracy"], found["precision"], found["score"]) == (80.0, 50.0, 80.0)
    tags = [np.array([ENTITIES.index(tag) for tag in row.split()]) for row in ("B-PER I-PER O", "B-PER O B-LOC")]
    found = token_scores(tags[:1], tags[1:], ENTITIES, ("f1",))
    assert (found["f1"], found["gold"], found["predicted"]) == (0.0, 2, 1) and found["correct"] == 1
    assert found["classes"] == 3 and found["majority"] == pytest.approx(100 / 3)
    assert token_scores(tags, tags, ENTITIES, ("f1",))["score"] == 100.0
    # an O among tags that are no spans: F1 is the mean over tags
    plain = [np.array([0, 1, 2]), np.array([0])], [np.array([0, 1, 1]), np.array([0])]
    found = token_scores(*plain, ("O", "DRUG", "DOSE"), ("f1",))
    assert found["score"] == found["f1"] == pytest.approx(100 * (1 + 2 / 3 + 0) / 3)


# ---------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("name", ["ner", "pos", "qadsm"])
def test_a_task_of_each_kind_is_trained_and_scored(name, tmp_path, capsys):
    folder = write_task(tmp_path / "data", name)
    out = tmp_path / "run"
    options = f"--task {name} --model mini --steps 2 --max-length 24 --threads 1 --data-dir {folder} --out {out}"
    assert train.main(options.split()) == 0
    methods = json.loads((out / "results.json").read_text())["methods"]
    assert list(methods) == ["fp32", "ptq", "qat", "sdq"]
    for row in methods.values():
        assert tuple(row["languages"]) == languages_of(XGLUE[name], folder, "test")
        for evaluation in row["languages"].values():
            assert {*XGLUE[name].columns, "score", "total"} <= {*evaluation}
            assert evaluation["score"] == evaluation[XGLUE[name].metrics[0]]
    assert predict.main(f"{out}/student.safetensors --evaluate --data-dir {folder} --threads 1".split()) == 0
    text = capsys.readouterr().out
    assert f"{methods['sdq']['score']:.2f}" in text and "worst" in text


@pytest.mark.parametrize(
    "tags, known, languages",
    [(("B-who", "E-who", "O", "S-to"), 5, ("de", "sw")), (("NAME", "NAME", "x-1", "O"), 3, ("all",))],
)
def test_own_tags_are_trained_and_scored(tags, known, languages, tmp_path):
    for split, language in itertools.product(("train", "dev", "test"), languages):
        rows = "".join(f"{word} - {tag}\n" for word, tag in zip("Anna red buys apples".split(), tags, strict=True))
        name = split if language == "all" else f"{split}-{language}"
        if split == "test" or language != "sw":
            (tmp_path / f"{name}.txt").write_text((rows + "\n") * (20 if split == "train" else 3))
    out = tmp_path / "run"
    options = f"--task tags --model mini --steps 2 --max-length 24 --threads 1 --methods ptq --out {out}"
    assert train.main([*options.split(), "--data-dir", str(tmp_path)]) == 0
    (row,) = json.loads((out / "results.json").read_text())["methods"].values()
    assert tuple(row["languages"]) == languages
    for found in row["languages"].values():
        assert found["total"] == 12 and found["score"] == found["f1"] and found["classes"] <= known
        assert found["majority"] == (50 if "NAME" in tags else 25)
        assert (found.get("gold") == 6) == ("NAME" not in tags)
    assert predict.main(f"{out}/student.safetensors --evaluate --data-dir {tmp_path} --threads 1".split()) == 0

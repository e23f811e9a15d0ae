"""data/tasks.py: the table of tasks, XNLI's files, and where the files of a task are."""

import os
import shutil

import pytest
from conftest import FLIGHTS, ROOT, SAMPLE
from test_glue import write_all

from data import tasks
from data.files import Example, Sentence, read_examples
from data.metrics import METRICS, slot_scores
from data.slots import Names, read_tokens
from data.tasks import (
    NLI_LABELS,
    TASKS,
    XNLI_FETCH,
    XNLI_LANGUAGES,
    Task,
    class_names,
    file_paths,
    find_data,
    find_task,
    languages_of,
    load,
    names_of,
    own_labels,
    own_language,
    own_tags,
    read_own,
    selection_splits,
    task_folder,
)
from data.xglue import XGLUE
from kit.common import UserError
from model import HEADS

XNLI, ATIS, RTE, TSV, TAGS = map(find_task, ("xnli", "atis", "rte", "tsv", "tags"))


def forget():
    for each in (read_examples, read_tokens, own_labels, own_tags):
        each.cache_clear()


# ---------------------------------------------------------------------------------------- the table
@pytest.mark.parametrize("name", TASKS)
def test_every_row_is_complete(name):
    task = find_task(name)
    assert task.name == name and task.head in HEADS and set(task.files) == {"train", "dev", "test"}
    languages = task.languages or (task.train_language,)  # None: those in its files
    assert task.train_language in languages and len(set(languages)) == len(languages)
    assert task.labels or task.head == "embedding"
    joint = {"accuracy", "exact", *slot_scores([["O"]], [["O"]])}
    keys = joint if task.head == "joint" else {"accuracy", "precision", "retrieval", "cosine", *METRICS}
    assert {*task.metrics, *task.columns.values()} <= keys and task.columns
    # of mnli, both tests are in the training language
    assert task.zero_shot == (name in ("xnli", "embed", "tsv", "tags", *XGLUE))
    if task.sample:
        assert os.path.isdir(os.path.join(ROOT, "data", task.sample)) and task.fetch


def test_classes_of_tasks():
    assert class_names(XNLI, SAMPLE) == (NLI_LABELS, ()) == (("entailment", "neutral", "contradiction"), ())
    names = names_of(ATIS, FLIGHTS)
    assert class_names(ATIS, FLIGHTS) == (names.intents[: names.known_intents], names.slots[: names.known_slots])
    assert class_names(find_task("ner"), "") == (XGLUE["ner"].labels, ())
    with pytest.raises(UserError, match="unknown task 'xnil'; known: xnli atis snips"):
        find_task("xnil")


# ------------------------------------------------------------------------------------- XNLI's files
def test_reads_the_official_layout():
    for language in XNLI_LANGUAGES:
        for split in ("dev", "test"):
            assert [e.label for e in load(XNLI, split, language, SAMPLE)] == [0, 1, 2]
    train = load(XNLI, "train", "en", SAMPLE)
    assert len(train) == 180 and sorted({e.label for e in train}) == [0, 1, 2]
    # the training file spells it "contradictory"
    assert all(("does not" in e.text_b) == (e.label == 2) for e in train)


def test_texts_stay_as_they_are(tmp_path):
    """An empty text is a text, and only newlines end lines."""
    path = tmp_path / "XNLI-1.0" / "xnli.dev.tsv"
    path.parent.mkdir()
    rows = ["language\tgold_label\tsentence1\tsentence2\tpromptID", 'en\tneutral\tone\u2028still one "quote\x85\tb\t1']
    path.write_text("\n".join([*rows, "en\tneutral\t\tb \t1\n"]), encoding="utf-8")
    found = load(XNLI, "dev", "en", str(tmp_path))
    assert found == [('one\u2028still one "quote\x85', "b", 1), ("", "b ", 1)]
    with pytest.raises(UserError, match="no dev row in language 'sw'"):
        load(XNLI, "dev", "sw", str(tmp_path))
    with pytest.raises(UserError, match="no language 'xx'"):
        load(XNLI, "dev", "xx", str(tmp_path))
    with pytest.raises(UserError, match=f"fetch it with '{XNLI_FETCH}'"):
        load(XNLI, "train", "en", str(tmp_path))


# ------------------------------------------------------------------------------ where the files are
def test_folders_of_glue(tmp_path):
    place = write_all(tmp_path, "rte")
    for folder in (tmp_path, tmp_path / "glue", place):
        assert os.path.samefile(task_folder(RTE, str(folder)), place)
        assert len(load(RTE, "test", "en", str(folder))) == 6
    missing = tmp_path / "glue" / "MNLI"  # the message names where it should be
    for folder in (tmp_path, tmp_path / "glue", missing):
        assert task_folder(find_task("mnli"), str(folder)) == str(missing)
    assert task_folder(ATIS, FLIGHTS) == FLIGHTS and task_folder(ATIS, str(tmp_path)) == str(tmp_path / "atis")
    assert task_folder(XNLI, str(tmp_path)) == str(tmp_path)


def test_file_paths_name_the_file_that_is_there(tmp_path):
    plain = os.path.join(tmp_path, "XNLI-1.0", "xnli.dev.tsv")
    assert file_paths(XNLI, str(tmp_path), "dev") == [plain]
    os.mkdir(tmp_path / "XNLI-1.0")
    for path in (plain + ".xz", plain):  # with both, the plain one is read
        with open(path, "wb"):
            pass
        assert file_paths(XNLI, str(tmp_path), "dev") == [path]


def test_default_data(nothing_downloaded, tmp_path):
    raw, mini = str(tmp_path / "raw"), os.path.join(ROOT, "data", "mini")
    assert find_data(XNLI, None, "mini") == mini
    assert find_data(ATIS, None, "scratch") == find_data(ATIS, None, "scratch-2x128") == FLIGHTS
    for task, model in ((XNLI, "xlmr-base"), (XNLI, "scratch"), (ATIS, "mini"), (RTE, "minilm")):
        assert find_data(task, None, model) == raw
    for task in (XNLI, ATIS, RTE):
        assert find_data(task, "mine", "mini") == "mine"
    shutil.copytree(FLIGHTS, tmp_path / "raw" / "atis")
    assert find_data(ATIS, None, "scratch") == raw  # the official files are there
    shutil.copytree(SAMPLE, raw, dirs_exist_ok=True)
    assert find_data(XNLI, None, "mini") == mini


# ------------------------------------------------------------------------------ a task of one's own
def test_languages_come_from_the_files(monkeypatch):
    """languages=None: those of the split, the language of the training first."""
    found = {"test": {"am": 3, "de": 2, "pt/br": 1}, "train": {"de": 9}}

    def read(folder, split):
        return {language: [Example("a", None, i % 2) for i in range(count)] for language, count in found[split].items()}

    files = {"train": ("train",)}
    task = Task("news", read, files, "", labels=("no", "yes"), languages=None, train_language="de")
    monkeypatch.setitem(tasks.TASKS, "news", task)
    assert languages_of(task, "folder", "test") == ("de", "am", "pt/br")
    assert len(load(find_task("news"), "test", "pt/br", "folder")) == 1
    with pytest.raises(UserError, match="news: no train row in language 'am' .* only in: de"):
        load(find_task("news"), "train", "am", "folder")
    assert languages_of(find_task("mnli"), "folder", "test") == ("matched", "mismatched")


def test_held_out_rows_share_no_premise_with_the_rest():
    train = load(XNLI, "train", "en", SAMPLE)
    held, rest = (load(XNLI, split, "en", SAMPLE) for split in ("held-out", "rest"))
    assert sorted(held + rest) == sorted(train) and len(held) >= len(train) // 10
    assert not {example.text_a for example in held} & {example.text_a for example in rest}
    assert held == load(XNLI, "held-out", "en", SAMPLE)


def test_reported_rows_do_not_select_the_epoch(tmp_path):
    def splits(task):
        return [selection_splits(task, split, str(tmp_path)) for split in ("test", "dev")]

    selected, held_out = ("train", "dev"), ("rest", "held-out")
    assert splits(XNLI) == [selected, held_out]
    assert splits(find_task("stsb")) == [selected, selected]  # dev is a part of train.tsv there
    assert splits(find_task("embed")) == [held_out, held_out]
    (tmp_path / "dev.tsv").touch()
    assert splits(find_task("embed")) == [selected, held_out]


# ------------------------------------------------------------------------------------ your own rows
OWN = {
    "train": [("gut gut", "very good", "de"), ("schlecht", "bad", "de")] * 20,
    "dev": [("gut", "very good", "de"), ("schlecht gut", "bad", "de"), ("bon", "very good", "fr")],
    "test": [("gut schlecht", "very good", "de"), ("nul", "bad", "fr"), ("bon", "very good", "fr")],
}


@pytest.fixture
def own(tmp_path):
    """A folder of train.tsv, dev.tsv and test.tsv in two languages, and a function that writes one of them."""

    def write(split, rows, header=("text", "label", "language")):
        text = "".join("\t".join(row) + "\n" for row in [header, *rows])
        (tmp_path / f"{split}.tsv").write_text(text, encoding="utf-8")
        forget()

    for split, rows in OWN.items():
        write(split, rows)
    return str(tmp_path), write


def test_own_rows(own):
    folder, write = own
    assert own_labels(folder) == ("bad", "very good") and own_language(TSV, folder, None) == "de"
    assert load(TSV, "test", "fr", folder) == [Example("nul", None, 0), Example("bon", None, 1)]
    assert languages_of(find_task("tsv", "de"), folder, "test") == ("de", "fr")
    write("test", [("a", "bad", "b")], ("text", "label", "text2"))
    with pytest.raises(UserError, match="only one of train.tsv and test.tsv has a column text2"):
        load(TSV, "test", "fr", folder)
    # numbers in their order, a second text, no language
    write("train", [("2", "10", "b"), ("a", "9", "")], ("\ufefftext", "label", "text2"))
    assert own_labels(folder) == ("9", "10") and own_language(TSV, folder, None) == "all"
    assert [len(load(TSV, split, "all", folder)) for split in ("held-out", "rest")] == [1, 1]
    assert load(TSV, "train", "all", folder) == [Example("2", "b", 1), Example("a", "", 0)]
    write("train", [("q", name, str(i)) for i, name in enumerate(("x", "-1", "9" * 5000, "0.5", "nan"))])
    assert own_labels(folder) == ("-1", "0.5", "9" * 5000, "nan", "x")
    write("train", [('"two\r\nlines"', '"x"', '"de"'), ("b", "y ", "en"), ("c", "y", "fr"), ("", "", "")])
    assert own_labels(folder) == ("x", "y") and load(TSV, "train", "de", folder) == [("two\r\nlines", None, 0)]
    assert own_language(TSV, folder, None) == "en" and own_language(TSV, folder, "fr") == "fr"


@pytest.mark.parametrize(
    ("split", "rows", "message"),
    [
        ("dev", [("a", "bad", "de"), ("b", "worse", "de")], "dev.tsv, line 3: unknown label 'worse'; known: bad"),
        ("test", [("a", "bad", "de"), (" ", "bad", "de")], "test.tsv, line 3: the text is empty"),
        ("test", [("a", "", "de")], "test.tsv, line 2: the label is empty"),
        ("test", [], "test.tsv has no rows"),
        ("test", [('"two\nlines"', "bad", "de"), ("a", "no", "de")], "test.tsv, line 4: unknown label 'no'"),
        ("test", [("a", '"bad\tone"', "de")], r"line 2: the label 'bad\\tone' holds a tab or a line end"),
        ("train", [("a", "x", "de")] * 3, "train.tsv has one class"),
        ("train", [("a", f"{i}.5", "de") for i in range(1001)], "has 1,001 classes: are its labels numbers"),
        ("train", [("a", "x", "de"), ("b", "y", "fr")], "no language 'en': choose --train-language from de fr"),
    ],
)
def test_mistakes_in_own_rows_name_file_and_line(own, split, rows, message):
    folder, write = own
    write(split, rows)
    with pytest.raises(UserError, match=message):
        read_own(folder, split)
        own_language(TSV, folder, None)


# ------------------------------------------------------------------------------------ your own tags
def write_tags(folder, **files):
    """Write sentences such as "Anna/B-who ran/O|Go/O" into train.txt, dev_de.txt (as dev-de.txt) and so on."""
    for name, text in files.items():
        lines = text.replace("|", "\n\n").replace(" ", "\n").replace("/", "\t") + "\n"
        (folder / (name.replace("_", "-") + ".txt")).write_text(lines, encoding="utf-8")
    forget()
    return str(folder)


def test_own_tags(tmp_path):
    folder = write_tags(tmp_path, train="Anna/B-who ran/O|Go/O home/B-to", dev="a/I-to", test="b/O c/S-who|d/E-who")
    assert own_tags(folder) == ("O", "B-to", "B-who", "I-to", "I-who")
    assert own_language(TAGS, folder, None) == "all" and languages_of(TAGS, folder, "test") == ("all",)
    assert names_of(TAGS, folder) == Names(("",), own_tags(folder), 1, 5)
    assert load(TAGS, "dev", "all", folder) == [Sentence(("a",), ("I-to",), "")]
    assert [row.tags for row in load(TAGS, "test", "all", folder)] == [("O", "B-who"), ("I-who",)]
    folder = write_tags(tmp_path, train="a/S-x b/B-y c/E-y")  # without O
    assert own_tags(folder) == ("B-x", "B-y", "I-x", "I-y")
    folder = write_tags(tmp_path, train="a/S-x b/NN|c/O d/10 e/9", dev="a/S-x")  # no spans: as they stand
    assert own_tags(folder) == ("O", "9", "10", "NN", "S-x")
    assert load(TAGS, "dev", "all", folder)[0].tags == ("S-x",)


def test_own_tags_in_several_languages(tmp_path):
    folder = write_tags(tmp_path, train_en="a/X b/Y", train_de="c/Z", dev_en="a/X", test_pt_br="b/Y", test_en="a/Z")
    assert own_tags(folder) == ("X", "Y", "Z")
    assert own_language(TAGS, folder, None) == "en" and own_language(TAGS, folder, "de") == "de"
    assert languages_of(find_task("tags", "en"), folder, "test") == ("en", "pt-br")
    with pytest.raises(UserError, match="no language 'fr': choose --train-language from de en"):
        own_language(TAGS, folder, "fr")
    os.rename(tmp_path / "train-en.txt", tmp_path / "train-en.conll")
    os.rename(tmp_path / "test-en.txt", tmp_path / "test-en.tsv")
    forget()
    assert file_paths(TAGS, folder, "train") == [f"{folder}/{name}" for name in ("train-de.txt", "train-en.conll")]
    assert load(TAGS, "test", "en", folder)[0].tags == ("Z",)
    shutil.copy(tmp_path / "test-en.tsv", tmp_path / "test-en.txt")  # which of the two?
    with pytest.raises(UserError, match="test-en.tsv and .*test-en.txt are the same split: keep one"):
        load(TAGS, "test", "en", folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no file .*/train.txt: name its folder with --data-dir"),
        (dict(train="a/X b/Y", dev="a/X|b/Z"), "dev.txt, line 3: unknown tag 'Z'; known: X Y"),
        (dict(train="a/O b/B-to", dev="a/U-no"), "dev.txt, line 1: unknown tag 'B-no'; known: O B-to I-to"),
        (dict(train="a/O b/O"), "train.txt has one class"),
        (dict(train="|"), "train.txt has no rows$"),
    ],
)
def test_mistakes_in_own_tags_name_file_and_line(files, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load(TAGS, "dev", "all", write_tags(tmp_path, **files))

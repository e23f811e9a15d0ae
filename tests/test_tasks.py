"""data/tasks.py: the table of tasks, XNLI's files, and where the files of a task are."""

import os
import shutil
from dataclasses import replace

import pytest
from conftest import FLIGHTS, ROOT, SAMPLE
from test_glue import write_all

from data import tasks
from data.glue import Example
from data.metrics import METRICS
from data.slots import Names, Sentence, slot_scores
from data.tasks import (
    NLI_LABELS,
    RAW_DIR,
    TASKS,
    XNLI_LANGUAGES,
    Task,
    file_paths,
    find_data,
    find_task,
    languages_of,
    load,
    own_labels,
    own_language,
    own_tags,
    read_own,
    read_xnli,
    selection_splits,
    task_folder,
)
from data.xglue import XGLUE, read_tokens
from kit.common import UserError
from model import HEADS


@pytest.fixture
def folder(tmp_path):
    target = tmp_path / "data"
    shutil.copytree(SAMPLE, target)
    read_xnli.cache_clear()
    return target


# ---------------------------------------------------------------------------------------- the table
@pytest.mark.parametrize("name", TASKS)
def test_every_row_is_complete(name):
    task = find_task(name)
    assert task.name == name and task.head in HEADS and set(task.files) == {"train", "dev", "test"}
    languages = task.languages or (task.train_language,)  # None: those in its files
    assert task.train_language in languages and len(set(languages)) == len(languages)
    assert bool(task.labels or task.labels_of) + bool(task.names) == 1 + (task.head == "token")
    joint = {"accuracy", "exact", *slot_scores([["O"]], [["O"]])}
    keys = joint if task.head == "joint" else {"accuracy", "precision", *METRICS}
    assert {*task.metrics, *task.columns.values()} <= keys and task.columns
    assert task.zero_shot == (
        name in ("xnli", "tsv", "tags", *XGLUE)
    )  # of mnli, both tests are in the training language
    if task.sample:
        assert os.path.isdir(os.path.join(ROOT, "data", task.sample)) and task.real_thing


def test_labels_of_xnli():
    assert find_task("xnli").labels == NLI_LABELS == ("entailment", "neutral", "contradiction")
    with pytest.raises(UserError, match="unknown task 'xnil'; known: xnli atis snips"):
        find_task("xnil")


# ------------------------------------------------------------------------------------- XNLI's files
def test_reads_the_official_layout(folder):
    for language in XNLI_LANGUAGES:
        for split in ("dev", "test"):
            examples = load(find_task("xnli"), split, language, str(folder))
            assert [e.label for e in examples] == [0, 1, 2]
    train = load(find_task("xnli"), "train", "en", str(folder))
    assert len(train) == 180 and sorted({e.label for e in train}) == [0, 1, 2]
    # the training file spells it "contradictory"
    assert all(("does not" in e.text_b) == (e.label == 2) for e in train)


def rewrite(folder, split, change):
    path = folder.joinpath(*find_task("xnli").files[split][0].split("/"))
    lines = path.read_text(encoding="utf-8").split("\n")
    change(lines)
    path.write_text("\n".join(lines), encoding="utf-8")


def set_line(number, text):
    def change(lines):
        lines[number - 1] = text

    return change


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("en\tentailment\tonly three", "line 3: 3 columns, the header has 5"),
        ("en\tmaybe\ta\tb\t1", "line 3: unknown label 'maybe'"),
        ("xx\tneutral\ta\tb\t1", "line 3: unknown language 'xx'"),
        ("en\tneutral\ta\tb\t1\tmore", "line 3: 6 columns"),
    ],
)
def test_malformed_rows_are_named(folder, line, message):
    rewrite(folder, "dev", set_line(3, line))
    with pytest.raises(UserError) as error:
        load(find_task("xnli"), "dev", "en", str(folder))
    assert message in str(error.value) and "xnli.dev.tsv" in str(error.value)


def test_missing_columns_files_and_languages(folder):
    rewrite(folder, "dev", set_line(1, "language\tlabel\tsentence1\tsentence2\tpromptID"))
    with pytest.raises(UserError, match="no column 'gold_label'"):
        load(find_task("xnli"), "dev", "en", str(folder))
    rewrite(folder, "test", lambda lines: lines.__setitem__(slice(1, None), lines[1:4]))
    with pytest.raises(UserError, match="no test row in language 'sw'"):
        load(find_task("xnli"), "test", "sw", str(folder))
    with pytest.raises(UserError, match="no language 'xx'"):
        load(find_task("xnli"), "test", "xx", str(folder))
    with pytest.raises(UserError, match="fetch it with 'python data/fetch.py xnli'"):
        load(find_task("xnli"), "train", "en", str(folder / "nowhere"))
    with pytest.raises(UserError, match="unknown task 'xnil'; known: xnli atis snips"):
        load(find_task("xnil"), "train", "en", str(folder))


def test_an_empty_text_is_a_text(folder):
    """A published file with an empty cell must stay usable."""
    rewrite(folder, "dev", set_line(3, "en\tneutral\t\tb\t1"))
    assert "" in [e.text_a for e in load(find_task("xnli"), "dev", "en", str(folder))]


def test_only_newlines_end_lines(folder):
    line = 'en\tneutral\tone\u2028still one "quote\x85\tb\t1'
    rewrite(folder, "dev", set_line(2, line))
    assert 'one\u2028still one "quote\x85' in [e.text_a for e in load(find_task("xnli"), "dev", "en", str(folder))]


# ------------------------------------------------------------------------------ where the files are
def test_folders_of_glue(tmp_path):
    task = find_task("rte")
    place = write_all(tmp_path / "glue", "rte")
    for folder in (tmp_path, tmp_path / "glue", place):
        assert os.path.samefile(task_folder(task, str(folder)), place)
        assert len(load(find_task("rte"), "test", "en", str(folder))) == 6
    missing = tmp_path / "glue" / "MNLI"  # the message names where it should be
    for folder in (tmp_path, tmp_path / "glue", missing):
        assert task_folder(find_task("mnli"), str(folder)) == str(missing)


def test_folders_of_joint_tasks(tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(FLIGHTS, folder)
    task = find_task("atis")
    assert task_folder(task, str(folder)) == str(folder)
    assert task_folder(task, str(folder.parent)) == str(folder.parent / "atis")  # to be named
    shutil.move(folder, folder.parent / "atis")
    assert task_folder(task, str(folder.parent)) == str(folder.parent / "atis")
    assert len(load(find_task("atis"), "dev", "en", str(folder.parent))) == 30
    assert os.path.samefile(task_folder(find_task("xnli"), str(folder.parent)), folder.parent)


def test_file_paths_name_the_file_that_is_there(tmp_path):
    task = find_task("xnli")
    plain = os.path.join(tmp_path, "XNLI-1.0", "xnli.dev.tsv")
    assert file_paths(task, str(tmp_path), "dev") == [plain]
    os.mkdir(tmp_path / "XNLI-1.0")
    for path in (plain + ".xz", plain):  # with both, the plain one is read
        with open(path, "wb"):
            pass
        assert file_paths(task, str(tmp_path), "dev") == [path]


def test_default_data(nothing_downloaded, tmp_path):
    xnli, atis, rte = map(find_task, ("xnli", "atis", "rte"))
    raw, sample = str(tmp_path / "raw"), os.path.join(ROOT, "data", "atis-sample")
    assert find_data(xnli, None, "mini") == os.path.join(ROOT, "data", "mini")
    assert find_data(atis, None, "scratch") == sample
    for task, model in ((xnli, "xlmr-base"), (xnli, "scratch"), (atis, "mini"), (rte, "minilm")):
        assert find_data(task, None, model) == raw
    for task in (xnli, atis, rte):
        assert find_data(task, "mine", "mini") == "mine"
    shutil.copytree(FLIGHTS, tmp_path / "raw" / "atis")
    assert find_data(atis, None, "scratch") == raw  # the official files are there
    shutil.copytree(SAMPLE, raw, dirs_exist_ok=True)
    assert find_data(xnli, None, "mini") == os.path.join(ROOT, "data", "mini")
    assert RAW_DIR == os.path.join(ROOT, "data", "raw") != raw


# ------------------------------------------------------------------------------ a task of one's own
def test_languages_come_from_the_files(monkeypatch):
    """languages=None: those of the split, the language of the training first."""
    found = {"test": {"am": 3, "de": 2, "pt/br": 1}, "train": {"de": 9}}

    def read(folder, split):
        return {language: [Example("a", None, i % 2) for i in range(count)] for language, count in found[split].items()}

    task = Task("news", "sequence", read, {}, "see its page", labels=("no", "yes"))
    task = replace(task, languages=None, train_language="de")
    monkeypatch.setitem(tasks.TASKS, "news", task)
    assert languages_of(task, "folder", "test") == ("de", "am", "pt/br")
    assert len(load(find_task("news"), "test", "pt/br", "folder")) == 1
    with pytest.raises(UserError, match="news: no train row in language 'am' .* only in: de"):
        load(find_task("news"), "train", "am", "folder")
    assert languages_of(find_task("mnli"), "folder", "test") == ("matched", "mismatched")


def test_held_out_rows_share_no_premise_with_the_rest():
    train = load(find_task("xnli"), "train", "en", SAMPLE)
    held, rest = (load(find_task("xnli"), split, "en", SAMPLE) for split in ("held-out", "rest"))
    assert sorted(held + rest) == sorted(train) and len(held) >= len(train) // 10
    assert not {example.text_a for example in held} & {example.text_a for example in rest}
    assert held == load(find_task("xnli"), "held-out", "en", SAMPLE)


def test_reported_rows_do_not_select_the_epoch():
    assert selection_splits(find_task("xnli"), "test") == ("train", "dev")
    assert selection_splits(find_task("xnli"), "dev") == ("rest", "held-out")
    assert selection_splits(find_task("stsb"), "dev") == ("train", "dev")  # dev is a part of train.tsv there


# ------------------------------------------------------------------------------------ your own rows
OWN = {
    "train": [("gut gut", "very good", "de"), ("schlecht", "bad", "de")] * 20,
    "dev": [("gut", "very good", "de"), ("schlecht gut", "bad", "de"), ("bon", "very good", "fr")],
    "test": [("gut schlecht", "very good", "de"), ("nul", "bad", "fr"), ("bon", "very good", "fr")],
}


TSV, TAGS = find_task("tsv"), find_task("tags")


@pytest.fixture
def own(tmp_path):
    """A folder of train.tsv, dev.tsv and test.tsv in two languages, and a function that writes one of them."""

    def write(split, rows, header=("text", "label", "language")):
        text = "".join("\t".join(row) + "\n" for row in [header, *rows])
        (tmp_path / f"{split}.tsv").write_text(text, encoding="utf-8")
        own_labels.cache_clear()
        read_own.cache_clear()

    for split, rows in OWN.items():
        write(split, rows)
    return tmp_path, write


def test_own_rows(own):
    folder, write = own
    assert own_labels(str(folder)) == ("bad", "very good") and own_language(TSV, str(folder), None) == "de"
    assert load(find_task("tsv"), "test", "fr", str(folder)) == [Example("nul", None, 0), Example("bon", None, 1)]
    assert languages_of(find_task("tsv", "de"), str(folder), "test") == ("de", "fr")
    # numbers in their order, a second text, no language
    write("train", [("2", "10", "b"), ("a", "9", "")], ("text", "label", "text2"))
    assert own_labels(str(folder)) == ("9", "10") and own_language(TSV, str(folder), None) == "all"
    assert [len(load(find_task("tsv"), split, "all", str(folder))) for split in ("held-out", "rest")] == [1, 1]
    assert load(find_task("tsv"), "train", "all", str(folder)) == [Example("2", "b", 1), Example("a", "", 0)]
    write("train", [("q", name, str(i)) for i, name in enumerate(("x", "-1", "9" * 5000, "0.5", "nan"))])
    assert own_labels(str(folder)) == ("-1", "0.5", "9" * 5000, "nan", "x")
    write("train", [("a", "x", "de"), ("b", "y", "en"), ("c", "y", "fr")])
    assert own_language(TSV, str(folder), None) == "en" and own_language(TSV, str(folder), "fr") == "fr"


def test_own_rows_of_a_spreadsheet(own):
    """Quoted labels are those without quotes, and a text may have several lines."""
    folder, write = own
    write("train", [('"He said ""gut"""', '"very good"', "de"), ('"two\r\nlines"', "bad", '"de"'), ("", "", "")])
    assert own_labels(str(folder)) == ("bad", "very good")
    assert load(find_task("tsv"), "train", "de", str(folder)) == [
        Example('He said "gut"', None, 1),
        Example("two\r\nlines", None, 0),
    ]


def test_mistakes_in_own_rows_name_file_and_line(own):
    folder, write = own

    def error(split="train"):
        with pytest.raises(UserError) as info:
            read_own(str(folder), split)
        return str(info.value)

    write("dev", [("a", "bad", "de"), ("b", "worse", "de")])
    assert f"{folder}/dev.tsv, line 3: unknown label 'worse'; known: bad, very good" in error("dev")
    write("test", [("a", "bad", "de"), (" ", "bad", "de")])
    assert "test.tsv, line 3: the text is empty" in error("test")
    write("test", [("a", "bad ", "de"), ("",), ("b", "bad", "de")])
    assert "test.tsv, line 3 is empty" in error("test")
    write("test", [("a", "bad", "b")], ("text", "label", "text2"))
    assert "only one of train.tsv and test.tsv has a column text2" in error("test")
    write("test", [("a", "bad", "de", "x")])
    assert "test.tsv, line 2: 4 columns, the header has 3" in error("test")
    write("test", [])
    assert "test.tsv has no rows" in error("test")
    write("test", [('"two\nlines"', "bad", "de"), ("a", "no", "de")])  # the line, not the row
    assert "test.tsv, line 4: unknown label 'no'" in error("test")
    write("test", [("a", '"bad\tone"', "de")])
    assert r"test.tsv, line 2: the label 'bad\tone' holds a tab or a line end" in error("test")
    write("test", [("a", "bad", '"de\nfr"')])
    assert r"test.tsv, line 2: the language 'de\nfr' holds a tab or a line end" in error("test")
    write("test", [('"\n\t"', "bad", "de")])
    assert "test.tsv, line 2: the text is empty" in error("test")
    write("train", OWN["train"], ("\ufefftext", "label", "language"))  # a byte order mark
    assert own_labels(str(folder)) == ("bad", "very good")
    write("train", OWN["train"], ("text", "class", "language"))
    assert "train.tsv, line 1: no column 'label'; it has: text class language" in error()
    write("train", [("a", "x", "de")] * 3)
    assert "train.tsv has one class" in error()
    write("train", [(f"a {i}", f"{i}.5", "de") for i in range(1001)])
    assert "train.tsv has 1,001 classes: are its labels numbers to predict?" in error()
    (folder / "train.tsv").write_text("")
    assert "train.tsv, line 1: no column 'text'" in error()
    (folder / "train.tsv").write_bytes(b"text\tlabel\n\xff\tbad\n")
    assert "train.tsv is not UTF-8 text" in error() and "fetch" not in error()
    (folder / "train.tsv").unlink()
    assert error() == f"no file {folder}/train.tsv: name its folder with --data-dir"
    write("train", [("a", "x", "de"), ("b", "y", "fr")])
    with pytest.raises(UserError, match="no language 'en': choose --train-language from de fr"):
        own_language(TSV, str(folder), None)


# ------------------------------------------------------------------------------------ your own tags
def write_tags(folder, **files):
    """Write sentences such as "Anna/B-who ran/O|Go/O" into train.txt, dev_de.txt (as dev-de.txt) and so on."""
    for name, text in files.items():
        lines = text.replace("|", "\n\n").replace(" ", "\n").replace("/", "\t") + "\n"
        (folder / (name.replace("_", "-") + ".txt")).write_text(lines, encoding="utf-8")
    own_tags.cache_clear()
    read_tokens.cache_clear()
    return str(folder)


def test_own_tags(tmp_path):
    folder = write_tags(tmp_path, train="Anna/B-who ran/O|Go/O home/B-to", dev="a/I-to", test="b/O c/S-who|d/E-who")
    assert own_tags(folder) == ("O", "B-to", "B-who", "I-to", "I-who")
    assert own_language(TAGS, folder, None) == "all" and languages_of(TAGS, folder, "test") == ("all",)
    assert TAGS.names(folder) == Names(("",), own_tags(folder), 1, 5)
    assert load(find_task("tags"), "dev", "all", folder) == [Sentence(("a",), ("I-to",), "")]
    assert [row.tags for row in load(find_task("tags"), "test", "all", folder)] == [("O", "B-who"), ("I-who",)]
    folder = write_tags(tmp_path, train="a/S-x b/B-y c/E-y")  # without O
    assert own_tags(folder) == ("B-x", "B-y", "I-x", "I-y")
    folder = write_tags(tmp_path, train="a/S-x b/NN|c/O d/10 e/9", dev="a/S-x")  # no spans: as they stand
    assert own_tags(folder) == ("O", "9", "10", "NN", "S-x")
    assert load(find_task("tags"), "dev", "all", folder)[0].tags == ("S-x",)


def test_own_tags_in_several_languages(tmp_path):
    folder = write_tags(tmp_path, train_en="a/X b/Y", train_de="c/Z", dev_en="a/X", test_pt_br="b/Y", test_en="a/Z")
    assert own_tags(folder) == ("X", "Y", "Z")
    assert own_language(TAGS, folder, None) == "en" and own_language(TAGS, folder, "de") == "de"
    assert languages_of(find_task("tags", "en"), folder, "test") == ("en", "pt-br")
    with pytest.raises(UserError, match="no language 'fr': choose --train-language from de en"):
        own_language(TAGS, folder, "fr")
    os.rename(tmp_path / "train-en.txt", tmp_path / "train-en.conll")
    os.rename(tmp_path / "test-en.txt", tmp_path / "test-en.tsv")
    own_tags.cache_clear()
    assert file_paths(TAGS, folder, "train") == [f"{folder}/{name}" for name in ("train-de.txt", "train-en.conll")]
    assert load(find_task("tags"), "test", "en", folder)[0].tags == ("Z",)
    shutil.copy(tmp_path / "test-en.tsv", tmp_path / "test-en.txt")  # which of the two?
    with pytest.raises(UserError, match="test-en.tsv and .*test-en.txt are the same split: keep one"):
        load(find_task("tags"), "test", "en", folder)


def test_mistakes_in_own_tags_name_file_and_line(tmp_path):
    def error(split, **files):
        with pytest.raises(UserError) as info:
            load(find_task("tags"), split, "all", write_tags(tmp_path, **files))
        assert "fetch" not in str(info.value)
        return str(info.value)

    assert error("train") == f"no file {tmp_path}/train.txt: name its folder with --data-dir"
    assert "dev.txt, line 3: unknown tag 'Z'; known: X Y" in error("dev", train="a/X b/Y", dev="a/X|b/Z")
    assert "dev.txt, line 1: unknown tag 'B-no'; known: O B-to I-to" in error("dev", train="a/O b/B-to", dev="a/U-no")
    assert "train.txt, line 2: 'b' is not a word and its tag" in error("train", train="a/X b")
    assert r"line 2: 'b\t' is not a word and its tag" in error("train", train="a/X b/")
    assert "train.txt has one class" in error("train", train="a/O b/O")
    assert error("train", train="|").endswith("train.txt has no rows")
    assert "has 1,001 classes" in error("train", train=" ".join(f"w/tag{i}" for i in range(1001)))

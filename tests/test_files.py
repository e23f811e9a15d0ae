"""data/files.py: text files, compressed or not, and tab-separated rows."""

import lzma

import pytest
from conftest import SAMPLE

from common import UserError
from data.files import existing, open_text, read_tsv
from data.tasks import find_task, load, read_xnli

FETCH = "python data/fetch.py xnli"
TABLE = "a\tb\tc\n1\t2\t3\n\t'\t\"\n"


def message_of(path, *columns, **options):
    with pytest.raises(UserError) as error:
        list(read_tsv(str(path), columns or ("a",), FETCH, **options))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_compressed_and_plain_files_read_the_same(tmp_path):
    """PATH.xz stands for PATH: the same rows, lines and examples."""
    task = find_task("xnli")
    for files in task.files.values():
        for name in files:
            with open(f"{SAMPLE}/{name}", "rb") as file:
                content = file.read()
            target = tmp_path / f"{name}.xz"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(lzma.compress(content))
            texts = []
            for folder in (SAMPLE, tmp_path):
                with open_text(f"{folder}/{name}", FETCH) as file:
                    texts.append(list(file))
            assert texts[0] == texts[1] and len(texts[0]) > 40
    read_xnli.cache_clear()
    for split, language in (("train", "en"), ("dev", "zh"), ("test", "sw")):
        plain, compressed = (load("xnli", split, language, str(folder)) for folder in (SAMPLE, tmp_path))
        assert plain == compressed


def test_the_plain_file_comes_first(tmp_path):
    path = str(tmp_path / "x.tsv")
    assert existing(path) is None
    with lzma.open(path + ".xz", "wt") as file:
        file.write("a\ncompressed\n")
    assert existing(path) == path + ".xz"
    assert list(read_tsv(path, ("a",), FETCH)) == [(2, ["compressed"])]
    with open(path, "w") as file:
        file.write("a\nplain\n")
    assert existing(path) == path
    assert list(read_tsv(path, ("a",), FETCH)) == [(2, ["plain"])]


def test_columns_are_found_by_name(tmp_path):
    path = tmp_path / "x.tsv"
    for start, end in (("", "\n"), ("\ufeff", "\n"), ("", "\r\n")):
        path.write_bytes((start + TABLE.replace("\n", end)).encode())
        assert list(read_tsv(str(path), ("c", "a"), FETCH)) == [(2, ["3", "1"]), (3, ['"', ""])]
    assert "line 1: no column 'd'; it has: a b c" in message_of(path, "d")


def test_rows_without_a_header(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text("1\t2\n3\n4\t5\n")
    assert "line 2: 1 columns, the layout has 2" in message_of(path, header=("a", "b"))
    malformed = []
    rows = list(read_tsv(str(path), ("b",), FETCH, ("a", "b"), malformed))
    assert rows == [(1, ["2"]), (3, ["5"])] and malformed == [2]


def test_not_utf8(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_bytes(TABLE.encode() + b"1\t\xff\xfe\t2\n")
    assert "not UTF-8" in message_of(path) and FETCH in message_of(path)
    (tmp_path / "y.tsv.xz").write_bytes(lzma.compress(path.read_bytes()))
    assert "y.tsv.xz is not UTF-8" in message_of(tmp_path / "y.tsv")


def test_missing_and_damaged_files(tmp_path):
    path = tmp_path / "x.tsv"
    text = message_of(path)
    assert f"no file {path}: fetch it with '{FETCH}'" in text and "--data-dir" in text
    path.mkdir()
    assert "no file" in message_of(path)
    path.rmdir()
    whole = lzma.compress(TABLE.encode() * 1000)
    for content in (b"garbage", whole[: len(whole) // 2], whole[:-20] + b"x" * 20):
        (tmp_path / "x.tsv.xz").write_bytes(content)
        text = message_of(path)
        assert "x.tsv.xz is damaged" in text and f"fetch it again with '{FETCH}'" in text

"""data/files.py: text files, compressed or not, and tab-separated rows."""

import csv
import lzma

import pytest
from conftest import SAMPLE

from data.files import existing, open_text, read_tsv
from data.tasks import find_task, load, read_xnli
from kit.common import UserError

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
        plain, compressed = (load(find_task("xnli"), split, language, str(folder)) for folder in (SAMPLE, tmp_path))
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


def own_cells(path, *columns):
    return list(read_tsv(str(path), columns or ("text", "label"), ""))


def test_quoted_cells_of_own_files(tmp_path):
    """What csv and pandas write is read back, with the number of each row's first line; official files have no quoting."""
    path = tmp_path / "x.tsv"
    rows = [
        ['said "hi"', "a"],
        ['"whole"', 'b "quoted"'],
        ["a\ttab", "c"],
        ["two\r\nlines\n\nmore", "d"],
        ["", ""],
        ["it's 5\" long", "e\u2028"],
        ["x" * 200_000 + '"', "f"],
        ["last", "g"],
    ]
    numbers = [2, 3, 4, 5, 9, 10, 11, 12]
    for quoting, end in ((csv.QUOTE_MINIMAL, "\n"), (csv.QUOTE_ALL, "\r\n"), (csv.QUOTE_NONNUMERIC, "\r\n")):
        with open(path, "w", encoding="utf-8-sig", newline="") as file:
            writer = csv.writer(file, "excel-tab", quoting=quoting, lineterminator=end)
            writer.writerows([["text", "label"], *rows])
        assert own_cells(path) == list(zip(numbers, rows, strict=True))
    path.write_text('text\tlabel\n"as ""it"" is"\tb\n')
    assert list(read_tsv(str(path), ("text",), FETCH)) == [(2, ['"as ""it"" is"'])]
    path.write_text('text\tlabel\nan "inner" quote\tb"\n')
    assert own_cells(path) == [(2, ['an "inner" quote', 'b"'])]


def test_files_of_pandas(tmp_path):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    rows = [['"So" he said', "a"], ["two\nlines", "b"], ["a\ttab", 'c"']]
    pandas.DataFrame(rows, columns=["text", "label"]).to_csv(tmp_path / "x.tsv", sep="\t", index=False)
    assert [cells for _, cells in own_cells(tmp_path / "x.tsv")] == rows


@pytest.mark.parametrize(
    "row",
    [
        '"Yes" she said\ta',  # no closing quote at the end
        'a\t"b" c',
        '"a ""b" c""\td',
        '"open\ta',  # to the end of the file
        '"a \\"b\\""\tc',  # backslashes, as R writes them
        '"I went.\ta\nThen I slept."\tb',  # a dialogue: its two lines are rows
        'a\t"I went.\nb\tThen I slept."',
    ],
)
def test_other_quotes_are_refused(row, tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text(f'text\tlabel\nfirst\ta\n"two\nlines"\ta\n{row}\nlast\tb\n')
    with pytest.raises(UserError) as error:
        own_cells(path)
    assert f"{path}, line 5: a cell begins with a quote: quote it whole and double the quotes" in str(error.value)
    assert 'pandas\' to_csv(sep="\\t")' in str(error.value)


def test_blank_rows_at_the_end_of_own_files(tmp_path):
    path = tmp_path / "x.tsv"
    for end in ("\n", "\n\n\n", "\n\t\n", "\r\n \t\r\n\r\n", '\n""\t""\n', ""):
        path.write_bytes(f"text\tlabel\na\tb{end}".encode())
        assert own_cells(path) == [(2, ["a", "b"])]
    path.write_text("text\tlabel\na\tb\n\nc\td\n\n")
    with pytest.raises(UserError, match="line 3 is empty: the header has 2 columns"):
        own_cells(path)
    path.write_text("a\tb\n1\t2\n\n")
    assert "line 3 is empty" in message_of(path)  # official files have none


def test_columns_named_twice(tmp_path):
    path = tmp_path / "x.tsv"
    for header, columns in (("text\tlabel\ttext", ()), ('text\t"label"\tlabel', ()), ("b\tb\ta", ("a", "b"))):
        path.write_text(header + "\n1\t2\t3\n")
        with pytest.raises(UserError, match=r"line 1: several columns are named '(text|label|b)'"):
            own_cells(path, *columns)
    path.write_text("text\tlabel\t\t\nx\ty\t\t\n")  # columns without a name, as spreadsheets leave them
    assert own_cells(path) == [(2, ["x", "y"])]
    path.write_text("a\ta\n")
    assert "several columns are named 'a'" in message_of(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16(encoding, tmp_path):
    path = tmp_path / "x.tsv"
    for text in ("text\tlabel\n", "EU B-ORG\n", "\u4e2d\u6587\tO\n", "a"):
        path.write_bytes(text.encode(encoding))
        with (
            pytest.raises(UserError, match="x.tsv is UTF-16, or holds NUL bytes: save it as UTF-8"),
            open_text(str(path), "") as file,
        ):
            file.read()
    (tmp_path / "y.tsv.xz").write_bytes(lzma.compress(path.read_bytes()))
    assert "y.tsv.xz is UTF-16" in message_of(tmp_path / "y.tsv")


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

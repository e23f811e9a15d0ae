"""data/files.py: text files, compressed or not, tab-separated rows, and labelled examples."""

import csv
import itertools
import lzma

import pytest

from data.files import existing, open_text, read_examples, read_tsv
from kit.common import UserError

FETCH = "python data/fetch.py xnli"
TABLE = "a\tb\tc\n1\t2\t3\n\t'\t\"\n"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.tsv"


def message_of(path, *columns, **options):
    with pytest.raises(UserError) as error:
        list(read_tsv(str(path), columns or ("a",), FETCH, **options))
    return str(error.value)


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


def test_columns_are_found_by_name(path):
    for start, end in (("", "\n"), ("\ufeff", "\n"), ("", "\r\n")):
        path.write_bytes((start + TABLE.replace("\n", end)).encode())
        assert list(read_tsv(str(path), ("c", "a"), FETCH)) == [(2, ["3", "1"]), (3, ['"', ""])]
    assert "line 1: no column 'd'; it has: a b c" in message_of(path, "d")
    assert list(read_tsv(str(path), ("d", "a"), FETCH, optional=("d",)))[0] == (2, [None, "1"])


def test_rows_without_a_header(path):
    path.write_text("1\t2\n3\n4\t5\n")
    assert "line 2: 1 columns, the layout has 2" in message_of(path, header=("a", "b"))
    path.write_text("1\t2\n" * 99 + "3\n4\t5\n")
    rows = list(read_tsv(str(path), ("b",), FETCH, ("a", "b"), tolerant=True))
    assert len(rows) == 100 and rows[-1] == (101, ["5"])
    path.write_text("1\t2\n" * 97 + "3\n4\n")
    assert "line 98 and 1 more have too few or too many columns" in message_of(path, header=("a", "b"), tolerant=True)


def test_examples(path):
    """Texts of one or two columns, labels in any spelling, languages."""
    path.write_text('q\ta\tb\tl\tin\none\ttwo\t\tyes\tde\n"\tx\ty\tyep\ten\nz\tz\tz\tno\tde\n')
    found = read_examples(str(path), ("q", "a + b"), ("no", ("yes", "yep")), FETCH, "l", "in")
    assert found == {"de": [("one", "two ", 1), ("z", "z z", 0)], "en": [('"', "x y", 1)]}
    (rows,) = read_examples(str(path), ("b",), ("de", "en"), FETCH, "in").values()
    assert rows == [("", None, 0), ("y", None, 1), ("z", None, 0)]
    with pytest.raises(UserError, match="x.tsv, line 3: unknown label 'yep'; known: no, yes"):
        read_examples(str(path), ("q",), ("no", "yes"), FETCH, "l")
    path.write_text("a\tlabel\nx\t1.5\n")
    assert read_examples(str(path), ("a",), (), FETCH) == {"all": [("x", None, 1.5)]}
    path.write_text("a\tlabel\n")
    with pytest.raises(UserError, match="has no rows: fetch it again with"):
        read_examples(str(path), ("a",), ("b",), FETCH)


def own_cells(path, *columns):
    return list(read_tsv(str(path), columns or ("text", "label"), ""))


def test_quoted_cells_of_own_files(path):
    """What csv and pandas write is read back, with the number of each row's first line; official files have no quoting."""
    rows = [['said "hi"', "a"], ['"whole"', 'b "quoted"'], ["a\ttab", "c"], ["two\r\nlines\n\nmore", "d"], ["", ""]]
    rows += [["it's 5\" long", "e\u2028"], ["x" * 200_000 + '"', "f"], ["last", "g"]]
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
        '"open\ta',  # to the end of the file
        '"a \\"b\\""\tc',  # backslashes, as R writes them
        '"I went.\ta\nThen I slept."\tb',  # a dialogue: its two lines are rows
    ],
)
def test_other_quotes_are_refused(row, path):
    path.write_text(f'text\tlabel\nfirst\ta\n"two\nlines"\ta\n{row}\nlast\tb\n')
    with pytest.raises(UserError, match="line 5: a cell begins with a quote: quote it whole and double the quotes"):
        own_cells(path)


def test_blank_rows_at_the_end_of_own_files(path):
    for end in ("\n", "\n\n\n", "\n\t\n", "\r\n \t\r\n\r\n", '\n""\t""\n', ""):
        path.write_bytes(f"text\tlabel\na\tb{end}".encode())
        assert own_cells(path) == [(2, ["a", "b"])]
    path.write_text("text\tlabel\na\tb\n\nc\td\n\n")
    with pytest.raises(UserError, match="line 3: 1 columns, the header has 2"):
        own_cells(path)
    path.write_text("a\tb\n1\t2\n\n")
    assert "line 3: 1 columns" in message_of(path)  # official files have none


def test_columns_named_twice(path):
    path.write_text('text\t"label"\tlabel\n1\t2\t3\n')
    with pytest.raises(UserError, match="line 1: several columns are named 'label'"):
        own_cells(path)
    path.write_text("text\tlabel\t\t\nx\ty\t\t\n")  # columns without a name, as spreadsheets leave them
    assert own_cells(path) == [(2, ["x", "y"])]


def test_missing_and_damaged_files(path):
    text = message_of(path)
    assert f"no file {path}: fetch it with '{FETCH}'" in text and "--data-dir" in text
    with pytest.raises(UserError, match="x.tsv: name its folder"), open_text(str(path), ""):
        pass
    compressed = path.with_name("x.tsv.xz")
    whole = lzma.compress(TABLE.encode() * 1000)
    for content, what in (
        (whole[: len(whole) // 2], "damaged"),
        (whole[:-20] + b"x" * 20, "damaged"),
        (lzma.compress(TABLE.encode() + b"1\t\xff\xfe\t2\n"), "not UTF-8"),
    ):
        compressed.write_bytes(content)
        text = message_of(path)
        assert f"x.tsv.xz is {what}" in text and f"fetch it again with '{FETCH}'" in text
    for text, encoding in itertools.product(("a\n", "\u4e2d\tO\n", "a"), ("utf-16", "utf-16-le", "utf-16-be")):
        path.write_bytes(text.encode(encoding))
        assert "x.tsv is UTF-16, or holds NUL bytes: save it as UTF-8" in message_of(path)

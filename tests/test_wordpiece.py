"""data/wordpiece.py and WordPieceTokenizer against Hugging Face's ids: tests/golden_bert/tokens.json, and many more."""

import itertools
import json
import os
import random
import unicodedata

import numpy as np
import pytest
from conftest import ROOT, SAMPLE

from data.tokenizer import SPECIALS, WORDPIECE_MAGIC, WordPieceTokenizer, load_tokenizer
from data.wordpiece import basic_tokens, is_punctuation, word_pieces
from kit.common import UserError

GOLDEN = os.path.join(ROOT, "tests", "golden_bert")
with open(os.path.join(GOLDEN, "vocab.txt"), "rb") as _file:
    VOCAB = _file.read()
ODD = (
    *("", " ", "\n", "x" * 100, "x" * 101, "a\u200bb", "İ", "ΟΔΟΣ", "e\u0301", "[SEP]", "[sep]"),
    *("don't", "naïve", "没有", "\U00020000", "\U0002b820", "🧑‍🚀", "\u0378", "\x85", "\u2028", "##a"),
)


@pytest.fixture(scope="module")
def wordpiece():
    return {lower: WordPieceTokenizer.from_vocab(VOCAB, lower) for lower in (True, False)}


def types_of(row, begin):
    return [0] * int(begin) + [1] * (len(row) - int(begin))


# ------------------------------------------------------------------------------- against the golden
def test_equals_hugging_face(wordpiece):
    with open(os.path.join(GOLDEN, "tokens.json"), encoding="utf-8") as file:
        cases = json.load(file)
    assert len(cases) > 500 and sum(len(ids) == case[3] for *case, ids, _ in cases) > 100
    for lower, first, second, length, ids, types in cases:
        b = None if second is None else [second]
        (row,), (begin,) = wordpiece[lower].encode_typed([first], b, length)
        assert row.tolist() == ids, (lower, first, second, length)
        assert types_of(row, begin) == types
        assert row.dtype == np.int32 and begin.dtype == np.int64


def test_pieces_are_cached(wordpiece, monkeypatch):
    monkeypatch.setattr("data.tokenizer.MAX_CACHED", 3)
    fresh = WordPieceTokenizer.from_vocab(VOCAB, True)
    for text in ("The girl reads", "girl [SEP] girl", "", "don't don't"):
        assert fresh.encode(text) == fresh.encode(text) == wordpiece[True].encode(text)
    fresh.encode("The girl")[0] = 7  # the caller gets a copy
    assert fresh.encode("The girl") == wordpiece[True].encode("The girl") and len(fresh._known) == 3


# ------------------------------------------------------------------------------------- the two steps
def test_basic_tokens():
    assert basic_tokens("Él dijo", lower=False) == ["Él", "dijo"]
    assert basic_tokens("ΟΔΟΣ İI", lower=True) == ["οδοσ", "ii"]
    assert basic_tokens("$5+3~`a`", lower=True) == ["$", "5", "+", "3", "~", "`", "a", "`"]
    assert basic_tokens("a\x00b\ufffdc\u00add\re\u3000f\x85g", lower=True) == ["abcd", "e", "fg"]
    assert basic_tokens("カタカナ 한국", lower=False) == ["カタカナ", "한국"]
    assert basic_tokens(" \n\u200b", lower=True) == []


def test_shortcut_for_ascii_gives_the_same_tokens():
    """Plain ASCII skips three of the steps; with an invisible character it goes through them."""
    random.seed(1)
    for _ in range(300):
        text = "".join(random.choices([chr(c) for c in range(32, 127)], k=20))
        assert basic_tokens(text, True) == basic_tokens(text + "\u200b", True)


def test_every_ascii_symbol_is_punctuation():
    for code in range(128):
        symbol = 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126
        assert is_punctuation(chr(code)) == symbol
    assert all(map(is_punctuation, "–…¿“。")) and not any(map(is_punctuation, "€±éа中"))


def test_word_pieces_by_brute_force():
    """The longest piece is taken first; if then none continues the word, it is unknown, even if others would cover it."""
    vocabulary = {"a", "ab", "##b", "##ba", "##bab", "b", "##a", "aab", "##c"}

    def greedy(word, mark=""):
        for end in range(len(word), 0, -1):
            if mark + word[:end] in vocabulary:
                return [mark + word[:end], *(greedy(word[end:], "##") if word[end:] else [])]
        return ["stuck"]

    for length in range(1, 7):
        for letters in itertools.product("abc", repeat=length):
            want = greedy("".join(letters))
            want = ["[UNK]"] if "stuck" in want else want
            assert word_pieces("".join(letters), vocabulary) == want
    assert word_pieces("a" * 100, {"a", "##a"}) == ["a"] + ["##a"] * 99
    assert word_pieces("a" * 101, {"a", "##a"}) == ["[UNK]"]


# ------------------------------------------------------------------------------------- the interface
def test_bytes_tell_the_kind_and_the_layout(wordpiece):
    lines = VOCAB.decode().splitlines()
    for lower, made in wordpiece.items():
        again = load_tokenizer(made.bytes)
        assert isinstance(again, WordPieceTokenizer) and again.sha256 == made.sha256 and again.lower is lower
        assert made.vocab_size == len(lines) and made.typed
        assert (made.pad_id, made.mask_id) == (lines.index("[PAD]"), lines.index("[MASK]"))
        assert made.bytes == f"{WORDPIECE_MAGIC} {'lower' if lower else 'cased'}\n".encode() + VOCAB
    for same in (VOCAB.rstrip(b"\n"), VOCAB.replace(b"\n", b"\r\n")):
        assert WordPieceTokenizer.from_vocab(same, True).bytes == wordpiece[True].bytes


def test_no_texts_and_no_room(wordpiece):
    made = wordpiece[True]
    rows, begins = made.encode_typed([])
    assert rows == [] and begins.shape == (0,)
    assert made.encode("a", "b", 3) == [made.cls_id, made.sep_id, made.sep_id]
    with pytest.raises(ValueError):
        made.encode_batch(["a", "b"], ["c"])


def test_words_are_encoded_by_themselves(wordpiece, tokenizer):
    sentences = [["The", "extraordinarily", "old", "man"], ["\u200b", "don't", "ꙮ", "</s>"], []]
    for made in (wordpiece[True], tokenizer):
        unknown = made.encode("ꙮ")[-2:-1]  # also of a zero-width space: it has no piece, but its tag needs a token
        for words, (ids, first) in zip(sentences, made.encode_words(sentences), strict=True):
            assert ids.dtype == np.int32 and first.dtype == np.int64 and len(first) == len(words)
            assert (ids[0], ids[-1]) == (made.cls_id, made.sep_id) and made.sep_id not in ids[1:-1]
            for word, begin, end in zip(words, first, [*first, len(ids) - 1][1:], strict=True):
                assert ids[begin:end].tolist() == (made.encode(word)[1:-1] or unknown)


LOWER = f"{WORDPIECE_MAGIC} lower\n".encode()
FIVE = "".join(f"{special}\n" for special in SPECIALS).encode()


@pytest.mark.parametrize(
    "content, message",
    [
        (LOWER + FIVE + b"\xff\n", "is not UTF-8"),
        (LOWER + FIVE.replace(b"[MASK]\n", b"a\n"), r"has no \[MASK\]"),
        (LOWER + FIVE + b"a\nb\na\n", "lists 'a' twice"),
        (LOWER + FIVE + b"a b\n", "line 6, 'a b', is not a piece"),
    ],
)
def test_damaged_vocabularies_raise(content, message):
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(content, "model.pt")
    assert "\n" not in str(error.value) and str(error.value).startswith("model.pt")


# ------------------------------------------------------------------------- with more files or libraries
def test_every_character_as_hugging_face():
    """Compare most of Unicode, one character at a time."""
    tokenizers = pytest.importorskip("tokenizers", reason="Hugging Face tokenizers not installed")
    split = tokenizers.pre_tokenizers.BertPreTokenizer()
    blocks = [(0, 0x3500), (0xA000, 0xAC10), (0xF8F0, 0x11000), (0x1D100, 0x1D800)]
    blocks += [(0x1F000, 0x20010), (0x2A6D0, 0x2A710), (0x2B730, 0x2B930), (0x2F7F0, 0x2FA30)]
    characters = [chr(code) for first, last in blocks for code in range(first, last)]
    differing = set()
    for lower in (True, False):
        normal = tokenizers.normalizers.BertNormalizer(lowercase=lower)
        for char in characters:
            text = normal.normalize_str(f"a{char}B")
            theirs = [token for token, _ in split.pre_tokenize_str(text)]
            if theirs != basic_tokens(f"a{char}B", lower):
                differing.add(char)
    # Those that differ are newer than Unicode 8, as data/wordpiece.py says. Python has the tables of
    # 3.2 to compare; four older ones (U+166D, U+1734, U+1885, U+1886) have other categories since.
    old = {c for c in differing if unicodedata.ucd_3_2_0.category(c) != "Cn"}
    assert len(differing) < 600 and len(old) < 10, sorted(map(hex, map(ord, old)))


@pytest.mark.parametrize("lower", [True, False])
def test_a_real_vocabulary(lower):
    folder = os.environ.get("SDQ_MINILM")
    if not folder:
        pytest.skip("SDQ_MINILM names no Hugging Face folder of MiniLM")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    path = os.path.join(folder, "vocab.txt")
    reference = transformers.BertTokenizer(path, do_lower_case=lower)
    with open(path, "rb") as file:
        made = WordPieceTokenizer.from_vocab(file.read(), lower)
    assert made.vocab_size == 30522
    with open(os.path.join(SAMPLE, "XNLI-1.0", "xnli.test.tsv"), encoding="utf-8") as file:
        lines = [*file.read().splitlines(), *ODD, *(f"{a}{b} {a}" for a in ODD for b in ODD)]
    words, rng = [*" ".join(lines).split(" "), *ODD], random.Random(0)
    lines += [" ".join(rng.choices(words, k=rng.randrange(1, 40))) for _ in range(1000)]  # mixed scripts
    other = lines[1:] + lines[:1]
    for b, length in ((None, None), (other, 32)):
        options = {} if length is None else {"truncation": True, "max_length": length}
        want = reference(lines, b, **options)
        rows, begins = made.encode_typed(lines, b, length)
        for i, (row, begin) in enumerate(zip(rows, begins, strict=True)):
            assert row.tolist() == want["input_ids"][i], lines[i]
            assert types_of(row, begin) == want["token_type_ids"][i]

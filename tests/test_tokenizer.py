"""data/tokenizer.py against Hugging Face's ids (tests/golden/tokens.json) and against SentencePiece itself."""

import json
import os

import numpy as np
import pytest
import sentencepiece
from conftest import GOLDEN, TOKENIZER

from data.tokenizer import BOS, EOS, UNK, Tokenizer, WordTokenizer, load_tokenizer, longest_first
from data.tokenizer_json import read_tokenizer_json, tokenizer_json
from kit.common import UserError


def test_equals_hugging_face(tokenizer):
    with open(os.path.join(GOLDEN, "tokens.json"), encoding="utf-8") as file:
        cases = json.load(file)
    assert len(cases) > 150 and any(len(ids) == length for _, _, length, ids in cases)
    for first, second, length, ids in cases:
        assert tokenizer.encode(first, second, length) == ids, (first, second, length)


def test_layout(tokenizer):
    pieces = sentencepiece.SentencePieceProcessor(model_file=TOKENIZER)
    assert tokenizer.vocab_size == pieces.get_piece_size() + 2
    assert tokenizer.mask_id == tokenizer.vocab_size - 1
    text = "The girl reads a book."
    ids = [i + 1 for i in pieces.encode(text)]
    assert tokenizer.encode(text) == [BOS, *ids, EOS]
    assert tokenizer.encode(text, text) == [BOS, *ids, EOS, EOS, *ids, EOS]
    assert UNK in tokenizer.encode("ꙮ")
    assert tokenizer.encode("") == [BOS, EOS]


def test_special_tokens_in_text_stay_text(tokenizer):
    """A user's "</s>" must not become the separator of two texts."""
    inner = tokenizer.encode("a </s> b <s> <mask>")[1:-1]
    assert EOS not in inner and BOS not in inner and tokenizer.mask_id not in inner


def test_a_batch_equals_single_texts(tokenizer):
    first, second = ["The man", "Der Mann kaufte Äpfel.", ""], ["女孩在读书。", "", "x"]
    batch = tokenizer.encode_batch(first, second, 9)
    assert [row.tolist() for row in batch] == [tokenizer.encode(a, b, 9) for a, b in zip(first, second, strict=True)]
    assert all(row.dtype == np.int32 for row in batch)


@pytest.mark.parametrize("left", range(0, 12))
@pytest.mark.parametrize("right", range(0, 12))
def test_longest_first_by_brute_force(left, right):
    """The longer text is cut; on a tie the second text keeps the odd token, unless the first was the longer one."""
    for room in range(0, 24):
        a, b = longest_first(left, right, room)
        assert a + b == min(left + right, room) and a <= left and b <= right
        if left + right > room:
            assert abs(a - b) <= 1 or (a == left and b > a) or (b == right and a > b)


def test_unusable_models_raise(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at"):
        Tokenizer.from_file(str(tmp_path / "none.model"))
    for content in (b"", b"garbage" * 100):
        path = tmp_path / "bad.model"
        path.write_bytes(content)
        with pytest.raises(UserError, match="bad.model is not a SentencePiece model"):
            Tokenizer.from_file(str(path))
    with pytest.raises(UserError, match="trained.model is not a SentencePiece model with <unk> 0, <s> 1"):
        trained(tmp_path, "unigram", pad_id=0, unk_id=1, bos_id=2, eos_id=3)


def test_no_room_for_special_tokens(tokenizer):
    with pytest.raises(UserError, match="no room"):
        tokenizer.encode("a", "b", 3)


# ---------------------------------------------------------------------------------- list of words
@pytest.fixture
def words():
    return WordTokenizer.build([["b", "a", "ñ", "c"], ["a", "ñ", "b"], ["c", "c", "once", "<s>"]])


def test_words_by_falling_count_then_alphabetically(words):
    assert words.bytes.decode() == "sdq-words-1\nc\na\nb\nñ\n"
    assert words.vocab_size == 8 and len(words.sha256) == 64
    assert words.encode("c a  once <s> ñ ") == [BOS, 4, 5, UNK, UNK, 7, EOS]
    assert words.encode("a b c", max_length=4) == [BOS, 5, 6, EOS]
    assert words.encode("") == [BOS, EOS] and words.encode("a", "b") == [BOS, 5, EOS, EOS, 6, EOS]
    assert [row.tolist() for row in words.encode_batch(["a", "b b"])] == [[BOS, 5, EOS], [BOS, 6, 6, EOS]]
    ((ids, first),) = words.encode_words([["a", "what", "b"]])
    assert ids.tolist() == [BOS, 5, UNK, 6, EOS] and ids.dtype == np.int32
    assert first.tolist() == [1, 2, 3] and first.dtype == np.int64
    every = WordTokenizer.build([["b", "a"], ["<s>", "</s>"]], min_count=1)
    assert every.encode("</s> <s>") == [BOS, 4, 5, EOS]  # a user's "</s>" is a word
    with pytest.raises(UserError, match="no word occurs 2 times"):
        WordTokenizer.build([["a", "b"]])


def test_bytes_tell_the_kind_of_tokenizer(words, tokenizer):
    for made in (words, tokenizer):
        found = load_tokenizer(made.bytes)
        assert type(found) is type(made) and found.sha256 == made.sha256
        assert found.encode("c ñ what") == made.encode("c ñ what")


# -------------------------------------------------------------------------------- tokenizer.json
TEXTS = ["The girl reads a book", "the  boys\tread two books", "Ｔhe ﬁrst ½ of the book", "ꙮꙮ bookꙮ", "", " a "] * 20


def trained(tmp_path, kind, **options):
    """A SentencePiece model of TEXTS."""
    options = {"vocab_size": 60, "character_coverage": 0.98, "hard_vocab_limit": False, "minloglevel": 2} | options
    prefix = str(tmp_path / "trained")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=prefix, model_type=kind, **options
    )
    return Tokenizer.from_file(prefix + ".model")


@pytest.mark.parametrize(
    "options", [{}, {"normalization_rule_name": "identity"}, {"normalization_rule_name": "nfkc_cf"}]
)
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_tokenizer_json_gives_the_same_ids(tmp_path, kind, options):
    made = trained(tmp_path, kind, **options)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tokenizer_json(made)))
    again, listed = read_tokenizer_json(str(path))
    assert listed == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] and again.vocab_size == made.vocab_size
    want = [row.tolist() for row in made.encode_batch(TEXTS, TEXTS[::-1])]
    assert [row.tolist() for row in again.encode_batch(TEXTS, TEXTS[::-1])] == want
    # Hugging Face's library is not among the requirements.
    library = pytest.importorskip("tokenizers", reason="tokenizers is not installed").Tokenizer.from_file(str(path))
    assert [each.ids for each in library.encode_batch(list(zip(TEXTS, TEXTS[::-1], strict=True)))] == want


@pytest.mark.parametrize(
    "kind, options",
    [
        ("unigram", {"add_dummy_prefix": False}),
        ("bpe", {"remove_extra_whitespaces": False}),
        ("unigram", {"treat_whitespace_as_suffix": True}),
        ("unigram", {"split_by_whitespace": False}),
        ("bpe", {"byte_fallback": True, "vocab_size": 400}),
        ("bpe", {"user_defined_symbols": ["<e1>"]}),
        ("word", {}),
    ],
)
def test_what_a_tokenizer_json_cannot_hold(tmp_path, kind, options):
    with pytest.raises(UserError, match="can't hold|would differ"):
        tokenizer_json(trained(tmp_path, kind, **options))


def test_bpe_that_is_not_that_of_sentencepiece(tmp_path):
    good = tokenizer_json(trained(tmp_path, "bpe"))
    merges = good["model"]["merges"]
    path = tmp_path / "tokenizer.json"
    for changes in (
        {"merges": merges[1:]},
        {"merges": [*merges, merges[0]]},
        {"fuse_unk": False},
        {"byte_fallback": True},
        {"vocab": {piece: i + (i > 9) for piece, i in good["model"]["vocab"].items()}},
    ):
        path.write_text(json.dumps({**good, "model": good["model"] | changes}))
        with pytest.raises(UserError, match="tokenizer.json: BPE with other rules or merges than SentencePiece's"):
            read_tokenizer_json(str(path))
    swapped = {"merges": [merges[1], merges[0], *merges[2:]]}  # this SentencePiece model has other scores
    path.write_text(json.dumps({**good, "model": good["model"] | swapped}))
    assert tokenizer_json(read_tokenizer_json(str(path))[0])["model"]["merges"] == swapped["merges"]
    old = {"merges": [" ".join(pair) for pair in merges], "dropout": None, "ignore_merges": False}
    path.write_text(json.dumps({**good, "model": good["model"] | old}))  # as the library wrote them before
    assert read_tokenizer_json(str(path))[0].vocab_size == len(good["model"]["vocab"])


def test_the_real_xlmr_model():
    """XLM-R's own SentencePiece model, and ids of fairseq and Hugging Face."""
    folder = os.environ.get("SDQ_XLMR")
    if not folder:
        pytest.skip("SDQ_XLMR names no folder with XLM-R's SentencePiece model and reference ids")
    tokenizer = Tokenizer.from_file(os.path.join(folder, "sentencepiece.bpe.model"))
    assert tokenizer.vocab_size == 250_002 and tokenizer.mask_id == 250_001
    with open(os.path.join(folder, "fairseq_hf_oracle.json")) as file:
        for case in json.load(file):
            assert tokenizer.encode(case["text"]) == case["ids_with_specials"], case["text"]
    with open(os.path.join(folder, "xlmr_fairseq_oracle.json")) as file:
        for case in json.load(file)["cases"]:
            assert tokenizer.encode(case["text"])[1:-1] == case["ids"], case["text"]

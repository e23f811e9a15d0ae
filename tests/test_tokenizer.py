"""data/tokenizer.py against Hugging Face's ids (tests/golden/tokens.json) and against SentencePiece
itself.
"""

import json
import os

import numpy as np
import pytest
import sentencepiece
from conftest import GOLDEN, ROOT, TOKENIZER

from data import UserError
from data.tokenizer import BOS, EOS, UNK, Tokenizer, longest_first


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
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert UNK in tokenizer.encode("ꙮ")
    assert tokenizer.encode("") == [BOS, EOS]


def test_special_tokens_in_text_stay_text(tokenizer):
    """A user's "</s>" must not become the border between two texts."""
    inner = tokenizer.encode("a </s> b <s> <mask>")[1:-1]
    assert EOS not in inner and BOS not in inner and tokenizer.mask_id not in inner


def test_batch_is_the_single_ones(tokenizer):
    first, second = ["The man", "Der Mann kaufte Äpfel.", ""], ["女孩在读书。", "", "x"]
    batch = tokenizer.encode_batch(first, second, 9)
    assert [row.tolist() for row in batch] == [
        tokenizer.encode(a, b, 9) for a, b in zip(first, second, strict=True)
    ]
    assert all(row.dtype == np.int32 for row in batch)


@pytest.mark.parametrize("left", range(0, 12))
@pytest.mark.parametrize("right", range(0, 12))
def test_longest_first_by_brute_force(left, right):
    """One token at a time off the longer text; on a tie the reference keeps the odd token in the
    second text, unless the first was the longer one."""
    for room in range(0, 24):
        a, b = longest_first(left, right, room)
        assert a + b == min(left + right, room) and a <= left and b <= right
        if left + right > room:
            assert abs(a - b) <= 1 or (a == left and b > a) or (b == right and a > b)


def test_bad_models_are_refused(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at"):
        Tokenizer.from_file(str(tmp_path / "none.model"))
    for content in (b"", b"garbage" * 100):
        path = tmp_path / "bad.model"
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            Tokenizer.from_file(str(path))
        assert "\n" not in str(error.value)
    other = str(tmp_path / "other")
    text = [f"{a} {b} sentence" for a in "abcdefg" for b in "hijklmn"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=other,
        vocab_size=40,
        hard_vocab_limit=False,
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="XLM-R's layout is"):
        Tokenizer.from_file(other + ".model")


def test_no_room_for_special_tokens(tokenizer):
    with pytest.raises(UserError, match="no room"):
        tokenizer.encode("a", "b", 3)


ORACLES = os.path.join(os.path.dirname(ROOT), "shared")


def test_the_real_xlmr_model():
    """With XLM-R's own SentencePiece model, where it and the reference ids are at hand."""
    model = os.path.join(ORACLES, "data", "xlmr", "sentencepiece.bpe.model")
    if not os.path.exists(model):
        pytest.skip("XLM-R's SentencePiece model is not at hand")
    tokenizer = Tokenizer.from_file(model)
    assert tokenizer.vocab_size == 250_002 and tokenizer.mask_id == 250_001
    with open(os.path.join(ORACLES, "oracles", "fairseq_hf_oracle.json")) as file:
        for case in json.load(file):
            assert tokenizer.encode(case["text"]) == case["ids_with_specials"], case["text"]
    with open(os.path.join(ORACLES, "oracles", "xlmr_fairseq_oracle.json")) as file:
        for case in json.load(file)["cases"]:
            assert tokenizer.encode(case["text"])[1:-1] == case["ids"], case["text"]

"""Text -> ids, the XLM-R way: a SentencePiece unigram model with its ids moved by one.

SentencePiece numbers its pieces <unk> 0, <s> 1, </s> 2, then the vocabulary from 3. XLM-R was
trained with fairseq, whose dictionary begins <s> 0, <pad> 1, </s> 2, <unk> 3. So every piece moves
up by one, <unk> becomes 3, and <mask> comes last:

    id = 3 if spm_id == 0 else spm_id + 1      <mask> = pieces + 1      V = pieces + 2

    one text     <s> a </s>
    two texts    <s> a </s></s> b </s>             (no token types: the doubled </s> is the border)

>>> tokenizer.encode("Hello world!")               # with XLM-R's own model
[0, 35378, 8999, 38, 2]
"""

import hashlib
import os

import numpy as np
import sentencepiece

from data import UserError

BOS, PAD, EOS, UNK = 0, 1, 2, 3
MAX_MODEL_BYTES = 64 << 20  # XLM-R's file has 5 MB


class Tokenizer:
    """A SentencePiece model with XLM-R's ids.

    model: the bytes of a .model file.  source: what to call it in an error message.
    """

    def __init__(self, model: bytes, source: str = "tokenizer"):
        if not model or len(model) > MAX_MODEL_BYTES:
            raise UserError(f"{source}: {len(model):,} bytes can't be a SentencePiece model")
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception:  # the library raises RuntimeError, and others for some damaged files
            raise UserError(
                f"{source} is not a SentencePiece model; XLM-R's is named sentencepiece.bpe.model"
            ) from None
        layout = (
            self.pieces.unk_id(),
            self.pieces.bos_id(),
            self.pieces.eos_id(),
            self.pieces.pad_id(),
        )
        if layout != (0, 1, 2, -1):
            raise UserError(
                f"{source}: <unk> <s> </s> <pad> have the SentencePiece ids {layout}; XLM-R's layout is (0, 1, 2, -1)"
            )
        self.bytes = model
        self.vocab_size = self.pieces.get_piece_size() + 2
        self.mask_id = self.vocab_size - 1
        self.sha256 = hashlib.sha256(model).hexdigest()

    @classmethod
    def from_file(cls, path: str) -> "Tokenizer":
        if not os.path.isfile(path):
            raise UserError(f"no tokenizer at {path}: give a SentencePiece .model file")
        if os.path.getsize(path) > MAX_MODEL_BYTES:
            raise UserError(
                f"{path}: {os.path.getsize(path):,} bytes can't be a SentencePiece model"
            )
        with open(path, "rb") as file:
            return cls(file.read(), path)

    @classmethod
    def from_payload(cls, payload: dict, path: str, vocab_size: int) -> "Tokenizer":
        """The tokenizer inside a checkpoint's dictionary, which must fit the model's vocabulary."""
        stored = payload.get("tokenizer")
        try:
            tokenizer = cls(stored.numpy().tobytes(), path)
        except (AttributeError, TypeError):
            raise UserError(f"{path} holds no tokenizer: convert it again") from None
        if tokenizer.vocab_size != vocab_size:
            raise UserError(
                f"{path}: its tokenizer has {tokenizer.vocab_size:,} ids, its model {vocab_size:,}"
            )
        return tokenizer

    def encode(self, a: str, b: str | None = None, max_length: int | None = None) -> list[int]:
        """One text or a pair -> ids with <s> and </s>, cut to max_length if given."""
        return self.encode_batch([a], None if b is None else [b], max_length)[0].tolist()

    def encode_batch(
        self, a: list[str], b: list[str] | None = None, max_length: int | None = None
    ) -> list[np.ndarray]:
        """Many texts, or pairs, at once. Returns one int32 array each (not padded).

        A pair too long loses tokens from its longer text first ("longest first"), as in Hugging
        Face tokenizers.
        """
        room_for = 2 if b is None else 4  # special tokens
        if max_length is not None and max_length < room_for:
            raise UserError(
                f"a maximum of {max_length} tokens leaves no room for the {room_for} special ones"
            )
        first = [self._to_xlmr(ids) for ids in self.pieces.encode(list(a))]
        if b is None:
            keep = None if max_length is None else max_length - room_for
            return [np.concatenate(([BOS], ids[:keep], [EOS])).astype(np.int32) for ids in first]
        if len(a) != len(b):
            raise ValueError(f"{len(a)} first texts and {len(b)} second texts")
        second = [self._to_xlmr(ids) for ids in self.pieces.encode(list(b))]
        rows = []
        for left, right in zip(first, second, strict=True):
            if max_length is not None:
                keep_left, keep_right = longest_first(len(left), len(right), max_length - room_for)
                left, right = left[:keep_left], right[:keep_right]
            rows.append(np.concatenate(([BOS], left, [EOS, EOS], right, [EOS])).astype(np.int32))
        return rows

    @staticmethod
    def _to_xlmr(ids: list[int]) -> np.ndarray:
        ids = np.asarray(ids, dtype=np.int32)
        return np.where(ids == 0, UNK, ids + 1)

    def decode(self, ids: list[int]) -> str:
        """Ids -> text; special tokens are dropped."""
        last = self.mask_id
        return self.pieces.decode([0 if i == UNK else int(i) - 1 for i in ids if UNK <= i < last])


def longest_first(left: int, right: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts to keep so that at most `room` remain: tokens fall from the
    longer one.

    >>> longest_first(10, 3, 8), longest_first(10, 9, 8), longest_first(5, 5, 7)
    ((5, 3), (4, 4), (3, 4))
    """
    if left + right <= room:
        return left, right
    short, long = min(left, right), max(left, right)
    short = min(short, room // 2)  # both are too long: halves, the odd token to the longer text
    long = min(long, room - short)
    return (long, short) if left > right else (short, long)

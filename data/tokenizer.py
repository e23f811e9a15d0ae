"""Text -> ids: with XLM-R's SentencePiece pieces, with BERT's WordPiece, or with whole words.

Tokenizer is a SentencePiece unigram model with its ids shifted by one. SentencePiece numbers its pieces <unk> 0, <s>
1, </s> 2, then the vocabulary from 3. XLM-R was trained with fairseq, whose dictionary begins <s> 0, <pad> 1, </s> 2,
<unk> 3. So every piece moves up by one, <unk> becomes 3, and <mask> comes last:

    id = 3 if spm_id == 0 else spm_id + 1      <mask> = pieces + 1      V = pieces + 2

    one text     <s> a </s>
    two texts    <s> a </s></s> b </s>             (no token types: the doubled </s> separates them)

>>> tokenizer.encode("Hello world!")               # with XLM-R's own model
[0, 35378, 8999, 38, 2]

WordPieceTokenizer has the ids of a BERT's vocab.txt, which are line numbers. One separator stands between two texts,
and a *token type* says to which text a token belongs:

    two texts    [CLS] a [SEP] b [SEP]
    types          0   0   0   1   1               (encode_typed: the index of the first 1)

WordTokenizer has XLM-R's four special ids, then one id for each frequent word of a training set: for small tasks
without a pretrained model, such as ATIS. load_tokenizer finds out which of them some bytes are.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, islice

import numpy as np
import sentencepiece

from data.wordpiece import basic_tokens, word_pieces
from kit.common import UserError

BOS, PAD, EOS, UNK = 0, 1, 2, 3
WORDS_MAGIC = "sdq-words-1"
WORDPIECE_MAGIC = "sdq-wordpiece-1"  # then " lower" or " cased"
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # those that BERT's vocab.txt must have
MAX_CACHED = 1 << 18  # words whose pieces are remembered, some 70 MB


class Encoder:
    """What the three tokenizers share. A subclass defines text_ids(), the ids of many texts without special tokens.

    contents: the bytes that load_tokenizer reads.  vocab_size: the number of ids.
    """

    typed = False  # whether a second text has token type 1
    separators = 2  # between two texts
    cls_id, pad_id, sep_id, unk_id = BOS, PAD, EOS, UNK

    def __init__(self, contents: bytes, vocab_size: int):
        self.bytes, self.vocab_size, self.prompt = contents, vocab_size, ""
        self.sha256 = hashlib.sha256(contents).hexdigest()

    def set_prompt(self, text: object) -> None:
        """What a sentence encoder puts before every sentence. Raises UserError if it is no text."""
        if not isinstance(text, str) or text.encode("utf-8", "ignore").decode() != text:
            raise UserError(f"the prompt {text!r:.80} is not a text")
        self.prompt = text

    def encode(self, a: str, b: str | None = None, max_length: int | None = None) -> list[int]:
        """One text or a pair -> ids with the special tokens, cut to max_length if given."""
        return self.encode_batch([a], None if b is None else [b], max_length)[0].tolist()

    def encode_batch(
        self, a: Sequence[str], b: Sequence[str] | None = None, max_length: int | None = None
    ) -> list[np.ndarray]:
        """Many texts or pairs at once -> one int32 array each (not padded).

        A pair that is too long loses tokens from its longer text first, as in Hugging Face's tokenizers.
        """
        return self.encode_typed(a, b, max_length)[0]

    def encode_typed(
        self, a: Sequence[str], b: Sequence[str] | None = None, max_length: int | None = None
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """encode_batch(), and where token type 1 begins in each row, int64 (N,): at the second text's first token, or
        behind the row where there is none. It means nothing if the tokenizer is not `typed`.
        """
        specials = 2 if b is None else 2 + self.separators
        if max_length is not None and max_length < specials:
            raise UserError(f"a maximum of {max_length} tokens leaves no room for the {specials} special ones")
        rows, begins = [], []
        for left, right in zip(self.text_ids(a), [[]] * len(a) if b is None else self.text_ids(b), strict=True):
            if max_length is not None:
                kept_left, kept_right = longest_first(len(left), len(right), max_length - specials)
                left, right = left[:kept_left], right[:kept_right]
            end = [] if b is None else [*[self.sep_id] * (self.separators - 1), *right, self.sep_id]
            rows.append(np.array([self.cls_id, *left, self.sep_id, *end], dtype=np.int32))
            begins.append(len(left) + 2)
        return rows, np.array(begins, dtype=np.int64)

    def word_ids(self, words: Sequence[str]) -> list[list[int]]:
        """The ids of many words, at least one each."""
        return [ids or [self.unk_id] for ids in self.text_ids(words)]

    def encode_words(
        self, sentences: Sequence[Sequence[str]], max_length: int | None = None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Sentences of words -> (ids with the special tokens, int32; the index of each word's first piece, int64).

        Each word is encoded by itself, so that it can carry a tag, which belongs to its first piece. A word without a
        piece (such as a control character) becomes the unknown token. Raises UserError for a sentence that would be
        cut: the tags of words cut off could not be predicted.
        """
        every, rows = iter(self.word_ids([word for words in sentences for word in words])), []
        for words in sentences:
            own = list(islice(every, len(words)))
            first = np.cumsum([1, *map(len, own)], dtype=np.int64)[:-1]
            rows.append((np.array([self.cls_id, *chain(*own), self.sep_id], dtype=np.int32), first))
        longest = max((len(ids) for ids, _ in rows), default=0)
        if max_length is not None and longest > max_length:
            what = f"a sentence has {longest} tokens with the special ones; cut to --max-length {max_length}"
            raise UserError(f"{what} its words would lose their tags: use --max-length {longest}")
        return rows


class Tokenizer(Encoder):
    """A SentencePiece model with XLM-R's ids.

    model: the bytes of a .model file.  source: its name in error messages.
    """

    def __init__(self, model: bytes, source: str = "tokenizer"):
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
            layout = (self.pieces.unk_id(), self.pieces.bos_id(), self.pieces.eos_id(), self.pieces.pad_id())
        except Exception:  # the library raises RuntimeError, and others for some damaged files
            layout = None
        if layout != (0, 1, 2, -1):
            what = "is not a SentencePiece model with <unk> 0, <s> 1, </s> 2 and no <pad>, such as XLM-R's"
            raise UserError(f"{source} {what} sentencepiece.bpe.model")
        super().__init__(model, self.pieces.get_piece_size() + 2)
        self.mask_id = self.vocab_size - 1

    @classmethod
    def from_file(cls, path: str) -> "Tokenizer":
        if not os.path.isfile(path):
            raise UserError(f"no tokenizer at {path}: give a SentencePiece .model file")
        with open(path, "rb") as file:
            return cls(file.read(), path)

    def text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [[i + 1 if i else UNK for i in ids] for ids in self.pieces.encode(list(texts))]

    def has_piece(self, token: str) -> bool:
        return self.pieces.piece_to_id(token) != 0 or token in ("<unk>", "<pad>", "<mask>")


class WordPieceTokenizer(Encoder):
    """BERT's vocab.txt: the id of a piece is the number of its line, from 0.

    vocabulary: the bytes of UTF-8 text, "sdq-wordpiece-1 lower" (an uncased model) or "... cased" in the first line,
    then the lines of vocab.txt.  source: its name in error messages.

    As in Hugging Face's, "[SEP]" and the other special tokens inside a text become their ids.
    """

    typed = True
    separators = 1

    def __init__(self, vocabulary: bytes, source: str = "tokenizer"):
        try:
            first, *self.pieces = vocabulary.decode("utf-8").removesuffix("\n").split("\n")
        except ValueError:
            raise UserError(f"{source} is not the vocab.txt of a BERT: it is not UTF-8 text") from None
        self.lower = first.endswith(" lower")
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}
        for number, piece in enumerate(self.pieces, start=1):
            if not piece or set(piece) & set(" \t\r"):
                raise UserError(f"{source}: line {number}, {piece[:40]!r}, is not a piece of a word")
            if self.ids[piece] != number - 1:
                raise UserError(f"{source} lists {piece[:40]!r} twice: its ids are ambiguous")
        if missing := [special for special in SPECIALS if special not in self.ids]:
            raise UserError(f"{source} has no {missing[0]}: it is not the vocab.txt of a BERT")
        super().__init__(vocabulary, len(self.pieces))
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (self.ids[special] for special in SPECIALS)
        self._borders = re.compile("(" + "|".join(map(re.escape, SPECIALS)) + ")")
        self._known: dict[str, list[int]] = {}

    @classmethod
    def from_vocab(cls, vocab: bytes, lower: bool, source: str = "vocab.txt") -> "WordPieceTokenizer":
        """The tokenizer of a vocab.txt as published, given its bytes. lower: the model is uncased."""
        first = f"{WORDPIECE_MAGIC} {'lower' if lower else 'cased'}\n".encode()
        lines = vocab.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").removesuffix(b"\n")
        return cls(first + lines + b"\n", source)

    def text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return list(map(self._text, texts))

    def has_piece(self, token: str) -> bool:
        return token in self.ids

    def _text(self, text: str) -> list[int]:
        """The ids of a text.

        No token spans a plain space (data/wordpiece.py), so what stands between two spaces is encoded by itself and
        remembered: most words of a text have occurred before.
        """
        ids: list[int] = []
        for chunk in text.split(" "):
            known = self._known.get(chunk)
            if known is None:
                known = self._chunk(chunk)
                if len(self._known) < MAX_CACHED and len(chunk) < 50:  # not a Chinese sentence
                    self._known[chunk] = known
            ids += known
        return ids

    def _chunk(self, chunk: str) -> list[int]:
        ids = []
        for part in self._borders.split(chunk):  # every other part is a special token
            tokens = [part] if part in SPECIALS else basic_tokens(part, self.lower)
            ids += [self.ids[piece] for token in tokens for piece in word_pieces(token, self.ids)]
        return ids


class WordTokenizer(Encoder):
    """A list of words: ids 0 to 3 are <s> <pad> </s> <unk>, the first word has id 4.

    vocabulary: the bytes of UTF-8 text, WORDS_MAGIC in the first line, then one word per line.
    """

    def __init__(self, vocabulary: bytes):
        _, *words = vocabulary.decode("utf-8").removesuffix("\n").split("\n")
        self.ids = {word: UNK + 1 + i for i, word in enumerate(words)}
        super().__init__(vocabulary, UNK + 1 + len(words))

    @classmethod
    def build(cls, sentences: Iterable[Sequence[str]], min_count: int = 2) -> "WordTokenizer":
        """The words of a training set, the most frequent first.

        Words rarer than min_count stay out: they become <unk>, so that <unk> is trained too.
        """
        counts = Counter(chain.from_iterable(sentences))
        kept = sorted((word for word in counts if counts[word] >= min_count), key=lambda word: (-counts[word], word))
        if not kept:
            raise UserError(f"no word occurs {min_count} times: the training set is too small")
        return cls("".join(f"{line}\n" for line in (WORDS_MAGIC, *kept)).encode("utf-8"))

    def text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [[self.ids.get(word, UNK) for word in text.split()] for text in texts]

    def word_ids(self, words: Sequence[str]) -> list[list[int]]:
        return [[self.ids.get(word, UNK)] for word in words]


def load_tokenizer(model: bytes, source: str = "tokenizer") -> Encoder:
    """The tokenizer of these bytes: a text format has its name in the first line."""
    if model.startswith(WORDPIECE_MAGIC.encode()):
        return WordPieceTokenizer(model, source)
    if model.startswith(WORDS_MAGIC.encode()):
        return WordTokenizer(model)
    return Tokenizer(model, source)


def longest_first(left: int, right: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts to keep so that at most `room` remain: the longer one is cut.

    >>> longest_first(10, 3, 8), longest_first(10, 9, 8), longest_first(5, 5, 7)
    ((5, 3), (4, 4), (3, 4))
    """
    short, long = min(left, right), max(left, right)
    short = min(short, room // 2)  # if both are too long: halves, the odd token to the longer text
    long = min(long, room - short)
    return (long, short) if left > right else (short, long)

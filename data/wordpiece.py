"""WordPiece: BERT's way from text to pieces (Devlin et al. 2019), in two steps.

    "Die Bäume, 2019!"
      basic_tokens    die | baume | , | 2019 | !          words, in one spelling
      word_pieces     die | ba ##um ##e | , | 2019 | !    each word cut into pieces of the vocabulary

Step one drops control characters, separates Chinese characters (Chinese has no spaces between words), removes accents
and capitals for an uncased model, and splits at spaces and around every punctuation mark. Step two is greedy: the
longest piece of the vocabulary that begins the word, then the longest that continues it; "##" marks a piece that
continues. Unlike in SentencePiece, spaces are lost.

The ids are meant to equal Hugging Face's, so the functions follow its BertTokenizer (the one in Rust) where that and
Google's Python code disagree: unassigned characters are kept, one range of rare Chinese characters begins later, and
capitals are lowered one by one. NOTE: differs from Hugging Face: accents and punctuation marks that came after Unicode
8 (2015), some 500 characters of rare scripts, follow Python's tables; there they are letters.

Nothing here knows ids or special tokens: data/tokenizer.py does.
"""

import re
import unicodedata
from collections.abc import Container
from functools import cache

# Cc control, Cf format (such as the zero-width space), Co private use, Cs half a character.
INVISIBLE = ("Cc", "Cf", "Co", "Cs")
SPACES = ("Zs", "Zl", "Zp")
# "CJK" as in Google's code: ideographs, but neither Japanese kana nor Korean hangul.
CJK = re.compile(
    "([\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b920-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f])"  # Google's: from 2b820, not 2b920
)
LONGEST_WORD = 100  # characters; a longer word becomes [UNK]


def basic_tokens(text: str, lower: bool) -> list[str]:
    """Text -> words and punctuation marks.  lower: remove accents and capitals.

    >>> basic_tokens("Él dijo:\\t没有\\u200b!", lower=True)
    ['el', 'dijo', ':', '没', '有', '!']
    """
    if not (text.isascii() and text.isprintable()):  # else none of this applies
        text = CJK.sub(r" \1 ", clean(text))  # each Chinese character is a word
        text = strip_accents(text) if lower else text
    if lower:
        # Hugging Face lowers each character by itself; Python would end "ΟΔΟΣ" with a final sigma.
        text = text.replace("Σ", "σ").lower()
    return [token for word in text.split(" ") for token in split_punctuation(word)]


def clean(text: str) -> str:
    """Drop invisible characters, and turn every kind of space and line end into a plain space."""
    kept = []
    for char in text:
        category = unicodedata.category(char)
        if char in "\t\n\r" or category in SPACES:
            kept.append(" ")
        elif category not in INVISIBLE and char != "\ufffd":  # what decoders put for invalid bytes
            kept.append(char)
    return "".join(kept)


def strip_accents(text: str) -> str:
    """Decompose é into e and its accent (Unicode NFD), and drop the accent."""
    apart = unicodedata.normalize("NFD", text)
    return "".join(char for char in apart if unicodedata.category(char) != "Mn")


def split_punctuation(word: str) -> list[str]:
    """A word split around each of its punctuation marks.

    >>> split_punctuation("it's...")
    ['it', "'", 's', '.', '.', '.']
    """
    tokens, inside = [], False
    for char in word:
        mark = is_punctuation(char)
        if inside and not mark:
            tokens[-1] += char
        else:
            tokens.append(char)
        inside = not mark
    return tokens


@cache
def is_punctuation(char: str) -> bool:
    """Unicode's punctuation and all ASCII symbols, including $ + < = > ^ ` | ~."""
    symbol = "!" <= char <= "~" and not char.isalnum()
    return symbol or unicodedata.category(char).startswith("P")


def word_pieces(word: str, vocabulary: Container[str], unknown: str = "[UNK]") -> list[str]:
    """One word -> its pieces, greedily the longest first. If a part has no piece, the whole word is unknown.

    >>> word_pieces("unaffable", {"un", "##aff", "##able", "##a"})
    ['un', '##aff', '##able']
    """
    if len(word) > LONGEST_WORD:
        return [unknown]
    pieces, start = [], 0
    while start < len(word):
        end = len(word)
        mark = "##" if start else ""
        while end > start and mark + word[start:end] not in vocabulary:
            end -= 1
        if end == start:
            return [unknown]
        pieces.append(mark + word[start:end])
        start = end
    return pieces

"""BERT's way from text to pieces of words (Devlin et al. 2019), in two steps.

    "Die Bäume, 2019!"
      basic_tokens    die | baume | , | 2019 | !          what a word is; one spelling of each
      word_pieces     die | ba ##um ##e | , | 2019 | !    each word cut into pieces of the vocabulary

Step one drops control characters, takes Chinese characters one by one (Chinese puts no spaces
between words), for an uncased model takes accents and capitals away, and splits at spaces and
around every punctuation mark. Step two is greedy: the longest piece of the vocabulary that begins
the word, then the longest that continues it; "##" marks a piece that continues. SentencePiece keeps
spaces, as part of its pieces; here they are lost, and for an uncased model accents and capitals.

The ids are meant to be Hugging Face's, so the functions follow its BertTokenizer (the one in Rust)
where that and Google's Python code disagree: characters without a meaning yet stay, one range of
rare Chinese characters begins later, and capitals are lowered one by one.
NOTE: differs from Hugging Face: accents and punctuation marks younger than Unicode 8 (2015), some
500 characters of rare scripts, are what Python's tables say; there they are letters.

Nothing here knows ids or special tokens: data/tokenizer.py does.
"""

import re
import unicodedata
from collections.abc import Container
from functools import cache

# Cc control, Cf format (such as the zero-width space), Co private use, Cs half a character.
INVISIBLE = ("Cc", "Cf", "Co", "Cs")
SPACES = ("Zs", "Zl", "Zp")
# "CJK" in the sense of Google's code: ideographs, but neither Japanese kana nor Korean hangul, which
# are written with spaces or cut by their pieces.
CJK = re.compile(
    "([\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b920-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f])"  # Google's: from 2b820, not 2b920
)
LONGEST_WORD = 100  # characters; a longer one is no word of any language, and becomes [UNK]


def basic_tokens(text: str, lower: bool) -> list[str]:
    """Text -> words and punctuation marks; lower: without accents and capitals.

    >>> basic_tokens("Él dijo:\\t没有\\u200b!", lower=True)
    ['el', 'dijo', ':', '没', '有', '!']
    """
    if not (text.isascii() and text.isprintable()):  # or there is nothing of all this to do
        text = space_cjk(clean(text))
        text = strip_accents(text) if lower else text
    if lower:
        # HF lowers each character by itself; Python would end "ΟΔΟΣ" with another sigma.
        text = text.replace("Σ", "σ").lower()
    return [token for word in text.split(" ") for token in split_punctuation(word)]


def clean(text: str) -> str:
    """Invisible characters vanish, every kind of space or line end becomes a plain space."""
    kept = []
    for char in text:
        category = unicodedata.category(char)
        if char in "\t\n\r" or category in SPACES:
            kept.append(" ")
        elif category not in INVISIBLE and char != "\ufffd":  # what a decoder puts for bad bytes
            kept.append(char)
    return "".join(kept)


def space_cjk(text: str) -> str:
    """Spaces around every Chinese character: each is a word."""
    return CJK.sub(r" \1 ", text)


def strip_accents(text: str) -> str:
    """é is taken apart into e and its accent (Unicode's NFD), and the accent is dropped."""
    apart = unicodedata.normalize("NFD", text)
    return "".join(char for char in apart if unicodedata.category(char) != "Mn")


def split_punctuation(word: str) -> list[str]:
    """Each punctuation mark by itself, and what stands between them.

    >>> split_punctuation("it's...")
    ['it', "'", 's', '.', '.', '.']
    """
    tokens, inside = [], False
    for char in word:
        if is_punctuation(char):
            tokens.append(char)
            inside = False
        elif inside:
            tokens[-1] += char
        else:
            tokens.append(char)
            inside = True
    return tokens


@cache
def is_punctuation(char: str) -> bool:
    """Unicode's punctuation, and every ASCII symbol: $ + < = > ^ ` | ~ are none in Unicode."""
    symbol = "!" <= char <= "~" and not char.isalnum()
    return symbol or unicodedata.category(char).startswith("P")


def word_pieces(word: str, vocabulary: Container[str], unknown: str = "[UNK]") -> list[str]:
    """One word -> its pieces, greedily the longest first. One without pieces is unknown as a whole,
    even if only its last letter is missing: half a word would mean something else.

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

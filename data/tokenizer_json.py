"""The tokenizer of a Hugging Face folder -> one of data/tokenizer.py; and back, a SentencePiece model -> tokenizer.json.

A folder holds sentencepiece.bpe.model, as XLM-R, or vocab.txt, as BERT, with tokenizer_config.json if the model is cased;
or tokenizer.json, the one file that Hugging Face's libraries write today, which has three kinds:

    Unigram      pieces, scores and a table of characters <-> the bytes of a SentencePiece model, as XLM-R has it
    BPE          pieces, merges and a table of characters <-> the same, as the built-in model has it
    WordPiece    pieces and their ids                      -> the lines of a vocab.txt, as BERT has it

Any other kind, or a setting that would give other ids, raises an error that names it. A SentencePiece model is a protocol
buffer, in which every field is a tag, (number << 3) | type, and its value; only the fields below are needed, because
the defaults of all others are XLM-R's:

    1 pieces           1 piece (text)    2 score (float)    3 type: 1 normal, 2 unknown, 3 control
    2 trainer_spec     3 model_type: 1 unigram, 2 BPE (3 words, 4 characters)
    3 normalizer_spec  2 precompiled_charsmap (bytes): which characters become which
"""

import base64
import io
import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from data.tokenizer import SPECIALS, Encoder, Tokenizer, WordPieceTokenizer
from kit.common import UserError

FIRST = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3; <mask> comes last
BPE_RULES = {"unk_token": "<unk>", "fuse_unk": True}
AT_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
SPLITS = (AT_SPACES, {"type": "WhitespaceSplit"})  # XLM-R's: also at U+0085, which SentencePiece keeps
BYTES, FLOAT = 2, 5  # types of protocol buffer fields


# ------------------------------------------------------------------------------- files of a folder
@contextmanager
def reading(path: str) -> Iterator[None]:
    """Raises UserError for whatever a damaged file leads its reader to."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError):
        raise UserError(f"{path} is damaged, or no such file of Hugging Face's libraries") from None


def read_json(path: str, kind: type = dict) -> dict | list:
    """The object (or the list) in a JSON file; an empty one if there is no such file."""
    if not os.path.isfile(path):
        return kind()
    with reading(path), open(path, encoding="utf-8-sig") as file:
        settings = json.load(file)
        if not isinstance(settings, kind):
            raise TypeError
    return settings


def check_settings(path: str, settings: dict, known: dict[str, tuple]) -> None:
    """Raises UserError for a setting with a value that this code does not implement."""
    for key, values in known.items():
        if key in settings and settings[key] not in values:
            raise UserError(f"{path}: {key} is {settings[key]!r:.99}; supported: {' or '.join(map(repr, values))}")


def read_tokenizer(folder: str) -> Encoder:
    """The tokenizer of a folder, whichever file holds it. Raises UserError if there is none that is implemented, or for a
    token that was added to its vocabulary: it would be cut into pieces here.
    """
    settings = read_json(at := os.path.join(folder, "tokenizer_config.json"))
    with reading(at):
        added = [str(token["content"]) for token in (settings.get("added_tokens_decoder") or {}).values()]
    added += read_json(os.path.join(folder, "added_tokens.json"))
    if os.path.isfile(path := os.path.join(folder, "sentencepiece.bpe.model")):
        tokenizer = Tokenizer.from_file(path)
    elif os.path.isfile(path := os.path.join(folder, "vocab.txt")):
        with open(path, "rb") as file:
            tokenizer = WordPieceTokenizer.from_vocab(file.read(), settings.get("do_lower_case", True), path)
    elif os.path.isfile(path := os.path.join(folder, "tokenizer.json")):
        tokenizer, more = read_tokenizer_json(path)
        added += more
    else:
        raise UserError(f"no tokenizer in {folder}: no sentencepiece.bpe.model, vocab.txt or tokenizer.json")
    if isinstance(tokenizer, WordPieceTokenizer):
        check_settings(at, settings, wordpiece_rules(tokenizer.lower))
    with reading(path):
        if later := [token for token in added if not tokenizer.has_piece(token)]:
            raise UserError(f"{path}: {later[0][:50]!r} was added to its vocabulary, which is not implemented")
    return tokenizer


def wordpiece_rules(lower: bool) -> dict[str, tuple]:
    """What the settings of a WordPiece tokenizer may be.  lower: it drops capitals."""
    return {
        **dict.fromkeys(("do_lower_case", "lowercase"), (lower,)),
        "strip_accents": (None, lower),  # None: as the capitals
        **dict.fromkeys(("tokenize_chinese_chars", "handle_chinese_chars", "clean_text", "do_basic_tokenize"), (True,)),
        "never_split": (None, []),
        "tokenizer_class": ("BertTokenizer", "BertTokenizerFast"),  # others split words otherwise
    }


# ---------------------------------------------------------------------------------- tokenizer.json
def read_tokenizer_json(path: str) -> tuple[Encoder, list[str]]:
    """The tokenizer of a file, and the special and added tokens that it lists."""
    settings = read_json(path)
    with reading(path):
        model = settings["model"]
        kind = model.get("type", "WordPiece" if "max_input_chars_per_word" in model else "BPE")
        if kind not in READERS:
            raise UserError(f"{path} is a {kind} tokenizer; known: Unigram, as in XLM-R, BPE, and WordPiece")
        tokens = [str(token["content"]) for token in settings.get("added_tokens") or ()]
        return READERS[kind](path, settings), tokens


def parts(settings: dict, name: str) -> list[dict]:
    """The steps of a pipeline: of a Sequence, of a single step, or none."""
    if (step := settings.get(name)) is None:
        return []
    return step[name.replace("_", "") + "s"] if step["type"] == "Sequence" else [step]


def refuse(path: str, what: str, found: object) -> None:
    raise UserError(f"{path}: {what} {json.dumps(found)[:300]} is not implemented: its ids would differ")


def read_sentencepiece(path: str, settings: dict) -> Tokenizer:
    model, charsmap = settings["model"], b""
    for step in parts(settings, "normalizer"):
        if step["type"] == "Precompiled":
            charsmap = base64.b64decode(step["precompiled_charsmap"] or "")
        elif step.get("pattern") != {"Regex": " {2,}"} or step.get("content") != " ":  # spaces are joined anyway
            refuse(path, "the normalizer", step)
    split, *marks = parts(settings, "pre_tokenizer") or [{}]
    spaces = [(step["type"], step["replacement"], step.get("prepend_scheme", "always")) for step in marks]
    prefixed = all(step.get("add_prefix_space", True) for step in marks)
    if split not in SPLITS or spaces != [("Metaspace", "▁", "always")] or not prefixed:
        refuse(path, "the pre-tokenizer", settings.get("pre_tokenizer"))
    bpe = model.get("type", "BPE") == "BPE"
    pieces = scored(path, model) if bpe else [(str(piece), float(score)) for piece, score in model["vocab"]]
    layout = [piece for piece, _ in pieces[:4]] + [piece for piece, _ in pieces[-1:]]
    if layout != [*FIRST, "<mask>"] or model.get("unk_id", 3 if bpe else None) != 3 or model.get("byte_fallback"):
        raise UserError(f"{path}: ids 0 to 3 and the last are {' '.join(layout)}; want <s> <pad> </s> <unk> <mask>")
    if wide := [piece for piece, _ in pieces if "▁" in piece[1:]]:
        refuse(path, "a piece of several words,", wide[0])
    special = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    encoded = [
        field(1, BYTES, text.encode()) + field(2, FLOAT, struct.pack("<f", score)) + bytes((3 << 3, kind))
        for text, score, kind in [*special, *((text, score, 1) for text, score in pieces[4:-1])]
    ]
    rest = field(2, BYTES, bytes((3 << 3, 2 if bpe else 1))) + field(3, BYTES, field(2, BYTES, charsmap))
    return Tokenizer(b"".join(field(1, BYTES, piece) for piece in encoded) + rest, path)


def scored(path: str, model: dict) -> list[tuple[str, float]]:
    """The pieces of a BPE model by id, with scores in the order of its merges, which must be those of SentencePiece."""
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    scores: dict[str, float] = {}
    for left, right in merges:
        scores.setdefault(left + right, -float(len(scores)))
    pieces = [(piece, scores.get(piece, -1e6)) for piece in sorted(model["vocab"], key=model["vocab"].get)]
    gaps = [model["vocab"][piece] for piece, _ in pieces] != [*range(len(pieces))]
    unmade = any(len(piece) > 1 and piece not in scores for piece, _ in pieces[4:-1])
    rules = {key: value for key, value in model.items() if value and key not in ("type", "vocab", "merges")}
    if gaps or unmade or merges != merges_of(pieces[4:-1]) or rules != BPE_RULES:
        refuse(path, "BPE with other rules or merges than SentencePiece's:", rules)
    return pieces


def merges_of(pieces: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """All pairs of pieces whose concatenation is a piece, those of the highest score first."""
    known, ranked = dict(pieces), sorted(pieces, key=lambda pair: -pair[1])
    pairs = [(piece[:i], piece[i:]) for piece, _ in ranked for i in range(1, len(piece))]
    return [(left, right) for left, right in pairs if left in known and right in known]


def tokenizer_json(tokenizer: Tokenizer) -> dict:
    """The content of a tokenizer.json with which Hugging Face's libraries give the ids of a SentencePiece model. Raises
    UserError for a model that the file can't hold: read back, it must give the same ids to every piece.
    """
    message, inner = fields(tokenizer.bytes), range(3, tokenizer.pieces.get_piece_size())
    charsmap = base64.b64encode(fields(message.get(3, b"")).get(2, b"")).decode()
    pieces = [(tokenizer.pieces.id_to_piece(i), tokenizer.pieces.get_score(i)) for i in inner]
    vocab = [*((token, 0.0) for token in FIRST), *pieces, ("<mask>", 0.0)]
    kind, model = fields(message.get(2, b"")).get(3, 1), {"type": "Unigram", "unk_id": 3, "vocab": vocab}
    if kind == 2:
        ids = {piece: i for i, (piece, _) in enumerate(vocab)}
        model = {"type": "BPE", **BPE_RULES, "vocab": ids, "merges": merges_of(pieces)}
    spaces = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [*enumerate(FIRST), (len(vocab) - 1, "<mask>")]
    ends = {"cls": ["<s>", 0], "sep": ["</s>", 2], "trim_offsets": False, "add_prefix_space": True}
    settings = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": token, **plain} for i, token in added],
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap} if charsmap else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [AT_SPACES, spaces]},
        "post_processor": {"type": "RobertaProcessing", **ends},  # <s> a </s></s> b </s>
        "decoder": spaces,
        "model": model,
    }
    again = read_sentencepiece("the student's tokenizer", settings)
    order = np.random.default_rng(0).permutation(inner)
    texts = [tokenizer.pieces.decode(some.tolist()) for some in np.array_split(order, len(order) // 16 + 1)]
    texts += ["", "  two  spaces \t", "\ue000\ue001 \ue000"]  # the last are unknown
    pairs = zip(*(each.encode_batch(texts, texts[::-1]) for each in (tokenizer, again)), strict=True)
    if kind > 2 or not all(np.array_equal(ours, theirs) for ours, theirs in pairs):
        raise UserError("the student's SentencePiece model has settings that a tokenizer.json can't hold")
    return settings


def field(number: int, kind: int, value: bytes) -> bytes:
    """A field of a protocol buffer; of the type BYTES with its length in front."""
    return varint(number << 3 | kind) + (varint(len(value)) if kind == BYTES else b"") + value


def varint(value: int) -> bytes:
    """An integer in 7 bits per byte, the lowest first."""
    return bytes((value,)) if value < 128 else bytes((value & 127 | 128,)) + varint(value >> 7)


def fields(message: bytes) -> dict:
    """The values of a protocol buffer by their numbers; the last one of a number that is repeated."""
    stream, values = io.BytesIO(message), {}

    def integer() -> int:
        byte = stream.read(1)[0]
        return byte if byte < 128 else byte - 128 + (integer() << 7)

    while stream.tell() < len(message):
        number, kind = divmod(integer(), 8)
        values[number] = stream.read({1: 8, FLOAT: 4}.get(kind) or integer()) if kind else integer()
    return values


def read_wordpiece(path: str, settings: dict) -> WordPieceTokenizer:
    model, (normalizer,), (split,) = settings["model"], parts(settings, "normalizer"), parts(settings, "pre_tokenizer")
    check_settings(path, normalizer, {"type": ("BertNormalizer",)} | wordpiece_rules(bool(normalizer["lowercase"])))
    check_settings(path, split, {"type": ("BertPreTokenizer",)})
    rules = {"unk_token": (SPECIALS[1],), "continuing_subword_prefix": ("##",), "max_input_chars_per_word": (100,)}
    check_settings(path, model, rules)
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    if [model["vocab"][piece] for piece in pieces] != [*range(len(pieces))]:
        raise UserError(f"{path}: its ids do not count from 0 without gaps")
    return WordPieceTokenizer.from_vocab("\n".join(pieces).encode() + b"\n", normalizer["lowercase"], path)


READERS = {"Unigram": read_sentencepiece, "BPE": read_sentencepiece, "WordPiece": read_wordpiece}

"""tokenizer.json, the one file that Hugging Face's libraries write today, -> the tokenizers of data/tokenizer.py.

    Unigram      pieces, scores and a table of characters -> the bytes of a SentencePiece model, as XLM-R has it
    WordPiece    pieces and their ids                     -> the lines of a vocab.txt, as BERT has it

Any other kind, or a setting that would give other ids, raises an error that names it. A SentencePiece model is a protocol
buffer, in which every field is a tag, (number << 3) | type, and its value; only the fields below are needed, because
the defaults of all others are XLM-R's:

    1 pieces           1 piece (text)    2 score (float)    3 type: 1 normal, 2 unknown, 3 control
    3 normalizer_spec  2 precompiled_charsmap (bytes): which characters become which
"""

import base64
import json
import os
import struct

from common import UserError
from data.tokenizer import MAX_MODEL_BYTES, SPECIALS, Encoder, Tokenizer, WordPieceTokenizer

UNIGRAM_SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3; <mask> comes last
BYTES, FLOAT = 2, 5  # types of protocol buffer fields
CONTINUES = "##"


def read_tokenizer_json(path: str) -> tuple[Encoder, list[str]]:
    """The tokenizer of a file, and the special and added tokens that it lists.

    Raises UserError for a damaged file or a kind that is not implemented.
    """
    if os.path.getsize(path) > 2 * MAX_MODEL_BYTES:
        raise UserError(f"{path}: {os.path.getsize(path):,} bytes can't be a tokenizer")
    try:
        with open(path, encoding="utf-8-sig") as file:
            settings = json.load(file)
        kind = settings["model"].get("type", "WordPiece" if "max_input_chars_per_word" in settings["model"] else "BPE")
        if kind not in READERS:
            raise UserError(f"{path} is a {kind} tokenizer; known: Unigram, as in XLM-R, and WordPiece, as in BERT")
        tokens = [str(token["content"]) for token in settings.get("added_tokens") or ()]
        return READERS[kind](path, settings), tokens
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error):
        raise UserError(f"{path} is damaged: it is not a tokenizer of Hugging Face's libraries") from None


def parts(settings: dict, name: str) -> list[dict]:
    """The steps of a pipeline: of a Sequence, of a single step, or none."""
    step = settings.get(name)
    if step is None:
        return []
    return step[name.replace("_", "") + "s"] if step["type"] == "Sequence" else [step]


def refuse(path: str, what: str, found: object) -> None:
    raise UserError(f"{path}: {what} {json.dumps(found)[:300]} is not implemented: its ids would differ")


def read_unigram(path: str, settings: dict) -> Tokenizer:
    model, charsmap = settings["model"], b""
    for step in parts(settings, "normalizer"):
        if step["type"] == "Precompiled":
            charsmap = base64.b64decode(step["precompiled_charsmap"] or "")
        elif step.get("pattern") != {"Regex": " {2,}"} or step.get("content") != " ":  # spaces are joined anyway
            refuse(path, "the normalizer", step)
    split, *marks = parts(settings, "pre_tokenizer") or [{}]
    spaces = [(step["type"], step["replacement"], step.get("prepend_scheme", "always")) for step in marks]
    prefixed = all(step.get("add_prefix_space", True) for step in marks)
    if split.get("type") != "WhitespaceSplit" or spaces != [("Metaspace", "▁", "always")] or not prefixed:
        refuse(path, "the pre-tokenizer", settings.get("pre_tokenizer"))
    pieces = [(str(piece), float(score)) for piece, score in model["vocab"]]
    layout = [piece for piece, _ in pieces[:4]] + [piece for piece, _ in pieces[-1:]]
    if layout != [*UNIGRAM_SPECIALS, "<mask>"] or model.get("unk_id") != 3 or model.get("byte_fallback"):
        raise UserError(
            f"{path}: ids 0 to 3 and the last are {' '.join(layout)}; XLM-R's are <s> <pad> </s> <unk> <mask>"
        )
    special = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    encoded = [
        field(
            1, BYTES, field(1, BYTES, text.encode()) + field(2, FLOAT, struct.pack("<f", score)) + bytes((3 << 3, kind))
        )
        for text, score, kind in [*special, *((text, score, 1) for text, score in pieces[4:-1])]
    ]
    return Tokenizer(b"".join(encoded) + field(3, BYTES, field(2, BYTES, charsmap)), path)


def field(number: int, kind: int, value: bytes) -> bytes:
    """A field of a protocol buffer; of the type BYTES with its length in front, 7 bits a byte, the lowest first."""
    length, prefix = len(value), bytearray((number << 3 | kind,))
    while kind == BYTES:
        prefix.append(length & 127 | (128 if length > 127 else 0))
        length >>= 7
        if not length:
            break
    return bytes(prefix) + value


def read_wordpiece_json(path: str, settings: dict) -> WordPieceTokenizer:
    model, steps = settings["model"], parts(settings, "normalizer")
    if [step["type"] for step in steps] != ["BertNormalizer"]:
        refuse(path, "the normalizer", settings.get("normalizer"))
    (normalizer,) = steps
    lower, accents = normalizer["lowercase"], normalizer["strip_accents"]
    whole = normalizer["clean_text"] and normalizer["handle_chinese_chars"] and accents in (None, lower)
    if not whole or not isinstance(lower, bool):
        refuse(path, "the normalizer", normalizer)
    if [step["type"] for step in parts(settings, "pre_tokenizer")] != ["BertPreTokenizer"]:
        refuse(path, "the pre-tokenizer", settings.get("pre_tokenizer"))
    rules = (model.get("unk_token"), model.get("continuing_subword_prefix"), model.get("max_input_chars_per_word"))
    if rules != (SPECIALS[1], CONTINUES, 100):
        refuse(path, "the model", dict(zip(("unknown", "prefix", "longest word"), rules, strict=True)))
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    if [model["vocab"][piece] for piece in pieces] != list(range(len(pieces))):
        raise UserError(f"{path}: its ids do not count from 0 without gaps")
    return WordPieceTokenizer.from_vocab("\n".join(pieces).encode() + b"\n", lower, path)


READERS = {"Unigram": read_unigram, "WordPiece": read_wordpiece_json}

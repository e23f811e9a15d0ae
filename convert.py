"""Published checkpoints -> weights/NAME.pt: one file with the config, float32 tensors and the tokenizer. And back.

    python convert.py xlmr-base                   # download, verify, convert (1.1 GB); or infoxlm-base
    python convert.py xlmr-base --from DIR        # a Hugging Face folder that you already have
    python convert.py my-model --from DIR         # any other size: config.json gives the shape
    python convert.py --export out/NAME/student.pt DIR    # a student -> a Hugging Face folder, float32

DIR holds config.json, the weights (model.safetensors or pytorch_model.bin, in one file or in shards with an index) and
the tokenizer: sentencepiece.bpe.model, vocab.txt (with tokenizer_config.json if the model is cased) or tokenizer.json.
It may also be the root of a model in Hugging Face's cache. The key tables below are the whole conversion: every tensor
of the source is either mapped or named as skipped, and one that is missing, unexpected or of a wrong shape is an error
that names it. Half-precision tensors (InfoXLM's file mixes fp16 and fp32) are cast.

A model with a head of classes keeps it, and their names: for the task that has the same it is a teacher as it stands.

Nothing in a source file is executed: safetensors is parsed here (a JSON header and raw tensors), .bin files are read
with weights_only=True.
"""

if __name__ == "__main__":
    import kit.interrupt  # noqa: F401

import argparse
import json
import os
import re
import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from checkpoint import (
    WEIGHTS_DIR,
    check_config,
    check_tensors,
    checkpoint_payload,
    float_model,
    load_untrusted,
    read_student,
    save_atomically,
    tokenizer_of,
)
from data.fetch import MODELS, fetch_model
from data.tokenizer import BOS, EOS, Encoder, Tokenizer, WordPieceTokenizer, WordTokenizer, load_tokenizer
from data.tokenizer_json import read_tokenizer_json, tokenizer_json
from kit.common import UserError, status_of
from kit.files import atomic_write, check_writable, write_json, write_text
from model import PRESETS, Model, ModelConfig

TOKENIZER_FILE = "sentencepiece.bpe.model"
VOCAB_FILE = "vocab.txt"
TOKENIZER_JSON = "tokenizer.json"
SETTINGS = "tokenizer_config.json"

# --------------------------------------------------------------------------------- the key tables
# Hugging Face name -> name here. {i} is the layer. Both .weight and .bias follow the module's name.
WORDS = "embeddings.word_embeddings.weight"
EMBEDDINGS = {
    WORDS: "encoder.embeddings.word.weight",
    "embeddings.position_embeddings.weight": "encoder.embeddings.position.weight",
    "embeddings.token_type_embeddings.weight": "encoder.embeddings.token_type.weight",
    "embeddings.LayerNorm.weight": "encoder.embeddings.norm.weight",
    "embeddings.LayerNorm.bias": "encoder.embeddings.norm.bias",
}
LAYER_MODULES = {
    "encoder.layer.{i}.attention.self.query": "encoder.layers.{i}.attention.query",
    "encoder.layer.{i}.attention.self.key": "encoder.layers.{i}.attention.key",
    "encoder.layer.{i}.attention.self.value": "encoder.layers.{i}.attention.value",
    "encoder.layer.{i}.attention.output.dense": "encoder.layers.{i}.attention.output",
    "encoder.layer.{i}.attention.output.LayerNorm": "encoder.layers.{i}.attention.norm",
    "encoder.layer.{i}.intermediate.dense": "encoder.layers.{i}.ffn.up",
    "encoder.layer.{i}.output.dense": "encoder.layers.{i}.ffn.down",
    "encoder.layer.{i}.output.LayerNorm": "encoder.layers.{i}.ffn.norm",
}
TOKEN_HEAD = {"classifier.weight": "head.out_proj.weight", "classifier.bias": "head.out_proj.bias"}
POOLER = {"pooler.dense.weight": "head.dense.weight", "pooler.dense.bias": "head.dense.bias"}


@dataclass(frozen=True)
class Family:
    """What differs between RoBERTa's and BERT's files; the encoder's names are the same.

    prefix: of the encoder's names in a model with a head.  heads: the key table of each head. skipped: tensors of some
    files that are not needed -> why; a name that ends with a dot is a prefix.
    """

    prefix: str
    heads: dict[str, dict[str, str]]
    skipped: dict[str, str]

    def skips(self, key: str) -> bool:
        return any(key == name or (name.endswith(".") and key.startswith(name)) for name in self.skipped)


ROBERTA = Family(
    prefix="roberta.",
    heads={
        "mlm": {
            "lm_head.bias": "head.bias",
            "lm_head.dense.weight": "head.dense.weight",
            "lm_head.dense.bias": "head.dense.bias",
            "lm_head.layer_norm.weight": "head.norm.weight",
            "lm_head.layer_norm.bias": "head.norm.bias",
        },
        "sequence": {
            "classifier.dense.weight": "head.dense.weight",
            "classifier.dense.bias": "head.dense.bias",
            "classifier.out_proj.weight": "head.out_proj.weight",
            "classifier.out_proj.bias": "head.out_proj.bias",
        },
        "token": TOKEN_HEAD,
        "none": {},
    },
    skipped={
        "embeddings.position_ids": "the constant 0, 1, 2, ...",
        "pooler.dense.weight": "the RoBERTa heads don't use the pooler",
        "pooler.dense.bias": "the RoBERTa heads don't use the pooler",
        "lm_head.decoder.weight": "tied to the word embeddings",
        "lm_head.decoder.bias": "the same as lm_head.bias",
    },
)
BERT = Family(
    prefix="bert.",
    heads={
        "pooler": POOLER,
        "sequence": POOLER | TOKEN_HEAD,  # one matrix behind the pooler
        "token": TOKEN_HEAD,  # the same names, without a pooler, or with one that is not used
        "none": {},
    },
    skipped={
        "embeddings.position_ids": "the constant 0, 1, 2, ...",
        "pooler.dense.weight": "the token head doesn't use the pooler",
        "pooler.dense.bias": "the token head doesn't use the pooler",
        "cls.": "the heads of pretraining; tasks have their own",
    },
)


def family_of(config: ModelConfig) -> Family:
    """BERT counts positions from 0; RoBERTa from pad_id + 1, which is never 0."""
    return BERT if config.position_offset == 0 else ROBERTA


def key_table(config: ModelConfig) -> dict[str, str]:
    """Every source name that must be present -> its name here."""
    table = dict(EMBEDDINGS)
    for i in range(config.num_layers):
        for source, target in LAYER_MODULES.items():
            for kind in (".weight", ".bias"):
                table[source.format(i=i) + kind] = target.format(i=i) + kind
    return table | family_of(config).heads[config.head]


# ---------------------------------------------------------------------------------- reading files
SAFETENSORS_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MAX_HEADER = 100 << 20  # bytes; the format's own limit


def read_safetensors(path: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file: 8 bytes of little-endian header length, a JSON header, then the raw tensors.

    They are views of the file, mapped into memory. Every offset and shape is checked before use.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise UserError(f"{path} is damaged: its header runs past the end of the file")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = []
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                if entry["dtype"] not in SAFETENSORS_TYPES:
                    raise UserError(
                        f"{path}: tensor {name} is {entry['dtype']}, not a float: convert the original model"
                    )
                dtype = SAFETENSORS_TYPES[entry["dtype"]]
                entries.append((name, dtype, tuple(entry["shape"]), begin, end))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{path} is damaged: its header is not that of a safetensors file") from None
    start = 8 + length
    data = torch.from_file(path, shared=False, size=size, dtype=torch.uint8)
    tensors = {}
    for name, dtype, shape, begin, end in entries:
        count = 1
        for extent in shape:
            if not isinstance(extent, int) or extent < 0:
                raise UserError(f"{path} is damaged: tensor {name} has shape {shape}")
            count *= extent
        in_file = isinstance(begin, int) and isinstance(end, int) and 0 <= begin <= end <= size - start
        if not in_file or end - begin != count * dtype.itemsize:
            raise UserError(f"{path} is damaged or cut short: tensor {name} is not where the header says")
        raw = data[start + begin : start + end]
        if (start + begin) % dtype.itemsize:  # a view needs alignment
            raw = raw.clone()
        tensors[name] = raw.view(dtype).reshape(shape)
    return tensors


def read_bin(path: str) -> dict[str, Tensor]:
    """The tensors of a pytorch_model.bin, without executing anything in it."""
    tensors = load_untrusted(path, "use model.safetensors, or fetch it again")
    if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):  # a training library's file
        tensors = tensors["state_dict"]
    if not isinstance(tensors, dict) or not all(
        isinstance(k, str) and isinstance(t, Tensor) for k, t in tensors.items()
    ):
        raise UserError(f"{path} is not a dictionary of tensors")
    return tensors


def read_folder(folder: str) -> tuple[dict[str, Tensor], dict | None, bytes]:
    """A Hugging Face folder -> (tensors, config.json or None, the bytes of the tokenizer)."""
    folder = encoder_folder(snapshot_of(folder))
    names = sorted(os.listdir(folder))
    if adapter := [name for name in names if name.startswith(("adapter_config.", "adapter_model."))]:
        raise UserError(f"{folder}/{adapter[0]}: merge the adapter into the model, with peft's merge_and_unload()")
    settings = read_json(os.path.join(folder, "config.json"))
    if settings is not None:
        config_from_json(settings)  # a wrong kind of model is named before its files are missed
    elif inner := [name for name in names if "model_type" in (read_json(f"{folder}/{name}/config.json") or {})]:
        raise UserError(f"{folder} has no config.json; give one of the folders in it that have: {' '.join(inner)}")
    tensors, tokenizer = read_weights(folder), read_tokenizer(folder)
    for name in filter(re.compile(r"sentence_.+_config\.json").fullmatch, names):
        if (read_json(f"{folder}/{name}") or {}).get("do_lower_case") and not getattr(tokenizer, "lower", False):
            raise UserError(f"{folder}/{name}: do_lower_case is true, but the tokenizer keeps capitals")
    return tensors, settings, tokenizer.bytes


def encoder_folder(folder: str) -> str:
    """The folder itself, or of sentence-transformers' modules that of the first, the encoder. Prints what else is there."""
    modules = [each for each in read_json(f"{folder}/modules.json", list) or [] if isinstance(each, dict)]
    if not modules:
        return folder
    encoder = snapshot_of(os.path.normpath(os.path.join(folder, str(modules[0].get("path")))))
    more = read_json(f"{encoder}/sentence_bert_config.json") or {}
    more |= read_json(f"{folder}/config_sentence_transformers.json") or {}
    left_out = [str(each.get("type")).rpartition(".")[2] for each in modules[1:]]
    left_out += [f"{key} {more[key]}" for key in ("max_seq_length", "prompts") if more.get(key)]
    print(f"sentence-transformers: the encoder is {encoder}; not converted: {', '.join(left_out) or 'nothing'}")
    return encoder


def snapshot_of(folder: str) -> str:
    """The folder itself, or in Hugging Face's cache that of the main revision below it, or of the newest."""
    if not os.path.isdir(folder):
        raise UserError(f"no folder {folder}")
    snapshots = os.path.join(folder, "snapshots")
    if not os.path.isdir(snapshots):
        return folder
    found = [os.path.join(snapshots, revision) for revision in os.listdir(snapshots)]
    found = sorted(filter(os.path.isdir, found), key=os.path.getmtime)
    if not found:
        raise UserError(f"{snapshots} is empty: fetch the model again")
    main = os.path.join(folder, "refs", "main")
    if os.path.isfile(main):
        with open(main, encoding="utf-8", errors="replace") as file:
            revision = os.path.join(snapshots, os.path.basename(file.read(100).strip()))
        return revision if revision in found else found[-1]
    return found[-1]


def real_file(folder: str, name: str) -> str | None:
    """The path of a file, or None if there is none. Raises UserError for a file that Git LFS has not fetched."""
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise UserError(f"{path} is a Git LFS pointer, not the file: run 'git lfs pull' in its folder")
    return path


def read_weights(folder: str) -> dict[str, Tensor]:
    """The tensors of a folder, from one file or from all the shards that an index names."""
    for name, read in {"model.safetensors": read_safetensors, "pytorch_model.bin": read_bin}.items():
        if path := real_file(folder, name):
            return read(path)
        index = read_json(os.path.join(folder, f"{name}.index.json"))
        if index is None:
            continue
        shards = list(index["weight_map"].values()) if isinstance(index.get("weight_map"), dict) else []
        if not shards or not all(isinstance(each, str) and each == os.path.basename(each) for each in shards):
            raise UserError(f"{folder}/{name}.index.json names no files beside it")
        tensors: dict[str, Tensor] = {}
        for shard in sorted(set(shards)):
            if not (path := real_file(folder, shard)):
                raise UserError(f"{folder} has no {shard}, which {name}.index.json names: fetch it again")
            part = read(path)
            if twice := tensors.keys() & part.keys():
                raise UserError(f"{path} repeats tensor {min(twice)} of another shard")
            tensors |= part
        return tensors
    raise UserError(f"{folder} has neither model.safetensors nor pytorch_model.bin")


def read_tokenizer(folder: str) -> Encoder:
    """The tokenizer of a folder, whichever file holds it.

    Raises UserError if there is none that is implemented, or one with tokens or rules beyond its vocabulary.
    """
    settings = read_json(os.path.join(folder, SETTINGS)) or {}
    added = [*(read_json(os.path.join(folder, "added_tokens.json")) or {})]
    later = settings.get("added_tokens_decoder")
    added += [str(each.get("content")) for each in (later if isinstance(later, dict) else {}).values()]
    if path := real_file(folder, TOKENIZER_FILE):
        return refuse_added(path, Tokenizer.from_file(path), added)
    if path := real_file(folder, VOCAB_FILE):
        with open(path, "rb") as file:
            tokenizer = WordPieceTokenizer.from_vocab(file.read(), check_wordpiece(settings, default=True), path)
        return refuse_added(path, tokenizer, added)
    if path := real_file(folder, TOKENIZER_JSON):
        tokenizer, more = read_tokenizer_json(path)
        if isinstance(tokenizer, WordPieceTokenizer) and check_wordpiece(settings, tokenizer.lower) != tokenizer.lower:
            raise UserError(f"{path} and {SETTINGS} disagree about capitals (do_lower_case): make them agree")
        return refuse_added(path, tokenizer, added + more)
    if os.path.isfile(os.path.join(folder, "merges.txt")):
        raise UserError(f"{folder} has a BPE tokenizer; known: SentencePiece, as in XLM-R, and WordPiece, as in BERT")
    raise UserError(f"no tokenizer in {folder}: no {TOKENIZER_FILE}, {VOCAB_FILE} or {TOKENIZER_JSON}")


def read_json(path: str, kind: type = dict) -> dict | None:
    """The object (or the list) in a JSON file; None if there is no such file."""
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8-sig") as file:
            settings = json.load(file)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, kind):
        raise UserError(f"{path} is not a JSON {'object' if kind is dict else 'list'}")
    return settings


def refuse_added(path: str, tokenizer: Encoder, added: list[str]) -> Encoder:
    """Raises UserError for a token that was added to a vocabulary: it would be cut into pieces here."""
    for token in added:
        if not tokenizer.has_piece(token):
            raise UserError(f"{path}: {token[:50]!r} was added to its vocabulary, which is not implemented")
    return tokenizer


def check_wordpiece(settings: dict, default: bool) -> bool:
    """Whether a tokenizer_config.json drops capitals. Raises UserError for rules that are not implemented."""
    lower = settings.get("do_lower_case", default)
    if not isinstance(lower, bool):
        raise UserError(f"{SETTINGS}: do_lower_case is {lower!r}; want true or false")
    check_settings(
        SETTINGS,
        settings,
        {
            "tokenizer_class": ("BertTokenizer", "BertTokenizerFast"),  # others split words otherwise
            "do_basic_tokenize": (True,),
            "tokenize_chinese_chars": (True,),
            "strip_accents": (None, lower),  # None: as do_lower_case
            "never_split": (None, []),
        },
    )
    return lower


# ------------------------------------------------------------------------------------- conversion
def check_settings(path: str, settings: dict, expected: dict[str, tuple]) -> None:
    """Raises UserError for a setting with a value that this code does not implement."""
    for key, known in expected.items():
        if key in settings and settings[key] not in known:
            supported = ", ".join(str(value) for value in known if value not in (None, [], {}))
            raise UserError(f"{path}: {key} is {settings[key]!r:.99}; supported: {supported or 'none'}")


IDENTITY = "torch.nn.modules.linear.Identity"
CONFIG_NAMES = {  # here -> in config.json
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "ffn_size": "intermediate_size",
    "type_vocab_size": "type_vocab_size",
    "pad_id": "pad_token_id",
    "norm_eps": "layer_norm_eps",
    "dropout": "hidden_dropout_prob",
}


def config_from_json(settings: dict) -> ModelConfig:
    """Hugging Face's config.json -> ModelConfig. Raises UserError for what is not implemented."""
    expected = {
        "model_type": ("xlm-roberta", "roberta", "bert"),
        "hidden_act": ("gelu",),
        "position_embedding_type": ("absolute", None),
        "is_decoder": (False, None),  # a decoder attends to earlier tokens only
        "auto_map": (None, {}),  # the model's own code
        "quantization_config": (None, {}),
        "sbert_ce_default_activation_function": (None, IDENTITY),  # of a CrossEncoder's logits
    }
    check_settings("config.json", settings, expected)
    check_settings("config.json", settings.get("sentence_transformers") or {}, {"activation_fn": (None, IDENTITY)})
    bert = settings.get("model_type") == "bert"
    names = {**CONFIG_NAMES, "max_tokens": "max_position_embeddings"}
    if bert:  # BERT's first files lack these two; Hugging Face assumes the same
        settings = {"pad_token_id": 0, "layer_norm_eps": 1e-12, **settings}
    missing = [name for name in names.values() if name not in settings]
    if missing:
        raise UserError(f"config.json has no {missing[0]}")
    values = {ours: settings[theirs] for ours, theirs in names.items()}
    if not isinstance(values["pad_id"], int) or not isinstance(values["max_tokens"], int):
        raise UserError("config.json: pad_token_id and max_position_embeddings must be integers")
    # RoBERTa counts positions from pad_id + 1, in a table that much longer; BERT from 0.
    offset = 0 if bert else values["pad_id"] + 1
    values["max_tokens"] -= offset
    return check_config(ModelConfig(position_offset=offset, **values))


def convert_tensors(name: str, tensors: dict[str, Tensor], settings: dict | None, tokenizer: bytes) -> dict:
    """Source tensors -> the dictionary of weights/NAME.pt (see checkpoint.checkpoint_payload).

    Raises UserError naming the first tensor that is missing, unexpected, of a wrong shape or not a float.
    """
    preset, loaded = PRESETS.get(name), load_tokenizer(tokenizer, "the tokenizer")
    if settings is not None:
        config = config_from_json(settings)
        if config.position_offset == 0 and not loaded.typed:  # a BERT with XLM-R's tokenizer, which alone pads
            config = replace(config, pad_id=loaded.pad_id)
        if preset is not None and config != preset:
            differs = next(k for k in vars(preset) if getattr(config, k) != getattr(preset, k))
            raise UserError(
                f"config.json has {differs} = {getattr(config, differs)}, {name} has "
                f"{getattr(preset, differs)}: choose another name for this model"
            )
    elif preset is not None:
        config = preset
    else:
        raise UserError(f"no config.json beside the weights, and {name} is not one of: {' '.join(PRESETS)}")

    family = family_of(config)
    tensors = plain_names(tensors, family)
    if "lm_head.bias" not in tensors and "lm_head.decoder.bias" in tensors:  # one tensor, two names
        tensors["lm_head.bias"] = tensors["lm_head.decoder.bias"]
    config = check_config(replace(config, **find_head(tensors, family, settings or {})))
    table = key_table(config)

    extra = sorted(key for key in tensors if key not in table and not family.skips(key))
    if extra:
        raise UserError(f"the source has a tensor with no place in the key table: {extra[0]}")
    missing = [key for key in table if key not in tensors]
    if missing:
        raise UserError(f"the source has no tensor {missing[0]}")
    not_float = [key for key in table if tensors[key].dtype not in FLOATS]
    if not_float:
        kind = tensors[not_float[0]].dtype
        raise UserError(f"tensor {not_float[0]} is {kind}, not a float of 16 bits or more: convert the original model")
    tied = tensors.get("lm_head.decoder.weight")
    words = tensors[WORDS]
    # The two may differ in precision.
    if tied is not None and not torch.equal(tied, words.to(tied.dtype)):
        raise UserError("lm_head.decoder.weight differs from the word embeddings: untied models are not supported")

    ours = {target: tensors[source] for source, target in table.items()}
    with torch.device("meta"):
        model = Model(config)
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    check_tensors("the source", expected, ours, dtypes=())
    # Copies, because torch.save writes the whole storage behind a view: the whole source file.
    ours = {key: tensor.to(torch.float32, copy=True) for key, tensor in ours.items()}
    check_tensors("the source in float32", expected, ours)
    if loaded.vocab_size > config.vocab_size:
        raise UserError(f"the tokenizer has {loaded.vocab_size:,} ids, the model only {config.vocab_size:,}")
    if loaded.typed and config.type_vocab_size < 2:
        raise UserError("a WordPiece tokenizer tells two texts apart by token types, of which the model has one")
    if loaded.pad_id != config.pad_id:
        raise UserError(f"the tokenizer pads with {loaded.pad_id}, the model with {config.pad_id}")
    model.load_state_dict(ours, strict=True, assign=True)  # a meta model has no storage to copy into
    labels = label_names(settings or {}, config.num_labels)
    return checkpoint_payload(model, tokenizer, name=name, labels="\t".join(labels))


def label_names(settings: dict, count: int) -> list[str]:
    """The names of a head's classes by id; LABEL_0, LABEL_1, ... as Hugging Face has it where config.json has none."""
    names = settings.get("id2label") or {}
    return [" ".join(str(names.get(str(i), f"LABEL_{i}")).split()) for i in range(count)]


def plain_names(tensors: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Tensors by the names of the key table.

    In a model with a head the encoder's names have a prefix, in a bare encoder they don't; training libraries put one
    more before all names. BERT files that came from TensorFlow name a norm's weight and bias gamma and beta.
    """
    words = next((key for key in tensors if key.endswith(WORDS)), WORDS)
    outer = words.removesuffix(WORDS).removesuffix(family.prefix)
    outer = outer if all(key.startswith(outer) for key in tensors) else ""
    renamed = {}
    for key, tensor in tensors.items():
        key = key.removeprefix(outer).removeprefix(family.prefix)
        if family is BERT:
            key = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", key)
            key = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", key)
        if key in renamed:
            raise UserError(f"the source has two tensors that mean {key}")
        renamed[key] = tensor
    return renamed


def find_head(tensors: dict[str, Tensor], family: Family, settings: dict) -> dict:
    """The head of the source and its number of classes, which is the rows of its last matrix."""
    last, head, bare = "classifier.weight", "token", "none"
    if family is BERT:
        pooler = "pooler.dense.weight" in tensors
        bare = "pooler" if pooler else "none"
        # Old files with a token head hold an unused pooler, too.
        if pooler and settings.get("architectures") != ["BertForTokenClassification"]:
            head = "sequence"
    elif "classifier.out_proj.weight" in tensors:
        last, head = "classifier.out_proj.weight", "sequence"
    elif any(key.startswith("lm_head.") for key in tensors):
        bare = "mlm"
    if last not in tensors:
        return {"head": bare, "num_labels": 0}
    count = (*tensors[last].shape, 0)[0]
    known = [kind + CLASSES[head] for kind in ("XLMRoberta", "Roberta", "Bert")]
    found, names = settings.get("architectures"), settings.get("id2label")
    if found and not set(known) & set(found):
        raise UserError(f"config.json: architectures is {found}; for these tensors supported: {', '.join(known)}")
    if names and (not isinstance(names, dict) or set(names) != {str(i) for i in range(count)}):
        raise UserError(f"config.json names {len(names)} classes in id2label, the head has {count}")
    kinds = (None, "regression" if count == 1 else "single_label_classification")  # None: one of these, as here
    check_settings("config.json", settings, {"problem_type": kinds})
    return {"head": head, "num_labels": count}


# ----------------------------------------------------------------------------------------- export
HEAD_WORDS = {"none": "encoder without a head", "pooler": "encoder with a pooler", "mlm": "masked language model"}
CLASSES = {"sequence": "ForSequenceClassification", "token": "ForTokenClassification"}


def export(path: str, folder: str) -> None:
    """A student -> a Hugging Face folder: float32 tensors that lie on the student's grid, config.json, tokenizer.

    transformers' logits are those of the student with float activations. Raises UserError for a model that Hugging Face
    has no class for.
    """
    student = read_student(path)
    config, labels = student.config, student.notes.get("labels", "").split("\t")
    tokenizer = tokenizer_of(path, student)
    if config.tt or config.head not in CLASSES or isinstance(tokenizer, WordTokenizer):
        what = "tensor trains" if config.tt else f"a {config.head} head and {type(tokenizer).__name__}"
        raise UserError(
            f"{path} has {what}, for which transformers has no class: export a classifier of texts or words"
        )
    check_writable(folder, "name another folder")
    if os.path.exists(os.path.join(folder, "config.json")):
        raise UserError(f"{folder} holds a model already: name another folder")
    family = family_of(config)
    ours = float_model(student).state_dict()
    tensors = {}
    for source, target in key_table(config).items():
        prefix = "" if source.startswith("classifier.") else family.prefix
        tensors[prefix + source] = ours[target]
    bert = family is BERT
    settings = {
        "architectures": [("Bert" if bert else "XLMRoberta") + CLASSES[config.head]],
        "model_type": "bert" if bert else "xlm-roberta",
        **{theirs: getattr(config, our) for our, theirs in CONFIG_NAMES.items()},
        "max_position_embeddings": config.max_tokens + config.position_offset,
        "attention_probs_dropout_prob": config.dropout,
        "hidden_act": "gelu",
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    if isinstance(tokenizer, WordPieceTokenizer):
        kind = {"tokenizer_class": "BertTokenizer", "do_lower_case": tokenizer.lower}
        name, vocabulary = VOCAB_FILE, "\n".join(tokenizer.pieces) + "\n"
    else:
        settings |= {"bos_token_id": BOS, "eos_token_id": EOS}
        # Not XLMRobertaTokenizer, nor a sentencepiece.bpe.model: of either transformers makes a unigram tokenizer.
        kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
        kind |= {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
        kind |= {"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}
        name, vocabulary = TOKENIZER_JSON, json.dumps(tokenizer_json(tokenizer), ensure_ascii=False)
    kind["model_max_length"] = config.max_tokens
    write_safetensors(tensors, os.path.join(folder, "model.safetensors"))
    write_json(os.path.join(folder, SETTINGS), kind)
    write_text(os.path.join(folder, name), vocabulary)
    write_json(os.path.join(folder, "config.json"), settings)  # last: now the folder is a model
    print(f"wrote {folder}: config.json, model.safetensors, {name}, tokenizer_config.json")


def write_safetensors(tensors: dict[str, Tensor], path: str) -> None:
    """The inverse of read_safetensors, for float32 tensors."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().numpy().data)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Turn a published checkpoint into weights/NAME.pt, or a student into a Hugging Face folder.",
        epilog="examples: python convert.py xlmr-base; python convert.py xlmr-base --from ~/models/xlm-roberta-base; "
        "python convert.py --export out/NAME/student.pt DIR",
    )
    parser.add_argument("name", nargs="?", help=f"{', '.join(sorted(MODELS))}; with --from also any name of your own")
    parser.add_argument("--from", dest="folder", metavar="DIR", help="a local Hugging Face folder; default: download")
    parser.add_argument("--out", metavar="FILE", help="default: weights/NAME.pt")
    parser.add_argument("--export", nargs=2, metavar=("STUDENT", "DIR"), help="write a student.pt as a folder instead")
    args = parser.parse_args(argv)
    if bool(args.export) == bool(args.name or args.folder or args.out):
        parser.error("give the name of a model, or --export STUDENT DIR alone")
    again = "; run the same command again to continue"
    if args.export:
        return status_of(lambda: export(*args.export))
    return status_of(lambda: run(args.name, args.folder, args.out), again)


def run(name: str, folder: str | None, out: str | None) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"{name!r} is no name for a model: use letters, digits, '.', '_' and '-'")
    out = out or os.path.join(WEIGHTS_DIR, name + ".pt")
    if folder is None:
        if name not in MODELS:
            raise UserError(f"no download is known for {name!r}, only {' '.join(sorted(MODELS))}: add --from DIR")
        folder = os.path.join(os.path.dirname(os.path.abspath(out)), "downloads", name)
        fetch_model(name, folder)
    payload = convert_tensors(name, *read_folder(folder))
    size = save_atomically(payload, out)
    count = sum(tensor.numel() for tensor in payload["tensors"].values())
    config, labels = payload["config"], payload["notes"]["labels"].replace("\t", ", ")
    named = f" ({labels})" if labels else ""
    head = HEAD_WORDS.get(config["head"], config["head"] + " head")
    print(f"wrote {out}: {head}{named}, {count:,} parameters, {size / 1e6:,.1f} MB")
    standard = os.path.abspath(out) == os.path.join(WEIGHTS_DIR, name + ".pt")
    task = "rte" if load_tokenizer(payload["tokenizer"].numpy().tobytes()).typed else "xnli"
    print(f"next: python train.py --task {task} --model {name if standard else out}")


if __name__ == "__main__":
    sys.exit(main())

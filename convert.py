"""Published checkpoints -> weights/NAME.safetensors: the config, float32 tensors and the tokenizer in a file. And back.

    python convert.py xlmr-base                   # download, verify, convert (1.1 GB); or infoxlm-base
    python convert.py xlmr-base --from DIR        # a Hugging Face folder that you already have
    python convert.py my-model --from DIR         # any other size: config.json gives the shape
    python convert.py --export out/NAME/student.safetensors DIR    # a student -> a Hugging Face folder, float32

DIR holds config.json, the weights (model.safetensors or pytorch_model.bin, in one file or in shards with an index) and
the tokenizer: sentencepiece.bpe.model, vocab.txt (with tokenizer_config.json if the model is cased) or tokenizer.json.
It may also be the root of a model in Hugging Face's cache. Nothing in it is executed.

The key tables below are the whole conversion: every tensor of the source is either mapped or named as skipped, and one
that is missing, unexpected or of a wrong shape is an error that names it. Half-precision tensors (InfoXLM's file mixes
fp16 and fp32) are cast. A model with a head of classes keeps it, and their names: for the task that has the same it is a
teacher as it stands.
"""

if __name__ == "__main__":
    import kit.interrupt  # noqa: F401

import argparse
import json
import os
import re
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from checkpoint import check_config, fake_quantized, meta_model, read_student, save_model, tokenizer_of
from data.fetch import MODELS, fetch_model
from data.tasks import WEIGHTS_DIR
from data.tokenizer import BOS, EOS, Encoder, WordPieceTokenizer, WordTokenizer
from data.tokenizer_json import check_settings, read_json, read_tokenizer, reading, tokenizer_json
from kit.common import UserError, exit_status
from kit.files import check_tensors, map_tensors, write_json, write_tensors, write_text
from model import PRESETS, Model, ModelConfig

# --------------------------------------------------------------------------------- the key tables
# Hugging Face name -> name here. {i} is the layer. Of a module both .weight and .bias are meant.
WORDS = "embeddings.word_embeddings.weight"
EMBEDDINGS = {
    WORDS: "encoder.embeddings.word.weight",
    "embeddings.position_embeddings.weight": "encoder.embeddings.position.weight",
    "embeddings.token_type_embeddings.weight": "encoder.embeddings.token_type.weight",
    "embeddings.LayerNorm": "encoder.embeddings.norm",
}
LAYER = {
    "encoder.layer.{i}.attention.self.query": "encoder.layers.{i}.attention.query",
    "encoder.layer.{i}.attention.self.key": "encoder.layers.{i}.attention.key",
    "encoder.layer.{i}.attention.self.value": "encoder.layers.{i}.attention.value",
    "encoder.layer.{i}.attention.output.dense": "encoder.layers.{i}.attention.output",
    "encoder.layer.{i}.attention.output.LayerNorm": "encoder.layers.{i}.attention.norm",
    "encoder.layer.{i}.intermediate.dense": "encoder.layers.{i}.ffn.up",
    "encoder.layer.{i}.output.dense": "encoder.layers.{i}.ffn.down",
    "encoder.layer.{i}.output.LayerNorm": "encoder.layers.{i}.ffn.norm",
}


class Family(NamedTuple):
    """What differs between RoBERTa's and BERT's files; the encoder's names are the same."""

    prefix: str  # of the encoder's names in a model with a head
    heads: dict[str, dict[str, str]]  # the key table of each head but "none"
    skipped: tuple[str, ...]  # the beginnings of names that some files have and that are not needed


ROBERTA = Family(
    prefix="roberta.",
    heads={
        "mlm": {"lm_head.bias": "head.bias", "lm_head.dense": "head.dense", "lm_head.layer_norm": "head.norm"},
        "sequence": {"classifier.dense": "head.dense", "classifier.out_proj": "head.out_proj"},
        "token": {"classifier": "head.out_proj"},
    },
    # The constant 0, 1, 2, ...; what RoBERTa's heads don't use; the word embeddings again, and lm_head.bias.
    skipped=("embeddings.position_ids", "pooler.dense.", "lm_head.decoder."),
)
BERT = Family(
    prefix="bert.",
    heads={
        "pooler": {"pooler.dense": "head.dense"},
        "sequence": {"pooler.dense": "head.dense", "classifier": "head.out_proj"},  # one matrix behind the pooler
        "token": {"classifier": "head.out_proj"},  # without a pooler, or with one that is not used
    },
    # The last are the heads of pretraining: tasks have their own.
    skipped=("embeddings.position_ids", "pooler.dense.", "cls."),
)


def family_of(config: ModelConfig) -> Family:
    """BERT counts positions from 0; RoBERTa from pad_id + 1, which is never 0."""
    return BERT if config.position_offset == 0 else ROBERTA


def key_table(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Pairs of a source name that must be present and its name here."""
    layers = ((a.format(i=i), b.format(i=i)) for i in range(config.num_layers) for a, b in LAYER.items())
    for source, target in chain(EMBEDDINGS.items(), layers, family_of(config).heads.get(config.head, {}).items()):
        for kind in ("",) if source.endswith((".weight", ".bias")) else (".weight", ".bias"):
            yield source + kind, target + kind


# ---------------------------------------------------------------------------------- reading files
def read_bin(path: str) -> dict[str, Tensor]:
    """The tensors of a pytorch_model.bin, without executing anything in it."""
    try:
        archived = zipfile.is_zipfile(path)  # since PyTorch 1.6: then it can be mapped from disk, and has checksums
        if archived and zipfile.ZipFile(path).testzip():
            raise ValueError
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=archived)
        tensors = tensors.get("state_dict", tensors)  # of a training library
        for name, tensor in tensors.items():  # dense ones, whose elements are in the file
            if not (isinstance(name, str) and tensor.is_cpu and tensor.untyped_storage().nbytes() >= tensor.nbytes):
                raise TypeError
    except Exception:  # the libraries raise whatever a damaged file leads them to
        raise UserError(f"{path} is damaged or holds code, and was not loaded: fetch it again") from None
    return tensors


def read_weights(folder: str) -> dict[str, Tensor]:
    """The tensors of a folder, from one file or from all the shards that an index names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        tensors, shards = {}, [name]
        if not os.path.isfile(os.path.join(folder, name)):
            with reading(index := os.path.join(folder, f"{name}.index.json")):
                shards = sorted({os.path.basename(shard) for shard in read_json(index).get("weight_map", {}).values()})
        for shard in shards:
            path = os.path.join(folder, shard)
            tensors |= read_bin(path) if name.endswith(".bin") else map_tensors(path, "fetch it again")[0]
        if tensors:
            return tensors
    raise UserError(f"{folder} has neither model.safetensors nor pytorch_model.bin")


def read_folder(folder: str) -> tuple[dict[str, Tensor], dict, Encoder, dict[str, str]]:
    """A Hugging Face folder -> (tensors, config.json, empty if there is none, the tokenizer, sentence_settings())."""
    main = os.path.join(folder, "refs", "main")
    if os.path.isfile(main):  # in the cache of Hugging Face's libraries
        with open(main, encoding="utf-8", errors="replace") as file:
            folder = os.path.join(folder, "snapshots", file.read().strip())
    folder, sentences = sentence_settings(folder)
    names = sorted(os.listdir(folder))
    if adapter := [name for name in names if name.startswith(("adapter_config.", "adapter_model."))]:
        raise UserError(f"{folder}/{adapter[0]}: merge the adapter into the model, with peft's merge_and_unload()")
    settings = read_json(os.path.join(folder, "config.json"))
    tensors, tokenizer = read_weights(folder), read_tokenizer(folder)
    for name in filter(re.compile(r"sentence_.+_config\.json").fullmatch, names):
        if read_json(f"{folder}/{name}").get("do_lower_case") and not getattr(tokenizer, "lower", False):
            raise UserError(f"{folder}/{name}: do_lower_case is true, but the tokenizer keeps capitals")
    return tensors, settings, tokenizer, sentences


PROMPTS = {"multilingual-e5-small": "query: "}  # of models whose cards ask for one that no file names
OLD_POOLING = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}  # sentence-transformers' modes
POOLING = {"mean": "mean", "cls": "first", **OLD_POOLING}  # and those of files written since version 5


def sentence_settings(folder: str) -> tuple[str, dict[str, str]]:
    """The folder of the encoder, and how sentence-transformers makes vectors with it, where modules.json says so:
    "pooling" (of ModelConfig), "prompt", and "modules", in words. Prints what is not converted.
    """
    with reading(f"{folder}/modules.json"):
        modules = read_json(f"{folder}/modules.json", list)
        if not modules:
            return folder, {"pooling": "", "prompt": "", "modules": ""}
        paths = [os.path.normpath(os.path.join(folder, module["path"])) for module in modules]
        kinds = [module["type"].rpartition(".")[2] for module in modules]
    if kinds[0] != "Transformer":
        raise UserError(f"{folder}/modules.json: its first module is a {kinds[0]}, not a Transformer")
    pooling, mode = read_pooling(paths[1]) if kinds[1:] in (["Pooling"], ["Pooling", "Normalize"]) else ("other", "")
    with reading(path := f"{folder}/config_sentence_transformers.json"):
        settings = read_json(path)
        prompts = settings.get("prompts") or {}
        prompt = prompts.get(settings.get("default_prompt_name")) or ""
        length = read_json(f"{paths[0]}/sentence_bert_config.json").get("max_seq_length")
        left_out = [f"max_seq_length {length} (--max-length)"] if length else []
        left_out += [f"prompts {prompts} (--prompt TEXT)"] if any(prompts.values()) and not prompt else []
    left_out += kinds[1:] if pooling == "other" else []
    print(f"sentence-transformers: the encoder is {paths[0]}; not converted: {', '.join(left_out) or 'nothing'}")
    return paths[0], {"pooling": pooling, "prompt": prompt, "modules": ", ".join(filter(None, (*kinds, mode)))}


def read_pooling(folder: str) -> tuple[str, str]:
    """The pooling of ModelConfig, "other" if it is not implemented, and its name in the folder of a Pooling module."""
    with reading(path := f"{folder}/config.json"):
        settings = read_json(path)
        modes = [name for name, on in settings.items() if on is True and name.startswith("pooling_mode_")]
        mode = str(settings.get("pooling_mode") or "+".join(modes) or "without its config.json")
        return (POOLING.get(mode, "other") if settings.get("include_prompt", True) else "other"), mode


# ------------------------------------------------------------------------------------- conversion
CLASSES = {"sequence": "ForSequenceClassification", "token": "ForTokenClassification"}
IDENTITY = "torch.nn.modules.linear.Identity"
CONFIG_NAMES = {"vocab_size": "vocab_size", "hidden_size": "hidden_size", "num_layers": "num_hidden_layers"}
CONFIG_NAMES |= {"num_heads": "num_attention_heads", "ffn_size": "intermediate_size"}  # here -> in config.json
CONFIG_NAMES |= {"type_vocab_size": "type_vocab_size", "pad_id": "pad_token_id", "norm_eps": "layer_norm_eps"}
CONFIG_NAMES |= {"dropout": "hidden_dropout_prob"}


def config_from_json(settings: dict) -> ModelConfig:
    """Hugging Face's config.json -> ModelConfig. Raises UserError for what is not implemented."""
    known = {
        "model_type": ("xlm-roberta", "roberta", "bert"),
        "hidden_act": ("gelu",),
        "position_embedding_type": ("absolute", None),
        "is_decoder": (False, None),  # a decoder attends to earlier tokens only
        "auto_map": (None, {}),  # the model's own code
        "quantization_config": (None, {}),
        "sbert_ce_default_activation_function": (None, IDENTITY),  # of a CrossEncoder's logits
        "activation_fn": (None, IDENTITY),
    }
    with reading("config.json"):
        check_settings("config.json", settings | (settings.get("sentence_transformers") or {}), known)
        bert = settings.get("model_type") == "bert"
        if bert:  # BERT's first files lack these two; Hugging Face assumes the same
            settings = {"pad_token_id": 0, "layer_norm_eps": 1e-12} | settings
        values = {ours: settings.get(theirs) for ours, theirs in CONFIG_NAMES.items()}
        # RoBERTa counts positions from pad_id + 1, in a table that much longer; BERT from 0.
        offset = 0 if bert else values["pad_id"] + 1
        values["max_tokens"] = settings["max_position_embeddings"] - offset
        return check_config(ModelConfig(position_offset=offset, **values))


def convert_tensors(name: str, tensors: dict[str, Tensor], settings: dict, tokenizer: Encoder) -> tuple[Model, list]:
    """Source tensors -> the model that has them as parameters, copied only to be cast to float32; and the names of its
    classes. Raises UserError naming the first tensor that is missing, unexpected, of a wrong shape or not a float.
    """
    preset = PRESETS.get(name)
    config = preset if preset and not settings else config_from_json(settings)
    if config.position_offset == 0 and not tokenizer.typed:  # a BERT with XLM-R's tokenizer, which alone pads
        config = replace(config, pad_id=tokenizer.pad_id)
    if preset not in (None, config):
        raise UserError(f"config.json has another shape than {name}: choose another name for this model")
    if tokenizer.vocab_size > config.vocab_size or tokenizer.pad_id != config.pad_id:
        ids = f"{tokenizer.vocab_size:,} ids, the model {config.vocab_size:,}"
        raise UserError(f"the tokenizer has {ids}; they pad with {tokenizer.pad_id} and {config.pad_id}")

    family = family_of(config)
    tensors = plain_names(tensors, family)
    config = check_config(replace(config, **find_head(tensors, family, settings)))
    table, ours = dict(key_table(config)), {}
    for source, target in table.items():
        tensor = tensors.get(source)
        if tensor is None or not tensor.is_floating_point() or tensor.itemsize < 2:
            raise UserError(f"the source has no tensor {source} in floats of 16 bits or more")
        ours[target] = tensor.float()
    if extra := [key for key in tensors if key not in table and not key.startswith(family.skipped)]:
        raise UserError(f"the source has a tensor with no place in the key table: {extra[0]}")
    tied = tensors.get("lm_head.decoder.weight", tensors[WORDS])  # the two may differ in precision
    if not torch.equal(tied, tensors[WORDS].to(tied.dtype)):
        raise UserError("lm_head.decoder.weight differs from the word embeddings: untied models are not supported")

    model = meta_model(config)
    check_tensors("the source", model.state_dict(), ours)
    model.load_state_dict(ours, assign=True)  # a meta model has no storage to copy into
    names = settings.get("id2label") or {}  # where there are none, LABEL_0, LABEL_1, ... as Hugging Face has it
    return model, [" ".join(str(names.get(str(i), f"LABEL_{i}")).split()) for i in range(config.num_labels)]


def plain_names(tensors: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Tensors by the names of the key table. In a model with a head the encoder's names have a prefix; training libraries
    put one more before all names. BERT files that came from TensorFlow name a norm's weight and bias gamma and beta.
    """
    words = next((key for key in tensors if key.endswith(WORDS)), WORDS)
    outer = words.removesuffix(WORDS).removesuffix(family.prefix)
    renamed = {}
    for key, tensor in tensors.items():
        key = key.removeprefix(outer).removeprefix(family.prefix)
        key = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if key in renamed:
            raise UserError(f"the source has two tensors that mean {key}")
        renamed[key] = tensor
    if "lm_head.decoder.bias" in renamed:  # one tensor, two names
        renamed.setdefault("lm_head.bias", renamed["lm_head.decoder.bias"])
    return renamed


def find_head(tensors: dict[str, Tensor], family: Family, settings: dict) -> dict:
    """The head of the source and its number of classes, which is the rows of its last matrix."""
    pooler = family is BERT and "pooler.dense.weight" in tensors
    last = next((key for key in ("classifier.out_proj.weight", "classifier.weight") if key in tensors), None)
    if last is None:
        mlm = family is ROBERTA and any(key.startswith("lm_head.") for key in tensors)
        return {"head": "pooler" if pooler else "mlm" if mlm else "none", "num_labels": 0}
    # Old files with a token head hold an unused pooler, too.
    pooler = pooler and settings.get("architectures") != ["BertForTokenClassification"]
    head = "sequence" if pooler or last == "classifier.out_proj.weight" else "token"
    count, names = sum(tensors[last].shape[:1]), settings.get("id2label")
    if names and (not isinstance(names, dict) or set(names) != {str(i) for i in range(count)}):
        raise UserError(f"config.json: id2label does not name the {count} classes of the head")
    problem = "regression" if count == 1 else "single_label_classification"
    known = (None, [], *([kind + CLASSES[head]] for kind in ("XLMRoberta", "Roberta", "Bert")))
    check_settings("config.json", settings, {"architectures": known, "problem_type": (None, problem)})
    return {"head": head, "num_labels": count}


# ----------------------------------------------------------------------------------------- export
def export(path: str, folder: str) -> None:
    """A student -> a Hugging Face folder: float32 tensors that lie on the student's grid, config.json, tokenizer. In
    transformers its logits are those of the student with float activations.
    """
    student = read_student(path)
    config, labels = student.config, student.notes.get("labels", "").split("\t")
    tokenizer, classes = tokenizer_of(path, student), CLASSES | {"embedding": "Model"}
    if config.tt or config.head not in classes or isinstance(tokenizer, WordTokenizer):
        raise UserError(f"{path}: transformers has no class for tensor trains, other heads or whole words")
    if os.path.exists(os.path.join(folder, "config.json")):
        raise UserError(f"{folder} holds a model already: name another folder")
    family, ours = family_of(config), fake_quantized(student).state_dict()
    tensors = {}
    for source, target in key_table(config):
        plain = source.startswith("classifier.") or config.head == "embedding"
        tensors[source if plain else family.prefix + source] = ours[target]
    architecture, model_type = ("Bert", "bert") if family is BERT else ("XLMRoberta", "xlm-roberta")
    settings = {
        "architectures": [architecture + classes[config.head]],
        "model_type": model_type,
        **{theirs: getattr(config, our) for our, theirs in CONFIG_NAMES.items()},
        "max_position_embeddings": config.max_tokens + config.position_offset,
        "attention_probs_dropout_prob": config.dropout,
        "hidden_act": "gelu",
    }
    if config.head != "embedding":
        settings |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    if isinstance(tokenizer, WordPieceTokenizer):
        rules = {"tokenizer_class": "BertTokenizer", "do_lower_case": tokenizer.lower}
        name, vocabulary = "vocab.txt", "\n".join(tokenizer.pieces) + "\n"
    else:
        settings |= {"bos_token_id": BOS, "eos_token_id": EOS}
        # Not XLMRobertaTokenizer, nor a sentencepiece.bpe.model: of either transformers makes a unigram tokenizer.
        rules = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
        rules |= {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
        rules |= {"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}
        name, vocabulary = "tokenizer.json", json.dumps(tokenizer_json(tokenizer), ensure_ascii=False)
    rules["model_max_length"] = config.max_tokens
    write_tensors(os.path.join(folder, "model.safetensors"), tensors, format="pt")  # as transformers calls it
    write_json(os.path.join(folder, "tokenizer_config.json"), rules)
    write_text(os.path.join(folder, name), vocabulary)
    if config.head == "embedding":
        export_sentences(folder, config, tokenizer.prompt, student.max_length)
    write_json(os.path.join(folder, "config.json"), settings)  # last: now the folder is a model
    print(f"wrote {folder}: {', '.join(sorted(os.listdir(folder)))}")


def export_sentences(folder: str, config: ModelConfig, prompt: str, max_length: int) -> None:
    """The files by which sentence-transformers makes the student's vectors: pooling, length 1, prompt."""
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    steps = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(paths.items())
    ]
    pooling = config.pooling or "mean"
    modes = {mode: kind == pooling for mode, kind in OLD_POOLING.items()}
    files = {
        "1_Pooling/config.json": {"word_embedding_dimension": config.hidden_size, **modes},
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {"default": prompt}, "default_prompt_name": "default"},
    }
    for name, content in files.items():
        write_json(os.path.join(folder, *name.split("/")), content)
    write_text(os.path.join(folder, "modules.json"), json.dumps(steps, indent=1) + "\n")


# ------------------------------------------------------------------------------- the command line
@exit_status("; run the same command again to continue")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help=f"{', '.join(sorted(MODELS))}; with --from also any name of your own")
    parser.add_argument(
        "--from",
        dest="folder",
        metavar="DIR",
        help="a local Hugging Face folder; default: download (HF_ENDPOINT: a mirror)",
    )
    parser.add_argument("--out", metavar="FILE", help="default: weights/NAME.safetensors")
    parser.add_argument("--prompt", metavar="TEXT", help="of a sentence encoder: put before every text, as 'query: '")
    parser.add_argument("--export", nargs=2, metavar=("STUDENT", "DIR"), help="write a student as a folder instead")
    args = parser.parse_args(argv)
    if bool(args.export) == bool(args.name) or (args.export and args.prompt is not None):
        parser.error("give the name of a model, or --export STUDENT DIR alone")
    if args.export:
        return export(*args.export)
    name, folder = args.name, args.folder
    if not re.fullmatch(r"(?!scratch)[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"{name!r} is no name for a model: use letters, digits, '.', '_' and '-', and not scratch")
    out = args.out or os.path.join(WEIGHTS_DIR, f"{name}.safetensors")
    if folder is None:
        if name not in MODELS:
            raise UserError(f"no download is known for {name!r}, only {' '.join(sorted(MODELS))}: add --from DIR")
        folder = os.path.join(os.path.dirname(os.path.abspath(out)), "downloads", name)
        fetch_model(name, folder)
    tensors, settings, tokenizer, sentences = read_folder(folder)
    model, labels = convert_tensors(name, tensors, settings, tokenizer)
    model.config = replace(model.config, pooling=sentences["pooling"])
    notes = {"name": name, "labels": "\t".join(labels), "modules": sentences["modules"]}
    tokenizer.set_prompt(args.prompt if args.prompt is not None else sentences["prompt"] or PROMPTS.get(name, ""))
    notes["prompt"] = tokenizer.prompt
    size = save_model(out, model, tokenizer.bytes, notes)
    count = sum(tensor.numel() for tensor in model.state_dict().values())
    classes = f" ({', '.join(labels)})" if labels else ""
    print(f"wrote {out}: {model.config.head} head{classes}, {count:,} parameters, {size / 1e6:,.1f} MB")
    if notes["prompt"]:
        print(f"as a sentence encoder it puts {notes['prompt']!r} before every text")
    made, pools = os.path.join(".", args.out) if args.out else name, model.config.pooling in ("mean", "first")
    print(f"next: python train.py --task {'embed' if pools else 'rte' if tokenizer.typed else 'xnli'} --model {made}")


if __name__ == "__main__":
    sys.exit(main())

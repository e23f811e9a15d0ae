"""Writes tests/golden, tests/golden_bert and tests/golden_folder: tiny models by Hugging Face transformers, and what they
compute.

    pip install transformers safetensors protobuf
    python tests/make_golden.py

The committed files were made with the versions recorded in each provenance.json. Weights are random, and biases and
norms are moved off their trivial initialization, so that swapped tensors are noticed. expected.npz holds ids, mask,
hidden states, logits and the like, tokens.json what the tokenizer gives.

golden: an XLM-R in the layouts of published checkpoints: `st` (safetensors, float32, MLM head), `bin` (pytorch_model.bin,
the same with layers in fp16 as in InfoXLM's file) and `seq` (a classification head). tokens.json: [first text, second
text, max length, ids] for the sentences of tests/sample, whole and truncated.

golden_bert: a BertForSequenceClassification. expected.npz has also the pooler's output, and the logits of the classifier
behind the pooler (sequence_logits) and, the same matrix, on every token (token_logits). tokens.json: [lower, first text,
second text, max length, ids, token types] of BertTokenizer with vocab.txt, which is made here from tests/sample's
sentences: their characters, but for every ninth, and pieces of their words.

golden_folder: a folder as transformers 5 writes it, a BertForSequenceClassification with XLM-R's kind of tokenizer (as
multilingual MiniLM and e5): the tokenizer is in tokenizer.json alone, the weights are in shards with an index, the table
has more rows than there are ids, pad_token_id is BERT's, and the three classes are in another order than XNLI's.
tokens.json as in golden. wordpiece.json is the tokenizer.json of golden_bert's vocab.txt.
"""

import io
import json
import os
import shutil
import tempfile
from collections import Counter

import numpy as np
import sentencepiece
import tokenizers
import torch
import transformers
from make_sample import SCENES
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaForSequenceClassification,
    XLMRobertaTokenizer,
)

HERE = os.path.dirname(os.path.abspath(__file__))
MODEL_FILE = os.path.join(HERE, "sample", "sentencepiece.bpe.model")
TEXTS = [texts for _, *texts in SCENES]
SPECIALS = ("[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused1]")
RULES = ["41\t61", "1E9E\t73 73", "FF21\t41", "65 0301\tE9"]  # characters in hexadecimal, and those that XLM-R too
RULES += [f"{space}\t20" for space in ("9", "A", "D", "2028", "A0", "3000", "85")]  # takes for spaces
LABELS = ["contradiction", "entailment", "neutral"]
SMALL = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, max_position_embeddings=32
)
ODD = [
    ("", ""),
    ("The girl", ""),
    ("  two  spaces\tand a tab\r\nlines\u2028end", "no\u00a0break\u3000wide"),
    ("don't... stop! $5 + 3^2 = <14> `x|y~` {a_b} #tag @me", "“quotes” – dash… ¿qué? 。！"),
    ("The [SEP] man [MASK][CLS]reads[UNK]. [sep] [ SEP ] [PAD]", "girl[SEP]"),
    ("Él leyó a naïve café; e\u0301 o\u0302\u0323 ñ Å", "İstanbul Iğdır ılık TİTİZ"),
    ("ΟΔΟΣ Το ΚΟΡΊΤΣΙ Σ", "МУЖЧИНА Ёлка й"),
    ("zero\u200bwidth\u200djoin\ufeff soft\u00adhyphen", "nul\x00 bell\x07 c1\x85 bad\ufffd \ue000"),
    ("女孩read在。\U00020000\U0002b820a\U0002b920b\uf900", "カタカナ ｶﾞ 한국어 각"),
    ("emoji 🙂🧑‍🚀👍🏽 flags 🇩🇪", "ﬁ ＡＢＣ ① ½ ẞ K"),
    ("a" * 100 + " " + "a" * 101 + " the", "e\u0301" * 100),
    ("ไม่อ่านหนังสือ", "नहीं पढ़ती"),
    ("unassigned \u0378x", "##a ## a##b"),
]


def moved_off_zero(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(5.0)  # std 0.1: attention that is not uniform
    model.set_attn_implementation("eager")  # the only one that returns attention maps
    return model.eval()


def write(folder: str, expected: dict, cases: list, libraries: tuple, **options) -> None:
    """The three files beside a model.  options: of json.dump."""
    arrays = {name: tensor.numpy() for name, tensor in expected.items()}
    np.savez_compressed(os.path.join(folder, "expected.npz"), **arrays)
    with open(os.path.join(folder, "tokens.json"), "w", encoding="utf-8") as file:
        json.dump(cases, file, **options)
    versions = {library.__name__: library.__version__ for library in libraries}
    with open(os.path.join(folder, "provenance.json"), "w", encoding="utf-8") as file:
        json.dump({"made by": "tests/make_golden.py", **versions}, file, indent=1)


def make_roberta(folder: str) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_file=MODEL_FILE).get_piece_size()
    config = XLMRobertaConfig(
        vocab_size=pieces + 2, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=66, type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1, bos_token_id=0,
        eos_token_id=2, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    mlm = moved_off_zero(XLMRobertaForMaskedLM(config))
    seq = moved_off_zero(XLMRobertaForSequenceClassification(config))
    for name, model in (("st", mlm), ("seq", seq)):
        model.save_pretrained(os.path.join(folder, name))
    os.makedirs(os.path.join(folder, "bin"))
    mixed = {k: v.half() if "encoder.layer" in k else v for k, v in mlm.state_dict().items()}
    torch.save(mixed, os.path.join(folder, "bin", "pytorch_model.bin"))
    shutil.copy(os.path.join(folder, "st", "config.json"), os.path.join(folder, "bin"))
    half = moved_off_zero(XLMRobertaForMaskedLM(config))
    half.load_state_dict({k: v.float() for k, v in mixed.items()})

    lengths = torch.tensor([24, 17, 3])
    mask = torch.arange(24) < lengths[:, None]
    ids = torch.randint(4, pieces, (3, 24)).masked_fill(~mask, 1)
    ids[:, 0] = 0
    expected = {"ids": ids, "mask": mask}
    with torch.no_grad():
        for name, model in (("st", mlm), ("bin", half), ("seq", seq)):
            out = model(ids, attention_mask=mask.long(), output_hidden_states=True, output_attentions=True)
            expected[name + "_hidden"] = torch.stack(out.hidden_states)
            expected[name + "_logits"] = out.logits
            expected[name + "_map"] = torch.stack(out.attentions)

    with tempfile.TemporaryDirectory() as source:
        shutil.copy(MODEL_FILE, source)
        shutil.copy(os.path.join(folder, "st", "config.json"), source)
        tokenizer = XLMRobertaTokenizer.from_pretrained(source)
    cases = []
    for first, second, *_ in [*TEXTS, ("  two  spaces ", "ﬁ ＡＢＣ ①", "tab\there", "emoji 🙂 unknown ꙮ")]:
        for length in (64, 12, 11):
            options = dict(truncation="longest_first", max_length=length)
            cases.append([first, second, length, tokenizer(first, second, **options)["input_ids"]])
            cases.append([second, None, length, tokenizer(second, **options)["input_ids"]])
    write(folder, expected, cases, (torch, transformers, sentencepiece, np), ensure_ascii=False)


def vocabulary(texts: list[str]) -> list[str]:
    """Characters and pieces of the texts, both as they are and lower without accents."""
    normal = tokenizers.normalizers.BertNormalizer(lowercase=True)
    split = tokenizers.pre_tokenizers.BertPreTokenizer()
    counts = Counter()
    for text in texts:
        for form in (text, normal.normalize_str(text)):
            counts.update(word for word, _ in split.pre_tokenize_str(form))
    characters = sorted({char for word in counts for char in word} | set("a´"))
    kept = [char for i, char in enumerate(characters) if i % 9]
    frequent = sorted(word for word, count in counts.items() if count > 2 and len(word) > 1)
    starts = {word[:3] for word in counts if len(word) > 5}
    ends = {"##" + word[-3:] for word in counts if len(word) > 5}
    pieces = [*kept, *("##" + char for char in kept), *frequent, *sorted(starts), *sorted(ends)]
    return list(dict.fromkeys([*SPECIALS, *pieces]))


def make_bert(folder: str) -> None:
    pieces = vocabulary([text for texts in TEXTS for text in texts])
    with open(os.path.join(folder, "vocab.txt"), "w", encoding="utf-8", newline="\n") as file:
        file.write("".join(piece + "\n" for piece in pieces))
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as file:
        json.dump({"do_lower_case": True, "tokenizer_class": "BertTokenizer"}, file)

    cases = []
    for lower in (True, False):
        tokenizer = BertTokenizer(os.path.join(folder, "vocab.txt"), do_lower_case=lower)
        for first, second, *_ in [*TEXTS, *ODD]:
            for b in (second, None):
                for length in (64, 12, 11):
                    # As lists: of a single pair it drops an empty second text.
                    pair = ([first], None if b is None else [b])
                    got = tokenizer(*pair, truncation=True, max_length=length)
                    ids, types = got["input_ids"][0], got["token_type_ids"][0]
                    cases.append([lower, first, b, length, ids, types])

    torch.manual_seed(0)
    model = moved_off_zero(BertForSequenceClassification(BertConfig(vocab_size=len(pieces), num_labels=3, **SMALL)))
    model.save_pretrained(folder)
    mask = torch.arange(20) < torch.tensor([20, 13, 4])[:, None]
    types = (torch.arange(20) >= torch.tensor([9, 13, 2])[:, None]) & mask
    ids = torch.randint(len(SPECIALS), len(pieces), mask.shape).masked_fill(~mask, 0)
    with torch.no_grad():
        inputs = dict(attention_mask=mask.long(), token_type_ids=types.long())
        out = model.bert(ids, output_hidden_states=True, **inputs)
        logits = model(ids, **inputs).logits
    expected = {
        "ids": ids,
        "mask": mask,
        "types": types.long(),
        "hidden": torch.stack(out.hidden_states),
        "pooler": out.pooler_output,
        "sequence_logits": logits,
        "token_logits": model.classifier(out.last_hidden_state).detach(),
    }
    libraries = (torch, transformers, tokenizers, np)
    write(folder, expected, cases, libraries, separators=(",", ":"))  # ASCII: it holds odd characters


def make_folder(folder: str) -> None:
    with tempfile.TemporaryDirectory() as source:
        rules, model = os.path.join(source, "rules.tsv"), io.BytesIO()
        with open(rules, "w", encoding="utf-8") as file:
            file.write("".join(f"{rule}\n" for rule in RULES))
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text for texts in TEXTS for text in texts]),
            model_writer=model,
            vocab_size=400,
            hard_vocab_limit=False,
            normalization_rule_tsv=rules,
            minloglevel=1,
        )
        with open(os.path.join(source, "sentencepiece.bpe.model"), "wb") as file:
            file.write(model.getvalue())
        tokenizer = XLMRobertaTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(folder)
    wordpiece = BertTokenizer(os.path.join(HERE, "golden_bert", "vocab.txt"), do_lower_case=True)
    wordpiece.backend_tokenizer.save(os.path.join(folder, "wordpiece.json"))

    cases = []
    for first, second, *_ in [*TEXTS[::4], *ODD]:
        for b in (second, None):
            pair = ([first], None if b is None else [b])
            cases.append([first, b, 12, tokenizer(*pair, truncation=True, max_length=12)["input_ids"][0]])
            cases.append([first, b, 999, tokenizer(*pair)["input_ids"][0]])

    rows = -(-len(tokenizer) // 8) * 8 + 8
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    torch.manual_seed(0)
    model = moved_off_zero(BertForSequenceClassification(BertConfig(vocab_size=rows, **SMALL, **names)))
    model.save_pretrained(folder, max_shard_size="12KB")
    first, second = ([texts[k] for texts in TEXTS[:8]] for k in (0, 1))
    inputs = tokenizer(first, second, padding=True, truncation=True, max_length=32, return_tensors="pt")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        out = model(ids, mask, output_hidden_states=True)
    expected = {"ids": ids, "mask": mask.bool(), "hidden": torch.stack(out.hidden_states), "logits": out.logits}
    libraries = (torch, transformers, tokenizers, sentencepiece, np)
    write(folder, expected, cases, libraries, separators=(",", ":"))


if __name__ == "__main__":
    for name, make in {"golden": make_roberta, "golden_bert": make_bert, "golden_folder": make_folder}.items():
        folder = os.path.join(HERE, name)
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        make(folder)

"""Writes tests/golden_bert: a tiny BERT by Hugging Face transformers, its vocabulary, and what both
compute.

    pip install transformers safetensors
    python tests/make_golden_bert.py

The committed files were made with the versions recorded in golden_bert/provenance.json. The folder
is one that convert.py takes: a BertForSequenceClassification with random weights, biases and norms
moved off their trivial initialization. expected.npz holds ids, mask, token types, hidden states, the
pooler's output, and the logits of the classifier behind the pooler (sequence_logits) and, the same
matrix, on every token (token_logits). tokens.json holds [lower, first text, second text, max length,
ids, token types] of Hugging Face's BertTokenizer with vocab.txt, which is made here from tests/sample's
sentences: their characters, but for every ninth, and pieces of their words.
"""

import json
import os
import shutil
from collections import Counter

import numpy as np
import tokenizers
import torch
import transformers
from make_golden import moved_off_zero
from make_sample import SENTENCES
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
GOLDEN = os.path.join(HERE, "golden_bert")
SPECIALS = ("[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused1]")
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


def main() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    os.makedirs(GOLDEN)
    scenes = [scene for scenes in SENTENCES.values() for scene in scenes]
    pieces = vocabulary([text for scene in scenes for text in scene])
    with open(os.path.join(GOLDEN, "vocab.txt"), "w", encoding="utf-8", newline="\n") as file:
        file.write("".join(piece + "\n" for piece in pieces))
    with open(os.path.join(GOLDEN, "tokenizer_config.json"), "w", encoding="utf-8") as file:
        json.dump({"do_lower_case": True, "tokenizer_class": "BertTokenizer"}, file)

    cases = []
    for lower in (True, False):
        tokenizer = BertTokenizer(os.path.join(GOLDEN, "vocab.txt"), do_lower_case=lower)
        for first, second, *_ in [*scenes, *ODD]:
            for b in (second, None):
                for length in (64, 12, 11):
                    # As lists: of a single pair it drops an empty second text.
                    pair = ([first], None if b is None else [b])
                    got = tokenizer(*pair, truncation=True, max_length=length)
                    ids, types = got["input_ids"][0], got["token_type_ids"][0]
                    cases.append([lower, first, b, length, ids, types])
    with open(os.path.join(GOLDEN, "tokens.json"), "w", encoding="utf-8") as file:
        json.dump(cases, file, separators=(",", ":"))  # ASCII: it holds odd characters

    config = BertConfig(
        vocab_size=len(pieces), hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=32, max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = moved_off_zero(BertForSequenceClassification(config))
    model.save_pretrained(GOLDEN)
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
    arrays = {name: tensor.numpy() for name, tensor in expected.items()}
    np.savez_compressed(os.path.join(GOLDEN, "expected.npz"), **arrays)
    versions = {m.__name__: m.__version__ for m in (torch, transformers, tokenizers, np)}
    with open(os.path.join(GOLDEN, "provenance.json"), "w", encoding="utf-8") as file:
        json.dump({"made by": "tests/make_golden_bert.py", **versions}, file, indent=1)


if __name__ == "__main__":
    main()

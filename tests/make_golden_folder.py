"""Writes tests/golden_folder: a folder as Hugging Face transformers 5 writes it, and what it computes.

    pip install transformers safetensors
    python tests/make_golden_folder.py

The committed files were made with the versions recorded in provenance.json. A BertForSequenceClassification with
XLM-R's kind of tokenizer (as multilingual MiniLM and e5), with random weights: the tokenizer is in tokenizer.json alone,
the weights are in shards with an index, the table has more rows than there are ids, pad_token_id is BERT's, and the
three classes are in another order than XNLI's. expected.npz holds ids, mask, hidden states and logits; tokens.json
[first text, second text, max length, ids] of the tokenizer. wordpiece.json is the tokenizer.json of golden_bert's vocab.txt.
"""

import io
import json
import os
import shutil
import tempfile

import numpy as np
import sentencepiece
import tokenizers
import torch
import transformers
from make_golden import moved_off_zero
from make_golden_bert import ODD
from make_sample import SENTENCES
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, XLMRobertaTokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
GOLDEN = os.path.join(HERE, "golden_folder")
RULES = ["41\t61", "1E9E\t73 73", "FF21\t41", "65 0301\tE9"]  # characters in hexadecimal, and those that XLM-R too
RULES += [f"{space}\t20" for space in ("9", "A", "D", "2028", "A0", "3000", "85")]  # takes for spaces
LABELS = ["contradiction", "entailment", "neutral"]


def main() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    os.makedirs(GOLDEN)
    scenes = [scene for scenes in SENTENCES.values() for scene in scenes]
    with tempfile.TemporaryDirectory() as folder:
        rules = os.path.join(folder, "rules.tsv")
        with open(rules, "w", encoding="utf-8") as file:
            file.write("".join(f"{rule}\n" for rule in RULES))
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text for scene in scenes for text in scene]),
            model_writer=model,
            vocab_size=400,
            hard_vocab_limit=False,
            normalization_rule_tsv=rules,
            minloglevel=1,
        )
        path = os.path.join(folder, "sentencepiece.bpe.model")
        with open(path, "wb") as file:
            file.write(model.getvalue())
        tokenizer = XLMRobertaTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(GOLDEN)
    wordpiece = BertTokenizer(os.path.join(HERE, "golden_bert", "vocab.txt"), do_lower_case=True)
    wordpiece.backend_tokenizer.save(os.path.join(GOLDEN, "wordpiece.json"))

    cases = []
    for first, second, *_ in [*scenes[::4], *ODD]:
        for b in (second, None):
            pair = ([first], None if b is None else [b])
            cases.append([first, b, 12, tokenizer(*pair, truncation=True, max_length=12)["input_ids"][0]])
            cases.append([first, b, 999, tokenizer(*pair)["input_ids"][0]])
    with open(os.path.join(GOLDEN, "tokens.json"), "w", encoding="utf-8") as file:
        json.dump(cases, file, separators=(",", ":"))

    rows = -(-len(tokenizer) // 8) * 8 + 8
    config = BertConfig(
        vocab_size=rows, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=32, id2label=dict(enumerate(LABELS)), label2id={n: i for i, n in enumerate(LABELS)},
    )  # fmt: skip
    torch.manual_seed(0)
    model = moved_off_zero(BertForSequenceClassification(config))
    model.save_pretrained(GOLDEN, max_shard_size="12KB")
    texts = [scene[:2] for scene in scenes[:8]]
    inputs = tokenizer(
        *map(list, zip(*texts, strict=True)), padding=True, truncation=True, max_length=32, return_tensors="pt"
    )
    with torch.no_grad():
        out = model(inputs["input_ids"], inputs["attention_mask"], output_hidden_states=True)
    arrays = {
        "ids": inputs["input_ids"].numpy(),
        "mask": inputs["attention_mask"].numpy().astype(bool),
        "hidden": torch.stack(out.hidden_states).numpy(),
        "logits": out.logits.numpy(),
    }
    np.savez_compressed(os.path.join(GOLDEN, "expected.npz"), **arrays)
    versions = {m.__name__: m.__version__ for m in (torch, transformers, tokenizers, sentencepiece, np)}
    with open(os.path.join(GOLDEN, "provenance.json"), "w", encoding="utf-8") as file:
        json.dump({"made by": "tests/make_golden_folder.py", **versions}, file, indent=1)


if __name__ == "__main__":
    main()

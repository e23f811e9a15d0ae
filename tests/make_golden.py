"""Writes tests/golden: a tiny XLM-R by Hugging Face transformers, and what it computes.

    pip install transformers safetensors protobuf
    python tests/make_golden.py

The committed files were made with the versions recorded in golden/provenance.json. Weights are
random, and biases and norms are moved off their trivial initialization, so that swapped tensors are
noticed. Two folders hold the same model in the layouts of published checkpoints: `st` (safetensors,
float32, MLM head) and `bin` (pytorch_model.bin, layers in fp16 and the rest in fp32 as in InfoXLM's
file, MLM head). `seq` has a classification head. expected.npz holds ids, mask, hidden states and logits; tokens.json the
ids of Hugging Face's tokenizer for the sentences of tests/sample, whole and truncated.
"""

import json
import os
import shutil

import numpy as np
import sentencepiece
import torch
import transformers
from make_sample import SENTENCES
from transformers import (
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaForSequenceClassification,
    XLMRobertaTokenizer,
)

HERE = os.path.dirname(os.path.abspath(__file__))
GOLDEN = os.path.join(HERE, "golden")
MODEL_FILE = os.path.join(HERE, "sample", "sentencepiece.bpe.model")


def moved_off_zero(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(5.0)  # std 0.1: attention that is not uniform
    model.set_attn_implementation("eager")  # the only one that returns attention maps
    return model.eval()


def main() -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_file=MODEL_FILE).get_piece_size()
    config = XLMRobertaConfig(
        vocab_size=pieces + 2, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=66, type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1, bos_token_id=0,
        eos_token_id=2, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    mlm = moved_off_zero(XLMRobertaForMaskedLM(config))
    seq = moved_off_zero(XLMRobertaForSequenceClassification(config))
    shutil.rmtree(GOLDEN, ignore_errors=True)
    for name, model in (("st", mlm), ("seq", seq)):
        model.save_pretrained(os.path.join(GOLDEN, name))
    os.makedirs(os.path.join(GOLDEN, "bin"))
    mixed = {k: v.half() if "encoder.layer" in k else v for k, v in mlm.state_dict().items()}
    torch.save(mixed, os.path.join(GOLDEN, "bin", "pytorch_model.bin"))
    shutil.copy(os.path.join(GOLDEN, "st", "config.json"), os.path.join(GOLDEN, "bin"))
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
    arrays = {k: t.numpy() for k, t in expected.items()}
    np.savez_compressed(os.path.join(GOLDEN, "expected.npz"), **arrays)

    shutil.copy(MODEL_FILE, os.path.join(GOLDEN, "st"))
    tokenizer = XLMRobertaTokenizer.from_pretrained(os.path.join(GOLDEN, "st"))
    os.unlink(os.path.join(GOLDEN, "st", "sentencepiece.bpe.model"))
    cases = []
    texts = [scene for scenes in SENTENCES.values() for scene in scenes]
    texts += [("  two  spaces ", "ﬁ ＡＢＣ ①", "tab\there", "emoji 🙂 unknown ꙮ")]
    for first, second, *_ in texts:
        for length in (64, 12, 11):
            options = dict(truncation="longest_first", max_length=length)
            cases.append([first, second, length, tokenizer(first, second, **options)["input_ids"]])
            cases.append([second, None, length, tokenizer(second, **options)["input_ids"]])
    with open(os.path.join(GOLDEN, "tokens.json"), "w", encoding="utf-8") as file:
        json.dump(cases, file, ensure_ascii=False)
    versions = {m.__name__: m.__version__ for m in (torch, transformers, sentencepiece, np)}
    with open(os.path.join(GOLDEN, "provenance.json"), "w", encoding="utf-8") as file:
        json.dump({"made by": "tests/make_golden.py", **versions}, file, indent=1)


if __name__ == "__main__":
    main()

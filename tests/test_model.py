"""model.py: parity with Hugging Face (tests/golden), taps, padding and heads."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import DEVICES, GOLDEN, TOKENIZER, random_ids

import convert
from checkpoint import load_model, meta_model
from model import PRESETS, TAPS, Model, build_model, initialize, set_dropout, with_head
from tt import TTConfig


@pytest.fixture(scope="module")
def expected():
    with np.load(os.path.join(GOLDEN, "expected.npz")) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The three golden folders, each with the tokenizer, converted: name -> path of the .pt."""
    folder, paths = tmp_path_factory.mktemp("golden"), {}
    for name in ("st", "bin", "seq"):
        shutil.copytree(os.path.join(GOLDEN, name), folder / name)
        shutil.copy(TOKENIZER, folder / name)
        paths[name] = str(folder / f"{name}.pt")
        command = [f"golden-{name}", "--from", str(folder / name), "--out", paths[name]]
        assert convert.main(command) == 0
    return paths


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("explicit", [False, True], ids=["fused", "explicit"])
@pytest.mark.parametrize("name", ["st", "bin", "seq"])
def test_equals_hugging_face(name, explicit, device, expected, converted):
    model = load_model(converted[name]).to(device)
    ids, mask = expected["ids"].to(device), expected["mask"].to(device)
    with torch.no_grad():
        logits, taps = model(ids, mask, ("hidden", "map") if explicit else ("hidden",))
    hidden = torch.stack(taps["hidden"]).cpu()
    real = expected["mask"]
    assert hidden.shape == expected[name + "_hidden"].shape
    assert (hidden - expected[name + "_hidden"])[:, real].abs().max() < 1e-5
    difference = logits.cpu() - expected[name + "_logits"]
    assert (difference if name == "seq" else difference[real]).abs().max() < 1e-5
    if explicit:
        maps = torch.stack(taps["map"]).cpu().transpose(2, 3)  # (L, B, T query, H, T key)
        reference = expected[name + "_map"].transpose(2, 3)
        assert (maps - reference)[:, real].abs().max() < 1e-5


def test_mixed_precision_source_differs(expected):
    """The golden test of the .bin would prove nothing if its fp16 layers gave the hidden states of
    the float32 model.
    """
    assert (expected["st_hidden"] - expected["bin_hidden"]).abs().max() > 1e-4


def test_taps_are_consistent(tiny_config):
    model = build_model(tiny_config).eval()
    ids, mask = random_ids([9, 4], tiny_config.vocab_size)
    logits, taps = model(ids, mask, TAPS)
    plain, nothing = model(ids, mask)
    assert nothing == {}
    torch.testing.assert_close(logits, plain, atol=1e-5, rtol=1e-5)
    B, T, C, H, L = 2, 9, 32, 4, 2
    per_head, of_pairs, of_tokens = (B, H, T, C // H), (B, H, T, T), (B, T, C)
    shapes = dict.fromkeys(("query", "key", "value", "context"), per_head)
    shapes |= dict.fromkeys(("score", "map"), of_pairs)
    shapes |= dict.fromkeys(("output", "residual", "normed", "hidden"), of_tokens)
    assert set(shapes) == set(TAPS)
    for name, shape in shapes.items():
        assert len(taps[name]) == L + (name == "hidden")
        assert all(tap.shape == shape for tap in taps[name])
    torch.testing.assert_close(taps["map"][0], taps["score"][0].softmax(-1))
    assert (taps["map"][0][1, :, :, 4:] == 0).all()  # nothing attends to padding
    query, key = taps["query"][0], taps["key"][0]
    score = (query @ key.transpose(-2, -1) / (C // H) ** 0.5)[0]  # the first sequence has no padding
    torch.testing.assert_close(taps["score"][0][0], score)
    torch.testing.assert_close(taps["context"][0], taps["map"][0] @ taps["value"][0])
    residual = taps["hidden"][0] + taps["output"][0]
    torch.testing.assert_close(taps["residual"][0], residual)
    torch.testing.assert_close(taps["normed"][0], model.encoder.layers[0].attention.norm(residual))
    _, fused = model(ids, mask, ("context",))
    for a, b in zip(fused["context"], taps["context"], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_padding_does_not_change_real_tokens(tiny_config):
    model = build_model(tiny_config).eval()
    ids, _ = random_ids([6], tiny_config.vocab_size)
    alone, _ = model(ids)
    padded = torch.cat([ids, torch.ones(1, 5, dtype=torch.long)], dim=1)
    with_padding, _ = model(padded, torch.arange(11)[None] < 6)
    torch.testing.assert_close(alone, with_padding, atol=1e-6, rtol=1e-5)


def test_word_gradient_is_sparse_and_correct(tiny_config):
    model = build_model(tiny_config).eval()
    ids = torch.tensor([[0, 7, 7, 9, 2]])
    model(ids)[0].square().sum().backward()
    weight = model.encoder.embeddings.word.weight
    sparse = weight.grad.coalesce()
    assert sparse.indices()[0].tolist() == [0, 2, 7, 9]
    weight.grad = None
    model.encoder.embeddings.word.sparse = False
    model(ids)[0].square().sum().backward()
    torch.testing.assert_close(sparse.to_dense(), weight.grad)


def test_too_many_tokens_and_unknown_taps(tiny_config):
    model = build_model(tiny_config)
    with pytest.raises(ValueError, match="65 tokens, but this model has 64 positions"):
        model(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="unknown taps"):
        model(torch.zeros(1, 5, dtype=torch.long), capture=("values",))


def test_presets_have_the_published_sizes():
    def parameters(name):
        with torch.device("meta"):
            return sum(p.numel() for p in Model(PRESETS[name]).parameters())

    assert parameters("xlmr-base") == 278_295_186  # XLMRobertaForMaskedLM of Hugging Face
    assert parameters("xlmr-large") == 560_142_482
    assert PRESETS["infoxlm-base"] == PRESETS["xlmr-base"]


def test_with_head_shares_the_encoder(tiny_config):
    base = build_model(replace(tiny_config, head="mlm", num_labels=0))
    assert not base.encoder.embeddings.word.sparse
    new = with_head(base, "sequence", 3)
    assert new.encoder is base.encoder and new.config.num_labels == 3
    assert new.encoder.embeddings.word.sparse
    assert new(torch.zeros(2, 4, dtype=torch.long))[0].shape == (2, 3)


# ---------------------------------------------------------------------------------- BERT's pooler
@pytest.fixture
def pooled(tiny_config):
    """A model like BERT with a pooler."""
    values = {"position_offset": 0, "type_vocab_size": 2, "pad_id": 0, "num_labels": 0}
    model = build_model(replace(tiny_config, head="pooler", **values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)  # so that biases are not 0
    return model.eval()


def test_pooler_in_float64(pooled, tiny_config):
    ids, mask = random_ids([9, 5], tiny_config.vocab_size)
    types = torch.randint(0, 2, ids.shape)
    found, taps = pooled(ids, mask, ("hidden",), types=types)
    first = taps["hidden"][-1][:, 0].detach().double()
    dense = pooled.head.dense
    assert set(pooled.head.state_dict()) == {"dense.weight", "dense.bias"}
    expected = torch.tanh(first @ dense.weight.double().t() + dense.bias.double())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    assert found.shape == (2, 32) and not torch.equal(found, pooled(ids, mask)[0])


def test_no_head_gives_the_hidden_states(tiny_config):
    model = build_model(replace(tiny_config, head="none", num_labels=0)).eval()
    found, taps = model(*random_ids([9, 5], tiny_config.vocab_size), ("hidden",))
    assert torch.equal(found, taps["hidden"][-1])


def test_sequence_head_starts_from_the_pooler(pooled, tiny_config):
    model = with_head(pooled, "sequence", 3).eval()
    assert (model.config.head, model.config.num_labels) == ("sequence", 3)
    assert model.encoder is pooled.encoder
    for name in ("weight", "bias"):
        found, original = getattr(model.head.dense, name), getattr(pooled.head.dense, name)
        assert torch.equal(found, original) and found.any() and found.data_ptr() != original.data_ptr()
    ids, mask = random_ids([9, 5], tiny_config.vocab_size)
    torch.testing.assert_close(model(ids, mask)[0], model.head.out_proj(pooled(ids, mask)[0]))


def test_other_heads_have_random_weights(pooled, tiny_config):
    mlm = build_model(replace(tiny_config, head="mlm", num_labels=0))
    joint = with_head(pooled, "joint", 3, 5).head
    for dense in (with_head(mlm, "sequence", 3).head.dense, joint.dense, joint.intent.dense):
        assert not dense.bias.any() and 0.018 < dense.weight.std() < 0.022


# ------------------------------------------------------------------------------------------- taps
@pytest.mark.parametrize("trains", [None, TTConfig(4, 5, table_modes=4, keep=())], ids=["dense", "trains"])
def test_lowest_layers_give_the_taps_of_the_whole_model(trains, tiny_config):
    shape = replace(tiny_config, head="joint", num_slots=5, num_layers=3, tt=trains)
    model = initialize(meta_model(shape))
    set_dropout(model, 0.0)
    ids, mask = random_ids([9, 5], 442)
    logits, full = model(ids, mask, TAPS)
    assert logits[0].shape == (2, 3) and logits[1].shape == (2, 9, 5)
    for depth in range(4):
        nothing, taps = model(ids, mask, TAPS, depth=depth)
        assert nothing is None
        for name in TAPS:
            assert len(taps[name]) == depth + (name == "hidden")
            for found, expected in zip(taps[name], full[name], strict=False):
                assert torch.equal(found, expected)

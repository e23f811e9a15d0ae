"""Tensor trains in a model: what is replaced, and checkpoints of it (tt.py, checkpoint.py)."""

from dataclasses import replace

import pytest
import torch
from conftest import random_ids
from test_tt import dense, numbers, relative
from torch import nn

from checkpoint import checkpoint_payload, load_checkpoint, save_atomically
from data import UserError
from model import TAPS, build_model, set_dropout, with_head
from tt import (
    TensorTrain,
    TTConfig,
    TTLinear,
    TTMEmbedding,
    clip_ranks,
    count_parameters,
    factorize,
    pad_factors,
    tensorize,
)

TRAINS = TTConfig(rank=4, embedding_rank=5, table_modes=4, keep=())


@pytest.fixture
def joint_config(tiny_config):
    return replace(tiny_config, head="joint", num_slots=5)


def trains_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, TensorTrain)}


def size_as_train(name, module, config):
    """Numbers of a Linear layer or table as a tensor train, from its shape alone."""
    if isinstance(module, nn.Linear):
        out, n = (factorize(size, config.modes) for size in module.weight.shape)
        modes, bias, rank = (*out[::-1], *n), module.out_features, config.rank
    else:
        rows = pad_factors(module.num_embeddings, config.table_modes)
        columns = factorize(module.embedding_dim, config.table_modes)
        modes, bias = [n * m for n, m in zip(rows, columns, strict=True)], 0
        rank = config.embedding_rank if name.endswith("word") else config.rank
    return count_parameters(modes, clip_ranks(modes, rank)) + bias


@pytest.mark.parametrize(
    "config",
    [
        TRAINS,
        TTConfig(1, 1, 3, 4, ()),
        TTConfig(7, 12, 2, 3, ()),
        TTConfig(4, 99, 3, 2, ()),
        TTConfig(99, 4, 3, 4, ()),
    ],
    ids=str,
)
def test_replaced_where_it_saves_numbers_and_only_there(config, joint_config):
    model = build_model(joint_config)
    before = dict(model.named_modules())
    report = tensorize(model, config)
    after = dict(model.named_modules())
    expected = {}
    for name, module in before.items():
        table = isinstance(module, nn.Embedding) and not name.endswith("token_type")
        if isinstance(module, nn.Linear) or table:
            size = size_as_train(name, module, config)
            if size < numbers(module):
                expected[name] = numbers(module), size, None
                assert isinstance(after[name], TTLinear if "layers" in name else TensorTrain)
                assert numbers(after[name]) == size
                continue
        if not any(name.startswith(done) for done in expected):
            assert after[name] is module
    assert report.replaced == expected and set(trains_of(model)) == set(expected)
    assert ("encoder.layers.0.ffn.up" in expected) == (config.rank < 99)
    assert ("encoder.embeddings.word" in expected) == (config.embedding_rank < 99)
    assert ("head.out_proj" in expected) == (config.rank == 1)


def test_what_a_report_says(joint_config):
    report = tensorize(build_model(joint_config), TRAINS)
    assert len(report.replaced) == 2 + 2 * 6 + 2
    before, after = (sum(row[i] for row in report.replaced.values()) for i in (0, 1))
    assert str(report) == f"16 tensor trains, {after:,} numbers for {before:,}"
    report = tensorize(build_model(joint_config), TRAINS, from_weights=True)
    assert "relative error 0." in str(report)


def test_kept_modules_stay_as_they_are(joint_config):
    keep = ("head", "encoder.embeddings.word", "encoder.layers.1.attention")
    model = build_model(joint_config)
    report = tensorize(model, replace(TRAINS, keep=keep))
    whole = tensorize(build_model(joint_config), TRAINS)
    assert set(report.replaced) == {n for n in whole.replaced if not n.startswith(keep)}
    assert len(report.replaced) == 16 - 2 - 1 - 4
    assert isinstance(model.encoder.layers[1].attention.key, nn.Linear)


def test_a_models_trains_start_at_its_spread(joint_config):
    model = build_model(replace(joint_config, tt=TRAINS))
    assert len(trains_of(model)) == 16
    for module in trains_of(model).values():
        assert dense(module).std() == pytest.approx(0.02, rel=0.1)
        assert not getattr(module, "bias", torch.zeros(1)).any()


@pytest.fixture
def low_rank(joint_config):
    """A dense model whose matrices and tables happen to be tensor trains of the ranks of TRAINS."""
    config = replace(joint_config, vocab_size=500, max_tokens=79)  # 5 5 5 4 and 3 3 3 3: no padding
    source = build_model(replace(config, tt=TRAINS))
    model = build_model(config).eval()
    with torch.no_grad():
        for name, module in trains_of(source).items():
            weight = model.get_submodule(name).weight
            weight.copy_(10 * dense(module))
    return model


def test_weights_of_that_rank_leave_the_outputs_as_they_were(low_rank):
    ids, mask = random_ids([9, 5], 500)
    with torch.no_grad():
        expected = low_rank(ids, mask)[0]
    report = tensorize(low_rank, TRAINS, from_weights=True)
    assert len(report.replaced) == 16
    assert all(error < 1e-6 for _, _, error in report.replaced.values())
    for found, before in zip(low_rank(ids, mask)[0], expected, strict=True):
        assert (found - before).abs().max() < 1e-4 < 0.1 * before.std()


def test_a_lower_rank_changes_the_outputs(low_rank):
    ids, mask = random_ids([9, 5], 500)
    with torch.no_grad():
        expected = low_rank(ids, mask)[0]
    report = tensorize(low_rank, TTConfig(rank=3, embedding_rank=4), from_weights=True)
    assert all(error > 1e-3 for _, _, error in report.replaced.values())
    for found, before in zip(low_rank(ids, mask)[0], expected, strict=True):
        assert (found - before).abs().max() > 1e-3


def test_reported_errors_are_real(joint_config):
    model = build_model(joint_config)
    weights = {
        n: m.weight.detach().clone() for n, m in model.named_modules() if hasattr(m, "weight")
    }
    report = tensorize(model, TRAINS, from_weights=True)
    for name, module in trains_of(model).items():
        found = dense(module)
        expected = torch.zeros_like(found)  # where a table is padded
        expected[: len(weights[name])] = weights[name]
        error = report.replaced[name][2]
        assert error == pytest.approx(relative(found, expected), rel=1e-5) and 0.1 < error < 1


def test_word_table_of_a_model(joint_config):
    model = build_model(replace(joint_config, tt=TRAINS)).eval()
    embeddings = model.encoder.embeddings
    assert isinstance(embeddings.word, TTMEmbedding)
    assert isinstance(embeddings.position, TTMEmbedding)
    ids, mask = random_ids([9, 5], 442)
    words, places = dense(embeddings.word).float(), dense(embeddings.position).float()
    torch.testing.assert_close(embeddings.word(ids), words[ids], atol=1e-6, rtol=1e-5)
    inner = words[ids] + places[2 : 2 + 9] + embeddings.token_type.weight[0]
    found = model(ids, mask, ("hidden",))[1]["hidden"][0]
    torch.testing.assert_close(found, embeddings.norm(inner), atol=1e-4, rtol=1e-4)
    with pytest.raises(IndexError, match="table of 442 rows"):
        model(torch.tensor([[442]]))


def test_every_parameter_of_a_model_learns(joint_config):
    model = build_model(replace(joint_config, tt=TRAINS)).train()
    ids, mask = random_ids([9, 5], 442)
    sum(logits.logsumexp(-1).sum() for logits in model(ids, mask)[0]).backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("key.bias"):  # softmax cancels it
            assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize("trains", [None, TRAINS], ids=["dense", "trains"])
def test_lowest_layers_give_the_taps_of_the_whole_model(trains, joint_config):
    model = build_model(replace(joint_config, num_layers=3, tt=trains))
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


# ------------------------------------------------------------------------------------ checkpoints
def test_checkpoint_bit_for_bit(joint_config, tmp_path):
    config = replace(joint_config, tt=replace(TRAINS, keep=("head.dense", "encoder.layers.1")))
    model = build_model(config).eval()
    path = str(tmp_path / "trains.pt")
    save_atomically(checkpoint_payload(model, b"x"), path)
    again = load_checkpoint(path)
    assert again.config == config and isinstance(again.config.tt.keep, tuple)
    assert set(trains_of(again)) == set(trains_of(model)) and len(trains_of(again)) == 9
    state, expected = again.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    ids, mask = random_ids([9, 5], 442)
    for found, logits in zip(again(ids, mask)[0], model(ids, mask)[0], strict=True):
        assert torch.equal(found, logits)


def test_older_checkpoints_still_load(tiny_config, tmp_path):
    model = build_model(tiny_config).eval()
    payload = checkpoint_payload(model, b"x")
    del payload["config"]["tt"], payload["config"]["num_slots"]
    path = str(tmp_path / "older.pt")
    save_atomically(payload, path)
    again = load_checkpoint(path)
    assert again.config == tiny_config and again.config.tt is None
    ids, mask = random_ids([9, 5], 442)
    assert torch.equal(again(ids, mask)[0], model(ids, mask)[0])
    del payload["config"]["num_labels"]  # that one was always there
    save_atomically(payload, path)
    with pytest.raises(UserError, match="damaged or of another version"):
        load_checkpoint(path)


def test_damaged_trains_of_a_checkpoint_are_refused(joint_config, tmp_path):
    model = build_model(replace(joint_config, num_layers=1, tt=TRAINS))
    path, payload = str(tmp_path / "damaged.pt"), checkpoint_payload(model, b"x")
    whole = payload["config"]["tt"]
    for damage, message in (
        (5, "damaged or of another version"),
        ("rank", "damaged or of another version"),
        ({}, "damaged or of another version"),
        ({"rank": 4}, "damaged or of another version"),
        ({**whole, "more": 1}, "damaged or of another version"),
        ({**whole, "keep": 3}, "damaged or of another version"),
        ({**whole, "rank": 0}, "rank is 0"),
        ({**whole, "rank": 4.0}, "rank is 4.0"),
        ({**whole, "modes": 99}, "modes is 99"),
        ({**whole, "rank": 5}, "has shape"),
    ):
        payload["config"]["tt"] = damage
        save_atomically(payload, path)
        with pytest.raises(UserError, match=message):
            load_checkpoint(path)


def test_kept_names_of_a_checkpoint_that_are_no_names_are_refused(joint_config, tmp_path):
    model = build_model(replace(joint_config, num_layers=1, tt=TRAINS))
    path, payload = str(tmp_path / "damaged.pt"), checkpoint_payload(model, b"x")
    payload["config"]["tt"]["keep"] = [1]
    save_atomically(payload, path)
    with pytest.raises(UserError):
        load_checkpoint(path)


def test_missing_and_misshapen_cores_are_refused(joint_config, tmp_path):
    model = build_model(replace(joint_config, num_layers=1, tt=TRAINS))
    payload = checkpoint_payload(model, b"x")
    name = "encoder.layers.0.ffn.up.cores.1"
    core = payload["tensors"].pop(name)
    path = str(tmp_path / "damaged.pt")
    for tensors, message in (
        ({}, f"tensor {name} is missing"),
        ({name: core[:-1]}, f"tensor {name} has shape"),
        ({name: core, "encoder.layers.0.ffn.up.cores.6": core}, "unexpected tensor"),
    ):
        save_atomically({**payload, "tensors": {**payload["tensors"], **tensors}}, path)
        with pytest.raises(UserError, match=message):
            load_checkpoint(path)


def test_a_fresh_head_survives_its_checkpoint(joint_config, tmp_path):
    """What with_head makes of a model of tensor trains is what its own config describes."""
    base = build_model(replace(joint_config, head="none", num_labels=0, num_slots=0, tt=TRAINS))
    model = with_head(base, "joint", 3, 5).eval()
    path = str(tmp_path / "head.pt")
    save_atomically(checkpoint_payload(model, b"x"), path)
    ids, mask = random_ids([9, 5], 442)
    for found, logits in zip(load_checkpoint(path)(ids, mask)[0], model(ids, mask)[0], strict=True):
        assert torch.equal(found, logits)


def test_a_tied_head_has_no_tensor_trains(tiny_config):
    with pytest.raises(UserError, match="mlm head multiplies by the whole table"):
        replace(tiny_config, head="mlm", tt=TTConfig())
    model = build_model(replace(tiny_config, tt=TRAINS))
    with pytest.raises(UserError, match="mlm head"):
        with_head(model, "mlm", 0)

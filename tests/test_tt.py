"""tt.py against brute force: entries from the digits of their row and column, errors from discarded
singular values in float64, gradients by finite differences, sizes from a paper; and tensor trains in
a model.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_ids
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import meta_model
from model import Model, ModelConfig, build_model, initialize
from prepare import calibrate
from quant import ActQuantizer, QuantConfig, choose_qparams, dequantize, fake_quantize, min_max, quantize
from tt import (
    QuantTTLinear,
    TensorTrain,
    TTConfig,
    TTLinear,
    TTMEmbedding,
    balanced,
    clip_ranks,
    factorize,
    pad_factors,
    tensorize,
    tt_svd,
)

FULL = 10**6  # more than any rank here: clip_ranks turns it into full ranks
LAYERS = [  # output modes, input modes, rank
    ((5,), (7,), 3),
    ((4, 3), (2, 5), 3),
    ((5, 1), (3, 2), 4),
    ((4, 3, 2), (2, 3, 3), 5),
    ((2, 3), (4, 2, 2), 3),
    ((3, 2, 2, 2), (2, 1, 2, 3), 4),
    ((4, 3), (2, 5), (1, 2, 6, 3, 1)),  # explicit, also larger than a side of the cut
]
TABLES = [  # rows, row modes, column modes, rank
    (11, (4, 3), (2, 3), 4),
    (12, (4, 3), (3, 2), 1),
    (23, (3, 3, 3), (1, 2, 2), 5),
    (31, (3, 3, 2, 2), (1, 2, 2, 3), 3),
    (13, (5, 3), (2, 2), (1, 7, 1)),
]


def brute(cores, places):
    """The entries at places, one after the other: a product of one matrix per digit, or pair of digits."""
    entries = []
    for place in places:
        entry = torch.ones(1, 1, dtype=cores[0].dtype)
        for core, digits in zip(cores, place, strict=True):
            entry = entry @ core[(slice(None), *digits)]
        entries.append(entry.squeeze())
    return torch.stack(entries)


def brute_matrix(layer):
    """W (out, in) of a TTLinear, entry by entry."""
    places = itertools.product(*([(i,) for i in range(n)] for n in layer.modes))
    return brute(layer.cores, places).view(layer.out_features, layer.in_features)


def brute_table(table):
    """All rows of a TTMEmbedding, padding included, entry by entry."""
    rows, columns = (itertools.product(*map(range, m)) for m in (table.row_modes, table.column_modes))
    places = (zip(*place, strict=True) for place in itertools.product(rows, columns))
    return brute(table.cores, places).view(-1, table.embedding_dim)


def outer(cores):
    """All entries of a tensor train in float64, (n_1, m_1, n_2, ...), one core after the other."""
    x = cores[0].detach().double()
    for core in cores[1:]:
        x = torch.tensordot(x, core.detach().double(), dims=1)
    return x.squeeze(0).squeeze(-1)


def dense(module):
    """The matrix or the padded table of a tensor train, for shapes too large for brute force."""
    if isinstance(module, TTLinear):
        return outer(module.cores).reshape(module.out_features, module.in_features)
    d = len(module.row_modes)
    order = [*range(0, 2 * d, 2), *range(1, 2 * d, 2)]
    return outer(module.cores).permute(order).reshape(-1, module.embedding_dim)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


# ---------------------------------------------------------------------------------- modes and ranks
@pytest.mark.parametrize("d", [1, 2, 3, 4])
def test_factorize_has_the_least_sum_by_brute_force(d):
    for n in [*range(1, 130), 768, 1021, 3072]:
        divisors = [k for k in range(1, n + 1) if n % k == 0]
        every = itertools.combinations_with_replacement(divisors, d)
        least = min(sum(factors) for factors in every if math.prod(factors) == n)
        found = factorize(n, d)
        assert len(found) == d and math.prod(found) == n and sum(found) == least
        assert list(found) == sorted(found)


@pytest.mark.parametrize("d", [1, 2, 3, 4, 5])
def test_pad_factors_has_the_smallest_nearly_equal_factors(d):
    for n in [*range(1, 300), 800, 867, 5002] + [250002] * (d > 1):
        largest = math.ceil(n ** (1 / d)) + 1
        nearly_equal = [(k + 1) ** j * k ** (d - j) for k in range(1, largest) for j in range(d + 1)]
        found = pad_factors(n, d)
        assert len(found) == d and max(found) - min(found) <= 1
        assert math.prod(found) == min(size for size in nearly_equal if size >= n)


def test_ranks_are_no_larger_than_either_side_of_the_cut():
    modes = (3, 4, 2, 5, 2)
    sides = [(1, 240), (3, 80), (12, 20), (24, 10), (120, 2), (240, 1)]
    assert clip_ranks(modes, FULL) == tuple(min(pair) for pair in sides) == (1, 3, 12, 10, 2, 1)
    assert clip_ranks(modes, 4) == (1, 3, 4, 4, 2, 1)
    assert clip_ranks(modes, 1) == (1,) * 6
    assert clip_ranks(modes, [1, 9, 8, 7, 6, 1]) == (1, 9, 8, 7, 6, 1)


@pytest.mark.parametrize("ranks", [(1, 2, 1), (2, 2, 2, 1), (1, 0, 2, 1)])
def test_wrong_explicit_ranks_raise(ranks):
    with pytest.raises(ValueError, match="3 cores need 4 ranks from 1 to 1"):
        clip_ranks((4, 4, 4), ranks)
    with pytest.raises(ValueError, match="make fewer than 13 rows"):
        TTMEmbedding(13, (4, 3), (2, 2), 3)


# -------------------------------------------------------------------------------------------- sizes
def num_parameters(module):
    return sum(p.numel() for p in module.parameters())


def count_parameters(modes, ranks):
    """sum_k r_k-1 n_k r_k. For cores with two digits the modes are their products."""
    return sum(ranks[k] * n * ranks[k + 1] for k, n in enumerate(modes))


def test_sizes_of_the_paper():
    """Yang et al. 2023 (arXiv 2306.01076): ATIS, two layers of BERT base; with clipped and with equal ranks."""
    config, sizes, ranks = TTConfig(rank=20), {}, (1, 10, 10, 10, 10, 10, 1)
    shape = ModelConfig(vocab_size=800, num_layers=2, position_offset=0, type_vocab_size=2)
    with torch.device("meta"):
        for out, n in ((768, 768), (768, 3072), (3072, 768)):
            layer = TTLinear.like(nn.Linear(n, out), config)
            sizes[out, n] = num_parameters(layer.cores)
            assert sizes[out, n] == count_parameters(layer.modes, layer.ranks)
            assert layer.out_features == out and layer.in_features == n and len(layer.bias) == out
            assert (layer.modes[:3], layer.modes[3:]) == {
                (768, 768): ((12, 8, 8), (8, 8, 12)),
                (768, 3072): ((12, 8, 8), (12, 16, 16)),
                (3072, 768): ((16, 16, 12), (8, 8, 12)),
            }[out, n]
        square = num_parameters(TTLinear((12, 8, 8), (8, 8, 12), ranks, bias=False))
        wide = num_parameters(TTLinear((12, 8, 8), (12, 16, 16), ranks, bias=False))
        five = TTMEmbedding(800, (8, 5, 5, 4, 8), (4, 4, 4, 4, 3), (1, 30, 30, 30, 30, 1))
        four = TTMEmbedding(800, (5, 5, 5, 8), (6, 4, 8, 4), (1, 30, 30, 30, 1))
        dense_model = num_parameters(Model(replace(shape, head="joint", num_labels=22, num_slots=121)))
    assert sizes == {(768, 768): 10_528, (768, 3072): 15_440, (3072, 768): 15_440}
    assert 4 * sizes[768, 768] + sizes[768, 3072] + sizes[3072, 768] == 72_992
    assert (square, wide, 4 * square + 2 * wide) == (3_440, 4_680, 23_120)
    assert num_parameters(five) == 52_080
    assert num_parameters(four) == count_parameters(four.modes, four.ranks) == 55_860
    assert dense_model == 16_477_583


def test_operations_of_the_forward_pass():
    # ranks 1 12 20 20 20 12 1: B from (1 12 12)(12 8 20)(20 8 20), A from (20 8 20)(20 8 12)(12 12 1)
    B = 2 * (12 * 12 * 160 + 96 * 20 * 160)
    A = 2 * (160 * 20 * 96 + 1280 * 12 * 12)
    layer = TTLinear((12, 8, 8), (8, 8, 12), 20)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(100, 768))
    assert counter.get_total_flops() == A + B + 100 * 2 * 20 * (768 + 768)


# ------------------------------------------------------------------------------------------- TT-SVD
@pytest.mark.parametrize("d", [2, 3, 4])
@pytest.mark.parametrize("out, n", [(24, 36), (36, 24), (30, 42), (13, 22), (64, 64)])
def test_full_rank_is_the_dense_layer(out, n, d):
    linear = nn.Linear(n, out)
    layer = TTLinear.like(linear, TTConfig(rank=4096, modes=d))
    assert layer.set_dense(linear) < 1e-12  # as computed in float64
    assert relative(dense(layer), linear.weight.detach().double()) < 1e-6
    assert torch.equal(layer.bias, linear.bias)
    x = torch.randn(3, 5, n)
    torch.testing.assert_close(layer(x), linear(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("d", [2, 3, 4])
@pytest.mark.parametrize("rows, columns", [(60, 24), (97, 26), (7, 16), (81, 11)])
def test_full_rank_is_the_dense_table(rows, columns, d):
    embedding = nn.Embedding(rows, columns)
    table = TTMEmbedding.like(embedding, d, FULL)
    assert table.set_dense(embedding) < 1e-12
    every = torch.arange(rows)
    torch.testing.assert_close(table(every), embedding(every), atol=1e-5, rtol=1e-5)
    assert dense(table)[rows:].abs().sum() < 1e-3  # the padding is 0


def numpy_tt_svd(tensor, shape, ranks):
    """The discarded singular values of each cut, by an independent TT-SVD in float64."""
    rest, discarded = tensor.reshape(1, -1), []
    for n, r in zip(shape[:-1], ranks[1:-1], strict=True):
        u, s, _ = np.linalg.svd(rest.reshape(rest.shape[0] * n, -1), full_matrices=False)
        discarded.append(s[r:])
        rest = u[:, :r].T @ rest.reshape(rest.shape[0] * n, -1)  # projected, not taken from s v
    return discarded


@pytest.mark.parametrize(
    "shape, rank",
    [
        ((12, 10), 4),
        ((4, 5, 6), 3),
        ((4, 3, 5, 4), 6),
        ((3, 4, 2, 2, 4, 3), 1),
        ((3, 4, 2, 2, 4, 3), 5),
        ((3, 4, 2, 2, 4, 3), (1, 2, 7, 4, 6, 3, 1)),
        ((7, 1, 5, 2), 2),
    ],
    ids=str,
)
def test_error_of_tt_svd_is_that_of_the_discarded_singular_values(shape, rank):
    tensor = torch.randn(shape)
    cores, error = tt_svd(tensor, shape, rank)
    ranks = clip_ranks(shape, rank)
    assert [core.shape for core in cores] == [(ranks[k], n, ranks[k + 1]) for k, n in enumerate(shape)]
    exact = tensor.double()
    actual = float((outer(cores) - exact).norm())
    discarded = np.concatenate(numpy_tt_svd(exact.numpy(), shape, ranks))
    assert error > 0.1 * exact.norm()
    assert error == pytest.approx(np.sqrt(np.square(discarded).sum()), rel=1e-9)
    assert error == pytest.approx(actual, rel=1e-6)
    # no train of these ranks has a smaller error than its worst cut; that of TT-SVD is at most
    # sqrt(d - 1) times as large
    tails = []
    for k in range(1, len(shape)):
        unfolded = exact.reshape(math.prod(shape[:k]), -1)
        tails.append(float(torch.linalg.svdvals(unfolded)[ranks[k] :].square().sum()))
    assert max(tails) * (1 - 1e-9) <= error**2 <= sum(tails) * (1 + 1e-9)


@pytest.mark.parametrize("rank", [1, 5, 19])
def test_one_mode_per_side_gives_the_best_approximation_of_a_matrix(rank):
    """Eckart and Young 1936: the only cut is the middle one."""
    linear = nn.Linear(20, 30)
    layer = TTLinear((30,), (20,), rank)
    error = layer.set_dense(linear)
    weight = linear.weight.detach().double()
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    best = u[:, :rank] * s[:rank] @ v[:rank]
    assert error == pytest.approx(float(s[rank:].norm() / s.norm()), rel=1e-6)
    torch.testing.assert_close(dense(layer), best, atol=1e-6, rtol=1e-5)


def test_set_dense_of_zeros():
    linear, embedding = nn.Linear(12, 12, bias=False), nn.Embedding(12, 12)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(embedding.weight)
    layer, table = TTLinear((4, 3), (3, 4), 5, bias=False), TTMEmbedding(12, (4, 3), (3, 4), 5)
    assert layer.set_dense(linear) == table.set_dense(embedding) == 0 and layer.bias is None
    assert not dense(layer).any() and not dense(table).any() and not layer(torch.randn(3, 12)).any()


# ----------------------------------------------------------------------------------------- TTLinear
@pytest.mark.parametrize("out_modes, in_modes, rank", LAYERS)
def test_forward_in_two_products_equals_that_of_the_matrix(out_modes, in_modes, rank):
    layer = TTLinear(out_modes, in_modes, rank).double()
    with torch.no_grad():
        layer.bias.normal_()
        W = brute_matrix(layer)
        A, B = layer.halves()
        middle = layer.ranks[len(out_modes)]
        assert A.shape == (middle, layer.in_features) and B.shape == (layer.out_features, middle)
        torch.testing.assert_close(B @ A, W)
        torch.testing.assert_close(dense(layer), W)
        x = torch.randn(6, layer.in_features).double()
        torch.testing.assert_close(layer(x), x @ W.T + layer.bias)
        torch.testing.assert_close(layer(x.view(2, 3, -1)), layer(x).view(2, 3, -1))
        torch.testing.assert_close(layer(x[:1]), layer(x)[:1])
        assert layer.entries_rms() == pytest.approx(float(W.square().mean().sqrt()))


@pytest.mark.parametrize("shape", [(4,), (2, 3), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("d", [2, 3, 4])
def test_gradients_of_a_layer(d, shape):
    """Every core, the bias and the input, by finite differences."""
    modes = {2: ((3, 2), (2, 3)), 3: ((3, 2, 2), (2, 1, 3)), 4: ((2, 2, 1, 2), (1, 2, 2, 2))}[d]
    layer = TTLinear(*modes, 2).double()
    layer.reset_parameters(std=1.0)
    x = torch.randn(*shape, layer.in_features, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


@pytest.mark.parametrize("few", [0, 64])
@pytest.mark.parametrize("ids", [[0, 3, 3, 10, 0], [[1, 9], [9, 2]], [4]], ids=str)
@pytest.mark.parametrize("d", [2, 3, 4])
def test_gradients_of_a_table(d, ids, few, monkeypatch):
    monkeypatch.setattr("tt.FEW", few)
    modes = {2: ((4, 3), (2, 2)), 3: ((3, 2, 2), (2, 1, 2)), 4: ((2, 2, 2, 2), (1, 2, 1, 2))}[d]
    table = TTMEmbedding(11, *modes, 3).double()
    table.reset_parameters(std=1.0)
    ids = torch.tensor(ids)
    assert torch.autograd.gradcheck(lambda *_: table(ids), tuple(table.parameters()))


# ------------------------------------------------------------------------------------- TTMEmbedding
@pytest.mark.parametrize("rows, row_modes, column_modes, rank", TABLES)
def test_lookup_gives_the_rows_of_the_table(rows, row_modes, column_modes, rank):
    table = TTMEmbedding(rows, row_modes, column_modes, rank).double().requires_grad_(False)
    expected = brute_table(table)
    assert expected.shape == (math.prod(row_modes), math.prod(column_modes))
    torch.testing.assert_close(dense(table), expected)
    every = torch.arange(rows)
    torch.testing.assert_close(table(every), expected[:rows])
    for i in range(rows):
        torch.testing.assert_close(table(torch.tensor([i]))[0], expected[i])
    ids = torch.randint(rows, (4, 5))
    torch.testing.assert_close(table(ids), expected[ids])
    assert table(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, table.embedding_dim)
    assert table.entries_rms() == pytest.approx(float(expected.square().mean().sqrt()))


@pytest.mark.parametrize("wrong", [-1, 11, -11, 12, 10**9])
def test_ids_outside_the_table_raise(wrong):
    table = TTMEmbedding(11, (4, 3), (2, 3), 4)
    for ids in ([wrong], [[0, 5], [wrong, 3]]):
        with pytest.raises(IndexError, match="outside the table of 11 rows"):
            table(torch.tensor(ids))
    table(torch.tensor([0, 10]))


def test_each_row_is_built_once(monkeypatch):
    table = TTMEmbedding(31, (3, 3, 2, 2), (1, 2, 2, 3), 3).double()
    ids = torch.tensor([[5, 30, 5, 5], [0, 30, 17, 5]])
    expected = table(ids)
    monkeypatch.setattr("tt.FEW", 0)
    built, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: built.append(len(a)) or bmm(a, b))
    torch.testing.assert_close(table(ids), expected)
    assert built == [4]


def test_halves_of_a_table_have_about_sqrt_of_its_rows():
    table = TTMEmbedding.like(nn.Embedding(867, 768, device="meta"), 4, 30)
    left, right = table.halves()
    assert left.shape == (36, 16, 30) and right.shape == (25, 30, 48)


# ----------------------------------------------------------------------------------- initialization
@pytest.mark.parametrize("std", [0.02, 0.5])
@pytest.mark.parametrize(
    "module",
    [
        TTLinear((12, 8, 8), (8, 8, 12), 20),
        TTLinear((12, 8, 8), (12, 16, 16), 10),
        TTLinear((40,), (30,), 3),
        TTLinear((5, 4, 4, 4), (4, 4, 4, 5), 30),
        TTLinear((8, 8), (8, 8), (1, 3, 9, 2, 1)),
        TTMEmbedding.like(nn.Embedding(867, 96), 4, 30),
        TTMEmbedding.like(nn.Embedding(97, 48), 3, 10),
    ],
    ids=lambda module: f"{type(module).__name__} {tuple(module.modes)} {module.ranks}",
)
def test_initial_standard_deviation(module, std):
    module.reset_parameters(std)
    W = dense(module)
    assert W.std() == pytest.approx(std, rel=0.1) and W.mean().abs() < 0.1 * std
    assert W.square().mean().sqrt() == pytest.approx(std, rel=1e-4)  # scaled to it
    assert module.bias is None or not module.bias.any()
    if isinstance(module, TTMEmbedding):  # without the padding
        assert W[: module.num_embeddings].std() == pytest.approx(std, rel=0.1)


def test_balanced_cores_have_the_same_product_and_equal_norms():
    sizes = (1, 3, 4, 2, 1)
    cores = [10.0**k * torch.randn(sizes[k], 3, sizes[k + 1], dtype=torch.float64) for k in range(4)]
    found = balanced(cores)
    torch.testing.assert_close(outer(found), outer(cores), rtol=1e-12, atol=0)
    norms = torch.stack([core.norm() for core in found])
    torch.testing.assert_close(norms, norms[:1].expand(4))
    assert cores[3].norm() > 100 * cores[0].norm()


# ----------------------------------------------------------------------------------------- settings
def test_wrong_settings_raise():
    for name, wrong in (("rank", 0), ("rank", 2.0), ("embedding_rank", -1), ("modes", 9), ("table_modes", 1)):
        with pytest.raises(ValueError, match=f"{name}={wrong}: choose "):
            TTConfig(**{name: wrong})
    assert TTConfig(1, 4096, 8).modes == 8


# ------------------------------------------------------------------------------- quantized TTLinear
@pytest.mark.parametrize("act_range", ["dynamic", "static"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_quantized_layer_equals_explicit_arithmetic(bits, act_range):
    """y = Q(Q(x) Q(A)^T) Q(B)^T + b in training, and the same in integers in evaluation."""
    layer = TTLinear((4, 4, 3), (3, 4, 4), 6)
    layer.reset_parameters(0.3)
    nn.init.normal_(layer.bias)
    config = QuantConfig(weight_bits=bits, act_range=act_range)
    acts = ActQuantizer(config), ActQuantizer(config)
    x = torch.randn(2, 5, 48)
    model = nn.Sequential(QuantTTLinear(layer, config, *acts))
    model.forward = lambda ids, mask, types: model[0](x)
    calibrate(model, [(None, None)])
    found = model[0]

    def on_grid(values, low, high, symmetric, per_row):
        scale, zero = choose_qparams(*min_max(values, per_row), low, high, symmetric)
        return dequantize(quantize(values, scale, zero, low, high), scale, zero)

    dynamic = act_range == "dynamic"
    with torch.no_grad():
        pairs = zip(layer.cores, found.core_quantizers, strict=True)
        zero, half = torch.zeros(()), 2 ** (bits - 1)
        cores = [fake_quantize(c, q.log_scale.exp(), zero, -half, half - 1) for c, q in pairs]
        B = torch.einsum("xar, rbs, sct -> abct", *cores[:3]).reshape(48, -1)
        A = torch.einsum("xar, rbs, sct -> xabc", *cores[3:]).reshape(-1, 48)
        A, B = (on_grid(half, -64, 64, True, True) for half in (A, B))
        middle = on_grid(x, 0, 255, False, dynamic) @ A.T
        if dynamic:
            middle = on_grid(middle, 0, 255, False, True)
        else:  # its range was observed before the input was rounded
            scale, zero = choose_qparams(*min_max(x @ A.T, False), 0, 255, False)
            middle = dequantize(quantize(middle, scale, zero, 0, 255), scale, zero)
        expected = middle @ B.T + layer.bias
        for mode in (True, False):
            y = found.train(mode)(x)
            assert (y - expected).abs().max() < 0.2 * expected.std()  # a rounding of A or B may flip
            assert (y - expected).abs().median() < 1e-5


# --------------------------------------------------------------------------------- a model's layers
TRAINS = TTConfig(rank=4, embedding_rank=5, table_modes=4, keep=())


@pytest.fixture
def joint_config(tiny_config):
    return replace(tiny_config, head="joint", num_slots=5)


def trains_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, TensorTrain)}


def size_as_train(name, module, config):
    """Parameters of a Linear layer or table as a tensor train, from its shape alone."""
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
    [TRAINS, TTConfig(1, 1, 3, 4, ()), TTConfig(7, 12, 2, 3, ()), TTConfig(4, 99, 3, 2, ()), TTConfig(99, 4, 3, 4, ())],
    ids=str,
)
def test_tensorize_replaces_what_gets_fewer_parameters(config, joint_config):
    model = build_model(joint_config)
    before = dict(model.named_modules())
    report = tensorize(model, config)
    assert model.config == replace(joint_config, tt=config)
    after = dict(model.named_modules())
    expected = {}
    for name, module in before.items():
        table = isinstance(module, nn.Embedding) and not name.endswith("token_type")
        if isinstance(module, nn.Linear) or table:
            size = size_as_train(name, module, config)
            if size < num_parameters(module):
                expected[name] = num_parameters(module), size, None
                assert isinstance(after[name], TTLinear if "layers" in name else TensorTrain)
                assert num_parameters(after[name]) == size
                continue
        if not any(name.startswith(done) for done in expected):
            assert after[name] is module
    assert report.replaced == expected and set(trains_of(model)) == set(expected)
    assert ("encoder.layers.0.ffn.up" in expected) == (config.rank < 99)
    assert ("encoder.embeddings.word" in expected) == (config.embedding_rank < 99)
    assert ("head.out_proj" in expected) == (config.rank == 1)


def test_tensorize_keeps_modules(joint_config):
    keep = ("head", "encoder.embeddings.word", "encoder.layers.1.attention")
    model = build_model(joint_config)
    report = tensorize(model, replace(TRAINS, keep=keep))
    assert len(report.replaced) == 16 - 2 - 1 - 4 and not any(name.startswith(keep) for name in report.replaced)
    assert isinstance(model.encoder.layers[1].attention.key, nn.Linear)


def test_sufficient_ranks_keep_the_outputs(joint_config):
    """The outputs of a dense model whose matrices and tables have the tensor-train ranks of TRAINS stay."""
    config = replace(joint_config, vocab_size=500, max_tokens=79)  # 5 5 5 4 and 3 3 3 3: no padding
    source = initialize(meta_model(replace(config, tt=TRAINS)))
    low_rank, (ids, mask) = build_model(config).eval(), random_ids([9, 5], 500)
    with torch.no_grad():
        for name, module in trains_of(source).items():
            low_rank.get_submodule(name).weight.copy_(10 * dense(module))
        expected = low_rank(ids, mask)[0]
    report = tensorize(low_rank, TRAINS, from_weights=True)
    before, after = (sum(row[i] for row in report.replaced.values()) for i in (0, 1))
    errors = "relative error 0.00 to 0.00"
    assert str(report) == f"16 tensor trains, {after:,} parameters instead of {before:,}, {errors}"
    assert all(error < 1e-6 for _, _, error in report.replaced.values())
    for found, before in zip(low_rank(ids, mask)[0], expected, strict=True):
        assert (found - before).abs().max() < 1e-4 < 0.1 * before.std()


def test_reported_errors_by_brute_force(joint_config):
    model = build_model(joint_config)
    weights = {n: m.weight.detach().clone() for n, m in model.named_modules() if hasattr(m, "weight")}
    report = tensorize(model, TRAINS, from_weights=True)
    for name, module in trains_of(model).items():
        found = dense(module)
        expected = torch.zeros_like(found)  # 0 where a table is padded
        expected[: len(weights[name])] = weights[name]
        error = report.replaced[name][2]
        assert error == pytest.approx(relative(found, expected), rel=1e-5) and 0.1 < error < 1

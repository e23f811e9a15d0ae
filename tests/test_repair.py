"""repair.py: what repairs compute against the papers' formulas, and what every repair must leave as it is."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import batch, random_ids, results, run
from test_prepare import MATRICES, ROWS, prepared, quantized

import quant
import repair
import train
from analyze import layer_errors
from checkpoint import fake_quantized, read_model, read_student, save_student, tokenizer_of
from data.batches import encode_file
from int8 import to_integer
from kit.common import UserError
from model import set_dropout
from prepare import WEIGHTS, calibrate, prepare
from quant import QuantConfig, QuantLinear, WeightQuantizer, dequantize
from repair import REPAIRS, fit_lines, round_columns
from tt import TTConfig

CHANGED = {
    "keys": ["key.bias"],
    "gptq": MATRICES,
    "norm": ["norm"],
    "reconstruct": ["encoder.layers", "quantizer"],
}  # parts of names
KINDS = {
    "uniform": {},
    "mse": {"weight_range": "mse"},
    "ternary": {"weight_bits": 2, "weights": "ternary"},
    "lsq": {"weights": "lsq", "weight_range": "lsq"},
    "attention": {"attention_bits": 4},
    "static": {"per_channel": False, "per_token": False, "act_range": "static"},
}


CASES = [("attention" if name == "keys" else "uniform", [name]) for name in REPAIRS] + [
    (kind, list(REPAIRS)) for kind in KINDS
]


@pytest.fixture
def batches(monkeypatch):
    """Calibration batches, each of rows of one length, as data.batches.unpadded_batches makes them."""
    monkeypatch.setattr(repair, "STEPS", 20)
    monkeypatch.setattr(repair, "RATE", 2e-3)
    return [batch([length] * 8) for length in (6, 12, 18, 24)]


def student_of(teacher, batches, chain=(), **values):
    """(its config, a quantized copy of the teacher, calibrated and repaired)."""
    config, student = QuantConfig(**{"weight_bits": 4} | values), copy.deepcopy(teacher)
    prepare(student.eval(), config)
    if config.act_range != "dynamic":
        calibrate(student, ((b.ids, b.mask) for b in batches))
    for name in chain:
        REPAIRS[name].function(student, teacher, batches)
    return config, student


# ------------------------------------------------------------------------------------------ keys
def with_key_biases(model):
    """As trained models have; random ones start with 0."""
    for layer in model.encoder.layers:
        torch.nn.init.normal_(layer.attention.key.bias, mean=4.0)
    return model


@pytest.mark.parametrize("act_range", ["dynamic", "static", "learned"])
def test_centred_keys_change_no_map_but_their_range(act_range, models, batches):
    """In floats; with 4-bit keys the maps come closer to the teacher's."""
    teacher, errors = with_key_biases(models[0]), []
    for bits, chain in ((32, ["keys"]), (4, []), (4, ["keys"])):
        values = dict(weight_bits=32, act_bits=32, attention_bits=bits, act_range=act_range)
        _, student = student_of(teacher, batches, chain, **values)
        with torch.no_grad():
            (found, expected) = (model(batches[0].ids, capture=("map", "key"))[1] for model in (student, teacher))
        errors.append([float((a - b).abs().max()) for a, b in zip(found["map"], expected["map"], strict=True)])
        if chain and bits == 32:
            mean = torch.cat(
                [student(b.ids, capture=("key",))[1]["key"][0].transpose(1, 2).flatten(0, 1) for b in batches]
            )
            assert mean.mean(dim=0).abs().max() < 1e-5 < expected["key"][0].mean(dim=(0, 2)).abs().max()
    assert max(errors[0]) < 1e-5 and sum(errors[2]) < sum(errors[1])


# ------------------------------------------------------------------------------------------ gptq
def by_inverses(weight, H, scale, low, high):
    """GPTQ as in sec. 3.1-3.2 of the paper, in float64: the inverse of H among the columns that are left is computed
    anew for each column. Returns the integers, and how far the nearest of them was from a tie.
    """
    weight, scale = weight.double().numpy().copy(), scale.double().expand(len(weight), 1).numpy()[:, 0]
    H = H.double().numpy() + 0.01 * np.trace(H.numpy()) / len(H) * np.eye(len(H))
    codes, distance = np.zeros_like(weight), 1.0
    for j in range(len(H)):
        inverse = np.linalg.inv(H[j:, j:])
        ratio = weight[:, j] / scale
        codes[:, j] = np.clip(np.round(ratio), low, high)
        distance = min(distance, np.abs(np.abs(ratio - np.floor(ratio)) - 0.5).min())
        error = (weight[:, j] - codes[:, j] * scale) / inverse[0, 0]
        weight[:, j:] -= np.outer(error, inverse[0])
    return codes, distance


@pytest.mark.parametrize("columns", [4, 128])  # rounded before the rest is updated: no influence
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("per_row", [True, False])
def test_integers_are_those_of_the_papers_algorithm(columns, bits, per_row, monkeypatch):
    scale = torch.rand(9, 1) / 4 + 0.05 if per_row else torch.tensor(0.1)
    monkeypatch.setattr(repair, "COLUMNS", columns)
    low, high = quant.quant_range(bits, symmetric=True)
    x = torch.randn(40, 14) @ torch.randn(14, 14)  # correlated
    weight, H = torch.randn(9, 14) / 4, x.T @ x
    expected, distance = by_inverses(weight, H, scale, low, high)
    assert distance > 1e-9
    codes = round_columns(weight, H, scale, low, high)
    assert codes.dtype == torch.float32 and np.array_equal(codes.numpy(), expected)
    nearest = quant.quantize(weight, scale, torch.zeros(()), low, high)
    assert not torch.equal(codes, nearest)
    errors = [(e @ H * e).sum() for e in (codes * scale - weight, nearest * scale - weight)]
    assert bits == 2 or errors[0] < errors[1]  # at 2 bits nearly all are clipped, and there is little to choose
    # independent inputs: nothing to make up for
    assert torch.equal(round_columns(weight, torch.eye(14), scale, low, high), nearest)


@pytest.mark.parametrize(
    "values", [{"weight_range": "mse"}, {"act_range": "static"}, {"act_bits": 32}, {"attention_bits": 4}]
)
def test_gptq_sees_what_the_quantized_products_read(values, models, batches, monkeypatch):
    """H of each matrix is that of the finished student, in which all below it are repaired. Weights lie at most a step beyond it."""
    seen, read = [], {}
    original = repair.round_columns

    def recorded_columns(weight, H, scale, low, high):
        seen.append(H)
        assert ((weight / scale) > low - 1.001).all() and ((weight / scale) < high + 1.001).all()
        return original(weight, H, scale, low, high)

    monkeypatch.setattr(repair, "round_columns", recorded_columns)
    _, student = student_of(models[0], batches, ["gptq"], **values)
    product = quant.product

    def recorded(x, weight, *rest):
        inputs = dequantize(*x) if isinstance(x, quant.Codes) else x
        read.setdefault(id(weight), []).append(inputs.flatten(0, -2))
        return product(x, weight, *rest)

    monkeypatch.setattr(quant, "product", recorded)
    for each in batches:
        student(each.ids)
    layers = {name: module for name, module in student.named_modules() if isinstance(module, QuantLinear)}
    layers = [
        layer for name, layer in layers.items() if not name.endswith(("key", "value"))
    ]  # they read what query reads
    assert len(seen) == len(layers) == 8
    for layer, H in zip(layers, seen, strict=True):  # in the order of modules() and of work
        x = torch.cat(read[id(layer.weight)]).double()
        torch.testing.assert_close(H.double(), x.T @ x, rtol=1e-5, atol=1e-5 * H.max().item())


def test_a_weight_whose_input_is_always_zero_is_rounded_to_the_nearest():
    x = torch.randn(40, 6)
    x[:, 2] = 0.0
    weight, scale = torch.randn(5, 6), torch.tensor(0.3)
    codes = round_columns(weight, x.T @ x, scale, -3, 3)
    assert torch.equal(codes[:, 2], (weight[:, 2] / scale).round().clamp(-3, 3))


GRIDS = [row for row in ROWS if WEIGHTS[row[0]].matrix is not WEIGHTS["pq"].matrix]


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize(("name", "bits", "weight_range"), GRIDS)
def test_a_weight_takes_the_integers_that_it_is_given(name, bits, weight_range, per_row):
    """Also where no weight has the largest integer any more, and in a row of zeros; and scales go on being trained."""
    config = QuantConfig(weight_bits=bits, weights=name, weight_range=weight_range, noise=0.5)
    weight = torch.randn(20, 30)
    quantizer = WEIGHTS[name].matrix(config, weight, per_row, True)
    codes, scale = quantizer.codes(weight)
    codes = codes.clamp(-2, 2)
    codes[0], codes[1:4] = 0.0, codes[1:4].clamp(-1, 1)
    moved = weight.clone()
    quantizer.settle(moved, codes, scale)
    found, kept = quantizer.codes(moved)
    assert torch.equal(found, codes) and quantizer.noise == 0.5
    if name != "ternary":  # as close to where it was as its integer allows
        assert (moved / scale - codes).abs().max() < 0.451
        stays = (weight / scale - codes).abs() < 0.45
        assert stays.any() and not stays.all()
        torch.testing.assert_close(moved[stays], weight[stays], rtol=1e-5, atol=1e-6)
    rows = slice(1, None) if per_row else ...
    torch.testing.assert_close(kept[rows], scale[rows], rtol=1e-6, atol=0)
    trained = list(quantizer.parameters())
    assert len(trained) == (name == "lsq")


# ------------------------------------------------------------------------------------------ norm
def test_norms_are_least_squares(models, batches):
    """By numpy, on what the finished student's norms read: their own gain has no influence there."""
    teacher, z, targets = models[0], {}, {}
    _, student = student_of(teacher, batches, ["norm"], weight_bits=3)
    norms = {name: module for name, module in student.named_modules() if name.endswith("norm")}
    for name, module in norms.items():
        module.register_forward_hook(lambda _, x, y, at=name: z.setdefault(at, []).append(F.layer_norm(x[0], (32,))))
        original = teacher.get_submodule(name)
        original.register_forward_hook(lambda _, x, y, at=name: targets.setdefault(at, []).append(y))
    with torch.no_grad():
        for each in batches:
            student(each.ids), teacher(each.ids)
    assert len(norms) == 5
    for name, module in norms.items():
        x, y = (torch.cat([t.flatten(0, -2) for t in some[name]]).double().numpy() for some in (z, targets))
        for c in range(32):
            gain, bias = np.linalg.lstsq(np.stack([x[:, c], np.ones(len(x))], 1), y[:, c])[0]
            assert module.weight[c].item() == pytest.approx(gain, abs=1e-4)
            assert module.bias[c].item() == pytest.approx(bias, abs=1e-4)


def test_a_line_through_equal_values_keeps_its_slope():
    slope, intercept = fit_lines(torch.ones(5, 2), torch.arange(10.0).view(5, 2), old=torch.tensor([3.0, -1.0]))
    assert slope.tolist() == [3.0, -1.0] and intercept.tolist() == [1.0, 6.0]


# ----------------------------------------------------------------------------------- reconstruct
def test_what_does_not_help_on_held_out_rows_is_not_kept(models, batches, monkeypatch):
    """Steps that are far too large; nor is dropout or noise on, or left on."""
    student = student_of(models[0], batches, noise=0.5)[1]
    set_dropout(student, 0.5)
    before = copy.deepcopy(student.state_dict())
    monkeypatch.setattr(repair, "RATE", 100.0)
    torch.manual_seed(0)
    drawn = torch.get_rng_state()
    REPAIRS["reconstruct"].function(student, models[0], batches)
    assert all(map(torch.equal, student.state_dict().values(), before.values()))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not any(module.training for module in student.modules())
    assert {module.noise for module in student.modules() if isinstance(module, WeightQuantizer)} == {0.5}


def test_layers_return_what_the_teachers_return(models, batches, monkeypatch):
    """Unquantized layers that differ from the teacher's approach them, on its own inputs as these are repaired."""
    teacher, (_, student) = models[0], student_of(models[0], batches, weight_bits=32, act_bits=32)
    with torch.no_grad():
        for parameter in student.encoder.layers.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    errors = []
    for _ in range(2):
        with torch.no_grad():
            outputs = [model(batches[0].ids, capture=("hidden",))[1]["hidden"] for model in (student, teacher)]
        errors.append([float((a - b).square().mean()) for a, b in zip(*outputs, strict=True)])
        REPAIRS["reconstruct"].function(student, teacher, batches)
    assert errors[0][0] == errors[1][0] == 0.0
    assert all(after < 0.5 * before for before, after in zip(errors[0][1:], errors[1][1:], strict=True))


# ----------------------------------------------------------------------------------- every repair
@pytest.mark.parametrize(("kind", "chain"), CASES, ids=[f"{kind}+{'+'.join(chain)}" for kind, chain in CASES])
def test_repairs_reduce_the_error_and_keep_the_bits(kind, chain, models, batches, tmp_path, tokenizer_bytes):
    """On held-out rows; student, file and integer model agree; no other tensor changes; one input, one result."""
    teacher, held_out = with_key_biases(models[0]) if "keys" in chain else models[0], [batch([9, 14, 20, 28])]
    before = copy.deepcopy(teacher.state_dict())
    _, plain = student_of(teacher, batches, **KINDS[kind])
    config, student = student_of(teacher, batches, chain, **KINDS[kind])
    _, again = student_of(teacher, batches, chain, **KINDS[kind])

    def error(model):
        places = layer_errors(teacher, model, held_out)["accumulated"].items()
        return sum(layer["relative"] for name, place in places if name != "key" for layer in place)

    assert error(student) < error(plain)
    assert all(map(torch.equal, teacher.state_dict().values(), before.values()))
    state, other = student.state_dict(), again.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)
    for name, parameter in student.named_parameters():
        if not any(part in name for each in chain for part in CHANGED[each]):
            assert torch.equal(parameter, plain.get_parameter(name)), name

    path, (ids, mask) = str(tmp_path / "student.safetensors"), random_ids([9, 14, 20], 442)
    save_student(path, student, config, tokenizer_bytes, {})
    with torch.no_grad():
        logits = student(ids, mask)[0]
        assert not torch.equal(logits, plain(ids, mask)[0])
        assert torch.equal(logits, fake_quantized(read_student(path))(ids, mask)[0])
        assert torch.equal(logits, to_integer(student, config)(ids, mask)[0])


@pytest.mark.parametrize("name", [name for name, row in REPAIRS.items() if not row.needs_scales])
def test_nothing_to_repair(name, models, batches):
    """At 32 bits the student is its teacher, up to rounding."""
    _, student = student_of(models[0], batches, [name], weight_bits=32, act_bits=32)
    with torch.no_grad():
        found, expected = (model(batches[0].ids, capture=("hidden",))[1]["hidden"] for model in (student, models[0]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_gptq_needs_matrices(tiny_config, batches):
    """Tensor trains have none."""
    teacher, student = prepared(QuantConfig(weight_bits=4), replace(tiny_config, tt=TTConfig(rank=4)))
    with pytest.raises(UserError, match="gptq rounds matrices of Linear layers, which this model does not have"):
        REPAIRS["gptq"].function(student.eval(), teacher, batches)


# --------------------------------------------------------------------------------- in train.py
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_goes_on_with_the_quantizers_that_it_would_have(kind, models, batches):
    """From weights with the integers of the repair, each of which gets its gradient; in lsq those within the grid."""
    values = KINDS[kind] | {"noise": 0.5}
    _, plain = student_of(models[0], batches, **values)
    _, student = student_of(models[0], batches, ["gptq"], **values)
    pairs = [
        [module for module in model.modules() if isinstance(module, WeightQuantizer)] for model in (plain, student)
    ]
    for usual, quantizer in zip(*pairs, strict=True):
        assert type(quantizer) is type(usual) and quantizer.noise == 0.5
    for name, (weight, quantizer) in quantized(student).items():
        if "word" not in name:
            codes, scale = quantizer.codes(weight)
            quantizer.train().noise = 1.0
            rounded = quantizer(weight)
            assert torch.equal(rounded, codes * scale)
            rounded.sum().backward()
            inside = (weight / scale).clamp(quantizer.quant_min, quantizer.quant_max) == weight / scale
            assert torch.equal(weight.grad, (inside if kind == "lsq" else torch.ones_like(inside)).float())


def test_rows_of_a_report(tmp_path, capsys):
    """A repair is part of a row's name, its seconds are the row's, and a student starts from it."""
    methods = ["fp32", "ptq", "ptq+gptq+reconstruct", "ptq-static+norm", "sdq+gptq+norm"]
    assert run(tmp_path, *"--steps 2 --bits 3 --analyze --methods".split(), *methods) == 0
    printed, rows = capsys.readouterr().out, results(tmp_path)["methods"]
    assert list(rows) == methods and printed.count("gptq took") == 2 == printed.count("norm took")
    assert rows["ptq"]["train_seconds"] == 0.0 < min(rows[name]["train_seconds"] for name in methods[2:])
    for name in methods[1:]:
        assert rows[name]["student"]["languages"] == rows[name]["languages"]
        assert (len(rows[name].get("dev_curve", [])) > 0) == (name == "sdq+gptq+norm")
    report = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "ptq-static: static ranges. sdq: noise 0.5, logits+context." in report


@pytest.mark.parametrize("pairs", [False, True], ids=["one text", "two texts"])
def test_calibration_text(pairs, tmp_path, monkeypatch):
    """Static ranges and repairs read the user's rows, whole; the teacher is trained on train."""
    lines = [f"Ein Satz{chr(9) * pairs}{'noch einer ' * (i % 3)}." for i in range(9)]
    (tmp_path / "texts.txt").write_text("\n".join(lines), encoding="utf-8")
    read, of = [], train.unpadded_batches
    monkeypatch.setattr(train, "unpadded_batches", lambda dataset, *rest: read.append(dataset) or of(dataset, *rest))
    options = f"--steps 1 --methods fp32 ptq-static ptq+norm --calibration {tmp_path / 'texts.txt'}".split()
    assert run(tmp_path, *options) == 0 == run(tmp_path, *options[:-2], out="usual")
    (teacher,) = (tmp_path / "teachers").iterdir()
    tokenizer = tokenizer_of(str(teacher), read_model(str(teacher)))
    rows = [text.split("\t") for text in lines]
    expected = tokenizer.encode_batch(*([list(column) for column in zip(*rows, strict=True)] + [None])[:2])
    for dataset in read[:2]:
        assert [ids.tolist() for ids in np.split(dataset.ids, dataset.starts[1:-1])] == [list(ids) for ids in expected]
    assert len(read[2]) > 9


@pytest.mark.parametrize(
    ("pairs", "text", "message"),
    [
        (True, None, "--calibration: no file texts.txt"),
        (True, "a\nb\tc\n", "--calibration texts.txt: write one text per line, or two by a tab in each"),
        (True, "a\tb\tc\nd\te\tf\n", "--calibration texts.txt: write one text per line, or two by a tab in each"),
        (False, "a\tb\nc\td\n", "--calibration texts.txt: write one text per line"),
        (True, "a\n\n", "texts.txt has fewer than two different sentences: write one per line"),
    ],
)
def test_calibration_text_that_is_none(pairs, text, message, tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "texts.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as wrong:
        encode_file("texts.txt", pairs, tokenizer, 32)
    assert str(wrong.value) == message

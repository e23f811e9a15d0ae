"""config.py: options, their defaults, recipes, and what train.py answers to options it can't run."""

import os
from dataclasses import fields

import pytest
from conftest import FLIGHTS, TOKENIZER, answer

from config import DEFAULTS, METHODS, RECIPES, TrainConfig, default_out, parse_args, quant_config, resolve, tt_config
from data.tasks import TASKS
from distill import LAYERWISE, LOSSES
from kit.common import flag
from prepare import WEIGHTS
from repair import REPAIRS
from tt import TTConfig


def parse(*options):
    """The checked config of some options, without a converted checkpoint or official files."""
    return parse_args([word for each in options for word in each.split()])[0]


def test_help_is_short(capsys):
    """`python train.py --help` fits on two screens, and tells every option, recipe, row, task, loss and quantizer."""
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and len(lines) <= 100 and max(map(len, lines)) <= 112
    assert sum(line.startswith("  --") for line in lines) <= 46
    text = "".join("".join(lines).split())  # wherever lines are wrapped
    for field in fields(TrainConfig):
        assert flag(field.name) + " " in "\n".join(lines) + " " and "".join(field.metadata["help"].split()) in text
    for name in ("--resume", *RECIPES, *TASKS, *METHODS, *REPAIRS, *LOSSES, *LAYERWISE, *WEIGHTS):
        assert name in text


# ----------------------------------------------------------------------------------------- defaults
# What README and docs/ say of each recipe, written out a second time.
DOCUMENTED = {
    "sdq": {
        "task": "xnli", "methods": ("fp32", "ptq", "qat", "sdq"), "bits": 8, "act_bits": 8,
        "attention_bits": 32, "weights": "uniform", "weight_range": "minmax", "noise": 0.5,
        "act_range": "dynamic", "distill": "logits+context", "alpha": 0.5, "beta": 100.0,
    },
    "kd": {
        "task": "xnli", "methods": ("fp32", "ptq", "qat", "sdq"), "bits": 2, "act_bits": 8,
        "attention_bits": 8, "weights": "ternary", "weight_range": "minmax", "noise": 1.0, "per_tensor": True,
        "act_range": "dynamic", "distill": "0*task+logits+hidden+map", "alpha": 1.0, "beta": 600.0,
        "student_lr": 1e-3,
    },
    "ternary": {
        "task": "xnli", "methods": ("fp32", "ptq", "qat", "sdq"), "bits": 2, "act_bits": 8,
        "attention_bits": 8, "weights": "ternary", "weight_range": "minmax", "noise": 1.0, "per_tensor": False,
        "act_range": "dynamic", "distill": "logits+map", "alpha": 1.0, "beta": 600.0,
        "student_lr": 1e-3,
    },
    "lsq": {
        "task": "xnli", "bits": 2, "act_bits": 8, "weights": "lsq", "weight_range": "lsq", "act_range": "learned",
        "distill": "logits+score+hidden", "alpha": 0.5, "beta": 100.0, "student_lr": 1e-3,
    },
    "tt": {
        "task": "atis", "model": "scratch-2x128", "methods": ("fp32", "ptq", "qat", "sdq"), "bits": 8,
        "act_bits": 8, "tt_rank": 20, "act_range": "static", "weight_range": "mse",
        "distill": "layerwise", "student_dropout": 0.1, "dropout": 0.2,
    },
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_resolves_to_its_documented_defaults(recipe, nothing_downloaded):
    config = parse("--recipe", recipe)
    expected = {"recipe": recipe, **DEFAULTS[recipe], **DOCUMENTED[recipe]}
    assert {name: getattr(config, name) for name in expected} == expected
    assert (config == parse()) == (recipe == "sdq")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_option_overrides_the_recipe(recipe, nothing_downloaded):
    usual = resolve({"recipe": recipe})
    other = {
        "recipe": "kd" if recipe == "tt" else "tt", "task": "snips", "data_dir": "d",
        "languages": ("de",), "eval_split": "dev", "train_language": "de", "model": "other.safetensors",
        "tokenizer": "t", "methods": ("sdq",), "weights": "pq", "weight_range": "x", "calibration": "c",
        "act_range": "learned" if recipe != "lsq" else "static",
        "distill": "hidden", "device": "cuda", "out": "o", "bits": 5, "precision": "float32",
    }  # fmt: skip
    for field in fields(TrainConfig):
        value = getattr(usual, field.name)
        if field.name in other:
            value = other[field.name]
        elif isinstance(value, (bool, float)):
            value = not value if isinstance(value, bool) else value / 3 + 0.01
        else:
            value = (value or 0) + 7
        assert value != getattr(usual, field.name)
        assert getattr(resolve({"recipe": recipe, field.name: value}), field.name) == value, field.name


def test_order_of_defaults(nothing_downloaded, monkeypatch):
    """TrainConfig < model < task < built-in sample < recipe < what is typed."""
    given, rows = {"task": "atis", "model": "scratch-3x64", "recipe": "kd"}, dict(scratch=1, joint=2)
    rows |= {"joint sample": 3, "kd": 4}
    for name, beta in rows.items():
        monkeypatch.setitem(DEFAULTS, name, {"beta": beta})
    assert resolve(given | {"beta": 7}).beta == 7
    for name, beta in reversed(rows.items()):
        assert resolve(given).beta == beta
        del DEFAULTS[name]["beta"]
    assert resolve(given).beta == TrainConfig.beta


@pytest.mark.parametrize(
    "options, expected",
    [
        ("--task cola", dict(model="minilm", beta=600.0, epochs=3, student_epochs=2, lr=1e-4)),
        ("--task cola --recipe kd", dict(batch_size=16, max_length=64, student_lr=3e-4)),
        ("--task sst2 --recipe kd --max-length 32", dict(batch_size=32, max_length=32)),
        ("--task ner", dict(model="xlmr-base", max_length=256)),
        (f"--task atis --data-dir {FLIGHTS}", dict(model="scratch-2x768", epochs=25, batch_size=32, student_lr=5e-4)),
        ("--task atis", dict(model="scratch-2x128", epochs=20, batch_size=8, lr=2e-3, student_epochs=6)),
        ("--task snips --model scratch-1x64", dict(model="scratch-1x64", epochs=25)),
        (f"--model scratch --tokenizer {TOKENIZER}", dict(model="scratch-4x256", epochs=3, lr=5e-4, dropout=0.1)),
        ("", dict(model="mini", beta=100.0, dropout=0.0, student_lr=3e-5)),
        ("--bits 2", dict(student_lr=1e-3)),
        ("--bits 4", dict(student_lr=1e-4, weight_range="mse")),
        ("--per-tensor", dict(weight_range="mse")),
        ("--bits 2 --weights ternary", dict(weight_range="minmax")),
        ("--bits 32 --act-bits 4", dict(weight_range="minmax")),
        ("--weights pq", dict(student_lr=1e-4, noise=0.1)),
        ("--bits 2 --student-lr 1e-5", dict(student_lr=1e-5)),
        ("--task cola --bits 2", dict(student_lr=3e-4)),
        ("--model x --epochs 5 --steps 9 --lr 1e-2", dict(student_epochs=5, student_steps=9, student_lr=1e-2)),
        ("--model x --epochs 0", dict(epochs=0, student_epochs=3)),
        ("--weights lsq", dict(weight_range="lsq", noise=0.5)),
        ("--weights lsq --weight-range mse", dict(weight_range="mse")),
        ("--recipe kd --bits 4 --weights lsq", dict(weight_range="lsq", attention_bits=8)),
        ("--languages de zh --methods fp32 sdq", dict(languages=("de", "zh"), methods=("fp32", "sdq"))),
        ("--languages de,zh --methods fp32,sdq fp32", dict(languages=("de", "zh"), methods=("fp32", "sdq"))),
    ],
)
def test_defaults_and_what_follows_from_other_options(options, expected, nothing_downloaded):
    config = parse(options)
    assert {name: getattr(config, name) for name in expected} == expected


def test_default_model_is_the_first_that_is_there(nothing_downloaded, tmp_path):
    assert parse().model == "mini" and parse("--task atis").model == "scratch-2x128"
    os.mkdir(tmp_path / "weights")
    (tmp_path / "weights" / "xlmr-base.safetensors").write_bytes(b"")
    assert parse().model == "xlmr-base" and parse("--model mini").model == "mini"
    assert parse("--task rte").model == "minilm"


# --------------------------------------------------------------------------- what options stand for
@pytest.mark.parametrize(
    ("distill", "alpha", "beta", "weights"),
    [
        ("logits+map+output+hidden", 0.5, 10.0, {"logits": 0.5, "map": 10.0, "output": 10.0, "hidden": 10.0}),
        # gamma = 0.3 of Kim et al. 2022: gamma beta map + (1 - gamma) beta output
        ("logits+3*map+7*output+hidden", 0.5, 10.0, {"logits": 0.5, "map": 3.0, "output": 7.0, "hidden": 10.0}),
        # the forms in their code: map + c * output, c * map + output
        ("map+0.3*output", 1.0, 1.0, {"map": 1.0, "output": 0.3}),
        ("3e-1*map+output", 1.0, 1.0, {"map": 0.3, "output": 1.0}),
        # weights of its own: neither alpha nor beta applies
        ("2*logits+.1*map+output+0*hidden", 1.0, 9.0, {"logits": 2.0, "map": 0.1, "output": 9.0, "hidden": 0.0}),
        ("logits+0*task", 0.5, 9.0, {"logits": 0.5, "task": 0.0}),
        ("task+map", 0.5, 9.0, {"task": 1.0, "map": 9.0}),
        ("map+2*map@last", 0.5, 9.0, {"map": 9.0, "map@last": 2.0}),
        ("+".join(LOSSES), 1.0, 1.0, dict.fromkeys(LOSSES, 1.0)),
        ("none", 1.0, 1.0, {}),
        *((name, 0.7, 1.0, {}) for name in LAYERWISE),
    ],
)
def test_loss_weights(distill, alpha, beta, weights):
    found = TrainConfig(distill=distill, alpha=alpha, beta=beta).loss_weights
    assert found == weights and list(found) == list(weights)


def test_quantizers_of_each_row(nothing_downloaded):
    config = parse("--bits 4 --act-bits 6 --weights lsq --attention-bits 5 --act-range learned --noise 0.3")
    ranges = {name: quant_config(config, name).act_range for name in ("ptq", "qat", "sdq")}
    assert ranges == {"ptq": "static", "qat": "learned", "sdq": "learned"}
    quant = quant_config(config, "sdq")
    assert (quant.weight_bits, quant.act_bits, quant.attention_bits) == (4, 6, 5)
    assert (quant.weights, quant.weight_range, quant.noise) == ("lsq", "lsq", 0.3)
    assert quant.per_channel and quant.per_token and quant.keep == ("head",)
    assert quant_config(config, "ptq").noise == 1.0  # it is not trained
    tensor = quant_config(parse("--per-tensor"), "ptq")
    assert not tensor.per_channel and not tensor.per_token and tensor.act_range == "dynamic"
    assert (
        quant_config(parse(), "ptq-static").act_range == quant_config(parse(), "ptq-static+norm").act_range == "static"
    )
    assert quant_config(config, "sdq+gptq") == quant and quant_config(config, "ptq+gptq").noise == 1.0
    trains = parse("--tt-rank 3 --tt-embedding-rank 7")
    assert tt_config(trains) == TTConfig(3, 7) and quant_config(trains, "ptq").keep == ()
    assert tt_config(parse()) is None


@pytest.mark.parametrize(
    "options, name",
    [
        ("--recipe sdq --task xnli --bits 8 --epochs 2", "xnli-mini-w8a8-s0"),  # its defaults
        ("--threads 1 --device cpu --analyze --accumulate 2", "xnli-mini-w8a8-s0"),  # what changes no result
        ("--bits 4 --distill logits --languages de fr", "xnli-mini-w4a8-s0-languages-de-fr-distill-logits"),
        ("--noise 1 --lr 1e-3 --per-tensor", "xnli-mini-w8a8-s0-weight_range-mse-per_tensor-noise-1.0-lr-0.001"),
        ("--recipe kd --task stsb --seed 3", "stsb-minilm-kd-w2a8-s3"),
        ("--recipe tt --bits 4", "atis-scratch-2x128-tt-w4a8-s0"),
        ("--model a/mine.safetensors", "xnli-mine-w8a8-s0"),
    ],
)
def test_default_folders_tell_settings_apart(options, name, nothing_downloaded):
    assert default_out(parse(options)) == os.path.join("out", name)


# ----------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("options", "message"),
    [
        # names and numbers
        ("--recipe xyz", "--recipe: invalid choice: 'xyz'"),
        ("--task xnil", "unknown task 'xnil'; known: xnli"),
        ("--student-l 3", "unrecognized arguments"),  # no abbreviations
        ("--bits 9", "--bits 9: choose 2 to 8, or 32"),
        ("--batch-size 0", "--batch-size: 0: choose a value from 1"),
        ("--beta nan", "--beta: nan: choose a value from 0"),
        ("--noise 1.5", "--noise 1.5: choose a fraction from 0 to 1"),
        # rows of the report and quantizers
        ("--methods fp32 magic", "'magic' is unknown"),
        ("--methods ptq+magic", "'ptq+magic' is unknown; choose from fp32 ptq ptq-static qat sdq, with repairs in"),
        ("--methods fp32+norm ptq+norm+gptq", "'fp32+norm', 'ptq+norm+gptq' is unknown"),
        ("--methods fp32 ptq sdq --calibration x", "--calibration x: only static ranges and repairs read it"),
        ("--methods ptq+gptq+gptq", "with repairs in this order: ptq+keys+gptq+norm"),
        ("--methods fp32 ptq+gptq --bits 32", "gptq needs weights with scales: not with --bits 32, --weights pq or"),
        ("--methods sdq+gptq --weights pq", "not with --bits 32, --weights pq or --tt-rank"),
        ("--methods ptq-static+gptq+norm --tt-rank 4", "not with --bits 32, --weights pq or --tt-rank"),
        ("--methods fp32 ptq sdq+norm --distill 1*task", "so sdq would be qat"),
        ("--act-range fixed", "--act-range 'fixed': choose from dynamic, static"),
        ("--weight-range lsq", "--weight-range 'lsq': --weights uniform has minmax, mse"),
        ("--recipe kd --bits 4", "--weights ternary has 2 bits, not --bits 4"),
        ("--weights lsq --tt-rank 4", "tensor trains have learned scales"),
        ("--tt-embedding-rank 4", "--tt-rank 0: choose 1 to 4096"),
        ("--tt-rank 5000", "--tt-rank 5000: choose 1 to 4096"),
        ("--weights pq --noise 1", "--noise 1 sets all blocks of --weights pq to 0"),
        (
            f"--model scratch-1x200 --tokenizer {TOKENIZER}",
            "scratch-1x200: choose a hidden size that is a multiple of 64",
        ),
        ("--weights pq --distill layerwise", "--weights pq has stages of its own"),
        # losses
        ("--gate 1 --methods ptq qat", "--gate compares the last row of --methods with fp32"),
        ("--gate 1 --methods ptq fp32", "--gate compares the last row of --methods with fp32"),
        ("--gate -1", "--gate: -1: choose a value from 0"),
        ("--distill logits+", "--distill logits+: '' is unknown: join any of logits, score"),
        ("--distill layerwise+logits", "'layerwise' is unknown"),
        ("--distill logits@last", "'logits@last' is unknown: join any of logits, score, map, context, output, "),
        ("--distill task@last", "'task@last' is unknown"),
        ("--distill 1*map+2*map", "names map twice"),
        ("--distill *output", "'' before output is not a weight, such as 150 or 0.5"),
        ("--distill map+-0.1*output", "not a weight"),
        ("--distill nan*output", "not a weight"),
        ("--distill logits+task --alpha 0", "so sdq would be qat: use --methods fp32 ptq qat"),
        # models and data
        ("--task tsv", "train.tsv: name its folder with --data-dir"),
        ("--task tsv --data-dir nowhere", "no file nowhere/train.tsv: name its folder with --data-dir"),
        ("--languages xx", "xx"),
        ("--epochs 0", "--epochs 0: mini has no head of classes for xnli"),
        ("--model scratch", "--model scratch needs --tokenizer"),
        (f"--model scratch-300x64 --tokenizer {TOKENIZER}", "num_layers is 300, not a number from 1 to 200"),
        ("--model scratch-0x64", "no model 'scratch-0x64'"),
        ("--model xlmr-large", "python convert.py xlmr-large --from DIR"),
        (f"--task atis --data-dir {FLIGHTS} --max-length 8", "use --max-length"),
    ],
)
def test_mistakes_are_answered_in_one_line(options, message, capsys, tmp_path, nothing_downloaded):
    status, error = answer(capsys, *options.split(), "--out", str(tmp_path / "run"))
    assert status == 2 and message in error and os.listdir(tmp_path) == []

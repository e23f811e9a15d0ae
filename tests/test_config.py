"""config.py: options, their defaults, recipes, and what train.py answers to options it can't run."""

import os
from dataclasses import fields

import pytest
from conftest import FLIGHTS, SCRATCH, TOKENIZER, answer

import config as config_module
from config import (
    MODEL_DEFAULTS,
    RECIPES,
    TrainConfig,
    build_parser,
    default_out,
    parse_args,
    parse_distill,
    quant_config,
    resolve,
    tt_config,
)
from data.tasks import TASKS
from distill import LAYERWISE, LOSSES
from kit.common import UserError, flag
from tt import TTConfig


def parse(*options):
    """The checked config of some options, without a converted checkpoint or official files."""
    return parse_args([word for each in options for word in each.split()])[0]


# ----------------------------------------------------------------------------------------- the help
def test_every_option_has_help_and_a_default():
    text = build_parser().format_help()
    for field in fields(TrainConfig):
        assert flag(field.name) in text
        words = "".join(field.metadata["text"].split())
        assert words and words in "".join(text.split())  # wherever its lines are wrapped
    assert TrainConfig() == TrainConfig(**{f.name: f.default for f in fields(TrainConfig)})


def test_help_is_short(capsys):
    """`python train.py --help` fits on two screens, and names every recipe, task and loss."""
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and len(text.splitlines()) <= 110
    assert max(map(len, text.splitlines())) <= 112
    for field in fields(TrainConfig):
        assert f"  {flag(field.name)}" in text
    assert "--resume" in text
    for name in (*RECIPES, *TASKS, *config_module.METHODS, *LOSSES):
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
        "attention_bits": 8, "weights": "ternary", "weight_range": "minmax", "noise": 1.0,
        "act_range": "dynamic", "distill": "logits+map", "alpha": 1.0, "beta": 600.0,
        "student_lr": 1e-3,
    },
    "tt": {
        "task": "atis", "model": "scratch", "methods": ("fp32", "ptq", "qat", "sdq"), "bits": 8,
        "act_bits": 8, "tt_rank": 20, "act_range": "static", "weight_range": "mse",
        "distill": "layerwise", "student_dropout": 0.1, "layers": 2, "dropout": 0.2,
        "label_smoothing": 0.1,
    },
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_resolves_to_its_documented_defaults(recipe, nothing_downloaded):
    config = parse("--recipe", recipe)
    assert config.recipe == recipe
    expected = {**RECIPES[recipe], **DOCUMENTED[recipe]}
    assert {name: getattr(config, name) for name in expected} == expected
    if recipe == "sdq":
        assert config == parse()


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_option_overrides_the_recipe(recipe, nothing_downloaded):
    usual = resolve({"recipe": recipe})
    other = {
        "recipe": "kd" if recipe == "tt" else "tt", "task": "snips", "data_dir": "d",
        "languages": ("de",), "eval_split": "dev", "model": "other.pt", "tokenizer": "t",
        "methods": ("sdq",), "weights": "lsq", "weight_range": "lsq", "act_range": "learned",
        "distill": "hidden", "eval": "s.pt", "device": "cuda", "out": "o", "bits": 5, "precision": "float32",
    }  # fmt: skip
    for field in fields(TrainConfig):
        value = getattr(usual, field.name)
        if field.name in other:
            value = other[field.name]
        elif isinstance(value, bool):
            value = not value
        elif isinstance(value, float):
            value = value / 3 + 0.01
        else:
            value = (value or 0) + 7
        assert value != getattr(usual, field.name)
        config = resolve({"recipe": recipe, field.name: value})
        assert getattr(config, field.name) == value, field.name


def test_flags_override_a_recipe(nothing_downloaded):
    config = parse("--recipe kd --distill logits+30*score --alpha 0.5 --beta 7 --act-bits 4")
    assert (config.bits, config.weights, config.act_bits) == (2, "ternary", 4)
    assert config.loss_weights == {"logits": 0.5, "score": 30.0}
    config = parse("--recipe tt --task snips --tt-rank 5 --distill logits+map --bits 4")
    assert (config.task, config.tt_rank, config.bits) == ("snips", 5, 4)
    assert config.act_range == "static" and config.loss_weights == {"logits": 0.5, "map": 100.0}
    config = parse("--recipe kd --bits 4 --weights lsq")
    assert config.weight_range == "lsq" and config.attention_bits == 8


def test_order_of_defaults(nothing_downloaded, monkeypatch):
    """TrainConfig < model < task < sample < recipe < what is typed."""
    values = {"recipe": 6.0, "sample": 5.0, "task's model": 4.0, "task": 3.0, "model": 2.0}
    monkeypatch.setitem(RECIPES, "kd", {**RECIPES["kd"], "beta": values["recipe"]})
    monkeypatch.setitem(MODEL_DEFAULTS, "scratch", {"beta": values["model"], "lr": 2.0})
    row = TASKS["atis"]
    defaults = {
        "*": {"beta": values["task"], "layers": 3},
        "scratch": {"beta": values["task's model"], "hidden": 4},
        "sample": {"beta": values["sample"], "epochs": 5},
    }
    monkeypatch.setitem(TASKS, "atis", type(row)(**{**vars(row), "defaults": defaults}))

    def beta(*options):
        return resolve({"task": "atis", **dict(options)}).beta

    assert beta(("recipe", "kd"), ("beta", 7.0)) == 7.0
    for name in ("recipe", "sample", "task's model", "task", "model"):
        given = [("recipe", "kd")] if name == "recipe" else []
        assert beta(*given) == values[name]
        for each in (RECIPES["kd"], *(defaults[x] for x in ("sample", "scratch", "*"))):
            if each.get("beta") == values[name]:
                del each["beta"]
    config = resolve({"task": "atis"})
    assert (config.lr, config.layers, config.hidden, config.epochs) == (2.0, 3, 4, 5)
    assert beta(("model", "other.pt")) == TrainConfig.beta


def test_defaults_of_glue(nothing_downloaded):
    config = parse("--task cola")
    assert config.model == "minilm"
    assert config.beta == TASKS["cola"].defaults["*"]["beta"] == 600.0
    assert parse().beta == TrainConfig.beta == 100.0
    assert parse("--model mini").loss_weights == {"logits": 0.5, "context": 100.0}
    config = parse("--task cola --beta 2.0 --distill logits+residual")
    assert config.loss_weights == {"logits": 0.5, "residual": 2.0}
    assert (config.epochs, config.student_epochs, config.lr) == (3, 2, 1e-4)


def test_defaults_of_joint_tasks(nothing_downloaded):
    config = parse(f"--task atis --data-dir {FLIGHTS}")
    defaults = TASKS["atis"].defaults["scratch"]
    assert {name: getattr(config, name) for name in defaults} == defaults
    assert config.hidden == 768 and config.batch_size == 32
    sample = parse("--task atis")  # the sample is small
    assert (sample.hidden, sample.epochs, sample.batch_size, sample.lr) == (128, 20, 8, 2e-3)
    assert sample.student_lr == 5e-4 and sample.student_epochs == 6
    assert parse().label_smoothing == 0.0


def test_defaults_that_follow_other_options(nothing_downloaded):
    config = parse("--model x.pt --epochs 5 --steps 9 --lr 1e-2")
    assert (config.student_epochs, config.student_steps, config.student_lr) == (5, 9, 1e-2)
    config = parse("--epochs 5 --lr 1e-2 --student-epochs 2 --student-steps 4 --student-lr 1e-3")
    assert (config.student_epochs, config.student_steps, config.student_lr) == (2, 4, 1e-3)
    rates = {2: 1e-3, 3: 3e-4, 4: 1e-4, 8: 3e-5}  # of the built-in model
    assert {bits: parse(f"--bits {bits}").student_lr for bits in rates} == rates
    assert parse("--bits 2 --student-lr 1e-5").student_lr == 1e-5
    assert parse("--weights lsq").weight_range == "lsq"
    assert parse("--weights lsq --weight-range mse").weight_range == "mse"
    assert parse("--weights ternary --bits 2").weight_range == "minmax"


def test_default_model_is_the_first_that_is_there(nothing_downloaded, tmp_path):
    assert parse().model == "mini" and parse("--task snips").model == "scratch"
    os.mkdir(tmp_path / "weights")
    (tmp_path / "weights" / "xlmr-base.pt").write_bytes(b"")
    assert parse().model == "xlmr-base" and parse("--model mini").model == "mini"
    assert parse("--task rte").model == "minilm"


# --------------------------------------------------------------------------- what options stand for
def test_lists_with_spaces_or_commas(nothing_downloaded):
    for text in ("--languages de zh --methods fp32 sdq", "--languages de,zh --methods fp32,sdq"):
        config = parse(text)
        assert config.languages == ("de", "zh") and config.methods == ("fp32", "sdq")


def test_resume_is_not_an_option_of_the_run(nothing_downloaded):
    assert parse_args(["--resume"]) == (parse(), True) and parse_args([])[1] is False


def test_parse_distill():
    assert parse_distill("none") == {}
    assert parse_distill("context") == {"context": None}
    assert parse_distill("logits+hidden") == {"logits": None, "hidden": None}
    assert list(parse_distill("score+map+output")) == ["score", "map", "output"]
    assert parse_distill("+".join(LOSSES)) == dict.fromkeys(LOSSES)
    weighted = parse_distill("2*logits+.5*map+3e-1*normed+0*hidden+150*output")
    assert weighted == {"logits": 2.0, "map": 0.5, "normed": 0.3, "hidden": 0.0, "output": 150.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is unknown: join any of logits, score"),
        ("logit", "'logit' is unknown"),
        ("logits+", "'' is unknown"),
        ("none+logits", "'none' is unknown"),
        ("layerwise+logits", "'layerwise' is unknown"),
        ("hidden+layerwise", "'layerwise' is unknown"),
        ("layerwise+layerwise", "'layerwise' is unknown"),
        ("logits+logits", "names logits twice"),
        ("1*map+2*map", "names map twice"),
        ("map+0.3*outptu", "'outptu' is unknown"),
        ("output=0.3", "'output=0.3' is unknown"),
        ("1*", "'' is unknown"),
        ("*output", "'' before output is not a weight, such as 150 or 0.5"),
        ("much*output", "'much' before output is not a weight"),
        ("1*2*output", "not a weight"),
        ("-0.1*output", "not a weight"),
        ("inf*output", "not a weight"),
        ("nan*output", "not a weight"),
        ("x*logits", "'x' before logits is not a weight"),
        ("2**map", "'2*' before map is not a weight"),
        ("map*2", "'2' is unknown"),
        ("2*layerwise", "'layerwise' is unknown"),
    ],
)
def test_invalid_losses_and_weights(text, message):
    with pytest.raises(ValueError) as error:
        parse_distill(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("distill", "alpha", "beta", "weights"),
    [
        ("logits+map+output+hidden", 0.5, 10.0, {"logits": 0.5, "map": 10.0, "output": 10.0, "hidden": 10.0}),
        # gamma = 0.3 of Kim et al. 2022: gamma beta map + (1 - gamma) beta output
        ("logits+3*map+7*output+hidden", 0.5, 10.0, {"logits": 0.5, "map": 3.0, "output": 7.0, "hidden": 10.0}),
        # the forms in their code: map + c * output, c * map + output
        ("map+0.3*output", 1.0, 1.0, {"map": 1.0, "output": 0.3}),
        ("0.3*map+output", 1.0, 1.0, {"map": 0.3, "output": 1.0}),
        # weights of its own: neither alpha nor beta applies
        ("2*logits+0.1*map+output+0*hidden", 1.0, 9.0, {"logits": 2.0, "map": 0.1, "output": 9.0, "hidden": 0.0}),
        ("none", 1.0, 1.0, {}),
        *((name, 0.7, 1.0, {}) for name in LAYERWISE),
    ],
)
def test_loss_weights(distill, alpha, beta, weights):
    found = TrainConfig(distill=distill, alpha=alpha, beta=beta).loss_weights
    assert found == weights and list(found) == list(weights)


def test_quantizers_of_each_row(nothing_downloaded):
    words = "--bits 4 --act-bits 6 --weights lsq --attention-bits 5 --act-range learned --noise 0.3"
    config = parse(words)
    ranges = {name: quant_config(config, name).act_range for name in ("ptq", "qat", "sdq")}
    assert ranges == {"ptq": "static", "qat": "learned", "sdq": "learned"}
    quant = quant_config(config, "sdq")
    assert (quant.weight_bits, quant.act_bits, quant.attention_bits) == (4, 6, 5)
    assert (quant.weights, quant.weight_range, quant.noise) == ("lsq", "lsq", 0.3)
    assert quant.per_channel and quant.per_token and quant.keep == ("head",)
    assert quant_config(config, "ptq").noise == 1.0  # it is not trained
    tensor = quant_config(parse("--per-tensor"), "ptq")
    assert not tensor.per_channel and not tensor.per_token and tensor.act_range == "dynamic"
    assert quant_config(parse(), "ptq-static").act_range == "static"
    trains = parse("--tt-rank 3 --tt-embedding-rank 7")
    assert tt_config(trains) == TTConfig(3, 7) and quant_config(trains, "ptq").keep == ()
    assert tt_config(parse()) is None


def test_default_folders_tell_settings_apart(nothing_downloaded):
    def folder(*options):
        return default_out(parse_args(options)[0])

    arms = ("", "--bits 4", "--distill logits", "--noise 1", "--lr 1e-3")
    assert len({folder(*SCRATCH, *options.split()) for options in arms}) == 5
    for same in ("--threads 1", "--device cpu", "--analyze", "--check-student"):
        assert folder(*SCRATCH) == folder(*SCRATCH, *same.split())
    plain = folder("--task", "xnli", "--bits", "8")
    assert plain == os.path.join("out", "xnli-mini-w8a8-s0")
    assert folder("--model", "mini", "--epochs", str(MODEL_DEFAULTS["mini"]["epochs"])) == plain
    assert folder("--model", "xlmr-base") == os.path.join("out", "xnli-xlmr-base-w8a8-s0")
    paths = [folder("--model", name) for name in ("a/mine.pt", "b/mine.pt")]
    assert paths[0] != paths[1] and all("xnli-mine-w8a8-s0-" in path for path in paths)


def test_default_folders_of_recipes(nothing_downloaded):
    def folder(text):
        return os.path.basename(default_out(parse(text)))

    assert folder("--recipe sdq") == "xnli-mini-w8a8-s0"
    assert folder("--recipe kd --task stsb --seed 3") == "stsb-minilm-kd-w2a8-s3"
    assert folder("--recipe tt --bits 4") == "atis-scratch-tt-w4a8-s0"
    changed = folder("--recipe kd --beta 1")
    assert changed.startswith("xnli-mini-kd-w2a8-s0-") and changed != folder("--recipe kd --beta 2")


# ----------------------------------------------------------------------------------------- mistakes
ON_SCRATCH = f"--model scratch --tokenizer {TOKENIZER}"
ON_FLIGHTS = f"--task atis --data-dir {FLIGHTS} --layers 2 --hidden 32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # names and numbers
        ("--recipe xyz", "--recipe 'xyz': choose from sdq, kd, tt"),
        ("--task xnil", "unknown task 'xnil'; known: xnli"),
        ("--frobnicate 3", "unrecognized arguments"),
        ("--student-l 3", "unrecognized arguments"),  # no abbreviations
        ("--bits x", "invalid int value"),
        ("--bits 1", "--bits 1: choose 2 to 8, or 32"),
        ("--bits 9", "--bits 9"),
        ("--bits 16", "--bits 16"),
        ("--act-bits 1", "--act-bits 1"),
        ("--act-bits 31", "--act-bits 31"),
        ("--attention-bits 1", "--attention-bits 1: choose 2 to 8, or 32"),
        ("--noise 1.5", "--noise 1.5: choose a fraction from 0 to 1"),
        ("--noise nan", "--noise nan"),
        ("--epochs 0", "--epochs 0"),
        ("--student-epochs 0", "--student-epochs 0"),
        ("--steps 0", "--steps 0"),
        ("--student-steps 0", "--student-steps 0"),
        ("--batch-size 0", "--batch-size 0"),
        ("--eval-every 0", "--eval-every 0"),
        ("--threads 0", "--threads 0"),
        ("--max-train 0", "--max-train 0"),
        ("--max-eval 0", "--max-eval 0"),
        ("--temperature 0", "--temperature 0"),
        ("--lr 0", "--lr 0"),
        ("--student-lr 0", "--student-lr 0"),
        ("--dropout 1", "--dropout 1"),
        ("--student-dropout 1", "--student-dropout 1"),
        ("--label-smoothing 1", "--label-smoothing 1"),
        ("--alpha -1", "--alpha -1"),
        ("--beta inf", "--beta inf"),
        ("--max-length 3", "--max-length 3"),
        ("--seed -1", "--seed -1"),
        ("--task-weight -1", "--task-weight -1"),
        ("--task-weight 2", "--task-weight 2.0: choose a value from 0 to 1"),
        ("--eval-split train", "--eval-split 'train': choose from test, dev"),
        ("--precision fp16", "--precision 'fp16': choose from auto, float32, bfloat16"),
        ("--device tpu", "--device 'tpu'"),
        ("--languages xx", "'xx': xnli has ar bg de"),
        ("--languages en,", "--languages ''"),
        # rows of the report
        ("--methods fp32 magic", "'magic' is unknown"),
        ("--methods ptq ptq", "named twice"),
        ("--bits 32 --act-bits 32", "use --methods fp32"),
        ("--act-range static --methods ptq-static", "drop ptq-static"),
        ("--act-range learned --methods ptq ptq-static", "drop ptq-static"),
        ("--act-bits 32 --methods ptq-static", "static ranges need quantized activations"),
        ("--act-range static --act-bits 32", "static ranges need quantized activations"),
        ("--act-range learned --act-bits 32", "learned ranges need quantized activations"),
        # quantizers
        ("--act-range fixed", "--act-range 'fixed': choose from dynamic, static"),
        ("--weight-range best", "--weight-range 'best': --weights uniform has minmax, mse"),
        ("--weight-range lsq", "--weight-range 'lsq': --weights uniform has minmax, mse"),
        ("--weights ternary --bits 2 --weight-range mse", "--weights ternary has minmax"),
        ("--weights octal", "--weights 'octal': choose from uniform, ternary, lsq"),
        ("--weights ternary", "--weights ternary has 2 bits, not --bits 8"),
        ("--recipe kd --bits 4", "--weights ternary has 2 bits, not --bits 4"),
        ("--weights lsq --bits 32", "--weights lsq needs quantized weights: --bits 2 to 8"),
        ("--weights lsq --tt-rank 4", "tensor trains have learned scales"),
        ("--weights ternary --bits 2 --tt-rank 4", "tensor trains have learned scales"),
        ("--tt-embedding-rank 4", "--tt-embedding-rank needs --tt-rank"),
        # losses
        ("--distill none", "use --methods fp32 ptq qat"),
        ("--alpha 0 --beta 0", "so sdq would be qat: use --methods fp32 ptq qat"),
        ("--distill logits --alpha 0", "so sdq would be qat: use --methods fp32 ptq qat"),
        ("--distill context --beta 0", "so sdq would be qat: use --methods fp32 ptq qat"),
        ("--distill 0*map", "so sdq would be qat: use --methods fp32 ptq qat"),
        ("--distill logit", "'logit' is unknown"),
        ("--distill map+map", "names map twice"),
        ("--distill x*logits", "'x' before logits is not a weight"),
        ("--distill -1*logits+map", "expected one argument"),  # argparse takes it for an option
        ("--distill map+-1*logits", "'-1' before logits is not a weight"),
        ("--distill layerwise-sideways", "'layerwise-sideways' is unknown"),
        ("--distill layerwise+logits", "'layerwise' is unknown: join any of logits, score"),
        ("--accumulate 0", "--accumulate 0: choose a value from 1"),
        ("--accumulate 33", "--accumulate: a batch has fewer rows"),
        ("--task tsv", "--task tsv needs --data-dir DIR"),
        ("--task tsv --data-dir nowhere", "no file nowhere/train.tsv: name its folder with --data-dir"),
        ("--train-language de", "--train-language de: xnli is trained on en, drop it"),
        ("--epochs -1", "--epochs -1: choose a value from 0"),
        ("--epochs 0", "--epochs 0: mini has no head of classes for xnli"),
        (f"{ON_SCRATCH} --epochs 0", "--model scratch has random weights"),
        # models
        ("--layers 3", "--layers shapes a new model: it needs --model scratch"),
        ("--hidden 64", "--hidden shapes a new model: it needs --model scratch"),
        ("--tokenizer x.model", "--tokenizer shapes a new model"),
        ("--model scratch", "--model scratch needs --tokenizer"),
        (f"{ON_SCRATCH} --hidden 200", "--hidden 200: choose a multiple of 64, or less than 128"),
        (f"{ON_SCRATCH} --layers 0", "--layers 0"),
        (f"{ON_SCRATCH} --layers 300", "num_layers is 300, not an integer from 1 to 200"),
        ("--model scratch --tokenizer nowhere.model", "no tokenizer at nowhere.model"),
        ("--model gpt", "no model 'gpt'"),
        ("--model nowhere/x.pt", "no model 'nowhere/x.pt'"),
        ("--model xlmr-large", "python convert.py xlmr-large --from DIR"),
        ("--model xlmr-base", "python convert.py xlmr-base'"),
        # joint tasks and tensor trains
        (f"{ON_FLIGHTS} --data-dir nowhere", "python data/fetch.py atis"),
        (f"{ON_FLIGHTS} --max-length 8", "use --max-length"),
        (f"{ON_FLIGHTS} --tt-rank -1", "--tt-rank -1: choose 1 to 4096"),
        (f"{ON_FLIGHTS} --tt-rank 4 --tt-embedding-rank -1", "--tt-embedding-rank -1: choose 0 to 4096"),
        (f"{ON_FLIGHTS} --bits 32 --act-bits 32 --tt-rank 4", "use --methods fp32"),
        (f"{ON_FLIGHTS} --languages de", "--languages 'de': atis has en"),
    ],
)
def test_mistakes_are_answered_in_one_line(options, message, capsys, tmp_path, nothing_downloaded):
    status, error = answer(capsys, *options.split(), "--out", str(tmp_path / "run"))
    assert status == 2 and message in error
    assert not (tmp_path / "run").exists() and not (tmp_path / "teachers").exists()


def test_every_check_is_in_the_table():
    """Each bound and each choice has a row above."""
    (mark,) = test_mistakes_are_answered_in_one_line.pytestmark
    rows = " ".join(options for options, _ in mark.args[1])
    for name in (*config_module.BOUNDS, *config_module.CHOICES):
        assert flag(name) in rows


def test_language_of_a_task_without_a_list(monkeypatch, nothing_downloaded):
    """If only the files know the languages, the options cannot check them."""
    row = TASKS["xnli"]
    monkeypatch.setitem(TASKS, "xnli", type(row)(**{**vars(row), "languages": None}))
    assert parse("--languages xx").languages == ("xx",)
    with pytest.raises(UserError, match="--recipe 'xyz'"):
        resolve({"recipe": "xyz"})

"""Every option of train.py: its default, its help and its check, which needs no data.

TrainConfig is what config.json records. A flag is the name of its field with dashes. One flag per ablation.
Precedence of defaults, lowest first:

    TrainConfig  <  the model  <  the task (data/tasks.py)  <  --recipe  <  student_lr_at  <  what is typed
"""

import argparse
import hashlib
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import chain

from checkpoint import WEIGHTS_DIR, default_keep
from data.tasks import RAW_DIR, TASKS, Task, find_data, find_task, own_language
from distill import LAYERWISE, LOSSES
from kit.common import UserError, flag
from prepare import WEIGHTS, check_quant
from quant import QuantConfig
from tt import TTConfig

METHODS = {
    "fp32": "the teacher: a pretrained encoder fine-tuned on the task",
    "ptq": "post-training quantization: its weights and activations rounded, without training",
    "ptq-static": "the same with activation ranges from calibration batches",
    "qat": "trained through the quantizers, with quantization noise and the loss of the task",
    "sdq": "qat, and distilled from the teacher",
}
TRAINED = ("qat", "sdq")
RECIPES = {
    "sdq": {},
    "kd": dict(bits=2, weights="ternary", attention_bits=8, noise=1.0, distill="logits+map", alpha=1.0, beta=600.0),
    "tt": dict(
        task="atis", tt_rank=20, act_range="static", weight_range="mse", distill="layerwise", student_dropout=0.1
    ),
}
RECIPE_HELP = {
    "sdq": "8 bits with quantization noise, logits and attention contexts (arXiv 2307.05972)",
    "kd": "ternary weights, logits and attention maps (arXiv 2211.11014)",
    "tt": "quantized tensor trains, layer by layer (arXiv 2306.01076); --task atis",
}
# student_lr_at: bits, or pq -> student_lr. With few bits a weight must move far to reach the next step of its grid.
# Chosen on dev with seed 0, the same for QAT and SDQ (docs/log.md).
MODEL_DEFAULTS = {
    "mini": dict(epochs=2, student_epochs=1, lr=3e-4, student_lr=3e-5, dropout=0.0)
    | {"student_lr_at": {2: 1e-3, 3: 3e-4, 4: 1e-4, "pq": 1e-4}},
    "scratch": dict(layers=4, hidden=256, epochs=3, lr=5e-4),
}

TASK, MODEL, QUANT = "task and data", "model", "quantization"
DISTILL, OPTIM, RUN = "distillation (the sdq row)", "training", "run"


def option(default, group: str, text: str, metavar: str | None = None):
    return field(default=default, metadata={"group": group, "text": text, "metavar": metavar})


@dataclass(frozen=True)
class TrainConfig:
    """Every option of a run."""

    recipe: str = option("sdq", TASK, "defaults of a paper, see below; any other option overrides them")
    task: str = option("xnli", TASK, f"one of {' '.join(TASKS)}")
    data_dir: str | None = option(None, TASK, "folder of the files (default: data/raw, or built-in data)", "DIR")
    languages: tuple[str, ...] = option((), TASK, "test languages besides the training language (default: all)")
    eval_split: str = option("test", TASK, "report on test or dev; with dev, rows held out of train select the epoch")
    train_language: str | None = option(
        None, TASK, "of the rows of --task tsv to train on (default: the only one, or en)"
    )
    max_train: int | None = option(None, TASK, "train on N random examples (default: all)")
    max_eval: int | None = option(None, TASK, "evaluate N random examples per language (default: all)")
    max_length: int = option(128, TASK, "longest sequence in tokens; longer texts are cut")

    model: str | None = option(
        None,
        MODEL,
        "mini (built in), scratch (random weights), NAME of weights/NAME.pt, or a path (default: xlmr-base if it was "
        "converted, else mini; glue minilm; atis, snips scratch)",
        "M",
    )
    layers: int | None = option(None, MODEL, "number of layers of --model scratch")
    hidden: int | None = option(None, MODEL, "hidden size of --model scratch, 64 per head")
    tokenizer: str | None = option(
        None, MODEL, "SentencePiece model for --model scratch (atis and snips: the words of the training set)", "FILE"
    )
    tt_rank: int = option(
        0, MODEL, "rank of tensor trains instead of matrices (of a pretrained model: in its students); 0 for none", "R"
    )
    tt_embedding_rank: int = option(0, MODEL, "rank of the word embeddings; 0 keeps the table", "R")

    methods: tuple[str, ...] = option(("fp32", "ptq", "qat", "sdq"), QUANT, "rows of the report, see below")
    bits: int = option(8, QUANT, "bits of weights and word embeddings: 2 to 8, 32 for float32")
    act_bits: int = option(8, QUANT, "bits of activations: 2 to 8, 32 for float32")
    attention_bits: int = option(32, QUANT, "bits of Q, K, V and the attention probabilities: 2 to 8, 32 for float32")
    weights: str = option("uniform", QUANT, ", ".join(f"{name} ({row.help})" for name, row in WEIGHTS.items()))
    weight_range: str | None = option(
        None, QUANT, "minmax; mse: clip outliers; lsq: where trained scales start (default: minmax, of lsq lsq)"
    )
    per_tensor: bool = option(False, QUANT, "one scale per matrix and activation, not per channel and token")
    act_range: str = option("dynamic", QUANT, "dynamic: at run time; static: calibrated; learned: trained from there")
    noise: float = option(
        0.5, QUANT, "fraction of the weights quantized at a training step (lsq: all; pq: set to 0, default 0.1)", "P"
    )

    distill: str = option(
        "logits+context",
        DISTILL,
        f"losses joined by '+', each with a weight before it if wanted (logits+150*map): {' '.join(LOSSES)}; or none; "
        f"or {', '.join(LAYERWISE)}",
        "LOSSES",
    )
    alpha: float = option(0.5, DISTILL, "weight of the logits")
    beta: float = option(100.0, DISTILL, "weight of every other loss that has none in --distill")
    temperature: float = option(1.0, DISTILL, "softens the logits of teacher and student")
    task_weight: float = option(1.0, DISTILL, "weight of the loss of the task; 0 distills without labels")

    epochs: int = option(3, OPTIM, "passes over the training set; 0: the model is a teacher as it stands")
    student_epochs: int | None = option(None, OPTIM, "of qat and sdq (default: --epochs)")
    steps: int | None = option(None, OPTIM, "stop every training after N steps")
    student_steps: int | None = option(None, OPTIM, "of qat and sdq (default: --steps)")
    batch_size: int = option(32, OPTIM, "examples per step")
    accumulate: int = option(1, OPTIM, "parts in which a batch is computed, for less memory")
    lr: float = option(2e-5, OPTIM, "peak learning rate")
    student_lr: float | None = option(None, OPTIM, "of qat and sdq (default: --lr; higher below 8 bits)")
    label_smoothing: float = option(0.0, OPTIM, "of the cross-entropy")
    dropout: float = option(0.1, OPTIM, "while the teacher trains")
    student_dropout: float = option(0.0, OPTIM, "while qat and sdq train; it disturbs distillation")

    eval: str | None = option(None, RUN, "train nothing: evaluate this student.pt as an integer model", "FILE")
    analyze: bool = option(False, RUN, "also measure the error and attention of each layer on dev")
    check_student: bool = option(False, RUN, "also evaluate the fake-quantized student; on CUDA always")
    seed: int = option(0, RUN, "of weights, batches, dropout and noise")
    device: str = option("auto", RUN, "auto, cpu or cuda")
    threads: int | None = option(None, RUN, "CPU threads (default: all cores)")
    precision: str = option(
        "auto",
        RUN,
        "of products in training: float32; bfloat16; auto: the latter if the hardware has it (not if hidden < 256)",
    )
    out: str | None = option(None, RUN, "folder of this run (default: out/TASK-MODEL-wBaA-sSEED)", "DIR")
    eval_every: int | None = option(None, RUN, "steps between evaluations on dev (default: an epoch)")

    @property
    def row(self) -> Task:
        """The row of the task."""
        return find_task(self.task, self.train_language)

    @cached_property
    def loss_weights(self) -> dict[str, float]:
        """Loss, a key of distill.LOSSES -> its weight: its own, alpha of the logits, or beta."""
        own = parse_distill(self.distill)
        usual = {name: self.alpha if name == "logits" else self.beta for name in own}
        return {name: usual[name] if own[name] is None else own[name] for name in own}


def parse_distill(text: str) -> dict[str, float | None]:
    """The losses of a --distill value, and their own weights; none for "none" and layer-by-layer distillation.

    >>> parse_distill("logits+30*score"), parse_distill("none")
    ({'logits': None, 'score': 30.0}, {})

    Raises ValueError for an unknown or repeated loss and for a weight that is no number >= 0.
    """
    found: dict[str, float | None] = {}
    for part in [] if text == "none" or text in LAYERWISE else text.split("+"):
        weight, star, name = part.rpartition("*")
        if name not in LOSSES:
            known = f"join any of {', '.join(LOSSES)} with '+', or use none or {', '.join(LAYERWISE)}"
            raise ValueError(f"distill={text}: {name!r} is unknown: {known}")
        if name in found:
            raise ValueError(f"distill={text}: it names {name} twice")
        try:
            own = float(weight) if star else None
        except ValueError:
            own = -1.0
        if own is not None and not 0 <= own < math.inf:
            raise ValueError(f"distill={text}: {weight!r} before {name} is not a weight, such as 150 or 0.5")
        found[name] = own
    return found


def tt_config(config: TrainConfig) -> TTConfig | None:
    return TTConfig(config.tt_rank, config.tt_embedding_rank) if config.tt_rank else None


def quant_config(config: TrainConfig, method: str) -> QuantConfig:
    """How a row of the report is quantized."""
    act_range = "static" if method == "ptq-static" else config.act_range
    if act_range == "learned" and method not in TRAINED:
        act_range = "static"  # where learning starts
    return QuantConfig(
        weight_bits=config.bits,
        act_bits=config.act_bits,
        per_channel=not config.per_tensor,
        per_token=not config.per_tensor,
        weights=config.weights,
        weight_range=config.weight_range,
        act_range=act_range,
        attention_bits=config.attention_bits,
        noise=config.noise if method in TRAINED else 1.0,
        keep=default_keep(tt_config(config)),
    )


# --------------------------------------------------------------------------------------- defaults
def resolve(given: dict) -> TrainConfig:
    """The options of a run with all defaults filled in. given: the options that were typed."""
    recipe = given.get("recipe", "sdq")
    if recipe not in RECIPES:
        raise UserError(f"--recipe {recipe!r}: choose from {', '.join(RECIPES)}")
    task = find_task(given.get("task", RECIPES[recipe].get("task", "xnli")))
    there = (m for m in task.models if os.path.isfile(os.path.join(WEIGHTS_DIR, m + ".pt")))
    model = given.get("model") or next(there, task.models[-1])
    values = dict(MODEL_DEFAULTS.get(model, {}))
    values |= task.defaults.get("*", {}) | task.defaults.get(model, {})
    if find_data(task, given.get("data_dir"), model) != (given.get("data_dir") or RAW_DIR):
        values |= task.defaults.get("sample", {})
    rates = values.pop("student_lr_at", {})
    values |= RECIPES[recipe] | given | {"task": task.name, "model": model}
    kind = "pq" if values.get("weights") == "pq" else values.get("bits", 8)
    if "student_lr" not in given and kind in rates:
        values["student_lr"] = rates[kind]
    if values.get("weights") in WEIGHTS:
        values.setdefault("noise", WEIGHTS[values["weights"]].noise)
    if not task.train_language and values.get("data_dir") and not values.get("eval"):
        values["train_language"] = own_language(task, values["data_dir"], values.get("train_language"))
    config = TrainConfig(**values)
    ranges = WEIGHTS[config.weights].ranges if config.weights in WEIGHTS else ("minmax",)
    defaults = {
        "weight_range": ranges[0],
        "student_epochs": config.epochs or TrainConfig.epochs,
        "student_steps": config.steps,
        "student_lr": config.lr,
    }
    values |= {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return TrainConfig(**values)


def defaults_in_words(spec) -> str:
    """The defaults of an option for its help text, such as (default: 2e-05; mini 0.0003, glue 0.0001)."""

    def word(value) -> str:
        if isinstance(value, tuple):
            return " ".join(value)
        return f"{value:g}" if isinstance(value, float) else str(value)

    rows = MODEL_DEFAULTS | RECIPES
    for task in TASKS.values():
        rows |= {task.subfolder.split("/")[0]: row for row in list(task.defaults.values())[:1]}
    others = [f"{name} {word(row[spec.name])}" for name, row in rows.items() if spec.name in row]
    if spec.default in (None, (), False):
        return f" ({', '.join(others)})" if others else ""
    return f" (default: {'; '.join([word(spec.default), ', '.join(others)][: 1 + bool(others)])})"


# ----------------------------------------------------------------------------------- command line
class OneLineParser(argparse.ArgumentParser):
    """argparse, but a mistake is answered in one line instead of the whole usage."""

    def error(self, message: str):
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def build_parser() -> argparse.ArgumentParser:
    lists = {"recipes": RECIPE_HELP, "methods": METHODS}
    texts = [
        f"{title}:\n" + "".join(f"  {name:<11} {text}\n" for name, text in rows.items())
        for title, rows in lists.items()
    ]
    parser = OneLineParser(
        prog="train.py",
        usage="python train.py [options]",
        allow_abbrev=False,
        description="Fine-tune a teacher, quantize it in several ways, and report all of them.",
        epilog="\n".join(texts) + "\nexamples:\n"
        "  python train.py --task xnli --bits 8\n"
        "  python train.py --task xnli --eval out/xnli-mini-w8a8-s0/student.pt\n"
        "  python train.py --task xnli --bits 4 --distill logits            # one ablation\n"
        "  python train.py --task stsb --recipe kd\n"
        "  python train.py --task atis --recipe tt --bits 4",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=112, max_help_position=28),
    )
    groups = {}
    for spec in fields(TrainConfig):
        title, kind = spec.metadata["group"], str(spec.type)
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        group = groups[title]
        text = (spec.metadata["text"] + defaults_in_words(spec)).replace("%", "%%")
        kwargs = dict(default=argparse.SUPPRESS, help=text)
        if "bool" in kind:
            group.add_argument(flag(spec.name), action="store_true", **kwargs)
            continue
        kwargs["metavar"] = spec.metadata["metavar"] or ("N" if "int" in kind else "X")
        if "tuple" in kind:
            kwargs["nargs"] = "+"
        kwargs["type"] = int if "int" in kind else float if "float" in kind else str
        group.add_argument(flag(spec.name), **kwargs)
    return parser


def parse_args(argv: list[str] | None) -> tuple[TrainConfig, bool]:
    """Command line -> (checked options, --resume)."""
    parser = build_parser()
    parser.add_argument("--resume", action="store_true", help="continue a stopped run of the same options")
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume")
    for name in {"languages", "methods"} & set(given):  # "en de" and "en,de" both work
        given[name] = tuple(part for text in given[name] for part in text.split(","))
    config = resolve(given)
    check(config)
    if config.eval and "max_length" in given:
        raise UserError("--max-length: --eval cuts texts where the student's training did, drop it")
    return config, resume


# ----------------------------------------------------------------------------------------- checks
PRECISIONS = ("auto", "float32", "bfloat16")
CHOICES = dict(eval_split=("test", "dev"), device=("auto", "cpu", "cuda"), precision=PRECISIONS)
BOUNDS = {  # name -> (least, largest)
    **dict(task_weight=(0, 1), temperature=(1e-3, 1e3), seed=(0, 2**31), max_length=(8, 10**6)),
    "epochs": (0, 10**9),
    **dict.fromkeys(("dropout", "student_dropout", "label_smoothing"), (0, 0.9)),
    **dict.fromkeys(("alpha", "beta"), (0, 1e9)),
    **dict.fromkeys(("lr", "student_lr"), (1e-12, 1e38)),
    **dict.fromkeys("accumulate max_train max_eval layers hidden batch_size threads eval_every".split(), (1, 10**9)),
    **dict.fromkeys("student_epochs steps student_steps".split(), (1, 10**9)),
}


def check(config: TrainConfig) -> None:
    """Raises UserError for options that can't be run, before any data is loaded: one line, with what to type instead."""
    for name, known in CHOICES.items():
        if getattr(config, name) not in known:
            raise UserError(f"{flag(name)} {getattr(config, name)!r}: choose from {', '.join(known)}")
    for name, (low, high) in BOUNDS.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:  # NaN neither
            raise UserError(f"{flag(name)} {value}: choose a value from {low:g} to {high:g}")
    try:
        tt_config(config)
        check_quant(quant_config(config, "qat"))
        parse_distill(config.distill)
    except ValueError as error:  # name=value -> --name value
        text = re.sub(r"\b((embedding_)?rank=)", r"tt_\1", str(error).replace("weight_bits=", "bits="))
        raise UserError(re.sub(r"\b(\w+)=", lambda m: flag(m[1]) + " ", text)) from None
    for is_wrong, message in rules(config, find_task(config.task)):
        if is_wrong:
            raise UserError(message)


def rules(config: TrainConfig, task: Task) -> Iterator[tuple[object, str]]:
    """(whether options contradict each other, what to say then)."""
    scratch = config.model == "scratch"
    for name in ("layers", "hidden", "tokenizer"):
        given = getattr(config, name) is not None
        yield given and not scratch, f"{flag(name)} shapes a new model: it needs --model scratch"
    words = config.tokenizer or task.names
    yield scratch and not words, "--model scratch needs --tokenizer FILE, a SentencePiece model"
    hidden = config.hidden or 64
    yield hidden % max(1, hidden // 64), f"--hidden {hidden}: choose a multiple of 64, or less than 128"
    own = not task.train_language
    yield (
        own and not config.data_dir,
        f"--task {task.name} needs --data-dir DIR, which holds {', '.join(chain(*task.files.values()))}",
    )
    language = f"--train-language {config.train_language}"
    yield config.train_language and not own, f"{language}: {task.name} is trained on {task.train_language}, drop it"
    yield scratch and not config.epochs, "--epochs 0 keeps a model as it stands: --model scratch has random weights"
    yield config.accumulate > config.batch_size, "--accumulate: a batch has fewer rows; choose --batch-size or less"
    yield config.tt_embedding_rank and not config.tt_rank, "--tt-embedding-rank needs --tt-rank"

    weights = f"--weights {config.weights}"
    cores = config.tt_rank and config.weights != "uniform"
    yield cores, f"{weights} is for matrices: cores of tensor trains have learned scales"
    staged = config.weights == "pq"
    yield (
        staged and config.distill in LAYERWISE,
        f"--weights pq has stages of its own: not with --distill {config.distill}",
    )
    zero = "--noise 1 sets all blocks of --weights pq to 0 while they wait for their stage: choose less"
    yield staged and config.noise == 1.0, zero

    methods, known = config.methods, " ".join(METHODS)
    for name in methods:
        yield name not in METHODS, f"--methods: {name!r} is unknown; choose from {known}"
    yield len(set(methods)) < len(methods), f"--methods: a row is named twice; choose from {known}"
    floats = config.act_bits == config.attention_bits == 32
    trains = config.tt_rank and not scratch  # the students differ from the teacher
    same = config.bits == 32 and floats and not trains and methods != ("fp32",)
    yield same, "--bits 32 --act-bits 32 quantizes nothing, so all rows would be fp32: use --methods fp32"
    ranges, static = config.act_range, "ptq-static" in methods
    drop = f"--act-range {ranges} makes ptq static: drop ptq-static from --methods"
    yield static and ranges != "dynamic", drop  # learned ranges start as static ones
    kind = "learned" if ranges == "learned" else "static"
    fixed = static or ranges != "dynamic"
    yield (
        fixed and floats,
        f"{kind} ranges need quantized activations: choose --act-bits 2 to 8, or --act-range dynamic",
    )

    distill, layerwise, sdq = f"--distill {config.distill}", config.distill in LAYERWISE, "sdq" in methods
    nothing = not layerwise and not any(config.loss_weights.values())
    yield sdq and nothing, f"{distill} has no loss with a weight, so sdq would be qat: use --methods fp32 ptq qat"


# Options that neither name a run nor keep it from being resumed. NOTE: threads, device and parts change the last bits of
# a result, so resuming is bit-exact only with the same ones.
NOT_COMPARED = ("device", "threads", "accumulate", "out", "analyze", "check_student", "eval")


NAMED = ("recipe", "task", "model", "bits", "act_bits")  # options in the name of a run; defaults depend on them


def usual(config: TrainConfig) -> TrainConfig:
    """The defaults of a run of this recipe, task, model and width."""
    return resolve({name: getattr(config, name) for name in NAMED})


def default_out(config: TrainConfig) -> str:
    """out/xnli-mini-w8a8-s0, and a short hash of all other options that were changed: one folder per setting."""
    model = os.path.splitext(os.path.basename(config.model))[0]
    recipe = "" if config.recipe == "sdq" else f"-{config.recipe}"
    name = f"{config.task}-{model}{recipe}-w{config.bits}a{config.act_bits}-s{config.seed}"
    defaults = usual(config)
    ignored = {*NAMED, "seed", *NOT_COMPARED} - ({"model"} if config.model != model else set())
    changed = [
        (spec.name, getattr(config, spec.name))
        for spec in fields(config)
        if spec.name not in ignored
        and (spec.name == "model" or getattr(config, spec.name) != getattr(defaults, spec.name))
    ]
    if changed:
        name += "-" + hashlib.sha256(repr(changed).encode()).hexdigest()[:6]
    return os.path.join("out", name)

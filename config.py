"""Every option of train.py: its default, its help and its check, which needs no data.

TrainConfig is what config.json records. A flag is the name of its field with dashes. One flag per ablation. Defaults
that depend on the model, the task or the recipe stand in one table, DEFAULTS.
"""

import argparse
import os
import re
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import torch

from data.tasks import RAW_DIR, TASKS, WEIGHTS_DIR, Task, find_data, find_task, own_language
from distill import LAST, LAYERWISE, LOSSES
from kit.common import UserError, flag, multiplies_bf16
from prepare import WEIGHTS, check_quant, default_keep
from quant import QuantConfig
from repair import REPAIRS
from tt import TTConfig

METHODS = {
    "fp32": "the teacher: a pretrained encoder fine-tuned on the task",
    "ptq": "post-training quantization: its weights and activations rounded, without training",
    "ptq-static": "the same with activation ranges from calibration batches",
    "qat": "trained through the quantizers, with quantization noise and the loss of the task",
    "sdq": "qat, and distilled from the teacher",
}  # each but fp32 may be followed by rows of REPAIRS: ptq+gptq+norm
TRAINED = ("qat", "sdq")
RECIPES = {
    "sdq": "8 bits with quantization noise, logits and attention contexts (arXiv 2307.05972)",
    "kd": "ternary weights; logits, hidden states, attention maps, no labels (arXiv 2211.11014)",
    "ternary": "the same with labels and scales per channel and token, without hidden states",
    "lsq": "trained scales; logits, scores and hidden states (arXiv 2101.05938)",
    "tt": "quantized tensor trains, layer by layer (arXiv 2306.01076); --task atis",
}
TERNARY = dict(bits=2, weights="ternary", attention_bits=8, noise=1.0, distill="logits+map", alpha=1.0, beta=600.0)
# Defaults in place of TrainConfig's, later rows before earlier ones; what is typed comes before all of them.
# student_lr_at: bits, or pq -> student_lr. With few bits a weight must move far to reach the next step of its grid.
# Chosen on dev with seed 0, the same for QAT and SDQ (docs/log.md).
DEFAULTS: dict[str, dict] = {
    # --model
    "mini": dict(epochs=2, student_epochs=1, lr=3e-4, student_lr=3e-5, dropout=0.0)
    | {"student_lr_at": {2: 1e-3, 3: 3e-4, 4: 1e-4, "pq": 1e-4}},
    "scratch": dict(shape="4x256", epochs=3, lr=5e-4),
    # --task: chosen for MiniLM on rows of STS-B's train.tsv that were held out; tags of words; ATIS and SNIPS from
    # scratch
    "glue": dict(epochs=3, student_epochs=2, lr=1e-4, dropout=0.1, beta=600.0, student_lr_at={2: 3e-4}),
    "token": dict(max_length=256),
    "joint": dict(shape="2x768", epochs=25, student_epochs=6, lr=1e-3, student_lr=5e-4, dropout=0.2),
    "joint sample": dict(shape="2x128", epochs=20, batch_size=8, lr=2e-3),
    "embed": dict(methods=("fp32", "ptq", "sdq"), epochs=0, student_epochs=3, student_steps=200, alpha=100.0)
    | dict(student_lr=3e-4, student_lr_at={}),
    # --recipe
    "sdq": {},
    "kd": TERNARY | dict(per_tensor=True, distill="0*task+logits+hidden+map"),
    # the authors' lengths and batches; --help leaves these rows out
    "kd, cola": dict(max_length=64, batch_size=16),
    "kd, sst2": dict(max_length=64),
    "ternary": TERNARY,
    "lsq": dict(bits=2, weights="lsq", act_range="learned", distill="logits+score+hidden"),
    "tt": dict(
        task="atis", tt_rank=20, act_range="static", weight_range="mse", distill="layerwise", student_dropout=0.1
    ),
}
GROUPS = {  # of --help, by the first option of each
    **{"recipe": "task and data", "model": "model", "methods": "quantization"},
    **{"distill": "distillation (the sdq row)", "epochs": "training", "analyze": "run"},
}


def option(default, text: str, kind: Callable | tuple[str, ...] = str, metavar: str = ""):
    """A field of TrainConfig with what argparse needs.  kind: what parses the text, or what may be chosen."""
    if default is False:
        how: dict = {"action": "store_true"}
    elif isinstance(kind, tuple):
        how = {"choices": kind, "metavar": "X"}
    else:
        how = {"type": kind, "metavar": metavar or ("N" if kind.__name__ == "int" else "X")}
    nargs = {"nargs": "+"} if isinstance(default, tuple) else {}
    return field(default=default, metadata={"help": text, **how, **nargs})


def between(kind: type, least: float, most: float) -> Callable[[str], float]:
    """An argparse type for numbers within limits."""

    def parse(text: str) -> float:
        if not least <= (value := kind(text)) <= most:  # NaN neither
            raise argparse.ArgumentTypeError(f"{text}: choose a value from {least:g} to {most:g}")
        return value

    parse.__name__ = kind.__name__
    return parse


COUNT, UINT = between(int, 1, 10**9), between(int, 0, 2**31)
FACTOR, FRACTION, RATE = between(float, 0, 1e9), between(float, 0, 0.9), between(float, 1e-12, 1e38)


@dataclass(frozen=True)
class TrainConfig:
    """Every option of a run."""

    recipe: str = option("sdq", "defaults of a paper, see below; any other option overrides them", tuple(RECIPES))
    task: str = option("xnli", f"one of {' '.join(TASKS)}")
    data_dir: str | None = option(None, "folder of the files (default: data/raw, or built-in data)", str, "DIR")
    languages: tuple[str, ...] = option((), "test languages besides the training language (default: all)")
    eval_split: str = option("test", "test or dev; with dev, rows held out of train select the epoch", ("test", "dev"))
    train_language: str | None = option(None, "of the rows of --task tsv to train on (default: the only one, or en)")
    max_train: int | None = option(None, "train on N random examples (default: all)", COUNT)
    max_eval: int | None = option(None, "evaluate N random examples per language (default: all)", COUNT)
    max_length: int = option(128, "longest sequence in tokens; longer texts are cut", between(int, 8, 10**6))

    model: str | None = option(
        None,
        "mini (built in), scratch (random weights; scratch-4x256: 4 layers, hidden size 256), NAME of weights/NAME."
        "safetensors, or a path (default: xlmr-base if it was converted, else mini; glue minilm; atis, snips scratch)",
        str,
        "M",
    )
    tokenizer: str | None = option(None, "SentencePiece model for scratch (atis, snips: words of train)", str, "FILE")
    tt_rank: int = option(0, "rank of tensor trains (of a pretrained model: its students); 0: none", UINT, "R")
    tt_embedding_rank: int = option(0, "rank of the word embeddings; 0 keeps the table", UINT, "R")

    methods: tuple[str, ...] = option(("fp32", "ptq", "qat", "sdq"), "rows of the report, see below")
    bits: int = option(8, "bits of weights and word embeddings: 2 to 8; 32: float32", int)
    act_bits: int = option(8, "bits of activations: 2 to 8; 32: float32", int)
    attention_bits: int = option(32, "bits of Q, K, V and the attention maps: 2 to 8; 32: float32", int)
    weights: str = option("uniform", ", ".join(f"{name} ({row.help})" for name, row in WEIGHTS.items()))
    weight_range: str | None = option(
        None, "minmax; mse: clips outliers (default below 8 bits or --per-tensor); lsq: where its scales start"
    )
    per_tensor: bool = option(False, "one scale per matrix and activation, not per channel and token")
    act_range: str = option("dynamic", "dynamic: at run time; static: calibrated; or learned")
    calibration: str | None = option(
        None, "texts, one per line, that set static ranges and that repairs read (default: of train)", str, "FILE"
    )
    noise: float = option(0.5, "share of weights quantized per step (lsq all, pq 0.1 zeroed)", float)

    distill: str = option(
        "logits+context",
        f"losses joined by '+', with weights if wanted (logits+150*map): {' '.join(LOSSES)}; map@last: of the last layer; "
        f"0*task: without labels; or none; or {', '.join(LAYERWISE)}",
        str,
        "LOSSES",
    )
    alpha: float = option(0.5, "weight of the logits", FACTOR)
    beta: float = option(100.0, "weight of every other loss without its own", FACTOR)
    temperature: float = option(1.0, "softens the logits of teacher and student", between(float, 1e-3, 1e3))

    epochs: int = option(3, "passes over the training set; 0: the model is a teacher as it stands", UINT)
    student_epochs: int | None = option(None, "of qat and sdq (default: --epochs)", COUNT)
    steps: int | None = option(None, "stop every training after N steps", COUNT)
    student_steps: int | None = option(None, "of qat and sdq (default: --steps)", COUNT)
    batch_size: int = option(32, "examples per step", COUNT)
    accumulate: int = option(1, "parts in which a batch is computed, for less memory", COUNT)
    lr: float = option(2e-5, "peak learning rate", RATE)
    student_lr: float | None = option(None, "of qat and sdq (default: --lr; more for few bits)", RATE)
    dropout: float = option(0.1, "while the teacher trains", FRACTION)
    student_dropout: float = option(0.0, "while qat and sdq train; it disturbs distillation", FRACTION)

    analyze: bool = option(False, "also measure each layer's error and attention, evaluate the fake-quantized student")
    seed: int = option(0, "of weights, batches, dropout and noise", UINT)
    gate: float | None = option(None, "exit status 1 if the last row loses over X points, mean or a language", FACTOR)
    device: str = option("auto", "auto, cpu or cuda", ("auto", "cpu", "cuda"))
    threads: int | None = option(None, "CPU threads (default: all cores)", COUNT)
    precision: str = option(
        "auto",
        "of products in training: float32; bfloat16; auto: the latter if the hardware has it (not if hidden < 256)",
        ("auto", "float32", "bfloat16"),
    )
    out: str | None = option(None, "folder of this run (default: out/ and what differs from defaults)", str, "DIR")
    eval_every: int | None = option(None, "steps between evaluations on dev (default: an epoch)", COUNT)

    @cached_property
    def loss_weights(self) -> dict[str, float]:
        """The losses of --distill and their weights: their own, alpha of the logits, or beta; {} for none and
        layer-by-layer distillation.  Losses: "task", keys of distill.LOSSES, and "map@last".

        Raises ValueError for an unknown or repeated loss and for a weight that is no number >= 0.
        """
        text, found, usual = self.distill, {}, {"logits": self.alpha, "task": 1.0}
        for part in [] if text == "none" or text in LAYERWISE else text.split("+"):
            weight, star, name = part.rpartition("*")
            if name not in ("task", *LOSSES, *(row + LAST for row in LOSSES if row != "logits")):
                known = f"join any of {', '.join(LOSSES)} with '+', as in logits+map{LAST}, or use none or {', '.join(LAYERWISE)}"
                raise ValueError(f"distill={text}: {name!r} is unknown: {known}")
            if name in found:
                raise ValueError(f"distill={text}: it names {name} twice")
            try:
                found[name] = FACTOR(weight) if star else usual.get(name, self.beta)
            except (ValueError, argparse.ArgumentTypeError):
                message = f"distill={text}: {weight!r} before {name} is not a weight, such as 150 or 0.5"
                raise ValueError(message) from None
        return found


# Options that do not make it another run. NOTE: threads, device and parts change the last bits of a result, so resuming
# is bit-exact only with the same ones.
SAME_RUN = ("device", "threads", "accumulate", "out", "analyze", "gate")


def tt_config(config: TrainConfig) -> TTConfig | None:
    ranks = config.tt_rank, config.tt_embedding_rank
    return TTConfig(*ranks) if any(ranks) else None


def base_of(method: str) -> str:
    """The row of METHODS that a method begins with: sdq of sdq+gptq."""
    return method.partition("+")[0]


def trains(method: str) -> bool:
    """Whether a row of the report is of a model that was trained after it was quantized."""
    return base_of(method) in TRAINED


def is_method(method: str) -> bool:
    """Whether it is a row of METHODS, or one that is quantized and rows of REPAIRS in their order."""
    base, *repairs = method.split("+")
    return base in METHODS and repairs == [name for name in REPAIRS if name in repairs and base != "fp32"]


def quant_config(config: TrainConfig, method: str) -> QuantConfig:
    """How a row of the report is quantized."""
    act_range = config.act_range
    if base_of(method) == "ptq-static" or (act_range == "learned" and not trains(method)):
        act_range = "static"  # where learning starts
    same = {name: getattr(config, name) for name in ("act_bits", "attention_bits", "weights", "weight_range")}
    fine, noise = not config.per_tensor, config.noise if trains(method) else 1.0
    keep = default_keep(tt_config(config))
    return QuantConfig(
        config.bits, per_channel=fine, per_token=fine, act_range=act_range, noise=noise, keep=keep, **same
    )


def scratch_shape(model: str) -> tuple[int, int] | None:
    """(layers, hidden size) of --model scratch-LAYERSxHIDDEN; None for any other model."""
    match = re.fullmatch(r"scratch-([1-9]\d*)x([1-9]\d*)", model)
    return (int(match[1]), int(match[2])) if match else None


# --------------------------------------------------------------------------------------- defaults
def resolve(given: dict) -> TrainConfig:
    """The options of a run with all defaults filled in. given: the options that were typed."""
    recipe = DEFAULTS[given.get("recipe", "sdq")]
    task = find_task(given.get("task", recipe.get("task", "xnli")))
    there = (m for m in task.models if os.path.isfile(os.path.join(WEIGHTS_DIR, m + ".safetensors")))
    model = given.get("model") or next(there, task.models[-1])
    kind = "scratch" if model == "scratch" or scratch_shape(model) else model
    rows = [kind] if kind in ("mini", "scratch") else []
    rows += ["glue"] if task.subfolder.startswith("glue/") else []
    rows += {"token": ["token"], "embedding": ["embed"]}.get(task.head, [])
    if task.head == "joint" and kind == "scratch":
        built_in = find_data(task, given.get("data_dir"), kind) not in (given.get("data_dir"), RAW_DIR)
        rows += ["joint", "joint sample"][: 1 + built_in]
    values = {name: value for row in rows for name, value in DEFAULTS.get(row, {}).items()}
    shape, rates = values.pop("shape", ""), values.pop("student_lr_at", {})
    values |= recipe | DEFAULTS.get(f"{given.get('recipe')}, {task.name}", {}) | given
    width = "pq" if values.get("weights") == "pq" else values.get("bits", 8)
    weights = WEIGHTS.get(values.get("weights"), WEIGHTS["uniform"])
    clips = (
        weights.ranges[0] == "minmax"
        and "mse" in weights.ranges
        and (values.get("bits", 8) < 8 or values.get("per_tensor"))
    )
    values = {"noise": weights.noise, "weight_range": "mse" if clips else weights.ranges[0]} | values
    values |= {"task": task.name, "model": f"scratch-{shape}" if model == "scratch" else model}
    values["student_lr"] = given.get("student_lr") or rates.get(width) or values.get("student_lr")
    if not task.train_language and values.get("data_dir"):
        values["train_language"] = own_language(task, values["data_dir"], values.get("train_language"))
    config = TrainConfig(**values)
    epochs, lr = config.student_epochs or config.epochs or TrainConfig.epochs, config.student_lr or config.lr
    return replace(config, student_epochs=epochs, student_steps=config.student_steps or config.steps, student_lr=lr)


MAX_NAME = 190
NAMED = ("recipe", "task", "model", "bits", "act_bits")  # in the name of each run; other defaults depend on them


def default_out(config: TrainConfig) -> str:
    """out/xnli-mini-w8a8-s0, and all other options that were changed: out/xnli-mini-w4a8-s0-distill-logits."""
    recipe = "" if config.recipe == "sdq" else f"-{config.recipe}"
    model = os.path.splitext(os.path.basename(config.model))[0]
    name = f"{config.task}-{model}{recipe}-w{config.bits}a{config.act_bits}-s{config.seed}"
    defaults = resolve({name: getattr(config, name) for name in NAMED})
    for spec in fields(config):
        value = getattr(config, spec.name)
        if value != getattr(defaults, spec.name) and spec.name not in (*NAMED, "seed", *SAME_RUN):
            text = "" if value is True else " ".join(value) if isinstance(value, tuple) else str(value)
            name += f"-{spec.name} {text}"
    text = re.sub(r"[^\w.+]+", "-", name, flags=re.ASCII).strip("-")
    if len(text) > MAX_NAME:  # a file's name has at most 255
        text = f"{text[:MAX_NAME]}-{zlib.crc32(text.encode()):08x}"
    return os.path.join("out", text)


# ----------------------------------------------------------------------------------- command line
def defaults_in_words(spec) -> str:
    """The defaults of an option for its help text, such as (default: 2e-05; mini 0.0003, glue 0.0001)."""

    def word(value) -> str:
        if value is True:
            return "on"
        return " ".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)

    names: dict[str, list[str]] = {}  # of rows, by their default
    for name, row in DEFAULTS.items():
        if spec.name in row and not name.startswith("kd, "):
            names.setdefault(word(row[spec.name]), []).append(name)
    others = ", ".join(f"{'/'.join(each)} {text}" for text, each in names.items())
    usual = "" if spec.default in (None, (), False) else word(spec.default)
    title = "" if "default: " in spec.metadata["help"] else "default: "
    return f" ({title}{'; '.join(filter(None, (usual, others)))})" if usual or others else ""


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a mistake is answered in one line instead of the whole usage."""

    def error(self, message: str):
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def build_parser() -> argparse.ArgumentParser:
    title = (
        "methods, followed by repairs in this order if wanted, as in ptq+gptq+norm, or in sdq+norm before the training"
    )
    lists = {"recipes": RECIPES, title: METHODS | {f"+{name}": row.help for name, row in REPAIRS.items()}}
    texts = [f"{title}:\n" + "".join(f"  {k:<12} {v}\n" for k, v in rows.items()) for title, rows in lists.items()]
    parser = OneLineParser(
        prog="train.py",
        usage="python train.py [options]",
        allow_abbrev=False,
        description="Fine-tune a teacher, quantize it in several ways, and report all of them.",
        epilog="\n".join(texts) + "\nexamples:\n"
        "  python train.py --task xnli --bits 8\n"
        "  python train.py --task stsb --recipe kd --distill logits            # one ablation",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=112, max_help_position=28),
    )
    for spec in fields(TrainConfig):
        if spec.name in GROUPS:
            group = parser.add_argument_group(GROUPS[spec.name])
        text = (spec.metadata["help"] + defaults_in_words(spec)).replace("%", "%%")
        group.add_argument(flag(spec.name), default=argparse.SUPPRESS, **spec.metadata | {"help": text})
    group.add_argument("--resume", action="store_true", help="continue a stopped run of the same options")
    return parser


def parse_args(argv: list[str] | None) -> tuple[TrainConfig, bool]:
    """Command line -> (checked options, --resume)."""
    given = vars(build_parser().parse_args(argv))
    resume = given.pop("resume")
    for name in {"languages", "methods"} & set(given):  # "en de" and "en,de" both work
        given[name] = tuple(dict.fromkeys(part for text in given[name] for part in text.split(",")))
    config = resolve(given)
    check(config, find_task(config.task))
    return config, resume


def check(config: TrainConfig, task: Task) -> None:
    """Raises UserError for options that would compute something else than what was asked for, before any data is loaded."""
    try:
        tt_config(config)
        check_quant(quant_config(config, "qat"))
        losses = config.loss_weights
    except ValueError as error:  # name=value -> --name value
        names = {"weight_bits": "bits", "rank": "tt_rank", "embedding_rank": "tt_embedding_rank"}
        text = re.sub(r"\b(\w+)=", lambda m: flag(names.get(m[1], m[1])) + " ", str(error))
        raise UserError(text) from None
    unknown = [name for name in config.methods if not is_method(name)]
    parts = {part for name in config.methods for part in name.split("+")}  # rows of METHODS and of REPAIRS
    shape, layerwise, weights = scratch_shape(config.model), config.distill in LAYERWISE, f"--weights {config.weights}"
    known = f"{' '.join(METHODS)}, with repairs in this order: ptq+{'+'.join(REPAIRS)}"
    no_grid = config.bits == 32 or config.weights == "pq" or config.tt_rank
    rounding = ", ".join(name for name in REPAIRS if name in parts and REPAIRS[name].needs_scales)
    off_grid = f"--methods: {rounding} needs weights with scales: not with --bits 32, --weights pq or --tt-rank"
    no_words = shape and task.head in ("sequence", "embedding") and not config.tokenizer
    needs_labels = config.epochs or "qat" in parts
    reads = config.act_range != "dynamic" or "ptq-static" in parts or parts & {*REPAIRS}
    unread = f"--calibration {config.calibration}: only static ranges and repairs read it, as in --methods ptq-static"
    odd = f"--model {config.model}: choose a hidden size that is a multiple of 64, or less than 128"
    zero = "--noise 1 sets all blocks of --weights pq to 0 while they wait for their stage: choose less"
    distills = layerwise or any(weight for name, weight in losses.items() if name != "task")
    nothing = f"--distill {config.distill} has no loss with a weight, so sdq would be qat: use --methods fp32 ptq qat"
    cores = f"{weights} is for matrices: cores of tensor trains have learned scales"
    stages = f"{weights} has stages of its own: not with --distill {config.distill}"
    gate = "--gate compares the last row of --methods with fp32, which must be there, too: --methods fp32 ptq"
    for is_wrong, message in (
        (unknown, f"--methods: {', '.join(map(repr, unknown))} is unknown; choose from {known}"),
        (rounding and no_grid, off_grid),
        (no_words, "--model scratch needs --tokenizer FILE, a SentencePiece model"),
        (
            task.head == "embedding" and needs_labels,
            f"--task {task.name} has no labels: --epochs 0, and no qat in --methods",
        ),
        (config.calibration and not reads, unread),
        (config.tt_rank and config.weights != "uniform", cores),
        (config.weights == "pq" and layerwise, stages),
        (config.weights == "pq" and config.noise == 1.0, zero),
        (shape and shape[1] % max(1, shape[1] // 64), odd),
        ("sdq" in parts and not distills, nothing),
        (config.gate is not None and "fp32" not in config.methods[:-1], gate),
    ):
        if is_wrong:
            raise UserError(message)


def introduction(config: TrainConfig, task: Task, folder: str) -> str:
    """The first lines of a run: which model and data these are, how to get the real ones, and what to try instead of a
    setting that is known to lose.
    """
    shown = folder if os.name == "nt" else os.path.relpath(folder)  # on Windows it may be on another drive
    text = f"model {config.model}, data {shown}"
    if folder != RAW_DIR and not config.data_dir:
        model = f"python convert.py {task.models[0]}, then " if config.model == "mini" else ""
        text += f": built in. For the real thing: {model}{task.fetch}"
    if (config.bits, config.weights, config.tt_rank) == (2, "uniform", 0) and config.methods != ("fp32",):
        text += "\n2 bits: most weights round to 0; --weights lsq keeps far more"
    return text


def fit(config: TrainConfig, model: str, positions: int, hidden_size: int, device: torch.device) -> TrainConfig:
    """The options as a model and a processor allow them."""
    if config.max_length > positions:
        print(f"--max-length {positions} instead of {config.max_length}: {model} has {positions} positions")
        config = replace(config, max_length=positions)
    if config.precision == "auto":  # small models train in minutes: there the same bits on all CPUs are worth more
        bf16 = multiplies_bf16(device) and (device.type == "cuda" or hidden_size >= 256)
        config = replace(config, precision="bfloat16" if bf16 else "float32")
    return config

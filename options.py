"""The command line of train.py: one line per option, and every check that needs no data.

TrainConfig is what config.json and each checkpoint record. A flag is its field's name with dashes;
its default, its help text and its group stand beside it. One flag per ablation, and "off" is the
baseline: --bits 32, --distill none.
"""

import argparse
import hashlib
import os
import sys
from dataclasses import dataclass, field, fields, replace

from data import UserError, flag
from data.glue import GLUE
from data.tasks import TASKS, find_task
from distill import LAYERWISE, ORDERS, OUTPUT_TAPS, PARTS, parse_distill, part_weights
from quant import OBSERVERS

METHODS = ("fp32", "ptq", "ptq-static", "qat", "sdq")
TRAINED = ("qat", "sdq")

TASK, MODEL, TT, QUANT, DISTILL, OPTIM, RUN = (
    "task",
    "model",
    "tensor train",
    "quantization",
    "distillation (the sdq row)",
    "optimization",
    "run",
)


# What is used where an option isn't given: it depends on what is fine-tuned.
SCRATCH_JOINT = "scratch on atis or snips"
ON_GLUE = "GLUE"
RECIPES = {
    "mini": {"epochs": 2, "student_epochs": 1, "lr": 3e-4, "student_lr": 3e-5, "dropout": 0.0},
    "scratch": {"epochs": 3, "lr": 5e-4, "dropout": 0.1},
    SCRATCH_JOINT: {
        "epochs": 25,
        "student_epochs": 6,
        "lr": 1e-3,
        "student_lr": 5e-4,
        "dropout": 0.2,
        "label_smoothing": 0.1,
    },
    # Chosen for MiniLM on rows of STS-B's train.tsv that were held out (README, "Below 4 bits").
    ON_GLUE: {
        "epochs": 3,
        "student_epochs": 2,
        "lr": 1e-4,
        "dropout": 0.1,
        "beta": 600.0,
        "output_tap": "normed",
    },
    "others": {"epochs": 3, "lr": 2e-5, "dropout": 0.1},
}
# What concerns all of them but where a recipe says otherwise.
COMMON = {"label_smoothing": 0.0, "beta": 100.0, "output_tap": "projected"}
# With few bits a weight must go far to reach the next step of its grid. Chosen on dev with seed 0, the
# same for QAT and SDQ (README, "Results" and "Below 4 bits").
STUDENT_LR = {"mini": {2: 1e-3, 3: 3e-4, 4: 1e-4}, ON_GLUE: {2: 3e-4}}


def by_model(name: str) -> str:
    """The default of an option in words: "5e-4 for mini, 2e-5 for others"."""
    values = {model: recipe[name] for model, recipe in RECIPES.items() if name in recipe}
    values |= {"others": COMMON[name]} if name in COMMON else {}
    return ", ".join(
        f"{value if isinstance(value, str) else format(value, 'g')} for {model}"
        for model, value in values.items()
    )


def by_bits() -> str:
    """STUDENT_LR in words: "with 2 bits 0.001 for mini, 0.0003 for GLUE, with 3 ..."."""
    widths = sorted({bits for rates in STUDENT_LR.values() for bits in rates})
    named = {b: [f"{r[b]:g} for {m}" for m, r in STUDENT_LR.items() if b in r] for b in widths}
    return ", ".join(f"with {bits} bits {', '.join(rates)}" for bits, rates in named.items())


def fill_in(config: "TrainConfig", default_model: str) -> "TrainConfig":
    """The options of a run, with nothing left open that its result depends on."""
    config = replace(config, model=config.model or default_model)
    kind = config.model
    if kind == "scratch" and find_task(config.task).head == "joint":
        kind = SCRATCH_JOINT
    if config.task in GLUE:
        kind = ON_GLUE
    recipe = {**COMMON, **RECIPES.get(kind, RECIPES["others"])}
    recipe["weight_range"] = "lsq" if config.weights == "lsq" else "minmax"
    if config.bits in STUDENT_LR.get(kind, {}):
        recipe = {**recipe, "student_lr": STUDENT_LR[kind][config.bits]}
    missing = {name: value for name, value in recipe.items() if getattr(config, name) is None}
    return replace(config, **missing)


def option(default, group: str, text: str, metavar: str | None = None):
    return field(default=default, metadata={"group": group, "text": text, "metavar": metavar})


@dataclass(frozen=True)
class TrainConfig:
    """Every option of a run."""

    task: str = option("xnli", TASK, f"one of: {' '.join(TASKS)}")
    data_dir: str | None = option(
        None, TASK, "folder of the task's official files; data/raw, but mini brings its own", "DIR"
    )
    languages: tuple[str, ...] = option((), TASK, "languages to test besides English; all")
    eval_split: str = option("test", TASK, "report on test, or on dev (which also chose the epoch)")
    max_train: int | None = option(None, TASK, "so many training examples, drawn at random; all")
    max_eval: int | None = option(
        None, TASK, "so many examples a language, the same everywhere; all"
    )
    max_length: int = option(128, TASK, "longest sequence in tokens; longer texts are cut")

    model: str | None = option(
        None,
        MODEL,
        "NAME (weights/NAME.pt), a path, mini (built in), or scratch: random weights; "
        "minilm for GLUE, else xlmr-base if it was converted, else mini",
        "M",
    )
    layers: int | None = option(None, MODEL, "with --model scratch: number of layers; 4")
    hidden: int | None = option(None, MODEL, "with --model scratch: hidden size; 256")
    heads: int | None = option(None, MODEL, "with --model scratch: attention heads; hidden / 64")
    tokenizer: str | None = option(
        None,
        MODEL,
        "with --model scratch: a SentencePiece model; for atis and snips their own words",
        "FILE",
    )

    tt_rank: int = option(
        0,
        TT,
        "rank of tensor trains instead of Linear layers and tables; 0 leaves them dense. A scratch "
        "model is trained as one, a pretrained one stays dense and its students become one",
        "R",
    )
    tt_embedding_rank: int = option(
        0, TT, "the same for the table of words; 0: it stays a table", "R"
    )
    tt_modes: int = option(3, TT, "factors of each side of a matrix; 1 is a low-rank product")
    tt_table_modes: int = option(2, TT, "factors of each side of a table")
    tt_init: str = option(
        "svd", TT, "students of a pretrained model start from its svd, or from random cores"
    )

    methods: tuple[str, ...] = option(
        ("fp32", "ptq", "qat", "sdq"), QUANT, f"rows of the report: {' '.join(METHODS)}"
    )
    bits: int = option(8, QUANT, "of weights and word embeddings: 2 to 8; 32 leaves them alone")
    act_bits: int = option(8, QUANT, "of activations: 2 to 8; 32 leaves them alone")
    per_tensor: bool = option(
        False, QUANT, "one scale a weight matrix and activation, not one a channel and token"
    )
    grid: str = option(
        "portable", QUANT, "8-bit weights in -64..64, exact on every CPU, or full: -127..127"
    )
    weights: str = option(
        "uniform",
        QUANT,
        "uniform, ternary (needs --bits 2), or lsq: scales of matrices are trained",
    )
    weight_range: str | None = option(
        None,
        QUANT,
        "minmax; mse: clip outliers where it pays; lsq: 2 mean|w| / sqrt(Q_max), where learned scales "
        "start; minmax, lsq with --weights lsq",
    )
    weight_clip: float = option(0.0, QUANT, "cut weights at +-X before quantizing; 0 is off")
    act_range: str = option(
        "dynamic", QUANT, "dynamic; static: calibrated before training; or learned from there"
    )
    attention_bits: int = option(
        32, QUANT, "of Q, K, V and the attention probabilities: 2 to 8; 32 leaves them alone"
    )
    observer: str = option("minmax", QUANT, f"how static ranges are found: {' '.join(OBSERVERS)}")
    calibration: int = option(256, QUANT, "training examples that calibrate static ranges")
    noise: float = option(
        0.5,
        QUANT,
        "fraction of the weights quantized at a training step; 1 is ordinary QAT "
        "(where scales are learned, as of tensor trains: always all)",
        "P",
    )
    noise_block: int = option(1, QUANT, "draw the noise in runs of so many weights")

    distill: str = option(
        "logits+context",
        DISTILL,
        f"parts joined by '+': {' '.join(PARTS)}; or none; or {LAYERWISE}: block after block",
        "PARTS",
    )
    alpha: float = option(0.5, DISTILL, "weight of the logits")
    beta: float | None = option(None, DISTILL, f"weight of the other parts; {by_model('beta')}")
    gamma: float | None = option(
        None, DISTILL, "with map+output: beta (gamma map + (1 - gamma) output); both count whole"
    )
    part_weights: tuple[str, ...] = option(
        (),
        DISTILL,
        "weights of single parts, such as map=600 output=30; --alpha and --beta",
        "PART=W",
    )
    task_weight: float = option(1.0, DISTILL, "weight of the task's own loss beside them; 0 is off")
    output_tap: str | None = option(
        None,
        DISTILL,
        "where the part output is read: projected (before the residual), residual (after it), "
        f"normed (after the norm); {by_model('output_tap')}",
    )
    distill_layers: tuple[int, ...] = option(
        (), DISTILL, "blocks whose parts are distilled, such as 5 6; all"
    )
    temperature: float = option(1.0, DISTILL, "softens the logits of teacher and student")
    order: str = option("bottom-up", DISTILL, f"of the blocks in {LAYERWISE}: {' '.join(ORDERS)}")
    stage_steps: int | None = option(
        None,
        DISTILL,
        f"steps of {LAYERWISE} before the next block joins; half of all / layers",
        "S",
    )
    last_lr: float | None = option(
        None, DISTILL, f"peak rate of {LAYERWISE}'s last stage; a twentieth of the student's"
    )
    student_init: str = option("teacher", DISTILL, "qat and sdq start from: teacher, pretrained")

    epochs: int | None = option(None, OPTIM, f"passes over the training set; {by_model('epochs')}")
    student_epochs: int | None = option(
        None, OPTIM, f"the same for qat and sdq; as --epochs, {by_model('student_epochs')}"
    )
    steps: int | None = option(None, OPTIM, "stop every training after so many steps")
    student_steps: int | None = option(None, OPTIM, "the same for qat and sdq; as --steps")
    batch_size: int = option(32, OPTIM, "examples a step")
    lr: float | None = option(None, OPTIM, f"peak learning rate; {by_model('lr')}")
    student_lr: float | None = option(
        None,
        OPTIM,
        f"the same for qat and sdq; as --lr, {by_model('student_lr')}, {by_bits()}",
    )
    warmup: float = option(0.1, OPTIM, "fraction of the steps in which the rate rises")
    weight_decay: float = option(0.01, OPTIM, "of AdamW, on matrices only")
    clip: float = option(1.0, OPTIM, "largest gradient norm")
    label_smoothing: float | None = option(
        None, OPTIM, f"of the cross-entropy; {by_model('label_smoothing')}"
    )
    dropout: float | None = option(None, OPTIM, f"while the teacher trains; {by_model('dropout')}")
    student_dropout: float = option(
        0.0, OPTIM, "while qat and sdq train; it also disturbs what is distilled"
    )

    eval: str | None = option(
        None, RUN, "train nothing: test this student.pt as an integer model", "FILE"
    )
    analyze: bool = option(
        False, RUN, "also measure each row's error and attention in every layer (on English dev)"
    )
    seed: int = option(0, RUN, "of weights, batches, dropout and noise")
    device: str = option("auto", RUN, "auto, cpu, cuda")
    threads: int | None = option(None, RUN, "CPU threads; all cores")
    out: str | None = option(
        None, RUN, "folder of this run; out/TASK-wBaA-sSEED, and a hash of other options", "DIR"
    )
    eval_every: int | None = option(None, RUN, "steps between looks at English dev; an epoch")
    save_every: int = option(500, RUN, "steps between states to resume from")


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a mistake is answered in one line instead of the whole usage."""

    def error(self, message: str):
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="train.py",
        allow_abbrev=False,
        description="Self-Distilled Quantization, end to end: teacher, PTQ, QAT, SDQ, one report.",
        epilog="examples:\n"
        "  python train.py --task xnli --bits 8\n"
        "  python train.py --task xnli --eval out/xnli-mini-w8a8-s0/student.pt\n"
        "  python train.py --task xnli --bits 4 --distill logits            # one ablation\n"
        "  python train.py --task xnli --languages en de sw --max-train 20000\n"
        "  python train.py --task rte --bits 2 --weights ternary --distill logits+map+output\n"
        "  python train.py --task atis --model scratch --layers 2 --hidden 768 --tt-rank 20 --bits 8\n"
        "  python train.py --task xnli --model scratch --layers 2 --hidden 128 --tokenizer FILE.model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups = {}
    for spec in fields(TrainConfig):
        title, text = spec.metadata["group"], spec.metadata["text"]
        group = groups.setdefault(title, None) or parser.add_argument_group(title)
        groups[title] = group
        kind = str(spec.type)
        if "bool" in kind:
            group.add_argument(flag(spec.name), action="store_true", help=text)
            continue
        if spec.default in (None, ()):  # the text itself ends with the default, behind a semicolon
            text, _, shown = text.rpartition("; ")
            text, shown = (text, shown) if text else (shown, None)
        else:
            shown = " ".join(spec.default) if isinstance(spec.default, tuple) else spec.default
        if shown is not None:
            text += f" (default: {shown})"
        kwargs = dict(default=spec.default, help=text.replace("%", "%%"))
        kwargs["metavar"] = spec.metadata["metavar"] or ("N" if "int" in kind else "X")
        if "tuple" in kind:
            kwargs["nargs"] = "+"
        kwargs["type"] = int if "int" in kind else float if "float" in kind else str
        group.add_argument(flag(spec.name), **kwargs)
    return parser


def parse_args(argv: list[str] | None) -> tuple[TrainConfig, bool]:
    """Command line -> (checked options, --resume)."""
    parser = build_parser()
    parser.add_argument(
        "--resume", action="store_true", help="go on with a stopped run of the same options"
    )
    values = vars(parser.parse_args(argv))
    resume = values.pop("resume")
    for name in ("languages", "methods"):  # "en de" and "en,de" both work
        values[name] = tuple(part for text in values[name] for part in text.split(","))
    for name in ("part_weights", "distill_layers"):
        values[name] = tuple(values[name])
    config = TrainConfig(**values)
    check(config)
    return config, resume


def check(config: TrainConfig) -> None:
    """Refuse what can't be run, before any data is loaded. Raises UserError: one line, with what to
    type instead.
    """
    task = find_task(config.task)
    for language in config.languages:
        if language not in task.languages:
            raise UserError(
                f"--languages {language!r}: {config.task} has {' '.join(task.languages)}"
            )
    for name in ("bits", "act_bits", "attention_bits"):
        value = getattr(config, name)
        if value != 32 and not 2 <= value <= 8:
            raise UserError(f"{flag(name)} {value}: choose from 2 to 8, or 32 for no quantization")
    choices = {
        "eval_split": ("test", "dev"),
        "grid": ("portable", "full"),
        "weights": ("uniform", "ternary", "lsq"),
        "weight_range": (None, "minmax", "mse", "lsq"),
        "act_range": ("dynamic", "static", "learned"),
        "output_tap": (None, *OUTPUT_TAPS),
        "observer": tuple(OBSERVERS),
        "student_init": ("teacher", "pretrained"),
        "tt_init": ("svd", "random"),
        "order": ORDERS,
        "device": ("auto", "cpu", "cuda"),
    }
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise UserError(
                f"{flag(name)} {getattr(config, name)!r}: choose from "
                f"{', '.join(filter(None, known))}"
            )
    bounds = {  # name -> (smallest, largest); None counts as "not given"
        "noise": (0, 1),
        "warmup": (0, 1),
        "dropout": (0, 0.9),
        "student_dropout": (0, 0.9),
        "alpha": (0, 1e9),
        "beta": (0, 1e9),
        "gamma": (0, 1),
        "task_weight": (0, 1e9),
        "weight_clip": (0, 1e9),
        "weight_decay": (0, 1e3),
        "temperature": (1e-3, 1e3),
        "clip": (1e-9, 1e9),
        "lr": (1e-12, 1e38),
        "student_lr": (1e-12, 1e38),
        "last_lr": (1e-12, 1e38),
        "label_smoothing": (0, 0.9),
        "tt_rank": (0, 4096),
        "tt_embedding_rank": (0, 4096),
        "tt_modes": (1, 8),
        "tt_table_modes": (2, 8),
        "seed": (0, 2**31),
    }
    at_least_one = "max_train max_eval layers hidden heads epochs student_epochs steps student_steps batch_size"
    at_least_one += " noise_block calibration threads eval_every save_every stage_steps"
    bounds |= {name: (1, 10**9) for name in at_least_one.split()} | {"max_length": (8, 10**6)}
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:  # also refuses NaN
            raise UserError(f"{flag(name)} {value}: choose a value from {low:g} to {high:g}")
    if task.regression and (config.label_smoothing or config.temperature != 1.0):
        name = "label_smoothing" if config.label_smoothing else "temperature"
        raise UserError(
            f"{flag(name)} is for classes: {config.task} predicts a number, leave it out"
        )
    check_methods(config)
    check_distill(config)
    check_quantizers(config)
    check_model(config)


def check_methods(config: TrainConfig) -> None:
    unknown = [name for name in config.methods if name not in METHODS]
    if unknown or len(set(config.methods)) < len(config.methods):
        what = f"{unknown[0]!r} is unknown" if unknown else "a row is named twice"
        raise UserError(f"--methods: {what}; choose from {' '.join(METHODS)}")
    quantized = [name for name in config.methods if name != "fp32"]
    compressed = config.tt_rank and config.model != "scratch"
    left_alone = config.act_bits == config.attention_bits == 32
    if config.bits == 32 and left_alone and quantized and not compressed:
        raise UserError(
            f"--bits 32 --act-bits 32 quantizes nothing, so {quantized[0]} would be fp32 again: "
            "use --methods fp32"
        )
    static = config.act_range != "dynamic"  # learned ranges start as static ones
    if static and "ptq-static" in config.methods:
        raise UserError(
            f"--act-range {config.act_range} makes ptq static: drop ptq-static from --methods"
        )
    if left_alone and (static or "ptq-static" in config.methods):
        kind = "learned" if config.act_range == "learned" else "static"
        raise UserError(f"{kind} ranges need quantized activations: choose --act-bits 2 to 8")


def check_distill(config: TrainConfig) -> None:
    try:
        parts = parse_distill(config.distill)
    except ValueError as error:
        raise UserError(f"--distill: {error}") from None
    if "sdq" in config.methods and not parts:
        raise UserError("--distill none makes sdq the same as qat: use --methods fp32 ptq qat")
    if config.order != "bottom-up" or config.stage_steps or config.last_lr:
        if LAYERWISE not in parts:
            raise UserError(f"--order, --stage-steps and --last-lr need --distill {LAYERWISE}")
    if LAYERWISE in parts:
        changed = [name for name in NOT_LAYERWISE if getattr(config, name) != NOT_LAYERWISE[name]]
        if changed:
            raise UserError(f"{flag(changed[0])} does nothing with --distill {LAYERWISE}: drop it")
        return
    try:
        beta = 1.0 if config.beta is None else config.beta
        weights = part_weights(parts, config.alpha, beta, config.gamma, config.part_weights)
    except ValueError as error:
        name = "--part-weights" if config.part_weights else "--gamma"
        raise UserError(f"{name}: {error}") from None
    if "sdq" in config.methods and not any(weights.values()):
        raise UserError(
            f"--distill {config.distill} with weights of 0 makes sdq the same as qat: use "
            "--methods fp32 ptq qat"
        )
    if config.output_tap and "output" not in parts:
        raise UserError(f"--output-tap: {config.distill} has no output; add it, or leave this out")
    if config.temperature != 1.0 and "logits" not in parts:
        raise UserError("--temperature softens the logits: distil them, too, or leave it out")
    if any(layer < 1 for layer in config.distill_layers):
        raise UserError(f"--distill-layers {min(config.distill_layers)}: blocks count from 1")
    if len(set(config.distill_layers)) < len(config.distill_layers):
        raise UserError("--distill-layers names a block twice")
    if config.distill_layers and parts == ("logits",):
        raise UserError("--distill-layers: logits have no layers; distil map or output, say")


NOT_LAYERWISE = {
    "beta": None,
    "gamma": None,
    "part_weights": (),
    "task_weight": 1.0,
    "output_tap": None,
    "distill_layers": (),
}


def check_quantizers(config: TrainConfig) -> None:
    if config.weights == "ternary" and config.bits != 2:
        raise UserError(f"--weights ternary has 2 bits, not {config.bits}: add --bits 2")
    if config.weights == "lsq" and config.bits == 32:
        raise UserError("--weights lsq needs quantized weights: choose --bits 2 to 8")
    if config.weights != "uniform" and config.tt_rank:
        raise UserError(
            f"--weights {config.weights} is for matrices: cores of tensor trains have learned scales"
        )
    if config.weights == "ternary" and config.weight_range:
        raise UserError("--weights ternary has a range of its own: leave out --weight-range")
    if config.weight_range == "lsq" and config.weights != "lsq":
        raise UserError("--weight-range lsq is where learned scales start: add --weights lsq")
    if config.weight_clip and (config.weights == "lsq" or config.tt_rank):
        raise UserError("--weight-clip: learned scales learn where to clip; leave it out")
    if config.bits == 32 and (config.weight_clip or config.weight_range):
        name = "weight_clip" if config.weight_clip else "weight_range"
        raise UserError(f"{flag(name)} is for quantized weights: choose --bits 2 to 8")


def check_model(config: TrainConfig) -> None:
    if config.model == "scratch":
        if config.tokenizer is None and find_task(config.task).head != "joint":
            raise UserError("--model scratch needs --tokenizer FILE, a SentencePiece model")
        if config.student_init == "pretrained":
            raise UserError(
                "--student-init pretrained: --model scratch has no pretrained weights; use teacher"
            )
    else:
        for name in ("layers", "hidden", "heads", "tokenizer"):
            if getattr(config, name) is not None:
                raise UserError(f"{flag(name)} shapes a new model: it needs --model scratch")


NOT_THE_RESULT = (
    "device",
    "threads",
    "out",
    "save_every",
    "analyze",
    "eval",
)  # options that don't name a run


def default_out(config: TrainConfig) -> str:
    """out/xnli-mini-w8a8-s0; with any other option changed, a short hash of those: one folder a
    setting. config: as fill_in leaves it.
    """
    model = os.path.splitext(os.path.basename(config.model))[0]
    name = f"{config.task}-{model}-w{config.bits}a{config.act_bits}-s{config.seed}"
    named = ["task", "bits", "act_bits", "seed", *NOT_THE_RESULT]
    named += ["model"] if config.model == model else []  # a path says more than its last part
    usual = fill_in(TrainConfig(task=config.task, bits=config.bits), config.model)
    changed = [
        (spec.name, getattr(config, spec.name))
        for spec in fields(config)
        if spec.name not in named
        and (spec.name == "model" or getattr(config, spec.name) != getattr(usual, spec.name))
    ]
    if changed:
        name += "-" + hashlib.sha256(repr(changed).encode()).hexdigest()[:6]
    return os.path.join("out", name)

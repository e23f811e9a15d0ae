"""The recipe: a float32 teacher, then the same model in 8 bits, several ways, in one report.

    python train.py --task xnli --bits 8
    python train.py --task rte --bits 2 --weights ternary --distill logits+map+output

    fp32        the teacher: a pretrained encoder fine-tuned on English
    ptq         its weights and activations quantized, no training (ranges found at run time)
    ptq-static  the same with activation ranges fixed from calibration batches
    qat         trained on through the quantizers, with quantization noise and the task's loss alone
    sdq         qat, distilled from the teacher: logits and every self-attention output, or what
                --distill says

Students train fake-quantized, in float32 on the integer grid. What is reported is the integer model
made of them (int8.py), with the fake-quantized one beside it.

Training sees English only; every language is tested (zero-shot transfer). The best epoch is chosen
on English dev.

A run writes to --out: config.json, log.jsonl (one line a step), results.json, report.md and
student.pt (packed integers, of the last row). The teacher is kept beside the run in teachers/ and
used again by every run that would train the same one. A run that was stopped goes on with --resume
as if nothing had happened.
"""

import copy
import hashlib
import json
import os
import platform
import sys
import time
from dataclasses import asdict, replace

import torch

from analyze import attention_recovery, errors_table, layer_errors, recovery_table
from checkpoint import (
    checkpoint_payload,
    config_of,
    load_checkpoint,
    read_checkpoint,
    save_atomically,
)
from data import UserError, batches, exit_status, flag, mini
from data.batches import Dataset, encode_split, evaluation_batches, unpadded_batches
from data.fetch import MODELS, RAW_DIR
from data.glue import GLUE
from data.tasks import find_task, load, task_folder
from data.tokenizer import Tokenizer, WordTokenizer
from distill import parse_distill
from int8 import convert, integer_model
from loop import EVAL_TOKENS, Run, clock, describe, evaluate, print_live, train
from model import PRESETS, Model, ModelConfig, build_model, set_dropout, with_head
from options import (
    NOT_THE_RESULT,
    TRAINED,
    TrainConfig,
    default_out,
    fill_in,
    parse_args,
)
from packed import (
    bytes_on_disk,
    default_keep,
    float_model,
    read_student,
    student_payload,
    tokenizer_of,
)
from prepare import calibrate, prepare
from quant import QuantConfig
from report import markdown, summarize, table, write_json, write_text
from tt import TTConfig, tensorize

ROOT = os.path.dirname(os.path.abspath(__file__))
WEIGHTS_DIR = os.path.join(ROOT, "weights")
MINI = os.path.join(ROOT, "data", "mini", "mini.pt")  # made by data/pretrain_mini.py


# ----------------------------------------------------------------------------------------- models
def default_model(task: str) -> str:
    """MiniLM for GLUE; else XLM-R base if it was converted, else the built-in miniature."""
    if task in GLUE:
        return "minilm"
    there = os.path.isfile(os.path.join(WEIGHTS_DIR, "xlmr-base.pt"))
    return "xlmr-base" if there else "mini"


def coarse(config: TrainConfig) -> str | None:
    """What to try instead where the scale spends the few steps of the grid on the largest weight."""
    usual = (config.bits, config.weights, config.weight_range) == (2, "uniform", "minmax")
    if not usual or config.methods == ("fp32",):
        return None
    if config.tt_rank:
        return (
            "2 bits: with max|G| as a scale most numbers of a core round to 0; --weight-range mse"
        )
    return "2 bits: with max|w| as a scale most weights round to 0; --weights lsq keeps far more"


def introduce(model: str, task: str) -> str:
    """The first line of a run: which model this is, and how to get the other."""
    if task in GLUE:
        return f"model {model}. Any BERT will do: python convert.py NAME --from DIR, --model NAME"
    if model == "mini":
        return (
            "model mini: built in, for made-up text in 15 languages. For the real one: "
            "python convert.py xlmr-base, then python data/fetch.py xnli"
        )
    return f"model {model}. The built-in miniature, which needs no download: --model mini"


def find_model(name: str) -> str:
    """The checkpoint that --model means. Raises UserError saying how to get one."""
    if name == "mini":
        return MINI
    if name.endswith(".pt") or os.sep in name or "/" in name:
        path = name
    else:
        path = os.path.join(WEIGHTS_DIR, name + ".pt")
    if os.path.isfile(path):
        return path
    if path == name or name not in PRESETS:
        known = " ".join(PRESETS)
        raise UserError(
            f"no model {name!r}: give a .pt file of convert.py, 'scratch', or one of: {known}"
        )
    how = name if name in MODELS else f"{name} --from DIR"
    raise UserError(f"no weights for {name} yet: make them with 'python convert.py {how}'")


class Source:
    """Where models come from: a converted checkpoint, or random weights."""

    def __init__(self, config: TrainConfig, folder: str):
        self.config, task = config, find_task(config.task)
        self.path = None if config.model == "scratch" else find_model(config.model)
        self.labels, self.slots = label_names(config.task, folder)
        self.head = {
            "head": task.head,
            "num_labels": len(self.labels),
            "num_slots": len(self.slots),
        }
        if self.path is None:
            if config.tokenizer:
                self.tokenizer = Tokenizer.from_file(config.tokenizer)
            else:
                sentences = load(config.task, "train", task.train_language, folder)
                self.tokenizer = WordTokenizer.build(sentence.words for sentence in sentences)
            hidden = config.hidden or 256
            self.model_config = ModelConfig(
                vocab_size=self.tokenizer.vocab_size,
                hidden_size=hidden,
                num_layers=config.layers or 4,
                num_heads=config.heads or max(1, hidden // 64),
                ffn_size=4 * hidden,
                max_tokens=512,
                tt=tt_config(config),
                **self.head,
            )
            shape = self.model_config
            self.name = f"scratch-{shape.num_layers}x{hidden}"
            self.name += f"-tt{config.tt_rank}" if config.tt_rank else ""
            self.identity = [repr(shape), self.tokenizer.sha256]
        else:
            payload = read_checkpoint(self.path)
            self.model_config = config_of(payload, self.path)
            vocab_size = self.model_config.vocab_size
            self.tokenizer = Tokenizer.from_payload(payload, self.path, vocab_size)
            self.name = os.path.splitext(os.path.basename(self.path))[0]
            stat = os.stat(self.path)
            self.identity = [os.path.abspath(self.path), stat.st_size, stat.st_mtime_ns]
        depth = self.model_config.num_layers
        if any(layer > depth for layer in config.distill_layers):
            raise UserError(
                f"--distill-layers {max(config.distill_layers)}: {self.name} has blocks 1 to {depth}"
            )
        longest = self.model_config.max_tokens
        if config.max_length > longest:
            raise UserError(
                f"--max-length {config.max_length}: {self.name} has {longest} positions; use {longest} or less"
            )

    def build(self) -> Model:
        """A model to fine-tune: the source's encoder under a fresh head. One seed, one model."""
        torch.manual_seed(self.config.seed)
        if self.path is None:
            return build_model(self.model_config)
        return with_head(load_checkpoint(self.path), **self.head)


def label_names(task: str, folder: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a model of this task can answer: labels of a text, and of a word (slots) if it has any."""
    row = find_task(task)
    if row.names is None:
        return row.labels, ()
    names = row.names(folder)
    return names.intents[: names.known_intents], names.slots[: names.known_slots]


def tt_config(config: TrainConfig) -> TTConfig | None:
    if not config.tt_rank:
        return None
    return TTConfig(
        config.tt_rank, config.tt_embedding_rank, config.tt_modes, config.tt_table_modes
    )


def quant_config(config: TrainConfig, method: str) -> QuantConfig:
    act_range = "static" if method == "ptq-static" else config.act_range
    if act_range == "learned" and method not in TRAINED:
        act_range = "static"  # which is where learning starts
    return QuantConfig(
        weight_bits=config.bits,
        act_bits=config.act_bits,
        per_channel=not config.per_tensor,
        per_token=not config.per_tensor,
        grid=config.grid,
        weights=config.weights,
        weight_range=config.weight_range,
        weight_clip=config.weight_clip,
        act_range=act_range,
        attention_bits=config.attention_bits,
        observer=config.observer,
        noise=config.noise if method in TRAINED else 1.0,
        noise_block=config.noise_block,
        keep=default_keep(tt_config(config)),
    )


# ------------------------------------------------------------------------------------- the ladder
TEACHER_OPTIONS = (  # all that the teacher's weights depend on, besides model and data
    "task max_train max_eval max_length epochs steps batch_size lr warmup weight_decay clip dropout "
    "seed eval_every label_smoothing"
).split()


def teachers_folder(out: str) -> str:
    return os.path.join(os.path.dirname(os.path.abspath(out)), "teachers")


def teacher_path(run: Run, source: Source) -> str:
    key = [getattr(run.config, name) for name in TEACHER_OPTIONS] + source.identity
    for dataset in (run.train, run.dev):
        for part in (dataset.ids, dataset.starts, dataset.labels, dataset.tags, dataset.second):
            key.append(part is not None and hashlib.sha256(part.tobytes()).hexdigest())
    key.append(run.device.type)  # bf16 on CUDA
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:12]
    return os.path.join(teachers_folder(run.out), f"{run.config.task}-{source.name}-{digest}.pt")


def get_teacher(run: Run, source: Source, resume: bool) -> tuple[Model, int, float]:
    """The float32 teacher, trained now or before: (model, bytes on disk, seconds of training)."""
    path = teacher_path(run, source)
    if not os.path.exists(path):
        if resume and os.path.exists(run.results_file):
            raise UserError(
                f"this run's teacher, {path}, is gone (or --lr changed): start with another --out"
            )
        model = source.build()
        set_dropout(model, run.config.dropout)
        model.to(run.device)
        seconds = train(run, "fp32", model, None, (), run.config.epochs, run.config.lr, resume)
        payload = checkpoint_payload(model, source.tokenizer.bytes, seconds=f"{seconds:.1f}")
        save_atomically(payload, path)
        remove(run.state_file)
        del model, payload
    else:
        print(f"fp32: teacher from {path}")
    teacher = load_checkpoint(path).to(run.device).requires_grad_(False)
    seconds = float(read_checkpoint(path)["notes"]["seconds"])
    return teacher, os.path.getsize(path), seconds


def make_student(run: Run, source: Source, teacher: Model, method: str) -> Model:
    """The teacher's copy (or a fresh one from the source), fake-quantized and calibrated."""
    if method in TRAINED and run.config.student_init == "pretrained":
        student = source.build().to(run.device)
    else:
        student = copy.deepcopy(teacher)
    trains = tt_config(run.config)
    if trains and not student.config.tt:
        torch.manual_seed(run.config.seed)
        report = tensorize(student, trains, from_weights=run.config.tt_init == "svd")
        student.config = replace(student.config, tt=trains)
        print(f"{method}: {report}")
    student.requires_grad_(True).eval()
    set_dropout(student, run.config.student_dropout)
    settings = quant_config(run.config, method)
    summary = prepare(student, settings)
    if settings.act_range != "dynamic":
        torch.manual_seed(run.config.seed)  # the mse observer draws samples
        rows = unpadded_batches(run.train, run.config.calibration, 32, run.config.seed)
        rows = [batch.to(run.device) for batch in rows]
        inputs = ((batch.ids, batch.mask, batch.types) for batch in rows)
        calibrate(student, inputs, settings.observer)
    print(f"{method}: {summary}")
    return student


def run_method(
    run: Run, source: Source, teacher: Model, method: str, save: bool, resume: bool
) -> tuple[Model, int, float]:
    """One quantized row: (student, bytes on disk, seconds of training)."""
    config = run.config
    student = make_student(run, source, teacher, method)
    seconds = 0.0
    if method in TRAINED:
        parts = parse_distill(config.distill) if method == "sdq" else ()
        epochs = config.student_epochs or config.epochs
        lr = config.lr if config.student_lr is None else config.student_lr
        seconds = train(run, method, student, teacher, parts, epochs, lr, resume)
    notes = dict(task=config.task, model=source.name, method=method)
    notes |= {"labels": " ".join(source.labels), "slots": " ".join(source.slots)}
    settings = quant_config(config, method)
    payload = student_payload(student, settings, source.tokenizer.bytes, **notes)
    if save:
        return student, save_atomically(payload, os.path.join(run.out, "student.pt")), seconds
    return student, bytes_on_disk(payload), seconds


def test_row(run: Run, method: str, model: Model, tests: dict[str, Dataset]) -> dict:
    """The figures of one row: the integer model's where there is one, the student's beside them."""
    config = run.config
    found = evaluate_languages(config, method, model, tests, run.device)
    if method == "fp32" or 32 in (config.bits, config.act_bits):
        return found
    integer = convert(model, quant_config(config, method), run.device)
    deployed = evaluate_languages(config, f"{method} in int8", integer, tests, run.device)
    return {**deployed, "student": found}


def evaluate_languages(
    config: TrainConfig, name: str, model: Model, tests: dict[str, Dataset], device: torch.device
) -> dict:
    live, found = sys.stdout.isatty(), {}
    for i, (language, dataset) in enumerate(tests.items()):
        found[language] = evaluate(model, dataset, device)
        line = f"{name}: {config.eval_split} {i + 1}/{len(tests)} {language}"
        if live or i + 1 == len(tests):
            print_live(f"{line} {describe(found[language])}", live)
    if live:
        print()
    return summarize(found, find_task(config.task).train_language)


def dev_curve(run: Run, method: str) -> list[list[float]]:
    """[step, score on English dev] of each look that a training of this run took."""
    if not os.path.exists(run.log_file):
        return []
    with open(run.log_file, encoding="utf-8") as file:
        records = [record for record in map(json.loads, file) if record["method"] == method]
    return [[r["step"], r["dev_score"]] for r in records if "dev_score" in r]


def evaluate_file(config: TrainConfig) -> None:
    """--eval: a packed student, loaded as an integer model and tested."""
    begun = time.monotonic()
    device = choose_device(config)
    read = read_student(config.eval)
    task = find_task(config.task)
    if read.config.head != task.head or read.notes.get("task") != config.task:
        raise UserError(f"{config.eval} was not trained for {config.task}: name its --task")
    quant = read.quant
    if 32 in (quant.weight_bits, quant.act_bits):
        model, kind = float_model(read).to(device), "fake-quantized"
    else:
        model = integer_model(read, device)
        kind = f"integers, {type(model.encoder.layers[0].ffn.up.kernel).__name__}"
    config = replace(config, model=read.notes.get("model"))
    folder = data_folder(config)
    tests = load_tests(config, folder, tokenizer_of(config.eval, read))
    labels = " ".join(label_names(config.task, folder)[0])
    if read.notes.get("labels") != labels:
        raise UserError(f"{config.eval} knows other labels than {folder}: name its --data-dir")
    found = evaluate_languages(config, "student", model, tests, device)
    row = {**found, "size_bytes": os.path.getsize(config.eval), "train_seconds": 0}
    name = f"{read.notes.get('method')} W{quant.weight_bits}A{quant.act_bits}"
    results = {"config": asdict(config), "methods": {name: row}, "languages": list(tests)}
    print(f"\n{table(results)}\n")
    print(f"{kind}, {hardware(device)}, {torch.get_num_threads()} threads; ", end="")
    print(f"{clock(time.monotonic() - begun)} in all")


def run_ladder(config: TrainConfig, resume: bool) -> None:
    begun = time.monotonic()
    config = fill_in(config, default_model(config.task))
    print(introduce(config.model, config.task))
    if hint := coarse(config):
        print(hint)
    out = config.out or default_out(config)
    device = choose_device(config)
    check_folder(out)
    check_folder(teachers_folder(out))
    folder = data_folder(config)
    source = Source(config, folder)
    check_run(out, config, resume)
    print(f"{hardware(device)}, {torch.get_num_threads()} threads, out {out}")
    tests = load_tests(config, folder, source.tokenizer)
    train_set, dev = load_training(config, folder, source.tokenizer)
    rows = sum(map(len, tests.values()))
    print(f"{len(train_set):,} training examples, {rows:,} test examples in {len(tests)} languages")
    run = Run(config, out, device, train_set, dev)
    results = load_results(run, source, list(tests), resume)
    start_folder(run, resume)
    teacher, teacher_bytes, teacher_seconds = get_teacher(run, source, resume)
    quantized = [method for method in config.methods if method != "fp32"]
    for method in config.methods:
        if method in results["methods"]:
            continue
        if method == "fp32":
            model, size, seconds = teacher, teacher_bytes, teacher_seconds
        else:
            save = method == quantized[-1]
            model, size, seconds = run_method(run, source, teacher, method, save, resume)
        row = {"size_bytes": size, "train_seconds": seconds}
        row |= test_row(run, method, model, tests)
        if config.analyze and method != "fp32":
            batches_of_dev = evaluation_batches(run.dev, EVAL_TOKENS[device.type])
            moved = [batch.to(device) for batch in batches_of_dev]
            row["errors"] = layer_errors(teacher, model, moved)
            row["recovery"] = attention_recovery(teacher, model, moved)
        if curve := dev_curve(run, method):
            row["dev_curve"] = curve
        results["methods"][method] = row
        write_json(run.results_file, results)
        if method in TRAINED:
            remove(run.state_file)
    write_text(os.path.join(out, "report.md"), markdown(results))
    if any("errors" in row for row in results["methods"].values()):
        print(f"\n{errors_table(results['methods'])}\n\n{recovery_table(results['methods'])}")
    print(f"\n{table(results)}\n\nwrote {out}/results.json and report.md")
    print(f"{clock(time.monotonic() - begun)} in all")


def data_folder(config: TrainConfig) -> str:
    """Where the task's files are; made now for mini, whose vocabulary is that of mini-XNLI."""
    if config.data_dir or config.model != "mini" or config.task != "xnli":
        return config.data_dir or RAW_DIR
    return mini.cached(batches.CACHE_DIR)


def load_tests(config: TrainConfig, folder: str, tokenizer: Tokenizer) -> dict[str, Dataset]:
    """The encoded test set of each language asked for."""
    task = find_task(config.task)
    there = os.path.join(task_folder(task, folder), *task.files[config.eval_split].split("/"))
    if not os.path.exists(there):
        hint = "" if config.eval_split == "dev" else ", or report on dev with --eval-split dev"
        raise UserError(
            f"no {task.files[config.eval_split]} in {folder}: fetch it with '{task.fetch}', "
            f"name its folder with --data-dir{hint}"
        )
    chosen = config.languages and (task.train_language, *config.languages)
    return {
        language: encode(config, folder, tokenizer, config.eval_split, language, config.max_eval)
        for language in task.languages
        if not chosen or language in chosen
    }


def load_training(
    config: TrainConfig, folder: str, tokenizer: Tokenizer
) -> tuple[Dataset, Dataset]:
    """Encoded English train and dev."""
    english = find_task(config.task).train_language
    train_set = encode(config, folder, tokenizer, "train", english, config.max_train)
    return train_set, encode(config, folder, tokenizer, "dev", english, config.max_eval)


def encode(
    config: TrainConfig,
    folder: str,
    tokenizer: Tokenizer,
    split: str,
    language: str,
    limit: int | None,
) -> Dataset:
    task = config.task
    dataset = encode_split(task, split, language, folder, tokenizer, config.max_length, limit)
    names = find_task(task).names
    return dataset if names is None else replace(dataset, slots=names(folder).slots)


# ------------------------------------------------------------------------------- the run's folder
def check_folder(folder: str) -> None:
    """Refuse a folder that can't be written, before anything is computed or touched."""
    there = os.path.abspath(folder)
    while not os.path.exists(there) and os.path.dirname(there) != there:
        there = os.path.dirname(there)
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {folder}: choose another --out")


def check_run(out: str, config: TrainConfig, resume: bool) -> None:
    """Refuse to mix runs: to resume one with other options, or to write over another or a stopped one."""
    settings = json.loads(json.dumps(asdict(config)))  # tuples become lists, as in the file
    try:
        with open(os.path.join(out, "config.json"), encoding="utf-8") as file:
            before = json.load(file)
    except FileNotFoundError:
        if resume:
            raise UserError(f"no run to resume in {out}: leave out --resume") from None
        return
    except ValueError:
        before = None
    if not isinstance(before, dict) or "task" not in before:
        raise UserError(f"{out}/config.json is not of a run of train.py: choose another --out")
    may_differ = {*NOT_THE_RESULT, "lr", "student_lr"} if resume else set(NOT_THE_RESULT)
    differs = [k for k in settings if before.get(k) != settings[k] and k not in may_differ]
    if differs:
        name = differs[0]
        advice = "resume with the same options" if resume else "choose another --out, or delete it"
        raise UserError(
            f"{out} holds a run with {flag(name)} {before.get(name)}, not {settings[name]}: {advice}"
        )
    if not resume and os.path.exists(os.path.join(out, "state.pt")):
        raise UserError(f"{out} holds a stopped run: go on with --resume, or delete it")


def start_folder(run: Run, resume: bool) -> None:
    """Write config.json; a run that starts afresh removes what the same run left before."""
    os.makedirs(run.out, exist_ok=True)
    if not resume:
        for name in ("log.jsonl", "results.json", "report.md", "student.pt"):
            remove(os.path.join(run.out, name))
    write_json(os.path.join(run.out, "config.json"), asdict(run.config))


def load_results(run: Run, source: Source, languages: list[str], resume: bool) -> dict:
    """A fresh results.json, or when resuming the one with the rows that are done."""
    results = {
        "config": asdict(run.config),
        "model": source.name,
        "languages": languages,
        "train_examples": len(run.train),
        "environment": {
            "hardware": hardware(run.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "methods": {},
    }
    if resume and os.path.exists(run.results_file):
        with open(run.results_file, encoding="utf-8") as file:
            results["methods"] = json.load(file)["methods"]
    done = [name for name in results["methods"] if name != "fp32"]
    if run.config.analyze and any("errors" not in results["methods"][name] for name in done):
        raise UserError(
            f"--analyze: {run.out} has rows that were not analyzed, and their models are gone: "
            "resume without it, or start anew with --analyze and another --out"
        )
    return results


def remove(path: str) -> None:
    if os.path.exists(path):
        os.unlink(path)


def choose_device(config: TrainConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device here; use --device cpu")
    if config.threads:
        torch.set_num_threads(config.threads)
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(auto if config.device == "auto" else config.device)


def hardware(device: torch.device) -> str:
    """The name of the processor that does the work."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main(argv: list[str] | None = None) -> int:
    def job() -> None:
        config, resume = parse_args(argv)
        try:
            if config.eval:
                evaluate_file(config)
            else:
                run_ladder(config, resume)
        except RuntimeError as error:  # torch.OutOfMemoryError is one, the CPU's has no type
            if "out of memory" in str(error) or "allocate memory" in str(error):
                raise UserError("out of memory: use a smaller --batch-size, --max-length") from None
            raise

    return exit_status(job, ": the same command with --resume goes on")


if __name__ == "__main__":
    sys.exit(main())

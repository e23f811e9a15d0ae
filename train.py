"""The recipe and the loop: a float32 teacher, then the same model quantized in several ways.

    python train.py --task xnli --bits 8
    python train.py --task stsb --recipe kd
    python train.py --task atis --recipe tt

Rows of the report, such as ptq, qat and sdq, are described in config.METHODS.

Students train fake-quantized, in float32 on the integer grid. The integer model made of them (int8.py) is what is
evaluated; on CPU the fake-quantized student gives the same bits.

Training sees one language (English), every language is tested (zero-shot transfer), and the best epoch is selected on
dev in the training language. run.py says what a run writes; a stopped run continues with --resume.
"""

if __name__ == "__main__":
    import kit.interrupt  # noqa: F401

import copy
import os
import time
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
from analyze import attention_recovery, layer_errors
from config import TRAINED, TrainConfig, default_out, parse_args, quant_config, tt_config, usual
from data.batches import (
    IGNORE,
    Batch,
    Dataset,
    cut_note,
    encode_split,
    evaluation_batches,
    evaluation_order,
    unpadded_batches,
)
from data.fetch import MODELS
from data.files import no_file
from data.metrics import scores
from data.slots import joint_scores, token_scores
from data.tasks import (
    RAW_DIR,
    TASKS,
    Task,
    file_paths,
    find_data,
    languages_of,
    load,
    match_labels,
    selection_splits,
    with_classes,
)
from data.tokenizer import Tokenizer, WordTokenizer
from distill import LAYERWISE, LOSSES, LayerSchedule, Logits, layer_mean, layerwise_terms, logits_terms
from int8 import integer_model, to_integer
from kit import parallel
from kit.common import Progress, UserError, choose_device, clock, exit_status, hardware, multiplies_bf16
from kit.files import remove, write_text
from kit.report import analysis_tables, caveats, report, report_table, summarize_languages
from model import PRESETS, Model, ModelConfig, initialize, set_dropout, with_head
from pq import STAGES, begin_stage, product_quantizers
from prepare import calibrate, prepare
from run import Data, Run, Training, stop_at_sigterm, teacher_path, total_steps
from tt import tensorize

WARMUP = 0.1  # fraction of the steps in which the learning rate rises
WEIGHT_DECAY = 0.01  # of AdamW, on matrices only
CLIP_NORM = 1.0  # largest norm of all gradients
CALIBRATION = 256  # training examples that set static activation ranges
LAST_STAGE_LR = 1 / 20  # of the last stage of layer-by-layer distillation, relative to the peak
EVAL_TOKENS = {"cpu": 1024, "cuda": 16384}  # tokens per evaluation batch, padding included
MINI = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "mini", "mini.pt")


# --------------------------------------------------------------------------------------- the loss
def forward(
    model: Model, batch: Batch, config: TrainConfig, capture: tuple[str, ...] = (), depth: int | None = None
) -> tuple[Logits, dict[str, list[Tensor]]]:
    """Logits and taps of a batch; products in bfloat16 with --precision bfloat16, which takes half the time.

    NOTE: bfloat16 also rounds the quantized values (8 bits of mantissa). Quantizers, losses and evaluation are in
    float32.
    """
    bf16 = config.precision == "bfloat16"
    with torch.autocast(batch.ids.device.type, dtype=torch.bfloat16, enabled=bf16):
        return model(batch.ids, batch.mask, capture, batch.types, depth)


def task_terms(logits: Logits, batch: Batch, smoothing: float) -> dict[str, Tensor]:
    """The loss of the task: cross-entropy with the labels, of words where they have tags; of a joint head, both
    ("task" and "slots"). In a regression (STS-B), the squared error.
    """
    if batch.labels.is_floating_point():
        return {"task": F.mse_loss(logits[:, 0].float(), batch.labels)}
    if batch.tags is None:
        return {"task": F.cross_entropy(logits.float(), batch.labels, label_smoothing=smoothing)}
    intents, slots = logits if isinstance(logits, tuple) else (None, logits)
    words = batch.tags != IGNORE
    of_words = F.cross_entropy(slots[words].float(), batch.tags[words], label_smoothing=smoothing)
    if intents is None:
        return {"task": of_words}
    return {"task": F.cross_entropy(intents.float(), batch.labels, label_smoothing=smoothing), "slots": of_words}


def means_over(head: str) -> dict[str, str]:
    """What each term of a loss is a mean over, of which a part of a batch has a share (parallel.shared)."""
    of_words = head == "token"
    terms = {"task": "words" if of_words else "rows", "logits": "tokens" if of_words else "rows", "slots": "words"}
    return {name: row.over for name, row in LOSSES.items()} | terms


def sdq_loss(student: Model, teacher: Model | None, batch: Batch, config: TrainConfig, step: int) -> dict[str, Tensor]:
    """L = CE + alpha tau^2 KL(teacher || student) + beta mean_lh MSE(A_lh^s, A_lh^t), term by term
    (arXiv 2307.05972); or the losses of --distill. Without a teacher: CE alone.  step: for losses with a schedule.
    """
    weights = config.loss_weights if teacher is not None else {}
    taps = tuple(LOSSES[name].tap for name in weights if name != "logits")
    logits, student_taps = forward(student, batch, config, taps)
    terms = task_terms(logits, batch, config.label_smoothing)
    if teacher is None:
        return terms
    terms = {name: config.task_weight * term for name, term in terms.items()}
    with torch.no_grad():
        teacher_logits, teacher_taps = forward(teacher, batch, config, taps)
    for name, weight in weights.items():
        if name == "logits":
            costs = logits_terms(logits, teacher_logits, config.temperature, batch.mask)
        else:
            tap, loss, _ = LOSSES[name]
            costs = {name: layer_mean(loss, student_taps[tap], teacher_taps[tap], batch.mask)}
        terms |= {term: weight * cost for term, cost in costs.items()}
    return terms


def layerwise_loss(
    student: Model, teacher: Model, batch: Batch, config: TrainConfig, step: int, schedule: LayerSchedule
) -> dict[str, Tensor]:
    """Layer-by-layer distillation (arXiv 2306.01076): hidden states and attention maps of the layers that are active
    at this step; in the last stage also the logits and the task.
    """
    layers, last = schedule.active(step), schedule.is_last(step)
    depth = None if last else max(layers)  # the layers above have no loss yet and don't run
    logits, student_taps = forward(student, batch, config, ("hidden", "score"), depth)
    with torch.no_grad():
        teacher_logits, teacher_taps = forward(teacher, batch, config, ("hidden", "score"), depth)
    terms = layerwise_terms(student_taps, teacher_taps, layers, batch.mask)
    if last:
        costs = logits_terms(logits, teacher_logits, config.temperature, batch.mask)
        terms |= {name: config.alpha * cost for name, cost in costs.items()}
        terms |= task_terms(logits, batch, config.label_smoothing)
    return terms


# --------------------------------------------------------------------------------------- the loop
def train(model: Model, teacher: Model | None, data: Data, run: Run, method: str) -> float:
    """Train in place and restore the best parameters on dev. Returns the seconds.

    teacher: None trains on the labels alone.  method: the row of the report.

    Raises UserError if the loss or a parameter is no longer finite.
    """
    config, optimizers = run.config, make_optimizers(model)
    training = Training(run, method, model, optimizers, data.train)
    peak = config.student_lr if method in TRAINED else config.lr
    learning_rate, loss_fn = linear_rate, sdq_loss
    if teacher is not None and config.distill in LAYERWISE:
        schedule = layer_schedule(config, model.config.num_layers, training.total_steps)
        learning_rate, loss_fn = partial(layerwise_rate, schedule=schedule), partial(layerwise_loss, schedule=schedule)
    stages, current = len(STAGES) if any(product_quantizers(model)) else 1, None
    length = training.total_steps // stages
    for step, batch in training.steps():  # continues where a stopped run was
        stage = min(step // length, stages - 1)
        first, last = stage * length, stage == stages - 1
        if stage != current:
            begin_stage(model, stage)
            parallel.same(model)
            if step == first > 0:  # in place: run.Training saves them
                optimizers[:] = make_optimizers(model)
            current = stage
        lr = learning_rate(step - first, training.total_steps - first if last else length, peak)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = lr
        terms: dict[str, Tensor] = {}
        for part, shares in parallel.parts(batch, config.accumulate):  # usually the whole batch
            of_part = loss_fn(model.train(), teacher, part, config, step)
            of_part = parallel.shared(of_part, shares, means_over(model.config.head))
            sum(of_part.values()).backward()
            terms = {name: terms.get(name, 0) + term.detach() for name, term in of_part.items()}
        parallel.sum_gradients(model, batch)
        terms = parallel.sum_values(terms)
        norm = clip_gradients(model, CLIP_NORM)
        values = {"loss": sum(terms.values()), **terms, "norm": norm}
        values = training.check_finite(values)  # before anything is updated
        for optimizer in optimizers:
            optimizer.step()
        training.log(values, lr, batch.tokens)
        if training.should_evaluate() and last:
            evaluation = evaluate(model, data.dev, run.device)
            training.select(evaluation, in_words(evaluation, data.dev))
    return training.finish()


def make_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """AdamW, and SparseAdam for the word embeddings, whose gradient is sparse.

    SparseAdam updates only the rows of the batch, which is 30 times as fast on XLM-R's table as a step through 250,002
    rows. NOTE: differs: a row's moments decay only when its token occurs, and word embeddings have no weight
    decay; position and type embeddings have, as matrices do.
    """
    matrices, vectors, tables = [], [], []
    sparse = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and m.sparse}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            # The per-row scales of lsq.py have the shape of a matrix; decay would pull them to 1.
            is_matrix = parameter.dim() > 1 and getattr(module, "decays", True)
            kind = tables if id(parameter) in sparse else matrices if is_matrix else vectors
            kind.append(parameter)
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},  # biases, norms and scales
    ]
    optimizers = [torch.optim.AdamW(groups, fused=True)]
    if tables:
        optimizers.append(torch.optim.SparseAdam(tables))
    return optimizers


def linear_rate(step: int, total: int, peak: float) -> float:
    """Linear warm-up to the peak, then linear decay to zero. step counts from 0."""
    rising = max(1, round(total * WARMUP))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * (total - step) / max(1, total - rising)


def layerwise_rate(step: int, total: int, peak: float, schedule: LayerSchedule) -> float:
    """Learning rate for layer-by-layer distillation: warm-up, then constant while layers are added; in the last stage
    from a lower rate linearly to zero.
    """
    first = schedule.last_stage_start
    if schedule.is_last(step):
        return LAST_STAGE_LR * peak * (total - step) / (total - first)
    return peak * min(1.0, (step + 1) / max(1, round(first * WARMUP)))


def layer_schedule(config: TrainConfig, layers: int, total: int) -> LayerSchedule:
    """Half of the steps for the stages, half for the last one. Raises UserError if they are too few."""
    schedule = LayerSchedule(layers, max(1, total // 2 // layers), LAYERWISE[config.distill])
    if schedule.last_stage_start >= total:
        need = f"--distill {config.distill} needs more than {layers} steps for {layers} layers"
        raise UserError(f"{need}, not {total}: raise --student-epochs or --student-steps")
    return schedule


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Scale all gradients, sparse ones included, so that their common norm is at most `limit`. Returns the norm before."""
    gradients = []
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:  # coalesced, its values can be scaled in place
            parameter.grad = parameter.grad.coalesce()
            gradients.append(parameter.grad.values())
        else:
            gradients.append(parameter.grad)
    norm = torch.nn.utils.get_total_norm(gradients)
    torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


@torch.no_grad()
def evaluate(model: Model, dataset: Dataset, device: torch.device) -> dict:
    """The metrics of the dataset in %, "score" (their mean) and the counts behind them."""
    model.eval()
    predictions, labels = [], []  # of sequences, one array per batch
    tags, slots = [], []  # labels and predictions of words, one list of arrays per batch, one array per sequence
    for batch in parallel.mine(evaluation_batches(dataset, EVAL_TOKENS[device.type])):
        batch = batch.to(device)
        logits, _ = model(batch.ids, batch.mask, types=batch.types)
        if batch.tags is not None:
            logits, slot_logits = logits if isinstance(logits, tuple) else (None, logits)
            words = batch.tags != IGNORE
            borders = words.sum(dim=1).cumsum(dim=0)[:-1].cpu()
            tags.append(np.split(batch.tags[words].cpu().numpy(), borders))
            slots.append(np.split(slot_logits.argmax(dim=-1)[words].cpu().numpy(), borders))
        if logits is None:
            continue
        is_class = not batch.labels.is_floating_point()
        predictions.append((logits.argmax(dim=-1) if is_class else logits[:, 0]).cpu().numpy())
        labels.append(batch.labels.cpu().numpy())
    predictions, labels, tags, slots = map(parallel.gather, (predictions, labels, tags, slots))
    tags, slots = list(chain(*tags)), list(chain(*slots))
    if not predictions:
        return token_scores(slots, tags, dataset.slots, dataset.metrics)
    predictions, labels = np.concatenate(predictions), np.concatenate(labels)
    if not tags:
        in_file_order = np.argsort(evaluation_order(dataset))
        predictions, labels = predictions[in_file_order], labels[in_file_order]
        found = scores(dataset.metrics, predictions, labels)
        if "correct" in found:  # which rows, for paired differences
            found["correct_rows"] = np.packbits(predictions == labels).tobytes().hex()
        return found
    return joint_scores(predictions, labels, slots, tags, dataset.slots)


def in_words(evaluation: dict, dataset: Dataset) -> str:
    return ", ".join(f"{name} {evaluation[name]:.2f}" for name in dataset.metrics)


def evaluate_languages(name: str, model: Model, tests: dict[str, Dataset], task: Task, device: torch.device) -> dict:
    progress, found = Progress(name + ", languages", len(tests)), {}
    for i, (language, dataset) in enumerate(tests.items()):
        found[language] = evaluate(model, dataset, device)
        text = f"{language} {in_words(found[language], dataset)}"
        progress.update(i + 1, text)
    progress.clear()
    return summarize_languages(found, task.train_language)


# ------------------------------------------------------------------------------------- the recipe
class Source:
    """What fine-tuning starts from: a converted checkpoint, or random weights."""

    def __init__(self, config: TrainConfig, folder: str):
        task = config.row
        self.seed, self.path = config.seed, None
        self.data = "own" if config.data_dir else "official" if folder == RAW_DIR else "built in"
        self.labels, self.slots = class_names(task, folder)
        self.head = {"head": task.head, "num_labels": len(self.labels), "num_slots": len(self.slots)}
        self.classes: list[int] | None = None  # of the model's own head, in the order of the task's labels
        if config.model == "scratch":
            if config.tokenizer:
                self.tokenizer = Tokenizer.from_file(config.tokenizer)
            else:
                sentences = load(task, "train", task.train_language, folder)
                self.tokenizer = WordTokenizer.build(sentence.words for sentence in sentences)
            self.config = checkpoint.check_config(
                ModelConfig(
                    vocab_size=self.tokenizer.vocab_size,
                    hidden_size=config.hidden,
                    num_layers=config.layers,
                    num_heads=max(1, config.hidden // 64),
                    ffn_size=4 * config.hidden,
                    max_tokens=512,
                    tt=tt_config(config),
                    **self.head,
                )
            )
            self.name = f"scratch-{config.layers}x{config.hidden}"
            self.name += f"-tt{config.tt_rank}" if config.tt_rank else ""
            self.identity = [repr(self.config), self.tokenizer.sha256]
        else:
            self.path = find_model(config.model)
            payload = checkpoint.read_checkpoint(self.path)
            self.config = checkpoint.config_of(payload, self.path)
            self.tokenizer = Tokenizer.from_payload(payload, self.path, self.config.vocab_size)
            self.name = os.path.splitext(os.path.basename(self.path))[0]
            stat = os.stat(self.path)
            self.identity = [os.path.abspath(self.path), stat.st_size, stat.st_mtime_ns]
            self.payload = payload  # its tensors are mapped from disk
            self.find_classes(payload, task)
        if not config.epochs and self.classes is None:
            raise UserError(f"--epochs 0: {self.name} has no head of classes for {task.name}; train one")

    def find_classes(self, payload: dict, task: Task) -> None:
        """Whether the model's own head has the classes of the task, which are known by their names. Says so."""
        head, count = self.config.head, self.config.num_labels
        if not count:
            return
        notes = payload.get("notes")
        labels = notes.get("labels") if isinstance(notes, dict) else None
        names = labels.split("\t") if isinstance(labels, str) else []
        known = len(names) == count
        if known and head == task.head != "joint" and not self.config.tt:
            self.classes = match_labels(names, self.labels)
        if self.classes is None:
            of = ", ".join(names)[:200] if known else "classes without names; to keep it, convert the model again"
            print(f"{self.name} has a {head} head for {of}: {task.name} gets a new one")
        else:
            pairs = [f"{names[i]} is {label}" for i, label in zip(self.classes, self.labels, strict=True)]
            print(f"{self.name} has a head for {task.name}, which is kept: {', '.join(pairs)[:200]}")

    def build(self) -> Model:
        """A model to fine-tune: the encoder with its own head, if it fits, or a new one. One seed, one model."""
        torch.manual_seed(self.seed)
        if self.path is None:
            return initialize(checkpoint.meta_model(self.config))
        model = checkpoint.float32_model(self.payload, self.path)
        if self.classes is not None:
            for parameter in model.head.out_proj.parameters():
                parameter.data = parameter.data[self.classes]
            return model
        model = with_head(model, **self.head)
        if model.config.tt:
            tensorize(model, model.config.tt)  # the new head
        return model


def find_model(name: str) -> str:
    """The checkpoint that --model means. Raises UserError saying how to get one."""
    if name == "mini":
        return MINI
    is_path = name.endswith(".pt") or os.sep in name or "/" in name
    path = name if is_path else os.path.join(checkpoint.WEIGHTS_DIR, name + ".pt")
    if os.path.isfile(path):
        return path
    if is_path or name not in {*PRESETS, *MODELS}:
        known = " ".join(["mini", *MODELS])
        raise UserError(f"no model {name!r}: give a .pt file of convert.py, 'scratch', or one of: {known}")
    how = name if name in MODELS else f"{name} --from DIR"
    raise UserError(f"no weights for {name} yet: make them with 'python convert.py {how}'")


def class_names(task: Task, folder: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The classes that a model of this task can predict: of a sequence, and of a word (slots)."""
    if task.labels or task.labels_of:
        return task.labels or task.labels_of(folder), ()
    names = task.names(folder)
    return names.intents[: names.known_intents], names.slots[: names.known_slots]


def get_teacher(run: Run, source: Source, data: Data) -> tuple[Model, int, float]:
    """The float32 teacher, trained now or before: (model, bytes on disk, seconds of training)."""
    identity = [*source.identity, *(source.classes or ()), WARMUP, WEIGHT_DECAY, CLIP_NORM]
    path = teacher_path(run, source.name, identity, data)
    if not parallel.anywhere(os.path.exists(path)):
        if run.resume and os.path.exists(run.path("results.json")):
            raise UserError(f"this run's teacher, {path}, is gone (or --lr changed): start with another --out")
        model = source.build()
        set_dropout(model, run.config.dropout)
        seconds = train(model.to(run.device), None, data, run, "fp32") if run.config.epochs else 0.0
        notes = dict(seconds=f"{seconds:.1f}", labels="\t".join(source.labels))
        payload = checkpoint.checkpoint_payload(model, source.tokenizer.bytes, **notes)
        checkpoint.save_atomically(payload, path)
        remove(run.path("state.pt"))
        parallel.wait()
        del model, payload
    else:
        print(f"fp32: teacher from {path}")
    payload = checkpoint.read_checkpoint(path)
    teacher = checkpoint.float32_model(payload, path).to(run.device).requires_grad_(False)
    try:
        return teacher, os.path.getsize(path), float(payload["notes"]["seconds"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is no teacher of train.py: delete it, and the next run trains it again") from None


def make_student(run: Run, teacher: Model, method: str, data: Data) -> Model:
    """The teacher's copy, as tensor trains if wanted, fake-quantized and calibrated."""
    config = run.config
    student = copy.deepcopy(teacher)
    if config.tt_rank and not student.config.tt:
        torch.manual_seed(config.seed)
        print(f"{method}: {tensorize(student, tt_config(config), from_weights=True)}")
    student.requires_grad_(True).eval()
    set_dropout(student, config.student_dropout)
    quant = quant_config(config, method)
    summary = prepare(student, quant)
    begin_stage(student, 0 if method in TRAINED else len(STAGES) - 1)
    if quant.act_range != "dynamic":
        torch.manual_seed(config.seed)  # the mse observer draws samples
        batches = unpadded_batches(data.train, CALIBRATION, 32, config.seed)
        batches = [batch.to(run.device) for batch in batches]
        calibrate(student, ((b.ids, b.mask, b.types) for b in batches), quant.observer)
    print(f"{method}: {summary}")
    return student


def run_student(run: Run, source: Source, teacher: Model, method: str, data: Data) -> dict:
    """One quantized row of the report. Writes student.pt."""
    config, task = run.config, run.config.row
    student = make_student(run, teacher, method, data)
    seconds = 0.0
    if method in TRAINED:
        seconds = train(student, teacher if method == "sdq" else None, data, run, method)
    quant = quant_config(config, method)
    notes = dict(task=config.task, model=source.name, method=method, data=source.data)
    notes |= {"train_language": task.train_language, "max_length": str(config.max_length)}
    notes |= {"labels": "\t".join(source.labels), "slots": "\t".join(source.slots)}
    notes |= {"texts": "2" if data.train.pairs else "1"}
    payload = checkpoint.student_payload(student, quant, source.tokenizer.bytes, **notes)
    size = checkpoint.save_atomically(payload, run.path("student.pt"))
    floats = 32 in (config.bits, config.act_bits)  # there are no integers to multiply
    model = student if floats else to_integer(student, quant, run.device)
    row = {"size_bytes": size, "train_seconds": seconds}
    row |= evaluate_languages(method, model, data.tests, task, run.device)
    if not floats and (config.check_student or run.device.type == "cuda"):
        name = f"{method}, fake-quantized"
        row["student"] = evaluate_languages(name, student, data.tests, task, run.device)
    if config.analyze:
        batches = evaluation_batches(data.dev, EVAL_TOKENS[run.device.type])
        moved = [batch.to(run.device) for batch in batches]
        row["errors"] = layer_errors(teacher, student, moved)
        row["recovery"] = attention_recovery(teacher, student, moved)
    return row


def open_run(config: TrainConfig, resume: bool) -> tuple[Run, Source, Data]:
    """The folder, model and data of a run. All options are checked before anything is written."""
    task, device = config.row, choose_device(config.device, config.threads)
    folder = find_data(task, config.data_dir, config.model)
    print(introduction(config, task, folder))
    source, out = Source(config, folder), config.out or default_out(config)
    if config.max_length > (longest := source.config.max_tokens):
        text = f"{config.max_length}: {source.name} has {longest} positions"
        if config.max_length != usual(config).max_length:  # typed
            raise UserError(f"--max-length {text}; use {longest} or less")
        print(f"--max-length {longest} instead of {text}")
        config = replace(config, max_length=longest)
    if config.precision == "auto":  # small models train in minutes: there the same bits on all CPUs are worth more
        bf16 = multiplies_bf16(device) and (device.type == "cuda" or source.config.hidden_size >= 256)
        config = replace(config, precision="bfloat16" if bf16 else "float32")
    run = Run(out, config, device, resume)
    many = f"{parallel.world_size()} processes, " if parallel.world_size() > 1 else ""
    print(f"{hardware(device)}, {many}{torch.get_num_threads()} threads, training in {config.precision}, out {run.out}")
    language, how = task.train_language, (folder, source.tokenizer, config.max_length)
    for_training, for_selection = selection_splits(task, config.eval_split)
    tests = load_tests(config, task, folder, source.tokenizer)
    data = Data(
        encode_split(task, for_training, language, *how, config.max_train),
        encode_split(task, for_selection, language, *how, config.max_eval),
        tests,
    )
    print(*facts(config, task, folder, source, data), sep="\n")
    if config.distill in LAYERWISE and "sdq" in config.methods:  # too few steps? before training
        steps = total_steps(config, len(data.train), student=True)
        layer_schedule(config, source.config.num_layers, steps)
    if config.weights == "pq" and config.methods != ("fp32",):
        if source.config.hidden_size % 8 or source.config.ffn_size % 8:
            raise UserError(
                f"--weights pq needs layers of a multiple of 8, which {source.name} has not: choose another"
            )
        if (steps := total_steps(config, len(data.train), student=True)) < len(STAGES):
            raise UserError(f"--weights pq needs {len(STAGES)} steps or more, not {steps}: raise --student-steps")
    run.start(source.name, data, [source.identity, source.labels, source.slots])
    run.results["steps"] = steps_of(config, data)
    return run, source, data


def run_recipe(config: TrainConfig, resume: bool) -> None:
    """All rows of the report."""
    started = time.monotonic()
    run, source, data = open_run(config, resume)
    task = config.row
    teacher, teacher_bytes, teacher_seconds = get_teacher(run, source, data)
    for method in config.methods:
        if method in run.results["methods"]:
            continue
        if method == "fp32":
            row = {"size_bytes": teacher_bytes, "train_seconds": teacher_seconds}
            row |= evaluate_languages(method, teacher, data.tests, task, run.device)
        else:
            row = run_student(run, source, teacher, method, data)
        run.finish_row(method, row)
    remove(run.path("state.pt"))  # if a kill came between the last row and its removal
    write_text(run.path("report.md"), report(run.results, task, selection_splits(task, config.eval_split)[1]))
    methods = run.results["methods"]
    if any("errors" in row for row in methods.values()):
        print(f"\n{analysis_tables(methods)}")
    print("", report_table(run.results, task), "", *caveats(run.results, task), sep="\n")
    print(f"wrote {run.out}/results.json, report.md")
    print(f"{clock(time.monotonic() - started)} in all")


def introduction(config: TrainConfig, task: Task, folder: str) -> str:
    """The first lines of a run: which model and data these are, how to get the real ones, and what to try instead of a
    setting that is known to lose.
    """
    shown = folder if os.name == "nt" else os.path.relpath(folder)  # on Windows it may be on another drive
    text = f"model {config.model}, data {shown}"
    if folder != RAW_DIR and not config.data_dir:
        text += f": built in. For the real thing: {task.real_thing}"
    coarse = (config.bits, config.weights, config.weight_range) == (2, "uniform", "minmax")
    if coarse and config.methods != ("fp32",):
        better = "--weight-range mse" if config.tt_rank else "--weights lsq"
        text += f"\n2 bits: most weights round to 0; {better} keeps far more"
    return text


def steps_of(config: TrainConfig, data: Data) -> dict[str, int]:
    return {name: total_steps(config, len(data.train), name == "students") for name in ("teacher", "students")}


def facts(config: TrainConfig, task: Task, folder: str, source: Source, data: Data) -> list[str]:
    """What a run trains on, line by line: rows and classes, languages that are left aside, steps, and texts that lose
    their ends.
    """
    rows = sum(map(len, data.tests.values()))
    lines = [f"{len(data.train):,} training examples, {rows:,} test examples in {len(data.tests)} sets"]
    labels, names = data.train.labels, source.labels
    if data.train.tags is not None and not source.slots:  # classes of words
        labels = data.train.tags[data.train.tags != IGNORE]
    if len(names) > 1:
        counts = sorted(zip(np.bincount(labels, minlength=len(names)).tolist(), names, strict=True), reverse=True)
        more = f", and {len(counts) - 12} more" if counts[12:] else ""
        lines.append("classes: " + ", ".join(f"{name} {count:,}" for count, name in counts[:12]) + more)
        folded = Counter(name.casefold() for name in names)
        if alike := [name for name in names if folded[name.casefold()] > 1]:
            lines.append(f"NOTE: {', '.join(alike[:12])} differ only in capitals, and are different classes")
    if not TASKS[task.name].train_language:
        others = {name: len(found) for name, found in task.read(folder, "train").items() if name != task.train_language}
        if others:
            aside = ", ".join(f"{name} {count:,}" for name, count in others.items())
            lines.append(f"trained on {task.train_language} (--train-language); rows of train left aside: {aside}")
    steps = ", ".join(f"{name} {count:,}" for name, count in steps_of(config, data).items())
    lines.append(f"steps of {config.batch_size}: {steps}")
    splits = {"train": [data.train], "dev": [data.dev], config.eval_split: [*data.tests.values()]}
    notes = [cut_note(sets, f"{name} texts", config.max_length) for name, sets in splits.items()]
    return lines + [f"NOTE: {note} (--max-length)" for note in notes if note]


def load_tests(config: TrainConfig, task: Task, folder: str, tokenizer: Tokenizer) -> dict[str, Dataset]:
    """The encoded test set of each language: all, or the training language and --languages."""
    split = config.eval_split
    missing = [p for p in file_paths(task, folder, split) if not os.path.exists(p)]
    if missing:
        hint = "" if split == "dev" else ". --eval-split dev needs no test file"
        raise UserError(no_file(missing[0], task.fetch) + hint)
    known = languages_of(task, folder, split)
    for language in config.languages:
        if language not in known:
            raise UserError(f"--languages {language!r}: {task.name} has {' '.join(known)}")
    chosen = {task.train_language, *(config.languages or known)}
    return {
        language: encode_split(task, split, language, folder, tokenizer, config.max_length, config.max_eval)
        for language in known
        if language in chosen
    }


def evaluate_file(config: TrainConfig) -> None:
    """--eval: load a packed student as an integer model and evaluate it."""
    started = time.monotonic()
    device = choose_device(config.device, config.threads)
    read = checkpoint.read_student(config.eval)
    config = replace(config, train_language=read.notes.get("train_language"), max_length=read.max_length)
    task = config.row
    if not TASKS[task.name].train_language:  # its training file need not be there
        task = with_classes(task, read.classes[0])
    if read.config.head != task.head or read.notes.get("task") != config.task:
        raise UserError(f"{config.eval} was not trained for {config.task}: name its --task")
    quant = read.quant
    if 32 in (quant.weight_bits, quant.act_bits):
        model, kind = checkpoint.float_model(read).to(device), "fake-quantized"
    else:
        model = integer_model(read, device)
        kind = f"integers, {type(model.encoder.layers[0].ffn.up.kernel).__name__}"
    sample = task.sample_model if read.notes.get("data") == "built in" else ""
    folder = find_data(task, config.data_dir, sample)
    tests = load_tests(config, task, folder, checkpoint.tokenizer_of(config.eval, read))
    names = ["\t".join(each) for each in class_names(task, folder)]
    if [read.notes.get("labels"), read.notes.get("slots")] != names:
        raise UserError(f"{config.eval} has other labels than {folder}: name its --data-dir")
    if any(read.notes.get("texts", texts) != texts for texts in (str(1 + each.pairs) for each in tests.values())):
        raise UserError(f"{config.eval} reads {read.notes['texts']} text(s) per row, {folder} has others")
    if note := cut_note([*tests.values()], "texts", config.max_length):
        print(f"NOTE: {note}, as in training")
    row = evaluate_languages("student", model, tests, task, device)
    row |= {"size_bytes": os.path.getsize(config.eval), "train_seconds": 0}
    name = f"{read.notes.get('method')} W{quant.weight_bits}A{quant.act_bits}"
    results = {"config": asdict(config), "methods": {name: row}, "languages": list(tests)}
    print("", report_table(results, task), "", *caveats(results, task), sep="\n")
    print(f"{kind}, {hardware(device)}, {torch.get_num_threads()} threads; ", end="")
    print(f"{clock(time.monotonic() - started)} in all")


def main(argv: list[str] | None = None) -> int:
    def job() -> None:
        config, resume = parse_args(argv)
        try:
            parallel.start(config.device)
            stop_at_sigterm()
            if config.eval:
                evaluate_file(config)
            else:
                run_recipe(config, resume)
            parallel.stop()
        except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's has no type
            if "out of memory" in str(error) or "allocate memory" in str(error):
                raise UserError("out of memory: use a smaller --batch-size, --max-length, or --accumulate") from None
            if parallel.lost_another(error):
                text = str(error).splitlines()[0][:150]
                raise UserError(f"another process of this run ended ({text}); --resume continues") from None
            raise

    return exit_status(job, ": the same command with --resume continues")


if __name__ == "__main__":
    parallel.leave(main())

"""The recipe and the loop: a float32 teacher, then the same model quantized in several ways.

    python train.py --task xnli --bits 8
    python train.py --task stsb --recipe kd
    python train.py --task atis --recipe tt

Rows of the report, such as ptq, qat and sdq, are described in config.METHODS.

Students train fake-quantized, in float32 on the integer grid. The integer model made of them (int8.py) is what is
evaluated; on CPU the fake-quantized student gives the same bits.

Training sees one language (English), every language is tested (zero-shot transfer), and the best epoch is selected on
dev in the training language. kit/run.py says what a run writes; a stopped run continues with --resume.
"""

if __name__ == "__main__":
    import kit.interrupt  # noqa: F401

import copy
import hashlib
import os
import sys
import time
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
from analyze import attention_recovery, count_flops, layer_errors
from checkpoint import Start
from config import SAME_RUN, TrainConfig, default_out, fit, introduction, parse_args, quant_config, trains, tt_config
from data.batches import IGNORE, Batch, Dataset, encode_file, encode_split, facts, training_batch, unpadded_batches
from data.tasks import find_data, find_task, selection_splits
from distill import LAST, LAYERWISE, LOSSES, LayerSchedule, Logits, layer_mean, layerwise_terms, logits_terms
from int8 import to_integer
from kit import parallel
from kit.common import UserError, choose_device, clock, exit_status, hardware
from kit.files import write_text
from kit.report import analysis_tables, caveats, failed_gate, report, report_table
from kit.run import STUDENT, TEACHER_PART, Run, Training
from model import Model, set_dropout
from pq import STAGES, begin_stage, product_quantizers
from predict import batch_tokens, batches_on, evaluate, evaluate_languages, in_words, load_tests, set_references
from prepare import calibrate, prepare
from repair import repair
from tt import tensorize

WARMUP = 0.1  # fraction of the steps in which the learning rate rises
WEIGHT_DECAY = 0.01  # of AdamW, on matrices only
CLIP_NORM = 1.0  # largest norm of all gradients
CALIBRATION = 256  # rows that set static activation ranges and that repairs read
LABEL_SMOOTHING = 0.1  # where words have tags and the sentence a label, as in ATIS
LAST_STAGE_LR = 1 / 20  # of the last stage of layer-by-layer distillation, relative to the peak
HERE = os.path.dirname(os.path.abspath(__file__))
TEACHER_OPTIONS = (  # all that the parameters of a teacher depend on, besides model, data and how batches are cut
    "task max_train max_eval max_length epochs steps batch_size lr dropout seed eval_every precision"
).split()
TEACHER_CODE = (
    "train.py model.py tt.py checkpoint.py predict.py kit/parallel.py kit/run.py data/batches.py data/metrics.py "
    "data/tokenizer.py data/tokenizer_json.py data/wordpiece.py"
).split()


class Data(NamedTuple):
    train: Dataset
    dev: Dataset
    tests: dict[str, Dataset]  # by language
    calibration: Dataset  # train, or rows of --calibration


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


def task_terms(logits: Logits, batch: Batch) -> dict[str, Tensor]:
    """The loss of the task: cross-entropy with the labels, of words where they have tags; of a joint head, both
    ("task" and "slots"). In a regression (STS-B), the squared error. Without labels, none.
    """
    if batch.labels is None:
        return {}
    if batch.labels.is_floating_point():
        return {"task": F.mse_loss(logits[:, 0].float(), batch.labels)}
    if batch.tags is None:
        return {"task": F.cross_entropy(logits.float(), batch.labels)}
    intents, slots = logits if isinstance(logits, tuple) else (None, logits)
    smoothing = LABEL_SMOOTHING if intents is not None else 0.0
    words = slots.float().flatten(0, 1), batch.tags.flatten()
    of_words = F.cross_entropy(*words, ignore_index=IGNORE, label_smoothing=smoothing)
    if intents is None:
        return {"task": of_words}
    return {"task": F.cross_entropy(intents.float(), batch.labels, label_smoothing=smoothing), "slots": of_words}


def means_over(head: str) -> dict[str, str]:
    """What each term of a loss is a mean over, of which a part of a batch has a share (parallel.backward)."""
    of_words = head == "token"
    terms = {"task": "words" if of_words else "rows", "logits": "tokens" if of_words else "rows", "slots": "words"}
    return {name + place: row.over for name, row in LOSSES.items() for place in ("", LAST)} | terms


def sdq_loss(student: Model, teacher: Model | None, batch: Batch, config: TrainConfig) -> dict[str, Tensor]:
    """L = CE + alpha tau^2 KL(teacher || student) + beta mean_lh MSE(A_lh^s, A_lh^t), term by term
    (arXiv 2307.05972); or the losses of --distill. Without a teacher: CE alone.
    """
    weights = config.loss_weights if teacher is not None else {}
    losses = {name: weight for name, weight in weights.items() if name != "task"}
    rows = {name: LOSSES[name.removesuffix(LAST)] for name in losses}
    taps = tuple(row.tap for row in rows.values() if row.tap)
    logits, student_taps = forward(student, batch, config, taps)
    terms = task_terms(logits, batch)
    if teacher is None:
        return terms
    terms = {name: weights.get("task", 1.0) * term for name, term in terms.items()}
    with torch.no_grad():
        teacher_logits, teacher_taps = forward(teacher, batch, config, taps)
    for name, weight in losses.items():
        if name == "logits":
            costs = logits_terms(logits, teacher_logits, config.temperature, batch.mask, student.config.head)
        else:
            row, first = rows[name], -1 if name.endswith(LAST) else 0
            layers = [each[row.tap][first:] for each in (student_taps, teacher_taps)]
            costs = {name: layer_mean(row.loss, *layers, batch.mask)}
        terms |= {term: weight * cost for term, cost in costs.items()}
    return terms


def layerwise_loss(
    student: Model, teacher: Model, batch: Batch, config: TrainConfig, layers: tuple[int, ...], is_last: bool
) -> dict[str, Tensor]:
    """Layer-by-layer distillation (arXiv 2306.01076): hidden states and attention maps of the active layers; in the
    last stage also the logits and the task.
    """
    depth = None if is_last else max(layers)  # the layers above have no loss yet and don't run
    logits, student_taps = forward(student, batch, config, ("hidden", "score"), depth)
    with torch.no_grad():
        teacher_logits, teacher_taps = forward(teacher, batch, config, ("hidden", "score"), depth)
    terms = layerwise_terms(student_taps, teacher_taps, layers, batch.mask)
    if is_last:
        costs = logits_terms(logits, teacher_logits, config.temperature, batch.mask, student.config.head)
        terms |= {name: config.alpha * cost for name, cost in costs.items()}
        terms |= task_terms(logits, batch)
    return terms


# --------------------------------------------------------------------------------------- the loop
def train(model: Model, teacher: Model | None, data: Data, run: Run, method: str) -> float:
    """Train in place and restore the best parameters on dev. Returns the seconds.

    teacher: None trains on the labels alone.  method: the row of the report.

    Raises UserError if the loss or a parameter is no longer finite.
    """
    config, optimizers = run.config, make_optimizers(model)
    plan = make_plan(config, model, teacher, len(data.train), method)
    state = Training(run, method, model, optimizers, plan.steps)  # at step 0, or where a stopped run was
    for step in range(state.step, plan.steps):
        plan.begin(step, optimizers)
        # a function of seed and step: a resumed run gets the same batches
        batch = training_batch(data.train, config.batch_size, config.seed, step)

        # forward and backward: the whole batch at once, or the parts that this process has of it
        model.train()
        loss = partial(plan.loss, step=step)
        terms = parallel.backward(model, loss, batch, config.accumulate, means_over(model.config.head))
        norm = clip_gradients(model, CLIP_NORM)
        values = state.check_finite(terms, norm)  # raises before anything is updated

        rate = plan.rate(step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        state.log(step + 1, values, rate, batch.tokens)

        # once per epoch: dev in the training language chooses the parameters that are kept
        if plan.evaluates(step):
            evaluation = evaluate(model, data.dev, run.device)
            state.keep_best(step + 1, evaluation["score"], in_words(evaluation, data.dev))
        state.save(step + 1)  # after evaluations, every 500 steps and every two minutes
    return state.finish()


class Plan:
    """What a training does at each step, counted from 0. This one serves the teacher, qat and sdq."""

    def __init__(self, config: TrainConfig, model: Model, teacher: Model | None, examples: int, method: str):
        self.config, self.model, self.teacher = config, model, teacher
        self.steps = total_steps(config, examples, trains(method))
        self.per_epoch = -(-examples // config.batch_size)
        self.peak = config.student_lr if trains(method) else config.lr

    def begin(self, step: int, optimizers: list[torch.optim.Optimizer]) -> None:
        """Change what changes in the course of the training: the place for schedules of your own."""

    def loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        return sdq_loss(self.model, self.teacher, batch, self.config)

    def rate(self, step: int) -> float:
        return linear_rate(step, self.steps, self.peak)

    def evaluates(self, step: int) -> bool:
        """Whether an epoch, the training or --eval-every steps end with this step."""
        done, every = step + 1, self.config.eval_every
        return done % self.per_epoch == 0 or done == self.steps or bool(every and done % every == 0)


class LayerwisePlan(Plan):
    """Layer-by-layer distillation: one layer more at a time, then the logits and the labels."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        layers = self.model.config.num_layers  # half of the steps for all their stages, half for the last one
        self.schedule = LayerSchedule(layers, max(1, self.steps // 2 // layers), LAYERWISE[self.config.distill])

    def loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        stage = self.schedule.active(step), self.schedule.is_last(step)
        return layerwise_loss(self.model, self.teacher, batch, self.config, *stage)

    def rate(self, step: int) -> float:
        """Warm-up, then constant while layers are added; in the last stage from a lower rate linearly to zero."""
        first = self.schedule.last_stage_start
        if self.schedule.is_last(step):
            return LAST_STAGE_LR * self.peak * (self.steps - step) / (self.steps - first)
        return self.peak * min(1.0, (step + 1) / max(1, round(first * WARMUP)))


class ProductPlan(Plan):
    """Iterative product quantization (pq.py): a group of matrices after the other is quantized, and the rest trained to
    make up for it. Each stage has a schedule of its own, the last one what is left of the steps.
    """

    stage = -1

    def begin(self, step: int, optimizers: list[torch.optim.Optimizer]) -> None:
        super().begin(step, optimizers)
        length, last = self.steps // len(STAGES), len(STAGES) - 1
        stage = min(step // length, last)
        if stage != self.stage:
            begin_stage(self.model, stage)
            parallel.same(self.model)
            if step == stage * length:  # moments are of the weights before
                for optimizer in optimizers:
                    optimizer.state.clear()
            self.stage, self.first = stage, stage * length
            self.length = self.steps - self.first if stage == last else length

    def rate(self, step: int) -> float:
        return linear_rate(step - self.first, self.length, self.peak)

    def evaluates(self, step: int) -> bool:
        """Only what is quantized completely can be kept."""
        return self.stage == len(STAGES) - 1 and super().evaluates(step)


def make_plan(config: TrainConfig, model: Model, teacher: Model | None, examples: int, method: str) -> Plan:
    layerwise = teacher is not None and config.distill in LAYERWISE
    kind = LayerwisePlan if layerwise else ProductPlan if any(product_quantizers(model)) else Plan
    return kind(config, model, teacher, examples, method)


def total_steps(config: TrainConfig, examples: int, student: bool) -> int:
    """The steps of a training: its epochs, but at most --steps or --student-steps."""
    epochs = config.student_epochs if student else config.epochs
    limit = config.student_steps if student else config.steps
    steps = epochs * -(-examples // config.batch_size)
    return min(steps, limit or steps)


def linear_rate(step: int, total: int, peak: float) -> float:
    """Linear warm-up to the peak, then linear decay to zero. step counts from 0."""
    rising = max(1, round(total * WARMUP))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * (total - step) / max(1, total - rising)


def make_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """AdamW, and SparseAdam for the word embeddings, whose gradient is sparse.

    SparseAdam updates only the rows of the batch, which is 30 times as fast on XLM-R's table as a step through 250,002
    rows. NOTE: differs: a row's moments decay only when its token occurs, and word embeddings have no weight
    decay; position and type embeddings have, as matrices do.
    """
    matrices, vectors, tables = [], [], []
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            # The per-row scales of lsq.py have the shape of a matrix; decay would pull them to 1.
            is_matrix = parameter.dim() > 1 and getattr(module, "decays", True)
            is_table = isinstance(module, nn.Embedding) and module.sparse
            (tables if is_table else matrices if is_matrix else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},  # biases, norms and scales
    ]
    dense = torch.optim.AdamW(groups, fused=True)
    return [dense, torch.optim.SparseAdam(tables)] if tables else [dense]


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Scale all gradients, sparse ones included, so that their common norm is at most `limit`. Returns the norm before."""
    gradients = []
    for parameter in (p for p in model.parameters() if p.grad is not None):
        if parameter.grad.is_sparse:  # coalesced, its values can be scaled in place
            parameter.grad = parameter.grad.coalesce()
        gradients.append(parameter.grad.values() if parameter.grad.is_sparse else parameter.grad)
    norm = torch.nn.utils.get_total_norm(gradients)
    torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


# ------------------------------------------------------------------------------------- the recipe
def get_teacher(run: Run, start: Start, data: Data) -> tuple[Model, int, float]:
    """The float32 teacher, trained now or before: (model, bytes on disk, seconds of training).

    Its file is named by all that it depends on, except the code: a teacher of other code is used, with a note.
    """
    is_made = run.config.epochs or start.read is None  # else a converted model as it stands, for all seeds and data
    key = [getattr(run.config, name) for name in (TEACHER_OPTIONS if is_made else ["task"])]
    key += [*start.identity, *(start.classes or ())]
    if is_made:
        key += [WARMUP, WEIGHT_DECAY, CLIP_NORM, LABEL_SMOOTHING, data.train.sha256, data.dev.sha256, run.device.type]
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:12]
    path = os.path.join(run.teachers, f"{run.config.task}-{start.name}-{digest}.safetensors")
    code = code_digests()
    if not parallel.anywhere(os.path.exists(path)):
        if run.resume and os.path.exists(run.path("results.json")):
            raise UserError(f"this run's teacher, {path}, is gone (or --lr changed): start with another --out")
        model = start.build()
        set_dropout(model, run.config.dropout)
        seconds = train(model.to(run.device), None, data, run, "fp32") if run.config.epochs else 0.0
        notes = {"seconds": f"{seconds:.1f}", "labels": "\t".join(start.labels), "code": code}
        # in this run's folder first: several runs may train the same teacher
        checkpoint.save_model(path, model, start.tokenizer.bytes, notes, temporary=run.path(TEACHER_PART))
        run.forget_state()
        del model
    else:
        print(f"fp32: teacher from {path}")
    read = checkpoint.read_model(path)
    if changed := set(code.split()) - set(read.notes.get("code", "").split()):
        names = ", ".join(sorted(name.partition("=")[0] for name in changed))
        print(f"NOTE: {names} changed since this teacher was trained: to train it again, delete {path}")
    teacher = checkpoint.teacher_model(read).to(run.device).requires_grad_(False)
    return teacher, os.path.getsize(path), float(read.notes.get("seconds", 0))


def code_digests() -> str:
    """NAME=DIGEST of each file that a teacher's parameters depend on."""
    digests = []
    for name in TEACHER_CODE:
        with open(os.path.join(HERE, *name.split("/")), "rb") as file:
            digests.append(f"{name}={hashlib.sha256(file.read()).hexdigest()[:12]}")
    return " ".join(digests)


def make_student(run: Run, teacher: Model, method: str, data: Data) -> tuple[Model, float]:
    """The teacher's copy, as tensor trains if wanted, fake-quantized, calibrated and repaired, and seconds of repair."""
    config = run.config
    student = copy.deepcopy(teacher)
    if config.tt_rank and not student.config.tt:
        torch.manual_seed(config.seed)
        print(f"{method}: {tensorize(student, tt_config(config), from_weights=True)}")
    student.requires_grad_(True).eval()
    set_dropout(student, config.student_dropout)
    quant = quant_config(config, method)
    try:
        summary = prepare(student, quant)
    except ValueError as error:  # a quantizer that needs other shapes
        raise UserError(f"{method}: {error}") from None
    print(f"{method}: {summary}")
    begin_stage(student, 0 if trains(method) else len(STAGES) - 1)
    reads = quant.act_range != "dynamic" or "+" in method  # static ranges or repairs
    batches = unpadded_batches(data.calibration, CALIBRATION, 32, config.seed) if reads else []
    batches = [batch.to(run.device) for batch in batches]
    if quant.act_range != "dynamic":
        torch.manual_seed(config.seed)
        calibrate(student, ((b.ids, b.mask, b.types) for b in batches))
    return student, repair(method, student, teacher, batches)


def run_student(run: Run, start: Start, teacher: Model, method: str, data: Data) -> dict:
    """One quantized row of the report. Writes student.safetensors."""
    config, task = run.config, start.task
    student, seconds = make_student(run, teacher, method, data)
    distills_from = teacher if method.startswith("sdq") else None  # also sdq+gptq
    seconds += train(student, distills_from, data, run, method) if trains(method) else 0.0
    begin_stage(student, len(STAGES) - 1)  # nothing waits any more, even if a resumed training had no step left
    quant = quant_config(config, method)
    notes = dict(task=config.task, model=start.name, method=method, data=start.data)
    notes |= {"train_language": task.train_language, "max_length": str(config.max_length)}
    notes |= {"labels": "\t".join(start.labels), "slots": "\t".join(start.slots), "texts": str(1 + data.train.pairs)}
    notes |= {"prompt": start.tokenizer.prompt}
    size = checkpoint.save_student(run.path(STUDENT), student, quant, start.tokenizer.bytes, notes)
    floats = 32 in (config.bits, config.act_bits)  # there are no integers to multiply
    model = student if floats else to_integer(student, quant, run.device)
    row = {"size_bytes": size, "train_seconds": seconds, "flops": count_flops(student)}
    row |= evaluate_languages(method, model, data.tests, task, run.device)
    if not floats and (config.analyze or run.device.type == "cuda"):
        row["student"] = evaluate_languages(f"{method}, fake-quantized", student, data.tests, task, run.device)
    if config.analyze:
        batches = list(batches_on(run.device, data.dev, batch_tokens(student, run.device)))
        row["errors"] = layer_errors(teacher, student, batches)
        row["recovery"] = attention_recovery(teacher, student, batches)
    return row


def open_run(config: TrainConfig, resume: bool) -> tuple[Run, Start, Data]:
    """The folder, model and data of a run. All options are checked before anything is written."""
    task, device = find_task(config.task, config.train_language), choose_device(config.device, config.threads)
    folder = find_data(task, config.data_dir, config.model)
    print(introduction(config, task, folder))
    start, out = Start(config, task, folder), config.out or default_out(config)
    config = fit(config, start.name, start.config.max_tokens, start.config.hidden_size, device)
    run = Run(out, config, device, resume, SAME_RUN + (("lr", "student_lr") if resume else ()))
    many = f"{parallel.world_size()} processes, " if parallel.world_size() > 1 else ""
    print(f"{hardware(device)}, {many}{torch.get_num_threads()} threads, training in {config.precision}, out {run.out}")

    language, how = task.train_language, (folder, start.tokenizer, config.max_length)
    splits = zip(selection_splits(task, config.eval_split, folder), (config.max_train, config.max_eval), strict=True)
    tests = load_tests(task, config.eval_split, config.languages, *how, config.max_eval)
    train_set, dev = (encode_split(task, split, language, *how, limit) for split, limit in splits)
    calibration = train_set
    if config.calibration:
        calibration = encode_file(config.calibration, train_set.pairs, start.tokenizer, config.max_length)
    data = Data(train_set, dev, tests, calibration)
    steps = {name: total_steps(config, len(data.train), name == "students") for name in ("teacher", "students")}
    print(*facts(train_set, dev, tests, task, folder, start.labels, config.max_length), sep="\n")
    print(f"steps of {config.batch_size}: " + ", ".join(f"{name} {count:,}" for name, count in steps.items()))
    check_steps(config, start.config.num_layers, steps["students"])

    sets = {"train": train_set, "dev": dev, "calibration": calibration}
    sets |= {f"test, {name}": each for name, each in tests.items()}
    made_of = repr([start.identity, start.labels, start.slots])
    contents = {"the model and its classes": hashlib.sha256(made_of.encode()).hexdigest()}
    contents |= {f"the data ({name})": each.sha256 for name, each in sets.items()}
    here = {"hardware": hardware(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    results = {"config": asdict(config), "model": start.name, "languages": list(tests)}
    results |= {"train_examples": len(data.train), "environment": here, "steps": steps}
    run.start(contents, results | {"test_examples": {name: len(each) for name, each in tests.items()}})
    quantized = [row for name, row in run.results["methods"].items() if name in config.methods and name != "fp32"]
    if config.analyze and any("errors" not in row for row in quantized):
        raise UserError(f"--analyze: {run.out} has rows that were not analyzed: resume without it, or change --out")
    return run, start, data


def check_steps(config: TrainConfig, layers: int, steps: int) -> None:
    """Raises UserError, before the teacher is trained, if a student has too few steps for its stages."""
    staged = config.weights == "pq" and any(map(trains, config.methods))
    option, least = "--weights pq", len(STAGES) if staged else 0
    if config.distill in LAYERWISE and any(method.startswith("sdq") for method in config.methods):
        option, least = f"--distill {config.distill}", layers + 1
    if steps < least:
        raise UserError(f"{option} needs {least} steps or more, not {steps}: raise --student-epochs or --student-steps")


@exit_status(": the same command with --resume continues")
def main(argv: list[str] | None = None) -> int:
    """All rows of the report. Returns the exit status: 1 if the last row does not pass --gate."""
    started = time.monotonic()
    config, resume = parse_args(argv)
    parallel.start(config.device)
    run, start, data = open_run(config, resume)
    teacher, teacher_bytes, teacher_seconds = get_teacher(run, start, data)
    left = [method for method in run.config.methods if method not in run.results["methods"]]  # of a stopped run
    cache = set_references(teacher, [data.dev, *data.tests.values()], run.device) if left else {}
    for method in left:
        if method == "fp32":
            row = {"size_bytes": teacher_bytes, "train_seconds": teacher_seconds, "flops": count_flops(teacher)}
            row |= evaluate_languages(method, teacher, data.tests, start.task, run.device, cache)
        else:
            row = run_student(run, start, teacher, method, data)
        run.finish_row(method, row)
    run.forget_state()  # of a run that was killed right after its last row
    results, task = run.results, start.task
    write_text(run.path("report.md"), report(results, task, selection_splits(task, config.eval_split, start.folder)[1]))
    if any("errors" in row for row in results["methods"].values()):
        print(f"\n{analysis_tables(results['methods'])}")
    wrote = f"wrote {run.out}/results.json, report.md"
    print("", report_table(results, task), "", *caveats(results, task), wrote, sep="\n")
    print(f"{clock(time.monotonic() - started)} in all")
    parallel.stop()
    failed = "" if run.config.gate is None else failed_gate(results, task, run.config.gate)
    if failed:
        print(failed, file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    parallel.leave(main())

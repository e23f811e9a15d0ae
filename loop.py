"""One training: the step, the loop around it, and how it goes on after being stopped.

The step is the whole of SDQ's optimization: student forward, cross-entropy, teacher forward,
distillation terms, backward, clipping, update. The same loop trains the float32 teacher (no
quantizers, no teacher) and every student.
"""

import copy
import json
import math
import os
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import read_checkpoint, save_atomically
from data import UserError
from data.batches import IGNORE, Batch, Dataset, collate, evaluation_batches, training_order
from data.metrics import METRICS, scores
from data.slots import slot_scores
from distill import (
    LAYERWISE,
    LayerSchedule,
    Logits,
    distillation_loss,
    layerwise_terms,
    part_weights,
    taps_of,
)
from model import Model
from options import TrainConfig
from report import write_text

STATE_FORMAT = "sdq-state-1"
EVAL_TOKENS = {"cpu": 1024, "cuda": 16384}  # tokens of an evaluation batch, padding included


# ----------------------------------------------------------------------------------- optimization
def make_optimizers(model: nn.Module, weight_decay: float) -> list[torch.optim.Optimizer]:
    """AdamW for all but the word embeddings, whose gradient is sparse: those go to SparseAdam.

    SparseAdam updates the rows of the batch alone, which is 30 times faster on XLM-R's table than
    stepping through 250,002 rows. NOTE: so a row's moments decay only when its word occurs, and
    embeddings have no decay.
    """
    matrices, vectors, tables = [], [], []
    sparse = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and m.sparse}
    for name, parameter in model.named_parameters():
        # learned.py's scales of rows are a matrix by their shape; decay would pull them to 1.
        is_matrix = parameter.dim() > 1 and not name.endswith("log_scale")
        kind = tables if id(parameter) in sparse else matrices if is_matrix else vectors
        kind.append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},  # biases, norms and scales
    ]
    optimizers = [torch.optim.AdamW(groups, fused=True)]
    if tables:
        optimizers.append(torch.optim.SparseAdam(tables))
    return optimizers


def learning_rate(step: int, total: int, peak: float, warmup: float) -> float:
    """Linear warm-up to the peak, then linear decay to zero. step counts from 0."""
    rising = max(1, round(total * warmup))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * (total - step) / max(1, total - rising)


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Scale all gradients so that their common norm is at most `limit`. Returns the norm before."""
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


def layerwise_rate(
    step: int, total: int, schedule: LayerSchedule, peak: float, last: float, warmup: float
) -> float:
    """Of layer-by-layer distillation: warm-up and a constant rate while blocks join; in the last
    stage, from a lower rate linearly down to zero.
    """
    first = schedule.last_stage_start
    if schedule.is_last(step):
        return last * (total - step) / (total - first)
    return peak * min(1.0, (step + 1) / max(1, round(first * warmup)))


def task_loss(logits: Logits, batch: Batch, smoothing: float) -> Tensor:
    """Cross-entropy with the labels; of a joint head, that of the text plus that of its words. Where
    a label is a number (STS-B), the squared error.
    """
    if batch.labels.is_floating_point():
        return F.mse_loss(logits[:, 0].float(), batch.labels)
    if batch.tags is None:
        return F.cross_entropy(logits.float(), batch.labels, label_smoothing=smoothing)
    intents, slots = logits
    words = batch.tags != IGNORE
    of_words = F.cross_entropy(slots[words].float(), batch.tags[words], label_smoothing=smoothing)
    return F.cross_entropy(intents.float(), batch.labels, label_smoothing=smoothing) + of_words


def loss_terms(
    student: Model,
    teacher: Model | None,
    batch: Batch,
    config: TrainConfig,
    parts: tuple[str, ...],
) -> dict[str, Tensor]:
    """What a student is trained on: the task's loss, and what is distilled."""
    taps = taps_of(parts, config.output_tap)
    outputs = student(batch.ids, batch.mask, taps, batch.types)
    task = task_loss(outputs[0], batch, config.label_smoothing or 0.0)
    if not parts:
        return {"task": task}
    with torch.no_grad():
        targets = teacher(batch.ids, batch.mask, taps, batch.types)
    weights = part_weights(parts, config.alpha, config.beta, config.gamma, config.part_weights)
    how = (weights, config.temperature, config.output_tap, config.distill_layers)
    terms = distillation_loss(parts, outputs, targets, batch.mask, *how)
    return terms | ({"task": config.task_weight * task} if config.task_weight else {})


def stage_terms(
    student: Model,
    teacher: Model,
    batch: Batch,
    config: TrainConfig,
    schedule: LayerSchedule,
    step: int,
) -> dict[str, Tensor]:
    """The same for layer-by-layer distillation: the blocks of this step's stage; with soft labels
    and the task in the last.
    """
    blocks, last = schedule.blocks(step), schedule.is_last(step)
    depth = None if last else max(blocks)  # blocks above are not looked at yet: they don't run
    inputs = (batch.ids, batch.mask, ("hidden", "map"), batch.types)
    outputs = student(*inputs, depth=depth)
    with torch.no_grad():
        targets = teacher(*inputs, depth=depth)
    terms = layerwise_terms(outputs[1], targets[1], blocks, batch.mask)
    if last:
        weights = ({"logits": config.alpha}, config.temperature)
        terms |= distillation_loss(("logits",), outputs, targets, batch.mask, *weights)
        terms["task"] = task_loss(outputs[0], batch, config.label_smoothing or 0.0)
    return terms


def train_step(
    student: Model,
    teacher: Model | None,
    batch: Batch,
    optimizers: list[torch.optim.Optimizer],
    config: TrainConfig,
    parts: tuple[str, ...] = (),
    schedule: LayerSchedule | None = None,
    step: int = 0,
) -> dict[str, float]:
    """One update. Returns the loss, its terms and the gradient norm.

    schedule and step: of layer-by-layer distillation.

    Raises FloatingPointError, before anything is updated, if one of them is not a finite number.
    """
    # bf16 halves the time of a matrix product on a GPU. NOTE: it also rounds the quantized values
    # (8 bits of mantissa); evaluation is always in float32.
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=batch.ids.is_cuda):
        if schedule is None:
            terms = loss_terms(student, teacher, batch, config, parts)
        else:
            terms = stage_terms(student, teacher, batch, config, schedule, step)
        loss = sum(terms.values())
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = clip_gradients(student, config.clip)
    names = ("loss", *terms, "norm")
    values = torch.stack([loss.detach(), *(t.detach() for t in terms.values()), norm]).tolist()
    record = dict(zip(names, values, strict=True))
    bad = [name for name, value in record.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(bad[0])
    for optimizer in optimizers:
        optimizer.step()
    return record


@torch.no_grad()
def evaluate(model: Model, dataset: Dataset, device: torch.device) -> dict:
    """The dataset's metrics in %, "score" (their mean), and the counts behind them. With tags:
    accuracy is that of the intents; the slots' scores, and how many sentences have everything right,
    stand beside it.
    """
    model.eval()
    said, labels, gold, guessed = [], [], [], []  # of each text; of the words of each text
    for batch in evaluation_batches(dataset, EVAL_TOKENS[device.type]):
        batch = batch.to(device)
        logits, _ = model(batch.ids, batch.mask, types=batch.types)
        if batch.tags is not None:
            logits, slots = logits
            words = batch.tags != IGNORE
            borders = words.sum(dim=1).cumsum(dim=0)[:-1].cpu()
            gold += np.split(batch.tags[words].cpu().numpy(), borders)
            guessed += np.split(slots.argmax(dim=-1)[words].cpu().numpy(), borders)
        is_class = not batch.labels.is_floating_point()
        said.append((logits.argmax(dim=-1) if is_class else logits[:, 0]).cpu())
        labels.append(batch.labels.cpu())
    said, labels = torch.cat(said).numpy(), torch.cat(labels).numpy()
    found = scores(dataset.metrics, said, labels)
    if gold:
        total = len(dataset)
        named = ([[dataset.slots[i] for i in row] for row in rows] for rows in (gold, guessed))
        found |= slot_scores(*named)
        whole = (np.array_equal(a, b) for a, b in zip(gold, guessed, strict=True))
        exact = sum(bool(a and b) for a, b in zip(said == labels, whole, strict=True))
        found |= {"exact": 100 * exact / total, "exact_correct": exact}
    return found


def dev_score(found: dict) -> float:
    """What the best look at dev is chosen by: the mean of the task's metrics."""
    return (found["score"] + found.get("slot_f1", found["score"])) / 2


def describe(found: dict) -> str:
    """An evaluation in words."""
    if "slot_f1" in found:
        return f"intents {found['accuracy']:.2f} %, slot F1 {found['slot_f1']:.2f} %"
    named = [name for name in METRICS if name in found]
    if named == ["accuracy"]:
        return f"{found['accuracy']:.2f} %"
    return ", ".join(f"{name} {found[name]:.2f}" for name in named)


# ------------------------------------------------------------------------------------- a training
@dataclass
class Run:
    """What all trainings of one run share."""

    config: TrainConfig
    out: str
    device: torch.device
    train: Dataset
    dev: Dataset

    @property
    def log_file(self) -> str:
        return os.path.join(self.out, "log.jsonl")

    @property
    def results_file(self) -> str:
        return os.path.join(self.out, "results.json")

    @property
    def state_file(self) -> str:
        return os.path.join(self.out, "state.pt")


class Progress:
    """One line that keeps itself up to date on a terminal; in a log, a line every ten seconds."""

    def __init__(self, name: str, total: int, done: int = 0):
        self.name, self.total, self.done = name, total, done
        self.first = done
        self.begun, self.last = time.monotonic(), 0.0
        self.tokens = 0
        self.live = sys.stdout.isatty()

    def step(self, record: dict, lr: float, tokens: int) -> None:
        self.done += 1
        self.tokens += tokens
        now = time.monotonic()
        if now - self.last < (0.2 if self.live else 10.0) and self.done < self.total:
            return
        self.last = now
        each = (now - self.begun) / (self.done - self.first)
        terms = " ".join(f"{k} {v:.3g}" for k, v in record.items() if k not in ("loss", "norm"))
        print_live(
            f"{self.name} {self.done}/{self.total}  loss {record['loss']:.3f} ({terms})  lr {lr:.1e}  "
            f"{each * 1e3:.0f} ms/step  {self.tokens / (now - self.begun):,.0f} tok/s  "
            f"ETA {clock(each * (self.total - self.done))}",
            self.live,
        )

    def close(self) -> None:
        if self.live and self.done > self.first:
            print()


def print_live(text: str, live: bool) -> None:
    if live:
        print("\r\033[K" + text, end="", flush=True)
    else:
        print(text, flush=True)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def train(
    run: Run,
    name: str,
    student: Model,
    teacher: Model | None,
    parts: tuple[str, ...],
    epochs: int,
    peak_lr: float,
    resume: bool,
) -> float:
    """Train in place, leave the weights of the best look at English dev, return the seconds.

    Raises UserError when the loss or a weight is no longer a finite number.
    """
    optimizers = make_optimizers(student, run.config.weight_decay)
    state = State(name)
    if resume and state.load(run.state_file, student, optimizers):
        print(f"{name}: goes on after step {state.step}")
    else:
        torch.manual_seed(run.config.seed)
    if resume:
        trim_log(run.log_file, name, state.step)
    try:
        run_steps(run, state, student, teacher, parts, optimizers, epochs, peak_lr)
    except FloatingPointError as error:
        raise UserError(not_finite(state, str(error), run.state_file)) from None
    student.load_state_dict(state.best_tensors)
    print(f"{name}: keeps step {state.best_step}, dev {state.best_text}")
    return state.seconds


def run_steps(
    run: Run,
    state: "State",
    student: Model,
    teacher: Model | None,
    parts: tuple[str, ...],
    optimizers: list[torch.optim.Optimizer],
    epochs: int,
    peak_lr: float,
) -> None:
    """The loop: batches, learning rate, step, log, looks at English dev, states to resume from."""
    config, name = run.config, state.name
    per_epoch = -(-len(run.train) // config.batch_size)
    limit = config.steps if name == "fp32" else config.student_steps or config.steps
    total = min(epochs * per_epoch, limit or epochs * per_epoch)
    schedule = None
    if LAYERWISE in parts:
        schedule = layer_schedule(config, student.config.num_layers, total)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    progress = Progress(name, total, state.step)
    begun = time.monotonic() - state.seconds
    order, order_epoch = [], -1
    while state.step < total:
        epoch, index = divmod(state.step, per_epoch)
        if epoch != order_epoch:
            order = training_order(run.train, config.batch_size, config.seed, epoch)
            order_epoch = epoch
        batch = collate(run.train, order[index]).to(run.device)
        if schedule is None:
            lr = learning_rate(state.step, total, peak_lr, config.warmup)
        else:
            last_lr = config.last_lr or peak_lr / 20
            lr = layerwise_rate(state.step, total, schedule, peak_lr, last_lr, config.warmup)
        for group in groups:
            group["lr"] = lr
        started = time.monotonic()
        student.train()
        record = train_step(
            student, teacher, batch, optimizers, config, parts, schedule, state.step
        )
        state.step += 1
        ms = 1e3 * (time.monotonic() - started)
        progress.step(record, lr, batch.tokens)
        extra = {"lr": lr, "ms": ms, "tokens": batch.tokens}
        log(run, {"method": name, "step": state.step, **record, **extra})
        look = index + 1 == per_epoch or state.step == total
        look = look or bool(config.eval_every and state.step % config.eval_every == 0)
        if look:
            found = evaluate(student, run.dev, run.device)
            progress.close()
            print(f"{name}: step {state.step}, dev {describe(found)}", flush=True)
            log(run, {"method": name, "step": state.step, "dev_score": dev_score(found)})
            if dev_score(found) > state.best_score:
                state.keep_best(student, found)
        if look or state.step % config.save_every == 0:
            state.seconds = time.monotonic() - begun
            state.save(run.state_file, student, optimizers)


def layer_schedule(config: TrainConfig, layers: int, total: int) -> LayerSchedule:
    """Raises UserError if the last stage would never come."""
    stage_steps = config.stage_steps or max(1, total // 2 // layers)
    schedule = LayerSchedule(layers, stage_steps, config.order)
    if schedule.last_stage_start >= total:
        raise UserError(
            f"--stage-steps {stage_steps} for {layers} blocks leaves nothing of {total} steps for the "
            f"last stage: use {max(1, total // 2 // layers)}, or more --student-epochs"
        )
    return schedule


class State:
    """Where a training stands: enough to go on bit for bit. Batches follow from seed and step."""

    def __init__(self, name: str):
        self.name, self.step, self.seconds = name, 0, 0.0
        # A correlation may be -100 %: any first look is better than none.
        self.best_score, self.best_text, self.best_step, self.best_tensors = -1e9, "", 0, {}

    def keep_best(self, student: Model, found: dict) -> None:
        self.best_score, self.best_text = dev_score(found), describe(found)
        self.best_step = self.step
        tensors = student.state_dict()
        self.best_tensors = {k: t.detach().to("cpu", copy=True) for k, t in tensors.items()}

    def save(self, path: str, student: Model, optimizers: list[torch.optim.Optimizer]) -> None:
        """Raises FloatingPointError, and keeps the earlier file, if an update broke the weights."""
        if not all(t.isfinite().all() for t in student.state_dict().values()):
            raise FloatingPointError("a weight")
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        payload = {
            "format": STATE_FORMAT,
            "state": vars(self),
            "tensors": student.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
        }
        save_atomically(payload, path)

    def load(self, path: str, student: Model, optimizers: list[torch.optim.Optimizer]) -> bool:
        """False if there is no state of this training."""
        if not os.path.exists(path):
            return False
        payload = read_checkpoint(path, STATE_FORMAT)
        if payload["state"]["name"] != self.name:
            return False
        vars(self).update(payload["state"])
        student.load_state_dict(payload["tensors"])
        for optimizer, saved in zip(optimizers, payload["optimizers"], strict=True):
            optimizer.load_state_dict(copy.deepcopy(saved))  # a copy: the file will be replaced
        torch.set_rng_state(payload["rng"]["cpu"].clone())
        if payload["rng"]["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(payload["rng"]["cuda"].clone())
        self.best_tensors = {k: t.clone() for k, t in self.best_tensors.items()}
        return True


def log(run: Run, record: dict) -> None:
    with open(run.log_file, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def trim_log(path: str, name: str, step: int) -> None:
    """Forget what was logged after the state that a resumed training starts from: it comes again."""
    if not os.path.exists(path):
        return
    kept = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:  # the last line of a run that was killed while writing it
                continue
            if record["method"] != name or record["step"] <= step:
                kept.append(json.dumps(record) + "\n")
    write_text(path, "".join(kept))


def not_finite(state: State, what: str, state_file: str) -> str:
    text = f"{state.name}: {what} is not a finite number after {state.step} steps; "
    text += "try a lower --lr or --student-lr"
    if os.path.exists(state_file):
        text += f"; the last good state is kept in {state_file}, and --resume goes on from it"
    return text

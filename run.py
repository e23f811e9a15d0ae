"""The folder of a run, out/NAME: log, results, and the state from which a stopped run continues bit for bit.

    config.json    every option
    log.jsonl      one line per step and per evaluation on dev
    state.pt       where the current training stands: parameters, optimizers, random numbers
    results.json   for each method and language the metrics and the counts behind them
    report.md      the same as a table
    student.pt     the student of the last row, packed (checkpoint.py)

Teachers are kept beside it, in teachers/, and reused by every run that would train the same one.
"""

import copy
import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from checkpoint import TEACHERS, check_kinds, check_tensors, read_checkpoint, save_atomically
from config import METHODS, NOT_COMPARED, TRAINED, TrainConfig
from data.batches import Batch, Dataset, collate, training_order
from kit import common, parallel
from kit.common import Progress, UserError, flag, hardware
from kit.files import check_writable, remove, write_json, write_text
from model import Model

STATE_FORMAT = "sdq-state-3"
NEXT_RANK = 1_000_003  # between the seeds of two processes
TERMINATED = 143  # exit status after SIGTERM, 128 + 15
STOPPED = "stopped by SIGTERM: the same command with --resume continues\n"
SAVE_SECONDS = 120  # at most this much work is lost
SAVE_EVERY = 500  # steps between states; one also follows every evaluation on dev


class Data(NamedTuple):
    train: Dataset
    dev: Dataset
    tests: dict[str, Dataset]  # by language


class Run:
    """The folder of a run. Raises UserError if it can't be written or holds another run."""

    def __init__(self, out: str, config: TrainConfig, device: torch.device, resume: bool):
        self.out, self.config, self.device, self.resume = out, config, device, resume
        self.teachers = os.path.join(os.path.dirname(os.path.abspath(out)), TEACHERS)
        for folder in (out, self.teachers):
            check_writable(folder)
        self.results: dict = {}
        self.contents: dict[str, str] = {}  # of what a run to be resumed reads: digests by name
        self.check_same()

    def path(self, name: str) -> str:
        return os.path.join(self.out, name)

    def check_same(self) -> None:
        """Raises UserError instead of resuming with other options, or overwriting another run or a stopped one."""
        settings = json.loads(json.dumps(asdict(self.config)))  # tuples become lists, as in the file
        try:
            with open(self.path("config.json"), encoding="utf-8") as file:
                before = json.load(file)
        except FileNotFoundError:
            if self.resume:
                raise UserError(f"no run to resume in {self.out}: drop --resume") from None
            return
        except ValueError:
            before = None
        if not isinstance(before, dict) or "task" not in before:
            raise UserError(f"{self.out}/config.json is not of a run of train.py: choose another --out")
        self.contents = before.get("contents", {}) if self.resume else {}
        may_differ = {*NOT_COMPARED, *(("lr", "student_lr") if self.resume else ())}
        differs = [k for k in settings if before.get(k) != settings[k] and k not in may_differ]
        if differs:
            name = differs[0]
            advice = "resume with the same options" if self.resume else "choose another --out"
            held = f"{self.out} holds a run with {flag(name)} {before.get(name)}, not {settings[name]}"
            raise UserError(f"{held}: {advice}, or delete it")
        if not self.resume and os.path.exists(self.path("state.pt")):
            raise UserError(f"{self.out} holds a stopped run: continue it with --resume, or delete it")

    def start(self, model: str, data: Data, identity: list) -> None:
        """Read the rows that a resumed run has finished, else remove what an earlier run left; write config.json.

        identity: of the model that fine-tuning starts from, and its classes.  Raises UserError if another process runs
        in this folder now, or if a run to be resumed began with other data.
        """
        sets = {"train": data.train, "dev": data.dev, **{f"test, {name}": each for name, each in data.tests.items()}}
        contents = {"the model and its classes": hashlib.sha256(repr(identity).encode()).hexdigest()}
        contents |= {f"the data ({name})": each.sha256 for name, each in sets.items()}
        if changed := next((name for name, digest in self.contents.items() if contents.get(name) != digest), None):
            raise UserError(f"--resume: {changed} changed since {self.out} began: restore it, or choose another --out")
        os.makedirs(self.out, exist_ok=True)
        if common.writes:
            if (lock := lock_folder(self.out)) is not None:
                weakref.finalize(self, os.close, lock)
        self.results = {"config": asdict(self.config), "model": model, "languages": list(data.tests)}
        here = {"hardware": hardware(self.device), "threads": torch.get_num_threads(), "torch": torch.__version__}
        self.results |= {"train_examples": len(data.train), "environment": here, "methods": {}}
        self.results["test_examples"] = {name: len(dataset) for name, dataset in data.tests.items()}
        if self.resume and os.path.exists(self.path("results.json")):
            self.results["methods"] = self.read_rows(data)
        elif not self.resume:
            for name in ("log.jsonl", "results.json", "report.md", "student.pt"):
                remove(self.path(name))
        quantized = [row for name, row in self.results["methods"].items() if name in METHODS and name != "fp32"]
        if self.config.analyze and any("errors" not in row for row in quantized):
            raise UserError(
                f"--analyze: {self.out} has rows that were not analyzed: resume without it, or change --out"
            )
        write_json(self.path("config.json"), {**asdict(self.config), "contents": contents})

    def read_rows(self, data: Data) -> dict[str, dict]:
        """The rows of results.json. Raises UserError if it is damaged."""
        path = self.path("results.json")
        try:
            with open(path, encoding="utf-8") as file:
                rows = json.load(file)["methods"]
            for row in rows.values():  # what the table needs
                row["size_bytes"], row["train_seconds"], row["score"], row["zero_shot_mean"]
                [row["languages"][language]["score"] for language in data.tests]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} is damaged: delete it, and --resume makes its rows again") from None
        return rows

    def finish_row(self, method: str, row: dict) -> None:
        """Add a row to results.json. The state of its training is no longer needed."""
        if curve := self.dev_curve(method):
            row["dev_curve"] = curve
        self.results["methods"][method] = row
        write_json(self.path("results.json"), self.results)
        if method in TRAINED:
            remove(self.path("state.pt"))
        parallel.wait()  # the others must not see the state of a finished row

    # ---------------------------------------------------------------------------------------- log
    def log(self, record: dict) -> None:
        if not common.writes:
            return
        with open(self.path("log.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read_log(self) -> list[dict]:
        try:
            with open(self.path("log.jsonl"), encoding="utf-8", errors="replace") as file:
                lines = file.read().splitlines()
        except FileNotFoundError:
            return []
        records = []
        for line in lines:
            try:
                record = json.loads(line)
                record["method"], record["step"] + 0
                records.append(record)
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a run that was killed while writing it, or a damaged one
        return records

    def dev_curve(self, method: str) -> list[list[float]]:
        """[step, score on dev] of each evaluation of a training."""
        records = [record for record in self.read_log() if record["method"] == method]
        return [[r["step"], r["dev_score"]] for r in records if "dev_score" in r]

    def trim_log(self, method: str, step: int) -> None:
        """Remove what was logged after the state that a resumed training continues from."""
        kept = [r for r in self.read_log() if r["method"] != method or r["step"] <= step]
        write_text(self.path("log.jsonl"), "".join(json.dumps(r) + "\n" for r in kept))


class Stop:
    """What SIGTERM, which schedulers send some time before they kill, has to do."""

    training = False  # whether there is a state to save
    wanted = False


def stop_at_sigterm() -> None:
    """From now on SIGTERM ends the process with the status TERMINATED; a training saves its state first."""
    Stop.training = Stop.wanted = False

    def stop(*_) -> None:
        Stop.wanted = True
        if Stop.training:
            return
        # Nothing to save. An exception would be raised wherever the program is, also where Python hides it.
        with suppress(RuntimeError):  # the program may be printing now
            sys.stdout.flush()
        os.write(2, STOPPED.encode())
        os._exit(TERMINATED)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


def stopped() -> None:
    sys.stderr.write("torchrun is gone; " * parallel.orphan() + STOPPED)
    parallel.leave(TERMINATED)


def lock_folder(folder: str) -> int | None:
    """Hold a folder until the descriptor is closed or this process ends, however it ends. None where the system has no
    such locks.

    Raises UserError if another process holds it.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"another run is writing to {folder} now: wait for it, or choose another --out") from None
    except OSError:  # a file system without locks
        os.close(descriptor)
        return None
    return descriptor


# ------------------------------------------------------------------------------------- a training
class Training:
    """The steps of one training, its best parameters, and its state on disk.

    Everything follows from the seed and the step: a training that continues from a state, in as many processes, gives
    the same bits as one that was never stopped.
    """

    def __init__(self, run: Run, name: str, model: Model, optimizers: list[torch.optim.Optimizer], dataset: Dataset):
        self.run, self.name, self.model, self.optimizers = run, name, model, optimizers
        config, student = run.config, name in TRAINED
        self.dataset, self.batch_size = dataset, config.batch_size
        self.total_steps = total_steps(config, len(dataset), student)
        self.per_epoch = -(-len(dataset) // config.batch_size)
        self.step, self.seconds = 0, 0.0
        # A correlation can be -100 %: any first evaluation is better than none.
        self.best = {"score": -1e9, "text": "", "step": 0, "tensors": {}}
        if run.resume and self.load():
            print(f"{name}: continues after step {self.step}")
        else:
            torch.manual_seed(config.seed + NEXT_RANK * parallel.rank())
        if run.resume:
            run.trim_log(name, self.step)
        parallel.same(model)
        self.progress = Progress(name, self.total_steps, self.step)
        self.saved = time.monotonic()
        self.started = self.saved - self.seconds

    def steps(self) -> Iterator[tuple[int, Batch]]:
        """(step, batch) of every step that is left. Saves the state every SAVE_EVERY steps and SAVE_SECONDS, after
        evaluations, and when the process is asked to end.
        """
        order, order_epoch = [], -1
        Stop.training = True
        while self.step < self.total_steps:
            epoch, index = divmod(self.step, self.per_epoch)
            if epoch != order_epoch:
                order = training_order(self.dataset, self.batch_size, self.run.config.seed, epoch)
                order_epoch = epoch
            self.step_started = time.monotonic()
            yield self.step, collate(self.dataset, order[index]).to(self.run.device)
            evaluated = self.should_evaluate()
            self.step += 1
            late = time.monotonic() - self.saved > SAVE_SECONDS
            wanted = Stop.wanted or parallel.orphan()
            asked = parallel.anywhere(wanted or late)  # seldom, so that a step has one such question
            stop = asked and parallel.anywhere(wanted)
            if evaluated or asked or self.step % SAVE_EVERY == 0:
                self.save()
                self.saved = time.monotonic()
            if stop:
                parallel.wait()  # for rank 0 to write
                stopped()
        Stop.training = False
        if parallel.anywhere(Stop.wanted):
            stopped()

    def should_evaluate(self) -> bool:
        """Whether an epoch, the training or --eval-every steps end with the current step."""
        done, every = self.step + 1, self.run.config.eval_every
        ends = done % self.per_epoch == 0 or done == self.total_steps
        return ends or bool(every and done % every == 0)

    def check_finite(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Scalar tensors -> floats. Raises UserError if one is not finite."""
        numbers = torch.stack([value.detach() for value in values.values()]).tolist()
        record = dict(zip(values, numbers, strict=True))
        for name, value in record.items():
            if not math.isfinite(value):
                raise UserError(self.not_finite(name))
        return record

    def log(self, record: dict[str, float], lr: float, tokens: int) -> None:
        """Log the current step and update the progress line."""
        done, seconds = self.step + 1, time.monotonic() - self.step_started
        extra = {"lr": lr, "ms": 1e3 * seconds, "tokens": tokens}
        self.run.log({"method": self.name, "step": done, **record, **extra})

        def text() -> str:
            terms = " ".join(f"{k} {v:.3g}" for k, v in record.items() if k not in ("loss", "norm"))
            speed = f"{1e3 * seconds:.0f} ms/step  {tokens / seconds:,.0f} tok/s"
            return f"loss {record['loss']:.3f} ({terms})  lr {lr:.1e}  {speed}"

        self.progress.update(done, text)

    def select(self, evaluation: dict, text: str) -> None:
        """Log an evaluation on dev after the current step, and keep the parameters if it is the best."""
        self.progress.clear()
        done, score = self.step + 1, evaluation["score"]
        print(f"{self.name}: step {done}, dev {text}", flush=True)
        self.run.log({"method": self.name, "step": done, "dev_score": score})
        if score > self.best["score"]:
            state = self.model.state_dict()
            tensors = {k: t.detach().to("cpu", copy=True) for k, t in state.items()}
            self.best = {"score": score, "text": text, "step": done, "tensors": tensors}

    def finish(self) -> float:
        """Restore the best parameters. Returns the seconds of the training."""
        self.model.load_state_dict(self.best["tensors"])
        print(f"{self.name}: keeps step {self.best['step']}, dev {self.best['text']}")
        return self.seconds

    def save(self) -> None:
        """Raises UserError, and keeps the earlier state, if an update broke the parameters."""
        state = self.model.state_dict()
        if not all(t.isfinite().all() for t in state.values()):
            raise UserError(self.not_finite("a weight"))
        self.seconds = time.monotonic() - self.started
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        numbers = parallel.gather([{"cpu": torch.get_rng_state(), "cuda": cuda}])
        if not common.writes:
            return
        payload = {
            "format": STATE_FORMAT,
            "progress": [self.name, self.step, self.seconds],
            "best": self.best,
            "tensors": state,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": numbers,  # of each process
        }
        save_atomically(payload, self.run.path("state.pt"))

    def load(self) -> bool:
        """Continue from the state on disk; False if there is none of this training."""
        path = self.run.path("state.pt")
        if not os.path.exists(path):
            return False
        payload = read_checkpoint(path, STATE_FORMAT)
        try:
            check_kinds(payload, progress=list, best=dict, tensors=dict, optimizers=list, rng=list)
            name, step, seconds = payload["progress"]
            if name != self.name:
                return False
            # Copies, because the tensors are mapped from a file that will be replaced.
            payload = copy.deepcopy(payload)
            self.check_state(path, payload)
            self.step, self.seconds, self.best = step, float(seconds), payload["best"]
            self.model.load_state_dict(payload["tensors"])
            for optimizer, saved in zip(self.optimizers, payload["optimizers"], strict=True):
                groups = optimizer.state_dict()["param_groups"]  # all that may change is the rate, at every step
                optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
            if len(payload["rng"]) == parallel.world_size():
                numbers = payload["rng"][parallel.rank()]
                torch.set_rng_state(numbers["cpu"])
                if numbers["cuda"] is not None and torch.cuda.is_available():
                    torch.cuda.set_rng_state(numbers["cuda"])
            else:
                print(f"{name}: {len(payload['rng'])} processes before, now {parallel.world_size()}: other noise")
                torch.manual_seed(self.run.config.seed + NEXT_RANK * parallel.rank() + step)
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            text = str(error).split("\n")[0][:100]
            raise UserError(f"{path} is damaged ({text}): delete it, and --resume trains {self.name} again") from None
        return True

    def check_state(self, path: str, payload: dict) -> None:
        """Raises UserError, or ValueError and the like, for a state that is not one of this training: an optimizer
        computes with whatever shapes it is given.
        """
        _, step, _ = payload["progress"]
        best, shapes = payload["best"], {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        check_tensors(path, shapes, payload["tensors"], dtypes=())
        if best["tensors"]:
            check_tensors(path, shapes, best["tensors"], dtypes=())
        if not 0 <= step <= self.total_steps or not 0 <= best["step"] <= step:
            raise ValueError(f"step {step} of {self.total_steps}")
        math.isfinite(best["score"]), best["text"] + ""
        for optimizer, saved in zip(self.optimizers, payload["optimizers"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for i, values in saved["state"].items():
                moments = {name: values[name] for name in ("exp_avg", "exp_avg_sq")}
                check_tensors(path, dict.fromkeys(moments, parameters[i].shape), moments)
                if float(values["step"]) < 0 or len(values) != 3:
                    raise ValueError("a state of another optimizer")

    def not_finite(self, what: str) -> str:
        text = f"{self.name}: {what} is not finite after {self.step} steps; "
        text += "try a lower --lr or --student-lr"
        path = self.run.path("state.pt")
        if os.path.exists(path):
            text += f"; the last good state is kept, and --resume --out {self.run.out} continues from it"
        return text


def total_steps(config: TrainConfig, examples: int, student: bool) -> int:
    """The steps of a training: its epochs, but at most --steps or --student-steps."""
    epochs = config.student_epochs if student else config.epochs
    limit = config.student_steps if student else config.steps
    steps = epochs * -(-examples // config.batch_size)
    return min(steps, limit or steps)


TEACHER_OPTIONS = (  # all that the parameters of a teacher depend on, besides model, data and how batches are cut
    "task max_train max_eval max_length epochs steps batch_size lr dropout seed eval_every label_smoothing precision"
).split()


def teacher_path(run: Run, model: str, identity: list, data: Data) -> str:
    """The file of the teacher that this run would train.  identity: of the model that it starts from, and constants.

    The code is not part of the name: after a change of the loss or the model, delete teachers/.
    """
    key = [getattr(run.config, name) for name in TEACHER_OPTIONS] + identity
    key += [data.train.sha256, data.dev.sha256, run.device.type]
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:12]
    return os.path.join(run.teachers, f"{run.config.task}-{model}-{digest}.pt")

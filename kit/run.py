"""The folder of a run, out/NAME: log, results, and the state from which a stopped run continues bit for bit.

    config.json          every option, and digests of the data
    log.jsonl            one line per step and per evaluation on dev
    state.safetensors    where the current training stands: parameters, optimizers, random numbers
    results.json         for each method and language the metrics and the counts behind them
    report.md            the same as a table
    student.safetensors  the student of the last row, packed (checkpoint.py)

Teachers are kept beside it, in teachers/, and reused by every run that would train the same one.
"""

import json
import math
import os
import time
import weakref
import zlib
from dataclasses import asdict

import torch
from torch import Tensor, nn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from kit import common, parallel
from kit.common import Progress, UserError, flag
from kit.files import check_writable, read_tensors, remove, write_json, write_tensors, write_text

STATE, STUDENT = "state.safetensors", "student.safetensors"
TEACHER_PART = "teacher.part"  # a teacher while it is written
STATE_FORMAT = "sdq-state-4"
TEACHERS = "teachers"
NEXT_RANK = 1_000_003  # between the seeds of two processes
SAVE_SECONDS = 120  # at most this much work is lost
SAVE_EVERY = 500  # steps between states; one also follows every evaluation on dev


class Run:
    """The folder of a run. Raises UserError if it can't be written, or instead of resuming with other options, or
    overwriting another run or a stopped one.

    config: a dataclass of all options.  may_differ: those that do not make it another run.
    """

    def __init__(self, out: str, config, device: torch.device, resume: bool, may_differ: tuple[str, ...] = ()):
        self.out, self.config, self.device, self.resume = out, config, device, resume
        self.teachers = os.path.join(os.path.dirname(os.path.abspath(out)), TEACHERS)
        check_writable(out)
        check_writable(self.teachers)
        self.contents: dict[str, str] = {}  # of what a run to be resumed reads: digests by name
        self.training = ""  # whose state may be on disk
        try:
            with open(self.path("config.json"), encoding="utf-8") as file:
                before = json.load(file)
            contents = dict(before["contents"])
        except FileNotFoundError:
            if resume:
                raise UserError(f"no run to resume in {out}: drop --resume") from None
            return
        except (ValueError, TypeError, LookupError):
            raise UserError(f"{out}/config.json is not of a run of train.py: choose another --out") from None
        for name, value in json.loads(json.dumps(asdict(config))).items():  # tuples become lists, as in the file
            if before.get(name) != value and name not in may_differ:
                held = f"{out} holds a run with {flag(name)} {before.get(name)}, not {value}"
                advice = "resume with the same options" if resume else "choose another --out"
                raise UserError(f"{held}: {advice}, or delete it")
        if resume:
            self.contents = contents
        elif os.path.exists(self.path(STATE)):
            raise UserError(f"{out} holds a stopped run: continue it with --resume, or delete it")

    def path(self, name: str) -> str:
        return os.path.join(self.out, name)

    def start(self, contents: dict[str, str], results: dict) -> None:
        """Read the rows that a resumed run has finished, else remove what an earlier run left; write config.json.

        contents: digests of what the run reads, by name.  results: what results.json says besides the rows.  Raises
        UserError if another process runs in this folder now, or if a run to be resumed began with other contents.
        """
        if changed := next((name for name, digest in self.contents.items() if contents.get(name) != digest), None):
            raise UserError(f"--resume: {changed} changed since {self.out} began: restore it, or choose another --out")
        os.makedirs(self.out, exist_ok=True)
        if common.writes and fcntl is not None:  # hold the folder until this object or process ends, however it ends
            descriptor = os.open(self.out, os.O_RDONLY)
            weakref.finalize(self, os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held = f"another run is writing to {self.out} now"
                raise UserError(f"{held}: wait for it, or choose another --out") from None
            except OSError:  # a file system without locks
                pass
        remove(self.path(TEACHER_PART))  # of a run that was killed while another finished the same teacher
        self.results, path = results | {"methods": {}}, self.path("results.json")
        if self.resume and os.path.exists(path):
            try:
                with open(path, encoding="utf-8") as file:
                    before = json.load(file)
                self.results["methods"] = before["methods"]
                if before["crc32"] != checksum(before["methods"]):
                    raise ValueError
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path} is damaged: delete it, and --resume makes its rows again") from None
        elif not self.resume:
            for name in ("log.jsonl", "results.json", "report.md", STUDENT):
                remove(self.path(name))
        write_json(self.path("config.json"), {**asdict(self.config), "contents": contents})

    def finish_row(self, method: str, row: dict) -> None:
        """Add a row to results.json. The state of its training is no longer needed."""
        curve = [[r["step"], r["dev_score"]] for r in self.read_log() if r["method"] == method and "dev_score" in r]
        self.results["methods"][method] = row | ({"dev_curve": curve} if curve else {})
        write_json(self.path("results.json"), self.results | {"crc32": checksum(self.results["methods"])})
        if method == self.training:  # not of another one, which was stopped
            self.forget_state()

    def forget_state(self) -> None:
        remove(self.path(STATE))
        parallel.wait()  # the others must not see the state of a finished training

    def log(self, record: dict) -> None:
        if common.writes:
            with open(self.path("log.jsonl"), "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def read_log(self) -> list[dict]:
        """Its records; the last line of a run that was killed while writing it is none."""
        if not os.path.exists(self.path("log.jsonl")):
            return []
        with open(self.path("log.jsonl"), encoding="utf-8", errors="replace") as file:
            return [json.loads(line) for line in file if line.endswith("\n")]

    def trim_log(self, method: str, step: int) -> None:
        """Remove what was logged after the state that a resumed training continues from."""
        kept = [r for r in self.read_log() if r["method"] != method or r["step"] <= step]
        write_text(self.path("log.jsonl"), "".join(json.dumps(r) + "\n" for r in kept))


def checksum(value: object) -> str:
    """CRC-32 of a value in JSON."""
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


# ------------------------------------------------------------------------------------- a training
class Training:
    """Where a training stands: its step, its best parameters on dev, and its state on disk.

    Everything follows from the seed and the step: a training that continues from a state, in as many processes, gives
    the same bits as one that was never stopped.
    """

    def __init__(self, run: Run, name: str, model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int):
        self.run, self.name, self.model, self.optimizers = run, name, model, optimizers
        run.training = name
        self.step, self.seconds, self.due = 0, 0.0, False  # due: save after this step
        # A correlation can be -100 %: any first evaluation is better than none.
        self.best, self.best_tensors = {"score": -1e9, "text": "", "step": 0}, {}
        if run.resume and self.load():
            print(f"{name}: continues after step {self.step}")
        else:
            torch.manual_seed(run.config.seed + NEXT_RANK * parallel.rank())
        if run.resume:
            run.trim_log(name, self.step)
        parallel.same(model)
        self.progress = Progress(name, steps, self.step)
        self.saved = self.logged = time.monotonic()
        self.started = self.saved - self.seconds

    def check_finite(self, terms: dict[str, Tensor], norm: Tensor) -> dict[str, float]:
        """The loss, its terms and the norm of all gradients as numbers. Raises UserError if one is not finite."""
        values = {"loss": sum(terms.values()), **terms, "norm": norm}
        values = dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))  # one wait for the GPU
        if wrong := [name for name, value in values.items() if not math.isfinite(value)]:
            raise UserError(self.not_finite(wrong[0]))
        return values

    def log(self, step: int, values: dict[str, float], rate: float, tokens: int) -> None:
        """Log a step (counted from 1) and update the progress line."""
        seconds, self.logged = time.monotonic() - self.logged, time.monotonic()
        record = {"method": self.name, "step": step, **values, "lr": rate, "ms": 1e3 * seconds, "tokens": tokens}
        self.run.log(record)
        terms = " ".join(f"{k} {v:.3g}" for k, v in values.items() if k not in ("loss", "norm"))
        speed = f"{1e3 * seconds:.0f} ms/step  {tokens / max(seconds, 1e-9):,.0f} tok/s"
        self.progress.update(step, f"loss {values['loss']:.3f} ({terms})  lr {rate:.1e}  {speed}")

    def keep_best(self, step: int, score: float, text: str) -> None:
        """Log an evaluation on dev after a step, and keep the parameters if it is the best."""
        self.progress.clear()
        print(f"{self.name}: step {step}, dev {text}", flush=True)
        self.run.log({"method": self.name, "step": step, "dev_score": score})
        self.due = True
        if score > self.best["score"]:
            self.best = {"score": score, "text": text, "step": step}
            self.best_tensors = {k: t.detach().to("cpu", copy=True) for k, t in self.model.state_dict().items()}

    def finish(self) -> float:
        """Restore the best parameters. Returns the seconds of the training."""
        self.model.load_state_dict(self.best_tensors)
        print(f"{self.name}: keeps step {self.best['step']}, dev {self.best['text']}")
        return self.seconds

    def save(self, step: int) -> None:
        """Save the state after `step` steps, if it is time: every SAVE_EVERY steps, every SAVE_SECONDS, after evaluations.
        Raises UserError, and keeps the earlier state, if an update broke the parameters.
        """
        self.step = step
        late = parallel.anywhere(time.monotonic() - self.saved > SAVE_SECONDS)  # all processes save together
        if not (self.due or late or step % SAVE_EVERY == 0):
            self.logged = time.monotonic()
            return
        state = self.model.state_dict()
        if not all(t.isfinite().all() for t in state.values()):
            raise UserError(self.not_finite("a weight"))
        self.seconds, self.due = time.monotonic() - self.started, False
        numbers = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            numbers["cuda"] = torch.cuda.get_rng_state()
        tensors = {f"model.{k}": t for k, t in state.items()} | {f"best.{k}": t for k, t in self.best_tensors.items()}
        for process, each in enumerate(parallel.gather([numbers])):
            tensors |= {f"random.{process}.{device}": generator for device, generator in each.items()}
        for i, optimizer in enumerate(self.optimizers):
            for parameter, values in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{parameter}.{k}": torch.as_tensor(v) for k, v in values.items()}
        settings = {"name": self.name, "step": step, "seconds": self.seconds, "best": self.best}
        write_tensors(self.run.path(STATE), tensors, STATE_FORMAT, settings | {"processes": parallel.world_size()})
        self.saved = self.logged = time.monotonic()

    def load(self) -> bool:
        """Continue from the state on disk; False if there is none of this training."""
        if not os.path.exists(self.run.path(STATE)):
            return False
        advice = f"delete it, and --resume trains {self.name} again"
        tensors, settings = read_tensors(self.run.path(STATE), STATE_FORMAT, advice)
        if settings["name"] != self.name:
            return False
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "optimizer": {}, "random": {}}
        for name, tensor in tensors.items():  # cloned: the file that they are mapped from will be replaced
            kind, _, rest = name.partition(".")
            groups[kind][rest] = tensor.clone()
        self.model.load_state_dict(groups["model"])
        states = [optimizer.state_dict() for optimizer in self.optimizers]  # of their groups only the rate changes
        for name, tensor in groups["optimizer"].items():
            i, parameter, key = name.split(".")
            whole = not tensor.is_floating_point()  # SparseAdam counts its steps in an int
            states[int(i)]["state"].setdefault(int(parameter), {})[key] = tensor.item() if whole else tensor
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        self.step, self.seconds, self.best = settings["step"], settings["seconds"], settings["best"]
        self.best_tensors = groups["best"]
        if settings["processes"] == parallel.world_size():
            torch.set_rng_state(groups["random"][f"{parallel.rank()}.cpu"])
            if torch.cuda.is_available() and (numbers := groups["random"].get(f"{parallel.rank()}.cuda")) is not None:
                torch.cuda.set_rng_state(numbers)
        else:
            print(f"{self.name}: {settings['processes']} processes before, now {parallel.world_size()}: other noise")
            torch.manual_seed(self.run.config.seed + NEXT_RANK * parallel.rank() + self.step)
        return True

    def not_finite(self, what: str) -> str:
        text = f"{self.name}: {what} is not finite after {self.step} steps; try a lower --lr or --student-lr"
        if os.path.exists(self.run.path(STATE)):
            text += f"; the last good state is kept, and --resume --out {self.run.out} continues from it"
        return text

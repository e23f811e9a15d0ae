"""What other libraries make of a run's teacher: two more rows in its results.json, on the same test rows. And the times
of both, of the teacher and of the run's student for 1 and for 32 test texts.

    python tools/peers.py out/NAME    # the --out of a finished run of train.py; then tools/compare.py as before

"onnxruntime" is ONNX Runtime's dynamic quantization (needs onnx and onnxruntime), "openvino" post-training
quantization by NNCF with 300 training texts (needs openvino and nncf). A row whose library is not installed is left
out. Both run on the CPU.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

if __package__ in (None, ""):  # run as a script: put the repository root on the path
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from bench import interleave, medians
from checkpoint import read_student
from config import TrainConfig
from data.batches import collate, unpadded_batches
from data.tasks import find_task, selection_splits
from int8 import integer_model
from kit.common import UserError, exit_status
from kit.files import write_text
from kit.report import report, report_table
from kit.run import STUDENT, Run
from predict import set_references
from tools.backends import Runner, is_installed, load_onnx, load_openvino, write_onnx, write_openvino
from tools.compare import read_runs
from train import Data, evaluate_languages, get_teacher, open_run

CALIBRATION = 300  # texts
TIMED, ROUNDS = (1, 32), 15  # texts in a call, and calls
NEEDS = {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("openvino", "nncf")}


class Peer(nn.Module):
    """Another library's model, called like ours."""

    def __init__(self, run: Runner):
        super().__init__()
        self.run = run

    def forward(self, ids: Tensor, mask: Tensor | None, types: None) -> tuple[Tensor, dict]:
        return self.run(ids, mask), {}


def read_config(out: str) -> TrainConfig:
    try:
        with open(os.path.join(out, "config.json"), encoding="utf-8") as file:
            options = json.load(file)
        del options["contents"]
        config = TrainConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"{out} holds no run of train.py: name the --out of one") from None
    if find_task(config.task).head not in ("sequence", "embedding"):
        raise UserError(f"{out}: peers are measured for tasks with one label or vector per text")
    return replace(config, out=out)


def add_peers(out: str) -> None:
    config, path = read_config(out), os.path.join(out, "results.json")
    (before,) = read_runs([path])
    run, start, data = open_run(config, resume=True)
    if start.tokenizer.typed:
        raise UserError(f"{start.name} has token types: peers are measured for XLM-R's tokenizer")
    run.results["environment"] = before["environment"]  # of the training
    teacher, cpu = get_teacher(run, start, data)[0].cpu(), torch.device("cpu")
    set_references(teacher, [*data.tests.values()], cpu)
    models: dict[str, Callable] = {"fp32": teacher}
    if os.path.exists(run.path(STUDENT)) and 32 not in (config.bits, config.act_bits):
        student = read_student(run.path(STUDENT))
        models[student.notes["method"]] = integer_model(student)
    config, task = run.config, start.task
    calibrated = partial(write_openvino, calibration=unpadded_batches(data.train, CALIBRATION, 1, config.seed))
    peers = {"onnxruntime": (write_onnx, load_onnx, ".onnx"), "openvino": (calibrated, load_openvino, ".bin")}
    for name, (write, load, suffix) in peers.items():
        if missing := [package for package in NEEDS[name] if not is_installed(package)]:
            print(f"{name}: not measured, {' and '.join(missing)} not installed")
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, name + suffix)
            write(teacher, path)
            size = sum(entry.stat().st_size for entry in os.scandir(folder))
            row, models[name] = {"size_bytes": size, "train_seconds": 0.0}, Peer(load(path))
            row |= evaluate_languages(name, models[name], data.tests, task, cpu)
        run.finish_row(name, row)
    time_models({name: model for name, model in models.items() if name in run.results["methods"]}, run, data)
    write_text(
        run.path("report.md"), report(run.results, task, selection_splits(task, config.eval_split, start.folder)[1])
    )
    print(f"\n{report_table(run.results, task)}\n\nwrote {out}/results.json, report.md")


def time_models(models: dict[str, Callable], run: Run, data: Data) -> None:
    """Add the median milliseconds of a call to the rows of models."""
    dataset = next(iter(data.tests.values()))
    for size in TIMED:
        batch = collate(dataset, np.arange(min(size, len(dataset))))
        calls = {name: partial(model, batch.ids, batch.mask, types=None) for name, model in models.items()}
        with torch.inference_mode():
            times = medians(interleave(calls, ROUNDS, warm=True))
        for name, measured in times.items():
            run.results["methods"][name].setdefault("milliseconds", {})[str(size)] = measured["median_ms"]
    for name in models:
        run.finish_row(name, run.results["methods"][name])


@exit_status()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Other libraries' int8 of a run's teacher, on the same rows.")
    parser.add_argument("out", metavar="out/NAME", help="folder of a finished run")
    args = parser.parse_args(argv)
    add_peers(args.out)


if __name__ == "__main__":
    sys.exit(main())

"""What other libraries make of a run's teacher: two more rows in its results.json, on the same test rows.

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
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

if __package__ in (None, ""):  # run as a script: put the repository root on the path
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from config import TrainConfig
from data.batches import unpadded_batches
from data.tasks import find_task, selection_splits
from kit.common import UserError, exit_status
from kit.files import write_text
from kit.report import report, report_table
from tools.backends import Runner, is_installed, load_onnx, load_openvino, write_onnx, write_openvino
from tools.compare import read_runs
from train import evaluate_languages, get_teacher, open_run

CALIBRATION = 300  # texts
NEEDS = {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("openvino", "nncf")}


class Peer:
    """Another library's model, called like ours."""

    def __init__(self, run: Runner):
        self.run = run

    def eval(self) -> None:
        pass

    def __call__(self, ids: Tensor, mask: Tensor | None, types: None) -> tuple[Tensor, dict]:
        return self.run(ids, mask), {}


def read_config(out: str) -> TrainConfig:
    try:
        with open(os.path.join(out, "config.json"), encoding="utf-8") as file:
            options = json.load(file)
        del options["contents"]
        config = TrainConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"{out} holds no run of train.py: name the --out of one") from None
    if find_task(config.task).head != "sequence":
        raise UserError(f"{out}: peers are measured for tasks with one label a text")
    return replace(config, out=out)


def add_peers(out: str) -> None:
    config, path = read_config(out), os.path.join(out, "results.json")
    (before,) = read_runs([path])
    run, start, data = open_run(config, resume=True)
    if start.tokenizer.typed:
        raise UserError(f"{start.name} has token types: peers are measured for XLM-R's tokenizer")
    run.results["environment"] = before["environment"]  # of the training
    teacher, cpu = get_teacher(run, start, data)[0].cpu(), torch.device("cpu")
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
            row = {"size_bytes": size, "train_seconds": 0.0}
            row |= evaluate_languages(name, Peer(load(path)), data.tests, task, cpu)
        run.finish_row(name, row)
    write_text(
        run.path("report.md"), report(run.results, task, selection_splits(task, config.eval_split, start.folder)[1])
    )
    print(f"\n{report_table(run.results, task)}\n\nwrote {out}/results.json, report.md")


@exit_status()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Other libraries' int8 of a run's teacher, on the same rows.")
    parser.add_argument("out", metavar="out/NAME", help="folder of a finished run")
    args = parser.parse_args(argv)
    add_peers(args.out)


if __name__ == "__main__":
    sys.exit(main())

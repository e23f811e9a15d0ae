"""Every command of the README: run where that needs no network, else checked against its parser."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

import bench
import plot
import report
from data import fetch
from options import parse_args

with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
    README = file.read()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]


def test_there_are_commands():
    assert len(COMMANDS) >= 10 and any("-m pytest" in command for command in COMMANDS)


def test_main_job_runs_as_written(tmp_path):
    """The first training command in the checkout, cut short, its output in a temporary folder."""
    command = next(c for c in COMMANDS if c.startswith("python train.py"))
    words = shlex.split(command, comments=True)
    short = "--steps 2 --max-train 60 --max-eval 9 --out".split()
    words = [sys.executable, *words[1:], *short, str(tmp_path / "run")]
    if os.path.exists(os.path.join(ROOT, "weights", "xlmr-base.pt")):
        pytest.skip("XLM-R base was converted here: the command would train that")
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("model mini") and re.search(r"\| sdq +\|", done.stdout)
    assert (tmp_path / "run" / "student.pt").exists()


def test_python_snippet_predicts(tmp_path, monkeypatch, capsys):
    """The snippet, on the student that the main job leaves."""
    from conftest import SAMPLE, TOKENIZER

    import train

    options = f"--model scratch --layers 1 --hidden 32 --heads 2 --steps 2 --epochs 1 --tokenizer {TOKENIZER}"
    out = tmp_path / "out" / "xnli-mini-w8a8-s0"
    options += f" --data-dir {SAMPLE} --languages en --device cpu --out {out}"
    assert train.main(options.split()) == 0
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    capsys.readouterr()
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() in ("entailment", "neutral", "contradiction")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command, monkeypatch):
    words = shlex.split(command, comments=True)
    if words[0] == "pip" or words[1:3] == ["-m", "pytest"]:
        assert words in (["pip", "install", "-r", "requirements.txt"], ["python", "-m", "pytest"])
        assert os.path.exists(os.path.join(ROOT, "requirements.txt"))
        return
    assert words[0] == "python" and os.path.exists(os.path.join(ROOT, words[1]))
    program, arguments = words[1], words[2:]
    if program == "train.py":
        monkeypatch.chdir(ROOT)
        parse_args(arguments)
    elif program == "bench.py":
        bench.build_parser().parse_args(arguments)
    elif program == "plot.py":
        plot.build_parser().parse_args(arguments)
    elif program == "data/fetch.py":
        assert arguments[0] in fetch.DATASETS
    elif program == "convert.py":
        assert arguments[0] in fetch.MODELS
    else:
        assert program == "report.py" and arguments


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"@\w+@|TODO|TBD", README)


def test_every_flag_that_is_named_exists():
    from options import build_parser

    help_text = build_parser().format_help() + bench.build_parser().format_help()
    known = set(re.findall(r"--[a-z-]+", help_text)) | {
        "--from",
        "--out",
        "--resume",
        "--json",
        "--errors",
        "--latency",
        "--sweep",
        "--curves",
        "--recovery",
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= known


def test_every_file_that_is_named_exists():
    for name in re.findall(r"`([\w/]+\.py)`", README):
        assert os.path.exists(os.path.join(ROOT, name)), name
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert os.path.exists(os.path.join(ROOT, name)), name


def test_figures_come_from_the_committed_files(tmp_path):
    """plot.py draws the README's figures again, where matplotlib is installed."""
    pytest.importorskip("matplotlib")
    for i, names in enumerate(
        [f"bench-{what}.json" for what in bench.BENCHMARKS]
        + ["xnli-mini/*.json", "xnli-mini/w3-s0.json --errors"]
        + ["atis-sweep/*.json --sweep", "layerwise/*.json --curves"]
        + ["glue/*.json --recovery"]
    ):
        out = tmp_path / f"{i}.png"
        file, *options = names.split()
        assert plot.main([os.path.join(ROOT, "results", file), *options, "--out", str(out)]) == 0
        assert out.stat().st_size > 5000


@pytest.mark.parametrize("what", list(bench.BENCHMARKS))
def test_benchmarks_come_from_the_committed_files(what):
    with open(os.path.join(ROOT, "results", f"bench-{what}.json"), encoding="utf-8") as file:
        result = json.load(file)
    _, show, _ = bench.BENCHMARKS[what]
    assert result["benchmark"] == what and show(result) in README


@pytest.mark.parametrize(
    "options",
    [
        "xnli-mini/*.json",
        "xnli-mini-lsq/*.json",
        "xnli-minilm/*.json",
        "atis/*.json --latency bench-tt.json",
        "glue/*.json",
    ],
)
def test_tables_come_from_the_committed_files(options, capsys):
    words = options.split()
    paths = [w if w.startswith("--") else os.path.join(ROOT, "results", w) for w in words]
    assert report.main(paths) == 0
    assert capsys.readouterr().out.strip() in README

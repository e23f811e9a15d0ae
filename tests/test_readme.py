"""README.md and docs/*.md: every command is run or parsed, every Python block is run, every table and
figure comes from the committed results, and every file, flag and link exists.
"""

import dataclasses
import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SCRATCH, SMALL, answer, log_of, results, run

import bench
import checkpoint
import config
import distill
import prepare
import quant
import repair
import train
from data import fetch, tasks
from tools import compare, plot, sweep

NAMES = ["README.md", *sorted(glob.glob("docs/*.md", root_dir=ROOT))]
PAGES = {name: Path(ROOT, name).read_text(encoding="utf-8") for name in NAMES}
README, ALL = PAGES["README.md"], "\n".join(PAGES.values())
LOG = "docs/log.md"  # also names what is gone


def committed(name):
    return json.loads(Path(ROOT, "results", name).read_text(encoding="utf-8"))


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], flags=re.S)


COMMANDS = sorted(
    {line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines() if line.strip()}
)


def test_readme_is_one_page():
    assert len(README.encode("utf-8")) <= 12_000
    assert len(COMMANDS) >= 15 and "python -m pytest" in COMMANDS
    assert not re.search(r"@\w+@|TODO|TBD", ALL)


def test_main_job_runs_as_written(tmp_path, nothing_downloaded, capsys):
    """The first training command, shortened, with its output in a temporary folder."""
    words = shlex.split(re.search(r"^python train.py .*$", README, flags=re.M)[0], comments=True)
    short = "--steps 2 --max-train 60 --max-eval 9 --out".split()
    assert train.main([*words[2:], *short, str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("model mini") and re.search(r"\| sdq +\|", printed)
    assert (tmp_path / "run" / "student.safetensors").exists()


def test_python_blocks_of_the_readme_run(tmp_path, monkeypatch, capsys):
    """SDQ in 25 lines, and predictions by the student that the main job leaves."""
    method, predict = blocks("README.md", "python")
    exec(compile(method, "README.md", "exec"), {})  # ends with an assertion
    assert run(tmp_path, *"--steps 2 --languages en".split(), out="out/xnli-mini-w8a8-s0") == 0
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(predict, "README.md", "exec"), {})
    assert capsys.readouterr().out.split()[0] in ("entailment", "neutral", "contradiction")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command, tmp_path, monkeypatch):
    words = shlex.split(command, comments=True)
    if words[0] == "pip" or words[1:3] == ["-m", "pytest"]:
        return
    python, program, *arguments = words
    assert python == "python" and os.path.exists(os.path.join(ROOT, program))
    os.mkdir(tmp_path / "DIR")  # a folder of the user
    (tmp_path / "DIR" / "train.tsv").write_text("text\tlabel\na\tx\nb\ty\n")
    monkeypatch.chdir(tmp_path)
    if program == "train.py":  # a model need not be converted here
        config.parse_args(arguments)
    elif program == "data/fetch.py":
        assert arguments[0] in {*fetch.DATASETS, *fetch.BY_HAND}
    elif program == "convert.py":
        assert arguments[0] in (*fetch.MODELS, "--export") or arguments[1:] == ["--from", "DIR"]
    elif program == "predict.py":
        assert len(arguments) <= 4 and arguments[0].endswith("student.safetensors")
        assert {word for word in arguments if word[:2] == "--"} <= literal_flags(program)
    elif program == "tools/sweep.py":
        sweep.plan(arguments)
    elif program in ("bench.py", "tools/plot.py"):
        {"bench.py": bench, "tools/plot.py": plot}[program].build_parser().parse_args(arguments)
    else:
        assert program.startswith("tools/")
        assert {word for word in arguments if word[:2] == "--"} <= literal_flags(program)


def test_commands_run_as_printed():
    """They stand in blocks that the test above reads, and no value stands for several."""
    for page, text in PAGES.items():
        loose = [
            line
            for line in re.sub(r"```.*?```", "", text, flags=re.S).splitlines()
            if re.match(r" +(python |\$)", line)
        ]
        assert page in ("docs/extending.md", "docs/exercises.md", "docs/export.md") or not loose, (page, loose)
    assert not [command for command in COMMANDS if re.search(r"--[a-z-]+ \S+\|", command)]


def literal_flags(program):
    return set(re.findall(r'"(--[a-z-]+)"', Path(ROOT, program).read_text(encoding="utf-8")))


def test_every_flag_that_is_named_exists():
    parsers = "".join(module.build_parser().format_help() for module in (config, plot))
    known = {"--resume", "--noise-rise", "--index-url", "--nproc-per-node", *re.findall(r"--[a-z-]+", parsers)}
    known |= set().union(
        *map(literal_flags, ("convert.py", "tools/compare.py", "tools/sweep.py", "bench.py", "predict.py"))
    )
    for page, text in PAGES.items():
        if page != LOG:
            named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
            assert named <= known, (page, named - known)


def test_every_file_that_is_named_exists():
    for page, text in PAGES.items():
        folder = os.path.join(ROOT, os.path.dirname(page))
        for name in re.findall(r"`([\w/]+\.py)`", text) if page != LOG else ():
            assert os.path.exists(os.path.join(ROOT, name)), (page, name)
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            if not target.startswith("https://"):
                assert os.path.exists(os.path.join(folder, target)), (page, target)
        for other, anchor in re.findall(r"\]\(([^)#]*)#([^)]*)\)", text):
            path = os.path.normpath(os.path.join(os.path.dirname(page), other)) if other else page
            headings = re.findall(r"^#+ (.*)$", PAGES[path], flags=re.M)
            anchors = {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings}
            assert anchor in anchors, (page, anchor)


@pytest.mark.parametrize("name", [*bench.BENCHMARKS, "model-vnni", "tt-vnni"])
def test_benchmarks_come_from_the_committed_files(name):
    _, show, _ = bench.BENCHMARKS[name.removesuffix("-vnni")]
    assert show(committed(f"bench-{name}.json")) in PAGES["docs/benchmarks.md"]


TABLES = {  # arguments of tools/compare.py -> the page that holds all of its output
    "xnli-mini/*.json": "docs/results-xnli.md",
    "xnli-mini-lsq/*.json": "docs/results-xnli.md",
    "xnli-minilm/*.json": "docs/results-xnli.md",
    "xnli-mini-pq/lr1e-4-*.json": "docs/results-xnli.md",
    "xnli-e5/*.json": "docs/results-xnli.md",
    "xnli-e5/*.json --minus=fp32": "docs/results-xnli.md",
    "xnli-e5/*.json --minus=qat": "docs/results-xnli.md",
    "xnli-e5/w8-pt-static-*.json xnli-e5-ablation/*.json": "docs/results-xnli.md",
    "xnli-e5/w8-pt-static-*.json xnli-e5-ablation/*.json --minus=qat": "docs/results-xnli.md",
    "xnli-e5-pq/s0.json": "docs/results-xnli.md",
    "xnli-mse/*.json": "docs/results-xnli.md",
    "xnli-mse/*.json --minus=qat": "docs/results-xnli.md",
    "xnli-w2/*.json 1e-4=xnli-w2-1e-4/*.json": "docs/results-xnli.md",
    "tt-sst2/*.json --front": "docs/results-tt.md",
    "atis-ttm/*.json --front": "docs/results-tt.md",
    "xglue-e5/*.json": "docs/results-xglue.md",
    "xglue-e5/pos-*.json": "docs/results-xglue.md",
    "xglue-e5/pos-*.json --languages": "docs/results-xglue.md",
    "xglue-e5/ner-*.json": "docs/results-xglue.md",
    "xglue-e5/ner-*.json --languages": "docs/results-xglue.md",
    "atis/*.json --latency bench-tt.json": "docs/results-tt.md",
    "atis-sweep/*.json atis/dense-s0.json --front": "docs/results-tt.md",
    "glue/*.json": "docs/results-glue.md",
    "kd/*.json": "docs/results-glue.md",
    "embed/*.json": "docs/results-embed.md",
    "embed/*.json --languages": "docs/results-embed.md",
    "embed/*.json --minus=fp32": "docs/results-embed.md",
    "embed/w3-mse-*.json ten=embed-ten/w3-*.json": "docs/results-embed.md",
    "embed/w3-mse-*.json ten=embed-ten/w3-*.json --languages": "docs/results-embed.md",
    "embed-ten/w2-*.json": "docs/results-embed.md",
    "embed-sts/*.json": "docs/results-embed.md",
    "embed/w3-mse-*.json repairs/embed-w3-*.json": "docs/results-repairs.md",
    "embed/w8-pt-static-*.json repairs/embed-w8-*.json": "docs/results-repairs.md",
    "English=repairs/embed-w3-*.json ten=repairs-ten/embed-w3-*.json": "docs/results-repairs.md",
    "repairs/xnli-*.json": "docs/results-repairs.md",
    "repairs/ner-*.json": "docs/results-repairs.md",
    "repairs/ner-fp32-*.json repairs/ner-w3-sdq-*.json repairs-no-labels/*.json": "docs/results-repairs.md",
    "repairs/stsb-*.json": "docs/results-repairs.md",
    "repairs-lsq/stsb-s0.json": "docs/results-repairs.md",
}


def test_tables_come_from_the_committed_files(capsys, monkeypatch):
    monkeypatch.chdir(os.path.join(ROOT, "results"))
    printed = []
    for options, page in TABLES.items():
        assert compare.main(options.split()) == 0
        printed.append(capsys.readouterr().out.strip())
        assert printed[-1] in PAGES[page]
    # The README shows some rows of each; the first table is that of its quick start.
    lines = [line.split() for line in "\n".join(printed).splitlines()]
    rows = [line.split() for line in README.splitlines() if line.startswith("| ") and "±" in line]
    assert len(rows) >= 14 and all(row in lines for row in rows)


def test_the_headline_can_be_typed():
    """The options of the README's command are those of the committed run, whose training file had 14,000 rows."""
    (command,) = [line for line in COMMANDS if line.startswith("python train.py") and "--max-train 14000" in line]
    typed, _ = config.parse_args(shlex.split(command)[2:])
    run = committed("xnli-e5/w8-pt-static-s0.json")
    assert f"python convert.py {typed.model}" in README and run["train_examples"] == typed.max_train
    options = json.loads(json.dumps(dataclasses.asdict(typed)))  # tuples become lists
    for name in {*run["config"]} & {*options} - {"model", "max_train", "precision", "analyze", "out"}:
        assert run["config"][name] == options[name], name


# ----------------------------------------------------------------------------------- extending.md
@pytest.fixture
def extended():
    """The examples of docs/extending.md, run as if they stood at the end of their files."""
    tables = (distill.LOSSES, prepare.WEIGHTS, repair.REPAIRS, tasks.TASKS)
    before = [dict(table) for table in tables]
    modules = {"distill.py": distill, "quant.py": quant, "prepare.py": prepare, "repair.py": repair}
    modules["data/tasks.py"] = tasks
    for block in blocks("docs/extending.md", "python"):
        name = block.splitlines()[0].removeprefix("# ")
        exec(compile(block, name, "exec"), vars(modules[name]))
    yield
    for table, rows in zip(tables, before, strict=True):
        table.clear()
        table.update(rows)


def test_the_new_loss(extended, tmp_path):
    assert run(tmp_path, *"--steps 3 --methods sdq --distill logits+30*value".split()) == 0
    terms = [record["value"] for record in log_of(tmp_path) if "value" in record]
    assert len(terms) == 3 and min(terms) > 0


def test_the_new_quantizer(extended, tmp_path):
    options = "--steps 3 --methods fp32 ptq qat --bits 4 --weights pow2 --analyze".split()
    assert run(tmp_path, *options) == 0
    for method in ("ptq", "qat"):
        row = results(tmp_path)["methods"][method]
        assert row["student"]["languages"] == row["languages"]
    packed = checkpoint.read_student(str(tmp_path / "run" / "student.safetensors"))
    scales = [w.scale.log2() for w in packed.weights.values()]
    assert all(bool((scale == scale.round()).all()) for scale in scales)


def test_the_new_repair(extended, tmp_path):
    """Also of the new quantizer."""
    methods = ["ptq", "ptq+bias", "ptq+gptq", "sdq+gptq+bias"]
    assert run(tmp_path, *"--steps 2 --bits 4 --weights pow2 --analyze --methods".split(), *methods) == 0
    rows = results(tmp_path)["methods"]
    assert list(rows) == methods and all(row["student"]["languages"] == row["languages"] for row in rows.values())
    errors = [rows[name]["errors"]["accumulated"]["context"][0]["mae"] for name in methods[:3]]
    assert len(set(errors)) == 3


@pytest.fixture
def fork(tmp_path):
    """A copy of the code, changed as the diffs of docs/extending.md say."""
    folder = tmp_path / "fork"
    for name in ("", "data", "kit", "tools"):
        (folder / name).mkdir()
        for path in glob.glob(os.path.join(ROOT, name, "*.py")):
            shutil.copy(path, folder / name)
    for file in re.split(r"^--- ", "".join(blocks("docs/extending.md", "diff")), flags=re.M)[1:]:
        name, _, hunks = file.partition("\n")
        text = (folder / name).read_text(encoding="utf-8")
        for hunk in re.split(r"^@@.*\n", hunks, flags=re.M)[1:]:
            lines = hunk.splitlines(keepends=True)
            before, after = ("".join(x[1:] for x in lines if x[0] != sign) for sign in "+-")
            assert text.count(before) == 1, (name, before)
            text = text.replace(before, after)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


FORK = """
import sys, quant, train
from tools import compare
mask, drawn = quant.noise_mask, []
quant.noise_mask = lambda weight, p, *block: drawn.append(p) or mask(weight, p, *block)
for more in [], ["--noise-rise", "0.75"]:
    assert train.main([*sys.argv[1:], *more]) == 0
    print("drawn", *dict.fromkeys(drawn))
    drawn.clear()
compare.main(["out/*/results.json"])
"""


def test_the_new_option(fork):
    command = [sys.executable, "-c", FORK, *SMALL, *"--steps 4 --bits 4 --methods fp32 qat".split()]
    done = subprocess.run(command, cwd=fork, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    drawn = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("drawn")]
    assert drawn == [["0.5"], [str(0.5 * min(1.0, k / 3)) for k in (1, 2, 3)]]
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines()[-3:]]
    assert rows == ["fp32", "qat W4A8", "qat W4A8 noise rise 0.75"]


def test_the_new_task(extended, tmp_path, capsys):
    for split, languages in {"train": ["de"], "dev": ["de"], "test": ["de", "sw"]}.items():
        rows = [f"{text}\t{language}\n" for language in languages for text in 6 * ["a b c\t2", "the of and\t5"]]
        (tmp_path / f"{split}.tsv").write_text("".join(["review\tstars\tlang\n", *rows]), encoding="utf-8")
    options = [*SCRATCH, "--task", "reviews", "--data-dir", str(tmp_path), "--device", "cpu"]
    options += ["--steps", "2", "--methods", "fp32", "ptq", "--out", str(tmp_path / "run")]
    assert train.main(options) == 0
    assert results(tmp_path)["languages"] == ["de", "sw"]
    report = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert report.splitlines()[0].split("|")[2].strip() == "de"
    (tmp_path / "test.tsv").write_text("review\tstars\tlang\nx\tgood\tde\n", encoding="utf-8")
    status, error = answer(capsys, *options[:-1], str(tmp_path / "other"))
    assert status == 2 and "test.tsv, line 2: 'good' stars" in error

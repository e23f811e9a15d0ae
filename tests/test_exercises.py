"""docs/exercises.md: the test named beside a function passes, and fails once the function is emptied; the commands
print what the page says.
"""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

with open(os.path.join(ROOT, "docs", "exercises.md"), encoding="utf-8") as file:
    PAGE = file.read()
ROWS = re.findall(r"^\| \d+ \| (\w+)\.py \| `([\w.]+)` \| ([\w.:]+) \|$", PAGE, flags=re.M)
COMMANDS = re.findall(r"^ +(python -c .*)  # (.*)$", PAGE, flags=re.M)

# The code object of a function is replaced, so that every module that imported the function sees it emptied.
EMPTY = """
import importlib, inspect, json, sys
from functools import reduce
import pytest

def empty(*arguments, **options):
    raise NotImplementedError

rows = json.loads(sys.argv[1])
run = ["-x", "-p", "no:cacheprovider", "--tb=line"]
found = [int(pytest.main([*run, *sorted({f"tests/{test}" for _, _, test in rows})]))]
for module, name, test in rows:
    function = inspect.unwrap(reduce(getattr, name.split("."), importlib.import_module(module)))
    code, function.__code__ = function.__code__, empty.__code__
    found.append(int(pytest.main([*run, f"tests/{test}"])))
    function.__code__ = code
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def statuses():
    """pytest's exit status for all tests together and untouched, then for each row with its function emptied."""
    command = [sys.executable, "-c", EMPTY, json.dumps(ROWS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_tests_pass_as_long_as_nothing_is_emptied(statuses):
    assert statuses[0] == pytest.ExitCode.OK and len({test for _, _, test in ROWS}) == len(ROWS)


@pytest.mark.parametrize("at", range(len(ROWS)), ids=[name for _, name, _ in ROWS])
def test_an_empty_function_fails_its_test(at, statuses):
    assert statuses[1 + at] == pytest.ExitCode.TESTS_FAILED


def test_eight_exercises_with_a_command_each():
    titles = re.findall(r"^\*\*(\d)\. ", PAGE, flags=re.M)
    assert titles == list("12345678") == sorted(set(re.findall(r"^\| (\d) \|", PAGE, flags=re.M)))
    assert len(COMMANDS) == len(titles)


@pytest.mark.parametrize("command, printed", COMMANDS, ids="12345678")
def test_commands_print_what_the_page_says(command, printed, capsys):
    _, _, code = shlex.split(command)
    exec(code, {})
    assert capsys.readouterr().out.strip() == printed

"""The Makefile: what it prints, what it would run, and the failures of `make setup` for a newcomer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ["setup", "demo", "test", "ptx", "lint", "clean"]
# Variables that a make running these tests sets, and variables of the Makefile that the environment may have.
HANDED_DOWN = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "VENV", "PYTHON", "PIP_ARGS", "QUICK", "SEED"}


def make(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in HANDED_DOWN}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_make_alone_explains_every_target():
    printed = make().stdout
    assert [target for target in TARGETS if f"make {target} " not in printed] == []


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["demo"], ".venv/bin/soundwave demo"),
        (["demo", "QUICK=1"], ".venv/bin/soundwave demo --quick"),
        (["demo", "QUICK=0"], ".venv/bin/soundwave demo"),
        (["demo", "QUICK=1", "SEED=7"], ".venv/bin/soundwave demo --quick --seed 7"),
        (["test"], ".venv/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder"),
        (["ptx", "JOBS=5"], ".venv/bin/python -m tests.ptx mutate --jobs 5 --write docs/ptx-barriers.md"),
        (["test", "JOBS=5"], ".venv/bin/pytest -n 5 --dist loadfile --no-loadscope-reorder"),
    ],
    ids=" ".join,
)
def test_target_ends_in(arguments, command):
    last = make("--dry-run", "VENV=.venv", *arguments).stdout.splitlines()[-1]
    assert last.split() == command.split()


def test_setup_without_a_python_says_so_in_one_line(tmp_path):
    result = make("setup", f"VENV={tmp_path}/venv", "PYTHON=/nonexistent/python3")
    first = result.stderr.splitlines()[0]
    assert result.returncode != 0
    assert first.startswith("soundwave needs Python 3.10 or newer, but found none of: /nonexistent/python3.")
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(("version", "found"), [("3, 9", False), ("3, 10", True)], ids=["3.9", "3.10"])
def test_setup_asks_an_interpreter_for_its_version(version, found, tmp_path):
    """An interpreter of that version without ensurepip, so that the next error proves that it was accepted."""
    python = tmp_path / "python"
    start = f"import sys; sys.version_info = ({version}); sys.modules['ensurepip'] = None; exec(sys.argv[2])"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{start}" "$@"\n')
    python.chmod(0o755)
    result = make("setup", f"VENV={tmp_path}/venv", f"PYTHON={python}")
    assert result.returncode != 0
    assert ("apt install python3-venv" in result.stderr) is found
    assert ("soundwave needs Python 3.10" in result.stderr) is not found


def test_setup_that_fails_half_way_is_not_taken_as_done(tmp_path):
    result = make("setup", f"VENV={tmp_path}/venv", "PIP_ARGS=--no-such-option", f"PYTHON={sys.executable}")
    assert result.returncode != 0
    assert "no such option: --no-such-option" in result.stderr
    assert not (tmp_path / "venv/.soundwave-installed").exists()

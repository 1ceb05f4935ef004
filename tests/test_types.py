"""The public surface as a type checker sees it from outside: it has nothing to say about a program of every name."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import soundwave

ROOT = Path(__file__).resolve().parents[1]
USES = Path(__file__).with_name("typed") / "every_public_name.py"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The package as an installation lays it out: `kernels` below `soundwave`, which no checker knows of a checkout."""
    site = tmp_path_factory.mktemp("site")
    (site / "soundwave").mkdir()
    for path in (ROOT / "soundwave").iterdir():
        (site / "soundwave" / path.name).symlink_to(path)
    (site / "soundwave" / "kernels").symlink_to(ROOT / "kernels")
    return site


WRONG = """
import soundwave
soundwave.transcribe("a.wav", 3)
soundwave.transcripe("a.wav", "model")
soundwave.fused.functional.ctc_loss()
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory, site) -> dict[str, set[int]]:
    """What pyright says in basic mode of two programs: for each the lines, and the messages in the failure."""
    folder = tmp_path_factory.mktemp("programs")
    (folder / "right.py").write_text(USES.read_text())
    (folder / "wrong.py").write_text(WRONG)
    settings = {"include": ["*.py"], "extraPaths": [str(site)], "typeCheckingMode": "basic"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] == 2, done.stdout
    print(done.stdout)
    lines = {name: set() for name in ("right.py", "wrong.py")}
    for each in found["generalDiagnostics"]:
        lines[Path(each["file"]).name].add(each["range"]["start"]["line"] + 1)
    return lines


def test_a_program_that_uses_every_public_name_has_no_fault(said):
    assert said["right.py"] == set()


def test_a_wrong_use_is_seen(said):
    assert said["wrong.py"] == {3, 4, 5}


def test_the_program_uses_every_public_name():
    nodes = list(ast.walk(ast.parse(USES.read_text())))
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    used |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    functional = soundwave.fused.functional.__all__
    results = {name for name in functional if name[0].isupper()}  # what the functions return
    assert {*soundwave.__all__, *soundwave.fused.__all__, *functional} - results <= used

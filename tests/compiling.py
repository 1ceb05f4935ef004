"""What tests of compiled kernels share: the names of all kernels, and processes in which Triton compiles."""

import ast
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # that a block may use, by compute capability


def kernels() -> set[str]:
    """The names of the kernels in `kernels/`: functions of Triton that no other function of Triton calls."""
    defined, called = set(), set()
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
                defined.add(node.name)
                called |= {name.id for part in node.body for name in ast.walk(part) if isinstance(name, ast.Name)}
    return defined - called


def run_compiled(*words: object) -> subprocess.CompletedProcess[str]:
    """`python *words` from the checkout's root, without TRITON_INTERPRET, under which Triton compiles nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

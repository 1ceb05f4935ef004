"""Imports go up one ordered list of rooms, read from the syntax trees.

A room is a module or a package directly below `soundwave`. Rules, each with a test of its own on small sources:

1. No cycle among the modules of soundwave, imports inside functions included.
2. Every room has a place in `ROOMS`, and imports only rooms that stand before its own. `soundwave` itself, the front
   door, stands beside `doctor`: that and `cli` show its version.
3. The pairs in `APART` do not reach each other, not even through a third room.
4. `kernels` imports torch, triton, nvtx and the standard library only.
5. Nothing imports `bench` or `tests`, nor `kernels` as a top level (that is another project's package). Tests of the
   benches alone import `bench`.
6. torchaudio, flash_attn, bitsandbytes and nvtx are imported inside functions only.
7. An old name of a module (`OLD_NAMES`) imports what it stands for, and nothing imports it.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the bottom to the top. Rooms that are planned (serve, curation) have their place already.
ROOMS = [
    "eager", "kernels", "hardware", "provenance", "attention", "fused", "backbones", "model", "memory", "data",
    "training", "inference", "evaluation", "serve", "curation", "report", "demo", "doctor", "cli",
    "__main__",
]  # fmt: skip
APART = [("training", "inference"), ("inference", "training"), ("serve", "training"), ("evaluation", "training")]
# Modules by the names that they had in version 0.1 or 0.2, kept for one version.
OLD_NAMES = {
    "soundwave.ablation", "soundwave.comparison", "soundwave.configuration", "soundwave.conversion",
    "soundwave.embedded", "soundwave.modeling", "soundwave.processing", "soundwave.data.corpus",
    "soundwave.data.grammar", "soundwave.data.tasks", "soundwave.demo.espeak",
}  # fmt: skip
# `soundwave.data.audio.windows` is such a name, too, but in a module that stays.
OLD_IMPORTS = {("soundwave.data.audio", "soundwave.inference.long")}
KERNELS_MAY_IMPORT = {"torch", "triton", "nvtx", *sys.stdlib_module_names}
LAZY_ONLY = {"torchaudio", "flash_attn", "bitsandbytes", "nvtx"}
NEVER = {"bench", "tests", "kernels"}
TESTS_OF_BENCHES = {f"tests/test_{name}.py" for name in ("benchmarks", "gpu_script", "memory", "resume")}


class Import(NamedTuple):
    target: str  # "soundwave.fused", or "torch.nn" of another package
    line: int
    lazy: bool  # inside a function


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def find_modules(root: Path) -> dict[str, Path]:
    """Dotted names of the modules below root/soundwave and, as soundwave.kernels, below root/kernels."""
    modules = {}
    for folder, package in (("soundwave", "soundwave"), ("kernels", "soundwave.kernels")):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            modules[".".join((package, *parts)).removesuffix(".__init__")] = path
    return modules


def find_imports(name: str, path: Path, modules: dict[str, Path]) -> list[Import]:
    """All imports of one module, relative ones resolved; `if TYPE_CHECKING:` never runs and is left out."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]

    def targets(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            for alias in node.names:  # `from package import name` takes a module or an attribute
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "import_module",
        ):
            yield from (argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant))

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            children = node.orelse
        else:
            yield from (Import(target, node.lineno, lazy) for target in targets(node))
            children = ast.iter_child_nodes(node)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in children:
            yield from walk(child, lazy)

    return list(walk(ast.parse(path.read_text(encoding="utf-8"), str(path)), lazy=False))


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """One cycle of the graph as a path back to its first module, or an empty list."""
    done = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for target in sorted(graph[name]):
                if cycle := visit(target, [*path, name]):
                    return cycle
            done.add(name)
        return []

    return next((cycle for name in sorted(graph) if (cycle := visit(name, []))), [])


def find_path(graph: dict[str, set[str]], start: str, package: str) -> list[str]:
    """A shortest chain of imports from the module `start` into `package`, or an empty list."""
    paths, seen = [[start]], {start}
    for path in paths:
        if within(path[-1], package):
            return path
        paths += [[*path, target] for target in sorted(graph[path[-1]] - seen)]
        seen |= graph[path[-1]]
    return []


def room_of(name: str) -> str:
    """The room of a module: the second part of its dotted name; "" for `soundwave` itself, the front door."""
    return name.split(".")[1] if "." in name else ""


def violations(root: Path) -> list[str]:
    """Every breach of the seven rules in the checkout at `root`, one line each."""
    modules = find_modules(root)
    imports = {name: find_imports(name, path, modules) for name, path in modules.items()}
    graph = {
        name: {entry.target for entry in found if (name, entry.target) not in OLD_IMPORTS} & modules.keys() - {name}
        for name, found in imports.items()
    }
    places = {room: place for place, room in enumerate(ROOMS)}
    places[""] = places["doctor"]  # the front door, `soundwave` itself

    found = []
    if cycle := find_cycle(graph):
        found.append(f"cycle: {' -> '.join(cycle)}")
    for name in modules:
        room, in_kernels = room_of(name), within(name, "soundwave.kernels")
        if room and name not in OLD_NAMES:
            if room not in places:
                found.append(f"{name}: the room {room} has no place in ROOMS")
                continue
            for target in sorted(graph[name]):
                if target in OLD_NAMES:
                    found.append(f"{name}: {target} is an old name, kept for users only")
                elif places.get(room_of(target), len(ROOMS)) > places[room]:
                    found.append(f"upwards: {name} -> {target}")
        for one, other in APART:
            if room == one and (chain := find_path(graph, name, f"soundwave.{other}")):
                found.append(f"apart: {' -> '.join(chain)}")
        for target, line, lazy in imports[name]:
            place, top = f"{modules[name].relative_to(root).as_posix()}:{line}", target.partition(".")[0]
            if in_kernels and not within(target, "soundwave.kernels") and top not in KERNELS_MAY_IMPORT:
                found.append(f"{place}: kernels may not import {target}")
            if top in NEVER:
                found.append(f"{place}: nothing imports {target}")
            if top in LAZY_ONLY and not lazy:
                found.append(f"{place}: {target} is imported inside functions only")
    for folder, other in (("bench", "tests"), ("tests", "bench")):
        for path in sorted((root / folder).rglob("*.py")):
            place = path.relative_to(root).as_posix()
            for target, line, _ in find_imports(folder, path, modules):
                top = target.partition(".")[0]
                if top in {other, "kernels"} and not (top == "bench" and place in TESTS_OF_BENCHES):
                    found.append(f"{place}:{line}: nothing imports {target}")
    return found


def test_the_checkout_keeps_the_rules():
    assert "soundwave.kernels" in find_modules(ROOT)
    assert violations(ROOT) == []


def write_sources(root: Path, sources: dict[str, str]) -> Path:
    for name, text in sources.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


ALLOWED = {
    "the whole chain": {
        "kernels/ctc.py": "import math\nimport torch\nimport triton.language as tl\nfrom . import rows",
        "kernels/rows.py": "from torch.library import custom_op\ndef f():\n    import nvtx",
        "soundwave/fused/ctc.py": "from soundwave.kernels.ctc import ctc_loss",
        "soundwave/model/modeling.py": "from ..fused import ctc\nfrom soundwave import eager",
        "soundwave/eager.py": "import torch",
        "soundwave/training/trainer.py": "from ..model.modeling import Model",
        "soundwave/cli.py": "def train():\n    from .training.trainer import Trainer",
    },
    "a lazy import of a heavy package": {"soundwave/attention.py": "def f():\n    import flash_attn"},
    "a type only": {
        "soundwave/eager.py": "if TYPE_CHECKING:\n    from .fused import CTCLoss",
        "soundwave/fused.py": "from . import eager",
    },
    "the package that re-exports its modules": {
        "soundwave/__init__.py": "from .model import Model",
        "soundwave/model.py": "import torch",
    },
    "the version, for the commands": {
        "soundwave/__init__.py": "",
        "soundwave/cli.py": "from soundwave import __version__",
    },
    "tests that import what they test": {
        "soundwave/eager.py": "",
        "tests/test_eager.py": "from soundwave import eager",
    },
}

FORBIDDEN = {
    "a cycle": (
        {
            "soundwave/data/a.py": "from . import b",
            "soundwave/data/b.py": "def f():\n    from soundwave.data.a import x",
        },
        "cycle: soundwave.data.a -> soundwave.data.b -> soundwave.data.a",
    ),
    "a cycle through the package": (
        {
            "soundwave/__init__.py": "from .model import M",
            "soundwave/model.py": "from soundwave import x",
        },
        "cycle: soundwave -> soundwave.model -> soundwave",
    ),
    "a layer above": (
        {"soundwave/fused/ctc.py": "from ..model import M", "soundwave/model.py": ""},
        "upwards: soundwave.fused.ctc -> soundwave.model",
    ),
    "a layer above, inside a function": (
        {"soundwave/model.py": "def f():\n    import soundwave.cli", "soundwave/cli.py": ""},
        "upwards: soundwave.model -> soundwave.cli",
    ),
    "the front door, from a room below the commands": (
        {"soundwave/__init__.py": "", "soundwave/data.py": "def f():\n    import soundwave"},
        "upwards: soundwave.data -> soundwave",
    ),
    "rooms apart, through a third one": (
        {
            "soundwave/serve/app.py": "from ..evaluation import x",
            "soundwave/evaluation.py": "def f():\n    from .training import y",
            "soundwave/training.py": "",
        },
        "apart: soundwave.serve.app -> soundwave.evaluation -> soundwave.training",
    ),
    "a room without a place": ({"soundwave/attic.py": ""}, "soundwave.attic: the room attic has no place in ROOMS"),
    "an old name": (
        {"soundwave/training.py": "from soundwave.modeling import M", "soundwave/modeling.py": ""},
        "soundwave.training: soundwave.modeling is an old name, kept for users only",
    ),
    "a layer above, by import_module": (
        {
            "soundwave/training/__init__.py": "importlib.import_module('soundwave.cli')",
            "soundwave/cli.py": "",
        },
        "upwards: soundwave.training -> soundwave.cli",
    ),
    "eager on fused": (
        {"soundwave/eager.py": "from soundwave import fused", "soundwave/fused/__init__.py": ""},
        "upwards: soundwave.eager -> soundwave.fused",
    ),
    "eager on kernels": (
        {"soundwave/eager.py": "import soundwave.kernels.ctc", "kernels/ctc.py": ""},
        "upwards: soundwave.eager -> soundwave.kernels.ctc",
    ),
    "kernels on another package": (
        {"kernels/ctc.py": "import torch\nimport numpy as np"},
        "kernels/ctc.py:2: kernels may not import numpy",
    ),
    "kernels on the rest of soundwave": (
        {"kernels/ctc.py": "from soundwave import eager", "soundwave/eager.py": ""},
        "kernels/ctc.py:1: kernels may not import soundwave.eager",
    ),
    "soundwave on bench": (
        {"soundwave/memory.py": "def f():\n    from bench.roof import x"},
        "soundwave/memory.py:2: nothing imports bench.roof",
    ),
    "soundwave on the top level kernels": (
        {"soundwave/fused.py": "from kernels import ctc", "kernels/ctc.py": ""},
        "soundwave/fused.py:1: nothing imports kernels",
    ),
    "tests on bench": (
        {"tests/test_speed.py": "import bench.roof"},
        "tests/test_speed.py:1: nothing imports bench.roof",
    ),
    "a heavy package at import time": (
        {"soundwave/attention.py": "try:\n    import flash_attn\nexcept ImportError:\n    flash_attn = None"},
        "soundwave/attention.py:2: flash_attn is imported inside functions only",
    ),
    "a heavy package in a class body": (
        {"kernels/ctc.py": "class Range:\n    import nvtx"},
        "kernels/ctc.py:2: nvtx is imported inside functions only",
    ),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_rules_allow(case, tmp_path):
    assert violations(write_sources(tmp_path, ALLOWED[case])) == []


@pytest.mark.parametrize("case", FORBIDDEN)
def test_rules_forbid(case, tmp_path):
    sources, breach = FORBIDDEN[case]
    assert breach in violations(write_sources(tmp_path, sources))


@pytest.mark.parametrize(("below", "above"), list(zip(ROOMS[:-1], ROOMS[1:], strict=True)))
def test_no_room_imports_the_next_one(below, above, tmp_path):
    sources = {f"soundwave/{below}.py": f"def f():\n    from soundwave import {above}", f"soundwave/{above}.py": ""}
    if "soundwave/kernels.py" in sources:
        sources["kernels/__init__.py"] = sources.pop("soundwave/kernels.py")
    assert f"upwards: soundwave.{below} -> soundwave.{above}" in violations(write_sources(tmp_path, sources))


@pytest.mark.parametrize(("one", "other"), APART)
def test_rooms_apart_do_not_import_each_other(one, other, tmp_path):
    sources = {f"soundwave/{one}.py": f"from soundwave.{other} import x", f"soundwave/{other}.py": ""}
    assert f"apart: soundwave.{one} -> soundwave.{other}" in violations(write_sources(tmp_path, sources))

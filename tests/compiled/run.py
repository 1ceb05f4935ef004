"""Compile every kernel for six architectures without a GPU and print the resources of each as JSON lines.

A process of its own: `TRITON_INTERPRET=1`, under which the tests run, makes `triton.compile` impossible. Each module
beside this one has `cases(arch)`: the kernels of one operation with the settings its `_config` gives for that card.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

ARCHITECTURES = (80, 86, 89, 90, 100, 120)


class Case(NamedTuple):
    """One kernel with one set of settings.

    `signature` gives the type of each runtime argument ("*fp32", "i32", ...), `constexprs` the values of the others.
    `divisible_by_16` names the arguments that a call with usual shapes would specialise.
    """

    label: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    divisible_by_16: tuple[str, ...] = ()
    maxnreg: int | None = None


def beside(name: str) -> ModuleType:
    """The module `name` in this folder, which is not on `sys.path`."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


narrow_products = beside("offsets").narrow_products


def compile_case(case: Case, arch: int, cuobjdump: str) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible_by_16}
    source = ASTSource(case.kernel, signature, constexprs=case.constexprs, attrs=attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": case.maxnreg}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    registers, stack, _, local = map(int, found.groups())
    return {
        "kernel": case.kernel.__name__,
        "label": case.label,
        "arch": arch,
        "num_warps": case.num_warps,
        "registers": registers,
        "stack": stack,
        "local": local,
        "shared": int(compiled.metadata.shared),
        "narrow_offsets": narrow_products(compiled.asm["ttir"]),
    }


def all_cases(arch: int) -> Iterator[Case]:
    for path in sorted(Path(__file__).parent.glob("*_cases.py")):
        yield from beside(path.stem).cases(arch, Case)


def compile_all(only: str, arch: int) -> list[dict[str, Any]]:
    import triton

    cuobjdump = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return [compile_case(case, arch, cuobjdump) for case in all_cases(arch) if only in case.kernel.__name__]


def main(only: str = "") -> None:
    # Kernels cannot be pickled, so each worker compiles all cases of one architecture.
    with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for rows in pool.map(partial(compile_all, only), ARCHITECTURES):
            for row in rows:
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

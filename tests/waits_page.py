"""docs/gpu-waits.md: the counts of `count_waits` as a page."""

from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "gpu-waits.md"
HEAD = """# What the host waits for on a GPU

A training is fast as long as the host is ahead of the GPU. Each time the host needs a value of the GPU it waits until
the GPU has done everything before it, and then the GPU waits for the host. This table counts the waits, and the
kernels that are launched, forward and backward together. `tests/test_waits.py` counts them without a GPU and compares
them with this page; `python tests/count_waits.py --write` writes it. What is counted, and what such a count cannot
see, is said in `tests/fake_cuda.py`. Nothing here was measured on a GPU.

Lengths, labels and targets are on the CPU unless the line says otherwise.

| call, forward and backward | waits | launches | what waits |
|---|---|---|---|"""


def document(cases: dict[str, dict[str, Any]]) -> str:
    """The table as Markdown. A wait is named by its file and function, because lines move."""
    lines = [HEAD]
    for name, case in cases.items():
        waits = sum(number for *_, number in case["waits"])
        # Those of a step are some hundreds, most of them of other libraries: a bound would change with every version.
        launches = "" if name.startswith("a step") else sum(number for *_, number in case["launches"])
        where = "; ".join(f"{kind} in {place} ({number})" for kind, place, number in case["waits"])
        lines.append(f"| {name} | {waits} | {launches} | {where} |")
    return "\n".join(lines) + "\n"

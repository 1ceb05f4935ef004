"""What bench/gpu.sh notes of its parts: their outcomes, in one JSON file, and the reasons why a part has failed.

    python bench/gpu_record.py begin FILE [--rehearse] [--commit COMMIT]     look at the device, begin the file
    python bench/gpu_record.py part FILE NAME STATUS SECONDS LIMIT [XML…]    add a part that ran
    python bench/gpu_record.py missed FILE NAME SECONDS                      add one for which no time was left
    python bench/gpu_record.py summary FILE                                  print all of them

A part of tests needs a test that passed: pytest ends with status 0 where all of them were skipped, for example because
torch does not see the GPU.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from soundwave.provenance import commit, device_name, slug, versions

NEEDED = (
    "triton", "transformers", "peft", "accelerate", "pytest", "pytest_benchmark", "hypothesis", "bitsandbytes", "typer",
    "rich", "pydantic", "soundfile", "soxr",
)  # fmt: skip
PACKAGES = ("soundwave", "torch", "triton", "transformers", "peft", "bitsandbytes", "flash-attn")
STOPPED, KILLED = 124, 137  # statuses of `timeout`
FAILED_TESTS = 100  # most names of failed tests that are kept
WORKER_GIB = 8  # of GPU memory for each process that runs tests


def save(file: Path, content: dict[str, Any]) -> None:
    """Write the file. It is renamed at the end, so no reader sees an incomplete one."""
    aside = file.with_suffix(".part")
    aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    aside.replace(file)


def driver() -> dict[str, str]:
    """Version of NVIDIA's driver, if `nvidia-smi` tells it."""
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return {"driver": found[0]} if found else {}
    return {}


def begin(file: Path, rehearse: bool, given_commit: str) -> None:
    """Begin the file; print the device's folder and the number of processes that its memory holds at a time."""
    import torch

    if not rehearse and not torch.cuda.is_available():
        sys.exit("gpu.sh: no CUDA GPU was found; --rehearse runs without one")
    if missing := ", ".join(name for name in NEEDED if importlib.util.find_spec(name) is None):
        print(f"gpu.sh: not installed: {missing}; parts that need them will fail (--wheels)", file=sys.stderr)
    found = commit() or given_commit
    if not found:
        print("gpu.sh: git knows no commit here, so the results name none (--commit)", file=sys.stderr)
    name, workers = device_name(), 1
    if not rehearse:
        workers = max(1, torch.cuda.get_device_properties(0).total_memory // (WORKER_GIB << 30))
    content = {
        "benchmark": "gpu_parts",
        "device": name,
        "date": date.today().isoformat(),
        "commit": found or "unknown",
        "versions": versions(PACKAGES) | ({"cuda": torch.version.cuda} if torch.version.cuda else {}) | driver(),
        "rehearsal": rehearse,
        "parts": [],
    }
    save(file, content)
    print(slug(name), workers)


def count(files: list[Path]) -> tuple[dict[str, int], list[str]]:
    """Numbers of the tests in JUnit files by outcome, and the names of those that failed."""
    numbers, failed = {"passed": 0, "failed": 0, "skipped": 0}, []
    for file in files:
        for case in ElementTree.parse(file).iter("testcase"):
            kinds = {child.tag for child in case}
            if kinds & {"failure", "error"}:
                numbers["failed"] += 1
                failed.append(f"{case.get('classname')}::{case.get('name')}")
            else:
                numbers["skipped" if "skipped" in kinds else "passed"] += 1
    return numbers, failed


def outcome(status: int, limit: int, numbers: dict[str, int] | None) -> str:
    """How a part ended, in words; "passed" if it did what it should."""
    if status in (STOPPED, KILLED):
        return f"stopped at its limit of {limit} s"
    if status:
        return f"failed with exit status {status}"
    if numbers is not None and not numbers["passed"]:
        return "failed: all tests were skipped" if numbers["skipped"] else "failed: no test was collected"
    return "passed"


def add(file: Path, name: str, status: int, seconds: int, limit: int, xml: list[Path]) -> bool:
    """Add a part that ran; whether it passed. `xml`: the results of its tests, if it has any."""
    content = json.loads(file.read_text(encoding="utf-8"))
    part: dict[str, Any] = {"part": name, "exit_status": status, "seconds": seconds, "limit_seconds": limit}
    numbers = None
    if xml:
        try:
            numbers, failed = count([each for each in xml if each.stat().st_size])
            part |= {"tests": numbers, "failed_tests": failed[:FAILED_TESTS]}
        except (OSError, ElementTree.ParseError) as error:
            status = status or 1
            part["tests_error"] = str(error)
    part["outcome"] = outcome(status, limit, numbers)
    content["parts"].append(part)
    save(file, content)
    return part["outcome"] == "passed"


def miss(file: Path, name: str, seconds: int) -> None:
    """Add a part that did not run, because only so many seconds were left."""
    content = json.loads(file.read_text(encoding="utf-8"))
    content["parts"].append({"part": name, "outcome": f"not run: {seconds} s were left", "seconds": 0})
    save(file, content)


def line(part: dict[str, Any]) -> str:
    """One line about a part: its name, seconds and outcome, and the numbers of its tests."""
    tests = ", ".join(f"{number} {what}" for what, number in part.get("tests", {}).items() if number)
    return f"{part['part']:<10} {part['seconds']:>4} s  {part['outcome']}{f' ({tests})' if tests else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("begin", "part", "missed", "summary"):
        command = commands.add_parser(name)
        command.add_argument("file", type=Path)
        if name == "begin":
            command.add_argument("--rehearse", action="store_true")
            command.add_argument("--commit", default="")
        if name in ("part", "missed"):
            command.add_argument("name")
        if name == "part":
            command.add_argument("status", type=int)
        if name in ("part", "missed"):
            command.add_argument("seconds", type=int)
        if name == "part":
            command.add_argument("limit", type=int)
            command.add_argument("xml", type=Path, nargs="*")
    given = parser.parse_args()
    if given.command == "begin":
        begin(given.file, given.rehearse, given.commit)
    elif given.command == "part":
        passed = add(given.file, given.name, given.status, given.seconds, given.limit, given.xml)
        print(line(json.loads(given.file.read_text(encoding="utf-8"))["parts"][-1]))
        sys.exit(not passed)
    elif given.command == "missed":
        miss(given.file, given.name, given.seconds)
        print(line(json.loads(given.file.read_text(encoding="utf-8"))["parts"][-1]))
    else:
        content = json.loads(given.file.read_text(encoding="utf-8"))
        print(f"{content['device']}, {content['date']}, commit {content['commit']}")
        for part in content["parts"]:
            print(line(part))


if __name__ == "__main__":
    main()

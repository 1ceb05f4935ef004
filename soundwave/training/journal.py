"""What a run's folder tells about the run: settings in `run.json`, and JSON lines that grow while it trains.

log.jsonl            one entry a logging step: losses, rates, what was drawn
left_out.jsonl       one line a sample that is not trained on: step, sample, file, reason
skipped_steps.jsonl  one line a step that changed nothing: step, reason, samples
"""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from soundwave.data.collate import LeftOut
from soundwave.training.checkpoints import WriteError

FILES = ("log.jsonl", "left_out.jsonl", "skipped_steps.jsonl")
NAMED = 20  # samples left out that are shown; the file has them all


def say(line: str) -> None:
    """A line on stderr, above a progress bar if one is drawn there."""
    tqdm.write(line, file=sys.stderr)


class Journal:
    """The JSON lines of a run.

    Attributes:
        left_out: samples left out so far, in the order they were found.
        skipped: steps skipped so far.
        skipped_in_a_row: steps skipped since the last one that was not.
    """

    def __init__(self, out: Path):
        self.out = Path(out)
        self.left_out: dict[tuple[str, str], str] = {}
        self.skipped = self.skipped_in_a_row = 0
        self._seconds, self._start = 0.0, None

    def begin(self, step: int) -> None:
        """Go on after `step`: what a killed run wrote about later ones is dropped, and about step 0 is found anew."""
        kept = {name: [row for row in _rows(self.out / name) if 0 < row["step"] <= step] for name in FILES}
        for name, rows in kept.items():
            self._replace(name, rows)
        self._seconds = max((row["seconds"] for row in kept["log.jsonl"]), default=0.0)
        self.left_out |= {(row["sample"], row["file"]): row["reason"] for row in kept["left_out.jsonl"]}
        skipped = [row["step"] for row in kept["skipped_steps.jsonl"]]
        self.skipped = len(skipped)
        while skipped and skipped.pop() == step - self.skipped_in_a_row:
            self.skipped_in_a_row += 1

    def start_clock(self) -> None:
        """Training begins now; `seconds` go on from those of the run that is resumed."""
        self._start = time.perf_counter()

    def stop_clock(self) -> None:
        """Training has ended."""
        self._seconds, self._start = self.seconds, None

    @property
    def seconds(self) -> float:
        """That training took so far, without loading and evaluation; with those of the run that is resumed."""
        return self._seconds + (time.perf_counter() - self._start if self._start is not None else 0.0)

    def log(self, entry: dict[str, Any]) -> None:
        """One entry of log.jsonl; a value that is not finite becomes null."""
        entry = entry | {"seconds": round(self.seconds, 3)}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        self._append("log.jsonl", finite)

    def leave_out(self, step: int, left: LeftOut) -> None:
        """Note a sample that is not trained on, and say so the first time."""
        if (left.sample, left.file) in self.left_out:
            return
        self.left_out[left.sample, left.file] = left.reason
        self._append("left_out.jsonl", {"step": step} | left._asdict())
        if len(self.left_out) <= NAMED:
            say(f"left out: {left}")
        elif len(self.left_out) == NAMED + 1:
            say(f"left out: further samples, named in {self.out / 'left_out.jsonl'}")

    def skip(self, step: int, reason: str, samples: list[str]) -> None:
        """Note a step that changes neither weights nor optimiser, and say so."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        self._append("skipped_steps.jsonl", {"step": step, "reason": reason, "samples": samples})
        say(f"step {step} is skipped: {reason}; its samples are {', '.join(samples)}")

    def sync(self) -> None:
        """Have the files on disk, not in the system's memory."""
        for name in FILES:
            with open(self.out / name, "rb") as file:
                os.fsync(file.fileno())

    def _append(self, name: str, row: dict[str, Any]) -> None:
        try:
            with open(self.out / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        except OSError as error:
            raise WriteError(f"{self.out / name} cannot be written ({error.strerror})") from error

    def _replace(self, name: str, rows: list[dict[str, Any]]) -> None:
        write_text(self.out / name, "".join(json.dumps(row) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Write a file aside and rename it; WriteError if that fails."""
    aside = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the name without the text
        os.replace(aside, path)
    except OSError as error:
        raise WriteError(f"{path} cannot be written ({error.strerror})") from error


def _rows(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; a killed run may have left half of one."""
    rows = []
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows

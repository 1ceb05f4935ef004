"""The files in a run's folder that record the run: JSON lines, which grow during training.

log.jsonl            one entry per logging step: losses, rates, samples of each task
left_out.jsonl       one line per sample that is not trained on: step, sample, file, reason
skipped_steps.jsonl  one line per step that changed nothing: step, reason, samples
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
from soundwave.training.distributed import is_first

FILES = ("log.jsonl", "left_out.jsonl", "skipped_steps.jsonl")
NAMED = 20  # so many left-out samples are shown; the file has all of them


def say(line: str) -> None:
    """Print a line on stderr, above the progress bar if there is one. Of several processes the first one prints."""
    if is_first():
        tqdm.write(line, file=sys.stderr)


class Journal:
    """Writes the JSON lines of a run.

    Args:
        out: folder of the run.
        writes: False reads and counts, but writes nothing, because another process of the run does.

    Attributes:
        left_out: reason by (sample, file) for the samples left out so far, in the order in which they were found.
        skipped: number of steps skipped so far.
        skipped_in_a_row: number of steps skipped since the last step that was not.
    """

    def __init__(self, out: Path, *, writes: bool = True):
        self.out, self.writes = Path(out), writes
        self.left_out: dict[tuple[str, str], str] = {}
        self.skipped = self.skipped_in_a_row = 0
        self._seconds, self._start = 0.0, None

    def begin(self, step: int) -> None:
        """Continue after `step`: drop the lines of later steps, which a killed run wrote.

        Lines of step 0 are dropped too: they name samples left out before training, which are found again.
        """
        kept = {name: [row for row in _complete_rows(self.out / name) if 0 < row["step"] <= step] for name in FILES}
        for name, rows in kept.items():
            self._replace(name, rows)
        self._seconds = max((row["seconds"] for row in kept["log.jsonl"]), default=0.0)
        self.left_out |= {(row["sample"], row["file"]): row["reason"] for row in kept["left_out.jsonl"]}
        skipped = [row["step"] for row in kept["skipped_steps.jsonl"]]
        self.skipped = len(skipped)
        while skipped and skipped.pop() == step - self.skipped_in_a_row:
            self.skipped_in_a_row += 1

    def start_clock(self) -> None:
        """Start counting `seconds`. A resumed run continues from the seconds of the run before."""
        self._start = time.perf_counter()

    def stop_clock(self) -> None:
        """Stop counting `seconds`."""
        self._seconds, self._start = self.seconds, None

    @property
    def seconds(self) -> float:
        """Seconds of training so far, without loading and evaluation; those before an interruption are included."""
        return self._seconds + (time.perf_counter() - self._start if self._start is not None else 0.0)

    def log(self, entry: dict[str, Any]) -> None:
        """Write one entry of log.jsonl; a value that is not finite becomes null."""
        entry = entry | {"seconds": round(self.seconds, 3)}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        self._append("log.jsonl", finite)

    def leave_out(self, step: int, left: LeftOut) -> None:
        """Record a sample that is not trained on, and print it the first time."""
        if (left.sample, left.file) in self.left_out:
            return
        self.left_out[left.sample, left.file] = left.reason
        self._append("left_out.jsonl", {"step": step} | left._asdict())
        if len(self.left_out) <= NAMED:
            say(f"left out: {left}")
        elif len(self.left_out) == NAMED + 1:
            say(f"left out: more samples, which are listed in {self.out / 'left_out.jsonl'}")

    def skip(self, step: int, reason: str, samples: list[str]) -> None:
        """Record a step that changes neither weights nor optimiser, and print it."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        self._append("skipped_steps.jsonl", {"step": step, "reason": reason, "samples": samples})
        say(f"step {step} is skipped: {reason}; its samples are {', '.join(samples)}")

    def sync(self) -> None:
        """Force the files from the system's memory to the disk."""
        for name in FILES if self.writes else ():
            with open(self.out / name, "rb") as file:
                os.fsync(file.fileno())

    def _append(self, name: str, row: dict[str, Any]) -> None:
        if not self.writes:
            return
        try:
            with open(self.out / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        except OSError as error:
            raise WriteError(f"{self.out / name} cannot be written ({error.strerror})") from error

    def _replace(self, name: str, rows: list[dict[str, Any]]) -> None:
        if self.writes:
            write_text(self.out / name, "".join(json.dumps(row) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Write a file aside and rename it.

    Raises:
        WriteError: writing failed.
    """
    aside = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # without this a power cut may leave the name without the text
        os.replace(aside, path)
    except OSError as error:
        raise WriteError(f"{path} cannot be written ({error.strerror})") from error


def _complete_rows(file: Path) -> list[dict[str, Any]]:
    """The complete lines of a file; a killed run may have left half of a line at the end."""
    rows = []
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows

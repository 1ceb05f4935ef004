"""Where an evaluation keeps its answers, so that one that was killed goes on where it stopped.

A folder holds `evaluation.json` (what is evaluated, and how), `answers.jsonl` (one line for each answer, as it comes),
`left_out.jsonl` (the samples that are not scored, with the reason), and at the end `scores.json`, `speed.json` and the
pictures. An evaluation that goes on in it leaves out what is answered and asks the rest in the same batches, so that
all files but `speed.json` end with the same bytes as those of an evaluation that was never stopped.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from soundwave.data.audio import shown
from soundwave.data.collate import LeftOut
from soundwave.data.locks import locked
from soundwave.data.manifest import Sample
from soundwave.evaluation.classes import Confusion, draw
from soundwave.provenance import versions

ABOUT, ANSWERS, LEFT_OUT, SCORES, SPEED, RATINGS = (
    "evaluation.json", "answers.jsonl", "left_out.jsonl", "scores.json", "speed.json", "ratings.jsonl"
)  # fmt: skip
KEYS = ("sample", "task", "reference", "answer", "normaliser")


class Results:
    """The answers of an evaluation, in a folder.

    Attributes:
        rows: sample id -> its row, of those that are answered.
        left_out: sample id -> why it is left out, of those that are.
    """

    def __init__(self, folder: Path, rows: Mapping[str, dict[str, Any]], left_out: Mapping[str, LeftOut]):
        self.folder, self.rows, self.left_out = folder, dict(rows), dict(left_out)
        self._pictures: dict[str, str] = {}  # name of a picture, without case -> its task

    def settle(self, **about: Any) -> None:
        """Add what is known of the evaluation only once its model is loaded.

        Raises:
            ValueError: an earlier part has other values.
        """
        file = self.folder / ABOUT
        found = json.loads(file.read_text(encoding="utf-8"))
        known = {name: found[name] for name in about if name in found}
        _refuse_others(file, {**found, **about} if known else found)
        write(file, {**found, **about})

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, at once."""
        self.rows[row["sample"]] = row
        _append(self.folder / ANSWERS, row)

    def leave_out(self, one: LeftOut) -> None:
        """Keep why a sample is left out, at once."""
        if one.sample not in self.left_out:
            self.left_out[one.sample] = one
            _append(self.folder / LEFT_OUT, one._asdict())

    def ratings(self) -> dict[str, dict[str, Any]]:
        """sample id -> what a judge said of its answer."""
        return {row["sample"]: row for row in _read(self.folder / RATINGS, ("sample", "task"))}

    def add_rating(self, rating: dict[str, Any]) -> None:
        """Keep what a judge said, at once."""
        _append(self.folder / RATINGS, rating)

    def draw(self, task: str, confusion: Confusion) -> Path:
        """Write the picture of a task's confusion matrix; "a b" and "a-b" get two of them."""
        plain = name = re.sub(r"[^\w-]+", "-", task).encode()[:160].decode(errors="ignore")  # a name has 255 bytes
        number = 1
        while self._pictures.setdefault(name.casefold(), task) != task:
            number += 1
            name = f"{plain}-{number}"
        file = self.folder / f"confusion-{name}.png"
        aside = file.with_name(f"{file.name}.new")
        draw(confusion, task, aside)
        os.replace(aside, file)
        return file

    def finish(self, scores: Mapping[str, Any], speed: Mapping[str, Any]) -> None:
        """Write the scores, each file at once."""
        if speed:
            write(self.folder / SPEED, speed)
        write(self.folder / SCORES, {name: value for name, value in scores.items() if name != "speed"})


@contextmanager
def open_results(folder: Path, about: Mapping[str, Any]) -> Iterator[Results]:
    """The results of an evaluation in `folder`, which is made, or of which an earlier part is there.

    Args:
        about: what is evaluated and how. It must be that of the earlier part.

    Raises:
        ValueError: the folder holds another evaluation, or other files, or a damaged one.
        BlockingIOError: another process evaluates into it.
    """
    about = json.loads(json.dumps({"soundwave": versions(["soundwave"])["soundwave"], **about}))
    folder.mkdir(parents=True, exist_ok=True)
    busy = BlockingIOError(f"{shown(folder)}: another evaluation writes here; wait for it, or name another")
    with locked(folder / ".lock", folder, busy):
        file = folder / ABOUT
        if file.is_file():
            _refuse_others(file, about)
        elif others := sorted(path.name for path in folder.iterdir() if path.name != ".lock" and path.suffix != ".new"):
            raise ValueError(f"{shown(folder)}: holds {shown(others[0])}, which is no evaluation's; name a new folder")
        else:
            write(file, about)
        rows = {row["sample"]: row for row in _read(folder / ANSWERS, KEYS)}
        left = {row["sample"]: LeftOut(**row) for row in _read(folder / LEFT_OUT, LeftOut._fields)}
        yield Results(folder, rows, left)


def hash_of(*files: Path) -> str:
    """SHA-256 of the contents of files, in their order."""
    found = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            for block in iter(lambda: opened.read(1 << 20), b""):
                found.update(block)
    return found.hexdigest()


def hash_of_model(folder: Path) -> str:
    """SHA-256 of what a model's folder holds of the model: its configuration and its trained weights."""
    return hash_of(folder / "config.json", *sorted(folder.glob("*.safetensors")))


def hash_of_samples(samples: Iterable[Sample]) -> str:
    """SHA-256 of samples: of their texts and of where their recordings are, but not of the recordings."""
    found = hashlib.sha256()
    for sample in samples:
        found.update(sample.model_dump_json().encode() + b"\n")
    return found.hexdigest()


def read_answers(file: str | Path) -> list[dict[str, Any]]:
    """The rows of answers that an evaluation has written: a file, or the folder of one.

    The last line may be torn, if the evaluation was killed or still runs; it is left out.

    Raises:
        FileNotFoundError: there is no such file. ValueError: a line is no answer; the message names it.
    """
    file = Path(file)
    file = file / ANSWERS if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"{shown(file)}: does not exist; give what evaluate --answers or --out wrote")
    rows = list(_read(file, KEYS[:4], mend=False))
    if not rows:
        raise ValueError(f"{shown(file)}: holds no answers")
    return rows


def write(file: Path, value: Any) -> None:
    """Write JSON aside and rename it, so that a stop leaves no half of it."""
    aside = file.with_name(f"{file.name}.new")
    with open(aside, "w", encoding="utf-8", newline="\n") as opened:
        opened.write(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n")
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(aside, file)


def _append(file: Path, row: Mapping[str, Any]) -> None:
    with open(file, "a", encoding="utf-8", newline="\n") as opened:
        opened.write(json.dumps(row, ensure_ascii=False) + "\n")


def _read(file: Path, keys: tuple[str, ...], *, mend: bool = True) -> Iterator[dict[str, Any]]:
    """The objects of a file, one a line, with texts under `keys`. With `mend` a torn last line is cut off the file."""
    if not file.is_file():
        return
    whole = 0
    with open(file, "rb") as opened:
        for number, line in enumerate(opened, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            torn = not line.endswith(b"\n")
            if isinstance(row, dict) and all(isinstance(row.get(key), str) for key in keys) and not (torn and mend):
                whole += len(line)
                yield row
            elif not torn:
                wanted = ", ".join(keys)
                raise ValueError(
                    f"{shown(file)}:{number}: is no answer with the keys {wanted}; give what evaluate --answers wrote"
                )
    if mend and whole < file.stat().st_size:
        with open(file, "r+b") as opened:
            opened.truncate(whole)


def _refuse_others(file: Path, about: Mapping[str, Any]) -> None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{shown(file)}: is damaged; name a new folder")
    differ = [name for name in about if found.get(name) != about[name]]
    if differ:
        first = min(differ)
        raise ValueError(
            f"{shown(file.parent)}: holds another evaluation: {first} = {json.dumps(found.get(first))}, but this one "
            f"has {json.dumps(about.get(first))}; name another folder, or remove this one"
        )

"""Checkpoints and models that are complete or absent: each folder is written aside, synced to disk and renamed.

A run that was killed continues from its newest complete checkpoint. A torn checkpoint (incomplete or damaged by a disk
or another program) is named and skipped.
"""

import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from soundwave.model.modeling import WEIGHTS_FILE

ASIDE = ".writing"  # in the same folder as the target, because renaming must not cross file systems
OLD = ".old"  # suffix of the replaced folder between the two renamings
CONFIG_FILE, STATE_FILE = "config.json", "trainer_state.json"
FOREIGN_FILE = "scaler.pt"  # Trainer would load it into a scaler, which a run without fp16 does not have
TENSOR_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


class WriteError(OSError):
    """A file or folder that cannot be written. The message is one line: what, why, and which checkpoint is safe."""


def step_of(checkpoint: Path) -> int | None:
    """The step in the name of a checkpoint's folder; None if the folder has another name."""
    prefix, _, step = checkpoint.name.partition("-")
    return int(step) if prefix == "checkpoint" and step.isdecimal() else None


def newest_checkpoint(out: Path, tell: Callable[[str], None] = lambda line: None) -> Path | None:
    """The complete checkpoint of the highest step in a run's folder; None if there is none.

    Args:
        tell: called with one line for each torn checkpoint that is skipped.
    """
    found = [path for path in out.glob("checkpoint-*") if step_of(path) is not None]
    for path in sorted(found, key=lambda path: step_of(path) or 0, reverse=True):
        fault = fault_of(path)
        if fault is None:
            return path
        tell(f"{path} is skipped: {fault}")
    return None


def fault_of(checkpoint: Path) -> str | None:
    """Why a run cannot continue from a checkpoint; None if it can. Nothing in the checkpoint is executed."""
    for name in (CONFIG_FILE, WEIGHTS_FILE, *TENSOR_FILES, STATE_FILE):
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    try:
        json.loads((checkpoint / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError:
        return f"{CONFIG_FILE} is damaged"
    try:
        state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    except (ValueError, TypeError):  # no JSON, or fields of another version of transformers
        return f"{STATE_FILE} is damaged, or of another version of transformers"
    if not state.max_steps or not state.train_batch_size:
        return f"{STATE_FILE} is incomplete"
    if state.global_step != step_of(checkpoint):
        return f"{STATE_FILE} belongs to step {state.global_step}"
    try:
        with safe_open(checkpoint / WEIGHTS_FILE, framework="pt"):  # reads the header, which has the file's length
            pass
    except SafetensorError:
        return f"{WEIGHTS_FILE} is damaged"
    if (checkpoint / FOREIGN_FILE).exists():
        return f"{FOREIGN_FILE} was added by something else: no run writes one"
    for name in TENSOR_FILES:
        fault = _fault_of_tensors(checkpoint / name)
        if fault is not None:
            return f"{name} {fault}"
    return None


def _fault_of_tensors(file: Path) -> str | None:
    try:
        with zipfile.ZipFile(file) as archive:
            if archive.testzip() is not None:
                return "is damaged"
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError):
        return "is damaged, or not a file of tensors"
    try:
        with safe_globals(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the errors of a refused pickle have no common type
        return f"is refused, as it holds more than tensors ({type(error).__name__})"
    return None


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A folder to write into, which is synced to disk on leaving and then takes the place of `target`.

    Raises:
        WriteError: writing failed; `target` is then what it was before.
    """
    aside = target.parent / ASIDE
    new, old = aside / target.name, aside / f"{target.name}{OLD}"
    try:
        _clear(aside)  # a killed run may have left something
        new.mkdir(parents=True)
        yield new
        for path in new.rglob("*"):
            _sync(path)
        _sync(new)
        if target.exists():
            os.rename(target, old)
        os.rename(new, target)
        _sync(target.parent)
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError of its ZIP writer.
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error) and "inline_" not in str(error):
            raise
        raise WriteError(f"{target} cannot be written ({_reason(error)})") from error
    finally:
        _clear(aside)


def _clear(aside: Path) -> None:
    """Delete the folder `aside`. A replaced folder in it goes back to its place if its successor is not there."""
    for old in aside.glob(f"*{OLD}"):
        place = aside.parent / old.name.removesuffix(OLD)
        if not place.exists():
            os.rename(old, place)
    shutil.rmtree(aside, ignore_errors=True)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clear_place(checkpoint: Path) -> None:
    """Rename a torn checkpoint that is in the place of a new one: `checkpoint-20.torn`, or `.torn-2`, …"""
    if not os.path.lexists(checkpoint):
        return
    names = (f"{checkpoint.name}.torn" + (f"-{i}" if i > 1 else "") for i in count(1))
    os.rename(checkpoint, next(path for path in map(checkpoint.with_name, names) if not os.path.lexists(path)))


def rotate(out: Path, newest: int, limit: int) -> None:
    """Delete all complete checkpoints up to step `newest` but the last `limit`. Torn ones stay."""
    found = [path for path in out.glob("checkpoint-*") if (step_of(path) or newest + 1) <= newest]
    whole = sorted((path for path in found if fault_of(path) is None), key=lambda path: step_of(path) or 0)
    for path in whole[:-limit]:
        gone = out / ASIDE / path.name  # renamed first, so that a kill during the deletion leaves no half of it
        gone.parent.mkdir(exist_ok=True)
        os.rename(path, gone)
    shutil.rmtree(out / ASIDE, ignore_errors=True)

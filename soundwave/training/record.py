"""One run in one folder: who may write there, what it goes on from, and what `run.json` tells of it."""

import errno
import hashlib
import json
import platform
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from soundwave.data.manifest import Sample
from soundwave.hardware import pick_dtype
from soundwave.model.configuration import SoundwaveConfig
from soundwave.provenance import commit, versions
from soundwave.training.checkpoints import WriteError, newest_checkpoint, step_of
from soundwave.training.journal import say
from soundwave.training.settings import ConfigError, StageConfig

# Settings that may differ between a run and the one that goes on from its checkpoint: they decide no weight.
FREE = ("out", "log_steps", "save_steps", "save_total_limit", "workers", "resume", "allow_outside")
FREE += ("strict", "max_skipped", "quiet")
# Those that decide what is trained, and the optimiser's state of it.
BOUND = ("stage", "optimizer", "train_shrinking")
# And those of the model that decide the shapes of its weights.
SHAPING = ("audio_hidden_size", "hidden_size", "vocab_size", "semantics", "frame_stack", "keys", "lora_rank")
# A file system without locks, as some of a network are.
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
LOCK = ".lock"
VERSIONS_OF = ("soundwave", "torch", "triton", "transformers", "peft", "numpy")


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Two trainings in one folder would tear each other's checkpoints. The lock ends with its process, even killed."""
    lock = FileLock(out / LOCK, timeout=0)
    try:
        out.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except OSError as error:
            if isinstance(error, Timeout) or error.errno not in NO_LOCKS:
                raise
            say(f"{out} cannot be locked ({error.strerror}): see to it that no other training uses it")
    except Timeout:
        raise ConfigError(
            f"out = {str(out)!r} is that of a training that still runs; wait for its end, or name another folder"
        ) from None
    except OSError as error:
        raise WriteError(f"{out} cannot be written ({error.strerror}); name another folder") from None
    try:
        yield
    finally:
        lock.release()


def checkpoint_of(config: StageConfig) -> Path | None:
    """What the run goes on from; a setting that forbids it is an error."""
    passed_over: list[str] = []
    found = newest_checkpoint(config.out, passed_over.append)
    for line in passed_over:
        say(line)
    if found is None and passed_over and config.resume:
        raise ConfigError(
            f"out = {str(config.out)!r} holds no whole checkpoint, but resume = True; leave it out to start at step 0"
        )
    if found is None:
        if passed_over:
            say(f"{config.out} holds no whole checkpoint: starting at step 0")
        return None
    if config.resume is False:
        raise ConfigError(
            f"out = {str(config.out)!r} holds {found.name} of an earlier run, but resume = False; name another folder, "
            "or delete its checkpoints"
        )
    if step_of(found) > config.steps:
        raise ConfigError(
            f"out = {str(config.out)!r} holds {found.name}, but steps = {config.steps}; name another folder"
        )
    say(f"going on from {found}, step {step_of(found)} of {config.steps}")
    return found


def earlier_note(config: StageConfig, checkpoint: Path | None) -> dict[str, Any] | None:
    """`run.json` of the run that is gone on with; None where none is, or none can be read and `resume` is asked for."""
    if checkpoint is None:
        return None
    try:
        note = json.loads((config.out / "run.json").read_text(encoding="utf-8"))
        if isinstance(note["config"], dict) and isinstance(note["tasks"], dict):
            return note
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if config.resume is None:
        raise ConfigError(
            f"out = {str(config.out)!r} holds {checkpoint.name}, but run.json, which tells its settings, is missing or "
            "damaged; go on all the same with resume=true, or name another folder"
        )
    return None


def note_of(
    config: StageConfig, samples: list[Sample], device: torch.device, earlier: dict[str, Any] | None
) -> dict[str, Any]:
    """What `run.json` tells of a run. One that goes on by itself must have the settings and samples of the earlier."""
    settings = config.model_dump(mode="json")
    settings |= {"train": [str(path.resolve()) for path in config.train], "out": str(config.out.resolve())}
    settings |= {"model": None if config.model is None else str(config.model.resolve())}
    if config.dtype == "auto":  # decided by a short timing on CPUs, which may end otherwise the next time
        found = str(pick_dtype(device.type)[0]).removeprefix("torch.")
        settings["dtype"] = earlier["config"].get("dtype", found) if earlier else found
    tasks = dict(Counter(sample.task for sample in samples))
    data = _digest(samples)
    if earlier:
        old = earlier["config"] | {"samples": earlier["tasks"], "data": earlier.get("data", data)}
        new = settings | {"samples": tasks, "data": data}
        changed = [name for name in new if name not in FREE and old.get(name, new[name]) != new[name]]
        if config.resume:  # the checkpoint does not fit, whatever is asked for
            changed = [name for name in changed if name in BOUND]
        _refuse(config, {name: (old[name], new[name]) for name in changed})
    return {
        "stage": config.stage,
        "config": settings,
        "versions": versions(VERSIONS_OF),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
        "commit": commit(),
        "tasks": tasks,
        "data": data,
    }


def refuse_misfit(config: StageConfig, checkpoint: Path, model: SoundwaveConfig) -> None:
    """ConfigError if a checkpoint's weights are not those of the model that was built."""
    saved = SoundwaveConfig.from_pretrained(checkpoint)
    found = {name: (getattr(saved, name), getattr(model, name)) for name in SHAPING}
    _refuse(config, {name: pair for name, pair in found.items() if pair[0] != pair[1]})


def _refuse(config: StageConfig, changed: dict[str, tuple[Any, Any]]) -> None:
    if changed:
        found = "; ".join(f"{name} = {old!r} then, {new!r} now" for name, (old, new) in changed.items())
        all_the_same = "" if config.resume else "go on all the same with resume=true, or "
        raise ConfigError(
            f"out = {str(config.out)!r} holds checkpoints of a run with {found}; {all_the_same}name another folder"
        )


def _digest(samples: list[Sample]) -> str:
    """Of everything that the samples tell, in their order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.model_dump_json().encode() + b"\n")
    return digest.hexdigest()[:16]

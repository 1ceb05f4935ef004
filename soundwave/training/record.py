"""One run in one folder: its lock, the checkpoint that it continues from, and the content of `run.json`."""

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from soundwave.data.locks import locked
from soundwave.data.manifest import Sample
from soundwave.data.samples import LINES, Samples
from soundwave.hardware import pick_dtype
from soundwave.model.configuration import SoundwaveConfig
from soundwave.provenance import commit, versions
from soundwave.training.checkpoints import STATE_FILE, WriteError, newest_checkpoint, step_of
from soundwave.training.distributed import Processes
from soundwave.training.journal import say
from soundwave.training.settings import ConfigError, StageConfig

# Settings that may change when a run continues from a checkpoint, because no weight depends on them.
FREE = ("out", "log_steps", "save_steps", "save_total_limit", "workers", "resume", "allow_outside")
FREE += ("strict", "max_skipped", "quiet", "sharding")
# Settings that must not change, because they decide which weights are trained and the form of the optimiser's state.
BOUND = ("stage", "optimizer", "train_shrinking")
# Values of the model's configuration that must not change, because they decide the shapes of its weights.
SHAPING = ("audio_hidden_size", "hidden_size", "vocab_size", "semantics", "frame_stack", "keys", "lora_rank")
LOCK = ".lock"
VERSIONS_OF = ("soundwave", "torch", "triton", "transformers", "peft", "numpy")


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Lock a run's folder, because two trainings in one folder would damage each other's checkpoints.

    The system releases the lock when the process ends, even when it is killed.

    Raises:
        ConfigError: another training uses the folder.
        WriteError: the folder cannot be written, or is a file.
    """
    busy = ConfigError(
        f"out = {str(out)!r} is in use by a training that still runs; wait for its end, or name another folder"
    )
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    lock = ExitStack()
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.enter_context(locked(out / LOCK, out, busy, say))
    except OSError as error:
        if isinstance(error, FileExistsError) and out.is_file():
            raise WriteError(f"out = {str(out)!r} is a file; name a folder") from None
        raise WriteError(f"{out} cannot be written ({error.strerror}); name another folder") from None
    try:
        yield
    finally:
        lock.close()
        _remove_if_empty(out, made)


def _remove_if_empty(out: Path, made: list[Path]) -> None:
    """Remove the folders `made` for a run that failed before it wrote anything."""
    with suppress(OSError):  # a folder that is not empty stays
        if made and [path.name for path in out.iterdir()] == [LOCK]:
            (out / LOCK).unlink()
        for folder in made:
            folder.rmdir()


def checkpoint_of(config: StageConfig) -> Path | None:
    """The checkpoint that a run continues from; None if it starts at step 0.

    Raises:
        ConfigError: the checkpoint contradicts `resume` or `steps`.
    """
    skipped: list[str] = []
    found = newest_checkpoint(config.out, skipped.append)
    for line in skipped:
        say(line)
    if found is None and skipped and config.resume:
        raise ConfigError(
            f"out = {str(config.out)!r} holds no complete checkpoint, but resume = True; "
            "leave it out to start at step 0"
        )
    if found is None:
        if skipped:
            say(f"{config.out} holds no complete checkpoint: starting at step 0")
        return None
    if config.resume is False:
        raise ConfigError(
            f"out = {str(config.out)!r} holds {found.name} of an earlier run, but resume = False; name another folder, "
            "or delete its checkpoints"
        )
    step = step_of(found) or 0
    if step > config.steps:
        raise ConfigError(
            f"out = {str(config.out)!r} holds {found.name}, but steps = {config.steps}; name another folder"
        )
    return found


def tell_where_it_goes_on(config: StageConfig, checkpoint: Path) -> None:
    """Say which checkpoint a run continues from; to be called when nothing contradicts it any more."""
    step = step_of(checkpoint) or 0
    if step < config.steps:
        say(f"going on from {checkpoint}, step {step} of {config.steps}")
    elif (config.out / "model").is_dir():
        say(f"{config.out} has seen all {config.steps} steps already; its model is written again, without training")
    else:
        say(f"{config.out} has seen all {config.steps} steps already; only its model was not written yet")


def agree(config: StageConfig, checkpoint: Path | None, note: dict[str, Any], processes: Processes) -> None:
    """Compare what the processes of a run have read.

    Raises:
        ConfigError: a process, perhaps on another machine, does not see the checkpoint, or has other samples or
            settings than the first one.
    """
    seen = checkpoint is None or (checkpoint / STATE_FILE).is_file()
    settings = {name: value for name, value in note["config"].items() if name != "dtype"}
    found = processes.gather((seen, note["data"], settings))
    first = found[0]
    for rank, (seen, data, settings) in enumerate(found):
        who = f"process {rank} of {processes.count}"
        if not seen:
            raise ConfigError(
                f"{who} does not see {checkpoint}; name a folder as out that all machines of the run share"
            )
        for name, value in settings.items():
            if value != first[2][name]:
                raise ConfigError(f"{who} has {name} = {value!r}, but the first one {first[2][name]!r}")
        if data != first[1]:
            raise ConfigError(f"{who} reads other samples than the first one; copy the same data to all machines")


def tell_of_processes(before: dict[str, Any] | None, note: dict[str, Any]) -> None:
    """Say what changes if a run continues with another number of processes."""
    old, new = (before or note).get("processes", 1), note["processes"]
    if old == new:
        return
    was, now = (before or note)["config"], note["config"]
    if any(at.get(name) is not None for at in (was, now) for name in ("batch_tokens", "batch_duration")):
        say(
            f"{_processes(old)} before, {new} now: the batches are others, so that of this epoch some samples may come "
            "twice and some not at all; from the next epoch on each comes once again"
        )
        return
    a_batch = [at["batch_size"] * count for at, count in ((was, old), (now, new))]
    a_step = [size * at["accumulation"] for size, at in zip(a_batch, (was, now), strict=True)]
    of_step = f"a step has {a_step[1]} samples" + (" as before" if a_step[0] == a_step[1] else f", before {a_step[0]}")
    if a_step[0] == a_step[1] and a_batch[0] == a_batch[1]:
        changes = "the samples come in the same order, and dropout draws other numbers"
    else:
        changes = (
            "the samples of this epoch come in another order, so that some may come twice and some not at all; from "
            "the next epoch on each comes once again"
        )
    say(f"{_processes(old)} before, {new} now: {of_step}; {changes}")


def _processes(count: int) -> str:
    return f"{count} {'process' if count == 1 else 'processes'}"


def earlier_note(config: StageConfig, checkpoint: Path | None) -> dict[str, Any] | None:
    """`run.json` of the run that wrote the checkpoint; None without a checkpoint, or without the file with `resume`.

    Raises:
        ConfigError: the file is missing or damaged, and `resume` is None.
    """
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
            f"out = {str(config.out)!r} holds {checkpoint.name}, but run.json, which has its settings, is missing or "
            "damaged; continue anyway with resume=true, or name another folder"
        )
    return None


def note_of(
    config: StageConfig,
    samples: Samples,
    device: torch.device,
    earlier: dict[str, Any] | None,
    processes: int = 1,
) -> dict[str, Any]:
    """Content of `run.json`: settings, versions, device, commit and samples of a run.

    Args:
        processes: number of processes that train together.
        earlier: the content that the run before wrote, if this one continues it.

    Raises:
        ConfigError: settings or samples differ from those of the run before. With `resume` only `BOUND` must agree.
    """
    settings = config.model_dump(mode="json")
    settings |= {"train": [str(path.resolve()) for path in config.train], "out": str(config.out.resolve())}
    settings |= {"model": None if config.model is None else str(config.model.resolve())}
    settings |= {"features": None if config.features is None else str(config.features.resolve())}
    if config.dtype == "auto":  # a CPU decides by a short timing, which may have another result the next time
        found = str(pick_dtype(device.type)[0]).removeprefix("torch.")
        settings["dtype"] = earlier["config"].get("dtype", found) if earlier else found
    tasks = dict(Counter(samples.tasks()))
    data = _digest(samples, earlier.get("data") if earlier else None)
    if earlier:
        old = earlier["config"] | {"samples": earlier["tasks"], "data": earlier.get("data", data)}
        new = settings | {"samples": tasks, "data": data}
        old["processes"], new["processes"] = earlier.get("processes", 1), processes  # runs of version 0.1 had one
        changed = [name for name in new if name not in FREE and old.get(name, new[name]) != new[name]]
        if config.resume:  # where these differ the checkpoint does not fit
            changed = [name for name in changed if name in BOUND]
        advised = not config.resume and not any(name in BOUND for name in changed)
        _refuse(config, {name: (old[name], new[name]) for name in changed}, resume_advised=advised)
    return {
        "stage": config.stage,
        "config": settings,
        "versions": versions(VERSIONS_OF),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
        "commit": commit(),
        "tasks": tasks,
        "data": data,
        "processes": processes,
    }


def refuse_misfit(config: StageConfig, checkpoint: Path, model: SoundwaveConfig) -> None:
    """Compare a checkpoint with the model that was built.

    Raises:
        ConfigError: the weights have other shapes.
    """
    saved = SoundwaveConfig.from_pretrained(checkpoint)
    found = {name: (getattr(saved, name), getattr(model, name)) for name in SHAPING}
    _refuse(config, {name: pair for name, pair in found.items() if pair[0] != pair[1]}, resume_advised=False)


def _refuse(config: StageConfig, changed: dict[str, tuple[Any, Any]], *, resume_advised: bool) -> None:
    if changed:
        found = "; ".join(f"{name} = {old!r} (now {new!r})" for name, (old, new) in changed.items())
        anyway = "continue anyway with resume=true, or " if resume_advised else ""
        raise ConfigError(
            f"out = {str(config.out)!r} holds checkpoints of a run with {found}; {anyway}name another folder"
        )


def _digest(samples: Iterable[Sample], earlier: str | None = None) -> str:
    """Hash of the samples and their order, comparable with that of an earlier run."""
    if isinstance(samples, Samples) and (found := samples.digest()):
        if (earlier or found).startswith(LINES):
            return found
        say(f"comparing {len(samples)} samples with those of the run, which an older version began: once, for a while")
    digest = hashlib.sha256()
    for sample in samples:
        # Runs of version 0.1 knew no chats.
        digest.update(sample.model_dump_json(exclude=None if sample.chat else {"chat"}).encode() + b"\n")
    return digest.hexdigest()[:16]

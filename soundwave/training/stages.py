"""The three stages of Soundwave's training (arXiv 2502.12900, §3): what each one trains, on which loss, at which rate.

I    alignment adapter and blank row    CTC; of the language model only its output embedding is loaded
II   both adapters and LoRA             next token + 0.3 CTC; tasks drawn at a temperature that rises with the epochs
III  LoRA, or LoRA + shrinking adapter  next token
"""

import difflib
import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PrinterCallback, TrainingArguments, set_seed

from soundwave import embedded
from soundwave.configuration import SoundwaveConfig
from soundwave.data.audio import AudioError
from soundwave.data.collate import CheckedCollator, LeftOut, ctc_text_of, tokens_of, with_duration
from soundwave.data.manifest import Sample, read_manifest
from soundwave.data.sampling import BucketBatchSampler, paper_temperature
from soundwave.hardware import pick_device, pick_dtype
from soundwave.modeling import SoundwaveForConditionalGeneration, freeze_all_but
from soundwave.processing import SoundwaveProcessor
from soundwave.training.checkpoints import WriteError, newest_checkpoint, step_of, written_aside
from soundwave.training.journal import Journal, say
from soundwave.training.trainer import (
    Board,
    Clock,
    Interrupted,
    ProgressBar,
    ProgressLines,
    SampleError,
    SoundwaveTrainer,
    StopOnSignal,
)

Positive = Annotated[int, Field(ge=1)]


class StageConfig(BaseModel):
    """Settings of one stage; the defaults that differ between stages are the paper's, in `PAPER`."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    stage: Literal[1, 2, 3] = Field(description="1 alignment, 2 shrinking, 3 instruction tuning")
    train: list[Path] = Field(min_length=1, description="manifests to train on")
    out: Path = Field(description="folder for checkpoints, logs and the model")
    model: Path | None = Field(None, description="model of the stage before; None starts from the backbones")
    audio_tower: str = Field(embedded.WHISPER, description="Whisper: Hub id, folder or embedded name")
    language_model: str = Field(embedded.LANGUAGE_MODEL, description="causal LM: Hub id, folder or embedded name")
    semantics: Literal["paper", "released"] = Field(
        "paper", description="attention across frames and CTC peaks; or as the authors' inference code has it"
    )
    frame_stack: Positive = Field(2, description="encoder frames (50 a second) to a frame of the adapters")
    keep: Literal["peaks", "runs", "frames"] | None = Field(
        None,
        description="what the LLM reads: CTC's peaks, the first frame of each run, or all; None: by semantics or model",
    )
    keys: Literal["all", "kept", "none"] | None = Field(
        None,
        description="what a kept frame attends to: all frames, kept ones, or nothing; None: by semantics or model",
    )

    steps: Positive = Field(description="optimiser steps")
    batch_size: Positive = Field(description="samples a device and forward pass")
    accumulation: Positive = Field(description="forward passes an optimiser step")
    learning_rate: float = Field(gt=0, description="at its height")
    warmup_steps: int = Field(0, ge=0, description="over which the learning rate rises from 0")
    scheduler: Literal["cosine", "linear", "constant_with_warmup"] = Field(
        "cosine", description="how the learning rate falls afterwards"
    )
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="longer gradients are scaled down to this norm")
    optimizer: Literal["adamw", "adamw_8bit"] = Field("adamw", description="8 bits: states of a quarter of the size")
    ctc_weight: float = Field(0.3, ge=0, description="of the CTC loss in stage II")
    train_shrinking: bool = Field(False, description="stage III trains the shrinking adapter beside LoRA")
    temperature: bool = Field(
        True, description="stage II draws tasks at T = 1 + 5·epoch; else every sample once an epoch"
    )
    lora_rank: Positive = Field(64, description="of the matrices on the LLM's attention")
    lora_alpha: Positive = Field(16, description="LoRA is scaled by lora_alpha / lora_rank")
    quantization: Literal["auto", "nf4", "none"] = Field("auto", description="auto: nf4 on CUDA, none on the CPU")
    dtype: Literal["auto", "bfloat16", "float32"] = Field("auto", description="of the frozen backbones")
    spec_augment: bool = Field(True, description="mask parts of the recordings in time and frequency")
    adapter_dropout: float | None = Field(None, ge=0, lt=1, description="None: 0.1, or that of the model given")
    implementation: Literal["fused", "eager"] = Field("fused", description="eager: plain PyTorch")
    exact: bool = Field(False, description="the fused CTC skips no column of its gradient")
    gradient_checkpointing: bool | None = Field(
        None, description="the LLM runs each layer again in backward, for a tenth of the memory; None: on CUDA"
    )

    seed: int = Field(0, description="of fresh weights, dropout and the order of the samples")
    log_steps: Positive = Field(10, description="steps between log entries")
    save_steps: Positive = Field(500, description="steps between checkpoints")
    save_total_limit: Positive = Field(2, description="checkpoints that are kept")
    workers: int = Field(0, ge=0, description="processes that load data")
    resume: bool | None = Field(
        None,
        description="None: go on from the newest checkpoint in out, if its run had the same settings and data; "
        "true: with other ones too; false: out must hold none",
    )
    allow_outside: bool = Field(False, description="manifests may name audio outside their folder")
    strict: bool = Field(False, description="a sample that cannot be trained on stops the run; else it is left out")
    max_skipped: Positive = Field(10, description="steps in a row that may be skipped, their loss not being finite")
    quiet: bool = Field(False, description="no progress is shown")


PAPER: dict[int, dict[str, Any]] = {
    1: {"steps": 6000, "batch_size": 32, "accumulation": 8, "learning_rate": 1e-4, "warmup_steps": 200},
    2: {"steps": 6000, "batch_size": 16, "accumulation": 8, "learning_rate": 3e-5, "warmup_steps": 200},
    3: {"steps": 4000, "batch_size": 8, "accumulation": 4, "learning_rate": 3e-5, "warmup_steps": 200},
}
# Settings that may differ between a run and the one that goes on from its checkpoint: they decide no weight.
FREE = ("out", "log_steps", "save_steps", "save_total_limit", "workers", "resume", "allow_outside")
FREE += ("strict", "max_skipped", "quiet")
# Those that decide which weights there are, and the optimiser's state of them.
SHAPING = ("stage", "audio_tower", "language_model", "semantics", "frame_stack", "keys", "lora_rank", "optimizer")
SHAPING += ("train_shrinking",)
LOCK = ".lock"
PATHS = ("train", "out", "model")
OF_STAGE_2 = ("keep", "keys", "lora_rank", "lora_alpha")  # not decided by a model of stage I
VERSIONS_OF = ("soundwave", "torch", "triton", "transformers", "peft", "numpy")
LONGEST = 30.0  # seconds that Whisper's encoder takes
TRAINED = {
    1: ("alignment.", "blank_"),
    2: ("alignment.", "blank_", "shrinking.", "lora"),
    3: ("lora",),
}


# What other trainers call a setting of ours.
OTHER_NAMES = {"lr": "learning_rate", "batch": "batch_size", "gradient_accumulation_steps": "accumulation"}


class ConfigError(ValueError):
    """Settings that cannot be used. One line a fault: key, value found, value wanted."""


def load_config(
    stage: int, file: Path | None = None, overrides: list[str] | None = None, *, to_show: bool = False
) -> StageConfig:
    """Settings of a stage: the paper's, then a YAML file's, then `key=value` words.

    Paths in the file are relative to its folder, those in words to the working directory. With `to_show` those that
    have no default need not be given.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            loaded = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read ({error.strerror}); give a YAML file of settings") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            detail = str(error).replace("\n", " ")
            raise ConfigError(f"{file}: not YAML ({detail}); write one `key: value` a line") from error
        if not isinstance(loaded, dict):
            raise ConfigError(f"{file}: holds a {type(loaded).__name__}; write one `key: value` a line")
        values = {key: _beside(Path(file).parent, key, value) for key, value in loaded.items()}
    for word in overrides or []:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r}: settings are written key=value, without spaces, e.g. learning_rate=1e-4")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key} = {value!r} cannot be read; quote it") from error
    if to_show:
        values = {"train": ["…"], "out": "…"} | values
    return make_config(stage, **values)


def make_config(stage: int, /, **values: Any) -> StageConfig:
    """A checked `StageConfig`: the paper's settings of the stage, changed by `values`."""
    if values.get("stage", stage) != stage:
        raise ConfigError(f"stage = {values['stage']}, but stage {stage} was asked for")
    values["stage"] = stage
    for key in values:
        if key not in StageConfig.model_fields:
            near = [OTHER_NAMES[key]] if key in OTHER_NAMES else []
            near += difflib.get_close_matches(str(key), StageConfig.model_fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(StageConfig.model_fields)}"
            raise ConfigError(f"unknown setting {key!r}; {hint}")
    if isinstance(values.get("train"), str | Path):
        values["train"] = [values["train"]]
    for key in PATHS:  # a shell leaves the ~ in `train=~/data` alone
        if isinstance(values.get(key), list):
            values[key] = [Path(item).expanduser() if isinstance(item, str) else item for item in values[key]]
        elif isinstance(values.get(key), str):
            values[key] = Path(values[key]).expanduser()
    for key in ("audio_tower", "language_model"):
        # The saved model names its backbones, and is used from other working directories.
        if key in values and Path(str(values[key])).is_dir():
            values[key] = str(Path(values[key]).resolve())
    for key, value in values.items():
        # YAML 1.1 reads 1e-4 as a word, people write it as a number.
        if isinstance(value, str) and StageConfig.model_fields[key].annotation is float:
            try:
                values[key] = float(value)
            except ValueError:
                raise ConfigError(f"{key} = {value!r}, but a number is wanted") from None
        if isinstance(value, str) and StageConfig.model_fields[key].annotation is int:
            with suppress(ValueError):  # else pydantic says what is wrong with it
                values[key] = float(value)
    try:
        return StageConfig(**(PAPER[stage] | values))
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            key = ".".join(str(part) for part in fault["loc"])
            if fault["type"] == "missing":
                faults.append(f"setting {key!r} is missing; give {key}=…")
            else:
                faults.append(f"{key} = {fault['input']!r}: {fault['msg'].lower()}")
        raise ConfigError("; ".join(faults)) from None


def _beside(folder: Path, key: str, value: Any) -> Any:
    """A file's path settings, relative to the folder the file is in."""
    if key in PATHS and isinstance(value, str):
        return folder / Path(value).expanduser()
    if key == "train" and isinstance(value, list):
        return [folder / Path(item).expanduser() if isinstance(item, str) else item for item in value]
    if key in ("audio_tower", "language_model") and (folder / str(value)).is_dir():
        return folder / value
    return value


def train_stage(config: StageConfig) -> tuple[Path, list[dict[str, float]], float]:
    """Run one stage, or go on with it from its newest checkpoint; settings and log are in `out` (`Journal`).

    Returns:
        The model's folder (`out/model`), the log (one dict a logging step, see `SoundwaveTrainer`), and the seconds
        that training took, with those before it was interrupted.

    Raises:
        ManifestError: a manifest that cannot be used. SampleError: a sample that cannot, with `strict`.
        FileNotFoundError, ValueError: a model that does not fit.
        ConfigError: settings that contradict the data, the model or what `out` holds.
        FloatingPointError: `max_skipped` steps in a row were not finite. WriteError: the disk is full or read-only.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was saved.
    """
    with _alone_in(config.out):
        return _train_stage(config)


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Two trainings in one folder would tear each other's checkpoints. The lock ends with its process, even killed."""
    lock = FileLock(out / LOCK, timeout=0)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
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


def _train_stage(config: StageConfig) -> tuple[Path, list[dict[str, float]], float]:
    checkpoint = _checkpoint(config)
    step = step_of(checkpoint) if checkpoint else 0
    set_seed(config.seed)
    device, _ = pick_device()
    left_out: list[LeftOut] = []
    samples = _samples(config, left_out)
    note = _note(config, samples, device, _earlier_note(config, checkpoint))
    config = config.model_copy(update={"dtype": note["config"]["dtype"]})

    model = build_model(config, device).to(device)
    journal = Journal(config.out)
    journal.begin(step)
    for left in left_out:
        journal.leave_out(0, left)
    processor = SoundwaveProcessor.from_backbones(model.config.audio_tower, model.config.language_model)
    trained = TRAINED[config.stage] + (("shrinking.",) if config.stage == 3 and config.train_shrinking else ())
    freeze_all_but(model, trained)
    collator = CheckedCollator(processor, config.stage, frame_stack=model.config.frame_stack)
    if config.model is None and checkpoint is None:
        clips = _first_clips(collator, samples, config.batch_size)
        if clips:
            model.initialise_blank(**{name: x.to(device) for name, x in processor.pad_features(clips).items()})

    clock, stop = Clock(journal, note), StopOnSignal()
    trainer = SoundwaveTrainer(
        model=model,
        args=_arguments(config, device),
        train_dataset=samples,
        data_collator=collator,
        batch_sampler=build_sampler(config, samples),
        journal=journal,
        strict=config.strict,
        max_skipped=config.max_skipped,
        callbacks=[Board(), clock, stop],
    )
    trainer.remove_callback(PrinterCallback)
    progress = (ProgressBar if sys.stderr.isatty() else ProgressLines)(f"stage {'I' * config.stage}")
    if not config.quiet:
        trainer.add_callback(progress)
    if step == config.steps:  # killed before its model was written
        trainer.go_to(checkpoint)
        clock.write_note()
    else:
        with stop, closing(progress):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    _tell_left_out(journal, len(samples) + len(left_out))
    if trainer.state.global_step < config.steps:
        raise Interrupted(
            f"stopped after step {trainer.state.global_step} of {config.steps}, which is saved in {config.out}; "
            "the same command goes on from there"
        )
    folder = config.out / "model"
    with written_aside(folder) as aside:
        model.save_pretrained(aside)
    if stop.asked:  # in its last step: what comes after a stage, in a demonstration, is not to begin
        raise Interrupted(f"stopped at the end of stage {'I' * config.stage}, whose model is in {folder}")
    return folder, [entry for entry in trainer.state.log_history if "loss" in entry], journal.seconds


def _checkpoint(config: StageConfig) -> Path | None:
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


def _earlier_note(config: StageConfig, checkpoint: Path | None) -> dict[str, Any] | None:
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


def _note(
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
        if config.resume:  # other weights do not fit the checkpoint's, whatever is asked for
            changed = [name for name in changed if name in SHAPING]
        if changed:
            found = "; ".join(f"{name} = {old[name]!r} then, {new[name]!r} now" for name in changed)
            all_the_same = "" if config.resume else "go on all the same with resume=true, or "
            raise ConfigError(
                f"out = {str(config.out)!r} holds checkpoints of a run with {found}; {all_the_same}name another folder"
            )
    return {
        "stage": config.stage,
        "config": settings,
        "versions": {"python": platform.python_version()} | _versions(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
        "commit": commit(),
        "tasks": tasks,
        "data": data,
    }


def _digest(samples: list[Sample]) -> str:
    """Of everything that the samples tell, in their order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.model_dump_json().encode() + b"\n")
    return digest.hexdigest()[:16]


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS_OF:
        with suppress(PackageNotFoundError):  # triton on other systems than Linux
            found[name] = version(name)
    return found


def commit() -> str | None:
    """Commit of the checkout that the package runs from, if it runs from one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip() or None


def _first_clips(collator: CheckedCollator, samples: list[Sample], count: int) -> list[torch.Tensor]:
    """Features of the first samples that have any."""
    clips: list[torch.Tensor] = []
    for sample in samples:
        with suppress(AudioError):  # left out, and said so, when its batch comes
            clip = collator.clip(sample)
            clips += [] if clip is None else [clip]
        if len(clips) == count:
            break
    return clips


def _tell_left_out(journal: Journal, total: int) -> None:
    if not journal.left_out:
        return
    # Figures differ from sample to sample where the fault is the same.
    faults = Counter(re.sub(r"\d[\d.]*", "…", reason.split(";")[0]) for reason in journal.left_out.values())
    shown = ", ".join(f"{count} × {fault}" for fault, count in faults.most_common(5))
    say(f"left out {len(journal.left_out)} of {total} samples, all in {journal.out / 'left_out.jsonl'}: {shown}")


def build_model(config: StageConfig, device: torch.device) -> SoundwaveForConditionalGeneration:
    """The model that a stage starts from: fresh on its backbones, or the one of the stage before."""
    dtype = pick_dtype(device.type)[0] if config.dtype == "auto" else getattr(torch, config.dtype)
    quantization = {"auto": "nf4" if device.type == "cuda" else None, "nf4": "nf4", "none": None}[config.quantization]
    changes: dict[str, Any] = {"quantization": quantization, "ctc_weight": config.ctc_weight}
    changes |= {"implementation": config.implementation, "exact": config.exact}
    if config.adapter_dropout is not None:
        changes["adapter_dropout"] = config.adapter_dropout
    for masks in ("spec_augment_time_masks", "spec_augment_mel_masks"):  # a model keeps those of its last stage
        changes[masks] = getattr(SoundwaveConfig(), masks) if config.spec_augment else 0
    if config.stage == 1:
        changes["quantization"] = None
    if config.model is None:
        if config.stage == 3:
            raise ConfigError("setting 'model' is missing; stage 3 goes on from a model of stage 2: give model=…")
        changes |= {
            "semantics": config.semantics,
            "frame_stack": config.frame_stack,
            "keep": config.keep,
            "keys": config.keys,
            "lora_rank": config.lora_rank,
            "lora_alpha": config.lora_alpha,
        }
        soundwave_config = SoundwaveConfig.from_backbones(config.audio_tower, config.language_model, **changes)
        model = SoundwaveForConditionalGeneration.from_backbones(
            soundwave_config, dtype=dtype, language_model=config.stage > 1
        )
    else:
        changes |= _adopted(config)
        model = SoundwaveForConditionalGeneration.from_pretrained(
            config.model, dtype=dtype, language_model=config.stage > 1, **changes
        )
    model.config.stage = max(model.config.stage, config.stage)
    if device.type == "cpu" and model.language_model is not None:
        # Torch's flash attention on the CPU takes ten times as long backward over a few dozen tokens (docs/log.md).
        model.language_model.set_attn_implementation("eager")
    on_cuda = device.type == "cuda"
    if model.language_model is not None and (
        on_cuda if config.gradient_checkpointing is None else config.gradient_checkpointing
    ):
        model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        # The call above makes the embeddings want a gradient, which only the reentrant kind needs.
        model.language_model.disable_input_require_grads()
    return model


def build_sampler(config: StageConfig, samples: list[Sample]) -> BucketBatchSampler:
    """The batches of a stage: of similar length, and in stage II drawn at a temperature.

    Stage I pads frames. The others also pad what the language model reads, prompts and answers with the kept frames.
    """
    if config.stage == 1:
        lengths = [None if sample.audio is None else sample.duration or 0.0 for sample in samples]
    else:
        lengths = [tokens_of(sample) for sample in samples]
    return BucketBatchSampler(
        lengths,
        [sample.task for sample in samples],
        config.batch_size,
        seed=config.seed,
        temperature=paper_temperature if config.stage == 2 and config.temperature else None,
    )


def _adopted(config: StageConfig) -> dict[str, Any]:
    """Changes to the configuration of the model that a stage goes on from; a setting that comes too late is refused."""
    if not (config.model / "config.json").is_file():
        raise ConfigError(
            f"model = {str(config.model)!r} holds no model; name the folder that the stage before printed"
        )
    try:
        saved = SoundwaveConfig.from_pretrained(config.model)
    except ValueError as error:
        raise ConfigError(f"model = {str(config.model)!r}: {error}") from None
    if config.stage < saved.stage or config.stage > saved.stage + 1:
        raise ConfigError(
            f"model = {str(config.model)!r} has seen stage {saved.stage}, but stage {config.stage} goes on from one "
            f"of stage {max(config.stage - 1, 1)}" + (f" or {config.stage}" if config.stage > 1 else "")
        )
    changes = {}
    for name in ("audio_tower", "language_model", "semantics", "frame_stack", *OF_STAGE_2):
        wanted, found = getattr(config, name), getattr(saved, name)
        if name not in config.model_fields_set or wanted in (None, found):
            continue
        if saved.stage >= 2 or name not in OF_STAGE_2:
            raise ConfigError(f"{name} = {wanted!r}, but the model in {config.model} has {found!r}: leave it out")
        changes[name] = wanted
    return changes


def _samples(config: StageConfig, left_out: list[LeftOut]) -> list[Sample]:
    """The samples to train on, with durations; `left_out` gets those that cannot be used, or they are errors."""

    def leave_out(sample: str, file: str, reason: str) -> None:
        left_out.append(LeftOut(sample, file, reason))
        if config.strict:
            raise SampleError(str(left_out[-1]))

    read = [
        sample
        for path in config.train
        for sample in read_manifest(path, allow_outside=config.allow_outside, leave_out=leave_out)
    ]
    # Stage I learns from what CTC is to write alone.
    fitting = [s for s in read if config.stage > 1 or (s.audio is not None and (ctc_text_of(s) or "").strip())]
    if len(fitting) < len(read):
        say(f"{len(read) - len(fitting)} of {len(read)} samples have no recording with a text: not for stage 1")
    samples = []
    for sample in fitting:
        try:
            samples.append(_checked_duration(sample))
        except AudioError as error:
            leave_out(sample.id, str(sample.audio), error.fault)
    if not samples:
        needed = "recordings with a text" if config.stage == 1 else "samples"
        why = f"; {len(left_out)} were left out, the first: {left_out[0]}" if left_out else ""
        raise ConfigError(
            f"{', '.join(map(str, config.train))}: no sample to train on; stage {config.stage} needs {needed}{why}"
        )
    return samples


def _checked_duration(sample: Sample) -> Sample:
    sample = with_duration(sample)
    if sample.audio is not None and sample.duration > LONGEST:
        raise AudioError(
            sample.audio,
            f"duration = {sample.duration:g}, but at most {LONGEST:g} s can be trained on; cut it, or give offset and "
            "duration",
        )
    return sample


def _arguments(config: StageConfig, device: torch.device) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(config.out),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type=config.scheduler,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim={"adamw": "adamw_torch", "adamw_8bit": "adamw_bnb_8bit"}[config.optimizer],
        logging_steps=config.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=config.save_steps,
        save_total_limit=config.save_total_limit,
        seed=config.seed,
        use_cpu=device.type == "cpu",
        dataloader_num_workers=config.workers,
        report_to=[],  # TensorBoard is `Board`
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
    )

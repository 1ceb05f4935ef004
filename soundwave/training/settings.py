"""Settings of a stage: the paper's, over them a file's, over those the ones given in words."""

import difflib
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from soundwave import backbones

Positive = Annotated[int, Field(ge=1)]


class StageConfig(BaseModel):
    """Settings of one stage; the defaults that differ between stages are the paper's, in `PAPER`."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    stage: Literal[1, 2, 3] = Field(description="1 alignment, 2 shrinking, 3 instruction tuning")
    train: list[Path] = Field(min_length=1, description="manifests to train on")
    out: Path = Field(description="folder for checkpoints, logs and the model")
    model: Path | None = Field(None, description="model of the stage before; None starts from the backbones")
    audio_tower: str = Field(backbones.WHISPER, description="Whisper: Hub id, folder or embedded name")
    language_model: str = Field(backbones.LANGUAGE_MODEL, description="causal LM: Hub id, folder or embedded name")
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
PATHS = ("train", "out", "model")
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

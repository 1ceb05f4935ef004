"""Settings of a stage: the paper's, overridden by a YAML file's, overridden by `key=value` words."""

import difflib
from contextlib import suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from soundwave import backbones
from soundwave.data.yaml_text import read_yaml

Positive = Annotated[int, Field(ge=1)]


class StageConfig(BaseModel):
    """Settings of one stage. Defaults that differ between the stages are the paper's, listed in `PAPER`."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    stage: Literal[1, 2, 3] = Field(description="Training stage: 1 alignment, 2 shrinking, 3 instruction tuning")
    train: list[Path] = Field(min_length=1, description="Manifests to train on")
    out: Path = Field(description="Folder for checkpoints, logs and the model")
    model: Path | None = Field(None, description="Model of the stage before; null starts from the backbones")
    audio_tower: str = Field(backbones.WHISPER, description="Whisper model: Hub id, folder or embedded name")
    language_model: str = Field(
        backbones.LANGUAGE_MODEL, description="Causal language model: Hub id, folder or embedded name"
    )
    semantics: Literal["paper", "released"] = Field(
        "paper", description="paper: attention across frames, CTC peaks; released: the authors' inference code"
    )
    frame_stack: Positive = Field(2, description="Encoder frames (50 per second) that make one frame of the adapters")
    keep: Literal["peaks", "runs", "frames"] | None = Field(
        None,
        description="Frames that the LLM reads: CTC's peaks, the first frame of each run, or all frames; "
        "null: decided by semantics or model",
    )
    keys: Literal["all", "kept", "none"] | None = Field(
        None,
        description="Frames that a kept frame attends to: all, the kept ones, or none; "
        "null: decided by semantics or model",
    )

    steps: Positive = Field(description="Number of optimiser steps")
    batch_size: int | None = Field(
        ge=1,
        description="Samples per device and forward pass; with batch_tokens or batch_duration the most of them, "
        "null: any number",
    )
    batch_tokens: int | None = Field(
        None,
        ge=1,
        description="Most tokens per device and forward pass, in place of batch_size: an estimate, 4 characters of "
        "text or 0.2 s of speech each",
    )
    batch_duration: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Most seconds of speech per device and forward pass, in place of batch_size",
    )
    accumulation: Positive = Field(description="Forward passes per optimiser step (gradient accumulation)")
    learning_rate: float = Field(gt=0, allow_inf_nan=False, description="Peak learning rate")
    warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rate rises from 0")
    scheduler: Literal["cosine", "linear", "constant_with_warmup"] = Field(
        "cosine", description="Learning-rate schedule after the warm-up"
    )
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="AdamW weight decay")
    max_grad_norm: float = Field(
        1.0, gt=0, description="Maximum norm of the gradient; a larger gradient is scaled down to it"
    )
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="Optimiser; adamw_8bit: states of a quarter of the size"
    )
    ctc_weight: float = Field(0.3, ge=0, allow_inf_nan=False, description="Weight of the CTC loss in stage 2")
    train_shrinking: bool = Field(False, description="Whether stage 3 trains the shrinking adapter beside LoRA")
    temperature: bool = Field(
        True, description="Whether stage 2 draws tasks at T = 1 + 5·epoch; if not, an epoch has every sample once"
    )
    text_only: float = Field(
        0.05,
        ge=0,
        lt=1,
        allow_inf_nan=False,
        description="Share of text-only answers of the LLM itself that stages 2 and 3 mix in, if the data has none",
    )
    lora_rank: Positive = Field(64, description="Rank of the LoRA matrices on the LLM's attention")
    lora_alpha: Positive = Field(
        16, description="LoRA alpha: the matrices' product is scaled by lora_alpha / lora_rank"
    )
    quantization: Literal["auto", "nf4", "none"] = Field(
        "auto", description="Quantisation of the LLM; auto: nf4 on CUDA, none on the CPU"
    )
    sharding: Literal["none", "fsdp2"] = Field(
        "none",
        description="fsdp2: the processes of a launcher share the LLM's frozen layers, in 16 or 32 bits; none: each "
        "holds the whole LLM",
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="Dtype of the frozen backbones; auto: the faster one"
    )
    spec_augment: bool = Field(True, description="Whether parts of the recordings are masked in time and frequency")
    adapter_dropout: float | None = Field(
        None, ge=0, lt=1, description="Dropout in the alignment adapter; null: 0.1, or that of the model given"
    )
    implementation: Literal["fused", "eager"] = Field("fused", description="Fused operations, or eager: plain PyTorch")
    exact: bool = Field(False, description="Whether the fused CTC computes all columns of its gradient")
    packed: bool = Field(True, description="Whether the fused operations and the LLM train without padding")
    gradient_checkpointing: bool | None = Field(
        None,
        description="Whether the LLM computes each layer again in backward, which takes a tenth of the memory; "
        "null: on CUDA only",
    )

    seed: int = Field(0, ge=0, lt=2**32, description="Seed for fresh weights, dropout and the order of the samples")
    log_steps: Positive = Field(10, description="Steps between log entries")
    save_steps: Positive = Field(500, description="Steps between checkpoints")
    save_total_limit: Positive = Field(2, description="Number of checkpoints that are kept")
    workers: int = Field(0, ge=0, description="Number of processes that load data; each has two batches ready")
    features: Path | None = Field(
        None, description="Folder of encoder frames that `soundwave features` has written; null: they are computed"
    )
    resume: bool | None = Field(
        None,
        description="null: continue from the newest checkpoint in out if its run had the same settings and data; "
        "true: even if they differ; false: out must hold no checkpoint",
    )
    allow_outside: bool = Field(False, description="Whether manifests may name audio outside their folder")
    strict: bool = Field(
        False, description="Whether a sample that cannot be used stops the run; if not, it is left out"
    )
    max_skipped: Positive = Field(
        10, description="Consecutive steps without a finite loss and gradient after which the run stops"
    )
    quiet: bool = Field(False, description="Whether the progress is hidden")

    @property
    def budgets(self) -> dict[str, float]:
        """What limits a batch in place of a number of samples: setting -> value. Empty without any."""
        found = {"batch_tokens": self.batch_tokens, "batch_duration": self.batch_duration}
        return {name: value for name, value in found.items() if value is not None}


PAPER: dict[int, dict[str, Any]] = {
    1: {"steps": 6000, "batch_size": 32, "accumulation": 8, "learning_rate": 1e-4, "warmup_steps": 200},
    2: {"steps": 6000, "batch_size": 16, "accumulation": 8, "learning_rate": 3e-5, "warmup_steps": 200},
    3: {"steps": 4000, "batch_size": 8, "accumulation": 4, "learning_rate": 3e-5, "warmup_steps": 200},
}
PATHS = ("train", "out", "model", "features")
# The names of our settings in other trainers.
OTHER_NAMES = {"lr": "learning_rate", "batch": "batch_size", "gradient_accumulation_steps": "accumulation"}
OTHER_NAMES |= {"max_tokens": "batch_tokens", "max_duration": "batch_duration", "batch_seconds": "batch_duration"}
OTHER_NAMES |= {"num_workers": "workers", "dataloader_num_workers": "workers"}


class ConfigError(ValueError):
    """Settings that cannot be used. The message is one line with key, value found and value wanted of each."""


def allowed_values(name: str) -> str:
    """The values that a setting may have, in words: "paper, released", "1 or more", "a number above 0, or null"."""
    field = StageConfig.model_fields[name]
    kinds = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else (field.annotation,)
    kind = next(kind for kind in kinds if kind is not NoneType)
    limits = {type(one).__name__: one for one in field.metadata}
    if get_origin(kind) is Literal:
        found = ", ".join(map(str, get_args(kind)))
    elif kind is bool:
        found = "true, false"
    elif kind in (int, float):
        low = f"{limits['Ge'].ge} or more" if "Ge" in limits else f"above {limits['Gt'].gt}" if "Gt" in limits else ""
        high = f"below {limits['Lt'].lt}" if "Lt" in limits else ""
        found = f"{'an integer' if kind is int else 'a number'}, {' and '.join(filter(None, (low, high)))}"
    elif kind is str:
        found = "text"
    else:
        found = "paths" if get_origin(kind) is list else "a path"
    return f"{found}, or null" if NoneType in kinds else found


def load_config(
    stage: int, file: Path | None = None, overrides: list[str] | None = None, *, to_show: bool = False
) -> StageConfig:
    """Settings of a stage: the paper's, overridden by a YAML file's, overridden by `key=value` words.

    Paths in the file are relative to its folder, paths in words to the working directory.

    Args:
        to_show: settings without a default may be missing.

    Raises:
        ConfigError: a file or word that cannot be read, or a setting that is unknown, missing or out of range.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            loaded = read_yaml(Path(file).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read ({error.strerror}); give a YAML file of settings") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            detail = str(error).replace("\n", " ")
            raise ConfigError(f"{file}: is not YAML ({detail}); write one `key: value` a line") from error
        if not isinstance(loaded, dict):
            raise ConfigError(f"{file}: holds a {type(loaded).__name__}; write one `key: value` a line")
        values = {str(key): _resolve_path(Path(file).parent, str(key), value) for key, value in loaded.items()}
    for word in overrides or []:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r}: settings are written key=value, without spaces, e.g. learning_rate=1e-4")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key} = {value!r} cannot be read; quote it") from error
        if key in PATHS and not isinstance(values[key], str | list | None):
            values[key] = value  # a folder may be called 5, or 2026-01-31, which is a date in YAML
    if to_show:
        values = {"train": ["…"], "out": "…"} | values
    return make_config(stage, **values)


def make_config(stage: int, /, **values: Any) -> StageConfig:
    """The checked settings of a stage: the paper's, overridden by `values`.

    Raises:
        ConfigError: a setting that is unknown, missing or out of range.
    """
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
    for key in PATHS:  # a shell does not expand the ~ in `train=~/data`
        if isinstance(values.get(key), list):
            values[key] = [Path(item).expanduser() if isinstance(item, str) else item for item in values[key]]
        elif isinstance(values.get(key), str):
            values[key] = Path(values[key]).expanduser()
    for key in ("audio_tower", "language_model"):
        # A saved model names its backbones and is used from other working directories.
        if key in values and Path(str(values[key])).is_dir():
            values[key] = str(Path(values[key]).resolve())
    for key, value in values.items():
        # YAML 1.1 reads 1e-4 as a string, but people mean a number.
        if isinstance(value, str) and StageConfig.model_fields[key].annotation is float:
            try:
                values[key] = float(value)
            except ValueError:
                raise ConfigError(f"{key} = {value!r}, but a number is wanted") from None
        if isinstance(value, str) and StageConfig.model_fields[key].annotation is int:
            with suppress(ValueError):  # otherwise pydantic says what is wrong with it
                values[key] = float(value)
    budget = any(values.get(name) is not None for name in ("batch_tokens", "batch_duration"))
    try:
        config = StageConfig(**(PAPER[stage] | ({"batch_size": None} if budget else {}) | values))
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            key = ".".join(str(part) for part in fault["loc"])
            if fault["type"] == "missing":
                faults.append(f"setting {key!r} is missing; give {key}=…")
            elif fault["type"] == "path_type":
                faults.append(f"{key} = {fault['input']!r}, but a path is wanted; quote it if it is one")
            else:
                unread = fault["type"].endswith(("_type", "_parsing", "_from_float"))
                allowed = f"; allowed: {allowed_values(str(fault['loc'][0]))}" if unread else ""
                faults.append(f"{key} = {fault['input']!r}: {fault['msg'].lower()}{allowed}")
        raise ConfigError("; ".join(faults)) from None
    _check_batches(config)
    return config


def _check_batches(config: StageConfig) -> None:
    """ConfigError if nothing says how large a batch may become."""
    if config.batch_size is not None or config.batch_tokens is not None:
        return
    if config.batch_duration is None:
        raise ConfigError("batch_size = None, but only batch_tokens or batch_duration can take its place; give one")
    if config.stage > 1:
        raise ConfigError(
            f"batch_duration = {config.batch_duration:g} counts no text, of which stage {config.stage} may hold any "
            "amount; give batch_tokens as well, or batch_size, the most samples of a batch"
        )


def _resolve_path(folder: Path, key: str, value: Any) -> Any:
    """A setting of a file in `folder`: a relative path becomes one below that folder."""
    if key in PATHS and isinstance(value, str):
        return folder / Path(value).expanduser()
    if key == "train" and isinstance(value, list):
        return [folder / Path(item).expanduser() if isinstance(item, str) else item for item in value]
    if key in ("audio_tower", "language_model") and (folder / str(value)).is_dir():
        return folder / value
    return value

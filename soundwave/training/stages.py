"""The three stages of Soundwave's training (arXiv 2502.12900, §3): what each one trains, on which loss, at which rate.

I    alignment adapter and blank row    CTC; of the language model only its output embedding is loaded
II   both adapters and LoRA             next token + 0.3 CTC; tasks drawn at a temperature that rises with the epochs
III  LoRA, or LoRA + shrinking adapter  next token
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import TrainingArguments, set_seed

from soundwave import embedded
from soundwave.configuration import SoundwaveConfig
from soundwave.data.collate import Collator, features, tokens_of, with_duration
from soundwave.data.manifest import Sample, read_manifest
from soundwave.data.sampling import BucketBatchSampler, paper_temperature
from soundwave.hardware import pick_device, pick_dtype
from soundwave.modeling import SoundwaveForConditionalGeneration, freeze_all_but
from soundwave.processing import SoundwaveProcessor
from soundwave.training.trainer import Clock, Progress, SoundwaveTrainer, newest_checkpoint

Positive = Annotated[int, Field(ge=1)]


class StageConfig(BaseModel):
    """Settings of one stage; the defaults that differ between stages are the paper's, in `PAPER`."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    stage: Literal[1, 2, 3]
    train: list[Path] = Field(min_length=1, description="manifests to train on")
    out: Path = Field(description="folder for checkpoints, logs and the model")
    model: Path | None = Field(None, description="model of the stage before; None starts from the backbones")
    audio_tower: str = Field(embedded.WHISPER, description="Whisper: Hub id, folder or embedded name")
    language_model: str = Field(embedded.LANGUAGE_MODEL, description="causal LM: Hub id, folder or embedded name")
    semantics: Literal["paper", "released"] = "paper"

    steps: Positive = Field(description="optimiser steps")
    batch_size: Positive = Field(description="samples a device and forward pass")
    accumulation: Positive = Field(description="forward passes an optimiser step")
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(0, ge=0)
    scheduler: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    ctc_weight: float = Field(0.3, ge=0, description="of the CTC loss in stage II")
    train_shrinking: bool = Field(False, description="stage III trains the shrinking adapter beside LoRA")
    temperature: bool = Field(
        True, description="stage II draws tasks at T = 1 + 5·epoch; else every sample once an epoch"
    )
    lora_rank: Positive = 64
    lora_alpha: Positive = 16
    quantization: Literal["auto", "nf4", "none"] = Field("auto", description="auto: nf4 on CUDA, none on the CPU")
    dtype: Literal["auto", "bfloat16", "float32"] = Field("auto", description="of the frozen backbones")
    spec_augment: bool = True
    adapter_dropout: float | None = Field(None, ge=0, lt=1, description="None: 0.1, or that of the model given")
    implementation: Literal["fused", "eager"] = Field("fused", description="eager: plain PyTorch")
    exact: bool = Field(False, description="the fused CTC skips no column of its gradient")

    seed: int = 0
    log_steps: Positive = 10
    save_steps: Positive = 500
    save_total_limit: Positive = 2
    workers: int = Field(0, ge=0, description="processes that load data")
    resume: bool = Field(False, description="go on from the newest checkpoint in out")
    allow_outside: bool = Field(False, description="manifests may name audio outside their folder")


PAPER: dict[int, dict[str, Any]] = {
    1: {"steps": 6000, "batch_size": 32, "accumulation": 8, "learning_rate": 1e-4, "warmup_steps": 200},
    2: {"steps": 6000, "batch_size": 16, "accumulation": 8, "learning_rate": 3e-5, "warmup_steps": 200},
    3: {"steps": 4000, "batch_size": 8, "accumulation": 4, "learning_rate": 3e-5, "warmup_steps": 200},
}
LONGEST = 30.0  # seconds that Whisper's encoder takes
TRAINED = {
    1: ("alignment.", "blank_"),
    2: ("alignment.", "blank_", "shrinking.", "lora"),
    3: ("lora",),
}


class ConfigError(ValueError):
    """Settings that cannot be used. One line a fault: key, value found, value wanted."""


def load_config(stage: int, file: Path | None = None, overrides: list[str] | None = None) -> StageConfig:
    """Settings of a stage: the paper's, then a YAML file's, then `key=value` words.

    Paths in the file are relative to its folder, those in words to the working directory.
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
            raise ConfigError(f"{word!r}: settings are written key=value, e.g. learning_rate=1e-4")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key} = {value!r} cannot be read; quote it") from error
    return make_config(stage, **values)


def make_config(stage: int, /, **values: Any) -> StageConfig:
    """A checked `StageConfig`: the paper's settings of the stage, changed by `values`."""
    if values.get("stage", stage) != stage:
        raise ConfigError(f"stage = {values['stage']}, but stage {stage} was asked for")
    values["stage"] = stage
    for key in values:
        if key not in StageConfig.model_fields:
            near = difflib.get_close_matches(str(key), StageConfig.model_fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(StageConfig.model_fields)}"
            raise ConfigError(f"unknown setting {key!r}; {hint}")
    if isinstance(values.get("train"), str | Path):
        values["train"] = [values["train"]]
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
    if key in ("train", "out", "model") and isinstance(value, str):
        return folder / value
    if key == "train" and isinstance(value, list):
        return [folder / item if isinstance(item, str) else item for item in value]
    if key in ("audio_tower", "language_model") and (folder / str(value)).is_dir():
        return folder / value
    return value


def train_stage(config: StageConfig) -> tuple[Path, list[dict[str, float]], float]:
    """Run one stage.

    Returns:
        The model's folder (`out/model`), the log (one dict a logging step, see `SoundwaveTrainer`), and the seconds
        that training took.

    Raises:
        ManifestError, AudioError: data that cannot be used. FileNotFoundError, ValueError: a model that does not fit.
        ConfigError: settings that contradict the data, the model or what `out` holds.
    """
    checkpoint = newest_checkpoint(config.out)
    if checkpoint and not config.resume:
        raise ConfigError(
            f"out = {str(config.out)!r} holds {checkpoint.name} of an earlier run; go on from it with resume=true, "
            "or name another folder"
        )
    set_seed(config.seed)
    device, _ = pick_device()
    samples = [sample for path in config.train for sample in read_manifest(path, allow_outside=config.allow_outside)]
    samples = _usable(samples, config)
    model = build_model(config, device).to(device)
    processor = SoundwaveProcessor.from_backbones(model.config.audio_tower, model.config.language_model)
    trained = TRAINED[config.stage] + (("shrinking.",) if config.stage == 3 and config.train_shrinking else ())
    freeze_all_but(model, trained)
    heard = [sample for sample in samples if sample.audio is not None]
    if config.model is None and heard:
        first = [features(processor, sample) for sample in heard[: config.batch_size]]
        batch = {name: value.to(device) for name, value in processor.pad_features(first).items()}
        model.initialise_blank(**batch)

    clock = Clock()
    trainer = SoundwaveTrainer(
        model=model,
        args=_arguments(config, device),
        train_dataset=samples,
        data_collator=Collator(processor, config.stage),
        batch_sampler=build_sampler(config, samples),
        callbacks=[clock],
    )
    from transformers import PrinterCallback, ProgressCallback

    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(f"stage {'I' * config.stage}"))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    folder = config.out / "model"
    model.save_pretrained(folder)
    return folder, [entry for entry in trainer.state.log_history if "loss" in entry], clock.seconds


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
    saved = SoundwaveConfig.from_pretrained(config.model)
    if config.stage < saved.stage or config.stage > saved.stage + 1:
        raise ConfigError(
            f"model = {str(config.model)!r} has seen stage {saved.stage}, but stage {config.stage} goes on from one "
            f"of stage {max(config.stage - 1, 1)}" + (f" or {config.stage}" if config.stage > 1 else "")
        )
    changes = {}
    for name in ("audio_tower", "language_model", "semantics", "lora_rank", "lora_alpha"):
        wanted, found = getattr(config, name), getattr(saved, name)
        if name not in config.model_fields_set or wanted == found:
            continue
        if saved.stage >= 2 or not name.startswith("lora_"):
            raise ConfigError(f"{name} = {wanted!r}, but the model in {config.model} has {found!r}: leave it out")
        changes[name] = wanted
    return changes


def _usable(samples: list[Sample], config: StageConfig) -> list[Sample]:
    """Stage I learns from transcripts alone; every stage wants at least one sample."""
    if config.stage == 1:
        samples = [sample for sample in samples if sample.audio is not None and (sample.text or "").strip()]
    if not samples:
        raise ConfigError(
            f"{', '.join(map(str, config.train))}: no sample to train on; stage {config.stage} needs "
            + ("recordings with a text" if config.stage == 1 else "samples")
        )
    samples = [with_duration(sample) for sample in samples]
    for sample in samples:
        if sample.audio is not None and sample.duration > LONGEST:
            raise ConfigError(
                f"{sample.id}: duration = {sample.duration:g}, but at most {LONGEST:g} s can be trained on; "
                "cut it, or leave it out"
            )
    return samples


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
        report_to=["tensorboard"],
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=False,
    )

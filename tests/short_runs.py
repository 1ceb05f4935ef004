"""Short real trainings on the shortest recordings of the embedded corpus, with two layers of the language model."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file

from soundwave import backbones
from soundwave.data.manifest import write_manifest
from soundwave.model.configuration import SoundwaveConfig
from soundwave.model.modeling import WEIGHTS_FILE, SoundwaveForConditionalGeneration
from soundwave.training.settings import make_config
from soundwave.training.stages import train_stage

SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "steps": 2,
    "batch_size": 2,
    "accumulation": 1,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "scheduler": "constant_with_warmup",
    "log_steps": 1,
    "lora_rank": 4,
}


def copy_recordings(corpus: Path, folder: Path, count: int) -> list[dict[str, Any]]:
    """Copy the corpus's shortest recordings into a folder -> their manifest rows."""
    rows = [json.loads(line) for line in (corpus / "stage1.jsonl").read_text().splitlines()]
    rows = sorted(rows, key=lambda row: row["duration"])[:count]
    for row in rows:
        shutil.copy(corpus / row["audio_filepath"], folder)
        row["audio_filepath"] = Path(row["audio_filepath"]).name
    return rows


def manifest_of(folder: Path, rows: list[dict[str, Any]], name: str = "m.jsonl") -> Path:
    """Write rows as a manifest -> its path."""
    write_manifest(folder / name, rows)
    return folder / name


def save_still_model(language_model: Path, folder: Path) -> Path:
    """Save a model of stage I without dropout in `folder` -> `folder`."""
    config = SoundwaveConfig.from_backbones(
        backbones.WHISPER, str(language_model), lora_rank=4, adapter_dropout=0.0, stage=1
    )
    torch.manual_seed(0)
    model = SoundwaveForConditionalGeneration.from_backbones(config, language_model=False)
    with torch.no_grad():
        model.blank_bias.fill_(14.0)
    model.save_pretrained(folder)
    return folder


def train(stage: int, out: Path, manifest: Path, **settings: Any) -> SimpleNamespace:
    """Train -> the model's folder, the log, the weights and the entries of log.jsonl."""
    folder, log, _ = train_stage(make_config(stage, **SETTINGS | {"train": manifest, "out": out} | settings))
    return SimpleNamespace(folder=folder, log=log, state=load_file(folder / WEIGHTS_FILE), entries=lines(out / "log"))


def lines(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file; the name may lack the suffix .jsonl."""
    return [json.loads(line) for line in file.with_suffix(".jsonl").read_text().splitlines()]


def same_bits(a: dict, b: dict) -> bool:
    """Whether two states hold the same parameters."""
    return a.keys() == b.keys() and all(bool((a[name] == b[name]).all()) for name in a)

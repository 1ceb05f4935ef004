"""Models, checkpoints and run folders that version 0.1.0 saved go on working, and its import paths too."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import soundwave
from tests import processes

SAVED = Path(__file__).with_name("data") / "saved_by_0.1.0"
TRAIN = [
    "train", "2", "train=data/train.jsonl", "out=runs/2", "model=runs/1/model", "audio_tower=backbones/whisper",
    "language_model=backbones/llm", "steps=6", "dtype=float32", "batch_size=2", "accumulation=1", "learning_rate=1e-3",
    "warmup_steps=0", "log_steps=1", "save_steps=2", "lora_rank=2", "workers=0", "spec_augment=false", "--quiet",
]  # fmt: skip


@pytest.fixture
def saved(tmp_path) -> Path:
    """A copy of what was saved, its paths those of the copy."""
    folder = Path(shutil.copytree(SAVED, tmp_path / "saved"))
    for path in folder.rglob("*.json*"):
        path.write_text(path.read_text().replace("/SAVED", str(folder)))
    return folder


def command(folder: Path, *arguments: str) -> str:
    done = processes.run([processes.SCRIPT, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("stage", [1, 2])
def test_a_model_is_loaded_with_every_parameter(saved, stage):
    folder = saved / "runs" / str(stage) / "model"
    model, _ = soundwave.load(folder)
    state = load_file(folder / "model.safetensors")
    assert model.config.stage == stage
    assert model.trained_state_dict().keys() == state.keys()
    assert all(torch.equal(parameter.cpu(), state[name]) for name, parameter in model.trained_state_dict().items())


def test_a_model_transcribes_and_is_scored(saved):
    said = command(saved, "transcribe", "data/1.flac", "--model", "runs/2/model", "--json")
    assert json.loads(said)["seconds"] == 0.781
    scores = json.loads(command(saved, "evaluate", "data/train.jsonl", "--model", "runs/1/model", "--json"))
    assert scores["samples"] == {"transcribe": 4} and scores["blank_share"] == 1.0


def test_training_goes_on_from_a_checkpoint_to_the_same_weights(saved):
    before = load_file(saved / "runs/2/model/model.safetensors")
    losses = [json.loads(line)["loss"] for line in (saved / "runs/2/log.jsonl").read_text().splitlines()]
    shutil.rmtree(saved / "runs/2/model")
    refused = processes.run([processes.SCRIPT, *TRAIN], cwd=saved, capture_output=True, text=True)
    # The recordings lie elsewhere now, and nothing else differs.
    assert "holds checkpoints of a run with data = 'cb3109118092a9ad' (now '" in refused.stderr
    assert "'); continue anyway" in refused.stderr and refused.stderr.count(" (now ") == 1
    command(saved, *TRAIN, "--resume")
    rows = [json.loads(line) for line in (saved / "runs/2/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    after = load_file(saved / "runs/2/model/model.safetensors")
    assert after.keys() == before.keys()
    for name in before:  # another machine rounds otherwise; weights that training left alone would be 1e-3 apart
        assert torch.allclose(after[name], before[name], atol=1e-5), name


def test_stage_3_goes_on_from_a_model_of_stage_2(saved):
    settings = [word for word in TRAIN[2:] if not word.startswith(("out", "model", "audio_t", "language", "lora"))]
    command(saved, "train", "3", *settings, "out=runs/3", "model=runs/2/model")
    assert (saved / "runs/3/model/model.safetensors").is_file()


def test_a_report_is_made_of_a_run_folder(saved):
    command(saved, "report", "runs/2", "--out", "page.html")
    assert "checkpoint" not in (saved / "page.html").name and (saved / "page.html").stat().st_size > 10_000


OLD_PATHS = {
    "soundwave.ablation": ["VARIANTS", "run_ablations"],
    "soundwave.comparison": ["differences", "scores", "tally"],
    "soundwave.configuration": ["SoundwaveConfig"],
    "soundwave.conversion": ["convert_smollm2", "convert_whisper"],
    "soundwave.data.audio": ["AudioError", "load_audio", "seconds_of", "windows"],
    "soundwave.data.corpus": ["build_corpus"],
    "soundwave.data.grammar": ["split_sentences"],
    "soundwave.data.tasks": ["PROMPTS", "phrase"],
    "soundwave.demo": ["run_demo"],
    "soundwave.demo.espeak": ["Espeak"],
    "soundwave.embedded": ["LANGUAGE_MODEL", "WHISPER", "EmbeddedError", "Espeak", "folder_of", "resolve"],
    "soundwave.evaluation": ["Report", "answer", "evaluate", "evaluate_ctc", "load_model", "normalise", "read_ctc"],
    "soundwave.modeling": ["SoundwaveForConditionalGeneration", "batch_to", "freeze_all_but", "spec_augment"],
    "soundwave.processing": ["SoundwaveProcessor"],
    "soundwave.training.stages": ["train_stage"],
    "soundwave.training.trainer": ["SampleError"],
}


@pytest.mark.parametrize("module", OLD_PATHS)
def test_an_old_import_path_gives_what_stands_elsewhere_now(module):
    for name in OLD_PATHS[module]:
        value = getattr(importlib.import_module(module), name)
        where = getattr(value, "__module__", None)
        if where is not None:
            assert getattr(importlib.import_module(where), value.__name__) is value

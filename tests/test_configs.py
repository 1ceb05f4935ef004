"""The settings in configs/: the paper's on one 24 GB card, and the demonstration's in configs/tiny/."""

from pathlib import Path

import pytest

from soundwave import backbones
from soundwave.demo.run import FULL, STAGE, stage_config
from soundwave.memory import predict
from soundwave.training.settings import PAPER, StageConfig, load_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# What the paper says, stage by stage; 256, 128 and 32 samples a step.
CLAIMED = {
    1: {"steps": 6000, "batch_size": 32, "accumulation": 8, "learning_rate": 1e-4},
    2: {"steps": 6000, "batch_size": 16, "accumulation": 8, "learning_rate": 3e-5},
    3: {"steps": 4000, "batch_size": 8, "accumulation": 4, "learning_rate": 3e-5},
}
OF_THE_FOLDER = ("train", "out", "model")


def paper(stage: int) -> StageConfig:
    return load_config(stage, CONFIGS / f"stage{stage}.yaml")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_papers_settings_are_the_papers(stage):
    found = paper(stage)
    assert {name: getattr(found, name) for name in CLAIMED[stage]} == CLAIMED[stage]
    # Whatever the file writes down beside them is what would be used without it.
    default = StageConfig(stage=stage, train=["x"], out="x", **PAPER[stage]).model_dump()
    ours = {"audio_tower", "language_model", "quantization", "dtype", "gradient_checkpointing", "workers"}
    differ = {name for name, value in found.model_dump().items() if value != default[name]}
    assert differ - ours - {*OF_THE_FOLDER, "adapter_dropout"} == set()
    assert found.adapter_dropout in (None, 0.1)
    if stage == 1:
        names = found.audio_tower, found.language_model
        assert names == ("openai/whisper-large-v3", "meta-llama/Llama-3.1-8B-Instruct")
    else:
        assert found.quantization == "nf4" and found.gradient_checkpointing


def test_the_papers_other_figures_are_in_the_files():
    two, three = paper(2), paper(3)
    assert (two.lora_rank, two.lora_alpha, two.ctc_weight, two.temperature) == (64, 16, 0.3, True)
    assert three.train_shrinking is False


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_papers_batches_fit_into_24_gb(stage):
    found = paper(stage)
    prediction = predict(stage, found.batch_size, 30.0, gpu_gib=24.0, implementation=found.implementation)
    assert prediction.fits
    if stage == 2:  # the first steps may keep every frame
        assert predict(stage, found.batch_size, 30.0, kept_per_second=25.0).fits


@pytest.mark.parametrize("name", FULL.passes)
def test_the_small_settings_are_the_demonstrations(name, tmp_path):
    found = load_config(STAGE[name], CONFIGS / "tiny" / f"{name}.yaml")
    wanted = stage_config(FULL, name, tmp_path, tmp_path, seed=0)
    assert found.model_dump(exclude=set(OF_THE_FOLDER)) == wanted.model_dump(exclude=set(OF_THE_FOLDER))
    assert found.train[0].name == wanted.train[0].name
    assert found.audio_tower == backbones.WHISPER and found.language_model == backbones.LANGUAGE_MODEL


@pytest.mark.parametrize("folder", [CONFIGS, CONFIGS / "tiny"], ids=["full", "tiny"])
def test_each_stage_starts_from_the_model_of_the_file_before(folder):
    stages = {"labels": 1} | {f"stage{stage}": stage for stage in (1, 2, 3)}
    names = [name for name in ("stage1", "labels", "stage2", "stage3") if (folder / f"{name}.yaml").is_file()]
    found = [load_config(stages[name], folder / f"{name}.yaml") for name in names]
    assert found[0].model is None
    for before, after in zip(found, found[1:], strict=False):
        assert after.model.resolve() == (before.out / "model").resolve()


def test_each_file_is_a_stage_and_its_lines_say_where_they_are_from():
    files = {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*") if path.is_file()}
    files = {file for file in files if not file.startswith("data/")}  # recipes of data, which test_data_build.py loads
    names = ("stage1", "stage2", "stage3")
    assert files == {*(f"{name}.yaml" for name in names), *(f"tiny/{name}.yaml" for name in (*names, "labels"))}
    for stage in (1, 2, 3):
        lines = (CONFIGS / f"stage{stage}.yaml").read_text().splitlines()
        values = [line for line in lines if line and not line.startswith(("#", *(f"{key}:" for key in OF_THE_FOLDER)))]
        assert values and not [line for line in values if "# paper" not in line and "# ours" not in line]

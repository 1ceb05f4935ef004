"""Training on the fused modules takes the course that it takes on the eager ones: in fp32, exact, without dropout."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from soundwave import eager, fused
from soundwave.data.manifest import write_manifest
from soundwave.model.configuration import SoundwaveConfig
from soundwave.model.modeling import WEIGHTS_FILE, SoundwaveForConditionalGeneration
from soundwave.training.settings import make_config
from soundwave.training.stages import train_stage

STEPS = 50
SAME = {
    "dtype": "float32",
    "steps": STEPS,
    "batch_size": 4,
    "accumulation": 1,
    "log_steps": 1,
    "warmup_steps": 5,
    "spec_augment": False,
    "adapter_dropout": 0.0,
    "exact": True,
}
STAGES = {1: {"learning_rate": 5e-4}, 2: {"learning_rate": 3e-4}}


def few_written_questions(corpus: Path, stage: int, folder: Path) -> Path:
    """A stage's manifest with no more samples of text alone than recordings: of so small a corpus they are most."""
    rows = [json.loads(line) for line in (corpus / f"stage{stage}.jsonl").read_text().splitlines()]
    spoken = [row | {"audio_filepath": str(corpus / row["audio_filepath"])} for row in rows if "audio_filepath" in row]
    written = [row for row in rows if "audio_filepath" not in row][: len(spoken)]
    write_manifest(folder / f"stage{stage}.jsonl", [*spoken, *written])
    return folder / f"stage{stage}.jsonl"


@pytest.fixture(scope="module")
def runs(tiny_corpus, small_llm, tmp_path_factory) -> dict[tuple[int, str], tuple[Path, list[dict]]]:
    """Stages I and II on both implementations; stage II goes on from the eager stage I."""
    out = tmp_path_factory.mktemp("runs")
    done = {}
    for stage, settings in STAGES.items():
        start = {"model": done[1, "eager"][0]} if stage > 1 else {"language_model": str(small_llm), "lora_rank": 8}
        for implementation in ("eager", "fused"):
            config = make_config(
                stage,
                train=few_written_questions(tiny_corpus, stage, out),
                allow_outside=True,
                out=out / f"{stage}-{implementation}",
                implementation=implementation,
                **start,
                **SAME,
                **settings,
            )
            folder, log, _ = train_stage(config)
            done[stage, implementation] = folder, log
    return done


@pytest.mark.parametrize(("stage", "loss"), [(1, "ctc_loss"), (2, "ctc_loss"), (2, "lm_loss")])
def test_losses_agree_at_every_step(runs, stage, loss):
    eager, fused = (
        {entry["step"]: entry[loss] for entry in runs[stage, name][1] if loss in entry} for name in ("eager", "fused")
    )
    assert len(eager) >= STEPS // 2  # a batch of text alone has no CTC
    assert fused == pytest.approx(eager, rel=1e-3)


def test_the_losses_that_agree_have_fallen(runs):
    losses = [entry["ctc_loss"] for entry in runs[1, "fused"][1]]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize("stage", STAGES)
def test_both_save_the_same_parameters(runs, stage):
    eager, fused = (load_file(runs[stage, name][0] / WEIGHTS_FILE) for name in ("eager", "fused"))
    assert {name: x.shape for name, x in eager.items()} == {name: x.shape for name, x in fused.items()}


@pytest.mark.parametrize(("name", "adapters"), [("fused", fused), ("eager", eager)])
def test_the_implementation_named_is_the_one_that_is_built(name, adapters):
    model = SoundwaveForConditionalGeneration(SoundwaveConfig(implementation=name))
    assert type(model.alignment) is adapters.AlignmentAdapter
    assert type(model.shrinking) is adapters.ShrinkingAdapter

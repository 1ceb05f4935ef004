"""A step of several batches (gradient accumulation) is the step of one batch that has all their samples.

stage   samples                                                              batches
I       recordings of uneven length                                          4 × 2, 8 × 1, uneven, one left out
II      transcripts, questions without a transcript, text only               the same
III     the same, without CTC                                                the same
"""

import json

import pytest
import torch

from soundwave import backbones
from soundwave.data.collate import Collator
from soundwave.model.configuration import SoundwaveConfig
from soundwave.model.modeling import SoundwaveForConditionalGeneration
from soundwave.training.trainer import SoundwaveTrainer, tensors_of
from tests.short_runs import copy_recordings, lines, manifest_of, save_still_model, train

SAME = {"steps": 1, "max_grad_norm": 1e9, "spec_augment": False, "temperature": False, "implementation": "eager"}


@pytest.fixture(scope="module")
def recordings(tiny_corpus, tmp_path_factory):
    """Folder and rows of eight recordings, of which some have long texts, some none, and two more rows without any."""
    folder = tmp_path_factory.mktemp("accumulation")
    rows = copy_recordings(tiny_corpus, folder, 6)
    long = [json.loads(line) for line in (tiny_corpus / "stage1.jsonl").read_text().splitlines()]
    long = sorted(long, key=lambda row: -row["duration"])[:2]
    rows += [row | {"audio_filepath": str((tiny_corpus / row["audio_filepath"]).resolve())} for row in long]
    asked = {
        "task": "question",
        "prompt": "What is heard?",
        "answer": "Somebody who counts, and a dog far away.",
    }
    for row in rows[1:3]:
        row |= asked
        del row["text"]
    written = {"task": "chat", "prompt": "Who are you?", "answer": "Nobody in particular."}
    return folder, rows, [dict(written, answer="I."), written]


@pytest.fixture(scope="module")
def folders(small_vocabulary, tmp_path_factory):
    still = save_still_model(small_vocabulary, tmp_path_factory.mktemp("still") / "model")
    config = SoundwaveConfig.from_backbones(backbones.WHISPER, str(small_vocabulary), lora_rank=4, stage=3)
    torch.manual_seed(0)
    model = SoundwaveForConditionalGeneration.from_backbones(config)
    with torch.no_grad():
        model.blank_bias.fill_(14.0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    trained = tmp_path_factory.mktemp("trained") / "model"
    model.save_pretrained(trained)
    return {1: still, 2: still, 3: trained}


@pytest.fixture
def step(recordings, folders, tmp_path, monkeypatch):
    """Train one step -> the logged figures and the gradients by name."""
    folder, rows, written = recordings
    gradients = {}

    def keep(trainer, model, clip=SoundwaveTrainer._clip_grad_norm):
        norm = clip(trainer, model)
        gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        return norm

    monkeypatch.setattr(SoundwaveTrainer, "_clip_grad_norm", keep)

    def run(stage, batch_size, accumulation, *, count=6, more=(), out="", **settings):
        gradients.clear()
        chosen = [row for row in rows if stage > 1 or "text" in row] + (written if stage > 1 else [])
        out = tmp_path / (out or f"{batch_size} x {accumulation}")
        settings = SAME | {"model": folders[stage], "adapter_dropout": 0.0, "allow_outside": True} | settings
        if stage == 3:
            settings["train_shrinking"] = True
        done = train(
            stage, out, manifest_of(folder, [*chosen[-count:], *more]), batch_size=batch_size,
            accumulation=accumulation, **settings,
        )  # fmt: skip
        return done.log[-1], dict(gradients), out

    return run


def assert_same(one, other):
    (first, first_gradients, _), (second, second_gradients, _) = one, other
    for name in ("loss", "ctc_loss", "lm_loss", "grad_norm"):
        assert (name in second) == (name in first), name
        assert second.get(name, 0.0) == pytest.approx(first.get(name, 0.0), rel=1e-5), name
    assert first_gradients.keys() == second_gradients.keys() and first_gradients
    one, other = (torch.cat([g[name].flatten() for name in sorted(g)]) for g in (first_gradients, second_gradients))
    assert torch.linalg.vector_norm(other - one) <= 1e-5 * torch.linalg.vector_norm(one)


@pytest.mark.parametrize(("stage", "batch_size", "accumulation"), [(1, 4, 2), (2, 4, 2), (3, 1, 6)])
def test_batches_of_a_step_are_one_large_batch(step, stage, batch_size, accumulation):
    assert_same(step(stage, 6, 1), step(stage, batch_size, accumulation))


def test_fused_batches_of_a_step_are_one_large_batch(step):
    settings = {"implementation": "fused", "exact": True}
    assert_same(step(2, 6, 1, **settings), step(2, 2, 3, **settings))


def test_a_batch_that_is_left_out_weighs_nothing(step, tmp_path):
    bad = {"audio_filepath": str(tmp_path / "none.wav"), "text": "nothing", "duration": 0.1}
    tmp_path.joinpath("none.wav").write_bytes(b"no audio")
    assert_same(step(1, 6, 1), step(1, 1, 7, more=[bad]))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_each_step_of_a_run_is_one_large_batch(recordings, folders, tmp_path, monkeypatch, batch_size):
    """Tasks at a temperature, text only, batches and steps without any sample, a skipped one, the end of an epoch."""
    folder, rows, written = recordings
    bad = {"audio_filepath": str(tmp_path / "none.wav"), "text": "nothing", "duration": 0.1}
    tmp_path.joinpath("none.wav").write_bytes(b"no audio")
    manifest = manifest_of(folder, [*rows[:3], *written, bad, bad | {"text": "none"}], "run.jsonl")
    sizes, part_of_step = [], SoundwaveTrainer._part_of_step

    def compare(trainer, model, clip=SoundwaveTrainer._clip_grad_norm):
        names = [name for batch in trainer._batches for name in batch["samples"]]
        sizes.append(len(trainer._batches))
        if names and trainer.state.global_step != 1:
            found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            by_id = {sample.id: sample for sample in trainer.train_dataset}
            collator = Collator(trainer.data_collator.processor, stage=2)
            model.zero_grad()
            wanted = model(**tensors_of(collator([by_id[name] for name in names])))
            wanted.loss.backward()
            assert trainer._losses["loss"].item() == pytest.approx(wanted.loss.item(), rel=1e-5)
            grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            assert grads.keys() == found.keys()
            one, other = (torch.cat([g[name].flatten() for name in sorted(g)]) for g in (grads, found))
            assert torch.linalg.vector_norm(other - one) <= 1e-5 * torch.linalg.vector_norm(one)
            for name, parameter in model.named_parameters():
                parameter.grad = found.get(name)
        return clip(trainer, model)

    def not_finite_in_step_2(trainer, outputs, inputs):
        return part_of_step(trainer, outputs, inputs) * (float("nan") if trainer.state.global_step == 1 else 1.0)

    monkeypatch.setattr(SoundwaveTrainer, "_clip_grad_norm", compare)
    monkeypatch.setattr(SoundwaveTrainer, "_part_of_step", not_finite_in_step_2)
    settings = SAME | {"steps": 5, "temperature": True, "learning_rate": 1e-4, "allow_outside": True}
    train(
        2, tmp_path / "run", manifest, model=folders[2], adapter_dropout=0.0, batch_size=batch_size, accumulation=3,
        **settings,
    )  # fmt: skip
    assert [row["step"] for row in lines(tmp_path / "run" / "skipped_steps")] == [2]
    assert len(sizes) == 5 and set(sizes) > {3}  # some steps are the last ones of an epoch


def test_a_skipped_step_is_not_in_the_logged_loss(step, monkeypatch):
    settings = {"steps": 3, "log_steps": 3, "learning_rate": 1e-12, "max_grad_norm": 1.0}
    clean = step(1, 3, 2, **settings)[0]
    batches, compute = [], SoundwaveTrainer.compute_loss

    def poisoned(trainer, model, inputs, *args, **kwargs):
        batches.append(inputs)
        if len(batches) == 2:  # the second batch of the first step, so that the first one is half of a skipped step
            inputs = inputs | {"input_features": inputs["input_features"] * float("nan")}
        return compute(trainer, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SoundwaveTrainer, "compute_loss", poisoned)
    log, _, out = step(1, 3, 2, out="poisoned", **settings)
    assert [row["step"] for row in lines(out / "skipped_steps")] == [1]
    assert log["loss"] == pytest.approx(clean["loss"], rel=1e-5)
    assert log["ctc_loss"] == pytest.approx(clean["ctc_loss"], rel=1e-5)

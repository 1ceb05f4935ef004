"""Processes that load data: the same weights with any number of them, batches by a budget that resume, a dead one."""

import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from soundwave.data.collate import CheckedCollator
from soundwave.data.manifest import read_manifest
from soundwave.training.distributed import LostProcess
from soundwave.training.settings import ConfigError, load_config, make_config
from soundwave.training.stages import build_sampler, samples_of_step
from tests.short_runs import SETTINGS, copy_recordings, manifest_of, same_bits, train

BUDGET = {"batch_duration": 4.0, "steps": 6, "save_steps": 3, "save_total_limit": 2, "seed": 3}


@pytest.fixture(scope="module")
def manifest(tiny_corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return manifest_of(folder, copy_recordings(tiny_corpus, folder, 7))


@pytest.fixture(scope="module")
def whole(manifest, small_vocabulary, tmp_path_factory) -> SimpleNamespace:
    """A run over more than one epoch by a budget of seconds, without other processes."""
    out = tmp_path_factory.mktemp("whole")
    settings = {"language_model": str(small_vocabulary), "batch_size": None} | BUDGET
    run = train(1, out, manifest, **settings)
    run.out, run.settings = out, settings
    return run


def test_a_run_by_a_budget_goes_on_with_other_processes_and_ends_with_the_same_bits(whole, manifest, tmp_path):
    for name in ("run.json", "log.jsonl", "left_out.jsonl", "skipped_steps.jsonl"):
        shutil.copy(whole.out / name, tmp_path)
    shutil.copytree(whole.out / "checkpoint-3", tmp_path / "checkpoint-3")
    resumed = train(1, tmp_path, manifest, **whole.settings, workers=2)
    assert same_bits(resumed.state, whole.state)
    names = ("step", "epoch", "loss", "batch_samples", "audio_padding")
    assert [[row[name] for name in names] for row in resumed.entries] == [
        [row[name] for name in names] for row in whole.entries
    ]


def test_the_log_tells_the_true_epoch_and_what_loading_and_padding_cost(whole, manifest):
    config = make_config(1, **SETTINGS | {"train": manifest, "out": "o"} | whole.settings)
    sampler = build_sampler(config, read_manifest(manifest))
    ends = [entry["epoch"] for entry in whole.entries]
    assert ends == pytest.approx([sampler.epoch_at(step) for step in range(1, 7)]) and ends[-1] > 1
    for entry in whole.entries:
        assert 0 < entry["loading_share"] < 1
        assert 0 <= entry["audio_padding"] < 1 and entry["encoder_padding"] == 0  # packed rows


def test_a_dead_worker_is_named_in_one_line(manifest, small_vocabulary, tmp_path, monkeypatch):
    parent, clip = os.getpid(), CheckedCollator.clip

    def die(self, sample):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return clip(self, sample)

    monkeypatch.setattr(CheckedCollator, "clip", die)
    how = "(is killed by signal: Killed|exited unexpectedly)"  # as the signal or the closed queue is seen first
    message = rf"a process that loads data \(pid \d+\) {how}.*; the same command goes on from the newest checkpoint"
    with pytest.raises(LostProcess, match=message) as lost:
        train(1, tmp_path, manifest, language_model=str(small_vocabulary), workers=1)
    assert "\n" not in str(lost.value)


@pytest.mark.parametrize(("frames", "threads"), [(97, 2), (1501, 2), (3000, 3)])
def test_the_log_mel_has_the_same_bits_with_any_number_of_threads(processor, frames, threads):
    """A loading process computes with one thread, this one with as many as there are."""
    audio = torch.randn(frames * 160, generator=torch.Generator().manual_seed(frames)).mul(0.1).numpy()
    before = torch.get_num_threads()
    found = []
    for count in (1, threads):
        torch.set_num_threads(count)
        found.append(processor.features(audio))
    torch.set_num_threads(before)
    assert torch.equal(*found)


# ---------------------------------------------------------------- settings


def test_a_budget_takes_the_place_of_the_number_of_samples():
    config = load_config(1, overrides=["batch_duration=480"], to_show=True)
    assert config.batch_size is None and config.budgets == {"batch_duration": 480}
    assert samples_of_step(config) == "at most 3840 s of speech (batch_duration 480 x accumulation 8 x 1 process)"
    both = load_config(2, overrides=["batch_tokens=4000", "batch_size=16"], to_show=True)
    of = "x accumulation 8 x 1 process"
    assert samples_of_step(both) == (
        f"at most 32000 tokens (batch_tokens 4000 {of}) and 128 samples (batch_size 16 {of})"
    )
    assert samples_of_step(load_config(2, to_show=True)) == f"128 samples (batch_size 16 {of})"


@pytest.mark.parametrize(
    ("stage", "words", "message"),
    [
        (1, ["batch_size=null"], "batch_size = None, but only batch_tokens or batch_duration can take its place"),
        (2, ["batch_duration=480"], "batch_duration = 480 counts no text, .* give batch_tokens as well, or batch_size"),
        (1, ["batch_tokens=0"], "batch_tokens = 0: input should be greater than or equal to 1"),
        (1, ["batch_duration=.inf"], "batch_duration = inf: input should be a finite number"),
        (1, ["max_duration=480"], "unknown setting 'max_duration'; did you mean 'batch_duration'?"),
        (1, ["num_workers=4"], "unknown setting 'num_workers'; did you mean 'workers'?"),
    ],
    ids=["nothing", "text", "zero", "infinite", "lhotses-name", "torchs-name"],
)
def test_wrong_budgets_are_refused(stage, words, message):
    with pytest.raises(ConfigError, match=message):
        load_config(stage, overrides=words, to_show=True)


def test_a_sample_over_the_budget_is_named(manifest, tmp_path):
    config = make_config(1, train=manifest, out=tmp_path, batch_duration=0.5)
    with pytest.raises(ConfigError, match=r"batch_duration = 0.5, but m.jsonl:\d alone has .* s of speech; give more"):
        build_sampler(config, read_manifest(manifest))

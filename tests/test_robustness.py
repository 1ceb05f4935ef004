"""Bad numbers and bad data: each gives one clear line, and training goes on without them where that is safe."""

import dataclasses
import json
import math
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from soundwave import backbones
from soundwave.data.audio import AudioError, load_audio, seconds_of
from soundwave.data.collate import CheckedCollator, LeftOut
from soundwave.data.manifest import ManifestError, Sample, read_manifest
from soundwave.data.selection import SampleError
from soundwave.model.modeling import WEIGHTS_FILE, freeze_all_but
from soundwave.model.processing import SoundwaveProcessor
from soundwave.training.callbacks import shown_figures
from soundwave.training.settings import ConfigError, make_config
from soundwave.training.stages import TRAINED, _arguments, build_model, build_sampler
from soundwave.training.trainer import SoundwaveTrainer
from tests import processes
from tests.short_runs import SETTINGS, copy_recordings, lines, manifest_of, same_bits, save_still_model, train

RATE = 16_000


@pytest.fixture(scope="module")
def data(tiny_corpus, tmp_path_factory) -> Path:
    """A folder of four recordings and good.jsonl."""
    folder = tmp_path_factory.mktemp("data")
    manifest_of(folder, copy_recordings(tiny_corpus, folder, 4), "good.jsonl")
    return folder


@pytest.fixture(scope="module")
def rows(data) -> list[dict]:
    return [json.loads(line) for line in (data / "good.jsonl").read_text().splitlines()]


@pytest.fixture
def folder(data, tmp_path) -> Path:
    """A copy of `data` that a test may fill with bad files."""
    return Path(shutil.copytree(data, tmp_path / "data"))


@pytest.fixture(scope="module")
def start(small_llm) -> dict:
    return {"language_model": str(small_llm)}


@pytest.fixture(scope="module")
def still(small_llm, tmp_path_factory) -> Path:
    """A model of stage I without dropout."""
    return save_still_model(small_llm, tmp_path_factory.mktemp("still"))


def noise(seconds: float, rate: int = RATE, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.3, 0.3, (round(seconds * rate), channels)).astype(np.float32)


# ---------------------------------------------------------------- recordings

GOOD = {
    "stereo": (noise(1.0, channels=2), RATE, "PCM_16"),
    "8-bit": (noise(1.0), RATE, "PCM_U8"),
    "24-bit": (noise(1.0), RATE, "PCM_24"),
    "float": (noise(1.0), RATE, "FLOAT"),
    "48-khz": (noise(1.0, 48_000), 48_000, "PCM_16"),
    "new\nline": (noise(1.0), RATE, "PCM_16"),
}
BAD = {
    "missing": "does not exist; correct the path, relative to the manifest's folder",
    "empty": "is an empty file; record it again, or leave this line out",
    "text-called-wav": "cannot be decoded (Format not recognised); get a whole copy, or convert it",
    "3-hours": "duration = 10800, but at most 30 s can be trained on; cut it, or give offset and duration",
    "silent": "is silent, but its text is 'yes'; record it again",
    "nan": "holds NaN or infinite samples; export it again",
    "too-loud": "has samples up to 1e+30; export it again with a full scale of 1",
    "truncated": "is cut short, 16000 of 32000 bytes are there; get a whole copy, or convert it",
    "corrupt": "; get a whole copy, or convert it",
    "bad\nname": "is cut short, 16000 of 32000 bytes are there; get a whole copy, or convert it",
    "too-fast": "frames, but its text 'no no no no no no no no no no no no no n'… needs 79; correct the text, or the",
}


def write_bad(kind: str, path: Path) -> None:
    """Writes a file with the fault of that name; no file for "missing"."""
    samples = noise(1.0)
    if kind == "missing":
        return
    if kind == "empty":
        path.touch()
    elif kind == "text-called-wav":
        path.write_text("turn on the light")
    elif kind == "3-hours":
        soundfile.write(path, np.zeros(3 * 3600 * 1000, np.int16), 1000, subtype="PCM_U8")
    elif kind == "silent":
        soundfile.write(path, np.zeros(RATE, np.int16), RATE)
    elif kind in ("nan", "too-loud"):
        samples[100] = {"nan": np.nan, "too-loud": 1e30}[kind]
        soundfile.write(path, samples, RATE, subtype="FLOAT")
    elif kind == "too-fast":
        soundfile.write(path, samples, RATE)
    else:
        soundfile.write(path, samples, RATE, format="FLAC" if kind == "corrupt" else "WAV")
        data = path.read_bytes()
        cut = data[:200] + bytes(5000) + data[5200:] if kind == "corrupt" else data[: 44 + 16_000]
        path.write_bytes(cut)


@pytest.fixture(scope="module")
def mixed(data, rows, start, tmp_path_factory):
    """The command trains one epoch on good and bad recordings: its stderr, and the run's folder."""
    folder = Path(shutil.copytree(data, tmp_path_factory.mktemp("mixed") / "data"))
    added = []
    for kind, (samples, rate, subtype) in GOOD.items():
        soundfile.write(folder / f"{kind}.wav", samples, rate, subtype=subtype)
        added.append({"audio_filepath": f"{kind}.wav", "text": "yes"})
    for kind in BAD:
        write_bad(kind, folder / f"{kind}.wav")
        added.append({"audio_filepath": f"{kind}.wav", "text": "no " * 40 if kind == "too-fast" else "yes"})
    manifest = manifest_of(folder, rows + added, "mixed.jsonl")
    words = [f"train={manifest}", f"out={folder.parent / 'out'}", f"language_model={start['language_model']}"]
    words += ["steps=5", "batch_size=3", "accumulation=1", "log_steps=1", "warmup_steps=0", "save_steps=100"]
    done = processes.run([processes.SCRIPT, "train", "1", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr, folder.parent / "out"


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_recording_is_left_out_by_file_manifest_line_and_mend(mixed, kind):
    err, out = mixed
    number = 4 + len(GOOD) + list(BAD).index(kind) + 1
    (row,) = [row for row in lines(out / "left_out") if row["sample"] == f"mixed.jsonl:{number}"]
    assert Path(row["file"]).name == f"{kind}.wav"
    assert BAD[kind] in row["reason"]
    (line,) = [line for line in err.splitlines() if f"mixed.jsonl:{number}: " in line]
    assert line.startswith("left out: ") and row["reason"] in line
    assert f"{kind}.wav".replace("\n", "\\n") in line


def test_every_good_recording_is_trained_on_whatever_its_format(mixed):
    _, out = mixed
    assert {row["sample"] for row in lines(out / "left_out")} == {
        f"mixed.jsonl:{5 + len(GOOD) + i}" for i in range(len(BAD))
    }
    entries = lines(out / "log")
    assert sum(entry["tasks"].get("transcribe", 0) for entry in entries) == 4 + len(GOOD)
    assert entries[-1]["left_out"] == len(BAD)


def test_the_end_says_how_many_were_left_out_and_why(mixed):
    err, out = mixed
    last = err.splitlines()[-1]
    total = 4 + len(GOOD) + len(BAD)
    assert last.startswith(
        f"left out {len(BAD)} of {total} samples, listed in {out / 'left_out.jsonl'}: 2 × is cut short"
    )


def test_without_a_terminal_progress_is_one_plain_line_a_logging_step(mixed):
    err, _ = mixed
    assert "\r" not in err
    progress = [line for line in err.splitlines() if line.startswith("stage 1 | step ")]
    assert len(progress) == 5
    assert all(word in progress[-1] for word in ("step 5/5 |", "| audio ", " s/s |", "| memory ", " GiB |", " left"))
    assert "| kept per label " in progress[-1]


@pytest.mark.parametrize(
    ("heard", "shown"), [(0.034, "0.034 s/s"), (0.4, "0.4 s/s"), (3.26, "3.3 s/s"), (51.6, "52 s/s"), (0.0, None)]
)
def test_a_slow_machine_never_hears_0_s_a_second(heard, shown):
    assert shown_figures({"audio_per_second": heard}).get("audio") == shown
    assert "audio" not in shown_figures({})  # with text alone


@pytest.mark.parametrize("kind", ["missing", "3-hours", "nan"])
def test_strict_stops_at_a_sample_that_cannot_be_used(folder, rows, start, tmp_path, kind):
    write_bad(kind, folder / "x.wav")
    manifest = manifest_of(folder, [*rows, {"audio_filepath": "x.wav", "text": "yes"}])
    with pytest.raises(SampleError) as caught:
        train(1, tmp_path / "out", manifest, **start, strict=True, batch_size=5, steps=1)
    message = str(caught.value)
    assert message.startswith("m.jsonl:5: ") and "x.wav: " in message and BAD[kind] in message


def test_a_manifest_of_which_nothing_is_left_says_why(folder, start, tmp_path):
    manifest = manifest_of(folder, [{"audio_filepath": "x.wav", "text": "yes"}] * 2)
    with pytest.raises(ConfigError, match="no sample to train on; .*; 2 were left out, the first: m.jsonl:1: x.wav: "):
        train(1, tmp_path / "out", manifest, **start)


def test_a_batch_of_which_nothing_is_left_changes_nothing(folder, rows, still, tmp_path):
    write_bad("nan", folder / "x.wav")
    bad = {"audio_filepath": "x.wav", "text": "yes", "duration": 1.0}
    same = {"model": still, "spec_augment": False, "batch_size": 1}
    both = train(1, tmp_path / "both", manifest_of(folder, [rows[0], bad]), steps=2, **same)
    alone = train(1, tmp_path / "alone", manifest_of(folder, rows[:1], "one.jsonl"), steps=1, **same)
    assert same_bits(both.state, alone.state)
    assert sorted(entry["tasks"].get("transcribe", 0) for entry in both.entries) == [0, 1]
    assert [entry["loss"] for entry in both.entries].count(None) == 1


def test_a_batch_left_empty_does_not_weaken_the_step_it_is_part_of(folder, rows, still, tmp_path):
    write_bad("nan", folder / "x.wav")
    bad = {"audio_filepath": "x.wav", "text": "yes", "duration": 1.0}
    same = {"model": still, "spec_augment": False, "batch_size": 1, "steps": 1}
    both = train(1, tmp_path / "both", manifest_of(folder, [rows[0], bad]), accumulation=2, **same)
    alone = train(1, tmp_path / "alone", manifest_of(folder, rows[:1], "one.jsonl"), **same)
    assert both.entries[0]["grad_norm"] == alone.entries[0]["grad_norm"]
    assert same_bits(both.state, alone.state)


def test_a_run_in_which_no_sample_can_be_read_any_more_stops(folder, rows, start, tmp_path):
    for row in rows:
        (folder / row["audio_filepath"]).write_bytes(b"RIFF")
    manifest = manifest_of(folder, rows)
    with pytest.raises(SampleError, match=r"in 3 steps, up to step 3, no sample could be used; among the last: m"):
        train(1, tmp_path / "out", manifest, **start, max_skipped=3, steps=9)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_transcript_that_needs_more_frames_than_there_are_is_left_out_where_ctc_is_trained(
    processor, folder, rows, stage
):
    # 1 s has 100 mel frames and 25 CTC frames; each repeated word needs a blank before it.
    soundfile.write(folder / "x.wav", noise(1.0), RATE)
    rows = [{"audio_filepath": "x.wav", "text": "no " * count} for count in (13, 14)]
    batch = CheckedCollator(processor, stage)(read_manifest(manifest_of(folder, rows)))
    assert len(processor.ctc_ids(rows[0]["text"])) == 13
    assert batch["samples"] == ["m.jsonl:1", "m.jsonl:2"][: 1 if stage < 3 else 2]
    assert [left.sample for left in batch["left_out"]] == ["m.jsonl:2"][: stage < 3]


def test_silence_without_words_is_trained_on(processor, folder):
    write_bad("silent", folder / "x.wav")
    rows = [{"audio_filepath": "x.wav", "task": "sound", "prompt": "What is heard?", "answer": "nothing"}]
    batch = CheckedCollator(processor, 2)(read_manifest(manifest_of(folder, rows)))
    assert batch["left_out"] == [] and batch["tasks"] == ["sound"]


def test_one_nan_recording_leaves_the_weights_as_without_it(folder, rows, start, tmp_path):
    samples = noise(9.0)
    samples[70_000] = np.nan
    soundfile.write(folder / "x.wav", samples, RATE, subtype="FLOAT")
    bad = {"audio_filepath": "x.wav", "text": "yes", "duration": 9.0}  # the longest, so the last of its batch
    with_it = train(1, tmp_path / "with", manifest_of(folder, [*rows, bad]), **start, batch_size=5)
    without = train(1, tmp_path / "without", folder / "good.jsonl", **start, batch_size=5)
    assert same_bits(with_it.state, without.state)


# ---------------------------------------------------------------- text and models


def test_a_batch_with_no_speech_at_all_is_trained_on(folder, start, tmp_path):
    questions = [{"task": "qa", "prompt": f"What is {word}?", "answer": word} for word in ("red", "old", "new")]
    run = train(2, tmp_path / "out", manifest_of(folder, questions), **start)
    assert all(entry["lm_loss"] > 0 and "ctc_loss" not in entry for entry in run.entries)


def test_a_tokenizer_without_a_pad_token_trains(small_llm, folder, rows, tmp_path):
    llm = Path(shutil.copytree(small_llm, tmp_path / "llm"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (llm / name).is_file():
            found = json.loads((llm / name).read_text())
            found.pop("pad_token", None)
            (llm / name).write_text(json.dumps(found))
    assert SoundwaveProcessor.from_backbones(backbones.WHISPER, str(llm)).tokenizer.pad_token is None
    run = train(2, tmp_path / "out", folder / "good.jsonl", language_model=str(llm), steps=1, batch_size=4)
    assert math.isfinite(run.log[0]["loss"])


def test_a_model_of_a_newer_version_is_one_line_that_names_it(still, folder, tmp_path):
    model = Path(shutil.copytree(still, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"config_version": 99}))
    with pytest.raises(ConfigError, match=r"model = '.*/model': config_version = 99, .*; upgrade soundwave$"):
        train(2, tmp_path / "out", folder / "good.jsonl", model=model)


# ---------------------------------------------------------------- numbers


class Poisoned(CheckedCollator):
    """A collator that makes the features of one sample NaN."""

    victim = ""

    def clip(self, sample: Sample) -> torch.Tensor | None:
        clip = super().clip(sample)
        return clip * float("nan") if sample.id == self.victim else clip


def poisoned_trainer(still, manifest, processor, out: Path, **changes) -> SoundwaveTrainer:
    """A trainer whose first sample has NaN features."""
    values = {name: value for name, value in SETTINGS.items() if name != "lora_rank"} | {"batch_size": 1} | changes
    config = make_config(1, train=manifest, out=out, model=still, spec_augment=False, **values)
    samples = read_manifest(manifest)
    sampler = build_sampler(config, samples)
    collator = Poisoned(processor, 1)
    collator.victim = samples[next(iter(sampler))[0]].id
    model = build_model(config, torch.device("cpu"))
    freeze_all_but(model, TRAINED[1])
    return SoundwaveTrainer(
        model=model,
        args=_arguments(config, torch.device("cpu")),
        train_dataset=samples,
        data_collator=collator,
        batch_sampler=sampler,
        max_skipped=config.max_skipped,
    )


def weights(trainer: SoundwaveTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.trained_state_dict().items()}


def test_a_step_whose_loss_is_not_finite_leaves_weights_and_optimiser_as_without_it(
    still, folder, rows, processor, tmp_path
):
    manifest = manifest_of(folder, rows[:2])
    trainer = poisoned_trainer(still, manifest, processor, tmp_path / "both")
    victim = trainer.data_collator.victim
    trainer.train()
    good = [row for number, row in enumerate(rows[:2], start=1) if f"m.jsonl:{number}" != victim]
    alone = train(
        1, tmp_path / "alone", manifest_of(folder, good, "one.jsonl"), model=still, spec_augment=False, steps=1
    )
    assert same_bits(weights(trainer), alone.state)
    states = [torch.load(tmp_path / name / "optimizer.pt") for name in ("both/checkpoint-2", "alone/checkpoint-1")]
    for both, one in zip(*(state["state"].values() for state in states), strict=True):
        assert all(torch.equal(both[name], one[name]) for name in both)


def test_a_skipped_step_is_counted_and_logged_with_its_samples(still, folder, rows, processor, tmp_path, capsys):
    trainer = poisoned_trainer(still, manifest_of(folder, rows[:2]), processor, tmp_path)
    victim = trainer.data_collator.victim
    trainer.train()
    (row,) = lines(tmp_path / "skipped_steps")
    assert row == {"step": 1, "reason": "the loss is not finite (ctc_loss = nan)", "samples": [victim]}
    line = f"step 1 is skipped: the loss is not finite (ctc_loss = nan); its samples are {victim}\n"
    assert line in capsys.readouterr().err
    first, second = lines(tmp_path / "log")
    assert (first["skipped_steps"], first["loss"]) == (1, None)
    assert second["skipped_steps"] == 1 and second["loss"] == pytest.approx(second["ctc_loss"])


def test_one_bad_batch_skips_the_whole_accumulated_step(still, folder, rows, processor, tmp_path):
    trainer = poisoned_trainer(
        still, manifest_of(folder, rows[:2]), processor, tmp_path, steps=1, accumulation=2, max_skipped=5
    )
    before = weights(trainer)
    trainer.max_skipped = 5  # else the only step of the run would end it
    trainer.train()
    assert same_bits(weights(trainer), before)
    assert len(lines(tmp_path / "skipped_steps")[0]["samples"]) == 2


@pytest.mark.parametrize("place", [0, 1], ids=["first", "last"])
def test_a_bad_batch_anywhere_in_a_step_is_as_a_step_without_a_gradient(
    still, folder, rows, tmp_path, monkeypatch, place
):
    """Weights, optimiser, schedule, random numbers (dropout, SpecAugment) and the log of the other steps."""
    compute, clip = SoundwaveTrainer.compute_loss, SoundwaveTrainer._clip_grad_norm
    batches = []

    def poisoned(trainer, model, inputs, *args, **kwargs):
        batches.append(inputs)
        if len(batches) == 2 + place + 1:  # of step 2
            inputs = inputs | {"input_features": inputs["input_features"] * float("nan")}
        return compute(trainer, model, inputs, *args, **kwargs)

    def without_gradient(trainer, model):
        norm = clip(trainer, model)
        if trainer.state.global_step == 1:
            model.zero_grad(set_to_none=True)
        return norm

    manifest, runs = manifest_of(folder, rows), {}
    for name, change in {"compute_loss": poisoned, "_clip_grad_norm": without_gradient}.items():
        with monkeypatch.context() as patch:
            patch.setattr(SoundwaveTrainer, name, change)
            runs[name] = train(
                1, tmp_path / name, manifest, model=still, steps=3, batch_size=1, accumulation=2, adapter_dropout=0.1
            )
    bad, wanted = runs["compute_loss"], runs["_clip_grad_norm"]
    assert same_bits(bad.state, wanted.state)
    skipped = [(row["step"], row["reason"]) for row in lines(tmp_path / "compute_loss" / "skipped_steps")]
    assert skipped == [(2, "the loss is not finite (ctc_loss = nan)")]
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        parts = [torch.load(tmp_path / name / "checkpoint-3" / file, weights_only=False) for name in runs]
        parts = [part["cpu"] for part in parts] if file == "rng_state.pth" else parts
        torch.testing.assert_close(*parts, rtol=0, atol=0)
    for name in ("loss", "grad_norm", "blank_share", "learning_rate"):
        assert [row[name] for row in bad.entries[::2]] == [row[name] for row in wanted.entries[::2]]


def test_a_trainer_that_would_not_find_a_bad_step_is_refused(still, folder, rows, processor, tmp_path):
    trainer = poisoned_trainer(still, manifest_of(folder, rows[:2]), processor, tmp_path)
    with pytest.raises(ValueError, match="^max_grad_norm = 0, but it must be above 0"):
        SoundwaveTrainer(
            model=trainer.model,
            args=dataclasses.replace(trainer.args, max_grad_norm=0.0),
            batch_sampler=trainer.batch_sampler,
        )


def test_a_gradient_that_is_not_finite_skips_the_step_too(still, folder, rows, processor, tmp_path):
    trainer = poisoned_trainer(still, manifest_of(folder, rows[:2]), processor, tmp_path)
    trainer.data_collator.victim = ""
    before = weights(trainer)
    trainer.max_skipped = 5
    trainer.model.blank_bias.register_hook(lambda gradient: gradient * float("inf"))
    trainer.train()
    assert same_bits(weights(trainer), before)
    reasons = {row["reason"] for row in lines(tmp_path / "skipped_steps")}
    assert reasons <= {"the gradient is not finite (norm inf)", "the gradient is not finite (norm nan)"}


def test_too_many_skipped_steps_stop_the_run_and_save_the_batch(still, folder, tmp_path):
    model = Path(shutil.copytree(still, tmp_path / "model"))
    state = load_file(model / WEIGHTS_FILE)
    state["blank_bias"].fill_(float("nan"))
    save_file(state, model / WEIGHTS_FILE)
    out = tmp_path / "out"
    message = r"the loss at step 1 is not finite \(ctc_loss = nan\), nor at the 2 steps after it; the last batch is in"
    with pytest.raises(FloatingPointError, match=message):
        train(1, out, folder / "good.jsonl", model=model, steps=9, max_skipped=3, accumulation=2)
    found = json.loads((out / "bad-batch.json").read_text())
    assert (found["step"], found["batches"], len(found["samples"])) == (3, 2, 4)
    tensors = load_file(out / "bad-batch.safetensors")
    assert set(tensors) == {
        f"{i}.{name}" for i in (0, 1) for name in ("input_features", "feature_lengths", "ctc_labels")
    }
    assert not (out / "model").exists()


# ---------------------------------------------------------------- what a run tells


@pytest.fixture(scope="module")
def told(data, rows, start, tmp_path_factory) -> Path:
    """The folder of a run of stage II over speech and text."""
    out = tmp_path_factory.mktemp("told")
    questions = [{"task": "qa", "prompt": f"What is {word}?", "answer": word} for word in ("red", "old")]
    manifest = manifest_of(data, rows + questions, "both.jsonl")
    train(2, out, manifest, **start, steps=3, temperature=False)
    return out


def test_log_holds_one_object_a_logging_step(told):
    entries = lines(told / "log")
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    wanted = {"epoch", "seconds", "learning_rate", "grad_norm", "loss", "batch_samples", "audio_per_second", "lm_loss"}
    assert all(wanted | {"skipped_steps", "left_out", "tasks"} <= entry.keys() for entry in entries)
    assert any({"ctc_loss", "blank_share", "compression"} <= entry.keys() for entry in entries)
    drawn = {task: sum(entry["tasks"].get(task, 0) for entry in entries) for task in ("transcribe", "qa")}
    assert drawn == {"transcribe": 4, "qa": 2}


def test_run_json_holds_settings_versions_and_tasks(told):
    run = json.loads((told / "run.json").read_text())
    assert (run["stage"], run["tasks"]) == (2, {"transcribe": 4, "qa": 2})
    assert run["config"]["learning_rate"] == 1e-3 and run["config"]["out"] == str(told)
    assert run["versions"]["torch"] == version("torch") and run["device"]


@pytest.mark.parametrize("quiet", [False, True])
def test_quiet_shows_no_progress(folder, start, tmp_path, capsys, quiet):
    train(1, tmp_path / "out", folder / "good.jsonl", **start, quiet=quiet, steps=1)
    assert ("step 1/1" in capsys.readouterr().err) is not quiet


# ---------------------------------------------------------------- whatever comes


@given(
    name=st.sampled_from(["wav", "flac", "ogg", "mp3"]),
    damages=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=6),
    share=st.floats(0.0, 1.0),
    offset=st.floats(0, 3),
    duration=st.none() | st.floats(0.001, 40),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damaged_recording_is_a_clip_or_one_line(processor, tmp_path, name, damages, share, offset, duration):
    path = tmp_path / f"x.{name}"
    soundfile.write(path, noise(1.0), RATE)
    data = bytearray(path.read_bytes())
    for where, with_bytes in damages:
        start = int(where * len(data))
        data[start : start + len(with_bytes)] = with_bytes
    path.write_bytes(data[: int(share * len(data))])
    sample = Sample(id="m.jsonl:1", audio=path, text="yes", offset=offset, duration=duration)
    batch = CheckedCollator(processor, 1)([sample])
    if batch["samples"]:
        assert batch["input_features"].isfinite().all()
    for left in batch["left_out"]:
        assert str(left).splitlines() == [str(left)] and "; " in left.reason
    try:
        assert 0 <= seconds_of(path) < math.inf
    except AudioError as error:
        assert str(error).splitlines() == [str(error)]


VALUES = (
    st.none() | st.booleans() | st.floats() | st.text(max_size=20) | st.sampled_from(["good.jsonl", "/", "x\n.wav"])
)
KEYS = st.sampled_from(
    ["audio_filepath", "text", "offset", "duration", "task", "prompt", "answer", "messages", "source"]
)


@given(st.lists(st.dictionaries(KEYS, VALUES), min_size=1, max_size=4), st.sampled_from(["", "\ufeff"]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_manifest_gives_samples_lines_left_out_or_one_line(folder, rows, mark):
    manifest = folder / "m.jsonl"
    manifest.write_text(mark + "\r\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    left_out = []
    try:
        samples = read_manifest(manifest, leave_out=lambda *left: left_out.append(LeftOut(*left)))
    except ManifestError as error:
        assert str(error).splitlines() == [str(error)] and str(error).startswith(str(manifest))
    else:
        assert len(samples) + len(left_out) == len(rows)
        assert all(str(left).splitlines() == [str(left)] for left in left_out)


def test_a_path_with_a_newline_is_shown_on_one_line(tmp_path):
    with pytest.raises(AudioError) as audio:
        load_audio(tmp_path / "a\nb.wav")
    with pytest.raises(ManifestError) as manifest:
        read_manifest(tmp_path / "a\nb.jsonl")
    for error, name in ((audio.value, "a\\nb.wav"), (manifest.value, "a\\nb.jsonl")):
        assert str(error).splitlines() == [str(error)] and name in str(error)

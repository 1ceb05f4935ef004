"""Encoder frames on disk: the same weights as from recordings, the same bytes after a kill, and what is refused."""

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from soundwave import backbones
from soundwave.data import encoding
from soundwave.data.audio import AudioError
from soundwave.data.collate import CheckedCollator
from soundwave.data.encoding import write_features
from soundwave.data.features import Features, FeaturesError
from soundwave.data.selection import select_samples
from soundwave.training.settings import ConfigError, make_config
from soundwave.training.stages import train_stage
from tests.short_runs import SETTINGS, copy_recordings, manifest_of, same_bits, train

COUNT = 6
SMALL_SHARDS = 1 << 17  # bytes for a "MiB": about one recording a shard


@pytest.fixture(scope="module")
def data(tiny_corpus, tmp_path_factory) -> SimpleNamespace:
    """Recordings, of which one comes twice, one is silent and one is damaged; a text; and their frames."""
    folder = tmp_path_factory.mktemp("data")
    rows = copy_recordings(tiny_corpus, folder, COUNT)
    (folder / "bad.wav").write_bytes(b"no audio")
    text = {"task": "chat", "prompt": "Who is Ann?", "answer": "Ann is nobody in particular."}
    again = rows[0] | {"task": "again", "prompt": "What is said?", "answer": rows[0]["text"]}
    manifest = manifest_of(folder, [*rows, again, text], "m.jsonl")
    damaged = manifest_of(folder, [*rows, {"audio_filepath": "bad.wav", "text": "no", "duration": 0.1}], "bad.jsonl")
    frames = write(manifest, folder / "frames")
    return SimpleNamespace(folder=folder, rows=rows, manifest=manifest, damaged=damaged, frames=frames)


class Killed(BaseException):
    """Ends a command at once, as a kill does."""


def samples_of(manifest: Path):
    return select_samples([manifest], [], stage=2).samples


def write(manifest: Path, out: Path, **settings) -> Path:
    settings = {"audio_tower": backbones.WHISPER, "quiet": True} | settings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "MIB", SMALL_SHARDS)
        write_features(samples_of(manifest), out, shard_mib=1, **settings)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != encoding.LOCK}


def test_a_recording_is_kept_once_and_of_several_shards_none_is_left_aside(data):
    found = contents(data.frames)
    assert len(Features(data.frames)) == COUNT
    assert len([name for name in found if name.endswith(".safetensors")]) > 2
    assert set(found) == {"features.json"} | {shard["file"] for shard in json.loads(found["features.json"])["shards"]}


@pytest.mark.parametrize("stage", [1, 2])
def test_training_from_frames_ends_in_the_same_weights(stage, data, small_vocabulary, tmp_path, capsys):
    """In float32. Of the batches of an epoch one has a single sample, whose frames have other last bits."""
    settings = {"language_model": str(small_vocabulary), "spec_augment": False, "seed": 3, "batch_size": 5 + stage}
    direct = train(stage, tmp_path / "direct", data.manifest, **settings)
    kept = train(stage, tmp_path / "kept", data.manifest, **settings, features=data.frames, workers=stage - 1)
    assert same_bits(direct.state, kept.state)
    assert "other last bits" not in capsys.readouterr().err
    assert kept.entries[-1]["audio_padding"] == 0 and kept.entries[-1]["loss"] == direct.entries[-1]["loss"]


def test_frames_with_other_last_bits_are_told_of(data, small_vocabulary, tmp_path, capsys, monkeypatch):
    """As on another device, or in bfloat16, where they depend on what is encoded together."""
    of = Features.of
    monkeypatch.setattr(
        Features, "of", lambda self, sample: (f := of(self, sample))._replace(rows=f.rows * (1 + 2**-20))
    )
    settings = {"language_model": str(small_vocabulary), "spec_augment": False, "steps": 1}
    train(1, tmp_path, data.manifest, **settings, features=data.frames)
    line = next(line for line in capsys.readouterr().err.splitlines() if "other last bits" in line)
    assert line.startswith(f"the encoder gives other last bits here than in {data.frames} (by 1e-06 of the frames)")


def test_any_number_of_workers_writes_the_same_bytes(data):
    out = write(data.manifest, data.folder / "by-workers", workers=2)
    assert contents(out) == contents(data.frames)
    shutil.rmtree(out)


def test_after_kills_the_same_command_ends_in_the_same_bytes(data, tmp_path, monkeypatch):
    out, write_file, killed = data.folder / "killed", encoding._write, 0
    out.mkdir()
    (out / "begun.json.writing").write_bytes(b"{")  # of a kill at the very beginning
    for _ in range(20):
        calls = []

        def die(path, content, calls=calls):
            calls.append(path)
            if len(calls) == 2:
                (path.parent / (path.name + encoding.ASIDE)).write_bytes(content[:100])  # what a kill leaves
                raise Killed
            write_file(path, content)

        monkeypatch.setattr(encoding, "_write", die)
        try:
            write(data.manifest, out)
            break
        except Killed:
            killed += 1
            with pytest.raises(FeaturesError, match="is not finished; start the same `soundwave features` again"):
                Features(out)
    assert killed > 3
    assert contents(out) == contents(data.frames)
    monkeypatch.setattr(encoding, "_encode", None)
    monkeypatch.setattr(encoding, "_write", None)
    write(data.manifest, out)  # nothing is encoded again
    shutil.rmtree(out)


def test_a_process_that_reads_and_dies_is_named(data, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "_read_all", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(
        FeaturesError, match=r"a process that loads data \(pid \d+\) .*; the same command goes on after"
    ):
        write(data.manifest, tmp_path / "frames", workers=1)


def test_what_cannot_be_read_is_left_out_by_name_here_and_in_training(data):
    out = data.folder / "of-bad"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "MIB", SMALL_SHARDS)
        written = write_features(samples_of(data.damaged), out, audio_tower=backbones.WHISPER, shard_mib=1, quiet=True)
    (left,) = written.left_out
    assert left.sample == f"bad.jsonl:{COUNT + 1}" and "cannot be decoded" in left.reason
    assert written.clips == COUNT
    *_, bad = samples_of(data.damaged)
    assert Features(out).holds(bad)
    with pytest.raises(AudioError, match="cannot be decoded"):
        Features(out).of(bad)
    shutil.rmtree(out)


def copied(data, tmp_path) -> SimpleNamespace:
    """The data and its frames in another place, where they can be changed."""
    folder = tmp_path / "data"
    shutil.copytree(data.folder, folder)
    return SimpleNamespace(folder=folder, frames=folder / "frames", samples=samples_of(folder / "m.jsonl"))


def test_data_and_frames_can_be_copied_together(data, tmp_path):
    there = copied(data, tmp_path)
    for path in there.folder.glob("*.wav"):
        os.utime(path, (1, 1))  # as after a copy that does not keep times: the content decides
    found, wanted = Features(there.frames), Features(data.frames)
    for here, sample in zip(samples_of(data.manifest), there.samples, strict=True):
        if sample.audio is not None:
            assert torch.equal(found.of(sample).rows, wanted.of(here).rows)


def test_frames_of_a_recording_that_has_changed_are_not_used(data, tmp_path):
    there = copied(data, tmp_path)
    sample = there.samples[0]
    content = bytearray(sample.audio.read_bytes())
    content[-1] ^= 1
    sample.audio.write_bytes(content)
    with pytest.raises(AudioError, match="has changed since its frames were written to .*frames; run `soundwave feat"):
        Features(there.frames).of(sample)
    processor = SimpleNamespace(
        features=lambda audio: torch.zeros(80, len(audio) // 160),
        pad_features=lambda clips: {"feature_lengths": torch.tensor([clip.shape[1] for clip in clips])},
        ctc_ids=lambda text: [1],
        ctc_labels=lambda texts: torch.ones(len(texts), 1),
    )
    batch = CheckedCollator(processor, 1, features=Features(there.frames))(there.samples[:2])
    assert len(batch["feature_lengths"]) == 1  # also where so few recordings are read themselves
    assert [left.sample for left in batch["left_out"]] == ["m.jsonl:1"] and batch["samples"] == ["m.jsonl:2"]


def test_damaged_frames_are_named_and_mended(data, tmp_path):
    there = copied(data, tmp_path)
    file = there.frames / "shard-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1  # of the frames, which stand at the end or the beginning: one bit is enough
    file.write_bytes(content)
    faults = []
    for sample in there.samples:
        try:
            Features(there.frames).of(sample) if sample.audio else None
        except AudioError as error:
            faults.append(str(error))
    assert faults and all(f"its frames in {file} are damaged" in fault for fault in faults)
    with pytest.raises(FeaturesError, match="shard-00000.safetensors is damaged; delete it, and start the command"):
        write(there.folder / "m.jsonl", there.frames)
    file.unlink()
    with pytest.raises(FeaturesError, match="shard-00000.safetensors cannot be read"):
        Features(there.frames)
    write(there.folder / "m.jsonl", there.frames)
    assert len(Features(there.frames)) == COUNT


REFUSED = {
    "masks": ({"spec_augment": True}, "spec_augment = True masks other parts .* give spec_augment=false"),
    "padded": ({"packed": False}, "packed rows, with other last bits .* give implementation=fused and packed=true"),
    "eager": ({"implementation": "eager"}, "give implementation=fused and packed=true"),
    "dtype": ({"dtype": "bfloat16"}, "dtype = 'bfloat16', but features = .* of 'float32'; give dtype=float32"),
    "no-folder": ({"features": "nowhere"}, "features = 'nowhere' holds no features.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_training_refuses_frames_that_cannot_stand_for_recordings(case, data, tmp_path):
    changed, message = REFUSED[case]
    settings = SETTINGS | {"train": data.manifest, "out": tmp_path / "out", "features": data.frames}
    with pytest.raises((ConfigError, FeaturesError), match=message):
        train_stage(make_config(1, **settings | {"spec_augment": False} | changed))
    assert not (tmp_path / "out").exists()


def test_training_refuses_a_sample_without_frames_and_frames_of_another_encoder(data, small_vocabulary, tmp_path):
    settings = SETTINGS | {"spec_augment": False, "language_model": str(small_vocabulary)}
    shorter = data.rows[1] | {"duration": 0.5}
    other = manifest_of(data.folder, [data.rows[0], shorter], "other.jsonl")
    with pytest.raises(ConfigError, match=r"holds no frames of other.jsonl:2 \(.*, offset 0, duration 0.5\)"):
        train_stage(make_config(1, **settings, train=other, out=tmp_path / "out", features=data.frames))
    shutil.copytree(data.frames, frames := data.folder / "of-another")
    about = json.loads((frames / "features.json").read_text())
    (frames / "features.json").write_text(json.dumps(about | {"encoder": "0123456789abcdef"}))
    with pytest.raises(FeaturesError, match="holds frames of encoder = '0123456789abcdef', but this run has"):
        train_stage(make_config(1, **settings, train=data.manifest, out=tmp_path / "out", features=frames))
    shutil.rmtree(frames)


def test_a_folder_of_something_else_or_without_room_is_refused(data, tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FeaturesError, match="holds mine.txt, but no frames; name a new folder"):
        write(data.manifest, tmp_path)
    with pytest.raises(
        FeaturesError, match=r"other clips or settings: batch_duration = 120.0 \(now 7.0\); name another"
    ):
        write(data.manifest, data.frames, batch_duration=7.0)
    with pytest.raises(FeaturesError, match="mine.txt is a file; name a folder"):
        write(data.manifest, tmp_path / "mine.txt")
    monkeypatch.setattr(encoding.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(FeaturesError, match="the frames take about 0.0 GiB, but .* has 0.0 GiB free"):
        write(data.manifest, tmp_path / "new")


def test_damage_of_the_index_is_named(data, tmp_path):
    (tmp_path / "features.json").write_text("{")
    with pytest.raises(FeaturesError, match="features.json is damaged"):
        Features(tmp_path)
    (tmp_path / "features.json").write_text('{"format": 1, "shards": [{"file": "../a.safetensors", "left_out": {}}]}')
    with pytest.raises(FeaturesError, match="features.json is damaged"):  # nothing outside the folder is read
        Features(tmp_path)
    (tmp_path / "features.json").write_text('{"format": 99, "shards": []}')
    with pytest.raises(FeaturesError, match="is of format 99, but this version reads 1"):
        Features(tmp_path)

"""Splicing: strings have one speaker and one split, some repeat a word, and the same seed gives the same bytes."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from soundwave.data.audio import load_audio
from soundwave.data.manifest import ManifestError, read_manifest, write_manifest
from soundwave.data.splicing import GAP, splice_strings

FSDD = Path(__file__).resolve().parents[2] / "shared" / "data" / "fsdd" / "index.jsonl"
WORDS = ("one", "two", "three", "four")
SPEAKERS = ("anna", "ben", "cleo")
RATE = 8_000


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """48 clips. Each has another constant level, so that a string shows from which clips it was made."""
    folder = tmp_path_factory.mktemp("clips")
    rows, level = [], 0.1
    for speaker in SPEAKERS:
        for word in WORDS:
            for take, split in enumerate(("train", "train", "train", "test")):
                level += 0.01
                name = f"{word}_{speaker}_{take}.wav"
                soundfile.write(folder / name, np.full(RATE // 5, level), RATE)
                row = {
                    "audio_filepath": name,
                    "duration": 0.2,
                    "text": word,
                    "speaker": speaker,
                    "split": split,
                }
                rows.append(row | {"level": round(level, 2)})
    write_manifest(folder / "index.jsonl", rows)
    return folder / "index.jsonl"


def clips_in(audio: np.ndarray) -> list[float]:
    """The levels of the clips in a string."""
    levels, run = [], 0
    for value in np.append(audio, 0.0):
        if value > 0.05:
            run += 1
            if run == 800:  # the middle of a clip of 0.2 s, clear of the resampler's ringing
                levels.append(round(float(value), 2))
        else:
            run = 0
    return levels


def test_rows_say_what_the_files_hold(index, tmp_path):
    manifest = splice_strings(index, tmp_path / "out", split="train", count=20)
    assert manifest == tmp_path / "out" / "manifest.jsonl"
    samples = read_manifest(manifest)
    assert len(samples) == 20
    clips = {clip.extra["level"]: clip for clip in read_manifest(index)}
    for sample in samples:
        info = soundfile.info(sample.audio)
        assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
        assert (sample.task, sample.duration) == ("transcribe", info.duration)
        heard = [clips[level] for level in clips_in(load_audio(sample.audio))]
        assert " ".join(clip.text for clip in heard) == sample.text
        assert {clip.extra["speaker"] for clip in heard} == {sample.extra["speaker"]}


def test_splits_share_no_clip(index, tmp_path):
    heard = {}
    for split in ("train", "test"):
        samples = read_manifest(splice_strings(index, tmp_path / split, split=split, count=60))
        heard[split] = {level for sample in samples for level in clips_in(load_audio(sample.audio))}
    assert len(heard["train"]) == 36 and len(heard["test"]) == 12
    assert not heard["train"] & heard["test"]


def test_lengths_run_from_one_to_max_words(index, tmp_path):
    samples = read_manifest(splice_strings(index, tmp_path / "out", split="train", count=100, max_words=3))
    assert {len(sample.text.split()) for sample in samples} == {1, 2, 3}


def test_a_third_of_the_strings_repeats_a_word_in_a_row_once(index, tmp_path):
    samples = read_manifest(splice_strings(index, tmp_path / "out", split="train", count=400))
    strings = [sample.text.split() for sample in samples if " " in sample.text]
    repeats = Counter(sum(a == b for a, b in zip(words, words[1:], strict=False)) for words in strings)
    assert set(repeats) == {0, 1}
    assert 0.26 < repeats[1] / len(strings) < 0.41  # 3 standard deviations of 350 draws at 1/3


def test_a_repeated_word_is_another_recording(index, tmp_path):
    for sample in read_manifest(splice_strings(index, tmp_path / "out", split="train", count=60)):
        levels = clips_in(load_audio(sample.audio))
        assert all(a != b for a, b in zip(levels, levels[1:], strict=False))


def test_gaps_are_short_and_quiet(index, tmp_path):
    for sample in read_manifest(splice_strings(index, tmp_path / "out", split="train", count=30)):
        words = len(sample.text.split())
        gaps = sample.duration - 0.2 * words
        assert GAP[0] * (words + 1) - 1e-3 < gaps < GAP[1] * (words + 1)
        assert np.abs(load_audio(sample.audio)[:700]).max() < 0.02


def test_some_gaps_are_silent_and_some_noisy(index, tmp_path):
    samples = read_manifest(splice_strings(index, tmp_path / "out", split="train", count=40))
    silent = [not load_audio(sample.audio)[:700].any() for sample in samples]
    assert 8 <= sum(silent) <= 32


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_seed_same_bytes_other_seed_others(index, tmp_path):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        splice_strings(index, tmp_path / name, split="train", count=10, seed=seed)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a") != files(tmp_path / "c")


@pytest.mark.parametrize(
    ("choice", "left"),
    [
        pytest.param({"exclude_speakers": ["ben"]}, {"anna", "cleo"}, id="exclude"),
        pytest.param({"only_speakers": ["ben"]}, {"ben"}, id="only"),
        pytest.param({"only_speakers": ["ben", "anna"], "exclude_speakers": ["ben"]}, {"anna"}, id="both"),
    ],
)
def test_speakers_are_chosen(index, tmp_path, choice, left):
    samples = read_manifest(splice_strings(index, tmp_path / "out", split="train", count=40, **choice))
    assert {sample.extra["speaker"] for sample in samples} == left


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        pytest.param({"split": "dev"}, 'split: "dev" is not in the index; it has test, train', id="split"),
        pytest.param({"only_speakers": ["dan"]}, 'only_speakers: "dan" .* it has anna, ben, cleo', id="only"),
        pytest.param({"exclude_speakers": ["Ben"]}, 'exclude_speakers: "Ben" .* it has anna, ben', id="exclude"),
        pytest.param({"exclude_speakers": SPEAKERS}, "leaves none of anna, ben, cleo", id="exclude-all"),
        pytest.param({"count": 0}, "count = 0", id="count"),
        pytest.param({"max_words": 0}, "max_words = 0", id="max-words"),
    ],
)
def test_bad_argument(index, tmp_path, change, wanted):
    with pytest.raises(ValueError, match=wanted):
        splice_strings(index, tmp_path / "out", **{"split": "train", "count": 5} | change)
    assert not (tmp_path / "out").exists()


def test_folder_that_holds_something_is_left_alone(index, tmp_path):
    (tmp_path / "manifest.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="holds something already; name a new folder"):
        splice_strings(index, tmp_path, split="train", count=5)
    assert files(tmp_path) == {"manifest.jsonl": b"mine"}


@pytest.mark.parametrize("key", ["speaker", "split"])
def test_index_that_lacks_a_key(tmp_path, key):
    soundfile.write(tmp_path / "x.wav", np.zeros(800), RATE)
    row = {"audio_filepath": "x.wav", "text": "one", "speaker": "anna", "split": "train"}
    row.pop(key)
    write_manifest(tmp_path / "index.jsonl", [row])
    with pytest.raises(ValueError, match=f'index.jsonl:1: lacks a string "{key}"'):
        splice_strings(tmp_path / "index.jsonl", tmp_path / "out", split="train", count=5)


def test_speaker_with_one_word_cannot_make_strings(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.zeros(800), RATE)
    row = {"audio_filepath": "x.wav", "text": "one", "speaker": "anna", "split": "train"}
    write_manifest(tmp_path / "index.jsonl", [row])
    with pytest.raises(ValueError, match="anna.*only.*one.*, but strings need two words; exclude this speaker"):
        splice_strings(tmp_path / "index.jsonl", tmp_path / "out", split="train", count=5)


def test_missing_index(tmp_path):
    with pytest.raises(ManifestError, match="does not exist"):
        splice_strings(tmp_path / "index.jsonl", tmp_path / "out", split="train", count=5)


def test_real_digits(tmp_path):
    if not FSDD.is_file():
        pytest.skip("no shared/data/fsdd beside the checkout")
    samples = read_manifest(splice_strings(FSDD, tmp_path / "out", split="test", count=40))
    assert len({word for sample in samples for word in sample.text.split()}) == 10
    assert max(sample.duration for sample in samples) < 15
    assert all(1e-2 < np.abs(load_audio(sample.audio)).max() <= 1 for sample in samples)

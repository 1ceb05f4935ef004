"""Audio files: each format is read as mono float32 at 16 kHz, each fault is one line, long recordings give windows."""

import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from soundwave.data.audio import AudioError, load_audio
from soundwave.inference.long import windows

ESC10 = Path(__file__).resolve().parents[2] / "shared" / "data" / "esc10"


def sine(seconds: float, rate: int, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def fault(path: Path, **options) -> str:
    with pytest.raises(AudioError) as caught:
        load_audio(path, **options)
    message = str(caught.value)
    assert message.splitlines() == [message] and message.startswith(f"{path}: ") and "; " in message
    return message


# --- formats

FORMATS = [
    pytest.param("x.wav", "PCM_U8", 2**-7, id="wav-8-bit"),
    pytest.param("x.wav", "PCM_16", 2**-15, id="wav-16-bit"),
    pytest.param("x.wav", "PCM_24", 2**-23, id="wav-24-bit"),
    pytest.param("x.wav", "FLOAT", 1e-7, id="wav-float"),
    pytest.param("x.wav", "DOUBLE", 1e-7, id="wav-double"),
    pytest.param("x.flac", "PCM_16", 2**-15, id="flac"),
    pytest.param("x.ogg", "VORBIS", 0.05, id="ogg-vorbis"),
    pytest.param("x.ogg", "OPUS", 0.05, id="ogg-opus"),
    pytest.param("x.mp3", "MPEG_LAYER_III", 0.05, id="mp3"),
]


@pytest.mark.parametrize(("name", "subtype", "step"), FORMATS)
def test_format(tmp_path, name, subtype, step):
    expected = sine(0.5, 16_000)
    soundfile.write(tmp_path / name, expected, 16_000, subtype=subtype)
    audio = load_audio(tmp_path / name)
    assert (audio.dtype, audio.ndim, len(audio)) == (np.float32, 1, 8000)
    inner = slice(800, -800)  # lossy codecs change the ends
    assert np.abs(audio - expected)[inner].max() <= step


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_resampled_to_16_khz(tmp_path, rate):
    soundfile.write(tmp_path / "x.wav", sine(1.0, rate), rate, subtype="FLOAT")
    audio = load_audio(tmp_path / "x.wav")
    assert len(audio) == 16_000
    assert np.abs(audio - sine(1.0, 16_000))[1600:-1600].max() < 1e-3


def test_resampled_to_the_rate_asked_for(tmp_path):
    soundfile.write(tmp_path / "x.wav", sine(1.0, 16_000), 16_000)
    assert len(load_audio(tmp_path / "x.wav", sampling_rate=24_000)) == 24_000


def test_resampling_folds_nothing_back(tmp_path):
    soundfile.write(tmp_path / "x.wav", sine(1.0, 48_000, hertz=15_000), 48_000, subtype="FLOAT")
    assert np.abs(load_audio(tmp_path / "x.wav"))[1600:-1600].max() < 1e-3


@pytest.mark.parametrize("channels", [2, 3, 6])
def test_channels_are_averaged(tmp_path, channels):
    levels = np.arange(1, channels + 1) / 10
    soundfile.write(tmp_path / "x.wav", np.tile(levels, (100, 1)), 16_000, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(tmp_path / "x.wav"), np.full(100, levels.mean()), rtol=1e-6)


@pytest.mark.parametrize("name", ["sprache ß 音.wav", "no-suffix", "wrong.mp3"])
def test_content_decides_not_the_name(tmp_path, name):
    soundfile.write(tmp_path / "x.wav", sine(0.1, 16_000), 16_000)
    (tmp_path / "x.wav").rename(tmp_path / name)
    assert len(load_audio(tmp_path / name)) == 1600


def test_real_recordings():
    if not ESC10.is_dir():
        pytest.skip("no shared/data/esc10 beside the checkout")
    for path in sorted(ESC10.glob("*.ogg"))[::32]:
        audio = load_audio(path)
        assert 79_000 < len(audio) < 81_000 and 1e-4 < np.abs(audio).max() < 1.5, path.name


# --- parts


@pytest.mark.parametrize(("name", "subtype", "step"), FORMATS)
def test_part_is_that_slice_of_the_whole(tmp_path, name, subtype, step):
    noise = np.random.default_rng(0).normal(0, 0.1, 48_000).astype(np.float32)
    soundfile.write(tmp_path / name, noise, 16_000, subtype=subtype)
    whole = load_audio(tmp_path / name)
    part = load_audio(tmp_path / name, offset=1.25, duration=0.5)
    np.testing.assert_allclose(part, whole[20_000:28_000], atol=1e-3)


def test_part_without_duration_reads_to_the_end(tmp_path):
    soundfile.write(tmp_path / "x.wav", sine(1.0, 16_000), 16_000)
    assert len(load_audio(tmp_path / "x.wav", offset=0.75)) == 4000


def test_duration_rounded_up_in_the_manifest_is_accepted(tmp_path):
    soundfile.write(tmp_path / "x.wav", sine(0.96, 16_000), 16_000)
    assert len(load_audio(tmp_path / "x.wav", duration=1.0)) == 15_360


@pytest.mark.parametrize(
    ("part", "wanted"),
    [
        pytest.param({"offset": 1.0}, "offset = 1 s, but the file lasts 1 s", id="offset-at-the-end"),
        pytest.param({"offset": 7.5}, "offset = 7.5 s, but the file lasts 1 s", id="offset-past-the-end"),
        pytest.param({"duration": 1.1}, "offset + duration = 1.1 s, but", id="duration-past-the-end"),
        pytest.param({"offset": 0.5, "duration": 0.6}, "offset + duration = 1.1 s, but", id="both-past-the-end"),
        pytest.param({"offset": -1.0}, "offset = -1; give seconds", id="negative-offset"),
        pytest.param({"offset": float("nan")}, "offset = nan; give seconds", id="nan-offset"),
        pytest.param({"duration": 0.0}, "duration = 0; give seconds", id="no-duration"),
        pytest.param({"offset": 0.5, "duration": 1e-6}, "have no sample between them; give a longer", id="too-short"),
        pytest.param({"offset": 0.99999}, "have no sample between them; give a longer", id="too-near-to-the-end"),
        pytest.param({"duration": float("inf")}, "duration = inf; give seconds", id="infinite-duration"),
    ],
)
def test_part_that_is_not_there(tmp_path, part, wanted):
    soundfile.write(tmp_path / "x.wav", sine(1.0, 16_000), 16_000)
    assert wanted in fault(tmp_path / "x.wav", **part)


# --- faults


def test_missing_file(tmp_path):
    assert "does not exist; name" in fault(tmp_path / "x.wav")


def test_folder(tmp_path):
    assert "is not a file; name" in fault(tmp_path)


def test_empty_file(tmp_path):
    (tmp_path / "x.wav").touch()
    assert "is empty; record" in fault(tmp_path / "x.wav")


def test_text_named_wav(tmp_path):
    (tmp_path / "x.wav").write_text("This is no audio, whatever its name says.\n" * 100)
    assert "cannot be decoded (Format not recognised); " in fault(tmp_path / "x.wav")


def test_raw_samples(tmp_path):
    (tmp_path / "x.raw").write_bytes(bytes(1000))
    assert "is raw samples without a header; " in fault(tmp_path / "x.raw")


def test_no_samples(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.zeros(0), 16_000)
    assert "holds no samples; " in fault(tmp_path / "x.wav")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers(tmp_path, value):
    audio = sine(0.1, 16_000)
    audio[77] = value
    soundfile.write(tmp_path / "x.wav", audio, 16_000, subtype="FLOAT")
    assert "holds NaN or infinite samples; " in fault(tmp_path / "x.wav")


@pytest.mark.parametrize("name", ["x.wav", "x.flac", "x.mp3"])
@pytest.mark.parametrize("share", [0.9, 0.5])
def test_truncated_file(tmp_path, name, share):
    noise = np.random.default_rng(0).normal(0, 0.1, 48_000)
    soundfile.write(tmp_path / name, noise, 16_000)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
    assert "get a whole copy" in fault(tmp_path / name)


@pytest.mark.parametrize("announced", [0xFFFFFFFF, 0x7FFFFFFF], ids=["4-GiB", "2-GiB"])
def test_wav_recorded_through_a_pipe_is_whole(tmp_path, announced):
    soundfile.write(tmp_path / "x.wav", sine(0.5, 16_000), 16_000)
    raw = bytearray((tmp_path / "x.wav").read_bytes())
    size = raw.index(b"data") + 4
    raw[size : size + 4] = struct.pack("<I", announced)
    (tmp_path / "x.wav").write_bytes(raw)
    assert len(load_audio(tmp_path / "x.wav")) == 8000


def test_mp3_of_varying_rate_without_a_length_is_whole(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.3, 160_000)
    audio = np.concatenate([noise, np.zeros(160_000), noise])
    soundfile.write(tmp_path / "x.mp3", audio, 16_000, bitrate_mode="VARIABLE")
    assert len(load_audio(tmp_path / "x.mp3")) == len(audio)
    raw = (tmp_path / "x.mp3").read_bytes()
    second = raw.index(raw[:2], 4)  # the first frame holds the length and no audio
    assert b"Xing" in raw[:second]
    (tmp_path / "x.mp3").write_bytes(raw[second:])
    assert len(load_audio(tmp_path / "x.mp3")) >= len(audio)


@pytest.mark.parametrize("rate", [1, 2**31 - 1])
def test_sampling_rate_that_no_recorder_has(tmp_path, rate):
    soundfile.write(tmp_path / "x.wav", sine(0.1, 16_000), 16_000)
    raw = bytearray((tmp_path / "x.wav").read_bytes())
    raw[24:28] = struct.pack("<I", rate)
    (tmp_path / "x.wav").write_bytes(raw)
    assert f"its header says {rate} samples a second" in fault(tmp_path / "x.wav")


@given(
    st.sampled_from(["x.wav", "x.flac", "x.ogg", "x.mp3"]),
    st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4),
    st.floats(0, 1),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_bytes_give_audio_or_one_line(tmp_path, name, damages, share):
    path = tmp_path / name
    soundfile.write(path, sine(0.5, 16_000), 16_000)
    raw = bytearray(path.read_bytes())
    for place, damage in damages:
        start = int(place**3 * len(raw))  # most of the damage is in the header
        raw[start : start + len(damage)] = damage
    path.write_bytes(raw[: int((1 - share**4) * len(raw))])
    try:
        audio = load_audio(path)
    except AudioError as error:
        assert str(error).startswith(f"{path}: ") and len(str(error).splitlines()) == 1
    else:
        assert audio.dtype == np.float32 and np.isfinite(audio).all()


# --- windows


@pytest.mark.parametrize("seconds", [0.0, 0.1, 29.999, 30.0])
def test_short_recording_is_one_window(seconds):
    audio = sine(seconds, 16_000)
    (piece,) = windows(audio)
    np.testing.assert_array_equal(piece, audio)


@pytest.mark.parametrize("seconds", [30.001, 31.0, 59.9, 61.7, 200.0])
@pytest.mark.parametrize("limit", [30.0, 7.3, 0.5])
def test_windows_joined_are_the_recording(seconds, limit):
    audio = np.random.default_rng(0).normal(0, 0.1, round(seconds * 16_000)).astype(np.float32)
    pieces = windows(audio, seconds=limit)
    np.testing.assert_array_equal(np.concatenate(pieces), audio)
    assert max(map(len, pieces)) <= limit * 16_000
    assert min(map(len, pieces)) >= 0.03 * limit * 16_000


def test_cut_falls_into_the_middle_of_the_quietest_frame():
    audio = np.random.default_rng(0).normal(0, 0.1, 40 * 16_000).astype(np.float32)
    pause = slice(round(27.30 * 16_000), round(27.32 * 16_000))
    audio[pause] *= 0.01
    first, _ = windows(audio)
    assert len(first) == round(27.31 * 16_000)


def test_cut_leaves_a_rest_that_can_hold_a_word():
    audio = np.random.default_rng(0).normal(0, 0.1, round(30.1 * 16_000)).astype(np.float32)
    audio[round(29.8 * 16_000) :] = 0
    assert len(windows(audio)[1]) >= 16_000


def test_pause_far_before_the_limit_is_not_taken():
    audio = np.random.default_rng(0).normal(0, 0.1, 40 * 16_000).astype(np.float32)
    audio[10 * 16_000 : 11 * 16_000] = 0
    assert len(windows(audio)[0]) >= 25 * 16_000


def test_windows_shorter_than_four_frames_are_refused():
    with pytest.raises(ValueError, match="seconds = 0.05; wanted at least 0.08"):
        windows(sine(1.0, 16_000), seconds=0.05)

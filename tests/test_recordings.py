"""Every container and codec: read whole, or named as cut or damaged; never shorter in silence, never refused if valid.

kind of input        containers
whole                all
cut short            all; of those without a length only inside a frame
size never written   WAV, RF64, W64, AIFF, AU, CAF, FLAC, MP3, WebM, fragmented MP4
joined               MP3 and Ogg: whole; the others: named
tagged               MP3, WAV
damaged anywhere     all, at random
"""

import os
import random
import struct
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from soundwave.data.audio import AudioError, load_audio, read_blocks, seconds_of
from soundwave.data.collate import features
from soundwave.data.selection import select_samples
from soundwave.inference.long import stream_windows, windows
from tests.recordings import (
    ID3V1,
    ID3V2,
    LOSSLESS,
    LOSSY,
    MAKERS,
    MP3,
    RATE,
    SECONDS,
    WITH_ONE_RATE,
    WITHOUT_CHECKSUM,
    WITHOUT_LENGTH,
    by_ffmpeg,
    by_libsndfile,
    damaged,
    samples,
)  # fmt: skip

WHOLE = round(SECONDS * RATE)


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return {name: make() for name, make in MAKERS.items()}


@pytest.fixture
def written(tmp_path):
    """Writes bytes to a file whose name says nothing, and gives its path."""

    def write(data: bytes):
        (tmp_path / "recording").write_bytes(data)
        return tmp_path / "recording"

    return write


def fault(path) -> str:
    with pytest.raises(AudioError) as caught:
        load_audio(path)
    assert str(caught.value) == f"{path}: {caught.value.fault}" and len(caught.value.fault.splitlines()) == 1
    return caught.value.fault


# --- whole


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless(files, written, name):
    path = written(files[name])
    np.testing.assert_allclose(load_audio(path), samples(), atol=2**-15)
    assert seconds_of(path) == SECONDS


@pytest.mark.parametrize("name", LOSSY)
def test_lossy(files, written, name):
    audio, expected = load_audio(written(files[name])), samples()
    assert WHOLE - 1 <= len(audio) <= WHOLE + 2400  # what an encoder adds
    lags = range(0, 2400, 1)
    match = max(np.corrcoef(audio[lag : lag + 4800], expected[:4800])[0, 1] for lag in lags if lag + 4800 <= len(audio))
    assert match > 0.9
    assert abs(seconds_of(written(files[name])) - len(audio) / RATE) < 0.05


@pytest.mark.parametrize("name", MAKERS)
def test_part(files, written, name):
    path = written(files[name])
    whole, part = load_audio(path), load_audio(path, offset=0.25, duration=0.2)
    assert len(part) == 3200
    assert np.abs(part[100:-100] - whole[4100:7100]).max() < 0.02


def test_blocks_joined_are_the_recording(files, written):
    path = written(by_libsndfile("WAV", "PCM_16", rate=44_100, seconds=15.0))
    blocks = list(read_blocks(path))
    assert len(blocks) > 2
    np.testing.assert_array_equal(np.concatenate(blocks), load_audio(path))


# --- cut short


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", MAKERS)
def test_cut_short(files, written, name, share):
    data = files[name]
    assert ";" in fault(written(data[: int(len(data) * share) - 1]))


@pytest.mark.parametrize("name", MAKERS)
def test_last_byte_missing(files, written, name):
    path = written(files[name][:-1])
    try:
        assert len(load_audio(path)) >= len(load_audio(written(files[name])))  # it held no sound
    except AudioError as error:
        assert "cut short" in error.fault or "damaged" in error.fault


# --- sizes that were never written


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFF000, 0x80000000], ids=hex)
@pytest.mark.parametrize("name", ["wav-16", "wav-24", "wav-float", "wavex", "wav-ulaw"])
def test_wav_of_unknown_size(files, written, name, size):
    data = bytearray(files[name])
    place = data.index(b"data") + 4
    data[4:8] = data[place : place + 4] = struct.pack("<I", size)
    whole = len(load_audio(written(files[name])))
    assert len(load_audio(written(data))) == whole
    assert seconds_of(written(data)) == whole / RATE


def test_wav_of_unknown_size_behind_another_chunk(files, written):
    data = bytearray(files["wav-16"])
    data[12:12] = b"JUNK" + struct.pack("<I", 28) + bytes(28)
    place = data.index(b"data") + 4
    data[4:8] = data[place : place + 4] = bytes(4)
    assert len(load_audio(written(data))) == WHOLE


def test_wav_that_is_truly_empty(written):
    data = bytearray(by_libsndfile("WAV", "PCM_16", seconds=0.0))
    assert "holds no samples" in fault(written(data))
    assert "holds no samples" in fault(written(bytes(data) + b"LIST" + struct.pack("<I", 4) + b"INFO"))


@pytest.mark.parametrize("size", [0, 2**63 - 1, 2**64 - 1], ids=hex)
def test_rf64_of_unknown_size(files, written, size):
    data = bytearray(files["rf64"])
    data[20:28] = data[28:36] = data[36:44] = struct.pack("<Q", size)
    if size == 0:
        data[20:28] = bytes(8)
    assert len(load_audio(written(data))) == WHOLE


@pytest.mark.parametrize("size", [0, 24, 2**63 - 1, 2**64 - 1], ids=hex)
def test_w64_of_unknown_size(files, written, size):
    data = bytearray(files["w64"])
    place = data.index(b"data\xf3") + 16
    data[16:24] = data[place : place + 8] = struct.pack("<Q", size)
    assert len(load_audio(written(data))) == WHOLE


@pytest.mark.parametrize("size", [0, 8, 0x7FFFF008, 0xFFFFFFFF], ids=hex)
def test_aiff_of_unknown_size(files, written, size):
    data = bytearray(files["aiff"])
    ssnd, comm = data.index(b"SSND") + 4, data.index(b"COMM") + 10
    data[4:8] = data[ssnd : ssnd + 4] = struct.pack(">I", size)
    data[comm : comm + 4] = struct.pack(">I", 0)
    assert len(load_audio(written(data))) == WHOLE


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF], ids=hex)
def test_au_of_unknown_size(files, written, size):
    data = bytearray(files["au"])
    data[8:12] = struct.pack(">I", size)
    assert len(load_audio(written(data))) == WHOLE


def test_caf_of_unknown_size(files, written):
    data = bytearray(files["caf"])
    place = data.index(b"data") + 4
    data[place : place + 8] = b"\xff" * 8
    assert len(load_audio(written(data))) == WHOLE


def flac_with_total(data: bytes, total: int) -> bytes:
    copy = bytearray(data)
    copy[18:26] = (int.from_bytes(data[18:26], "big") >> 36 << 36 | total).to_bytes(8, "big")
    return bytes(copy)


def test_flac_from_a_pipe(files, written):
    path = written(flac_with_total(files["flac"], 0))
    np.testing.assert_allclose(load_audio(path), samples(), atol=2**-15)
    assert seconds_of(path) == SECONDS
    assert len(load_audio(path, duration=0.5)) == 8000


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_flac_from_a_pipe_cut_short(files, written, share):
    data = flac_with_total(files["flac"], 0)
    assert "cut short or damaged" in fault(written(data[: int(share * len(data))]))


def test_flac_with_a_tag_before_it(files, written):
    for total in (0, WHOLE):
        path = written(ID3V2 + flac_with_total(files["flac"], total))
        np.testing.assert_allclose(load_audio(path), samples(), atol=2**-15)
        assert "holds a second recording" in fault(written(ID3V2 + flac_with_total(files["flac"], total) * 2))


def test_flac_whose_picture_holds_the_beginning_of_another(files, written):
    data = files["flac"]
    picture = struct.pack(">II", 3, 9) + b"image/png" + bytes(20) + b"\0\0\0\x6c" + b"fLaC\0\0\0\x22" + bytes(100)
    block = b"\x06" + len(picture).to_bytes(3, "big") + picture
    assert len(load_audio(written(data[:4] + b"\0" + data[5:42] + block + data[42:]))) == WHOLE


# --- more than the header tells


def test_flac_from_a_pipe_joined_is_named(files, written):
    assert "holds a second recording" in fault(written(flac_with_total(files["flac"], 0) * 2))


def test_wav_with_a_second_chunk_of_samples_is_named(files, written):
    data = files["wav-16"]
    assert "holds a second recording" in fault(written(data + data[data.index(b"data") :]))


@pytest.mark.parametrize("name", ["aiff", "au"])
def test_advice_on_more_bytes_is_for_the_container(files, written, name):
    assert "ignore_length" not in fault(written(files[name] + b"some more bytes"))  # FFmpeg has it for WAV alone


# --- SPHERE


def sphere(coding: str, width: int, data: bytes) -> bytes:
    fields = f"sample_count -i {WHOLE}\nsample_rate -i {RATE}\nchannel_count -i 1\nsample_n_bytes -i {width}\n"
    fields += f"sample_byte_format -s{width} {'01'[-width:]}\nsample_sig_bits -i {8 * width}\n{coding}end_head\n"
    return f"NIST_1A\n   1024\n{fields}".encode().ljust(1024) + data


@pytest.mark.parametrize(
    ("coding", "width"), [("sample_coding -s4 ulaw\n", 1), ("sample_coding -s3 pcm\n", 2), ("", 2)], ids=repr
)
def test_sphere_of_other_codings(written, coding, width):
    data = by_libsndfile("RAW", "ULAW" if width == 1 else "PCM_16")
    assert len(load_audio(written(sphere(coding, width, data)))) == WHOLE
    assert "is cut short" in fault(written(sphere(coding, width, data[:-1000])))


def test_compressed_sphere_is_named(written):
    data = sphere("sample_coding -s26 pcm,embedded-shorten-v2.00\n", 2, b"ajkg\x02" + bytes(5000))
    assert "is a compressed SPHERE file (pcm,embedded-shorten-v2.00); convert it" in fault(written(data))


# --- ADPCM


@pytest.mark.parametrize("codec", ["adpcm_ima_wav", "adpcm_ms"])
def test_adpcm_whose_header_does_not_tell_the_bytes_a_second(written, codec):
    data = bytearray(by_ffmpeg("wav", codec))
    place = data.index(b"fmt ") + 16
    data[place : place + 4] = bytes(4)
    assert WHOLE <= len(load_audio(written(data))) < WHOLE + 2400


def test_flac_whose_header_tells_too_few_samples(files, written):
    assert "its header tells 9000 samples, but 9600 are there" in fault(written(flac_with_total(files["flac"], 9000)))


@pytest.mark.parametrize("name", ["wav-16", "aiff", "au"])
def test_header_that_tells_too_few_bytes(files, written, name):
    data = bytearray(files[name])
    order, place = {"wav-16": ("<", b"data"), "aiff": (">", b"SSND"), "au": (">", b".snd")}[name]
    at = data.index(place) + (8 if name == "au" else 4)
    (size,) = struct.unpack(f"{order}I", data[at : at + 4])
    data[at : at + 4] = struct.pack(f"{order}I", size - 2000)
    assert "behind the end that its header tells" in fault(written(data)) or "contradicts itself" in fault(
        written(data)
    )


@pytest.mark.parametrize("name", ["wav-16", "wavex", "rf64", "w64", "aiff", "au", "caf", "flac", "m4a", "mka-flac"])
def test_two_files_joined_are_named(files, written, name):
    assert "holds a second recording" in fault(written(files[name] * 2))


@pytest.mark.parametrize("name", ["wav-16", "wav-float"])
@pytest.mark.parametrize("more", [b"LIST\x04\0\0\0INFO", ID3V1, ID3V2, bytes(100), b"\0"], ids=repr)
def test_wav_with_tags_behind_it(files, written, name, more):
    assert len(load_audio(written(files[name] + more))) == WHOLE


# --- MP3


@pytest.mark.parametrize("name", MP3)
def test_tags_around_mp3(files, written, name):
    whole = len(load_audio(written(files[name])))
    assert len(load_audio(written(ID3V2 + files[name] + ID3V1))) == whole


@pytest.mark.parametrize("second", ["mp3-xing", "mp3-cbr-bare", "mp3-vbr-bare"])
@pytest.mark.parametrize("first", ["mp3-xing", "mp3-cbr-bare", "mp3-vbr-bare"])
@pytest.mark.parametrize("tagged", [False, True])
def test_joined_mp3(files, written, first, second, tagged):
    tags = (ID3V2, ID3V1) if tagged else (b"", b"")
    one, other = (tags[0] + files[name] + tags[1] for name in (first, second))
    expected = len(load_audio(written(one))) + len(load_audio(written(other)))
    path = written(one + other)
    audio = load_audio(path)
    assert expected <= len(audio) <= expected + 600  # padding is dropped where the count of frames is the file's
    assert seconds_of(path) == len(audio) / RATE
    np.testing.assert_allclose(load_audio(path, offset=0.8, duration=0.1), audio[12_800:14_400], atol=1e-4)


@pytest.mark.parametrize("rate", [44_100, 16_000, 8_000])
def test_mp3_of_ffmpeg_has_the_samples_that_went_in(written, rate):
    """Its checksum of the first frame covers more bytes than LAME's, when the sound is mono."""
    path = written(by_ffmpeg("mp3", "libmp3lame", rate=rate))
    assert len(load_audio(path)) == WHOLE and seconds_of(path) == SECONDS


def test_joined_mp3_of_two_rates_is_named(files, written):
    assert "parts of 16000 and 44100 samples a second" in fault(written(files["mp3-xing"] + files["mp3-xing-44100"]))


def test_mp3_without_some_of_its_frames_is_named(files, written):
    data = files["mp3-xing"]
    assert "begins neither a frame nor a tag" in fault(written(data[:1000] + data[1500:]))


def test_mp3_of_fewer_frames_than_it_tells_is_named(files, written):
    data = files["mp3-xing"]
    frame = 3 * 48_000 // 1000  # any cut at the end of a frame
    ends = [at for at in range(400, len(data) - 10) if data[at : at + 2] == data[:2]]
    assert frame and "frames are there" in fault(written(data[: ends[len(ends) // 2]]))


# --- Ogg


@pytest.mark.parametrize("name", ["ogg-vorbis", "ogg-opus", "ogg-flac"])
def test_chained_ogg(files, written, name):
    path = written(files[name] * 3)
    audio = load_audio(path)
    assert len(audio) == 3 * WHOLE and seconds_of(path) == pytest.approx(3 * SECONDS)
    np.testing.assert_allclose(audio[WHOLE : 2 * WHOLE], load_audio(written(files[name])), atol=1e-6)
    np.testing.assert_allclose(
        load_audio(written(files[name] * 3), offset=0.5, duration=0.2), audio[8000:11_200], atol=1e-6
    )


def test_ogg_without_its_last_page_is_named(files, written):
    data = files["ogg-vorbis"]
    assert "not the end of the stream" in fault(written(data[: data.rindex(b"OggS")]))


def test_ogg_page_that_was_changed_is_named(files, written):
    data = bytearray(files["ogg-vorbis"])
    data[-50] ^= 1
    assert "does not agree with its checksum" in fault(written(data))


# --- channels


@pytest.mark.parametrize("container", ["WAV", "FLAC"])
def test_stereo_of_opposite_phase_is_told(written, container, tmp_path):
    sound = samples()
    soundfile.write(tmp_path / "x", np.stack([sound, -sound], 1), RATE, format=container, subtype="PCM_16")
    found = fault(tmp_path / "x")
    assert "opposite phase" in found and "'pan=mono|c0=c0'" in found  # a shell takes a bare | for a pipe


def test_stereo_of_two_voices_is_read(tmp_path):
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "x", rng.normal(0, 0.1, (9600, 2)), RATE, format="WAV", subtype="PCM_16")
    assert len(load_audio(tmp_path / "x")) == 9600


def test_many_channels_of_which_one_sounds_are_read(tmp_path):
    sound = np.zeros((9600, 200))
    sound[:, 7] = samples()
    soundfile.write(tmp_path / "x", sound, RATE, format="WAV", subtype="PCM_16")
    assert len(load_audio(tmp_path / "x")) == 9600


@pytest.mark.parametrize("data", [b"\xff\xfb\x00\x00" + bytes(500), bytes(417)], ids=["free-format", "zeros"])
def test_reason_is_no_list_of_formats(written, data):
    assert "whitelist" not in fault(written(data * 20))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
@pytest.mark.parametrize("name", ["wav-16", "flac", "mp3-xing", "m4a"])
def test_name_that_is_no_unicode(files, tmp_path, name):
    path = os.path.join(tmp_path, os.fsdecode(b"\xff\xfe.wav"))
    with open(path, "wb") as file:
        file.write(files[name])
    assert len(load_audio(path)) >= WHOLE
    with pytest.raises(AudioError, match="is cut short|is damaged"), open(path, "r+b") as file:
        file.truncate(len(files[name]) // 2)
        load_audio(path)


def test_silent_stereo_is_read(tmp_path):
    soundfile.write(tmp_path / "x", np.zeros((9600, 2)), RATE, format="WAV", subtype="PCM_16")
    assert len(load_audio(tmp_path / "x")) == 9600


# --- anything


PLAYLIST = "#EXTM3U\n#EXTINF:1,\nfile://{}\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize("text", [PLAYLIST, "ffconcat version 1.0\nfile {}\n"], ids=["m3u8", "ffconcat"])
def test_playlist_opens_no_other_file(tmp_path, files, text):
    (tmp_path / "secret.wav").write_bytes(files["wav-16"])
    (tmp_path / "list").write_text(text.format(tmp_path / "secret.wav"))
    assert "cannot be decoded" in fault(tmp_path / "list")


def test_damaged_anywhere(files, tmp_path, capfd, fuzz):
    """Audio, or one line of fault. If fewer samples come out than of the intact file, it is a fault."""
    path, rng = tmp_path / "recording", random.Random(0)
    lengths = {}
    for name, data in files.items():
        path.write_bytes(data)
        lengths[name] = len(load_audio(path))
    names = sorted(files)
    for number in range(fuzz(300)):
        name = names[number % len(names)]
        kind, data = damaged(files[name], rng)
        path.write_bytes(data)
        try:
            audio = load_audio(path)
        except AudioError as error:
            assert str(error).startswith(f"{path}: ") and len(str(error).splitlines()) == 1
            continue
        assert audio.dtype == np.float32 and np.isfinite(audio).all()
        whole_frames = name in WITHOUT_LENGTH and kind in ("cut", "missing", "zeros")
        rate_alone = name in WITH_ONE_RATE and kind in ("header", "bits")
        block_alone = name in WITHOUT_CHECKSUM and kind == "bits" and len(audio) >= lengths[name] - 1200
        header_counted = name.startswith(("wav", "rf64")) and lengths[name] - len(audio) < 60  # as some recorders do
        unseen = whole_frames or rate_alone or block_alone or header_counted
        assert len(audio) >= lengths[name] or unseen, (number, name, kind)
    said = capfd.readouterr()
    assert said.out == said.err == ""


# --- 30 s and a few samples


@pytest.mark.parametrize(("count", "taken"), [(480_000, True), (480_001, True), (480_159, True), (480_160, False)])
def test_thirty_seconds_and_a_few_samples_are_thirty_seconds(tmp_path, processor, count, taken):
    """Chunked corpora have such clips. They give as many mel frames as the encoder takes, in training and in use."""
    audio = np.resize(samples(), count)
    soundfile.write(tmp_path / "x.flac", audio, RATE)
    (tmp_path / "m.jsonl").write_text('{"audio_filepath": "x.flac", "text": "one"}\n')
    left_out = []
    chosen = select_samples([tmp_path / "m.jsonl"], left_out, stage=1)
    assert (len(chosen.samples), len(left_out)) == (int(taken), int(not taken))
    pieces = list(stream_windows(read_blocks(tmp_path / "x.flac")))
    assert len(pieces) == (1 if taken else 2)
    if taken:
        assert features(processor, chosen.samples[0]).shape[1] == processor.features(pieces[0]).shape[1] == 3000


@pytest.mark.parametrize("seconds", [0.5, 29.0, 31.0, 61.2, 100.0])
@pytest.mark.parametrize("block", [577, 16_000, 10**7])
def test_windows_of_blocks_are_those_of_the_whole(seconds, block):
    audio = np.random.default_rng(0).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)
    blocks = (audio[start : start + block] for start in range(0, len(audio), block))
    for found, wanted in zip(stream_windows(blocks), windows(audio), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_memory_does_not_grow_with_the_length(tmp_path):
    """Three minutes at 192 kHz, 138 MB as samples, are cut into windows within 60 MB."""
    with soundfile.SoundFile(tmp_path / "x.flac", "w", 192_000, 1) as file:
        for _ in range(3):
            file.write(np.zeros(60 * 192_000, np.float32))
    program = (
        "import resource, sys\n"
        "from soundwave.inference.long import stream_windows\n"
        "from soundwave.data.audio import read_blocks\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = peak()\n"
        "print(sum(map(len, stream_windows(read_blocks(sys.argv[1])))), peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "x.flac"], capture_output=True, text=True)
    count, grown = map(int, done.stdout.split())
    assert count == 180 * RATE and grown < 60

"""One recording in every container and codec that is read, and the ways in which files get damaged."""

import io
import random
from collections.abc import Callable

import av
import numpy as np
import soundfile

RATE = 16_000
SECONDS = 0.6
MAGIC_END = 120  # bytes in which the headers are


def samples(seconds: float = SECONDS, rate: int = RATE) -> np.ndarray:
    """A tone that swells, and noise: float32 [samples]."""
    time = np.arange(round(seconds * rate)) / rate
    tone = 0.3 * np.sin(2 * np.pi * 220 * time) * (1 + 0.5 * np.sin(2 * np.pi * 3 * time))
    return (tone + 0.02 * np.random.default_rng(0).standard_normal(len(time))).astype(np.float32)


def by_libsndfile(container: str, subtype: str, rate: int = RATE, seconds: float = SECONDS, **options) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples(seconds, rate), rate, format=container, subtype=subtype, **options)
    return file.getvalue()


def by_ffmpeg(container: str, codec: str, rate: int = RATE, seconds: float = SECONDS, **options: str) -> bytes:
    """Encoded by FFmpeg's libraries; `options` are those of the container (write_xing, live, movflags)."""
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=options) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.layout = "mono"
        stream.bit_rate = 48_000
        sound = av.AudioFrame.from_ndarray(samples(seconds, rate)[None], format="fltp", layout="mono")
        sound.sample_rate = rate
        fifo = av.AudioFifo()
        resampler = av.AudioResampler(format=stream.codec_context.format, layout="mono", rate=rate)
        for frame in [*resampler.resample(sound), *resampler.resample(None)]:
            frame.pts = None
            fifo.write(frame)
        stream.codec_context.open()
        size, position = stream.codec_context.frame_size or 1024, 0
        while (frame := fifo.read(size) or fifo.read(partial=True)) is not None:
            frame.pts, position = position, position + frame.samples
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


# name -> a function that makes the file. Those of LOSSLESS give exactly the samples that went in.
LOSSLESS: dict[str, Callable[[], bytes]] = {
    "wav-16": lambda: by_libsndfile("WAV", "PCM_16"),
    "wav-24": lambda: by_libsndfile("WAV", "PCM_24"),
    "wav-float": lambda: by_libsndfile("WAV", "FLOAT"),
    "wavex": lambda: by_libsndfile("WAVEX", "PCM_16"),
    "rf64": lambda: by_libsndfile("RF64", "PCM_16"),
    "w64": lambda: by_libsndfile("W64", "PCM_16"),
    "aiff": lambda: by_libsndfile("AIFF", "PCM_16"),
    "aiff-float": lambda: by_libsndfile("AIFF", "FLOAT"),
    "au": lambda: by_libsndfile("AU", "PCM_16"),
    "sphere": lambda: by_libsndfile("NIST", "PCM_16"),
    "caf": lambda: by_libsndfile("CAF", "PCM_16"),
    "caf-alac": lambda: by_libsndfile("CAF", "ALAC_16"),
    "flac": lambda: by_libsndfile("FLAC", "PCM_16"),
    "ogg-flac": lambda: by_ffmpeg("oga", "flac"),
    "mka-flac": lambda: by_ffmpeg("matroska", "flac"),
}
LOSSY: dict[str, Callable[[], bytes]] = {
    "wav-ulaw": lambda: by_libsndfile("WAV", "ULAW"),
    "wav-ms-adpcm": lambda: by_libsndfile("WAV", "MS_ADPCM"),
    "wav-ima-adpcm": lambda: by_libsndfile("WAV", "IMA_ADPCM"),
    "wav-gsm": lambda: by_libsndfile("WAV", "GSM610"),
    "ogg-vorbis": lambda: by_libsndfile("OGG", "VORBIS"),
    "ogg-opus": lambda: by_libsndfile("OGG", "OPUS"),
    "mp3-xing": lambda: by_libsndfile("MP3", "MPEG_LAYER_III"),
    "mp3-xing-44100": lambda: by_libsndfile("MP3", "MPEG_LAYER_III", rate=44_100),
    "mp3-cbr-bare": lambda: by_ffmpeg("mp3", "libmp3lame", write_xing="0"),
    "mp3-cbr-bare-44100": lambda: by_ffmpeg("mp3", "libmp3lame", rate=44_100, write_xing="0"),
    "mp3-vbr-bare": lambda: without_first_frame(
        by_libsndfile("MP3", "MPEG_LAYER_III", bitrate_mode="VARIABLE", compression_level=0.5)
    ),
    "mp2": lambda: by_ffmpeg("mp2", "mp2"),
    "m4a": lambda: by_ffmpeg("ipod", "aac"),
    "mp4-fragments": lambda: by_ffmpeg("mp4", "aac", movflags="frag_keyframe+empty_moov"),
    "aac": lambda: by_ffmpeg("adts", "aac"),
    "webm": lambda: by_ffmpeg("webm", "libopus", rate=48_000),
    "webm-live": lambda: by_ffmpeg("webm", "libopus", rate=48_000, live="1"),
}
MAKERS = LOSSLESS | LOSSY
MP3 = [name for name in MAKERS if name.startswith("mp") and name not in ("mp4-fragments",)]
# Damage that nothing in a file contradicts: frames of these that are missing as a whole, the sampling rate of those,
# and the name of a block, which then counts as one of another stream.
WITHOUT_LENGTH = {"mp3-cbr-bare", "mp3-cbr-bare-44100", "mp3-vbr-bare", "mp2", "aac"}
WITH_ONE_RATE = {"aiff", "aiff-float", "au", "sphere", "caf", "caf-alac", "m4a", "mp4-fragments"}
WITHOUT_CHECKSUM = {"mka-flac", "webm", "webm-live"}
ID3V2 = b"ID3\x03\0\0\0\0\1\0" + b"TIT2\0\0\0\x05\0\0\0abcd".ljust(128, b"\0")
ID3V1 = b"TAG" + b"title".ljust(125, b"\0")


def without_first_frame(mp3: bytes) -> bytes:
    """An MP3 file without the frame that tells the number of the others, as from a pipe."""
    assert b"Xing" in mp3[:200] or b"Info" in mp3[:200]
    return mp3[mp3.index(mp3[:2], 4) :]


def damaged(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A damaged copy -> what was done to it, and the copy, which is not empty and differs."""
    copy, size = bytearray(data), len(data)
    place, length = rng.randrange(size), rng.randrange(1, 1 + min(2000, size // 4))
    kind = rng.choice(["cut", "bits", "header", "zeros", "missing", "inserted", "doubled"])
    if kind == "cut":
        del copy[max(place, 1) :]
    elif kind == "bits":
        for _ in range(rng.randrange(1, 5)):
            copy[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind == "header":
        for _ in range(rng.randrange(1, 3)):
            copy[rng.randrange(min(size, MAGIC_END))] = rng.choice([0, 255, 127, 128, rng.randrange(256)])
    elif kind == "zeros":
        end = min(place + length, size)
        copy[place:end] = bytes(end - place)
    elif kind == "missing":
        del copy[place : place + length]
    elif kind == "inserted":
        copy[place:place] = rng.randbytes(length)
    else:
        copy[place:place] = copy[place : place + length]
    return kind, bytes(copy) or data[:1]

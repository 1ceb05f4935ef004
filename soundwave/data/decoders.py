"""Decoders: libsndfile (soundfile) where it reads a file to its end, FFmpeg's libraries (PyAV) elsewhere.

libsndfile guesses the length of an MP3 file, wants one in a FLAC file, reads only the first stream of an Ogg chain, and
has no AAC. PyAV brings FFmpeg's libraries with it; no program of that name is needed.
"""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import soundfile

from soundwave.data.containers import CONVERT, Corrected, Fault, check, first_flac_frame
from soundwave.data.mpeg import Part, is_mpeg, read_parts, skip_tags
from soundwave.data.ogg import read_links

BLOCK = 1 << 18  # samples of each channel that libsndfile decodes at once
RESERVOIR = 10  # frames before the first wanted one that a decoder of MP3 needs
# libsndfile's formats whose end is checked, by `check` or by libsndfile itself.
READABLE = {"WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "NIST", "CAF", "FLAC", "OGG", "HTK"}
BEGINNINGS = {b"RIFF", b"RF64", b"RIFX", b"riff", b"FORM", b".snd", b"dns.", b"NIST", b"caff", b"fLaC", b"OggS"}
# FFmpeg's readers of one file. Its readers of playlists are not among them, since these could name any file or address.
READERS = "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,caf,dsf,eac3,flac,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,ogg,tta,wav,wv"
LENGTH_IN_HEADER = {"asf", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2"}  # the others' lengths are estimates
PICTURES = {"png", "mjpeg", "gif", "bmp", "webp", "tiff"}  # codecs of covers
MISSING = 0.1  # s that a decoder may give less than the header tells, because of what an encoder has added


class Source(NamedTuple):
    """A recording that can be decoded.

    Attributes:
        rate: samples a second.
        frames: samples of each channel.
        blocks: blocks(start, stop) decodes the samples [start, stop) -> float32 [n, channels], full scale ±1, block by
            block. It ends early where the recording does, and raises Fault where it is damaged.
        exact: `frames` is exact; else what an encoder has added may be among them.
    """

    rate: int
    frames: int
    blocks: Callable[[int, int], Iterator[np.ndarray]]
    exact: bool = True


def open_source(path: str | Path, file: BinaryIO, stack: ExitStack) -> Source:
    """Choose the decoder of a recording.

    Args:
        file: the opened file, not empty.
        stack: closes what the source needs.

    Raises:
        Fault: the file is no recording, or it is cut short or damaged.
    """
    data = stack.enter_context(mmap(file.fileno(), 0, access=ACCESS_READ))
    if is_mpeg(data):
        return _chain([_mpeg_source(data, part) for part in read_parts(data)])
    if data[:4] == b"OggS":
        links = read_links(data)
        if len(links) > 1 and not any(link.several for link in links):
            return _chain([_link_source(io.BytesIO(data[link.start : link.stop]), stack) for link in links])
    start = skip_tags(data)
    if data[start : start + 4] == b"fLaC" and int.from_bytes(data[start + 18 : start + 26], "big") % (1 << 36) == 0:
        _refuse_second_flac(data)  # its number of samples is unknown
        return _av_source(file)
    fixes = check(data)
    if not _is_for_libsndfile(data):
        return _av_source(file, "Format not recognised")
    try:
        opened = soundfile.SoundFile(Corrected(file, fixes) if fixes else os.fsencode(path))
    except soundfile.LibsndfileError as error:
        reason = "cut short or damaged" if data[:4] == b"fLaC" else error.error_string.rstrip(".")
        return _av_source(file, reason or "damaged")
    stack.enter_context(opened)
    if opened.subtype.startswith("MPEG"):  # in a WAV file; libsndfile's decoder would print what it finds wrong
        return _av_source(file)
    return _soundfile_source(opened, str(path))


def _link_source(file: io.BytesIO, stack: ExitStack) -> Source:
    """A stream of an Ogg chain. libsndfile opens FLAC in Ogg only by a path."""
    if file.getbuffer()[28:33] == b"\x7fFLAC":
        return _av_source(file)
    return _soundfile_source(stack.enter_context(soundfile.SoundFile(Corrected(file))))


def _is_for_libsndfile(data: mmap) -> bool:
    """Whether a file begins as those that libsndfile reads. It looks for MP3 frames in all others, and prints that."""
    start = skip_tags(data)
    htk = 2 * int.from_bytes(data[:4], "big") + 12 == len(data)  # a header without a name
    return htk or data[start : start + 4] in BEGINNINGS


def _soundfile_source(opened: soundfile.SoundFile, path: str = "") -> Source:
    """A recording for libsndfile; `path` is that of the whole file."""
    if opened.format not in READABLE:
        raise Fault(f"is a {opened.format} file, whose end cannot be checked; convert it to WAV, e.g. with sox")

    def blocks(start: int, stop: int) -> Iterator[np.ndarray]:
        position = opened.seek(start) if start and opened.seekable() else 0
        while position < stop:
            try:
                block = opened.read(min(stop - position, BLOCK), dtype="float32", always_2d=True)
            except soundfile.LibsndfileError as error:
                raise Fault(f"is cut short or damaged ({error.error_string.rstrip('.')}); {CONVERT}") from None
            if not len(block):
                break
            position += len(block)
            if position > start:
                yield block[max(start - position + len(block), 0) :]
        if opened.format == "FLAC" and position == opened.frames:
            _refuse_more_flac(path, opened.frames)

    return Source(opened.samplerate, opened.frames, blocks)


def _refuse_more_flac(path: str, frames: int) -> None:
    """Refuse a FLAC file that has more samples than its header tells: they would not be read."""
    import av

    with open(path, "rb") as file, av.open(file, format="flac", metadata_errors="ignore") as container:
        stream = container.streams.audio[0]
        ticks = sum(packet.duration or 0 for packet in container.demux(stream))
        there = round(ticks * stream.time_base * stream.rate)
        with mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            _refuse_second_flac(data)
    if there > frames:
        raise Fault(f"its header tells {frames} samples, but {there} are there; {CONVERT}")


def _refuse_second_flac(data: mmap) -> None:
    second = data.find(b"fLaC\0\0\0\x22", first_flac_frame(data, skip_tags(data)))
    if second > 0:
        raise Fault(f"holds a second recording from byte {second} on, which would not be read; split it into two files")


def _mpeg_source(data: mmap, part: Part) -> Source:
    frames = part.frames
    last = sum(frame.samples for frame in frames) - part.padding

    def blocks(start: int, stop: int) -> Iterator[np.ndarray]:
        from av import CodecContext, Packet
        from av.error import FFmpegError

        decoder = CodecContext.create(f"mp{frames[0].layer}float", "r")
        start, stop = start + part.delay, min(stop + part.delay, last)
        position, before = 0, RESERVOIR * frames[0].samples
        for frame in frames:
            position += frame.samples
            if position <= start - before:
                continue
            if position - frame.samples >= stop:
                return
            try:
                packet = Packet(data[frame.position : frame.position + frame.size])
                decoded = np.concatenate([_samples(found) for found in decoder.decode(packet)])
            except (FFmpegError, ValueError) as error:
                if position <= start or frame is frames[0]:  # what it needs of the frames before is not there
                    decoded = np.zeros((frame.samples, 1), np.float32)
                else:
                    raise Fault(
                        f"is damaged, the frame at byte {frame.position} cannot be decoded; {CONVERT}"
                    ) from error
            if len(decoded) != frame.samples:
                raise Fault(f"is damaged, the frame at byte {frame.position} cannot be decoded; {CONVERT}")
            first = max(start - position + frame.samples, 0)
            if first < frame.samples:
                yield decoded[first : frame.samples - max(position - stop, 0)]

    return Source(frames[0].rate, max(last - part.delay, 0), blocks)


def _av_source(file: BinaryIO, unknown: str = "unknown format") -> Source:
    """A recording for FFmpeg's libraries.

    Args:
        unknown: the reason to give where they have none for not reading it.

    Raises:
        Fault: they cannot read it.
    """
    import av

    options = {"format_whitelist": READERS, "protocol_whitelist": ""}
    said: list[str] = []  # FFmpeg decodes much of a damaged file, and reports only in its log what is wrong with it

    def opened() -> Any:
        file.seek(0)
        return av.open(file, metadata_errors="ignore", options=options)

    with _listening(said, unknown), opened() as container:
        if not container.streams.audio:
            raise Fault("has no sound; name a recording")
        stream = container.streams.audio[0]
        if stream.codec_context is None:
            raise Fault(f"has sound in a codec that is not known; {CONVERT}")
        rate, seconds = stream.rate, None
        if container.format.name in LENGTH_IN_HEADER:
            seconds = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / 1_000_000
        if not seconds:
            seconds = sum(packet.duration or 0 for packet in container.demux(stream)) * stream.time_base

    def blocks(start: int, stop: int) -> Iterator[np.ndarray]:
        position = 0
        with _listening(said, unknown):
            container = opened()
        with container:
            stream = container.streams.audio[0]
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"err_detect": "explode+crccheck"}
            frames = container.decode(stream)
            while position < stop:
                with _listening(said, "the decoder stopped", "is cut short or damaged"):
                    frame = next(frames, None)
                    if frame is None:
                        break
                    block = _samples(frame)
                if frame.rate != rate:
                    raise Fault(f"has parts of {rate} and {frame.rate} samples a second; {CONVERT}")
                position += len(block)
                if position > start:
                    yield block[max(start - position + len(block), 0) : len(block) - max(position - stop, 0)]
        if said:
            raise Fault(f"is cut short or damaged ({said[0]}); {CONVERT}")

    return Source(rate, round(seconds * rate), blocks, exact=False)


@contextmanager
def _listening(said: list[str], otherwise: str, fault: str = "cannot be decoded") -> Iterator[None]:
    """Add what FFmpeg's libraries report as errors to `said`, and turn their exceptions into a Fault with it."""
    from av import logging
    from av.error import FFmpegError

    level, skips = logging.get_level(), logging.get_skip_repeated()
    logging.set_level(logging.ERROR)
    logging.set_skip_repeated(False)
    try:
        with logging.Capture() as lines:
            yield
    except (FFmpegError, ValueError, OverflowError, MemoryError):
        said.extend(reason for reason in _reasons(lines) if "whitelist" not in reason)  # no reason for a user
        raise Fault(f"{fault} ({said[0] if said else otherwise}); {CONVERT}") from None
    finally:
        logging.set_level(level)
        logging.set_skip_repeated(skips)
    said.extend(_reasons(lines))


def _reasons(lines: list[tuple[int, str, str]]) -> list[str]:
    """What FFmpeg's lines say about the sound, each on one line. A broken cover picture does not matter."""
    return [" ".join(text.split()).rstrip(".") for _, name, text in lines if name not in PICTURES]


def _samples(frame: Any) -> np.ndarray:
    """The samples of one of PyAV's frames -> float32 [n, channels], full scale ±1."""
    values = frame.to_ndarray()
    values = values.T if frame.format.is_planar else values.reshape(-1, frame.layout.nb_channels)
    if values.dtype == np.uint8:
        return (values.astype(np.float32) - 128) / 128
    if values.dtype.kind == "i":
        return (values / 2.0 ** (8 * values.dtype.itemsize - 1)).astype(np.float32)
    return values.astype(np.float32)


def _chain(sources: list[Source]) -> Source:
    """Recordings that follow each other as one."""
    rates = sorted({source.rate for source in sources})
    if len(rates) > 1:
        raise Fault(f"has parts of {rates[0]} and {rates[-1]} samples a second; {CONVERT}")
    if len(sources) == 1:
        return sources[0]

    def blocks(start: int, stop: int) -> Iterator[np.ndarray]:
        begin = 0
        for source in sources:
            end = begin + source.frames
            if start < end and begin < stop:
                yield from source.blocks(max(start - begin, 0), min(stop, end) - begin)
            begin = end

    return Source(rates[0], sum(source.frames for source in sources), blocks)

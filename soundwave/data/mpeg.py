"""The frames of an MPEG audio file (MP3, and the older layers MP2 and MP1), found without decoding it.

Such a file is a row of frames, and nothing in it must tell its length. In many files the first frame has no sound, but
the number of the others (Xing, Info, VBRI). Files from a pipe or a stream lack it, and in joined files it counts the
frames of one part only. So the frames are counted here. Bytes that are neither frame nor tag are damage.

The frames: ISO/IEC 11172-3 and 13818-3. The first frame: gabriel.mp3-tech.org/mp3infotag.html.
"""

from collections.abc import Iterator
from itertools import pairwise
from mmap import mmap
from typing import NamedTuple

from soundwave.data.containers import CONVERT, Fault

# kbit/s of a header's bit rate index, by (version, layer); versions 2 and 2.5 share theirs.
BIT_RATES = {
    (1, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
# Hz of a header's rate index, by its version bits: 3 is version 1, 2 is version 2, 0 is version 2.5.
SAMPLING_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
DECODER_DELAY = 529  # samples that a decoder of layer III gives before the first one that the encoder was given
LAME_TAG = 190  # bytes of LAME's field that its checksum covers, from the frame's beginning


class Frame(NamedTuple):
    """A frame: its place and size in bytes, the samples of each channel, samples a second, and its layer (1, 2, 3)."""

    position: int
    size: int
    samples: int
    rate: int
    layer: int


class Part(NamedTuple):
    """Frames that one encoder wrote. It has added `delay` samples before the sound, and `padding` samples after it."""

    frames: list[Frame]
    delay: int = 0
    padding: int = 0


class _Info(NamedTuple):
    """What a first frame without sound says. A count is None if it is not there."""

    frames: int | None
    size: int | None
    delay: int
    padding: int


def is_mpeg(data: bytes | mmap) -> bool:
    """Whether a file begins, after its tags, with a frame that a second one, a tag or the end follows."""
    start = skip_tags(data)
    first = _frame(data, start)
    if first is None:
        return False
    end = start + first.size
    return end >= len(data) or _frame(data, end) is not None or _tag_size(data, end) > 0


def skip_tags(data: bytes | mmap) -> int:
    """The first byte that belongs to no tag at the beginning."""
    start = 0
    while size := _tag_size(data, start):
        start += size
    return start


def read_parts(data: bytes | mmap) -> list[Part]:
    """Find all frames with sound; a file that was joined from several has several parts.

    Raises:
        Fault: the file is cut short or damaged, or its parts have different sampling rates.
    """
    parts: list[Part] = []
    infos: list[tuple[_Info, int]] = []  # with the position of its frame
    for frame in _walk(data):
        if (info := _info(data[frame.position : frame.position + frame.size])) is not None:
            parts.append(Part([], info.delay, info.padding))
            infos.append((info, frame.position))
        elif parts:
            parts[-1].frames.append(frame)
        else:
            parts.append(Part([frame]))
            infos.append((_Info(None, None, 0, 0), frame.position))
    if not any(part.frames for part in parts):
        raise Fault(f"holds no frame with sound; {CONVERT}")
    for number, (part, (info, start)) in enumerate(zip(parts, infos, strict=True)):
        end = part.frames[-1].position + part.frames[-1].size if part.frames else start
        if end > len(data):
            raise Fault(f"is cut short, {end - len(data)} bytes of its last frame are missing; {CONVERT}")
        found = len(part.frames)
        # Some encoders count the first frame, too; then the number of bytes tells that nothing is missing.
        if info.frames is not None and found < info.frames and info.size != end - start:
            raise Fault(f"is cut short, {found} of {info.frames} frames are there; {CONVERT}")
        if found != info.frames:  # without a count, or with frames of another encoder behind its own
            parts[number] = part._replace(padding=0)
    parts = [part for part in parts if part.frames]
    for one, other in pairwise(frame.rate for part in parts for frame in part.frames):
        if one != other:
            raise Fault(f"has parts of {one} and {other} samples a second; convert each part to WAV by itself")
    return parts


def _walk(data: bytes | mmap) -> Iterator[Frame]:
    position = 0
    while position < len(data):
        if size := _tag_size(data, position):
            position += size
        elif frame := _frame(data, position):
            yield frame
            position += frame.size
        else:
            raise Fault(f"is damaged, at byte {position} of {len(data)} begins neither a frame nor a tag; {CONVERT}")


def _frame(data: bytes | mmap, position: int) -> Frame | None:
    """The frame whose header is at `position`; None if there is no header."""
    head = data[position : position + 4]
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    bit_rate, sampling_rate, padded = head[2] >> 4, head[2] >> 2 & 3, head[2] >> 1 & 1
    if version == 1 or layer == 4 or bit_rate in (0, 15) or sampling_rate == 3:
        return None
    rate = SAMPLING_RATES[version][sampling_rate]
    bits = 1000 * BIT_RATES[1 if version == 3 else 2, layer][bit_rate]
    if layer == 1:
        return Frame(position, 4 * (12 * bits // rate + padded), 384, rate, layer)
    samples = 576 if layer == 3 and version != 3 else 1152
    return Frame(position, samples // 8 * bits // rate + padded, samples, rate, layer)


def _tag_size(data: bytes | mmap, position: int) -> int:
    """Size of the tag (ID3, APE, Lyrics3) at `position`; 0 if there is none."""
    head = data[position : position + 32]
    if head[:3] == b"ID3" and len(head) >= 10:
        size = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
        return size + (20 if head[5] & 0x10 else 10)
    if head[:3] == b"TAG":
        return 128
    if head[:8] == b"APETAGEX" and len(head) == 32:
        return 32 + (int.from_bytes(head[12:16], "little") if head[23] & 0x20 else 0)
    if head[:11] == b"LYRICSBEGIN":
        end = data.find(b"LYRICS200", position)
        return end + 9 - position if end > 0 else 0
    return 0


def _info(frame: bytes) -> _Info | None:
    """What a frame says about the others; None if it has sound."""
    if frame[36:40] == b"VBRI":
        delay, size, count = (int.from_bytes(frame[a:b], "big") for a, b in ((42, 44), (46, 50), (50, 54)))
        return _Info(count, size, 0, 0) if len(frame) >= 54 and delay < 1 << 16 else None
    if len(frame) < 4:
        return None
    mono, old = frame[3] >> 6 == 3, frame[1] & 8
    place = 4 + ((17 if mono else 32) if old else (9 if mono else 17))
    if frame[place : place + 4] not in (b"Xing", b"Info") or len(frame) < place + 8:
        return None
    flags, at = frame[place + 7], place + 8
    values: list[int | None] = []
    for flag in (1, 2):
        values.append(int.from_bytes(frame[at : at + 4], "big") if flags & flag else None)
        at += 4 if flags & flag else 0
    at += (100 if flags & 4 else 0) + (4 if flags & 8 else 0)
    delay = padding = 0
    if (
        len(frame) >= at + 36
        and int.from_bytes(frame[at + 34 : at + 36], "big")
        in (
            _checksum(frame[: at + 34]),  # LAME's
            _checksum((frame[: at + 34] + bytes(2) + frame[at + 36 :]).ljust(LAME_TAG, b"\0")[:LAME_TAG]),  # FFmpeg's
        )
    ):
        both = int.from_bytes(frame[at + 21 : at + 24], "big")
        delay, padding = (both >> 12) + DECODER_DELAY, max((both & 0xFFF) - DECODER_DELAY, 0)
    return _Info(*values, delay, padding)


def _checksum(data: bytes) -> int:
    """CRC-16 with the polynomial 0x8005, reflected."""
    value = 0
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0xA001 if value & 1 else 0)
    return value

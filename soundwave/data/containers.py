"""Containers (WAV, RF64, W64, AIFF, AU, SPHERE, CAF, MP4, Matroska): is all there that the header tells?

libsndfile reads a file that is cut short without an error, and one whose size was never written as an empty one. So
the sizes in the header are compared with the file's here, and sizes that a recorder did not write, because it was
killed or wrote into a pipe, are corrected.
"""

import io
import re
from collections.abc import Iterator, Sequence
from mmap import mmap
from typing import Any, NamedTuple

CONVERT = "get a whole copy, or convert it: ffmpeg -i FILE FILE.wav"
RATES = (1_000, 1_000_000)  # Hz. Others come from damaged headers, and resampling could then exhaust the memory.
HUGE = 0x7FFF0000  # Recorders that do not know the length announce about 2 or 4 GiB.
UNKNOWN = 1 << 62  # the same for sizes of 64 bits
RIFF = {b"RIFF": "little", b"RF64": "little", b"BW64": "little", b"RIFX": "big"}
FLAC_RATES = dict(
    enumerate((88_200, 176_400, 192_000, 8_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000), start=1)
)
EBML = b"\x1a\x45\xdf\xa3"  # the beginning of a Matroska or WebM file
W64_DATA = b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"


class Fault(Exception):
    """What was found in a file and how to mend it, without the file's name."""


class Fix(NamedTuple):
    """Bytes that replace those at `position`."""

    position: int
    data: bytes


class Corrected(io.RawIOBase):
    """A file whose header is read with corrections."""

    def __init__(self, file: Any, fixes: Sequence[Fix] = ()):
        self._file, self._fixes = file, fixes

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return self._file.seek(offset, whence)
        except (OSError, ValueError):  # before the beginning: an exception in libsndfile's callback would be printed
            return -1

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        start = self._file.tell()
        data = bytearray(self._file.read(len(buffer)))
        for position, fix in self._fixes:
            for place, byte in enumerate(fix, start=position - start):
                if 0 <= place < len(data):
                    data[place] = byte
        buffer[: len(data)] = data
        return len(data)


def check(data: bytes | mmap) -> list[Fix]:
    """Compare the sizes in the header with the file -> the corrections that the header needs.

    Other containers than those named above give no correction.

    Raises:
        Fault: the file is cut short, its header contradicts itself, or more samples follow than the header tells.
    """
    head = data[:16]
    if head[:4] == b"fLaC":
        _check_flac(data)
    if head[:4] in RIFF and data[8:12] == b"WAVE":
        return _check_wave(data)
    if head == b"riff.\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00":
        return _check_w64(data)
    if head[:4] == b"FORM" and data[8:12] in (b"AIFF", b"AIFC"):
        return _check_aiff(data)
    if head[:4] in (b".snd", b"dns."):
        return _check_au(data)
    if head[:7] == b"NIST_1A":
        _check_sphere(data)
    if head[:4] == b"caff":
        return _check_caf(data)
    if head[4:8] == b"ftyp":
        _check_mp4(data)
    if head[:4] == EBML:
        _check_matroska(data)
    return []


def _check_wave(data: bytes | mmap) -> list[Fix]:
    order: Any = RIFF[bytes(data[:4])]
    long_size = None  # of RF64, with its position
    block = 1
    for name, start, size in _chunks(data, 12, order):
        if name == b"ds64":
            long_size = int.from_bytes(data[start + 8 : start + 16], order), start
        elif name == b"fmt ":
            block = _block_of(data, start, order)
        elif name == b"data":
            held = len(data) - start
            if long_size is not None and size == 0xFFFFFFFF:
                size, place = long_size
                size_fix = [(place, held + start - 8), (place + 8, held // block * block)]
                fixes = [Fix(place, value.to_bytes(8, order)) for place, value in size_fix]
                fixes.append(Fix(place + 16, (held // block).to_bytes(8, order)))
                unknown = size > held and size >= UNKNOWN
            else:
                sizes = ((4, min(len(data) - 8, 0xFFFFFFFF)), (start - 4, min(held // block * block, 0xFFFFFFFF)))
                fixes = [Fix(place, value.to_bytes(4, order)) for place, value in sizes]
                unknown = size > held and size >= HUGE
            if unknown or (size == 0 and held >= block and not _ends_in_chunks(data, start, order)):
                return fixes
            if size - held in (start, start - 8):  # Some recorders count the header, too.
                return fixes
            _refuse_cut(size, held)
            _refuse_rest(data, start + size, order, bytes(data[:4]))
            return []
    raise Fault(f"has no samples behind its header, or is damaged; {CONVERT}")


def _block_of(data: bytes | mmap, start: int, order: Any) -> int:
    """The bytes of a block, in which the samples of all channels lie, from the format that begins at `start`.

    Raises:
        Fault: its numbers contradict each other.
    """
    tag, channels, rate, second, block, bits = (
        int.from_bytes(data[start + a : start + b], order)
        for a, b in ((0, 2), (2, 4), (4, 8), (8, 12), (12, 14), (14, 16))
    )
    if RATES[0] <= rate <= RATES[1]:  # others are named as such later
        agree = True
        if tag in (1, 3, 6, 7, 0xFFFE):  # one sample of each channel: integers, floating point, A-law, µ-law
            agree = block == channels * -(-bits // 8) and second in (0, rate * block)
        elif tag in (2, 0x11, 0x31):  # ADPCM and GSM, which tell how many samples a block has
            packed = int.from_bytes(data[start + 18 : start + 20], order)
            agree = not (packed and second) or abs(rate * block / packed - second) <= 0.002 * second + 1
        if not agree:
            raise Fault(
                f"has a header that contradicts itself ({channels} channels of {bits} bits, {block} bytes a block, "
                f"{rate} samples and {second} bytes a second); {CONVERT}"
            )
    return max(block, 1)


def _check_w64(data: bytes | mmap) -> list[Fix]:
    position = 40
    while position + 24 <= len(data):
        size = int.from_bytes(data[position + 16 : position + 24], "little")
        if data[position : position + 4] == b"fmt ":
            _block_of(data, position + 24, "little")
        if data[position : position + 16] == W64_DATA:
            start = position + 24
            held = len(data) - start
            if size >= UNKNOWN or (size in (0, 24) and held):
                sizes = ((16, len(data)), (position + 16, held + 24))
                return [Fix(place, value.to_bytes(8, "little")) for place, value in sizes]
            _refuse_cut(size - 24, held)
            if size - 24 < held - 7 and data[start + (size - 24 + 7) // 8 * 8 :][:4] == b"riff":
                raise _joined(start + size - 24)
            return []
        if size < 24:
            break
        position += (size + 7) // 8 * 8
    raise Fault(f"has no samples behind its header, or is damaged; {CONVERT}")


def _check_aiff(data: bytes | mmap) -> list[Fix]:
    frames, frame_bytes, frames_at = 0, 0, 0
    plain = data[8:12] == b"AIFF"
    for name, start, size in _chunks(data, 12, "big"):
        if name == b"COMM":
            channels, frames, bits = (
                int.from_bytes(data[start + a : start + b], "big") for a, b in ((0, 2), (2, 6), (6, 8))
            )
            frames_at = start + 2
            plain = plain or data[start + 18 : start + 22] in (b"NONE", b"sowt", b"twos", b"in24", b"fl32", b"FL32")
            frame_bytes = channels * -(-bits // 8) if plain else 0
        elif name == b"SSND":
            start += 8
            held = len(data) - start
            whole = held // frame_bytes if frame_bytes else 0
            if whole and ((size > held and size >= HUGE) or (size <= 8 and not _ends_in_chunks(data, start, "big"))):
                sizes = ((4, len(data) - 8), (start - 12, held + 8), (frames_at, whole))
                return [Fix(place, min(value, 0xFFFFFFFF).to_bytes(4, "big")) for place, value in sizes]
            _refuse_cut(size - 8, held)
            if frame_bytes and frames * frame_bytes != size - 8 and (frames + 1) * frame_bytes != size - 8:
                raise Fault(
                    f"has a header that contradicts itself ({frames} samples, but {size - 8} bytes of them); {CONVERT}"
                )
            _refuse_rest(data, start + size - 8, "big", b"FORM")
            return []
    raise Fault(f"has no samples behind its header, or is damaged; {CONVERT}")


def _check_au(data: bytes | mmap) -> list[Fix]:
    order: Any = "big" if data[:4] == b".snd" else "little"
    start, size = (int.from_bytes(data[a : a + 4], order) for a in (4, 8))
    held = max(len(data) - start, 0)
    if size >= HUGE > held or (size == 0 and held):
        return [Fix(8, held.to_bytes(4, order))]
    _refuse_cut(size, held)
    if data[start + size :][:4] == data[:4]:
        raise _joined(start + size)
    if any(data[start + size :]):
        raise _more(held - size)
    return []


def _check_sphere(data: bytes | mmap) -> None:
    size = re.match(rb"NIST_1A\s+(\d+)\s", data[:64])
    header = data[: int(size[1])] if size else b""
    fields = dict(re.findall(rb"^(\w+) -i (-?\d+)", header, re.MULTILINE))
    coding = re.search(rb"^sample_coding -s\d+ (\S+)", header, re.MULTILINE)
    if coding and b"embedded" in coding[1]:
        name = coding[1].decode("ascii", "replace")
        raise Fault(f"is a compressed SPHERE file ({name}); convert it: sph2pipe -f wav FILE FILE.wav")
    if b"sample_count" in fields:
        count, channels, width = (
            int(fields.get(name, 1)) for name in (b"sample_count", b"channel_count", b"sample_n_bytes")
        )
        _refuse_cut(count * channels * width, len(data) - len(header))


def first_flac_frame(data: bytes | mmap, start: int = 0) -> int:
    """Where the header of a FLAC recording ends that begins at `start`; a picture may be in it."""
    position, last = start + 4, False
    while not last and position + 4 <= len(data):
        last = data[position] >= 128
        position += 4 + int.from_bytes(data[position + 1 : position + 4], "big")
    return position


def _check_flac(data: bytes | mmap) -> None:
    """Compare the sampling rate in the header with that of the first frame. libFLAC checks everything else."""
    position = first_flac_frame(data)
    frame = data[position : position + 3]
    rate = int.from_bytes(data[18:21], "big") >> 4
    if len(frame) == 3 and frame[0] == 0xFF and frame[1] in (0xF8, 0xF9):
        of_frame = FLAC_RATES.get(frame[2] & 15, rate)
        if of_frame != rate:
            raise Fault(f"has a header that contradicts itself ({rate} and {of_frame} samples a second); {CONVERT}")


def _check_caf(data: bytes | mmap) -> list[Fix]:
    position = 8
    while position + 12 <= len(data):
        size = int.from_bytes(data[position + 4 : position + 12], "big", signed=True)
        if data[position : position + 8] == b"desc\0\0\0\0":
            numbers = (
                int.from_bytes(data[place : place + 4], "big") for place in range(position + 28, position + 44, 4)
            )
            packet, frames, channels, bits = numbers
            if data[position + 20 : position + 24] == b"lpcm" and packet != frames * channels * -(-bits // 8):
                raise Fault(
                    f"has a header that contradicts itself ({channels} channels of {bits} bits, {packet} bytes a "
                    f"sample); {CONVERT}"
                )
        if data[position : position + 4] == b"data":
            held = len(data) - position - 12
            if size == -1:
                return [Fix(position + 4, held.to_bytes(8, "big"))]
            _refuse_cut(size, held)
            if data[position + 12 + size :][:4] == b"caff":
                raise _joined(position + 12 + size)
            return []
        if size < 0:
            break
        position += 12 + size
    raise Fault(f"has no samples behind its header, or is damaged; {CONVERT}")


def _check_mp4(data: bytes | mmap) -> None:
    position = 0
    while position + 8 <= len(data):
        size, name = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        if size == 1:
            size = int.from_bytes(data[position + 8 : position + 16], "big")
        if position and name == b"ftyp":
            raise _joined(position)
        if size == 0:  # up to the end
            return
        if size < 8:
            raise Fault(f"is damaged, at byte {position} begins no box; {CONVERT}")
        _refuse_cut(size, len(data) - position)
        position += size


def _check_matroska(data: bytes | mmap) -> None:
    position = 4
    for wanted in (None, b"\x18\x53\x80\x67"):  # the header, whose name is read already; the segment
        if wanted and data[position : position + 4] != wanted:
            return  # something else lies between them: the decoder will tell
        position += 4 if wanted else 0
        first = data[position] if position < len(data) else 0
        length = 9 - first.bit_length()
        value = int.from_bytes(data[position : position + length], "big") % (1 << 7 * length)
        position += length
        if wanted is None:
            position += value
        elif value != (1 << 7 * length) - 1:  # all ones: a recorder that did not know
            _refuse_cut(value, len(data) - position)
            position += value
            if data[position : position + 4] == EBML:
                raise _joined(position)


def _chunks(data: bytes | mmap, position: int, order: Any) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and size of each chunk; the size is what the file tells."""
    while position + 8 <= len(data):
        size = int.from_bytes(data[position + 4 : position + 8], order)
        yield bytes(data[position : position + 4]), position + 8, size
        position += 8 + size + size % 2


def _ends_in_chunks(data: bytes | mmap, position: int, order: Any) -> bool:
    """Whether chunks with names of letters fill the file from `position` on."""
    while position + 8 <= len(data):
        if not re.fullmatch(rb"[ -~]{4}", data[position : position + 4]):
            return False
        size = int.from_bytes(data[position + 4 : position + 8], order)
        position += 8 + size + size % 2
    return position in (len(data), len(data) + 1)


def _refuse_cut(size: int, held: int) -> None:
    if size > held:
        raise Fault(f"is cut short, {held} of {size} bytes are there; {CONVERT}")


def _refuse_rest(data: bytes | mmap, end: int, order: Any, name: bytes) -> None:
    """Refuse samples behind the announced ones. Other chunks, tags and zeros may follow."""
    rest = data[end : end + 4], data[end + 1 : end + 5]
    if name in rest:
        raise _joined(end)
    tagged = any(part.startswith((b"ID3", b"TAG", b"APET", b"LYRI")) for part in rest)
    chunks = [start for start in sorted({end, end + end % 2}) if _ends_in_chunks(data, start, order)]
    for chunk, start, size in _chunks(data, chunks[0], order) if chunks else ():
        if chunk in (b"data", b"SSND") and size:
            raise _joined(start - 8)
    if not (tagged or chunks or len(data) - end < 4 or not any(data[end:])):
        raise _more(len(data) - end, name)


def _joined(end: int) -> Fault:
    return Fault(f"holds a second recording from byte {end} on, which would not be read; split it into two files")


def _more(rest: int, name: bytes = b"") -> Fault:
    advice = "get a whole copy, or correct the header"
    if name in RIFF:  # FFmpeg has the option for these alone
        advice = "correct the header: ffmpeg -ignore_length 1 -i FILE FILE.wav"
    return Fault(f"has {rest} bytes behind the end that its header tells; {advice}")

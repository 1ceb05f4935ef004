"""The pages of an Ogg file, checked without decoding it.

Every page has a checksum and a number, and the last page of a stream is marked, so that damage, a missing page and a
missing end can be seen. A file that was joined from several, or recorded from an internet radio, is a chain of
streams, each of which is a whole Ogg file. The format: RFC 3533.
"""

import zlib
from mmap import mmap
from typing import NamedTuple

from soundwave.data.containers import CONVERT, Fault

FIRST, LAST = 2, 4  # flags of a page
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class Link(NamedTuple):
    """One stream of a chain: its bytes are data[start:stop]. `several`: other streams lie between its pages."""

    start: int
    stop: int
    several: bool


def read_links(data: bytes | mmap) -> list[Link]:
    """Find the streams that follow each other in an Ogg file.

    Raises:
        Fault: the file is cut short or damaged.
    """
    links: list[Link] = []
    position, start = 0, 0
    numbers: dict[int, int] = {}  # number of the last page of each stream that has not ended
    seen = 0  # streams of the link
    while position < len(data):
        head = data[position : position + 27]
        table = data[position + 27 : position + 27 + head[26]] if len(head) == 27 else b""
        size = 27 + len(table) + sum(table)
        if head[:4] != b"OggS":
            if not numbers and links and not any(data[position:]):
                break  # zeros after the end
            raise Fault(f"is damaged, at byte {position} of {len(data)} begins no page; {CONVERT}")
        if len(head) < 27 or len(table) < head[26] or position + size > len(data):
            raise Fault(f"is cut short, its last page is not whole; {CONVERT}")
        page = data[position : position + size]
        if _checksum(page[:22] + bytes(4) + page[26:]) != int.from_bytes(page[22:26], "little"):
            raise Fault(f"is damaged, the page at byte {position} does not agree with its checksum; {CONVERT}")
        flags, serial, number = head[5], int.from_bytes(head[14:18], "little"), int.from_bytes(head[18:22], "little")
        if flags & FIRST:
            if not numbers:
                start, seen = position, 0
            seen += 1
        elif serial not in numbers or number != (numbers[serial] + 1) % 2**32:
            raise Fault(f"is damaged, pages before byte {position} are missing; {CONVERT}")
        numbers[serial] = number
        position += size
        if flags & LAST:
            del numbers[serial]
            if not numbers:
                links.append(Link(start, position, seen > 1))
    if numbers:
        raise Fault(f"is cut short, its last page is not the end of the stream; {CONVERT}")
    return links


def _checksum(page: bytes) -> int:
    """CRC-32 as Ogg has it: zlib's with all bits in the other order, without inverting the value."""
    value = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{value:032b}"[::-1], 2)

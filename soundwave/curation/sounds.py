"""Decode recordings in processes of their own, to measure them and to find what is wrong with them.

A recording that ends the process which decodes it is found by itself, and takes no other with it.
"""

import hashlib
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import islice
from typing import NamedTuple

import numpy as np

from soundwave.data.audio import AudioError, rate_and_seconds_of, read_blocks

CLIPS_AT_ONCE = 32  # of a process
AHEAD = 3  # so many times the processes' work is handed out before its results are taken
FULL_SCALE = 32767


class Part(NamedTuple):
    """A recording, or a part of one, as a manifest names it."""

    audio: str
    offset: float
    duration: float | None


class Sound(NamedTuple):
    """What a part of a recording holds.

    Attributes:
        samples: at 16 kHz.
        rate: samples a second in the file.
        file_seconds: length of the file, as its header tells.
        peak: the largest sample, full scale 1.
        digest: 64 bits that are the same for the same sound, to 16 bits of each sample.
        fault: why it cannot be read; "" if it can. Then `samples` is 0.
    """

    samples: int = 0
    rate: int = 0
    file_seconds: float = 0.0
    peak: float = 0.0
    digest: int = 0
    fault: str = ""


def measure(part: Part) -> Sound:
    """Decode a part of a recording."""
    digest = hashlib.blake2b(digest_size=8)
    samples, peak, rate, seconds = 0, 0.0, 0, 0.0
    try:
        rate, seconds = rate_and_seconds_of(part.audio)
        for block in read_blocks(part.audio, offset=part.offset, duration=part.duration):
            samples += len(block)
            peak = max(peak, float(np.abs(block).max(initial=0.0)))
            digest.update(np.rint(np.clip(block, -1, 1) * FULL_SCALE).astype("<i2").tobytes())
    except AudioError as error:
        return Sound(rate=rate, file_seconds=seconds, fault=error.fault)
    return Sound(samples, rate, seconds, peak, int.from_bytes(digest.digest(), "little"))


def measure_all(parts: Iterable[Part], processes: int) -> Iterator[Sound]:
    """What each part holds, in the order of the parts, of which only a few are taken ahead.

    Args:
        processes: how many decode; with 1 this one does.
    """
    if processes <= 1:
        yield from map(measure, parts)
        return
    parts = iter(parts)
    pool = _pool(processes)
    waiting: deque[tuple[list[Part], Future[list[Sound]]]] = deque()
    try:
        while True:
            while len(waiting) < AHEAD * processes and (chunk := list(islice(parts, CLIPS_AT_ONCE))):
                waiting.append((chunk, pool.submit(_measure_each, chunk)))
            if not waiting:
                return
            chunk, future = waiting.popleft()
            try:
                found = future.result()
            except BrokenProcessPool:
                pool.shutdown(wait=False, cancel_futures=True)
                found = [_measure_alone(part) for part in chunk]
                pool = _pool(processes)
                waiting = deque((others, pool.submit(_measure_each, others)) for others, _ in waiting)
            yield from found
    finally:
        with suppress(Exception):
            pool.shutdown(wait=False, cancel_futures=True)


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))


def _measure_each(parts: list[Part]) -> list[Sound]:
    return [measure(part) for part in parts]


def _measure_alone(part: Part) -> Sound:
    with _pool(1) as pool:
        try:
            pool.submit(int).result()
        except BrokenProcessPool:  # no recording is to blame
            raise RuntimeError(
                "processes that decode recordings end as soon as they begin; in a script, call this below "
                'if __name__ == "__main__":, or take processes=1'
            ) from None
        try:
            return pool.submit(measure, part).result()
        except BrokenProcessPool:
            return Sound(
                fault="ends the process that decodes it, as if it were killed; convert it: ffmpeg -i FILE FILE.wav"
            )

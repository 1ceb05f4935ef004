"""Measure a server: what batching gains, whether requests are lost or doubled, and whether its memory stays flat.

    python bench/serve.py MODEL MANIFEST [--clients 32] [--clips 192] [--minutes 10] [--max-batch 16 32]

It starts `soundwave serve` and sends the manifest's recordings:

1. by one client, one after the other, and by `--clients` at once: requests a second, processor time of the server a
   request, and how many texts differ. A text may depend on its batch in half precision.
2. by as many clients for `--minutes`, while others leave before their answer, send junk, dawdle, or send recordings of
   ten minutes: each good request must get one answer, the right one by its length, and after the first minute the
   server's memory (RSS) must stay where it is. It is printed every half minute; the last figure is taken when all is
   answered.
"""

import argparse
import asyncio
import contextlib
import io
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx2 as httpx
import numpy as np
import psutil
import soundfile

from soundwave.data.audio import load_audio
from soundwave.data.manifest import read_manifest

PATH = "/v1/audio/transcriptions"
MEBIBYTE = 1 << 20


class Server:
    """A process that serves the model; `address` is where."""

    def __init__(self, folder: Path, *words: str):
        command = [str(Path(sys.executable).with_name("soundwave")), "serve", "--model", str(folder), "--port", "0"]
        self.process = subprocess.Popen([*command, *words], stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        self.name, self.address = re.fullmatch(r"serving (\S+) at (\S+)\n", line).groups()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        print(f"the server ended with status {self.process.wait(60)}")

    @property
    def cpu_seconds(self) -> float:
        """Processor time of the process: where other programs run, it tells more than the clock."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    @property
    def mebibytes(self) -> float:
        """Memory of the process (RSS)."""
        return psutil.Process(self.process.pid).memory_info().rss / MEBIBYTE


async def send(session: httpx.AsyncClient, server: Server, data: bytes, **fields: str) -> dict:
    """Transcribe a recording."""
    answer = await session.post(
        server.address + PATH, data={"model": server.name, **fields}, files={"file": ("a.wav", data)}
    )
    answer.raise_for_status()
    return answer.json()


async def rate(server: Server, clips: list[bytes], clients: int) -> tuple[float, list[str]]:
    """Requests a second by so many clients, and the texts."""
    texts, waiting = [""] * len(clips), list(enumerate(clips))[::-1]

    async def client() -> None:
        async with httpx.AsyncClient(timeout=600) as session:
            while waiting:
                number, data = waiting.pop()
                texts[number] = (await send(session, server, data))["text"]

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return len(clips) / (time.perf_counter() - began), texts


async def endure(server: Server, clips: list[bytes], clients: int, seconds: float) -> dict[str, int]:
    """Load the server with good and bad clients; the numbers of what came of it."""
    end = time.monotonic() + seconds
    counts = dict.fromkeys(("sent", "right", "wrong", "refused", "failed", "left", "junk", "slow", "long"), 0)
    lengths = [soundfile.info(io.BytesIO(data)).duration for data in clips]
    ten_minutes = wav(np.tile(np.concatenate([soundfile.read(io.BytesIO(data))[0] for data in clips[:24]]), 30))
    host, port = server.address.removeprefix("http://").split(":")
    random.seed(0)

    async def good() -> None:
        async with httpx.AsyncClient(timeout=600) as session:
            while time.monotonic() < end:
                number = random.randrange(len(clips))
                counts["sent"] += 1
                try:
                    found = await send(session, server, clips[number], response_format="verbose_json")
                except httpx.HTTPStatusError as error:
                    counts["refused" if error.response.status_code == 429 else "failed"] += 1
                    await asyncio.sleep(1)
                except httpx.HTTPError:
                    counts["failed"] += 1
                else:
                    counts["right" if abs(found["duration"] - lengths[number]) < 0.01 else "wrong"] += 1

    async def leaver() -> None:
        while time.monotonic() < end:
            with contextlib.suppress(httpx.HTTPError):
                async with httpx.AsyncClient(timeout=random.uniform(0.01, 2)) as session:
                    await send(session, server, random.choice(clips))
            counts["left"] += 1

    async def junk() -> None:
        async with httpx.AsyncClient(timeout=600) as session:
            while time.monotonic() < end:
                data = random.choice(clips)
                data = random.choice([os.urandom(20_000), data[: len(data) // 2], os.urandom(3 * MEBIBYTE)])
                with contextlib.suppress(httpx.HTTPStatusError):
                    await send(session, server, data)
                counts["junk"] += 1
                await asyncio.sleep(0.5)

    async def slow() -> None:
        while time.monotonic() < end:
            reader, writer = await asyncio.open_connection(host, int(port))
            head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
            writer.write(f"{head}Content-Length: 100000\r\n\r\n".encode())
            for _ in range(random.randrange(1, 12)):
                writer.write(b"--x")
                await asyncio.sleep(1)
            writer.close()
            counts["slow"] += 1

    async def long() -> None:
        while time.monotonic() < end:
            with contextlib.suppress(httpx.HTTPError):
                async with httpx.AsyncClient(timeout=random.choice((5, 60))) as session:
                    await send(session, server, ten_minutes, response_format="srt")
            counts["long"] += 1

    async def watch() -> None:
        began = time.monotonic()
        while time.monotonic() < end:
            await asyncio.sleep(min(30, max(end - time.monotonic(), 0.1)))
            print(f"{(time.monotonic() - began) / 60:5.1f} min  {server.mebibytes:7.0f} MiB  {counts}", flush=True)

    others = [leaver, leaver, leaver, junk, slow, slow, long]
    await asyncio.gather(*(good() for _ in range(clients)), *(other() for other in others), watch())
    async with httpx.AsyncClient(timeout=60) as session:
        while (await session.get(f"{server.address}/health")).json()["open_requests"]:
            await asyncio.sleep(0.2)
        metrics = (await session.get(f"{server.address}/metrics")).text
    print("\n".join(line for line in metrics.splitlines() if line.startswith("soundwave_requests_total")))
    return counts


def wav(samples: np.ndarray) -> bytes:
    """Samples at 16 kHz as a file."""
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format="WAV", subtype="PCM_16")
    return file.getvalue()


def main(folder: Path, manifest: Path, clients: int, count: int, minutes: float, batches: list[int]) -> None:
    """Print both tables."""
    samples = [sample for sample in read_manifest(manifest) if sample.task == "transcribe"][:count]
    clips = [wav(load_audio(sample.audio)) for sample in samples]
    seconds = sum(soundfile.info(io.BytesIO(data)).duration for data in clips)
    print(f"{len(clips)} recordings, {seconds:.0f} s")
    print("| max-batch | clients | requests/s | x real time | times one client ", end="")
    print("| processor ms a request | times less | texts that differ |")
    print("|" + "---:|" * 8, flush=True)
    for batch in batches:
        with Server(folder, "--max-batch", str(batch)) as server:
            asyncio.run(rate(server, clips[:8], 4))  # what is allocated at first is there
            speeds, costs, texts = [], [], []
            for number in (1, clients):
                before = server.cpu_seconds
                speed, found = asyncio.run(rate(server, clips, number))
                speeds.append(speed)
                costs.append((server.cpu_seconds - before) / len(clips))
                texts.append(found)
                differ = sum(a != b for a, b in zip(texts[0], found, strict=True))
                print(
                    f"| {batch} | {number} | {speed:.2f} | {speed * seconds / len(clips):.1f} | "
                    f"{speed / speeds[0]:.2f} | {costs[-1] * 1000:.0f} | {costs[0] / costs[-1]:.2f} | {differ} |",
                    flush=True,
                )
            if minutes and batch == batches[-1]:
                counts = asyncio.run(endure(server, clips, clients, minutes * 60))
                lost = counts["sent"] - counts["right"] - counts["refused"]
                print(f"lost or wrong: {lost} of {counts['sent']}; memory at the end {server.mebibytes:.0f} MiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a trained model")
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--clips", type=int, default=192)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--max-batch", type=int, nargs="+", default=[16])
    given = parser.parse_args()
    main(given.model, given.manifest, given.clients, given.clips, given.minutes, given.max_batch)

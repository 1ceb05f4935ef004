"""Write the frozen encoder's frames of recordings to a folder, which training reads in place of the recordings.

Kills and full disks: what is written is planned first, in shards, from the manifests alone. A shard is written aside,
synced to the disk and renamed, so that it is whole or not there; the same command goes on after the last one. Which
clips are encoded together follows from the plan, so the bytes of all files are those of a run without a kill, for any
number of processes that read recordings.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from soundwave.backbones.load import load_encoder
from soundwave.data.audio import AudioError, load_audio, shown
from soundwave.data.collate import LeftOut, is_silent, too_loud
from soundwave.data.features import (
    BEGUN,
    COLUMNS,
    FEW_FRAMES,
    FORMAT,
    INDEX,
    FeaturesError,
    Keys,
    OtherFramesError,
    about_encoder,
    crc_of,
    rows_of,
    state_of_file,
)
from soundwave.data.locks import locked
from soundwave.data.manifest import Sample
from soundwave.data.workers import ignore_ctrl_c, lost_worker_named
from soundwave.model.packed import encode_packed
from soundwave.model.processing import feature_extractor_of, log_mel
from soundwave.provenance import versions

MIB = 1 << 20
FRAMES_A_SECOND = 50
VERSIONS_OF = ("soundwave", "torch", "transformers")
LOCK, ASIDE = ".lock", ".writing"
HEADER = "shard"  # the one entry of a shard's header, because the order of several is random


class Clip(NamedTuple):
    """A recording, or a part of one, that is to be encoded."""

    key: int
    sample: Sample

    @property
    def seconds(self) -> float:
        return self.sample.duration or 0.0


class Read(NamedTuple):
    """A clip that was read: its log-mel [n_mels, T_mel] and more about it, or what is wrong with it."""

    mel: Tensor | None
    silent: bool
    state: tuple[int, int, int]
    fault: str


class Written(NamedTuple):
    """What a folder of frames holds: clips, seconds of speech, bytes, and what could not be read."""

    clips: int
    seconds: float
    size: int
    left_out: list[LeftOut]


def write_features(
    samples: Iterable[Sample],
    out: str | Path,
    *,
    audio_tower: str,
    whole_window: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    batch_duration: float = 120.0,
    shard_mib: int = 128,
    workers: int = 0,
    quiet: bool = False,
) -> Written:
    """Write the encoder's frames of all recordings of samples to a folder, or go on where a kill ended it.

    Args:
        samples: with durations; those of text alone are passed over, a recording of several is encoded once.
        out: the folder, which is made; one that holds something else is refused.
        audio_tower: Whisper model: Hub id, folder or embedded name.
        whole_window: pad each recording with silence to the encoder's window, as in SoundwaveConfig.
        dtype: of the encoder and its frames.
        batch_duration: seconds of speech that are encoded together. The last bits of the frames may depend on it.
        shard_mib: size of a file in MiB, about: what a kill loses at most.
        workers: processes that read recordings.
        quiet: show no progress.

    Raises:
        FeaturesError: no recording, a folder that holds something else, too little room, or a process that has died.
        OSError: the disk is full, or a file cannot be written.
    """
    out = Path(out)
    extractor = feature_extractor_of(audio_tower)
    clips = _clips_of(samples, Keys(out))
    tower = load_encoder(audio_tower, dtype).to(device).eval()
    width, window = tower.config.d_model, tower.config.max_source_positions if whole_window else None
    shards = _plan(clips, width * dtype.itemsize, shard_mib, window)
    about = about_encoder(tower, extractor, whole_window) | {
        "format": FORMAT,
        "audio_tower": audio_tower,
        "batch_duration": batch_duration,
        "shard_mib": shard_mib,
        "clips": hashlib.sha256(np.array([clip.key for clip in clips], np.int64).tobytes()).hexdigest()[:16],
        "versions": versions(VERSIONS_OF),
    }
    with _alone_in(out):
        _begin(out, about)
        wanted = [number for number in range(len(shards)) if _header_of(out, number, about) is None]
        seconds = sum(clip.seconds for number in wanted for clip in shards[number])
        _refuse_full_disk(out, round(seconds * FRAMES_A_SECOND) * width * dtype.itemsize)
        batches = {number: _batches(shards[number], batch_duration) for number in wanted}
        loader = DataLoader(
            [[shards[n][place] for place in places] for n in wanted for places in batches[n]],  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=partial(_read_all, extractor, whole_window),
            num_workers=workers,
            worker_init_fn=ignore_ctrl_c,
        )
        bar = tqdm(total=round(seconds), unit="s", desc="speech", disable=quiet or not sys.stderr.isatty())
        with bar, lost_worker_named(FeaturesError, "after the shards that are complete"):
            read = iter(loader)
            for number in wanted:
                shard = shards[number]
                found: dict[int, tuple[Read, Tensor | None]] = {}
                for places in batches[number]:
                    found |= dict(zip(places, _encode(tower, next(read)), strict=True))
                    bar.update(round(sum(shard[place].seconds for place in places)))
                _write(_file_of(out, number), _shard(shard, [found[place] for place in range(len(shard))], about))
        return _end(out, shards, about)


# ---------------------------------------------------------------- the plan


def _clips_of(samples: Iterable[Sample], key_of: Keys) -> list[Clip]:
    """Each recording once, in the order of the samples."""
    found: dict[int, Clip] = {}
    for sample in samples:
        if sample.audio is None:
            continue
        clip = Clip(key_of(sample), sample)
        other = found.setdefault(clip.key, clip).sample
        if other is not sample and key_of.text(other) != key_of.text(sample):
            raise FeaturesError(f"{sample.id} and {other.id} have the same hash; write their frames to two folders")
    if not found:
        raise FeaturesError("the manifests hold no recording, so that there is nothing to encode")
    return list(found.values())


def _plan(clips: list[Clip], bytes_a_frame: int, shard_mib: int, window: int | None) -> list[list[Clip]]:
    """The clips of each shard, in order. It depends on durations alone, not on what is read."""
    shards: list[list[Clip]] = [[]]
    size = 0
    for clip in clips:
        own = (window or round(clip.seconds * FRAMES_A_SECOND)) * bytes_a_frame
        if shards[-1] and size + own > shard_mib * MIB:
            shards.append([])
            size = 0
        shards[-1].append(clip)
        size += own
    return shards


def _batches(shard: list[Clip], batch_duration: float) -> list[list[int]]:
    """Places of the clips that are encoded together: of similar length, and within `batch_duration` if one alone is."""
    batches: list[list[int]] = []
    seconds = 0.0
    for place in sorted(range(len(shard)), key=lambda place: shard[place].seconds):
        if not batches or seconds + shard[place].seconds > batch_duration:
            batches.append([])
            seconds = 0.0
        batches[-1].append(place)
        seconds += shard[place].seconds
    return batches


# ---------------------------------------------------------------- reading and encoding


def _read_all(extractor: Any, whole_window: bool, clips: Sequence[Clip]) -> list[Read]:
    """Decode clips and make their log-mel, in a worker process or here."""
    return [_read(extractor, whole_window, clip.sample) for clip in clips]


def _read(extractor: Any, whole_window: bool, sample: Sample) -> Read:
    assert sample.audio is not None
    try:
        state = state_of_file(sample.audio)
        audio = load_audio(sample.audio, offset=sample.offset, duration=sample.duration)
    except AudioError as error:
        return Read(None, False, (0, 0, 0), error.fault)
    except OSError as error:
        return Read(None, False, (0, 0, 0), f"cannot be opened ({error.strerror}); name a readable audio file")
    mel = log_mel(extractor, audio, whole_window=whole_window)
    if not mel.isfinite().all():
        return Read(None, False, state, too_loud(audio))
    return Read(mel, is_silent(audio), state, "")


@torch.no_grad()
def _encode(tower: nn.Module, reads: list[Read]) -> list[tuple[Read, Tensor | None]]:
    """Each clip with its frames [N, E], as the model's `encode` makes them of a batch; None of what cannot be read."""
    mels = [one.mel for one in reads if one.mel is not None]
    if not mels:
        return [(one, None) for one in reads]
    weight = next(tower.parameters())
    lengths = torch.tensor([mel.shape[1] for mel in mels])
    if int(rows_of(lengths).sum()) < FEW_FRAMES:  # silence fills it up, so that it is summed as in a large batch
        lengths = torch.cat([lengths, torch.tensor([2 * FEW_FRAMES])])
    padded = torch.zeros(len(lengths), mels[0].shape[0], int(lengths.max()))
    for row, mel in zip(padded, mels, strict=False):
        row[:, : mel.shape[1]] = mel
    with torch.autocast(weight.device.type, dtype=weight.dtype, enabled=weight.dtype != torch.float32):
        rows, counts = encode_packed(tower, padded.to(weight.device), lengths)
    # Under autocast a GPU gives float32 here, but the adapter's first product casts it to the weights' dtype.
    frames = iter(rows.to(weight.dtype).cpu().split(counts.tolist()))
    return [(one, None if one.mel is None else next(frames)) for one in reads]


# ---------------------------------------------------------------- files


def _file_of(out: Path, number: int) -> Path:
    return out / f"shard-{number:05}.safetensors"


def _identity(about: dict[str, Any]) -> str:
    """Hash of what decides the content of the shards."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def _shard(clips: list[Clip], found: list[tuple[Read, Tensor | None]], about: dict[str, Any]) -> bytes:
    """The content of a shard."""
    left_out = {str(clip.key): read.fault for clip, (read, _) in zip(clips, found, strict=True) if read.fault}
    rows, columns = [], []
    for clip, (read, frames) in zip(clips, found, strict=True):
        if frames is None or read.mel is None:
            continue
        frames = frames.contiguous()
        rows.append(frames)
        columns.append((clip.key, read.mel.shape[1], crc_of(frames), int(read.silent), *read.state))
    table = torch.tensor(columns, dtype=torch.int64).reshape(-1, len(COLUMNS))
    tensors = {name: column.contiguous() for name, column in zip(COLUMNS, table.T, strict=True)}
    tensors["frames"] = torch.cat(rows) if rows else torch.zeros(0, 1)
    header = {"identity": _identity(about), "left_out": left_out}
    return save(tensors, {HEADER: json.dumps(header, sort_keys=True)})


def _header_of(out: Path, number: int, about: dict[str, Any]) -> dict[str, Any] | None:
    """What the header of a shard says; None if it is not there, damaged, or of other clips or another encoder."""
    file = _file_of(out, number)
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            header = json.loads(opened.metadata()[HEADER])
        return header if header["identity"] == _identity(about) else None
    except (SafetensorError, KeyError, TypeError, ValueError):
        return None


def _begin(out: Path, about: dict[str, Any]) -> None:
    """Refuse a folder that holds something else, and note what will be written to it."""
    for name in (INDEX, BEGUN):
        if not (out / name).is_file():
            continue
        try:
            found = json.loads((out / name).read_text(encoding="utf-8"))
            differ = [key for key in about if found.get(key) != about[key]]
        except (ValueError, AttributeError):
            raise OtherFramesError(f"{shown(out / name)} is damaged; name another folder") from None
        if differ:
            pairs = ", ".join(f"{key} = {found.get(key)!r} (now {about[key]!r})" for key in differ)
            raise OtherFramesError(
                f"{shown(out)} holds frames of other clips or settings: {pairs}; name another folder"
            )
        return
    own = {LOCK, BEGUN + ASIDE}  # what a kill at the very beginning leaves
    others = sorted(path.name for path in out.iterdir() if path.name not in own)
    if others:
        raise OtherFramesError(f"{shown(out)} holds {shown(others[0])}, but no frames; name a new folder")
    _write(out / BEGUN, _text(about))


def _end(out: Path, shards: list[list[Clip]], about: dict[str, Any]) -> Written:
    """Write the index, or compare it with the shards if it is there."""
    entries, left_out, size = [], [], 0
    for number, shard in enumerate(shards):
        header, file = _header_of(out, number, about), _file_of(out, number)
        assert header is not None
        faults = header["left_out"]
        entries.append({"file": file.name, "sha256": _sha256_of(file), "left_out": faults})
        size += file.stat().st_size
        of_clips = [(clip.sample, faults[str(clip.key)]) for clip in shard if str(clip.key) in faults]
        left_out += [LeftOut(sample.id, str(sample.audio), fault) for sample, fault in of_clips]
    text = _text(about | {"shards": entries})
    index = out / INDEX
    old = index.read_bytes() if index.is_file() else None
    if old is not None and old != text:
        was = json.loads(old)["shards"]
        damaged = [new["file"] for new, entry in zip(entries, was, strict=False) if new != entry] or [INDEX]
        raise OtherFramesError(f"{shown(out / damaged[0])} is damaged; delete it, and start the command again")
    if old is None:
        _write(index, text)
    (out / BEGUN).unlink(missing_ok=True)
    for path in out.glob(f"*{ASIDE}"):
        path.unlink()
    clips = [clip for shard in shards for clip in shard]
    return Written(len(clips) - len(left_out), sum(clip.seconds for clip in clips), size, left_out)


def _sha256_of(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(MIB):
            digest.update(block)
    return digest.hexdigest()


def _text(about: dict[str, Any]) -> bytes:
    return (json.dumps(about, indent=2, ensure_ascii=False) + "\n").encode()


def _write(path: Path, data: bytes) -> None:
    """Write a file aside, sync it to the disk and rename it."""
    aside = path.with_name(path.name + ASIDE)
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        again = "make room, then the same command goes on after the shards that are complete"
        raise OSError(error.errno, f"{error.strerror}; {again}", str(path)) from error


def _refuse_full_disk(out: Path, size: int) -> None:
    free = shutil.disk_usage(out).free
    if size > free:
        raise FeaturesError(
            f"the frames take about {size / 2**30:.1f} GiB, but {shown(out)} has {free / 2**30:.1f} GiB free; name a "
            "folder with more room, or use fewer recordings or --dtype bfloat16"
        )


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Make a folder and lock it: two processes would write each other's files."""
    if out.exists() and not out.is_dir():
        raise FeaturesError(f"{shown(out)} is a file; name a folder")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / LOCK, out, FeaturesError(f"{shown(out)} is being written by another process; wait for its end")):
        yield

"""Encoder frames on disk: what `soundwave features` writes, and training reads in place of recordings.

    features.json               what made the frames, and the SHA-256 of each shard; written last
    begun.json                  the same without the shards; there while it is written
    shard-00000.safetensors     frames [N, E] of its clips, one after another, and one value a clip of each of `COLUMNS`

A clip is a recording with offset and duration, under a hash of the three. Its path is kept relative to the folder, so
both can be moved together. The frames of a clip are checked whenever they are read, by their CRC-32; and so is whether
the recording is still the one that was encoded: by its size and time, or, where the time differs, by its content.
"""

import hashlib
import json
import os
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from soundwave.data.audio import AudioError, shown
from soundwave.data.manifest import Sample
from soundwave.data.members import split_member

FORMAT = 1  # increase it when the files or what is in them change
INDEX, BEGUN = "features.json", "begun.json"
# One int64 a clip: hash of its path and part; mel frames; CRC-32 of its frames; 1 if it is silent; of its file the size
# in bytes, the time in ns, and a hash of its content.
COLUMNS = ("key", "mel_frames", "crc", "silent", "size", "time", "content")
# Frames up to which a batch is not made of kept ones. In float32 the encoder's frames of a clip have the same bits in
# every batch on the CPU, but below some 130 rows the products sum up in another order (docs/data-loading.md).
FEW_FRAMES = 256
HASHED_AT_ONCE = 1 << 20  # bytes
UNKNOWN = 0  # content of a recording inside another file, which may be large
LOG_MEL = {"feature_size": 80, "sampling_rate": 16_000, "hop_length": 160, "n_fft": 400, "dither": 0.0}
AGAIN = "run `soundwave features` again, into a new folder"


class FeaturesError(ValueError):
    """A folder of frames that cannot be used. The message is one line: what was found and how to mend it."""


class OtherFramesError(FeaturesError):
    """A folder of frames that holds other ones than those that are to be written, or damaged ones."""


class Frames(NamedTuple):
    """Frames of one clip.

    Attributes:
        rows: [ceil(mel_frames / 2), E] at 50 Hz.
        mel_frames: their number at 100 Hz.
        silent: whether nothing is heard.
    """

    rows: Tensor
    mel_frames: int
    silent: bool


class Features:
    """A folder of frames.

    Args:
        folder: one that `soundwave features` has finished.

    Attributes:
        about: what `features.json` says.

    Raises:
        FeaturesError: it holds no frames, they are not finished, or a shard is missing or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.about = _read_index(self.folder)
        names = [shard["file"] for shard in self.about["shards"]]
        found = [self._columns_of(name) for name in names]
        starts = [rows_of(columns["mel_frames"]).cumsum() for columns in found]
        columns = {name: np.concatenate([one[name] for one in found]) for name in COLUMNS}
        columns["stop"] = np.concatenate(starts)
        columns["shard"] = np.repeat(np.arange(len(names)), [len(one["key"]) for one in found])
        order = columns["key"].argsort(kind="stable")
        self._columns = {name: column[order] for name, column in columns.items()}
        self._faults: dict[str, str] = {}
        for shard in self.about["shards"]:
            self._faults |= shard["left_out"]
        self._names, self._key_of = names, Keys(self.folder)
        self._open: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def __len__(self) -> int:
        return len(self._columns["key"])

    def _columns_of(self, name: str) -> dict[str, np.ndarray]:
        try:
            with safe_open(self.folder / name, framework="pt") as file:
                return {column: file.get_tensor(column).numpy() for column in COLUMNS}
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise FeaturesError(f"{shown(self.folder / name)} cannot be read ({reason}); {AGAIN}") from None

    def holds(self, sample: Sample) -> bool:
        """Whether the recording of a sample was read, with or without success."""
        key = self._key_of(sample)
        return self._place(key) is not None or str(key) in self._faults

    def of(self, sample: Sample) -> Frames:
        """The frames of a sample's recording.

        Raises:
            AudioError: it could not be read, has changed since, or its frames are damaged or missing.
        """
        assert sample.audio is not None
        key = self._key_of(sample)
        place = self._place(key)
        if place is None:
            fault = self._faults.get(str(key), f"has no frames in {shown(self.folder)}; {AGAIN}")
            raise AudioError(sample.audio, fault)
        found = {name: int(column[place]) for name, column in self._columns.items()}
        if not _is_same_file(sample.audio, found["size"], found["time"], found["content"]):
            raise AudioError(
                sample.audio, f"has changed since its frames were written to {shown(self.folder)}; {AGAIN}"
            )
        shard, count = found["shard"], rows_of(found["mel_frames"])
        try:
            rows = self._file(shard).get_slice("frames")[found["stop"] - count : found["stop"]]
            whole = crc_of(rows) == found["crc"]
        except (OSError, SafetensorError, IndexError):
            whole = False
        if not whole:
            file = self.folder / self._names[shard]
            raise AudioError(sample.audio, f"its frames in {shown(file)} are damaged; {AGAIN}")
        return Frames(rows, found["mel_frames"], bool(found["silent"]))

    def _place(self, key: int) -> int | None:
        keys = self._columns["key"]
        place = int(np.searchsorted(keys, key))
        return place if place < len(keys) and keys[place] == key else None

    def _file(self, shard: int) -> Any:
        if shard not in self._open:
            self._open[shard] = safe_open(self.folder / self._names[shard], framework="pt")
        return self._open[shard]

    def refuse_misfit(self, about: dict[str, Any]) -> None:
        """Compare what made the frames with what a run would make them by (`about_encoder`).

        Raises:
            FeaturesError: they differ; the message has both.
        """
        for name, wanted in about.items():
            found = self.about.get(name)
            if found != wanted:
                raise FeaturesError(
                    f"{shown(self.folder)} holds frames of {name} = {found!r}, but this run has {wanted!r}; give "
                    f"the same, or write frames of this one with `soundwave features`"
                )


class Keys:
    """Hashes under which clips are kept in a folder: `Keys(folder)(sample)`."""

    def __init__(self, folder: str | Path):
        self._root = os.path.realpath(folder)
        self._relative = lru_cache(1 << 16)(self._find_relative)

    def __reduce__(self) -> tuple[type["Keys"], tuple[str]]:
        return Keys, (self._root,)

    def _find_relative(self, parent: str) -> str:
        return os.path.relpath(os.path.realpath(parent), self._root)

    def text(self, sample: Sample) -> str:
        """What names a clip: its path from the folder, its offset and its duration."""
        parent, name = os.path.split(str(sample.audio))
        return f"{self._relative(parent)}/{name}\0{sample.offset!r}\0{sample.duration!r}"

    def __call__(self, sample: Sample) -> int:
        return hash_of(self.text(sample).encode("utf-8", "surrogateescape"))


def hash_of(data: bytes) -> int:
    """A hash of 63 bits, not 0."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1 or 1


def crc_of(rows: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(rows.contiguous().view(torch.uint8).numpy())


def rows_of(mel_frames: Any) -> Any:
    """Number of the encoder's frames for a number of mel frames."""
    return (mel_frames + 1) // 2


def about_encoder(tower: nn.Module, extractor: Any, whole_window: bool) -> dict[str, Any]:
    """What decides the frames: the dtype and a hash of the encoder's weights, and how the log-mel is made."""
    digest = hashlib.sha256()
    for key, tensor in sorted(tower.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return {
        "dtype": str(next(tower.parameters()).dtype).removeprefix("torch."),
        "encoder": digest.hexdigest()[:16],
        "log_mel": {setting: getattr(extractor, setting, usual) for setting, usual in LOG_MEL.items()},
        "whole_window": whole_window,
    }


def state_of_file(audio: Path) -> tuple[int, int, int]:
    """Size, time in ns and hash of the content of the file of a recording."""
    file, inside = split_member(str(audio))
    status = os.stat(file)
    content = UNKNOWN if inside else _content_of(file, status.st_size, status.st_mtime_ns)
    return status.st_size, status.st_mtime_ns, content


def _is_same_file(audio: Path, size: int, time: int, content: int) -> bool:
    file, _ = split_member(str(audio))
    try:
        status = os.stat(file)
    except OSError:
        return False
    if (status.st_size, status.st_mtime_ns) == (size, time):
        return True
    if status.st_size != size or content == UNKNOWN:
        return False
    return _content_of(file, status.st_size, status.st_mtime_ns) == content


@lru_cache(1 << 12)
def _content_of(file: str, size: int, time: int) -> int:
    """Hash of a file's content; size and time are there for the cache."""
    digest = hashlib.blake2b(digest_size=8)
    with open(file, "rb") as opened:
        while block := opened.read(HASHED_AT_ONCE):
            digest.update(block)
    return int.from_bytes(digest.digest(), "little") >> 1 or 1


def _read_index(folder: Path) -> dict[str, Any]:
    file = folder / INDEX
    if not file.is_file():
        unfinished = (folder / BEGUN).is_file()
        raise FeaturesError(
            f"features = {shown(folder)!r} is not finished; start the same `soundwave features` again"
            if unfinished
            else f"features = {shown(folder)!r} holds no {INDEX}; name a folder that `soundwave features` has written"
        )
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        version = about["format"]
        if version == FORMAT and all(_is_shard(shard) for shard in about["shards"]):
            return about
        damaged = version == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        damaged = True
    if damaged:
        raise FeaturesError(f"{shown(file)} is damaged; {AGAIN}")
    raise FeaturesError(f"{shown(file)} is of format {version!r}, but this version reads {FORMAT}; {AGAIN}")


def _is_shard(shard: Any) -> bool:
    """Whether an entry names a file of the folder itself, and those of its clips that could not be read."""
    return Path(shard["file"]).name == shard["file"] and isinstance(shard["left_out"], dict)

"""What the safetensors files of a folder hold, known from their headers before any weight is read."""

import json
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
PIECE = 16 << 20  # bytes that are copied at once


class Stored(NamedTuple):
    """Where a tensor is stored: file, name in it, dtype ("F32", "BF16", …), shape, first byte and number of bytes."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def stored_in(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, by name.

    Raises:
        SafetensorError: the file is damaged or cut off.
    """
    with safe_open(file, framework="pt"), file.open("rb") as raw:  # safe_open compares the header with the file's size
        length = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(length))
    found = {}
    for name, value in header.items():
        if name != "__metadata__":
            first, end = value["data_offsets"]
            found[name] = Stored(file, name, value["dtype"], tuple(value["shape"]), 8 + length + first, end - first)
    return found


def stored_tensors(folder: str | Path) -> dict[str, Stored]:
    """The tensors of a folder's weights: those of `model.safetensors`, or of the shards that its index names.

    Raises:
        FileNotFoundError: there are no weights, or only pickled ones, or a shard of the index is missing.
        ValueError: a file is damaged, or the index and its shards contradict each other.
    """
    folder = Path(folder)
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if single.is_file():
        return _read(folder, single)
    if not index.is_file():
        pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        if pickles:
            raise FileNotFoundError(
                f"{folder} has no {WEIGHTS_FILE}: its {pickles[0]} is a pickle, which is not read because it may run "
                "any code; have it saved again as safetensors"
            )
        if any(folder.glob("*.gguf")):
            raise FileNotFoundError(
                f"{folder} has no {WEIGHTS_FILE}: its GGUF files are not read; name the model that they were made of"
            )
        raise FileNotFoundError(f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}; copy its weights, too")
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(places.values()))
        outside = [shard for shard in shards if Path(shard).name != shard]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is damaged (not a JSON object with a weight_map); copy it again") from None
    if outside:
        raise ValueError(f"{index} names {outside[0]!r}, which is no file of its folder; copy it again")
    for shard in shards:
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{folder} has no {shard}, but its index names it: copy it again")
    found: dict[str, Stored] = {}
    for shard in shards:
        inside = _read(folder, folder / shard)
        wrong = [name for name in inside if places.get(name) != shard]
        if wrong:
            raise ValueError(f"{folder / shard} holds {wrong[0]}, but the index does not place it there; copy it again")
        found |= inside
    lost = sorted(places.keys() - found)
    if lost:
        raise ValueError(f"{folder / places[lost[0]]} does not hold {lost[0]}, but the index says so; copy it again")
    return found


def _read(folder: Path, file: Path) -> dict[str, Stored]:
    try:
        return stored_in(file)
    except SafetensorError as error:
        raise ValueError(f"{folder} has a damaged safetensors file ({file.name}: {error}); copy it again") from None


def read_tensors(stored: Mapping[str, Stored], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of these names, one after another; each file is opened once.

    Args:
        stored: where they are. A key may differ from the name that the tensor has in its file.
    """
    files: dict[Path, list[str]] = {}
    for name in names:
        files.setdefault(stored[name].file, []).append(name)
    for path, inside in files.items():
        with safe_open(path, framework="pt") as file:
            for name in inside:
                yield name, file.get_tensor(stored[name].name)


def fault_of_shapes(stored: Mapping[str, Stored], wanted: Mapping[str, tuple[int, ...]]) -> str | None:
    """Which stored tensor has another shape than the wanted one; None if each has the right one."""
    for name in sorted(stored.keys() & wanted.keys()):
        if stored[name].shape != tuple(wanted[name]):
            return f"{name} in {stored[name].file.parent} is {list(stored[name].shape)}, wanted {list(wanted[name])}"
    return None


def copy_tensors(stored: Mapping[str, Stored], target: Path) -> None:
    """Write a safetensors file of stored tensors under the names that are the keys; their bytes stay the same.

    They are copied in pieces, so that no tensor is in memory; safetensors' own functions need all of a file's tensors.
    """
    # As safetensors does: wide dtypes first, so that every tensor begins at a multiple of its items' size.
    order = sorted(stored, key=lambda name: (-stored[name].size // max(1, prod(stored[name].shape)), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + stored[name].size
        header[name] = {
            "dtype": stored[name].dtype,
            "shape": list(stored[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            with stored[name].file.open("rb") as source:
                source.seek(stored[name].start)
                left = stored[name].size
                while left:
                    piece = source.read(min(PIECE, left))
                    if not piece:
                        raise OSError(f"{stored[name].file} ends within {name}: it was changed while it was read")
                    out.write(piece)
                    left -= len(piece)

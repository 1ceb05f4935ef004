"""How much memory a model's frozen backbones take, before they are loaded."""

from typing import NamedTuple

import torch

from soundwave.backbones.check import encoder_bytes, language_model_bytes, stored_in_4_bits
from soundwave.hardware import GIB, free_bytes
from soundwave.model.configuration import SoundwaveConfig


class Part(NamedTuple):
    """A part of a model that is loaded: a backbone's name, what of it, its size in bytes (None: unknown)."""

    name: str
    what: str
    size: int | None

    @property
    def text(self) -> str:
        size = "" if self.size is None else f", {_shown(self.size)}"
        return f"{self.name} ({self.what}{size})"


def sizes_of(config: SoundwaveConfig, dtype: torch.dtype, *, language_model: bool = True) -> list[Part]:
    """The parts that `from_backbones` loads with the same arguments, and their sizes."""
    name, shown = config.language_model, str(dtype).removeprefix("torch.")
    encoder = Part(config.audio_tower, f"Whisper's encoder in {shown}", encoder_bytes(config.audio_tower, dtype))
    head = []
    if config.ctc_head is not None:
        size = config.vocab_size * config.hidden_size * dtype.itemsize
        head = [Part(config.ctc_head, f"CTC head in {shown}", size)]
    elif not language_model:
        head = [Part(name, f"output embedding in {shown}", language_model_bytes(name, dtype, whole=False))]
    if not language_model:
        return [encoder, *head]
    in_4_bits = config.quantization == "nf4" or stored_in_4_bits(name)
    size = language_model_bytes(name, dtype, quantization=config.quantization)
    return [encoder, Part(name, f"language model in {'4 bits' if in_4_bits else shown}", size), *head]


def fits(parts: list[Part], device: torch.device) -> bool:
    """Whether the free memory of the device, and of the machine that loads them, holds the parts."""
    return sum(part.size or 0 for part in parts) <= _free(device)[0]


def refuse_what_does_not_fit(parts: list[Part], device: torch.device) -> None:
    """Refuse parts that the free memory cannot hold.

    Raises:
        ValueError: they do not fit; the message has the sizes.
    """
    if fits(parts, device):
        return
    sizes = " and ".join(part.text for part in parts)
    could_shrink = any(part.what.startswith("language model") and "4 bits" not in part.what for part in parts)
    hint = ", or the language model in 4 bits: quantization=nf4" if could_shrink else ""
    free, where = _free(device)
    raise ValueError(
        f"{sizes} do not fit into the {_shown(free)} that are free on {where}; free memory, or use smaller "
        f"backbones{hint}"
    )


def _free(device: torch.device) -> tuple[int, str]:
    """The free memory in bytes of the device or of the machine, whichever has less, and which one it is."""
    # The weights are read into the machine's memory and then moved.
    machine, gpu = free_bytes("cpu"), free_bytes(device.type)
    return (gpu, "the GPU") if gpu < machine else (machine, "this machine")


def _shown(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"

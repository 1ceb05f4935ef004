"""What is installed here and what will run, with the reason for each."""

import platform
from importlib.metadata import PackageNotFoundError, version

from soundwave import backbones
from soundwave.attention import choose_attention
from soundwave.backbones import wheels
from soundwave.hardware import pick_device, pick_dtype
from soundwave.kernels.dispatch import resolve_impl

REQUIRED = ("torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate", "nvtx", "soundfile", "soxr")
OPTIONAL = {"flash-attn": "soundwave[flash]", "torchaudio": "soundwave[gpu], for GPU machines only"}


def findings() -> list[tuple[str, str, str]]:
    """Rows of (what, value, why)."""
    import torch

    device, device_reason = pick_device()
    dtype, dtype_reason = pick_dtype(device.type)
    rows = [("python", platform.python_version(), "3.10 or newer is needed")]
    rows += [
        (name, _version(name) or "missing", "needed; run make setup" if not _version(name) else "") for name in REQUIRED
    ]
    rows += [
        (name, _version(name) or "not installed", "" if _version(name) else f"optional: {extra}")
        for name, extra in OPTIONAL.items()
    ]
    quantization = "nf4" if device.type == "cuda" else "none"
    quantization_reason = "4-bit NF4 through bitsandbytes" if device.type == "cuda" else "a CPU is faster unquantised"
    implementation = resolve_impl("auto", device)
    rows += [
        ("device", str(device), device_reason),
        ("threads", str(torch.get_num_threads()), "torch.get_num_threads()"),
        ("dtype", str(dtype).removeprefix("torch."), dtype_reason),
        ("quantization", quantization, f"{quantization_reason}; change with quantization="),
        ("implementation", f"fused, {implementation}", "of adapters and losses: Triton on CUDA, else torch"),
        ("attention", *choose_attention(device=device, dtype=dtype)),
    ]
    for name in (backbones.WHISPER, backbones.LANGUAGE_MODEL):
        folder = wheels.folder_of(name)
        rows.append((name, "ready" if folder.is_dir() else "not fetched", str(folder)))
    return rows


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

"""What is installed here and what will run, with the reason for each."""

import platform
from importlib.metadata import PackageNotFoundError, version

from soundwave import __version__, backbones
from soundwave.provenance import DISTRIBUTIONS, ROOT

DISTRIBUTION = DISTRIBUTIONS["soundwave"]
REQUIRED = ("torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate", "nvtx", "soundfile", "soxr")
# How to install what soundwave can do without. flash-attn is a source build that imports torch, which pip hides from it
# otherwise.
OPTIONAL = {
    "flash-attn": f"pip install --no-build-isolation '{DISTRIBUTION}[flash]'",
    "flash-attn-4": "pip install --pre flash-attn-4, for compute capability 9.0 and newer",
    "torchaudio": f"pip install '{DISTRIBUTION}[gpu]', on GPU machines only",
}


def findings() -> list[tuple[str, str, str]]:
    """Rows of (what, value, why). Without torch nothing can run, and the rows end with the packages."""
    rows = [
        ("soundwave", __version__, f"from the checkout {ROOT}" if _in_checkout() else f"distribution {DISTRIBUTION}"),
        ("python", platform.python_version(), "3.10 or newer is needed"),
    ]
    for name in REQUIRED:
        found = _version(name)
        rows.append((name, found or "missing", "" if found else f"needed; {_how_to_install()}"))
    for name, command in OPTIONAL.items():
        found = _version(name)
        rows.append((name, found or "not installed", "" if found else f"optional: {command}"))
    return rows + _runs() if _version("torch") else rows


def _runs() -> list[tuple[str, str, str]]:
    """The rows on what will run. All imports that bring torch are here."""
    import torch

    from soundwave.attention import choose_attention
    from soundwave.backbones import wheels
    from soundwave.hardware import pick_device, pick_dtype
    from soundwave.kernels.dispatch import resolve_impl

    device, device_reason = pick_device()
    dtype, dtype_reason = pick_dtype(device.type)
    quantization = "nf4" if device.type == "cuda" else "none"
    quantization_reason = "4-bit NF4 through bitsandbytes" if device.type == "cuda" else "a CPU is faster unquantised"
    implementation = resolve_impl("auto", device)
    rows = [
        ("device", str(device), device_reason),
        ("threads", str(torch.get_num_threads()), "torch.get_num_threads()"),
        ("dtype", str(dtype).removeprefix("torch."), dtype_reason),
        ("quantization", quantization, f"{quantization_reason}; change with quantization="),
        ("implementation", f"fused, {implementation}", "adapters and losses run Triton on CUDA, else torch"),
        ("attention", *choose_attention(device=device, dtype=dtype)),
    ]
    for name in (backbones.WHISPER, backbones.LANGUAGE_MODEL):
        folder = wheels.folder_of(name)
        rows.append((name, "ready" if folder.is_dir() else "not fetched", str(folder)))
    return rows


def _in_checkout() -> bool:
    """Whether this runs from a checkout or an unpacked source distribution, where `make` works."""
    return (ROOT / "Makefile").is_file() and (ROOT / "setup.py").is_file()


def _how_to_install() -> str:
    # -B: `make setup` alone does nothing where an earlier one has finished.
    return "run make -B setup" if _in_checkout() else f"run pip install {DISTRIBUTION}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

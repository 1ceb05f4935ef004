"""The origin of a figure: the commit of the checkout, the versions of packages, the device."""

import importlib.util
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTIONS = {"soundwave": "soundwave-fused"}  # names of distributions that differ from the name of the import
CHANGED = "-changed"  # suffix of the commit if the files of the checkout differ from it


def refuse_hidden_kernels() -> None:
    """Exit with status 1 and one line on stderr if `import kernels` would find the checkout's folder of that name.

    `python -m` puts the working directory first on `sys.path`. In the checkout's own folder transformers then finds
    `kernels/` in place of another project's package, and `soundwave.kernels` is found only if the package is installed.
    """
    if (ROOT / "soundwave" / "kernels").is_dir():  # an installed package, not a checkout
        return
    spec = importlib.util.find_spec("kernels")
    if spec is not None and spec.origin and Path(spec.origin).resolve().parent == ROOT / "kernels":
        sys.exit(
            f"error: `python -m` cannot run soundwave while {ROOT} is on sys.path, where the folder kernels/ hides "
            "another package of that name; start the command `soundwave` instead (`make setup` installs it)"
        )


def commit() -> str | None:
    """Short commit of the checkout that the package runs from, with the suffix `-changed` if its files differ from it.

    None if the package does not run from a checkout, or if there is no git.
    """
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", f"--dirty={CHANGED}", "--abbrev=7", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions by name: Python's, and those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        with suppress(PackageNotFoundError):  # triton, for example, exists on Linux only
            found[name] = version(DISTRIBUTIONS.get(name, name))
    return found


def device_name() -> str:
    """Name of the GPU; without a GPU the name of the CPU and its number of cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    description = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", description, re.MULTILINE)
    return f"{model[1].strip() if model else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def slug(device: str) -> str:
    """Name of a folder for a device: lower case, with hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")

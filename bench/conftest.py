"""Keeps the checkout's root off `sys.path`: its folder `kernels/` would shadow the package of that name."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]

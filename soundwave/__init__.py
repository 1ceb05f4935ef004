"""Soundwave, fused: train and run the speech LLM of arXiv 2502.12900 on one GPU, or on a laptop."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_WHERE = {
    "SoundwaveConfig": "model.configuration",
    "SoundwaveForConditionalGeneration": "model.modeling",
    "SoundwaveProcessor": "model.processing",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    """The three Hugging Face classes, imported on first use: `soundwave --help` need not wait for transformers."""
    if name in _WHERE:
        return getattr(import_module(f"soundwave.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'soundwave' has no attribute {name!r}")

"""Makers of contenders that several benches share."""

from collections.abc import Callable
from typing import Any

import torch


def compiled(function: Callable[..., Any]) -> Callable[[], Callable[..., Any]]:
    """A maker of `torch.compile(function)` for fixed shapes, those of its first call."""

    def make() -> Callable[..., Any]:
        torch.compiler.reset()
        return torch.compile(function, dynamic=False)

    return make


def plain(function: Callable[..., Any]) -> Callable[[], Callable[..., Any]]:
    """A maker that returns the function itself."""
    return lambda: function

"""The demonstration: a synthetic corpus, three stages on small backbones, their scores; and the paper's ablations.

`run` is `soundwave demo`, `ablation` is `soundwave ablate`. `corpus` writes recordings, which `grammar` words, `tasks`
phrases as prompts and answers, and `espeak` speaks.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soundwave.demo.run import run_demo as run_demo


def __getattr__(name: str) -> Any:
    """`run_demo` on first use, as `soundwave.demo` was a module of its own for one version."""
    if name == "run_demo":
        from soundwave.demo.run import run_demo

        return run_demo
    raise AttributeError(f"module 'soundwave.demo' has no attribute {name!r}")

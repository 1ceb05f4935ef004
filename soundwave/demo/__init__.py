"""The demonstration on a synthetic corpus and small backbones, and the paper's ablations on the same.

`run` is the command `soundwave demo`, `ablation` is `soundwave ablate`. `corpus` writes the recordings and manifests:
`grammar` gives the sentences, `tasks` the prompts and answers, `soundwave.curation.espeak` the speech.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soundwave.demo.run import run_demo as run_demo


def __getattr__(name: str) -> Any:
    """`run_demo` on its first use. `soundwave.demo` was a module until 0.1.0, so its name is kept for one version."""
    if name == "run_demo":
        from soundwave.demo.run import run_demo

        return run_demo
    raise AttributeError(f"module 'soundwave.demo' has no attribute {name!r}")

"""Evaluation: `run` lets a model answer samples, `scores` compares its answers, `intervals` compares models."""

from typing import Any

_OLD_NAMES = {"Report", "alike", "answer", "evaluate", "evaluate_ctc", "load_model", "normalise", "read_ctc"}
_OLD_NAMES |= {"word_error_rate"}


def __getattr__(name: str) -> Any:
    """The names that `soundwave.evaluation` had as a module in 0.1.0, kept for one version."""
    if name not in _OLD_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from soundwave.evaluation import run, scores
    from soundwave.inference import answer

    if name == "Report":
        return scores.Scores
    return next(getattr(module, name) for module in (run, scores, answer) if hasattr(module, name))

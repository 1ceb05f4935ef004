"""Scores of a trained model: `run` lets it answer, `scores` judges, `intervals` says how sure a difference is."""

from typing import Any

_OLD_NAMES = {"Report", "alike", "answer", "evaluate", "evaluate_ctc", "load_model", "normalise", "read_ctc"}
_OLD_NAMES |= {"word_error_rate"}


def __getattr__(name: str) -> Any:
    """The names of `soundwave.evaluation` when it was a module of its own, kept for one version."""
    if name not in _OLD_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from soundwave.evaluation import run, scores
    from soundwave.inference import answer

    if name == "Report":
        return scores.Scores
    return next(getattr(module, name) for module in (run, scores, answer) if hasattr(module, name))

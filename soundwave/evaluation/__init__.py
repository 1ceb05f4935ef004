"""Scores of a trained model: `run` lets it answer, `scores` judges, `intervals` says how sure a difference is."""

from typing import Any

_RUN = ("alike", "evaluate", "evaluate_ctc")
_SCORES = ("normalise", "word_error_rate")
_ANSWER = ("answer", "load_model", "read_ctc")


def __getattr__(name: str) -> Any:
    """The names of `soundwave.evaluation` when it was a module of its own, kept for one version."""
    from soundwave.evaluation import run, scores
    from soundwave.inference import answer

    if name == "Report":
        return scores.Scores
    for module, names in ((run, _RUN), (scores, _SCORES), (answer, _ANSWER)):
        if name in names:
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

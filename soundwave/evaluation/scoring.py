"""Score a model on a manifest or on a named test, from the files to the figures: what `soundwave evaluate` does."""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from soundwave.data.collate import LeftOut
from soundwave.data.manifest import Sample, read_manifest
from soundwave.evaluation import airbench, run
from soundwave.evaluation.progress import NAMED
from soundwave.evaluation.protocols import Protocol, names, protocol_named
from soundwave.evaluation.results import Results, hash_of_model, hash_of_samples, open_results
from soundwave.evaluation.scores import Scores
from soundwave.evaluation.translation import is_translation, require_sacrebleu
from soundwave.evaluation.words import check_language
from soundwave.inference.answer import LoadedModel

Say = Callable[[str], None]
Row = dict[str, Any]


@dataclass(frozen=True)
class EvaluationSet:
    """What a model is scored on.

    Attributes:
        path: the manifest, or the name of the named test.
        samples: in order, without those that cannot be used.
        missing: those, with the reason.
        protocol: of a named test, None of a manifest.
    """

    path: Path
    samples: list[Sample]
    missing: list[LeftOut]
    protocol: Protocol | None


@dataclass(frozen=True)
class How:
    """How a model is scored; `soundwave evaluate --help` explains each."""

    ctc: bool = False
    batch_size: int = 16
    max_new_tokens: int = 256
    draft: str = "ctc"
    accept: float | None = None
    language: str | None = None
    normaliser: str = "auto"
    strict: bool = False


class Scored(NamedTuple):
    """Scores, and what a named test adds to them: the paper's figure (`paper`), and the tables of AIR-Bench."""

    scores: Scores
    extra: dict[str, Any]


def read_test(
    test: Path,
    *,
    data: Path | None = None,
    prompt: str | None = None,
    allow_outside: bool = False,
    strict: bool = False,
    warn: Say = lambda _: None,
) -> EvaluationSet:
    """Read a manifest, or a named test over a local copy of its corpus.

    Args:
        data: folder of the corpus of a named test.
        prompt: what a named test asks instead of its own prompt.
        strict: whether a line that cannot be used is an error; if not, it is left out.
        warn: called with one line about each line that is left out, the first `NAMED` of them, and with notes.

    Raises:
        ValueError: it is neither, or no line can be used.
    """
    missing: list[LeftOut] = []
    leave_out = None if strict else lambda *fault: missing.append(LeftOut(*fault))
    protocol = None if test.exists() and data is None else protocol_named(str(test))
    if protocol is None:
        if data is not None:
            raise ValueError(f"{test}: is no test; --data belongs to one of {names()}")
        if prompt is not None:
            raise ValueError("--prompt belongs to a named test; a manifest has prompts of its own")
        if not test.exists() and re.fullmatch(r"[A-Za-z][\w-]*", str(test)):
            raise ValueError(f"{test}: is neither a manifest nor a test; the tests are {names()}")
        samples = read_manifest(test, allow_outside=allow_outside, leave_out=leave_out, note=warn)
    elif data is None:
        raise ValueError(f"{test}: give the folder of its corpus with --data")
    else:
        samples = protocol.read(data, prompt, leave_out)
    for left in missing[:NAMED]:
        warn(f"left out: {left}")
    if len(missing) > NAMED:
        warn(f"left out: {len(missing) - NAMED} more samples, which --json lists")
    if not samples:
        raise ValueError(f"{test}: every sample was left out")
    return EvaluationSet(test, samples, missing, protocol)


def judge_of(
    test: EvaluationSet, url: str | None, model: str | None, prompt: Path | None, out: Path | None
) -> airbench.Judge | None:
    """The judge of a chat, None without an address of one.

    Raises:
        ValueError: the settings do not belong together, or the test is no chat.
    """
    if url is None:
        if model is not None or prompt is not None:
            raise ValueError("--judge-model and --judge-prompt need --judge, the address of a server")
        return None
    chat = test.protocol is not None and test.protocol.name == "airbench-chat"
    if not chat or model is None or out is None:
        lacks = "is for airbench-chat alone" if not chat else "needs --judge-model" if model is None else "needs --out"
        raise ValueError(f"--judge {lacks}")
    text = airbench.JUDGE_PROMPT if prompt is None else prompt.read_text(encoding="utf-8")
    return airbench.Judge(url, model, key=os.environ.get("OPENAI_API_KEY"), prompt=text)


def score(
    test: EvaluationSet,
    folder: Path,
    load: Callable[[Path], LoadedModel],
    how: How,
    *,
    out: Path | None = None,
    answers: Path | None = None,
    judge: airbench.Judge | None = None,
    quiet: bool = False,
) -> Scored:
    """Score the model in a folder.

    Whatever can be refused is refused before the model is loaded.

    Args:
        load: loads it.
        out: folder for answers, scores and pictures; an evaluation that was stopped goes on from there.
        answers: file for each answer as it comes, as JSON lines.
        judge: rates the answers of a chat.
        quiet: whether no progress is shown.

    Raises:
        ValueError, OSError: what is wrong with the settings, in one line.
    """
    check_language(how.language)
    if answers is not None:
        _check_answers(answers, test)
    if any(is_translation(sample.task) for sample in test.samples):
        require_sacrebleu()
    answering = {"max_new_tokens": how.max_new_tokens, "draft": how.draft, "accept": how.accept}
    settings: dict[str, Any] = {
        "batch_size": how.batch_size,
        "language": how.language,
        "normaliser": how.normaliser,
    }
    with _results(out, folder, test, settings | ({} if how.ctc else answering)) as results:
        network, processor = load(folder)
        ctc = how.ctc or network.config.stage == 1
        if results is not None:
            results.settle(ctc=ctc, device=network.device.type, dtype=str(network.compute_dtype))
        rows: list[Row] = []
        settings |= {
            "strict": how.strict,
            "progress": None if quiet else f"evaluating {test.path.name}",
            "results": results,
        }
        with _writer(answers, rows) as settings["each"]:
            if ctc:
                scores = run.evaluate_ctc(network, processor, test.samples, **settings)
            else:
                scores = run.evaluate(network, processor, test.samples, **answering, **settings)
                first = run.seconds_to_first_token(network, processor, test.samples) if scores.speed else None
                if first is not None:
                    scores.speed["seconds_to_first_token"] = first
        scores.left_out[:0] = test.missing
        extra = _of_named_test(test, rows, results, judge)
        if results is not None:
            results.finish(scores.as_dict() | extra, scores.speed)
            for task, confusion in scores.confusion.items():
                results.draw(task, confusion)
    return Scored(scores, extra)


def _check_answers(file: Path, test: EvaluationSet) -> None:
    """Raises, before the work, if answers cannot be written to a file or would replace what is read."""
    if file.resolve() in {test.path.resolve(), *(sample.audio for sample in test.samples)}:
        raise ValueError(f"{file}: is read by this evaluation; name another file with --answers")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.open("a").close()


@contextmanager
def _results(out: Path | None, folder: Path, test: EvaluationSet, about: dict[str, Any]) -> Iterator[Results | None]:
    """The results in a folder, new ones or those of the same evaluation; None without a folder."""
    if out is None:
        yield None
        return
    with open_results(out, about | {"model": hash_of_model(folder), "test": hash_of_samples(test.samples)}) as results:
        for left in test.missing:
            results.leave_out(left)
        yield results


@contextmanager
def _writer(file: Path | None, rows: list[Row]) -> Iterator[Callable[[Row], None]]:
    """A function that adds rows to a list, and writes them to a file as JSON lines, each at once.

    The file is emptied at the first row.
    """
    opened: list[TextIO] = []

    def write(row: Row) -> None:
        if file is not None:
            if not opened:
                opened.append(file.open("w", encoding="utf-8"))
            print(json.dumps(row, ensure_ascii=False), file=opened[0], flush=True)
        rows.append(row)

    try:
        yield write
    finally:
        for each in opened:
            each.close()


def _of_named_test(
    test: EvaluationSet, rows: list[Row], results: Results | None, judge: airbench.Judge | None
) -> dict[str, Any]:
    """What a named test adds to the scores."""
    if test.protocol is None:
        return {}
    rows = rows if results is None else list(results.rows.values())
    found: dict[str, Any] = {} if test.protocol.paper is None else {"paper": dict([test.protocol.paper])}
    if test.protocol.name == "airbench-foundation":
        by_task = airbench.score_foundation(rows, test.samples)
        found["airbench"] = {task: score._asdict() for task, score in by_task.items()}
    if judge is not None and results is not None:
        rated = airbench.judge_chat(rows, test.samples, judge, results.ratings(), results.add_rating)
        found["airbench"] = airbench.score_chat(rated) | {"judge": judge.model}
    return found

"""Commands that measure: `evaluate`, `compare` and `report`."""

import json
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from soundwave.cli import common
from soundwave.cli.common import DEMO_MODEL, AcceptOption, Draft, DraftOption, ModelOption

if TYPE_CHECKING:
    from soundwave.evaluation.protocols import Protocol
    from soundwave.evaluation.scores import Scores


class Normaliser(str, Enum):
    """What transcripts are normalised with; `soundwave.evaluation.words` has the rules."""

    auto = "auto"
    english = "english"
    basic = "basic"
    characters = "characters"
    none = "none"


def evaluate(
    test: Annotated[
        Path,
        typer.Argument(
            help="Manifest, with text or with task, prompt and answer; or the name of a test over a local copy of its "
            "corpus, with --data: librispeech-test-clean, librispeech-test-other, covost2-en-de (any pair), meld, "
            "vocalsound, airbench-foundation, airbench-chat.",
            metavar="TEST",
        ),
    ],
    model: ModelOption = DEMO_MODEL,
    data: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder of the corpus of a named test.", metavar="FOLDER")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder for answers, scores and pictures. If the command is stopped, the same one goes on from there.",
        ),
    ] = None,
    ctc: Annotated[
        bool, typer.Option("--ctc", help="Score the text that CTC writes instead of the LLM's answers.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per batch.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")] = 256,
    draft: DraftOption = Draft.ctc,
    accept: AcceptOption = None,
    language: Annotated[
        str | None,
        typer.Option(
            help="Language of the references, for the normaliser: a code such as en or tr; und has the rules of none. "
            "By default each sample's own, or else its script decides.",
            metavar="CODE",
        ),
    ] = None,
    normaliser: Annotated[
        Normaliser,
        typer.Option(
            help="auto: by language, Whisper's English one for English, its basic one with marks kept for others, "
            "characters for scripts without spaces; else one for all; none: the words as they are."
        ),
    ] = Normaliser.auto,
    prompt: Annotated[
        str | None, typer.Option(help="What a named test asks instead of its own prompt.", metavar="TEXT")
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(dir_okay=False, help="File to write every answer to as it comes, as JSON lines.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Read all recordings first, and stop at one that cannot be used."),
    ] = False,
    allow_outside: common.AllowOutsideOption = False,
    judge: Annotated[
        str | None,
        typer.Option(
            help="Address of a server of OpenAI's chat completions that rates the answers of airbench-chat, such as "
            "http://localhost:8000/v1; the key is taken from OPENAI_API_KEY. Without it nothing is sent anywhere.",
            metavar="URL",
        ),
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="Model of the judge.", metavar="NAME")] = None,
    judge_prompt: Annotated[
        Path | None, typer.Option(dir_okay=False, help="File with another prompt for the judge.", metavar="FILE")
    ] = None,
    quiet: common.QuietOption = False,
) -> None:
    """Score a model on a manifest or on a named test.

    Transcripts get a word error rate (in scripts without spaces a character error rate), translations BLEU and chrF,
    other tasks the share of right answers, with macro F1 where there are classes; all with bootstrap intervals.

    A recording over 30 s is transcribed in pieces; for another task its first 30 s are heard. A sample whose recording
    cannot be used is named and left out.
    """
    common.check_accept(draft, accept)
    from soundwave.evaluation.scoring import How, judge_of, read_test, score
    from soundwave.evaluation.words import check_language

    check_language(language)
    read = read_test(test, data=data, prompt=prompt, allow_outside=allow_outside, strict=strict, warn=common.warn)
    if answers is not None and out is not None:
        raise ValueError(f"--out keeps the answers, in {out / 'answers.jsonl'}; leave out --answers")
    how = How(
        ctc, batch_size, max_new_tokens, draft.value, accept, language, normaliser=normaliser.value, strict=strict
    )
    rating = judge_of(read, judge, judge_model, judge_prompt, out)
    folder = model if out is None else common.model_folder(model)
    scores, extra = score(read, folder, common.load_model, how, out=out, answers=answers, judge=rating, quiet=quiet)
    if as_json:
        print(json.dumps(scores.as_dict() | extra, ensure_ascii=False))
        return
    _show(scores, read.protocol, extra)
    if scores.left_out:
        common.say(f"left out: {len(scores.left_out)} of {len(read.samples) + len(read.missing)} samples")
    if scores.cut_off:
        common.say(f"cut off after {max_new_tokens} tokens: {len(scores.cut_off)} answers; raise --max-new-tokens")


def _show(scores: "Scores", protocol: "Protocol | None", extra: Mapping[str, Any]) -> None:
    """Print the scores."""
    if protocol is not None and protocol.name == "airbench-chat":
        if "airbench" not in extra:
            common.say(
                f"answers: {sum(scores.samples.values())}; only a judge can rate them: --judge, --judge-model, --out"
            )
        _show_airbench(extra.get("airbench") or {})
        return
    paper = extra.get("paper") or {}
    table = common.table("task", "samples", "score", "95 % interval", *(["paper"] if paper else []), "normaliser")
    for task, count in scores.samples.items():
        cells = [escape(task), str(count), scores.text_of(task), scores.interval_of(task)]
        cells += [" · ".join(f"{name} {value:.1f}" for name, value in paper.items())] if paper else []
        # A signature of sacrebleu is one word, which a column would break: it stands below.
        table.add_row(*cells, "sacrebleu" if task in scores.bleu else scores.normaliser.get(task, ""))
    common.console.print(table)
    for task in scores.bleu:
        for signature in scores.normaliser[task].split("; "):
            print(signature)
    for task, count in scores.unparsed.items():
        if count:
            common.say(f"{task}: {count} of {scores.samples[task]} answers name no option or label, and count as wrong")
    _show_airbench(extra.get("airbench") or {})
    if scores.blank_share is not None:
        common.say(
            f"blank share {scores.blank_share:.2f} · kept per label {scores.kept_per_label:.2f} "
            f"· compression {scores.compression:.1f} x"
        )
    elif scores.compression is not None:
        common.say(f"compression {scores.compression:.1f} x · {scores.kept_per_second or 0:.1f} frames kept a second")
    if scores.speed:
        first = scores.speed.get("seconds_to_first_token")
        told = "" if first is None else f" · {1000 * first:.0f} ms to the first token"
        common.say(f"RTFx {scores.speed['rtfx']:.1f} ({scores.speed['audio_seconds']:.0f} s of audio){told}")


def _show_airbench(found: Mapping[str, Any]) -> None:
    if not found:
        return
    if "judge" in found:
        table = common.table("part", "answers", "model", "benchmark's answer", "wins", "ratings not read")
        for part, score in found.items():
            if part != "judge":
                means = [f"{score[name]:.2f}" if name in score else "–" for name in ("model", "reference")]
                wins = f"{score['wins']:.1%}" if "wins" in score else "–"
                table.add_row(escape(part), str(score["answers"]), *means, wins, str(score["unread"]))
    else:
        table = common.table("task", "questions", "strict", "benchmark's rule", "name no option", "not counted by it")
        for task, score in found.items():
            own = "–" if score["benchmark"] is None else f"{score['benchmark']:.1%}"
            counts = str(score["unparsed"]), str(score["dropped"])
            table.add_row(escape(task), str(score["questions"]), f"{score['strict']:.1%}", own, *counts)
    common.console.print(table)


def compare(
    first: Annotated[
        Path,
        typer.Argument(help="What `soundwave evaluate` wrote (--out or --answers), or a model's folder.", metavar="A"),
    ],
    second: Annotated[Path, typer.Argument(help="The same of the other model.", metavar="B")],
    out: Annotated[Path, typer.Option(dir_okay=False, help="Page to write.", metavar="FILE")] = Path("compare.html"),
    test: Annotated[
        Path | None,
        typer.Option(help="For models: the manifest or named test on which both are evaluated.", metavar="TEST"),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder of the corpus of a named test.", metavar="FOLDER")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per batch, for models.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer, for models.")] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Compare two models on the same samples: paired intervals, a randomisation test, and a page to look at.

    Models are evaluated into folders beside the page, which are kept: the same command goes on where it stopped.
    """
    models = [(folder / "config.json").is_file() for folder in (first, second)]
    if any(models) and test is None:
        raise ValueError(
            f"{(first, second)[models.index(True)]}: is a model; name with --test what both are evaluated on"
        )
    if not any(models) and test is not None:
        raise ValueError("--test is for models, but A and B are answers; leave it out")
    if first.resolve() == second.resolve():
        raise ValueError(f"{first} is given twice; name two")
    for folder, is_model in zip((first, second), models, strict=True):
        if not is_model and not folder.exists():
            raise FileNotFoundError(
                f"{folder}: does not exist; give answers of `soundwave evaluate`, or a model's folder"
            )
    places = []
    for letter, folder, is_model in zip("ab", (first, second), models, strict=True):
        place = out.with_name(f"{out.stem}-{letter}") if is_model else folder
        if is_model and test is not None:
            sizes = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
            with redirect_stdout(sys.stderr if as_json else sys.stdout):
                evaluate(test, model=folder, data=data, out=place, **sizes)
        places.append(place)
    from soundwave.evaluation.compare import compare_rows
    from soundwave.evaluation.results import read_answers
    from soundwave.report.comparison import write_comparison

    answers = [read_answers(place) for place in places]
    found = compare_rows(*answers)
    names = _two_names(first, second)
    about = [] if test is None else [f"Test: {test.name}."]
    ctc = [any("blanks" in row for row in rows) for rows in answers]  # frames that are blank are counted for CTC alone
    if ctc[0] != ctc[1]:
        one, other = (names[place] for place in (ctc.index(True), ctc.index(False)))
        about.append(f"Transcripts of {one} are what CTC writes, those of {other} what the language model answers.")
        common.warn(about[-1])
    page = write_comparison(found, names, out, about)
    if as_json:
        scores = [score._asdict() for score in found.scores]
        print(
            json.dumps({"names": names, "alone": found.alone, "scores": scores, "page": str(page)}, ensure_ascii=False)
        )
        return
    common.say(f"A {names[0]} · B {names[1]}")
    table = common.table("task", "score", "samples", "A", "B", "B − A", "95 % interval", "p")
    for one in found.scores:
        scale = 1 if one.score == "BLEU" else 100
        values = [f"{scale * value:.1f}" for value in one.values]
        low, high = (f"{scale * bound:+.1f}" for bound in one.interval)
        p = f"{one.p:.4f}" if one.p >= 0.001 else "< 0.001"
        change = f"{scale * one.difference:+.1f}", f"{low} to {high}", p
        table.add_row(escape(one.task), one.score, str(one.samples), *values, *change)
    common.console.print(table)
    for name, count in zip(names, found.alone, strict=True):
        if count:
            common.say(f"not compared: {count} samples that only {name} has answered")
    common.say(f"page {page}")


def _two_names(first: Path, second: Path) -> tuple[str, str]:
    """The shortest ends of two paths that differ and say more than "model" or "answers"."""
    one, other = (
        path.resolve().with_name(path.resolve().name.removesuffix(".jsonl")).parts for path in (first, second)
    )
    for length in range(1, max(len(one), len(other)) + 1):
        names = "/".join(one[-length:]), "/".join(other[-length:])
        if names[0] != names[1] and not {"model", "answers"} & set(names):
            return names
    return str(first), str(second)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs; several are compared.", metavar="RUN")],
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Page to write; by default report.html in the first run.")
    ] = None,
    utterances: Annotated[int, typer.Option(min=0, help="Number of recordings to show in detail.")] = 6,
    test: Annotated[
        Path | None,
        typer.Option(help="Manifest of recordings to show, best of those held out from training.", metavar="MANIFEST"),
    ] = None,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Show recordings outside their manifest's folder, too.")
    ] = False,
) -> None:
    """Write a page that shows curves, scores, and what the model hears in a few recordings.

    The page is one HTML file that needs no network.
    """
    from soundwave.report import write_report

    common.quiet_transformers()
    out = out or runs[0] / "report.html"
    page = write_report(runs, out, utterances=utterances, test=test, allow_outside=allow_outside)
    common.say(f"report {page}")

"""Commands that measure: `evaluate` and `report`."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.markup import escape

from soundwave.cli import common
from soundwave.cli.common import DEMO_MODEL, AcceptOption, Draft, DraftOption, ModelOption


def evaluate(
    manifest: Annotated[
        Path, typer.Argument(help="Manifest: JSON lines with audio_filepath and text, or with task, prompt and answer.")
    ],
    model: ModelOption = DEMO_MODEL,
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
    answers: Annotated[
        Path | None, typer.Option(dir_okay=False, help="File to write every answer to as it comes, as JSON lines.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Read all recordings first, and stop at one that cannot be used."),
    ] = False,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Permit audio files outside the manifest's folder.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Score a model on a manifest: word error rate, and for other tasks the share of right answers.

    A recording over 30 s is transcribed in pieces; for another task its first 30 s are heard. A sample whose recording
    cannot be used is named and left out.
    """
    common.check_accept(draft, accept)
    from soundwave.data.collate import LeftOut
    from soundwave.data.manifest import read_manifest
    from soundwave.evaluation import run
    from soundwave.evaluation.progress import NAMED
    from soundwave.evaluation.words import check_language

    check_language(language)
    missing: list[LeftOut] = []
    leave_out = None if strict else lambda *fault: missing.append(LeftOut(*fault))
    samples = read_manifest(manifest, allow_outside=allow_outside, leave_out=leave_out, note=common.warn)
    for left in missing[:NAMED]:
        common.warn(f"left out: {left}")
    if len(missing) > NAMED:
        common.warn(f"left out: {len(missing) - NAMED} more samples, which --json lists")
    if not samples:
        raise ValueError(f"{manifest}: every sample was left out")
    if answers is not None:
        if answers.resolve() in (manifest.resolve(), *(sample.audio for sample in samples)):
            raise ValueError(f"{answers}: is read by this evaluation; name another file with --answers")
        answers.parent.mkdir(parents=True, exist_ok=True)
        answers.open("a").close()  # raises before the work what cannot be written
    network, processor = common.load_model(model)
    with ExitStack() as stack:
        settings: dict[str, Any] = {"batch_size": batch_size, "language": language, "strict": strict}
        settings["progress"] = None if quiet else f"evaluating {manifest.name}"
        if answers is not None:
            settings["each"] = _row_writer(answers, stack)
        if ctc or network.config.stage == 1:
            scores = run.evaluate_ctc(network, processor, samples, **settings)
        else:
            scores = run.evaluate(
                network, processor, samples, max_new_tokens=max_new_tokens, draft=draft.value, accept=accept, **settings
            )
    scores.left_out[:0] = missing
    if as_json:
        print(json.dumps(scores.as_dict(), ensure_ascii=False))
        return
    table = common.table("task", "samples", "score", "normaliser")
    for task, count in scores.samples.items():
        table.add_row(escape(task), str(count), scores.text_of(task), scores.normaliser.get(task, ""))
    common.console.print(table)
    for task, count in scores.unparsed.items():
        if count:
            common.say(f"{task}: {count} of {scores.samples[task]} answers name no option, and count as wrong")
    if scores.left_out:
        common.say(f"left out: {len(scores.left_out)} of {len(samples) + len(missing)} samples")
    if scores.cut_off:
        common.say(f"cut off after {max_new_tokens} tokens: {len(scores.cut_off)} answers; raise --max-new-tokens")
    if scores.blank_share is not None:
        common.say(
            f"blank share {scores.blank_share:.2f} · kept per label {scores.kept_per_label:.2f} "
            f"· compression {scores.compression:.1f} x"
        )


def _row_writer(file: Path, stack: ExitStack) -> Callable[[dict[str, Any]], None]:
    """A function that writes rows to a file as JSON lines, each at once. The file is emptied at the first row."""
    opened: list[TextIO] = []

    def write(row: dict[str, Any]) -> None:
        if not opened:
            opened.append(stack.enter_context(common.new_file(file)))
        print(json.dumps(row, ensure_ascii=False), file=opened[0], flush=True)

    return write


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

"""Commands that use a model: `transcribe` and `ask`."""

from contextlib import ExitStack, suppress
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from soundwave.cli import common
from soundwave.cli.common import DEMO_MODEL, AcceptOption, Draft, DraftOption, ModelOption

if TYPE_CHECKING:
    from soundwave.inference.transcript import Transcript


class Format(str, Enum):
    """Formats of a transcript; `soundwave.inference.formats` writes them."""

    text = "text"
    json = "json"
    verbose_json = "verbose_json"
    srt = "srt"
    vtt = "vtt"
    tsv = "tsv"


def transcribe(
    recordings: Annotated[
        list[str],
        typer.Argument(help="Audio files, folders of them, or patterns such as 'talks/*.mp3'.", metavar="FILE"),
    ],
    model: ModelOption = DEMO_MODEL,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON lines with file, seconds and text.")] = False,
    form: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help="text, json, verbose_json (with times of words and segments), subtitles (srt, vtt), or a table (tsv).",
            show_default="that of the name of --out, or text",
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            help="File to write to instead of the terminal; JSON lines if its name ends in .jsonl, which the same "
            "command continues after a stop. Or a folder, such as out/, for a file for each recording; those that are "
            "there, and not older than their recording, are left alone.",
            metavar="FILE|FOLDER/",
        ),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print the text of each window of at most 30 s as soon as it is read.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows of at most 30 s that are read together.")] = 1,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum length of the text of a window, in tokens.")
    ] = 256,
    draft: DraftOption = Draft.ctc,
    accept: AcceptOption = None,
    quiet: common.QuietOption = False,
) -> None:
    """Write down what is said in recordings.

    A recording of more than 30 s is cut at its pauses; where there is none, two windows overlap. CTC writes the text if
    the model has seen stage 1 only, else the language model does. A file that cannot be used is named and left out.
    """
    common.check_accept(draft, accept)
    from soundwave.data.audio import LONGEST_SECONDS, AudioError, seconds_of, shown
    from soundwave.data.files import find_recordings
    from soundwave.evaluation.progress import Progress, aside
    from soundwave.inference.formats import TIMED, render
    from soundwave.inference.results import FolderOfFiles, JsonLines, line_of, plan, row_of, settings_of

    files, passed_over = find_recordings(recordings)
    if not any(file.exists() for file in files):
        raise AudioError(files[0], "does not exist; name an audio file")
    if passed_over:
        names = ", ".join(map(shown, passed_over[:3])) + (", …" if len(passed_over) > 3 else "")
        count = len(passed_over)
        what = "a file that is" if count == 1 else f"{count} files that are"
        common.warn(f"passed over {what} no audio by {'its name' if count == 1 else 'their names'}: {names}")
    kind, chosen, target = plan(out, files, form and form.value, as_json, stream)
    if target is not None and target.exists() and any(file.exists() and file.samefile(target) for file in files):
        raise ValueError(f"--out {out} is one of the recordings, which it would overwrite; name another file")
    timed = chosen in TIMED
    model = common.model_folder(model)
    many = len(files) > 1
    with ExitStack() as stack:
        results: JsonLines | FolderOfFiles | None = None
        file_of_all: TextIO | None = None
        if kind == "lines" and target is not None:
            settings = settings_of(model, draft=draft.value, accept=accept, max_new_tokens=max_new_tokens)
            results = JsonLines(target, files, str(model), times=timed, settings=settings)
            for reason, count in results.again.items():
                common.warn(f"{out}: {count} recording{'s are' if count > 1 else ' is'} read again: {reason}")
        elif kind == "folder" and target is not None:
            results = FolderOfFiles(target, files, chosen)
        if results is not None:
            stack.callback(results.close)
            if results.finished:
                done, total = len(results.finished), len(files)
                common.warn(
                    f"{out} has the transcripts of {done} of {total} recordings already; they are not read again"
                )
                files = [file for file in files if file not in results.finished]
            if not files:
                return
        from soundwave.inference.long import transcribe_each

        loaded = common.load_model(model)
        if results is None and target is not None:
            file_of_all = stack.enter_context(common.new_file(target))
        faults: dict[int, ValueError] = {}
        cut_off: list[int] = []
        seconds = 0.0
        for file in () if quiet else files:
            with suppress(AudioError):  # it is named when its turn comes
                seconds += seconds_of(file)
        title = "transcribing" if seconds > LONGEST_SECONDS else None  # one window has no progress to show
        progress = stack.enter_context(Progress(title, round(seconds), unit="second"))

        def say(number: int, text: str) -> None:
            print(f"{shown(files[number])}: {text}" if many else text, file=file_of_all, flush=True)

        def say_window(number: int, part: "Transcript") -> None:
            with aside():
                say(number, part.text)

        transcripts = transcribe_each(
            files,
            loaded,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            draft=draft.value,
            accept=accept,
            timestamps="word" if chosen == "verbose_json" else "segment" if timed else None,
            leave_out=faults.__setitem__,
            cut_off=cut_off,
            heard=lambda now: progress.go_to(min(round(now), progress.total)),
            said=say_window if stream else None,
        )
        for number, (file, transcript) in enumerate(zip(files, transcripts, strict=True)):
            with aside():
                if number in faults:
                    fault = faults[number]
                    common.warn(f"{'' if isinstance(fault, AudioError) else f'{shown(file)}: '}{fault}", "error")
                    continue
                if number in cut_off:
                    common.warn(
                        f"{shown(file)}: a text was cut off after {max_new_tokens} tokens; raise --max-new-tokens"
                    )
                if not transcript.text:
                    common.warn(f"{shown(file)}: no words were found in {transcript.seconds:.1f} s")
                if isinstance(results, JsonLines):
                    results.write(file, transcript)
                elif isinstance(results, FolderOfFiles):
                    results.write(file, render(transcript, chosen))
                elif kind == "one" and not stream:
                    print(render(transcript, chosen), end="", file=file_of_all, flush=True)
                elif kind == "json":
                    print(line_of(row_of(file, transcript)), end="", file=file_of_all, flush=True)
                elif not stream:
                    say(number, str(transcript))
    if faults:
        if many:
            common.warn(f"{len(faults)} of {len(files)} files could not be used", "error")
        raise typer.Exit(1)


def ask(
    file: Annotated[Path, typer.Argument(help="Audio file: WAV, FLAC, Ogg, MP3, M4A, WebM, …")],
    question: Annotated[str, typer.Argument(help="Question about the recording.")],
    model: ModelOption = DEMO_MODEL,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")] = 128,
) -> None:
    """Ask a question about a recording. The model hears at most its first 30 s."""
    from soundwave.data.audio import seconds_of, shown

    if not question.strip():
        raise ValueError("the question is empty; ask something about the recording")
    seconds_of(file)  # raises for a file that cannot be used, before the model is loaded
    model = common.model_folder(model)
    from soundwave.inference.long import ask as ask_about

    loaded = common.load_model(model)
    if loaded.model.config.stage == 1:
        raise ValueError(f"{model} has seen stage 1 only and cannot answer; train stage 2, or use soundwave transcribe")
    cut_off: list[int] = []
    found = ask_about(file, question, loaded, max_new_tokens=max_new_tokens, cut_off=cut_off)
    if found.heard < found.seconds:
        line = f"{shown(file)}: only the first {found.heard:.1f} of {found.seconds:.1f} s are heard"
        common.errors.print(line, soft_wrap=True, markup=False, highlight=False)
    if cut_off:
        common.warn(f"the answer was cut off after {max_new_tokens} tokens; raise --max-new-tokens")
    print(found)

"""The `soundwave` command."""

import json
import logging
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from soundwave import __version__
from soundwave.provenance import refuse_hidden_kernels
from soundwave.training.distributed import LostProcess, is_first, name_beside_others

if TYPE_CHECKING:
    from soundwave.inference.answer import LoadedModel
    from soundwave.inference.transcript import Transcript

app = typer.Typer(
    help="Teach a text LLM to hear: train and use Soundwave (arXiv 2502.12900) on one GPU, or on a laptop.\n\n"
    "Start with `soundwave demo`, then `soundwave ask FILE 'question'`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    add_completion=False,
)
console, errors = Console(), Console(stderr=True)
DEMO, QUICK_DEMO = Path("runs/demo"), Path("runs/demo-quick")
DEMO_MODEL = DEMO / "model"
TRAINING = ("train", "demo", "ablate")  # commands that continue from their newest checkpoint
ModelOption = Annotated[
    Path,
    typer.Option(
        "--model",
        help=f"Folder of a trained model. Without {DEMO_MODEL} that of {QUICK_DEMO} is used.",
        metavar="FOLDER",
    ),
]


class Draft(str, Enum):
    """Where the draft of a transcript comes from that the language model checks."""

    ctc = "ctc"
    none = "none"


class Format(str, Enum):
    """Formats of a transcript; `soundwave.inference.formats` writes them."""

    text = "text"
    json = "json"
    verbose_json = "verbose_json"
    srt = "srt"
    vtt = "vtt"
    tsv = "tsv"


DraftOption = Annotated[
    Draft,
    typer.Option(
        help="ctc: the LLM checks the transcript that CTC reads, which is the same text, sooner; "
        "none: it writes every token."
    ),
]
AcceptOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        metavar="PROBABILITY",
        help="Take what CTC reads as the text, unread by the LLM, where its least sure token is at least so probable. "
        "Faster, but not the same text.",
    ),
]


def main() -> None:
    """Entry point of the console script.

    An error that the user can mend gives one line on stderr and exit status 1. Any other error keeps its traceback.
    """
    _quiet()
    try:
        app()
    except (ValueError, OSError, FloatingPointError) as error:
        _fail(error)
    except SystemExit as end:
        if end.code == 130 and is_first():  # Ctrl-C outside of training, or for the second time
            goes_on = "; the same command goes on from the newest checkpoint"
            errors.print(f"stopped at once{goes_on if sys.argv[1] in TRAINING else ''}")
        raise
    except (RuntimeError, MemoryError) as error:
        from soundwave.backbones.wheels import EmbeddedError  # imported here, because they import torch
        from soundwave.hardware import OutOfMemory, is_out_of_memory
        from soundwave.training.callbacks import Interrupted

        if isinstance(error, Interrupted):
            if is_first():
                errors.print(str(error), soft_wrap=True, markup=False, highlight=False)
            sys.exit(130)
        if is_out_of_memory(error):
            error = OutOfMemory("out of memory; use a smaller batch (--batch-size), or close other programs")
        if not isinstance(error, EmbeddedError | OutOfMemory | LostProcess):
            raise
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:  # not "[Errno 2] No such …"
        text = f"{error.filename}: {error.strerror}"
    line = " ".join(text.split())
    errors.print(f"{name_beside_others()}[bold red]error:[/] {escape(line)}", soft_wrap=True, highlight=False)
    sys.exit(1)


def _quiet() -> None:
    """Hide what libraries say about features that are not used here: it would bury the lines that matter."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    for name in ("bitsandbytes", "huggingface_hub", "gguf"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _quiet_transformers() -> None:
    """Hide what transformers says, whose import sets its own log level, and its progress bars for loading weights."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _say(line: str) -> None:
    """Print a line that may hold paths: it is neither wrapped nor read as markup."""
    console.print(line, soft_wrap=True, markup=False, highlight=False)


def _warn(line: str, kind: str = "note") -> None:
    """Print a line on stderr that may hold paths."""
    colour = "bold red" if kind == "error" else "yellow"
    errors.print(f"[{colour}]{kind}:[/] {escape(' '.join(line.split()))}", soft_wrap=True, highlight=False)


def _check_accept(draft: Draft, accept: float | None) -> None:
    if accept is not None and draft is Draft.none:
        raise ValueError("--accept takes what CTC reads, but --draft none does without; leave out one of them")


def _new_file(path: Path) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w", encoding="utf-8")


def _table(*headers: str) -> Table:
    """A table that folds long cells, such as paths, because rich would cut them off."""
    return Table(*(Column(header, overflow="fold") for header in headers), box=None)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"soundwave {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """The options that need no command."""


@app.command()
def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder for the model, logs, picture and summary.",
            show_default=f"{DEMO}, with --quick {QUICK_DEMO}",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Short run of a few minutes instead of twenty; only shows that it works.")
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed for the corpus, the weights and the order of the samples.")
    ] = 0,
) -> None:
    """Train all three stages on synthetic speech and show the scores.

    The first run downloads two small backbones (some 160 MB) and makes its own recordings; nothing else is needed.
    """
    from soundwave.demo.run import run_demo

    _quiet_transformers()
    out = out or (QUICK_DEMO if quick else DEMO)
    summary = run_demo(out, quick=quick, seed=seed)
    console.print(_summary_table(summary))
    _say(f"model {out / 'model'} · report {out / 'report.html'} · summary {out / 'summary.json'}")
    _say(f'now try: soundwave ask FILE.wav "Is the speaker female or male?" --model {out / "model"}')


@app.command()
def train(
    stage: Annotated[
        int, typer.Argument(help="Training stage: 1 alignment, 2 shrinking, 3 instruction tuning.", min=1, max=3)
    ],
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings as `key=value` words; they override those of the file.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the settings that would be used, and stop.")] = False,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            help="Continue from the newest checkpoint in `out` even if settings or data have changed, or never "
            "continue. By default a run continues only with the same settings and data.",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at a sample that cannot be used, instead of leaving it out.")
    ] = False,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Permit audio files outside the manifest's folder.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Train one stage on your own recordings.

    Settings that are not given are the paper's; `--show` lists them. Two settings are required: `train` (manifests)
    and `out` (a folder). Stages 2 and 3 start from `model`, the folder that the stage before printed. After a run has
    ended early, by Ctrl-C, a full disk or kill -9, the same command continues it.

    Example: `soundwave train 1 train=data/train.jsonl out=runs/mine/1 steps=300 batch_size=16 learning_rate=1e-3`

    On several GPUs: `torchrun --nproc-per-node 8 --no-python soundwave train 1 …`; a step then has eight times as many
    samples.
    """
    from soundwave.training.settings import StageConfig, allowed_values, load_config
    from soundwave.training.stages import samples_of_step, train_stage

    flags = {"resume": resume, "strict": strict or None, "allow_outside": allow_outside or None, "quiet": quiet or None}
    words = [f"{name}={str(value).lower()}" for name, value in flags.items() if value is not None]
    values = load_config(stage, config, [*(settings or []), *words], to_show=show)
    if show:
        table = _table("setting", "value", "allowed", "meaning")
        for name, value in values.model_dump(mode="json").items():
            text = json.dumps(value) if value is None or isinstance(value, bool) else str(value)
            row = name, text, allowed_values(name), StageConfig.model_fields[name].description or ""
            table.add_row(*map(escape, row))
        if is_first():
            console.print(table)
            errors.print(f"a step has {samples_of_step(values)}", soft_wrap=True, highlight=False)
        return
    _quiet_transformers()
    folder, log, seconds = train_stage(values)
    if not is_first():
        return
    names = ("ctc_loss", "lm_loss", "blank_share", "kept_per_label", "compression")
    last = {name: log[-1][name] for name in names if log[-1].get(name) is not None}
    shown = " · ".join(f"{name} {value:.3g}" for name, value in last.items())
    _say(f"stage {stage}: {values.steps} steps in {seconds:.0f} s · {shown} · model {folder}")


@app.command()
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
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Write down what is said in recordings.

    A recording of more than 30 s is cut at its pauses; where there is none, two windows overlap. CTC writes the text if
    the model has seen stage 1 only, else the language model does. A file that cannot be used is named and left out.
    """
    _check_accept(draft, accept)
    from soundwave.data.audio import LONGEST_SECONDS, AudioError, seconds_of, shown
    from soundwave.data.files import find_recordings
    from soundwave.evaluation.progress import Progress, aside
    from soundwave.inference.formats import TIMED, render
    from soundwave.inference.results import FolderOfFiles, JsonLines, line_of, plan, row_of

    files, passed_over = find_recordings(recordings)
    if not any(file.exists() for file in files):
        raise AudioError(files[0], "does not exist; name an audio file")
    if passed_over:
        names = ", ".join(map(shown, passed_over[:3])) + (", …" if len(passed_over) > 3 else "")
        count = len(passed_over)
        what = "a file that is" if count == 1 else f"{count} files that are"
        _warn(f"passed over {what} no audio by {'its name' if count == 1 else 'their names'}: {names}")
    kind, chosen, target = plan(out, files, form and form.value, as_json, stream)
    if target is not None and target.exists() and any(file.exists() and file.samefile(target) for file in files):
        raise ValueError(f"--out {out} is one of the recordings, which it would overwrite; name another file")
    timed = chosen in TIMED
    model = _model_folder(model)
    many = len(files) > 1
    with ExitStack() as stack:
        results: JsonLines | FolderOfFiles | None = None
        file_of_all: TextIO | None = None
        if kind == "lines" and target is not None:
            results = JsonLines(target, files, str(model), times=timed)
        elif kind == "folder" and target is not None:
            results = FolderOfFiles(target, files, chosen)
        if results is not None:
            stack.callback(results.close)
            if results.finished:
                done, total = len(results.finished), len(files)
                _warn(f"{out} has the transcripts of {done} of {total} recordings already; they are not read again")
                files = [file for file in files if file not in results.finished]
            if not files:
                return
        from soundwave.inference.long import transcribe_each

        loaded = _load_model(model)
        if results is None and target is not None:
            file_of_all = stack.enter_context(_new_file(target))
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
                    _warn(f"{'' if isinstance(fault, AudioError) else f'{shown(file)}: '}{fault}", "error")
                    continue
                if number in cut_off:
                    _warn(f"{shown(file)}: a text was cut off after {max_new_tokens} tokens; raise --max-new-tokens")
                if not transcript.text:
                    _warn(f"{shown(file)}: no words were found in {transcript.seconds:.1f} s")
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
            _warn(f"{len(faults)} of {len(files)} files could not be used", "error")
        raise typer.Exit(1)


@app.command()
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
    model = _model_folder(model)
    from soundwave.inference.long import ask as ask_about

    loaded = _load_model(model)
    if loaded.model.config.stage == 1:
        raise ValueError(f"{model} has seen stage 1 only and cannot answer; train stage 2, or use soundwave transcribe")
    cut_off: list[int] = []
    found = ask_about(file, question, loaded, max_new_tokens=max_new_tokens, cut_off=cut_off)
    if found.heard < found.seconds:
        line = f"{shown(file)}: only the first {found.heard:.0f} s are heard"
        errors.print(line, soft_wrap=True, markup=False, highlight=False)
    if cut_off:
        _warn(f"the answer was cut off after {max_new_tokens} tokens; raise --max-new-tokens")
    print(found)


@app.command()
def serve(
    model: ModelOption = DEMO_MODEL,
    host: Annotated[str, typer.Option(help="Address to serve at; 0.0.0.0 is every one of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to serve at; 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None,
        typer.Option(help="What clients call the model.", show_default="the folder's name, or that above model/"),
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Windows of at most 30 s, or chats, that are answered together.")] = 16,
    max_wait_ms: Annotated[float, typer.Option(help="How long one of them waits for others, in milliseconds.")] = 20,
    max_queue: Annotated[int, typer.Option(help="Requests that may be open at a time; more are told to wait.")] = 64,
    max_upload_mb: Annotated[float, typer.Option(help="Largest upload, in MiB.")] = 25,
    max_seconds: Annotated[float, typer.Option(help="Longest recording, in seconds.")] = 3600,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer that a chat may ask for, in tokens.")] = 2048,
    max_window_tokens: Annotated[int, typer.Option(help="Longest text of a window of a transcript, in tokens.")] = 256,
    requests_per_minute: Annotated[int, typer.Option(help="Of one client; 0 is no limit.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request is given up.")] = 600,
    grace: Annotated[float, typer.Option(help="Seconds that open requests get when the server is stopped.")] = 30,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="SOUNDWAVE_API_KEY",
            help="Key that clients must send. Give it by the variable or the file: others can see a command line.",
            metavar="KEY",
            show_default=False,
        ),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with one key on a line.", metavar="FILE")] = None,
    language: Annotated[
        list[str] | None,
        typer.Option(
            help="Language that the model knows (may be repeated), such as en; requests for others are refused.",
            metavar="CODE",
        ),
    ] = None,
    audio_first: Annotated[
        bool,
        typer.Option(
            "--audio-first/--audio-in-place",
            help="Where the recording of a chat stands: before the words of its turn, as models are trained here, or "
            "where the client puts it.",
        ),
    ] = True,
) -> None:
    """Serve a model in OpenAI's protocol, with a page to try it.

    Endpoints: /v1/audio/transcriptions, /v1/chat/completions, /v1/models, /health, /metrics, and the page at /.
    Ctrl-C or SIGTERM ends the server after its open requests.
    """
    from soundwave.serve.settings import (
        Limits,
        bind,
        check_installed,
        check_languages,
        name_of,
        read_keys,
    )

    limits = Limits(
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        max_queue=max_queue,
        max_upload_mb=max_upload_mb,
        max_seconds=max_seconds,
        max_new_tokens=max_new_tokens,
        max_window_tokens=max_window_tokens,
        requests_per_minute=requests_per_minute,
        timeout=timeout,
        grace=grace,
    )
    keys, languages = read_keys(api_key, api_key_file), check_languages(language or ())
    check_installed()
    model = _model_folder(model)
    bound = bind(host, port)
    if not keys and not bound.getsockname()[0].startswith(("127.", "::1")):
        _warn("everybody who reaches this address may use the model; give a key with --api-key-file", "note")
    loaded = _load_model(model)
    from soundwave.serve.server import serve as serve_model

    name = name or name_of(model)
    serve_model(
        loaded,
        bound,
        name=name,
        limits=limits,
        keys=keys,
        languages=languages,
        audio_first=audio_first,
        version=__version__,
        ready=lambda address: print(f"serving {name} at {address}", flush=True),
    )


@app.command()
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
    _check_accept(draft, accept)
    from soundwave.data.collate import LeftOut
    from soundwave.data.manifest import read_manifest
    from soundwave.evaluation import run
    from soundwave.evaluation.progress import NAMED
    from soundwave.evaluation.words import check_language

    check_language(language)
    missing: list[LeftOut] = []
    leave_out = None if strict else lambda *fault: missing.append(LeftOut(*fault))
    samples = read_manifest(manifest, allow_outside=allow_outside, leave_out=leave_out, note=_warn)
    for left in missing[:NAMED]:
        _warn(f"left out: {left}")
    if len(missing) > NAMED:
        _warn(f"left out: {len(missing) - NAMED} more samples, which --json lists")
    if not samples:
        raise ValueError(f"{manifest}: every sample was left out")
    if answers is not None:
        if answers.resolve() in (manifest.resolve(), *(sample.audio for sample in samples)):
            raise ValueError(f"{answers}: is read by this evaluation; name another file with --answers")
        answers.parent.mkdir(parents=True, exist_ok=True)
        answers.open("a").close()  # raises before the work what cannot be written
    network, processor = _load_model(model)
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
    table = _table("task", "samples", "score", "normaliser")
    for task, count in scores.samples.items():
        table.add_row(escape(task), str(count), scores.text_of(task), scores.normaliser.get(task, ""))
    console.print(table)
    for task, count in scores.unparsed.items():
        if count:
            _say(f"{task}: {count} of {scores.samples[task]} answers name no option, and count as wrong")
    if scores.left_out:
        _say(f"left out: {len(scores.left_out)} of {len(samples) + len(missing)} samples")
    if scores.cut_off:
        _say(f"cut off after {max_new_tokens} tokens: {len(scores.cut_off)} answers; raise --max-new-tokens")
    if scores.blank_share is not None:
        _say(
            f"blank share {scores.blank_share:.2f} · kept per label {scores.kept_per_label:.2f} "
            f"· compression {scores.compression:.1f} x"
        )


def _row_writer(file: Path, stack: ExitStack) -> Callable[[dict[str, Any]], None]:
    """A function that writes rows to a file as JSON lines, each at once. The file is emptied at the first row."""
    opened: list[TextIO] = []

    def write(row: dict[str, Any]) -> None:
        if not opened:
            opened.append(stack.enter_context(_new_file(file)))
        print(json.dumps(row, ensure_ascii=False), file=opened[0], flush=True)

    return write


@app.command()
def splice(
    index: Annotated[Path, typer.Argument(help="index.jsonl of single words: audio_filepath, text, speaker, split.")],
    out: Annotated[Path, typer.Argument(help="Folder for the audio and the manifest.")],
    split: Annotated[str, typer.Option(help="Split whose clips are used.")] = "train",
    count: Annotated[int, typer.Option(min=1, help="Number of strings.")] = 1000,
    max_words: Annotated[int, typer.Option(min=1, help="Maximum number of words in a string.")] = 8,
    without: Annotated[
        list[str] | None, typer.Option("--without-speaker", help="Speaker to leave out (may be repeated).")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only-speaker", help="Speaker to use instead of all (may be repeated).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for the strings and their gaps.")] = 0,
) -> None:
    """Splice recordings of single words into strings, as data for training or testing."""
    from soundwave.data.splicing import splice_strings

    manifest = splice_strings(
        index,
        out,
        split=split,
        count=count,
        max_words=max_words,
        seed=seed,
        exclude_speakers=tuple(without or ()),
        only_speakers=tuple(only or ()),
    )
    _say(f"{count} strings · manifest {manifest}")


@app.command()
def memory(
    stage: Annotated[int, typer.Option(min=1, max=3, help="Training stage.")] = 1,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Clips per forward pass; by default the largest number that fits.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Length of each clip in seconds, 0.01 to 30.")] = 30.0,
    gpu: Annotated[float, typer.Option(help="Memory of the card in GiB; a 24 GB card has 24.")] = 24.0,
    eager: Annotated[bool, typer.Option("--eager", help="Plain PyTorch instead of the fused operations.")] = False,
    kept: Annotated[float, typer.Option(help="Kept frames per second, above 0; at 25 nothing is shrunk.")] = 3.0,
    text_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a sample's prompt and answer.")] = 150,
    answer_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a sample's answer; by default 80, but at most --text-tokens.")
    ] = None,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="A step on the CPU, which takes the machine's memory; --gpu is its size.")
    ] = False,
    float32: Annotated[
        bool, typer.Option("--float32", help="Products and frozen weights in float32 instead of bfloat16.")
    ] = False,
) -> None:
    """Predict the GPU memory of a training step, part by part, for Whisper-large-v3 and Llama-3.1-8B in 4 bits.

    No GPU is needed: the prediction is arithmetic. The largest batch that fits is printed too, with room left for the
    error of the prediction. All sizes are in GiB.
    """
    from soundwave.memory import TOLERANCE, largest_batch, predict, table

    settings = {
        "gpu_gib": gpu, "kept_per_second": kept, "text_tokens": text_tokens, "answer_tokens": answer_tokens,
        "implementation": "eager" if eager else "fused", "device": "cpu" if cpu else "cuda",
        "dtype": "float32" if float32 else "bfloat16",
    }  # fmt: skip
    try:
        most = largest_batch(stage, seconds, **settings)
    except ValueError as error:  # "name = value, but …", with the name of the argument: it becomes the option's
        name, _, rest = str(error).partition(" ")
        option = {"gpu_gib": "gpu", "kept_per_second": "kept"}.get(name, name.replace("_", "-"))
        raise ValueError(f"--{option} {rest.replace('text_tokens', '--text-tokens')}") from None
    console.print(table(predict(stage, batch or max(most, 1), seconds, **settings)))
    _say(f"largest batch of stage {stage} on {gpu:g} GiB, {TOLERANCE:.0%} kept free: {most or 'none'}")


@app.command()
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

    _quiet_transformers()
    out = out or runs[0] / "report.html"
    page = write_report(runs, out, utterances=utterances, test=test, allow_outside=allow_outside)
    _say(f"report {page}")


@app.command()
def ablate(
    variants: Annotated[
        list[str] | None,
        typer.Argument(
            help="Variants to train, by default all: soundwave, no-cross-attention, no-stage-1, runs, swapped, "
            "stacked-3, stacked-4, uneven, uneven-plain, no-labels.",
            metavar="VARIANT…",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the models, answers and tables.")] = Path(
        "runs/ablations"
    ),
    scale: Annotated[
        float, typer.Option(min=0.01, max=10, help="Factor on the number of steps of the demonstration.")
    ] = 1.0,
    jobs: Annotated[
        int, typer.Option(min=1, help="Trainings that run at the same time; times are measured after all of them.")
    ] = 1,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed for the corpus, the weights and the order of the samples.")
    ] = 0,
) -> None:
    """Leave out or replace parts of Soundwave and compare: word error rates, accuracies, lengths, times.

    There are ten variants, each of which takes two thirds of the time of `soundwave demo`, and four alignments from
    which they start. After an interruption the same command continues.
    """
    from soundwave.demo.ablation import VARIANTS, run_ablations

    _quiet_transformers()
    results = run_ablations(out, variants or tuple(VARIANTS), scale=scale, jobs=jobs, seed=seed)
    table = _table("variant", "WER", "voice", "rate", "intent", "question", "kept a second")
    for name, found in results.items():
        accuracies = (f"{found['accuracy'][task]['value']:.1%}" for task in ("voice", "rate", "intent", "question"))
        table.add_row(name, f"{found['wer']['value']:.1%}", *accuracies, f"{found['kept_per_second']:.1f}")
    console.print(table)
    _say(f"tables {out / 'ablations.md'} · report {out / 'report.html'} · report of stage 1 {out / 'alignments.html'}")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Folder of the checkpoint.", metavar="SRC")],
    target: Annotated[Path, typer.Argument(help="Folder to write, which must not exist yet.", metavar="OUT")],
) -> None:
    """Convert a checkpoint from the layout of the authors' release to ours, or back.

    SRC says which of the two it is. No weight changes: there and back, every tensor has the same bits.
    """
    _quiet_transformers()
    from soundwave.model.released import convert as convert_folder

    layout = convert_folder(source, target, _say)
    _say(f"{target} is in {'our' if layout == 'soundwave' else 'the released'} layout")


@app.command()
def merge(
    model: Annotated[Path, typer.Argument(help="Folder of a model of stage 2 or 3.", metavar="MODEL")],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must be absent or empty.", metavar="OUT")],
    dtype: Annotated[
        str, typer.Option(help="Dtype of the language model's weights: bfloat16, float16 or float32.")
    ] = "bfloat16",
) -> None:
    """Merge LoRA into the language model's 16-bit weights, for inference.

    OUT is a model that every command takes; `OUT/language_model` is a language model for transformers and others. A
    model that was trained on 4-bit weights is merged into these, in 16 bits, because LoRA has learnt beside them.
    Tensors are merged one after another, which takes some 5 GB of memory whatever the size of the model.
    """
    folder = _model_folder(model)
    _quiet_transformers()
    from soundwave.model.merging import merge as merge_folder

    _say(f"model {merge_folder(folder, out, dtype=dtype, tell=_say)}")


@app.command()
def card(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model.", metavar="MODEL")],
    answers: Annotated[
        list[Path] | None,
        typer.Option(help="Answers that `soundwave evaluate --answers` wrote, to be scored (may be repeated)."),
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="Licence of the model, by the Hub's name, such as cc-by-4.0.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a card that is there already.")] = False,
) -> None:
    """Write a model card: data with hours and licences, stages, scores, backbones, and how to use the model.

    The card is README.md in the model's folder. It tells what training and evaluation have recorded.
    """
    from soundwave.evaluation.record import record_scores
    from soundwave.model.hub import write_model_card

    folder = _model_folder(model)
    if answers:
        record_scores(folder, answers)
    _say(f"card {write_model_card(folder, licence=licence, replace=force)}")


@app.command()
def push(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model.", metavar="MODEL")],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub: owner/name.", metavar="REPOSITORY")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Who sees a new repository; by default the Hub decides.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="Licence of the model, by the Hub's name, if it has no card yet.")
    ] = None,
) -> None:
    """Upload a trained model to Hugging Face's Hub, with a card (`soundwave card`).

    Log in first: `hf auth login`.
    """
    from soundwave.model.hub import push as push_folder

    _say(f"uploaded {push_folder(_model_folder(model), repo_id, private=private, licence=licence)}")


@app.command()
def doctor() -> None:
    """Show what is installed, and which device, dtype, implementation and attention will run, and why."""
    from soundwave.doctor import findings

    table = _table("what", "runs", "why")
    for row in findings():
        table.add_row(*map(escape, row))
    console.print(table)


def _model_folder(folder: Path) -> Path:
    """The folder from which the model is loaded; it is looked at before the import of torch, which takes seconds."""
    if folder == DEMO_MODEL and not folder.is_dir() and (QUICK_DEMO / "model" / "config.json").is_file():
        folder = QUICK_DEMO / "model"
        errors.print(f"there is no {DEMO_MODEL}; using {folder}, the quick demonstration's", soft_wrap=True)
    if not (folder / "config.json").is_file():
        if (folder / "model" / "config.json").is_file():
            raise FileNotFoundError(f"{folder} holds no model; give --model {folder / 'model'}")
        hint = "train one with `soundwave demo`" if folder == DEMO_MODEL else "give the folder that training printed"
        raise FileNotFoundError(f"{folder} holds no model; {hint}, or name another with --model")
    return folder


def _load_model(folder: Path) -> "LoadedModel":
    folder = _model_folder(folder)
    _quiet_transformers()
    from soundwave.hardware import keep_memory_flat
    from soundwave.inference.answer import load_model

    keep_memory_flat()
    return load_model(folder)


def _summary_table(summary: dict) -> Table:
    def percent(value: float) -> str:
        return f"{value:.1%}"

    one, three, seconds = summary["stage1"], summary["stage3"], summary["seconds"]
    table = Table("", "score", "samples", title=f"Soundwave demo · {seconds['total'] / 60:.1f} minutes", box=None)
    samples = summary["samples"]
    table.add_row("I   CTC word error rate", percent(one["wer"]), "")
    table.add_row("I   blank share · kept per label", f"{one['blank_share']:.2f} · {one['kept_per_label']:.2f}", "")
    table.add_row("II  word error rate", percent(summary["stage2"]["wer"]), "")
    table.add_row("III word error rate", percent(three["wer"]), str(samples["transcribe"]))
    unseen = str(samples["transcribe_unseen_voices"])
    table.add_row("III word error rate, unseen voices", percent(three["wer_unseen_voices"]), unseen)
    for task, value in three["accuracy"].items():
        table.add_row(f"III {task}", percent(value), str(samples[task]))
    table.add_row("seconds I · II · III", " · ".join(f"{seconds[f'stage{i}']:.0f}" for i in (1, 2, 3)), "")
    return table


if __name__ == "__main__":  # python -m soundwave.cli
    refuse_hidden_kernels()
    main()

"""The `soundwave` command."""

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from soundwave import __version__
from soundwave.provenance import refuse_hidden_kernels

if TYPE_CHECKING:
    from soundwave.inference.answer import LoadedModel

app = typer.Typer(
    help="Teach a text LLM to hear: train and use Soundwave (arXiv 2502.12900) on one GPU, or on a laptop.\n\n"
    "Start with `soundwave demo`, then `soundwave ask FILE 'question'`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    add_completion=False,
)
console, errors = Console(), Console(stderr=True)
DEMO_MODEL = Path("runs/demo/model")
TRAINING = ("train", "demo", "ablate")  # commands that go on where they were stopped
ModelOption = Annotated[Path, typer.Option("--model", help="Folder of a trained model.", metavar="FOLDER")]


def main() -> None:
    """Entry point: what a user can mend is one line on stderr and exit status 1; the rest is a traceback."""
    _quiet()
    try:
        app()
    except (ValueError, OSError, FloatingPointError) as error:
        _fail(error)
    except SystemExit as end:
        if end.code == 130:  # Ctrl-C while nothing was trained, or the second one
            goes_on = "; the same command goes on from the newest checkpoint"
            errors.print(f"stopped at once{goes_on if sys.argv[1] in TRAINING else ''}")
        raise
    except RuntimeError as error:
        from soundwave.backbones.wheels import EmbeddedError  # here, as they bring torch with them
        from soundwave.training.callbacks import Interrupted

        if isinstance(error, Interrupted):
            errors.print(str(error), soft_wrap=True, markup=False, highlight=False)
            sys.exit(130)
        if not isinstance(error, EmbeddedError):
            raise
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    line = " ".join(str(error).split())
    errors.print(f"[bold red]error:[/] {escape(line)}", soft_wrap=True, highlight=False)
    sys.exit(1)


def _quiet() -> None:
    """Libraries' advice about features that are not used here would bury the lines that matter."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    for name in ("bitsandbytes", "huggingface_hub", "gguf"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _quiet_transformers() -> None:
    """The same for transformers, which sets its own level when it is imported, and its bars for reading weights."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _say(line: str) -> None:
    """A line with paths in it: neither wrapped, nor read as markup."""
    console.print(line, soft_wrap=True, markup=False, highlight=False)


def _table(*headers: str) -> Table:
    """A table that folds long cells, paths above all, where rich would cut them off."""
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
    out: Annotated[Path, typer.Option(help="Folder for the model, logs, picture and summary.")] = Path("runs/demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A few minutes instead of twenty; shows that it runs.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the corpus, the weights and the order of the samples.")] = 0,
) -> None:
    """Train all three stages on synthetic speech and show the scores.

    The first run fetches two small backbones (some 160 MB) and makes its own recordings; nothing else is needed.
    """
    from soundwave.demo.run import run_demo

    _quiet_transformers()
    summary = run_demo(out, quick=quick, seed=seed)
    console.print(_summary_table(summary))
    _say(f"model {out / 'model'} · report {out / 'report.html'} · summary {out / 'summary.json'}")
    _say(f'now try: soundwave ask FILE.wav "Is the speaker a woman or a man?" --model {out / "model"}')


@app.command()
def train(
    stage: Annotated[int, typer.Argument(help="1 alignment, 2 shrinking, 3 instruction tuning.", min=1, max=3)],
    settings: Annotated[list[str] | None, typer.Argument(help="`key=value` …, over the file's.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the settings that would be used, and stop.")] = False,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            help="Go on from the newest checkpoint in `out`, with other settings too; or refuse to. "
            "Without either, a run goes on if its settings and data are the same.",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at a sample that cannot be used; else it is left out.")
    ] = False,
    allow_outside: Annotated[bool, typer.Option("--allow-outside", help="Audio may lie outside the folder.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Train one stage on your own recordings.

    Settings not given are the paper's; `--show` lists them. `train` (manifests) and `out` (a folder) are needed.
    Stages 2 and 3 go on from `model`, the folder that the stage before printed. A run that ended early, by Ctrl-C, by
    a full disk or by kill -9, goes on with the same command.

    Example: `soundwave train 1 train=data/train.jsonl out=runs/mine/1 steps=300 batch_size=16 learning_rate=1e-3`
    """
    from soundwave.training.settings import StageConfig, load_config
    from soundwave.training.stages import train_stage

    flags = {"resume": resume, "strict": strict or None, "allow_outside": allow_outside or None, "quiet": quiet or None}
    words = [f"{name}={str(value).lower()}" for name, value in flags.items() if value is not None]
    values = load_config(stage, config, [*(settings or []), *words], to_show=show)
    if show:
        table = _table("setting", "value", "meaning")
        for name, value in values.model_dump(mode="json").items():
            table.add_row(name, escape(str(value)), StageConfig.model_fields[name].description or "")
        console.print(table)
        return
    _quiet_transformers()
    folder, log, seconds = train_stage(values)
    last = {name: log[-1][name] for name in ("ctc_loss", "lm_loss", "blank_share", "compression") if name in log[-1]}
    shown = " · ".join(f"{name} {value:.3g}" for name, value in last.items())
    _say(f"stage {stage}: {values.steps} steps in {seconds:.0f} s · {shown} · model {folder}")


@app.command()
def transcribe(
    files: Annotated[list[Path], typer.Argument(help="WAV, FLAC, Ogg or MP3.", metavar="FILE")],
    model: ModelOption = DEMO_MODEL,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line: file, seconds, text.")] = False,
) -> None:
    """Write down what is said in recordings.

    A recording over 30 s is read in pieces, cut where it is quietest. A model of stage 1 is read by CTC.
    """
    from soundwave.data.audio import load_audio
    from soundwave.inference.long import transcribe_each

    loaded = [load_audio(file) for file in files]
    for file, transcript in zip(files, transcribe_each(loaded, _load_model(model)), strict=True):
        if as_json:
            row = {"file": str(file), "seconds": transcript.seconds, "text": transcript.text}
            print(json.dumps(row, ensure_ascii=False))
        else:
            print(f"{file}: {transcript}" if len(files) > 1 else transcript)


@app.command()
def ask(
    file: Annotated[Path, typer.Argument(help="WAV, FLAC, Ogg or MP3.")],
    question: Annotated[str, typer.Argument(help="What you want to know about the recording.")],
    model: ModelOption = DEMO_MODEL,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
) -> None:
    """Ask a question about a recording; of a long one the first 30 s are heard."""
    from soundwave.data.audio import seconds_of
    from soundwave.inference.long import ask as ask_about

    seconds_of(file)  # a file that cannot be used is told before the model is loaded
    loaded = _load_model(model)
    if loaded.model.config.stage == 1:
        raise ValueError(f"{model} has seen stage 1 only and cannot answer; train stage 2, or use soundwave transcribe")
    found = ask_about(file, question, loaded, max_new_tokens=max_new_tokens)
    if found.heard < found.seconds:
        line = f"{file}: only the first {found.heard:.0f} s are heard"
        errors.print(line, soft_wrap=True, markup=False, highlight=False)
    print(found)


@app.command()
def evaluate(
    manifest: Annotated[
        Path, typer.Argument(help="JSON lines: audio_filepath and text; for other tasks task, prompt and answer.")
    ],
    model: ModelOption = DEMO_MODEL,
    ctc: Annotated[bool, typer.Option("--ctc", help="Score the CTC reading instead of the LLM's answers.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at a time.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    answers: Annotated[Path | None, typer.Option(help="Write every answer here, as JSON lines.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
    allow_outside: Annotated[bool, typer.Option("--allow-outside", help="Audio may lie outside the folder.")] = False,
) -> None:
    """Score a model on a manifest: word error rate, and for other tasks the share of right answers."""
    from soundwave.data.manifest import read_manifest
    from soundwave.evaluation import run

    samples = read_manifest(manifest, allow_outside=allow_outside)
    if answers is not None:
        answers.parent.mkdir(parents=True, exist_ok=True)
    network, processor = _load_model(model)
    if ctc or network.config.stage == 1:
        scores = run.evaluate_ctc(network, processor, samples, batch_size=batch_size)
    else:
        settings = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
        scores = run.evaluate(network, processor, samples, **settings)
    if answers is not None:
        rows = [dict(zip(("sample", "task", "reference", "answer"), row, strict=True)) for row in scores.answers]
        answers.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    if as_json:
        print(json.dumps({name: value for name, value in vars(scores).items() if name != "answers"}))
        return
    table = Table("task", "samples", "score", box=None)
    for task, count in scores.samples.items():
        value = f"WER {scores.wer:.1%}" if task == "transcribe" else f"accuracy {scores.accuracy[task]:.1%}"
        table.add_row(task, str(count), value)
    console.print(table)
    if scores.blank_share is not None:
        console.print(
            f"blank share {scores.blank_share:.2f} · kept per label {scores.kept_per_label:.2f} "
            f"· compression {scores.compression:.1f} x"
        )


@app.command()
def splice(
    index: Annotated[Path, typer.Argument(help="index.jsonl of single words: audio_filepath, text, speaker, split.")],
    out: Annotated[Path, typer.Argument(help="Folder for the audio and the manifest.")],
    split: Annotated[str, typer.Option(help="Which clips to use.")] = "train",
    count: Annotated[int, typer.Option(min=1, help="How many strings.")] = 1000,
    max_words: Annotated[int, typer.Option(min=1, help="Longest string.")] = 8,
    without: Annotated[
        list[str] | None, typer.Option("--without-speaker", help="Leave this speaker out (may repeat).")
    ] = None,
    only: Annotated[list[str] | None, typer.Option("--only-speaker", help="Use this speaker (may repeat).")] = None,
    seed: Annotated[int, typer.Option(help="Of the strings and their gaps.")] = 0,
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
    stage: Annotated[int, typer.Option(min=1, max=3, help="Of training.")] = 1,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Clips a forward pass; without, the largest that fits.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Of each clip, 0.01 to 30.")] = 30.0,
    gpu: Annotated[float, typer.Option(help="Memory of the card in GiB; a 24 GB card has 24.")] = 24.0,
    eager: Annotated[bool, typer.Option("--eager", help="Plain PyTorch instead of the fused operations.")] = False,
    kept: Annotated[float, typer.Option(help="Frames kept a second, above 0; 25: nothing is shrunk.")] = 3.0,
    text_tokens: Annotated[int, typer.Option(min=1, help="Prompt and answer of a sample.")] = 150,
    answer_tokens: Annotated[
        int | None, typer.Option(min=1, help="Those of them that are learned; without, 80 or all, if fewer.")
    ] = None,
) -> None:
    """Predict the GPU memory of a training step, part by part, for Whisper-large-v3 and Llama-3.1-8B in 4 bits.

    No GPU is needed: it is arithmetic. Also says the largest batch that fits, with room left for what the prediction
    may be off. All sizes are in GiB.
    """
    from soundwave.memory import TOLERANCE, largest_batch, predict, table

    settings = {
        "gpu_gib": gpu, "kept_per_second": kept, "text_tokens": text_tokens, "answer_tokens": answer_tokens,
        "implementation": "eager" if eager else "fused",
    }  # fmt: skip
    try:
        most = largest_batch(stage, seconds, **settings)
    except ValueError as error:  # "name = value, but …", where the name is the function's
        name, _, rest = str(error).partition(" ")
        option = {"gpu_gib": "gpu", "kept_per_second": "kept"}.get(name, name.replace("_", "-"))
        raise ValueError(f"--{option} {rest.replace('text_tokens', '--text-tokens')}") from None
    console.print(table(predict(stage, batch or max(most, 1), seconds, **settings)))
    _say(f"largest batch of stage {stage} on {gpu:g} GiB, {TOLERANCE:.0%} kept free: {most or 'none'}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs; several are compared.", metavar="RUN…")],
    out: Annotated[Path | None, typer.Option(help="The page; default: report.html in the first run.")] = None,
    utterances: Annotated[int, typer.Option(min=0, help="Recordings to look into.")] = 6,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Show recordings outside their manifest's folder, too.")
    ] = False,
) -> None:
    """Write a page to look at: curves, scores, and what the model hears in a few recordings.

    One HTML file that needs no network.
    """
    from soundwave.report import write_report

    _quiet_transformers()
    page = write_report(runs, out or runs[0] / "report.html", utterances=utterances, allow_outside=allow_outside)
    _say(f"report {page}")


@app.command()
def ablate(
    variants: Annotated[
        list[str] | None,
        typer.Argument(
            help="All without: soundwave, no-cross-attention, no-stage-1, runs, swapped, stacked-3, stacked-4, uneven, "
            "uneven-plain, no-labels.",
            metavar="VARIANT…",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for everything.")] = Path("runs/ablations"),
    scale: Annotated[float, typer.Option(min=0.01, max=10, help="Of the demonstration's steps.")] = 1.0,
    jobs: Annotated[int, typer.Option(min=1, help="Trainings at a time; what is timed comes after all.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the corpus, the weights and the order of the samples.")] = 0,
) -> None:
    """Leave out or replace parts of Soundwave and compare: word error rates, accuracies, lengths, times.

    Ten variants, of which each takes two thirds of `soundwave demo`'s time, and four alignments that they start from.
    The same command goes on where it was interrupted.
    """
    from soundwave.demo.ablation import VARIANTS, run_ablations

    _quiet_transformers()
    results = run_ablations(out, variants or tuple(VARIANTS), scale=scale, jobs=jobs, seed=seed)
    table = _table("variant", "WER", "voice", "rate", "intent", "question", "kept a second")
    for name, found in results.items():
        accuracies = (f"{found['accuracy'][task]['value']:.1%}" for task in ("voice", "rate", "intent", "question"))
        table.add_row(name, f"{found['wer']['value']:.1%}", *accuracies, f"{found['kept_per_second']:.1f}")
    console.print(table)
    _say(f"tables {out / 'ablations.md'} · report {out / 'report.html'} · of stage I {out / 'alignments.html'}")


@app.command()
def doctor() -> None:
    """Show what is installed, and which device, dtype, implementation and attention will run, and why."""
    from soundwave.doctor import findings

    table = _table("what", "runs", "why")
    for row in findings():
        table.add_row(*map(escape, row))
    console.print(table)


def _load_model(folder: Path) -> "LoadedModel":
    if not (folder / "config.json").is_file():
        hint = "train one with `soundwave demo`" if folder == DEMO_MODEL else "give the folder that training printed"
        raise FileNotFoundError(f"{folder} holds no model; {hint}, or name another with --model")
    _quiet_transformers()
    from soundwave.inference.answer import load_model

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

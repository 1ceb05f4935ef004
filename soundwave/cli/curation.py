"""Commands that choose, build and make data: `curate`, `data build` and `data speak`."""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from soundwave import backbones
from soundwave.cli import common

SHOWN = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)  # limits of the word error rate of which `curate` tells what they would keep


def curate(
    manifest: Annotated[Path, typer.Argument(help="Recordings with their texts; all that training reads.")],
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder for the three files.", show_default="that of the manifest"),
    ] = None,
    whisper: Annotated[
        str, typer.Option(help="Whisper that transcribes: a Hub id, a folder or an embedded name.")
    ] = backbones.WHISPER,
    wer: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Word error rate below which a line is kept, as a share: 0.1 is 10 %.",
            show_default="0.1, as in the paper for Whisper-medium; for the embedded one 0.7",
        ),
    ] = None,
    min_seconds: Annotated[float, typer.Option(min=0, max=30, help="Length of the shortest recording.")] = 3.0,
    max_seconds: Annotated[float, typer.Option(min=0, max=30, help="Length of the longest recording.")] = 30.0,
    max_characters: Annotated[int, typer.Option(min=1, help="Length of the longest text.")] = 200,
    max_frames: Annotated[
        float, typer.Option(min=0, help="Frames of 10 ms for each character of the text, at most.")
    ] = 100.0,
    language: Annotated[
        str | None,
        typer.Option(help="Language of all recordings, such as en.", show_default="that of each line, or its script"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Recordings that are transcribed together.")] = 16,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes (with --ray: actors), each with a Whisper.", show_default="one a core, or a GPU"
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each process; other texts may come of more.")] = 1,
    ray: Annotated[
        bool, typer.Option("--ray", help="Transcribe on a Ray cluster: that of RAY_ADDRESS, or one on this machine.")
    ] = False,
    allow_outside: common.AllowOutsideOption = False,
    quiet: common.QuietOption = False,
) -> None:
    """Leave out lines with a wrong transcript: those whose text is not what a Whisper hears.

    For data/train.jsonl it writes train-kept.jsonl, train-left-out.jsonl with the reasons, and train-transcripts.jsonl.
    After a kill the same command goes on. With another --wer nothing is transcribed again.
    """
    if wer is not None and wer > 1:
        raise ValueError(f"--wer {wer:g} keeps lines of which every word is wrong; give a share: 0.1 is 10 %")
    common.quiet_transformers()
    from soundwave.curation.curate import Filters, limit_of
    from soundwave.curation.curate import curate as curate_manifest

    wer = limit_of(whisper) if wer is None else wer
    filters = Filters(wer, min_seconds, max_seconds, max_characters, max_frames)
    found = curate_manifest(
        manifest,
        out=out,
        whisper=whisper,
        filters=filters,
        batch_size=batch_size,
        workers=workers,
        threads=threads,
        language=language,
        ray=ray,
        allow_outside=allow_outside,
        note=common.warn,
        progress=None if quiet else f"curating {manifest.name}",
    )
    if found.damaged:
        common.warn(f"{found.transcripts}: {found.damaged} damaged lines were transcribed again")
    table = common.table("lines", "", "hours")
    for reason, count in found.lines.items():
        table.add_row(reason if reason == "kept" else f"left out: {reason}", str(count), f"{found.hours[reason]:.2f}")
    common.console.print(table)
    kept = [f"{limit:g}: {sum(rate < limit for rate in found.rates)}" for limit in sorted({*SHOWN, wer})]
    common.say(f"kept by --wer {' · '.join(kept)} of the {len(found.rates)} lines that the other limits keep")
    if found.heard:
        speed = found.heard / found.spent
        common.say(f"{found.heard:.0f} s of audio in {found.spent:.0f} s: {speed:.1f} audio-seconds a second")
    common.say(f"kept {found.kept} · left out {found.left_out}")


def build(
    recipe: Annotated[Path, typer.Argument(help="YAML file of sources and tasks.", metavar="RECIPE.yaml")],
    out: Annotated[Path, typer.Argument(help="Folder to build, which must not exist yet.", metavar="OUT")],
    quiet: common.QuietOption = False,
) -> None:
    """Build a manifest and its recordings from manifests: spliced speakers, sounds between speech, questions.

    The same recipe gives the same bytes. After a kill the same command goes on.
    """
    from soundwave.curation.build import build as build_recipe

    built = build_recipe(recipe, out, note=common.warn, progress=None if quiet else f"building {out.name}")
    counts = " · ".join(f"{task} {count}" for task, count in built.samples.items())
    common.say(f"{counts} · {built.hours:.2f} hours")
    common.say(f"manifest {built.manifest}{' (it was there already)' if built.was_there else ''}")


def speak(
    out: Annotated[Path, typer.Argument(help="Folder for recordings and manifest, which must not exist yet.")],
    count: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of sentences; of --text the first ones.", show_default="5000, or all of --text"
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            exists=True,
            help="File with one sentence a line, which become the transcripts as they stand. Without it the language "
            "model writes sentences, in lower case without punctuation.",
            metavar="FILE",
        ),
    ] = None,
    voice: Annotated[
        list[str] | None,
        typer.Option(
            help="Language or accent of eSpeak NG, such as de or en-us (may be repeated).",
            show_default="eight accents of English",
        ),
    ] = None,
    language_model: Annotated[
        str | None,
        typer.Option(
            help="Language model that writes the sentences: a Hub id or a folder.", show_default="the embedded one"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed for sentences, voices, rates and pitches.")] = 0,
    quiet: common.QuietOption = False,
) -> None:
    """Make synthetic speech for a first pass of stage 1: sentences that eSpeak NG says in many voices.

    It is meant for those who have minutes of recordings: train on it first, then on them. After a kill the same command
    goes on with the sentences that were written.
    """
    if text is not None and language_model is not None:
        raise ValueError("--language-model writes sentences, but --text has them; leave out one of them")
    if voice and text is None:
        raise ValueError("--voice needs --text, since the language model writes English")
    common.quiet_transformers()
    from tqdm import tqdm

    from soundwave import backbones
    from soundwave.curation.speak import ENGLISH
    from soundwave.curation.speak import speak as speak_sentences

    with ExitStack() as stack:
        bars: dict[str, tqdm] = {}
        told: dict[str, int] = {}  # tenths

        def show(what: str, done: int, of: int) -> None:
            if not sys.stderr.isatty():
                if not quiet and 10 * done // of > told.get(what, 0):
                    told[what] = 10 * done // of
                    common.errors.print(f"{what}: {done} of {of}", highlight=False)
                return
            if what not in bars:
                bars[what] = stack.enter_context(tqdm(total=of, desc=what, disable=quiet))
            bars[what].update(done - bars[what].n)

        made = speak_sentences(
            out,
            count=5000 if count is None and text is None else count,
            text=text,
            voices=voice or ENGLISH,
            language_model=language_model or backbones.LANGUAGE_MODEL,
            seed=seed,
            progress=show,
        )
    common.say(f"{made.sentences} sentences · {made.words} different words · {made.seconds / 3600:.2f} hours")
    common.say(f"manifest {made.manifest}{' (it was there already)' if made.was_there else ''}")

"""Commands about data: `splice` and `data check`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from soundwave.cli import common

if TYPE_CHECKING:
    from soundwave.curation.check import Checked

WIDEST = 40  # characters of a bar


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
    common.say(f"{count} strings · manifest {manifest}")


def check(
    manifest: Annotated[
        Path,
        typer.Argument(help="Manifest: JSON lines, a table, Parquet, cuts of Lhotse, or a folder of recordings."),
    ],
    page: Annotated[
        Path | None,
        typer.Option("--html", dir_okay=False, help="Page to write, to look at and to listen to.", metavar="PAGE"),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Language model whose tokenizer writes the texts: a Hub id or a folder. By default the embedded one.",
            metavar="NAME",
        ),
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="Trained model whose tokenizer and frames count.", metavar="FOLDER")
    ] = None,
    clips: Annotated[int, typer.Option(min=0, help="Number of samples on the page to listen to.")] = 12,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes that decode recordings; by default one for each core.")
    ] = None,
    allow_outside: common.AllowOutsideOption = False,
    quiet: common.QuietOption = False,
) -> None:
    """Read every line and every recording of a manifest once; print what is in it and what is wrong with it.

    The exit status is 1 if something is wrong: lines that are no samples, recordings that cannot be used, are silent or
    too long, texts that CTC cannot align, the same sound with two texts.
    """
    if model is not None and tokenizer is not None:
        raise ValueError("--model brings its own tokenizer; leave out --tokenizer")
    if page is not None and page.resolve() == manifest.resolve():
        raise ValueError(f"--html {page} is the manifest itself; name another file")
    if model is not None:
        model = common.model_folder(model)
    from soundwave.data.readers import source_of

    source_of(manifest)  # a wrong path is told before the import of torch, which takes seconds
    common.quiet_transformers()
    from tqdm import tqdm

    from soundwave import backbones
    from soundwave.curation.check import FAULTS, REMARKS, check_manifest
    from soundwave.model.configuration import SoundwaveConfig
    from soundwave.model.processing import SoundwaveProcessor

    name = str(model or tokenizer or backbones.LANGUAGE_MODEL)
    if model is not None:
        config = SoundwaveConfig.from_pretrained(model)
        processor, frame_stack = SoundwaveProcessor.for_config(config), config.frame_stack
    else:
        processor, frame_stack = SoundwaveProcessor.from_backbones(backbones.WHISPER, name), 2
    hidden = quiet or not sys.stderr.isatty()
    with tqdm(desc=f"checking {manifest.name}", unit=" lines", disable=hidden, leave=False) as bar:
        found = check_manifest(
            manifest,
            processor=processor,
            tokenizer_name=name,
            frame_stack=frame_stack,
            allow_outside=allow_outside,
            processes=processes,
            listen_to=clips if page is not None else 0,
            note=common.warn,
            progress=lambda done: bar.update(done - bar.n),
        )
    _print_contents(found)
    for kind, what in (FAULTS | REMARKS).items():
        lines = [finding for finding in found.findings if finding.kind == kind]
        if lines:
            common.say(f"\n{len(lines)} · {what}")
        for finding in lines:
            common.say(f"  {finding.place}: {finding.text}")
    if page is not None:
        from soundwave.report.checked import write_page

        common.say(f"\npage {write_page(found, page)}")
    remarks = len(found.findings) - len(found.faults)
    common.say(f"\n{common.counted(len(found.faults), 'fault')} · {common.counted(remarks, 'remark')}")
    if found.faults:
        raise typer.Exit(1)


def _print_contents(found: "Checked") -> None:
    from soundwave.curation.check import EDGES

    total = found.total
    common.say(
        f"{found.lines} lines · {found.samples} samples · {total.recordings} recordings · "
        f"{total.seconds / 3600:.2f} hours · {found.texts} different texts"
    )
    table = common.table("task", "samples", "hours", "words")
    for task, one in sorted(found.tasks.items(), key=lambda item: -item[1].samples):
        table.add_row(escape(task), str(one.samples), f"{one.seconds / 3600:.2f}", str(one.words))
    if found.tasks:
        common.console.print(table)
    if total.recordings:
        table, most = common.table("seconds", "recordings", ""), max(found.lengths)
        for start, stop, count in zip(EDGES, [*EDGES[1:], None], found.lengths, strict=True):
            name = f"{start}+" if stop is None else f"{start}-{stop}"
            table.add_row(name, str(count), "█" * -(-WIDEST * count // most))
        common.console.print(table)
        rates = " · ".join(f"{rate} Hz {count}" for rate, count in sorted(found.rates.items()))
        common.say(f"sampling rates: {rates}")
    coverage = found.coverage
    if coverage is not None and coverage.texts:
        common.say(
            f"tokenizer {coverage.name}: {len(coverage.used)} of {coverage.vocabulary} tokens occur · "
            f"{coverage.characters / max(1, coverage.tokens):.1f} characters a token · "
            f"{coverage.tokens / coverage.texts:.1f} tokens a text · {found.count('unknown')} texts not given back"
        )

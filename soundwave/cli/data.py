"""Commands that make data: `splice`."""

from pathlib import Path
from typing import Annotated

import typer

from soundwave.cli import common


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

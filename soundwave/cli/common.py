"""What the commands share: where they print, the options of several of them, and how they load a model."""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

if TYPE_CHECKING:
    from soundwave.inference.answer import LoadedModel

console, errors = Console(), Console(stderr=True)
DEMO, QUICK_DEMO = Path("runs/demo"), Path("runs/demo-quick")
DEMO_MODEL = DEMO / "model"
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
AllowOutsideOption = Annotated[
    bool, typer.Option("--allow-outside", help="Permit audio files outside the manifest's folder.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]


def quiet_transformers() -> None:
    """Hide what transformers says, whose import sets its own log level, and its progress bars for loading weights."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def counted(count: int, noun: str) -> str:
    """A number and its noun: "1 fault", "2 faults"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def say(line: str) -> None:
    """Print a line that may hold paths: it is neither wrapped nor read as markup."""
    console.print(line, soft_wrap=True, markup=False, highlight=False)


def warn(line: str, kind: str = "note") -> None:
    """Print a line on stderr that may hold paths."""
    colour = "bold red" if kind == "error" else "yellow"
    errors.print(f"[{colour}]{kind}:[/] {escape(' '.join(line.split()))}", soft_wrap=True, highlight=False)


def check_accept(draft: Draft, accept: float | None) -> None:
    if accept is not None and draft is Draft.none:
        raise ValueError("--accept takes what CTC reads, but --draft none does without; leave out one of them")


def new_file(path: Path) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w", encoding="utf-8")


def table(*headers: str) -> Table:
    """A table that folds long cells, such as paths, because rich would cut them off."""
    return Table(*(Column(header, overflow="fold") for header in headers), box=None)


def model_folder(folder: Path) -> Path:
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


def load_model(folder: Path) -> "LoadedModel":
    folder = model_folder(folder)
    quiet_transformers()
    from soundwave.hardware import keep_memory_flat
    from soundwave.inference.answer import load_model

    keep_memory_flat()
    return load_model(folder)

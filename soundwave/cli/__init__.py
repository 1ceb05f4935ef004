"""The `soundwave` command."""

import logging
import sys
import warnings
from typing import Annotated, NoReturn

import typer
from rich.markup import escape

from soundwave import __version__
from soundwave.cli import common, curation, data, features, listen, models, score, serve, train
from soundwave.training.distributed import LostProcess, is_first, name_beside_others, refuse_several

app = typer.Typer(
    help="Teach a text LLM to hear: train and use Soundwave (arXiv 2502.12900) on one GPU, or on a laptop.\n\n"
    "Start with `soundwave demo`, then `soundwave ask FILE 'question'`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    add_completion=False,
)
TRAINING = ("train", "demo", "ablate")  # commands that continue from their newest checkpoint
OF_SEVERAL = "train"  # the command that several processes of a launcher do together


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
            common.errors.print(f"stopped at once{goes_on if sys.argv[1] in TRAINING else ''}")
        raise
    except (RuntimeError, MemoryError) as error:
        from soundwave.backbones.wheels import EmbeddedError  # imported here, because they import torch
        from soundwave.hardware import OutOfMemory, is_out_of_memory
        from soundwave.training.callbacks import Interrupted

        if isinstance(error, Interrupted):
            if is_first():
                common.errors.print(str(error), soft_wrap=True, markup=False, highlight=False)
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
    common.errors.print(f"{name_beside_others()}[bold red]error:[/] {escape(line)}", soft_wrap=True, highlight=False)
    sys.exit(1)


def _quiet() -> None:
    """Hide what libraries say about features that are not used here: it would bury the lines that matter."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    for name in ("bitsandbytes", "huggingface_hub", "gguf"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"soundwave {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """The options that need no command. Before a command is read, several processes of it are refused."""
    if context.invoked_subcommand not in (None, OF_SEVERAL):
        refuse_several(context.invoked_subcommand)


def doctor() -> None:
    """Show what is installed, and which device, dtype, implementation and attention will run, and why."""
    from soundwave.doctor import findings

    table = common.table("what", "runs", "why")
    for row in findings():
        table.add_row(*map(escape, row))
    common.console.print(table)


# Every command, by the heading under which `soundwave --help` shows it.
PANELS = {
    "Train": (train.demo, train.train, train.ablate, train.memory),
    "Use": (listen.transcribe, listen.ask, serve.serve),
    "Score": (score.evaluate, score.compare, score.report),
    "Data": (curation.curate, data.splice, features.features),
    "Models": (models.convert, models.merge, models.card, models.push),
    "This machine": (doctor,),
}
data_commands = typer.Typer(no_args_is_help=True, help="Check data, build data by a recipe, and make synthetic speech.")
app.add_typer(data_commands, name="data", rich_help_panel="Data")
data_commands.command()(data.check)
data_commands.command()(curation.build)
data_commands.command()(curation.speak)
for panel, commands in PANELS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)

"""Commands that turn one folder of a model into another: `convert`, `merge`, `card`, `push`."""

from pathlib import Path
from typing import Annotated

import typer

from soundwave.cli import common


def convert(
    source: Annotated[Path, typer.Argument(help="Folder of the checkpoint.", metavar="SRC")],
    target: Annotated[Path, typer.Argument(help="Folder to write, which must not exist yet.", metavar="OUT")],
) -> None:
    """Convert a checkpoint from the layout of the authors' release to ours, or back.

    SRC says which of the two it is. No weight changes: there and back, every tensor has the same bits.
    """
    common.quiet_transformers()
    from soundwave.model.released import convert as convert_folder

    layout = convert_folder(source, target, common.say)
    common.say(f"{target} is in {'our' if layout == 'soundwave' else 'the released'} layout")


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
    folder = common.model_folder(model)
    common.quiet_transformers()
    from soundwave.model.merging import merge as merge_folder

    common.say(f"model {merge_folder(folder, out, dtype=dtype, tell=common.say)}")


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

    folder = common.model_folder(model)
    if answers:
        record_scores(folder, answers)
    common.say(f"card {write_model_card(folder, licence=licence, replace=force)}")


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

    common.say(f"uploaded {push_folder(common.model_folder(model), repo_id, private=private, licence=licence)}")

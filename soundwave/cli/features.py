"""The command that writes encoder frames: `features`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from soundwave.cli import common


class Dtype(str, Enum):
    """Dtype of the encoder and its frames; auto: what training would take here."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float32 = "float32"


def features(
    manifests: Annotated[
        list[Path], typer.Argument(help="Manifests; a recording of several is encoded once.", metavar="MANIFEST…")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the frames.", metavar="OUT")],
    audio_tower: Annotated[
        str | None,
        typer.Option(help="Whisper model: Hub id, folder or embedded name.", show_default="the embedded one"),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of a trained model whose encoder is taken.", metavar="FOLDER")
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Dtype of the encoder and its frames, as the training's; auto: the faster one here.")
    ] = Dtype.auto,
    batch_duration: Annotated[
        float, typer.Option(min=0.01, help="Seconds of speech that are encoded together.")
    ] = 120.0,
    shard_mib: Annotated[int, typer.Option(min=1, help="Size of a file in MiB, which is what a kill loses.")] = 128,
    workers: Annotated[int, typer.Option(min=0, help="Number of processes that read recordings.")] = 0,
    allow_outside: common.AllowOutsideOption = False,
    quiet: common.QuietOption = False,
) -> None:
    """Write the frozen encoder's frames of all recordings, which `train` then reads: `features=OUT spec_augment=false`.

    Training encodes each recording once an epoch; with frames it is encoded once. A frame takes 2 bytes a number in
    bfloat16, so that 1 000 hours of Whisper-large-v3 take 460 GB. After a kill the same command goes on.

    Example: `soundwave features data/train.jsonl data/frames`
    """
    common.quiet_transformers()
    from soundwave import backbones
    from soundwave.data.encoding import write_features
    from soundwave.data.selection import select_samples
    from soundwave.hardware import pick_device, pick_dtype
    from soundwave.model.configuration import SoundwaveConfig

    if model is not None and audio_tower is not None:
        raise ValueError("--model names the encoder already; leave out --audio-tower")
    whole_window = False
    if model is not None:
        config = SoundwaveConfig.from_pretrained(common.model_folder(model))
        audio_tower, whole_window = config.audio_tower, config.whole_window
    device, _ = pick_device()
    left_out: list = []
    chosen = select_samples(
        manifests, left_out, stage=2, allow_outside=allow_outside, note=lambda line: common.warn(line)
    )
    import torch

    written = write_features(
        chosen.samples,
        out,
        audio_tower=audio_tower or backbones.WHISPER,
        whole_window=whole_window,
        dtype=pick_dtype(device.type)[0] if dtype is Dtype.auto else getattr(torch, dtype.value),
        device=device,
        batch_duration=batch_duration,
        shard_mib=shard_mib,
        workers=workers,
        quiet=quiet,
    )
    for left in (*left_out, *written.left_out):
        common.warn(f"left out: {left}")
    common.say(
        f"{written.clips} recordings · {written.seconds / 3600:.2f} h · {written.size / 2**20:.0f} MiB · now train "
        f"with features={out} spec_augment=false"
    )

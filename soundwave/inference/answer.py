"""What a trained model writes and answers: load a saved model, read it by CTC, ask it."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from soundwave.hardware import pick_device, pick_dtype
from soundwave.model.configuration import SoundwaveConfig
from soundwave.model.modeling import SoundwaveForConditionalGeneration, batch_to
from soundwave.model.processing import SoundwaveProcessor


class LoadedModel(NamedTuple):
    """A trained model on this machine's device, in evaluation mode, and the processor that makes its inputs."""

    model: SoundwaveForConditionalGeneration
    processor: SoundwaveProcessor


def load_model(folder: str | Path) -> LoadedModel:
    """Load a saved model onto this machine's device (CUDA if it is there), in the dtype that is fastest on it.

    A model of stage I is loaded without the layers of its language model, which it does not need. A model that was
    trained on 4-bit weights runs unquantised on a CPU.

    Args:
        folder: what training wrote, e.g. `runs/demo/model`. The backbones that it names are fetched if need be.

    Raises:
        FileNotFoundError: `folder` holds no model.
        ValueError: the model is damaged, or does not fit its configuration.
    """
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model; give the folder that training printed")
    device, _ = pick_device()
    config = SoundwaveConfig.from_pretrained(folder)
    model = SoundwaveForConditionalGeneration.from_pretrained(
        folder,
        dtype=pick_dtype(device.type)[0],
        language_model=config.stage > 1,
        quantization=config.quantization if device.type == "cuda" else None,
    )
    return LoadedModel(model.to(device).eval(), SoundwaveProcessor.from_pretrained(folder))


@torch.no_grad()
def read_ctc(
    model: SoundwaveForConditionalGeneration, processor: SoundwaveProcessor, clips: Sequence[Tensor]
) -> tuple[list[str], Tensor]:
    """Greedy CTC readings of clips' features ([n_mels, T_mel] each) and the path int64 [A, T] that they come from."""
    batch = batch_to(processor.pad_features(list(clips)), model.device)
    path = model(**batch).path.cpu()
    return [processor.ctc_text(row, model.blank) for row in path], path


@torch.no_grad()
def answer(
    model: SoundwaveForConditionalGeneration,
    processor: SoundwaveProcessor,
    prompts: Sequence[str],
    audio: Sequence[Tensor | None],
    *,
    max_new_tokens: int = 256,
) -> list[str]:
    """The model's greedy answers to prompts, each about one recording's features [n_mels, T_mel] or none."""
    batch = batch_to(dict(processor(list(prompts), list(audio))), model.device)
    tokens = model.generate(
        **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=processor.pad_token_id
    )
    return [text.strip() for text in processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

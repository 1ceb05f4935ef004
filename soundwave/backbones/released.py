"""The layout of the checkpoint that the authors of Soundwave have released: one folder with everything in it.

    model.mm_projector1.*, model.asr_transformer_encoder.layers.0.*, model.out_norm.*    alignment adapter
    model.lbm.encoder_attn.*, model.lbm.atten_layer_norm.*                               shrinking adapter
    model.audio_feature_head.weight                       CTC head [V, D]; the row of the placeholder is the blank
    model.audio_tower.*                                   Whisper's encoder
    lm_head.weight and all others below `model.`          Llama

Its `config.json` is a Llama configuration of the type "Soundwave" with a few more keys. Such a folder can be named in
place of either backbone, and as the CTC head. This module knows names and shapes; `check` compares them with a folder,
and `load` loads its parts.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PretrainedConfig

MODEL_TYPE = "Soundwave"
TOWER, HEAD = "model.audio_tower.", "model.audio_feature_head.weight"
# Names of the adapters' parameters: theirs, ours. A name begins with the first prefix that fits.
ADAPTERS = {
    "model.mm_projector1.": "alignment.projector.",
    "model.asr_transformer_encoder.layers.0.": "alignment.layer.",
    "model.out_norm.": "alignment.out_norm.",
    "model.lbm.atten_layer_norm.": "shrinking.norm.",
    "model.lbm.encoder_attn.": "shrinking.",
}
NOT_LLAMA = re.compile("|".join(map(re.escape, (TOWER, HEAD, *ADAPTERS))))  # to be matched from a name's beginning
NUMBERS = ("adapter_size", "audio_patch_token", "hidden_size", "num_attention_heads", "vocab_size")
# Keys that are not Llama's, or say something of the whole.
NOT_OF_LLAMA = (
    "adapter_size", "audio_patch_size", "audio_patch_token", "audio_tower", "llm_pad_token_id", "architectures",
    "auto_map", "model_type", "_name_or_path",
)  # fmt: skip


def is_released(folder: str | Path) -> bool:
    """Whether a folder holds a checkpoint in the released layout, by its `config.json`."""
    try:
        values = json.loads((Path(folder) / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("model_type") == MODEL_TYPE


def released_values(folder: str | Path) -> dict[str, Any]:
    """The checked content of a released checkpoint's `config.json`.

    Raises:
        ValueError: a value that is needed is missing or wrong.
    """
    file = Path(folder) / "config.json"
    values: dict[str, Any] = json.loads(file.read_bytes())
    for name in NUMBERS:
        value = values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            found = f"has {name} = {value!r}" if name in values else f"lacks {name!r}"
            raise ValueError(f"{file} {found}, but it must be a whole number from 1 up; copy the file again")
    if not isinstance(values.get("audio_tower"), str) or not values["audio_tower"]:
        found = f"has audio_tower = {values['audio_tower']!r}" if "audio_tower" in values else "lacks 'audio_tower'"
        raise ValueError(f"{file} {found}, but it must name a Whisper model; copy the file again")
    if values["audio_patch_token"] >= values["vocab_size"]:
        raise ValueError(
            f"{file} has audio_patch_token = {values['audio_patch_token']}, but it must be below vocab_size = "
            f"{values['vocab_size']}; copy the file again"
        )
    if values.get("audio_patch_size", 1) != 1:
        raise ValueError(
            f"{file} has audio_patch_size = {values['audio_patch_size']!r}, but a recording has one placeholder: "
            "checkpoints with more are not read"
        )
    return values


def llama_config(folder: str | Path) -> PretrainedConfig:
    """The configuration of a released checkpoint's language model.

    Raises:
        ValueError: transformers cannot read it.
    """
    values = {name: value for name, value in released_values(folder).items() if name not in NOT_OF_LLAMA}
    try:
        return LlamaConfig.from_dict(values)
    except Exception as error:  # whatever a value of another version makes transformers raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{Path(folder) / 'config.json'} is no configuration of a Llama ({reason})") from None


def tower_name(folder: str | Path) -> str:
    """The Whisper model whose configuration fits a released checkpoint: a folder beside `config.json`, or a Hub id."""
    name = released_values(folder)["audio_tower"]
    beside = Path(folder) / name
    return str(beside.resolve()) if beside.is_dir() else name


def our_name(name: str) -> str | None:
    """Our name of an adapter's parameter in a released checkpoint; None for other tensors."""
    theirs = next((prefix for prefix in ADAPTERS if name.startswith(prefix)), None)
    return None if theirs is None else ADAPTERS[theirs] + name.removeprefix(theirs)


def their_name(name: str) -> str:
    """The name of an adapter's parameter in a released checkpoint; the inverse of `our_name`.

    Raises:
        ValueError: the layout has no such parameter.
    """
    for theirs, ours in ADAPTERS.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ValueError(f"the released layout has no place for {name}")


def adapter_shapes(values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the adapters' parameters and of the CTC head in a released checkpoint, by their names there.

    Args:
        values: its configuration, of which `adapter_size`, `hidden_size` and `vocab_size` are needed.
    """
    width, classes = values["hidden_size"], values["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {HEAD: (classes, width)}
    linear = {
        "model.mm_projector1.": (2 * values["adapter_size"], width),
        "model.asr_transformer_encoder.layers.0.linear1.": (width, 2 * width),
        "model.asr_transformer_encoder.layers.0.linear2.": (2 * width, width),
    }
    for attention in ("model.asr_transformer_encoder.layers.0.self_attn.", "model.lbm.encoder_attn."):
        shapes |= {f"{attention}in_proj_weight": (3 * width, width), f"{attention}in_proj_bias": (3 * width,)}
        linear[f"{attention}out_proj."] = (width, width)
    for name, (inputs, outputs) in linear.items():
        shapes |= {f"{name}weight": (outputs, inputs), f"{name}bias": (outputs,)}
    layer = "model.asr_transformer_encoder.layers.0."
    for norm in (f"{layer}norm1.", f"{layer}norm2.", "model.out_norm.", "model.lbm.atten_layer_norm."):
        shapes |= {f"{norm}weight": (width,), f"{norm}bias": (width,)}
    return shapes

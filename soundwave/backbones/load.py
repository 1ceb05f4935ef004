"""Load the backbones: Whisper's encoder, and a language model (also in 4 bits) or only its output embedding."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from soundwave.backbones.check import check_whisper, read_config, stored_in_4_bits
from soundwave.backbones.wheels import resolve

WEIGHTS_FILE = "model.safetensors"


def load_encoder(name: str, dtype: torch.dtype) -> nn.Module:
    """The frozen encoder of a Whisper model, which is a Hub id, a folder or an embedded name.

    Raises:
        ValueError: the files are damaged or lack weights of the encoder.
    """
    check_whisper(name)
    with _damage_named(name):
        encoder, info = _WhisperEncoder.from_pretrained(
            resolve(name),
            dtype=dtype,
            key_mapping={r"^(model\.)?encoder\.": ""},
            use_safetensors=True,
            output_loading_info=True,
        )
    _refuse_missing(name, [f"encoder.{key}" for key in info["missing_keys"]])
    return encoder.requires_grad_(False)


class _WhisperEncoder(WhisperEncoder):
    """Whisper's encoder. Of a whole Whisper's files the decoder is not read: it is half of a large one."""

    _keys_to_ignore_on_load_unexpected = [r"^(model\.)?decoder\.", r"^proj_out\."]


def load_language_model(name: str, dtype: torch.dtype, *, quantization: str | None = None) -> PreTrainedModel:
    """A frozen causal language model, which is a Hub id, a folder or an embedded name.

    Args:
        dtype: dtype of the weights; of quantised weights the dtype of the products.
        quantization: "nf4" (4 bits, double quantisation, through bitsandbytes) or None.

    Raises:
        ValueError: the model has no output embedding, or the files are damaged or lack weights.
    """
    stored = stored_in_4_bits(name)
    settings: dict[str, Any] = {}
    if quantization == "nf4" and not stored:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    with _damage_named(name):
        model, info = AutoModelForCausalLM.from_pretrained(
            resolve(name),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **settings,
        )
    _refuse_missing(name, info["missing_keys"])
    if settings or stored:
        _set_dtype(model, dtype)
    # generate() projects a strided view (each row's last token), for which the CPU copies the head once for every row.
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{name} has no output embedding, which is the CTC head; name a causal language model")
    head.register_forward_pre_hook(_contiguous)
    model.generation_config = _only_special_tokens(model)
    return model.requires_grad_(False)


def _set_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the products of 4-bit weights, and all other weights, a dtype: files in 4 bits have one of their own."""
    import bitsandbytes

    quantised = set()
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True
            # On CPUs with AVX512-BF16 an evaluation would repack the weights, and then no gradient would pass them.
            module.support_avx512bf16_for_cpu = False
            quantised.add(id(module.weight))
    for parameter in model.parameters():
        if id(parameter) not in quantised and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _only_special_tokens(model: PreTrainedModel) -> GenerationConfig:
    """The special tokens of a model's generation settings, without the rest.

    The rest is made for chats: sampling, penalties, banned n-grams. `generate` would add it to every setting that a
    caller leaves out, and a repetition penalty changes the repeated words of a transcript.
    """
    theirs, config = model.generation_config, model.config.get_text_config()
    ends = [*token_ids(getattr(theirs, "eos_token_id", None)), *token_ids(getattr(config, "eos_token_id", None))]
    return GenerationConfig(
        bos_token_id=getattr(theirs, "bos_token_id", None),
        eos_token_id=list(dict.fromkeys(ends)) or None,
        pad_token_id=getattr(theirs, "pad_token_id", None),
    )


def token_ids(value: int | list[int] | None) -> list[int]:
    """The ids in a setting that may be one id, several or none."""
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def _refuse_missing(name: str, keys: Iterable[str]) -> None:
    """Refuse a backbone of which weights are missing: transformers only prints a report and draws them at random."""
    if missing := sorted(keys):
        raise ValueError(f"{name} lacks {len(missing)} weights, e.g. {missing[0]}; copy it again")


@contextmanager
def _damage_named(name: str) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{name} has a damaged safetensors file ({error}); copy it again") from None


def _contiguous(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in inputs)


def load_output_embedding(name: str) -> Tensor:
    """The output embedding [V, D] of a causal language model, whose layers are not loaded.

    It is `lm_head.weight`, or the input embedding if the two are tied, in one or several safetensors files.

    Raises:
        FileNotFoundError: a safetensors file is missing.
        ValueError: the files are damaged or have no such tensor.
    """
    with _damage_named(name):
        return _read_output_embedding(name)


def _read_output_embedding(name: str) -> Tensor:
    folder = resolve(name)
    tied = read_config("language_model", name).get_text_config().tie_word_embeddings
    names = ("lm_head.weight", "model.embed_tokens.weight") if tied else ("lm_head.weight",)
    index = _checkpoint_file(folder, "model.safetensors.index.json")
    if index is not None:
        weight_map = json.loads(Path(index).read_text())["weight_map"]
        for tensor in names:
            if tensor in weight_map:
                shard = _checkpoint_file(folder, weight_map[tensor])
                if shard is None:
                    raise FileNotFoundError(
                        f"{folder} has no {weight_map[tensor]}, but its index names it: copy it again"
                    )
                return _read_tensor(shard, tensor)
        raise ValueError(f"{folder} has none of {list(names)} in its safetensors index")
    single = _checkpoint_file(folder, WEIGHTS_FILE)
    if single is None:
        raise FileNotFoundError(f"{folder} has no {WEIGHTS_FILE}: save the language model as safetensors first")
    with safe_open(single, framework="pt") as file:
        tensor = next((tensor for tensor in names if tensor in set(file.keys())), None)
    if tensor is None:
        raise ValueError(f"{single} has none of {list(names)}")
    return _read_tensor(single, tensor)


def _checkpoint_file(folder: str, file: str) -> str | None:
    from transformers.utils import cached_file

    return cached_file(folder, file, _raise_exceptions_for_missing_entries=False)


def _read_tensor(path: str, tensor: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        found = file.get_tensor(tensor)
    if not found.is_floating_point():
        raise ValueError(f"{path}: {tensor} is quantised, but it is the CTC head; name a model whose head is not")
    return found

"""Load the backbones: Whisper's encoder, and a language model (also in 4 bits) or only its output embedding."""

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
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
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from soundwave.backbones.check import empty_encoder, read_config, skeleton, stored_in_4_bits
from soundwave.backbones.released import HEAD, NOT_LLAMA, TOWER, is_released
from soundwave.backbones.shards import WEIGHTS_FILE, Stored, fault_of_shapes, read_tensors, stored_tensors
from soundwave.backbones.wheels import resolve

# Families whose files name their weights as transformers' modules do, so that a missing one is known before loading.
PLAINLY_NAMED = ("llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3")


def load_encoder(name: str, dtype: torch.dtype) -> nn.Module:
    """The frozen encoder of a Whisper model, which is a Hub id, a folder or an embedded name.

    Raises:
        ValueError: the files are damaged or lack weights of the encoder.
    """
    empty = empty_encoder(name)
    if is_released(name):
        return _load_released_encoder(name, empty, dtype)
    _check_encoder_files(name, empty)
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


def _load_released_encoder(folder: str, empty: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`empty`, an encoder on the meta device, with the weights in a released checkpoint."""
    stored = stored_tensors(folder)
    tensors = read_tensors(stored, [f"{TOWER}{name}" for name in empty.state_dict()])
    state = {name.removeprefix(TOWER): tensor.to(dtype) for name, tensor in tensors}
    empty.load_state_dict(state, assign=True)
    return empty.eval().requires_grad_(False)


def _check_encoder_files(name: str, empty: nn.Module) -> None:
    """Refuse a folder whose files lack weights of the encoder `empty`, or have them in another shape."""
    if Path(resolve(name)).is_dir():
        stored = {re.sub(r"^(model\.)?encoder\.", "", key): at for key, at in stored_tensors(resolve(name)).items()}
        _check_files(name, stored, empty, "encoder.")


def check_language_model_files(name: str) -> None:
    """Refuse a language model with damaged files; in families of plain names, one that lacks weights, too.

    Only the headers of a folder's files are read; what is on the Hub is not looked at.

    Raises:
        FileNotFoundError, ValueError: as `load_language_model` would.
    """
    quantised = stored_in_4_bits(name)
    if not Path(resolve(name)).is_dir():
        return
    stored, config = stored_tensors(resolve(name)), read_config("language_model", name)
    empty = skeleton(config) if config.model_type in PLAINLY_NAMED and not quantised else None
    if empty is not None:
        whole = any(key.startswith("model.") for key in stored)  # else it was saved without its head
        _check_files(name, stored if whole else {f"model.{key}": at for key, at in stored.items()}, empty)


def _check_files(name: str, stored: Mapping[str, Stored], empty: Any, prefix: str = "") -> None:
    wanted = {key: tuple(tensor.shape) for key, tensor in empty.state_dict().items()}
    tied = {"lm_head.weight"} if getattr(empty.config, "tie_word_embeddings", False) else set()
    _refuse_missing(name, [f"{prefix}{key}" for key in wanted.keys() - stored.keys() - tied])
    if fault := fault_of_shapes(stored, wanted):
        raise ValueError(f"{fault}, as of its config.json; copy both again, from the same model")


class _WhisperEncoder(WhisperEncoder):
    """Whisper's encoder. Of a whole Whisper's files the decoder is not read: it is half of a large one."""

    _keys_to_ignore_on_load_unexpected = [r"^(model\.)?decoder\.", r"^proj_out\."]


def load_language_model(
    name: str, dtype: torch.dtype, *, quantization: str | None = None, layers: bool = True
) -> PreTrainedModel:
    """A frozen causal language model, which is a Hub id, a folder or an embedded name.

    Args:
        dtype: dtype of the weights; of quantised weights the dtype of the products.
        quantization: "nf4" (4 bits, double quantisation, through bitsandbytes) or None.
        layers: False leaves the layers out; what remains are the embeddings.

    Raises:
        ValueError: the model has no output embedding, or the files are damaged or lack weights.
    """
    stored = stored_in_4_bits(name)
    check_language_model_files(name)
    settings: dict[str, Any] = {}
    if quantization == "nf4" and not stored:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    kind: Any = AutoModelForCausalLM
    if is_released(name):
        kind, settings["config"] = _ReleasedLlama, read_config("language_model", name)
    if not layers:
        settings["config"] = _without_layers(read_config("language_model", name))
    with _damage_named(name):
        model, info = kind.from_pretrained(
            resolve(name),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **settings,
        )
    _refuse_missing(name, info["missing_keys"])
    if kind is _ReleasedLlama:
        model.__class__ = LlamaForCausalLM
    if "quantization_config" in settings or stored:
        _set_dtype(model, dtype)
    # generate() projects a strided view (each row's last token), for which the CPU copies the head once for every row.
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{name} has no output embedding, which is the CTC head; name a causal language model")
    head.register_forward_pre_hook(_contiguous)
    model.generation_config = _only_special_tokens(model)
    return model.requires_grad_(False)


def _without_layers(config: Any) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = 0
    if getattr(text, "layer_types", None):
        text.layer_types = []
    return config


class _ReleasedLlama(LlamaForCausalLM):
    """The Llama in a released checkpoint. The other tensors of its files are not read."""

    _keys_to_ignore_on_load_unexpected = [rf"^({NOT_LLAMA.pattern})"]


def _set_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the products of 4-bit weights, and all other weights, a dtype: files in 4 bits have one of their own.

    On the CPU the other weights are copied. As they come, they are parts of the mapped file, which would stay in memory
    whole, with the weights that are quantised.
    """
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
            parameter.data = parameter.data.to(dtype, copy=parameter.device.type == "cpu")


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
        if Path(folder).is_dir():
            stored_tensors(folder)  # raises, with what is there instead
        raise FileNotFoundError(f"{folder} has no {WEIGHTS_FILE}: save the language model as safetensors first")
    with safe_open(single, framework="pt") as file:
        tensor = next((tensor for tensor in names if tensor in set(file.keys())), None)
    if tensor is None:
        raise ValueError(f"{single} has none of {list(names)}")
    return _read_tensor(single, tensor)


def find_ctc_head(name: str) -> Stored:
    """Where the CTC head [V, D] is in a folder that holds one: a released checkpoint, or a part of a converted one.

    Raises:
        FileNotFoundError, ValueError: there is no such folder, its files are missing or damaged, or hold no head.
    """
    if not Path(name).is_dir():
        raise FileNotFoundError(f"ctc_head = {name!r}: there is no such folder; was it moved? Correct the path")
    stored = stored_tensors(name)
    if HEAD not in stored or len(stored[HEAD].shape) != 2:
        raise ValueError(f"ctc_head = {name!r} holds no {HEAD}; name the checkpoint that the model was made of")
    return stored[HEAD]


def _checkpoint_file(folder: str, file: str) -> str | None:
    from transformers.utils import cached_file

    return cached_file(folder, file, _raise_exceptions_for_missing_entries=False)


def _read_tensor(path: str, tensor: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        found = file.get_tensor(tensor)
    if not found.is_floating_point():
        raise ValueError(f"{path}: {tensor} is quantised, but it is the CTC head; name a model whose head is not")
    return found

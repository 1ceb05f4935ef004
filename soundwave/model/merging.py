"""Merge the LoRA matrices of a trained model into the 16-bit weights of its language model, for inference.

    merge("runs/mine/3/model", "runs/mine/merged")

Into which weights? Those that the model was trained on. LoRA has learnt beside the weights as it saw them, so a model
that was trained in 4 bits gets its 4-bit weights back in 16 bits, as bitsandbytes dequantises them in each product, and
W + (alpha / rank) · B A has the logits of the unmerged model but for one rounding. The original 16-bit weights would be
other ones: LoRA also makes up for what 4 bits have lost, and without that loss it does so for nothing.

What is written can be used without LoRA, peft and bitsandbytes:

    config.json, model.safetensors    the model without LoRA: adapters and blank
    language_model/                   the language model with its tokenizer, which transformers reads by itself

Tensors are read, merged and written one after another, in files of at most 2 GB. Such a file is held twice while it is
written, so that some 5 GB of memory suffice for a model of any size.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from soundwave.backbones.check import check_tokenizer, read_config, skeleton, stored_in_4_bits
from soundwave.backbones.released import NOT_LLAMA, is_released
from soundwave.backbones.shards import (
    INDEX_FILE,
    WEIGHTS_FILE,
    Stored,
    copy_tensors,
    read_tensors,
    stored_in,
    stored_tensors,
)
from soundwave.backbones.wheels import resolve
from soundwave.hardware import GIB
from soundwave.model.configuration import SoundwaveConfig
from soundwave.model.hub import copy_records, local_folder

SHARD_BYTES = 2 * 10**9
LANGUAGE_MODEL = "language_model"  # folder in the merged model, and prefix of the LoRA matrices' names
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ASIDE = ".writing"
BLOCK = 64  # weights that share a scale in NF4
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4")
PARTS += (".quant_state.bitsandbytes__fp4",)


def merge(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str = "bfloat16",
    tell: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write a trained model with its LoRA matrices merged into the language model -> the folder.

    Args:
        source: folder of a model of stage II or III, which is left as it is.
        target: folder to write; it must be absent or empty. It appears when it is complete.
        dtype: "bfloat16", "float16" or "float32", of the language model's weights.
        tell: called with one line for each thing that is worth to be said.

    Raises:
        FileNotFoundError: `source` holds no model.
        ValueError: there is nothing to merge, `target` is not empty, a weight is missing or has another shape, or the
            disk is too small.
    """
    source, target = Path(source), Path(target)
    config, stored = _checked(source, target, dtype)
    base = Path(local_folder(resolve(config.language_model)))
    if not base.is_dir():
        raise ValueError(f"language_model = {config.language_model!r} is no folder and no Hub id; was it moved?")
    weights = stored_tensors(base)
    if is_released(base):  # which holds the adapters, too
        weights = {name: at for name, at in weights.items() if not NOT_LLAMA.match(name)}
    matrices = _matrices(config, {name: at for name, at in stored.items() if ".lora_" in name}, weights)
    quantised = _quantised(config)
    names = [name for name in weights if not name.endswith(PARTS)]
    size = sum(_numbers(weights, name) for name in names) * DTYPES[dtype].itemsize
    _refuse_small_disk(target, size)
    of = "4-bit weights that it was trained on" if quantised or stored_in_4_bits(config.language_model) else "weights"
    tell(f"merging {len(matrices)} pairs of LoRA matrices into the {of}, in {dtype}: {size / GIB:.2f} GiB")
    aside = target.with_name(target.name + ASIDE)
    shutil.rmtree(aside, ignore_errors=True)  # a killed run may have left it
    try:
        (aside / LANGUAGE_MODEL).mkdir(parents=True)
        merged = _merged_tensors(config, weights, names, matrices, quantised, DTYPES[dtype])
        _write_small_files(config, base, aside / LANGUAGE_MODEL, DTYPES[dtype])
        _write_shards(merged, aside / LANGUAGE_MODEL)
        copy_tensors({name: at for name, at in stored.items() if ".lora_" not in name}, aside / WEIGHTS_FILE)
        config.lora_rank, config.quantization, config.language_model = 0, None, f"./{LANGUAGE_MODEL}"
        config.save_pretrained(aside)
        copy_records(source, aside)
        if target.exists():
            target.rmdir()
        os.replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _checked(source: Path, target: Path, dtype: str) -> tuple[SoundwaveConfig, dict[str, Stored]]:
    """The configuration and the tensors of the model to merge; whatever forbids it is raised here."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r}, but it must be one of {', '.join(DTYPES)}")
    if not (source / "config.json").is_file():
        inside = source / "model"
        hint = f"; give {inside}" if (inside / "config.json").is_file() else ""
        raise FileNotFoundError(f"{source} holds no model{hint}")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} is there already and not empty; name a folder that is not, or delete it")
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise ValueError(f"{target} lies within {source}; name a folder outside of it")
    config = SoundwaveConfig.from_pretrained(source)
    if config.stage < 2:
        raise ValueError(
            f"{source} has seen stage {config.stage} only, which trains no LoRA: there is nothing to merge"
        )
    if not config.lora_rank:
        raise ValueError(f"{source} has no LoRA: it is merged already, and can be used as it is")
    if not (source / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(f"{source} holds no Soundwave model: {WEIGHTS_FILE} is missing")
    try:
        return config, stored_in(source / WEIGHTS_FILE)
    except SafetensorError as error:
        raise ValueError(f"{source / WEIGHTS_FILE} is damaged ({error}); copy it again") from None


def _matrices(
    config: SoundwaveConfig, lora: Mapping[str, Stored], weights: Mapping[str, Stored]
) -> dict[str, tuple[Tensor, Tensor]]:
    """LoRA's two matrices A [r, in] and B [out, r] in float32, by the name of the weight that they change."""
    read = dict(read_tensors(lora, lora))
    found = {}
    for name, b in read.items():
        if ".lora_B." not in name:
            continue
        module = name.removeprefix(f"{LANGUAGE_MODEL}.").partition(".lora_B.")[0]
        a, weight = read.get(name.replace(".lora_B.", ".lora_A.")), f"{module}.weight"
        if a is None:
            raise ValueError(f"{lora[name].file} has {name}, but not the lora_A that belongs to it; copy it again")
        if weight not in weights:
            raise ValueError(
                f"language_model = {config.language_model!r} stores no {weight}, which LoRA has changed: its files "
                "name weights differently from the model, and cannot be merged"
            )
        found[weight] = (a.float(), b.float())
    if not found or 2 * len(found) != len(read):
        raise ValueError(f"the LoRA matrices do not come in pairs: {len(found)} of {len(read)} are lora_B")
    head = {"lm_head.weight", "model.embed_tokens.weight"} & found.keys()
    if head and read_config("language_model", config.language_model).get_text_config().tie_word_embeddings:
        raise ValueError(f"LoRA has changed {min(head)}, which is tied to another weight, and cannot be merged")
    return found


def _quantised(config: SoundwaveConfig) -> set[str]:
    """Names of the weights that transformers quantises where the files are not: all linear layers but the head."""
    if config.quantization != "nf4" or stored_in_4_bits(config.language_model):
        return set()
    model = skeleton(read_config("language_model", config.language_model).get_text_config())
    if model is None:
        raise ValueError(f"language_model = {config.language_model!r} is of a kind whose layers cannot be listed")
    head = model.get_output_embeddings()
    return {f"{name}.weight" for name, m in model.named_modules() if type(m) is nn.Linear and m is not head}


def _merged_tensors(
    config: SoundwaveConfig,
    weights: Mapping[str, Stored],
    names: list[str],
    matrices: Mapping[str, tuple[Tensor, Tensor]],
    quantised: set[str],
    dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    """The language model's weights in `dtype`, one after another."""
    scale = config.lora_alpha / config.lora_rank
    for name, tensor in read_tensors(weights, names):
        if f"{name}{PARTS[0]}" in weights:
            tensor = _dequantised(weights, name, tensor, dtype)
        elif tensor.is_floating_point():
            tensor = tensor.to(dtype)
            if name in quantised:
                tensor = _through_4_bits(tensor)
        if name in matrices:
            a, b = matrices[name]
            if tensor.shape != (b.shape[0], a.shape[1]):
                raise ValueError(
                    f"{name} of {config.language_model} is {list(tensor.shape)}, but its LoRA matrices make "
                    f"{[b.shape[0], a.shape[1]]}; it is not the model that was trained"
                )
            tensor = (tensor.float() + scale * (b @ a)).to(dtype)  # rounded once
        yield name, tensor.contiguous()


def _through_4_bits(weight: Tensor) -> Tensor:
    """A weight as a 4-bit layer uses it, with the settings of `load_language_model`."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(packed, state).reshape(weight.shape).to(weight.dtype)


def _dequantised(weights: Mapping[str, Stored], name: str, packed: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight that is stored in 4 bits."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    parts = [f"{name}{part}" for part in PARTS if f"{name}{part}" in weights]
    state = QuantState.from_dict({key.removeprefix(f"{name}."): x for key, x in read_tensors(weights, parts)}, "cpu")
    return dequantize_4bit(packed, state).to(dtype)


def _numbers(weights: Mapping[str, Stored], name: str) -> int:
    """How many numbers a weight has: two in each byte, if it is stored in 4 bits."""
    stored = weights[name]
    return 2 * stored.size if f"{name}{PARTS[0]}" in weights else torch.Size(stored.shape).numel()


def _refuse_small_disk(target: Path, size: int) -> None:
    above = next(folder for folder in target.resolve().parents if folder.is_dir())
    free = shutil.disk_usage(above).free
    if size > free:
        raise ValueError(f"{target} takes {size / GIB:.1f} GiB, but {above} has {free / GIB:.1f} GiB free; make room")


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """Write tensors in files of at most `SHARD_BYTES`, with an index if there are several."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_file(held, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        held[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    places = {}
    for number, names in enumerate(shards):
        final = WEIGHTS_FILE if len(shards) == 1 else f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / final)
        (folder / final).chmod((folder / "config.json").stat().st_mode)  # safetensors lets only the owner read it
        places |= dict.fromkeys(names, final)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_small_files(config: SoundwaveConfig, base: Path, folder: Path, dtype: torch.dtype) -> None:
    """The configuration, the generation settings, the tokenizer and the card of the language model."""
    values: dict[str, Any] = json.loads((base / "config.json").read_bytes())
    if is_released(base):
        values = read_config("language_model", config.language_model).to_dict()
    values.pop("quantization_config", None)
    values.pop("torch_dtype", None)
    values["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")
    check_tokenizer(config.language_model).save_pretrained(folder)
    for name in ("generation_config.json", "README.md", "LICENSE"):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)

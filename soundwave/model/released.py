"""Convert a checkpoint between the layout of the released one and ours, without a change to any weight.

    the released layout (`soundwave.backbones.released`)        ours
    config.json, of type "Soundwave"                            config.json, of type "soundwave"
    the adapters, in its shards                                 model.safetensors
    model.audio_tower.*                                         backbones/audio_tower/
    model.audio_feature_head.weight                             backbones/ctc_head/
    Llama and its tokenizer                                     backbones/language_model/
    all files but the weights                                   released/, as they were

The bytes of each tensor are copied from file to file. What `released/` holds is used on the way back.
"""

import inspect
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from soundwave.backbones.check import check_released, read_config
from soundwave.backbones.load import find_ctc_head
from soundwave.backbones.released import (
    HEAD,
    NOT_LLAMA,
    TOWER,
    is_released,
    our_name,
    released_values,
    their_name,
    tower_name,
)
from soundwave.backbones.shards import INDEX_FILE, WEIGHTS_FILE, Stored, copy_tensors, stored_in, stored_tensors
from soundwave.backbones.wheels import resolve
from soundwave.hardware import GIB
from soundwave.model.configuration import SoundwaveConfig
from soundwave.model.processing import SoundwaveProcessor

KEPT = "released"  # folder of the files that are kept as they were
ASIDE = ".writing"  # suffix of the folder that is written, before it is renamed
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}
# What the released layout implies.
RULES = {
    "attend": "self", "keep": "runs", "keys": "kept", "frame_stack": 2, "layer_norm_eps": 1e-5, "whole_window": True,
}  # fmt: skip
# Values of a configuration that need no place in the released layout.
ELSEWHERE = ("audio_tower", "language_model", "ctc_head", "config_version")


def convert(source: str | Path, target: str | Path, tell: Callable[[str], None] = lambda line: None) -> str:
    """Write a checkpoint in the released layout in ours, or one in ours in the released layout.

    Args:
        source: folder of the checkpoint, whose `config.json` tells its layout.
        target: folder to write; it must be absent or empty. It appears when it is complete.
        tell: called with one line for each thing that is worth to be said.

    Returns:
        The layout of `target`: "released" or "soundwave".

    Raises:
        FileNotFoundError, ValueError: the checkpoint cannot be used, or has something that the released layout has no
            place for. OSError: `target` cannot be written.
    """
    source, target = Path(source), Path(target)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} holds no model: config.json is missing")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} is there already; name a folder that is not, or delete it")
    if source.resolve() in target.resolve().parents:
        raise ValueError(f"{target} lies within {source}; name a folder outside of it")
    released = is_released(source)
    files, texts, copies = _ours(source, tell) if released else _released(source, tell)
    size = sum(stored.size for tensors in files.values() for stored in tensors.values())
    above = next(folder for folder in target.resolve().parents if folder.is_dir())
    free = shutil.disk_usage(above).free
    if size > free:
        raise ValueError(f"{target} takes {size / GIB:.1f} GiB, but {above} has {free / GIB:.1f} GiB free; make room")
    tell(f"writing {size / GIB:.2f} GiB to {target}")
    aside = target.with_name(target.name + ASIDE)
    shutil.rmtree(aside, ignore_errors=True)  # a killed run may have left it
    try:
        for name, original in copies.items():
            _place(aside, name).write_bytes(original.read_bytes())
        for name, text in texts.items():
            _place(aside, name).write_text(text, encoding="utf-8")
        for name, tensors in files.items():
            copy_tensors(tensors, _place(aside, name))
        if target.exists():
            target.rmdir()
        os.replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return SoundwaveConfig.model_type if released else "released"


def _place(folder: Path, name: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


Plan = tuple[dict[str, dict[str, Stored]], dict[str, str], dict[str, Path]]
"""What is written, by file name: tensors, texts, and copies of other files."""


def _ours(source: Path, tell: Callable[[str], None]) -> Plan:
    """The plan for a released checkpoint in our layout."""
    stored = check_released(source)
    config = SoundwaveConfig.from_pretrained(source)
    processor = SoundwaveProcessor.for_config(config)
    whisper, llama = read_config("audio_tower", str(source)), read_config("language_model", str(source))
    whisper.architectures, llama.architectures = ["WhisperForConditionalGeneration"], ["LlamaForCausalLM"]
    small = _small_files(source)
    tower, model = "backbones/audio_tower", "backbones/language_model"
    parts: dict[str, dict[str, Stored]] = {WEIGHTS_FILE: {}, f"{tower}/{WEIGHTS_FILE}": {}}
    shards = _names_of_shards(sorted({at.file.name for name, at in stored.items() if not NOT_LLAMA.match(name)}))
    places = {}
    for name, at in stored.items():
        if ours := our_name(name):
            parts[WEIGHTS_FILE][ours] = at
        elif name == HEAD:
            parts[f"backbones/ctc_head/{WEIGHTS_FILE}"] = {HEAD: at}
        elif name.startswith(TOWER):
            parts[f"{tower}/{WEIGHTS_FILE}"][f"model.encoder.{name.removeprefix(TOWER)}"] = at
        else:
            places[name] = shards[at.file.name]
            parts.setdefault(f"{model}/{places[name]}", {})[name] = at
    config.audio_tower, config.language_model, config.ctc_head = f"./{tower}", f"./{model}", "./backbones/ctc_head"
    texts = {
        "config.json": config.to_json_string(),
        f"{tower}/config.json": whisper.to_json_string(),
        f"{tower}/preprocessor_config.json": processor.feature_extractor.to_json_string(),
        f"{model}/config.json": llama.to_json_string(),
    }
    if len(shards) > 1:
        size = sum(stored[name].size for name in places)
        texts[f"{model}/{INDEX_FILE}"] = _index(places, size)
    copies = {f"{KEPT}/{name}": source / name for name in small}
    copies |= {f"{model}/{name}": source / name for name in small if "/" not in name and name not in OF_WHOLE}
    named = released_values(source)["audio_tower"]
    beside = Path(tower_name(source))
    if beside.is_dir() and not Path(named).is_absolute() and source.resolve() not in beside.parents:
        # Relative to the kept config.json it would be another folder.
        tell(f"the kept config.json names {KEPT}/whisper in place of {named!r}, which is outside of {source}")
        copies |= {f"{KEPT}/whisper/{name}": beside / name for name in _small_files(beside)}
        texts[f"{KEPT}/config.json"] = json.dumps(
            json.loads((source / "config.json").read_bytes()) | {"audio_tower": "whisper"}, indent=2
        )
    return parts, texts, copies


OF_WHOLE = ("config.json", INDEX_FILE, "preprocessor_config.json", "README.md", ".gitattributes")


def _names_of_shards(files: list[str]) -> dict[str, str]:
    """Names for the language model's files, by those of the files that its weights are in."""
    if len(files) == 1:
        return {files[0]: WEIGHTS_FILE}
    return {name: f"model-{number:05}-of-{len(files):05}.safetensors" for number, name in enumerate(files, start=1)}


def _index(places: dict[str, str], size: int) -> str:
    return json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}, indent=2)


def _small_files(folder: Path) -> list[str]:
    """The files of a folder and its subfolders that hold no weights and are not hidden, relative to it."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and path.suffix not in WEIGHTS and not any(part.startswith(".") for part in name.parts[:-1]):
            found.append(name.as_posix())
    return found


def _released(source: Path, tell: Callable[[str], None]) -> Plan:
    """The plan for a model of ours in the released layout."""
    kind = json.loads((source / "config.json").read_bytes()).get("model_type")
    if kind != SoundwaveConfig.model_type:
        raise ValueError(f"{source} holds a model of type {kind!r}, but not a Soundwave model")
    config = SoundwaveConfig.from_pretrained(source)
    _refuse_what_has_no_place(source, config)
    kept = _files_of_released(source, config)
    stored = {their_name(name): at for name, at in stored_in(source / WEIGHTS_FILE).items()}
    stored[HEAD] = find_ctc_head(str(config.ctc_head))
    stored |= _tower_tensors(config.audio_tower) | _llama_tensors(config.language_model)
    check_released(kept, stored)
    lost = _not_kept(config, SoundwaveConfig.from_pretrained(kept))
    if lost:
        tell(f"not kept, because the released layout has no place for it: {lost}")
    index, parts = kept / INDEX_FILE, {WEIGHTS_FILE: stored}
    copies = {name: kept / name for name in _small_files(kept)}
    if index.is_file():
        places = json.loads(index.read_bytes())["weight_map"]
        last = sorted(set(places.values()))[-1]
        parts = {}
        for name, at in stored.items():
            parts.setdefault(places.get(name, last), {})[name] = at
        if not stored.keys() <= places.keys():
            size = sum(at.size for at in stored.values())
            del copies[INDEX_FILE]
            return parts, {INDEX_FILE: _index({name: places.get(name, last) for name in stored}, size)}, copies
    return parts, {}, copies


def _files_of_released(source: Path, config: SoundwaveConfig) -> Path:
    """The folder with `config.json` and the small files of the released checkpoint that a model was made of."""
    head = Path(str(config.ctc_head))  # of a checkpoint in either layout
    for folder in (source / KEPT, head, head.parent.parent / KEPT):
        if is_released(folder):
            return folder
    raise ValueError(
        f"{source} belongs to a released checkpoint whose other files are not there; keep the folder {KEPT} that "
        "`soundwave convert` has written"
    )


def _refuse_what_has_no_place(source: Path, config: SoundwaveConfig) -> None:
    if config.ctc_head is None:
        raise ValueError(
            f"{source} was not made of a released checkpoint and cannot be written as one: its CTC head is the "
            "language model's output embedding, with a blank that has a bias"
        )
    if config.lora_rank:
        raise ValueError(
            f"{source} has LoRA matrices, which the released layout has no place for; merge them into the language "
            "model first, with `soundwave merge`"
        )
    for name, wanted in RULES.items():
        if getattr(config, name) != wanted:
            raise ValueError(
                f"{source} has {name} = {getattr(config, name)!r}, which the released layout cannot say: there it is "
                f"{wanted!r}"
            )


def _not_kept(config: SoundwaveConfig, released: SoundwaveConfig) -> str:
    """Settings of a model that differ from those which its released form would have."""
    names = sorted(inspect.signature(SoundwaveConfig.__init__).parameters.keys() - {"self", "kwargs", *ELSEWHERE})
    changed = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(released, name)}
    return ", ".join(f"{name} = {value!r}" for name, value in changed.items())


def _tower_tensors(name: str) -> dict[str, Stored]:
    """The tensors of Whisper's encoder as a released checkpoint names them."""
    stored = stored_tensors(_local("audio_tower", name))
    if is_released(resolve(name)):
        return {key: at for key, at in stored.items() if key.startswith(TOWER)}
    pattern = re.compile(r"^(model\.)?encoder\.")
    return {pattern.sub(TOWER, key): at for key, at in stored.items() if pattern.match(key)}


def _llama_tensors(name: str) -> dict[str, Stored]:
    return {
        key: at
        for key, at in stored_tensors(_local("language_model", name)).items()
        if not (is_released(resolve(name)) and NOT_LLAMA.match(key))
    }


def _local(setting: str, name: str) -> str:
    folder = resolve(name)
    if not Path(folder).is_dir():
        raise ValueError(f"{setting} = {name!r} is no folder on this machine; download it and name its folder")
    return folder

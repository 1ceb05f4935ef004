"""Rehearse training and use at the paper's full size, with random weights in the real shapes, and check what it takes.

    python bench/full_size.py                     Whisper-large-v3 and Llama-3.1-8B, on the GPU or in 22 GiB of memory
    python bench/full_size.py --layers 2          the same widths and vocabulary, two layers of the LLM
    python bench/full_size.py --scale tiny        small sizes on the same path, in seconds

It writes both backbones as the Hub has them, tensor by tensor: Whisper's single file with encoder and decoder, and the
LLM's shards of at most 5 GB with their index, both with configurations, tokenizer and preprocessor. Then the
`soundwave` command runs in processes of its own: stage I, which is killed by SIGKILL and continued, stages II and III,
`transcribe`, `ask`, `evaluate` and `report`. A few steps on short clips show what random weights can: that everything
fits and goes on, not that anything is learnt.

What is checked: the numbers of trained parameters; that stage I reads one tensor of the LLM's files, its output
embedding, while the other shards are not even there; the peak of memory, while loading and while training, against
`soundwave memory`; and the size of a checkpoint. Results are printed as a table and written as JSON, after each part.

A part that is done is not run again in the same --work folder, so that a rehearsal can go on later, or one part at a
time: `--part backbones --part stage1`. The full size takes 40 GB of disk. The folder is removed at the end, unless
--work names it.
"""

import argparse
import base64
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.convert_slow_tokenizer import TikTokenConverter

from soundwave import cli, memory
from soundwave.backbones.wheels import EmbeddedError, _download, _Wheel, cache_dir
from soundwave.curation.espeak import Espeak
from soundwave.hardware import pick_device, pick_dtype
from soundwave.provenance import commit, versions

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = Path(sys.executable).with_name("soundwave")
PACKAGES = ("soundwave", "torch", "transformers", "peft", "bitsandbytes", "safetensors")
IMPORTED = ("peft", "bitsandbytes", "soundwave.training.stages", "soundwave.inference.long", "soundwave.report")
MOST_GIB = 22.0  # of memory, for each command
MEMORY_TOLERANCE = 0.10  # a prediction may be off by this much
PAPER_MILLIONS = {"alignment": 144.75, "shrinking": 67.1, "LoRA": 54.5}
SHARD_BYTES = 5_000_000_000  # the largest shard that the Hub's files of Llama have
POOL = (1 << 22) + 15  # random numbers that are drawn once; an odd number, so that no two rows of a weight are equal
SENTENCES = ("turn on the light in the kitchen", "what is the time in France", "open the door", "play some music")
# What Llama 3's tokenizer is made of: the wheel's file, and the special tokens after its 128 000 entries.
LLAMA3 = _Wheel(
    "llama-models==0.3.0",
    "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f",
    "llama_models/llama3",
    7,
    lambda source, folder: None,
)
NAMED = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
]  # fmt: skip
SPECIAL = NAMED + [f"<|reserved_special_token_{number}|>" for number in range(3, 248)]
CHAT_TEMPLATE = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\n<|eot_id|>{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
    "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
console = Console()


@dataclass(frozen=True)
class Scale:
    """Sizes of a rehearsal.

    Attributes:
        decoder_layers, decoder_vocab: of Whisper's decoder, which is written and must not be read.
        shard_bytes: largest size of a shard of the LLM.
        steps: optimiser steps of stages I, II and III.
        seconds: length of each clip.
        forked: commands run in forks of this process instead of new ones, which saves the seconds of their imports.
    """

    name: str
    dims: memory.Dims
    decoder_layers: int
    decoder_vocab: int
    shard_bytes: int
    steps: tuple[int, int, int]
    seconds: float
    forked: bool

    def disk_bytes(self) -> int:
        """Disk that the weights take, and at most two checkpoints of each stage with its model."""
        d = self.dims
        llm = memory.BF16 * (d.linear_parameters + 2 * d.vocab * d.width)
        trained = 3 * d.alignment_parameters + 2 * d.shrinking_parameters + 2 * d.lora_parameters
        return llm + 5 * memory.BF16 // 2 * d.encoder_parameters + (2 * 3 + 1) * memory.FP32 * trained


FULL = Scale("full", memory.LLAMA_8B_WHISPER_LARGE, 32, 51_866, SHARD_BYTES, (3, 2, 2), 2.5, forked=False)
TINY = Scale(
    "tiny",
    memory.Dims(
        mels=128, audio_width=64, audio_layers=2, audio_heads=2, audio_mlp=128, audio_positions=1500,
        width=128, layers=2, heads=4, kv_heads=2, mlp=256, vocab=1000, lora_rank=8,
    ),
    1, 200, 400_000, (30, 2, 2), 2.5, forked=True,
)  # fmt: skip


class Failed(RuntimeError):
    """A command failed, so that the parts after it cannot run. The message has the end of what it printed."""


# ---------------------------------------------------------------- the backbones


def write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, pool: torch.Tensor) -> None:
    """Write random weights of these shapes, one tensor after another: no more than `pool` is in memory.

    A file is the length of its header (8 bytes), the header (JSON: dtype, shape and place of each tensor), and the
    tensors' bytes in that order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        kind = {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for values in random_values(name, math.prod(shape), dtype, pool):
                file.write(memoryview(values.view(torch.uint8).numpy()))


def random_values(name: str, count: int, dtype: torch.dtype, pool: torch.Tensor) -> Iterator[torch.Tensor]:
    """`count` values of a weight in pieces: ones for norms, zeros for biases, else normal ones of deviation 0.02."""
    start = zlib.crc32(name.encode()) % POOL
    if name.endswith("norm.weight"):
        pool, start = torch.ones(POOL, dtype=dtype), 0
    elif name.endswith(".bias"):
        pool, start = torch.zeros(POOL, dtype=dtype), 0
    while count:
        piece = pool[start : start + count]
        yield piece
        count, start = count - len(piece), 0


def random_pool(dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(POOL).normal_(0, 0.02, generator=torch.Generator().manual_seed(0)).to(dtype)


def shapes_of(model: Any, leave_out: tuple[str, ...] = ()) -> dict[str, tuple[int, ...]]:
    """The tensors of a model on the meta device, by name and in their order."""
    return {name: tuple(x.shape) for name, x in model.state_dict().items() if name not in leave_out}


def write_whisper(folder: Path, scale: Scale) -> None:
    """Whisper as the Hub has it: one file in float16 with encoder and decoder, and the preprocessor."""
    dims = scale.dims
    folder.mkdir(parents=True)
    config = WhisperConfig(
        **dims.whisper_config().to_diff_dict()
        | {
            "decoder_layers": scale.decoder_layers, "decoder_attention_heads": dims.audio_heads,
            "decoder_ffn_dim": dims.audio_mlp, "vocab_size": scale.decoder_vocab, "architectures": None,
        }
        | dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    )  # fmt: skip
    config.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=dims.mels).save_pretrained(folder)
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    shapes = shapes_of(model, leave_out=("proj_out.weight",))  # tied to the decoder's embedding
    write_safetensors(folder / "model.safetensors", shapes, torch.float16, random_pool(torch.float16))


def write_llama(folder: Path, scale: Scale) -> None:
    """Llama-3.1 as the Hub has it: bfloat16 shards in the order of the layers, with index, settings and tokenizer."""
    dims = scale.dims
    folder.mkdir(parents=True)
    first = dims.vocab - len(SPECIAL)  # id of <|begin_of_text|>
    ends = [first + SPECIAL.index(name) for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    tokens = {"bos_token_id": first, "eos_token_id": ends}
    config = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, **tokens,
        "hidden_act": "silu", "hidden_size": dims.width, "initializer_range": 0.02, "intermediate_size": dims.mlp,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "num_attention_heads": dims.heads,
        "num_hidden_layers": dims.layers, "num_key_value_heads": dims.kv_heads, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "use_cache": True, "vocab_size": dims.vocab,
        "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(tokens | sampling, indent=2))
    tokenizer_of(dims.vocab).save_pretrained(folder)
    with torch.device("meta"):
        shapes = shapes_of(LlamaForCausalLM(dims.llama_config()))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = scale.shard_bytes
    for name, shape in shapes.items():
        size = math.prod(shape) * memory.BF16
        if size > room and shards[-1]:
            shards.append({})
            room = scale.shard_bytes
        shards[-1][name] = shape
        room -= size
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    pool = random_pool(torch.bfloat16)
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, torch.bfloat16, pool)
    total = sum(math.prod(shape) for shape in shapes.values()) * memory.BF16
    places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def tokenizer_of(vocab: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocab` entries: Llama 3's own at its own size, if it can be fetched; else a trained stand-in."""
    backend = None
    if vocab == memory.LLAMA_8B_WHISPER_LARGE.vocab:
        try:
            backend = _Llama3(vocab_file=str(llama3_file()), extra_special_tokens=SPECIAL).converted()
        except EmbeddedError as error:
            console.print(f"a trained tokenizer stands in for Llama 3's: {error}", markup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend or trained_tokenizer(vocab), bos_token="<|begin_of_text|>", eos_token="<|eot_id|>",
        chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False, model_max_length=131072,
    )  # fmt: skip


class _Llama3(TikTokenConverter):
    """transformers' conversion of tiktoken's files; theirs needs tiktoken to read lines of two words."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        lines = [line.split() for line in Path(tiktoken_url).read_bytes().splitlines() if line]
        return {base64.b64decode(token): int(rank) for token, rank in lines}


def llama3_file() -> Path:
    """Llama 3's `tokenizer.model`, which Meta's package on PyPI holds. It is fetched once, into the user's cache."""
    file = cache_dir() / "llama3-tokenizer.model"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            shutil.move(_download("Llama 3's tokenizer", LLAMA3, Path(folder)) / "tokenizer.model", file)
    return file


def trained_tokenizer(vocab: int) -> Tokenizer:
    """A byte-level BPE of the sentences. Entries that nothing makes fill its vocabulary up."""
    ordinary = vocab - len(SPECIAL)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=ordinary, show_progress=False, initial_alphabet=alphabet)
    backend.train_from_iterator([f" {sentence}" for sentence in SENTENCES], trainer)
    form = json.loads(backend.to_str())
    words = form["model"]["vocab"]
    words |= {f"<filler {number}>": number for number in range(len(words), ordinary)}
    backend = Tokenizer.from_str(json.dumps(form))
    backend.add_special_tokens(SPECIAL)
    return backend


def write_recordings(folder: Path, seconds: float) -> Path:
    """Clips of the sentences, all of one length, and their manifest -> its path."""
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    with Espeak() as espeak:
        for number, sentence in enumerate(SENTENCES):
            samples, rate = espeak.synthesize(sentence)
            padded = np.zeros(round(rate * seconds), dtype=np.float32)
            padded[: len(samples)] = samples[: len(padded)]
            soundfile.write(folder / f"{number}.wav", padded, rate)
            rows.append({"audio_filepath": f"{number}.wav", "duration": seconds, "text": sentence})
    manifest = folder / "train.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


@contextmanager
def only_the_head(llama: Path) -> Iterator[None]:
    """Leave of the LLM's weights the output embedding alone: the other shards are away, and so are its neighbours."""
    places = json.loads((llama / "model.safetensors.index.json").read_text())["weight_map"]
    aside = _aside(llama)
    aside.mkdir()
    for shard in set(places.values()):
        shutil.move(llama / shard, aside / shard)
    head, name = "lm_head.weight", places["lm_head.weight"]
    with safe_open(aside / name, framework="pt") as file:
        save_file({head: file.get_tensor(head)}, llama / name, {"format": "pt"})
    try:
        yield
    finally:
        put_back(llama)


def put_back(llama: Path) -> None:
    """Put the shards back that `only_the_head` has moved; a rehearsal that was killed has left them aside."""
    if _aside(llama).is_dir():
        for shard in _aside(llama).iterdir():
            os.replace(shard, llama / shard.name)
        _aside(llama).rmdir()


def _aside(llama: Path) -> Path:
    return llama.with_name(llama.name + "-aside")


# ---------------------------------------------------------------- commands in processes of their own


@dataclass
class Run:
    """What a command took.

    Attributes:
        peaks: peak of its own memory in bytes, "loading" and "running"; pages of mapped files only after loading.
        maximum: the system's figure (`ru_maxrss`), which counts all mapped files.
    """

    command: str
    seconds: float
    peaks: dict[str, int]
    maximum: int
    gpu: int
    status: int
    printed: str

    @property
    def peak(self) -> int:
        return max(self.peaks.values())


def run(words: list[str], log: Path, *, forked: bool, kill_at: Callable[[], bool] | None = None) -> Run:
    """Run `soundwave WORDS` and watch its memory. It is killed (SIGKILL) when `kill_at` says so.

    Raises:
        Failed: its exit status is not 0, and it was not killed by this function.
    """
    start, killed = time.perf_counter(), False
    pid = _fork(words, log) if forked else _spawn(words, log)
    peaks: dict[str, int] = {"loading": 0}
    phase, gpu, before = "loading", 0, _gpu_used()
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if phase == "loading" and re.search(r"step \d+ of \d+ begins|setting the adapter", _text(log)):
            phase = "running"
        peaks[phase] = max(peaks.get(phase, 0), _own_memory(pid, files=phase == "running" and not forked))
        gpu = max(gpu, _gpu_used() - before)
        if kill_at is not None and not killed and kill_at():
            os.kill(pid, signal.SIGKILL)
            killed = True
        time.sleep(0.002 if forked else 0.02)
    code = os.waitstatus_to_exitcode(status)
    found = Run(
        " ".join(["soundwave", *words[:2]]), time.perf_counter() - start, peaks, usage.ru_maxrss * 1024, gpu, code,
        _text(log),
    )  # fmt: skip
    if kill_at is not None and code != -signal.SIGKILL:
        raise Failed(f"{found.command} was not killed, but ended with {code}:\n{found.printed[-2000:]}")
    if kill_at is None and code:
        raise Failed(f"{found.command} ended with {code}:\n{found.printed[-2000:]}")
    return found


def _spawn(words: list[str], log: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    actions = [(os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o644), (os.POSIX_SPAWN_DUP2, 1, 2)]
    return os.posix_spawn(SCRIPT, [str(SCRIPT), *words], os.environ, file_actions=actions)


def _fork(words: list[str], log: Path) -> int:
    """`soundwave WORDS` in a fork of this process, which has computed on one thread only -> its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status: Any = 1
    try:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = ["soundwave", *words]
        cli.main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _own_memory(pid: int, *, files: bool) -> int:
    """Bytes that a process holds, with the pages of mapped files or without them; 0 where that cannot be read."""
    values = {}
    for line in _text(Path(f"/proc/{pid}/status")).splitlines():
        name, _, rest = line.partition(":")
        if name in ("RssAnon", "RssFile"):
            values[name] = int(rest.split()[0]) * 1024
    return values.get("RssAnon", 0) + (values.get("RssFile", 0) if files else 0)


def _gpu_used() -> int:
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


# ---------------------------------------------------------------- the rehearsal


class Rehearsal:
    """The parts of a rehearsal in their order. Each leaves its figures in `results`, which are written at once."""

    def __init__(self, scale: Scale, work: Path, results: Path):
        self.scale, self.work, self.file = scale, work, results
        self.whisper, self.llama = work / "whisper-large-v3", work / "Llama-3.1-8B-Instruct"
        self.manifest = work / "clips" / "train.jsonl"
        put_back(self.llama)
        self.device = pick_device()[0].type
        self.dtype = str(pick_dtype(self.device)[0]).removeprefix("torch.")
        self.done: dict[str, dict[str, Any]] = {}
        if (work / "done.json").is_file():
            self.done = json.loads((work / "done.json").read_text())
        self.parts: dict[str, Callable[[], None]] = {
            "backbones": self.backbones, "stage1": self.stage1, "stage2": self.stage2, "stage3": self.stage3,
            "transcribe": self.transcribe, "ask": self.ask, "evaluate": self.evaluate, "report": self.report,
        }  # fmt: skip
        self.part = ""

    def go(self, parts: list[str]) -> bool:
        """Run the parts that are not done yet -> whether every check of all parts holds."""
        for self.part in parts:
            if self.part in self.done:
                continue
            console.print(f"{self.part} …", markup=False)
            self.found: dict[str, Any] = {"runs": [], "checks": []}
            self.parts[self.part]()
            self.done[self.part] = self.found
            (self.work / "done.json").write_text(json.dumps(self.done))
            self.write()
        return all(check["holds"] for part in self.done.values() for check in part["checks"])

    # ---------------------------------------------------------------- results

    def write(self) -> None:
        content = {
            "benchmark": "full_size", "scale": self.scale.name, "layers": self.scale.dims.layers,
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "CPU", "dtype": self.dtype,
            "date": date.today().isoformat(), "commit": commit() or "unknown", "versions": versions(PACKAGES),
            "parts": self.done,
        }  # fmt: skip
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(content, indent=1) + "\n")

    def show(self) -> None:
        table = Table("part", "command", "s", "peak GiB", "while loading", "all mapped", box=None)
        for part, found in self.done.items():
            for one in found["runs"]:
                sizes = (one["peak"], one["peaks"].get("loading", 0), one["maximum"])
                cells = [f"{size / memory.GIB:.2f}" for size in sizes]
                table.add_row(part, one["command"], f"{one['seconds']:.0f}", *cells)
        console.print(table)
        table = Table("part", "check", "found", "wanted", "", box=None)
        for part, found in self.done.items():
            for check in found["checks"]:
                words = [check[name] for name in ("what", "found", "wanted")]
                table.add_row(part, *words, "holds" if check["holds"] else "FAILS")
        console.print(table)

    def check(self, what: str, found: Any, wanted: Any, holds: bool) -> None:
        self.found["checks"].append({"what": what, "found": str(found), "wanted": str(wanted), "holds": bool(holds)})

    def command(self, *words: Any, kill_at: Callable[[], bool] | None = None) -> Run:
        log = self.work / "logs" / f"{self.part}-{len(self.found['runs'])}.txt"
        log.parent.mkdir(exist_ok=True)
        one = run([str(word) for word in words], log, forked=self.scale.forked, kill_at=kill_at)
        self.found["runs"].append({
            "command": one.command, "seconds": one.seconds, "peaks": one.peaks, "peak": one.peak,
            "maximum": one.maximum, "gpu": one.gpu, "status": one.status,
        })  # fmt: skip
        self.check("memory of the command", _gib(one.peak), f"at most {MOST_GIB:g} GiB", one.peak <= MOST_GIB * 2**30)
        return one

    def check_memory(self, stage: int, one: Run) -> None:
        """Compare the peaks of a training with the predicted ones. On a GPU its own are shown only."""
        if self.device != "cpu":
            return
        predicted = memory.predict(
            stage, 2, self.scale.seconds, device="cpu", dtype=self.dtype, kept_per_second=25.0, text_tokens=64,
            answer_tokens=12, gpu_gib=memory.MOST_GIB, dims=self.scale.dims,
        )  # fmt: skip
        while_running = max(size for phase, size in predicted.peaks.items() if phase != "loading")
        for phase, wanted in (("loading", predicted.peaks["loading"]), ("running", while_running)):
            measured = one.peaks[phase]
            if self.scale.forked:  # what a fork shares with this process stands for what Python itself holds
                wanted += _own_memory(os.getpid(), files=False) - memory.PROCESS_BYTES
                wanted -= memory.MAPPED_BYTES if phase == "running" else 0
            close = abs(measured - wanted) <= MEMORY_TOLERANCE * measured
            self.check(f"peak while {phase}", _gib(measured), f"{_gib(wanted)} ± 10 %", close)

    def check_parameters(self, stage: int) -> None:
        """Count the saved parameters: the paper's at full size."""
        dims, counts = self.scale.dims, {"alignment": 0, "shrinking": 0, "LoRA": 0}
        with safe_open(self.work / "runs" / str(stage) / "model" / "model.safetensors", framework="pt") as file:
            for name in list(file.keys()):
                size = math.prod(file.get_slice(name).get_shape())
                part = "LoRA" if "lora_" in name else "shrinking" if name.startswith("shrinking.") else "alignment"
                counts[part] += size
        wanted = {"alignment": dims.alignment_parameters}
        if stage > 1:
            wanted |= {"shrinking": dims.shrinking_parameters, "LoRA": dims.lora_parameters}
        for part, number in wanted.items():
            self.check(f"parameters, {part}", f"{counts[part]:,}", f"{number:,}", counts[part] == number)
            if dims == FULL.dims:
                # The paper counts neither the blank's row and bias nor the last LayerNorm.
                own = counts[part] - (3 * dims.width + 1 if part == "alignment" else 0)
                digits = len(str(PAPER_MILLIONS[part]).partition(".")[2])
                holds = round(own / 1e6, digits) == PAPER_MILLIONS[part]
                self.check(f"parameters, {part}", f"{own / 1e6:.2f} M", f"{PAPER_MILLIONS[part]} M (paper)", holds)

    def check_checkpoint(self, stage: int, parameters: int) -> None:
        """A checkpoint holds the trained weights and AdamW's two states in float32; the rest is small."""
        folder = self.work / "runs" / str(stage) / f"checkpoint-{self.scale.steps[stage - 1]}"
        size = sum(file.stat().st_size for file in folder.iterdir())
        wanted = 3 * memory.FP32 * parameters
        holds = wanted <= size <= 1.01 * wanted + 200_000
        self.check("size of a checkpoint", f"{size / 1e9:.3f} GB", f"{wanted / 1e9:.3f} GB + 1 %", holds)

    # ---------------------------------------------------------------- parts

    def backbones(self) -> None:
        for folder in (self.whisper, self.llama, self.manifest.parent):
            shutil.rmtree(folder, ignore_errors=True)  # of a rehearsal that was stopped
        free, needed = shutil.disk_usage(self.work).free, self.scale.disk_bytes()
        if free < needed:
            raise Failed(
                f"{self.work} has {free / 1e9:.0f} GB free, but {needed / 1e9:.0f} are needed: name another --work"
            )
        write_whisper(self.whisper, self.scale)
        write_llama(self.llama, self.scale)
        write_recordings(self.manifest.parent, self.scale.seconds)
        shards = sorted(self.llama.glob("*.safetensors"))
        gigabytes = sum(shard.stat().st_size for shard in shards) / 1e9
        self.check("shards of the LLM", f"{len(shards)}, {gigabytes:.2f} GB", "several", len(shards) > 1)

    def train(self, stage: int, *words: str, kill_at: Callable[[], bool] | None = None) -> Run:
        settings = [f"steps={self.scale.steps[stage - 1]}", "batch_size=2", "accumulation=1", "warmup_steps=0"]
        settings += ["save_steps=1", "save_total_limit=1", "log_steps=1", f"dtype={self.dtype}", "quantization=nf4"]
        settings += ["gradient_checkpointing=true", f"train={self.manifest}", f"out={self.work / 'runs' / str(stage)}"]
        return self.command("train", stage, *settings, *words, kill_at=kill_at)

    def stage1(self) -> None:
        words = [f"audio_tower={self.whisper}", f"language_model={self.llama}"]
        words += [f"lora_rank={self.scale.dims.lora_rank}"]
        out = self.work / "runs" / "1"
        shutil.rmtree(out, ignore_errors=True)
        with only_the_head(self.llama):
            self.train(1, *words, kill_at=(out / "checkpoint-1").is_dir)
            one = self.train(1, *words)
        went_on = re.search(r"going on from \S*checkpoint-(\d+)", one.printed)
        self.check("after kill -9 it goes on", f"from step {went_on[1]}" if went_on else "no", "yes", bool(went_on))
        self.check("read of the LLM's files", "lm_head.weight", "lm_head.weight", one.status == 0)
        self.check_memory(1, one)
        self.check_parameters(1)
        self.check_checkpoint(1, self.scale.dims.alignment_parameters)

    def stage2(self) -> None:
        dims = self.scale.dims
        shutil.rmtree(self.work / "runs" / "2", ignore_errors=True)
        one = self.train(2, f"model={self.work / 'runs' / '1' / 'model'}")
        self.check_memory(2, one)
        self.check_parameters(2)
        trained = dims.alignment_parameters + dims.shrinking_parameters + dims.lora_parameters
        self.check_checkpoint(2, trained)

    def stage3(self) -> None:
        shutil.rmtree(self.work / "runs" / "3", ignore_errors=True)
        one = self.train(3, f"model={self.work / 'runs' / '2' / 'model'}")
        self.check_memory(3, one)
        self.check_parameters(3)

    def transcribe(self) -> None:
        clip = self.manifest.parent / "0.wav"
        self.command("transcribe", clip, *self.model(), "--json")

    def ask(self) -> None:
        self.command("ask", self.manifest.parent / "0.wav", "What is said?", *self.model())

    def evaluate(self) -> None:
        short = self.manifest.with_name("two.jsonl")
        short.write_text("".join(self.manifest.read_text().splitlines(keepends=True)[:2]))
        self.command("evaluate", short, *self.model(), "--batch-size", 2)

    def report(self) -> None:
        runs = [self.work / "runs" / str(stage) for stage in (1, 2, 3)]
        page = self.work / "report.html"
        self.command("report", *runs, "--out", page, "--utterances", 1)
        self.check("page", f"{page.stat().st_size:,} bytes", "a page", "</html>" in page.read_text())

    def model(self) -> tuple[Any, ...]:
        return "--model", self.work / "runs" / "3" / "model", "--max-new-tokens", 2


def _gib(size: int) -> str:
    return f"{size / memory.GIB:.2f} GiB"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=("full", "tiny"), default="full", help="sizes of the backbones")
    parser.add_argument("--layers", type=int, help="layers of the LLM, by default all")
    parser.add_argument("--part", action="append", help="part to run; may be repeated; by default all")
    parser.add_argument(
        "--work", type=Path, help="folder for weights and runs, which is kept; by default a temporary one"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs", help="folder for the JSON file")
    given = parser.parse_args()
    scale = FULL if given.scale == "full" else TINY
    if given.layers is not None:
        if given.layers < 1:
            parser.error(f"--layers {given.layers}, but it must be at least 1")
        scale = replace(scale, dims=replace(scale.dims, layers=given.layers))
    if scale.forked:  # what the commands would import, each of them
        torch.set_num_threads(1)
        for module in (
            "peft",
            "bitsandbytes",
            "soundwave.training.stages",
            "soundwave.inference.long",
            "soundwave.report",
        ):
            import_module(module)
    with tempfile.TemporaryDirectory(prefix="full-size-") as temporary:
        work = (given.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        name = f"full_size-{scale.name}-{scale.dims.layers}-{date.today().isoformat()}.json"
        rehearsal = Rehearsal(scale, work, given.out / name)
        parts = given.part or list(rehearsal.parts)
        unknown = [part for part in parts if part not in rehearsal.parts]
        if unknown:
            parser.error(f"--part {unknown[0]}, but the parts are {', '.join(rehearsal.parts)}")
        try:
            holds = rehearsal.go(parts)
        except Failed as error:
            rehearsal.show()
            console.print(f"{rehearsal.part}: {error}", markup=False, soft_wrap=True)
            return 1
        rehearsal.show()
        console.print(f"written: {rehearsal.file}", markup=False, soft_wrap=True)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())

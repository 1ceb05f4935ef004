"""Find the largest batch of each stage that trains on a 24 GB card, at the real size with random weights.

    python bench/train_24gb.py                      on a GPU: all stages, fused and eager
    python bench/train_24gb.py --stage 2            one stage
    python bench/train_24gb.py --tiny               a rehearsal: the same code on the CPU at small sizes, no figures

The model is the package's own: Whisper-large-v3's encoder, both adapters, and Llama-3.1-8B in NF4 with LoRA, whose
layers are built one by one directly in 4 bits. Torch's allocator is capped at 22.0 GiB. A step accumulates the
gradients of two batches, clips them and runs AdamW with its states. A sample has 30 s of audio and 150 tokens of text,
of which 80 are the answer. The CTC path of random weights is meaningless, so it is planted: 3 kept frames per second,
and in a second measurement all 25.

For every stage and implementation, each in a process of its own, it searches the largest batch that trains. It reports
the peak memory by phase and by part beside the prediction of `soundwave.memory`, audio-seconds and tokens per second,
and the model's FLOP/s (without recomputation) as a share of those of a large product. A search that ran out of time is
marked ("≥ 44"), and so is a largest batch that could not be timed.

The JSON file goes to --out, else to $OUT, else to bench/results/<device>/ (that of a rehearsal to runs/). It is written
again after every process.
"""

import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from soundwave import memory
from soundwave.eager import IGNORE_INDEX
from soundwave.model.modeling import SoundwaveForConditionalGeneration, freeze_all_but
from soundwave.provenance import commit, slug, versions
from soundwave.training.stages import TRAINED

CAP_GIB = 22.0
SECONDS, TEXT_TOKENS, ANSWER_TOKENS = 30.0, 150, memory.ANSWER_TOKENS
KEPT_PER_SECOND = (3.0, 25.0)  # about the sub-words of speech; and every frame, so that nothing is shrunk
ACCUMULATION = 2  # As in real training, the gradients of one batch are held while the next one runs.
TIMED_STEPS = 5
GRACE_SECONDS = 30.0  # for the last step of a process whose time is over
TINY = memory.Dims(
    mels=16, audio_width=64, audio_layers=2, audio_heads=2, audio_mlp=128, audio_positions=100,
    width=128, layers=2, heads=4, kv_heads=2, mlp=256, vocab=1000, lora_rank=4,
)  # fmt: skip
TINY_SECONDS, TINY_BATCHES = 2.0, (1, 2)
PACKAGES = ("soundwave", "torch", "triton", "transformers", "peft", "bitsandbytes")
ROOT = Path(__file__).resolve().parents[1]
console = Console()


# ---------------------------------------------------------------- model


class PlantedPath(SoundwaveForConditionalGeneration):
    """The model with a planted CTC path of `kept_per_second` peaks per second, and a mark after each phase."""

    kept_per_second = KEPT_PER_SECOND[0]
    mark = staticmethod(lambda phase: None)

    def encode(self, *args: Any) -> tuple[Tensor, Tensor]:
        encoded = super().encode(*args)
        self.mark("encoder")
        return encoded

    def _align(self, *args: Any) -> tuple[Tensor, Tensor, Any]:
        aligned = super()._align(*args)
        self.mark("ctc")
        return aligned

    def kept_frames(self, ctc: Any, lengths: Tensor) -> Any:
        """The clips are equally long, so their paths are the rows of one table."""
        frames = int(lengths.max())
        seconds = 2 * self.config.frame_stack * frames / memory.MEL_RATE
        kept = min(max(math.ceil(self.kept_per_second * seconds), 1), frames)
        path = ctc.path.new_full((len(lengths), frames), self.blank)
        place = torch.arange(kept, device=path.device) * frames // kept
        path[:, place] = place % 2  # Neighbours differ, so each of them is a run of its own.
        scores = torch.zeros_like(ctc.path_log_prob)
        return super().kept_frames(ctc._replace(path=path.view(ctc.path.shape), path_log_prob=scores), lengths)


def build_model(stage: int, implementation: str, dims: memory.Dims, device: torch.device) -> PlantedPath:
    """The model of a stage with random weights and backbones in bfloat16; what the stage does not train is frozen."""
    config = dims.soundwave_config(quantization="nf4", implementation=implementation, stage=stage)
    with device:
        model = PlantedPath(config)
        model.audio_tower = random_encoder(dims).requires_grad_(False)
        if stage == 1:
            model._head = 0.02 * torch.randn(dims.vocab, dims.width, dtype=torch.bfloat16)
        else:
            model.language_model = random_language_model(dims).requires_grad_(False)
            model.add_lora()
            checkpoint_layers(model.language_model)
    freeze_all_but(model, TRAINED[stage])
    return model.to(device).train()


def checkpoint_layers(language_model: Any) -> None:
    """Let each layer keep only its input for backward. transformers renamed the method after 5.17."""
    enable = getattr(language_model, "activation_checkpointing_enable", language_model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    # With LoRA the method makes the embeddings require a gradient, which only reentrant checkpoints need.
    language_model.disable_input_require_grads()


def random_encoder(dims: memory.Dims) -> nn.Module:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    with bfloat16():
        return WhisperEncoder(dims.whisper_config())


def random_language_model(dims: memory.Dims) -> nn.Module:
    """Llama with its linear layers in NF4. At most one of them exists in bfloat16 at a time."""
    import bitsandbytes
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = dims.llama_config(num_hidden_layers=0, max_position_embeddings=8192)

    def quantised(linear: nn.Linear) -> nn.Module:
        layer = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16,
            compress_statistics=True, quant_type="nf4", device="meta",
        )  # fmt: skip
        device = torch.empty(0).device  # the default device: moving the weight there quantises it
        weight = torch.empty(linear.weight.shape, dtype=torch.bfloat16).normal_(std=0.02)
        layer.weight = bitsandbytes.nn.Params4bit(
            weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
        ).to(device)
        layer.support_avx512bf16_for_cpu = False  # An evaluation would repack the weights for good.
        return layer

    with bfloat16():
        model = LlamaForCausalLM(config)
        for index in range(dims.layers):
            with torch.device("meta"):
                layer = LlamaDecoderLayer(config, index)
            for part in (layer.self_attn, layer.mlp):
                for name, linear in list(part.named_children()):
                    if isinstance(linear, nn.Linear):
                        setattr(part, name, quantised(linear))
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight = nn.Parameter(torch.ones(dims.width))
            model.model.layers.append(layer)
    config.num_hidden_layers = model.config.num_hidden_layers = dims.layers
    model.is_loaded_in_4bit = True  # peft then uses its LoRA for 4-bit layers.
    return model


class bfloat16:
    """Context in which new floating-point tensors are bfloat16."""

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)

    def __exit__(self, *_: Any) -> None:
        torch.set_default_dtype(self.before)


def random_batch(
    stage: int, batch: int, seconds: float, text_tokens: int, answer_tokens: int, dims: memory.Dims, device
) -> dict[str, Tensor]:
    """A batch like the collator's, with random values: `batch` clips of `seconds` each, so there is no padding."""
    frames = round(memory.MEL_RATE * seconds)
    out = {
        "input_features": torch.randn(batch, dims.mels, frames, device=device),
        "feature_lengths": torch.full((batch,), frames, device=device),
    }
    if stage < 3:
        out["ctc_labels"] = torch.randint(dims.vocab, (batch, answer_tokens), device=device)
    if stage > 1:
        ids = torch.randint(dims.vocab, (batch, text_tokens + 1), device=device)
        ids[:, 1] = dims.vocab  # the placeholder, which the kept frames replace
        labels = ids.clone()
        labels[:, : -answer_tokens or None] = IGNORE_INDEX
        out |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return out


# ---------------------------------------------------------------- measuring


class Trial:
    """One stage with one implementation on one device; it measures memory and time of steps with any batch."""

    def __init__(self, stage: int, implementation: str, tiny: bool):
        self.stage, self.implementation = stage, implementation
        self.device = torch.device("cpu" if tiny else "cuda")
        self.cuda = not tiny
        self.dims = TINY if tiny else memory.LLAMA_8B_WHISPER_LARGE
        self.seconds = TINY_SECONDS if tiny else SECONDS
        self.text = {"text_tokens": 12, "answer_tokens": 6} if tiny else {"text_tokens": TEXT_TOKENS}
        self.text.setdefault("answer_tokens", ANSWER_TOKENS)
        torch.manual_seed(0)
        if self.cuda:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(CAP_GIB * memory.GIB / total, 1.0))
        self.model = build_model(stage, implementation, self.dims, self.device)
        self.model.mark = self.mark
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()  # makes the states, which every step but the first one finds
        self.optimizer.zero_grad()
        self.phases: dict[str, int] = {}

    def mark(self, phase: str) -> None:
        """Note the allocator's peak since the last mark; on the CPU only the name of the phase."""
        peak = torch.cuda.max_memory_allocated() if self.cuda else 0
        self.phases[phase] = max(self.phases.get(phase, 0), peak)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def step(self, batch: dict[str, Tensor]) -> None:
        """One optimiser step over `ACCUMULATION` forward and backward passes."""
        for _ in range(ACCUMULATION):
            out = self.model(**batch)
            loss, kept = out.loss / ACCUMULATION, out.cu_seqlens
            del out
            self.mark("language model" if self.stage > 1 else "ctc")
            loss.backward()
            self.mark("backward")
        self.parts = self.measured_parts()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.mark("optimiser")
        self.optimizer.zero_grad()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()}")
        self.kept = None if kept is None else int(kept[-1])

    def attempt(self, size: int, kept_per_second: float, steps: int = 1) -> dict[str, Any] | None:
        """Memory and seconds of steps with batches of `size`; None if they do not fit."""
        self.model.kept_per_second, self.phases = kept_per_second, {}
        fitted = False
        try:
            batch = random_batch(self.stage, size, self.seconds, dims=self.dims, device=self.device, **self.text)
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
            if self.stage == 1:  # before the first step, training fits the adapter to the same batch
                clips = batch["input_features"], batch["feature_lengths"]
                self.model.frame_moments(*clips)  # standardise_frames takes no memory; it is for once
                self.model.initialise_blank(*clips)
                self.mark("blank")
            self.step(batch)
            reserved = torch.cuda.memory_reserved() if self.cuda else 0
            times = [self.timed(batch) for _ in range(steps - 1)]
            fitted = True
        except torch.OutOfMemoryError:
            pass
        self.optimizer.zero_grad()
        batch = None
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        if not fitted or reserved > CAP_GIB * memory.GIB:
            return None
        peak = max(self.phases.values())
        return {
            "batch": size, "peak_bytes": peak, "reserved_bytes": reserved, "phases": self.phases,
            "parts": self.parts, "kept_frames": self.kept, "step_seconds": times,
        }  # fmt: skip

    def timed(self, batch: dict[str, Tensor]) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        self.step(batch)
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def measured_parts(self) -> dict[str, int]:
        """Bytes of the tensors that exist throughout a step, part by part."""
        model, seen = self.model, set()

        def size(tensors: Any) -> int:
            total = 0
            for tensor in tensors:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    total += storage.nbytes()
            return total

        trained = size(self.trained)
        gradients = size(p.grad for p in self.trained if p.grad is not None)
        states = size(t for state in self.optimizer.state.values() for t in state.values() if t.dim())
        parts = {"encoder": size([*model.audio_tower.parameters(), *model.audio_tower.buffers()])}
        if self.stage > 1:
            quantised = [p for p in model.language_model.parameters() if hasattr(p, "quant_state")]
            scales = [t for p in quantised for t in quant_state_tensors(p.quant_state)]
            parts["LLM layers, NF4"] = size([*quantised, *scales])
            parts["LLM embeddings and norms"] = size(p for p in model.language_model.parameters())
        else:
            parts["output embedding"] = size([model._head])
        parts["adapters that are not trained"] = size(model.parameters())
        return parts | {"trained weights": trained, "gradients": gradients, "AdamW's states": states}


def quant_state_tensors(state: Any) -> list[Tensor]:
    """The scales of a 4-bit weight and, as these are quantised too, the scales of the scales."""
    own = [value for value in vars(state).values() if isinstance(value, Tensor)]
    return own + (quant_state_tensors(state.state2) if state.nested else [])


def largest(trial: Trial, kept_per_second: float, tried: list[dict[str, Any]], deadline: float) -> tuple[int, bool]:
    """Search the largest batch that fits, from the predicted one up or down.

    Args:
        tried: every batch that was tried is appended to it.
        deadline: when the search ends at the latest, as `time.time()`.

    Returns:
        The largest batch that fits, or 0; and whether it is certain: it is not if the deadline ended the search.
    """

    def fits(size: int) -> bool:
        result = trial.attempt(size, kept_per_second)
        tried.append(
            {
                "batch": size, "fits": result is not None, "peak_bytes": result and result["peak_bytes"],
                "predicted_bytes": prediction(trial, size, kept_per_second).peak,
            }
        )  # fmt: skip
        return result is not None

    if not trial.cuda:
        return max(size for size in TINY_BATCHES if fits(size)), True
    guess = memory.largest_batch(
        trial.stage, trial.seconds, gpu_gib=CAP_GIB + memory.RESERVED_GIB, implementation=trial.implementation,
        kept_per_second=kept_per_second, dims=trial.dims, **trial.text,
    )  # fmt: skip
    least, most, size = 0, None, max(guess, 1)
    stride = max(1, guess // 16)
    while (most is None or most - least > 1) and time.time() < deadline:
        if fits(size):
            least = size
        else:
            most = size
        if most is None:
            size, stride = least + stride, 2 * stride
        elif least == 0:
            size, stride = max(1, most - stride), 2 * stride
        else:
            size = (least + most) // 2
    return least, most is not None and most - least == 1


def product_flops(device: torch.device) -> float:
    """FLOP/s of a large bfloat16 product, the most that the model can reach."""
    size = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(12):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[2:])


def model_flops(stage: int, batch: int, seconds: float, kept: int, text: dict[str, int], dims: memory.Dims) -> float:
    """Operations of the products of one forward and backward pass; a multiplication with its addition counts as 2.

    Convention: backward takes as many operations as forward for each factor that needs a gradient, which is a trained
    weight or an input that depends on one. So attention takes twice as many backward as forward. Recomputation does not
    count.
    """
    d = dims
    frames = round(memory.MEL_RATE * seconds) // 2
    rows = -(-frames // memory.STACK)
    clip = 2 * frames * (d.encoder_parameters - d.audio_positions * d.audio_width)
    clip += 4 * d.audio_layers * frames * frames * d.audio_width  # scores and their product with the values
    clip += alignment_flops(rows, d, trained=stage < 3)
    clip += (1 if stage == 3 else 2) * 2 * rows * d.vocab * d.width  # the head is frozen
    total = batch * clip
    if stage > 1:
        passes = 3 if stage == 2 else 1
        total += passes * (4 * kept + 4 * batch * rows) * d.width * d.width  # query and output, key and value
        total += passes * 4 * kept * rows * d.width
        tokens = batch * text["text_tokens"] + kept
        total += 2 * 2 * tokens * d.linear_parameters + 3 * 2 * tokens * d.lora_parameters
        total += 3 * d.layers * 4 * tokens * tokens / batch / 2 * d.width  # Causal attention needs half of the scores.
        total += 2 * 2 * batch * text["answer_tokens"] * d.vocab * d.width
    return total


def alignment_flops(rows: int, dims: memory.Dims, trained: bool) -> float:
    """Operations of the alignment adapter on a clip of `rows` frames, counted as in `model_flops`.

    The input of its projector needs no gradient, because the encoder below is frozen.
    """
    forward = 2 * rows * dims.alignment_parameters + 4 * rows * rows * dims.width
    return 3 * forward - 2 * rows * dims.projector_parameters if trained else forward


def run(stage: int, implementation: str, tiny: bool, until: float, write: Any) -> None:
    """Measure a stage with one implementation, at both rates of kept frames.

    Args:
        until: when it ends at the latest, as `time.time()`.
        write: called with the results so far.
    """
    start = time.time()
    trial = Trial(stage, implementation, tiny)
    roof = product_flops(trial.device)
    results = []
    rates = KEPT_PER_SECOND if stage > 1 else KEPT_PER_SECOND[:1]  # stage I shrinks nothing
    for number, kept_per_second in enumerate(rates, 1):
        deadline = start + (until - start) * (number / len(rates) - 0.1)
        tried: list[dict[str, Any]] = []
        size, finished = largest(trial, kept_per_second, tried, deadline)
        result = {
            "stage": stage, "implementation": implementation, "kept_per_second": kept_per_second,
            "seconds": trial.seconds, **trial.text, "largest_batch": size, "search_finished": finished, "tried": tried,
            "bf16_product_tflops": roof / 1e12, "allocator": os.environ.get("PYTORCH_ALLOC_CONF", ""),
        }  # fmt: skip
        results.append(result)
        if not size:
            result["not_timed"] = "no batch fits" if finished else "no batch was found to fit in time"
            write(results)
            continue
        result["not_timed"] = "the process ended before its timed steps"  # It stays if the process is killed now.
        write(results)
        measured = trial.attempt(size, kept_per_second, 1 + TIMED_STEPS)
        if measured:
            del result["not_timed"]
            result |= measured | speed(trial, size, kept_per_second, measured["step_seconds"], roof)
        else:
            result["not_timed"] = f"out of memory in {1 + TIMED_STEPS} steps with the batch that fitted for one"
        write(results)


def speed(trial: Trial, size: int, kept_per_second: float, times: list[float], roof: float) -> dict[str, Any]:
    """Speed of the timed steps beside the roof, and the predicted peaks."""
    median = statistics.median(times)
    kept = trial.kept or 0
    flops = ACCUMULATION * model_flops(trial.stage, size, trial.seconds, kept, trial.text, trial.dims)
    tokens = ACCUMULATION * (size * trial.text["text_tokens"] + kept) if trial.stage > 1 else 0
    return {
        "accumulation": ACCUMULATION,
        "step_seconds_median": median,
        "step_seconds_spread": interquartile_range(times),
        "audio_seconds_per_second": ACCUMULATION * size * trial.seconds / median,
        "tokens_per_second": tokens / median,
        "model_tflop_per_step": flops / 1e12,
        "model_flop_utilisation": flops / median / roof,
        "predicted_peaks": prediction(trial, size, kept_per_second).peaks,
    }


def prediction(trial: Trial, size: int, kept_per_second: float) -> memory.Prediction:
    """What `soundwave.memory` predicts for a step of a trial."""
    return memory.predict(
        trial.stage, size, trial.seconds, gpu_gib=CAP_GIB + memory.RESERVED_GIB, implementation=trial.implementation,
        kept_per_second=kept_per_second, dims=trial.dims, **trial.text,
    )  # fmt: skip


def interquartile_range(values: list[float]) -> float:
    """Interquartile range; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first


def in_a_process(stage: int, implementation: str, tiny: bool, until: float) -> tuple[list[dict[str, Any]], str | None]:
    """Call `run` in a process of its own.

    The process has time until `until`, as `time.time()`; this includes its start. Some time later it is killed.

    Returns:
        Its results so far, and its error or None.
    """
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results.json"
        command = [sys.executable, __file__, "--stage", str(stage), "--implementation", implementation]
        command += ["--until", str(until), "--child", str(results), *(["--tiny"] if tiny else [])]
        # With segments that can grow, batches of different sizes do not fragment the memory.
        environment = os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
        timeout = None if tiny else max(until - time.time(), 0.0) + GRACE_SECONDS
        error = None
        try:
            code = subprocess.run(command, env=environment, timeout=timeout).returncode
            error = f"exit status {code}" if code else None
        except subprocess.TimeoutExpired:
            error = f"not done after {timeout:.0f} s"
        except KeyboardInterrupt:  # as `timeout --signal INT` sends it; what was measured is written all the same
            error = "interrupted"
        return json.loads(results.read_text()) if results.exists() else [], error


# ---------------------------------------------------------------- the file and the table


def header(tiny: bool, given_commit: str = "") -> dict[str, Any]:
    return {
        "benchmark": "train_24gb",
        "device": "CPU rehearsal" if tiny else torch.cuda.get_device_name(),
        "date": date.today().isoformat(),
        "commit": commit() or given_commit or "unknown",
        "versions": versions(PACKAGES) | ({"cuda": torch.version.cuda} if torch.version.cuda else {}),
        "dtype": "bfloat16 products, float32 trained weights, NF4 language model",
        "cap_gib": None if tiny else CAP_GIB,
        "dims": asdict(TINY if tiny else memory.LLAMA_8B_WHISPER_LARGE),
    }


def show(content: dict[str, Any]) -> None:
    """Print the results of a file as a table."""
    table = Table("stage", "implementation", "kept/s", "largest batch", "peak GiB", "predicted", "audio s/s", "MFU")
    for result in content["runs"]:
        row = [str(result[key]) for key in ("stage", "implementation", "kept_per_second")]
        row.append(f"{'' if result['search_finished'] else '≥ '}{result['largest_batch']}")
        if "not_timed" not in result:
            row += [
                f"{result['peak_bytes'] / memory.GIB:.2f}" if result["peak_bytes"] else "not on a CPU",
                f"{max(result['predicted_peaks'].values()) / memory.GIB:.2f}",
                f"{result['audio_seconds_per_second']:.1f}",
                f"{result['model_flop_utilisation']:.1%}",
            ]
        table.add_row(*row)
    console.print(table)
    for result in content["runs"]:
        if "not_timed" in result:
            what = f"stage {result['stage']}, {result['implementation']}, {result['kept_per_second']} kept/s"
            console.print(f"{what}: not timed: {result['not_timed']}", markup=False)
    for failure in content["failures"]:
        console.print(f"stage {failure['stage']}, {failure['implementation']}: {failure['error']}", markup=False)


def main(
    stage: Annotated[list[int] | None, typer.Option(min=1, max=3, help="Stage; may be repeated. Default: all.")] = None,
    implementation: Annotated[list[str] | None, typer.Option(help="fused or eager; default: both.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the JSON file.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Rehearse on the CPU at small sizes.")] = False,
    given_commit: Annotated[
        str, typer.Option("--commit", help="Commit of the checkout, where git does not know it.")
    ] = "",
    minutes: Annotated[float, typer.Option(help="Time for everything, in minutes.")] = 8.0,
    child: Annotated[
        Path | None, typer.Option(hidden=True, help="Measure in this process and write the results to this file.")
    ] = None,
    until: Annotated[float, typer.Option(hidden=True, help="End of the child's time, in Unix seconds.")] = 0.0,
) -> None:
    """Find the largest batch of each stage that trains under 22.0 GiB, and measure it."""
    stages, implementations = stage or [1, 2, 3], implementation or ["fused", "eager"]
    if child is not None:
        run(stages[0], implementations[0], tiny, until, lambda results: child.write_text(json.dumps(results)))
        return
    if not tiny and not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU was found: measure on one, or rehearse with --tiny")
    if max(stages) > 1 and find_spec("bitsandbytes") is None:
        raise SystemExit(
            "bitsandbytes is not installed, but stages 2 and 3 hold the LLM in its 4-bit format: install it"
        )
    content = header(tiny, given_commit) | {"runs": [], "failures": []}
    results = ROOT / "runs" if tiny else ROOT / "bench" / "results" / slug(content["device"])
    folder = out or Path(os.environ.get("OUT") or results)
    folder.mkdir(parents=True, exist_ok=True)
    name = "-".join(["train_24gb", *map(str, stages), content["date"], content["commit"]])
    todo = [(number, name) for number in stages for name in implementations]
    end = time.time() + 60 * minutes
    for done, (number, which) in enumerate(todo):
        share = max((end - time.time()) / (len(todo) - done), 1.0)
        runs, error = in_a_process(number, which, tiny, time.time() + share)
        content["runs"] += runs
        if error:
            content["failures"].append({"stage": number, "implementation": which, "error": error})
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    show(content)
    console.print(f"written: {folder / name}.json", markup=False, soft_wrap=True)
    if content["failures"]:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)

"""Predict by arithmetic how much GPU memory a training step takes, part by part. No GPU is needed.

    rich.print(table(predict(2, 16, 30.0)))     a step of stage II on 16 clips of 30 s
    largest_batch(2, 30.0)                      the batch that fits on a card of 24 GiB, with `TOLERANCE` to spare

Loading is a phase, a step has six, and stage I one more before its first step. The highest peak must fit:

    loading              the weights are read, and quantised one after another
    blank                the blank's bias is set: logits of the first batch in chunks (stage I)
    encoder              Whisper without gradient, one layer at a time
    ctc                  the alignment adapter has run, CTC computes its loss and gradient
    language model       the LLM's last layer runs, or the loss over its vocabulary is computed
    backward: LLM        the last layer is run again and differentiated; all others still hold their inputs
    backward: adapters   the LLM is done; everything that the adapters kept for backward is still held
    optimiser            weights, gradients and states, and a temporary tensor of AdamW

Sizes are bytes, as torch's allocator counts them (`torch.cuda.max_memory_allocated`). Gradients exist from the first
phase on, as they do while they are accumulated; that of the blank, which has none yet, is overestimated by them. All
clips are equally long; padding takes as much memory as audio.

A step on a CPU (`device="cpu"`) takes the machine's memory. It is what the process holds, with its libraries; pages of
files that are only mapped while they are read do not count, because the system takes them back.
"""

import math
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any

import rich.box
import rich.table

from soundwave.kernels.active_columns import BLOCK_COLUMNS, LANES, MOST_ACTIVE_TRITON
from soundwave.kernels.vocab_rows import CHUNK_BYTES

if TYPE_CHECKING:
    from transformers import LlamaConfig, WhisperConfig

    from soundwave.model.configuration import SoundwaveConfig

GIB = 2**30
BF16, FP32 = 2, 4
# Memory that torch cannot use (card, driver, desktop, CUDA context): a card of 24 GiB leaves 22.0 GiB to torch.
RESERVED_GIB = 2.0
# Largest relative error of a prediction. A batch fits only if this share is kept free.
TOLERANCE = 0.05
MOST_GIB = 1024.0  # no card has more memory
MOST_CLIPS = 1 << 20  # `largest_batch` tries no more
ANSWER_TOKENS = 80  # sub-words in 30 s of speech
# Whisper reads 100 mel frames a second and halves them once.
MEL_RATE, ENCODER_RATE, STACK = 100, 50, 2
# NF4 takes half a byte. 64 weights share an 8-bit scale, and 256 scales share a 32-bit one (double quantisation).
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
BLANK_CHUNK_BYTES = 256 << 20  # of the logits in float32 that the model's `initialise_blank` makes at once
CUBLAS_WORKSPACE = 32 << 20  # torch's choice for Hopper; 8 MiB on other cards
# Python with torch, transformers, peft and bitsandbytes, on a CPU: what it holds, and the files of theirs that it maps.
PROCESS_BYTES, MAPPED_BYTES = 350 << 20, 220 << 20
TOKEN_BYTES = 1600  # of an entry of the tokenizer, on a CPU
# On a CPU bitsandbytes quantises a weight through four copies in float32: itself, two factors and the indices.
QUANTISING_BYTES = 4 * FP32


@dataclass(frozen=True)
class Dims:
    """Sizes of the two backbones and of LoRA on q, k, v and o."""

    mels: int
    audio_width: int
    audio_layers: int
    audio_heads: int
    audio_mlp: int
    audio_positions: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    lora_rank: int = 64

    @property
    def kv_width(self) -> int:
        return self.width // self.heads * self.kv_heads

    @property
    def encoder_parameters(self) -> int:
        e, m = self.audio_width, self.audio_mlp
        convolutions = 3 * self.mels * e + 3 * e * e + 2 * e
        layer = 4 * e * e + 3 * e + 2 * e * m + m + e + 4 * e  # q, k, v, o (k has no bias); MLP; two LayerNorms
        return convolutions + self.audio_positions * e + self.audio_layers * layer + 2 * e

    @property
    def linear_parameters(self) -> int:
        """Weights of the LLM's linear layers, which are quantised."""
        attention = 2 * self.width * self.width + 2 * self.width * self.kv_width
        return self.layers * (attention + 3 * self.width * self.mlp)

    @property
    def lora_parameters(self) -> int:
        """A rank·in and a rank·out matrix for each of q, k, v, o."""
        return self.layers * self.lora_rank * (4 * self.width + 2 * (self.width + self.kv_width))

    @property
    def projector_parameters(self) -> int:
        """A linear layer from two concatenated frames to the LLM's width."""
        return STACK * self.audio_width * self.width + self.width

    @property
    def alignment_parameters(self) -> int:
        """Projector, attention, MLP of twice the width, three LayerNorms, the blank's row and bias."""
        d = self.width
        attention, mlp, norms, blank = 4 * d * d + 4 * d, 4 * d * d + 3 * d, 6 * d, d + 1
        return self.projector_parameters + attention + mlp + norms + blank

    @property
    def shrinking_parameters(self) -> int:
        """Attention and a LayerNorm."""
        return 4 * self.width * self.width + 4 * self.width + 2 * self.width

    def whisper_config(self, **settings: Any) -> "WhisperConfig":
        """Configuration of a Whisper whose encoder has these sizes; `settings` are added."""
        from transformers import WhisperConfig

        return WhisperConfig(
            num_mel_bins=self.mels,
            d_model=self.audio_width,
            encoder_layers=self.audio_layers,
            encoder_attention_heads=self.audio_heads,
            encoder_ffn_dim=self.audio_mlp,
            max_source_positions=self.audio_positions,
            **settings,
        )

    def llama_config(self, **settings: Any) -> "LlamaConfig":
        """Configuration of a Llama of these sizes; `settings` are added or replace a size."""
        from transformers import LlamaConfig

        sizes: dict[str, Any] = {
            "hidden_size": self.width,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
        }
        return LlamaConfig(**sizes | settings)

    def soundwave_config(self, **settings: Any) -> "SoundwaveConfig":
        """Configuration of a model on backbones of these sizes; `settings` are added.

        The placeholder is the first id after the vocabulary.
        """
        from soundwave.model.configuration import SoundwaveConfig

        return SoundwaveConfig(
            audio_hidden_size=self.audio_width,
            hidden_size=self.width,
            num_attention_heads=self.heads,
            vocab_size=self.vocab,
            audio_placeholder_id=self.vocab,
            lora_rank=self.lora_rank,
            **settings,
        )


LLAMA_8B_WHISPER_LARGE = Dims(
    mels=128, audio_width=1280, audio_layers=32, audio_heads=20, audio_mlp=5120, audio_positions=1500,
    width=4096, layers=32, heads=32, kv_heads=8, mlp=14336, vocab=128256,
)  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """The predicted memory of a step: bytes of each part in each phase, and the limit of the card."""

    stage: int
    batch: int
    seconds: float
    implementation: str
    gpu_gib: float
    phases: dict[str, dict[str, int]] = field(repr=False)
    device: str = "cuda"

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes at the peak of each phase."""
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def peak_phase(self) -> str:
        peaks = self.peaks
        return max(peaks, key=peaks.__getitem__)

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of each part at the highest peak."""
        return self.phases[self.peak_phase]

    @property
    def peak(self) -> int:
        return self.peaks[self.peak_phase]

    @property
    def limit(self) -> int:
        return int((self.gpu_gib - (RESERVED_GIB if self.device == "cuda" else 0)) * GIB)

    @property
    def fits(self) -> bool:
        """Whether the peak, plus `TOLERANCE` of it, is within the limit."""
        return self.peak * (1 + TOLERANCE) <= self.limit


Table = Prediction  # its name in version 0.1


def predict(
    stage: int,
    batch: int,
    seconds: float,
    *,
    gpu_gib: float = 24.0,
    implementation: str = "fused",
    kept_per_second: float = 3.0,
    text_tokens: int = 150,
    answer_tokens: int | None = None,
    checkpointing: bool = True,
    device: str = "cuda",
    dtype: str = "bfloat16",
    dims: Dims = LLAMA_8B_WHISPER_LARGE,
) -> Prediction:
    """Memory of one forward and backward pass with AdamW, products in `dtype` under autocast, and the LLM in NF4.

    Args:
        stage: 1 to 3; stage 3 trains only LoRA.
        batch: clips per forward pass.
        seconds: length of each clip, from one mel frame (0.01 s) to the encoder's limit (30 s).
        gpu_gib: the card's memory in GiB; torch cannot use `RESERVED_GIB` of it. On a CPU the machine's memory.
        implementation: "fused" or "eager".
        kept_per_second: frames that the shrinking adapter keeps, at most 25 (nothing is shrunk).
        text_tokens: tokens of a sample's prompt, answer and template.
        answer_tokens: tokens among these that are learned; CTC's transcript has as many. None takes `ANSWER_TOKENS`,
            or `text_tokens` if that is less.
        checkpointing: the LLM keeps only the inputs of its layers and runs each layer again in backward.
        device: "cuda" or "cpu".
        dtype: "bfloat16" or "float32", of the products and of the frozen weights that are not quantised.
        dims: sizes of the backbones.

    Raises:
        ValueError: an argument has a value that cannot be. The message begins "name = value, but …".
    """
    counts = {"stage": stage, "batch": batch, "text_tokens": text_tokens, "answer_tokens": answer_tokens}
    for name, count in counts.items():
        if not isinstance(count, Integral) and not (name == "answer_tokens" and count is None):
            raise ValueError(f"{name} = {count!r}, but it must be an integer")
    if stage not in (1, 2, 3):
        raise ValueError(f"stage = {stage}, but it must be 1, 2 or 3")
    if implementation not in ("fused", "eager"):
        raise ValueError(f"implementation = {implementation!r}, but it must be 'fused' or 'eager'")
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device = {device!r}, but it must be 'cuda' or 'cpu'")
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"dtype = {dtype!r}, but it must be 'bfloat16' or 'float32'")
    if batch < 1:
        raise ValueError(f"batch = {batch}, but it must be at least 1")
    longest, most_kept = dims.audio_positions / ENCODER_RATE, ENCODER_RATE / STACK
    frame = 1 / MEL_RATE
    # These comparisons are also false for NaN.
    if not frame <= seconds <= longest:
        raise ValueError(f"seconds = {seconds:g}, but a clip has {frame:g} (one mel frame) to {longest:g} seconds")
    if not RESERVED_GIB < gpu_gib <= MOST_GIB:
        raise ValueError(
            f"gpu_gib = {gpu_gib:g}, but it must be above the {RESERVED_GIB:g} GiB that torch cannot use "
            f"and at most {MOST_GIB:g}"
        )
    if not 0 < kept_per_second <= most_kept:
        raise ValueError(f"kept_per_second = {kept_per_second:g}, but it must be above 0 and at most {most_kept:g}")
    if text_tokens < 1:
        raise ValueError(f"text_tokens = {text_tokens}, but it must be at least 1")
    if answer_tokens is None:
        answer_tokens = min(ANSWER_TOKENS, text_tokens)
    if not 1 <= answer_tokens <= text_tokens:
        raise ValueError(f"answer_tokens = {answer_tokens}, but it must be 1 to text_tokens = {text_tokens}")
    step = _Step(
        stage, batch, seconds, implementation == "fused", kept_per_second, text_tokens, answer_tokens, dims,
        device=device, item=BF16 if dtype == "bfloat16" else FP32,
    )  # fmt: skip
    return Prediction(stage, batch, seconds, implementation, gpu_gib, step.phases(checkpointing), device)


def largest_batch(stage: int, seconds: float, *, gpu_gib: float = 24.0, **kwargs) -> int:
    """The largest number of clips that fit in a forward pass with `TOLERANCE` to spare; 0 if one does not fit.

    It is at most `MOST_CLIPS`. The arguments and errors are those of `predict`.
    """

    def fits(batch: int) -> bool:
        return predict(stage, batch, seconds, gpu_gib=gpu_gib, **kwargs).fits

    least, most = 0, 1
    while fits(most):
        if most >= MOST_CLIPS:
            return MOST_CLIPS
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least


def table(prediction: Prediction) -> rich.table.Table:
    """A table for the terminal: the parts at the highest peak and the peak of each phase, in GiB."""
    p = prediction
    where = "" if p.device == "cuda" else ", on a CPU"
    what = f"Stage {p.stage}, {p.batch} clips of {p.seconds:g} s, {p.implementation}{where}"
    out = rich.table.Table(
        title=f"{what}: predicted, not measured", title_justify="left", box=rich.box.SIMPLE
    )  # fmt: skip
    out.add_column(f"at the peak: {p.peak_phase}")
    out.add_column("GiB", justify="right")
    for part, size in p.parts.items():
        out.add_row(part, f"{size / GIB:.2f}")
    out.add_section()
    room = f"{p.limit / GIB:.1f} of {p.gpu_gib:g}"
    if p.fits:
        verdict = f"fits into {room}, {TOLERANCE:.0%} kept free"
    elif p.peak <= p.limit:
        verdict = f"within {room}, but not {TOLERANCE:.0%} free"
    else:
        verdict = f"does not fit into {room}"
    out.add_row(f"together ({verdict})", f"{p.peak / GIB:.2f}")
    out.add_section()
    for phase, size in p.peaks.items():
        out.add_row(f"peak of: {phase}", f"{size / GIB:.2f}")
    return out


class _Step:
    """The sizes of one step. Methods return bytes, apart from `trained`, which returns a number of parameters."""

    def __init__(
        self, stage, batch, seconds, fused, kept_per_second, text_tokens, answer_tokens, dims, *,
        device="cuda", item=BF16,
    ):  # fmt: skip
        self.stage, self.batch, self.fused, self.dims = stage, batch, fused, dims
        self.device, self.item, self.dtype = device, item, "bf16" if item == BF16 else "fp32"
        self.mel_frames = round(MEL_RATE * seconds)
        frames = math.ceil(self.mel_frames / 2)
        longest = math.ceil(frames / STACK)
        self.frames, self.rows = batch * frames, batch * longest
        self.kept = batch * min(max(math.ceil(kept_per_second * seconds), 1), longest)
        self.tokens = batch * text_tokens + self.kept
        self.answers = batch * answer_tokens
        self.columns = answer_tokens + 1

    # ---------------------------------------------------------------- all phases

    def trained(self) -> int:
        d = self.dims
        return {
            1: d.alignment_parameters,
            2: d.alignment_parameters + d.shrinking_parameters + d.lora_parameters,
            3: d.lora_parameters,
        }[self.stage]

    def weights(self) -> dict[str, int]:
        """All weights, and on a CPU what Python itself holds."""
        d, trained = self.dims, self.trained()
        idle = {1: d.shrinking_parameters, 2: 0, 3: d.alignment_parameters + d.shrinking_parameters}[self.stage]
        vocabulary = d.vocab * d.width
        parts = {f"Whisper encoder, {self.dtype}": self.item * d.encoder_parameters}
        if self.stage == 1:
            parts[f"output embedding (CTC's head), {self.dtype}"] = self.item * vocabulary
        else:
            norms = (2 * d.layers + 1) * d.width
            parts["LLM layers, NF4"] = int(NF4_BYTES * d.linear_parameters)
            parts[f"LLM embeddings and norms, {self.dtype}"] = self.item * (2 * vocabulary + norms)
        if idle:
            parts["adapters that are not trained, fp32"] = FP32 * idle
        parts["trained weights, fp32"] = FP32 * trained
        if self.device == "cpu":
            parts["Python and the tokenizer"] = PROCESS_BYTES + TOKEN_BYTES * d.vocab
        return parts

    def standing(self) -> dict[str, int]:
        """Weights, gradients, optimiser states and the batch, which exist in all phases of a step."""
        d, trained, parts = self.dims, self.trained(), self.weights()
        parts["gradients, fp32"] = FP32 * trained
        parts["AdamW's two states, fp32"] = 2 * FP32 * trained
        # Log-mel features. While the encoder and CTC run, SpecAugment's copy of them is there too.
        parts["batch"] = FP32 * self.batch * d.mels * self.mel_frames
        parts |= {"cuBLAS workspace": CUBLAS_WORKSPACE} if self.device == "cuda" else {"libraries": MAPPED_BYTES}
        return parts

    def loading(self) -> dict[str, int]:
        """All weights, and what it takes to quantise the last large one of the LLM."""
        if self.stage == 1:
            parts = self.weights()
            if self.device == "cpu" and self.item == BF16:  # as it is stored: its file is mapped
                del parts[f"output embedding (CTC's head), {self.dtype}"]
            return parts
        copies = QUANTISING_BYTES if self.device == "cpu" else 0  # a GPU's kernel makes none
        weight = self.dims.width * self.dims.mlp
        return self.weights() | {"LLM: a weight that is quantised": weight * (self.item + copies)}

    # ---------------------------------------------------------------- encoder

    def encoder(self) -> int:
        """One layer during its MLP: two residuals in bf16, a LayerNorm in fp32, the MLP before and after GELU."""
        d = self.dims
        return self.frames * (2 * self.item * d.audio_width + FP32 * d.audio_width + 2 * self.item * d.audio_mlp)

    def encoded(self) -> int:
        """Output of the encoder's last LayerNorm, in fp32 under autocast; it is held until CTC is done."""
        return FP32 * self.frames * self.dims.audio_width

    # ---------------------------------------------------------------- alignment adapter

    def alignment_saved(self) -> int:
        """The alignment adapter's tensors for backward; none in stage III, which trains nothing below the LLM."""
        if self.stage == 3:
            return 0
        d = self.dims.width
        row = STACK * self.dims.audio_width * self.item  # bytes of a row; input of the projector
        row += FP32 * d + self.item * d  # norm1: its input in fp32, its output for the projections
        row += 4 * self.item * d + FP32 * self.dims.heads  # query, key, value, attended rows; log-sum-exp
        row += d  # mask of dropout, one byte per element
        row += self.item * d if self.fused else FP32 * d  # norm2: the sum; eager keeps an fp32 copy
        row += self.item * d  # output of norm2, which the MLP reads
        row += 2 * (self.item * 2 * d) + 2 * d  # MLP: output of ReLU, of dropout, and its mask
        row += d  # mask of the MLP's output
        row += FP32 * d  # out_norm: its input in fp32
        return row * self.rows

    def hidden(self) -> int:
        """The adapter's output, in fp32 as out_norm leaves it."""
        return FP32 * self.rows * self.dims.width

    def casts(self, *parts: str) -> int:
        """Copies of trained weights in bf16, which autocast keeps for backward or until the forward pass ends."""
        d = self.dims
        sizes = {
            "projector": d.projector_parameters,
            "alignment": d.alignment_parameters - d.projector_parameters,
            "shrinking": d.shrinking_parameters,
            "lora": d.lora_parameters,
        }
        return self.item * sum(sizes[part] for part in parts) if self.item == BF16 else 0

    # ---------------------------------------------------------------- CTC

    def chunk(self, rows: int) -> int:
        """The fused operations' buffer for a chunk of logits, and the product of P with the head in fp32."""
        d = self.dims
        return self.chunk_rows(rows) * (self.item * -(-d.vocab // 64) * 64 + 2 * FP32 * d.width)

    def chunk_rows(self, rows: int) -> int:
        most = max(128, CHUNK_BYTES // (self.item * self.dims.vocab) // 128 * 128)
        return math.ceil(rows / math.ceil(rows / most)) if rows else 0

    def active_columns(self, rows: int) -> int:
        """What the choice of columns in a chunk takes: P of the active ones, and each row's mass by block and bin."""
        vocab = self.dims.vocab
        masses = FP32 * LANES.value * -(-vocab // BLOCK_COLUMNS)
        return self.chunk_rows(rows) * (self.item * vocab // MOST_ACTIVE_TRITON + masses)

    def blank_chunk(self) -> int:
        """Logits of a chunk in bf16 and fp32, and their exponentials, as `initialise_blank` sums them."""
        rows = min(self.rows, max(1, BLANK_CHUNK_BYTES // (FP32 * self.dims.vocab)))
        return rows * self.dims.vocab * (self.item + 2 * FP32)

    def ctc(self) -> dict[str, int]:
        """The peak of CTC's forward pass. The fused one includes the gradient, which it computes at the same time."""
        d, rows = self.dims, self.rows
        if self.fused:
            work = self.item * rows * d.width + self.chunk(rows)  # packed rows in bf16, a chunk of logits
            work += 2 * FP32 * rows * self.columns  # logits and log-probabilities of the labels
            gradient = 0 if self.stage == 3 else FP32 * rows * d.width
            work += self.active_columns(rows) if gradient else 0
            return {"CTC: a chunk of logits": work, "CTC: gradient of its input, fp32": gradient}
        # Logits and log-softmax in fp32, with a column for the blank.
        return {"CTC: logits and log-softmax, fp32": 2 * FP32 * rows * (d.vocab + 1)}

    def ctc_saved(self) -> int:
        """CTC's tensors for backward."""
        if self.stage == 3:
            return 0
        if self.fused:  # the gradient, which forward has computed
            return FP32 * self.rows * self.dims.width
        lattice = FP32 * self.rows * (2 * (self.columns - 1) + 1)
        return FP32 * self.rows * (self.dims.vocab + 1) + lattice

    # ---------------------------------------------------------------- shrinking adapter

    def shrinking_saved(self) -> int:
        """The shrinking adapter's tensors for backward."""
        if self.stage != 2:
            return 0
        d = self.dims.width
        kept = 2 * self.item * d + FP32 * d  # queries, attended rows, input of the norm
        row = 2 * self.item * d  # keys, values
        if not self.fused:
            kept += 2 * self.item * d  # inputs of the query and of the output product
            row += 2 * self.item * d  # copies of the input by autocast, one for keys and one for values
        return self.kept * kept + self.rows * row

    # ---------------------------------------------------------------- language model

    def layer_saved(self) -> int:
        """Tensors of one LLM layer for backward."""
        d = self.dims
        token = 2 * FP32 * d.width  # two RMSNorms, each with a copy of its input in fp32
        token += self.item * d.width  # output of the first RMSNorm, which LoRA reads
        token += 2 * self.item * (d.width + d.kv_width) + FP32 * d.heads  # attention: q, out, k, v, log-sum-exp
        token += 3 * self.item * d.mlp  # gate before and after SiLU, up
        token += 4 * self.item * d.lora_rank  # rows between LoRA's two matrices
        return token * self.tokens

    def layer_forward(self) -> int:
        """One layer in forward, at the product gate · up of its MLP: product, both factors, residual and its norm."""
        d = self.dims
        return self.tokens * (3 * self.item * d.mlp + 2 * self.item * d.width)

    def layer_backward(self) -> int:
        """One layer in backward, beside its saved tensors: gradients of the MLP's product, both factors, residual."""
        d = self.dims
        return self.tokens * (3 * self.item * d.mlp + self.item * d.width)

    def dequantised_weight(self) -> dict[str, int]:
        """An MLP weight in bf16, the largest: bitsandbytes dequantises each weight for its product and then frees it.

        The result of the product does not exist at the same time, so the higher of the two moments counts.
        """
        return {f"LLM: a dequantised weight, {self.dtype}": self.item * self.dims.width * self.dims.mlp}

    def last_layer(self, checkpointing: bool) -> dict[str, int]:
        """The last layer in forward: at gate · up, or one factor earlier, when the weight of `up` is dequantised."""
        name, weight = "LLM: one layer", self.dequantised_weight()
        if not checkpointing:
            return weight  # everything else is kept for backward and counted there
        factor = self.item * self.tokens * self.dims.mlp
        return _larger({name: self.layer_forward()}, {name: self.layer_forward() - factor, **weight})

    def differentiated_layer(self, checkpointing: bool) -> dict[str, int]:
        """The same layer in backward: at both factors, or two gradients earlier, when that of `down` is dequantised."""
        name, weight = "LLM: one layer, and its gradients", self.dequantised_weight()
        size = self.layer_backward() + (self.layer_saved() if checkpointing else 0)
        factor = self.item * self.tokens * self.dims.mlp
        return _larger({name: size}, {name: size - 2 * factor, **weight})

    def kept_layers(self, checkpointing: bool) -> dict[str, int]:
        """Tensors that the LLM's layers keep after forward."""
        d = self.dims
        if checkpointing:
            return {f"LLM: inputs of its layers, {self.dtype}": d.layers * self.item * d.width * self.tokens}
        return {"LLM: activations of all layers": d.layers * self.layer_saved()}

    def loss(self) -> int:
        """The last norm in fp32 and bf16, and the loss over the answer tokens."""
        d = self.dims
        norm = self.tokens * (FP32 + 2 * self.item) * d.width
        if self.fused:  # rows and their gradient, a chunk of logits
            return norm + 2 * self.item * self.answers * d.width + self.chunk(self.answers)
        return norm + 3 * FP32 * self.answers * d.vocab  # log-softmax, its gradient and that of the logits

    # ---------------------------------------------------------------- phases

    def phases(self, checkpointing: bool) -> dict[str, dict[str, int]]:
        standing = self.standing()
        features = standing["batch"]
        phases = {"loading": self.loading()}
        if self.stage == 1:
            phases["blank"] = standing | {
                "batch": features,
                "encoder: output, fp32": self.encoded(),
                "alignment adapter: output, fp32": 2 * self.hidden(),  # padded, and the rows inside the lengths
                "blank: a chunk of logits": self.blank_chunk(),
                "weights cast by autocast, bf16": self.casts("projector", "alignment"),
            }
        phases |= {"encoder": standing | {"batch": 2 * features, "encoder: one layer": self.encoder()}}

        below = {"alignment adapter: kept for backward": self.alignment_saved()}
        hidden = {"alignment adapter: output, fp32": self.hidden()}
        casts = () if self.stage == 3 else ("projector", "alignment")
        phases["ctc"] = standing | below | hidden | {
            "batch": 2 * features,
            "encoder: output, fp32": self.encoded(),
            **self.ctc(),
            "weights cast by autocast, bf16": self.casts(*casts),
        }  # fmt: skip

        below |= {"CTC: kept for backward": self.ctc_saved()}
        if self.stage > 1:
            below |= {"shrinking adapter: kept for backward": self.shrinking_saved()}
            casts = (*casts, "shrinking", "lora") if self.stage == 2 else ("lora",)
            phases["language model"] = standing | below | hidden | {
                **self.kept_layers(checkpointing),
                **_larger({"LLM: last norm and loss": self.loss()}, self.last_layer(checkpointing)),
                "weights cast by autocast, bf16": self.casts(*casts),
            }  # fmt: skip
            # In stage II the shrinking adapter reads `hidden` again.
            kept = hidden if self.stage == 2 else {}
            casts = ("alignment", "shrinking") if self.stage == 2 else ()
            phases["backward: LLM"] = standing | below | kept | {
                **self.kept_layers(checkpointing),
                **self.differentiated_layer(checkpointing),
                "weights cast by autocast, bf16": self.casts(*casts),
            }  # fmt: skip
        if self.stage < 3:
            phases["backward: adapters"] = standing | self.adapters_backward(below)
        phases["optimiser"] = standing
        if self.device == "cuda":  # AdamW computes the root of all second moments at once
            phases["optimiser"] = standing | {"AdamW: roots of the second moments, fp32": FP32 * self.trained()}
        return phases

    def adapters_backward(self, below: dict[str, int]) -> dict[str, int]:
        """The moment at which CTC's gradient is added to that of the adapter's output."""
        d = self.dims
        # The scaled gradient of CTC; eager has gradients of the log-softmax and of the logits.
        gradients = FP32 * self.rows * (d.width if self.fused else 2 * (d.vocab + 1))
        parts = {**below, "gradients between modules": gradients}
        parts["weights cast by autocast, bf16"] = self.casts("alignment")
        return parts


def _larger(*moments: dict[str, int]) -> dict[str, int]:
    """The parts of the moment that takes most memory."""
    return max(moments, key=lambda parts: sum(parts.values()))

"""soundwave.memory against the real modules: their parameters, and what autograd keeps of them on a GPU.

The modules are traced at Llama-3.1-8B's sizes on the meta device, whose tensors have shapes, dtypes and lifetimes but
no memory, with what CUDA does otherwise: its autocast, dropout and attention. Torch's own operations are counted so;
what happens inside ours, a GPU has to measure: the last test compares with bench/results, once there is something.
"""

import contextlib
import json
import weakref
from pathlib import Path

import bitsandbytes
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.bnb import Linear4bit
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, WhisperConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.whisper.modeling_whisper import WhisperEncoder, WhisperEncoderLayer

from soundwave import eager, fused
from soundwave.configuration import SoundwaveConfig
from soundwave.memory import GIB, LLAMA_8B_WHISPER_LARGE, NF4_BYTES, _Step, largest_batch, predict, table
from soundwave.modeling import SoundwaveForConditionalGeneration, freeze_all_but
from soundwave.training.stages import TRAINED

DIMS = LLAMA_8B_WHISPER_LARGE
RESULTS = sorted((Path(__file__).resolve().parents[1] / "bench" / "results").glob("*/train_24gb*.json"))
CLIPS, ROWS, TOKENS = 2, 750, 150 + 90  # of the traces: clips of 30 s


def soundwave_config(**changes) -> SoundwaveConfig:
    sizes = {"audio_hidden_size": DIMS.audio_width, "hidden_size": DIMS.width, "num_attention_heads": DIMS.heads}
    return SoundwaveConfig(**sizes, vocab_size=DIMS.vocab, lora_rank=DIMS.lora_rank, **changes)


def llama_config(**changes) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=DIMS.width, intermediate_size=DIMS.mlp, num_hidden_layers=DIMS.layers, vocab_size=DIMS.vocab,
        num_attention_heads=DIMS.heads, num_key_value_heads=DIMS.kv_heads, **changes,
    )  # fmt: skip


def whisper_config() -> WhisperConfig:
    return WhisperConfig(
        num_mel_bins=DIMS.mels, d_model=DIMS.audio_width, encoder_layers=DIMS.audio_layers,
        encoder_attention_heads=DIMS.audio_heads, encoder_ffn_dim=DIMS.audio_mlp,
        max_source_positions=DIMS.audio_positions,
    )  # fmt: skip


# ---------------------------------------------------------------- weights


@pytest.fixture(scope="module")
def whole_model() -> SoundwaveForConditionalGeneration:
    """The model at its real size on the meta device."""
    with torch.device("meta"):
        model = SoundwaveForConditionalGeneration(
            soundwave_config(), WhisperEncoder(whisper_config()), LlamaForCausalLM(llama_config())
        )
        model.add_lora()
    return model


def count(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


def test_parameter_counts_are_the_papers():
    counts = (DIMS.alignment_parameters, DIMS.shrinking_parameters, DIMS.lora_parameters)
    assert [round(n / 1e6, 1) for n in counts] == [144.8, 67.1, 54.5]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_a_stage_trains_is_counted_to_the_last_parameter(whole_model, stage):
    freeze_all_but(whole_model, TRAINED[stage])
    trained = count(p for p in whole_model.parameters() if p.requires_grad)
    assert _Step(stage, 1, 30.0, True, 3.0, 150, 80, DIMS).trained() == trained


def test_frozen_parameters_are_counted_to_the_last(whole_model):
    language_model = {name: p for name, p in whole_model.language_model.named_parameters() if "lora_" not in name}
    products = [p for name, p in language_model.items() if "layers" in name and p.dim() == 2]
    assert DIMS.encoder_parameters == count(whole_model.audio_tower.parameters())
    assert DIMS.linear_parameters == count(products)
    norms = (2 * DIMS.layers + 1) * DIMS.width
    assert count(language_model.values()) - count(products) == 2 * DIMS.vocab * DIMS.width + norms


def test_nf4_takes_what_bitsandbytes_stores():
    layer = bitsandbytes.nn.Linear4bit(1024, 1024, bias=False, compress_statistics=True, quant_type="nf4").to("cpu")
    state = layer.weight.quant_state
    stored = layer.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert stored == NF4_BYTES * 1024 * 1024


# ---------------------------------------------------------------- activations, on the meta device

META = torch.device("meta")


class AsOnCuda(TorchFunctionMode):
    """Meta tensors behave as CUDA's do under `torch.autocast("cuda", bfloat16)`: what differs, by function."""

    def __init__(self):
        super().__init__()
        self.casts = {}  # of weights, which autocast makes once

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function == torch.Tensor.is_cuda.__get__:  # a new object at each look
            return True
        if function is F.linear:
            x, weight, bias = (*args, *kwargs.values(), None)[:3]
            return function(x.bfloat16(), self.cast(weight), None if bias is None else self.cast(bias))
        if function is F.layer_norm:
            kwargs = kwargs | {name: kwargs[name].float() for name in ("weight", "bias")}
            return function(args[0].float(), *args[1:], **kwargs)
        if function is F.dropout:
            used = kwargs["p"] and kwargs["training"]
            return torch.native_dropout(args[0], kwargs["p"], True)[0] if used else args[0]
        if function is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            causal, scale = kwargs.get("is_causal", False), kwargs.get("scale")
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)[0]
        return function(*args, **kwargs)

    def cast(self, weight):
        if weight.dtype == torch.bfloat16 or not isinstance(weight, torch.nn.Parameter):
            return weight.bfloat16()
        return self.casts.setdefault(id(weight), weight.bfloat16())


@contextlib.contextmanager
def cuda_autocast():
    torch.set_autocast_enabled("cuda", True)  # where modules ask for it
    try:
        with AsOnCuda():
            yield
    finally:
        torch.set_autocast_enabled("cuda", False)


class Allocated(TorchDispatchMode):
    """Bytes of the tensors made under it that are alive, `now` and at their `peak`; not those of `module`."""

    def __init__(self, module):
        super().__init__()
        self.now = self.peak = 0
        there = [tensor for p in module.parameters() for tensor in (p, p.grad) if tensor is not None]
        self.alive = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in there)}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.alive:
            return

        def freed(_):
            self.now -= size
            del self.alive[key]

        self.alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def kept_for_backward(function, parameters) -> int:
    """The bytes that autograd keeps of `function()` beside parameters and their copies by autocast."""
    kept, shapes = {}, {tuple(p.shape) for p in parameters} | {tuple(p.shape[::-1]) for p in parameters}

    def pack(tensor):
        if tuple(tensor.shape) not in shapes:
            kept[id(tensor.untyped_storage())] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), cuda_autocast():
        out = function()
    del out
    return sum(storage.nbytes() for storage in kept.values())


def step(stage=2, implementation="fused", batch=CLIPS, kept_per_second=3.0) -> _Step:
    return _Step(stage, batch, 30.0, implementation == "fused", kept_per_second, 150, 80, DIMS)


def alignment_adapter(implementation):
    """The adapter, and a call of it on encoded clips."""
    module = {"fused": fused, "eager": eager}[implementation]
    with META:
        adapter = module.AlignmentAdapter(soundwave_config()).train()
        frames = torch.empty(CLIPS, 2 * ROWS, DIMS.audio_width)
        lengths = torch.full((CLIPS,), 2 * ROWS)
        bounds = torch.empty(CLIPS + 1, dtype=torch.int32)
    if implementation == "eager":
        return adapter, lambda: adapter(frames, lengths)[0]
    adapter.attention = "sdpa"
    packed = frames.view(CLIPS * ROWS, -1)  # which the module does after it has looked at the lengths
    return adapter, lambda: adapter._layer(packed, bounds, ROWS)


def llama_layer():
    """One layer in bfloat16 with LoRA in float32, and a call of it on new hidden states.

    LoRA is peft's for 4-bit products; these are plain here, of which autograd keeps as little: the weight.
    """
    config, lora = llama_config(attn_implementation="sdpa"), LoraConfig(r=DIMS.lora_rank)
    with META:
        layer = LlamaDecoderLayer(config, 0).to(torch.bfloat16).requires_grad_(False).train()
        for name, product in list(layer.self_attn.named_children()):
            adapted = Linear4bit(product, "default", config=lora, r=lora.r, lora_alpha=lora.lora_alpha)
            for matrices in (adapted.lora_A, adapted.lora_B):
                matrices.float()
            setattr(layer.self_attn, name, adapted)
        hidden = torch.empty(CLIPS, TOKENS, DIMS.width, dtype=torch.bfloat16, requires_grad=True)
        positions = torch.arange(TOKENS)[None]
        embeddings = LlamaRotaryEmbedding(config)(hidden, positions)
    return layer, lambda: layer(hidden, position_embeddings=embeddings, position_ids=positions)


def peak_of_a_step(module, forward) -> int:
    """Bytes at the height of forward and backward, beside parameters, their gradients and the result."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    with Allocated(module) as allocated:
        with cuda_autocast():
            out = forward()
        out.backward(torch.empty_like(out))
    return allocated.peak - out.nbytes


@pytest.mark.parametrize("implementation", ["fused", "eager"])
def test_what_the_alignment_adapter_keeps(implementation):
    adapter, forward = alignment_adapter(implementation)
    kept = kept_for_backward(forward, list(adapter.parameters()))
    assert kept == pytest.approx(step(1, implementation).alignment_saved(), rel=0.005)


def test_what_a_layer_of_the_language_model_keeps():
    layer, forward = llama_layer()
    kept = kept_for_backward(forward, list(layer.parameters()))
    assert kept == pytest.approx(step().layer_saved(), rel=0.01)


def test_what_a_layer_of_the_language_model_takes_in_backward():
    peak = peak_of_a_step(*llama_layer())
    predicted = step().layer_saved() + step().layer_backward()
    assert peak == pytest.approx(predicted, rel=0.05)  # what a whole prediction may be off


def test_what_a_layer_of_the_encoder_takes():
    with META:
        layer = WhisperEncoderLayer(whisper_config()).to(torch.bfloat16).train()
    layer.self_attn.config._attn_implementation = "sdpa"
    with Allocated(layer) as allocated, torch.no_grad(), cuda_autocast():
        frames = torch.empty(CLIPS, 2 * ROWS, DIMS.audio_width, dtype=torch.bfloat16, device=META)
        layer(frames, None)
    assert allocated.peak == pytest.approx(step().encoder(), rel=0.01)


# ---------------------------------------------------------------- the prediction


@pytest.mark.parametrize(
    ("stage", "batch", "kept_per_second"), [(1, 64, 3.0), (2, 16, 3.0), (2, 16, 25.0), (3, 16, 3.0)]
)
def test_the_papers_batches_fit_a_24_gb_card(stage, batch, kept_per_second):
    assert predict(stage, batch, 30.0, kept_per_second=kept_per_second).fits


def test_the_largest_batch_fits_and_one_more_does_not():
    for stage in (1, 2, 3):
        most = largest_batch(stage, 30.0)
        assert predict(stage, most, 30.0).fits and not predict(stage, most + 1, 30.0).fits
    assert largest_batch(2, 30.0, gpu_gib=12.0) == 0  # the weights alone


@pytest.mark.parametrize("implementation", ["fused", "eager"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_more_audio_never_takes_less(stage, implementation):
    peaks = [predict(stage, batch, 10.0, implementation=implementation).peak for batch in (1, 2, 4, 8)]
    peaks += [predict(stage, 8, seconds, implementation=implementation).peak for seconds in (15.0, 29.99, 30.0)]
    assert peaks == sorted(peaks)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_eager_takes_more(stage):
    assert predict(stage, 8, 30.0, implementation="eager").peak > predict(stage, 8, 30.0).peak


def test_without_checkpointing_all_layers_are_kept():
    with_, without = (predict(2, 8, 30.0, checkpointing=on).peaks["backward: LLM"] for on in (True, False))
    inputs = DIMS.layers * 2 * DIMS.width * step(batch=8).tokens
    assert without - with_ == (DIMS.layers - 1) * step(batch=8).layer_saved() - inputs


def test_parts_add_up_to_the_peak_and_are_printed():
    from rich.console import Console

    prediction = predict(2, 16, 30.0)
    assert sum(prediction.parts.values()) == prediction.peak == max(prediction.peaks.values())
    console = Console(record=True, width=120)
    console.print(table(prediction))
    text = console.export_text()
    assert all(part in text for part in prediction.parts)
    assert f"{prediction.peak / GIB:.2f}" in text and "fits into 22.0 of 24" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 1, 30.0), "stage = 4"),
        ((1, 0, 30.0), "batch, seconds = 0, 30"),
        ((1, 1, 31.0), "0 to 30"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        predict(*arguments)


@pytest.mark.parametrize("path", RESULTS or [None], ids=lambda path: path.name if path else "none-yet")
def test_the_prediction_is_within_5_percent_of_what_a_gpu_measured(path):
    if path is None:
        pytest.skip("no GPU has measured train_24gb yet: bench/results/*/train_24gb*.json is not there")
    for run in json.loads(path.read_text())["runs"]:
        settings = {name: run[name] for name in ("implementation", "kept_per_second", "text_tokens", "answer_tokens")}
        for tried in run["tried"]:
            if tried["fits"]:
                predicted = predict(run["stage"], tried["batch"], run["seconds"], **settings).peak
                assert predicted == pytest.approx(tried["peak_bytes"], rel=0.05), (run["stage"], tried, settings)

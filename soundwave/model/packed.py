"""The backbones on packed sequences: Whisper's encoder, and language models, by transformers' registry of attention.

All sequences follow one another in one row of a batch, [1, N, D]. In place of a mask the layers get the bounds of the
sequences (`bounds_of`). Transformers hands a mask of four dimensions on to each layer as it is, so that no [N, N] mask
is built; `packed_attention`, which is registered with it, knows the bounds by their dtype, and takes `attend`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from soundwave.attention import attend
from soundwave.kernels.dispatch import to_device, to_device_together

ATTENTION = "soundwave"  # its name in transformers' registry
USUAL = "sdpa"  # what it does where sequences are not packed
LAYERS = {"full_attention", "sliding_attention"}  # kinds of layers that look at nothing but keys of their sequence


def bounds_of(cu_seqlens: Tensor, longest: int) -> Tensor:
    """What a layer gets as its mask: int32 [1, longest, 1, B + 1], whose second size tells the host the longest."""
    return cu_seqlens.to(torch.int32).expand(1, longest, 1, -1)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention [1, H, N, E] -> [1, N, H, E] within each sequence, if `attention_mask` holds their bounds."""
    if attention_mask is None or attention_mask.dtype != torch.int32:
        usual = ALL_ATTENTION_FUNCTIONS[USUAL]
        return usual(module, query, key, value, attention_mask, scaling=scaling, **settings)
    bounds, longest, size = attention_mask[0, 0, 0], attention_mask.shape[1], value.shape[-1]
    value = F.pad(value, (0, query.shape[-1] - size))  # heads of values may be smaller than those of keys
    rows = [x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value)]
    causal, window = getattr(module, "is_causal", True), settings.get("sliding_window")
    out = attend(*rows, bounds, bounds, longest, longest, causal=causal, window=window, scale=scaling)
    return out[None, ..., :size], None


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def reason_against_packing(language_model: Any) -> str:
    """The reason why the sequences of a language model cannot be packed; empty if they can."""
    decoder, config = language_model.base_model, language_model.config.get_text_config()
    if not getattr(language_model, "_supports_attention_backend", False):
        return "its attention is not in transformers' registry"
    if config._attn_implementation not in ("eager", "sdpa", ATTENTION):
        return f"its attention is set to {config._attn_implementation!r}"
    if not hasattr(decoder, "rotary_emb") or getattr(config, "alibi", False):
        return "it has no rotary embeddings"
    others = sorted(set(getattr(config, "layer_types", None) or ()) - LAYERS)
    if others:
        return f"it has layers of the kind {others[0]!r}"
    if any(isinstance(module, nn.Conv1d) or hasattr(module, "A_log") for module in decoder.modules()):
        return "its layers carry a state from token to token"
    if getattr(config, "attention_chunk_size", None):
        return "its attention is chunked"
    if getattr(config, "attn_logit_softcapping", None):
        return "its attention caps the logits"
    if any(hasattr(module, "sinks") for module in decoder.modules()):
        return "its attention has sinks"
    if getattr(config, "attention_dropout", 0.0):
        return f"its attention has a dropout of {config.attention_dropout}"
    if not getattr(language_model, "_supports_sdpa", False):
        return "its attention cannot run by scaled_dot_product_attention"
    return ""


def decode_packed(language_model: Any, embeddings: Tensor, cu_seqlens: Tensor, longest: int, wanted: Tensor) -> Tensor:
    """The last states [n, D] of `wanted` rows of a language model over packed `embeddings` [N, D].

    Args:
        cu_seqlens: int [B + 1], the bounds of the sequences, on the CPU. Each begins at position 0.
        longest: rows of the longest of them.
        wanted: int64 [n], on the CPU. The last layer's MLP computes these rows alone.
    """
    wanted = to_device(wanted, embeddings.device)
    if not len(embeddings):
        return embeddings.index_select(0, wanted)
    if language_model.config._attn_implementation != ATTENTION:
        language_model.set_attn_implementation(ATTENTION)
    sizes = cu_seqlens.to(torch.int64).diff()
    positions = torch.arange(len(embeddings), device="cpu") - cu_seqlens[:-1].repeat_interleave(sizes)
    positions, bounds = to_device_together([positions, cu_seqlens], embeddings.device)
    # Under autocast products cast their input themselves; peft would cast it to float32 before, and autocast back.
    autocast = torch.is_autocast_enabled(embeddings.device.type)
    with _last_mlp_on(wanted, language_model), disable_input_dtype_casting(language_model, active=autocast):
        states = language_model.base_model(
            inputs_embeds=embeddings[None],
            attention_mask=bounds_of(bounds, longest),
            position_ids=positions.to(torch.int64)[None],
            use_cache=False,
        ).last_hidden_state[0]
    return states.index_select(0, wanted)


@contextmanager
def _last_mlp_on(wanted: Tensor, language_model: Any) -> Iterator[None]:
    """Within it, the last layer's MLP computes the rows `wanted` of [1, N, D]; to the others, which nobody reads, it
    adds 0.

    It computes all rows where layers run again in backward, outside of the context (gradient checkpointing), and in a
    model whose last layer has no `mlp`.
    """
    last = (getattr(language_model.base_model, "layers", None) or [None])[-1]
    mlp = getattr(last, "mlp", None)
    if mlp is None or any(getattr(module, "gradient_checkpointing", False) for module in (last, last.mlp)):
        yield
        return
    rows: list[torch.Size] = []

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows.append(inputs[0].shape)
        return inputs[0].index_select(1, wanted), *inputs[1:]

    def spread(_: nn.Module, __: tuple[Tensor, ...], out: Any) -> Any:
        first, *others = out if isinstance(out, tuple) else (out,)
        first = first.new_zeros(rows.pop()).index_copy(1, wanted, first)
        return (first, *others) if isinstance(out, tuple) else first

    hooks = mlp.register_forward_pre_hook(select), mlp.register_forward_hook(spread)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def encode_packed(tower: Any, input_features: Tensor, feature_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Whisper's encoder over packed frames.

    Args:
        input_features: [A, n_mels, T_mel]; what is past a length may have any values.
        feature_lengths: int [A], in mel frames, on the CPU.

    Returns:
        Frames at 50 Hz [N, E], those of each clip after the clip before, and their numbers int [A].
    """
    batch, mels, size = input_features.shape
    lengths, mel_lengths = (feature_lengths + 1) // 2, feature_lengths.to(torch.int64)
    # In the convolutions the clips lie in one row. Each begins at an even place, so that the second one, of stride 2,
    # meets its frames as it would alone, and at least one frame of zeros follows it, as if it were padded.
    spans = mel_lengths // 2 * 2 + 2
    starts = spans.cumsum(0) - spans
    source, place = _places(mel_lengths, torch.arange(batch, device="cpu") * size, starts)
    frames, position = _places(lengths, starts // 2, torch.zeros_like(starts))
    total, longest, rows = int(spans.sum()), int(lengths.max()) if batch else 0, len(frames)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
    source, place, frames, position, cu_seqlens = to_device_together(
        [source, place, frames, position, cu_seqlens], input_features.device
    )
    if not rows:
        return tower.conv1.weight.new_zeros(0, tower.config.d_model), lengths
    x = input_features.transpose(1, 2).reshape(batch * size, mels).index_select(0, source).to(tower.conv1.weight.dtype)
    x = x.new_zeros(total, mels).index_copy_(0, place, x).T[None]
    inside = x.new_zeros(total).index_fill_(0, place, 1.0)
    x = F.gelu(tower.conv1(x)) * inside
    x = F.gelu(tower.conv2(x))[0].T.index_select(0, frames)
    x = (x + tower.embed_positions.weight.index_select(0, position))[None]
    if tower.config._attn_implementation != ATTENTION:
        tower.set_attn_implementation(ATTENTION)
    bounds = bounds_of(cu_seqlens, longest)
    for layer in tower.layers:
        x = layer(x, bounds)
    return tower.layer_norm(x)[0], lengths


def _places(lengths: Tensor, *firsts: Tensor) -> list[Tensor]:
    """For each row of packed sequences its place, int64 [N], if the sequences begin at the places `firsts` [B]."""
    lengths = lengths.to(torch.int64)
    sequence = torch.arange(len(lengths), device="cpu").repeat_interleave(lengths)
    within = torch.arange(len(sequence), device="cpu") - (lengths.cumsum(0) - lengths)[sequence]
    return [within + first[sequence] for first in firsts]

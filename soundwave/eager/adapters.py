"""The two adapters in plain PyTorch. Dimension letters as in `operations`."""

import numbers
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from soundwave.eager.operations import Peaks, length_mask

ATTEND = ("frames", "self")
KEYS = ("all", "kept", "none")


def setting(config: Any, name: str) -> Any:
    """The attribute `name` of an adapter's configuration.

    Raises:
        AttributeError: it is not there.
        ValueError: it is a number that no adapter can have, or no number.
    """
    if not hasattr(config, name):
        raise AttributeError(f"config has no attribute {name}; the adapter's docstring says what it needs")
    value = getattr(config, name)
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if name in ("attend", "keys"):
        choices = ATTEND if name == "attend" else KEYS
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{name} = {value!r}, but it must be one of {', '.join(choices)}")
    elif name == "adapter_dropout":
        if not is_number or not 0 <= value <= 1:
            raise ValueError(f"adapter_dropout = {value!r}, but it must be a number from 0 to 1")
    elif name == "layer_norm_eps":
        if not is_number or not 0 <= value < float("inf"):
            raise ValueError(f"layer_norm_eps = {value!r}, but it must be a number of at least 0")
    elif not is_number or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} = {value!r}, but it must be an integer of at least 1")
    return value


def check_heads(hidden_size: int, num_heads: int) -> None:
    """ValueError unless the width can be divided among the heads."""
    if num_heads < 1 or hidden_size % num_heads:
        raise ValueError(f"hidden_size = {hidden_size}, but it must be a multiple of num_attention_heads = {num_heads}")


def attention_mask(mask: Tensor) -> Tensor | None:
    """`mask` bool [B, T] of valid keys as [B, 1, 1, T]; None if all are valid, because attention is faster without one.

    The host waits for a GPU to see that. A compiled graph would break, and a meta tensor has no values, so both keep
    the mask.
    """
    unseen = torch.compiler.is_compiling() or mask.is_meta
    return mask[:, None, None, :] if unseen or not mask.all() else None


class SelfAttention(nn.Module):
    """Self-attention with the parameters of `nn.MultiheadAttention`; `attend="self"` keeps each frame to itself."""

    def __init__(self, hidden_size: int, num_heads: int, attend: str):
        super().__init__()
        check_heads(hidden_size, num_heads)
        if attend not in ATTEND:
            raise ValueError(f"attend = {attend!r}, but it must be one of {', '.join(ATTEND)}")
        self.num_heads, self.attend = num_heads, attend
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * hidden_size))
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`x` [B, T, D], `mask` bool [B, T] of valid frames -> [B, T, D]."""
        batch, size, width = x.shape
        if self.attend == "self":  # softmax over one key is 1, so the result is the values
            return self.out_proj(F.linear(x, self.in_proj_weight[2 * width :], self.in_proj_bias[2 * width :]))
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        qkv = qkv.view(batch, size, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask(mask))
        return self.out_proj(attended.transpose(1, 2).reshape(batch, size, width))


class AdapterLayer(nn.Module):
    """Pre-norm Transformer layer: d_ff = 2·D, ReLU, dropout; parameter names as in `nn.TransformerEncoderLayer`."""

    def __init__(self, hidden_size: int, num_heads: int, attend: str, dropout: float, eps: float):
        super().__init__()
        self.self_attn = SelfAttention(hidden_size, num_heads, attend)
        self.linear1 = nn.Linear(hidden_size, 2 * hidden_size)
        self.linear2 = nn.Linear(2 * hidden_size, hidden_size)
        self.norm1 = nn.LayerNorm(hidden_size, eps=eps)
        self.norm2 = nn.LayerNorm(hidden_size, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`x` [B, T, D], `mask` bool [B, T] -> [B, T, D]."""
        x = x + self.dropout(self.self_attn(self.norm1(x), mask))
        return x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(self.norm2(x))))))


class AlignmentAdapter(nn.Module):
    """From encoder frames to the embedding space of the language model (arXiv 2502.12900, §2).

    `frame_stack` neighbouring frames are concatenated, projected, sent through one Transformer layer and normalised.

    Args:
        config: a `SoundwaveConfig`, or any object with these attributes:
            - `audio_hidden_size`, `hidden_size`: widths E of the encoder and D of the language model.
            - `num_attention_heads`: heads of the layer; they divide D.
            - `frame_stack`: neighbouring frames that are concatenated; 2 in Soundwave.
            - `attend`: "frames", or "self", where each frame attends to itself alone.
            - `adapter_dropout`: 0 to 1.
            - `layer_norm_eps`: of all its LayerNorms, such as 1e-5.

    Raises:
        AttributeError: an attribute is missing.
        ValueError: an attribute has a wrong value.
    """

    def __init__(self, config: Any):
        super().__init__()
        names = "frame_stack", "audio_hidden_size", "hidden_size", "num_attention_heads", "attend", "adapter_dropout"
        stack, encoder_width, width, heads, attend, dropout = (setting(config, name) for name in names)
        eps = setting(config, "layer_norm_eps")
        self.frame_stack = stack
        self.projector = nn.Linear(stack * encoder_width, width)
        self.layer = AdapterLayer(width, heads, attend, dropout, eps)
        self.out_norm = nn.LayerNorm(width, eps=eps)

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """`frames` [B, T_enc, E], `lengths` int [B] -> hidden [B, ceil(T_enc / stack), D] and its lengths.

        The last group is filled up with zero frames.
        """
        stack = self.frame_stack
        frames = frames.masked_fill(~length_mask(lengths, frames.shape[1])[..., None], 0.0)
        frames = F.pad(frames, (0, 0, 0, -frames.shape[1] % stack))
        lengths = (lengths + stack - 1) // stack
        hidden = self.projector(frames.reshape(frames.shape[0], -1, stack * frames.shape[2]))
        mask = length_mask(lengths, hidden.shape[1])
        return self.out_norm(self.layer(hidden, mask)), lengths


class ShrinkingAdapter(nn.Module):
    """Cross-attention from the kept frames to all frames around them (arXiv 2502.12900, §2).

    `LayerNorm(x' + Attn(x' W_q, x W_k, x W_v) W_o)` with x' the kept rows of x. `keys = "kept"` attends to the kept
    rows alone, and `keys = "none"` is LayerNorm(x').

    Args:
        config: a `SoundwaveConfig`, or any object with these attributes:
            - `hidden_size`: width D of the language model.
            - `num_attention_heads`: heads of the attention; they divide D.
            - `keys`: "all", "kept" or "none".
            - `layer_norm_eps`: of the LayerNorm, such as 1e-5.

    Raises:
        AttributeError: an attribute is missing.
        ValueError: an attribute has a wrong value.
    """

    def __init__(self, config: Any):
        super().__init__()
        width, eps = setting(config, "hidden_size"), setting(config, "layer_norm_eps")
        self.num_heads, self.keys = setting(config, "num_attention_heads"), setting(config, "keys")
        check_heads(width, self.num_heads)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, hidden: Tensor, lengths: Tensor, peaks: Peaks) -> Tensor:
        """`hidden` [B, T, D], `lengths` int [B], `peaks` of the same frames -> [K, D], packed."""
        batch, size, width = hidden.shape
        if self.keys == "none":
            return self.norm(hidden.reshape(-1, width)[peaks.index])
        weight_q, weight_k, weight_v = self.in_proj_weight.chunk(3)
        bias_q, bias_k, bias_v = self.in_proj_bias.chunk(3)
        counts = peaks.cu_seqlens.diff().to(hidden.device, torch.int64)
        kept_mask = length_mask(counts, peaks.max_seqlen)
        residual = hidden.reshape(-1, width)[peaks.index]
        queries = hidden.new_zeros(batch, peaks.max_seqlen, width)
        queries = queries.masked_scatter(kept_mask[..., None], residual.to(queries.dtype))
        context, mask = (hidden, length_mask(lengths, size)) if self.keys == "all" else (queries, kept_mask)

        def heads(x: Tensor) -> Tensor:
            return x.view(batch, x.shape[1], self.num_heads, width // self.num_heads).transpose(1, 2)

        attended = F.scaled_dot_product_attention(
            heads(F.linear(queries, weight_q, bias_q)),
            heads(F.linear(context, weight_k, bias_k)),
            heads(F.linear(context, weight_v, bias_v)),
            attn_mask=attention_mask(mask),
        )
        attended = attended.transpose(1, 2).reshape(queries.shape)[kept_mask]
        return self.norm(residual + self.out_proj(attended))

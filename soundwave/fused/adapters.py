"""The adapters on packed rows and the fused operations, with the parameters and calls of those in `soundwave.eager`.

Dimension letters: B utterances, T frames of the longest, N packed rows, D width of the language model, E width of the
encoder, H heads, K kept frames of all utterances together.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from soundwave import eager
from soundwave.attention import IMPLEMENTATIONS, attend
from soundwave.fused.arguments import NotScriptable, check_impl, expect
from soundwave.fused.functional import add_layer_norm, shrink_attention
from soundwave.kernels.checks import as_lengths, refuse_transforms, refuse_vmap
from soundwave.kernels.dispatch import ranged, to_device
from soundwave.kernels.shrink_projection import shrink_projection


def _lengths(lengths: Tensor | Sequence[int], batch: int, read: bool) -> Tensor:
    """`lengths` as an integer tensor [B]. `read`: the adapter reads their values, so they must have some."""
    lengths = as_lengths("lengths", lengths)
    if batch == 1 and lengths.dim() == 0:
        lengths = lengths[None]
    if lengths.shape != (batch,) or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"lengths is {lengths.dtype} of shape {list(lengths.shape)}, but it must be int [{batch}]")
    if read and lengths.is_meta:
        raise ValueError("lengths is on meta, but it must have values, because they give the number of rows")
    return lengths


def _as_autocasts_norm(update: Tensor) -> Tensor:
    """`update` in float32 under CUDA's autocast, where torch's LayerNorm gives float32, too."""
    return update.float() if update.is_cuda and torch.is_autocast_enabled("cuda") else update


class AlignmentAdapter(NotScriptable, eager.AlignmentAdapter):
    """`eager.AlignmentAdapter` on packed rows: frames past a length cost nothing.

    Attention goes through `soundwave.attention`. If each frame attends to itself alone (`config.attend = "self"`), no
    attention is computed, because softmax over one key is 1. Each residual sum is fused with the LayerNorm after it.

    Differences from eager: rows past a length are 0 in the result. Dropout draws numbers for valid rows only, so with
    padding they are other numbers than eager's.

    Args:
        config: a `SoundwaveConfig`, or any object with these attributes:
            - `audio_hidden_size`, `hidden_size`: widths E of the encoder and D of the language model.
            - `num_attention_heads`: heads of the layer; they divide D.
            - `frame_stack`: neighbouring frames that are concatenated; 2 in Soundwave.
            - `attend`: "frames", or "self", where each frame attends to itself alone.
            - `adapter_dropout`: 0 to 1.
            - `layer_norm_eps`: of all its LayerNorms, such as 1e-5.
        impl: implementation of residual + LayerNorm: "auto", "triton" or "torch".
        attention: "auto", "flash_attn", "varlen" or "sdpa".

    Raises:
        AttributeError: the configuration lacks an attribute.
        ValueError: an attribute or argument has a wrong value.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from soundwave import fused
        >>> config = SimpleNamespace(
        ...     audio_hidden_size=24, hidden_size=32, num_attention_heads=4, frame_stack=2, attend="frames",
        ...     adapter_dropout=0.1, layer_norm_eps=1e-5,
        ... )
        >>> hidden, lengths = fused.AlignmentAdapter(config)(torch.randn(2, 41, 24), [41, 18])
        >>> hidden.shape, lengths
        (torch.Size([2, 21, 32]), tensor([21,  9]))
    """

    def __init__(self, config: Any, impl: str = "auto", attention: str = "auto"):
        super().__init__(config)
        check_impl(impl)
        if attention not in IMPLEMENTATIONS:
            raise ValueError(f"attention = {attention!r}, but it must be one of {', '.join(IMPLEMENTATIONS)}")
        self.impl, self.attention = impl, attention

    def extra_repr(self) -> str:
        return f"impl={self.impl!r}, attention={self.attention!r}"

    @ranged("soundwave.AlignmentAdapter")
    def forward(self, frames: Tensor, lengths: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        """`frames` [B, T_enc, E], `lengths` int [B] -> hidden [B, ceil(T_enc / stack), D] and its lengths.

        Packed frames [N, E] give packed rows [sum of the new lengths, D]. The last group of an utterance is filled up
        with zero frames. Lengths on CUDA cost one wait for the device.

        Raises:
            ValueError: frames or lengths of another shape or kind of dtype; a length that is negative or beyond T_enc;
                lengths that do not add up to the packed frames.
        """
        refuse_transforms("AlignmentAdapter", frames, *self.parameters())
        refuse_vmap("AlignmentAdapter", lengths)
        width, stack = self.projector.in_features // self.frame_stack, self.frame_stack
        packed = isinstance(frames, Tensor) and frames.dim() == 2
        expect("frames", frames, ("N", width) if packed else ("B", "T_enc", width))
        batch = len(lengths) if packed else frames.shape[0]
        lengths = _lengths(lengths, batch, read=True)
        counts = (lengths + stack - 1) // stack
        some = F.pad(lengths, (0, 1))  # a batch of none has no minimum
        least, most, valid, rows = torch.stack([some.min(), some.max(), lengths.sum(), counts.sum()]).tolist()
        size = len(frames) if packed else frames.shape[1]
        if least < 0 or most > size:
            raise ValueError(f"lengths go from {least} to {most}, but each must be 0 to {size}, the frames given")
        if packed and valid != size:
            raise ValueError(f"lengths add up to {valid}, but there are {size} packed frames")
        count = to_device(counts, frames.device)
        cu_seqlens = F.pad(count.cumsum(0), (1, 0)).to(torch.int32)
        utterance = torch.repeat_interleave(torch.arange(batch, device=frames.device), count, output_size=rows)
        within = torch.arange(rows, device=frames.device) - cu_seqlens[utterance]
        flat = frames if packed else frames.flatten(0, 1)
        if rows * stack == valid == len(flat):  # no padding anywhere
            x = flat.reshape(rows, stack * width)
        else:
            valid_frames = to_device(lengths, frames.device)
            first = (
                valid_frames.cumsum(0) - valid_frames if packed else torch.arange(batch, device=frames.device) * size
            )
            x = self._gather(flat, first, valid_frames, utterance, within, rows * stack > valid)
        hidden = self._layer(x, cu_seqlens, -(-most // stack))
        if packed:
            return hidden, counts
        out_size = -(-size // stack)
        if rows < batch * out_size:
            place = utterance * out_size + within
            hidden = hidden.new_zeros(batch * out_size, hidden.shape[1]).index_copy(0, place, hidden)
        return hidden.view(batch, out_size, hidden.shape[1]), counts

    def _gather(
        self, frames: Tensor, first: Tensor, lengths: Tensor, utterance: Tensor, within: Tensor, ragged: bool
    ) -> Tensor:
        """The frames of each packed row next to each other [N, stack·E].

        `first` [B] is each utterance's first row of `frames`. `ragged`: some rows end in zero frames.
        """
        time = within[:, None] * self.frame_stack + torch.arange(self.frame_stack, device=frames.device)
        frame = (first[utterance, None] + time).clamp(max=len(frames) - 1)
        packed = frames.index_select(0, frame.flatten()).view(*frame.shape, frames.shape[1])
        if ragged:
            packed = packed.masked_fill((time >= lengths[utterance, None])[..., None], 0.0)
        return packed.flatten(1)

    def _layer(self, packed: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        """Projection, Transformer layer and last norm: packed rows [N, stack·E] -> [N, D]."""
        layer, attention = self.layer, self.layer.self_attn
        residual = self.projector(packed)
        width = residual.shape[1]
        normed = layer.norm1(residual)
        if attention.attend == "self":
            attended = F.linear(normed, attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :])
        else:
            qkv = F.linear(normed, attention.in_proj_weight, attention.in_proj_bias)
            query, key, value = qkv.view(-1, 3, attention.num_heads, width // attention.num_heads).unbind(1)
            bounds = (cu_seqlens, cu_seqlens, longest, longest)
            attended = attend(query, key, value, *bounds, impl=self.attention).flatten(1)
        normed, residual = add_layer_norm(
            layer.dropout(attention.out_proj(attended)), residual, layer.norm2.weight, layer.norm2.bias,
            layer.norm2.eps, return_sum=True, impl=self.impl,
        )  # fmt: skip
        update = layer.dropout(layer.linear2(layer.dropout(F.relu(layer.linear1(normed)))))
        update, norm = _as_autocasts_norm(update), self.out_norm
        return add_layer_norm(update, residual, norm.weight, norm.bias, norm.eps, impl=self.impl)


class ShrinkingAdapter(NotScriptable, eager.ShrinkingAdapter):
    """`eager.ShrinkingAdapter` on packed rows: frames past a length cost nothing.

    On CUDA the kept rows x' = x[index] are never stored: the query product and residual + LayerNorm read them in place.
    Attention is packed as well.

    Args:
        config: a `SoundwaveConfig`, or any object with these attributes:
            - `hidden_size`: width D of the language model.
            - `num_attention_heads`: heads of the attention; they divide D.
            - `keys`: "all": a kept frame attends to every frame of its utterance; "kept": to the kept ones; "none": no
              attention, only the LayerNorm.
            - `layer_norm_eps`: of the LayerNorm, such as 1e-5.
        impl: implementation of projection, attention and residual + LayerNorm: "auto", "triton" or "torch".

    Raises:
        AttributeError: the configuration lacks an attribute.
        ValueError: an attribute or argument has a wrong value.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from soundwave import fused
        >>> config = SimpleNamespace(hidden_size=32, num_attention_heads=4, keys="all", layer_norm_eps=1e-5)
        >>> path = torch.tensor([[9, 4, 4, 9, 2], [9, 5, 9, 9, 9]])  # 9 is the blank
        >>> peaks = fused.functional.ctc_peaks(path, [5, 3], blank=9, scores=torch.zeros(2, 5))
        >>> fused.ShrinkingAdapter(config)(torch.randn(2, 5, 32), [5, 3], peaks).shape  # 4, 2 and 5
        torch.Size([3, 32])
    """

    def __init__(self, config: Any, impl: str = "auto"):
        super().__init__(config)
        check_impl(impl)
        self.impl = impl

    def extra_repr(self) -> str:
        return f"keys={self.keys!r}, impl={self.impl!r}"

    @ranged("soundwave.ShrinkingAdapter")
    def forward(self, hidden: Tensor, lengths: Tensor | Sequence[int], peaks: eager.Peaks) -> Tensor:
        """`hidden` [B, T, D] or packed [N, D], `lengths` int [B], `peaks` of the same frames -> [K, D], packed.

        Lengths on CUDA cost one wait for the device if `config.keys` is "all", and none otherwise.

        Raises:
            ValueError: hidden, lengths or peaks of another shape or kind of dtype; a length that is negative or beyond
                T; peaks that are not frames of their utterance, in rising order. Values on CUDA, and those of `peaks`
                in a compiled graph, are not checked, except lengths if `config.keys` is "all", which waits for them. A
                row that does not exist then gives NaN, or torch's own error if `config.keys` is "none".
            TypeError: peaks that are no `Peaks`, such as a plain tuple.
        """
        width, impl = self.in_proj_weight.shape[1], self.impl
        refuse_vmap("ShrinkingAdapter", lengths, *(peaks if isinstance(peaks, tuple) else ()))
        packed = isinstance(hidden, Tensor) and hidden.dim() == 2
        expect("hidden", hidden, ("N", width) if packed else ("B", "T", width))
        lengths = _lengths(lengths, len(lengths) if packed else hidden.shape[0], read=self.keys == "all")
        _check_peaks(peaks, lengths, hidden)
        if self.keys == "none":
            return self.norm(hidden.reshape(-1, width)[peaks.index])
        refuse_transforms("ShrinkingAdapter", hidden, *self.parameters())
        x, norm, kept = hidden.reshape(-1, width), self.norm, self.keys == "kept"
        index = peaks.index.contiguous()
        cu_seqlens, longest = peaks.cu_seqlens, peaks.max_seqlen
        rows, cu_seqlens_k, longest_k = (None, cu_seqlens, longest) if kept else _valid_rows(lengths, hidden)
        projected = shrink_projection(x, index, rows, self.in_proj_weight, self.in_proj_bias, kept=kept, impl=impl)
        query, key, value = (part.unflatten(1, (self.num_heads, -1)) for part in projected)
        attended = shrink_attention(query, key, value, cu_seqlens, cu_seqlens_k, longest, longest_k, impl=impl)
        update = _as_autocasts_norm(self.out_proj(attended.flatten(1)))
        return add_layer_norm(update, x, norm.weight, norm.bias, norm.eps, residual_index=index, impl=impl)


def _check_peaks(peaks: eager.Peaks, lengths: Tensor, hidden: Tensor) -> None:
    """An error unless `peaks` are frames of `hidden`. Values are read on the CPU only, where nobody has to wait."""
    if not isinstance(peaks, eager.Peaks):
        raise TypeError(f"peaks is a {type(peaks).__name__}, but it must be the Peaks that ctc_peaks returns")
    batch, (index, cu_seqlens, longest) = len(lengths), peaks
    expect("peaks.index", index, ("K",), floating=False)
    expect("peaks.cu_seqlens", cu_seqlens, (batch + 1,), floating=False)
    if torch.compiler.is_compiling() or lengths.device.type != "cpu":
        return
    some = F.pad(lengths, (0, 1))  # a batch of none has no minimum
    _check_range(int(some.min()), int(some.max()), int(lengths.sum()), hidden)
    if index.device.type != "cpu" or cu_seqlens.device.type != "cpu":
        return
    bounds, counts = cu_seqlens.tolist(), cu_seqlens.diff()
    if bounds[0] != 0 or bounds[-1] != len(index) or (counts < 0).any():
        raise ValueError(f"peaks.cu_seqlens = {bounds}, but it must rise from 0 to {len(index)}, the kept frames")
    if batch and int(counts.max()) > longest:
        raise ValueError(f"peaks.max_seqlen = {longest}, but an utterance has {int(counts.max())} kept frames")
    firsts = lengths.cumsum(0) - lengths if hidden.dim() == 2 else torch.arange(batch, device="cpu") * hidden.shape[1]
    utterance = torch.arange(batch, device=counts.device).repeat_interleave(counts)
    first = firsts[utterance]
    outside = (index < first) | (index >= first + lengths[utterance])
    falls = F.pad(index.diff() <= 0, (1, 0)) if len(index) else outside
    wrong = (outside | falls).nonzero()
    if wrong.numel():
        k = int(wrong[0])
        found, b = f"peaks.index[{k}] = {int(index[k])}", int(utterance[k])
        if outside[k]:
            end = int(first[k] + lengths[b])
            raise ValueError(
                f"{found}, but it must be {int(first[k])} or more and below {end}, a frame of utterance {b}"
            )
        raise ValueError(f"{found} comes after {int(index[k - 1])}, but peaks.index must rise")


def _check_range(least: int, most: int, valid: int, hidden: Tensor) -> None:
    """ValueError unless lengths from `least` to `most`, which add up to `valid`, fit [B, T, D] or packed [N, D]."""
    size = hidden.shape[-2]
    if least < 0 or most > size:
        raise ValueError(f"lengths go from {least} to {most}, but each must be 0 to {size}, the frames of hidden")
    if hidden.dim() == 2 and valid != size:
        raise ValueError(f"lengths add up to {valid}, but hidden has {size} packed rows")


def _valid_rows(lengths: Tensor, hidden: Tensor) -> tuple[Tensor | None, Tensor, int]:
    """The valid ones of all rows (None: all), their bounds int32 [B + 1] and the longest length."""
    batch, device = len(lengths), hidden.device
    some = F.pad(lengths, (0, 1))  # a batch of none has no minimum
    least, longest, rows = torch.stack([some.min(), some.max(), lengths.sum()]).tolist()
    _check_range(least, longest, rows, hidden)
    lengths = to_device(lengths, device)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    if hidden.dim() == 2 or rows == batch * hidden.shape[1]:
        return None, cu_seqlens, longest
    first = torch.arange(batch, device=device) * hidden.shape[1] - cu_seqlens[:-1]
    return torch.arange(rows, device=device) + first.repeat_interleave(lengths, output_size=rows), cu_seqlens, longest

"""Splice: put the rows of a recording into each row of text embeddings, in the place of its placeholder token.

    out[m] = embeddings[source[m]]           where source[m] < B·L
           = speech[source[m] - B·L]         where source[m] >= B·L
           = 0                               for padding, where source[m] = -1
    d(embeddings | speech)[r] = dout[inverse[r]], or 0 if row r was not used; `inverse` is the inverse map of source

Shapes    input_ids, attention_mask [B, L], speech [K, D], embeddings [B·L, D] -> source [B, M], inverse [B·L + K],
          out [B·M, D]. M is the longest result; the host needs it, which is the only wait for the device.
Numerics  copies; speech is cast to the dtype of the embeddings. No row is used twice, so backward sums nothing.
Cost      each row of the result is written once and read once, (B·M + K + B·L)·D·itemsize bytes forward and backward;
          the map is B·M + B·L + K integers.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from soundwave.kernels.checks import no_second_derivative
from soundwave.kernels.dispatch import ranged, resolve_impl

BLOCK_D = 1024  # columns a program: 2 kB of bf16, 16 bytes a thread of four warps
NUM_WARPS = 4


def splice_rows_ref(embeddings: Tensor, speech: Tensor, source: Tensor) -> Tensor:
    """The definition of the copy."""
    rows = torch.cat([embeddings, speech.to(embeddings.dtype), embeddings.new_zeros(1, embeddings.shape[1])])
    return rows[source]  # -1 is the last row


@triton.jit(do_not_specialize=["TEXT_ROWS"])  # it varies from batch to batch
def _splice_rows_fwd_kernel(EMBEDDINGS, SPEECH, SOURCE, OUT, TEXT_ROWS, D, BLOCK_D: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < D
    row = tl.load(SOURCE + m)
    is_speech = row >= TEXT_ROWS
    is_text = (row >= 0) & (row < TEXT_ROWS)
    text = tl.load(EMBEDDINGS + row * D + column, mask=inside & is_text, other=0.0)
    speech = tl.load(SPEECH + (row - TEXT_ROWS) * D + column, mask=inside & is_speech, other=0.0)
    value = tl.where(is_speech, speech.to(OUT.dtype.element_ty), text)
    tl.store(OUT + m * D + column, value, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["INVERSE"])  # the part of the speech begins at any place
def _splice_rows_bwd_kernel(DOUT, INVERSE, DX, D, BLOCK_D: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < D
    row = tl.load(INVERSE + r)
    gradient = tl.load(DOUT + row * D + column, mask=inside & (row >= 0), other=0.0)
    tl.store(DX + r * D + column, gradient.to(DX.dtype.element_ty), mask=inside)


def _config(width: int) -> tuple[int, int]:
    """(BLOCK_D, num_warps) for every architecture, because a copy needs no shared memory and few registers."""
    block_d = min(triton.next_power_of_2(max(width, 1)), BLOCK_D)
    return block_d, min(max(block_d * NUM_WARPS // BLOCK_D, 1), NUM_WARPS)


def _launch(kernel, rows: int, width: int, *arguments) -> None:
    block_d, num_warps = _config(width)
    if rows and width:
        kernel[(rows, triton.cdiv(width, block_d))](*arguments, width, block_d, num_warps=num_warps)


class _Read(NamedTuple):
    """What `input_ids` say, and what the host knows of it after one wait."""

    is_audio: Tensor  # bool [B, L]
    places: Tensor  # int64 [B, L], rows of the result that each token takes: one, a recording's, or none for padding
    first: Tensor  # int64 [B], the first row of speech of the recording of each row
    longest: int  # rows of the longest result
    rows: int  # rows of all results


def _read(input_ids: Tensor, attention_mask: Tensor, cu_seqlens: Tensor, speech_rows: int, placeholder: int) -> _Read:
    """The checked arguments of `splice_places`."""
    cu_seqlens = cu_seqlens.to(input_ids.device, torch.int64)
    kept_mask = attention_mask.bool()
    is_audio = (input_ids == placeholder) & kept_mask
    audio_count = is_audio.sum(1)
    has_audio = audio_count > 0
    recording = has_audio.cumsum(0) - 1
    recordings = cu_seqlens.numel() - 1
    # Rows of each recording. A wrong number of recordings is an error below, so any valid index will do until then.
    counts = cu_seqlens.diff() if recordings else cu_seqlens.new_zeros(1)
    starts = cu_seqlens[:-1] if recordings else cu_seqlens.new_zeros(1)
    recording = recording.clamp(0, counts.numel() - 1)
    places = torch.where(is_audio, counts[recording][:, None], kept_mask.to(torch.int64))
    total = places.sum(1)
    zero = total.new_zeros(1)
    checked = (
        has_audio.sum(), torch.cat([zero, audio_count]).max(), torch.cat([zero, total]).max(), total.sum(),
        cu_seqlens[0], cu_seqlens[-1], counts.min(),
    )  # fmt: skip
    found, most, longest, rows, first, last, shortest = torch.stack(checked).tolist()
    if most > 1:
        raise ValueError(
            f"input_ids[{int(audio_count.argmax())}] holds the audio placeholder {most} times, "
            "but one recording a row is supported"
        )
    if found != recordings:
        raise ValueError(
            f"input_ids has {found} rows with an audio placeholder, but cu_seqlens bounds {recordings} recordings"
        )
    if first != 0 or last != speech_rows or shortest < 0:
        raise ValueError(
            f"cu_seqlens goes from {first} to {last} (shortest step {shortest}), "
            f"but it must rise from 0 to the {speech_rows} rows of speech"
        )
    return _Read(is_audio, places, starts[recording], longest, rows)


@torch.library.custom_op("soundwave::splice_places", mutates_args=())
@ranged("soundwave.splice.places")
def _places(
    input_ids: Tensor, attention_mask: Tensor, cu_seqlens: Tensor, speech_rows: int, placeholder: int, left: bool
) -> tuple[Tensor, Tensor]:
    """source int64 [B, M] and inverse int64 [B·L + K]."""
    (batch, width), device = input_ids.shape, input_ids.device
    is_audio, places, first, size, _ = _read(input_ids, attention_mask, cu_seqlens, speech_rows, placeholder)
    total, text_rows = places.sum(1), batch * width
    if not text_rows:
        return input_ids.new_zeros((batch, 0), dtype=torch.int64), total.new_zeros(0)
    ends = places.cumsum(1)
    place = torch.arange(size, device=device).expand(batch, size)
    if left:
        place = place - (size - total)[:, None]
    place = place.contiguous()
    token = torch.searchsorted(ends, place, right=True).clamp(max=width - 1)
    within = place - (ends - places).gather(1, token)
    text_source = torch.arange(0, text_rows, width, device=device)[:, None] + token
    speech_source = text_rows + first[:, None] + within
    source = torch.where(is_audio.gather(1, token), speech_source, text_source)
    source = source.masked_fill((place < 0) | (place >= total[:, None]), -1)
    # The inverse map. Padding goes to one extra slot at the end, which is cut off.
    inverse = total.new_full((text_rows + speech_rows + 1,), -1)
    flat = source.flatten()
    inverse[torch.where(flat < 0, text_rows + speech_rows, flat)] = torch.arange(flat.numel(), device=device)
    return source, inverse[:-1]


@_places.register_fake
def _(input_ids, attention_mask, cu_seqlens, speech_rows, placeholder, left):
    size = torch.library.get_ctx().new_dynamic_size()
    batch, width = input_ids.shape
    source = input_ids.new_empty((batch, size), dtype=torch.int64)
    return source, input_ids.new_empty(batch * width + speech_rows, dtype=torch.int64)


@torch.library.custom_op("soundwave::splice_rows_fwd", mutates_args=())
@ranged("soundwave.splice")
def _forward(embeddings: Tensor, speech: Tensor, source: Tensor, inverse: Tensor, impl: str) -> Tensor:
    """out [B·M, D] from embeddings [B·L, D], speech [K, D] and the map of `_places`."""
    (text_rows, width), rows = embeddings.shape, source.numel()
    if impl == "torch":
        if not text_rows:
            return embeddings.new_zeros(rows, width)
        out = embeddings.index_select(0, source.clamp(0, text_rows - 1))
        out.masked_fill_((source < 0)[:, None], 0.0)
        return out.index_copy_(0, inverse[text_rows:], speech.to(out.dtype))
    embeddings, speech = embeddings.contiguous(), speech.contiguous()
    out = embeddings.new_empty(rows, width)
    _launch(_splice_rows_fwd_kernel, rows, width, embeddings, speech, source, out, text_rows)
    return out


@_forward.register_fake
def _(embeddings, speech, source, inverse, impl):
    return embeddings.new_empty(source.shape[0], embeddings.shape[1])


@torch.library.custom_op("soundwave::splice_rows_bwd", mutates_args=())
@ranged("soundwave.splice.backward")
def _backward(
    dout: Tensor, inverse: Tensor, text_rows: int, embeddings_dtype: torch.dtype, speech_dtype: torch.dtype,
    need_embeddings: bool, need_speech: bool, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dembeddings [B·L, D] and dspeech [K, D]; empty if not needed."""
    width, dout = dout.shape[1], dout.contiguous()
    gradients = []
    halves = (
        (inverse[:text_rows], embeddings_dtype, need_embeddings),
        (inverse[text_rows:], speech_dtype, need_speech),
    )
    for places, dtype, needed in halves:
        rows = places.shape[0] if needed else 0
        if impl == "torch" and rows and dout.shape[0]:
            gradient = dout.index_select(0, places.clamp(min=0)).masked_fill_((places < 0)[:, None], 0.0).to(dtype)
        elif impl == "torch":
            gradient = dout.new_zeros((rows, width), dtype=dtype)
        else:
            gradient = dout.new_empty((rows, width), dtype=dtype)
            _launch(_splice_rows_bwd_kernel, rows, width, dout, places, gradient)
        gradients.append(gradient)
    return gradients[0], gradients[1]


@_backward.register_fake
def _(dout, inverse, text_rows, embeddings_dtype, speech_dtype, need_embeddings, need_speech, impl):
    rows = (text_rows if need_embeddings else 0, inverse.shape[0] - text_rows if need_speech else 0)
    dtypes = (embeddings_dtype, speech_dtype)
    return tuple(dout.new_empty((count, dout.shape[1]), dtype=dtype) for count, dtype in zip(rows, dtypes, strict=True))


def _setup_context(ctx, inputs, output):
    embeddings, speech, _, inverse, ctx.impl = inputs
    ctx.save_for_backward(inverse)
    ctx.text_rows, ctx.dtypes = embeddings.shape[0], (embeddings.dtype, speech.dtype)


def _autograd(ctx, dout):
    needed = ctx.needs_input_grad[:2]
    gradients = _backward(dout, *ctx.saved_tensors, ctx.text_rows, *ctx.dtypes, *needed, ctx.impl)
    return *(g if need else None for g, need in zip(gradients, needed, strict=True)), None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
no_second_derivative("splice", _backward)


def splice_places(
    input_ids: Tensor, attention_mask: Tensor, cu_seqlens: Tensor, speech_rows: int, *, placeholder: int, left: bool
) -> tuple[Tensor, Tensor]:
    """The map from rows of text and speech to rows of the result.

    Args:
        input_ids, attention_mask: int [B, L]; a row holds `placeholder` once, or not at all.
        cu_seqlens: int [A + 1], bounds of the A recordings in `speech_rows` rows, in the order of the rows of text.
        left: pad the result on the left.

    Returns:
        source int64 [B, M]: for each row of the result its row of text, or B·L plus its row of speech; -1 for padding.
        inverse int64 [B·L + K]: for each row of text, then of speech, its place in the flattened result, or -1.

    Raises:
        ValueError: several placeholders in a row, a wrong number of recordings, bounds that do not fit.
    """
    return _places(input_ids, attention_mask, cu_seqlens, speech_rows, placeholder, left)


@ranged("soundwave.splice.places")
def packed_places(
    input_ids: Tensor, attention_mask: Tensor, cu_seqlens: Tensor, speech_rows: int, *, placeholder: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """As `splice_places`, for a result [M, D] without padding: the rows of text follow one another.

    Returns:
        source int64 [M]; inverse int64 [B·L + K]; the bounds of the B sequences, int64 [B + 1]; rows of the longest.
    """
    width, text_rows = input_ids.shape[1], input_ids.numel()
    is_audio, places, first, longest, rows = _read(input_ids, attention_mask, cu_seqlens, speech_rows, placeholder)
    bounds = torch.nn.functional.pad(places.sum(1).cumsum(0), (1, 0))
    ends = places.flatten().cumsum(0)
    place = torch.arange(rows, device=input_ids.device)
    token = torch.searchsorted(ends, place, right=True)
    within = place - (ends - places.flatten())[token]
    speech = text_rows + first[token // max(width, 1)] + within
    source = torch.where(is_audio.flatten()[token], speech, token)
    inverse = places.new_full((text_rows + speech_rows,), -1)
    inverse[source] = place
    return source, inverse, bounds, longest


def splice_rows(embeddings: Tensor, speech: Tensor, source: Tensor, inverse: Tensor, impl: str = "auto") -> Tensor:
    """Rows of embeddings [B·L, D] and speech [K, D], put together by the map of `splice_places`: [B·M, D]."""
    source, inverse = source.contiguous(), inverse.contiguous()
    return _forward(embeddings, speech, source, inverse, resolve_impl(impl, embeddings.device))

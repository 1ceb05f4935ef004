"""The fused operations as functions. `impl="auto"` takes Triton for CUDA tensors and torch elsewhere.

Dimension letters: B utterances, T frames of the longest, N packed rows, D width, V rows of the head, U labels of the
longest target, K kept frames of all utterances together.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from soundwave.eager import IGNORE_INDEX, Peaks
from soundwave.fused.arguments import (
    as_integer,
    check_flag,
    check_number,
    check_reduction,
    check_targets,
    expect,
    expect_tensor,
    lengths_of,
    padded_targets,
)
from soundwave.fused.linear import LinearCTCOutput, linear_cross_entropy, linear_ctc_loss, linear_ctc_path
from soundwave.fused.rows import Packed
from soundwave.kernels import ctc as _ctc
from soundwave.kernels import ctc_peaks as _ctc_peaks
from soundwave.kernels import norm as _norm
from soundwave.kernels import shrink_attention as _shrink_attention
from soundwave.kernels import splice as _splice
from soundwave.kernels.checks import refuse_transforms, refuse_vmap
from soundwave.kernels.dispatch import resolve_impl, to_device

__all__ = [
    "LinearCTCOutput",
    "Peaks",
    "Spliced",
    "add_layer_norm",
    "ctc_loss",
    "ctc_peaks",
    "linear_cross_entropy",
    "linear_ctc_loss",
    "linear_ctc_path",
    "shrink_attention",
    "splice",
]


def __dir__() -> list[str]:
    return __all__


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int],
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
    *,
    impl: str = "auto",
    validate: bool = False,
) -> Tensor:
    """CTC (Graves et al. 2006) with the call of `torch.nn.functional.ctc_loss`.

    The gradient is that in `log_probs` as given. Torch's is right only after a log-softmax, where both give the same
    gradient for the logits.

    Args:
        log_probs: [T, B, C], or [T, C] for one utterance; float16, bfloat16, float32 or float64.
        targets: int [B, U], padded with anything; or [S], the labels of all utterances one after the other; on the CPU
            or on the device of log_probs.
        input_lengths, target_lengths: int [B], tensors on either device or sequences; for one utterance also a number.
        blank: class of the blank.
        reduction: "mean" (each loss over its target length, or 1 if that is 0, then over utterances), "sum" or "none".
        zero_infinity: an utterance that cannot be aligned counts 0. Its gradient is 0 in any case.
        impl: "auto", "triton" or "torch".
        validate: if tensors are on CUDA, wait for their values and raise at once.

    Returns:
        float32, and float64 for float64: a scalar, or [B] for "none" ([T, C] gives a scalar). A loss is inf if there is
        no alignment: no frames for some labels, fewer frames than labels and adjacent repeats together, or only
        log-probabilities of -inf. It is 0 for no frames and no labels, and for a batch of no utterances. It is NaN if
        one of the log-probabilities that it uses (of its labels and blank, within its length) is NaN. Results are
        bitwise reproducible; with impl="torch" on CUDA only as far as torch's own loss is.

    Raises:
        ValueError: tensors that do not fit together; a length past its tensor; a label that is the blank or no class.
            Values on CUDA are checked without waiting: the loss of that utterance is NaN, its gradient 0, and the error
            comes at backward or at the next call (it names a label of targets [S] by utterance and place in it).
            Targets [S] with lengths on CUDA cost a synchronisation.
        RuntimeError: a second derivative.
        NotImplementedError: a forward-mode derivative or one of `torch.func`, here and in every other function.
    """
    expect_tensor("log_probs", log_probs)
    refuse_transforms("ctc_loss", log_probs)
    if log_probs.dim() not in (2, 3):
        raise ValueError(f"log_probs has shape {list(log_probs.shape)}, but it must be [T, B, C] or [T, C]")
    if log_probs.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"log_probs is {log_probs.dtype}, but it must be float16, bfloat16, float32 or float64")
    check_reduction(reduction)
    check_flag("zero_infinity", zero_infinity)
    check_flag("validate", validate)
    impl = resolve_impl(impl, log_probs.device)
    single = log_probs.dim() == 2
    log_probs = log_probs.unsqueeze(1) if single else log_probs
    batch, classes = log_probs.shape[1:]
    blank = as_integer("blank", blank)
    if not 0 <= blank < classes:
        raise ValueError(f"blank = {blank}, but it must be one of the {classes} classes of log_probs")
    input_lengths = lengths_of("input_lengths", input_lengths, batch, log_probs)
    target_lengths = lengths_of("target_lengths", target_lengths, batch, log_probs)
    targets = check_targets(targets, batch, "log_probs", log_probs)
    targets = padded_targets(targets, target_lengths, classes, blank, "classes of log_probs", validate)
    loss = _ctc.ctc_nll(log_probs, targets, input_lengths, target_lengths, blank=blank, impl=impl, validate=validate)
    if zero_infinity:
        loss = torch.where(loss == torch.inf, torch.zeros_like(loss), loss)
    if reduction == "mean":
        return (loss / to_device(target_lengths, loss.device).clamp(min=1)).sum() / max(batch, 1)
    if reduction == "sum":
        return loss.sum()
    return loss[0] if single else loss


@overload
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = ..., *,
    residual_index: Tensor | None = ..., return_sum: Literal[False] = ..., impl: str = ...,
) -> Tensor: ...  # fmt: skip


@overload
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = ..., *,
    residual_index: Tensor | None = ..., return_sum: Literal[True], impl: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = ..., *,
    residual_index: Tensor | None = ..., return_sum: bool, impl: str = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    residual_index: Tensor | None = None,
    return_sum: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm of each row of `x + residual`, in fp32; with `return_sum` also the sum, the next layer's residual.

    Args:
        x: [N, D], floating point; D up to 8192 with Triton.
        residual: [N, D]; or [R, D] with `residual_index`, and then row `residual_index[n]` is added to `x[n]`.
        weight, bias: [D].
        eps: added to the variance.
        residual_index: int [N], no row twice.

    Returns:
        The norm [N, D], or (norm, sum), in the promoted dtype of x and residual. With `return_sum` the norm is that of
        the sum as returned, rounded to its dtype.

    Raises:
        ValueError: tensors that do not fit; with torch also rows of `residual_index` that do not exist or come twice.
            With Triton a row that does not exist gives NaN, and a row that comes twice gets one of its gradients.
        RuntimeError: a second derivative.
    """
    refuse_transforms("add_layer_norm", x, residual, weight, bias)
    check_number("eps", eps, 0.0)
    check_flag("return_sum", return_sum)
    expect("x", x, ("N", "D"))
    rows, width = x.shape
    expect("residual", residual, ("R" if residual_index is not None else rows, width), x)
    expect("weight", weight, (width,), x)
    expect("bias", bias, (width,), x)
    if residual_index is not None:
        expect("residual_index", residual_index, (rows,), x, floating=False)
    if width < 1:
        raise ValueError("x has D = 0 columns, but a norm needs at least one")
    return _norm.add_layer_norm(
        x, residual, weight, bias, eps, impl, residual_index=residual_index, return_sum=return_sum
    )


def ctc_peaks(
    path: Tensor,
    lengths: Tensor | Sequence[int],
    *,
    blank: int,
    keep: str = "peaks",
    scores: Tensor | None = None,
    impl: str = "auto",
) -> Peaks:
    """One frame for each run of equal ids on a CTC path. Not differentiable.

    Args:
        path: int [B, T], one id a frame; values past `lengths` are ignored. Or packed [N], the sum of the lengths.
        lengths: int [B], on the CPU if possible; those of a packed path on CUDA cost one more wait.
        blank: the id of the blank.
        keep: "peaks" keeps the frame of the highest score in every run of a non-blank id: the first of equal scores,
            none if one of them is NaN. "runs" keeps the first frame of every run, including runs of the blank.
        scores: float, shaped as path, e.g. `path_log_prob`, compared in float32; needed for "peaks".

    Returns:
        `index` and `cu_seqlens` on the device of `path`. `max_seqlen` and the number of kept frames come to the host in
        one copy. An utterance of at least one frame keeps at least one: frame 0 if it would keep none.

    Raises:
        ValueError: tensors that do not fit; a length on the CPU that is negative or more than T. On CUDA such a length
            counts as 0 or T.
    """
    refuse_vmap("ctc_peaks", path, lengths, scores)
    if isinstance(path, Tensor) and path.dim() == 1 and not path.is_meta:
        expect("path", path, ("N",), floating=False)
        if scores is not None:
            expect("scores", scores, path.shape, path)
        packed = Packed.of("path", path, lengths)
        path, scores = packed.pad(path, -1), None if scores is None else packed.pad(scores)
        peaks = ctc_peaks(path, packed.lengths, blank=blank, keep=keep, scores=scores, impl=impl)
        # The places of packed rows rise, so their order tells the row of a place.
        return peaks if packed.place is None else peaks._replace(index=torch.searchsorted(packed.place, peaks.index))
    expect("path", path, ("B", "T"), floating=False)
    if path.is_meta:
        raise ValueError("path is on meta, but it must have values, because they give the number of kept frames")
    lengths = lengths_of("lengths", lengths, path.shape[0], path)
    blank = as_integer("blank", blank)
    if keep not in _ctc_peaks.KEEP:
        raise ValueError(f"keep = {keep!r}, but it must be 'peaks' or 'runs'")
    if keep == "runs":
        scores = None
    elif scores is None:
        raise ValueError("scores = None, but keep='peaks' chooses by the score of each frame")
    else:
        expect("scores", scores, path.shape, path)
    return Peaks(*_ctc_peaks.ctc_peaks(path, lengths, scores, blank=blank, keep=keep, impl=impl))


def shrink_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention of packed queries to the packed keys of the same utterance, without mask or dropout.

    Args:
        query: [K, H, E]; key, value: [N, H, E], of one dtype. Parts of a joint projection are read in place. Triton
            takes float32, bfloat16 and float16 and E up to 256; torch also float64 and any E.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], rising from 0 to K and to N: the bounds of the utterances.
        max_seqlen_q, max_seqlen_k: at least the rows of the longest utterance.
        scale: factor of the products before the softmax; None is 1 / sqrt(E).

    Returns:
        [K, H, E] in the dtype of query; 0 for an utterance without keys.

    Raises:
        ValueError: tensors that do not fit; bounds on the CPU that do not fit. Bounds on CUDA are not checked, because
            reading them would wait for the device: rows that they concern become NaN, and nothing is read out of
            bounds.
        RuntimeError: a second derivative.
    """
    refuse_transforms("shrink_attention", query, key, value)
    if scale is not None:
        check_number("scale", scale)
    max_seqlen_q, max_seqlen_k = as_integer("max_seqlen_q", max_seqlen_q), as_integer("max_seqlen_k", max_seqlen_k)
    expect("query", query, ("K", "H", "E"))
    heads, size = query.shape[1:]
    expect("key", key, ("N", heads, size), query)
    expect("value", value, (key.shape[0], heads, size), query)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, but query is {query.dtype}")
    for name, bounds in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        expect(name, bounds, ("B + 1",), floating=False)
        if bounds.dtype != torch.int32 or not bounds.shape[0] or bounds.shape != cu_seqlens_q.shape:
            raise ValueError(
                f"{name} is {bounds.dtype} {list(bounds.shape)}, but it must be int32 and hold one bound more than "
                f"there are utterances, as cu_seqlens_q {list(cu_seqlens_q.shape)} does"
            )
    return _shrink_attention.shrink_attention(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, impl
    )


class Spliced(NamedTuple):
    """`embeddings` [B, L', D], `attention_mask` int64 [B, L'] and `labels` [B, L'] or None."""

    embeddings: Tensor
    attention_mask: Tensor
    labels: Tensor | None

    @property
    def position_ids(self) -> Tensor:
        """int64 [B, L']: 0, 1, 2, … for the tokens of each row; 0 for padding."""
        return (self.attention_mask.cumsum(1) - 1) * self.attention_mask


def splice(
    embeddings: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    speech: Tensor,
    cu_seqlens: Tensor,
    *,
    audio_placeholder_id: int,
    labels: Tensor | None = None,
    padding_side: str = "right",
    impl: str = "auto",
) -> Spliced:
    """Put the speech rows of each utterance in the place of its placeholder token.

    Args:
        embeddings: [B, L, D] of `input_ids` (anything at the placeholder, which gets no gradient).
        input_ids, attention_mask: int [B, L]; a row holds the placeholder once, or not at all (text only).
        speech: [K, D], the rows of the utterances that have one, in order; cast to the dtype of `embeddings`.
        cu_seqlens: int [A + 1], the bounds of each utterance's rows in `speech`.
        labels: int [B, L], aligned with `input_ids`; every speech row and all padding gets -100.
        padding_side: where the result is padded: "right" for training, "left" for generation.

    Raises:
        ValueError: tensors that do not fit each other; a row with several placeholders; a number of placeholders that
            is not the number of recordings. These checks are done at once on any device, because the host has to wait
            for the length of the longest result anyway.
        RuntimeError: a second derivative.
    """
    check_splice(embeddings, input_ids, attention_mask, speech, cu_seqlens, labels, input_ids)
    batch, width = input_ids.shape
    if padding_side not in ("right", "left"):
        raise ValueError(f"padding_side = {padding_side!r}, but it must be 'right' or 'left'")
    source, inverse = _splice.splice_places(
        input_ids, attention_mask, cu_seqlens, speech.shape[0],
        placeholder=audio_placeholder_id, left=padding_side == "left",
    )  # fmt: skip
    flat = source.flatten()
    out = _splice.splice_rows(embeddings.flatten(0, 1), speech, flat, inverse, impl)
    out = out.view(*source.shape, embeddings.shape[2])
    mask = (source >= 0).to(torch.int64)
    if labels is None:
        return Spliced(out, mask, None)
    is_text = (source >= 0) & (source < batch * width)
    padded = torch.cat([labels.flatten(), labels.new_full((1,), IGNORE_INDEX)])
    return Spliced(out, mask, padded[torch.where(is_text, source, batch * width)])


def check_splice(
    embeddings: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    speech: Tensor,
    cu_seqlens: Tensor,
    labels: Tensor | None,
    like: Tensor | None,
) -> None:
    """An error unless the arguments of `splice` fit each other; embeddings and speech are on the device of `like`."""
    expect("input_ids", input_ids, ("B", "L"), floating=False)
    batch, width = input_ids.shape
    refuse_transforms("splice", embeddings, speech)
    expect("embeddings", embeddings, (batch, width, "D"), like)
    expect("attention_mask", attention_mask, (batch, width), input_ids, floating=None)
    expect("speech", speech, ("K", embeddings.shape[2]), embeddings)
    expect("cu_seqlens", cu_seqlens, ("A + 1",), floating=False)
    if labels is not None:
        expect("labels", labels, (batch, width), input_ids, floating=False)
    if cu_seqlens.shape[0] < 1:
        raise ValueError("cu_seqlens is empty, but it must hold at least the 0 before the first recording")

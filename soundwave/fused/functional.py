"""The fused operations as functions. `impl="auto"` is Triton for CUDA tensors and torch elsewhere.

Dimension letters: B utterances, T frames of the longest, N packed rows, D width, V rows of the head, U labels of the
longest target, K kept frames of all utterances together.
"""

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from soundwave.eager import IGNORE_INDEX, Peaks
from soundwave.kernels import ctc, linear_ctc, norm
from soundwave.kernels import ctc_peaks as kernels_ctc_peaks
from soundwave.kernels import linear_cross_entropy as kernels_linear_cross_entropy
from soundwave.kernels import shrink_attention as kernels_shrink_attention
from soundwave.kernels import splice as kernels_splice
from soundwave.kernels.checks import as_lengths, no_forward_mode
from soundwave.kernels.ctc_targets import pad_targets
from soundwave.kernels.dispatch import resolve_impl
from soundwave.kernels.linear_ctc_path import linear_ctc_path as _linear_ctc_path


_REDUCTIONS = ("mean", "sum", "none")


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

    The gradient is that of the loss in `log_probs` as given; torch's is right only behind a log-softmax. Behind one
    both give the same gradient for the logits.

    Args:
        log_probs: [T, B, C], or [T, C] for one utterance; float16, bfloat16, float32 or float64.
        targets: int32 or int64 [B, U], padded with anything; or [S], the labels of all utterances one after the other;
            on the CPU or on the device of log_probs.
        input_lengths, target_lengths: int [B], tensors on either device or sequences.
        blank: class of the blank.
        reduction: "mean" (each loss over its target length, or 1 if that is 0, then over utterances), "sum" or "none".
        zero_infinity: an utterance that cannot be aligned counts 0. Its gradient is 0 in any case.
        impl: "auto", "triton" or "torch".
        validate: for tensors on CUDA, wait for their values and raise at once.

    Returns:
        float32, and float64 for float64: a scalar, or [B] for "none" ([T, C] gives a scalar). inf where there is no
        alignment: no frames for some labels, fewer frames than labels and adjacent repeats, or only log-probabilities
        of -inf. No frames and no labels give 0, as does a batch of no utterances. NaN among the log-probabilities that
        an utterance uses, its labels' and blank's within its length, makes its loss NaN. Bitwise reproducible (with
        impl="torch" on CUDA as far as torch's own loss is).

    Raises:
        ValueError: tensors that do not fit together; a length past its tensor; a label that is blank or no class.
            Values on CUDA are looked at without waiting: the loss of that utterance is NaN, its gradient 0, and the
            error comes at backward or at the next call (and names a label of targets [S] by utterance and place in it).
            Targets [S] with lengths on CUDA cost a synchronisation.
        NotImplementedError: forward-mode derivatives, here and in every other function.
    """
    _expect_tensor("log_probs", log_probs)
    _expect_tensor("targets", targets)
    no_forward_mode("ctc_loss", log_probs)
    if log_probs.dim() not in (2, 3):
        raise ValueError(f"log_probs has shape {list(log_probs.shape)}, but it must be [T, B, C] or [T, C]")
    if log_probs.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"log_probs is {log_probs.dtype}, but it must be float16, bfloat16, float32 or float64")
    check_reduction(reduction)
    impl = resolve_impl(impl, log_probs.device)
    single = log_probs.dim() == 2
    log_probs = log_probs.unsqueeze(1) if single else log_probs
    batch, classes = log_probs.shape[1:]
    blank = _integer("blank", blank)
    if not 0 <= blank < classes:
        raise ValueError(f"blank = {blank}, but it must be one of the {classes} classes of log_probs")
    input_lengths = _lengths("input_lengths", input_lengths, batch, log_probs, single)
    target_lengths = _lengths("target_lengths", target_lengths, batch, log_probs, single)
    if targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"targets is {targets.dtype}, but it must be int32 or int64")
    if targets.dim() != 1 and (targets.dim() != 2 or targets.shape[0] != batch):
        raise ValueError(f"targets has shape {list(targets.shape)}, but it must be [{batch}, U], or [S] concatenated")
    if targets.device.type != "cpu" and targets.device != log_probs.device:
        raise ValueError(f"targets is on {targets.device}, but log_probs is on {log_probs.device}")
    if targets.dim() == 1:
        targets = pad_targets(targets, target_lengths, classes, blank, "classes of log_probs", validate)
    loss = ctc.ctc_nll(log_probs, targets, input_lengths, target_lengths, blank=blank, impl=impl, validate=validate)
    if zero_infinity:
        loss = torch.where(loss == torch.inf, torch.zeros_like(loss), loss)
    if reduction == "mean":
        return (loss / target_lengths.to(loss.device).clamp(min=1)).sum() / max(batch, 1)
    if reduction == "sum":
        return loss.sum()
    return loss[0] if single else loss


def check_reduction(reduction: str) -> None:
    """ValueError for what is none of "mean", "sum" and "none"."""
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction = {reduction!r}, but it must be one of {', '.join(_REDUCTIONS)}")


def _integer(name: str, value: int) -> int:
    """ValueError for what is no integer, such as 0.0."""
    if isinstance(value, int):
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} = {value!r}, but it must be an integer") from None


def _lengths(name: str, lengths: Tensor | Sequence[int], batch: int, like: Tensor, single: bool = False) -> Tensor:
    """`lengths` as a contiguous integer tensor [B]; of a `single` utterance a number will do."""
    lengths = as_lengths(lengths)
    if lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} is {lengths.dtype}, but it must be int32 or int64")
    if lengths.shape != (batch,) and not (single and lengths.dim() == 0):
        raise ValueError(f"{name} has shape {list(lengths.shape)}, but it must be [{batch}], one a row of the batch")
    if lengths.device.type != "cpu" and lengths.device != like.device:
        raise ValueError(f"{name} is on {lengths.device}, but the other tensors are on {like.device}")
    return lengths.reshape(batch).contiguous()


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
    """LayerNorm of `x + residual` by rows, in fp32; with `return_sum` also the sum, as the next layer's residual.

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
        ValueError: tensors that do not fit; on the torch path also rows of `residual_index` that do not exist or come
            twice. With Triton a row that does not exist gives NaN, and of a row's gradients one is kept.
    """
    no_forward_mode("add_layer_norm", x, residual, weight, bias)
    _expect("x", x, ("N", "D"))
    rows, width = x.shape
    _expect("residual", residual, ("R" if residual_index is not None else rows, width), x)
    _expect("weight", weight, (width,), x)
    _expect("bias", bias, (width,), x)
    if residual_index is not None:
        _expect("residual_index", residual_index, (rows,), x, floating=False)
    if width < 1:
        raise ValueError("x has D = 0 columns, but a norm needs at least one")
    return norm.add_layer_norm(
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
    """Frames that stand for a run of equal ids on a CTC path, as `eager.ctc_peaks` chooses them; not differentiable.

    Args:
        path: int [B, T], one id a frame; values past `lengths` are ignored.
        lengths: int [B], best on the CPU.
        blank: the id of the blank.
        keep: "peaks" keeps of each run of a non-blank id the frame of the highest score (the first, where scores tie;
            none, where one is NaN); "runs" keeps the first frame of every run, of blank too.
        scores: float [B, T], e.g. `path_log_prob`, compared in float32; needed for "peaks".

    Returns:
        `index` and `cu_seqlens` on the device of `path`; `max_seqlen` came to the host together with the number of kept
        frames, in one copy. An utterance of at least one frame keeps at least one (frame 0, where all is blank).

    Raises:
        ValueError: tensors that do not fit; a length on the CPU that is negative or more than T. On CUDA such a length
            counts as 0 or T.
    """
    _expect("path", path, ("B", "T"), floating=False)
    lengths = _lengths("lengths", lengths, path.shape[0], path)
    blank = _integer("blank", blank)
    if keep not in kernels_ctc_peaks.KEEP:
        raise ValueError(f"keep = {keep!r}, but it must be 'peaks' or 'runs'")
    if keep == "runs":
        scores = None
    elif scores is None:
        raise ValueError("scores = None, but keep='peaks' chooses by the score of each frame")
    else:
        _expect("scores", scores, path.shape, path)
    return Peaks(*kernels_ctc_peaks.ctc_peaks(path, lengths, scores, blank=blank, keep=keep, impl=impl))


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
        scale: of the products before the softmax; None is 1 / sqrt(E).

    Returns:
        [K, H, E] in the dtype of query; 0 for an utterance without keys.

    Raises:
        ValueError: tensors that do not fit; on the CPU also bounds that do not. Reading these on CUDA would wait for
            the device: there the rows they concern become NaN, and nothing is read out of bounds.
        RuntimeError: a second derivative.
    """
    no_forward_mode("shrink_attention", query, key, value)
    _expect("query", query, ("K", "H", "E"))
    heads, size = query.shape[1:]
    _expect("key", key, ("N", heads, size), query)
    _expect("value", value, (key.shape[0], heads, size), query)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, but query is {query.dtype}")
    for name, bounds in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _expect(name, bounds, ("B + 1",), floating=False)
        if bounds.dtype != torch.int32 or not bounds.shape[0] or bounds.shape != cu_seqlens_q.shape:
            raise ValueError(
                f"{name} is {bounds.dtype} {list(bounds.shape)}, but it must be int32 and hold one bound more than "
                f"there are utterances, as cu_seqlens_q {list(cu_seqlens_q.shape)} does"
            )
    return kernels_shrink_attention.shrink_attention(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, impl
    )


class Spliced(NamedTuple):
    """`embeddings` [B, L', D], `attention_mask` int64 [B, L'], `labels` [B, L'] or None, as `eager.splice` returns."""

    embeddings: Tensor
    attention_mask: Tensor
    labels: Tensor | None

    @property
    def position_ids(self) -> Tensor:
        """int64 [B, L']: each row counts up from 0 without a gap; padding has 0."""
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
    """Put each utterance's speech rows where its placeholder token stands, as `eager.splice` does.

    Args:
        embeddings: [B, L, D] of `input_ids` (anything at the placeholder, which gets no gradient).
        input_ids, attention_mask: int [B, L]; a row holds the placeholder once, or not at all (text only).
        speech: [K, D], the rows of the utterances that have one, in order; cast to the dtype of `embeddings`.
        cu_seqlens: int [A + 1], the bounds of each utterance's rows in `speech`.
        labels: int [B, L], aligned with `input_ids`; every speech row and all padding gets -100.
        padding_side: where the result is padded: "right" for training, "left" for generation.

    Raises:
        ValueError: tensors that do not fit each other; a placeholder more than once in a row; another number of
            placeholders than of recordings. The length of the longest result comes to the host in one copy, and with it
            what these checks need, so they are done at once on any device.
    """
    _expect("input_ids", input_ids, ("B", "L"), floating=False)
    batch, width = input_ids.shape
    no_forward_mode("splice", embeddings, speech)
    _expect("embeddings", embeddings, (batch, width, "D"), input_ids)
    _expect("attention_mask", attention_mask, (batch, width), input_ids, floating=None)
    _expect("speech", speech, ("K", embeddings.shape[2]), input_ids)
    _expect("cu_seqlens", cu_seqlens, ("A + 1",), floating=False)
    if labels is not None:
        _expect("labels", labels, (batch, width), input_ids, floating=False)
    if cu_seqlens.shape[0] < 1:
        raise ValueError("cu_seqlens is empty, but it must hold at least the 0 before the first recording")
    if padding_side not in ("right", "left"):
        raise ValueError(f"padding_side = {padding_side!r}, but it must be 'right' or 'left'")
    source, inverse = kernels_splice.splice_places(
        input_ids, attention_mask, cu_seqlens, speech.shape[0],
        placeholder=audio_placeholder_id, left=padding_side == "left",
    )  # fmt: skip
    flat = source.flatten()
    out = kernels_splice.splice_rows(embeddings.flatten(0, 1), speech, flat, inverse, impl)
    out = out.view(*source.shape, embeddings.shape[2])
    mask = (source >= 0).to(torch.int64)
    if labels is None:
        return Spliced(out, mask, None)
    is_text = (source >= 0) & (source < batch * width)
    padded = torch.cat([labels.flatten(), labels.new_full((1,), IGNORE_INDEX)])
    return Spliced(out, mask, padded[torch.where(is_text, source, batch * width)])


def _expect(
    name: str,
    tensor: Tensor,
    shape: tuple[int | str, ...],
    like: Tensor | None = None,
    *,
    floating: bool | None = True,
) -> None:
    """ValueError unless `tensor` has this shape (a letter is any size), kind of dtype, and the device of `like`.

    `floating`: None for any kind. TypeError for what is no tensor.
    """
    _expect_tensor(name, tensor)
    fits = tensor.dim() == len(shape) and all(
        isinstance(size, str) or size == found for size, found in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} has shape {list(tensor.shape)}, but it must be [{wanted}]")
    if floating and not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}, but it must be floating point")
    if floating is False and tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} is {tensor.dtype}, but it must be int32 or int64")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, but the other tensors are on {like.device}")


def _expect_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, but it must be a tensor")


class LinearCTCOutput(NamedTuple):
    """As `eager.LinearCTCOutput`, and what skipping columns did to the gradient of hidden.

    loss: scalar, or [B] for `reduction="none"`; None without targets.
    path, path_log_prob: [B, T], the most probable id of each frame (-1 past the length) and its log-probability (0).
    active_share: the share of the vocabulary's columns that took part in `P W`, 0 to 1; 0 without a gradient.
    error_bound: the most that skipping may have changed the gradient of hidden, relative to its norm; the error itself
        is some 3 to 4 times smaller. With `reduction="none"` the largest of the utterances' own, so that it holds
        however they are weighed. 0 where nothing was skipped.

    All but the loss carry no gradient. float32, and float64 for float64 input.
    """

    loss: Tensor | None
    path: Tensor
    path_log_prob: Tensor
    active_share: Tensor | None = None
    error_bound: Tensor | None = None


def linear_ctc_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int] | None,
    *,
    blank: int,
    blank_weight: Tensor | None = None,
    blank_bias: Tensor | None = None,
    reduction: str = "mean",
    zero_infinity: bool = False,
    exact: bool = False,
    impl: str = "auto",
    validate: bool = False,
) -> LinearCTCOutput:
    """CTC of `softmax(hidden @ weight.T)` without the [B, T, V] logits, and each frame's most probable id.

    Args:
        hidden: [B, T, D]. Frames past a length cost nothing and may hold anything.
        weight: [V, D], the head; trained if it requires a gradient.
        targets: int [B, U], padded with anything past `target_lengths`, or concatenated [sum of lengths]; None computes
            the path only.
        input_lengths, target_lengths: int [B], best on the CPU: on CUDA they cost one synchronisation.
        blank: a row of `weight`, or `V` together with `blank_weight` [D] and the scalar `blank_bias`: one extra row.
        reduction: "mean" (each loss over its target length, then over utterances), "sum" or "none".
        zero_infinity: an utterance that cannot be aligned counts 0; its gradient is 0 either way.
        exact: skip no columns, see `LinearCTCOutput.error_bound`.
        validate: on CUDA, wait for the check of lengths and labels.

    Products run in autocast's dtype, else in that of `weight`; the rest in float32 (float64 for float64). Without a
    gradient to compute only the first product runs. NaN or inf in the frames of an utterance makes its loss and its
    gradient NaN, as for `eager.linear_ctc_loss`.

    Raises:
        ValueError: tensors that do not fit; a label that is blank or no row of the head, a length past its tensor. For
            values on CUDA that utterance's loss is NaN, and the error comes at backward or at the next call.
        RuntimeError: a second derivative.
    """
    if targets is None:
        path = linear_ctc_path(
            hidden, weight, input_lengths, blank=blank, blank_weight=blank_weight, blank_bias=blank_bias, impl=impl,
            validate=validate,
        )  # fmt: skip
        return LinearCTCOutput(None, *path)
    no_forward_mode("linear_ctc_loss", hidden, weight, blank_weight, blank_bias)
    blank = _integer("blank", blank)
    weights = _check_head(hidden, weight, blank, blank_weight, blank_bias)
    batch = hidden.shape[0]
    check_reduction(reduction)
    if target_lengths is None:
        raise ValueError("target_lengths = None, but targets are given")
    _expect_tensor("targets", targets)
    _expect("targets", targets, ("S",) if targets.dim() == 1 else (batch, "U"), floating=False)
    if targets.device.type != "cpu" and targets.device != hidden.device:
        raise ValueError(f"targets is on {targets.device}, but hidden is on {hidden.device}")
    input_lengths = _lengths("input_lengths", input_lengths, batch, hidden)
    target_lengths = _lengths("target_lengths", target_lengths, batch, hidden)
    if targets.dim() == 1:
        classes = weight.shape[0] + (blank_weight is not None)
        targets = pad_targets(targets, target_lengths, classes, blank, "rows of the head", validate)
    return LinearCTCOutput(
        *linear_ctc.linear_ctc(
            hidden, *weights, targets, input_lengths, target_lengths, blank=blank,
            product_dtype=_product_dtype(hidden, weight), impl=resolve_impl(impl, hidden.device), reduction=reduction,
            zero_infinity=zero_infinity, exact=exact, validate=validate,
        )
    )  # fmt: skip


def linear_ctc_path(
    hidden: Tensor,
    weight: Tensor,
    lengths: Tensor | Sequence[int],
    *,
    blank: int,
    blank_weight: Tensor | None = None,
    blank_bias: Tensor | None = None,
    impl: str = "auto",
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Each frame's most probable id [B, T] (the lowest of several, -1 past the length) and its log-probability.

    Arguments, numerics and errors as for `linear_ctc_loss`; one product, no gradient.
    """
    blank = _integer("blank", blank)
    weights = _check_head(hidden, weight, blank, blank_weight, blank_bias)
    lengths = _lengths("lengths", lengths, hidden.shape[0], hidden)
    with torch.no_grad():
        return _linear_ctc_path(
            hidden,
            *weights,
            lengths,
            blank,
            _product_dtype(hidden, weight),
            resolve_impl(impl, hidden.device),
            validate,
        )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    exact: bool = True,
    impl: str = "auto",
    validate: bool = False,
) -> Tensor:
    """`F.cross_entropy(F.linear(hidden, weight).float(), target)` without the logits.

    Args:
        hidden: [..., D].
        weight: [V, D], the head; trained if it requires a gradient.
        target: int [...], a row of `weight`, or `ignore_index`: a row that costs nothing and may hold anything.
        reduction: "mean" over the rows that are not ignored (NaN without any), "sum", or "none": [...], 0 if ignored.
        exact: False leaves columns out of the gradient of hidden, as `linear_ctc_loss` does.
        validate: on CUDA, wait for the check of the targets.

    Products run in autocast's dtype, else in that of `weight`; the rest and the loss in float32 (float64 for float64).

    Raises:
        ValueError: tensors that do not fit; a target that is no row of `weight` (on CUDA its row's loss is NaN, and the
            error comes at backward or at the next call).
        RuntimeError: a second derivative.
    """
    _expect_tensor("hidden", hidden)
    no_forward_mode("linear_cross_entropy", hidden, weight)
    _expect("hidden", hidden, (*hidden.shape[:-1], "D") if hidden.dim() else ("...", "D"))
    _check_weight(weight, hidden)
    _expect("target", target, hidden.shape[:-1], hidden, floating=False)
    check_reduction(reduction)
    loss = kernels_linear_cross_entropy.linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]), weight, target, ignore_index=_integer("ignore_index", ignore_index),
        product_dtype=_product_dtype(hidden, weight), impl=resolve_impl(impl, hidden.device), reduction=reduction,
        exact=exact, validate=validate,
    )  # fmt: skip
    return loss.view(target.shape) if reduction == "none" else loss


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that `hidden @ weight.T` runs in: as autocast would have it, else that of the weight."""
    kind = hidden.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.float64 not in (hidden.dtype, weight.dtype)
    return torch.get_autocast_dtype(kind) if autocast else weight.dtype


def _check_head(
    hidden: Tensor, weight: Tensor, blank: int, blank_weight: Tensor | None, blank_bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    _expect("hidden", hidden, ("B", "T", "D"))
    _check_weight(weight, hidden)
    rows = weight.shape[0]
    if (blank_weight is None) != (0 <= blank < rows) or not 0 <= blank <= rows:
        raise ValueError(
            f"blank = {blank}, but it must be a row of weight (0 to {rows - 1}), or {rows} together with blank_weight"
        )
    if blank_weight is not None:
        _expect("blank_weight", blank_weight, (hidden.shape[2],), hidden)
    elif blank_bias is not None:
        raise ValueError(f"blank_bias is given, but blank = {blank} is a row of weight, which has no bias")
    if blank_bias is not None:
        _expect("blank_bias", blank_bias, (), hidden)
    return weight, blank_weight, blank_bias


def _check_weight(weight: Tensor, hidden: Tensor) -> None:
    _expect("weight", weight, ("V", hidden.shape[-1]), hidden)
    if not weight.numel():
        raise ValueError(f"weight has shape {list(weight.shape)}, but it must hold at least one row and one column")

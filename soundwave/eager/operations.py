"""Soundwave's operations in plain PyTorch, one definition each: every faster implementation must agree with it.

Dimension letters: B utterances, T frames of the longest, N = B·T, D width of the language model, E width of the
encoder, V rows of the head, U labels of the longest target, K kept frames of all utterances together.
"""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100


class LinearCTCOutput(NamedTuple):
    """`loss` (scalar, or [B] for `reduction="none"`), `path` int64 [B, T] and `path_log_prob` [B, T].

    Past a length `path` is -1 and `path_log_prob` 0; both have no gradient. Loss and log-probabilities are float32, and
    float64 for float64 input.
    """

    loss: Tensor | None
    path: Tensor
    path_log_prob: Tensor


class Peaks(NamedTuple):
    """Kept frames: `index` int64 [K] into the B·T rows, `cu_seqlens` int32 [B + 1], `max_seqlen` of one utterance."""

    index: Tensor  # hides `tuple.index`, which nobody needs here
    cu_seqlens: Tensor
    max_seqlen: int


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """True where a position is before its row's length: bool [B, size]."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """CTC (Graves et al. 2006) by its recursion over frames in log space; the gradient is autograd's.

    `F.ctc_loss` gives the same losses and is much faster, but its gradient is right only after a log-softmax.

    Args:
        log_probs: [T, B, C].
        targets: int [B, U], padded with anything past `target_lengths`.
        input_lengths, target_lengths: int [B].
        blank: class of the blank.
        reduction: "mean" (each loss over its target length, then over utterances), "sum" or "none".
        zero_infinity: an utterance that cannot be aligned counts 0, not inf. Its gradient is 0 in any case.
    """
    none = -1e30  # stands for log 0, because -inf gives NaN gradients
    input_lengths, target_lengths = input_lengths.to(log_probs.device), target_lengths.to(log_probs.device)
    labels = targets.to(log_probs.device, torch.int64)
    labels = labels.masked_fill(~length_mask(target_lengths, labels.shape[1]), blank)
    start = log_probs.new_full((labels.shape[0], labels.shape[1] + 1), none)
    # alpha of the blank after u labels [B, U + 1], and of each label [B, U].
    blanks, label = start.index_fill(1, labels.new_zeros(1), 0.0), start[:, 1:]
    differs = torch.ones_like(labels, dtype=torch.bool)
    differs[:, 1:] = labels[:, 1:] != labels[:, :-1]
    for t in range(log_probs.shape[0]):
        previous = torch.cat([start[:, :1], label], 1)
        into_label = torch.stack([label, blanks[:, :-1], previous[:, :-1].masked_fill(~differs, none)])
        inside = (t < input_lengths)[:, None]
        label = torch.where(inside, into_label.logsumexp(0) + log_probs[t].gather(1, labels), label)
        blanks = torch.where(inside, torch.logaddexp(blanks, previous) + log_probs[t, :, blank, None], blanks)
    last = torch.logaddexp(blanks, torch.cat([start[:, :1], label], 1)).gather(1, target_lengths[:, None].long())[:, 0]
    loss = torch.where(last < none / 10, 0.0 if zero_infinity else torch.inf, -last)
    if reduction == "mean":
        return (loss / target_lengths.clamp(min=1)).sum() / max(len(loss), 1)
    return loss.sum() if reduction == "sum" else loss


def linear_ctc_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    input_lengths: Tensor,
    target_lengths: Tensor | None,
    *,
    blank: int,
    blank_weight: Tensor | None = None,
    blank_bias: Tensor | None = None,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> LinearCTCOutput:
    """CTC of `softmax(hidden @ weight.T)`, and the most probable id of each frame.

    hidden [B, T, D], weight [V, D], targets int [B, U], padded with anything, lengths int [B]. `blank` is a row of
    weight, or V together with an extra row: `blank_weight` [D] and the scalar `blank_bias`. Without targets only the
    path is computed. `reduction` is that of `ctc_loss`, and `zero_infinity` too, but the loss is torch's: without
    `zero_infinity` the gradient of an utterance that cannot be aligned is NaN.

    Raises:
        ValueError: a label that is the blank or no row of the head, where torch would read past its memory.
    """
    rows = weight.shape[0]
    if (blank_weight is None) != (0 <= blank < rows) or not 0 <= blank <= rows:
        raise ValueError(
            f"blank = {blank}, but it must be a row of weight (0 to {rows - 1}), or {rows} together with blank_weight"
        )
    logits = F.linear(hidden, weight)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(dtype)
    if blank_weight is not None:
        blank_logit = (hidden.to(dtype) * blank_weight.to(dtype)).sum(-1, keepdim=True)
        if blank_bias is not None:
            blank_logit = blank_logit + blank_bias
        logits = torch.cat([logits, blank_logit], dim=-1)
    log_probs = logits.log_softmax(-1)
    valid = length_mask(input_lengths.to(hidden.device), hidden.shape[1])
    path_log_prob, path = log_probs.detach().max(-1)
    path, path_log_prob = path.masked_fill(~valid, -1), path_log_prob.masked_fill(~valid, 0.0)
    if targets is None:
        return LinearCTCOutput(None, path, path_log_prob)
    if target_lengths is None:
        raise ValueError("target_lengths = None, but targets are given")
    _check_labels(targets, target_lengths, logits.shape[-1], blank)
    loss = F.ctc_loss(
        log_probs.transpose(0, 1), targets, input_lengths, target_lengths, blank, reduction, zero_infinity
    )
    return LinearCTCOutput(loss, path, path_log_prob)


def linear_ctc_path(
    hidden: Tensor,
    weight: Tensor,
    lengths: Tensor,
    *,
    blank: int,
    blank_weight: Tensor | None = None,
    blank_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`path` and `path_log_prob` of `linear_ctc_loss`, without a loss."""
    _, path, path_log_prob = linear_ctc_loss(
        hidden, weight, None, lengths, None, blank=blank, blank_weight=blank_weight, blank_bias=blank_bias
    )
    return path, path_log_prob


def _check_labels(targets: Tensor, target_lengths: Tensor, rows: int, blank: int) -> None:
    wrong = (targets < 0) | (targets >= rows) | (targets == blank)
    if targets.dim() == 1:  # concatenated, as `F.ctc_loss` takes them too
        wrong = wrong[: int(target_lengths.sum())]
    else:
        wrong &= length_mask(target_lengths.to(targets.device), targets.shape[1])
    places = wrong.nonzero().tolist()
    if places:
        label = int(targets[tuple(places[0])])
        what = "is the blank" if label == blank else f"is not one of the head's {rows} rows"
        raise ValueError(f"targets{places[0]} = {label}, but that {what}")


@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = ..., class_weight: Tensor | None = ...,
    ignore_index: int = ..., label_smoothing: float = ..., softcap: float | None = ..., z_loss: float = ...,
    reduction: str = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = ..., class_weight: Tensor | None = ...,
    ignore_index: int = ..., label_smoothing: float = ..., softcap: float | None = ..., z_loss: float = ...,
    reduction: str = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = ..., class_weight: Tensor | None = ...,
    ignore_index: int = ..., label_smoothing: float = ..., softcap: float | None = ..., z_loss: float = ...,
    reduction: str = ..., return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of `softmax(hidden @ weight.T)`: hidden [N, D], weight [V, D], target int [N] -> scalar, or [N].

    Logits have `bias` [V] added and become `softcap·tanh(logits / softcap)`. `class_weight` [V] and `label_smoothing`
    are those of `F.cross_entropy`. `z_loss` times the squared log-sum-exp of the logits is added to each row's loss;
    its mean is that over rows, whatever their class weights. With `return_lse` the log-sum-exp [N] comes with the loss.
    The product runs in the dtype of its operands, the rest in float32 (float64 for float64).
    """
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    weights = None if class_weight is None else class_weight.to(logits.dtype)
    loss = F.cross_entropy(
        logits, target, weights, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    if not z_loss and not return_lse:
        return loss
    ignored = target == ignore_index
    lse = logits.logsumexp(1).masked_fill(ignored, 0.0)
    if z_loss:
        penalty = z_loss * lse.square()
        if reduction != "none":
            penalty = penalty.sum() / ((~ignored).sum() if reduction == "mean" else 1)
        loss = loss + penalty
    return (loss, lse) if return_lse else loss


def ctc_peaks(path: Tensor, lengths: Tensor, *, blank: int, keep: str = "peaks", scores: Tensor | None = None) -> Peaks:
    """One frame for each run of equal ids on a CTC path int [B, T], within lengths int [B].

    keep="peaks" takes the frame of the highest score in every run of a non-blank id: the first of equal scores, none if
    one of them is NaN. It needs scores [B, T], e.g. `path_log_prob`. keep="runs" takes the first frame of every run,
    including runs of the blank. An utterance of at least one frame keeps at least one: frame 0 if it would keep none.
    """
    batch, size = path.shape
    if not batch or not size:
        return Peaks(
            torch.zeros(0, dtype=torch.int64, device=path.device),
            torch.zeros(batch + 1, dtype=torch.int32, device=path.device),
            0,
        )
    valid = length_mask(lengths.to(path.device), size)
    path = path.masked_fill(~valid, -1)
    first = valid.clone()
    first[:, 1:] &= path[:, 1:] != path[:, :-1]
    if keep == "runs":
        kept = first
    elif keep == "peaks":
        if scores is None:
            raise ValueError("scores = None, but keep='peaks' chooses by the score of each frame")
        run = first.flatten().cumsum(0).sub(1).clamp(min=0)
        flat_scores = scores.float().flatten()
        labelled = (valid & (path != blank)).flatten()
        highest = torch.full_like(flat_scores, -torch.inf)
        highest = highest.scatter_reduce(0, run, flat_scores.masked_fill(~labelled, -torch.inf), "amax")
        position = torch.arange(path.numel(), device=path.device)
        candidate = torch.where(labelled & (flat_scores == highest[run]), position, path.numel())
        chosen = torch.full_like(position, path.numel()).scatter_reduce(0, run, candidate, "amin")
        kept = (labelled & (position == chosen[run])).view(batch, size)
    else:
        raise ValueError(f"keep = {keep!r}, but it must be 'peaks' or 'runs'")
    kept[:, 0] |= valid[:, 0] & ~kept.any(1)
    counts = kept.sum(1)
    cu_seqlens = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    return Peaks(kept.flatten().nonzero().squeeze(1), cu_seqlens, int(counts.max()))


def every_frame(lengths: Tensor, size: int) -> Peaks:
    """All frames of utterances of `lengths` int [B], padded to `size`: instead of `ctc_peaks`, without shrinking."""
    kept = length_mask(lengths, size)
    cu_seqlens = F.pad(kept.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return Peaks(kept.flatten().nonzero().squeeze(1), cu_seqlens, int(lengths.max()) if len(lengths) else 0)


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
) -> Tensor:
    """Attention of packed queries [K, H, E] to the packed keys and values [N, H, E] of the same utterance: [K, H, E].

    One utterance after the other, with bounds int [B + 1]; 0 for an utterance without keys. `max_seqlen_q` and
    `max_seqlen_k` are not needed here, but packed kernels take them. `scale` None is 1 / sqrt(E).
    """
    factor = query.shape[2] ** -0.5 if scale is None else scale
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    parts = [query[:0]]
    for b in range(len(bounds_q) - 1):
        q = query[bounds_q[b] : bounds_q[b + 1]]
        k, v = (x[bounds_k[b] : bounds_k[b + 1]] for x in (key, value))
        scores = torch.einsum("mhe,nhe->hmn", q, k) * factor
        parts.append(torch.einsum("hmn,nhe->mhe", scores.softmax(-1), v))
    return torch.cat(parts)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    residual_index: Tensor | None = None,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm of the rows of `x + residual` [N, D]; with `return_sum` also the sum.

    With `residual_index` int [N] row `residual_index[n]` of `residual` [R, D] is added to `x[n]`. `weight` and `bias`
    are [D]. The result has the promoted dtype of x and residual.
    """
    total = x + (residual if residual_index is None else residual[residual_index])
    y = F.layer_norm(total, total.shape[-1:], weight.to(total.dtype), bias.to(total.dtype), eps)
    return (y, total) if return_sum else y


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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Put the speech rows of each utterance in the place of its placeholder token.

    embeddings [B, L, D], input_ids, attention_mask and labels int [B, L], speech [K, D] with the bounds int [A + 1] of
    its A recordings -> embeddings [B, L', D], attention mask int64 [B, L'], and labels [B, L'] or None. A row holds one
    placeholder or none, and speech rows and padding have the label -100. "left" pads on the left, for generation.

    Raises:
        ValueError: a row with several placeholders; a number of placeholders that is not the number of recordings.
    """
    batch, width = input_ids.shape
    device = input_ids.device
    is_audio = (input_ids == audio_placeholder_id) & attention_mask.bool()
    has_audio = is_audio.any(1)
    if (is_audio.sum(1) > 1).any():
        raise ValueError(
            "input_ids holds the audio placeholder more than once in a row, but one recording a row is supported"
        )
    if int(has_audio.sum()) != cu_seqlens.numel() - 1:
        raise ValueError(
            f"input_ids has {int(has_audio.sum())} rows with an audio placeholder, "
            f"but cu_seqlens bounds {cu_seqlens.numel() - 1} recordings"
        )
    kept = torch.zeros(batch, dtype=torch.int64, device=device)
    kept[has_audio] = cu_seqlens.diff().to(device, torch.int64)
    # A token takes one place, the placeholder as many as its recording has rows, padding none.
    places = torch.where(is_audio, kept[:, None], attention_mask.bool().to(torch.int64))
    ends = places.cumsum(1)
    total = places.sum(1)
    size = int(total.max()) if batch else 0
    shift = (size - total)[:, None] if padding_side == "left" else torch.zeros_like(total)[:, None]
    row = torch.arange(batch, device=device)[:, None].expand(batch, width)
    is_text = attention_mask.bool() & ~is_audio
    text_row, text_column = row[is_text], (ends - 1 + shift)[is_text]

    speech_row = torch.repeat_interleave(torch.arange(batch, device=device), kept)
    start = ((ends - places) + shift)[is_audio]
    within = torch.arange(speech.shape[0], device=device) - cu_seqlens[:-1].to(device, torch.int64).repeat_interleave(
        cu_seqlens.diff().to(device)
    )
    speech_column = start.repeat_interleave(kept[has_audio]) + within

    out = embeddings.new_zeros(batch, size, embeddings.shape[-1])
    out = out.index_put((text_row, text_column), embeddings[is_text])
    out = out.index_put((speech_row, speech_column), speech.to(out.dtype))
    mask = torch.zeros(batch, size, dtype=torch.int64, device=device)
    mask[text_row, text_column] = 1
    mask[speech_row, speech_column] = 1
    if labels is None:
        return out, mask, None
    new_labels = labels.new_full((batch, size), IGNORE_INDEX)
    new_labels[text_row, text_column] = labels[is_text]
    return out, mask, new_labels

"""Soundwave's operations and adapters in plain PyTorch: the definition that everything faster is held to.

Dimension letters: B utterances, T frames of the longest, N = B·T, D width of the language model, E width of the
encoder, V rows of the head, U labels of the longest target, K kept frames of all utterances together.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORE_INDEX = -100


class LinearCTCOutput(NamedTuple):
    """`loss` (scalar, or [B] for `reduction="none"`), `path` int64 [B, T] and `path_log_prob` [B, T].

    Both floating-point ones are float32, and float64 for float64 input.
    """

    loss: Tensor | None
    path: Tensor
    path_log_prob: Tensor


class Peaks(NamedTuple):
    """Kept frames: `index` int64 [K] into the B·T rows, `cu_seqlens` int32 [B + 1], `max_seqlen` of one utterance."""

    index: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """True where a position is before its row's length: bool [B, size]."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


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
    """CTC of `softmax(hidden @ weight.T)`, and each frame's most probable id.

    Args:
        hidden: [B, T, D].
        weight: [V, D], the head.
        targets: int [B, U], padded with anything past `target_lengths`; None computes the path only.
        input_lengths, target_lengths: int [B].
        blank: a row of `weight`, or `V` together with `blank_weight` [D] and the scalar `blank_bias`: one extra row.
        reduction: "mean" (each loss over its target length, then over utterances), "sum" or "none".
        zero_infinity: an utterance that cannot be aligned counts 0 and has no gradient.

    Returns:
        `path` is -1 and `path_log_prob` 0 past an utterance's length; both carry no gradient.

    Raises:
        ValueError: a label that is blank or no row of the head; torch reads past its memory instead.
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
    _check_labels(targets, target_lengths, logits.shape[-1], blank)
    loss = F.ctc_loss(
        log_probs.transpose(0, 1), targets, input_lengths, target_lengths, blank, reduction, zero_infinity
    )
    return LinearCTCOutput(loss, path, path_log_prob)


def _check_labels(targets: Tensor, target_lengths: Tensor, rows: int, blank: int) -> None:
    if targets.dim() == 1:  # concatenated, as `F.ctc_loss` takes them too
        targets = targets[None, : int(target_lengths.sum())]
        valid = torch.ones_like(targets, dtype=torch.bool)
    else:
        valid = length_mask(target_lengths.to(targets.device), targets.shape[1])
    wrong = (valid & ((targets < 0) | (targets >= rows) | (targets == blank))).nonzero()
    if wrong.numel():
        row, column = wrong[0].tolist()
        label = int(targets[row, column])
        what = "is the blank" if label == blank else f"is not one of the head's {rows} rows"
        raise ValueError(f"targets[{row}, {column}] = {label}, but that {what}")


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, ignore_index: int = IGNORE_INDEX, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of `softmax(hidden @ weight.T)`: hidden [N, D], weight [V, D], target int [N] -> scalar, or [N].

    The product runs in its own dtype, the rest in float32 (float64 for float64).
    """
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)


def ctc_peaks(path: Tensor, lengths: Tensor, *, blank: int, keep: str = "peaks", scores: Tensor | None = None) -> Peaks:
    """Frames that stand for a run of equal ids on a CTC path.

    Args:
        path: int [B, T], one id a frame; values past `lengths` are ignored.
        lengths: int [B].
        keep: "peaks" keeps of each run of a non-blank id the frame of the highest score (the first, where scores tie);
            "runs" keeps the first frame of every run, of blank too.
        scores: float [B, T], e.g. `path_log_prob`; needed for "peaks".

    An utterance of at least one frame keeps at least one (frame 0, where all is blank).
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
        best = torch.full_like(flat_scores, -torch.inf)
        best = best.scatter_reduce(0, run, flat_scores.masked_fill(~labelled, -torch.inf), "amax")
        position = torch.arange(path.numel(), device=path.device)
        candidate = torch.where(labelled & (flat_scores == best[run]), position, path.numel())
        chosen = torch.full_like(position, path.numel()).scatter_reduce(0, run, candidate, "amin")
        kept = (labelled & (position == chosen[run])).view(batch, size)
    else:
        raise ValueError(f"keep = {keep!r}, but it must be 'peaks' or 'runs'")
    kept[:, 0] |= valid[:, 0] & ~kept.any(1)
    counts = kept.sum(1)
    cu_seqlens = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    return Peaks(kept.flatten().nonzero().squeeze(1), cu_seqlens, int(counts.max()))


def every_frame(lengths: Tensor, size: int) -> Peaks:
    """All frames of utterances of `lengths` int [B], padded to `size`: in the place of `ctc_peaks`, nothing shrinks."""
    kept = length_mask(lengths, size)
    cu_seqlens = F.pad(kept.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return Peaks(kept.flatten().nonzero().squeeze(1), cu_seqlens, int(lengths.max()) if len(lengths) else 0)


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
    """Put each utterance's speech rows where its placeholder token stands.

    Args:
        embeddings: [B, L, D] of `input_ids` (anything at the placeholder).
        input_ids, attention_mask: int [B, L]; a row holds the placeholder once, or not at all (text only).
        speech: [K, D], the rows of the utterances that have one, in order; `cu_seqlens` int [A + 1] bounds them.
        labels: int [B, L], aligned with `input_ids`; every speech row gets -100.
        padding_side: where the result is padded: "right" for training, "left" for generation.

    Returns:
        embeddings [B, L', D], attention mask int64 [B, L'], labels [B, L'] or None.
    """
    batch, width = input_ids.shape
    device = input_ids.device
    is_audio = (input_ids == audio_placeholder_id) & attention_mask.bool()
    has_audio = is_audio.any(1)
    if int(is_audio.sum(1).max()) > 1:
        raise ValueError(
            "input_ids holds the audio placeholder more than once in a row, but one recording is supported"
        )
    if int(has_audio.sum()) != cu_seqlens.numel() - 1:
        raise ValueError(
            f"input_ids has {int(has_audio.sum())} rows with an audio placeholder, "
            f"but input_features holds {cu_seqlens.numel() - 1} recordings"
        )
    kept = torch.zeros(batch, dtype=torch.int64, device=device)
    kept[has_audio] = cu_seqlens.diff().to(device, torch.int64)
    # Each token takes its own place, the placeholder as many as it has rows, padding none.
    places = torch.where(is_audio, kept[:, None], attention_mask.to(torch.int64))
    ends = places.cumsum(1)
    total = ends[:, -1]
    size = int(total.max())
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


def attention_mask(mask: Tensor) -> Tensor | None:
    """For bool [B, T] of the keys: [B, 1, 1, T]; None where all are seen to be valid, with which attention is faster.

    To look makes the host wait for a GPU; a compiled graph would break, and a tensor without data has nothing to show.
    """
    unseen = torch.compiler.is_compiling() or mask.is_meta
    return mask[:, None, None, :] if unseen or not mask.all() else None


class SelfAttention(nn.Module):
    """Self-attention with the parameters of `nn.MultiheadAttention`; `attend="self"` keeps each frame to itself."""

    def __init__(self, hidden_size: int, num_heads: int, attend: str):
        super().__init__()
        self.num_heads, self.attend = num_heads, attend
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * hidden_size))
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`x` [B, T, D], `mask` bool [B, T] of valid frames -> [B, T, D]."""
        batch, size, width = x.shape
        if self.attend == "self":  # softmax over one key is 1: only the values remain
            return self.out_proj(F.linear(x, self.in_proj_weight[2 * width :], self.in_proj_bias[2 * width :]))
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(batch, size, 3, self.num_heads, -1)
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
    """Encoder frames -> the language model's embedding space (arXiv 2502.12900, §2).

    Neighbouring frames are concatenated (`frame_stack`), projected, sent through one Transformer layer and normalised.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.frame_stack = config.frame_stack
        self.projector = nn.Linear(config.frame_stack * config.audio_hidden_size, config.hidden_size)
        self.layer = AdapterLayer(
            config.hidden_size,
            config.num_attention_heads,
            config.attend,
            config.adapter_dropout,
            config.layer_norm_eps,
        )
        self.out_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """`frames` [B, T_enc, E], `lengths` int [B] -> hidden [B, ceil(T_enc / stack), D] and its lengths.

        A last group that is not full is filled with zero frames.
        """
        stack = self.frame_stack
        frames = frames.masked_fill(~length_mask(lengths, frames.shape[1])[..., None], 0.0)
        frames = F.pad(frames, (0, 0, 0, -frames.shape[1] % stack))
        lengths = (lengths + stack - 1) // stack
        hidden = self.projector(frames.reshape(frames.shape[0], -1, stack * frames.shape[2]))
        mask = length_mask(lengths, hidden.shape[1])
        return self.out_norm(self.layer(hidden, mask)), lengths


class ShrinkingAdapter(nn.Module):
    """Kept frames gather what lies around them (arXiv 2502.12900, §2).

    `LayerNorm(x' + Attn(x' W_q, x W_k, x W_v) W_o)`, x' the kept rows of x; LayerNorm(x') with `keys = "none"`.
    """

    def __init__(self, config: Any):
        super().__init__()
        width = config.hidden_size
        self.num_heads, self.keys = config.num_attention_heads, config.keys
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
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

"""CTC peaks: one frame for each run of equal ids on a path, chosen and packed on the device.

    keep="runs"   the first frame of every run, of blank too
    keep="peaks"  the frame of the highest score of every run of a non-blank id; the first of equal scores

An utterance of at least one frame keeps at least one: frame 0 if nothing else is kept.

Shapes    path int [B, T], lengths int [B], scores [B, T] -> index int64 [K] into the B·T rows, rising;
          cu_seqlens int32 [B + 1], the bounds of each utterance in it; max_seqlen, the longest utterance in it.
Numerics  scores are compared in fp32. A run that holds a NaN score has no peak.
Cost      path and scores are read once, 16·B·T bytes are written beside the result. K and max_seqlen come to the host
          in one copy, which is the only wait for the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from soundwave.kernels.dispatch import ranged, resolve_impl, to_device

MAX_BLOCK_T = 1024  # frames a step, eight a thread in four warps: 40 s at 25 Hz, so one step for Whisper's 30 s
COPY_BLOCK = 1024  # kept frames a program of the second kernel
NUM_WARPS = 4
KEEP = ("peaks", "runs")


def _config(size: int) -> int:
    """Frames a step of the first kernel, for paths of `size` frames; the same for every architecture.

    One frame a thread at least: shorter blocks save nothing, and a rare batch of short clips would be compiled for.
    """
    return min(max(triton.next_power_of_2(size), 32 * NUM_WARPS), MAX_BLOCK_T)


def _kept_frames(path: Tensor, lengths: Tensor, scores: Tensor | None, blank: int, keep: str) -> Tensor:
    """bool [B, T], true where a frame is kept, without a loop."""
    batch, size = path.shape
    valid = torch.arange(size, device=path.device) < lengths[:, None]
    first = valid.clone()
    first[:, 1:] &= path[:, 1:] != path[:, :-1]
    if keep == "runs":
        kept = first
    else:
        run = first.flatten().cumsum(0).sub_(1).clamp_(min=0)
        labelled = (valid & (path != blank)).flatten()
        score = scores.flatten().float().masked_fill(~labelled, -torch.inf)
        highest = torch.full_like(score, -torch.inf).scatter_reduce_(0, run, score, "amax")
        frame = torch.arange(path.numel(), device=path.device)
        candidate = frame.where(labelled & (score == highest[run]), path.numel())
        chosen = torch.full_like(frame, path.numel()).scatter_reduce_(0, run, candidate, "amin")
        kept = (frame == chosen[run]).view(batch, size)
    kept[:, 0] |= valid[:, 0] & ~kept.any(1)
    return kept


@triton.jit
def _better(first_a, score_a, frame_a, first_b, score_b, frame_b):
    """For a scan of (a run starts here, highest score, its frame). The start of a run discards all to its left."""
    take_b = (first_b != 0) | (score_b > score_a) | ((score_b == score_a) & (frame_b < frame_a))
    return first_a | first_b, tl.where(take_b, score_b, score_a), tl.where(take_b, frame_b, frame_a)


@triton.jit(do_not_specialize=["T", "PATH_STRIDE", "SCORES_STRIDE"])  # they vary from batch to batch
def _ctc_peaks_kernel(
    PATH, LENGTHS, SCORES, FRAMES, COUNTS, T, PATH_STRIDE, SCORES_STRIDE, BLANK,
    PEAKS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One utterance: its kept frames, as rows of the B·T, at the start of FRAMES[b]; their number in COUNTS[b]."""
    b = tl.program_id(0).to(tl.int64)
    length = tl.minimum(tl.maximum(tl.load(LENGTHS + b), 0), T).to(tl.int32)
    path, scores, out = PATH + b * PATH_STRIDE, SCORES + b * SCORES_STRIDE, FRAMES + b * T
    step = tl.arange(0, BLOCK_T)
    count = tl.zeros([], dtype=tl.int32)
    carried_score, carried_frame = tl.full([], float("-inf"), tl.float32), tl.full([], 0, tl.int32)
    for start in range(0, length, BLOCK_T):
        t = start + step
        valid = t < length
        label = tl.load(path + t, mask=valid, other=-1)
        previous = tl.load(path + t - 1, mask=valid & (t > 0), other=-1)
        first = valid & ((t == 0) | (label != previous))
        if PEAKS:
            following = tl.load(path + t + 1, mask=t + 1 < length, other=-1)
            emit = valid & ((t + 1 == length) | (label != following)) & (label != BLANK)  # at the end of a run
            score = tl.load(scores + t, mask=valid, other=float("-inf")).to(tl.float32)
            # NaN counts as the highest score, at frame -1, which is not emitted: a run with NaN has no peak.
            unordered = score != score
            score, frame = tl.where(unordered, float("inf"), score), tl.where(unordered, -1, t)
            seen, highest, frame = tl.associative_scan((first.to(tl.int32), score, frame), 0, _better)
            _, highest, frame = _better(0, carried_score, carried_frame, seen, highest, frame)
            carried_score = tl.sum(tl.where(step == BLOCK_T - 1, highest, 0.0), 0)
            carried_frame = tl.sum(tl.where(step == BLOCK_T - 1, frame, 0), 0)
            emit = emit & (frame >= 0)
        else:
            emit, frame = first, t
        place = count + tl.cumsum(emit.to(tl.int32), 0) - 1
        tl.store(out + place, b * T + frame, mask=emit)
        count += tl.sum(emit.to(tl.int32), 0)
    if (count == 0) & (length > 0):
        tl.store(out, b * T)
        count = tl.full([], 1, tl.int32)
    tl.store(COUNTS + b, count)


@triton.jit(do_not_specialize=["T"])
def _pack_frames_kernel(FRAMES, CU_SEQLENS, INDEX, T, BLOCK: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    start = tl.load(CU_SEQLENS + b).to(tl.int64)
    count = tl.load(CU_SEQLENS + b + 1).to(tl.int64) - start
    position = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mine = position < count
    tl.store(INDEX + start + position, tl.load(FRAMES + b * T + position, mask=mine, other=0), mask=mine)


@torch.library.custom_op("soundwave::ctc_peaks", mutates_args=())
@ranged("soundwave.ctc_peaks")
def _ctc_peaks(
    path: Tensor, lengths: Tensor, scores: Tensor | None, blank: int, keep: str, impl: str
) -> tuple[Tensor, Tensor, int]:
    """As `ctc_peaks`. max_seqlen is an int, because it is on the host already and compilers trace it as a size."""
    (batch, size), device = path.shape, path.device
    if lengths.device.type == "cpu" and batch:  # there reading them costs nothing
        wrong = ((lengths < 0) | (lengths > size)).nonzero()
        if wrong.numel():
            b = int(wrong[0])
            raise ValueError(f"lengths[{b}] = {int(lengths[b])}, but it must be 0 to {size}, the frames of path")
    lengths = to_device(lengths, device)
    cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=device)
    if not batch or not size:
        return path.new_empty(0, dtype=torch.int64), cu_seqlens, 0
    if impl == "torch":
        kept = _kept_frames(path, lengths, scores, blank, keep)
        total, longest = _bound(cu_seqlens, kept.sum(1))
        # The k-th kept frame is where the cumulative count reaches k.
        index = torch.searchsorted(kept.flatten().cumsum(0), torch.arange(1, total + 1, device=device))
        return index, cu_seqlens, longest
    path = path if path.stride(1) == 1 else path.contiguous()
    scores = path if scores is None else scores if scores.stride(1) == 1 else scores.contiguous()
    frames = path.new_empty((batch, size), dtype=torch.int64)
    counts = path.new_empty(batch, dtype=torch.int32)
    _ctc_peaks_kernel[(batch,)](
        path, lengths.contiguous(), scores, frames, counts, size, path.stride(0), scores.stride(0), blank,
        PEAKS=keep == "peaks", BLOCK_T=_config(size), num_warps=NUM_WARPS,
    )  # fmt: skip
    total, longest = _bound(cu_seqlens, counts)
    index = path.new_empty(total, dtype=torch.int64)
    if total:
        grid = (batch, triton.cdiv(longest, COPY_BLOCK))
        _pack_frames_kernel[grid](frames, cu_seqlens, index, size, BLOCK=COPY_BLOCK, num_warps=NUM_WARPS)
    return index, cu_seqlens, longest


def _bound(cu_seqlens: Tensor, counts: Tensor) -> tuple[int, int]:
    """Write the bounds of utterances of `counts` kept frames; return K and max_seqlen, in one copy to the host."""
    cu_seqlens[1:] = counts.cumsum(0)
    total, longest = torch.stack([counts.sum(), counts.max()]).tolist()
    return total, longest


@_ctc_peaks.register_fake
def _(path, lengths, scores, blank, keep, impl):
    context = torch.library.get_ctx()
    total, longest = context.new_dynamic_size(), context.new_dynamic_size()
    index = path.new_empty(total, dtype=torch.int64)
    return index, path.new_empty(path.shape[0] + 1, dtype=torch.int32), longest


def ctc_peaks(
    path: Tensor, lengths: Tensor, scores: Tensor | None, *, blank: int, keep: str, impl: str = "auto"
) -> tuple[Tensor, Tensor, int]:
    """index int64 [K], cu_seqlens int32 [B + 1] and max_seqlen, an int (a symbolic one under `torch.compile`).

    Args:
        path: int [B, T], one id a frame; values past `lengths` are ignored.
        lengths: int [B], on any device. ValueError for one on the CPU that is not 0 to T; on CUDA it counts as 0 or T.
        scores: float [B, T]; None for "runs".
        blank: the id of the blank.
        keep: "peaks" or "runs".
        impl: "auto", "triton" or "torch".
    """
    scores = None if scores is None else scores.detach()
    return _ctc_peaks(path, lengths, scores, blank, keep, resolve_impl(impl, path.device))

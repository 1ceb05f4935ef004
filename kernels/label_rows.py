"""What happens to each frame's labels around the lattice: two passes over frames, `linear_ctc`'s maths and letters.

    path = argmax of labels and all other columns      log_prob[c] = (z[c] - maximum) - log_sum
    gradient[c] = P[c] - gamma[c], of the most probable label above 1/2 minus the sum of all other columns

Shapes    label_logits [N, C]; labels int64 [B, C], -1 in unused columns; `stats` [N] of all other columns; posteriors
          [T, B, C] -> path and path_log_prob [B, T], log_probs and gradient [B, T, C]. N packed rows, of which those of
          utterance b begin at starts[b]. Past a length path is -1, and path_log_prob and gradient are 0.
Numerics  in the dtype of label_logits, fp32 or fp64.       Of equal logits the lowest id is the argmax.
Cost      each frame's labels are read and written once or twice: N·C numbers, next to nothing beside the logits. On a
          GPU these are two launches; in torch they are some fifty.
Bitwise deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from soundwave.kernels.linear_ctc_path import Packed, argmax_path
from soundwave.kernels.vocab_rows import RowStats

LN2 = 0.6931471805599453
LOG_HALF = tl.constexpr(-LN2)
NO_LABEL = tl.constexpr(2**63 - 1)
LOSS_BLOCK = 64  # utterances whose losses one program computes
LARGEST_BLOCK = 512  # labels a step: four a thread of four warps; with eight some cards spill
VARYING = ["T", "C", "B"]  # from batch to batch; a kernel for each kind of value would be compiled again and again


def _config(columns: int) -> tuple[int, int]:
    """(BLOCK, warps): two sizes for all numbers of labels, because each is another kernel to compile."""
    block = min(128 if columns <= 128 else 512, LARGEST_BLOCK)
    return block, 1 if block <= 128 else 4


@triton.jit(do_not_specialize=VARYING)
def _label_path_kernel(
    LABEL_LOGITS, LABELS, LENGTHS, STARTS, MAXIMUM, ARGMAX, LOG_SUM, PATH, PATH_LOG_PROB, LOG_PROBS, T, C,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One frame: its most probable id, and the log-probabilities of its labels."""
    row = tl.program_id(0).to(tl.int64)
    b, t = row // T, row % T
    if t < tl.load(LENGTHS + b):
        n = tl.load(STARTS + b) + t
        lowest = float("-inf")
        maximum = tl.full([BLOCK], lowest, LABEL_LOGITS.dtype.element_ty)
        for start in range(0, C, BLOCK):
            c = start + tl.arange(0, BLOCK)
            maximum = tl.maximum(maximum, tl.load(LABEL_LOGITS + n * C + c, mask=c < C, other=lowest))
        of_labels, of_others, log_sum = tl.max(maximum, 0), tl.load(MAXIMUM + n), tl.load(LOG_SUM + n)
        highest = tl.maximum(of_labels, of_others)
        first = tl.full([BLOCK], NO_LABEL, tl.int64)
        for start in range(0, C, BLOCK):
            c = start + tl.arange(0, BLOCK)
            logit = tl.load(LABEL_LOGITS + n * C + c, mask=c < C, other=lowest)
            label = tl.load(LABELS + b * C + c, mask=c < C, other=-1)
            first = tl.minimum(first, tl.where((logit == of_labels) & (label >= 0), label, NO_LABEL))
            tl.store(LOG_PROBS + row * C + c, (logit - highest) - log_sum, mask=c < C)
        label, other = tl.min(first, 0), tl.load(ARGMAX + n)
        is_label = (of_labels > of_others) | ((of_labels == of_others) & (label < other))
        tl.store(PATH + row, tl.where(is_label, label, other))
        tl.store(PATH_LOG_PROB + row, 0.0 - log_sum)
    else:
        tl.store(PATH + row, tl.full([], -1, tl.int64))
        tl.store(PATH_LOG_PROB + row, tl.zeros([], PATH_LOG_PROB.dtype.element_ty))


@triton.jit(do_not_specialize=VARYING)
def _label_gradient_kernel(
    LOG_PROBS, POSTERIORS, ALIGNED, LENGTHS, STARTS, OFF_LABEL_MASS, OUT, B, T, C, BLOCK: tl.constexpr
):
    """One frame: the gradients of its labels' logits."""
    row = tl.program_id(0).to(tl.int64)
    b, t = row // T, row % T
    lane = tl.arange(0, BLOCK)
    dtype = OUT.dtype.element_ty
    if (t < tl.load(LENGTHS + b)) & tl.load(ALIGNED + b):
        LOG_PROBS_ROW, GAMMA = LOG_PROBS + row * C, POSTERIORS + (t * B + b) * C
        maximum, at = tl.full([BLOCK], float("-inf"), dtype), tl.zeros([BLOCK], tl.int32)
        for start in range(0, C, BLOCK):
            c = start + lane
            x = tl.load(LOG_PROBS_ROW + c, mask=c < C, other=float("-inf"))
            at = tl.where(x > maximum, c, at)
            maximum = tl.maximum(maximum, x)
        highest = tl.max(maximum, 0)
        place = tl.min(tl.where(maximum == highest, at, C), 0)
        others = tl.zeros([BLOCK], dtype)
        for start in range(0, C, BLOCK):
            c = start + lane
            x = tl.load(LOG_PROBS_ROW + c, mask=c < C, other=float("-inf"))
            others += tl.where(c == place, 0.0, tl.exp(x) - tl.load(GAMMA + c, mask=c < C, other=0.0))
        rest = tl.sum(others, 0) + tl.load(OFF_LABEL_MASS + tl.load(STARTS + b) + t)
        sure = tl.where(highest > LOG_HALF, place, C)
        for start in range(0, C, BLOCK):
            c = start + lane
            x = tl.load(LOG_PROBS_ROW + c, mask=c < C, other=float("-inf"))
            gradient = tl.exp(x) - tl.load(GAMMA + c, mask=c < C, other=0.0)
            tl.store(OUT + row * C + c, tl.where(c == sure, -rest, gradient), mask=c < C)
    else:
        for start in range(0, C, BLOCK):
            c = start + lane
            tl.store(OUT + row * C + c, tl.zeros([BLOCK], dtype), mask=c < C)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=["DIVISOR", "FEASIBLE"])
def _loss_kernel(
    NLL, FACTOR, FEASIBLE, WRONG, DIVISOR, LOSS, SCALE, ALIGNED, B,
    ZERO_INFINITY: tl.constexpr, MEAN: tl.constexpr, CHECKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK utterances: their losses, the factors of their gradients, and whether they have one."""
    b = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = b < B
    nll = tl.load(NLL + b, mask=inside, other=0.0)
    infinite = nll == float("inf")
    tl.store(SCALE + b, tl.where(infinite, 0.0, tl.load(FACTOR + b, mask=inside, other=0.0)), mask=inside)
    tl.store(ALIGNED + b, tl.load(FEASIBLE + b, mask=inside, other=0) & (nll != float("inf")), mask=inside)
    loss = tl.where(infinite, 0.0, nll) if ZERO_INFINITY else nll
    if CHECKED:
        loss = tl.where(tl.load(WRONG + b, mask=inside, other=0), float("nan"), loss)
    if MEAN:
        loss = loss / tl.load(DIVISOR + b, mask=inside, other=1).to(loss.dtype)
    tl.store(LOSS + b, loss, mask=inside)


def label_path(
    label_logits: Tensor, labels: Tensor, lengths: Tensor, stats: RowStats, packed: Packed, hidden: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """path, path_log_prob [B, T] and log_probs [B, T, C]."""
    (batch, size), columns = hidden.shape[:2], labels.shape[1]
    if impl == "torch":
        blank = labels[:, :1]
        path, path_log_prob = argmax_path(label_logits, labels.where(labels >= 0, blank), stats, packed, hidden)
        maximum = torch.maximum(label_logits.amax(1), stats.maximum)
        log_probs = (label_logits - maximum[:, None]) - stats.log_sum[:, None]
        return path, path_log_prob, packed.pad(log_probs, hidden)
    path, path_log_prob = labels.new_empty(batch, size), label_logits.new_empty(batch, size)
    log_probs = label_logits.new_empty(batch, size, columns)
    block, warps = _config(columns)
    if batch and size:
        with torch.cuda.device_of(label_logits):
            _label_path_kernel[(batch * size,)](
                label_logits, labels, lengths, packed.starts, stats.maximum, stats.argmax, stats.log_sum, path,
                path_log_prob, log_probs, size, columns, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return path, path_log_prob, log_probs


def label_gradients(
    log_probs: Tensor, gamma: Tensor, aligned: Tensor, lengths: Tensor, stats: RowStats, packed: Packed, impl: str
) -> Tensor:
    """P_labels - gamma [B, T, C] from log_probs [B, T, C] and gamma [T, B, C]; 0 where not `aligned` bool [B]."""
    batch, size, columns = log_probs.shape
    if impl == "torch":
        rows = (x.flatten(0, 1)[packed.place] for x in (log_probs, gamma.transpose(0, 1)))
        gradient = label_gradient(*rows, stats)
        gradient.masked_fill_(~aligned[packed.utterance, None], 0.0)
        return packed.pad(gradient, log_probs)
    out = torch.empty_like(log_probs)
    block, warps = _config(columns)
    if batch and size:
        with torch.cuda.device_of(log_probs):
            _label_gradient_kernel[(batch * size,)](
                log_probs, gamma, aligned, lengths, packed.starts, stats.off_label_mass, out, batch, size, columns,
                BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return out


def utterance_losses(
    nll: Tensor, factor: Tensor, feasible: Tensor, wrong: Tensor | None, divisor: Tensor | None, *,
    zero_infinity: bool, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """From `nll` [B]: the losses [B], the factors of their gradients, and bool [B] which of them have a gradient.

    Args:
        factor: [B], the factor of each loss in the reduction.
        feasible: bool [B], which utterances have enough frames for their labels.
        wrong: bool [B], which utterances have a wrong label or length: their loss is NaN. None: none has.
        divisor: int64 [B], of the reduction "mean".
    """
    if impl == "torch":
        infinite = nll == torch.inf
        loss = nll.masked_fill(infinite, 0.0) if zero_infinity else nll
        if wrong is not None:
            loss = loss.masked_fill(wrong, torch.nan)
        return loss if divisor is None else loss / divisor, factor.masked_fill(infinite, 0.0), feasible & ~infinite
    loss, scale, aligned = torch.empty_like(nll), torch.empty_like(factor), torch.empty_like(feasible)
    if len(nll):
        with torch.cuda.device_of(nll):
            _loss_kernel[(triton.cdiv(len(nll), LOSS_BLOCK),)](
                nll, factor, feasible, feasible if wrong is None else wrong, nll if divisor is None else divisor, loss,
                scale, aligned, len(nll), ZERO_INFINITY=zero_infinity, MEAN=divisor is not None,
                CHECKED=wrong is not None, BLOCK=LOSS_BLOCK, num_warps=1,
            )  # fmt: skip
    return loss, scale, aligned


def label_gradient(log_probs: Tensor, gamma: Tensor, stats: RowStats) -> Tensor:
    """P_labels - gamma [N, C]. Where a label's P is above 1/2, minus the sum of all other columns is more exact."""
    gradient = log_probs.exp().sub_(gamma)
    maximum, at = log_probs.max(1, keepdim=True)
    others = gradient.scatter(1, at, 0.0).sum(1, keepdim=True) + stats.off_label_mass[:, None]
    return gradient.scatter_(1, at, torch.where(maximum > -LN2, -others, gradient.gather(1, at)))

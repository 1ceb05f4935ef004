"""The CTC lattice: likelihoods and posteriors of label sequences, for `ctc` and `linear_ctc`.

The states of U labels and the blanks around them are two vectors of U + 1, so that a step needs one shift, that of
`label` (⊕ = logaddexp):

    blank'[u] = (blank[u] ⊕ label[u-1]) + e[t, blank]
    label'[u] = (label[u] ⊕ blank[u] ⊕ label[u-1] if label u is not label u-1) + e[t, label u]

This is alpha. beta is the same recursion on reversed frames and labels; alpha and beta are two programs of one grid.
gamma = exp(alpha + beta + nll) is the posterior of a state (Graves et al. 2006, eq. 14), here summed over all positions
of a label.

Shapes    log_probs [T, B, C], any strides; targets int [B, U]; lengths int [B] -> nll [B], posteriors [T, B, U + 1] of
          the columns that `distinct_labels` names: blank, then the utterance's distinct labels. W = U + 1.
Numerics  Triton: float32 inside for float32 and the half types, float64 for float64. A frame's emissions are shifted by
          their maximum, and the shifts are summed in float64. Every RENORM frames an integer is subtracted from the
          states, which is exact. Beyond LARGEST_BLOCK - 1 labels this is not done: at 2 600 frames of 1 100 labels the
          posteriors are then within 6e-4 instead of 4e-6. A frame's posteriors are divided by their own sum. torch:
          float64 inside. An infeasible utterance has nll inf and posteriors 0. NaN or inf among the log-probabilities
          that an utterance uses gives NaN.
Cost      gathers B·T·W log-probabilities, holds six arrays of B·T·W float32 while it runs, and returns one of them (16
          clips of 30 s, 80 labels: 4 MB each); T steps in sequence.
Bitwise deterministic: a scan in the order of the labels sums the positions of each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from soundwave.kernels.ctc_targets import distinct_labels, length_mask
from soundwave.kernels.dispatch import interpreted

LN2, LOG2E = 0.6931471805599453, tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)  # instead of a maximum of -inf: -inf - LOWEST is -inf, where -inf - -inf is NaN
RENORM = 8  # frames: in so few the states lose at most a few dozen bits, and the reduction costs next to nothing
SUM_BLOCK = 128  # frames whose shifts are summed in one step
SMALLEST_BLOCK = 64  # two states a thread; 32 would be one more kernel to compile for a few short transcripts
LARGEST_BLOCK = 1024  # of the W states of a vector; a longer vector is walked in blocks


def _config(width: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(states a block, warps of the lattice, warps of the passes over rows) for vectors of `width` states.

    Up to 128 float32 one warp: a vector is four registers a thread, and its shift is a shuffle without shared memory or
    barrier. Beyond, two registers a thread, because with four ptxas spills on some cards (`tests/compiled`).
    """
    block = min(max(triton.next_power_of_2(width), SMALLEST_BLOCK), LARGEST_BLOCK)
    size = block * dtype.itemsize
    return block, 1 if size <= 512 else min(size // 256, 16), min(max(block // 128, 1), 8)


# Frames, labels and batch vary from batch to batch, and with them the alignment of rows. `blank` does not.
VARYING = ["T", "W", "B", "stride_t", "stride_b", "stride_c"]
ROWS_OF_THE_CALLER = ["LOG_PROBS", "TARGETS", "INPUT_LENGTHS", "TARGET_LENGTHS"]


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=ROWS_OF_THE_CALLER)
def _ctc_emit_kernel(
    LOG_PROBS, TARGETS, INPUT_LENGTHS, TARGET_LENGTHS, EMISSIONS, SHIFT, T, W, blank, stride_t, stride_b, stride_c,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One frame: EMISSIONS [B, T, W] of blank and the labels in order, in bits relative to the frame's SHIFT [B, T]."""
    row = tl.program_id(0).to(tl.int64)
    b, t = row // T, row % T
    if t < tl.load(INPUT_LENGTHS + b):
        dtype = EMISSIONS.dtype.element_ty
        size = tl.load(TARGET_LENGTHS + b).to(tl.int32)
        FRAME = LOG_PROBS + t * stride_t + b * stride_b
        maximum = tl.full([BLOCK], float("-inf"), dtype)
        wrong = tl.zeros([BLOCK], tl.int32)
        for start in range(0, size + 1, BLOCK):
            u = start + tl.arange(0, BLOCK)
            label = tl.load(TARGETS + b * (W - 1) + u - 1, mask=(u > 0) & (u <= size), other=blank).to(tl.int64)
            value = tl.load(FRAME + label * stride_c, mask=u <= size, other=float("-inf")).to(dtype)
            wrong |= ((value != value) | (value == float("inf"))).to(tl.int32)
            maximum = tl.maximum(maximum, value)
        shift = tl.max(maximum, 0)
        shift = tl.where(shift == float("-inf"), 0.0, shift)
        shift = tl.where(tl.max(wrong, 0) > 0, float("nan"), shift)
        tl.store(SHIFT + row, shift)
        for start in range(0, size + 1, BLOCK):
            u = start + tl.arange(0, BLOCK)
            label = tl.load(TARGETS + b * (W - 1) + u - 1, mask=(u > 0) & (u <= size), other=blank).to(tl.int64)
            value = tl.load(FRAME + label * stride_c, mask=u <= size, other=float("-inf")).to(dtype)
            tl.store(EMISSIONS + row * W + u, (value - shift) * LOG2E, mask=u <= size)


@triton.jit
def _log2(x, FAST: tl.constexpr):
    """log2 of 1 to 3. FAST is exact within 2^-22 and one instruction instead of twenty; every frame waits for it."""
    return libdevice.fast_log2f(x) if FAST else tl.log2(x)


@triton.jit
def _logadd(a, b, FAST: tl.constexpr):
    high = tl.maximum(a, b)
    return high + _log2(1.0 + tl.exp2(tl.minimum(a, b) - tl.maximum(high, LOWEST)), FAST)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=ROWS_OF_THE_CALLER)
def _ctc_lattice_kernel(
    EMISSIONS, TARGETS, INPUT_LENGTHS, TARGET_LENGTHS, STATES, EDGES, LIKELIHOOD, T, W,
    STORE: tl.constexpr, MANY: tl.constexpr, FAST: tl.constexpr, RENORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """alpha or beta of one utterance, frame after frame.

    STATES [2, B, T, 2, W]: alpha or beta, utterance, frame, blank or label, position. alpha includes the frame's own
    emission and beta does not, so alpha + beta is the log of a posterior up to the frame's normaliser. MANY blocks of
    states follow one another; each leaves its last label of every frame in EDGES [2, B, 2, T] for the next.
    """
    b, is_beta = tl.program_id(0).to(tl.int64), tl.program_id(1) > 0
    dtype = EMISSIONS.dtype.element_ty
    length, size = tl.load(INPUT_LENGTHS + b).to(tl.int32), tl.load(TARGET_LENGTHS + b).to(tl.int32)
    first, step = tl.where(is_beta, length - 1, 0).to(tl.int64), tl.where(is_beta, -1, 1).to(tl.int64)
    direction = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + b
    column = tl.arange(0, BLOCK)
    left = tl.maximum(column - 1, 0)
    for start in range(0, size + 1, BLOCK):
        u = start + column
        is_label = u < size
        blank_at, label_at = tl.where(is_beta, size - u, u), tl.where(is_beta, size - 1 - u, u)
        LABEL = TARGETS + b * (W - 1) + label_at
        target = tl.load(LABEL, mask=is_label, other=0)
        skip = is_label & (u > 0) & (target != tl.load(LABEL - step, mask=is_label & (u > 0), other=0))
        blank = tl.where(u == 0, 0.0, float("-inf")).to(dtype)
        label = tl.full([BLOCK], float("-inf"), dtype)
        offset = tl.zeros([], tl.float32)
        edge = tl.full([], float("-inf"), dtype)
        EDGE_OUT = EDGES + (direction * 2 + start // BLOCK % 2) * T
        EDGE_IN = EDGES + (direction * 2 + (start // BLOCK + 1) % 2) * T - 1
        STATE = STATES + (direction * T + first) * 2 * W
        FRAME = EMISSIONS + (b * T + first) * W
        # Emissions are read two frames ahead, because a step is shorter than a read from the L2 cache.
        blank_now = tl.load(FRAME, mask=length > 0, other=0.0)
        label_now = tl.load(FRAME + 1 + label_at, mask=is_label & (length > 0), other=float("-inf"))
        FRAME += step * W
        blank_next = tl.load(FRAME, mask=length > 1, other=0.0)
        label_next = tl.load(FRAME + 1 + label_at, mask=is_label & (length > 1), other=float("-inf"))
        for t in range(0, length):
            FRAME += step * W
            blank_far = tl.load(FRAME, mask=t + 2 < length, other=0.0)
            label_far = tl.load(FRAME + 1 + label_at, mask=is_label & (t + 2 < length), other=float("-inf"))
            if MANY:
                edge = tl.load(EDGE_IN + t, mask=(start > 0) & (t > 0), other=float("-inf"))
            previous = tl.where(column == 0, edge, tl.gather(label, left, 0))
            hop = tl.where(skip, previous, float("-inf"))
            # Relative to the largest, the three terms of a label are 1 and two powers; one logarithm sums them.
            high, low = tl.maximum(label, blank), tl.minimum(label, blank)
            maximum, middle = tl.maximum(high, hop), tl.minimum(high, hop)
            safe = tl.maximum(maximum, LOWEST)
            label_sum = maximum + _log2(1.0 + tl.exp2(low - safe) + tl.exp2(middle - safe), FAST)
            blank_sum = _logadd(blank, previous, FAST)
            blank, label = blank_sum + blank_now, label_sum + label_now
            if STORE:
                tl.store(STATE + blank_at, tl.where(is_beta, blank_sum, blank), mask=u <= size)
                tl.store(STATE + W + label_at, tl.where(is_beta, label_sum, label), mask=is_label)
                STATE += step * 2 * W
            if MANY:
                tl.store(EDGE_OUT + t + column * 0, label, mask=column == BLOCK - 1)
            elif t % RENORM == RENORM - 1:
                whole = tl.floor(tl.maximum(tl.max(tl.maximum(blank, label), 0), LOWEST))
                whole = tl.where(whole > LOWEST, whole, 0.0)
                blank, label, offset = blank - whole, label - whole, offset + whole.to(tl.float32)
            blank_now, label_now, blank_next, label_next = blank_next, label_next, blank_far, label_far
        if MANY:
            edge = tl.load(EDGE_IN + length, mask=(start > 0) & (length > 0), other=float("-inf"))
        last = _logadd(blank, tl.where(column == 0, edge, tl.gather(label, left, 0)), FAST)
        if (start + BLOCK > size) & (tl.program_id(1) == 0):
            total = tl.max(tl.where(u == size, last, float("-inf")), 0)
            tl.store(LIKELIHOOD + b, total.to(tl.float64) + offset)
        if MANY:
            tl.debug_barrier()  # the next block reads the edges of this one


@triton.jit
def _alpha_plus_beta(ALPHA, BETA, place, mask):
    return tl.load(ALPHA + place, mask=mask, other=float("-inf")) + tl.load(BETA + place, mask=mask, other=0.0)


@triton.jit
def _add_equal(key, value, next_key, next_value):
    return next_key, next_value + tl.where(key == next_key, value, 0.0)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=ROWS_OF_THE_CALLER)
def _ctc_posterior_kernel(
    STATES, NLL, INPUT_LENGTHS, TARGET_LENGTHS, ORDER, COLUMN, POSTERIORS, B, T, W, BLOCK: tl.constexpr
):
    """One frame: POSTERIORS [T, B, W] of blank and each distinct label. ORDER [B, U] sorts positions by label."""
    row = tl.program_id(0).to(tl.int64)
    b, t = row // T, row % T
    nll = tl.load(NLL + b)
    if (t < tl.load(INPUT_LENGTHS + b)) & (nll != float("inf")):
        dtype = STATES.dtype.element_ty
        size = tl.load(TARGET_LENGTHS + b).to(tl.int32)
        frames = tl.num_programs(0).to(tl.int64)  # B·T
        ALPHA, BETA, OUT = STATES + row * 2 * W, STATES + (frames + row) * 2 * W, POSTERIORS + (t * B + b) * W
        column = tl.arange(0, BLOCK)
        maximum = tl.full([BLOCK], float("-inf"), dtype)
        for start in range(0, size + 1, BLOCK):
            u = start + column
            label = _alpha_plus_beta(ALPHA + W, BETA + W, u, u < size)
            maximum = tl.maximum(maximum, tl.maximum(label, _alpha_plus_beta(ALPHA, BETA, u, u <= size)))
        maximum = tl.maximum(tl.max(maximum, 0), LOWEST)
        blanks, labels = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
        for start in range(0, size + 1, BLOCK):
            u = start + column
            blanks += tl.exp2(_alpha_plus_beta(ALPHA, BETA, u, u <= size) - maximum)
            labels += tl.exp2(_alpha_plus_beta(ALPHA + W, BETA + W, u, u < size) - maximum)
        blank = tl.sum(blanks, 0)
        scale = tl.where(nll == nll, 1.0 / (blank + tl.sum(labels, 0)), float("nan"))
        tl.store(OUT, blank * scale)
        carried_key, carried = tl.full([], -1, tl.int32), tl.zeros([], dtype)
        for start in range(0, size, BLOCK):
            u = start + column
            AT = b * (W - 1) + u
            key = tl.load(COLUMN + AT, mask=u < size, other=W).to(tl.int32)
            next_key = tl.load(COLUMN + AT + 1, mask=u + 1 < size, other=W).to(tl.int32)
            place = tl.load(ORDER + AT, mask=u < size, other=0)
            value = tl.exp2(_alpha_plus_beta(ALPHA + W, BETA + W, place, u < size) - maximum)
            _, value = tl.associative_scan((key, value), 0, _add_equal)
            value += tl.where(key == carried_key, carried, 0.0)
            tl.store(OUT + key, value * scale, mask=(u < size) & (key != next_key))
            carried = tl.sum(tl.where(column == BLOCK - 1, value, 0.0), 0)
            carried_key = tl.max(tl.where(column == BLOCK - 1, key, -1), 0)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=ROWS_OF_THE_CALLER)
def _ctc_nll_kernel(LIKELIHOOD, SHIFT, INPUT_LENGTHS, NLL, T, LN2: tl.constexpr, BLOCK: tl.constexpr):
    """NLL of one utterance from its LIKELIHOOD, in bits, and the SHIFT [B, T] of its frames."""
    b = tl.program_id(0).to(tl.int64)
    length = tl.load(INPUT_LENGTHS + b).to(tl.int32)
    shifts = tl.zeros([BLOCK], tl.float64)
    for start in range(0, length, BLOCK):
        t = start + tl.arange(0, BLOCK)
        shifts += tl.load(SHIFT + b * T + t, mask=t < length, other=0.0).to(tl.float64)
    nll = 0.0 - tl.load(LIKELIHOOD + b) * LN2 - tl.sum(shifts, 0)
    tl.store(NLL + b, nll.to(NLL.dtype.element_ty))


def _lattice_triton(
    log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, blank: int, need_gamma: bool,
    in_order: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """nll [B], posteriors [T, B, U + 1] (T = 0 without `need_gamma`), and the labels [B, U + 1] of their columns.

    `in_order` are order and column of `distinct_labels`, where the caller knows them; then no labels are returned.
    """
    size, batch, _ = log_probs.shape
    device, dtype, width = log_probs.device, torch.promote_types(log_probs.dtype, torch.float32), targets.shape[1] + 1
    block, lattice_warps, row_warps = _config(width, dtype)
    many, fast = width > block, dtype == torch.float32 and not interpreted()
    targets, lengths = targets.contiguous(), (input_lengths.to(device), target_lengths.to(device))
    labels, order, column = distinct_labels(targets, lengths[1], blank) if in_order is None else (None, *in_order)
    posteriors = torch.zeros(size if need_gamma else 0, batch, width, dtype=dtype, device=device)
    emissions, shift, states, edges = (
        torch.empty(shape, dtype=dtype, device=device)
        for shape in (
            (batch, size, width), (batch, size), (2 * need_gamma, batch, size, 2, width), (2 * many, batch, 2, size)
        )
    )  # fmt: skip
    likelihood, nll = (torch.empty(batch, dtype=kind, device=device) for kind in (torch.float64, dtype))
    with torch.cuda.device_of(log_probs):
        if batch and size:
            _ctc_emit_kernel[(batch * size,)](
                log_probs, targets, *lengths, emissions, shift, size, width, blank, *log_probs.stride(),
                BLOCK=block, num_warps=row_warps,
            )  # fmt: skip
        if batch:
            _ctc_lattice_kernel[(batch, 2 if need_gamma else 1)](
                emissions, targets, *lengths, states, edges, likelihood, size, width,
                STORE=need_gamma, MANY=many, FAST=fast, RENORM=RENORM, BLOCK=block, num_warps=lattice_warps,
            )  # fmt: skip
            _ctc_nll_kernel[(batch,)](likelihood, shift, lengths[0], nll, size, LN2=LN2, BLOCK=SUM_BLOCK, num_warps=1)
        if batch and size and need_gamma:
            _ctc_posterior_kernel[(batch * size,)](
                states, nll, *lengths, order, column, posteriors, batch, size, width, BLOCK=block, num_warps=row_warps
            )
    return nll, posteriors, labels


def _lattice_torch(
    log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, blank: int, need_gamma: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_lattice_triton`, by torch's own lattice over the columns in use, in float64: 1.5 times as slow on a CPU."""
    size, batch, _ = log_probs.shape
    device, dtype = log_probs.device, torch.promote_types(log_probs.dtype, torch.float32)
    labels, order, place = distinct_labels(targets, target_lengths, blank)
    here = target_lengths.to(device)
    if not size or not batch:
        nll = torch.zeros(batch, dtype=dtype, device=device).masked_fill_(here > 0, torch.inf)
        return nll, nll.new_zeros(size if need_gamma else 0, *labels.shape), labels
    column = labels.new_zeros(batch, max(targets.shape[1], 1))  # aten needs one column at least
    column.scatter_(1, order, place).masked_fill_(~length_mask(here, column.shape[1]), 0)
    frames = length_mask(input_lengths.to(device), size).T[..., None]
    emissions = log_probs.gather(2, labels.expand(size, -1, -1)).double()
    wrong = ((emissions.isnan() | (emissions == torch.inf)) & frames).any(2).any(0)
    # aten expects log-probabilities of at most 0, because its gradient holds their exponentials.
    shift = emissions.amax(2, keepdim=True)
    shift = torch.where(frames & shift.isfinite(), shift, 0.0)
    emissions -= shift
    lengths = input_lengths.tolist(), target_lengths.tolist()
    nll, log_alpha = torch.ops.aten._ctc_loss(emissions, column, *lengths, 0, False)
    result = (nll - shift.sum((0, 2))).add(0.0).masked_fill_(wrong, torch.nan).to(dtype)  # adding 0 makes -0 a 0
    if not need_gamma:
        return result, result.new_zeros(0, *labels.shape), labels
    gradient = torch.ops.aten._ctc_loss_backward(
        torch.ones_like(nll), emissions, column, *lengths, nll, log_alpha, 0, True
    )
    used = torch.arange(labels.shape[1], device=device) <= column.amax(1)[:, None]
    keep = frames & (used & (nll != torch.inf)[:, None])
    # aten's gradient holds exp(log_probs), because it assumes a log-softmax before it, and NaN where one is -inf.
    gamma = (emissions.exp() - gradient).masked_fill_(emissions == -torch.inf, 0.0).clamp_(min=0.0)
    gamma.masked_fill_(wrong[:, None], torch.nan).masked_fill_(~keep, 0.0)
    return result, gamma.to(dtype), labels


LATTICES = {"triton": _lattice_triton, "torch": _lattice_torch}


def spread(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """`values` [T, B, U + 1] into columns `labels` [B, U + 1] of [T, B, C]; padding adds zeros to the blank."""
    out = torch.zeros(*values.shape[:2], classes, dtype=values.dtype, device=values.device)
    return out.scatter_add_(2, labels.expand(values.shape[0], -1, -1), values)


def ctc_lattice(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    *,
    blank: int,
    impl: str,
    need_gamma: bool,
    in_order: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The lattice on log-probabilities [T, B, C]. It is not differentiable and checks nothing.

    `in_order`: where the C = U + 1 columns are the blank and each utterance's distinct labels in rising order, the
    positions sorted by label, and their columns; then they are not looked for again.

    Returns:
        nll [B], inf where no alignment exists.
        gamma [T, B, C], the posteriors: 0 past the lengths and where nll is inf; empty without `need_gamma`. The
        gradient of nll is -gamma. Both are float32, or float64 for float64.
    """
    if in_order is not None and impl == "triton":
        return _lattice_triton(
            log_probs, targets, input_lengths, target_lengths, blank, need_gamma, in_order
        )[:2]  # fmt: skip
    nll, posteriors, labels = LATTICES[impl](log_probs, targets, input_lengths, target_lengths, blank, need_gamma)
    return nll, spread(posteriors, labels, log_probs.shape[2]) if need_gamma else posteriors

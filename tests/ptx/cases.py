"""Every Triton kernel of `kernels/` with the tests that judge its compiled code, and the orders they run under.

A case calls a function of the project's own tests with Triton on CPU tensors, and so has that test's reference and
tolerance: at most twice eager's error plus 4 ulp, or equal bits, or what the test says. `python -m tests.ptx sweep`
runs all of them, `make test` those marked small.
"""

import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch

from soundwave import eager
from soundwave.kernels import active_columns, ctc_lattice, ctc_peaks, label_rows, norm
from tests import (
    test_active_columns,
    test_cross_entropy_options,
    test_ctc,
    test_ctc_peaks,
    test_linear_cross_entropy,
    test_linear_ctc,
    test_norm,
    test_shrink_attention,
    test_shrinking_adapter,
    test_splice,
    test_vocab_rows,
)
from tests.accuracy import assert_rms, error
from tests.ptx.mutate import Redundant

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
NAMES = {FP16: "fp16", BF16: "bf16", FP32: "fp32", FP64: "fp64"}
HERE = ("cpu", "triton")
# Warp by warp takes up to eight times as long as all warps together, so the large cases run under one such order.
EVERY = ("lockstep", "forward", "reverse", "random", "lanes", "noise")
MOST = ("lockstep", "reverse", "lanes", "noise")
FEW = ("lockstep", "noise")
ONE = ("lockstep",)


class Case(NamedTuple):
    operation: str
    name: str
    dtype: str
    run: Callable[[], Any]
    orders: tuple[str, ...] = EVERY
    small: tuple[int, ...] = ()  # architectures on which `make test` runs it

    def __str__(self) -> str:
        return f"{self.operation}: {self.name}, {self.dtype}"


ONE_WARP = (
    "compiled for one warp: beside it stands `ldmatrix.sync` or `stmatrix.sync`, one instruction of the whole warp, so "
    "no lane can store into the scratch memory before another has read it."
)
# Barriers that nothing can notice. Their number is checked, and that each reason is still needed.
REDUNDANT = [
    Redundant("_add_layer_norm_fwd_kernel", "tl.store(Y + ", 3, ONE_WARP),
    Redundant("_add_layer_norm_bwd_kernel", "tl.store(DX + ", 4, ONE_WARP),
    Redundant("_add_layer_norm_bwd_kernel", "tl.store(DWEIGHT + ", 4, ONE_WARP),
    Redundant("_add_layer_norm_bwd_kernel", "tl.store(DBIAS + ", 8, ONE_WARP),
    Redundant("_vocab_rows_kernel", "x = tl.load(ROW + column, mask=column < V", 2, ONE_WARP),
    Redundant(
        "_vocab_rows_kernel",
        "tl.debug_barrier()  # before columns are written",
        15,
        "with several warps the reductions between the reads and these writes have barriers of their own; with one "
        "warp there are only shuffles, and it is noticed.",
    ),
    Redundant(
        "_column_bins_kernel",
        "p = tl.load(",
        6,
        "at the beginning of a round: the last round has read this memory in its product, and the sums and the store "
        "behind that have barriers of their own.",
    ),
    Redundant(
        "_active_product_kernel",
        "TERMS,",
        12,
        "of the pipelined loop: one between the copies for its first rounds, which go into different buffers; one at "
        "its end, after which other memory is used; and on sm_90 two between the products of a round and the stores of "
        "the next, either of which is enough. In one kernel no tile of the cases is multiplied by all columns, so that "
        "none runs.",
    ),
    Redundant(
        "_cross_entropy_rows_kernel",
        "tl.store(ROW + column, q.to(given))",
        26,
        "in the loop over whole blocks, which heads of less than 4 096 rows have only if they fill one block exactly: "
        "no case reaches it there.",
    ),
    Redundant(
        "_shrink_attention_dkv_kernel",
        "for start in range(0, q_size, BLOCK_M):",
        3,
        "behind the loop, at the end of its pipeline: float32 uses no shared memory afterwards; the scratch memory of "
        "the half types is that of K and V, read before the barrier at the end of each round, of which the adapter "
        "always has one.",
    ),
    Redundant(
        "_shrink_attention_fwd_kernel",
        "_store_rows(OUT",
        1,
        "behind the loop: the scratch memory is that of Q, read before the last barrier of each round, of which the "
        "adapter always has one.",
    ),
    Redundant(
        "_shrink_attention_dq_kernel",
        "for start in range(0, k_size, BLOCK_N):",
        9,
        "behind the loop, at the end of its pipeline: the scratch memory that follows is that of Q and dO, stored "
        "before the barriers in front of the loop and read before the one at the end of each round; copies go "
        "elsewhere.",
    ),
    Redundant(
        "_vocab_rows_kernel",
        "tl.debug_barrier()  # other threads read",
        3,
        "compiled for a single column (V = 1 is a constant then), which one thread both stores and reads.",
    ),
    Redundant(
        "_ctc_lattice_kernel",
        "tl.debug_barrier()  # the next block reads",
        2,
        "with several warps `tl.gather` goes through shared memory, so each frame has a barrier of its own between the "
        "store of an edge and its load in the next block. With one warp there is none, and this one is noticed.",
    ),
    Redundant(
        "_gather_matmul_kernel",
        "a = tl.load(",
        6,
        "in front of the loop, between the asynchronous copies for the first rounds: they go into different buffers, "
        "which nobody has touched before.",
    ),
    Redundant(
        "_gather_matmul_kernel",
        "tl.store(at_c, total",
        2,
        "between two conversions of layout, where each thread stores over what it has loaded itself.",
    ),
]


def _norm() -> Iterator[Case]:
    test = test_norm.test_every_result_is_as_exact_as_eager
    for dtype in NAMES:
        for gather, with_sum in ((False, False), (True, True)):
            name = "N7 D100, " + ("gathered, with the sum" if gather else "rows")
            small = (86,) if dtype == BF16 and gather else ()
            run = partial(_two_programs, test, dtype, 7, 100, gather, with_sum, *HERE)
            yield Case("norm", name, NAMES[dtype], run, small=small)
    for width in (1024, 4097, test_norm.MAX_D):
        small = (90,) if width == 1024 else ()
        wide = partial(_two_programs, test_norm.test_wide_rows, width, *HERE)
        yield Case("norm", f"D{width}, 3 rows in 2 programs", "fp32", wide, small=small)
    several = partial(_two_programs, test, BF16, 7, 576, False, True, *HERE)
    yield Case("norm", "D576, 7 rows in 2 programs", "bf16", several)
    for x, residual in ((BF16, FP32), (FP16, FP32)):
        test = test_norm.test_dtypes_may_differ_and_each_gradient_has_its_own
        run = partial(_two_programs, test, x, residual, FP32, True, *HERE)
        yield Case("norm", f"{NAMES[x]} onto fp32", NAMES[x], run)
    test = test_norm.test_in_triton_a_row_that_does_not_exist_is_nan_and_no_other
    yield Case("norm", "a row that does not exist", "fp32", partial(test, "cpu"))


def _two_programs(test: Callable[..., None], *arguments: Any) -> None:
    """With the rows of so few programs that each has several: a loop with one round needs fewer barriers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norm, "PROGRAMS", 2)
        test(*arguments)


def _ctc() -> Iterator[Case]:
    for dtype in NAMES:
        yield Case("ctc", "T15 B3 U5", NAMES[dtype], partial(test_ctc.test_dtypes, *HERE, dtype), small=(86, 90)[:1])
    yield Case("ctc", "blocks of 32 states, U70", "fp32", partial(_blocks, 70, 75, 32), MOST, small=(86, 90))
    yield Case("ctc", "one block of 4 warps, U130", "fp32", partial(_blocks, 130, 135, 1024), MOST)
    yield Case("ctc", "blocks of 4 warps, U260", "fp32", partial(_blocks, 260, 265, 256), FEW)
    for width in (126, 300, 1100):
        yield Case("ctc", f"4 labels padded to {width}", "fp32", partial(_padded, width, 20), MOST)
    yield Case("ctc", "T120 U80, uniform", "fp32", partial(test_ctc.test_long_and_wide, *HERE), ONE)
    test = partial(test_ctc.test_a_short_target_in_a_wide_batch, *HERE)
    yield Case("ctc", "2 labels padded to 40", "fp32", test, ONE)
    yield Case("ctc", "corners", "fp32", partial(test_ctc.test_corner_cases_are_torchs, *HERE, "none", False))
    for case in ("too short", "no frames", "all -inf", "a label -inf", "the lowest number"):
        test = test_ctc.test_zero_infinity_leaves_no_nan
        for dtype in (FP32, BF16):
            yield Case("ctc", f"zero_infinity, {case}", NAMES[dtype], partial(test, *HERE, dtype, case))
    yield Case("ctc", "RMS of 6 draws", "fp32", _ctc_rms, ONE)


def _blocks(width: int, frames: int, block: int) -> None:
    """`test_blocks_of_states` with blocks of another size, so that several warps share one, and without repeats."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ctc_lattice, "LARGEST_BLOCK", block)
        logits, _, *lengths = test_ctc.make(frames, 2, 4, width, seed=width, full=True)
        targets = (torch.arange(width) % 3 + 1).repeat(2, 1)
        lengths[0][1], lengths[1][1] = frames - 3, width - 12
        test_ctc.check(logits.log_softmax(-1), targets, *lengths, 0, "triton")


def _padded(width: int, frames: int) -> None:
    """`test_short_targets_with_much_padding` with more frames than pass between two renormalisations."""
    logits, targets, *lengths = test_ctc.make(frames, 1, 2000, 4, seed=width, full=True)
    targets = torch.nn.functional.pad(targets, (0, width - 4), value=-100)
    test_ctc.check(logits.log_softmax(-1), targets, *lengths, 0, "triton")


def _ctc_rms() -> None:
    """The interpreter is too slow for as many frames."""
    pairs = []
    for seed in range(6):
        logits, targets, *lengths = test_ctc.make(60, 3, 50, 30, seed=seed, full=seed % 2 == 0)
        pairs.append(test_ctc.check(logits.log_softmax(-1), targets, *lengths, 0, "triton"))
    for name, of in zip(("loss", "gradient"), zip(*pairs, strict=True), strict=True):
        assert_rms(list(of), torch.finfo(FP32).eps, name)


def _vocab_rows() -> Iterator[Case]:
    t = test_vocab_rows
    for columns, count, stride in t.SHAPES:
        for dtype in (FP64, FP32, BF16):
            test = partial(t.test_statistics_and_probabilities, *HERE, columns, count, stride, dtype)
            orders = EVERY if columns <= 300 else MOST
            small = (86, 90) if (columns, dtype) == (300, BF16) else ()
            yield Case("vocab_rows", f"V{columns} C{count}", NAMES[dtype], test, orders, small)
    yield Case("vocab_rows", "no scale", "fp32", partial(t.test_without_a_scale_only_statistics, *HERE))
    for columns, count in ((300, 5), (9000, 1)):
        yield Case("vocab_rows", f"V{columns} C{count}, no scale", "fp32", partial(_statistics, columns, count))
    yield Case("vocab_rows", "V20000 C1", "fp16", partial(_statistics, 20000, 1, FP16, True), ONE)
    yield Case("vocab_rows", "NaN in a row", "fp32", partial(t.test_nan_in_one_row_stays_there, *HERE))
    for second in (11, 4106, 8999):
        test = partial(t.test_the_lowest_of_equal_columns, *HERE, second)
        yield Case("vocab_rows", f"columns 10 and {second} equal", "fp32", test)
    for gap in (10.0, 17.0, 25.0, 60.0):
        for equals in (1, 2):
            test = partial(t.test_the_normaliser_of_a_row_that_is_sure, *HERE, gap, equals)
            yield Case("vocab_rows", f"sure by {gap:.0f}, {equals} equal", "fp32", test)


def _statistics(columns: int, count: int, dtype: torch.dtype = FP32, scaled: bool = False) -> None:
    """`test_without_a_scale_only_statistics` with labels among the columns, in the shapes of tests that have none."""
    t = test_vocab_rows
    given = t.make(columns, count, columns, dtype, rows=1)
    given[2][:, 0] = min(columns // 3, 1000)  # which another warp reads, in the first round
    (_, expected), (_, found) = (
        t.run(*given[:-1], given[-1] if scaled else None, columns, impl) for impl in ("torch", "triton")
    )
    torch.testing.assert_close(tuple(found), tuple(expected))


def _active_columns() -> Iterator[Case]:
    t = test_active_columns
    for dtype in (FP32, BF16, FP16):
        for rows, columns, strength in ((150, 600, 9.0), (130, 992, 0.0), (20, 300, 12.0)):
            run = partial(_blocks_of_columns, t.test_each_tile_skips_by_the_rule, *HERE, dtype, rows, columns, strength)
            small = (86, 90) if (dtype, rows) == (BF16, 20) else ()
            orders = MOST if rows == 20 else FEW
            yield Case("active_columns", f"N{rows} V{columns}", NAMES[dtype], run, orders, small)
        for columns in (992, 1000):  # a multiple of 16 and none: both kinds of kernels, with lists and without
            run = partial(_blocks_of_columns, t.test_tiles_have_lists_of_their_own, *HERE, dtype, columns, 9.4)
            yield Case("active_columns", f"lists of their own, V{columns}", NAMES[dtype], run, FEW)
    for test in (t.test_no_group_of_rows_loses_more_than_its_share, t.test_rows_without_mass_have_no_say):
        name = test.__name__.removeprefix("test_").replace("_", " ")
        yield Case("active_columns", name, "fp32", partial(test, *HERE), FEW)
    test = partial(_blocks_of_columns, t.test_a_row_of_nan_makes_its_tile_exact_and_no_other_row_nan, *HERE)
    yield Case("active_columns", "NaN in a row", "fp32", test, FEW)


def _blocks_of_columns(test: Callable[..., None], *arguments: Any) -> None:
    """With blocks of so few columns that there are several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(active_columns, "BLOCK_COLUMNS", 256)
        test(*arguments)


def _linear_ctc() -> Iterator[Case]:
    t = test_linear_ctc
    for blank in (0, 40):
        yield Case("linear_ctc", f"V40, blank {blank}", "fp64", partial(t.test_fp64_gives_fp64, *HERE, blank))
    for dtype in (FP32, BF16, FP16):
        for blank in (0, 300):
            given = t.make(3, 12, 300, 16, 5, blank=blank, seed=1)
            test = partial(t.check, given, dtype, impl="triton")
            small = (90,) if (dtype, blank) == (BF16, 300) else ()
            yield Case("linear_ctc", f"V300, blank {blank}", NAMES[dtype], test, MOST, small)
        yield Case("linear_ctc", "V300, RMS of 12 draws", NAMES[dtype], partial(_linear_ctc_rms, dtype), ONE)
    # Labels in several warps, and in several blocks.
    yield Case("linear_ctc", "140 labels", "fp32", partial(_labels, 512, 1, 145, 300, 8, 140), ONE)
    yield Case("linear_ctc", "blocks of 32 labels", "fp32", partial(_labels, 32, 1, 45, 100, 8, 40), ONE)
    yield Case("linear_ctc", "blocks of 256 labels", "fp32", partial(_labels, 256, 1, 262, 300, 8, 258), ONE)
    test = partial(t.test_the_error_of_skipping_is_within_its_certificate, *HERE, BF16)
    yield Case("linear_ctc", "V4000, skipping", "bf16", test, ONE)
    test = partial(t.test_a_blank_that_is_sure, *HERE, 0.9993, "extra")
    yield Case("linear_ctc", "V5000, blank sure", "bf16", test, ONE)
    test = partial(t.test_probabilities_that_fp16_cannot_hold, *HERE, 2.0**16)
    yield Case("linear_ctc", "V20000, loss scaling", "fp16", test, ONE)


def _labels(block: int, batch: int, frames: int, rows: int, width: int, labels: int) -> None:
    """Distinct labels, which the passes over each frame's labels take in blocks of so many."""
    t = test_linear_ctc
    given = t.make(batch, frames, rows, width, labels, blank=rows, full=True)
    given["targets"] = torch.arange(labels).expand(batch, -1).clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label_rows, "LARGEST_BLOCK", block)
        t.check(given, FP32, impl="triton")


def _linear_ctc_rms(dtype: torch.dtype) -> None:
    """`test_rms_error_is_at_most_eagers` with fewer frames."""
    t, errors = test_linear_ctc, []
    for seed in range(12):
        given = t.make(3, 10, 300, 16, 4, blank=300 * (seed % 2), seed=seed)
        errors.append(t.check(given, dtype, impl="triton", seed=seed))
    for name in ("loss", *t.GRADIENTS[:3]):  # the gradient of the bias is one number a draw
        assert_rms([found[name] for found in errors if name in found], torch.finfo(FP32).eps, name)


def _linear_cross_entropy() -> Iterator[Case]:
    t = test_linear_cross_entropy
    for dtype in NAMES:
        test = partial(t.check, t.make(17, 63, 7, ignored=0.3, dtype=dtype), "mean", True, "triton")
        yield Case("linear_cross_entropy", "N17 V63", NAMES[dtype], test)
    for dtype in (FP32, BF16, FP16):
        test = partial(_linear_cross_entropy_rms, dtype)
        yield Case("linear_cross_entropy", "V700, RMS of 6 draws", NAMES[dtype], test, ONE)


def _cross_entropy_options() -> Iterator[Case]:
    t = test_cross_entropy_options
    for dtype in NAMES:
        given = t.make(7, 63, 7, ignored=0.3, dtype=dtype)
        small = (86, 90) if dtype == BF16 else ()
        run = partial(t.check, given, "mean", t.ALL, "triton", True)
        yield Case("linear_cross_entropy", "N7 V63, every option, lse", NAMES[dtype], run, EVERY, small)
        # One whole block of columns, and a part of one.
        columns = 4500 if dtype.itemsize == 2 else 2600
        run = partial(_options, t.make(3, columns, 7, dtype=dtype), t.ALL)
        yield Case("linear_cross_entropy", f"N3 V{columns}, every option", NAMES[dtype], run, MOST)
    for name, chosen in t.TOGETHER.items():
        for dtype in (FP32, BF16, FP16):
            run = partial(_options, t.make(5, 700, 7, dtype=dtype), chosen)
            yield Case("linear_cross_entropy", f"N5 V700, {name}", NAMES[dtype], run, FEW)
    run = partial(t.test_a_softcap_bounds_logits_of_any_size, *HERE)
    yield Case("linear_cross_entropy", "large logits under a softcap", "fp32", run, FEW)
    run = partial(t.test_classes_that_a_bias_forbids, *HERE)
    yield Case("linear_cross_entropy", "a bias of -inf", "fp32", run, FEW)
    for gap in (17.0, 60.0):
        run = partial(t.test_the_loss_of_a_target_that_is_sure_is_not_lost_in_the_rounding_of_1, *HERE, gap)
        yield Case("linear_cross_entropy", f"with a bias, sure by {gap:.0f}", "fp32", run, FEW)
    for scale in (1.0, 2.0**16):
        run = partial(t.test_gradients_that_fp16_cannot_hold, *HERE, scale)
        yield Case("linear_cross_entropy", f"gradients up to 400, scaled by {scale:.0f}", "fp16", run, ONE)
    yield Case("linear_cross_entropy", "every option, RMS of 6 draws", "bf16", _options_rms, ONE)


def _options(given: tuple, chosen: dict[str, Any]) -> None:
    """With and without gradients, which are different kernels."""
    test_cross_entropy_options.check(given, "sum", chosen, "triton")
    test_cross_entropy_options.check(given, "none", chosen, "triton", True, ())


def _options_rms() -> None:
    t = test_cross_entropy_options
    draws = [t.make(20, 700, 16, seed=seed, dtype=BF16) for seed in range(6)]
    errors = [t.check(given, "none", t.ALL, "triton", True) for given in draws]
    for name in errors[0]:
        eps = torch.finfo(FP32 if name in ("loss", "lse") else BF16).eps
        assert_rms([found[name] for found in errors], eps, name)


def _linear_cross_entropy_rms(dtype: torch.dtype) -> None:
    """`test_rms_error_is_at_most_that_of_the_plain_operations` with fewer rows and more draws."""
    t = test_linear_cross_entropy
    errors = [t.check(t.make(20, 700, 16, seed=seed, dtype=dtype), "none", impl="triton") for seed in range(6)]
    for name in ("loss", "hidden", "weight"):
        eps = torch.finfo(FP32 if name == "loss" else dtype).eps
        assert_rms([found[name] for found in errors], eps, name)


def _peaks() -> Iterator[Case]:
    t = test_ctc_peaks
    for keep in t.KEEP:
        for size in (1, 63, 750):
            small = (86,) if (keep, size) == ("peaks", 63) else ()
            test = partial(_blocks_of_frames, 128 if size == 750 else 32, t.test_odd_sizes, size, keep, *HERE)
            yield Case("ctc_peaks", f"T{size}, {keep}", "fp32", test, small=small)
        test = partial(t.test_runs_go_on_from_one_block_of_frames_to_the_next, keep, *HERE)
        yield Case("ctc_peaks", f"blocks of 1024 frames, {keep}", "fp32", test, MOST)
    for dtype in (FP64, BF16, FP16):
        test = partial(_blocks_of_frames, 32, t.test_scores_of_any_dtype_and_int32_paths, dtype, *HERE)
        yield Case("ctc_peaks", "T33, int32 path", NAMES[dtype], test)
    test = partial(t.test_more_kept_frames_than_one_program_copies, *HERE)
    yield Case("ctc_peaks", "more frames than one program copies", "fp32", test)
    test = partial(t.test_in_triton_lengths_out_of_range_read_nothing_out_of_bounds, "cpu")
    yield Case("ctc_peaks", "lengths out of range", "fp32", test)


def _blocks_of_frames(block: int, test: Callable[..., None], *arguments: Any) -> None:
    """With blocks of so few frames that there are several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ctc_peaks, "MAX_BLOCK_T", block)
        test(*arguments)


def _splice() -> Iterator[Case]:
    t = test_splice
    yield Case("splice", "D63", "fp32", partial(t.test_everything_is_eagers, 3, 7, 63, 4, 0.6, "right", "left", *HERE))
    test = t.test_speech_takes_the_dtype_of_the_text_and_its_gradient_its_own
    for text, speech in ((FP32, BF16), (BF16, FP32), (BF16, BF16), (FP16, FP16)):
        small = (86,) if (text, speech) == (BF16, BF16) else ()
        name = f"D33, {NAMES[speech]} into {NAMES[text]}"
        yield Case("splice", name, NAMES[text], partial(test, text, speech, "left", *HERE), small=small)
    yield Case("splice", "D2500", "fp32", partial(t.test_rows_wider_than_a_block, *HERE))


def _attention() -> Iterator[Case]:
    t = test_shrink_attention
    for dtype in (FP32, BF16, FP16):
        for lengths in ("odd", "empty-ones", "no-keys"):
            test = partial(t.test_every_result_is_as_exact_as_torchs_own, dtype, 1, 24, lengths, *HERE)
            small = (86, 90) if (dtype, lengths) == (BF16, "odd") else ()
            yield Case("shrink_attention", f"H1 E24, {lengths}", NAMES[dtype], test, EVERY if small else MOST, small)
    # Several steps over keys and over queries, and none: keys without queries, queries without keys.
    for keys, heads, size, dtype, orders in (
        (330, 3, 64, BF16, MOST), (330, 1, 24, FP16, FEW), (330, 1, 24, FP32, FEW),
        (130, 1, 8, BF16, ONE), (130, 1, 8, FP16, ONE), (130, 3, 64, FP16, ONE), (130, 3, 64, FP32, ONE),
        (130, 1, 80, BF16, ONE), (130, 1, 128, BF16, ONE), (130, 1, 128, FP32, ONE), (130, 1, 256, BF16, ONE),
    ):  # fmt: skip
        test = partial(t.check, *t.make([3, 70, 0, 2], [keys, 70, 5, 0], heads, size, dtype), "triton")
        yield Case("shrink_attention", f"H{heads} E{size}, {keys} keys", NAMES[dtype], test, orders)
    yield Case("shrink_attention", "H1 E64", "tf32", _attention_tf32, ONE)


def _attention_tf32() -> None:
    """float32 where torch's products may be TensorFloat-32, as a user allows them. Eager does not round so on a CPU."""
    t = test_shrink_attention
    tensors, where = t.make([3, 70, 0, 2], [130, 70, 5, 0], 1, 64, FP32)
    upstream = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1))
    wide = [x.detach().double().requires_grad_() for x in tensors]
    truth = t.everything(lambda *x: eager.shrink_attention(*x, *where, scale=0.125), wide, upstream)
    before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "tf32"
    try:
        found = t.everything(lambda *x: t.shrink_attention(*x, *where, impl="triton"), tensors, upstream)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    for name, ours, exact in zip(t.NAMES, found, truth, strict=True):
        # Products of two values with 10 bits each, of which tensor cores cut off the others.
        assert 1e-6 < error(ours, exact) / float(exact.norm()) < 4 * 2**-10, name


def _adapter() -> Iterator[Case]:
    t = test_shrinking_adapter
    for dtype in (FP32, BF16, FP16):
        for rows, kept, width in ((63, 7, 24), (200, 100, 70), (200, 100, 64), (33, 0, 70), (33, 0, 64)):
            for joint in (False, True):
                test = partial(t.test_projections_are_as_exact_as_eagers, dtype, rows, kept, width, joint, False, *HERE)
                small = (90,) if (dtype, width, joint) == (BF16, 24, False) else ()
                name = f"{kept} of {rows} rows, D{width}, {'all for the kept' if joint else 'queries for the kept'}"
                orders = EVERY if width <= 24 else ONE
                yield Case("shrink_projection", name, NAMES[dtype], test, orders, small)
    for keys in t.KEYS:
        problem = t.make([150, 1, 33, 0, 7], keys)
        test = partial(t.check, problem, keys, "triton", FP32, "cpu", BF16, BF16)
        yield Case("adapter", f"keys={keys!r} under autocast", "bf16", test, FEW)


@functools.cache
def cases() -> list[Case]:
    groups = (
        _norm,
        _ctc,
        _vocab_rows,
        _active_columns,
        _linear_ctc,
        _linear_cross_entropy,
        _cross_entropy_options,
        _peaks,
        _splice,
        _attention,
        _adapter,
    )
    return [case for group in groups for case in group()]

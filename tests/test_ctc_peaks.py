"""Peaks of a CTC path: both implementations choose exactly the frames that eager chooses."""

import warnings

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from soundwave import eager
from soundwave.fused.functional import ctc_peaks, linear_ctc_loss, linear_ctc_path
from soundwave.kernels.ctc_peaks import COPY_BLOCK, MAX_BLOCK_T, _config, _ctc_peaks
from tests.implementations import BOTH, WHERE, skip_unless_runnable

SETTINGS = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
KEEP = ["peaks", "runs"]
BLANK = 3


def draw_path(batch, size, seed=0, ids=4, device="cpu"):
    """Few ids, so that runs are long; few different scores, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    path = torch.randint(0, ids, (batch, size), generator=generator)
    path = torch.where(torch.rand(batch, size, generator=generator) < 0.5, path, path.roll(1, 1))
    scores = torch.randint(-3, 1, (batch, size), generator=generator).float() / 4
    lengths = torch.randint(0, size + 1, (batch,), generator=generator)
    return path.to(device), lengths.to(device), scores.to(device)


def kept_run_by_run(path, lengths, scores, blank, keep):
    """bool [B, T], true where a frame is kept: the rule as a loop over utterances and runs."""
    kept = torch.zeros(path.shape, dtype=torch.bool)
    for utterance, length in enumerate(lengths.tolist()):
        start = 0
        while start < length:
            ids = path[utterance, start:length]
            stop = start + int((ids == ids[0]).long().cumprod(0).sum())
            if keep == "runs":
                kept[utterance, start] = True
            elif ids[0] != blank and not scores[utterance, start:stop].isnan().any():
                kept[utterance, start + int(scores[utterance, start:stop].float().argmax())] = True
            start = stop
        kept[utterance, 0] |= length > 0 and not kept[utterance].any()
    return kept


def assert_same(found, expected):
    assert torch.equal(found.index.cpu(), expected.index.cpu())
    assert torch.equal(found.cu_seqlens.cpu(), expected.cu_seqlens.cpu())
    assert found.max_seqlen == expected.max_seqlen and type(found.max_seqlen) is int
    assert (found.index.dtype, found.cu_seqlens.dtype) == (torch.int64, torch.int32)


# ---------------------------------------------------------------- the frames chosen


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("seed", range(5))
def test_eager_and_the_rule_as_a_loop_agree(seed, keep):
    path, lengths, scores = draw_path(4, 17, seed)
    kept = kept_run_by_run(path, lengths, scores, BLANK, keep)
    assert torch.equal(
        eager.ctc_peaks(path, lengths, blank=BLANK, keep=keep, scores=scores).index,
        kept.flatten().nonzero().squeeze(1),
    )


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize("keep", KEEP)
def test_every_drawn_path_gives_eagers_frames(keep, impl):
    skip_unless_runnable("cpu", impl)

    @settings(SETTINGS, max_examples=100 if impl == "torch" else 25)
    @given(st.data(), st.integers(0, 5), st.integers(0, 40))
    def check(data, batch, size):
        def rows(elements):
            row = st.lists(elements, min_size=size, max_size=size)
            return data.draw(st.lists(row, min_size=batch, max_size=batch))

        path = torch.tensor(rows(st.integers(0, 4)), dtype=torch.int64).view(batch, size)
        values = st.sampled_from([0.0, -0.0, -1.0, -1.5, -2.0, float("-inf"), float("inf"), float("nan")])
        scores = torch.tensor(rows(values)).view(batch, size)
        lengths = data.draw(st.lists(st.integers(0, size), min_size=batch, max_size=batch))
        lengths = torch.tensor(lengths, dtype=torch.int64)
        expected = eager.ctc_peaks(path, lengths, blank=BLANK, keep=keep, scores=scores)
        assert_same(ctc_peaks(path, lengths, blank=BLANK, keep=keep, scores=scores, impl=impl), expected)

    check()


@pytest.mark.parametrize(("device", "impl"), WHERE)
@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("size", [1, 7, 63, 100, 750])
def test_odd_sizes(size, keep, device, impl):
    skip_unless_runnable(device, impl)
    path, lengths, scores = draw_path(3, size, seed=size, device=device)
    expected = eager.ctc_peaks(path, lengths, blank=BLANK, keep=keep, scores=scores)
    assert_same(ctc_peaks(path, lengths, blank=BLANK, keep=keep, scores=scores, impl=impl), expected)


@pytest.mark.parametrize(("device", "impl"), WHERE)
@pytest.mark.parametrize("keep", KEEP)
def test_runs_go_on_from_one_block_of_frames_to_the_next(keep, device, impl):
    skip_unless_runnable(device, impl)
    size = 3 * MAX_BLOCK_T + 5
    path = torch.zeros(2, size, dtype=torch.int64, device=device)  # one run over four blocks
    path[1] = torch.arange(size, device=device) // (MAX_BLOCK_T - 1)
    scores = torch.linspace(-2, -1, size, device=device).repeat(2, 1)
    scores[0, [MAX_BLOCK_T + 7, 2 * MAX_BLOCK_T + 1]] = 0.0  # a tie between blocks
    lengths = torch.tensor([size, size - 3], device=device)
    expected = eager.ctc_peaks(path, lengths, blank=BLANK, keep=keep, scores=scores)
    assert_same(ctc_peaks(path, lengths, blank=BLANK, keep=keep, scores=scores, impl=impl), expected)
    if keep == "peaks":
        assert expected.index[0] == MAX_BLOCK_T + 7


@pytest.mark.parametrize(("device", "impl"), WHERE)
def test_more_kept_frames_than_one_program_copies(device, impl):
    skip_unless_runnable(device, impl)
    path = (torch.arange(2 * COPY_BLOCK + 9, device=device) % 2).repeat(2, 1)
    lengths = torch.tensor([path.shape[1], 5], device=device)
    found = ctc_peaks(path, lengths, blank=BLANK, keep="runs", impl=impl)
    assert_same(found, eager.ctc_peaks(path, lengths, blank=BLANK, keep="runs"))
    assert found.max_seqlen == path.shape[1]


@pytest.mark.parametrize(("device", "impl"), WHERE)
@pytest.mark.parametrize("keep", KEEP)
def test_all_blank_keeps_frame_0_and_no_frame_keeps_none(keep, device, impl):
    skip_unless_runnable(device, impl)
    path = torch.full((4, 6), BLANK, device=device)
    lengths = torch.tensor([6, 0, 1, 0], device=device)
    found = ctc_peaks(path, lengths, blank=BLANK, keep=keep, scores=torch.zeros(4, 6, device=device), impl=impl)
    assert (found.index.tolist(), found.cu_seqlens.tolist(), found.max_seqlen) == ([0, 12], [0, 1, 1, 2, 2], 1)


@pytest.mark.parametrize(("device", "impl"), WHERE)
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0), (2, 5)])
def test_nothing_to_keep(shape, device, impl):
    skip_unless_runnable(device, impl)
    path, lengths = torch.zeros(shape, dtype=torch.int64, device=device), torch.zeros(shape[0], dtype=torch.int64)
    found = ctc_peaks(path, lengths, blank=BLANK, scores=torch.zeros(shape, device=device), impl=impl)
    assert_same(found, eager.Peaks(path.new_zeros(0), torch.zeros(shape[0] + 1, dtype=torch.int32), 0))


def test_a_batch_of_no_utterances_takes_an_empty_list_of_lengths():
    peaks = ctc_peaks(torch.zeros(0, 5, dtype=torch.int64), [], blank=0, keep="runs")
    assert peaks.index.shape == (0,) and peaks.cu_seqlens.tolist() == [0] and peaks.max_seqlen == 0
    hidden, weight = torch.zeros(0, 5, 3), torch.ones(6, 3)
    assert linear_ctc_path(hidden, weight, [], blank=0)[0].shape == (0, 5)
    assert linear_ctc_loss(hidden, weight, None, [], None, blank=0).path.shape == (0, 5)


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize("keep", KEEP)
def test_lengths_in_a_column_of_a_table_or_a_list_give_the_same(keep, impl):
    skip_unless_runnable("cpu", impl)
    path, scores = torch.tensor([[1, 1, 0, 2], [0, 2, 2, 1]]), torch.randn(2, 4)
    table = torch.tensor([[4, 1], [2, 3]])
    expected = ctc_peaks(path, torch.tensor([4, 2]), blank=0, keep=keep, scores=scores, impl=impl)
    for lengths in (table[:, 0], [4, 2]):
        found = ctc_peaks(path, lengths, blank=0, keep=keep, scores=scores, impl=impl)
        assert torch.equal(found.index, expected.index) and torch.equal(found.cu_seqlens, expected.cu_seqlens)


@pytest.mark.parametrize(("device", "impl"), WHERE)
def test_a_run_with_a_nan_score_has_no_peak(device, impl):
    skip_unless_runnable(device, impl)
    path = torch.tensor([[1, 1, 1, 2, 2], [1, 1, 1, 1, 1]], device=device)
    scores = torch.tensor([[0.0, torch.nan, 0.0, -1.0, 0.0], [torch.inf, torch.inf, 0, torch.nan, 0]], device=device)
    found = ctc_peaks(path, torch.tensor([5, 5]), blank=BLANK, scores=scores, impl=impl)
    assert found.index.tolist() == [4, 5]  # frame 0 of the second utterance: nothing else was kept


@pytest.mark.parametrize(("device", "impl"), WHERE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=["fp64", "bf16", "fp16"])
def test_scores_of_any_dtype_and_int32_paths(dtype, device, impl):
    skip_unless_runnable(device, impl)
    path, lengths, scores = draw_path(3, 33, device=device)
    path, lengths, scores = path.int(), lengths.int(), scores.to(dtype)
    if dtype == torch.float64:  # differences that fp32 cannot hold are ties
        scores += torch.linspace(0, 1e-12, 33, dtype=dtype, device=device)
    expected = eager.ctc_peaks(path, lengths, blank=BLANK, scores=scores)
    assert_same(ctc_peaks(path, lengths, blank=BLANK, scores=scores, impl=impl), expected)


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize("keep", KEEP)
def test_transposed_and_sliced_tensors_are_read_right(keep, impl):
    skip_unless_runnable("cpu", impl)
    path, lengths, scores = draw_path(4, 33)
    expected = eager.ctc_peaks(path, lengths, blank=BLANK, keep=keep, scores=scores)
    wide = torch.cat([scores, scores], 1)[:, :33]
    for strided_path, strided_scores in ((path.t().contiguous().t(), scores.t().contiguous().t()), (path, wide)):
        found = ctc_peaks(strided_path, lengths, blank=BLANK, keep=keep, scores=strided_scores, impl=impl)
        assert_same(found, expected)


@pytest.mark.parametrize("impl", BOTH)
def test_values_past_a_length_do_not_matter(impl):
    skip_unless_runnable("cpu", impl)
    path, lengths, scores = draw_path(4, 33)
    expected = ctc_peaks(path, lengths, blank=BLANK, scores=scores, impl=impl)
    past = ~eager.length_mask(lengths, 33)
    for filling in (-1, -100, BLANK, 10**9):
        found = ctc_peaks(
            path.masked_fill(past, filling),
            lengths,
            blank=BLANK,
            scores=scores.masked_fill(past, torch.nan),
            impl=impl,
        )
        assert_same(found, expected)


def test_no_gradient_reaches_the_scores():
    path, lengths, scores = draw_path(2, 9)
    found = ctc_peaks(path, lengths, blank=BLANK, scores=scores.requires_grad_())
    assert not found.index.requires_grad and not found.cu_seqlens.requires_grad


@pytest.mark.parametrize(("device", "impl"), WHERE)
def test_the_same_frames_every_time(device, impl):
    skip_unless_runnable(device, impl)
    path, lengths, scores = draw_path(5, 63, device=device)
    first = ctc_peaks(path, lengths, blank=BLANK, scores=scores, impl=impl)
    for _ in range(20 if device == "cuda" or impl == "torch" else 3):
        assert_same(ctc_peaks(path, lengths, blank=BLANK, scores=scores, impl=impl), first)


# ---------------------------------------------------------------- torch.library, torch.compile, CUDA


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize("keep", KEEP)
def test_opcheck(keep, impl):
    skip_unless_runnable("cpu", impl)
    path, lengths, scores = draw_path(3, 9)
    torch.library.opcheck(_ctc_peaks, (path, lengths, scores if keep == "peaks" else None, BLANK, keep, impl))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_graph_with_any_number_of_kept_frames(backend, device):
    def function(path, lengths, scores, hidden):
        peaks = ctc_peaks(path, lengths, blank=BLANK, scores=scores)
        return peaks, hidden.flatten(0, 1)[peaks.index] * peaks.max_seqlen

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    hidden = torch.randn(3, 33, 5, device=device)
    for seed in range(3):
        path, lengths, scores = draw_path(3, 33, seed, device=device)
        (found, rows), (expected, wanted) = (
            compiled(path, lengths, scores, hidden),
            function(path, lengths, scores, hidden),
        )
        assert_same(found, expected)
        assert torch.equal(rows, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_one_copy_to_the_host_is_all_the_waiting(impl):
    path, lengths, scores = draw_path(4, 100, device="cuda")
    ctc_peaks(path, lengths, blank=BLANK, scores=scores, impl=impl)  # compiles
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ctc_peaks(path, lengths, blank=BLANK, scores=scores, impl=impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(warning.message) for warning in caught) == 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_in_triton_lengths_out_of_range_read_nothing_out_of_bounds(device):
    """On CUDA lengths are not checked. The test calls the operation itself, because CPU lengths are refused before."""
    skip_unless_runnable(device, "triton")
    from soundwave.kernels import ctc_peaks as op

    path, _, scores = draw_path(2, 9, device=device)
    lengths, counts = torch.tensor([100, -4], device=device), torch.full((2,), -1, dtype=torch.int32, device=device)
    frames = torch.full((2, 9), -1, device=device)
    op._ctc_peaks_kernel[(2,)](path, lengths, scores, frames, counts, 9, 9, 9, BLANK, PEAKS=True, BLOCK_T=_config(9))
    expected = eager.ctc_peaks(path, torch.tensor([9, 0], device=device), blank=BLANK, scores=scores)
    assert counts.tolist() == expected.cu_seqlens.diff().tolist()
    assert frames[0, : expected.max_seqlen].tolist() == expected.index.tolist() and bool((frames[1] == -1).all())


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": torch.zeros(1, 2, 3)}, r"path has shape \[1, 2, 3\], but it must be \[B, T\]"),
        ({"path": torch.zeros(3, dtype=torch.int64)}, r"scores has shape \[2, 3\], but it must be \[3\]"),
        ({"path": torch.zeros(2, 3)}, "path is torch.float32, but it must be int32 or int64"),
        ({"lengths": torch.tensor([3])}, r"lengths has shape \[1\], but it must be \[2\]"),
        ({"lengths": torch.tensor([3.0, 2.0])}, "lengths is torch.float32, but it must be of an integer dtype"),
        ({"lengths": torch.tensor([3, 4])}, r"lengths\[1\] = 4, but it must be 0 to 3, the frames of path"),
        ({"lengths": torch.tensor([-1, 3])}, r"lengths\[0\] = -1, but it must be 0 to 3"),
        ({"scores": None}, "scores = None, but keep='peaks' chooses by the score of each frame"),
        ({"scores": torch.zeros(2, 4)}, r"scores has shape \[2, 4\], but it must be \[2, 3\]"),
        ({"scores": torch.zeros(2, 3, dtype=torch.int64)}, "scores is torch.int64, but it must be floating point"),
        ({"scores": torch.zeros(2, 3, device="meta")}, "scores is on meta, but the other tensors are on cpu"),
        ({"keep": "all"}, "keep = 'all', but it must be 'peaks' or 'runs'"),
        ({"impl": "cuda"}, "impl = 'cuda', but it must be one of auto, triton, torch"),
        ({"blank": 0.0}, "blank = 0.0, but it must be an integer"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(change, message):
    arguments = {
        "path": torch.zeros(2, 3, dtype=torch.int64),
        "lengths": torch.tensor([3, 2]),
        "blank": 0,
        "scores": torch.zeros(2, 3),
    }
    with pytest.raises(ValueError, match=message):
        ctc_peaks(**(arguments | change))


@given(st.integers(1, 10**6))
@example(MAX_BLOCK_T)
@settings(deadline=None)
def test_a_step_covers_the_path_or_is_the_largest(size):
    block = _config(size)
    assert block.bit_count() == 1 and 32 <= block <= MAX_BLOCK_T and (block >= size or block == MAX_BLOCK_T)

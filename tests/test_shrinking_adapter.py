"""The shrinking adapter and its projections against eager in fp64 and in the same dtype: every gradient, every use."""

import itertools

import pytest
import torch

from soundwave import eager
from soundwave.fused.adapters import AlignmentAdapter, ShrinkingAdapter
from soundwave.fused.functional import ctc_peaks, shrink_attention
from soundwave.kernels import shrink_projection as op
from soundwave.kernels.shrink_projection import _backward, _forward, shrink_projection, shrink_projection_ref
from soundwave.model.configuration import SoundwaveConfig
from tests.accuracy import assert_as_accurate, assert_rms, relative
from tests.implementations import BOTH, WHERE, skip_unless_runnable

pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
KEYS = ["all", "kept"]
LENGTHS = {"ragged": [9, 1, 33, 0, 7], "full": [33, 33]}
WIDTH, HEADS, BLANK = 24, 3, 0


def make(lengths, keys, width=WIDTH, heads=HEADS, seed=0):
    """An eager adapter with drawn parameters, hidden, lengths and peaks; in float64, so that each dtype rounds once."""
    generator = torch.Generator().manual_seed(seed)
    config = SoundwaveConfig(hidden_size=width, num_attention_heads=heads, keys=keys)
    adapter = eager.ShrinkingAdapter(config).double()
    for parameter in adapter.parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=FP64)
        parameter.data = drawn * (width**-0.5 if parameter.dim() == 2 else 1.0)
    size, batch = max(lengths), len(lengths)
    hidden = torch.randn(batch, size, width, generator=generator, dtype=FP64)
    path = torch.randint(0, 3, (batch, size), generator=generator)
    scores = torch.randn(batch, size, generator=generator)
    lengths = torch.tensor(lengths)
    return adapter, hidden, lengths, eager.ctc_peaks(path, lengths, blank=BLANK, scores=scores)


def fused_of(adapter, keys, impl):
    width = adapter.in_proj_weight.shape[1]
    config = SoundwaveConfig(hidden_size=width, num_attention_heads=adapter.num_heads, keys=keys)
    fused = ShrinkingAdapter(config, impl=impl).to(adapter.in_proj_weight)
    fused.load_state_dict(adapter.state_dict())
    return fused


def everything(adapter, hidden, lengths, peaks, upstream, autocast=None):
    """The result and every gradient by name, separately for the three projections.

    Their biases stay together: the one of the keys shifts all scores of a query alike, its gradient is but roundings.
    """
    hidden = hidden.detach().requires_grad_()
    with torch.autocast(hidden.device.type, autocast, enabled=autocast is not None):
        out = adapter(hidden, lengths, peaks)
    names, parameters = zip(*adapter.named_parameters(), strict=True)
    dhidden, *gradients = torch.autograd.grad(out, [hidden, *parameters], upstream.to(out))
    found = {"out": out.detach(), "hidden": dhidden} | dict(zip(names, gradients, strict=True))
    for name, part in zip("qkv", found.pop("in_proj_weight").chunk(3), strict=True):
        found[f"weight_{name}"] = part
    return found


def check(problem, keys, impl, dtype, device, autocast=None, hidden_dtype=None):
    """Asserts dtype and accuracy of everything; returns (our error, eager's) by name, over the norm of the truth."""
    adapter, hidden, lengths, peaks = problem
    peaks = eager.Peaks(peaks.index.to(device), peaks.cu_seqlens.to(device), peaks.max_seqlen)
    upstream = torch.randn(peaks.index.numel(), hidden.shape[2], generator=torch.Generator().manual_seed(1))
    reference = eager.ShrinkingAdapter(
        SoundwaveConfig(hidden_size=hidden.shape[2], num_attention_heads=adapter.num_heads, keys=keys)
    ).to(device, dtype)
    reference.load_state_dict(adapter.state_dict())
    rounded = hidden.to(device, hidden_dtype or dtype)
    exact = eager.ShrinkingAdapter(
        SoundwaveConfig(hidden_size=hidden.shape[2], num_attention_heads=adapter.num_heads, keys=keys)
    ).to(device, FP64)
    exact.load_state_dict(reference.state_dict())
    upstream = upstream.to(autocast or dtype)  # in a dtype that each of them can represent
    found = everything(fused_of(reference, keys, impl), rounded, lengths, peaks, upstream, autocast)
    theirs = everything(reference, rounded, lengths, peaks, upstream, autocast)
    truth = everything(exact, rounded.double(), lengths, peaks, upstream)
    pairs = {}
    for name, expected in truth.items():
        assert found[name].dtype == theirs[name].dtype, name
        got = assert_as_accurate(found[name], theirs[name], expected, autocast or dtype, name)
        pairs[name] = relative(got, expected)
    return pairs


# ---------------------------------------------------------------- accuracy of the module


def test_without_keys_the_result_is_the_norm_of_the_kept_frames():
    adapter, hidden, lengths, peaks = make(LENGTHS["ragged"], "none")
    out = fused_of(adapter, "none", "auto")(hidden, lengths, peaks)
    assert torch.equal(out, adapter.norm(hidden.flatten(0, 1)[peaks.index]))
    assert torch.equal(out, adapter(hidden, lengths, peaks))


@pytest.mark.parametrize(("device", "impl"), WHERE)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
def test_result_and_gradients_are_as_exact_as_eagers(dtype, keys, lengths, device, impl):
    skip_unless_runnable(device, impl, dtype, fp64=False)
    check(make(LENGTHS[lengths], keys), keys, impl, dtype, device)


@pytest.mark.parametrize(("device", "impl"), WHERE)
@pytest.mark.parametrize("lengths", [[9, 1, 33, 0, 7], [33, 33], [1]], ids=["ragged", "full", "one-frame"])
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("dtype", [FP32, FP64], ids=["fp32", "fp64"])
def test_the_same_numbers_as_eager_to_rounding(dtype, keys, lengths, device, impl):
    """fp64 is compared with eager itself. With one frame the scores have no gradient, so what is found is rounding."""
    skip_unless_runnable(device, impl, dtype, fp64=False)
    adapter, hidden, lengths, peaks = make(lengths, keys)
    peaks = peaks._replace(index=peaks.index.to(device), cu_seqlens=peaks.cu_seqlens.to(device))
    adapter, hidden = adapter.to(device, dtype), hidden.to(device, dtype)
    upstream = torch.randn(peaks.index.numel(), WIDTH, device=device)
    expected = everything(adapter, hidden, lengths, peaks, upstream)
    found = everything(fused_of(adapter, keys, impl), hidden, lengths, peaks, upstream)
    for name in expected:
        norm = max(float(expected[name].abs().max()), 1.0)
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=256 * torch.finfo(dtype).eps * norm)


@pytest.mark.parametrize(("device", "impl"), WHERE)
@pytest.mark.parametrize("hidden_dtype", [FP32, BF16], ids=["fp32-hidden", "bf16-hidden"])
@pytest.mark.parametrize("keys", KEYS)
def test_under_autocast_too_with_eagers_dtypes(keys, hidden_dtype, device, impl):
    skip_unless_runnable(device, impl, BF16)
    check(make(LENGTHS["ragged"], keys), keys, impl, FP32, device, BF16, hidden_dtype)


def test_autocast_in_the_interpreter():
    skip_unless_runnable("cpu", "triton")
    check(make(LENGTHS["ragged"], "all"), "all", "triton", FP32, "cpu", FP16)


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("autocast", [None, BF16], ids=["fp32", "autocast"])
def test_over_many_draws_the_error_is_as_small_as_eagers(autocast, keys):
    pairs = [
        check(make(lengths, keys, width, 2, seed), keys, "torch", FP32, "cpu", autocast)
        for seed, (lengths, width) in enumerate(itertools.product(([63, 7, 20], [5, 9], [33]), (8, 50, 126)))
    ]
    floor = torch.finfo(autocast or FP32).eps / 4
    for name in pairs[0]:
        assert_rms([pair[name] for pair in pairs], floor, name)


@pytest.mark.gpu
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("lengths", ["full", "ragged"])
def test_at_the_size_of_the_model(lengths, keys):
    frames = [400] * 4 if lengths == "full" else [400, 31, 250, 1]
    problem = make(frames, keys, 4096, 32)
    check(problem, keys, "triton", FP32, "cuda", BF16, BF16)


# ---------------------------------------------------------------- the module's behaviour


def test_parameters_and_state_are_eagers():
    config = SoundwaveConfig(hidden_size=WIDTH, num_attention_heads=HEADS)
    state, expected = ShrinkingAdapter(config).state_dict(), eager.ShrinkingAdapter(config).state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == {n: t.shape for n, t in expected.items()}
    assert ShrinkingAdapter(config).impl == "auto"


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize("keys", KEYS)
def test_what_lies_past_a_length_does_not_matter(keys, impl):
    skip_unless_runnable("cpu", impl)
    adapter, hidden, lengths, peaks = make(LENGTHS["ragged"], keys)
    fused, hidden = fused_of(adapter.float(), keys, impl), hidden.float()
    expected = fused(hidden, lengths, peaks)
    past = ~eager.length_mask(lengths, hidden.shape[1])
    spoilt = hidden.masked_fill(past[..., None], torch.nan).requires_grad_()
    out = fused(spoilt, lengths, peaks)
    assert torch.equal(out, expected)
    (gradient,) = torch.autograd.grad(out.square().sum(), spoilt)
    assert not gradient[past].any() and gradient.isfinite().all()


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize(("batch", "size"), [(0, 4), (2, 0), (2, 4)])
def test_no_valid_frames_at_all(batch, size, keys, impl):
    skip_unless_runnable("cpu", impl)
    config = SoundwaveConfig(hidden_size=WIDTH, num_attention_heads=HEADS, keys=keys)
    adapter, lengths = ShrinkingAdapter(config, impl=impl), torch.zeros(batch, dtype=torch.int64)
    path = torch.zeros(batch, size, dtype=torch.int64)
    peaks = ctc_peaks(path, lengths, blank=BLANK, keep="runs", impl=impl)
    hidden = torch.randn(batch, size, WIDTH, requires_grad=True)
    out = adapter(hidden, lengths, peaks)
    assert out.shape == (0, WIDTH)
    out.sum().backward()
    assert not hidden.grad.any() and not adapter.in_proj_weight.grad.any()


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize("keys", KEYS)
def test_a_frozen_adapter_passes_the_gradient_of_hidden_on(keys, impl):
    skip_unless_runnable("cpu", impl)
    adapter, hidden, lengths, peaks = make(LENGTHS["ragged"], keys)
    fused, hidden = fused_of(adapter.float(), keys, impl), hidden.float().requires_grad_()
    (expected,) = torch.autograd.grad(fused(hidden, lengths, peaks).square().sum(), hidden)
    fused.requires_grad_(False)
    (found,) = torch.autograd.grad(fused(hidden, lengths, peaks).square().sum(), hidden)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize("keys", KEYS)
def test_frozen_frames_leave_the_other_gradients_alone(keys, impl):
    skip_unless_runnable("cpu", impl)
    adapter, hidden, lengths, peaks = make(LENGTHS["ragged"], keys)
    fused, hidden = fused_of(adapter.float(), keys, impl), hidden.float()
    parameters = list(fused.parameters())
    expected = torch.autograd.grad(fused(hidden.requires_grad_(), lengths, peaks).square().sum(), parameters)
    found = torch.autograd.grad(fused(hidden.detach(), lengths, peaks).square().sum(), parameters)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("device", "impl"), WHERE)
@pytest.mark.parametrize("keys", KEYS)
def test_results_are_bitwise_the_same_every_time(keys, device, impl):
    skip_unless_runnable(device, impl)
    adapter, hidden, lengths, peaks = make(LENGTHS["ragged"], keys)
    peaks = peaks._replace(index=peaks.index.to(device), cu_seqlens=peaks.cu_seqlens.to(device))
    fused, hidden = fused_of(adapter.float(), keys, impl).to(device), hidden.float().to(device)
    upstream = torch.randn(peaks.index.numel(), WIDTH, device=device)
    first = everything(fused, hidden, lengths, peaks, upstream)
    for _ in range(20 if device == "cuda" or impl == "torch" else 2):
        again = everything(fused, hidden, lengths, peaks, upstream)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 5, 7)}, r"hidden has shape \[2, 5, 7\], but it must be \[B, T, 24\]"),
        ({"hidden": torch.zeros(1, 2, 5, 24)}, r"hidden has shape \[1, 2, 5, 24\], but it must be \[B, T, 24\]"),
        ({"hidden": torch.zeros(10, 24)}, "lengths add up to 8, but hidden has 10 packed rows"),
        ({"lengths": torch.tensor([5])}, r"lengths is torch.int64 of shape \[1\], but it must be int \[2\]"),
        ({"lengths": torch.tensor([5.0, 1.0])}, "lengths is torch.float32 of shape"),
        ({"lengths": torch.tensor([6, 1])}, "lengths go from 0 to 6, but each must be 0 to 5, the frames of hidden"),
        ({"lengths": torch.tensor([-1, 1])}, "lengths go from -1 to 1, but each must be 0 to 5"),
        ({"hidden": torch.zeros(2, 5, 24, dtype=FP16)}, "x is torch.float16, but weight is torch.float32"),
        (
            {"peaks": eager.Peaks(torch.tensor([1, 10]), torch.tensor([0, 1, 2], dtype=torch.int32), 1)},
            r"peaks.index\[1\] = 10, but it must be 5 or more and below 8, a frame of utterance 1",
        ),
        (
            {"peaks": eager.Peaks(torch.tensor([3, 1, 6]), torch.tensor([0, 2, 3], dtype=torch.int32), 2)},
            r"peaks.index\[1\] = 1 comes after 3, but peaks.index must rise",
        ),
        (
            {"peaks": eager.Peaks(torch.tensor([1, 6]), torch.tensor([0, 1, 3], dtype=torch.int32), 2)},
            r"peaks.cu_seqlens = \[0, 1, 3\], but it must rise from 0 to 2",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(change, message):
    adapter = ShrinkingAdapter(SoundwaveConfig(hidden_size=WIDTH, num_attention_heads=HEADS))
    good = {
        "hidden": torch.zeros(2, 5, 24),
        "lengths": torch.tensor([5, 3]),
        "peaks": eager.Peaks(torch.tensor([1, 6]), torch.tensor([0, 1, 2], dtype=torch.int32), 1),
    }
    with pytest.raises(ValueError, match=message):
        adapter(**(good | change))


BOUNDS = torch.tensor([0, 1, 2], dtype=torch.int32)


@pytest.mark.parametrize("keys", ["all", "kept", "none"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": torch.tensor([2, 99])}, "lengths go from 0 to 99, but each must be 0 to 4, the frames of hidden"),
        ({"lengths": torch.tensor([True, True])}, r"lengths is torch.bool of shape \[2\], but it must be int \[2\]"),
        ({"index": torch.tensor([0, 9])}, r"peaks.index\[1\] = 9, but it must be 4 or more and below 8"),
        ({"index": torch.tensor([-1, 4])}, r"peaks.index\[0\] = -1, but it must be 0 or more and below 2"),
        ({"index": torch.tensor([0, 3])}, r"peaks.index\[1\] = 3, but it must be 4 .*, a frame of utterance 1"),
        ({"index": torch.tensor([3, 4])}, r"peaks.index\[0\] = 3, but it must be 0 or more and below 2"),
        ({"index": torch.tensor([0.0, 4.0])}, "peaks.index is torch.float32, but it must be int32 or int64"),
        ({"cu_seqlens": BOUNDS[:2]}, r"peaks.cu_seqlens has shape \[2\], but it must be \[3\]"),
        ({"cu_seqlens": torch.tensor([0, 3, 2], dtype=torch.int32)}, r"peaks.cu_seqlens = \[0, 3, 2\], but it must"),
        ({"max_seqlen": 0}, "peaks.max_seqlen = 0, but an utterance has 1 kept frames"),
    ],
    ids=["long", "bool", "past", "negative", "anothers", "padding", "floating", "bounds", "falling", "longest"],
)
def test_peaks_of_other_frames_are_refused_whatever_attends(change, message, keys):
    adapter = ShrinkingAdapter(SoundwaveConfig(hidden_size=16, num_attention_heads=2, keys=keys))
    lengths = change.get("lengths", torch.tensor([2, 4]))
    peaks = eager.Peaks(torch.tensor([0, 4]), BOUNDS, 1)
    with pytest.raises(ValueError, match=message):
        adapter(torch.zeros(2, 4, 16), lengths, peaks._replace(**{k: v for k, v in change.items() if k != "lengths"}))


@pytest.mark.parametrize("keys", ["all", "kept", "none"])
def test_lengths_may_be_a_list_and_peaks_may_not(keys):
    adapter = ShrinkingAdapter(SoundwaveConfig(hidden_size=16, num_attention_heads=2, keys=keys))
    hidden, peaks = torch.randn(2, 4, 16), eager.Peaks(torch.tensor([0, 4]), BOUNDS, 1)
    assert torch.equal(adapter(hidden, [2, 4], peaks), adapter(hidden, torch.tensor([2, 4]), peaks))
    assert adapter(hidden[:0], [], eager.Peaks(peaks.index[:0], BOUNDS[:1], 0)).shape == (0, 16)
    with pytest.raises(TypeError, match="peaks.cu_seqlens is a list, but it must be a tensor"):
        adapter(hidden, [2, 4], peaks._replace(cu_seqlens=[0, 1, 2]))
    with pytest.raises(TypeError, match="peaks is a tuple, but it must be the Peaks that ctc_peaks returns"):
        adapter(hidden, [2, 4], tuple(peaks))
    with pytest.raises(TypeError, match="hidden is a list, but it must be a tensor"):
        adapter([hidden], [2, 4], peaks)
    with pytest.raises(TypeError, match="lengths = None, but it must be a tensor or a sequence of integers"):
        adapter(hidden, None, peaks)


def test_the_alignment_adapter_takes_a_list_of_lengths_and_no_bool():
    adapter = AlignmentAdapter(SoundwaveConfig(hidden_size=16, num_attention_heads=2)).eval()
    frames = torch.randn(2, 5, adapter.projector.in_features // adapter.frame_stack)
    for found, expected in zip(adapter(frames, [5, 3]), adapter(frames, torch.tensor([5, 3])), strict=True):
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=r"lengths is torch.bool of shape \[2\], but it must be int \[2\]"):
        adapter(frames, torch.tensor([True, True]))


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize("keys", KEYS)
def test_peaks_in_a_column_of_a_table_give_the_same(keys, impl):
    skip_unless_runnable("cpu", impl)
    adapter, hidden, lengths, peaks = make(LENGTHS["ragged"], keys)
    fused, hidden = fused_of(adapter.float(), keys, impl), hidden.float()
    upstream = torch.randn(peaks.index.numel(), WIDTH)
    column = peaks._replace(index=torch.stack([peaks.index, peaks.index.flip(0)], 1)[:, 0])
    expected, found = (everything(fused, hidden, lengths, x, upstream) for x in (peaks, column))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("keys", ["kept", "none"])
def test_without_all_frames_as_keys_the_adapter_compiles_as_one_graph(keys):
    adapter, hidden, lengths, peaks = make(LENGTHS["ragged"], keys)
    fused, hidden = fused_of(adapter.float(), keys, "torch"), hidden.float()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden, lengths, peaks), fused(hidden, lengths, peaks))


# ---------------------------------------------------------------- the projections alone


def projections(rows_of_x, kept, width, dtype=FP32, all_rows=False, device="cpu"):
    """x, weight and bias, and which rows are kept and valid."""
    generator = torch.Generator().manual_seed(rows_of_x)
    drawn = [
        torch.randn(*shape, generator=generator, dtype=FP64).to(device, dtype).requires_grad_()
        for shape in ((rows_of_x, width), (3 * width, width), (3 * width,))
    ]
    index = torch.randperm(rows_of_x, generator=generator)[:kept].sort().values.to(device)
    rows = torch.arange(0, rows_of_x, 1 + (rows_of_x > 1), device=device)
    return drawn, index, None if all_rows else rows


@pytest.mark.parametrize(("device", "impl"), WHERE)
@pytest.mark.parametrize("all_rows", [False, True], ids=["some-rows", "all-rows"])
@pytest.mark.parametrize("joint", [False, True], ids=["queries", "kept"])
@pytest.mark.parametrize(("rows", "kept", "width"), [(1, 1, 7), (7, 0, 16), (63, 7, 24), (200, 100, 70)])
@pytest.mark.parametrize("dtype", [FP32, FP64, BF16, FP16], ids=["fp32", "fp64", "bf16", "fp16"])
def test_projections_are_as_exact_as_eagers(dtype, rows, kept, width, joint, all_rows, device, impl):
    skip_unless_runnable(device, impl, dtype, fp64=False)
    (x, weight, bias), index, some = projections(rows, kept, width, dtype, all_rows, device)

    def run(function, *tensors):
        out = function(*tensors)
        generator = torch.Generator().manual_seed(2)
        upstream = [torch.randn(part.shape, generator=generator).to(device, dtype).to(part.dtype) for part in out]
        return [*(part.detach() for part in out), *torch.autograd.grad(out, tensors, upstream)]

    def reference(x, weight, bias):
        return shrink_projection_ref(x, index, index if joint else some, weight, bias)

    found = run(lambda *t: shrink_projection(t[0], index, some, *t[1:], kept=joint, impl=impl), x, weight, bias)
    theirs = run(reference, x, weight, bias)
    truth = run(reference, *(t.detach().double().requires_grad_() for t in (x, weight, bias)))
    for name, a, b, c in zip(("q", "k", "v", "dx", "dweight", "dbias"), found, theirs, truth, strict=True):
        assert a.dtype == dtype, name
        assert_as_accurate(a, b, c, dtype, name)


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize("wanted", range(3), ids=["x", "weight", "bias"])
@pytest.mark.parametrize("joint", [False, True], ids=["queries", "kept"])
def test_a_single_gradient_is_the_one_of_all_together(joint, wanted, impl):
    skip_unless_runnable("cpu", impl)
    tensors, index, rows = projections(33, 7, 16)

    def loss():
        return sum(
            part.square().sum()
            for part in shrink_projection(tensors[0], index, rows, *tensors[1:], kept=joint, impl=impl)
        )

    together = torch.autograd.grad(loss(), tensors)
    for place, tensor in enumerate(tensors):
        tensor.requires_grad_(place == wanted)
    (alone,) = torch.autograd.grad(loss(), tensors[wanted])
    assert torch.equal(alone, together[wanted])


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize("joint", [False, True], ids=["queries", "kept"])
@pytest.mark.parametrize("all_rows", [False, True], ids=["some-rows", "all-rows"])
def test_opcheck(all_rows, joint, impl):
    skip_unless_runnable("cpu", impl)
    (x, weight, bias), index, rows = projections(9, 4, 16, all_rows=all_rows)
    rows = None if joint else rows
    torch.library.opcheck(_forward, (x, index, rows, weight, bias, joint, impl))
    q, k, v = (
        None if joint and n else part.detach()
        for n, part in enumerate(_forward(x, index, rows, weight, bias, joint, impl))
    )
    for need in ((True, True, True), (True, False, False), (False, True, False)):
        torch.library.opcheck(_backward, (q, k, v, x.detach(), index, rows, weight.detach(), *need, impl))


def test_projections_compile_as_one_graph_for_any_number_of_rows():
    def function(x, index, rows, weight, bias):
        return shrink_projection(x, index, rows, weight, bias)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (9, 33):
        (x, weight, bias), index, rows = projections(size, 5, 16)
        found, expected = (f(x, index, rows, weight, bias) for f in (compiled, function))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        gradients = [torch.autograd.grad([part.sum() for part in out], (x, weight, bias)) for out in (found, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_from_the_path_to_the_attended_frames_all_compiles_as_one_graph():
    """The number of kept frames and the longest utterance are sizes that are known only at run time."""

    def function(hidden, path, lengths, scores, weight, bias):
        peaks = ctc_peaks(path, lengths, blank=BLANK, scores=scores)
        x, bounds = hidden.flatten(0, 1), torch.arange(0, path.numel() + 1, path.shape[1], dtype=torch.int32)
        q, k, v = (p.unflatten(1, (2, -1)) for p in shrink_projection(x, peaks.index, None, weight, bias))
        return shrink_attention(q, k, v, peaks.cu_seqlens, bounds, peaks.max_seqlen, path.shape[1]).sin()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    weight, bias = torch.randn(48, 16, requires_grad=True), torch.randn(48)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(3, 9, 16, generator=generator, requires_grad=True)
        path, scores = torch.randint(0, 3, (3, 9), generator=generator), torch.randn(3, 9, generator=generator)
        arguments = (hidden, path, torch.tensor([9, 9, 9]), scores, weight, bias)
        found, expected = compiled(*arguments), function(*arguments)
        assert torch.equal(found, expected)
        gradients = [torch.autograd.grad(out.sum(), (hidden, weight)) for out in (found, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("impl", BOTH)
def test_a_second_derivative_is_refused(impl):
    skip_unless_runnable("cpu", impl)
    (x, weight, bias), index, rows = projections(9, 4, 16)
    q, _, _ = shrink_projection(x, index, rows, weight, bias, impl=impl)
    (gradient,) = torch.autograd.grad(q.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="shrink_projection has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_in_triton_a_row_that_does_not_exist_is_nan_and_touches_no_other(device):
    skip_unless_runnable(device, "triton")
    (x, weight, bias), _, _ = projections(5, 0, 16, device=device)
    index = torch.tensor([1, 3, 5, -1], device=device)
    q, _, _ = shrink_projection(x, index, None, weight, bias, impl="triton")
    assert q[2:].isnan().all() and not q[:2].isnan().any()
    dx, dweight = torch.autograd.grad(q[:2].sum(), (x, weight))
    assert dx[[1, 3]].all() and not dx[[0, 2, 4]].any() and not dweight.isnan().any()


def test_settings_take_larger_tiles_only_where_addresses_are_cheap():
    assert op._config(BF16, True, 86, False) != op._config(BF16, True, 90, False)
    assert op._config(BF16, False, 86, False) == op._config(FP32, True, 90, False)
    assert op._config(BF16, True, 86, True)._replace(maxnreg=None) == op._config(BF16, True, 86, False)

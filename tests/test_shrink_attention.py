"""Packed cross-attention: both implementations against fp64 and torch's own attention, every gradient."""

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from soundwave import eager
from soundwave.fused.functional import shrink_attention
from soundwave.kernels.padded_attention import (
    flash_attention,
    flash_attention_backward,
    padded_attention,
    padded_attention_backward,
)
from soundwave.kernels.shrink_attention import MAX_E, _backward, _config, _forward
from tests.accuracy import assert_as_accurate, assert_rms, relative
from tests.implementations import BOTH, WHERE, skip_unless_runnable

pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
NAMES = ("out", "dquery", "dkey", "dvalue")
SETTINGS = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
# Queries and keys of each utterance: odd, equal, few or none of either.
LENGTHS = {
    "odd": ([3, 7, 1], [63, 7, 100]),
    "equal": ([5, 5], [9, 9]),
    "more-queries": ([63, 33], [1, 7]),
    "empty-ones": ([0, 7, 0, 2, 0], [5, 63, 0, 1, 1]),
    "no-keys": ([3, 2, 1], [0, 7, 0]),
}


def bounds(lengths, device="cpu"):
    return F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0), (1, 0)).to(device, torch.int32)


def make(lengths_q, lengths_k, heads, size, dtype=FP32, device="cpu", seed=0, scale=1.0):
    """query, key and value, the last two from one buffer as after a joint projection; and the four bounds."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(*shape, generator=generator, dtype=FP64) * scale).to(device, dtype)

    query, both = draw(sum(lengths_q), heads, size), draw(sum(lengths_k), 2, heads, size)
    tensors = [x.detach().requires_grad_() for x in (query, *both.unbind(1))]
    where = (bounds(lengths_q, device), bounds(lengths_k, device), max(lengths_q), max(lengths_k))
    return tensors, where


def eager_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, scale):
    """torch's attention, one utterance after the other; 0 without keys."""
    parts = []
    for b in range(cu_seqlens_q.numel() - 1):
        q = query[cu_seqlens_q[b] : cu_seqlens_q[b + 1]]
        k, v = (x[cu_seqlens_k[b] : cu_seqlens_k[b + 1]] for x in (key, value))
        if not q.shape[0] or not k.shape[0]:
            parts.append(q * 0)
            continue
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        parts.append(F.scaled_dot_product_attention(q, k, v, scale=scale)[0].transpose(0, 1))
    return torch.cat(parts)


def everything(function, tensors, upstream):
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream.to(out.dtype))]


def check(tensors, where, impl, scale=None):
    """Asserts the accuracy of the result and all gradients; returns (our error, torch's) over the norm of the truth."""
    query = tensors[0]
    upstream = torch.randn(query.shape, generator=torch.Generator().manual_seed(1)).to(query.device, query.dtype)
    factor = query.shape[2] ** -0.5 if scale is None else scale
    found = everything(lambda *x: shrink_attention(*x, *where, scale=scale, impl=impl), tensors, upstream)
    theirs = everything(lambda *x: eager_attention(*x, *where[:2], factor), tensors, upstream)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    truth = everything(lambda *x: eager.shrink_attention(*x, *where, scale=factor), wide, upstream)
    pairs = []
    for name, a, b, c in zip(NAMES, found, theirs, truth, strict=True):
        assert a.dtype == query.dtype, name
        pairs.append(relative(assert_as_accurate(a, b, c, query.dtype, name), c))
    return pairs


# ---------------------------------------------------------------- accuracy


@pytest.mark.parametrize(("device", "impl"), WHERE)
@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize(("heads", "size"), [(2, 8), (1, 24), (3, 64)], ids=["H2-E8", "H1-E24", "H3-E64"])
@pytest.mark.parametrize("dtype", [FP32, FP64, BF16, FP16], ids=["fp32", "fp64", "bf16", "fp16"])
def test_every_result_is_as_exact_as_torchs_own(dtype, heads, size, case, device, impl):
    skip_unless_runnable(device, impl, dtype, fp64=False)
    tensors, where = make(*LENGTHS[case], heads, size, dtype, device)
    check(tensors, where, impl)


@pytest.mark.parametrize(("device", "impl"), WHERE)
@pytest.mark.parametrize("size", [1, 7, 16, 63, 80, 128, MAX_E])
def test_heads_of_any_size(size, device, impl):
    skip_unless_runnable(device, impl)
    tensors, where = make([7, 33], [33, 65], 2, size, device=device)
    check(tensors, where, impl)


@pytest.mark.parametrize(("device", "impl"), WHERE)
@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0])
def test_another_scale(scale, device, impl):
    skip_unless_runnable(device, impl)
    tensors, where = make([7, 3], [33, 5], 2, 8, device=device)
    check(tensors, where, impl, scale)


class NoGradient(torch.autograd.Function):
    """The identity, whose backward hands no gradient on: such a gradient counts as 0."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize(("device", "impl"), WHERE)
def test_a_result_that_gets_no_gradient(device, impl):
    skip_unless_runnable(device, impl)
    tensors, where = make([7, 3], [9, 5], 2, 8, device=device)
    leaves = [x.detach().requires_grad_() for x in tensors]
    loss = NoGradient.apply(shrink_attention(*leaves, *where, impl=impl)).sum() + leaves[0].sum()
    loss.backward()
    assert torch.equal(leaves[0].grad, torch.ones_like(leaves[0]))
    assert all(x.grad is None or not x.grad.any() for x in leaves[1:])


@pytest.mark.parametrize(("device", "impl"), WHERE)
def test_very_sure_queries(device, impl):
    """Products of some thousands: exp overflows unless the largest is subtracted first."""
    skip_unless_runnable(device, impl)
    tensors, where = make([7, 3], [100, 5], 2, 16, device=device, scale=25.0)
    check(tensors, where, impl)


@pytest.mark.parametrize(("device", "impl"), WHERE)
def test_scores_so_low_that_their_exponential_is_0(device, impl):
    """Padding would have a score of 0, far above all others, so the exponential of the difference would overflow."""
    skip_unless_runnable(device, impl)
    (query, key, value), where = make([7, 3], [33, 5], 2, 8, device=device)
    with torch.no_grad():
        query += 8.0
        key -= 8.0
    check([query, key, value], where, impl)


@pytest.mark.parametrize("impl", BOTH)
def test_over_many_draws_the_error_is_as_small_as_torchs_own(impl):
    skip_unless_runnable("cpu", impl)
    pairs = []
    lengths = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 70)), max_size=4)

    @settings(SETTINGS, max_examples=60 if impl == "torch" else 15)
    @given(lengths, st.integers(1, 3), st.integers(1, 40), st.integers(0, 2**20))
    @example([(0, 0)], 1, 1, 0)
    def draw(lengths, heads, size, seed):
        lengths = [*lengths, (2, 5)]  # with one key alone all gradients of its scores are 0, and ours are roundings
        tensors, where = make(*(list(side) for side in zip(*lengths, strict=True)), heads, size, seed=seed)
        pairs.append(check(tensors, where, impl))

    draw()
    for name, of_name in zip(NAMES, zip(*pairs, strict=True), strict=True):
        assert_rms(list(of_name), torch.finfo(FP32).eps / 4, name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("heads", [32, 9])
def test_at_the_size_of_the_adapter(heads, dtype):
    lengths_k = [750 - 37 * b for b in range(16)]
    tensors, where = make([90 + 3 * b for b in range(16)], lengths_k, heads, 128 if heads == 32 else 64, dtype, "cuda")
    check(tensors, where, "triton")


@pytest.mark.parametrize("keys", [1, 7, 33], ids=lambda n: f"{n}-keys")
def test_the_torch_path_of_other_devices_computes_the_same(keys):
    """The softmax and its gradient written out, which run where torch has no flash attention."""
    (query, key, value), where = make([3, 0, 2, 7], [keys, 5, 0, 2 * keys], 2, 8, FP64)
    upstream = torch.randn(query.shape, dtype=FP64)
    results = []
    for forward, backward, place in (
        (flash_attention, flash_attention_backward, where[:2]),
        (padded_attention, padded_attention_backward, where),
    ):
        out, lse = forward(query, key, value, *place, 0.3)
        gradients = backward(upstream, query, key, value, out, lse, *place, 0.3)
        results.append((out, lse, *gradients))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- single behaviours


@pytest.mark.parametrize(("device", "impl"), WHERE)
def test_with_one_key_the_result_is_its_value(device, impl):
    skip_unless_runnable(device, impl)
    tensors, where = make([3, 1], [1, 1], 2, 8, device=device)
    out = shrink_attention(*tensors, *where, impl=impl)
    assert torch.equal(out, tensors[2][[0, 0, 0, 1]])
    dquery, dkey, dvalue = torch.autograd.grad(out.sum(), tensors)
    ulps = 16 * torch.finfo(FP32).eps
    assert float(dquery.abs().max()) <= ulps and float(dkey.abs().max()) <= ulps
    torch.testing.assert_close(dvalue, torch.tensor([3.0, 1.0], device=device)[:, None, None].expand(2, 2, 8))


@pytest.mark.parametrize(("device", "impl"), WHERE)
def test_without_keys_the_result_is_0_and_so_are_the_gradients(device, impl):
    skip_unless_runnable(device, impl)
    tensors, where = make([2, 3], [0, 5], 2, 8, device=device)
    out = shrink_attention(*tensors, *where, impl=impl)
    assert not out[:2].any() and out[2:].all()
    assert not torch.autograd.grad(out.sum(), tensors[0])[0][:2].any()
    tensors, where = make([2, 3], [0, 0], 2, 8, device=device)
    out = shrink_attention(*tensors, *where, impl=impl)
    assert not out.any() and not torch.autograd.grad(out.sum(), tensors[0])[0].any()


@pytest.mark.parametrize(("device", "impl"), WHERE)
@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_queries_without_keys_may_hold_anything(junk, device, impl):
    skip_unless_runnable(device, impl)
    tensors, where = make([0, 2, 3, 0, 1], [1, 0, 5, 0, 0], 2, 8, device=device)
    keyless = torch.tensor([True, True, False, False, False, True], device=device)
    upstream = torch.randn(6, 2, 8, generator=torch.Generator().manual_seed(1)).to(device)
    expected = shrink_attention(*tensors, *where, impl=impl)
    gradients = torch.autograd.grad(expected, tensors, upstream)
    spoilt = tensors[0].detach().masked_fill(keyless[:, None, None], junk).requires_grad_()
    out = shrink_attention(spoilt, *tensors[1:], *where, impl=impl)
    assert torch.equal(out, expected) and not out[keyless].any()
    for found, wanted in zip(torch.autograd.grad(out, (spoilt, *tensors[1:]), upstream), gradients, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("impl", BOTH)
def test_bounds_in_columns_of_a_table_give_the_same(impl):
    skip_unless_runnable("cpu", impl)
    tensors, where = make([3, 4], [9, 5], 2, 8)
    columns = torch.stack(where[:2], 1).unbind(1)
    expected, found = (shrink_attention(*tensors, *x, *where[2:], impl=impl) for x in (where[:2], columns))
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(x.square().sum(), tensors) for x in (found, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(("device", "impl"), WHERE)
def test_keys_without_queries_have_no_gradient(device, impl):
    skip_unless_runnable(device, impl)
    tensors, where = make([0, 3], [4, 5], 2, 8, device=device)
    _, dkey, dvalue = torch.autograd.grad(shrink_attention(*tensors, *where, impl=impl).square().sum(), tensors)
    assert not dkey[:4].any() and not dvalue[:4].any() and dkey[4:].any() and dvalue[4:].all()
    tensors, where = make([0, 0], [4, 5], 2, 8, device=device)
    out = shrink_attention(*tensors, *where, impl=impl)
    assert out.shape == (0, 2, 8)
    for gradient, tensor in zip(torch.autograd.grad(out.sum(), tensors), tensors, strict=True):
        assert gradient.shape == tensor.shape and not gradient.any()


@pytest.mark.parametrize("impl", BOTH)
def test_no_utterance_at_all(impl):
    skip_unless_runnable("cpu", impl)
    empty, zero = torch.zeros(0, 2, 8, requires_grad=True), torch.zeros(1, dtype=torch.int32)
    out = shrink_attention(empty, empty, empty, zero, zero, 0, 0, impl=impl)
    assert out.shape == (0, 2, 8) and torch.autograd.grad(out.sum(), empty)[0].shape == (0, 2, 8)


@pytest.mark.parametrize("impl", BOTH)
def test_utterances_do_not_matter_to_each_other(impl):
    skip_unless_runnable("cpu", impl)
    tensors, where = make([3, 7, 2], [33, 9, 70], 2, 8)
    out = shrink_attention(*tensors, *where, impl=impl)
    with torch.no_grad():
        tensors[1][33:42] = torch.nan
    spoilt = shrink_attention(*tensors, *where, impl=impl)
    assert spoilt[3:10].isnan().all()
    assert torch.equal(spoilt[:3], out[:3]) and torch.equal(spoilt[10:], out[10:])


@pytest.mark.parametrize("impl", BOTH)
def test_transposed_and_expanded_tensors_are_read_right(impl):
    skip_unless_runnable("cpu", impl)
    (query, key, value), where = make([3, 4], [9, 5], 2, 8)
    wanted = shrink_attention(query, key, value, *where, impl=impl)
    by_head = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in (query, key, value)]
    by_column = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (query, key, value)]
    for tensors in (by_head, by_column):
        out = shrink_attention(*tensors, *where, impl=impl)
        assert torch.equal(out, wanted)
        # The gradient of a sum is expanded, too.
        gradients = torch.autograd.grad(out.sum(), tensors)
        expected = torch.autograd.grad(wanted.sum(), (query, key, value), retain_graph=True)
        for a, b in zip(gradients, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize("wanted", range(3), ids=["query", "key", "value"])
def test_a_single_gradient_is_the_one_of_all_together(wanted, impl):
    skip_unless_runnable("cpu", impl)
    tensors, where = make([3, 4], [9, 5], 2, 8)
    together = torch.autograd.grad(shrink_attention(*tensors, *where, impl=impl).square().sum(), tensors)
    for place, tensor in enumerate(tensors):
        tensor.requires_grad_(place == wanted)
    (alone,) = torch.autograd.grad(shrink_attention(*tensors, *where, impl=impl).square().sum(), tensors[wanted])
    assert torch.equal(alone, together[wanted])


@pytest.mark.parametrize("impl", BOTH)
def test_autocast_changes_nothing(impl):
    skip_unless_runnable("cpu", impl)
    tensors, where = make([3, 4], [9, 5], 2, 8)
    expected = shrink_attention(*tensors, *where, impl=impl)
    with torch.autocast("cpu", BF16):
        assert torch.equal(shrink_attention(*tensors, *where, impl=impl), expected)


@pytest.mark.parametrize(("device", "impl"), WHERE)
def test_results_are_bitwise_the_same_every_time(device, impl):
    skip_unless_runnable(device, impl)
    tensors, where = make([33, 7], [100, 63], 2, 8, device=device)

    def run():
        return everything(lambda *x: shrink_attention(*x, *where, impl=impl), tensors, torch.ones_like(tensors[0]))

    first = run()
    for _ in range(20 if device == "cuda" or impl == "torch" else 2):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


# ---------------------------------------------------------------- torch.library and torch.compile


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize("need_dkv", [True, False], ids=["all-gradients", "query-only"])
def test_opcheck(need_dkv, impl):
    skip_unless_runnable("cpu", impl)
    (query, key, value), where = make([3, 4], [9, 5], 2, 8)
    if not need_dkv:
        key, value = key.detach(), value.detach()
    torch.library.opcheck(_forward, (query, key, value, *where, 0.3, impl))
    query, key, value = (x.detach() for x in (query, key, value))
    out, lse = _forward(query, key, value, *where, 0.3, impl)
    torch.library.opcheck(_backward, (out, query, key, value, out, lse, *where, 0.3, need_dkv, impl))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_as_one_graph_for_any_number_of_rows(device):
    def function(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        return shrink_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k).sin()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in (([3, 4], [9, 5]), ([7, 2, 5], [11, 3, 2])):
        tensors, where = make(*lengths, 2, 8, device=device)
        found, expected = compiled(*tensors, *where), function(*tensors, *where)
        assert torch.equal(found, expected)
        for a, b in zip(*(torch.autograd.grad(x.sum(), tensors) for x in (found, expected)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("impl", BOTH)
def test_a_second_derivative_is_refused(impl):
    skip_unless_runnable("cpu", impl)
    tensors, where = make([3], [5], 2, 8)
    out = shrink_attention(*tensors, *where, impl=impl)
    (gradient,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="shrink_attention has no second derivative"):
        gradient.sum().backward()


# ---------------------------------------------------------------- bad input


GOOD = {
    "query": torch.zeros(4, 2, 8),
    "key": torch.zeros(6, 2, 8),
    "value": torch.zeros(6, 2, 8),
    "cu_seqlens_q": torch.tensor([0, 3, 4], dtype=torch.int32),
    "cu_seqlens_k": torch.tensor([0, 2, 6], dtype=torch.int32),
    "max_seqlen_q": 3,
    "max_seqlen_k": 4,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(4, 16)}, r"query has shape \[4, 16\], but it must be \[K, H, E\]"),
        ({"query": torch.zeros(4, 2, 8, dtype=torch.int64)}, "query is torch.int64, but it must be floating point"),
        ({"key": torch.zeros(6, 1, 8)}, r"key has shape \[6, 1, 8\], but it must be \[N, 2, 8\]"),
        ({"key": torch.zeros(6, 2, 8, device="meta")}, "key is on meta, but the other tensors are on cpu"),
        ({"value": torch.zeros(5, 2, 8)}, r"value has shape \[5, 2, 8\], but it must be \[6, 2, 8\]"),
        ({"value": torch.zeros(6, 2, 8, dtype=FP16)}, "value is torch.float16, but query is torch.float32"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 4])}, "cu_seqlens_q is torch.int64 .*, but it must be int32"),
        ({"cu_seqlens_q": torch.zeros(0, dtype=torch.int32)}, "cu_seqlens_q is .* one bound more than"),
        ({"cu_seqlens_k": torch.tensor([0, 6], dtype=torch.int32)}, "cu_seqlens_k is .* one bound more than"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 5], dtype=torch.int32)}, r"cu_seqlens_q = \[0, 3, 5\], but .* 0 to 4"),
        ({"cu_seqlens_k": torch.tensor([0, 7, 6], dtype=torch.int32)}, r"cu_seqlens_k = \[0, 7, 6\], but .* 0 to 6"),
        ({"cu_seqlens_k": torch.tensor([1, 2, 6], dtype=torch.int32)}, r"cu_seqlens_k = \[1, 2, 6\], but .* 0 to 6"),
        ({"max_seqlen_q": 2}, "max_seqlen_q = 2, but an utterance has 3 rows"),
        ({"max_seqlen_k": 0}, "max_seqlen_k = 0, but 2 utterances have 6 rows"),
        ({"impl": "cuda"}, "impl = 'cuda', but it must be one of auto, triton, torch"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        shrink_attention(**(GOOD | change))


@pytest.mark.parametrize("shape", [(2, 0), (0, 8)], ids=["no-columns", "no-heads"])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_heads_without_columns_and_no_heads_are_refused(shape, scale):
    queries, keys = torch.zeros(4, *shape), torch.zeros(6, *shape)
    with pytest.raises(ValueError, match=rf"query has shape \[4, {shape[0]}, {shape[1]}\], but there must be a head"):
        shrink_attention(**(GOOD | {"query": queries, "key": keys, "value": keys, "scale": scale}))


def test_a_wrong_type_is_named():
    with pytest.raises(TypeError, match="cu_seqlens_k is a list, but it must be a tensor"):
        shrink_attention(**(GOOD | {"cu_seqlens_k": [0, 2, 6]}))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4, 2, 8), FP64), ((4, 1, MAX_E + 1), FP32)], ids=["fp64", "large-heads"]
)
def test_what_triton_cannot_do_is_refused_there(shape, dtype):
    skip_unless_runnable("cpu", "triton")
    rows = torch.zeros(shape, dtype=dtype)
    where = (torch.tensor([0, 4], dtype=torch.int32),) * 2
    with pytest.raises(ValueError, match="impl='triton' takes float32, bfloat16 and float16"):
        shrink_attention(rows, rows, rows, *where, 4, 4, impl="triton")
    assert shrink_attention(rows, rows, rows, *where, 4, 4, impl="torch").shape == shape


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("queries", "keys", "longest"),
    [([0, 3, 9], [0, 2, 6], (3, 4)), ([0, 3, 4], [0, 2, 99], (3, 4)), ([0, 3, 4], [0, -5, 6], (3, 4)),
     ([0, 3, 4], [0, 2, 6], (2, 4)), ([0, 3, 4], [0, 2, 6], (3, 3))],
    ids=["past-the-queries", "past-the-keys", "negative", "longest-query-part", "longest-key-part"],
)  # fmt: skip
def test_in_triton_wrong_bounds_give_nan_and_read_nothing_out_of_bounds(queries, keys, longest, device):
    """On CUDA bounds are not read. The test calls the kernel itself, because on the CPU they are refused before it."""
    skip_unless_runnable(device, "triton")
    from soundwave.kernels import shrink_attention as op

    query, rows = torch.ones(4, 2, 8, device=device), torch.ones(6, 2, 8, device=device)
    out, lse = torch.zeros_like(query), torch.zeros(2, 4, device=device)
    bounds = [torch.tensor(x, dtype=torch.int32, device=device) for x in (queries, keys)]
    op._launch(
        op._shrink_attention_fwd_kernel, op.Tile(16, 16, 4), False, (query, rows, rows, out, lse),
        query, rows, rows, bounds, longest, 1.0,
    )  # fmt: skip
    assert out.isnan().any()


def test_settings_are_powers_of_two_that_products_can_have():
    for size in (1, 8, 64, 80, 128, MAX_E):
        for dtype in (FP32, BF16, FP16):
            for arch in (80, 86, 89, 90, 100, 120):
                for tile in _config(size, dtype, arch):
                    assert tile.block_m.bit_count() == tile.block_n.bit_count() == 1
                    assert min(tile.block_m, tile.block_n) >= 16 and tile.num_warps in (4, 8)

"""Cross-entropy of a linear head without its logits: against the plain operations in fp64."""

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from soundwave import fused
from soundwave.eager import linear_cross_entropy as plain
from soundwave.fused.functional import linear_cross_entropy
from tests.accuracy import assert_as_accurate, assert_rms, relative
from tests.implementations import everywhere, not_interpreted

pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
reductions = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
EVERY_DRAW = settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def make(rows, columns, width, *, ignored=0.0, sharpness=1.0, seed=0, dtype=FP32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=FP64)
    weight = torch.randn(columns, width, generator=generator, dtype=FP64) * sharpness * width**-0.5
    target = torch.randint(columns, (rows,), generator=generator)
    target[torch.rand(rows, generator=generator) < ignored] = -100
    return hidden.to(device, dtype), weight.to(device, dtype), target.to(device)


def run(function, given, dtype, trained, reduction, **settings):
    hidden, weight, target = given
    hidden = hidden.detach().to(dtype, copy=True).requires_grad_()
    weight = weight.detach().to(dtype, copy=True).requires_grad_(trained)
    loss = function(hidden, weight, target, reduction=reduction, **settings)
    upstream = torch.linspace(-1, 2, len(target), dtype=FP64, device=loss.device)
    (loss * (upstream.to(loss.dtype) if reduction == "none" else 1.5)).sum().backward()
    gradients = {"hidden": hidden.grad} | ({"weight": weight.grad} if trained else {})
    return {"loss": loss.detach()} | gradients


def check(given, reduction, trained=True, impl="torch", **settings):
    dtype = given[0].dtype
    ours = run(linear_cross_entropy, given, dtype, trained, reduction, impl=impl, **settings)
    theirs, truth = (run(plain, given, kind, trained, reduction) for kind in (dtype, FP64))
    pairs = {}
    for name in truth:
        assert ours[name].dtype == (torch.promote_types(dtype, FP32) if name == "loss" else dtype)
        pair = assert_as_accurate(ours[name], theirs[name], truth[name], dtype, name)
        pairs[name] = relative(pair, truth[name])
    return pairs


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
def test_as_accurate_as_the_plain_operations(dtype):
    @EVERY_DRAW
    @given(
        st.integers(1, 600),
        st.sampled_from([1, 2, 7, 63, 64, 100, 1000, 5000]),
        st.sampled_from([1, 7, 33]),
        st.sampled_from([0.0, 0.5]),
        st.sampled_from([0.1, 1.0, 10.0]),
        st.sampled_from(["mean", "sum", "none"]),
        st.booleans(),
        st.integers(0, 10**6),
    )
    @example(600, 5000, 7, 0.0, 1.0, "mean", True, 0)
    @example(1, 1, 1, 0.0, 1.0, "sum", True, 0)
    def every_draw(rows, columns, width, ignored, sharpness, reduction, trained, seed):
        given = make(rows, columns, width, ignored=ignored, sharpness=sharpness, seed=seed, dtype=dtype)
        given[2][0] = 0  # or the mean may be that of nothing
        check(given, reduction, trained)

    every_draw()


@everywhere
@reductions
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [FP64, FP32], ids=["float64", "float32"])
def test_dtypes(device, impl, reduction, trained, dtype):
    check(make(17, 63, 7, ignored=0.3, dtype=dtype, device=device), reduction, trained, impl)


@not_interpreted
@reductions
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["float32", "bfloat16", "float16"])
def test_rms_error_is_at_most_that_of_the_plain_operations(device, impl, reduction, dtype):
    draws = [make(200, 700, 16, seed=seed, dtype=dtype, device=device) for seed in range(4)]
    errors = [check(given, reduction, impl=impl) for given in draws]
    for name in ("loss", "hidden", "weight"):
        assert_rms([found[name] for found in errors], torch.finfo(FP32 if name == "loss" else dtype).eps, name)


@not_interpreted
def test_a_target_that_is_sure(device, impl):
    hidden, weight, target = make(200, 3000, 64, dtype=FP64, device=device)
    weight *= 4
    hidden = hidden * 0.1 + 2 * weight[target]
    given = hidden.to(BF16), weight.to(BF16), target
    assert (hidden @ weight.t()).softmax(-1).gather(1, target[:, None]).mean() > 0.9999
    check(given, "none", impl=impl)


@everywhere
@reductions
def test_ignored_rows_cost_nothing_and_may_hold_anything(device, impl, reduction):
    hidden, weight, target = make(40, 63, 7, ignored=0.5, device=device)
    clean = run(linear_cross_entropy, (hidden, weight, target), FP32, True, reduction, impl=impl)
    hidden = hidden.masked_fill((target == -100)[:, None], float("nan"))
    dirty = run(linear_cross_entropy, (hidden, weight, target), FP32, True, reduction, impl=impl)
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)
    assert not dirty["hidden"][target == -100].any()


@everywhere
@reductions
@pytest.mark.parametrize("rows", [0, 3])
def test_no_row_at_all(device, impl, reduction, rows):
    """As in torch the mean over no rows is NaN. Its gradient here is 0."""
    hidden, weight, target = make(rows, 20, 5, device=device)
    found = run(linear_cross_entropy, (hidden, weight, target.fill_(-100)), FP32, True, reduction, impl=impl)
    expected = plain(hidden, weight, target, reduction=reduction)
    torch.testing.assert_close(found["loss"], expected, equal_nan=True)
    assert found["hidden"].shape == hidden.shape and found["weight"].shape == weight.shape
    if reduction != "mean":
        assert not found["hidden"].any() and not found["weight"].any()


@everywhere
@reductions
def test_any_leading_shape_any_strides_any_ignore_index(device, impl, reduction):
    hidden, weight, target = make(30, 63, 7, ignored=0.3, device=device)
    one = linear_cross_entropy(hidden, weight, target, reduction=reduction, impl=impl)
    strided = hidden.view(5, 6, 7).transpose(0, 1).contiguous().transpose(0, 1), weight.t().contiguous().t()
    target = target.masked_fill(target == -100, 7).view(5, 6).int()
    again = linear_cross_entropy(*strided, target, reduction=reduction, ignore_index=7, impl=impl)
    kept = (one.view(5, 6) != 0) & (target != 7) if reduction == "none" else None
    if kept is None:
        plain_again = plain(hidden, weight, target.flatten().long(), reduction=reduction, ignore_index=7)
        torch.testing.assert_close(again, plain_again)
    else:
        assert again.shape == (5, 6)
        torch.testing.assert_close(again[kept], one.view(5, 6)[kept])
    one_row = linear_cross_entropy(hidden[0], weight, torch.tensor(3, device=device), impl=impl)
    torch.testing.assert_close(one_row, plain(hidden[:1], weight, torch.tensor([3], device=device)))


@not_interpreted
def test_autocast_is_as_the_plain_operations(device, impl):
    hidden, weight, target = make(100, 500, 16, device=device)
    given = hidden, weight.to(BF16).float(), target
    with torch.autocast(device, dtype=BF16):
        ours = run(linear_cross_entropy, given, FP32, True, "mean", impl=impl)
        theirs = run(plain, given, FP32, True, "mean")
    truth = run(plain, given, FP64, True, "mean")
    for name in truth:
        assert ours[name].dtype == FP32
        assert_as_accurate(ours[name], theirs[name], truth[name], BF16, name)


@everywhere
def test_skipping_is_asked_for(device, impl):
    """By default every column counts. With exact=False rare ones are left out of the gradient of hidden."""
    _, weight, target = make(30, 2000, 128, dtype=FP64, device=device)
    hidden = 18 * weight[target] + 14 * weight[(target + 1) % 50]
    given = hidden.float(), weight.float(), target
    exact, whole, skipping = (
        run(linear_cross_entropy, given, FP32, True, "sum", impl=impl, **settings)
        for settings in ({}, {"exact": True}, {"exact": False})
    )
    assert all(torch.equal(exact[name], whole[name]) for name in exact)
    assert torch.equal(exact["loss"], skipping["loss"]) and torch.equal(exact["weight"], skipping["weight"])
    error = (skipping["hidden"] - exact["hidden"]).norm() / exact["hidden"].norm()
    assert 0 < error < 0.1


@everywhere
@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ()], ids=str)
@reductions
def test_only_the_gradients_that_are_wanted(device, impl, trained, reduction):
    hidden, weight, target = make(10, 63, 7, device=device)
    hidden.requires_grad_("hidden" in trained), weight.requires_grad_("weight" in trained)
    loss = linear_cross_entropy(hidden, weight, target, reduction=reduction, impl=impl)
    assert loss.requires_grad == bool(trained)
    if trained:
        loss.sum().backward()
    assert (hidden.grad is not None, weight.grad is not None) == ("hidden" in trained, "weight" in trained)


@everywhere
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
@reductions
def test_bitwise_equal_over_20_runs(device, impl, dtype, reduction):
    """Many rows share a target."""
    small = device == "cpu" and impl == "triton"
    hidden, weight, target = make(12 if small else 400, 33 if small else 2000, 16, dtype=dtype, device=device)
    first = None
    for _ in range(3 if small else 20):
        found = run(linear_cross_entropy, (hidden, weight, target % 3), dtype, True, reduction, impl=impl)
        first = first or found
        assert all(torch.equal(first[name], found[name]) for name in first)


BAD = {
    "reduction": (lambda h, w, t: (h, w, t, {"reduction": "average"}), "reduction = 'average'"),
    "impl": (lambda h, w, t: (h, w, t, {"impl": "cuda"}), "impl = 'cuda'"),
    "integer hidden": (lambda h, w, t: (h.long(), w, t, {}), "hidden is torch.int64"),
    "a number": (lambda h, w, t: (h[0, 0], w, t, {}), r"hidden has shape \[\]"),
    "another width": (lambda h, w, t: (h, w[:, :3], t, {}), r"weight has shape \[63, 3\]"),
    "a head without rows": (lambda h, w, t: (h, w[:0], t, {}), r"weight has shape \[0, 7\]"),
    "quantized weight": (lambda h, w, t: (h, w.to(torch.uint8), t, {}), "weight is torch.uint8"),
    "another device": (lambda h, w, t: (h, w.to("meta"), t, {}), "weight is on meta"),
    "fewer targets": (lambda h, w, t: (h, w, t[:5], {}), r"target has shape \[5\]"),
    "floating targets": (lambda h, w, t: (h, w, t.float(), {}), "target is torch.float32"),
    "a target past the head": (lambda h, w, t: (h, w, t.index_fill(0, torch.tensor(3), 63), {}), r"target\[3\] = 63"),
    "a negative target": (lambda h, w, t: (h, w, t.index_fill(0, torch.tensor(0), -1), {}), r"target\[0\] = -1"),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_what_does_not_fit_is_named(change):
    change, message = change
    *tensors, settings = change(*make(9, 63, 7))
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*tensors, **settings)


def test_a_wrong_target_is_named_by_its_place_in_the_targets_as_given():
    hidden, weight = torch.zeros(2, 3, 3), torch.ones(6, 3)
    with pytest.raises(ValueError, match=r"^target\[1, 1\] = 9, but it must be ignore_index or 0 to 5"):
        linear_cross_entropy(hidden, weight, torch.tensor([[0, 1, 2], [0, 9, 1]]))
    with pytest.raises(ValueError, match=r"^target\[1, 0, 2\] = 9"):
        linear_cross_entropy(hidden[:, None], weight, torch.tensor([[[0, 1, 2]], [[0, 1, 9]]]))
    with pytest.raises(ValueError, match="^target = 9"):
        linear_cross_entropy(hidden[0, 0], weight, torch.tensor(9))


@reductions
def test_targets_of_any_shape_give_the_same(reduction):
    hidden, weight, target = make(12, 20, 7, ignored=0.3)
    shaped = hidden.view(2, 3, 2, 7).requires_grad_(), weight.clone().requires_grad_(), target.view(2, 3, 2)
    flat = hidden.clone().requires_grad_(), weight.clone().requires_grad_(), target
    losses = [linear_cross_entropy(*given, reduction=reduction) for given in (shaped, flat)]
    assert losses[0].shape == (target.view(2, 3, 2).shape if reduction == "none" else ())
    assert torch.equal(losses[0].flatten(), losses[1].flatten())
    gradients = [torch.autograd.grad(x.sum(), g[:2]) for x, g in zip(losses, (shaped, flat), strict=True)]
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(*gradients, strict=True))


def test_a_wrong_type_is_named():
    hidden, weight, target = make(9, 63, 7)
    with pytest.raises(TypeError, match="target is a list, but it must be a tensor"):
        linear_cross_entropy(hidden, weight, target.tolist())
    with pytest.raises(TypeError, match="hidden is a list, but it must be a tensor"):
        linear_cross_entropy(hidden.tolist(), weight, target)
    with pytest.raises(ValueError, match=r"ignore_index = -100\.0, but it must be an integer"):
        linear_cross_entropy(hidden, weight, target, ignore_index=-100.0)


@pytest.mark.gpu
def test_a_bad_target_on_cuda_is_named_later():
    hidden, weight, target = make(9, 63, 7, device="cuda")
    target[4] = 63
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, target, reduction="none")
    assert loss[4].isnan() and loss[:4].isfinite().all()
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=r"target\[4\] = 63"):
        loss.sum().backward()


@everywhere
def test_a_second_derivative_raises(device, impl):
    hidden, weight, target = make(9, 63, 7, device=device)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, target, impl=impl)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@not_interpreted
@reductions
def test_registration(device, impl, reduction):
    hidden, weight, target = make(9, 63, 7, ignored=0.3, device=device)
    tensors = hidden.requires_grad_(), weight.requires_grad_(), target
    numbers = 0.0, 0.0, 0.0, -100, FP32, impl, reduction
    given = (*tensors, None, None, *numbers, False, True, True, True, False, False)
    torch.library.opcheck(torch.ops.soundwave.linear_cross_entropy_fwd.default, given)
    out = [x.detach() for x in torch.ops.soundwave.linear_cross_entropy_fwd(*given)]
    for dtype in (FP32, BF16):  # of the head
        backward = (torch.ones_like(out[0]), *out[2:], dtype)
        torch.library.opcheck(torch.ops.soundwave.linear_cross_entropy_bwd.default, backward)
    tensors = (hidden.detach(), weight.detach(), target, None, None)
    again = (*tensors, *numbers, False, True, False, torch.ones(9, device=device), None)
    torch.library.opcheck(torch.ops.soundwave.linear_cross_entropy_again.default, again)


@not_interpreted
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@reductions
def test_compiles_as_one_graph(device, impl, backend, reduction):
    def function(hidden, weight, target):
        return linear_cross_entropy(hidden * 1.0, weight, target, reduction=reduction, impl=impl).sum() * 2

    given = make(9, 63, 7, ignored=0.3, device=device)
    one, two = ([x.clone().requires_grad_(x.is_floating_point()) for x in given] for _ in range(2))
    function(*one).backward()
    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(*two).backward()
    assert torch.equal(one[0].grad, two[0].grad) and torch.equal(one[1].grad, two[1].grad)


def test_the_definition_and_the_module():
    hidden, weight, target = make(9, 63, 7, ignored=0.3)
    torch.testing.assert_close(
        F.cross_entropy(hidden @ weight.t(), target, ignore_index=-100, reduction="none"),
        plain(hidden, weight, target, reduction="none"),
    )
    module = fused.LinearCrossEntropyLoss(reduction="sum")
    assert torch.equal(module(hidden, weight, target), linear_cross_entropy(hidden, weight, target, reduction="sum"))
    assert "reduction='sum'" in repr(module)


def test_a_batch_without_targets_has_no_gradient_and_no_nan():
    hidden, weight, target = make(5, 20, 7)
    hidden.requires_grad_(), weight.requires_grad_()
    linear_cross_entropy(hidden, weight, torch.full_like(target, -100)).backward()
    assert not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("columns", [2048, 2049])
def test_half_precision_over_more_columns_than_a_tile(columns):
    hidden, weight, target = make(5, columns, 7, dtype=FP16)
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, target).backward()
    expected = hidden.detach().float().requires_grad_()
    plain(expected, weight.float(), target).backward()
    torch.testing.assert_close(hidden.grad.float(), expected.grad, rtol=0.02, atol=2e-3)


def test_a_transposed_view_compiles():
    hidden, weight, target = make(7, 20, 7)
    hidden = hidden.t().detach().requires_grad_()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    compiled(hidden, weight, target).backward()
    assert hidden.grad.shape == hidden.shape

"""The options of the cross-entropy of a linear head, alone and together: against the plain operations in fp64."""

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from soundwave import fused
from soundwave.eager import linear_cross_entropy as plain
from soundwave.fused.functional import linear_cross_entropy
from soundwave.kernels.cross_entropy_rows import softcapped
from tests.accuracy import assert_as_accurate, assert_rms, relative
from tests.implementations import everywhere, not_interpreted
from tests.test_linear_cross_entropy import make

pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
reductions = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
ALL = {"bias": True, "class_weight": True, "label_smoothing": 0.2, "softcap": 3.0, "z_loss": 0.01}
ALONE = {name: {name: value} for name, value in ALL.items()}
TOGETHER = ALONE | {
    "smoothed class weights": {"class_weight": True, "label_smoothing": 0.1},
    "softcap, bias": {"softcap": 5.0, "bias": True},
    "all": ALL,
}
options = pytest.mark.parametrize("chosen", TOGETHER.values(), ids=TOGETHER)
EVERY_DRAW = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def with_tensors(chosen, columns, device="cpu", seed=0):
    """The options, with tensors in fp64 in the place of True: a bias, and weights of which one class has 0."""
    generator = torch.Generator().manual_seed(seed + 1)
    bias = torch.randn(columns, generator=generator, dtype=FP64)
    class_weight = 2 * torch.rand(columns, generator=generator, dtype=FP64)
    class_weight[columns // 2] = 0.0 if columns > 1 else 1.0
    tensors = {"bias": bias.to(device), "class_weight": class_weight.to(device)}
    return {name: tensors[name] if value is True else value for name, value in chosen.items()}


def run(function, given, dtype, reduction, chosen, trained=("hidden", "weight", "bias"), with_lse=False, **more):
    """The loss, lse, and the gradients of what is trained; upstream gradients of either sign."""
    hidden, weight, target = given
    tensors = {"hidden": hidden, "weight": weight} | ({"bias": chosen["bias"]} if "bias" in chosen else {})
    leaves = {name: x.detach().to(dtype, copy=True).requires_grad_(name in trained) for name, x in tensors.items()}
    more |= {name: value for name, value in chosen.items() if name != "bias"} | {"bias": leaves.get("bias")}
    if "class_weight" in chosen:
        more["class_weight"] = chosen["class_weight"].to(torch.promote_types(dtype, FP32))
    out = function(leaves["hidden"], leaves["weight"], target, reduction=reduction, return_lse=with_lse, **more)
    loss, lse = out if with_lse else (out, None)
    upstream = torch.linspace(-1, 2, target.numel(), dtype=FP64, device=loss.device)
    total = (loss * (upstream.to(loss.dtype) if reduction == "none" else 1.5)).sum()
    if with_lse:
        total = total + (lse * upstream.flip(0).to(lse.dtype)).sum()
    if trained:
        total.backward()
    found = {"loss": loss.detach()} | ({"lse": lse.detach()} if with_lse else {})
    return found | {name: x.grad for name, x in leaves.items() if name in trained}


def check(given, reduction, chosen, impl="torch", with_lse=False, trained=("hidden", "weight", "bias")):
    """Errors of ours and of eager, relative to the truth, by the names of `run`."""
    dtype = given[0].dtype
    chosen = with_tensors(chosen, len(given[1]), given[0].device)
    ours = run(linear_cross_entropy, given, dtype, reduction, chosen, trained, with_lse, impl=impl)
    theirs, truth = (run(plain, given, kind, reduction, chosen, trained, with_lse) for kind in (dtype, FP64))
    assert ours.keys() == truth.keys()
    pairs = {}
    for name in truth:
        assert ours[name].dtype == (torch.promote_types(dtype, FP32) if name in ("loss", "lse") else dtype)
        pair = assert_as_accurate(ours[name], theirs[name], truth[name], dtype, name)
        pairs[name] = relative(pair, truth[name])
    return pairs


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
def test_as_accurate_as_the_plain_operations(dtype):
    @EVERY_DRAW
    @given(
        st.integers(1, 400),
        st.sampled_from([2, 7, 63, 64, 100, 1000, 3000]),
        st.sampled_from([1, 7, 33]),
        st.sampled_from([0.0, 0.5]),
        st.sampled_from([0.1, 1.0, 10.0]),
        st.fixed_dictionaries(
            {},
            optional={
                "bias": st.just(True),
                "class_weight": st.just(True),
                "label_smoothing": st.sampled_from([0.1, 0.5, 1.0]),
                "softcap": st.sampled_from([0.5, 5.0, 30.0, 1000.0]),
                "z_loss": st.sampled_from([1e-4, 0.1]),
            },
        ),
        st.sampled_from(["mean", "sum", "none"]),
        st.booleans(),
        st.sets(st.sampled_from(["hidden", "weight", "bias"])),
        st.integers(0, 10**6),
    )
    @example(300, 3000, 7, 0.0, 1.0, ALL, "mean", True, {"hidden", "weight", "bias"}, 0)
    @example(1, 3000, 7, 0.0, 1.0, ALL, "mean", False, {"hidden", "weight", "bias"}, 0)
    def every_draw(rows, columns, width, ignored, sharpness, chosen, reduction, with_lse, trained, seed):
        given = make(rows, columns, width, ignored=ignored, sharpness=sharpness, seed=seed, dtype=dtype)
        given[2][0] = 0  # or the mean may be that of nothing
        check(given, reduction, chosen, with_lse=with_lse, trained=trained - ({"bias"} - chosen.keys()))

    every_draw()


@everywhere
@options
@pytest.mark.parametrize("dtype", [FP64, FP32], ids=["float64", "float32"])
def test_dtypes(device, impl, chosen, dtype):
    check(make(9, 63, 7, ignored=0.3, dtype=dtype, device=device), "mean", chosen, impl, with_lse=True)


@everywhere
@reductions
@pytest.mark.parametrize("columns", [1, 1300], ids=["V1", "V1300"])
def test_one_row(device, impl, reduction, columns):
    """V 1300 is one whole block of columns in float32 and two in float64, and a part of one."""
    check(make(1, columns, 7, device=device), reduction, ALL, impl)
    given, chosen = make(1, columns, 7, dtype=FP64, device=device), with_tensors(ALL, columns, device)
    ours = run(linear_cross_entropy, given, FP64, reduction, chosen, with_lse=True, impl=impl)
    eager = run(plain, given, FP64, reduction, chosen, with_lse=True)
    for name, value in eager.items():  # both are rounded in float64, in sums of so many terms
        assert (ours[name] - value).norm() <= (columns + 4) * torch.finfo(FP64).eps * value.norm(), name


@not_interpreted
@reductions
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["float32", "bfloat16", "float16"])
def test_rms_error_is_at_most_that_of_the_plain_operations(device, impl, reduction, dtype):
    draws = [make(200, 700, 16, seed=seed, dtype=dtype, device=device) for seed in range(4)]
    errors = [check(given, reduction, ALL, impl, with_lse=True) for given in draws]
    for name in errors[0]:
        eps = torch.finfo(FP32 if name in ("loss", "lse") else dtype).eps
        assert_rms([found[name] for found in errors], eps, name)


@everywhere
@reductions
def test_gradients_are_those_of_the_function(device, impl, reduction):
    hidden, weight, target = make(3, 5, 2, dtype=FP64, device=device)
    target[1] = -100
    chosen = with_tensors(ALL, 5, device)

    def function(hidden, weight, bias):
        given = chosen | {"bias": bias}
        return linear_cross_entropy(hidden, weight, target, reduction=reduction, return_lse=True, impl=impl, **given)

    leaves = [x.requires_grad_() for x in (hidden, weight, chosen["bias"])]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=impl == "triton")


@everywhere
@reductions
def test_ignored_rows_cost_nothing_and_may_hold_anything(device, impl, reduction):
    hidden, weight, target = make(10, 63, 7, ignored=0.5, device=device)
    chosen = with_tensors(ALL, 63, device)
    dirty = hidden.masked_fill((target == -100)[:, None], float("nan"))
    clean, dirty = (
        run(linear_cross_entropy, (h, weight, target), FP32, reduction, chosen, with_lse=True, impl=impl)
        for h in (hidden, dirty)
    )
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)
    assert not dirty["hidden"][target == -100].any() and not dirty["lse"][target == -100].any()


@everywhere
@reductions
@pytest.mark.parametrize("rows", [0, 3])
def test_no_row_at_all(device, impl, reduction, rows):
    """As in torch the mean over no rows is NaN. Its gradient here is 0."""
    hidden, weight, target = make(rows, 20, 5, device=device)
    given = hidden, weight, target.fill_(-100)
    chosen = with_tensors(ALL, 20, device)
    for with_lse in (True, False):  # which has its gradients from backward, or from forward
        found = run(linear_cross_entropy, given, FP32, reduction, chosen, with_lse=with_lse, impl=impl)
        assert found["loss"].isnan().all() if reduction == "mean" else not found["loss"].any()
        assert not any(found[name].any() for name in ("hidden", "weight", "bias"))
        assert not with_lse or not found["lse"].any() and found["lse"].shape == (rows,)


@everywhere
def test_a_softcap_bounds_logits_of_any_size(device, impl):
    """Far beyond the cap the derivative is 4·exp(-2|x| / cap), where 1 - tanh² would be 0."""
    hidden, weight, target = make(9, 63, 7, dtype=FP64, device=device)
    given = 20 * hidden.float(), weight.float(), target
    check(given, "sum", {"softcap": 2.0}, impl, with_lse=True)
    found = run(linear_cross_entropy, (1e4 * hidden.float(), *given[1:]), FP32, "sum", {"softcap": 2.0}, impl=impl)
    assert all(x.isfinite().all() for x in found.values())
    assert found["loss"] <= len(target) * (4 + torch.tensor(63.0).log())


@pytest.mark.parametrize("dtype", [FP64, FP32], ids=["float64", "float32"])
def test_softcap_and_its_derivative(dtype):
    x = torch.cat([torch.linspace(-90, 90, 721, dtype=FP64), torch.tensor([1e-8, 700.0], dtype=FP64)])
    value, slope = softcapped(x.to(dtype), 3.0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(value.double(), 3 * (x / 3).tanh(), rtol=4 * eps, atol=0.0)
    # e^-2|x| / 3 has the relative error of its exponent, at most 60 · eps
    inside = x.abs() <= 90
    torch.testing.assert_close(slope.double()[inside], ((x / 3).cosh() ** -2)[inside], rtol=130 * eps, atol=0.0)
    assert 0 <= slope[-1] < 1e-30  # not NaN, although cosh is inf in float32


@everywhere
def test_classes_that_a_bias_forbids(device, impl):
    hidden, weight, target = make(9, 63, 7, device=device)
    bias = torch.zeros(63, device=device)
    bias[40:] = -torch.inf
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    loss = linear_cross_entropy(*leaves[:2], target % 40, bias=leaves[2], impl=impl)
    loss.backward()
    torch.testing.assert_close(loss, plain(hidden, weight[:40], target % 40))
    assert not leaves[1].grad[40:].any() and not leaves[2].grad[40:].any() and leaves[0].grad.isfinite().all()
    # A row whose own class is forbidden has an infinite loss, as in torch, also with smoothing.
    for smoothing in (0.0, 0.1):
        one = linear_cross_entropy(
            hidden, weight, target.new_full((9,), 50), bias=bias, label_smoothing=smoothing, impl=impl
        )
        assert one == torch.inf


@not_interpreted
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_target_that_is_sure(device, impl, smoothing):
    hidden, weight, target = make(200, 3000, 64, dtype=FP64, device=device)
    weight *= 4
    hidden = hidden * 0.1 + 2 * weight[target]
    given = hidden.to(BF16), weight.to(BF16), target
    check(given, "none", {"bias": True, "softcap": 100.0, "label_smoothing": smoothing}, impl)


@everywhere
@pytest.mark.parametrize("gap", [10.0, 17.0, 25.0, 60.0])
def test_the_loss_of_a_target_that_is_sure_is_not_lost_in_the_rounding_of_1(device, impl, gap):
    """It is log(1 + 62·exp(-gap)), in float32, where eager's is 0 beyond a gap of 21."""
    weight, target = torch.eye(63, device=device), torch.arange(9, device=device)
    hidden = (gap * weight[:9]).requires_grad_()
    loss = linear_cross_entropy(
        hidden, weight, target, bias=torch.zeros(63, device=device), reduction="none", impl=impl
    )
    wanted = (62 * torch.tensor(-gap, dtype=FP64).exp()).log1p()
    torch.testing.assert_close(loss.cpu().double(), wanted.expand(9), rtol=1e-5, atol=0.0)
    loss.sum().backward()
    off = -torch.expm1(-wanted)
    found = hidden.grad.cpu().double()
    torch.testing.assert_close(found.diagonal(), -off.expand(9), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(found[0, 1:], (off / 62).expand(62), rtol=1e-5, atol=0.0)


@not_interpreted
@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_gradients_that_fp16_cannot_hold(device, impl, scale):
    """Large class weights and z-loss: the gradient in a row's logits is up to 400, those of other rows are below 1e-6.

    float16 ends at 65504, and P is stored 2^15 times as large.
    """
    hidden, weight, target = make(60, 2000, 16, dtype=FP16, device=device)
    target[:30] = target[0]
    class_weight = torch.full((2000,), 1e-6, device=device)
    class_weight[target[0]] = 400.0
    given = {"class_weight": class_weight, "z_loss": 1.0}
    leaves = [[x.detach().to(dtype).requires_grad_() for x in (hidden, weight)] for dtype in (FP16, FP64)]
    for (h, w), function in zip(leaves, (linear_cross_entropy, plain), strict=True):
        more = {"impl": impl} if h.dtype == FP16 else {}
        loss = function(h, w, target, reduction="mean", **given, **more)
        (loss * scale / 16 if scale > 1 else loss).backward()
    for half, full in zip(*leaves, strict=True):
        assert half.grad.isfinite().all()
        error = (half.grad.double() - full.grad).norm() / full.grad.norm()
        assert error < 2 * torch.finfo(FP16).eps, float(error)


@everywhere
def test_no_column_is_skipped_with_options(device, impl):
    _, weight, target = make(10, 100, 64, dtype=FP64, device=device)
    given = (18 * weight[target] + 14 * weight[(target + 1) % 50]).float(), weight.float(), target
    chosen = {"softcap": 100.0}
    exact, asked = (run(linear_cross_entropy, given, FP32, "sum", chosen, impl=impl, exact=e) for e in (True, False))
    assert all(torch.equal(exact[name], asked[name]) for name in exact)


@everywhere
def test_bitwise_equal_over_runs(device, impl):
    small = device == "cpu" and impl == "triton"
    hidden, weight, target = make(*(6, 33, 8) if small else (300, 2000, 16), device=device)
    chosen = with_tensors(ALL, len(weight), device)
    first, *others = (
        run(linear_cross_entropy, (hidden, weight, target % 3), FP32, "none", chosen, with_lse=True, impl=impl)
        for _ in range(2 if small else 5)
    )
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


# ---------------------------------------------------------------- what the options mean


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_definition_by_its_formula(reduction):
    hidden, weight, target = make(12, 9, 4, ignored=0.3, dtype=FP64)
    chosen = with_tensors(ALL, 9)
    x = hidden @ weight.T + chosen["bias"]
    c = 3.0 * (x / 3.0).tanh()
    lse, w, loss, penalty, weights, rows = c.logsumexp(1), chosen["class_weight"], 0.0, 0.0, 0.0, 0
    for n, y in enumerate(target.tolist()):
        if y != -100:
            spread = sum(w[v] * (lse[n] - c[n, v]) for v in range(9)) / 9
            loss, weights = loss + 0.8 * w[y] * (lse[n] - c[n, y]) + 0.2 * spread, weights + w[y]
            penalty, rows = penalty + 0.01 * lse[n] ** 2, rows + 1
    wanted = loss / weights + penalty / rows if reduction == "mean" else loss + penalty
    for function in (plain, linear_cross_entropy):
        torch.testing.assert_close(function(hidden, weight, target, reduction=reduction, **chosen), wanted)


def test_class_weights_and_smoothing_are_those_of_torch():
    hidden, weight, target = make(12, 9, 4, ignored=0.3)
    class_weight = torch.rand(9)
    wanted = F.cross_entropy(F.linear(hidden, weight), target, class_weight, label_smoothing=0.3)
    found = linear_cross_entropy(hidden, weight, target, class_weight=class_weight, label_smoothing=0.3)
    torch.testing.assert_close(found, wanted)


def test_rows_whose_classes_all_weigh_nothing_have_a_mean_of_nan_as_in_torch():
    hidden, weight, target = make(5, 9, 4)
    nothing = torch.zeros(9)
    assert F.cross_entropy(F.linear(hidden, weight), target, nothing).isnan()
    assert linear_cross_entropy(hidden, weight, target, class_weight=nothing).isnan()
    assert linear_cross_entropy(hidden, weight, target, class_weight=nothing, reduction="sum") == 0


@reductions
def test_lse_is_that_of_the_logits_and_is_trained_by_itself(reduction):
    hidden, weight, target = make(12, 30, 4, ignored=0.3)
    hidden.requires_grad_(), weight.requires_grad_()
    _, lse = linear_cross_entropy(hidden.view(3, 4, 4), weight, target.view(3, 4), reduction=reduction, return_lse=True)
    wanted = (hidden @ weight.T).logsumexp(1).masked_fill(target == -100, 0.0)
    torch.testing.assert_close(lse, wanted.view(3, 4))
    found, expected = (
        torch.autograd.grad(x.square().sum(), (hidden, weight), retain_graph=True) for x in (lse, wanted)
    )
    torch.testing.assert_close(found, expected)


def test_z_loss_is_what_its_users_compute_of_lse():
    hidden, weight, target = make(12, 30, 4, ignored=0.3)
    loss, lse = linear_cross_entropy(hidden, weight, target, return_lse=True)
    wanted = loss + 0.1 * lse[target != -100].square().mean()
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, target, z_loss=0.1), wanted)


def test_the_module_passes_everything_on():
    hidden, weight, target = make(9, 20, 7, ignored=0.3)
    bias, class_weight = torch.randn(20), torch.rand(20)
    settings = {"label_smoothing": 0.1, "softcap": 5.0, "z_loss": 0.01, "reduction": "sum"}
    module = fused.LinearCrossEntropyLoss(class_weight=class_weight, return_lse=True, **settings)
    wanted = linear_cross_entropy(
        hidden, weight, target, bias=bias, class_weight=class_weight, return_lse=True, **settings
    )
    assert all(map(torch.equal, module(hidden, weight, target, bias), wanted))
    text = repr(module)
    assert all(part in text for part in ("label_smoothing=0.1", "softcap=5.0", "z_loss=0.01", "class_weight=[20]"))
    assert list(module.state_dict()) == ["class_weight"] and not fused.LinearCrossEntropyLoss().state_dict()
    assert module.double().class_weight.dtype == FP64


# ---------------------------------------------------------------- registration and errors


@not_interpreted
@reductions
@pytest.mark.parametrize("return_lse", [False, True], ids=["loss", "loss and lse"])
def test_registration(device, impl, reduction, return_lse):
    hidden, weight, target = make(9, 63, 7, ignored=0.3, device=device)
    chosen = {name: x.float() for name, x in with_tensors({"bias": True, "class_weight": True}, 63, device).items()}
    leaves = hidden.requires_grad_(), weight.requires_grad_(), target, chosen["bias"].requires_grad_()
    numbers = 0.1, 5.0, 0.01, -100, FP32, impl, reduction
    given = (*leaves, chosen["class_weight"], *numbers, return_lse, True, True, True, True, False)
    torch.library.opcheck(torch.ops.soundwave.linear_cross_entropy_fwd.default, given)
    tensors = (*(x.detach() for x in leaves), chosen["class_weight"])
    grad = torch.ones(9, device=device)
    for grad_lse in (None, grad):
        again = (*tensors, *numbers, True, True, True, grad, grad_lse)
        torch.library.opcheck(torch.ops.soundwave.linear_cross_entropy_again.default, again)


@not_interpreted
@reductions
def test_compiles_as_one_graph(device, impl, reduction):
    chosen = with_tensors(ALL, 63, device)

    def function(hidden, weight, bias, target):
        more = chosen | {"bias": bias, "class_weight": chosen["class_weight"].float()}
        loss, lse = linear_cross_entropy(
            hidden * 1.0, weight, target, reduction=reduction, return_lse=True, impl=impl, **more
        )  # fmt: skip
        return loss.sum() * 2 + lse.sum()

    hidden, weight, target = make(9, 63, 7, ignored=0.3, device=device)
    one, two = ([x.clone().requires_grad_() for x in (hidden, weight, chosen["bias"].float())] for _ in range(2))
    function(*one, target).backward()
    torch._dynamo.reset()
    torch.compile(function, backend="aot_eager", fullgraph=True)(*two, target).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(one, two, strict=True))


@everywhere
def test_a_second_derivative_raises(device, impl):
    hidden, weight, target = make(9, 63, 7, device=device)
    loss, lse = linear_cross_entropy(hidden.requires_grad_(), weight, target, return_lse=True, softcap=5.0, impl=impl)
    for value in (loss, lse.sum()):
        (gradient,) = torch.autograd.grad(value, hidden, create_graph=True, retain_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward()


BAD = {
    "a bias of another length": ({"bias": torch.zeros(62)}, r"bias has shape \[62\], but it must be \[63\]"),
    "an integer bias": ({"bias": torch.zeros(63, dtype=torch.int64)}, "bias is torch.int64"),
    "class weights elsewhere": ({"class_weight": torch.ones(63, device="meta")}, "class_weight is on meta"),
    "class weights of the rows": ({"class_weight": torch.ones(9)}, r"class_weight has shape \[9\]"),
    "class weights to train": ({"class_weight": torch.ones(63).requires_grad_()}, "class_weight requires a gradient"),
    "smoothing below 0": ({"label_smoothing": -0.1}, "label_smoothing = -0.1, but it must be a finite number of at"),
    "smoothing above 1": ({"label_smoothing": 1.1}, "label_smoothing = 1.1, but it must be at most 1"),
    "a softcap of 0": ({"softcap": 0.0}, "softcap = 0.0, but it must be above 0, or None for none"),
    "a negative softcap": ({"softcap": -30.0}, "softcap = -30.0"),
    "an infinite softcap": ({"softcap": float("inf")}, "softcap = inf"),
    "a negative z-loss": ({"z_loss": -1e-4}, "z_loss = -0.0001"),
    "a word for lse": ({"return_lse": "yes"}, "return_lse = 'yes', but it must be True or False"),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_what_does_not_fit_is_named(change):
    given, message = change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*make(9, 63, 7), **given)
    in_the_module = {name: value for name, value in given.items() if name != "bias"}
    if in_the_module and "class_weight" not in given:
        with pytest.raises(ValueError, match=message):
            fused.LinearCrossEntropyLoss(**in_the_module)


def test_a_bias_that_is_no_tensor_is_named():
    with pytest.raises(TypeError, match="bias is a list, but it must be a tensor"):
        linear_cross_entropy(*make(9, 63, 7), bias=[0.0] * 63)


@pytest.mark.gpu
def test_a_bad_target_on_cuda_is_named_later():
    hidden, weight, target = make(9, 63, 7, device="cuda")
    target[4] = 63
    loss, lse = linear_cross_entropy(
        hidden.requires_grad_(), weight, target, reduction="none", return_lse=True, softcap=5.0
    )
    assert loss[4].isnan() and lse[4].isnan() and loss[:4].isfinite().all()
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=r"target\[4\] = 63"):
        loss.sum().backward()

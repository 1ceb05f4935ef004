"""Residual + LayerNorm: both implementations against fp64 and plain PyTorch, every gradient, every use."""

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from soundwave import eager
from soundwave.fused.functional import add_layer_norm
from soundwave.kernels.norm import MAX_D, PROGRAMS, _config, _forward
from tests.accuracy import assert_as_accurate, assert_rms, relative
from tests.implementations import WHERE, skip_unless_runnable

pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")

EPS = 1e-5
NAMES = ("y", "s", "dx", "dresidual", "dweight", "dbias")
FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SIZES = [(1, 63), (7, 7), (13, 100), (33, 33)]


def make(rows, width, dtype=FP32, residual_dtype=None, weight_dtype=None, gather=False, device="cpu", seed=0):
    """x, residual, weight, bias, and the index or None. With `gather` some rows of the residual are not used."""
    generator = torch.Generator().manual_seed(seed)
    count = 2 * rows + 1 if gather else rows

    def draw(*shape, dtype):
        return torch.randn(*shape, generator=generator, dtype=FP64).to(device, dtype).requires_grad_()

    weight_dtype = weight_dtype or (FP64 if dtype == FP64 else FP32)
    tensors = [draw(rows, width, dtype=dtype), draw(count, width, dtype=residual_dtype or dtype)]
    tensors += [draw(width, dtype=weight_dtype), draw(width, dtype=weight_dtype)]
    index = torch.randperm(count, generator=generator)[:rows].to(device) if gather else None
    return tensors, index


def everything(function, tensors, upstream, with_sum):
    """y, s and the gradients of all four tensors; s is None without `with_sum`."""
    y, total = function(*tensors)
    outputs, gradients = ([y, total], upstream) if with_sum else ([y], upstream[:1])
    gradients = [gradient.to(output.dtype) for output, gradient in zip(outputs, gradients, strict=True)]
    found = [y.detach(), total.detach() if with_sum else None]
    return [*found, *torch.autograd.grad(outputs, tensors, gradients)]


def check(tensors, index, with_sum, impl) -> list[tuple[float, float]]:
    """Asserts the accuracy of every result; returns (our error, eager's) over the norm of the truth."""
    dtype = torch.promote_types(tensors[0].dtype, tensors[1].dtype)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(tensors[0].shape, generator=generator).to(tensors[0].device, dtype) for _ in range(2)]

    def ours(*tensors):
        out = add_layer_norm(*tensors, EPS, residual_index=index, return_sum=with_sum, impl=impl)
        return out if with_sum else (out, None)

    def reference(*tensors):
        return eager.add_layer_norm(*tensors, EPS, residual_index=index, return_sum=True)

    found = everything(ours, tensors, upstream, with_sum)
    theirs = everything(reference, tensors, upstream, with_sum)
    truth = everything(reference, [t.detach().double().requires_grad_() for t in tensors], upstream, with_sum)
    pairs = []
    for name, a, b, c in zip(NAMES, found, theirs, truth, strict=True):
        if c is None:
            continue
        assert a.dtype == b.dtype, name
        # A gradient has the dtype of its tensor, and is judged in that.
        pairs.append(relative(assert_as_accurate(a, b, c, b.dtype, name), c))
    return pairs


# ---------------------------------------------------------------- accuracy


@pytest.mark.parametrize(("device", "impl"), WHERE)
@pytest.mark.parametrize("with_sum", [False, True], ids=["norm", "norm-and-sum"])
@pytest.mark.parametrize("gather", [False, True], ids=["rows", "gathered"])
@pytest.mark.parametrize(("rows", "width"), SIZES, ids=[f"N{n}-D{d}" for n, d in SIZES])
@pytest.mark.parametrize("dtype", [FP32, FP64, BF16, FP16], ids=["fp32", "fp64", "bf16", "fp16"])
def test_every_result_is_as_exact_as_eager(dtype, rows, width, gather, with_sum, device, impl):
    skip_unless_runnable(device, impl, dtype)
    tensors, index = make(rows, width, dtype, gather=gather, device=device)
    check(tensors, index, with_sum, impl)


@pytest.mark.parametrize(("device", "impl"), WHERE)
@pytest.mark.parametrize("gather", [False, True], ids=["rows", "gathered"])
@pytest.mark.parametrize(
    ("x", "residual", "weight"),
    [(BF16, FP32, FP32), (FP32, BF16, FP32), (FP16, FP32, FP16), (BF16, BF16, BF16), (FP32, FP64, FP64)],
    ids=["bf16-onto-fp32", "fp32-onto-bf16", "fp16-onto-fp32", "all-bf16", "fp32-onto-fp64"],
)
def test_dtypes_may_differ_and_each_gradient_has_its_own(x, residual, weight, gather, device, impl):
    skip_unless_runnable(device, impl, x, residual)
    tensors, index = make(7, 100, x, residual, weight, gather=gather, device=device)
    check(tensors, index, True, impl)


@pytest.mark.parametrize(("device", "impl"), WHERE)
def test_more_rows_than_programs_sum_the_weights_over_all_of_them(device, impl):
    skip_unless_runnable(device, impl)
    tensors, index = make(2 * PROGRAMS + 3, 5, device=device)
    check(tensors, index, False, impl)


@pytest.mark.parametrize(("device", "impl"), WHERE)
@pytest.mark.parametrize("width", [1024, 4097, MAX_D])
def test_wide_rows(width, device, impl):
    skip_unless_runnable(device, impl)
    tensors, index = make(3, width, device=device, gather=True)
    check(tensors, index, True, impl)


@pytest.mark.parametrize(("device", "impl"), WHERE)
@pytest.mark.parametrize("dtype", [FP32, FP64], ids=["fp32", "fp64"])
def test_one_column_leaves_the_bias_alone(dtype, device, impl):
    """The variance is 0, so gradients are rounding errors, at most times 1 / sqrt(eps)."""
    skip_unless_runnable(device, impl)
    tensors, _ = make(5, 1, dtype, device=device)
    y = add_layer_norm(*tensors, EPS, impl=impl)
    ulps = 8 * torch.finfo(dtype).eps * EPS**-0.5
    torch.testing.assert_close(y, tensors[3].expand(5, 1), rtol=0, atol=ulps)
    dx, dresidual, dweight, dbias = torch.autograd.grad(y.sum(), tensors)
    assert torch.equal(dx, dresidual) and float(dbias) == 5
    assert float(dx.abs().max()) <= ulps and float(dweight.abs().max()) <= 5 * ulps


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_over_many_draws_the_error_is_as_small_as_eagers(impl):
    skip_unless_runnable("cpu", impl)
    pairs = []

    @settings(max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(1, 20), st.integers(2, 300), st.booleans(), st.booleans(), st.integers(0, 2**20))
    @example(1, 2, True, True, 0)
    def draw(rows, width, gather, with_sum, seed):
        tensors, index = make(rows, width, gather=gather, seed=seed)
        pairs.extend(check(tensors, index, with_sum, impl))

    draw()
    assert_rms(pairs, torch.finfo(FP32).eps / 4, "relative errors")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("gather", [False, True], ids=["rows", "gathered"])
def test_at_the_size_of_the_adapters(gather, dtype, impl):
    tensors, index = make(3000, 4096, dtype, gather=gather, device="cuda")
    check(tensors, index, not gather, impl)


@pytest.mark.parametrize(("device", "impl"), WHERE)
def test_a_large_mean_costs_no_more_than_in_eager(device, impl):
    skip_unless_runnable(device, impl)
    tensors, index = make(7, 63, device=device)
    with torch.no_grad():
        tensors[1] += 1000.0
    check(tensors, index, False, impl)


# ---------------------------------------------------------------- single behaviours


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_sum_alone_passes_its_gradient_on(impl):
    skip_unless_runnable("cpu", impl)
    (x, residual, weight, bias), index = make(5, 7, gather=True)
    _, total = add_layer_norm(x, residual, weight, bias, residual_index=index, return_sum=True, impl=impl)
    upstream = torch.randn(5, 7)
    dx, dresidual, dweight = torch.autograd.grad(total, (x, residual, weight), upstream)
    assert torch.equal(dx, upstream) and torch.equal(dresidual[index], upstream)
    assert not dweight.any() and int((dresidual != 0).any(1).sum()) == 5


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_with_the_sum_y_is_the_norm_of_the_rounded_sum(impl):
    skip_unless_runnable("cpu", impl)
    tensors, _ = make(7, 100, FP16)
    with torch.no_grad():
        tensors[1] += 700  # where float16 has steps of 0.5
    y, total = add_layer_norm(*tensors, return_sum=True, impl=impl)
    assert total.dtype == y.dtype == FP16 and torch.equal(total, (2 * total).round() / 2)
    expected = torch.nn.functional.layer_norm(total.float(), (100,), *tensors[2:], EPS)
    # The mean is 700, known to 2^-24 of itself; the norm of the unrounded sum is some 0.1 away.
    torch.testing.assert_close(y, expected.to(FP16), rtol=1e-3, atol=4 * 700 * 2**-24)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("gather", [False, True], ids=["rows", "gathered"])
@pytest.mark.parametrize("wanted", range(4), ids=["x", "residual", "weight", "bias"])
def test_a_single_gradient_is_the_one_of_all_together(wanted, gather, impl):
    skip_unless_runnable("cpu", impl)
    tensors, index = make(7, 33, gather=gather)
    together = torch.autograd.grad(add_layer_norm(*tensors, residual_index=index, impl=impl).sum(), tensors)
    for place, tensor in enumerate(tensors):
        tensor.requires_grad_(place == wanted)
    (alone,) = torch.autograd.grad(add_layer_norm(*tensors, residual_index=index, impl=impl).sum(), tensors[wanted])
    assert torch.equal(alone, together[wanted])


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("width", [33, 4100], ids=["D33", "D4100"])
def test_frozen_weights_leave_the_other_gradients_alone(width, impl):
    skip_unless_runnable("cpu", impl)
    tensors, _ = make(3, width)
    expected = torch.autograd.grad(add_layer_norm(*tensors, impl=impl).sum(), tensors[:2])
    frozen = [*tensors[:2], *(tensor.detach() for tensor in tensors[2:])]
    found = torch.autograd.grad(add_layer_norm(*frozen, impl=impl).sum(), tensors[:2])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("gather", [False, True], ids=["rows", "gathered"])
def test_no_rows_at_all(gather, impl):
    skip_unless_runnable("cpu", impl)
    tensors, index = make(0, 7, gather=gather)
    y, total = add_layer_norm(*tensors, residual_index=index, return_sum=True, impl=impl)
    assert y.shape == total.shape == (0, 7)
    for gradient, tensor in zip(torch.autograd.grad(y.sum() + total.sum(), tensors), tensors, strict=True):
        assert gradient.shape == tensor.shape and not gradient.any()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_transposed_and_expanded_tensors_are_read_right(impl):
    skip_unless_runnable("cpu", impl)
    x, residual = torch.randn(9, 5).t().requires_grad_(), torch.randn(9).expand(5, 9)
    weight, bias = torch.randn(18)[::2], torch.zeros(1).expand(9)
    y = add_layer_norm(x, residual, weight, bias, impl=impl)
    expected = eager.add_layer_norm(x, residual, weight, bias, EPS)
    torch.testing.assert_close(y, expected)
    # The gradient of a sum is expanded, too.
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_rows_do_not_matter_to_each_other(impl):
    skip_unless_runnable("cpu", impl)
    tensors, _ = make(7, 33)
    y = add_layer_norm(*tensors, impl=impl)
    with torch.no_grad():
        tensors[0][3] = torch.nan
    spoilt = add_layer_norm(*tensors, impl=impl)
    assert spoilt[3].isnan().all()
    assert torch.equal(spoilt[[0, 1, 2, 4, 5, 6]], y[[0, 1, 2, 4, 5, 6]])


@pytest.mark.parametrize(("device", "impl"), WHERE)
def test_results_are_bitwise_the_same_every_time(device, impl):
    skip_unless_runnable(device, impl)
    tensors, index = make(2 * PROGRAMS if device == "cuda" else 20, 33, gather=True, device=device)

    def run():
        y = add_layer_norm(*tensors, residual_index=index, impl=impl)
        return [y, *torch.autograd.grad(y.square().sum(), tensors)]

    first = run()
    for _ in range(20 if impl == "torch" or device == "cuda" else 3):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


# ---------------------------------------------------------------- torch.library and torch.compile


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("gather", [False, True], ids=["rows", "gathered"])
@pytest.mark.parametrize("with_sum", [False, True], ids=["norm", "norm-and-sum"])
def test_opcheck(with_sum, gather, impl):
    skip_unless_runnable("cpu", impl)
    tensors, index = make(5, 7, gather=gather)
    torch.library.opcheck(_forward, (*tensors, index, EPS, with_sum, impl))


# A compiler cannot look into Triton's settings, as it would have to where the interpreter is asked for by name.
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_as_one_graph_for_any_number_of_rows(device):

    def function(x, residual, weight, bias, index):
        return add_layer_norm(x, residual, weight, bias, residual_index=index, return_sum=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 9):
        tensors, index = make(rows, 7, gather=True, device=device)
        found, expected = compiled(*tensors, index), function(*tensors, index)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
        gradients = [torch.autograd.grad(out[0].sum() + out[1].square().sum(), tensors) for out in (found, expected)]
        for a, b in zip(*gradients, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_second_derivative_is_refused(impl):
    skip_unless_runnable("cpu", impl)
    tensors, _ = make(3, 5)
    (gradient,) = torch.autograd.grad(add_layer_norm(*tensors, impl=impl).square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="add_layer_norm has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_autocast_changes_nothing(impl):
    skip_unless_runnable("cpu", impl)
    tensors, _ = make(3, 33)
    expected = add_layer_norm(*tensors, impl=impl)
    with torch.autocast("cpu", BF16):
        assert torch.equal(add_layer_norm(*tensors, impl=impl), expected)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3)}, r"x has shape \[3\], but it must be \[N, D\]"),
        ({"x": torch.zeros(3, 5, dtype=torch.int64)}, "x is torch.int64, but it must be floating point"),
        ({"x": torch.zeros(3, 0), "residual": torch.zeros(3, 0)}, r"weight has shape \[5\], but it must be \[0\]"),
        ({"residual": torch.zeros(4, 5)}, r"residual has shape \[4, 5\], but it must be \[3, 5\]"),
        ({"residual": torch.zeros(3, 5, device="meta")}, "residual is on meta, but the other tensors are on cpu"),
        ({"weight": torch.zeros(1)}, r"weight has shape \[1\], but it must be \[5\]"),
        ({"bias": torch.zeros(5, 1)}, r"bias has shape \[5, 1\], but it must be \[5\]"),
        ({"residual_index": torch.zeros(2, dtype=torch.int64)}, r"residual_index has shape \[2\], .* \[3\]"),
        ({"residual_index": torch.zeros(3)}, "residual_index is torch.float32, but it must be int32 or int64"),
        ({"residual_index": torch.tensor([0, 3, 1])}, r"residual_index\[1\] = 3, but residual has 3 rows"),
        ({"residual_index": torch.tensor([0, 1, -1])}, r"residual_index\[2\] = -1, but residual has 3 rows"),
        ({"residual_index": torch.tensor([2, 1, 2])}, "residual_index holds 2 twice, but its rows must differ"),
        ({"impl": "cuda"}, "impl = 'cuda', but it must be one of auto, triton, torch"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(change, message):
    arguments = {"x": torch.zeros(3, 5), "residual": torch.zeros(3, 5), "weight": torch.ones(5), "bias": torch.zeros(5)}
    with pytest.raises(ValueError, match=message):
        add_layer_norm(**(arguments | change))


def test_rows_too_wide_for_one_block_are_refused_by_triton_and_taken_by_torch():
    skip_unless_runnable("cpu", "triton")
    width = MAX_D + 1
    tensors, _ = make(1, width)
    with pytest.raises(ValueError, match=f"x has D = {width} columns, but impl = 'triton' takes up to {MAX_D}"):
        add_layer_norm(*tensors, impl="triton")
    check(tensors, None, False, "torch")


def test_no_columns_are_refused():
    with pytest.raises(ValueError, match="x has D = 0 columns"):
        add_layer_norm(torch.zeros(1, 0), torch.zeros(1, 0), torch.ones(0), torch.zeros(0))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_in_triton_a_row_that_does_not_exist_is_nan_and_no_other(device):
    skip_unless_runnable(device, "triton")
    (x, residual, weight, bias), _ = make(3, 5, device=device)
    index = torch.tensor([2, 7, 0], device=device)
    y = add_layer_norm(x, residual, weight, bias, residual_index=index, impl="triton")
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()
    dresidual = torch.autograd.grad(y.sum(), residual)[0]
    assert not dresidual.isnan().any()


def test_settings_cover_the_row_and_need_no_more_warps_than_there_are():
    for width in (1, 7, 100, 576, 1000, 4096, 4097, MAX_D):
        config = _config(width)
        assert width <= config.block_d and config.block_d.bit_count() == 1 and 1 <= config.num_warps <= 16

"""The interpreter of the tests, which keeps what Triton's builds again: it checks and computes what Triton's does."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the kernels are compiled here", allow_module_level=True)

import triton
import triton.language as tl
from triton.language import core, semantic
from triton.runtime import interpreter

from tests.quick_interpreter import make_quick


@triton.jit
def _double(x):
    return x * 2


@triton.jit
def _calculate_kernel(X, Y, OUT, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x, y = tl.load(X + offsets), tl.load(Y + offsets)
    if OPERATION == "add":
        x = x + y
    elif OPERATION == "sub":
        x = x - y
    elif OPERATION == "mul":
        x = x * y
    else:
        x = tl.sum(_double(x)[:, None] + _double(y)[None, :] * 0.5, axis=1)
    tl.store(OUT + offsets, x)


def calculate(operation: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    _calculate_kernel[(1,)](x, y, out, operation, x.numel())
    return out


@pytest.fixture(params=["as-it-comes", "quick"])
def either(request, monkeypatch, slow):
    """Triton's own interpreter, and the tests'."""
    if request.param == "quick":
        make_quick(monkeypatch)


@pytest.fixture
def slow(monkeypatch):
    """Takes back what the tests change in the interpreter, which is here for the whole session."""
    for owner, name in REPLACED:
        monkeypatch.setattr(owner, name, ORIGINAL[owner, name])


REPLACED = [
    (interpreter, "_patch_builtin"),
    (interpreter, "_patch_lang"),
    (interpreter, "_get_np_dtype"),
    (core.block_type, "__init__"),
    (core.tensor, "__init__"),
    (semantic.TritonSemantic, "binary_op_sanitize_overflow_impl"),
]
ORIGINAL = {(owner, name): getattr(owner, name) for owner, name in REPLACED}  # before any fixture of the session


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("operation", ["add", "sub", "mul"])
def test_in_debug_an_overflow_is_found_and_what_just_fits_is_not(operation, dtype, monkeypatch):
    least, most = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    fits = {"add": (most - 1, 1), "sub": (least + 1, 1), "mul": (most, 1)}[operation]
    overflows = {"add": (most, 1), "sub": (least, 1), "mul": (most // 2 + 1, 2)}[operation]
    function = {"add": torch.add, "sub": torch.sub, "mul": torch.mul}[operation]
    x, y = (torch.tensor([3, value], dtype=dtype) for value in overflows)
    assert torch.equal(calculate(operation, x, y), function(x, y))
    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=True))
    with pytest.raises(Exception, match=f"overflow detected for operation {operation}"):
        calculate(operation, x, y)
    x, y = (torch.tensor([3, fit], dtype=dtype) for fit in fits)
    assert torch.equal(calculate(operation, x, y), function(x, y))


@pytest.mark.usefixtures("either")
def test_a_block_whose_size_is_no_power_of_two_is_refused():
    calculate("add", torch.ones(4), torch.ones(4))
    with pytest.raises(Exception, match="power of 2"):
        calculate("add", torch.ones(3), torch.ones(3))


@pytest.mark.usefixtures("either")
def test_the_names_of_the_language_come_back_after_a_kernel_and_after_a_failure():
    before = tl.load, tl.tensor.__add__, hasattr(tl.tensor, "__bool__")
    calculate("other", torch.ones(4), torch.ones(4))
    with pytest.raises(Exception, match="power of 2"):
        calculate("other", torch.ones(3), torch.ones(3))
    assert (tl.load, tl.tensor.__add__, hasattr(tl.tensor, "__bool__")) == before


def test_results_are_the_same_bits(slow, monkeypatch):
    x, y = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)) * 100
    given = [(x.to(dtype), y.to(dtype)) for dtype in (torch.float32, torch.float16, torch.float64, torch.int32)]
    operations = ("add", "sub", "mul", "other")
    expected = [calculate(operation, *pair) for operation in operations for pair in given]
    make_quick(monkeypatch)
    found = [calculate(operation, *pair) for operation in operations for pair in given]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

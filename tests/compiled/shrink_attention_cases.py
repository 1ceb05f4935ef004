"""The kernels of `shrink_attention`: heads of the usual sizes, one that is no power of two and a small one."""

import torch
import triton

from soundwave.kernels import shrink_attention as op

# fp16 compiles like bf16. "tf32" matters for fp32 only.
USES = [(size, torch.bfloat16, "ieee") for size in (8, 64, 80, 128, 256)] + [
    (80, torch.float32, "tf32"),
    (128, torch.float32, "tf32"),
    (128, torch.float32, "ieee"),
    (256, torch.float32, "ieee"),
]
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
DTYPE_OF = {"LSE": "*fp32", "DELTA": "*fp32", "CU_Q": "*i32", "CU_K": "*i32", "SCALE": "fp32"}
TENSORS = ("Q", "K", "V", "OUT", "DOUT", "DQ", "DK", "DV")
KERNELS = {
    "fwd": op._shrink_attention_fwd_kernel,
    "dq": op._shrink_attention_dq_kernel,
    "dkv": op._shrink_attention_dkv_kernel,
}


def cases(arch, Case):
    for size, dtype, precision in USES:
        config, pointer = op._config(size, dtype, arch)._asdict(), TYPES[dtype]
        for name, kernel in KERNELS.items():
            tile = config[name]
            constexprs = {
                "E": size,
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "BLOCK_E": max(triton.next_power_of_2(size), 16),
                "PRECISION": precision,
            }
            names = [n for n in kernel.arg_names if n not in constexprs]
            signature = {n: pointer if n in TENSORS else DTYPE_OF.get(n, "i32") for n in names}
            aligned = (*(n for n in names if signature[n].startswith("*")), "Q_ROW", "K_ROW", "V_ROW")
            aligned += ("Q_HEAD", "K_HEAD", "V_HEAD") if size % 16 == 0 else ()
            label = f"E{size} {dtype} {precision} {tile.block_m}x{tile.block_n}".replace("torch.", "")
            yield Case(label, kernel, signature, constexprs, tile.num_warps, tile.num_stages, aligned)

"""Residual + LayerNorm at the widths of the two language models, of odd rows and of the widest, in every use."""

import triton.language as tl

from soundwave.kernels.norm import _add_layer_norm_bwd_kernel, _add_layer_norm_fwd_kernel, _config

# Use: is the residual gathered, is s stored (backward then reads it), dtypes of x and of the residual.
USES = {
    "pre-norm bf16": (False, True, "bf16", "bf16"),
    "post-norm gathered bf16 onto fp32": (True, False, "bf16", "fp32"),
    "post-norm fp32": (False, False, "fp32", "fp32"),
}


def cases(arch, Case):
    for width in (100, 576, 1024, 4096, 8192):
        config = _config(width)
        aligned = ("D",) if width % 16 == 0 else ()
        for use, (has_index, has_sum, x, residual) in USES.items():
            label = f"D{width} {use}"
            out = "fp32" if "fp32" in (x, residual) else "bf16"
            pointers = {"X": x, "RESIDUAL": residual, "INDEX": "i64", "WEIGHT": "fp32", "MEAN": "fp32", "RSTD": "fp32"}
            forward = pointers | {"BIAS": "fp32", "Y": out, "SUM": out}
            backward = pointers | {"X": out if has_sum else x, "DY": out, "DSUM": out, "DX": x, "DRESIDUAL": residual}
            backward |= {"DWEIGHT": "fp32", "DBIAS": "fp32"}
            sizes = {"R": "i32", "D": "i32"}
            shared = {"HAS_INDEX": has_index, "COMPUTE": tl.float32, "BLOCK_D": config.block_d}
            yield Case(
                label,
                _add_layer_norm_fwd_kernel,
                {name: f"*{dtype}" for name, dtype in forward.items()} | sizes,
                shared | {"EPS": 1e-5, "STORE_SUM": has_sum},
                config.num_warps,
                divisible_by_16=(*forward, *aligned),
            )
            for rows, params in [(True, True)] if config.together else [(True, False), (False, True)]:
                yield Case(
                    f"{label}, gradients of {'both' if config.together else 'rows' if rows else 'parameters'}",
                    _add_layer_norm_bwd_kernel,
                    {name: f"*{dtype}" for name, dtype in backward.items()} | sizes | {"N": "i32"},
                    shared
                    | {"HAS_RESIDUAL": not has_sum, "HAS_DSUM": has_sum, "STORE_DX": rows}
                    | {"STORE_DRESIDUAL": rows and has_index, "STORE_DPARAMS": params},
                    config.num_warps,
                    divisible_by_16=(*backward, *aligned),
                )

"""The CTC kernels for targets of every block size and of several blocks, and each dtype of log-probabilities."""

import torch

from soundwave.kernels.ctc_lattice import (
    LN2,
    RENORM,
    SUM_BLOCK,
    _config,
    _ctc_emit_kernel,
    _ctc_lattice_kernel,
    _ctc_nll_kernel,
    _ctc_posterior_kernel,
)

LENGTHS = {"INPUT_LENGTHS": "*i64", "TARGET_LENGTHS": "*i64"}
INPUTS = {"fp16": "fp32", "bf16": "fp32", "fp32": "fp32", "fp64": "fp64"}
WIDTHS = (1, 64, 81, 256, 512, 1024, 3000)


def cases(arch, Case):
    for inside in ("fp32", "fp64"):
        pointers = {"LIKELIHOOD": "*fp64", "SHIFT": f"*{inside}", "INPUT_LENGTHS": "*i64", "NLL": f"*{inside}"}
        sizes = {"LN2": LN2, "BLOCK": SUM_BLOCK}
        divisible = ("LIKELIHOOD", "SHIFT", "NLL")
        yield Case(inside, _ctc_nll_kernel, pointers | {"T": "i32"}, sizes, 1, divisible_by_16=divisible)
    for given, inside in INPUTS.items():
        dtype = torch.float64 if inside == "fp64" else torch.float32
        for width in WIDTHS:
            block, lattice_warps, row_warps = _config(width, dtype)
            label = f"W{width} {given}"
            sizes = {"T": "i32", "W": "i32"}
            log_probs = {"LOG_PROBS": f"*{given}", "TARGETS": "*i64", "EMISSIONS": f"*{inside}", "SHIFT": f"*{inside}"}
            yield Case(
                label,
                _ctc_emit_kernel,
                log_probs | LENGTHS | sizes | {name: "i64" for name in ("blank", "stride_t", "stride_b", "stride_c")},
                {"BLOCK": block},
                row_warps,
                divisible_by_16=("TARGETS", "EMISSIONS"),
            )
            if given != inside:
                continue  # the other kernels see the dtype of the emissions only
            pointers = {"EMISSIONS": inside, "TARGETS": "i64", "STATES": inside, "EDGES": inside, "LIKELIHOOD": "fp64"}
            for store in (True, False):
                yield Case(
                    f"{label}{'' if store else ' without gradient'}",
                    _ctc_lattice_kernel,
                    {name: f"*{kind}" for name, kind in pointers.items()} | LENGTHS | sizes,
                    {"STORE": store, "MANY": width > block, "FAST": inside == "fp32", "RENORM": RENORM, "BLOCK": block},
                    lattice_warps,
                    divisible_by_16=(*pointers, *LENGTHS),
                )
            pointers = {"STATES": inside, "NLL": inside, "ORDER": "i64", "COLUMN": "i64", "POSTERIORS": inside}
            yield Case(
                label,
                _ctc_posterior_kernel,
                {name: f"*{kind}" for name, kind in pointers.items()} | LENGTHS | sizes | {"B": "i32"},
                {"BLOCK": block},
                row_warps,
                divisible_by_16=(*pointers, *LENGTHS),
            )

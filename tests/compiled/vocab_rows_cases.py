"""The pass over rows of logits: small and large vocabularies, few and many own columns, each dtype of the products."""

import torch

from soundwave.kernels.vocab_rows import _config, _vocab_rows_kernel

DTYPES = {"fp16": "fp32", "bf16": "fp32", "fp32": "fp32", "fp64": "fp64"}
SHAPES = ((2, 1), (1000, 7), (49152, 81), (128256, 1), (128257, 3000))  # V, C


def cases(arch, Case):
    for given, inside in DTYPES.items():
        for columns, own in SHAPES:
            block, block_c, warps = _config(columns, own, torch.float64 if inside == "fp64" else torch.float32)
            for write in (True, False):
                if not write and given == "fp16":
                    continue  # as in bf16
                yield Case(
                    f"V{columns} C{own} {given}{'' if write else ' without P'}",
                    _vocab_rows_kernel,
                    {"LOGITS": f"*{given}", "IDS": "*i64", "GROUP": "*i64", "INDEX": "*i64"}
                    | {name: f"*{inside}" for name in ("OWN", "SCALE", "TOP", "LOG_SUM", "OFF")}
                    | {name: "i32" for name in ("V", "C", "stride")},
                    {"WRITE": write, "BLOCK": block, "BLOCK_C": block_c},
                    warps,
                    divisible_by_16=("LOGITS", "IDS", "OWN", "stride", *(("V",) if columns % 16 == 0 else ())),
                )

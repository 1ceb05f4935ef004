"""The pass over rows of logits: small and large vocabularies, few and many labels, each dtype of the products."""

import torch

from soundwave.kernels.vocab_rows import _config, _vocab_rows_kernel

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
DTYPES = {"fp16": "fp32", "bf16": "fp32", "fp32": "fp32", "fp64": "fp64"}
SHAPES = ((2, 1), (1000, 7), (49152, 81), (128256, 1), (128257, 3000))  # V, C


def cases(arch, Case):
    for given, inside in DTYPES.items():
        for columns, labels in SHAPES:
            groups, each, warps, registers = _config(columns, TYPES[given])
            for write in (True, False):
                if not write and given == "fp16":
                    continue  # the same as bf16
                yield Case(
                    f"V{columns} C{labels} {given}{'' if write else ' without P'}",
                    _vocab_rows_kernel,
                    {"LOGITS": f"*{given}", "LABELS": "*i64", "GROUP": "*i64", "ARGMAX": "*i64"}
                    | {name: f"*{inside}" for name in ("LABEL_LOGITS", "SCALE", "MAXIMUM", "LOG_SUM", "OFF_LABEL_MASS")}
                    | {name: "i32" for name in ("V", "C", "stride")},
                    {"WRITE": write, "SPLIT": inside == "fp32", "GROUPS": groups, "EACH": each, "BLOCK_C": 32 * warps},
                    warps,
                    divisible_by_16=(
                        "LOGITS",
                        "LABELS",
                        "LABEL_LOGITS",
                        "stride",
                        *(("V",) if columns % 16 == 0 else ()),
                    ),
                    maxnreg=registers,
                )

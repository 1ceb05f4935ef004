"""The pass over rows of logits for the cross-entropy's options: each alone and all together, in each dtype."""

import torch

from soundwave.kernels.cross_entropy_rows import LEAST_MAGNITUDE, TERMS, _config, _cross_entropy_rows_kernel
from soundwave.kernels.vocab_rows import p_factor

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
DTYPES = {"fp16": "fp32", "bf16": "fp32", "fp32": "fp32", "fp64": "fp64"}
FLOATS = (
    "TARGET_LOGITS", "BIAS", "CLASS_WEIGHT", "COEFFICIENTS", "MAXIMUM", "LOG_SUM", "OFF_TARGET_MASS", "SPREAD",
    "MAGNITUDE",
)  # fmt: skip
NONE = {"HAS_BIAS": False, "CAP": 0.0, "SMOOTH": False, "WEIGHTED": False}
OPTIONS = {
    "z-loss": {},
    "bias": {"HAS_BIAS": True},
    "softcap": {"CAP": 30.0},
    "smoothing": {"SMOOTH": True},
    "all": {"HAS_BIAS": True, "CAP": 30.0, "SMOOTH": True, "WEIGHTED": True},
}


def cases(arch, Case):
    for given, inside in DTYPES.items():
        dtype = TYPES[given]
        for columns in (2, 128256, 128257):
            groups, each, warps, registers = _config(columns, dtype)
            for name, options in OPTIONS.items():
                if name != "all" and columns != 128256:
                    continue
                for write in (True, False):
                    if not write and (given == "fp16" or name != "all"):
                        continue
                    yield Case(
                        f"V{columns} {name} {given}{'' if write else ' without Q'}",
                        _cross_entropy_rows_kernel,
                        {"LOGITS": f"*{given}", "TARGET": "*i64", "V": "i32", "stride": "i32"}
                        | {name: f"*{inside}" for name in FLOATS},
                        {
                            "WRITE": write, **(NONE | options), "FACTOR": p_factor(dtype), "LEAST": LEAST_MAGNITUDE,
                            "SPLIT": inside == "fp32", "TERMS": TERMS.get(dtype, 0), "GROUPS": groups, "EACH": each,
                        },
                        warps,
                        divisible_by_16=(
                            "LOGITS", "BIAS", "CLASS_WEIGHT", "stride", *(("V",) if columns % 16 == 0 else ()),
                        ),
                        maxnreg=registers,
                    )  # fmt: skip

"""Which columns of P a tile needs, and their product with W: each dtype of the products, small and large heads."""

import torch

from soundwave.kernels.active_columns import (
    BLOCK_COLUMNS,
    SKIPPED_MASS,
    _active_product_kernel,
    _choose_columns_kernel,
    _column_bins_kernel,
    _compact_columns_kernel,
    _config,
    _tile_losses_kernel,
)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SHAPES = ((128256, 4096), (128257, 4090))  # V, D


def cases(arch, Case):
    for dtype, of in DTYPES.items():
        config = _config(of, arch)
        factor = 15 if dtype == "fp16" else 0
        tile = {"ROWS": config.rows}
        blocks = {"BLOCK": BLOCK_COLUMNS, "STEP": config.step}
        for columns, width in SHAPES[: 1 if dtype == "fp16" else None]:
            label, count = f"V{columns} D{width} {dtype}", -(-columns // BLOCK_COLUMNS)
            even = (*(["V"] if columns % 16 == 0 else []), "stride", "room")
            yield Case(
                label, _column_bins_kernel,
                {"P": f"*{dtype}", "BIN": "*i8", "MASS": "*fp32", "COUNT": "*i32"}
                | {name: "i32" for name in ("N", "V", "stride")},
                {"LOG_FACTOR": factor, **blocks, **tile}, config.num_warps,
                divisible_by_16=("P", "BIN", "MASS", "COUNT", *even[:-1]),
            )  # fmt: skip
            yield Case(
                label, _compact_columns_kernel,
                {"P": f"*{dtype}", "BIN": "*i8", "COUNT": "*i32", "LIMIT": "*i32", "LIST": "*i32"}
                | {"COMPACT": f"*{dtype}"} | {name: "i32" for name in ("N", "V", "stride", "room")},
                {"BLOCKS": 1 << (count - 1).bit_length(), **blocks, **tile}, config.num_warps,
                divisible_by_16=("P", "BIN", "COUNT", "LIMIT", "LIST", "COMPACT", *even),
            )  # fmt: skip
            for precision in ("ieee", "tf32") if dtype == "fp32" else ("ieee",):
                yield Case(
                    f"{label} {precision}", _active_product_kernel,
                    {"P": f"*{dtype}", "COMPACT": f"*{dtype}", "LIST": "*i32", "LIMIT": "*i32", "KEPT": "*i32"}
                    | {"W": f"*{dtype}", "OUT": "*fp32"}
                    | {name: "i32" for name in ("N", "V", "D", "stride", "room", "W_V")},
                    {"UNIT": 2.0**-factor, "W_D": 1, "PRECISION": precision}
                    | {"WIDTH": config.width, "TERMS": config.terms} | tile,
                    config.num_warps,
                    num_stages=config.num_stages,
                    divisible_by_16=(
                        "P", "COMPACT", "LIST", "LIMIT", "KEPT", "W", "OUT", *even,
                        *(["D", "W_V"] if width % 16 == 0 else []),
                    ),
                )  # fmt: skip
    for rows in sorted({_config(of, arch).rows for of in DTYPES.values()}):
        for grouped in (False, True):
            label = f"{rows} rows{', grouped' * grouped}"
            yield Case(
                label, _tile_losses_kernel,
                {"MASS": "*fp32", "COUNT": "*i32", "OFF_LABEL": "*fp32", "FACTOR": "*fp32", "GROUP": "*i64"}
                | {"LOSS": "*fp32", "BELOW": "*i32", "LOST": "*fp64", "BUDGET": "*fp64"}
                | {name: "i32" for name in ("N", "blocks", "most")},
                {"SHARE_OF_MASS": SKIPPED_MASS, "UNIT": 1.0, "WEIGHED": True, "GROUPED": grouped, "ROWS": rows}, 8,
                divisible_by_16=("MASS", "COUNT", "LOSS", "BELOW", "LOST", "BUDGET", "blocks", "most"),
            )  # fmt: skip
            yield Case(
                label, _choose_columns_kernel,
                {"LOSS": "*fp32", "BELOW": "*i32", "LOST": "*fp64", "BUDGET": "*fp64"}
                | {"LIMIT": "*i32", "KEPT": "*i32", "SHARE": "*fp32", "SKIPPED": "*fp32"}
                | {name: "i32" for name in ("N", "V", "tiles", "most")},
                {"GROUPED": grouped, "ROWS": rows}, 8,
                divisible_by_16=("LOSS", "BELOW", "LOST", "BUDGET", "LIMIT", "KEPT", "V", "most"),
            )  # fmt: skip

"""The copies of splice at the widths of the two language models and of odd rows."""

from soundwave.kernels.splice import _config, _splice_rows_bwd_kernel, _splice_rows_fwd_kernel

DTYPES = {"bf16": ("bf16", "bf16"), "fp32 into bf16": ("bf16", "fp32"), "fp32": ("fp32", "fp32")}


def cases(arch, Case):
    for width in (7, 100, 576, 4096):
        block_d, num_warps = _config(width)
        aligned = ("D",) if width % 16 == 0 else ()
        for name, (text, speech) in DTYPES.items():
            forward = {"EMBEDDINGS": f"*{text}", "SPEECH": f"*{speech}", "SOURCE": "*i64", "OUT": f"*{text}"}
            backward = {"DOUT": f"*{text}", "INVERSE": "*i64", "DX": f"*{speech}"}
            for kernel, pointers, sizes in (
                (_splice_rows_fwd_kernel, forward, {"TEXT_ROWS": "i32", "D": "i32"}),
                (_splice_rows_bwd_kernel, backward, {"D": "i32"}),
            ):
                yield Case(
                    f"D{width} {name}",
                    kernel,
                    pointers | sizes,
                    {"BLOCK_D": block_d},
                    num_warps,
                    divisible_by_16=(*pointers, *aligned),
                )

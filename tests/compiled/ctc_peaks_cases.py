"""The two kernels of `ctc_peaks`: paths of 32 frames and of 30 seconds and more, both rules."""

from soundwave.kernels.ctc_peaks import COPY_BLOCK, NUM_WARPS, _config, _ctc_peaks_kernel, _pack_frames_kernel


def cases(arch, Case):
    for size in (32, 750, 5000):
        for peaks in (True, False):
            # Without scores the path is passed in their place and not read.
            pointers = {"PATH": "*i64", "LENGTHS": "*i64", "SCORES": "*fp32" if peaks else "*i64"}
            pointers |= {"FRAMES": "*i64", "COUNTS": "*i32"}
            yield Case(
                f"T{size} {'peaks' if peaks else 'runs'}",
                _ctc_peaks_kernel,
                pointers | {"T": "i32", "PATH_STRIDE": "i32", "SCORES_STRIDE": "i32", "BLANK": "i32"},
                {"PEAKS": peaks, "BLOCK_T": _config(size)},
                NUM_WARPS,
                divisible_by_16=tuple(pointers),
            )
    pointers = {"FRAMES": "*i64", "CU_SEQLENS": "*i32", "INDEX": "*i64"}
    constexprs = {"BLOCK": COPY_BLOCK}
    yield Case("any", _pack_frames_kernel, pointers | {"T": "i32"}, constexprs, NUM_WARPS, 2, tuple(pointers))

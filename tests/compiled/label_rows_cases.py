"""The two passes over frames of `label_rows`: few labels, those of 30 seconds, and more than one block of them; and the
losses of utterances.
"""

from soundwave.kernels.label_rows import LOSS_BLOCK, _config, _label_gradient_kernel, _label_path_kernel, _loss_kernel


def cases(arch, Case):
    for dtype in ("fp32", "fp64"):
        values = {name: f"*{dtype}" for name in ("NLL", "FACTOR", "LOSS", "SCALE")}
        others = {"FEASIBLE": "*i1", "WRONG": "*i1", "DIVISOR": "*i64", "ALIGNED": "*i1"}
        yield Case(
            dtype, _loss_kernel, {name: (values | others)[name] for name in _loss_kernel.arg_names[:8]} | {"B": "i32"},
            {"ZERO_INFINITY": True, "MEAN": True, "CHECKED": True, "BLOCK": LOSS_BLOCK}, 1,
            divisible_by_16=(*values, "WRONG", "ALIGNED"),
        )  # fmt: skip
        for columns in (17, 81, 300, 2000):
            block, warps = _config(columns)
            ids = {"LENGTHS": "*i64", "STARTS": "*i64"}
            pointers = {"LABEL_LOGITS": f"*{dtype}", "LABELS": "*i64"} | ids
            pointers |= {"MAXIMUM": f"*{dtype}", "ARGMAX": "*i64", "LOG_SUM": f"*{dtype}"}
            pointers |= {"PATH": "*i64", "PATH_LOG_PROB": f"*{dtype}", "LOG_PROBS": f"*{dtype}"}
            name = f"{dtype} C{columns}"
            yield Case(
                name, _label_path_kernel, pointers | {"T": "i32", "C": "i32"}, {"BLOCK": block}, warps,
                divisible_by_16=tuple(pointers),
            )  # fmt: skip
            pointers = {"LOG_PROBS": f"*{dtype}", "POSTERIORS": f"*{dtype}", "ALIGNED": "*i1"} | ids
            pointers |= {"OFF_LABEL_MASS": f"*{dtype}", "OUT": f"*{dtype}"}
            yield Case(
                name, _label_gradient_kernel, pointers | {"B": "i32", "T": "i32", "C": "i32"}, {"BLOCK": block}, warps,
                divisible_by_16=tuple(pointers),
            )  # fmt: skip

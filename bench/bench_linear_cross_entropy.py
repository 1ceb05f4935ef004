"""The next-token loss: hidden [N, D], a head [V, D] and targets [N] -> the loss and the gradient of hidden; in the case
"trained head" also the gradient of the head.

The peers are torch's own chunked `F.linear_cross_entropy` (since torch 2.13), Liger and cut-cross-entropy. The
definition needs two products over the vocabulary, or three if the head is trained.
"""

import pytest
import torch
from torch.nn import functional as F

from bench import shapes
from bench.contenders import compiled, plain
from bench.race import Absent, Operation, Problem
from soundwave import eager
from soundwave.fused import functional


def problem(case: shapes.Case, device: torch.device) -> Problem:
    weight = shapes.make_head(case.V, case.D, case.dtype, device).requires_grad_(case.trained_head)

    def inputs(seed: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(case.N, case.D, generator=generator).to(device, case.dtype).requires_grad_()
        return hidden, torch.randint(case.V, (case.N,), generator=generator).to(device)

    def reference(hidden, target):
        return eager.linear_cross_entropy(hidden, weight, target)

    def ours(impl):
        return lambda hidden, target: functional.linear_cross_entropy(hidden, weight, target, impl=impl)

    def torch_chunked():
        if not hasattr(F, "linear_cross_entropy"):
            raise Absent(f"torch {torch.__version__} has no F.linear_cross_entropy")
        # By torch's own words its default is 20 to 50 times slower on a CPU in float32.
        chunked = {"acc_policy": "accurate", "chunking_method": "aspect_ratio"} if device.type == "cpu" else {}
        options = torch.nn.LinearCrossEntropyOptions(**chunked)
        return lambda hidden, target: F.linear_cross_entropy(hidden, weight, target, options=options)

    def liger():
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return lambda hidden, target: liger_fused_linear_cross_entropy(hidden, weight, target)

    def cut():
        from cut_cross_entropy import linear_cross_entropy

        return lambda hidden, target: linear_cross_entropy(hidden, weight, target)

    makers = {
        "eager": plain(reference),
        "compiled": compiled(reference),
        "torch-chunked": torch_chunked,
        "liger": liger,
        "cut-cross-entropy": cut,
        "ours-torch": plain(ours("torch")),
        "ours-triton": plain(ours("triton")),
    }
    products = 3 if case.trained_head else 2
    moved = case.dtype.itemsize * (2.0 * case.N * case.D + products * case.V * case.D)
    return Problem(
        inputs,
        makers,
        parameters={name: [weight] for name in makers},
        flops={"both": products * 2.0 * case.N * case.V * case.D},
        bytes={"both": moved},
    )


LINEAR_CROSS_ENTROPY = Operation(
    "linear_cross_entropy",
    shapes.linear_cross_entropy,
    problem,
    ("eager", "compiled", "torch-chunked", "liger", "cut-cross-entropy", "ours-torch", "ours-triton"),
    needs={
        "liger": ("cuda", "liger_kernel"),
        "cut-cross-entropy": ("cuda", "cut_cross_entropy"),
        "ours-triton": ("cuda",),
    },
)


@pytest.mark.operation(LINEAR_CROSS_ENTROPY)
def test_linear_cross_entropy(race):
    race()

"""CTC over given log-probabilities: [T, B, V] -> the loss, and its gradient.

Eager is torch's native kernels. The peers are cuDNN's CTC (int32 targets and lengths on the CPU) and FlagGems' Triton
CTC. Only the losses are compared: torch's gradient is right only behind a log-softmax, while ours is the gradient of
the given log-probabilities. The roof is the copy: log-probabilities are read once and their gradient is written once.
"""

import pytest
import torch
from torch.nn import functional as F

from bench import shapes
from bench.contenders import compiled, plain
from bench.race import Absent, Operation, Problem
from soundwave.fused import functional


def problem(case: shapes.Case, device: torch.device) -> Problem:
    blank = 0
    frames = shapes.lengths(case.B, case.T, case.lengths)
    labels = torch.full((case.B,), case.U)
    targets = torch.randint(1, case.V, (case.B, case.U), generator=torch.Generator().manual_seed(0))

    def inputs(seed: int) -> tuple:
        logits = torch.randn(case.T, case.B, case.V, generator=torch.Generator().manual_seed(seed)).to(device)
        return (logits.log_softmax(-1).requires_grad_(),)

    placed = targets.to(device)

    def eager(log_probs):
        return F.ctc_loss(log_probs, placed, frames, labels, blank)

    def cudnn():
        if case.U > 255:  # With more torch silently uses its own kernels.
            raise Absent(f"cuDNN's CTC takes at most 255 labels, and U = {case.U}")
        of_cudnn = targets.flatten().int(), frames.int(), labels.int()

        def run(log_probs):
            with torch.backends.cudnn.flags(enabled=True, deterministic=True):
                return F.ctc_loss(log_probs, *of_cudnn, blank)

        return run

    def flag_gems():
        from flag_gems import ops

        function = getattr(ops, "ctc_loss", None)
        if not callable(function):
            raise Absent("the installed flag_gems has no CTC")
        on_device = placed, frames.to(device), labels.to(device)
        return lambda log_probs: function(log_probs, *on_device, blank)

    def ours(impl):
        return lambda log_probs: functional.ctc_loss(log_probs, placed, frames, labels, blank, impl=impl)

    matrix = 4.0 * case.B * case.T * case.V
    return Problem(
        inputs,
        {
            "eager": plain(eager),
            "compiled": compiled(eager),
            "cudnn": cudnn,
            "flag-gems": flag_gems,
            "ours-torch": plain(ours("torch")),
            "ours-triton": plain(ours("triton")),
        },
        bytes={"forward": matrix, "backward": matrix, "both": 2 * matrix},
        same_gradients=False,
    )


CTC = Operation(
    "ctc",
    shapes.ctc,
    problem,
    ("eager", "compiled", "cudnn", "flag-gems", "ours-torch", "ours-triton"),
    needs={
        "cudnn": ("cuda",),
        "flag-gems": ("cuda", "flag_gems"),
        "ours-triton": ("cuda",),
    },
)


@pytest.mark.operation(CTC)
def test_ctc(race):
    race()

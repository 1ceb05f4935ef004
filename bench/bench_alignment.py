"""The alignment adapter: Whisper's frames [B, 2·T, E] -> hidden states [B, T, D], and the gradients of its parameters.

Ours packs the rows and attends through `soundwave.attention`: with flash-attn if that is installed, else with torch's
own FlashAttention. "ours-flash-attn", "ours-varlen" and "ours-sdpa" use the attention that they name. The results for
frames of padding are not compared. The operations of the definition are counted over valid frames, so padding costs
time but does not count as work.
"""

import pytest
import torch

from bench import shapes
from bench.contenders import compiled, plain
from bench.race import Operation, Problem
from soundwave import SoundwaveConfig, eager, fused


def problem(case: shapes.Case, device: torch.device) -> Problem:
    config = SoundwaveConfig(
        audio_hidden_size=case.E, hidden_size=case.D, num_attention_heads=case.H, adapter_dropout=0.0
    )
    frames = 2 * shapes.lengths(case.B, case.T, case.lengths)
    reference = eager.AlignmentAdapter(config).to(device, case.dtype)
    makers, parameters = {}, {}

    def add(name, make):
        """Add a contender. `make` returns a function whose parameters are the reference's."""
        makers[name], parameters[name] = make, list(reference.parameters())

    def fused_adapter(**options):
        def make():
            module = fused.AlignmentAdapter(config, **options).to("meta")
            module.load_state_dict(reference.state_dict(keep_vars=True), assign=True)
            return lambda x: module(x, frames)

        return make

    def on_device(x):
        return reference(x, frames.to(device))

    add("eager", plain(on_device))
    add("compiled", compiled(on_device))
    add("ours-torch", fused_adapter(impl="torch"))
    add("ours-triton", fused_adapter(impl="triton"))
    add("ours-flash-attn", fused_adapter(impl="triton", attention="flash_attn"))
    add("ours-varlen", fused_adapter(impl="triton", attention="varlen"))
    add("ours-sdpa", fused_adapter(impl="triton", attention="sdpa"))

    def inputs(seed: int) -> tuple:
        made = torch.randn(case.B, 2 * case.T, case.E, generator=torch.Generator().manual_seed(seed))
        return (made.to(device, case.dtype),)

    rows = shapes.lengths(case.B, case.T, case.lengths).double()
    weights = sum(p.numel() for name, p in reference.named_parameters() if p.dim() == 2)
    # Two operations for each weight and row; for each pair of frames the score and its product with the value.
    forward = float(2 * rows.sum() * weights + 4 * (rows**2).sum() * case.D)
    first = float(2 * rows.sum() * 2 * case.E * case.D)  # The frozen encoder's frames need no gradient.
    moved = case.dtype.itemsize * (weights + float(rows.sum()) * (2 * case.E + case.D))
    return Problem(
        inputs,
        makers,
        parameters,
        flops={"forward": forward, "backward": 2 * forward - first, "both": 3 * forward - first},
        bytes={"forward": moved, "backward": 2 * moved, "both": 3 * moved},
        counts=eager.length_mask(frames // 2, case.T)[..., None].to(device),
    )


ALIGNMENT = Operation(
    "alignment",
    shapes.alignment,
    problem,
    ("eager", "compiled", "ours-torch", "ours-triton", "ours-flash-attn", "ours-varlen", "ours-sdpa"),
    needs={
        "ours-triton": ("cuda",),
        "ours-flash-attn": ("cuda", "flash_attn"),
        "ours-varlen": ("cuda",),
        "ours-sdpa": ("cuda",),
    },
)


@pytest.mark.operation(ALIGNMENT)
def test_alignment(race):
    race()

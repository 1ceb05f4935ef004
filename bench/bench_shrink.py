"""The shrinking adapter, and its attention alone.

In the attention, packed queries of the kept frames attend to packed keys of each clip's frames. Eager is
`scaled_dot_product_attention` with a mask over rows that are padded beforehand. The peers are flash-attn and torch's
own FlashAttention, both packed.

Where the kept frames are the only keys, the module has one more peer: the method of the released code, written here
from its description. It handles one utterance after the other, pads its kept frames with zeros to the number of all
frames of 30 s, projects and attends over them with the padding masked, and keeps the rows of the kept frames.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench import shapes
from bench.contenders import compiled, plain
from bench.race import Absent, Operation, Problem
from soundwave import SoundwaveConfig, eager, fused
from soundwave.attention import attend, choose_attention
from soundwave.fused import functional


def bounds(lengths: Tensor, device: torch.device) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)


def attention_problem(case: shapes.Case, device: torch.device) -> Problem:
    frames = shapes.lengths(case.B, case.T, case.lengths)
    kept = shapes.kept_frames(frames)
    keys = kept if case.keys == "kept" else frames
    cu_q, cu_k, longest_q, longest_k = bounds(kept, device), bounds(keys, device), int(kept.max()), int(keys.max())
    size = case.D // case.H

    def inputs(seed: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)

        def rows(count: Tensor) -> Tensor:
            made = torch.randn(int(count), case.H, size, generator=generator)
            return made.to(device, case.dtype).requires_grad_()

        return rows(kept.sum()), rows(keys.sum()), rows(keys.sum())

    # Padded once, outside the timing: eager does not pay for its layout, and its inputs are the same in every round.
    mask = eager.length_mask(keys, longest_k).to(device)[:, None, None, :]
    padded = [
        torch.randn(case.B, case.H, longest, size, generator=torch.Generator().manual_seed(0))
        .to(device, case.dtype)
        .requires_grad_()
        for longest in (longest_q, longest_k, longest_k)
    ]

    def reference(*_):
        return F.scaled_dot_product_attention(*padded, attn_mask=None if bool(keys.eq(longest_k).all()) else mask)

    def packed(impl):
        def make():
            try:
                choose_attention(impl, device=device, dtype=case.dtype, head_size=size)
            except ValueError as error:
                raise Absent(str(error)) from None
            return lambda q, k, v: attend(q, k, v, cu_q, cu_k, longest_q, longest_k, impl=impl)

        return make

    def ours(impl):
        return lambda q, k, v: functional.shrink_attention(q, k, v, cu_q, cu_k, longest_q, longest_k, impl=impl)

    pairs = float((kept.double() * keys).sum()) * case.D
    moved = float(case.dtype.itemsize * 2 * case.D * (kept.sum() + keys.sum()))  # q, k, v and the result
    return Problem(
        inputs,
        {
            "eager": plain(reference),
            "compiled": compiled(reference),
            "flash-attn": packed("flash_attn"),
            "varlen": packed("varlen"),
            "ours-torch": plain(ours("torch")),
            "ours-triton": plain(ours("triton")),
        },
        parameters={"eager": padded, "compiled": padded},
        flops={"forward": 4 * pairs, "backward": 8 * pairs, "both": 12 * pairs},
        bytes={"forward": moved, "backward": 2 * moved, "both": 3 * moved},
        # Their inputs are packed, and other than eager's.
        different=("flash-attn", "varlen", "ours-torch", "ours-triton"),
    )


def released_loop(adapter: eager.ShrinkingAdapter, hidden: Tensor, peaks: eager.Peaks, frames: int) -> Tensor:
    """The shrunk frames [K, D], one utterance after the other; its kept frames, padded to `frames`, are the keys."""
    width, heads = hidden.shape[2], adapter.num_heads
    rows, out = hidden.reshape(-1, width), []
    for start, end in zip(peaks.cu_seqlens[:-1].tolist(), peaks.cu_seqlens[1:].tolist(), strict=True):
        kept = F.pad(rows[peaks.index[start:end]], (0, 0, 0, frames - (end - start)))
        query, key, value = (
            part.view(1, frames, heads, width // heads).transpose(1, 2)
            for part in F.linear(kept, adapter.in_proj_weight, adapter.in_proj_bias).chunk(3, dim=-1)
        )
        mask = torch.arange(frames, device=hidden.device) < end - start
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[None, None, None, :])
        attended = attended.transpose(1, 2).reshape(frames, width)
        out.append(adapter.norm(kept + adapter.out_proj(attended))[: end - start])
    return torch.cat(out)


def module_problem(case: shapes.Case, device: torch.device) -> Problem:
    config = SoundwaveConfig(hidden_size=case.D, num_attention_heads=case.H, keys=case.keys)
    frames = shapes.lengths(case.B, case.T, case.lengths)
    kept = shapes.kept_frames(frames)
    path, scores = shapes.planted_path(frames, case.D, case.D, device)
    peaks = eager.ctc_peaks(path, frames, blank=case.D, scores=scores)
    reference = eager.ShrinkingAdapter(config).to(device, case.dtype)

    def inputs(seed: int) -> tuple:
        made = torch.randn(case.B, case.T, case.D, generator=torch.Generator().manual_seed(seed))
        return (made.to(device, case.dtype).requires_grad_(),)

    def padded(hidden):
        return reference(hidden, frames.to(device), peaks)

    def ours(impl):
        def make():
            module = fused.ShrinkingAdapter(config, impl=impl).to("meta")
            module.load_state_dict(reference.state_dict(keep_vars=True), assign=True)
            return lambda hidden: module(hidden, frames, peaks)

        return make

    def loop():
        if case.keys != "kept":
            raise Absent("it knows the kept frames only as keys; see the case with these keys")
        return lambda hidden: released_loop(reference, hidden, peaks, case.T)

    makers = {
        "eager": plain(padded),
        "compiled": compiled(padded),
        "released-loop": loop,
        "ours-torch": ours("torch"),
        "ours-triton": ours("triton"),
    }
    keys = kept if case.keys == "kept" else frames
    projections = 2.0 * case.D**2 * float(2 * kept.sum() + 2 * keys.sum())  # query and output, key and value
    pairs = float((kept.double() * keys).sum()) * case.D
    moved = case.dtype.itemsize * (4.0 * case.D**2 + case.D * float(keys.sum() + kept.sum()))
    return Problem(
        inputs,
        makers,
        parameters={name: list(reference.parameters()) for name in makers},
        flops={
            "forward": projections + 4 * pairs,
            "backward": 2 * projections + 8 * pairs,
            "both": 3 * projections + 12 * pairs,
        },
        bytes={"forward": moved, "backward": 2 * moved, "both": 3 * moved},
    )


SHRINK_ATTENTION = Operation(
    "shrink_attention",
    shapes.shrink,
    attention_problem,
    ("eager", "compiled", "flash-attn", "varlen", "ours-torch", "ours-triton"),
    needs={"flash-attn": ("cuda", "flash_attn"), "varlen": ("cuda",), "ours-triton": ("cuda",)},
)
SHRINK = Operation(
    "shrink",
    shapes.shrink,
    module_problem,
    ("eager", "compiled", "released-loop", "ours-torch", "ours-triton"),
    needs={"ours-triton": ("cuda",)},
)


@pytest.mark.operation(SHRINK_ATTENTION)
def test_shrink_attention(race):
    race()


@pytest.mark.operation(SHRINK)
def test_shrink(race):
    race()

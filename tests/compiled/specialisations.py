"""Which kernels a training of batches of varying lengths makes Triton compile: prints them as JSON, and when.

Triton compiles a kernel anew for each key: the types of the arguments, which integers are 1 or divisible by 16, which
addresses are multiples of 16, the constants and the launch options. All launches of the fused operations are taken
here, and their keys computed by Triton's own code; nothing is compiled and nothing runs. Only the results that decide
the shapes of what follows, which frames are kept, are filled in. Widths are small, but divisible as real ones are.

Usage: specialisations.py BATCHES
"""

import json
import random
import sys
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction, compute_cache_key

from soundwave import fused
from soundwave.data.sampling import BucketBatchSampler
from soundwave.fused import functional
from soundwave.kernels import vocab_rows

CLIPS = 16  # a batch
SECONDS = (2.0, 30.0)
WIDTH, HEADS, ENCODER_WIDTH, ROWS = 32, 2, 16, 64
CONFIG = SimpleNamespace(
    audio_hidden_size=ENCODER_WIDTH, hidden_size=WIDTH, num_attention_heads=HEADS, frame_stack=2, attend="self",
    adapter_dropout=0.0, layer_norm_eps=1e-5, keys="all",
)  # fmt: skip


class Driver:
    """What the launch of a kernel asks of a GPU, for tensors on the CPU."""

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))


def keep_some_frames(LENGTHS, FRAMES, COUNTS, **_):
    """For `ctc_peaks`: every third frame. FRAMES [B, T] are rows of the B·T."""
    size = FRAMES.shape[1]
    COUNTS.copy_(((LENGTHS + 2) // 3).clamp(min=1))
    FRAMES.copy_(torch.arange(len(FRAMES))[:, None] * size + torch.arange(size) * 3)


def pack_them(FRAMES, CU_SEQLENS, INDEX, **_):
    INDEX.copy_(torch.cat([row[:count] for row, count in zip(FRAMES, CU_SEQLENS.diff().tolist(), strict=True)]))


RESULTS = {"_ctc_peaks_kernel": keep_some_frames, "_pack_frames_kernel": pack_them}


class Keys:
    """In the place of `JITFunction.run`: collects (kernel, key) with the number of the batch of its first launch."""

    def __init__(self) -> None:
        self.first: dict[tuple[str, str], int] = {}
        self.launches, self.batch = 0, 0

    def run(self, kernel: JITFunction, args, options) -> None:
        _, seen, _, _, bind = kernel.device_caches[0]
        bound, specialization, options = bind(*args, **options)
        key = compute_cache_key(seen, specialization, options)
        self.launches += 1
        self.first.setdefault((kernel.__name__, key), self.batch)
        RESULTS.get(kernel.__name__, lambda **_: None)(**bound)


def batches(count: int):
    """(seconds of each clip, number of its labels), as the sampler makes batches: clips of similar length together."""
    rng = random.Random(0)
    seconds = [rng.uniform(*SECONDS) for _ in range(CLIPS * count)]
    labels = [max(1, round(s * rng.uniform(2.0, 4.0))) for s in seconds]
    for batch in BucketBatchSampler(seconds, [""] * len(seconds), CLIPS):
        yield [seconds[i] for i in batch], [labels[i] for i in batch]


def stage_one(adapter, head, seconds, labels) -> None:
    """One micro-batch: alignment adapter, linear CTC with an extra blank, backward."""
    lengths, counts = torch.tensor([int(50 * s) for s in seconds]), torch.tensor(labels)
    hidden, lengths = adapter(torch.zeros(len(seconds), int(lengths.max()), ENCODER_WIDTH), lengths)
    targets = torch.randint(ROWS, (len(labels), max(labels)))
    functional.linear_ctc_loss(
        hidden, head, targets, lengths, counts, blank=ROWS, blank_weight=torch.zeros(WIDTH, requires_grad=True),
        blank_bias=torch.zeros((), requires_grad=True), zero_infinity=True, exact=False, impl="triton",
    ).loss.backward()  # fmt: skip


def stage_two(adapter, shrinking, head, seconds, labels) -> None:
    """One micro-batch: adapters, peaks, splice, cross-entropy of the answers, backward."""
    lengths = torch.tensor([int(50 * s) for s in seconds])
    hidden, lengths = adapter(torch.zeros(len(seconds), int(lengths.max()), ENCODER_WIDTH), lengths)
    blank = {"blank": ROWS, "blank_weight": torch.zeros(WIDTH), "blank_bias": torch.zeros(())}
    path, scores = functional.linear_ctc_path(hidden.detach(), head, lengths, **blank, impl="triton")
    peaks = functional.ctc_peaks(path, lengths, blank=ROWS, scores=scores, impl="triton")
    speech = shrinking(hidden, lengths, peaks)
    text = torch.zeros(len(labels), 20 + max(labels), dtype=torch.int64)
    text[:, 3] = ROWS
    spliced = functional.splice(
        torch.zeros(*text.shape, WIDTH), text, torch.ones_like(text), speech, peaks.cu_seqlens,
        audio_placeholder_id=ROWS, impl="triton",
    )  # fmt: skip
    rows = spliced[0].flatten(0, 1)[: sum(labels)]
    functional.linear_cross_entropy(
        rows, head, torch.randint(ROWS, (len(rows),)), reduction="sum", exact=True, impl="triton"
    ).backward()


def options_of_cross_entropy(head, seconds, labels) -> None:
    """The next-token loss of as many rows as there are labels, and lse, with every option and a trained head."""
    rows, bias = torch.zeros(sum(labels), WIDTH, requires_grad=True), torch.zeros(ROWS, requires_grad=True)
    loss, lse = functional.linear_cross_entropy(
        rows, head, torch.randint(ROWS, (len(rows),)), bias=bias, class_weight=torch.ones(ROWS), label_smoothing=0.1,
        softcap=30.0, z_loss=1e-4, return_lse=True, impl="triton",
    )  # fmt: skip
    (loss + lse.sum()).backward()


def main(count: int) -> None:
    torch.manual_seed(0)
    driver.set_active(Driver())
    vocab_rows.CHUNK_ROWS_CPU = 1024  # as on a GPU with 128 k columns
    keys = Keys()
    JITFunction.run = lambda kernel, *args, grid, warmup, **options: keys.run(kernel, args, options)
    adapter, head = fused.AlignmentAdapter(CONFIG, impl="triton"), torch.zeros(ROWS, WIDTH)
    shrinking = fused.ShrinkingAdapter(CONFIG, impl="triton")
    stages = {
        "I": lambda *batch: stage_one(adapter, head, *batch),
        "II": lambda *batch: stage_two(adapter, shrinking, head, *batch),
        "cross-entropy": lambda *batch: options_of_cross_entropy(head.requires_grad_(), *batch),
    }
    for stage, step in stages.items():
        before, keys.launches = set(keys.first), 0
        for keys.batch, batch in enumerate(batches(count), 1):
            step(*batch)
        new = [(name, at) for (name, key), at in keys.first.items() if (name, key) not in before]
        print(json.dumps({"stage": stage, "launches": keys.launches, "kernels": new}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))

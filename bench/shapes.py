"""The shapes of the benches and the generators of their inputs.

There are three sizes of the same cases:

| size   | what                                                                                   | for                |
|--------|----------------------------------------------------------------------------------------|--------------------|
| `cuda` | Soundwave at Whisper-large-v3 and Llama-3.1-8B, clips of up to 30 s, bfloat16          | a GPU              |
| `cpu`  | the embedded default's widths, clips of up to 5 s, float32                             | two CPU cores      |
| `tiny` | the same rules on a few rows                                                           | tests of the bench |

Dimension letters: B utterances, T frames of the longest one (25 per second, after the alignment adapter), D width of
the hidden states, E width of the encoder, H heads, V rows of the head, U labels, N rows of hidden states.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from soundwave.memory import LLAMA_8B_WHISPER_LARGE, Dims

SIZES = ("cuda", "cpu", "tiny")
FRAMES_PER_SECOND = 25  # after the alignment adapter; the encoder has twice, log-mel four times as many
KEPT_PER_SECOND = 3  # kept frames; about as many sub-words as speech has
CONFUSABLE = 20  # tokens per row that a trained head also finds possible, in "peaky" logits
PEAK_LOGIT, CONFUSABLE_LOGITS = 24.0, (17.0, 21.0)  # logits of the planted label and of these; others are around 0
RIDGE = 0.01  # added to the products of rows of norm 1, because a token may be drawn twice
BLANK_SHARE = 0.7  # share of blank frames, after each label; smaller if a label has fewer than three frames
SHORTEST = 0.1  # length of the shortest clip of the mixture, relative to the longest: 3 of 30 s

DIMS = {
    "cuda": LLAMA_8B_WHISPER_LARGE,
    # Whisper tiny, and SmolLM2-135M with 4 of its 30 layers
    "cpu": Dims(
        mels=80, audio_width=384, audio_layers=4, audio_heads=6, audio_mlp=1536, audio_positions=1500,
        width=576, layers=4, heads=9, kv_heads=3, mlp=1536, vocab=49_152,
    ),
    "tiny": Dims(
        mels=80, audio_width=32, audio_layers=1, audio_heads=2, audio_mlp=128, audio_positions=1500,
        width=64, layers=1, heads=4, kv_heads=2, mlp=128, vocab=512, lora_rank=4,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """The sizes of a case. Sizes that an operation does not use are 0."""

    name: str
    dtype: torch.dtype
    B: int = 0
    T: int = 0
    D: int = 0
    V: int = 0
    U: int = 0
    E: int = 0
    H: int = 0
    N: int = 0
    lengths: str = "equal"  # or "mixture"
    logits: str = "random"  # or "peaky"
    trained_head: bool = False
    keys: str = "all"
    new_tokens: int = 0
    stage: int = 0
    size: str = ""  # key of `DIMS`, for whole models
    over: str = ""  # the letter along which a growth curve runs, or ""

    def shape(self) -> dict[str, int]:
        return {letter: value for letter in "BTDVUEHN" if (value := getattr(self, letter))}


# ---------------------------------------------------------------- lengths


def lengths(batch: int, longest: int, kind: str) -> Tensor:
    """Lengths int64 [B]: all `longest` ("equal"), or those of a mixture of clips ("mixture").

    The mixture is log-uniform from a tenth of the longest (3 s of 30 s) to the longest itself: half of the clips are
    shorter than a third of it. With 4 clips or more the mean is at most 0.45 of the longest.
    """
    if kind == "equal":
        return torch.full((batch,), longest)
    if batch < 4:
        raise ValueError(f"batch = {batch}, but a mixture needs at least 4 clips for a mean of 0.45 of the longest")
    steps = torch.arange(batch, dtype=torch.float64) / (batch - 1)
    return (longest * SHORTEST ** (1 - steps)).round().long().flip(0)


def kept_frames(frame_lengths: Tensor) -> Tensor:
    """Number of kept frames of each clip, int64 [B], at `KEPT_PER_SECOND`."""
    return (frame_lengths * KEPT_PER_SECOND // FRAMES_PER_SECOND).clamp(min=1)


def planted_path(frame_lengths: Tensor, blank: int, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A CTC path [B, T] whose peaks are single frames at equal distances (`kept_frames`), and its log-probabilities."""
    size = int(frame_lengths.max())
    path = torch.full((len(frame_lengths), size), blank)
    for row, (length, kept) in enumerate(zip(frame_lengths.tolist(), kept_frames(frame_lengths).tolist(), strict=True)):
        path[row, torch.arange(kept) * length // kept] = torch.arange(kept) % vocabulary
        path[row, length:] = -1
    return path.to(device), torch.full(path.shape, -0.1, device=device)


# ---------------------------------------------------------------- logits


def make_head(vocabulary: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A head [V, D] whose rows have norm 1 on average, like that of a model with normed hidden states."""
    generator = torch.Generator(device).manual_seed(1_000_000)  # With a seed of `utterances` the blank would be row 0.
    return torch.randn(vocabulary, width, generator=generator, device=device, dtype=dtype).mul_(width**-0.5)


class Utterances(NamedTuple):
    """Inputs of linear CTC: hidden [B, T, D], targets int64 [B, U], lengths int64 [B], the blank's row [D] and bias."""

    hidden: Tensor
    targets: Tensor
    input_lengths: Tensor
    target_lengths: Tensor
    blank_weight: Tensor
    blank_bias: Tensor


def utterances(case: Case, weight: Tensor, seed: int = 0) -> Utterances:
    """Hidden states and targets for a head `weight` [V, D].

    "random", as before training: the states are Gaussian, so every logit is a standard Gaussian and every column of the
    vocabulary has some probability. "peaky", as after training: each state is a linear combination of rows of the head.
    It gives a planted label (the blank on `BLANK_SHARE` of the frames) the logit `PEAK_LOGIT`, and `CONFUSABLE` random
    tokens logits within `CONFUSABLE_LOGITS`; the logits of all other tokens are around 0. Labels are planted in the
    order of the targets.
    """
    device, generator = weight.device, torch.Generator().manual_seed(seed)
    rows, width = weight.shape
    blank_weight = torch.randn(width, generator=generator).mul_(width**-0.5).to(device)
    frames = lengths(case.B, case.T, case.lengths)
    labels = (frames * case.U // case.T).clamp(min=1)
    targets = torch.randint(rows, (case.B, case.U), generator=generator)
    if case.logits == "random":
        hidden = torch.randn(case.B, case.T, width, generator=generator).to(device, weight.dtype)
        bias = torch.tensor(float(rows)).log()  # near the log-sum-exp of the head, as at the start of training
    else:
        hidden = _peaky(case, weight, blank_weight, targets, frames, labels, generator)
        bias = torch.zeros(())
    return Utterances(hidden, targets.to(device), frames, labels, blank_weight, bias.to(device))


def _peaky(
    case: Case,
    weight: Tensor,
    blank_weight: Tensor,
    targets: Tensor,
    frames: Tensor,
    labels: Tensor,
    generator: torch.Generator,
) -> Tensor:
    position = torch.arange(case.T)[None] * labels[:, None] / frames[:, None]  # counted in labels
    planted = targets.gather(1, position.long().clamp(max=case.U - 1))
    own_share = (labels / frames).clamp(min=1 - BLANK_SHARE)  # At least the first frame of a label is not blank.
    is_blank = position % 1 >= own_share[:, None]
    others = torch.randint(weight.shape[0], (case.B, case.T, CONFUSABLE), generator=generator)
    low, high = CONFUSABLE_LOGITS
    wanted = torch.rand(case.B, case.T, 1 + CONFUSABLE, generator=generator) * (high - low) + low
    wanted[..., 0] = PEAK_LOGIT
    device = weight.device
    hidden = torch.empty(case.B, case.T, weight.shape[1], device=device, dtype=weight.dtype)
    for row in range(case.B):  # one at a time: the gathered rows are twenty times as large as the states
        own = torch.where(is_blank[row, :, None].to(device), blank_weight, weight[planted[row].to(device)].float())
        rows = torch.cat([own[:, None], weight[others[row].to(device)].float()], 1)
        products = rows @ rows.mT + RIDGE * torch.eye(1 + CONFUSABLE, device=device)
        mixture = torch.linalg.solve(products, wanted[row].to(device))
        hidden[row] = torch.einsum("tc,tcd->td", mixture, rows).to(weight.dtype)
    return hidden


# ---------------------------------------------------------------- cases


def _grow(base: Case, **axes: tuple[int, ...]) -> list[Case]:
    """The points of the growth curves: copies of `base` in each of which one size is replaced."""
    return [
        replace(base, name=f"{letter} {value}{', peaky' * (base.logits == 'peaky')}", over=letter, **{letter: value})
        for letter, values in axes.items()
        for value in values
    ]


def ctc(size: str) -> list[Case]:
    """Ordinary CTC over given log-probabilities of characters, sub-words, and a large vocabulary of sub-words."""
    dtype = torch.float32
    sizes = {"cuda": (32, 1000, 100), "cpu": (8, 250, 25), "tiny": (4, 20, 4)}
    B, T, U = sizes[size]
    main = [Case(f"V {V}", dtype, B=B, T=T, V=V, U=U) for V in ((32, 500, 5000) if size != "tiny" else (32,))]
    base = Case("", dtype, B=B, T=T, V=500, U=U)
    if size == "tiny":
        return [*main, *_grow(replace(base, V=32), T=(10, 20))]
    return [
        *main,
        *_grow(base, T=(T // 4, T // 2, T, 2 * T), B=(B // 4, B // 2, B, 2 * B), U=(U // 4, U, 2 * U, 4 * U)),
    ]


def linear_ctc(size: str) -> list[Case]:
    """A frozen head, log-softmax and CTC over the vocabulary of an LLM."""
    if size == "tiny":
        base = Case("", torch.float32, B=4, T=20, D=64, V=512, U=4)
        return [replace(base, name="random"), replace(base, name="peaky", logits="peaky"), *_grow(base, V=(256, 512))]
    if size == "cpu":
        base = Case("", torch.float32, B=2, T=250, D=1024, V=128_256, U=25)
        small = replace(base, B=2, T=100, D=256, V=16_384, U=10, logits="peaky")
        growth = _grow(small, T=(50, 100, 200), V=(4096, 8192, 16_384, 32_768), B=(1, 2, 4), U=(5, 10, 40))
        return [replace(base, name="random"), replace(base, name="peaky", logits="peaky"), *growth]
    base = Case("", torch.bfloat16, B=16, T=750, D=4096, V=128_256, U=80, logits="peaky")
    growth = _grow(base, T=(188, 375, 750), V=(16_032, 32_064, 64_128, 128_256), B=(4, 8, 16), U=(20, 80, 320))
    return [
        replace(base, name="random", logits="random"),
        replace(base, name="peaky"),
        replace(base, name="peaky mixture", lengths="mixture"),
        *growth,
    ]


def linear_cross_entropy(size: str) -> list[Case]:
    """The next-token loss over N rows. The head is frozen, as in every stage of Soundwave, or trained, as elsewhere."""
    N, D, V, dtype = {
        "cuda": (4096, 4096, 128_256, torch.bfloat16),
        "cpu": (256, 576, 24_576, torch.float32),
        "tiny": (24, 64, 512, torch.float32),
    }[size]
    base = Case("frozen head", dtype, N=N, D=D, V=V)
    growth = _grow(
        base if size == "cuda" else replace(base, N=N // 2, V=V // 4), N=(N // 4, N // 2, N), V=(V // 8, V // 4, V // 2)
    )
    return [base, replace(base, name="trained head", trained_head=True), *(growth if size != "tiny" else growth[:2])]


def _clips(size: str, batch: int = 0, dtype: torch.dtype | None = None) -> list[Case]:
    """All clips of the longest length, and the mixture."""
    dims = DIMS[size]
    B, seconds = {"cuda": (16, 30), "cpu": (4, 5), "tiny": (4, 1)}[size]
    base = Case(
        f"all {seconds} s",
        dtype or (torch.bfloat16 if size == "cuda" else torch.float32),
        B=batch or B,
        T=seconds * FRAMES_PER_SECOND,
        D=dims.width,
        E=dims.audio_width,
        H=dims.heads,
        size=size,
    )
    name = f"{seconds * SHORTEST:g} to {seconds} s"
    return [base, replace(base, name=name, lengths="mixture")]


def shrink(size: str) -> list[Case]:
    """The shrinking adapter; one case has the kept frames as the only keys, like the released code."""
    cases = _clips(size)
    return [*cases, replace(cases[0], name=f"{cases[0].name}, keys kept", keys="kept")]


def alignment(size: str) -> list[Case]:
    """The alignment adapter, and how it grows with T and B."""
    cases = _clips(size)
    equal = cases[0]
    if size == "tiny":
        return cases
    return [*cases, *_grow(equal, T=(equal.T // 4, equal.T // 2, equal.T), B=(equal.B // 4, equal.B // 2, equal.B))]


def stages(size: str) -> list[Case]:
    """One training step of each stage, without the optimiser. V and U are those of CTC and of the answers."""
    batches = {"cuda": (16, 8, 8), "cpu": (4, 4, 4), "tiny": (4, 4, 4)}[size]
    return [
        replace(case, name=f"stage {stage}, {case.name}", stage=stage, V=DIMS[size].vocab, U=max(2, case.T // 9))
        for stage, batch in enumerate(batches, start=1)
        for case in _clips(size, batch)
    ]


def generate(size: str) -> list[Case]:
    """Answers to recordings: the LLM reads the prompt and the kept frames and writes new tokens."""
    new_tokens = {"cuda": 32, "cpu": 8, "tiny": 2}[size]
    cases = _clips(size, 8 if size == "cuda" else 4)
    return [replace(case, new_tokens=new_tokens, V=DIMS[size].vocab) for case in cases]

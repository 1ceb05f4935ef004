"""Measure how exact the CTC gradient is that skips columns of the vocabulary, at four points of stage I.

    python bench/skipping.py [FOLDER] [--columns 128256]

It trains stage I on the embedded corpus for 200 steps, with checkpoints. At initialisation, at steps 50 and 100 and at
the end it takes a batch of 48 unseen recordings and computes the gradient of the hidden states in bfloat16: eager's,
ours with every column, and ours with skipping. It prints the relative error of each in the 2-norm against float64, the
bound that the operation states (relative to the norm of the gradient), and the share of the columns that took part:
for 256 rows, which the CPU takes at once, and as on a GPU, whose chunks are longer and fall into tiles of 128 rows.

With `--columns` the language model's vocabulary is enlarged to so many, and stage I is trained on that: each new row of
its output embedding is a row of another id, turned by noise of the same length, so that it may be confused with it.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import AutoTokenizer

from soundwave import backbones, eager
from soundwave.backbones.load import load_language_model
from soundwave.backbones.wheels import resolve
from soundwave.data.collate import Collator
from soundwave.data.manifest import read_manifest
from soundwave.demo.corpus import build_corpus
from soundwave.fused import functional
from soundwave.kernels import linear_ctc_steps, vocab_rows
from soundwave.kernels.active_columns import BINS, MOST_ACTIVE_TRITON, SKIPPED_MASS, probabilities_times_weight
from soundwave.kernels.vocab_rows import p_factor
from soundwave.model.modeling import SoundwaveForConditionalGeneration
from soundwave.model.processing import SoundwaveProcessor
from soundwave.training.settings import make_config
from soundwave.training.stages import build_model, train_stage

STEPS, POINTS, UTTERANCES, TILE_ROWS = 200, (50, 100), 48, 128


def gradient(function, hidden, model, batch, lengths, dtype, **kwargs):
    """The gradient of hidden, converted to float64, and the output of `function`."""
    hidden = hidden.detach().to(dtype, copy=True).requires_grad_()  # a copy, with a gradient of its own
    target_lengths = (batch["ctc_labels"] != eager.IGNORE_INDEX).sum(1)
    out = function(
        hidden,
        model.head_weight.to(dtype),
        batch["ctc_labels"].clamp(min=0),
        lengths,
        target_lengths,
        blank=model.blank,
        blank_weight=model.blank_weight.detach().to(torch.promote_types(dtype, torch.float32)),
        blank_bias=model.blank_bias.detach().to(torch.promote_types(dtype, torch.float32)),
        **kwargs,
    )
    out.loss.backward()
    return hidden.grad.double(), out


def compare(name: str, model: SoundwaveForConditionalGeneration, batch: dict[str, torch.Tensor]) -> None:
    """Print the errors at one point of the training as a row of the table."""
    model.eval()
    with torch.no_grad():
        frames, lengths = model.encode(batch["input_features"], batch["feature_lengths"])
        hidden, lengths = model.alignment(frames, lengths)
    hidden = hidden.bfloat16()
    truth, _ = gradient(eager.linear_ctc_loss, hidden, model, batch, lengths, torch.float64)
    theirs, _ = gradient(eager.linear_ctc_loss, hidden, model, batch, lengths, torch.bfloat16)
    exact, _ = gradient(functional.linear_ctc_loss, hidden, model, batch, lengths, torch.bfloat16, exact=True)
    ours, out = gradient(functional.linear_ctc_loss, hidden, model, batch, lengths, torch.bfloat16, exact=False)
    with as_on_a_gpu(len(model.head_weight)):
        tiled, tiles = gradient(functional.linear_ctc_loss, hidden, model, batch, lengths, torch.bfloat16, exact=False)
    errors = [float((x - truth).norm() / truth.norm()) for x in (theirs, exact, ours, tiled)]
    print(
        f"| {name} | {errors[0]:.2e} | {errors[1]:.2e} | {errors[2]:.2e} | {errors[2] / errors[0]:.2f} | "
        f"{errors[3] / errors[0]:.2f} | {float(out.error_bound):.2e} | {float(tiles.error_bound):.2e} | "
        f"{float(out.active_share):.1%} | {float(tiles.active_share):.1%} |",
        flush=True,
    )


def product_in_tiles(p, weight, off_label, skipped, factor, group, impl):
    """`probabilities_times_weight` by the rule of its GPU kernels (without groups), on the CPU: it is slow."""
    assert group is None, "one group of rows only"
    factor = torch.ones_like(off_label, dtype=torch.float64) if factor is None else factor.double()
    most, tiles = p.shape[1] // MOST_ACTIVE_TRITON, []
    lost, budget = torch.zeros(2, BINS + 1, dtype=torch.float64)
    for start in range(0, len(p), TILE_ROWS):
        at = slice(start, start + TILE_ROWS)
        rows = p[at].float() / p_factor(p.dtype)
        maximum = rows.amax(0)
        bins = torch.where(maximum > 0, -maximum.frexp().exponent, BINS - 1).clamp(0, BINS - 1)
        mass = rows.new_zeros(len(rows), BINS + 1, dtype=torch.float64).index_add_(1, bins, rows.double())
        mass = mass.flip(1).cumsum(1).flip(1)  # [n, j]: what is lost from bin j on
        remain = torch.bincount(bins, minlength=BINS + 1).cumsum(0).roll(1)
        remain[0] = 0
        lost += (mass * factor[at, None]).square().sum(0) * (remain <= most)
        budget += SKIPPED_MASS**2 * (off_label[at].double() * factor[at]).square().sum() * (remain <= most)
        tiles.append((at, bins, mass))
    limit = 1 + int((lost <= budget)[1:].nonzero()[0])
    product = probabilities_times_weight(p, weight, off_label)
    skipped.share.fill_(1.0)
    skipped.mass.zero_()
    for at, bins, mass in tiles:
        kept = (bins < limit).nonzero()[:, 0]
        if len(kept) <= most:
            product[at] = probabilities_times_weight(p[at][:, kept], weight[kept], off_label[at])
            skipped.share[at], skipped.mass[at] = len(kept) / p.shape[1], mass[:, limit].to(off_label.dtype)
    return product


@contextmanager
def as_on_a_gpu(columns: int) -> Iterator[None]:
    """Chunks as long as a GPU's, and its rule for the columns that are skipped."""
    rows = max(128, vocab_rows.CHUNK_BYTES // (2 * columns) // 128 * 128)
    with (
        patch.object(vocab_rows, "CHUNK_ROWS_CPU", rows),
        patch.object(linear_ctc_steps, "probabilities_times_weight", product_in_tiles),
    ):
        yield


def enlarged(folder: Path, columns: int) -> str:
    """A folder with the embedded language model, its vocabulary enlarged to `columns`."""
    generator = torch.Generator().manual_seed(0)
    model = load_language_model(backbones.LANGUAGE_MODEL, torch.float32)
    known = model.get_output_embeddings().weight.detach().clone()
    model.resize_token_embeddings(columns, mean_resizing=False)
    like = known[torch.randint(len(known), (columns - len(known),), generator=generator)]
    noise = torch.randn(like.shape, generator=generator)
    noise *= like.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
    model.get_output_embeddings().weight.data[len(known) :] = (like + noise) / 2**0.5
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve(backbones.LANGUAGE_MODEL)).save_pretrained(folder)
    return str(folder)


def main(folder: Path, columns: int | None) -> None:
    """Train and print the table."""
    corpus = build_corpus(folder / "corpus")
    if columns is not None:
        folder = folder / str(columns)
    config = make_config(
        1,
        **({} if columns is None else {"language_model": enlarged(folder / "language-model", columns)}),
        train=[corpus / "stage1.jsonl"],
        out=folder / "stage1",
        steps=STEPS,
        batch_size=20,
        accumulation=1,
        learning_rate=1.5e-3,
        warmup_steps=15,
        spec_augment=False,
        save_steps=50,
        save_total_limit=5,
    )
    trained, _, _ = train_stage(config)
    samples = [sample for sample in read_manifest(corpus / "test.jsonl") if sample.task == "transcribe"]
    batch = Collator(SoundwaveProcessor.from_pretrained(trained), 1)(samples[:UTTERANCES])
    print(
        "| stage I | eager | ours, exact | ours | ours / eager | the same, GPU | stated bound | GPU | columns | GPU |"
    )
    print("|" + "---|" * 10)
    torch.manual_seed(config.seed)
    start = build_model(config, torch.device("cpu")).float()
    clips = batch["input_features"], batch["feature_lengths"]
    start.standardise_frames(*start.frame_moments(*clips)[1:])
    start.initialise_blank(*clips)
    compare("initialisation", start, batch)
    points = {f"step {step}": config.out / f"checkpoint-{step}" for step in POINTS} | {f"end, step {STEPS}": trained}
    for name, path in points.items():
        compare(name, SoundwaveForConditionalGeneration.from_pretrained(path, language_model=False), batch)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/skipping"))
    parser.add_argument("--columns", type=int, help="enlarge the vocabulary to so many")
    given = parser.parse_args()
    main(given.folder, given.columns)

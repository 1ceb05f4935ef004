"""Measure how exact the CTC gradient is that skips columns of the vocabulary, at four points of stage I.

    python bench/skipping.py [FOLDER] [--columns 128256]

It trains stage I on the embedded corpus for 200 steps, with checkpoints. At initialisation, at steps 50 and 100 and at
the end it takes a batch of 48 unseen recordings and computes the gradient of the hidden states in bfloat16: eager's,
ours with every column, and ours with skipping. It prints the relative error of each in the 2-norm against float64, the
bound that the operation states (relative to the norm of the gradient), and the share of the columns that took part:
for tiles of 256 rows, which the CPU takes at once, and of 128, as on a GPU.

With `--columns` the language model's vocabulary is enlarged to so many, and stage I is trained on that: each new row of
its output embedding is a row of another id, turned by noise of the same length, so that it may be confused with it.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer

from soundwave import backbones, eager
from soundwave.backbones.load import load_language_model
from soundwave.backbones.wheels import resolve
from soundwave.data.collate import Collator
from soundwave.data.manifest import read_manifest
from soundwave.demo.corpus import build_corpus
from soundwave.fused import functional
from soundwave.kernels import vocab_rows
from soundwave.model.modeling import SoundwaveForConditionalGeneration
from soundwave.model.processing import SoundwaveProcessor
from soundwave.training.settings import make_config
from soundwave.training.stages import build_model, train_stage

STEPS, POINTS, UTTERANCES, ROWS_GPU = 200, (50, 100), 48, 128


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
    whole, results = vocab_rows.CHUNK_ROWS_CPU, []
    for rows in (whole, ROWS_GPU):
        vocab_rows.CHUNK_ROWS_CPU = rows
        results.append(gradient(functional.linear_ctc_loss, hidden, model, batch, lengths, torch.bfloat16, exact=False))
    vocab_rows.CHUNK_ROWS_CPU = whole
    (ours, out), (tiled, small) = results
    errors = [float((x - truth).norm() / truth.norm()) for x in (theirs, exact, ours, tiled)]
    print(
        f"| {name} | {errors[0]:.2e} | {errors[1]:.2e} | {errors[2]:.2e} | {errors[2] / errors[0]:.2f} | "
        f"{errors[3] / errors[0]:.2f} | {float(out.error_bound):.2e} | {float(out.active_share):.1%} | "
        f"{float(small.active_share):.1%} |",
        flush=True,
    )


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
        f"| stage I | eager | ours, exact | ours | ours / eager | in tiles of {ROWS_GPU} | stated bound | columns | "
        f"in tiles of {ROWS_GPU} |"
    )
    print("|" + "---|" * 9)
    torch.manual_seed(config.seed)
    start = build_model(config, torch.device("cpu")).float()
    start.initialise_blank(batch["input_features"], batch["feature_lengths"])
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

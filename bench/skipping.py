"""Measure how exact the CTC gradient is that skips columns of the vocabulary, at four points of stage I.

    python bench/skipping.py [FOLDER]

It trains stage I on the embedded corpus for 200 steps, with checkpoints. At initialisation, at steps 50 and 100 and at
the end it takes a batch of 16 unseen recordings and computes the gradient of the hidden states in bfloat16: eager's,
ours with every column, and ours with skipping. It prints the relative error of each in the 2-norm against float64, the
share of the columns that took part, and the bound that the operation states (relative to the norm of the gradient).
"""

import sys
from pathlib import Path

import torch

from soundwave import eager
from soundwave.data.collate import Collator
from soundwave.data.manifest import read_manifest
from soundwave.demo.corpus import build_corpus
from soundwave.fused import functional
from soundwave.model.modeling import SoundwaveForConditionalGeneration
from soundwave.model.processing import SoundwaveProcessor
from soundwave.training.settings import make_config
from soundwave.training.stages import build_model, train_stage

STEPS, POINTS, UTTERANCES = 200, (50, 100), 16


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
    ours, out = gradient(functional.linear_ctc_loss, hidden, model, batch, lengths, torch.bfloat16)
    errors = [float((x - truth).norm() / truth.norm()) for x in (theirs, exact, ours)]
    print(
        f"| {name} | {errors[0]:.2e} | {errors[1]:.2e} | {errors[2]:.2e} | {errors[2] / errors[0]:.2f} | "
        f"{float(out.error_bound):.2e} | {float(out.active_share):.1%} |",
        flush=True,
    )


def main(folder: Path) -> None:
    """Train and print the table."""
    corpus = build_corpus(folder / "corpus")
    config = make_config(
        1,
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
    print("| stage I | eager | ours, exact | ours | ours / eager | stated bound | columns |")
    print("|" + "---|" * 7)
    torch.manual_seed(config.seed)
    start = build_model(config, torch.device("cpu")).float()
    start.initialise_blank(batch["input_features"], batch["feature_lengths"])
    compare("initialisation", start, batch)
    points = {f"step {step}": config.out / f"checkpoint-{step}" for step in POINTS} | {f"end, step {STEPS}": trained}
    for name, path in points.items():
        compare(name, SoundwaveForConditionalGeneration.from_pretrained(path, language_model=False), batch)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/skipping"))

"""The demonstration: a corpus, three stages, scores, a picture: a speech LLM trained on a laptop in twenty minutes."""

import gc
import json
import platform
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from soundwave import backbones
from soundwave.backbones import wheels
from soundwave.data.manifest import read_manifest
from soundwave.demo.corpus import build_corpus
from soundwave.evaluation.run import evaluate, evaluate_ctc
from soundwave.evaluation.scores import Scores
from soundwave.hardware import pick_device
from soundwave.inference.answer import load_model
from soundwave.model.modeling import SoundwaveForConditionalGeneration
from soundwave.model.processing import SoundwaveProcessor
from soundwave.provenance import commit, versions
from soundwave.report import write_report
from soundwave.training.settings import StageConfig, make_config
from soundwave.training.stages import train_stage

# Tokens; the corpus has none longer in the direct format, and a poor model talks on.
LONGEST_ANSWER = {"transcribe": 16, "voice": 6, "rate": 6, "intent": 6, "question": 6}
EVALUATED_AT_ONCE = 100  # every step of generation reads all weights once, however many samples share it
VERSIONS_OF = ("torch", "transformers", "peft", "numpy")


@dataclass(frozen=True)
class Recipe:
    """What differs between the full demonstration and the quick one."""

    corpus: str
    passes: dict[str, dict[str, Any]]  # by manifest: settings of the training on it, in order


# The synthetic speech is clean and every sentence is said in several voices: SpecAugment only slows it down. Stage I
# has two passes, the words first, then words and labels of voice and rate, which the next-token loss would not find in
# so few steps; stage II keeps them. LoRA with the paper's scale of 16 / 64 learns half as fast (docs/log.md).
FULL = Recipe(
    "full",
    {
        "stage1": {"steps": 190, "batch_size": 28, "learning_rate": 1.5e-3, "warmup_steps": 15},
        "labels": {"steps": 205, "batch_size": 20, "learning_rate": 6e-4, "warmup_steps": 15},
        "stage2": {
            "steps": 175, "batch_size": 16, "learning_rate": 7e-4, "warmup_steps": 15, "ctc_weight": 1.0,
            "lora_alpha": 128,
        },
        "stage3": {
            "steps": 185, "batch_size": 16, "learning_rate": 3e-4, "warmup_steps": 10, "train_shrinking": True
        },
    },
)  # fmt: skip
QUICK = Recipe(
    "quick",
    {
        "stage1": {"steps": 100, "batch_size": 14, "learning_rate": 1.5e-3, "warmup_steps": 10},
        "stage2": {"steps": 20, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 3},
        "stage3": {"steps": 10, "batch_size": 8, "learning_rate": 5e-4, "warmup_steps": 1, "train_shrinking": True},
    },
)
STAGE = {"stage1": 1, "labels": 1, "stage2": 2, "stage3": 3}


def stage_config(recipe: Recipe, name: str, corpus: Path, out: Path, seed: int) -> StageConfig:
    """Settings of one pass of the demonstration, which goes on from the one before."""
    names = list(recipe.passes)
    return make_config(
        STAGE[name],
        train=[corpus / f"{name}.jsonl"],
        out=out / name,
        model=out / names[names.index(name) - 1] / "model" if name != names[0] else None,
        accumulation=1,
        spec_augment=False,
        save_steps=100,
        seed=seed,
        **recipe.passes[name],
    )


def run_demo(out: Path, *, quick: bool = False, seed: int = 0) -> dict[str, Any]:
    """Train and score everything; writes `model/`, the logs, `losses.png` and `summary.json` under `out`.

    One that was interrupted goes on: what is trained already is scored again, not trained again.

    Returns:
        What `summary.json` holds. Seconds do not count downloads, nor the conversion and synthesis that follow them;
        those of a stage are of all its trainings, the total is of this call alone.
    """
    recipe = QUICK if quick else FULL
    out.mkdir(parents=True, exist_ok=True)
    for name in (backbones.WHISPER, backbones.LANGUAGE_MODEL):
        wheels.resolve(name)
    corpus = build_corpus(out / f"corpus-{recipe.corpus}", seed=seed, size=recipe.corpus)
    start = time.perf_counter()
    tests = {name: read_manifest(corpus / f"{name}.jsonl") for name in ("test", "test_voices")}
    summary: dict[str, Any] = {"seconds": {"stage1": 0.0, "stage2": 0.0, "stage3": 0.0}}
    logs: dict[int, list[dict[str, float]]] = {}
    for name in recipe.passes:
        stage = STAGE[name]
        folder, log, seconds = train_stage(stage_config(recipe, name, corpus, out, seed))
        summary["seconds"][f"stage{stage}"] += seconds
        logs[stage] = logs.get(stage, []) + [entry | {"step": entry["step"] + _last(logs.get(stage))} for entry in log]
        if name == "labels":
            continue
        model, processor = load_model(folder)
        if stage == 1:
            report = evaluate_ctc(model, processor, one_task(tests["test"], "transcribe"))
            summary["stage1"] = {
                "ctc_step1": log[0]["ctc_loss"],
                "ctc_step100": next((entry["ctc_loss"] for entry in log if entry["step"] == 100), None),
                "wer": report.wer,
                "blank_share": report.blank_share,
                "kept_per_label": report.kept_per_label,
            }
            summary["compression"] = report.compression
        elif stage == 2:
            report = evaluate(
                model,
                processor,
                one_task(tests["test"], "transcribe"),
                batch_size=EVALUATED_AT_ONCE,
                max_new_tokens=LONGEST_ANSWER,
            )
            summary["stage2"] = {"wer": report.wer}
        else:
            summary["stage3"], summary["samples"] = _score(model, processor, tests, out)
            model.save_pretrained(out / "model")
        del model
        gc.collect()  # a Trainer and its model hold each other
    summary["seconds"]["total"] = time.perf_counter() - start
    device, _ = pick_device()
    summary |= {
        "seed": seed,
        "versions": versions(VERSIONS_OF),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
    }
    plot_losses(logs, out / "losses.png")
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    write_report([out], out / "report.html")
    for checkpoint in out.glob("*/checkpoint-*"):
        shutil.rmtree(checkpoint)  # the next demonstration starts anew in the same folder
    return summary


def _last(log: list[dict[str, float]] | None) -> int:
    return int(log[-1]["step"]) if log else 0


def one_task(samples: list, task: str) -> list:
    """The samples of a task, in the manifest's order."""
    return [sample for sample in samples if sample.task == task]


def _score(
    model: SoundwaveForConditionalGeneration, processor: SoundwaveProcessor, tests: dict[str, list], out: Path
) -> tuple[dict[str, Any], dict[str, int]]:
    """Stage III's row of the summary and the number of samples behind each figure; answers go to `answers.jsonl`."""
    tasks = ("transcribe", "voice", "rate", "intent", "question")
    seen: Scores = evaluate(
        model,
        processor,
        [sample for task in tasks for sample in one_task(tests["test"], task)],
        batch_size=EVALUATED_AT_ONCE,
        max_new_tokens=LONGEST_ANSWER,
    )
    unseen = evaluate(
        model,
        processor,
        one_task(tests["test_voices"], "transcribe"),
        batch_size=EVALUATED_AT_ONCE,
        max_new_tokens=LONGEST_ANSWER,
    )
    with open(out / "answers.jsonl", "w", encoding="utf-8") as file:
        for identity, task, reference, given in [*seen.answers, *unseen.answers]:
            row = {"sample": identity, "task": task, "reference": reference, "answer": given}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    scores = {"wer": seen.wer, "wer_unseen_voices": unseen.wer, "accuracy": seen.accuracy}
    return scores, seen.samples | {"transcribe_unseen_voices": unseen.samples["transcribe"]}


def plot_losses(logs: dict[int, list[dict[str, float]]], path: Path) -> None:
    """The loss curves of the three stages, side by side, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    titles = {1: "I · alignment", 2: "II · shrinking", 3: "III · instruction tuning"}
    names = {"ctc_loss": "CTC", "lm_loss": "next token"}
    figure, axes = plt.subplots(1, len(logs), figsize=(4.2 * len(logs), 3.2), layout="constrained")
    for axis, (stage, log) in zip(axes, logs.items(), strict=True):
        for name, label in names.items():
            points = [(entry["step"], entry[name]) for entry in log if name in entry]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, color={"CTC": "C0", "next token": "C1"}[label])
        axis.set(title=f"stage {titles[stage]}", xlabel="step", yscale="log")
        axis.grid(True, which="major", alpha=0.3)
        axis.legend()
    axes[0].set_ylabel("loss [nats a token]")
    figure.savefig(path, dpi=120)
    plt.close(figure)

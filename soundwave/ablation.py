"""The paper's checks on the embedded default: one part of Soundwave left out or replaced, everything else the same.

Each variant is trained as the demonstration is (`soundwave.demo.FULL`), with a share of its steps. Those that differ
after stage I alone start from one alignment, which is trained once. What is there already is not trained again.
"""

import gc
import json
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import torch

from soundwave.data.collate import features, prompt_of
from soundwave.data.corpus import build_corpus
from soundwave.data.manifest import Sample, read_manifest
from soundwave.demo import EVALUATED_AT_ONCE, FULL, LONGEST_ANSWER, STAGE, one_task
from soundwave.evaluation import answer, evaluate, load_model, normalise
from soundwave.modeling import batch_to
from soundwave.report import write_report
from soundwave.training.journal import say, write_text
from soundwave.training.stages import ConfigError, make_config, train_stage

TASKS = ("transcribe", "voice", "rate", "intent", "question")
SWAPPED = 0.2  # share of transcripts that stand beside another recording
# An epoch of stage II that a run sees several times, its tasks as uneven as the paper's.
UNEVEN = {"transcribe": 300, "qa": 40, "voice": 20, "rate": 20}
RESAMPLED, CONFIDENCE = 2000, 0.95
TIMED = 20  # recordings, whose first token is waited for


@dataclass(frozen=True)
class Alignment:
    """A stage I: what differs from the demonstration's."""

    settings: dict[str, Any] = field(default_factory=dict)
    swapped: bool = False


@dataclass(frozen=True)
class Variant:
    """What is trained: `alignment`, a key of ALIGNMENTS or None without stage I, and the settings of stage II."""

    about: str
    alignment: str | None = "clean"
    settings: dict[str, Any] = field(default_factory=dict)
    manifest: str = "stage2"


UNSHRUNK = {"keep": "frames", "keys": "none"}
ALIGNMENTS = {
    "clean": Alignment(),
    "swapped": Alignment(swapped=True),
    "stacked-3": Alignment({"frame_stack": 3}),
    "stacked-4": Alignment({"frame_stack": 4}),
}
VARIANTS = {
    "soundwave": Variant("as it is"),
    "no-cross-attention": Variant("kept frames gather nothing", settings={"keys": "none"}),
    "no-stage-1": Variant("stage II starts from fresh adapters", alignment=None),
    "runs": Variant("the first frame of every run is kept, of blank too", settings={"keep": "runs"}),
    "swapped": Variant(f"{SWAPPED:.0%} of stage I's transcripts belong to another recording", alignment="swapped"),
    "stacked-3": Variant("3 encoder frames side by side, all read", "stacked-3", UNSHRUNK),
    "stacked-4": Variant("4 encoder frames side by side, all read", "stacked-4", UNSHRUNK),
    "uneven": Variant("uneven tasks in stage II, drawn at T = 1 + 5·epoch", manifest="uneven"),
    "uneven-plain": Variant("the same, every sample once an epoch", settings={"temperature": False}, manifest="uneven"),
}


def run_ablations(
    out: Path,
    names: Sequence[str] = tuple(VARIANTS),
    *,
    scale: float = 1.0,
    jobs: int = 1,
    seed: int = 0,
    size: str = "full",
    **settings: Any,
) -> dict[str, dict[str, Any]]:
    """Train and score variants; writes a folder each, `ablations.json`, `ablations.md` and `report.html` under `out`.

    Args:
        names: keys of VARIANTS.
        scale: of the demonstration's steps, above 0.
        jobs: trainings at a time, each with its share of the processors.
        size: of the corpus, see `build_corpus`.
        settings: of every training (`StageConfig`), in place of the demonstration's.

    Returns:
        Results by name, as `ablations.json` has them.

    Raises:
        ConfigError: an unknown name; or `out` holds results of another scale, seed, size or settings.
    """
    for name in names:
        if name not in VARIANTS:
            raise ConfigError(f"variant = {name!r}, but known are {', '.join(VARIANTS)}")
    out = Path(out)
    _stamp(out, {"scale": scale, "seed": seed, "size": size, **settings})
    corpus = build_corpus(out / "corpus", seed=seed, size=size)
    _write_manifests(corpus, seed)
    wanted = {VARIANTS[name].alignment for name in names} - {None}
    common = {"out": out, "corpus": corpus, "scale": scale, "settings": {"seed": seed, "quiet": jobs > 1} | settings}
    _each(_train_alignment, sorted(wanted), common, jobs)
    results = dict(zip(names, _each(_run_variant, list(names), common, jobs), strict=True))
    write_text(out / "ablations.json", json.dumps(results, indent=2) + "\n")
    write_text(out / "ablations.md", markdown(results))
    write_report([out / name for name in names], out / "report.html", utterances=3)
    return results


def interval(wrong: Sequence[float], of: Sequence[float]) -> tuple[float, float]:
    """Bootstrap interval of sum(wrong) / sum(of): samples are drawn again, with their own counts of both."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(of), size=(RESAMPLED, len(of)))
    ratios = np.asarray(wrong, float)[drawn].sum(1) / np.asarray(of, float)[drawn].sum(1)
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """Two tables: how good and how fast each variant is, and how its losses went."""
    asked = [task for task in TASKS if task != "transcribe"]
    header = ["variant", "WER", *asked, "kept a second", "positions", "s a step", "ms to first token"]
    rows = [
        [
            name,
            _percent(found["wer"]),
            *(_percent(found["accuracy"][task]) for task in asked),
            f"{found['kept_per_second']:.1f}",
            f"{found['positions']:.0f}",
            f"{found['seconds_a_step']:.2f}",
            f"{1000 * found['seconds_to_first_token']:.0f}",
        ]
        for name, found in results.items()
    ]
    losses = ["variant", "CTC, end of stage I", "largest jump of it", "next token, ¼ of stage II", "½", "end"]
    losses += ["tasks drawn in stage II"]
    courses = []
    for name, found in results.items():
        ctc, jump = (found["alignment"] or {}).get("ctc_loss"), (found["alignment"] or {}).get("jump")
        numbers = [ctc, jump, *found["lm_loss"]]
        drawn = ", ".join(f"{task} {share:.0%}" for task, share in found["drawn"].items())
        courses.append([name, *("–" if number is None else f"{number:.2f}" for number in numbers), drawn])
    about = [[name, found["about"]] for name, found in results.items()]
    tables = (_table(["variant", "what it is"], about), _table(header, rows), _table(losses, courses))
    return "\n".join(tables)


# ---------------------------------------------------------------- data


def _stamp(out: Path, stamp: dict[str, Any]) -> None:
    """Refuse a folder of other settings: what is there already would be taken for theirs."""
    file = out / "settings.json"
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found != stamp:
            raise ConfigError(f"out = {str(out)!r} holds ablations with {found}, but wanted are {stamp}; name another")
    out.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(stamp) + "\n")


def _write_manifests(corpus: Path, seed: int) -> None:
    """The manifests that the demonstration has not: swapped transcripts, and few samples of uneven tasks."""
    for name in ("stage1", "labels"):
        rows = _rows(corpus / f"{name}.jsonl")
        chosen = random.Random(f"swapped {seed}").sample(range(len(rows)), round(SWAPPED * len(rows)))
        texts = [{key: rows[i][key] for key in ("text", "ctc_text") if key in rows[i]} for i in chosen]
        for i, text in zip(chosen, texts[1:] + texts[:1], strict=True):
            rows[i] |= text
        _write_rows(corpus / f"{name}-swapped.jsonl", rows)
    rows, few = _rows(corpus / "stage2.jsonl"), []
    for task, count in UNEVEN.items():
        few += [row for row in rows if row["task"] == task][:count]
    _write_rows(corpus / "uneven.jsonl", few)


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# ---------------------------------------------------------------- training


def _each(work: Callable, names: list[str], common: dict[str, Any], jobs: int) -> list[Any]:
    """`work` for each name, in order, `jobs` of them at a time."""
    if jobs == 1:
        return [work(name, **common) for name in names]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_begin, initargs=(threads,)) as pool:
        futures = [pool.submit(work, name, **common) for name in names]
        return [future.result() for future in futures]


def _begin(threads: int) -> None:
    from transformers.utils import logging

    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _pass(name: str, folder: Path, manifest: Path, model: Path | None, scale: float, settings: dict[str, Any]) -> Path:
    """One of the demonstration's trainings, unless it is done: its model's folder."""
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    wanted = FULL.passes[name]
    steps = max(1, round(scale * wanted["steps"]))
    shortened = wanted | {"steps": steps, "warmup_steps": min(wanted["warmup_steps"], steps // 4), "save_steps": 50}
    config = {"train": [manifest], "out": folder, "model": model, "accumulation": 1, "spec_augment": False}
    return train_stage(make_config(STAGE[name], **config | shortened | settings))[0]


def _train_alignment(name: str, *, out: Path, corpus: Path, scale: float, settings: dict[str, Any]) -> Path:
    """Stage I of ALIGNMENTS[name], the words and then the labels: the model's folder."""
    one, model = ALIGNMENTS[name], None
    say(f"alignment {name}")
    for step in ("stage1", "labels"):
        manifest = corpus / f"{step}{'-swapped' if one.swapped else ''}.jsonl"
        changes = settings | (one.settings if model is None else {})
        model = _pass(step, out / "alignments" / name / step, manifest, model, scale, changes)
    return model


def _run_variant(name: str, *, out: Path, corpus: Path, scale: float, settings: dict[str, Any]) -> dict[str, Any]:
    """Stages II and III of VARIANTS[name], scored."""
    done = out / name / "result.json"
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    variant = VARIANTS[name]
    say(f"variant {name}: {variant.about}")
    aligned = out / "alignments" / variant.alignment if variant.alignment else None
    model = aligned / "labels" / "model" if aligned else None
    manifest = corpus / f"{variant.manifest}.jsonl"
    model = _pass("stage2", out / name / "stage2", manifest, model, scale, settings | variant.settings)
    model = _pass("stage3", out / name / "stage3", corpus / "stage3.jsonl", model, scale, settings)
    result = {"about": variant.about, "alignment": _course(aligned / "stage1") if aligned else None}
    result |= _of_stage_2(_rows(out / name / "stage2" / "log.jsonl"))
    result |= _score(model, read_manifest(corpus / "test.jsonl"), out / name)
    write_text(done, json.dumps(result, indent=2) + "\n")
    gc.collect()  # a Trainer and its model hold each other
    return result


def _course(folder: Path) -> dict[str, float]:
    """How stage I's loss went: its last value, and the largest ratio of a value to the median of the three before."""
    losses = [entry["ctc_loss"] for entry in _rows(folder / "log.jsonl")]
    jumps = [loss / statistics.median(losses[i : i + 3]) for i, loss in enumerate(losses[3:])]
    return {"ctc_loss": losses[-1], "jump": max(jumps, default=1.0)}


def _of_stage_2(log: list[dict[str, Any]]) -> dict[str, Any]:
    drawn: dict[str, int] = {}
    for entry in log:
        for task, count in entry["tasks"].items():
            drawn[task] = drawn.get(task, 0) + count
    total = sum(drawn.values())
    places = (len(log) // 4, len(log) // 2, len(log) - 1)
    return {
        "lm_loss": [log[place]["lm_loss"] for place in places],
        "seconds_a_step": log[-1]["seconds"] / log[-1]["step"],
        "drawn": {task: count / total for task, count in sorted(drawn.items())},
    }


# ---------------------------------------------------------------- scoring


def _score(folder: Path, samples: list[Sample], out: Path) -> dict[str, Any]:
    """Scores with their intervals, what the language model reads, and how soon it answers."""
    model, processor = load_model(folder)
    chosen = [sample for task in TASKS for sample in one_task(samples, task)]
    report = evaluate(model, processor, chosen, batch_size=EVALUATED_AT_ONCE, max_new_tokens=LONGEST_ANSWER)
    rows = [dict(zip(("sample", "task", "reference", "answer"), row, strict=True)) for row in report.answers]
    _write_rows(out / "answers.jsonl", rows)
    summary = {"stage3": {"wer": report.wer, "accuracy": report.accuracy}, "samples": report.samples}
    write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    found: dict[str, Any] = {"samples": report.samples, "accuracy": {}}
    for task in TASKS:
        pairs = [(normalise(row["reference"]), normalise(row["answer"])) for row in rows if row["task"] == task]
        if task == "transcribe":
            aligned = [jiwer.process_words(*pair) for pair in pairs]
            wrong = [one.substitutions + one.deletions + one.insertions for one in aligned]
            found["wer"] = {"value": report.wer, "interval": list(interval(wrong, [len(a.split()) for a, _ in pairs]))}
        else:
            right = [a == b for a, b in pairs]
            found["accuracy"][task] = {
                "value": report.accuracy[task],
                "interval": list(interval(right, [1] * len(pairs))),
            }
    return found | _cost(model, processor, one_task(samples, "transcribe")[:TIMED])


@torch.no_grad()
def _cost(model: Any, processor: Any, samples: list[Sample]) -> dict[str, float]:
    """One recording at a time: kept frames a second, positions that the LLM reads, time to its first token."""
    kept, positions, seconds, times = 0, [], 0.0, []
    for sample in samples:
        clip, prompt = features(processor, sample), prompt_of(sample)
        start = time.perf_counter()
        answer(model, processor, [prompt], [clip], max_new_tokens=1)
        times.append(time.perf_counter() - start)
        batch = batch_to(processor.pad_features([clip]), model.device)
        with torch.autocast(model.device.type, dtype=model.compute_dtype, enabled=model.compute_dtype != torch.float32):
            _, lengths, ctc = model.align(**batch)
        count = len(model.kept_frames(ctc, lengths).index)
        kept, seconds = kept + count, seconds + clip.shape[1] / 100
        positions.append(len(processor.prompt_ids(prompt)) - 1 + count)
    return {
        "kept_per_second": kept / seconds,
        "positions": statistics.mean(positions),
        "seconds_to_first_token": statistics.median(times),
    }


def _percent(score: dict[str, Any]) -> str:
    low, high = score["interval"]
    return f"{100 * score['value']:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

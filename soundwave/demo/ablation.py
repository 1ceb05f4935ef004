"""The paper's ablations on the embedded backbones: one part of Soundwave is left out or replaced, the rest is the same.

Each variant is trained like the demonstration (`demo.run.FULL`), for as many of its steps as `scale` says. Variants
that differ only after stage I share one alignment, which is trained once. Results that are there already are not made
again.

The demonstration's test is too easy to tell some variants apart. A harder test does: voices that no training has heard,
in white noise.

The intervals account for the choice of the test sentences only. Another seed of the training changes a figure, too.
"""

import gc
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from soundwave.data.audio import SAMPLING_RATE, load_audio
from soundwave.data.collate import features, prompt_of
from soundwave.data.manifest import Sample, read_manifest, write_manifest
from soundwave.demo import corpus as embedded_corpus
from soundwave.demo.run import FULL, LANGUAGE, STAGE, one_task, score
from soundwave.evaluation.intervals import TASKS, differences, estimates, markdown, tally
from soundwave.evaluation.run import evaluate_ctc
from soundwave.evaluation.scores import ANSWER_RULES, Scores
from soundwave.evaluation.words import rules_for
from soundwave.hardware import pick_device, pick_dtype
from soundwave.inference.answer import answer, load_model
from soundwave.model.modeling import batch_to
from soundwave.report import write_report
from soundwave.training.callbacks import Interrupted
from soundwave.training.journal import say, write_text
from soundwave.training.settings import ConfigError, make_config
from soundwave.training.stages import train_stage

SWAPPED = 0.2  # share of the transcripts that are given to another recording
# Samples of each task in the small stage II: a run sees it for several epochs, and its tasks are as uneven as those of
# the paper.
UNEVEN = {"transcribe": 300, "qa": 40, "voice": 20, "rate": 20}
NOISE = 10  # signal-to-noise ratio of the harder test, dB
HARD_TASKS = ("transcribe", "voice", "rate")
TIMED = 20  # recordings for which the time to the first token is measured
TIMED_STEPS, UNTIMED_STEPS = 10, 3  # steps of stage II; the first ones are slower and are not timed
STAMP, RESULT, TIMING = "settings.json", "result.json", "timing.json"
ANSWERS, HARD_ANSWERS = "answers.jsonl", "answers-in-noise.jsonl"
PLAIN = "soundwave"  # the variant with which the others are compared


@dataclass(frozen=True)
class Alignment:
    """A training of stage I that several variants start from.

    Attributes:
        settings: settings that differ from the demonstration's.
        swapped: whether some transcripts belong to another recording.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    swapped: bool = False


@dataclass(frozen=True)
class Variant:
    """A model that is trained and scored.

    Attributes:
        about: what it is, for the tables.
        alignment: the stage I it starts from, a key of ALIGNMENTS; None: no stage I.
        settings: settings of stage II that differ from the demonstration's.
        manifest: name of the manifest of stage II.
        after: the pass of stage I from which stage II starts.
    """

    about: str
    alignment: str | None = "clean"
    settings: dict[str, Any] = field(default_factory=dict)
    manifest: str = "stage2"
    after: str = "labels"


UNSHRUNK = {"keep": "frames", "keys": "none"}
ALIGNMENTS = {
    "clean": Alignment(),
    "swapped": Alignment(swapped=True),
    "stacked-3": Alignment({"frame_stack": 3}),
    "stacked-4": Alignment({"frame_stack": 4}),
}
VARIANTS = {
    PLAIN: Variant("the demonstration's model"),
    "no-cross-attention": Variant("no cross-attention from the kept frames to the others", settings={"keys": "none"}),
    "no-stage-1": Variant("no stage I, and no steps in its place: stage II starts from new adapters", alignment=None),
    "no-labels": Variant("CTC writes words only, no labels of voice and rate", after="stage1", manifest="words"),
    "runs": Variant("the first frame of every run is kept, also of runs of blanks", settings={"keep": "runs"}),
    "swapped": Variant(f"{SWAPPED:.0%} of the CTC transcripts of stage I belong to another recording", "swapped"),
    "stacked-3": Variant("stacks of 3 encoder frames, all kept, no cross-attention", "stacked-3", UNSHRUNK),
    "stacked-4": Variant("stacks of 4 encoder frames, all kept, no cross-attention", "stacked-4", UNSHRUNK),
    "uneven": Variant("uneven tasks in stage II, drawn with the temperature T = 1 + 5·epoch", manifest="uneven"),
    "uneven-plain": Variant(
        "uneven tasks in stage II, every sample once an epoch", settings={"temperature": False}, manifest="uneven"
    ),
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
    """Train and score variants. Writes a folder for each, `ablations.json`, `ablations.md` and two pages into `out`.

    The page `report.html` compares the variants, `alignments.html` the trainings of stage I that they start from.

    Args:
        out: folder of the results.
        names: keys of VARIANTS.
        scale: factor of the demonstration's numbers of steps, above 0.
        jobs: number of trainings at a time; they share the CPU threads. Times are measured after all trainings, one
            variant after the other.
        seed: seed of the corpus, the weights and the order of the samples.
        size: size of the corpus, see `build_corpus`.
        settings: settings of every training (`StageConfig`) that replace the demonstration's.

    Returns:
        The results of all variants that `out` holds, by name, as in `ablations.json`.

    Raises:
        ConfigError: an unknown name or setting; or `out` holds results of another scale, seed, size or recipe.
        Interrupted: Ctrl-C or SIGTERM. The same call goes on.
    """
    names = list(dict.fromkeys(names))
    for name in names:
        if name not in VARIANTS:
            raise ConfigError(f"variant = {name!r}, but known are {', '.join(VARIANTS)}")
    if not names or not scale > 0 or jobs < 1:
        raise ConfigError(f"{len(names)} variants, scale = {scale}, jobs = {jobs}, but none may be 0 or less")
    make_config(1, **{"train": ["-"], "out": "-"} | settings)  # raises before anything is written
    out = Path(out)
    stamp = _stamp(out, scale, seed, size, settings)
    corpus = embedded_corpus.build_corpus(out / "corpus", seed=seed, size=size)
    _write_manifests(corpus, seed)
    write_text(out / STAMP, json.dumps(stamp, indent=2) + "\n")
    settings = {"seed": seed, "quiet": jobs > 1} | settings | {"dtype": stamp["dtype"]}
    common = {"out": out, "corpus": corpus, "scale": scale, "settings": settings}
    missing = [name for name in names if not (out / name / RESULT).is_file()]
    _each(_train_alignment, sorted({start for name in missing if (start := VARIANTS[name].alignment)}), common, jobs)
    _each(_run_variant, missing, common, jobs)
    _each(_answer_in_noise, [name for name in names if not (out / name / HARD_ANSWERS).is_file()], common, jobs)
    for name in names:
        if not (out / name / TIMING).is_file():
            _time_variant(name, **common)
    results = _results(out, corpus)
    write_text(out / "ablations.json", json.dumps(results, indent=2) + "\n")
    compared = f"Words are compared by {rules_for([''], LANGUAGE)[0].name}; other answers by {ANSWER_RULES}.\n"
    write_text(out / "ablations.md", f"{markdown(results)}\n{compared}")
    write_report([out / name for name in results], out / "report.html", utterances=3)
    if aligned := [out / "alignments" / name for name in ALIGNMENTS if (out / "alignments" / name / RESULT).is_file()]:
        write_report(aligned, out / "alignments.html", utterances=3)
    return results


def _results(out: Path, corpus: Path) -> dict[str, dict[str, Any]]:
    """The results of every variant that is scored and timed, with its differences from the plain variant."""
    samples = [sample for test in ("test", "test_voices") for sample in read_manifest(corpus / f"{test}.jsonl")]
    sentences = {sample.id: sample.text or "" for sample in samples}
    results, plain = {}, None
    for name in VARIANTS:
        if not all((out / name / file).is_file() for file in (RESULT, HARD_ANSWERS, TIMING)):
            continue
        result, timing = (json.loads((out / name / file).read_text(encoding="utf-8")) for file in (RESULT, TIMING))
        easy, hard = tallies = [
            tally(_rows(out / name / file), sentences, language=LANGUAGE) for file in (ANSWERS, HARD_ANSWERS)
        ]
        plain = tallies if name == PLAIN else plain
        results[name] = result | timing | estimates(easy) | {"noise": estimates(hard), "differences": None}
        if plain:
            in_quiet, in_noise = (differences(*pair) for pair in zip(tallies, plain, strict=True))
            results[name]["differences"] = in_quiet | {"noise": in_noise}
    return results


# ---------------------------------------------------------------- data


def _stamp(out: Path, scale: float, seed: int, size: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides the results. A folder with another stamp is refused: results would be mixed in it."""
    file, found = out / STAMP, None
    if file.is_file():
        try:
            found = dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise ConfigError(f"{file} is damaged; name another folder, or delete this one") from None
    dtype = settings.get("dtype") or (found or {}).get("dtype")
    if dtype in (None, "auto"):  # Decided once for all trainings, because a CPU decides by a timing.
        dtype = str(pick_dtype(pick_device()[0].type)[0]).removeprefix("torch.")
    stamp = {"scale": scale, "seed": seed, "size": size, "settings": settings, "dtype": dtype}
    stamp |= {"corpus": embedded_corpus.VERSION, "uneven": UNEVEN, "swapped": SWAPPED}
    stamp |= {"noise": NOISE, "passes": FULL.passes}
    stamp = json.loads(json.dumps(stamp, default=str))
    if found not in (None, stamp):
        changed = [f"{key} = {found.get(key)!r}, now {stamp[key]!r}" for key in stamp if found.get(key) != stamp[key]]
        raise ConfigError(f"out = {str(out)!r} holds ablations with {'; '.join(changed)}; name another folder")
    return stamp


def _write_manifests(corpus: Path, seed: int) -> None:
    """Write the manifests that the demonstration lacks: swapped transcripts, few and uneven samples, no labels."""
    for name in ("stage1", "labels"):
        rows = _rows(corpus / f"{name}.jsonl")
        chosen = random.Random(f"swapped {seed}").sample(range(len(rows)), round(SWAPPED * len(rows)))
        texts = [{key: rows[i][key] for key in ("text", "ctc_text") if key in rows[i]} for i in chosen]
        for i, text in zip(chosen, texts[1:] + texts[:1], strict=True):
            rows[i] |= text
        write_manifest(corpus / f"{name}-swapped.jsonl", rows)
    rows, few = _rows(corpus / "stage2.jsonl"), []
    for task, count in UNEVEN.items():
        few += [row for row in rows if row["task"] == task][:count]
    write_manifest(corpus / "uneven.jsonl", few)
    write_manifest(corpus / "words.jsonl", [{key: row[key] for key in row if key != "ctc_text"} for row in rows])


def _rows(file: Path) -> list[dict[str, Any]]:
    # Not splitlines(): a string in JSON may hold other characters that end a line, such as U+2028.
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


# ---------------------------------------------------------------- training


def _each(work: Callable[..., None], names: list[str], common: dict[str, Any], jobs: int) -> None:
    """Call `work` for each name, `jobs` of them at a time. After an error or Ctrl-C no further one is begun."""
    jobs = min(jobs, len(names))
    if jobs <= 1:
        for name in names:
            work(name, **common)
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // jobs)
    waiting, running = list(names), set()
    with _signals_passed_on() as asked, ProcessPoolExecutor(jobs, context, _begin, (threads,)) as pool:
        try:
            while running or (waiting and not asked):
                while waiting and not asked and len(running) < jobs:
                    with _blocked(signal.SIGINT):  # A new process inherits this, until `_begin` ignores the signal.
                        running.add(pool.submit(_interruptible, work, waiting.pop(0), **common))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
        except BrokenExecutor:
            raise Interrupted("a training was killed or stopped at once; the same command goes on") from None
    if asked:
        raise Interrupted("stopped between two trainings; the same command goes on")


@contextmanager
def _blocked(number: int) -> Iterator[None]:
    """Block a signal for a while."""
    resource_tracker.ensure_running()  # started later, it would unblock the signal
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})


@contextmanager
def _signals_passed_on() -> Iterator[list[int]]:
    """Pass SIGINT and SIGTERM on to the trainings; the list that is given holds the signals so far.

    Each training ends its step and raises Interrupted; the first of these ends the whole.
    """
    asked: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        asked.append(number)
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGINT)  # An idle process ignores it. SIGTERM is used by the pool.

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interruptible(work: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Call `work` in a process of the pool, which ignores SIGINT before and after."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        work(*args, **kwargs)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _begin(threads: int) -> None:
    """Set up a process of the pool."""
    from transformers.utils import logging

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _pass(name: str, folder: Path, manifest: Path, model: Path | None, scale: float, settings: dict[str, Any]) -> Path:
    """Train one pass of the demonstration, unless it is done; return its model's folder."""
    if (folder / "model" / "config.json").is_file():
        _delete_checkpoints(folder)
        return folder / "model"
    wanted = FULL.passes[name]
    steps = max(1, round(scale * wanted["steps"]))
    shortened = wanted | {"steps": steps, "warmup_steps": min(wanted["warmup_steps"], steps // 4), "save_steps": 50}
    config = {"train": [manifest], "out": folder, "model": model, "accumulation": 1, "spec_augment": False}
    model, _, _ = train_stage(make_config(STAGE[name], **config | shortened | settings))
    _delete_checkpoints(folder)
    return model


def _delete_checkpoints(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def _train_alignment(name: str, *, out: Path, corpus: Path, scale: float, settings: dict[str, Any]) -> None:
    """Train stage I of ALIGNMENTS[name], the words and then the labels; score the CTC reading after the words."""
    folder, one, model = out / "alignments" / name, ALIGNMENTS[name], None
    if (folder / RESULT).is_file():
        return
    say(f"alignment {name}")
    for step in ("stage1", "labels"):
        manifest = corpus / f"{step}{'-swapped' if one.swapped else ''}.jsonl"
        changes = settings | (one.settings if model is None else {})
        model = _pass(step, folder / step, manifest, model, scale, changes)
    network, processor = load_model(folder / "stage1" / "model")
    spoken = one_task(read_manifest(corpus / "test.jsonl"), "transcribe")
    scores = evaluate_ctc(network, processor, spoken, language=LANGUAGE)
    result = {"wer": scores.wer, "jump": _jump(_rows(folder / "stage1" / "log.jsonl"))}
    write_text(folder / RESULT, json.dumps(result, indent=2) + "\n")


def _run_variant(name: str, *, out: Path, corpus: Path, scale: float, settings: dict[str, Any]) -> None:
    """Train and score stages II and III of VARIANTS[name]."""
    variant = VARIANTS[name]
    say(f"variant {name}: {variant.about}")
    aligned = out / "alignments" / variant.alignment if variant.alignment else None
    model = aligned / variant.after / "model" if aligned else None
    manifest = corpus / f"{variant.manifest}.jsonl"
    model = _pass("stage2", out / name / "stage2", manifest, model, scale, settings | variant.settings)
    model = _pass("stage3", out / name / "stage3", corpus / "stage3.jsonl", model, scale, settings)
    result: dict[str, Any] = {"about": variant.about, "alignment": None}
    if aligned:
        result["alignment"] = json.loads((aligned / RESULT).read_text(encoding="utf-8"))
    result |= _course_of_stage_2(_rows(out / name / "stage2" / "log.jsonl"))
    result["samples"] = _answer_all(model, read_manifest(corpus / "test.jsonl"), out / name)
    write_text(out / name / RESULT, json.dumps(result, indent=2) + "\n")


def _time_variant(name: str, *, out: Path, corpus: Path, scale: float, settings: dict[str, Any]) -> None:
    """Time a few more steps of a variant's stage II, and its model's answers to a few recordings."""
    variant = VARIANTS[name]
    say(f"timing of {name}")
    steps = {"steps": UNTIMED_STEPS + TIMED_STEPS, "warmup_steps": 0, "log_steps": 1, "quiet": True}
    model, folder = out / name / "stage2" / "model", out / name / "timing"
    shutil.rmtree(folder, ignore_errors=True)
    _pass("stage2", folder, corpus / f"{variant.manifest}.jsonl", model, 1.0, settings | variant.settings | steps)
    ends = [entry["seconds"] for entry in _rows(folder / "log.jsonl")]
    shutil.rmtree(folder)
    taken = [after - before for before, after in pairwise(ends)]
    samples = one_task(read_manifest(corpus / "test.jsonl"), "transcribe")[:TIMED]
    timing = {"seconds_a_step": statistics.median(taken[UNTIMED_STEPS - 1 :])}
    timing |= _cost(*load_model(out / name / "stage3" / "model"), samples)
    write_text(out / name / TIMING, json.dumps(timing, indent=2) + "\n")
    gc.collect()


def _jump(log: list[dict[str, Any]]) -> float:
    """The largest ratio of a logged CTC loss to the median of the three before it."""
    losses = [entry["ctc_loss"] for entry in log if entry.get("ctc_loss") is not None]
    return max((loss / statistics.median(losses[i : i + 3]) for i, loss in enumerate(losses[3:])), default=1.0)


def _course_of_stage_2(log: list[dict[str, Any]]) -> dict[str, Any]:
    """`lm_loss` after a quarter, a half and all of stage II, and `drawn`: the share of each task in its samples."""
    drawn: Counter[str] = Counter()
    for entry in log:
        drawn.update(entry.get("tasks") or {})
    losses = [entry["lm_loss"] for entry in log if entry.get("lm_loss") is not None]
    return {
        "lm_loss": [losses[place] for place in (len(losses) // 4, len(losses) // 2, len(losses) - 1)],
        "drawn": {task: count / drawn.total() for task, count in sorted(drawn.items())},
    }


# ---------------------------------------------------------------- scoring


def _answer_all(folder: Path, samples: list[Sample], out: Path) -> dict[str, int]:
    """Write the model's answers and the summary that the report reads; return the number of samples of each task."""
    scores = _answer(folder, [sample for task in TASKS for sample in one_task(samples, task)], out / ANSWERS)
    summary = {"stage3": {"wer": scores.wer, "accuracy": scores.accuracy}, "samples": scores.samples}
    summary["normaliser"] = scores.normaliser
    write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    return scores.samples


def _answer(folder: Path, samples: list[Sample], file: Path) -> Scores:
    """Let the model of a folder answer samples, and write the answers to `file`."""
    scores = score(*load_model(folder), samples)
    keys = "sample", "task", "reference", "answer"
    rows = (dict(zip(keys, row, strict=True)) for row in scores.answers)
    write_manifest(file, (row | {"normaliser": scores.normaliser[row["task"]]} for row in rows))
    gc.collect()  # The Trainer and its model refer to each other, so only the garbage collector frees them.
    return scores


def _answer_in_noise(name: str, *, out: Path, corpus: Path, **_: Any) -> None:
    """Let a variant answer the harder test: voices that no training has heard, in white noise."""
    say(f"{name} in noise")
    samples = read_manifest(corpus / "test_voices.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        chosen = [_noisy(sample, Path(folder)) for task in HARD_TASKS for sample in one_task(samples, task)]
        _answer(out / name / "stage3" / "model", chosen, out / name / HARD_ANSWERS)


def _noisy(sample: Sample, folder: Path) -> Sample:
    """The sample with white noise NOISE dB below it. The noise follows from the file's name, so all models hear it."""
    sound = load_audio(sample.audio)
    noise = np.random.default_rng(zlib.crc32(sample.audio.name.encode())).standard_normal(len(sound), np.float32)
    level = np.sqrt(np.square(sound).mean()) * 10 ** (-NOISE / 20)
    file = folder / sample.audio.name
    soundfile.write(file, sound + level * noise, SAMPLING_RATE, subtype="FLOAT")
    return sample.model_copy(update={"audio": file})


@torch.no_grad()
def _cost(model: Any, processor: Any, samples: list[Sample]) -> dict[str, float]:
    """Measure one recording at a time.

    Returns:
        `kept_per_second`: kept frames in a second of audio. `positions`: mean number of positions that the LLM reads.
        `seconds_to_first_token`: median time from the features to the LLM's first token.
    """
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

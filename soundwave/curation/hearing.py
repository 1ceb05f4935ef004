"""Transcribe recordings with a Whisper of the user's choice: here, in processes of their own, or on a Ray cluster.

Recordings come in batches, and a batch is always read as one: what it consists of changes the rounding of its products.
Every batch is read by the same number of threads for the same reason. So the texts do not depend on who reads which
batch, nor when.
"""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from soundwave.backbones.check import check_whisper
from soundwave.backbones.wheels import resolve
from soundwave.data.audio import LONGEST_SAMPLES, SAMPLING_RATE, AudioError, load_audio
from soundwave.data.collate import SILENCE
from soundwave.hardware import keep_memory_flat, memory_named, pick_dtype

LONGEST_TEXT = 1 / 2  # of what the decoder holds (448 tokens); OpenAI's own decoding has the same limit
BLOCKS = 4000  # Ray hands out so many pieces of the work at most


class Clip(NamedTuple):
    """A recording, or a part of one, and the number of its line."""

    line: int
    audio: str
    offset: float
    duration: float | None


Heard = dict[str, Any]  # `line`; `seconds` and `pred_text`, or the `fault` of a recording that cannot be used


class Whisper:
    """A Whisper that transcribes batches of clips of at most 30 s: its most probable tokens, without timestamps.

    Args:
        name: Hub id, folder or embedded name.
        device: "cpu", "cuda" or "cuda:1".
        threads: of a product on the CPU, for the whole process.
        language: what is spoken; by default a multilingual Whisper decides for each clip.
    """

    def __init__(self, name: str, *, device: str = "cpu", threads: int = 1, language: str | None = None):
        from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

        torch.set_num_threads(threads)
        folder = resolve(name)
        self.device, self.dtype = torch.device(device), dtype_of(device)
        loaded = WhisperForConditionalGeneration.from_pretrained(folder, dtype=self.dtype, use_safetensors=True)
        self.model = loaded.to(self.device).eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.extractor = WhisperFeatureExtractor.from_pretrained(folder)
        longest = int(LONGEST_TEXT * self.model.config.max_target_positions)
        self.settings: dict[str, Any] = {"max_new_tokens": longest, "do_sample": False, "num_beams": 1}
        if getattr(self.model.generation_config, "is_multilingual", False):
            self.settings |= {"task": "transcribe", "language": language}

    def __call__(self, batch: Sequence[Clip]) -> list[Heard]:
        """What is said in each clip."""
        heard: list[Heard] = []
        clips: list[np.ndarray] = []
        for clip in batch:
            heard.append({"line": clip.line})
            try:
                samples = load_audio(clip.audio, offset=clip.offset, duration=clip.duration)
                if len(samples) > LONGEST_SAMPLES:
                    fault = f"lasts {len(samples) / SAMPLING_RATE:g} s, and Whisper hears 30 s; cut it"
                    raise AudioError(clip.audio, fault)
                if np.abs(samples).max(initial=0) <= SILENCE:
                    raise AudioError(clip.audio, "is silent; record it again")
            except AudioError as error:
                heard[-1]["fault"] = error.fault
            else:
                heard[-1]["seconds"] = round(len(samples) / SAMPLING_RATE, 4)
                clips.append(samples)
        texts = iter(self._texts(clips) if clips else [])
        for each in heard:
            if "fault" not in each:
                each["pred_text"] = next(texts)
        return heard

    def _texts(self, clips: list[np.ndarray]) -> list[str]:
        with torch.inference_mode(), memory_named(f"with {len(clips)} clips in a batch", "lower --batch-size"):
            found = self.extractor(clips, sampling_rate=SAMPLING_RATE, return_tensors="pt")
            features = found.input_features.to(self.device, self.dtype)
            ids = self.model.generate(features, **self.settings)
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


def dtype_of(device: str) -> torch.dtype:
    """float32 on a CPU: which of the two is faster there is a matter of the moment, and the texts must not be."""
    return torch.float32 if device == "cpu" else pick_dtype("cuda")[0]


def check(name: str, language: str | None) -> None:
    """Refuse a Whisper that cannot be used, before anything is read.

    Raises:
        ValueError: there is no such Whisper, or it does not hear the language.
    """
    from transformers import GenerationConfig
    from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

    check_whisper(name)
    if language is None:
        return
    if language.lower() not in LANGUAGES and language.lower() not in TO_LANGUAGE_CODE:
        raise ValueError(f"language = {language!r}, which Whisper does not know; give a code such as en or de")
    settings = GenerationConfig.from_pretrained(resolve(name))
    english = language.lower() in ("en", "english")
    if not english and not getattr(settings, "is_multilingual", False):
        raise ValueError(f"language = {language!r}, but {name} hears English only; name a multilingual Whisper")


def read_here(batches: Sequence[Sequence[Clip]], settings: Mapping[str, Any]) -> Iterator[list[Heard]]:
    """Read batches in this process. `settings` are the arguments of `Whisper`."""
    threads = torch.get_num_threads()
    try:
        yield from map(Whisper(**settings), batches)
    finally:
        torch.set_num_threads(threads)


def read_in_processes(
    batches: Sequence[Sequence[Clip]], settings: Mapping[str, Any], workers: int
) -> Iterator[list[Heard]]:
    """Read batches in so many processes, each with a Whisper of its own; each result as it comes.

    Raises:
        ChildProcessError: a process was ended from outside, for example by a system without memory.
    """
    context: Any = multiprocessing.get_context("spawn")
    if (
        "forkserver" in multiprocessing.get_all_start_methods()
    ):  # one process imports torch, and the others are its copies
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "transformers.models.whisper.modeling_whisper"])
    gpus = torch.cuda.device_count() if settings["device"] == "cuda" else 0
    count = context.Value("i", 0)
    with (
        _ending_all(),
        ProcessPoolExecutor(
            workers, mp_context=context, initializer=_begin, initargs=(dict(settings), count, gpus)
        ) as pool,
    ):
        rest, waiting = iter(batches), set[Future[list[Heard]]]()
        try:
            while True:
                for batch in rest:
                    waiting.add(pool.submit(_read, batch))
                    if len(waiting) >= 2 * workers:
                        break
                if not waiting:
                    return
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for each in done:
                    yield each.result()
        except BrokenProcessPool:
            raise ChildProcessError(
                "a process that transcribes has ended, perhaps for want of memory; use fewer --workers or a smaller "
                "--batch-size: the same command goes on from here"
            ) from None


@contextmanager
def _ending_all() -> Iterator[None]:
    """End the processes that were begun within its `with` block, if an error ends it: nobody waits for their work."""
    before = set(multiprocessing.active_children())
    try:
        yield
    except BaseException:
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        raise


_whisper: Whisper | None = None  # of a process that `_begin` has begun


def _begin(settings: dict[str, Any], count: Any, gpus: int) -> None:
    """Load the Whisper of a worker process, which ends when its parent does, even by kill -9."""
    global _whisper
    from transformers.utils import logging

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the others
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    keep_memory_flat()
    with count.get_lock():
        number, count.value = count.value, count.value + 1
    if gpus:
        settings["device"] = f"cuda:{number % gpus}"
    _whisper = Whisper(**settings)


def _read(batch: Sequence[Clip]) -> list[Heard]:
    assert _whisper is not None
    return _whisper(batch)


@contextmanager
def ray_cluster() -> Iterator[str]:
    """Within its `with` block there is a Ray cluster: that of RAY_ADDRESS, or of this machine, or else one begun here.

    Gives where its machines compute, "cuda" or "cpu".
    """
    try:
        import ray.data
    except ImportError:
        raise ValueError("Ray Data is not installed; get it by pip install 'soundwave-fused[ray]'") from None
    was_there = ray.is_initialized()
    if not was_there:
        ray.init(log_to_driver=False, logging_level="ERROR")
    try:
        yield "cuda" if ray.cluster_resources().get("GPU") else "cpu"
    finally:
        if not was_there:
            ray.shutdown()


def read_on_ray(
    batches: Sequence[Sequence[Clip]], settings: Mapping[str, Any], workers: int | None
) -> Iterator[list[Heard]]:
    """Read batches with Ray Data in a `ray_cluster`, by `workers` actors or as many as fit; each result as it comes.

    The recordings must have the same paths on all machines of the cluster.
    """
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    on_gpu, threads = settings["device"] == "cuda", settings["threads"]
    resources = ray.cluster_resources()
    places = resources.get("GPU", 0) if on_gpu else resources.get("CPU", 1) / threads
    rows = [{"batch": json.dumps(batch)} for batch in batches]
    found = ray.data.from_items(rows, override_num_blocks=min(len(rows), BLOCKS)).map(
        _OnRay,
        fn_constructor_args=(dict(settings),),
        compute=ray.data.ActorPoolStrategy(size=workers or max(1, int(places))),
        num_cpus=threads,
        num_gpus=1 if on_gpu else None,
    )
    for row in found.iter_rows():
        yield json.loads(row["heard"])


class _OnRay:
    """A worker of Ray Data. Batches and results are JSON, because a table would need one type for each column."""

    def __init__(self, settings: dict[str, Any]):
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.whisper = Whisper(**settings)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        batch = [Clip(*clip) for clip in json.loads(row["batch"])]
        return {"heard": json.dumps(self.whisper(batch))}

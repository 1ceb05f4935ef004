"""Requests are answered together: one thread owns the model, another one reads recordings for it.

    submit ──> reader: opens recordings, cuts them into windows, makes features ──> windows ──> worker: model ──> tell

The reader takes one window of each recording in turn, so that an hour of speech does not keep a sentence waiting. It
stops while `AHEAD` batches of windows wait, so memory does not grow with the lengths of recordings. The worker takes
the window that has waited longest and adds the next ones of the same kind (transcripts, chats), until the batch is
full or its oldest window has waited for `max_wait_ms`. Windows of several recordings and requests meet in a batch; one
that is so short or long that more than half of the batch would be padding waits for the next.

Where the language model is in another process, `ELSEWHERE` batches are answered at a time, each by a thread of its own:
one is encoded while others are written.

Every request ends once, with `Done` or with `Failed`. A request that is cancelled leaves the queue at once; in a chat
that is being answered its row ends with the next token. If a batch fails, its halves are tried alone, so that one bad
request does not take others with it, and a batch that is too large for the memory still gets its answers.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from soundwave.data.audio import LONGEST_SAMPLES, SAMPLING_RATE, AudioError, read_blocks, seconds_of
from soundwave.hardware import is_out_of_memory
from soundwave.inference.answer import LoadedModel, answer, end_tokens
from soundwave.inference.drafts import reason_against_drafts
from soundwave.inference.long import Recording
from soundwave.inference.reading import Reader, Window, cut_into_windows
from soundwave.inference.transcript import Transcript
from soundwave.model.chat import ChatError, Turn
from soundwave.serve.errors import ApiError, shutting_down
from soundwave.serve.settings import Limits

AHEAD = 2  # batches of windows that are read ahead
ELSEWHERE = 4  # batches that are answered at a time, if the language model is in another process
SHORTEST = 2.0  # s; what a window costs besides its length is as much as this
WASTE = 2.0  # a batch is at most this many times as long, with its padding, as its windows
FRAMES_PER_SECOND = 25  # of speech that the language model gets at most, if nothing is shrunk
SMOOTHING = 0.1  # weight of the newest request in the mean time that one takes
log = logging.getLogger(__name__)


class Text(NamedTuple):
    """More text of an answer that is streamed."""

    delta: str


class Done(NamedTuple):
    """The end of an answer.

    Attributes:
        transcript: text and length of the recording; of a chat, the answer.
        cut_off: the longest answer allowed has cut it off.
        prompt_tokens, audio_tokens: inputs of the language model, speech included, and the speech alone.
        tokens: tokens of the answer, with the end token. 0 for a transcript, which is not counted.
    """

    transcript: Transcript
    cut_off: bool = False
    prompt_tokens: int = 0
    audio_tokens: int = 0
    tokens: int = 0


class Failed(NamedTuple):
    """The end without an answer."""

    error: ApiError


Event: TypeAlias = "Text | Done | Failed"


@dataclass(eq=False)
class Job:
    """A request, and what has come of it so far.

    Attributes:
        tell: called with each event, from one of the engine's threads; the last one is `Done` or `Failed`.
        audio: the recording's file; None for a chat without one.
        turns: a chat; None to transcribe the recording.
        max_new_tokens: longest answer in a chat.
        timestamps: "segment" or "word" gives a transcript times.
        streams: text is told as it comes.
    """

    tell: Callable[[Event], None]
    audio: Path | None = None
    turns: Sequence[Turn] | None = None
    max_new_tokens: int = 256
    timestamps: str | None = None
    streams: bool = False

    submitted: float = field(default_factory=time.monotonic)
    windows: Iterator[Window] | None = None
    recording: Recording = field(default_factory=lambda: Recording(0))
    waiting: int = 0  # windows without a text
    ended: bool = False
    sent: str = ""  # as far as it is streamed

    @property
    def kind(self) -> str:
        return "transcript" if self.turns is None else "chat"


class Item(NamedTuple):
    """A part of a request that the model answers at once.

    Attributes:
        window: of a transcript.
        clip: features [n_mels, T_mel] of a chat's recording.
        arrived: when it began to wait for the model.
    """

    job: Job
    window: Window | None
    clip: Tensor | None
    seconds: float
    arrived: float


class Engine:
    """Answers requests with a model, many at a time.

    Args:
        loaded: the model. Nothing else may use it from now on.
        limits: of these, `max_batch`, `max_wait_ms`, `max_seconds` and `max_window_tokens` are the engine's.
        on_batch: called after each batch with its kind, its windows, their seconds, and the seconds that it took.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        limits: Limits,
        on_batch: Callable[[str, int, float, float], None] | None = None,
    ):
        self.model, self.processor = loaded
        self.limits, self.on_batch = limits, on_batch or (lambda *_: None)
        self.answers = self.model.config.stage != 1  # a model of stage I transcribes by CTC only
        self.ends = end_tokens(*loaded) if self.answers else set()
        without_drafts = not self.answers or reason_against_drafts(self.model.language_model)
        self.reader = Reader(
            loaded,
            batch_size=limits.max_batch,
            max_new_tokens=limits.max_window_tokens,
            draft="none" if without_drafts else "ctc",
        )
        config = self.model.language_model.config.get_text_config() if self.answers else None
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self.seconds_per_request = 1.0
        self.changed = threading.Condition()
        self.jobs: set[Job] = set()
        self.busy: Counter[Job] = Counter()  # how many windows of each are with the model
        self.to_read: deque[Job] = deque()
        self.items: deque[Item] = deque()
        self.closing = False
        batches = ELSEWHERE if getattr(self.model.language_model, "runs_elsewhere", False) else 1
        self.threads = [
            threading.Thread(target=target, name=f"soundwave-{name}", daemon=True)
            for name, target in (("reader", self._read), *[("model", self._work)] * batches)
        ]

    # ------------------------------------------------------------ called by the server

    def start(self) -> None:
        """Start the threads."""
        for thread in self.threads:
            thread.start()

    @property
    def is_running(self) -> bool:
        """All threads are alive, and the engine is not closing."""
        return not self.closing and all(thread.is_alive() for thread in self.threads)

    @property
    def load(self) -> tuple[int, int]:
        """Requests that have no answer yet, and windows that wait for the model."""
        with self.changed:
            return len(self.jobs), len(self.items)

    def submit(self, job: Job) -> None:
        """Take a request. Its events are told by `job.tell`.

        Raises:
            ApiError: the engine is closing.
        """
        with self.changed:
            if self.closing:
                raise shutting_down()
            self.jobs.add(job)
            if job.audio is None:
                job.recording.read, job.waiting = True, 1
                self.items.append(Item(job, None, None, 0.0, time.monotonic()))
            else:
                self.to_read.append(job)
            self.changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Nobody waits for this request any more. Nothing more is told of it."""
        with self.changed:
            if not job.ended:
                self._forget(job)

    def fail_all(self, error: ApiError) -> None:
        """End every request that has no answer yet."""
        with self.changed:
            for job in list(self.jobs):
                self._end(job, Failed(error))

    def close(self, patience: float = 10.0) -> None:
        """Stop: what has no answer yet fails, and the threads end after the batch that they are in."""
        with self.changed:
            self.closing = True
            self.fail_all(shutting_down())
            self.changed.notify_all()
        for thread in self.threads:
            if thread.is_alive():
                thread.join(patience)

    # ------------------------------------------------------------ the ends of a request

    def _forget(self, job: Job) -> None:
        """With the lock held: the request is no longer worked for."""
        job.ended = True
        self.jobs.discard(job)
        if any(item.job is job for item in self.items):
            self.items = deque(item for item in self.items if item.job is not job)
        self.changed.notify_all()

    def _end(self, job: Job, event: Done | Failed) -> None:
        """The one end of a request."""
        with self.changed:
            if job.ended:
                return
            self._forget(job)
            if isinstance(event, Done):
                took = time.monotonic() - job.submitted
                self.seconds_per_request += SMOOTHING * (took - self.seconds_per_request)
        job.tell(event)

    def _end_if_complete(self, job: Job) -> None:
        if job.recording.read and not job.waiting and not job.ended:
            self._end(job, Done(job.recording.transcript(job.timestamps), job.recording.cut_off))

    # ------------------------------------------------------------ the reader

    def _read(self) -> None:
        """The reader's thread: one window of each recording in turn."""
        while (job := self._next_to_read()) is not None:
            try:
                goes_on = self._read_window(job)
            except AudioError as error:
                self._end(job, Failed(ApiError(400, f"the recording {error.fault}", param="file", code="bad_audio")))
            except ApiError as error:
                self._end(job, Failed(error))
            except Exception as error:
                if not job.ended:  # else its file may be gone
                    log.exception("a recording could not be read")
                    self._end(job, Failed(_internal(error)))
            else:
                if goes_on:
                    with self.changed:
                        self.to_read.append(job)
                    continue
                with self.changed:
                    job.recording.read = True
                    self._end_if_complete(job)
            job.windows = None  # closes the file

    def _next_to_read(self) -> Job | None:
        with self.changed:
            while not self.closing:
                if self.to_read and len(self.items) < AHEAD * self.limits.max_batch:
                    if not (job := self.to_read.popleft()).ended:
                        return job
                    job.windows = None
                else:
                    self.changed.wait()
        return None

    def _read_window(self, job: Job) -> bool:
        """Read one window of a recording. False: it has no more."""
        if job.windows is None:
            self._check_seconds(job, seconds_of(job.audio))
            job.windows = cut_into_windows(read_blocks(job.audio))
        window = next(job.windows, None)
        if window is None:
            return False
        chats = job.turns is not None
        job.recording.seconds += window.seconds - window.before
        self._check_seconds(job, job.recording.seconds)  # a header may have told less
        # Nothing is said in a silent window; one that shares a part with others is read for their sake. In a chat
        # somebody may ask whether there are any words.
        if not chats and window.silent and not (window.before or window.after):
            return True
        clip = self.processor.features(window.samples) if chats else None
        with self.changed:
            if not job.ended:
                job.waiting += 1
                self.items.append(Item(job, None if chats else window, clip, window.seconds, time.monotonic()))
                self.changed.notify_all()
        return True

    def _check_seconds(self, job: Job, seconds: float) -> None:
        if job.turns is not None and seconds * SAMPLING_RATE > LONGEST_SAMPLES:
            raise _too_long_for_a_chat(seconds)
        if seconds > self.limits.max_seconds:
            raise ApiError(
                400,
                f"the recording lasts {seconds:.0f} s, but this server takes {self.limits.max_seconds:g} s at most; "
                "send it in parts",
                param="file",
                code="audio_too_long",
            )

    # ------------------------------------------------------------ the model

    def _work(self) -> None:
        """The model's thread."""
        while batch := self._next_batch():
            began = time.monotonic()
            self._answer(batch)
            took = time.monotonic() - began
            with self.changed:
                self.busy -= Counter(item.job for item in batch)
                self.changed.notify_all()
            self.on_batch(batch[0].job.kind, len(batch), sum(item.seconds for item in batch), took)
            del batch  # its samples

    def _next_batch(self) -> list[Item]:
        """Wait for windows and take a batch of them; empty if the engine closes."""
        with self.changed:
            while not self.closing:
                free = [item for item in self.items if item.job not in self.busy]
                if not free:
                    self.changed.wait()
                    continue
                left = free[0].arrived + self.limits.max_wait_ms / 1000 - time.monotonic()
                if len(free) < self.limits.max_batch and left > 0:
                    self.changed.wait(left)
                    continue
                batch = choose(free, self.limits.max_batch)
                taken = set(map(id, batch))
                self.busy += Counter(item.job for item in batch)
                self.items = deque(item for item in self.items if id(item) not in taken)
                self.changed.notify_all()
                return batch
        return []

    def _answer(self, batch: list[Item]) -> None:
        """Answer a batch; if it fails, its halves."""
        try:
            if batch[0].job.turns is None:
                self._transcribe(batch)
            else:
                self._chat(batch)
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, the other requests get their answers
            memory, fault = is_out_of_memory(error), error
            if len(batch) == 1:
                log.error("a request could not be answered", exc_info=error)
                ours = error if isinstance(error, ApiError) else _out_of_memory() if memory else _internal(error)
                self._end(batch[0].job, Failed(ours))
                return
            log.warning("a batch of %d failed, its halves are tried: %r", len(batch), error)
            fault.__traceback__ = None  # it holds the tensors of the batch
        if memory and torch.cuda.is_available():
            torch.cuda.empty_cache()
        middle = len(batch) // 2
        self._answer(batch[:middle])
        self._answer(batch[middle:])

    def _transcribe(self, batch: list[Item]) -> None:
        batch = [item for item in batch if not item.job.ended]
        if not batch:
            return
        windows = [item.window for item in batch if item.window is not None]
        texts = self.reader.read(windows, timed=any(item.job.timestamps for item in batch))
        with self.changed:
            for item, window, text in zip(batch, windows, texts, strict=True):
                job = item.job
                if job.ended:
                    continue
                for settled in job.recording.take(window, text):
                    part = job.recording.add(*settled, job.timestamps).text
                    if job.streams and part:
                        job.tell(Text(f" {part}" if job.sent else part))
                        job.sent = part
                job.waiting -= 1
                self._end_if_complete(job)

    def _chat(self, batch: list[Item]) -> None:
        batch = [item for item in batch if not item.job.ended and self._fits(item)]
        if not batch:
            return
        jobs = [item.job for item in batch]
        rows: list[list[int]] = [[] for _ in jobs]

        def watch(written: list[list[int]]) -> list[bool]:
            for number, (job, tokens) in enumerate(zip(jobs, written, strict=True)):
                kept = list(takewhile(lambda token: token not in self.ends, tokens))
                rows[number] = tokens[: min(len(kept) + 1, job.max_new_tokens)]
                if job.streams and not job.ended:
                    self._stream(job, kept[: job.max_new_tokens])
            return [job.ended or len(row) >= job.max_new_tokens for job, row in zip(jobs, rows, strict=True)]

        lengths: list[int] = []
        texts = answer(
            self.model,
            self.processor,
            [job.turns or () for job in jobs],
            [item.clip for item in batch],
            max_new_tokens=max(job.max_new_tokens for job in jobs),
            watch=watch,
            prompt_lengths=lengths,
        )
        for item, text, row, length in zip(batch, texts, rows, lengths, strict=True):
            job = item.job
            if job.streams and not job.ended:
                if not text.startswith(job.sent):  # a tokenizer that writes the beginning anew; it cannot be taken back
                    self._end(job, Failed(_internal(ValueError("the text changed while it was streamed"))))
                elif rest := text[len(job.sent) :]:
                    job.tell(Text(rest))
            cut_off = len(row) >= job.max_new_tokens and self.ends.isdisjoint(row)
            text_tokens = len(self.processor.prompt_ids(job.turns or (), has_audio=item.clip is not None))
            speech = length - text_tokens + 1 if item.clip is not None else 0  # its place is a token, too
            transcript = Transcript(text, round(job.recording.seconds, 3))
            self._end(job, Done(transcript, cut_off, length, speech, len(row)))

    def _stream(self, job: Job, tokens: list[int]) -> None:
        """Tell what is new of an answer. White space and parts of a character wait for what follows."""
        text = self.processor.tokenizer.decode(tokens, skip_special_tokens=True).lstrip().rstrip("\ufffd").rstrip()
        if len(text) > len(job.sent) and text.startswith(job.sent):
            job.tell(Text(text[len(job.sent) :]))
            job.sent = text

    def _fits(self, item: Item) -> bool:
        """Whether a chat can be answered; if not, it has failed."""
        job = item.job
        try:
            prompt = len(self.processor.prompt_ids(job.turns or (), has_audio=item.clip is not None))
        except (ChatError, ValueError) as error:
            self._end(job, Failed(ApiError(400, str(error), param="messages", code="bad_messages")))
            return False
        most = prompt + round(item.seconds * FRAMES_PER_SECOND) + job.max_new_tokens
        if self.context is None or most <= self.context:
            return True
        message = (
            f"the language model takes {self.context} tokens, but the messages ({prompt}), the recording (up to "
            f"{round(item.seconds * FRAMES_PER_SECOND)}) and max_tokens ({job.max_new_tokens}) may need {most}; "
            "shorten the messages or lower max_tokens"
        )
        self._end(job, Failed(ApiError(400, message, param="messages", code="context_length_exceeded")))
        return False


def choose(items: Sequence[Item], most: int) -> list[Item]:
    """The oldest item, and those after it that go well with it into one batch of at most `most`.

    The windows of a recording keep their order: one of them that has to wait keeps those behind it waiting, too.
    """
    batch = [items[0]]
    longest = total = max(items[0].seconds, SHORTEST)
    waits: set[int] = set()  # ids of jobs
    for item in list(items)[1:]:
        if len(batch) == most:
            break
        seconds = max(item.seconds, SHORTEST)
        padded = max(longest, seconds) * (len(batch) + 1)
        fits = item.job.kind == batch[0].job.kind and padded <= WASTE * (total + seconds)
        if fits and id(item.job) not in waits:
            batch.append(item)
            longest, total = max(longest, seconds), total + seconds
        else:
            waits.add(id(item.job))
    return batch


def _internal(error: Exception) -> ApiError:
    return ApiError(500, f"the server made an error ({type(error).__name__}), which its log names", code="internal")


def _out_of_memory() -> ApiError:
    return ApiError(503, "the memory does not suffice for this request; shorten it", code="out_of_memory")


def _too_long_for_a_chat(seconds: float) -> ApiError:
    return ApiError(
        400,
        f"the recording lasts {seconds:.1f} s or more, but in a chat the model hears 30 s at most; send a part of it, "
        "or transcribe it with /v1/audio/transcriptions",
        param="messages",
        code="audio_too_long",
    )

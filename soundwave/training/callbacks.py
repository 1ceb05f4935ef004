"""Callbacks of the trainer: progress on the terminal, TensorBoard's log, signals, and the time that training takes."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from soundwave.training.distributed import Processes
from soundwave.training.journal import Journal, say, write_text


class ProgressBar(TrainerCallback):
    """A progress bar on the terminal: time left, losses, seconds of audio per second, memory."""

    def __init__(self, title: str):
        self.title = title
        self.bar: tqdm | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.title, dynamic_ncols=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, *_: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if self.bar is not None and "loss" in logs:
            self.bar.set_postfix(shown_figures(logs))

    def close(self) -> None:
        """Close the bar, so that the next output begins on a line of its own."""
        if self.bar is not None:
            self.bar.close()


class ProgressLines(TrainerCallback):
    """The same figures without a terminal: one plain line per logging step."""

    def __init__(self, title: str):
        self.title = title

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self.first, self.start = state.global_step, time.perf_counter()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, *_: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        if "loss" not in logs:
            return
        done, wanted = state.global_step - self.first, state.max_steps - state.global_step
        left = timedelta(seconds=round((time.perf_counter() - self.start) / done * wanted))
        figures = " | ".join(f"{name} {value}" for name, value in shown_figures(logs).items())
        say(f"{self.title} | step {state.global_step}/{state.max_steps} | {figures} | {left} left")

    def close(self) -> None:
        """Do nothing: there is no bar to close."""


def shown_figures(logs: dict[str, float]) -> dict[str, str]:
    """The figures of a log entry that are shown during training, as text by name."""
    figures = {name: f"{logs[name]:.3f}" for name in ("ctc_loss", "lm_loss") if name in logs}
    if "blank_share" in logs:
        figures["blank"] = f"{logs['blank_share']:.0%}"
    if logs.get("kept_per_label") is not None:
        figures["kept per label"] = f"{logs['kept_per_label']:.2f}"
    if audio := logs.get("audio_per_second"):  # none with text alone; slow machines hear less than 1 s a second
        figures["audio"] = f"{audio:.0f} s/s" if audio >= 10 else f"{audio:.2g} s/s"
    figures["memory"] = f"{peak_memory() / 2**30:.1f} GiB"
    return figures


def peak_memory() -> int:
    """Peak memory so far in bytes: that of the GPU if there is one, else that of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Interrupted(RuntimeError):
    """Training was asked to stop and has saved a checkpoint. The message says where it stopped and how to continue."""


class StopOnSignal(TrainerCallback):
    """Within its `with` block, Ctrl-C or SIGTERM ends training after the current step, with a checkpoint.

    A second signal ends the process at once. This holds also where the signal was ignored before the block, as in a
    command that a script starts in the background. Of several processes, all end after the same step.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    ONE_REQUEST = 1.0  # s; within this time a repeated signal is the same request, sent by terminal and parent process

    def __init__(self, processes: Processes | None = None) -> None:
        self.processes = processes or Processes()
        self.asked, self._asked_at = False, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():  # Python sets handlers in no other thread
            self._before = {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ask(self, number: int, _: Any) -> None:
        if self.asked:
            if time.monotonic() - self._asked_at > self.ONE_REQUEST:
                self.__exit__()
                if signal.getsignal(number) == signal.SIG_IGN:
                    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.asked, self._asked_at = True, time.monotonic()
        if self.processes.first:
            # Not `say`: the code that the signal interrupted may hold its lock.
            os.write(2, b"\nstopping after the current step, which is saved; press or send it again to stop at once\n")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.processes.any(self.asked):
            self.asked = True
            control.should_save = control.should_training_stop = True


def ignore_interrupts(worker: int) -> None:
    """Make a data worker ignore the signals: all processes of a group get them, but the trainer decides when to end."""
    for number in StopOnSignal.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Board(TensorBoardCallback):
    """TensorBoard's callback. Training goes on without it where its files cannot be written."""

    off = False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._unless_off(super().on_train_begin, *args, **kwargs)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self._unless_off(super().on_log, *args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._unless_off(super().on_train_end, *args, **kwargs)

    def _unless_off(self, event: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        try:
            if not self.off:
                event(*args, **kwargs)
        except OSError as error:
            self.off, self.tb_writer = True, None
            say(f"TensorBoard's log cannot be written ({error.strerror or error}); training goes on without it")


class Clock(TrainerCallback):
    """Writes `run.json` when the checkpoint is loaded, applies this run's settings to it, and measures the time.

    Args:
        note: content of `run.json`.
    """

    def __init__(self, journal: Journal, note: dict[str, Any]):
        self.journal, self.note = journal, note

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        *_: Any,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: LambdaLR,
        **kwargs: Any,
    ) -> None:
        # The loaded state has the intervals and the learning rate of the run before: replace them by this run's.
        state.compute_steps(args, state.max_steps)
        if set(lr_scheduler.base_lrs) != {args.learning_rate}:
            lr_scheduler.base_lrs = [args.learning_rate] * len(lr_scheduler.base_lrs)
            for group, share in zip(optimizer.param_groups, lr_scheduler.lr_lambdas, strict=True):
                group["lr"] = args.learning_rate * share(lr_scheduler.last_epoch)
            lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # this is what Trainer logs
        optimizer.param_groups[0]["weight_decay"] = args.weight_decay  # the other group, biases and norms, has none
        self.write_note()
        self.journal.start_clock()

    def write_note(self) -> None:
        """Write `run.json`. The file of the run before stays in place until its checkpoint is loaded."""
        if self.journal.writes:
            write_text(self.journal.out / "run.json", json.dumps(self.note, indent=2) + "\n")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log |= state.global_step >= state.max_steps  # the summary of a run is its last log entry

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.journal.stop_clock()

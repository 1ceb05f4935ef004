"""What happens beside the steps: progress for people, TensorBoard's files, signals, the clock."""

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

from soundwave.training.journal import Journal, say, write_text


class ProgressBar(TrainerCallback):
    """A bar on the terminal: time left, losses, audio-seconds per second and memory."""

    def __init__(self, title: str):
        self.title = title
        self.bar: tqdm | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.title, dynamic_ncols=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, *_: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.bar.set_postfix(shown_figures(logs))

    def close(self) -> None:
        """Leave the bar's line, however training ended."""
        if self.bar is not None:
            self.bar.close()


class ProgressLines(TrainerCallback):
    """The same without a terminal: one plain line a logging step."""

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
        """There is nothing to close."""


def shown_figures(logs: dict[str, float]) -> dict[str, str]:
    """What a person wants to see of a log entry while it trains."""
    figures = {name: f"{logs[name]:.3f}" for name in ("ctc_loss", "lm_loss") if name in logs}
    if "blank_share" in logs:
        figures["blank"] = f"{logs['blank_share']:.0%}"
    figures["audio"] = f"{logs.get('audio_per_second', 0):.0f} s/s"
    figures["memory"] = f"{peak_memory() / 2**30:.1f} GiB"
    return figures


def peak_memory() -> int:
    """Most bytes that were in use so far: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Interrupted(RuntimeError):
    """Training was asked to stop, and has saved a checkpoint. One line: where it stopped and how to go on."""


class StopOnSignal(TrainerCallback):
    """Within `with`: Ctrl-C or SIGTERM lets the step at hand end and saves a checkpoint; a second one acts at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    ONE_REQUEST = 1.0  # s; a service's end, or a parent beside the terminal, may send the same wish twice

    def __init__(self) -> None:
        self.asked, self._asked_at = False, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
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
                os.kill(os.getpid(), number)
            return
        self.asked, self._asked_at = True, time.monotonic()
        # Not `say`: what the signal interrupts may hold its lock.
        os.write(2, b"\nstopping: the step at hand is finished and saved; once more to stop at once\n")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True


def ignore_interrupts(worker: int) -> None:
    """In a data worker: a signal may reach every process of a group, but the trainer alone decides when to end."""
    for number in StopOnSignal.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Board(TensorBoardCallback):
    """TensorBoard's, without which training goes on where its files cannot be written."""

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
    """Notes the run once its checkpoint is loaded, has the settings of this run hold, and times it.

    Args:
        note: what `run.json` tells.
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
        # A resumed run would log, save and step as the one before did, whatever its own settings are.
        state.compute_steps(args, state.max_steps)
        if set(lr_scheduler.base_lrs) != {args.learning_rate}:
            lr_scheduler.base_lrs = [args.learning_rate] * len(lr_scheduler.base_lrs)
            for group, share in zip(optimizer.param_groups, lr_scheduler.lr_lambdas, strict=True):
                group["lr"] = args.learning_rate * share(lr_scheduler.last_epoch)
            lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # what is logged
        optimizer.param_groups[0]["weight_decay"] = args.weight_decay  # the other group has biases and norms: none
        self.write_note()
        self.journal.start_clock()

    def write_note(self) -> None:
        """Write `run.json`; that of the run before stays until what it describes is loaded."""
        write_text(self.journal.out / "run.json", json.dumps(self.note, indent=2) + "\n")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log |= state.global_step >= state.max_steps  # what is said of a run is how it ended

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.journal.stop_clock()

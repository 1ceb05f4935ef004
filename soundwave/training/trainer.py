"""transformers' Trainer with our batches, and with what tells a user whether alignment works in its logs."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from soundwave.data.sampling import BucketBatchSampler
from soundwave.eager import IGNORE_INDEX
from soundwave.modeling import SoundwaveOutput

MEL_FRAMES_A_SECOND = 100


class SoundwaveTrainer(Trainer):
    """Trainer over a `BucketBatchSampler`; logs both losses, blank share, kept frames and audio-seconds per second.

    Logged beside Trainer's own, each over the steps since the last log:
        ctc_loss, lm_loss: means.  blank_share: of all frames, those whose most probable id is blank.
        kept_per_second, kept_per_label: kept frames over audio seconds, and over transcript tokens.
        compression: frames (25 Hz) per kept frame.  audio_per_second: audio seconds trained on per second.
        batch_samples: samples a step.
    """

    def __init__(self, *args: Any, batch_sampler: BucketBatchSampler, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.batch_sampler = batch_sampler
        self._sums: dict[str, float | Tensor] = {}
        self._since = time.perf_counter()

    def get_train_dataloader(self) -> DataLoader:
        """Batches as the sampler makes them; Trainer sets the sampler's epoch, also when it resumes."""
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.batch_sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )
        return self.accelerator.prepare(loader)

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, SoundwaveOutput]:
        """The model's own loss. A loss that is not finite stops the run before it reaches the weights."""
        outputs = model(**inputs)
        if not torch.isfinite(outputs.loss):
            parts = {"ctc_loss": outputs.ctc_loss, "lm_loss": outputs.lm_loss}
            found = ", ".join(f"{name} = {value.item():g}" for name, value in parts.items() if value is not None)
            raise FloatingPointError(f"the loss at step {self.state.global_step + 1} is not finite ({found})")
        if model.training:
            self._observe(outputs, inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    @torch.no_grad()
    def _observe(self, outputs: SoundwaveOutput, inputs: dict[str, Tensor]) -> None:
        def add(name: str, value: float | Tensor) -> None:
            self._sums[name] = self._sums.get(name, 0.0) + value

        batch = inputs["input_ids"] if "input_ids" in inputs else inputs["input_features"]
        self._sums.setdefault("first_step", self.state.global_step)
        add("samples", batch.shape[0])
        if outputs.lm_loss is not None:
            add("lm_loss", outputs.lm_loss.detach())
            add("lm_batches", 1)
        if outputs.ctc_loss is not None:
            add("ctc_loss", outputs.ctc_loss.detach())
            add("ctc_batches", 1)
        if outputs.path is not None:
            path, blank = outputs.path, self.model.blank
            add("frames", outputs.path_lengths.sum())
            add("blank_frames", (path == blank).sum())
            add("mel_frames", inputs["feature_lengths"].sum())
            add("kept", self._kept(path, blank) if outputs.cu_seqlens is None else outputs.cu_seqlens[-1])
            if "ctc_labels" in inputs:
                labels = inputs["ctc_labels"] != IGNORE_INDEX
                add("labels", labels.sum())
                add("kept_of_labels", self._kept(path[labels.any(1)], blank))

    @staticmethod
    def _kept(path: Tensor, blank: int) -> Tensor:
        """Peaks of a path [A, T] (-1: padding): the first frames of its runs of a non-blank id."""
        first = torch.ones_like(path, dtype=torch.bool)
        first[:, 1:] = path[:, 1:] != path[:, :-1]
        return (first & (path != blank) & (path >= 0)).sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log with what was observed since the last one."""
        if "loss" in logs and self._sums:
            logs = logs | self._observed()
        super().log(logs, start_time)

    def _observed(self) -> dict[str, float]:
        sums = {name: float(value) for name, value in self._sums.items()}
        seconds, now = sums.get("mel_frames", 0.0) / MEL_FRAMES_A_SECOND, time.perf_counter()
        out = {
            "batch_samples": sums["samples"] / (self.state.global_step - sums["first_step"]),
            "audio_per_second": seconds / (now - self._since),
        }
        ratios = {
            "ctc_loss": ("ctc_loss", "ctc_batches"),
            "lm_loss": ("lm_loss", "lm_batches"),
            "blank_share": ("blank_frames", "frames"),
            "kept_per_label": ("kept_of_labels", "labels"),
            "compression": ("frames", "kept"),
        }
        out |= {name: sums[over] / sums[under] for name, (over, under) in ratios.items() if sums.get(under)}
        if seconds:
            out["kept_per_second"] = sums["kept"] / seconds
        self._sums, self._since = {}, now
        return {name: round(value, 6) for name, value in out.items()}


class Progress(ProgressCallback):
    """Trainer's progress bar, with losses and audio-seconds per second at its end; no log line is printed."""

    def __init__(self, title: str):
        super().__init__()
        self.title = title

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.title)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is None or not logs or "loss" not in logs:
            return
        shown = {name: f"{logs[name]:.3f}" for name in ("ctc_loss", "lm_loss") if name in logs}
        if "blank_share" in logs:
            shown["blank"] = f"{logs['blank_share']:.0%}"
        shown["audio"] = f"{logs.get('audio_per_second', 0):.0f} s/s"
        self.training_bar.set_postfix(shown)


class Clock(TrainerCallback):
    """Seconds that training itself took, without loading and evaluation: `seconds` after the run."""

    seconds = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self._start


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step in a run's folder: Trainer writes its state last."""
    found = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    found = [path for path in found if path.name.removeprefix("checkpoint-").isdigit()]
    return max(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)

"""transformers' Trainer with our batches, and with logs that show whether alignment works."""

import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState

from soundwave.data.collate import LeftOut
from soundwave.data.sampling import BucketBatchSampler
from soundwave.data.selection import SampleError
from soundwave.eager import IGNORE_INDEX
from soundwave.kernels.dispatch import to_device
from soundwave.model.modeling import SoundwaveForConditionalGeneration, SoundwaveOutput
from soundwave.training.callbacks import ignore_interrupts
from soundwave.training.checkpoints import STATE_FILE, WriteError, clear_place, newest_checkpoint, rotate, written_aside
from soundwave.training.journal import Journal, say, write_text

MEL_FRAMES_A_SECOND = 100
BAD_BATCH = "bad-batch"  # name of two files, .json and .safetensors


class Unread(NamedTuple):
    """What a batch gave that the host has not read yet: the names and values of its losses, and its figures."""

    names: list[str]
    losses: Tensor  # [names], the sum first
    figures: dict[str, float | Tensor]


class SoundwaveTrainer(Trainer):
    """Trainer that gets its batches from a `BucketBatchSampler` and skips steps whose loss or gradient is not finite.

    The host waits for a GPU once a step, when it reads all losses and the norm of the gradient together. Lengths and
    labels stay on the CPU, where their values can be read at any time; the model sends them where it needs them.

    A step of several batches (gradient accumulation) has the loss of one batch with all their samples: `lm_loss` is the
    mean over all answer tokens, `ctc_loss` the mean over all recordings that have a transcript.

    It adds these figures to Trainer's log, each over the steps since the last log:
        loss: mean over the steps that were not skipped.  ctc_loss, lm_loss: its parts.
        blank_share: share of the frames whose most probable id is blank.
        kept_per_second, kept_per_label: kept frames per second of audio, and per transcript token.
        compression: adapter frames per kept frame.  audio_per_second: seconds of audio trained on per second.
        batch_samples: samples per step.

    Args:
        journal: records the log, the samples left out and the steps skipped; None makes one for `args.output_dir`.
        strict: raise SampleError for a sample that is left out.
        max_skipped: FloatingPointError is raised after so many skipped steps in a row.

    Raises:
        ValueError: `args.max_grad_norm` is 0. Steps that are not finite are found where Trainer clips the gradient.
    """

    model: SoundwaveForConditionalGeneration

    def __init__(
        self,
        *args: Any,
        batch_sampler: BucketBatchSampler,
        journal: Journal | None = None,
        strict: bool = False,
        max_skipped: int = 10,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        if not self.args.max_grad_norm > 0:
            # Trainer clips nothing then, and steps that are not finite are found where it clips.
            raise ValueError(
                f"max_grad_norm = {self.args.max_grad_norm:g}, but it must be above 0, or steps with a loss of NaN "
                "would change the weights; with inf no gradient is clipped"
            )
        self.batch_sampler, self.strict = batch_sampler, strict
        if journal is None:
            journal = Journal(self.out)
            journal.begin(0)
        self.journal = journal
        self.max_skipped = min(max_skipped, self.args.max_steps)
        self._sums: dict[str, float | Tensor] = {}
        self._tasks: Counter[str] = Counter()
        self._since = time.perf_counter()
        self._batches: list[dict[str, Any]] = []  # those of the current step
        self._faults: list[str] = []  # those of the current step
        self._totals: dict[str, Tensor | int] = {}  # what `counts_of` finds in them together
        self._losses: dict[str, Tensor] = {}  # loss of the current step and its parts, summed over its batches
        self._unread: list[Unread] = []  # of the current step
        self._empty_in_a_row = 0
        self._aside: Path | None = None

    @property
    def out(self) -> Path:
        """Folder of the run."""
        return Path(str(self.args.output_dir))

    # ---------------------------------------------------------------- batches

    def get_train_dataloader(self) -> DataLoader:
        """The loader of the sampler's batches. Trainer sets the sampler's epoch, also when it resumes."""
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.batch_sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            worker_init_fn=ignore_interrupts,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )
        return self.accelerator.prepare(loader, device_placement=[False])  # `_prepare_inputs` sends what has to go

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Any]:
        """As in Trainer; the batches of the step are remembered too."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._batches, self._faults, self._losses, self._unread = batches, [], {}, []
        counts = [counts_of(batch) for batch in batches]
        self._totals = {part: sum(count[part] for count in counts) for part in ("lm_loss", "ctc_loss")}
        return batches, items

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Recordings go to the device, without a wait. Whole numbers (tokens, lengths, labels) stay on the CPU."""
        return {
            name: x.to(self.args.device, non_blocking=True) if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in inputs.items()
        }

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As in Trainer, without the names of the samples. A batch without any sample gives loss 0 and no gradient."""
        for left in inputs.get("left_out", ()):
            if self.strict:
                raise SampleError(str(left))
            self.journal.leave_out(self.state.global_step + 1, left)
        tensors = tensors_of(inputs)
        if not tensors:
            return torch.zeros((), device=self.args.device)
        self._tasks.update(inputs.get("tasks", ()))
        # Trainer would divide the loss by the number of batches; `compute_loss` weighs them by what they hold.
        self.current_gradient_accumulation_steps = 1
        return super().training_step(model, tensors, num_items_in_batch)

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, SoundwaveOutput]:
        """The model's loss; in training this batch's part of the loss of the whole step.

        A loss that is not finite becomes 0. Its step will be skipped, as soon as the host knows of it.
        """
        outputs = model(**inputs)
        loss = outputs.loss
        if model.training:
            parts = {"loss": loss, "ctc_loss": outputs.ctc_loss, "lm_loss": outputs.lm_loss}
            found = {name: value.detach().float() for name, value in parts.items() if value is not None}
            self._unread.append(Unread(list(found), torch.stack(list(found.values())), self._figures(outputs, inputs)))
            loss = torch.where(torch.isfinite(loss), self._part_of_step(outputs, inputs), 0.0)
        return (loss, outputs) if return_outputs else loss

    def _part_of_step(self, outputs: SoundwaveOutput, inputs: dict[str, Tensor]) -> Tensor:
        """The loss of a batch with its parts weighted by the share of the step's tokens and transcripts that it has."""
        parts = {}
        for name, count in counts_of(inputs).items():
            value = getattr(outputs, name)
            if value is not None:
                own, all_of_step = (torch.as_tensor(n) for n in (count, self._totals[name]))
                parts[name] = value * (own / all_of_step.clamp(min=1))
        loss = parts.get("lm_loss", parts.get("ctc_loss"))
        if len(parts) == 2:
            loss = parts["lm_loss"] + self.model.config.ctc_weight * parts["ctc_loss"]
        for name, value in {"loss": loss, **parts}.items():
            self._losses[name] = self._losses.get(name, 0.0) + value.detach()
        return loss

    # ---------------------------------------------------------------- steps that are skipped

    def _clip_grad_norm(self, model: torch.nn.Module) -> Tensor:
        """As in Trainer. If loss or gradient is not finite, the gradients are dropped, so that no weight changes."""
        norm = super()._clip_grad_norm(model)
        self._read(norm)
        if self._faults:
            model.zero_grad(set_to_none=True)
            self._skip(self._faults[0])
        elif any(tensors_of(batch) for batch in self._batches):
            for name, value in self._losses.items():
                if name == "loss" or self._totals[name]:
                    self._add(name, value)
                    self._add(f"{name}_steps", 1)
            self.journal.skipped_in_a_row = self._empty_in_a_row = 0
        else:
            self._count_empty_step()
        return norm

    def _read(self, norm: Tensor) -> None:
        """Read the losses of the step's batches and the norm of its gradient: the one wait for a GPU in a step."""
        together = torch.cat([*(unread.losses for unread in self._unread), norm.detach().float().reshape(1)])
        *values, norm_found = together.tolist()
        for names, losses, figures in self._unread:
            found, values = dict(zip(names, values, strict=False)), values[len(losses) :]
            if math.isfinite(found.pop("loss")):
                self._observe(figures)
            else:
                parts = ", ".join(f"{name} = {value:g}" for name, value in found.items())
                self._faults.append(f"the loss is not finite ({parts})")
        self._unread = []
        if not self._faults and not math.isfinite(norm_found):
            self._faults.append(f"the gradient is not finite (norm {norm_found:g})")

    def _skip(self, fault: str) -> None:
        step = self.state.global_step + 1
        samples = [name for batch in self._batches for name in batch.get("samples", ())]
        self.journal.skip(step, fault, samples)
        in_a_row = self.journal.skipped_in_a_row
        if in_a_row < self.max_skipped:
            return
        where = self._save_bad_batch(step, samples)
        what, _, found = fault.partition(" is ")
        first = f"{what} at step {step - in_a_row + 1} is {found}"
        more = f", nor at the {in_a_row - 1} steps after it" if in_a_row > 1 else ""
        raise FloatingPointError(f"{first}{more}; {where}, or lower learning_rate")

    def _save_bad_batch(self, step: int, samples: list[str]) -> str:
        """Save the batches of the step for inspection -> what the user should look at."""
        tensors = {
            f"{i}.{name}": value.detach().cpu().contiguous()
            for i, batch in enumerate(self._batches)
            for name, value in tensors_of(batch).items()
        }
        found = {"step": step, "faults": self._faults, "samples": samples, "batches": len(self._batches)}
        try:
            write_text(self.journal.out / f"{BAD_BATCH}.json", json.dumps(found, indent=2) + "\n")
            save_file(tensors, self.journal.out / f"{BAD_BATCH}.safetensors")
        except (OSError, SafetensorError) as error:  # the error of the step matters more than this one
            say(f"the batch could not be saved: {error}")
            return f"its samples are {', '.join(samples)}: look at them"
        return f"the last batch is in {self.journal.out / BAD_BATCH}.json and .safetensors: look at its samples"

    def _count_empty_step(self) -> None:
        """Every sample of this step was left out, so the weights stay as they are.

        Many such steps in a row usually mean that the audio folder is no longer mounted: raise.
        """
        self._empty_in_a_row += 1
        if self._empty_in_a_row >= self.max_skipped:
            last: LeftOut = next(left for batch in self._batches for left in batch["left_out"])
            raise SampleError(
                f"in {self._empty_in_a_row} steps, up to step {self.state.global_step + 1}, no sample could be used; "
                f"among the last: {last}"
            )

    # ---------------------------------------------------------------- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As in Trainer, but written aside, synced to disk and renamed before an older checkpoint is deleted."""
        out, step = self.out, self.state.global_step
        target = out / f"checkpoint-{step}"
        try:
            with written_aside(target) as folder:
                self._aside = folder.parent
                super()._save_checkpoint(model, trial)
                self.journal.sync()
                clear_place(target)
            if self.args.save_total_limit is not None:
                rotate(out, step, self.args.save_total_limit)
        except WriteError as error:
            raise self._with_safe_checkpoint(error) from error
        finally:
            self._aside = None

    def _with_safe_checkpoint(self, error: WriteError) -> WriteError:
        last = newest_checkpoint(self.out)
        safe = f"{last.name} is complete" if last else "no checkpoint was saved before"
        return WriteError(f"{error}; {safe}: make room, then start the same command again")

    def go_to(self, checkpoint: Path) -> None:
        """Load weights and state of a checkpoint without training."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))

    # ---------------------------------------------------------------- logs

    def _add(self, name: str, value: float | Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value

    def _observe(self, figures: dict[str, float | Tensor]) -> None:
        self._sums.setdefault("first_step", self.state.global_step)
        for name, value in figures.items():
            self._add(name, value)

    @torch.no_grad()
    def _figures(self, outputs: SoundwaveOutput, inputs: dict[str, Tensor]) -> dict[str, float | Tensor]:
        """What a batch adds to the figures of the log."""
        batch = inputs["input_ids"] if "input_ids" in inputs else inputs["input_features"]
        figures: dict[str, float | Tensor] = {"samples": batch.shape[0]}
        if outputs.path is not None and outputs.path_lengths is not None:
            path, blank = outputs.path, self.model.blank
            kept = self._kept(path, blank)
            figures |= {
                "frames": outputs.path_lengths.sum(),
                "blank_frames": (path == blank).sum(),
                "mel_frames": inputs["feature_lengths"].sum(),
                "kept": kept.sum() if outputs.cu_seqlens is None else outputs.cu_seqlens[-1],
            }
            if "ctc_labels" in inputs:
                labels = inputs["ctc_labels"] != IGNORE_INDEX
                transcribed = to_device(labels.any(1), path.device)
                figures |= {"labels": labels.sum(), "kept_of_labels": (kept * transcribed).sum()}
        return figures

    @staticmethod
    def _kept(path: Tensor, blank: int) -> Tensor:
        """Numbers of peaks [A] in the paths [A, T] (-1: padding): each run of a non-blank id has one."""
        first = torch.ones_like(path, dtype=torch.bool)
        first[:, 1:] = path[:, 1:] != path[:, :-1]
        return (first & (path != blank) & (path >= 0)).sum(1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in Trainer, with our figures since the last log. The journal also gets the sample count of each task."""
        if "loss" not in logs:
            super().log(logs, start_time)
            return
        logs = logs | {"loss": float("nan")} | (self._observed() if self._sums else {})
        logs |= {"skipped_steps": self.journal.skipped, "left_out": len(self.journal.left_out)}
        try:
            # The journal writes before the callbacks: on a full disk TensorBoard's thread would print a traceback.
            entry = {"step": self.state.global_step, "epoch": self.state.epoch} | logs
            self.journal.log(entry | {"tasks": dict(self._tasks)})
        except WriteError as error:
            raise self._with_safe_checkpoint(error) from error
        self._tasks.clear()
        super().log(logs, start_time)

    def _observed(self) -> dict[str, float]:
        sums = {name: float(value) for name, value in self._sums.items()}
        seconds, now = sums.get("mel_frames", 0.0) / MEL_FRAMES_A_SECOND, time.perf_counter()
        out = {
            "batch_samples": sums["samples"] / (self.state.global_step - sums["first_step"]),
            "audio_per_second": seconds / (now - self._since),
        }
        ratios = {
            "loss": ("loss", "loss_steps"),
            "ctc_loss": ("ctc_loss", "ctc_loss_steps"),
            "lm_loss": ("lm_loss", "lm_loss_steps"),
            "blank_share": ("blank_frames", "frames"),
            "kept_per_label": ("kept_of_labels", "labels"),
            "compression": ("frames", "kept"),
        }
        out |= {name: sums[over] / sums[under] for name, (over, under) in ratios.items() if sums.get(under)}
        if seconds:
            out["kept_per_second"] = sums["kept"] / seconds
        self._sums, self._since = {}, now
        return {name: round(value, 6) for name, value in out.items()}


def tensors_of(batch: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a batch, which the model takes. The other entries are names."""
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}


def counts_of(batch: dict[str, Any]) -> dict[str, Tensor | int]:
    """What the two parts of the loss are means over: a batch's answer tokens, and its recordings with a transcript."""
    counts: dict[str, Tensor | int] = {"lm_loss": 0, "ctc_loss": 0}
    if "labels" in batch:
        counts["lm_loss"] = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
    if "ctc_labels" in batch:
        counts["ctc_loss"] = (batch["ctc_labels"] != IGNORE_INDEX).any(1).sum()
    return counts

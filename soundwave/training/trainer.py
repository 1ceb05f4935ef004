"""transformers' Trainer with our batches, and with logs that show whether alignment works."""

import inspect
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState

from soundwave.data.collate import LeftOut
from soundwave.data.sampling import BucketBatchSampler, DynamicBatchSampler
from soundwave.data.selection import SampleError
from soundwave.eager import IGNORE_INDEX
from soundwave.kernels.dispatch import to_device
from soundwave.model.modeling import SoundwaveForConditionalGeneration, SoundwaveOutput
from soundwave.training.callbacks import ignore_interrupts
from soundwave.training.checkpoints import STATE_FILE, WriteError, clear_place, newest_checkpoint, rotate, written_aside
from soundwave.training.distributed import Processes
from soundwave.training.journal import Journal, say, write_text
from soundwave.training.sharding import Replica

LOSSES = ("loss", "lm_loss", "ctc_loss")
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

    Of several processes each trains on its share of every batch, and a step has the loss of one batch with the samples
    of all of them. Each batch that a launcher's process trains on has random numbers of its own, which follow from the
    seed, the step, the batch's place in it and the process: a resumed run draws them again without a saved state. What
    is masked of a recording follows from the seed, the step and its name, however many processes there are. A step is
    skipped, and a sample left out, in all processes alike.

    It adds these figures to Trainer's log, each over the steps since the last log:
        loss: mean over the steps that were not skipped.  ctc_loss, lm_loss: its parts.
        blank_share: share of the frames whose most probable id is blank.
        kept_per_second, kept_per_label: kept frames per second of audio, and per transcript token.
        compression: adapter frames per kept frame.  audio_per_second: seconds of audio trained on per second.
        batch_samples: samples per step.  loading_share: share of the time that was spent waiting for data.
        audio_padding, text_padding: share of the batches' mel frames and tokens that are padding.
        encoder_padding: share of the frames that the encoder computes for nothing: of padding where rows are not
            packed, and of silence where it reads whole windows.

    Args:
        journal: records the log, the samples left out and the steps skipped; None makes one for `args.output_dir`.
        strict: raise SampleError for a sample that is left out.
        processes: those that train together; None for this one alone.
        sharded: they share the language model's layers (`shard_layers`).
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
        processes: Processes | None = None,
        sharded: bool = False,
        max_skipped: int = 10,
        **kwargs: Any,
    ):
        self.processes, self.sharded = processes or Processes(), sharded
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
        self._waited = self._heard = 0.0  # seconds for data, and seconds of speech, since the last log
        self._since = time.perf_counter()
        self._batches: list[dict[str, Any]] = []  # those of the current step
        self._faults: list[str] = []  # those of the current step
        self._totals: dict[str, Tensor | int] = {}  # what `counts_of` finds in them together
        self._losses: dict[str, Tensor] = {}  # loss of the current step and its parts, summed over its batches
        self._unread: list[Unread] = []  # of the current step
        self._trained = True  # whether any process has a sample in the current step
        self._recordings = True  # whether any process has a recording in the current step
        self._batch = 0  # number of batches of the current step that were trained on
        self._stands_in = False  # whether the current batch only does the work of one
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
            persistent_workers=self.args.dataloader_num_workers > 0,  # small data has an epoch every few steps
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )
        # As accelerate prepares it for one process: the sampler has shared out the samples already. Its own division
        # would repeat some at the end of an epoch. `_prepare_inputs` sends to the device what has to go there.
        return prepare_data_loader(loader, num_processes=1, process_index=0)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Any]:
        """As in Trainer; the batches of the step are remembered too, and what they leave out is recorded."""
        start = time.perf_counter()
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._waited += time.perf_counter() - start
        self._batches, self._faults, self._losses, self._unread, self._batch = batches, [], {}, [], 0
        counts = [counts_of(batch) for batch in batches]
        self._totals = {part: sum(count[part] for count in counts) for part in ("lm_loss", "ctc_loss")}
        left_out = [left for batch in batches for left in batch.get("left_out", ())]
        self._trained = any(tensors_of(batch) for batch in batches)
        if self.processes.count > 1:
            counts = [*map(int, self._totals.values()), sum("feature_lengths" in batch for batch in batches)]
            *counts, lost, trained = self.processes.sums(*counts, len(left_out), int(self._trained))
            self._totals, self._trained = dict(zip(self._totals, counts, strict=False)), trained > 0
            self._recordings = counts[-1] > 0
            if lost:
                left_out = [left for found in self.processes.gather(left_out) for left in found]
        for left in left_out:
            if self.strict:
                raise SampleError(str(left))
            self.journal.leave_out(self.state.global_step + 1, left)
        return batches, items

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Recordings go to the device, without a wait. Whole numbers (tokens, lengths, labels) stay on the CPU."""
        return {
            name: x.to(self.args.device, non_blocking=True) if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in inputs.items()
        }

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As in Trainer, without the names of the samples. A batch without any sample gives loss 0 and no gradient."""
        tensors, number = tensors_of(inputs), self._batch
        self._batch += 1
        self._stands_in = not tensors
        if self._stands_in and self.processes.count == 1:
            return torch.zeros((), device=self.args.device)
        if self._stands_in:  # DistributedDataParallel averages gradients in the backward pass of every process
            tensors = dict(self.data_collator.stand_in())
        if self.processes.launched:
            key = (self.args.seed, self.state.global_step, number, self.processes.rank)
            torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
            if names := inputs.get("recordings"):
                tensors["augment_seeds"] = [crc32(repr((*key[:2], name)).encode()) for name in names]
        self._tasks.update(inputs.get("tasks", ()))
        self._heard += inputs.get("seconds", 0.0)
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
        if model.training and self._stands_in:
            loss = loss * 0.0
        elif model.training:
            parts = {"loss": loss, "ctc_loss": outputs.ctc_loss, "lm_loss": outputs.lm_loss}
            found = {name: value.detach().float() for name, value in parts.items() if value is not None}
            self._unread.append(Unread(list(found), torch.stack(list(found.values())), self._figures(outputs, inputs)))
            part = self._part_of_step(outputs, inputs)
            if self.processes.count > 1:
                part = part * self.processes.count  # the gradients of the processes are averaged, not added
            loss = torch.where(torch.isfinite(loss), part, 0.0)
        if model.training and self.processes.count > 1 and (idle := self._idle("feature_lengths" in inputs)):
            loss = loss + torch.cat([parameter.flatten()[:0] for parameter in idle]).sum()  # 0, with gradients of 0
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

    # ---------------------------------------------------------------- several processes

    def _wrap_model(self, model: torch.nn.Module, training: bool = True, dataloader: Any = None) -> torch.nn.Module:
        """As in Trainer; of several processes each trains the whole model, and their gradients are averaged.

        Every process has to give every parameter a gradient. A batch of text alone uses no adapter, while those of
        other processes may, so `compute_loss` adds what is idle. With `find_unused_parameters` torch would walk through
        the graph of every batch to find it, and a static graph is wrong, because it differs from batch to batch.
        Buffers are not sent in each step: none changes in training, and that of stage I is the output embedding.
        `device_ids` is left out, because what stays on the CPU (lengths, labels) would be sent to the GPU.
        """
        wrapped = super()._wrap_model(model, training, dataloader)
        if wrapped is not model or not training or self.processes.count == 1 or self.is_fsdp_enabled:
            return wrapped
        if self.sharded:
            return Replica(model)
        renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
        buffers: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}  # torch 2.13
        return DistributedDataParallel(model, gradient_as_bucket_view=True, **buffers)

    def _idle(self, recordings: bool) -> list[Tensor]:
        """The trained parameters that take no part in a loss: without recordings all adapters'."""
        prefixes: tuple[str, ...] = ("alignment.", "blank_", "shrinking.") if not recordings else ()
        if self.model.config.keys == "none":
            prefixes += ("shrinking.in_proj", "shrinking.out_proj")
        return [p for name, p in self.model.named_parameters() if p.requires_grad and name.startswith(prefixes)]

    def store_flos(self) -> None:
        """As in Trainer, but several processes do not add up their operations: it would wait for the GPUs."""
        if self.processes.count == 1:
            super().store_flos()

    def _share_faults(self) -> tuple[list[str], int]:
        """Let all processes know the faults of each other -> the samples beside which they arose; whose they are first.

        Only a process whose own loss is not finite tells its samples, and all do if only the gradient is not finite.
        """
        samples = [name for batch in self._batches for name in batch.get("samples", ())]
        if self.processes.count == 1 or not self.processes.any(bool(self._faults)):
            return samples, self.processes.rank
        found = self.processes.gather((self._faults, samples))
        self._faults = [fault for faults, _ in found for fault in faults]
        guilty = [rank for rank, (faults, _) in enumerate(found) if faults]
        return [name for rank in guilty for name in found[rank][1]], guilty[0]

    # ---------------------------------------------------------------- steps that are skipped

    def _clip_grad_norm(self, model: torch.nn.Module) -> Tensor:
        """As in Trainer. If loss or gradient is not finite, the gradients are dropped, so that no weight changes."""
        if isinstance(model, Replica):
            model.average_gradients()
        if self.processes.count > 1:
            for parameter in self._idle(self._recordings):  # the optimiser leaves alone what has no gradient
                parameter.grad = None
        norm = super()._clip_grad_norm(model)
        norm_found = self._read(norm)
        samples, rank = self._share_faults()
        if not self._faults and not math.isfinite(norm_found):
            self._faults.append(f"the gradient is not finite (norm {norm_found:g})")
            samples, rank = self._share_faults()
        if self._faults:
            model.zero_grad(set_to_none=True)
            self._skip(self._faults[0], samples, rank)
        elif self._trained:
            for name in LOSSES:
                if name == "loss" or self._totals[name]:
                    self._add(name, self._losses.get(name, 0.0))
                    self._add(f"{name}_steps", 1)
            self.journal.skipped_in_a_row = self._empty_in_a_row = 0
        else:
            self._count_empty_step()
        return norm

    def _read(self, norm: Tensor) -> float:
        """Read the losses of the step's batches and the norm of its gradient: the one wait for a GPU in a step.

        Returns:
            The norm.
        """
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
        return norm_found

    def _skip(self, fault: str, samples: list[str], rank: int) -> None:
        """Record a skipped step. After too many, the process `rank`, whose fault it was, saves its batches: raise."""
        step = self.state.global_step + 1
        self.journal.skip(step, fault, samples)
        in_a_row = self.journal.skipped_in_a_row
        if in_a_row < self.max_skipped:
            return
        where = self._save_bad_batch(step, samples) if self.processes.rank == rank else ""
        where = self.processes.gather(where)[rank]
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
            left_out = self.processes.gather([left for batch in self._batches for left in batch.get("left_out", ())])
            last: LeftOut = next(left for found in left_out for left in found)
            raise SampleError(
                f"in {self._empty_in_a_row} steps, up to step {self.state.global_step + 1}, no sample could be used; "
                f"among the last: {last}"
            )

    # ---------------------------------------------------------------- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As in Trainer, but written aside, synced to disk and renamed before an older checkpoint is deleted.

        Of several processes the first one writes; the others hold the same weights, and wait.
        """
        fault = None
        if self.processes.first:
            try:
                self._write_checkpoint(model, trial)
            except WriteError as error:
                fault = error
        fault = self.processes.of_first(fault)
        if fault is not None:
            raise fault

    def _write_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
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

    def _save_rng_state(self, output_dir: str) -> None:
        """As in Trainer, under the name that it has for one process: several keep no state (`training_step`)."""
        super()._save_rng_state(output_dir)
        if self.args.world_size > 1:
            os.rename(Path(output_dir) / "rng_state_0.pth", Path(output_dir) / "rng_state.pth")

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
        batch = inputs["input_ids"] if "input_ids" in inputs else inputs["feature_lengths"]
        figures: dict[str, float | Tensor] = {"samples": batch.shape[0]}
        if "attention_mask" in inputs:
            figures |= {"tokens": inputs["attention_mask"].sum(), "token_places": inputs["attention_mask"].numel()}
        if outputs.path is not None and outputs.path_lengths is not None:
            path, blank = outputs.path, self.model.blank
            kept = self._kept(path, blank)
            figures |= {
                "frames": outputs.path_lengths.sum(),
                "blank_frames": (path == blank).sum(),
                "mel_frames": inputs["feature_lengths"].sum(),
                "mel_places": self._mel_places(inputs),
                "kept": kept.sum() if outputs.cu_seqlens is None else outputs.cu_seqlens[-1],
            }
            if "ctc_labels" in inputs:
                labels = inputs["ctc_labels"] != IGNORE_INDEX
                transcribed = to_device(labels.any(1), path.device)
                figures |= {"labels": labels.sum(), "kept_of_labels": (kept * transcribed).sum()}
        return figures

    @staticmethod
    def _mel_places(inputs: dict[str, Tensor]) -> float | Tensor:
        """Mel frames of the recordings in a batch, those of padding included; frames of the encoder have none."""
        lengths = inputs["feature_lengths"]
        return lengths.sum() if "encoder_frames" in inputs else len(lengths) * lengths.max()

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
        if isinstance(self.batch_sampler, DynamicBatchSampler):  # to Trainer the whole run is one epoch
            batches = self.state.global_step * self.args.gradient_accumulation_steps
            self.state.epoch = self.batch_sampler.epoch_at(batches)
        logs = logs | {"loss": float("nan")} | self._observed()
        logs |= {"skipped_steps": self.journal.skipped, "left_out": len(self.journal.left_out)}
        try:
            # The journal writes before the callbacks: on a full disk TensorBoard's thread would print a traceback.
            entry = {"step": self.state.global_step, "epoch": self.state.epoch} | logs
            if self.processes.first:
                self.journal.log(entry | {"tasks": dict(self._tasks)})
        except WriteError as error:
            raise self._with_safe_checkpoint(error) from error
        self._tasks.clear()
        super().log(logs, start_time)

    def _observed(self) -> dict[str, float]:
        """The figures since the last log, of all processes; none if no batch was read."""
        own = {name: float(value) for name, value in self._sums.items()}
        found = self.processes.gather((own, self._tasks, self._heard, self._waited))
        sums: dict[str, float] = {}
        for name in dict.fromkeys(name for figures, *_ in found for name in figures):
            values = [figures[name] for figures, *_ in found if name in figures]
            # The processes do the same steps, so these are not added up.
            sums[name] = min(values) if name == "first_step" or name.endswith("_steps") else sum(values)
        self._tasks = sum((tasks for _, tasks, *_ in found), Counter())
        heard, waited = sum(heard for *_, heard, _ in found), max(waited for *_, waited in found)
        if not sums:
            return {}
        seconds, now = sums.get("mel_frames", 0.0) / MEL_FRAMES_A_SECOND, time.perf_counter()
        out = {
            "batch_samples": sums["samples"] / (self.state.global_step - sums["first_step"]),
            "audio_per_second": seconds / (now - self._since),
            "loading_share": waited / (now - self._since),
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
        if sums.get("token_places"):
            out["text_padding"] = 1 - sums["tokens"] / sums["token_places"]
        if seconds:
            out["kept_per_second"] = sums["kept"] / seconds
            out["audio_padding"] = 1 - sums["mel_frames"] / sums["mel_places"]
            computed = sums["mel_frames" if self.model.packed else "mel_places"] / MEL_FRAMES_A_SECOND
            silent = max(0.0, seconds - heard) if self.model.config.whole_window else 0.0
            out["encoder_padding"] = (computed - seconds + silent) / computed
        self._sums, self._since, self._waited, self._heard = {}, now, 0.0, 0.0
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

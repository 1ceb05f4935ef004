"""The three stages of Soundwave's training (arXiv 2502.12900, §3): what each one trains, and on which loss.

I    alignment adapter and blank row    CTC; of the language model only its output embedding is loaded
II   both adapters and LoRA             next token + 0.3 CTC; tasks drawn at a temperature that rises with the epochs
III  LoRA, or LoRA + shrinking adapter  next token
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from soundwave.backbones.check import check_language_model
from soundwave.data.audio import AudioError
from soundwave.data.collate import CheckedCollator, LeftOut, tokens_of
from soundwave.data.features import about_encoder
from soundwave.data.manifest import Sample
from soundwave.data.samples import Samples, TrainingSet
from soundwave.data.sampling import BucketBatchSampler, DynamicBatchSampler, paper_temperature
from soundwave.data.selection import select_samples
from soundwave.data.workers import lost_worker_named
from soundwave.hardware import GIB, memory_named, pick_device, pick_dtype
from soundwave.model.configuration import SoundwaveConfig
from soundwave.model.modeling import SoundwaveForConditionalGeneration, freeze_all_but
from soundwave.model.processing import SoundwaveProcessor
from soundwave.model.sizes import refuse_what_does_not_fit, sizes_of
from soundwave.training import text_only
from soundwave.training.callbacks import Board, Clock, Interrupted, ProgressBar, ProgressLines, StopOnSignal
from soundwave.training.checkpoints import WriteError, step_of, written_aside
from soundwave.training.distributed import LostProcess, Processes, count_launched, is_launched, joined
from soundwave.training.frames import compare_frames, open_frames, refuse_missing_frames
from soundwave.training.journal import Journal, say
from soundwave.training.lineage import write_lineage
from soundwave.training.record import (
    agree,
    alone_in,
    checkpoint_of,
    earlier_note,
    note_of,
    refuse_misfit,
    tell_of_processes,
    tell_where_it_goes_on,
)
from soundwave.training.settings import ConfigError, StageConfig
from soundwave.training.sharding import check_sharding, shard_layers, sharded_sizes, shares_of
from soundwave.training.text_only import how_many, own_answers, read_answers
from soundwave.training.trainer import SoundwaveTrainer

UNITS = {"batch_size": "samples", "batch_tokens": "tokens", "batch_duration": "s of speech"}
OF_STAGE_2 = ("keep", "keys", "lora_rank", "lora_alpha")  # settings that stage II may still change
TRAINED = {
    1: ("alignment.", "blank_"),
    2: ("alignment.", "blank_", "shrinking.", "lora"),
    3: ("lora",),
}


def train_stage(config: StageConfig, *, compare: bool = True) -> tuple[Path, list[dict[str, float]], float]:
    """Run one stage, or continue it from its newest checkpoint; `out` gets the settings and the log (`Journal`).

    Processes that a launcher has started (`soundwave.training.distributed`) train together. Each of them calls this.

    Args:
        compare: whether encoder frames that are read are compared with what the encoder gives now, and one line says
            so if their bits differ.

    Returns:
        The model's folder (`out/model`), the log (one dict per logging step, see `SoundwaveTrainer`), and the seconds
        of training, those before an interruption included.

    Raises:
        ManifestError: a manifest cannot be used. SampleError: with `strict`, a sample cannot be used.
        FileNotFoundError, ValueError: the model does not fit.
        ConfigError: settings contradict the data, the model or the content of `out`.
        FloatingPointError: `max_skipped` consecutive steps were not finite. WriteError: the disk is full or read-only.
        Interrupted: Ctrl-C or SIGTERM ended training; a checkpoint was saved.
        LostProcess: another process of the run has ended.
    """
    device, _ = pick_device()
    check_sharding(config, device.type)
    with joined(device.type) as processes, alone_in(config.out) if processes.first else nullcontext():
        processes.wait()  # until the first one has locked the folder
        return _train_stage(config, device, processes, compare)


def _train_stage(
    config: StageConfig, device: torch.device, processes: Processes, compare: bool
) -> tuple[Path, list[dict[str, float]], float]:
    features = open_frames(config)
    checkpoint = processes.of_first(checkpoint_of(config) if processes.first else None)
    step = (step_of(checkpoint) or 0) if checkpoint else 0
    set_seed(config.seed)
    left_out: list[LeftOut] = []
    samples = _select(config, left_out)
    before = earlier_note(config, checkpoint)
    note = note_of(config, samples, device, before, processes.count)
    agree(config, checkpoint, note, processes)
    # A CPU finds its faster dtype by a timing, whose result may differ between the processes.
    config = config.model_copy(update={"dtype": processes.of_first(note["config"]["dtype"])})
    if features is not None:
        refuse_missing_frames(config, features, samples)
    if checkpoint:
        tell_where_it_goes_on(config, checkpoint)
        tell_of_processes(before, note)
    elif config.model is None and config.stage == 2:
        say("stage 2 starts from fresh adapters, because no model is given; model=… starts from that of stage 1")

    advice = "close other programs, or use quantization=nf4"
    with memory_named("while the backbones were loaded", advice), _loading_bar(config):
        model = build_model(config, device)
        if config.sharding == "none":
            model = model.to(device)
    if checkpoint:
        refuse_misfit(config, checkpoint, model.config)
    journal = Journal(config.out, writes=processes.first)
    journal.begin(step)
    processes.wait()  # until all have read the files, to which the first one now writes
    for left in left_out:
        journal.leave_out(0, left)
    processor = SoundwaveProcessor.for_config(model.config)
    if config.stage > 1 and processor.writes_date:
        _tell(config, f"the chat template writes today's date: prompts say {processor.template_date} on every day")
    mixed_in = _mixed_in(config, model, device, processor, samples, bool(checkpoint), processes)
    trained = TRAINED[config.stage] + (("shrinking.",) if config.stage == 3 and config.train_shrinking else ())
    freeze_all_but(model, trained)
    if config.sharding != "none":
        _shard(config, model, device)
    reader = CheckedCollator(processor, config.stage, frame_stack=model.config.frame_stack)
    collator = CheckedCollator(processor, config.stage, frame_stack=model.config.frame_stack, features=features)
    if features is not None:
        whole_window = model.config.whole_window
        features.refuse_misfit(about_encoder(model.audio_tower, processor.feature_extractor, whole_window))
        if compare:
            compare_frames(config, model, reader, features, samples)
    if config.model is None and checkpoint is None:
        own = samples[processes.rank :: processes.count]
        with memory_named("while the adapter was fitted to the first recordings", _smaller_batch(config)):
            _initialise_adapter(config, model, processor, _first_clips(reader, own, config), processes)

    all_samples = samples + mixed_in
    clock, stop = Clock(journal, note), StopOnSignal(processes)
    trainer = SoundwaveTrainer(
        model=model,
        args=_arguments(config, device),
        train_dataset=TrainingSet(all_samples),
        data_collator=collator,
        batch_sampler=build_sampler(config, all_samples, processes),
        journal=journal,
        strict=config.strict,
        processes=processes,
        sharded=config.sharding != "none",
        max_skipped=config.max_skipped,
        callbacks=[Board(), clock, stop],
    )
    trainer.remove_callback(PrinterCallback)
    progress = (ProgressBar if sys.stderr.isatty() else ProgressLines)(f"stage {config.stage}")
    if not config.quiet and processes.first:
        trainer.add_callback(progress)
    if checkpoint and step == config.steps:  # the run was killed after its last step, before the model was written
        trainer.go_to(checkpoint)
        clock.write_note()
    else:
        _tell(config, f"step {step + 1} of {config.steps} begins; a step has {samples_of_step(config)}")
        in_a_step = memory_named("in a training step", _smaller_batch(config))
        worker_named = lost_worker_named(LostProcess, "from the newest checkpoint")
        with stop, closing(progress), worker_named, in_a_step:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    _summarise_left_out(journal, len(samples) + len(left_out))
    if trainer.state.global_step < config.steps:
        raise Interrupted(
            f"stopped after step {trainer.state.global_step} of {config.steps}, which is saved in {config.out}; "
            "the same command goes on from there"
        )
    folder = config.out / "model"
    fault = None
    if processes.first:
        try:
            with written_aside(folder) as aside:
                model.save_pretrained(aside)
                losses = next((entry for entry in reversed(trainer.state.log_history) if "loss" in entry), {})
                write_lineage(aside, config, note, all_samples, losses, journal.seconds)
        except WriteError as error:
            fault = error
    if (fault := processes.of_first(fault)) is not None:
        raise fault
    if processes.any(stop.asked):  # in the last step: what follows a stage, as in the demonstration, must not begin
        raise Interrupted(f"stopped at the end of stage {config.stage}, whose model is in {folder}")
    return folder, [entry for entry in trainer.state.log_history if "loss" in entry], journal.seconds


def _mixed_in(
    config: StageConfig,
    model: SoundwaveForConditionalGeneration,
    device: torch.device,
    processor: SoundwaveProcessor,
    samples: Samples,
    goes_on: bool,
    processes: Processes,
) -> list[Sample]:
    """Answers of the language model itself to text, for a stage whose data has no text-only samples."""
    count, file = how_many(config.stage, config.text_only, samples), config.out / text_only.FILE
    if not count or (goes_on and not file.is_file()):  # runs of version 0.2 began without them
        return []
    if processes.first and not goes_on:
        _tell(
            config,
            f"mixing in {count} text-only answers of the language model itself, so that it goes on following "
            "instructions: the data has none (text_only=0 leaves them out)",
        )
        where = model.device  # before a model is sharded, that is the machine's memory
        own_answers(file, model.to(device), processor, count, config.seed)
        model.to(where)
    processes.wait()
    return read_answers(file)


def _shard(config: StageConfig, model: SoundwaveForConditionalGeneration, device: torch.device) -> None:
    """Share the language model's layers among the processes, and bring the rest of the model to the device."""
    shard_layers(model.language_model, device.type)
    model.to(device)
    own, whole = shares_of(model.language_model)
    _tell(
        config,
        f"{count_launched()} processes share the language model's frozen layers: {own / GIB:.2f} GiB of "
        f"{whole / GIB:.2f} GiB in each",
    )


def samples_of_step(config: StageConfig) -> str:
    """How many samples a step has, in words: "64 samples (batch_size 16 x accumulation 2 x 2 processes)"."""
    count = count_launched()
    of = f"x accumulation {config.accumulation} x {count} process{'es' if count > 1 else ''}"
    sizes: dict[str, float] = {} if config.batch_size is None else {"batch_size": config.batch_size}
    found = [
        f"{most * config.accumulation * count:g} {UNITS[name]} ({name} {most:g} {of})"
        for name, most in (config.budgets | sizes).items()
    ]
    return f"at most {' and '.join(found)}" if config.budgets else found[0]


def _tell(config: StageConfig, line: str) -> None:
    if not config.quiet:
        say(line)


@contextmanager
def _loading_bar(config: StageConfig) -> Iterator[None]:
    """On a terminal, transformers' bar shows how much of the weights is loaded."""
    hidden = not transformers_logging.is_progress_bar_enabled()
    if hidden and sys.stderr.isatty() and not config.quiet:
        transformers_logging.enable_progress_bar()
    try:
        yield
    finally:
        if hidden:
            transformers_logging.disable_progress_bar()


def _smaller_batch(config: StageConfig) -> str:
    now = config.batch_size
    fits = f"`soundwave memory --stage {config.stage}` tells what fits"
    if config.budgets or now is None:
        return f"use half of {' and '.join(config.budgets)}, and accumulation={2 * config.accumulation}; {fits}"
    if now == 1:
        return f"a batch is one sample already: use shorter recordings, or smaller backbones; {fits}"
    smaller = next(size for size in range(now // 2, 0, -1) if now % size == 0)
    return (
        f"use batch_size={smaller} accumulation={config.accumulation * now // smaller} in place of {now} and "
        f"{config.accumulation}, which gives a step as many samples; {fits}"
    )


def _first_clips(collator: CheckedCollator, samples: Iterable[Sample], config: StageConfig) -> list[torch.Tensor]:
    """Features [n_mels, T_mel] of the first samples that have audio, as many as a batch may hold."""
    clips: list[torch.Tensor] = []
    left = list(config.budgets.values())
    for sample in samples:
        left = [most - cost for most, cost in zip(left, _costs_of(sample, config), strict=True)]
        if any(most < 0 for most in left):
            break
        with suppress(AudioError):  # such a sample is left out, with a message, when its batch is made
            clip = collator.clip(sample)
            clips += [] if clip is None else [clip]
        if len(clips) == config.batch_size:
            break
    return clips


def _initialise_adapter(
    config: StageConfig,
    model: SoundwaveForConditionalGeneration,
    processor: SoundwaveProcessor,
    clips: list[torch.Tensor],
    processes: Processes,
) -> None:
    """Fit a fresh alignment adapter and its blank to the first recordings: as over all processes' in one batch."""
    count = sum(processes.sums(len(clips)))
    if not count:
        return
    _tell(config, f"setting the adapter's scale and the blank's bias from the first {count} recordings")
    inputs = processor.pad_features(clips) if clips else {}
    inputs = {name: x.to(model.device) for name, x in inputs.items()}
    found = processes.gather(model.frame_moments(**inputs) if clips else None)
    moments = [each for each in found if each is not None]
    whole = sum(rows for rows, _, _ in moments)
    mean, mean_square = (torch.stack([each[place] * (each[0] / whole) for each in moments]).sum(0) for place in (1, 2))
    if not model.standardise_frames(mean, mean_square):
        _tell(config, "the first recordings are all alike to the encoder, as silence is: the scale stays as it is")
    bias, rows = 0.0, 0
    if clips:
        bias = model.initialise_blank(**inputs)
        rows = int((-(-inputs["feature_lengths"] // (2 * model.config.frame_stack))).sum())
    if processes.count > 1:
        biases = processes.gather((bias, rows))
        with torch.no_grad():
            model.blank_bias.fill_(sum(bias * rows for bias, rows in biases) / sum(rows for _, rows in biases))


def _summarise_left_out(journal: Journal, total: int) -> None:
    if not journal.left_out:
        return
    # The same fault has other figures in each sample: without them equal faults can be counted.
    faults = Counter(re.sub(r"\d[\d.]*", "…", reason.split(";")[0]) for reason in journal.left_out.values())
    shown = ", ".join(f"{count} × {fault}" for fault, count in faults.most_common(5))
    say(f"left out {len(journal.left_out)} of {total} samples, listed in {journal.out / 'left_out.jsonl'}: {shown}")


def build_model(config: StageConfig, device: torch.device) -> SoundwaveForConditionalGeneration:
    """The model that a stage starts from: the model of the stage before, or new adapters on the backbones."""
    dtype = pick_dtype(device.type)[0] if config.dtype == "auto" else getattr(torch, config.dtype)
    quantization = {"auto": "nf4" if device.type == "cuda" else None, "nf4": "nf4", "none": None}[config.quantization]
    changes: dict[str, Any] = {"quantization": quantization, "ctc_weight": config.ctc_weight}
    changes |= {"implementation": config.implementation, "exact": config.exact, "packed": config.packed}
    if config.adapter_dropout is not None:
        changes["adapter_dropout"] = config.adapter_dropout
    for masks in ("spec_augment_time_masks", "spec_augment_mel_masks"):
        # Set in either case: otherwise a model would keep those of its last stage.
        changes[masks] = getattr(SoundwaveConfig(), masks) if config.spec_augment else 0
    if config.stage == 1:
        changes["quantization"] = None
    if config.model is None:
        if config.stage == 3:
            raise ConfigError("setting 'model' is missing; stage 3 starts from a model of stage 2: give model=…")
        changes |= {
            "semantics": config.semantics,
            "frame_stack": config.frame_stack,
            "keep": config.keep,
            "keys": config.keys,
            "lora_rank": config.lora_rank,
            "lora_alpha": config.lora_alpha,
        }
        soundwave_config = SoundwaveConfig.from_backbones(config.audio_tower, config.language_model, **changes)
        SoundwaveProcessor.for_config(soundwave_config)  # refuses a preprocessor of another Whisper before the weights
        _tell_what_is_loaded(config, soundwave_config, dtype, device)
        model = SoundwaveForConditionalGeneration.from_backbones(
            soundwave_config, dtype=dtype, language_model=config.stage > 1
        )
    else:
        changes |= _config_changes(config, config.model)
        saved = SoundwaveConfig.from_pretrained(config.model, **changes)
        check_language_model(saved.language_model, saved.lora_target_modules if saved.lora_rank else ())
        SoundwaveProcessor.for_config(saved)  # refuses a tokenizer that cannot be used, before the weights are read
        _tell_what_is_loaded(config, saved, dtype, device)
        model = SoundwaveForConditionalGeneration.from_pretrained(
            config.model, dtype=dtype, language_model=config.stage > 1, **changes
        )
    model.config.stage = max(model.config.stage, config.stage)
    if device.type == "cpu" and model.language_model is not None:
        # On the CPU torch's flash attention takes ten times as long in backward over a few dozen tokens (docs/log.md).
        model.language_model.set_attn_implementation("eager")
    on_cuda = device.type == "cuda"
    if model.language_model is not None and (
        on_cuda if config.gradient_checkpointing is None else config.gradient_checkpointing
    ):
        model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        # The call above makes the embeddings require a gradient, which only reentrant checkpointing needs.
        model.language_model.disable_input_require_grads()
    return model


def _tell_what_is_loaded(config: StageConfig, model: SoundwaveConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Say what is loaded and how large it is, and refuse what the memory cannot hold."""
    parts = sizes_of(model, dtype, language_model=config.stage > 1)
    if config.sharding != "none":  # the whole is read into the machine's memory first
        refuse_what_does_not_fit(parts, torch.device("cpu"))
        parts = sharded_sizes(parts, model, dtype)
    refuse_what_does_not_fit(parts, device)
    _tell(config, f"loading {', and '.join(part.text for part in parts)}")


def build_sampler(
    config: StageConfig, samples: Iterable[Sample], processes: Processes | None = None
) -> BucketBatchSampler:
    """The batches of a stage: samples of similar length, which stage II draws at a temperature.

    The length is what a stage pads: frames in stage I, and in the others also the language model's input (prompts,
    answers and kept frames).
    """
    samples = Samples.of(samples)
    lengths = samples.seconds() if config.stage == 1 else samples.tokens()
    tasks, settings = samples.tasks(), _settings_of_sampler(config, processes)
    if config.batch_size is not None and not config.budgets:
        return BucketBatchSampler(lengths, tasks, config.batch_size, **settings)
    all_costs = {"batch_tokens": samples.tokens(), "batch_duration": np.nan_to_num(samples.seconds())}
    for name, most in config.budgets.items():
        if len(over := np.flatnonzero(all_costs[name] > most)):
            raise ConfigError(
                f"{name} = {most:g}, but {samples[over[0]].id} alone has {all_costs[name][over[0]]:g} {UNITS[name]}; "
                "give more, or leave the sample out"
            )
    costs = np.stack([all_costs[name] for name in config.budgets], axis=1)
    budget, batches = list(config.budgets.values()), config.steps * config.accumulation
    return DynamicBatchSampler(lengths, tasks, costs, budget, batches, batch_size=config.batch_size, **settings)


def _settings_of_sampler(config: StageConfig, processes: Processes | None) -> dict[str, Any]:
    return {
        "seed": config.seed,
        "temperature": paper_temperature if config.stage == 2 and config.temperature else None,
        "rank": processes.rank if processes else 0,
        "ranks": processes.count if processes else 1,
    }


def _costs_of(sample: Sample, config: StageConfig) -> list[float]:
    """What a sample takes of each of the budgets."""
    costs = {"batch_tokens": tokens_of(sample), "batch_duration": (sample.audio and sample.duration) or 0.0}
    return [costs[name] for name in config.budgets]


def _config_changes(config: StageConfig, model: Path) -> dict[str, Any]:
    """Changes to the configuration of the model that a stage starts from.

    Raises:
        ConfigError: the model is missing or of another stage, or a setting contradicts what it has decided.
    """
    if not (model / "config.json").is_file():
        inside = model / "model"
        found = (inside / "config.json").is_file()
        hint = f"write model={inside}" if found else "name the folder that the stage before printed"
        raise ConfigError(f"model = {str(model)!r} holds no model; {hint}")
    try:
        saved = SoundwaveConfig.from_pretrained(model)
    except ValueError as error:
        raise ConfigError(f"model = {str(model)!r}: {error}") from None
    # A model without LoRA, such as the released one, may see stage II again: it gets new matrices.
    merged = saved.stage >= 2 and not saved.lora_rank
    if config.stage < (2 if merged else saved.stage) or config.stage > saved.stage + 1:
        raise ConfigError(
            f"model = {str(model)!r} has seen stage {saved.stage}, but stage {config.stage} starts from one "
            f"of stage {max(config.stage - 1, 1)}" + (f" or {config.stage}" if config.stage > 1 else "")
        )
    changes = {}
    if merged:
        changes = {"lora_rank": config.lora_rank, "lora_alpha": config.lora_alpha}
    for name in ("audio_tower", "language_model", "semantics", "frame_stack", *OF_STAGE_2):
        if name in changes:
            continue
        wanted, found = getattr(config, name), getattr(saved, name)
        if name not in config.model_fields_set or wanted in (None, found):
            continue
        if saved.stage >= 2 or name not in OF_STAGE_2:
            raise ConfigError(f"{name} = {wanted!r}, but the model in {model} has {found!r}: leave it out")
        changes[name] = wanted
    return changes


def _select(config: StageConfig, left_out: list[LeftOut]) -> Samples:
    """The samples that this stage trains on. Samples that cannot be used are added to `left_out`.

    Raises:
        SampleError: with `strict`, a sample cannot be used. ConfigError: no sample is left.
    """
    chosen = select_samples(
        config.train,
        left_out,
        stage=config.stage,
        allow_outside=config.allow_outside,
        strict=config.strict,
        note=say,
    )
    if chosen.unfit:
        say(f"left out {chosen.unfit} of {chosen.read} samples: stage 1 needs a recording with a text")
    if not chosen.samples:
        needed = "recordings with a text" if config.stage == 1 else "samples"
        why = f"; {len(left_out)} were left out, the first: {left_out[0]}" if left_out else ""
        raise ConfigError(
            f"{', '.join(map(str, config.train))}: no sample to train on; stage {config.stage} needs {needed}{why}"
        )
    return chosen.samples


def _arguments(config: StageConfig, device: torch.device) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(config.out),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size or 1,  # Trainer only logs it: the sampler makes the batches
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type=config.scheduler,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim={"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit"}[config.optimizer],
        logging_steps=config.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=config.save_steps,
        save_total_limit=config.save_total_limit,
        seed=config.seed,
        use_cpu=device.type == "cpu",
        dataloader_num_workers=config.workers,
        report_to=[],  # `Board` writes TensorBoard's log
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        log_level_replica="passive",  # what the command has set, as for the first process; the default is louder
    )
    if device.type == "cuda" and not is_launched() and arguments.n_gpu > 1:
        say(
            f"there are {arguments.n_gpu} GPUs, of which this run uses one; to use all, start it with "
            f"`torchrun --nproc-per-node {arguments.n_gpu} --no-python soundwave train …`"
        )
        arguments._n_gpu = 1  # else Trainer would cut each batch for torch's DataParallel
    return arguments

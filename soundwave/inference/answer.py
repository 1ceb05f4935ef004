"""Load a trained model, read recordings with it by CTC, and let its language model answer."""

import sys
import warnings
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from soundwave.backbones.load import token_ids
from soundwave.backbones.released import MODEL_TYPE as RELEASED
from soundwave.hardware import pick_device, pick_dtype
from soundwave.inference.drafts import DraftCounts, decode_drafts, reason_against_drafts
from soundwave.inference.timestamps import Reading, readings_of
from soundwave.model.chat import Prompt
from soundwave.model.configuration import SoundwaveConfig
from soundwave.model.hub import local_folder, saved_config
from soundwave.model.modeling import SoundwaveForConditionalGeneration, batch_to
from soundwave.model.processing import SoundwaveProcessor
from soundwave.model.sizes import fits, refuse_what_does_not_fit, sizes_of

DRAFTS = ("ctc", "none")


class LoadedModel(NamedTuple):
    """A trained model on this machine's device, in evaluation mode, and the processor that makes its inputs."""

    model: SoundwaveForConditionalGeneration
    processor: SoundwaveProcessor


def load_model(folder: str | Path, *, language_model: bool | None = None) -> LoadedModel:
    """Load a saved model onto this machine's device (CUDA if there is one), in the dtype that is fastest on it.

    A model of stage I is loaded without the layers of its language model, which it does not need. A model that was
    trained on 4-bit weights runs unquantised on a CPU, where that is faster; if the memory does not suffice for that it
    runs in 4 bits, which is said. So does a model without LoRA, such as the released checkpoint.

    Args:
        folder: the folder that training wrote, for example `runs/demo/model`. Its configuration names the backbones;
            they are fetched if they are not on this machine yet. It may be a checkpoint in the layout of the released
            one, too, which holds them. A text may be a Hub id, "owner/name".
        language_model: False leaves the layers of the language model out, where only CTC is read. None: as its stage
            needs them.

    Raises:
        FileNotFoundError: `folder` holds no model.
        ValueError: `folder` holds a model of another kind, its configuration or weights are damaged or do not fit, or
            the memory does not suffice.
    """
    folder = local_folder(folder)
    saved_config(folder, (SoundwaveConfig.model_type, RELEASED))  # refuses what is no model
    device, _ = pick_device()
    dtype, config = pick_dtype(device.type)[0], SoundwaveConfig.from_pretrained(folder)
    whole, trained = config.stage != 1 and language_model is not False, config.quantization
    config.quantization = trained if device.type == "cuda" else None
    parts = sizes_of(config, dtype, language_model=whole)
    shrinks = trained or (None if config.lora_rank else "nf4")
    if whole and shrinks and not config.quantization and not fits(parts, device):
        config.quantization = shrinks
        print(
            f"{folder}: the language model is used in 4 bits{', as it was trained' if trained else ''}: "
            f"{parts[1].text} does not fit into the free memory",
            file=sys.stderr,
        )
        parts = sizes_of(config, dtype, language_model=whole)
    refuse_what_does_not_fit(parts, device)
    processor = SoundwaveProcessor.for_config(config)  # a tokenizer that cannot be used is refused before the rest
    model = SoundwaveForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, language_model=whole, quantization=config.quantization
    )
    return LoadedModel(model.to(device).eval(), processor)


@torch.no_grad()
def read_ctc(
    model: SoundwaveForConditionalGeneration, processor: SoundwaveProcessor, clips: Sequence[Tensor]
) -> tuple[list[str], Tensor]:
    """Read recordings by greedy CTC, without the language model.

    Args:
        clips: log-mel features float32 [n_mels, T_mel] of A recordings.

    Returns:
        The texts, and the path int64 [A, T] from which they are read: the most probable id of each frame, -1 in the
        padding.
    """
    batch = batch_to(processor.pad_features(list(clips)), model.device)
    path = model(**batch).path.cpu()
    return [processor.ctc_text(row, model.blank) for row in path], path


@torch.no_grad()
def answer(
    model: SoundwaveForConditionalGeneration,
    processor: SoundwaveProcessor,
    prompts: Sequence[Prompt],
    audio: Sequence[Tensor | None],
    *,
    max_new_tokens: int = 256,
    cut_off: list[int] | None = None,
    draft: str = "none",
    accept: float | None = None,
    counts: DraftCounts | None = None,
    watch: Callable[[list[list[int]]], Sequence[bool]] | None = None,
    prompt_lengths: list[int] | None = None,
    readings: list[Reading | None] | None = None,
) -> list[str]:
    """Let the language model answer prompts by greedy decoding.

    Args:
        prompts: what the user says, one text or one chat for each answer.
        audio: for each prompt the log-mel features float32 [n_mels, T_mel] of its recording, or None for text only.
        max_new_tokens: longest answer, in tokens.
        cut_off: the numbers of the answers that this limit has cut off are added to it.
        draft: "ctc" lets the language model check what CTC reads instead of writing it token by token, for answers
            that are transcripts: the same text, sooner. A language model that cannot do this writes
            without drafts, and a warning says why. "none" does without.
        accept: with drafts, a probability from which on a draft is the answer, unread by the language model: that of
            its least sure token. Faster, but not the same text. None lets the language model check every draft.
        counts: what the drafts have saved is added to it.
        watch: without drafts, called after each token with the tokens of each answer so far, padding behind the end
            token included; it tells for each answer whether it ends here.
        prompt_lengths: the inputs of the language model are added to it, counted for each prompt, speech included.
        readings: what CTC reads in the recording of each prompt is added to it, None without one.

    Returns:
        The answers, without special tokens and outer white space.

    Raises:
        ValueError: `max_new_tokens` is below 1; as in `check_draft`.
    """
    check_longest(max_new_tokens)
    check_draft(draft, accept)
    batch = batch_to(dict(processor(prompts, audio)), model.device)
    ends = end_tokens(model, processor)
    if draft == "ctc" and (reason := reason_against_drafts(model.language_model)):
        warnings.warn(f"the language model writes without drafts, because {reason}", stacklevel=2)
        draft = "none"
    aligned = None
    if readings is not None and "input_features" in batch:
        aligned = model.align(batch["input_features"], batch["feature_lengths"], packed=model.packed)
        found = iter(readings_of(aligned))
        readings += [None if clip is None else next(found) for clip in audio]
    embeddings, mask, read = model.embed_prompts(**batch, aligned=aligned)
    if prompt_lengths is not None:
        prompt_lengths += mask.sum(1).tolist()
    if draft == "ctc":
        clips = iter(() if read is None else zip(*(x.cpu() for x in read), strict=True))
        read = [None if clip is None else next(clips) for clip in audio]
        drafts = [[] if clip is None else draft_ids(model, processor, clip[0]) for clip in read]
        sure = [clip is not None and accept is not None and certainty(*clip, model.blank) >= accept for clip in read]
        rest = [number for number, is_sure in enumerate(sure) if not is_sure]
        rows = [draft[:max_new_tokens] for draft in drafts]
        if counts is not None:
            counts.unread += sum(sure)
        if rest:
            chosen = [drafts[number] for number in rest]
            with model.decoding():
                written = decode_drafts(model, embeddings[rest], mask[rest], chosen, ends, max_new_tokens, counts)
            for number, row in zip(rest, written, strict=True):
                rows[number] = row
    else:
        with model.decoding():
            rows = model.language_model.generate(
                inputs_embeds=embeddings,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=sorted(ends) or None,
                pad_token_id=processor.pad_token_id,
                stopping_criteria=None if watch is None else StoppingCriteriaList([_Watched(watch)]),
            ).tolist()
    if cut_off is not None:
        cut_off += [number for number, row in enumerate(rows) if len(row) >= max_new_tokens and ends.isdisjoint(row)]
    # What follows an end token is padding, and not every end token is a special one, which decoding leaves out.
    rows = [list(takewhile(lambda token: token not in ends, row)) for row in rows]
    return [text.strip() for text in processor.tokenizer.batch_decode(rows, skip_special_tokens=True)]


class _Watched(StoppingCriteria):
    """Asks `watch` after each token which answers end."""

    def __init__(self, watch: Callable[[list[list[int]]], Sequence[bool]]):
        self.watch = watch

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(self.watch(input_ids.tolist()), dtype=torch.bool, device=input_ids.device)


def check_longest(max_new_tokens: int) -> None:
    """ValueError: no token may be written. Only transformers' decoding would say so, and not that with drafts."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}, but it must be 1 or more")


def check_draft(draft: str, accept: float | None = None) -> None:
    """ValueError: `draft` is neither "ctc" nor "none"; `accept` is no probability, or given without drafts."""
    if draft not in DRAFTS:
        raise ValueError(f"draft = {draft!r}, but it must be {' or '.join(map(repr, DRAFTS))}")
    if accept is None:
        return
    if draft == "none":
        raise ValueError(f"accept = {accept}, but without drafts there is nothing to accept; leave it out")
    if not 0 <= accept <= 1:
        raise ValueError(f"accept = {accept}, but it is a probability, 0 to 1")


def certainty(path: Tensor, log_prob: Tensor, blank: int) -> float:
    """The probability of the least sure token that a CTC path int64 [T] reads, 1 if it reads none.

    That of a token is the highest among its frames, `log_prob` [T].
    """
    change = torch.cat([path.new_ones(1, dtype=torch.bool), path[1:] != path[:-1]])
    run, of_token = change.cumsum(0) - 1, (path != blank) & (path >= 0)
    if not of_token.any():
        return 1.0
    highest = log_prob.new_full((len(path),), -torch.inf).scatter_reduce(0, run, log_prob, "amax")
    return float(highest[run[of_token]].min().exp())


def draft_ids(model: SoundwaveForConditionalGeneration, processor: SoundwaveProcessor, path: Tensor) -> list[int]:
    """Tokens of the answer that a CTC path int64 [T] reads.

    They are those of its text, because CTC writes a space before the first word, and an answer does not.
    """
    return processor.answer_ids(processor.ctc_text(path, model.blank))[:-1]


def end_tokens(model: SoundwaveForConditionalGeneration, processor: SoundwaveProcessor) -> set[int]:
    """The tokens that end an answer: the tokenizer's, which training uses, and those of the language model."""
    return {processor.tokenizer.eos_token_id, *token_ids(model.language_model.generation_config.eos_token_id)} - {None}

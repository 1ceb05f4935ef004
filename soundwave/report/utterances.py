"""A few recordings through the model: what is heard, kept, attended to and answered.

One recording at a time, through the trained weights in this machine's dtype; what is shown of them (probabilities,
attention) is worked out in float32 from the aligned frames, by `soundwave.eager`'s maths.
"""

import base64
import io
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import soundfile
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from soundwave.backbones.wheels import EmbeddedError
from soundwave.data.audio import SAMPLING_RATE, load_audio
from soundwave.data.collate import answer_of, ctc_text_of, prompt_of
from soundwave.data.manifest import Sample, read_manifest
from soundwave.evaluation.scores import normalise
from soundwave.hardware import pick_device, pick_dtype
from soundwave.inference.answer import answer, read_ctc
from soundwave.model.configuration import SoundwaveConfig
from soundwave.model.modeling import SoundwaveForConditionalGeneration, batch_to
from soundwave.model.processing import SoundwaveProcessor
from soundwave.report.runs import Run

ENCODER_FRAME = 0.02  # s; Whisper's
ALTERNATIVES = 3  # other tokens named for a kept frame
MEL_COLUMNS = 1000  # a spectrogram is no wider; longer ones are averaged
FLAC_BYTES = 150_000  # audio that takes more is embedded as MP3: six of 30 s must stay below 5 MB
ATTENTION_ROWS = 150  # kept frames, most; a byte for each pair of frames
NEW_TOKENS = 64


@dataclass(frozen=True)
class Asked:
    """One sample about a recording, and what the run answered; None where it was not asked yet."""

    sample: Sample
    given: str | None

    @property
    def identity(self) -> tuple[str, str]:
        """By which the same sample is found among another run's answers."""
        return self.sample.id, answer_of(self.sample)


@dataclass
class Recording:
    """A recording and all that was asked about it."""

    asked: list[Asked] = field(default_factory=list)

    @property
    def tasks(self) -> set[str]:
        return {one.sample.task for one in self.asked}

    @property
    def word_errors(self) -> int:
        """Of the answers to `transcribe`."""
        return sum(
            word["kind"] != "equal"
            for one in self.asked
            if one.sample.task == "transcribe" and one.given is not None
            for word in align_words(answer_of(one.sample), one.given)
        )


def describe(run: Run, others: dict[str, Run], count: int, allow_outside: bool = False) -> dict[str, Any]:
    """`items`, one for each of `count` recordings of `run`, and `note`: how they were chosen, or why there is none.

    Args:
        others: name -> run whose answers about the same samples are shown beside.
        allow_outside: as of `read_manifest`.
    """
    if not count:
        return {"items": [], "note": "None was asked for."}
    if run.model is None:
        return {"items": [], "note": f"There is no model in {run.folder} yet."}
    try:
        if run.answers:
            chosen, note = _answered(run, count, allow_outside)
        else:
            chosen, note = _trained_on(run, count, allow_outside)
        return {"items": _items(run, others, chosen), "note": note}
    except (ValueError, OSError, EmbeddedError) as error:
        # Recordings or backbones that are gone: the curves are still worth seeing.
        return {"items": [], "note": f"None can be shown: {error}"}


def align_words(reference: str, given: str) -> list[dict[str, str]]:
    """jiwer's alignment of two texts, normalised as for the word error rate, word by word.

    Each has `kind` (equal, substitute, delete, insert), `reference` and `given`; the missing one is empty.
    """
    wanted, found = normalise(reference).split(), normalise(given).split()
    if not wanted:
        return [{"kind": "insert", "reference": "", "given": word} for word in found]
    pairs = []
    for chunk in jiwer.process_words([" ".join(wanted)], [" ".join(found)]).alignments[0]:
        left = wanted[chunk.ref_start_idx : chunk.ref_end_idx]
        right = found[chunk.hyp_start_idx : chunk.hyp_end_idx]
        for place in range(max(len(left), len(right))):
            one, other = (words[place] if words else "" for words in (left, right))
            pairs.append({"kind": chunk.type, "reference": one, "given": other})
    return pairs


def cross_attention(shrinking: nn.Module, hidden: Tensor, kept: Tensor) -> Tensor:
    """Weights with which kept frames gather the others in the shrinking adapter, as `eager.ShrinkingAdapter` has them.

    Args:
        shrinking: eager or fused. hidden: [T, D], one utterance's aligned frames. kept: int64 [K], indices into them.

    Returns:
        float32 [H, K, T]; rows sum to 1. With `keys="kept"` frames that were not kept have 0.
    """
    weight, bias = shrinking.in_proj_weight.float(), shrinking.in_proj_bias.float()
    hidden, heads = hidden.float(), shrinking.num_heads
    context = hidden if shrinking.keys == "all" else hidden[kept]
    query, key = (
        F.linear(rows, weight.chunk(3)[part], bias.chunk(3)[part]).unflatten(-1, (heads, -1)).transpose(0, 1)
        for part, rows in enumerate((hidden[kept], context))
    )
    weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
    if shrinking.keys == "all":
        return weights
    return weights.new_zeros(heads, len(kept), len(hidden)).index_copy(2, kept, weights)


@torch.no_grad()
def examine(
    model: SoundwaveForConditionalGeneration, processor: SoundwaveProcessor, audio: np.ndarray
) -> dict[str, Any]:
    """What the model makes of a recording, float32 [samples] at 16 kHz, as the page draws it.

    `mel`, `used` (probability of any sub-word, a frame), `kept` frames with their tokens, `attention` (mean over heads;
    None where there is none or of too many frames to look at), `audio`. Arrays are base64 of bytes 0-255.
    """
    mel = processor.features(audio)
    batch = batch_to(processor.pad_features([mel]), model.device)
    with torch.autocast(model.device.type, dtype=model.compute_dtype, enabled=model.compute_dtype != torch.float32):
        hidden, lengths, ctc = model.align(**batch)
    hidden, kept = hidden[0].float(), model.kept_frames(ctc, lengths).index
    blank = hidden @ model.blank_weight.float() + model.blank_bias.float()
    words = F.linear(hidden, model.head_weight.float())
    probability = torch.cat([words, blank[:, None]], dim=1).softmax(-1)
    best = probability[kept].topk(1 + ALTERNATIVES)
    text = {}
    for token in {*best.indices.flatten().tolist(), *ctc.path[0, kept].tolist()}:
        text[token] = "" if token == model.blank else processor.tokenizer.decode([token])
    attention = None
    if model.config.stage > 1 and model.config.keys != "none" and len(kept) <= ATTENTION_ROWS:
        weights = cross_attention(model.shrinking, hidden, kept).mean(0)
        highest = weights.amax(1, keepdim=True)
        attention = {"rows": _bytes(weights / highest), "scale": _rounded(highest.flatten())}
    return {
        "seconds": len(audio) / SAMPLING_RATE,
        "frame_seconds": ENCODER_FRAME * model.config.frame_stack,
        "mel": _spectrogram(mel),
        "used": _bytes(1 - probability[:, model.blank]),
        "kept": [
            {
                "frame": int(frame),
                "text": text[int(ctc.path[0, frame])],
                "probability": _rounded(probability[frame, ctc.path[0, frame]]),
                "others": [
                    [text[int(token)], _rounded(value)]
                    for token, value in zip(best.indices[row], best.values[row], strict=True)
                    if token != ctc.path[0, frame]
                ][:ALTERNATIVES],
            }
            for row, frame in enumerate(kept)
        ],
        "attention": attention,
        "audio": audio_uri(audio),
    }


def audio_uri(audio: np.ndarray) -> str:
    """A `data:` address of float32 [samples] at 16 kHz: FLAC, or MP3 where FLAC takes more than `FLAC_BYTES`."""
    audio = np.clip(audio, -1.0, 1.0)
    kind, encoded = "flac", io.BytesIO()
    soundfile.write(encoded, audio, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    if len(encoded.getvalue()) > FLAC_BYTES:
        kind, encoded = "mpeg", io.BytesIO()
        soundfile.write(encoded, audio, SAMPLING_RATE, format="MP3", bitrate_mode="CONSTANT", compression_level=0.8)
    return f"data:audio/{kind};base64,{base64.b64encode(encoded.getvalue()).decode()}"


def _answered(run: Run, count: int, allow_outside: bool) -> tuple[list[Recording], str]:
    """Recordings that the run was scored on, half of them with word errors where there are as many."""
    manifests: dict[str, dict[str, Sample]] = {}
    recordings: dict[tuple, Recording] = {}
    for row in run.answers:
        name = row["sample"].rpartition(":")[0]
        if name not in manifests:
            path = _manifest(run, name)
            manifests[name] = {sample.id: sample for sample in read_manifest(path, allow_outside=allow_outside)}
        sample = manifests[name].get(row["sample"])
        if sample is None or answer_of(sample) != row["reference"]:
            raise ValueError(f"{row['sample']} is no longer what the run was scored on; score it again")
        if sample.audio is not None:
            recording = recordings.setdefault((sample.audio, sample.offset, sample.duration), Recording())
            recording.asked.append(Asked(sample, row["answer"]))
    # Those about which most was asked, in the manifests' order.
    ranked = sorted(recordings.values(), key=lambda recording: -len(recording.tasks))
    wrong = [recording for recording in ranked if recording.word_errors]
    right = [recording for recording in ranked if not recording.word_errors]
    chosen = wrong[: max(count // 2, count - len(right))]
    chosen += right[: count - len(chosen)]
    failed = sum(bool(recording.word_errors) for recording in chosen)
    note = (
        f"From the test: {failed} that were written down with word errors and {len(chosen) - failed} without. "
        f"Of all {len(recordings)} recordings, {len(wrong)} had word errors."
    )
    return chosen, note


def _trained_on(run: Run, count: int, allow_outside: bool) -> tuple[list[Recording], str]:
    """Recordings of the last training's own manifests, evenly apart; the model still has to answer."""
    last = run.passes[-1]
    samples = [
        sample
        for manifest in last.config.get("train", [])
        for sample in read_manifest(
            _manifest(run, Path(manifest).name), allow_outside=allow_outside, leave_out=lambda *_: None
        )
        if sample.audio is not None and normalise(sample.text or "")
    ]
    if not samples:
        raise ValueError("the manifests that were trained on hold no recording with a transcript")
    chosen = [samples[place * len(samples) // count] for place in range(min(count, len(samples)))]
    note = "From the manifests that it was trained on, evenly apart: the model has seen them."
    return [Recording([Asked(sample, None)]) for sample in chosen], note


def _items(run: Run, others: dict[str, Run], chosen: list[Recording]) -> list[dict[str, Any]]:
    device, _ = pick_device()
    config = SoundwaveConfig.from_pretrained(run.model)
    asks = config.stage > 1 and not run.answers
    model = SoundwaveForConditionalGeneration.from_pretrained(
        run.model,
        dtype=pick_dtype(device.type)[0],
        language_model=asks,
        quantization=config.quantization if asks and device.type == "cuda" else None,
    ).to(device)
    processor = SoundwaveProcessor.from_pretrained(run.model)
    theirs = {
        name: {(row["sample"], row["reference"]): row["answer"] for row in other.answers}
        for name, other in others.items()
    }
    items = []
    for recording in chosen:
        first = recording.asked[0].sample
        audio = load_audio(first.audio, offset=first.offset, duration=first.duration)
        item = examine(model, processor, audio) | {"id": first.id, "text": first.text or ""}
        item["answers"] = [
            _answer(one.sample, _ask(model, processor, one.sample, audio), config.stage == 1)
            if one.given is None
            else _answer(one.sample, one.given)
            for one in recording.asked
        ]
        item["others"] = {
            name: [_answer(one.sample, found[one.identity]) for one in recording.asked if one.identity in found]
            for name, found in theirs.items()
        }
        items.append(item)
    return items


def _ask(
    model: SoundwaveForConditionalGeneration, processor: SoundwaveProcessor, sample: Sample, audio: np.ndarray
) -> str:
    """The model's own answer to a sample; a model of stage I reads its CTC."""
    clip = processor.features(audio)
    if model.config.stage == 1:
        return read_ctc(model, processor, [clip])[0][0]
    return answer(model, processor, [prompt_of(sample)], [clip], max_new_tokens=NEW_TOKENS)[0]


def _answer(sample: Sample, given: str, read_by_ctc: bool = False) -> dict[str, Any]:
    """An answer as the page shows it; `words` are aligned for transcriptions only."""
    reference = ctc_text_of(sample) if read_by_ctc else answer_of(sample)
    return {
        "task": sample.task,
        "prompt": prompt_of(sample),
        "reference": reference,
        "given": given,
        "right": normalise(reference) == normalise(given),
        "words": align_words(reference, given) if sample.task == "transcribe" else None,
    }


def _manifest(run: Run, name: str) -> Path:
    """A manifest of the folder that the run was trained from, which may have been moved with the run."""
    folders = [Path(train).parent for one in reversed(run.passes) for train in one.config.get("train", [])]
    places = [*folders, *(run.folder / folder.name for folder in folders)]
    for place in places:
        if (place / name).is_file():
            return place / name
    raise FileNotFoundError(f"{name} is in none of {', '.join(sorted({str(place) for place in places}))}")


def _spectrogram(mel: Tensor) -> dict[str, Any]:
    """Bytes of log-mel [n_mels, T_mel], row by row, over its own range."""
    width = -(-mel.shape[1] // MEL_COLUMNS)
    if width > 1:
        mel = F.avg_pool1d(mel[None], width, ceil_mode=True)[0]
    low, high = mel.min(), mel.max()
    return {"bins": mel.shape[0], "columns": mel.shape[1], "rows": _bytes((mel - low) / (high - low).clamp(min=1e-6))}


def _bytes(values: Tensor) -> str:
    """base64 of values 0-1 as bytes."""
    return base64.b64encode((values * 255).round().to(torch.uint8).cpu().numpy().tobytes()).decode()


def _rounded(values: Tensor) -> Any:
    return [float(f"{value:.4g}") for value in values.tolist()] if values.dim() else float(f"{values.item():.4g}")

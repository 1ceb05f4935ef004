"""A few recordings in the model: what CTC reads, which frames are kept, what they attend to, and the answers.

Each recording runs through the model alone, in this machine's dtype. The probabilities and the attention that the page
shows are computed in float32 from the aligned frames, as `soundwave.eager` defines them.
"""

import base64
import io
import math
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from soundwave.backbones.wheels import EmbeddedError
from soundwave.data.audio import SAMPLING_RATE, AudioError, load_audio
from soundwave.data.collate import answer_of, ctc_text_of, prompt_of
from soundwave.data.manifest import ManifestError, Sample, read_manifest
from soundwave.evaluation.scores import align, has_words, judge
from soundwave.evaluation.words import rules_for
from soundwave.inference.answer import answer, load_model, read_ctc
from soundwave.inference.long import windows
from soundwave.model.chat import text_of
from soundwave.model.configuration import SoundwaveConfig
from soundwave.model.modeling import SoundwaveForConditionalGeneration, batch_to
from soundwave.model.processing import SoundwaveProcessor
from soundwave.report.runs import Run

ENCODER_FRAME = 0.02  # seconds of a frame of Whisper's encoder
ALTERNATIVES = 3  # less probable tokens that are named for a kept frame
MEL_COLUMNS = 1000  # most columns of a spectrogram; a longer one is averaged
FLAC_BYTES = 150_000  # Larger audio is embedded as MP3, so that a page of six recordings of 30 s stays below 5 MB.
ATTENTION_ROWS = 150  # With more kept frames no attention is shown: it takes a byte for each pair of frames.
NEW_TOKENS = 256  # longest answer, as in `soundwave evaluate`


@dataclass(frozen=True)
class Asked:
    """A sample about a recording and the answer of the run; None: its model was not asked yet."""

    sample: Sample
    given: str | None
    language: str | None = None  # by whose rules the run's words were counted; None: the script decides

    @property
    def identity(self) -> tuple[str, str]:
        """What identifies the sample among the answers of another run."""
        return self.sample.id, answer_of(self.sample)


@dataclass
class Recording:
    """A recording and all samples about it."""

    asked: list[Asked] = field(default_factory=list)

    @property
    def tasks(self) -> set[str]:
        return {one.sample.task for one in self.asked}

    @property
    def word_errors(self) -> int:
        """Number of word errors in the answers to `transcribe`."""
        return sum(
            word["kind"] != "equal"
            for one in self.asked
            if one.sample.task == "transcribe" and one.given is not None
            for word in align_words(answer_of(one.sample), one.given, one.language)
        )


def describe(
    run: Run, others: dict[str, Run], count: int, allow_outside: bool = False, test: Path | None = None
) -> dict[str, Any]:
    """What the page shows of a few recordings.

    Args:
        run: the run whose model hears the recordings.
        others: name -> another run, whose answers about the same samples are shown as well.
        count: number of recordings.
        allow_outside: as in `read_manifest`.
        test: a manifest of recordings that were held out, to show those.

    Returns:
        `items`, one for each recording, and `note`, which says how they were chosen or why there are none.
    """
    held_out = None if test is None else _held_out(run, Path(test), allow_outside)  # first: a wrong path is an error
    if not count:
        return {"items": [], "note": "No recordings were asked for."}
    model = run.model
    if model is None:
        return {"items": [], "note": f"There is no model in {run.folder} yet: training writes it at its end."}
    try:
        if held_out is not None:
            ordered, note = held_out
        elif run.answers:
            ordered, note = _answered(run, count, allow_outside)
        else:
            ordered, note = _trained_on(run, allow_outside)
        chosen, faults = _readable(ordered, count, spread=held_out is not None or not run.answers)
        return {"items": _items(model, others, chosen), "note": " ".join([note, *faults])}
    except (ValueError, OSError, EmbeddedError) as error:
        # The recordings or the backbones are gone, but the curves are still worth a page.
        return {"items": [], "note": f"None can be shown: {error}"}


def align_words(reference: str, given: str, language: str | None = None) -> list[dict[str, str]]:
    """Align two texts word by word (jiwer), by the rules of the word error rate (`soundwave.evaluation.words`).

    Args:
        language: whose rules, as in `rules_for`.

    Returns:
        For each place the `kind` (equal, substitute, delete or insert) and the words `reference` and `given`; a
        missing word is empty.
    """
    return align(reference, given, rules_for([reference], language)[0])


def cross_attention(shrinking: nn.Module, hidden: Tensor, kept: Tensor) -> Tensor:
    """Attention weights of the kept frames over all frames, in the shrinking adapter.

    Args:
        shrinking: `eager.ShrinkingAdapter` or `fused.ShrinkingAdapter`.
        hidden: [T, D], the aligned frames of one utterance.
        kept: int64 [K], indices of the kept frames.

    Returns:
        float32 [H, K, T]; each row sums to 1. With `keys="kept"` the weight of frames that are not kept is 0.
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
    """What the page draws of a recording, float32 [samples] at 16 kHz.

    Returns:
        `seconds` and `frame_seconds`, lengths of the recording and of an aligned frame; `mel`, the spectrogram;
        `used`, the probability of each frame that it is not blank; `kept`, the kept frames with their tokens;
        `attention`, the mean over the heads, or None if the model has none or more than `ATTENTION_ROWS` frames are
        kept; `audio`, a `data:` address. Arrays are base64 of bytes 0 to 255.
    """
    mel = processor.features(audio)
    batch = batch_to(processor.pad_features([mel]), model.device)
    with torch.autocast(model.device.type, dtype=model.compute_dtype, enabled=model.compute_dtype != torch.float32):
        hidden, lengths, ctc = model.align(**batch)
    hidden, kept = hidden[0].float(), model.kept_frames(ctc, lengths).index
    probability = model.ctc_logits(hidden).softmax(-1)
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
    """Samples, float32 [samples] at 16 kHz, as a `data:` address: FLAC, or MP3 if FLAC exceeds `FLAC_BYTES`."""
    audio = np.clip(audio, -1.0, 1.0)
    kind, encoded = "flac", io.BytesIO()
    soundfile.write(encoded, audio, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    if len(encoded.getvalue()) > FLAC_BYTES:
        kind, encoded = "mpeg", io.BytesIO()
        soundfile.write(encoded, audio, SAMPLING_RATE, format="MP3", bitrate_mode="CONSTANT", compression_level=0.8)
    return f"data:audio/{kind};base64,{base64.b64encode(encoded.getvalue()).decode()}"


def _answered(run: Run, count: int, allow_outside: bool) -> tuple[list[Recording], str]:
    """Recordings on which the run was scored; half of them have word errors, if there are enough of each."""
    manifests: dict[str, dict[str, Sample]] = {}
    recordings: dict[tuple, Recording] = {}
    for row in run.answers:
        name = row["sample"].rpartition(":")[0]
        if name not in manifests:
            path = _manifest(run, name)
            manifests[name] = {sample.id: sample for sample in read_manifest(path, allow_outside=allow_outside)}
        sample = manifests[name].get(row["sample"])
        if sample is None or answer_of(sample) != row["reference"]:
            raise ValueError(f"{row['sample']} is no longer the sample that the run was scored on; score it again")
        if sample.audio is not None:
            recording = recordings.setdefault((sample.audio, sample.offset, sample.duration), Recording())
            recording.asked.append(Asked(sample, row["answer"], run.summary.get("language")))
    # Recordings with samples of many tasks come first.
    ranked = sorted(recordings.values(), key=lambda recording: -len(recording.tasks))
    wrong = [recording for recording in ranked if recording.word_errors]
    right = [recording for recording in ranked if not recording.word_errors]
    chosen = wrong[: max(count // 2, count - len(right))]
    chosen += right[: count - len(chosen)]
    failed = sum(bool(recording.word_errors) for recording in chosen)
    note = (
        f"From the test: {failed} with word errors in the transcript and {len(chosen) - failed} without. "
        f"Of all {len(recordings)} recordings, {len(wrong)} have word errors."
    )
    return chosen, note


def _held_out(run: Run, test: Path, allow_outside: bool) -> tuple[list[Recording], str]:
    """The recordings of a manifest, without answers, and how many of them the run was trained on.

    Raises:
        ManifestError: the manifest cannot be read, or holds no recording.
    """
    missing: list[str] = []
    samples = read_manifest(test, allow_outside=allow_outside, leave_out=lambda name, *_: missing.append(name))
    recordings: dict[tuple, Recording] = {}
    for sample in samples:
        if sample.audio is not None:
            recording = recordings.setdefault((sample.audio, sample.offset, sample.duration), Recording())
            recording.asked.append(Asked(sample, None, run.summary.get("language")))
    if not recordings:
        raise ManifestError(f"{test}: holds no recording that can be read; give a manifest with audio_filepath")
    trained = _training_audio(run, allow_outside)
    known = sum(key[0] in trained for key in recordings)
    note = f"From {test.name}, at even distances of {len(recordings)} recordings; the model was asked for this page."
    if known:
        note += f" {known} of them are in the manifests of the training, so the model has learned them."
    if missing:
        note += f" {len(missing)} could not be opened, such as {missing[0]}."
    return list(recordings.values()), note


def _training_audio(run: Run, allow_outside: bool) -> set[str]:
    """The audio files of the training, as far as its manifests are still there."""
    found: set[str] = set()
    for one in run.passes:
        for manifest in one.config.get("train", []):
            with suppress(ValueError, OSError):
                path = _manifest(run, Path(manifest).name)
                rows = read_manifest(
                    path, allow_outside=allow_outside, leave_out=lambda *_: None, note=lambda line: None
                )
                found |= {sample.audio for sample in rows if sample.audio is not None}
    return found


def _readable(
    recordings: list[Recording], count: int, spread: bool
) -> tuple[list[tuple[Recording, np.ndarray]], list[str]]:
    """The first `count` recordings that can be read, or `spread`: at even distances, with their samples.

    Returns:
        The recordings, and sentences about those that could not be read.
    """
    places = list(range(len(recordings)))
    if spread:
        even = [place * len(recordings) // count for place in range(min(count, len(recordings)))]
        places = [*even, *sorted(set(places) - set(even))]
    chosen: dict[int, np.ndarray] = {}
    faults: list[str] = []
    for place in places:
        first = recordings[place].asked[0].sample
        if len(chosen) == count:
            break
        try:
            assert first.audio is not None
            chosen[place] = load_audio(first.audio, offset=first.offset, duration=first.duration)
        except AudioError as error:
            faults.append(f"Not shown: {error}.")
            if len(faults) > count and not chosen:
                raise
    return [(recordings[place], chosen[place]) for place in sorted(chosen)], faults


def _trained_on(run: Run, allow_outside: bool) -> tuple[list[Recording], str]:
    """Recordings from the manifests of the last training, without answers."""
    last = run.passes[-1]
    samples = [
        sample
        for manifest in last.config.get("train", [])
        for sample in read_manifest(
            _manifest(run, Path(manifest).name), allow_outside=allow_outside, leave_out=lambda *_: None
        )
        if sample.audio is not None and has_words(sample.text or "")
    ]
    if not samples:
        raise ValueError("the manifests of the training hold no recording with a transcript")
    note = (
        "From the manifests of the training, at even distances: the model was trained on them. "
        "`soundwave report --test MANIFEST` shows others."
    )
    return [Recording([Asked(sample, None, run.summary.get("language"))]) for sample in samples], note


def _items(folder: Path, others: dict[str, Run], chosen: list[tuple[Recording, np.ndarray]]) -> list[dict[str, Any]]:
    """The recordings and their samples as the page shows them, heard by the model in `folder`."""
    config = SoundwaveConfig.from_pretrained(folder)
    asks = config.stage > 1 and any(one.given is None for recording, _ in chosen for one in recording.asked)
    model, processor = load_model(folder, language_model=asks)
    theirs = {
        name: {(row["sample"], row["reference"]): row["answer"] for row in other.answers}
        for name, other in others.items()
    }
    items = []
    for recording, audio in chosen:
        first, pieces = recording.asked[0].sample, windows(audio)
        item = examine(model, processor, pieces[0]) | {"id": first.id, "text": first.text or ""}
        item["whole_seconds"] = len(audio) / SAMPLING_RATE
        item["answers"] = [
            _answer(one, *_ask(model, processor, one.sample, pieces), config.stage == 1)
            if one.given is None
            else _answer(one, one.given)
            for one in recording.asked
        ]
        item["others"] = {
            name: [_answer(one, found[one.identity]) for one in recording.asked if one.identity in found]
            for name, found in theirs.items()
        }
        items.append(item)
    return items


def _ask(
    model: SoundwaveForConditionalGeneration, processor: SoundwaveProcessor, sample: Sample, pieces: list[np.ndarray]
) -> tuple[str, bool]:
    """The model's answer to a sample, in stage I its CTC reading, and whether `NEW_TOKENS` has cut it off.

    A transcript is that of all pieces of a long recording; other answers are about the first one.
    """
    texts: list[str] = []
    cut_off: list[int] = []
    for piece in pieces if sample.task == "transcribe" or model.config.stage == 1 else pieces[:1]:
        clip = processor.features(piece)
        if model.config.stage == 1:
            texts += read_ctc(model, processor, [clip])[0]
        else:
            limits = {"max_new_tokens": NEW_TOKENS, "cut_off": cut_off}
            texts += answer(model, processor, [prompt_of(sample)], [clip], **limits)
    return " ".join(text for text in texts if text), bool(cut_off)


def _answer(one: Asked, given: str, cut_off: bool = False, read_by_ctc: bool = False) -> dict[str, Any]:
    """An answer as the page shows it. Only transcriptions have aligned `words`."""
    sample = one.sample
    reference = (ctc_text_of(sample) or "") if read_by_ctc else answer_of(sample)
    words = align_words(reference, given, one.language) if sample.task == "transcribe" else None
    if words:
        right = all(word["kind"] == "equal" for word in words)
    else:
        right = judge(reference, given, sample.prompt or "").right
    return {
        "task": sample.task,
        "prompt": text_of(prompt_of(sample)),
        "reference": reference,
        "given": given,
        "cut_off": cut_off,
        "right": right,
        "words": words,
    }


def _manifest(run: Run, name: str) -> Path:
    """Find a manifest of the training, also if it was moved together with the run."""
    folders = [Path(train).parent for one in reversed(run.passes) for train in one.config.get("train", [])]
    places = [*folders, *(run.folder / folder.name for folder in folders)]
    for place in places:
        if (place / name).is_file():
            return place / name
    raise FileNotFoundError(f"{name} is in none of {', '.join(sorted({str(place) for place in places}))}")


def _spectrogram(mel: Tensor) -> dict[str, Any]:
    """Log-mel features [n_mels, T_mel] as bytes, row by row, scaled to their own range."""
    width = -(-mel.shape[1] // MEL_COLUMNS)
    if width > 1:
        mel = F.avg_pool1d(mel[None], width, ceil_mode=True)[0]
    low, high = mel.min(), mel.max()
    return {"bins": mel.shape[0], "columns": mel.shape[1], "rows": _bytes((mel - low) / (high - low).clamp(min=1e-6))}


def _bytes(values: Tensor) -> str:
    """Values from 0 to 1 as bytes, in base64."""
    return base64.b64encode((values * 255).round().to(torch.uint8).cpu().numpy().tobytes()).decode()


def _rounded(values: Tensor) -> Any:
    return [float(f"{value:.4g}") for value in values.tolist()] if values.dim() else float(f"{values.item():.4g}")

"""Splice recordings of single words into strings, which gives real connected speech.

The index is a manifest (`soundwave.data.manifest`) whose lines also have `speaker` and `split`:

    {"audio_filepath": "7_jackson_3.wav", "text": "seven", "speaker": "jackson", "split": "train"}
"""

import math
from collections import defaultdict
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile

from .audio import SAMPLING_RATE, load_audio
from .manifest import Sample, read_manifest, write_manifest

GAP = (0.05, 0.3)  # s, length of the gaps between words, before the first and after the last
NOISE = (1e-4, 3e-3)  # RMS of the noise in the gaps, full scale 1: -80 to -50 dB
SILENT_SHARE = 0.5  # share of the strings that have digital silence in the gaps
HOP = 160  # samples, 10 ms: parts of a sound are looked for in such steps
FADE = 0.01  # s, at both ends of a sound
SILENT = 1e-10  # mean square, full scale 1: -100 dB
REPEAT_SHARE = 1 / 3  # share of the strings of two or more words that repeat one word

Clips = dict[str, list[Sample]]  # label -> its clips


def splice_strings(
    index: str | Path,
    out: str | Path,
    *,
    split: str,
    count: int,
    max_words: int = 8,
    seed: int = 0,
    exclude_speakers: Collection[str] = (),
    only_speakers: Collection[str] = (),
) -> Path:
    """Write `count` strings of 1 to `max_words` clips of one speaker each -> path of their manifest.

    The folder `out` gets `audio/*.wav` (16 kHz mono PCM16) and, written last, `manifest.jsonl` with audio_filepath,
    duration [s], text ("seven seven three"), task "transcribe" and speaker. The same arguments give the same bytes.

    Args:
        index: manifest of single words, each with `speaker` and `split`.
        split: only its clips are used, so that strings of two splits have no clip in common.
        exclude_speakers, only_speakers: speakers to leave out; speakers to use instead of all.

    Raises:
        ManifestError, AudioError: the index or a clip cannot be used.
        ValueError: the index lacks the split or a speaker, a speaker has too few words, count or max_words is below 1,
            or `out` is not empty.
    """
    out = Path(out)
    if count < 1 or max_words < 1:
        raise ValueError(f"count = {count}, max_words = {max_words}, but both must be at least 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out = {out} holds something already; name a new folder")
    speakers = _clips_by_speaker(index, split, exclude_speakers, only_speakers)
    for speaker, clips in speakers.items():
        if max_words > 1 and len(clips) < 2:
            raise ValueError(
                f'speaker "{speaker}" says only {list(clips)} in split "{split}", but strings need two words; '
                "exclude this speaker, or set max_words = 1"
            )

    rng = np.random.default_rng(seed)
    load = lru_cache(maxsize=4096)(load_audio)  # 4 096 clips of 0.5 s are 130 MB
    names = sorted(speakers)
    (out / "audio").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        speaker = names[rng.integers(len(names))]
        clips = choose_words(rng, speakers[speaker], (1, max_words))
        audio = join(rng, [load(clip.audio, offset=clip.offset, duration=clip.duration) for clip in clips])
        name = f"audio/{number:06d}.wav"
        soundfile.write(out / name, audio, SAMPLING_RATE, subtype="PCM_16")
        rows.append(
            {
                "audio_filepath": name,
                "duration": len(audio) / SAMPLING_RATE,
                "text": " ".join(_word(clip) for clip in clips),
                "task": "transcribe",
                "speaker": speaker,
            }
        )
    manifest = out / "manifest.jsonl"
    write_manifest(manifest, rows)
    return manifest


def _clips_by_speaker(
    index: str | Path, split: str, exclude_speakers: Collection[str], only_speakers: Collection[str]
) -> dict[str, Clips]:
    samples = read_manifest(index)
    for sample in samples:
        has = sample.extra | {"text": sample.text, "audio_filepath": sample.audio and str(sample.audio)}
        for key in ("audio_filepath", "text", "speaker", "split"):
            if not isinstance(has.get(key), str):
                raise ValueError(f'{sample.id}: lacks a string "{key}", which splicing needs; add it')
    _require_known("split", [split], {sample.extra["split"] for sample in samples})
    samples = [sample for sample in samples if sample.extra["split"] == split]
    known = {sample.extra["speaker"] for sample in samples}
    _require_known("exclude_speakers", exclude_speakers, known)
    _require_known("only_speakers", only_speakers, known)
    wanted = (set(only_speakers) or known) - set(exclude_speakers)
    if not wanted:
        raise ValueError(
            f"exclude_speakers (--without-speaker) leaves none of {', '.join(sorted(known))}; exclude fewer"
        )
    speakers: dict[str, Clips] = {speaker: defaultdict(list) for speaker in wanted}
    for sample in samples:
        if sample.extra["speaker"] in wanted:
            speakers[sample.extra["speaker"]][_word(sample)].append(sample)
    return speakers


def _word(clip: Sample) -> str:
    return clip.text or ""


def _require_known(argument: str, names: Collection[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f'{argument}: "{name}" is not in the index; it has {", ".join(sorted(known))}')


def choose_words(rng: np.random.Generator, clips: Clips, words: tuple[int, int]) -> list[Sample]:
    """Draw clips of one speaker, from `words[0]` to `words[1]` of them.

    Neighbouring words differ, but REPEAT_SHARE of the strings repeat one word.
    """
    length = int(rng.integers(words[0], words[1] + 1))
    repeat = int(rng.integers(1, length)) if length > 1 and rng.random() < REPEAT_SHARE else None
    chosen: list[Sample] = []
    for place in range(length):
        if place == repeat:
            # another recording of the word if there is one
            others = [clip for clip in clips[_word(chosen[-1])] if clip is not chosen[-1]] or chosen[-1:]
        else:
            labels = [label for label in clips if not chosen or label != _word(chosen[-1])]
            others = clips[labels[rng.integers(len(labels))]]
        chosen.append(others[rng.integers(len(others))])
    return chosen


def join(rng: np.random.Generator, clips: list[np.ndarray]) -> np.ndarray:
    """Join clips, each float32 [samples], with a gap before and after each -> float32 [samples]."""
    level = 0.0 if rng.random() < SILENT_SHARE else np.exp(rng.uniform(*np.log(NOISE)))

    def gap() -> np.ndarray:
        samples = int(rng.uniform(*GAP) * SAMPLING_RATE)
        return (level * rng.standard_normal(samples)).astype(np.float32)

    pieces = [gap()]
    for clip in clips:
        pieces += [clip, gap()]
    return np.concatenate(pieces)


def loudest_part(samples: np.ndarray, seconds: float) -> np.ndarray:
    """The part of so many seconds that has the most energy, float32 [samples] at 16 kHz; all of a shorter recording.

    Parts begin at multiples of 10 ms. Of parts of the same energy it is the first.
    """
    length = round(seconds * SAMPLING_RATE)
    if len(samples) <= length:
        return samples
    energy = np.concatenate([[0.0], np.cumsum(np.square(samples, dtype=np.float64))])
    starts = np.arange(0, len(samples) - length + 1, HOP)
    start = int(starts[np.argmax(energy[starts + length] - energy[starts])])
    return samples[start : start + length]


def at_level(sound: np.ndarray, speech: np.ndarray, decibels: float) -> np.ndarray:
    """A sound so many dB above or below the power of speech, with a short fade at both ends against clicks.

    Raises:
        ValueError: the sound is silent.
    """
    powers = [float(np.square(samples, dtype=np.float64).mean()) for samples in (sound, speech)]
    if powers[0] <= SILENT:
        raise ValueError("is silent")
    ramp = np.minimum(1.0, np.arange(1, len(sound) + 1) / (FADE * SAMPLING_RATE))
    scale = math.sqrt(powers[1] / powers[0]) * 10 ** (decibels / 20)
    return (sound * (scale * ramp * ramp[::-1])).astype(np.float32)

"""The embedded corpus: sentences of a closed grammar spoken by eSpeak NG, with labels for six tasks.

It has twelve voices that a person can tell apart, six female and six male, at three speaking rates. One voice of each
sex speaks in test_voices.jsonl only. No sentence of a test is in the training manifests, neither as speech nor as
text. Everything follows from the seed: the same seed gives the same bytes.
"""

import io
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr

from soundwave.curation.espeak import Espeak, SpokenWord
from soundwave.data.audio import SAMPLING_RATE
from soundwave.data.manifest import write_manifest
from soundwave.demo.grammar import COMMANDS, Sentence, split_sentences
from soundwave.demo.tasks import FORMATS, RATES, phrase

VERSION = 13  # Raise it when the same seed gives other files.

# eSpeak voice -> its pitch, 0 to 100. Measured median pitches: 180 to 250 Hz female, 80 to 125 Hz male.
FEMALE = {
    "en-us+f2": 60,
    "en+f3": 60,
    "en-us+f5": 55,
    "en-us+steph": 60,
    "en+Annie": 40,
}
MALE = {
    "en-us+m1": 65,
    "en+m3": 50,
    "en-us+m7": 60,
    "en-gb-x-rp+m8": 50,
    "en+m6": 45,
}
HELD_OUT_FEMALE, HELD_OUT_MALE = {"en+f4": 65}, {"en+m4": 55}
PITCHES = FEMALE | MALE | HELD_OUT_FEMALE | HELD_OUT_MALE
PITCH_JITTER = 4
WORDS_PER_MINUTE = {"slow": 90, "normal": 140, "fast": 215}
RATE_JITTER = 0.04
RARE_WORD_CANDIDATES = 16  # Of so many commands, the one with the rarest word is taken.
# Seconds of silence that are kept at the end, where CTC writes its labels. eSpeak adds 0.3 s and more; every training
# step would pay for the rest.
TAIL = 0.2

# Numbers of utterances as (commands, codes, questions) for training, the test and the unseen voices. `asked`: how many
# utterances of the test are used for transcription, and how many for each other task.
SIZES = {
    "full": {"train": (1350, 450, 1200), "test": (200, 50, 200), "asked": (250, 200), "voices": (90, 20, 90)},
    "quick": {"train": (320, 110, 270), "test": (200, 50, 200), "asked": (250, 200), "voices": (90, 20, 90)},
    "tiny": {"train": (24, 8, 24), "test": (8, 4, 8), "asked": (16, 8), "voices": (4, 2, 4)},
}

# Manifest -> task -> number of samples for each utterance that the task can use, or for qa for each question sentence.
# For the fraction of a number, as large a part of the utterances is drawn at random.
STAGES = {
    "stage1": {"transcribe": 1},
    "labels": {"transcribe": 1},
    "stage2": {"transcribe": 1.6, "voice": 0.6, "rate": 0.6, "qa": 3},
    "stage3": {"transcribe": 1.4, "voice": 0.45, "rate": 0.45, "intent": 1.1, "question": 1.6, "qa": 1},
}
# Manifest -> format -> weight of its draw, among the formats that a task has.
FORMAT_WEIGHTS = {
    "stage1": {"direct": 1},
    "labels": {"direct": 1},
    "stage2": {"direct": 1},
    "stage3": {"direct": 0.76, "choice": 0.1, "natural": 0.09, "transcribe": 0.05},
}

# Manifest -> labels that CTC learns besides the words. With the next-token loss alone they stayed at chance
# (docs/log.md).
CTC_LABELS = {"labels": ("sex", "rate"), "stage2": ("sex", "rate")}


@dataclass(frozen=True)
class Utterance:
    """One recording: sentence, voice, sex, speaking rate, file and duration."""

    sentence: Sentence
    voice: str
    sex: str
    rate: str
    audio_filepath: str
    duration: float  # seconds


def build_corpus(folder: Path, *, seed: int = 0, size: str = "full") -> Path:
    """Synthesise the corpus in `folder`, unless it is there already, and return `folder`.

    Writes audio/*.wav (16 kHz mono PCM16), {stage1,labels,stage2,stage3,test,test_voices}.jsonl and corpus.json. They
    are written beside `folder` and renamed at the end, so a folder that holds corpus.json is complete. A corpus of
    another seed, size or version is replaced.

    Args:
        folder: where the corpus lies.
        seed: decides the sentences, their split, the voices and the phrasings. The split does not depend on `size`.
        size: "full" (3 000 training utterances), "quick" (700) or "tiny" (56, for tests).

    Raises:
        ValueError: an unknown size, or a damaged corpus.json.
        FileExistsError: `folder` holds something that is not a corpus.
    """
    if size not in SIZES:
        raise ValueError(f"size = {size!r}, wanted one of {', '.join(SIZES)}")
    folder = Path(folder)
    stamp = {"version": VERSION, "seed": seed, "size": size}
    marker = folder / "corpus.json"
    if marker.is_file():
        try:
            found = dict(json.loads(marker.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise ValueError(f"{marker} is damaged; delete {folder}, and the corpus is made again") from None
        if {key: found.get(key) for key in stamp} == stamp:
            return folder
    elif folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"folder = {str(folder)!r} holds files but no corpus.json: name a new folder")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "audio").mkdir(parents=True)
    counts = _write(partial, random.Random(seed), SIZES[size])
    (partial / marker.name).write_text(json.dumps(stamp | counts, indent=1) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)
    return folder


def _write(folder: Path, rng: random.Random, size: dict) -> dict:
    """Write the audio and the manifests; return the seconds of audio and the numbers of samples, for corpus.json."""
    train, test = split_sentences(rng)
    voices = [(voice, "female") for voice in FEMALE] + [(voice, "male") for voice in MALE]
    unseen = [(voice, "female") for voice in HELD_OUT_FEMALE] + [(voice, "male") for voice in HELD_OUT_MALE]
    with Espeak() as espeak:
        spoken = _speak(espeak, folder, "train", _draw(train, size["train"], rng), voices, rng)
        spoken_test = _speak(espeak, folder, "test", _draw(test, size["test"], rng), voices, rng)
        spoken_unseen = _speak(espeak, folder, "voices", _draw(test, size["voices"], rng), unseen, rng)

    manifests = {}
    for stage, shares in STAGES.items():
        rows = []
        for task, share in shares.items():
            source = train["question"] if task == "qa" else _fitting(task, spoken)
            for item in _repeat(source, share, rng):
                rows.append(_row(task, item, rng, FORMAT_WEIGHTS[stage]) | _ctc_text(stage, item))
        rng.shuffle(rows)
        manifests[stage] = rows
    transcribed, asked = size["asked"]
    for name, utterances, tasks in (
        ("test", spoken_test, ("transcribe", "voice", "rate", "intent", "question")),
        ("test_voices", spoken_unseen, ("transcribe", "voice", "rate")),
    ):
        manifests[name] = []
        for task in tasks:
            fitting = _fitting(task, utterances)
            chosen = fitting[: transcribed if task == "transcribe" else asked]  # voices and rates come equally often
            manifests[name] += [_row(task, utterance, rng, {"direct": 1}) for utterance in chosen]
    for name, rows in manifests.items():
        write_manifest(folder / f"{name}.jsonl", rows)
    seconds = sum(utterance.duration for utterance in spoken + spoken_test + spoken_unseen)
    return {"seconds": round(seconds, 1), "samples": {name: len(rows) for name, rows in manifests.items()}}


def _ctc_text(stage: str, item: Utterance | Sentence) -> dict:
    """`ctc_text` of a manifest in which CTC learns labels: the words, then the sex and the rate of the speaker."""
    if stage not in CTC_LABELS or not isinstance(item, Utterance):
        return {}
    return {"ctc_text": " ".join([item.sentence.text, *(getattr(item, label) for label in CTC_LABELS[stage])])}


def _draw(sentences: dict[str, list], counts: tuple[int, int, int], rng: random.Random) -> list[Sentence]:
    """Draw commands (equally many of each intent), codes and questions. None comes twice before all have come once."""
    commands, codes, questions = counts
    drawn = _deal(sentences["code"], codes, rng) + _deal(sentences["question"], questions, rng)
    for index, intent in enumerate(COMMANDS):
        drawn += _deal_words(sentences[intent], commands // len(COMMANDS) + (index < commands % len(COMMANDS)), rng)
    rng.shuffle(drawn)
    return drawn


def _deal(items: list, count: int, rng: random.Random) -> list:
    """`count` items in random order; every item comes once before any comes again."""
    dealt = []
    while len(dealt) < count:
        dealt += rng.sample(items, min(len(items), count - len(dealt)))
    return dealt


def _deal_words(sentences: list[Sentence], count: int, rng: random.Random) -> list[Sentence]:
    """Like `_deal`, but each time take the one of a few random sentences with the rarest word: no word stays rare."""
    seen: Counter[str] = Counter()
    dealt: list[Sentence] = []
    left: list[Sentence] = []
    while len(dealt) < count:
        left = left or list(sentences)
        candidates = rng.sample(left, min(RARE_WORD_CANDIDATES, len(left)))
        sentence = min(candidates, key=lambda candidate: min(seen[word] for word in candidate.text.split()))
        left.remove(sentence)
        seen.update(sentence.text.split())
        dealt.append(sentence)
    return dealt


def _speak(
    espeak: Espeak, folder: Path, name: str, sentences: list, voices: list, rng: random.Random
) -> list[Utterance]:
    """Synthesise each sentence once; all pairs of voice and rate get equally many sentences."""
    speakers = _deal(list(product(voices, RATES)), len(sentences), rng)
    utterances = []
    for index, (sentence, ((voice, sex), rate)) in enumerate(zip(sentences, speakers, strict=True)):
        samples = _say(espeak, sentence, voice, rate, rng)[0]
        path = f"audio/{name}-{index:04d}.wav"
        wav = io.BytesIO()  # soundfile flushes each file that it writes to the disk, which took half of the time.
        soundfile.write(wav, samples, SAMPLING_RATE, format="WAV", subtype="PCM_16")
        (folder / path).write_bytes(wav.getvalue())
        utterances.append(Utterance(sentence, voice, sex, rate, path, round(len(samples) / SAMPLING_RATE, 4)))
    return utterances


def _say(
    espeak: Espeak, sentence: Sentence, voice: str, rate: str, rng: random.Random
) -> tuple[np.ndarray, tuple[SpokenWord, ...]]:
    """The speech of a sentence, float32 [samples] at 16 kHz, and when its words are spoken."""
    spoken = espeak.speak(
        sentence.written,
        voice=voice,
        rate=round(WORDS_PER_MINUTE[rate] * rng.uniform(1 - RATE_JITTER, 1 + RATE_JITTER)),
        pitch=PITCHES[voice] + rng.randint(-PITCH_JITTER, PITCH_JITTER),
    )
    end = np.flatnonzero(np.abs(spoken.samples) > 1e-3)[-1] + round(TAIL * spoken.sampling_rate)
    return soxr.resample(spoken.samples[:end], spoken.sampling_rate, SAMPLING_RATE), spoken.words


class Timed(NamedTuple):
    """Speech whose words' times are known.

    Attributes:
        samples: float32 [samples] at 16 kHz.
        text: the words of a transcript.
        words: when they are spoken.
    """

    samples: np.ndarray
    text: str
    words: tuple[SpokenWord, ...]


def timed_speech(count: int, *, seed: int = 0, unseen_voices: bool = False) -> Iterator[Timed]:
    """Speak sentences that a corpus of this seed has in its test only, in its voices and rates, with the true times.

    Args:
        count: how many.
        unseen_voices: in the voices that speak in test_voices.jsonl only, instead of those of the training.
    """
    rng = random.Random(seed)
    held = split_sentences(rng)[1]
    commands, codes = 4 * count // 9, count // 9  # in the proportions of the test
    sentences = _draw(held, (commands, codes, count - commands - codes), rng)
    voices = [*HELD_OUT_FEMALE, *HELD_OUT_MALE] if unseen_voices else [*FEMALE, *MALE]
    speakers = _deal(list(product(voices, RATES)), count, rng)
    with Espeak() as espeak:
        for sentence, (voice, rate) in zip(sentences, speakers, strict=True):
            samples, words = _say(espeak, sentence, voice, rate, rng)
            yield Timed(samples, sentence.text, words)


def _fitting(task: str, utterances: list[Utterance]) -> list[Utterance]:
    """The utterances that a task can use: commands for intent, questions for question, all of them else."""
    needed = {"intent": "intent", "question": "answer"}.get(task)
    return [utterance for utterance in utterances if needed is None or getattr(utterance.sentence, needed)]


def _repeat(items: list, share: float, rng: random.Random) -> list:
    """`share` times the items: all of them as often as the integer part says, and a random part of them once more."""
    return items * int(share) + rng.sample(items, round(share % 1 * len(items)))


def _row(task: str, item: Utterance | Sentence, rng: random.Random, weights: dict[str, float]) -> dict:
    """One line of a manifest: an utterance with the prompt and answer of a task, or for qa a written question."""
    sentence = item.sentence if isinstance(item, Utterance) else item
    fields = {"question": sentence.written, "answer": sentence.answer, "options": sentence.options}
    fields |= {"text": sentence.text, "intent": sentence.intent}
    row = {}
    if isinstance(item, Utterance):
        fields |= {"sex": item.sex, "rate": item.rate}
        row = {"audio_filepath": item.audio_filepath, "duration": item.duration, "text": sentence.text}
    format = rng.choices(*zip(*((name, weights[name]) for name in FORMATS[task] if name in weights), strict=True))[0]
    prompt, answer = phrase(task, fields, rng, format)
    row |= {"task": task, "prompt": prompt, "answer": answer}
    if isinstance(item, Utterance):
        row |= {"voice": item.voice, "sex": item.sex, "rate": item.rate}
        row |= {"intent": sentence.intent} if sentence.intent else {}
    return row

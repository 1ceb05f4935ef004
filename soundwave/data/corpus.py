"""The embedded corpus: a closed grammar spoken by eSpeak NG, with test sentences that training never holds.

    commands    eight intents, several patterns each           "set a timer for ten minutes"
    codes       digits read out, adjacent repeats included     "the code is seven seven three"
    questions   some forty facts, each asked in eight ways     "what is the capital of france"

The sentences are split before anything is drawn: whole sentences are held out, and a fact that is asked in training in some
ways is asked in the test in others. Two voices, one female and one male, speak in test_voices.jsonl only. Everything follows
from the seed: the same seed gives the same bytes.
"""

import json
import os
import random
import shutil
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import soundfile
import soxr

from soundwave.data.audio import SAMPLING_RATE
from soundwave.data.manifest import write_manifest
from soundwave.data.tasks import FORMATS, RATES, phrase
from soundwave.embedded import Espeak

VERSION = 1  # raise it when the same seed gives other files

# eSpeak voice -> its pitch, 0-100. Measured medians: female ones 180-250 Hz, male ones 80-125 Hz.
FEMALE = {
    "en-us+f2": 60,
    "en+f3": 60,
    "en-us+f5": 55,
    "en+f5": 70,
    "en-us+steph": 60,
    "en+belinda": 40,
    "en+Annie": 40,
}
MALE = {
    "en-us+m1": 65,
    "en+m3": 50,
    "en-us+m7": 60,
    "en-gb-x-rp+m8": 50,
    "en-gb-scotland+m5": 45,
    "en-us+quincy": 40,
    "en+Reed": 50,
}
HELD_OUT_FEMALE, HELD_OUT_MALE = {"en+f4": 65}, {"en+m4": 55}
PITCH_JITTER = 4
WORDS_PER_MINUTE = {"slow": 110, "normal": 160, "fast": 230}
RATE_JITTER = 0.05
TAIL = 0.1  # seconds of silence kept at the end: eSpeak adds 0.3 and more, which every step would pay for

# utterances of each kind for training; of the test: commands, codes, questions, and how many of them each task asks about
SIZES = {
    "full": {"train": (1350, 450, 1200), "test": (200, 50, 200), "asked": (250, 200), "voices": (90, 20, 90)},
    "quick": {"train": (320, 110, 270), "test": (100, 30, 100), "asked": (200, 100), "voices": (50, 10, 40)},
    "tiny": {"train": (24, 8, 24), "test": (8, 4, 8), "asked": (16, 8), "voices": (4, 2, 4)},
}
QUESTIONS_HELD_OUT = 2  # ways of asking, of eight, that each fact keeps for the test
COMMANDS_HELD_OUT = 0.2  # share of an intent's sentences
CODES_HELD_OUT = 0.2

# stage -> task -> samples for each utterance that fits (qa: for each question sentence); the rest of a fraction is drawn
STAGES = {
    "stage1": {"transcribe": 1},
    "stage2": {"transcribe": 1, "voice": 1, "rate": 1, "qa": 4},
    "stage3": {"transcribe": 0.5, "voice": 0.7, "rate": 0.5, "intent": 1, "question": 1, "qa": 2},
}
# stage -> format -> weight, among the formats that a task has
FORMAT_WEIGHTS = {
    "stage1": {"direct": 1},
    "stage2": {"direct": 1},
    "stage3": {"direct": 0.65, "choice": 0.12, "natural": 0.12, "transcribe": 0.11},
}
CHOICES = 4  # options of a question's multiple choice

ROOMS = ("kitchen", "bedroom", "bathroom", "garage", "office", "hall")
GENRES = ("jazz", "rock", "piano", "guitar", "country", "dance")
NUMBERS = ("three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve", "twenty")
DEGREES = ("ten", "twelve", "fifteen", "eighteen", "twenty", "thirty")
CITIES = ("London", "Paris", "Berlin", "Rome", "Madrid", "Tokyo", "Moscow", "Dublin")
TIMES = ("today", "tomorrow", "tonight", "on Monday", "on Friday", "on Sunday")
PEOPLE = ("my mother", "my brother", "my sister", "the doctor", "the office", "Anna", "Peter", "Robert")
GOODS = ("milk", "bread", "butter", "sugar", "coffee", "apples", "eggs", "cheese", "rice", "tea")

COMMANDS = {  # intent -> (pattern, slots) ...
    "light": (
        ("Turn {} the {} light.", ("on", "off"), ROOMS),
        ("Switch the light in the {} {}.", ROOMS, ("on", "off")),
        ("Make the {} {}.", ROOMS, ("brighter", "darker")),
        ("Please turn {} all lights in the {}.", ("on", "off"), ROOMS),
        ("It is too dark in the {}.", ROOMS),
    ),
    "music": (
        ("Play some {} music in the {}.", GENRES, ROOMS),
        ("I want to hear {} {}.", GENRES, ("music", "songs")),
        ("Please play a {} song.", GENRES),
        ("Turn the {} music {}.", GENRES, ("up", "down", "off")),
        ("Play {} songs {}.", GENRES, TIMES[:3]),
    ),
    "timer": (
        ("Set a timer for {} {}.", NUMBERS, ("minutes", "hours")),
        ("Start a {} minute timer.", NUMBERS),
        ("Wake me up in {} {}.", NUMBERS, ("minutes", "hours")),
        ("Stop the timer after {} minutes.", NUMBERS),
    ),
    "weather": (
        ("Will it rain in {} {}?", CITIES, TIMES),
        ("How is the weather in {} {}?", CITIES, TIMES),
        ("Will there be snow in {}?", CITIES),
        ("Tell me the weather for {}.", CITIES),
        ("Is it sunny in {} {}?", CITIES, TIMES[:3]),
    ),
    "call": (
        ("Call {} {}.", PEOPLE, TIMES),
        ("Please phone {} {}.", PEOPLE, ("now", "tonight", "tomorrow")),
        ("I want to talk to {}.", PEOPLE),
        ("Ring {} at {}.", PEOPLE, NUMBERS[:8]),
    ),
    "shopping": (
        ("Add {} to my shopping list.", GOODS),
        ("Please buy some {} {}.", GOODS, TIMES[:3]),
        ("We need more {} and {}.", GOODS[:5], GOODS[5:]),
        ("Order {} for {}.", GOODS, ("Monday", "Friday", "Sunday")),
    ),
    "travel": (
        ("Book a {} to {} {}.", ("train", "flight"), CITIES, TIMES[3:]),
        ("I need a ticket to {}.", CITIES),
        ("When is the next {} to {}?", ("train", "flight", "bus"), CITIES),
        ("Find a {} to {}.", ("train", "flight", "bus"), CITIES),
    ),
    "temperature": (
        ("Set the heating to {} degrees.", DEGREES),
        ("Make the {} {}.", ROOMS, ("warmer", "colder")),
        ("Turn the heating {} in the {}.", ("up", "down", "off"), ROOMS),
        ("I want {} degrees in the {}.", DEGREES, ROOMS),
        ("It is too {} in the {}.", ("warm", "cold"), ROOMS),
    ),
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CODES = ("The code is {}.", "My number is {}.", "Please note {}.", "The room number is {}.")

# (answers by subject, ways of asking)
FACTS = (
    (
        {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "England": "London", "Japan": "Tokyo",
         "Russia": "Moscow", "Ireland": "Dublin"},
        ("What is the capital of {}?", "Name the capital of {}.", "Which city is the capital of {}?", "Tell me the capital city of {}.",
         "What is the capital city of {} called?", "Do you know the capital of {}?", "What city is the capital of {}?",
         "Give me the capital of {}."),
    ),
    (
        {"grass": "green", "snow": "white", "blood": "red", "coal": "black", "a banana": "yellow", "the sky": "blue"},
        ("What color is {}?", "Name the color of {}.", "Which color is {}?", "Tell me the color of {}.", "What is the color of {}?",
         "Do you know the color of {}?", "Give me the color of {}.", "Which color does {} have?"),
    ),
    (
        {"hot": "cold", "big": "small", "up": "down", "day": "night", "left": "right", "old": "young", "early": "late",
         "open": "closed"},
        ("What is the opposite of {}?", "Name the opposite of {}.", "Which word is the opposite of {}?", "Tell me the opposite of {}.",
         "Do you know the opposite of {}?", "Give me the opposite of {}.", "What word is the opposite of {}?",
         "What do you call the opposite of {}?"),
    ),
    (
        {"three": "four", "five": "six", "seven": "eight", "nine": "ten", "eleven": "twelve"},
        ("What number comes after {}?", "Which number comes after {}?", "Name the number after {}.", "Tell me the number after {}.",
         "What is the number after {}?", "Do you know the number after {}?", "Give me the number after {}.",
         "Which number is next after {}?"),
    ),
    (
        {"Monday": "Tuesday", "Wednesday": "Thursday", "Friday": "Saturday", "Saturday": "Sunday", "Sunday": "Monday"},
        ("What day comes after {}?", "Which day comes after {}?", "Name the day after {}.", "Tell me the day after {}.",
         "What is the day after {}?", "Do you know the day after {}?", "Give me the day after {}.", "Which day is next after {}?"),
    ),
    (
        {"dog": "puppy", "cat": "kitten", "cow": "calf", "sheep": "lamb", "horse": "foal"},
        ("What is a young {} called?", "What do you call a young {}?", "Name the word for a young {}.", "Tell me the word for a young {}.",
         "Do you know the word for a young {}?", "Give me the word for a young {}.", "Which word is used for a young {}?",
         "What is the word for a young {}?"),
    ),
    (
        {"January": "February", "March": "April", "May": "June", "August": "September", "November": "December"},
        ("What month comes after {}?", "Which month comes after {}?", "Name the month after {}.", "Tell me the month after {}.",
         "What is the month after {}?", "Do you know the month after {}?", "Give me the month after {}.", "Which month is next after {}?"),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Sentence:
    """What may be said: `written` with capitals and a full stop, `text` as transcripts have it."""

    written: str
    intent: str | None = None
    answer: str | None = None  # of a question
    options: tuple[str, ...] = ()  # its answer among wrong ones

    @property
    def text(self) -> str:
        return "".join(letter for letter in self.written.lower() if letter.isalpha() or letter == " ")


@dataclass(frozen=True)
class Utterance:
    """One recording: who said what, how fast, and where it lies."""

    sentence: Sentence
    voice: str
    sex: str
    rate: str
    audio_filepath: str
    duration: float  # seconds


def build_corpus(folder: Path, *, seed: int = 0, size: str = "full") -> Path:
    """Synthesise the corpus in `folder`, unless it is there already, and return `folder`.

    Writes audio/*.wav (16 kHz mono PCM16), {stage1,stage2,stage3,test,test_voices}.jsonl and corpus.json, first beside
    `folder`, then renamed: a folder that holds corpus.json is complete. A corpus of another seed, size or version is replaced.

    Args:
        seed: gives sentences, split, voices and phrasings; the split does not depend on `size`.
        size: "full" (3 000 training utterances), "quick" (700) or "tiny" (56, for tests).

    Raises:
        ValueError: an unknown size.
        FileExistsError: `folder` holds something that is not a corpus.
    """
    if size not in SIZES:
        raise ValueError(f"size = {size!r}, wanted one of {', '.join(SIZES)}")
    folder = Path(folder)
    stamp = {"version": VERSION, "seed": seed, "size": size}
    marker = folder / "corpus.json"
    if marker.is_file():
        found = json.loads(marker.read_text())
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
    """Write audio and manifests; return what they hold, for corpus.json."""
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
                rows.append(_row(task, item, rng, FORMAT_WEIGHTS[stage]))
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
            chosen = rng.sample(fitting, min(len(fitting), transcribed if task == "transcribe" else asked))
            manifests[name] += [_row(task, utterance, rng, {"direct": 1}) for utterance in chosen]
    for name, rows in manifests.items():
        write_manifest(folder / f"{name}.jsonl", rows)
    seconds = sum(utterance.duration for utterance in spoken + spoken_test + spoken_unseen)
    return {"seconds": round(seconds, 1), "samples": {name: len(rows) for name, rows in manifests.items()}}


def split_sentences(rng: random.Random) -> tuple[dict[str, list], dict[str, list]]:
    """Divide the grammar's sentences into training and test.

    Returns:
        two dictionaries with the same keys: each intent, "code" and "question", to a list of Sentence. No sentence is in both,
        and every word of a test sentence stands in some training sentence.
    """
    train, test = {}, {}
    for intent, patterns in COMMANDS.items():
        sentences = [
            Sentence(_capital(pattern.format(*words)), intent=intent)
            for pattern, *slots in patterns
            for words in product(*slots)
        ]
        train[intent], test[intent] = _hold_out(sentences, round(len(sentences) * COMMANDS_HELD_OUT), rng)
    codes = [Sentence(rng.choice(CODES).format(" ".join(digits))) for digits in _digit_strings(rng, 1000)]
    train["code"], test["code"] = _hold_out(codes, round(len(codes) * CODES_HELD_OUT), rng)
    train["question"], test["question"] = [], []
    for answers, ways in FACTS:
        for subject, answer in answers.items():
            wrong = rng.sample([other for other in answers.values() if other != answer], CHOICES - 1)
            sentences = [
                Sentence(way.format(subject), answer=answer, options=(answer, *wrong)) for way in ways
            ]
            kept, held = _hold_out(sentences, QUESTIONS_HELD_OUT, rng)
            train["question"] += kept
            test["question"] += held
    return train, test


def _capital(written: str) -> str:
    return written[0].upper() + written[1:]


def _hold_out(sentences: list, count: int, rng: random.Random) -> tuple[list, list]:
    shuffled = rng.sample(sentences, len(sentences))
    return shuffled[count:], shuffled[:count]


def _digit_strings(rng: random.Random, count: int) -> list[tuple[str, ...]]:
    """Draw `count` different strings of three to five digits, about six in ten with a digit said twice in a row."""
    strings = {}
    while len(strings) < count:
        digits = [rng.choice(DIGITS)]
        for _ in range(rng.randint(2, 4)):
            digits.append(digits[-1] if rng.random() < 0.25 else rng.choice(DIGITS))
        strings[tuple(digits)] = None  # a dictionary keeps the order, a set of strings does not
    return list(strings)


def _draw(sentences: dict[str, list], counts: tuple[int, int, int], rng: random.Random) -> list[Sentence]:
    """Draw commands (intents in equal parts), codes and questions; none comes again before all of its kind have come."""
    commands, codes, questions = counts
    drawn = _deal(sentences["code"], codes, rng) + _deal(sentences["question"], questions, rng)
    for index, intent in enumerate(COMMANDS):
        drawn += _deal(sentences[intent], commands // len(COMMANDS) + (index < commands % len(COMMANDS)), rng)
    rng.shuffle(drawn)
    return drawn


def _deal(items: list, count: int, rng: random.Random) -> list:
    dealt = []
    while len(dealt) < count:
        dealt += rng.sample(items, min(len(items), count - len(dealt)))
    return dealt


def _speak(
    espeak: Espeak, folder: Path, name: str, sentences: list, voices: list, rng: random.Random
) -> list[Utterance]:
    """Synthesise each sentence once; voices and rates are dealt out in equal parts."""
    pitches = FEMALE | MALE | HELD_OUT_FEMALE | HELD_OUT_MALE
    speakers = _deal(list(product(voices, RATES)), len(sentences), rng)
    utterances = []
    for index, (sentence, ((voice, sex), rate)) in enumerate(zip(sentences, speakers, strict=True)):
        samples, sampling_rate = espeak.synthesize(
            sentence.written,
            voice=voice,
            rate=round(WORDS_PER_MINUTE[rate] * rng.uniform(1 - RATE_JITTER, 1 + RATE_JITTER)),
            pitch=pitches[voice] + rng.randint(-PITCH_JITTER, PITCH_JITTER),
        )
        end = np.flatnonzero(np.abs(samples) > 1e-3)[-1] + round(TAIL * sampling_rate)
        samples = soxr.resample(samples[:end], sampling_rate, SAMPLING_RATE)
        path = f"audio/{name}-{index:04d}.wav"
        soundfile.write(folder / path, samples, SAMPLING_RATE, subtype="PCM_16")
        utterances.append(Utterance(sentence, voice, sex, rate, path, round(len(samples) / SAMPLING_RATE, 4)))
    return utterances


def _fitting(task: str, utterances: list[Utterance]) -> list[Utterance]:
    needed = {"intent": "intent", "question": "answer"}.get(task)
    return [utterance for utterance in utterances if needed is None or getattr(utterance.sentence, needed)]


def _repeat(items: list, share: float, rng: random.Random) -> list:
    return items * int(share) + rng.sample(items, round(share % 1 * len(items)))


def _row(task: str, item: Utterance | Sentence, rng: random.Random, weights: dict[str, float]) -> dict:
    """One line of a manifest: an utterance under a task, or for qa a written question."""
    sentence = item if task == "qa" else item.sentence
    fields = {"question": sentence.written, "answer": sentence.answer, "options": sentence.options}
    fields |= {"text": sentence.text, "intent": sentence.intent}
    row = {}
    if isinstance(item, Utterance):
        fields |= {"sex": item.sex, "rate": item.rate}
        row = {"audio_filepath": item.audio_filepath, "duration": item.duration, "text": sentence.text}
    format = rng.choices(
        *zip(*((name, weights[name]) for name in FORMATS[task] if name in weights), strict=True)
    )[0]
    prompt, answer = phrase(task, fields, rng, format)
    row |= {"task": task, "prompt": prompt, "answer": answer}
    if isinstance(item, Utterance):
        row |= {"voice": item.voice, "sex": item.sex, "rate": item.rate}
        row |= {"intent": sentence.intent} if sentence.intent else {}
    return row

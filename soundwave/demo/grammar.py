"""The closed grammar of the embedded corpus: all sentences, and the split into training and test.

    commands    eight intents, several patterns each          "set a timer for ten minutes"
    codes       three to five digits, adjacent repeats        "the code is seven seven three"
    questions   some thirty facts, each asked in eight ways   "what is the capital of France"

Whole sentences are held out for the test. Training asks for a fact in six ways, the test in the other two.
"""

import random
from dataclasses import dataclass
from itertools import product

from soundwave.demo.tasks import CHOICES

QUESTIONS_HELD_OUT = 2  # ways of asking for each fact, of its eight, that only the test uses
COMMANDS_HELD_OUT = 0.25  # share of an intent's sentences that only the test uses
CODES_HELD_OUT = 0.2  # share of the codes that only the test uses
CODES_COUNT = 1000
REPEATED = 0.25  # probability that a digit repeats the one before it: six codes in ten hold such a pair

ROOMS = ("kitchen", "bedroom", "garage", "office")
GENRES = ("jazz", "rock", "piano", "dance")
NUMBERS = ("three", "five", "seven", "ten", "twenty")
CITIES = ("London", "Paris", "Berlin", "Rome", "Madrid", "Tokyo")
TIMES = ("today", "tomorrow", "tonight", "on Monday", "on Friday", "on Sunday")
PEOPLE = ("my mother", "my brother", "the doctor", "the office", "Anna", "Peter")
GOODS = ("milk", "bread", "butter", "sugar", "coffee", "apples")

COMMANDS = {  # intent -> (pattern, slots) ...
    "light": (
        ("Turn {} the {} light.", ("on", "off"), ROOMS),
        ("Turn {} the light in the {} {}.", ("on", "off"), ROOMS, TIMES[:3]),
        ("Please turn {} the light in the {}.", ("on", "off"), ROOMS),
        ("I want the light {} in the {}.", ("on", "off"), ROOMS),
    ),
    "music": (
        ("Play some {} music in the {}.", GENRES, ROOMS),
        ("I want to hear {} {} {}.", GENRES, ("music", "songs"), TIMES[:3]),
        ("Please play {} songs in the {}.", GENRES, ROOMS),
        ("Play {} {} {}.", GENRES, ("music", "songs"), TIMES[:3]),
    ),
    "timer": (
        ("Set a timer for {} {}.", NUMBERS, ("minutes", "hours")),
        ("Please set a timer for {} {}.", NUMBERS, ("minutes", "hours")),
        ("I want a timer for {} {}.", NUMBERS, ("minutes", "hours")),
        ("Wake me up in {} {}.", NUMBERS, ("minutes", "hours")),
    ),
    "weather": (
        ("Will it rain in {} {}?", CITIES, TIMES),
        ("What is the weather in {} {}?", CITIES, TIMES),
        ("Tell me the weather in {}.", CITIES),
        ("Is it sunny in {} {}?", CITIES, TIMES[:3]),
    ),
    "call": (
        ("Call {} {}.", PEOPLE, TIMES),
        ("Please call {} {}.", PEOPLE, TIMES),
        ("I want to talk to {} {}.", PEOPLE, TIMES[:3]),
    ),
    "shopping": (
        ("Add {} to my shopping list.", GOODS),
        ("Please buy some {} {}.", GOODS, TIMES),
        ("I need some {} and {}.", GOODS[:3], GOODS[3:]),
        ("Add {} and {} to my shopping list.", GOODS[:3], GOODS[3:]),
    ),
    "travel": (
        ("Book a {} to {} {}.", ("train", "flight"), CITIES, TIMES[3:]),
        ("I need a {} to {}.", ("train", "flight"), CITIES),
        ("Find me the next {} to {}.", ("train", "flight"), CITIES),
    ),
    "temperature": (
        ("Make the {} {} {}.", ROOMS, ("warmer", "colder"), TIMES[:3]),
        ("Please make the {} {}.", ROOMS, ("warmer", "colder")),
        ("Turn the heating {} in the {}.", ("up", "down", "off"), ROOMS),
        ("Turn the heating {} {}.", ("up", "down", "off"), TIMES),
    ),
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CODES = ("The code is {}.", "My number is {}.", "Please note {}.", "The room number is {}.")


def _following(noun: str) -> tuple[str, ...]:
    return (
        f"What {noun} comes after {{}}?",
        f"Which {noun} comes after {{}}?",
        f"Name the {noun} after {{}}.",
        f"Tell me the {noun} after {{}}.",
        f"What is the {noun} after {{}}?",
        f"Do you know the {noun} after {{}}?",
        f"Give me the {noun} after {{}}.",
        f"Which {noun} is next after {{}}?",
    )


FACTS = (  # (subject and answer ..., ways of asking)
    (
        (("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"))
        + (("Germany", "Berlin"), ("England", "London"), ("Japan", "Tokyo")),
        (
            "What is the capital of {}?",
            "Name the capital of {}.",
            "Which city is the capital of {}?",
            "Tell me the capital city of {}.",
            "What is the capital city of {} called?",
            "Do you know the capital of {}?",
            "What city is the capital of {}?",
            "Give me the capital of {}.",
        ),
    ),
    (
        (("grass", "green"), ("snow", "white"), ("blood", "red"), ("coal", "black"), ("a banana", "yellow")),
        (
            "What color is {}?",
            "Name the color of {}.",
            "Which color is {}?",
            "Tell me the color of {}.",
            "What is the color of {}?",
            "Do you know the color of {}?",
            "Give me the color of {}.",
            "What color is {} called?",
        ),
    ),
    (
        (("hot", "cold"), ("big", "small"), ("up", "down"), ("day", "night"), ("left", "right"), ("old", "young")),
        (
            "What is the opposite of {}?",
            "Name the opposite of {}.",
            "Which word is the opposite of {}?",
            "Tell me the opposite of {}.",
            "Do you know the opposite of {}?",
            "Give me the opposite of {}.",
            "What word is the opposite of {}?",
            "What do you call the opposite of {}?",
        ),
    ),
    (
        (("dog", "puppy"), ("cat", "kitten"), ("cow", "calf"), ("sheep", "lamb")),
        (
            "What is a young {} called?",
            "What do you call a young {}?",
            "Name the word for a young {}.",
            "Tell me the word for a young {}.",
            "Do you know the word for a young {}?",
            "Give me the word for a young {}.",
            "Which word is the word for a young {}?",
            "What is the word for a young {}?",
        ),
    ),
    (
        (("three", "four"), ("five", "six"), ("seven", "eight"), ("nine", "ten")),
        _following("number"),
    ),
    (
        (("Monday", "Tuesday"), ("Friday", "Saturday"), ("Saturday", "Sunday"), ("Sunday", "Monday")),
        _following("day"),
    ),
)


@dataclass(frozen=True)
class Sentence:
    """A sentence of the grammar.

    Names keep their capitals also in transcripts, because the language model has one token for " Paris" but two for
    " paris".

    Attributes:
        written: the sentence with punctuation.
        intent: what a command is about; None for other sentences.
        answer: the answer of a question; None for other sentences.
        options: the answer of a question and wrong answers.
        text: the sentence as a transcript, without punctuation.
    """

    written: str
    intent: str | None = None
    answer: str | None = None
    options: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        words = "".join(letter for letter in self.written if letter.isalpha() or letter == " ")
        return words if words.startswith("I ") else words[0].lower() + words[1:]


def split_sentences(rng: random.Random) -> tuple[dict[str, list], dict[str, list]]:
    """Divide the grammar's sentences into training and test.

    Returns:
        Two dictionaries, training and test, from each intent, "code" and "question" to a list of `Sentence`. No
        sentence is in both, and every word of a test sentence occurs in some training sentence.
    """
    train, test = {}, {}
    for intent, patterns in COMMANDS.items():
        sentences = [
            Sentence(_capital(pattern.format(*words)), intent=intent)
            for pattern, *slots in patterns
            for words in product(*slots)
        ]
        train[intent], test[intent] = _hold_out(sentences, round(len(sentences) * COMMANDS_HELD_OUT), rng)
    codes = [Sentence(rng.choice(CODES).format(" ".join(digits))) for digits in _digit_strings(rng, CODES_COUNT)]
    train["code"], test["code"] = _hold_out(codes, round(len(codes) * CODES_HELD_OUT), rng)
    train["question"], test["question"] = [], []
    for pairs, ways in FACTS:
        for subject, answer in pairs:
            wrong = rng.sample([other for _, other in pairs if other != answer], CHOICES - 1)
            sentences = [Sentence(way.format(subject), answer=answer, options=(answer, *wrong)) for way in ways]
            kept, held = _hold_out(sentences, QUESTIONS_HELD_OUT, rng)
            train["question"] += kept
            test["question"] += held
    return train, test


def _capital(written: str) -> str:
    return written[0].upper() + written[1:]


def _hold_out(sentences: list, count: int, rng: random.Random) -> tuple[list, list]:
    """Divide sentences at random into those for training and `count` for the test."""
    shuffled = rng.sample(sentences, len(sentences))
    return shuffled[count:], shuffled[:count]


def _digit_strings(rng: random.Random, count: int) -> list[tuple[str, ...]]:
    """Draw `count` different strings of three to five digits."""
    strings = {}
    while len(strings) < count:
        digits = [rng.choice(DIGITS)]
        for _ in range(rng.randint(2, 4)):
            digits.append(digits[-1] if rng.random() < REPEATED else rng.choice(DIGITS))
        strings[tuple(digits)] = None  # A dictionary keeps the order; a set of strings does not.
    return list(strings)

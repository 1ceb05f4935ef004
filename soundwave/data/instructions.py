"""Short written instructions, which a language model answers itself before it is trained.

Trained on transcripts alone, a model soon writes down what it hears whatever it is asked, and answers text worse. Its
own answers to some text keep it at what it could do. So only the questions are needed here: everyday ones, put
together from templates, and nobody else's text.
"""

import random
from itertools import product

_THINGS = (
    "a bicycle", "a bridge", "a calendar", "a camera", "a candle", "a clock", "a compass", "a desert", "a dictionary",
    "a forest", "a garden", "a hammer", "a harbour", "a ladder", "a lake", "a library", "a map", "a market", "a mirror",
    "a mountain", "a museum", "a needle", "a newspaper", "a pencil", "a piano", "a planet", "a recipe", "a river",
    "a school", "a ship", "a spoon", "a telescope", "a ticket", "a train", "a tree", "a volcano", "a wheel", "a window",
    "an airport", "an umbrella",
)  # fmt: skip
_ASKED = (
    "What is {}?", "What is {} used for?", "Explain in one sentence what {} is.", "Write one sentence about {}.",
    "Describe {} to a child in one sentence.", "Name two things that have to do with {}.",
    "Write a short question about {}.", "Where would you find {}?",
)  # fmt: skip
_KINDS = (
    "animals", "birds", "cities", "colours", "countries", "drinks", "flowers", "fruits", "games", "hobbies",
    "instruments", "jobs", "languages", "months", "planets", "rivers", "shapes", "sports", "tools", "vegetables",
)  # fmt: skip
_LISTED = ("Name three {}.", "List five {}.", "Which {} do you know? Name two.", "Give me an example of {}.")
_WORDS = (
    "big", "bright", "cheap", "clean", "cold", "dark", "deep", "dry", "early", "easy", "empty", "fast", "full", "happy",
    "hard", "heavy", "high", "hot", "loud", "near", "new", "old", "open", "quiet", "rich", "sharp", "short", "soft",
    "strong", "sweet", "tall", "thick", "tired", "warm", "weak", "wet", "wide", "wild", "wise", "young",
)  # fmt: skip
_OF_WORDS = (
    "What is the opposite of {}?", "Use the word {} in a sentence.", "Give another word for {}.", "What does {} mean?",
)  # fmt: skip
_TO_DO = (
    "bake bread", "boil an egg", "clean a window", "draw a house", "fold a shirt", "grow tomatoes", "learn a language",
    "make tea", "pack a suitcase", "paint a wall", "plan a birthday", "save water", "sleep well", "start a fire",
    "study for a test", "tie a knot", "wash a car", "water plants", "wrap a present", "write a letter",
)  # fmt: skip
_HOW = ("How do I {}? Answer in one sentence.", "Give me one tip: how to {}?", "What do I need to {}?")


def instructions(count: int, seed: int = 0) -> list[str]:
    """`count` different instructions, or all of them if there are fewer, drawn by `seed`."""
    every = [
        template.format(what)
        for templates, things in ((_ASKED, _THINGS), (_LISTED, _KINDS), (_OF_WORDS, _WORDS), (_HOW, _TO_DO))
        for template, what in product(templates, things)
    ]
    every += [
        f"What is {a} {sign} {b}?" for a, b in product((3, 7, 12, 20, 45), (2, 5, 8)) for sign in ("plus", "minus")
    ]
    return random.Random(seed).sample(every, min(count, len(every)))

"""Prompts and answers of the tasks: at least 50 phrasings of each prompt, and up to four formats of the answer.

    task         asks for                                  format       answer
    transcribe   the words of the recording                direct       one word or phrase
    voice        whether the speaker is female or male     choice       one of the options that the prompt lists
    rate         whether the speech is slow, normal, fast  natural      a short sentence
    intent       what a command is about                   transcribe   the transcript, the answer on a second line
    question     the answer to a spoken question
    qa           the answer to a written question, without a recording

Prompts are short, because every training step pays for each of their tokens. In all formats but direct the prompt says
which format it wants.
"""

import random
from collections.abc import Mapping
from itertools import product

SEXES = ("female", "male")
RATES = ("slow", "normal", "fast")
INTENTS = ("light", "music", "timer", "weather", "call", "shopping", "travel", "temperature")

FORMATS = {
    "transcribe": ("direct", "natural"),
    "voice": ("direct", "choice", "natural"),
    "rate": ("direct", "choice", "natural"),
    "intent": ("direct", "choice", "natural", "transcribe"),
    "question": ("direct", "choice", "natural", "transcribe"),
    "qa": ("direct", "choice", "natural"),
}
_ANSWERED_BY = {
    "transcribe": "text",
    "voice": "sex",
    "rate": "rate",
    "intent": "intent",
    "question": "answer",
    "qa": "answer",
}
_OPTIONS = {"voice": SEXES, "rate": RATES, "intent": INTENTS}
CHOICES = 4  # at most so many options, because every training step pays for their tokens
_WANTED = {  # format -> what the prompt says about it
    "choice": (" Options: {}.", " Choose: {}.", " One of: {}."),
    "natural": (" Use a sentence.", " Answer in a sentence.", " Say it in a sentence."),
    "transcribe": (" Transcribe first.", " Transcribe, then answer.", " Write the words first."),
}
_SENTENCES = {
    "transcribe": ("The speaker says: {}", "The words are: {}", "I hear: {}"),
    "voice": ("The speaker is {}.", "The voice is {}.", "This is a {} voice."),
    "rate": ("The speech is {}.", "The speaking rate is {}.", "The pace is {}."),
    "intent": ("The intent is {}.", "This command is about {}.", "The topic is {}."),
    "question": ("The answer is {}.", "The right answer is {}.", "My answer is {}."),
    "qa": ("The answer is {}.", "The right answer is {}.", "My answer is {}."),
}


def _combine(pattern: str, *pieces: tuple[str, ...]) -> list[str]:
    return [pattern.format(*choice) for choice in product(*pieces)]


PROMPTS = {
    "transcribe": _combine(
        "{} {}.",
        ("Transcribe", "Write down", "Write out", "Type", "Type out", "Note down", "Take down", "Put down"),
        (
            "the speech",
            "the words",
            "what is said",
            "what you hear",
            "the spoken words",
            "every word",
            "what was said",
        ),
    ),
    "voice": _combine(
        "Is {} {}?",
        (
            "the speaker",
            "this speaker",
            "the voice",
            "this voice",
            "the person speaking",
            "the person",
            "the talker",
        ),
        ("female or male", "male or female"),
    )
    + _combine(
        "{} {}.",
        ("Name", "Give", "State", "Tell me", "Identify", "Determine"),
        (
            "the speaker's sex",
            "the sex of the speaker",
            "the speaker's gender",
            "the gender of the speaker",
            "the sex of this voice",
            "the gender of this voice",
        ),
    ),
    "rate": _combine(
        "Is {} {}?",
        ("the speech", "the speaker", "the voice", "the delivery", "this speech"),
        ("slow, normal or fast", "fast, normal or slow"),
    )
    + _combine(
        "How fast {}?",
        ("is the speech", "is this spoken", "does the speaker talk", "is the speaker", "is the voice"),
    )
    + _combine(
        "{} {}.",
        ("Name", "Give", "State", "Tell me", "Judge", "Determine"),
        (
            "the speaking rate",
            "the speed of the speech",
            "the speaking speed",
            "the pace",
            "the speaker's pace",
            "the tempo",
        ),
    ),
    "intent": _combine(
        "What is {}?",
        ("the intent", "the command about", "the topic", "the request about", "this command for"),
    )
    + _combine(
        "{} {}.",
        ("Name", "Give", "State", "Tell me", "Identify", "Determine"),
        (
            "the intent",
            "the speaker's intent",
            "the intent of the command",
            "the topic",
            "the topic of the command",
            "the subject of the command",
            "the topic of the request",
            "the purpose of the command",
        ),
    ),
    "question": _combine(
        "{} {}.",
        ("Answer", "Reply to", "Respond to", "Give the answer to"),
        (
            "the question",
            "this question",
            "the spoken question",
            "the speaker's question",
            "the question you hear",
        ),
    ),
    "qa": _combine(
        "{}{{}}",
        (
            "",
            "Question: ",
            "Quick question: ",
            "Please answer: ",
            "Answer this: ",
            "A question: ",
            "My question: ",
            "Next question: ",
        ),
    ),
}
# What a prompt may add in the direct format. The other formats say what they want already.
_BRIEFLY = {
    "question": ("", " Be brief.", " A word or two."),
    "qa": (
        "",
        " Be brief.",
        " Answer briefly.",
        " Just the answer.",
        " Keep it short.",
        " A word or two.",
        " In short.",
    ),
}


def phrase(task: str, fields: Mapping, rng: random.Random, format: str = "direct") -> tuple[str, str]:
    """Draw a phrasing of a task's prompt, and give the answer in the wanted format.

    Args:
        task: a key of FORMATS.
        fields: what is known about the sample: `text` for the task and for the format transcribe, `sex` for voice,
            `rate`, `intent`, `answer` for question and qa, `options` (the answer and wrong ones) for their format
            choice, and the written `question` for qa.
        rng: the only source of randomness.
        format: one of the task's formats.

    Returns:
        The prompt and the answer.

    Raises:
        ValueError: the task has no such format.
    """
    if format not in FORMATS.get(task, ()):
        raise ValueError(f"format = {format!r} of task = {task!r}, but the formats are {FORMATS}")
    prompt = rng.choice(PROMPTS[task])
    answer = fields[_ANSWERED_BY[task]]
    if task == "qa":
        prompt = prompt.format(fields["question"])
    wanted = rng.choice(_BRIEFLY.get(task, ("",)) if format == "direct" else _WANTED[format])
    if format == "choice":
        wrong = [option for option in _OPTIONS.get(task) or fields["options"] if option != answer]
        options = [answer, *rng.sample(wrong, min(CHOICES - 1, len(wrong)))]
        rng.shuffle(options)
        wanted = wanted.format(", ".join(options))
    elif format == "natural":
        answer = rng.choice(_SENTENCES[task]).format(answer)
    elif format == "transcribe":
        answer = f"{fields['text']}\n{answer}"
    return prompt + wanted, answer

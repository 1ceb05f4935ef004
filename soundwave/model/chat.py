"""A chat as a prompt: turns with roles, one of which may hold the place of the recording."""

import re
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias


class Turn(NamedTuple):
    """One turn of a chat.

    Attributes:
        role: "system", "user" or "assistant".
        content: what is written in it, without the recording.
        audio_at: the recording stands before this character of `content`. None: it stands in another turn, or there is
            none.
    """

    role: str
    content: str
    audio_at: int | None = None


Prompt: TypeAlias = "str | Sequence[Turn]"  # a text is one user turn; a recording precedes it


class ChatError(ValueError):
    """A chat that the language model's chat template cannot write."""


def turns_of(prompt: Prompt, has_audio: bool) -> Sequence[Turn]:
    """The turns of a prompt, of which one has the place of the recording if there is one.

    Raises:
        ValueError: the prompt has no turn, or places for recordings although there is none, or the other way round.
    """
    turns = [Turn("user", prompt, 0 if has_audio else None)] if isinstance(prompt, str) else prompt
    places = sum(turn.audio_at is not None for turn in turns)
    if not turns or places != has_audio:
        raise ValueError(f"prompt has {len(turns)} turns and {places} places for a recording, but needs {has_audio:d}")
    return turns


def text_of(prompt: Prompt) -> str:
    """A prompt as people read it: the text, or each turn of a chat on a line of its own, with its role."""
    if isinstance(prompt, str):
        return prompt
    lines = []
    for role, content, place in prompt:
        shown = content if place is None else f"{content[:place]}<audio>{content[place:]}"
        lines.append(f"{role}: {shown}")
    return "\n".join(lines)


def mark(number: int) -> str:
    """What stands for the content of a turn while the chat template is rendered."""
    return f"<|soundwave_turn_{number}|>"


def split_at_marks(rendered: str, count: int) -> tuple[list[str], list[int]]:
    """The pieces of a rendered template between the contents of its `count` turns, and the order of these.

    Raises:
        ChatError: the template has left out or repeated a turn.
    """
    pieces = re.split(r"<\|soundwave_turn_(\d+)\|>", rendered)
    order = [int(number) for number in pieces[1::2]]
    if sorted(order) != list(range(count)):
        raise ChatError(f"the chat template of the language model writes {len(order)} of its {count} turns")
    return pieces[::2], order

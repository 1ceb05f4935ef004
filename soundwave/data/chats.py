"""The chats of other trainers' manifests: lists of messages become turns with roles and one place for the recording."""

import json
import re
from typing import Any, NamedTuple

from soundwave.model.chat import Turn

AUDIO_TAG = "<audio>"
ROLES: dict[str, str] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt"), "assistant"),
}
TEXT_PARTS = ("text", "input_text", "output_text")
AUDIO_PARTS = ("audio", "audio_url", "input_audio")
TYPE_KEYS = ("type", "message_type")  # NeMo's and Kimi-Audio's
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
SOUND_FILE = re.compile(r"\.(wav|flac|ogg|opus|mp3|m4a|aac|webm|aiff?|au|sph|w64|caf|amr|wma)$", re.IGNORECASE)
# Keys that say which part of a file is meant, in other units or from other points than ours.
PART_KEYS = {
    "start", "end", "begin", "stop", "onset", "start_time", "end_time", "begin_time", "stop_time", "start_ms", "end_ms",
    "start_sec", "end_sec", "start_offset", "segment_start", "segment_end",
}  # fmt: skip
# Marks of other models for a recording or a picture: `<|AUDIO|>`, `<speech>`, `<image>`, `[AUDIO]`, …
SPEECH_MARK = re.compile(
    r"<\|?/?(?:start_?of_?|end_?of_?)?(?:audio|speech|sound(?!wave))[^<>\n]{0,40}>|\[(?:audio|speech)\]", re.IGNORECASE
)
PICTURE_MARK = re.compile(r"<\|?/?(?:image|img|video|vision)[^<>\n]{0,40}>|\[(?:image|video)\]", re.IGNORECASE)


class Refused(ValueError):
    """A line that is not read. The message says what was found, and what to write instead."""


class Chat(NamedTuple):
    """A chat as it stands in a line.

    Attributes:
        turns: all turns before the answer, still with `<audio>` in them.
        answer: the content of the last turn.
        recordings: what the messages themselves name, which may also be an offset and a duration.
        passed_over: keys of messages that are not used.
    """

    turns: list[Turn]
    answer: str
    recordings: list[dict[str, Any]]
    passed_over: list[str]


def show(value: Any) -> str:
    """The value as JSON on one line, shortened."""
    shown = json.dumps(value, ensure_ascii=False)
    if not shown.isprintable():
        shown = json.dumps(value)
    return shown if len(shown) <= 80 else shown[:77] + "…"


def names_sound(value: Any) -> bool:
    """Whether a value is the name of a sound file, or {"path": name}."""
    if isinstance(value, dict):
        value = value.get("path")
    return isinstance(value, str) and len(value.split()) == 1 and bool(SOUND_FILE.search(value.strip()))


def read_chat(key: str, messages: Any) -> Chat:
    """The chat under `key`: messages with role and content, or from and value, or pairs of human and assistant.

    Raises:
        Refused: a message cannot be read, or the last one is no answer to a question.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise Refused(f'{key} = {show(messages)}; write a list of {{"role": …, "content": …}}')
    recordings: list[dict[str, Any]] = []
    passed_over: list[str] = []
    turns: list[Turn] = []
    in_parts = any(message.keys() & {*TYPE_KEYS} for message in messages)
    messages = _without_pairs(messages)
    for number, message in enumerate(messages, start=1):
        role = _role(key, message)
        content = _content(key, role, message, recordings)
        passed_over += _other_keys(key, message, is_last=number == len(messages))
        if turns and turns[-1].role == role:
            if not in_parts:
                raise Refused(f'{key} has two messages of role "{role}" in a row; join them, or add what lies between')
            turns[-1] = Turn(role, _join(turns[-1].content, content))
        else:
            turns.append(Turn(role, content))
    for role in ("user", "assistant"):
        if not any(turn.role == role for turn in turns):
            raise Refused(f'{key} has none with role "{role}"; add one')
    if any(turn.role == "system" for turn in turns[1:]):
        raise Refused(f'{key} has a message of role "system" that is not the first; move it to the beginning')
    *turns, last = turns
    if last.role != "assistant":
        raise Refused(f"{key} ends with a question without an answer, {show(last.content)}; add the answer, or cut it")
    if turns[-1].role != "user":
        raise Refused(f"{key} has no question before the answer {show(last.content)}; add one")
    return Chat(turns, last.content, recordings, passed_over)


def place_recording(turns: list[Turn], names: str, recordings: int) -> list[Turn]:
    """The turns without `<audio>`, and with the place where it stood.

    Without `<audio>` a recording stands at the beginning of the first user turn.

    Args:
        turns: with the tag.
        names: what the line calls its prompt, and its recordings, for the message.
        recordings: how many recordings the line names.

    Raises:
        Refused: there are more tags than recordings, a tag outside a user turn, a mark of another model, or a turn
            without any content.
    """
    prompt_key, audio_key = names.split()
    for role, content, _ in turns:
        _refuse_marks(prompt_key, content)
        if sound := next(filter(names_sound, content.splitlines()), None):
            raise Refused(f'{prompt_key} has {show(sound)}, the name of a sound file; write it as "audio_filepath"')
        if role != "user" and AUDIO_TAG in content:
            raise Refused(f"{prompt_key} has {AUDIO_TAG} in a {role} turn; only users speak: write it in a user turn")
    tags = sum(turn.content.count(AUDIO_TAG) for turn in turns)
    if tags > recordings:
        found = f"{prompt_key} has {tags} {AUDIO_TAG}, but {audio_key} {recordings} paths"
        raise Refused(f"{found}; make them agree")
    at = next((i for i, turn in enumerate(turns) if turn.role == "user" and (not tags or AUDIO_TAG in turn.content)), 0)
    placed = []
    for i, (role, content, _) in enumerate(turns):
        place = None
        if i == at and recordings:
            before, _, after = content.partition(AUDIO_TAG) if tags else ("", "", content)
            before, after = before.lstrip(), after.rstrip()
            content, place = (before + after, len(before)) if before else (after.strip(), 0)
        placed.append(Turn(role, content.strip() if place is None else content, place))
        if not content.strip() and place is None:
            raise Refused(f"{prompt_key} has an empty {role} turn; fill it in, or leave it out")
    return placed


def _refuse_marks(key: str, content: str) -> None:
    rest = content.replace(AUDIO_TAG, " ")
    if found := SPEECH_MARK.search(rest):
        raise Refused(f"{key} has {show(found[0])}; write {AUDIO_TAG} where the recording stands")
    if found := PICTURE_MARK.search(rest):
        raise Refused(f"{key} has {show(found[0])}, but only recordings are read; leave this line out")


def _without_pairs(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, with each {"human": …, "assistant": …} as two."""
    given = []
    for message in messages:
        if {"human", "assistant"} <= message.keys() and not message.keys() & {*ROLE_KEYS, *CONTENT_KEYS}:
            given.append({"role": "user", "content": message["human"]})
            given.append(
                {"role": "assistant", "content": message["assistant"]}
                | {key: value for key, value in message.items() if key not in ("human", "assistant")}
            )
        else:
            given.append(message)
    return given


def _role(key: str, message: dict[str, Any]) -> str:
    names = [name for name in ROLE_KEYS if name in message]
    if len(names) != 1:
        fault = "lacks a role" if not names else 'has both "role" and "from"'
        raise Refused(f'a message of {key} {fault}: {show(message)}; write {{"role": …, "content": …}}')
    role = message[names[0]]
    known = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        wanted = "only system, user and assistant are read"
        raise Refused(f"{key} has a message of {names[0]} {show(role)}, but {wanted}; leave this line out")
    return known


def _content(key: str, role: str, message: dict[str, Any], recordings: list[dict[str, Any]]) -> str:
    """The text of a message, with `<audio>` for a recording in it, which is added to `recordings`."""
    for calls in ("tool_calls", "function_call"):
        if message.get(calls):
            raise Refused(f'{key} has a message with "{calls}", but tools are not read; leave this line out')
    for name, value in message.items():
        if (
            name in (*AUDIO_PARTS, "audios", "audio_filepath")
            and value
            or name not in CONTENT_KEYS
            and names_sound(value)
        ):
            raise Refused(f'{key} has a message with {show(name)}; name the recording in "audios", beside {key}')
    names = [name for name in CONTENT_KEYS if message.get(name) is not None]
    content = message[names[0]] if len(names) == 1 else None
    kind = next((message[name] for name in TYPE_KEYS if name in message), "text")
    if kind == "audio" and isinstance(content, str):
        recordings.append({"audio_filepath": content} | {k: message[k] for k in ("offset", "duration") if k in message})
        return AUDIO_TAG
    if kind != "text":
        raise Refused(
            f"{key} has a message of type {show(kind)}, but only text and audio are read; leave this line out"
        )
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content or not all(isinstance(part, dict) for part in content):
        found = content if names else message
        raise Refused(f'content of a "{role}" message of {key} = {show(found)}; write a string')
    text = ""
    for part in content:
        text = _join(text, _part(key, part, recordings))
    return text


def _part(key: str, part: dict[str, Any], recordings: list[dict[str, Any]]) -> str:
    """One part of a content list: {"type": "text", "text": …} or {"type": "audio", "audio": path}."""
    kind = part.get("type")
    if kind in TEXT_PARTS:
        if not isinstance(part.get("text"), str) or any(part.get(name) for name in AUDIO_PARTS):
            raise Refused(f'{key} has the part {show(part)}; write {{"type": "text", "text": …}}')
        return part["text"]
    if kind not in AUDIO_PARTS:
        raise Refused(f"{key} has a part of type {show(kind)}, but only text and audio are read; leave this line out")
    refuse_part(key, part)
    given = [part[name] for name in (*AUDIO_PARTS, "path", "url") if part.get(name) is not None]
    name = given[0] if given else None
    if isinstance(name, dict):
        if "data" in name or "bytes" in name or "array" in name:
            raise Refused(f"{key} holds the sound of a recording itself; save it as a file and name its path")
        refuse_part(key, name)
        name = name.get("url", name.get("path"))
    if len(given) > 1 or (given and not isinstance(name, str)):
        raise Refused(f'{key} has the part {show(part)}; write {{"type": "audio", "audio": path}}')
    if given:
        recordings.append({"audio_filepath": name})
    return AUDIO_TAG


def refuse_part(key: str, recording: dict[str, Any]) -> None:
    """Refuse a recording that says itself which part of it is meant."""
    for name in sorted(recording.keys() & {*PART_KEYS, "offset"}):
        if recording[name] is not None:
            raise Refused(f'{key} has "{name}" = {show(recording[name])}; write "offset" and "duration" beside {key}')


def _join(before: str, after: str) -> str:
    """Two parts of a content: a line break divides texts, but not a text and a recording."""
    near_audio = before.endswith(AUDIO_TAG) or after.startswith(AUDIO_TAG)
    return before + ("" if near_audio or not before else "\n") + after


def _other_keys(key: str, message: dict[str, Any], *, is_last: bool) -> list[str]:
    """The keys of a message that are not used.

    Raises:
        Refused: the answer is said to have no loss.
    """
    for name in ("loss", "loss_scale", "weight", "train", "training"):
        if is_last and isinstance(message.get(name), int | float) and not message[name]:
            raise Refused(f'{key} says "{name}": {show(message[name])} of the answer: it must not be learnt; cut it')
    used = {*ROLE_KEYS, *CONTENT_KEYS, "human", "assistant", "id", "name"}
    used |= {*TYPE_KEYS, "offset", "duration", "loss", "loss_scale", "weight", "train", "training"}
    return [name for name, value in message.items() if name not in used and value]

"""Other trainers' manifests: what each of their lines says in our own keys.

Read are NeMo's keys, which are our own ones, with those of Canary (`taskname`, `source_lang`, `target_lang`) and SALM
(`context`, `question`, `system_prompt`, typed `conversations`); ms-swift's and LLaMA-Factory's `messages`,
`conversations`, `query`/`response`/`history`, `instruction`/`input`/`output`, `system`, `audios`; lists of content
parts as OpenAI and transformers have them; the columns of Hugging Face's data sets; SLAM-LLM's and FunASR's `source`
and `target`. What would be misread is refused: the message names the key, and what to write.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from soundwave.data.chats import (
    AUDIO_TAG,
    PART_KEYS,
    Refused,
    names_sound,
    place_recording,
    read_chat,
    refuse_part,
    show,
)
from soundwave.model.chat import Turn

TRANSCRIBE_PROMPT = "Transcribe the speech."
CHAT_KEYS = ("messages", "conversations", "conversation")
AUDIO_KEYS = ("audio_filepath", "audios", "audio", "file_name")
TEXT_KEYS = ("text", "sentence", "transcription", "transcript")
PROMPT_KEYS = ("prompt", "query", "question", "context", "instruction")
ANSWER_KEYS = ("answer", "response", "output", "completion")
SYSTEM_KEYS = ("system", "system_prompt")
TASK_KEYS = ("task", "taskname")
LANGUAGE_KEYS = {
    "source_lang": ("source_language", "src_lang", "src_language"),
    "target_lang": ("target_language", "tgt_lang", "tgt_language"),
}
READ_KEYS = (
    *(*CHAT_KEYS, *AUDIO_KEYS, *TEXT_KEYS, *PROMPT_KEYS, *ANSWER_KEYS, *SYSTEM_KEYS, *TASK_KEYS),
    *("source", "target", "history", "input"),
    *(key for keys in LANGUAGE_KEYS.values() for key in keys),
)
TRANSCRIBE = {"transcribe", "transcription", "asr", "stt", "s2t", "speech_recognition", "speech_to_text"}
TRANSLATE = {"translate", "translation", "ast", "st", "s2t_translation", "speech_translation"}
# Marks of a model's own in texts: `<|0.00|>`, `<|zh|>`, `<|NEUTRAL|>`.
TEXT_MARK = re.compile(r"<\|[^<>|\s]{1,40}\|>")
PLACEHOLDERS = {"na", "n/a", "n.a.", "#n/a", "<na>", "nan", "-", "--"}
# What cannot be read: the key, and why.
OTHER_SENSES: dict[str, str] = {
    **dict.fromkeys(("images", "image", "videos", "video"), "only recordings are read"),
    **dict.fromkeys(("tools", "functions"), "tools are not read"),
    **dict.fromkeys(("choices", "options"), "the prompt must name them"),
}
# What is passed over although it may matter, and what that means.
NO_PROMPT = ("pnc", "itn", "timestamp", "diarize", "decodercontext", "prompt_context")
PASSED_OVER: dict[str, str] = {
    **dict.fromkeys(("locale", "text_language"), 'languages are read from "source_lang" and "target_lang"'),
    **dict.fromkeys(NO_PROMPT, "no prompt depends on it"),
    **dict.fromkeys(("rejected_response", "rejected_messages", "rejected"), "only the answer is learnt"),
    **dict.fromkeys(("loss_scale", "loss", "weight", "sample_weight"), "all samples weigh the same"),
    "translation": 'to learn it, write "task", "prompt" and "answer"',
    "channel_selector": "the channels are averaged",
    "input": 'it belongs to "instruction"',
}

Note = Callable[[str, str], None]  # what it is about, said once for each, and the sentence


class OwnForm(NamedTuple):
    """A line in our own keys.

    Attributes:
        row: our own keys, and all that are not ours.
        chat: the turns of the prompt, where it is more than a text after a recording.
        audio_key: what the line itself calls its recording.
    """

    row: dict[str, Any]
    chat: tuple[Turn, ...]
    audio_key: str


def to_own_form(row: dict[str, Any], note: Note) -> OwnForm:
    """A line of any form that is read, in our own keys.

    Args:
        note: called with each thing that is passed over or replaced.

    Raises:
        Refused: the line would be misread.
    """
    row = dict(row)
    _refuse_other_formats(row)
    chat_key = _one_of(CHAT_KEYS, {key: row[key] for key in CHAT_KEYS if _is_chat(row, key)})
    foreign = bool(chat_key or row.keys() & {*PROMPT_KEYS[1:], *ANSWER_KEYS[1:]})
    _refuse_other_senses(row, foreign, note)
    turns, prompt_key, inner = _take_exchange(row, chat_key, note)
    audio_key, recordings = _take_audio(row, inner, note)
    _take_text(row, note)
    _take_task(row)
    for own, others in LANGUAGE_KEYS.items():
        _take_first(row, (own, *others), note)
    _drop_placeholders(row, note)
    _settle_task(row, chat_key is not None, note)
    chat: tuple[Turn, ...] = ()
    if turns and "prompt" not in row:
        if row["task"] != "transcribe":
            raise Refused('has a system prompt or a history, but no "prompt"; add it')
        row["prompt"] = TRANSCRIBE_PROMPT
    if isinstance(row.get("prompt"), str):
        turns = [*turns, Turn("user", row["prompt"])]
        chat, row["prompt"] = _as_chat(turns, f"{prompt_key} {audio_key}", recordings)
    if isinstance(row.get("answer"), str) and AUDIO_TAG in row["answer"]:
        raise Refused(f"the answer has {AUDIO_TAG}, but answers are text; leave this line out")
    for key in ("text", "answer"):
        if names_sound(row.get(key)):
            raise Refused(f"{key} = {show(row[key])} is the name of a sound file; write the words")
    for key in ("text", "ctc_text", "answer"):
        if isinstance(row.get(key), str) and (mark := TEXT_MARK.search(row[key])):
            note("mark", f"{key} has {show(mark[0])}; such marks are learnt as they stand: take out what is not said")
    for key in (key for key in PASSED_OVER if row.get(key)):
        note(key, f'the key "{key}" is passed over: {PASSED_OVER[key]}')
    return OwnForm(row, chat, audio_key)


def _as_chat(turns: list[Turn], names: str, recordings: int) -> tuple[tuple[Turn, ...], str]:
    """The chat, empty if one prompt after the recording says all, and the prompt."""
    last = turns[-1]
    if not last.content.strip() and not recordings:
        return (), last.content  # an empty prompt is refused later
    if not last.content.strip():
        raise Refused(f'{names.split()[0]} = {show(last.content)} is empty; fill it in, or write "{AUDIO_TAG}"')
    placed = place_recording(turns, names, recordings)
    if len(placed) == 1 and placed[0].audio_at in (None, 0):
        return (), placed[0].content
    return tuple(placed), placed[-1].content


def _one_of(names: tuple[str, ...], given: dict[str, Any]) -> str | None:
    if len(given) > 1:
        first, second, *_ = given
        raise Refused(f'has both "{first}" and "{second}"; keep one')
    return next(iter(given), None)


def _is_chat(row: dict[str, Any], key: str) -> bool:
    return key in row and (key == "messages" or isinstance(row[key], list) or "text" not in row and "prompt" not in row)


def _refuse_other_formats(row: dict[str, Any]) -> None:
    if {"recording", "supervisions"} <= row.keys():
        raise Refused('is a cut of Lhotse ("recording", "supervisions"); export it as a manifest of NeMo')
    if "chosen" in row and "rejected" in row and not row.keys() & {*ANSWER_KEYS}:
        raise Refused('is a pair of preferences ("chosen", "rejected"); write the better one as "answer"')
    for key in ("label", "kto_tag"):
        if str(row.get(key)).lower() == "false" and row.keys() & {*CHAT_KEYS, *ANSWER_KEYS[1:]}:
            raise Refused(f'says "{key}": {show(row[key])}: its answer must not be learnt; leave this line out')


def _refuse_other_senses(row: dict[str, Any], foreign: bool, note: Note) -> None:
    for key in (key for key in OTHER_SENSES if row.get(key) not in (None, "", [], "[]")):
        if foreign:
            raise Refused(f'has the key "{key}", but {OTHER_SENSES[key]}; leave this line out, or the key')
        note(key, f'the key "{key}" is passed over: {OTHER_SENSES[key]}')


# --- prompt and answer


def _take_exchange(
    row: dict[str, Any], chat_key: str | None, note: Note
) -> tuple[list[Turn], str, list[dict[str, Any]]]:
    """Set `prompt` and `answer`.

    Returns:
        The turns before the prompt, the key of the prompt, and the recordings that messages name.
    """
    before: list[Turn] = []
    recordings: list[dict[str, Any]] = []
    prompt_key = "prompt"
    if chat_key:
        for key in sorted(row.keys() & {"prompt", "answer", "query", "response", "history"}):
            raise Refused(f'"{key}" is given twice, by its own key and in another form; keep one')
        chat = read_chat(chat_key, row.pop(chat_key))
        before, prompt_key, recordings = chat.turns[:-1], chat_key, chat.recordings
        row |= {"prompt": chat.turns[-1].content, "answer": chat.answer}
        for key in chat.passed_over:
            note(f"message {key}", f"the key {show(key)} of {chat_key} is passed over")
        for key in sorted(row.keys() & {*PROMPT_KEYS[1:], *ANSWER_KEYS[1:]}):
            note(key, f'the key "{key}" is passed over, because "{chat_key}" is given')
    else:
        prompt_key = _take_first(row, PROMPT_KEYS, note)
        answer_key = _take_first(row, ANSWER_KEYS, note)
        if prompt_key == "instruction" and isinstance(row.get("input"), str):
            row["prompt"] = "\n".join(filter(str.strip, (row["prompt"], row.pop("input"))))
        asks = prompt_key != "prompt" and not _is_placeholder(row["prompt"], more=("",))
        if asks and not row.keys() & {"answer", "target"}:
            raise Refused(f'has "{prompt_key}" = {show(row["prompt"])}, but no answer; add "answer"')
        if answer_key == "output" and "input" in row and "prompt" not in row:
            meant = "audio_filepath" if names_sound(row["input"]) else "prompt"
            raise Refused(f'has "input" = {show(row["input"])} and "output"; write "{meant}" and "answer"')
    before = _history(row) + before if "history" in row else before
    if system := _system(row):
        if any(turn.role == "system" for turn in before):
            raise Refused(f'"system" is given twice, by its own key and in {prompt_key}; keep one')
        before = [system, *before]
    if any(turn.role == "assistant" for turn in before):
        note("earlier answers", "earlier answers of a chat stand in the prompt; only the last answer is learnt")
    return before, prompt_key, recordings


def _take_first(row: dict[str, Any], keys: tuple[str, ...], note: Note) -> str:
    """Write the one key of `keys` that is given as keys[0]; return its name."""
    own = keys[0]
    given = [key for key in keys if key in row]
    if own in given:
        for key in given[1:]:
            note(key, f'the key "{key}" is passed over, because "{own}" is given')
        return own
    if not given:
        return own
    key = _one_of(keys, {key: row[key] for key in given}) or own
    value = row.pop(key)
    if not isinstance(value, str):
        raise Refused(f"{key} = {show(value)}; write a string")
    row[own] = value
    return key


def _history(row: dict[str, Any]) -> list[Turn]:
    history = row.pop("history")
    pairs = history if isinstance(history, list) else [None]
    turns = []
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise Refused(f'history = {show(history)}; write a list of ["question", "answer"]')
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return turns


def _system(row: dict[str, Any]) -> Turn | None:
    given = {key: row.pop(key) for key in SYSTEM_KEYS if row.get(key) not in (None, "")}
    key = _one_of(SYSTEM_KEYS, given)
    if key is None:
        return None
    if not isinstance(given[key], str):
        raise Refused(f"{key} = {show(given[key])}; write a string, or rename the key")
    return Turn("system", given[key])


# --- recording and transcript


def _take_audio(row: dict[str, Any], inner: list[dict[str, Any]], note: Note) -> tuple[str, int]:
    """Set `audio_filepath`; return the key that named it, and the number of recordings."""
    given = {key: row.pop(key) for key in AUDIO_KEYS if key in row}
    paths = {key: path for key, value in given.items() if (path := _one_path(key, value)) is not None}
    source = next((key for key in ("source", "path") if key in row), None)
    if not paths and not inner and source and "target" in row:
        if "answer" in row:
            raise Refused('"answer" is given twice, by its own key and in another form; keep one')
        paths[source] = row.pop(source)
        row["answer"] = row.pop("target")
        if "task" not in row and "prompt" not in row:
            row.setdefault("text", row["answer"])
    elif not paths and not inner and "path" in row and row.keys() & set(TEXT_KEYS):
        paths["path"] = row.pop("path")
    if inner:
        names = [recording["audio_filepath"] for recording in inner] + list(paths.values())
        if len(inner) > 1 or any(name != names[0] for name in names):
            raise Refused(f"names {len(names)} recordings, {show(names)}, but one a line is read; leave this line out")
        for key in inner[0].keys() & row.keys():
            raise Refused(f'"{key}" is given twice, in the line and in a message; keep one')
        row |= inner[0]
        return "audio", 1
    names = list(paths.values())
    if len(names) > 1 and any(name != names[0] for name in names):
        first, second, *_ = paths
        raise Refused(f'has the recordings "{first}" and "{second}", but one a line is read; leave one out')
    if names:
        row["audio_filepath"] = names[0]
    _check_sound_keys(row, note)
    return next(iter(paths), next(iter(given), "audios")), len(names[:1])


def _one_path(key: str, value: Any) -> Any:
    """The path in a value: a string, {"path": …} or a list of one of them; None if the list is empty."""
    if key == "audio_filepath":
        return value  # checked with the file
    if isinstance(value, list) or key == "audios":
        if not isinstance(value, list) or len(value) > 1:
            several = "" if not isinstance(value, list) else "; one recording a line is read"
            raise Refused(f"{key} = {show(value)}{several}; write a list of one path, or leave it out")
        if not value:
            return None
        value = value[0]
    if isinstance(value, dict):
        if value.get("bytes") or value.get("array"):
            raise Refused(f"{key} holds the sound of a recording itself; save it as a file and name its path")
        refuse_part(key, value)
        value = value.get("path")
    if not isinstance(value, str):
        raise Refused(f'{key} names no path; write a string, or {{"path": …}}')
    return value


def _check_sound_keys(row: dict[str, Any], note: Note) -> None:
    """Refuse a line that names its recording, or the part of it, under a key that is not read."""
    for key, value in row.items():
        if key in ("audio_filepath", "prompt", "answer", "ctc_text", "task", *TEXT_KEYS):
            continue
        if names_sound(value):
            if "audio_filepath" not in row:
                raise Refused(
                    f'names no recording, but {show(key)} = {show(value)}; write "audio_filepath", or rename it'
                )
            name = value["path"] if isinstance(value, dict) else value
            if not str(row["audio_filepath"]).endswith(name.rpartition("/")[2]):
                note(key, f"the key {show(key)} names another sound file, which is not read")
        part = key in PART_KEYS and isinstance(value, int | float) and not isinstance(value, bool)
        if part and "audio_filepath" in row and "offset" not in row and (value or "duration" not in row):
            raise Refused(f'has "{key}" = {show(value)}, which is not read; write "offset" and "duration", in seconds')


def _take_text(row: dict[str, Any], note: Note) -> None:
    if "audio_filepath" not in row:
        return
    given = {key: row[key] for key in TEXT_KEYS if key in row}
    if "text" in given:
        for key in list(given)[1:]:
            if row[key] != row["text"]:
                note(key, f'the key "{key}" is passed over, because "text" is given')
        return
    if given:
        first, *others = given
        for key in others:
            if row[key] != row[first]:
                raise Refused(f'has both "{first}" and "{key}", which differ; write the transcript as "text"')
        if not isinstance(row[first], str):
            raise Refused(f"{first} = {show(row[first])}; write a string")
        row["text"] = row.pop(first)


# --- task


def _take_task(row: dict[str, Any]) -> None:
    """Set `task`, for which Canary says `taskname`, to "transcribe" or "translate" where it means that."""
    names = {}
    for key in TASK_KEYS:
        if key == "taskname" and not isinstance(row.get(key, ""), str):
            raise Refused(f"taskname = {show(row[key])}; write a string")
        if isinstance(row.get(key), str):
            name = row[key].strip().strip("<|>").lower().replace("-", "_").replace(" ", "_")
            whole = "prompt" in row and "answer" in row  # such a line may call its task as it likes
            meaning = "translate" if name in TRANSLATE and not whole else row[key]
            names[key] = "transcribe" if name in TRANSCRIBE else meaning
    if len(set(names.values())) > 1:
        raise Refused(f'has "task": {show(row["task"])} and "taskname": {show(row["taskname"])}; keep one')
    if names and ("task" in names or "task" not in row):
        row.pop("taskname", None)
        row["task"] = next(iter(names.values()))


def _is_placeholder(value: Any, *, more: tuple[str, ...] = ()) -> bool:
    return isinstance(value, str) and value.strip().lower() in {*PLACEHOLDERS, *more}


def _drop_placeholders(row: dict[str, Any], note: Note) -> None:
    """Refuse place-holders, or leave them out where the line says what belongs in their place."""
    for key in ("text", "ctc_text"):
        if _is_placeholder(row.get(key)):
            raise Refused(
                f'{key} = {show(row[key])} is a place-holder; write what is said ("Na." for that word, "" for nothing)'
            )
    transcribed = "text" in row and row.get("task", "transcribe") in ("transcribe", "translate")
    for key, instead in (("prompt", "the usual prompt"), ("answer", "the text")):
        if key not in row:
            continue
        own_words = key == "answer" and "prompt" in row and "task" not in row
        if transcribed and not own_words and _is_placeholder(row[key], more=("", "none", "null")):
            if row[key] != row["text"]:
                note(f"{key} {row[key]}", f"{key} = {show(row[key])} is a place-holder: {instead} is taken")
            del row[key]
        elif _is_placeholder(row[key]):
            raise Refused(f"{key} = {show(row[key])} is a place-holder; write the {key}")


def _settle_task(row: dict[str, Any], is_chat: bool, note: Note) -> None:
    """Set the task of a line that names none, and see to it that a translation is no transcript."""
    differ = _languages_differ(row)
    task = row.get("task")
    if task is None:
        if "prompt" in row and "answer" in row:
            if not is_chat:
                note("task", 'lines with a prompt and an answer, but without "task", get the task "chat"')
            task = "chat"
        elif differ:
            task = "translate"
        elif differ is None and "text" in row and "prompt" not in row and isinstance(row.get("target_lang"), str):
            raise Refused('has "target_lang", but no "source_lang"; write both, or "task": "transcribe" or "translate"')
        elif "answer" in row and "prompt" not in row and "text" not in row and differ is None:
            raise Refused('has "answer", but neither "text" nor "prompt"; write "text", or "task" and "prompt", too')
        elif "answer" in row and "prompt" not in row and not _same_words(row["answer"], row.get("text", row["answer"])):
            raise Refused('has a "text" and another "answer", but no "prompt"; add "task" and "prompt"')
        else:
            task = "transcribe"
    row["task"] = task
    if task == "transcribe":
        if differ:
            languages = f"source_lang {show(row['source_lang'])} and target_lang {show(row['target_lang'])}"
            raise Refused(f'has the task of a transcription, but {languages}; write "task": "translate"')
        if "answer" in row:
            row.setdefault("text", row["answer"])
    if differ or task == "translate":
        _settle_translation(row, note, differ)


def _settle_translation(row: dict[str, Any], note: Note, differ: bool | None) -> None:
    """Where the text is the translation, it is the answer, and CTC has no transcript to learn."""
    if row["task"] == "translate" and differ is False:
        raise Refused(f'translates from and into {show(row["target_lang"])}; correct "task", or a language')
    if "text" in row and _same_words(row["text"], row.get("answer", row["text"])):
        text = row.pop("text")
        row.setdefault("answer", text)
        note("translation", "where the text is a translation, the LLM learns it and CTC does not")
    if row["task"] == "translate" and "prompt" not in row and "audio_filepath" in row:
        if not isinstance(row.get("target_lang"), str) or not _language(row["target_lang"])[0]:
            raise Refused('lacks "target_lang", which a translation without "prompt" needs; add one of them')
        row["prompt"] = f"Translate the speech into {language_name(row['target_lang'])}."


def _same_words(one: Any, other: Any) -> bool:
    """Whether two texts are equal but for capitals, marks and spaces. What is no text is refused later."""
    if not isinstance(one, str) or not isinstance(other, str):
        return True
    return re.sub(r"[\W_]", "", one).casefold() == re.sub(r"[\W_]", "", other).casefold()


def _languages_differ(row: dict[str, Any]) -> bool | None:
    """Whether `source_lang` and `target_lang` are two languages; None if one of them is not told.

    Raises:
        Refused: it cannot be told.
    """
    source, target = (row.get(key) for key in ("source_lang", "target_lang"))
    if not isinstance(source, str) or not isinstance(target, str):
        return None
    (one, one_known), (other, other_known) = _language(source), _language(target)
    if not one or not other:
        return None
    if one != other and not (one_known and other_known) and len(one) != len(other):
        raise Refused(f"cannot tell whether {show(source)} and {show(target)} are one language; write ISO 639-1 codes")
    return one != other


def _language(value: str) -> tuple[str, bool]:
    """The code of a language ("de" for "de-CH" and "German") and whether it is one that Whisper knows."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

    name = re.split(r"[-_]", value.strip().strip("<|>").lower())[0]
    if name in (*PLACEHOLDERS, "", "auto", "unk", "unknown"):
        return "", False
    code = TO_LANGUAGE_CODE.get(name, name)
    return code, code in LANGUAGES


def language_name(value: str) -> str:
    """The English name of a language that is given by its code or name ("German" for "de-CH")."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    code, _ = _language(value)
    return LANGUAGES.get(code, value).title()

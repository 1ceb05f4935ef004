"""Manifests: text files with one JSON object per line, which is one sample.

Our own form has NeMo's keys and a few more. A transcription needs `audio_filepath` and `text`, any other task
`task`, `prompt` and `answer`. A sample without audio is text only:

    {"audio_filepath": "a/1.wav", "duration": 2.1, "offset": 0.0, "text": "turn the light on"}
    {"audio_filepath": "a/1.wav", "task": "intent", "prompt": "What is wanted?", "answer": "light"}
    {"task": "qa", "prompt": "What is the capital of France?", "answer": "Paris"}

`ctc_text` replaces the transcript in CTC, where CTC should write more than the words.

Two other forms are read too: `messages` with `audios` (ms-swift, LLaMA-Factory; the task is "chat" unless one is
given) and SLAM-LLM's `key`, `source`, `target`. Unknown keys are kept in `Sample.extra`; `null` counts as absent.
"""

import difflib
import json
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from soundwave.data.audio import shown

AUDIO_TAG = "<audio>"
KEYS = (
    *("audio_filepath", "offset", "duration", "text"),
    *("task", "prompt", "answer", "ctc_text", "source_lang", "target_lang"),
)
OTHER_FORMS_KEYS = ("messages", "audios", "source", "target")
ONE_OBJECT_A_LINE = "a manifest is UTF-8 text with one JSON object on each line"
NO_ARRAY = "write its objects one a line, without brackets"
WANTED = {
    "offset": "give seconds from 0 up, or leave it out",
    "duration": "give seconds above 0, or leave it out",
}


class ManifestError(ValueError):
    """A manifest that cannot be used. The message is one line: file, line number, what was found, how to mend it."""


class _AudioMissing(ManifestError):
    """The line is correct, but its audio file cannot be read."""

    def __init__(self, name: str, fault: str):
        super().__init__(f"audio_filepath {_show(name)} {fault}")
        self.name, self.fault = name, fault


class Sample(BaseModel):
    """One line of a manifest, checked.

    Attributes:
        id: the manifest's name and the line number ("train.jsonl:12").
        audio: absolute path; None for text only.
        offset, duration: the part of the file that is used, in seconds; with duration None up to the end.
        text: transcript of the audio.
        task: "transcribe" or any other name.
        prompt, answer: the user's prompt and the answer that the language model learns.
        ctc_text: text that CTC learns instead of `text`, for example with labels of what is heard beside the words
            ("turn on the light female slow").
        source_lang, target_lang: languages of the audio and of the answer.
        extra: all other keys of the line.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    id: str
    audio: Path | None
    offset: float = Field(0.0, ge=0, allow_inf_nan=False)
    duration: float | None = Field(None, gt=0, allow_inf_nan=False)
    text: str | None = None
    task: str = Field("transcribe", min_length=1)
    prompt: str | None = None
    answer: str | None = None
    ctc_text: str | None = None
    source_lang: str | None = None
    target_lang: str | None = None
    extra: dict[str, Any] = {}


def read_manifest(
    path: str | Path, *, allow_outside: bool = False, leave_out: Callable[[str, str, str], None] | None = None
) -> list[Sample]:
    """Read a manifest and check every line and every audio file, so that a missing file does not stop a run later.

    `audio_filepath` is relative to the manifest's folder.

    Args:
        allow_outside: audio may lie outside the manifest's folder, also through a symbolic link. By default it may
            not, because a manifest from somebody else could name your private files.
        leave_out: called with the sample's id, its audio_filepath and the fault for each line whose audio file is
            missing, empty or unreadable; that line gives no sample. Without it such a line is an error.

    Raises:
        ManifestError: the manifest is missing, a folder, empty, binary, not UTF-8, or a line is no sample.
    """
    path = Path(path)
    samples, lines = [], 0
    try:
        with open(path, "rb") as file:
            _refuse_binary(path, file.peek(4096))
            for number, line in enumerate(file, start=1):
                if line.strip() in (b"", b"\xef\xbb\xbf"):
                    continue
                lines += 1
                try:
                    samples.append(_read_line(path, number, line, allow_outside))
                except _AudioMissing as error:
                    if leave_out is None:
                        raise ManifestError(f"{shown(path)}:{number}: {error}") from None
                    leave_out(f"{shown(path.name)}:{number}", error.name, error.fault)
    except FileNotFoundError:
        raise ManifestError(f"{shown(path)}: does not exist; name a manifest (.jsonl)") from None
    except IsADirectoryError:
        raise ManifestError(f"{shown(path)}: is a folder; name a manifest (.jsonl) in it") from None
    except OSError as error:
        raise ManifestError(f"{shown(path)}: cannot be read ({error.strerror}); name a readable manifest") from None
    if not lines:
        raise ManifestError(f"{shown(path)}: holds no samples; {ONE_OBJECT_A_LINE}")
    return samples


def write_manifest(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines. The file is written aside and renamed, so that a killed run leaves no half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _refuse_binary(path: Path, head: bytes) -> None:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ManifestError(f"{shown(path)}: is UTF-16 text; save it as UTF-8")
    if b"\0" in head:
        raise ManifestError(f"{shown(path)}: is a binary file (audio?); {ONE_OBJECT_A_LINE}")


def _read_line(path: Path, number: int, line: bytes, allow_outside: bool) -> Sample:
    try:
        row = {key: value for key, value in _parse(line).items() if value is not None}
        row = _to_own_form(row)
        _require(row)
        audio = row.pop("audio_filepath", None)
        if audio is not None:
            audio = _find_audio(audio, path.parent, allow_outside)
        known = {key: row.pop(key) for key in KEYS if key in row}
        sample = Sample(id=f"{shown(path.name)}:{number}", audio=audio, extra=row, **known)
        return sample if sample.answer is not None else sample.model_copy(update={"answer": sample.text})
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        fault = f"{key} = {_show(first['input'])}: {first['msg']}; {WANTED.get(key, 'write a string')}"
    except _AudioMissing:
        raise
    except ManifestError as error:
        fault = str(error)
    raise ManifestError(f"{shown(path)}:{number}: {fault}")


def _parse(line: bytes) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise ManifestError(f"byte {byte:#04x} is not UTF-8; save the manifest as UTF-8 text") from None
    try:
        row = json.loads(text)
        json.dumps(row, ensure_ascii=False).encode()  # json.loads accepts a lone surrogate, but no tokenizer does
    except UnicodeEncodeError:
        raise ManifestError("holds half of a surrogate pair (\\ud800 …); write the whole character") from None
    except RecursionError:
        raise ManifestError(f"is nested too deeply; {ONE_OBJECT_A_LINE}") from None
    except ValueError as error:
        if text.startswith("["):
            raise ManifestError(f"begins a JSON array; {NO_ARRAY}") from None
        fault = getattr(error, "msg", "a number is too long")
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ManifestError(f"is not JSON ({fault}{column}); {ONE_OBJECT_A_LINE}") from None
    if isinstance(row, list):
        raise ManifestError(f"is a JSON array; {NO_ARRAY}")
    if not isinstance(row, dict):
        raise ManifestError(f"is {_show(row)}, not a JSON object; {ONE_OBJECT_A_LINE}")
    return row


def _to_own_form(row: dict[str, Any]) -> dict[str, Any]:
    if "messages" in row:
        given = _from_messages(row.pop("messages"), row.pop("audios", []))
        row.setdefault("task", "chat")
    elif {"source", "target"} <= row.keys() and "audio_filepath" not in row:
        given = {"audio_filepath": row.pop("source"), "answer": row.pop("target")}
    else:
        return row
    if row.get("task", "transcribe") == "transcribe" and "text" not in row:
        given["text"] = given["answer"]
    for key in given.keys() & row.keys():
        raise ManifestError(f'"{key}" is given twice, by its own key and in another form; keep one')
    return row | given


def _from_messages(messages: Any, audios: Any) -> dict[str, Any]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ManifestError(f'messages = {_show(messages)}; write a list of {{"role": …, "content": …}}')
    if not isinstance(audios, list) or len(audios) > 1:
        raise ManifestError(f"audios = {_show(audios)}; write a list of one path, or leave it out")
    prompt, answer = (_last_content(messages, role) for role in ("user", "assistant"))
    tags = prompt.count(AUDIO_TAG)
    if tags > len(audios):
        raise ManifestError(f"messages has {tags} {AUDIO_TAG}, but audios {len(audios)} paths; make them agree")
    given = {"prompt": prompt.replace(AUDIO_TAG, "").strip(), "answer": answer}
    return given | ({"audio_filepath": audios[0]} if audios else {})


def _last_content(messages: list[dict[str, Any]], role: str) -> str:
    contents = [message.get("content") for message in messages if message.get("role") == role]
    if not contents:
        raise ManifestError(f'messages has none with role "{role}"; add one')
    if not isinstance(contents[-1], str):
        raise ManifestError(f'content of the last "{role}" message = {_show(contents[-1])}; write a string')
    return contents[-1]


def _require(row: dict[str, Any]) -> None:
    """Refuse a row that lacks a key that its task needs, or that has a misspelt key."""
    task = row.get("task", "transcribe")
    needed = ("audio_filepath", "text") if task == "transcribe" else ("prompt", "answer")
    missing = [key for key in needed if key not in row]
    known, cutoff = (KEYS + OTHER_FORMS_KEYS, 0.7) if missing else (KEYS, 0.85)
    for key in (key for key in row if key not in KEYS):
        nearest = difflib.get_close_matches(key.lower(), known, n=1, cutoff=cutoff)
        if nearest and nearest[0] not in row:
            raise ManifestError(f'has the unknown key {_show(key)}; write "{nearest[0]}", or rename it')
    if missing:
        found = _show(sorted(row))
        raise ManifestError(f'lacks "{missing[0]}", which task {_show(task)} needs; add it to the keys {found}')
    for key in needed:
        if key != "text" and isinstance(row[key], str) and not row[key].strip():
            raise ManifestError(f"{key} = {_show(row[key])} is empty; fill it in")


def _find_audio(name: Any, folder: Path, allow_outside: bool) -> Path:
    named = f"audio_filepath {_show(name)}"
    if not isinstance(name, str):
        raise ManifestError(f"{named} is not a string; write a path relative to the manifest's folder")
    root = os.path.abspath(folder)
    audio = os.path.abspath(os.path.join(root, name))
    if not allow_outside:
        _refuse_outside(named, root, audio)
    try:
        status = os.stat(audio)
    except FileNotFoundError:
        raise _AudioMissing(name, "does not exist; correct the path, relative to the manifest's folder") from None
    except ValueError as error:  # a null byte
        raise ManifestError(f"{named} cannot be opened ({error}); name an audio file") from None
    except OSError as error:  # str(error) would repeat the path
        raise _AudioMissing(name, f"cannot be opened ({error.strerror}); name an audio file") from None
    if not stat.S_ISREG(status.st_mode):
        raise _AudioMissing(name, "is not a file; name an audio file")
    if status.st_size == 0:
        raise _AudioMissing(name, "is an empty file; record it again, or leave this line out")
    if not os.access(audio, os.R_OK):
        raise _AudioMissing(name, "is not readable; give yourself permission to read it")
    return Path(audio)


def _refuse_outside(named: str, folder: str, audio: str) -> None:
    permit = "permit it: allow_outside=true (soundwave train, evaluate, report: --allow-outside)"
    if os.path.commonpath([folder, audio]) != folder:
        raise ManifestError(f"{named} leads out of the manifest's folder; move it in, or {permit}")
    try:
        real, real_folder = os.path.realpath(audio), os.path.realpath(folder)
    except (OSError, ValueError):  # a link that cannot be followed cannot be opened either, which is refused later
        return
    if os.path.commonpath([real_folder, real]) != real_folder:
        raise ManifestError(
            f"{named} is a symbolic link out of the manifest's folder, to {_show(real)}; copy the file, or {permit}"
        )


def _show(value: Any) -> str:
    """The value as JSON on one line, shortened."""
    shown = json.dumps(value, ensure_ascii=False)
    if not shown.isprintable():
        shown = json.dumps(value)
    return shown if len(shown) <= 80 else shown[:77] + "…"

"""Manifests: text files with one JSON object per line, or a JSON array of objects. Each object is one sample.

Our own form has NeMo's keys and a few more. A transcription needs `audio_filepath` and `text`, any other task
`task`, `prompt` and `answer`. A sample without audio is text only:

    {"audio_filepath": "a/1.wav", "duration": 2.1, "offset": 0.0, "text": "turn the light on"}
    {"audio_filepath": "a/1.wav", "task": "intent", "prompt": "What is wanted?", "answer": "light"}
    {"task": "qa", "prompt": "What is the capital of France?", "answer": "Paris"}

`ctc_text` replaces the transcript in CTC, where CTC should write more than the words. `<audio>` in a prompt says where
the recording stands; by default it stands before the prompt.

`soundwave.data.forms` reads the forms of other trainers. Unknown keys are kept in `Sample.extra`; `null` counts as
absent.
"""

import difflib
import json
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from soundwave.data.audio import shown
from soundwave.data.chats import Refused
from soundwave.data.chats import show as _show
from soundwave.data.forms import (
    ANSWER_KEYS,
    AUDIO_KEYS,
    CHAT_KEYS,
    PART_KEYS,
    PROMPT_KEYS,
    READ_KEYS,
    TEXT_KEYS,
    to_own_form,
)
from soundwave.model.chat import Turn

KEYS = (
    *("audio_filepath", "offset", "duration", "text"),
    *("task", "prompt", "answer", "ctc_text", "source_lang", "target_lang"),
)
ONE_OBJECT_A_LINE = "a manifest is UTF-8 text with one JSON object on each line, or one JSON array of objects"
NO_ARRAY = "write its objects one a line, without brackets"
OTHER_FILES = {b"PAR1": "a Parquet file", b"ARROW1": "an Arrow file", b"PK\x03\x04": "a spreadsheet or another archive"}
WANTED = {
    "offset": "give seconds from 0 up, or leave it out",
    "duration": "give seconds above 0, or leave it out",
}
# What other tools call our keys, where a spelling that is near would lead astray.
CALLED: dict[str, str] = {
    **dict.fromkeys(
        ("wav", "wav_path", "wav_file", "wav_filename", "path", "file", "filename", "filepath"), "audio_filepath"
    ),
    **dict.fromkeys(("speech", "audio_file", "audio_path", "clip", "recording", "sound"), "audio_filepath"),
    **dict.fromkeys(("txt", "words", "utterance", "transcripts", "normalized_text", "raw_text"), "text"),
    **dict.fromkeys(("instructions", "user", "ask", "request"), "prompt"),
    **dict.fromkeys(("reply", "assistant", "label", "answers", "responses", "caption"), "answer"),
}
MEANS = {key: keys[0] for keys in (AUDIO_KEYS, TEXT_KEYS, PROMPT_KEYS, ANSWER_KEYS) for key in keys}


class ManifestError(ValueError):
    """A manifest that cannot be used. The message is one line: file, line number, what was found, how to mend it."""


class _AudioMissing(ManifestError):
    """The line is correct, but its audio file cannot be read."""

    def __init__(self, key: str, name: str, fault: str):
        super().__init__(f"{key} {_show(name)} {fault}")
        self.name, self.fault = name, fault


class Sample(BaseModel):
    """One line of a manifest, checked.

    Attributes:
        id: the manifest's name and the line number ("train.jsonl:12"); in an array the line where the object begins.
        audio: absolute path; None for text only.
        offset, duration: the part of the file that is used, in seconds; with duration None up to the end.
        text: transcript of the audio.
        task: "transcribe" or any other name.
        prompt, answer: the user's prompt and the answer that the language model learns.
        chat: all turns up to the prompt, where there is more than a prompt after the recording: a system prompt,
            earlier turns, or a recording that stands elsewhere.
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
    chat: tuple[Turn, ...] = ()
    ctc_text: str | None = None
    source_lang: str | None = None
    target_lang: str | None = None
    extra: dict[str, Any] = {}


def read_manifest(
    path: str | Path,
    *,
    allow_outside: bool = False,
    leave_out: Callable[[str, str, str], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> list[Sample]:
    """Read a manifest and check every line and every audio file, so that a missing file does not stop a run later.

    `audio_filepath` is relative to the manifest's folder.

    Args:
        allow_outside: audio may lie outside the manifest's folder, also through a symbolic link. By default it may
            not, because a manifest from somebody else could name your private files.
        leave_out: called with the sample's id, its audio_filepath and the fault for each line whose audio file is
            missing, empty or unreadable; that line gives no sample. Without it such a line is an error.
        note: called with one sentence for each thing of other trainers' forms that is passed over or replaced, at the
            first line that has it. Without it the sentences are warnings.

    Raises:
        ManifestError: the manifest is missing, a folder, empty, binary, not UTF-8, or a line is no sample.
    """
    path = Path(path)
    samples: list[Sample] = []
    told: dict[str, str] = {}
    entries = 0

    def tell(place: str, about: str, sentence: str) -> None:
        if about not in told:
            told[about] = f"{shown(path)}:{place}: {sentence}"
            if note is not None:
                note(told[about])

    for place, entry in _entries(path):
        entries += 1
        try:
            row = entry if isinstance(entry, dict) else _parse(entry)
            row = {key: value for key, value in row.items() if value is not None}
            samples.append(_read_row(path, place, row, allow_outside, tell))
        except _AudioMissing as error:
            if leave_out is None:
                raise ManifestError(f"{shown(path)}:{place}: {error}") from None
            leave_out(f"{shown(path.name)}:{place}", error.name, error.fault)
        except (ManifestError, Refused) as error:
            raise ManifestError(f"{shown(path)}:{place}: {error}") from None
    for line in told.values() if note is None else ():
        warnings.warn(line, stacklevel=2)
    if not entries:
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


def _entries(path: Path) -> Iterator[tuple[str, bytes | dict[str, Any]]]:
    """The lines of a manifest that are not blank, or the objects of its array, each with its place in the file.

    Raises:
        ManifestError: the file cannot be read, is binary, or its array is damaged.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(65_536)
            _refuse_binary(path, head)
            _refuse_table(path, head)
            file.seek(0)
            if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                yield from _array(path, file)
                return
            for number, line in enumerate(file, start=1):
                if line.strip() not in (b"", b"\xef\xbb\xbf"):
                    yield str(number), line
    except FileNotFoundError:
        raise ManifestError(f"{shown(path)}: does not exist; name a manifest (.jsonl)") from None
    except IsADirectoryError:
        raise ManifestError(f"{shown(path)}: is a folder; name a manifest (.jsonl) in it") from None
    except OSError as error:
        raise ManifestError(f"{shown(path)}: cannot be read ({error.strerror}); name a readable manifest") from None


def _array(path: Path, file: BinaryIO) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file that is one JSON array. The second object on a line has the place "7, object 2"."""
    raw = file.read()
    at, line, on_line, previous = 0, 1, 0, 0

    def fault(sentence: str) -> ManifestError:
        return ManifestError(f"{shown(path)}:{line}: {sentence}")

    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise fault(f"byte {raw[error.start]:#04x} is not UTF-8; save the manifest as UTF-8 text") from None

    def skip(start: int) -> int:
        nonlocal line
        while start < len(text) and text[start] in " \t\r\n":
            line += text[start] == "\n"
            start += 1
        return start

    at = skip(skip(0) + 1)
    while text[at : at + 1] != "]":
        if at >= len(text):
            raise fault('the JSON array is cut off; it has to end with "]"')
        on_line = on_line + 1 if line == previous else 1
        previous = line
        try:
            row, end = _decoded(text, at)
        except ManifestError as error:
            raise fault(str(error)) from None
        yield str(line) if on_line == 1 else f"{line}, object {on_line}", row
        line += text.count("\n", at, end)
        at = skip(end)
        if text[at : at + 1] == ",":
            at = skip(at + 1)
            if text[at : at + 1] == "]":
                raise fault('a "," stands before the closing "]" of the array; remove it')
        elif text[at : at + 1] not in ("]", ""):
            raise fault(f"the objects of an array are divided by commas, but {_show(text[at : at + 20])} follows one")
    at = skip(at + 1)
    if at < len(text):
        raise fault(f"{_show(text[at : at + 20])} follows the end of the JSON array; write one array, or {NO_ARRAY}")


def _refuse_binary(path: Path, head: bytes) -> None:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ManifestError(f"{shown(path)}: is UTF-16 text; save it as UTF-8")
    for beginning, name in OTHER_FILES.items():
        if head.startswith(beginning):
            raise ManifestError(f"{shown(path)}: is {name}; {ONE_OBJECT_A_LINE}")
    if b"\0" in head:
        raise ManifestError(f"{shown(path)}: is a binary file (audio?); {ONE_OBJECT_A_LINE}")


def _refuse_table(path: Path, head: bytes) -> None:
    """Refuse CSV by its name: its ending says so, or its first line is a header that names a column of ours."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text or text.startswith((b"{", b"[")):
        return
    first = text.splitlines()[0].decode("utf-8", "replace")
    fields = [field.strip(" \"'").lower() for field in re.split(r"[,;|\t]", first)]
    header = len(fields) > 1 and any(field in KEYS or field in MEANS or field in CALLED for field in fields)
    if header or path.suffix.lower() in (".csv", ".tsv"):
        hint = 'write each row as a JSON object, {"audio_filepath": "…", "text": "…"}'
        raise ManifestError(f"{shown(path)}: is a table (CSV); {ONE_OBJECT_A_LINE}: {hint}")


def _read_row(
    path: Path, place: str, row: dict[str, Any], allow_outside: bool, tell: Callable[[str, str, str], None]
) -> Sample:
    try:
        row, chat, audio_key = to_own_form(row, lambda about, sentence: tell(place, about, sentence))
        _require(row)
        audio = row.pop("audio_filepath", None)
        if audio is not None:
            audio = _find_audio(audio_key, audio, path.parent, allow_outside)
        known = {key: row.pop(key) for key in KEYS if key in row}
        sample = Sample(id=f"{shown(path.name)}:{place}", audio=audio, chat=chat, extra=row, **known)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        fault = f"{key} = {_show(first['input'])}: {first['msg']}; {WANTED.get(key, 'write a string')}"
        raise ManifestError(fault) from None
    return sample if sample.answer is not None else sample.model_copy(update={"answer": sample.text})


def _parse(line: bytes) -> dict[str, Any]:
    """The object on a line.

    Raises:
        ManifestError: there is none, or more than one.
    """
    try:
        text = line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise ManifestError(f"byte {byte:#04x} is not UTF-8; save the manifest as UTF-8 text") from None
    if text.startswith("["):
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            raise ManifestError(f"begins a JSON array; {NO_ARRAY}") from None
        raise ManifestError(f"is a JSON array; {NO_ARRAY}")
    row, end = _decoded(text, 0)
    if text[end:].strip():
        raise ManifestError(f"is not JSON (Extra data at column {end + 1}); {ONE_OBJECT_A_LINE}")
    return row


def _decoded(text: str, at: int) -> tuple[dict[str, Any], int]:
    """The JSON object that begins at a character of `text`, and the character after it.

    Raises:
        ManifestError: there is none, it has a key twice, or it holds what is no text.
    """
    try:
        row, end = json.JSONDecoder(object_pairs_hook=_without_doubles).raw_decode(text, at)
        json.dumps(row, ensure_ascii=False).encode()  # the decoder accepts a lone surrogate, but no tokenizer does
    except UnicodeEncodeError:
        raise ManifestError("holds half of a surrogate pair (\\ud800 …); write the whole character") from None
    except RecursionError:
        raise ManifestError(f"is nested too deeply; {ONE_OBJECT_A_LINE}") from None
    except json.JSONDecodeError as error:
        raise ManifestError(f"is not JSON ({error.msg} at column {error.colno}); {ONE_OBJECT_A_LINE}") from None
    except ManifestError:
        raise
    except ValueError:
        raise ManifestError(f"is not JSON (a number is too long); {ONE_OBJECT_A_LINE}") from None
    if not isinstance(row, dict):
        raise ManifestError(f"is {_show(row)}, not a JSON object; {ONE_OBJECT_A_LINE}")
    return row, end


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        double = next(key for key in keys if keys.count(key) > 1)
        raise ManifestError(f"has the key {_show(double)} twice; keep one")
    return row


def _require(row: dict[str, Any]) -> None:
    """Refuse a row that lacks a key that its task needs, or that has a misspelt key."""
    task = row["task"]
    needed = ("audio_filepath", "text") if task == "transcribe" else ("prompt", "answer")
    missing = [key for key in needed if key not in row]
    known, cutoff = (READ_KEYS + KEYS, 0.7) if missing else ((*KEYS, *CHAT_KEYS, *AUDIO_KEYS, "source", "target"), 0.85)
    known = tuple(key for key in known if MEANS.get(key, key) not in row)  # what is given already is not meant
    others = (*KEYS, *PART_KEYS, "language", "source_len", "target_len")  # the last are SLAM-LLM's and FunASR's
    for key in (key for key in row if key not in others):
        nearest = difflib.get_close_matches(key.lower(), known, n=1, cutoff=cutoff)
        if isinstance(row[key], list | dict):
            nearest = [name for name in nearest if name in (*CHAT_KEYS, *AUDIO_KEYS, "history")]
        meant = CALLED.get(key.lower()) if missing else None
        if meant in missing:
            raise ManifestError(f'has the unknown key {_show(key)}; write "{meant}", or rename it')
        if meant in ("prompt", "answer") and "text" in missing:
            wanted = '"text" for what is said, or "task", "prompt" and "answer"'
            raise ManifestError(f"has the unknown key {_show(key)}, but no text; write {wanted}")
        if meant:
            continue
        if nearest and key not in READ_KEYS + KEYS:
            raise ManifestError(f'has the unknown key {_show(key)}; write "{nearest[0]}", or rename it')
    lists = [key for key, value in row.items() if missing and isinstance(value, list) and value]
    if lists and not row.keys() & set(KEYS) - {"task"} and all(isinstance(item, dict) for item in row[lists[0]]):
        raise ManifestError(f"holds a list under {_show(lists[0])}; write its objects one a line, or the list alone")
    if missing:
        found = _show(sorted(row.keys() - ({"task"} if task == "transcribe" else set())))
        raise ManifestError(f'lacks "{missing[0]}", which task {_show(task)} needs; add it to the keys {found}')
    for key in needed:
        spoken = key == "prompt" and "audio_filepath" in row  # a recording alone is a prompt, too
        if key != "text" and not spoken and isinstance(row[key], str) and not row[key].strip():
            raise ManifestError(f"{key} = {_show(row[key])} is empty; fill it in")


def _find_audio(key: str, name: Any, folder: Path, allow_outside: bool) -> Path:
    named = f"{key} {_show(name)}"
    if not isinstance(name, str):
        raise ManifestError(f"{named} is not a string; write a path relative to the manifest's folder")
    if "://" in name or name.startswith("data:"):
        raise ManifestError(f"{named} is an address, no path; save the recording and name its file")
    root = os.path.abspath(folder)
    audio = os.path.abspath(os.path.join(root, name))
    if not allow_outside:
        _refuse_outside(named, root, audio)
    try:
        status = os.stat(audio)
    except FileNotFoundError:
        raise _AudioMissing(key, name, "does not exist; correct the path, relative to the manifest's folder") from None
    except ValueError as error:  # a null byte
        raise ManifestError(f"{named} cannot be opened ({error}); name an audio file") from None
    except OSError as error:  # str(error) would repeat the path
        raise _AudioMissing(key, name, f"cannot be opened ({error.strerror}); name an audio file") from None
    if not stat.S_ISREG(status.st_mode):
        raise _AudioMissing(key, name, "is not a file; name an audio file")
    if status.st_size == 0:
        raise _AudioMissing(key, name, "is an empty file; record it again, or leave this line out")
    if not os.access(audio, os.R_OK):
        raise _AudioMissing(key, name, "is not readable; give yourself permission to read it")
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

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
import stat
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from soundwave.data.audio import shown
from soundwave.data.chats import Refused
from soundwave.data.chats import show as _show
from soundwave.data.forms import AUDIO_KEYS, CHAT_KEYS, PART_KEYS, READ_KEYS, to_own_form
from soundwave.data.members import split_member
from soundwave.data.readers import source_of
from soundwave.data.source import CALLED, KEYS, MEANS, ONE_OBJECT_A_LINE, ManifestError, Source, parse
from soundwave.model.chat import Turn

WANTED = {
    "offset": "give seconds from 0 up, or leave it out",
    "duration": "give seconds above 0, or leave it out",
}
PERMIT = "permit it: allow_outside=true (soundwave train, evaluate, report: --allow-outside)"
FOLDERS = 65_536  # whose real paths are remembered


class AudioMissing(ManifestError):
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

    `audio_filepath` is relative to the manifest's folder. Tables, folders and other things that are read as manifests
    are in `soundwave.data.readers`.

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
    source = source_of(path)
    samples: list[Sample] = []
    told: dict[str, str] = {}

    def tell(place: str, about: str, sentence: str) -> None:
        if about not in told:
            told[about] = f"{shown(source.path)}:{place}: {sentence}"
            if note is not None:
                note(told[about])

    read = EntryReader(source.path.name, source.root, allow_outside=allow_outside, tell=tell)
    entries = 0
    for place, entry in source.entries():
        entries += 1
        try:
            samples.append(read(place, entry))
        except AudioMissing as error:
            if leave_out is None:
                raise ManifestError(f"{shown(source.path)}:{place}: {error}") from None
            leave_out(read.id_of(place), error.name, error.fault)
        except (ManifestError, Refused) as error:
            raise ManifestError(f"{shown(source.path)}:{place}: {error}") from None
    for line in told.values() if note is None else ():
        warnings.warn(line, stacklevel=2)
    if not entries:
        raise empty(source)
    return samples


def empty(source: Source) -> ManifestError:
    return ManifestError(f"{shown(source.path)}: holds no samples; {ONE_OBJECT_A_LINE}")


class EntryReader:
    """Makes samples of the entries of one source, and looks at the audio files that they name.

    Args:
        name, root: the name of the source, and the folder that audio paths are relative to.
        allow_outside: as in `read_manifest`.
        tell: called with the place, what it is about, and a sentence for each thing that is passed over or replaced.
        look: refuse audio files that cannot be read. Without it only those outside the root are refused.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        *,
        allow_outside: bool,
        tell: Callable[[str, str, str], object],
        look: bool = True,
    ):
        self.root, self.allow_outside, self.tell, self.look = os.path.abspath(root), allow_outside, tell, look
        self._name = shown(name)
        self._real_folder = lru_cache(FOLDERS)(os.path.realpath)

    def __call__(self, place: str, entry: bytes | dict[str, Any] | Refused) -> Sample:
        """The sample of one entry.

        Raises:
            AudioMissing: its audio file is missing, empty or unreadable.
            ManifestError, Refused: it is no sample. The message has neither file nor place.
        """
        if isinstance(entry, Refused):
            raise entry
        row = parse(entry) if isinstance(entry, bytes) else entry
        row = {key: value for key, value in row.items() if value is not None}
        try:
            row, chat, audio_key = to_own_form(row, lambda about, sentence: self.tell(place, about, sentence))
            _require(row)
            audio = row.pop("audio_filepath", None)
            if audio is not None:
                audio = self._find_audio(audio_key, audio)
            known = {key: row.pop(key) for key in KEYS if key in row}
            known.setdefault("answer", known.get("text"))
            return Sample(id=self.id_of(place), audio=audio, chat=chat, extra=row, **known)
        except ValidationError as error:
            first = error.errors()[0]
            key = str(first["loc"][0])
            fault = f"{key} = {_show(first['input'])}: {first['msg']}; {WANTED.get(key, 'write a string')}"
            raise ManifestError(fault) from None

    def plain(self, place: str, row: dict[str, Any], audio: Path | None = None) -> Sample:
        """The sample of a row that says all in our own keys, in a third of the time: what a row means is not asked.

        Args:
            audio: its file, if that is known; it is looked for like that of any other row otherwise.

        Raises:
            ManifestError, ValidationError: the audio file leads out of the root, or the row is no sample.
        """
        row = {key: value for key, value in row.items() if value is not None}
        name = row.pop("audio_filepath", None)
        if audio is None and name is not None:
            audio = self._find_audio("audio_filepath", name)
        known = {key: row.pop(key) for key in KEYS if key in row}
        known.setdefault("answer", known.get("text"))
        return Sample(id=self.id_of(place), audio=audio, extra=row, **known)

    def id_of(self, place: str) -> str:
        """The id of the sample at a place."""
        return f"{self._name}:{place}"

    def _find_audio(self, key: str, name: Any) -> Path:
        if not isinstance(name, str):
            raise ManifestError(f"{key} {_show(name)} is not a string; write a path relative to the manifest's folder")
        if "://" in name or name.startswith("data:"):
            raise ManifestError(f"{key} {_show(name)} is an address, no path; save the recording and name its file")
        file, inside = split_member(name)
        audio = os.path.abspath(os.path.join(self.root, file))
        fault: Exception | None = None
        try:
            status = os.lstat(audio)
        except (OSError, ValueError) as error:  # ValueError: a null byte
            status, fault = None, error
        is_link = status is None or stat.S_ISLNK(status.st_mode)
        if not self.allow_outside:
            self._refuse_outside(key, name, audio, is_link)
        if not self.look:
            return Path(audio + inside)
        try:
            if fault is not None:
                raise fault
            status = os.stat(audio) if is_link else status
        except FileNotFoundError:
            fault_of = "does not exist; correct the path, relative to the manifest's folder"
            raise AudioMissing(key, name, fault_of) from None
        except ValueError as error:
            raise ManifestError(f"{key} {_show(name)} cannot be opened ({error}); name an audio file") from None
        except OSError as error:  # str(error) would repeat the path
            raise AudioMissing(key, name, f"cannot be opened ({error.strerror}); name an audio file") from None
        if not stat.S_ISREG(status.st_mode):
            raise AudioMissing(key, name, "is not a file; name an audio file")
        if status.st_size == 0:
            raise AudioMissing(key, name, "is an empty file; record it again, or leave this line out")
        if not os.access(audio, os.R_OK):
            raise AudioMissing(key, name, "is not readable; give yourself permission to read it")
        return Path(audio + inside)

    def _refuse_outside(self, key: str, name: str, audio: str, is_link: bool) -> None:
        """Refuse a path out of the root. The real path of a folder is found once for all files in it."""
        if not _is_inside(audio, self.root):
            raise ManifestError(f"{key} {_show(name)} leads out of the manifest's folder; move it in, or {PERMIT}")
        try:
            folder, file = os.path.split(audio)
            real = os.path.realpath(audio) if is_link else os.path.join(self._real_folder(folder), file)
            real_root = self._real_folder(self.root)
        except (OSError, ValueError):  # what cannot be followed cannot be opened either, which is refused later
            return
        if not _is_inside(real, real_root):
            raise ManifestError(
                f"{key} {_show(name)} is a symbolic link out of the manifest's folder, to {_show(real)}; copy the "
                f"file, or {PERMIT}"
            )


def _is_inside(path: str, folder: str) -> bool:
    return path.startswith(folder + os.sep) or os.path.commonpath([folder, path]) == folder


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


def _require(row: dict[str, Any]) -> None:
    """Refuse a row that lacks a key that its task needs, or that has a misspelt key."""
    task = row["task"]
    needed = ("audio_filepath", "text") if task == "transcribe" else ("prompt", "answer")
    missing = [key for key in needed if key not in row]
    others = (*KEYS, *PART_KEYS, "language", "source_len", "target_len")  # the last are SLAM-LLM's and FunASR's
    for key in (key for key in row if key not in others):
        nearest = _nearest(key, tuple(row), bool(missing))
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


@lru_cache(512)  # the same keys come in every line
def _nearest(key: str, given: tuple[str, ...], lacks: bool) -> list[str]:
    """What a key may be a misspelling of, in a row that has the keys `given`, and may lack one that it needs."""
    known, cutoff = (READ_KEYS + KEYS, 0.7) if lacks else ((*KEYS, *CHAT_KEYS, *AUDIO_KEYS, "source", "target"), 0.85)
    known = tuple(name for name in known if MEANS.get(name, name) not in given)  # what is given already is not meant
    return difflib.get_close_matches(key.lower(), known, n=1, cutoff=cutoff)

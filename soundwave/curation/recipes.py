"""Recipes and phrasings of `soundwave data build`: YAML files with a schema, in which an unknown key is an error."""

import difflib
import re
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from soundwave.data.audio import LONGEST_SECONDS, shown
from soundwave.data.yaml_text import read_yaml

LONGEST = 10_000  # phrasings that a pattern may give
NAMES = {"answer", "nth", "number", "options", "text"}  # what may stand in braces in a phrasing
Format = Literal["direct", "choice", "natural", "transcribe"]
FORMATS: tuple[Format, ...] = get_args(Format)
Model = TypeVar("Model", bound="_Strict")


class RecipeError(ValueError):
    """A recipe that cannot be used. The message is one line: file, place, what was found, how to mend it."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _in_order(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"{pair[0]:g} is more than {pair[1]:g}; write the smaller one first")
    return pair


def _some_weight(weights: dict[str, float]) -> dict[str, float]:
    if not sum(weights.values()) > 0:
        raise ValueError("one of the weights must be above 0")
    return weights


def _a_word_each(token: object) -> object:
    """The words of a mapping, before its values are read as texts: YAML makes booleans and numbers of some words."""
    if isinstance(token, dict):
        for label, word in token.items():
            if not isinstance(label, str) or not isinstance(word, str):
                raise ValueError(f"{label!r}: {word!r} is no text; put both between quotation marks")
            if "{" in word:
                raise ValueError(f"{label!r}: {word!r} has braces; write the word itself")
        if len(set(token.values())) < len(token):
            raise ValueError("two sounds have the same word; CTC could not tell them apart")
    elif not isinstance(token, str):
        raise ValueError(f"{token!r} is no text; write one, or a word for each label")
    return token


def _label_alone(token: str | dict[str, str]) -> str | dict[str, str]:
    if isinstance(token, str):
        for name in re.findall(r"\{([^{}]*)\}", token):
            if name != "label":
                raise ValueError(f"{token!r} has {{{name}}}; what may stand in braces is label")
    for text in [token] if isinstance(token, str) else token.values():
        if not text.strip():
            raise ValueError(f"{text!r} is blank; write what CTC shall write for the sound")
    return token


Positive = Annotated[int, Field(ge=1)]
Token = Annotated[str | dict[str, str], BeforeValidator(_a_word_each), AfterValidator(_label_alone)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Level = Annotated[float, Field(ge=-60, le=60)]
Formats = Annotated[dict[Format, Weight], AfterValidator(_some_weight)]
Clips = Annotated[tuple[Positive, Positive], AfterValidator(_in_order)]
Speed = Annotated[float, Field(ge=0.5, le=2, allow_inf_nan=False)]
Speeds = Annotated[tuple[Speed, Speed], AfterValidator(_in_order)]


class SourceOf(_Strict):
    """A manifest that recordings are taken from, and which of its lines.

    Attributes:
        manifest: anything that the commands read; relative to the recipe.
        label: the key that says what is heard, where that is no speech; it need not have a transcript then.
        speaker: the key of the speaker.
        where: only lines with this value, or one of these values, under each key.
        allow_outside: recordings may lie outside the manifest's folder.
    """

    manifest: str
    label: str | None = None
    speaker: str = "speaker"
    where: dict[str, Any] = {}
    allow_outside: bool = False


class _Task(_Strict):
    source: str
    count: Positive
    formats: Formats = {"direct": 1.0}
    options: Annotated[int, Field(ge=2, le=26)] = 4
    answer_with: Literal["text", "letter", "both"] = "both"
    tail: Annotated[float, Field(ge=0, le=5)] = 0.0
    max_seconds: Annotated[float, Field(gt=0, le=LONGEST_SECONDS)] = LONGEST_SECONDS


class Strings(_Task):
    """Clips of one speaker spliced into one, to be transcribed."""

    kind: Literal["strings"]
    clips: Clips = (1, 8)


class Speakers(_Task):
    """Several speakers spliced into one clip, each with some clips.

    Attributes:
        speakers: from how many to how many.
        clips: of each of them.
        ask: weights of the questions: what each of them says, what one of them says, how many there are, all words.
    """

    kind: Literal["speakers"]
    speakers: Annotated[tuple[Annotated[int, Field(ge=2)], Positive], AfterValidator(_in_order)] = (2, 3)
    clips: Clips = (1, 1)
    ask: Annotated[dict[Literal["said", "turn", "speakers", "transcribe"], Weight], AfterValidator(_some_weight)] = {
        "said": 1.0
    }


class Sound(_Task):
    """A sound between two utterances of one speaker.

    Attributes:
        sounds: the source of the sounds, which has a `label`.
        seconds: of a longer sound the part with the most energy is taken.
        level: dB of the sound above the speech, from and to.
        token: what CTC writes for the sound; `{label}` stands for its label. Or a word for each label.
        token_at: where CTC writes it: between the words, as the sound is heard, or at their end.
        ask: weights of the questions: the words, and what the sound is.
        speed: how many times as fast the sound is played, drawn from and to; its pitch changes with it.
    """

    kind: Literal["sound"]
    sounds: str
    clips: Clips = (1, 1)
    seconds: Annotated[float, Field(gt=0, le=20)] = 3.0
    level: Annotated[tuple[Level, Level], AfterValidator(_in_order)] = (-10.0, 0.0)
    token: Token = "<sound>"
    token_at: Literal["between", "end"] = "between"
    ask: Annotated[dict[Literal["transcribe", "sound"], Weight], AfterValidator(_some_weight)] = {
        "transcribe": 1.0,
        "sound": 1.0,
    }
    speed: Speeds = (1.0, 1.0)


class Question(_Task):
    """A question about each recording, whose answer is under a key of its line.

    Attributes:
        task: name of the task, and of its phrasings.
        answer: the key; of a source with a `label` that by default, else the transcript.
        choices: the options to choose wrong ones from; by default all answers of the source.
        count: how many; by default each line `times` times. More than there are lines take them several times.
        times: how often each line is taken, where `count` does not say it.
        token: what CTC writes for a recording of a source with a `label`, as in `Sound`.
        speed: how many times as fast a recording is played, drawn from and to; its pitch changes with it.
    """

    kind: Literal["question"]
    count: Positive | None = None  # type: ignore[assignment]
    times: Positive = 1
    task: Annotated[str, Field(min_length=1)]
    answer: str | None = None
    choices: list[str] | None = None
    token: Token | None = None
    speed: Speeds = (1.0, 1.0)


Task = Annotated[Strings | Speakers | Sound | Question, Field(discriminator="kind")]


class Recipe(_Strict):
    """What is built of which sources. Paths are relative to the recipe's folder."""

    sources: Annotated[dict[str, SourceOf], Field(min_length=1)]
    tasks: Annotated[list[Task], Field(min_length=1)]
    phrasings: str
    seed: Annotated[int, Field(ge=0)] = 0
    audio: Literal["flac", "wav"] = "flac"

    @model_validator(mode="after")
    def _sources_are_there(self) -> "Recipe":
        for number, task in enumerate(self.tasks):
            for name in (task.source, *([task.sounds] if isinstance(task, Sound) else [])):
                if name not in self.sources:
                    known = ", ".join(self.sources)
                    raise ValueError(f"tasks[{number}] takes from {name!r}, but the sources are {known}")
            if isinstance(task, Sound) and self.sources[task.sounds].label is None:
                raise ValueError(
                    f"tasks[{number}]: sounds = {task.sounds!r} has no label; say which key names its sound"
                )
            if isinstance(task, Question) and task.token is not None and self.sources[task.source].label is None:
                raise ValueError(
                    f"tasks[{number}]: token = {task.token!r}, but CTC learns the transcripts of {task.source!r}, "
                    "which has no label; leave token out"
                )
        return self


def _combined(value: Any) -> Any:
    """All phrasings of a pattern, whose `{}` stand for one of the words each."""
    if not isinstance(value, list):
        return value
    found: list[Any] = []
    for each in value:
        if isinstance(each, dict):
            found += _phrasings(_Pattern.model_validate(each))
        else:
            found.append(each)
    return found


class _Pattern(_Strict):
    pattern: str
    words: list[list[str]]


def _phrasings(pattern: _Pattern) -> Iterator[str]:
    pieces = pattern.pattern.split("{}")
    if len(pieces) != len(pattern.words) + 1:
        raise ValueError(
            f"pattern {pattern.pattern!r} has {len(pieces) - 1} times {{}}, but {len(pattern.words)} words"
        )
    count = 1
    for words in pattern.words:
        count *= len(words)
    if count > LONGEST:
        raise ValueError(f"pattern {pattern.pattern!r} gives {count} phrasings, more than {LONGEST}")
    for words in product(*pattern.words):
        yield pieces[0] + "".join(word + piece for word, piece in zip(words, pieces[1:], strict=True))


def _named(phrasings: Sequence[str]) -> Sequence[str]:
    for phrasing in phrasings:
        for name in re.findall(r"\{([^{}]*)\}", phrasing):
            if name not in NAMES:
                raise ValueError(f"{phrasing!r} has {{{name}}}; what may stand in braces is {', '.join(sorted(NAMES))}")
        if not phrasing.strip() and phrasing:
            raise ValueError(f"{phrasing!r} is blank; write a phrasing, or nothing at all between quotation marks")
    return phrasings


Phrases = Annotated[list[str], Field(min_length=1), BeforeValidator(_combined), AfterValidator(_named)]


class TaskPhrasings(_Strict):
    """How a task is asked for, and how a sentence answers it."""

    prompts: Phrases
    natural: Phrases | None = None


class Phrasings(_Strict):
    """All phrasings.

    Attributes:
        tasks: those of each task.
        formats: what a prompt adds to say which format of the answer it wants.
        ordinals, numbers: words for the first, the second … speaker, and for one, two … of them.
    """

    tasks: Annotated[dict[str, TaskPhrasings], Field(min_length=1)]
    formats: dict[Format, Phrases] = {}
    ordinals: list[str] = ["first", "second", "third", "fourth", "fifth", "sixth"]
    numbers: list[str] = ["one", "two", "three", "four", "five", "six"]


def fill(phrasing: str, **values: str) -> str:
    """A phrasing with values for the names in braces. What a value holds in braces stays as it is."""
    return re.sub(r"\{([^{}]*)\}", lambda match: values.get(match[1], match[0]), phrasing)


def load_recipe(path: str | Path) -> tuple[Recipe, Phrasings]:
    """The recipe of a YAML file, and the phrasings that it names.

    Raises:
        RecipeError: a file cannot be read, or it has an unknown, missing or impossible value.
    """
    path = Path(path)
    recipe = _load(path, Recipe)
    return recipe, _load(path.parent / recipe.phrasings, Phrasings)


def _load(path: Path, kind: type[Model]) -> Model:
    try:
        loaded = read_yaml(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise RecipeError(f"{shown(path)}: cannot be read ({error.strerror}); name a YAML file") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{shown(path)}: is not UTF-8 text; name a YAML file") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"{shown(path)}: is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(loaded, dict):
        what = "is empty" if loaded is None else f"holds a {type(loaded).__name__}"
        raise RecipeError(f"{shown(path)}: {what}; write one `key: value` a line ({', '.join(kind.model_fields)})")
    try:
        return kind.model_validate(loaded)
    except ValidationError as error:
        raise RecipeError(f"{shown(path)}: {_fault(error, loaded, kind)}") from None
    except RecursionError:
        raise RecipeError(f"{shown(path)}: is nested too deeply") from None


def _fault(error: ValidationError, loaded: dict[Any, Any], kind: type[BaseModel]) -> str:
    """The first thing that is wrong, as one line."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part not in ("strings", "speakers", "sound", "question"))
    if first["type"] == "extra_forbidden":
        known = _keys_at(kind, first["loc"], loaded)
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here are {', '.join(known)}" if known else "remove it"
        return f"unknown key {place!r}; {hint}"
    if first["type"] == "missing":
        return f"lacks {place!r}; add it"
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return f"{place}: give its kind: strings, speakers, sound or question"
    found = "" if isinstance(first["input"], dict | BaseModel) else f" = {str(first['input'])[:80]!r}"
    message = first["msg"].removeprefix("Value error, ")
    return " ".join(f"{place}{found}: {message}".lstrip(": ").split())


def _keys_at(kind: type[BaseModel], place: tuple[Any, ...], loaded: Any) -> list[str]:
    """The keys that are known where an unknown one stands."""
    if len(place) == 1:
        return list(kind.model_fields)
    inner: dict[str, type[BaseModel]] = {
        "strings": Strings, "speakers": Speakers, "sound": Sound, "question": Question
    }  # fmt: skip
    if place[0] == "tasks" and len(place) == 4 and place[2] in inner:
        return [*inner[place[2]].model_fields]
    if place[0] == "sources" and len(place) == 3:
        return [*SourceOf.model_fields]
    return [*TaskPhrasings.model_fields] if kind is Phrasings and place[0] == "tasks" and len(place) == 3 else []


def token_of(token: str | dict[str, str], label: str) -> str:
    """What CTC writes for a sound; a recipe's `token`."""
    return fill(token, label=label) if isinstance(token, str) else token[label]

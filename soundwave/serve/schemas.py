"""The bodies of chats, and the parameters of OpenAI's that this server does not know.

A parameter that would change the answer and cannot be honoured is refused; null is as good as no parameter.
"""

import base64
import binascii
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from soundwave.model.chat import Turn
from soundwave.serve.errors import ApiError

# OpenAI names wav and mp3; what the recording is, its own first bytes tell.
InputFormat = Literal["wav", "mp3", "flac", "ogg", "opus", "webm", "m4a", "mp4", "aac"]
# Values that change nothing, because decoding is greedy and nothing is stored, of parameters that are refused else.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "stop": ([], ""),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "reasoning_effort": ("none",),
}
# Parameters without an influence on a greedy answer.
HARMLESS = {
    "seed", "top_p", "top_k", "min_p", "user", "metadata", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "parallel_tool_calls",
}  # fmt: skip


class _Body(BaseModel):
    @model_validator(mode="before")
    @classmethod
    def without_null(cls, given: Any) -> Any:
        """Null is as good as no parameter."""
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


class TextPart(_Body):
    """Text of a turn."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class InputAudio(_Body):
    """A recording of at most 30 s, as base64."""

    model_config = ConfigDict(extra="forbid")
    data: str
    format: InputFormat


class AudioPart(_Body):
    """A recording in a turn."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["input_audio"]
    input_audio: InputAudio


class Message(_Body):
    """A turn of a chat. A tool's are not taken."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Annotated[TextPart | AudioPart, Field(discriminator="type")]], Field(min_length=1)]


class StreamOptions(_Body):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class ChatRequest(_Body):
    """A chat, of which one turn may hold a recording."""

    model_config = ConfigDict(extra="allow")
    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0


def check_parameters(chat: ChatRequest) -> None:
    """ApiError: a parameter that cannot be honoured."""
    check_temperature(chat.temperature)
    if chat.stream_options is not None and not chat.stream:
        raise ApiError(400, "stream_options is for stream=true only; leave it out", param="stream_options")
    for name, value in (chat.model_extra or {}).items():
        if value is None or name in HARMLESS or value in NEUTRAL.get(name, ()):
            continue
        shown = str(value) if len(str(value)) <= 60 else f"{str(value)[:60]}…"
        known = "is not supported" if name in NEUTRAL else "is not known"
        only = f"; only {NEUTRAL[name][0]!r} is" if name in NEUTRAL and NEUTRAL[name][0] not in ([], {}) else ""
        code = "unsupported_parameter" if name in NEUTRAL else "unknown_parameter"
        raise ApiError(400, f"{name[:60]} = {shown} {known}{only}; leave it out", param=name[:60], code=code)


def check_temperature(temperature: float) -> None:
    """ApiError: text would be sampled."""
    if temperature != 0:
        raise ApiError(
            400,
            f"temperature = {temperature:g} is not supported: decoding is greedy; leave it out, or give 0",
            param="temperature",
            code="unsupported_value",
        )


def read_messages(messages: list[Message]) -> tuple[list[Turn], bytes | None]:
    """The turns of a chat, and its recording.

    Raises:
        ApiError: two recordings, one in another's turn than the user's, broken base64, or no text at all.
    """
    turns: list[Turn] = []
    audio: bytes | None = None
    for number, message in enumerate(messages):
        place, texts = None, []
        for part in (
            [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        ):
            if isinstance(part, TextPart):
                texts.append(part.text)
                continue
            where = f"messages[{number}]"
            if audio is not None:
                raise ApiError(400, f"{where} holds a second recording, but a chat has one; send it alone", param=where)
            if message.role != "user":
                raise ApiError(400, f"{where} holds a recording, but only a user's turn may", param=where)
            audio, place = _decode(part.input_audio.data, where), len("\n".join(texts))
        role = "system" if message.role == "developer" else message.role
        turns.append(Turn(role, "\n".join(texts), place))
    if audio is None and not any(turn.content.strip() for turn in turns):
        raise ApiError(400, "messages hold neither text nor a recording", param="messages")
    return turns, audio


def _decode(data: str, where: str) -> bytes:
    """The bytes of a recording in base64, with or without `data:…;base64,` before it."""
    if data.startswith("data:"):
        data = data.partition(",")[2]
    try:
        audio = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{where}: data is not base64 ({error})", param=where, code="bad_base64") from None
    if not audio:
        raise ApiError(400, f"{where}: the recording is empty; send its bytes as base64", param=where, code="bad_audio")
    return audio


class ErrorDetail(BaseModel):
    """What is wrong, and with which parameter."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error as OpenAI writes it."""

    error: ErrorDetail


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "soundwave"


class Models(BaseModel):
    """All models that are served: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """Whether the server answers, and what it has to do."""

    status: Literal["ok", "stopping"]
    model: str
    needs_key: bool
    answers_questions: bool
    open_requests: int
    waiting_windows: int

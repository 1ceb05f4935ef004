"""The endpoints: OpenAI's transcriptions, chats and models, and health, metrics and a page to try it."""

import asyncio
import json
import math
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, File, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from soundwave.inference.formats import render, verbose
from soundwave.serve.batches import Done, Engine, Event, Failed, Job, Text
from soundwave.serve.errors import ApiError
from soundwave.serve.gate import Gate
from soundwave.serve.metrics import Metrics
from soundwave.serve.schemas import (
    ChatRequest,
    ErrorBody,
    Health,
    Model,
    Models,
    check_parameters,
    check_temperature,
    read_messages,
)
from soundwave.serve.settings import Limits

Format = Literal["json", "text", "verbose_json", "srt", "vtt"]
Granularity = Literal["word", "segment"]
FIELDS = {
    "file", "model", "language", "prompt", "response_format", "timestamp_granularities", "timestamp_granularities[]",
    "temperature", "stream",
}  # fmt: skip
DEFAULT_TOKENS = 256  # longest answer in a chat that does not tell
# Every status that an endpoint may answer with besides 200, for the OpenAPI description.
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": what}
    for status, what in {
        400: "a parameter or the recording cannot be used",
        401: "the API key is missing or wrong",
        404: "there is no such model",
        408: "the upload took too long",
        413: "the upload is too large",
        429: "the queue is full, or the client sends too many requests",
        500: "an error of the server",
        503: "the server is shutting down, or out of memory",
        504: "the answer took too long",
    }.items()
}


def create_app(
    engine: Engine,
    metrics: Metrics,
    *,
    name: str,
    limits: Limits,
    keys: Sequence[str] = (),
    languages: Sequence[str] = (),
    audio_first: bool = True,
    version: str = "0",
) -> FastAPI:
    """The app.

    Args:
        engine: answers the requests; it is started and closed with the app.
        name: what the model is called.
        keys: a client must send one of them; none is wanted if there are none.
        languages: codes of the languages that the model knows, such as "en"; any is taken if there are none.
        audio_first: a chat's recording is put before the words of its turn, as in training; else it stays where it is.
        version: the server's, for the OpenAPI description.
    """
    created = int(time.time())
    folder = Path(tempfile.mkdtemp(prefix="soundwave-serve-"))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await run_in_threadpool(engine.close)
            shutil.rmtree(folder, ignore_errors=True)

    # Swagger's and ReDoc's pages would load scripts from elsewhere.
    app = FastAPI(
        title="Soundwave",
        version=version,
        description="Transcribes speech and answers questions about it, in OpenAI's protocol.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    gate: dict[str, Any] = {
        "limits": limits,
        "keys": keys,
        "retry_after": lambda: min(max(math.ceil(engine.seconds_per_request), 1), 60),
        "on_end": metrics.on_request,
    }
    app.add_middleware(Gate, **gate)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientLeft, _left)
    app.add_exception_handler(Exception, _broken)

    def check_model(asked: str) -> None:
        if asked != name:
            shown = repr(asked[:100])
            raise ApiError(
                404, f"there is no model {shown} here; ask for {name!r}", param="model", code="model_not_found"
            )

    @app.get("/v1/models", responses={status: ERRORS[status] for status in (401, 429)})
    async def models() -> Models:
        """The model that is served."""
        return Models(data=[Model(id=name, created=created)])

    @app.get("/v1/models/{model:path}", responses={status: ERRORS[status] for status in (401, 404, 429)})
    async def model(model: str) -> Model:
        """The model of a name."""
        check_model(model)
        return Model(id=name, created=created)

    @app.post(
        "/v1/audio/transcriptions",
        responses={
            **ERRORS,
            200: {
                "description": "The transcript in the format that was asked for, or its parts as events.",
                "content": {kind: {} for kind in ("text/plain", "text/vtt", "text/event-stream")},
            },
        },
    )
    async def transcriptions(
        request: Request,
        file: Annotated[UploadFile, File(description="A recording of any usual format.")],
        model: Annotated[str, Form(description="The model's name, as /v1/models tells it.")],
        language: Annotated[str, Form(description="Code of the language, such as en. It is not needed.")] = "",
        prompt: Annotated[str, Form(description="Is not used, which the answer says.")] = "",
        response_format: Annotated[Format, Form()] = "json",
        timestamp_granularities: Annotated[
            list[Granularity] | None,
            Form(alias="timestamp_granularities[]", description="For verbose_json; segment if none is given."),
        ] = None,
        temperature: Annotated[float, Form(ge=0, le=1, description="Only 0: decoding is greedy.")] = 0.0,
        stream: Annotated[bool, Form(description="Events as the windows of at most 30 s are read.")] = False,
    ) -> Response:
        """Write down what is said in a recording."""
        form = await request.form()
        if unknown := sorted(set(form) - FIELDS):
            raise ApiError(
                400, f"{unknown[0][:60]!r} is not known; leave it out", param=unknown[0][:60], code="unknown_parameter"
            )
        for field in sorted(FIELDS - {"timestamp_granularities", "timestamp_granularities[]"}):
            if len(form.getlist(field)) > 1:
                raise ApiError(400, f"{field} is given more than once", param=field)
        granularities = set(timestamp_granularities or ())
        for other in form.getlist("timestamp_granularities"):  # clients that do not write the brackets
            if other not in ("word", "segment"):
                raise ApiError(400, "timestamp_granularities is word or segment", param="timestamp_granularities")
            granularities.add(str(other))
        check_model(model)
        check_temperature(temperature)
        notes: list[str] = []
        code = _check_language(language, languages) if language else None
        if code and len(languages) != 1:
            notes.append("language is not used: the model writes the language that it hears")
        if prompt:
            notes.append("prompt is not used: the model reads each recording without context")
        if granularities and response_format != "verbose_json":
            raise ApiError(
                400,
                f"timestamp_granularities is for response_format=verbose_json, not for {response_format}",
                param="timestamp_granularities",
            )
        if stream and response_format not in ("json", "text"):
            raise ApiError(
                400, f"stream=true gives text only, not {response_format}; leave one of them out", param="stream"
            )
        timestamps = None if response_format in ("json", "text") else "segment"
        timestamps = "word" if "word" in granularities else timestamps
        async with AsyncExitStack() as stack:
            path = await stack.enter_async_context(_saved(folder, file))
            answer = Answer(request, engine, limits.timeout)
            first = await answer.begin(Job(answer.tell, path, timestamps=timestamps, streams=stream))
            if stream:
                return EventResponse(answer, _transcript_events(answer, first), stack.pop_all(), _headers(notes))
            done = await answer.end(first)
        if done.cut_off:
            notes.append("the text of a window was cut off at the longest that this server writes")
        transcript, headers = done.transcript, _headers(notes)
        if response_format in ("text", "srt"):
            return PlainTextResponse(render(transcript, response_format), headers=headers)
        if response_format == "vtt":
            return Response(render(transcript, "vtt"), headers=headers, media_type="text/vtt")
        found: dict[str, Any] = {"text": transcript.text}
        if response_format == "verbose_json":
            found = verbose(transcript, code or (languages[0] if len(languages) == 1 else None))
            if granularities == {"word"}:
                del found["segments"]
        found["usage"] = {"type": "duration", "seconds": math.ceil(transcript.seconds)}
        if notes:
            found["notes"] = notes
        return JSONResponse(found, headers=headers)

    @app.post(
        "/v1/chat/completions",
        responses={
            **ERRORS,
            200: {
                "description": "OpenAI's chat.completion, or its parts as events.",
                "content": {"text/event-stream": {}},
            },
        },
    )
    async def chat_completions(request: Request, chat: ChatRequest) -> Response:
        """Answer a chat, of which one turn may hold a recording of at most 30 s."""
        check_model(chat.model)
        check_parameters(chat)
        if not engine.answers:
            raise ApiError(
                400,
                "the model has seen stage 1 only and cannot answer; transcribe with /v1/audio/transcriptions",
                param="model",
            )
        tokens = chat.max_completion_tokens or chat.max_tokens or min(DEFAULT_TOKENS, limits.max_new_tokens)
        if tokens > limits.max_new_tokens:
            param = "max_completion_tokens" if chat.max_completion_tokens else "max_tokens"
            raise ApiError(
                400, f"{param} = {tokens}, but this server writes {limits.max_new_tokens} at most", param=param
            )
        turns, audio = read_messages(chat.messages)
        if audio_first:
            turns = [turn if turn.audio_at is None else turn._replace(audio_at=0) for turn in turns]
        chat.messages.clear()  # the recording as base64
        async with AsyncExitStack() as stack:
            path = await stack.enter_async_context(_saved(folder, audio))
            answer = Answer(request, engine, limits.timeout)
            first = await answer.begin(Job(answer.tell, path, turns, tokens, streams=chat.stream))
            head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
            if chat.stream:
                usage = chat.stream_options is not None and chat.stream_options.include_usage
                return EventResponse(answer, _chat_events(answer, first, head, usage), stack.pop_all())
            done = await answer.end(first)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": done.transcript.text, "refusal": None},
            "logprobs": None,
            "finish_reason": "length" if done.cut_off else "stop",
        }
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": _usage(done)})

    @app.get("/health", responses={503: {"model": Health, "description": "the server does not answer any more"}})
    async def health(response: Response) -> Health:
        """Whether the server answers."""
        running = engine.is_running
        response.status_code = 200 if running else 503
        jobs, windows = engine.load
        return Health(
            status="ok" if running else "stopping",
            model=name,
            needs_key=bool(keys),
            answers_questions=engine.answers,
            open_requests=jobs,
            waiting_windows=windows,
        )

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Counts and times, for Prometheus."""
        metrics.set_load(*engine.load)
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    describe = app.openapi

    def described() -> dict[str, Any]:
        """The OpenAPI description, which tells the one value that the parameter `model` may have."""
        if app.openapi_schema is None:
            for schema in describe()["components"]["schemas"].values():
                if "model" in schema.get("required", ()) and "model" in schema["properties"]:
                    schema["properties"]["model"]["enum"] = [name]
        return describe()

    app.openapi = described  # type: ignore[method-assign]

    page = (Path(__file__).parent / "page.html").read_text("utf-8")

    @app.get("/", response_class=HTMLResponse)
    async def index() -> HTMLResponse:
        """A page to try it with a microphone or a file."""
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
        return HTMLResponse(page, headers={"content-security-policy": f"{policy}media-src blob:; img-src data:"})

    return app


class Answer:
    """What comes of a request, on the server's loop; the engine's threads tell it."""

    def __init__(self, request: Request, engine: Engine, timeout: float):
        self.request, self.engine, self.timeout = request, engine, timeout
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.deadline = self.loop.time() + timeout
        self.job: Job | None = None

    def tell(self, event: Event) -> None:
        """Called from the engine's threads."""
        with suppress(RuntimeError):  # the loop is closed: the process ends
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    async def begin(self, job: Job) -> Text | Done:
        """Send a request to the engine and wait for the first event.

        Raises:
            ApiError: it has failed. ClientLeft: nobody waits for it.
        """
        self.job = job
        self.engine.submit(job)
        return await self.next(watch=True)

    async def next(self, watch: bool = False) -> Text | Done:
        """The next event; with `watch` it is noticed if the client leaves."""
        waits = [asyncio.ensure_future(self.events.get())]
        if watch:
            waits.append(asyncio.ensure_future(_disconnected(self.request)))
        try:
            left = max(self.deadline - self.loop.time(), 0)
            await asyncio.wait(waits, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not waits[0].done():
                self.cancel()
                if watch and waits[1].done():
                    raise ClientLeft
                raise ApiError(504, f"the answer took more than {self.timeout:g} s; send less", code="timeout")
            event = waits[0].result()
        except asyncio.CancelledError:
            self.cancel()
            raise
        finally:
            for wait in waits:
                wait.cancel()
        if isinstance(event, Failed):
            raise event.error
        return event

    async def end(self, first: Text | Done) -> Done:
        """The last event."""
        while not isinstance(first, Done):
            first = await self.next(watch=True)
        return first

    def cancel(self) -> None:
        """Nobody waits any more."""
        if self.job is not None:
            self.engine.cancel(self.job)


class EventResponse(StreamingResponse):
    """Server-sent events. An error after the first one is an event, too.

    Args:
        answer: is cancelled if the client leaves.
        stack: what the answer needs until its end.
    """

    def __init__(
        self,
        answer: Answer,
        events: AsyncIterator[dict[str, Any] | str],
        stack: AsyncExitStack,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(_event_lines(events), media_type="text/event-stream", headers=headers)
        self.answer, self.stack = answer, stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI call."""
        async with self.stack:
            try:
                await super().__call__(scope, receive, send)
            finally:
                self.answer.cancel()


class ClientLeft(Exception):
    """The client has closed its connection."""


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _event_lines(events: AsyncIterator[dict[str, Any] | str]) -> AsyncIterator[str]:
    try:
        async for event in events:
            yield f"data: {event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)}\n\n"
    except ApiError as error:
        yield f"data: {json.dumps(error.body())}\n\n"


async def _transcript_events(answer: Answer, event: Text | Done) -> AsyncIterator[dict[str, Any]]:
    while isinstance(event, Text):
        yield {"type": "transcript.text.delta", "delta": event.delta}
        event = await answer.next()
    found = event.transcript
    usage = {"type": "duration", "seconds": math.ceil(found.seconds)}
    yield {"type": "transcript.text.done", "text": found.text, "usage": usage}


async def _chat_events(
    answer: Answer, event: Text | Done, head: dict[str, Any], usage: bool
) -> AsyncIterator[dict[str, Any] | str]:
    head = {**head, "object": "chat.completion.chunk"}

    def chunk(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**head, "choices": [choice]} | ({"usage": None} if usage else {})

    yield chunk({"role": "assistant", "content": ""})
    while isinstance(event, Text):
        yield chunk({"content": event.delta})
        event = await answer.next()
    yield chunk({}, "length" if event.cut_off else "stop")
    if usage:
        yield {**head, "choices": [], "usage": _usage(event)}
    yield "[DONE]"


def _usage(done: Done) -> dict[str, Any]:
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.tokens,
        "total_tokens": done.prompt_tokens + done.tokens,
        "prompt_tokens_details": {"audio_tokens": done.audio_tokens, "cached_tokens": 0},
    }


def _headers(notes: Sequence[str]) -> dict[str, str]:
    """What cannot be honoured, for formats that have no place for it."""
    return {"x-soundwave-note": "; ".join(notes)} if notes else {}


def _check_language(language: str, known: Sequence[str]) -> str:
    """The code of a language that was asked for, without its region.

    Raises:
        ApiError: it is no code, or none of those that the model knows.
    """
    code = language.lower().replace("_", "-").partition("-")[0]
    if not re.fullmatch("[a-z]{2,3}", code):
        message = f"language = {language[:60]!r}, but it must be a code such as en"
        raise ApiError(400, message, param="language", code="invalid_language")
    if known and code not in known:
        message = f"language = {code}, but the model knows {', '.join(known)} only"
        raise ApiError(400, message, param="language", code="unsupported_language")
    return code


@asynccontextmanager
async def _saved(folder: Path, upload: UploadFile | bytes | None) -> AsyncIterator[Path | None]:
    """The file of a recording, which is removed once it is no longer needed."""
    if upload is None:
        yield None
        return
    path = folder / uuid.uuid4().hex

    def save() -> None:
        with path.open("wb") as file:
            if isinstance(upload, bytes):
                file.write(upload)
            else:
                upload.file.seek(0)
                shutil.copyfileobj(upload.file, file)

    try:
        await run_in_threadpool(save)
        yield path
    finally:
        path.unlink(missing_ok=True)


async def _invalid(_: Request, error: Exception) -> Response:
    """Parameters that do not fit their types: OpenAI answers them with 400."""
    errors = error.errors() if isinstance(error, RequestValidationError) else []
    first = max(errors, key=lambda found: len(found.get("loc", ())), default={})  # of two forms the one that fits more
    place = [str(part) for part in first.get("loc", ()) if part not in ("body", "query", "path")]
    param = ".".join(place)[:100] or None
    message = f"{param}: {first.get('msg', 'is not valid')}" if param else f"the body: {first.get('msg', 'no JSON')}"
    body = ApiError(400, message, param=param, code="invalid_parameter")
    return JSONResponse(body.body(), 400, body.headers)


async def _http_error(_: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        status, detail = getattr(error, "status_code", 500), getattr(error, "detail", "")
        headers = getattr(error, "headers", None)
        error = ApiError(status, f"{detail}; this server's paths are in /openapi.json" if status == 404 else detail)
        error.headers = {**(error.headers or {}), **(headers or {})}
    return JSONResponse(error.body(), error.status_code, error.headers)


async def _left(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _broken(_: Request, error: Exception) -> Response:
    body = ApiError(500, f"the server made an error ({type(error).__name__}), which its log names", code="internal")
    return JSONResponse(body.body(), 500, body.headers)

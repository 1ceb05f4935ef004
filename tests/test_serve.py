"""The server: OpenAI's own client against a real process, a page in Chromium, and faults.

One process serves a tiny model, whose answers are noise; the expected texts are those of `soundwave.transcribe` and
`answer` with the same model. Faults that need a model that waits or fails are tried on the engine alone, and on an app
in this process.
"""

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx2 as httpx
import numpy as np
import openai
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from soundwave.curation.espeak import Espeak
from soundwave.inference import long
from soundwave.inference.answer import answer, load_model
from soundwave.inference.formats import one_line
from soundwave.inference.reading import Text as Read
from soundwave.inference.timestamps import TimedWord
from soundwave.model.chat import Turn
from soundwave.serve import batches, gate, schemas
from soundwave.serve.app import create_app
from soundwave.serve.batches import Done, Engine, Item, Job, Text, choose
from soundwave.serve.errors import ApiError
from soundwave.serve.metrics import Metrics
from soundwave.serve.settings import Limits, bind, name_of, read_keys
from tests import processes
from tests.serving import InThread

SENTENCES = ("turn on the light", "seven five two", "what time is it in the kitchen", "stop")
QUESTION = "Who speaks?"
KEY = "a-key-of-the-tests"
TOKENS = 8  # of a window: an untrained model does not end


@pytest.fixture(scope="module")
def spoken() -> dict[str, bytes]:
    """WAV files by what is said in them."""
    found = {}
    with Espeak() as espeak:
        for sentence in SENTENCES:
            samples, rate = espeak.synthesize(sentence)
            found[sentence] = wav(samples, rate)
    return found


def wav(samples: np.ndarray, rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(models_of_few_tokens) -> Path:
    return models_of_few_tokens[3]


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder)


class Server:
    """A process that serves a model."""

    def __init__(self, folder: Path, *words: str, **variables: str):
        environment = os.environ | processes.WITHOUT_COMPILER | {"OMP_NUM_THREADS": "1"} | variables
        command = [processes.SCRIPT, "serve", "--model", str(folder), "--port", "0", *words]
        self.process = processes.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        line = self.process.stdout.readline()
        assert (said := re.fullmatch(r"serving (\S+) at (http://127\.0\.0\.1:\d+)\n", line)), self.process.stderr.read()
        self.name, self.address = said.groups()
        self.port = int(self.address.rpartition(":")[2])

    def client(self, **options) -> openai.OpenAI:
        return openai.OpenAI(api_key=KEY, base_url=f"{self.address}/v1", **{"max_retries": 0, "timeout": 60} | options)

    def health(self) -> dict:
        return httpx.get(f"{self.address}/health", timeout=30).json()

    def until_idle(self) -> None:
        end = time.monotonic() + 30
        while self.health()["open_requests"]:
            assert time.monotonic() < end
            time.sleep(0.02)

    def counted(self, status: int) -> float:
        """How many transcriptions have ended with a status."""
        line = rf'soundwave_requests_total{{path="/v1/audio/transcriptions",status="{status}"}} (.+)'
        found = re.search(line, httpx.get(f"{self.address}/metrics", timeout=30).text)
        return float(found[1]) if found else 0.0


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The folder for temporary files of the shared server."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def server(folder, place, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(f"# of the tests\n{KEY}\n")
    words = ["--api-key-file", str(keys), "--max-upload-mb", "4", "--max-seconds", "90", "--max-batch", "8"]
    words += ["--max-new-tokens", "40", "--max-window-tokens", str(TOKENS)]
    started = Server(folder, *words, "--language", "en", "--name", "tiny", TMPDIR=str(place))
    yield started
    started.process.kill()
    started.process.wait()


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def texts(loaded, spoken, tmp_path_factory) -> dict[str, str]:
    """What the model writes about each file."""
    place = tmp_path_factory.mktemp("spoken") / "a.wav"
    found = {}
    for sentence, data in spoken.items():
        place.write_bytes(data)
        found[sentence] = transcript(place, loaded)
    assert len(set(found.values())) > 1 and all(found.values())
    return found


def transcript(file: Path, loaded) -> str:
    """What the library writes."""
    cut_off: list[int] = []
    (found,) = long.transcribe_each([file], loaded, max_new_tokens=TOKENS, cut_off=cut_off)
    return found.text


def transcribe(client, data: bytes, **options):
    return client.audio.transcriptions.create(model="tiny", file=("a.wav", data), **options)


def ask(client, data: bytes | None, text: str = QUESTION, **options):
    content = [{"type": "text", "text": text}]
    if data is not None:
        audio = {"data": base64.b64encode(data).decode(), "format": "wav"}
        content.insert(0, {"type": "input_audio", "input_audio": audio})
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(**{"model": "tiny", "messages": messages, "max_tokens": 12} | options)


# ---------------------------------------------------------------- answers


def test_the_server_names_its_model(client):
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("tiny", "model")
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="ask for 'tiny'"):
        client.models.retrieve("whisper-1")


def test_a_transcript_is_that_of_the_library(client, spoken, texts):
    for sentence, data in spoken.items():
        found = transcribe(client, data)
        assert found.text == texts[sentence]
        assert found.usage.type == "duration" and found.usage.seconds >= 1


def test_every_format(client, spoken, texts):
    sentence = SENTENCES[2]
    data, text = spoken[sentence], texts[sentence]
    assert transcribe(client, data, response_format="text") == f"{one_line(text)}\n"
    verbose = transcribe(client, data, response_format="verbose_json")
    assert verbose.text == text and verbose.language == "en" and verbose.words is None
    assert verbose.duration == pytest.approx(soundfile.info(io.BytesIO(data)).duration, abs=0.01)
    assert all(0 <= segment.start <= segment.end <= verbose.duration + 0.1 for segment in verbose.segments)
    words = transcribe(client, data, response_format="verbose_json", timestamp_granularities=["word"])
    assert words.segments is None and " ".join(word.word for word in words.words) == text
    both = transcribe(client, data, response_format="verbose_json", timestamp_granularities=["word", "segment"])
    assert both.words and both.segments
    assert "-->" in transcribe(client, data, response_format="srt")
    assert transcribe(client, data, response_format="vtt").startswith("WEBVTT\n")


def test_a_transcript_is_streamed_by_windows(client, loaded, spoken, tmp_path):
    samples, rate = soundfile.read(io.BytesIO(spoken[SENTENCES[0]]))
    data = wav(np.resize(samples, 40 * rate), rate)
    (tmp_path / "a.wav").write_bytes(data)
    expected = transcript(tmp_path / "a.wav", loaded)
    *deltas, last = transcribe(client, data, stream=True)
    assert [event.type for event in deltas] == ["transcript.text.delta"] * len(deltas) and len(deltas) > 1
    assert last.type == "transcript.text.done" and last.text == expected
    assert "".join(event.delta for event in deltas) == expected


def test_a_chat_is_answered_as_by_the_library(client, loaded, spoken):
    data = spoken[SENTENCES[1]]
    samples = long.as_samples(soundfile.read(io.BytesIO(data), dtype="float32")[0], 22_050)
    clip = loaded.processor.features(samples)
    expected = answer(*loaded, [QUESTION], [clip], max_new_tokens=12)[0]
    found = ask(client, data)
    (choice,) = found.choices
    assert choice.message.content == expected and choice.finish_reason in ("stop", "length")
    usage = found.usage
    assert usage.completion_tokens <= 12 and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.audio_tokens > 0

    chunks = list(ask(client, data, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
    assert chunks[0].choices[0].delta.role == "assistant" and len(chunks) > 4
    assert chunks[-2].choices[0].finish_reason == choice.finish_reason
    assert chunks[-1].usage == usage


def test_a_recording_behind_the_words_is_put_before_them(client, spoken):
    audio = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}
    audio["input_audio"]["data"] = base64.b64encode(spoken[SENTENCES[1]]).decode()
    messages = [{"role": "user", "content": [{"type": "text", "text": QUESTION}, audio]}]
    found, expected = ask(client, None, messages=messages), ask(client, spoken[SENTENCES[1]])
    assert (found.choices, found.usage) == (expected.choices, expected.usage)


def test_a_chat_without_a_recording_and_with_more_turns(client, loaded):
    turns = [Turn("system", "Be brief."), Turn("user", "Hello"), Turn("assistant", "Hi."), Turn("user", "Bye")]
    messages = [{"role": turn.role, "content": turn.content, "name": None} for turn in turns]
    found = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=5)
    assert found.choices[0].message.content == answer(*loaded, [turns], [None], max_new_tokens=5)[0]
    assert found.usage.prompt_tokens_details.audio_tokens == 0


def test_parameters_that_change_nothing_are_taken(client, spoken):
    harmless = {"n": 1, "temperature": 0, "top_p": 0.5, "seed": 3, "user": "u", "stop": [], "frequency_penalty": 0}
    extra = {"top_k": 5, "repetition_penalty": 1, "tools": [], "logit_bias": None}
    assert ask(client, spoken[SENTENCES[0]], **harmless, extra_body=extra).choices[0].message.content is not None


# ---------------------------------------------------------------- what is refused

CHATS = {
    "temperature": ({"temperature": 0.7}, "temperature = 0.7 is not supported"),
    "n": ({"n": 2}, "n = 2 is not supported; only 1 is"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools = .* is not supported"),
    "logprobs": ({"logprobs": True}, "logprobs = True is not supported"),
    "response_format": ({"response_format": {"type": "json_object"}}, "response_format = .* is not supported"),
    "modalities": ({"modalities": ["text", "audio"]}, "modalities = .* is not supported"),
    "stop": ({"stop": ["x"]}, "stop = .* is not supported"),
    "unknown": ({"extra_body": {"best_of": 3}}, "best_of = 3 is not known; leave it out"),
    "stream_options": (
        {"extra_body": {"stream_options": {"include_usage": True}}},
        "stream_options is for stream=true",
    ),
    "max_tokens": ({"max_tokens": 41}, "max_tokens = 41, but this server writes 40 at most"),
    "zero tokens": ({"max_tokens": 0}, "max_tokens: .*greater than or equal to 1"),
    "no messages": ({"messages": []}, "messages: "),
    "a tool's turn": ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, r"messages\.0\.\S+: "),
    "no words": ({"messages": [{"role": "user", "content": " "}]}, "neither text nor a recording"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "image_url",
    ),
    "assistant first": ({"messages": [{"role": "assistant", "content": "x"}] * 2, "max_tokens": 3}, ""),
    "too long": ({"messages": [{"role": "user", "content": "word " * 9000}]}, "the language model takes 8192 tokens"),
}


@pytest.mark.parametrize("case", CHATS)
def test_a_chat_that_cannot_be_answered_as_asked_is_refused(client, case):
    options, message = CHATS[case]
    if case == "assistant first":  # this template writes any order
        assert ask(client, None, **options).choices
        return
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        ask(client, None, **options)
    assert set(caught.value.body) == {"message", "type", "param", "code"}
    assert caught.value.body["type"] == "invalid_request_error" and "\n" not in caught.value.body["message"]


AUDIO_CHATS = {
    "no base64": ({"data": "???", "format": "wav"}, "data is not base64"),
    "empty": ({"data": "", "format": "wav"}, "the recording is empty"),
    "junk": ({"data": base64.b64encode(b"junk" * 500).decode(), "format": "wav"}, "the recording cannot be decoded"),
    "format": ({"data": "AAAA", "format": "pcm16"}, "format"),
}


@pytest.mark.parametrize("case", AUDIO_CHATS)
def test_a_chat_with_a_bad_recording_is_refused(client, case):
    audio, message = AUDIO_CHATS[case]
    messages = [{"role": "user", "content": [{"type": "input_audio", "input_audio": audio}]}]
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, None, messages=messages)


def test_a_chat_hears_one_recording_of_30_seconds_in_a_users_turn(client, spoken):
    part = {"data": base64.b64encode(spoken[SENTENCES[3]]).decode(), "format": "wav"}
    audio = {"type": "input_audio", "input_audio": part}
    with pytest.raises(openai.BadRequestError, match="second recording"):
        ask(client, None, messages=[{"role": "user", "content": [audio, audio]}])
    with pytest.raises(openai.BadRequestError, match="only a user's turn"):
        ask(client, None, messages=[{"role": "system", "content": [audio]}])
    with pytest.raises(openai.BadRequestError, match=r"lasts 31\.0 s or more, but in a chat the model hears 30 s"):
        ask(client, wav(np.full(31 * 16_000, 0.1)))


RECORDINGS = {
    "junk": (lambda: os.urandom(5000), "the recording cannot be decoded|is cut short|not recognised"),
    "empty": (lambda: b"", "the recording is empty"),
    "text": (lambda: b"turn on the light\n", "the recording cannot be decoded"),
    "no samples": (lambda: wav(np.zeros(0)), "the recording holds no samples"),
    "cut": (lambda: wav(np.full(16_000, 0.1))[:9000], "the recording .*cut short"),
    "too long": (lambda: wav(np.zeros(91 * 16_000), 16_000), "lasts 91 s, but this server takes 90 s at most"),
    "5 hours": (lambda: flac(np.zeros(5 * 3600 * 1000), 1000), "lasts 18000 s, but this server takes 90 s at most"),
}


def flac(samples: np.ndarray, rate: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()


@pytest.mark.parametrize("case", RECORDINGS)
def test_a_recording_that_cannot_be_used_is_refused(client, case):
    make, message = RECORDINGS[case]
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        transcribe(client, make())
    assert caught.value.body["param"] == "file" and "/" not in caught.value.body["message"].replace("ffmpeg", "")


TRANSCRIPTIONS = {
    "temperature": ({"temperature": 0.5}, "temperature = 0.5 is not supported"),
    "language": ({"language": "de"}, "language = de, but the model knows en only"),
    "no code": ({"language": "English, please"}, "must be a code such as en"),
    "format": ({"response_format": "diarized_json"}, "response_format: "),
    "granularity": ({"timestamp_granularities": ["word"]}, "is for response_format=verbose_json, not for json"),
    "streamed srt": ({"response_format": "srt", "stream": True}, "stream=true gives text only, not srt"),
    "include": ({"include": ["logprobs"]}, "'include.*' is not known; leave it out"),
    "chunking": ({"chunking_strategy": "auto"}, "'chunking_strategy' is not known"),
}


@pytest.mark.parametrize("case", TRANSCRIPTIONS)
def test_a_transcription_that_cannot_be_made_as_asked_is_refused(client, spoken, case):
    options, message = TRANSCRIPTIONS[case]
    with pytest.raises(openai.BadRequestError, match=message):
        transcribe(client, spoken[SENTENCES[0]], **options)


def test_what_is_not_used_is_said(client, spoken):
    raw = client.audio.transcriptions.with_raw_response
    found = raw.create(model="tiny", file=("a.wav", spoken[SENTENCES[3]]), prompt="names: Ada", language="en-GB")
    notes = json.loads(found.text)["notes"]
    assert found.headers["x-soundwave-note"] == "; ".join(notes)
    assert notes[0].startswith("prompt is not used") and "cut off" in notes[1]


def test_other_names_paths_and_methods_get_openais_errors(client, server, spoken):
    with pytest.raises(openai.NotFoundError, match="there is no model 'whisper-1' here; ask for 'tiny'"):
        client.audio.transcriptions.create(model="whisper-1", file=("a.wav", spoken[SENTENCES[0]]))
    for method, path, status in (("POST", "/v1/audio/translations", 404), ("DELETE", "/health", 405)):
        found = httpx.request(method, server.address + path, headers={"authorization": f"Bearer {KEY}"}, timeout=30)
        assert found.status_code == status and set(found.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("header", [{}, {"authorization": "Bearer wrong-key"}, {"authorization": f"Basic {KEY}"}])
def test_without_the_key_nothing_is_done(server, spoken, header):
    files = {"file": ("a.wav", spoken[SENTENCES[0]])}
    url = f"{server.address}/v1/audio/transcriptions"
    found = httpx.post(url, headers=header, data={"model": "tiny"}, files=files, timeout=30)
    assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx.get(f"{server.address}/health", timeout=30).status_code == 200


# ---------------------------------------------------------------- bodies


def head(path: str, *lines: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}", *lines, "", ""]).encode()


def read_status(connection: socket.socket) -> tuple[int, dict]:
    """The status and the JSON of an answer after which the connection is closed."""
    data = b""
    connection.settimeout(30)
    while part := connection.recv(65536):
        data += part
    top, _, body = data.partition(b"\r\n\r\n")
    return int(top.split()[1]), json.loads(body)


def test_a_body_that_is_too_large_is_refused_before_it_is_read(server):
    path = "/v1/audio/transcriptions"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:  # 2 GB are announced, none is sent
        connection.sendall(head(path, "Content-Type: multipart/form-data; boundary=x", f"Content-Length: {2 << 30}"))
        status, found = read_status(connection)
    assert (status, found["error"]["code"]) == (413, "upload_too_large")
    assert f"the body has {2 << 30} bytes, but this server takes {4 << 20} at most" in found["error"]["message"]


def test_a_body_of_unknown_length_is_refused_where_it_gets_too_large(server):
    def parts():
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        for _ in range(80):
            yield bytes(1 << 16)

    headers = {"content-type": "multipart/form-data; boundary=x", "authorization": f"Bearer {KEY}"}
    found = httpx.post(f"{server.address}/v1/audio/transcriptions", content=parts(), headers=headers, timeout=30)
    assert found.status_code == 413 and "more than" in found.json()["error"]["message"]


BODIES = {
    "no boundary": (b"hello", "multipart/form-data"),
    "a wrong boundary": (b"--y\r\n\r\n--y--", "multipart/form-data; boundary=x"),
    "no end": (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc',
        "multipart/form-data; boundary=x",
    ),
    "a form without a file": (b"model=tiny&file=abc", "application/x-www-form-urlencoded"),
    "JSON": (b"{}", "application/json"),
    "nothing": (b"", "text/plain"),
    "deep JSON": (b"[" * 100_000, "application/json"),
    "no UTF-8": (b'{"model": "\xff"}', "application/json"),
}  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/v1/chat/completions"])
@pytest.mark.parametrize("case", BODIES)
def test_junk_is_a_bad_request(server, case, path):
    body, kind = BODIES[case]
    headers = {"content-type": kind, "authorization": f"Bearer {KEY}"}
    found = httpx.post(server.address + path, content=body, headers=headers, timeout=30)
    assert found.status_code == 400 and set(found.json()["error"]) == {"message", "type", "param", "code"}


def test_bytes_that_are_no_http_do_no_harm(server):
    for junk in (os.urandom(2000), b"\0" * 100_000, b"GET / HTTP/9.9\r\n\r\n", b"POST /" + b"a" * 100_000):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.settimeout(10)
            try:
                connection.sendall(junk + b"\r\n\r\n")
                while connection.recv(65536):
                    pass
            except (TimeoutError, ConnectionError):
                pass
    assert server.health()["status"] == "ok"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=8,
)


def from_schema(schema: dict, whole: dict):
    """Values that fit a JSON schema of the description, at least mostly."""
    if "$ref" in schema:
        return st.deferred(
            lambda: from_schema(whole["components"]["schemas"][schema["$ref"].rpartition("/")[2]], whole)
        )
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return st.one_of(*(from_schema(option, whole) for option in options))
    kind = schema.get("type")
    if kind == "object" or "properties" in schema:
        fields = {name: from_schema(field, whole) for name, field in schema.get("properties", {}).items()}
        wanted = schema.get("required", [])
        return st.fixed_dictionaries(
            {name: fields[name] for name in wanted},
            optional={name: value for name, value in fields.items() if name not in wanted},
        )
    simple = {
        "string": st.text(max_size=30), "integer": st.integers(0, 9), "number": st.sampled_from([0, 0.0, 1]),
        "boolean": st.booleans(), "null": st.none(),
    }  # fmt: skip
    if kind == "array":
        return st.lists(from_schema(schema["items"], whole), max_size=3)
    return simple.get(kind, JSON)


def test_no_request_that_fits_the_description_breaks_the_server(server, fuzz):
    whole = httpx.get(f"{server.address}/openapi.json", timeout=30).json()
    operation = whole["paths"]["/v1/chat/completions"]["post"]
    documented = {int(status) for status in operation["responses"]}
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    headers = {"authorization": f"Bearer {KEY}"}

    with httpx.Client(base_url=server.address, headers=headers, timeout=60) as session:

        @settings(
            max_examples=fuzz(25),
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(st.one_of(from_schema(schema, whole), JSON), st.dictionaries(st.text(max_size=9), JSON, max_size=2))
        def try_one(body, more):
            if isinstance(body, dict):
                body = {**more, **body, **({"model": "tiny", "max_tokens": 2} if "messages" in body else {})}
            found = session.post("/v1/chat/completions", json=body)
            assert found.status_code in documented - {500, 503}, found.text
            if found.status_code != 200:
                assert set(found.json()["error"]) == {"message", "type", "param", "code"}

        try_one()


# ---------------------------------------------------------------- many clients


def test_32_clients_at_once_get_their_own_answers_while_others_misbehave(server, spoken):
    """Each good request is answered once, with its own length; some clients leave, send junk or dawdle meanwhile.

    Texts are compared in the test of the engine: those of an untrained model may change with their batch.
    """
    before = server.counted(200)
    samples = soundfile.read(io.BytesIO(spoken[SENTENCES[2]]))[0]

    def good(number: int) -> bool:
        data = wav(samples[: 8_000 + 160 * number])
        found = transcribe(server.client(timeout=120), data, response_format="verbose_json")
        return found.duration == pytest.approx(0.5 + number / 100)

    def bad(number: int) -> None:
        kind = number % 3
        if kind == 0:  # leaves before its answer
            with pytest.raises(openai.APITimeoutError):
                transcribe(server.client(timeout=0.05), wav(np.random.default_rng(number).normal(0, 0.1, 60 * 16_000)))
        elif kind == 1:
            with pytest.raises(openai.BadRequestError):
                transcribe(server.client(), os.urandom(3000))
        else:  # sends a part of its body and leaves
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(
                    head(
                        "/v1/audio/transcriptions",
                        "Content-Type: multipart/form-data; boundary=x",
                        "Content-Length: 9999",
                    )
                )
                time.sleep(0.3)

    with ThreadPoolExecutor(41) as pool:
        faults = [pool.submit(bad, number) for number in range(9)]
        right = list(pool.map(good, range(32)))
        for fault in faults:
            fault.result()
    assert right == [True] * 32
    server.until_idle()
    assert server.counted(200) - before == 32
    sizes = httpx.get(f"{server.address}/metrics", timeout=30).text
    windows = float(re.search(r'soundwave_batch_windows_sum{kind="transcript"} (.+)', sizes)[1])
    runs = float(re.search(r'soundwave_batch_windows_count{kind="transcript"} (.+)', sizes)[1])
    assert windows > runs  # some were answered together


def test_the_files_of_uploads_are_removed(server, place):
    server.until_idle()
    assert [entry.name for folder in place.glob("soundwave-serve-*") for entry in folder.iterdir()] == []


# ---------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def chromium(spoken, tmp_path_factory):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("needs Chromium: apt install chromium")
    sound = tmp_path_factory.mktemp("microphone") / "said.wav"
    sound.write_bytes(spoken[SENTENCES[2]])
    flags = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=path, args=[*flags, f"--use-file-for-fake-audio-capture={sound}"]
        )
        yield browser
        browser.close()


def test_the_page_transcribes_answers_and_records(chromium, server, spoken, texts, tmp_path):
    expect, said = pytest.importorskip("playwright.sync_api").expect, []
    tab = chromium.new_page()
    tab.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    tab.on("pageerror", lambda error: said.append(f"error: {error}"))
    tab.on(
        "request",
        lambda request: request.url.startswith((server.address, "blob:", "data:")) or said.append(request.url),
    )
    tab.goto(server.address)
    tab.wait_for_selector("#key-label:not([hidden])")
    assert "tiny" in tab.inner_text("#about") and tab.is_disabled("#send")
    (tmp_path / "words.wav").write_bytes(spoken[SENTENCES[0]])
    tab.set_input_files("#file", tmp_path / "words.wav")
    tab.click("#send")  # without the key
    tab.wait_for_selector("#output.bad")
    assert "no API key was sent" in tab.inner_text("#output")
    assert said.pop().startswith("error: Failed to load resource") and not said  # the browser tells of the 401
    tab.fill("#key", KEY)

    def done(text: str) -> str:
        expect(tab.locator("#status")).to_have_text(re.compile(r"^[\d.]+ s$"), timeout=60_000)
        assert tab.inner_text("#send") == text
        return tab.inner_text("#output")

    tab.click("#send")
    assert done("Transcribe") == texts[SENTENCES[0]]
    tab.fill("#question", QUESTION)
    tab.evaluate("document.querySelector('#status').textContent = ''")
    tab.click("#send")
    assert done("Ask")
    tab.fill("#question", "")
    tab.click("#record")
    tab.wait_for_selector("#record[aria-pressed=true]")
    tab.wait_for_timeout(1200)
    tab.click("#record")
    tab.wait_for_selector("#record[aria-pressed=false]")
    tab.evaluate("document.querySelector('#status').textContent = ''")
    tab.click("#send")
    assert done("Transcribe")
    tab.close()
    assert said == []


# ---------------------------------------------------------------- the end


def test_sigterm_answers_what_is_open_and_ends_with_status_0(server, spoken, place):
    """The last test of the shared server."""
    server.until_idle()
    samples = soundfile.read(io.BytesIO(spoken[SENTENCES[0]]))[0]
    recording = wav(np.resize(samples, 85 * 16_000))  # three windows, so that some are open when the signal comes
    with ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(transcribe, server.client(), recording) for _ in range(12)]
        # Until the server has all of them: it closes connections of which it has read nothing yet.
        while server.health()["open_requests"] + sum(found.done() for found in answers) < 12:
            time.sleep(0.005)
        assert not all(found.done() for found in answers)
        server.process.send_signal(signal.SIGTERM)
        assert [found.result().usage.seconds for found in answers] == [85.0] * 12
    assert server.process.wait(30) == 0
    assert server.process.stderr.read() == ""
    assert list(place.iterdir()) == []


# ---------------------------------------------------------------- the engine alone


class Told:
    """Events of a request, in order."""

    def __init__(self):
        self.events, self.ended = [], threading.Event()

    def __call__(self, event):
        self.events.append(event)
        if not isinstance(event, Text):
            self.ended.set()

    def last(self, timeout: float = 20.0):
        assert self.ended.wait(timeout)
        (end,) = [event for event in self.events if not isinstance(event, Text)]
        return end


class SlowReader:
    """Stands for the model: it waits for `go`, and says of each window how many samples it has."""

    def __init__(self, engine: Engine):
        self.engine, self.go, self.began, self.batches = engine, threading.Event(), threading.Event(), []
        self.fault = lambda windows: None
        engine.reader = self

    def read(self, windows, *, timed=False):
        self.began.set()
        assert self.go.wait(20)
        if (fault := self.fault(windows)) is not None:
            raise fault
        self.batches.append(len(windows))
        return [self.text(window) for window in windows]

    @staticmethod
    def text(window) -> Read:
        word, start = f"w{len(window.samples)}", window.start + window.before
        return Read(word, (TimedWord(word, start + 0.1, start + 0.2, (), 0.0, True),))


@pytest.fixture
def engine(loaded):
    started = Engine(loaded, Limits(max_batch=4, max_wait_ms=5, max_seconds=100))
    started.start()
    yield started
    started.close()


@pytest.fixture
def slow(engine):
    reader = SlowReader(engine)
    yield reader
    reader.go.set()


@pytest.fixture
def clips(tmp_path):
    """Makes files of noise: clips(n) is a file of n samples."""

    def make(samples: int) -> Path:
        path = tmp_path / f"{samples}.wav"
        path.write_bytes(wav(np.random.default_rng(0).normal(0, 0.1, samples).clip(-1, 1)))
        return path

    return make


def submit(engine: Engine, path: Path | None = None, **options) -> tuple[Job, Told]:
    told = Told()
    job = Job(told, path, **options)
    engine.submit(job)
    return job, told


def test_a_request_that_is_cancelled_never_reaches_the_model(engine, slow, clips):
    _, first = submit(engine, clips(16_000))
    assert slow.began.wait(20)
    gone = [submit(engine, clips(16_100 + i)) for i in range(3)]
    _, stays = submit(engine, clips(17_000))
    while engine.load[1] < 4:
        time.sleep(0.01)
    for job, _ in gone:
        engine.cancel(job)
    assert engine.load == (2, 1)
    slow.go.set()
    assert first.last().transcript.text == "w16000" and stays.last().transcript.text == "w17000"
    assert slow.batches == [1, 1] and all(not told.events for _, told in gone)


def test_a_failing_batch_fails_only_who_is_at_fault(engine, slow, clips):
    slow.fault = lambda windows: ValueError("17000") if any(len(w.samples) == 17_000 for w in windows) else None
    _, first = submit(engine, clips(15_999))
    assert slow.began.wait(20)
    told = [submit(engine, clips(size))[1] for size in (16_000, 17_000, 18_000, 19_000)]
    while engine.load[1] < 4:
        time.sleep(0.01)
    slow.go.set()
    ends = [one.last() for one in (first, *told)]
    assert [end.transcript.text for end in ends if isinstance(end, Done)] == ["w15999", "w16000", "w18000", "w19000"]
    assert ends[2].error.status_code == 500 and "ValueError" in ends[2].error.detail


def test_a_batch_too_large_for_the_memory_is_halved(engine, slow, clips):
    slow.fault = lambda windows: torch.OutOfMemoryError("out of memory") if len(windows) > 2 else None
    _, first = submit(engine, clips(15_999))
    assert slow.began.wait(20)
    told = [submit(engine, clips(16_000 + i))[1] for i in range(4)]
    while engine.load[1] < 4:
        time.sleep(0.01)
    slow.go.set()
    assert [one.last().transcript.text for one in told] == [f"w{16_000 + i}" for i in range(4)]
    assert slow.batches == [1, 2, 2] and first.last()


def test_an_hour_of_speech_does_not_keep_a_sentence_waiting_and_is_read_window_by_window(engine, slow, clips):
    _, long_one = submit(engine, clips(95 * 16_000), streams=True)
    _, short = submit(engine, clips(16_000))
    slow.go.set()
    assert short.last() and long_one.last().transcript.seconds == 95
    deltas = [event.delta for event in long_one.events[:-1]]
    assert len(deltas) >= 4 and "".join(deltas) == long_one.events[-1].transcript.text


def test_32_requests_get_their_own_texts(engine, slow, clips):
    paths = [clips(16_000 + number) for number in range(32)]
    told = [submit(engine, path)[1] for path in paths]
    slow.go.set()
    assert [one.last().transcript.text for one in told] == [f"w{16_000 + number}" for number in range(32)]
    assert sum(slow.batches) == 32 and max(slow.batches) == 4 and all(len(one.events) == 1 for one in told)


def test_closing_fails_what_has_no_answer_and_takes_no_more(engine, slow, clips):
    told = [submit(engine, clips(16_000 + i))[1] for i in range(3)]
    assert slow.began.wait(20)
    threading.Timer(0.2, slow.go.set).start()
    engine.close()
    assert {one.last().error.code for one in told} == {"shutting_down"}
    with pytest.raises(ApiError, match="shutting down"):
        submit(engine)
    assert not engine.is_running


def test_a_chat_ends_at_its_own_limit_within_a_batch(engine, loaded):
    turns = [Turn("user", "Tell a story.")]
    whole = answer(*loaded, [turns], [None], max_new_tokens=20)[0]
    told = [submit(engine, turns=turns, max_new_tokens=count)[1] for count in (3, 20)]
    short, full = (one.last() for one in told)
    assert full.transcript.text == whole and whole.startswith(short.transcript.text)
    assert (short.tokens, short.cut_off) == (3, True)


def test_a_cancelled_chat_stops_at_the_next_token(engine, loaded, monkeypatch):
    counts = []

    def counting(*arguments, watch, **options):
        def stop_at_third(rows):
            counts.append(len(rows[0]))
            if len(rows[0]) == 3:
                engine.cancel(job)
            return watch(rows)

        return answer(*arguments, watch=stop_at_third, **options)

    monkeypatch.setattr(batches, "answer", counting)
    job, told = submit(engine, turns=[Turn("user", "Tell a story.")], max_new_tokens=30)
    while not counts or engine.load[0]:
        time.sleep(0.01)
    submit(engine, turns=[Turn("user", "Hi")], max_new_tokens=1)[1].last()
    assert counts[:4] == [1, 2, 3, 1] and not told.events


def item(seconds: float, chat: bool = False) -> Item:
    return Item(SimpleNamespace(kind="chat" if chat else "transcript"), None, None, seconds, 0.0)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([30, 30, 30], [30, 30, 30]),
        ([3, 3, 3, 3, 3], [3, 3, 3, 3]),  # four at most
        ([3, 3, 30, 3], [3, 3, 3]),  # with 30 s most of it would be padding
        ([30, 3, 30, 29], [30, 3, 30, 29]),
        ([0, 0.1, 2], [0, 0.1, 2]),
    ],
)
def test_a_batch_is_half_padding_at_most(seconds, expected):
    assert [one.seconds for one in choose([item(value) for value in seconds], 4)] == expected


def test_chats_and_transcripts_are_not_mixed():
    found = choose([item(3, chat=True), item(3), item(3, chat=True)], 4)
    assert [one.job.kind for one in found] == ["chat", "chat"]


# ---------------------------------------------------------------- an app in this process


@pytest.fixture
def in_thread(loaded):
    """in_thread(**limits) serves an engine of its own, whose model waits; gives the server, the reader, the engine."""
    started = []

    def start(keys=(), **limits):
        own = Limits(**{"max_wait_ms": 1, "timeout": 30, "grace": 1} | limits)
        engine = Engine(loaded, own)
        reader = SlowReader(engine)
        app = create_app(engine, Metrics(), name="tiny", limits=own, keys=keys)
        started.append((InThread(app, own), reader))
        return started[-1][0], reader, engine

    yield start
    for running, reader in started:
        reader.go.set()
        running.close()


def post(port: int, data: bytes, timeout: float = 30.0, **fields) -> httpx.Response:
    url = f"http://127.0.0.1:{port}/v1/audio/transcriptions"
    return httpx.post(url, data={"model": "tiny", **fields}, files={"file": ("a.wav", data)}, timeout=timeout)


def test_a_full_queue_says_when_to_come_back(in_thread, spoken):
    server, reader, engine = in_thread(max_queue=2)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(post, server.port, spoken[SENTENCES[3]]) for _ in range(2)]
        while engine.load[0] < 2:
            time.sleep(0.01)
        found = post(server.port, spoken[SENTENCES[3]])
        reader.go.set()
        assert [one.result().status_code for one in waiting] == [200, 200]
    assert found.status_code == 429 and found.json()["error"]["code"] == "queue_full"
    assert int(found.headers["retry-after"]) >= 1
    assert post(server.port, spoken[SENTENCES[3]]).status_code == 200


def test_a_client_that_leaves_is_cancelled_before_its_turn(in_thread, spoken):
    server, reader, engine = in_thread(max_batch=1)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, server.port, spoken[SENTENCES[0]])
        assert reader.began.wait(20)
        with pytest.raises(httpx.ReadTimeout):
            post(server.port, spoken[SENTENCES[1]], timeout=0.5)
        end = time.monotonic() + 20
        while engine.load[0] > 1:
            assert time.monotonic() < end
            time.sleep(0.01)
        reader.go.set()
        assert first.result().status_code == 200
    assert reader.batches == [1]


def test_an_answer_that_takes_too_long_is_given_up(in_thread, spoken):
    server, reader, engine = in_thread(timeout=0.3)
    found = post(server.port, spoken[SENTENCES[0]])
    assert found.status_code == 504 and found.json()["error"]["code"] == "timeout"
    assert found.headers["x-should-retry"] == "false" and engine.load[0] == 0


def test_a_slow_upload_is_given_up_while_others_are_answered(in_thread, spoken):
    server, reader, _ = in_thread(idle_timeout=0.5)
    reader.go.set()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            head("/v1/audio/transcriptions", "Content-Type: multipart/form-data; boundary=x", "Content-Length: 999")
        )
        assert post(server.port, spoken[SENTENCES[3]]).status_code == 200
        status, found = read_status(connection)
    assert (status, found["error"]["code"]) == (408, "upload_timeout")


@pytest.mark.parametrize("beginning", [b"", b"POST /v1/models HTTP/1.1\r\nHost:"])
def test_a_connection_without_a_request_is_closed(in_thread, beginning):
    server, _, _ = in_thread(idle_timeout=0.3)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(20)
        connection.sendall(beginning)
        assert connection.recv(1) == b""


def test_a_client_that_leaves_amid_a_streamed_answer_is_cancelled(in_thread):
    server, reader, engine = in_thread(max_batch=1)
    noise = np.random.default_rng(0).normal(0, 0.1, 45 * 16_000).clip(-1, 1)
    noise[26 * 16_000 : 28 * 16_000] = 0  # a pause, at which the recording is cut
    reader.fault = lambda windows: None if not reader.batches else reader.go.clear() or reader.go.wait(20) and None
    reader.go.set()
    url, files = f"http://127.0.0.1:{server.port}/v1/audio/transcriptions", {"file": ("a.wav", wav(noise))}
    with httpx.stream("POST", url, data={"model": "tiny", "stream": "true"}, files=files, timeout=30) as found:
        lines = found.iter_lines()  # held: httpx leaves when it is dropped
        assert next(lines).startswith("data: ")
        assert engine.load[0] == 1
    end = time.monotonic() + 20
    while engine.load[0]:
        assert time.monotonic() < end
        time.sleep(0.01)
    reader.go.set()


def test_a_client_that_sends_too_often_waits(in_thread):
    keys = ["first-key-of-two", "second-key-of-two"]
    server, _, _ = in_thread(keys=keys, requests_per_minute=2)

    def status(key: str) -> int:
        url, headers = f"http://127.0.0.1:{server.port}/v1/models", {"authorization": f"Bearer {key}"}
        found = httpx.get(url, headers=headers, timeout=30)
        assert found.status_code == 200 or 1 <= int(found.headers["retry-after"]) <= 31
        return found.status_code

    assert [status(keys[0]) for _ in range(3)] == [200, 200, 429] and status(keys[1]) == 200


def test_an_error_after_the_first_event_is_an_event(in_thread):
    server, reader, _ = in_thread(max_batch=1)
    noise = np.random.default_rng(0).normal(0, 0.1, 45 * 16_000).clip(-1, 1)
    noise[26 * 16_000 : 28 * 16_000] = 0  # a pause, at which the recording is cut
    seen = []
    reader.fault = lambda windows: seen.append(1) or (ValueError("late") if len(seen) > 1 else None)
    reader.go.set()
    found = post(server.port, wav(noise), stream="true")
    events = [json.loads(line.removeprefix("data: ")) for line in found.text.split("\n\n") if line]
    assert found.status_code == 200 and events[0]["type"] == "transcript.text.delta"
    assert events[-1]["error"]["code"] == "internal" and len(events) == 2


def test_a_model_of_stage_1_transcribes_but_does_not_answer(models_of_few_tokens, spoken, tmp_path):
    loaded = load_model(models_of_few_tokens[1])
    limits = Limits()
    server = InThread(create_app(Engine(loaded, limits), Metrics(), name="tiny", limits=limits), limits)
    try:
        (tmp_path / "a.wav").write_bytes(spoken[SENTENCES[0]])
        found = post(server.port, spoken[SENTENCES[0]])
        assert found.json()["text"] == long.transcribe(tmp_path / "a.wav", loaded).text
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
        refused = httpx.post(f"http://127.0.0.1:{server.port}/v1/chat/completions", json=body, timeout=30)
        assert refused.status_code == 400 and "stage 1 only" in refused.json()["error"]["message"]
    finally:
        server.close()


# ---------------------------------------------------------------- before anything is loaded

COMMANDS = {
    "no model": (["--model", "none"], "none holds no model"),
    "batch": (["--max-batch", "0"], "--max-batch 0, but it must be more than 0"),
    "wait": (["--max-wait-ms", "-1"], "--max-wait-ms -1, but it must be 0 or more"),
    "upload": (["--max-upload-mb", "nan"], "--max-upload-mb nan"),
    "language": (["--language", "english"], "--language 'english', but it must be a code such as en"),
    "short key": (["--api-key", "abc"], "API key 1 must have 8 or more printable characters"),
    "no key file": (["--api-key-file", "none.txt"], "none.txt: No such file"),
    "host": (["--host", "no.such.host.invalid"], "cannot serve at no.such.host.invalid"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_the_command_refuses_before_it_loads(case, folder, monkeypatch, capsys):
    from soundwave.cli import main

    words, message = COMMANDS[case]
    monkeypatch.setattr("soundwave.inference.answer.load_model", lambda folder: pytest.fail("the model was loaded"))
    monkeypatch.setattr(sys, "argv", ["soundwave", "serve", "--model", str(folder), "--port", "0", *words])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    assert end.value.code == 1 and message in said.err and said.err.count("\n") == 1


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} \(Address already in use\); give another --host or --port"):
            bind("127.0.0.1", port)


def test_keys_are_one_on_a_line(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# old\n\nfirst-key-here\n second-key-here \n")
    assert read_keys("third-key-here", file) == ["third-key-here", "first-key-here", "second-key-here"]
    file.write_text("# none\n")
    with pytest.raises(ValueError, match="holds no key"):
        read_keys(None, file)


def test_a_model_is_called_as_its_run():
    assert (name_of(Path("runs/demo/model")), name_of(Path("runs/mine"))) == ("demo", "mine")


def test_the_place_of_a_recording_among_the_words_is_kept():
    part = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "mp3"}}
    content = [{"type": "text", "text": "Before"}, part, {"type": "text", "text": "after"}]
    message = schemas.Message.model_validate({"role": "user", "content": content})
    assert schemas.read_messages([message]) == ([Turn("user", "Before\nafter", 6)], b"\0\0\0")


def test_known_clients_are_forgotten_after_a_minute(monkeypatch):
    monkeypatch.setattr(gate, "KNOWN_CLIENTS", 2)
    guard, now = gate.Gate(None, limits=Limits(requests_per_minute=1)), [0.0]
    monkeypatch.setattr(gate.time, "monotonic", lambda: now[0])
    for name in ("a", "b"):
        guard._check_rate(name)
    now[0] = 61.0
    guard._check_rate("c")
    assert set(guard.rates) == {"c"}

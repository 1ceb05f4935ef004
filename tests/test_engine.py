"""The language model in another process: a server that speaks vLLM's protocol gets prompts as embeddings.

The stand-in for vLLM is a server of the standard library that answers with the same merged language model, token by
token, so that all texts must be those of the model as a whole.
"""

import base64
import io
import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from soundwave.cli import app
from soundwave.inference.answer import answer, load_model
from soundwave.inference.drafts import reason_against_drafts
from soundwave.inference.reading import Window
from soundwave.model.merging import merge
from soundwave.serve.app import create_app
from soundwave.serve.batches import Done, Engine, Failed, Item, Job, Text, choose
from soundwave.serve.engine import Vllm, check_merged, load_for
from soundwave.serve.errors import ApiError
from soundwave.serve.metrics import Metrics
from soundwave.serve.settings import Limits

PROMPTS = ["Who speaks?", "Say it.", "Transcribe the speech.", "?"]
LIMITS = Limits(max_batch=4, max_wait_ms=0, max_window_tokens=6)


@pytest.fixture(scope="module", autouse=True)
def in_float32():
    """In half precision, the text of an untrained model depends on the others of its batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[load_model.__module__], "pick_dtype", lambda _: (torch.float32, "for the tests"))
        yield


@pytest.fixture(scope="module")
def folder(models_of_few_tokens, tmp_path_factory):
    return merge(models_of_few_tokens[3], tmp_path_factory.mktemp("merged") / "model", dtype="float32")


@pytest.fixture(scope="module")
def whole(folder):
    return load_model(folder)


class StandIn:
    """Answers `/v1/completions` as vLLM does, with a language model of this process.

    Attributes:
        asked: the bodies of the requests.  written: tokens that were sent.
        pause: seconds before each token.  fault: status and text of the answer to everything but /v1/models.
    """

    def __init__(self, language_model, folder):
        self.language_model, self.folder = language_model, folder
        self.asked, self.written, self.pause, self.fault = [], 0, 0.0, None
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                """Say nothing."""

            def reply(self, status, body):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                model = {"id": "the-llm", "root": str(stand_in.folder)}
                self.reply(200, json.dumps({"data": [model]}).encode())

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                stand_in.asked.append(body)
                if stand_in.fault:
                    status, text = stand_in.fault
                    return self.reply(status, text)
                self.send_response(200)
                self.end_headers()
                with stand_in.lock:
                    stand_in.at_once += 1
                    stand_in.most_at_once = max(stand_in.most_at_once, stand_in.at_once)
                try:
                    for event in stand_in.events(body):
                        self.wfile.write(b"data: " + event + b"\n\n")
                        self.wfile.flush()
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with stand_in.lock:
                        stand_in.at_once -= 1

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def events(self, body):
        prompt = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
        states, ends = prompt[None].to(self.language_model.dtype), set(body["stop_token_ids"])
        embed, reason = self.language_model.get_input_embeddings(), "length"
        for _ in range(body["max_tokens"]):
            time.sleep(self.pause)
            with torch.no_grad():
                token = int(self.language_model(inputs_embeds=states).logits[0, -1].argmax())
            self.written += 1
            if token in ends:
                reason = "stop"
                break
            yield self.chunk({"text": "…", "token_ids": [token], "finish_reason": None})
            states = torch.cat([states, embed(torch.tensor([[token]]))], 1)
        # vLLM tells the end token if it has stopped by it, but not its text.
        last = [token] if reason == "stop" else []
        yield self.chunk({"text": "", "token_ids": last, "finish_reason": reason})
        yield b"[DONE]"

    @staticmethod
    def chunk(choice):
        return json.dumps({"object": "text_completion", "choices": [{"index": 0, **choice}]}).encode()


@pytest.fixture(scope="module")
def language_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "language_model", dtype="float32")


@pytest.fixture
def vllm(language_model, folder):
    stand_in = StandIn(language_model, folder / "language_model")
    yield stand_in
    stand_in.server.shutdown()
    stand_in.server.server_close()


@pytest.fixture
def loaded(vllm, folder):
    return load_for(Vllm(vllm.url), folder)


def clips_of(processor, count=3):
    noise = np.random.default_rng(0).normal(0, 0.1, (count, 16_000)).astype(np.float32)
    return [processor.features(samples[: 6_000 + 3_000 * number]) for number, samples in enumerate(noise)]


def test_answers_are_those_of_the_whole_model(vllm, loaded, whole):
    audio = [*clips_of(whole.processor), None]
    expected_lengths, lengths, expected_cut, cut = [], [], [], []
    expected = answer(*whole, PROMPTS, audio, max_new_tokens=6, prompt_lengths=expected_lengths, cut_off=expected_cut)
    found = answer(*loaded, PROMPTS, audio, max_new_tokens=6, prompt_lengths=lengths, cut_off=cut)
    assert (found, lengths, cut) == (expected, expected_lengths, expected_cut)
    assert len({body["prompt_embeds"] for body in vllm.asked}) == 4  # each its own, without padding
    assert all(body["repetition_penalty"] == 1 and body["temperature"] == 0 for body in vllm.asked)


def test_no_layer_is_loaded_here_and_drafts_are_not_tried(loaded, whole):
    layers = [name for name, _ in loaded.model.named_parameters() if "layers." in name and "language_model" in name]
    assert not layers and loaded.model._head is None
    assert torch.equal(loaded.model.head_weight, whole.model.head_weight)
    assert reason_against_drafts(loaded.model.language_model) == "it runs in another process"


def test_a_row_that_is_watched_ends_and_vllm_stops_writing_it(vllm, loaded, whole):
    vllm.pause = 0.02
    seen = []

    def watch(rows):
        seen.append([list(row) for row in rows])
        return [len(row) >= 2 for row in rows]

    answer(*loaded, PROMPTS[:2], clips_of(whole.processor, 2), max_new_tokens=60, watch=watch)
    assert max(len(row) for row in seen[-1]) < 20 and vllm.written < 40


def submitted(engine, **settings) -> tuple[list, threading.Event]:
    events, over = [], threading.Event()

    def tell(event):
        events.append(event)
        if not isinstance(event, Text):
            over.set()

    engine.submit(Job(tell, **settings))
    return events, over


def chat(text: str) -> dict:
    from soundwave.model.chat import Turn

    return {"turns": [Turn("user", text, None)], "max_new_tokens": 5, "streams": True}


def test_the_engine_streams_and_several_batches_are_written_at_a_time(vllm, loaded, whole):
    vllm.pause = 0.05
    engine = Engine(loaded, Limits(max_batch=1, max_wait_ms=0))
    assert len(engine.threads) == 5
    engine.start()
    try:
        all_events = [submitted(engine, **chat(f"{text} {text}")) for text in PROMPTS]
        for events, over in all_events:
            assert over.wait(30) and isinstance(events[-1], Done), events
    finally:
        engine.close()
    assert vllm.most_at_once > 1
    for text, (events, _) in zip(PROMPTS, all_events, strict=True):
        expected = answer(*whole, [f"{text} {text}"], [None], max_new_tokens=5)[0]
        assert events[-1].transcript.text == "".join(e.delta for e in events[:-1]) == expected


@pytest.mark.parametrize(
    "fault, status, text",
    [
        ((400, b'{"error": {"message": "hidden_size 5 does not match"}}'), 400, "answers 400: hidden_size 5 does not"),
        ((500, b"<html>no</html>"), 503, "vLLM answers 500: <html>no</html>"),
        ((200, b'data: {"error": {"message": "out of memory"}}\n\n'), 500, "vLLM: out of memory"),
        ((200, b'data: {"choices": [{"text": "a", "finish_reason": null}]}\n\n'), 500, "vLLM sends no token_ids"),
    ],
    ids=["refused", "broken", "in-the-stream", "old-version"],
)
def test_a_fault_of_vllm_is_told_to_the_client(vllm, loaded, fault, status, text):
    vllm.fault = fault
    engine = Engine(loaded, LIMITS)
    engine.start()
    try:
        events, over = submitted(engine, **chat("a"))
        assert over.wait(30) and isinstance(events[-1], Failed)
    finally:
        engine.close()
    assert events[-1].error.status_code == status and text in events[-1].error.detail


def test_a_vllm_that_has_gone_is_503_with_a_time_to_try_again(vllm, loaded):
    vllm.server.shutdown()
    vllm.server.server_close()
    with pytest.raises(ApiError, match="no vLLM answers") as caught:
        answer(*loaded, ["a"], [None], max_new_tokens=2)
    assert caught.value.status_code == 503 and caught.value.headers == {"retry-after": "5"}


@pytest.mark.parametrize("url", ["", "127.0.0.1:8001", "https://host", "http://", "http://host:99999", "http://a:b"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ValueError, match=re.escape(f"--vllm-url {url!r}, but it must be an address such as http")):
        Vllm(url)


def test_an_address_without_vllm_is_refused_with_the_command_that_starts_one(folder):
    words = ["serve", "--model", str(folder), "--port", "0", "--engine", "vllm", "--vllm-url", "http://127.0.0.1:9"]
    found = CliRunner().invoke(app, words)
    assert str(found.exception) == (
        "--vllm-url http://127.0.0.1:9: no vLLM answers (Connection refused); start one: vllm serve "
        "MODEL/language_model --enable-prompt-embeds --port 9"
    )


def test_another_model_at_vllm_is_refused(vllm, folder, tmp_path):
    vllm.folder = tmp_path
    with pytest.raises(ValueError, match=f"vLLM serves {tmp_path}, but {folder} needs"):
        load_for(Vllm(vllm.url), folder)


@pytest.mark.parametrize("stage, text", [(1, "has seen stage 1 only"), (3, "merge it first: soundwave merge ")])
def test_a_model_that_is_not_merged_is_refused(models_of_few_tokens, stage, text):
    with pytest.raises(ValueError, match=text):
        check_merged(models_of_few_tokens[stage])


def test_windows_of_a_recording_keep_their_order():
    """A long window that does not fit into a batch of short ones keeps the short one behind it waiting, too."""
    recording, others = Job(print), [Job(print), Job(print)]
    nothing = Window(np.zeros(0, np.float32))

    def item(job, seconds):
        return Item(job, nothing, None, seconds, 0.0)

    items = [item(others[0], 2.0), item(others[1], 2.0), item(recording, 30.0), item(recording, 3.0)]
    assert choose(items, 8) == items[:2]
    assert choose(items[2:], 8) == items[2:]


def test_the_description_tells_what_the_model_is_called(loaded):
    """Else whatever fuzzes the server from its own description gets 404 only."""
    described = create_app(Engine(loaded, LIMITS), Metrics(), name="tiny", limits=LIMITS).openapi()
    schemas = described["components"]["schemas"]
    (of_form,) = (schema for name, schema in schemas.items() if name.startswith("Body_transcriptions"))
    assert of_form["properties"]["model"]["enum"] == schemas["ChatRequest"]["properties"]["model"]["enum"] == ["tiny"]
    json.dumps(described)

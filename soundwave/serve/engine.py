"""The language model in a process of its own: vLLM writes the answers, encoder and adapters stay here.

    soundwave merge runs/mine/3/model runs/mine/merged
    vllm serve runs/mine/merged/language_model --enable-prompt-embeds --port 8001
    soundwave serve --model runs/mine/merged --engine vllm --vllm-url http://127.0.0.1:8001

vLLM knows the number of a recording's places in a prompt from the recording's length; ours depends on what is said. So
it gets whole prompts as embeddings, [L, D] each (`/v1/completions`, `prompt_embeds`), and sends tokens back one by one.
It puts the prompts of all batches together by itself (continuous batching).

Of the language model only the embeddings are loaded here: the input embedding for prompts, the output embedding for
CTC. `RemoteLanguageModel` has the methods of a language model that answers need, so that they are made as always, but
without drafts: these would need its states.
"""

import base64
import http.client
import io
import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from soundwave.backbones.load import load_language_model
from soundwave.backbones.released import is_released
from soundwave.backbones.wheels import resolve
from soundwave.inference.answer import LoadedModel, load_model
from soundwave.model.configuration import SoundwaveConfig
from soundwave.serve.errors import ApiError

PATIENCE = 120.0  # seconds without a token after which vLLM counts as gone
PLAIN = {  # greedy decoding, whatever the generation settings of the model's folder say
    "temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1, "frequency_penalty": 0,
    "presence_penalty": 0,
}  # fmt: skip


class Vllm:
    """A vLLM server that takes prompts as embeddings.

    Args:
        url: its address, such as "http://127.0.0.1:8001".

    Raises:
        ValueError: it is no address, nobody answers there, or not vLLM with one model.
    """

    def __init__(self, url: str):
        parts = urlsplit(url)
        try:
            known = parts.scheme == "http" and bool(parts.hostname) and parts.port != 0
        except ValueError:
            known = False
        if not known:
            raise ValueError(f"--vllm-url {url!r}, but it must be an address such as http://127.0.0.1:8001")
        self.url, self.host, self.port = url, str(parts.hostname), parts.port or 80
        self.prefix = parts.path.rstrip("/").removesuffix("/v1")
        self.model, self.root = self._only_model()

    def generate(
        self,
        prompts: Sequence[Tensor],
        *,
        max_new_tokens: int,
        ends: Sequence[int],
        watch: Callable[[list[list[int]]], Sequence[bool]] | None = None,
    ) -> list[list[int]]:
        """Greedy answers to prompts.

        Args:
            prompts: embeddings [L, D] of each.
            ends: tokens that end an answer.
            watch: called with the tokens of each answer so far; it tells for each whether it ends here.

        Returns:
            The tokens of each answer, the end token included.

        Raises:
            ApiError: vLLM does not answer, or refuses a prompt.
        """
        rows: list[list[int]] = [[] for _ in prompts]
        open_rows, stops = set(range(len(prompts))), [threading.Event() for _ in prompts]
        told: queue.SimpleQueue[tuple[int, list[int] | None | Exception]] = queue.SimpleQueue()

        def ask(number: int) -> None:
            try:
                for tokens in self._tokens(prompts[number], max_new_tokens, ends):
                    told.put((number, tokens))
                    if stops[number].is_set():
                        break
                told.put((number, None))
            except Exception as error:  # noqa: BLE001 - raised by the thread that waits
                told.put((number, error))

        with ThreadPoolExecutor(max(len(prompts), 1), "soundwave-vllm") as pool:
            try:
                for number in open_rows:
                    pool.submit(ask, number)
                while open_rows:
                    number, found = told.get()
                    if isinstance(found, Exception):
                        raise found
                    if found is None:
                        open_rows.discard(number)
                        continue
                    rows[number] += found
                    if watch is not None:
                        for row, ended in enumerate(watch(rows)):
                            if ended:
                                stops[row].set()
            finally:  # vLLM leaves off an answer whose connection is closed
                for stop in stops:
                    stop.set()
        return rows

    def _tokens(self, prompt: Tensor, max_new_tokens: int, ends: Sequence[int]) -> Iterator[list[int]]:
        """The tokens of an answer as they come."""
        file = io.BytesIO()
        torch.save(prompt.detach().cpu().contiguous().clone(), file)  # a view would be saved with its whole storage
        body = {
            "model": self.model,
            "prompt_embeds": base64.b64encode(file.getvalue()).decode(),
            "max_tokens": max_new_tokens,
            "stop_token_ids": sorted(ends),
            "stream": True,
            "return_token_ids": True,
            **PLAIN,
        }
        last: int | None = None
        with self._response("POST", "/v1/completions", json.dumps(body)) as response:
            for line in response:
                if not line.startswith(b"data:") or line.strip() == b"data: [DONE]":
                    continue
                event = json.loads(line[len(b"data:") :])
                if "error" in event:
                    raise ApiError(500, f"vLLM: {_message_of(event)}", code="vllm")
                for choice in event.get("choices", ()):
                    tokens = choice.get("token_ids")
                    if tokens is None and (choice.get("text") or choice.get("finish_reason") is None):
                        raise ApiError(500, "vLLM sends no token_ids; it must be 0.11 or newer", code="vllm")
                    last = tokens[-1] if tokens else last
                    if tokens:
                        yield tokens
                    if choice.get("finish_reason") == "stop" and last not in ends and ends:
                        yield [min(ends)]  # it has ended by a token that it does not send

    def _only_model(self) -> tuple[str, str]:
        """What vLLM calls its model, and the folder or Hub id that it was started with."""
        try:
            with self._response("GET", "/v1/models") as response:
                found = json.loads(response.read())["data"][0]
                return str(found["id"]), str(found.get("root") or found["id"])
        except ApiError as error:
            hint = f"start one: vllm serve MODEL/language_model --enable-prompt-embeds --port {self.port}"
            raise ValueError(f"--vllm-url {self.url}: {error.detail}; {hint}") from None
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise ValueError(f"--vllm-url {self.url}: what answers there is no vLLM; correct the address") from None

    @contextmanager
    def _response(self, method: str, path: str, body: str | None = None) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)
        try:
            connection.request(method, self.prefix + path, body, {"content-type": "application/json"} if body else {})
            response = connection.getresponse()
            if response.status != 200:
                said = _message_of(response.read(1 << 16))
                status = 400 if response.status in (400, 413, 422) else 503
                raise ApiError(status, f"vLLM answers {response.status}: {said}", code="vllm")
            yield response
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ApiError(503, f"no vLLM answers ({why})", code="vllm", retry_after=5) from None
        finally:
            connection.close()


def _message_of(body: Any) -> str:
    """What an error says, in vLLM's form or as text."""
    try:
        found = json.loads(body) if isinstance(body, bytes) else body
        found = found.get("error", found)
        text = str(found.get("message", found)) if isinstance(found, dict) else str(found)
    except (ValueError, AttributeError):
        text = body.decode("utf-8", "replace") if isinstance(body, bytes) else str(body)
    return " ".join(text.split())[:300]


class RemoteLanguageModel(nn.Module):
    """A language model whose layers are elsewhere.

    Args:
        parts: the language model without its layers.
        engine: answers the prompts.
    """

    runs_elsewhere = True  # `reason_against_drafts`

    def __init__(self, parts: Any, engine: Vllm):
        super().__init__()
        self.parts, self.engine = parts, engine
        self.config, self.generation_config = parts.config, parts.generation_config

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of tokens."""
        return self.parts.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The output embedding."""
        return self.parts.get_output_embeddings()

    @torch.no_grad()
    def generate(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        max_new_tokens: int,
        eos_token_id: Sequence[int] | None = None,
        pad_token_id: int = 0,
        stopping_criteria: Callable[[Tensor, Any], Tensor] | None = None,
        do_sample: bool = False,
    ) -> Tensor:
        """As transformers' `generate`, greedily: new tokens int64 [B, L_new], padded on the right."""

        def padded(rows: Sequence[Sequence[int]]) -> Tensor:
            size = max(map(len, rows), default=0)
            return torch.tensor([[*row, *[pad_token_id] * (size - len(row))] for row in rows], dtype=torch.int64)

        def watch(rows: list[list[int]]) -> list[bool]:
            assert stopping_criteria is not None
            return stopping_criteria(padded(rows), None).tolist()

        prompts = [row[kept.bool()] for row, kept in zip(inputs_embeds, attention_mask, strict=True)]
        rows = self.engine.generate(
            prompts,
            max_new_tokens=max_new_tokens,
            ends=list(eos_token_id or ()),
            watch=None if stopping_criteria is None else watch,
        )
        return padded(rows)


def check_merged(folder: Path) -> str:
    """The language model of a model that has no LoRA beside it.

    Raises:
        ValueError: LoRA is not merged, or the model has no language model of its own.
    """
    config = SoundwaveConfig.from_pretrained(folder)
    if config.stage == 1:
        raise ValueError(
            f"--engine vllm, but {folder} has seen stage 1 only, which uses no language model: leave it out"
        )
    if config.lora_rank:
        raise ValueError(
            f"--engine vllm, but {folder} has LoRA beside its language model; merge it first: "
            f"soundwave merge {folder} OUT, then --model OUT"
        )
    if is_released(config.language_model):
        raise ValueError(
            f"--engine vllm, but the language model of {folder} lies within a released checkpoint, which vLLM does not "
            "read; leave it out"
        )
    return config.language_model


def load_for(engine: Vllm, folder: Path) -> LoadedModel:
    """A merged model whose language model answers elsewhere.

    Raises:
        ValueError: as `check_merged`, or as `load_model`; or vLLM has another language model.
    """
    name = check_merged(folder)
    if Path(engine.root).is_dir() and Path(engine.root).resolve() != Path(resolve(name)).resolve():
        raise ValueError(f"--vllm-url {engine.url}: vLLM serves {engine.root}, but {folder} needs {resolve(name)}")
    model, processor = load_model(folder, language_model=False)
    parts: Any = load_language_model(name, model.compute_dtype, layers=False)
    model._head = None  # the same is in `parts`
    model.language_model = RemoteLanguageModel(parts.to(model.device), engine)
    return LoadedModel(model.eval(), processor)

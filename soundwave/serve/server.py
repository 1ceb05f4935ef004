"""The process of a server: what it checks before the model is loaded, its socket, its signals and its end."""

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from soundwave.data.audio import SAMPLING_RATE
from soundwave.data.collate import TRANSCRIBE_PROMPT
from soundwave.inference.answer import LoadedModel, answer, read_ctc
from soundwave.serve.app import create_app
from soundwave.serve.batches import Engine
from soundwave.serve.errors import ApiError, shutting_down
from soundwave.serve.metrics import Metrics
from soundwave.serve.settings import Limits

if TYPE_CHECKING:
    from uvicorn._types import ASGIApplication


def serve(
    loaded: LoadedModel,
    bound: socket.socket,
    *,
    name: str,
    limits: Limits,
    keys: Sequence[str] = (),
    languages: Sequence[str] = (),
    audio_first: bool = True,
    version: str = "0",
    ready: Callable[[str], None] = print,
) -> None:
    """Serve a model until a signal ends it.

    Args:
        bound: what `bind` returned; it listens once the model has read its first sound.
        name, keys, languages, audio_first, version: as in `create_app`.
        ready: called with the server's address when it listens.

    Raises:
        ValueError: the model cannot answer, because its language model is in another process that refuses to.
    """
    for name_of_logger in ("python_multipart", "uvicorn.error"):  # a line for each junk request would fill the disk
        logging.getLogger(name_of_logger).setLevel(logging.ERROR)
    try:
        warm_up(loaded)
    except ApiError as error:  # of an engine in another process
        raise ValueError(f"the model cannot answer: {error.detail}") from None
    metrics = Metrics()
    engine = Engine(loaded, limits, metrics.on_batch)
    app = create_app(
        engine,
        metrics,
        name=name,
        limits=limits,
        keys=keys,
        languages=languages,
        audio_first=audio_first,
        version=version,
    )
    config = configuration(app, limits)
    _Server(config, engine, limits.grace, ready).run(sockets=[bound])


def configuration(app: "ASGIApplication", limits: Limits) -> uvicorn.Config:
    """uvicorn's settings for an app."""
    return uvicorn.Config(
        app,
        http=partial(_Protocol, patience=limits.idle_timeout),  # type: ignore[arg-type]
        ws="none",
        loop="asyncio",
        access_log=False,
        log_level="error",
        server_header=False,
        timeout_graceful_shutdown=int(limits.grace) + 5,
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=16 << 10,
    )


class _Protocol(H11Protocol):
    """uvicorn's protocol, which would wait for the first request of a connection without an end."""

    def __init__(self, *arguments: Any, patience: float, **options: Any):
        super().__init__(*arguments, **options)
        self.patience = patience

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(self.patience, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


@torch.no_grad()
def warm_up(loaded: LoadedModel) -> None:
    """Let the model read a second of noise, so that what is compiled or allocated at first is there."""
    noise = 0.01 * np.random.default_rng(0).standard_normal(SAMPLING_RATE).astype(np.float32)
    clip = loaded.processor.features(noise)
    if loaded.model.config.stage == 1:
        read_ctc(*loaded, [clip])
    else:
        answer(*loaded, [TRANSCRIBE_PROMPT], [clip], max_new_tokens=2)


class _Server(uvicorn.Server):
    """uvicorn's server: it says when it listens, ends what is open within the grace, and exits with status 0."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace: float, ready: Callable[[str], None]):
        super().__init__(config)
        self.engine, self.grace, self.ready = engine, grace, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            self.ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Requests that are open get their answers within the grace; then they fail."""
        end = asyncio.get_running_loop().call_later(self.grace, self.engine.fail_all, shutting_down())
        await super().shutdown(sockets)
        end.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends the server gently, the second one at once. uvicorn would die by the signal at last."""
        self.force_exit = self.should_exit
        self.should_exit = True

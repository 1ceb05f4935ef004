"""The command `serve`."""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from soundwave import __version__
from soundwave.cli import common
from soundwave.cli.common import DEMO_MODEL, ModelOption

if TYPE_CHECKING:
    from soundwave.inference.answer import LoadedModel


class EngineName(str, Enum):
    """Where the language model runs."""

    here = "here"
    vllm = "vllm"


def serve(
    model: ModelOption = DEMO_MODEL,
    host: Annotated[str, typer.Option(help="Address to serve at; 0.0.0.0 is every one of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to serve at; 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None,
        typer.Option(help="What clients call the model.", show_default="the folder's name, or that above model/"),
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Windows of at most 30 s, or chats, that are answered together.")] = 16,
    max_wait_ms: Annotated[float, typer.Option(help="How long one of them waits for others, in milliseconds.")] = 20,
    max_queue: Annotated[int, typer.Option(help="Requests that may be open at a time; more are told to wait.")] = 64,
    max_upload_mb: Annotated[float, typer.Option(help="Largest upload, in MiB.")] = 25,
    max_seconds: Annotated[float, typer.Option(help="Longest recording, in seconds.")] = 3600,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer that a chat may ask for, in tokens.")] = 2048,
    max_window_tokens: Annotated[int, typer.Option(help="Longest text of a window of a transcript, in tokens.")] = 256,
    requests_per_minute: Annotated[int, typer.Option(help="Of one client; 0 is no limit.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request is given up.")] = 600,
    grace: Annotated[float, typer.Option(help="Seconds that open requests get when the server is stopped.")] = 30,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="SOUNDWAVE_API_KEY",
            help="Key that clients must send. Give it by the variable or the file: others can see a command line.",
            metavar="KEY",
            show_default=False,
        ),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with one key on a line.", metavar="FILE")] = None,
    language: Annotated[
        list[str] | None,
        typer.Option(
            help="Language that the model knows (may be repeated), such as en; requests for others are refused.",
            metavar="CODE",
        ),
    ] = None,
    engine: Annotated[
        EngineName,
        typer.Option(
            help="Where the language model runs: here, in this process, or in a vLLM server, which gets prompts as "
            "embeddings. That needs a model that `soundwave merge` wrote."
        ),
    ] = EngineName.here,
    vllm_url: Annotated[
        str, typer.Option(help="With --engine vllm: the address of `vllm serve … --enable-prompt-embeds`.")
    ] = "http://127.0.0.1:8001",
    audio_first: Annotated[
        bool,
        typer.Option(
            "--audio-first/--audio-in-place",
            help="Where the recording of a chat stands: before the words of its turn, as models are trained here, or "
            "where the client puts it.",
        ),
    ] = True,
) -> None:
    """Serve a model in OpenAI's protocol, with a page to try it.

    Endpoints: /v1/audio/transcriptions, /v1/chat/completions, /v1/models, /health, /metrics, and the page at /.
    Ctrl-C or SIGTERM ends the server after its open requests.
    """
    from soundwave.serve.settings import (
        Limits,
        bind,
        check_installed,
        check_languages,
        name_of,
        read_keys,
    )

    limits = Limits(
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        max_queue=max_queue,
        max_upload_mb=max_upload_mb,
        max_seconds=max_seconds,
        max_new_tokens=max_new_tokens,
        max_window_tokens=max_window_tokens,
        requests_per_minute=requests_per_minute,
        timeout=timeout,
        grace=grace,
    )
    keys, languages = read_keys(api_key, api_key_file), check_languages(language or ())
    check_installed()
    model = common.model_folder(model)
    bound = bind(host, port)
    if not keys and not bound.getsockname()[0].startswith(("127.", "::1")):
        common.warn("everybody who reaches this address may use the model; give a key with --api-key-file", "note")
    loaded = common.load_model(model) if engine is EngineName.here else _loaded_for_vllm(model, vllm_url)
    from soundwave.serve.server import serve as serve_model

    name = name or name_of(model)
    serve_model(
        loaded,
        bound,
        name=name,
        limits=limits,
        keys=keys,
        languages=languages,
        audio_first=audio_first,
        version=__version__,
        ready=lambda address: print(f"serving {name} at {address}", flush=True),
    )


def _loaded_for_vllm(folder: Path, url: str) -> "LoadedModel":
    common.quiet_transformers()
    from soundwave.hardware import keep_memory_flat
    from soundwave.serve.engine import Vllm, check_merged, load_for

    check_merged(folder)
    server = Vllm(url)
    keep_memory_flat()
    return load_for(server, folder)

"""The limits, keys and address of a server, checked before anything is loaded."""

import importlib.util
import math
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

MEBIBYTE = 1 << 20
LEAST_KEY = 8  # characters
NEEDS = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")


@dataclass(frozen=True)
class Limits:
    """What a server does at most.

    Attributes:
        max_batch: windows of at most 30 s, or chats, that the model answers together.
        max_wait_ms: how long the oldest of them waits for more.
        max_queue: requests that are open at a time, from their first byte to the end of their answer.
        max_upload_mb: MiB of the body of a request.
        max_seconds: length of a recording.
        max_new_tokens: longest answer in a chat that may be asked for, in tokens.
        max_window_tokens: longest text of a window of a transcript, in tokens.
        requests_per_minute: of one client, known by its key or its address; 0 is no limit.
        timeout: seconds from the end of an upload to the end of its answer.
        upload_timeout: seconds that an upload may take in all.
        idle_timeout: seconds without a byte after which a client has left.
        grace: seconds that open requests get when the server stops.
    """

    max_batch: int = 16
    max_wait_ms: float = 20.0
    max_queue: int = 64
    max_upload_mb: float = 25.0
    max_seconds: float = 3600.0
    max_new_tokens: int = 2048
    max_window_tokens: int = 256
    requests_per_minute: int = 0
    timeout: float = 600.0
    upload_timeout: float = 120.0
    idle_timeout: float = 15.0
    grace: float = 30.0

    def __post_init__(self) -> None:
        """ValueError: a limit that lets nothing through, or is no number."""
        may_be_zero = {"max_wait_ms", "requests_per_minute", "grace"}
        for field in fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value) or value < 0 or (value == 0 and field.name not in may_be_zero):
                least = "0 or more" if field.name in may_be_zero else "more than 0"
                raise ValueError(f"--{field.name.replace('_', '-')} {value:g}, but it must be {least}")

    @property
    def max_upload(self) -> int:
        """Bytes of a body."""
        return int(self.max_upload_mb * MEBIBYTE)


def check_installed() -> None:
    """ValueError: a package is missing that only the server needs."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} is not installed; pip install 'soundwave-fused[serve]'")


def check_languages(languages: Sequence[str]) -> list[str]:
    """The codes in small letters. ValueError: one is no code."""
    for code in languages:
        if not re.fullmatch("[A-Za-z]{2,3}", code):
            raise ValueError(f"--language {code!r}, but it must be a code such as en")
    return [code.lower() for code in languages]


def name_of(folder: Path) -> str:
    """What the model of a folder is called: the folder's name, or that above it if it is only `model`."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" and folder.parent.name else folder.name


def bind(host: str, port: int) -> socket.socket:
    """A socket for the server, which does not listen yet.

    Raises:
        ValueError: the address is no address of this machine, or somebody else has it.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"cannot serve at {host}, port {port} ({reason}); give another --host or --port") from None
    return bound


def read_keys(key: str | None, file: Path | None) -> list[str]:
    """The keys of an argument, and of a file with one key a line, where empty lines and those with # are no keys.

    Raises:
        ValueError: a key is too short or has characters that a header cannot hold; the file has no key.
        OSError: the file cannot be read.
    """
    keys = [key] if key is not None else []
    if file is not None:
        lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise ValueError(f"{file} holds no key; write one on a line")
        keys += found
    for number, one in enumerate(keys):
        if len(one) < LEAST_KEY or not one.isascii() or not one.isprintable() or " " in one:
            raise ValueError(f"API key {number + 1} must have {LEAST_KEY} or more printable characters without spaces")
    return keys

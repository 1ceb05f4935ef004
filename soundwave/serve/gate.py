"""What is refused before a request's body is read, or while it is: keys, rate, a full queue, size, slow clients."""

import hmac
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from soundwave.serve.errors import ApiError
from soundwave.serve.settings import Limits

GUARDED = "/v1/"  # paths that want a key and count for the rate
WORKING = ("/v1/audio/", "/v1/chat/")  # those that take a place in the queue
SMALL_BODY = 64 << 10  # bytes, of all other paths
LINGER_SECONDS, LINGER_BYTES = 2.0, 16 << 20  # of a body that nobody wants, so that its client reads the answer
SEND_SECONDS = 60.0  # in which a client takes a part of an answer
KNOWN_CLIENTS = 10_000


class Gate:
    """ASGI middleware around the whole app.

    Args:
        app: the app.
        limits: of these, `max_queue`, `max_upload_mb`, `requests_per_minute` and both upload timeouts are the gate's.
        keys: a client must send one of them; none is wanted if there are none.
        retry_after: seconds after which a place in a full queue may be free.
        on_end: called after each request with its path, its status (499: the client has left) and its seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        keys: Sequence[str] = (),
        retry_after: Callable[[], int] = lambda: 1,
        on_end: Callable[[str, int, float], None] = lambda *_: None,
    ):
        self.app, self.limits, self.retry_after, self.on_end = app, limits, retry_after, on_end
        self.keys = [key.encode() for key in keys]
        self.open = 0
        self.rates: dict[str, tuple[float, float]] = {}  # of each client: requests it may send now, as of when

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI call."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        works = scope["path"].startswith(WORKING) and scope["method"] == "POST"
        request = _Request(scope, receive, send, self.limits, self.limits.max_upload if works else SMALL_BODY)
        began, place = time.monotonic(), False
        try:
            try:
                if scope["path"].startswith(GUARDED):
                    self._check_rate(self._client(scope))
                if works:
                    if self.open >= self.limits.max_queue:
                        raise ApiError(
                            429,
                            f"{self.open} requests are open, as many as this server takes; try again",
                            code="queue_full",
                            retry_after=self.retry_after(),
                        )
                    self.open += 1
                    place = True
                request.check_length()
                await self.app(scope, request.receive, request.send)
            except ApiError as error:  # of the gate; those of the app are answered there
                await request.refuse(error)
        except TimeoutError:  # the client does not take its answer: without an end of it the connection is closed
            pass
        finally:
            self.open -= place
            self.on_end(scope["path"], request.status or 499, time.monotonic() - began)

    def _client(self, scope: Scope) -> str:
        """Who sends a request: its key, or its address where no key is wanted.

        Raises:
            ApiError: the key is missing or wrong.
        """
        if not self.keys:
            return (scope.get("client") or ("",))[0]
        scheme, _, given = _header(scope, b"authorization").partition(b" ")
        given = given.strip()
        # All keys are compared, each in a time that does not depend on where it differs.
        if sum(hmac.compare_digest(key, given) for key in self.keys) and scheme.lower() == b"bearer":
            return given.decode("latin-1")
        what = "no API key was sent" if not given else "the API key that was sent is none of this server's"
        raise ApiError(401, f"{what}; send the header 'Authorization: Bearer KEY'", code="invalid_api_key")

    def _check_rate(self, client: str) -> None:
        """ApiError: the client has sent more requests than it may."""
        most = self.limits.requests_per_minute
        if not most:
            return
        now = time.monotonic()
        left, then = self.rates.get(client, (float(most), now))
        left = min(most, left + (now - then) * most / 60)
        if left < 1:
            raise ApiError(
                429,
                f"more than {most} requests a minute; try again",
                code="rate_limit_exceeded",
                retry_after=int((1 - left) * 60 / most) + 1,
            )
        if client not in self.rates and len(self.rates) >= KNOWN_CLIENTS:  # those of a minute ago may send all again
            self.rates = {name: rate for name, rate in self.rates.items() if now - rate[1] < 60}
        self.rates[client] = left - 1, now


class _Request:
    """One request's way through the gate."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: Limits, most: int):
        self.scope, self._receive, self._send, self.limits, self.most = scope, receive, send, limits, most
        self.deadline = time.monotonic() + limits.upload_timeout
        self.got, self.status = 0, 0
        self.is_read = self.left = False

    def check_length(self) -> None:
        """ApiError: the header tells of a body that is too large, or none that can be read."""
        length = _header(self.scope, b"content-length")
        if length.isdigit() and int(length[:20]) > self.most:
            raise self._too_large(int(length[:20]))

    def _too_large(self, size: int) -> ApiError:
        return ApiError(
            413,
            f"the body has {'' if size > self.got else 'more than '}{size} bytes, but this server takes {self.most} at "
            "most; send a shorter or compressed recording",
            param="file" if self.scope["path"].startswith("/v1/audio/") else None,
            code="upload_too_large",
        )

    async def receive(self) -> Message:
        """The next part of the body, or the news that the client has left."""
        if self.is_read:
            message = await self._receive()
            self.left |= message["type"] == "http.disconnect"
            return message
        left = self.deadline - time.monotonic()
        try:
            with anyio.fail_after(max(min(left, self.limits.idle_timeout), 0)):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, "the upload took too long; send it again", code="upload_timeout") from None
        if message["type"] != "http.request":
            self.is_read = self.left = True
            return message
        self.got += len(message.get("body", b""))
        self.is_read = not message.get("more_body", False)
        if self.got > self.most:
            raise self._too_large(self.got)
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the answer. TimeoutError: the client does not take it.

        An answer to a request that is not read to its end closes the connection. Before, some of the rest is read and
        dropped: otherwise the system would reset the connection, and many a client would not see the answer.
        """
        if message["type"] == "http.response.start":
            self.status = 499 if self.left else message["status"]
            if self.is_unread:
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
        last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if last and self.is_unread:
            await self._send_in_time({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b""}
        await self._send_in_time(message)

    @property
    def is_unread(self) -> bool:
        """Whether a body is announced that is not read to its end."""
        announced = _header(self.scope, b"content-length") not in (b"", b"0") or _header(
            self.scope, b"transfer-encoding"
        )
        return bool(announced) and not self.is_read

    async def _send_in_time(self, message: Message) -> None:
        with anyio.fail_after(SEND_SECONDS):
            await self._send(message)

    async def _linger(self) -> None:
        got = 0
        with anyio.move_on_after(LINGER_SECONDS):
            while got < LINGER_BYTES:
                message = await self._receive()
                got += len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return

    async def refuse(self, error: ApiError) -> None:
        """Send an error, unless an answer has begun."""
        if self.status:
            return
        body = json.dumps(error.body()).encode()
        headers: list[tuple[bytes, bytes]] = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *((name.encode(), value.encode()) for name, value in (error.headers or {}).items()),
        ]
        await self.send({"type": "http.response.start", "status": error.status_code, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def _header(scope: Scope, name: bytes) -> bytes:
    headers: Any = scope["headers"]
    return next((value for key, value in headers if key == name), b"")

"""Errors in OpenAI's form: `{"error": {"message": …, "type": …, "param": …, "code": …}}`."""

from typing import Any

from starlette.exceptions import HTTPException

TYPES = {401: "authentication_error", 404: "invalid_request_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """A request that gets no answer, and why.

    Args:
        status: HTTP status.
        message: what was found and what to do, on one line.
        param: the parameter that is at fault.
        code: a word by which programs tell errors apart.
        retry_after: seconds after which the client may try again. Without it the client is told not to.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        # OpenAI's client tries again after 408, 409, 429 and 5xx, unless this header says no.
        headers = {"x-should-retry": "false"} if retry_after is None else {"retry-after": str(retry_after)}
        super().__init__(status, " ".join(message.split()), headers)
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        """What is sent as JSON."""
        kind = TYPES.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}


def shutting_down() -> ApiError:
    """The server stops."""
    return ApiError(503, "the server is shutting down; try again", code="shutting_down", retry_after=5)

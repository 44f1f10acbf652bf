"""Refusals in the JSON shape of OpenAI's API."""

from typing import Any

from starlette.responses import JSONResponse

_OUTCOMES = {408: "timeout", 429: "full", 500: "failed", 503: "unavailable", 504: "timeout"}


class ApiError(Exception):
    """What is wrong with a request, in one line, with the HTTP status that says so; `param` names the field."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    @property
    def outcome(self) -> str:
        """The kind of end that metrics count it as."""
        return _OUTCOMES.get(self.status, "invalid")

    def body(self) -> dict[str, Any]:
        """The JSON object that says it."""
        kind = "rate_limit_error" if self.status == 429 else "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return JSONResponse(self.body(), self.status, headers)

"""What a client is told when something is wrong: OpenAI's error shape, a status, and the request's id."""

from __future__ import annotations

import math
from typing import Any

from fastapi.responses import JSONResponse

from otil_xdit.serve.job import Job

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class Problem(Exception):
    """An answer other than the one that was asked for.

    Args:
        status: of HTTP.
        message: for people.
        param: the field that is wrong, where one is.
        code: for programs.
        retry_after: seconds after which to try again; None where that would not help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    def body(self, request_id: str) -> dict[str, Any]:
        """Return the answer: `error` as OpenAI's clients read it, `detail` for those of AUTOMATIC1111."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        shown = f"{self.message} (request {request_id})" if self.status >= 500 else self.message
        error = {"message": shown, "type": kind, "param": self.param, "code": self.code}
        return {"error": error, "detail": shown}

    def response(self, request_id: str) -> JSONResponse:
        """Return the whole answer."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(request_id), self.status, headers)


def problem_of(job: Job) -> Problem | None:
    """Return what to answer for a job that is over; None where it has all its images."""
    if job.stage == "refused":
        return Problem(422, job.problem, code="refused_by_model")
    if job.stage == "cancelled":
        return Problem(499, job.problem, code="cancelled")
    if job.stage == "late":
        return Problem(504, job.problem, code="timeout")
    if job.stage == "unserved":
        return Problem(503, job.problem, code="unavailable", retry_after=5)
    if job.stage == "failed":
        return Problem(500, f"the image was lost: {job.problem}", code="ranks_failed")
    return None

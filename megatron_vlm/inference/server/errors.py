"""Errors of requests: a status, a message for the person who sent it, and the shape of the protocol."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from megatron_vlm.inference.request import EngineError, PromptTooLong, QueueFull

_MOST_PROBLEMS = 3
_LONGEST_MESSAGE = 1000
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorBody(BaseModel):
    """What OpenAI's clients read."""

    error: ErrorDetail


class MegatronErrorBody(BaseModel):
    """What Megatron-LM's client reads."""

    message: str


def error_responses(body: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: 400, 401, 404, 408, 413, 429 and 503 have the same body."""
    return {
        "4XX": {"model": body, "description": "The request is wrong, too large, or one too many."},
        "5XX": {"model": body, "description": "The model is being loaded, or the engine has failed."},
    }


class ApiError(Exception):
    """An answer with an error status."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    @property
    def message(self) -> str:
        """Printable, and not longer than a client can show."""
        text = str(self).encode("utf-8", "backslashreplace").decode()
        return text if len(text) <= _LONGEST_MESSAGE else text[:_LONGEST_MESSAGE] + " ..."

    def as_openai(self) -> dict[str, Any]:
        """The body that OpenAI's clients read."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, path: str) -> JSONResponse:
        """In the shape of the protocol that `path` belongs to: Megatron-LM's client reads `message`."""
        body = {"message": self.message} if path.rstrip("/") == "/api" else self.as_openai()
        return JSONResponse(body, self.status, self.headers)


def api_error(error: Exception) -> ApiError:
    """The answer to an error of the engine or of a prompt."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), headers={"Retry-After": str(math.ceil(error.retry_after))})
    if isinstance(error, EngineError):
        return ApiError(503, str(error))
    if isinstance(error, PromptTooLong):
        return ApiError(400, str(error), code="context_length_exceeded")
    return ApiError(400, str(error))


def field_path(location: Sequence[int | str]) -> str:
    """`messages[0].content`, from where pydantic found a problem."""
    path = ""
    for item in location:
        path += f"[{item}]" if isinstance(item, int) else f".{item}" if path else str(item)
    return path


def _validation_message(error: RequestValidationError) -> tuple[str, str | None]:
    """(all problems, the first problem's field)"""
    problems, first = [], None
    for problem in error.errors():
        location = [item for item in problem["loc"][1:] if not str(item).startswith("kind:")]
        if problem["type"] == "json_invalid":
            return f"The body is not JSON: {problem['ctx']['error']} at character {problem['loc'][-1]}.", None
        if not location and problem["type"] == "value_error":
            problems.append(str(problem["ctx"]["error"]))
            continue
        if not location:
            return "The body must be a JSON object, with the header Content-Type: application/json.", None
        path = field_path(location)
        first = first or path
        if problem["type"] == "extra_forbidden":
            problems.append(f"{path}: there is no such field")
        elif problem["type"] == "missing":
            problems.append(f"{path}: this field is required")
        else:
            problems.append(f"{path}: {problem['msg'].removeprefix('Value error, ')}")
    more = len(problems) - _MOST_PROBLEMS
    text = "; ".join(problems[:_MOST_PROBLEMS]) + (f"; and {more} more problems" if more > 0 else "")
    return text, first


def add_error_handlers(app: FastAPI) -> None:
    """Every error becomes a body with a message; what nobody foresaw is status 500 and a line in the log."""

    @app.exception_handler(ApiError)
    async def _api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response(request.url.path)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        message, param = _validation_message(error)
        return ApiError(400, message, param).response(request.url.path)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"There is no {request.url.path} here. GET /openapi.json lists what there is."
        elif error.status_code == 405:
            message = f"{request.method} {request.url.path}: use another method. GET /openapi.json lists them."
        elif error.status_code == 400:
            message = "The body cannot be read as JSON: it is nested too deeply, or has a number with too many digits."
        return ApiError(error.status_code, message, headers=dict(error.headers or {})).response(request.url.path)

    @app.exception_handler(Exception)
    async def _unforeseen(request: Request, error: Exception) -> JSONResponse:
        return ApiError(500, "The server has made a mistake; its log has the details.").response(request.url.path)

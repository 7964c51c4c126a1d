"""The application: all routes, limits and errors, without a socket."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from megatron_vlm import __version__
from megatron_vlm.inference.server.backend import Backend
from megatron_vlm.inference.server.errors import (
    MegatronErrorBody,
    OpenAIErrorBody,
    add_error_handlers,
    error_responses,
)
from megatron_vlm.inference.server.limits import Limits
from megatron_vlm.inference.server.megatron_api import megatron_router
from megatron_vlm.inference.server.openai.chat import chat_router
from megatron_vlm.inference.server.openai.completions import completions_router
from megatron_vlm.inference.server.page import page_router

_DESCRIPTION = "Text generation from text and images: OpenAI's protocol, and that of Megatron-LM's server."


def create_app(backend: Backend) -> FastAPI:
    """The application of a server whose engine may still be loading."""
    app = FastAPI(title="megatron-vlm", version=__version__, description=_DESCRIPTION, redoc_url=None)
    add_error_handlers(app)
    app.include_router(chat_router(backend), responses=error_responses(OpenAIErrorBody))
    app.include_router(completions_router(backend), responses=error_responses(OpenAIErrorBody))
    app.include_router(megatron_router(backend), responses=error_responses(MegatronErrorBody))
    app.include_router(page_router())
    _add_information(app, backend)
    documented = app.openapi()["paths"]
    routes = {"/", *documented, *(path.removeprefix("/v1") for path in documented)}
    app.add_middleware(Limits, settings=backend.settings, metrics=backend.metrics, routes=routes)
    return app


def _add_information(app: FastAPI, backend: Backend) -> None:
    errors = error_responses(OpenAIErrorBody)

    @app.get("/v1/models", tags=["OpenAI"], response_model=None, responses=errors, summary="The served model")
    @app.get("/models", response_model=None, include_in_schema=False)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(backend)]}

    @app.get(
        "/v1/models/{name:path}", tags=["OpenAI"], response_model=None, responses=errors, summary="The served model"
    )
    @app.get("/models/{name:path}", response_model=None, include_in_schema=False)
    async def model(name: str) -> dict[str, Any]:
        backend.check_model(name)
        return _model(backend)

    not_ready: dict[int | str, dict[str, Any]] = {503: {"description": "`details` has the reason."}}

    @app.get(
        "/health",
        tags=["operation"],
        response_model=None,
        responses=not_ready,
        summary="200 if requests are answered, else 503",
    )
    @app.get("/v1/health", response_model=None, include_in_schema=False)
    async def health() -> Response:
        reason = backend.unavailable()
        if reason is None:
            return JSONResponse({"status": "ok", "service": "megatron-vlm", "ready": True})
        return JSONResponse({"status": "error", "service": "megatron-vlm", "ready": False, "details": reason}, 503)

    @app.get(
        "/metrics",
        tags=["operation"],
        response_class=PlainTextResponse,
        responses={401: {"model": OpenAIErrorBody, "description": "No API key, or a wrong one."}},
        summary="Metrics in Prometheus' text format",
    )
    @app.get("/v1/metrics", response_class=PlainTextResponse, include_in_schema=False)
    async def metrics(request: Request) -> Response:
        page, content_type = backend.metrics.page(request.headers.get("accept"))
        return Response(page, headers={"Content-Type": content_type})


def _model(backend: Backend) -> dict[str, Any]:
    engine = backend.engine
    return {
        "id": backend.settings.model_name,
        "object": "model",
        "created": backend.created,
        "owned_by": "megatron-vlm",
        "max_model_len": engine.max_sequence_length,
    }

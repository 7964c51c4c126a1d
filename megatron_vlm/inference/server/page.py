"""`GET /`: the chat page, one file without anything from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

from fastapi import APIRouter
from fastapi.responses import HTMLResponse


def page_router() -> APIRouter:
    """The page, whose own script and styles are the only ones that may run."""
    page = resources.files(__package__).joinpath("chat_page.html").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; connect-src 'self'; img-src data: blob:; script-src {_source(page, 'script')}; "
        f"style-src {_source(page, 'style')}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
    router = APIRouter()

    @router.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def chat_page() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)

    return router


def _source(page: str, tag: str) -> str:
    """The hash by which a browser knows the page's inline script or style."""
    match = re.search(f"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
    assert match is not None
    return f"'sha256-{base64.b64encode(hashlib.sha256(match[1].encode()).digest()).decode()}'"

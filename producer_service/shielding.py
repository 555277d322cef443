"""Security headers of every response, and the largest body of a request. Plain ASGI."""

from __future__ import annotations

from http import HTTPStatus
from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BODY: Final = 16 * 1024 * 1024
"""Bytes: enough for the most and longest messages, in characters of one byte, with some reserve."""

HEADERS: Final = {
    # The page loads nothing from other sites, and has no inline scripts or styles.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Shielding:
    """Adds headers to each response, and refuses bodies above `LARGEST_BODY` bytes with 413.

    Browsers may cache the page and its files, but must check each time whether they changed (a 304): there is no build
    step that would give each version its own name. Browsers must not cache other responses.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app for one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        cached = scope["path"] == "/" or scope["path"].startswith("/static/")
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > LARGEST_BODY:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The request is too large.")
            return message

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("cache-control", "no-cache" if cached else "no-store")
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, counted, with_headers)

"""The gateway in front of the web's processes: what nginx would be. A browser knows its address alone."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence

import httpx

from examples.news.web import LOOK_EVERY

AWAY = b"retry: 1000\nevent: away\ndata:\n\n"
"""What a browser gets if no process is up: it comes again after that many milliseconds."""

log = logging.getLogger("news")


class Gateway:
    """Passes streams on, each from one of the processes that are up, in turn.

    Args:
        bases: the addresses of the processes, as in `http://127.0.0.1:8001`.

    """

    def __init__(self, bases: Sequence[str]) -> None:
        self._bases = list(bases)
        # A process that says nothing for so long is not there: it sends a comment each second.
        self._http = httpx.AsyncClient(timeout=httpx.Timeout(5 * LOOK_EVERY, connect=1), trust_env=False)
        self.is_closing = False

    def close(self) -> None:
        """Let all streams end, with the next thing that comes: the process stops."""
        self.is_closing = True

    async def stream(self, choices: Sequence[str], after: int | None) -> AsyncGenerator[bytes, None]:
        """Pass on a stream until it ends. If its process is lost, the browser comes again, and says what it has."""
        headers = {} if after is None else {"last-event-id": str(after)}
        self._bases.append(self._bases.pop(0))
        for base in tuple(self._bases):
            params = {"choices": list(choices)}
            try:
                async with self._http.stream("GET", f"{base}/live", params=params, headers=headers) as answer:
                    answer.raise_for_status()
                    async for chunk in answer.aiter_raw():
                        yield chunk
                        if self.is_closing:
                            return
                    return
            except (httpx.ConnectError, httpx.ConnectTimeout, httpx.HTTPStatusError):
                continue  # it is not up: the next one
            except httpx.TransportError as error:
                log.warning("%s was lost while it served a browser: %r", base, error)
                return
        yield AWAY

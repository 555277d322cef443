"""Cancels the task of a request when its user disconnects, and so also the calls that the task awaits.

No ASGI server does that by itself: an app learns that a user has left only when it calls `receive`.
"""

from __future__ import annotations

import asyncio
from typing import Final

from rpcq.web.asgi import App, Message, Receive, Scope, Send

DISCONNECT: Final = "http.disconnect"


class CancelOnDisconnect:
    """ASGI middleware: a user who disconnects before the response is complete cancels the task of the request.

    A call that this task awaits is cancelled with it, and the worker cancels the handler. Put work that has to be done
    even if the user leaves into a task of its own, or after the end of the response.

    The cancellation ends in this middleware, and no response is sent, since the user has left. A cancellation from
    elsewhere passes through, and so does every exception.

    The app can still receive `http.disconnect`: a task that waits in `receive` when the user leaves, for example since
    it reads the body, gets the message and is not cancelled.

    The middleware reads at most one message ahead of the app, so a body is streamed in bounded memory. Therefore, if
    the user leaves in the middle of a body that the app does not read, it notices that only when the app reads on. If
    the user waits for `100 Continue`, it reads nothing before the app does. WebSockets and lifespans are not changed.

    Put it outside all other middleware: add it last. asyncio only.

    Args:
        app: the ASGI app that it wraps.

    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app for one connection."""
        if scope["type"] != "http" or (task := asyncio.current_task()) is None:
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(receive, send, task)
        if not any(name.lower() == b"expect" for name, _ in scope.get("headers", ())):
            exchange.wanted.set()
        pump = asyncio.create_task(exchange.pump())
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:
            if not exchange.uncancel():
                raise
        except BaseException:
            exchange.uncancel()  # the app raised another error, which must not be hidden
            raise
        else:
            exchange.uncancel()  # the app caught the cancellation
        finally:
            exchange.over = True
            pump.cancel()
            await asyncio.wait([pump])


class _Exchange:
    """One request: the message that was received and not yet taken, and whether the user has left.

    Attributes:
        wanted: set when messages may be received: at once, or when the app asks for the first one.
        over: nothing is left to cancel: the response is complete, or the app has returned.

    """

    def __init__(self, receive: Receive, send: Send, task: asyncio.Task[object]) -> None:
        self.wanted = asyncio.Event()
        self.over = False
        self._receive = receive
        self._send = send
        self._task = task
        self._cancelling = task.cancelling()
        self._cancelled = False
        self._listening = False  # the task itself waits in `receive`
        self._there = asyncio.Event()
        self._taken = asyncio.Event()
        self._message: Message | None = None
        self._last: Message | None = None  # the disconnect; each further `receive` returns it again
        self._error: Exception | None = None

    async def pump(self) -> None:
        """Receive messages as the app takes them, until the disconnect."""
        await self.wanted.wait()
        try:
            while (message := await self._receive())["type"] != DISCONNECT:
                self._message = message
                self._there.set()
                # After the end of the body, only the disconnect can come.
                while message.get("more_body", False) and self._message is not None:
                    self._taken.clear()
                    await self._taken.wait()
            self._last = message
        except Exception as error:  # noqa: BLE001 - the app gets it, as without this middleware
            self._error = error
        self._there.set()
        if self._last is not None:
            self._left()

    async def receive(self) -> Message:
        """The `receive` of the app. Cancelling it loses no message."""
        self.wanted.set()
        own = asyncio.current_task() is self._task
        while self._message is None and self._last is None and self._error is None:
            self._there.clear()
            if own:
                self._listening = True
            try:
                await self._there.wait()
            finally:
                if own:
                    self._listening = False
        if self._message is not None:
            message, self._message = self._message, None
            self._taken.set()
            return message
        if self._error is not None:
            raise self._error
        return self._last or {"type": DISCONNECT}

    async def send(self, message: Message) -> None:
        """The `send` of the app."""
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.over = True  # set before sending: the server may end the request during `send`
        await self._send(message)

    def uncancel(self) -> bool:
        """Take back our own cancellation, as `asyncio.timeout` does; return whether no other cancellation is left."""
        if not self._cancelled:
            return False
        self._cancelled = False
        return self._task.uncancel() <= self._cancelling

    def _left(self) -> None:
        # A task that was already cancelled from elsewhere is cleaning up: do not cancel it again.
        if not self.over and not self._listening and self._task.cancelling() <= self._cancelling:
            self._cancelled = self._task.cancel()

"""Users who leave: their request's task is cancelled, and so the calls that it waits for.

No ASGI server does that by itself: it tells an app of a user who left only where the app asks, by `receive`.
"""

from __future__ import annotations

import asyncio
from typing import Final

from rpcq.web.asgi import App, Message, Receive, Scope, Send

DISCONNECT: Final = "http.disconnect"


class CancelOnDisconnect:
    """ASGI middleware: a user who disconnects before the response is complete cancels the task of the request.

    A call that this task awaits is cancelled with it, and the worker cancels the handler. Work that has to be done
    whether or not the user stays belongs in a task of its own, or behind the end of the response.

    The cancellation goes no further than this middleware, and no response is sent: there is nobody to take it. A
    cancellation from elsewhere goes through, and so does every exception.

    The app itself still gets `http.disconnect` where it asks: a task that waits in `receive` when the user leaves, as
    one that reads the body does, gets the message and is not cancelled.

    It reads ahead of the app by one message at most, so that a body is streamed in bounded memory; for the same reason,
    a user who leaves in the middle of a body that the app does not read is noticed once it does. Where the user waits
    for `100 Continue`, nothing is read before the app asks. WebSockets and lifespans pass untouched.

    Put it outside of all other middleware, which means to add it last. asyncio only.

    Args:
        app: the ASGI app inside.

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
            exchange.uncancel()  # the app made something else of it, which is not for here to hide
            raise
        else:
            exchange.uncancel()  # the app kept it for itself
        finally:
            exchange.over = True
            pump.cancel()
            await asyncio.wait([pump])


class _Exchange:
    """One request: what was received and not yet taken, and whether its user has left.

    Attributes:
        wanted: set once the app has asked for a message, or where that need not be waited for.
        over: there is nothing more to cancel: the response is complete, or the app has returned.

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
        self._last: Message | None = None  # the disconnect, which can be received again and again
        self._error: Exception | None = None

    async def pump(self) -> None:
        """Receive as the app takes, up to the disconnect."""
        await self.wanted.wait()
        try:
            while (message := await self._receive())["type"] != DISCONNECT:
                self._message = message
                self._there.set()
                # What comes after the end of the body can only be the disconnect.
                while message.get("more_body", False) and self._message is not None:
                    self._taken.clear()
                    await self._taken.wait()
            self._last = message
        except Exception as error:  # noqa: BLE001 - it is the app's to have, as without this middleware
            self._error = error
        self._there.set()
        if self._last is not None:
            self._left()

    async def receive(self) -> Message:
        """The app's `receive`. Cancelling it loses no message."""
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
        """The app's `send`."""
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.over = True  # before it is sent: the server may end the exchange while it is
        await self._send(message)

    def uncancel(self) -> bool:
        """Take back a cancellation of ours, as `asyncio.timeout` does; whether it was that, and nobody else's."""
        if not self._cancelled:
            return False
        self._cancelled = False
        return self._task.uncancel() <= self._cancelling

    def _left(self) -> None:
        # A task that somebody else has cancelled is cleaning up, and is not disturbed.
        if not self.over and not self._listening and self._task.cancelling() <= self._cancelling:
            self._cancelled = self._task.cancel()

"""Runs coroutines for threads that block: in one event loop of this process, which has a thread of its own.

The loop starts when it is first needed, and ends with the process. After a fork the child has none, and starts its own.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import socket
import threading
from _thread import allocate_lock
from collections.abc import Callable, Coroutine
from importlib.util import find_spec
from typing import Any, Final, TypeVar

from rpcq.errors import ClosedError, RpcqError, UsageError
from rpcq.runtime import deadline

T = TypeVar("T")

CANCEL_TIMEOUT: Final = 1.0
"""Seconds that a thread which was interrupted waits until what it waited for is cancelled."""

LOOK_AGAIN: Final = 1.0
"""Seconds between two looks whether the event loop still runs: if it is another thread's, it may end."""

STOP_TIMEOUT: Final = 5.0
"""Seconds that the thread of the event loop has to end with the process. After that, it is left behind."""


class Abandoned(Exception):
    """The event loop ended before the coroutine did."""


class _Wait:
    """A thread that waits for a coroutine."""

    __slots__ = ("_args", "_ended", "_function", "_given_up", "_loop", "_task", "error", "value")

    def __init__(self, loop: asyncio.AbstractEventLoop, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._loop = loop
        self._function = function
        self._args = args
        self._ended = allocate_lock()  # cheaper than an event; held until the coroutine has ended
        self._ended.acquire()
        self._given_up = False
        self._task: asyncio.Task[None] | None = None
        self.value: Any = None
        self.error: BaseException | None = Abandoned()  # until the coroutine has ended

    def wait(self) -> None:
        """Start the coroutine, and wait until it has ended. If this is interrupted, it is cancelled."""
        try:
            # The loop runs this in a copy of this thread's context: deadlines and traces are inherited.
            self._loop.call_soon_threadsafe(self._start)
            while not self._ended.acquire(timeout=LOOK_AGAIN) and self._loop.is_running():
                pass
        except BaseException:  # also what a handler of a signal raises
            if self._loop.is_running():
                self._loop.call_soon_threadsafe(self._give_up)
                self._ended.acquire(timeout=CANCEL_TIMEOUT)
            raise

    # In the event loop.

    def _start(self) -> None:
        if not self._given_up:
            self._task = self._loop.create_task(self._run())

    async def _run(self) -> None:
        try:
            self.value = await self._function(*self._args)
            self.error = None
        except BaseException as error:  # noqa: BLE001 - the waiting thread raises it
            self.error = error
        finally:
            self._ended.release()

    def _give_up(self) -> None:
        self._given_up = True
        if self._task is not None:
            self._task.cancel()
        else:
            self._ended.release()


def run(loop: asyncio.AbstractEventLoop, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
    """Run a coroutine function in an event loop of another thread, in a copy of this thread's context, and wait for it.

    If this thread is interrupted (`KeyboardInterrupt`, or what else a handler of a signal raises), the coroutine is
    cancelled.

    Raises:
        UsageError: this thread runs that event loop, or an `async def` handler.
        Abandoned: the event loop ended before the coroutine did.

    """
    check_may_block(loop)
    wait = _Wait(loop, function, args)
    try:
        wait.wait()
    except RuntimeError as error:
        if loop.is_closed():
            raise Abandoned from error
        raise
    if wait.error is None:
        value: T = wait.value
        return value
    failed, wait.error = wait.error, None
    try:
        if isinstance(failed, asyncio.CancelledError):
            raise Abandoned
        if isinstance(failed, RpcqError):
            failed.__traceback__ = None  # the frames of the other thread say nothing to the caller
        raise failed
    finally:
        del failed  # its traceback holds this frame


def check_may_block(loop: asyncio.AbstractEventLoop | None) -> None:
    """Check that this thread may wait for something in an event loop.

    A thread with another running loop may: a notebook runs its cells in one, and so it waits as for any blocking code.

    Raises:
        UsageError: it runs that loop, or an `async def` handler.

    """
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        return
    if deadline.current.get() is not None:
        raise UsageError(
            "an `async def` handler must not use a blocking client, which would stop the worker's event loop; use "
            "rpcq.Client there, or make the handler a `def`"
        )
    if running is loop:
        raise UsageError(
            "a blocking call must not wait for the event loop of its own thread; use rpcq.Client there, or call in "
            "another thread: await asyncio.to_thread(...)"
        )


def runs_here(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether this thread runs that event loop."""
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


class _LoopThread:
    """An event loop in a daemon thread.

    Raises:
        ClosedError: there can be no other thread: the process ends, or has as many as it may have.

    """

    def __init__(self) -> None:
        self.loop = _new_loop()
        self._last: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="rpcq.sync", daemon=True)
        runs = threading.Event()
        self.loop.call_soon(runs.set)
        try:
            self._thread.start()
        except RuntimeError as error:
            self.loop.close()
            raise ClosedError(f"the thread of rpcq.sync cannot be started: {error}") from error
        runs.wait()  # `_Wait` takes a loop that does not run for one that has ended

    def _run(self) -> None:
        try:
            self.loop.run_forever()
        finally:
            if tasks := asyncio.all_tasks(self.loop):
                for task in tasks:
                    task.cancel()
                self.loop.run_until_complete(asyncio.wait(tasks))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()

    def stop(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `last` in it, cancel all else, and end it; all within `STOP_TIMEOUT` seconds."""

        def begin() -> None:
            self._last = self.loop.create_task(last())
            self._last.add_done_callback(lambda _: self.loop.stop())

        self.loop.call_soon_threadsafe(begin)
        self._thread.join(STOP_TIMEOUT)
        if self._thread.is_alive():
            silence(self.loop)


def _new_loop() -> asyncio.AbstractEventLoop:
    if find_spec("uvloop") is None:
        return asyncio.new_event_loop()
    import uvloop  # noqa: PLC0415 - an extra

    return uvloop.new_event_loop()


def silence(loop: asyncio.AbstractEventLoop) -> None:
    """Have a loop that never runs again say nothing about tasks that did not end."""
    loop.set_exception_handler(lambda _loop, _context: None)


class _Shared:
    """The event loop that all threads of this process share.

    Attributes:
        current: it, if there is one.
        lock: held while it starts or ends.
        ended: the process ends.
        inherited: loops of the parent process, kept, since collecting them would close their selectors and sockets.

    """

    def __init__(self) -> None:
        self.current: _LoopThread | None = None
        self.lock = threading.Lock()
        self.ended = False
        self.inherited: list[_LoopThread] = []

    def forked(self) -> None:
        """This process is a new one: the thread is not in it."""
        self.lock = threading.Lock()
        if self.current is not None:
            silence(self.current.loop)
            if not isinstance(self.current.loop, asyncio.BaseEventLoop):  # uvloop's
                atexit.unregister(_start_threads_of_libuv)
                atexit.register(_start_threads_of_libuv)
            self.inherited.append(self.current)
            self.current = None


def _start_threads_of_libuv() -> None:
    """Let libuv start its threads, which look up names, in this process.

    At exit, libuv waits for the end of its threads, and a child that has not used them waits for those of its parent,
    which are not there. glibc 2.36 takes them for ended; with glibc 2.43 such a child never ends.
    """
    loop = _new_loop()
    with contextlib.suppress(socket.gaierror):  # no address in digits, so that no server is asked for it
        loop.run_until_complete(loop.getaddrinfo("localhost", None, flags=socket.AI_NUMERICHOST))
    loop.close()


_shared: Final = _Shared()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_shared.forked)


def shared_loop() -> asyncio.AbstractEventLoop:
    """The event loop of this process for threads that block; it is started if there is none.

    Raises:
        ClosedError: the process ends, or no thread can be started.

    """
    current = _shared.current
    if current is not None:
        return current.loop
    with _shared.lock:
        if _shared.ended:
            raise ClosedError("the process ends: nothing can be opened any more")
        if _shared.current is None:
            _shared.current = _LoopThread()
        return _shared.current.loop


def shared_loop_now() -> asyncio.AbstractEventLoop | None:
    """The same if it is there, and otherwise None."""
    return None if _shared.current is None else _shared.current.loop


def end_shared_loop(last: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run `last` in it, and end it with the process; nothing can be started afterwards."""
    with _shared.lock:
        _shared.ended = True
        current = _shared.current
    if current is not None:
        current.stop(last)

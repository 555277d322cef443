"""`rpcq worker --processes` and `--reload`: worker processes, started again when they die or when files change."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from rpcq import logs
from rpcq.cli.options import USAGE
from rpcq.errors import ConfigurationError

FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 30.0
"""Seconds before a process that died at once is started again; doubled each time."""

AT_ONCE: Final = 10.0
"""Seconds: a process that lived longer is started again without a pause."""

SUPERVISED: Final = "RPCQ_SUPERVISED"
"""In the environment of a process that a supervisor started: its number, from 1. It ends when its input does."""

log = logs.get_logger("rpcq.supervisor")


async def supervise(
    command: Sequence[str], environment: Mapping[str, str], processes: int, *, reload: Path | None
) -> bool:
    """Keep processes running until SIGTERM or Ctrl-C, then let them end; each further signal goes on to them.

    Args:
        command: what each of them runs.
        environment: theirs.
        processes: how many.
        reload: the folder whose Python files start them again when they change; None for none.

    Returns:
        Whether all of them ended as they should.

    Raises:
        ConfigurationError: files are to be watched, and the package that does it is not installed.

    """
    supervisor = _Supervisor(command, environment, watches=reload is not None)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.stop)
    watcher = None if reload is None else loop.create_task(_watch(reload, _watcher(), supervisor))
    try:
        keepers = [supervisor.keep(number) for number in range(1, processes + 1)]
        return all(await asyncio.gather(*keepers))
    finally:
        if watcher is not None:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)


class _Supervisor:
    def __init__(self, command: Sequence[str], environment: Mapping[str, str], *, watches: bool) -> None:
        self._command = command
        self._environment = environment
        self._watches = watches
        self._running: set[asyncio.subprocess.Process] = set()
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()

    def stop(self) -> None:
        """End all processes, and start no more."""
        self._stopping.set()
        self._terminate()

    def changed(self) -> None:
        """Start all processes again."""
        self._changed.set()
        self._terminate()
        self._changed = asyncio.Event()

    def _terminate(self) -> None:
        for process in self._running:
            if process.returncode is None:
                process.terminate()

    async def keep(self, number: int) -> bool:
        """Keep one process running; whether the last one ended as it should."""
        pause = FIRST_PAUSE
        while True:
            began, changed = time.monotonic(), self._changed
            code = await self._run(number)
            if self._stopping.is_set():
                return code in (0, -signal.SIGTERM)  # the latter before it began to serve
            if changed.is_set():  # files changed: it was asked to end
                continue
            if code == USAGE and not self._watches:
                self.stop()  # it says itself what is wrong, and the next one would say the same
                return False
            lived = time.monotonic() - began
            pause = FIRST_PAUSE if lived > AT_ONCE else pause
            wait = 0.0 if lived > AT_ONCE else pause
            log.error("worker process died", number=number, exit_code=code, lived=round(lived, 1), again_in=wait)
            await self._sleep(wait, changed)
            if self._stopping.is_set():
                return False
            pause = min(pause * 2, LONGEST_PAUSE)

    async def _run(self, number: int) -> int:
        # In a session of its own: Ctrl-C in a terminal comes here alone, and what follows is ours to say.
        process = await asyncio.create_subprocess_exec(
            *self._command,
            env={**self._environment, SUPERVISED: str(number)},
            stdin=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        self._running.add(process)
        log.info("worker process started", number=number, pid=process.pid)
        if self._stopping.is_set():
            process.terminate()
        try:
            return await process.wait()
        finally:
            self._running.discard(process)

    async def _sleep(self, seconds: float, changed: asyncio.Event) -> None:
        """Until time is up, a file changes, or all is to end."""
        waits = [asyncio.create_task(it.wait()) for it in (self._stopping, changed)]
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()


async def _watch(folder: Path, awatch: Callable[..., AsyncIterator[Any]], supervisor: _Supervisor) -> None:
    log.info("watching for changes", folder=str(folder))
    async for changes in awatch(folder):
        files = sorted(str(Path(name).relative_to(folder)) for _, name in changes)
        log.info("files changed; starting again", files=files[:5])
        supervisor.changed()


def _watcher() -> Callable[..., AsyncIterator[Any]]:
    try:
        from watchfiles import PythonFilter, awatch  # noqa: PLC0415 - an extra
    except ImportError as error:
        msg = "--reload needs the package watchfiles: pip install 'rpcq[reload]'"
        raise ConfigurationError(msg) from error
    return partial(awatch, watch_filter=PythonFilter())

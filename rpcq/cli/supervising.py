"""`rpcq worker --processes` and `--reload`: worker processes are started again when they die or when files change."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from rpcq import logs
from rpcq.cli.options import FAILED, USAGE
from rpcq.errors import ConfigurationError
from rpcq.runtime.backoff import Backoff
from rpcq.runtime.distribution import missing

FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 30.0
"""Seconds before a process that died early is started again; doubled each time."""

EARLY: Final = 10.0
"""Seconds. A process that lived longer is started again without a pause."""

SUPERVISED: Final = "RPCQ_SUPERVISED"
"""The variable with the number, from 1, of a process that a supervisor started. It stops when its stdin closes."""

log = logs.get_logger("rpcq.supervisor")


async def supervise(
    command: Sequence[str], environment: Mapping[str, str], processes: int, *, reload: Path | None
) -> bool:
    """Keep processes running until SIGTERM or Ctrl-C, then let them end; each further signal is passed on to them.

    Args:
        command: the command line of each process.
        environment: the environment of each process.
        processes: the number of processes.
        reload: the processes start again when Python files in this folder change; None for no such folder.

    Returns:
        Whether all processes ended without an error.

    Raises:
        ConfigurationError: `reload` is given, and the package watchfiles is not installed.

    """
    supervisor = _Supervisor(command, environment, reloads=reload is not None)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.stop)
    reloading = None if reload is None else loop.create_task(_reload_on_changes(reload, _changes(), supervisor))
    try:
        kept = [supervisor.keep(number) for number in range(1, processes + 1)]
        return all(await asyncio.gather(*kept))
    finally:
        if reloading is not None:
            reloading.cancel()
            await asyncio.gather(reloading, return_exceptions=True)


class _Supervisor:
    def __init__(self, command: Sequence[str], environment: Mapping[str, str], *, reloads: bool) -> None:
        self._command = command
        self._environment = environment
        self._reloads = reloads
        self._running: set[asyncio.subprocess.Process] = set()
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()

    def stop(self) -> None:
        """End all processes, and start no others."""
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
        """Keep one process running until `stop`, and return whether its last run ended without an error."""
        backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        while True:
            began, changed = time.monotonic(), self._changed
            code = await self._run(number)
            if self._stopping.is_set():
                return code in (0, -signal.SIGTERM)  # -SIGTERM: it was stopped before it began to serve
            if changed.is_set():  # `changed` ended it
                continue
            if code == USAGE and not self._reloads:
                self.stop()  # it has printed what is wrong, and another one would fail in the same way
                return False
            if code in (FAILED, USAGE) and self._reloads:  # the same: a broken module, a lifespan that fails
                log.error("worker process failed; waiting until a Python file changes", number=number, exit_code=code)
                await self._sleep(None, changed)
                if self._stopping.is_set():
                    return False
                continue
            lived = time.monotonic() - began
            if lived > EARLY:
                backoff.reset()
            pause = 0.0 if lived > EARLY else backoff.pause()
            log.error("worker process died", number=number, exit_code=code, lived=round(lived, 1), again_in=pause)
            await self._sleep(pause, changed)
            if self._stopping.is_set():
                return False

    async def _run(self, number: int) -> int:
        # In a session of its own: Ctrl-C in a terminal reaches only the supervisor, which then stops the processes.
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

    async def _sleep(self, seconds: float | None, changed: asyncio.Event) -> None:
        """Wait until the time is over (None: without that), files change, or `stop` is called."""
        waits = [asyncio.create_task(it.wait()) for it in (self._stopping, changed)]
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()


async def _reload_on_changes(
    folder: Path, changes_in: Callable[..., AsyncIterator[Any]], supervisor: _Supervisor
) -> None:
    log.info("watching for changes", folder=str(folder))
    async for changes in changes_in(folder):
        files = sorted(str(Path(name).relative_to(folder)) for _, name in changes)
        log.info("files changed; starting again", files=files[:5])
        supervisor.changed()


def _changes() -> Callable[..., AsyncIterator[Any]]:
    try:
        from watchfiles import PythonFilter, awatch  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigurationError(missing("--reload", "watchfiles", "reload")) from error
    logs.silence("watchfiles.main")  # `_reload_on_changes` reports the same
    return partial(awatch, watch_filter=PythonFilter())

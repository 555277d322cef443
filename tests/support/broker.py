"""A real RabbitMQ for the tests and the benchmarks: found, or started and taken away again.

In this order:

1. ``RPCQ_TEST_URL``, an AMQP URL: that broker, as it is.
2. A container, where a Docker engine answers.
3. A node of our own from an installed ``rabbitmq-server``: own ports, own name, own data folder.
4. As root on Debian or Ubuntu: install ``rabbitmq-server`` with apt, then as 3.
5. Otherwise :class:`Unavailable`, saying what to install. Nothing is ever skipped quietly.

``RPCQ_TEST_IMAGE``, an image such as ``rabbitmq:4.3-management``, leaves the second way alone, with that image: so one
chooses the version. ``RPCQ_TEST_WAY`` leaves one way alone too: ``container``, or ``node`` for 3 and 4. Both hold for
whatever is started here or by `cluster.py`, also for what a test starts beside the broker of ``RPCQ_TEST_URL``.

`choosing.py` has the order, `containers.py` and `nodes.py` start one, and `servers.py` has what tests do with it. What
is started belongs to a guard (`guard.py`), so that nothing is left when the test process is killed.

A fault test takes down a broker of its own, never that of the session: ``with broker(setup=Setup()) as own``.

``python tests/support/broker.py -- command args…`` runs a command with ``RPCQ_URL`` and ``RPCQ_TEST_URL`` set. With
``--postgres VARIABLE``, that variable has the URL of a PostgreSQL, too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

if __name__ == "__main__":  # run by its path: the package that it is part of is found in the folder above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from support.choosing import first, gather, plan, starters
from support.harness import CtlFailed, Say, Unavailable, to_stderr
from support.servers import PLAIN, VHOST, Broker, Setup, vhost_of, with_vhost

__all__ = ["VHOST", "Broker", "CtlFailed", "Setup", "Unavailable", "broker", "vhost_of", "with_vhost"]


@contextlib.contextmanager
def broker(say: Say = to_stderr, setup: Setup = PLAIN) -> Iterator[Broker]:
    """Find or start a broker, and take away at the end what was started. `say` gets what people should know.

    One with a setup is always started, even if that is `Setup()`: that of RPCQ_TEST_URL has another.
    """
    facts = gather(os.environ if setup is PLAIN else {**os.environ, "RPCQ_TEST_URL": ""})
    found = first(plan(facts), starters(facts, say, setup), facts, say)
    try:
        yield found
    finally:
        found.stop()


def run(command: Sequence[str], database: str | None = None) -> int:
    """Run a command with a broker: its exit code, or 128 + the number of the signal that ended it.

    Args:
        command: the command; `RPCQ_URL` and `RPCQ_TEST_URL` name the broker.
        database: a variable that names a PostgreSQL, for asyncpg; one is started unless the variable is set.

    """
    command_run = _CommandRun()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, command_run.on_signal)
    with contextlib.ExitStack() as stack:
        found = stack.enter_context(broker())
        to_stderr(found.origin)
        environ = {**os.environ, "RPCQ_URL": found.url, "RPCQ_TEST_URL": found.url}
        if database is not None and not environ.get(database):
            from support.postgres import postgres

            made = stack.enter_context(postgres())
            to_stderr(made.origin)
            environ[database] = made.url.replace("postgresql://", "postgresql+asyncpg://", 1)
        return command_run(command, environ)


class _CommandRun:
    """One run of a command that is sent the signals we get; 10 s after the first of them it is killed."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._starting = False
        self._signals: list[int] = []
        self._deadline = float("inf")

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Hand a signal on, or leave at once if the command is not there yet."""
        if self._child is None and not self._starting:
            raise SystemExit(128 + number)
        self._signals.append(number)

    def __call__(self, command: Sequence[str], environ: Mapping[str, str]) -> int:
        self._starting = True
        try:
            # A process group of its own, so that every signal reaches it once, through us, wherever it came from.
            child = self._child = subprocess.Popen(command, env=environ, process_group=0)
        except OSError as error:
            to_stderr(f"cannot run {command[0]}: {error}")
            return 127
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = child.wait(0.1)
                return code if code >= 0 else 128 - code
            if time.monotonic() > self._deadline:
                self._signals.append(signal.SIGKILL)
            while self._signals:
                self._deadline = min(self._deadline, time.monotonic() + 10.0)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, self._signals.pop(0))


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    match arguments:
        case ["--", _, *_]:
            database, command = None, arguments[1:]
        case ["--postgres", str(database), "--", _, *_]:
            command = arguments[3:]
        case _:
            return _usage()
    try:
        return run(command, database)
    except Unavailable as error:
        sys.stderr.write(f"{error}\n")
        return 1


def _usage() -> int:
    sys.stderr.write("usage: python tests/support/broker.py [--postgres VARIABLE] -- command [argument …]\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

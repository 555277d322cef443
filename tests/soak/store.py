"""A store of answers that the workers of a scene share, and that fails as it is told to.

    python -m soak.store SOCKET

It is a process of its own: one thread holds everything, so that a claim is atomic, and a worker that is killed takes
nothing along. The lines of its standard input are `Trouble` as JSON; it ends when that closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rpcq.results import Claim, MemoryResults, StoredResult

ROOM = 1_000_000_000
"""Bytes, which is room for all: what is forgotten may run again, and the oracle would not know."""


@dataclass(frozen=True)
class Trouble:
    """What a store does to whoever asks it; each is a share of the questions, from 0 to 1."""

    refuses: float = 0.0
    """It does not do it, and says so, as `error`."""
    forgets_to_say: float = 0.0
    """It does it, and hangs up without a word."""
    hangs_up: float = 0.0
    """It does not do it, and hangs up without a word."""
    dawdles: float = 0.0
    """It takes `seconds`, some of the time before it does it, and some after."""
    seconds: float = 0.0
    error: str = "OSError"


ERRORS: dict[str, type[BaseException]] = {
    "OSError": OSError,
    "KeyError": KeyError,
    "CancelledError": asyncio.CancelledError,
    "TimeoutError": TimeoutError,
}


class SharedAnswers:
    """The worker's side, an `ResultStore`: each question has a connection to itself, which is kept if all went well."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def get(self, key: str) -> StoredResult | None:
        found = await self._ask("get", key)
        return None if found is None else _answer(found)

    async def claim(self, key: str, owner: str, seconds: float) -> StoredResult | Claim:
        found = await self._ask("claim", key, owner, seconds)
        return Claim(found) if isinstance(found, str) else _answer(found)

    async def put(self, key: str, result: StoredResult) -> None:
        await self._ask("put", key, result.fingerprint.hex(), result.body.decode())

    async def release(self, key: str, owner: str) -> None:
        await self._ask("release", key, owner)

    def close(self) -> None:
        while self._idle:
            self._idle.pop()[1].close()

    async def _ask(self, *question: Any) -> Any:
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_unix_connection(self._path)
        try:
            writer.write(json.dumps(question).encode() + b"\n")
            line = await reader.readuntil()  # an error where the store hangs up
        except BaseException:  # an answer may still come, which must not be taken for another one's
            writer.close()
            raise
        self._idle.append((reader, writer))
        said = json.loads(line)
        if "error" in said:
            raise ERRORS[said["error"]]
        return said["found"]


def _answer(found: list[str]) -> StoredResult:
    return StoredResult(bytes.fromhex(found[0]), found[1].encode())


class Server:
    """The process's side."""

    def __init__(self, dice: random.Random) -> None:
        self._answers = MemoryResults(ROOM)
        self._dice = dice
        self.trouble = Trouble()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                said = await self._answered(json.loads(line))
                if said is None:
                    return
                writer.write(json.dumps(said).encode() + b"\n")
        except OSError:
            pass  # the worker is gone
        finally:
            writer.close()

    async def _answered(self, question: list[Any]) -> dict[str, Any] | None:
        """What it says to that; None to hang up."""
        trouble, dice = self.trouble, self._dice
        pause = trouble.seconds if dice.random() < trouble.dawdles else 0.0
        before = dice.uniform(0, pause)
        await asyncio.sleep(before)
        chance = dice.random()
        if chance < trouble.hangs_up:
            return None
        if chance < trouble.hangs_up + trouble.refuses:
            return {"error": trouble.error}
        found = await self._do(*question)
        await asyncio.sleep(pause - before)
        return None if dice.random() < trouble.forgets_to_say else {"found": found}

    async def _do(self, what: str, key: str, *more: Any) -> Any:
        """Nothing in here waits, so that each is atomic."""
        found: StoredResult | Claim | None = None
        if what == "get":
            found = await self._answers.get(key)
        elif what == "claim":
            found = await self._answers.claim(key, *more)
        elif what == "put":
            await self._answers.put(key, StoredResult(bytes.fromhex(more[0]), more[1].encode()))
        else:
            await self._answers.release(key, *more)
        if isinstance(found, StoredResult):
            return [found.fingerprint.hex(), found.body.decode()]
        return found.value if found is not None else None


class StoreProcess:
    """The soak's side: a store as a process."""

    def __init__(self, path: Path, environment: dict[str, str]) -> None:
        self.path = path
        self._process = subprocess.Popen(
            [sys.executable, "-m", "soak.store", str(path)], stdin=subprocess.PIPE, env=environment
        )

    def wait(self, seconds: float = 20.0) -> None:
        """Wait until it serves."""
        deadline = time.monotonic() + seconds
        while not self.path.exists():
            assert time.monotonic() < deadline, "the store did not start"
            assert self._process.poll() is None, "the store ended"
            time.sleep(0.05)

    def has(self, trouble: Trouble) -> None:
        """From now on, it behaves like that."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(trouble)).encode() + b"\n")
        self._process.stdin.flush()

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        self.thaw()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)


async def serve(path: str) -> None:
    server = Server(random.Random(path))
    # Under another name until it listens: who sees the file connects.
    await asyncio.start_unix_server(server.serve, path + "~", backlog=1000)
    os.rename(path + "~", path)  # noqa: PTH104 - quick, and before anybody waits
    told = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(told), sys.stdin)
    while line := await told.readline():
        server.trouble = Trouble(**json.loads(line))
    os._exit(0)  # those who are connected need no goodbye


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(sys.argv[1]))

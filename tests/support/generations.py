"""Two generations of workers on one queue, as during any deploy, and stores of answers that fail, are slow, or shared.

The old generation has what the new one refuses: another method, other parameters. `Generations.lose_old` has a call run
at the old one, loses that in the middle of the handler, and lets a worker of the new one have the redelivery.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from rpcq import Client, Service, Worker
from rpcq.results import Claim, MemoryResults, ResultStore, StoredResult
from support.places import Place, lose


class FailingStore(MemoryResults):
    """Whatever is asked of it fails, in the way that is given."""

    def __init__(self, error: type[BaseException] = OSError) -> None:
        super().__init__(10_000)
        self._error = error

    async def get(self, key: str) -> StoredResult | None:
        raise self._error

    async def claim(self, key: str, owner: str, seconds: float) -> StoredResult | Claim:
        raise self._error

    async def put(self, key: str, result: StoredResult) -> None:
        raise self._error

    async def release(self, key: str, owner: str) -> None:
        raise self._error


class SlowStore(MemoryResults):
    """Each look into it takes longer than any call has."""

    def __init__(self, seconds: float) -> None:
        super().__init__(10_000)
        self._seconds = seconds

    async def get(self, key: str) -> StoredResult | None:
        await asyncio.sleep(self._seconds)
        return await super().get(key)

    async def claim(self, key: str, owner: str, seconds: float) -> StoredResult | Claim:
        await asyncio.sleep(self._seconds)
        return await super().claim(key, owner, seconds)


@dataclass
class Generations:
    """A service `things` in two generations; each run is a nonce in `runs`."""

    place: Place
    runs: list[int] = field(default_factory=list)
    entered: asyncio.Event = field(default_factory=asyncio.Event)

    def old(self, *, idempotent: bool = False) -> Service:
        """`work(nonce)`, which never ends."""
        service = self.place.service()

        @service.method(idempotent=idempotent)
        async def work(nonce: int) -> int:
            self.runs.append(nonce)
            self.entered.set()
            await asyncio.get_running_loop().create_future()
            return nonce

        return service

    def same(self, store: ResultStore | None = None, *, idempotent: bool = False) -> Service:
        """`work(nonce)` as the old one has it, with another store; it ends at once."""
        service = self.place.service(result_store=store)

        @service.method(idempotent=idempotent)
        async def work(nonce: int) -> int:
            self.runs.append(nonce)
            return nonce

        return service

    def without_the_method(self) -> Service:
        """`work` is gone."""
        service = self.place.service()

        @service.method
        async def other() -> None: ...

        return service

    def with_other_parameters(self) -> Service:
        """`work` wants what callers of the old one do not give."""
        service = self.place.service()

        @service.method
        async def work(nonce: int, amount: int) -> int:
            self.runs.append(nonce)
            return amount

        return service

    async def lose_old(
        self, call: Callable[[Client], Awaitable[Any]], new: Service, *, idempotent: bool = False, **options: Any
    ) -> tuple[asyncio.Task[Any], Worker]:
        """Have `call` run at a worker of the old generation, and lose that; it has come to one of the new by then.

        Returns:
            The call, which has ended or will soon, and the worker of the new generation, which is stopped.

        """
        async with self.place.client() as client:
            old = self.place.worker(self.old(idempotent=idempotent), grace=0.05)
            await old.start()
            calling = asyncio.ensure_future(call(client))
            await self.entered.wait()
            await lose(old)
            async with self.place.worker(new, **options) as worker:
                await asyncio.wait([calling], timeout=10)
        return calling, worker

"""Answers that a worker remembers by idempotency key, to give them again instead of running a call twice. Pure.

A call that is sent again carries the key of its earlier attempts. Where one of them ran to its end, the worker that
remembers its result replays it. Only results are remembered: a call that failed may be tried again.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple, Protocol

OVERHEAD: Final = 400
"""Bytes that an answer takes besides its own, about: keys, objects, the table."""


@dataclass(frozen=True, slots=True)
class StoredResult:
    """What is remembered of a call.

    Attributes:
        fingerprint: of the method and the parameters that were called: see `fingerprint`.
        body: the result, JSON.

    """

    fingerprint: bytes
    body: bytes


class Claim(Enum):
    """What `ResultStore.claim` found, where no answer is remembered."""

    TAKEN = "taken"
    """Nobody had the key; it is the asker's now."""
    HELD = "held"
    """Another owner has it, and its time has not passed: the call runs there."""
    LAPSED = "lapsed"
    """Another owner had it, and its time passed without an answer: the call may have run. It is the asker's now."""


class ResultStore(Protocol):
    """Where answers are remembered; `Service(result_store=...)` shares one among the workers of a service.

    A key is the service's name, the scope that the idempotency key belongs to, and that key, with slashes between.
    Before a handler runs, its worker claims the key, so that of two requests with one key, on whatever workers, only
    one runs at a time. `claim` must be atomic.

    Where `get` or `claim` raises, the request is not run, and its caller's client sends it again; where `put` or
    `release` raises, that is logged, and the caller gets its answer all the same. `get`, `claim` and `put` are part of
    the time that the call has, and are cancelled with it.
    """

    async def get(self, key: str) -> StoredResult | None:
        """What was put under this key, or None."""

    async def claim(self, key: str, owner: str, seconds: float) -> StoredResult | Claim:
        """The answer under this key; where there is none, take the key for `owner`, unless another owner has it.

        An owner that has the key and claims it once more is told what it was told before, and its time begins anew.

        Args:
            key: of the call.
            owner: who asks; another one for each request.
            seconds: how long the owner has it, if it neither puts an answer nor releases it.

        """

    async def put(self, key: str, answer: StoredResult) -> None:
        """Remember an answer, even if another owner holds the key. The store may forget it later."""

    async def release(self, key: str, owner: str) -> None:
        """Give the key back, if it is this owner's and has no answer: the call failed, and may be tried again."""


class MemoryResults:
    """Remembers the answers that were used last, in this process.

    Args:
        size: bytes that they may take together, about; 0 remembers nothing.
        now: the monotonic clock, in seconds.

    """

    def __init__(self, size: int, now: Callable[[], float] = time.monotonic) -> None:
        self._size = size
        self._now = now
        self._taken = 0
        self._entries: OrderedDict[str, StoredResult | _Claimed] = OrderedDict()

    def __len__(self) -> int:
        return sum(isinstance(entry, StoredResult) for entry in self._entries.values())

    async def get(self, key: str) -> StoredResult | None:
        """What was put under this key, or None."""
        entry = self._entries.get(key)
        if not isinstance(entry, StoredResult):
            return None
        self._entries.move_to_end(key)
        return entry

    async def claim(self, key: str, owner: str, seconds: float) -> StoredResult | Claim:
        """See `ResultStore.claim`."""
        entry = self._entries.get(key)
        if isinstance(entry, StoredResult):
            self._entries.move_to_end(key)
            return entry
        now = self._now()
        if entry is not None and entry.until > now and entry.owner != owner:
            return Claim.HELD
        found = Claim.TAKEN
        if entry is not None:
            found = entry.found if entry.owner == owner else Claim.LAPSED
        self._enter(key, _Claimed(owner, now + seconds, found))
        return found

    async def put(self, key: str, answer: StoredResult) -> None:
        """Remember an answer, and forget what was not asked for longest where there is no room."""
        self._enter(key, answer)

    async def release(self, key: str, owner: str) -> None:
        """See `ResultStore.release`."""
        entry = self._entries.get(key)
        if isinstance(entry, _Claimed) and entry.owner == owner:
            del self._entries[key]
            self._taken -= _size_of(key, entry)

    def _enter(self, key: str, entry: StoredResult | _Claimed) -> None:
        earlier = self._entries.pop(key, None)
        if earlier is not None:
            self._taken -= _size_of(key, earlier)
        self._entries[key] = entry
        self._taken += _size_of(key, entry)
        while self._taken > self._size:
            oldest, forgotten = self._entries.popitem(last=False)
            self._taken -= _size_of(oldest, forgotten)


class _Claimed(NamedTuple):
    """A key that an owner has, until a moment of the clock."""

    owner: str
    until: float
    found: Claim


def _size_of(key: str, entry: StoredResult | _Claimed) -> int:
    return OVERHEAD + len(key) + (len(entry.body) if isinstance(entry, StoredResult) else 0)


def fingerprint(method: str, body: bytes) -> bytes:
    """What tells two calls apart that have the same key: 16 bytes."""
    return hashlib.blake2b(b"%b\0%b" % (method.encode(), body), digest_size=16).digest()

"""Stored results: a worker stores results by idempotency key, and replays them instead of running a call twice. Pure.

A call that is sent again carries the key of its earlier attempts. If one of them ran to its end, a worker that finds
its stored result replays it. Only results are stored: a call that failed may be tried again.
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
"""Bytes of memory that a stored result takes besides its body, about: keys, objects, the table."""


@dataclass(frozen=True, slots=True)
class StoredResult:
    """The result of a call, as a store keeps it.

    Attributes:
        fingerprint: hash of the method and the parameters of the call: see `fingerprint`.
        body: the result as JSON.

    """

    fingerprint: bytes
    body: bytes


class Claim(Enum):
    """What `ResultStore.claim` found when it found no stored result."""

    TAKEN = "taken"
    """No owner had the key; the caller has it now."""
    HELD = "held"
    """Another owner has the key, and its time has not passed: the call runs there."""
    LAPSED = "lapsed"
    """Another owner had the key, and its time passed without a result: the call may have run. The caller has it now."""


class ResultStore(Protocol):
    """A store of results; `Service(result_store=...)` shares one among the workers of a service.

    A key is the service's name, the scope of the idempotency key, and the idempotency key, joined by slashes. The scope
    of a job begins with `job:` and its name, so that no call and no other job has its key. Before a handler runs, its
    worker claims the key: of two requests with one key, on any workers, only one runs at a time. `claim` must be
    atomic.

    If `get` or `claim` raises, the request does not run, and the client sends it again. If `put` or `release` raises,
    the exception is logged, and the caller still gets its reply. `get`, `claim` and `put` count toward the time of the
    call, and are cancelled with it. For a job, each of them has 5 seconds. If `claim` raises or takes longer, the job
    is put off, and tried again.
    """

    async def get(self, key: str) -> StoredResult | None:
        """Return the stored result of this key, or None."""

    async def claim(self, key: str, owner: str, seconds: float) -> StoredResult | Claim:
        """Return the stored result of this key; if there is none, take the key for `owner` unless another owner has it.

        An owner that has the key and claims it again gets the same `Claim` as before, and its time begins again.

        Args:
            key: key of the call.
            owner: who claims it; different for each request.
            seconds: how long the owner has the key, if it neither puts a result nor releases it.

        """

    async def put(self, key: str, result: StoredResult) -> None:
        """Store a result, even if another owner has the key. The store may delete it later."""

    async def release(self, key: str, owner: str) -> None:
        """Free the key if this owner has it and it has no result: the call failed, and may be tried again."""


class MemoryResults:
    """Stores results in the memory of this process; keeps those that were used last.

    Args:
        size: bytes that all of them may take, about; with 0 nothing is stored.
        now: monotonic clock, in seconds.

    """

    def __init__(self, size: int, now: Callable[[], float] = time.monotonic) -> None:
        self._size = size
        self._now = now
        self._taken = 0
        self._entries: OrderedDict[str, StoredResult | _Claimed] = OrderedDict()

    def __len__(self) -> int:
        return sum(isinstance(entry, StoredResult) for entry in self._entries.values())

    async def get(self, key: str) -> StoredResult | None:
        """See `ResultStore.get`."""
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

    async def put(self, key: str, result: StoredResult) -> None:
        """Store a result; if there is no room, delete those that were not used for longest."""
        self._enter(key, result)

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
            oldest, deleted = self._entries.popitem(last=False)
            self._taken -= _size_of(oldest, deleted)


class _Claimed(NamedTuple):
    """A key that an owner has; `until` is a time of the store's clock."""

    owner: str
    until: float
    found: Claim


def _size_of(key: str, entry: StoredResult | _Claimed) -> int:
    return OVERHEAD + len(key) + (len(entry.body) if isinstance(entry, StoredResult) else 0)


def fingerprint(method: str, body: bytes) -> bytes:
    """Hash a method and its parameters, to tell apart different calls with the same key: 16 bytes."""
    return hashlib.blake2b(b"%b\0%b" % (method.encode(), body), digest_size=16).digest()

"""Answers that a worker remembers by idempotency key, to give them again instead of running a call twice. Pure.

A call that is sent again carries the key of its earlier attempts. Where one of them ran to its end, the worker that
remembers its result replays it. Only results are remembered: a call that failed may be tried again.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, Protocol

OVERHEAD: Final = 400
"""Bytes that an answer takes besides its own, about: keys, objects, the table."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What is remembered of a call.

    Attributes:
        fingerprint: of the method and the parameters that were called: see `fingerprint`.
        body: the result, JSON.

    """

    fingerprint: bytes
    body: bytes


class AnswerStore(Protocol):
    """Where answers are remembered; `Service(answer_store=...)` shares one among the workers of a service.

    Where `get` raises, the request is not run, and its caller's client sends it again; where `put` raises, that is
    logged, and the caller gets the answer all the same. Both are part of the time that the call has, and are cancelled
    with it.
    """

    async def get(self, key: str) -> Answer | None:
        """What was put under this key, or None; `key` is the service's name, a slash, and the idempotency key."""

    async def put(self, key: str, answer: Answer) -> None:
        """Remember an answer; it may be forgotten again whenever room or time asks for it."""


class MemoryAnswers:
    """Remembers the answers that were used last, in this process.

    Args:
        size: bytes that they may take together, about; 0 remembers nothing.

    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken = 0
        self._answers: OrderedDict[str, Answer] = OrderedDict()

    def __len__(self) -> int:
        return len(self._answers)

    async def get(self, key: str) -> Answer | None:
        """What was put under this key, or None."""
        answer = self._answers.get(key)
        if answer is not None:
            self._answers.move_to_end(key)
        return answer

    async def put(self, key: str, answer: Answer) -> None:
        """Remember an answer, and forget those that were not asked for longest where there is no room."""
        earlier = self._answers.pop(key, None)
        if earlier is not None:
            self._taken -= len(earlier.body) + OVERHEAD
        self._answers[key] = answer
        self._taken += len(answer.body) + OVERHEAD
        while self._taken > self._size:
            _, forgotten = self._answers.popitem(last=False)
            self._taken -= len(forgotten.body) + OVERHEAD


def fingerprint(method: str, body: bytes) -> bytes:
    """What tells two calls apart that have the same key: 16 bytes."""
    return hashlib.blake2b(b"%b\0%b" % (method.encode(), body), digest_size=16).digest()

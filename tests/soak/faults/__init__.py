"""What strikes, by what it strikes at: workers, the network, messages and callers, stores of answers, the broker."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

Fault = Callable[[Any, random.Random], Awaitable[None]]


class Struck(NamedTuple):
    """A fault that has struck: when, on the wall clock, and where."""

    name: str
    where: str
    began: float
    ended: float


class Strikes:
    """All that strikes during a run.

    Attributes:
        struck: what has struck.
        underway: what strikes just now.

    """

    def __init__(self) -> None:
        self.struck: list[Struck] = []
        self.underway: Counter[str] = Counter()

    @property
    def counts(self) -> Counter[str]:
        return Counter(one.name for one in self.struck)

    async def go_on(
        self, faults: Sequence[Fault], at: Any, where: str, dice: random.Random, until: float, rest: float
    ) -> None:
        """Let all of these strike in random order, one after the other, again and again."""
        while time.monotonic() < until:
            for fault in dice.sample(faults, len(faults)):
                if time.monotonic() > until:
                    return
                name, began = fault.__name__, time.time()
                self.underway[name] += 1
                await fault(at, dice)
                self.underway[name] -= 1
                self.struck.append(Struck(name, where, began, time.time()))
                await asyncio.sleep(dice.uniform(0, rest))

    def between(self, began: float, ended: float, where: str) -> list[Struck]:
        """What struck there, or at the broker, at some time between these."""
        places = {where, ""}
        return [one for one in self.struck if one.where in places and one.began < ended and one.ended > began]

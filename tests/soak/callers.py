"""The load: calls of every kind, to both services and both generations, and calls of one key."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Any

from rpcq import Client, Retry
from soak.oracle import KeyLedger
from support.load import Load, Scene

TIMEOUTS = (1.0, 5.0)
"""Seconds that a call of a key may have. A worker has the key for as long, and a second."""
PATIENT = Retry(max_attempts=20, initial_backoff=0.05, max_backoff=1.0)


class KeyedLoad(Load):
    """Callers that make each call twice or three times under one key, as who does not know what became of the first.

    Args:
        longest: seconds within which all of them begin: at once, or when the time of the first one has passed.

    """

    def __init__(self, client: Client, folder: Path, dice: random.Random, *, longest: float, **options: Any) -> None:
        ledger = KeyLedger(folder / f"told-keys-{Load._number}")
        super().__init__(client, ledger, service="other", timeout=max(TIMEOUTS), **options)
        self._dice = dice
        self._longest = longest

    async def call(self, **params: Any) -> None:
        self._count += 1
        key = f"{self.prefix}{self._count}"
        pauses = [0.0, *(self._dice.uniform(0, self._longest) for _ in range(self._dice.choice([1, 1, 2])))]
        await asyncio.gather(*(self._one(key, f"{key}.{nth}", pause) for nth, pause in enumerate(pauses)))

    async def _one(self, key: str, call: str, pause: float) -> None:
        timeout = self._dice.choice(TIMEOUTS)
        begins = time.monotonic() + pause
        while (left := begins - time.monotonic()) > 0:
            if self._stopping:
                return
            await asyncio.sleep(min(left, 0.2))
        maker = self.client.with_options(timeout=timeout, idempotency_key=key, metadata={"x-call": call})
        await self.entered(
            call,
            maker.call(self._target, nonce=key, **self._params),
            lambda told: isinstance(told, str) and told.startswith(f"{key}."),
            lambda told: f"{key} {told if isinstance(told, str) else '-'}",
            timeout,
        )


def plain_load(scene: Scene, client: Client) -> Load:
    """Calls of which none fails where nothing strikes."""
    return scene.load(client, callers=20, params={"seconds": 0.01}, think=0.01)


def other_loads(scene: Scene, client: Client, dice: random.Random) -> list[Load]:
    """All other calls."""
    # What is held for a while is what is redelivered when a worker is lost.
    quick, held = {"seconds": 0.01}, {"seconds": 0.2}

    def load(**options: Any) -> Load:
        return scene.load(client, **options)

    def keyed(callers: int, method: str, seconds: float, longest: float = 0.05) -> Load:
        options: dict[str, Any] = {"callers": callers, "method": method, "params": {"seconds": seconds}, "think": 0.05}
        made = KeyedLoad(client, scene.folder, random.Random(dice.getrandbits(64)), longest=longest, **options)
        scene.ledgers.append(made.ledger)
        return made

    again: dict[str, Any] = {"idempotent": True, "timeout": 20, "params": quick, "think": 0.01}
    return [
        load(callers=12, method="again", **again),
        load(callers=5, retry=PATIENT, timeout=20, think=0.02),
        load(callers=3, method="thread", params={"seconds": 0.02}, think=0.02),
        load(callers=3, params={"seconds": 0.3}, timeout=0.25, think=0.1),
        load(callers=2, method="fail", think=0.1),
        load(callers=2, method="refuse", think=0.1),
        # The other service, with a store of answers that its workers share.
        load(callers=5, service="other", params=quick, think=0.02),
        load(callers=5, service="other", method="again", **again),
        keyed(2, "keyed", 0.01, 0.0),
        keyed(3, "keyed", 0.3),
        keyed(15, "keyed", 0.3, 8.0),
        keyed(2, "keyed_thread", 0.1),
        keyed(8, "keyed_thread", 0.3, 8.0),
        keyed(5, "keyed", 2.0, 2.0),  # which some have too little time for: the key is free again
        keyed(5, "keyed_fails", 0.02, 0.5),
        # Both generations: each has workers that refuse its calls, also those that were redelivered or moved.
        keyed(5, "former_keyed", 0.2, 2.0),
        keyed(5, "latter_keyed", 0.2, 2.0),
        *(
            load(callers=2, service=service, method=method, params=params, think=0.02)
            for service in ("target", "other")
            for method, params in (
                ("former", held),
                ("latter", held),
                ("changed", held),
                ("changed", held | {"amount": 1}),
            )
        ),
        *(
            load(callers=5, service=service, method=method, **again | {"think": 0.02, "params": held})
            for service in ("target", "other")
            for method in ("former_again", "latter_again")
        ),
    ]

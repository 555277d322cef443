"""The load: calls of every kind, to both services and both generations, and calls of one key."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

from load import Load, Scene
from rpcq import Client, Retry
from soak.oracle import KeyLedger

PATIENT = Retry(max_attempts=20, initial_backoff=0.05, max_backoff=1.0)


class KeyedLoad(Load):
    """Callers that make each call twice or three times under one key, as who does not know what became of the first."""

    def __init__(self, client: Client, folder: Path, dice: random.Random, **options: Any) -> None:
        super().__init__(client, KeyLedger(folder / f"told-keys-{Load._number}"), service="other", **options)
        self._dice = dice
        self._options = {"timeout": self._timeout}

    async def call(self, **params: Any) -> None:
        self._count += 1
        key = f"{self.prefix}{self._count}"
        longest = self._dice.choice([0.0, 0.05, 2.0])
        pauses = [0.0, *(self._dice.uniform(0, longest) for _ in range(self._dice.choice([1, 1, 2])))]
        await asyncio.gather(*(self._one(key, f"{key}.{nth}", pause) for nth, pause in enumerate(pauses)))

    async def _one(self, key: str, call: str, pause: float) -> None:
        await asyncio.sleep(pause)
        maker = self.client.with_options(**self._options, idempotency_key=key, metadata={"x-call": call})
        calling = maker.call(self._target, nonce=key, **self._params)
        await self.entered(
            call,
            calling,
            lambda told: isinstance(told, str) and told.startswith(f"{key}."),
            lambda told: f"{key} {told if isinstance(told, str) else '-'}",
        )


def plain_load(scene: Scene, client: Client) -> Load:
    """Calls of which none fails where nothing strikes."""
    return scene.load(client, callers=20, params={"seconds": 0.01}, think=0.01)


def other_loads(scene: Scene, client: Client, dice: random.Random) -> list[Load]:
    """All other calls."""
    quick, held = {"seconds": 0.01}, {"seconds": 0.05}

    def load(**options: Any) -> Load:
        return scene.load(client, **options)

    def keyed(callers: int, method: str, seconds: float, think: float = 0.05) -> Load:
        made = KeyedLoad(
            client,
            scene.folder,
            random.Random(dice.getrandbits(64)),
            callers=callers,
            method=method,
            timeout=5.0,
            think=think,
            params={"seconds": seconds},
        )
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
        keyed(4, "keyed", 0.01),
        keyed(2, "keyed", 0.3),
        keyed(2, "keyed", 5.0, think=0.5),  # which its time is too short for: the key is free again
        keyed(2, "keyed_thread", 0.1),
        keyed(2, "keyed_fails", 0.02),
        # Both generations: each has workers that refuse its calls.
        *(
            load(callers=2, service=service, method=method, params=params, think=0.05)
            for service in ("target", "other")
            for method, params in (
                ("former", held),
                ("latter", held),
                ("changed", held),
                ("changed", held | {"amount": 1}),
            )
        ),
        *(
            load(callers=2, service=service, method=method, retry=PATIENT, **again | {"think": 0.05})
            for service in ("target", "other")
            for method in ("former_again", "latter_again")
        ),
    ]

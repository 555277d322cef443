"""A run: the stages are set, load runs, faults strike, all is calm again, and the oracle is held against every call."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Literal

from soak.faults import Strikes, brokers, callers, moving, network, stores, workers
from soak.ground import Ground, ground
from soak.report import Held, Report, explained, say
from soak.stage import Stage, set_stage
from support.load import Load, lines_of

WARM_UP = 15.0
"""Seconds of load before the first fault, and before memory is taken as that of the start; less in a short run."""
UNTROUBLED = 3.0
"""Seconds in which no call fails that is not meant to, once all has come back."""
KINDS: tuple[Literal["classic", "quorum"], ...] = ("classic", "quorum")
STAGE_FAULTS = (*workers.FAULTS, *network.FAULTS, *callers.FAULTS, *brokers.SCENE_FAULTS)
US = "client process: both clients, the proxies, all callers"


class Soak:
    """A run, and what came of it."""

    def __init__(self, minutes: float, seed: int, nodes: int) -> None:
        self.minutes = minutes
        self.nodes = nodes
        self.dice = random.Random(seed)
        self.warm_up = min(WARM_UP, minutes * 10)
        self.stages: list[Stage] = []
        self.strikes = Strikes()
        self.report = Report(f"seed {seed}", self.strikes)

    @property
    def loads(self) -> list[Load]:
        return [load for stage in self.stages for load in stage.loads]

    async def run(self) -> Report:
        with tempfile.TemporaryDirectory(prefix="rpcq-soak-") as name, ground(self.nodes) as found:
            self.report.head = f"{found.version}, {self.report.head}"
            say(self.report.head)
            async with AsyncExitStack() as stack:
                setting = [
                    set_stage(stack, found, kind, Path(name), random.Random(self.dice.getrandbits(64)))
                    for kind in KINDS
                ]
                self.stages += await asyncio.gather(*setting)
                idle = Held.here(self.stages)
                async with AsyncExitStack() as calling:
                    for load in self.loads:
                        await calling.enter_async_context(load)
                    await self.under_load(found)
                    for load in self.loads:
                        load.stop()
                await self.at_rest(idle)
                await self.verdict()
        return self.report

    async def under_load(self, found: Ground) -> None:
        start = time.monotonic()
        await asyncio.sleep(self.warm_up)
        self.report.note(US, Held.here(self.stages))
        for stage in self.stages:
            self.report.note(f"a worker, {stage.scene.queue_type} queue", Held.by(stage.steady))
        began = time.monotonic()
        progress = asyncio.create_task(self.tell(began))
        await asyncio.gather(*self.struck(found, began + self.minutes * 60))
        progress.cancel()
        await self.all_is_back(found.calm if self.nodes > 1 else min(found.calm, 10.0 + self.minutes * 10))
        self.report.note(US, Held.here(self.stages))
        self.report.seconds = time.monotonic() - start

    def struck(self, found: Ground, until: float) -> Iterator[asyncio.Task[None]]:
        """Several things strike side by side, each at its own pace."""

        def strike(faults: object, at: object, where: str, rest: float) -> asyncio.Task[None]:
            dice = random.Random(self.dice.getrandbits(64))
            return asyncio.create_task(self.strikes.go_on(faults, at, where, dice, until, rest))  # type: ignore[arg-type]

        for stage in self.stages:
            kind = stage.scene.queue_type
            yield strike(STAGE_FAULTS, stage, kind, 0.5)
            yield strike(stores.FAULTS, stage, kind, 3.0)
            if kind == "classic":
                yield strike(moving.FAULTS, stage, kind, 1.0)
        yield strike(brokers.faults_of(found), found, "", 20.0 if self.nodes == 1 else 5.0)

    async def all_is_back(self, seconds: float) -> None:
        """Wait until of the calls that are not meant to fail none does, which has to be so after that time."""
        deadline = time.monotonic() + seconds
        while True:
            before = [stage.plain.ledger.failed for stage in self.stages]
            results = [stage.plain.ledger.counts["result"] for stage in self.stages]
            late = time.monotonic() > deadline
            await asyncio.sleep(UNTROUBLED)
            came = all(
                stage.plain.ledger.counts["result"] > count for stage, count in zip(self.stages, results, strict=True)
            )
            if came and [stage.plain.ledger.failed for stage in self.stages] == before and late | (self.nodes > 1):
                return
            if late:
                self.report.problems.append("calls still failed after the calm")
                return

    async def at_rest(self, idle: Held) -> None:
        """Nothing is left over."""
        for _ in range(100):  # replies on their way
            if len(asyncio.all_tasks()) == idle.tasks:
                break
            await asyncio.sleep(0.05)
        last = self.report.note(US, Held.here(self.stages))
        if (last.tasks, last.pending) != (idle.tasks, 0):
            self.report.problems.append(f"left over: {last}, and {idle.tasks} tasks there were before")
        for stage in self.stages:
            self.report.note(f"a worker, {stage.scene.queue_type} queue", Held.by(stage.steady))

    async def verdict(self) -> None:
        for stage in self.stages:
            stage.scene.is_checked = True
            try:
                await stage.scene.drain()
            except AssertionError as error:
                self.report.problems.append(f"{stage.scene.queue_type}: a worker did not drain: {error}")
            self.report.taken += stage.taken
            ran = lines_of(stage.scene.runs)
            for ledger in stage.scene.ledgers:
                self.report.told.update(ledger.counts)
                self.report.problems += explained(stage, ledger, ledger.verdict(ran), self.strikes)

    async def tell(self, began: float) -> None:
        """Every half a minute, how it goes."""
        while True:
            await asyncio.sleep(30)
            told: Counter[str] = Counter()
            violations = 0
            for stage in self.stages:
                for ledger in stage.scene.ledgers:
                    told.update(ledger.counts)
                    violations += len(ledger.violations)
                for worker in stage.scene.workers:
                    del worker.lines[:-20]  # their logs would be this process's memory
            after, faults = time.monotonic() - began, len(self.strikes.struck)
            failed = told.total() - told["result"] - told["cancelled"]
            now = ", ".join(name.replace("_", " ") for name in +self.strikes.underway)
            say(
                f"{after:4.0f} s: {told.total()} calls, {failed} failed, {faults} faults, {violations} violations; "
                f"now {now}"
            )

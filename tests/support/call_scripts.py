"""Scripts for clients and workers, as Hypothesis makes them, and how one is played on either broker.

One client calls one service; up to two workers serve it, with other methods each. What runs, runs until the script
lets it end, so that no step is a race with another. As in `seam_scripts`, the in-process broker is played first.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hypothesis import strategies as st

from rpcq import CallError, Client, DomainError, Retry, Service, Worker
from rpcq.errors import BrokerUnreachable
from rpcq.wire.topology import Topology
from support.seam import SECONDS, until
from support.seam_scripts import AGREE_SECONDS, Seen, Stage, abort, flushed

SHORT = 2.0
"""Seconds of a call that no worker takes. The broker gives it up 0.2 s earlier."""

LONG = 60.0
"""Seconds of a call that is to end before."""

STEADY = 0.06
"""Seconds in which nothing happens in memory, once all has happened: a session comes back within 0.05."""


BY_CHANCE = ("loop_blocks", "reply_messages")
"""Counts that depend on the time that each iteration of an event loop takes."""


class Busy(DomainError):
    pass


# --- Scripts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    worker: int
    prefetch: int


@dataclass(frozen=True)
class Stop:
    """With a grace time that is over at once: what runs is cut off."""

    worker: int


@dataclass(frozen=True)
class Call:
    """A call.

    Attributes:
        key: its idempotency key.
        short: where no worker has a slot free, and its deadline is waited for.
    """

    method: str
    idempotent: bool = False
    retries: bool = False
    key: str | None = None
    short: bool = False


@dataclass(frozen=True)
class Release:
    """Let a handler end: the oldest, or one of those after it."""

    at: int


@dataclass(frozen=True)
class ReleaseAll:
    """Let all handlers of the only worker end, so that their replies go together."""


@dataclass(frozen=True)
class Cancel:
    """Cancel one of the callers that wait."""

    at: int


@dataclass(frozen=True)
class CutClient:
    session: str


@dataclass(frozen=True)
class CutWorker:
    worker: int
    session: str


@dataclass(frozen=True)
class End:
    """What nobody serves is given up, and the workers stop."""


Step = Start | Stop | Call | Release | ReleaseAll | Cancel | CutClient | CutWorker | End


@dataclass(frozen=True)
class Script:
    queue_type: Literal["classic", "quorum"]
    steps: tuple[Step, ...]


ENDING = ("quick", "fail", "decline", "nap", "brief", "wrong", "misfit")
"""Methods of both workers that end by themselves; "brief" by its time, and "misfit" has other parameters."""

OF_ONE = ("first", "second")
"""Methods of one worker alone."""

HOLDING = ("hold", "hold_again")
"""Methods that run until they are released; the latter is declared idempotent."""

NOWHERE = ("absent", "nobody.quick", "no queue")
"""A method, a service and a queue that nobody has."""

SESSIONS = st.sampled_from(["consuming", "publishing", "both"])


class _Steps:
    """What may come next in a script, by about what there is at that time."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.up: list[int] = []
        self.held = 0
        self.patience = 2
        self.cuts = 3  # each makes the next one slower to heal

    def draw_next(self) -> Step:
        kinds = ["call"] * 4 + ["hold"] * 4 if self.up else ["start"] * 20 + ["call", "hold"]
        if len(self.up) == 1:
            kinds += ["start"] * 2
        if self.up:
            kinds += ["stop"]
        if self.held:
            kinds += ["release", "release", "cancel"]
        if self.held > 1:
            kinds += ["release_all"] * 2
        if self.cuts:
            kinds += ["cut_client"] + ["cut_worker"] * 2 * bool(self.up)
        return getattr(self, "_" + self.draw(st.sampled_from(kinds)))()  # type: ignore[no-any-return]

    def _start(self) -> Start:
        number = self.draw(st.sampled_from([it for it in (0, 1) if it not in self.up]))
        self.up.append(number)
        return Start(number, self.draw(st.sampled_from([1, 2, 2, 6])))

    def _stop(self) -> Stop:
        number = self.draw(st.sampled_from(self.up))
        self.up.remove(number)
        return Stop(number)

    def _call(self) -> Call:
        which = self.draw(st.sampled_from([ENDING, ENDING, ENDING, ("book",), ("book",), OF_ONE, NOWHERE]))
        method = self.draw(st.sampled_from(which))
        if method == "book":
            return Call(method, key=self.draw(st.sampled_from(["k", "k", "l"])))
        return Call(method, idempotent=self.draw(st.booleans()), retries=self.draw(st.booleans()))

    def _hold(self) -> Call:
        short = self.patience > 0 and self.draw(st.integers(0, 2)) == 0
        self.patience -= short
        self.held += not short
        return Call(self.draw(st.sampled_from(HOLDING)), idempotent=self.draw(st.booleans()), short=short)

    def _release(self) -> Release:
        self.held -= 1
        return Release(self.draw(st.integers(0, 2)))

    def _release_all(self) -> ReleaseAll:
        self.held = 0
        return ReleaseAll()

    def _cancel(self) -> Cancel:
        self.held -= 1
        return Cancel(self.draw(st.integers(0, 2)))

    def _cut_client(self) -> CutClient:
        self.cuts -= 1
        return CutClient(self.draw(SESSIONS))

    def _cut_worker(self) -> CutWorker:
        self.cuts -= 1
        return CutWorker(self.draw(st.sampled_from(self.up)), self.draw(SESSIONS))


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    steps = _Steps(draw)
    queue_type: Literal["classic", "quorum"] = draw(st.sampled_from(["classic", "quorum"]))
    return Script(queue_type, tuple(steps.draw_next() for _ in range(draw(st.integers(4, 16)))))


# --- Playing ---------------------------------------------------------------------------------------------------------


@dataclass
class _Made:
    """A call that was made."""

    step: Call
    task: asyncio.Task[Any]
    gate: asyncio.Event


class _Serving:
    """A worker, with what its handlers hold."""

    worker: Worker

    def __init__(self, number: int, prefetch: int) -> None:
        self.number = number
        self.prefetch = prefetch
        self.held: list[int] = []
        self.was_cut = False


class Player:
    """One script on one broker."""

    def __init__(self, script: Script, stage: Stage) -> None:
        self.script = script
        self.stage = stage
        self.topology = Topology(stage.seam.namespace)
        self.queue = self.topology.request_queue("things", script.queue_type).name
        self.client = Client(stage.seam.url, namespace=stage.seam.namespace, timeout=LONG)
        self.serving: dict[int, _Serving] = {}
        self.stopped: list[Worker] = []
        self.made: list[_Made] = []
        self.runs: list[tuple[int, str]] = []
        self.booked = 0

    async def play(self, expected: Sequence[Seen] | None = None) -> list[Seen]:
        """What each step led to; as far as what was expected, and with the first step that leads to something else."""
        told: list[Seen] = []
        await self.client.connect()
        try:
            # One after the other, so that what still waits comes to the one worker that has a slot.
            for step in (*self.script.steps, *[Release(0)] * len(self.script.steps), End()):
                if not await self._take(step):
                    continue
                seen = await self._see(None if expected is None else expected[len(told)])
                told.append({"step": step, **seen})
                if expected is not None and told[-1] != expected[len(told) - 1]:
                    break
        finally:
            await self._close()
        return told

    async def _close(self) -> None:
        for made in self.made:
            made.gate.set()
            made.task.cancel()
        await asyncio.gather(*(made.task for made in self.made), return_exceptions=True)
        for serving in self.serving.values():
            await serving.worker.stop()
        await self.client.close()

    # Steps.

    async def _take(self, step: Step) -> bool:
        """Take a step; whether there was anything to do, and not two workers that may do it."""
        match step:
            case Start(number, prefetch) if number not in self.serving:
                await self._start(number, prefetch)
            case Stop(number) if number in self.serving and self._may_lose(number):
                await self._stop(number)
            case Call() if self._may_call(step):
                await self._call(step)
            case Release(at) if held := self._held():
                self.made[held[at % len(held)]].gate.set()
            case ReleaseAll() if len(self.serving) == 1 and (held := self._held()):
                for number in held:
                    self.made[number].gate.set()
            case Cancel(at) if waiting := [made for made in self.made if not made.task.done()]:
                waiting[at % len(waiting)].task.cancel()
            case CutClient(session) if session == "publishing" or self._may_send_again():
                await self._cut(self.client, session)
            case CutWorker(number, session) if number in self.serving and self._may_lose(number):
                serving = self.serving[number]
                serving.was_cut = True
                await flushed(serving.worker, self.queue)
                await self._cut(serving.worker, session)
            case End():
                await self._end()
            case _:
                return False
        return True

    def _held(self) -> list[int]:
        """The calls whose handlers are held."""
        return sorted(number for each in self.serving.values() for number in each.held)

    def _free(self) -> int:
        """How many workers may have a slot free."""
        return sum(each.was_cut or len(each.held) < each.prefetch for each in self.serving.values())

    def _may_call(self, step: Call) -> bool:
        if step.short:
            return not self._free()  # what runs into its deadline has a tenth of a second to say so: see "brief"
        return step.method in (*ENDING, "nobody.quick", "no queue") or self._free() < 2

    def _may_send_again(self) -> bool:
        waiting = any(not made.task.done() and made.step.idempotent for made in self.made)
        return not waiting or self._free() < 2

    def _may_lose(self, number: int) -> bool:
        """Of two that a lost worker held, the second may come to the other one or to the first when it is back."""
        return len(self.serving) < 2 or (len(self.serving[number].held) < 2 and not self.serving[number].was_cut)

    async def _start(self, number: int, prefetch: int) -> None:
        service = Service("things", queue_type=self.script.queue_type, errors=[Busy])
        namespace, url = self.stage.seam.namespace, self.stage.seam.url
        serving = _Serving(number, prefetch)
        self._add_methods(service, serving)
        serving.worker = Worker(service, url=url, namespace=namespace, prefetch=prefetch, grace=0.05)
        self.stage.seam.lasting.append(self.queue)
        await serving.worker.start()
        self.serving[number] = serving

    def _add_methods(self, service: Service, serving: _Serving) -> None:
        run, mine = self._run, OF_ONE[serving.number]

        async def quick(number: int) -> int:
            return run(number, "quick")

        async def own(number: int) -> int:
            return run(number, mine)

        async def nap(number: int) -> int:
            await asyncio.sleep(0.02)
            return run(number, "nap")

        async def brief(number: int) -> None:
            run(number, "brief")
            await asyncio.sleep(LONG)

        async def fail(number: int) -> None:
            raise ValueError(run(number, "fail"))

        async def decline(number: int) -> None:
            raise Busy(str(run(number, "decline")))

        async def wrong(number: int) -> str:
            return run(number, "wrong")  # type: ignore[return-value]

        async def misfit(number: int, missing: int) -> int:
            return run(number, "misfit") + missing

        for handler in (quick, nap, fail, decline, wrong, misfit):
            service.method(handler)
        service.method(name=mine)(own)
        service.method(timeout=0.05)(brief)
        self._add_methods_with_state(service, serving)

    def _add_methods_with_state(self, service: Service, serving: _Serving) -> None:
        async def book(what: str) -> int:
            self.booked += 1
            return self._run(self.booked, f"book {what}")

        async def hold(number: int) -> int:
            self._run(number, "hold")
            serving.held.append(number)
            try:
                await self.made[number].gate.wait()
            finally:
                serving.held.remove(number)
            return number

        service.method(book)
        service.method(hold)
        service.method(name="hold_again", idempotent=True)(hold)

    def _run(self, number: int, method: str) -> int:
        self.runs.append((number, method))
        return number

    async def _stop(self, number: int) -> None:
        serving = self.serving.pop(number)
        await flushed(serving.worker, self.queue)
        async with asyncio.timeout(SECONDS):
            await serving.worker.stop()
        self.stopped.append(serving.worker)

    async def _call(self, step: Call) -> None:
        number = len(self.made)
        options: dict[str, Any] = {"idempotent": step.idempotent, "timeout": SHORT if step.short else LONG}
        if step.retries:
            codes = ("UNAVAILABLE", "UNKNOWN", "busy")
            options["retry"] = Retry(max_attempts=3, initial_backoff=0.01, codes=codes)
        if step.key is not None:
            options["idempotency_key"] = step.key
        if step.method == "no queue":
            options["queue"] = f"{self.queue}.absent"
        target = {"no queue": "things.quick"}.get(step.method, step.method)
        params: dict[str, Any] = {"what": step.key} if step.method == "book" else {"number": number}
        caller = self.client.with_options(**options)
        task = asyncio.create_task(caller.call(target if "." in target else f"things.{target}", **params))
        self.made.append(_Made(step, task, asyncio.Event()))
        if step.short:
            await asyncio.wait([task], timeout=SHORT + SECONDS)

    async def _cut(self, end: Client | Worker, session: str) -> None:
        sessions = ["consuming", "publishing"] if session == "both" else [session]
        for each in sessions:
            abort(end._transport, each, BrokerUnreachable("cut by a script"))
        await until(lambda: not end.connected)
        await until(lambda: end.connected)

    async def _end(self) -> None:
        for made in self.made:
            made.task.cancel()
        await asyncio.gather(*(made.task for made in self.made), return_exceptions=True)
        for number, serving in [*self.serving.items()]:
            await until(lambda serving=serving: not serving.worker.in_flight)  # type: ignore[misc]
            await self._stop(number)

    # Seeing.

    async def _see(self, expected: Seen | None) -> Seen:
        if expected is None:
            return await self._see_steady()
        giving_up = asyncio.get_running_loop().time() + AGREE_SECONDS
        while True:
            seen = await self._look()
            if all(seen[what] == expected[what] for what in seen) or asyncio.get_running_loop().time() > giving_up:
                return seen
            await asyncio.sleep(0.003)

    async def _see_steady(self) -> Seen:
        loop = asyncio.get_running_loop()
        seen, since = await self._look(), loop.time()
        while loop.time() < since + STEADY:
            await asyncio.sleep(0.005)
            if (now := await self._look()) != seen:
                seen, since = now, loop.time()
        return seen

    async def _look(self) -> Seen:
        workers = [*(serving.worker for serving in self.serving.values()), *self.stopped]
        counts: Counter[str] = Counter()
        for worker in workers:
            counts.update({name: count for name, count in worker.counts().items() if name not in BY_CHANCE})
        return {
            "ended": [self._ended(made) for made in self.made],
            "ran": sorted(self.runs),
            "held": {number: sorted(serving.held) for number, serving in sorted(self.serving.items())},
            "client": {**self.client.counts()},
            "workers": dict(counts),
            "cancels": sum(len(worker._intake._cancels) for worker in workers),
            "ready": await self.stage.depth(self.queue) if self.queue in self.stage.seam.lasting else None,
        }

    def _ended(self, made: _Made) -> Any:
        task = made.task
        if not task.done():
            return "waits"
        if task.cancelled():
            return "cancelled"
        error = task.exception()
        if error is None:
            return task.result()
        if isinstance(error, CallError):
            return type(error).__name__, error.code, error.executed, error.retryable, error.attempt
        return repr(error)

"""Scripts for transports, as Hypothesis makes them, and how one is played on either broker.

A script lays out a few queues and then takes step after step: publish, consume, settle, leave, lose the connection.
After each step all that it led to is waited for, and written down. The in-process broker is played first, where
nothing is under way any more once the event loop is idle; RabbitMQ then has a few seconds to come to the same.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import aio_pika
from aio_pika.abc import AbstractChannel
from hypothesis import strategies as st

from rpcq import Client, Worker
from rpcq.errors import BrokerError
from rpcq.transport.base import Delivery, Published
from rpcq.transport.memory.broker import MemoryBroker
from rpcq.wire.properties import decode
from rpcq.wire.topology import Exchange, Queue, Topology
from support.seam import SECONDS, End, Seam, taken, until

AGREE_SECONDS = 3.0
"""How long RabbitMQ may take to come to what the in-process broker came to."""

SHORT_MS = 50
"""A message with so little time is published and outlived in one step: no other step is a race with it."""

LONG_MS = 600_000
"""A message with so much time does not expire."""

NOT_COMPARED = ("x-last-death-", "x-acquired-count")
"""Headers that later versions of RabbitMQ add."""

# --- Scripts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Laid:
    """A queue: the third part of its name tells its place in the script.

    Attributes:
        limit: messages that it holds before it refuses more.
        dead_letters: where they go: "" for the default exchange, the second exchange, one that is missing, or nowhere.
        keys: under which it is bound to the first exchange.
        letter_keys: the same, of the second.
    """

    quorum: bool
    delivery_limit: int | None
    limit: int | None
    dead_letters: str | None
    keys: frozenset[str]
    letter_keys: frozenset[str]


@dataclass(frozen=True)
class Publish:
    exchange: str
    key: str
    copies: tuple[str, ...] | None
    mandatory: bool
    ttl: int | None
    count: int


@dataclass(frozen=True)
class PublishWrongly:
    """The broker closes the channel over it."""

    how: str


@dataclass(frozen=True)
class Join:
    """One more consumer of a queue, if it may have one."""

    queue: int
    prefetch: int
    no_ack: bool = False


@dataclass(frozen=True)
class Settle:
    """The oldest of what is held of a queue, or one of those behind it."""

    queue: int
    at: int
    how: str


@dataclass(frozen=True)
class Stop:
    """Its consumers are cancelled, and keep what they hold."""

    queue: int


@dataclass(frozen=True)
class Leave:
    """Its consumers go, all at once."""

    queue: int


@dataclass(frozen=True)
class Cut:
    """The connections of its consumers are lost, all at once, and come back."""

    queue: int


@dataclass(frozen=True)
class CutCaller:
    session: str


Step = Publish | PublishWrongly | Join | Settle | Stop | Leave | Cut | CutCaller


@dataclass(frozen=True)
class Script:
    """Queues, and what happens to them.

    Attributes:
        letters_keep_counts: a dead letter keeps its flag and count of deliveries, as from RabbitMQ 4.0 on.
    """

    queues: tuple[Laid, ...]
    steps: tuple[Step, ...]
    letters_keep_counts: bool = False


KEYS = ("a", "b")
OWN = "own"
"""Stands for the caller's own queue, which the broker names."""
NOBODY = "nobody"
MISSING = "missing"
FIRST, SECOND = "requests", "letters"


@st.composite
def laid(draw: st.DrawFn) -> Laid:
    quorum = draw(st.booleans())
    return Laid(
        quorum=quorum,
        delivery_limit=draw(st.sampled_from([0, 0, 1, None])) if quorum else None,
        # A quorum queue's limit is approximate: it tells its publishers that it is full some time after it is.
        limit=None if quorum else draw(st.sampled_from([None, None, 0, 1, 2, 3])),
        dead_letters=draw(st.sampled_from(["", "", SECOND, SECOND, MISSING, None])),
        keys=draw(st.frozensets(st.sampled_from(KEYS))),
        letter_keys=draw(st.frozensets(st.sampled_from(KEYS))),
    )


class _Steps:
    """What may come next in a script, by what its queues are at that time."""

    def __init__(self, draw: st.DrawFn, queues: Sequence[Laid]) -> None:
        self.draw = draw
        self.queues = queues
        self.consumers = [0] * len(queues)
        self.limited = [False] * len(queues)  # prefetch
        self.lost = 0

    def draw_next(self) -> Step:
        number = self.draw(st.integers(0, len(self.queues) - 1))
        if not self.consumers[number]:
            kinds = ["publish"] * 4 + ["join"] * 4
        else:
            kinds = ["publish"] * 8 + ["settle"] * 8 + ["cut"] * 3 + ["leave"] * 2 + ["join", "stop"]
        if self.lost < 2:  # each loss of a session makes the next one slower to come back
            kinds += ["lost"]
        kind = self.draw(st.sampled_from(kinds))
        return getattr(self, f"_{kind}")(number)  # type: ignore[no-any-return]

    def _publish(self, number: int) -> Publish:
        names = [f"q{other}" for other in range(len(self.queues))]
        laid, draw = self.queues[number], self.draw
        exchange = draw(st.sampled_from(["", FIRST])) if laid.keys else ""
        own = sorted(laid.keys) if exchange else [f"q{number}"]
        key = draw(st.sampled_from([*own * 4, *(KEYS if exchange else names), NOBODY]))
        copy = st.sampled_from([OWN, OWN, *names, *KEYS, NOBODY])
        copies = draw(st.one_of(st.none(), st.lists(copy, min_size=1, max_size=2).map(tuple)))
        ttl = draw(st.sampled_from([None, None, None, LONG_MS, SHORT_MS, SHORT_MS, 0]))
        targets = self._targets(exchange, {key, *(copies or ())})
        if ttl in {SHORT_MS, 0} and len(targets) > 1:
            ttl = LONG_MS  # what dies in several queues at once may come to another one in any order
        if ttl == 0 and any(self.queues[target].quorum for target in targets):
            ttl = SHORT_MS  # whether a quorum queue lets it pass where a consumer is free is a race
        return Publish(exchange, key, copies, draw(st.booleans()), ttl, draw(st.sampled_from([1, 2, 4])))

    def _targets(self, exchange: str, keys: set[str]) -> list[int]:
        return [number for number, laid in enumerate(self.queues) if keys & (laid.keys if exchange else {f"q{number}"})]

    def _join(self, number: int) -> Join:
        no_ack = self.draw(st.integers(0, 5)) == 5
        # Without acknowledgements, how fast a quorum queue fills a prefetch again would be a race with expirations.
        prefetch = 0 if no_ack else self.draw(st.sampled_from([1, 1, 2, 3, 0]))
        if not self.consumers[number]:
            self.limited[number] = prefetch > 0
        self.consumers[number] += 1
        return Join(number, prefetch, no_ack=no_ack)

    def _settle(self, number: int) -> Settle:
        hows = ["ack", "reject", "requeue"]
        if self.limited[number] and self.queues[number].delivery_limit is not None:
            # Over the limit, RabbitMQ 3.10 gives the consumer two slots for the one that it had.
            hows.remove("requeue")
        how = self.draw(st.sampled_from(hows))
        return Settle(number, self.draw(st.integers(0, 3)), how)

    def _stop(self, number: int) -> Stop:
        return Stop(number)

    def _leave(self, number: int) -> Leave:
        self.consumers[number] = 0
        return Leave(number)

    def _cut(self, number: int) -> Cut:
        return Cut(number)

    def _lost(self, _: int) -> CutCaller | PublishWrongly:
        self.lost += 1
        if self.draw(st.booleans()):
            return CutCaller(self.draw(st.sampled_from(["consuming", "publishing", "both"])))
        return PublishWrongly(self.draw(st.sampled_from(["exchange", "expiration", "copies"])))


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    queues = tuple(draw(st.lists(laid(), min_size=1, max_size=3)))
    steps = _Steps(draw, queues)
    return Script(queues, tuple(steps.draw_next() for _ in range(draw(st.integers(4, 20)))))


def for_release(script: Script, release: tuple[int, ...]) -> Script:
    """The script without what versions of RabbitMQ do differently.

    Before 4.0, a quorum queue without a delivery limit puts what is given back behind all others; later ones have a
    limit where none is set. From 4.3 on, a quorum queue does not count what is given back by basic.nack, it counts on
    from what a dead letter brings (with a limit of 0, that is the same), and a message expires in it although others
    that were given back stand before it.
    """
    if release < (4, 0):
        return script
    is_newest = release >= (4, 3)
    quorum = {number for number, laid in enumerate(script.queues) if laid.quorum}
    left_out = {it for it in quorum if is_newest or script.queues[it].delivery_limit is None}
    kept = [it for it in script.steps if not (isinstance(it, Settle) and it.how == "requeue" and it.queue in left_out)]
    if is_newest and quorum:
        kept = [replace(it, ttl=None) if isinstance(it, Publish) and it.ttl in {SHORT_MS, 0} else it for it in kept]
    queues = script.queues
    if is_newest and any(laid.quorum and laid.dead_letters in {"", SECOND} for laid in queues):
        queues = tuple(replace(laid, delivery_limit=0) if laid.delivery_limit == 1 else laid for laid in queues)
    return Script(queues, tuple(kept), letters_keep_counts=True)


# --- Brokers ---------------------------------------------------------------------------------------------------------


class Stage(Protocol):
    """A broker to play on, as somebody sees it who is no part of the script."""

    seam: Seam

    async def depth(self, queue: str) -> int:
        """How many messages are ready."""


class MemoryStage:
    def __init__(self, namespace: str) -> None:
        self.seam = Seam(f"memory://{namespace}", namespace)

    async def depth(self, queue: str) -> int:
        broker = MemoryBroker.named(self.seam.namespace)
        assert broker is not None
        return broker.depth(queue)


async def _idle() -> None:
    """Until the event loop has nothing left to do but what is due at some time."""
    for _ in range(20):
        await asyncio.sleep(0)


class RabbitMQStage:
    def __init__(self, url: str, namespace: str, admin: AbstractChannel) -> None:
        self.seam = Seam(url, namespace)
        self._admin = admin

    async def depth(self, queue: str) -> int:
        found = await self._admin.declare_queue(queue, passive=True)
        return found.declaration_result.message_count or 0


@contextlib.asynccontextmanager
async def rabbitmq_stage(url: str, namespace: str) -> AsyncIterator[RabbitMQStage]:
    """RabbitMQ, on which the script leaves nothing."""
    async with await aio_pika.connect(url) as connection:
        admin = await connection.channel()
        stage = RabbitMQStage(url, namespace, admin)
        try:
            yield stage
        finally:
            for exchange in (FIRST, SECOND):
                await admin.exchange_delete(f"{namespace}.{exchange}")
            for queue in stage.seam.lasting:
                await admin.queue_delete(queue)


def abort(transport: Any, session: str, cause: BrokerError) -> None:
    """Reset one connection."""
    if hasattr(transport, "lose_consuming"):
        transport.lose_consuming(cause) if session == "consuming" else transport.lose_publishing(cause)
    else:
        getattr(transport, f"_{session}")._link.protocol.abort()


_last_channels: WeakKeyDictionary[Any, AbstractChannel] = WeakKeyDictionary()
"""Of transports whose consumers were cancelled, that on which they were."""


async def flushed(end: End | Client | Worker, queue: str) -> None:
    """Wait until the broker has taken all that the only consumer of an end's first queue has settled."""
    transport: Any = end.transport if isinstance(end, End) else end._transport
    if hasattr(transport, "lose_consuming"):
        await _idle()
        return
    session = transport._consuming
    for channel in session._channels:
        channel.flush()
    if session._consumers:
        _last_channels[transport] = session._consumers[0][0]
    # What is asked on a channel is answered after all that was told on it before.
    await _last_channels[transport].declare_queue(queue, passive=True)


# --- Playing ---------------------------------------------------------------------------------------------------------

Seen = dict[str, Any]
"""What one step led to."""


@dataclass
class _Consumers:
    """Those of one queue.

    Attributes:
        told: how much of each one's inbox was written down.
        held: what can be settled.
    """

    ends: list[End] = field(default_factory=list)
    no_ack: bool = False
    stopped: bool = False
    told: dict[End, int] = field(default_factory=dict)
    held: list[Delivery] = field(default_factory=list)


class Player:
    """One script on one broker."""

    def __init__(self, script: Script, stage: Stage) -> None:
        self.script = script
        self.stage = stage
        self.seam = stage.seam
        self.exchanges = [Topology(self.seam.namespace).requests, Exchange(f"{self.seam.namespace}.{SECOND}")]
        self.queues = [self._queue(f"q{number}", laid) for number, laid in enumerate(script.queues)]
        self.consumers = [_Consumers() for _ in self.queues]
        self.caller = self.seam.end(taken(self.seam.own_queue(), no_ack=True))
        self.caller_told = 0
        self.names: dict[str, str] = {}
        self.published: list[asyncio.Future[Published]] = []
        self.reported = 0
        self.count = 0

    def _queue(self, name: str, laid: Laid) -> Queue:
        arguments: dict[str, Any] = {}
        if laid.limit is not None:
            arguments |= {"x_max_length": laid.limit, "x_overflow": "reject-publish"}
        if laid.dead_letters is not None:
            arguments["x_dead_letter_exchange"] = laid.dead_letters and f"{self.seam.namespace}.{laid.dead_letters}"
        if laid.quorum:
            arguments["x_queue_type"] = "quorum"
        if laid.delivery_limit is not None:
            arguments["x_delivery_limit"] = laid.delivery_limit
        queue = self.seam.queue(name, lasts=True, **arguments)
        bindings = [(self.exchanges[0].name, key) for key in sorted(laid.keys)]
        bindings += [(self.exchanges[1].name, key) for key in sorted(laid.letter_keys)]
        return Queue(queue.name, durable=True, arguments=queue.arguments, bindings=tuple(bindings))

    async def play(self, expected: Sequence[Seen] | None = None) -> list[Seen]:
        """What each step led to; as far as what was expected, and with the first step that leads to something else."""
        async with contextlib.AsyncExitStack() as stack:
            await self.caller.start(self.exchanges)
            stack.push_async_callback(self._close, self.caller)
            self.names[self.caller.names[0]] = "own1"
            declaring = self.seam.end(*self.queues)  # and left at once: nothing is there to be delivered
            await declaring.start(self.exchanges)
            await self._close(declaring)
            ending = [Leave(number) for number in range(len(self.queues))]
            ending += [Join(number, 0, no_ack=True) for number in range(len(self.queues))]  # type: ignore[misc]
            told: list[Seen] = []
            for step in (*self.script.steps, *ending):
                await self._take(step)
                seen = await self._see(None if expected is None else expected[len(told)])
                told.append({"step": step, **seen})
                if expected is not None and told[-1] != expected[len(told) - 1]:
                    break
            for consumers in self.consumers:
                for end in consumers.ends:
                    await self._close(end)
        return told

    async def _close(self, end: End) -> None:
        async with asyncio.timeout(SECONDS):
            await end.transport.close()

    # Steps.

    async def _take(self, step: Step) -> None:
        match step:
            case Publish():
                await self._publish(step)
            case PublishWrongly():
                await self._publish_wrongly(step)
            case CutCaller():
                await self._cut_caller(step)
            case _:
                consumers, queue = self.consumers[step.queue], self.queues[step.queue]
                await self._take_of(step, consumers, queue)

    async def _take_of(self, step: Join | Settle | Stop | Leave | Cut, of: _Consumers, queue: Queue) -> None:
        match step:
            case Join(number, prefetch, no_ack):
                # Of two consumers either may get a message: what they hold together is the same, and that is compared.
                # That of a quorum queue depends on which of two is seen to be lost first.
                alone = self.script.queues[number].quorum or no_ack or of.no_ack or of.stopped
                if not of.ends or (not alone and len(of.ends) < 2):
                    end = self.seam.end(taken(queue, prefetch=prefetch, no_ack=no_ack))
                    of.ends.append(end)
                    of.no_ack = no_ack
                    await end.start(self.exchanges)
            case Settle(_, at, how) if of.held:
                of.held.sort(key=lambda delivery: int(delivery.body or b""))
                delivery = of.held.pop(at % len(of.held))
                delivery.ack() if how == "ack" else delivery.reject(requeue=how == "requeue")
                for end in of.ends:
                    await flushed(end, queue.name)
            case Stop() if of.ends and not of.stopped:
                of.stopped = True
                for end in of.ends:
                    await flushed(end, queue.name)
                async with asyncio.timeout(SECONDS):
                    await asyncio.gather(*(end.transport.stop_consuming() for end in of.ends))
            case Leave() if of.ends:
                self._tell(of)
                if len(of.ends) > 1:  # else one may get what another one leaves, or not
                    await asyncio.gather(*(end.transport.stop_consuming() for end in of.ends))
                await asyncio.gather(*(self._close(end) for end in of.ends))
                self.consumers[step.queue] = _Consumers()
            case Cut() if of.ends and not of.stopped:
                of.held.clear()
                times = [end.of("consuming").count("up") + 1 for end in of.ends]
                for end in of.ends:
                    end.cut_one("consuming")
                for end, up in zip(of.ends, times, strict=True):
                    await until(lambda end=end, up=up: end.of("consuming").count("up") == up)  # type: ignore[misc]
            case _:
                pass  # there is nobody to do it

    async def _publish(self, step: Publish) -> None:
        exchange = step.exchange and self.exchanges[0].name
        more: dict[str, Any] = {}
        if step.copies is not None:
            more["headers"] = {"CC": [self._key(copy) for copy in step.copies]}
        if step.ttl is not None:
            more["expiration"] = b"%d" % step.ttl
        sent = []
        for _ in range(step.count):
            self.count += 1
            body = b"%d" % self.count
            sent.append(
                self.caller.publish(
                    self._key(step.key), body, exchange=exchange, mandatory=step.mandatory, correlation_id=body, **more
                )
            )
        await self._settled(sent)
        if step.ttl is not None and step.ttl < LONG_MS:
            await asyncio.sleep(step.ttl / 1000 + 0.01)

    async def _settled(self, sent: list[asyncio.Future[Published]]) -> None:
        self.published += sent
        await asyncio.wait(sent, timeout=SECONDS)

    def _key(self, symbol: str) -> str:
        if symbol == OWN:
            return self.caller.names[0]
        return symbol if symbol in KEYS else f"{self.seam.namespace}.{symbol}"

    async def _publish_wrongly(self, step: PublishWrongly) -> None:
        more: dict[str, Any] = {}
        if step.how == "exchange":
            more["exchange"] = f"{self.seam.namespace}.{MISSING}"
        elif step.how == "expiration":
            more["expiration"] = b"-1"
        else:
            more["headers"] = {"CC": "no array"}
        times = self.caller.of("publishing").count("up") + 1
        await self._settled([self.caller.publish(self._key("q0"), b"wrong", **more)])
        await until(lambda: self.caller.of("publishing").count("up") == times)

    async def _cut_caller(self, step: CutCaller) -> None:
        sessions = ["consuming", "publishing"] if step.session == "both" else [step.session]
        times = {session: self.caller.of(session).count("up") + 1 for session in sessions}
        for session in sessions:
            self.caller.cut_one(session)
        await until(lambda: all(self.caller.of(session).count("up") == up for session, up in times.items()))
        self.names.setdefault(self.caller.names[0], f"own{len(self.names) + 1}")

    # Seeing.

    async def _see(self, expected: Seen | None) -> Seen:
        if expected is None:
            await _idle()
            seen = await self._look(self._fresh())
            self.reported = len(self.published)
            return seen
        fresh: dict[str, list[Any]] = {}
        giving_up = asyncio.get_running_loop().time() + AGREE_SECONDS
        while True:
            for queue, deliveries in self._fresh().items():
                fresh.setdefault(queue, []).extend(deliveries)
            seen = await self._look(fresh)
            if all(seen[what] == expected[what] for what in seen) or asyncio.get_running_loop().time() > giving_up:
                self.reported = len(self.published)
                return seen
            await asyncio.sleep(0.003)

    def _fresh(self) -> dict[str, list[Any]]:
        """What has come since this was called last."""
        fresh = {}
        for number, consumers in enumerate(self.consumers):
            if found := self._tell(consumers):
                fresh[f"q{number}"] = found
        own = self.caller.inbox.all[self.caller_told :]
        self.caller_told += len(own)
        if own:
            fresh[OWN] = [self._told(delivery) for delivery in own]
        return fresh

    def _tell(self, consumers: _Consumers) -> list[Any]:
        found = []
        for end in consumers.ends:
            deliveries = end.inbox.all[consumers.told.get(end, 0) :]
            consumers.told[end] = len(end.inbox.all)
            found += deliveries
        if not consumers.no_ack:
            consumers.held += found
        return [self._told(delivery) for delivery in found]

    async def _look(self, fresh: dict[str, list[Any]]) -> Seen:
        published = self.published[self.reported :]
        return {
            "published": [future.result().value if future.done() else "nothing" for future in published],
            "came": {queue: self._ordered(queue, deliveries) for queue, deliveries in fresh.items()},
            "ready": {f"q{number}": await self.stage.depth(queue.name) for number, queue in enumerate(self.queues)},
        }

    def _ordered(self, queue: str, deliveries: list[Any]) -> list[Any]:
        """In the order that RabbitMQ promises: one sender's messages come in order, and senders in any."""
        if queue == OWN:
            return sorted(deliveries, key=_sender)
        return sorted(deliveries, key=repr) if len(self.consumers[int(queue[1:])].ends) > 1 else deliveries

    def _told(self, delivery: Delivery) -> Any:
        found = decode(delivery.properties)
        headers = {
            name: self._plain(value)
            for name, value in (found.headers or {}).items()
            if not name.startswith(NOT_COMPARED)
        }
        flag = "redelivered" if delivery.redelivered else "new"
        if self.script.letters_keep_counts and "x-death" in headers:
            flag = "letter"
            headers.pop("x-delivery-count", None)
        return delivery.body, flag, found.expiration, headers

    def _plain(self, value: Any) -> Any:
        """A header without what differs from one run to the next: when, and names that a broker made up."""
        if isinstance(value, dict):
            return {name: self._plain(inner) for name, inner in value.items() if name != "time"}
        if isinstance(value, list):
            return [self._plain(inner) for inner in value]
        return self.names.get(value, value) if isinstance(value, str) else value


def _sender(told: Any) -> str:
    """Where a message came from: the queue in which it died last, or the script itself."""
    deaths = told[-1].get("x-death")
    return deaths[0]["queue"] if deaths else ""

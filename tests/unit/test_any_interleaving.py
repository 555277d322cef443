"""A client over a transport and a clock that the test holds in its hand: whatever happens in whatever order, each call
ends once, honestly and in time, and nothing of it is left. Calls that are made together go in one message.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import rpcq.calls.gathering
import rpcq.calls.invoking
import rpcq.calls.retrying
import rpcq.calls.sending
import rpcq.client
import rpcq.runtime.timeouts
from rpcq import CallError, Client, Overloaded, Retry
from rpcq.calls.outcomes import MAX_ATTEMPTS
from rpcq.errors import BrokerUnreachable
from rpcq.transport.base import Delivery, Listener, Outgoing, Published, Subscription
from rpcq.wire import batches, bodies, properties, replies, requests
from rpcq.wire.topology import Exchange
from support.held_loop import HeldLoop

CUT = BrokerUnreachable("cut by the test")
LIMIT = 8
"""Calls that the client may have under way."""

UNRUN_WITHIN = 1.0
"""Seconds after it was sent within which an expiry proves that a request was never delivered."""


NOT_TAKEN = (Published.RETURNED, Published.TOO_LARGE, Published.UNSENT)


class Message:
    """A message that was handed to the transport, and what the broker did with it."""

    def __init__(self, outgoing: Outgoing, generation: int, now: float) -> None:
        self.outgoing = outgoing
        self.generation = generation  # of the reply queue that it names
        self.at = now
        self.is_once = b".once." in outgoing.routing_key  # in one queue that delivers once, and in no other
        self.settled: Published | None = None
        request = requests.read_request(outgoing.properties)
        self.is_batch = request.is_batch
        found = batches.read_requests(request, outgoing.body) if self.is_batch else [(request, outgoing.body)]
        self.requests = [Sent(self, it, body) for it, body in found]

    @property
    def has_run(self) -> bool:
        return any(it.has_run for it in self.requests)

    def settle(self, settled: Published) -> None:
        self.settled = settled
        # A classic queue whose node cannot be reached may have the request that the broker refuses.
        if settled in NOT_TAKEN or (settled is Published.REFUSED and self.is_once):
            self.never_runs()
        self.outgoing.on_published(settled)

    def never_runs(self) -> None:
        for it in self.requests:
            it.may_run = False


class Sent:
    """A request in a message, and what the world knows of it."""

    def __init__(self, message: Message, request: requests.Request, body: bytes) -> None:
        self.message = message
        self.id = request.correlation_id
        self.nonce = json.loads(body)["nonce"]
        self.attempt = request.attempt
        self.may_run = True
        self.has_run = False


class HeldTransport:
    """Does what it is told to."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.generation = 1
        self.consumes = self.publishes = False
        self.is_blocked = False
        self.room = asyncio.Event()
        self.listener: Listener
        self.on_delivery: Any

    @property
    def can_publish(self) -> bool:
        return self.publishes and not self.is_blocked

    async def start(self, _: Sequence[Exchange], subscriptions: Sequence[Subscription], listener: Listener) -> None:
        self.listener = listener
        self.on_delivery = subscriptions[0].on_delivery
        self.publishing_up()
        self.consuming_up()

    def publish(self, message: Outgoing) -> None:
        if not self.publishes:
            message.on_published(Published.UNSENT)
        elif message.exchange.endswith(b".control"):
            message.on_published(Published.CONFIRMED)
        else:
            now = asyncio.get_running_loop().time()
            self.messages.append(Message(message, self.generation if self.consumes else 0, now))

    async def writable(self) -> None:
        while not self.can_publish:
            self.room.clear()
            await self.room.wait()

    async def close(self) -> None:
        if self.publishes:
            self.publishing_down(lost=0)

    # What the test does.

    def consuming_up(self) -> None:
        self.consumes = True
        self.listener.consuming([f"amq.gen-{self.generation}"])

    def consuming_down(self) -> None:
        self.consumes = False
        self.generation += 1
        self.listener.consuming_lost(CUT)

    def publishing_up(self) -> None:
        self.publishes, self.is_blocked = True, False
        self.listener.publishing()
        self.room.set()

    def publishing_down(self, lost: int) -> None:
        """The last `lost` of the unconfirmed messages never reached the socket."""
        self.publishes = False
        unconfirmed = [it for it in self.messages if it.settled is None]
        for number, it in enumerate(unconfirmed):
            it.settle(Published.UNSENT if number >= len(unconfirmed) - lost else Published.UNKNOWN)
        self.listener.publishing_lost(CUT)

    def block(self) -> None:
        self.is_blocked = True
        self.listener.publishing_blocked("memory")

    def unblock(self) -> None:
        self.is_blocked = False
        self.listener.publishing()
        self.room.set()

    def deliver(self, data: bytes, body: bytes, exchange: bytes = b"") -> None:
        self.on_delivery(Delivery(None, 1, False, data, body, len(body), exchange))  # type: ignore[arg-type]  # never settled


class Caller:
    """A call, with the task that waits for it."""

    def __init__(self, nonce: int, task: asyncio.Task[Any], ends_by: float, *, idempotent: bool, retries: bool) -> None:
        self.nonce = nonce
        self.task = task
        self.ends_by = ends_by
        self.idempotent = idempotent
        self.retries = retries
        self.is_cancelled = False


SAID = ["result", "busy", "UNKNOWN", "UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED"]
"""What workers say."""

INDEX = st.integers(0, 10_000)


class AnyInterleaving(RuleBasedStateMachine):
    @initialize()
    def open(self) -> None:
        self.loop = HeldLoop()
        asyncio.set_event_loop(self.loop)
        clock = SimpleNamespace(monotonic=lambda: self.loop.now, time=lambda: 1.8e9 + self.loop.now)
        self.transport = HeldTransport()
        self.patches = [
            mock.patch.object(rpcq.calls.invoking, "time", clock),
            mock.patch.object(rpcq.calls.sending, "time", clock),
            mock.patch.object(rpcq.calls.gathering, "time", clock),
            mock.patch.object(rpcq.calls.gathering, "SHARE", 1),
            mock.patch.object(rpcq.calls.gathering, "FEWEST", 0),
            mock.patch.object(rpcq.calls.gathering, "BARRED", 1.0),
            mock.patch.object(rpcq.calls.retrying, "time", clock),
            mock.patch.object(rpcq.runtime.timeouts, "time", clock),
            mock.patch.object(rpcq.client, "open_transport", return_value=self.transport),
            mock.patch("rpcq.runtime.deadline.time", clock),
        ]
        for patch in self.patches:
            patch.start()
        self.client = Client("memory://", max_in_flight=LIMIT, heartbeat=10, disconnected_timeout=20 + UNRUN_WITHIN)
        self.loop.run_until_complete(self.client.connect())
        self.callers: list[Caller] = []

    @property
    def sent(self) -> list[Sent]:
        return [it for message in self.transport.messages for it in message.requests]

    def pick(self, index: int) -> Sent | None:
        choice = self.sent
        return choice[index % len(choice)] if choice else None

    def pick_message(self, index: int, *, unconfirmed: bool = False, batches: bool = False) -> Message | None:
        choice = [
            it
            for it in self.transport.messages
            if (not unconfirmed or it.settled is None) and (not batches or it.is_batch)
        ]
        return choice[index % len(choice)] if choice else None

    # What a program does.

    @rule(idempotent=st.booleans(), retries=st.booleans(), timeout=st.sampled_from([0.3, 1.0, 5.0]))
    def call(self, idempotent: bool, retries: bool, timeout: float) -> None:
        self.begin(timeout, idempotent=idempotent, retries=retries)
        self.loop.settle_down()

    @rule(
        several=st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from([1.0, 5.0])), min_size=2, max_size=5)
    )
    def call_together(self, several: list[tuple[bool, bool, float]]) -> None:
        """Calls that are made in one iteration of the loop, as long as the client has room."""
        for idempotent, retries, timeout in several:
            self.begin(timeout, idempotent=idempotent, retries=retries)
        self.loop.settle_down()

    def begin(self, timeout: float, *, idempotent: bool, retries: bool) -> None:
        nonce = len(self.callers)
        retry = Retry(max_attempts=4, initial_backoff=0.1, codes=("UNAVAILABLE", "ABORTED", "UNKNOWN", "busy"))
        options: dict[str, Any] = {"timeout": timeout, "idempotent": idempotent, "retry": retry if retries else None}
        task = self.loop.create_task(self.client.with_options(**options).call("things.work", nonce=nonce))
        ends_by = self.loop.now + timeout
        self.callers.append(Caller(nonce, task, ends_by, idempotent=idempotent, retries=retries))

    @rule(index=INDEX)
    def cancel(self, index: int) -> None:
        waiting = [it for it in self.callers if not it.task.done()]
        if waiting:
            caller = waiting[index % len(waiting)]
            caller.is_cancelled = True
            caller.task.cancel()
            self.loop.settle_down()

    @rule(seconds=st.sampled_from([0.0, 0.02, 0.3, 2.0]))
    def wait(self, seconds: float) -> None:
        self.loop.pass_time(seconds, step=0.05)

    # What a broker does.

    @rule(
        index=INDEX,
        settled=st.sampled_from([Published.CONFIRMED, Published.RETURNED, Published.REFUSED, Published.TOO_LARGE]),
    )
    def settle(self, index: int, settled: Published) -> None:
        it = self.pick_message(index, unconfirmed=True)
        if it is not None and self.transport.publishes:
            if it.has_run and (settled in NOT_TAKEN or it.is_once) and settled is not Published.CONFIRMED:
                return  # the broker took it
            it.settle(settled)
            self.loop.settle_down()

    @rule(index=INDEX, reason=st.sampled_from(["expired", "delivery_limit"]), once=st.booleans())
    def notice(self, index: int, reason: str, once: bool) -> None:
        it = self.pick_message(index)
        if it is None or it.settled in NOT_TAKEN:
            return
        queue = self.client.topology.namespace + (".once.things" if once else ".req.things")
        if reason == "expired" and once and it.is_once and self.loop.now - it.at < UNRUN_WITHIN:
            if it.has_run:
                return  # such a queue delivers once
            it.never_runs()
        self.deliver(it, self.again(it, {"x-death": [{"reason": reason, "queue": queue}]}), it.outgoing.body)

    @rule(index=INDEX)
    def move(self, index: int) -> None:
        """Somebody publishes a request once more, with its CC."""
        it = self.pick_message(index)
        if it is not None and it.settled not in NOT_TAKEN:
            self.deliver(it, self.again(it, {}), it.outgoing.body)

    def again(self, it: Message, headers: dict[str, Any]) -> bytes:
        found = properties.decode(it.outgoing.properties)
        found.headers = {**(found.headers or {}), **headers}
        return properties.encode(found)

    # What a worker does; also twice, late, and for what is long over.

    @rule(index=INDEX, said=st.sampled_from(SAID), takes=st.sampled_from([0, 2, 5, 5]))
    def reply(self, index: int, said: str, takes: int) -> None:
        it = self.pick(index)
        if it is not None and (reply := self.reply_to(it, said)) is not None:
            data = replies.ReplyEncoder().encode(reply.kind, reply.correlation_id, 0.1, 0.1, takes)
            self.deliver(it.message, data, reply.body)

    @rule(index=INDEX, said=st.sampled_from(["INVALID_ARGUMENT", "ABORTED", "DEADLINE_EXCEEDED", "what is this"]))
    def refuse_batch(self, index: int, said: str) -> None:
        """A worker that cannot read a message batch says so, or a program that is no worker says anything."""
        it = self.pick_message(index, batches=True)
        if it is None or it.settled in NOT_TAKEN:
            return
        if said == "INVALID_ARGUMENT":
            if it.has_run:
                return  # no worker says both
            it.never_runs()
        executed = {"INVALID_ARGUMENT": "no", "what is this": "yes"}.get(said, "maybe")
        kind = replies.RESULT if said == "what is this" else replies.ERROR
        data = replies.ReplyEncoder().encode(kind, it.outgoing.correlation_id, 0.1, 0.1)
        self.deliver(it, data, bodies.dumps({"code": said, "message": said, "executed": executed}))

    @rule(
        indices=st.lists(INDEX, min_size=2, max_size=6),
        takes=st.sampled_from([0, 5]),
        said=st.lists(st.sampled_from(SAID), min_size=6, max_size=6),
        fault=st.sampled_from(["", "", "", "twice", "malformed", "forged"]),
    )
    def replies_together(self, indices: list[int], takes: int, said: list[str], fault: str) -> None:
        """Several replies in one message, which may come twice, be cut short, or come through the notices."""
        picked = [self.pick(index) for index in indices]
        together = [
            (it, reply)
            for it, kind in zip(picked, said, strict=False)
            if it is not None
            and it.message.generation == self.transport.generation
            and (reply := self.reply_to(it, kind)) is not None
        ]
        if not together or not self.transport.consumes:
            return
        body = batches.write_replies([reply for _, reply in together])
        exchange = b""
        if fault == "malformed":
            body = body.rpartition(b"\n")[0]
        elif fault == "forged":
            exchange = self.client.topology.notices.name.encode()
        for _ in range(2 if fault == "twice" else 1):
            self.transport.deliver(batches.write_properties(b"replies-1", takes), body, exchange)
        self.loop.settle_down()

    def reply_to(self, it: Sent, said: str) -> batches.Entry | None:
        """What a worker says; None if no worker would say it now."""
        if it.message.settled in NOT_TAKEN:
            return None
        executed = {"busy": "yes", "UNKNOWN": "yes", "ABORTED": "maybe"}.get(said, "no")
        ran = said == "result" or executed == "yes"
        if (ran and not it.may_run) or (it.has_run and not ran and executed == "no"):
            return None  # no worker says both
        it.has_run |= ran
        if ran:
            body = json.dumps({"ran": it.nonce}).encode()
        elif executed == "no":
            it.may_run = False
        if said != "result":
            body = json.dumps({"code": said, "message": said, "executed": executed, "retryable": False}).encode()
        kind = replies.RESULT if said == "result" else replies.ERROR
        return batches.Entry(it.id, kind, 0.1, 0.1, body)

    @rule(stray=st.sampled_from([b"", b"nobody", b"nobody.2", b"\xff" * 255]))
    def stray_reply(self, stray: bytes) -> None:
        if self.transport.consumes:
            self.transport.deliver(replies.ReplyEncoder().encode(replies.RESULT, stray, None, 0.0), b'"stray"')
            self.loop.settle_down()

    def deliver(self, it: Message, data: bytes, body: bytes) -> None:
        if self.transport.consumes and it.generation == self.transport.generation:  # else its queue is gone
            self.transport.deliver(data, body)
            self.loop.settle_down()

    # What a network does.

    @precondition(lambda self: self.transport.consumes)
    @rule()
    def consuming_down(self) -> None:
        self.transport.consuming_down()
        self.loop.settle_down()

    @precondition(lambda self: not self.transport.consumes)
    @rule()
    def consuming_up(self) -> None:
        self.transport.consuming_up()
        self.loop.settle_down()

    @precondition(lambda self: self.transport.publishes)
    @rule(lost=st.integers(0, 3))
    def publishing_down(self, lost: int) -> None:
        self.transport.publishing_down(lost)
        self.loop.settle_down()

    @precondition(lambda self: not self.transport.publishes)
    @rule()
    def publishing_up(self) -> None:
        self.transport.publishing_up()
        self.loop.settle_down()

    @precondition(lambda self: self.transport.publishes)
    @rule()
    def block_or_unblock(self) -> None:
        (self.transport.unblock if self.transport.is_blocked else self.transport.block)()
        self.loop.settle_down()

    # What must hold.

    @invariant()
    def each_outcome_is_honest(self) -> None:
        everything = self.sent if hasattr(self, "transport") else []
        for caller in getattr(self, "callers", []):
            sent = [it for it in everything if it.nonce == caller.nonce]
            assert not any(it.message.is_batch for it in sent[1:] if sent[0].message.settled is not Published.RETURNED)
            if not caller.idempotent:
                assert not any(it.may_run for it in sent[:-1]), "sent again, and an earlier one may have run"
                assert all(it.attempt == 1 for it in sent)
            elif not caller.retries:
                assert all(it.attempt <= MAX_ATTEMPTS for it in sent)
            assert all(a.attempt <= b.attempt for a, b in pairwise(sent))
            if not caller.task.done():
                assert self.loop.now <= caller.ends_by + 0.1, "it has not ended at its deadline"
                continue
            if caller.task.cancelled():
                assert caller.is_cancelled
            elif (error := caller.task.exception()) is None:
                assert caller.task.result() == {"ran": caller.nonce}
            else:
                assert isinstance(error, CallError)
                if error.executed == "no" and not hasattr(caller, "checked"):
                    assert not any(it.may_run for it in sent), f"{error!r}, and a request of it may run"
                if isinstance(error, Overloaded) and "max_in_flight" in str(error) and not caller.retries:
                    assert not sent
            caller.checked = True  # type: ignore[attr-defined]  # what the world says later changes nothing

    @invariant()
    def the_table_has_what_is_under_way(self) -> None:
        if hasattr(self, "client"):
            assert len(self.client._calls) <= LIMIT
            assert self.client.in_flight <= sum(not it.task.done() for it in self.callers)

    def teardown(self) -> None:
        if not hasattr(self, "client"):
            return
        try:
            self.loop.pass_time(6.0, step=0.05)
            self.each_outcome_is_honest()
            assert all(it.task.done() for it in self.callers)
            client = self.client
            assert (client.in_flight, len(client._sender.waiting)) == (0, 0)
            assert not client._calls._together
            assert not client._sender.gathering._held
            assert not any(client._invoker._timeouts._buckets.values())
            closing = self.loop.create_task(client.close())
            self.loop.settle_down()
            assert closing.done()
            assert not asyncio.all_tasks(self.loop)
        finally:
            for patch in self.patches:
                patch.stop()
            self.loop.close()
            asyncio.set_event_loop(None)


TestAnyInterleaving = AnyInterleaving.TestCase
TestAnyInterleaving.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)

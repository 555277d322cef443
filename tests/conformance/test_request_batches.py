"""Several requests in one message: nobody notices it but by the number of messages."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from typing import Any

import pytest

from rpcq import (
    CallError,
    CallTimeout,
    Client,
    Context,
    DomainError,
    InvalidParams,
    MethodNotFound,
    ObservedRequest,
    Observer,
    OutcomeUnknown,
    PermissionDenied,
    RemoteError,
    Retry,
    Service,
)
from rpcq.calls import gathering, intake, replying, slots
from rpcq.calls.slots import Slots
from rpcq.wire.batches import read_requests
from support.late import let_others_speak_first
from support.places import Place, lose
from support.seam import until

QUEUE_TYPE_MATTERS = False

CALLS = 20


class Odd(DomainError):
    code = "odd"


class Carried(Observer):
    """How many requests, or replies, the messages had."""

    def __init__(self) -> None:
        self.sizes: dict[str, list[int]] = {"requests": [], "replies": []}

    def on_message(self, carried: str, calls: int) -> None:
        self.sizes[carried].append(calls)


class Things:
    """A service whose handlers count their runs, and what it takes to call it in message batches."""

    def __init__(self, place: Place, **options: Any) -> None:
        self.place = place
        self.opened = asyncio.Event()
        self.runs: Counter[int] = Counter()
        self.running = self.most_running = 0
        self.ended: list[int] = []
        self.service = place.service(errors=[Odd], **options)
        self.carried = Carried()

        @self.service.method(idempotent=True)
        async def work(nonce: int, how: str = "") -> int:
            self.runs[nonce] += 1
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            try:
                if how == "hold":
                    await self.opened.wait()
                elif how == "odd":
                    raise Odd(str(nonce))
                elif how == "fail":
                    raise ValueError(nonce)
            finally:
                self.running -= 1
                self.ended.append(nonce)
            return nonce

        @self.service.method(timeout=1.0)  # ends long before its callers do
        async def brief(nonce: int) -> int:
            self.runs[nonce] += 1
            return nonce

        @self.service.method
        async def who(context: Context, nonce: int) -> list[Any]:
            return [nonce, context.metadata, context.idempotency_key, context.attempt, context.user]

    def client(self, **options: Any) -> Client:
        return Client(self.place.url, namespace=self.place.namespace, observers=[self.carried], **options)

    async def warm(self, client: Client) -> None:
        """Make a call, so that the client knows that the service takes message batches."""
        assert await client.call("things.work", nonce=-1) == -1
        assert client._sender.gathering.told[b"things"] >= 20
        self.carried.sizes["requests"].clear()

    @property
    def largest(self) -> int:
        return max(self.carried.sizes["requests"])


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many calls in one message as are made in one iteration, from the second call on."""
    monkeypatch.setattr(gathering, "SHARE", 1)
    monkeypatch.setattr(gathering, "FEWEST", 0)
    monkeypatch.setattr(slots, "SHARE", 2)
    monkeypatch.setattr(slots, "MOST", 50)
    monkeypatch.setattr(slots, "MOST_MS", 60_000.0)
    monkeypatch.setattr(Slots, "takes", Slots._in_time)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker has 100 calls in hand at most."""
    monkeypatch.setattr(Slots, "most_held", 100)


@pytest.fixture
def things(place: Place) -> Things:
    return Things(place)


async def gather(client: Client, *hows: str, **options: Any) -> list[Any]:
    """What calls end with that are made in one iteration."""
    maker = client.with_options(errors=[Odd], **options)
    calls = [maker.call("things.work", nonce=nonce, how=how) for nonce, how in enumerate(hows or [""] * CALLS)]
    return await asyncio.gather(*calls, return_exceptions=True)


async def test_calls_that_are_made_together_go_in_one_message_and_each_ends_in_its_own_way(things: Things) -> None:
    hows = ["", "odd", "fail", ""] * 5
    async with things.place.worker(things.service) as worker, things.client() as client:
        await things.warm(client)
        for how, nonce, it in zip(hows, range(CALLS), await gather(client, *hows), strict=True):
            if how == "odd":
                assert (type(it), it.message, it.executed) == (Odd, str(nonce), "yes")
            elif how == "fail":
                assert (type(it), it.executed) == (RemoteError, "yes")
            else:
                assert it == nonce
        assert things.carried.sizes["requests"] == [CALLS]
        await until(lambda: worker.in_flight == 0)
        assert worker.counts()["finished"] == CALLS + 1
        assert worker._intake.slots["things"]._messages == 0
        assert (client.in_flight, client.unmatched_replies) == (0, 0)


@pytest.mark.parametrize("off", ["client", "service", "small client", "few slots"])
async def test_without_batching_each_request_is_a_message(place: Place, off: str) -> None:
    things = Things(place, batching=off != "service")
    options: dict[str, Any] = {"client": {"batching": False}, "small client": {"max_body": 60_000}}.get(off, {})
    prefetch = 2 if off == "few slots" else 100
    async with place.worker(things.service, prefetch=prefetch), things.client(**options) as client:
        assert await client.call("things.work", nonce=-1) == -1
        assert await gather(client) == list(range(CALLS))
        assert set(things.carried.sizes["requests"]) == {1}


async def test_a_bad_call_in_a_message_is_refused_alone(things: Things) -> None:
    things.service.allow = {"who": frozenset({"boss"})}
    for method in things.service.methods.values():
        method.allow = things.service.allow.get(method.name)
    async with things.place.worker(things.service), things.client() as client:
        await things.warm(client)
        found = await asyncio.gather(
            client.call("things.work", nonce=1),
            client.call("things.work", nonce="no number"),
            client.call("things.absent"),
            client.call("things.who", nonce=2),
            client.call("things.work", nonce=3),
            return_exceptions=True,
        )
        assert things.carried.sizes["requests"] == [5]
        assert [found[0], found[4]] == [1, 3]
        assert [type(it) for it in found[1:4]] == [InvalidParams, MethodNotFound, PermissionDenied]
        assert {it.executed for it in found[1:4]} == {"no"}


async def test_each_call_has_its_own_metadata_and_key_and_the_user_is_that_of_the_message(things: Things) -> None:
    async with things.place.worker(things.service), things.client(identify=True) as client:
        await things.warm(client)
        plain = client.call("things.who", nonce=0)
        some = client.with_options(metadata={"x-a": "1"}).call("things.who", nonce=1)
        keyed = client.with_options(metadata={"x-a": "2"}, idempotency_key="k").call("things.who", nonce=2)
        found = await asyncio.gather(plain, some, keyed)
        assert things.carried.sizes["requests"] == [3]
        user = found[0][4]
        assert user
        assert found == [
            [0, {}, None, 1, user],
            [1, {"x-a": "1"}, None, 1, user],
            [2, {"x-a": "2"}, "k", 1, user],
        ]
        again = client.with_options(metadata={"x-a": "3"}, idempotency_key="k").call("things.who", nonce=2)
        other = client.with_options(metadata={"x-a": "3"}).call("things.who", nonce=4)
        found = await asyncio.gather(again, other)
        assert found[0][1] == {"x-a": "2"}  # the stored result
        assert found[1][1] == {"x-a": "3"}


async def test_a_call_that_is_cancelled_alone_is_cancelled(things: Things) -> None:
    async with things.place.worker(things.service) as worker, things.client() as client:
        await things.warm(client)
        calls = [asyncio.create_task(client.call("things.work", nonce=nonce, how="hold")) for nonce in range(CALLS)]
        await until(lambda: things.running == CALLS)
        assert things.carried.sizes["requests"] == [CALLS]
        for call in calls[::2]:
            call.cancel()
        await until(lambda: things.running == CALLS // 2)
        things.opened.set()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert found[1::2] == list(range(1, CALLS, 2))
        assert {type(it) for it in found[::2]} == {asyncio.CancelledError}
        await until(lambda: worker.in_flight == 0)


async def test_each_call_ends_at_its_own_deadline_and_far_ones_go_apart(things: Things) -> None:
    async with things.place.worker(things.service), things.client() as client:
        await things.warm(client)
        short, long = [
            [
                asyncio.ensure_future(client.with_options(timeout=it).call("things.work", nonce=0, how="hold"))
                for it in of
            ]
            for of in ((2.0, 2.05, 2.1), (30.0, 30.5, 60.0))
        ]
        found = await asyncio.gather(*short, return_exceptions=True)
        assert {type(it) for it in found} == {CallTimeout}
        assert not any(call.done() for call in long)
        assert sorted(things.carried.sizes["requests"]) == [1, 2, 3]
        things.opened.set()
        assert await asyncio.gather(*long) == [0, 0, 0]


async def test_what_expires_in_the_queue_is_a_timeout_for_each_call_and_none_is_sent_again(things: Things) -> None:
    async with things.client() as client:
        async with things.place.worker(things.service):
            await things.warm(client)
        let_others_speak_first(client)
        found = await gather(client, timeout=2.0)
        assert things.carried.sizes["requests"] == [CALLS]
        assert {type(it) for it in found} == {CallTimeout}
        assert {it.executed for it in found} == {"no" if things.place.queue_type == "quorum" else "maybe"}
        assert client.counts()["resent"] == 0
        assert not client._calls._together


async def test_a_worker_that_is_lost_costs_what_had_no_reply_and_none_runs_twice(things: Things) -> None:
    """A message is redelivered, or given up: those of its calls that had their replies do not notice."""
    hows = ["", "hold"] * (CALLS // 2)
    async with things.client() as client:
        worker = things.place.worker(things.service, grace=0.05)
        await worker.start()
        await things.warm(client)
        calls = asyncio.ensure_future(gather(client, *hows, timeout=20.0))
        await until(lambda: things.running == CALLS // 2 and client.in_flight == CALLS // 2)
        await lose(worker)
        things.opened.set()
        async with things.place.worker(things.service) as other:
            found = await calls
            await until(lambda: other.in_flight == 0)
        for nonce, (how, it) in enumerate(zip(hows, found, strict=True)):
            if how == "hold":
                assert isinstance(it, OutcomeUnknown)
                assert it.executed == "maybe"
            else:
                assert it == nonce
        assert set(things.runs.values()) == {1}


async def test_an_idempotent_call_of_a_lost_message_is_sent_again_alone(things: Things) -> None:
    async with things.client() as client:
        worker = things.place.worker(things.service, grace=0.05)
        await worker.start()
        await things.warm(client)
        calls = asyncio.ensure_future(gather(client, *["hold"] * CALLS, idempotent=True, timeout=20.0))
        await until(lambda: things.running == CALLS)
        await lose(worker)
        things.opened.set()
        async with things.place.worker(things.service):
            assert await calls == list(range(CALLS))
        assert things.carried.sizes["requests"] == [CALLS, *[1] * CALLS]
        assert {things.runs[nonce] for nonce in range(CALLS)} == {2}


async def test_a_worker_that_reads_no_message_batches_costs_nothing_but_messages(place: Place) -> None:
    """Two generations on one queue: what the older one refuses as a whole is sent again, each call alone."""
    things, older = Things(place), Things(place, batching=False)
    async with place.worker(things.service), things.client() as client:
        await things.warm(client)
        async with place.worker(older.service):
            told: list[Any] = []
            for _ in range(10):
                told += await gather(client)
                if not client._sender.gathering.told:
                    client._sender.gathering._barred.clear()  # a minute has passed
                    await until_told(client)
            assert told == [*range(CALLS)] * 10
            refused = client.counts()["resent"]
        both = things.runs + older.runs
        assert {both[nonce] for nonce in range(CALLS)} == {10}
        assert older.runs
        assert refused > 0
        assert refused % CALLS == 0
        assert things.largest == CALLS


async def until_told(client: Client) -> None:
    """Call until a worker that takes message batches has said so."""
    async with asyncio.timeout(10):
        while not client._sender.gathering.told:
            await client.call("things.work", nonce=-1)


async def test_a_worker_that_keeps_no_large_bodies_asks_for_no_message_batches(things: Things) -> None:
    async with things.place.worker(things.service, max_body=60_000), things.client() as client:
        for _ in range(3):
            assert await gather(client) == list(range(CALLS))
        assert not client._sender.gathering.told
        assert not client._sender.gathering._barred
        assert set(things.carried.sizes["requests"]) == {1}
        client._sender.gathering.told[b"things"] = CALLS  # another worker of the service asks for them
        assert await gather(client) == list(range(CALLS))
        assert things.largest == CALLS
        assert client.counts()["resent"] == 0


async def test_a_message_with_too_many_requests_is_refused_as_a_whole_and_each_is_sent_alone(things: Things) -> None:
    async with things.place.worker(things.service) as worker, things.client() as client:
        await things.warm(client)
        client._sender.gathering.told[b"things"] = 300  # a client that keeps no limit
        assert await gather(client, *[""] * 300) == list(range(300))
        assert things.carried.sizes["requests"] == [300, *[1] * 300]
        assert client.counts()["resent"] == 300
        await until(lambda: worker.in_flight == 0)
        assert worker.counts()["finished"] == 1 + 1 + 300  # the refusal is one reply
        assert worker._intake.slots["things"]._messages == 0


async def test_a_message_with_large_properties_is_refused_before_its_requests_are_read(
    things: Things, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its headers hold for each of its requests."""
    monkeypatch.setattr(intake, "MAX_PROPERTIES", 1000)
    read: list[int] = []
    monkeypatch.setattr(intake, "read_requests", lambda *given: read.append(1) or read_requests(*given))
    async with things.place.worker(things.service), things.client() as client:
        await things.warm(client)
        found = await gather(client, metadata={"x-a": "1" * 2000})
        assert {(type(it), it.executed) for it in found} == {(InvalidParams, "no")}
        assert all("the properties are" in it.message for it in found)
        assert things.carried.sizes["requests"] == [CALLS, *[1] * CALLS]
        assert not read


async def test_after_a_refusal_a_service_gets_no_message_batch(place: Place) -> None:
    things, older = Things(place), Things(place, batching=False)
    async with things.client() as client:
        async with place.worker(things.service):
            await things.warm(client)
        async with place.worker(older.service):
            assert await gather(client) == list(range(CALLS))
        async with place.worker(things.service):
            assert await gather(client) == list(range(CALLS))
        assert things.carried.sizes["requests"] == [CALLS, *[1] * 2 * CALLS]


async def test_a_worker_that_shuts_down_and_reads_no_message_batches_does_not_bar_the_service(place: Place) -> None:
    things, older = Things(place), Things(place, batching=False)
    async with things.client() as client:
        async with place.worker(things.service):
            await things.warm(client)
        async with place.worker(older.service) as leaving:
            leaving._intake.taking = intake.Taking.REPLAYS
            found = asyncio.ensure_future(gather(client, timeout=20.0))
            await until(lambda: client.counts()["resent"] >= CALLS)
            assert client._sender.gathering.told
            assert not client._sender.gathering._barred
            leaving._intake.taking = intake.Taking.ALL
            assert await found == list(range(CALLS))


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls wait for a slot for as long as they have time."""
    monkeypatch.setattr(replying, "WAIT", 600.0)


@pytest.mark.usefixtures("patient")
async def test_no_more_calls_run_at_once_than_the_worker_has_slots_and_those_that_wait_keep_their_deadlines(
    things: Things,
) -> None:
    async with things.place.worker(things.service, prefetch=50) as worker, things.client() as client:
        await things.warm(client)
        held = asyncio.ensure_future(gather(client, *["hold"] * 60, timeout=20.0))
        await until(lambda: worker.in_flight == 60)
        # The broker may deliver four messages while all slots are in use: three have come, and this is the fourth.
        let_others_speak_first(client)
        brief = client.with_options(timeout=1.0)
        found = await asyncio.gather(
            *(brief.call("things.brief", nonce=nonce) for nonce in range(5)), return_exceptions=True
        )
        assert {(type(it), it.executed) for it in found} == {(CallTimeout, "no")}
        assert things.running == 50
        things.opened.set()
        assert await held == list(range(60))
        assert things.most_running == 50
        await until(lambda: worker.in_flight == 0)
        assert worker._intake.slots["things"].running == 0


@pytest.mark.usefixtures("small", "patient")
async def test_calls_that_expire_while_they_wait_for_a_slot_make_no_room_for_others(things: Things) -> None:
    """Else a worker whose slots are in use would take all calls and let them expire, and others would get none."""
    things.service.timeout = 60.0
    async with things.place.worker(things.service, prefetch=50) as worker, things.client() as client:
        await things.warm(client)
        slots = worker._intake.slots["things"]
        held = asyncio.ensure_future(gather(client, *["hold"] * 50, timeout=40.0))
        await until(lambda: slots.running == 50)
        for timeout in (3.0, 1.0, 1.0):  # the first must reach the worker, however slow the broker is
            found = await gather(client, *[""] * 30, timeout=timeout)
            assert {type(it) for it in found} == {CallTimeout}
            assert 0 < len(slots.waiting) <= 50
        await until(lambda: all(run.invocation is None for run in slots.waiting))
        assert slots.waiting
        await until(lambda: slots.held == 50 + len(slots.waiting))  # their replies have been confirmed
        other = Things(things.place)
        async with things.place.worker(other.service, prefetch=50):
            assert await gather(client, *[""] * 60, timeout=20.0) == list(range(60))
            assert set(other.runs) == set(range(60))
        assert set(things.runs) == {-1, *range(50)}
        things.opened.set()
        assert await held == list(range(50))
        await until(lambda: worker.in_flight == 0)
        assert (slots.running, slots.held, len(slots.waiting)) == (0, 0, 0)


@pytest.mark.usefixtures("patient")
async def test_a_worker_that_stops_acknowledges_what_expired_while_it_waited(things: Things) -> None:
    async with things.client() as client:
        worker = things.place.worker(things.service, prefetch=50, grace=0.05)
        await worker.start()
        await things.warm(client)
        held = asyncio.ensure_future(gather(client, *["hold"] * 50, timeout=40.0))
        await until(lambda: things.running == 50)
        short = asyncio.ensure_future(gather(client, *[""] * 30, timeout=2.0))
        await until(lambda: len(worker._intake.slots["things"].waiting) == 30)
        await short
        assert worker.in_flight == 80
        assert not await worker.stop()
        assert worker.in_flight == 0
        assert Counter(type(it) for it in await held) == {OutcomeUnknown: 50}
        assert worker.counts()["finished"] == 81


@pytest.mark.usefixtures("small")
async def test_what_a_worker_cannot_hold_is_turned_away_and_sent_again(things: Things) -> None:
    async with things.place.worker(things.service, prefetch=50) as worker, things.client() as client:
        await things.warm(client)
        held = asyncio.ensure_future(gather(client, *["hold"] * 130, timeout=20.0))
        await until(lambda: worker.in_flight >= 100)
        for _ in range(50):
            assert worker.in_flight <= 100 + 30  # those that were turned away have their replies on the way
            assert worker._intake.slots["things"].held <= 130
            await asyncio.sleep(0.001)
        things.opened.set()
        assert await held == list(range(130))
        assert things.most_running == 50
        assert {things.runs[nonce] for nonce in range(130)} == {1}


@pytest.mark.usefixtures("patient")
async def test_the_timeout_of_a_method_and_the_time_of_its_handler_begin_with_the_slot(things: Things) -> None:
    seen: list[ObservedRequest] = []

    class Seen(Observer):
        def on_request(self, request: ObservedRequest) -> None:
            seen.append(request)

    worker = things.place.worker(things.service, prefetch=50, observers=[Seen()])
    async with worker, things.client() as client:
        await things.warm(client)
        held = asyncio.ensure_future(gather(client, *["hold"] * 50, timeout=20.0))
        await until(lambda: things.running == 50)
        brief = asyncio.gather(*(client.call("things.brief", nonce=nonce) for nonce in range(5)))
        await until(lambda: len(worker._intake.slots["things"].waiting) == 5)
        await asyncio.sleep(1.1)  # its timeout is 1 s
        things.opened.set()
        assert await brief == list(range(5))
        await held
    waits = [it.queue_seconds for it in seen if it.method == "brief"]
    assert len(waits) == 5
    assert min(it or 0.0 for it in waits) > 1.0


@pytest.mark.usefixtures("small")
async def test_no_call_waits_for_a_slot_while_another_worker_is_idle(things: Things) -> None:
    other = Things(things.place)
    async with things.place.worker(things.service, prefetch=50) as worker, things.client() as client:
        await things.warm(client)
        held = asyncio.ensure_future(gather(client, *["hold"] * 50, timeout=40.0))
        await until(lambda: things.running == 50)
        async with things.place.worker(other.service, prefetch=50):
            for _ in range(3):
                assert await gather(client, *[""] * 60, timeout=30.0) == list(range(60))
            assert set(other.runs) == set(range(60))
            assert set(things.runs) == {-1, *range(50)}
        assert things.running == 50
        things.opened.set()
        assert await held == list(range(50))
        await until(lambda: worker.in_flight == 0)


async def test_what_a_lost_session_brought_takes_no_slot_of_the_next_one(place: Place) -> None:
    service, opened, began = Service("things", queue_type="quorum"), asyncio.Event(), []

    @service.method
    async def hold() -> None:
        began.append(1)
        await opened.wait()

    @service.method
    async def quick() -> str:
        return "quick"

    async with place.worker(service, prefetch=5) as worker, place.client() as client:
        for number in range(1, 4):
            held = [asyncio.create_task(client.with_options(timeout=40).call("things.hold")) for _ in range(5)]
            await until(lambda number=number: len(began) == 5 * number)  # type: ignore[misc]
            await place.cut(worker, client)
            for call in held:
                with pytest.raises(OutcomeUnknown):
                    await call
            assert await client.with_options(timeout=20).call("things.quick") == "quick"
        opened.set()
        await until(lambda: worker.in_flight == 0)
        slots = worker._intake.slots["things"]
        assert (slots.running, slots.held, len(slots.waiting)) == (0, 0, 0)


@pytest.mark.usefixtures("patient")
async def test_calls_that_wait_for_a_slot_are_turned_away_when_the_worker_stops(things: Things) -> None:
    async with things.client() as client:
        worker = things.place.worker(things.service, prefetch=50)
        await worker.start()
        await things.warm(client)
        held = asyncio.ensure_future(gather(client, *["hold"] * 80, timeout=20.0))
        await until(lambda: things.running == 50)
        stopping = asyncio.ensure_future(worker.stop())
        await until(lambda: client.counts()["resent"] == 30)
        async with things.place.worker(things.service):
            things.opened.set()
            assert await held == list(range(80))
            assert await stopping
        assert {things.runs[nonce] for nonce in range(80)} == {1}


async def test_calls_that_are_cut_off_while_they_wait_did_not_begin(things: Things) -> None:
    async with things.client() as client:
        worker = things.place.worker(things.service, prefetch=50, grace=0.05)
        await worker.start()
        await things.warm(client)
        held = asyncio.ensure_future(gather(client, *["hold"] * 80, timeout=20.0))
        await until(lambda: things.running == 50)
        assert not await worker.stop()
        things.opened.set()
        async with things.place.worker(things.service):
            found = await held
        assert Counter(type(it) for it in found) == {OutcomeUnknown: 50, int: 30}


async def test_lost_sessions_in_between_leave_each_call_with_one_honest_outcome(things: Things) -> None:
    async with things.place.worker(things.service) as worker, things.client() as client:
        await things.warm(client)
        for number in range(3):
            calls = asyncio.ensure_future(gather(client, *["", "hold"] * 10, timeout=10.0))
            await asyncio.sleep(0.01 * number)
            await things.place.cut(worker, client)
            things.opened.set()
            for nonce, it in enumerate(await calls):
                assert it == nonce or (isinstance(it, CallError) and it.executed == "maybe")
            assert max(things.runs[nonce] for nonce in range(CALLS)) <= number + 1
            await until(lambda: client.connected and worker.connected)
        await until(lambda: worker.in_flight == 0)
        assert not client._calls._together


async def test_calls_that_are_made_again_go_alone(things: Things) -> None:
    tries: Counter[int] = Counter()

    @things.service.method(idempotent=True)
    async def flaky(nonce: int) -> int:
        tries[nonce] += 1
        if tries[nonce] == 1:
            raise Odd
        return nonce

    retry = Retry(max_attempts=3, initial_backoff=0.01, codes=("odd",))
    async with things.place.worker(things.service), things.client() as client:
        await things.warm(client)
        maker = client.with_options(idempotent=True, retry=retry, errors=[Odd])
        found = await asyncio.gather(*(maker.call("things.flaky", nonce=nonce) for nonce in range(10)))
        assert found == list(range(10))
        assert things.carried.sizes["requests"] == [10, *[1] * 10]


async def test_a_service_that_is_not_there_is_told_to_each_call(things: Things) -> None:
    async with things.client() as client:
        client._sender.gathering.told[b"nobody"] = 50
        found = await asyncio.gather(*(client.call("nobody.work") for _ in range(10)), return_exceptions=True)
        assert {(type(it).__name__, it.executed) for it in found} == {("ServiceUnavailable", "no")}
        assert things.carried.sizes["requests"] == [10, 10]  # to the queue that delivers once, and to any


async def test_a_client_that_is_closed_ends_what_it_holds(things: Things) -> None:
    async with things.place.worker(things.service):
        async with things.client() as client:
            await things.warm(client)
            calls = [asyncio.create_task(client.call("things.work", nonce=nonce, how="hold")) for nonce in range(10)]
            await until(lambda: things.running == 10)
            assert not any(call.done() for call in calls)
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert {(type(it), it.executed) for it in found} == {(OutcomeUnknown, "maybe")}
        things.opened.set()


async def test_handlers_in_threads_have_slots_too(things: Things) -> None:
    running = most = 0
    release = threading.Event()

    @things.service.method
    def block(nonce: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        release.wait(10)
        running -= 1
        return nonce

    async with things.place.worker(things.service, prefetch=20) as worker, things.client() as client:
        client._sender.gathering.told[b"things"] = 50
        calls = [asyncio.create_task(client.call("things.block", nonce=nonce)) for nonce in range(30)]
        await until(lambda: worker.in_flight == 30 and running == 20)
        release.set()
        assert await asyncio.gather(*calls) == list(range(30))
        assert most == 20


async def test_workers_say_what_they_take_now(things: Things) -> None:
    async with things.place.worker(things.service), things.client() as client:
        assert await takes(client) == [0]
        await client.call("things.work", nonce=1)
        assert await takes(client) == [50]


async def takes(client: Client) -> list[int]:
    """What the worker says that its service takes, as soon as it says so."""
    async with asyncio.timeout(10):
        while True:
            async for worker in client.workers("things"):
                return [service.takes for service in worker.services]

"""Connections that are reset, frozen, cut, spoilt, slowed or refused under load; brokers that restart."""

from __future__ import annotations

import asyncio
import bisect
import gc
import json
import logging
import os
import random
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from rpcq import Client, OutcomeUnknown, Service, Worker
from rpcq.calls.outcomes import State
from rpcq.transport.rabbitmq import session as sessions
from support.broker import Broker, Setup
from support.broker import broker as a_broker
from support.load import Load, Overdue, Scene, WorkerProcess, until
from support.proxy import Connection, Faults, Proxy, proxy

pytestmark = pytest.mark.timeout(180)  # each wait has its own end; where all is slow, several add up

NARROW = 40_000
"""Bytes per second, of which a call takes several hundreds each way."""


@pytest.fixture(autouse=True)
async def not_in_debug_mode() -> None:
    """It triples what each byte costs that goes through a proxy in this process."""
    asyncio.get_running_loop().set_debug(False)


BOTH = {"consuming", "publishing"}


def logged(worker: WorkerProcess, event: str) -> list[dict[str, Any]]:
    """Its log's lines about an event."""
    lines = [json.loads(line) for line in list(worker.lines) if line.startswith("{")]
    return [line for line in lines if line["event"] == event]


def only_results(*loads: Load) -> None:
    for load in loads:
        assert set(load.ledger.counts) == {"result"}, load.ledger.counts


def only_unknown(load: Load, most: int) -> None:
    """Calls that were under way may have been lost, so many at most, and nobody knows what became of them."""
    counts = load.ledger.counts
    assert set(counts) <= {"result", "OutcomeUnknown/maybe"}, counts
    assert counts["OutcomeUnknown/maybe"] <= most, counts


async def both_connected(between: Proxy) -> None:
    """Wait until a client or a worker has its two connections."""
    await until(
        lambda: between.with_role("consuming") and between.with_role("publishing"), what="it does not come back"
    )


async def only(between: Proxy, role: str) -> Connection:
    """The one connection of that role."""
    await until(lambda: len(between.with_role(role)) == 1)
    return between.with_role(role)[0]


async def held(scene: Scene, load: Load, count: int) -> tuple[list[asyncio.Task[Any]], Callable[[], None]]:
    """Calls whose handlers run, and what lets these end."""
    gate = scene.folder / f"gate-{load.prefix}"
    calls = [asyncio.create_task(load.call(until=str(gate))) for _ in range(count)]
    await until(lambda: len(scene.ran(load.prefix)) == count, what="they did not begin")
    return calls, gate.touch


async def confirmed(client: Client) -> None:
    """Wait until the broker has confirmed every request of what is under way."""
    await until(lambda: all(call.state is State.CONFIRMED for call in client._calls))


# One connection is reset, of the client or of its worker.


async def test_a_client_whose_consuming_connection_is_reset_settles_all_at_once_or_sends_them_again(
    scene: Scene,
) -> None:
    await scene.workers_of(2)
    async with proxy(scene.url) as between, scene.client(between.url) as client:
        async with (
            scene.load(client, timeout=60, params={"seconds": 0.05}) as plain,
            scene.load(client, timeout=60, method="again", idempotent=True, params={"seconds": 0.05}) as idempotent,
        ):
            await plain.through()
            running, release = await held(scene, scene.load(client, method="hold", timeout=60), 20)
            consuming = await only(between, "consuming")
            overdue = Overdue(4)
            consuming.reset()
            for error in await asyncio.gather(*running):
                assert isinstance(error, OutcomeUnknown)
            assert not overdue.is_so, "their handlers have not ended, and nobody waits for that"
            overdue.stop()
            release()
            await plain.through()
            await idempotent.through()
        only_unknown(plain, 50)
        assert plain.ledger.failed, "nothing was under way"
        only_results(idempotent)
        # What was sent again had begun before: its first runs count too.
        assert len(scene.ran(idempotent.prefix)) > idempotent.ledger.counts["result"]
    await scene.check()


async def test_a_client_whose_publishing_connection_is_lost_loses_only_what_was_not_confirmed(scene: Scene) -> None:
    await scene.workers_of(2)
    async with proxy(scene.url) as between, scene.client(between.url) as client:
        slow, plain, idempotent = (
            scene.load(client, timeout=60, method="hold"),
            scene.load(client, timeout=60, callers=20),
            scene.load(client, timeout=60, callers=20, method="again", idempotent=True),
        )
        running, release = await held(scene, slow, 40)
        await confirmed(client)
        publishing = await only(between, "publishing")
        publishing.freeze()  # what is written from now on does not arrive, and so is not confirmed
        async with plain, idempotent:
            await until(lambda: client.in_flight == 80)
            publishing.reset()
            await until(lambda: plain.ledger.failed == 20, what="what was not confirmed was not told")
            await plain.through()
            await idempotent.through()
            assert not any(call.done() for call in running)
            release()
            await asyncio.gather(*running)
        only_results(slow, idempotent)
        only_unknown(plain, 20)
    await scene.check()


async def test_a_worker_whose_publishing_connection_is_lost_publishes_again_what_was_not_confirmed(
    scene: Scene,
) -> None:
    async with scene.client() as client, proxy(scene.url) as between:
        # It is not to notice that nothing comes for a while.
        worker = await scene.worker(url=between.url, RPCQ_HEARTBEAT="30")
        async with (
            scene.load(client, timeout=60, params={"seconds": 0.02}) as plain,
            scene.load(client, timeout=60, method="again", idempotent=True) as idempotent,
        ):
            await plain.through()
            publishing = await only(between, "publishing")
            publishing.freeze()  # replies do not arrive
            await until(lambda: client.in_flight == 100)
            await asyncio.sleep(0.2)
            publishing.reset()
            await plain.through()
            await idempotent.through()

            slow = scene.load(client, method="hold", timeout=60)
            running, release = await held(scene, slow, 20)
            publishing = await only(between, "publishing")
            between.down.frozen = True  # replies arrive, and their confirms do not
            release()
            await asyncio.gather(*running)
            publishing.reset()
            between.down.frozen = False
            await until(lambda: client._calls.unmatched, what="no reply came a second time")
            await plain.through()
            await idempotent.through()
        only_results(plain, idempotent, slow)
        assert len(scene.ran(plain.prefix)) == plain.ledger.counts["result"]
        assert {line["role"] for line in logged(worker, "session down")} == {"publishing"}
        assert len(logged(worker, "session up again")) == 2
        await scene.check()


async def test_a_worker_whose_consuming_connection_is_lost_ends_what_runs_there_and_runs_nothing_twice(
    scene: Scene,
) -> None:
    async with scene.client() as client, proxy(scene.url) as between:
        worker = await scene.worker(url=between.url)
        async with (
            scene.load(client, timeout=60, callers=20) as plain,
            scene.load(client, timeout=60, callers=20, method="again", idempotent=True) as idempotent,
        ):
            await plain.through(100)
            slow = scene.load(client, method="hold", timeout=60)
            running, release = await held(scene, slow, 20)
            (await only(between, "consuming")).reset()
            if scene.queue_type == "classic":
                await until(lambda: logged(worker, "session up again"))
                await plain.through(100)
                assert not any(call.done() for call in running)
                release()
                await asyncio.gather(*running)
                only_results(slow)  # it knew each that was delivered to it again, and went on
            else:
                # The broker gives up at once what it may deliver only once.
                assert {type(error) for error in await asyncio.gather(*running)} == {OutcomeUnknown}
                release()
                await until(lambda: client._calls.unmatched >= 20, what="the late replies did not come")
            await plain.through(100)
            await idempotent.through(100)
        only_unknown(plain, 20)
        only_results(idempotent)
        assert len(scene.ran(slow.prefix)) == 20
        assert {line["role"] for line in logged(worker, "session down")} == {"consuming"}
        await scene.check()


async def test_a_worker_cut_off_for_a_while_costs_what_it_held_and_its_late_word_does_no_harm(scene: Scene) -> None:
    async with scene.client() as client, proxy(scene.url) as between:
        cut_off, _ = await asyncio.gather(scene.worker(url=between.url), scene.worker())
        async with (
            scene.load(client, timeout=60, params={"seconds": 0.02}) as plain,
            scene.load(client, timeout=60, method="again", idempotent=True, params={"seconds": 0.02}) as idempotent,
        ):
            await plain.through()
            slow = scene.load(client, method="hold", timeout=60)
            running, release = await held(scene, slow, 20)
            between.refuse()
            between.reset()
            await until(lambda: slow.ledger.ended, what="nobody was told")
            await plain.through()
            lost = slow.ledger.ended
            unmatched = client._calls.unmatched
            release()
            await asyncio.gather(*running)
            only_unknown(slow, lost)
            assert slow.ledger.failed == lost < 20
            between.allow()
            await both_connected(between)
            await until(lambda: client._calls.unmatched >= unmatched + lost, what="the late replies did not come")
            await plain.through()
            await idempotent.through()
        only_unknown(plain, 50)
        only_results(idempotent)
        assert len(scene.ran(slow.prefix)) == 20
        assert {line["role"] for line in logged(cut_off, "session up again")} == {"consuming", "publishing"}
        await scene.check()


# Connections on which nothing comes any more, and that nobody closes.


@pytest.mark.parametrize(
    "roles",
    [("consuming", "publishing"), *(pytest.param((it,), marks=pytest.mark.long) for it in ("consuming", "publishing"))],
)
async def test_a_client_notices_what_is_half_open_and_goes_on_with_others(
    scene: Scene, roles: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="rpcq")
    await scene.worker()
    async with proxy(scene.url) as between, scene.client(between.url, heartbeat=2) as client:
        async with (
            scene.load(client, timeout=60) as plain,
            scene.load(client, timeout=60, method="again", idempotent=True) as idempotent,
        ):
            await plain.through()
            frozen = [await only(between, role) for role in roles]
            for connection in frozen:
                connection.freeze()
            await until(lambda: plain.ledger.failed, what="it was not noticed")
            # In these words after two heartbeats; aiormq alone takes three of them and three seconds.
            assert "nothing came from the broker for" in caplog.text
            await plain.through()
            await idempotent.through()
            for connection in frozen:
                connection.thaw()
            await plain.through()
        only_unknown(plain, 50)
        only_results(idempotent)
    await scene.check()


@pytest.mark.long
async def test_a_half_open_connection_of_a_worker_costs_what_it_held_and_its_late_word_does_no_harm(
    scene: Scene,
) -> None:
    async with scene.client() as client, proxy(scene.url) as between:
        first, _ = await asyncio.gather(scene.worker(url=between.url, RPCQ_HEARTBEAT="3"), scene.worker())
        async with (
            scene.load(client, timeout=60, params={"seconds": 0.05}) as plain,
            scene.load(client, timeout=60, method="again", idempotent=True, params={"seconds": 0.05}) as idempotent,
            scene.load(client, timeout=60, callers=20, params={"seconds": 1.5}) as slow,
        ):
            await plain.through()
            await until(lambda: len(scene.ran(slow.prefix)) >= 20)  # all run, some of them there, and reply later
            between.freeze()
            await until(lambda: plain.ledger.failed, what="nobody was told")
            await until(lambda: len(logged(first, "session down")) >= 2, what="it did not notice")
            unmatched = client._calls.unmatched
            between.thaw()
            await until(lambda: len(logged(first, "session up again")) >= 2)
            await until(lambda: client._calls.unmatched > unmatched, what="no late reply came")
            await plain.through()
            await idempotent.through()
        only_unknown(plain, 50)
        only_unknown(slow, 20)
        only_results(idempotent)
        assert all("nothing came from the broker" in line["cause"] for line in logged(first, "session down"))
        await scene.check()


# Hosts that are gone.


@asynccontextmanager
async def two_hosts(url: str) -> AsyncIterator[tuple[str, Proxy, Proxy]]:
    """A URL with two hosts, and what is behind these."""
    async with proxy(url) as first, proxy(url) as second:
        credentials, _, rest = first.url.rpartition("@")
        host, _, vhost = rest.partition("/")
        yield f"{credentials}@{host},{second.url.rpartition('@')[2].partition('/')[0]}/{vhost}", first, second


async def test_a_host_that_is_gone_for_good_is_left_for_the_next_one_of_the_url(scene: Scene) -> None:
    async with (
        two_hosts(scene.url) as (of_client, *client_side),
        scene.client(of_client) as client,
        two_hosts(scene.url) as (of_worker, *worker_side),
    ):
        worker = await scene.worker(url=of_worker)
        async with (
            scene.load(client) as plain,
            scene.load(client, method="again", idempotent=True) as idempotent,
        ):
            await plain.through()
            for first, second in (client_side, worker_side):
                assert (len(first), len(second)) == (2, 0)
                first.refuse()
                first.reset()
                await until(lambda second=second: len(second) == 2, what="they did not go to the other one")
                await plain.through()
                await idempotent.through()
                assert len(first) == 0
        only_unknown(plain, 2 * 50)
        only_results(idempotent)
        assert len(logged(worker, "session up again")) == 2
        await scene.check()


# Connections that are slow.


async def test_delays_and_narrow_lines_cost_no_call(scene: Scene) -> None:
    async with proxy(scene.url) as of_client, proxy(scene.url) as of_worker:
        await scene.worker(url=of_worker.url)
        async with scene.client(of_client.url) as client:
            async with (
                scene.load(client, timeout=60, callers=20) as plain,
                scene.load(client, timeout=60, callers=20, method="again", idempotent=True) as idempotent,
            ):
                await plain.through(100)
                for between in (of_worker, of_client):
                    between.both(delay=0.05)
                await plain.through(40)
                await idempotent.through(40)
                began = time.monotonic()
                await plain.call()
                assert time.monotonic() - began >= 4 * 0.05, "to the worker and back, each time through a proxy"
                for between in (of_worker, of_client):
                    between.both(delay=0, rate=NARROW)
                stream = (await only(of_client, "publishing")).up
                await plain.through(20)
                rates: list[float] = []
                while len(rates) < 10 and max(rates, default=0) <= NARROW / 2:  # a busy machine may be slower still
                    began, before = time.monotonic(), stream.passed
                    await plain.through(50)
                    rates.append((stream.passed - before) / (time.monotonic() - began))
                assert NARROW / 2 < max(rates) < NARROW * 1.5, f"it was not what calls waited for: {rates}"
            only_results(plain, idempotent)
        await scene.check()


# Faults that come one after another, with a worker in this process too, so that neither side's pauses grow long.


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions of this process that come and go come back quickly all the same."""
    monkeypatch.setattr(sessions, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(sessions, "LONGEST_PAUSE", 0.05)


def target(scene: Scene) -> Service:
    """As `targets.target`, in this process."""
    runs = os.open(scene.runs, os.O_APPEND | os.O_CREAT | os.O_WRONLY)

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        yield
        os.close(runs)

    service = Service("target", queue_type=scene.queue_type, lifespan=lifespan)

    @service.method
    async def once(nonce: str) -> str:
        os.write(runs, f"{nonce}\n".encode())
        return nonce

    @service.method(idempotent=True)
    async def again(nonce: str) -> str:
        return await once(nonce)

    return service


class Side:
    """A client or a worker of this process, behind a proxy of its own."""

    def __init__(self, end: Client | Worker, between: Proxy) -> None:
        self.end = end
        self.between = between

    def links(self) -> list[Any]:
        """What the two sessions hang on; None while they are down."""
        transport = self.end._transport
        return [session._link for session in (transport._consuming, transport._publishing)]

    async def up(self) -> None:
        """Wait until both sessions are up."""
        await until(lambda: all(self.links()), what="it does not come back")


@asynccontextmanager
async def two_sides(scene: Scene) -> AsyncIterator[tuple[Side, Side]]:
    """A client and a worker of this process."""
    async with (
        proxy(scene.url) as of_client,
        scene.client(of_client.url) as client,
        proxy(scene.url) as of_worker,
        Worker(target(scene), url=of_worker.url, namespace=scene.namespace, heartbeat=5, remember=10_000) as worker,
    ):
        yield Side(client, of_client), Side(worker, of_worker)


def held_by_this_process() -> tuple[int, int]:
    """Tasks and open files."""
    return len(asyncio.all_tasks()), psutil.Process().num_fds()


@pytest.mark.parametrize(
    ("first", "more"),
    [(10, 30), pytest.param(100, 900, marks=[pytest.mark.long, pytest.mark.timeout(900)])],
)
async def test_reconnects_one_after_another_leave_nothing_behind(
    scene: Scene, hasty: None, first: int, more: int
) -> None:
    logging.disable(logging.CRITICAL)  # pytest keeps every line, which would be all that grows
    try:
        async with two_sides(scene) as sides:
            plain, idempotent = (
                scene.load(sides[0].end, callers=10, think=0.02),
                scene.load(sides[0].end, callers=10, think=0.02, method="again", idempotent=True),
            )

            async def reconnect(times: int) -> None:
                plain._stopping = idempotent._stopping = False
                async with plain, idempotent:
                    for _ in range(times):
                        old = [link for side in sides for link in side.links()]
                        assert all(old)
                        for side in sides:
                            side.between.reset()
                        await until(lambda old=old: not any(link in old for side in sides for link in side.links()))
                        for side in sides:
                            await side.up()
                        await plain.through(10)
                        await idempotent.through(10)

            await reconnect(first)
            # What was closed may take a moment to be gone.
            await asyncio.sleep(0.5)
            gc.collect()
            before, memory = held_by_this_process(), psutil.Process().memory_info().rss
            await reconnect(more)
            await until(lambda: held_by_this_process() <= before, what=f"{held_by_this_process()} tasks and files")
            gc.collect()
            grown = psutil.Process().memory_info().rss - memory
            assert grown < 8_000_000, f"{grown / 1e6:.1f} MB more"
            assert not sides[0].end.in_flight
            assert not sides[1].end.in_flight
        only_unknown(plain, (first + more) * 10)
        assert plain.ledger.failed, "nothing was under way"
        only_results(idempotent)
    finally:
        logging.disable(logging.NOTSET)
    await scene.check()


@pytest.mark.parametrize("count", [6, pytest.param(40, marks=[pytest.mark.long, pytest.mark.timeout(300)])])
async def test_connections_cut_at_any_byte_cost_only_what_was_under_way(scene: Scene, hasty: None, count: int) -> None:
    dice = random.Random(45)
    await scene.worker()
    async with two_sides(scene) as sides:
        async with (
            scene.load(sides[0].end, callers=20) as plain,
            scene.load(sides[0].end, callers=20, method="again", idempotent=True) as idempotent,
        ):
            await plain.through(50)
            for number in range(count):
                side, way = sides[number % 2], ("up", "down")[number // 2 % 2]
                open_now = list(side.between.connections)
                after = dice.randrange(dice.choice((1_000, 20_000)))
                for connection in open_now:
                    connection.cut(**{way: after})
                await until(
                    lambda side=side, now=open_now: any(it not in side.between.connections for it in now),
                    what=f"{after} bytes did not come",
                )
                # What comes in its place is cut in the middle of its handshake: before calls are sent again, as each
                # of these may be lost twice, and no more.
                side.between.cut(**{way: dice.randrange(300)})
                await asyncio.sleep(0.05)
                side.between.cut()
                await side.up()
                await plain.through(20)
                await idempotent.through(20)
        only_unknown(plain, count * 20)
        only_results(idempotent)
        await scene.check()


# Frames that are none.


def frames(data: bytes) -> list[int]:
    """Where the frames of a piece begin, if it is made of whole frames."""
    found, at = [], 0
    while at < len(data):
        end = at + 8 + int.from_bytes(data[at + 3 : at + 7], "big")
        if data[at] not in (1, 2, 3) or end > len(data) or data[end - 1] != 0xCE:
            return []
        found.append(at)
        at = end
    return found


def changed(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def end_of(data: bytes, at: int) -> int:
    return at + 7 + int.from_bytes(data[at + 3 : at + 7], "big")


SPOILERS: dict[str, Callable[[bytes, int, random.Random], bytes]] = {
    "another kind": lambda data, at, dice: changed(data, at, bytes([dice.randrange(9, 256)])),
    "another end": lambda data, at, dice: changed(data, end_of(data, at), bytes([dice.randrange(0xCE)])),
    "a byte less": lambda data, at, dice: changed(data, at + 3, struct.pack(">I", end_of(data, at) - at - 8)),
    "4 GB": lambda data, at, dice: changed(data, at + 3, b"\xff\xff\xff\xf0"),
    "noise": lambda data, at, dice: data[:at] + bytes([0xFF]) + dice.randbytes(60) + data[at:],
    "another channel": lambda data, at, dice: changed(data, at + 1, b"\x77\x77"),
    "a body of 4 EB": lambda data, at, dice: changed(data, at + 11, struct.pack(">Q", 2**62)),
}
"""What is done to a frame. Nothing is done to the inside of a body, which nobody but TCP could notice."""


async def spoil_one(way: Faults, how: str, dice: random.Random) -> None:
    """Spoil one frame that goes that way, now."""
    done = asyncio.Event()

    def spoil(data: bytes) -> bytes:
        found = frames(data)
        if how == "a body of 4 EB":
            found = [at for at in found if data[at] == 2]
        if not found or done.is_set():
            return data
        done.set()
        return SPOILERS[how](data, dice.choice(found), dice)

    way.filter = spoil
    async with asyncio.timeout(20):
        await done.wait()


@pytest.mark.parametrize(
    "hows",
    [
        pytest.param([how for how in SPOILERS if how != "another channel"], id="none"),
        pytest.param(["another channel"], id="misplaced"),
    ],
)
async def test_frames_that_are_none_end_the_session_and_nothing_is_misread(
    scene: Scene, hasty: None, hows: list[str]
) -> None:
    dice = random.Random(45)
    await scene.worker()
    faults = [(side, way, how) for how in hows for side in (0, 1) for way in ("up", "down")]
    async with two_sides(scene) as sides:
        async with (
            scene.load(sides[0].end, callers=20) as plain,
            scene.load(sides[0].end, callers=20, method="again", idempotent=True) as idempotent,
        ):
            await plain.through(50)
            for number, way, how in faults:
                side = sides[number]
                old = side.links()
                await spoil_one(getattr(side.between, way), how, dice)
                await until(lambda side=side, old=old: side.links() != old, what=f"{how}, {way}: nobody noticed")
                await side.up()
                await plain.through(20)
                await idempotent.through(20)
        only_unknown(plain, len(faults) * 20)
        only_results(idempotent)
        await scene.check()


async def test_frames_that_come_byte_by_byte_are_read_as_any(scene: Scene) -> None:
    async with proxy(scene.url) as of_client, proxy(scene.url) as of_worker:
        await scene.worker(url=of_worker.url)
        for between in (of_client, of_worker):
            between.both(split=1)
        # Few calls, since each byte is a write of its own; and handshakes.
        async with (
            scene.client(of_client.url, connect_timeout=30) as client,
            scene.load(client, timeout=60, callers=4) as plain,
            scene.load(client, timeout=60, callers=4, method="again", idempotent=True) as idempotent,
        ):
            await plain.through(4, 50)
            await idempotent.through(4, 50)
        only_results(plain, idempotent)
        for between in (of_client, of_worker):
            between.both(split=0)
        await scene.check()


# Many at once.


@pytest.fixture(scope="module")
def own_broker() -> Iterator[Broker]:
    """One that may be taken down, or filled with connections."""
    with a_broker(setup=Setup()) as own:
        yield own


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_two_hundred_clients_that_lost_their_broker_do_not_come_back_in_step(
    own_broker: Broker, namespace: str, queue_type: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A busy machine lets attempts come late, and many together: what counts is when they are due.
    due: list[float] = []
    jittered = sessions.Backoff.jittered

    def noted(backoff: sessions.Backoff) -> float:
        pause = jittered(backoff)
        due.append(time.monotonic() + pause)
        return pause

    monkeypatch.setattr(sessions.Backoff, "jittered", noted)
    # On a broker of our own: whether another one may open so many files, nobody knows.
    async with Scene(own_broker.url, namespace, queue_type, tmp_path) as scene:
        await scene.worker("--prefetch", "400")
        came: list[float] = []
        async with proxy(scene.url) as between:
            serve = between._serve

            def seen(*arguments: Any) -> Any:
                came.append(time.monotonic())
                return serve(*arguments)

            between._serve = seen
            before = asyncio.all_tasks()
            clients = [Client(between.url, namespace=scene.namespace, heartbeat=20) for _ in range(200)]
            for at in range(0, 200, 20):
                await asyncio.gather(*(client.connect() for client in clients[at : at + 20]))
            loads = [scene.load(client, callers=0, timeout=150) for client in clients]
            again = [
                scene.load(client, callers=0, timeout=150, method="again", idempotent=True) for client in clients[:50]
            ]
            await asyncio.gather(*(load.call() for load in loads))

            between.refuse()
            between.reset()
            waiting = [asyncio.create_task(load.call()) for load in (*loads, *again)]
            before_all = len(came)
            await asyncio.sleep(16)  # so long that the pauses have grown to their longest
            now = time.monotonic()
            times = sorted(at for at in due if now - 0.9 * sessions.LONGEST_PAUSE < at < now)
            busiest = max(bisect.bisect(times, at + 1) - number for number, at in enumerate(times))
            # In step, all would come in the same second, and nobody in the next ones.
            assert len(times) > 200
            assert len(came) - before_all > 200
            assert busiest < len(times) / 2, f"{busiest} of {len(times)} attempts were due in one second"

            between.allow()
            await asyncio.gather(*waiting)
            await until(lambda: len(between) == 400, 60)
            await asyncio.gather(*(load.call() for load in (*loads, *again)))
            for load in loads:
                only_unknown(load, 1)
            only_results(*again)
            await asyncio.gather(*(client.close() for client in clients))
            await until(lambda: not [it for it in asyncio.all_tasks() - before if not it.done()], what="tasks are left")
        await scene.check()


# A broker that goes away as a whole, and comes back.


@pytest.mark.long
@pytest.mark.timeout(240)
@pytest.mark.parametrize("way", ["restarted", "killed"])
async def test_a_broker_that_is_away_for_a_while_costs_what_was_under_way_and_all_come_back(
    own_broker: Broker, namespace: str, queue_type: Any, tmp_path: Path, way: str
) -> None:
    async with Scene(own_broker.url, namespace, queue_type, tmp_path) as scene:
        workers = await scene.workers_of(2)
        async with scene.client() as client:
            async with (
                scene.load(client, timeout=60, params={"seconds": 0.02}) as plain,
                scene.load(client, timeout=60, method="again", idempotent=True, params={"seconds": 0.02}) as idempotent,
            ):
                await plain.through(1000)
                if way == "restarted":
                    await asyncio.to_thread(own_broker.restart)
                else:
                    await asyncio.sleep(2)  # the queue has to be old enough: see `Broker.kill`
                    await asyncio.to_thread(own_broker.kill)
                    await until(lambda: plain.ledger.failed, what="what was under way was not told")
                    await asyncio.to_thread(own_broker.start)
                await plain.through(1000)
                await idempotent.through()
            only_unknown(plain, 100)
            assert plain.ledger.failed, "nothing was under way"
            only_results(idempotent)
            for worker in workers:
                await until(
                    lambda worker=worker: {line["role"] for line in logged(worker, "session up again")} >= BOTH,
                    what="a worker does not come back",
                )
        await scene.check()

"""Jobs with an order key, on both transports: those of one key are done one by one, in order."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import defaultdict
from datetime import UTC, datetime
from typing import Any, Protocol
from zlib import crc32

import pytest

from rpcq import (
    Client,
    ConfigurationError,
    Context,
    GiveUp,
    Retry,
    RetryLater,
    SendError,
    Service,
    UsageError,
    contract,
)
from rpcq.jobs import gathering, ordering, outcomes
from rpcq.jobs.letters import read_letter, replay_of
from rpcq.results import MemoryResults
from rpcq.transport.base import Message, Published
from rpcq.wire.events import EventTopology
from rpcq.wire.job_queues import DELIVERY_LIMIT, ORDERED_LANES, JobTopology, lane_of
from rpcq.wire.jobs import JobMessage, encode_job, read_job
from rpcq.wire.properties import encode
from support.jobs import Done, dead_queue, settled
from support.letters import letters
from support.ordered import keys_in
from support.places import Place

SOON = Retry(max_attempts=3, initial_backoff=0.01, max_backoff=0.01)


@pytest.fixture
def service() -> Service:
    return Service(f"s{secrets.token_hex(6)}", ordered=True)


class Log:
    """What handlers did, in order, for each key."""

    def __init__(self) -> None:
        self.of: dict[str, list[Any]] = defaultdict(list)
        self._changed = asyncio.Event()

    def note(self, context: Context, what: Any) -> None:
        assert context.order_key is not None
        self.of[context.order_key].append(what)
        self._changed.set()

    async def until(self, count: int) -> None:
        while sum(map(len, self.of.values())) < count:
            self._changed.clear()
            await self._changed.wait()


@pytest.fixture
async def log() -> Log:
    return Log()


async def test_the_jobs_of_a_key_are_done_one_by_one_in_order_and_other_keys_beside_them(
    home: Place, service: Service, log: Log
) -> None:
    running: set[str] = set()
    beside = 0

    @service.job
    async def work(number: int, context: Context) -> None:
        nonlocal beside
        key = str(context.order_key)
        assert key not in running
        running.add(key)
        beside = max(beside, len(running))
        await asyncio.sleep(0.002)
        running.remove(key)
        log.note(context, number)

    one_lane = keys_in("k05", 3)
    keys = [*one_lane, "customer-7", "kürbis"]
    async with home.client() as client, home.worker(service) as worker:
        for key in keys:
            sent = await client.with_options(order_key=key).send(work, 0)
            assert (sent.order_key, sent.priority) == (key, "normal")
            await client.with_options(order_key=key).send_many(work, [{"number": number} for number in range(1, 20)])
        await log.until(100)
        await settled(worker)
    assert log.of == {key: list(range(20)) for key in keys}
    assert beside > 1


async def test_a_job_that_fails_holds_up_its_key_alone_until_it_is_done(
    home: Place, service: Service, log: Log
) -> None:
    @service.job(retry=SOON)
    async def work(number: int, context: Context) -> None:
        log.note(context, (number, context.attempt))
        if number == 0 and context.order_key == first and context.attempt < 3:
            if context.attempt == 2:
                raise RetryLater(0.25)
            raise ValueError(number)

    first, other = keys_in("k03", 2)
    async with home.client() as client, home.worker(service) as worker:
        for number in range(3):
            await client.with_options(order_key=first).send(work, number)
        await client.with_options(order_key=other).send(work, 0)
        await log.until(6)
        await settled(worker)
    assert log.of[first] == [(0, 1), (0, 2), (0, 3), (1, 1), (2, 1)]
    assert log.of[other] == [(0, 1)]


@pytest.mark.parametrize("reason", ["attempts", "gave_up", "invalid"])
async def test_a_job_that_fails_for_good_is_a_dead_letter_and_its_key_goes_on(
    home: Place, service: Service, log: Log, reason: str
) -> None:
    @service.job(retry=SOON)
    async def work(number: int, context: Context) -> None:
        log.note(context, number)
        if number == 1:
            raise GiveUp("no") if reason == "gave_up" else ValueError(number)

    attempts = {"attempts": 3, "gave_up": 1, "invalid": 0}[reason]
    async with home.client() as client, home.worker(service) as worker:
        maker = client.with_options(order_key="a")
        for number in (0, 1, 2):
            wrong = reason == "invalid" and number == 1
            await maker.send(f"{service.name}.work", number="x" if wrong else number)
        await log.until(2 + attempts)
        await settled(worker)
        async with letters(home.url, dead_queue(home, service)) as dead:
            (letter,) = await dead.wait_for(1)
    assert log.of["a"] == [0, *[1] * attempts, 2]
    assert (letter.headers["rpcq-dead-reason"], letter.headers["rpcq-order-key"]) == (reason, "a")
    assert letter.headers["rpcq-executed"] == ("no" if reason == "invalid" else "yes")


@pytest.mark.long
async def test_a_key_is_held_up_for_so_long_and_no_longer(
    home: Place, service: Service, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcomes, "LONGEST_PAUSE", 0.25)
    monkeypatch.setattr(outcomes, "LONGEST_TRIED", 1.0)

    @service.job
    async def work(number: int, context: Context) -> None:
        log.note(context, number)
        if number == 0:
            raise RetryLater(3600)

    async with home.client() as client, home.worker(service) as worker:
        for number in (0, 1):
            await client.with_options(order_key="a").send(work, number)
        while 1 not in log.of["a"]:  # noqa: ASYNC110 - within the test's own timeout
            await asyncio.sleep(0.01)
        await settled(worker)
        async with letters(home.url, dead_queue(home, service)) as dead:
            (letter,) = await dead.wait_for(1)
    assert 2 <= log.of["a"].count(0) <= 5
    assert letter.headers["rpcq-dead-reason"] == "attempts"
    assert "held up its order key for 1 s" in letter.headers["rpcq-error"]


async def test_nine_jobs_of_a_lane_are_held_and_what_comes_after_them_waits(
    home: Place, service: Service, log: Log
) -> None:
    go_on = asyncio.Event()

    @service.job
    async def work(number: int, context: Context) -> None:
        log.note(context, number)
        if context.order_key == slow:
            await go_on.wait()

    slow, other = keys_in("k07", 2)
    (elsewhere,) = keys_in("k08", 1)
    async with home.client() as client, home.worker(service) as worker:
        await client.with_options(order_key=slow).send_many(work, [{"number": number} for number in range(8)])
        await client.with_options(order_key=other).send(work, 0)
        await log.until(2)
        assert log.of == {slow: [0], other: [0]}, "the ninth has another key: it does not wait"
        await client.with_options(order_key=slow).send_many(work, [{"number": number} for number in range(8, 10)])
        await client.with_options(order_key=other).send(work, 1)
        await client.with_options(order_key=elsewhere).send(work, 0)
        await log.until(3)
        await asyncio.sleep(0.1)
        assert worker.in_flight == 9
        assert log.of == {slow: [0], other: [0], elsewhere: [0]}
        go_on.set()
        await log.until(13)
        await settled(worker)
    assert log.of == {slow: list(range(10)), other: [0, 1], elsewhere: [0]}


async def test_a_worker_runs_as_many_jobs_of_all_keys_at_once_as_its_job_prefetch(
    home: Place, service: Service, log: Log
) -> None:
    running = most = 0

    @service.job(retry=SOON)
    async def work(number: int, context: Context) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.005)
        running -= 1
        if number == 1 and context.attempt == 1:
            raise ValueError
        log.note(context, number)

    async with home.client() as client, home.worker(service, job_prefetch=2) as worker:
        for number in range(3):
            for key in range(12):
                await client.with_options(order_key=f"{key}").send(work, number)
        await log.until(36)
        await settled(worker)
    assert most == 2
    assert log.of == {f"{key}": [0, 1, 2] for key in range(12)}


@pytest.mark.long
async def test_a_stopping_worker_hands_its_lanes_over_in_order(home: Place, service: Service, log: Log) -> None:
    """A rolling deploy: each worker ends what runs, and the next one begins with what comes after it."""
    running: set[str] = set()

    @service.job(retry=Retry(max_attempts=50, initial_backoff=0.01, max_backoff=0.01))
    async def work(number: int, context: Context) -> None:
        key = str(context.order_key)
        assert key not in running
        running.add(key)
        try:
            await asyncio.sleep(0.001)
            if number % 7 == 3 and secrets.randbelow(2):
                raise ValueError(number)
            log.note(context, number)
        finally:
            running.remove(key)

    keys = [f"key-{number}" for number in range(10)]

    async def send(client: Client, key: str) -> None:
        for number in range(30):
            await client.with_options(order_key=key).send(work, number)

    async with home.client() as client:
        async with asyncio.TaskGroup() as sending:
            workers = [home.worker(service, name=f"w{number}") for number in range(2)]
            for worker in workers:
                await worker.start()
            for key in keys:
                sending.create_task(send(client, key))
            for _ in range(4):
                await asyncio.sleep(0.05)
                assert await workers.pop(0).stop()
                workers.append(home.worker(service))
                await workers[-1].start()
        await log.until(300)
        await settled(*workers)
        for worker in workers:
            assert await worker.stop()
    assert log.of == {key: list(range(30)) for key in keys}, "none is lost, none is done twice, and all are in order"


@pytest.mark.long
@pytest.mark.timeout(180)
async def test_a_job_that_fails_has_an_end_also_if_each_worker_stops_before_its_second_attempt(
    home: Place, service: Service, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its attempts count from 1 again in each worker, so what bounds them is how often it came back."""
    monkeypatch.setattr(gathering, "GATHERING", 0.01)

    @service.job(retry=Retry(max_attempts=2, initial_backoff=60, max_backoff=60))
    async def work(number: int, context: Context) -> None:
        log.note(context, (number, context.attempt))
        if number == 0:
            raise RetryLater(60)

    workers = 0
    async with home.client() as client:
        while (1, 1) not in log.of["a"]:
            async with home.worker(service):
                if not workers:
                    await client.with_options(order_key="a").send_many(work, [{"number": number} for number in (0, 1)])
                await log.until(workers + 1)
            workers += 1
        async with letters(home.url, dead_queue(home, service)) as dead:
            (letter,) = await dead.wait_for(1)
    assert log.of["a"] == [(0, 1)] * DELIVERY_LIMIT + [(1, 1)]
    assert (letter.headers["rpcq-dead-reason"], letter.headers["rpcq-executed"]) == ("delivery_limit", "maybe")
    assert f"{DELIVERY_LIMIT} times" in letter.headers["rpcq-error"]


@pytest.mark.long
async def test_after_a_lost_session_the_jobs_of_a_key_go_on_in_order(home: Place, service: Service, log: Log) -> None:
    @service.job(retry=SOON)
    async def work(number: int, context: Context) -> None:
        await asyncio.sleep(0.005)
        if number % 5 == 1 and context.attempt == 1:
            raise ValueError(number)
        log.note(context, number)

    async with home.client() as client, home.worker(service) as worker:
        for key in "abc":
            await client.with_options(order_key=key).send_many(work, [{"number": number} for number in range(20)])
        for count in (5, 20, 40):
            await log.until(count)
            await home.cut(worker)
        while not all(19 in log.of[key] for key in "abc"):  # noqa: ASYNC110 - within the test's own timeout
            await asyncio.sleep(0.01)
        await settled(worker)
    for key in "abc":
        first = list(dict.fromkeys(log.of[key]))
        assert first == list(range(20)), "what came again may be repeated"
        assert all(later >= earlier - 1 for earlier, later in zip(log.of[key], log.of[key][1:], strict=False))


@pytest.mark.long
async def test_a_lane_that_holds_jobs_for_too_long_is_handed_over_and_taken_again(
    home: Place, service: Service, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RabbitMQ closes the channel of who holds a delivery for 30 minutes: the next jobs of the key begin before."""
    monkeypatch.setattr(ordering, "LONGEST_HELD", 300.6)  # the timeout of a job is 300 s
    monkeypatch.setattr(gathering, "GATHERING", 0.01)

    @service.job(retry=SOON)
    async def work(number: int, context: Context) -> None:
        await asyncio.sleep(0.3)
        if number == 2 and context.attempt < 3:
            raise ValueError
        log.note(context, number)

    async with home.client() as client, home.worker(service) as worker:
        await client.with_options(order_key="a").send_many(work, [{"number": number} for number in range(6)])
        await log.until(6)
        await settled(worker)
    assert log.of["a"] == list(range(6))


@pytest.mark.long
async def test_what_a_worker_does_not_know_waits_in_order_for_one_that_does(
    home: Place, service: Service, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rolling deploy: the old worker has the lane first."""
    monkeypatch.setattr(outcomes, "UNKNOWN_PAUSES", (0.25, 0.25))
    old = Service(service.name, ordered=True)
    for each in (service, old):

        @each.job
        async def known(number: int, context: Context) -> None:
            log.note(context, number)

    @service.job
    async def news(number: int, context: Context) -> None:
        log.note(context, number)

    async with home.client() as client:
        async with home.worker(old) as worker:
            for number, job in enumerate(("known", "news", "known")):
                await client.with_options(order_key="a").send(f"{service.name}.{job}", number=number)
            await client.with_options(order_key=keys_in(lane_of("a"), 2)[1]).send(f"{service.name}.known", number=0)
            await log.until(2)
            await asyncio.sleep(1)
            assert log.of["a"] == [0], "the last one waits for the one before it"
            assert worker.in_flight == 2
        async with home.worker(service) as worker:
            await log.until(4)
            await settled(worker)
    assert log.of["a"] == [0, 1, 2]


async def test_an_unknown_job_is_a_dead_letter_at_last(
    home: Place, service: Service, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcomes, "UNKNOWN_PAUSES", (0.25,))
    monkeypatch.setattr(outcomes, "LONGEST_TRIED", 0.6)

    @service.job
    async def known(context: Context) -> None:
        log.note(context, "known")

    async with home.client() as client, home.worker(service) as worker:
        maker = client.with_options(order_key="a")
        await maker.send(f"{service.name}.unknown")
        await maker.send(known)
        await log.until(1)
        await settled(worker)
        async with letters(home.url, dead_queue(home, service)) as dead:
            (letter,) = await dead.wait_for(1)
    assert (letter.headers["rpcq-dead-reason"], letter.headers["rpcq-executed"]) == ("unknown_method", "no")


async def test_an_expired_job_is_a_dead_letter_at_its_turn(home: Place, service: Service, log: Log) -> None:
    goes_on = asyncio.Event()

    @service.job
    async def work(number: int, context: Context) -> None:
        log.note(context, number)
        if number == 0:
            await goes_on.wait()

    async with home.client() as client, home.worker(service) as worker:
        maker = client.with_options(order_key="a")
        await maker.send(work, 0)
        await maker.with_options(expires=0.3).send(work, 1)
        await maker.send(work, 2)
        await asyncio.sleep(0.5)
        goes_on.set()
        await log.until(2)
        await settled(worker)
        async with letters(home.url, dead_queue(home, service)) as dead:
            (letter,) = await dead.wait_for(1)
    assert log.of["a"] == [0, 2]
    assert (letter.headers["rpcq-dead-reason"], letter.headers["rpcq-executed"]) == ("expired", "no")


@pytest.mark.parametrize("with_store", [False, True])
async def test_a_key_that_is_done_is_suppressed_at_its_turn(home: Place, log: Log, with_store: bool) -> None:
    store = MemoryResults(100_000) if with_store else None
    service = Service(f"s{secrets.token_hex(6)}", ordered=True, result_store=store)

    @service.job
    async def work(number: int, context: Context) -> None:
        log.note(context, number)

    async with home.client() as client, home.worker(service) as worker:
        maker = client.with_options(order_key="a")
        for number in (0, 1, 0, 2):
            await maker.with_options(idempotency_key=f"{number}").send(work, number)
        await log.until(3)
        await settled(worker)
    assert log.of["a"] == [0, 1, 2]


async def test_limits_of_a_job_keep_its_order(home: Place, service: Service, log: Log) -> None:
    @service.job(max_concurrency=1, rate="50/s")
    async def work(number: int, context: Context) -> None:
        log.note(context, number)

    started = time.monotonic()
    async with home.client() as client, home.worker(service) as worker:
        for number in range(5):
            for key in "abcd":
                await client.with_options(order_key=key).send(work, number)
        await log.until(20)
        await settled(worker)
    assert log.of == {key: list(range(5)) for key in "abcd"}
    assert time.monotonic() - started >= 19 / 50


async def test_a_replay_comes_after_the_jobs_of_its_key_that_were_sent_meanwhile(
    home: Place, service: Service, log: Log
) -> None:
    heals = False

    @service.job
    async def work(number: int, context: Context) -> None:
        if number == 0 and not heals:
            raise GiveUp("not yet")
        log.note(context, number)

    events = EventTopology(home.namespace)
    topology = events.jobs
    async with home.client() as client, home.worker(service) as worker:
        for number in range(2):
            await client.with_options(order_key="a").send(work, number)
        await log.until(1)
        await settled(worker)
        async with letters(home.url, dead_queue(home, service)) as dead:
            (found,) = await dead.wait_for(1)
        raw = encode(found.properties)
        letter = read_letter(events, topology.dead.name.encode(), f"job.{service.name}".encode(), raw, found.body)
        replay = replay_of(events, letter, None, 0)
        assert not isinstance(replay, str)
        assert replay.routing_key.decode() == topology.key(service.name, lane_of("a"))
        heals = True
        await publish(client, replay.routing_key.decode(), replay.properties, replay.body)
        await log.until(2)
        await settled(worker)
        elsewhere = replay_of(events, letter, "other", 0)
        assert not isinstance(elsewhere, str)
        assert elsewhere.routing_key == b"other"
        assert read_job(elsewhere.properties, b"", redelivered=False).order_key is None
    assert log.of["a"] == [1, 0]


async def publish(client: Client, key: str, properties: bytes, body: bytes) -> None:
    """Publish what another program might."""
    reported: asyncio.Future[Published] = asyncio.get_running_loop().create_future()
    exchange = JobTopology(client.options.namespace).jobs.name.encode()
    transport = client._transport
    transport.publish(Message(exchange, key.encode(), b"x", properties, body, reported.set_result))
    assert await reported is Published.CONFIRMED


@pytest.mark.parametrize(
    ("order_key", "key", "error"),
    [
        ("a", "", "must be sent with the routing key"),
        ("a", f":{ORDERED_LANES[(crc32(b'a') + 1) % 16]}", "must be sent with the routing key"),
        (None, ":k00", "a job in the lane k00 must have the header rpcq-order-key; got none"),
    ],
)
async def test_what_comes_through_another_queue_than_its_lane_is_a_dead_letter(
    home: Place, service: Service, done: Done, order_key: str | None, key: str, error: str
) -> None:
    @service.job
    async def work() -> None:
        done.note("work")

    message = JobMessage(id="1", name="work", body=b"{}", key="1", order_key=order_key)
    async with home.client() as client, home.worker(service) as worker:
        await client.send(work)
        await publish(client, service.name + key, encode_job(message, 0), b"{}")
        async with letters(home.url, dead_queue(home, service)) as dead:
            (letter,) = await dead.wait_for(1)
        await settled(worker)
    assert letter.headers["rpcq-dead-reason"] == "invalid"
    assert error in letter.headers["rpcq-error"]
    assert done.counts == {"work": 1}


async def test_what_no_worker_can_read_is_a_dead_letter_and_the_key_goes_on(
    home: Place, service: Service, log: Log
) -> None:
    @service.job
    async def work(number: int, context: Context) -> None:
        log.note(context, number)

    async with home.client() as client, home.worker(service, max_body=1000) as worker:
        maker = client.with_options(order_key="a")
        await maker.send(work, 0)
        await maker.send(f"{service.name}.work", number="x" * 2000)
        await maker.send(work, 2)
        await log.until(2)
        async with letters(home.url, dead_queue(home, service)) as dead:
            await dead.wait_for(1)
        await settled(worker)
    assert log.of["a"] == [0, 2]


# Sending.


@pytest.mark.parametrize(
    ("name", "value"), [("delay", 1.0), ("at", datetime(2100, 1, 1, tzinfo=UTC)), ("priority", "high")]
)
async def test_what_would_break_the_order_is_refused_by_name(home: Place, name: str, value: Any) -> None:
    client = home.client()
    with pytest.raises(ConfigurationError, match=f"{name} must not be given with order_key.*; send it without {name}"):
        client.with_options(order_key="a").with_options(**{name: value})
    client.with_options(order_key="a").with_options(order_key=None).with_options(**{name: value})


@pytest.mark.parametrize("wrong", ["", "x" * 256, "ä" * 128, 7])
async def test_an_order_key_has_1_to_255_bytes(home: Place, wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="order_key must be"):
        home.client().with_options(order_key=wrong)


async def test_a_service_that_is_not_ordered_refuses_an_order_key_at_once(home: Place) -> None:
    plain = Service(f"s{secrets.token_hex(6)}")

    @contract(plain.name, jobs=["work"])
    class Api(Protocol):
        async def work(self) -> None: ...

    @plain.job
    async def work() -> None: ...

    async with home.client() as client, home.worker(plain):
        maker = client.with_options(order_key="a")
        with pytest.raises(UsageError, match=r"is not ordered: define it with Service\(\.\.\., ordered=True\)"):
            await maker.send(work)
        for target in (f"{plain.name}.work", client.bind(Api, plain.name).work):
            with pytest.raises(SendError, match=r"with an order key: .*Service\(\.\.\., ordered=True\)") as caught:
                await maker.send(target)
            assert caught.value.queued == "no"


async def test_a_job_that_runs_at_most_once_has_no_order_key(home: Place, service: Service) -> None:
    @service.job(at_most_once=True)
    async def work() -> None: ...

    async with home.client() as client, home.worker(service) as worker:
        maker = client.with_options(order_key="a")
        with pytest.raises(UsageError, match="send it without order_key, or define it without at_most_once"):
            await maker.send(work)
        await maker.send(f"{service.name}.work")
        async with letters(home.url, dead_queue(home, service)) as dead:
            (letter,) = await dead.wait_for(1)
        await settled(worker)
    assert (letter.headers["rpcq-dead-reason"], letter.headers["rpcq-executed"]) == ("invalid", "no")


async def test_a_call_has_no_order_key(home: Place, service: Service) -> None:
    @service.method
    async def double(x: int) -> int:
        return 2 * x

    async with home.client() as client, home.worker(service):
        with pytest.raises(UsageError, match="order_key and watch are for send"):
            await client.with_options(order_key="a").call(f"{service.name}.double", x=1)


@pytest.mark.parametrize("wrong", [None, 1, "yes"])
def test_a_service_is_ordered_or_not(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="ordered of service 's' must be True or False; got"):
        Service("s", ordered=wrong)


@pytest.mark.long
async def test_a_worker_waits_with_ordered_jobs_while_nothing_can_be_published(
    home: Place, service: Service, log: Log
) -> None:
    @service.job
    async def work(number: int, context: Context) -> None:
        log.note(context, number)

    async with home.client() as client, home.worker(service) as worker:
        for number in range(30):
            await client.with_options(order_key="a").send(work, number)
            if number % 10 == 5:
                await home.cut(client)
        await log.until(30)
        await settled(worker)
    assert log.of["a"] == list(range(30))


def test_the_lane_of_a_key_never_changes() -> None:
    """docs/wire.md: CRC-32 of the UTF-8 bytes, modulo 16."""
    assert {key: lane_of(key) for key in ("customer-7", "a", "kürbis")} == {
        "customer-7": f"k{crc32(b'customer-7') % 16:02}",
        "a": "k03",
        "kürbis": f"k{crc32('kürbis'.encode()) % 16:02}",
    }
    assert (lane_of("a"), lane_of("customer-7"), lane_of("b")) == ("k03", "k08", "k09")

"""Events, on both transports: published, heard, retried, buried, and read by older and newer versions."""

import asyncio
import secrets
import threading
from typing import Any

import pytest

from rpcq import (
    AnyEvent,
    Client,
    Context,
    Event,
    GiveUp,
    Publication,
    Retry,
    RetryLater,
    Service,
    TooLarge,
    UsageError,
    sync,
)
from rpcq.jobs import outcomes
from rpcq.jobs.running import JobRunner
from rpcq.transport.base import Message, Published
from rpcq.wire.events import EventTopology
from rpcq.wire.properties import Properties, encode
from rpcq.wire.topology import Queue
from support.jobs import Done, dead_queue, settled
from support.letters import letters
from support.places import Place, lose

SOON = Retry(max_attempts=3, initial_backoff=0.01, max_backoff=0.01)


@pytest.fixture
def word() -> str:
    """The first word of the names of this test's events; all tests share a namespace."""
    return f"e{secrets.token_hex(6)}"


@pytest.fixture
def other() -> Service:
    return Service(f"o{secrets.token_hex(6)}")


def kind(name: str, version: int = 1) -> type[Any]:
    """A class of events with one field."""

    class Created(Event, name=name, version=version):
        number: int = 0

    return Created


def runner_of(worker: Any) -> JobRunner:
    assert worker._jobs is not None
    return worker._jobs


async def publish_raw(client: Client, place: Place, name: str, body: bytes, **headers: Any) -> None:
    """Publish what no class of this test writes."""
    confirmed: asyncio.Future[Published] = asyncio.get_running_loop().create_future()
    properties = encode(Properties(message_id=b"raw-1", type=name.encode(), headers=headers, delivery_mode=2))
    exchange = EventTopology(place.namespace).events.name.encode()
    client._transport.publish(Message(exchange, name.encode(), b"raw-1", properties, body, confirmed.set_result))
    assert await confirmed is Published.CONFIRMED


async def test_each_service_gets_its_copy_and_the_workers_of_one_share_theirs(
    home: Place, service: Service, other: Service, done: Done, word: str
) -> None:
    created = kind(f"{word}.created")
    by: dict[str, set[int]] = {"first": set(), "second": set()}

    @other.on(created)
    async def look(event: created) -> None:
        done.note(("other", event.number))

    def serving(name: str) -> Service:
        """One version of the service, so that it is known which of its workers ran."""
        made = Service(service.name)

        @made.on(created)
        async def ship(event: created) -> None:
            by[name].add(done.note(("shared", event.number)))
            await asyncio.sleep(0.01)

        return made

    async with (
        home.client() as client,
        home.worker(serving("first"), job_prefetch=1) as first,
        home.worker(serving("second"), job_prefetch=1) as second,
        home.worker(other),
    ):
        published = [await client.publish(created(number=number)) for number in range(20)]
        await done.until(lambda counts: counts.total() == 40)
        await settled(first, second)
    assert set(done.counts.values()) == {1}
    assert by["first"]
    assert by["second"]
    assert all(each.heard for each in published)
    assert len({each.id for each in published}) == 20


async def test_an_event_that_nobody_listens_to_is_published_and_says_so(home: Place, word: str) -> None:
    created = kind(f"{word}.created", 3)
    async with home.client() as client:
        published = await client.publish(created())
        assert published == Publication(published.id, f"{word}.created", 3, published.id, heard=False)
        keyed = await client.with_options(idempotency_key="k-1").publish(created())
        assert (keyed.key, keyed.heard) == ("k-1", False)


async def test_what_nobody_hears_can_be_kept_and_a_publisher_who_knows_that_claims_nothing(
    home: Place, word: str
) -> None:
    created = kind(f"{word}.created")
    unheard = EventTopology(home.namespace).unheard.name
    kept = Queue("", exclusive=True, auto_delete=True, bindings=((unheard, ""),))
    async with home.client(unheard_kept=True) as client:
        await client.publish(created())  # from then on, the exchange is there
        async with letters(home.url, kept) as queue:
            published = await client.publish(created(number=7))
            (letter,) = await queue.wait_for(1)
    assert published.heard is None
    assert (letter.id, letter.body) == (published.id, b'{"number":7}')


async def test_a_subscription_gets_what_was_published_while_no_worker_ran(
    home: Place, service: Service, done: Done, word: str
) -> None:
    created = kind(f"{word}.created")

    @service.on(created)
    def count(event: created) -> None:
        loop.call_soon_threadsafe(done.note, event.number)

    loop = asyncio.get_running_loop()
    async with home.client() as client:
        async with home.worker(service):
            pass  # it declares the queue
        assert (await client.publish(created(number=1))).heard
        async with home.worker(service):
            await done.until(lambda counts: counts[1] == 1)


async def test_a_subscription_that_fails_retries_and_buries_for_itself(
    home: Place, service: Service, other: Service, done: Done, word: str
) -> None:
    created = kind(f"{word}.created")
    attempts: list[tuple[int, bool]] = []

    @service.on(created, retry=SOON)
    async def fail(event: created, context: Context) -> None:
        attempts.append((context.attempt, context.is_last_attempt))
        raise ValueError("no stock")

    @service.on(created, name="beside")
    @other.on(created)
    async def work(event: created) -> None:
        done.note("run")

    async with home.client() as client, home.worker(service) as worker, home.worker(other) as second:
        published = await client.publish(created(number=7))
        async with letters(home.url, dead_queue(home, service)) as dead:
            (letter,) = await dead.wait_for(1)
        await settled(worker, second)
        assert runner_of(worker).dead == 1
    assert attempts == [(1, False), (2, False), (3, True)]
    assert done.counts["run"] == 2
    assert (letter.id, letter.body) == (published.id, b'{"number":7}')
    assert (letter.headers["rpcq-dead-reason"], letter.headers["rpcq-executed"]) == ("attempts", "yes")
    assert letter.headers["rpcq-event-version"] == 1
    assert letter.properties.type == f"{word}.created".encode()
    assert letter.headers["rpcq-from"] == service.name


async def test_a_handler_says_when_its_event_is_tried_again_or_given_up(
    home: Place, service: Service, done: Done, word: str
) -> None:
    created = kind(f"{word}.created")

    @service.on(created)
    async def decide(event: created, context: Context) -> None:
        if context.attempt == 1:
            raise RetryLater(0.25)
        raise GiveUp("no such order")

    async with home.client() as client, home.worker(service):
        await client.publish(created())
        async with letters(home.url, dead_queue(home, service)) as dead:
            (letter,) = await dead.wait_for(1)
    assert (letter.headers["rpcq-dead-reason"], letter.headers["rpcq-error"]) == ("gave_up", "no such order")
    assert letter.headers["rpcq-attempt"] == 2


async def test_patterns_take_names_word_by_word(home: Place, service: Service, done: Done, word: str) -> None:
    created, paid = kind(f"{word}.order.created"), kind(f"{word}.order.paid")

    @service.on(f"{word}.*.created", name="star")
    async def star(event: AnyEvent) -> None:
        done.note(("star", event.name, event.version, event.data["number"]))

    @service.on(f"{word}.#", name="hash")
    async def many(event: created | paid | AnyEvent) -> None:
        done.note(("hash", type(event) if isinstance(event, Event) else event.name))

    @service.on(created, paid, name="both")
    async def both(event: created | paid, *, context: Context) -> None:
        done.note(("both", type(event), context.method, context.metadata["x-tenant"]))

    @service.on(paid, name="bare")
    async def bare(event) -> None:
        done.note(("bare", type(event)))

    @service.on(paid, name="base")
    async def base(*, event: Event) -> None:
        done.note(("base", type(event)))

    async with home.client() as client, home.worker(service):
        maker = client.with_options(metadata={"x-tenant": "t1"})
        await maker.publish(created(number=7))
        await maker.publish(paid())
        await maker.publish(kind(word)())
        await done.until(lambda counts: counts.total() == 8)
    assert done.counts == dict.fromkeys(
        [
            ("star", f"{word}.order.created", 1, 7),
            ("hash", created),
            ("hash", paid),
            ("hash", word),
            ("both", created, "both", "t1"),
            ("both", paid, "both", "t1"),
            ("bare", paid),
            ("base", paid),
        ],
        1,
    )


# Versions, and deploys that roll.


async def test_a_reader_of_version_1_reads_version_2_that_added_a_field_and_the_other_way_round(
    home: Place, service: Service, done: Done, word: str
) -> None:
    class First(Event, name=f"{word}.created"):
        order: str

    class Second(Event, name=f"{word}.created", version=2):
        order: str
        total: int = 0

    newer = Service(service.name)

    @service.on(First)
    async def ship(event: First) -> None:
        done.note(("old", event.order))

    @newer.on(Second, name="ship")
    async def ship_now(event: Second) -> None:
        done.note(("new", event.order, event.total))

    async with home.client() as client:
        async with home.worker(service):
            await client.publish(Second(order="a", total=5))
            await done.until(lambda counts: counts[("old", "a")] == 1)
        async with home.worker(newer):
            await client.publish(First(order="b"))
            await done.until(lambda counts: counts[("new", "b", 0)] == 1)


async def test_a_version_that_no_worker_reads_is_a_dead_letter_that_says_so(
    home: Place, service: Service, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcomes, "UNKNOWN_PAUSES", (0.25,))

    class Old(Event, name=f"{word}.created"):
        order: str

    class Renamed(Event, name=f"{word}.created", version=2):
        order_id: str

    @service.on(Old)
    async def ship(event: Old) -> None: ...

    async with home.client() as client, home.worker(service):
        await client.publish(Renamed(order_id="7"))
        async with letters(home.url, dead_queue(home, service)) as dead:
            (letter,) = await dead.wait_for(1)
    assert (letter.headers["rpcq-dead-reason"], letter.headers["rpcq-executed"]) == ("unsupported_version", "no")
    assert "version 2, which does not fit here" in letter.headers["rpcq-error"]
    assert "order: Field required" in letter.headers["rpcq-error"]


async def test_while_a_deploy_rolls_an_event_waits_for_the_worker_that_reads_it(
    home: Place, service: Service, done: Done, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcomes, "UNKNOWN_PAUSES", (0.25,) * 4)

    class Old(Event, name=f"{word}.created"):
        order: str

    class Renamed(Event, name=f"{word}.created", version=2):
        order_id: str

    newer = Service(service.name)

    @service.on(Old)
    async def ship(event: Old) -> None: ...

    @newer.on(Renamed, name="ship")
    async def ship_now(event: Old | Renamed) -> None:
        done.note(event.order_id if isinstance(event, Renamed) else event.order)

    async with home.client() as client:
        async with home.worker(service) as worker:
            await client.publish(Renamed(order_id="7"))
            while not runner_of(worker).retried:  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.005)
            await settled(worker)
        await client.publish(Old(order="6"))  # it waits in the queue for the next deploy
        async with home.worker(newer):
            await done.until(lambda counts: counts == {"6": 1, "7": 1})


async def test_an_event_of_its_own_version_that_does_not_fit_is_dead_at_once(
    home: Place, service: Service, word: str
) -> None:
    created = kind(f"{word}.created")

    @service.on(created)
    async def ship(event: created) -> None: ...

    async with home.client() as client, home.worker(service):
        await client.publish(created())
        await publish_raw(client, home, f"{word}.created", b'{"number":"many"}')
        async with letters(home.url, dead_queue(home, service)) as dead:
            (letter,) = await dead.wait_for(1)
    assert letter.headers["rpcq-dead-reason"] == "invalid"
    assert "the fields do not fit" in letter.headers["rpcq-error"]
    assert "rpcq-unknown" not in letter.headers


async def test_what_an_older_deploy_has_bound_is_dropped_in_the_end_and_counted(
    home: Place, service: Service, done: Done, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcomes, "UNKNOWN_PAUSES", (0.25, 0.25))
    created, paid, newer = kind(f"{word}.created"), kind(f"{word}.paid"), Service(service.name)

    @service.on(created, paid, name="ship")
    async def ship(event: created | paid) -> None: ...

    @newer.on(paid, name="ship")
    async def ship_now(event: paid) -> None:
        done.note("paid")

    async with home.client() as client:
        async with home.worker(service):
            pass
        async with home.worker(newer) as worker:
            await client.publish(created())
            await client.publish(paid())
            while not runner_of(worker).filtered:  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.005)
            await settled(worker)
            assert runner_of(worker).dead == 0
    assert done.counts == {"paid": 1}


async def test_an_older_worker_leaves_an_event_to_a_newer_one_whose_patterns_take_it(
    home: Place, service: Service, done: Done, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcomes, "UNKNOWN_PAUSES", (0.25,) * 4)
    created, paid, newer = kind(f"{word}.created"), kind(f"{word}.paid"), Service(service.name)

    @service.on(created, name="ship")
    async def ship(event: created) -> None: ...

    @newer.on(created, paid, name="ship")
    async def ship_now(event: created | paid) -> None:
        done.note("run")

    async with home.client() as client:
        async with home.worker(newer):
            pass  # it binds the queue to both
        async with home.worker(service) as worker:
            await client.publish(paid())
            while not runner_of(worker).retried:  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.005)
            await settled(worker)
            assert runner_of(worker).filtered == 0
        async with home.worker(newer):
            await done.until(lambda counts: counts["run"] == 1)


async def test_an_event_that_a_pattern_takes_and_the_handler_does_not_is_dead_in_the_end(
    home: Place, service: Service, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcomes, "UNKNOWN_PAUSES", (0.25,))
    created = kind(f"{word}.created")

    @service.on(f"{word}.*")
    async def ship(event: created) -> None: ...

    async with home.client() as client, home.worker(service):
        await client.publish(kind(f"{word}.paid")())
        async with letters(home.url, dead_queue(home, service)) as dead:
            (letter,) = await dead.wait_for(1)
    assert letter.headers["rpcq-dead-reason"] == "unknown_event"
    assert f"takes no event '{word}.paid'" in letter.headers["rpcq-error"]


# At least once, at most once, and once by key.


async def test_a_key_suppresses_an_event_in_each_subscription_and_no_other_event(
    home: Place, service: Service, done: Done, word: str
) -> None:
    created, paid = kind(f"{word}.created"), kind(f"{word}.paid")

    @service.on(created, paid, name="one")
    async def one(event: Event) -> None:
        done.note(("one", type(event)))

    @service.on(f"{word}.*", name="two")
    async def two(event: AnyEvent) -> None:
        done.note(("two", event.name))

    async with home.client() as client, home.worker(service) as worker:
        maker = client.with_options(idempotency_key="order-7")
        for event in (created(), created(), paid()):
            assert (await maker.publish(event)).key == "order-7"
            await settled(worker)
        await done.until(lambda counts: counts.total() == 4)
        await settled(worker)
        assert runner_of(worker).suppressed == 2
    assert set(done.counts.values()) == {1}


async def test_what_a_lost_worker_held_is_done_by_another(home: Place, service: Service, done: Done, word: str) -> None:
    created, stuck = kind(f"{word}.created"), asyncio.Event()

    @service.on(created)
    async def work(event: created) -> None:
        if done.note("run") == 1:
            await stuck.wait()

    @service.on(created, at_most_once=True, retry=None, name="once")
    async def once(event: created) -> None:
        if done.note("once") == 1:
            await stuck.wait()

    async with home.client() as client:
        first = home.worker(service, grace=0.05)
        await first.start()
        await client.publish(created())
        await done.until(lambda counts: counts["run"] == counts["once"] == 1)
        await lose(first)
        async with home.worker(service), letters(home.url, dead_queue(home, service)) as dead:
            await done.until(lambda counts: counts["run"] == 2)
            (letter,) = await dead.wait_for(1)
    assert (letter.headers["rpcq-dead-reason"], letter.headers["rpcq-executed"]) == ("interrupted", "maybe")
    assert done.counts["once"] == 1


async def test_an_event_that_came_back_twice_runs_alone_from_the_queue_of_suspects(
    home: Place, service: Service, done: Done, word: str
) -> None:
    created, topology = kind(f"{word}.created"), EventTopology(home.namespace)

    @service.on(created)
    async def work(event: created, context: Context) -> None:
        done.note(context.attempt)

    async with home.client() as client:
        async with home.worker(service):
            pass
        await client.publish(created())
        queue = topology.queue(service.name, "work", [f"{word}.created"])
        for _ in range(2):
            async with letters(home.url, queue) as held:
                await held.wait_for(1)  # and its consumer is lost
        async with letters(home.url, topology.suspects(service.name, "work")) as suspects:
            worker = home.worker(service)
            await worker.start()
            (letter,) = await suspects.wait_for(1)
            await settled(worker)
            await worker.stop()
        assert letter.headers["rpcq-returns"] >= 2
        async with home.worker(service):
            await done.until(lambda counts: counts[1] == 1)


# What a publisher may get wrong.


async def test_what_is_no_event_is_refused_before_anything_is_sent(home: Place, word: str) -> None:
    created = kind(f"{word}.created")

    class Base(Event):
        number: int = 0

    async with home.client(max_body=1000) as client:
        for wrong, match in (
            ({"number": 7}, r"publish takes an instance of a class of events, .*; got \{'number': 7\}"),
            (f"{word}.created", "publish takes an instance"),
            (created, r"got its class: publish\(Created\(\.\.\.\)\)"),
            (Base(), r"must be of a class with a name; got Base: write class Base\(Event, name="),
        ):
            with pytest.raises(UsageError, match=match):
                await client.publish(wrong)
        with pytest.raises(UsageError, match="must not have the options delay, at, expires and priority"):
            await client.with_options(delay=5).publish(created())
        with pytest.raises(TooLarge, match=r"the event is \d+ bytes of JSON; the limit is 1000"):
            await client.publish(kind_with_text(f"{word}.text")(text="x" * 1000))


def kind_with_text(name: str) -> type[Any]:
    class Written(Event, name=name):
        text: str

    return Written


@pytest.mark.parametrize("home", ["rabbitmq"], indirect=True)  # a broker in memory is in one event loop only
async def test_a_client_that_blocks_publishes_too(home: Place, service: Service, done: Done, word: str) -> None:
    created = kind(f"{word}.created")

    @service.on(created)
    async def work(event: created) -> None:
        done.note(event.number)

    def publish() -> Publication:
        with sync.Client(home.url, namespace=home.namespace) as client:
            return client.publish(created(number=7))

    async with home.worker(service):
        published = await asyncio.to_thread(publish)
        assert published.heard
        await done.until(lambda counts: counts[7] == 1)


# Each instance.


async def test_every_process_gets_each_event_in_order_and_one_at_a_time(
    home: Place, service: Service, done: Done, word: str
) -> None:
    created = kind(f"{word}.created")
    seen: list[list[int]] = [[], []]

    def caching(own: list[int]) -> Service:
        made = Service(service.name)
        busy = 0

        @made.on(created, each_instance=True)
        async def cache(event: created) -> None:
            nonlocal busy
            busy += 1
            assert busy == 1
            await asyncio.sleep(0.005 if event.number % 2 else 0)
            own.append(event.number)
            busy -= 1
            done.note(event.number)

        return made

    async with home.client() as client, home.worker(caching(seen[0])), home.worker(caching(seen[1])):
        for number in range(20):
            assert (await client.publish(created(number=number))).heard
        await done.until(lambda counts: counts.total() == 40)
    assert seen == [[*range(20)], [*range(20)]]


async def test_what_fails_in_one_process_is_not_retried_and_the_next_event_comes(
    home: Place, service: Service, done: Done, word: str
) -> None:
    created = kind(f"{word}.created")

    @service.on(created, each_instance=True, timeout=0.1)
    async def cache(event: created, context: Context) -> None:
        done.note((event.number, context.attempt, context.is_last_attempt))
        if event.number == 0:
            raise ValueError("no")
        if event.number == 1:
            await asyncio.Event().wait()

    async with home.client() as client, home.worker(service) as worker:
        await client.publish(created(number=0))
        await publish_raw(client, home, f"{word}.created", b"no json")
        await client.publish(created(number=1))
        await client.publish(created(number=2))
        await done.until(lambda counts: counts[(2, 1, True)] == 1)
        await settled(worker)
        assert worker._jobs is None  # it has no queue that lasts, and no ladder
    assert done.counts == {(number, 1, True): 1 for number in range(3)}


async def test_a_thread_that_outlasts_its_timeout_is_waited_for_before_the_next_event(
    home: Place, service: Service, done: Done, word: str
) -> None:
    created, go_on, seen = kind(f"{word}.created"), threading.Event(), []
    loop = asyncio.get_running_loop()

    @service.on(created, each_instance=True, timeout=0.05)
    def cache(event: created) -> None:
        loop.call_soon_threadsafe(done.note, event.number)
        if event.number == 0:
            go_on.wait(10)
        seen.append(event.number)

    async with home.client() as client, home.worker(service) as worker:
        await client.publish(created(number=0))
        await client.publish(created(number=1))
        await done.until(lambda counts: counts[0] == 1)
        await asyncio.sleep(0.2)
        assert done.counts[1] == 0
        go_on.set()
        await done.until(lambda counts: counts[1] == 1)
        await settled(worker)
    assert seen == [0, 1]


async def test_a_new_session_gets_events_again_and_a_stopping_worker_begins_none(
    home: Place, service: Service, done: Done, word: str
) -> None:
    created, hold = kind(f"{word}.created"), asyncio.Event()

    @service.on(created, each_instance=True)
    async def cache(event: created) -> None:
        done.note(event.number)
        if event.number == 9:
            await hold.wait()

    async with home.client() as client, home.worker(service) as worker:
        await client.publish(created(number=0))
        await done.until(lambda counts: counts[0] == 1)
        await home.cut(client, worker)
        async with asyncio.timeout(20):
            while not done.counts[1]:
                await client.publish(created(number=1))
                await asyncio.sleep(0.05)
        await client.publish(created(number=9))
        await done.until(lambda counts: counts[9] == 1)
        await client.publish(created(number=10))
        stopping = asyncio.create_task(worker.stop())
        await asyncio.sleep(0.05)
        hold.set()
        assert await stopping
    assert done.counts[10] == 0

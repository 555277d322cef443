"""What is written with a transaction is sent if that is committed, and never otherwise."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import async_scoped_session, create_async_engine
from sqlalchemy.orm import scoped_session, sessionmaker

from rpcq import ConfigurationError, Context, InvalidParams, Retry, Service, UsageError, contract, sync
from rpcq.outbox import Outbox, relay
from rpcq.outbox.tables import dead as dead_table
from rpcq.outbox.tables import outbox as rows_table
from support.jobs import Done
from support.load import until
from support.places import Place
from support.stores import Order, Store, orders


@pytest.fixture
def work(service: Service, done: Done) -> Any:
    @service.job
    async def work(number: int, context: Context | None = None) -> None:
        done.note(number)

    return work


async def test_a_job_is_sent_after_the_commit_and_not_after_a_rollback(
    store: Store, outbox: Outbox, home: Place, service: Service, work: Any, done: Done
) -> None:
    def order(number: int) -> Any:
        def both(db: Any) -> None:
            db.add(Order(number))
            outbox.send(db, work, number=number)

        return both

    async with outbox, home.worker(service):
        for number in range(10):
            await store.write(order(number), commit=number % 2 == 0)
        await done.until(lambda counts: counts.total() == 5)
        await until(lambda: not store.count(rows_table))
    assert done.counts == dict.fromkeys(range(0, 10, 2), 1)
    assert sorted(number for _, number, _ in store.asked(orders.select())) == [*range(0, 10, 2)]


async def test_a_commit_wakes_the_relay_which_sends_the_job_at_once(
    store: Store, outbox: Outbox, home: Place, service: Service, work: Any, done: Done, monkeypatch: Any
) -> None:
    monkeypatch.setattr(relay, "POLL", 3600.0)  # so it does not look by itself
    async with asyncio.timeout(50), outbox, home.worker(service):
        for number in range(10):
            await store.write(lambda db, number=number: outbox.send(db, work, number=number))
            await done.until(lambda counts, number=number: counts[number] == 1)


async def test_what_a_savepoint_rolls_back_is_not_sent(
    store: Store, outbox: Outbox, home: Place, service: Service, work: Any, done: Done
) -> None:
    if store.is_blocking:

        def partly(db: Any) -> None:
            outbox.send(db, work, number=1)
            savepoint = db.begin_nested()
            outbox.send(db, work, number=2)
            db.flush()
            savepoint.rollback()
            with db.begin_nested():
                outbox.send(db, work, number=3)
            outbox.send(db, work, number=4)
    else:

        async def partly(db: Any) -> None:
            outbox.send(db, work, number=1)
            savepoint = await db.begin_nested()
            outbox.send(db, work, number=2)
            await db.flush()
            await savepoint.rollback()
            async with db.begin_nested():
                outbox.send(db, work, number=3)
            outbox.send(db, work, number=4)

    async with outbox, home.worker(service):
        await store.write(partly)
        await done.until(lambda counts: counts.total() == 3)
        await until(lambda: not store.count(rows_table))
    assert set(done.counts) == {1, 3, 4}


async def test_rows_that_another_process_left_are_sent_and_those_of_another_namespace_are_not(
    store: Store, outbox: Outbox, home: Place, service: Service, work: Any, done: Done
) -> None:
    elsewhere = Outbox(store.engine, home.url, namespace="elsewhere")
    await store.write(lambda db: [outbox.send(db, work, number=1), elsewhere.send(db, work, number=2)])
    async with Outbox(store.engine, home.url, namespace=home.namespace), home.worker(service):
        await done.until(lambda counts: counts[1] == 1)
        await until(lambda: store.count(rows_table) == 1)
    assert done.counts == {1: 1}


async def test_the_handler_gets_the_job_as_if_a_client_had_sent_it(
    store: Store, outbox: Outbox, home: Place, service: Service
) -> None:
    seen: asyncio.Queue[Context] = asyncio.Queue()

    @service.job
    async def look(context: Context) -> None:
        seen.put_nowait(context)

    async with outbox, home.worker(service):
        at = datetime.now(UTC) + timedelta(seconds=3)
        changed = outbox.with_options(idempotency_key="k", metadata={"x-tenant": "a"}, at=at)
        job = await store.write(lambda db: changed.send(db, look))
        context = await seen.get()
        plain = await store.write(lambda db: outbox.send(db, f"{service.name}.look"))
        second = await seen.get()
    assert (context.correlation_id, context.idempotency_key, context.metadata) == (job.id, "k", {"x-tenant": "a"})
    assert abs(context.due - at) < timedelta(milliseconds=1)
    assert context.due == job.due
    assert (second.correlation_id, second.idempotency_key, second.due) == (plain.id, plain.id, None)


async def test_a_job_that_is_due_later_waits_and_can_be_cancelled_until_then(
    store: Store, outbox: Outbox, home: Place, service: Service, work: Any, done: Done
) -> None:
    # So late that the second one is cancelled before.
    soon, far = outbox.with_options(delay=5), outbox.with_options(at=datetime(2999, 1, 1, tzinfo=UTC))
    async with outbox, home.worker(service):
        kept = await store.write(lambda db: soon.send(db, work, number=1))
        dropped = await store.write(lambda db: soon.send(db, work, number=2))
        distant = await store.write(lambda db: far.send(db, work, number=3))
        assert (await outbox.depth()).later == 3
        assert await store.write(lambda db: outbox.cancel(db, dropped))
        assert await store.write(lambda db: outbox.cancel(db, distant.id), commit=False)
        assert not await store.write(lambda db: outbox.cancel(db, dropped))
        await done.until(lambda counts: counts[1] == 1)
        assert kept.due is not None
        assert datetime.now(UTC) >= kept.due
        assert not await store.write(lambda db: outbox.cancel(db, kept))
        await until(lambda: store.count(rows_table) == 1)
    assert done.counts == {1: 1}


async def test_jobs_of_a_key_are_sent_in_the_order_of_their_transactions(
    store: Store, outbox: Outbox, home: Place, service: Service, work: Any, done: Done
) -> None:
    order: list[int] = []

    @service.job
    async def note(number: int) -> None:
        order.append(number)
        done.note("note")

    keyed = outbox.with_options(order_key="customer-7")
    counter = asyncio.Lock()
    sent: list[int] = []

    async def one(number: int) -> None:
        async with counter:  # the order of the commits is the order of the numbers
            await store.write(lambda db: keyed.send(db, note, number=number))
            sent.append(number)

    async with outbox, home.worker(service, job_prefetch=1):
        await asyncio.gather(*(one(number) for number in range(40)))
        await done.until(lambda counts: counts["note"] == 40)
    assert order == sent


@pytest.mark.parametrize("way", ["function", "name"])
async def test_jobs_of_a_key_of_an_ordered_service_are_done_in_the_order_of_their_transactions(
    store: Store, outbox: Outbox, home: Place, service: Service, way: str
) -> None:
    service, done, keys = Service(service.name, ordered=True), list[tuple[str, int]](), set[str | None]()

    @service.job(retry=Retry(initial_backoff=0.05, max_backoff=0.05))
    async def note(key: str, number: int, context: Context) -> None:
        if number == 0 and context.attempt < 3:
            raise ConnectionError("not yet")
        keys.add(context.order_key)
        done.append((key, number))

    target = note if way == "function" else f"{service.name}.note"
    async with outbox, home.worker(service, job_prefetch=20):
        for number in range(6):
            for key in ("a", "b"):
                keyed = outbox.with_options(order_key=key)
                job = await store.write(lambda db, k=keyed, n=number, key=key: k.send(db, target, key=key, number=n))
                assert job.order_key == key
        await until(lambda: len(done) == 12)
    for key in ("a", "b"):
        assert [number for its_key, number in done if its_key == key] == [*range(6)]
    assert keys == {"a", "b"}


async def test_an_order_key_of_a_function_whose_service_is_not_ordered_is_not_in_the_job(
    store: Store, outbox: Outbox, home: Place, service: Service
) -> None:
    seen: asyncio.Queue[str | None] = asyncio.Queue()

    @service.job
    async def note(context: Context) -> None:
        seen.put_nowait(context.order_key)

    async with outbox, home.worker(service):
        job = await store.write(lambda db: outbox.with_options(order_key="a").send(db, note))
        assert await asyncio.wait_for(seen.get(), 20) is None
    assert job.order_key is None


async def test_a_named_job_with_an_order_key_whose_service_is_not_ordered_is_a_dead_row_that_says_so(
    store: Store, outbox: Outbox, home: Place, service: Service, work: Any, done: Done, monkeypatch: Any
) -> None:
    monkeypatch.setattr(relay, "UNROUTABLE_PAUSES", ())
    async with outbox, home.worker(service):
        named = outbox.with_options(order_key="a")
        await store.write(lambda db: named.send(db, f"{service.name}.work", number=1))
        await until(lambda: store.count(dead_table) == 1)
    (row,) = store.asked(dead_table.select())
    assert "unroutable" in row
    assert "Service(..., ordered=True)" in row[-1]
    assert done.counts == {}


async def test_a_job_that_no_queue_takes_is_tried_again_and_then_dead_and_the_others_go_on(
    store: Store, outbox: Outbox, home: Place, service: Service, work: Any, done: Done, monkeypatch: Any
) -> None:
    monkeypatch.setattr(relay, "UNROUTABLE_PAUSES", (1,))
    async with outbox, home.worker(service):
        await store.write(lambda db: [outbox.send(db, "nobody.work"), outbox.send(db, work, number=1)])
        await done.until(lambda counts: counts[1] == 1)
        await until(lambda: store.count(dead_table) == 1)
        assert (await outbox.depth()).dead == 1
        counts = outbox.counts()
        assert (counts.sent, counts.retried, counts.dead) == (1, 1, 1)
    (row,) = store.asked(dead_table.select())
    assert row[2] == "nobody.work"
    assert "unroutable" in row
    assert "rpcq setup" in row[-1]


async def test_bad_input_is_an_error_before_anything_is_written(
    store: Store, outbox: Outbox, service: Service, work: Any
) -> None:
    @service.job(at_most_once=True)
    async def once() -> None: ...

    def refused(kind: type[Exception], match: str, change: Any = None) -> Any:
        def check(db: Any) -> None:
            with pytest.raises(kind, match=match):
                change(db)

        return check

    past = outbox.with_options(at=datetime.now(UTC) - timedelta(seconds=5))
    stale = outbox.with_options(delay=10, expires=5)
    for kind, match, change in (
        (InvalidParams, "number", lambda db: outbox.send(db, work, number="x")),
        (UsageError, "runs at most once", lambda db: outbox.send(db, once)),
        (ConfigurationError, "service.job", lambda db: outbox.send(db, "work")),
        (ConfigurationError, "at must be in the future", lambda db: past.send(db, work, number=1)),
        (ConfigurationError, "expires must be after", lambda db: stale.send(db, work, number=1)),
        (ConfigurationError, "your Session or AsyncSession", lambda db: outbox.send(None, work, number=1)),
        (ConfigurationError, "its ID", lambda db: outbox.cancel(db, 7)),
    ):
        await store.write(refused(kind, match, change))
    assert not store.count(rows_table)


async def test_a_session_without_a_transaction_or_of_another_database_is_an_error_that_names_the_fix(
    store: Store, outbox: Outbox, work: Any, tmp_path: Any
) -> None:
    db = store.sessions()
    with pytest.raises(UsageError, match=r"with session.begin\(\)"):
        outbox.send(db, work, number=1)
    other = sessionmaker(create_engine(f"sqlite:///{tmp_path}/other.db"))
    with other.begin() as another, pytest.raises(ConfigurationError, match=r"of another database, sqlite:.*other\.db"):
        outbox.send(another, work, number=1)
    with sessionmaker().begin() as unbound, pytest.raises(ConfigurationError, match="no engine for the table"):
        outbox.send(unbound, work, number=1)
    each = store.engine.execution_options(isolation_level="AUTOCOMMIT")
    with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
        Outbox(each)
    sync = create_engine(store.plain.url).execution_options(isolation_level="AUTOCOMMIT")
    with sessionmaker(sync).begin() as committing, pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
        outbox.send(committing, work, number=1)


async def test_another_engine_of_the_same_database_and_scoped_sessions_can_be_used(
    store: Store, outbox: Outbox, home: Place, service: Service, work: Any, done: Done
) -> None:
    blocking = scoped_session(sessionmaker(store.plain))
    async with outbox, home.worker(service):
        with blocking.begin():
            outbox.send(blocking, work, number=1)
        blocking.remove()
        if not store.is_blocking:
            scoped = async_scoped_session(store.sessions, asyncio.current_task)
            async with scoped.begin():
                outbox.send(scoped, work, number=1)
            await scoped.remove()
        else:
            await store.write(lambda db: outbox.send(db, work, number=1))
        await done.until(lambda counts: counts[1] == 2)


def test_engines_that_cannot_have_an_outbox_are_refused() -> None:
    for engine, match in (
        (create_engine("sqlite://"), "in a file"),
        (create_async_engine("sqlite+aiosqlite:///:memory:"), "in a file"),
        ("postgresql://", "create_engine"),
    ):
        with pytest.raises(ConfigurationError, match=match):
            Outbox(engine)  # type: ignore[arg-type]


async def test_the_relay_starts_without_a_broker_and_sends_when_there_is_one(
    store: Store, home: Place, service: Service, work: Any, done: Done, monkeypatch: Any
) -> None:
    monkeypatch.setattr(relay, "FAILED_PAUSES", (0.01, 0.02))
    refusals = [0]
    opened = relay.open_transport

    def refusing(url: str, options: Any) -> Any:
        refusals[0] += 1
        return opened("amqp://127.0.0.1:1/" if refusals[0] < 3 else url, options)

    monkeypatch.setattr(relay, "open_transport", refusing)
    outbox = Outbox(store.engine, home.url, namespace=home.namespace)
    async with outbox, home.worker(service):
        await store.write(lambda db: outbox.send(db, work, number=1))
        await done.until(lambda counts: counts[1] == 1)
    assert refusals == [3]


async def test_the_relay_goes_on_after_the_table_was_away(
    store: Store, outbox: Outbox, home: Place, service: Service, work: Any, done: Done, monkeypatch: Any
) -> None:
    monkeypatch.setattr(relay, "FAILED_PAUSES", (0.01, 0.02))
    monkeypatch.setattr(relay, "POLL", 0.01)
    store.do(lambda connection: connection.execute(text("alter table rpcq_outbox rename to away")))
    async with outbox, home.worker(service):
        await asyncio.sleep(0.2)
        store.do(lambda connection: connection.execute(text("alter table away rename to rpcq_outbox")))
        await store.write(lambda db: outbox.send(db, work, number=1))
        await done.until(lambda counts: counts[1] == 1)


async def test_what_is_committed_is_sent_before_the_relay_ends(
    store: Store, outbox: Outbox, home: Place, service: Service, work: Any, done: Done
) -> None:
    async with home.worker(service):
        async with outbox:
            await store.write(lambda db: [outbox.send(db, work, number=number) for number in range(600)])
        assert not store.count(rows_table)
        await done.until(lambda counts: counts.total() == 600)


async def test_of_two_relays_one_relays_and_a_job_is_sent_once(
    store: Store, outbox: Outbox, home: Place, service: Service, work: Any, done: Done
) -> None:
    second = Outbox(store.engine, home.url, namespace=home.namespace)
    async with outbox, second, home.worker(service):
        for number in range(50):
            await store.write(lambda db, number=number: (outbox, second)[number % 2].send(db, work, number=number))
        await done.until(lambda counts: len(counts) == 50)
        await until(lambda: outbox.counts().sent + second.counts().sent == 50)
        assert not store.count(rows_table)
    assert set(done.counts.values()) == {1}


async def test_the_jobs_of_a_contract_are_sent_without_a_client(
    store: Store, outbox: Outbox, home: Place, service: Service, work: Any, done: Done
) -> None:
    @contract(service.name, jobs=["work"])
    class Api(Protocol):
        async def work(self, number: int) -> None: ...

        async def count(self) -> int: ...

    bound = outbox.bind(Api)
    async with outbox, home.worker(service):
        await store.write(lambda db: outbox.send(db, bound.work, number=7))
        await done.until(lambda counts: counts[7] == 1)
        with pytest.raises(InvalidParams):
            await store.write(lambda db: outbox.send(db, bound.work, number="seven"))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"'count' is a method of Api of service .*: call it with a client"):
        _ = bound.count
    assert not hasattr(bound, "nothing")
    assert repr(bound) == f"<jobs of Api of service {service.name!r}>"


def test_a_contract_without_jobs_cannot_be_bound_to_an_outbox(outbox: Outbox) -> None:
    @sync.contract("counting")
    class Counting(Protocol):
        def count(self) -> int: ...

    @sync.contract("counting", jobs=["note"])
    class Noting(Protocol):
        def note(self, number: int) -> None: ...

    with pytest.raises(ConfigurationError, match=r"api must have jobs.*got Counting of service 'counting'"):
        outbox.bind(Counting)
    assert outbox.bind(Noting, "other").note.label == "other.note"  # type: ignore[attr-defined]  # a job

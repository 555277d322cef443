"""What a handler changes happens once, however often its job comes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from rpcq import Client, ConfigurationError, Context, Retry, Service
from rpcq.jobs import once, outcomes
from rpcq.once import OnceKey
from rpcq.outbox import Inbox, Outbox
from rpcq.outbox.tables import inbox as inbox_table
from rpcq.results import fingerprint
from support.jobs import Done, dead_queue, settled
from support.letters import letters
from support.load import until
from support.places import Place
from support.stores import Order, Store, orders

SOON = Retry(max_attempts=3, initial_backoff=0.01, max_backoff=0.01)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcomes, "HELD_PAUSE", 0.25)
    monkeypatch.setattr(once, "FIRST_PAUSE", 0.01)


@pytest.fixture
async def client(home: Place) -> AsyncIterator[Client]:
    async with home.client() as found:
        yield found


def job(service: Service, store: Store, work: Callable[..., None], **options: Any) -> Any:
    """A job whose handler does `work(db, number, context)`: in a task, or in a thread."""
    options = {"retry": SOON, **options}

    if store.is_blocking:

        @service.job(once=Inbox(store.engine), name="charge", **options)
        def charge(number: int, context: Context, db: Session) -> None:
            work(db, number, context)

        return charge

    @service.job(once=Inbox(store.engine), name="charge", **options)
    async def charge_async(number: int, context: Context, db: AsyncSession) -> None:
        await db.run_sync(work, number, context)

    return charge_async


def effects(store: Store) -> list[int]:
    return sorted(number for _, number, _ in store.asked(orders.select()))


async def test_a_job_that_comes_again_and_again_has_its_effect_once(
    store: Store, home: Place, service: Service, client: Client, done: Done
) -> None:
    loop = asyncio.get_running_loop()

    def work(db: Session, number: int, _: Context) -> None:
        db.add(Order(number))
        loop.call_soon_threadsafe(done.note, number)

    charge = job(service, store, work)
    async with home.worker(service, remember=0) as worker:  # its own memory would suppress most
        for number in range(5):
            for _ in range(3):
                await client.with_options(idempotency_key=f"k{number}").send(charge, number=number)
        await until(lambda: store.count(inbox_table) == 5)
        await settled(worker)
        assert worker._jobs is not None
        await until(lambda: worker._jobs.finished == 15 or worker._jobs.put_off)
        await until(lambda: worker._jobs.suppressed == 10)
    assert effects(store) == [0, 1, 2, 3, 4]
    assert {consumer for consumer, *_ in store.asked(inbox_table.select())} == {f"{service.name}.charge"}


async def test_what_a_handler_that_raised_has_changed_is_rolled_back_with_its_key_and_its_jobs(
    store: Store, home: Place, service: Service, client: Client, outbox: Outbox, done: Done
) -> None:
    @service.job
    async def receipt(attempt: int) -> None:
        done.note(attempt)

    def work(db: Session, number: int, context: Context) -> None:
        db.add(Order(number))
        outbox.send(db, receipt, attempt=context.attempt)
        db.flush()
        if context.attempt < 3:
            raise ArithmeticError

    charge = job(service, store, work)
    async with outbox, home.worker(service):
        await client.send(charge, number=7)
        await done.until(lambda counts: counts.total() == 1)
    assert done.counts == {3: 1}
    assert effects(store) == [7]
    assert store.count(inbox_table) == 1


async def test_a_key_of_another_job_is_another_key_and_other_parameters_are_a_dead_letter(
    store: Store, home: Place, service: Service, client: Client
) -> None:
    def work(db: Session, number: int, _: Context) -> None:
        db.add(Order(number))

    other = Service(f"{service.name}2")
    charges = [job(each, store, work) for each in (service, other)]
    keyed = client.with_options(idempotency_key="k")
    async with home.worker(service, other, remember=0):
        for charge in charges:
            await keyed.send(charge, number=1)
        await until(lambda: store.count(inbox_table) == 2)
        await keyed.send(charges[0], number=2)
        async with letters(home.url, dead_queue(home, service)) as found:
            assert (await found.wait_for(1))[0].headers["rpcq-dead-reason"] == "invalid"
    assert effects(store) == [1, 1]


async def test_while_another_worker_has_the_key_the_job_is_put_off_and_runs_if_that_one_fails(
    store: Store, home: Place, service: Service, client: Client
) -> None:
    """A transaction of the test is the other worker."""

    def work(db: Session, number: int, _: Context) -> None:
        db.add(Order(number))

    charge = job(service, store, work)
    key = OnceKey(f"{service.name}.charge", "k", fingerprint("charge", b'{"number":1}'))
    async with home.worker(service, remember=0) as worker:
        with suppress(ArithmeticError), Inbox(store.plain).open_blocking(key):
            await client.with_options(idempotency_key="k").send(charge, number=1)
            if "sqlite" in store.driver:  # a file has one writer: it waits
                await asyncio.sleep(0.3)
            else:
                await until(lambda: worker._jobs.put_off)
            assert effects(store) == []
            raise ArithmeticError
        await until(lambda: effects(store) == [1])
        await settled(worker)
    assert store.count(inbox_table) == 1


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"], indirect=True)
async def test_of_many_workers_with_doubles_of_many_jobs_each_effect_is_there_once(
    store: Store, home: Place, service: Service, client: Client
) -> None:
    def work(db: Session, number: int, _: Context) -> None:
        db.add(Order(number))

    charge = job(service, store, work)
    second = Service(service.name)
    job(second, store, work)
    async with home.worker(service, remember=0) as one, home.worker(second, remember=0) as two:
        for number in range(40):
            for _ in range(3):
                await client.with_options(idempotency_key=f"k{number}").send(charge, number=number)
        await until(lambda: store.count(inbox_table) == 40)
        await until(lambda: one._jobs.finished + two._jobs.finished >= 120)
        await settled(one, two)
    assert effects(store) == [*range(40)]


async def test_if_the_commit_succeeds_and_its_answer_is_lost_the_job_is_done_once(
    store: Store, home: Place, service: Service, client: Client
) -> None:
    def work(db: Session, number: int, context: Context) -> None:
        db.add(Order(number))
        attempts.append(context.attempt)

    attempts: list[int] = []
    charge = job(service, store, work, retry_on=(KeyError,))  # an unknown commit is no error of the handler
    engine = getattr(store.engine, "sync_engine", store.engine)

    @event.listens_for(engine, "commit")
    def lose(connection: Any) -> None:
        connection.connection.commit()
        event.remove(engine, "commit", lose)
        raise OperationalError("COMMIT", {}, ConnectionError("the connection was lost"))

    async with home.worker(service, remember=0) as worker:
        await client.send(charge, number=1)
        await until(lambda: worker._jobs.suppressed == 1)
        assert worker._jobs.retried == 1
    assert attempts == [1]
    assert effects(store) == [1]


async def test_if_the_commit_fails_the_job_is_tried_again(
    store: Store, home: Place, service: Service, client: Client
) -> None:
    def work(db: Session, number: int, _: Context) -> None:
        db.add(Order(number))

    charge = job(service, store, work, retry_on=(KeyError,))
    engine = getattr(store.engine, "sync_engine", store.engine)

    @event.listens_for(engine, "commit")
    def lose(connection: Any) -> None:
        event.remove(engine, "commit", lose)
        connection.connection.rollback()
        raise OperationalError("COMMIT", {}, ConnectionError("the connection was lost"))

    async with home.worker(service, remember=0) as worker:
        await client.send(charge, number=1)
        await until(lambda: effects(store) == [1])
        assert worker._jobs.retried == 1
        await settled(worker)
        assert worker._jobs.suppressed == 0


async def test_an_error_that_the_handler_swallows_does_not_lose_the_job(
    store: Store, home: Place, service: Service, client: Client
) -> None:
    """PostgreSQL answers the commit of a failed transaction with a rollback, and no error."""

    def work(db: Session, number: int, context: Context) -> None:
        db.add(Order(number))
        db.flush()
        if context.attempt == 1:
            with pytest.raises(SQLAlchemyError):
                db.execute(text("select * from there_is_no_such_table"))

    charge = job(service, store, work)
    async with home.worker(service, remember=0) as worker:
        await client.send(charge, number=1)
        await until(lambda: effects(store) == [1])
        await settled(worker)
        assert worker._jobs.retried == (0 if "sqlite" in store.driver else 1)
    assert store.count(inbox_table) == 1


@pytest.mark.parametrize("ending", ["commit", "rollback"])
async def test_a_handler_that_ends_its_transaction_itself_fails_with_an_error_that_names_the_fix(
    store: Store, home: Place, service: Service, client: Client, ending: str
) -> None:
    def work(db: Session, number: int, _: Context) -> None:
        db.add(Order(number))
        getattr(db, ending)()

    charge = job(service, store, work, retry=None)
    async with home.worker(service, remember=0):
        await client.send(charge, number=1)
        async with letters(home.url, dead_queue(home, service)) as found:
            (letter,) = await found.wait_for(1)
    assert "use db.begin_nested()" in letter.headers["rpcq-error"]
    assert effects(store) == ([1] if ending == "commit" else [])


async def test_while_the_database_is_away_jobs_are_put_off_and_no_attempt_counts(
    store: Store, home: Place, service: Service, client: Client
) -> None:
    def work(db: Session, number: int, context: Context) -> None:
        db.add(Order(context.attempt))

    charge = job(service, store, work)
    store.do(lambda connection: connection.execute(text("alter table rpcq_inbox rename to away")))
    async with home.worker(service, remember=0) as worker:
        await client.send(charge, number=1)
        await until(lambda: worker._jobs.put_off >= 2)
        store.do(lambda connection: connection.execute(text("alter table away rename to rpcq_inbox")))
        await until(lambda: effects(store) == [1])


async def test_a_handler_that_times_out_leaves_nothing_and_its_connection_is_free_again(
    home: Place, service: Service, client: Client, database_url: str
) -> None:
    store = Store("asyncpg", database_url, pool_size=1, max_overflow=0, pool_timeout=5)

    @service.job(once=Inbox(store.engine), timeout=3, retry=SOON)
    async def charge(db: AsyncSession, context: Context) -> None:
        db.add(Order(context.attempt))
        await db.flush()
        if context.attempt == 1:
            await asyncio.sleep(60)

    async with home.worker(service, remember=0):
        await client.send(charge)
        await until(lambda: effects(store) == [2])
    await store.close()


async def test_a_thread_that_goes_on_beyond_its_timeout_is_done_when_it_commits(
    home: Place, service: Service, client: Client, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store("psycopg", database_url)
    ended = threading.Event()

    @service.job(once=Inbox(store.engine), timeout=2, retry=SOON)
    def charge(db: Session) -> None:
        db.add(Order(1))
        ended.wait(40)

    async with home.worker(service, remember=0) as worker:
        await client.send(charge)
        await until(lambda: "goes on beyond its timeout" in caplog.text)
        assert effects(store) == []
        ended.set()
        await until(lambda: effects(store) == [1])
        await settled(worker)
        assert worker._jobs.retried == 0
    await store.close()


async def test_old_keys_are_pruned(store: Store, home: Place, service: Service, client: Client) -> None:
    def work(db: Session, number: int, _: Context) -> None:
        db.add(Order(number))

    charge = job(service, store, work)
    keyed = client.with_options(idempotency_key="k")
    inbox = Inbox(store.engine)

    async with home.worker(service, remember=0) as worker:
        await keyed.send(charge, number=1)
        await until(lambda: store.count(inbox_table) == 1)
        await settled(worker)
        assert await inbox.prune(60) == 0
        await asyncio.sleep(0.05)
        assert await inbox.prune(0.001) == 1
        await keyed.send(charge, number=1)  # it counts as never done
        await until(lambda: effects(store) == [1, 1])
    with pytest.raises(ConfigurationError, match="seconds must be"):
        await inbox.prune(0)


def test_a_handler_that_the_inbox_cannot_give_a_session_is_refused_with_the_fix(tmp_path: Any) -> None:
    asynchronous = Inbox(create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/a.db"))
    blocking = Inbox(create_engine(f"sqlite:///{tmp_path}/a.db"))
    service = Service("payments")

    async def none(number: int) -> None: ...
    async def wrong(db: Session) -> None: ...
    def thread(db: Session) -> None: ...
    async def task(db: AsyncSession) -> None: ...
    async def twice(db: AsyncSession, again: AsyncSession) -> None: ...

    for handler, inbox, match in (
        (none, asynchronous, "payments.none has once=.*annotated AsyncSession"),
        (none, blocking, "create_async_engine"),
        (wrong, asynchronous, "payments.wrong, an async def, takes a session of type Session"),
        (thread, asynchronous, r"give it create_engine\(...\) for a def"),
        (task, blocking, r"give it create_async_engine\(...\) for an async def"),
        (twice, asynchronous, "its session in one parameter"),
    ):
        with pytest.raises(ConfigurationError, match=match):
            service.job(once=inbox)(handler)  # type: ignore[call-overload]
    with pytest.raises(ConfigurationError, match="at_most_once must be False with once"):
        service.job(once=asynchronous, at_most_once=True)(task)
    with pytest.raises(ConfigurationError, match=r"once must be an inbox, such as rpcq.outbox.Inbox\(engine\)"):
        service.job(once="inbox")(task)  # type: ignore[call-overload]


def test_sessions_of_another_database_or_of_the_other_kind_are_refused(tmp_path: Any) -> None:
    here = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/a.db")
    there = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/b.db")
    with pytest.raises(ConfigurationError, match=r"must be of the inbox's database"):
        Inbox(here, sessions=async_sessionmaker(there))
    with pytest.raises(ConfigurationError, match="made by async_sessionmaker"):
        Inbox(here, sessions=sessionmaker())
    Inbox(here, sessions=async_sessionmaker())


async def test_context_and_session_are_given_wherever_they_stand(
    store: Store, home: Place, service: Service, client: Client, done: Done
) -> None:
    inbox = Inbox(store.engine)
    loop = asyncio.get_running_loop()
    kind = Session if store.is_blocking else AsyncSession

    def note(*what: Any) -> None:
        loop.call_soon_threadsafe(done.note, what)

    if store.is_blocking:

        @service.job(once=inbox)
        def first(db: Session, a: int, context: Context, b: int) -> None:
            note("first", isinstance(db, kind), type(context), a, b)

        @service.job(once=inbox)
        def named(a: int, b: int, *, context: Context, db: Session) -> None:
            note("named", isinstance(db, kind), type(context), a, b)
    else:

        @service.job(once=inbox)
        async def first(db: AsyncSession, a: int, context: Context, b: int) -> None:
            note("first", isinstance(db, kind), type(context), a, b)

        @service.job(once=inbox)
        async def named(a: int, b: int, *, context: Context, db: AsyncSession) -> None:
            note("named", isinstance(db, kind), type(context), a, b)

    async with home.worker(service):
        for name in ("first", "named"):
            await client.send(f"{service.name}.{name}", 1, 2)
            await client.send(f"{service.name}.{name}", a=1, b=2)
        await done.until(lambda counts: counts.total() == 4)
    assert done.counts == {("first", True, Context, 1, 2): 2, ("named", True, Context, 1, 2): 2}

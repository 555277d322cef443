"""A world whose time a test moves."""

from __future__ import annotations

import asyncio
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import pytest

from rpcq import (
    Client,
    ConfigurationError,
    Context,
    Cron,
    Every,
    GiveUp,
    InvalidParams,
    Retry,
    RetryLater,
    SendError,
    Service,
    UsageError,
    contract,
)
from rpcq.testing import FakeService, WorkerKilled, World, running, world, worlds
from rpcq.transport.base import Message
from rpcq.wire.jobs import JobMessage, encode_job

pytest_plugins = ["pytester"]


class Smtp:
    """A mail server that may be down."""

    def __init__(self) -> None:
        self.is_down = False
        self.sent: list[str] = []

    def send(self, to: str) -> None:
        if self.is_down:
            raise ConnectionError("the mail server is down")
        self.sent.append(to)


@pytest.fixture
def smtp() -> Smtp:
    return Smtp()


@pytest.fixture
def emails(smtp: Smtp) -> Service:
    service = Service("emails")

    @service.job(retry=Retry(max_attempts=8, initial_backoff=600, max_backoff=3600))
    async def welcome(to: str) -> None:
        smtp.send(to)

    @service.job
    async def digest(context: Context) -> None:
        if context.attempt == 1:
            raise RetryLater(3600)
        smtp.send("digest")

    return service


# Time.


async def test_an_email_outlives_two_hours_without_a_mail_server_and_the_test_takes_no_time(
    emails: Service, smtp: Smtp
) -> None:
    smtp.is_down = True
    async with world(emails) as w:
        job = await w.client.send("emails.welcome", to="ada@example.org")
        began = w.now
        await w.advance(hours=2)
        assert w.now == began + timedelta(hours=2)
        (waiting,) = w.waiting("emails.welcome")
        assert (waiting.id, waiting.attempt, waiting.params) == (job.id, 8, {"to": "ada@example.org"})
        # Half of 600, 1200, 2400 and then 3600 s, each rounded down to two significant bits of 250 ms.
        assert waiting.due == began + timedelta(seconds=256 + 512 + 1024 + 4 * 1536)
        smtp.is_down = False
        await w.advance(hours=1)
        assert smtp.sent == ["ada@example.org"]
        assert (w.waiting(), w.dead()) == ([], [])


async def test_an_email_that_never_gets_out_is_a_dead_letter_with_all_that_is_known(
    emails: Service, smtp: Smtp
) -> None:
    smtp.is_down = True
    async with world(emails) as w:
        job = await w.client.with_options(idempotency_key="welcome-7").send("emails.welcome", to="ada")
        began = w.now
        await w.advance(days=1)
        (letter,) = w.dead(emails)
        assert (letter.id, letter.key, letter.job) == (job.id, "welcome-7", "emails.welcome")
        assert (letter.reason, letter.executed, letter.attempt) == ("attempts", "yes", 8)
        assert (letter.params, letter.error) == ({"to": "ada"}, "ConnectionError: the mail server is down")
        assert len(letter.incident) == 12
        assert letter.died_at == began + timedelta(seconds=256 + 512 + 1024 + 4 * 1536)


async def test_a_job_that_asks_for_an_hour_runs_when_the_hour_is_over_and_not_before(
    emails: Service, smtp: Smtp
) -> None:
    async with world(emails) as w:
        await w.client.send("emails.digest")
        await w.settled()
        (waiting,) = w.waiting(emails)
        assert waiting.due == w.now + timedelta(hours=1)
        await w.advance(minutes=59, seconds=59.75)
        assert not smtp.sent
        await w.advance(seconds=0.25)
        assert smtp.sent == ["digest"]


async def test_what_comes_due_happens_in_its_order_and_at_its_time() -> None:
    service, seen = Service("things"), []

    @service.job
    async def later(context: Context, seconds: list[float]) -> None:
        seen.append(((w.now - began).total_seconds(), context.correlation_id))
        if context.attempt <= len(seconds):
            raise RetryLater(seconds[context.attempt - 1])

    async with world(service) as w:
        began = w.now
        slow = await w.client.send(later, seconds=[100, 7000])
        quick = await w.client.send(later, seconds=[50, 100, 200, 0.3])
        await w.advance(hours=2)
    assert [(at, {slow.id: "slow", quick.id: "quick"}[job]) for at, job in seen] == [
        (0, "slow"),
        (0, "quick"),
        (50, "quick"),
        (100, "slow"),
        (150, "quick"),
        (350, "quick"),
        (350.5, "quick"),
        (7100, "slow"),
    ]


async def test_a_job_that_expires_meanwhile_is_dead_and_does_not_run(emails: Service, smtp: Smtp) -> None:
    async with world(emails) as w:
        now_ms = round(w.now.timestamp() * 1000)
        for job_id, expires in (("7", 60_000), ("8", 60_001)):
            job = JobMessage(
                id=job_id,
                key=job_id,
                name="welcome",
                body=b'{"to":"%b"}' % job_id.encode(),
                expires_ms=now_ms + expires,
            )
            properties = encode_job(job, now_ms)
            exchange, key = w._jobs._topology.ladder.route(240, "job.emails")
            published = asyncio.get_running_loop().create_future()
            message = Message(exchange, key, job_id.encode(), properties, job.body, published.set_result)
            w.client._transport.publish(message)
            await published
        await w.advance(minutes=1)
        (letter,) = w.dead(emails)
        assert (letter.id, letter.reason, letter.executed) == ("7", "expired", "no")
        assert smtp.sent == ["8"]


async def test_the_times_in_messages_and_dead_letters_are_those_of_the_world() -> None:
    service = Service("things")

    @service.job
    async def give_up() -> None:
        raise GiveUp("no use")

    async with world(service) as w:
        await w.advance(days=30)
        await w.client.send(give_up)
        await w.settled()
        (letter,) = w.dead(give_up)
        assert letter.died_at == w.now
        assert w.now > datetime.now(UTC) + timedelta(days=29)


async def test_code_that_opens_its_own_client_and_worker_lives_in_the_same_time(smtp: Smtp, emails: Service) -> None:
    async with world() as w:
        url, namespace = w.client._url, w.client.options.namespace
        from rpcq import Worker

        async with Worker(emails, url=url, namespace=namespace), Client(url, namespace=namespace) as client:
            await client.send("emails.digest")
            await w.advance(hours=1)
            assert smtp.sent == ["digest"]


async def test_jobs_in_lanes_are_jobs_of_their_service() -> None:
    service, ran = Service("a.b", lanes=True), []

    @service.job
    async def work(priority: str) -> None:
        ran.append(priority)

    async with world(service) as w:
        for priority in ("low", "normal", "high"):
            maker = w.client.with_options(priority=priority, delay=60)
            await maker.send(work, priority=priority)
        assert {job.priority for job in w.waiting("a.b.work")} == {"low", "normal", "high"}
        assert {job.params["priority"] == job.priority for job in w.waiting(service)} == {True}
        await w.kill_worker()
        await w.advance(hours=1)
        assert [(job.job, job.priority) for job in w.waiting() if job.due is None] == [
            ("a.b.work", "high"),
            ("a.b.work", "normal"),
            ("a.b.work", "low"),
        ]
        await w.start_worker()
        await w.settled()
        assert sorted(ran) == ["high", "low", "normal"]
        assert (w.waiting(), w.dead()) == ([], [])


async def test_a_fake_takes_order_keys_where_the_real_service_does() -> None:
    ordered, plain = FakeService("one", ordered=True).takes("work"), FakeService("two").takes("work")
    async with world(ordered, plain) as w:
        maker = w.client.with_options(order_key="a")
        await maker.send("one.work")
        with pytest.raises(SendError, match="ordered=True"):
            await maker.send("two.work")
        await w.settled()
    assert [job.context.order_key for job in ordered.received] == ["a"]


async def test_a_fake_takes_priorities_where_the_real_service_does() -> None:
    with_lanes, without = FakeService("one", lanes=True).takes("work"), FakeService("two").takes("work")
    async with world(with_lanes, without) as w:
        high = w.client.with_options(priority="high")
        await high.send("one.work")
        with pytest.raises(SendError, match="lanes=True"):
            await high.send("two.work")
        await w.settled()
    assert [job.method for job in with_lanes.received] == ["work"]


async def test_calls_take_real_time_and_work_as_ever() -> None:
    service = Service("things")

    @service.method
    async def double(x: int) -> int:
        return 2 * x

    async with world(service) as w:
        assert await w.client.call("things.double", x=2) == 4
        await w.advance(days=2)
        assert await w.client.call("things.double", x=3) == 6


async def test_a_handler_may_take_real_time_and_run_in_a_thread() -> None:
    service, done = Service("things"), []

    @service.job
    async def sleep() -> None:
        await asyncio.sleep(0.02)
        done.append("sleep")

    @service.job
    def block() -> None:
        time.sleep(0.02)
        done.append("block")

    async with world(service) as w:
        await w.client.send(sleep)
        await w.client.send(block)
        await w.settled()
        assert sorted(done) == ["block", "sleep"]


async def test_what_does_not_end_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds, "PATIENCE", 0.05)
    service = Service("things")

    @service.job
    async def hang() -> None:
        await asyncio.Event().wait()

    async with world(service, grace=0.01) as w:
        await w.client.send(hang)
        with pytest.raises(TimeoutError, match=r"real time, still running: things\.hang\. A world moves the delays"):
            await w.settled()
        with pytest.raises(TimeoutError):
            await w.advance(hours=1)


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ({}, "more than 0 s and at most ten years; got 0 s"),
        ({"seconds": 0}, "more than 0 s"),
        ({"hours": -1}, "hours must be a number of at least 0; got -1"),
        ({"days": float("nan")}, "days must be a number of at least 0; got nan"),
        ({"minutes": True}, "minutes must be a number of at least 0; got True"),
        ({"seconds": "3"}, "seconds must be a number"),
        ({"days": 4000}, "at most ten years; got 3.456e"),
        ({"days": float("inf")}, "at most ten years; got inf"),
    ],
)
async def test_what_is_no_time_to_move_by_is_refused(by: dict[str, Any], message: str) -> None:
    async with world() as w:
        began = w.now
        with pytest.raises(ConfigurationError, match=message):
            await w.advance(**by)
        assert w.now == began


# Workers.


async def test_jobs_wait_for_a_worker_while_none_runs(emails: Service, smtp: Smtp) -> None:
    async with world(emails) as w:
        await w.kill_worker()
        await w.client.send("emails.welcome", to="ada")
        await w.client.send("emails.welcome", to="bob")
        await w.advance(hours=2)
        assert [(job.params["to"], job.due) for job in w.waiting("emails.welcome")] == [("ada", None), ("bob", None)]
        with pytest.raises(UsageError, match=r"emails\.welcome and 1 more jobs wait for a worker"):
            await w.settled()
        await w.start_worker()
        await w.settled()
        assert smtp.sent == ["ada", "bob"]


async def test_a_worker_that_is_killed_acknowledges_nothing_and_the_job_runs_again() -> None:
    service, runs, begun = Service("things"), [], asyncio.Event()

    @service.job
    async def work(context: Context) -> None:
        runs.append(context.attempt)
        begun.set()
        if len(runs) == 1:
            await asyncio.Event().wait()

    async with world(service) as w:
        await w.client.send(work)
        await begun.wait()
        await w.kill_worker()
        (waiting,) = w.waiting(work)
        assert (waiting.due, waiting.attempt) == (None, 1)
        await w.start_worker()
        await w.settled()
    assert runs == [1, 1]


async def test_what_a_killed_worker_was_about_to_tell_never_arrives() -> None:
    service, runs = Service("things"), []

    @service.job
    async def work() -> None:
        runs.append(1)
        if len(runs) == 1:
            worker.vanish()  # type: ignore[attr-defined]  # before the acknowledgement that follows

    async with world() as w:
        worker = await w.start_worker(service)
        await w.client.send(work)
        while not runs:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0)
        await w.kill_worker(worker)
        await w.start_worker(service)
        await w.settled()
        assert (runs, w.dead(), w.waiting()) == ([1, 1], [], [])


@pytest.mark.parametrize("kind", ["async def", "def"])
async def test_a_job_that_kills_its_worker_again_and_again_is_dead_and_its_neighbours_are_done(kind: str) -> None:
    service, crashes, done = Service("images"), [], []

    def decode(path: str) -> None:
        if path == "bomb.png":
            crashes.append(path)
            w.crash(path)
        done.append(path)

    if kind == "def":

        @service.job
        def resize(path: str) -> None:
            decode(path)
    else:

        @service.job
        async def resize(path: str) -> None:
            await asyncio.sleep(0)
            decode(path)

    async with world(service) as w:
        for path in ("a.png", "bomb.png", "b.png"):
            await w.client.send(resize, path=path)
        await w.settled()
        (letter,) = w.dead(resize)
        assert (letter.reason, letter.executed, letter.params) == ("delivery_limit", "maybe", {"path": "bomb.png"})
        assert len(crashes) == 2 + 5
        assert {*done} == {"a.png", "b.png"}
        assert not w.waiting()


async def test_a_job_that_runs_at_most_once_is_dead_when_its_worker_is_killed() -> None:
    service, runs = Service("things"), []

    @service.job(at_most_once=True)
    async def pay() -> None:
        runs.append(1)
        w.crash()

    async with world(service) as w:
        await w.client.send(pay)
        await w.settled()
        (letter,) = w.dead(pay)
    assert (letter.reason, letter.executed, runs) == ("interrupted", "maybe", [1])


async def test_what_was_to_begin_beside_a_crash_does_not_begin_in_the_killed_worker() -> None:
    service, begun = Service("things"), []

    @service.job
    async def work(number: int) -> None:
        begun.append(number)
        if begun == [0]:
            w.crash()

    async with world(service) as w:
        await w.kill_worker()
        await w.client.send_many(work, [{"number": number} for number in range(3)])
        await w.start_worker()
        await w.settled()
    assert sorted(begun) == [0, 0, 1, 2]


async def test_a_handler_may_kill_its_worker_itself() -> None:
    service, runs = Service("things"), []

    @service.job
    async def work() -> None:
        runs.append(1)
        if len(runs) == 1:
            await w.kill_worker()
            runs.append(2)

    async with world(service) as w:
        await w.client.send(work)
        while w.waiting() == [] or len(runs) == 0:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0)
        await w.start_worker()
        await w.settled()
    assert runs == [1, 1]


async def test_a_newer_worker_takes_the_jobs_that_an_older_one_does_not_know(emails: Service) -> None:
    newer, done = Service("emails"), []

    @newer.job
    async def goodbye() -> None:
        done.append(1)

    async with world(emails) as w:
        await w.client.send("emails.goodbye")
        await w.settled()
        (waiting,) = w.waiting(emails)
        assert waiting.due == w.now + timedelta(seconds=5)
        older = w._workers[0]
        await w.start_worker(newer)
        await w.kill_worker(older)
        await w.advance(seconds=5)
        assert done == [1]


async def test_a_worker_that_cannot_be_replaced_fails_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service("things")

    @service.job
    async def work() -> None:
        monkeypatch.setattr(World, "start_worker", fail)
        w.crash()

    async def fail(*_: Any) -> None:
        raise OSError("no more processes")

    async with world(service) as w:
        await w.client.send(work)
        with pytest.raises(OSError, match="no more processes"):
            await w.settled()


async def test_what_cannot_be_killed_or_started_is_said(emails: Service) -> None:
    async with world() as w:
        with pytest.raises(UsageError, match="no worker runs"):
            await w.kill_worker()
        with pytest.raises(UsageError, match="must be given a service"):
            await w.start_worker()
        with pytest.raises(UsageError, match="crash must be called by a job"):
            w.crash()
        worker = await w.start_worker(emails)
        await w.kill_worker(worker)
        with pytest.raises(UsageError, match="must be given a worker that runs"):
            await w.kill_worker(worker)


def test_a_killed_handler_cannot_catch_its_end_as_an_exception() -> None:
    assert not issubclass(WorkerKilled, Exception)


# What there is.


async def test_a_service_a_function_or_a_name_says_which_jobs(emails: Service) -> None:
    other = Service("a.b")

    @other.job
    async def fail(x: int) -> None:
        raise GiveUp("always")

    async with world(emails, other) as w:
        await w.client.send(fail, x=1)
        await w.client.send("a.b.fail", 2)
        await w.client.send("a.b.unheard")
        await w.advance(days=1)
        assert [letter.params for letter in w.dead(fail)] == [{"x": 1}, 2]
        assert w.dead("a.b.fail") == w.dead(fail)
        assert [letter.reason for letter in w.dead("a.b")] == ["gave_up", "gave_up", "unknown_method"]
        assert w.dead(other) == w.dead("a.b") == w.dead()
        assert w.dead(emails) == w.waiting(emails) == []
        for wrong, message in (
            ("emial", "a job must be named"),
            ("emial.welcome", "must have the service, with jobs; it has emails, a.b; got 'emial.welcome'"),
            ("emails.welcom", "'emails' must have the job; it has digest, welcome; got 'emails.welcom'"),
            (Service("nobody"), "must have the service"),
        ):
            for look in (w.dead, w.waiting):
                with pytest.raises(ConfigurationError, match=message):
                    look(wrong)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="it is not a job"):
            w.dead(lambda: None)


async def test_what_cannot_be_read_is_shown_as_far_as_it_can_be(emails: Service) -> None:
    async with world(emails) as w:
        with pytest.raises(InvalidParams):
            await w.client.send(emails.jobs["welcome"].handler, 5)
        job = JobMessage(id="7", name="welcome", body=b"{no JSON")
        published = asyncio.get_running_loop().create_future()
        topology = w._jobs._topology
        properties = encode_job(job, 0)
        await w.client._transport.declare([topology.jobs])
        message = Message(topology.jobs.name.encode(), b"emails", b"7", properties, job.body, published.set_result)
        w.client._transport.publish(message)
        await published
        await w.settled()
        (letter,) = w.dead()
        assert (letter.reason, letter.executed, letter.params) == ("invalid", "no", None)


async def test_what_lost_its_queue_is_among_the_dead(emails: Service) -> None:
    async with world(emails) as w:
        await w.client.send("emails.digest")
        await w.settled()
        vhost = w._broker.vhost
        vhost._delete(vhost.queues[w._jobs._topology.queue("emails").name])
        await w.advance(hours=1)
        (letter,) = w.dead()
        assert (letter.job, letter.reason, letter.executed) == ("emails.digest", "lost", "yes")


# Fakes.


async def test_a_fake_shows_what_jobs_were_sent() -> None:
    async def sign_up(client: Client, name: str) -> None:
        options = client.with_options(idempotency_key=f"welcome-{name}", metadata={"x-tenant": "t1"})
        await options.send("emails.welcome", to=f"{name}@example.org")
        await client.send("emails.digest", 7)

    fake = FakeService("emails").takes("welcome", "digest")
    async with world(fake) as w:
        await sign_up(w.client, "ada")
        await w.settled()
    welcome, digest = fake.received
    assert (welcome.method, welcome.args, welcome.params) == ("welcome", (), {"to": "ada@example.org"})
    assert (welcome.context.idempotency_key, welcome.context.metadata) == ("welcome-ada", {"x-tenant": "t1"})
    assert welcome.context.state is None
    assert (digest.method, digest.args) == ("digest", (7,))
    assert fake.calls == []
    assert repr(fake) == "<FakeService 'emails': welcome, digest>"


async def test_a_fake_takes_calls_and_jobs_and_no_jobs_that_it_was_not_told_of() -> None:
    fake = FakeService("emails").takes("welcome").answers("count", 3)
    async with world(fake) as w:
        await w.client.send("emails.welcome")
        assert await w.client.call("emails.count") == 3
        await w.client.send("emails.goodbye")
        await w.advance(days=1)
        assert [it.method for it in fake.received] == ["welcome"]
        assert [it.method for it in fake.calls] == ["count"]
        assert [letter.reason for letter in w.dead(fake)] == ["unknown_method"]
    async with running(FakeService("emails").answers("count", 3), url="memory://other") as client:
        with pytest.raises(SendError, match="no queue takes jobs of service 'emails'"):
            await client.send("emails.welcome")


@contract("emails", jobs=["welcome"])
class EmailsApi(Protocol):
    async def welcome(self, to: str, after: timedelta = timedelta()) -> None: ...
    async def count(self) -> int: ...


async def test_a_fake_of_a_contract_takes_its_jobs_with_their_types() -> None:
    fake = FakeService.of(EmailsApi).answers("count", 1)
    async with world(fake) as w:
        emails = w.client.bind(EmailsApi)
        job = await w.client.send(emails.welcome, "ada", timedelta(hours=1))
        assert await emails.count() == 1
        await w.client.send("emails.welcome", to=5)
        await w.settled()
        (received,) = fake.received
        assert (received.method, received.context.correlation_id) == ("welcome", job.id)
        assert received.params == {"to": "ada", "after": timedelta(hours=1)}
        assert [letter.reason for letter in w.dead(emails.welcome)] == ["invalid"]
    with pytest.raises(ConfigurationError, match=r"takes its jobs by itself: welcome; got \('goodbye',\)"):
        fake.takes("goodbye")


def test_what_a_fake_cannot_take_is_refused() -> None:
    fake = FakeService("emails").takes("welcome")
    with pytest.raises(ConfigurationError, match="different names; got 'welcome' twice"):
        fake.takes("welcome")
    with pytest.raises(ConfigurationError, match="the name of a job must be 1 to 100"):
        fake.takes("emails.goodbye")


# Where it runs.


async def test_a_world_is_in_this_process_whatever_the_environment_names(
    monkeypatch: pytest.MonkeyPatch, emails: Service
) -> None:
    monkeypatch.setenv("RPCQ_TEST_URL", "amqp://there.invalid/")
    async with world(emails) as w:
        await w.advance(hours=1)
    with pytest.raises(ConfigurationError, match=r"must be memory://, .*cannot be moved; got amqp://u:\*+@there"):
        async with world(emails, url="amqp://u:secret@there.invalid/"):
            pass


async def test_a_world_needs_a_broker_that_nobody_uses(emails: Service) -> None:
    async with running(url="memory://one"):
        with pytest.raises(UsageError, match="only before a client or worker opens it"):
            async with world(emails, url="memory://one"):
                pass
    async with world(emails, url="memory://one"), Client("memory://one"):
        pass


async def test_two_worlds_have_two_times() -> None:
    async with world() as one, world() as two:
        began = two.now
        await one.advance(days=1)
        assert two.now == began


async def test_a_world_leaves_no_task_and_no_thread_that_waits(emails: Service) -> None:
    before, threads = asyncio.all_tasks(), threading.active_count()
    async with world(emails) as w:
        await w.client.send("emails.digest")
        await w.advance(hours=1)
        await w.kill_worker()
        await w.start_worker()
    assert asyncio.all_tasks() == before
    assert threading.active_count() == threads


TEST = """
    import pytest
    from rpcq import Client, Service

    emails = Service("emails")
    sent = []

    @emails.job
    async def welcome(to: str) -> None:
        sent.append(to)

    async def test_the_fixture(rpcq_world, rpcq_running):
        async with rpcq_world(emails) as w, Client() as client:
            await client.send(welcome, to="ada")
            await w.settled()
        assert sent == ["ada"]
"""


def test_code_that_opens_its_own_client_finds_the_world_of_the_fixture(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.setenv("RPCQ_TEST_URL", "amqp://there.invalid/")
    pytester.makepyfile(TEST)
    options = ["-p", "no:anyio", "-o", "asyncio_default_fixture_loop_scope=function", "-o", "asyncio_mode=auto"]
    pytester.runpytest_subprocess("-W", "error", *options).assert_outcomes(passed=1)


# Schedules.


async def test_a_schedule_follows_the_time_of_the_world() -> None:
    reports = Service("reports")
    seen: list[datetime | None] = []

    @reports.job(schedule=Cron("0 6 * * *", tz="Europe/Berlin", missed="all"))
    async def daily(context: Context) -> None:
        seen.append(context.due)

    async with world(reports) as w:
        begun = w.now
        await w.advance(days=3)
        assert len(seen) == 3
        assert all(due is not None and begun < due <= w.now for due in seen)
        await w.kill_worker()
        await w.advance(days=2)
        assert len(seen) == 3
        await w.start_worker()
        await w.settled()
        assert len(seen) == 5


async def test_a_schedule_of_a_second_is_due_each_second_of_the_world() -> None:
    reports = Service("reports")
    seen: list[datetime | None] = []

    @reports.job(schedule=Every(1, missed="all"))
    async def beat(context: Context) -> None:
        seen.append(context.due)

    async with world(reports) as w:
        await w.advance(minutes=15)
        assert len(seen) == 900
        assert len({*seen}) == 900

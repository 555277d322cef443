"""Jobs that are sent for later, and jobs that expire, on both transports."""

from __future__ import annotations

import asyncio
import secrets
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from rpcq import ConfigurationError, Context, SendError, Service, UsageError
from rpcq.wire.job_queues import JobTopology
from support.letters import letters
from support.places import Place, cut_memory


class Mail:
    """A service with a job, and when its handler ran."""

    def __init__(self) -> None:
        self.service = Service(f"s{secrets.token_hex(6)}")
        self.ran: asyncio.Queue[tuple[datetime, Context]] = asyncio.Queue()

        @self.service.job
        async def welcome(context: Context, to: str = "ada") -> None:
            self.ran.put_nowait((datetime.now(UTC), context))

        @self.service.job(at_most_once=True)
        async def charge() -> None: ...

        @self.service.method
        async def count() -> int:
            return 0

        self.welcome, self.charge = welcome, charge


@pytest.fixture
async def mail() -> Mail:
    return Mail()


async def test_a_delayed_job_runs_after_its_delay(home: Place, mail: Mail) -> None:
    async with home.client() as client, home.worker(mail.service):
        before = datetime.now(UTC)
        job = await client.with_options(delay=0.6).send(mail.welcome, to="bob")
        at, context = await mail.ran.get()
    assert job.due is not None
    assert before + timedelta(seconds=0.74) < job.due < datetime.now(UTC) + timedelta(seconds=0.76)
    assert context.due == job.due
    assert at >= job.due - timedelta(seconds=0.01), "RabbitMQ counts from when it got the job, in whole milliseconds"
    assert context.correlation_id == job.id


async def test_a_job_runs_at_a_time_and_without_a_delay_at_once(home: Place, mail: Mail) -> None:
    zone = datetime.now().astimezone().tzinfo
    async with home.client() as client, home.worker(mail.service):
        wanted = datetime.now(zone) + timedelta(seconds=0.5)
        job = await client.with_options(at=wanted).send(f"{mail.service.name}.welcome")
        at, _ = await mail.ran.get()
        assert job.due is not None
        assert wanted <= job.due < wanted + timedelta(seconds=0.26)
        assert at >= wanted - timedelta(seconds=0.01)
        assert (await client.with_options(delay=0).send(mail.welcome)).due is None
        _, context = await mail.ran.get()
    assert context.due is None


async def test_several_jobs_have_one_delay(home: Place, mail: Mail) -> None:
    async with home.client() as client, home.worker(mail.service):
        jobs = await client.with_options(delay=0.25).send_many(mail.welcome, [{"to": "a"}, {"to": "b"}])
        ran = {(await mail.ran.get())[1].correlation_id for _ in jobs}
    assert ran == {job.id for job in jobs}


async def test_a_job_that_expires_before_it_begins_is_a_dead_letter(home: Place, mail: Mail) -> None:
    async with home.client() as client:
        async with home.worker(mail.service):
            pass
        soon = datetime.now(UTC) + timedelta(seconds=0.05)
        job = await client.with_options(expires=soon).send(mail.welcome)
        await client.with_options(expires=60).send(mail.welcome)
        await asyncio.sleep(0.1)
        async with (
            home.worker(mail.service),
            letters(home.url, JobTopology(home.namespace).dead_queue(mail.service.name)) as dead,
        ):
            (letter,) = await dead.wait_for(1)
            _, context = await mail.ran.get()
    assert (letter.id, letter.headers["rpcq-dead-reason"], letter.headers["rpcq-executed"]) == (job.id, "expired", "no")
    assert context.correlation_id != job.id


async def test_where_nobody_has_declared_the_delays_the_sender_hears_of_it(namespace: str, mail: Mail) -> None:
    home = Place(f"memory://{namespace}", namespace, "quorum", cut_memory)
    async with home.client() as client:
        with pytest.raises(SendError, match="no queue takes jobs that are delayed: run `rpcq setup`") as caught:
            await client.with_options(delay=1).send(mail.welcome)
    assert caught.value.queued == "no"


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"delay": -1}, "delay must be a number of seconds from 0 to .* got -1"),
        ({"delay": 49 * 86400}, "48 days"),
        ({"delay": timedelta(seconds=1)}, "delay must be a number of seconds"),
        ({"delay": True}, "got True"),
        ({"at": datetime(2126, 1, 1)}, "at must have a time zone, as datetime.now.UTC. has"),  # noqa: DTZ001
        ({"at": 5}, "at must be a datetime with a time zone, and delay seconds; got 5"),
        ({"at": datetime(2126, 1, 1, tzinfo=UTC), "delay": 1}, "delay and at must not be given both"),
        ({"at": datetime(2126, 1, 1, tzinfo=UTC)}, r"at must be at most 48 days away; got 2126"),
        ({"at": datetime(2020, 1, 1, tzinfo=UTC)}, r"at must be in the future; got 2020-01-01 00:00:00\+00:00"),
        ({"expires": datetime(2126, 1, 1)}, "expires must have a time zone"),  # noqa: DTZ001
        ({"expires": 0}, "expires must be"),
        ({"expires": -1}, "expires must be"),
        ({"expires": datetime(2020, 1, 1, tzinfo=UTC)}, "expires must be after the job is due, and in the future"),
        ({"expires": 5, "delay": 10}, "expires must be after the job is due"),
    ],
)
async def test_a_time_that_is_none_is_refused_before_anything_is_sent(
    namespace: str, mail: Mail, options: Any, part: str
) -> None:
    home = Place(f"memory://{namespace}", namespace, "quorum", cut_memory)
    async with home.client() as client, home.worker(mail.service):
        with pytest.raises(ConfigurationError, match=part):
            await client.with_options(**options).send(mail.welcome)
    assert mail.ran.empty()


async def test_times_are_for_jobs_and_for_those_that_may_run_twice(namespace: str, mail: Mail) -> None:
    home = Place(f"memory://{namespace}", namespace, "quorum", cut_memory)
    async with home.client() as client, home.worker(mail.service):
        with pytest.raises(UsageError, match="runs at most once, and what is delayed may come twice"):
            await client.with_options(delay=1).send(mail.charge)
        await client.with_options(expires=60).send(mail.charge)
        with pytest.raises(
            UsageError, match="delay, at, expires, priority, order_key and watch are for send; got one for a call of"
        ):
            await client.with_options(delay=1).call(f"{mail.service.name}.count")
        with pytest.raises(UsageError, match="are for send"):
            await client.with_options(expires=1).service(mail.service.name).count()

"""Watched jobs, on both transports: how far they are, what they returned, how they failed."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from typing import Any, Protocol

import pydantic
import pytest

from rpcq import (
    Client,
    ClosedError,
    ConfigurationError,
    Context,
    GiveUp,
    Job,
    JobFailed,
    NoResult,
    Progress,
    Retry,
    RetryLater,
    SendError,
    Service,
    UsageError,
    WatchedJob,
    contract,
    sync,
)
from rpcq.transport.base import Message
from rpcq.wire.job_queues import JobTopology
from rpcq.wire.jobs import JobMessage, encode_job
from rpcq.wire.properties import Properties, encode
from rpcq.wire.watching import encode_told
from support.jobs import Done, dead_queue, settled
from support.letters import letters
from support.places import Place, lose

SOON = Retry(max_attempts=2, initial_backoff=0.01, max_backoff=0.01)
SECONDS = 20.0


class Picture(pydantic.BaseModel):
    path: str
    size: tuple[int, int]


async def steps_of(job: WatchedJob[Any]) -> list[Progress]:
    return [step async for step in job.progress(timeout=SECONDS)]


async def failure_of(job: WatchedJob[Any]) -> JobFailed:
    with pytest.raises(JobFailed) as caught:
        await job.result(timeout=SECONDS)
    assert caught.value.job_id == job.id
    return caught.value


# Done.


async def test_a_sender_that_watches_hears_how_far_its_job_is_and_gets_its_result(
    home: Place, service: Service
) -> None:
    heard = asyncio.Event()

    @service.job
    async def resize(context: Context, path: str) -> Picture:
        context.progress(3, 10, note="reading")
        await heard.wait()
        context.progress(10, 10, note="written")
        return Picture(path=path, size=(3, 4))

    async with home.client() as client, home.worker(service):
        job = await client.with_options(watch=True).send(resize, path="a.png")
        steps = []
        async for step in job.progress(timeout=SECONDS):
            steps.append(step)
            heard.set()
        picture = await job.result(timeout=SECONDS)
        assert client.counts()["watched_jobs"] == 0
        assert await job.result(timeout=1) == picture  # it may be asked again
    assert picture == Picture(path="a.png", size=(3, 4))
    assert steps == [
        Progress(state="running", attempt=1, done=3, total=10, note="reading"),
        Progress(state="running", attempt=1, done=10, total=10, note="written"),
    ]


async def test_many_reports_of_a_thread_become_few_messages_and_the_last_one_comes_before_the_result(
    home: Place, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rpcq.jobs.telling.INTERVAL", 0.05)
    took: list[float] = []

    @service.job
    def count(context: Context, most: int) -> int:
        began = asyncio.run(_now())
        for number in range(1, most + 1):
            context.progress(number, most)
        took.append(asyncio.run(_now()) - began)
        return most

    async with home.client() as client, home.worker(service):
        job = await client.with_options(watch=True).send(count, most=50_000)
        steps = await steps_of(job)
        assert await job.result(timeout=SECONDS) == 50_000
        assert job._watch._number <= took[0] / 0.05 + 2  # as many as were sent
    assert steps[-1] == Progress(state="running", attempt=1, done=50_000, total=50_000)
    said = [step.done or 0 for step in steps]  # the first may be told before the thread has begun
    assert said == sorted(said)


async def _now() -> float:
    return asyncio.get_running_loop().time()


async def test_a_slow_reader_gets_the_newest_step_and_a_late_one_the_last(
    home: Place, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rpcq.jobs.telling.INTERVAL", 0.001)
    go_on = asyncio.Event()

    @service.job
    async def count(context: Context) -> None:
        context.progress(0)
        await go_on.wait()
        for number in range(20):
            context.progress(number)
            await asyncio.sleep(0.01)

    async with home.client() as client, home.worker(service):
        job = await client.with_options(watch=True).send(count)
        reading = job.progress(timeout=SECONDS)
        assert (await anext(reading)).done == 0
        go_on.set()
        assert await job.result(timeout=SECONDS) is None
        assert job._watch.version > 5
        assert [step.done async for step in reading] == [19]
        assert [step.done for step in await steps_of(job)] == [19]


async def test_each_job_of_a_send_many_is_watched_by_itself(home: Place, service: Service) -> None:
    @service.job
    async def double(x: int) -> int:
        return 2 * x

    async with home.client() as client, home.worker(service):
        jobs = await client.with_options(watch=True).send_many(double, [{"x": x} for x in range(50)])
        assert await asyncio.gather(*(job.result(timeout=SECONDS) for job in jobs)) == [2 * x for x in range(50)]
        by_name = client.with_options(watch=True, returns=Picture)
        assert isinstance(await by_name.send(f"{service.name}.double", x=1), WatchedJob)


async def test_the_type_of_a_result_is_that_of_the_function_the_contract_or_the_options(
    home: Place, service: Service
) -> None:
    @contract(service.name, jobs=["look"])
    class Api(Protocol):
        async def look(self, path: str) -> Picture: ...

    @service.job
    async def look(path: str) -> Picture:
        return Picture(path=path, size=(1, 2))

    expected = Picture(path="a", size=(1, 2))
    async with home.client() as client, home.worker(service):
        watching = client.with_options(watch=True)
        name = f"{service.name}.look"
        assert await (await watching.send(client.bind(Api).look, path="a")).result(timeout=SECONDS) == expected
        assert await (await watching.send(name, path="a")).result(timeout=SECONDS) == {"path": "a", "size": [1, 2]}
        typed = watching.with_options(returns=Picture)
        assert await (await typed.send(name, path="a")).result(timeout=SECONDS) == expected
        wrong = await watching.with_options(returns=int).send(name, path="a")
        with pytest.raises(NoResult, match="what does not fit") as caught:
            await wrong.result(timeout=SECONDS)
    assert (caught.value.reason, caught.value.job_id) == ("unreadable", wrong.id)


async def test_a_delayed_job_is_watched_too(home: Place, service: Service) -> None:
    @service.job
    async def add(x: int, y: int) -> int:
        return x + y

    async with home.client() as client, home.worker(service):
        job = await client.with_options(watch=True, delay=0.5).send(add, 1, 2)
        with pytest.raises(TimeoutError, match="no worker has told of it, and it goes on"):
            await job.result(timeout=0.05)
        assert await job.result(timeout=SECONDS) == 3


async def test_a_program_that_blocks_watches_too(home: Place, service: Service) -> None:
    heard = threading.Event()

    @service.job
    def resize(context: Context, path: str) -> str:
        context.progress(1, 2)
        assert heard.wait(SECONDS)
        return path.upper()

    @service.job(retry=None)
    async def broken() -> None:
        raise ValueError("no")

    def block() -> tuple[list[float | None], str]:
        with sync.Client(home.url, namespace=home.namespace) as client:
            watching = client.with_options(watch=True)
            job = watching.send(resize, path="a")
            assert isinstance(job, sync.WatchedJob)
            done = []
            for step in job.progress(timeout=SECONDS):
                done.append(step.done)
                heard.set()
            failed = watching.send(broken)
            with pytest.raises(JobFailed, match="reason=attempts, executed=yes, attempts=1"):
                failed.result(timeout=SECONDS)
            with pytest.raises(ConfigurationError, match="timeout must be a number of seconds above 0; got 0"):
                failed.result(timeout=0)
            late = watching.with_options(delay=60).send(resize, path="b")
            with pytest.raises(TimeoutError):
                late.result(timeout=0.01)
            with pytest.raises(TimeoutError):
                next(late.progress(timeout=0.01))
            found = job.result(timeout=SECONDS)
        with pytest.raises(ClosedError):
            late.result(timeout=1)
        return done, found

    if home.url.startswith("memory:"):
        # The in-process broker is in the event loop that all blocking clients share.
        from rpcq.runtime import blocking

        def serve() -> tuple[list[float | None], str]:
            loop = blocking.shared_loop()
            worker = asyncio.run_coroutine_threadsafe(_started(home, service), loop).result(SECONDS)
            try:
                return block()
            finally:
                asyncio.run_coroutine_threadsafe(worker.stop(), loop).result(SECONDS)

        done, found = await asyncio.to_thread(serve)
    else:
        async with home.worker(service):
            done, found = await asyncio.to_thread(block)
    assert (done, found) == ([1], "A")


async def _started(home: Place, service: Service) -> Any:
    worker = home.worker(service)
    await worker.start()
    return worker


# Retried, dead.


async def test_a_watcher_hears_of_a_failed_attempt_and_when_the_next_one_comes_but_no_text_of_an_exception(
    home: Place, service: Service
) -> None:
    @service.job(retry=SOON)
    async def flaky(context: Context) -> int:
        context.progress(5, note=f"attempt {context.attempt}")
        if context.attempt == 1:
            raise ValueError("the password is 1234")
        return context.attempt

    async with home.client() as client, home.worker(service):
        job = await client.with_options(watch=True).send(flaky)
        steps = await steps_of(job)
        assert await job.result(timeout=SECONDS) == 2
    waiting = next(step for step in steps if step.state == "waiting")
    assert (waiting.attempt, waiting.reason, waiting.error) == (2, "failed", f"{service.name}.flaky failed")
    assert len(waiting.incident) == 12
    assert waiting.due is not None
    assert steps[-1] == Progress(state="running", attempt=2, done=5, note="attempt 2")
    assert "1234" not in repr(steps)


async def test_a_watcher_hears_that_a_job_is_put_off(home: Place, service: Service) -> None:
    @service.job(retry=SOON)
    async def later(context: Context) -> int:
        if context.attempt == 1:
            raise RetryLater(0.2)
        return context.attempt

    async with home.client() as client, home.worker(service):
        job = await client.with_options(watch=True).send(later)
        (waiting, *_) = await steps_of(job)
        assert await job.result(timeout=SECONDS) == 2
    assert (waiting.state, waiting.reason, waiting.error) == ("waiting", "retry_later", "RetryLater: again in 0.2 s")


@pytest.mark.parametrize(
    ("how", "reason", "executed", "attempts", "said"),
    [
        ("raises", "attempts", "yes", 2, "failed in its last attempt"),
        ("gives_up", "gave_up", "yes", 1, "the address bounced"),
        ("is_slow", "attempts", "yes", 2, "it timed out after 0"),
        ("takes", "invalid", "no", 0, "x"),
        ("expires", "expired", "no", 0, "it expired"),
    ],
)
async def test_a_watcher_hears_why_its_job_is_dead(
    home: Place, service: Service, how: str, reason: str, executed: str, attempts: int, said: str
) -> None:
    @service.job(retry=SOON)
    async def raises() -> None:
        raise ValueError("the password is 1234")

    @service.job
    async def gives_up() -> None:
        raise GiveUp("the address bounced")

    @service.job(retry=SOON, timeout=0.05)
    async def is_slow() -> None:
        await asyncio.sleep(60)

    @service.job
    async def takes(x: int) -> None: ...

    @service.job
    async def expires() -> None: ...

    async with home.client() as client:
        async with home.worker(service):
            pass  # it declares the queue
        watching = client.with_options(watch=True)
        if how == "expires":
            watching = watching.with_options(expires=0.01)
        job = await watching.send(f"{service.name}.{how}")
        await asyncio.sleep(0.02)
        async with home.worker(service):
            failed = await failure_of(job)
            async with letters(home.url, dead_queue(home, service)) as dead:
                (letter,) = await dead.wait_for(1)
    assert (failed.reason, failed.executed, failed.attempts) == (reason, executed, attempts)
    assert (letter.headers["rpcq-dead-reason"], letter.headers["rpcq-executed"]) == (reason, executed)
    assert letter.headers.get("rpcq-incident") == failed.incident
    assert letter.properties.reply_to is None
    assert said in failed.message
    assert "1234" not in str(failed)


async def test_a_watcher_hears_of_a_job_that_no_worker_knows(
    home: Place, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rpcq.jobs.outcomes.UNKNOWN_PAUSES", (0.25,))

    @service.job
    async def known() -> None: ...

    async with home.client() as client, home.worker(service):
        job = await client.with_options(watch=True).send(f"{service.name}.unknown")
        (waiting,) = await steps_of(job)
        failed = await failure_of(job)
    assert (waiting.state, waiting.reason, waiting.attempt) == ("waiting", "unknown_method", 1)
    assert (failed.reason, failed.executed, failed.attempts) == ("unknown_method", "no", 0)


async def test_a_job_whose_key_is_done_is_done_and_its_watcher_is_told_that_there_is_no_result(
    home: Place, service: Service, done: Done
) -> None:
    @service.job
    async def work() -> int:
        return done.note("run")

    async with home.client() as client, home.worker(service):
        watching = client.with_options(watch=True, idempotency_key="k")
        assert await (await watching.send(work)).result(timeout=SECONDS) == 1
        again = await watching.send(work)
        with pytest.raises(NoResult, match="a job with its key is done already") as caught:
            await again.result(timeout=SECONDS)
    assert (caught.value.reason, done.counts["run"]) == ("done_already", 1)


@pytest.mark.parametrize("what", ["too large", "of another type", "no JSON"])
async def test_a_job_whose_result_cannot_be_sent_is_done_all_the_same(
    home: Place, service: Service, done: Done, what: str
) -> None:
    @service.job
    async def work() -> str:
        done.note("run")
        return "x" * 5000 if what == "too large" else object()  # type: ignore[return-value]  # that is the test

    @service.job
    async def untyped():  # type: ignore[no-untyped-def]  # that is the test
        done.note("run")
        return object()

    async with home.client() as client, home.worker(service, max_body=4000) as worker:
        job = await client.with_options(watch=True).send(untyped if what == "no JSON" else work)
        with pytest.raises(NoResult, match="the job is done, and there is no result") as caught:
            await job.result(timeout=SECONDS)
        await settled(worker)
        assert worker._jobs is not None
        assert (worker._jobs.finished, worker._jobs.dead, worker._jobs.retried) == (1, 0, 0)
    assert (caught.value.reason, done.counts["run"]) == ("invalid_result", 1)


async def test_a_result_over_the_limit_of_its_sender_is_told_so(home: Place, service: Service) -> None:
    @service.job
    async def work() -> str:
        return "x" * 5000

    async with home.client(max_body=4000) as client, home.worker(service):
        job = await client.with_options(watch=True).send(work)
        with pytest.raises(NoResult, match="over the limit") as caught:
            await job.result(timeout=SECONDS)
    assert caught.value.reason == "unreadable"


# Workers and senders that go.


async def test_the_watcher_of_a_job_whose_worker_is_lost_hears_of_the_next_run_and_gets_its_result(
    home: Place, service: Service, done: Done
) -> None:
    @service.job
    async def work(context: Context) -> int:
        run = done.note("run")
        context.progress(run, note="begun")
        if run == 1:
            await asyncio.sleep(60)
        return run

    async with home.client() as client:
        worker = home.worker(service, grace=0.05)
        await worker.start()
        job = await client.with_options(watch=True).send(work)
        reading = job.progress(timeout=SECONDS)
        assert (await anext(reading)).done == 1
        await lose(worker)
        async with home.worker(service):
            assert [step.done async for step in reading] == [2]
            assert await job.result(timeout=SECONDS) == 2


async def test_when_the_session_that_listens_is_lost_the_end_of_a_job_is_not_known(
    home: Place, service: Service, done: Done
) -> None:
    go_on = asyncio.Event()

    @service.job
    async def work() -> None:
        done.note("run")
        await go_on.wait()
        done.note("done")

    async with home.client() as client, home.worker(service) as worker:
        job = await client.with_options(watch=True).send(work)
        await done.until(lambda counts: counts["run"] == 1)
        waiting = asyncio.create_task(failure_of(job))
        await asyncio.sleep(0)
        await home.cut(client)
        failed = await waiting
        assert (failed.reason, failed.executed) == ("session_lost", "maybe")
        assert await steps_of(job) in ([], [Progress(state="running", attempt=1)])
        go_on.set()
        await done.until(lambda counts: counts["done"] >= 1)
        await settled(worker)
        assert client.counts()["watched_jobs"] == 0
        again = await client.with_options(watch=True).send(work)  # over the next session
        assert await again.result(timeout=SECONDS) is None


async def test_a_watcher_that_is_gone_costs_its_job_nothing(home: Place, service: Service, done: Done) -> None:
    @service.job(retry=SOON)
    async def work(context: Context) -> str:
        context.progress(1)
        if context.attempt == 1:
            raise ValueError("once")
        done.note("done")
        return "heard by nobody"

    async with home.client():  # keeps the in-process broker
        async with home.client() as client:
            async with home.worker(service):
                pass
            await client.with_options(watch=True).send(work)
        async with home.worker(service) as worker:
            await done.until(lambda counts: counts["done"] == 1)
            await settled(worker)
            assert worker.counts()["unroutable_replies"] == 0


async def test_cancelling_the_wait_for_a_result_leaves_the_job_alone(home: Place, service: Service) -> None:
    go_on = asyncio.Event()

    @service.job
    async def work() -> int:
        await go_on.wait()
        return 5

    async with home.client() as client, home.worker(service):
        job = await client.with_options(watch=True).send(work)
        waiting = [asyncio.create_task(job.result(timeout=SECONDS)) for _ in range(2)]
        await asyncio.sleep(0.01)
        waiting[0].cancel()
        go_on.set()
        assert await waiting[1] == 5
        assert waiting[0].cancelled()


async def test_a_client_that_closes_ends_the_waits_and_keeps_what_it_knows(home: Place, service: Service) -> None:
    @service.job
    async def work(seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    async with home.worker(service, grace=0.05):
        async with home.client() as client:
            watching = client.with_options(watch=True)
            known, unknown = await watching.send(work, 0), await watching.send(work, 60)
            assert await known.result(timeout=SECONDS) == 0
            waiting = asyncio.create_task(unknown.result(timeout=SECONDS))
            await asyncio.sleep(0)
        with pytest.raises(ClosedError, match="work goes on unheard"):
            await waiting
        assert await known.result(timeout=1) == 0
        assert all(step.state == "running" for step in await steps_of(unknown))


async def test_a_job_that_nobody_refers_to_is_forgotten(home: Place, service: Service, done: Done) -> None:
    @service.job
    async def work(context: Context) -> None:
        context.progress(1)
        done.note("run")

    async with home.client() as client, home.worker(service) as worker:
        for _ in range(20):
            await client.with_options(watch=True).send(work)
        gc.collect()
        assert client.counts()["watched_jobs"] == 0
        await done.until(lambda counts: counts["run"] == 20)
        await settled(worker)
        await client.wait_for_service(service.name)  # what was told has come
        assert client.unmatched_replies == 0


# What is refused.


async def test_a_job_that_is_not_watched_says_how_to_watch_it(home: Place, service: Service) -> None:
    @service.job
    async def work() -> None: ...

    async with home.client() as client, home.worker(service):
        job: Any = await client.send(work)
        assert type(job) is Job
        for ask in (job.result, job.progress):
            with pytest.raises(UsageError, match=r"is not watched: send it by client.with_options\(watch=True\).send"):
                ask(timeout=5)


async def test_more_watched_jobs_than_the_limit_are_refused_before_they_are_sent(
    home: Place, service: Service, done: Done
) -> None:
    @service.job
    async def work() -> None:
        done.note("run")
        await asyncio.sleep(60)

    async with home.client(max_in_flight=2) as client, home.worker(service, grace=0.05):
        watching = client.with_options(watch=True)
        kept = [await watching.send(work) for _ in range(2)]
        with pytest.raises(SendError, match="2 jobs are watched already") as caught:
            await watching.send(work)
        assert caught.value.queued == "no"
        await client.send(work)  # one that is not watched
        await done.until(lambda counts: counts["run"] == 3)
        assert len(kept) == client.counts()["watched_jobs"]


async def test_what_a_handler_reports_is_checked_whether_somebody_watches_or_not(home: Place, service: Service) -> None:
    problems: list[str] = []

    def report(context: Context) -> None:
        wrong: Any
        for wrong in (("3",), (-1,), (True,), (float("nan"),), (1, -1), (1, "2"), (1, None, 5), (1, None, "x" * 1001)):
            with pytest.raises(ConfigurationError) as caught:
                context.progress(*wrong)
            problems.append(str(caught.value))
        context.progress(0, 0, "")
        context.progress(5, 3)  # an estimate may be wrong

    @service.job
    async def work(context: Context) -> None:
        report(context)

    @service.method
    async def call(context: Context) -> str:
        report(context)
        return "ran"

    async with home.client() as client, home.worker(service) as worker:
        await (await client.with_options(watch=True).send(work)).result(timeout=SECONDS)
        await client.send(work)
        assert await client.call(f"{service.name}.call") == "ran"
        await settled(worker)
    assert len(problems) == 24
    assert problems[0] == "done must be a number of at least 0; got '3'"
    assert problems[5] == "total must be a number of at least 0; got '2'"
    assert problems[6] == "note must be a string of at most 1000 bytes; got 5"


async def test_a_worker_runs_a_job_whose_watcher_it_does_not_reply_to(
    home: Place, service: Service, done: Done
) -> None:
    @service.job
    async def work(context: Context) -> str:
        context.progress(1)
        done.note(context.correlation_id)
        return "told to nobody"

    topology = JobTopology(home.namespace)
    async with home.client() as client, home.worker(service) as worker:
        await client.send(work)  # the exchange is there
        job = JobMessage(
            id="seven", name="work", body=b"{}", key="seven", reply_to=topology.queue(service.name).name.encode()
        )
        await published(client, topology.jobs.name, service.name, encode_job(job, 0), job.body)
        await done.until(lambda counts: counts["seven"] == 1)
        await settled(worker)
        assert set(done.counts.values()) == {1}  # neither told to the queue of jobs, nor run again


async def published(client: Client, exchange: str, key: str, properties: bytes, body: bytes) -> None:
    """Publish what a hostile or foreign program may publish, and wait until the broker has it."""
    confirmed: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    message = Message(exchange.encode(), key.encode(), b"c", properties, body, confirmed.set_result, mandatory=False)
    client._transport.publish(message)
    await confirmed


async def test_what_a_stranger_sends_to_the_reply_queue_ends_no_watched_job(home: Place, service: Service) -> None:
    go_on = asyncio.Event()

    @service.job
    async def work() -> str:
        await go_on.wait()
        return "true"

    async with home.client() as client, home.worker(service):
        job = await client.with_options(watch=True).send(work)
        queue = (await client._sender.reply_queue()).decode()
        before = client.unmatched_replies
        guess = job.id[:-1] + ("0" if job.id[-1] != "0" else "1")
        for kind, body in ((b"result", b'"forged"'), (b"error", b'{"code": "gave_up", "executed": "no"}')):
            await published(client, "", queue, encode_told(kind, guess.encode()), body)
        # With the ID, but nothing that a worker of rpcq would tell.
        for kind, body in (
            (b"progress", b"[]"),
            (b"progress", b'{"state": "dead", "run": "r", "number": 1}'),
            (b"progress", b'{"state": "running", "run": 5, "number": 1}'),
            (b"progress", b"{"),
            (b"error", b"5"),
            (b"error", b"{}"),
        ):
            await published(client, "", queue, encode_told(kind, job.id.encode()), body)
        odd = Properties(content_type=b"application/json", correlation_id=job.id.encode(), type=b"odd")
        await published(client, "", queue, encode(odd), b"{}")
        await client.wait_for_service(service.name)
        assert client.unmatched_replies == before + 2
        assert client.counts()["watched_jobs"] == 1
        go_on.set()
        assert await job.result(timeout=SECONDS) == "true"


async def test_a_job_that_nobody_watches_runs_through_no_code_that_tells(home: Place, service: Service) -> None:
    import cProfile
    import pstats

    began: asyncio.Queue[None] = asyncio.Queue()

    @service.job
    async def work(context: Context) -> None:
        context.progress(1)
        began.put_nowait(None)

    async with home.client() as client, home.worker(service) as worker:

        async def ran_through(send: Callable[..., Any]) -> set[str]:
            with cProfile.Profile() as profile:
                await send(work)
                await began.get()
                await settled(worker)
            stats: Any = pstats.Stats(profile)
            return {name for file, _, name in stats.stats if file.endswith("telling.py") or "/rpcq/watching/" in file}

        await client.send(work)
        await began.get()
        await settled(worker)
        assert await ran_through(client.send) == set()
        assert {"watched", "begins", "done"} <= await ran_through(client.with_options(watch=True).send)

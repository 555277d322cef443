"""What is known of a watched job, whatever comes in whatever order."""

from __future__ import annotations

import asyncio

import pytest

from rpcq.errors import JobFailed, RpcqError, SendError, UsageError
from rpcq.watching import Watch, Watches, watches
from rpcq.wire.replies import ERROR, RESULT, Reply
from rpcq.wire.watching import PROGRESS, Failure, Progress, Told, write_failure, write_progress


def told(run: str, number: int, done: float = 0) -> Told:
    return Told(Progress(state="running", attempt=1, done=done), run, number)


def reply(kind: bytes, body: bytes, job_id: str = "7") -> Reply:
    return Reply(job_id.encode(), kind, body)


@pytest.fixture
async def table() -> Watches:
    return Watches(3)


async def test_what_is_told_late_or_twice_is_dropped() -> None:
    watch = Watch("things.work", "7")
    seen = []
    for run, number in (
        ("a", 2),
        ("a", 1),
        ("a", 2),
        ("a", 3),
        ("b", 1),
        ("a", 4),
        ("b", 1),
        ("c", 5),
        ("b", 2),
        ("c", 6),
    ):
        version = watch.version
        watch.update(told(run, number))
        seen.append(watch.version > version)
    assert seen == [True, False, False, True, True, False, False, True, False, True]


async def test_the_runs_that_are_remembered_are_bounded() -> None:
    watch = Watch("things.work", "7")
    for number in range(1000):
        watch.update(told(f"r{number}", 1))
    assert watch.version == 1000
    assert len(watch._earlier) == watches.REMEMBERED_RUNS


async def test_an_end_comes_once_and_nothing_is_told_after_it(table: Watches) -> None:
    watch = table.add("things.work", "7")
    assert table.take(reply(RESULT, b"5"))
    for late in (
        reply(RESULT, b"6"),
        reply(ERROR, write_failure(Failure("gave_up", "no", "yes", 1))),
        reply(PROGRESS, write_progress(told("a", 1))),
    ):
        assert table.take(late)  # of a job of this client, and dropped
    table.lost("cut")
    table.close()
    assert (await watch.end(1)).body == b"5"
    assert await watch.after(0) is None
    assert not table.take(reply(RESULT, b"5", "8"))


async def test_each_wait_gets_an_error_of_its_own(table: Watches) -> None:
    watch = table.add("things.work", "7")
    table.take(reply(ERROR, write_failure(Failure("gave_up", "it bounced", "yes", 2, "i1"))))
    caught: list[RpcqError] = []
    for _ in range(2):
        with pytest.raises(JobFailed) as error:
            await watch.end(1)
        caught.append(error.value)
    assert caught[0] is not caught[1]
    assert str(caught[0]) == "it bounced (reason=gave_up, executed=yes, attempts=2, incident=i1, job=7)"
    assert str(caught[1]) == str(caught[0])


@pytest.mark.parametrize(("state", "attempts"), [("running", 3), ("waiting", 2)])
async def test_a_lost_session_says_how_many_attempts_are_known(table: Watches, state: str, attempts: int) -> None:
    watch = table.add("things.work", "7")
    progress = Progress(state=state, attempt=3)  # type: ignore[arg-type]  # one of both
    table.take(reply(PROGRESS, write_progress(Told(progress, "a", 1))))
    table.lost("the connection was reset")
    with pytest.raises(JobFailed, match="goes on unheard: the connection was reset") as caught:
        await watch.end(1)
    assert (caught.value.attempts, caught.value.executed, caught.value.reason) == (attempts, "maybe", "session_lost")


async def test_the_table_is_bounded_and_forgets_what_nobody_has(
    table: Watches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watches, "REMEMBERED_JOBS", 5)
    kept = [table.add("things.work", str(number)) for number in range(3)]
    with pytest.raises(SendError, match="3 jobs are watched already"):
        table.add("things.work", "one more")
    del kept[0]
    kept.append(table.add("things.work", "3"))
    for number in range(10, 100):
        kept.pop()
        kept.append(table.add("things.work", str(number)))
    assert len(table) == 3
    assert len(table._over) == 5


async def test_a_wait_has_an_end_and_leaves_nothing_behind(table: Watches) -> None:
    watch = table.add("things.work", "7")
    with pytest.raises(TimeoutError, match=r"things.work had not ended within 0.01 s: no worker has told of it"):
        await watch.end(0.01)
    with pytest.raises(TimeoutError, match=r"nothing new was told of things.work in time"):
        await watch.after(0, 0.01)
    waiting = [asyncio.create_task(watch.after(0)) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    table.take(reply(PROGRESS, write_progress(told("a", 1, 5))))
    found = await asyncio.gather(*waiting[1:])
    assert found == [(1, Progress(state="running", attempt=1, done=5))] * 2
    assert watch._changed is None


def test_another_event_loop_is_refused() -> None:
    async def make() -> Watch:
        return Watch("things.work", "7")

    watch = asyncio.run(make())
    with pytest.raises(UsageError, match="belongs to the event loop of the client that sent it"):
        asyncio.run(watch.after(0))

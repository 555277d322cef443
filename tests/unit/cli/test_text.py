"""What the command shows of a hostile worker: nothing that it sends is markup for Rich, or obeyed by a terminal."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

import pytest

from rpcq import Client, DomainError, Service, Worker
from rpcq.control import Answerer, JobInfo, MethodInfo, ServiceInfo, WorkerInfo, WorkerStats
from support.command import Rpcq

HOSTILE = "[/none][bold]x[/] :bomb: \\ \x1b]0;title\x07\x9b2J\x7f\u202e\U000e0041\r\nfaked line\u2028"
SHOWN = r"[/none][bold]x[/] :bomb: \ \x1b]0;title\x07\x9b2J\x7f\u202e\U000e0041"
ESCAPED = rf"{SHOWN}\r\nfaked line\u2028"

INFO = WorkerInfo(
    name=HOSTILE,
    host=HOSTILE,
    pid=1,
    version=HOSTILE,
    prefetch=1,
    services=(
        ServiceInfo(
            "things",
            HOSTILE,
            HOSTILE,
            (MethodInfo(HOSTILE, HOSTILE, HOSTILE, idempotent=True, errors=(HOSTILE,)),),
            (JobInfo(HOSTILE, HOSTILE, 60, 8, HOSTILE),),
            HOSTILE,
        ),
        ServiceInfo(HOSTILE, HOSTILE, HOSTILE),
    ),
)
STATS = WorkerStats(HOSTILE, HOSTILE, 1, 0, 0, 0, 0, 0, 0, 0)


class Broken(DomainError):
    """Its text is the worker's."""


@pytest.fixture
async def hostile(rabbitmq_url: str, namespace: str) -> AsyncIterator[None]:
    """A worker that puts such a text wherever it may put one."""
    things = Service("things", errors=[Broken])

    @things.method
    async def tell() -> Any:
        return {HOSTILE: [HOSTILE]}

    @things.method
    async def fail() -> None:
        raise Broken(HOSTILE, details={HOSTILE: HOSTILE})

    worker = Worker(things, url=rabbitmq_url, namespace=namespace)
    worker._answerer = Answerer(
        worker._transport,
        INFO,
        lambda *_: STATS,
        takes=worker._intake.takes,
        cancel=worker._intake.cancel,
        is_reply_queue=worker._intake.is_reply_queue,
        reply_exchange=None,
        max_body=1024 * 1024,
    )
    async with worker:
        yield


async def ran(rpcq: Rpcq, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = await asyncio.to_thread(rpcq.run, *arguments, RPCQ_NAMESPACE=rpcq.namespace, COLUMNS="1000")
    assert done.returncode == code, done.stderr + done.stdout
    for output in (done.stdout, done.stderr):
        assert output.replace("\n", "").isprintable(), repr(output)
    return done


@pytest.mark.long
async def test_what_a_worker_says_of_itself_is_shown_as_it_is(rpcq: Rpcq, hostile: None) -> None:
    table = (await ran(rpcq, "list")).stdout
    assert table.count(ESCAPED) == 5  # a service, two queues, a method, a job
    described = (await ran(rpcq, "describe", "things")).stdout
    assert f"things  {ESCAPED} queue {ESCAPED}; jobs: queue {ESCAPED}\n" in described
    assert f"  {ESCAPED}{ESCAPED}\n      {SHOWN}\n      faked line\n      idempotent\n" in described
    assert f"      errors: {ESCAPED}\n" in described
    job = "job, at most 8 attempts; runs at most 60 s each time"
    assert f"  {ESCAPED}{ESCAPED}\n      {SHOWN}\n      faked line\n      {job}\n" in described
    assert f"  worker {ESCAPED} on {ESCAPED}, process 1: rpcq {ESCAPED}, prefetch 1, job prefetch 0\n" in described
    assert (await ran(rpcq, "ping", "things")).stdout.startswith(f"{ESCAPED} on {ESCAPED}, process 1: ")
    told = (await ran(rpcq, "queues", "--management", "")).stdout
    assert f"{rpcq.namespace}.req.things" in told
    assert "faked" not in told  # no service of rpcq has such a name
    told = (await ran(rpcq, "doctor", code=1)).stdout
    assert f"workers: 1, of {ESCAPED}, things\n" in told
    assert f"bad  the clocks of this machine and of {ESCAPED} (process 1) are " in told


async def test_json_has_the_same_values_with_escapes(rpcq: Rpcq, hostile: None) -> None:
    found = json.loads((await ran(rpcq, "list", "--json")).stdout)
    assert found == json.loads(json.dumps({"workers": [asdict(INFO)], "stats": [asdict(STATS)]}))
    assert json.loads((await ran(rpcq, "describe", "things", "--json")).stdout) == {"workers": found["workers"]}


async def test_a_result_and_an_error_are_shown_as_they_are(rpcq: Rpcq, hostile: None) -> None:
    assert json.loads((await ran(rpcq, "call", "things.tell")).stdout) == {HOSTILE: [HOSTILE]}
    assert json.loads((await ran(rpcq, "call", "things.tell", "--json")).stdout) == {"result": {HOSTILE: [HOSTILE]}}
    error = json.loads((await ran(rpcq, "call", "things.fail", "--json", code=1)).stdout)["error"]
    assert (error["message"], error["details"]) == (HOSTILE, {HOSTILE: HOSTILE})
    said = (await ran(rpcq, "call", "things.fail", code=1)).stderr
    assert said.startswith(
        f"RemoteError: broken: {SHOWN}\\r\nfaked line\\u2028 (executed=yes"
    )  # a message may have lines


@pytest.mark.parametrize("answer", [{"prefetch": 10**4000}, {"prefetch": -1}, {"pid": 1.5}, {"host": None}])
def test_an_answer_that_cannot_be_shown_is_dropped(answer: dict[str, Any]) -> None:
    control = Client("memory://")._control
    assert control.read(WorkerInfo, json.dumps(asdict(INFO)).encode()) == INFO
    assert control.read(WorkerInfo, json.dumps({**asdict(INFO), **answer}).encode()) is None


def test_an_answer_with_numbers_that_json_does_not_have_is_dropped() -> None:
    for number in ("NaN", "Infinity", "1e999"):
        answer = json.dumps({**asdict(STATS), "time_ms": "here"}).replace('"here"', number)
        assert Client("memory://")._control.read(WorkerStats, answer.encode()) is None

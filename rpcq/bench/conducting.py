"""Conducts a load test: starts target and generators, watches the queue, and merges the measurements."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from rpcq.bench.echo import METHOD, NonceRecord, echo_service, read_nonces
from rpcq.bench.merging import merge_run, merge_tallies
from rpcq.bench.plan import Plan
from rpcq.bench.processes import RunningGenerator, running, running_generator
from rpcq.bench.recording import Tally
from rpcq.bench.result import Run
from rpcq.client import Client
from rpcq.errors import BrokerError, RpcqError
from rpcq.options import ClientOptions
from rpcq.runtime.process import own_version
from rpcq.transport.memory.broker import MemoryBroker
from rpcq.transport.rabbitmq.admin import Admin, open_admin
from rpcq.url import parse
from rpcq.wire.job_queues import JobTopology
from rpcq.wire.topology import Topology
from rpcq.worker import Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTest:
    """A load test: what the generators do, and how the built-in echo is served if it is the target.

    Attributes:
        plan: the plan of all generators together, also for `in_flight`. If the target is the built-in echo (`checks`),
            each run gives it another name.
        workers: processes of the built-in echo.
        prefetch: prefetch limit of each of them, for calls or for jobs.
        simulate: seconds that the handler of the built-in echo takes.
        queue_type: type of its request queue; queues of jobs are always quorum queues.

    """

    plan: Plan
    workers: int = 1
    prefetch: int = 100
    simulate: float = 0.0
    queue_type: Literal["classic", "quorum"] = "classic"

    @property
    def in_memory(self) -> bool:
        """Whether everything runs in this process."""
        return self.plan.url.startswith("memory:")


class Conductor:
    """Makes one run of a load test.

    Args:
        test: the test.
        on_second: called after each second with its number, the counts of all generators together, and the depth of
            the queue.

    """

    def __init__(self, test: LoadTest, on_second: Callable[[int, Tally, int | None], None]) -> None:
        plan = test.plan
        self._test = test
        self._plan = replace(plan, target=f"bench-{secrets.token_hex(4)}.{METHOD}") if plan.checks else plan
        self._on_second = on_second
        self._service = self._plan.target.rpartition(".")[0]
        self._depths: dict[int, int] = {}
        self._tallies: dict[int, list[Tally]] = {}  # second -> those of the generators that reported it
        self._began = 0.0  # when measuring began, on time.time()
        self._generators: list[RunningGenerator] = []
        self.interrupted = False

    def stop(self) -> None:
        """End the run early; `run` then returns what was measured until now."""
        self.interrupted = True
        for generator in self._generators:
            generator.stop()

    async def run(self) -> Run:
        """Start workers and generators, measure, and stop them.

        Raises:
            RpcqError: the broker or the target cannot be used.

        """
        plan = self._plan
        async with AsyncExitStack() as stack:
            # The broker of memory:// exists only while a client or a worker is open: open the worker first.
            stop_echo = await stack.enter_async_context(self._serve_echo()) if plan.checks else None
            if stop_echo is None:
                await self._wait_for_service()
            plans = [
                replace(plan, number=number, in_flight=max(1, plan.in_flight // plan.processes))
                for number in range(plan.processes)
            ]
            self._generators = [await stack.enter_async_context(running_generator(it)) for it in plans]
            if self.interrupted:
                self.stop()
            self._began = time.time() + plan.warm_up
            watching = asyncio.create_task(self._watch_depth())
            try:
                found = await asyncio.gather(*(it.measure(self._add_second) for it in self._generators))
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
            nonces = await stop_echo() if stop_echo is not None else None
        return merge_run(plan, found, nonces, self._depths)

    # The target.

    @asynccontextmanager
    async def _serve_echo(self) -> AsyncIterator[Callable[[], Awaitable[NonceRecord]]]:
        """Serve the built-in echo; yields a function that stops it and returns the nonces that its handlers saw."""
        test, plan = self._test, self._plan
        async with AsyncExitStack() as stack:
            if test.in_memory:
                service, nonces = echo_service(self._service, test.queue_type, test.simulate, is_job=plan.is_job)
                worker = Worker(
                    service,
                    url=plan.url,
                    namespace=plan.namespace,
                    prefetch=test.prefetch,
                    job_prefetch=test.prefetch,
                )
                await stack.enter_async_context(worker)

                async def stop_worker() -> NonceRecord:
                    return nonces

                yield stop_worker
                return
            settings = {
                "url": plan.url,
                "namespace": plan.namespace,
                "service": self._service,
                "queue_type": test.queue_type,
                "simulate": test.simulate,
                "prefetch": test.prefetch,
                "is_job": plan.is_job,
            }
            stack.push_async_callback(self._delete_queues)
            processes = [await stack.enter_async_context(running("rpcq.bench.echo")) for _ in range(test.workers)]
            for process in processes:
                process.send(json.dumps(settings).encode())
            for process in processes:
                await process.read("ready")

            async def stop_workers() -> NonceRecord:
                for process in processes:
                    process.close()
                return NonceRecord().merge([read_nonces(await process.read()) for process in processes])

            yield stop_workers

    async def _delete_queues(self) -> None:
        """Delete the queues of the built-in echo. What all services of the namespace share stays."""
        if self._plan.is_job:
            jobs = JobTopology(self._plan.namespace)
            queues = [it.name for it in jobs.queues(self._service, lanes=False, ordered=False)]
        else:
            topology = Topology(self._plan.namespace)
            queues = [topology.request_queue(self._service, self._test.queue_type, None).name]
        async with self._admin() as admin:
            await admin.delete(queues=queues)

    async def _wait_for_service(self) -> None:
        async with Client(self._plan.url, namespace=self._plan.namespace, name="rpcq-bench") as client:
            await client.wait_for_service(self._service, timeout=5.0)

    # Meanwhile.

    @asynccontextmanager
    async def _admin(self) -> AsyncIterator[Admin]:
        url, failure = parse(self._plan.url), None
        for host, port in url.hosts:
            try:
                async with open_admin(url, ClientOptions(namespace=self._plan.namespace), host, port) as admin:
                    yield admin
                    return
            except BrokerError as error:
                failure = error
        assert failure is not None  # noqa: S101 - a URL has a host
        raise failure

    async def _watch_depth(self) -> None:
        """Record once a second how many requests or jobs wait in the queue."""
        plan, queues = self._plan, self._queues()
        if self._test.in_memory:
            while (broker := MemoryBroker.named(parse(plan.url).hosts[0][0])) is not None:
                depths = [broker.depth(queue) for queue in queues if queue in broker.queues]
                if depths:
                    self._add_depth(sum(depths))
                await asyncio.sleep(1)
            return
        with suppress(RpcqError):  # the depth is optional: on an error, the report goes without it
            async with self._admin() as admin:
                while True:
                    states = [await admin.queue(queue) for queue in queues]
                    if any(states):
                        self._add_depth(sum(it.messages for it in states if it is not None))
                    await asyncio.sleep(1)

    def _queues(self) -> list[str]:
        """The queues in which the target's work waits: those that there may be."""
        if self._plan.is_job:
            # Without a priority and an order key, as they are sent here.
            jobs = JobTopology(self._plan.namespace)
            return [it.name for it in jobs.waiting(self._service, lanes=False, ordered=False)]
        topology = Topology(self._plan.namespace)
        kinds: tuple[Literal["classic", "quorum"], ...] = ("classic", "quorum")
        return [topology.request_queue(self._service, kind, None).name for kind in kinds]

    def _add_depth(self, depth: int) -> None:
        second = int(time.time() - self._began)
        if second >= 0:
            self._depths[second] = depth

    def _add_second(self, second: int, tally: Tally) -> None:
        tallies = self._tallies.setdefault(second, [])
        tallies.append(tally)
        if len(tallies) == len(self._generators):
            self._on_second(second, merge_tallies(tallies), self._depths.get(second))


async def host(url: str) -> dict[str, Any]:
    """Where a test runs: platform, processors, versions, and the broker."""
    broker = "in this process"
    if not url.startswith("memory:"):
        parsed, broker = parse(url), "unknown"
        with suppress(RpcqError):
            async with open_admin(parsed, ClientOptions(), *parsed.hosts[0]) as admin:
                broker = f"{admin.product} {admin.version}"
    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "rpcq": own_version(),
        "broker": broker,
    }

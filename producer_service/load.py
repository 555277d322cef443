"""Many concurrent calls of `echo.process`, with each reply checked, by the load generator of `rpcq bench`."""

from __future__ import annotations

from collections.abc import Callable

from consumer_service.contracts import EchoApi
from rpcq import Client
from rpcq.bench import Generator, Measured, Plan, Tally


async def send(
    client: Client,
    *,
    requests: int,
    concurrency: int,
    delay: float = 0.0,
    timeout: float = 30.0,  # noqa: ASYNC109 - for each call, not for this function
    on_answers: Callable[[int], None] = lambda _: None,
) -> Measured:
    """Make `requests` calls, up to `concurrency` at once; `on_answers` gets, each second, how many have ended."""
    echo = client.with_options(timeout=timeout).bind(EchoApi)

    async def ask(number: int) -> bool:
        message = f"request {number}"
        return await echo.process(message=message, delay=delay) == f"Consumer processed: {message}"

    def report(_: int, tally: Tally) -> None:
        on_answers(tally.ok + tally.failed)

    plan = Plan(target="echo.process", concurrency=concurrency, calls=requests, timeout=timeout, warm_up=0.0)
    return await Generator(plan, client, report, ask).run()

"""Many concurrent calls of `echo.process`, each answer checked: made and measured by what is behind `rpcq bench`."""

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
    timeout: float = 30.0,  # noqa: ASYNC109 - each call's, not this function's
    on_answers: Callable[[int], None] = lambda _: None,
) -> Measured:
    """Send `requests` calls, up to `concurrency` at once; `on_answers` is called each second, with how many ended."""
    echo = client.with_options(timeout=timeout).bind(EchoApi)

    async def ask(number: int) -> bool:
        message = f"request {number}"
        return await echo.process(message=message, delay=delay) == f"Consumer processed: {message}"

    def tell(_: int, tally: Tally) -> None:
        on_answers(tally.ok + tally.failed)

    plan = Plan(target="echo.process", concurrency=concurrency, calls=requests, timeout=timeout, warm_up=0.0)
    return await Generator(plan, client, tell, ask).run()

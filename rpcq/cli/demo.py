"""`rpcq demo`: what rpcq does, in half a minute, by default on the in-process broker."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.syntax import Syntax

from rpcq import logs
from rpcq.cli.options import Level, LogLevel, given
from rpcq.cli.text import plain
from rpcq.client import Client
from rpcq.errors import CallError, DomainError
from rpcq.runtime.process import run
from rpcq.service import Service
from rpcq.worker import Worker

SHOWN = """\
shop = Service("shop", errors=[OutOfStock])

@shop.method(idempotent=True)
async def price(article: str, count: int = 1) -> int:
    return 3 * count

@shop.method
async def order(article: str) -> str:
    raise OutOfStock(f"no {article} left")

@shop.method
async def ponder() -> None:
    await asyncio.sleep(60)
"""

console = Console(highlight=False)


class OutOfStock(DomainError):
    """An article is out of stock."""


def shop() -> Service:
    """The service of the demo."""
    service = Service("shop", errors=[OutOfStock])

    @service.method(idempotent=True)
    async def price(article: str, count: int = 1) -> int:
        del article
        return 3 * count

    @service.method
    async def order(article: str) -> str:
        raise OutOfStock(f"no {article} left")

    @service.method
    async def ponder() -> None:
        await asyncio.sleep(60)

    return service


def demo(
    url: Annotated[
        str, typer.Option(help="The broker to use. With RabbitMQ, the demo makes queues in the namespace rpcq-demo.")
    ] = "memory://",
    calls: Annotated[int, typer.Option(min=1, max=100_000, help="Concurrent calls to make.")] = 10_000,
    log_level: LogLevel = Level.ERROR,
) -> None:
    """Show what rpcq does: a service, thousands of calls at once, and the errors that callers get."""
    logs.configure(log_level.upper())
    run(_show(url, calls))


async def _show(url: str, calls: int) -> None:
    console.print(Syntax(SHOWN, "python", background_color="default"))
    options = given(namespace="rpcq-demo")
    async with Worker(shop(), url=url, **options), Client(url, **options) as client:
        await client.wait_for_service("shop")
        console.print('[bold]await client.call("shop.price", article="tea", count=2)[/]')
        console.print("   ", plain(await client.call("shop.price", article="tea", count=2)))
        console.print(f"[bold]{calls:,} calls at once, each with its own reply[/]")
        await _many(client, calls)
        for code, failing, why in (
            (
                'client.call("shop.price", article="tea", count="two")',
                client.call("shop.price", article="tea", count="two"),
                "the worker refused the call, and did not run it",
            ),
            (
                'client.with_options(errors=[OutOfStock]).call("shop.order", article="tea")',
                client.with_options(errors=(OutOfStock,)).call("shop.order", article="tea"),
                "the handler's own error, as the same class",
            ),
            (
                'client.with_options(timeout=0.5).call("shop.ponder")',
                client.with_options(timeout=0.5).call("shop.ponder"),
                "the handler ran, and was cancelled at the deadline",
            ),
            ('client.call("nobody.there")', client.call("nobody.there"), "reported at once: no worker serves it"),
        ):
            console.print(f"await {code}", style="bold", markup=False)
            try:
                await failing
            except CallError as error:
                shown = f"{type(error).__name__}, executed {error.executed!r}, retryable {error.retryable}"
                console.print(f"    {shown}: {why}", markup=False, soft_wrap=True)


async def _many(client: Client, calls: int) -> None:
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("calls", total=calls)

        async def one(count: int) -> bool:
            price = await client.with_options(timeout=60).call("shop.price", article="tea", count=count)
            progress.advance(bar)
            return bool(price == 3 * count)

        began = time.perf_counter()
        right = sum(await asyncio.gather(*(one(count) for count in range(calls))))
        took = time.perf_counter() - began
    console.print(f"    {right:,} of {calls:,} matched, {calls / took:,.0f} calls/s")

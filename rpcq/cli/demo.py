"""`rpcq demo`: what rpcq does, in half a minute, on the in-process broker."""

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
    """Nothing is left of an article."""


def shop() -> Service:
    """The service that is shown."""
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
        str, typer.Option(help="Where to show it; with a broker's URL, queues of the namespace rpcq-demo are made.")
    ] = "memory://",
    calls: Annotated[int, typer.Option(min=1, max=100_000, help="Concurrent calls to make.")] = 10_000,
    log_level: LogLevel = Level.ERROR,
) -> None:
    """Show what rpcq does: a service, calls by the thousand, and what callers get when things go wrong."""
    logs.configure(log_level.upper())
    run(_show(url, calls))


async def _show(url: str, calls: int) -> None:
    console.print(Syntax(SHOWN, "python", background_color="default"))
    options = given(namespace="rpcq-demo")
    async with Worker(shop(), url=url, **options), Client(url, **options) as client:
        await client.wait_for_service("shop")
        console.print('[bold]await client.call("shop.price", article="tea", count=2)[/]')
        console.print("   ", plain(await client.call("shop.price", article="tea", count=2)))
        console.print(f"[bold]{calls:,} calls at once, each with its own answer[/]")
        await _many(client, calls)
        for code, failing, why in (
            (
                'client.call("shop.price", article="tea", count="two")',
                client.call("shop.price", article="tea", count="two"),
                "the worker refused it, and did not run it",
            ),
            (
                'client.with_options(errors=[OutOfStock]).call("shop.order", article="tea")',
                client.with_options(errors=(OutOfStock,)).call("shop.order", article="tea"),
                "the handler's own error, as itself",
            ),
            (
                'client.with_options(timeout=0.5).call("shop.ponder")',
                client.with_options(timeout=0.5).call("shop.ponder"),
                "it ran, and was cancelled at the deadline",
            ),
            ('client.call("nobody.there")', client.call("nobody.there"), "told at once: nobody serves it"),
        ):
            console.print(f"await {code}", style="bold", markup=False)
            try:
                await failing
            except CallError as error:
                told = f"{type(error).__name__}, executed {error.executed!r}, retryable {error.retryable}"
                console.print(f"    {told}: {why}", markup=False, soft_wrap=True)


async def _many(client: Client, calls: int) -> None:
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("calls", total=calls)

        async def one(count: int) -> bool:
            answer = await client.with_options(timeout=60).call("shop.price", article="tea", count=count)
            progress.advance(bar)
            return bool(answer == 3 * count)

        began = time.perf_counter()
        right = sum(await asyncio.gather(*(one(count) for count in range(calls))))
        took = time.perf_counter() - began
    console.print(f"    {right:,} of {calls:,} matched, {calls / took:,.0f} calls/s")

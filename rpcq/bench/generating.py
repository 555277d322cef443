"""A generator as a process of its own: `python -m rpcq.bench.generating`.

It reads its plan from standard input, writes "ready" when it is connected, and begins at the line "go". It writes the
counts of each second, and in the end its measurements. The line "stop", or the end of its input, ends it early.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from dataclasses import asdict

from rpcq import logs
from rpcq.bench.generator import Generator
from rpcq.bench.plan import Plan, read_plan
from rpcq.bench.recording import Tally
from rpcq.client import Client
from rpcq.errors import RpcqError
from rpcq.runtime.process import run


def _say(kind: str, text: str = "") -> None:
    print(kind, text, flush=True)  # noqa: T201 - read by the process that started this one


async def generate(plan: Plan) -> None:
    """Connect, wait for "go", and make the calls."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    # A generator makes and drops thousands of small objects a second, few of them in cycles: collect less often.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    try:
        async with Client(
            plan.url, namespace=plan.namespace, name="rpcq-bench", max_in_flight=plan.in_flight + 1
        ) as client:
            _say("ready")
            if await reader.readline() != b"go\n":
                return
            generator = Generator(plan, client, _second)
            stopping = asyncio.create_task(_stop(reader, generator))
            measured = await generator.run()
            stopping.cancel()
    except RpcqError as error:
        _say("error", f"{type(error).__name__}: {error}".replace("\n", " "))
    else:
        _say("measured", measured.to_json().decode())


def _second(second: int, tally: Tally) -> None:
    _say("second", json.dumps([second, asdict(tally)]))


async def _stop(reader: asyncio.StreamReader, generator: Generator) -> None:
    await reader.readline()
    generator.stop()


def main() -> None:
    """Run as a process."""
    logs.configure("ERROR")
    run(generate(read_plan(sys.stdin.buffer.readline())))


if __name__ == "__main__":
    main()

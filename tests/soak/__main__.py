"""Mixed load for minutes while faults strike at random, and a report.

    PYTHONPATH=tests python -m soak --minutes 10 --seed 7 --nodes 3

The report says what was injected, what callers were told, whether the oracle holds, and what the client and a worker
hold at the start and at the end. Two scenes run side by side, one with classic and one with quorum request queues,
on a broker of the soak's own, or a cluster. Every choice comes from the seed; what the machine makes of it does not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import random
import signal
import sys

from rpcq import Client, RpcqError
from soak.report import Report, say
from soak.run import Soak


async def call_on(url: str, namespace: str) -> None:
    """What is killed in the middle of it."""
    async with Client(url, namespace=namespace) as client:
        say("calling")
        while True:
            calls = (client.call("target.again", nonce=f"of-the-killed-{number}", seconds=0.1) for number in range(50))
            await asyncio.gather(*calls, return_exceptions=True)


async def until_terminated(run: Soak) -> Report:
    """Run it; a SIGTERM ends it in an orderly way, with all processes that it has started."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await run.run()


def main() -> int:
    if sys.argv[1:2] == ["--call"]:
        with contextlib.suppress(RpcqError):
            asyncio.run(call_on(*sys.argv[2:]))
        return 0
    parser = argparse.ArgumentParser(
        prog="soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None, help="default: another each time; it is printed")
    parser.add_argument("--nodes", type=int, default=1, help="of the broker; several are a cluster, and take root")
    given = parser.parse_args()
    logging.getLogger("rpcq").setLevel(logging.CRITICAL)
    seed = random.SystemRandom().getrandbits(32) if given.seed is None else given.seed
    say(f"seed {seed}, {given.minutes:g} minutes, {given.nodes} node{'s' if given.nodes > 1 else ''}")
    try:
        report = asyncio.run(until_terminated(Soak(given.minutes, seed, given.nodes)))
    except asyncio.CancelledError:
        return 128 + signal.SIGTERM
    report.say()
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m consumer_service`: both services in one worker, on the broker of `RPCQ_URL`."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys

from consumer_service.calculator import calculator
from consumer_service.echo import echo
from rpcq import RpcqError, Worker


async def serve(url: str | None, prefetch: int, namespace: str) -> bool:
    """Serve until SIGTERM or Ctrl-C, and return whether all handlers ended."""
    worker = Worker(echo, calculator, url=url, prefetch=prefetch, namespace=namespace, name="consumer_service")
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, worker.request_stop)
    return await worker.run()


def main() -> int:
    """Run the command; the exit code is 0 after a clean stop, 1 if a call was cut off, 2 if it could not serve."""
    parser = argparse.ArgumentParser(prog="python -m consumer_service", description=__doc__)
    parser.add_argument("--url", help="the broker's URL (default: RPCQ_URL)")
    parser.add_argument("--prefetch", type=int, default=100, help="calls of each service at once (default: 100)")
    parser.add_argument("--namespace", default="rpcq", help="prefix of queues and exchanges (default: rpcq)")
    arguments = parser.parse_args()
    try:
        clean = asyncio.run(serve(arguments.url, arguments.prefetch, arguments.namespace))
    except RpcqError as error:
        print(f"consumer_service: {error}", file=sys.stderr)
        return 2
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())

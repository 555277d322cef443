"""What both images start: `start.py MODULE ARGUMENTS...` is `python -m MODULE ARGUMENTS...`, fit for a container.

- `RPCQ_URL`, where it is not set, is put together from `RABBITMQ_USER`, `RABBITMQ_PASSWORD` and `RABBITMQ_HOST`, each
  quoted as a URL wants it: any password will do, and the broker gets the same variable as it is.
- `RPCQ_NAME`, where it is not set, is the name of the container, so that each replica can be told from the others.
- SIGTERM ends a program that is still starting, and is Ctrl-C to one that runs, until it says otherwise. The first
  process of a container does not die of a signal that it does not handle: one that is stopped while it imports, or that
  knows only Ctrl-C, would be waited for in vain, and killed in the end. The images start this with SIGTERM blocked, so
  that none is lost before it is handled.
"""
# ruff: noqa: INP001 - a script, in a folder that is no package

from __future__ import annotations

import os
import runpy
import signal
import socket
import sys
from collections.abc import MutableMapping
from types import FrameType
from urllib.parse import quote


def prepare(environ: MutableMapping[str, str], host: str) -> None:
    """Set what is not set yet."""
    if not environ.get("RPCQ_URL") and environ.get("RABBITMQ_USER"):
        user, password = (quote(environ.get(name, ""), safe="") for name in ("RABBITMQ_USER", "RABBITMQ_PASSWORD"))
        environ["RPCQ_URL"] = f"amqp://{user}:{password}@{environ.get('RABBITMQ_HOST') or 'rabbitmq'}/"
    if not environ.get("RPCQ_NAME"):
        environ["RPCQ_NAME"] = host


def stop(_number: int, _frame: FrameType | None) -> None:
    """End it as Ctrl-C does where somebody listens to that, as asyncio does while it runs."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        signal.raise_signal(signal.SIGINT)
    else:  # nothing is there to be tidied up, and an exception amid an import may crash what is imported
        os._exit(128 + signal.SIGTERM)


def main() -> None:
    """Run the module that the arguments name, in this process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are told to ignore it
    signal.signal(signal.SIGTERM, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    prepare(os.environ, socket.gethostname())
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

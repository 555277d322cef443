"""The program that both images start: `start.py MODULE ARGUMENTS...` runs `python -m MODULE ARGUMENTS...`.

- If neither `RPCQ_URL` nor `RPCQ_URL_FILE` is set, `RPCQ_URL` is made of `RABBITMQ_USER`, `RABBITMQ_HOST`, and the
  password in the file `RABBITMQ_PASSWORD_FILE`, or in `RABBITMQ_PASSWORD` if that file is empty. Each part is
  percent-encoded, so any password works, and the broker gets the same password unchanged.
- If `RPCQ_NAME` is not set, it is the name of the container, which distinguishes the replicas.
- SIGTERM ends a program that is still starting, and acts as Ctrl-C on one that runs, until the program installs its own
  handler. The kernel ignores a signal that the first process of a container does not handle. Without this handler, a
  program that is still importing, or that handles only Ctrl-C, would ignore SIGTERM and be killed after a timeout. The
  images start this program with SIGTERM blocked, so that no signal is lost before the handler is installed.
"""
# ruff: noqa: INP001 - a script, in a folder that is not a package

from __future__ import annotations

import os
import runpy
import signal
import socket
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from types import FrameType
from urllib.parse import quote


def prepare(environ: MutableMapping[str, str], host: str) -> None:
    """Set `RPCQ_URL` and `RPCQ_NAME` if they are not set.

    Raises:
        OSError: the file with the password cannot be read.

    """
    if environ.get("RABBITMQ_USER") and not (environ.get("RPCQ_URL") or environ.get("RPCQ_URL_FILE")):
        user, password = (quote(text, safe="") for text in (environ["RABBITMQ_USER"], password_in(environ)))
        environ["RPCQ_URL"] = f"amqp://{user}:{password}@{environ.get('RABBITMQ_HOST') or 'rabbitmq'}/"
    if not environ.get("RPCQ_NAME"):
        environ["RPCQ_NAME"] = host


def password_in(environ: Mapping[str, str]) -> str:
    """The password in the file, without the newlines at its end, as a shell reads it; else that of the variable."""
    path = environ.get("RABBITMQ_PASSWORD_FILE")
    found = Path(path).read_text("utf-8").rstrip("\n") if path else ""
    return found or environ.get("RABBITMQ_PASSWORD", "")


def stop(_number: int, _frame: FrameType | None) -> None:
    """End the program: as Ctrl-C does if the program handles Ctrl-C, as asyncio does while it runs; else at once."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        signal.raise_signal(signal.SIGINT)
    else:  # nothing to clean up yet, and an exception during an import may crash the imported module
        os._exit(128 + signal.SIGTERM)


def main() -> None:
    """Run the module that the arguments name, in this process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell makes its background processes ignore it
    signal.signal(signal.SIGTERM, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        prepare(os.environ, socket.gethostname())
    except OSError as error:
        sys.exit(f"RABBITMQ_PASSWORD_FILE must name a file that user {os.getuid()} can read: {error}")
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

"""Logs with structlog, on top of the standard library's logging: the application decides what is shown.

The library only emits; `configure` is for programs of rpcq's own (the command line, the example services), and makes
them readable on a terminal and JSON elsewhere. No line holds a password, a body or a user's header.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from contextvars import ContextVar
from typing import Any, Final, Protocol

import orjson
import structlog

from rpcq.terminal import printable, printable_json
from rpcq.url import mask_urls


class Named(Protocol):
    """A call that a handler runs for."""

    def names(self) -> dict[str, Any]:
        """What tells it apart."""


current: Final[ContextVar[Named | None]] = ContextVar("rpcq_call", default=None)
"""The call that the handler of this context runs for. Setting it is all that a call pays: `add_call` reads it."""

SELDOM: Final = 1.0
"""Seconds between two warnings of one kind that a peer can cause as often as it likes."""

QUIET: Final = ("aio_pika", "aiormq")
"""At DEBUG they log bodies and headers; what they log above that, rpcq reports itself, by name."""


_RECORD: Final = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime"} - {"exc_info", "stack_info"})


def _mask_urls(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    for key, value in event.items():
        if isinstance(value, str) and "://" in value:
            event[key] = mask_urls(value)
    return event


def _printable(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """For a terminal, which obeys what a worker or a caller put into a text. The renderer quotes what is no text."""
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = printable(value, lines=True)
    return event


def _json(value: Any, **_: Any) -> str:
    return printable_json(orjson.dumps(value, default=str).decode())


def _step_aside(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Rename what logging refuses as `extra`: an application may have bound any name with `structlog.contextvars`."""
    for key in event.keys() & _RECORD:
        event[f"{key}_"] = event.pop(key)
    return event


def add_call(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """A structlog processor: lines that a handler logs carry its call's method, correlation ID and attempt.

    `rpcq worker` has it. In a configuration of your own, put it in the list of processors, beside
    `structlog.contextvars.merge_contextvars`, or in `foreign_pre_chain` for the standard library's loggers.
    """
    call = current.get()
    if call is not None and "correlation_id" not in event:  # else it is about another one, that this one makes
        for key, value in call.names().items():
            event.setdefault(key, value)
    return event


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A structlog logger that feeds the standard library's logger `name`."""
    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            _mask_urls,
            _step_aside,
            structlog.stdlib.render_to_log_kwargs,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        context_class=dict,
    )
    return logger


class Seldom:
    """Warnings that a peer can cause as often as it likes: each is written at most once a second.

    Args:
        log: where they are written, with how many there were since the last one.

    """

    def __init__(self, log: structlog.stdlib.BoundLogger) -> None:
        self._log = log
        self._times: dict[str, float] = {}
        self._unsaid: dict[str, int] = {}

    def warning(self, event: str, **fields: Any) -> None:
        """Write it, or count it; `event` is one of a few."""
        now = time.monotonic()
        if now - self._times.get(event, -math.inf) < SELDOM:
            self._unsaid[event] = self._unsaid.get(event, 0) + 1
            return
        self._times[event] = now
        if unsaid := self._unsaid.pop(event, 0):
            fields["unsaid"] = unsaid
        self._log.warning(event, **fields)


def silence(name: str) -> None:
    """Keep a building block's logger quiet unless the application set its level."""
    logger = logging.getLogger(name)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL)


def configure(level: str = "INFO") -> None:
    """Show this program's logs on standard error: for people on a terminal, a line of JSON each elsewhere."""
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.ExtraAdder(),
        add_call,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,  # plain: a prettier one would show the values of variables
        _mask_urls,
    ]
    final: list[structlog.typing.Processor]
    if sys.stderr.isatty():
        final = [_printable, structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    else:
        final = [structlog.processors.JSONRenderer(serializer=_json)]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)

"""Logs with structlog, on top of the standard library's logging: the application decides what is shown.

rpcq only emits records; their messages have the fields as text, `event key='value'`. `configure` is for its own
programs (the command line, the example services): lines for people on a terminal, and JSON elsewhere. No line contains
a password, a body or a header of a user.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Final, Protocol

import orjson
import structlog

from rpcq.terminal import printable, printable_json
from rpcq.url import mask_urls


class Named(Protocol):
    """The call or the job that a handler runs for."""

    def names(self) -> dict[str, Any]:
        """The fields that identify it in logs."""


current: Final[ContextVar[Named | None]] = ContextVar("rpcq_call", default=None)
"""The call or the job that the handler of this context runs for, read by `add_call`. Setting it is the only cost."""

SELDOM: Final = 1.0
"""Seconds between two warnings of one kind, for warnings that a peer can cause without limit."""

QUIET: Final = ("aio_pika", "aiormq")
"""Loggers that are silenced. At DEBUG they log bodies and headers; rpcq itself reports what they log above DEBUG."""


_RECORD: Final = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime"} - {"exc_info", "stack_info"})


def _mask_urls(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    for key, value in event.items():
        if isinstance(value, str) and "://" in value:
            event[key] = mask_urls(value)
    return event


def _printable(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Escape control characters that a worker or a caller put into a text. The renderer escapes other types."""
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = printable(value, lines=True)
    return event


def _json(value: Any, **_: Any) -> str:
    return printable_json(orjson.dumps(value, default=str).decode())


def _rename_reserved(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Rename fields that logging refuses as `extra`: applications bind any names with `structlog.contextvars`."""
    for key in event.keys() & _RECORD:
        event[f"{key}_"] = event.pop(key)
    return event


def add_call(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Add what a handler runs for to the lines that it logs: a structlog processor.

    That is a call's `method`, `correlation_id` and `attempt`, or a job's `job`, `job_id` and `attempt`.

    `rpcq worker` uses it. In your own configuration, put it in the list of processors, beside
    `structlog.contextvars.merge_contextvars`, or in `foreign_pre_chain` for the standard library's loggers.
    """
    call = current.get()
    # With an ID of its own, the line is about a call that the handler makes, or a job that it sends.
    if call is not None and "correlation_id" not in event and "job_id" not in event:
        for key, value in call.names().items():
            event.setdefault(key, value)
    return event


class Said:
    """The message of a record: the event and its fields, as text for formatters that show the message only.

    It is rendered only if it is shown. The record has the fields, and the event alone as `event`, as attributes too.
    """

    __slots__ = ("_event", "_fields")

    def __init__(self, event: str, fields: Mapping[str, Any]) -> None:
        self._event = event
        self._fields = fields

    def __str__(self) -> str:
        return " ".join((self._event, *(f"{key}={value!r}" for key, value in self._fields.items())))

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (str(self),)


def _to_record(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """The arguments of the standard library's logger, as `structlog.stdlib.render_to_log_kwargs` makes them."""
    said = structlog.stdlib.render_to_log_kwargs(_logger, _method, event)
    fields = said["extra"]
    return {**said, "msg": Said(said["msg"], fields), "extra": {**fields, "event": said["msg"]}}


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A structlog logger that feeds the standard library's logger `name`."""
    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            _mask_urls,
            _rename_reserved,
            _to_record,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        context_class=dict,
    )
    return logger


class Seldom:
    """Limits warnings that a peer can cause without limit: each is logged at most once a second.

    Args:
        log: the logger. A warning has the number of those before it that were left out, as `unsaid`.

    """

    def __init__(self, log: structlog.stdlib.BoundLogger) -> None:
        self._log = log
        self._times: dict[str, float] = {}
        self._left_out: dict[str, int] = {}

    def warning(self, event: str, **fields: Any) -> None:
        """Log the warning, or count it. `event` is one of a few texts, because each is kept in memory."""
        now = time.monotonic()
        if now - self._times.get(event, -math.inf) < SELDOM:
            self._left_out[event] = self._left_out.get(event, 0) + 1
            return
        self._times[event] = now
        if left_out := self._left_out.pop(event, 0):
            fields["unsaid"] = left_out
        self._log.warning(event, **fields)


def silence(name: str) -> None:
    """Silence the logger of a dependency, unless the application has set its level."""
    logger = logging.getLogger(name)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL)


def configure(level: str = "INFO") -> None:
    """Write this program's logs to standard error: for people on a terminal, as lines of JSON elsewhere."""
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.ExtraAdder(),
        add_call,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,  # plain: a rich traceback shows the values of variables
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

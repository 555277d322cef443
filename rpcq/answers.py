"""From what comes to a reply queue to what it means for a call, and to the value or the error that its caller gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pydantic

from rpcq import wire
from rpcq.bounds import NotRead, first_error
from rpcq.calls import Call, Event, honest
from rpcq.contracts import Result, result_adapter
from rpcq.errors import InvalidReply, from_wire
from rpcq.settings import CallOptions
from rpcq.wire import Reply

_LONGEST_SIGNAL = 4096
"""Bytes; the two errors that are no outcome yet are rpcq's own, and short."""


def meaning(came: Reply) -> tuple[Event, str]:
    """What a reply says of the request that it answers, and perhaps why."""
    if came.kind == wire.ERROR and came.body is not None and len(came.body) <= _LONGEST_SIGNAL:
        try:
            said = wire.loads(came.body)
        except ValueError:
            return Event.REPLY, ""
        match said:
            case {"code": "UNAVAILABLE", "executed": "no"}:
                return Event.TURNED_AWAY, ""
            case {"code": "ABORTED", "executed": "maybe"}:
                return Event.WORKER_LOST, str(said.get("message") or "")
    return Event.REPLY, ""


class Answers:
    """Reads replies; remembers the types that it reads.

    Attributes:
        on_reply: called with each reply that ends a call, before it is read; None for nobody.

    """

    def __init__(self) -> None:
        self._results: dict[Any, Result] = {}
        self.on_reply: Callable[[Reply], None] | None = None

    def read(self, call: Call, reply: Reply, label: str, options: CallOptions) -> Any:
        """The value in a reply.

        Raises:
            CallError: it is an error, or cannot be read as what the caller expects.

        """
        if self.on_reply is not None:
            self.on_reply(reply)
        try:
            if reply.kind == wire.RESULT and reply.body is not None and options.returns is not None:
                return self._typed(options.returns, label)(reply.body)
            value = wire.read_body(reply)
        except InvalidReply as error:
            raise honest(call, error) from None
        except (pydantic.ValidationError, NotRead) as error:
            why = first_error(error)
            raise honest(call, InvalidReply(f"{label} gave what does not fit {options.returns!r}: {why}")) from error
        except Exception as error:  # what validators of the caller's own type raise
            raise honest(call, InvalidReply(f"the result of {label} could not be read: {error!r}")) from error
        if reply.kind == wire.RESULT:
            return value
        raise honest(call, from_wire(value, options.errors))

    def _typed(self, returns: Any, label: str) -> Callable[[bytes], Any]:
        try:
            found = self._results.get(returns)
        except TypeError:  # unhashable, such as Annotated[..., []]
            return result_adapter(label, returns).read
        if found is None:
            found = self._results[returns] = result_adapter(label, returns)
        return found.read

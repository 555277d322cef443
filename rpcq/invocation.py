"""An invocation: a method with its validated arguments and its deadline. Pure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum, auto
from typing import Any

from rpcq.errors import CallError, InvalidReply
from rpcq.service import Context, Method, Offered


class Invocation(ABC):
    """One call of a handler that is to run: the method, its validated arguments and its deadline.

    Attributes:
        method: the method, job or subscription to call.
        args: its arguments by position.
        params: its arguments by name.
        deadline: when it has to end, in seconds of the monotonic clock.

    """

    __slots__ = ("args", "deadline", "method", "params")

    def __init__(self, method: Offered, arguments: tuple[tuple[Any, ...], dict[str, Any]], deadline: float) -> None:
        self.method = method
        self.args, self.params = arguments
        self.deadline = deadline

    def call(self) -> Any:
        """Call the handler; an `async def` returns a coroutine."""
        return self.method.call(self.args, self.params, self.context)

    @abstractmethod
    def context(self) -> Context:
        """What the handler gets to know of the message."""

    @abstractmethod
    def names(self) -> dict[str, Any]:
        """The fields that identify it in logs."""


def call_together(invocations: Sequence[Invocation]) -> Any:
    """Call the handler of a batch once for several invocations of its method; an `async def` returns a coroutine."""
    method = invocations[0].method
    assert isinstance(method, Method)  # noqa: S101 - only methods have a batch
    return method.call_batch([(it.args, it.params) for it in invocations], [it.context for it in invocations])


class Unfit(Exception):
    """The handler of a batch returned what cannot be the results of its calls; each caller gets `error`."""

    def __init__(self, error: InvalidReply) -> None:
        super().__init__(error)
        self.error = error


class Refused(Exception):
    """The handler does not run; the caller gets `error`."""

    def __init__(self, error: CallError) -> None:
        super().__init__(error)
        self.error = error


class Interruption(Enum):
    """Why a handler was interrupted, and whether it had begun."""

    CANCELLED = auto()
    """It is no longer wanted: a caller cancelled its call."""
    TIMED_OUT = auto()
    """Its deadline came while it ran."""
    TIMED_OUT_UNBEGUN = auto()
    """Its deadline came before it began."""
    CUT_OFF = auto()
    """The worker stopped while it ran."""
    CUT_OFF_UNBEGUN = auto()
    """The worker stopped before it began."""

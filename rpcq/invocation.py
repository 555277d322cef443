"""What is to run: a method with its validated arguments, and when it has to end. Pure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from rpcq.errors import CallError
from rpcq.service import Context, Method


class Invocation(ABC):
    """One call of a handler that may run: the method, its validated arguments, and when it has to end.

    Attributes:
        method: what is called.
        args: its arguments by position.
        params: its arguments by name.
        deadline: on the monotonic clock, in seconds.

    """

    __slots__ = ("args", "deadline", "method", "params")

    def __init__(self, method: Method, arguments: tuple[tuple[Any, ...], dict[str, Any]], deadline: float) -> None:
        self.method = method
        self.args, self.params = arguments
        self.deadline = deadline

    def call(self) -> Any:
        """Call the handler; the result is a coroutine if it is an `async def`."""
        return self.method.call(self.args, self.params, self.context)

    @abstractmethod
    def context(self) -> Context:
        """What the handler may know of the message."""

    @abstractmethod
    def names(self) -> dict[str, Any]:
        """What tells it apart, as fields for logs."""


class Refused(Exception):
    """The handler is not entered; the caller gets `error`."""

    def __init__(self, error: CallError) -> None:
        super().__init__(error)
        self.error = error

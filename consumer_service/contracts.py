"""The contracts of the services: callers import these, and bind them to a client."""

from __future__ import annotations

from decimal import Decimal
from typing import Protocol

from rpcq import DomainError, contract


class DivisionByZero(DomainError):
    """The divisor is zero."""


@contract("echo", idempotent=["process"])
class EchoApi(Protocol):
    """Returns each message, processed."""

    async def process(self, message: str, delay: float = 0.0) -> str:
        """Return the message, processed, after `delay` seconds."""
        ...


@contract("calculator", errors=[DivisionByZero], idempotent=["add", "multiply", "divide"])
class CalculatorApi(Protocol):
    """Exact arithmetic."""

    async def add(self, x: int, y: int) -> int:
        """Return the sum."""
        ...

    async def multiply(self, x: Decimal, y: Decimal) -> Decimal:
        """Return the product."""
        ...

    async def divide(self, x: Decimal, y: Decimal) -> Decimal:
        """Return the quotient, or raise `DivisionByZero`."""
        ...

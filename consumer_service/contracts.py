"""What callers may know: import these, and bind them to a client."""

from __future__ import annotations

from decimal import Decimal
from typing import Protocol

from rpcq import DomainError, contract


class DivisionByZero(DomainError):
    """The divisor is zero."""


@contract("echo", idempotent=["process"])
class EchoApi(Protocol):
    """Answers what it is told."""

    async def process(self, message: str, delay: float = 0.0) -> str:
        """The message, processed, after `delay` seconds."""
        ...


@contract("calculator", errors=[DivisionByZero], idempotent=["add", "multiply", "divide"])
class CalculatorApi(Protocol):
    """Exact arithmetic."""

    async def add(self, x: int, y: int) -> int:
        """The sum."""
        ...

    async def multiply(self, x: Decimal, y: Decimal) -> Decimal:
        """The product."""
        ...

    async def divide(self, x: Decimal, y: Decimal) -> Decimal:
        """The quotient; `DivisionByZero` where there is none."""
        ...

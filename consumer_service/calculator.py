"""The calculator service."""

from __future__ import annotations

from decimal import Decimal

from consumer_service.contracts import CalculatorApi, DivisionByZero
from rpcq import Service

calculator = Service(api=CalculatorApi)


@calculator.method
async def add(x: int, y: int) -> int:
    """Return the sum."""
    return x + y


@calculator.method
async def multiply(x: Decimal, y: Decimal) -> Decimal:
    """Return the product."""
    return x * y


@calculator.method
async def divide(x: Decimal, y: Decimal) -> Decimal:
    """Return the quotient."""
    if not y:
        raise DivisionByZero("the divisor is zero", details={"x": x})
    return x / y

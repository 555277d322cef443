"""The attributes of domain errors: what is sent of them, and what comes back."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar

import pytest

from rpcq.errors import ConfigurationError, DomainError, RemoteError
from rpcq.validation.attributes import check_attributes, read_attributes, write_details


class OutOfStock(DomainError):
    """With attributes, and a constructor of its own."""

    limit: ClassVar[int] = 5
    sku: str
    price: Decimal
    left: int = 0
    _secret: str = "never sent"
    details: dict[str, Any]

    def __init__(self, sku: str, price: Decimal) -> None:
        super().__init__(f"none of {sku} left")
        self.sku = sku
        self.price = price
        self.shelf = "not annotated in the class: not sent"


class LastOne(OutOfStock):
    """Inherits attributes."""

    until: dt.date | None = None


@dataclass(eq=False)
class Declined(DomainError):
    """With a constructor that is made for it."""

    card: bytes
    tries: int = 1


def received(kind: type[DomainError], details: Any) -> Any:
    """An error as a caller has it: its constructor did not run."""
    error = kind.__new__(kind)
    error.details = details
    read_attributes(error)
    return error


def test_annotated_attributes_travel_in_details_and_come_back_with_their_types() -> None:
    details = write_details(OutOfStock("tea", Decimal("1.50")))
    assert details == {"sku": "tea", "price": "1.50", "left": 0}
    error = received(OutOfStock, details)
    assert (error.sku, error.price, error.left) == ("tea", Decimal("1.50"), 0)
    assert error.limit == 5


def test_attributes_are_inherited_and_a_dataclass_works_too() -> None:
    last = LastOne("tea", Decimal(1))
    last.until = dt.date(2030, 1, 2)
    assert received(LastOne, write_details(last)).until == dt.date(2030, 1, 2)
    assert write_details(Declined(b"\xff", tries=2)) == {"card": "_w==", "tries": 2}
    assert received(Declined, {"card": "_w=="}).card == b"\xff"


def test_details_that_are_given_are_sent_too() -> None:
    error = OutOfStock("tea", Decimal(1))
    error.details = {"shop": 7, "sku": "overwritten by the attribute"}
    assert write_details(error) == {"shop": 7, "sku": "tea", "price": "1", "left": 0}
    error.details = [1]  # type: ignore[assignment]
    assert write_details(error) == [1]


def test_an_error_without_attributes_keeps_its_details() -> None:
    class Plain(DomainError):
        pass

    assert write_details(Plain("x")) is None
    assert write_details(Plain("x", details={"a": 1})) == {"a": 1}
    assert write_details(RemoteError("x", details=5)) == 5


@pytest.mark.parametrize("details", [None, [], "tea", {}, {"sku": 5}, {"sku": None, "price": "much", "left": "few"}])
def test_an_attribute_that_is_not_there_or_does_not_fit_stays_as_the_class_has_it(details: Any) -> None:
    error = received(OutOfStock, details)
    assert not hasattr(error, "sku")
    assert not hasattr(error, "price")
    assert error.left == 0
    assert error.details == details


def test_details_cannot_change_what_is_not_an_attribute() -> None:
    error = received(OutOfStock, {"message": "x", "_secret": "x", "limit": 1, "__class__": "x", "executed": "no"})
    assert (error.message, error._secret, error.limit, error.executed) == ("", "never sent", 5, "yes")


def test_an_attribute_without_a_value_is_left_out_and_one_with_a_wrong_value_is_an_error() -> None:
    error = OutOfStock("tea", Decimal(1))
    del error.price
    assert write_details(error) == {"sku": "tea", "left": 0}
    error.sku = 5  # type: ignore[assignment]
    with pytest.raises(ValueError, match="valid string"):
        write_details(error)


def test_an_attribute_whose_type_cannot_be_is_refused_by_name() -> None:
    class Odd(DomainError):
        shelf: dt.tzinfo

    class Missing(DomainError):
        shelf: Nothing  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(ConfigurationError, match=r"Odd\.shelf must have a type that pydantic can handle"):
        check_attributes([Odd])
    with pytest.raises(ConfigurationError, match=r"Missing has an annotation that cannot be resolved"):
        check_attributes([Missing])

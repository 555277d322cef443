"""The signature of one call, from that of a handler that takes lists."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Union

import pytest
from pydantic import Field

from rpcq.errors import ConfigurationError, DomainError
from rpcq.validation.batches import signature_of_one

Positive = Annotated[int, Field(gt=0)]


class Empty(DomainError):
    pass


class Full(DomainError):
    pass


def of_one(handler: Callable[..., Any]) -> inspect.Signature:
    return signature_of_one("service.method", inspect.signature(handler, eval_str=True))


def test_each_parameter_has_the_type_of_the_items_of_its_list() -> None:
    def handler(
        text: list[str], at: Sequence[Positive], *, model: Sequence[str] = ("small",), more: Any
    ) -> list[float]: ...

    def call(text: str, at: Positive, *, model: str = "small", more: Any) -> float: ...

    assert of_one(handler) == inspect.signature(call, eval_str=True)


def test_what_has_no_annotation_takes_and_returns_any_value() -> None:
    def handler(x, y: list, z: Any = [None]): ...  # type: ignore[no-untyped-def, type-arg]  # noqa: B006

    found = of_one(handler)
    assert [it.annotation for it in found.parameters.values()] == [Any, Any, Any]
    assert found.parameters["z"].default is None
    assert found.return_annotation is Any


def test_exceptions_among_the_results_are_no_part_of_the_result_of_one_call() -> None:
    def several(x: list[int]) -> list[int | str | Empty | Full]: ...

    def optional(x: list[int]) -> Sequence[Union[int, Exception, None]]: ...  # noqa: UP007 - as some write it

    def only(x: list[int]) -> list[Empty]: ...

    assert of_one(several).return_annotation == int | str
    assert of_one(optional).return_annotation == int | None
    assert of_one(only).return_annotation is Empty


def no_list(x: int) -> list[int]: ...


def a_set(x: set[int]) -> list[int]: ...


def outside(x: Annotated[list[int], "what"]) -> list[int]: ...


def several(*x: list[int]) -> list[int]: ...


def others(x: list[int], **y: list[int]) -> list[int]: ...


def unnamed(x: list[int], /) -> list[int]: ...


def nothing() -> list[int]: ...


def no_default(x: list[int] = []) -> list[int]: ...  # noqa: B006 - refused


def two_defaults(x: Sequence[int] = (1, 2)) -> list[int]: ...


def scalar(x: list[int]) -> int: ...


def no_result(x: list[int]) -> None: ...


def a_dict(x: list[int]) -> dict[str, int]: ...


@pytest.mark.parametrize(
    ("handler", "why"),
    [
        (no_list, "the parameter 'x' of service.method must be a list, as in .*; got int"),
        (a_set, "the parameter 'x' of service.method must be a list, as in .*; got set"),
        (outside, "the parameter 'x' of service.method must be a list, as in .*; got .*Annotated"),
        (several, r"the parameter 'x' of service.method must have a name for callers, .*; got \*x"),
        (others, r"the parameter 'y' of service.method must have a name for callers, .*; got \*\*y"),
        (unnamed, "the parameter 'x' of service.method must have a name for callers, .*; got x"),
        (nothing, "service.method must take a parameter, because it has a batch; got none"),
        (no_default, r"the parameter 'x' of service.method must have a default with one value, .*; got \[\]"),
        (two_defaults, r"the parameter 'x' of service.method must have a default with one value, .*; got \(1, 2\)"),
        (scalar, "service.method must return a list of results, because it has a batch; got int"),
        (no_result, "service.method must return a list of results, because it has a batch; got None"),
        (a_dict, r"service.method must return a list of results, .*; got dict\[str, int\]"),
    ],
)
def test_a_handler_that_does_not_take_or_return_lists_is_refused_with_what_is_wrong(
    handler: Callable[..., Any], why: str
) -> None:
    with pytest.raises(ConfigurationError, match=why):
        of_one(handler)

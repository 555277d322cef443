"""What fits a contract: parameters by name and kind, types as JSON."""

from __future__ import annotations

import datetime as dt
import enum
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from pydantic import AliasChoices, BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from rpcq.contracts import signature_of
from rpcq.validation.fitting import misfits


@dataclass
class Point:
    x: int
    y: int = 1


class Wider(BaseModel):
    x: float
    y: int | None = None


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")

    x: int


class More(BaseModel):
    x: int
    z: int


class Chain(BaseModel):
    value: int
    next: Chain | None = None


class WiderChain(BaseModel):
    value: float
    next: WiderChain | None = None
    note: str = ""


class OtherChain(BaseModel):
    value: int
    next: Chain | OtherChain | None = None
    note: str


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Basket(TypedDict):
    x: int


class Opaque:
    """Pydantic knows nothing of it."""


def fits(declared: Any, offered: Any) -> bool:
    """Whether a parameter of type `declared` in a contract may have type `offered` in the service, and why not."""
    wanted = inspect.Signature([inspect.Parameter("x", inspect.Parameter.KEYWORD_ONLY, annotation=declared)])
    got = inspect.Signature([inspect.Parameter("x", inspect.Parameter.KEYWORD_ONLY, annotation=offered)])
    found = [*misfits(wanted, got)]
    assert len(found) <= 1
    as_result = [
        *misfits(
            wanted.replace(parameters=(), return_annotation=offered),
            got.replace(parameters=(), return_annotation=declared),
        )
    ]
    assert len(as_result) == len(found), "results are compared the other way round"
    return not found


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        (int, float),
        (int, int | None),
        (int | str, str | float),
        (int, Decimal),
        (Decimal, str),
        (UUID, str),
        (Literal["red"], str),
        (Literal["red"], Colour),
        (Literal[1], float),
        (Colour, str),
        (Colour, Literal["red", "blue", "green"]),
        (list[int], Sequence[float]),
        (tuple[int, str], list[int | str]),
        (dict[str, int], dict[str, float]),
        (dict[str, int], dict),
        (Point, Wider),
        (Point, dict[str, int]),
        (Chain, WiderChain),
        (Annotated[int, Field(gt=0)], int),
        (Annotated[int, Field(ge=2, le=3)], Annotated[int, Field(ge=1, le=4)]),
        (int, Any),
        (Opaque, Any),
    ],
)
def test_a_type_fits_one_that_reads_all_its_values_and_not_the_other_way_round(narrow: Any, wide: Any) -> None:
    assert fits(narrow, wide)
    assert not fits(wide, narrow)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (list[int], tuple[int, ...]),
        (set[int], list[int]),
        (Basket, Point),
        (Annotated[str, Field(max_length=3)], Annotated[str, Field(max_length=3)]),
        (Chain, Chain),
        (Closed, Closed),
        (Opaque, Opaque),
    ],
)
def test_types_with_the_same_values_as_json_fit_each_other(one: Any, other: Any) -> None:
    assert fits(one, other)
    assert fits(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (int, str),
        (int, bool),
        (dt.datetime, dt.date),
        (Decimal, float),
        (bytes, int),
        (str, bytes),
        (Point, More),
        (Point, Closed),
        (Chain, OtherChain),
        (tuple[int, int], tuple[int, int, int]),
        (list[int], tuple[int, int]),
        (dict[str, int], Point),
        (Annotated[str, Field(pattern="a")], Annotated[str, Field(pattern="b")]),
        (Opaque, int),
        (Callable[[], None], int),
        (None, int),
    ],
)
def test_types_with_other_values_do_not_fit(one: Any, other: Any) -> None:
    assert not fits(one, other)


def test_a_contract_that_allows_any_value_needs_a_service_that_takes_it() -> None:
    assert not fits(Any, int)
    assert not fits(inspect.Parameter.empty, int)
    assert fits(Any, inspect.Parameter.empty)


class Api:
    async def plain(self, sku: str, count: int = 1) -> int:
        raise NotImplementedError

    async def named(self, *, sku: str) -> None: ...

    async def by_position(self, sku: str, /, count: int = ...) -> None: ...  # type: ignore[assignment]

    async def rest(self, *args: int, **kwargs: str) -> None: ...


def found(api: Callable[..., Any], handler: Callable[..., Any]) -> list[str]:
    """What is wrong with a handler."""
    offered = inspect.signature(handler, eval_str=True)
    return [*misfits(signature_of("api", api), offered)]


def test_functions_that_can_be_called_as_the_contract_says_fit() -> None:
    def more(sku: str, count: int = 1, *, note: str = "") -> int:
        raise NotImplementedError

    def open_to_all(*args: Any, **kwargs: Any) -> int:
        raise NotImplementedError

    def either(sku: str) -> None:
        """Takes it by position, too."""

    def other_name(article: str, /, count: int = 7) -> None:
        """The name of a parameter that is given by position does not matter."""

    def rest(*numbers: float, **others: str) -> None:
        """Takes all."""

    assert found(Api.plain, more) == []
    assert found(Api.plain, open_to_all) == []
    assert found(Api.named, either) == []
    assert found(Api.by_position, other_name) == []
    assert found(Api.rest, rest) == []


def test_each_parameter_that_does_not_fit_is_named() -> None:
    def swapped(count: int = 1, sku: str = "") -> int:
        raise NotImplementedError

    def by_name(*, sku: str, count: int = 1) -> int:
        raise NotImplementedError

    def by_position(sku: str, count: int = 1, /) -> int:
        raise NotImplementedError

    def without(sku: str) -> int:
        raise NotImplementedError

    def other_default(sku: str, count: int = 2) -> int:
        raise NotImplementedError

    def aliased(sku: Annotated[str, Field(alias="article")], count: int = 1) -> int:
        raise NotImplementedError

    def both(sku: Annotated[str, Field(validation_alias=AliasChoices("article", "sku"))], count: int = 1) -> int:
        raise NotImplementedError

    assert [it.partition(" must")[0] for it in found(Api.plain, swapped)] == [
        "the parameter 'sku'",
        "the parameter 'count'",
    ]
    assert found(Api.plain, by_name) == [
        "the parameter 'sku' must be number 1 of those that are taken by position; got another place",
        "the parameter 'count' must be number 2 of those that are taken by position; got another place",
    ]
    assert found(Api.plain, by_position) == [
        "the parameter 'sku' must be taken by position and by name; got one by position only",
        "the parameter 'count' must be taken by position and by name; got one by position only",
    ]
    assert found(Api.plain, without) == ["the parameter 'count' must be there; got none"]
    assert found(Api.plain, other_default) == [
        "the parameter 'count' must have the default 1, as in the contract; got 2"
    ]
    assert found(Api.plain, aliased) == ["the parameter 'sku' must be read under this name; got the alias 'article'"]
    assert found(Api.plain, both) == []
    assert found(Api.rest, without) == [
        "the parameter 'args' must be there; got none",
        "the parameter 'kwargs' must be there; got none",
        "the parameter 'sku' must have a default, because the contract does not have it; got none",
        "its result must be None; got int",
    ]


def test_a_result_without_an_annotation_does_not_fit_one_with_a_type() -> None:
    def bare(sku, count=1):  # type: ignore[no-untyped-def]
        raise NotImplementedError

    assert found(Api.plain, bare) == ["its result must be int; got any value (it has no annotation, or Any)"]

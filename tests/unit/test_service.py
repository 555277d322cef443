"""Services and methods: what they take, what they return, and what is refused when they are defined."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import math
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Annotated, Any, Literal, Protocol
from uuid import UUID

import annotated_types
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import (
    AliasChoices,
    Base64Bytes,
    Base64UrlBytes,
    BaseModel,
    ConfigDict,
    Field,
    RootModel,
    SecretBytes,
    SecretStr,
    field_validator,
)
from typing_extensions import TypeAliasType, TypedDict

from rpcq.contracts import Contract, contract, result_adapter
from rpcq.errors import ConfigurationError, DomainError, InvalidParams, InvalidReply
from rpcq.runtime.deadline import Deadline
from rpcq.service import Context as Ctx
from rpcq.service import Method, Service
from rpcq.validation.bounds import NotRead
from rpcq.wire import bodies

CONTEXT = Ctx(service="s", method="m", correlation_id="id", deadline=Deadline(1.0))


class OutOfStock(DomainError):
    """A service's own."""


class CardDeclined(DomainError):
    """Another one."""


class Item(BaseModel):
    sku: str = Field(alias="stockKeepingUnit")
    price: float | None = None


class Apple(BaseModel):
    kind: Literal["apple"]


class Pear(BaseModel):
    kind: Literal["pear"]


Tagged = Annotated[Apple | Pear, Field(discriminator="kind")]
Twice = TypeAliasType("Twice", "list[Twice] | tuple[Twice, ...]")  # type: ignore[misc]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    x: float


class Basket(TypedDict):
    items: list[Item]
    note: str | None


class Rate(RootModel[float]):
    """A number alone."""


class Login(BaseModel):
    token: SecretStr


class Limits(BaseModel):
    x: float = math.inf
    note: str = ""
    y: int = 0


class Picky(BaseModel):
    x: int

    @field_validator("x")
    @classmethod
    def check(cls, value: int) -> int:
        if value == 13:
            raise KeyError("the secret of 13")
        return value


@dataclasses.dataclass
class Point:
    x: float
    y: float = 0.0


def method(handler: Callable[..., Any], name: str = "m") -> Method:
    service = Service("s")
    service.method(name=name)(handler)
    found = service.find(name)
    assert found
    return found


def called(handler: Callable[..., Any], body: bytes | str) -> Any:
    """What the handler returns for a request's body."""
    it = method(handler)
    args, named = it.parameters.read(body.encode() if isinstance(body, str) else body)
    value = it.call(args, named, lambda: CONTEXT)
    return asyncio.run(value) if inspect.iscoroutine(value) else value


# Parameters.


def add(x: int, y: int = 10) -> tuple[int, int]:
    return x, y


@pytest.mark.parametrize(
    ("body", "result"),
    [
        ('{"x": 1, "y": 2}', (1, 2)),
        ('{"y": 2, "x": 1}', (1, 2)),
        ('{"x": 1}', (1, 10)),
        ("[1, 2]", (1, 2)),
        ("[1]", (1, 10)),
        ("1", (1, 10)),
        (" 1 ", (1, 10)),
        ('\n\t {"x": 1}', (1, 10)),
        (" [1, 2]", (1, 2)),
        ('"7"', (7, 10)),
        ("1.0", (1, 10)),
    ],
)
def test_parameters_come_by_name_by_position_or_as_one_bare_scalar(body: str, result: tuple[int, int]) -> None:
    assert called(add, body) == result


@pytest.mark.parametrize("value", ["null", "true", '"text"', "-1.5e3", '"[1]"', '"{"'])
def test_any_scalar_may_stand_alone(value: str) -> None:
    assert called(lambda it: it, value) == bodies.loads(value.encode())


def test_a_method_without_parameters_takes_an_empty_object_or_array() -> None:
    assert called(lambda: 5, "{}") == 5
    assert called(lambda: 5, "[]") == 5
    with pytest.raises(InvalidParams, match=r"the parameters do not fit s\.m: 0: Unexpected positional argument"):
        called(lambda: 5, "1")


@pytest.mark.parametrize(
    "body",
    [
        *(
            " ",
            "{",
            "[",
            "[1",
            '{"x": 1',
            "oops",
            "1,2",
            "1],[2",
            '"x":1',
            "1 2",
            "NaN",
            "[NaN]",
            '{"x": -Infinity}',
        ),
        *("[" * 100_000, '{"a":' * 100_000, "\x0b[1]"),
    ],
    ids=lambda it: it[:12],
)
@pytest.mark.parametrize("handler", [add, lambda x, y=1: (x, y), lambda *args, **named: (args, named)])
def test_what_is_no_json_is_refused_as_such(handler: Callable[..., Any], body: str) -> None:
    with pytest.raises(InvalidParams, match=r"the parameters of s\.m are not JSON: ") as caught:
        called(handler, body)
    assert caught.value.executed == "no"


def test_a_type_that_the_service_lists_stands_for_its_default_method() -> None:
    service = Service("s", default_types=("call", "x"))
    service.method(add)
    service.check()
    assert service.find("call") is service.find("x") is service.find(None) is service.methods["add"]
    assert service.find("calls") is None
    service.method(lambda: 5, name="other")
    with pytest.raises(ConfigurationError, match="default_method of service 's' must be one of its methods with"):
        service.check()
    service.default_method = "other"
    service.check()
    assert service.find("call") is service.methods["other"]


def test_a_type_that_stands_for_the_default_method_is_no_method() -> None:
    service = Service("s", default_types=["add"])
    service.method(add)
    with pytest.raises(ConfigurationError, match="default_types of service 's' must not name its methods; got 'add'"):
        service.check()


@pytest.mark.parametrize("types", ["call", 5, None, [""], [5]])
def test_types_that_are_no_names_are_refused(types: Any) -> None:
    with pytest.raises(ConfigurationError, match="default_types of service 's' must be names, as in"):
        Service("s", default_types=types)


def test_a_queue_that_is_not_declared_has_a_name() -> None:
    with pytest.raises(ConfigurationError, match="queue of service 's' must be a name with declare_queue=False"):
        Service("s", declare_queue=False)


def test_an_empty_body_is_no_parameters() -> None:
    assert called(lambda: 5, "") == 5
    assert called(lambda x=1: x, "") == 1
    with pytest.raises(InvalidParams, match=r"the parameters do not fit s\.m: x: Missing required argument"):
        called(add, "")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"\xef\xbb\xbf[1]", r"it begins with a byte order mark \(U\+FEFF\); send UTF-8 without it"),
        (b"\xff\xfe1\0", "it begins with the byte order mark of UTF-16; send UTF-8"),
        (b"\x1f\x8b\x08\0", "it is compressed with gzip; send it without compression"),
    ],
)
def test_what_is_no_json_by_its_first_bytes_is_refused_with_the_cause(body: bytes, said: str) -> None:
    with pytest.raises(InvalidParams, match=rf"the parameters of s\.m are not JSON: {said}"):
        method(add).parameters.read(body)


@pytest.mark.parametrize("body", [b"\xff", b'{"x": "\xff"}', b"\xef\xbb\xbf1"])
def test_what_is_no_utf_8_is_no_json(body: bytes) -> None:
    with pytest.raises(InvalidParams, match="not JSON"):
        method(add).parameters.read(body)


@pytest.mark.parametrize(
    ("body", "named", "loc"),
    [
        ('{"x": "a"}', "x: Input should be a valid integer", ["x"]),
        ('{"x": 1, "y": null}', "y: Input should be a valid integer", ["y"]),
        ('["a"]', "0: Input should be a valid integer", [0]),
        ('"a"', "0: Input should be a valid integer", [0]),
        ("{}", "x: Missing required argument", ["x"]),
        ('{"x": 1, "z": 2}', "z: Unexpected keyword argument", ["z"]),
        ("[1, 2, 3]", "2: Unexpected positional argument", [2]),
    ],
)
def test_a_parameter_that_does_not_fit_is_named(body: str, named: str, loc: list[Any]) -> None:
    with pytest.raises(InvalidParams, match=r"the parameters do not fit s\.m: ") as caught:
        called(add, body)
    assert named in caught.value.message
    assert caught.value.details[0]["loc"] == loc
    assert bodies.dumps(caught.value.details)


def test_the_details_of_nested_parameters_name_the_way_to_them() -> None:
    def order(basket: Basket) -> None: ...

    with pytest.raises(InvalidParams, match=r"basket\.items\.0\.stockKeepingUnit: Field required"):
        called(order, '{"basket": {"items": [{}], "note": null}}')


def test_only_a_few_of_many_faults_are_spelt_out() -> None:
    def total(numbers: list[int]) -> None: ...

    with pytest.raises(InvalidParams, match="; and 195 more") as caught:
        called(total, bodies.dumps({"numbers": ["a"] * 200}))
    assert len(caught.value.details) == 100


def test_of_very_many_faults_only_the_number_is_told() -> None:
    with pytest.raises(InvalidParams, match=r"the parameters do not fit s\.m: 5000 errors, too many to list") as caught:
        called(add, bodies.dumps({"x": 1, "y": 2} | dict.fromkeys(map(str, range(5000)))))
    assert caught.value.details is None


def test_names_and_messages_from_the_body_are_cut() -> None:
    def take(models: dict[str, Basket], kind: Tagged) -> None: ...

    named = "n" * 100_000
    body = {"models": {named: {"items": [{}]}}, "kind": {"kind": named}, named: 1}
    with pytest.raises(InvalidParams, match=r"models\.nnn") as caught:
        called(take, bodies.dumps(body))
    assert len(caught.value.details) == 4
    assert len(bodies.dumps(caught.value.details)) < 10_000
    assert caught.value.details[0]["loc"][0] == "models"
    assert caught.value.details[0]["loc"][1].endswith("n...")


def test_a_body_that_is_nested_too_deeply_for_a_recursive_union_is_refused_both_ways() -> None:
    def take(it: Twice) -> None: ...

    deep = "[" * 50 + "]" * 50
    with pytest.raises(InvalidParams, match=r"cannot be read: .*nested too deeply .* Field\(discriminator=") as caught:
        called(take, f'{{"it": {deep}}}')
    assert caught.value.executed == "no"
    with pytest.raises(NotRead, match="nested too deeply"):
        result_adapter("s.m", Twice).read(deep.encode())


def test_a_large_result_that_does_not_fit_has_few_errors() -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        result_adapter("s.m", list[Item]).read(b"[%b{}]" % (b"{}," * 100_000))
    assert caught.value.error_count() == 1


def test_what_a_caller_sent_is_not_told_back() -> None:
    with pytest.raises(InvalidParams) as caught:
        called(add, '{"x": "s3cr3t"}')
    assert "s3cr3t" not in str(caught.value) + repr(caught.value.details)


def test_a_validator_that_raises_something_else_refuses_the_parameters_and_tells_only_its_type() -> None:
    def take(it: Picky) -> None: ...

    with pytest.raises(InvalidParams, match=r"could not be validated: a validator raised KeyError") as caught:
        called(take, '{"it": {"x": 13}}')
    assert "secret" not in str(caught.value)


def test_parameters_are_validated_as_they_are_annotated() -> None:
    def take(item: Item, point: Point, key: UUID, price: Decimal, kind: Literal["a", "b"], tags: set[str]) -> Any:
        return item.sku, point, key, price, kind, tags

    body = """{"item": {"stockKeepingUnit": "k"}, "point": {"x": 1}, "key": "00000000-0000-0000-0000-000000000001",
               "price": "1.10", "kind": "b", "tags": ["t", "t"]}"""
    assert called(take, body) == ("k", Point(1.0), UUID(int=1), Decimal("1.10"), "b", {"t"})


def test_constraints_of_annotations_hold() -> None:
    def take(x: Annotated[int, annotated_types.Gt(0)], y: Annotated[str, Field(max_length=2)] = "") -> Any:
        return x, y

    assert called(take, '[1, "ab"]') == (1, "ab")
    with pytest.raises(InvalidParams, match=r"x: Input should be greater than 0; y: String should have at most 2"):
        called(take, '{"x": 0, "y": "abc"}')


def test_what_is_not_annotated_is_taken_as_json_has_it() -> None:
    assert called(lambda x, y: (x, y), '{"x": [1, {"a": null}], "y": 18446744073709551616}') == (
        [1, {"a": None}],
        2**64,
    )


def _float(x: float) -> Any:
    return x


def _any(x: Any) -> Any:
    return x


def _floats(x: dict[str, list[Point | float]]) -> Any:
    return x


def _item(x: Item) -> Any:
    return x


HUGE = "1" + "0" * 400


@pytest.mark.parametrize(
    ("handler", "body"),
    [
        *((it, number) for it in (_float, _any) for number in ("1e400", "-1E+400", "123456.7e999", HUGE + ".5")),
        *((_float, number) for number in (HUGE, "-" + HUGE, f" {HUGE} ", '"1e400"', '"-1E+400"', f'"{HUGE}"')),
        *((lambda x: x, it) for it in ("1e400", '{"x": [{"a": 1E999}]}', "[1e309 ]")),
        (_floats, '{"x": {"a": [1.5, 1e400]}}'),
        (_floats, f'{{"x": {{"a": [1.5, {HUGE}]}}}}'),
        (_floats, '{"x": {"a": [{"x": 1e400}]}}'),
        (_floats, f'{{"x": {{"a": [{{"x": 1, "y": {HUGE}}}]}}}}'),
        (_floats, f'{{"x": {{"a": [{"1.5, " * 1000} {HUGE}]}}}}'),
        (_item, '{"x": {"stockKeepingUnit": "a", "price": 1e400}}'),
        (_item, f'{{"x": {{"stockKeepingUnit": "a", "price": -{HUGE}}}}}'),
        (_item, '{"x": {"stockKeepingUnit": "a", "price": "1E+400"}}'),
        (_item, '{"x": {"stockKeepingUnit": "a", "other": 1e400}}'),
    ],
    ids=lambda it: getattr(it, "__name__", str(it))[:30],
)
def test_a_number_beyond_a_float_is_refused_and_never_infinite(handler: Callable[..., Any], body: str) -> None:
    # Some versions of pydantic refuse a long integer for a float by themselves.
    with pytest.raises(
        InvalidParams, match=r"s\.m cannot be read: a number is beyond the range of a float|valid number"
    ):
        called(handler, body)


@pytest.mark.parametrize("kind", [int, Decimal, str, bool, UUID])
def test_a_number_beyond_a_float_does_not_fit_a_type_without_floats(kind: Any) -> None:
    def take(x: Any) -> None: ...

    take.__annotations__ = {"x": kind}
    with pytest.raises(InvalidParams, match=r"cannot be read|do not fit"):
        called(take, "[1e400]")


def test_what_only_looks_like_such_a_number_is_taken() -> None:
    assert called(_any, HUGE) == called(lambda x: x, f"[{HUGE}]") == 10**400
    assert called(_float, "1e-400") == called(_float, "0e999") == called(_float, '"0E+999"') == 0.0
    assert called(_any, '{"x": ["1e400", "a 1e400, b"]}') == ["1e400", "a 1e400, b"]

    def take(number: int, text: str, price: Decimal, x: float = 0.5) -> Any:
        return number, text, price, x

    assert called(take, f'[{HUGE}, "1e400", "1e400", "inf"]') == (10**400, "1e400", Decimal("1e400"), math.inf)


@pytest.mark.parametrize(
    "body", ['{"x": {"note": "1e400"}}', f'{{"x": {{"y": {HUGE}}}}}', '{"x": {"x": "inf", "note": "1e400"}}']
)
def test_an_infinity_of_the_programs_own_is_not_taken_for_such_a_number(body: str) -> None:
    def take(x: Limits) -> Any:
        return x

    assert called(take, body).x == math.inf
    with pytest.raises(InvalidParams, match="beyond the range"):
        called(take, body.replace("}}", ', "x": 1e400}}'))


@pytest.mark.parametrize("kind", [bytes, Base64Bytes, Base64UrlBytes, Base64Bytes | None, list[bytes] | bytes])
def test_bytes_come_as_the_caller_gave_them(kind: Any) -> None:
    def take(x: Any, *rest: Base64Bytes) -> Any:
        return x, rest

    take.__annotations__["x"] = kind
    for value in (b"", b"abc", b"\xff", b"\xfb\xff", b"YWJj", bytes(range(256)), bytes(range(255, -1, -1))):
        assert called(take, bodies.encode_params((value, value), {}, 1024)) == (value, (value,))


def test_a_secret_is_taken_from_a_plain_value() -> None:
    def take(x: SecretStr, y: SecretBytes, z: Login) -> Any:
        return x.get_secret_value(), y.get_secret_value(), z.token.get_secret_value()

    body = bodies.encode_params(("a", b"\xff", {"token": "c"}), {}, 1024)
    assert called(take, body) == ("a", b"\xff", "c")


def test_variable_parameters_take_the_rest() -> None:
    def take(x: int, *rest: int, flag: bool = False, **others: str) -> Any:
        return x, rest, flag, others

    assert called(take, "[1, 2, 3]") == (1, (2, 3), False, {})
    assert called(take, '{"x": 1, "flag": true, "a": "b"}') == (1, (), True, {"a": "b"})
    with pytest.raises(InvalidParams, match=r"2: Input should be a valid integer"):
        called(take, '[1, 2, "c"]')
    with pytest.raises(InvalidParams, match=r"a: Input should be a valid string"):
        called(take, '{"x": 1, "a": 5}')


def test_keyword_only_parameters_come_by_name_alone() -> None:
    def take(*, x: int) -> int:
        return x

    assert called(take, '{"x": 1}') == 1
    with pytest.raises(InvalidParams, match="0: Unexpected positional argument"):
        called(take, "[1]")


def test_positional_only_parameters_come_by_position_alone() -> None:
    def take(x: int, /, y: int = 2) -> Any:
        return x, y

    assert called(take, "[1, 3]") == (1, 3)
    assert called(take, "1") == (1, 2)
    with pytest.raises(InvalidParams, match="0: Missing required positional only argument"):
        called(take, '{"x": 1}')


def test_parameters_may_be_called_as_the_library_calls_its_own() -> None:
    def take(self: int, args: int, kwargs: int, handler: int) -> Any:
        return self, args, kwargs, handler

    assert called(take, '{"self": 1, "args": 2, "kwargs": 3, "handler": 4}') == (1, 2, 3, 4)
    assert called(take, "[1, 2, 3, 4]") == (1, 2, 3, 4)


def test_a_default_that_a_handler_changes_is_fresh_in_the_next_call() -> None:
    def take(seen: list[int] = []) -> list[int]:  # noqa: B006 - what is tested
        seen.append(1)
        return seen

    assert called(take, "{}") == [1]
    assert called(take, "{}") == [1]


# Context.


@pytest.mark.parametrize("body", ['{"x": 1, "y": 2}', "[1, 2]"])
def test_the_context_may_stand_anywhere_and_callers_never_see_it(body: str) -> None:
    def first(c: Ctx, x: int, y: int = 0) -> Any:
        return c, x, y

    def middle(x: int, c: Ctx, y: int = 0) -> Any:
        return c, x, y

    def last(x: int, y: int, c: Ctx) -> Any:
        return c, x, y

    def by_name(x: int, y: int, *, c: Ctx) -> Any:
        return c, x, y

    def optional(x: int, y: int, c: Ctx | None = None) -> Any:
        return c, x, y

    def annotated(x: int, y: int, c: Annotated[Ctx, "noted"]) -> Any:
        return c, x, y

    async def later(x: int, c: Ctx, y: int) -> Any:
        return c, x, y

    for handler in (first, middle, last, by_name, optional, annotated, later):
        assert called(handler, body) == (CONTEXT, 1, 2)
        assert "c" not in method(handler).signature.parameters


def test_the_context_stands_among_variable_parameters() -> None:
    def before(c: Ctx, *rest: int) -> Any:
        return c, rest

    def between(x: int, c: Ctx, *rest: int) -> Any:
        return c, (x, *rest)

    def after(*rest: int, c: Ctx) -> Any:
        return c, rest

    for handler in (before, between, after):
        assert called(handler, "[1, 2, 3]") == (CONTEXT, (1, 2, 3))
        assert called(handler, "[1]") == (CONTEXT, (1,))

    def named(c: Ctx, **rest: int) -> Any:
        return c, rest

    assert called(named, '{"x": 1}') == (CONTEXT, {"x": 1})


def test_a_caller_cannot_forge_the_context() -> None:
    def take(x: int = 0, c: Ctx | None = None) -> Any:
        return x, c

    with pytest.raises(InvalidParams, match="c: Unexpected keyword argument"):
        called(take, '{"c": {"service": "s"}}')


def test_a_context_is_made_only_for_a_handler_that_wants_one() -> None:
    def refuse() -> Ctx:
        raise AssertionError

    assert method(add).call((1,), {}, refuse) == (1, 10)


def _two(a: Ctx, b: Ctx) -> None: ...
def _positional(a: Ctx, /) -> None: ...
def _variable(*a: Ctx) -> None: ...
def _named(**a: Ctx) -> None: ...


@pytest.mark.parametrize("handler", [_two, _positional, _variable, _named])
def test_a_context_that_cannot_be_given_by_name_is_refused(handler: Callable[..., Any]) -> None:
    with pytest.raises(
        ConfigurationError, match=r"s\.m must take its Context in one parameter that can be given by name"
    ):
        method(handler)


# Handlers.


class Shop:
    def __init__(self, price: int) -> None:
        self.price = price

    def total(self, count: int) -> int:
        return self.price * count

    async def total_later(self, count: int, c: Ctx) -> int:
        assert c is CONTEXT
        return self.price * count

    @classmethod
    def free(cls, count: int) -> int:
        return 0 * count

    @staticmethod
    def full(count: int) -> int:
        return 1 * count


class Adder:
    def __call__(self, x: int, c: Ctx) -> tuple[int, Any]:
        return x + 1, c


class LaterAdder:
    async def __call__(self, x: int) -> int:
        return x + 1


class Counting:
    def __call__(self) -> Iterator[int]:
        yield 1


async def later(x: int, y: int = 0, *, c: Ctx) -> int:
    assert c is CONTEXT
    return x + y


def _logged(handler: Any) -> Any:
    @functools.wraps(handler)
    async def inner(*args: Any, **named: Any) -> Any:
        return await handler(*args, **named)

    return inner


@pytest.mark.parametrize(
    ("handler", "is_async", "result"),
    [
        (Shop(5).total, False, 10),
        (Shop(5).total_later, True, 10),
        (Shop.free, False, 0),
        (Shop.full, False, 2),
        (Adder(), False, (3, CONTEXT)),
        (LaterAdder(), True, 3),
        (later, True, 2),
        (_logged(later), True, 2),
        (functools.partial(later, y=5), True, 7),
        (functools.partial(later, 5), True, 7),
        (functools.partial(functools.partial(later, y=4), 3), True, None),
        (functools.partial(Shop(5).total), False, 10),
        (functools.partial(LaterAdder()), True, 3),
        (functools.partial(Adder()), False, (3, CONTEXT)),
    ],
)
def test_a_handler_may_be_anything_that_can_be_called(handler: Any, is_async: bool, result: Any) -> None:
    it = method(handler)
    assert it.is_async is is_async
    if result is None:  # everything is bound
        assert called(handler, "[]") == 7
    else:
        assert called(handler, "2") == result
        with pytest.raises(InvalidParams, match="valid integer"):
            called(handler, '"a"')


def test_what_a_partial_binds_is_not_the_callers_to_give() -> None:
    def charge(amount: int, account: object = None, *, secret: Any) -> Any:
        return amount, secret

    bound = functools.partial(charge, secret=Service)  # which no annotation could describe
    assert called(bound, '{"amount": 1}') == (1, Service)
    with pytest.raises(InvalidParams, match="secret: Unexpected keyword argument"):
        called(bound, '{"amount": 1, "secret": 2}')


def test_a_handler_stays_an_ordinary_function() -> None:
    service = Service("s")
    assert service.method(add) is add
    assert service.method(name="other")(add) is add
    assert service.method(add, name="third") is add  # type: ignore[call-overload]
    assert list(service.methods) == ["add", "other", "third"]
    assert add(1) == (1, 10)


def test_a_method_says_what_it_is() -> None:
    service = Service("shop", errors=[OutOfStock])

    @service.method(idempotent=True, errors=[CardDeclined], timeout=5)
    async def pay(amount: int, c: Ctx) -> Item | None: ...

    it = service.methods["pay"]
    assert (it.service, it.name, it.label, it.handler) == ("shop", "pay", "shop.pay", pay)
    assert (it.idempotent, it.errors, it.timeout, it.is_async) == (True, (OutOfStock, CardDeclined), 5, True)
    assert it.context_parameter == (1, "c")
    assert it.signature == inspect.Signature(
        [inspect.Parameter("amount", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=int)],
        return_annotation=Item | None,
    )
    service.method(add)
    other = service.methods["add"]
    assert (other.idempotent, other.errors, other.timeout, other.is_async) == (False, (OutOfStock,), None, False)


def _counts() -> Iterator[int]:
    yield 1


async def _counts_later() -> AsyncIterator[int]:
    yield 1


def _unknown(x: Missing) -> None: ...  # noqa: F821 - what is tested
def _unknown_result() -> Missing: ...  # noqa: F821 - what is tested
def _missing_attribute(x: math.missing) -> None: ...
def _no_type(x: 5) -> None: ...
def _no_syntax(x: "a b") -> None: ...  # noqa: F722 - what is tested
def _no_schema(x: Shop) -> None: ...
def _no_schema_deep(x: list[dict[str, Shop]]) -> None: ...
def _no_schema_result() -> Shop: ...


@pytest.mark.parametrize(
    ("handler", "said"),
    [
        (_counts, "must return one value; got a generator"),
        (_counts_later, "must return one value; got a generator"),
        (functools.partial(_counts), "must return one value; got a generator"),
        (Counting(), "must return one value; got a generator"),
        (_unknown, "has an annotation that cannot be resolved in its module: name 'Missing'"),
        (_unknown_result, "has an annotation that cannot be resolved in its module: name 'Missing'"),
        (_missing_attribute, "has an annotation that cannot be resolved in its module: .*missing"),
        (_no_type, "takes a parameter that pydantic cannot handle"),
        (_no_syntax, "has an annotation that cannot be resolved in its module"),
        (_no_schema, "takes a parameter that pydantic cannot handle"),
        (_no_schema_deep, "takes a parameter that pydantic cannot handle"),
        (_no_schema_result, "returns .*Shop.*, which pydantic cannot handle"),
        (iter, "has no signature that can be read"),
    ],
)
def test_a_handler_that_cannot_be_served_is_refused_when_it_is_defined(handler: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^s\.m {said}"):
        method(handler)


# Results.

ROUND_TRIPS = [
    (int, 2**70),
    (float, 1.5),
    (str, "é\u2028"),
    (bool, True),
    (type(None), None),
    (float | None, None),
    (list[int], [1, 2]),
    (tuple[int, str], (1, "a")),
    (set[int], {1, 2}),
    (dict[str, list[int]], {"a": [1]}),
    (bytes, b"abc"),
    (bytes, bytes(range(256))),
    (Base64Bytes, bytes(range(256))),
    (list[Base64Bytes | None], [b"YWJj", None]),
    (int, 10**4300 - 1),
    (UUID, UUID(int=5)),
    (Decimal, Decimal("1.10")),
    (Literal["a"], "a"),
    (Item, Item(stockKeepingUnit="a", price=1.5)),
    (Item, Item(stockKeepingUnit="a")),
    (list[Item], [Item(stockKeepingUnit="a")]),
    (Item | None, Item(stockKeepingUnit="a")),
    (Basket, {"items": [Item(stockKeepingUnit="a")], "note": None}),
    (Point, Point(1.0, 2.0)),
    (dict[str, Point], {"a": Point(1.0)}),
    (Strict, Strict(x=1.0)),
    (Rate, Rate(1.5)),
    (Annotated[int, Field(gt=0)], 5),
    (Any, {"a": [1, None]}),
    (object, "a"),
]


@pytest.mark.parametrize(("returns", "value"), ROUND_TRIPS)
def test_a_caller_reads_what_a_worker_writes(returns: Any, value: Any) -> None:
    def handler() -> Any: ...

    handler.__annotations__ = {"return": returns}
    body = method(handler).write_result(value, 10_000)
    assert result_adapter("s.m", returns).read(body) == value


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None)
@given(
    st.builds(
        Item,
        stockKeepingUnit=st.text(),
        price=st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(),
    )
)
def test_a_caller_reads_any_model_that_a_worker_writes(item: Item) -> None:
    adapter = result_adapter("s.m", list[Item])
    assert adapter.read(adapter.write([item])) == [item]


def test_aliases_stand_on_the_wire() -> None:
    def handler() -> list[Item]: ...

    assert method(handler).write_result([{"stockKeepingUnit": "a", "price": 1}], 100) == (
        b'[{"stockKeepingUnit":"a","price":1.0}]'
    )


def test_one_of_several_names_that_are_read_has_to_be_the_one_that_is_written() -> None:
    class Renamed(BaseModel):
        x: int = Field(validation_alias=AliasChoices("x", "old"), serialization_alias="x")

    adapter = result_adapter("s.m", Renamed)
    assert adapter.read(adapter.write(Renamed(old=1))) == Renamed(x=1)


def test_a_result_is_validated_before_it_is_written() -> None:
    def handler() -> list[int]: ...

    assert method(handler).write_result(("1", 2.0), 100) == b"[1,2]"


def test_what_is_not_annotated_is_written_as_it_is() -> None:
    def anything() -> Any: ...

    for handler in (lambda: None, anything):
        assert method(handler).write_result({"a": Point(1.0), "b": {1}}, 100) == b'{"a":{"x":1.0,"y":0.0},"b":[1]}'


@pytest.mark.parametrize(
    ("returns", "value", "said"),
    [
        (int, "s3cr3t", "a str, which does not fit its annotation"),
        (int, None, "a NoneType, which does not fit its annotation"),
        (type(None), 5, "a int, which does not fit its annotation"),
        (Item, {"price": 1}, "a dict, which does not fit its annotation"),
        (Basket, {"items": []}, "a dict, which does not fit its annotation"),
        (Any, object(), "a object that JSON cannot carry"),
        (Any, "\ud800", "a str that JSON cannot carry"),
        (Any, SecretStr("s3cr3t"), r"a SecretStr that JSON cannot carry: .*pass secret\.get_secret_value"),
        (Any, {"a": [Login(token="s3cr3t")]}, "a dict that JSON cannot carry: a secret would arrive as asterisks"),
        (list[Any], [SecretBytes(b"s3cr3t")], "a list that JSON cannot carry: a secret would arrive as asterisks"),
        (Any, [10**4300], "a list that JSON cannot carry: an integer of more than 4300 digits"),
        (dict[str, int], {"a": -(10**4300)}, "a dict that JSON cannot carry: an integer of more than 4300 digits"),
        (Picky, {"x": 13}, "a dict that JSON cannot carry"),
        (Any, asyncio.sleep, "a function that JSON cannot carry"),
    ],
)
def test_a_result_that_cannot_be_sent_is_told_without_its_value(returns: Any, value: Any, said: str) -> None:
    def handler() -> Any: ...

    handler.__annotations__ = {"return": returns}
    with pytest.raises(InvalidReply, match=rf"s\.m returned {said}") as caught:
        method(handler).write_result(value, 9999)
    assert caught.value.executed == "yes"
    assert "s3cr3t" not in str(caught.value)
    assert caught.value.__cause__


NESTED: list[Any] = []
for _ in range(100_000):
    NESTED = [NESTED]


def test_a_result_nested_100_000_deep_is_refused() -> None:
    with pytest.raises(InvalidReply, match="a list that JSON cannot carry"):
        method(lambda: None).write_result(NESTED, 10**9)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("returns", "make"),
    [
        (float, float),
        (Any, float),
        (object, lambda it: [it]),
        (list[float], lambda it: [1.0, it]),
        (float | None, float),
        (Item, lambda it: Item(stockKeepingUnit="a", price=it)),
        (Item, lambda it: {"stockKeepingUnit": "a", "price": it}),
        (list[Item], lambda it: [Item(stockKeepingUnit="null", price=it)]),
        (Basket, lambda it: {"items": [Item(stockKeepingUnit="a", price=it)], "note": None}),
        (Any, lambda it: Item(stockKeepingUnit="a", price=it)),
        (Point, Point),
        (dict[str, Point], lambda it: {"a": Point(it)}),
        (Strict, lambda it: Strict(x=it)),
        (Rate, Rate),
    ],
)
def test_a_number_that_json_does_not_have_is_refused_in_every_type_and_never_becomes_null(
    returns: Any, make: Callable[[float], Any], number: float
) -> None:
    def handler() -> Any: ...

    handler.__annotations__ = {"return": returns}
    with pytest.raises(InvalidReply, match="that JSON cannot carry"):
        method(handler).write_result(make(number), 1000)


def test_a_result_may_have_as_many_bytes_as_the_limit_and_no_more() -> None:
    def handler() -> str: ...

    assert len(method(handler).write_result("é" * 10, 22)) == 22
    with pytest.raises(InvalidReply, match=r"s\.m returned 22 bytes of JSON; the limit is 21 \(max_body\)"):
        method(handler).write_result("é" * 10, 21)


@pytest.mark.parametrize("returns", [Shop, list[Shop], "Missing", dict[str, "Missing"]])  # noqa: F821 - as users err  # noqa: F821 - what is tested
def test_a_result_type_that_pydantic_cannot_handle_is_refused(returns: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"s\.m returns .*, which pydantic cannot handle"):
        result_adapter("s.m", returns)


@pytest.mark.parametrize(
    ("returns", "body"),
    [
        *((float, it) for it in ("1e400", "-1E400", HUGE, '"1e400"', "NaN", "-Infinity")),
        *((Any, it) for it in ("1e400", '[{"a": 123456.7e999}]', "NaN")),
        (list[float], f"[1.5, {HUGE}]"),
        (list[float], f"[{'1.5, ' * 1000} 1e400]"),
        (list[float], f"[{'1.5, ' * 1000} {HUGE}]"),
        (Item, '{"stockKeepingUnit": "a", "price": 1e400}'),
        (Item, '{"stockKeepingUnit": "a", "price": NaN}'),
        (dict[str, Point], f'{{"a": {{"x": {HUGE}}}}}'),
        (dict[float, int], '{"1e400": 5}'),
        (Basket, '{"items": [{"stockKeepingUnit": "a", "price": 1e400}], "note": null}'),
    ],
    ids=lambda it: str(it)[:30],
)
def test_a_caller_never_reads_a_number_as_infinite(returns: Any, body: str) -> None:
    said = r"the result of s\.m cannot be read: (a number is beyond|NaN and Infinity)|valid number"
    with pytest.raises((InvalidReply, pydantic.ValidationError), match=said):
        result_adapter("s.m", returns).read(body.encode())


@pytest.mark.parametrize(
    ("returns", "body", "value"),
    [
        (float, "1e-400", 0.0),
        (float, '"inf"', math.inf),
        (float | None, "1e308", 1e308),
        (Any, f"[{HUGE}]", [10**400]),
        (int, HUGE, 10**400),
        (list[float | str], '["1e400 or more", 5.0]', ["1e400 or more", 5.0]),
        (Limits, '{"note": "1e400"}', Limits(note="1e400")),
    ],
    ids=lambda it: str(it)[:30],
)
def test_a_caller_reads_what_only_looks_like_such_a_number(returns: Any, body: str, value: Any) -> None:
    assert result_adapter("s.m", returns).read(body.encode()) == value


def test_a_secret_in_a_result_is_refused_when_it_is_defined_and_a_caller_may_read_one() -> None:
    def handler() -> list[Login]: ...

    with pytest.raises(ConfigurationError, match=r"s\.m returns token, a secret, which would arrive as asterisks; .*"):
        method(handler)
    assert result_adapter("s.m", list[Login]).read(b'[{"token": "a"}]')[0].token.get_secret_value() == "a"


class Silent(BaseModel):
    data: bytes


def test_bytes_of_a_class_that_does_not_say_how_they_stand_in_json_are_refused_when_they_are_defined() -> None:
    def take(upload: list[Silent]) -> None: ...

    def give() -> Silent: ...

    with pytest.raises(
        ConfigurationError, match=r"s\.m takes upload\.data, bytes of Silent, whose config does not say"
    ):
        method(take)
    with pytest.raises(ConfigurationError, match=r"s\.m returns data, bytes of Silent, whose config does not say"):
        method(give)
    with pytest.raises(ConfigurationError, match=r"s\.m returns data, bytes of Silent"):
        result_adapter("s.m", Silent)


# Services.


@pytest.mark.parametrize("name", ["", "a b", "a/b", "é", "a" * 101, None])
def test_a_service_has_a_name(name: Any) -> None:
    with pytest.raises(ConfigurationError, match="the name of a service must be"):
        Service(name)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"queue_type": "stream"}, "queue_type of service 'orders' must be .*; got 'stream'"),
        ({"queue": ""}, "queue must be .*; got ''"),
        ({"queue": "q" * 256}, "queue must be"),
        ({"timeout": 0}, "timeout must be .*; got 0"),
        ({"timeout": math.inf}, "timeout must be .*; got inf"),
        ({"errors": [ValueError]}, "errors must be subclasses"),
        ({"errors": OutOfStock}, "errors must be a tuple"),
    ],
)
def test_an_option_of_a_service_that_cannot_be_is_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Service("orders", **options)


def test_a_service_keeps_its_options() -> None:
    service = Service("a.b", queue_type="quorum", queue="q", timeout=5, errors=(it for it in [OutOfStock]))
    assert (service.name, service.queue_type, service.queue) == ("a.b", "quorum", "q")
    assert (service.timeout, service.errors, service.lifespan) == (5, (OutOfStock,), None)


@pytest.mark.parametrize("name", ["a.b", "a b", "é", "a" * 101, "a\n"])
def test_a_method_has_a_name_without_a_dot(name: str) -> None:
    with pytest.raises(ConfigurationError, match="the name of a method must be"):
        Service("s").method(name=name)(add)


@pytest.mark.parametrize("handler", [lambda: None, functools.partial(add), Adder(), "add"])
def test_a_method_without_a_name_of_its_own_has_to_be_given_one(handler: Any) -> None:
    with pytest.raises(ConfigurationError, match="the name of a method must be"):
        Service("s").method(handler)


def test_a_name_that_is_given_alone_says_how_it_has_to_be_given() -> None:
    with pytest.raises(ConfigurationError, match=r"must be given as @s\.method\(name='add'\)"):
        Service("s").method("add")  # type: ignore[call-overload]


@pytest.mark.parametrize("handler", [5, Item, object()])
def test_a_handler_that_is_no_function_is_refused(handler: Any) -> None:
    with pytest.raises(ConfigurationError, match="must be an async def or a def; got "):
        Service("s").method(name="m")(handler)


class Shelf:
    async def take(self, sku: str) -> str:
        return sku

    @classmethod
    def make(cls, sku: str) -> str:
        return sku


def test_a_function_of_a_class_is_refused_and_an_objects_method_is_not() -> None:
    service = Service("s")
    with pytest.raises(ConfigurationError, match=r"got Shelf\.take, which takes 'self': .* s\.method\(thing\.take\)"):
        service.method(Shelf.take)
    service.method(Shelf().take)
    service.method(Shelf.make)
    assert [*service.methods] == ["take", "make"]


@asynccontextmanager
async def of_an_app(app: Any) -> AsyncIterator[None]:
    yield


@asynccontextmanager
async def alone() -> AsyncIterator[None]:
    yield


async def undecorated() -> AsyncIterator[None]:
    yield


async def coroutine() -> None:
    """No context manager."""


@pytest.mark.parametrize(
    ("lifespan", "said"),
    [
        (3, "got 3"),
        (of_an_app, r"takes no parameters; got \(app: .*\).*: the lifespan of a service gets no app"),
        (alone(), "got an open context manager: give the function"),
        (undecorated, "got .*undecorated.*, which is not decorated"),
        (coroutine, "with a yield; got .*coroutine.*, which is a coroutine function"),
    ],
)
def test_a_lifespan_that_cannot_be_entered_says_why(lifespan: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^lifespan of service 's' must be a function .*{said}"):
        Service("s", lifespan=lifespan)


def test_a_lifespan_may_be_anything_that_gives_a_context_manager() -> None:
    class Opened:
        async def __aenter__(self) -> int:
            return 1

        async def __aexit__(self, *_: object) -> None:
            """Nothing is open."""

    for lifespan in (alone, Opened, functools.partial(of_an_app, None), lambda app=None: of_an_app(app)):
        assert Service("s", lifespan=lifespan).lifespan is lifespan  # type: ignore[arg-type]


def test_two_methods_of_one_name_are_refused_and_the_first_stays() -> None:
    service = Service("s")
    service.method(add)
    with pytest.raises(ConfigurationError, match="must have different names; got 'add' twice"):
        service.method(name="add")(lambda: None)
    assert service.methods["add"].handler is add


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"timeout": -1}, "timeout must be .*; got -1"),
        ({"errors": OutOfStock}, "errors must be a tuple"),
        ({"errors": [5]}, "errors must be .*; got 5"),
    ],
)
def test_an_option_of_a_method_that_cannot_be_is_named(options: dict[str, Any], said: str) -> None:
    service = Service("s")
    with pytest.raises(ConfigurationError, match=said):
        service.method(**options)(add)
    assert not service.methods


def test_a_request_that_names_no_method_means_the_only_or_the_default_one() -> None:
    service = Service("s")
    assert service.find(None) is None
    service.method(add)
    assert service.find(None) is service.find("add") is service.methods["add"]
    service.method(name="other")(add)
    assert service.find(None) is None
    assert service.find("third") is None
    service.default_method = "other"
    assert service.find(None) is service.methods["other"]
    assert service.find("third") is None


def test_a_service_that_cannot_be_served_says_why() -> None:
    service = Service("s", default_method="other")
    with pytest.raises(
        ConfigurationError,
        match=r"'s' has no methods, no jobs and no subscriptions; add one with @s\.method, \.job or \.on",
    ):
        service.check()
    service.method(add)
    with pytest.raises(
        ConfigurationError, match="default_method of service 's' must be one of its methods; got 'other'"
    ):
        service.check()
    service.method(name="other")(add)
    service.check()


def test_a_service_shows_its_methods_and_jobs() -> None:
    service = Service("s")
    assert repr(service) == "<Service 's': no methods>"
    service.method(add)
    service.method(name="other")(add)
    assert repr(service) == "<Service 's': add, other>"
    service.job(name="later")(add)
    assert repr(service) == "<Service 's': add, other, later>"


async def test_a_context_may_say_of_which_type_its_state_is() -> None:
    async def take(sku: str, context: Ctx[Shelf]) -> str:
        return await context.state.take(sku)

    async def optional(sku: str, *, context: Ctx[Shelf] | None = None) -> str:
        return sku

    context: Ctx[Shelf] = Ctx(service="s", method="m", correlation_id="", deadline=Deadline(1.0), state=Shelf())
    assert await method(take).call(("a",), {}, lambda: context) == "a"
    assert method(optional).context_parameter == (sys.maxsize, "context")
    assert CONTEXT.state is None


# Contracts.


def test_a_contract_says_which_service_a_protocol_describes() -> None:
    @contract("orders", errors=[OutOfStock], idempotent=["total"])
    class Orders(Protocol):
        async def total(self) -> int: ...

    assert Orders.__rpcq_contract__ == Contract("orders", (OutOfStock,), frozenset({"total"}))  # type: ignore[attr-defined]


def test_a_contract_that_calls_what_is_no_method_idempotent_is_refused() -> None:
    class Orders(Protocol):
        limit: int

        async def total(self) -> int: ...

    with pytest.raises(
        ConfigurationError, match=r"'orders' must name functions of its class, which has total; got \['limit', 'sum'\]"
    ):
        contract("orders", idempotent=["sum", "total", "limit"])(Orders)


def test_a_contract_must_have_async_methods_with_a_self() -> None:
    class Plain(Protocol):
        def total(self) -> int: ...

    class Selfless(Protocol):
        async def total(sku: str) -> int: ...  # type: ignore[misc]  # noqa: N805

    class Bare(Protocol):
        async def total() -> int: ...  # type: ignore[misc]

    with pytest.raises(ConfigurationError, match=r"^Plain\.total must be an async def, .*: write 'async def total'"):
        contract("orders")(Plain)
    for api in (Selfless, Bare):
        with pytest.raises(ConfigurationError, match=r"\.total must take self first; got \("):
            contract("orders")(api)


@contract("orders", errors=[OutOfStock], idempotent=["total"])
class OrdersApi(Protocol):
    async def total(self, sku: str, count: int = 1) -> int: ...

    async def cancel(self, *, order: UUID) -> None: ...


def held() -> Service:
    return Service(api=OrdersApi)


def test_a_service_takes_name_errors_and_idempotency_from_its_contract() -> None:
    service = held()

    @service.method
    async def total(context: Ctx, sku: str, count: int = 1, *, rebate: int = 0) -> int:
        return count

    @service.method
    def cancel(order: UUID | str) -> None:
        """Forget it."""

    service.check()
    assert (service.name, service.errors) == ("orders", (OutOfStock,))
    assert [(it.name, it.idempotent, it.errors) for it in service.methods.values()] == [
        ("total", True, (OutOfStock,)),
        ("cancel", False, (OutOfStock,)),
    ]
    assert Service("elsewhere", api=OrdersApi).name == "elsewhere"


def test_a_service_without_a_name_or_a_contract_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="the name of a service must be"):
        Service()

    class Unmarked(Protocol):
        async def total(self) -> int: ...

    with pytest.raises(ConfigurationError, match="names no service"):
        Service(api=Unmarked)
    assert Service("s", api=Unmarked).name == "s"


def test_a_method_that_the_contract_does_not_have_or_that_is_missing_is_named() -> None:
    service = held()
    with pytest.raises(ConfigurationError, match=r"orders\.add must be a method of its contract OrdersApi, .*cancel"):
        service.method(add)
    with pytest.raises(ConfigurationError, match="of its contract OrdersApi; got none called 'cancel' or 'total'"):
        service.check()

    @service.method
    async def total(sku: str, count: int = 1) -> int:
        return count

    with pytest.raises(ConfigurationError, match=r"must have all methods .*; got none called 'cancel'"):
        service.check()


def test_a_method_that_does_not_fit_its_contract_is_refused_with_every_reason() -> None:
    service = held()

    async def total(sku: int, count: int, shop: str) -> str:
        return shop

    with pytest.raises(ConfigurationError) as caught:
        service.method(total)
    assert str(caught.value) == (
        "orders.total must fit its contract OrdersApi: the parameter 'sku' must take str; got int; "
        "the parameter 'count' must have a default, as in the contract; got none; "
        "the parameter 'shop' must have a default, because the contract does not have it; got none; "
        "its result must be int; got str"
    )
    assert not service.methods


def test_what_callers_who_bind_the_contract_would_not_know_is_refused() -> None:
    async def cancel(order: UUID) -> None:
        """Forget it."""

    with pytest.raises(ConfigurationError, match=r"errors of orders\.cancel .*too: .*errors=\[CardDeclined\]"):
        held().method(errors=[CardDeclined])(cancel)
    with pytest.raises(ConfigurationError, match=r"errors of service 'orders' .*errors=\[CardDeclined\]"):
        Service(api=OrdersApi, errors=[OutOfStock, CardDeclined])
    with pytest.raises(ConfigurationError, match=r"orders\.cancel must be idempotent in its contract, too"):
        held().method(idempotent=True)(cancel)
    held().method(errors=[OutOfStock])(cancel)


@pytest.mark.parametrize(
    ("service", "options", "said"),
    [
        ("a b", {}, "the name of a service must be"),
        ("s", {"errors": OutOfStock}, "errors must be a tuple"),
        ("s", {"errors": [5]}, "errors must be subclasses"),
    ],
)
def test_a_contract_that_cannot_be_is_refused_at_once(service: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        contract(service, **options)

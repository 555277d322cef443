"""Whatever a peer sends, validating it ends soon: few errors are collected, and no recursion is exponential."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Generic, Literal, NamedTuple, NotRequired, TypeVar

import pytest
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Json,
    JsonValue,
    RootModel,
    Tag,
    TypeAdapter,
    ValidationError,
    WrapValidator,
    create_model,
)
from pydantic_core import CoreConfig, SchemaValidator
from typing_extensions import TypeAliasType, TypedDict

from rpcq.validation import bounds
from rpcq.validation.bounds import BUDGET, MOST_ERRORS, NotRead, bounded, count_visits, first_error

SIZE = 1 << 20
T = TypeVar("T")


def named(value: object) -> str:
    """A name of a test that is the same in every process: without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


class Pair(BaseModel):
    a: int
    b: int


class Aliased(BaseModel):
    sku: str = Field(alias="stockKeepingUnit")
    note: str


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")

    a: int = 1


class OtherClosed(Closed):
    b: int = 1


class Extra(BaseModel):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Pair]


class Keys(TypedDict):
    a: int
    b: NotRequired[int]


@dataclasses.dataclass
class Fields:
    a: int
    b: int
    c: int = dataclasses.field(init=False, default=3)


class Named(NamedTuple):
    a: int
    b: int = 2


class Lists(BaseModel):
    items: list[Pair]
    more: dict[str, list[Pair]] = {}


class Tree(BaseModel):
    children: list[Tree] = []
    next: Tree | None = None


def adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def reader(kind: Any) -> Callable[[bytes], Any]:
    made = adapter(kind)
    return bounded(made.core_schema, CoreConfig(), made.validator.validate_json)


def array(item: str, size: int = SIZE) -> bytes:
    return f"[{','.join([item] * ((size - 2) // (len(item) + 1)))}]".encode()


def keys(value: str) -> bytes:
    return ("{" + ",".join(f'"{at:05x}":{value}' for at in range(SIZE // (len(value) + 9))) + "}").encode()


def nested(before: str, after: str, inner: str = "", depth: int = 150) -> bytes:
    return (before * depth + inner + after * depth).encode()


# Errors.


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (list[int], array('""')),
        (set[int], array('""')),
        (frozenset[int], array('""')),
        (tuple[int, ...], array('""')),
        (Sequence[int], array('""')),
        (list[list[int]], array('[""]')),
        (dict[str, int], keys('""')),
        (dict[str, list[Pair]], keys("[{}]")),
        (list[Pair], array('{"a":"","b":""}')),
        (list[Keys], array('{"a":"","b":""}')),
        (list[Fields], array('{"a":"","b":""}')),
        (list[Named], array('["",""]')),
        (list[Lists], array('{"items":[{"a":""}]}')),
        (Lists, b'{"items":%b}' % array('{"a":"","b":1}', SIZE - 12)),
        (list[int | str | float | Pair], array("{}")),
        (list[Pair | Lists], array("{}")),
        (Closed | OtherClosed, keys("1")),
        (RootModel[list[Pair]], array('{"a":"","b":1}')),
        (list[Tree], array('{"next":1}')),
    ],
    ids=named,
)
def test_a_large_body_that_does_not_fit_has_few_errors(kind: Any, body: bytes) -> None:
    with pytest.raises(ValidationError) as caught:
        reader(kind)(body)
    assert 1 <= caught.value.error_count() <= 10


@pytest.mark.parametrize("kind", [list[Pair], list[Keys], list[Fields], dict[str, Pair], list[Lists]], ids=named)
def test_a_large_body_without_its_fields_is_refused_at_the_first_of_them(kind: Any) -> None:
    wide = create_model("wide", **dict.fromkeys("cdefg", (int, ...)), x=(kind, ...))  # type: ignore[call-overload]
    body = keys("{}") if "dict" in str(kind) else array("{}")
    with pytest.raises(NotRead, match=r"\A(a|items): Field required\Z"):
        reader(wide)(b'{"c":1,"d":1,"e":1,"f":1,"g":1,"x":%b}' % body)


class Binary(BaseModel):
    a: int
    b: int
    left: Binary | None = None
    right: Binary | None = None


class Either(BaseModel):
    a: int
    b: int
    left: int | Either | None = None
    right: int | Either | None = None


def test_errors_of_a_recursive_type_do_not_copy_it_level_by_level() -> None:
    chain = "{}"
    for _ in range(160):
        chain = f'{{"left":{{}},"right":{chain}}}'
    with pytest.raises(NotRead, match="Input does not fit Binary"):
        reader(list[Binary])(array(chain))
    wrong = '"x"'
    for _ in range(15):
        wrong = f'{{"a":1,"b":1,"left":{wrong},"right":{wrong}}}'
    with pytest.raises(NotRead, match="Input does not fit Binary"):
        reader(Binary)(wrong.encode())


def test_missing_fields_of_the_members_of_a_union_are_few_errors_without_copies() -> None:
    wide = create_model("Wide", **{f"field_{at}": (int, ...) for at in range(100)})  # type: ignore[call-overload]
    with pytest.raises(ValidationError) as caught:
        reader(wide | Pair)(keys("1"))
    assert [(it["loc"], it["type"]) for it in caught.value.errors(include_input=False)] == [((), "no_member")]
    with pytest.raises(ValidationError) as caught:
        reader(list[int | Either])(array('{"left":{}}'))
    assert caught.value.error_count() <= 20


def test_a_missing_field_is_called_as_callers_know_it() -> None:
    with pytest.raises(NotRead, match="stockKeepingUnit: Field required"):
        reader(list[Aliased])(array("{}"))


def test_copies_for_missing_fields_are_bounded() -> None:
    wide = create_model("Wide", **{f"field_{at}": (int, ...) for at in range(100)})  # type: ignore[call-overload]
    with pytest.raises(NotRead, match="field_0: Field required"):
        reader(wide)(keys("1"))


def test_further_arguments_have_one_error_each() -> None:
    def take(*pairs: Pair, **named: Pair) -> None: ...

    for body, key in ((array('{"a":"","b":""}', 400_000), 7), (keys('{"a":"","b":""}'), "00007")):
        with pytest.raises(ValidationError) as caught:
            reader(take)(body)
        assert caught.value.error_count() == body.count(b"{") - body.startswith(b"{")
        found = caught.value.errors(include_input=False)[7]
        assert found["loc"] == (key,)
        assert found["msg"] == "Input does not fit"


def test_unknown_values_of_a_model_have_one_error_each() -> None:
    with pytest.raises(ValidationError) as caught:
        reader(Extra)(keys('{"a":"","b":""}'))
    assert caught.value.error_count() == keys('{"a":"","b":""}').count(b"{") - 1


@pytest.mark.parametrize("count", [1, 10, 100])
def test_all_mistakes_are_listed_where_there_are_few(count: int) -> None:
    items = [{"a": 1, "b": 1}] * 1000 + [{"a": "x", "b": 1}] * count
    with pytest.raises(ValidationError) as caught:
        reader(list[Pair])(json.dumps(items).encode())
    locs = [it["loc"] for it in caught.value.errors()]
    assert locs == [(1000 + at, "a") for at in range(count)]


def test_more_mistakes_than_can_be_listed_give_the_first() -> None:
    with pytest.raises(ValidationError) as caught:
        reader(list[int])(array('"x"', 4 * 2 * MOST_ERRORS))
    assert [it["loc"] for it in caught.value.errors()] == [(0,)]


@pytest.mark.parametrize("kind", [int, str, bool, float, Any], ids=named)
def test_a_type_with_one_error_at_most_is_read_by_pydantic_alone(kind: Any) -> None:
    made = adapter(kind)
    read = made.validator.validate_json
    assert bounded(made.core_schema, CoreConfig(), read) is read


def test_the_message_of_the_first_error_is_told_without_collecting_too_many() -> None:
    def error(count: int) -> ValidationError:
        with pytest.raises(ValidationError) as caught:
            adapter(list[int]).validate_python(["x"] * count)
        return caught.value

    assert first_error(error(MOST_ERRORS)).startswith("Input should be a valid integer")
    assert first_error(error(MOST_ERRORS + 1)) == f"{MOST_ERRORS + 1} errors"
    assert first_error(NotRead("why")) == "why"


# Values.


def fallback(value: Any, handler: Any) -> Any:
    try:
        return handler(value)
    except ValidationError:
        return None


def half(value: Any) -> Any:
    return value if value != "half" else {"a": 1, "b": 2}


class Cat(BaseModel):
    kind: Literal["cat"]
    next: Annotated[Cat | Dog, Field(discriminator="kind")] | None = None


class Dog(BaseModel):
    kind: Literal["dog"]
    next: Annotated[Cat | Dog, Field(discriminator="kind")] | None = None


class Box(BaseModel, Generic[T]):
    content: T


class Partial(BaseModel):
    first: Pair | Closed | None
    either: Annotated[Pair | dict[str, int], Field(union_mode="left_to_right")]
    lenient: Annotated[Pair | None, WrapValidator(fallback)]


@pytest.mark.parametrize(
    ("kind", "item"),
    [
        (Pair, '{"a":1,"b":2}'),
        (Lists, '{"items":[{"a":1,"b":2}],"more":{"x":[{"a":1,"b":2}]}}'),
        (Closed | Pair, '{"a":1,"b":2}'),
        (Pair | Closed, '{"a":1}'),
        (Pair | Keys, '{"a":1}'),
        (Fields, '{"a":1,"b":2}'),
        (Named, "[1]"),
        (Named, '{"a":1}'),
        (Keys, '{"a":1}'),
        (Aliased, '{"stockKeepingUnit":"x","note":""}'),
        (Extra, '{"x":{"a":1,"b":2}}'),
        (Partial, '{"first":{"a":1},"either":{"a":1},"lenient":{}}'),
        (Annotated[Pair, BeforeValidator(half)], '"half"'),
        (Box[Pair] | Box[Closed], '{"content":{"a":1}}'),
        (Cat | Dog, '{"kind":"dog","next":{"kind":"cat"}}'),
        (Json[list[Pair]], r'"[{\"a\":1,\"b\":2}]"'),
        (set[int] | list[str], '["x"]'),
        (list[int] | list[str], '["1",2]'),
        (tuple[int, str] | tuple[str, int], '["1","2"]'),
        (dict[int, Pair | None], '{"1":null}'),
        (Tree, '{"children":[{"next":{}}]}'),
        (Binary, '{"a":1,"b":2,"left":{"a":3,"b":4},"right":null}'),
        (Binary | Either, '{"a":1,"b":2,"left":{"a":3,"b":4},"right":7}'),
        (JsonValue, '{"a":[1,2.5,null,{"b":"c"}]}'),
        (bytes | str, '"x"'),
    ],
    ids=named,
)
@pytest.mark.parametrize("stops", [False, True])
def test_both_variants_of_a_schema_read_what_it_reads(kind: Any, item: str, stops: bool) -> None:
    schema = adapter(list[kind]).core_schema
    variant = SchemaValidator(bounds._Shape(schema).variant(stops=stops), _use_prebuilt=False)
    body = f"[{item}]".encode()
    found = variant.validate_json(body)
    assert found == adapter(list[kind]).validate_json(body)
    assert type(found[0]) is type(adapter(list[kind]).validate_json(body)[0])


def test_a_schema_is_left_as_it_was() -> None:
    schema = adapter(list[Pair | Keys]).core_schema
    before = repr(schema)
    bounds._Shape(schema).variant(stops=True)
    assert repr(schema) == before


# Recursive unions.


class Add(BaseModel):
    left: int | Add | Times
    right: int | Add | Times = 1


class Times(BaseModel):
    left: int | Add | Times
    right: int | Add | Times = 1


class InOrder(BaseModel):
    left: Annotated[InOrder | OtherInOrder | None, Field(union_mode="left_to_right")] = None


class OtherInOrder(BaseModel):
    left: Annotated[InOrder | OtherInOrder | None, Field(union_mode="left_to_right")] = None


class Mutual(BaseModel):
    left: Between | dict[str, Between] | None = None


class Between(BaseModel):
    left: Mutual | None = None


class Key(TypedDict):
    left: NotRequired[Key | Fields2]


@dataclasses.dataclass
class Fields2:
    left: Key | Fields2 | None = None


class Wrapped(RootModel[Annotated["list[Wrapped] | tuple[Wrapped, ...] | int", WrapValidator(lambda v, h: h(v))]]): ...


class Several(BaseModel):
    left: list[Several | Several2 | None] = []


class Several2(BaseModel):
    left: list[Several | Several2 | None] = []


Nested = TypeAliasType("Nested", "list[Nested]")  # type: ignore[misc]
Twice = TypeAliasType("Twice", "list[Twice] | tuple[Twice, ...]")  # type: ignore[misc]
Once = TypeAliasType("Once", "int | list[Once]")  # type: ignore[misc]
Plain = TypeAliasType("Plain", "str | dict[str, Plain] | list[Plain]")  # type: ignore[misc]
Pairs = TypeAliasType("Pairs", "list[T | Pairs[T]] | set[T] | tuple[Pairs[T], ...]", type_params=(T,))  # type: ignore[misc]

OBJECT = ('{"left":', "}")
ARRAY = ("[", "]")
EXPONENTIAL = [
    (Add, OBJECT, "1"),
    (InOrder, OBJECT, "{}"),
    (Mutual, OBJECT, "{}"),
    (Key, OBJECT, "{}"),
    (Twice, ARRAY, ""),
    (Wrapped, ARRAY, "1"),
    (Pairs[int], ARRAY, "1"),
    (Several, ('{"left":[', "]}"), "null"),
]


@pytest.mark.parametrize(("kind", "around", "inner"), EXPONENTIAL, ids=named)
@pytest.mark.timeout(30)
def test_a_body_that_would_take_exponential_time_is_refused(kind: Any, around: tuple[str, str], inner: str) -> None:
    for last in (inner, '"x"'):
        with pytest.raises(NotRead, match=r"nested too deeply .* Field\(discriminator=\.\.\.\)"):
            reader(kind)(nested(*around, last, depth=40))


@pytest.mark.parametrize(("kind", "around", "inner"), EXPONENTIAL, ids=named)
def test_a_shallow_value_of_such_a_type_is_read(kind: Any, around: tuple[str, str], inner: str) -> None:
    body = nested(*around, inner, depth=6)
    assert reader(kind)(body) == adapter(kind).validate_json(body)


@pytest.mark.parametrize(("kind", "around", "inner"), EXPONENTIAL, ids=named)
def test_a_shallow_value_that_does_not_fit_such_a_type_has_few_errors(
    kind: Any, around: tuple[str, str], inner: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        reader(kind)(nested(*around, '{"left":"x"}', depth=8))
    assert caught.value.error_count() <= MOST_ERRORS


@pytest.mark.parametrize("kind", [Once, Plain], ids=named)
def test_a_union_that_contains_itself_once_is_read_in_large_bodies_and_not_where_all_of_them_is_deep(kind: Any) -> None:
    item = "1" if kind is Once else '"1"'
    flat = array(item)
    assert reader(kind)(flat) == json.loads(flat)
    deep = nested(*ARRAY, item)
    assert reader(kind)(deep) == json.loads(deep)
    with pytest.raises(NotRead, match="nested too deeply"):
        reader(kind)(array(deep.decode()))


@pytest.mark.parametrize(
    ("kind", "around", "inner"),
    [
        (JsonValue, ARRAY, ""),
        (Tree, ('{"next":', "}"), "{}"),
        (Cat, ('{"kind":"cat","next":', "}"), "null"),
        (Nested, ARRAY, ""),
    ],
    ids=named,
)
def test_a_recursive_type_without_such_a_union_is_read_however_deep_it_is(
    kind: Any, around: tuple[str, str], inner: str
) -> None:
    item = nested(*around, inner)
    assert len(reader(list[kind])(array(item.decode()))) == array(item.decode()).count(item)


@pytest.mark.parametrize(
    ("kind", "item"),
    [
        (Pair | Closed | Keys | dict[str, int], '{"a":1,"b":2}'),
        (Box[Box[Box[int] | Pair] | Pair] | Pair, '{"content":{"content":{"content":1}}}'),
        (list[list[list[int] | tuple[int, ...]] | list[str]] | list[str], "[[[1]]]"),
    ],
    ids=named,
)
def test_unions_inside_of_unions_are_not_recursive(kind: Any, item: str) -> None:
    assert len(reader(list[kind])(array(item))) == array(item).count(item.encode())


def test_a_discriminator_that_is_a_function_copies_what_it_is_given() -> None:
    kind = TypeAliasType(  # type: ignore[misc]
        "kind",
        Annotated[
            Annotated[int, Tag("int")] | Annotated["list[kind]", Tag("list")],
            Discriminator(lambda it: type(it).__name__),
        ],
    )
    assert reader(kind)(b"[1,[2]]") == [1, [2]]
    with pytest.raises(NotRead):
        reader(kind)(array(nested(*ARRAY).decode()))


@pytest.mark.parametrize(("arrays", "objects"), [(1, 1), (2, 1), (1, 2), (3, 3)])
def test_visits_are_counted_level_by_level(arrays: int, objects: int) -> None:
    def visits(value: Any, times: int, above: int) -> int:
        factor = arrays if isinstance(value, list) else objects
        inside = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        times *= factor
        return sum((above + times) + visits(it, times, above + times) for it in inside)

    value = [1, {"a,[": [2, 3, '"]'], "b": {"c": 1, "d": 2}}, [[4, 5], 6]]
    found = count_visits(json.dumps(value).encode(), arrays, objects, BUDGET)
    assert visits(value, 1, 0) <= found <= 2 * visits(value, 1, 0)


def test_counting_ends_where_the_budget_is_spent() -> None:
    assert BUDGET < count_visits(b"[" * SIZE, 2, 2, BUDGET) < 8 * BUDGET


@pytest.mark.parametrize("text", ["".join(it) for it in itertools.product('[]{",\\', repeat=3)])
def test_what_is_no_json_is_counted_all_the_same(text: str) -> None:
    for factors in ((1, 1), (2, 3)):
        assert isinstance(count_visits(text.encode(), *factors, BUDGET), int)

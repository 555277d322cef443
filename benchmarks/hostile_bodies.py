"""How long bodies of 1 MiB with wrong parameters block a worker, and what memory they take.

    python -m benchmarks.hostile_bodies
    python -m benchmarks.hostile_bodies --only union

Each body is validated by a method of its own in a process of its own: CPU time of the thread, and growth of the largest
resident set. What takes longer than 30 seconds is ended. No broker.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, create_model
from typing_extensions import TypeAliasType, TypedDict

from rpcq import Service
from rpcq.errors import InvalidParams

SIZE = 1 << 20
SECONDS = 30

type_of_json = "str | int | float | bool | None | list[Json] | dict[str, Json]"
Json = TypeAliasType("Json", type_of_json)  # type: ignore[misc]  # made from a string for Python 3.11
Nested = TypeAliasType("Nested", "int | list[Nested]")  # type: ignore[misc]
Twice = TypeAliasType("Twice", "list[Twice] | tuple[Twice, ...]")  # type: ignore[misc]


class Five(BaseModel):
    """A model with five fields."""

    a: int
    b: int
    c: int
    d: int
    e: int


class Closed(BaseModel):
    """A model that takes no other fields."""

    model_config = ConfigDict(extra="forbid")
    x: int = 1


class OtherClosed(Closed):
    """Another one."""


class FiveKeys(TypedDict):
    """The same as `Five`."""

    a: int
    b: int
    c: int
    d: int
    e: int


@dataclasses.dataclass
class FiveFields:
    """The same as `Five`."""

    a: int
    b: int
    c: int
    d: int
    e: int


class Add(BaseModel):
    """One of two members of a recursive union."""

    left: int | Add | Times
    right: int | Add | Times


class Times(BaseModel):
    """The other one."""

    left: int | Add | Times
    right: int | Add | Times


class Binary(BaseModel):
    """A recursive type without a union, of which a part may have several mistakes."""

    value: int
    left: Binary | None = None
    right: Binary | None = None


class Tree(BaseModel):
    """A recursive type without a union."""

    children: list[Tree]


class Cat(BaseModel):
    """One of two members of a discriminated union."""

    kind: Literal["cat"]
    next: Annotated[Cat | Dog, Field(discriminator="kind")] | None = None


class Dog(BaseModel):
    """The other one."""

    kind: Literal["dog"]
    next: Annotated[Cat | Dog, Field(discriminator="kind")] | None = None


Twenty: Any = create_model("Twenty", **{f"field_{at}": (int, ...) for at in range(20)})
Hundred: Any = create_model("Hundred", **{f"field_{at}": (int, ...) for at in range(100)})


def array(item: str) -> str:
    """As many items as there is room for."""
    return f"[{','.join([item] * ((SIZE - 20) // (len(item) + 1)))}]"


def keys(value: str) -> str:
    """An object with as many keys as there is room for."""
    return "{" + ",".join(f'"{at:05x}":{value}' for at in range((SIZE - 20) // (len(value) + 9))) + "}"


def nested(before: str, after: str, inner: str = "", depth: int = 180) -> str:
    """One value inside of the other."""
    return before * depth + inner + after * depth


def branches(depth: int = 160) -> str:
    """A chain of objects, with one beside each."""
    chain = "{}"
    for _ in range(depth):
        chain = f'{{"left":{{}},"right":{chain}}}'
    return chain


def of(kind: Any) -> Callable[..., None]:
    """A handler that takes one parameter."""

    def take(x: Any) -> None: ...

    take.__annotations__["x"] = kind
    return take


def only(x: int) -> None: ...  # noqa: D103


def numbers(*args: int) -> None: ...  # noqa: D103


def fives(*args: Five) -> None: ...  # noqa: D103


def named(**params: int) -> None: ...  # noqa: D103


def x(value: str) -> str:
    """The body of a request with this parameter."""
    return f'{{"x":{value}}}'


CASES: dict[str, tuple[Callable[..., None], Callable[[], str]]] = {
    "list[int] of strings": (of(list[int]), lambda: x(array('"x"'))),
    "list[int] of arrays": (of(list[int]), lambda: x(array("[]"))),
    "list[list[int]]": (of(list[list[int]]), lambda: x(array('["x"]'))),
    "dict[str, int]": (of(dict[str, int]), lambda: x(keys('""'))),
    "dict[str, model of 5]": (of(dict[str, Five]), lambda: x(keys("{}"))),
    "extra=forbid, unknown keys": (of(Closed), lambda: x(keys("1"))),
    "union of two extra=forbid": (of(Closed | OtherClosed), lambda: x(keys("1"))),
    "f(x: int), unknown keys": (only, lambda: keys("1")),
    "f(x: int), many by position": (only, lambda: array("1")),
    "f(*args: int)": (numbers, lambda: array('"x"')),
    "f(*args: model of 5)": (fives, lambda: array("{}")),
    "f(**params: int)": (named, lambda: keys('"x"')),
    "list[model of 5], empty": (of(list[Five]), lambda: x(array("{}"))),
    "list[model of 5], 5 wrong": (of(list[Five]), lambda: x(array('{"a":"","b":"","c":"","d":"","e":""}'))),
    "list[model of 20], empty": (of(list[Twenty]), lambda: x(array("{}"))),
    "list[model of 100], empty": (of(list[Hundred]), lambda: x(array("{}"))),
    "list[dataclass of 5], empty": (of(list[FiveFields]), lambda: x(array("{}"))),
    "list[TypedDict of 5], empty": (of(list[FiveKeys]), lambda: x(array("{}"))),
    "model of 20, unknown keys": (of(Twenty), lambda: x(keys("1"))),
    "model of 100, unknown keys": (of(Hundred), lambda: x(keys("1"))),
    "list of a union of 4": (of(list[int | str | float | Five]), lambda: x(array("{}"))),
    "list of a union of models": (of(list[Five | Twenty]), lambda: x(array("{}"))),
    "union of models, unknown keys": (of(Five | Twenty), lambda: x(keys("1"))),
    "list[Binary], missing fields": (of(list[Binary]), lambda: x(array(branches()))),
    "Binary, missing fields": (of(Binary), lambda: x(branches())),
    "recursive union of two models": (of(Add), lambda: x(nested('{"left":1,"right":', "}", '"x"', 24))),
    "recursive union of two arrays": (of(Twice), lambda: x(nested("[", "]", "1", 24))),
    "recursive int | list, deep": (of(Nested), lambda: x(array(nested("[", "]")))),
    "recursive int | list, flat": (of(Nested), lambda: x(array("[]"))),
    "recursive JSON type, deep": (of(Json), lambda: x(array(nested("[", "]")))),
    "recursive JSON type, rows": (of(Json), lambda: x(array('{"name":"n","tags":["a","b"],"at":[1.5,2.5]}'))),
    "recursive JSON type, flat": (of(Json), lambda: x(array("1"))),
    "discriminated union, deep": (of(list[Cat]), lambda: x(array(nested('{"kind":"cat","next":', "}", "1")))),
    "JsonValue, deep": (of(JsonValue), lambda: x(array(nested("[", "]")))),
    "valid: list[int]": (of(list[int]), lambda: x(array("1"))),
    "valid: list[Tree]": (of(list[Tree]), lambda: x(array('{"children":[]}'))),
    "valid: list[model of 5]": (of(list[Five]), lambda: x(array('{"a":1,"b":2,"c":3,"d":4,"e":5}'))),
}


def measure(name: str) -> None:
    """Validate one body, here."""
    handler, make = CASES[name]
    service = Service("hostile")
    service.method(name="take")(handler)
    body = make().encode()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.thread_time()
    try:
        service.methods["take"].parameters.read(body)
        said = "taken"
    except InvalidParams as error:
        said = error.message
    took = time.thread_time() - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"| {name} | {len(body):,} | {took * 1000:,.0f} | {grown / 1024:,.0f} | {said[:100]} |", flush=True)


def main() -> None:
    """Measure each, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the names of those to measure")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one is not None:
        measure(asked.one)
        return
    print("| body | bytes | ms | MB | |\n|---|---|---|---|---|", flush=True)
    for name in CASES:
        if asked.only in name:
            try:
                subprocess.run(
                    [sys.executable, "-m", "benchmarks.hostile_bodies", "--one", name], timeout=SECONDS, check=False
                )
            except subprocess.TimeoutExpired:
                print(f"| {name} | | over {SECONDS} s | | |", flush=True)


if __name__ == "__main__":
    main()

"""Bounds on the time and memory of validating JSON, for every body that a peer may send. Pure.

Pydantic's core collects all errors of a body, each with a copy of the JSON that it is about. So a short body with many
errors can take seconds and gigabytes. A large body is therefore read by a variant of the schema that stops at the
first error of each list and dict. All errors are collected only if there cannot be many.

A union tries its members one after another. A union that contains itself does so again at each level: with two members
that take arrays, or two that take objects, time grows exponentially with the depth. The work that a body can cause is
counted before it is validated, and a body that can cause too much is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from typing import Any, Final, NoReturn, cast

from pydantic import ValidationError
from pydantic_core import CoreConfig, SchemaError, SchemaValidator

MOST_ERRORS: Final = 1000
"""The most errors of one body whose messages are written; above, only the number of errors is."""

_CHEAP: Final = 20_000
"""The most errors that are collected for a better message. They take a few milliseconds."""

_COPIES: Final = 500_000
"""The most JSON values that errors may copy: each missing field copies its object. About 100 ms."""

BUDGET: Final = 1_000_000
"""The most visits of a body's values by members of recursive unions, besides one visit of each value. They take 50 to
250 ms, measured by `benchmarks/hostile_bodies.py`."""

_NO_SCHEMAS: Final = frozenset(
    (
        *("cls", "config", "metadata", "default", "expected", "members", "function", "custom_error_context"),
        *("serialization", "computed_fields", "python_schema"),
    )
)
"""Keys of a schema that contain no schemas for reading JSON."""

_LISTS: Final = frozenset(("list", "tuple", "set", "frozenset", "deque"))
_DICTS: Final = frozenset(("dict", "ordered-dict", "frozendict", "counter"))
_ARRAYS: Final = _LISTS | {"generator"}
_OBJECTS: Final = _DICTS | {"model-fields", "typed-dict", "dataclass-args"}
_BOTH: Final = frozenset(("arguments", "named-tuple"))
_FIELDS: Final = frozenset(("model-field", "dataclass-field", "typed-dict-field", "named-tuple-field"))

_PLAIN: Final = (
    _LISTS | _DICTS | {"str", "int", "float", "bool", "bytes", "none", "decimal", "date", "datetime", "uuid"}
)
_NOTHING: Final = object()

_FITS_NONE: Final = {"custom_error_type": "no_member", "custom_error_message": "Input fits no member of the union"}
_FITS_NOT: Final = {"custom_error_type": "not_fitting", "custom_error_message": "Input does not fit"}

Schema = dict[str, Any]


class NotRead(Exception):
    """A body is refused, because validating it or collecting its errors could take too long."""


def bounded(schema: Any, config: CoreConfig, read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Make a function that reads JSON as `read` does, within bounds; `read` itself if it needs none.

    The function raises pydantic's ValidationError, and `NotRead`.

    Args:
        schema: the core schema that `read` validates.
        config: the config with which the schema is built.
        read: reads a body, and collects all errors.

    """
    shape = _Shape(schema)
    if shape.size <= 1:  # at most one error
        return read
    large = _Large(shape, config, read).read
    # A JSON value takes at least two bytes, with its comma.
    few = 0 if shape.factors is not None else 2 * MOST_ERRORS // shape.size

    def read_bounded(body: bytes) -> Any:
        return read(body) if len(body) <= few else large(body)

    return read_bounded


def first_error(error: ValidationError | NotRead) -> str:
    """The message of the first error; the number of errors if getting the message could take too long."""
    if isinstance(error, NotRead):
        return str(error)
    if error.error_count() > MOST_ERRORS:
        return f"{error.error_count()} errors"
    return str(error.errors(include_url=False, include_context=False, include_input=False)[0]["msg"])


class _Large:
    """Reads bodies that may have many errors.

    Args:
        shape: the properties of the schema.
        config: the config with which the schema is built.
        read: reads a body, and collects all errors.

    """

    def __init__(self, shape: _Shape, config: CoreConfig, read: Callable[[bytes], Any]) -> None:
        self._shape = shape
        self._config = config
        self._read = read
        self._variants: dict[bool, Callable[[bytes], Any]] = {}

    def read(self, body: bytes) -> Any:
        """Read the value of a body.

        Raises:
            ValidationError: it does not fit.
            NotRead: validating it could take too long.

        """
        shape = self._shape
        values = visits = 1 + body.count(b",") + body.count(b"[") + body.count(b"{")
        if shape.is_recursive:
            most = BUDGET + values
            visits = count_visits(body, *(shape.factors or (1, 1)), most)
            if visits > most and shape.factors is not None:
                raise NotRead(
                    "nested too deeply for a type with a union that contains itself; a union of models with "
                    "Field(discriminator=...), or pydantic.JsonValue, has no such limit"
                )
        if visits * shape.size <= MOST_ERRORS:
            return self._read(body)
        try:
            return self._variant(stops=visits * shape.required > _COPIES)(body)
        except ValidationError:
            if visits * shape.size > _CHEAP:
                raise
            try:
                return self._read(body)
            except ValidationError as error:
                if error.error_count() <= MOST_ERRORS:
                    raise
            raise

    def _variant(self, *, stops: bool) -> Callable[[bytes], Any]:
        """A reader that accepts the same bodies with few errors for others; if it `stops`, with few copies too."""
        found = self._variants.get(stops)
        if found is None:
            schema = self._shape.variant(stops=stops)
            try:
                try:
                    # Without this option, models would use their own validators, which are not bounded.
                    validator = SchemaValidator(schema, self._config, _use_prebuilt=False)
                except TypeError:  # pydantic before 2.13 has no such option
                    validator = SchemaValidator(schema, self._config)
                found = validator.validate_json
            except SchemaError:  # a schema of the user's own, which cannot be built again
                found = self._read
            self._variants[stops] = found
        return found


class _Shape:
    """Properties of a schema that decide what validating JSON costs.

    Attributes:
        size: the most errors of one JSON value: the number of its schemas.
        is_recursive: whether a part of the schema contains itself.
        required: the most copies of one object in its errors: one for each field without a default; in a recursive
            schema, one for each level.
        factors: the number of members of a recursive union that read the parts of an array, and of an object; at least
            1 each. None if no union contains itself.

    """

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        nodes = list(_all(schema))
        self._definitions = {it["ref"]: it for node in nodes for it in node.get("definitions", ())}
        inside = {ref: _refs(node) for ref, node in self._definitions.items()}
        self._reached = {ref: _closure(refs, inside) for ref, refs in inside.items()}
        self._sizes: dict[str, int] = {}
        self.size = self._size(schema)
        self._recursive = {ref for ref, reached in self._reached.items() if ref in reached}
        self.is_recursive = bool(self._recursive)
        self.required = max(self.is_recursive, *(len(self._missing(node)) for node in nodes))
        self.factors = self._factors()
        # In these, a missing field does not decide: another part of the schema may fit instead.
        self._doubtful: set[str] = set()
        for node in nodes:
            if _is_doubtful(node):
                self._doubtful |= _closure(_refs(node), inside)

    def variant(self, *, stops: bool) -> Schema:
        """A schema that accepts the same values and gives few errors for others.

        Args:
            stops: raise `NotRead` at once if a field is missing or a recursive part does not fit. Inside a union,
                where another member may fit, do not raise, but let a missing field copy nothing.

        """
        return cast("Schema", self._vary(self._schema, stops=stops, doubtful=False))

    def _vary(self, node: Any, *, stops: bool, doubtful: bool) -> Any:
        if isinstance(node, list | tuple):
            return type(node)(self._vary(it, stops=stops, doubtful=doubtful) for it in node)
        if not isinstance(node, dict):
            return node
        is_schema = isinstance(node.get("type"), str)
        doubtful = doubtful or (is_schema and (_is_doubtful(node) or node.get("ref") in self._doubtful))
        found = {
            key: value if key in _NO_SCHEMAS else self._vary(value, stops=stops, doubtful=doubtful)
            for key, value in node.items()
        }
        if not is_schema:
            return found
        kind = node["type"]
        if kind in _LISTS or kind in _DICTS:
            found["fail_fast"] = True  # pydantic 2.11 ignores it for dicts
        if kind == "union" and "custom_error_type" not in node and self._is_wide(node):
            found |= _FITS_NONE
        for key in ("var_args_schema", "var_kwargs_schema", "extras_schema"):
            if key in found and node.get("var_kwargs_mode") != "unpacked-typed-dict":
                found[key] = _as_one(found[key])
        if stops:
            self._give_defaults(found, doubtful=doubtful)
            if not doubtful and node.get("schema_ref") in self._recursive:
                cls = self._definitions[node["schema_ref"]].get("cls")
                why = f"Input does not fit {getattr(cls, '__name__', 'a recursive type')}"
                return {"type": "default", "schema": found, "on_error": "default", **_refusal(why)}
        return found

    def _give_defaults(self, node: Schema, *, doubtful: bool) -> None:
        """Give required fields a default that fits nothing, or that raises: neither copies the object."""
        for field, name in self._missing(node):
            alias = field.get("validation_alias")
            if not doubtful:
                default = _refusal(f"{alias if isinstance(alias, str) else name}: Field required")
            elif self._takes_json_alone(field["schema"]):
                default = {"default": _NOTHING, "validate_default": True}
            else:
                continue
            field["schema"] = {"type": "default", "schema": field["schema"], **default}
            if node["type"] == "typed-dict":
                field["required"] = False

    def _takes_json_alone(self, node: Schema) -> bool:
        """Whether a schema surely refuses `_NOTHING`, and passes it to no function of the user."""
        node = self._resolved(node)
        if node["type"] in ("nullable", "union"):
            return all(map(self._takes_json_alone, _parts(node)))
        return node["type"] in _PLAIN

    def _missing(self, node: Schema) -> list[tuple[Schema, str]]:
        """The required fields of an object: the node with the schema of each, and its name."""
        if node.get("type") in ("model-fields", "typed-dict"):
            fields = [(name, it) for name, it in node["fields"].items()]
        elif node.get("type") in ("dataclass-args", "named-tuple"):
            fields = [(it["name"], it) for it in node["fields"] if it.get("init", True)]
        elif node.get("type") == "arguments":
            fields = [(it["name"], it) for it in node["arguments_schema"]]
        else:
            return []
        total = node.get("total", (node.get("config") or {}).get("typed_dict_total", True))
        needs = (lambda it: it.get("required", total)) if node["type"] == "typed-dict" else (lambda _: True)
        return [(it, name) for name, it in fields if needs(it) and self._resolved(it["schema"])["type"] != "default"]

    def _resolved(self, node: Schema) -> Schema:
        while node["type"] == "definition-ref":
            node = self._definitions[node["schema_ref"]]
        return node

    def _size(self, node: Schema) -> int:
        if node["type"] == "definition-ref":
            ref = node["schema_ref"]
            if ref not in self._sizes:
                self._sizes[ref] = 0  # a part counts once, at any depth
                self._sizes[ref] = self._size(self._definitions[ref])
            return self._sizes[ref]
        own = node["type"] not in _FIELDS
        return own + sum(map(self._size, _parts(node, "definitions")))

    def _factors(self) -> tuple[int, int] | None:
        found = [
            self._takers(node, ref)
            for ref, definition in self._definitions.items()
            for node in _all(definition)
            if node["type"] == "union" or _calls_discriminator(node)
            if ref in self._reach(node)
        ]
        return (max(1, *(it[0] for it in found)), max(1, *(it[1] for it in found))) if found else None

    def _takers(self, node: Schema, ref: str | None, seen: frozenset[str] = frozenset()) -> tuple[int, int]:
        """How many members of a union take an array, and how many an object; if `ref` is given, only those with it."""
        kind = node["type"]
        if kind == "definition-ref":
            inner = node["schema_ref"]
            return (0, 0) if inner in seen else self._takers(self._definitions[inner], ref, seen | {inner})
        if kind in _ARRAYS or kind in _OBJECTS or kind in _BOTH:
            counts = ref is None or ref in self._reach(node)
            return int(counts and kind not in _OBJECTS), int(counts and kind not in _ARRAYS)
        if kind == "json":  # its JSON is in a string
            return 0, 0
        found = [self._takers(it, ref, seen) for it in _parts(node)] or [(0, 0)]
        combine = sum if kind == "union" else max
        return combine(it[0] for it in found), combine(it[1] for it in found)

    def _is_wide(self, node: Schema) -> bool:
        """Whether a union may have many errors, because several of its members take the same JSON."""
        return max(self._takers(node, None)) > 1

    def _reach(self, node: Schema) -> set[str]:
        refs = _refs(node)
        return refs.union(*(self._reached[ref] for ref in refs))


def _is_doubtful(node: Schema) -> bool:
    """Whether a value that does not fit a part of a schema may still fit the schema."""
    return node["type"] in ("union", "function-wrap") or node.get("on_error", "raise") != "raise"


def _calls_discriminator(node: Schema) -> bool:
    return node["type"] == "tagged-union" and callable(node["discriminator"])


def _as_one(schema: Schema) -> Schema:
    """A schema that gives at most one error."""
    return {"type": "union", "choices": [schema], "mode": "left_to_right", "auto_collapse": False, **_FITS_NOT}


def _refusal(why: str) -> Schema:
    return {"default_factory": partial(_refuse, why)}


def _refuse(why: str) -> NoReturn:
    raise NotRead(why)


def _parts(node: Schema, *without: str) -> Iterator[Schema]:
    """Yield the schemas directly inside a schema."""
    for key, value in node.items():
        if key not in _NO_SCHEMAS and key not in without:
            yield from _schemas(value)


def _schemas(value: Any) -> Iterator[Schema]:
    if isinstance(value, dict):
        if isinstance(value.get("type"), str):
            yield value
        else:
            for it in value.values():
                yield from _schemas(it)
    elif isinstance(value, list | tuple):
        for it in value:
            yield from _schemas(it)


def _all(node: Schema) -> Iterator[Schema]:
    """Yield a schema and all schemas inside it."""
    yield node
    for it in _parts(node):
        yield from _all(it)


def _refs(node: Schema) -> set[str]:
    return {it["schema_ref"] for it in _all(node) if it["type"] == "definition-ref"}


def _closure(refs: set[str], inside: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    rest = list(refs)
    while rest:
        ref = rest.pop()
        if ref not in found:
            found.add(ref)
            rest += inside[ref]
    return found


_STRING: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_OTHERS: Final = bytes(set(range(256)) - set(b"[]{},"))
_STEPS: Final = bytes({91: 1, 123: 1, 93: 255, 125: 255}.get(it, 0) for it in range(256))
"""Translates brackets to their change of the depth, as signed bytes: 1 or -1."""
_BRACKET: Final = re.compile(rb",*[\[\]{}]")


def count_visits(body: bytes, arrays: int, objects: int, most: int) -> int:
    """Count how often members of a union that contains itself may visit the values of a body.

    A member that does not fit copies its value, with all values inside it. So a value is visited once for each level
    above it, times the number of members that read that level.

    Args:
        body: JSON.
        arrays: how many members read the parts of an array.
        objects: how many members read the parts of an object.
        most: counting may end beyond this number.

    """
    # A container of one scalar now looks empty: `[]` or `{}`. Each counts as one value.
    brackets = _STRING.sub(b"", body).translate(None, _OTHERS).replace(b"[]", b"").replace(b"{}", b"")
    if arrays == objects == 1:  # the sum of the depths at all brackets
        return sum(accumulate(memoryview(brackets.translate(_STEPS)).cast("b")))
    found, times, visits = 1, 1, 0
    outer: list[tuple[int, int]] = []
    for token in _BRACKET.finditer(brackets):
        start, end = token.span()
        found += visits * (end - start - 1)
        bracket = brackets[end - 1 : end]
        if bracket in b"[{":
            outer.append((times, visits))
            times *= arrays if bracket == b"[" else objects
            visits += times
            found += visits
        elif outer:
            times, visits = outer.pop()
        if found > most:
            break
    return found

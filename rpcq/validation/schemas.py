"""Codecs: pydantic's adapters, and checks of the schemas inside them. Pure.

Bytes are base64 in JSON. A type is refused if pydantic would read or write it in another way: a model with a config of
its own that does not say how, or a secret in a result, which pydantic writes as asterisks.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, cast

from pydantic import ConfigDict, EncodedBytes, PydanticUserError, Secret, SecretBytes, SecretStr, TypeAdapter
from pydantic.types import Base64Encoder, Base64UrlEncoder
from pydantic_core import CoreConfig, SchemaSerializer, SchemaValidator
from typing_extensions import TypeAliasType

from rpcq.errors import ConfigurationError
from rpcq.validation.bounds import bounded

# Infinities are written as constants, so that `refuse_nan` finds them.
_CONFIG: Final = ConfigDict(ser_json_inf_nan="constants", ser_json_bytes="base64", val_json_bytes="base64")
_CORE_CONFIG: Final = CoreConfig(ser_json_inf_nan="constants", ser_json_bytes="base64", val_json_bytes="base64")

_NO_SCHEMAS: Final = frozenset(("type", "config", "metadata", "default", "expected", "members", "function"))
"""Keys of a schema that contain no schemas, even if a value looks like one."""

_FLOATLESS: Final = frozenset(
    (
        *("int", "str", "bool", "none", "bytes", "decimal", "date", "time", "datetime", "timedelta", "uuid", "url"),
        *("literal", "enum", "list", "tuple", "set", "frozenset", "dict", "nullable", "union", "tagged-union"),
        *("default", "definitions", "definition-ref", "json-or-python", "lax-or-strict", "is-instance", "call"),
        *("arguments", "named-tuple", "named-tuple-field", "typed-dict", "typed-dict-field", "function-after"),
        *("model", "model-fields", "model-field", "dataclass", "dataclass-args", "dataclass-field"),
    )
)
"""Types of schemas that make no float of a number, unless a part of them does."""


@dataclass(frozen=True, slots=True)
class Codec:
    """Reads and writes values of one type.

    Attributes:
        read: reads JSON, within bounds; raises pydantic's ValidationError, and `bounds.NotRead`.
        check: validates a Python value; raises ValidationError.
        write: writes a value as JSON.
        plain: converts a value to dicts, lists and scalars.
        floats: whether `read` may make a float of a number.

    """

    read: Callable[[bytes], Any]
    check: Callable[[Any], Any]
    write: Callable[..., bytes]
    plain: Callable[..., Any]
    floats: bool


def make_codec(kind: Any, label: str, *, written: bool) -> Codec:
    """Make the codec of a type, or of the parameters of a function.

    Args:
        kind: the type, or the function.
        label: the start of error messages, such as "shop.pay takes".
        written: whether such values are written, too.

    Raises:
        ConfigurationError: its bytes or its secrets would arrive as something else.
        PydanticUserError, NameError, TypeError: pydantic has no schema for it.

    """
    adapter = make_adapter(kind)
    if not isinstance(adapter.core_schema, dict):  # pydantic has deferred building it
        adapter.rebuild()
    checker = _Checker(label)
    schema = checker.at(adapter.core_schema, _Spot(written=written))
    validator: Any = adapter.validator
    serializer: Any = adapter.serializer
    if checker.rewritten:
        validator, serializer = SchemaValidator(schema, _CORE_CONFIG), SchemaSerializer(schema, _CORE_CONFIG)
    read = bounded(schema, _CORE_CONFIG, validator.validate_json)
    return Codec(read, validator.validate_python, serializer.to_json, serializer.to_python, checker.floats)


def make_adapter(kind: Any) -> TypeAdapter[Any]:
    """Make pydantic's adapter of a type, with rpcq's config where the type has none.

    Raises:
        PydanticUserError, NameError, TypeError: pydantic has no schema for it.

    """
    try:
        return TypeAdapter(kind, config=_CONFIG)
    except PydanticUserError as error:
        if error.code != "type-adapter-config-unused":
            raise
        if hasattr(kind, "__pydantic_core_schema__"):  # a model, with its own config
            return TypeAdapter(kind)
        # A dataclass or TypedDict without a config takes this one through an alias. Not so a model: pydantic keeps its
        # schema, and writes the alias into it; a later alias at the same address would then count as a circle.
        return TypeAdapter(cast("Any", TypeAliasType("_Alias", kind)), config=_CONFIG)


def type_hints(label: str, function: Callable[..., Any]) -> dict[str, Any]:
    """Resolve the annotations of a function.

    Raises:
        ConfigurationError: an annotation cannot be resolved.

    """
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, AttributeError, SyntaxError, TypeError) as error:
        msg = f"{label} has an annotation that cannot be resolved in its module: {error}"
        raise ConfigurationError(msg) from error


@dataclass(frozen=True, slots=True)
class _Spot:
    """A position in a schema, and the config and the uses that apply there.

    Attributes:
        place: the names of the parameter and the fields that lead to it.
        modes: how the config that applies here reads and writes bytes.
        owner: the name of the class that has this config.
        is_fixed: whether it is inside a class that pydantic has built already, whose codec cannot be changed.
        written: whether pydantic writes values by it.
        read: whether pydantic reads JSON by it.

    """

    place: tuple[str, ...] = ()
    modes: tuple[Any, Any] = ("base64", "base64")
    owner: str = ""
    is_fixed: bool = False
    written: bool = True
    read: bool = True

    @property
    def name(self) -> str:
        """Its name in error messages."""
        return ".".join(self.place) or "root"


class _Checker:
    """Checks all of a schema.

    Attributes:
        floats: whether it may make a float of a number.
        rewritten: whether the schema that `at` returns differs, and has to be used.

    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.floats = False
        self.rewritten = False

    def at(self, node: Any, spot: _Spot) -> Any:
        """Check a part of the schema; return it with `Base64Bytes` as bytes, which are base64 anyway.

        Raises:
            ConfigurationError: bytes or a secret would arrive as something else.

        """
        if isinstance(node, list | tuple):
            return type(node)(self.at(it, spot) for it in node)
        if not isinstance(node, dict):
            return node
        name = node.get("name") or node.get("property_name")
        if isinstance(name, str):
            spot = replace(spot, place=(*spot.place, name))
        inner = spot
        if isinstance(node.get("type"), str):
            if self._is_base64(node, spot):
                self.rewritten = True
                return self.at(node["schema"], spot)
            spot = _under_own_config(node, spot)
            inner = _under_own_serializer(node, spot)
            self._check(node, spot, inner)
        return {key: self._part(key, value, spot, inner) for key, value in node.items()}

    def _part(self, key: str, value: Any, spot: _Spot, inner: _Spot) -> Any:
        if key in _NO_SCHEMAS:
            return value
        if key == "serialization":
            return self.at(value, replace(spot, read=False))
        if key in ("python_schema", "computed_fields"):
            return self.at(value, replace(inner, read=False))
        if isinstance(value, dict) and key == "fields":
            return {name: self.at(it, replace(inner, place=(*inner.place, name))) for name, it in value.items()}
        if isinstance(value, dict) and key == "choices":
            return {tag: self.at(it, inner) for tag, it in value.items()}
        return self.at(value, inner)

    def _check(self, node: dict[str, Any], spot: _Spot, inner: _Spot) -> None:
        if spot.read and (node["type"] not in _FLOATLESS or _is_open(node)):
            self.floats = True
        if spot.written and _is_masked(node):
            raise ConfigurationError(
                f"{self.label} {spot.name}, a secret, which would arrive as asterisks; annotate it with the "
                "type of its value, and return secret.get_secret_value()"
            )
        if node["type"] == "bytes" and (inner.modes[0] is None or inner.modes[0] != inner.modes[1]):
            raise ConfigurationError(
                f"{self.label} {spot.name}, bytes of {spot.owner}, whose config does not say how they are "
                f"written in JSON; give {spot.owner} {_CONFIG_FOR_BYTES}"
            )

    def _is_base64(self, node: dict[str, Any], spot: _Spot) -> bool:
        """Whether it is a `Base64Bytes` or `Base64UrlBytes` that can be read and written as plain bytes."""
        encoded = _encoded(node)
        if encoded is None:
            return False
        is_twice = encoded.encoder in (Base64Encoder, Base64UrlEncoder)
        if spot.modes != ("base64", "base64") or (is_twice and spot.is_fixed):
            raise ConfigurationError(
                f"{self.label} {spot.name}, encoded bytes of {spot.owner}, which would misread some base64; "
                f"annotate it as bytes, and give {spot.owner} {_CONFIG_FOR_BYTES}"
            )
        return is_twice


_CONFIG_FOR_BYTES: Final = "ConfigDict(ser_json_bytes='base64', val_json_bytes='base64')"


def _under_own_config(node: dict[str, Any], spot: _Spot) -> _Spot:
    """The spot under the schema's own config, if it has one."""
    cls = node.get("cls")
    if "config" in node:
        config = node["config"] or {}
        modes = config.get("val_json_bytes"), config.get("ser_json_bytes")
        spot = replace(spot, modes=modes, owner=getattr(cls, "__name__", ""))
    return replace(spot, is_fixed=True) if hasattr(cls, "__pydantic_validator__") else spot


def _under_own_serializer(node: dict[str, Any], spot: _Spot) -> _Spot:
    """The spot for the parts of a schema: not written if the user writes it by a function, or excludes it."""
    written_by = node.get("serialization")
    is_own = isinstance(written_by, dict) and written_by.get("type") == "function-plain"
    if is_own and not _is_masked(node) and _encoded(node) is None:
        return replace(spot, written=False, modes=("own", "own"))
    return replace(spot, written=False) if node.get("serialization_exclude") else spot


def _is_open(node: dict[str, Any]) -> bool:
    """Whether a schema takes more than its parts say: extra fields, infinities, or a constructor's parameters."""
    extra = (node.get("config") or {}).get("extra_fields_behavior"), node.get("extra_behavior")
    return "allow" in extra or bool(node.get("allow_inf_nan") or node.get("custom_init"))


def _is_masked(node: dict[str, Any]) -> bool:
    """Whether values of a schema are written as asterisks."""
    written_by = node.get("serialization")
    return isinstance(written_by, dict) and any(written_by.get("function") is it for it in _masks())


def _encoded(node: dict[str, Any]) -> EncodedBytes | None:
    """The decoder that a schema applies to validated bytes, or None."""
    function = node.get("function")
    owner = getattr(function.get("function"), "__self__", None) if isinstance(function, dict) else None
    return owner if isinstance(owner, EncodedBytes) else None


@functools.cache
def _masks() -> tuple[Any, ...]:
    """The functions with which pydantic writes secrets as asterisks."""
    return tuple(_writers([TypeAdapter(it).core_schema for it in (SecretStr, SecretBytes, Secret[str])]))


def _writers(node: Any) -> Iterator[Any]:
    """Yield the functions that write a schema and its parts."""
    if isinstance(node, dict):
        if isinstance(node.get("serialization"), dict):
            yield node["serialization"].get("function")
        for it in node.values():
            yield from _writers(it)
    elif isinstance(node, list | tuple):
        for it in node:
            yield from _writers(it)

"""What a type reads and writes: pydantic's adapters, and a look at what they are made of. Pure.

Bytes are base64 in JSON. Where pydantic would have it otherwise, a type is refused rather than read wrongly: a model
whose own config decides, and says nothing; a secret in a result, which pydantic writes as asterisks.
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

# Infinities are written out, so that `refuse_nan` sees them.
_CONFIG: Final = ConfigDict(ser_json_inf_nan="constants", ser_json_bytes="base64", val_json_bytes="base64")
_CORE_CONFIG: Final = CoreConfig(ser_json_inf_nan="constants", ser_json_bytes="base64", val_json_bytes="base64")

_NO_SCHEMAS: Final = frozenset(("type", "config", "metadata", "default", "expected", "members", "function"))
"""Keys of a schema that hold no schemas, whatever it looks like."""

_FLOATLESS: Final = frozenset(
    (
        *("int", "str", "bool", "none", "bytes", "decimal", "date", "time", "datetime", "timedelta", "uuid", "url"),
        *("literal", "enum", "list", "tuple", "set", "frozenset", "dict", "nullable", "union", "tagged-union"),
        *("default", "definitions", "definition-ref", "json-or-python", "lax-or-strict", "is-instance", "call"),
        *("arguments", "named-tuple", "named-tuple-field", "typed-dict", "typed-dict-field", "function-after"),
        *("model", "model-fields", "model-field", "dataclass", "dataclass-args", "dataclass-field"),
    )
)
"""Schemas that make no float of a number, unless one of their parts does."""


@dataclass(frozen=True, slots=True)
class Codec:
    """Reads and writes one type.

    Attributes:
        read: from JSON, within bounds; raises pydantic's ValidationError, and `bounds.NotRead`.
        check: from Python; raises ValidationError.
        write: to JSON.
        plain: to what Python has for JSON.
        floats: whether it may read a number as a float.

    """

    read: Callable[[bytes], Any]
    check: Callable[[Any], Any]
    write: Callable[..., bytes]
    plain: Callable[..., Any]
    floats: bool


def make_codec(kind: Any, label: str, *, written: bool) -> Codec:
    """The codec of a type, or of what a function takes.

    Args:
        kind: the type, or the function.
        label: what a message begins with, such as "shop.pay takes".
        written: whether such values are written, too.

    Raises:
        ConfigurationError: its bytes or its secrets would arrive as something else.
        PydanticUserError, NameError, TypeError: pydantic has no schema for it.

    """
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(kind, config=_CONFIG)
    except PydanticUserError as error:
        if error.code != "type-adapter-config-unused":
            raise
        # A model has a config of its own; a dataclass or TypedDict that has none takes this one behind an alias.
        adapter = TypeAdapter(cast("Any", TypeAliasType("_Alias", kind)), config=_CONFIG)
    if not isinstance(adapter.core_schema, dict):  # put off until it is used
        adapter.rebuild()
    look = _Look(label)
    schema = look.at(adapter.core_schema, _Spot(written=written))
    validator: Any = adapter.validator
    serializer: Any = adapter.serializer
    if look.rewritten:
        validator, serializer = SchemaValidator(schema, _CORE_CONFIG), SchemaSerializer(schema, _CORE_CONFIG)
    read = bounded(schema, _CORE_CONFIG, validator.validate_json)
    return Codec(read, validator.validate_python, serializer.to_json, serializer.to_python, look.floats)


def type_hints(label: str, function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function, resolved.

    Raises:
        ConfigurationError: they cannot be.

    """
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, AttributeError, SyntaxError, TypeError) as error:
        msg = f"{label} has an annotation that cannot be resolved where it stands: {error}"
        raise ConfigurationError(msg) from error


@dataclass(frozen=True, slots=True)
class _Spot:
    """A spot in a schema.

    Attributes:
        place: names of the parameter and the fields that lead to it.
        modes: how the config that holds here reads and writes bytes.
        owner: name of the class whose config that is.
        is_fixed: it is inside of a class of pydantic's, which reads and writes as it was made.
        written: whether it is written, by pydantic.
        read: whether JSON is read by it.

    """

    place: tuple[str, ...] = ()
    modes: tuple[Any, Any] = ("base64", "base64")
    owner: str = ""
    is_fixed: bool = False
    written: bool = True
    read: bool = True

    def called(self, otherwise: str) -> str:
        """How a message calls it; `otherwise` where no name leads to it."""
        return ".".join(self.place) or otherwise


class _Look:
    """A look at all of a schema.

    Attributes:
        floats: whether a number may become a float in it.
        rewritten: whether it has to be used as `at` gave it.

    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.floats = False
        self.rewritten = False

    def at(self, node: Any, spot: _Spot) -> Any:
        """Look at a part of the schema; gives it with `Base64Bytes` as bytes, which are base64 anyway.

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
            inner = _without_own_ways(node, spot)
            self._look(node, spot, inner)
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

    def _look(self, node: dict[str, Any], spot: _Spot, inner: _Spot) -> None:
        if spot.read and (node["type"] not in _FLOATLESS or _is_open(node)):
            self.floats = True
        if spot.written and _is_masked(node):
            raise ConfigurationError(
                f"{self.label} {spot.called('what')} is a secret, and would arrive as asterisks; annotate it with the "
                "type of its value, and return secret.get_secret_value()"
            )
        if node["type"] == "bytes" and (inner.modes[0] is None or inner.modes[0] != inner.modes[1]):
            raise ConfigurationError(
                f"{self.label} {spot.called('root')}, bytes of {spot.owner}, whose config does not say how they stand "
                f"in JSON; give {spot.owner} {_SAYS}"
            )

    def _is_base64(self, node: dict[str, Any], spot: _Spot) -> bool:
        """Whether it is a `Base64Bytes` or `Base64UrlBytes`, and can be read and written as bytes."""
        encoded = _encoded(node)
        if encoded is None:
            return False
        is_twice = encoded.encoder in (Base64Encoder, Base64UrlEncoder)
        if spot.modes != ("base64", "base64") or (is_twice and spot.is_fixed):
            raise ConfigurationError(
                f"{self.label} {spot.called('root')}, encoded bytes of {spot.owner}, which would misread some base64; "
                f"annotate it as bytes, and give {spot.owner} {_SAYS}"
            )
        return is_twice


_SAYS: Final = "ConfigDict(ser_json_bytes='base64', val_json_bytes='base64')"


def _under_own_config(node: dict[str, Any], spot: _Spot) -> _Spot:
    """What holds for a schema that may have a config of its own."""
    cls = node.get("cls")
    if "config" in node:
        config = node["config"] or {}
        modes = config.get("val_json_bytes"), config.get("ser_json_bytes")
        spot = replace(spot, modes=modes, owner=getattr(cls, "__name__", ""))
    return replace(spot, is_fixed=True) if hasattr(cls, "__pydantic_validator__") else spot


def _without_own_ways(node: dict[str, Any], spot: _Spot) -> _Spot:
    """What holds for the parts of a schema: the user may write them in an own way, or leave them out."""
    written_by = node.get("serialization")
    is_own = isinstance(written_by, dict) and written_by.get("type") == "function-plain"
    if is_own and not _is_masked(node) and _encoded(node) is None:
        return replace(spot, written=False, modes=("own", "own"))
    return replace(spot, written=False) if node.get("serialization_exclude") else spot


def _is_open(node: dict[str, Any]) -> bool:
    """Whether a schema takes more than it is made of: any number, or any parameters of a constructor."""
    extra = (node.get("config") or {}).get("extra_fields_behavior"), node.get("extra_behavior")
    return "allow" in extra or bool(node.get("allow_inf_nan") or node.get("custom_init"))


def _is_masked(node: dict[str, Any]) -> bool:
    """Whether what a schema describes is written as asterisks."""
    written_by = node.get("serialization")
    return isinstance(written_by, dict) and any(written_by.get("function") is it for it in _masks())


def _encoded(node: dict[str, Any]) -> EncodedBytes | None:
    """By what a schema decodes bytes after they were validated; None if it does not."""
    function = node.get("function")
    owner = getattr(function.get("function"), "__self__", None) if isinstance(function, dict) else None
    return owner if isinstance(owner, EncodedBytes) else None


@functools.cache
def _masks() -> tuple[Any, ...]:
    """The functions by which pydantic writes secrets as asterisks."""
    return tuple(_writers([TypeAdapter(it).core_schema for it in (SecretStr, SecretBytes, Secret[str])]))


def _writers(node: Any) -> Iterator[Any]:
    """The functions by which a schema and its parts are written."""
    if isinstance(node, dict):
        if isinstance(node.get("serialization"), dict):
            yield node["serialization"].get("function")
        for it in node.values():
            yield from _writers(it)
    elif isinstance(node, list | tuple):
        for it in node:
            yield from _writers(it)

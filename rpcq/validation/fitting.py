"""Whether a function fits what a contract says of it: names and kinds of parameters, and types as JSON. Pure.

Everything is compared when a method is defined, never when it is called.
"""

from __future__ import annotations

import inspect
import itertools
import typing
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal, NoReturn

from pydantic import AliasChoices, PydanticUserError
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaWarningKind
from pydantic.warnings import UnsupportedFieldAttributeWarning

from rpcq.validation.schemas import make_adapter

_BY_NAME: Final = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_BY_POSITION: Final = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_PLAIN: Final = (str, int, float, bool, type(None))
_KINDS: Final = {
    inspect.Parameter.POSITIONAL_ONLY: "by position only",
    inspect.Parameter.POSITIONAL_OR_KEYWORD: "by position and by name",
    inspect.Parameter.VAR_POSITIONAL: "as *args",
    inspect.Parameter.KEYWORD_ONLY: "by name only",
    inspect.Parameter.VAR_KEYWORD: "as **kwargs",
}


def misfits(declared: inspect.Signature, offered: inspect.Signature) -> Iterator[str]:
    """Yield what is wrong with an offered function: each call that the declared one allows must be possible.

    The annotations of both must be resolved.
    """
    yield from _parameter_misfits(declared, offered)
    if not _is_within(_annotation(offered.return_annotation), _annotation(declared.return_annotation)):
        yield f"its result must be {_named(declared.return_annotation)}; got {_named(offered.return_annotation)}"


def _parameter_misfits(declared: inspect.Signature, offered: inspect.Signature) -> Iterator[str]:
    theirs = list(declared.parameters.values())
    ours = offered.parameters
    by_position = [it for it in ours.values() if it.kind in _BY_POSITION]
    rest = {it.kind: it for it in ours.values() if it.kind in (it.VAR_POSITIONAL, it.VAR_KEYWORD)}
    taken = set()
    for at, wanted in enumerate(theirs):
        if wanted.kind in (wanted.VAR_POSITIONAL, wanted.VAR_KEYWORD):
            found = rest.get(wanted.kind)
        elif wanted.kind is wanted.POSITIONAL_ONLY:
            found = by_position[at] if at < len(by_position) else rest.get(wanted.VAR_POSITIONAL)
        else:
            found = ours.get(wanted.name, rest.get(wanted.VAR_KEYWORD))
        if found is None:
            yield f"the parameter {wanted.name!r} must be there; got none"
            continue
        taken.add(found.name)
        yield from _parameter_misfit(at, wanted, found, by_position)
    for extra in ours.values():
        if extra.name not in taken and extra.kind not in rest and extra.default is extra.empty:
            yield f"the parameter {extra.name!r} must have a default, because the contract does not have it; got none"


def _parameter_misfit(
    at: int, wanted: inspect.Parameter, found: inspect.Parameter, by_position: list[inspect.Parameter]
) -> Iterator[str]:
    name = f"the parameter {wanted.name!r}"
    is_rest = found.kind in (found.VAR_POSITIONAL, found.VAR_KEYWORD)
    if not is_rest:
        if wanted.kind in _BY_NAME and found.kind not in _BY_NAME:
            yield f"{name} must be taken {_KINDS[wanted.kind]}; got one {_KINDS[found.kind]}"
        elif wanted.kind is wanted.POSITIONAL_OR_KEYWORD and found not in by_position[at : at + 1]:
            yield f"{name} must be number {at + 1} of those that are taken by position; got another place"
        elif wanted.kind in _BY_NAME and (aliases := _aliases(found.annotation)) and wanted.name not in aliases:
            yield f"{name} must be read under this name; got the alias {' or '.join(map(repr, sorted(aliases)))}"
        if wanted.default is not wanted.empty and found.default is found.empty:
            yield f"{name} must have a default, as in the contract; got none"
        elif not _is_same_default(wanted.default, found.default):
            yield f"{name} must have the default {wanted.default!r}, as in the contract; got {found.default!r}"
    if not _is_within(_annotation(wanted.annotation), _annotation(found.annotation)):
        yield f"{name} must take {_named(wanted.annotation)}; got {_named(found.annotation)}"


def _is_same_default(declared: Any, offered: Any) -> bool:
    """Whether two defaults are equal, as far as they can be compared: `...` in a contract is any default."""
    if type(declared) not in _PLAIN or type(offered) not in _PLAIN:
        return True
    return bool(declared == offered)


def _aliases(annotation: Any) -> set[str]:
    """The names in JSON of a parameter that has an alias; none if it has no alias."""
    found: set[str] = set()
    for it in getattr(annotation, "__metadata__", ()):
        if isinstance(it, FieldInfo):
            alias = it.validation_alias or it.alias
            choices = alias.choices if isinstance(alias, AliasChoices) else [alias]
            found |= {choice for choice in choices if isinstance(choice, str)}
    return found


def _annotation(annotation: Any) -> Any:
    return Any if annotation is inspect.Signature.empty else annotation


def _named(annotation: Any) -> str:
    if annotation in (inspect.Signature.empty, Any):
        return "any value (it has no annotation, or Any)"
    return "None" if annotation is type(None) else inspect.formatannotation(annotation)


# Types, as JSON.

_Mode = Literal["validation", "serialization"]
_Json = Mapping[str, Any]

_SAYS_NOTHING: Final = frozenset(
    ("title", "description", "default", "examples", "deprecated", "discriminator", "$defs", "uniqueItems")
)
"""Keywords that refuse no value. Pydantic reads an array into a set even if values are there twice."""

_STRUCTURE: Final = frozenset(
    (
        *("$ref", "type", "const", "enum", "anyOf", "oneOf", "properties", "required", "additionalProperties"),
        *("items", "prefixItems"),
    )
)
_LEAST: Final = frozenset(("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"))
_MOST: Final = frozenset(("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"))


def _is_within(narrow: Any, wide: Any) -> bool:
    """Whether JSON of each value of one type can be read as the other type, without a look at the values."""
    if narrow == wide or wide is Any:
        return True
    try:
        written, read = _schema(narrow, "serialization"), _schema(wide, "validation")
    except (PydanticUserError, PydanticInvalidForJsonSchema, NameError, TypeError):
        return False  # it cannot be compared, and is another type
    return _Comparison(written.get("$defs", {}), read.get("$defs", {})).is_within(written, read)


class _Strict(GenerateJsonSchema):
    """Refuses to leave out a part of a union."""

    def emit_warning(self, kind: JsonSchemaWarningKind, detail: str) -> None:
        if kind == "skipped-choice":
            raise PydanticInvalidForJsonSchema(detail)

    def bytes_schema(self, schema: Any) -> dict[str, Any]:
        return {**super().bytes_schema(schema), "format": "base64"}

    def decimal_schema(self, schema: Any) -> dict[str, Any]:
        found = super().decimal_schema(schema)
        for it in (found, *_choices(found)):
            if it.get("type") == "string":  # not every string is a number
                it["format"] = "decimal"
        return found

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> NoReturn:
        raise PydanticInvalidForJsonSchema(f"{error_info}: {schema.get('type')}")


def _schema(kind: Any, mode: _Mode) -> _Json:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnsupportedFieldAttributeWarning)  # the alias of a parameter, compared already
        return make_adapter(kind).json_schema(mode=mode, schema_generator=_Strict)


class _Comparison:
    """Compares two JSON schemas of pydantic's, each with its own definitions."""

    def __init__(self, narrow: _Json, wide: _Json) -> None:
        self._narrow = narrow
        self._wide = wide
        self._open: set[tuple[str, str]] = set()

    def is_within(self, narrow: Any, wide: Any) -> bool:
        """Whether each value of `narrow` is one of `wide`. What is not understood must be equal."""
        if wide is True or narrow is False:
            return True
        if narrow is True or wide is False:
            narrow, wide = ({} if narrow is True else narrow), ({"enum": []} if wide is False else wide)
        if "$ref" in narrow or "$ref" in wide:
            return self._resolved(narrow, wide)
        narrow = {key: value for key, value in narrow.items() if key not in _SAYS_NOTHING}
        wide = {key: value for key, value in wide.items() if key not in _SAYS_NOTHING}
        if not wide or narrow == wide:
            return True
        if choices := _choices(narrow):
            return all(self.is_within(it, wide) for it in choices)
        if choices := _choices(wide):
            return any(self.is_within(narrow, it) for it in choices)
        if (values := _values(wide)) is not None:
            own = _values(narrow)
            return own is not None and all(_is_among(it, values) for it in own)
        if "type" in wide and not _has_type(narrow, wide["type"]):
            return False
        return (
            all(_keeps(narrow, key, wide[key]) for key in wide.keys() - _STRUCTURE)
            and (wide.get("type") != "object" or self._is_object_within(narrow, wide))
            and (wide.get("type") != "array" or self._is_array_within(narrow, wide))
        )

    def _resolved(self, narrow: _Json, wide: _Json) -> bool:
        pair = repr(narrow), repr(wide)
        if pair in self._open:  # a recursive type: what is being compared already is taken for right
            return True
        self._open.add(pair)
        found = self.is_within(_dereferenced(narrow, self._narrow), _dereferenced(wide, self._wide))
        self._open.discard(pair)
        return found

    def _is_object_within(self, narrow: _Json, wide: _Json) -> bool:
        fields, their_fields = narrow.get("properties", {}), wide.get("properties", {})
        # Written objects have no other fields than those of their type, if the type does not say so.
        others, their_others = narrow.get("additionalProperties", False), wide.get("additionalProperties", True)
        return (
            set(wide.get("required", ())) <= set(narrow.get("required", ()))
            and all(self.is_within(field, their_fields.get(name, their_others)) for name, field in fields.items())
            and (
                others is False
                or all(self.is_within(others, it) for it in (their_others, *_without(their_fields, fields)))
            )
        )

    def _is_array_within(self, narrow: _Json, wide: _Json) -> bool:
        first, their_first = narrow.get("prefixItems", []), wide.get("prefixItems", [])
        rest, their_rest = narrow.get("items", True), wide.get("items", True)
        if "maxItems" in narrow and narrow["maxItems"] <= len(first):
            rest = False  # a tuple of fixed length
        pairs = itertools.zip_longest(first, their_first)
        items = [(rest if it is None else it, their_rest if that is None else that) for it, that in pairs]
        return all(self.is_within(it, that) for it, that in items) and self.is_within(rest, their_rest)


def _choices(schema: _Json) -> list[Any]:
    return typing.cast("list[Any]", schema.get("anyOf") or schema.get("oneOf") or [])


def _values(schema: _Json) -> list[Any] | None:
    """The only values that it allows, or None."""
    if "const" in schema:
        return [schema["const"]]
    return typing.cast("list[Any] | None", schema.get("enum"))


def _is_among(value: Any, values: list[Any]) -> bool:
    return any(type(it) is type(value) and it == value for it in values)


def _has_type(narrow: _Json, kind: str) -> bool:
    own = narrow.get("type")
    if own is not None:
        return bool(own == kind or (own == "integer" and kind == "number"))
    values = _values(narrow)
    names = {str: ("string",), int: ("integer", "number"), float: ("number",), bool: ("boolean",)}
    return values is not None and all(kind in names.get(type(it), ()) for it in values)


def _keeps(narrow: _Json, key: str, limit: Any) -> bool:
    own = narrow.get(key)
    if own is None or own == limit:
        return bool(own == limit)
    return bool(own >= limit if key in _LEAST else own <= limit if key in _MOST else False)


def _without(fields: _Json, others: _Json) -> list[Any]:
    return [field for name, field in fields.items() if name not in others]


def _dereferenced(schema: _Json, definitions: _Json) -> _Json:
    if "$ref" not in schema:
        return schema
    found: _Json = definitions[schema["$ref"].rpartition("/")[2]]
    return found

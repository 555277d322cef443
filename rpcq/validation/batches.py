"""Handlers that take lists: from the handler's signature to that of one call. Pure.

A handler of a batch takes a list for each parameter of a call, with one value for each call, and returns a list with
one result for each call, in the same order. Callers know the signature of one call:

    def embed(text: list[str], model: Sequence[str] = ("small",)) -> list[Vector | EmptyText]   the handler
    def embed(text: str, model: str = "small") -> Vector                                        one call
"""

from __future__ import annotations

import collections.abc
import inspect
import types
import typing
from typing import Any, Final, Union

from rpcq.errors import ConfigurationError

_LISTS: Final = (list, collections.abc.Sequence)
_UNIONS: Final = (Union, types.UnionType)


def signature_of_one(label: str, signature: inspect.Signature) -> inspect.Signature:
    """The signature of one call, from that of a handler that takes lists.

    Args:
        label: the method's name in texts of errors.
        signature: the handler's, without its `Context`s, and with resolved annotations.

    Raises:
        ConfigurationError: the handler does not take lists, or does not return one.

    """
    parameters = [_parameter_of_one(label, it) for it in signature.parameters.values()]
    if not parameters:
        raise ConfigurationError(f"{label} must take a parameter, because it has a batch; got none")
    returns = signature.return_annotation
    one = _item(returns)
    if one is None:
        msg = f"{label} must return a list of results, because it has a batch; got {_named(returns)}"
        raise ConfigurationError(msg)
    return inspect.Signature(parameters, return_annotation=_without_errors(one))


def _parameter_of_one(label: str, parameter: inspect.Parameter) -> inspect.Parameter:
    name = f"the parameter {parameter.name!r} of {label}"
    if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
        raise ConfigurationError(
            f"{name} must have a name for callers, because the method has a batch; got {parameter}"
        )
    one = _item(parameter.annotation)
    if one is None:
        raise ConfigurationError(
            f"{name} must be a list, as in list[str], with the value of each call, because the method has a batch; "
            f"got {_named(parameter.annotation)}"
        )
    default = parameter.default
    if default is not parameter.empty:
        if not isinstance(default, list | tuple) or len(default) != 1:
            raise ConfigurationError(
                f"{name} must have a default with one value, as in ('small',), for a call that does not give it; "
                f"got {default!r}"
            )
        default = default[0]
    return parameter.replace(annotation=one, default=default)


def _item(annotation: Any) -> Any:
    """The type of the items of a list; None if the annotation is not that of a list."""
    if annotation is Any or annotation is inspect.Parameter.empty:
        return Any
    origin = typing.get_origin(annotation)
    if (annotation if origin is None else origin) not in _LISTS:
        return None
    items = typing.get_args(annotation)
    return items[0] if items else Any


def _without_errors(kind: Any) -> Any:
    """The type of a result: that of the items, without classes of exceptions, which stand for calls that failed."""
    if typing.get_origin(kind) not in _UNIONS:
        return kind
    results = [it for it in typing.get_args(kind) if not (isinstance(it, type) and issubclass(it, BaseException))]
    return Union[tuple(results)] if results else kind  # noqa: UP007 - its members are found at run time


def _named(annotation: Any) -> str:
    return "None" if annotation in (None, type(None)) else inspect.formatannotation(annotation)

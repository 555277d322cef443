"""Lists options: the keyword arguments of a function, and its docstring, are those of a class of options. Pure."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from typing import Any, Final, TypeVar

Documented = TypeVar("Documented", bound=Callable[..., Any])


class _Unchanged:
    """In a signature, the default of an option that stays as it is."""

    def __repr__(self) -> str:
        return "..."


_UNCHANGED: Final = _Unchanged()


def lists_options(kind: type[Any], *, changes: bool = False) -> Callable[[Documented], Documented]:
    """Make a decorator for what takes `**options`: its signature and its docstring list them, for `help` and notebooks.

    Args:
        kind: the class of the options.
        changes: an option that is not given stays as it is, so no default is shown.

    """

    def decorate(function: Documented) -> Documented:
        target: Any = vars(function)["__init__"] if isinstance(function, type) else function
        signature = inspect.signature(target)
        kept = [it for it in signature.parameters.values() if it.kind is not it.VAR_KEYWORD]
        hints = typing.get_type_hints(kind)
        listed = [
            inspect.Parameter(
                it.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=_UNCHANGED if changes else it.default_factory() if callable(it.default_factory) else it.default,
                annotation=hints[it.name],
            )
            for it in dataclasses.fields(kind)
        ]
        target.__signature__ = signature.replace(parameters=[*kept, *listed])
        if function.__doc__:  # Python removes docstrings with -OO
            function.__doc__ = f"{inspect.cleandoc(function.__doc__)}\n\nOptions:\n{_descriptions(kind)}\n"
        return function

    return decorate


def _descriptions(kind: type[Any]) -> str:
    """The descriptions of a class's options, those of its bases first."""
    docs = [inspect.cleandoc(it.__doc__ or "") for it in reversed(kind.__mro__) if dataclasses.is_dataclass(it)]
    return "\n".join(doc.partition("Attributes:\n")[2] for doc in docs)

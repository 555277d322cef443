"""Checks of what users give to a service when they define it. Each error names the fix. Pure."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Literal

from rpcq.errors import ConfigurationError


def check_lifespan(service: str, lifespan: Any) -> None:
    """Check a service's lifespan: a function without parameters that returns an async context manager, or None.

    Raises:
        ConfigurationError: it is something else.

    """
    if lifespan is None:
        return
    what = f"lifespan of service {service!r} must be a function decorated with @asynccontextmanager"
    if not isinstance(lifespan, type) and hasattr(lifespan, "__aenter__"):
        raise ConfigurationError(f"{what}; got an open context manager: give the function, and do not call it")
    if not callable(lifespan):
        raise ConfigurationError(f"{what}; got {lifespan!r}")
    if inspect.isasyncgenfunction(lifespan) or inspect.isgeneratorfunction(lifespan):
        raise ConfigurationError(f"{what}; got {lifespan!r}, which is not decorated")
    if inspect.iscoroutinefunction(lifespan):
        raise ConfigurationError(f"{what}, with a yield; got {lifespan!r}, which is a coroutine function")
    try:
        signature = inspect.signature(lifespan)
    except (ValueError, TypeError):
        return  # some builtins
    try:
        signature.bind()
    except TypeError as error:
        msg = f"{what} that takes no parameters; got {signature}: the lifespan of a service gets no app"
        raise ConfigurationError(msg) from error


def check_handler(service: str, handler: Any, what: Literal["method", "job", "subscription"]) -> None:
    """Check that a handler is a function whose caller gives all its parameters; `what` it is to be.

    Raises:
        ConfigurationError: it cannot be called, or it is a function of a class, which needs a `self`.

    """
    is_on = what == "subscription"
    if isinstance(handler, str):
        decorator = f"on(..., name={handler!r})" if is_on else f"{what}(name={handler!r})"
        raise ConfigurationError(f"the name of a {what} must be given as @{service}.{decorator}; got it alone")
    if not callable(handler) or isinstance(handler, type):
        msg = f"the handler of a {what} of service {service!r} must be an async def or a def; got {handler!r}"
        raise ConfigurationError(msg)
    if inspect.isfunction(handler) and (own := _self(handler)):
        raise ConfigurationError(
            f"a handler must not be a function of a class; got {handler.__qualname__}, which takes {own!r}: make an "
            f"object, and register its method: {service}.{'on(...)' if is_on else what}(thing.{handler.__name__})"
        )


def _self(function: Callable[..., Any]) -> str:
    """The name of the parameter that takes the object; empty if the function is not in a class's body."""
    owner = function.__qualname__.rpartition(".")[0]
    first = next(iter(inspect.signature(function).parameters), "")
    return first if owner and not owner.endswith("<locals>") and first in ("self", "cls") else ""


def check_types(service: str, types: Any) -> frozenset[str]:
    """Check `default_types` of a service, and return it as a set."""
    found = None if isinstance(types, str) or not isinstance(types, Iterable) else [*types]
    if found is None or not all(isinstance(it, str) and it for it in found):
        raise ConfigurationError(f"default_types of service {service!r} must be names, as in ('call',); got {types!r}")
    return frozenset(found)


def check_allow(service: str, allow: Any) -> dict[str, frozenset[str]]:
    """Check `allow` of a service, and return it with sets of users."""
    if not isinstance(allow, Mapping):
        raise ConfigurationError(f"allow of service {service!r} must be {_ALLOW_FORM}; got {allow!r}")
    found = {}
    for method, users in allow.items():
        if isinstance(users, str) or not isinstance(users, Iterable):
            raise ConfigurationError(
                f"allow of service {service!r} must be {_ALLOW_FORM}; got {users!r} for {method!r}"
            )
        found[method] = frozenset(users)
        if not all(isinstance(user, str) and user for user in found[method]):
            raise ConfigurationError(
                f"allow of service {service!r} must have names of users for {method!r}; got {users!r}"
            )
    return found


_ALLOW_FORM: Final = 'of the form {"method": ["user", ...]}'

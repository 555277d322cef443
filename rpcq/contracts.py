"""What callers know of a service: a contract, which is a Protocol class; types of parameters and results. Pure."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, NoReturn, TypeVar

import pydantic
from pydantic import PydanticUserError

from rpcq.errors import ConfigurationError, DomainError, InvalidParams, InvalidReply, UsageError
from rpcq.options import check_errors, check_name
from rpcq.validation.attributes import check_attributes
from rpcq.validation.bounds import NotRead
from rpcq.validation.fitting import misfits
from rpcq.validation.parameters import by_name, invalid_params, parameters_codec, positional_names
from rpcq.validation.schemas import Codec, make_codec, type_hints
from rpcq.wire import bodies
from rpcq.wire.values import (
    EXPONENT,
    MARKS,
    MAX_DIGITS,
    OWN_SECRETS,
    NotCarried,
    refuse_beyond_float,
    refuse_changed,
    refuse_nan,
)

METHOD_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,100}\Z")
"""A method's name. It has no dot: `a.b.c` is method `c` of service `a.b`."""

C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Contract:
    """What `contract` attaches to a Protocol class.

    Attributes:
        service: the service's name.
        errors: domain errors that callers want to catch by their class.
        idempotent: names of methods that may be sent again after an attempt that may have run.
        jobs: names of those functions of the class that are jobs.
        blocking: its methods are `def`, because the callers of `rpcq.sync` do not await them.

    """

    service: str
    errors: tuple[type[DomainError], ...] = ()
    idempotent: frozenset[str] = frozenset()
    jobs: frozenset[str] = frozenset()
    blocking: bool = False


def contract(
    service: str,
    *,
    errors: Iterable[type[DomainError]] = (),
    idempotent: Iterable[str] = (),
    jobs: Iterable[str] = (),
) -> Callable[[C], C]:
    """Mark a Protocol class as the contract of a service, for `Client.bind`.

    Args:
        service: the service's name.
        errors: domain errors that callers want to catch by their class.
        idempotent: names of methods that may be sent again after an attempt that may have run.
        jobs: names of those functions of the class that are jobs: they are sent, and nobody waits for them. All others
            are methods, which are called.

    Raises:
        ConfigurationError: a name or an error is not valid, the class has no such method or job, a job is declared
            idempotent, or the class has an attribute that is not an `async def` with a `self`.

    """
    return _mark(_declare(service, errors, idempotent, jobs))


def blocking_contract(
    service: str,
    *,
    errors: Iterable[type[DomainError]] = (),
    idempotent: Iterable[str] = (),
    jobs: Iterable[str] = (),
) -> Callable[[C], C]:
    """Mark a Protocol class whose functions are `def` as the contract of a service, for `rpcq.sync.Client.bind`.

    It is `rpcq.sync.contract`. Its arguments are those of `rpcq.contract`.

    Raises:
        ConfigurationError: as for `rpcq.contract`, but each function of the class must be a `def`.

    """
    declared = replace(_declare(service, errors, idempotent, jobs), blocking=True)

    def mark(api: C) -> C:
        for name, function in vars(api).items():
            if not name.startswith("_") and inspect.iscoroutinefunction(function):
                label = f"{getattr(api, '__name__', api)}.{name}"
                raise ConfigurationError(
                    f"{label} must be a def, because callers of rpcq.sync do not await it; got an async def: write "
                    f"'def {name}', or use rpcq.contract, and client.call({label}, ...)"
                )
        return _mark(declared)(api)

    return mark


def _declare(
    service: str, errors: Iterable[type[DomainError]], idempotent: Iterable[str], jobs: Iterable[str]
) -> Contract:
    """Check the arguments of a contract."""
    check_name("the name of a service", service)
    declared = Contract(
        service, check_errors(errors), _check_names("idempotent", idempotent), _check_names("jobs", jobs)
    )
    if both := sorted(declared.idempotent & declared.jobs):
        raise ConfigurationError(
            f"idempotent in the contract of {service!r} must not name jobs, each of which may run twice in any case; "
            f"got {both}"
        )
    return declared


def _check_names(what: str, names: Any) -> frozenset[str]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise ConfigurationError(f"{what} of a contract must be names, as in {what}=['name']; got {names!r}")
    found = [*names]
    if wrong := [name for name in found if not isinstance(name, str)]:
        raise ConfigurationError(
            f"{what} of a contract must be names, as in {what}=['name']; got {wrong[0]!r} among them"
        )
    return frozenset(found)


def _mark(declared: Contract) -> Callable[[C], C]:
    def mark(api: C) -> C:
        check_attributes(declared.errors)
        has = methods_of(api, is_awaited=not declared.blocking).keys()
        for what, names in (("idempotent", declared.idempotent), ("jobs", declared.jobs)):
            if unknown := sorted(names - has):
                raise ConfigurationError(
                    f"{what} in the contract of {declared.service!r} must name functions of its class, which has "
                    f"{', '.join(has) or 'none'}; got {unknown}"
                )
        api.__rpcq_contract__ = declared  # type: ignore[attr-defined]  # read by `Client.bind`
        for function in vars(api).values():
            if inspect.isfunction(function):
                function.__rpcq_api__ = api  # type: ignore[attr-defined]  # read by `rpcq.sync`, and by `send`
        return api

    return mark


def contract_of(api: Any, service: str | None = None) -> Contract:
    """The contract of a Protocol class, under the service's name if one is given.

    Raises:
        ConfigurationError: no service is named, or the name is not valid.

    """
    declared: Contract | None = getattr(api, "__rpcq_contract__", None)
    if service is not None:
        check_name("the name of a service", service)
        return Contract(service) if declared is None else replace(declared, service=service)
    if declared is None:
        msg = f"{api!r} names no service: decorate it with @contract('name'), or give the name"
        raise ConfigurationError(msg)
    return declared


def methods_of(api: Any, *, is_awaited: bool = True) -> dict[str, Callable[..., Any]]:
    """The functions of a Protocol class, by name: its methods and its jobs.

    Args:
        api: the class.
        is_awaited: whether callers await its methods, as those of `rpcq.sync` do not.

    Raises:
        ConfigurationError: the class has an attribute that is not an `async def` with a `self`, or a `def` where nobody
            awaits.

    """
    found = {name: inspect.getattr_static(api, name) for name in dir(api) if not name.startswith("_")}
    for name, function in found.items():
        if not inspect.isfunction(function):
            raise ConfigurationError(f"a contract must have only methods; {api!r} has {name!r}")
        label = f"{getattr(api, '__name__', api)}.{name}"
        if is_awaited and not inspect.iscoroutinefunction(function):
            msg = f"{label} must be an async def, because its callers await it; got a def: write 'async def {name}'"
            raise ConfigurationError(msg)
        first = next(iter(inspect.signature(function).parameters.values()), None)
        if first is None or first.annotation is not first.empty or first.kind is first.KEYWORD_ONLY:
            raise ConfigurationError(f"{label} must take self first; got {inspect.signature(function)}")
    return found


class Obligation:
    """What a service has to offer by its contract.

    Args:
        api: the Protocol class.
        service: the service's name; None for the one in the class's `contract`.

    Attributes:
        contract: the contract.

    Raises:
        ConfigurationError: as for `contract_of` and `methods_of`.

    """

    def __init__(self, api: Any, service: str | None) -> None:
        self.contract = contract_of(api, service)
        self._api = getattr(api, "__name__", repr(api))
        methods = methods_of(api, is_awaited=not self.contract.blocking)
        self._signatures = {name: signature_of(f"{self._api}.{name}", it) for name, it in methods.items()}

    def check_method(
        self, name: str, signature: inspect.Signature, errors: Iterable[type[DomainError]], *, idempotent: bool
    ) -> None:
        """Check a method whose handler has this signature, without its `Context` and with resolved annotations.

        Raises:
            ConfigurationError: the contract does not have it, or it does not fit.

        """
        label = f"{self.contract.service}.{name}"
        if name not in self._signatures:
            has = ", ".join(it for it in self._signatures if it not in self.contract.jobs) or "none"
            raise ConfigurationError(f"{label} must be a method of its contract {self._api}, which has {has}")
        if name in self.contract.jobs:
            raise ConfigurationError(
                f"{label} must be a job, as in its contract {self._api}: decorate it with .job instead of .method"
            )
        self._check_fits(label, name, signature)
        self.check_errors(label, errors)
        if idempotent and name not in self.contract.idempotent:
            msg = f"{label} must be idempotent in its contract, too: @contract(..., idempotent=[{name!r}])"
            raise ConfigurationError(msg)

    def check_job(self, name: str, signature: inspect.Signature) -> None:
        """Check a job whose handler has this signature. One that the contract does not have is the service's own.

        Raises:
            ConfigurationError: it is a method of the contract, or it does not fit.

        """
        if name not in self._signatures:
            return
        label = f"{self.contract.service}.{name}"
        if name not in self.contract.jobs:
            raise ConfigurationError(
                f"{label} must be a method, as in its contract {self._api}: decorate it with .method instead of .job, "
                f"or make it a job there: @contract(..., jobs=[{name!r}])"
            )
        self._check_fits(label, name, signature)

    def _check_fits(self, label: str, name: str, signature: inspect.Signature) -> None:
        if found := list(misfits(self._signatures[name], signature)):
            raise ConfigurationError(f"{label} must fit its contract {self._api}: {'; '.join(found)}")

    def check_errors(self, label: str, errors: Iterable[type[DomainError]]) -> None:
        """Check that callers who bind the contract know these errors.

        Raises:
            ConfigurationError: the contract does not have one of them.

        """
        if unknown := [it.__name__ for it in errors if it not in self.contract.errors]:
            msg = f"errors of {label} must be in its contract {self._api}, too: @contract(..., errors=[{unknown[0]}])"
            raise ConfigurationError(msg)

    def check_complete(self, offered: Collection[str]) -> None:
        """Check that all methods and jobs are there.

        Args:
            offered: the names of the service's methods and jobs.

        Raises:
            ConfigurationError: one is missing.

        """
        missing = [name for name in self._signatures if name not in offered]
        for what, names in (
            ("methods", [name for name in missing if name not in self.contract.jobs]),
            ("jobs", [name for name in missing if name in self.contract.jobs]),
        ):
            if names:
                msg = (
                    f"service {self.contract.service!r} must have all {what} of its contract {self._api}; "
                    f"got none called {' or '.join(map(repr, names))}"
                )
                raise ConfigurationError(msg)


def signature_of(label: str, function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a contract's method without its `self`, with resolved annotations.

    Raises:
        ConfigurationError: an annotation cannot be resolved.

    """
    hints = type_hints(label, function)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    known = [it.replace(annotation=hints.get(it.name, Any)) for it in parameters]
    return inspect.Signature(known, return_annotation=hints.get("return", Any))


class Parameters:
    """Reads the parameters of a method or a job.

    Args:
        label: its name in texts of errors, `service.name`.
        signature: its parameters, with resolved annotations.

    Raises:
        ConfigurationError: pydantic has no schema for a parameter.

    """

    def __init__(self, label: str, signature: inspect.Signature) -> None:
        self._label = label
        self._names = positional_names(signature)
        codec = parameters_codec(label, signature)
        self._read, self._floats = codec.read, codec.floats

    def by_name(self, args: tuple[Any, ...], params: Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """Put arguments given by position under their names; see `by_name`."""
        return by_name(self._label, self._names, args, params)

    def read(self, body: bytes) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Read the arguments from a request's body: an object by name, an array by position, a scalar as the only one.

        An empty body is no arguments.

        Raises:
            InvalidParams: the body is not JSON, or does not fit; `details` lists the errors.

        """
        found: tuple[tuple[Any, ...], dict[str, Any]] = read_fitting(self._read_any, body, self._label)
        return found

    def _read_any(self, body: bytes) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if body[:1] not in (b"{", b"[") and body.lstrip()[:1] not in (b"{", b"["):
            if body:
                bodies.loads(body)  # validate first: `1, 2` must not become `[1, 2]`
            body = b"[%b]" % body
        found: tuple[tuple[Any, ...], dict[str, Any]] = self._read(refuse_nan(body))
        if self._floats:
            refuse_beyond_float(body, found, self._read)
        return found

    def check_none_needed(self) -> None:
        """Check that none has to be given.

        Raises:
            ConfigurationError: one has no default.

        """
        try:
            self.read(b"")
        except InvalidParams as error:
            raise ConfigurationError(f"{self._label} must have a default for each parameter: {error}") from error


def read_fitting(read: Callable[[bytes], Any], body: bytes, label: str, what: str = "parameters") -> Any:
    """Read a body that has to fit the types of a function, or of a class.

    Args:
        read: reads it.
        body: the body.
        label: the name of the function or of the class, in texts of errors.
        what: what the body has.

    Raises:
        InvalidParams: the body is not JSON, or does not fit; `details` lists the errors.

    """
    try:
        return read(body)
    except pydantic.ValidationError as error:
        raise invalid_params(label, error, what) from error
    except (NotCarried, NotRead) as error:
        raise InvalidParams(f"the {what} of {label} cannot be read: {error}") from error
    except ValueError as error:
        why = bodies.why_not_json(body, error)
        raise InvalidParams(f"the {what} of {label} are not JSON: {why}") from error
    except Exception as error:
        msg = f"the {what} of {label} could not be validated: a validator raised {type(error).__name__}"
        raise InvalidParams(msg) from error


class RemoteJob:
    """A job of a bound contract, for `Client.send`. It belongs to no client; its parameters are checked before sending.

    Args:
        service: the service's name.
        name: the job's name.
        function: the contract's function.

    Raises:
        ConfigurationError: an annotation cannot be resolved, or pydantic has no schema for it.

    """

    def __init__(self, service: str, name: str, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function, updated=())
        del self.__dict__["__wrapped__"]  # it has a `self`
        self.service = service
        self.name = name
        self.label = f"{service}.{name}"
        signature = signature_of(self.label, function)
        self.__signature__ = signature
        # To pydantic, a parameter with the default `...` is required; to a contract, it has some default.
        given = [it.replace(default=None) if it.default is ... else it for it in signature.parameters.values()]
        self.parameters = Parameters(self.label, signature.replace(parameters=given))
        self._result: Result | None = None

    def read_result(self, body: bytes) -> Any:
        """Read the result of the job from JSON, as the contract annotates it.

        Raises:
            ConfigurationError: pydantic has no schema for the annotation.
            ValidationError, NotRead, InvalidReply, ValueError: it does not fit the annotation, or is not JSON.

        """
        if self._result is None:
            self._result = result_adapter(self.label, self.__signature__.return_annotation)
        return self._result.read(body)

    def with_options(self, **_: Any) -> NoReturn:
        """Refuse: the options of a job are those of the client that sends it."""
        raise UsageError(
            f"{self.label} is a job: give the options to what sends it, client.with_options(...).send(...)"
        )

    def __call__(self, /, *_: Any, **__: Any) -> NoReturn:
        """Refuse: a job is sent."""
        raise UsageError(f"{self.label} is a job: send it, client.send(bound.{self.name}, ...); it cannot be called")

    def __repr__(self) -> str:
        return f"<RemoteJob {self.label}>"


class RemoteCallable:
    """A method of a service that a client has bound: it is called, and cannot be sent."""

    __slots__ = ()


class Result:
    """Reads and writes values of one type."""

    def __init__(self, label: str, codec: Codec) -> None:
        self.label = label
        self._check = codec.check
        self._write = codec.write
        self._plain = codec.plain
        self._read = codec.read
        self.read: Callable[[bytes], Any] = self._read_floats if codec.floats else codec.read
        """Read a value from JSON. Raises pydantic's ValidationError, `bounds.NotRead` and InvalidReply."""

    def _read_floats(self, body: bytes) -> Any:
        value = self._read(body)
        if type(value) is float and math.isfinite(value):
            return value
        # Hot path: check here before calling `refuse_beyond_float`, as in `bodies.loads`.
        is_suspect = len(body) > 200 or body.translate(MARKS, b"+").rfind(EXPONENT) >= 0
        if is_suspect or body.find(b"N") >= 0 or body.find(b"I") >= 0:
            try:
                refuse_beyond_float(refuse_nan(body), value, self._read)
            except ValueError as error:
                raise InvalidReply(f"the result of {self.label} cannot be read: {error}") from error
        return value

    def write(self, value: Any) -> bytes:
        """Write a value as JSON. Fields are written by their aliases, because the other side reads those."""
        valid = self._check(value)
        body = refuse_nan(self._write(valid, by_alias=True))
        if body.find(b"null") >= 0 and valid is not None:  # may be a model's NaN: a model has its own mode
            bodies.dumps(self._plain(valid, mode="json", by_alias=True))
        if body.find(b"*") >= 0 or len(body) > MAX_DIGITS or OWN_SECRETS():
            refuse_changed(valid, body)
        return body


def adapter_of(label: str, returns: Any) -> Result:
    """The `Result` that reads values of a type; it is made once for each type.

    Raises:
        ConfigurationError: as for `result_adapter`.

    """
    try:
        return _adapter_of(label, returns)
    except TypeError:  # unhashable, such as Annotated[..., []]
        return result_adapter(label, returns)


@functools.lru_cache(maxsize=1024)
def _adapter_of(label: str, returns: Any) -> Result:
    return result_adapter(label, returns)


def result_adapter(label: str, returns: Any, *, written: bool = False) -> Result:
    """Make the `Result` of the type that `label` returns; `written` if values are written, too.

    Raises:
        ConfigurationError: pydantic has no schema for the type, or would change its secrets or bytes on the way.

    """
    try:
        return Result(label, make_codec(returns, f"{label} returns", written=written))
    except (PydanticUserError, NameError, TypeError) as error:
        msg = f"{label} returns {returns!r}, which pydantic cannot handle: {error}"
        raise ConfigurationError(msg) from error

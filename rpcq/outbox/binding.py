"""The jobs of a contract, for an outbox that sends them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from rpcq.contracts import RemoteJob, contract_of, methods_of
from rpcq.errors import ConfigurationError, UsageError


class BoundJobs:
    """The jobs of a Protocol class, as attributes.

    Args:
        api: the class.
        service: name of the service; that of the class's `contract` if None.

    Raises:
        ConfigurationError: no service is named, the class has an attribute that is no method of a contract, or it has
            no jobs.

    """

    def __init__(self, api: Callable[..., Any], service: str | None) -> None:
        declared = contract_of(api, service)
        functions = methods_of(api, is_awaited=not declared.blocking)
        label = f"{getattr(api, '__name__', api)} of service {declared.service!r}"
        if not declared.jobs:
            raise ConfigurationError(f"api must have jobs, as in @contract(..., jobs=[...]); got {label}, without any")
        self._label = label
        self._methods = functions.keys() - declared.jobs
        for name in declared.jobs:
            setattr(self, name, RemoteJob(declared.service, name, functions[name]))

    def __getattr__(self, name: str) -> NoReturn:
        if not name.startswith("_") and name in self._methods:
            raise UsageError(f"{name!r} is a method of {self._label}, and an outbox sends jobs: call it with a client")
        raise AttributeError(name)

    def __repr__(self) -> str:
        return f"<jobs of {self._label}>"

"""Call remote functions as awaitables, over RabbitMQ."""

from typing import TYPE_CHECKING

from rpcq.client import Client
from rpcq.contracts import contract
from rpcq.errors import (
    BrokerError,
    CallError,
    CallTimeout,
    ClosedError,
    ConfigurationError,
    DomainError,
    InvalidParams,
    InvalidReply,
    MethodNotFound,
    NotSerializable,
    OutcomeUnknown,
    Overloaded,
    PermissionDenied,
    RemoteError,
    RpcqError,
    ServiceUnavailable,
    TooLarge,
    UsageError,
)
from rpcq.options import Retry
from rpcq.runtime.process import own_version
from rpcq.service import Context, Service
from rpcq.worker import Worker

__all__ = [
    "BrokerError",
    "CallError",
    "CallTimeout",
    "Client",
    "ClosedError",
    "ConfigurationError",
    "Context",
    "DomainError",
    "InvalidParams",
    "InvalidReply",
    "MethodNotFound",
    "NotSerializable",
    "OutcomeUnknown",
    "Overloaded",
    "PermissionDenied",
    "RemoteError",
    "Retry",
    "RpcqError",
    "Service",
    "ServiceUnavailable",
    "TooLarge",
    "UsageError",
    "Worker",
    "contract",
]


__version__: str

if not TYPE_CHECKING:  # to a type checker, it would have every name

    def __getattr__(name: str) -> str:
        if name == "__version__":  # read when asked for: it is looked up on disk
            return own_version()
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)

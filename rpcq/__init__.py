"""Call remote functions as awaitables, over RabbitMQ."""

from rpcq.client import Client
from rpcq.contract import Context, Service, contract
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
    RemoteError,
    RpcqError,
    ServiceUnavailable,
    TooLarge,
    UsageError,
)
from rpcq.settings import Retry
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

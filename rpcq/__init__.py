"""Call remote functions as awaitables, over RabbitMQ."""

from typing import TYPE_CHECKING

from rpcq.calls.proxy import CallMaker, ServiceProxy, WatchingCallMaker, with_options
from rpcq.client import Client
from rpcq.contracts import contract
from rpcq.control import JobInfo, MethodInfo, ServiceInfo, SubscriptionInfo, WorkerInfo, WorkerStats
from rpcq.errors import (
    BrokerError,
    CallError,
    CallTimeout,
    ClosedError,
    ConfigurationError,
    DomainError,
    GiveUp,
    InvalidParams,
    InvalidReply,
    JobFailed,
    MethodNotFound,
    NoResult,
    NotSerializable,
    OutcomeUnknown,
    Overloaded,
    PermissionDenied,
    RemoteError,
    RetryLater,
    RpcqError,
    SendError,
    ServiceUnavailable,
    TooLarge,
    UsageError,
)
from rpcq.event_types import AnyEvent, Event
from rpcq.observer import (
    Observed,
    ObservedBatch,
    ObservedCall,
    ObservedJob,
    ObservedPublish,
    ObservedRequest,
    ObservedSend,
    ObservedWrite,
    Observer,
)
from rpcq.options import Batch, CallOptions, ClientOptions, ConnectionOptions, JobOptions, Retry, WorkerOptions
from rpcq.results import Claim, ResultStore, StoredResult
from rpcq.runtime.deadline import Deadline
from rpcq.runtime.process import own_version
from rpcq.schedules import Cron, Every
from rpcq.service import Context, Service
from rpcq.watching import WatchedJob
from rpcq.wire.events import Publication
from rpcq.wire.jobs import Job
from rpcq.wire.watching import Progress
from rpcq.worker import Worker

__all__ = [
    "AnyEvent",
    "Batch",
    "BrokerError",
    "CallError",
    "CallMaker",
    "CallOptions",
    "CallTimeout",
    "Claim",
    "Client",
    "ClientOptions",
    "ClosedError",
    "ConfigurationError",
    "ConnectionOptions",
    "Context",
    "Cron",
    "Deadline",
    "DomainError",
    "Event",
    "Every",
    "GiveUp",
    "InvalidParams",
    "InvalidReply",
    "Job",
    "JobFailed",
    "JobInfo",
    "JobOptions",
    "MethodInfo",
    "MethodNotFound",
    "NoResult",
    "NotSerializable",
    "Observed",
    "ObservedBatch",
    "ObservedCall",
    "ObservedJob",
    "ObservedPublish",
    "ObservedRequest",
    "ObservedSend",
    "ObservedWrite",
    "Observer",
    "OutcomeUnknown",
    "Overloaded",
    "PermissionDenied",
    "Progress",
    "Publication",
    "RemoteError",
    "ResultStore",
    "Retry",
    "RetryLater",
    "RpcqError",
    "SendError",
    "Service",
    "ServiceInfo",
    "ServiceProxy",
    "ServiceUnavailable",
    "StoredResult",
    "SubscriptionInfo",
    "TooLarge",
    "UsageError",
    "WatchedJob",
    "WatchingCallMaker",
    "Worker",
    "WorkerInfo",
    "WorkerOptions",
    "WorkerStats",
    "contract",
    "with_options",
]


__version__: str

if not TYPE_CHECKING:  # to a type checker, it would have every name

    def __getattr__(name: str) -> str:
        if name == "__version__":  # read when asked for: it is looked up on disk
            return own_version()
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)

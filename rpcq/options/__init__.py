"""Frozen option objects, checked when they are made. Reads no environment.

Beside each class is a `TypedDict` with the same names: callers give options as keyword arguments
(`Client(url, timeout=5)`, `with_options(timeout=2)`), type checkers know them, and inside rpcq they are one object.
Times are seconds, sizes are bytes.
"""

from rpcq.options.batches import Batch
from rpcq.options.calls import CallKwargs, CallOptions, UntypedCallKwargs, UnwatchedCallKwargs
from rpcq.options.checks import (
    MAX_DELAY,
    MAX_HEADERS,
    MAX_PROPERTIES,
    MAX_TIMEOUT,
    NAME,
    NAMESPACE,
    OWNED_HEADERS,
    check_amount,
    check_delay,
    check_errors,
    check_name,
    check_seconds,
    size_of,
)
from rpcq.options.connections import (
    ClientKwargs,
    ClientOptions,
    ConnectionKwargs,
    ConnectionOptions,
    WorkerKwargs,
    WorkerOptions,
)
from rpcq.options.jobs import JOB_RETRY, JobOptions, Priority
from rpcq.options.retries import Retry

__all__ = [
    "JOB_RETRY",
    "MAX_DELAY",
    "MAX_HEADERS",
    "MAX_PROPERTIES",
    "MAX_TIMEOUT",
    "NAME",
    "NAMESPACE",
    "OWNED_HEADERS",
    "Batch",
    "CallKwargs",
    "CallOptions",
    "ClientKwargs",
    "ClientOptions",
    "ConnectionKwargs",
    "ConnectionOptions",
    "JobOptions",
    "Priority",
    "Retry",
    "UntypedCallKwargs",
    "UnwatchedCallKwargs",
    "WorkerKwargs",
    "WorkerOptions",
    "check_amount",
    "check_delay",
    "check_errors",
    "check_name",
    "check_seconds",
    "size_of",
]

"""Control messages: questions to workers, their answers, and cancellations of calls.

`rpcq list`, `rpcq describe`, `rpcq ping` and `Client.wait_for_service` ask workers who is there, what they serve and
in what state they are. Each worker answers for itself.
"""

from rpcq.control.answering import MOST_ANSWERS, MOST_QUESTIONS, Answerer
from rpcq.control.asking import PING_TIMEOUT, Control
from rpcq.control.infos import (
    JobInfo,
    MethodInfo,
    ServiceInfo,
    SubscriptionInfo,
    WorkerInfo,
    WorkerStats,
    describe,
)

__all__ = [
    "MOST_ANSWERS",
    "MOST_QUESTIONS",
    "PING_TIMEOUT",
    "Answerer",
    "Control",
    "JobInfo",
    "MethodInfo",
    "ServiceInfo",
    "SubscriptionInfo",
    "WorkerInfo",
    "WorkerStats",
    "describe",
]

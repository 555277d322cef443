"""Metrics for Prometheus: `Client(observers=[Metrics()])`, and the same with a worker. Needs prometheus-client.

A call costs two look-ups and a few additions: numbers are only added up, and become samples when they are scraped.
Names follow https://prometheus.io/docs/practices/naming/: base units, `_total` on counters.
"""

from __future__ import annotations

import asyncio
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from rpcq.observability.counting import (
    BUCKETS,
    JOB_BUCKETS,
    OTHER,
    OTHER_CODE,
    SIZE_BUCKETS,
    BatchCounts,
    Histogram,
    JobCounts,
    MethodCounts,
    batch_counts,
    job_counts,
    method_counts,
    new_code,
)
from rpcq.observer import (
    OK,
    Carried,
    Counted,
    Observed,
    ObservedBatch,
    ObservedCall,
    ObservedJob,
    ObservedPublish,
    ObservedRequest,
    ObservedSend,
    Observer,
    Role,
)
from rpcq.runtime.process import own_version

if TYPE_CHECKING:
    from rpcq.observability.queues import QueueDepth

LAG_BUCKETS: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)

LAG_EVERY: Final = 0.5
"""Seconds between two measurements of how late the event loop runs a timer."""

REASONS: Final = frozenset({"expired", "delivery_limit", "rejected", "maxlen"})
"""Reasons for which RabbitMQ dead-letters a message: https://www.rabbitmq.com/docs/dlx."""

SERVED: Final = frozenset({"calls", "jobs", "events", "suspects", "tickets"})
"""Kinds of queues that have consumers while all is well."""

HEARD: Final[Mapping[bool | None, str]] = {True: "yes", False: "no", None: "unknown"}
"""Whether a queue took an event -> the label."""

OWNED: Final[Mapping[str, tuple[str, str, Mapping[str, str]]]] = {
    "pending_replies": ("rpcq_client_pending_replies", "Calls that wait for a reply.", {}),
    "watched_jobs": ("rpcq_client_watched_jobs", "Jobs that the client watches, and that have not ended.", {}),
    "late_replies": ("rpcq_client_unmatched_replies", "Replies for no call under way.", {"reason": "late"}),
    "duplicate_replies": ("rpcq_client_unmatched_replies", "", {"reason": "duplicate"}),
    "stray_replies": ("rpcq_client_unmatched_replies", "", {"reason": "stray"}),
    "resent": ("rpcq_client_requests_resent", "Requests sent again after a loss of session or worker, or a stop.", {}),
    "retried": ("rpcq_client_calls_retried", "Calls made again, because of their option retry.", {}),
    "in_flight": ("rpcq_worker_requests_in_hand", "Requests that are not acknowledged yet.", {}),
    "jobs_in_hand": ("rpcq_worker_jobs_in_hand", "Jobs that are not acknowledged yet.", {}),
    "finished": ("rpcq_worker_requests_acknowledged", "Requests that were acknowledged.", {}),
    "refused_redeliveries": (
        "rpcq_worker_refused_redeliveries",
        "Requests answered and not run: a worker that held them was lost.",
        {},
    ),
    "expired_on_arrival": (
        "rpcq_worker_expired_on_arrival",
        "Requests answered and not run: their deadline had passed.",
        {},
    ),
    "unroutable_replies": ("rpcq_worker_unroutable_replies", "Replies whose caller was gone.", {}),
    "replayed": ("rpcq_worker_replayed_results", "Requests answered with a stored result.", {}),
    "reply_messages": ("rpcq_worker_reply_messages", "Messages that replies took: one may have several.", {}),
    "loop_blocks": ("rpcq_event_loop_blocks", "Times that a handler blocked the event loop (blocked_after).", {}),
}
"""Key of `Counted.counts` -> name, help and labels of the metric."""

GAUGES: Final = frozenset({"pending_replies", "watched_jobs", "in_flight", "jobs_in_hand"})
"""Keys of `OWNED` whose numbers can also fall."""


@dataclass
class _Sessions:
    """The sessions of one role."""

    ups: int = 0
    downs: Counter[str] = field(default_factory=Counter)


class Metrics(Observer):
    """Counts calls, requests, jobs, events, notices and sessions for Prometheus. One is enough for an event loop.

    The number of series is bounded, whatever peers send. At most 1000 methods, 1000 jobs and 1000 events have series
    of their own at each side; a subscription counts as a job of its service. For each method, gRPC's status names and
    the first 50 codes of services' own errors have series of their own; all further codes are counted together as
    `OTHER`, and so are reasons of notices that RabbitMQ does not have.

    Args:
        registry: registry that it adds itself to; None for prometheus-client's own.

    Raises:
        ValueError: the registry has a `Metrics` already.

    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._calls: dict[str, MethodCounts] = {}
        self._requests: dict[str, MethodCounts] = {}
        self._sends: dict[str, JobCounts] = {}
        self._publishes: dict[str, JobCounts] = {}
        self._jobs: dict[str, JobCounts] = {}
        self._batches: dict[str, BatchCounts] = {}
        self._messages: dict[Carried, Histogram] = {
            "requests": Histogram(SIZE_BUCKETS),
            "replies": Histogram(SIZE_BUCKETS),
        }
        self._notices: Counter[str] = Counter()
        self._sessions: dict[Role, _Sessions] = {"consuming": _Sessions(), "publishing": _Sessions()}
        self._up: set[tuple[Counted, Role]] = set()
        self._owners: list[Counted] = []
        self._past: Counter[str] = Counter()
        self._lag = Histogram(LAG_BUCKETS)
        self._lag_timer: asyncio.TimerHandle | None = None
        self._depths: dict[str, QueueDepth] = {}
        self._call_ended: Callable[[ObservedCall], None] = self._ended_of(self._calls)
        self._request_ended: Callable[[ObservedRequest], None] = self._ended_of(self._requests)
        (REGISTRY if registry is None else registry).register(self)

    # As an observer, in the event loop.

    def on_call(self, call: ObservedCall) -> Callable[[ObservedCall], None]:
        """See `Observer`."""
        (self._calls.get(call.label) or method_counts(self._calls, call)).started += 1
        return self._call_ended

    def on_request(self, request: ObservedRequest) -> Callable[[ObservedRequest], None]:
        """See `Observer`."""
        method = self._requests.get(request.label) or method_counts(self._requests, request)
        method.started += 1
        if request.queue_seconds is not None:
            method.queue.add(request.queue_seconds)
        return self._request_ended

    def on_send(self, send: ObservedSend) -> Callable[[ObservedSend], None]:
        """See `Observer`."""
        job_counts(self._sends, send, BUCKETS).started += 1
        return self._send_ended

    def _send_ended(self, send: ObservedSend) -> None:
        job = job_counts(self._sends, send, BUCKETS)
        job.ended[(send.queued,)] += 1
        job.seconds.add(send.seconds)

    def on_publish(self, publish: ObservedPublish) -> Callable[[ObservedPublish], None]:
        """See `Observer`."""
        job_counts(self._publishes, publish, BUCKETS).started += 1
        return self._publish_ended

    def _publish_ended(self, publish: ObservedPublish) -> None:
        event = job_counts(self._publishes, publish, BUCKETS)
        event.ended[publish.queued, HEARD[publish.heard]] += 1
        event.seconds.add(publish.seconds)

    def on_job(self, job: ObservedJob) -> Callable[[ObservedJob], None]:
        """See `Observer`."""
        if job.ran:
            numbers = job_counts(self._jobs, job, JOB_BUCKETS)
            numbers.started += 1
            numbers.running += 1
            if job.queue_seconds is not None:
                numbers.queue.add(job.queue_seconds)
        return self._job_ended

    def _job_ended(self, job: ObservedJob) -> None:
        numbers = job_counts(self._jobs, job, JOB_BUCKETS)
        numbers.ended[job.outcome, "" if job.code == OK else job.code] += 1
        if job.ran:
            numbers.running -= 1
            numbers.seconds.add(job.seconds)

    def on_batch(self, batch: ObservedBatch) -> None:
        """See `Observer`."""
        found = batch_counts(self._batches, batch)
        found.sizes.add(batch.size)
        found.seconds.add(batch.seconds)

    def on_message(self, carried: Carried, calls: int) -> None:
        """See `Observer`."""
        self._messages[carried].add(calls)

    def on_notice(self, reason: str) -> None:
        """See `Observer`."""
        self._notices[reason if reason in REASONS else OTHER_CODE] += 1

    def on_session(self, owner: Counted, role: Role, cause: BaseException | None) -> None:
        """See `Observer`."""
        sessions = self._sessions[role]
        if cause is None:
            sessions.ups += 1
            self._up.add((owner, role))
        else:
            sessions.downs[type(cause).__name__] += 1
            self._up.discard((owner, role))

    def on_opened(self, owner: Counted) -> None:
        """See `Observer`."""
        self._owners.append(owner)
        if self._lag_timer is None:
            loop = asyncio.get_running_loop()
            self._lag_timer = loop.call_later(LAG_EVERY, self._look_at_lag, loop, loop.time() + LAG_EVERY)

    def on_closed(self, owner: Counted) -> None:
        """See `Observer`."""
        if owner not in self._owners:
            return
        self._owners.remove(owner)
        self._up -= {(owner, "consuming"), (owner, "publishing")}
        self._past.update({name: count for name, count in owner.counts().items() if name not in GAUGES})
        if not self._owners and self._lag_timer is not None:
            self._lag_timer.cancel()
            self._lag_timer = None

    def on_depth(self, depth: QueueDepth) -> None:
        """Keep the depth of a queue: for `QueueWatch(on_depth=metrics.on_depth)`."""
        self._depths[depth.queue] = depth

    def _ended_of(self, methods: dict[str, MethodCounts]) -> Callable[[Observed], None]:
        find = methods.get

        def ended(observed: Observed) -> None:
            method = find(observed.label) or methods[OTHER]
            codes, code = method.codes, observed.code
            if code not in codes:
                code = new_code(codes, code)
            codes[code] += 1
            if not isinstance(observed, ObservedRequest) or observed.ran:
                method.seconds.add(observed.seconds)

        return ended

    def _look_at_lag(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        self._lag.add(max(0.0, loop.time() - due))
        self._lag_timer = loop.call_later(LAG_EVERY, self._look_at_lag, loop, loop.time() + LAG_EVERY)

    # For scraping, in any thread. Each dict and each list is copied in one step, since the event loop may change it.

    def describe(self) -> Iterable[Metric]:
        """Return the families without samples, for the registry."""
        return [Metric(family.name, family.documentation, family.type) for family in self.collect()]

    def collect(self) -> Iterator[Metric]:
        """Return all families with their samples."""
        yield InfoMetricFamily(
            "rpcq_build", "Versions.", {"version": own_version(), "python": platform.python_version()}
        )
        yield from self._of_methods("rpcq_client_calls", "rpcq_client_call", "Calls", self._calls)
        yield from self._of_methods("rpcq_worker_requests", "rpcq_worker_handler", "Requests", self._requests)
        waits = HistogramMetricFamily(
            "rpcq_worker_queue_wait_seconds",
            "From the client to the handler, by the clocks of both.",
            labels=["service", "method"],
        )
        for method in list(self._requests.values()):
            method.queue.sample(waits, method.labels)
        yield waits
        yield from self._of_batches()
        carried = HistogramMetricFamily(
            "rpcq_calls_per_message", "Requests, or replies, in a message that was published.", labels=["kind"]
        )
        for kind, sizes in self._messages.items():
            sizes.sample(carried, [kind])
        yield carried
        notices = CounterMetricFamily(
            "rpcq_client_notices", "Requests that a queue gave up, by the broker's reason.", labels=["reason"]
        )
        for reason, count in list(self._notices.items()):
            notices.add_metric([reason], count)
        yield notices
        yield from self._of_sends()
        yield from self._of_publishes()
        yield from self._of_jobs()
        yield from self._of_owners()
        yield from self._of_sessions()
        lag = HistogramMetricFamily("rpcq_event_loop_lag_seconds", "How late the event loop runs a timer.")
        self._lag.sample(lag, [])
        yield lag
        yield from self._of_queues()

    def _of_methods(self, calls: str, call: str, what: str, methods: dict[str, MethodCounts]) -> Iterator[Metric]:
        labels = ["service", "method"]
        started = CounterMetricFamily(f"{calls}_started", f"{what} that began.", labels=labels)
        finished = CounterMetricFamily(f"{calls}_finished", f"{what} that ended, by code.", labels=[*labels, "code"])
        in_flight = GaugeMetricFamily(f"{calls}_in_flight", f"{what} that began and have not ended.", labels=labels)
        seconds = HistogramMetricFamily(f"{call}_duration_seconds", "How long they took.", labels=labels)
        for method in list(methods.values()):
            values = method.labels
            codes, begun = list(method.codes.items()), method.started
            started.add_metric(values, begun)
            in_flight.add_metric(values, max(0, begun - sum(count for _, count in codes)))
            method.seconds.sample(seconds, values)
            for code, count in codes:
                finished.add_metric([*values, code], count)
        yield from (started, finished, in_flight, seconds)

    def _of_batches(self) -> Iterator[Metric]:
        labels = ["service", "method"]
        sizes = HistogramMetricFamily("rpcq_worker_batch_size", "Calls that a handler took together.", labels=labels)
        seconds = HistogramMetricFamily(
            "rpcq_worker_batch_duration_seconds", "How long handlers took for a batch.", labels=labels
        )
        for batched in list(self._batches.values()):
            batched.sizes.sample(sizes, batched.labels)
            batched.seconds.sample(seconds, batched.labels)
        yield from (sizes, seconds)

    def _of_sends(self) -> Iterator[Metric]:
        labels = ["service", "method"]
        sent = CounterMetricFamily(
            "rpcq_client_jobs_sent",
            "Jobs whose send ended, by whether the broker has them.",
            labels=[*labels, "queued"],
        )
        in_flight = GaugeMetricFamily("rpcq_client_jobs_in_flight", "Jobs that are being sent.", labels=labels)
        seconds = HistogramMetricFamily("rpcq_client_job_send_duration_seconds", "How long sends took.", labels=labels)
        for job in list(self._sends.values()):
            ended, started = list(job.ended.items()), job.started
            in_flight.add_metric(job.labels, max(0, started - sum(count for _, count in ended)))
            job.seconds.sample(seconds, job.labels)
            for (queued,), count in ended:
                sent.add_metric([*job.labels, queued], count)
        yield from (sent, in_flight, seconds)

    def _of_publishes(self) -> Iterator[Metric]:
        published = CounterMetricFamily(
            "rpcq_client_events_published",
            "Events whose publishing ended, by whether the broker has them, and whether a queue took them.",
            labels=["event", "queued", "heard"],
        )
        in_flight = GaugeMetricFamily(
            "rpcq_client_events_in_flight", "Events that are being published.", labels=["event"]
        )
        seconds = HistogramMetricFamily(
            "rpcq_client_event_publish_duration_seconds", "How long publishing took.", labels=["event"]
        )
        for event in list(self._publishes.values()):
            name = event.labels[1] or OTHER
            ended, started = list(event.ended.items()), event.started
            in_flight.add_metric([name], max(0, started - sum(count for _, count in ended)))
            event.seconds.sample(seconds, [name])
            for labels, count in ended:
                published.add_metric([name, *labels], count)
        yield from (published, in_flight, seconds)

    def _of_jobs(self) -> Iterator[Metric]:
        labels = ["service", "method"]
        started = CounterMetricFamily("rpcq_worker_jobs_started", "Attempts whose handler was entered.", labels=labels)
        ended = CounterMetricFamily(
            "rpcq_worker_jobs_ended",
            "Attempts whose outcome was decided, in a handler or before it.",
            labels=[*labels, "outcome", "reason"],
        )
        running = GaugeMetricFamily("rpcq_worker_jobs_in_flight", "Handlers of jobs that run.", labels=labels)
        seconds = HistogramMetricFamily(
            "rpcq_worker_job_duration_seconds", "How long handlers of jobs took.", labels=labels
        )
        waits = HistogramMetricFamily(
            "rpcq_worker_job_queue_wait_seconds",
            "From the sender to the handler, by the clocks of both; first attempts only.",
            labels=labels,
        )
        for job in list(self._jobs.values()):
            started.add_metric(job.labels, job.started)
            running.add_metric(job.labels, job.running)
            job.seconds.sample(seconds, job.labels)
            job.queue.sample(waits, job.labels)
            for (outcome, reason), count in list(job.ended.items()):
                ended.add_metric([*job.labels, outcome, reason], count)
        yield from (started, ended, running, seconds, waits)

    def _of_owners(self) -> Iterator[Metric]:
        totals: Counter[str] = Counter(self._past)
        for owner in list(self._owners):
            totals.update(owner.counts())
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for key, (name, text, labels) in OWNED.items():
            family = families.get(name)
            if family is None:
                kind = GaugeMetricFamily if key in GAUGES else CounterMetricFamily
                family = families[name] = kind(name, text, labels=list(labels))
            family.add_metric(list(labels.values()), totals[key])
        yield from families.values()

    def _of_sessions(self) -> Iterator[Metric]:
        wanted = GaugeMetricFamily("rpcq_sessions", "Sessions that should be up.", labels=["role"])
        up = GaugeMetricFamily("rpcq_sessions_up", "Sessions that are up.", labels=["role"])
        ups = CounterMetricFamily("rpcq_session_ups", "Times that a session came up.", labels=["role"])
        downs = CounterMetricFamily(
            "rpcq_session_downs", "Times that a session went down, by its cause.", labels=["role", "cause"]
        )
        now_up = list(self._up)
        for role, sessions in self._sessions.items():
            wanted.add_metric([role], len(self._owners))
            up.add_metric([role], sum(1 for _, it in now_up if it == role))
            ups.add_metric([role], sessions.ups)
            for cause, count in list(sessions.downs.items()):
                downs.add_metric([role, cause], count)
        yield from (wanted, up, ups, downs)

    def _of_queues(self) -> Iterator[Metric]:
        labels = ["service", "queue", "kind"]
        messages = GaugeMetricFamily("rpcq_queue_messages", "Messages that wait.", labels=labels)
        consumers = GaugeMetricFamily("rpcq_queue_consumers", "Consumers of a queue that workers serve.", labels=labels)
        held = GaugeMetricFamily(
            "rpcq_queue_unacknowledged", "Messages that consumers hold; only from the management API.", labels=labels
        )
        moving = GaugeMetricFamily(
            "rpcq_queue_moving",
            "Messages that a queue gave up, and that their next queue did not take yet; only from the management API.",
            labels=labels,
        )
        for depth in list(self._depths.values()):
            values = [depth.service, depth.queue, depth.kind]
            messages.add_metric(values, depth.messages)
            if depth.kind in SERVED:
                consumers.add_metric(values, depth.consumers)
            if depth.unacknowledged is not None:
                held.add_metric(values, depth.unacknowledged)
            if depth.moving is not None:
                moving.add_metric(values, depth.moving)
        yield from (messages, held, consumers, moving)

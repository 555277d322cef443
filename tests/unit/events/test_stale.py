"""What is left of earlier deploys."""

from rpcq.control import JobInfo, ServiceInfo, SubscriptionInfo
from rpcq.events.stale import Found, look, service_of
from rpcq.wire.events import EventTopology

NAMES = EventTopology("rpcq")


def subscription(service: str, name: str, *patterns: str, queue: str | None = None) -> SubscriptionInfo:
    queue = NAMES.queue(service, name, ()).name if queue is None else queue
    return SubscriptionInfo(name, "(event)", patterns, 300.0, 8, queue=queue)


def service(name: str, *subscriptions: SubscriptionInfo, jobs: bool = False, lanes: bool = False) -> ServiceInfo:
    own = (JobInfo("work", "()", 300.0, 8),) if jobs else ()
    return ServiceInfo(name, f"rpcq.req.{name}", "classic", jobs=own, lanes=lanes, subscriptions=subscriptions)


def stale(*services: ServiceInfo, queues: list[str], bindings: list[tuple[str, str]], named: list[str]) -> set[str]:
    found = look(NAMES, services, queues, bindings, named)
    return {it.pattern or it.queue for it in found if it.is_stale}


def test_only_queues_of_jobs_tickets_and_events_belong_to_a_service() -> None:
    names = {
        "rpcq.job.a.b:high": "a.b",
        "rpcq.cron.a": "a",
        "rpcq.sub.a.b:ship:suspects": "a.b",
        "rpcq.dead.a": "",
        "rpcq.delay.03": "",
        "rpcq.lost": "",
        "rpcq.req.a": "",
        "other.job.a": "",
    }
    assert {queue: service_of(NAMES, queue) for queue in names} == names


def test_what_a_running_worker_does_not_declare_any_more_is_stale() -> None:
    queues = ["rpcq.sub.s:ship", "rpcq.sub.s:ship:suspects", "rpcq.sub.s:old", "rpcq.sub.s:old:suspects", "rpcq.dead.s"]
    bindings = [("rpcq.sub.s:ship", "order.*"), ("rpcq.sub.s:ship", "invoice.*"), ("rpcq.sub.s:old", "old.*")]
    now = service("s", subscription("s", "ship", "order.*"))
    assert stale(now, queues=queues, bindings=bindings, named=[]) == {
        "rpcq.sub.s:old",
        "rpcq.sub.s:old:suspects",
        "invoice.*",
    }  # the binding of a queue that goes is not named besides


def test_while_two_versions_run_what_either_declares_is_not_stale() -> None:
    old = service("s", subscription("s", "ship", "invoice.*"), subscription("s", "old", "old.*"))
    new = service("s", subscription("s", "ship", "order.*"))
    queues = ["rpcq.sub.s:ship", "rpcq.sub.s:old"]
    bindings = [("rpcq.sub.s:ship", "order.*"), ("rpcq.sub.s:ship", "invoice.*"), ("rpcq.sub.s:old", "old.*")]
    assert stale(old, new, queues=queues, bindings=bindings, named=[]) == set()


def test_a_service_without_a_worker_is_left_alone_unless_it_is_named() -> None:
    queues, bindings = ["rpcq.sub.down:ship", "rpcq.job.down"], [("rpcq.sub.down:ship", "#")]
    up = service("up", subscription("up", "ship", "#"))
    assert stale(up, queues=queues, bindings=bindings, named=[]) == set()
    assert stale(up, queues=queues, bindings=bindings, named=["down"]) == {*queues}
    assert stale(up, queues=["rpcq.sub.up:old"], bindings=[], named=["down"]) == set()


def test_queues_of_jobs_lanes_and_schedules_are_stale_without_them() -> None:
    queues = ["rpcq.job.s", "rpcq.job.s:high", "rpcq.job.s:suspects", "rpcq.cron.s"]
    assert stale(service("s", jobs=True), queues=queues, bindings=[], named=[]) == {"rpcq.job.s:high", "rpcq.cron.s"}
    assert stale(service("s", jobs=True, lanes=True), queues=queues, bindings=[], named=[]) == {"rpcq.cron.s"}
    assert stale(service("s"), queues=queues, bindings=[], named=[]) == {*queues}


def test_a_queue_that_is_bound_by_hand_is_not_touched() -> None:
    found = look(NAMES, [service("s")], ["mine"], [("mine", "#")])
    assert found == []


def test_a_subscription_of_each_instance_has_no_queue_that_could_be_stale() -> None:
    each = subscription("s", "cache", "#", queue="")
    assert look(NAMES, [service("s", each)], ["rpcq.sub.s:cache"], []) == [
        Found("s", "rpcq.sub.s:cache", "", is_stale=True)  # of a deploy in which it was none
    ]

"""Whether a request runs, and for how long."""

from __future__ import annotations

from typing import Any

import pytest

from rpcq.calls.admission import CallInvocation, ExpiredOnArrival, MayHaveRun, admit, never_no, why_it_may_have_run
from rpcq.errors import (
    CallError,
    CallTimeout,
    InvalidParams,
    MethodNotFound,
    OutcomeUnknown,
    Overloaded,
    ServiceUnavailable,
    TooLarge,
)
from rpcq.options import MAX_TIMEOUT
from rpcq.runtime.deadline import Deadline
from rpcq.service import Context, Service
from rpcq.wire import requests

WALL = 1_800_000_000_000.0  # milliseconds since the epoch
NOW = 5_000.0  # seconds on the monotonic clock


def service() -> Service:
    made = Service("things", timeout=20.0)

    @made.method
    async def add(x: int, y: int = 1) -> int:
        return x + y

    @made.method(idempotent=True, timeout=0.5)
    async def again(context: Context) -> Context:
        return context

    return made


def ask(method: str | None = "add", **headers: Any) -> requests.Request:
    return requests.Request(b"id", b"amq.gen-1", method, **headers)


def admitted(request: requests.Request, body: bytes | None = b'{"x": 1}', **options: Any) -> CallInvocation:
    given: dict[str, Any] = {"max_body": 100, "wall_ms": WALL, "now": NOW} | options
    size = given.pop("body_size", len(body or b""))
    return admit(given.pop("service", None) or service(), request, body, size, **given)


def test_a_request_that_fits_may_run() -> None:
    job = admitted(ask(), b"[2, 3]")
    assert (job.method.name, job.args, job.params) == ("add", (2, 3), {})


@pytest.mark.parametrize(
    ("deadline_in_ms", "timeout_ms", "left"),
    [
        pytest.param(None, None, 20.0, id="neither: the service's own"),
        pytest.param(None, 4_000, 4.0, id="only the relative one"),
        pytest.param(4_000, None, 4.0, id="only the absolute one"),
        pytest.param(3_000, 4_000, 3.0, id="a second went by on the way"),
        pytest.param(3_604_000, 4_000, 4.0, id="this clock is an hour behind: the relative one counts"),
        pytest.param(None, 10**9, MAX_TIMEOUT, id="never longer than the broker lets a consumer hold a message"),
    ],
)
def test_a_call_has_the_time_that_its_caller_left_it(
    deadline_in_ms: int | None, timeout_ms: int | None, left: float
) -> None:
    deadline_ms = None if deadline_in_ms is None else int(WALL) + deadline_in_ms
    job = admitted(ask(deadline_ms=deadline_ms, timeout_ms=timeout_ms))
    assert job.deadline == pytest.approx(NOW + left - min(0.1, left / 20))


def test_a_deadline_that_has_passed_always_counts_as_where_this_clock_is_ahead() -> None:
    with pytest.raises(ExpiredOnArrival, match="3596000 ms ago") as caught:
        admitted(ask(deadline_ms=int(WALL) - 3_596_000, timeout_ms=4_000))
    assert caught.value.executed == "no"


@pytest.mark.parametrize("timeout_ms", [0, -5])
def test_no_time_left_is_a_timeout_before_it_ran(timeout_ms: int) -> None:
    with pytest.raises(CallTimeout) as caught:
        admitted(ask(timeout_ms=timeout_ms))
    assert caught.value.executed == "no"


def test_a_methods_own_timeout_does_not_run_yet() -> None:
    assert admitted(ask("again"), b"{}").deadline == admitted(ask()).deadline


def test_the_time_on_the_way_is_known_where_both_times_are() -> None:
    assert admitted(ask(deadline_ms=int(WALL) + 3_000, timeout_ms=4_000)).queue_ms == 1_000
    assert admitted(ask(deadline_ms=int(WALL) + 5_000, timeout_ms=4_000)).queue_ms == 0
    assert admitted(ask(timeout_ms=4_000)).queue_ms is None


LOST = MayHaveRun("the worker that held the call was lost")


def test_a_request_that_may_have_run_never_runs() -> None:
    with pytest.raises(MayHaveRun) as caught:
        admitted(ask(), may_have_run=LOST)
    assert caught.value.executed == "maybe"


@pytest.mark.parametrize("redelivered", [False, True])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("has_copy", [False, True])
def test_a_request_may_have_run_if_it_was_delivered_before_or_left_the_exchange_that_it_was_sent_to(
    redelivered: bool, moved: bool, has_copy: bool
) -> None:
    why = why_it_may_have_run(ask(has_copy=has_copy), redelivered=redelivered, moved=moved)
    assert (why is not None) is (redelivered or (moved and has_copy))
    assert why is None or why.executed == "maybe"


REFUSALS = [
    InvalidParams("x"),
    MethodNotFound("x"),
    ServiceUnavailable("x"),
    Overloaded("x"),
    CallTimeout("x", executed="no"),
    ExpiredOnArrival(5),
    TooLarge("x"),
]


@pytest.mark.parametrize("error", REFUSALS, ids=lambda it: type(it).__name__)
def test_of_what_may_have_run_no_refusal_says_that_it_did_not(error: CallError) -> None:
    assert error.executed == "no"
    assert never_no(error, None) is error
    told = never_no(error, LOST)
    kind = CallTimeout if isinstance(error, CallTimeout) else MayHaveRun
    assert (type(told), told.executed, told.retryable) == (kind, "maybe", False)
    assert told.message == f"{LOST.message}; this worker refuses it: {error.message}"


@pytest.mark.parametrize("error", [CallTimeout("x", executed="yes"), LOST, OutcomeUnknown("x")], ids=repr)
def test_what_is_known_of_a_run_is_told_as_it_is(error: CallError) -> None:
    assert never_no(error, LOST) is error


def test_a_further_attempt_runs_only_where_the_method_is_idempotent() -> None:
    with pytest.raises(OutcomeUnknown, match="not declared idempotent"):
        admitted(ask(attempt=2))
    assert admitted(ask("again", attempt=2), b"{}").request.attempt == 2


def test_a_request_with_a_key_that_may_have_run_is_barred_and_not_refused_since_its_answer_may_be_remembered() -> None:
    again = admitted(ask("again", idempotency_key="k", attempt=2), b"[]")
    assert again.deduplication is not None
    assert (again.deduplication.key, again.deduplication.barred) == ("things//k", None)
    attempt = admitted(ask("add", idempotency_key="k", attempt=2))
    assert attempt.deduplication is not None
    assert isinstance(attempt.deduplication.barred, OutcomeUnknown)
    redelivered = admitted(ask("again", idempotency_key="k"), b"[]", may_have_run=LOST)
    assert redelivered.deduplication is not None
    assert redelivered.deduplication.barred is LOST
    assert admitted(ask("add")).deduplication is None


def test_a_key_stands_for_one_method_and_the_same_parameters() -> None:
    one = admitted(ask("add", idempotency_key="k"), b'{"x": 1}').deduplication
    for method, body in (("add", b'{"x": 2}'), ("again", b"[]")):
        other = admitted(ask(method, idempotency_key="k"), body).deduplication
        assert one is not None
        assert other is not None
        assert one.key == other.key
        assert one.fingerprint != other.fingerprint
    same = admitted(ask("add", idempotency_key="k"), b'{"x": 1}').deduplication
    assert one is not None
    assert same is not None
    assert one.fingerprint == same.fingerprint


def test_a_request_may_name_no_method_where_it_is_clear_which() -> None:
    with pytest.raises(MethodNotFound, match="several methods"):
        admitted(ask(None))
    single = Service("single")
    single.method(service().methods["add"].handler)
    assert admitted(ask(None), b"5", service=single).args == (5,)


def test_what_is_wrong_is_told() -> None:
    with pytest.raises(InvalidParams, match="content type"):
        admitted(ask(problem="the content type must be application/json; got 'text/plain'"))
    with pytest.raises(MethodNotFound, match="no method 'sub'; it has add, again"):
        admitted(ask("sub"))
    with pytest.raises(TooLarge, match="101 bytes of JSON; the worker's limit is 100"):
        admitted(ask(), None, body_size=101)
    with pytest.raises(InvalidParams, match="y: "):
        admitted(ask(), b'{"x": 1, "y": "two"}')


async def test_a_handler_gets_what_is_known_of_its_request() -> None:
    request = ask("again", attempt=2, idempotency_key="key", app_id="me", headers={"x-user": "ada", "x-death": "no"})
    job = admitted(request, b"{}", state={"pool": 1})
    context = await job.call()
    assert context == Context(
        service="things",
        method="again",
        correlation_id="id",
        deadline=Deadline(job.deadline),
        attempt=2,
        idempotency_key="key",
        caller="me",
        metadata={"x-user": "ada"},
        state={"pool": 1},
    )

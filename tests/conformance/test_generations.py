"""A worker is lost in the middle of a handler, and another one, which refuses the call, gets the redelivery.

It had run: whatever the reason is to refuse it, nobody says that it did not, and it runs no second time unless its
caller says that this does no harm.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from rpcq import CallError, Client, Retry, Service
from rpcq.calls.outcomes import MAX_ATTEMPTS
from support.generations import FailingStore, Generations, SlowStore
from support.places import Place

QUEUE_TYPE_MATTERS = False

NEVER = 30.0
TIMEOUT = 1.5

REFUSALS: dict[str, Callable[[Generations], Service]] = {
    "the method is gone": Generations.without_the_method,
    "the parameters have changed": Generations.with_other_parameters,
    "the store fails": lambda it: it.same(FailingStore()),
    "the store is cancelled": lambda it: it.same(FailingStore(asyncio.CancelledError)),
    "the store is slow": lambda it: it.same(SlowStore(NEVER)),
    "nothing is wrong with it": Generations.same,
}


@pytest.fixture
def generations(place: Place) -> Generations:
    return Generations(place)


def outcome(call: asyncio.Task[Any]) -> CallError:
    error = call.exception()
    assert isinstance(error, CallError)
    return error


@pytest.mark.parametrize("key", [None, "k"], ids=["no key", "a key"])
@pytest.mark.parametrize("refusal", REFUSALS)
async def test_a_redelivery_is_never_answered_with_no_and_runs_no_second_time(
    generations: Generations, refusal: str, key: str | None
) -> None:
    retry = Retry(max_attempts=3, initial_backoff=0.01)

    async def call(client: Client) -> Any:
        options = client.with_options(timeout=TIMEOUT, idempotency_key=key, retry=retry)
        return await options.call("things.work", nonce=1)

    call_, _ = await generations.lose_old(call, REFUSALS[refusal](generations))
    assert outcome(call_).executed == "maybe"
    assert not outcome(call_).retryable
    assert generations.runs == [1]


@pytest.mark.parametrize("refusal", REFUSALS)
async def test_an_idempotent_call_has_a_key_and_its_redelivery_is_never_answered_with_no_either(
    generations: Generations, refusal: str
) -> None:
    async def call(client: Client) -> Any:
        options = client.with_options(timeout=TIMEOUT, idempotent=True)
        return await options.call("things.work", nonce=1)

    call_, _ = await generations.lose_old(call, REFUSALS[refusal](generations), idempotent=True)
    assert outcome(call_).executed == "maybe"
    assert generations.runs == [1]  # the new generation does not declare it idempotent


async def test_a_redelivery_that_has_expired_on_arrival_may_have_run(generations: Generations, place: Place) -> None:
    """The new worker's clock is an hour ahead, so that all seems to have expired."""

    async def call(client: Client) -> Any:
        return await client.with_options(timeout=TIMEOUT, idempotency_key="k").call("things.work", nonce=1)

    ahead = SimpleNamespace(monotonic=time.monotonic, time=lambda: time.time() + 3600 * generations.entered.is_set())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rpcq.worker.time", ahead)
        call_, _ = await generations.lose_old(call, generations.same())
    assert outcome(call_).executed == "maybe"


@pytest.mark.parametrize("refusal", ["the method is gone", "the parameters have changed"])
async def test_who_declares_a_call_idempotent_is_not_told_no_by_a_later_attempt(
    generations: Generations, refusal: str
) -> None:
    async def call(client: Client) -> Any:
        options = client.with_options(timeout=5, idempotent=True)
        return await options.call("things.work", nonce=1)

    call_, _ = await generations.lose_old(call, REFUSALS[refusal](generations), idempotent=True)
    error = outcome(call_)
    assert (error.executed, error.retryable) == ("maybe", False)
    assert error.attempt <= MAX_ATTEMPTS


async def test_calls_go_through_while_both_generations_serve(generations: Generations, place: Place) -> None:
    """What one refuses the other may run: each caller learns what became of its own call."""
    async with place.worker(generations.same()), place.worker(generations.without_the_method()), place.client() as it:
        told: list[object] = []
        for nonce in range(100):
            try:
                told.append(await it.call("things.work", nonce=nonce))
            except CallError as error:
                told.append(error.executed)
    assert [it for it in told if it != "no"] == generations.runs
    assert 0 < len(generations.runs) < 100

"""Who may call what: the broker's word for who a client is, the service's lists, and its own function."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import pytest

from places import Place, lose
from rpcq import CallTimeout, Context, OutcomeUnknown, PermissionDenied, RemoteError


def user_of(place: Place) -> str:
    return urlsplit(place.url).username or "guest"


# Who a client is.


async def test_a_client_is_who_the_broker_says_it_is_where_it_says_so(place: Place) -> None:
    service = place.service()

    @service.method
    async def who(context: Context) -> str | None:
        return context.user

    async with place.worker(service), place.client(identify=True) as known, place.client() as anonymous:
        assert await known.call("things.who") == user_of(place)
        assert await known.with_options(metadata={"x-tenant": "a"}).call("things.who") == user_of(place)
        assert await anonymous.call("things.who") is None


async def test_a_client_cannot_be_somebody_else(place: Place) -> None:
    service, ran = place.service(), False

    @service.method
    async def act() -> None:
        nonlocal ran
        ran = True

    async with place.worker(service), place.client(identify=True) as client:
        client._sender._user = "billing"
        client._sender.consuming(client._sender.encoder.reply_to.decode())  # type: ignore[union-attr]  # it is up
        with pytest.raises((OutcomeUnknown, CallTimeout)):  # the broker closes the channel over it
            await client.with_options(timeout=2).call("things.act")
    assert not ran


# Lists.


async def test_only_users_of_the_list_call_a_method(place: Place) -> None:
    mine = user_of(place)
    service, ran = place.service(allow={"refund": ["billing"], "pay": [mine, "billing"]}), []

    @service.method
    async def refund() -> None:
        ran.append("refund")

    @service.method
    async def pay() -> None:
        ran.append("pay")

    @service.method
    async def look() -> None:
        ran.append("look")

    async with place.worker(service), place.client(identify=True) as known, place.client() as anonymous:
        for client, method in ((known, "pay"), (known, "look"), (anonymous, "look")):
            await client.call(f"things.{method}")
        for client, method in ((known, "refund"), (anonymous, "refund"), (anonymous, "pay")):
            with pytest.raises(PermissionDenied) as caught:
                await client.call(f"things.{method}")
            assert (caught.value.executed, caught.value.retryable) == ("no", False)
    assert ran == ["pay", "look", "look"]


async def test_who_may_not_call_a_method_does_not_learn_what_it_takes(place: Place) -> None:
    service = place.service(allow={"*": ["nobody"]})

    @service.method
    async def pay(amount: int) -> None: ...

    async with place.worker(service), place.client(identify=True) as client:
        with pytest.raises(PermissionDenied, match=r"things\.pay is not for the user"):
            await client.call("things.pay", amount="much")


# A function.


async def test_a_remembered_answer_is_only_for_those_who_may_make_the_call(place: Place) -> None:
    runs = 0

    async def authorize(context: Context) -> str | None:
        if context.metadata.get("x-token") != "good":
            raise PermissionDenied("this token is not good", details={"realm": context.method})
        return None

    service = place.service(authorize=authorize)

    @service.method
    async def book() -> int:
        nonlocal runs
        runs += 1
        return runs

    async with place.worker(service) as worker, place.client() as client:
        caller = client.with_options(idempotency_key="order-17", metadata={"x-token": "good"})
        assert await caller.call("things.book") == 1
        assert await caller.call("things.book") == 1
        for metadata in ({}, {"x-token": "bad"}):
            with pytest.raises(PermissionDenied, match="not good") as caught:
                await caller.with_options(metadata=metadata).call("things.book")
            assert (caught.value.executed, caught.value.details) == ("no", {"realm": "book"})
        assert (runs, worker._runs.replayed) == (1, 1)


async def test_callers_of_different_scopes_never_share_a_key(place: Place) -> None:
    async def authorize(context: Context) -> str | None:
        return context.metadata.get("x-tenant")

    service, runs = place.service(authorize=authorize), []

    @service.method
    async def book(context: Context) -> str | None:
        runs.append(context.metadata.get("x-tenant"))
        return context.metadata.get("x-tenant")

    async with place.worker(service), place.client() as client:
        caller = client.with_options(idempotency_key="k")
        for tenant in ("a", "b", "a/b", "a"):
            assert await caller.with_options(metadata={"x-tenant": tenant}).call("things.book") == tenant
        assert await caller.call("things.book") is None
    assert runs == ["a", "b", "a/b", None]


async def test_users_never_share_a_key(place: Place) -> None:
    service = place.service()

    @service.method
    async def book(context: Context) -> str | None:
        return context.user

    async with place.worker(service), place.client(identify=True) as known, place.client() as anonymous:
        for client in (known, anonymous, known):
            caller = client.with_options(idempotency_key="k")
            assert await caller.call("things.book") == (user_of(place) if client is known else None)


@pytest.mark.parametrize("wrong", ["it raises", "it gives a number"])
async def test_where_it_is_not_known_whether_a_call_is_allowed_nothing_runs(place: Place, wrong: str) -> None:
    async def authorize(context: Context) -> str | None:
        if wrong == "it raises":
            raise OSError("secret: no way to the directory")
        return 5  # type: ignore[return-value]

    service = place.service(authorize=authorize)

    @service.method
    async def act() -> None:
        raise AssertionError("it ran")

    async with place.worker(service), place.client() as client:
        with pytest.raises(RemoteError, match="allowed could not be found out") as caught:
            await client.call("things.act")
        assert (caught.value.executed, caught.value.retryable, "secret" in str(caught.value)) == ("no", False, False)
        assert caught.value.incident


async def test_a_call_that_waits_for_permission_until_its_deadline_did_not_run(place: Place) -> None:
    async def authorize(context: Context) -> str | None:
        await asyncio.sleep(60)
        return None

    service = place.service(authorize=authorize)

    @service.method
    async def act() -> None:
        raise AssertionError("it ran")

    async with place.worker(service), place.client() as client:
        with pytest.raises(CallTimeout) as caught:
            await client.with_options(timeout=0.5).call("things.act")
        assert caught.value.executed == "no"


@pytest.mark.parametrize("by", ["allow", "authorize"])
async def test_a_redelivery_that_is_not_allowed_any_more_may_have_run_all_the_same(place: Place, by: str) -> None:
    """The first worker lets the call in, and is lost; the second one would not."""
    if place.queue_type == "quorum":
        pytest.skip("a quorum queue delivers no request twice")
    ran = asyncio.Event()

    async def refuse(context: Context) -> str | None:
        raise PermissionDenied("not any more")

    first = place.service()
    options = {"allow": {"act": ["nobody"]}} if by == "allow" else {"authorize": refuse}
    second = place.service(**options)

    @first.method
    async def act() -> None:
        ran.set()
        await asyncio.sleep(60)

    @second.method(name="act")
    async def never() -> None:
        raise AssertionError("it ran")

    worker = place.worker(first, grace=0.1)
    await worker.start()
    async with place.client() as client:
        call = asyncio.create_task(client.with_options(idempotency_key="k", timeout=20).call("things.act"))
        await ran.wait()
        await lose(worker)
        async with place.worker(second):
            with pytest.raises(OutcomeUnknown) as caught:
                await call
        assert caught.value.executed == "maybe"

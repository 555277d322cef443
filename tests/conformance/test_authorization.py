"""Who may call what: the broker's word for who a client is, the service's lists, and its own function."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import pytest

from rpcq import CallTimeout, Context, OutcomeUnknown, PermissionDenied, RemoteError
from rpcq.transport.base import Message
from rpcq.wire.properties import Properties, encode
from support.late import let_others_speak_first
from support.load import until
from support.logged import event_of
from support.places import Place, lose

QUEUE_TYPE_MATTERS = False


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
        assert (runs, worker._replier.replayed) == (1, 1)


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
        with pytest.raises(RemoteError, match="could not check whether this call of") as caught:
            await client.call("things.act")
        assert (caught.value.executed, caught.value.retryable, "secret" in str(caught.value)) == ("no", False, False)
        assert caught.value.incident


async def test_a_call_that_waits_for_permission_until_its_deadline_did_not_run(place: Place) -> None:
    asked = asyncio.Event()

    async def authorize(context: Context) -> str | None:
        asked.set()
        await asyncio.sleep(60)
        return None

    service = place.service(authorize=authorize)

    @service.method
    async def act() -> None:
        raise AssertionError("it ran")

    async with place.worker(service), place.client() as client:
        let_others_speak_first(client)
        while not asked.is_set():  # nobody asks for a call that comes too late
            with pytest.raises(CallTimeout) as caught:
                await client.with_options(timeout=1).call("things.act")
        assert caught.value.executed == "no"


@pytest.mark.parametrize("by", ["allow", "authorize"])
async def test_a_redelivery_that_is_not_allowed_any_more_may_have_run_all_the_same(place: Place, by: str) -> None:
    """The first worker lets the call in, and is lost; the second one would not."""
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


# Functions that behave badly.


@pytest.mark.parametrize("ends", ["by the deadline", "by its caller", "by the worker's end"])
async def test_a_call_that_was_given_up_does_not_begin_though_its_permission_comes(place: Place, ends: str) -> None:
    """The function swallows its cancellation, and lets the call in later: nobody waits for it any more."""
    ran, let_in, asked = [], asyncio.Event(), asyncio.Event()

    async def authorize(context: Context) -> str | None:
        asked.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await let_in.wait()
        return None

    service, other = place.service(authorize=authorize), place.service()

    @service.method
    async def act() -> str:
        ran.append("late")
        return "late"

    @other.method(name="act")
    async def act_elsewhere() -> str:
        ran.append("elsewhere")
        return "elsewhere"

    async with place.client() as client:
        worker = place.worker(service, grace=0.1)
        await worker.start()
        call = asyncio.create_task(client.with_options(timeout=3 if "deadline" in ends else 20).call("things.act"))
        await asked.wait()
        if ends == "by the deadline":
            with pytest.raises(CallTimeout):
                await call
        elif ends == "by its caller":
            call.cancel()
            await asyncio.sleep(0.5)
        else:
            await worker.stop()
            async with place.worker(other):
                assert await call == "elsewhere"
        let_in.set()
        await asyncio.sleep(0.3)
        await worker.stop()
    assert ran == (["elsewhere"] if "worker" in ends else [])


@pytest.mark.parametrize("wrong", ["cancelled by itself", "lone surrogate", "too long"])
async def test_a_function_that_fails_in_odd_ways_is_asked_once_and_named(
    place: Place, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    asked = 0

    async def authorize(context: Context) -> str | None:
        nonlocal asked
        asked += 1
        if wrong == "cancelled by itself":
            raise asyncio.CancelledError
        return "\ud800" if wrong == "lone surrogate" else "s" * 256

    service = place.service(authorize=authorize)

    @service.method
    async def act() -> None:
        raise AssertionError("it ran")

    async with place.worker(service), place.client() as client:
        with pytest.raises(RemoteError, match="could not check whether this call of") as caught:
            await client.with_options(idempotency_key="k").call("things.act")
        assert (caught.value.executed, asked) == ("no", 1)
    assert any(event_of(record) == "a call cannot be authorized" for record in caplog.records)


async def test_a_tenant_that_is_called_like_a_user_shares_no_key_with_it(place: Place) -> None:
    async def authorize(context: Context) -> str | None:
        return context.metadata.get("x-tenant")

    service, runs = place.service(authorize=authorize), []

    @service.method
    async def book(context: Context) -> str:
        runs.append(context.user or context.metadata.get("x-tenant", "nobody"))
        return runs[-1]

    tenants = [user_of(place), f"@{user_of(place)}", f"={user_of(place)}"]
    async with place.worker(service), place.client(identify=True) as known, place.client() as anonymous:
        assert await known.with_options(idempotency_key="k").call("things.book") == user_of(place)
        for tenant in tenants:
            caller = anonymous.with_options(idempotency_key="k", metadata={"x-tenant": tenant})
            assert await caller.call("things.book") == tenant
        assert await anonymous.with_options(idempotency_key="k").call("things.book") == "nobody"
        empty = anonymous.with_options(idempotency_key="k", metadata={"x-tenant": ""})
        assert await empty.call("things.book") == ""
    assert len(runs) == 3 + len(tenants)


async def test_a_denial_is_logged_with_who_asked(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    async def authorize(context: Context) -> str | None:
        raise PermissionDenied("no token")

    service = place.service(allow={"refund": ["billing"]}, authorize=authorize)

    @service.method
    async def refund() -> None: ...

    @service.method
    async def look() -> None: ...

    async with place.worker(service), place.client(identify=True) as client:
        for method in ("refund", "look"):
            with pytest.raises(PermissionDenied):
                await client.call(f"things.{method}")
    causes = [str(record.__dict__.get("cause")) for record in caplog.records if event_of(record) == "call denied"]
    assert causes == [f"things.refund is not for the user {user_of(place)!r}", "no token"]


# Forged replies and notices, by whoever knows the reply queue and the ID.


@pytest.mark.parametrize("forged", ["a reply through the notices", "a notice past them"])
async def test_only_the_broker_speaks_through_the_notices_and_never_elsewhere(place: Place, forged: str) -> None:
    service, idle = place.service(), place.service("idle")
    asked, told = asyncio.Event(), asyncio.Event()

    @service.method
    async def balance() -> int:
        asked.set()
        await told.wait()
        return 5

    @idle.method
    async def nothing() -> None: ...

    async with place.worker(service), place.client() as victim, place.client() as stranger:
        async with place.worker(idle):
            pass  # its queue stays, and nobody takes from it
        call = asyncio.create_task(victim.call("things.balance"))
        await asked.wait()
        (pending,) = victim._calls
        assert victim._sender.encoder is not None
        own = victim._sender.encoder.reply_to.decode()
        if forged == "a reply through the notices":
            kind = {"headers": {"CC": [own]}, "expiration": b"0", "type": b"result"}
            where = victim.topology.requests.name.encode(), b"idle"
        else:
            death = {"reason": "expired", "queue": victim.topology.once_queue("things"), "count": 1}
            kind = {"headers": {"x-death": [death]}, "reply_to": own.encode(), "type": b"balance"}
            where = b"", own.encode()
        properties = encode(Properties(correlation_id=pending.request_id, **kind))  # type: ignore[arg-type]
        stranger._transport.publish(Message(*where, pending.request_id, properties, b"666", lambda _: None))
        await until(lambda: victim._calls.stray == 1)
        told.set()
        assert await call == 5
        assert victim._calls.stray == 1

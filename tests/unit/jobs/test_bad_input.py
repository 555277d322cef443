"""Jobs that cannot be: each is an error at once that names what is wrong and the fix."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any, Protocol

import pytest

from rpcq import (
    Client,
    ConfigurationError,
    GiveUp,
    InvalidParams,
    NotSerializable,
    Retry,
    RetryLater,
    Service,
    TooLarge,
    UsageError,
    contract,
)
from rpcq.jobs.preparing import find_job


class Shop:
    """Pydantic has no schema for it."""


class Mailer:
    """Has a function that is no handler."""

    async def welcome(self, to: str) -> None: ...


def numbers() -> Iterator[int]:
    yield 1


async def numbers_later() -> AsyncIterator[int]:
    yield 1


def returns_shop() -> Shop:
    return Shop()


def takes_shop(shop: Shop) -> None: ...


async def work(x: int = 0, y: int = 0) -> None: ...


# Definitions.


@pytest.mark.parametrize(
    ("handler", "said"),
    [
        (numbers, r"emails\.numbers must return one value; got a generator"),
        (numbers_later, r"emails\.numbers_later must return one value; got a generator"),
        (returns_shop, r"emails\.returns_shop returns <class .*Shop'>, which pydantic cannot handle"),
        (takes_shop, r"emails\.takes_shop takes a parameter that pydantic cannot handle"),
        ("welcome", r"the name of a job must be given as @emails\.job\(name='welcome'\); got it alone"),
        (Shop, "the handler of a job of service 'emails' must be an async def or a def; got <class"),
        (5, "the handler of a job of service 'emails' must be an async def or a def; got 5"),
        (Mailer.welcome, r"must not be a function of a class; got Mailer\.welcome, .*: emails\.job\(thing\.welcome\)"),
    ],
)
def test_a_handler_that_cannot_be_a_job_is_refused_when_it_is_defined(handler: Any, said: str) -> None:
    emails = Service("emails")
    with pytest.raises(ConfigurationError, match=said):
        emails.job(handler)
    assert not emails.jobs


def test_two_jobs_or_a_job_and_a_method_of_one_name_are_refused_and_the_first_stays() -> None:
    emails = Service("emails")
    emails.job(work)
    for again in (emails.job, emails.method):
        with pytest.raises(
            ConfigurationError,
            match="methods, jobs and subscriptions of service 'emails' must have different names; got 'work' twice",
        ):
            again(work)
    emails.method(name="call")(work)
    with pytest.raises(ConfigurationError, match="got 'call' twice"):
        emails.job(name="call")(work)
    assert ([*emails.jobs], [*emails.methods]) == (["work"], ["call"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        *(
            ({"timeout": value}, rf"timeout must be a number of seconds above 0 and at most 1500; got {value!r}")
            for value in (-1, 0, 1500.5, float("nan"), float("inf"), True, "60", None)
        ),
        *(
            ({"retry": value}, r"retry must be a Retry\(\.\.\.\) or None; got ")
            for value in (3, True, False, "3", Retry)
        ),
        ({"retry": Retry(codes=("ABORTED",))}, "retry must have no codes: .* see retry_on"),
        ({"retry_on": OSError}, "retry_on must be a tuple, even for one item"),
        ({"retry_on": ["OSError"]}, "retry_on must be classes of exceptions; got 'OSError'"),
        ({"give_up_on": [KeyboardInterrupt]}, "give_up_on must be classes of exceptions"),
        ({"name": "a.b"}, "the name of a job must be 1 to 100 of the characters .*; got 'a.b'"),
    ],
)
def test_an_option_of_a_job_that_cannot_be_is_named(options: dict[str, Any], said: str) -> None:
    emails = Service("emails")
    with pytest.raises(ConfigurationError, match=said):
        emails.job(**options)(work)
    assert not emails.jobs


def test_a_job_may_run_for_25_minutes() -> None:
    emails = Service("emails")
    emails.job(timeout=1500)(work)
    assert emails.jobs["work"].timeout == 1500


# What a handler raises.


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), 48 * 24 * 3600 + 1, "30", True, None])
def test_a_delay_that_is_no_number_of_seconds_is_refused(value: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"RetryLater must have a number of seconds from 0 to .* \(48 days\); got "
    ):
        RetryLater(value)


@pytest.mark.parametrize("value", ["", "  \n", None, 5, ValueError("bounced")])
def test_a_job_is_not_given_up_without_a_reason(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"GiveUp must have a reason .*, a string; got "):
        GiveUp(value)


# Sending.


@contract("emails", jobs=["work"])
class EmailsApi(Protocol):
    async def work(self, x: int = 0, y: int = 0) -> None: ...


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with Client(f"memory://{secrets.token_hex(8)}", max_body=1000) as client:
        yield client


@pytest.fixture(params=["function", "contract"])
def job(request: pytest.FixtureRequest, client: Client) -> Any:
    if request.param == "contract":
        return client.bind(EmailsApi).work

    async def own(x: int = 0, y: int = 0) -> None: ...

    return Service("emails").job(name="work")(own)


async def test_parameters_that_do_not_fit_are_refused_before_anything_is_sent(client: Client, job: Any) -> None:
    with pytest.raises(InvalidParams, match=r"do not fit emails\.work: x: Input should be a valid integer"):
        await client.send(job, x="many")
    with pytest.raises(InvalidParams, match=r"do not fit emails\.work: z: Unexpected keyword argument"):
        await client.send(job, z=1)
    with pytest.raises(InvalidParams, match=r"do not fit emails\.work: y: "):
        await client.send_many(job, [{"y": 1}, {"y": "many"}])
    with pytest.raises(NotSerializable, match="JSON cannot carry parameter 'x', a Shop"):
        await client.send(job, x=Shop())
    with pytest.raises(TypeError, match=r"emails\.work takes 2 parameters by position, 3 given"):
        await client.send(job, 1, 2, 3)
    with pytest.raises(TypeError, match=r"emails\.work got \['x'\] twice"):
        await client.send(job, 1, x=2)


@pytest.mark.parametrize("several", [["ada"], {"x": 1}, [[1]], [None]])
async def test_parameters_of_several_jobs_that_have_no_names_are_refused(
    client: Client, job: Any, several: Any
) -> None:
    for target in (job, "emails.work"):
        with pytest.raises(InvalidParams, match="send_many must have the parameters of each job by name"):
            await client.send_many(target, several)


async def test_a_body_or_headers_over_the_limit_are_refused_before_anything_is_sent(client: Client) -> None:
    with pytest.raises(TooLarge, match=r"the parameters are 1011 bytes of JSON; the limit is 1000 \(max_body\)"):
        await client.send("emails.work", text="x" * 1000)
    with pytest.raises(TooLarge, match=r"the headers are \d+ bytes; the limit is 8192"):
        await client.with_options(metadata={"x-large": "x" * 9000}).send("emails.work")


@pytest.mark.parametrize("key", ["k" * 256, "é" * 128, "", 5])
def test_a_key_that_cannot_be_is_refused(client: Client, key: Any) -> None:
    with pytest.raises(ConfigurationError, match="idempotency_key must be a string of 1 to 255 bytes; got "):
        client.with_options(idempotency_key=key)


@pytest.mark.parametrize("name", ["work", "emails.", ".work", "emails.wörk", ""])
async def test_a_name_that_is_none_is_refused(client: Client, name: str) -> None:
    with pytest.raises(ConfigurationError, match="must be"):
        await client.send(name)


async def test_what_is_no_job_is_refused_with_the_fix(client: Client) -> None:
    emails, others = Service("emails"), Service("others")

    @emails.method
    async def called() -> None: ...

    with pytest.raises(
        UsageError, match=r"send takes 'service\.job', a function with @service\.job, .*: it is not a job"
    ):
        await client.send(called)
    with pytest.raises(UsageError, match="it is a method: call it, do not send it"):
        await client.send_many(client.service("emails").work, [{}])

    async def shared() -> None: ...

    emails.job(shared)
    others.job(shared)
    with pytest.raises(
        UsageError, match=r"several services: send it by name, as one of emails\.shared, others\.shared"
    ):
        await client.send(shared)


def test_a_service_that_is_made_again_has_its_jobs_again() -> None:
    async def own(x: int = 0) -> None: ...

    first, second = Service("emails"), Service("emails")
    first.job(own)
    second.job(own)
    assert find_job(own) == ("emails", "own", second.jobs["own"])

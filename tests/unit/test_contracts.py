"""Jobs in contracts: what a contract may say, what a service owes it, and what a client sends by it."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import pytest

from rpcq import Client, ConfigurationError, InvalidParams, Service, UsageError, contract, sync, with_options
from rpcq.contracts import RemoteJob, contract_of
from rpcq.jobs.preparing import find_job
from rpcq.testing import FakeService


@contract("emails", jobs=["welcome"])
class EmailsApi(Protocol):
    async def welcome(self, to: str, name: str = ..., *, copies: int = 1) -> None:
        """Greet somebody."""

    async def sent(self, to: str) -> int: ...


@pytest.fixture
def client() -> Client:
    return Client("memory://contracts")


def welcome_of(client: Client) -> RemoteJob:
    bound: Any = client.bind(EmailsApi).welcome
    assert isinstance(bound, RemoteJob)
    return bound


# What a contract may say.


def test_a_contract_says_which_of_its_functions_are_jobs() -> None:
    assert contract_of(EmailsApi).jobs == {"welcome"}
    assert contract_of(EmailsApi, "others").jobs == {"welcome"}


@pytest.mark.parametrize("decorate", [contract, sync.contract], ids=["contract", "sync.contract"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"jobs": ["welcom"]}, r"jobs in the contract of 's' must name functions .* which has work; got \['welcom'\]"),
        ({"jobs": "work"}, r"jobs of a contract must be names, as in jobs=\['name'\]; got 'work'"),
        ({"jobs": 5}, r"jobs of a contract must be names, as in jobs=\['name'\]; got 5"),
        ({"jobs": [5]}, r"jobs of a contract must be names, as in jobs=\['name'\]; got 5 among them"),
        ({"idempotent": "work"}, r"idempotent of a contract must be names, as in idempotent=\['name'\]; got 'work'"),
        (
            {"jobs": ["work"], "idempotent": ["work"]},
            r"idempotent in the contract of 's' must not name jobs.*\['work'\]",
        ),
    ],
)
def test_jobs_that_cannot_be_are_refused_with_the_contract(decorate: Any, options: Any, said: str) -> None:
    class Api(Protocol):
        def work(self) -> None: ...

    class Awaited(Protocol):
        async def work(self) -> None: ...

    with pytest.raises(ConfigurationError, match=said):
        decorate("s", **options)(Awaited if decorate is contract else Api)


# What a service owes its contract.


def test_a_service_offers_the_jobs_of_its_contract_and_may_have_others_of_its_own() -> None:
    emails = Service(api=EmailsApi)

    @emails.job
    async def welcome(to: str, name: str = "you", copies: int = 1) -> None: ...

    @emails.method
    async def sent(to: str) -> int:
        return len(to)

    @emails.job
    def tidy() -> None: ...

    emails.check()
    assert [*emails.jobs] == ["welcome", "tidy"]


def test_a_job_that_is_missing_is_named() -> None:
    emails = Service(api=EmailsApi)

    @emails.method
    async def sent(to: str) -> int:
        return len(to)

    said = "service 'emails' must have all jobs of its contract EmailsApi; got none called 'welcome'"
    with pytest.raises(ConfigurationError, match=said):
        emails.check()


def test_a_method_that_is_missing_is_named_beside_jobs() -> None:
    emails = Service(api=EmailsApi)

    @emails.job
    async def welcome(to: str, name: str = "you", copies: int = 1) -> None: ...

    with pytest.raises(
        ConfigurationError, match="must have all methods of its contract EmailsApi; got none called 'sent'"
    ):
        emails.check()


def test_a_job_where_the_contract_has_a_method_and_the_reverse_are_refused_with_the_fix() -> None:
    emails = Service(api=EmailsApi)
    with pytest.raises(ConfigurationError, match=r"emails\.welcome must be a job, as in .*EmailsApi: .*\.job instead"):

        @emails.method
        async def welcome(to: str, name: str = "you", copies: int = 1) -> None: ...

    with pytest.raises(ConfigurationError, match=r"emails\.sent must be a method, .* jobs=\['sent'\]"):

        @emails.job
        async def sent(to: str) -> int:
            return len(to)

    assert not emails.methods
    assert not emails.jobs


def test_a_method_that_the_contract_does_not_have_is_told_its_methods_and_not_its_jobs() -> None:
    with pytest.raises(ConfigurationError, match=r"must be a method of its contract EmailsApi, which has sent$"):

        @Service(api=EmailsApi).method
        async def other() -> None: ...


def test_a_job_that_does_not_fit_its_contract_is_refused_with_every_reason() -> None:
    with pytest.raises(ConfigurationError, match=r"emails\.welcome must fit its contract EmailsApi: ") as it:

        @Service(api=EmailsApi).job
        async def welcome(to: int, name: str, lang: str) -> str:
            return f"{to}{name}{lang}"

    for said in (
        "'to' must take str; got int",
        "'name' must have a default",
        "'copies' must be there; got none",
        "'lang' must have a default",
        "its result must be None; got str",
    ):
        assert said in str(it.value)


# What a client sends by it.


def test_a_job_of_a_bound_contract_can_be_sent(client: Client) -> None:
    bound = welcome_of(client)
    assert find_job(bound) == ("emails", "welcome", bound)
    elsewhere: Any = client.bind(EmailsApi, "others").welcome
    assert find_job(elsewhere)[:2] == ("others", "welcome")
    assert (bound.__name__, bound.__doc__) == ("welcome", "Greet somebody.")  # type: ignore[attr-defined]  # set by `update_wrapper`
    assert [*inspect.signature(bound).parameters] == ["to", "name", "copies"]
    assert repr(bound) == "<RemoteJob emails.welcome>"


def test_its_parameters_are_checked_as_the_contract_says(client: Client) -> None:
    parameters = welcome_of(client).parameters
    parameters.read(b'{"to": "ada"}')  # `name` has some default
    parameters.read(b'{"to": "ada", "name": "Ada", "copies": 2}')
    for body, said in (
        (b'{"to": 5}', "to: Input should be a valid string"),
        (b'{"name": "Ada"}', "to: Missing required argument"),
        (b'{"to": "ada", "colour": "red"}', "colour: Unexpected keyword argument"),
    ):
        with pytest.raises(InvalidParams, match=rf"do not fit emails\.welcome: {said}"):
            parameters.read(body)


def test_parameters_by_position_go_by_name(client: Client) -> None:
    parameters = welcome_of(client).parameters
    assert parameters.by_name(("ada",), {"copies": 2}) == ((), {"to": "ada", "copies": 2})
    with pytest.raises(TypeError, match=r"emails\.welcome takes 2 parameters by position, 3 given"):
        parameters.by_name(("ada", "Ada", 2), {})
    with pytest.raises(TypeError, match=r"emails\.welcome got \['to'\] twice, by position and by name"):
        parameters.by_name(("ada",), {"to": "bob"})


async def test_a_job_that_is_called_and_a_method_that_is_sent_are_told_the_reverse(client: Client) -> None:
    emails = client.bind(EmailsApi)
    with pytest.raises(UsageError, match=r"emails\.welcome is a job: send it, client\.send\(bound\.welcome, \.\.\.\)"):
        await emails.welcome("ada")
    with pytest.raises(UsageError, match=r"got <RemoteMethod emails\.sent>: it is a method: call it, do not send it"):
        find_job(emails.sent)
    with pytest.raises(UsageError, match="it is a method: call it, do not send it"):
        find_job(client.service("emails").sent)


@pytest.mark.parametrize("name", ["welcome", "sent"])
def test_a_function_of_a_contract_that_is_not_bound_cannot_be_sent(name: str) -> None:
    with pytest.raises(
        UsageError, match=rf"bind the contract first: client\.send\(client\.bind\(EmailsApi\)\.{name}, "
    ):
        find_job(getattr(EmailsApi, name))


def test_the_options_of_a_job_are_those_of_the_client_that_sends_it(client: Client) -> None:
    emails = client.bind(EmailsApi)
    said = r"emails\.welcome is a job: give the options to what sends it, client\.with_options\(\.\.\.\)\.send"
    with pytest.raises(UsageError, match=said):
        with_options(emails.welcome, timeout=2)
    with pytest.raises(UsageError, match=said):
        with_options(emails, timeout=2).welcome  # noqa: B018 - what raises


def test_a_job_whose_parameters_cannot_be_is_refused_when_the_contract_is_bound(client: Client) -> None:
    class Shop:
        """Pydantic has no schema for it."""

    @contract("emails", jobs=["welcome"])
    class Api(Protocol):
        async def welcome(self, shop: Shop) -> None: ...

    Api.welcome.__annotations__["shop"] = Shop  # it is in no module, where its name could be looked up
    with pytest.raises(ConfigurationError, match=r"emails\.welcome takes a parameter that pydantic cannot handle"):
        client.bind(Api)


def test_a_fake_has_no_behaviours_for_jobs() -> None:
    fake = FakeService.of(EmailsApi).answers("sent", 1)
    with pytest.raises(ConfigurationError, match="must be in the contract of 'emails', which has sent; got 'welcome'"):
        fake.answers("welcome")

"""What makes calling a remote function look like calling a function."""

from __future__ import annotations

import copy
import inspect
import pydoc
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytest
from pydantic import BaseModel

from rpcq.calls.proxy import CallMaker, RemoteMethod, ServiceProxy, with_options
from rpcq.calls.targets import Target, make_target
from rpcq.contracts import contract
from rpcq.errors import ConfigurationError, DomainError
from rpcq.options import CallOptions
from rpcq.wire.topology import Topology


class OutOfStock(DomainError):
    """A service's own."""


class CardDeclined(DomainError):
    """Another one."""


class Item(BaseModel):
    sku: str


@dataclass
class Made:
    """What a call was made with."""

    target: Target
    options: CallOptions
    args: tuple[Any, ...]
    params: dict[str, Any]


@dataclass
class Recorder:
    """Stands where the client stands: makes no call, and gives what it was asked for."""

    topology: Topology = field(default_factory=Topology)

    def invoke(
        self, target: Target, options: CallOptions, args: tuple[Any, ...], params: Mapping[str, Any]
    ) -> Coroutine[Any, Any, Made]:
        async def made() -> Made:
            return Made(target, options, args, dict(params))

        return made()


@pytest.fixture
def maker() -> CallMaker:
    return CallMaker(Recorder(), CallOptions(timeout=7))


def target(service: str, method: str) -> Target:
    return Target(
        b"rpcq.requests",
        service.encode(),
        method.encode(),
        f"{service}.{method}",
        True,
        b"rpcq.once." + service.encode(),
    )


# Targets.


async def test_what_stands_before_the_last_dot_is_the_service(maker: CallMaker) -> None:
    assert (await maker.call("orders.total")).target == target("orders", "total")
    assert (await maker.call("orders.eu.total")).target == target("orders.eu", "total")


async def test_a_namespace_has_an_exchange_of_its_own() -> None:
    made = await CallMaker(Recorder(Topology("staging")), CallOptions()).call("orders.total")
    assert made.target.exchange == b"staging.requests"


async def test_a_queue_is_reached_through_the_default_exchange(maker: CallMaker) -> None:
    other = maker.with_options(queue="rpc queue")
    expected = Target(b"", b"rpc queue", b"fib", "rpc queue: fib", is_ours=False, once_key=b"")
    assert (await other.call("fib", 30)).target == expected
    assert (await other.call("any.service.fib", 30)).target == expected
    assert (await other.service("s").fib(30)).target == expected


async def test_a_queue_that_delivers_once_is_known_by_its_name(maker: CallMaker) -> None:
    made = await maker.with_options(queue="rpcq.once.orders").call("total")
    assert (made.target.routing_key, made.target.once_key) == (b"rpcq.once.orders", b"rpcq.once.orders")


@pytest.mark.parametrize("name", ["", "orders.", "orders.a b", "orders.é", "orders." + "a" * 101, "a\n"])
@pytest.mark.parametrize("queue", [None, "q"])
def test_a_method_that_cannot_be_is_refused_at_once(maker: CallMaker, name: str, queue: str | None) -> None:
    with pytest.raises(ConfigurationError, match="the name of a method must be"):
        maker.with_options(queue=queue).call(name)


def test_a_name_without_a_service_says_what_to_do(maker: CallMaker) -> None:
    for name in ("total", ".total"):
        with pytest.raises(
            ConfigurationError, match=r"must be 'service\.method', or with_options\(queue=.*; got '\.?total'"
        ):
            maker.call(name)


@pytest.mark.parametrize("service", ["a b", "é", "a" * 101])
def test_a_service_that_cannot_be_is_refused_at_once(maker: CallMaker, service: str) -> None:
    for attempt in (
        lambda: maker.call(f"{service}.total"),
        lambda: maker.service(service),
        lambda: make_target(Topology(), service, "total", None),
    ):
        with pytest.raises(ConfigurationError, match="the name of a service must be"):
            attempt()


async def test_a_target_is_worked_out_once_and_not_remembered_without_bound(maker: CallMaker) -> None:
    first = await maker.call("orders.total")
    assert (await maker.call("orders.total")).target is first.target
    for number in range(2000):
        assert (await maker.call(f"orders.m{number}")).target == target("orders", f"m{number}")
    assert len(maker._targets) == CallMaker._REMEMBERED


# Parameters.


async def test_parameters_go_as_they_are_given(maker: CallMaker) -> None:
    for call in (lambda *a, **k: maker.call("s.m", *a, **k), maker.service("s").m):
        made = await call(1, "a")
        assert (made.args, made.params) == ((1, "a"), {})
        made = await call(x=1, y=2)
        assert (made.args, made.params) == ((), {"x": 1, "y": 2})


async def test_no_parameters_name_collides_with_ours(maker: CallMaker) -> None:
    names = dict.fromkeys(("self", "target", "args", "params", "timeout", "options", "queue", "service", "method"), 1)
    assert (await maker.call("s.m", **names)).params == names
    assert (await maker.service("s").m(**names)).params == names
    assert (await maker.service("s")["m"](**names)).params == names


# Proxies.


async def test_the_methods_of_a_service_are_its_attributes_and_items(maker: CallMaker) -> None:
    orders = maker.service("orders")
    made = await orders.total(day=1)
    assert made == Made(target("orders", "total"), CallOptions(timeout=7), (), {"day": 1})
    assert (await orders["total"](day=1)) == made
    assert orders.total is orders.total


@pytest.mark.parametrize("name", ["with_options", "_private", "__call__", "__len__", "_caller", "has-dash", "9"])
async def test_a_method_of_any_name_is_reached_as_an_item(maker: CallMaker, name: str) -> None:
    assert (await maker.service("s")[name]()).target == target("s", name)


def test_an_attribute_with_an_underscore_is_no_method(maker: CallMaker) -> None:
    proxy = maker.service("s")
    for name in ("_private", "__len__", "_repr_html_"):
        assert not hasattr(proxy, name)
    assert vars(copy.copy(proxy)) == vars(proxy)


def test_an_item_that_cannot_be_a_method_is_refused(maker: CallMaker) -> None:
    with pytest.raises(ConfigurationError, match=r"must be 1 to 100 of the characters .*; got 'a\.b'"):
        maker.service("s")["a.b"]


def test_proxies_say_what_they_are(maker: CallMaker) -> None:
    proxy = maker.service("orders")
    assert isinstance(proxy, ServiceProxy)
    assert repr(proxy) == "<ServiceProxy 'orders'>"
    assert isinstance(proxy.total, RemoteMethod)
    assert repr(proxy.total) == "<RemoteMethod orders.total>"


async def test_options_are_changed_one_by_one_and_only_where_they_are_asked_for(maker: CallMaker) -> None:
    other = maker.with_options(idempotent=True).with_options(timeout=2)
    expected = CallOptions(timeout=2, idempotent=True)
    assert (await other.call("s.m")).options == expected
    assert (await other.service("s").m()).options == expected
    proxy = maker.service("s")
    assert (await proxy.with_options(idempotent=True).with_options(timeout=2).m()).options == expected
    assert (await proxy.m()).options == (await maker.call("s.m")).options == CallOptions(timeout=7)


@pytest.mark.parametrize("options", [{"timeout": 0}, {"queue": ""}, {"errors": OutOfStock}, {"metadata": {"a": "b"}}])
def test_options_that_cannot_be_are_refused_at_once(maker: CallMaker, options: Any) -> None:
    for given in (maker, maker.service("s")):
        with pytest.raises(ConfigurationError):
            given.with_options(**options)


@pytest.mark.parametrize("name", ["retries", "time_out"])
def test_options_that_do_not_exist_are_refused_by_name(maker: CallMaker, name: str) -> None:
    with pytest.raises(TypeError, match=name):
        maker.with_options(**{name: 1})  # type: ignore[arg-type]


# Contracts.


@contract("orders", errors=[OutOfStock], idempotent=["total"])
class Orders(Protocol):
    async def total(self, day: int, zone: str = "eu", *, exact: bool = False) -> int: ...

    async def item(self, sku: str) -> Item | None: ...

    async def anything(self, *parts: str, **rest: int) -> Any: ...

    async def plain(self, x): ...  # type: ignore[no-untyped-def]

    async def placed(self, a: int, b: int = 0, /) -> int: ...

    def _helper(self) -> None: ...


class Unmarked(Protocol):
    async def total(self, day: int) -> int: ...


async def made(call: Coroutine[Any, Any, Any]) -> Made:
    """What was recorded, where the contract says that it is something else."""
    found = await call
    assert isinstance(found, Made)
    return found


async def test_a_bound_contract_knows_its_service_errors_results_and_what_is_idempotent(maker: CallMaker) -> None:
    orders = maker.bind(Orders)
    total, item = await made(orders.total(1)), await made(orders.item("a"))
    assert total.target == target("orders", "total")
    assert total.options == CallOptions(timeout=7, idempotent=True, errors=(OutOfStock,), returns=int)
    assert item.options == CallOptions(timeout=7, errors=(OutOfStock,), returns=Item | None)


async def test_results_that_are_not_annotated_are_left_as_json_has_them(maker: CallMaker) -> None:
    orders = maker.with_options(returns=int).bind(Orders)
    assert (await made(orders.anything())).options.returns is None
    assert (await made(orders.plain(1))).options.returns is None


async def test_the_callers_own_options_hold_for_a_bound_contract_too(maker: CallMaker) -> None:
    orders = maker.with_options(errors=(CardDeclined,), idempotent=True, timeout=2, metadata={"x-a": "b"}).bind(Orders)
    options = (await made(orders.item("a"))).options
    assert options.errors == (CardDeclined, OutOfStock)
    assert (options.idempotent, options.timeout, options.metadata) == (True, 2, {"x-a": "b"})


async def test_a_contract_may_be_bound_to_another_service_or_queue(maker: CallMaker) -> None:
    assert (await made(maker.bind(Orders, "orders.eu").total(1))).target == target("orders.eu", "total")
    assert (await made(maker.bind(Orders, "orders.eu").total(1))).options.idempotent
    assert (await made(maker.bind(Unmarked, "other").total(1))).target == target("other", "total")
    assert (await made(maker.with_options(queue="q").bind(Orders).total(1))).target.routing_key == b"q"


async def test_a_contract_that_is_not_marked_says_nothing_more(maker: CallMaker) -> None:
    options = (await made(maker.bind(Unmarked, "other").total(1))).options
    assert options == CallOptions(timeout=7, returns=int)


@pytest.mark.parametrize(
    ("args", "named", "params"),
    [
        ((1,), {}, {"day": 1}),
        ((1, "us"), {}, {"day": 1, "zone": "us"}),
        ((1,), {"exact": True}, {"day": 1, "exact": True}),
        ((1, "us"), {"exact": True}, {"day": 1, "zone": "us", "exact": True}),
        ((), {"zone": "us", "day": 1}, {"day": 1, "zone": "us"}),
        ((), {}, {}),
    ],
)
async def test_parameters_given_by_position_go_by_name(
    maker: CallMaker, args: tuple[Any, ...], named: dict[str, Any], params: dict[str, Any]
) -> None:
    found = await made(maker.bind(Orders).total(*args, **named))
    assert (found.args, found.params) == ((), params)


def test_more_parameters_than_there_are_is_a_type_error(maker: CallMaker) -> None:
    with pytest.raises(TypeError, match=r"orders\.total takes 2 parameters by position, 3 given"):
        maker.bind(Orders).total(1, "us", True)  # type: ignore[call-arg,misc]


def test_a_parameter_given_twice_is_a_type_error_that_names_it(maker: CallMaker) -> None:
    with pytest.raises(TypeError, match=r"orders\.total got \['day', 'zone'\] twice"):
        maker.bind(Orders).total(1, "us", zone="us", day=1)  # type: ignore[misc]


async def test_parameters_that_have_no_name_go_by_position(maker: CallMaker) -> None:
    orders = maker.bind(Orders)
    found = await made(orders.anything("a", "b"))
    assert (found.args, found.params) == (("a", "b"), {})
    assert (await made(orders.anything(a=1))).params == {"a": 1}
    found = await made(orders.placed(1, 2))
    assert (found.args, found.params) == ((1, 2), {})


def test_a_bound_contract_has_no_methods_but_its_own(maker: CallMaker) -> None:
    orders = maker.bind(Orders)
    assert not hasattr(orders, "_helper")
    assert not hasattr(orders, "other")
    assert {name for name in vars(orders) if not name.startswith("_")} == {
        "total",
        "item",
        "anything",
        "plain",
        "placed",
    }


async def test_the_methods_of_a_base_class_belong_to_the_contract(maker: CallMaker) -> None:
    class More(Orders, Protocol):
        async def more(self) -> None: ...

    assert (await made(maker.bind(More).total(1))).target == target("orders", "total")
    assert (await made(maker.bind(More).more())).options.returns is type(None)


def test_a_bound_method_has_the_name_the_docstring_and_the_signature_of_the_contracts(maker: CallMaker) -> None:
    class Documented(Protocol):
        async def total(self, day: int, *, zone: str = "eu") -> int:
            """Return the total."""
            raise NotImplementedError

    method: Any = maker.bind(Documented, "s").total
    assert (method.__name__, method.__doc__) == ("total", "Return the total.")
    assert str(inspect.signature(method)) in (
        "(day: int, *, zone: str = 'eu') -> int",
        "(day: 'int', *, zone: 'str' = 'eu') -> 'int'",
    )
    assert "Return the total." in pydoc.render_doc(method)


async def test_one_call_of_a_bound_contract_may_have_other_options(maker: CallMaker) -> None:
    orders = maker.bind(Orders)
    hurried = with_options(orders, timeout=1, errors=[CardDeclined])
    options = (await made(hurried.total(1))).options
    assert options == CallOptions(timeout=1, idempotent=True, errors=(CardDeclined, OutOfStock), returns=int)
    assert (await made(hurried.total(1, "us"))).params == {"day": 1, "zone": "us"}
    assert hurried.total is hurried.total
    assert dir(hurried) == dir(orders)
    assert not hasattr(hurried, "other")
    twice = with_options(hurried, idempotency_key="k")
    assert (await made(twice.item("a"))).options.idempotency_key == "k"
    assert (await made(twice.item("a"))).options.timeout == 1
    assert (await made(orders.total(1))).options.timeout == 7
    assert (await made(with_options(orders.total, timeout=2)(1))).options.timeout == 2
    queued = with_options(with_options(orders, queue="q"), queue=None)
    assert (await made(queued.total(1))).target == target("orders", "total")
    assert (await made(with_options(orders, queue="q").total(1))).target.routing_key == b"q"


async def test_one_call_of_a_proxy_may_have_other_options(maker: CallMaker) -> None:
    proxy = maker.service("orders")
    assert (await made(with_options(proxy, timeout=2).total(day=1))).options.timeout == 2
    assert (await made(with_options(proxy.total, timeout=3)(day=1))).options.timeout == 3
    assert (await made(proxy.total.with_options(timeout=3)(day=1))).target == target("orders", "total")


def test_options_of_what_is_not_bound_or_that_cannot_be_are_refused(maker: CallMaker) -> None:
    with pytest.raises(ConfigurationError, match=r"bound must be what a client has bound, .*; got 5"):
        with_options(5, timeout=1)
    with pytest.raises(ConfigurationError, match="timeout must be"):
        with_options(maker.bind(Orders), timeout=-1).total(1)


def test_an_error_whose_attributes_cannot_be_is_refused_with_the_options(maker: CallMaker) -> None:
    class Odd(DomainError):
        caller: CallMaker

    with pytest.raises(ConfigurationError, match=r"Odd\.caller must have a type that pydantic can handle"):
        maker.with_options(errors=[Odd])


def test_a_contract_without_a_service_says_what_to_do(maker: CallMaker) -> None:
    with pytest.raises(ConfigurationError, match=r"Unmarked.* decorate it with @contract\('name'\), or give the name"):
        maker.bind(Unmarked)


@pytest.mark.parametrize("api", [Unmarked, Orders])
def test_a_service_that_cannot_be_is_refused_when_a_contract_is_bound(maker: CallMaker, api: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"the name of a service must be .*; got 'a b'"):
        maker.bind(api, "a b")


class WithProperty:
    @property
    def total(self) -> int:
        return 1


class WithStatic:
    @staticmethod
    async def total() -> int:
        return 1


class WithValue:
    total = 5


class WithCallable:
    total: Callable[[], int] = print  # type: ignore[assignment]


@pytest.mark.parametrize("api", [WithProperty, WithStatic, WithValue, WithCallable])
def test_a_contract_with_something_that_is_no_method_is_refused_by_name(maker: CallMaker, api: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"a contract must have only methods; .* has 'total'"):
        maker.bind(api, "s")


class NoSuchType(Protocol):
    async def total(self) -> Missing: ...  # noqa: F821 - what is tested


class NoSchema(Protocol):
    async def total(self) -> CallMaker: ...


@pytest.mark.parametrize(
    ("api", "said"), [(NoSuchType, "cannot be resolved in its module"), (NoSchema, "which pydantic cannot handle")]
)
def test_a_result_type_that_cannot_be_is_told_when_the_contract_is_bound(maker: CallMaker, api: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"s\.total .*{said}"):
        maker.bind(api, "s")

"""Classes of events, patterns, and what a subscription takes: every mistake is an error that names the fix."""

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from rpcq import AnyEvent, ConfigurationError, Context, Event, InvalidParams, NotSerializable, Service, UsageError
from rpcq.event_types import Topics, check_pattern, read_event, write_event


class Created(Event, name="unit.order.created"):
    order: str
    blob: bytes = b""


class Paid(Event, name="unit.order.paid"):
    order: str


class CreatedV3(Event, name="unit.order.created", version=3):
    order: str
    total: int


class Base(Event):
    order: str


class Shipped(Base, name="unit.order.shipped"):
    pass


def topics(*given: Any, annotation: Any = Any) -> Topics:
    return Topics("shop.ship", given, annotation, each_instance=False)


# Classes.


def test_a_class_has_the_name_and_the_version_that_it_is_given_and_does_not_inherit_them() -> None:
    class Special(Paid):
        pass

    assert (Created.event_name, Created.event_version) == ("unit.order.created", 1)
    assert (CreatedV3.event_name, CreatedV3.event_version) == ("unit.order.created", 3)
    assert (Base.event_name, Special.event_name) == ("", "")


def test_an_event_may_have_fields_called_name_and_version_and_a_config() -> None:
    class Named(Event, name="unit.named", frozen=True):
        name: str
        version: int

    event = Named(name="a", version=2)
    assert (event.event_name, event.event_version) == ("unit.named", 1)
    assert Named.model_config["frozen"]


@pytest.mark.parametrize("name", ["", ".a", "a.", "a..b", "a b", "a*", "ä", "x" * 101, 7])
def test_a_name_that_cannot_be_is_refused(name: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"the name of .*Wrong must be 1 to 100 of the characters .* got "):

        class Wrong(Event, name=name):
            pass


@pytest.mark.parametrize("version", [0, -1, True, "1", 1.0, 2**31])
def test_a_version_that_cannot_be_is_refused(version: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"the version of .*Wrong must be a whole number from 1; got "):

        class Wrong(Event, name="unit.wrong", version=version):
            pass


def test_a_version_needs_a_name() -> None:
    with pytest.raises(ConfigurationError, match="Wrong must have a name with its version 2"):

        class Wrong(Event, version=2):
            pass


def test_a_field_must_not_hide_the_name() -> None:
    with pytest.raises(ConfigurationError, match="Wrong must not have a field 'event_name'"):

        class Wrong(Event, name="unit.wrong"):
            event_name: str = "x"  # type: ignore[misc]  # that is the mistake


def test_two_classes_of_one_name_and_version_are_refused_with_both_their_places() -> None:
    with pytest.raises(ConfigurationError, match=r"must differ in name or version; got .*\.Paid and .*\.PaidToo for"):

        class PaidToo(Event, name="unit.order.paid"):
            pass


def test_a_module_may_be_loaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "unit_events.py").write_text(
        "from rpcq import Event\n\nclass Again(Event, name='unit.again'):\n    pass\n", "utf-8"
    )
    module = importlib.import_module("unit_events")
    try:
        first = module.Again
        assert importlib.reload(module).Again is not first
    finally:
        del sys.modules["unit_events"]


# Writing and reading.


@given(st.text(max_size=20), st.binary(max_size=20))
def test_an_event_is_read_as_it_was_written(order: str, blob: bytes) -> None:
    event = Created(order=order, blob=blob)
    assert read_event(Created, write_event(event, 10_000)) == event


def test_a_reader_ignores_fields_that_it_does_not_know() -> None:
    assert read_event(Created, b'{"order":"7","total":5}') == Created(order="7")


def test_an_event_is_written_by_its_aliases() -> None:
    class Aliased(Event, name="unit.aliased"):
        order_id: str = Field(alias="orderId")

    body = write_event(Aliased(orderId="7"), 1000)
    assert body == b'{"orderId":"7"}'
    assert read_event(Aliased, body).order_id == "7"


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"{}", r"the fields do not fit 'unit.order.created' version 1: order: Field required"),
        (b"[1]", "the fields do not fit"),
        (b"", "the fields of .* are not JSON"),
        (b"{", "the fields of .* are not JSON"),
        (b'{"order":"7","blob":NaN}', "the fields of .* are not JSON: NaN and Infinity"),
    ],
)
def test_what_does_not_fit_says_what_is_wrong(body: bytes, match: str) -> None:
    with pytest.raises(InvalidParams, match=match):
        read_event(Created, body)


def test_an_event_that_was_made_wrong_is_not_published() -> None:
    event = Created.model_construct(order=7)  # type: ignore[arg-type]  # that is the mistake
    with pytest.warns(UserWarning, match="serialized value may not be as expected"), pytest.raises(InvalidParams):
        write_event(event, 1000)


def test_what_json_cannot_carry_is_refused_with_the_name_of_the_event() -> None:
    class Measured(Event, name="unit.measured"):
        value: float

    with pytest.raises(NotSerializable, match=r"JSON cannot carry the event 'unit.measured': NaN and Infinity"):
        write_event(Measured(value=float("inf")), 1000)


def test_a_secret_is_refused_because_it_would_arrive_as_asterisks() -> None:
    class Secret(Event, name="unit.secret"):
        token: SecretStr

    with pytest.raises(ConfigurationError, match="the event Secret has token, a secret, which would arrive as"):
        write_event(Secret(token=SecretStr("x")), 1000)


def test_any_event_can_be_read_as_its_class_and_as_no_other() -> None:
    event = AnyEvent("1", "unit.order.created", 1, {"order": "7"})
    assert event.read(Created) == Created(order="7")
    with pytest.raises(
        UsageError, match=r"the class must be one of 'unit\.order\.created'; got Paid, of 'unit\.order\.paid'"
    ):
        event.read(Paid)


def test_any_event_can_be_read_as_a_base_of_events_which_has_what_they_share() -> None:
    class Numbered(Event):
        order: str

    assert AnyEvent("1", "unit.order.new", 1, {"order": "7", "more": 1}).read(Numbered) == Numbered(order="7")
    with pytest.raises(InvalidParams, match="'Numbered'"):
        AnyEvent("1", "unit.order.new", 1, {}).read(Numbered)


# Patterns.


@pytest.mark.parametrize("pattern", ["a", "a.b", "*", "#", "a.*", "*.b.#", "#.b.#", "a-b_c.*"])
def test_a_pattern_is_words_and_wildcards(pattern: str) -> None:
    assert check_pattern(pattern) == pattern


@pytest.mark.parametrize("pattern", ["", ".", "a.", ".a", "a..b", "a*", "a b", "#.#", "a.#b", ".".join("a" * 129)])
def test_what_is_no_pattern_is_refused_with_the_form_of_one(pattern: str) -> None:
    with pytest.raises(
        ConfigurationError, match=r"a pattern must be words .* such as 'order\.\*', 'order\.#' or '#'; got"
    ):
        Service("s").on(pattern)(lambda event: None)


# Subscriptions.


def test_a_version_is_read_by_its_class_or_by_the_next_lower_one_or_by_the_lowest() -> None:
    found = topics(Created, CreatedV3)
    by = {version: found.kind_of("unit.order.created", version) for version in (1, 2, 3, 9)}
    assert by == {1: Created, 2: Created, 3: CreatedV3, 9: CreatedV3}
    assert topics(CreatedV3).kind_of("unit.order.created", 1) is CreatedV3
    assert found.kind_of("unit.order.paid", 1) is None


@pytest.mark.parametrize(
    ("given", "annotation", "kinds", "takes_any"),
    [
        ((Created,), Any, {Created}, False),
        ((Created,), Created, {Created}, False),
        ((Created, Paid), Created | Paid, {Created, Paid}, False),
        ((Created, Paid), Event, {Created, Paid}, False),
        ((Shipped,), Base, {Shipped}, False),
        ((Created,), Annotated[Created, "doc"], {Created}, False),
        ((Created,), AnyEvent, set(), True),
        (("unit.#",), Any, set(), True),
        (("unit.#", Created), Any, {Created}, True),
        (("unit.order.*",), Created | Paid, {Created, Paid}, False),
        (("unit.order.*",), Created | AnyEvent, {Created}, True),
        (("unit.order.created",), Created | CreatedV3, {Created, CreatedV3}, False),
    ],
)
def test_the_annotation_says_what_a_handler_gets(given: Any, annotation: Any, kinds: set[Any], takes_any: bool) -> None:
    found = topics(*given, annotation=annotation)
    assert ({*found.kinds}, found.takes_any) == (kinds, takes_any)


@pytest.mark.parametrize(
    ("given", "annotation", "match"),
    [
        ((Created,), str, r"must take the event in one parameter that is annotated with a class .* got <class 'str'>"),
        ((Created,), Created | None, r"must take the event in one parameter .*; got <class 'NoneType'>"),
        (
            (Created, Paid),
            Created,
            r"subscribes to Paid, which its parameter does not take: annotate it with Created \| Paid",
        ),
        (
            (Created,),
            Created | Paid,
            r"takes Paid, and none of its patterns takes 'unit.order.paid': add the class, @shop.on",
        ),
        (
            ("unit.*.created", "invoice.*"),
            Created,
            r"subscribes to 'invoice\.\*', and its parameter takes no such event",
        ),
        (("unit.#",), Event, r"subscribes to 'unit\.#', and .* or with AnyEvent for events of any name"),
    ],
)
def test_a_parameter_that_does_not_fit_the_topics_is_refused_with_the_fix(
    given: Any, annotation: Any, match: str
) -> None:
    with pytest.raises(ConfigurationError, match=match):
        topics(*given, annotation=annotation)


class Plain(BaseModel):
    order: str


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ((), r"on must be given the events, as in @s\.on\(OrderCreated\)"),
        ((lambda event: None,), r"on must be given the events, .*; got the function"),
        (
            (Plain,),
            r"classes of events; got Plain, which is none: write class Plain\(rpcq.Event, name='order.created'\)",
        ),
        ((Base,), r"classes of events with a name; got Base: write class Base\(Event, name="),
        ((Created(order="7"),), r"on must be given classes of events, or patterns, as in on\(OrderCreated\)"),
        ((7,), "on must be given classes of events, or patterns"),
    ],
)
def test_what_is_no_topic_is_refused(given: Any, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        Service("s").on(*given)(lambda event: None)


async def two(event: Created, more: int) -> None: ...
async def none() -> None: ...
async def several(*events: Created) -> None: ...
async def only_context(context: Context) -> None: ...


@pytest.mark.parametrize("handler", [two, none, several, only_context])
def test_a_handler_takes_one_event(handler: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"must take the event in one parameter, and may take a Context beside"
    ):
        Service("s").on(Created)(handler)


def test_the_name_of_a_subscription_is_that_of_the_function_or_given_and_is_used_once() -> None:
    service = Service("s")

    @service.on(Created)
    async def ship(event: Created) -> None: ...

    service.on(Created, name="again")(ship)
    assert [*service.subscriptions] == ["ship", "again"]
    for name, match in (
        ("ship", "must have different names; got 'ship' twice"),
        ("a.b", "the name of a subscription must"),
    ):
        with pytest.raises(ConfigurationError, match=match):
            service.on(Created, name=name)(ship)
    with pytest.raises(ConfigurationError, match="a subscription must not be called 'suspects'"):
        service.on(Created, name="suspects")(ship)


def test_a_class_that_refuses_what_it_does_not_know_can_be_an_event() -> None:
    class Strict(Event, name="unit.strict"):
        model_config = ConfigDict(extra="forbid")
        order: str

    with pytest.raises(InvalidParams, match="Extra inputs are not permitted"):
        read_event(Strict, b'{"order":"7","total":5}')


def test_two_classes_of_one_name_and_version_in_one_subscription_are_refused() -> None:
    def made() -> type[Event]:
        class Twin(Event, name="unit.twin"):
            pass

        return Twin

    first, second = made(), made()  # neither can be imported, so both may be there
    with pytest.raises(ConfigurationError, match="events must differ in name or version"):
        topics(first, second)


@pytest.mark.parametrize("options", [{"retry": None}, {"at_most_once": True}, {"rate": "1/s"}, {"max_concurrency": 2}])
def test_a_subscription_of_each_instance_takes_no_options_of_jobs(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="on must have no options with each_instance=True besides name and"):
        Service("s").on(Created, each_instance=True, **options)


def test_a_service_with_subscriptions_of_each_instance_alone_has_no_queue_that_lasts() -> None:
    service = Service("s")

    @service.on(Created, each_instance=True, timeout=5, name="cache")
    async def cached(event: Created) -> None: ...

    service.check()
    assert (service.takes_jobs, service.is_called, service.lasting) == (False, False, [])

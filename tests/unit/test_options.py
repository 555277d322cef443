"""Options: what cannot be is refused when they are made, by its name."""

from __future__ import annotations

import dataclasses
import inspect
import math
import pydoc
import re
import typing
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest

import rpcq
from rpcq.errors import ConfigurationError, DomainError, InvalidParams
from rpcq.options import (
    MAX_TIMEOUT,
    Batch,
    CallKwargs,
    CallOptions,
    ClientKwargs,
    ClientOptions,
    ConnectionKwargs,
    ConnectionOptions,
    WorkerKwargs,
    WorkerOptions,
    check_name,
)
from rpcq.web import Rpc

NO_SECONDS = [0, -1, -0.0, math.nan, math.inf, -math.inf, True, False, "5", None, 1j, [1]]
NO_COUNT = [0, -1, 1.0, 1.5, math.nan, math.inf, True, "5", None]
NO_NAME = ["", "a b", "a/b", "é", "a" * 101, "a\n", None, 5, b"a"]


class OutOfStock(DomainError):
    """A service's own."""


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (CallOptions, CallKwargs),
        (ConnectionOptions, ConnectionKwargs),
        (ClientOptions, ClientKwargs),
        (WorkerOptions, WorkerKwargs),
    ],
)
def test_keyword_arguments_and_option_objects_have_the_same_names_and_types(options: Any, settings: Any) -> None:
    assert typing.get_type_hints(settings) == {
        it.name: typing.get_type_hints(options)[it.name] for it in fields(options)
    }


@pytest.mark.parametrize("options", [CallOptions, ConnectionOptions, ClientOptions, WorkerOptions])
def test_defaults_can_be_used_and_cannot_be_changed(options: Any) -> None:
    made = options()
    with pytest.raises(FrozenInstanceError):
        setattr(made, fields(made)[0].name, None)
    assert replace(made) == made


@pytest.mark.parametrize("name", ["a", "A-Z_a.z-0.9", "x" * 100])
def test_a_name_that_is_one_is_given_back(name: str) -> None:
    assert check_name("the name of a service", name) == name


@pytest.mark.parametrize("name", NO_NAME)
def test_a_name_that_cannot_be_is_refused_with_what_it_names(name: Any) -> None:
    with pytest.raises(ConfigurationError, match="the name of a service must be"):
        check_name("the name of a service", name)


@pytest.mark.parametrize("value", ["a.b", ".", "amq"])
def test_a_namespace_has_no_dot_so_that_no_two_services_have_the_same_queue(value: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^namespace must be .* not 'amq', .*; got '{value}'"):
        ConnectionOptions(namespace=value)


@pytest.mark.parametrize("value", [*NO_SECONDS, MAX_TIMEOUT + 1])
@pytest.mark.parametrize("options", [CallOptions, ClientOptions])
def test_a_timeout_that_is_no_number_of_seconds_is_refused(options: Any, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^timeout must be .* above 0 and at most 1500; got "):
        options(timeout=value)


@pytest.mark.parametrize("value", [0.001, 1, MAX_TIMEOUT])
def test_a_timeout_may_be_a_fraction_or_a_whole_number_up_to_the_limit(value: float) -> None:
    assert CallOptions(timeout=value).timeout == value
    assert ClientOptions(timeout=value).timeout == value


@pytest.mark.parametrize("value", NO_SECONDS)
@pytest.mark.parametrize(("options", "name"), [(ConnectionOptions, "connect_timeout"), (WorkerOptions, "grace")])
def test_other_times_that_are_no_number_of_seconds_are_refused(options: Any, name: str, value: Any) -> None:
    got = re.escape(repr(value))
    with pytest.raises(ConfigurationError, match=rf"^{name} must be a number of seconds above 0; got {got}\Z"):
        options(**{name: value})


@pytest.mark.parametrize("value", [*NO_SECONDS, 0.5, 10.5, 3601])
@pytest.mark.parametrize("options", [ConnectionOptions, ClientOptions, WorkerOptions])
def test_a_heartbeat_that_is_no_whole_number_of_seconds_is_refused(options: Any, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^heartbeat must be"):
        options(heartbeat=value)


@pytest.mark.parametrize("value", [1, 10.0, 3600])
def test_a_heartbeat_is_a_whole_number_of_seconds(value: float) -> None:
    assert ConnectionOptions(heartbeat=value).heartbeat == value


@pytest.mark.parametrize(
    ("options", "name", "most"),
    [
        (ConnectionOptions, "max_body", 512 * 1024 * 1024),
        (ClientOptions, "max_in_flight", 10_000_000),
        (WorkerOptions, "prefetch", 65_535),
    ],
)
def test_a_count_is_a_whole_number_within_its_limits(options: Any, name: str, most: int) -> None:
    assert getattr(options(**{name: 1}), name) == 1
    assert getattr(options(**{name: most}), name) == most
    for value in (*NO_COUNT, most + 1):
        with pytest.raises(ConfigurationError, match=rf"^{name} must be a whole number from 1 to {most}; got "):
            options(**{name: value})


@pytest.mark.parametrize("value", NO_NAME)
@pytest.mark.parametrize("name", ["name", "namespace"])
def test_the_names_of_a_program_and_a_namespace_are_names(name: str, value: Any) -> None:
    for options in (ConnectionOptions, ClientOptions, WorkerOptions):
        with pytest.raises(ConfigurationError, match=f"^{name} must be 1 to 100 of the characters"):
            options(**{name: value})


def test_errors_are_domain_errors_in_a_tuple_or_a_list() -> None:
    assert CallOptions(errors=[OutOfStock]).errors == (OutOfStock,)  # type: ignore[arg-type]
    assert CallOptions(errors=(it for it in (OutOfStock,))).errors == (OutOfStock,)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [(ValueError,), (InvalidParams,), (OutOfStock("x"),), ("OutOfStock",), [None]])
def test_errors_that_are_no_domain_errors_are_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^errors must be subclasses of DomainError; got "):
        CallOptions(errors=value)


@pytest.mark.parametrize("value", [OutOfStock, "out_of_stock", None, 5])
def test_an_error_that_is_not_in_a_tuple_is_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^errors must be a tuple, even for one item; got "):
        CallOptions(errors=value)


@pytest.mark.parametrize("value", ["a", "é" * 127, "a b/c"])
def test_a_queue_may_be_called_anything_of_up_to_255_bytes(value: str) -> None:
    assert CallOptions(queue=value).queue == value


@pytest.mark.parametrize("value", ["", "a" * 256, "é" * 128, "\ud800", 5, b"queue"])
def test_the_name_of_a_queue_that_cannot_be_is_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^queue must be a string of 1 to 255 bytes; got "):
        CallOptions(queue=value)


@pytest.mark.parametrize("name", ["x-", "x-tenant", "x-deathly", "x-delivery-counter", "x-" + "a" * 253])
def test_metadata_are_strings_under_names_of_ones_own(name: str) -> None:
    assert CallOptions(metadata={name: ""}).metadata == {name: ""}


@pytest.mark.parametrize(
    "name",
    [
        "",
        "tenant",
        "X-Tenant",
        "rpcq-deadline",
        "x-death",
        "x-first-death-queue",
        "x-last-death-reason",
        "x-delivery-count",
        "x-acquired-count",
        "x-opt-any",
        "x-" + "a" * 254,
        "x-\ud800",
        5,
        None,
    ],
)
def test_names_of_metadata_that_are_not_ones_own_are_refused(name: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^names of metadata must begin with 'x-'"):
        CallOptions(metadata={name: "value"})


@pytest.mark.parametrize("value", [5, None, b"bytes", ["a"], "\ud800"])
def test_metadata_that_are_no_strings_are_refused_by_their_name(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^metadata 'x-tenant' must be a string; got "):
        CallOptions(metadata={"x-tenant": value})


@pytest.mark.parametrize("value", [None, "x-a", [("x-a", "b")]])
def test_metadata_that_are_no_mapping_are_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^metadata must be a mapping"):
        CallOptions(metadata=value)


def test_any_mapping_will_do_for_metadata() -> None:
    class Own(Mapping[str, str]):
        def __getitem__(self, key: str) -> str:
            return key

        def __iter__(self) -> Any:
            return iter(["x-a"])

        def __len__(self) -> int:
            return 1

    assert CallOptions(metadata=Own()).metadata["x-a"] == "x-a"


def test_patterns_of_reply_queues_are_kept_as_a_tuple() -> None:
    assert WorkerOptions(reply_to=["replies\\..*", "other"]).reply_to == ("replies\\..*", "other")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["(", "*", r"\N{BULLET}", "\ud800", 5, b"bytes", None])
def test_a_pattern_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^reply_to must be regular expressions; got "):
        WorkerOptions(reply_to=("fine", value))


@pytest.mark.parametrize("value", ["replies", b"replies", None, 5])
def test_patterns_that_are_not_in_a_tuple_are_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^reply_to must be a tuple, even for one item; got "):
        WorkerOptions(reply_to=value)


def test_metadata_are_copied_so_that_what_is_checked_is_what_is_sent() -> None:
    given = {"x-user": "ada"}
    options = CallOptions(metadata=given)
    given["x-death"] = "forged"
    assert options.metadata == {"x-user": "ada"}


# For people at a prompt.


@pytest.mark.parametrize(
    ("offered", "kind"),
    [
        (rpcq.Client, ClientOptions),
        (rpcq.Worker, WorkerOptions),
        (Rpc, ClientOptions),
        (rpcq.Client.with_options, CallOptions),
        (rpcq.CallMaker.with_options, CallOptions),
        (rpcq.ServiceProxy.with_options, CallOptions),
        (rpcq.with_options, CallOptions),
    ],
)
def test_help_lists_all_options_with_their_types_and_descriptions(offered: Any, kind: type[Any]) -> None:
    text = pydoc.render_doc(offered, renderer=pydoc.plaintext)  # type: ignore[attr-defined]
    parameters = inspect.signature(offered).parameters
    assert not any(it.kind is it.VAR_KEYWORD for it in parameters.values())
    for it in dataclasses.fields(kind):
        assert parameters[it.name].annotation == typing.get_type_hints(kind)[it.name]
        assert re.search(rf"^[ |]+{it.name}: \w", text, re.MULTILINE), it.name
        if kind is CallOptions:
            assert f"{it.name}: " in text
            assert str(parameters[it.name]).endswith(" = ...")
        else:
            assert parameters[it.name].default == getattr(kind(), it.name)


@pytest.mark.parametrize("value", NO_COUNT)
@pytest.mark.parametrize("name", ["max_size", "max_concurrency"])
def test_a_batch_has_sizes_of_at_least_1(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} must be a whole number from 1 to 65535"):
        Batch(**{name: value})


@pytest.mark.parametrize("value", [-0.1, 60.1, math.nan, math.inf, True, "5", None])
def test_a_batch_waits_for_0_to_60_seconds(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="max_wait must be a number of seconds from 0 to 60"):
        Batch(max_wait=value)
    assert Batch(max_wait=0).max_wait == 0

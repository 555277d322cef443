"""Errors: the tree is as drawn, and what goes over the wire comes back as what it was."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import re
import traceback
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rpcq import errors
from rpcq.errors import (
    BrokerError,
    BrokerUnreachable,
    CallError,
    CallTimeout,
    ConfigurationError,
    DomainError,
    InvalidParams,
    InvalidReply,
    MethodNotFound,
    NotSerializable,
    OutcomeUnknown,
    Overloaded,
    ProtocolError,
    RemoteError,
    RpcqError,
    ServiceUnavailable,
    TooLarge,
    from_wire,
    to_wire,
)
from rpcq.wire import bodies

_LINE = re.compile(
    r"(?P<indent>[ |]*)(?:\+-- )?(?P<name>[A-Z]\w+)(?: \((?P<also>\w+)\))?"
    r"(?:  +.*?(?:  +(?P<executed>no|maybe|yes|any) +(?P<retryable>no|yes|if no))?)?\Z"
)


def _drawn() -> dict[str, tuple[str | None, str | None, str | None, str | None]]:
    """What the module's docstring draws: name -> parent, further base, executed, retryable."""
    drawing = (errors.__doc__ or "").split("\n\n")[1]
    found: dict[str, tuple[str | None, str | None, str | None, str | None]] = {}
    path: list[str] = []
    for line in drawing.splitlines():
        match = _LINE.match(line)
        assert match, f"a line of the drawing that this test cannot read: {line!r}"
        depth = (len(match["indent"]) - 4) // 4 + ("+--" in line)
        del path[depth:]
        found[match["name"]] = (path[-1] if path else None, match["also"], match["executed"], match["retryable"])
        path.append(match["name"])
    return found


DRAWN = _drawn()
CLASSES = {name: it for name, it in vars(errors).items() if inspect.isclass(it) and it.__module__ == errors.__name__}
CALL_ERRORS = [it for it in CLASSES.values() if issubclass(it, CallError)]
LEAVES = [it for it in CALL_ERRORS if it is not CallError]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)

dozens = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)


class OutOfStock(DomainError):
    """With the default code and constructor."""


class CardDeclined(DomainError):
    """With a constructor of its own, and a code."""

    code = "card.declined-v2"

    def __init__(self, card: str, *, tries: int) -> None:
        super().__init__(f"card {card} was declined", details={"tries": tries}, retryable=True)
        self.card = card


class Forgetful(DomainError):
    """With a constructor that does not call the one above it."""

    def __init__(self, sku: str, *, left: int = 0) -> None:
        self.sku = sku
        self.left = left


def test_every_error_of_the_module_is_in_the_drawing_and_nothing_else_is() -> None:
    assert set(DRAWN) == set(CLASSES)


@pytest.mark.parametrize("name", DRAWN)
def test_an_error_stands_under_its_parent_in_the_drawing(name: str) -> None:
    parent, also, _, _ = DRAWN[name]
    bases = [it.__name__ for it in CLASSES[name].__bases__]
    assert bases == [it for it in (parent or "Exception", also) if it]


@pytest.mark.parametrize("kind", LEAVES)
def test_an_error_of_a_call_is_executed_and_retryable_as_drawn(kind: type[CallError]) -> None:
    _, _, executed, retryable = DRAWN[kind.__name__]
    assert executed
    assert retryable
    if executed != "any":
        assert kind().executed == executed
        assert kind().retryable is (retryable == "yes")
    else:
        for ran in ("no", "maybe", "yes"):
            assert kind(executed=ran).executed == ran
            assert kind(executed=ran).retryable is (ran == retryable.removeprefix("if "))


def test_every_error_has_a_docstring() -> None:
    assert [name for name, it in CLASSES.items() if not it.__doc__] == []


def test_all_errors_are_caught_as_one() -> None:
    assert all(issubclass(it, RpcqError) for it in CLASSES.values())


def test_a_broker_error_says_whether_somebody_has_to_mend_something() -> None:
    passing = {it for it in CLASSES.values() if issubclass(it, BrokerError) and not it.permanent}
    assert passing == {BrokerUnreachable, ProtocolError}


def test_a_timeout_that_did_not_run_is_retryable_also_where_that_was_left_open() -> None:
    assert CallTimeout("late", executed="no", retryable=None).retryable is True
    assert CallTimeout("late", executed="no", retryable=False).retryable is False
    assert CallTimeout("late").retryable is False
    assert CallTimeout("late").executed == "maybe"


def test_the_text_of_an_error_says_whether_it_ran_and_which_call_it_was() -> None:
    error = RemoteError("it failed", incident="4f", correlation_id="ab-1")
    assert str(error) == "UNKNOWN: it failed (executed=yes, incident=4f, call=ab-1)"
    assert str(MethodNotFound()) == "MethodNotFound (executed=no)"


@pytest.mark.parametrize("kind", LEAVES)
def test_an_error_survives_the_wire(kind: type[CallError]) -> None:
    sent = kind("why", executed="maybe", retryable=True, details={"field": [1, None]}, incident="4f2a")
    got = from_wire(bodies.loads(bodies.dumps(to_wire(sent))), (DomainError,))
    expected = InvalidParams if issubclass(kind, InvalidParams) else kind  # what was never sent has no code of its own
    assert type(got) is expected
    assert to_wire(got) == to_wire(sent)
    assert (got.message, got.executed, got.retryable) == ("why", "maybe", True)
    assert (got.details, got.incident) == ({"field": [1, None]}, "4f2a")


@pytest.mark.parametrize("kind", CALL_ERRORS)
def test_the_defaults_of_an_error_survive_the_wire(kind: type[CallError]) -> None:
    sent = kind("why")
    got = from_wire(bodies.loads(bodies.dumps(to_wire(sent))))
    assert (got.code, got.executed, got.retryable) == (sent.code, sent.executed, sent.retryable)
    assert "incident" not in to_wire(sent)


def test_only_errors_that_a_worker_may_say_have_a_code_of_their_own() -> None:
    assert {kind.__name__ for kind in LEAVES} - {kind.__name__ for kind in errors.BY_CODE.values()} == {
        "NotSerializable",
        "TooLarge",
        "RemoteError",
        "DomainError",
    }
    assert NotSerializable.code == TooLarge.code == InvalidParams.code


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
@pytest.mark.parametrize(
    "error",
    [
        *(kind("why", details=[1], incident="4f", correlation_id="c-1", retryable=True) for kind in CALL_ERRORS),
        RemoteError("why", code="teapot"),
        OutOfStock("none left"),
        CardDeclined("1234", tries=3),
        Forgetful("a", left=2),
    ],
    ids=lambda it: type(it).__name__,
)
def test_an_error_of_a_call_can_be_pickled_and_copied(error: CallError, again: Any) -> None:
    other = again(error)
    assert type(other) is type(error)
    assert other is not error
    assert vars(other) == vars(error)
    assert other.args == error.args
    assert str(other) == str(error)


ABOUT_JOBS = (errors.SendError, errors.RetryLater, errors.JobFailed, errors.NoResult)
"""Their arguments are others than a message."""


@pytest.mark.parametrize("kind", [it for it in CLASSES.values() if not issubclass(it, (CallError, *ABOUT_JOBS))])
def test_other_errors_can_be_pickled(kind: type[RpcqError]) -> None:
    other = pickle.loads(pickle.dumps(kind("no such host")))
    assert type(other) is kind
    assert str(other) == "no such host"


@pytest.mark.parametrize(
    "error",
    [
        errors.SendError("away", queued="maybe", message_id="7", key="k"),
        errors.RetryLater(2.5),
        errors.JobFailed("bad", executed="yes", reason="attempts", attempts=3, incident="i", job_id="7"),
        errors.NoResult("too large", reason="invalid_result", job_id="7", incident="i"),
    ],
    ids=repr,
)
def test_errors_about_jobs_can_be_pickled(error: RpcqError) -> None:
    other = pickle.loads(pickle.dumps(error))
    assert (type(other), vars(other), str(other)) == (type(error), vars(error), str(error))


@pytest.mark.parametrize("wrong", [-1, float("nan"), float("inf"), "5", None, True, 49 * 24 * 3600])
def test_a_pause_that_cannot_be_held_is_refused(wrong: object) -> None:
    with pytest.raises(errors.ConfigurationError, match="RetryLater must have a number of seconds from 0 to 4147200"):
        errors.RetryLater(wrong)  # type: ignore[arg-type]  # that is the test


def test_an_error_without_state_is_one_still() -> None:
    error = OutOfStock()
    error.__setstate__(None)
    assert error.args == ()


def test_notes_are_kept_in_a_copy() -> None:
    error = OutOfStock("none left")
    error.add_note("of sku 7")
    assert pickle.loads(pickle.dumps(error)).__notes__ == ["of sku 7"]


def test_the_code_of_a_domain_error_is_its_name_in_snake_case() -> None:
    class HTTP2Failed(DomainError):
        pass

    assert OutOfStock.code == "out_of_stock"
    assert HTTP2Failed.code == "http2_failed"


def test_a_domain_error_may_have_a_code_of_its_own_and_its_subclass_does_not_inherit_it() -> None:
    class Worse(CardDeclined):
        pass

    assert CardDeclined.code == "card.declined-v2"
    assert Worse.code == "worse"


@pytest.mark.parametrize("code", ["", "Upper", "has space", "9lives", "_x", "a" * 101, "a\n", 5, None])
def test_a_domain_error_with_a_code_that_cannot_be_is_refused_when_it_is_defined(code: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"Bad\.code must be lower case"):
        type("Bad", (DomainError,), {"code": code})


def test_a_domain_error_whose_name_gives_no_code_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"_Private\.code must be lower case .*; got '_private'"):
        type("_Private", (DomainError,), {})


def test_a_declared_domain_error_comes_back_as_its_class_whatever_its_constructor_takes() -> None:
    got = from_wire(to_wire(CardDeclined("1234", tries=3)), (OutOfStock, CardDeclined))
    assert type(got) is CardDeclined
    assert got.message == "card 1234 was declined"
    assert got.details == {"tries": 3}
    assert got.retryable is True


def test_a_domain_error_that_the_caller_did_not_declare_keeps_its_code() -> None:
    got = from_wire(to_wire(OutOfStock("none left", details={"sku": 7})), (CardDeclined,))
    assert type(got) is RemoteError
    assert (got.code, got.message, got.details) == ("out_of_stock", "none left", {"sku": 7})
    assert str(got) == "out_of_stock: none left (executed=yes)"


def test_a_domain_error_is_whole_even_if_its_constructor_does_not_call_the_one_above_it() -> None:
    error = Forgetful("sku-7", left=2)
    assert str(error) == "Forgetful"
    assert error.args == ("sku-7",)
    assert to_wire(error) == {
        "code": "forgetful",
        "message": "",
        "executed": "yes",
        "retryable": False,
        "details": None,
    }
    assert type(from_wire(to_wire(error), (Forgetful,))) is Forgetful


def test_the_text_of_a_domain_error_is_its_message() -> None:
    error = from_wire(to_wire(OutOfStock("only 2 are left")), (OutOfStock,))
    assert str(error) == "only 2 are left"
    assert str(OutOfStock(7)) == "7"  # type: ignore[arg-type]
    assert str(CardDeclined("12", tries=1)) == "card 12 was declined"


def test_an_attribute_that_a_domain_error_does_not_have_names_its_details() -> None:
    error = from_wire(to_wire(CardDeclined("1234", tries=3)), (CardDeclined,))
    with pytest.raises(AttributeError, match=r"CardDeclined has no 'card'; its details are {'tries': 3}"):
        _ = error.card  # type: ignore[attr-defined]


def test_an_undeclared_domain_error_says_how_to_catch_it() -> None:
    error = from_wire(to_wire(OutOfStock("none left")))
    text = "".join(traceback.format_exception_only(error))
    assert "to catch 'out_of_stock' by its class, declare it in errors= of the contract or of with_options" in text
    assert not hasattr(from_wire(to_wire(RemoteError("failed"))), "__notes__")


@pytest.mark.parametrize(
    ("message", "said"),
    [(7, "7"), (None, "None"), ("half a \ud800 pair", "half a ? pair"), (object, "<class 'object'>")],
)
def test_an_error_raised_with_anything_for_a_message_can_be_sent(message: Any, said: str) -> None:
    assert to_wire(OutOfStock(message))["message"] == said
    assert bodies.dumps(to_wire(OutOfStock(message)))


def test_a_code_that_nobody_knows_gives_a_remote_error_with_that_code() -> None:
    got = from_wire({"code": "TEAPOT", "message": "short and stout", "executed": "no", "retryable": True})
    assert type(got) is RemoteError
    assert (got.code, got.message, got.executed, got.retryable) == ("TEAPOT", "short and stout", "no", True)


def test_what_an_error_does_not_say_is_taken_as_unknown() -> None:
    got = from_wire({"code": "UNAVAILABLE"})
    assert type(got) is ServiceUnavailable
    assert (got.message, got.executed, got.retryable, got.details, got.incident) == ("", "maybe", False, None, None)


@pytest.mark.parametrize("executed", [None, "", "NO", "perhaps", 0, True, [], {}, ["no"]])
def test_an_executed_that_nobody_knows_counts_as_maybe(executed: Any) -> None:
    assert from_wire({"code": "UNAVAILABLE", "executed": executed}).executed == "maybe"


@pytest.mark.parametrize("retryable", [None, 1, "true", []])
def test_only_true_is_retryable(retryable: Any) -> None:
    assert from_wire({"code": "UNAVAILABLE", "retryable": retryable}).retryable is False


def test_a_message_and_an_incident_of_other_types_are_made_fit() -> None:
    assert from_wire({"code": "x", "message": 5, "incident": 5}).message == "5"
    assert from_wire({"code": "x", "message": None}).message == ""
    assert from_wire({"code": "x", "incident": 5}).incident is None


@pytest.mark.parametrize("body", [None, "UNKNOWN", 5, [], {}, {"code": None}, {"code": 5}, {"message": "no code"}])
def test_a_body_that_is_no_error_is_an_invalid_reply_that_may_have_run(body: Any) -> None:
    got = from_wire(body)
    assert type(got) is InvalidReply
    assert got.executed == "maybe"
    assert got.details == body
    assert json.dumps(body) in str(got)


def test_what_a_foreign_server_says_of_its_error_is_kept_up_to_a_limit() -> None:
    said = {"error": {"type": "ValueError", "message": "ValueError('größer als 90')", "args": [91]}}
    got = from_wire(said)
    assert "größer als 90" in got.message
    assert got.details == said
    assert len(from_wire({"error": "x" * 10_000}).message) < 1100


@dozens
@given(
    JSON
    | st.fixed_dictionaries(
        {"code": st.sampled_from(["UNKNOWN", "ABORTED", "out_of_stock"])},
        optional=dict.fromkeys(("message", "executed", "retryable", "details", "incident"), JSON),
    )
)
def test_whatever_json_an_error_reply_holds_it_becomes_one_error(body: Any) -> None:
    got = from_wire(body, (OutOfStock,))
    assert isinstance(got, CallError)
    assert got.executed in errors.EXECUTED
    assert isinstance(got.message, str)
    assert str(got)


def test_a_timeout_is_also_pythons_and_a_refused_parameter_is_also_a_type_error() -> None:
    assert isinstance(CallTimeout(), TimeoutError)
    assert isinstance(NotSerializable(), TypeError)
    assert isinstance(TooLarge(), ValueError)
    assert isinstance(BrokerUnreachable(), ConnectionError)
    assert isinstance(ConfigurationError(), ValueError)


@pytest.mark.parametrize("kind", [ServiceUnavailable, Overloaded])
def test_what_may_be_sent_again_did_not_run(kind: type[CallError]) -> None:
    assert kind().retryable
    assert kind().executed == "no"
    assert not kind(executed="maybe").retryable


def test_an_unknown_outcome_may_have_run_and_is_not_to_be_repeated() -> None:
    assert OutcomeUnknown().executed == "maybe"
    assert OutcomeUnknown().retryable is False

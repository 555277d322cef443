"""What JSON would change or lose: it is found wherever it stands, and nothing else is taken for it."""

from __future__ import annotations

import json
import math
import random
import uuid
from collections.abc import Callable, Iterator
from datetime import date
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Secret, SecretBytes, SecretStr, computed_field, field_serializer
from pydantic_core import from_json, to_json

from rpcq.wire import values
from rpcq.wire.values import NotCarried

hundreds = settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)

BEYOND = [
    *(
        "1e400",
        "-1e400",
        "1E400",
        "1E+400",
        "1e+400",
        "123456.7e999",
        "-0.1e400",
        "1e00000400",
        "1e99999999999999999999",
    ),
    *("1.8e308", "1.7976931348623159e308", "17976931348623159e292", "2e308"),
    *("1" + "0" * 400 + ".5", "-" + "9" * 310 + ".0", "9" * 309 + "e0", "1" * 230 + "e99", "9" * 250 + "E+60"),
]
"""JSON's numbers that no float has."""

WITHIN = [
    *(
        "1e-400",
        "-1e-400",
        "0e999",
        "0.0E+99999",
        "0e0000400",
        "1e308",
        "1.7976931348623157e308",
        "1e0000001",
        "5E-324",
    ),
    *("1e+10", "1e10", "1e+100", "1.5e+300", "0." + "1" * 500, "0." + "1" * 500 + "e200", "0." + "0" * 500 + "1e500"),
    *("1" + "0" * 308 + ".0", "9" * 4300, "-" + "1" * 400),
]
"""JSON's numbers that a float or an integer has, though some look otherwise."""

RECORD = json.dumps({"id": str(uuid.UUID(int=7)), "hash": "12e4" * 16, "n": 5e-5})
LARGE = {
    "an array of numbers": "[" + "0.25, " * 2000 + "%s]",
    "a matrix": "[" + "[1.5, 2, 3]," * 1000 + "[4, %s]]",
    "columns": '{"a": [' + "1.5, " * 1000 + '0], "b": [' + "1, " * 1000 + '0], "c": %s}',
    "a long text": '{"text": "' + "some letters e1 " * 1000 + '", "x": %s}',
    "records": "[" + f"{RECORD}," * 300 + '{\n"x"\t: %s\n}]',
    "names alone": "[" + '"a", null, true, ' * 500 + "%s]",
    "long integers": "[" + f"{'9' * 400}, " * 20 + "8, " * 1000 + "%s]",
}
"""Bodies of more than a few kilobytes, which are looked at in another way."""


def read(text: str) -> Any:
    value = from_json(text.encode())
    values.refuse_beyond_float(text.encode(), value)
    return value


def is_infinite(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(is_infinite, value))
    if isinstance(value, dict):
        return any(map(is_infinite, value.values()))
    return isinstance(value, float) and math.isinf(value)


# Numbers beyond a float.


@pytest.mark.parametrize("around", ["%s", "[%s]", " [1, %s ,2]", '{"a":{"b":[null,%s]}}', '{"a"\n:\t%s\r\n}', "[[%s]]"])
@pytest.mark.parametrize("number", BEYOND, ids=lambda it: it[:20])
def test_a_number_beyond_a_float_is_refused_wherever_it_stands(number: str, around: str) -> None:
    with pytest.raises(NotCarried, match="a number is beyond the range of a float"):
        read(around % number)


@pytest.mark.parametrize("around", ["%s", "[%s]", "[1,%s ,2]", '{"a":{"b":[%s]}}', '["%s"]', '{"%s":"a %s, b"}'])
@pytest.mark.parametrize("number", WITHIN, ids=lambda it: it[:20])
def test_a_number_that_a_float_or_an_integer_has_is_read(number: str, around: str) -> None:
    text = around.replace("%s", number)
    assert read(text) == json.loads(text)


@pytest.mark.parametrize(
    "around", ['"%s"', '["%s", "-%s "]', '{"%s": 5}', '{"a":"[%s]"}', '"x: %s, y"', '"\\"%s"', '"\\\\%s"']
)
@pytest.mark.parametrize("number", BEYOND, ids=lambda it: it[:20])
def test_strings_and_names_may_have_the_text_of_such_a_number(number: str, around: str) -> None:
    text = around.replace("%s", number)
    assert read(text) == json.loads(text)


@pytest.mark.parametrize(
    "text", ["123e456", "12345678-9e12-4e567-8e999", "0e1234", "1e4001 ", "e400", "f" * 64, "+49e123"]
)
def test_identifiers_that_look_like_such_a_number_are_read(text: str) -> None:
    assert read(json.dumps([text, {text: text}])) == [text, {text: text}]


@pytest.mark.parametrize("around", LARGE)
def test_such_a_number_is_found_in_a_large_body_of_any_kind(around: str) -> None:
    for number in (*BEYOND, "1e309"):
        with pytest.raises(NotCarried, match="beyond the range"):
            read(LARGE[around].replace("%s", number))


@pytest.mark.parametrize("around", LARGE)
def test_a_large_body_of_any_kind_is_read_where_it_has_none(around: str) -> None:
    for number in (*WITHIN, '"1e400"', '"a 1e400, "', "null", "true", "[]"):
        text = LARGE[around].replace("%s", number)
        assert read(text) == from_json(text.encode())


def test_numbers_that_are_beyond_a_float_only_together_are_read() -> None:
    assert read(json.dumps([1.7e308] * 500)) == [1.7e308] * 500
    assert read(json.dumps([10**400] * 500)) == [10**400] * 500


NUMBERS = st.builds(
    "{}{}{}{}".format,
    st.sampled_from(["", "-"]),
    st.integers(0, 10**18).map(str) | st.integers(190, 330).map(lambda it: "9" * it),
    st.sampled_from(["", ".0", ".12345678901234567890"]),
    st.just("")
    | st.builds(
        "{}{}{}{}".format,
        st.sampled_from("eE"),
        st.sampled_from(["", "+", "-"]),
        st.sampled_from(["", "0", "00"]),
        st.sampled_from([0, 5, 16, 99, 100, 250, 290, 307, 308, 309, 400, 99999]),
    ),
)
TEXTS = st.recursive(
    NUMBERS | (NUMBERS | st.text(max_size=5)).map(json.dumps) | st.sampled_from(["null", "true", '"\\\\"', '"\\""']),
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda it: f"[{', '.join(it)}]")
        | st.dictionaries(NUMBERS.map(json.dumps), inner, max_size=3).map(
            lambda it: f"{{{','.join(f'{name}:{part}' for name, part in it.items())}}}"
        )
    ),
    max_leaves=10,
)


@hundreds
@given(TEXTS, st.booleans())
@example("[1e400]", True)
def test_a_body_is_refused_if_and_only_if_a_number_in_it_became_infinite(text: str, is_large: bool) -> None:
    if is_large:
        text = f"[{text}{json.dumps([{'a': 'some text'}] * 300)[1:-1].join([',', ']'])}"
    if is_infinite(from_json(text.encode())):
        with pytest.raises(NotCarried):
            read(text)
    else:
        assert read(text) == from_json(text.encode())


# Integers that nobody reads.


@pytest.mark.parametrize("sign", [1, -1])
def test_an_integer_of_as_many_digits_as_are_read_is_written_and_no_longer_one(sign: int) -> None:
    digits = values.MAX_DIGITS if sign > 0 else values.MAX_DIGITS - 1  # some versions of pydantic count the sign
    longest = sign * (10**digits - 1)
    for value in (longest, [longest] * 3, {"a": ["text", longest]}):
        body = to_json(value)
        values.refuse_changed(value, body)
        assert from_json(body) == value
    for value in (
        sign * 10**values.MAX_DIGITS,
        ["a" * 5000, 10**5000],
        [1.5] * 3000 + [10**4301],
        {"a": {"b": 2**20000}},
    ):
        with pytest.raises(NotCarried, match="an integer of more than 4300 digits"):
            values.refuse_changed(value, to_json(value))


@pytest.mark.parametrize("value", ["1" * 10_000, ["1" * 4301, 5], {"7" * 9000: 1}, [10**4000] * 9, list(range(5000))])
def test_digits_in_strings_and_many_integers_are_written(value: Any) -> None:
    values.refuse_changed(value, to_json(value))


@pytest.mark.parametrize("before", [0, 1, 2148, 2149, 2150, 2151, 4299, 4300, 4301, 10_000])
def test_a_long_integer_is_found_wherever_it_begins(before: int) -> None:
    value = ["a" * before, 10**4300]
    with pytest.raises(NotCarried):
        values.refuse_changed(value, to_json(value))


# Secrets.


class Account(BaseModel):
    name: str = "a"
    password: SecretStr | None = SecretStr("hidden")


class Shown(BaseModel):
    password: SecretStr = SecretStr("hidden")
    note: str = "2 ** 3"

    @field_serializer("password", when_used="json")
    def show(self, value: SecretStr) -> str:
        return value.get_secret_value()


class Computed(BaseModel):
    @computed_field  # type: ignore[prop-decorator]
    @property
    def token(self) -> SecretStr:
        return SecretStr("hidden")


def _secrets() -> Iterator[SecretStr]:
    yield SecretStr("hidden")


@pytest.mark.parametrize(
    "make",
    [
        lambda: SecretStr("hidden"),
        lambda: SecretBytes(b"hidden"),
        lambda: Secret[int](5),
        lambda: Secret[date](date(2026, 1, 2)),
        lambda: [1, {"a": (SecretStr("hidden"),)}],
        lambda: {SecretStr("hidden"): 1},
        lambda: frozenset({SecretStr("hidden")}),
        Account,
        lambda: [{"accounts": [Account()]}],
        Computed,
        lambda: ["5 * 3", Account()],
        _secrets,
        lambda: [_secrets()],
    ],
)
def test_a_secret_is_refused_wherever_it_stands_and_not_told(make: Callable[[], Any]) -> None:
    value = make()
    with pytest.raises(
        NotCarried, match=r"a secret would arrive as asterisks; pass secret\.get_secret_value\(\)"
    ) as caught:
        values.refuse_changed(value, to_json(value))
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        "**********",
        ["**********", {"**********": "**"}],
        Account(password=None, name="**********"),
        Shown(),
        [Shown(), "**"],
        (it for it in ("**", "***********")),
    ],
)
def test_asterisks_alone_are_no_secret(value: Any) -> None:
    values.refuse_changed(value, to_json(value))


def test_a_secret_that_hides_in_another_way_is_refused_as_well() -> None:
    class Quiet(Secret[str]):
        def _display(self) -> str:
            return "hush"

    class Quieter(Quiet):
        pass

    assert values.OWN_SECRETS()
    for secret in (Quiet("hidden"), [Quieter("hidden")], Secret[int](0), [SecretStr("hidden")]):
        with pytest.raises(NotCarried, match="a secret would arrive"):
            values.refuse_changed(secret, to_json(secret))
    values.refuse_changed(["hush", ""], to_json(["hush", ""]))


@hundreds
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.text('*a"\\ ')
        | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("*a"), inner, max_size=4),
    )
)
def test_plain_values_are_neither_refused_when_written_nor_when_read(value: Any) -> None:
    body = to_json(value)
    values.refuse_changed(value, body)
    values.refuse_beyond_float(body, from_json(body))


def test_a_look_at_many_random_numbers_finds_only_what_is_there() -> None:
    draw = random.Random(5)
    numbers = [draw.random() * 10 ** draw.uniform(-320, 307) for _ in range(5000)]
    text = json.dumps({"numbers": [[it] for it in numbers]})
    assert read(text) == {"numbers": [[it] for it in numbers]}
    with pytest.raises(NotCarried):
        read(text.replace("]]", "], [1e309]]"))

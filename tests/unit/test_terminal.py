"""Text for terminals: nothing in it is obeyed, and as JSON it keeps its value."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpcq.terminal import printable, printable_json

dozens = settings(max_examples=300, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("plain æøå 日本語 🐇 [red]", "plain æøå 日本語 🐇 [red]"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\x07\x00\r\x7f", r"\x07\x00\r\x7f"),
        ("\x9b31m\x85", r"\x9b31m\x85"),
        ("\u202etxt.exe\u2066\u200b\u2028\ufeff", r"\u202etxt.exe\u2066\u200b\u2028\ufeff"),
        ("\U000e0041", r"\U000e0041"),
        ("\ud800", r"\ud800"),
        ("one\n\ttwo", r"one\n\ttwo"),
    ],
)
def test_what_is_not_printable_is_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_text_with_lines_keeps_newlines_and_tabs_and_no_other_control() -> None:
    assert printable("one\n\ttwo\r\x1b", lines=True) == "one\n\ttwo\\r\\x1b"


@dozens
@given(st.text(alphabet=st.characters()))
def test_whatever_comes_is_printable(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(text, lines=True).replace("\n", "").replace("\t", "").isprintable()


values = st.recursive(st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


@dozens
@given(values, st.sampled_from([None, 2]))
def test_json_is_printable_and_keeps_its_value(value: object, indent: int | None) -> None:
    text = printable_json(json.dumps(value, indent=indent, ensure_ascii=False))
    assert text.replace("\n", "").isprintable()
    assert json.loads(text) == value

"""Logs: JSON or readable, with correlation IDs and without passwords, and never in the way."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import pickle
import re
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from rpcq import logs
from support.logged import event_of

SECRET = "s3cr3t"
URL = f"amqp://user:{SECRET}@rabbit:5672/"


class Stream(io.StringIO):
    """A stream that is a terminal, or is none."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """The root logger and the context are left as they were found."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with structlog.contextvars.bound_contextvars():
        yield
        structlog.contextvars.clear_contextvars()
    root.handlers[:], root.level = handlers, level
    root.setLevel(level)


def configured(level: str = "INFO", *, terminal: bool = False) -> Stream:
    """Where a program's logs go that has configured them."""
    stream = Stream(terminal=terminal)
    with contextlib.redirect_stderr(stream):  # not by a fixture: pytest sets it anew for each phase of a test
        logs.configure(level)
    return stream


def lines(stream: Stream) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def _fail(password: str) -> None:
    hidden = password.upper()
    raise ValueError(f"cannot connect to {URL}, {len(hidden)}")


def test_elsewhere_than_on_a_terminal_each_line_is_json() -> None:
    stderr = configured()
    logs.get_logger("rpcq.some").info("worker started", services=["a"], prefetch=100)
    (line,) = lines(stderr)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "worker started",
        "level": "info",
        "logger": "rpcq.some",
        "services": ["a"],
        "prefetch": 100,
    }


def test_on_a_terminal_lines_are_for_people() -> None:
    terminal = configured(terminal=True)
    logs.get_logger("rpcq.some").warning("worker started", prefetch=100)
    text = terminal.getvalue()
    assert "worker started" in text
    assert "prefetch" in text
    assert not text.startswith("{")


def test_a_correlation_id_is_kept() -> None:
    stderr = configured()
    log = logs.get_logger("rpcq.some")
    log.info("one", correlation_id="ab-1")
    log.bind(correlation_id="ab-2").info("two")
    with structlog.contextvars.bound_contextvars(correlation_id="ab-3"):
        log.info("three")
    assert [line["correlation_id"] for line in lines(stderr)] == ["ab-1", "ab-2", "ab-3"]


def test_no_line_has_a_password() -> None:
    stderr = configured()
    log = logs.get_logger("rpcq.some")
    event = f"no connection to {URL}"
    log.warning(event, url=URL, cause=f"{URL} refused")
    logging.getLogger("foreign").warning("connecting to %s", URL, extra={"url": URL})
    assert SECRET not in stderr.getvalue()
    assert stderr.getvalue().count("amqp://user:***@rabbit:5672/") == 5


def test_the_text_of_an_exception_has_no_password() -> None:
    stderr = configured()
    for log in (logs.get_logger("rpcq.some"), logging.getLogger("foreign")):
        try:
            _fail(SECRET)
        except ValueError:
            log.exception("handler failed")
    assert SECRET not in stderr.getvalue()
    for line in lines(stderr):
        assert "Traceback" in line["exception"]
        assert "ValueError: cannot connect to amqp://user:***@" in line["exception"]


def test_a_traceback_after_a_url_is_kept() -> None:
    stderr = configured()
    try:
        raise ValueError(f"cannot use {URL}\nask ada@example.org")  # noqa: TRY301 - its traceback is what it is about
    except ValueError:
        logs.get_logger("rpcq.some").exception("handler failed", url=URL)
    (line,) = lines(stderr)
    assert line["exception"].endswith("cannot use amqp://user:***@rabbit:5672/\nask ada@example.org")


def test_a_terminal_shows_tracebacks_without_passwords_and_values_of_variables() -> None:
    terminal = configured(terminal=True)
    try:
        _fail(SECRET)
    except ValueError:
        logs.get_logger("rpcq.some").exception("handler failed", url=URL)
    text = terminal.getvalue()
    assert "Traceback" in text
    assert "amqp://user:***@" in text
    assert SECRET not in text
    assert SECRET.upper() not in text


HOSTILE = "\x1b]0;title\x07\x9b31m\x7f\u202e"


def _log_hostile() -> None:
    logs.get_logger("rpcq.some").warning(
        "control message dropped", cause=f"{HOSTILE}[red]", code=HOSTILE, all=[HOSTILE]
    )
    try:
        raise ValueError(f"{HOSTILE}\nsecond line")  # noqa: TRY301 - its traceback is what it is about
    except ValueError:
        logging.getLogger("foreign").exception("a message of %s", HOSTILE)


def test_a_terminal_obeys_nothing_that_is_logged() -> None:
    terminal = configured(terminal=True)
    _log_hostile()
    text = re.sub(r"\x1b\[\d*m", "", terminal.getvalue())  # the renderer's own colours
    assert text.replace("\n", "").isprintable()
    assert r"code=\x1b]0;title\x07\x9b31m\x7f\u202e" in text
    assert "Traceback (most recent call last):\n  File " in text
    assert "\nsecond line" in text


def test_lines_of_json_have_nothing_that_a_terminal_obeys_and_keep_their_values() -> None:
    stderr = configured()
    _log_hostile()
    assert stderr.getvalue().replace("\n", "").isprintable()
    first, second = lines(stderr)
    assert (first["cause"], first["code"], first["all"]) == (f"{HOSTILE}[red]", HOSTILE, [HOSTILE])
    assert second["event"] == f"a message of {HOSTILE}"
    assert second["exception"].endswith(f"{HOSTILE}\nsecond line")


def test_an_error_that_is_handed_over_is_shown() -> None:
    stderr = configured()
    logs.get_logger("rpcq.some").error("handler failed", exc_info=KeyError("x"), incident="4f")
    (line,) = lines(stderr)
    assert line["exception"].endswith("KeyError: 'x'")
    assert line["incident"] == "4f"


def test_values_that_json_does_not_have_are_written_as_text() -> None:
    stderr = configured()
    logs.get_logger("rpcq.some").info("odd", value=object, raw=b"x")
    (line,) = lines(stderr)
    assert line["value"] == "<class 'object'>"


def test_the_level_decides_what_is_shown() -> None:
    log = logs.get_logger("rpcq.some")
    quiet = configured("WARNING")
    log.info("quiet")
    log.warning("loud")
    detailed = configured("DEBUG")
    log.debug("detail")
    assert [line["event"] for line in lines(quiet)] == ["loud"]
    assert [line["event"] for line in lines(detailed)] == ["detail"]


def test_configuring_again_shows_each_line_once() -> None:
    before, stderr = configured(), configured()
    logs.get_logger("rpcq.some").info("once")
    assert (len(lines(before)), len(lines(stderr))) == (0, 1)


def test_the_library_only_emits_and_the_application_decides(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "rpcq.some"):
        logs.get_logger("rpcq.some").info("call sent again", correlation_id="ab-1", url=URL)
        logs.get_logger("rpcq.some").debug("not this")
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("rpcq.some", "INFO")
    assert record.message == "call sent again correlation_id='ab-1' url='amqp://user:***@rabbit:5672/'"
    assert record.event == "call sent again"  # type: ignore[attr-defined]
    assert record.correlation_id == "ab-1"  # type: ignore[attr-defined]
    assert record.url == "amqp://user:***@rabbit:5672/"  # type: ignore[attr-defined]


def test_a_plain_formatter_shows_the_fields_and_a_line_of_json_has_each_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "rpcq.some"):
        logs.get_logger("rpcq.some").error("handler failed", incident="ab", text="two\nlines")
    (record,) = caplog.records
    stderr = configured()
    logging.getLogger().handle(record)
    plain = logging.Formatter("%(levelname)s %(message)s").format(record)
    assert plain == "ERROR handler failed incident='ab' text='two\\nlines'"
    (line,) = lines(stderr)
    assert (line["event"], line["incident"], line["text"]) == ("handler failed", "ab", "two\nlines")
    assert pickle.loads(pickle.dumps(record)).getMessage() == record.getMessage()  # as a queue to another process does


def test_what_an_application_binds_is_never_in_the_way(caplog: pytest.LogCaptureFixture) -> None:
    bound = {"name": "ada", "args": (1,), "message": "m", "module": "x", "process": 5, "asctime": "now", "user": "ada"}
    with structlog.contextvars.bound_contextvars(**bound), caplog.at_level("INFO", "rpcq.some"):
        logs.get_logger("rpcq.some").info("fine", lineno=7)
        logs.get_logger("rpcq.some").error("failed", exc_info=KeyError("x"), stack_info=True)
    first, second = caplog.records
    assert (first.name, first.name_, first.args_, first.lineno_) == ("rpcq.some", "ada", (1,), 7)  # type: ignore[attr-defined]
    assert (first.event, first.message_, first.user) == ("fine", "m", "ada")  # type: ignore[attr-defined]
    assert second.exc_info
    assert isinstance(second.exc_info[1], KeyError)
    assert second.stack_info


def test_a_building_block_is_silenced_unless_the_application_set_its_level() -> None:
    unset, chosen = logging.getLogger("rpcq-test.unset"), logging.getLogger("rpcq-test.chosen")
    chosen.setLevel("DEBUG")
    for logger in (unset, chosen):
        logs.silence(logger.name)
    assert unset.level == logging.CRITICAL
    assert chosen.level == logging.DEBUG
    assert logs.QUIET == ("aio_pika", "aiormq")


def test_what_a_peer_can_cause_at_will_is_written_once_a_second_with_how_often_it_came(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(logs.time, "monotonic", lambda: now)
    seldom = logs.Seldom(logs.get_logger("rpcq.some"))
    for _ in range(500):
        seldom.warning("dropped", cause="odd")
    seldom.warning("refused")
    now += logs.SELDOM
    seldom.warning("dropped", cause="last")
    seldom.warning("dropped", cause="after it")
    told = [(event_of(it), getattr(it, "cause", None), getattr(it, "unsaid", 0)) for it in caplog.records]
    assert told == [("dropped", "odd", 0), ("refused", None, 0), ("dropped", "last", 499)]

"""Fixtures that every test may ask for.

RabbitMQ, and PostgreSQL, are started when the first test asks for them, once in each process that runs tests.
"""

from __future__ import annotations

import contextlib
import faulthandler
import secrets
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from support.broker import Broker, Unavailable
from support.broker import broker as a_broker

if TYPE_CHECKING:
    from support.postgres import Postgres

_in_use = pytest.StashKey[Broker | str]()
"""The broker of this session, or why there is none; not there before a test has asked."""

_database = pytest.StashKey["Postgres | str"]()
"""The PostgreSQL of this session, or why there is none; the same."""

_told = pytest.StashKey[set[str]]()
"""What the processes that ran tests, if they were others, tell of theirs."""

_programs = pytest.StashKey[dict[str, str | Unavailable]]()
"""Fixture -> the path of the program that it gives, or why there is none; the same."""

HANGING = 60.0
"""Seconds after its timeout when a test that goes on ends its process."""

PROGRAMS = {"chromium": "CHROMIUM", "ffmpeg": "FFMPEG", "prometheus": "PROMETHEUS", "promtool": "PROMTOOL"}
"""Fixture -> what it gives, in `support.programs`."""


def pytest_configure() -> None:
    """Let Ctrl-C end what tests start: a shell starts what runs in the background with SIGINT ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _broker_of(config: pytest.Config) -> Broker | str:
    """Start the broker at the first call, to be stopped at the end of the session; the same at every other."""
    if _in_use in config.stash:
        return config.stash[_in_use]
    stack = contextlib.ExitStack()
    config.add_cleanup(stack.close)
    try:
        config.stash[_in_use] = stack.enter_context(a_broker(_teller(config, "broker")))
    except Unavailable as error:
        config.stash[_in_use] = str(error)
    return config.stash[_in_use]


def _postgres_of(config: pytest.Config) -> Postgres | str:
    """The same for PostgreSQL."""
    if _database in config.stash:
        return config.stash[_database]
    from support import postgres  # not every run has tests that need one

    stack = contextlib.ExitStack()
    config.add_cleanup(stack.close)
    try:
        config.stash[_database] = stack.enter_context(postgres.postgres(_teller(config, "postgres")))
    except Unavailable as error:
        config.stash[_database] = str(error)
    return config.stash[_database]


def _teller(config: pytest.Config, who: str) -> Callable[[str], None]:
    capture = config.pluginmanager.getplugin("capturemanager")

    def say(text: str) -> None:
        # Now, and not in the report of a test: it is about something that takes a while.
        with contextlib.nullcontext() if capture is None else capture.global_and_fixture_disabled():
            sys.stderr.write(f"\n{who}: {text}\n")
            sys.stderr.flush()

    return say


def _program_of(config: pytest.Config, fixture: str) -> str | Unavailable:
    found = config.stash.setdefault(_programs, {})
    if fixture not in found:
        from support import programs  # not every run has tests that need one

        try:
            found[fixture] = getattr(programs, PROGRAMS[fixture]).find(_teller(config, fixture))
        except Unavailable as error:
            found[fixture] = error
    return found[fixture]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Have the broker, the database, or a program, before the clock of the test that asks first is started.

    A test's timeout is for the test, where pulling an image or installing a package has bounds of its own.

    A test that outlasts its timeout ends its process, with its stacks: pytest-timeout raises once, and an event loop
    that spins in a callback swallows that.
    """
    names = getattr(item, "fixturenames", ())
    if "broker" in names:
        _broker_of(item.config)
    if "postgres" in names:
        _postgres_of(item.config)
    for fixture in PROGRAMS:
        if fixture in names:
            _program_of(item.config, fixture)
    marker = item.get_closest_marker("timeout")
    seconds = float(marker.args[0] if marker else item.config.getini("timeout"))
    faulthandler.dump_traceback_later(seconds + HANGING, exit=True, file=sys.__stderr__)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def broker(pytestconfig: pytest.Config) -> Broker:
    """The RabbitMQ of this session. There is no skipping: where none can be had, every test that asks has an error."""
    found = _broker_of(pytestconfig)
    if isinstance(found, str):
        # The message is all there is to know; a traceback through the harness would bury it.
        pytest.fail(found, pytrace=False)
    return found


@pytest.fixture(scope="session")
def postgres(pytestconfig: pytest.Config) -> Postgres:
    """The PostgreSQL of this session. There is no skipping."""
    found = _postgres_of(pytestconfig)
    if isinstance(found, str):
        pytest.fail(found, pytrace=False)
    return found


@pytest.fixture(scope="session")
def postgres_url(postgres: Postgres) -> str:
    """URL of a database of PostgreSQL, of a user who may create others; shared with all tests of this session."""
    return postgres.url


@pytest.fixture
def database_url(postgres: Postgres, namespace: str) -> Iterator[str]:
    """URL of a database of this test's own."""
    yield postgres.create(namespace)
    postgres.drop(namespace)


@pytest.fixture(scope="session")
def chromium(pytestconfig: pytest.Config) -> str:
    """The path of a real browser. There is no skipping."""
    return _path(pytestconfig, "chromium")


@pytest.fixture(scope="session")
def ffmpeg(pytestconfig: pytest.Config) -> str:
    """The path of ffmpeg. There is no skipping."""
    return _path(pytestconfig, "ffmpeg")


@pytest.fixture(scope="session")
def promtool(pytestconfig: pytest.Config) -> str:
    """The path of Prometheus' promtool. There is no skipping."""
    return _path(pytestconfig, "promtool")


@pytest.fixture(scope="session")
def prometheus(pytestconfig: pytest.Config) -> str:
    """The path of Prometheus. There is no skipping."""
    return _path(pytestconfig, "prometheus")


def _path(config: pytest.Config, fixture: str) -> str:
    found = _program_of(config, fixture)
    if isinstance(found, Unavailable):
        pytest.fail(str(found), pytrace=False)
    return found


@pytest.fixture(scope="session")
def rabbitmq_url(broker: Broker) -> str:
    """URL of the vhost of this session.

    A broker started here was given a vhost of its own for it, and goes away with it; with RPCQ_TEST_URL it is that
    URL's vhost, shared with whoever else uses it. Tests keep apart by `namespace`.
    """
    return broker.url


@pytest.fixture
def namespace() -> str:
    """A name that no other test has, now or before."""
    return f"t{secrets.token_hex(8)}"


def _tested_against(config: pytest.Config) -> str:
    found = config.stash.get(_in_use, "")
    if isinstance(found, Broker):
        return f"{found.origin}, version {found.version}"
    return "none could be had" if found else "no test asked for it"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Of a process that pytest-xdist started: tell the one that prints."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["broker"] = _tested_against(session.config)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Of pytest-xdist: a process that ran tests has ended."""
    if (told := getattr(node, "workeroutput", {}).get("broker")) is not None:
        node.config.stash.setdefault(_told, set()).add(told)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was tested against. Not in the header: at that time nobody has asked for a broker."""
    for told in sorted(config.stash.get(_told, {_tested_against(config)})):
        terminalreporter.write_line(f"RabbitMQ: {told}")

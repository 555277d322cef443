"""URLs of brokers: each part read, each bad part named, no password shown."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rpcq.errors import ConfigurationError
from rpcq.url import BrokerURL, mask, parse

SECRET = "s3cr3t"
dozens = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)


def test_all_parts_of_a_url_are_read() -> None:
    assert parse("amqp://ada:pw@rabbit:5673/orders") == BrokerURL(
        "amqp", (("rabbit", 5673),), user="ada", password="pw", vhost="orders"
    )


def test_what_a_url_leaves_out_is_rabbitmqs_default() -> None:
    assert parse("amqp://rabbit") == BrokerURL("amqp", (("rabbit", 5672),), "guest", "guest", "/")
    assert parse("amqps://rabbit").hosts == (("rabbit", 5671),)


@pytest.mark.parametrize(
    ("credentials", "user", "password"),
    [
        ("ada", "ada", "guest"),
        ("ada:", "ada", ""),
        (":pw", "", "pw"),
        ("ada:p:w", "ada", "p:w"),
        ("a%40b:%2F%3A%40%23%3F", "a@b", "/:@#?"),
        ("", "guest", "guest"),
    ],
)
def test_user_and_password_are_unquoted(credentials: str, user: str, password: str) -> None:
    found = parse(f"amqp://{credentials}@rabbit/")
    assert (found.user, found.password) == (user, password)


@pytest.mark.parametrize(
    ("path", "vhost"),
    [
        ("", "/"),
        ("/", "/"),
        ("/%2F", "/"),
        ("/%2f", "/"),
        ("//", "/"),
        ("/orders", "orders"),
        ("/a%2Fb", "a/b"),
        ("/a/b", "a/b"),
        ("/%40", "@"),
        ("/caf%C3%A9", "café"),
    ],
)
def test_a_vhost_is_unquoted_and_a_missing_one_is_the_default(path: str, vhost: str) -> None:
    assert parse(f"amqp://rabbit{path}").vhost == vhost


def test_several_hosts_are_tried_in_turn_each_with_its_own_port() -> None:
    found = parse("amqps://u:p@one,two:5673,10.0.0.3/v")
    assert found.hosts == (("one", 5671), ("two", 5673), ("10.0.0.3", 5671))


def test_ipv6_hosts_stand_in_brackets() -> None:
    assert parse("amqp://[::1]/").hosts == (("::1", 5672),)
    assert parse("amqp://[fe80::1]:5673,[::ffff:10.0.0.1]").hosts == (("fe80::1", 5673), ("::ffff:10.0.0.1", 5672))


def test_amqps_takes_the_files_of_tls() -> None:
    found = parse("amqps://rabbit/?cafile=/etc/ca.pem&certfile=%2Fc.pem&keyfile=k%20.pem&capath=")
    assert found.tls == (("cafile", "/etc/ca.pem"), ("certfile", "/c.pem"), ("keyfile", "k .pem"), ("capath", ""))


def test_a_memory_url_may_have_a_name() -> None:
    assert parse("memory://").hosts == (("", 0),)
    assert parse("memory://other").hosts == (("other", 0),)


@pytest.mark.parametrize(
    ("url", "part"),
    [
        (None, "it is a string"),
        (5, "it is a string"),
        (b"amqp://rabbit", "it is a string"),
        ("", "not of the form"),
        ("rabbit", "not of the form"),
        ("rabbit:5672", "not of the form"),
        ("AMQP://rabbit", "not of the form"),
        ("amqp://rabbit/#fragment", "not of the form"),
        ("amqp://one@two@three", "not of the form"),
        ("amqp://u:p@one,u:p@two/", "not of the form"),
        ("amqp://rabbit/v@host", "not of the form"),
        ("http://rabbit", "its scheme is 'http'"),
        ("amqp://", "it names no host"),
        ("amqp:///vhost", "it names no host"),
        ("amqp://one,,two", "it names no host"),
        ("amqp://one,", "it names no host"),
        ("amqp://rab bit", "its host is 'rab bit'"),
        ("amqp://rabbit\n", "its host is"),
        ("amqp://rabbit:", "its host is 'rabbit:'"),
        ("amqp://rabbit:amqp", "its host is 'rabbit:amqp'"),
        ("amqp://::1", "its host is '::1'"),
        ("amqp://[::1", "its host is"),
        ("amqp://rabbit:0", "its port is 0"),
        ("amqp://rabbit:65536", "its port is 65536"),
        ("amqp://rabbit:123456", "its host is 'rabbit:123456'"),
        ("amqp://rabbit/?cafile=x", "its query has 'cafile'; amqp takes none"),
        ("amqp://rabbit/?heartbeat=5", "its query has 'heartbeat'; amqp takes none"),
        ("amqps://rabbit/?heartbeat=5", "its query has 'heartbeat'; amqps takes cafile"),
        ("amqps://rabbit/?cafile=x&verify=no", "its query has 'verify'; amqps takes cafile"),
    ],
)
def test_a_part_that_cannot_be_is_named(url: Any, part: str) -> None:
    with pytest.raises(ConfigurationError, match="broker's URL") as caught:
        parse(url)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        f"http://u:{SECRET}@rabbit/",
        f"amqp://u:{SECRET}@rabbit:0/",
        f"amqp://u:{SECRET}@/",
        f"amqp://u:{SECRET}@rabbit/?x=1",
        f"amqp://:{SECRET}@rab bit/",
        f"amqp://u:{SECRET}@one@two/",
        f"amqp://u:{SECRET}@one,v:{SECRET}@two/",
        f"amqp://u:{SECRET}@rabbit/#x",
        # Not quoted as they should be:
        f"amqp://u:{SECRET}/{SECRET}@rabbit/",
        f"amqp://u:12/{SECRET}@rabbit/",
        f"amqp://u:{SECRET}?{SECRET}@rabbit/",
        f"amqps://u:12?{SECRET}@rabbit/",
        f"amqp://u:{SECRET}#{SECRET}@rabbit/",
        f"amqp://u:{SECRET}@{SECRET}@rabbit/",
        f"amqp://u:p@{SECRET}/{SECRET}@rabbit/",
        f"amqp://u:{SECRET} {SECRET}/\n{SECRET}@rabbit/",
    ],
)
def test_no_message_shows_a_password_however_badly_it_is_quoted(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(url)
    assert SECRET not in str(caught.value)
    assert "***" in str(caught.value)


def test_a_url_does_not_show_its_password_when_it_is_printed() -> None:
    assert SECRET not in repr(parse(f"amqp://u:{SECRET}@rabbit/"))


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("amqp://u:p@rabbit:5672/v", "amqp://u:***@rabbit:5672/v"),
        ("amqp://u@rabbit:5672/v", "amqp://u@rabbit:5672/v"),
        ("amqp://rabbit:5672/v", "amqp://rabbit:5672/v"),
        ("amqp://:p@rabbit", "amqp://:***@rabbit"),
        ("amqp://u:@rabbit", "amqp://u:***@rabbit"),
        ("amqp://u:p%40q@one,two", "amqp://u:***@one,two"),
        ("amqp://u:p@q/r@rabbit", "amqp://u:***@rabbit"),
        ("connecting to amqp://u:p@rabbit failed", "connecting to amqp://u:***@rabbit failed"),
        ("memory://", "memory://"),
        ("", ""),
    ],
)
def test_a_masked_url_has_all_but_the_password(url: str, masked: str) -> None:
    assert mask(url) == masked


@settings(dozens, max_examples=300)
@given(st.text(alphabet="ab12:/?#@%, \n", max_size=20), st.text(alphabet="ab12:/?#@%,[]. ", max_size=10))
def test_no_password_is_shown_whatever_it_is_made_of(noise: str, rest: str) -> None:
    url = f"amqp://user:{noise}{SECRET}{noise}@rabbit{rest}"
    assert SECRET not in mask(url)
    try:
        found = parse(url)
    except ConfigurationError as error:
        assert SECRET not in str(error)  # noqa: PT017 - it may be raised or not
    else:
        assert SECRET in found.password
        assert SECRET not in found.vhost + repr(found.hosts)


@settings(dozens, max_examples=300)
@given(st.text(max_size=40))
def test_any_text_is_a_url_or_refused(text: str) -> None:
    for url in (text, f"amqp://{text}"):
        try:
            assert isinstance(parse(url), BrokerURL)
        except ConfigurationError as error:
            assert str(error)  # noqa: PT017 - it may be raised or not

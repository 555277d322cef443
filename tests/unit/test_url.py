"""URLs of brokers: each part read, each bad part named, no password shown."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rpcq.errors import ConfigurationError
from rpcq.url import BrokerURL, mask, mask_urls, parse

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
        (None, "must be a string"),
        (5, "must be a string"),
        (b"amqp://rabbit", "must be a string"),
        ("", "must be of the form"),
        ("rabbit", "must be of the form"),
        ("rabbit:5672", "must be of the form"),
        ("AMQP://rabbit", "must be of the form"),
        ("amqp://rabbit/#fragment", "must be of the form"),
        ("amqp://one@two@three", "must be of the form"),
        ("amqp://u:p@one,u:p@two/", "must be of the form"),
        ("amqp://rabbit/v@host", "must be of the form"),
        ("http://rabbit", "must have the scheme amqp, amqps or memory; got 'http://rabbit'"),
        ("amqp://", "must name a host"),
        ("amqp:///vhost", "must name a host"),
        ("amqp://one,,two", "must name a host"),
        ("amqp://one,", "must name a host"),
        ("amqp://rab bit", "must have a valid host in place of 'rab bit'"),
        ("amqp://rabbit\n", "must have a valid host"),
        ("amqp://rabbit:", "must have a valid host in place of 'rabbit:'"),
        ("amqp://rabbit:amqp", "must have a valid host in place of 'rabbit:***'"),
        ("amqp://::1", "an IPv6 address in [ ]"),
        ("amqp://[::1", "must have a valid host"),
        ("amqp://rabbit:0", "must have a port from 1 to 65535"),
        ("amqp://rabbit:65536", "must have a port from 1 to 65535"),
        ("amqp://rabbit:123456", "must have a valid host in place of 'rabbit:***'"),
        ("amqp://rabbit/?cafile=x", "must not have the query parameter 'cafile': amqp takes none"),
        ("amqp://rabbit/?heartbeat=5", "must not have the query parameter 'heartbeat': amqp takes none"),
        ("amqps://rabbit/?heartbeat=5", "must not have the query parameter 'heartbeat': amqps takes cafile"),
        ("amqps://rabbit/?cafile=x&verify=no", "must not have the query parameter 'verify': amqps takes cafile"),
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
        f"amqp://us/er:{SECRET}@rabbit/",
        f"amqp://us#er:{SECRET}@rabbit/",
        f"amqp://us@er:{SECRET}@rabbit/",
        # Without a host, or a scheme:
        f"amqp://u:{SECRET}",
        f"amqp://u:{SECRET}#{SECRET}",
        f"amqp://u:{SECRET}?{SECRET}",
        f"amqp://u:{SECRET},{SECRET}/",
        f"amqp://u@v:{SECRET}",
        f"amqp://u/v:{SECRET}#",
        f"u:{SECRET}",
        f"u:{SECRET}://{SECRET}@rabbit",
    ],
)
def test_no_message_shows_a_password_however_badly_it_is_quoted(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(url)
    assert SECRET not in str(caught.value)
    assert "***" in str(caught.value)


def test_a_url_that_is_no_string_is_not_shown() -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(f"amqp://u:{SECRET}@rabbit/".encode())  # type: ignore[arg-type]
    assert SECRET not in str(caught.value)


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
        ("amqp://a@b:p@rabbit", "amqp://a@b:***@rabbit"),
        ("amqp://a/b#c?:p@rabbit", "amqp://a/b#c?:***@rabbit"),
        ("amqp://u:p@one:5671,two:5672/v", "amqp://u:***@one:5671,two:5672/v"),
        ("amqp://u:p@[::1]:5672,[fe80::1]/v", "amqp://u:***@[::1]:5672,[fe80::1]/v"),
        ("amqp://[::1]:5672,[fe80::1]", "amqp://[::1]:5672,[fe80::1]"),
        ("amqp://u:p", "amqp://u:***"),
        ("amqp://u:p#q", "amqp://u:***"),
        ("amqp://u:99999", "amqp://u:***"),
        ("amqp://u:12#q", "amqp://u:***"),
        ("amqp://rabbit:5672,u:p", "amqp://rabbit:5672,u:***"),
        ("amqp://rabbit:", "amqp://rabbit:"),
        ("u:p", "u:***"),
        ("rabbit:5672", "rabbit:5672"),
        ("u:p@rabbit", "***@rabbit"),
        ("memory://", "memory://"),
        ("", ""),
    ],
)
def test_a_masked_url_has_all_but_the_password(url: str, masked: str) -> None:
    assert mask(url) == masked


odd = st.text(alphabet="ab12:/?#@%,;[]'\"\\ \t\n", max_size=12)


@settings(dozens, max_examples=1000)
@given(user=odd, before=odd, after=odd, host=st.sampled_from(["", "@rabbit", "@rabbit:5672/v", "@[::1]/?cafile=x"]))
def test_no_mask_shows_a_password_whatever_it_and_the_user_are_made_of(
    user: str, before: str, after: str, host: str
) -> None:
    if not host:  # what may be a host, or a port, is taken for one
        user, before, after = (re.sub("[:@]", "", part) for part in (user, before, after))
        before = before.lstrip("12")
    masked = mask(f"amqp://{user}:{before}{SECRET}{after}{host}")
    assert SECRET not in masked
    assert masked.endswith(f":***{host}")
    assert masked.startswith(f"amqp://{user.partition(':')[0]}:***")
    assert mask(masked) == masked


# URLs in a text.


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("connecting to amqp://u:p@rabbit failed", "connecting to amqp://u:***@rabbit failed"),
        ("amqp://u:p@one and https://v:q@two/x", "amqp://u:***@one and https://v:***@two/x"),
        ("amqp://u:p@rabbit\nTraceback:\n  a@b", "amqp://u:***@rabbit\nTraceback:\n  a@b"),
        ("('amqp://u:p@one:5672', 'amqp://two:5672')", "('amqp://u:***@one:5672', 'amqp://two:5672')"),
        ("amqp://rabbit:5672: refused", "amqp://rabbit:5672: refused"),
        ("AMQP://u:p, said x@y", "AMQP://u:***, said x@y"),
        ("see https://rabbitmq.com/a:b, or a@b", "see https://rabbitmq.com/a:b, or a@b"),
        ("amqp://a@b:p@rabbit.", "amqp://a@b:***@rabbit."),
        ("a://b", "a://b"),
        ("no URL: a@b", "no URL: a@b"),
    ],
)
def test_the_urls_in_a_text_are_masked_and_the_rest_is_kept(text: str, masked: str) -> None:
    assert mask_urls(text) == masked


compact = st.text(alphabet="ab12:/?#@%,;[]'\"\\", max_size=12)
words = st.text(alphabet="ab12:/?#@ \n", max_size=30)


@settings(dozens, max_examples=1000)
@given(words, st.lists(st.tuples(compact, compact, compact, words), min_size=1, max_size=3))
def test_no_text_shows_a_password_and_what_is_around_its_urls_is_kept(
    begin: str, urls: list[tuple[str, str, str, str]]
) -> None:
    begin += " "
    text = begin + "".join(
        f"amqp://{user}:{before}{SECRET}{after}@rabbit\n{rest}\t" for user, before, after, rest in urls
    )
    masked = mask_urls(text)
    assert SECRET not in masked
    pieces = [begin, *(f":***@rabbit\n{rest}\t" for *_, rest in urls)]
    for piece in pieces:
        found, _, masked = masked.partition(piece)
        assert not any(it.isspace() for it in found)
    assert masked == ""


@pytest.mark.parametrize(
    "text", ["a" * 100_000, "amqp://" + "." * 100_000, "amqp://" * 20_000, "x://" + ":1," * 30_000]
)
def test_a_long_text_is_masked_in_time(text: str) -> None:
    began = time.process_time()
    mask_urls(text)
    assert time.process_time() - began < 2


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

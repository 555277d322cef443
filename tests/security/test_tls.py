"""TLS: who is trusted, who is let in, and that nothing is ever said to anybody else, or in plaintext.

Most of it runs against the broker of all tests with a listener for TLS in front of it, which can have any certificate;
what depends on RabbitMQ's own TLS, against a broker that is started with it, whatever RPCQ_TEST_URL says.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import re
import secrets
import shutil
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
from cryptography.hazmat.primitives import serialization

from rpcq import (
    BrokerError,
    Client,
    ConfigurationError,
    OutcomeUnknown,
    Service,
    ServiceUnavailable,
    Worker,
)
from rpcq.errors import AuthenticationFailed, BrokerUnreachable, ProtocolError
from security.certificates import DAY, Authority, Certificate, behind_tls, server_context, with_tls
from support.broker import VHOST, Broker, Setup, Unavailable
from support.broker import broker as a_broker
from support.logged import event_of
from support.seam import until

# The time of a test, and not that of the start of a broker, which has bounds of its own.
pytestmark = pytest.mark.timeout(60, func_only=True)

TIMEOUT = 20.0
"""Seconds that an attempt may take here: none needs them, on however slow a machine, but that of the next line."""

SHORT = 1.0
"""The same, where nothing ever comes and the attempt has to be given up."""

Open = Callable[..., Awaitable[None]]


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A CA that nobody trusts."""
    return Authority(tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="session")
def server(authority: Authority) -> Certificate:
    """As the broker's should be."""
    return authority.issue("localhost", "127.0.0.1")


@pytest.fixture(scope="session")
def ada(authority: Authority) -> Certificate:
    """A client's."""
    return authority.issue("ada")


async def open_client(url: str, namespace: str, connect_timeout: float = TIMEOUT) -> None:
    client = Client(url, namespace=namespace, connect_timeout=connect_timeout)
    try:
        await client.connect()
    finally:
        await client.close()


async def open_worker(url: str, namespace: str, connect_timeout: float = TIMEOUT) -> None:
    worker = Worker(things(), url=url, namespace=namespace, connect_timeout=connect_timeout)
    try:
        await worker.start()
    finally:
        await worker.stop()


@pytest.fixture(params=[open_client, open_worker], ids=["client", "worker"])
def opening(request: pytest.FixtureRequest) -> Open:
    return request.param


def things() -> Service:
    service = Service("things")

    @service.method
    async def echo(text: str) -> str:
        return text

    return service


async def refused(opening: Open, url: str, namespace: str) -> BrokerError:
    """Open what is refused: the same as `failed`, and it is told before the time of the attempt is over."""
    error, took = await failed(opening, url, namespace, TIMEOUT)
    assert took < TIMEOUT
    return error


async def failed(opening: Open, url: str, namespace: str, connect_timeout: float) -> tuple[BrokerError, float]:
    """Open what cannot be: the error, once it is sure that nothing is left; and the seconds that it took."""
    others = asyncio.all_tasks()
    began = time.monotonic()
    with pytest.raises(BrokerError) as caught:
        await opening(url, namespace, connect_timeout)
    took = time.monotonic() - began
    await until(lambda: not asyncio.all_tasks() - others)
    gc.collect()  # what was forgotten open complains now, and warnings are errors
    return caught.value, took


@asynccontextmanager
async def both(url: str, namespace: str, **options: int) -> AsyncIterator[Client]:
    """A client whose worker takes the same way."""
    async with (
        Worker(things(), url=url, namespace=namespace, name=f"{namespace}-worker", max_body=8_000_000),
        Client(url, namespace=namespace, name=f"{namespace}-client", max_body=8_000_000) as client,
    ):
        yield client


async def works(client: Client, *, within: float = 15.0) -> None:
    text = secrets.token_hex(8)
    assert await asyncio.wait_for(client.call("things.echo", text=text), within) == text


# Trust.


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
async def test_calls_work_and_all_connections_of_client_and_worker_are_tls(
    rabbitmq_url: str, namespace: str, authority: Authority, server: Certificate, host: str
) -> None:
    async with (
        behind_tls(rabbitmq_url, server_context(server)) as front,
        both(front.url_for(host, cafile=authority.cafile), namespace) as client,
    ):
        await works(client)
        assert front.handshakes == ["TLSv1.3"] * 4


NOT_TO_BE_TRUSTED = {
    "an unknown CA": ("stranger", ("localhost", "127.0.0.1"), (-DAY, DAY), "unable to get local issuer certificate"),
    "expired": ("authority", ("localhost", "127.0.0.1"), (-2 * DAY, -DAY), "certificate has expired"),
    "not yet valid": ("authority", ("localhost", "127.0.0.1"), (DAY, 2 * DAY), "certificate is not yet valid"),
    "another host": ("authority", ("rabbit.example",), (-DAY, DAY), "not valid for '127.0.0.1'"),
    "another address": ("authority", ("127.0.0.2",), (-DAY, DAY), "not valid for '127.0.0.1'"),
    "only a name": ("authority", ("localhost",), (-DAY, DAY), "not valid for '127.0.0.1'"),
}


@pytest.mark.parametrize("what", NOT_TO_BE_TRUSTED)
async def test_a_certificate_that_is_not_to_be_trusted_is_refused_and_named(
    opening: Open, rabbitmq_url: str, namespace: str, authority: Authority, request: pytest.FixtureRequest, what: str
) -> None:
    issuer, names, valid, why = NOT_TO_BE_TRUSTED[what]
    context = server_context(request.getfixturevalue(issuer).issue(*names, valid=valid))
    async with behind_tls(rabbitmq_url, context) as front:
        error = await refused(opening, front.url_for(cafile=authority.cafile), namespace)
        assert front.handshakes == [], "something was said to it"
    assert isinstance(error, BrokerUnreachable)
    assert f"the certificate of amqps://127.0.0.1:{front.port} was refused" in str(error)
    assert why in str(error)
    assert ("name its CA with cafile" in str(error)) == (what == "an unknown CA")


async def test_without_a_cafile_the_systems_cas_are_trusted_and_no_others(
    opening: Open, rabbitmq_url: str, namespace: str, server: Certificate
) -> None:
    async with behind_tls(rabbitmq_url, server_context(server)) as front:
        error = await refused(opening, front.url_for(), namespace)
        assert front.handshakes == []
    assert isinstance(error, BrokerUnreachable)
    assert "was refused: unable to get local issuer certificate; name its CA with cafile" in str(error)


async def test_each_host_has_to_show_a_certificate_of_its_own_name(
    rabbitmq_url: str, namespace: str, authority: Authority, server: Certificate
) -> None:
    other = server_context(authority.issue("rabbit.example"))
    async with (
        behind_tls(rabbitmq_url, other) as first,
        behind_tls(rabbitmq_url, server_context(server)) as second,
    ):
        hosts = f"127.0.0.1:{first.port},127.0.0.1"
        async with both(second.url_for(hosts, cafile=authority.cafile), namespace) as client:
            await works(client)
        assert first.handshakes == []
        assert len(second.handshakes) == 4


# No TLS there, or only there.


async def test_amqps_to_a_port_without_tls_fails_and_does_not_fall_back_to_plaintext(
    opening: Open, rabbitmq_url: str, namespace: str, authority: Authority
) -> None:
    parts = urlsplit(rabbitmq_url)
    url = with_tls(rabbitmq_url, parts.hostname or "", parts.port or 5672, cafile=authority.cafile)
    error = await refused(opening, url, namespace)
    assert isinstance(error, BrokerUnreachable)
    assert f"TLS with amqps://{parts.hostname}:{parts.port or 5672} failed" in str(error)
    assert "that port may not speak TLS" in str(error)


async def test_a_handshake_that_is_never_answered_is_given_up_after_the_connect_timeout(
    opening: Open, namespace: str, authority: Authority
) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        port = mute.getsockname()[1]
        url = f"amqps://127.0.0.1:{port}/?cafile={authority.cafile}"
        error, _ = await failed(opening, url, namespace, SHORT)
    assert isinstance(error, BrokerUnreachable)
    assert f"amqps://127.0.0.1:{port}: it did not answer within 1 s" in str(error)


# Certificates of clients.


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
async def test_with_the_certificate_that_a_broker_wants_calls_work(
    rabbitmq_url: str,
    namespace: str,
    authority: Authority,
    server: Certificate,
    ada: Certificate,
    version: ssl.TLSVersion,
) -> None:
    context = server_context(server, clients_of=authority.cafile, version=version)
    async with (
        behind_tls(rabbitmq_url, context) as front,
        both(front.url_for(cafile=authority.cafile, **ada.files), namespace) as client,
    ):
        await works(client)
        assert len(front.handshakes) == 4


async def test_one_file_may_have_both_certificate_and_key(
    rabbitmq_url: str, namespace: str, authority: Authority, server: Certificate, ada: Certificate, tmp_path: Path
) -> None:
    one = tmp_path / "both ä&=.pem"
    one.write_text(ada.text, "utf-8")
    async with (
        behind_tls(rabbitmq_url, server_context(server, clients_of=authority.cafile)) as front,
        both(front.url_for(cafile=authority.cafile, certfile=str(one)), namespace) as client,
    ):
        await works(client)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
@pytest.mark.parametrize("which", ["none", "of an unknown CA", "expired"])
async def test_a_broker_that_wants_another_client_certificate_is_told_as_that(
    opening: Open,
    rabbitmq_url: str,
    namespace: str,
    authority: Authority,
    stranger: Authority,
    server: Certificate,
    version: ssl.TLSVersion,
    which: str,
) -> None:
    files = {
        "none": {},
        "of an unknown CA": stranger.issue("eve").files,
        "expired": authority.issue("ada", valid=(-2 * DAY, -DAY)).files,
    }[which]
    context = server_context(server, clients_of=authority.cafile, version=version)
    async with behind_tls(rabbitmq_url, context) as front:
        error = await refused(opening, front.url_for(cafile=authority.cafile, **files), namespace)
        assert front.handshakes == []
    assert_about_the_clients_certificate(error, "127.0.0.1", front.port, files)


def assert_about_the_clients_certificate(error: BrokerError, host: str, port: int, files: dict[str, str]) -> None:
    assert isinstance(error, BrokerUnreachable)
    assert f"amqps://{host}:{port}" in str(error)
    if files:
        assert f"it may not accept the client certificate of certfile={files['certfile']!r}" in str(error)
    else:
        assert "it may want a client certificate: name one with certfile and keyfile" in str(error)


async def test_a_broker_that_hangs_up_after_the_handshake_may_want_a_client_certificate(
    opening: Open, namespace: str, authority: Authority, server: Certificate
) -> None:
    """What is left of a refusal in TLS 1.3 where its alert is lost in the reset of the connection."""

    def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    listener = await asyncio.start_server(hang_up, "127.0.0.1", 0, ssl=server_context(server))
    async with listener:
        port = listener.sockets[0].getsockname()[1]
        error = await refused(opening, f"amqps://127.0.0.1:{port}/?cafile={authority.cafile}", namespace)
    assert_about_the_clients_certificate(error, "127.0.0.1", port, {})
    assert "it closed the connection at the TLS handshake" in str(error)


# Files.


@dataclass
class Files:
    """What a URL may name by mistake."""

    missing: str
    folder: str
    no_pem: str
    passphrase: str


@pytest.fixture
def files(tmp_path: Path, ada: Certificate) -> Files:
    no_pem, passphrase = tmp_path / "no.pem", tmp_path / "passphrase.pem"
    no_pem.write_text("not a certificate\n", "utf-8")
    key = serialization.load_pem_private_key(Path(ada.keyfile).read_bytes(), None)
    passphrase.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"open sesame"),
        )
    )
    return Files(str(tmp_path / "missing.pem"), str(tmp_path), str(no_pem), str(passphrase))


FILES: dict[str, tuple[Callable[[Files, Certificate, Certificate], dict[str, str]], str, str]] = {
    "no cafile there": (lambda it, ada, eve: {"cafile": it.missing}, "cafile", "No such file"),
    "a folder as cafile": (lambda it, ada, eve: {"cafile": it.folder}, "cafile", "Is a directory"),
    "no certificate in the cafile": (lambda it, ada, eve: {"cafile": it.no_pem}, "cafile", "no certificate in PEM"),
    "a key as cafile": (lambda it, ada, eve: {"cafile": ada.keyfile}, "cafile", "no certificate in PEM"),
    "an empty cafile": (lambda it, ada, eve: {"cafile": ""}, "cafile", "it is empty"),
    "no capath there": (lambda it, ada, eve: {"capath": it.missing}, "capath", "No such file"),
    "a file as capath": (lambda it, ada, eve: {"capath": it.no_pem}, "capath", "Not a directory"),
    "an empty capath": (lambda it, ada, eve: {"capath": ""}, "capath", "it is empty"),
    "no certfile there": (lambda it, ada, eve: {**ada.files, "certfile": it.missing}, "certfile", "No such file"),
    "no certificate in the certfile": (
        lambda it, ada, eve: {**ada.files, "certfile": it.no_pem},
        "certfile",
        "no certificate in PEM",
    ),
    "no keyfile": (
        lambda it, ada, eve: {"certfile": ada.certfile},
        "certfile",
        "name the file with the key with keyfile",
    ),
    "no keyfile there": (lambda it, ada, eve: {**ada.files, "keyfile": it.missing}, "keyfile", "No such file"),
    "no key in the keyfile": (
        lambda it, ada, eve: {**ada.files, "keyfile": it.no_pem},
        "keyfile",
        "does not hold the private key, in PEM",
    ),
    "another's key": (
        lambda it, ada, eve: {**ada.files, "keyfile": eve.keyfile},
        "keyfile",
        "KEY_VALUES_MISMATCH",
    ),
    "a passphrase": (lambda it, ada, eve: {**ada.files, "keyfile": it.passphrase}, "keyfile", "has a passphrase"),
}


@pytest.mark.parametrize("what", FILES)
async def test_a_file_that_cannot_be_used_is_named_before_anything_is_connected(
    opening: Open, namespace: str, files: Files, ada: Certificate, stranger: Authority, what: str
) -> None:
    choose, parameter, why = FILES[what]
    chosen = choose(files, ada, stranger.issue("eve"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        url = with_tls("amqp://user:s3cr3t@host/", "127.0.0.1", listener.getsockname()[1], **chosen)
        with pytest.raises(ConfigurationError) as caught:
            await asyncio.wait_for(opening(url, namespace), TIMEOUT)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert f"{parameter}={chosen[parameter]!r}" in str(caught.value)
    assert why in str(caught.value)
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("keyfile=key.pem", "must have the query parameter 'certfile' if it has 'keyfile'"),
        ("cafile=a.pem&cafile=b.pem", "must have the query parameter 'cafile' only once"),
    ],
)
def test_files_that_make_no_sense_are_refused_with_the_url(query: str, why: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(why)):
        Client(f"amqps://rabbit/?{query}")
    with pytest.raises(ConfigurationError, match=re.escape(why)):
        Worker(things(), url=f"amqps://rabbit/?{query}")


# Sessions.


@asynccontextmanager
async def load(client: Client, callers: int = 20) -> AsyncIterator[list[int]]:
    """Calls without an end; each has its own answer, or is told as lost. Yields how many were answered and lost."""
    counts = [0, 0]

    async def call_on(number: int) -> None:
        while True:
            text = f"{number}:{counts[0]}"
            try:
                assert await client.call("things.echo", text=text) == text
            except (OutcomeUnknown, ServiceUnavailable):
                counts[1] += 1
            else:
                counts[0] += 1

    tasks = [asyncio.create_task(call_on(number)) for number in range(callers)]
    try:
        yield counts
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results), results


async def answered(counts: list[int], more: int = 50) -> None:
    """Wait for so many more answers."""
    enough = counts[0] + more
    await until(lambda: counts[0] >= enough)


@pytest.mark.long
async def test_sessions_that_are_cut_under_load_come_back_over_tls(
    rabbitmq_url: str, namespace: str, authority: Authority, server: Certificate
) -> None:
    async with (
        behind_tls(rabbitmq_url, server_context(server)) as front,
        both(front.url_for(cafile=authority.cafile), namespace) as client,
        load(client) as counts,
    ):
        for round_ in (1, 2):
            await answered(counts)
            front.reset()
            await until(lambda: len(front.handshakes) == 4 + 4 * round_)  # noqa: B023 - waited for in this round
            await answered(counts)
        assert len(front) == 4


@pytest.mark.long
async def test_a_session_does_not_come_back_to_a_stranger_and_does_where_the_new_ca_is_in_the_file(
    rabbitmq_url: str,
    namespace: str,
    authority: Authority,
    stranger: Authority,
    server: Certificate,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, logger="rpcq")
    cafile = tmp_path / "ca.pem"
    shutil.copy(authority.cafile, cafile)
    context = server_context(server)
    async with (
        behind_tls(rabbitmq_url, context) as front,
        both(front.url_for(cafile=str(cafile)), namespace) as client,
    ):
        await works(client)
        other = stranger.issue("localhost", "127.0.0.1")
        context.load_cert_chain(other.certfile, other.keyfile)
        front.reset()
        await until(lambda: [event_of(record) for record in caplog.records].count("session down") == 4)
        with pytest.raises(ServiceUnavailable):
            await client.with_options(timeout=1.0).call("things.echo", text="secret")
        assert len(front.handshakes) == 4, "something was said to a stranger"

        def causes() -> set[str]:
            tries = [record for record in caplog.records if event_of(record) == "cannot come back yet"]
            return {str(record.__dict__["cause"]) for record in tries}

        await until(causes)
        (cause,) = causes()
        assert "was refused: unable to get local issuer certificate" in cause
        shutil.copy(stranger.cafile, cafile)
        await works(client)


@pytest.mark.long
async def test_large_bodies_arrive_intact(
    rabbitmq_url: str, namespace: str, authority: Authority, server: Certificate
) -> None:
    async with (
        behind_tls(rabbitmq_url, server_context(server)) as front,
        both(front.url_for(cafile=authority.cafile), namespace) as client,
    ):
        await large_bodies(client)


async def large_bodies(client: Client) -> None:
    """Of many frames, which are up to 128 KiB, and many more records of TLS, which are up to 16 KiB."""
    texts = [secrets.token_hex(size // 2) for size in (16_384, 131_064, 131_072, 1_000_000, 3_000_000, 6_000_000)]
    assert await asyncio.gather(*(client.call("things.echo", text=text) for text in texts)) == texts


# RabbitMQ's own TLS.

CONFIG = """\
listeners.ssl.default = {ports[0]}
ssl_options.cacertfile = {folder}/ca.pem
ssl_options.certfile = {folder}/cert.pem
ssl_options.keyfile = {folder}/key.pem
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = true
load_definitions = {folder}/definitions.json
"""
PASSWORD = secrets.token_hex(8)
USERS = {"guest": "guest", "ada": PASSWORD}
DEFINITIONS = {
    "vhosts": [{"name": VHOST}],
    "users": [{"name": user, "password": password, "tags": ""} for user, password in USERS.items()],
    "permissions": [{"user": user, "vhost": VHOST, "configure": ".*", "write": ".*", "read": ".*"} for user in USERS],
}
FURTHER_LISTENERS = """\
Strict = rabbit_networking:ensure_ssl(),
Listen = fun(Port, Options) -> ok = rabbit_networking:start_ssl_listener(Port, Options, 1) end,
Listen(%d, [{verify, verify_none} | proplists:delete(fail_if_no_peer_cert, proplists:delete(verify, Strict))]),
Listen(%d, [{versions, ['tlsv1.2']} | proplists:delete(versions, Strict)])."""
"""What the configuration has no words for: listeners with options of their own."""


class Connection(NamedTuple):
    """As RabbitMQ tells of it."""

    pid: str
    tls: str
    subject: str
    properties: str


@dataclass(frozen=True)
class TLSBroker:
    """A RabbitMQ with TLS.

    Attributes:
        strict: the port where clients have to show a certificate.
        lenient: the port where they need not.
        strict_and_old: the port where they have to, and TLS is 1.2.
        off_loopback: the host by which it is reached from another machine, as it sees it; "" if there is none.
    """

    broker: Broker
    host: str
    strict: int
    lenient: int
    strict_and_old: int
    off_loopback: str

    def url(self, port: int, *, host: str = "", user: str = "ada", **files: str) -> str:
        return with_tls(f"amqp://{user}:{USERS[user]}@host/{VHOST}", host or self.host, port, **files)

    async def connections(self, namespace: str, before: Sequence[Connection] = ()) -> list[Connection]:
        """The four of a client and a worker, once all are there and none of those before."""
        for _ in range(20):
            table = await asyncio.to_thread(
                self.broker.ctl, "list_connections", "pid", "ssl", "peer_cert_subject", "client_properties"
            )
            found = [Connection(*line.split("\t")) for line in table.splitlines() if namespace in line]
            if len(found) == 4 and not {it.pid for it in found} & {it.pid for it in before}:
                return found
            await asyncio.sleep(0.2)
        raise AssertionError(f"{len(found)} connections:\n{table}")


def own_address() -> str:
    """An address of this machine that is not its loopback's; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            one.connect(("192.0.2.1", 9))
        except OSError:
            return ""
        address: str = one.getsockname()[0]
    return "" if address.startswith("127.") else address


@pytest.fixture(scope="session")
def tls_broker(authority: Authority) -> Iterator[TLSBroker]:
    def files(host: str) -> dict[str, bytes]:
        certificate = authority.issue(*sorted({host, "localhost", own_address()} - {""}))
        paths = {"ca.pem": authority.cafile, "cert.pem": certificate.certfile, "key.pem": certificate.keyfile}
        pems = {name: Path(path).read_bytes() for name, path in paths.items()}
        return {**pems, "definitions.json": json.dumps(DEFINITIONS).encode()}

    try:
        with a_broker(setup=Setup(CONFIG, files, ports=3)) as broker:
            _, lenient, old = broker.ports
            broker.ctl("eval", FURTHER_LISTENERS % (lenient, old))
            host = urlsplit(broker.url).hostname or ""
            # What comes to a container comes over its network.
            off_loopback = host if broker.origin.startswith("container") else own_address()
            yield TLSBroker(broker, host, *broker.ports.values(), off_loopback)
    except Unavailable as error:
        pytest.fail(str(error), pytrace=False)


async def test_rabbitmq_takes_clients_and_workers_that_trust_its_ca(
    tls_broker: TLSBroker, namespace: str, authority: Authority
) -> None:
    async with both(tls_broker.url(tls_broker.lenient, cafile=authority.cafile), namespace) as client:
        await works(client)
        assert {it.tls for it in await tls_broker.connections(namespace)} == {"true"}


@pytest.mark.long
@pytest.mark.timeout(180, func_only=True)  # each rabbitmqctl takes seconds, beside load many
async def test_rabbitmq_sees_the_client_certificate_on_every_connection_also_when_they_come_back(
    tls_broker: TLSBroker, namespace: str, authority: Authority, ada: Certificate
) -> None:
    url = tls_broker.url(tls_broker.strict, cafile=authority.cafile, **ada.files)
    async with both(url, namespace) as client:
        async with load(client) as counts:
            await answered(counts)
            before = await tls_broker.connections(namespace)
            await asyncio.to_thread(tls_broker.broker.close_connections, url)
            await until(lambda: counts[1])  # what was under way is told as lost
            await answered(counts)
        after = await tls_broker.connections(namespace, before)
        await large_bodies(client)
    for connection in before + after:
        assert connection.tls == "true"
        assert "CN=ada" in connection.subject


@pytest.mark.long
@pytest.mark.timeout(180, func_only=True)
async def test_rabbitmq_that_wants_a_client_certificate_is_told_as_that(
    opening: Open, tls_broker: TLSBroker, namespace: str, authority: Authority, stranger: Authority
) -> None:
    # Often, as with TLS 1.3 it is chance whether its alert is read or its reset of the connection comes first.
    for files in [{}, stranger.issue("eve").files] * 5:
        for port in (tls_broker.strict, tls_broker.strict_and_old):
            error = await refused(opening, tls_broker.url(port, cafile=authority.cafile, **files), namespace)
            assert_about_the_clients_certificate(error, tls_broker.host, port, files)


@pytest.mark.long
async def test_rabbitmqs_certificate_is_checked(
    opening: Open, tls_broker: TLSBroker, namespace: str, stranger: Authority
) -> None:
    for files in ({}, {"cafile": stranger.cafile}):
        error = await refused(opening, tls_broker.url(tls_broker.lenient, **files), namespace)
        assert isinstance(error, BrokerUnreachable)
        assert f"the certificate of amqps://{tls_broker.host}:{tls_broker.lenient} was refused" in str(error)
        assert "name its CA with cafile" in str(error)


@pytest.mark.long
async def test_rabbitmqs_port_with_tls_says_to_amqp_that_it_may_want_tls(
    opening: Open, tls_broker: TLSBroker, namespace: str
) -> None:
    url = tls_broker.url(tls_broker.lenient).replace("amqps:", "amqp:")
    error = await refused(opening, url, namespace)
    assert isinstance(error, ProtocolError)
    assert "is not an AMQP 0-9-1 broker, or wants TLS" in str(error)


# guest.


async def test_guest_is_refused_off_loopback_with_the_reason(
    opening: Open, tls_broker: TLSBroker, namespace: str, authority: Authority
) -> None:
    host = tls_broker.off_loopback
    if not host:
        pytest.skip("this machine has no address but its loopback's")
    where = {"port": tls_broker.lenient, "host": host}
    await opening(tls_broker.url(**where, user="ada", cafile=authority.cafile), namespace)
    error = await refused(opening, tls_broker.url(**where, user="guest", cafile=authority.cafile), namespace)
    assert isinstance(error, AuthenticationFailed)
    assert error.permanent
    assert f"amqps://{host}:{tls_broker.lenient} refused the user 'guest' or its password" in str(error)
    assert "RabbitMQ lets guest in from its own machine only" in str(error)


async def test_guest_is_let_in_on_loopback(
    opening: Open, tls_broker: TLSBroker, namespace: str, authority: Authority
) -> None:
    if tls_broker.off_loopback == tls_broker.host:
        pytest.skip("nothing comes to a container over its loopback")
    await opening(tls_broker.url(tls_broker.lenient, user="guest", cafile=authority.cafile), namespace)


async def test_other_users_that_are_refused_are_told_nothing_of_guest(
    opening: Open, tls_broker: TLSBroker, namespace: str, authority: Authority
) -> None:
    url = tls_broker.url(tls_broker.lenient, cafile=authority.cafile).replace(PASSWORD, "wrong")
    error = await refused(opening, url, namespace)
    assert isinstance(error, AuthenticationFailed)
    assert "'ada'" in str(error)
    assert "guest" not in str(error)

"""Certificates of a CA that lasts for one test run, and a listener for TLS in front of a broker that has none."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import trustme

from support.proxy import Proxy

DAY = timedelta(days=1)


@dataclass(frozen=True)
class Certificate:
    """A certificate and its key, as URLs name them."""

    certfile: str
    keyfile: str

    @property
    def files(self) -> dict[str, str]:
        return {"certfile": self.certfile, "keyfile": self.keyfile}

    @property
    def text(self) -> str:
        """Both in one."""
        return "".join(Path(file).read_text("ascii") for file in (self.keyfile, self.certfile))


class Authority:
    """A CA that writes what it issues into a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ca = trustme.CA(organization_name="rpcq's tests")
        self._issued = 0
        self.cafile = str(folder / "ca.pem")
        self._ca.cert_pem.write_to_path(self.cafile)

    def issue(self, *names: str, valid: tuple[timedelta, timedelta] = (-DAY, DAY)) -> Certificate:
        """A certificate of these hosts, or of the user of this name; `valid` is from when until when, seen from now."""
        now = datetime.now(UTC)
        leaf = self._ca.issue_cert(*names, common_name=names[0], not_before=now + valid[0], not_after=now + valid[1])
        self._issued += 1
        certificate = Certificate(*(str(self._folder / f"{self._issued}.{kind}.pem") for kind in ("cert", "key")))
        # Without the CA's own certificate, which a broker need not send.
        leaf.cert_chain_pems[0].write_to_path(certificate.certfile)
        leaf.private_key_pem.write_to_path(certificate.keyfile)
        return certificate


def server_context(
    certificate: Certificate, *, clients_of: str | None = None, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> ssl.SSLContext:
    """What a listener shows; with `clients_of`, a CA's file, clients have to show a certificate of that CA."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = version
    context.load_cert_chain(certificate.certfile, certificate.keyfile)
    if clients_of is not None:
        context.load_verify_locations(clients_of)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def with_tls(url: str, host: str, port: int, **files: str) -> str:
    """The broker's URL over TLS, at this host and port, with these files."""
    parts = urlsplit(url)
    credentials, at, _ = parts.netloc.rpartition("@")
    changed = parts._replace(scheme="amqps", netloc=f"{credentials}{at}{host}:{port}", query=urlencode(files))
    return changed.geturl()


@dataclass
class Front(Proxy):
    """A listener for TLS that passes on to a broker what it hears.

    Attributes:
        port: of 127.0.0.1.
        handshakes: the version of TLS of each connection whose handshake was completed; before that nothing is heard.
    """

    port: int = 0
    handshakes: list[str] = field(default_factory=list)

    def url_for(self, host: str = "127.0.0.1", **files: str) -> str:
        return with_tls(self.url, host, self.port, **files)


@asynccontextmanager
async def behind_tls(broker_url: str, context: ssl.SSLContext) -> AsyncIterator[Front]:
    """A listener with this context in front of the broker of a URL."""
    parts = urlsplit(broker_url)
    front = Front(broker_url)

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        front.handshakes.append(writer.get_extra_info("ssl_object").version())
        task = asyncio.create_task(front._serve(parts.hostname or "", parts.port or 5672, reader, writer))
        front._tasks.add(task)
        task.add_done_callback(front._tasks.discard)

    front.thaw()
    server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=context)
    front.port = server.sockets[0].getsockname()[1]
    try:
        yield front
    finally:
        server.close()
        for task in list(front._tasks):
            task.cancel()
        await asyncio.gather(*front._tasks, return_exceptions=True)
        front.reset()
        await server.wait_closed()

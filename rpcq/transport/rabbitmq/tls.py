"""TLS: the CAs to trust and the client certificate to show, from the files that the broker's URL names."""

from __future__ import annotations

import ssl
from pathlib import Path

from rpcq.errors import ConfigurationError
from rpcq.url import BrokerURL


def tls_context(url: BrokerURL) -> ssl.SSLContext:
    """The context with the CAs to trust and the client certificate to show. Blocks: it reads files.

    Raises:
        ConfigurationError: one of the files cannot be used; the message names it.

    """
    files = dict(url.tls)
    for name, path in files.items():
        _check_readable(name, path)
    cafile, certfile, keyfile = files.get("cafile"), files.get("certfile"), files.get("keyfile")
    if cafile is not None:
        _check_certificates("cafile", cafile)
    context = ssl.create_default_context(cafile=cafile, capath=files.get("capath"))
    if certfile is not None:
        _check_certificates("certfile", certfile)
        which = ("certfile", certfile) if keyfile is None else ("keyfile", keyfile)

        def has_passphrase() -> str:  # without this, OpenSSL would ask at the terminal and wait
            raise _unusable(*which, "its key has a passphrase, which rpcq cannot enter; give a key without one")

        try:
            context.load_cert_chain(certfile, keyfile, has_passphrase)
        except ssl.SSLError as error:
            why = f"it does not hold the private key, in PEM, of the certificate ({error.reason or error})"
            if keyfile is None:
                why += "; name the file with the key with keyfile"
            raise _unusable(*which, why) from error
    return context


def _check_readable(name: str, path: str) -> None:
    if not path:
        raise _unusable(name, path, "it is empty")
    try:
        if name == "capath":
            next(Path(path).iterdir(), None)
        else:
            Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise _unusable(name, path, f"it cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _check_certificates(name: str, path: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError as error:
        raise _unusable(name, path, f"it holds no certificate in PEM ({error.reason or error})") from error


def _unusable(name: str, path: str, why: str) -> ConfigurationError:
    return ConfigurationError(f"the broker's URL has {name}={path!r}, which cannot be used: {why}")

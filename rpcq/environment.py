"""The one place outside of the command line that reads the environment."""

from __future__ import annotations

import os

from rpcq.errors import ConfigurationError


def broker_url(url: str | None) -> str:
    """The URL given, or that of `RPCQ_URL`.

    Raises:
        ConfigurationError: there is neither.

    """
    url = url or os.environ.get("RPCQ_URL")
    if not url:
        msg = "no broker: give a URL such as 'amqp://localhost/' or 'memory://', or set RPCQ_URL"
        raise ConfigurationError(msg)
    return url

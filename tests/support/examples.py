"""The example systems as programs, as `make example-NAME` runs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from support.producers import out, program


@contextmanager
def example(name: str, url: str, namespace: str, *arguments: str, port: int = 0) -> Iterator[str]:
    """An example that is a page: where it is. Its workers end with it."""
    command = ("-m", f"examples.{name}", "--port", str(port), *arguments)
    with program(*command, url=url, RPCQ_NAMESPACE=namespace) as process:
        line = out(process).readline()
        assert line.startswith("serving http://127.0.0.1:"), line
        yield line.split()[1]

"""The distribution that contains the package rpcq: its name, and how to install its extras.

The distribution "rpcq" on PyPI is another project, and `DISTRIBUTION` is not published yet: somebody else could take
that name. So users are sent to a clone of the repository. All messages that do so are made here.
"""

from __future__ import annotations

from typing import Final

DISTRIBUTION: Final = "rpcq-rabbitmq"
"""The name in pyproject.toml. The import name and the command are `rpcq`."""


def install_command(*extras: str) -> str:
    """The shell command that installs rpcq with these extras, in a clone of its repository."""
    return f"pip install '.[{','.join(extras)}]'" if extras else "pip install ."


def missing_driver(what: str, package: str) -> str:
    """The message that `what` needs a package that is no extra, such as the driver of a database."""
    return f"{what} needs the package {package}: run pip install {package}"


def missing(what: str, package: str, extra: str) -> str:
    """The message that `what` needs a package, which the extra installs."""
    return f"{what} needs the package {package}: in a clone of rpcq, run {install_command(extra)}"

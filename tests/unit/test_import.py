"""What `import rpcq` costs and gives."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rpcq

LAZY = ("aio_pika", "aiormq", "pamqp", "yarl", "typer", "rich", "uvloop", "prometheus_client", "opentelemetry")
"""What only a RabbitMQ connection, the command line or who watches needs."""


def loaded_after(code: str) -> set[str]:
    """The top-level modules that are loaded in a fresh process after this."""
    ran = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport json, sys\nprint(json.dumps([*sys.modules]))"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return {name.partition(".")[0] for name in json.loads(ran.stdout.splitlines()[-1])}


def test_importing_rpcq_loads_nothing_that_only_a_connection_or_the_command_line_needs() -> None:
    # structlog loads rich for itself where it is installed; what counts is that rpcq asks for none of it.
    unavoidable = loaded_after("import structlog")
    loaded = loaded_after("import rpcq")
    assert {"rpcq", "pydantic"} <= loaded
    assert loaded & {*LAZY} - unavoidable == set()


def test_using_the_in_process_broker_loads_nothing_of_rabbitmqs() -> None:
    code = """
import asyncio
from rpcq import Client, Service, Worker
service = Service("things")
@service.method
async def work(x: int) -> int:
    return x
async def main():
    async with Worker(service, url="memory://"), Client("memory://") as client:
        assert await client.call("things.work", x=1) == 1
asyncio.run(main())
"""
    assert loaded_after(code) & {*LAZY} - loaded_after("import structlog") == set()


def test_a_rabbitmq_url_loads_aio_pika() -> None:
    """Else the tests above would prove nothing."""
    assert "aio_pika" in loaded_after("import rpcq; rpcq.Client('amqp://localhost/')")


def test_what_watches_and_the_web_load_no_framework() -> None:
    loaded = loaded_after("import rpcq.web, rpcq.observability.calls, rpcq.cli")
    assert loaded & {"prometheus_client", "opentelemetry", "starlette", "fastapi"} == set()
    assert "prometheus_client" in loaded_after("import rpcq.observability.metrics")


PUBLIC = (
    "rpcq",
    "rpcq.dead_letters",
    "rpcq.errors",
    "rpcq.logs",
    "rpcq.once",
    "rpcq.outbox",
    "rpcq.outbox.watching",
    "rpcq.sync",
    "rpcq.testing",
    "rpcq.web",
    "rpcq.web.problems",
    "rpcq_pytest",
)
"""Modules that users import from, beside `rpcq.observability`, whose modules each need an extra."""


def test_what_the_reference_documents_can_be_imported_from_a_public_module() -> None:
    named = [
        name
        for page in (Path(rpcq.__file__).parents[1] / "docs" / "reference").glob("*.md")
        for name in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE)
    ]
    assert len(named) > 30
    for name in named:
        module, _, attribute = name.rpartition(".")
        if name in PUBLIC:
            continue
        assert module in PUBLIC or module.startswith("rpcq.observability."), name
        assert hasattr(importlib.import_module(module), attribute), name
    documented = {name.rpartition(".")[2] for name in named} | {*dir(rpcq.errors)}
    assert documented >= {*rpcq.__all__}


def test_each_public_name_is_there_and_they_are_in_order() -> None:
    assert len(set(rpcq.__all__)) == len(rpcq.__all__)
    assert sorted(rpcq.__all__) == rpcq.__all__
    for name in rpcq.__all__:
        assert hasattr(rpcq, name), name


def test_what_is_imported_from_rpcq_by_a_star_is_what_all_says() -> None:
    space: dict[str, object] = {}
    exec("from rpcq import *", space)
    assert space.keys() - {"__builtins__"} == {*rpcq.__all__}


@pytest.mark.parametrize("name", rpcq.__all__)
def test_every_public_name_and_what_it_offers_is_documented(name: str) -> None:
    thing = getattr(rpcq, name)
    assert thing.__doc__, name
    if inspect.isclass(thing):
        assert thing.__dict__.get("__doc__"), f"{name} has only the docstring that it inherits"
        for member, value in vars(thing).items():
            if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                assert inspect.getdoc(value), f"{name}.{member}"

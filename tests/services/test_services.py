"""Both example services: as functions, and end to end as the programs that a user starts."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from consumer_service import calculator, echo
from consumer_service.contracts import CalculatorApi, DivisionByZero, EchoApi
from producer_service.load import send
from rpcq import Client, Service, Worker
from support.producers import ROOT, SECONDS, environment, program, run

# As functions.


async def test_echo_answers_what_it_is_told() -> None:
    assert await echo.process("hello") == "Consumer processed: hello"
    assert await echo.process(message="") == "Consumer processed: "


async def test_echo_takes_the_time_that_it_is_told_to_take() -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    assert await echo.process("slow", delay=0.05) == "Consumer processed: slow"
    assert loop.time() - began >= 0.04


async def test_the_calculator_is_exact() -> None:
    assert await calculator.add(2**70, 1) == 2**70 + 1
    assert await calculator.multiply(Decimal("0.1"), Decimal("0.2")) == Decimal("0.02")
    assert await calculator.divide(Decimal(1), Decimal(8)) == Decimal("0.125")
    with pytest.raises(DivisionByZero) as caught:
        await calculator.divide(Decimal(5), Decimal(0))
    assert (caught.value.code, caught.value.details) == ("division_by_zero", {"x": Decimal(5)})


async def test_the_contracts_describe_the_services(namespace: str) -> None:
    url = f"memory://{namespace}"
    async with (
        Worker(echo.echo, calculator.calculator, url=url),
        Client(url) as client,
    ):
        exact = client.bind(CalculatorApi)
        assert await exact.add(2**70, 1) == 2**70 + 1
        assert await exact.multiply(x=Decimal("0.1"), y=Decimal("0.2")) == Decimal("0.02")
        assert await exact.divide(Decimal(1), Decimal(8)) == Decimal("0.125")
        with pytest.raises(DivisionByZero, match="the divisor is zero") as caught:
            await exact.divide(Decimal(5), Decimal(0))
        assert caught.value.details == {"x": "5"}
        assert await client.bind(EchoApi).process("hello") == "Consumer processed: hello"
    for api, service in ((CalculatorApi, calculator.calculator), (EchoApi, echo.echo)):
        said = api.__rpcq_contract__  # type: ignore[attr-defined]  # what `contract` put there
        assert said.service == service.name
        assert {name for name in dir(api) if not name.startswith("_")} == service.methods.keys()
        assert said.idempotent == {name for name, method in service.methods.items() if method.idempotent}


# What the producer counts.


async def test_the_producer_counts_answers_that_are_not_its_own(namespace: str) -> None:
    impostor, url = Service("echo"), f"memory://{namespace}"

    @impostor.method
    async def process(message: str, delay: float) -> str:
        if message == "request 3":
            raise ValueError
        return f"Consumer processed: {'request 0' if message == 'request 1' else message}"

    async with Worker(impostor, url=url), Client(url) as client:
        found = await send(client, requests=10, concurrency=4)
    assert (found.sent, found.ok, found.mismatched, found.ended) == (10, 9, 1, 10)
    assert found.errors == {"RemoteError": 1}
    assert found.executed == {"yes": 1}
    assert 0 < found.percentile("latency", 50) <= found.percentile("latency", 100)


async def test_the_producer_tells_each_second_how_many_have_ended(namespace: str) -> None:
    url = f"memory://{namespace}"
    told: list[int] = []
    async with Worker(echo.echo, url=url), Client(url) as client:
        found = await send(client, requests=60, concurrency=4, delay=0.1, on_answers=told.append)
    assert found.ok == 60
    assert 0 < sum(told) <= 60


# End to end.


def produce(url: str | None, namespace: str, *arguments: str) -> tuple[int, str]:
    """Run the producer: its exit code and what it shows."""
    ran = run("-m", "producer_service", "--namespace", namespace, *arguments, url=url)
    return ran.returncode, ran.stdout + ran.stderr


def shown(output: str, row: str) -> str:
    """A row of the summary."""
    found = re.search(rf"│ {re.escape(row)} +│ (.*?) +│", output)
    assert found, output
    return found[1]


def test_every_request_of_the_producer_gets_its_own_answer_from_the_consumer(url: str, namespace: str) -> None:
    with program("-m", "consumer_service", "--namespace", namespace, "--prefetch", "50", url=url) as process:
        code, output = produce(url, namespace, "--requests", "300", "--concurrency", "100")
        assert code == 0, output
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0
    assert [shown(output, row) for row in ("sent", "matched", "mismatched", "errors")] == ["300", "300", "0", "0"]
    assert "worker running elsewhere; 300 requests, 100 at once" in output


def test_the_producer_can_start_the_consumer_itself_and_ends_it(url: str, namespace: str) -> None:
    code, output = produce(url, namespace, "--with-worker", "--requests", "200", "--concurrency", "50")
    assert code == 0, output
    assert shown(output, "matched") == "200"
    found = re.search(r"worker process (\d+), prefetch 100", output)
    assert found, output
    with pytest.raises(ProcessLookupError):
        os.kill(int(found[1]), 0)


def test_the_producer_takes_the_broker_from_a_file_and_so_does_the_consumer_that_it_starts(
    url: str, namespace: str, tmp_path: Path
) -> None:
    def with_file(name: str, *arguments: str) -> tuple[int, str]:
        ran = subprocess.run(
            [sys.executable, "-m", "producer_service", *arguments],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
            cwd=ROOT,
            env={**environment(None), "RPCQ_URL_FILE": str(tmp_path / name), "COLUMNS": "300"},
        )
        return ran.returncode, ran.stdout + ran.stderr

    (tmp_path / "url").write_text(f"{url}\n")
    code, output = with_file("url", "--namespace", namespace, "--with-worker", "--requests", "50")
    assert code == 0, output
    assert shown(output, "matched") == "50"
    assert re.search(r"worker process \d+", output), output
    for arguments in ([], ["serve"]):  # and not served in memory
        code, output = with_file("nowhere", *arguments)
        assert (code, "RPCQ_URL_FILE must name a file that can be read" in output) == (2, True), output


def test_without_a_broker_the_producer_serves_itself_in_memory(namespace: str) -> None:
    code, output = produce(None, namespace, "--requests", "500", "--concurrency", "500")
    assert code == 0, output
    assert shown(output, "matched") == "500"
    assert "in this process" in output


def test_the_in_process_broker_can_be_named(namespace: str) -> None:
    code, output = produce("memory://", namespace, "--requests", "1", "--delay", "0.01")
    assert code == 0, output
    assert shown(output, "sent") == "1"


def test_without_a_consumer_the_producer_says_so_and_fails(url: str, namespace: str) -> None:
    code, output = produce(url, namespace, "--wait", "1", "--requests", "1")
    assert code == 2
    text = " ".join(output.split())
    assert "no worker of 'echo' answered within 1 s" in text
    assert namespace in text
    assert "Traceback" not in output


async def test_a_consumer_that_answers_wrongly_fails_the_producer(url: str, namespace: str) -> None:
    impostor = Service("echo")

    @impostor.method
    async def process(message: str, delay: float) -> str:
        return f"Consumer processed: {'something else' if message == 'request 7' else message}"

    async with Worker(impostor, url=url, namespace=namespace):
        code, output = await asyncio.to_thread(produce, url, namespace, "--requests", "20", "--concurrency", "5")
    assert code == 1, output
    assert [shown(output, row) for row in ("sent", "matched", "mismatched")] == ["20", "19", "1"]


@pytest.mark.parametrize("module", ["producer_service", "consumer_service"])
def test_a_broker_that_cannot_be_used_is_one_message_without_the_password(module: str) -> None:
    ran = run("-m", module, "--url", "amqp://me:s3cr3t@no-such-host.invalid/", url=None)
    assert ran.returncode == 2
    said = ran.stdout + ran.stderr
    assert f"{module}: cannot reach amqp://no-such-host.invalid:5672" in " ".join(said.split())
    assert "s3cr3t" not in said
    assert "Traceback" not in said


def test_the_producers_arguments_are_checked() -> None:
    for arguments in (["--requests", "0"], ["--concurrency", "-1"], ["--requests", "many"]):
        code, output = produce("memory://", "unused", *arguments)
        assert code == 2
        assert "usage: python -m producer_service" in output

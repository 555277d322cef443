"""What contenders of `benchmarks.peers` need that is neither rpcq nor RabbitMQ: packages, servers, programs.

What is missing is found, and installed where that is possible, as the tests do it: `tests/support/programs.py` and
`tests/support/foreign.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from urllib.parse import quote

import psutil  # type: ignore[import-untyped]  # it ships no types

from benchmarks.participants import PROGRAMS
from benchmarks.processes import ROOT, BenchmarkError, Process, broker_process
from rpcq.url import parse

sys.path.append(str(ROOT / "tests"))  # a command of `python -m benchmarks...` has the root alone
from support.foreign import RUNTIMES
from support.harness import Unavailable, read, tail, to_stderr
from support.programs import NATS_SERVER

PACKAGES = {
    "aio-pika": ("aio_pika",),
    "faststream": ("faststream.rabbit",),
    "nats-py": ("nats", "orjson"),
    "grpc.aio": ("grpc", "orjson"),
}
"""Contender -> what its module imports."""
STARTED_WITHIN = 30.0
"""Seconds that a server has until it listens."""
UNTIL_INPUT_ENDS = '"$@" & cat > /dev/null; kill $!; wait'
"""Runs a command in a shell until its input ends: also if the runner is killed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ground:
    """What a contender stands on.

    Attributes:
        broker: the process of its broker; None if there is none, or if it cannot be seen.
        server: the address of a server other than RabbitMQ; "" if there is none.
        program: what runs the contender; None if that is its module.
        url: the RabbitMQ, for the program.
        versions: those of what was started.

    """

    broker: psutil.Process | None = None
    server: str = ""
    program: str | None = None
    url: str = ""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)


@contextlib.asynccontextmanager
async def all_grounds(names: Iterable[str], url: str) -> AsyncIterator[tuple[dict[str, Ground], dict[str, str]]]:
    """Have what the contenders need, while inside; also why others cannot be measured, by their names.

    Raises:
        BenchmarkError: none of them can be measured, or something that is there does not work.
    """
    grounds: dict[str, Ground] = {}
    missing: dict[str, str] = {}
    async with contextlib.AsyncExitStack() as stack:
        for name in names:
            try:
                grounds[name] = await stack.enter_async_context(ground(name, url))
            except Unavailable as error:
                missing[name] = str(error)
        if not grounds:
            reasons = "\n".join(f"without {name}: {why}" for name, why in missing.items())
            raise BenchmarkError(f"there is no contender to measure\n{reasons}")
        yield grounds, missing


@contextlib.asynccontextmanager
async def ground(name: str, url: str) -> AsyncIterator[Ground]:
    """Have what a contender needs, while inside.

    Raises:
        Unavailable: something is missing; the message names it, and says how it is installed.
        BenchmarkError: it is there and does not work.
    """
    for module in PACKAGES.get(name, ()):
        require(module)
    if name == "nats-py":
        async with nats_server() as found:
            yield found
    elif name == "grpc.aio":
        yield Ground()
    elif name in PROGRAMS:
        full = url_for_programs(url)
        with tempfile.TemporaryDirectory() as folder:
            yield Ground(broker_process(url), program=built(PROGRAMS[name], Path(folder)), url=full)
    else:
        yield Ground(broker_process(url))


def require(module: str) -> None:
    """Check that a module can be imported.

    Raises:
        Unavailable: it cannot.
    """
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # its package is missing
        found = None
    if found is None:
        raise Unavailable(f"the Python package with the module {module} is not installed: pip install '.[peers]'")


@contextlib.asynccontextmanager
async def nats_server() -> AsyncIterator[Ground]:
    """A NATS server of our own, with its defaults, on a free port of the loopback address.

    Raises:
        Unavailable: there is none to be had.
        BenchmarkError: it does not start.
    """
    path = NATS_SERVER.find(to_stderr)
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)  # noqa: ASYNC221 - nothing else runs yet
    with tempfile.TemporaryDirectory() as folder:
        process = Process(
            "the NATS server",
            await asyncio.create_subprocess_exec(
                *("sh", "-c", UNTIL_INPUT_ENDS, "sh"),
                *(path, "--addr", "127.0.0.1", "--port", "-1", "--ports_file_dir", folder),
                *("--log", str(Path(folder) / "log")),
                stdin=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the runner alone
            ),
        )
        try:
            found, server = await listening(process, Path(folder))
            version = done.stdout.strip().rpartition("v")[2]
            yield Ground(found, server, versions={"nats-server": version})
        finally:
            await process.end()


async def listening(process: Process, folder: Path) -> tuple[psutil.Process, str]:
    """The process of a NATS server, and the address that it wrote into the folder, as soon as it listens."""
    deadline = time.monotonic() + STARTED_WITHIN
    while time.monotonic() < deadline:
        if (found := written(folder)) is not None:
            return found
        if not process.ps.is_running() or process.ps.status() == psutil.STATUS_ZOMBIE:
            break
        await asyncio.sleep(0.05)
    raise BenchmarkError(f"{process.name} does not listen; its log:\n{tail(read(folder / 'log'))}")


def written(folder: Path) -> tuple[psutil.Process, str] | None:
    """What the file says that a NATS server writes, by name and content; None as long as it is not complete."""
    for path in folder.glob("nats-server_*.ports"):
        with contextlib.suppress(json.JSONDecodeError):
            return psutil.Process(int(path.stem.rpartition("_")[2])), str(json.loads(path.read_text())["nats"][0])
    return None


def built(source: str, folder: Path) -> str:
    """A program in C with rabbitmq-c, built in the folder; its path.

    Raises:
        Unavailable: there is no compiler, or no rabbitmq-c, to be had.
    """
    program = f"{{folder}}/{Path(source).stem}"
    (language,) = (it for it in RUNTIMES if it.name == "C")
    compiler = ("gcc", "-O2", "-Wall", "-Wextra", "-Werror", "{source}", "-lrabbitmq", "-lm", "-o", program)
    source = str(ROOT / "benchmarks" / "participants" / source)
    mine = dataclasses.replace(language, source=source, build=compiler, command=(program,))
    (path,) = mine.prepare(folder, to_stderr, beside=())
    return path


def url_for_programs(url: str) -> str:
    """The URL with what rabbitmq-c does not fill in: port and vhost. Of several nodes, it is the first.

    Raises:
        Unavailable: the URL is one for TLS.
    """
    broker = parse(url)
    if broker.scheme != "amqp":
        raise Unavailable(f"the program has no TLS: it is measured over amqp://, not {broker.scheme}://")
    host, port = broker.hosts[0]
    user, password, vhost = (quote(it, safe="") for it in (broker.user, broker.password, broker.vhost))
    return f"amqp://{user}:{password}@{host}:{port}/{vhost}"

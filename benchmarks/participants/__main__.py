"""The worker or the client of one contender, as in `python -m benchmarks.participants rpcq worker --prefetch 9 ...`.

The runner starts it, with the broker in RPCQ_URL (on the command line, others could read the password).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools

import uvloop

from benchmarks.participants import MODULES, Options, Participant, load
from benchmarks.participants.load import Plan, measure
from benchmarks.processes import Line, broker_url, obey, say


def version(name: str) -> str:
    """The version of a distribution; rpcq may be measured from its checkout, uninstalled."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


async def serve(participant: Participant, options: Options) -> None:
    """Serve until the runner ends us."""

    async def no_commands(line: Line) -> None:
        raise AssertionError(line)

    async with participant.worker(options) as address:
        say("ready", versions={name: version(name) for name in participant.PACKAGES}, address=address or "")
        await obey(no_commands)


async def drive(participant: Participant, options: Options) -> None:
    """Measure whenever the runner says so."""
    numbers = itertools.count()
    async with participant.client(options) as call:

        async def on_command(line: Line) -> None:
            say("result", **await measure(call, numbers, Plan(**line), mark=say))

        say("ready")
        await obey(on_command)


def main() -> None:
    """Read the arguments and run on uvloop, as all contenders do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=MODULES)
    parser.add_argument("role", choices=("worker", "client"))
    parser.add_argument("--namespace", required=True)
    parser.add_argument("--prefetch", type=int, required=True)
    parser.add_argument("--server", default="", help="address of a server other than the RabbitMQ")
    given = parser.parse_args()
    options = Options(broker_url(), given.namespace, given.prefetch, given.server)
    role = serve if given.role == "worker" else drive
    uvloop.run(role(load(given.name), options))


if __name__ == "__main__":
    main()

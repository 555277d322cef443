"""Random scripts, played on the in-process broker and on RabbitMQ: each step must lead to the same on both.

`RPCQ_TEST_SCRIPTS` is how many scripts the long tests play; they differ from one run to the next.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Sequence
from pprint import pformat
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from support import call_scripts, seam_scripts
from support.broker import Broker

AT_ONCE = 10
"""Scripts that are played beside each other: they mostly wait."""

SCRIPTS = int(os.environ.get("RPCQ_TEST_SCRIPTS", "300"))

# Each example takes seconds: a failing one is told as it is, rather than made smaller.
few = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
    phases=[Phase.explicit, Phase.generate],
)
many = settings(few, derandomize=False, phases=[*few.phases, Phase.shrink], max_examples=SCRIPTS // AT_ONCE)


def play(scripts: Sequence[Any], how: ModuleType, broker: Broker) -> None:
    """Play scripts in an event loop of their own: asyncio's debug mode takes longer than they do."""
    asyncio.run(check(scripts, how, broker.url), debug=False)


async def check(scripts: Sequence[Any], how: ModuleType, url: str) -> None:
    """Play scripts on both brokers; an assertion fails over the first step of one that leads to something else."""
    async with asyncio.TaskGroup() as group:
        playing = [group.create_task(difference(script, how, url)) for script in scripts]
    for script, task in zip(scripts, playing, strict=True):
        # What does not differ when it is played alone was a matter of time, on a machine that had too little of it.
        if task.result() and (found := await difference(script, how, url)):
            pytest.fail(found, pytrace=False)


async def difference(script: Any, how: ModuleType, url: str) -> str:
    """Where one script leads to something else on RabbitMQ; empty where it does not."""
    namespace = f"t{secrets.token_hex(8)}"
    expected = await how.Player(script, seam_scripts.MemoryStage(namespace)).play()
    async with seam_scripts.rabbitmq_stage(url, namespace) as stage:
        seen = await how.Player(script, stage).play(expected)
    if seen == expected:
        return ""
    same = "\n".join(f"  {step['step']}" for step in seen[:-1])
    return (
        f"{script!r}\nafter\n{same}\nin memory:\n{pformat(expected[len(seen) - 1], width=110)}\n"
        f"RabbitMQ:\n{pformat(seen[-1], width=110)}"
    )


@pytest.mark.long
@settings(few, max_examples=6)
@given(scripts=st.lists(seam_scripts.scripts(), min_size=AT_ONCE, max_size=AT_ONCE))
def test_any_script_of_messages_leads_to_the_same_on_both_brokers(
    broker: Broker, scripts: list[seam_scripts.Script]
) -> None:
    play([seam_scripts.for_release(script, broker.release) for script in scripts], seam_scripts, broker)


@settings(few, max_examples=4)
@given(scripts=st.lists(call_scripts.scripts(), min_size=AT_ONCE, max_size=AT_ONCE))
def test_any_script_of_calls_leads_to_the_same_on_both_brokers(
    broker: Broker, scripts: list[call_scripts.Script]
) -> None:
    play(scripts, call_scripts, broker)


@pytest.mark.long
@pytest.mark.timeout(3600)
@many
@given(scripts=st.lists(seam_scripts.scripts(), min_size=1, max_size=AT_ONCE))
def test_any_of_many_scripts_of_messages_leads_to_the_same_on_both_brokers(
    broker: Broker, scripts: list[seam_scripts.Script]
) -> None:
    play([seam_scripts.for_release(script, broker.release) for script in scripts], seam_scripts, broker)


@pytest.mark.long
@pytest.mark.timeout(3600)
@many
@given(scripts=st.lists(call_scripts.scripts(), min_size=1, max_size=AT_ONCE))
def test_any_of_many_scripts_of_calls_leads_to_the_same_on_both_brokers(
    broker: Broker, scripts: list[call_scripts.Script]
) -> None:
    play(scripts, call_scripts, broker)

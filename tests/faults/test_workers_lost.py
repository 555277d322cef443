"""Workers that are killed, stopped, frozen or poisoned under load."""

from __future__ import annotations

from load import Scene
from rpcq import OutcomeUnknown


async def test_a_worker_killed_in_the_middle_of_calls_costs_only_those_and_none_runs_twice(scene: Scene) -> None:
    first, _ = await scene.workers_of(2)
    async with scene.client() as client:
        async with (
            scene.load(client, params={"seconds": 0.02}) as plain,
            scene.load(client, method="again", idempotent=True) as idempotent,
        ):
            await plain.through()
            first.kill()
            await plain.through()
            await idempotent.through()
        assert plain.ledger.failed == plain.ledger.count(OutcomeUnknown)
        assert 0 < plain.ledger.failed <= 50
        assert idempotent.ledger.failed == 0
    await scene.check()

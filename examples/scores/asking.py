"""Asks for scores: notes it in the store, and sends a job for each that is missing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from examples.scores.contracts import ScoresApi
from examples.scores.store import Lane, Store
from rpcq import Client


async def ask(client: Client, store: Store, products: Iterable[str], lane: Lane) -> int:
    """Ask for the scores of products in a lane; returns how many jobs were sent.

    The note comes first and says "not sent", so that a crash after it leaves nothing that counts as sent: who asks next
    sends it again.

    Raises:
        SendError: the broker did not confirm a job; the next request sends it again.

    """
    wanted = await asyncio.to_thread(store.ask, products, lane)
    if wanted:
        jobs = [{"product": product} for product in wanted]
        await client.with_options(priority=lane).send_many(client.bind(ScoresApi).compute, jobs)
        await asyncio.to_thread(store.sent, wanted, lane)
    return len(wanted)

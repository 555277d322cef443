"""What tests of order keys share."""

from __future__ import annotations

from itertools import count
from typing import Any

from rpcq import Service
from rpcq.wire.job_queues import JobTopology, lane_of
from support.places import Place


def keys_in(lane: str, many: int, prefix: str = "key") -> list[str]:
    """Order keys of one lane."""
    found = (f"{prefix}-{number}" for number in count())
    return [key for key, _ in zip((key for key in found if lane_of(key) == lane), range(many), strict=False)]


def lane_queue(home: Place, service: Service, key: str) -> Any:
    """The queue of the jobs with an order key."""
    return JobTopology(home.namespace).queue(service.name, lane_of(key))

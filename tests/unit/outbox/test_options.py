"""Options of an outbox: which are valid, and what times they mean."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from rpcq.errors import ConfigurationError
from rpcq.outbox import OutboxOptions

NOW = 1_700_000_000_000


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"delay": 1, "at": datetime.now(UTC)}, "delay and at must not be given both"),
        ({"delay": -1}, "delay must be a number of seconds from 0 on; got -1"),
        ({"delay": float("inf")}, "delay must be"),
        ({"delay": True}, "delay must be"),
        ({"at": datetime(2030, 1, 1)}, "at must have a time zone"),  # noqa: DTZ001 - that is the mistake
        ({"order_key": ""}, "order_key must be a string of 1 to 255 bytes"),
        ({"order_key": "é" * 128}, "order_key must be"),
        ({"order_key": 7}, "order_key must be"),
        ({"order_key": "a", "delay": 1}, "order_key must not be given with delay, at or priority"),
        ({"order_key": "a", "priority": "high"}, "order_key must not be given with"),
        ({"priority": "urgent"}, "priority must be"),
        ({"metadata": {"a": "b"}}, "must begin with 'x-'"),
    ],
)
def test_an_option_that_is_not_valid_is_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        OutboxOptions(**options)


@pytest.mark.parametrize(
    ("options", "times"),
    [
        ({}, (None, None)),
        ({"delay": 0}, (None, None)),
        ({"delay": 1.5}, (NOW + 1500, None)),
        ({"delay": 100 * 86400}, (NOW + 8_640_000_000, None)),  # longer than the broker's ladder
        ({"at": datetime(2999, 1, 1, tzinfo=UTC)}, (32472144000000, None)),
        ({"expires": 5}, (None, NOW + 5000)),
        ({"delay": 4, "expires": 5}, (NOW + 4000, NOW + 5000)),
    ],
)
def test_the_times_of_a_job_are_milliseconds_since_the_epoch(
    options: dict[str, Any], times: tuple[int | None, int | None]
) -> None:
    assert OutboxOptions(**options).times(NOW) == times


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"at": datetime(2000, 1, 1, tzinfo=UTC)}, "at must be in the future"),
        ({"delay": 1e300}, "before the year 9999"),
        ({"delay": 5, "expires": 5}, "expires must be after the job is due"),
        ({"expires": datetime(2000, 1, 1, tzinfo=UTC)}, "expires must be after"),
    ],
)
def test_times_that_cannot_be_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        OutboxOptions(**options).times(NOW)

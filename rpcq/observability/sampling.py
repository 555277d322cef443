"""Picks a share of all calls by their correlation ID: client and worker pick the same calls."""

from __future__ import annotations

import zlib

from rpcq.errors import ConfigurationError


class Sampler:
    """Picks a share of all calls.

    Args:
        ratio: share of calls, from 0 (none) to 1 (all).

    Raises:
        ConfigurationError: the ratio is not a number from 0 to 1.

    """

    def __init__(self, ratio: float) -> None:
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
            msg = f"the ratio must be a number from 0 (none) to 1 (all); got {ratio!r}"
            raise ConfigurationError(msg)
        self._limit = round(ratio * 2**32)

    def __call__(self, correlation_id: str) -> bool:
        """Whether this call is picked. Its further requests, which have a number after its ID, are picked with it."""
        # IDs are numbers in a row, and their checksums are too regular for a small share: multiply by Knuth's constant.
        return zlib.crc32(correlation_id.partition(".")[0].encode()) * 2654435761 % 2**32 < self._limit

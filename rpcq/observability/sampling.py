"""Which calls are looked at, where not all are: decided by the correlation ID, so that both ends decide alike."""

from __future__ import annotations

import zlib

from rpcq.errors import ConfigurationError


class Sampler:
    """Picks a share of all calls.

    Args:
        ratio: from 0, none, to 1, all.

    Raises:
        ConfigurationError: it is not.

    """

    def __init__(self, ratio: float) -> None:
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
            msg = f"the ratio is {ratio!r}; it is a number from 0 (none) to 1 (all)"
            raise ConfigurationError(msg)
        self._limit = round(ratio * 2**32)

    def __call__(self, correlation_id: str) -> bool:
        """Whether this call is picked; its further requests, which have a number after its ID, are what it is."""
        # Multiplied (Knuth's constant), since checksums of numbers in a row are too regular for a small share of them.
        return zlib.crc32(correlation_id.partition(".")[0].encode()) * 2654435761 % 2**32 < self._limit

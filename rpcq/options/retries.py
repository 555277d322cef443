"""When something that failed is tried again."""

from __future__ import annotations

from dataclasses import dataclass

from rpcq.errors import DOMAIN_CODE, STATUS_CODES, ConfigurationError
from rpcq.options.checks import check_count, check_seconds, check_several


@dataclass(frozen=True, kw_only=True)
class Retry:
    """When a client retries a failed call, and how long it waits before each retry.

    The pause before the n-th retry is random between 0 and `initial_backoff * 2 ** (n - 1)`, at most `max_backoff`.
    This is full jitter: callers that failed together do not retry together. The call's deadline holds for all
    attempts: a retry that would begin after it is not made.

    A call that may have run is retried only if its caller declared it idempotent.

    Attributes:
        max_attempts: the most attempts, including the first one.
        initial_backoff: seconds that the pause before the first retry is at most.
        max_backoff: seconds that any pause is at most.
        codes: the errors to retry: gRPC's status names, or the codes of domain errors.

    """

    max_attempts: int = 3
    initial_backoff: float = 0.1
    max_backoff: float = 5.0
    codes: tuple[str, ...] = ("UNAVAILABLE", "RESOURCE_EXHAUSTED")

    def __post_init__(self) -> None:
        check_count("max_attempts", self.max_attempts, 2, 1000)
        check_seconds("initial_backoff", self.initial_backoff)
        check_seconds("max_backoff", self.max_backoff)
        object.__setattr__(self, "codes", check_several("codes", self.codes))
        for code in self.codes:
            if not isinstance(code, str) or not (code in STATUS_CODES or DOMAIN_CODE.match(code)):
                msg = f"codes must be {', '.join(STATUS_CODES)}, or codes of domain errors; got {code!r}"
                raise ConfigurationError(msg)

    def longest_pause(self, retries: int) -> float:
        """The longest pause before the next retry, in seconds, after this many retries."""
        return min(self.max_backoff, self.initial_backoff * 2.0 ** min(retries, 64))

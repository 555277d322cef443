"""How jobs are run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from rpcq.errors import ConfigurationError
from rpcq.once import Once
from rpcq.options.checks import MAX_TIMEOUT, check_count, check_seconds, check_several
from rpcq.options.retries import Retry
from rpcq.schedules import Schedule, check_schedule

JOB_RETRY: Final = Retry(max_attempts=8, initial_backoff=1.0, max_backoff=3600.0)
"""How a job is retried by default."""


Priority = Literal["high", "normal", "low"]
"""Which lane of its service a job goes to; "normal" is the one that every service has."""

_RATE: Final = re.compile(r"([1-9][0-9]{0,8})/([smh])")
_PERIODS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """How a job is run, and what becomes of it when it fails.

    Attributes:
        retry: how often, and after which pauses, a job that failed runs again; None for never.
        timeout: the most seconds that one attempt may run, at most 25 minutes.
        retry_on: only these exceptions, and timeouts, are retried.
        give_up_on: these exceptions are not retried.
        at_most_once: it is never run again: a job that may have run becomes a dead letter.
        schedule: when workers send the job by themselves, without parameters; None for never.
        max_concurrency: the most jobs of this name that one worker runs at once; None for no limit of its own.
        rate: how many jobs of this name one worker begins at most in a second, a minute or an hour, such as "10/s",
            "100/m" or "1000/h", evenly spaced: 0.1 s apart for "10/s". None for no limit.
        once: an inbox, such as `rpcq.outbox.Inbox(engine)`: the handler gets a session whose transaction also has the
            key of the job, so that its changes happen once; None for none. The service's `result_store` is not used.

    """

    retry: Retry | None = JOB_RETRY
    timeout: float = 300.0
    retry_on: tuple[type[Exception], ...] = (Exception,)
    give_up_on: tuple[type[Exception], ...] = ()
    at_most_once: bool = False
    schedule: Schedule | None = None
    max_concurrency: int | None = None
    rate: str | None = None
    once: Once | None = None

    def __post_init__(self) -> None:
        check_schedule(self.schedule)
        if self.schedule is not None and self.at_most_once:
            raise ConfigurationError("at_most_once must be False with a schedule: after a crash, a tick is sent twice")
        if self.retry is not None and not isinstance(self.retry, Retry):
            raise ConfigurationError(f"retry must be a Retry(...) or None; got {self.retry!r}")
        if self.retry is not None and self.retry.codes != JOB_RETRY.codes:
            msg = f"retry must have no codes: jobs fail with exceptions, see retry_on; got {self.retry.codes!r}"
            raise ConfigurationError(msg)
        if self.once is not None and not isinstance(self.once, Once):
            raise ConfigurationError(f"once must be an inbox, such as rpcq.outbox.Inbox(engine); got {self.once!r}")
        if self.once is not None and self.at_most_once:
            msg = "at_most_once must be False with once: a job whose effects happen once may run again"
            raise ConfigurationError(msg)
        check_seconds("timeout", self.timeout, MAX_TIMEOUT)
        for name in ("retry_on", "give_up_on"):
            kinds = check_several(name, getattr(self, name))
            for kind in kinds:
                if not (isinstance(kind, type) and issubclass(kind, Exception)):
                    raise ConfigurationError(f"{name} must be classes of exceptions; got {kind!r}")
            object.__setattr__(self, name, kinds)
        if self.max_concurrency is not None:
            check_count("max_concurrency", self.max_concurrency, 1, 65_535)
        if self.rate is not None and not (isinstance(self.rate, str) and _RATE.fullmatch(self.rate)):
            msg = (
                "rate must be a whole number of jobs in a second, minute or hour, such as '10/s', '100/m' or '1000/h'; "
                f"got {self.rate!r}"
            )
            raise ConfigurationError(msg)

    @property
    def is_limited(self) -> bool:
        """Whether it has a limit of its own in each worker."""
        return self.max_concurrency is not None or self.rate is not None

    @property
    def spacing(self) -> float:
        """Seconds between the beginnings of two jobs, by `rate`; 0 without."""
        found = None if self.rate is None else _RATE.fullmatch(self.rate)
        return 0.0 if found is None else _PERIODS[found[2]] / int(found[1])

    @property
    def max_attempts(self) -> int:
        """The most attempts, including the first one."""
        return 1 if self.retry is None or self.at_most_once else self.retry.max_attempts

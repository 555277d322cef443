"""A client whose own clock ends calls too late: what a worker or the broker says of a call comes first."""

from __future__ import annotations

from typing import Any

from rpcq import Client


def let_others_speak_first(client: Client, by: float = 20.0) -> None:
    """Have an open client wait `by` seconds longer than a call's timeout before it ends the call by itself.

    The deadline that the worker and the broker get stays as it is. If nothing comes from them, the call ends all the
    same, as one that may have run.
    """
    timeouts: Any = client._invoker._timeouts
    set_ = timeouts.set

    def set_later(timed: Any, at: float, now: float) -> None:
        set_(timed, at + by, now)

    timeouts.set = set_later

"""Proxies that are made before their client: its namespace and its timeout are put into their calls later.

A module makes its proxies when it is imported, often before a test or a settings file has set `RPCQ_NAMESPACE` and
`RPCQ_TIMEOUT`. So the proxies of `rpcq.web` and `rpcq.sync` are made without the environment.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from rpcq.calls.targets import Target, make_target
from rpcq.options import CallOptions
from rpcq.wire.topology import Topology


class _NotRead(float):
    """The timeout of calls that have no timeout of their own, until the client's is known."""

    __slots__ = ()


TOPOLOGY: Final = Topology()
"""The topology of proxies until the client's is known."""

OPTIONS: Final = CallOptions(timeout=_NotRead(CallOptions().timeout))
"""The options of calls that have no options of their own, until the client's timeout is known."""


class Late:
    """Puts a client's namespace and timeout into the calls of proxies that are older than the client.

    Args:
        topology: the client's.
        timeout: seconds that the client's calls have, unless they have a timeout of their own.

    """

    _REMEMBERED = 1024  # pairs of a target and options; then it begins anew, for programs that make some for each call

    def __init__(self, topology: Topology, timeout: float) -> None:
        self._topology = topology
        self._timeout = timeout
        # By identity, which costs less than a hash. What the identities belong to is kept alive with them.
        self._found: dict[tuple[int, int], tuple[Target, CallOptions, Target, CallOptions]] = {}

    def resolve(self, target: Target, options: CallOptions) -> tuple[Target, CallOptions]:
        """The target and the options of a call that is made now."""
        key = id(target), id(options)
        found = self._found.get(key)
        if found is None:
            found = target, options, self._target(target), self.options(options)
            if len(self._found) >= self._REMEMBERED:
                self._found.clear()
            self._found[key] = found
        return found[2], found[3]

    def _target(self, target: Target) -> Target:
        to, method = target.routing_key.decode(), target.method.decode()
        if target.is_ours:
            return make_target(self._topology, to, method, None)
        return make_target(self._topology, None, method, to)

    def options(self, options: CallOptions) -> CallOptions:
        """The options of a call, or of a job, that is made now."""
        return replace(options, timeout=self._timeout) if type(options.timeout) is _NotRead else options

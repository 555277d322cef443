"""A client for programs that block: scripts, threads, Django views, notebooks. It is `rpcq.Client` without `await`.

    from rpcq.sync import Client

    with Client() as client:
        print(client.call("calculator.add", x=1, y=2))

Calls have the same options, the same outcomes and the same errors. All threads of a process may share one client.
"""

from rpcq.calls.waiting import CallMaker, RemoteMethod, ServiceProxy, WatchingCallMaker
from rpcq.contracts import blocking_contract as contract
from rpcq.sync.client import Client, disconnect_all
from rpcq.watching import BlockingJob as WatchedJob

__all__ = [
    "CallMaker",
    "Client",
    "RemoteMethod",
    "ServiceProxy",
    "WatchedJob",
    "WatchingCallMaker",
    "contract",
    "disconnect_all",
]

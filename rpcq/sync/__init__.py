"""A client for programs that block: scripts, threads, Django views, notebooks. It is `rpcq.Client` without `await`.

    from rpcq.sync import Client

    with Client() as client:
        print(client.call("calculator.add", x=1, y=2))

Calls have the same options, the same outcomes and the same errors. All threads of a process may share one client.
"""

from rpcq.calls.waiting import CallMaker, RemoteMethod, ServiceProxy
from rpcq.contracts import blocking_contract as contract
from rpcq.sync.client import Client, disconnect_all

__all__ = ["CallMaker", "Client", "RemoteMethod", "ServiceProxy", "contract", "disconnect_all"]

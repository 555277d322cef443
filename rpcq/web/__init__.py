"""Calls from web apps: a client for an app's lifetime, errors as HTTP, and users who leave.

All of it is plain ASGI and imports no framework: it works in FastAPI, Starlette, Quart and whatever else speaks that.
"""

from rpcq.web.disconnect import CancelOnDisconnect
from rpcq.web.lifespan import Rpc
from rpcq.web.problems import Problem, on_call_error, problem

__all__ = ["CancelOnDisconnect", "Problem", "Rpc", "on_call_error", "problem"]

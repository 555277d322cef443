"""Calls from web apps: a client for an app's lifetime, errors as HTTP, and cancellation when a user disconnects.

A job that the app watches becomes server-sent events.

All of it is plain ASGI and imports no framework: it works with FastAPI, Starlette, Quart and other ASGI frameworks.
"""

from rpcq.web.disconnect import CancelOnDisconnect
from rpcq.web.events import progress
from rpcq.web.lifespan import Rpc
from rpcq.web.problems import ErrorHandler, Problem, on_call_error, problem

__all__ = ["CancelOnDisconnect", "ErrorHandler", "Problem", "Rpc", "on_call_error", "problem", "progress"]

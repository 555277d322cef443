"""Services, their methods, jobs and subscriptions: their names, their callers, their parameters and results. Pure.

A service is a named set of methods behind one request queue. Parameters and results are validated with pydantic from
the handlers' annotations; without an annotation, a value is what JSON gives.
"""

from rpcq.service.definition import EVERY_METHOD, Service
from rpcq.service.methods import Authorize, Context, Method, Offered, Report, Subscriber, jobs_of

__all__ = ["EVERY_METHOD", "Authorize", "Context", "Method", "Offered", "Report", "Service", "Subscriber", "jobs_of"]

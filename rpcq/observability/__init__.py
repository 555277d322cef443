"""Observability of clients and workers: metrics, traces, logs of calls, the depth of queues, health.

Import each module by its name, since some need extra packages: `rpcq.observability.metrics` (extra `metrics`),
`rpcq.observability.tracing` (extra `tracing`), `rpcq.observability.calls`, `rpcq.observability.queues`,
`rpcq.observability.health` (extra `metrics`).
"""

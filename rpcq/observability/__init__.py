"""What there is to see of clients and workers: metrics, traces, logs of calls, the depth of queues, health.

Each module needs its own packages, and is imported by itself: `rpcq.observability.metrics` (extra `metrics`),
`rpcq.observability.tracing` (extra `tracing`), `rpcq.observability.calls`, `rpcq.observability.queues`,
`rpcq.observability.health` (extra `metrics`).
"""

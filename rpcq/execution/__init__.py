"""Runs handlers, in tasks and in threads: each for one call or job, or, in batches, for several calls."""

from rpcq.execution.running import Around, Enter, Executor, Run

__all__ = ["Around", "Enter", "Executor", "Run"]

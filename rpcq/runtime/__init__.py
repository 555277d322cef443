"""Helpers for all parts: deadlines, timeouts, pauses, backlogs, threads, processes, a watchdog of the event loop."""

"""What every part stands on: deadlines, timeouts, threads, the process, the watchdog of the event loop."""

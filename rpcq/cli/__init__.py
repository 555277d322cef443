"""The command line. The only place that reads arguments and signals."""

from rpcq.cli.app import app, main

__all__ = ["app", "main"]

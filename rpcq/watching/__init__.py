"""The sender's side of watched jobs: what is known of each, from what its workers tell."""

from rpcq.watching.blocking import BlockingJob
from rpcq.watching.jobs import Read, WatchedJob
from rpcq.watching.watches import Watch, Watches

__all__ = ["BlockingJob", "Read", "Watch", "WatchedJob", "Watches"]

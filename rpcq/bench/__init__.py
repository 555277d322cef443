"""The load generator behind `rpcq bench`, and its report; needs the extra `bench`.

A program that measures its own calls makes a `Plan` and runs it with a `Generator`.
"""

from rpcq.bench.generator import Generator
from rpcq.bench.plan import Phase, Plan
from rpcq.bench.recording import Measured, Tally

__all__ = ["Generator", "Measured", "Phase", "Plan", "Tally"]

"""The heavy computation: a Monte Carlo simulation of a supply chain's emissions, some 0.1 s of a CPU.

It is deterministic: the same product and the same edition of the emission factors give the same result, in any process.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from examples.scores.products import Product

RUNS = 12_000
GRADES = ((0.15, "A"), (0.4, "B"), (1.0, "C"), (2.5, "D"), (math.inf, "E"))
"""kg CO2e for each euro, up to which a product has that grade."""


@dataclass(frozen=True)
class Footprint:
    """What a product emits, in kg CO2e: the mean, and the bounds of 90 of 100 runs; and its grade, A to E."""

    kg: float
    low: float
    high: float
    grade: str


def simulate(product: Product, edition: int, runs: int = RUNS) -> Footprint:
    """Simulate the supply chain of a product with an edition of the emission factors."""
    steps = [(math.log(step.kg * _factor(step.name, edition)), step.spread) for step in product.steps]
    draw = random.Random(f"{product.id}/{edition}").lognormvariate  # noqa: S311 - a simulation
    totals = sorted(sum(draw(middle, spread) for middle, spread in steps) for _ in range(runs))
    kg = math.fsum(totals) / runs
    grade = next(grade for bound, grade in GRADES if kg / product.euros <= bound)
    return Footprint(kg, totals[runs // 20], totals[-1 - runs // 20], grade)


def _factor(step: str, edition: int) -> float:
    """What an edition of the factors changes in a step: up to 15 %."""
    return random.Random(f"{step}/{edition}").uniform(0.85, 1.15)  # noqa: S311 - made up

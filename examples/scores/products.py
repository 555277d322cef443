"""The products, and the steps of their supply chains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GOODS = {  # name: (euros, kg of material, kg CO2e for each of them, kWh to make it, kWh to use it)
    "Bicycle": (900, 14, 9.5, 60, 0),
    "Cheese, 1 kg": (14, 1, 9.0, 2, 0.5),
    "Chocolate, 100 g": (2, 0.1, 14.0, 0.2, 0),
    "Coffee, 500 g": (8, 0.5, 12.0, 1, 4),
    "Cotton shirt": (25, 0.25, 11.0, 6, 20),
    "Jeans": (70, 0.8, 11.0, 14, 25),
    "Laptop": (1100, 1.8, 60.0, 180, 160),
    "Lentils, 1 kg": (4, 1, 0.9, 0.3, 0.8),
    "Office chair": (240, 16, 4.5, 40, 0),
    "Phone": (600, 0.2, 190.0, 60, 20),
    "Running shoes": (110, 0.9, 8.0, 7, 0),
    "Tomatoes, 1 kg": (3, 1, 0.6, 0.4, 0.1),
}

ORIGINS = {  # name: (km by road, km by sea, kg CO2e for each kWh)
    "Brazil": (900, 10_200, 0.10),
    "China": (600, 19_500, 0.58),
    "Germany": (400, 0, 0.35),
    "India": (800, 12_400, 0.71),
    "Italy": (1100, 0, 0.29),
    "Kenya": (500, 11_300, 0.07),
    "Peru": (700, 11_900, 0.24),
    "Poland": (700, 0, 0.66),
    "Portugal": (2200, 0, 0.15),
    "Vietnam": (500, 17_800, 0.47),
}

ROAD, SEA = 0.0001, 0.000012  # kg CO2e for each kg and km


@dataclass(frozen=True)
class Step:
    """A step of a supply chain: the median of its emissions in kg CO2e, and the standard deviation of their log."""

    name: str
    kg: float
    spread: float


@dataclass(frozen=True)
class Product:
    """A product."""

    id: str
    name: str
    euros: float
    steps: tuple[Step, ...]


def _product(good: str, origin: str) -> Product:
    euros, material, factor, making, using = GOODS[good]
    road, sea, grid = ORIGINS[origin]
    steps = (
        Step("material", material * factor, 0.35),
        Step("packaging", material * 0.12, 0.5),
        Step("making", making * grid, 0.25),
        Step("road", material * road * ROAD, 0.3),
        Step("sea", material * sea * SEA, 0.4),
        Step("shop", material * 0.08, 0.5),
        Step("use", using * 0.35, 0.6),
        Step("end of life", material * 0.3, 0.7),
    )
    name = f"{good}, from {origin}"
    short = "-".join(good.partition(",")[0].lower().split())
    return Product(f"{short}-{origin.lower()}", name, euros, tuple(step for step in steps if step.kg))


PRODUCTS: Mapping[str, Product] = {
    product.id: product for product in (_product(good, origin) for good in GOODS for origin in ORIGINS)
}
"""All products, by their ID."""

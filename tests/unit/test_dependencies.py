"""What the project needs, and from which version on."""

from __future__ import annotations

import pytest

from support.lowest import PROJECT, lowest


def test_every_dependency_has_one_lower_bound() -> None:
    found = lowest(PROJECT.read_text())
    assert len(found) > 30
    assert "orjson==3.11.6" in found


@pytest.mark.parametrize(
    ("wanted", "why"), [('"a"', "'a' has no"), ('"a>=1", "a[x]>=2"', "a has the lower bounds 1 and 2")]
)
def test_a_dependency_without_a_lower_bound_or_with_two_is_named(wanted: str, why: str) -> None:
    text = f"[project]\ndependencies = [{wanted}]\noptional-dependencies.b = []"
    with pytest.raises(ValueError, match=why):
        lowest(text)

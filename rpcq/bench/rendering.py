"""Renders the templates of the report's page with Jinja2. Every value is escaped, except for `Markup`."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rpcq.bench.outputs import number_text, share_text, time_text


def render(template: str, **values: Any) -> Markup:
    """The text of a template of `rpcq/bench/templates` with these values."""
    return Markup(_environment().get_template(template).render(values))  # noqa: S704 - escaped by autoescape


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("rpcq.bench"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(number=number_text, time=time_text, share=share_text, px=lambda it: f"{it:.1f}")
    return environment

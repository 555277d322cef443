"""Databases of the tests' own: the modules of the services read the environment when they are imported."""

from __future__ import annotations

import tempfile

import pytest

_folder = tempfile.TemporaryDirectory(prefix="shop-tests-")
with pytest.MonkeyPatch.context() as _patch:
    _patch.setenv("SHOP_DATABASE", f"sqlite+aiosqlite:///{_folder.name}/{{service}}.sqlite")
    from examples.shop import app  # noqa: F401 - it imports all of them

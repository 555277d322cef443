"""Databases of the tests' own: the modules of the services read the environment when they are imported."""

from __future__ import annotations

import tempfile

import pytest

_folder = tempfile.TemporaryDirectory(prefix="news-tests-")
with pytest.MonkeyPatch.context() as _patch:
    _patch.setenv("NEWS_FOLDER", _folder.name)
    from examples.news import app  # noqa: F401 - it imports all of them

"""Tracebacks for users: the frames of their own code, without those of the command line and of libraries."""

from __future__ import annotations

import logging
import os
import sysconfig
import traceback
from collections.abc import Iterator
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Final

import rpcq

_RPCQ: Final = str(Path(rpcq.__file__).parent) + os.sep
_PATHS: Final = sysconfig.get_paths()
_SITES: Final = (_PATHS["purelib"], _PATHS["platlib"], "/site-packages/", "/dist-packages/")
_STARTERS: Final = ("/typer/", "/click/", "/uvloop/", "uvloop/")
"""Libraries between the start of the command and the user's code."""

_HIDDEN: Final = "(calls inside libraries are not shown: {}; --log-level debug shows them)"


def users_traceback(error: BaseException) -> str:
    """The traceback of an error with the user's own frames.

    If there are none, it has the frames of the libraries that rpcq called, or else those of rpcq. With the log level
    DEBUG, it has all frames.
    """
    found = traceback.TracebackException.from_exception(error)
    if not logging.getLogger().isEnabledFor(logging.DEBUG):
        for each in _chain(found):
            _shorten(each)
    return "".join(found.format())


def users_place(error: BaseException) -> str:
    """The last line of the user's own code that an error of a command passed: "file:line", or an empty text."""
    inside = dropwhile(lambda it: not it.filename.startswith(_RPCQ), traceback.extract_tb(error.__traceback__))
    own = [it for it in inside if _is_own(it)]
    if not own:
        return ""
    path = Path(own[-1].filename)
    name = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return f"{name}:{own[-1].lineno}"


def _chain(found: traceback.TracebackException) -> Iterator[traceback.TracebackException]:
    """An error, its causes, and the errors of its group."""
    yield found
    for each in (found.__cause__, found.__context__, *(found.exceptions or ())):
        if each is not None:
            yield from _chain(each)


def _shorten(found: traceback.TracebackException) -> None:
    frames = list(found.stack)
    if own := [it for it in frames if _is_own(it)]:
        found.stack[:] = own
        below = [it for it in takewhile(lambda it: not _is_own(it), reversed(frames)) if not _is_start(it)]
        if below:
            found.__notes__ = [*(found.__notes__ or ()), _HIDDEN.format(len(below))]
    elif hasattr(found, "lineno"):
        found.stack.clear()  # a SyntaxError, which itself names the file and the line
    else:
        called = list(dropwhile(_is_machinery, frames))
        found.stack[:] = called or list(dropwhile(_is_start, frames)) or frames


def _is_own(frame: traceback.FrameSummary) -> bool:
    return not _is_machinery(frame) and not any(it in frame.filename for it in _SITES)


def _is_machinery(frame: traceback.FrameSummary) -> bool:
    return frame.filename.startswith(_RPCQ) or _is_start(frame)


def _is_start(frame: traceback.FrameSummary) -> bool:
    name = frame.filename
    if any(it in name for it in _SITES):
        return any(it in name for it in _STARTERS)
    return name.startswith(("<", "uvloop/", _PATHS["stdlib"], _PATHS["platstdlib"], _PATHS["scripts"]))

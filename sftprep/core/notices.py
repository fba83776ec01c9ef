"""Notices: logged warnings with settings in the form of the front end."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from sftprep.errors import PythonNames, SettingNames, SftprepError, escape_control

_log = logging.getLogger(__name__)
_PYTHON = PythonNames()
_front_end: ContextVar[SettingNames] = ContextVar("front_end", default=_PYTHON)


@dataclass(frozen=True, slots=True)
class Notice:
    """A warning about an input, with its remedy.

    Attributes:
        text: The description; it may contain references to settings.
        remedy: What can be done, likewise.
        example: An example from the input, shown after the text. Notices of several inputs that
            differ only in the example are equal.
    """

    text: str
    remedy: str = ""
    example: str = field(default="", compare=False)

    def log(self, prefix: str = "") -> None:
        """Log the notice as a warning, after a prefix such as the name of the input."""
        text = f"{self.text}: {self.example}" if self.example else self.text
        shown = SftprepError(f"{prefix}{text}", remedy=self.remedy)
        _log.warning("warning: %s", escape_control(str(shown.shown_by(_front_end.get()))))


@contextmanager
def settings_shown_as(names: SettingNames) -> Iterator[None]:
    """Render the settings in notices in the form of a front end."""
    token = _front_end.set(names)
    try:
        yield
    finally:
        _front_end.reset(token)

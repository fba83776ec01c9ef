"""Notices: logged warnings with settings in the form of the front end."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from sftprep.errors import PythonNames, SftprepError, escape_control, front_end

_log = logging.getLogger(__name__)


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
        _log.warning(
            "warning: %s", escape_control(str(shown.shown_by(front_end.get(PythonNames()))))
        )

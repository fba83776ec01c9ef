"""Typed errors: one type per kind of mistake, each with a message and a remedy.

The hierarchy has one root, `SftprepError`, whose `exit_code` is what the commands return: 1 a check
failed, 2 usage error or invalid input, 3 the environment (disk, permission, lock).

An error names a setting by a reference, not by its spelling, because a setting is `max_length=4096`
in Python and `--max-length 4096` on the command line:

    ConfigError(f"{setting('packing')} is unknown", remedy=f"use {setting('packing', 'bfd')}")

Each front end then renders the references in its own form, see `SettingNames`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

__all__ = [
    "AttentionError",
    "ConfigError",
    "EmptyInput",
    "FlagNames",
    "FormatError",
    "HubError",
    "InputChanged",
    "InputNotFound",
    "InputUnreadable",
    "ManifestError",
    "MismatchError",
    "MissingDependency",
    "OutputBusy",
    "OutputExists",
    "PythonNames",
    "RecordError",
    "SettingNames",
    "SftprepError",
    "ShardError",
    "SourceError",
    "StorageError",
    "TemplateError",
    "TokenizerError",
    "TooManyRejected",
    "TrainingDiverged",
    "WorkerError",
    "setting",
    "source_name",
]

# A reference is enclosed in control characters, which no message contains otherwise: file names and
# excerpts are escaped before they are shown.
_OPEN, _SEPARATOR, _CLOSE = "\x02", "\x1f", "\x03"
_REFERENCE = re.compile(f"{_OPEN}([^{_CLOSE}]*){_CLOSE}")
_SOURCE = "source"


def setting(name: str, value: object = None) -> str:
    """Return a reference to a setting, for the text of an error.

    Args:
        name: The name of the field in the configuration, such as `max_length`.
        value: The value to show with it; True for a switch that is to be switched on.
    """
    return f"{_OPEN}{name}" + ("" if value is None else f"{_SEPARATOR}{value}") + _CLOSE


def source_name(path: object) -> str:
    """Return a reference to an input, for the text of an error: a trainer shows the name of its
    dataset where the file was written by the trainer itself."""
    return setting(_SOURCE, path)


class SettingNames(Protocol):
    """How a front end shows settings and inputs."""

    def setting(self, name: str, value: str | None) -> str | None:
        """Return the text for a setting, or None where the front end does not have it."""

    def source(self, path: str) -> str:
        """Return the text for an input."""


@dataclass(frozen=True)
class PythonNames:
    """Settings as keyword arguments: `max_length=4096`."""

    def setting(self, name: str, value: str | None) -> str | None:
        """Return `name`, or `name=value`."""
        if value is None:
            return name
        literal = value in ("True", "False", "None") or re.fullmatch(r"-?[\d.]+", value)
        return f"{name}={value}" if literal else f'{name}="{value}"'

    def source(self, path: str) -> str:
        """Return the path."""
        return path


@dataclass(frozen=True)
class FlagNames:
    """Settings as flags of a command: `--max-length 4096`.

    Args:
        separator: What separates the words of a flag: "-" in `sftprep`, "_" in `sfttrain`.
    """

    separator: str = "-"

    def setting(self, name: str, value: str | None) -> str | None:
        """Return `--name`, or `--name value`."""
        flag = "--" + name.replace("_", self.separator)
        return flag if value in (None, "True") else f"{flag} {value}"

    def source(self, path: str) -> str:
        """Return the path."""
        return path


class SftprepError(Exception):
    """Root of all errors of this project.

    Args:
        message: What is wrong.
        remedy: What to do next; or several alternatives, of which a front end shows those whose
            settings it has.

    Attributes:
        message: The message, as the front end in `names` shows it.
        remedy: The remedy, likewise.
        setting: The name of the first setting in the message, or "".
        names: The front end; Python, unless `shown_by` chose another one.

    `str(error)` is the message, followed by the remedy on a line of its own.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, *, remedy: str | Sequence[str] = "") -> None:
        super().__init__(message)
        self.names: SettingNames = PythonNames()
        self._message = message
        self._remedies = (remedy,) if isinstance(remedy, str) else tuple(remedy)

    @property
    def message(self) -> str:
        return _rendered(self._message, self.names)

    @property
    def remedy(self) -> str:
        usable = [text for text in self._remedies if _has_settings(text, self.names)]
        return ", or ".join(_rendered(text, self.names) for text in usable or self._remedies)

    @property
    def setting(self) -> str:
        return next((name for name, _ in _settings_in(self._message)), "")

    def shown_by(self, names: SettingNames) -> Self:
        """Return a copy of the error that shows its settings as this front end does."""
        shown = copy.copy(self)
        shown.names = names
        return shown

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.remedy}" if self.remedy else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # An exception with keyword arguments cannot be unpickled by default, and errors are sent
        # from worker processes.
        return (_rebuild, (type(self), dict(self.__dict__), self.args))


def _rebuild(
    kind: type[SftprepError], state: dict[str, object], args: tuple[object, ...]
) -> SftprepError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


def _rendered(text: str, names: SettingNames) -> str:
    def render(match: re.Match[str]) -> str:
        name, *rest = match[1].split(_SEPARATOR)
        value = rest[0] if rest else None
        if name == _SOURCE and value is not None:
            return names.source(value)
        # A front end without the setting shows the name that the configuration has.
        return names.setting(name, value) or str(PythonNames().setting(name, value))

    return _REFERENCE.sub(render, text)


def _has_settings(text: str, names: SettingNames) -> bool:
    return all(names.setting(name, value) is not None for name, value in _settings_in(text))


def _settings_in(text: str) -> Iterator[tuple[str, str | None]]:
    for match in _REFERENCE.finditer(text):
        name, *rest = match[1].split(_SEPARATOR)
        if name != _SOURCE:
            yield name, rest[0] if rest else None


class ConfigError(SftprepError):
    """A setting that cannot be, alone or together with another."""


class InputNotFound(SftprepError):
    """A path, glob or directory that names nothing."""


class EmptyInput(SftprepError):
    """Inputs that hold no record, or no record that can be trained on; a lane of a stream that
    holds too few of these."""


class InputUnreadable(SftprepError):
    """A file that is damaged or not what its name says: a gzip cut short, UTF-16, a folder without
    permission."""


class InputChanged(SftprepError):
    """An input file that changed while it was being read."""

    exit_code = 1


class SourceError(SftprepError):
    """A source of a stream that raises again and again while it is read; what it raised is the
    cause."""

    exit_code = 3


class HubError(SftprepError):
    """The Hugging Face Hub cannot be reached, or does not give what was asked of it."""

    exit_code = 3


class FormatError(SftprepError):
    """No format fits the records of a source, or the one asked for does not."""


class RecordError(SftprepError):
    """A record that cannot be used.

    Args:
        file: Where the record is.
        line: The line or row, 1-based.
        column: The column, 1-based; 0 if it is not known.
        reason: A short stable name such as `bad_json`.
        message: What is wrong with the record.
        excerpt: The start of the record, escaped for a terminal.
    """

    def __init__(
        self, *, file: str, line: int, column: int, reason: str, message: str, excerpt: str
    ) -> None:
        position = f"{source_name(file)}:{line}" + (f":{column}" if column else "")
        remedies = ["correct the record"]
        if reason == "template_error":
            remedies.append(f"specify another template with {setting('chat_template')}")
        quarantine = setting("on_bad_record", "quarantine")
        remedies.append(f"quarantine such records with {quarantine}")
        super().__init__(f"{position}: {message} [{reason}]\n  {excerpt}", remedy=remedies)
        self.file, self.line, self.column = file, line, column
        self.reason, self.excerpt = reason, excerpt


class TooManyRejected(SftprepError):
    """More records were rejected than `max_rejected` allows."""

    exit_code = 1


class TokenizerError(SftprepError):
    """A tokenizer that cannot be found, loaded or used for this data."""


class TemplateError(SftprepError):
    """A chat template that is missing, does not compile, or cannot give what was asked of it."""


class OutputExists(SftprepError):
    """The output folder holds something that this build would replace."""


class OutputBusy(SftprepError):
    """Another build is writing to the same output folder."""

    exit_code = 3


class StorageError(SftprepError):
    """The disk is full, or a file cannot be written."""

    exit_code = 3


class WorkerError(SftprepError):
    """Worker processes died again and again on the same piece of input."""

    exit_code = 3


class ManifestError(SftprepError):
    """A folder that is no finished build, or one written by a newer version."""


class ShardError(SftprepError):
    """A shard that is missing, cut short or damaged."""

    exit_code = 1


class MismatchError(SftprepError):
    """Shards and model do not belong together: another tokenizer, or ids beyond the embedding."""


class AttentionError(SftprepError):
    """An attention implementation that is not there, or that would let packed sequences see each
    other."""


class TrainingDiverged(SftprepError):
    """The loss is not a number any more."""

    exit_code = 1


class MissingDependency(SftprepError):
    """An optional package that this feature needs."""

    def __init__(self, package: str, *, extra: str, needed_for: str) -> None:
        super().__init__(
            f"{needed_for} needs the package {package}", remedy=f'pip install "sftprep[{extra}]"'
        )
        self.package, self.extra = package, extra

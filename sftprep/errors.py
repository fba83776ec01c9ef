"""Typed errors: one type per kind of mistake, each with a message and a remedy.

    SftprepError
    ├── exit code 2, usage error or invalid input:
    │   ConfigError, InputNotFound, EmptyInput, InputUnreadable, FormatError, RecordError,
    │   TokenizerError, TemplateError, OutputExists, ManifestError, MismatchError, AttentionError,
    │   MissingDependency
    ├── exit code 1, a check failed:
    │   InputChanged, TooManyRejected, ShardError, TrainingDiverged
    └── exit code 3, the environment (disk, permission, lock, network):
        SourceError, HubError, OutputBusy, StorageError, WorkerError

An error names a setting by a reference, not by its spelling, because a setting is `max_length=4096`
in Python and `--max-length 4096` on the command line:

    ConfigError(f"{setting('packing')} is unknown", remedy=f"use {setting('packing', 'bfd')}")

Each front end renders the references in its own form; see `SettingNames`. A remedy can be a list of
alternatives, from which a front end drops those that use a setting that it does not have.
"""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

from sftprep.message_text import escape_control, first_line, format_count

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
    "escape_control",
    "first_line",
    "format_count",
    "front_end",
    "has_settings",
    "render_settings",
    "setting",
    "settings_shown_as",
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
        value: The value to show with the name; None for the name alone, True for a switch.
    """
    return f"{_OPEN}{name}" + ("" if value is None else f"{_SEPARATOR}{value}") + _CLOSE


def source_name(path: object) -> str:
    """Return a reference to an input, for the text of an error.

    A trainer that wrote the records of a dataset to a temporary file shows the name of the dataset
    instead of the path, which would mean nothing to the user.
    """
    return setting(_SOURCE, path)


class SettingNames(Protocol):
    """The form of settings and inputs in a front end."""

    def setting(self, name: str, value: str | None) -> str | None:
        """Return the text for a setting, or None if the front end does not have it."""

    def source(self, path: str) -> str:
        """Return the text for an input."""


@dataclass(frozen=True)
class PythonNames:
    """The form of settings as keyword arguments: `max_length=4096`."""

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
    """The form of settings as flags of a command: `--max-length 4096`.

    Args:
        separator: The character between the words of a flag: "-" in `sftprep`, "_" in `sfttrain`.
    """

    separator: str = "-"

    def setting(self, name: str, value: str | None) -> str | None:
        """Return `--name`, or `--name value`."""
        flag = "--" + name.replace("_", self.separator)
        return flag if value is None or value == "True" else f"{flag} {shlex.quote(value)}"

    def source(self, path: str) -> str:
        """Return the path."""
        return path


front_end: ContextVar[SettingNames] = ContextVar("front_end")
"""The form of settings and inputs in logged notices; that of Python if it is not set."""


@contextmanager
def settings_shown_as(names: SettingNames) -> Iterator[None]:
    """Show settings and inputs in logged notices in the form of a front end."""
    token = front_end.set(names)
    try:
        yield
    finally:
        front_end.reset(token)


class SftprepError(Exception):
    """Root of all errors of this project.

    `str(error)` is the message, followed by the remedy on a line of its own.

    Args:
        message: The description of the mistake; it may contain references.
        remedy: The next step for the user; or a list of alternatives, of which a front end shows
            those whose settings it has, or all if it has none of them.

    Attributes:
        message: The message in the form of the front end `names`.
        remedy: The remedy in the form of the front end `names`.
        setting: The name of the first setting in the message, or "".
        names: The front end that renders the references: Python, unless `shown_by` chose another.
        text, remedies: The arguments, with their references.

    Example:
        error = ConfigError("too short", remedy=f"raise {setting('max_length')}")
        str(error)                        ->  "too short\n  → raise max_length"
        str(error.shown_by(FlagNames()))  ->  "too short\n  → raise --max-length"
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, *, remedy: str | Sequence[str] = "") -> None:
        self.names: SettingNames = PythonNames()
        # `args` is what `repr` shows.
        super().__init__(render_settings(message, self.names))
        self.text = message
        self.remedies = (remedy,) if isinstance(remedy, str) else tuple(remedy)

    @property
    def message(self) -> str:
        return render_settings(self.text, self.names)

    @property
    def remedy(self) -> str:
        usable = [text for text in self.remedies if has_settings(text, self.names)]
        return ", or ".join(render_settings(text, self.names) for text in usable or self.remedies)

    @property
    def setting(self) -> str:
        return next((name for name, _ in _settings_in(self.text)), "")

    def shown_by(self, names: SettingNames) -> Self:
        """Return a copy of the error with references in the form of a front end."""
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


def render_settings(text: str, names: SettingNames) -> str:
    """Return a text with references to settings in the form of a front end."""

    def render(match: re.Match[str]) -> str:
        name, *rest = match[1].split(_SEPARATOR)
        value = rest[0] if rest else None
        if name == _SOURCE and value is not None:
            return names.source(value)
        # A front end without the setting shows the name that the configuration has.
        return names.setting(name, value) or str(PythonNames().setting(name, value))

    return _REFERENCE.sub(render, text)


def has_settings(text: str, names: SettingNames) -> bool:
    """Return whether a front end has all settings of a text."""
    return all(names.setting(name, value) is not None for name, value in _settings_in(text))


def _settings_in(text: str) -> Iterator[tuple[str, str | None]]:
    for match in _REFERENCE.finditer(text):
        name, *rest = match[1].split(_SEPARATOR)
        if name != _SOURCE:
            yield name, rest[0] if rest else None


class ConfigError(SftprepError):
    """An invalid setting, or an unsupported combination of settings."""


class InputNotFound(SftprepError):
    """A path, glob or directory without a matching file."""


class EmptyInput(SftprepError):
    """Inputs, or a lane of a stream, with too few trainable records."""


class InputUnreadable(SftprepError):
    """An unreadable input: a truncated file, UTF-16, a missing permission."""


class InputChanged(SftprepError):
    """An input file modified while it was being read."""

    exit_code = 1


class SourceError(SftprepError):
    """A failure of a stream's source at every attempt; `__cause__` is the last error."""

    exit_code = 3


class HubError(SftprepError):
    """An unreachable Hugging Face Hub, or a file missing from it."""

    exit_code = 3


class FormatError(SftprepError):
    """Records in no known format, or not in the configured one."""


class RecordError(SftprepError):
    """An unusable record.

    Args:
        file: The path of the input, or the name of the source.
        line: The line or row, 1-based.
        column: The column, 1-based; 0 if it is not known.
        reason: A short stable name such as `bad_json`.
        message: The description of the problem.
        excerpt: The start of the record, escaped for a terminal.
        correction: What to correct, if it is not the record.
    """

    def __init__(
        self,
        *,
        file: str,
        line: int,
        column: int,
        reason: str,
        message: str,
        excerpt: str,
        correction: str = "",
    ) -> None:
        position = f"{source_name(file)}:{line}" + (f":{column}" if column else "")
        remedies = [correction or "correct the record"]
        if reason == "template_error":
            remedies.append(f"specify another template with {setting('chat_template')}")
        if reason == "images":
            remedies = [f"train on the text alone, try: {setting('images', 'drop')}"]
        else:
            remedies.append(
                f"quarantine such records, try: {setting('on_bad_record', 'quarantine')}"
            )
        super().__init__(f"{position}: {message} [{reason}]\n  {excerpt}", remedy=remedies)
        self.file, self.line, self.column = file, line, column
        self.reason, self.excerpt = reason, excerpt


class TooManyRejected(SftprepError):
    """More rejected records than `max_rejected` allows."""

    exit_code = 1


class TokenizerError(SftprepError):
    """A failure to find or load a tokenizer, or to use it for this data."""


class TemplateError(SftprepError):
    """A chat template that is missing, does not compile, or rejects conversations."""


class OutputExists(SftprepError):
    """An output folder with content to be replaced by this build."""


class OutputBusy(SftprepError):
    """An output folder in use by another build."""

    exit_code = 3


class StorageError(SftprepError):
    """A full disk, or a failure to write a file."""

    exit_code = 3


class WorkerError(SftprepError):
    """Repeated crashes of worker processes on the same partition."""

    exit_code = 3


class ManifestError(SftprepError):
    """A folder without a finished build, or with one of a newer version."""


class ShardError(SftprepError):
    """A missing, truncated or damaged shard."""

    exit_code = 1


class MismatchError(SftprepError):
    """A mismatch of two parts, such as shards and a model's tokenizer."""


class AttentionError(SftprepError):
    """A missing attention implementation, or one without isolation of sequences."""


class TrainingDiverged(SftprepError):
    """A non-finite loss."""

    exit_code = 1


class MissingDependency(SftprepError, ImportError):
    """A package required by a feature, but not installed; by itself, or by an extra of sftprep.

    It is an ImportError too, since modules such as `sftprep.torch` raise it when they are imported.
    """

    def __init__(self, package: str, *, extra: str | None = None, needed_for: str) -> None:
        remedy = f'pip install "sftprep[{extra}]"' if extra else f"pip install {package}"
        super().__init__(f"{needed_for} needs the package {package}", remedy=remedy)
        self.package, self.extra = package, extra

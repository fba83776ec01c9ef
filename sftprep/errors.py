"""Every mistake a user can meet: one typed error a kind, each with what to do next.

The tree has one root, `SftprepError`. Its `exit_code` is what the commands return: 1 a check
failed, 2 usage or bad input, 3 the environment (disk, permission, a lock).
"""

from __future__ import annotations

from typing import ClassVar


class SftprepError(Exception):
    """Root of all errors of this project. `str(error)` is the message, then the remedy on its own
    line."""

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.remedy}" if self.remedy else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword arguments do not survive the way back from a worker process by
        # themselves.
        return (_rebuild, (type(self), dict(self.__dict__), self.args))


def _rebuild(
    kind: type[SftprepError], state: dict[str, object], args: tuple[object, ...]
) -> SftprepError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


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
    """One record that cannot be used.

    file, line (1-based), column (1-based, 0 unknown): where; reason: a short stable name such as
    `bad_json`; excerpt: what stands there, made safe for a terminal.
    """

    def __init__(
        self, *, file: str, line: int, column: int, reason: str, message: str, excerpt: str
    ) -> None:
        place = f"{file}:{line}" + (f":{column}" if column else "")
        other_template = (
            ", give another template with --chat-template" if reason == "template_error" else ""
        )
        super().__init__(
            f"{place}: {message} [{reason}]\n  {excerpt}",
            remedy=(
                f"fix the line{other_template}, or run with --on-bad-record quarantine to set such"
                " lines aside"
            ),
        )
        self.file, self.line, self.column, self.reason, self.excerpt = (
            file,
            line,
            column,
            reason,
            excerpt,
        )


class TooManyRejected(SftprepError):
    """Quarantine set aside more records than --max-rejected allows."""

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

"""Errors of the Hugging Face Hub's library, as errors that name the Hub and a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sftprep.errors import ConfigError, HubError, OutputBusy, SftprepError, first_line

_LOG_IN = "log in with a token that may do this: hf auth login"
_RUN_AGAIN = "run the same command again; what was transferred is not transferred again"
_CONFLICTS = (409, 412)
"""Status codes of a commit whose parent is not the head of the branch any more."""


@contextmanager
def hub_errors(action: str, name: str, *, also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Raise what the Hub's library raises in the `with` block as errors of sftprep.

    FileNotFoundError is an answer of the Hub and is not converted.

    Args:
        action: What is done, such as "read".
        name: What it is done to, such as "the data set org/name".
        also: Further types of exceptions that only the library raises in the block.

    Raises:
        HubError: The Hub cannot be reached, or refuses.
        OutputBusy: Another program has committed to the branch meanwhile.
        ConfigError: The name is not valid on the Hub.
    """
    try:
        yield
    except SftprepError:
        raise
    except Exception as error:
        # The library wraps the error of an upload.
        cause = (error.__cause__ or error) if type(error) is RuntimeError else error
        if isinstance(cause, FileNotFoundError) or not is_hub_error(cause):
            raise
        raise _converted(cause, f"the Hub: cannot {action} {name}") from error


def is_hub_error(error: BaseException | None) -> bool:
    """Return whether an error comes from the Hub, its library or the network."""
    # The HTTP client of the library has changed from requests to httpx, and may change again.
    modules = [kind.__module__ for kind in type(error).__mro__]
    return isinstance(error, (ConnectionError, TimeoutError)) or any(
        module.startswith(("http", "requests", "huggingface_hub", "hf_xet")) for module in modules
    )


def status_of(error: BaseException | None) -> int | None:
    """Return the HTTP status of an error; None if there was no response."""
    return getattr(getattr(error, "response", None), "status_code", None)


def hub_remedy(error: BaseException | None) -> str:
    """Return what to do about an error of the Hub."""
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    status = status_of(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "connect to the network, and unset HF_HUB_OFFLINE"
    if isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
        return _LOG_IN
    if status == 404:
        return f"check the name; if the repository is private, {_LOG_IN}"
    if status == 429:
        return f"wait some minutes, then {_RUN_AGAIN}"
    if status is None or status >= 500:
        return f"check the network and https://status.huggingface.co, then {_RUN_AGAIN}"
    return "look at the repository on the Hub"


def hub_reason(error: BaseException) -> str:
    """Return the reason of an error of the Hub, in one line."""
    status = status_of(error)
    text = getattr(error, "server_message", None) or first_line(error)
    text = " ".join(str(text).split())[:300]
    return text if status is None else f"{text} (HTTP {status})"


def _converted(error: BaseException, message: str) -> SftprepError:
    from huggingface_hub.errors import HFValidationError

    reason = hub_reason(error)
    if isinstance(error, HFValidationError):
        return ConfigError(f"{message}: {reason}", remedy="write org/name")
    if status_of(error) in _CONFLICTS:
        return OutputBusy(
            f"{message}: another program has changed it meanwhile",
            remedy="look at it, then run the same command again",
        )
    return HubError(f"{message}: {reason}", remedy=hub_remedy(error))

"""The command `sftprep push`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from sftprep.cli.app import app
from sftprep.cli.console import ProgressBar, print_json
from sftprep.errors import format_count

if TYPE_CHECKING:
    from sftprep.pipeline.output.hub import PushReport


@app.command
def push(
    directory: str,
    repository: str,
    *,
    revision: str | None = None,
    private: bool = False,
    message: str | None = None,
    overwrite: bool = False,
    json: bool = False,
    debug: bool = False,
) -> int:
    """Upload a finished build to a dataset repository on the Hugging Face Hub.

    Files that the repository has already are not uploaded. The manifest is committed last, so
    readers see the build that was there before or this one. The same command continues a push that
    was interrupted. Log in before: hf auth login.

    Parameters
    ----------
    directory
        The output folder of a build.
    repository
        The repository, as org/name.
    revision
        Branch that is written; it is created if it is missing. Default: main.
    private
        Create a missing repository as a private one.
    message
        Message of the commits.
    overwrite
        Replace another build in the repository.
    json
        Print the result as JSON.
    debug
        Show a traceback with errors.
    """
    from sftprep.pipeline.output.push import push as run

    with ProgressBar(quiet=json) as bar:
        result = run(
            os.path.expanduser(directory),
            repository,
            revision=revision,
            private=private,
            message=message,
            overwrite=overwrite,
            progress=bar,
        )
    if json:
        print_json(asdict(result))
        return 0
    print("\n".join(_summary(result)))
    return 0


def _summary(result: PushReport) -> Iterator[str]:
    if result.files:
        files = format_count(result.files, "file")
        yield f"pushed {files} of {result.bytes:,} bytes: {result.url}"
    else:
        yield f"up to date: {result.url}"
    if result.keeps_readme:
        yield "README.md of the repository was not written by sftprep, and is kept"

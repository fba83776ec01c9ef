"""The files of one input of a build or a stream: local, in a store, or a data set on the Hub."""

from __future__ import annotations

from sftprep.config.validation import TextUnit, is_url
from sftprep.errors import ConfigError
from sftprep.sources.discovery.files import find_files
from sftprep.sources.discovery.hub import FoundFile, hub_files, is_hub_name, reject_revision_of_path
from sftprep.sources.discovery.store_files import store_files


def files_of_input(
    name: str,
    *,
    split: str | None,
    config_name: str | None,
    revision: str | None,
    output: str | None = None,
    other_split: str | None = None,
    text_unit: TextUnit | None = None,
) -> list[FoundFile]:
    """Return the files of an input, in the order in which they are read.

    Args:
        name: What the user wrote: a path, a glob or a folder, also as a URL, or a name on the Hub.
        split: As for `find_files` and `hub_files`.
        config_name: The requested configuration of a data set on the Hub.
        revision: The requested branch, tag or commit on the Hub.
        output: As for `find_files`.
        other_split: As for `find_files`.
        text_unit: As for `find_files`.

    Raises:
        ConfigError: It is -, which stands for stdin.
        SftprepError: The errors of `find_files`, `store_files` and `hub_files`.
    """
    if name == "-":
        raise ConfigError(
            "- is stdin, which the commands build, preview and doctor read as their only input",
            remedy="write the records to a file; ./- is a file of this name",
        )
    if is_hub_name(name):
        return hub_files(name, config_name=config_name, split=split, revision=revision)
    if is_url(name):
        return store_files(name, split, output=output, text_unit=text_unit)
    reject_revision_of_path(name, revision)
    files = find_files((name,), split, output=output, other_split=other_split, text_unit=text_unit)
    return [FoundFile(file, file) for file in files]

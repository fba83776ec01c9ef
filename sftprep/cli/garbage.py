"""The command `sftprep gc`."""

from __future__ import annotations

from datetime import timedelta

from sftprep.cli.app import app
from sftprep.cli.console import print_json
from sftprep.errors import format_count


@app.command
def gc(
    url: str,
    *,
    older_than: timedelta = timedelta(days=7),
    dry_run: bool = False,
    json: bool = False,
    debug: bool = False,
) -> int:
    """Remove what killed builds left in an object store.

    Only files with the names of builds are removed, and never those of the current build.

    Parameters
    ----------
    url
        The output of builds, such as s3://bucket/folder.
    older_than
        Least age of what is removed, such as 7d or 12h. It must be longer than a build takes.
    dry_run
        Show what would be removed, and remove nothing.
    json
        Print the result as JSON.
    debug
        Show a traceback with errors.
    """
    from sftprep.pipeline.output.garbage import collect_garbage

    removed = collect_garbage(url, older_than, dry_run=dry_run)
    size = sum(file.mark.size for file in removed)
    if json:
        names = [file.url for file in removed]
        print_json({"removed": names, "bytes": size, "dry_run": dry_run})
        return 0
    if dry_run:
        print("\n".join(file.url for file in removed))
    verb = "would remove" if dry_run else "removed"
    print(f"{verb} {format_count(len(removed), 'file')} of {size:,} bytes")
    return 0

"""The command `sftprep env`."""

from __future__ import annotations

from sftprep.cli.app import app
from sftprep.cli.console import print_json
from sftprep.errors import escape_control


@app.command
def env(*, tokenizer: str | None = None, json: bool = False, debug: bool = False) -> int:
    """Show versions, the encoder of a tokenizer, caches, cores and memory.

    Attach the output to a report of a problem. `sfttrain env` shows devices and attention too.

    Parameters
    ----------
    tokenizer
        Folder or Hub name of a tokenizer, to see which encoder it gets, and why.
    json
        Print the result as JSON.
    debug
        Show a traceback with errors.
    """
    from sftprep.report.environment import describe_environment

    found = describe_environment(tokenizer)
    if json:
        print_json(found.to_dict())
    else:
        print(escape_control("\n".join(found.to_lines())))
    return 0

"""The command `sftprep completion`, and scripts that complete arguments in a shell."""

from __future__ import annotations

import re
from typing import Literal

from cyclopts import App

from sftprep.cli.app import app

Shell = Literal["bash", "zsh", "fish"]

_COMPLETION_HELP = """\
Print a script for a shell that completes commands, options and their values.

For the present session of bash, and for all later ones:

    source <(sftprep completion bash)
    sftprep completion bash >> ~/.bash_completion

For zsh, in a folder of $fpath, and for fish:

    sftprep completion zsh > ~/.zsh/completions/_sftprep
    sftprep completion fish > ~/.config/fish/completions/sftprep.fish

`sfttrain completion` does the same for the other program. Print the script again after an update.
"""


@app.command(help=_COMPLETION_HELP)
def completion(shell: Shell, *, debug: bool = False) -> int:
    """Print a script that completes arguments (the help is `_COMPLETION_HELP`).

    Parameters
    ----------
    shell
        The shell.
    debug
        Show a traceback with errors.
    """
    print(completion_script(app, shell))
    return 0


def completion_script(program: App, shell: Shell) -> str:
    """Return the script that completes the arguments of a program.

    The script of the library completes choices. Here, other values are completed as names of files.

    Args:
        program: The program, with all of its commands.
        shell: The shell.
    """
    script = program.generate_completion(prog_name=program.name[0], shell=shell)
    if shell == "bash":
        return script.replace("\ncomplete -F", "\ncomplete -o bashdefault -o default -F")
    if shell == "zsh":
        # A specification is OPTION[HELP]:VALUE:ACTION, or NUMBER:HELP:ACTION for an argument.
        script = re.sub(r"(\]:[\w-]+)' \\$", r"\1:_files' \\", script, flags=re.MULTILINE)
        argument = r"^( +'(?:\d+|\*):(?:[^':\\]|\\.)*)' \\$"
        return re.sub(argument, r"\1:_files' \\", script, flags=re.MULTILINE)
    return script

"""A build in a child process, which returns the memory of its workers and tokenizers at its end."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

from sftprep.config.build import BuildConfig
from sftprep.core.subprocesses import module_command, module_environment
from sftprep.errors import SftprepError, WorkerError, setting
from sftprep.pipeline.build import build


def build_in_subprocess(config: BuildConfig) -> None:
    """Run `sftprep.build(config)` in a child process; its output goes to that of this process.

    Raises:
        SftprepError: What the build raises.
        WorkerError: The process ended without an answer.
    """
    with tempfile.TemporaryDirectory(prefix="sftprep-build-") as scratch:
        request, answer = Path(scratch) / "config", Path(scratch) / "error"
        request.write_bytes(pickle.dumps(config))
        command = module_command("sftprep.pipeline.build_subprocess", str(request), str(answer))
        done = subprocess.run(command, env=module_environment(), check=False)
        if answer.exists():
            raise pickle.loads(answer.read_bytes())
        if done.returncode:
            raise WorkerError(
                f"the process that prepares the data ended with exit code {done.returncode}",
                remedy=f"see its own message above; {setting('workers', 1)} shows the error",
            )


def main(request_file: str, answer_file: str) -> int:
    """Build in the child process; an error is written to the answer file."""
    config: BuildConfig = pickle.loads(Path(request_file).read_bytes())
    try:
        build(config)
    except SftprepError as error:
        Path(answer_file).write_bytes(pickle.dumps(error))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))

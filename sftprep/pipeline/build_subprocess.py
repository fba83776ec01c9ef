"""A build in a child process.

The end of the process frees the memory of workers and tokenizers.
"""

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
    """Run `sftprep.build(config)` in a child process.

    The child process writes its output to the standard streams of this process.

    Raises:
        SftprepError: The error that the build raises.
        WorkerError: The process ended without a result.
    """
    with tempfile.TemporaryDirectory(prefix="sftprep-build-") as scratch:
        # Files, because the standard streams of the child belong to the build.
        request, answer = Path(scratch) / "config", Path(scratch) / "error"
        request.write_bytes(pickle.dumps(config))
        command = module_command("sftprep.pipeline.build_subprocess", str(request), str(answer))
        done = subprocess.run(command, env=module_environment(), check=False)
        if answer.exists():
            raise pickle.loads(answer.read_bytes())
        if done.returncode:
            raise WorkerError(
                f"the process that prepares the data ended with exit code {done.returncode}",
                remedy=f"see its messages above; {setting('workers', 1)} shows the error",
            )


def main(request_file: str, answer_file: str) -> int:
    """Run the build in the child process.

    Args:
        request_file: The file with the pickled configuration.
        answer_file: The file to which an error is pickled.

    Returns:
        The exit code.
    """
    config: BuildConfig = pickle.loads(Path(request_file).read_bytes())
    try:
        build(config)
    except SftprepError as error:
        Path(answer_file).write_bytes(pickle.dumps(error))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))

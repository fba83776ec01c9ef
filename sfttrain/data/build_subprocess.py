"""A build inside a training run: here, or with several workers in a process of its own.

What a large build needs, its workers and the tokenizers that they keep, is then given back before
the training starts.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sftprep.core.subprocesses import module_command, module_environment
from sftprep.errors import SftprepError, WorkerError
from sfttrain.words import in_words_of_the_trainer

_LARGE = 128 * 2**20


def run_build(settings: dict[str, Any], *, name: str, rows: str | None = None) -> None:
    """Build with these flat settings. name: what the records are called in errors; rows: the file
    of ours that holds them.

    Raises the errors of `sftprep.build`, in the words of the trainer (see `sfttrain.words`).
    """
    workers = settings["workers"]
    if workers is None:
        workers = 1 if _size(settings["inputs"]) < _LARGE else None
    settings = {**settings, "workers": workers}
    try:
        if workers == 1:
            _build(settings)
        else:
            _build_in_child(settings)
    except SftprepError as error:
        raise in_words_of_the_trainer(error, name, rows) from error


def main(settings_file: str, answer_file: str) -> int:
    """The child: build, and leave the error, if there is one, as the answer."""
    settings = pickle.loads(Path(settings_file).read_bytes())
    try:
        _build(settings)
    except SftprepError as error:
        Path(answer_file).write_bytes(pickle.dumps(error))
        return error.exit_code
    return 0


def _build(settings: dict[str, Any]) -> None:
    import sftprep

    sftprep.build(sftprep.BuildConfig.of(**settings))


def _build_in_child(settings: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory(prefix="sfttrain-build-") as scratch:
        asked, answer = Path(scratch) / "settings", Path(scratch) / "answer"
        asked.write_bytes(pickle.dumps(settings))
        done = subprocess.run(
            module_command("sfttrain.data.build_subprocess", str(asked), str(answer)),
            env=module_environment(),
            check=False,
        )
        if answer.exists():
            raise pickle.loads(answer.read_bytes())
        if done.returncode:
            raise WorkerError(
                f"the process that prepares the data ended with exit code {done.returncode}",
                remedy="see its own message above; with dataset_num_proc=1 it runs in this process",
            )


def _size(inputs: tuple[str, ...]) -> int:
    return sum(os.path.getsize(path) for path in inputs if os.path.isfile(path))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))

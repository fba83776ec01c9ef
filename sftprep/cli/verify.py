"""The command `sftprep verify`."""

from __future__ import annotations

import os
import sys

from sftprep.cli.app import app
from sftprep.cli.console import ProgressBar, print_json
from sftprep.config.validation import ExecutorChoice

_VERIFY_HELP = """\
Check every shard of a build: checksums, schema, invariants and accounting.

All damaged files are reported, in the order of the manifest. The exit code is 0 if the build is
intact, and 1 if it is damaged; 2 if the folder is not a build or its manifest is damaged.

Check a build, or in seconds only the sizes and a few blocks of each shard:

    sftprep verify shards
    sftprep verify shards --quick

Check a large build in an array of 16 jobs, each of which checks a part; it is intact if all of them
end with exit code 0:

    sftprep verify /shared/build --part 3/16

Check it on a Ray cluster, all of whose machines reach the build under the same path:

    sftprep verify /shared/build --executor ray --ray-address auto

The shards of an evaluation build are not checked with those of its training build:

    sftprep verify shards/eval
"""
"""The help of `sftprep verify`, apart from its parameters."""


@app.command(help=_VERIFY_HELP)
def verify(
    directory: str,
    *,
    quick: bool = False,
    part: str | None = None,
    workers: int | None = None,
    executor: ExecutorChoice = "local",
    ray_address: str | None = None,
    json: bool = False,
    debug: bool = False,
) -> int:
    """Check every shard of a build (the help is `_VERIFY_HELP`).

    Parameters
    ----------
    directory
        The output folder of a build, or its URL in an object store.
    quick
        Read only the manifest, the files and indexes of the groups, and of each shard its size, its
        end, and its first, middle and last block of 64 packs.
    part
        I/K: check only the groups I, I + K, ... Part 1 also checks the sums of all groups, files
        that no manifest lists, and the identity of the evaluation build.
    workers
        Processes that check shards. Default: one for each 256 MiB that is read, at most one per
        core.
    executor
        local: processes on this machine; ray: tasks on a Ray cluster.
    ray_address
        Address of the Ray cluster (auto, or host:port). Default: one that is started here.
    json
        Print the result as JSON.
    debug
        Show a traceback with errors.
    """
    from sftprep.pipeline.verify import verify as run
    from sftprep.report.verification import problem_lines, verification_data, verification_lines

    with ProgressBar(quiet=json) as bar:
        result = run(
            os.path.expanduser(directory),
            quick=quick,
            part=part,
            workers=workers,
            executor=executor,
            ray_address=ray_address,
            progress=lambda done, total: bar("verify", done, total),
        )
    if json:
        print_json(verification_data(result))
    else:
        for line in problem_lines(result):
            print(line, file=sys.stderr)
        print("\n".join(verification_lines(result)))
    return 0 if result.ok else 1

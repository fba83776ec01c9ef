"""Launchers of several processes: what their environment variables say, and what does not fit."""

from __future__ import annotations

import os
import sys

from sftprep.errors import ConfigError, WorkerError

LAUNCHERS: tuple[tuple[str, str], ...] = (
    ("WORLD_SIZE", ""),  # torchrun and accelerate; RANK alone may be of anything
    ("SLURM_STEP_NUM_TASKS", ""),  # srun; SLURM_NTASKS and SLURM_PROCID are in batch scripts too
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),  # Open MPI
    ("PMI_SIZE", "PMI_RANK"),  # MPICH, Intel MPI, Cray
    ("PMIX_SIZE", "PMIX_RANK"),  # PMIx, which leaves out the size in most cases
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),  # MVAPICH2
    ("MPI_LOCALNRANKS", "MPI_LOCALRANKID"),  # MPICH and Intel MPI, on one machine
    ("PALS_LOCAL_SIZE", "PALS_RANKID"),  # HPE Cray; its size is that of one machine
    ("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK"),  # IBM jsrun
)
"""Variables that launchers set in each process: of the number of processes, and of the number of
this process, from 0, which shows that there are several where it is more than 0."""


def launched_ranks() -> int:
    """Return how many processes a launcher has started as one run, by what it left in the
    environment.

    Where only the number of this process is known, it is the least number there can be.

    Raises:
        ConfigError: a variable of a launcher is not a number.
    """
    sizes = [_number_in(size) for size, _ in LAUNCHERS]
    ranks = [_number_in(rank) + 1 for _, rank in LAUNCHERS if os.environ.get(rank, "").strip()]
    return max(1, *sizes, *ranks)


def launcher_variables() -> list[str]:
    """Return the variables that say that several processes were launched."""
    return [
        name
        for size, rank in LAUNCHERS
        for name, least in ((size, 2), (rank, 1))
        if _number_in(name) >= least
    ]


RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which torch's processes find each other; torchrun and accelerate set all of them."""


def unmet_launch(output_dir: str) -> ConfigError | None:
    """Return the error for processes that were launched and cannot become one run.

    Args:
        output_dir: the folder that each of them would write to.

    Returns:
        None where no launcher has left a trace, or torch has all that it needs.
    """
    variables = launcher_variables()
    if os.environ.get("LOCAL_RANK", "").strip() not in ("", "-1"):
        variables.append("LOCAL_RANK")
    if not variables or all(os.environ.get(name, "").strip() for name in RENDEZVOUS):
        return None
    return refused_launch(output_dir, variables)


def drop_empty_variables() -> None:
    """Remove the variables of launchers that are set and empty, as if they were not set.

    accelerate and torch would read a number from them.
    """
    names = {name for pair in LAUNCHERS for name in pair if name}
    for name in {*names, *RENDEZVOUS, "LOCAL_RANK", "LOCAL_WORLD_SIZE"}:
        if not os.environ.get(name, "x").strip():
            del os.environ[name]


_COUNTED = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables from which accelerate takes the number of processes."""


def is_group_awaited() -> bool:
    """Whether the process group of this run is still to be made, with other processes."""
    import torch

    if not torch.distributed.is_available() or torch.distributed.is_initialized():
        return False
    return max(_number_in(name) for name in _COUNTED) > 1 and bool(os.environ.get("MASTER_ADDR"))


def report_wait() -> None:
    """Write for whom this process waits, since torch waits in silence.

    torchrun starts all processes of a run or none, so one of them is enough to write it.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and _number_in("RANK") > 0:
        return
    ranks = launched_ranks()
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT') or '29500'}"
    print(
        f"waiting for the other {ranks - 1} of {ranks} processes at {place}",
        file=sys.stderr,
        flush=True,
    )


def missed_launch(seconds: float) -> WorkerError:
    """Return the error for processes that did not find each other in time."""
    ranks = launched_ranks()
    return WorkerError(
        f"the {ranks} processes of this run did not find each other within {seconds:g} s",
        remedy="check that all of them are started, with the same MASTER_ADDR and MASTER_PORT, and"
        " that the network lets them connect; --ddp_timeout is the time to wait. Where this is one"
        f" process, unset {', '.join(launcher_variables())}",
    )


def refused_launch(output_dir: str, variables: list[str]) -> ConfigError:
    """Return the error for processes that would each train by itself."""
    ranks = launched_ranks()
    number = f"{ranks} processes were launched" if ranks > 1 else "several processes were launched"
    return ConfigError(
        f"{number}, and each would train by itself and write to {output_dir}",
        remedy="launch one process, or several with torchrun or accelerate launch; where"
        f" this is one process, unset {', '.join(variables)}",
    )


def _number_in(variable: str) -> int:
    """The number in an environment variable; 0 where it is not set or empty."""
    value = os.environ.get(variable, "").strip()
    try:
        return int(value or 0)
    except ValueError as error:
        raise ConfigError(
            f"the environment variable {variable} is {value!r}, and a launcher sets a number",
            remedy=f"unset {variable}, or start with torchrun or accelerate launch",
        ) from error

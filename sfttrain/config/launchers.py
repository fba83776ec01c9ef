"""Launchers of several processes: environment variables, and impossible launches."""

from __future__ import annotations

import os
import sys

from sftprep.errors import ConfigError, WorkerError, setting

LAUNCHERS: tuple[tuple[str, str], ...] = (
    ("WORLD_SIZE", ""),  # torchrun and accelerate; RANK alone can come from any program
    ("SLURM_STEP_NUM_TASKS", ""),  # srun; SLURM_NTASKS and SLURM_PROCID are in batch scripts too
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),  # Open MPI
    ("PMI_SIZE", "PMI_RANK"),  # MPICH, Intel MPI, Cray
    ("PMIX_SIZE", "PMIX_RANK"),  # PMIx, which omits the size in most cases
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),  # MVAPICH2
    ("MPI_LOCALNRANKS", "MPI_LOCALRANKID"),  # MPICH and Intel MPI, on one machine
    ("PALS_LOCAL_SIZE", "PALS_RANKID"),  # HPE Cray; its size is that of one machine
    ("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK"),  # IBM jsrun
)
"""The environment variables that launchers set in each process: that of the number of processes,
and that of the 0-based rank of this process. A rank above 0 proves that there are several."""


def launched_ranks() -> int:
    """Return the number of processes launched as one run, by the environment.

    If only the rank of this process is known, the result is the smallest number that fits.

    Raises:
        ConfigError: A variable of a launcher is not a number.
    """
    sizes = [_number_in(size) for size, _ in LAUNCHERS]
    ranks = [_number_in(rank) + 1 for _, rank in LAUNCHERS if os.environ.get(rank, "").strip()]
    return max(1, *sizes, *ranks)


def launcher_variables() -> list[str]:
    """Return the environment variables set by a launch of several processes."""
    return [
        name
        for size, rank in LAUNCHERS
        for name, least in ((size, 2), (rank, 1))
        if _number_in(name) >= least
    ]


RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The variables with which torch's processes connect; torchrun and accelerate set all of them."""


def unmet_launch(output_dir: str) -> ConfigError | None:
    """Return the error for launched processes unable to become one run.

    Args:
        output_dir: The folder that each of them would write to.

    Returns:
        None if no launcher set a variable, or if all variables that torch needs are set.

    Raises:
        ConfigError: The rank of this process is not below the number of processes.
    """
    _check_rank()
    variables = launcher_variables()
    if os.environ.get("LOCAL_RANK", "").strip() not in ("", "-1"):
        variables.append("LOCAL_RANK")
    if not variables or all(os.environ.get(name, "").strip() for name in RENDEZVOUS):
        return None
    return refused_launch(output_dir, variables)


def _check_rank() -> None:
    """Refuse an invalid rank or port; torch would wait or fail."""
    if _number_in("MASTER_PORT") not in range(1 << 16):
        raise _invalid_variable("MASTER_PORT")
    for size, rank in (("WORLD_SIZE", "RANK"), ("PMI_SIZE", "PMI_RANK")):
        if _number_in(size) and _number_in(rank) >= _number_in(size):
            raise ConfigError(
                f"{rank} is {_number_in(rank)} and {size} is {_number_in(size)}, but ranks count"
                " from 0",
                remedy=f"start with torchrun or accelerate launch, or unset {rank} and {size}",
            )


def drop_empty_variables() -> None:
    """Remove the empty variables of launchers from the environment.

    accelerate and torch would fail to parse a number in them.
    """
    names = {name for pair in LAUNCHERS for name in pair if name}
    for name in {*names, *RENDEZVOUS, "LOCAL_RANK", "LOCAL_WORLD_SIZE"}:
        if not os.environ.get(name, "x").strip():
            del os.environ[name]


_COUNTED = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""The variables from which accelerate reads the number of processes."""


def is_group_awaited() -> bool:
    """Return whether this run has yet to create a process group with other processes."""
    import torch

    if not torch.distributed.is_available() or torch.distributed.is_initialized():
        return False
    return max(_number_in(name) for name in _COUNTED) > 1 and bool(os.environ.get("MASTER_ADDR"))


def report_wait() -> None:
    """Write the awaited processes to stderr, because torch waits silently.

    torchrun starts all processes of a run or none, so only its rank 0 writes.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and _number_in("RANK") > 0:
        return
    ranks = launched_ranks()
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT') or '29500'}"
    print(
        f"waiting for the other {ranks - 1} of {ranks} processes at {address}",
        file=sys.stderr,
        flush=True,
    )


def missed_launch(seconds: float) -> WorkerError:
    """Return the error for processes not connected in time."""
    ranks = launched_ranks()
    return WorkerError(
        f"the {ranks} processes of this run did not find each other within {seconds:g} s",
        remedy="check that all of them were started, with the same MASTER_ADDR and MASTER_PORT, and"
        f" that the network lets them connect; {setting('ddp_timeout')} is the time to wait. If"
        f" this is a single process, unset {', '.join(launcher_variables())}",
    )


def refused_launch(output_dir: str, variables: list[str]) -> ConfigError:
    """Return the error for processes about to become separate runs."""
    ranks = launched_ranks()
    number = str(ranks) if ranks > 1 else "several"
    return ConfigError(
        f"{number} processes were launched, and each would train by itself and write to"
        f" {output_dir}",
        remedy="launch one process, or several with torchrun or accelerate launch; if this is a"
        f" single process, unset {', '.join(variables)}",
    )


def _number_in(variable: str) -> int:
    """Return the number in an environment variable; 0 if it is unset or empty."""
    value = os.environ.get(variable, "").strip()
    try:
        number = int(value or 0)
    except ValueError as error:
        raise _invalid_variable(variable) from error
    if number >= 1 << 31:  # torch and accelerate use 32 bits
        raise _invalid_variable(variable)
    return number


def _invalid_variable(variable: str) -> ConfigError:
    return ConfigError(
        f"the environment variable {variable} is {os.environ[variable].strip()[:40]!r}; launchers"
        f" set it to a {'port' if variable == 'MASTER_PORT' else 'number'}",
        remedy=f"unset {variable}, or start with torchrun or accelerate launch",
    )

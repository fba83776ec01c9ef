"""The check that an unsealed checkpoint is consistent and of this run.

Each file can be intact although the checkpoint is a mixture of several, after a kill or a manual
copy. Therefore the steps that the files record must agree, tensors must have the names and shapes
of this run's model, and the optimizer, the schedule and the random states must have the structure
that their names promise. Pickles are read with torch's `weights_only`, as transformers does, so
that no code in them is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfttrain.finite import names_not_finite

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class ExpectedTensors:
    """The tensors of a model file of this run."""

    shapes: Shapes
    """The shape of each tensor, by its name in the file."""
    optional: frozenset[str] = field(default=frozenset())
    """The tensors that may be missing, because they are tied to another one."""
    adapter: str = ""
    """The name of the adapter that has these tensors; "" for a whole model."""


def find_contents_fault(
    folder: Path, step: int, recorded: Mapping[str, int], expected: ExpectedTensors | None
) -> str:
    """Return the first contradiction in a checkpoint of readable files; "" if none.

    Args:
        folder: The checkpoint.
        step: The number of optimizer steps that its trainer state records.
        recorded: The steps of the trainer, the optimizer and the schedule that were recorded when
            it was saved; empty in checkpoints of older versions.
        expected: The tensors of this run's model; None where they are not known.
    """
    if recorded.get("trainer", step) != step:
        return f"its files are of the steps {recorded['trainer']} and {step}"
    # The scaler of fp16 skips steps, which the trainer counts and the optimizer does not.
    default = None if (folder / "scaler.pt").exists() else step
    checks = (
        _optimizer_faults(folder / "optimizer.pt", recorded.get("optimizer", default)),
        _schedule_faults(folder / "scheduler.pt", recorded.get("schedule", default)),
        *(_random_state_faults(path) for path in sorted(folder.glob("rng_state*.pth"))),
        _tensor_faults(folder, expected),
    )
    return next((fault for faults in checks for fault in faults), "")


def last_optimizer_step(states: Iterable[Any]) -> int | None:
    """Return the largest step in the states of an optimizer; None if they count none.

    Parameters without gradients, such as experts to which no token was routed, count fewer steps.
    """
    steps = [
        values["step"] for values in states if isinstance(values, Mapping) and "step" in values
    ]
    return max((int(step) for step in steps), default=None)


def _optimizer_faults(path: Path, step: int | None) -> Iterator[str]:
    """Yield the faults of an optimizer's file.

    `step` is None where the step is not known.
    """
    if not path.is_file():
        return
    content = _load_pickle(path)
    if not isinstance(content, Mapping) or not {"state", "param_groups"} <= content.keys():
        yield f"{path.name} holds no optimizer"
        return
    states = content["state"]
    if not isinstance(states, Mapping):
        return
    counted = last_optimizer_step(states.values())
    if step is not None and counted is not None and counted != step:
        yield f"{path.name} is of step {counted}, not of {step}"
    values = {
        f"{key} of parameter {number}": value
        for number, state in states.items()
        if isinstance(state, Mapping)
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
    yield from (f"{path.name} is not finite ({name})" for name in names_not_finite(values))


def _schedule_faults(path: Path, step: int | None) -> Iterator[str]:
    """Yield the faults of a schedule's file.

    `step` is None where the step is not known.
    """
    if not path.is_file():
        return
    content = _load_pickle(path)
    counted = content.get("last_epoch") if isinstance(content, Mapping) else None
    if not isinstance(content, Mapping) or not isinstance(counted, int) or "state" in content:
        yield f"{path.name} holds no schedule"
    # ReduceLROnPlateau counts evaluations, not steps.
    elif "num_bad_epochs" not in content and step is not None and counted != step:
        yield f"{path.name} is of step {counted}, not of {step}"


def _random_state_faults(path: Path) -> Iterator[str]:
    content = _load_pickle(path)
    if not isinstance(content, Mapping) or not {"python", "numpy", "cpu"} <= content.keys():
        yield f"{path.name} holds no random states"


def _load_pickle(path: Path) -> Any:
    """Return the content of a pickle without running code in it, or None.

    None means that this is impossible.
    """
    from transformers.trainer import safe_globals

    try:
        with safe_globals():
            # Mapped, not read: an optimizer is twice as large as its model.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # unpickling can raise anything
        return None


def _tensor_faults(folder: Path, expected: ExpectedTensors | None) -> Iterator[str]:
    """Yield the tensors of the model file with a wrong name, shape or value."""
    from safetensors import safe_open

    # 1. Find the files: one file, or the shards of an index; peft saves an adapter that is not
    #    called "default" in a folder of its own.
    name = "adapter_model" if expected is not None and expected.adapter else "model"
    weights_folder = folder
    if expected is not None and expected.adapter not in ("", "default"):
        weights_folder = folder / expected.adapter
    index = weights_folder / f"{name}.safetensors.index.json"
    single = weights_folder / f"{name}.safetensors"
    if single.is_file():
        files = [single]
    elif index.is_file():
        files = sorted({weights_folder / str(shard) for shard in _read_weight_map(index).values()})
    else:
        return  # another format, which is not inspected
    # 2. Read every value once.
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(str(file), framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  # it is not a dictionary
                tensor = tensors.get_tensor(key)
                shapes[key] = tuple(tensor.shape)
                if names_not_finite({key: tensor}):
                    yield f"{file.name} is not finite ({key})"
    if expected is None:
        return
    # 3. Compare names and shapes with those of the model.
    label = f"{name}.safetensors"
    for key in sorted(expected.shapes.keys() - shapes.keys() - expected.optional):
        yield f"{label} has no tensor {key}, which the model has"
    for key in sorted(shapes.keys() - expected.shapes.keys()):
        yield f"{label} has a tensor {key}, which the model does not have"
    for key in sorted(shapes.keys() & expected.shapes.keys()):
        if shapes[key] != expected.shapes[key]:
            yield f"{label} has {key} as {list(shapes[key])}, not {list(expected.shapes[key])}"


def _read_weight_map(index: Path) -> dict[str, Any]:
    found = json.loads(index.read_bytes()).get("weight_map")
    return found if isinstance(found, dict) else {}

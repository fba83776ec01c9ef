"""Whether the files of a checkpoint without a seal belong together, and to this run.

Each file may be whole and the checkpoint still be mixed from several: after a kill, or a copy by
hand. So the steps that the files name must agree, tensors must have the names and shapes of this
run's model, and optimizer, schedule and random states must be what their names say. The pickles
are read with torch's `weights_only`, as transformers does, so that no code in them is run.
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
    """The tensors that a model file of this run has."""

    shapes: Shapes
    """By the names in the file."""
    optional: frozenset[str] = field(default=frozenset())
    """Those that may be missing, since they are tied to another one."""
    adapter: str = ""
    """Name of the adapter whose tensors these are; '' for a whole model."""


def contents_fault(
    folder: Path, step: int, recorded: Mapping[str, int], expected: ExpectedTensors | None
) -> str:
    """Return what contradicts in a checkpoint of which each file can be read; '' if nothing does.

    Args:
        folder: the checkpoint.
        step: the optimizer steps that its trainer state names.
        recorded: steps of trainer, optimizer and schedule that were recorded as it was saved;
            empty in checkpoints of older versions.
        expected: tensors of the model of this run; None where it is not known.
    """
    if recorded.get("trainer", step) != step:
        return f"its files are of the steps {recorded['trainer']} and {step}"
    # The scaler of fp16 skips steps, so that the others do not count as many as the trainer.
    default = None if (folder / "scaler.pt").exists() else step
    checks = (
        _optimizer_faults(folder / "optimizer.pt", recorded.get("optimizer", default)),
        _schedule_faults(folder / "scheduler.pt", recorded.get("schedule", default)),
        *(_random_faults(path) for path in sorted(folder.glob("rng_state*.pth"))),
        _tensor_faults(folder, expected),
    )
    return next((fault for faults in checks for fault in faults), "")


def optimizer_step(states: Iterable[Any]) -> int | None:
    """Return the largest step that the states of an optimizer count; None if they count none.

    Parameters without gradients, such as experts that no token was sent to, count fewer.
    """
    steps = [
        values["step"] for values in states if isinstance(values, Mapping) and "step" in values
    ]
    return max((int(step) for step in steps), default=None)


def _optimizer_faults(path: Path, step: int | None) -> Iterator[str]:
    if not path.is_file():
        return
    content = _loaded(path)
    if not isinstance(content, Mapping) or not {"state", "param_groups"} <= content.keys():
        yield f"{path.name} holds no optimizer"
        return
    states = content["state"]
    if not isinstance(states, Mapping):
        return
    counted = optimizer_step(states.values())
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
    if not path.is_file():
        return
    content = _loaded(path)
    counted = content.get("last_epoch") if isinstance(content, Mapping) else None
    if not isinstance(content, Mapping) or not isinstance(counted, int) or "state" in content:
        yield f"{path.name} holds no schedule"
    elif "num_bad_epochs" not in content and step is not None and counted != step:
        # A schedule that waits for a plateau counts evaluations.
        yield f"{path.name} is of step {counted}, not of {step}"


def _random_faults(path: Path) -> Iterator[str]:
    content = _loaded(path)
    if not isinstance(content, Mapping) or not {"python", "numpy", "cpu"} <= content.keys():
        yield f"{path.name} holds no random states"


def _loaded(path: Path) -> Any:
    """What a pickle holds, without running code in it; None where it holds other things."""
    from transformers.trainer import safe_globals

    try:
        with safe_globals():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # whatever unpickling raises
        return None


def _tensor_faults(folder: Path, expected: ExpectedTensors | None) -> Iterator[str]:
    """Where names, shapes or values of the model file are not those that the run needs."""
    from safetensors import safe_open

    name = "adapter_model" if expected is not None and expected.adapter else "model"
    place = folder
    if expected is not None and expected.adapter not in ("", "default"):
        place = folder / expected.adapter
    index, single = place / f"{name}.safetensors.index.json", place / f"{name}.safetensors"
    if single.is_file():
        files = [single]
    elif index.is_file():
        files = sorted({place / str(shard) for shard in _weight_map(index).values()})
    else:
        return  # another format, which is not looked into
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
    what = f"{name}.safetensors"
    for key in sorted(expected.shapes.keys() - shapes.keys() - expected.optional):
        yield f"{what} has no tensor {key}, which the model has"
    for key in sorted(shapes.keys() - expected.shapes.keys()):
        yield f"{what} has a tensor {key}, which the model does not have"
    for key in sorted(shapes.keys() & expected.shapes.keys()):
        if shapes[key] != expected.shapes[key]:
            yield f"{what} has {key} as {list(shapes[key])}, not {list(expected.shapes[key])}"


def _weight_map(index: Path) -> dict[str, Any]:
    found = json.loads(index.read_bytes()).get("weight_map")
    return found if isinstance(found, dict) else {}

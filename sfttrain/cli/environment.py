"""The command `sfttrain env`: the environment of builds, devices and attention."""

from __future__ import annotations

import argparse
import json
from typing import Any

from sftprep import describe_environment
from sftprep.errors import escape_control
from sfttrain.cli.help_text import ENV_USAGE


def show_environment(arguments: list[str]) -> int:
    """Print the environment, and return the exit code.

    Raises:
        SftprepError: The tokenizer cannot be loaded.
    """
    parser = argparse.ArgumentParser("sfttrain env", add_help=False, usage=ENV_USAGE[7:])
    parser.add_argument("--tokenizer")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    environment, training = describe_environment(options.tokenizer), describe_training()
    if options.json:
        print(json.dumps({**environment.to_dict(), **training}, indent=1, ensure_ascii=False))
        return 0
    devices = training["devices"] or ["the CPU"]
    lines = [
        *environment.to_lines(),
        f"devices          {', '.join(devices)}",
        f"attention        {training['attention']}, for a model that supports it",
        *(f"  not {name}: {why}" for name, why in training["attention_unavailable"].items()),
    ]
    print(escape_control("\n".join(lines)))
    return 0


def describe_training() -> dict[str, Any]:
    """Return the CUDA devices, and the attention implementation that `auto` tries first."""
    import torch

    from sfttrain.packed.attention import first_available

    devices = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    name, unavailable = first_available(torch.device("cuda" if devices else "cpu"))
    return {"devices": devices, "attention": name, "attention_unavailable": unavailable}

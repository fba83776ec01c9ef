"""sfttrain: fine-tuning on the packed shards of sftprep, with TRL's interface.

The public names are imported at their first use, so that `import sfttrain` takes no time.
"""

import os
import sys

# With `python -m sfttrain`, also of a submodule, Python searches the working directory first, and
# nothing but this package may come from it. Until then, only modules that the interpreter loads at
# its start are imported. The name of the module is before the arguments, also in `-msfttrain`.
if (
    sys.argv[:1] == ["-m"]
    and sys.orig_argv[-len(sys.argv)].partition(".")[0].rpartition("m")[2] == "sfttrain"
    and sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
):
    del sys.path[0]

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfttrain.config import ModelConfig as ModelConfig
    from sfttrain.config import SFTConfig as SFTConfig
    from sfttrain.models.clone_template import clone_chat_template as clone_chat_template
    from sfttrain.models.loading import get_kbit_device_map as get_kbit_device_map
    from sfttrain.models.loading import get_peft_config as get_peft_config
    from sfttrain.models.loading import get_quantization_config as get_quantization_config
    from sfttrain.trainer import SFTTrainer as SFTTrainer

# The module of each public name.
_MODULES = {
    "SFTTrainer": "sfttrain.trainer",
    "SFTConfig": "sfttrain.config",
    "ModelConfig": "sfttrain.config",
    "clone_chat_template": "sfttrain.models.clone_template",
    "get_peft_config": "sfttrain.models.loading",
    "get_quantization_config": "sfttrain.models.loading",
    "get_kbit_device_map": "sfttrain.models.loading",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'sfttrain' has no attribute {name!r}")
    import_module("sfttrain.cli.dependencies").check_dependencies(f"sfttrain.{name}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

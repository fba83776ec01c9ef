"""The settings of a training run, with TRL's names."""

from sfttrain.config.model_config import ModelConfig
from sfttrain.config.sft_config import SFTConfig

__all__ = ["ModelConfig", "SFTConfig"]

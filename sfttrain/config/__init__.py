"""The settings of a training run, with the names that TRL gives them."""

from sfttrain.config.sft_config import ModelConfig, SFTConfig

__all__ = ["ModelConfig", "SFTConfig"]

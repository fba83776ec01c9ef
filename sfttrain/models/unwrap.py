"""The model below its adapter."""

from __future__ import annotations

from typing import Any


def unwrap_peft(model: Any) -> Any:
    """The transformers model itself, where `model` is a PeftModel around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model

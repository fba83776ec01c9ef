"""The transformers model inside an adapter."""

from __future__ import annotations

from typing import Any


def unwrap_peft(model: Any) -> Any:
    """Return the transformers model inside a PeftModel.

    Any other model is returned unchanged.
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model

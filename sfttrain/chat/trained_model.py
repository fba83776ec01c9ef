"""Loading of what a run saved: a model or an adapter, with its tokenizer and chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sftprep.errors import (
    ConfigError,
    InputNotFound,
    MismatchError,
    TemplateError,
    TokenizerError,
    first_line,
    setting,
)
from sfttrain.config.model_config import ModelConfig
from sfttrain.models.build_tokenizer import find_tokenizer
from sfttrain.models.loading import load_model
from sfttrain.models.remote_code import check_code_is_pinned

_ADAPTER_CONFIG, _MODEL_CONFIG = "adapter_config.json", "config.json"


@dataclass(frozen=True)
class TrainedModel:
    """A model for inference."""

    model: Any
    """The transformers model or PeftModel, in eval mode on its device."""
    tokenizer: Any
    """The tokenizer that was saved with it; it has a chat template."""
    description: str
    """"the model in out", or "the adapter in out, on MODEL"."""


def load_trained_model(
    folder: str,
    *,
    device: torch.device,
    base: str | None = None,
    base_revision: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
) -> TrainedModel:
    """Load the model or adapter in the output folder of a run, or in one of its checkpoints.

    The precision of the weights is that of the files.

    Args:
        folder: The folder.
        device: The device for inference.
        base: The base model of an adapter; by default the one that the adapter names.
        base_revision: Its branch, tag or commit on the Hub; by default that of the adapter.
        chat_template: A Jinja file to use instead of the template of the tokenizer.
        trust_remote_code: Whether code that comes with the model may run: with an adapter, that of
            `base`.

    Raises:
        InputNotFound: The folder has no model, or the base model does not exist.
        TokenizerError: No tokenizer was saved with the model.
        TemplateError: The tokenizer has no chat template, or the file cannot be read.
        MismatchError: The adapter does not fit its base model.
        ConfigError: The settings contradict each other.
    """
    path = Path(folder).expanduser()
    config, is_adapter = _find_model(path, base, trust_remote_code)
    if base_revision is not None:
        config = replace(config, model_revision=base_revision)
    tokenizer = _load_tokenizer(path, config if is_adapter else None)
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
    if not tokenizer.chat_template:
        raise TemplateError(
            f"the tokenizer in {folder} has no chat template",
            remedy=[
                f"specify the one of the training: {setting('chat_template', 'FILE.jinja')}",
                "train on a build with --chat-template, which is saved with the model",
            ],
        )
    model = _load_adapted(path, config, tokenizer, device) if is_adapter else _load(config, device)
    where = f", on {config.model_name_or_path}" if is_adapter else ""
    kind = "adapter" if is_adapter else "model"
    return TrainedModel(model.to(device).eval(), tokenizer, f"the {kind} in {folder}{where}")


def _find_model(path: Path, base: str | None, trust_code: bool) -> tuple[ModelConfig, bool]:
    """Return the model to load, and whether the folder has an adapter on it."""
    if not (path / _ADAPTER_CONFIG).is_file():
        _check_is_model(path)
        if base is not None:
            raise ConfigError(
                f"{setting('model')} is the base of an adapter, but {path} has a whole model",
                remedy=f"leave {setting('model')} out",
            )
        return ModelConfig(model_name_or_path=str(path), trust_remote_code=trust_code), False
    recorded = _read_adapter_config(path)
    named, revision = recorded.get("base_model_name_or_path"), recorded.get("revision")
    if trust_code and base is None:
        # The adapter names a model whose code the user may not have read.
        raise ConfigError(
            f"{setting('trust_remote_code')} would run code of {named}, which the adapter names",
            remedy=f"read the code, and name the model: {setting('model', str(named))}",
        )
    if base is None and not named:
        raise InputNotFound(
            f"the adapter in {path} does not name its base model",
            remedy=f"specify {setting('model', 'FOLDER_OR_NAME')}",
        )
    config = ModelConfig(model_name_or_path=base or str(named), trust_remote_code=trust_code)
    if base is None and revision and not Path(str(named)).is_dir():
        config = replace(config, model_revision=str(revision))
    return config, True


def _check_is_model(path: Path) -> None:
    if (path / _MODEL_CONFIG).is_file():
        return
    if not path.is_dir():
        raise InputNotFound(
            f"the folder {path} does not exist",
            remedy="specify the output_dir of `sfttrain run`",
        )
    inside = [
        child
        for child in sorted(path.iterdir(), key=lambda child: child.stat().st_mtime)
        if (child / _ADAPTER_CONFIG).is_file() or (child / _MODEL_CONFIG).is_file()
    ]
    raise InputNotFound(
        f"{path} has neither a model (config.json) nor an adapter (adapter_config.json)",
        remedy=f"specify {inside[-1]}"
        if inside
        else "specify the output_dir of `sfttrain run`, or one of its checkpoints",
    )


def _read_adapter_config(path: Path) -> dict[str, Any]:
    try:
        recorded = json.loads((path / _ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputNotFound(
            f"{path / _ADAPTER_CONFIG} cannot be read: {first_line(error)}",
            remedy="specify another checkpoint",
        ) from error
    return recorded if isinstance(recorded, dict) else {}


def _load_tokenizer(path: Path, base: ModelConfig | None) -> Any:
    """Load the tokenizer in the folder; without one, that of the base model of an adapter."""
    tokenizer = find_tokenizer(str(path))
    if tokenizer is None and base is not None:
        tokenizer = find_tokenizer(
            str(base.model_name_or_path),
            revision=base.model_revision,
            trust_remote_code=base.trust_remote_code,
        )
    if tokenizer is None:
        raise TokenizerError(
            f"{path} has no tokenizer",
            remedy="copy the files of the tokenizer of the training into the folder",
        )
    return tokenizer


def _read_template(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(
            f"the chat template {path} cannot be read: {first_line(error)}",
            remedy=f"specify a Jinja file: {setting('chat_template', 'FILE.jinja')}",
        ) from error


def _load(config: ModelConfig, device: torch.device) -> Any:
    check_code_is_pinned(config)
    return load_model(config, device=device, options={"dtype": "auto"})


def _load_adapted(path: Path, base: ModelConfig, tokenizer: Any, device: torch.device) -> Any:
    """Load the base model, grow its embedding as the training did, and add the adapter."""
    from peft import PeftModel

    try:
        model = _load(base, device)
    except InputNotFound as error:
        raise InputNotFound(
            f"the base model of the adapter in {path} cannot be loaded: {error.message}",
            remedy=f"specify where it is: {setting('model', 'FOLDER_OR_NAME')}",
        ) from error
    rows = _embedding_rows(path, model, tokenizer)
    if rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows)
    try:
        return PeftModel.from_pretrained(model, str(path))
    except (RuntimeError, ValueError) as error:  # layers or shapes that the base does not have
        raise MismatchError(
            f"the adapter in {path} does not fit {base.model_name_or_path}:"
            f" {first_line(error, 300)}",
            remedy=f"specify the model it was trained on: {setting('model', 'FOLDER_OR_NAME')}",
        ) from error


def _embedding_rows(path: Path, model: Any, tokenizer: Any) -> int:
    """Return the rows that the embedding had during the training.

    A full embedding in the adapter's file determines them. Without it, the training added rows only
    for tokens beyond those of the base model.
    """
    from safetensors import safe_open

    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    file = path / "adapter_model.safetensors"
    if file.is_file():
        with safe_open(str(file), "pt") as tensors:
            key = f"base_model.model.{name}.weight"
            if key in tensors.keys():  # noqa: SIM118 (safe_open is not a mapping)
                return int(tensors.get_slice(key).get_shape()[0])
    largest = max(tokenizer.get_vocab().values(), default=-1)
    return max(int(embedding.weight.shape[0]), largest + 1)

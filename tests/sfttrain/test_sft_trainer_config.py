"""Every setting of TRL has the same effect here, or is refused by name."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from sftprep.errors import ConfigError, SftprepError
from sfttrain import ModelConfig, SFTConfig, SFTTrainer
from sfttrain.config.deprecated import CURRENT_NAMES
from sfttrain.config.unsupported import MINIMUMS, REFUSALS
from sfttrain.data.settings import NO_CUT, DataSettings

trl = pytest.importorskip("trl", reason="compares with TRL's own settings")

OURS = {f.name: f for f in dataclasses.fields(SFTConfig)}

# The effect of each setting of TRL's SFTConfig: a value, and a predicate that holds only for an
# SFTConfig with this value. Trainer implements the settings of TrainingArguments; the exceptions
# are in REFUSALS.
MEANING: dict[str, tuple[Any, Any]] = {
    "model_init_kwargs": (
        {"torch_dtype": "bfloat16"},
        lambda c: c.model_init_kwargs == {"torch_dtype": "bfloat16"},
    ),
    "trust_remote_code": (True, lambda c: c.trust_remote_code),
    "router_aux_loss_coef": (0.5, lambda c: c.router_aux_loss_coef == 0.5),
    "chat_template_path": ("a.jinja", lambda c: c.chat_template_path == "a.jinja"),
    "dataset_text_field": ("body", lambda c: settings(c)["text_field"] == "body"),
    "dataset_kwargs": (
        {"skip_prepare_dataset": True},
        lambda c: DataSettings.from_config(c, None).skip_prepare,
    ),
    "dataset_num_proc": (2, lambda c: DataSettings.from_config(c, None).workers == 2),
    "eos_token": ("</s>", lambda c: c.eos_token == "</s>"),
    "pad_token": ("<pad>", lambda c: c.pad_token == "<pad>"),
    "max_length": (77, lambda c: settings(c)["max_length"] == 77),
    "truncation_mode": ("keep_end", lambda c: settings(c)["truncate_side"] == "left"),
    "shuffle_dataset": (True, lambda c: settings(c, packing=False)["order"] == "shuffle"),
    "packing": (True, lambda c: c.packing),
    "packing_strategy": ("wrapped", lambda c: settings(c)["packing"] == "wrapped"),
    "padding_free": (True, lambda c: c.padding_free),
    "pad_to_multiple_of": (64, lambda c: c.pad_to_multiple_of == 64),
    "eval_packing": (False, lambda c: c.eval_packing is False),
    "completion_only_loss": (False, lambda c: settings(c)["train_on"] == "all"),
    "assistant_only_loss": (True, lambda c: settings(c)["train_on"] == "assistant"),
    "loss_type": ("dft", lambda c: c.loss_type == "dft"),
    "activation_offloading": (True, lambda c: c.activation_offloading),
}


def config(**given: Any) -> SFTConfig:
    return SFTConfig(output_dir="x", use_cpu=True, **given)


def settings(made: SFTConfig, packing: bool = True) -> dict[str, Any]:
    return DataSettings.from_config(made, None).build_settings(packing)


def test_the_trainer_has_the_arguments_of_trl_in_the_same_order() -> None:
    ours, theirs = (
        inspect.signature(kind.__init__).parameters for kind in (SFTTrainer, trl.SFTTrainer)
    )
    assert list(ours) == list(theirs)
    assert {name: p.default for name, p in ours.items()} == {
        name: p.default for name, p in theirs.items()
    } | {
        "train_dataset": None  # it is not needed to evaluate only
    }


def test_every_setting_of_trl_is_known() -> None:
    theirs = {f.name: f for f in dataclasses.fields(trl.SFTConfig)}
    assert theirs.keys() <= OURS.keys()
    differing = {name for name, f in theirs.items() if f.default != OURS[name].default}
    # The docstring of SFTConfig lists these.
    assert differing == {
        "gradient_checkpointing",
        "logging_nan_inf_filter",
        "remove_unused_columns",
    }


def test_every_setting_that_trl_adds_to_transformers_has_a_meaning_here() -> None:
    from transformers import TrainingArguments

    added = {f.name for f in dataclasses.fields(trl.SFTConfig)} - {
        f.name for f in dataclasses.fields(TrainingArguments)
    }
    assert added == MEANING.keys()


@pytest.mark.parametrize("name", sorted(MEANING))
def test_a_setting_has_its_effect(name: str) -> None:
    value, holds = MEANING[name]
    assert holds(config(**{name: value}))
    assert not holds(config())


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ({"label_smoothing_factor": 0.1}, "at 0"),
        ({"auto_find_batch_size": True}, "per_device_train_batch_size"),
        ({"train_sampling_strategy": "group_by_length"}, "packing=True"),
        ({"batch_eval_metrics": True}, "leave"),
        ({"include_for_metrics": ["loss"]}, "leave"),
        ({"eval_do_concat_batches": False}, "True"),
        ({"fp16_full_eval": True}, "leave"),
        ({"bf16_full_eval": True}, "leave"),
        ({"use_cache": True}, "leave"),
        ({"label_names": ["start"]}, "leave"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": True}},
            "selective",
        ),
        ({"accelerator_config": {"split_batches": True}}, "split_batches"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
        ({"packing": True, "max_length": None}, "max_length"),
        ({"packing_strategy": "knapsack"}, "bfd_split"),
        ({"truncation_mode": "keep_middle"}, "keep_end"),
        ({"pad_to_multiple_of": "many"}, "64"),
        ({"max_length": 1}, "at least 2"),
        ({"loss_type": "focal"}, "dft"),
        ({"dataset_kwargs": "x"}, '{"name": value}'),
    ],
)
def test_unsupported_settings_are_refused_by_name(given: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**given)
    assert any(name in str(caught.value) for name in given)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size is 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
        ({"dataset_num_proc": 0}, "dataset_num_proc is 0"),
        ({"learning_rate": -1e-4}, "learning_rate is -0.0001"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"num_train_epochs": float("nan")}, "num_train_epochs is nan"),
        ({"logging_steps": float("nan")}, "logging_steps is nan"),
        ({"save_steps": float("inf")}, "save_steps is inf"),
        ({"ddp_timeout": 0}, "ddp_timeout is 0"),
        ({"lr_scheduler_kwargs": {"a": {"b": [float("inf")]}}}, "lr_scheduler_kwargs: b is inf"),
        ({"lr_scheduler_kwargs": '{"a": 1e999}'}, "lr_scheduler_kwargs: a is inf"),
        ({"learning_rate": "2e-4"}, "learning_rate is '2e-4', a string"),
        ({"seed": "7"}, "seed is '7', a string"),
        ({"max_length": "512"}, "max_length is '512', a string"),
        ({"max_length": 12.5}, "max_length is 12.5"),
    ],
)
def test_invalid_numbers_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**given)
    assert message in caught.value.message
    assert "number" in caught.value.remedy


def test_a_string_is_not_accepted_for_a_boolean() -> None:
    with pytest.raises(ConfigError, match="packing is 'yes', a string") as caught:
        config(packing="yes")
    assert "True or False" in caught.value.remedy
    assert config(max_steps=3.0).max_steps == 3


def test_minimum_values_are_accepted() -> None:
    for name, least in MINIMUMS.items():
        assert getattr(config(**{name: least}), name) == least


@pytest.mark.parametrize(
    ("given", "message", "remedy"),
    [
        ({"model": None}, "model is None", "from_pretrained"),
        ({"model": {"name": "x"}}, "model is a dict", "from_pretrained"),
        (
            {"processing_class": "gpt2"},
            "processing_class is 'gpt2'",
            "AutoTokenizer.from_pretrained('gpt2')",
        ),
        ({"peft_config": LoraConfig(task_type="SEQ_CLS")}, "SEQ_CLS", "CAUSAL_LM"),
        (
            {"args": config(model_init_kwargs={"torch_dtype": "float33"})},
            "dtype is 'float33'",
            "bfloat16",
        ),
        ({"args": {"output_dir": "x"}}, "args is a dict", "SFTConfig("),
        ({"peft_config": {}}, "peft_config is a dict", "LoraConfig("),
        ({"peft_config": {"r": 4}}, "peft_config is a dict", "LoraConfig("),
    ],
)
def test_arguments_of_a_wrong_type_are_refused(
    given: dict[str, Any], message: str, remedy: str
) -> None:
    parts: dict[str, Any] = {
        "model": "x",
        "args": config(),
        "train_dataset": [{"text": "a"}],
        **given,
    }
    with pytest.raises(ConfigError, match=message) as caught:
        SFTTrainer(**parts)
    assert remedy in caught.value.remedy


def test_every_default_is_supported() -> None:
    made = config()
    for refusal in REFUSALS:
        assert refusal.is_supported(getattr(made, refusal.name)), refusal.name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_liger_is_refused_without_a_gpu() -> None:
    with pytest.raises(ConfigError, match="needs a GPU with Triton") as caught:
        config(use_liger_kernel=True)
    assert "fused" in caught.value.remedy


def test_unknown_dataset_kwargs_are_refused() -> None:
    with pytest.raises(ConfigError, match="add_special_tokens"):
        DataSettings.from_config(config(dataset_kwargs={"add_special_tokens": False}), None)


# ---- lengths and older names ----


class Limited:
    model_max_length = 300


def test_the_tokenizers_limit_applies_if_no_length_is_specified() -> None:
    assert DataSettings.from_config(config(), Limited()).max_length == 300
    assert DataSettings.from_config(config(max_length=1024), Limited()).max_length == 1024
    assert DataSettings.from_config(config(), None).max_length == 1024
    assert DataSettings.from_config(config(max_length=None), Limited()).max_length == NO_CUT


def test_deprecated_names_set_the_current_settings() -> None:
    with pytest.warns(FutureWarning, match="dataset_batch_size has no effect"):
        made = config(
            max_seq_length=99, warmup_ratio=0.1, evaluation_strategy="no", dataset_batch_size=7
        )
    assert (made.max_length, made.warmup_steps) == (99, 0.1)
    assert dataclasses.replace(made, dataset_batch_size=None, max_length=55).max_length == 55
    with pytest.raises(ConfigError, match="the same setting"):
        config(max_seq_length=99, max_length=77)
    with pytest.raises(SftprepError, match="use_liger_kernel"):
        config(use_liger=True)
    with pytest.raises(ConfigError, match="train_sampling_strategy"):
        config(group_by_length=True)
    assert set(CURRENT_NAMES.values()) - {""} <= OURS.keys()


def test_synonyms() -> None:
    assert config(loss_type="chunked_nll").loss_type == "nll"
    assert config(packing_strategy="bfd-requeue").packing_strategy == "bfd_split"
    assert config(pad_to_multiple_of="auto").pad_to_multiple_of is None


def test_training_arguments_are_converted(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    from sfttrain.trainer_setup import to_sft_config

    plain = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=3, learning_rate=1e-3
    )
    made = to_sft_config(plain, None)
    assert (made.output_dir, made.max_steps, made.learning_rate, made.logging_steps) == (
        str(tmp_path),
        3,
        1e-3,
        10,
    )


def test_the_model_config_has_every_field_of_trl_and_the_deprecated_name() -> None:
    ours = {f.name for f in dataclasses.fields(ModelConfig)}
    assert {f.name for f in dataclasses.fields(trl.ModelConfig)} | {
        "torch_dtype",
        "trust_remote_code",
    } <= ours
    assert ModelConfig(torch_dtype="bfloat16").dtype == "bfloat16"
    assert ModelConfig(dtype="bfloat16").torch_dtype == "bfloat16"

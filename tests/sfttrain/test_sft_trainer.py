"""The effects of TRL's arguments on the training and the evaluation of SFTTrainer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PeftModel
from torch.nn import functional
from transformers import AutoTokenizer, BitsAndBytesConfig

from sftprep.errors import AttentionError, ConfigError, SftprepError, TemplateError
from sfttrain import SFTConfig, SFTTrainer
from sfttrain.data.custom_collator import collate_custom
from tests.sfttrain.packs import make_packs
from tests.sfttrain.tiny import tiny_model
from tests.sfttrain.trainer_factory import (
    CHATS,
    COMPLETIONS,
    TEXTS,
    losses,
    make_sft_trainer,
    sequences,
)

# ---- what is trained ----


def test_masks_follow_the_settings(model: Path, tmp_path: Path) -> None:
    def trained(data: Any, **settings: Any) -> int:
        found = sequences(make_sft_trainer(model, tmp_path, data, **settings).train_dataset)
        return sum(sum(mask[1:]) for _, mask in found)

    prompts = sum(
        len(ids) - 1
        for ids, _ in sequences(make_sft_trainer(model, tmp_path, COMPLETIONS).train_dataset)
    )
    assert trained(COMPLETIONS) == trained(COMPLETIONS, completion_only_loss=True) < prompts
    assert trained(COMPLETIONS, completion_only_loss=False) == prompts
    assert 0 < trained(CHATS, assistant_only_loss=True) < trained(CHATS)


def test_packing_changes_the_rows_and_not_the_loss(model: Path, tmp_path: Path) -> None:
    # One step over all there is, packed or not: the same mean over the same tokens.
    apart = make_sft_trainer(model, tmp_path, TEXTS, per_device_train_batch_size=8, max_steps=1)
    packed = make_sft_trainer(
        model,
        tmp_path,
        TEXTS,
        packing=True,
        max_length=64,
        per_device_train_batch_size=8,
        max_steps=1,
    )
    filled = make_sft_trainer(
        model, tmp_path, TEXTS, pad_to_multiple_of=64, per_device_train_batch_size=8, max_steps=1
    )
    offloaded = make_sft_trainer(
        model,
        tmp_path,
        TEXTS,
        activation_offloading=True,
        per_device_train_batch_size=8,
        max_steps=1,
    )
    assert len(packed.train_dataset) < len(apart.train_dataset) == len(TEXTS)
    for trainer in (apart, packed, filled, offloaded):
        trainer.train()
        assert losses(trainer) == pytest.approx(losses(apart), rel=1e-5)
        assert trainer.trained_tokens == apart.trained_tokens
    for name, value in apart.model.state_dict().items():
        torch.testing.assert_close(packed.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_every_packing_strategy_trains(model: Path, tmp_path: Path, strategy: str) -> None:
    trainer = make_sft_trainer(
        model, tmp_path, TEXTS, packing=True, packing_strategy=strategy, max_length=16
    )
    trainer.train()
    assert len(losses(trainer)) == 3
    assert max(len(pack.input_ids) for pack in trainer.train_dataset) <= 16


def test_rows_keep_their_order_unless_shuffled_or_packed(model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    kept = make_sft_trainer(model, tmp_path, TEXTS).train_dataset
    decoded = [tokenizer.decode(pack.input_ids, skip_special_tokens=True) for pack in kept]
    assert decoded == [row["text"] for row in TEXTS]
    shuffled = make_sft_trainer(model, tmp_path, TEXTS, shuffle_dataset=True).train_dataset
    assert [pack.input_ids.tolist() for pack in shuffled] != [
        pack.input_ids.tolist() for pack in kept
    ]
    assert sequences(shuffled) == sequences(kept)


def test_embedding_noise_is_off_after_training(model: Path, tmp_path: Path) -> None:
    noisy, plain = (
        make_sft_trainer(model, tmp_path, TEXTS, neftune_noise_alpha=5),
        make_sft_trainer(model, tmp_path, TEXTS),
    )
    noisy.train()
    plain.train()
    assert losses(noisy)[0] != losses(plain)[0]
    embedding = noisy.model.train().get_input_embeddings()
    assert torch.equal(embedding(torch.arange(9)), embedding(torch.arange(9)))


# ---- evaluation ----


def test_evaluation_sets_have_their_own_packing_and_are_never_packed_twice(
    model: Path, tmp_path: Path
) -> None:
    """TRL 1.16 packs a set again at each evaluation (B2).

    With eval_packing and unpacked training it also loses the boundaries of sequences (B3).
    """
    found = {}
    for packing, eval_packing in ((False, None), (False, True), (True, False), (True, None)):
        trainer = make_sft_trainer(
            model,
            tmp_path,
            TEXTS,
            packing=packing,
            eval_packing=eval_packing,
            max_length=64,
            options={"eval_dataset": COMPLETIONS},
        )
        packed = packing if eval_packing is None else eval_packing
        assert (len(trainer.eval_dataset) < len(COMPLETIONS)) == packed
        first = trainer.evaluate()
        before = [pack.seq_lengths.tolist() for pack in trainer.eval_dataset]
        for again in (trainer.eval_dataset, COMPLETIONS, Dataset.from_list(COMPLETIONS)):
            assert trainer.evaluate(again)["eval_loss"] == pytest.approx(
                first["eval_loss"], rel=1e-6
            )
        assert trainer.evaluate({"raw": COMPLETIONS})["eval_raw_loss"] == pytest.approx(
            first["eval_loss"], rel=1e-6
        )
        assert [pack.seq_lengths.tolist() for pack in trainer.eval_dataset] == before
        found[packing, eval_packing] = first["eval_loss"]
    assert list(found.values()) == pytest.approx([found[False, None]] * 4, rel=1e-5)


def test_several_evaluation_sets_have_a_loss_each(model: Path, tmp_path: Path) -> None:
    sets = DatasetDict({"a": Dataset.from_list(TEXTS), "b": Dataset.from_list(COMPLETIONS)})
    trainer = make_sft_trainer(
        model, tmp_path, TEXTS, options={"eval_dataset": sets}, eval_strategy="steps", eval_steps=3
    )
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert {"eval_a_loss", "eval_b_loss"} <= logged
    assert trainer.evaluate("a")["eval_loss"] == pytest.approx(
        trainer.evaluate()["eval_a_loss"], rel=1e-6
    )


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_compute_metrics_receives_one_row_per_sequence(
    model: Path, tmp_path: Path, kind: str
) -> None:
    """The accuracy computed from the predictions equals that of the trainer, with unpacked rows as
    well."""

    def accuracy(predicted: Any) -> dict[str, float]:
        guesses, labels = predicted.predictions[:, :-1], predicted.label_ids[:, 1:]
        counts = labels != -100
        return {"accuracy": float((guesses[counts] == labels[counts]).mean()), "rows": len(labels)}

    trainer = make_sft_trainer(
        tiny_model(kind, vocab_size=600),
        tmp_path,
        TEXTS,
        packing=True,
        max_length=64,
        options={
            "eval_dataset": COMPLETIONS,
            "processing_class": AutoTokenizer.from_pretrained(str(model)),
            "compute_metrics": accuracy,
            "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
        },
        allow_mismatch=["length"],
    )
    metrics = trainer.evaluate()
    assert metrics["eval_rows"] == len(COMPLETIONS)
    assert metrics["eval_accuracy"] == pytest.approx(metrics["eval_mean_token_accuracy"], abs=1e-6)
    trainer.preprocess_logits_for_metrics = trainer.compute_metrics = None
    whole = trainer.predict(COMPLETIONS, metric_key_prefix="test")
    assert whole.predictions.shape[2] == 600
    predicted, wanted = (
        torch.tensor(whole.predictions[:, :-1]),
        torch.tensor(whole.label_ids[:, 1:]),
    )
    mean = functional.cross_entropy(predicted.flatten(0, 1), wanted.flatten(), ignore_index=-100)
    assert whole.metrics["test_loss"] == pytest.approx(float(mean), rel=1e-5)
    assert whole.metrics["test_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    trainer.preprocess_logits_for_metrics = lambda logits, labels: logits[0, 0]
    with pytest.raises(ConfigError, match="preprocess_logits_for_metrics returned"):
        trainer.predict(COMPLETIONS)


# ---- a loss and a collator of one's own ----


def test_a_user_loss_equal_to_the_default_trains_the_same(model: Path, tmp_path: Path) -> None:
    def own(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return (
            functional.cross_entropy(
                logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
            / num_items_in_batch
        )

    settings: dict[str, Any] = {
        "packing": True,
        "max_length": 64,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 1,
    }
    ours = make_sft_trainer(model, tmp_path, COMPLETIONS, **settings)
    theirs = make_sft_trainer(
        model, tmp_path, COMPLETIONS, options={"compute_loss_func": own}, **settings
    )
    ours.train()
    theirs.train()
    assert losses(theirs) == pytest.approx(losses(ours), rel=1e-4)
    with pytest.raises(ConfigError, match="loss_type"):
        make_sft_trainer(
            model, tmp_path, TEXTS, options={"compute_loss_func": own}, loss_type="dft"
        )


def padded(rows: list[Any]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for number, row in enumerate(rows):
        size = len(row["input_ids"])
        ids[number, :size], labels[number, :size] = (
            torch.tensor(row["input_ids"]),
            torch.tensor(row["labels"]),
        )
        mask[number, :size] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_a_user_collator_trains_and_evaluates_the_same(model: Path, tmp_path: Path) -> None:
    # In the order of the data: rows are shuffled in another way than the packs of a build.
    settings = {"per_device_train_batch_size": 4, "train_sampling_strategy": "sequential"}
    options = {"eval_dataset": COMPLETIONS}
    ours = make_sft_trainer(model, tmp_path, COMPLETIONS, **settings, options=options)
    options = {"data_collator": padded, "eval_dataset": COMPLETIONS}
    theirs = make_sft_trainer(model, tmp_path, COMPLETIONS, **settings, options=options)
    tokens = [
        {"input_ids": ids, "labels": [i if m else -100 for i, m in zip(ids, mask, strict=True)]}
        for ids, mask in sequences(ours.train_dataset)
    ]
    skipped = make_sft_trainer(
        model,
        tmp_path,
        Dataset.from_list(tokens),
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        options={"data_collator": padded},
    )
    first = ours.evaluate()
    assert theirs.evaluate()["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-5)
    assert (
        skipped.evaluate(Dataset.from_list(tokens))["eval_num_tokens"] == first["eval_num_tokens"]
    )
    ours.train()
    theirs.train()
    skipped.train()
    assert losses(theirs) == pytest.approx(losses(ours), rel=1e-4)
    assert theirs.trained_tokens == ours.trained_tokens


def test_impossible_uses_of_a_collator_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        make_sft_trainer(model, tmp_path, TEXTS, packing=True, options={"data_collator": padded})
    stream = Dataset.from_list(TEXTS).to_iterable_dataset()
    with pytest.raises(ConfigError, match="by index"):
        make_sft_trainer(
            model,
            tmp_path,
            stream,
            dataset_kwargs={"skip_prepare_dataset": True},
            options={"data_collator": padded},
        )
    with pytest.raises(ConfigError, match="has no labels"):
        collate_custom(
            [{"input_ids": [1]}], collator=lambda rows: {"input_ids": torch.ones(1, 1)}, spare=None
        )
    empty = collate_custom([], collator=padded, spare={"input_ids": [4, 5], "labels": [4, 5]})
    assert empty["total_weight"] == 0
    assert (empty["labels"] == -100).all()


# ---- the model ----


def test_a_model_by_name_is_loaded_as_model_init_kwargs_say(model: Path, tmp_path: Path) -> None:
    for given in (
        {"torch_dtype": "bfloat16"},
        {"dtype": torch.bfloat16},
        '{"torch_dtype": "bfloat16"}',
    ):
        assert (
            make_sft_trainer(model, tmp_path, TEXTS, model_init_kwargs=given).model.dtype
            == torch.bfloat16
        )
    assert make_sft_trainer(model, tmp_path, TEXTS).model.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "options", "error", "message"),
    [
        (
            {"model_init_kwargs": {"torch_dtype": "float16", "dtype": "bfloat16"}},
            {},
            ConfigError,
            "which are the same",
        ),
        ({"model_init_kwargs": {"nonsense": 1}}, {}, ConfigError, "nonsense"),
        (
            {"model_init_kwargs": {"attn_implementation": "eager"}},
            {},
            AttentionError,
            "attend to each other",
        ),
        (
            {"model_init_kwargs": {"attn_implementation": "flash_attention_2"}},
            {},
            AttentionError,
            "flash_attention_2",
        ),
        (
            {"model_init_kwargs": {"quantization_config": {}}},
            {"quantization_config": 1},
            ConfigError,
            "specified twice",
        ),
        ({"eos_token": "<no such>"}, {}, ConfigError, "eos_token is '<no such>'"),
        ({"pad_token": "<no such>"}, {}, ConfigError, "pad_token is '<no such>'"),
        ({"chat_template_path": "/nowhere.jinja"}, {}, TemplateError, "/nowhere.jinja"),
        ({"chat_template_path": "/nowhere"}, {}, SftprepError, "/nowhere"),
    ],
)
def test_invalid_settings_of_the_model_are_refused(
    model: Path,
    tmp_path: Path,
    settings: Any,
    options: Any,
    error: type[SftprepError],
    message: str,
) -> None:
    if torch.cuda.is_available() and "flash" in message:
        pytest.skip("there is a GPU, which may have it")
    with pytest.raises(error, match=message) as caught:
        make_sft_trainer(model, tmp_path, TEXTS, options=options, **settings)
    assert caught.value.remedy


def test_settings_of_loading_are_refused_for_a_model_that_is_loaded(tmp_path: Path) -> None:
    packs = make_packs(3)
    with pytest.raises(
        ConfigError, match="model_init_kwargs is for a model that is specified by name"
    ):
        make_sft_trainer(
            tiny_model("llama"), tmp_path, packs, model_init_kwargs={"dtype": "bfloat16"}
        )
    with pytest.raises(
        ConfigError, match="quantization_config is for a model that is specified by name"
    ):
        make_sft_trainer(
            tiny_model("llama"),
            tmp_path,
            packs,
            options={"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
        )


def test_tokens_and_templates_are_set_on_tokenizer_and_model(
    model: Path, tmp_path: Path, tokenizer_dir: Path
) -> None:
    trainer = make_sft_trainer(
        model, tmp_path, TEXTS, eos_token="<|endoftext|>", pad_token="<|im_start|>"
    )
    tokenizer = trainer.processing_class
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|im_start|>")
    config = trainer.model.config
    assert (config.eos_token_id, config.pad_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    assert trainer.model.generation_config.eos_token_id == [tokenizer.eos_token_id, 2]
    assert all(ids[-1] == tokenizer.eos_token_id for ids, _ in sequences(trainer.train_dataset))

    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    trainer = make_sft_trainer(model, tmp_path, CHATS, chat_template_path=str(template))
    texts = [trainer.processing_class.decode(ids) for ids, _ in sequences(trainer.train_dataset)]
    assert all(text.startswith("[What") and text.endswith("]") for text in texts)

    trainer = make_sft_trainer(model, tmp_path, CHATS, chat_template_path=str(tokenizer_dir))
    assert "<|im_start|>" in trainer.processing_class.decode(sequences(trainer.train_dataset)[0][0])


def test_default_settings_train(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = SFTTrainer(str(model), train_dataset=TEXTS)
    assert trainer.args.output_dir == f"{model.name}-SFT"
    assert isinstance(trainer.args, SFTConfig)


# ---- adapters ----


def test_an_adapter_with_full_layers_trains_and_resumes(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules="all-linear",
        modules_to_save=["lm_head", "embed_token"],
    )
    with caplog.at_level(logging.WARNING):
        trainer = make_sft_trainer(model, tmp_path, CHATS, options={"peft_config": lora})
    assert "modules_to_save has 'embed_token'" in caplog.text
    assert "did you mean 'embed_tokens'?" in caplog.text
    before = {
        name: value.clone()
        for name, value in trainer.model.named_parameters()
        if value.requires_grad
    }
    assert any("lm_head" in name for name in before)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    moved = [
        name
        for name, value in trainer.model.named_parameters()
        if value.requires_grad and not torch.equal(value, before[name])
    ]
    assert any("lm_head" in name for name in moved)

    base = tiny_model(
        "llama", vocab_size=600, pad_token_id=0, eos_token_id=2, max_position_embeddings=512
    )
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    more = make_sft_trainer(adapted, tmp_path, CHATS, options={"processing_class": tokenizer})
    more.train()
    assert losses(more)[0] < losses(trainer)[0]
    with pytest.raises(ConfigError, match="has an adapter already"):
        make_sft_trainer(
            adapted, tmp_path, CHATS, options={"processing_class": tokenizer, "peft_config": lora}
        )


def test_predictions_keep_their_dtype() -> None:
    from sfttrain.metrics.predictions import Predictions

    kept = Predictions(None)
    kept.add(torch.zeros(1, 3, 2, dtype=torch.bfloat16), torch.tensor([[1, -100, 2]]), (1, 2))
    gathered = kept.gather(1)
    assert gathered.predictions.shape == (2, 2, 2)
    assert gathered.predictions.dtype == np.float32
    assert gathered.label_ids.tolist() == [[1, -100], [-100, 2]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="Liger's kernels need a GPU")
def test_liger_layers_train_like_the_layers_of_the_model(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("liger_kernel")
    plain = make_sft_trainer(model, tmp_path, TEXTS, use_cpu=False, bf16=False)
    liger = make_sft_trainer(
        model, tmp_path, TEXTS, use_cpu=False, bf16=False, use_liger_kernel=True
    )
    plain.train()
    liger.train()
    assert losses(liger) == pytest.approx(losses(plain), rel=1e-3)

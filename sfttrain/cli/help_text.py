"""What `sfttrain run --help` prints, written down so that it comes at once: the classes that know
take seconds to import.

tests/sfttrain/test_cli.py holds every line of it against those classes.
"""

from __future__ import annotations

USAGE = "sfttrain run DIR --model NAME_OR_DIR --output_dir DIR [options]"

OURS: tuple[tuple[str, str, str], ...] = (
    (
        "data",
        "",
        "DIR: folder of packs that `sftprep build` made, or a file or folder of raw records",
    ),
    ("eval_data", "", "the same, to evaluate on"),
    (
        "dataset_name",
        "",
        "in place of DIR, as in TRL: a dataset on the Hub, or whatever DIR may be",
    ),
    ("dataset_config", "", "configuration of dataset_name"),
    ("dataset_train_split", "train", "split of dataset_name that is trained on"),
    ("dataset_test_split", "test", "split that is evaluated on, if eval_strategy is not no"),
    ("dataset_streaming", "False", "read dataset_name without downloading it first"),
    ("model_name_or_path", "", "--model: folder of a model, or its name on the Hub"),
    ("config", "", "YAML file of settings by their names below; flags win over it"),
    ("use_peft", "False", "train a LoRA adapter, not the model"),
    ("lora_r", "16", "rank of the adapter"),
    ("lora_alpha", "32", "scale of the adapter: alpha / r"),
    ("lora_dropout", "0.05", "dropout before the adapter"),
    ("lora_target_modules", "", "layers that get an adapter; all linear layers but the head"),
    ("lora_modules_to_save", "", "layers trained in full beside the adapter"),
    ("merge", "False", "save the model with the adapter merged into it too, in OUTPUT_DIR/merged"),
    ("load_in_4bit", "False", "keep the base model in 4 bits, for adapters"),
    ("load_in_8bit", "False", "keep the base model in 8 bits, for adapters"),
    ("dtype", "", "precision of the weights: float32, bfloat16, float16, auto"),
    (
        "attn",
        "auto",
        (
            "attention over packed rows: auto, flash_attention_4, _3, _2, torch_varlen, sft_varlen,"
            " unpack"
        ),
    ),
    ("loss_impl", "auto", "auto, logits, or fused (logits are never kept)"),
    ("loss_type", "nll", "nll, or dft (tokens weighted by their own probability)"),
    (
        "isolation_guard",
        "True",
        "prove first that packed sequences cannot see each other (--no_isolation_guard: do not)",
    ),
    ("allow_mismatch", "", "train although shards and model differ in: tokenizer, length"),
    (
        "packing",
        "False",
        "put several raw records into a row of max_length (folders of packs are packed already)",
    ),
    ("packing_strategy", "bfd", "bfd, bfd_split, or wrapped, for raw records"),
    ("eval_packing", "", "pack raw evaluation records; as packing"),
    ("max_length", "1024", "tokens at which raw records are cut, and in a row"),
    ("truncation_mode", "keep_start", "keep_start or keep_end of longer raw records"),
    ("completion_only_loss", "", "train on completions only; where there are any"),
    ("assistant_only_loss", "False", "train on what the assistant says only"),
    ("dataset_text_field", "text", "key of the text in raw records"),
    ("dataset_num_proc", "", "processes that prepare raw records"),
    ("dataset_kwargs", "", "JSON: skip_prepare_dataset"),
    ("shuffle_dataset", "False", "shuffle raw records before they are packed, too"),
    ("on_bad_record", "error", "error, or quarantine raw records that cannot be used"),
    ("dataset_cache_dir", "", "folder in which raw datasets are kept prepared; in sftprep's cache"),
    ("eos_token", "", "token that ends a text or a turn, instead of the tokenizer's own"),
    ("pad_token", "", "padding token that is saved with the tokenizer"),
    ("chat_template_path", "", "a .jinja file, or a tokenizer whose template is taken over"),
    ("model_init_kwargs", "", "JSON: arguments of from_pretrained"),
    ("trust_remote_code", "False", "run code that comes with the model"),
    ("padding_free", "False", "rows are never padded, whatever is said here"),
    ("pad_to_multiple_of", "auto", "fill rows up to a multiple of so many tokens"),
    ("activation_offloading", "False", "keep activations in the memory of the CPU"),
    ("router_aux_loss_coef", "", "weight of the loss that balances experts; that of the model"),
    (
        "stream",
        "",
        (
            "INPUT...: raw records that are tokenized while the model trains, instead of DIR; needs"
            " --max_steps"
        ),
    ),
    ("stream_window", "4096", "with --stream: sequences of which packs are made at a time"),
    (
        "stream_lanes",
        "16",
        "with --stream: parts that the records are dealt into; a multiple of the ranks",
    ),
    ("stream_order", "shuffle", "with --stream: shuffle, or keep the order of the records"),
    ("json", "False", "print the summary as JSON"),
    ("debug", "", "show the traceback of an error"),
)
"""(setting, default, help): those of sfttrain. A default of '' is None, or one that the help
tells."""

TRAINING: tuple[tuple[str, str, str], ...] = (
    ("output_dir", "", "where checkpoints and the trained model go"),
    ("num_train_epochs", "3.0", "times through the packs"),
    ("max_steps", "-1", "optimizer steps; above 0 it wins over num_train_epochs"),
    ("per_device_train_batch_size", "8", "packs in a device batch"),
    ("gradient_accumulation_steps", "1", "device batches in an optimizer step"),
    ("learning_rate", "2e-05", "with --use_peft 2e-4"),
    ("lr_scheduler_type", "linear", "linear, cosine, constant, ..."),
    ("warmup_steps", "0", "steps of rising learning rate; below 1, a share of all"),
    ("weight_decay", "0.0", "of the optimizer"),
    ("optim", "adamw_torch_fused", "adamw_torch_fused, adafactor, paged_adamw_8bit, ..."),
    ("bf16", "", "mixed precision in bfloat16; on where a CUDA device has it"),
    ("gradient_checkpointing", "", "recompute activations to save memory; on on GPUs"),
    ("logging_steps", "10", "steps between log lines"),
    ("eval_strategy", "no", "when to evaluate: no, steps, epoch"),
    ("save_strategy", "steps", "when to save: no, steps, epoch"),
    ("save_steps", "500", "steps between checkpoints"),
    ("save_total_limit", "", "checkpoints that are kept"),
    ("resume_from_checkpoint", "", "a checkpoint's folder, or latest"),
    ("seed", "42", "of the order of the packs, and of dropout"),
    ("report_to", "none", "trackers: wandb, tensorboard, ..."),
)
"""The settings of transformers' TrainingArguments that matter most."""

PROGRAM = """usage: sfttrain run DIR --model NAME_OR_DIR --output_dir DIR [options]

Fine-tunes a causal language model on packs that `sftprep build` made.

  sfttrain run --help       the options that matter most
  sfttrain run --help-all   all of them
"""


def short_help() -> str:
    """The text of `sfttrain run --help`."""
    sections = (("options", OURS), ("training (transformers' TrainingArguments)", TRAINING))
    lines = [
        f"usage: {USAGE}",
        "",
        "Fine-tunes a causal language model on packs that `sftprep build` made.",
    ]
    for title, options in sections:
        lines += ["", f"{title}:"]
        for name, default, text in options:
            shown = {"data": "DIR", "model_name_or_path": "--model"}.get(name, f"--{name}")
            told = text.removeprefix(f"{shown}: ")
            lines.append(f"  {shown:<31} {told}" + (f" [{default}]" if default else ""))
    lines += [
        "",
        (
            "`sfttrain run --help-all` lists every option. Exit codes: 0 done, 1 failed, 2 usage or"
            " bad input, 3 environment."
        ),
    ]
    return "\n".join(lines)

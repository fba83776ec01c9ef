"""What `sfttrain run --help` prints, written down so that it comes at once: the classes that know take seconds to import.

tests/train/test_cli.py holds every line of it against those classes.
"""

from __future__ import annotations

USAGE = "sfttrain run DIR --model NAME_OR_DIR --output_dir DIR [options]"

OURS: tuple[tuple[str, str, str], ...] = (
    ("data", "", "DIR: folder of packs that `sftprep build` made"),
    ("eval_data", "", "folder of packs to evaluate on"),
    ("model_name_or_path", "", "--model: folder of a model, or its name on the Hub"),
    ("config", "", "YAML file of settings by their names below; flags win over it"),
    ("use_peft", "False", "train a LoRA adapter, not the model"),
    ("lora_r", "16", "rank of the adapter"),
    ("lora_alpha", "32", "scale of the adapter: alpha / r"),
    ("lora_dropout", "0.05", "dropout before the adapter"),
    ("lora_target_modules", "", "layers that get an adapter; all linear layers but the head"),
    ("lora_modules_to_save", "", "layers trained in full beside the adapter"),
    ("load_in_4bit", "False", "keep the base model in 4 bits, for adapters"),
    ("load_in_8bit", "False", "keep the base model in 8 bits, for adapters"),
    ("dtype", "", "precision of the weights: float32, bfloat16, float16, auto"),
    ("attn", "auto", "attention over packed rows: auto, flash_attention_4, _3, _2, torch_varlen, sft_varlen, unpack"),
    ("loss_impl", "auto", "auto, logits, or fused (logits are never kept)"),
    ("loss_type", "nll", "nll, or dft (tokens weighted by their own probability)"),
    ("isolation_guard", "True", "prove first that packed sequences cannot see each other (--no_isolation_guard: do not)"),
    ("allow_mismatch", "", "train although shards and model differ in: tokenizer, length"),
    ("json", "False", "print the summary as JSON"),
    ("debug", "", "show the traceback of an error"),
)
"""(setting, default, help): those of sfttrain. A default of '' is None, or one that the help tells."""

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
    lines = [f"usage: {USAGE}", "", "Fine-tunes a causal language model on packs that `sftprep build` made."]
    for title, options in sections:
        lines += ["", f"{title}:"]
        for name, default, text in options:
            shown = {"data": "DIR", "model_name_or_path": "--model"}.get(name, f"--{name}")
            told = text.removeprefix(f"{shown}: ")
            lines.append(f"  {shown:<31} {told}" + (f" [{default}]" if default else ""))
    lines += [
        "",
        "`sfttrain run --help-all` lists every option. Exit codes: 0 done, 1 failed, 2 usage or bad input, 3 environment.",
    ]
    return "\n".join(lines)

"""The text of `sfttrain run --help`, as constants for printing it immediately.

The dataclasses that define the settings take seconds to import. tests/sfttrain/test_cli.py compares
every line with them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from shutil import get_terminal_size

_INDENT = 34
"""The column of the descriptions."""
_NARROWEST, _WIDEST = 60, 100

_EXIT_CODES = "Exit codes: 0 done, 1 failed, 2 usage or invalid input, 3 environment."

USAGE = "sfttrain run DIR --model NAME_OR_DIR --output_dir DIR [options]"

OURS: tuple[tuple[str, str, str], ...] = (
    (
        "data",
        "",
        "DIR: folder of packs that `sftprep build` wrote, or a file or folder of raw records",
    ),
    (
        "eval_data",
        "",
        "as DIR, for evaluation; by default DIR/eval, if the build has it; none: no evaluation",
    ),
    (
        "dataset_name",
        "",
        "instead of DIR, as in TRL: a dataset on the Hub, or anything that DIR can be",
    ),
    ("dataset_config", "", "configuration of dataset_name"),
    ("dataset_train_split", "train", "split of dataset_name to train on"),
    ("dataset_test_split", "test", "split to evaluate on, unless eval_strategy is no"),
    ("dataset_streaming", "False", "read dataset_name without downloading it first"),
    ("model_name_or_path", "", "--model: folder of a model, or its name on the Hub"),
    ("config", "", "YAML file of settings by their names below; flags take precedence"),
    ("use_peft", "False", "train a LoRA adapter, not the model"),
    ("lora_r", "16", "rank of the adapter"),
    ("lora_alpha", "32", "scale of the adapter: alpha / r"),
    ("lora_dropout", "0.05", "dropout before the adapter"),
    (
        "lora_target_modules",
        "",
        "layers that get an adapter; by default all linear layers except the head",
    ),
    ("lora_modules_to_save", "", "layers trained in full alongside the adapter"),
    ("merge", "False", "also save the model with the adapter merged into it, in OUTPUT_DIR/merged"),
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
    ("loss_impl", "auto", "auto, logits, or fused (logits are never stored)"),
    ("loss_type", "nll", "nll, or dft (tokens weighted by their own probability)"),
    (
        "isolation_guard",
        "True",
        "first verify that packed sequences are isolated (--no_isolation_guard: skip this)",
    ),
    ("allow_mismatch", "", "train although shards and model differ in: tokenizer, length"),
    (
        "packing",
        "False",
        "put several raw records into a row of max_length (folders of packs are packed already)",
    ),
    ("packing_strategy", "bfd", "bfd, bfd_split, or wrapped, for raw records"),
    ("eval_packing", "", "pack raw evaluation records; by default the same as packing"),
    ("max_length", "1024", "maximum tokens of a raw record and of a row"),
    (
        "truncation_mode",
        "keep_start",
        "keep_start or keep_end: which end of a longer raw record is kept",
    ),
    ("completion_only_loss", "", "train on completions only; by default if the records have them"),
    ("assistant_only_loss", "False", "train on the assistant's messages only"),
    ("dataset_text_field", "text", "key of the text in raw records"),
    ("dataset_num_proc", "", "processes that prepare raw records"),
    ("dataset_kwargs", "", "JSON: skip_prepare_dataset"),
    (
        "reasoning",
        "",
        "reasoning of earlier turns: template, keep, expand or drop; by default as TRL",
    ),
    ("transform", "", "FILE.py:NAME: function that returns another record for a raw record"),
    ("transform_id", "", "version of a transform that has no source file"),
    ("shuffle_dataset", "False", "shuffle raw records before they are packed"),
    ("on_bad_record", "error", "error, or quarantine raw records that cannot be used"),
    ("images", "error", "error, or drop the images of raw records and keep their text"),
    ("format", "auto", "format of raw records, as for sftprep build; text also reads .txt files"),
    ("map", "", "keys of raw records to rename: Query=instruction,Reply=output"),
    ("escape_special", "False", "encode special tokens in the texts as plain text"),
    ("strip_nulls", "False", "leave out keys with null, which the columns of a table add"),
    ("as_chat", "", "read prompt and completion strings as turns of a user and an assistant"),
    ("train_roles", "", "roles of the turns that are trained: user assistant"),
    ("train_end", "turn", "turn, last or none: which tokens that end trained turns are trained"),
    ("system", "", "system message of raw conversations that have none"),
    ("chat_template_kwargs", "", "JSON: variables of the chat template for all raw records"),
    ("dataset_cache_dir", "", "folder of prepared datasets; by default in sftprep's cache"),
    ("eos_token", "", "token that ends a text or a turn; by default the tokenizer's own"),
    ("pad_token", "", "padding token that is saved with the tokenizer"),
    ("chat_template_path", "", "a .jinja file, or a tokenizer whose template is copied"),
    ("model_init_kwargs", "", "JSON: arguments of from_pretrained"),
    ("trust_remote_code", "False", "run code that comes with the model"),
    ("padding_free", "False", "has no effect: rows are never padded"),
    ("pad_to_multiple_of", "auto", "pad rows to a multiple of N tokens"),
    ("activation_offloading", "False", "keep activations in CPU memory"),
    (
        "router_aux_loss_coef",
        "",
        "weight of the loss that balances experts; by default that in the model's config",
    ),
    (
        "stream",
        "",
        (
            "INPUT...: raw records to tokenize while the model trains, instead of DIR; requires"
            " --max_steps"
        ),
    ),
    ("stream_window", "4096", "with --stream: number of sequences that are packed together"),
    (
        "stream_lanes",
        "16",
        "with --stream: parts into which the records are divided; a multiple of the ranks",
    ),
    ("stream_order", "shuffle", "with --stream: shuffle the records, or keep their order"),
    ("json", "False", "print the summary as JSON"),
    ("debug", "", "show the traceback of an error"),
)
"""(setting, default, help) of sfttrain's own settings. The default "" means None, or a default that
the help describes."""

TRAINING: tuple[tuple[str, str, str], ...] = (
    ("output_dir", "", "folder for the checkpoints and the trained model"),
    ("num_train_epochs", "3.0", "times through the packs"),
    ("max_steps", "-1", "optimizer steps; above 0 it replaces num_train_epochs"),
    ("per_device_train_batch_size", "8", "packs in a device batch"),
    ("gradient_accumulation_steps", "1", "device batches in an optimizer step"),
    ("learning_rate", "2e-05", "2e-4 with --use_peft"),
    ("lr_scheduler_type", "linear", "linear, cosine, constant, ..."),
    ("warmup_steps", "0", "steps of rising learning rate; below 1, a fraction of all"),
    ("weight_decay", "0.0", "weight decay of the optimizer"),
    ("optim", "adamw_torch_fused", "adamw_torch_fused, adafactor, paged_adamw_8bit, ..."),
    ("bf16", "", "mixed precision in bfloat16; by default on if a CUDA device supports it"),
    ("gradient_checkpointing", "", "recompute activations to save memory; by default on for GPUs"),
    ("logging_steps", "10", "steps between log lines"),
    ("eval_strategy", "no", "when to evaluate, besides at the end: no, steps, epoch"),
    ("save_strategy", "steps", "when to save: no, steps, epoch"),
    ("save_steps", "500", "steps between checkpoints"),
    ("save_total_limit", "", "number of checkpoints to keep"),
    ("resume_from_checkpoint", "", "the folder of a checkpoint, or latest"),
    ("seed", "42", "seed of the order of the packs, and of dropout"),
    ("report_to", "none", "trackers: wandb, tensorboard, ..."),
)
"""The most important settings of transformers' TrainingArguments."""

CHAT: tuple[tuple[str, str, str], ...] = (
    ("system", "", "system message of the conversation"),
    ("prompt", "", "answer this message, and end; - reads it from stdin"),
    ("max_new_tokens", "512", "maximum tokens of an answer"),
    (
        "temperature",
        "",
        "0: the most probable tokens; higher: more varied; by default the model's own settings",
    ),
    ("seed", "42", "seed of the sampling"),
    ("json", "False", "print each answer as a line of JSON"),
    ("model", "", "base model of an adapter; by default the one that it was trained on"),
    ("model_revision", "", "branch, tag or commit of the base model on the Hub"),
    ("chat_template", "", "Jinja file to use instead of the saved template"),
    ("trust_remote_code", "False", "run code that comes with the model"),
    ("use_cpu", "False", "do not use a GPU"),
    ("debug", "", "show the traceback of an error"),
)
"""(setting, default, help) of `sfttrain chat`, as in OURS."""

CHAT_HELP = """usage: sfttrain chat DIR [options]

Talks to the model or adapter in DIR, the output folder of a run or one of its checkpoints, with the
tokenizer and the chat template that were saved with it. An adapter loads its base model.

  sfttrain chat out                                 a conversation on the terminal
  sfttrain chat out --prompt "What is an Arrow file?" --temperature 0      a single answer
  sfttrain chat out --json < questions.txt          one line is one message of a conversation

On the terminal and in a file: /reset starts a new conversation, /exit ends. Ctrl-C ends an answer.
"""

PROGRAM = """usage: sfttrain run DIR --model NAME_OR_DIR --output_dir DIR [options]
       sfttrain chat DIR [options]
       sfttrain env [options]
       sfttrain completion SHELL

run fine-tunes a causal language model on packs that `sftprep build` wrote, and chat talks to it.

  sfttrain run --help       the most important options
  sfttrain run --help-all   all options
  sfttrain chat --help      all options of chat
  sfttrain env              versions, devices, and the attention that would be chosen
  sfttrain completion bash  a script that completes the options in a shell
"""

COMPLETION_USAGE = """usage: sfttrain completion bash|zsh|fish

Prints a script for a shell that completes commands, options and their values:

  source <(sfttrain completion bash)
  sfttrain completion bash >> ~/.bash_completion
  sfttrain completion zsh > ~/.zsh/completions/_sfttrain          in a folder of $fpath
  sfttrain completion fish > ~/.config/fish/completions/sfttrain.fish
"""

ENV_USAGE = """usage: sfttrain env [--tokenizer NAME_OR_DIR] [--json]

Shows what `sftprep env` shows (versions, the encoder of a tokenizer, caches, cores, memory), the
devices of torch, and the attention implementation that --attn auto tries first.
"""


_REQUIRED = ("data", "model_name_or_path", "output_dir")


def short_help() -> str:
    """Return the text of `sfttrain run --help`."""
    is_required = [entry for entry in (*OURS, *TRAINING) if entry[0] in _REQUIRED]
    sections = (
        ("required", is_required),
        ("options", [entry for entry in OURS if entry not in is_required]),
        (
            "training (transformers' TrainingArguments)",
            [entry for entry in TRAINING if entry not in is_required],
        ),
    )
    lines = [
        f"usage: {USAGE}",
        "",
        "Fine-tunes a causal language model on packs that `sftprep build` wrote.",
    ]
    for title, options in sections:
        lines += ["", f"{title}:", *_option_lines(options)]
    return "\n".join([*lines, "", "`sfttrain run --help-all` lists every option.", _EXIT_CODES])


def chat_help() -> str:
    """Return the text of `sfttrain chat --help`."""
    required = ["required:", "  DIR    folder of the model or adapter", ""]
    lines = [CHAT_HELP, *required, "options:", *_option_lines(CHAT)]
    return "\n".join([*lines, "", _EXIT_CODES])


def _option_lines(options: Sequence[tuple[str, str, str]]) -> list[str]:
    lines = []
    width = max(_NARROWEST, min(get_terminal_size().columns, _WIDEST))
    for name, default, text in options:
        shown = {"data": "DIR", "model_name_or_path": "--model"}.get(name, f"--{name}")
        # "DIR: ..." already starts with the name in the left column.
        description = text.removeprefix(f"{shown}: ")
        description += f" [{default}]" if default else ""
        wrapped = textwrap.wrap(description, width - _INDENT, break_on_hyphens=False)
        lines.append(f"  {shown:<{_INDENT - 3}} {wrapped[0]}")
        lines += (" " * _INDENT + line for line in wrapped[1:])
    return lines

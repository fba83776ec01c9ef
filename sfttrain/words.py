"""Errors of `sftprep.build` in the words of a training script: its datasets and SFTConfig's
settings."""

from __future__ import annotations

import copy
import re

from sftprep.errors import RecordError, SftprepError

DATASET_OF_STREAM = "the data set"
"""What a stream calls an iterable dataset."""


def in_words_of_the_trainer(error: SftprepError, name: str, rows: str | None) -> SftprepError:
    """The same error, of the same type.

    name: what the dataset is called; rows: what the error calls it, such as the file of ours that
    holds its rows, or None where it is a path of the user's.
    """
    told = copy.copy(error)
    if isinstance(told, RecordError) and told.file == rows:
        told.file, told.column = name, 0
    # What stands in a record, which a RecordError shows, is the user's and stays as it is.
    text, shown, excerpt = (
        error.message.partition("\n") if isinstance(error, RecordError) else (error.message, "", "")
    )
    if isinstance(error, RecordError):
        place = f"{error.file}:{error.line}" + (f":{error.column}" if error.column else "")
        text = (f"{name}:{error.line}" if error.file == rows else place) + text.removeprefix(place)
    told.message = _reworded(text, name, rows) + shown + excerpt
    told.remedy = _reworded(error.remedy, name, rows)
    told.args = (told.message,)
    return told


def _reworded(text: str, name: str, rows: str | None) -> str:
    if rows is not None:
        text = text.replace(rows, name)
        text = text.replace("fix the line", "fix the row").replace(
            "set such lines aside", "set such rows aside"
        )
        text = re.sub(
            r"rename keys with --map \S+=prompt,\S+=completion",
            f"rename columns ({name}.rename_columns)",
            text,
        )
        text = re.sub(
            r"rename keys (.*) with --map", rf"rename columns \1 ({name}.rename_columns)", text
        )
    for pattern, words in _WORDS:
        text = re.sub(pattern, words, text)
    return text


# The first that fits: phrases stand before the flags that are in them.
_WORDS: tuple[tuple[str, str], ...] = (
    (r"run with --on-bad-record quarantine", 'give on_bad_record="quarantine"'),
    (r"name the text with --text-field KEY", 'name the text with dataset_text_field="KEY"'),
    (r"rename keys (.*)with --map( \S+)?", r"rename keys \1in the file"),
    (
        r"use --train-on all or assistant",
        "leave completion_only_loss out, or give assistant_only_loss=True",
    ),
    (r"(use|give|leave out) --train-on all", "leave assistant_only_loss out"),
    (r"--train-on completion", "completion_only_loss=True"),
    (r"--train-on assistant", "assistant_only_loss=True"),
    (
        r"--format, --train-on and --max-length",
        "completion_only_loss, assistant_only_loss and max_length",
    ),
    (r"(one|template|another) with --chat-template( FILE)?", r"\1 with chat_template_path=FILE"),
    (r" or --expand-turns,", ","),
    (r"with --eos-token", "with eos_token"),
    (r"more than --max-length", "more than max_length"),
    (r"more than --max-rejected (\S+)", r"more than \1"),
    (r", or raise --max-rejected", " or leave them out"),
    (r", or train on what only looks wrong: --suspect keep", ""),
    (
        r"run with fewer --workers, or --workers 1 to see the error",
        "lower dataset_num_proc; with 1 the error is seen",
    ),
    (r"(another|elsewhere with|disk with) --output", r"\1 prepared_dir"),
    (r"choose one with --split (\S*)", r"load one of them: datasets.load_dataset(..., split='\1')"),
    (r"give --split with one of:", "load one of them with datasets.load_dataset:"),
    (
        r"choose one: --config-name (\S*)",
        r"load one of them: datasets.load_dataset(..., name='\1')",
    ),
    (r"give --config-name with one of:", "load one of them with datasets.load_dataset:"),
    (
        r"build the shards with the tokenizer of this model: .*",
        "give the tokenizer of this model as processing_class",
    ),
    (r"build with --max-length (\d+)", r"give max_length=\1"),
    (r"with --allow_mismatch (\w+)", r'with allow_mismatch=["\1"]'),
    (r"leave out --config-name", "leave its name out"),
)

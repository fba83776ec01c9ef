"""The command-line application, to which the modules of this package add commands."""

from __future__ import annotations

from cyclopts import App, Parameter

from sftprep.version import __version__

app = App(
    name="sftprep",
    version=__version__,
    help="""Prepare data for fine-tuning: turn conversations into packed, tokenized shards.

    Look at the tokens of some records, and find what is wrong, before anything is written:

        sftprep preview chats.jsonl --tokenizer Qwen/Qwen3-8B
        sftprep doctor chats.jsonl --tokenizer Qwen/Qwen3-8B

    Build shards, look at one pack, and check all of them:

        sftprep build chats.jsonl --tokenizer Qwen/Qwen3-8B --output shards
        sftprep inspect shards --row 0
        sftprep verify shards

    Share them on the Hugging Face Hub:

        sftprep push shards org/name

    Train on them with another tool, or start from its settings:

        sftprep export shards --to trl --output for-trl
        sftprep import axolotl.yaml --output build.yaml

    `sftprep build --help` explains the formats and settings.

    Exit codes: 0 ok; 1 a check failed; 2 usage error or invalid input; 3 environment (disk,
    permission, lock).
    """,
    # Flags such as --empty-map would only say what is so without them.
    default_parameter=Parameter(negative_iterable=(), negative_none=()),
    # `main` handles it.
    suppress_keyboard_interrupt=False,
)

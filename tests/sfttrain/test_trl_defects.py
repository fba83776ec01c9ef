"""Defects of TRL 1.16 that sfttrain does not have, one test each, through the public interface.

B1 to B19 are the numbers in this project's notes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, processors

import sftprep
from sftprep import BuildConfig
from sftprep.errors import SftprepError
from tests.semantics.prepared import prepare
from tests.sfttrain.packs import MemoryPacks, make_pack, split
from tests.sfttrain.test_trainer import trainer_for
from tests.sfttrain.trainer_factory import (
    CHATS,
    COMPLETIONS,
    TEXTS,
    losses,
    make_sft_trainer,
    sequences,
    write_lines,
)
from tests.support import rejected_file

ROOT = Path(__file__).resolve().parents[2]
TURNS = [{"role": "user", "content": "What is up?"}, {"role": "assistant", "content": "The sky."}]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] +"
    " '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n'"
    " }}{% endif %}"
)
"""A template without {% generation %} marks."""


def build(rows: list[Any], folder: Path, tokenizer: Path, **settings: Any) -> sftprep.BuildReport:
    path = write_lines(folder / "rows.jsonl", rows)
    return sftprep.build(
        BuildConfig.of(
            inputs=path, tokenizer=str(tokenizer), output=str(folder / "packs"), **settings
        )
    )


@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_b1_no_sequence_without_a_trained_token_packed_or_not(
    tokenizer_dir: Path, tmp_path: Path, packing: str
) -> None:
    rows = [{"prompt": "word " * n, "completion": "the end"} for n in (2, 3, 40, 50, 4)]
    report = build(rows, tmp_path, tokenizer_dir, max_length=24, packing=packing)
    account = report.manifest.accounting
    assert len(sequences(sftprep.open_shards(report.folder))) == account.sequences == 3
    assert all(any(marks[1:]) for _, marks in sequences(sftprep.open_shards(report.folder)))
    assert sum(account.dropped.values()) == 2
    assert not account.check()


def test_b2_evaluation_sets_are_never_packed_twice(model: Path, tmp_path: Path) -> None:
    # Of lengths that a second packing would put together otherwise.
    rows = [{"text": "word " * n} for n in (3, 9, 4, 11, 2, 7)]
    trainer = make_sft_trainer(
        model,
        tmp_path,
        TEXTS,
        packing=True,
        max_length=24,
        options={"eval_dataset": Dataset.from_list(rows)},
    )
    first = trainer.evaluate()
    assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == first["eval_loss"]
    again = trainer.evaluate({"a": Dataset.from_list(rows)})
    assert (again["eval_a_loss"], again["eval_a_num_tokens"]) == (
        first["eval_loss"],
        first["eval_num_tokens"],
    )
    alone = make_sft_trainer(
        model, tmp_path, TEXTS, packing=False, max_length=24, options={"eval_dataset": rows}
    ).evaluate()
    assert alone["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("eval_packing", [False, True])
def test_b3_packing_of_the_evaluation_set_does_not_mix_its_sequences(
    model: Path, tmp_path: Path, packing: bool, eval_packing: bool
) -> None:
    apart = make_sft_trainer(
        model, tmp_path, TEXTS, packing=False, eval_packing=False, options={"eval_dataset": TEXTS}
    ).evaluate()
    found = make_sft_trainer(
        model,
        tmp_path,
        TEXTS,
        packing=packing,
        eval_packing=eval_packing,
        options={"eval_dataset": TEXTS},
    )
    assert (len(found.eval_dataset) < len(TEXTS)) == eval_packing
    assert found.evaluate()["eval_loss"] == pytest.approx(apart["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("packing", [False, True])
def test_b4_rows_that_are_packed_already_keep_their_sequences(
    model: Path, tmp_path: Path, packing: bool
) -> None:
    packs = [make_pack([5, 9, 3], seed=1, trained=1.0), make_pack([4, 6], seed=2, trained=1.0)]
    rows = [
        {"input_ids": p.input_ids.tolist(), "seq_lengths": p.seq_lengths.tolist()} for p in packs
    ]
    trainer = make_sft_trainer(
        model, tmp_path, Dataset.from_list(rows), packing=packing, max_length=64
    )
    wanted = sorted(piece.input_ids.tolist() for pack in packs for piece in split(pack))
    assert [ids for ids, _ in sequences(trainer.train_dataset)] == wanted


def test_b5_what_a_record_is_does_not_depend_on_the_hash_seed(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    path = write_lines(
        tmp_path / "rows.jsonl",
        [{**COMPLETIONS[0], "messages": TURNS}, {**COMPLETIONS[1], "messages": TURNS}],
    )
    digests = set()
    for seed in ("0", "1", "2"):
        command = [
            sys.executable,
            "-c",
            "from sftprep.cli import main; main()",
            "build",
            path,
            "--tokenizer",
            str(tokenizer_dir),
        ]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, "--output", str(tmp_path / seed)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        digests.add(json.dumps(sequences(sftprep.open_shards(tmp_path / seed))))
    assert len(digests) == 1


def test_b6_a_prompt_text_alongside_messages(folder_with: Callable[[str], Path]) -> None:
    folder = folder_with(CHATML)
    beside = prepare([{"prompt": "What is up?", "prompt_id": "a", "messages": TURNS}], folder)
    assert beside.text() == prepare([{"messages": TURNS}], folder).text()


def test_b7_and_b8_sharegpt_with_an_assistant_mask(
    folder_with: Callable[[str], Path],
) -> None:
    folder = folder_with(CHATML)
    wanted = prepare([{"messages": TURNS}], folder, train_on="assistant")
    assert wanted.trained() == ["The sky.<|im_end|>"]
    old = {
        "conversations": [
            {"from": "human", "value": "What is up?"},
            {"from": "gpt", "value": "The sky."},
        ]
    }
    for row in (old, {"conversations": TURNS}):
        found = prepare([row], folder, train_on="assistant")
        assert (found.text(), found.trained()) == (wanted.text(), wanted.trained())


def test_b8_in_the_trainer(model: Path, tmp_path: Path) -> None:
    rows = [
        {
            "conversations": [
                {"from": {"user": "human"}.get(m["role"], "gpt"), "value": m["content"]}
                for m in row["messages"]
            ]
        }
        for row in CHATS
    ]
    wanted = make_sft_trainer(model, tmp_path, CHATS, assistant_only_loss=True)
    found = make_sft_trainer(model, tmp_path, rows, assistant_only_loss=True)
    assert sequences(found.train_dataset) == sequences(wanted.train_dataset)
    found.train()
    assert losses(found)[-1] < losses(found)[0]


@pytest.mark.parametrize("more", [{}, {"dataset_text_field": "body"}])
def test_b9_a_formatting_function_is_called_whatever_the_columns(
    model: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    rows = [
        {"messages": TURNS, "prompt": f"p{n}", "completion": "c", "body": "b"} for n in range(4)
    ]
    wanted = make_sft_trainer(model, tmp_path, [{"text": f"Made of p{n}"} for n in range(4)])
    found = make_sft_trainer(
        model,
        tmp_path,
        rows,
        options={"formatting_func": lambda row: f"Made of {row['prompt']}"},
        **more,
    )
    assert sequences(found.train_dataset) == sequences(wanted.train_dataset)


def test_b10_an_empty_list_of_tools_is_no_tools(folder_with: Callable[[str], Path]) -> None:
    """The templates of Llama 3.1 test whether tools are defined, and not whether there are any."""
    folder = folder_with(
        "{% if tools is defined and tools is not none %}{{ 'You may call tools. ' }}{% endif %}"
        + CHATML
    )
    none, empty = (
        prepare([{"messages": TURNS}], folder),
        prepare([{"messages": TURNS, "tools": []}], folder),
    )
    some = prepare(
        [{"messages": TURNS, "tools": [{"type": "function", "function": {"name": "f"}}]}], folder
    )
    assert empty.text() == none.text() == some.text().replace("You may call tools. ", "")
    assert some.text() != none.text()


def test_b11_arguments_hold_what_the_record_says(
    folder_with: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_with(
        "{% for m in messages %}{{ m.role }}: {{ m.tool_calls | tojson if m.tool_calls else"
        " m.content }}\n{% endfor %}"
    )
    rows = [
        {
            "messages": [
                TURNS[0],
                {"role": "assistant", "content": "", "tool_calls": [_call(arguments)]},
            ]
        }
        for arguments in ({"a": "1"}, {"b": 2.5})
    ]
    clean = prepare(rows, folder, format="messages")
    assert "null" not in clean.text(0) + clean.text(1)
    # A Dataset made of such rows has nulls in it before anybody reads it; told to, they are left
    # out.
    with_nulls = sftprep.build(
        Dataset.from_list(rows), tokenizer=folder, output=tmp_path / "packs", strip_nulls=True
    )
    wanted = sorted(clean.batch.input_ids[clean.slice(n)].tolist() for n in (0, 1))
    assert [ids for ids, _ in sequences(sftprep.open_shards(with_nulls.folder))] == wanted


def _call(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "arguments": arguments}}


def test_b12_a_repeated_start_token_is_counted(tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    start = ("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start[0]} $A", special_tokens=[start]
    )
    config = json.loads((tokenizer_dir / "tokenizer_config.json").read_text())
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": start[0]}))
    report = build(
        [{"text": "<|endoftext|>Once."}, {"text": "Twice."}, {"text": "Thrice.<|im_end|>"}],
        tmp_path,
        folder,
    )
    assert report.manifest.accounting.warnings["double_bos"] == 1
    # An end that the text has already is not put there again.
    end = tokenizer.token_to_id("<|im_end|>")
    assert all(
        ids.count(end) == 1 and ids[-1] == end
        for ids, _ in sequences(sftprep.open_shards(report.folder))
    )


BAD = {
    "no text": {"text": None},
    "no completion": {"prompt": "a", "completion": None},
    "no messages": {"messages": []},
    "null content": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]
    },
}


@pytest.mark.parametrize("bad", list(BAD))
def test_b13_faults_of_a_row_are_located_and_counted(
    tokenizer_dir: Path, tmp_path: Path, bad: str
) -> None:
    good: dict[str, Any] = {
        "text": TEXTS[0],
        "prompt": COMPLETIONS[0],
        "messages": {"messages": TURNS},
    }[next(iter(BAD[bad]))]
    rows = [*[good] * 200, BAD[bad], good]
    with pytest.raises(SftprepError, match=r"rows\.jsonl:201") as caught:
        build(rows, tmp_path, tokenizer_dir)
    assert caught.value.remedy
    report = build(rows, tmp_path, tokenizer_dir, on_bad_record="quarantine")
    account = report.manifest.accounting
    assert (account.records, account.sequences, sum(account.rejected.values())) == (202, 201, 1)
    assert json.loads(rejected_file(report.folder).read_text().splitlines()[0])["line"] == 201


def test_b13_valid_rows_are_not_faults(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Null values count as absent, and one row has an empty assistant message."""
    rows = [
        {"messages": TURNS, "chat_template_kwargs": None},
        {"messages": TURNS[:1]},
        {"messages": TURNS},
    ]
    report = build(rows, tmp_path, tokenizer_dir, train_on="assistant")
    account = report.manifest.accounting
    assert (account.sequences, sum(account.dropped.values())) == (2, 1)


def test_b14_a_mask_does_not_change_the_text(folder_with: Callable[[str], Path]) -> None:
    """A template that drops earlier thoughts, as that of Qwen3 does."""
    folder = folder_with(
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if"
        " message.reasoning_content is defined and loop.last %}<think>{{ message.reasoning_content"
        " }}</think>{% endif %}{{ message.content + '<|im_end|>\n' }}{% endfor %}"
    )
    said = {**TURNS[1], "reasoning_content": "Look up."}
    row = {"messages": [TURNS[0], said, TURNS[0], said]}
    every, masked = (
        prepare([row], folder, train_on="all"),
        prepare([row], folder, train_on="assistant"),
    )
    assert every.text() == masked.text()
    assert every.text().count("<think>") == 1
    assert len(masked.trained()) == 2


@pytest.mark.parametrize(
    "change",
    [
        ("{{ '<|im_start|>'", "{{  '<|im_start|>'"),
        ("message['role'] + '\n'", "message.role + '\n '"),
    ],
)
def test_b15_a_template_that_was_edited_is_masked_too(
    folder_with: Callable[[str], Path], change: tuple[str, str]
) -> None:
    assert change[0] in CHATML
    found = prepare(
        [{"messages": TURNS}], folder_with(CHATML.replace(*change)), train_on="assistant"
    )
    assert [text.strip() for text in found.trained()] == ["The sky.<|im_end|>"]


def test_b16_padding_free_with_a_length(model: Path, tmp_path: Path) -> None:
    trainer = make_sft_trainer(
        model, tmp_path, TEXTS, padding_free=True, packing=False, max_length=8
    )
    assert max(len(ids) for ids, _ in sequences(trainer.train_dataset)) <= 8
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_b17_tokens_are_counted_without_padding_and_across_a_resume(
    tmp_path: Path, model: Path
) -> None:
    trainer = make_sft_trainer(
        model,
        tmp_path,
        TEXTS,
        padding_free=True,
        pad_to_multiple_of=64,
        max_steps=1,
        per_device_train_batch_size=len(TEXTS),
    )
    trainer.train()
    logged = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
    assert logged == [sum(sum(marks[1:]) for _, marks in sequences(trainer.train_dataset))]
    packs = MemoryPacks([make_pack([8, 5], seed=n, trained=1.0) for n in range(6)])
    settings: dict[str, Any] = {
        "packs": packs,
        "per_device_train_batch_size": 1,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    trainer_for(tmp_path / "run", max_steps=4, **settings).train()
    resumed = trainer_for(tmp_path / "run", max_steps=6, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.trained_tokens == 6 * (7 + 4)


@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_b18_every_token_that_is_lost_is_counted(
    tokenizer_dir: Path, tmp_path: Path, packing: str
) -> None:
    rows = [{"text": "word " * n} for n in (3, 60, 5, 90)]
    lengths = [len(prepare([row], tokenizer_dir).batch.input_ids) for row in rows]
    account = build(
        rows, tmp_path, tokenizer_dir, max_length=32, packing=packing
    ).manifest.accounting
    assert account.tokens_in == sum(lengths)
    assert account.tokens == sum(min(length, 32) for length in lengths)
    assert account.tokens_truncated == sum(max(0, length - 32) for length in lengths)
    assert (account.truncated, account.check()) == (2, [])


def test_b19_a_completion_mask_of_texts_is_refused(
    model: Path, tmp_path: Path, tokenizer_dir: Path
) -> None:
    with pytest.raises(SftprepError, match="completion"):
        make_sft_trainer(model, tmp_path, TEXTS, completion_only_loss=True)
    with pytest.raises(SftprepError, match="completion"):
        build(TEXTS, tmp_path, tokenizer_dir, train_on="completion")
    assert np.all(
        [
            marks
            for _, marks in sequences(make_sft_trainer(model, tmp_path, TEXTS[:1]).train_dataset)
        ]
    )

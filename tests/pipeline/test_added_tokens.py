"""Tokens of a chat template that the tokenizer of a base model lacks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import sftprep
from sftprep.chat_template.markers import find_markers
from sftprep.chat_template.shipped import SHIPPED_TEMPLATES, read_shipped
from sftprep.cli.entry import main
from sftprep.errors import OutputExists, TemplateError, TokenizerError
from sftprep.stream import open_stream
from tests.conftest import EXAMPLES
from tests.support import SHARED, needs_shared

MARKERS = ["<|im_start|>", "<|im_end|>"]
ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            *([{"role": "system", "content": "Be short, élan 中."}] if number % 2 else []),
            {"role": "user", "content": f"  What is {number} plus one?\n"},
            {"role": "assistant", "content": f"It is {number + 1}. <end>"},
        ]
    }
    for number in range(6)
]
COMPOSED = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ m.content }}<|stop|>{% endfor %}"
    "{# <|comment|> #}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ENCODERS = ["auto", "tokenizers"]


@pytest.fixture
def base(base_tokenizer_dir: Path) -> Path:
    return base_tokenizer_dir


def extended(folder: Path, tokens: list[str], template: str) -> Any:
    """Return what transformers makes of a tokenizer with further special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.chat_template = template
    return tokenizer


def built_ids(folder: Path) -> list[list[int]]:
    return sorted(pack.input_ids.tolist() for pack in sftprep.open_shards(folder))


def expected_ids(tokenizer: Any) -> list[list[int]]:
    return sorted(
        tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        for row in ROWS
    )


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {"tokenizer": str(folder), "packing": "none", "workers": 1, "max_length": 512, **more}


@pytest.mark.parametrize("encoder", ENCODERS)
def test_ids_are_those_of_transformers(base: Path, tmp_path: Path, encoder: str) -> None:
    more = {"chat_template": "chatml", "encoder": encoder}
    sftprep.build(ROWS, output=tmp_path / "out", **settings(base, **more))
    template = read_shipped("chatml")
    assert template is not None
    assert built_ids(tmp_path / "out") == expected_ids(extended(base, MARKERS, template.source))


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "mistral-v1", "mistral-v3", "t5", "deepseek-v4"])
def test_ids_of_real_base_tokenizers(name: str, tmp_path: Path) -> None:
    template = read_shipped("chatml")
    assert template is not None
    folder = SHARED / "tokenizers" / name
    expected = expected_ids(extended(folder, MARKERS, template.source))
    for encoder in ENCODERS:
        more = {"chat_template": "chatml", "encoder": encoder}
        report = sftprep.build(ROWS, output=tmp_path / encoder, **settings(folder, **more))
        assert built_ids(tmp_path / encoder) == expected
        facts = report.manifest.tokenizer
        assert [entry["content"] for entry in facts["added"]] == MARKERS
        stored = AutoTokenizer.from_pretrained(next((tmp_path / encoder / "tokenizer").iterdir()))
        assert sftprep.tokenizer_spec(stored).fingerprint == facts["fingerprint"]
        assert expected_ids(stored) == expected


def test_the_stored_tokenizer_is_the_one_of_the_shards(base: Path, tmp_path: Path) -> None:
    report = sftprep.build(
        ROWS, output=tmp_path / "out", eval_fraction=0.3, **settings(base, chat_template="chatml")
    )
    facts = report.manifest.tokenizer
    stored = AutoTokenizer.from_pretrained(next((tmp_path / "out" / "tokenizer").iterdir()))
    assert sftprep.tokenizer_spec(stored).fingerprint == facts["fingerprint"]
    assert (stored.eos_token, stored.eos_token_id) == ("<|im_end|>", facts["eos_token_id"])
    assert stored.convert_tokens_to_ids(MARKERS) == [entry["id"] for entry in facts["added"]]
    assert set(MARKERS) <= set(stored.all_special_tokens)
    ids = stored.apply_chat_template(ROWS[1]["messages"], tokenize=True, return_dict=False)
    assert stored.decode(ids, skip_special_tokens=True).startswith("system\nBe short")
    assert report.evaluation is not None
    assert "files" not in report.evaluation.tokenizer
    assert sftprep.verify(tmp_path / "out").ok
    assert sftprep.verify(tmp_path / "out" / "eval").ok


def test_only_the_assistant_and_the_end_of_its_turn_are_trained(base: Path, tmp_path: Path) -> None:
    more = {"chat_template": "chatml", "train_on": "assistant"}
    sftprep.build(ROWS, output=tmp_path / "out", **settings(base, **more))
    stored = AutoTokenizer.from_pretrained(next((tmp_path / "out" / "tokenizer").iterdir()))
    trained = {
        stored.decode(pack.input_ids[pack.completion_mask].tolist())
        for pack in sftprep.open_shards(tmp_path / "out")
    }
    assert trained == {f"It is {n + 1}. <end><|im_end|>" for n in range(6)}


@pytest.mark.parametrize("explicit", [None, "<|endoftext|>", "<|im_start|>"])
def test_the_end_token_is_that_of_turns_unless_it_is_specified(
    base: Path, explicit: str | None
) -> None:
    more = {} if explicit is None else {"eos_token": explicit}
    shown = sftprep.preview([{"text": "a"}], **settings(base, chat_template="chatml", **more))
    (sequence,) = shown.records[0].sequences
    assert sequence.pieces[-1] == (explicit or "<|im_end|>")


def test_markers_of_a_file_are_tokens_too(base: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(COMPOSED)
    more = {"chat_template": str(tmp_path / "t.jinja")}
    report = sftprep.build(ROWS, output=tmp_path / "out", **settings(base, **more))
    tokens = [entry["content"] for entry in report.manifest.tokenizer["added"]]
    assert sorted(tokens) == ["<|assistant|>", "<|stop|>", "<|system|>", "<|user|>"]
    expected = extended(base, tokens, COMPOSED)
    assert built_ids(tmp_path / "out") == expected_ids(expected)
    stop = expected.convert_tokens_to_ids("<|stop|>")
    assert report.manifest.tokenizer["eos_token_id"] == stop


def test_known_markers_change_nothing(tokenizer_dir: Path, tmp_path: Path) -> None:
    more = {"chat_template": str(EXAMPLES / "chatml.jinja")}
    report = sftprep.build(ROWS, output=tmp_path / "out", **settings(tokenizer_dir, **more))
    assert "added" not in report.manifest.tokenizer
    assert not (tmp_path / "out" / "tokenizer").exists()


def test_the_template_of_another_tokenizer_comes_with_its_tokens(
    base: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    more = {"chat_template": str(tokenizer_dir)}
    report = sftprep.build(ROWS, output=tmp_path / "out", **settings(base, **more))
    other = AutoTokenizer.from_pretrained(tokenizer_dir)
    assert report.manifest.chat_template == other.chat_template
    expected = extended(base, MARKERS, other.chat_template)
    assert built_ids(tmp_path / "out") == expected_ids(expected)
    assert report.manifest.tokenizer["eos_token_id"] == expected.convert_tokens_to_ids("<|im_end|>")
    with pytest.raises(TemplateError, match="has no chat template") as caught:
        sftprep.preview(ROWS, **settings(tokenizer_dir, chat_template=str(base)))
    assert "chatml" in caught.value.remedy


def test_a_file_has_precedence_over_a_name(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("chatml").write_text(COMPOSED)
    shown = sftprep.preview(ROWS[:1], **settings(base, chat_template="chatml"))
    assert shown.records[0].sequences[0].pieces[0] == "<|user|>"


def test_unknown_names_offer_the_templates_that_exist(base: Path, tmp_path: Path) -> None:
    with pytest.raises(TemplateError) as caught:
        sftprep.preview(ROWS, **settings(base, chat_template=str(tmp_path / "no.jinja")))
    assert all(name in caught.value.remedy for name in SHIPPED_TEMPLATES)
    with pytest.raises(TemplateError, match="no chat template") as caught:
        sftprep.preview(ROWS, **settings(base))
    assert "chatml" in caught.value.remedy


def test_a_tokenizer_that_splits_special_tokens_is_refused(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "splits"
    shutil.copytree(base, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**config, "split_special_tokens": True})
    )
    with pytest.raises(TokenizerError, match="ordinary text"):
        sftprep.preview(ROWS, **settings(folder, chat_template="chatml"))


def test_a_stream_has_the_same_ids(base: Path, tmp_path: Path) -> None:
    more = {"chat_template": "chatml"}
    sftprep.build(ROWS, output=tmp_path / "out", **settings(base, **more))
    options = {"tokenizer": str(base), "max_length": 512, **more}
    stream = open_stream(lambda: iter(ROWS), **options)
    found: list[list[int]] = []
    for pack in stream:
        ends = pack.seq_lengths.cumsum().tolist()
        starts = [0, *ends[:-1]]
        found += (
            pack.input_ids[start:end].tolist() for start, end in zip(starts, ends, strict=True)
        )
    assert sorted(found) == built_ids(tmp_path / "out")


# --- the folder of the build ----------------------------------------------------------------------


@pytest.fixture
def build(base: Path, tmp_path: Path) -> Path:
    more = {"chat_template": "chatml"}
    sftprep.build(ROWS, output=tmp_path / "build", **settings(base, **more))
    return tmp_path / "build"


def stored_files(folder: Path) -> Iterator[Path]:
    return (folder / "tokenizer").glob("*/*")


def test_another_build_replaces_the_stored_tokenizer(
    build: Path, base: Path, tokenizer_dir: Path
) -> None:
    before = {path.parent.name for path in stored_files(build)}
    (build.parent / "t.jinja").write_text(COMPOSED)
    more = {"chat_template": str(build.parent / "t.jinja")}
    sftprep.build(ROWS, output=build, overwrite=True, **settings(base, **more))
    after = {path.parent.name for path in stored_files(build)}
    assert len(after) == 1
    assert after != before
    sftprep.build(ROWS, output=build, overwrite=True, **settings(tokenizer_dir))
    assert not (build / "tokenizer").exists()
    assert sftprep.verify(build).ok


def test_a_file_of_the_user_is_never_removed(build: Path, base: Path) -> None:
    (build / "tokenizer" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExists, match=r"notes\.txt"):
        sftprep.build(ROWS, output=build, overwrite=True, **settings(base, chat_template="chatml"))
    assert not sftprep.verify(build).ok


@pytest.mark.parametrize("change", ["damage", "remove"])
def test_verify_finds_a_damaged_tokenizer(build: Path, base: Path, change: str) -> None:
    path = next(path for path in stored_files(build) if path.name == "tokenizer.json")
    if change == "damage":
        path.write_bytes(path.read_bytes().replace(b"<|im_end|>", b"<|im_EnD|>"))
    else:
        path.unlink()
    result = sftprep.verify(build)
    assert not result.ok
    assert any("is not what was written" in str(problem) for problem in result.problems)
    if change == "remove":  # the same build repairs it; a changed file may be the user's
        sftprep.build(ROWS, output=build, overwrite=True, **settings(base, chat_template="chatml"))
        assert sftprep.verify(build).ok


def test_merged_builds_keep_the_tokenizer(build: Path, base: Path, tmp_path: Path) -> None:
    rows = [{"messages": [*row["messages"], *row["messages"][-2:]]} for row in ROWS]
    more = {"chat_template": "chatml"}
    sftprep.build(rows, output=tmp_path / "other", **settings(base, **more))
    merged = sftprep.merge(build, tmp_path / "other", output=tmp_path / "merged")
    assert {path.name for path in stored_files(tmp_path / "merged")} == {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert merged.tokenizer["added"] == sftprep.read_manifest(build).tokenizer["added"]
    assert sftprep.verify(tmp_path / "merged").ok


def test_the_summary_and_inspect_show_the_tokens(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags = ["--tokenizer", str(base), "--chat-template", "chatml", "-o", str(tmp_path / "out")]
    build = ["build", str(tmp_path / "a.jsonl"), *flags]
    for command in (build, ["inspect", str(tmp_path / "out")]):
        with pytest.raises(SystemExit) as end:
            main(command)
        assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "tokenizer: 2 tokens of the chat template added: <|im_start|> <|im_end|>" in shown
    assert "<|im_start|>assistant\n" in shown
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`<|im_end|>`" in card


# --- markers and the template ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "tokens", "end"),
    [
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", (), None),
        ("### {{ messages[0].content }} <b> <| x |> <||>", (), None),
        ("{{ '<｜User｜>' }}{{ messages[0].content }}", ("<｜User｜>",), None),
        ("{{ raise_exception('no <|x|>') }}", ("<|x|>",), None),
    ],
)
def test_markers_are_strings_of_one_form(
    template: str, tokens: tuple[str, ...], end: str | None
) -> None:
    found = find_markers(template, {})
    assert (found.tokens, found.end_token) == (tokens, end)


@needs_shared
def test_markers_of_the_templates_of_models() -> None:
    folder = SHARED / "tokenizers" / "_chat_templates_trl_1.16.0"
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    ends = {
        name: find_markers((folder / f"{name}.jinja").read_text(), variables).end_token
        for name in ("qwen3", "llama3", "phi3", "gptoss", "gemma")
    }
    assert ends == {
        "qwen3": "<|im_end|>",
        "llama3": "<|eot_id|>",
        "phi3": "<|end|>",
        "gptoss": "<|return|>",
        "gemma": None,
    }


def test_chatml_shows_tools_calls_and_reasoning(base: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    answer = {"role": "assistant", "reasoning_content": "Use it.", "content": ""}
    row = {
        "messages": [
            {"role": "system", "content": "Count."},
            {"role": "user", "content": "1 + 1?"},
            {**answer, "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "Two."},
        ],
        "tools": [{"type": "function", "function": {"name": "add", "description": "Adds."}}],
    }
    more = {"chat_template": "chatml", "train_on": "assistant"}
    shown = sftprep.preview([row], **settings(base, **more))
    (sequence,) = shown.records[0].sequences
    text = "".join(sequence.pieces)
    assert shown.ok, shown.verdicts
    assert text.startswith("<|im_start|>system\nCount.\n\nThese functions")
    assert "Adds." in text
    trained = "".join(
        piece
        for piece, is_trained in zip(sequence.pieces, sequence.completion_mask, strict=True)
        if is_trained
    )
    assert trained == (
        '<think>\nUse it.\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n'
        "</tool_call><|im_end|>Two.<|im_end|>"
    )


def test_an_export_says_where_the_tokenizer_is(build: Path, tmp_path: Path) -> None:
    script = sftprep.export(build, to="trl", output=tmp_path / "trl").script
    folder = next((build / "tokenizer").iterdir())
    assert script.startswith(f"# The build added tokens to the tokenizer, which is in {folder}.\n")
    assert "resize_token_embeddings" in script
    compile(script, "script", "exec")
